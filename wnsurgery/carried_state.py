"""What an optimizer keeps for a parameter, and its gradient, carried over to what takes the parameter's place.

It is one of a few kinds of thing, each with its own way over:

| kind | what it is | w -> g, v | v rescaled to c v |
| --- | --- | --- | --- |
| count | step numbers and other scalars | copied | kept |
| gradient | an average of gradients (SGD's momentum_buffer, Adam's exp_avg) | the chain rule | 1/c |
| square | an average or sum of squared gradients (exp_avg_sq, Adagrad's sum) | second moments of the above | 1/c^2 |
| bound | a running maximum of |gradients| (Adamax's exp_inf) | root of its square's | 1/c |
| step | an average of steps (RMSprop's momentum_buffer) | the step of w, taken by the pair | c |
| squared step | an average of squared steps (Adadelta's acc_delta) | second moments of the above | c^2 |
| weight | an average of weights (ASGD's ax) | decomposed, composed | c |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wnsurgery.chain_rule import ChainRule
from wnsurgery.dtensors import spread_like
from wnsurgery.reparam import Axes, Magnitude, compose, decompose

__all__ = [
    "Heir",
    "Settings",
    "State",
    "Swap",
    "inherited_grad",
    "inherited_state",
    "join_state",
    "joined_grad",
    "kinds_of",
    "rescaled",
    "split_grad",
    "split_state",
]

State = dict[str, Any]
Kind = Literal["count", "gradient", "square", "bound", "step", "squared step", "weight"]

_POWER: dict[Kind, int] = {"gradient": -1, "square": -2, "bound": -1, "step": 1, "squared step": 2, "weight": 1}

_ADAM: dict[str, Kind] = {"step": "count", "exp_avg": "gradient", "exp_avg_sq": "square", "max_exp_avg_sq": "square"}
_KNOWN: tuple[tuple[type[Optimizer], dict[str, Kind]], ...] = (
    (torch.optim.SGD, {"momentum_buffer": "gradient"}),
    (torch.optim.Adam, _ADAM),
    (torch.optim.AdamW, _ADAM),
    (torch.optim.NAdam, _ADAM | {"mu_product": "count"}),
    (torch.optim.RAdam, _ADAM),
    (torch.optim.SparseAdam, _ADAM),
    (torch.optim.Adamax, {"step": "count", "exp_avg": "gradient", "exp_inf": "bound"}),
    (torch.optim.Adagrad, {"step": "count", "sum": "square"}),
    (
        torch.optim.RMSprop,
        {"step": "count", "square_avg": "square", "grad_avg": "gradient", "momentum_buffer": "step"},
    ),
    (torch.optim.Adadelta, {"step": "count", "square_avg": "square", "acc_delta": "squared step"}),
    (torch.optim.ASGD, {"step": "count", "eta": "count", "mu": "count", "ax": "weight"}),
    (torch.optim.Muon, {"momentum_buffer": "gradient"}),
)


@dataclass(frozen=True)
class Swap:
    """One weight and the pair it becomes or came from, at the values they have in common."""

    weight: nn.Parameter
    g: nn.Parameter
    v: nn.Parameter
    axes: Axes
    magnitude: Magnitude


@dataclass(frozen=True)
class Heir:
    """A vector whose value went into another, which gets the same gradient from then on; `made`: only for this."""

    old: nn.Parameter
    new: nn.Parameter
    made: bool


def kinds_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Kind] | None:
    """What each entry of a parameter's state is; None where some entry is unknown or not of its parameter's shape, so
    that the state has to start anew."""
    table = next((kinds for kind, kinds in _KNOWN if isinstance(optimizer, kind)), {})
    for key, x in (optimizer.state.get(parameter) or {}).items():
        if key not in table or (isinstance(x, Tensor) and table[key] != "count" and x.shape != parameter.shape):
            return None
    return table


class Settings:
    """The options of the group that each parameter of an optimizer is in."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._defaults: Mapping[str, Any] = optimizer.defaults
        self._groups: dict[int, Mapping[str, Any]] = {
            id(p): group for group in optimizer.param_groups for p in group["params"]
        }

    def of(self, parameter: Tensor) -> Mapping[str, Any]:
        return self._groups.get(id(parameter), self._defaults)


def rescaled(x: Any, kind: Kind, factor: Tensor) -> Any:
    """State of a parameter that is multiplied by a positive factor."""
    if kind == "count" or not isinstance(x, Tensor):
        return x
    return torch.empty_like(x).copy_(x.to(factor.dtype) * factor.to(x.device) ** _POWER[kind])


def split_state(
    swap: Swap, rule: ChainRule, state: State, table: Mapping[str, Kind], settings: Mapping[str, Any]
) -> tuple[State, State]:
    """What is kept for g and for v, from what was for the weight."""
    mean, first, second = _mean_of(state, settings)
    mean = None if mean is None else mean.to(rule.unit.dtype) / first
    for_g: State = {}
    for_v: State = {}
    for key, x in state.items():
        kind = table[key]
        if kind == "count" or not isinstance(x, Tensor):
            for_g[key], for_v[key] = _copied(x), _copied(x)
            continue
        if kind == "gradient":
            pair = rule.split(x)
        elif kind == "step":
            pair = rule.of_steps().split(x)
        elif kind == "square":
            pair = tuple(s * second for s in rule.split_squares(x.to(rule.unit.dtype) / second, mean))  # type: ignore[assignment]
        elif kind == "bound":
            pair = tuple(s.sqrt() for s in rule.split_squares(x.to(rule.unit.dtype).square()))  # type: ignore[assignment]
        elif kind == "squared step":
            pair = rule.of_steps().split_squares(x)
        else:
            pair = decompose(x.to(swap.v.dtype), swap.axes, magnitude=swap.magnitude, magnitude_dtype=swap.g.dtype)
        for_g[key] = _stored(pair[0], swap.g, x, swap.weight)
        for_v[key] = _stored(pair[1], swap.v, x, swap.weight)
    return for_g, for_v


