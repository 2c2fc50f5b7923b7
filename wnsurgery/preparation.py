"""What a pass needs of a net's weights, made for all of them when it comes to the first.

By the time a pass comes to the next layer, the processor has forgotten the code that makes a weight, and finding it
again costs a small layer many times the arithmetic. A `Preparation` makes at one go what the last pass used: whole
weights where the compiled kernels take them, else the factors g / ||v||. What it makes serves one use of each weight,
or several of a small one in a net that asks again, and only while its g and v are what they were. Layers that make
their weight at its use, by a shorter way of their own (`straight`), come here with those that are used again and again.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd import forward_ad

from wnsurgery import fused
from wnsurgery.joint_graph import all_may_share, is_in_backward, may_share, with_joint_graph
from wnsurgery.kept import AHEAD, LARGE, Probes, Rooms, steps
from wnsurgery.loans import LASTING, Ahead, made_ahead
from wnsurgery.multi_tensor import row_factors
from wnsurgery.norms import SMALL
from wnsurgery.placed import Placed
from wnsurgery.reparam import Ready
from wnsurgery.small_weights import SmallWeights, is_small

__all__ = ["Preparation", "may_make"]

_PLANS = 8  # sets of weights used together that are remembered
_SHARING = 64  # weights with one node of the graph in common: gradients come by so many at a time


_saving_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks
_inference_mode = torch.is_inference_mode_enabled


def may_make() -> bool:
    """Whether weights may be made ahead of use: not where somebody watches what each layer saves for its backward pass,
    as activation checkpointing does, nor in forward or inference mode."""
    return _saving_hooks(True) is None and forward_ad._current_level < 0 and not _inference_mode()


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

    An *entry* is whoever owns a pair: an object with attributes `_made`, `_ready`, `_round` and `_evaluation` to spare,
    with `pair()`, `item()`, its pair and rule, `settle()`, before its weight is made anew, `make()`, its weight as
    a record that is `Ahead` or None, `goes_straight()`, whether it is better made at its use, `is_to_keep()`, whether
    its weight is to be kept for evaluation and is not, and `keep()`, which does that. One that was used in a backward
    pass has `_nested`.
    """

    def __init__(self) -> None:
        self._training, self._evaluation = _Rounds("_round"), _Rounds("_evaluation")
        self.use = self._training.use  # a training pass uses a weight
        self._plans: list[_Plan] = []  # the last one used is the first
        self._began: tuple[int, int, int] | None = None  # the last entry that was made at its use, and its versions
        self.lasting = False  # whether small weights are used again while their pairs stay as they are
        self.reused, self._period = False, -1  # whether one has been, and the optimizer steps there were by then
        self._nested = False
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
        self.use(entry)
        return None if waiting is None else waiting[1]

    def make(self, entry: Any) -> Ahead | None:
        """One weight, for one use, with those that were used together with it; None where nothing is to be gained."""
        together = self._training.together(entry)
        self.use(entry)
        g, v = entry.pair()
        began = id(entry), g._version, v._version
        if began == self._began:
            self.last()
        self._began = began
        if len(together) == 1 and not (self.lasting and v.nbytes <= LASTING):
            return None
        needed = []
        for one in together:
            state = one.__dict__
            if "_handed_out" in state or "_kept" in state:
                one.settle()
            if one is entry or not (_has_made(one) or one.goes_straight()):
                needed.append(one)
        plan = self._plan(needed)
        for one in _make_small(needed, plan, lasting=self.lasting):
            one.__dict__["_made"] = one.make()
        made: Ahead | None = entry.__dict__.pop("_made", None)  # None where another thread was quicker
        return made

    def last(self) -> bool:
        """A weight is used again with its pair as it was: from now on small ones are made for all their uses, where
        that may be; whether it may."""
        self.lasting = self.reused = not self._nested
        return self.lasting

    def expire(self) -> None:
        """A weight that was made for several uses serves no more: if none of the net's had a second use since the
        optimizer's step before the last, weights are made for one use again."""
        if self._period != steps.count:
            self._period = steps.count
            self.lasting, self.reused = self.lasting and self.reused, False

    def nest(self) -> None:
        """A weight of the net is used in a backward pass: each pass from now on is to have its own."""
        self._nested, self.lasting = True, False

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


def _make_small(entries: list[Any], plan: _Plan, *, lasting: bool) -> list[Any]:
    """Make the small weights of a plan, with nodes of the graph in common where they may; returns the other entries.

    They may not in a backward pass, which ends before others that would share a node, nor where processes exchange
    gradients, which count every call.
    """
    steps.start()
    apart = is_in_backward() or (dist.is_available() and dist.is_initialized())
    others = [entries[i] for i in plan.not_small_at]
    for few in plan.small:
        small, made, states = few.small, few.small.make(), [entries[i].__dict__ for i in few.at]
        sharing: Sequence[int] = () if apart else few.all
        if not (all(made.fine) and all_may_share(small)):
            sharing = [k for k in sharing if made.fine[k] and may_share(small.g[k], small.v[k])]
        if any("_nested" in state for state in states):
            sharing = [k for k in sharing if "_nested" not in states[k]]
        if sharing:
            pairs = few.lasting if lasting else few.pairs
            for k, w in zip(sharing, with_joint_graph(small, sharing, made), strict=True):
                pair, probes = pairs[k]
                states[k]["_made"] = made_ahead(w, pair, probes, shared=True, lasting=lasting and probes.see_all)
        if len(sharing) < len(states):
            for k in set(few.all).difference(sharing):
                one = entries[few.at[k]]
                if made.fine[k]:
                    states[k]["_made"] = one.make(small.ready(k, made))
                else:
                    others.append(one)
    return others


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


def _has_made(entry: Any) -> bool:
    made = entry.__dict__.get("_made")
    return made is not None and made.serves(*entry.pair())


class _Few:
    """Small weights with one node of the graph in common, those of the entries `at` these places of a plan."""

    def __init__(self, at: list[int], pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.at, self.all, self.small = at, range(len(at)), SmallWeights(pairs)
        self.pairs = [(pair, Probes(*pair)) for pair in pairs]

    @cached_property
    def lasting(self) -> list[tuple[tuple[Tensor, Tensor], Probes]]:
        """The pairs with the probes for weights of several uses."""
        return [(pair, Probes(*pair, LASTING)) for pair, _ in self.pairs]


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
        several = [chosen[first : first + _SHARING] for first in range(0, len(chosen), _SHARING)]
        self.small = [_Few(at, [pairs[i] for i in at]) for at in several]
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
