"""What a converted layer keeps between uses: memory for its weight, and the weight itself while nothing changes.

A weight over 32 MiB gets fresh pages from the system at every allocation, and touching them for the first time costs
several times the arithmetic. `Rooms` lends the same memory again once nobody holds what was computed in it.

In evaluation the weight is the same from one call to the next. `Kept` holds it, and tells whether it still is: tensor
versions count every in-place operation; optimizer steps are counted apart, since torch's fused optimizers leave the
versions as they are; and because writes through `.data` leave no count anywhere, a few bytes of g, v and the weight are
compared, all bytes of small ones.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = [
    "AHEAD",
    "LARGE",
    "Kept",
    "Probes",
    "Rooms",
    "extent",
    "holders",
    "holders_and_handles",
    "is_alone",
    "looked_at",
    "places_in",
    "probes_of",
    "steps",
]

AHEAD = 1 << 17  # elements above which a weight that is kept ahead of its use would have left the cache by then
LARGE = 1 << 16  # elements from which memory is worth keeping; smaller blocks come warm from the allocator
_PROBE = 32  # bytes compared at each of a few places
_OURS = 2  # references to a tensor that is an attribute, and asked for their number
_WHOLE = 1 << 11  # bytes of a tensor up to which all are compared


class Rooms:
    """Memory for tensors, by name and shape; in use as long as any tensor or graph holds the last loan.

    >>> rooms, like = Rooms(), torch.zeros(1 << 16)
    >>> first = rooms.take("w", like)
    >>> start, first = first.data_ptr(), None
    >>> rooms.take("w", like).data_ptr() == start
    True
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.Size], Tensor] = {}

    def take(self, name: str, like: Tensor) -> Tensor | None:
        """Uninitialised memory laid out like a tensor, None where none is kept or somebody still holds it.

        What is returned is a tensor of its own: writing to it counts no version of an earlier loan.
        """
        if like.device.type != "cpu" or like.numel() < LARGE:
            return None
        place = name, like.shape
        memory = self._memory.pop(place, None)  # nobody else finds it while it is looked at
        if memory is None or memory.is_inference() or not (_alike(memory, like) and _is_own(memory)):
            memory = torch.empty_like(like, requires_grad=False)
        elif not is_alone(memory):
            self._memory[place] = memory
            return None
        self._memory[place] = memory
        return memory.data


def is_alone(memory: Tensor) -> bool:
    """Whether no other tensor has the memory of one, and nobody holds the memory's own object."""
    return holders_and_handles(memory) == _ALONE


def _is_own(memory: Tensor) -> bool:
    """Whether a tensor's memory is still all there, and this process' alone."""
    storage = memory.untyped_storage()
    return storage.nbytes() >= memory.nbytes and not storage.is_shared()


def holders(memory: Tensor) -> int:
    """How many tensors have the memory of one, itself and the handle that counting takes included."""
    return holders_and_handles(memory)[0]


def holders_and_handles(memory: Tensor) -> tuple[int, int]:
    """`holders`, and how often Python holds the memory's own object, which counting itself does, too."""
    storage = memory.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


_ALONE = holders_and_handles(torch.empty(1, device="cpu"))  # of memory that only one tensor has


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()


class _Steps:
    """How many optimizer steps this process has seen since somebody first kept a weight."""

    def __init__(self) -> None:
        self.count, self.counting = 0, False

    def start(self) -> None:
        if not self.counting:
            self.counting = True
            register_optimizer_step_post_hook(self._one_more)

    def _one_more(self, *_: Any) -> None:
        self.count += 1


steps = _Steps()
_no_steps = _Steps()