def inherited_state(heir: Heir, state: State, table: Mapping[str, Kind]) -> State:
    """What is kept for the new vector: the same, but that an average of weights moves along with the value."""
    moved = (heir.new.detach() - heir.old.detach()).to(heir.new.dtype)
    inherited: State = {}
    for key, x in state.items():
        kept = table[key] == "count" or not isinstance(x, Tensor)
        inherited[key] = _copied(x) if kept else _stored(x, heir.new, x, heir.old)
        if table[key] == "weight":
            inherited[key] += moved.to(inherited[key])
    return inherited


def join_state(
    swap: Swap,
    rule: ChainRule,
    states: tuple[State, State],
    table: Mapping[str, Kind],
    settings: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> State:
    """What is kept for the weight, from what was for g and for v; either may be empty."""
    for_g, for_v = states
    (mean_g, first_g, second_g), (mean_v, first_v, second_v) = (
        _mean_of(state, setting) for state, setting in zip(states, settings, strict=True)
    )
    lead = for_v or for_g
    second = second_v if for_v else second_g
    first = first_v if for_v else first_g
    mean_g, mean_v = (
        None if m is None else m.to(rule.unit.dtype) / f for m, f in ((mean_g, first_g), (mean_v, first_v))
    )
    joined: State = {}
    for key, x in lead.items():
        kind = table[key]
        if kind == "count" or not isinstance(x, Tensor):
            joined[key] = _copied(x)
            continue
        a, b = _wide(for_g.get(key), rule), _wide(for_v.get(key), rule)
        if kind == "gradient":
            a = None if a is None else a * (first / first_g)
            w = rule.join(a, b)
        elif kind == "step":
            w = rule.of_steps().join(a, b)
        elif kind == "square":
            a = None if a is None else a / second_g
            b = None if b is None else b / second_v
            w = rule.join_squares(a, b, mean_g, mean_v) * second
        elif kind == "bound":
            w = rule.join_squares(_square(a), _square(b)).sqrt()
        elif kind == "squared step":
            w = rule.of_steps().join_squares(a, b)
        else:
            g = for_g.get(key, swap.g).detach()
            w = compose(g, for_v.get(key, swap.v).detach(), swap.axes, magnitude=swap.magnitude)
        joined[key] = _stored(w, swap.weight, x, swap.v if for_v else swap.g)
    return joined


def _wide(x: Any, rule: ChainRule) -> Tensor | None:
    return x.detach().to(rule.unit.device, rule.unit.dtype) if isinstance(x, Tensor) else None


def _square(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.square()


def _copied(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _stored(x: Tensor, parameter: Tensor, old_state: Tensor, old_parameter: Tensor) -> Tensor:
    """State laid out as its parameter, in its type where the old state had its parameter's, where the old one was."""
    dtype = parameter.dtype if old_state.dtype == old_parameter.dtype else old_state.dtype
    return torch.empty_like(parameter, dtype=dtype, device=old_state.device, requires_grad=False).copy_(
        spread_like(x, parameter)
    )


def split_grad(swap: Swap, rule: ChainRule) -> list[tuple[Tensor, Tensor | None]]:
    """The gradients of g and v, if they are trained, from the weight's, if it has one."""
    grad = swap.weight.grad
    if grad is None:
        return []
    for_g, for_v = rule.split(grad)
    pairs = [(swap.g, for_g), (swap.v, for_v)]
    return [(p, _stored(x, p, grad, swap.weight)) for p, x in pairs if p.requires_grad]


def inherited_grad(heir: Heir) -> list[tuple[Tensor, Tensor | None]]:
    """The gradient of a vector, for the one that its value went into."""
    old, new = heir.old, heir.new
    if old.grad is None or not new.requires_grad:
        return []
    return [(new, _stored(old.grad, new, old.grad, old))]


def joined_grad(swap: Swap, rule: ChainRule) -> list[tuple[Tensor, Tensor | None]]:
    """The weight's gradient, if it is trained, from those of g and v, if they have any."""
    for_g, for_v = swap.g.grad, swap.v.grad
    if (for_g is None and for_v is None) or not swap.weight.requires_grad:
        return []
    joined = rule.join(for_g, for_v)
    return [(swap.weight, _stored(joined, swap.weight, joined, joined))]


def _mean_of(state: State, settings: Mapping[str, Any]) -> tuple[Any, float, float]:
    """The average gradient beside the second moments, if there is one, and by how much each falls short of a mean.

    Averages start at zero: after t steps with decay b they hold 1 - b^t of what they average.
    """
    count = float(state.get("step", 0) or 0)
    if "betas" in settings:
        mean, decays = state.get("exp_avg"), settings["betas"]
    else:
        mean, decays = state.get("grad_avg"), [settings.get("alpha", 0.0)] * 2
    if mean is None:
        return None, 1.0, 1.0
    first, second = (1 - float(b) ** count if count else 1.0 for b in decays)
    return mean, first or 1.0, second or 1.0
