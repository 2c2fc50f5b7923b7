"""A weight with its graph that was handed out, for one use or for several, watched while somebody holds it.

In-place writes into `module.weight`, as `torch.nn.init` does them, go into a computed tensor. Its version counter tells
of them; when the last who holds the tensor lets it go, they are taken over into g and v.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from wnsurgery.errors import WnsurgeryError
from wnsurgery.kept import Probes, holders, holders_and_handles, looked_at, places_in, steps

__all__ = ["LASTING", "Lasting", "Loan", "lend_out", "outstanding"]

LASTING = 1 << 14  # bytes of a half up to which all are looked at before each of several uses: under 1 us


class _Outstanding:
    """Owners whose weights somebody may hold and write into: what is written reaches their pairs before an optimizer
    moves these, after which the older word would be lost, and before another owner of a tied pair reads it."""

    def __init__(self) -> None:
        self._owners: dict[int, tuple[weakref.ref[Any], int]] = {}  # each with the `id` of its v
        self.of: dict[int, dict[int, weakref.ref[Any]]] = {}  # by the `id` of their v, the same owners
        self._watching = False

    def add(self, owner: Any, v: Tensor) -> None:
        """An owner has handed out a weight of its pair.

        It has `pair()`, `absorb()`, `is_out()`: whether any weight still is, `is_written()`: whether somebody wrote
        into one, and an attribute `_beside` to spare, true from when another owner of its pair has handed out one.
        """
        if not self._watching:
            self._watching = True
            register_optimizer_step_pre_hook(self._before_step)
        name, known = id(owner), self._owners.get(id(owner))
        if known is not None and known[1] == id(v):
            return
        self._forget(name)
        reference = weakref.ref(owner, partial(self._forget, name))
        self._owners[name] = reference, id(v)
        self.of.setdefault(id(v), {})[name] = reference
        others = self.beside(owner, v)
        for one in (owner, *others) if others else ():
            one.__dict__["_beside"] = True

    def _forget(self, name: int, _gone: Any = None) -> None:
        known = self._owners.pop(name, None)
        held = None if known is None else self.of.get(known[1])
        if known is not None and held is not None:
            held.pop(name, None)
            if not held:
                self.of.pop(known[1], None)

    def beside(self, owner: Any, v: Tensor) -> list[Any]:
        """The other owners of this v that have handed out a weight."""
        references = list(self.of.get(id(v), {}).values())
        others = [other for reference in references if (other := reference()) is not None and other is not owner]
        return [other for other in others if other.pair()[1] is v]  # an `id` may have come to another tensor

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        out = []
        for name, (reference, _of) in list(self._owners.items()):  # while other threads add theirs
            owner = reference()
            if owner is not None and owner.is_out():
                out.append(owner)
            else:
                self._forget(name)
        moved = {id(p) for group in optimizer.param_groups for p in group["params"]} if out else set()
        for owner in out:
            if any(id(half) in moved for half in owner.pair()):
                owner.absorb()


outstanding = _Outstanding()


class Lasting:
    """A small weight that serves several uses, and the state of the pair that it was computed from: of halves that have
    up to `LASTING` bytes, and none of them of inference mode, whose writes nobody counts."""

    __slots__ = ("_flags", "_g", "_g_version", "_of", "_seen", "_steps", "_v", "_v_version", "w")

    def __init__(self, w: Tensor, g: Tensor, v: Tensor) -> None:
        steps.start()
        self.w, self._g, self._v, self._g_version, self._v_version = w, g, v, g._version, v._version
        self._of = Probes(g, v, LASTING)
        self._seen, self._steps = looked_at(self._of.places), steps.count
        self._flags = g.requires_grad << 1 | v.requires_grad

    def serves(self, g: Any, v: Any) -> bool:
        """Whether it is what a use of this pair would compute now, as far as anything tells of a change."""
        return (
            g is self._g
            and v is self._v
            and g._version == self._g_version
            and v._version == self._v_version
            and (g.data_ptr(), v.data_ptr()) == self._of.at
            and g.requires_grad << 1 | v.requires_grad == self._flags
            and steps.count == self._steps
            and looked_at(self._of.places) == self._seen
        )


class Loan(weakref.ref[Tensor]):
    """A weight that was handed out, and the versions of it and its pair at the time; made by `lend_out`.

    One that serves several uses has its record as `lasting`, and the views that these got. The owner has `absorb()`,
    which takes writes over into its pair, and `unwatch()`.
    """

    __slots__ = (
        "_alias",
        "_g",
        "_g_version",
        "_owner",
        "_v",
        "_v_version",
        "_version",
        "_without",
        "lasting",
        "own",
        "views",
    )

    lasting: Lasting
    views: dict[int, _View]
    own: tuple[bytes, list[Any]] | None  # some of its bytes, and where they are, once they were looked at
    _alias: Tensor
    _owner: weakref.ref[Any]
    _g: Tensor
    _v: Tensor
    _version: int
    _g_version: int
    _v_version: int
    _without: int  # holders of its memory without the weight itself

    def is_of(self, g: Tensor | None, v: Tensor | None) -> bool:
        """Whether it was computed from this pair, which has counted no write since."""
        if g is not self._g or v is not self._v:
            return False
        return self._g._version == self._g_version and self._v._version == self._v_version

    def is_written(self) -> bool:
        """Whether somebody wrote into the weight itself."""
        own = self.own
        return self._alias._version != self._version or (own is not None and looked_at(own[1]) != own[0])

    def is_as_it_was(self) -> bool:
        """Whether there is nothing to see to: its version tells that nobody wrote into the weight, and nothing else
        would."""
        return self.own is None and self._alias._version == self._version

    def look(self) -> None:
        """From now on look at some of its bytes, too: a write through `.data` leaves no count, and may come when the
        weight itself is gone."""
        if self.own is None:
            places = places_in(self._alias)
            self.own = looked_at(places), places
            self._without = holders(self._alias) - 1

    def is_out(self) -> bool:
        """Whether somebody can still write into the weight."""
        return self() is not None or (self.own is not None and self._is_held_beside(self._without))

    def is_done(self) -> bool:
        """Whether nothing was written into the weight that is just being let go, and nobody is left who could."""
        return not (self.is_written() or (self.own is not None and self._is_held_beside(self._without + _DYING)))

    def _is_held_beside(self, known: int) -> bool:
        """Whether somebody else has the weight's memory than so many who are known."""
        count, handles = holders_and_handles(self._alias)
        return count > known or handles > _NO_HANDLE

    def written(self) -> Tensor:
        """The weight's values, also when nobody holds it any more."""
        return self._alias

    def view(self) -> Tensor:
        """A lasting weight, for one use: a view of it, on which hooks see that use alone."""
        shown = self.lasting.w.view_as(self.lasting.w)
        view = _View(shown, _view_gone)
        view.of = self
        self.views[id(view)] = view
        return shown