class Kept:
    """A computed weight with everything that tells whether its g and v, or it itself, have been written to since.

    `count_steps=False` leaves optimizer steps out: for a caller who renews the weight after each of them.
    """

    __slots__ = (
        "_counted",
        "_g",
        "_g_at",
        "_g_version",
        "_own",
        "_own_length",
        "_own_places",
        "_pair_places",
        "_places",
        "_seen",
        "_step",
        "_v",
        "_v_at",
        "_v_version",
        "_version",
        "_w_at",
        "used",
        "w",
    )

    def __init__(
        self, w: Tensor, g: Tensor, v: Tensor, *, count_steps: bool = True, probes: Probes | None = None
    ) -> None:
        steps.start()
        self.w, self._g, self._v = w, g, v
        self.used = False  # for whoever keeps weights ahead of their use
        self._counted = steps if count_steps else _no_steps
        self._own_places = places_in(w)
        self._own_length = sum(map(len, self._own_places))
        self._pair_places = (Probes(g, v) if probes is None else probes).places
        self._places = self._own_places + self._pair_places
        self._g_at, self._v_at, self._w_at = g.data_ptr(), v.data_ptr(), w.data_ptr()
        self.renew()

    def renew(self) -> None:
        """The weight was computed anew from the same g and v, in the same memory."""
        self._version, self._g_version, self._v_version = self.w._version, self._g._version, self._v._version
        self._seen = looked_at(self._places)
        self._own = self._seen[: self._own_length]
        self._step = self._counted.count

    def is_where_it_was(self) -> bool:
        """Whether all three are in the memory they were in."""
        places = self._g.data_ptr(), self._v.data_ptr(), self.w.data_ptr()
        return places == (self._g_at, self._v_at, self._w_at)

    def is_written(self) -> bool:
        """Whether somebody wrote into the weight itself, or put other memory under it."""
        w = self.w
        return w._version != self._version or w.data_ptr() != self._w_at or looked_at(self._own_places) != self._own

    def is_held(self) -> bool:
        """Whether somebody else has the weight, too."""
        return sys.getrefcount(self.w) > _OURS

    def has_v_as_it_was(self, v: Tensor) -> bool:
        """Whether this is the pair's v, not written to since."""
        return v is self._v and v._version == self._v_version and v.data_ptr() == self._v_at

    def was_of(self, g: Tensor | None, v: Tensor | None) -> bool:
        """Whether this pair has not been written to since, so that a write into the weight is the latest word."""
        if g is not self._g or v is not self._v:
            return False
        return self._g._version == self._g_version and self._v._version == self._v_version

    def is_pair_as_it_was(self, g: Tensor, v: Tensor) -> bool:
        """The same by all that can be told, writes that torch has not seen included."""
        return (
            self.was_of(g, v)
            and g.data_ptr() == self._g_at
            and v.data_ptr() == self._v_at
            and looked_at(self._pair_places) == self._seen[self._own_length :]
        )

    def is_of(self, g: Any, v: Any) -> bool:
        """Whether it is still the weight of this pair, tensors or None."""
        return (  # `was_of` is here, too, for this is asked at every use of a weight in evaluation
            g is self._g
            and v is self._v
            and g._version == self._g_version
            and v._version == self._v_version
            and self.w._version == self._version
            and self._step == self._counted.count
            and g.data_ptr() == self._g_at  # before the bytes, which are read where the pair was
            and v.data_ptr() == self._v_at
            and self.w.data_ptr() == self._w_at
            and looked_at(self._places) == self._seen
        )

    @staticmethod
    def can_hold(g: Tensor, v: Tensor) -> bool:
        """Whether changes of this pair can be seen: ordinary tensors in the CPU's memory, and this process' alone."""
        if v.device.type != "cpu" or g.device.type != "cpu" or v.is_inference() or g.is_inference():
            return False
        return not (v.is_shared() or g.is_shared())  # type: ignore[no-untyped-call]


looked_at: Callable[[Iterable[Any]], bytes] = b"".join  # what is at places in memory now


def places_in(w: Tensor) -> list[Any]:
    """Where to look whether a weight was written to."""
    return _places(w, (1, 3))


class Probes:
    """Where to look whether a pair was written to: all bytes of a half that has up to `whole`, else a few.

    >>> g, v = torch.ones(2, 1), torch.ones(2, 3)
    >>> probes = Probes(g, v)
    >>> before = looked_at(probes.places)
    >>> _ = v.data.mul_(2.0)
    >>> before == looked_at(probes.places)
    False
    """

    __slots__ = ("at", "places")

    def __init__(self, g: Tensor, v: Tensor, whole: int = _WHOLE) -> None:
        self.at = g.data_ptr(), v.data_ptr()
        self.places = [*_places(g, (2,), whole), *_places(v, (1, 3), whole)]


def probes_of(owner: Any, g: Tensor, v: Tensor) -> Probes:
    """The probes of an owner's pair, made anew where it has moved."""
    probes: Probes | None = owner.__dict__.get("_probes")
    if probes is None or probes.at != (g.data_ptr(), v.data_ptr()):
        probes = owner.__dict__["_probes"] = Probes(g, v)
    return probes


def _places(tensor: Tensor, quarters: tuple[int, ...], whole: int = _WHOLE) -> list[Any]:
    """A few bytes inside a tensor's memory, some quarters of the way in; all of up to `whole` bytes."""
    if not tensor.is_cpu or not tensor.numel():
        return []
    start = tensor.data_ptr()
    size = extent(tensor)
    if size <= whole:
        return [(ctypes.c_char * size).from_address(start)]
    length = min(size, _PROBE)
    return [(ctypes.c_char * length).from_address(start + (size - length) * quarter // 4) for quarter in quarters]


def extent(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to its last, both included."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
