"""Optimizers follow surgery: their groups, their state and gradients pass from weights to pairs (g, v) and back."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wnsurgery.carried_state import (
    Heir,
    Settings,
    State,
    Swap,
    inherited_grad,
    inherited_state,
    join_state,
    joined_grad,
    kinds_of,
    rescaled,
    split_grad,
    split_state,
)
from wnsurgery.chain_rule import ChainRule
from wnsurgery.errors import SelectionError

__all__ = ["Follower", "Optimizers", "as_optimizers", "rescale_state", "warn_if_left_behind"]

_log = logging.getLogger("wnsurgery")

Optimizers = Optimizer | Sequence[Optimizer]


def as_optimizers(optimizer: Optimizers | None, *, flat: bool = False) -> tuple[Optimizer, ...]:
    """One optimizer, several, or none, as a tuple, each out of what is wrapped around it; SelectionError for anything
    else, and for LBFGS unless `flat`."""
    if optimizer is None:
        return ()
    several = tuple(map(_unwrapped, optimizer if isinstance(optimizer, list | tuple) else (optimizer,)))
    for one in several:
        if not (isinstance(getattr(one, "param_groups", None), list) and hasattr(one, "state")):
            hint = "give the optimizer it schedules" if hasattr(one, "optimizer") else None
            raise SelectionError(f"optimizer must be a torch.optim.Optimizer, not {type(one).__name__}", hint=hint)
        if isinstance(one, torch.optim.LBFGS) and not flat:
            raise SelectionError(
                "LBFGS keeps its history as flat vectors over all parameters, which cannot follow surgery",
                hint="make a new LBFGS afterwards",
            )
    return several


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer whose groups a wrapper hands out as its own, as accelerate's does, and timm's Lookahead, which has
    a state beside it."""
    seen = {id(optimizer)}
    while (inner := _within(optimizer)) is not None and id(inner) not in seen:
        optimizer = inner
        seen.add(id(inner))
    return optimizer


def _within(optimizer: Any) -> Any:
    """An optimizer that another has for an attribute and in common with it the very list of groups."""
    groups = getattr(optimizer, "param_groups", None)
    return next((x for x in getattr(optimizer, "__dict__", {}).values() if _has(x, groups)), None)


def _has(x: Any, groups: Any) -> bool:
    return groups is not None and hasattr(x, "state") and getattr(x, "param_groups", None) is groups