class _View(weakref.ref[Tensor]):
    __slots__ = ("of",)

    of: Loan


def lend_out(w: Tensor, owner: Any, g: Tensor, v: Tensor, lasting: Lasting | None = None) -> Loan | None:
    """A record of a weight computed from a pair and handed out; None for tensors of inference mode.

    Given the record of a lasting weight, it is for several uses.
    """
    if w.is_inference() or g.is_inference() or v.is_inference():
        return None
    loan = Loan(w, _let_go)
    loan._alias = alias = w.detach()
    loan._owner, loan._g, loan._v = weakref.ref(owner), g, v
    loan._version, loan._g_version, loan._v_version = alias._version, g._version, v._version
    loan.own = None
    if lasting is not None:
        loan.lasting, loan.views = lasting, {}
    return loan


def _let_go(loan: Loan) -> None:
    owner = loan._owner()
    if owner is None:
        return
    watched = owner.__dict__.get("_handed_out")
    if not watched:
        return
    if loan.is_done():
        owner.unwatch(loan)
    elif loan._alias._version != loan._version:
        _take_over(owner, "_handed_out", watched)


def _view_gone(view: _View) -> None:
    loan = view.of
    del loan.views[id(view)]
    owner = loan._owner() if loan._alias._version != loan._version else None
    if owner is not None:  # a write that left no count is seen at the next use
        _take_over(owner, "_again", loan)


def _when_let_go() -> tuple[int, int]:
    """How many of the holders of a tensor's memory are the tensor itself, when its weak references are told that it is
    gone, and how many handles there are of a memory that nobody has one of."""
    tensor, seen = torch.empty(1, device="cpu"), list[int]()
    alias = tensor.detach()
    reference = weakref.ref(tensor, lambda _: seen.append(holders(alias)))
    del tensor
    assert reference() is None
    left, handles = holders_and_handles(alias)
    return seen[0] - left, handles


_DYING, _NO_HANDLE = _when_let_go()


def _take_over(owner: Any, name: str, watched: Any) -> None:
    """Let a write reach the owner's pair; where it is no weight, it goes on being watched under its name."""
    try:
        owner.absorb()
    except WnsurgeryError:  # a callback cannot raise: the next access does
        owner.__dict__[name] = watched
