"""A net's factors g / ||v||, computed for all its weights at once when a training pass comes to the first of them.

Between a weight's norms and its product lie some twenty operations on one value per row, which cost a small layer many
times its arithmetic. A `Preparation` runs them once for all the weights that the last pass used. What it prepares
serves one use of each weight, and only while its g and v are what they were.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from wnsurgery.kept import steps_counted
from wnsurgery.multi_tensor import row_factors
from wnsurgery.reparam import Ready
from wnsurgery.small_weights import SmallWeights, is_small

__all__ = ["Preparation"]

_PLANS = 8  # sets of weights used together that are remembered


class Preparation:
    """The weights of one net that are used together, told by the passes themselves.

    An *entry* is whoever owns a pair: an object that takes a `_ready` attribute and has `item()`, its pair and rule.
    """

    def __init__(self) -> None:
        self._round = 0
        self._used: dict[int, weakref.ref[Any]] = {}  # since the round began, by identity
        self._plans: dict[tuple[Any, ...], _Plan] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Preparation:
        twin = memo[id(self)] = Preparation()
        return twin

    def take(self, entry: Any, g: Tensor, v: Tensor) -> Ready | None:
        """What is known of one weight, for one use; None where its rows need the long way.

        A weight that comes up for the second time begins a new round, for all those of the one before.
        """
        waiting = entry.__dict__.pop("_ready", None)
        if waiting is None or waiting[0] != self._round or waiting[1] != _moment(g, v):
            again = id(entry) in self._used
            together = [one for reference in self._used.values() if (one := reference()) is not None]
            if again:
                self._round += 1
                self._used = {}
            self._prepare(together if again else [entry])
            waiting = entry.__dict__.pop("_ready", None)
        self._used[id(entry)] = weakref.ref(entry)
        return None if waiting is None else waiting[2]

    def _prepare(self, entries: list[Any]) -> None:
        key = tuple(
            what for e in entries for half in e.pair() for what in (id(e), id(half), half.dtype, half.data_ptr())
        )
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            plan = self._plans[key] = _Plan(entries)
        with torch.no_grad():
            found = [*(plan.small.compute() if plan.small else ()), *row_factors(plan.others)]
        for reference, (g, v), ready in zip(plan.entries, plan.pairs, found, strict=True):
            entry = reference()
            if ready is not None and entry is not None:
                entry.__dict__["_ready"] = (self._round, _moment(g, v), ready)


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


def _moment(g: Tensor, v: Tensor) -> tuple[Any, ...]:
    """What changes when a pair does, or becomes another one's."""
    return (id(g), id(v), g._version, v._version, g.data_ptr(), v.data_ptr(), v.dtype, steps_counted())