class Follower:
    """Moves optimizers along with a model: made before surgery, told afterwards what was swapped.

    New parameters stand in the groups of the old ones, at their place; where a group listed its parameters in the
    model's order, it lists them in the model's order afterwards, so that `state_dict()` fits an optimizer newly
    built over the model. Everything is computed before anything is changed. Without optimizers it does nothing.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizers | None) -> None:
        self.model = model
        self.optimizers = as_optimizers(optimizer)
        self.before = _names(model) if self.optimizers else {}
        self.trained = [p for p in model.parameters() if p.requires_grad] if self.optimizers else []
        self.held = list(_parameters(self.optimizers))
        ranks = {key: rank for key, (rank, _) in self.before.items()}
        groups = (group for one in self.optimizers for group in one.param_groups)
        self.ordered = {id(group) for group in groups if _is_in_order(group, ranks)}
        self.swapped: set[int] = set()  # what came by `split`, `join` and `inherit`
        self.fresh: list[nn.Parameter] = []  # to be trained, with or without state from before

    def split(self, swaps: Iterable[Swap], *, changed_by: str = "") -> None:
        """Weights became pairs. `changed_by`: what gave the weights other values, if anything did, in words; state and
        gradients are dropped then."""
        swaps = list(swaps) if self.optimizers else []
        if not changed_by:
            _warn_of_unknown(self.optimizers, [swap.weight for swap in swaps])
        elif any(one.state.get(swap.weight) for one in self.optimizers for swap in swaps):
            _log.warning("%s changed weights: the optimizer state of all that were converted starts anew", changed_by)
        for one in self.optimizers:
            held = _held(one)
            if isinstance(one, torch.optim.Muon) and any(id(swap.weight) in held for swap in swaps):
                raise SelectionError("Muon turns whole matrices, which magnitudes are not", hint="use AdamW for them")
        grads: list[tuple[Tensor, Tensor | None]] = []
        states: list[tuple[Optimizer, nn.Parameter, State]] = []
        settings = {id(one): Settings(one) for one in self.optimizers}
        for swap in swaps if not changed_by else ():
            rule = ChainRule.of_gradients(swap.g, swap.v, swap.axes, swap.magnitude)
            grads += split_grad(swap, rule)
            for one in self.optimizers:
                state = one.state.get(swap.weight)
                table = kinds_of(one, swap.weight)
                if state and table is not None:
                    for_g, for_v = split_state(swap, rule, state, table, settings[id(one)].of(swap.weight))
                    states += [(one, swap.g, for_g)] if swap.g.requires_grad else []
                    states.append((one, swap.v, for_v))
        places = {id(swap.weight): [swap.g, swap.v] for swap in swaps}
        self.swapped.update(id(half) for swap in swaps for half in (swap.g, swap.v))
        self.fresh += [half for swap in swaps if swap.weight.requires_grad for half in (swap.g, swap.v)]
        self._commit([places] * len(self.optimizers), [s.weight for s in swaps], grads, states)

    def join(self, swaps: Iterable[Swap]) -> None:
        """Pairs became weights: each takes the place of its v, or of its g where only that was being trained."""
        swaps = list(swaps) if self.optimizers else []
        _warn_of_unknown(self.optimizers, [p for swap in swaps for p in (swap.v, swap.g)])
        held = [_held(one) for one in self.optimizers]
        settings = {id(one): Settings(one) for one in self.optimizers}
        places: list[dict[int, list[nn.Parameter]]] = [{} for _ in self.optimizers]
        grads: list[tuple[Tensor, Tensor | None]] = []
        states: list[tuple[Optimizer, nn.Parameter, State]] = []
        for swap in swaps:
            rule = ChainRule.of_gradients(swap.g, swap.v, swap.axes, swap.magnitude)
            grads += joined_grad(swap, rule)
            anywhere = any(id(swap.v) in ids for ids in held)
            for one, ids, place in zip(self.optimizers, held, places, strict=True):
                place[id(swap.g)] = [] if anywhere else [swap.weight]
                place[id(swap.v)] = [swap.weight]
                if id(swap.v if anywhere else swap.g) in ids:
                    state = self._joined_state(one, swap, rule, settings)
                    states += [(one, swap.weight, state)] if state else []
        self.swapped.update(id(swap.weight) for swap in swaps)
        self.fresh += [swap.weight for swap in swaps if swap.weight.requires_grad]
        self._commit(places, [p for swap in swaps for p in (swap.g, swap.v)], grads, states)

    def inherit(self, heirs: Iterable[Heir]) -> None:
        """Vectors went into others: a new one takes the old one's place, and state and gradient go over as they are.

        They do not where an old one is shared, since its gradient was a sum, and where the new one is not trained by
        the same optimizer; a warning is logged then, and where what was there before had state of its own.
        """
        heirs = list(heirs) if self.optimizers else []
        after = _names(self.model) if heirs else {}
        _warn_of_unknown(self.optimizers, [heir.old for heir in heirs])
        times = Counter(id(heir.old) for heir in heirs)
        held = [_held(one) for one in self.optimizers]
        grads: list[tuple[Tensor, Tensor | None]] = []
        states: list[tuple[Optimizer, nn.Parameter, State]] = []
        place: dict[int, list[nn.Parameter]] = {}
        for heir in heirs:
            old, new = heir.old, heir.new
            names = self.before.get(id(old), (0, "a bias"))[1], after[id(new)][1]
            place.setdefault(id(old), [old] if id(old) in after else []).extend([new] if heir.made else [])
            shared = times[id(old)] > 1 or id(old) in after
            grads += [] if shared else inherited_grad(heir)
            for one, ids in zip(self.optimizers, held, strict=True):
                state, table = one.state.get(old), kinds_of(one, old)
                if not state or table is None:
                    continue
                if shared or not (heir.made or (new.requires_grad and id(new) in ids)):
                    why = "it is shared" if shared else f"{names[1]} is not trained by the same optimizer"
                    _log.warning("%s: its optimizer state is dropped: %s", names[0], why)
                    continue
                if one.state.get(new):
                    _log.warning("%s: its optimizer state is now that of %s; its own is dropped", names[1], names[0])
                states.append((one, new, inherited_state(heir, state, table)))
        self.swapped.update(id(heir.new) for heir in heirs if heir.made)
        self.fresh += [heir.new for heir in heirs if heir.new.requires_grad]
        gone = [heir.old for heir in heirs if id(heir.old) not in after]
        self._commit([place] * len(self.optimizers), gone, grads, states)

    def settle(self, changed: Iterable[nn.Parameter] = ()) -> None:
        """Other parameters that came and went (biases, BatchNorms): drop those gone, adopt those new.

        A new one goes into the first group that holds a parameter of the same module; what no optimizer held before
        surgery is held by none after it. The state of `changed` starts anew: their values were rescaled under the
        optimizer.
        """
        now = {id(p): (name, p) for name, p in self.model.named_parameters()} if self.optimizers else {}
        changed = list(changed)
        rescaled = set(map(id, changed))
        replaced = [p for p in self.trained if id(p) not in now or id(p) in rescaled]
        _warn_if_left_behind(self.before, self.held, replaced)
        for one in self.optimizers:
            for group in one.param_groups:
                is_lost = [id(p) in self.before and id(p) not in now for p in group["params"]]
                lost = list(compress(group["params"], is_lost))
                keep = [i for i, one_is in enumerate(is_lost) if not one_is]
                if "param_names" in group:
                    group["param_names"] = [group["param_names"][i] for i in keep]
                group["params"][:] = [group["params"][i] for i in keep]
                for parameter in lost:
                    one.state.pop(parameter, None)
            for parameter in changed:
                one.state.pop(parameter, None)
        self.fresh += [parameter for parameter in changed if parameter.requires_grad]
        held = set().union(*map(_held, self.optimizers)) if self.optimizers else set()
        known = self.before.keys() | held | self.swapped
        new = [(name, parameter) for key, (name, parameter) in now.items() if key not in known]
        if new:
            self._adopt(new, now)
        self.fresh += [parameter for _, parameter in new if parameter.requires_grad]
        for one in self.optimizers:
            _start_momentum(one, self.fresh)

    def _adopt(self, new: Iterable[tuple[str, nn.Parameter]], now: Mapping[int, tuple[str, nn.Parameter]]) -> None:
        """Put new parameters, in the model's order, into the first group that holds one of their module."""
        order = {key: i for i, key in enumerate(now)}
        groups = [group for one in self.optimizers for group in one.param_groups]
        homes: dict[str, int] = {}
        for i, group in enumerate(groups):
            for p in group["params"]:
                if id(p) in now:
                    homes.setdefault(_module_of(now[id(p)][0]), i)
        coming: list[list[tuple[str, nn.Parameter]]] = [[] for _ in groups]
        for name, parameter in new:
            home = homes.get(_module_of(name))
            if home is not None:
                coming[home].append((name, parameter))
            elif parameter.requires_grad:
                _log.warning(
                    "%s is new and no optimizer holds a parameter of its module: it is not being trained", name
                )
        for group, more in zip(groups, coming, strict=True):
            if more:
                _insert(group, more, order)

    def _joined_state(self, one: Optimizer, swap: Swap, rule: ChainRule, settings: Mapping[int, Settings]) -> State:
        """The state of a folded weight, from that of v and g; g may be with another optimizer of the same type."""
        for_v = one.state.get(swap.v) or {}
        table = kinds_of(one, swap.v)
        others = (o for o in (one, *self.optimizers) if type(o) is type(one))
        for_g, g_home = next(((o.state[swap.g], o) for o in others if o.state.get(swap.g)), ({}, one))
        if kinds_of(g_home, swap.g) is None:
            for_g = {}
        if table is None or not (for_v or for_g):
            return {}
        options = settings[id(g_home)].of(swap.g), settings[id(one)].of(swap.v if for_v else swap.g)
        return join_state(swap, rule, (for_g, for_v), table, options)

    def _commit(
        self,
        places: Sequence[Mapping[int, list[nn.Parameter]]],
        gone: Sequence[nn.Parameter],
        grads: Sequence[tuple[Tensor, Tensor | None]],
        states: Sequence[tuple[Optimizer, nn.Parameter, State]],
    ) -> None:
        """Change groups, state and gradients; nothing here can fail."""
        after = _names(self.model) if self.optimizers else {}
        contents = [
            (group, *self._contents(group, place, after))
            for one, place in zip(self.optimizers, places, strict=True)
            for group in one.param_groups
        ]
        for group, parameters, names in contents:
            group["params"][:] = parameters
            if names is not None:
                group["param_names"] = names
        for one in self.optimizers:
            for parameter in gone:
                one.state.pop(parameter, None)
        for one, parameter, state in states:
            one.state[parameter] = state
        for owner, grad in grads:
            owner.grad = grad

    def _contents(
        self,
        group: Mapping[str, Any],
        place: Mapping[int, list[nn.Parameter]],
        after: Mapping[int, tuple[int, str]],
    ) -> tuple[list[nn.Parameter], list[str] | None]:
        """The parameters of a group after the surgery, and their names where it has names."""
        old = group["params"]
        named = group.get("param_names") or [""] * len(old)
        entries: list[tuple[nn.Parameter, str]] = []
        for parameter, name in zip(old, named, strict=True):
            new = place.get(id(parameter))
            if new is None:
                entries.append((parameter, name))
                continue
            known = self.before.get(id(parameter), (0, ""))[1]
            prefix = name.removesuffix(known) if name.endswith(known) else ""
            entries += [(p, prefix + after[id(p)][1] if id(p) in after else name) for p in new]
        if id(group) in self.ordered:
            mine = [i for i, (p, _) in enumerate(entries) if id(p) in after]
            ordered = sorted((entries[i] for i in mine), key=lambda entry: after[id(entry[0])][0])
            for i, entry in zip(mine, ordered, strict=True):
                entries[i] = entry
        return [p for p, _ in entries], [n for _, n in entries] if "param_names" in group else None


