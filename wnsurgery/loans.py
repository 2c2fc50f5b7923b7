"""A weight with its graph that was handed out, watched while somebody holds it.

In-place writes into `module.weight`, as `torch.nn.init` does them, go into a computed tensor. Its version counter tells
of them; when the last who holds the tensor lets it go, they are taken over into g and v.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from wnsurgery.errors import WnsurgeryError
from wnsurgery.kept import holders, looked_at, places_in

__all__ = ["Loan", "lend_out", "outstanding"]


class _Outstanding:
    """Owners whose weights somebody may hold and write into: what is written reaches their pairs before an optimizer
    moves these, after which the older word would be lost."""

    def __init__(self) -> None:
        self._owners: dict[int, weakref.ref[Any]] = {}
        self._watching = False

    def add(self, owner: Any) -> None:
        """An owner has handed out a weight; it has `pair()`, `absorb()`, and `is_out()`: whether any still is."""
        if not self._watching:
            self._watching = True
            register_optimizer_step_pre_hook(self._before_step)
        if id(owner) not in self._owners:
            self._owners[id(owner)] = weakref.ref(owner, partial(self._forget, id(owner)))

    def _forget(self, name: int, _gone: Any = None) -> None:
        self._owners.pop(name, None)

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        out = []
        for name, reference in list(self._owners.items()):  # while other threads add theirs
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


class Loan(weakref.ref[Tensor]):
    """A weight that was handed out, and the versions of it and its pair at the time; made by `lend_out`.

    The owner has `absorb()`, which takes writes over into its pair, and `unwatch()`.
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
        "own",
    )

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
        return self() is not None or (self.own is not None and holders(self._alias) > self._without)

    def written(self) -> Tensor:
        """The weight's values, also when nobody holds it any more."""
        return self._alias


def lend_out(w: Tensor, owner: Any, g: Tensor, v: Tensor) -> Loan | None:
    """A record of a weight computed from a pair and handed out; None for tensors of inference mode."""
    if w.is_inference() or g.is_inference() or v.is_inference():
        return None
    loan = Loan(w, _let_go)
    loan._alias = alias = w.detach()
    loan._owner, loan._g, loan._v = weakref.ref(owner), g, v
    loan._version, loan._g_version, loan._v_version = alias._version, g._version, v._version
    loan.own = None
    return loan


def _let_go(loan: Loan) -> None:
    owner = loan._owner()
    if owner is None:
        return
    watched = owner.__dict__.get("_handed_out")
    if not watched:
        return
    if loan._alias._version == loan._version:
        if loan.own is None:
            owner.unwatch(loan)
        return
    try:
        owner.absorb()
    except WnsurgeryError:  # a callback cannot raise: the next access does
        owner.__dict__["_handed_out"] = watched
