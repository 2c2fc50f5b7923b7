"""What a training pass needs of a net's weights, made for all of them when it comes to the first.

By the time a pass comes to the next layer, the processor has forgotten the code that makes a weight, and finding it
again costs a small layer many times the arithmetic. A `Preparation` makes at one go what the last pass used: whole
weights where the compiled kernels take them, else the factors g / ||v||. What it makes serves one use of each weight,
and only while its g and v are what they were.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wnsurgery.kept import steps_counted
from wnsurgery.multi_tensor import row_factors
from wnsurgery.reparam import Ready
from wnsurgery.small_weights import SmallWeights, is_small

__all__ = ["Made", "Preparation", "may_make"]

_PLANS = 8  # sets of weights used together that are remembered


class Made:
    """A weight with its graph, computed ahead of its use."""

    __slots__ = ("_at", "_flags", "_g", "_steps", "_v", "_versions", "record", "w")

    def __init__(self, w: Tensor, g: Tensor, v: Tensor, record: Any) -> None:
        self.w, self._g, self._v, self.record = w, g, v, record
        # sums and shifts, not tuples: thousands of them a second would keep the garbage collector busy
        self._versions = g._version << 32 | v._version
        self._at = g.data_ptr() << 64 | v.data_ptr()
        self._flags = g.requires_grad << 1 | v.requires_grad
        self._steps = steps_counted()

    def is_of(self, g: Tensor | None, v: Tensor | None) -> bool:
        """Whether it is what a use of this pair would compute now."""
        return (
            g is self._g
            and v is self._v
            and g is not None
            and v is not None
            and g._version << 32 | v._version == self._versions
            and g.data_ptr() << 64 | v.data_ptr() == self._at
            and g.requires_grad << 1 | v.requires_grad == self._flags
            and steps_counted() == self._steps
        )

    def lend(self) -> Tensor:
        """The weight, for its one use; in the backward pass its turn comes as if it had been made now."""
        node = self.w.grad_fn
        if node is not None:
            node._set_sequence_nr(_next_number())  # type: ignore[attr-defined]
        return self.w


_next_number: Any = torch._C._autograd._get_sequence_nr
_saving_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks


def may_make() -> bool:
    """Whether weights may be made ahead of use: not where somebody watches what each layer saves for its backward pass,
    as activation checkpointing does."""
    return _saving_hooks(True) is None


class _Rounds:
    """Which entries are used together: a round ends when one of its entries comes up for the second time."""

    def __init__(self, mark: str) -> None:
        self._mark, self._number = mark, 0  # an entry that was used since the round began carries its number
        self._known: dict[int, weakref.ref[Any]] = {}

    def use(self, entry: Any) -> None:
        entry.__dict__[self._mark] = self._number
        if id(entry) not in self._known:
            self._known[id(entry)] = weakref.ref(entry, partial(self._forget, id(entry)))

    def _forget(self, name: int, _gone: Any) -> None:
        self._known.pop(name, None)

    def together(self, entry: Any) -> list[Any]:
        """What to prepare now that an entry is needed: it alone, or all those of the round that its second use ends."""
        if entry.__dict__.get(self._mark) != self._number:
            return [entry]
        known = [one for reference in list(self._known.values()) if (one := reference()) is not None]
        self._number += 1
        return [one for one in known if one.__dict__.get(self._mark) == self._number - 1]


class Preparation:
    """The weights of one net that are used together, told by the passes themselves.

    An *entry* is whoever owns a pair: an object with attributes `_made`, `_ready`, `_round` and `_evaluation` to spare,
    with `item()`, its pair and rule, `absorb()`, which settles its pair, `make()`, its weight as a `Made` or None, and
    `keep()`, which keeps its weight for evaluation.
    """

    def __init__(self) -> None:
        self._training, self._evaluation = _Rounds("_round"), _Rounds("_evaluation")
        self._plans: dict[tuple[Any, ...], _Plan] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Preparation:
        twin = memo[id(self)] = Preparation()
        return twin

    def use(self, entry: Any) -> None:
        """A training pass uses a weight."""
        self._training.use(entry)

    def take(self, entry: Any, g: Tensor, v: Tensor) -> Ready | None:
        """The factors of one weight, for one use; None where its rows need the long way."""
        waiting = entry.__dict__.pop("_ready", None)
        if waiting is None or waiting[0] != _moment(g, v):
            self._prepare(self._training.together(entry))
            waiting = entry.__dict__.pop("_ready", None)
        self.use(entry)
        return None if waiting is None else waiting[1]

    def make(self, entry: Any) -> Made | None:
        """One weight, for one use, with those that were used together with it; None where nothing is to be gained."""
        together = self._training.together(entry)
        self.use(entry)
        if len(together) == 1:
            return None
        for one in together:
            one.absorb()
        needed = [one for one in together if one is entry or not _has_made(one)]
        plan, ready = self._plan(needed), {}
        if plan.small is not None:
            with torch.no_grad():
                ready = dict(zip(map(id, plan.living()), plan.small.compute(), strict=False))
        for one in needed:
            one.__dict__["_made"] = one.make(ready.get(id(one)))
        made: Made | None = entry.__dict__.pop("_made")
        return made

    def keep(self, entry: Any) -> None:
        """An evaluation pass needs a weight that is not kept: keep it, and those that the last pass used with it."""
        for one in self._evaluation.together(entry):
            one.keep()

    def evaluate(self, entry: Any) -> None:
        """An evaluation pass uses a weight."""
        self._evaluation.use(entry)

    def _plan(self, entries: list[Any]) -> _Plan:
        key = tuple(
            what for e in entries for half in e.pair() for what in (id(e), id(half), half.dtype, half.data_ptr())
        )
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            plan = self._plans[key] = _Plan(entries)
        return plan

    def _prepare(self, entries: list[Any]) -> None:
        plan = self._plan(entries)
        with torch.no_grad():
            found = [*(plan.small.compute() if plan.small else ()), *row_factors(plan.others)]
        for entry, (g, v), ready in zip(plan.living(), plan.pairs, found, strict=True):
            if ready is not None and entry is not None:
                entry.__dict__["_ready"] = (_moment(g, v), ready)


def _has_made(entry: Any) -> bool:
    made = entry.__dict__.get("_made")
    return made is not None and made.is_of(*entry.pair())


class _Plan:
    """How the weights of some entries are computed; holds their pairs, so that no other tensor takes their identity."""

    def __init__(self, entries: list[Any]) -> None:
        known = [(entry, item) for entry in entries if (item := entry.item()) is not None]
        small = [(entry, i) for entry, i in known if is_small(i.g, i.v, i.axes, i.magnitude)]
        others = [(entry, i) for entry, i in known if not is_small(i.g, i.v, i.axes, i.magnitude)]
        self.entries = [weakref.ref(entry) for entry, _ in (*small, *others)]
        self.pairs = [(item.g, item.v) for _, item in (*small, *others)]
        self.small = SmallWeights([(item.g, item.v) for _, item in small]) if small else None
        self.others = [item for _, item in others]

    def living(self) -> list[Any]:
        """The entries, the small ones first; None for one that is gone."""
        return [reference() for reference in self.entries]


def _moment(g: Tensor, v: Tensor) -> tuple[Any, ...]:
    """What changes when a pair does, or becomes another one's."""
    wanted = (g.requires_grad, v.requires_grad)
    return (id(g), id(v), g._version, v._version, g.data_ptr(), v.data_ptr(), v.dtype, wanted, steps_counted())