def warn_if_left_behind(model: nn.Module, optimizers: Sequence[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Say that optimizers hold none of the trained parameters that they were given for."""
    if optimizers:
        trained = [p for p in parameters if p.requires_grad]
        _warn_if_left_behind(_names(model), list(_parameters(optimizers)), trained)


def rescale_state(
    optimizers: Sequence[Optimizer], factors: Sequence[tuple[nn.Parameter, Tensor]]
) -> Callable[[], None]:
    """Each v becomes factor * v: how gradients and state follow. Returns the action, which cannot fail.

    A factor broadcasts against its v and is positive.
    """
    states: list[tuple[Optimizer, nn.Parameter, State]] = []
    grads: list[tuple[nn.Parameter, Tensor]] = []
    _warn_of_unknown(optimizers, [v for v, _ in factors])
    for v, factor in factors:
        wide = factor.double() if factor.device.type != "mps" else factor
        for one in optimizers:
            state = one.state.get(v)
            if state:
                table = kinds_of(one, v)
                scaled = {} if table is None else {k: rescaled(x, table[k], wide) for k, x in state.items()}
                states.append((one, v, scaled))
        if v.grad is not None:
            grads.append((v, rescaled(v.grad, "gradient", wide)))

    def act() -> None:
        for one, v, scaled in states:
            one.state.pop(v)
            if scaled:
                one.state[v] = scaled
        for one in optimizers:
            _start_momentum(one, [v for v, _ in factors])
        for v, grad in grads:
            v.grad = grad

    return act


# What an optimizer holds ---------------------------------------------------------------------------------


def _names(model: nn.Module) -> dict[int, tuple[int, str]]:
    """Parameter identity -> its place in `model.parameters()` and its name."""
    return {id(p): (i, name) for i, (name, p) in enumerate(model.named_parameters())}


def _module_of(name: str) -> str:
    """The module a parameter belongs to; the halves of a pair belong to their host."""
    host, marker, _ = name.partition("parametrizations.")
    return host.removesuffix(".") if marker else name.rpartition(".")[0]


def _held(optimizer: Optimizer) -> set[int]:
    return set(map(id, _parameters([optimizer])))


def _parameters(optimizers: Iterable[Optimizer]) -> Iterator[nn.Parameter]:
    return (p for one in optimizers for group in one.param_groups for p in group["params"])


def _warn_if_left_behind(model: Collection[int], held: Sequence[nn.Parameter], wanted: Sequence[nn.Parameter]) -> None:
    """Say that none of the parameters wanted is held, where that cannot be on purpose.

    An optimizer of other parts of the model may well be given, as one of biases alone. One that holds nothing of the
    model, or in place of a weight one of its shape that is not in the model, as surgery that it was not told of leaves
    it, may not.
    """
    ids = set(map(id, held))
    if not wanted or not ids.isdisjoint(map(id, wanted)):
        return
    strangers = {tuple(p.shape) for p in held if id(p) not in model}
    if ids.isdisjoint(model) or any(p.ndim > 1 and tuple(p.shape) in strangers for p in wanted):
        _log.warning(
            "the optimizer given holds none of the %d trained parameters that it was given for, and does nothing for "
            "them; stale_parameters(model, optimizer) tells what it holds",
            len(wanted),
        )


def _warn_of_unknown(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Say once per optimizer whose state starts anew."""
    parameters = list(parameters)
    for one in optimizers:
        lost = [set(one.state[p]) for p in parameters if one.state.get(p) and kinds_of(one, p) is None]
        if lost:
            keys = ", ".join(sorted(set().union(*lost)))
            name = type(one).__name__
            _log.warning("%s: no rule for its state (%s), which starts anew for %d weights", name, keys, len(lost))


def _start_momentum(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Momentum of zero for those that have none, where a group of torch's fused SGD has some: it fails at a mixture.

    The first buffer of SGD is the gradient, and from zeros that is what the next one is. Under dampening d it is 1 - d
    times the gradient, as if the buffer had been there all along without gradients: the first step is so much shorter.
    """
    fresh = set(map(id, parameters))
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        if not group.get("fused") or group["momentum"] == 0:
            continue
        bare = [p for p in group["params"] if (optimizer.state.get(p) or {}).get("momentum_buffer") is None]
        for parameter in bare if len(bare) < len(group["params"]) else ():
            if id(parameter) in fresh:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)


def _is_in_order(group: Mapping[str, Any], order: Mapping[int, int]) -> bool:
    """Whether a group lists the parameters whose places are given in the order of these."""
    ranks = [order[id(p)] for p in group["params"] if id(p) in order]
    return ranks == sorted(ranks)


def _insert(group: dict[str, Any], more: Sequence[tuple[str, nn.Parameter]], order: Mapping[int, int]) -> None:
    """New parameters of a group: at their places where it lists the model's order, else at its end."""
    waiting = deque(more)
    entries: list[tuple[str, nn.Parameter]] = []
    is_ordered = _is_in_order(group, order)
    for name, parameter in zip(group.get("param_names") or [""] * len(group["params"]), group["params"], strict=True):
        if is_ordered and id(parameter) in order:
            while waiting and order[id(waiting[0][1])] < order[id(parameter)]:
                entries.append(waiting.popleft())
        entries.append((name, parameter))
    entries += waiting
    group["params"][:] = [parameter for _, parameter in entries]
    if "param_names" in group:
        group["param_names"] = [name for name, _ in entries]
