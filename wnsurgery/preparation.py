"""What a pass needs of a net's weights, made for all of them when it comes to the first.

By the time a pass comes to the next layer, the processor has forgotten the code that makes a weight, and finding it
again costs a small layer many times the arithmetic. A `Preparation` makes at one go what the last pass used: the
weights that evaluation keeps, and for training without compiled kernels the factors g / ||v||, each of which serves one
use, and only while its g and v are what they were.
"""

from __future__ import annotations

import weakref
from functools import partial
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from wnsurgery import fused
from wnsurgery.kept import AHEAD, LARGE, Rooms, steps
from wnsurgery.multi_tensor import row_factors
from wnsurgery.norms import SMALL
from wnsurgery.placed import Placed
from wnsurgery.reparam import Ready
from wnsurgery.small_weights import SmallWeights, is_small

__all__ = ["Preparation"]

_PLANS = 8  # sets of weights used together that are remembered
_TOGETHER = 64  # small weights that one call of the kernels makes


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
        mark, number = self._mark, self._number
        self._number += 1
        known = list(self._known.values())  # while the collector may take some away
        return [one for at in known if (one := at()) is not None and one.__dict__.get(mark) == number]


class Preparation:
    """The weights of one net that are used together, told by the passes themselves.

    An *entry* is whoever owns a pair: an object with attributes `_ready`, `_round` and `_evaluation` to spare, with
    `pair()`, `item()`, its pair and rule, `is_to_keep()`, whether its weight is to be kept for evaluation and is not,
    and `keep()`, which does that.
    """

    def __init__(self) -> None:
        self._training, self._evaluation = _Rounds("_round"), _Rounds("_evaluation")
        self._plans: list[_Plan] = []  # the last one used is the first
        self.rooms = Rooms()  # for what is needed by one layer after the other
        self.elements = 0  # of all weights, as they were when the net was put under weight norm

    def __deepcopy__(self, memo: dict[int, Any]) -> Preparation:
        twin = memo[id(self)] = Preparation()
        twin.elements = self.elements
        return twin

    def take(self, entry: Any, g: Tensor, v: Tensor) -> Ready | None:
        """The factors of one weight, for one use; None where its rows need the long way."""
        waiting = entry.__dict__.pop("_ready", None)
        if waiting is None or waiting[0] != _moment(g, v):
            self._prepare(self._training.together(entry))
            waiting = entry.__dict__.pop("_ready", None)
        self._training.use(entry)
        return None if waiting is None else waiting[1]

    def keep(self, entry: Any) -> None:
        """An evaluation pass needs a weight that is not kept: keep it, and those that the last pass used with it and
        that will still be in the cache."""
        together = self._evaluation.together(entry)
        near = [one for one in together if one is entry or one.pair()[1].numel() <= AHEAD]
        needed = [one for one in near if one.is_to_keep()]
        if len(needed) > 1 and fused.started() and forward_ad._current_level < 0:
            needed = _keep_small(needed, self._plan(needed))
        for one in needed:
            one.keep()

    def evaluate(self, entry: Any) -> None:
        """An evaluation pass uses a weight."""
        self._evaluation.use(entry)

    def _plan(self, entries: list[Any]) -> _Plan:
        pairs = [entry.pair() for entry in entries]
        for plan in list(self._plans):
            if plan.is_of(entries, pairs):
                if plan is not self._plans[0]:
                    self._plans = [plan, *(one for one in self._plans if one is not plan)]
                return plan
        plan = _Plan(entries, pairs)
        self._plans = [plan, *self._plans[: _PLANS - 1]]
        return plan

    def _prepare(self, entries: list[Any]) -> None:
        plan = self._plan(entries)
        with torch.no_grad():
            found = [(few.at, few.small.compute()) for few in plan.small]
            found.append((plan.others_at, row_factors(plan.others)))
        for places, computed in found:
            for i, ready in zip(places, computed, strict=True):
                if ready is not None:
                    entries[i].__dict__["_ready"] = (_moment(*entries[i].pair()), ready)


def _keep_small(entries: list[Any], plan: _Plan) -> list[Any]:
    """Keep the small weights of a plan; returns the other entries."""
    others = [entries[i] for i in plan.not_small_at]
    for few in plan.small:
        with torch.inference_mode(False), torch.no_grad():
            made = few.small.make()
        for i, w, fine in zip(few.at, made.weights, made.fine, strict=True):
            if fine:
                entries[i].keep(w)
            else:
                others.append(entries[i])
    return others


class _Few(NamedTuple):
    """Small weights that are made together, those of the entries `at` these places of a plan."""

    at: list[int]
    small: SmallWeights


class _Plan:
    """How the weights of some entries are computed; holds their pairs, so that no other tensor takes their identity."""

    def __init__(self, entries: list[Any], pairs: list[tuple[Tensor, Tensor]]) -> None:
        self._entries = [weakref.ref(one) for one in entries]
        self._placed = Placed(half for pair in pairs for half in pair)
        known = {i: item for i, entry in enumerate(entries) if (item := entry.item()) is not None}
        few = LARGE if fused.started() else SMALL
        chosen = [
            i
            for i, it in known.items()
            if is_small(it.g, it.v, it.axes, it.magnitude, few) and not (it.g.is_inference() or it.v.is_inference())
        ]
        several = [chosen[first : first + _TOGETHER] for first in range(0, len(chosen), _TOGETHER)]
        self.small = [_Few(at, SmallWeights([pairs[i] for i in at])) for at in several]
        small = set(chosen)
        self.others_at = [i for i in known if i not in small]
        self.not_small_at = [i for i in range(len(entries)) if i not in small]
        self.others = [known[i] for i in self.others_at]

    def is_of(self, entries: list[Any], pairs: list[tuple[Tensor, Tensor]]) -> bool:
        """Whether these are its entries, with the same pairs in the same memory."""
        if len(entries) != len(self._entries) or not all(map(is_, entries, [one() for one in self._entries])):
            return False
        return all(map(is_, chain(*pairs), self._placed.tensors)) and self._placed.are_as_they_were()


def _moment(g: Tensor, v: Tensor) -> tuple[Any, ...]:
    """What changes when a pair does, or becomes another one's."""
    steps.start()
    wanted = (g.requires_grad, v.requires_grad)
    return (id(g), id(v), g._version, v._version, g.data_ptr(), v.data_ptr(), v.dtype, wanted, steps.count)
