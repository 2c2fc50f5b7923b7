"""The start without data: orthogonal directions, and magnitudes that keep the size of what a ReLU net passes on.

Source: Arpit, Campos & Bengio 2019, "How to Initialize your Network? Robust Initialization for WeightNorm & ResNets"
(arXiv 1906.02341): g = sqrt(2 fan_in / fan_out) with orthogonal rows of v and zero biases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wnsurgery.errors import SelectionError
from wnsurgery.layers import layer_of
from wnsurgery.plan import Pattern, Skipped
from wnsurgery.reparam import Axes
from wnsurgery.safety import values_kept
from wnsurgery.targets import Scale, bias_of, is_log, scales_of, select, settable_bias, sort_out
from wnsurgery.text import by, columns
from wnsurgery.walk import Slot, slots

__all__ = ["FanReport", "LayerFan", "fan_init"]


@dataclass(frozen=True)
class LayerFan:
    """One weight set without data: its shape, fans and magnitude; `bias` tells whether a bias was set to zero."""

    name: str
    shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    magnitude: float
    bias: bool


@dataclass(frozen=True)
class FanReport:
    """What the start without data did; prints as a table.

    Attributes:
        initialised: the weights that got new directions and magnitudes: the model computes another function now.
        left: the weight-normalized weights that keep theirs, each with the reason.
    """

    initialised: tuple[LayerFan, ...]
    left: tuple[Skipped, ...]

    def __str__(self) -> str:
        lines = [
            f"{len(self.initialised)} weights initialised without data (the function changed), "
            f"{len(self.left)} left as they were"
        ]
        if self.initialised:
            rows = [
                (x.name, by(x.shape), str(x.fan_in), str(x.fan_out), f"{x.magnitude:.4g}", "zero" if x.bias else "")
                for x in self.initialised
            ]
            lines += columns([("weight", "shape", "fan in", "fan out", "g", "bias"), *rows])
        if self.left:
            lines += columns([("left", "reason"), *((skip.name, skip.reason) for skip in self.left)])
        return "\n".join(lines)


def fan_init(
    model: nn.Module,
    *,
    include: Pattern | None = None,
    exclude: Pattern | None = None,
    init_scale: Scale = 1.0,
    generator: torch.Generator | None = None,
) -> FanReport:
    """Give weight-normalized layers orthogonal directions and g = sqrt(2 fan_in / fan_out), in place: a start for ReLU
    nets without data. The function changes.

    fan_in is the number of weights that make one output channel, fan_out the number of weights that one input channel
    feeds: kernel size times channels, of one group. So g is sqrt(2 in/out) for convolutions as for linear layers, and
    the mean square of a layer's outputs times their number is twice that of its inputs; the ReLU behind it halves it.
    The rows of v of each group are orthonormal where they are no more than fan_in; where they are more, they
    come from a matrix with orthonormal columns and are scaled to norm 1. Biases are set to zero, but for frozen and
    shared ones. A tied pair is set once, as the first of its layers.

    >>> model = wn.apply_weight_norm(nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 4)))
    >>> report = wn.fan_init(model, generator=torch.Generator().manual_seed(0))
    >>> [(layer.fan_in, layer.fan_out, layer.magnitude) for layer in report.initialised]
    [(8, 2, 2.8284271247461903), (2, 4, 1.0)]

    Args:
        model: a module tree with weight-normalized layers.
        include, exclude: patterns as in `plan_weight_norm`.
        init_scale: a factor for g, or a mapping from patterns to factors, such as 0.1 for the last layer of residual
            branches; the first that fits, 1 where none does.
        generator: the source of random numbers, on the CPU; default torch's own.

    Returns a FanReport. Recurrent, attention-packed and lookup weights and frozen magnitudes stay as they are.

    Raises SelectionError when nothing is selected or a scale is not positive and finite, fits nothing, or takes g out
    of its type; nothing has changed then.
    """
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(f"generator must be a torch.Generator, not {type(generator).__name__}")
    found = slots(model)
    scales = scales_of(init_scale, found)
    chosen = select(found, include, exclude)
    targets, reasons = sort_out(chosen, found)
    free = settable_bias(found)
    planned: list[tuple[Slot, LayerFan]] = []
    directions: dict[int, str] = {}
    for slot, _ in targets:
        first = directions.get(id(slot.tensor)) or directions.get(id(slot.magnitude))
        if first is not None:
            reasons[slot.fqn] = f"tied to {first}"
        elif slot.tensor is None or not slot.tensor.requires_grad:
            reasons[slot.fqn] = "its direction is frozen"
        else:
            directions[id(slot.tensor)] = directions[id(slot.magnitude)] = slot.fqn
            planned.append((slot, _fan(slot, scales[id(slot)], id(bias_of(slot)) in free)))
    written = [t for slot, _ in planned for t in (slot.magnitude, slot.tensor, bias_of(slot)) if t is not None]
    with values_kept(written):
        for slot, fan in planned:
            _set(slot, fan, generator)
    left = [Skipped(s.fqn, s.shape, reasons[s.fqn]) for s in chosen if s.fqn in reasons]
    return FanReport(tuple(fan for _, fan in planned), tuple(left))


def _fan(slot: Slot, scale: float, zero_bias: bool) -> LayerFan:
    """What a weight is to be set to."""
    g, v = slot.magnitude, slot.tensor
    assert g is not None and v is not None
    fan_in, fan_out = _fans(slot, v, g.numel())
    size = scale * math.sqrt(2 * fan_in / fan_out)
    if size > torch.finfo(g.dtype).max:
        raise SelectionError(f"{slot.fqn}: init_scale={scale:.6g} takes its magnitude out of its type")
    return LayerFan(slot.fqn, tuple(v.shape), fan_in, fan_out, size, bias_of(slot) is not None and zero_bias)


def _set(slot: Slot, fan: LayerFan, generator: torch.Generator | None) -> None:
    g, v, bias = slot.magnitude, slot.tensor, bias_of(slot)
    assert g is not None and v is not None
    with torch.no_grad():
        g.fill_(math.log(fan.magnitude) if is_log(slot) else fan.magnitude)
        v.copy_(_directions(_axes(slot), v, _groups(slot), generator))
        if bias is not None and fan.bias:
            bias.zero_()
    torch.clear_autocast_cache()  # which does not see that a Parameter was written to


def _axes(slot: Slot) -> Axes:
    row = layer_of(slot.module)
    own = None if row is None else row.axes(slot.module, slot.parameter)
    assert own is not None
    return own.check(slot.shape or ())


def _groups(slot: Slot) -> int:
    groups: Any = getattr(slot.module, "groups", 1)
    return groups if isinstance(groups, int) else 1


def _fans(slot: Slot, v: Tensor, rows: int) -> tuple[int, int]:
    """(weights behind one output channel, weights one input channel feeds)."""
    fan_in = v.numel() // rows
    kernel = v[0, 0].numel() if hasattr(slot.module, "kernel_size") and v.ndim > 2 else 1
    return fan_in, rows // _groups(slot) * kernel


def _directions(axes: Axes, v: Tensor, groups: int, generator: torch.Generator | None) -> Tensor:
    """Orthogonal rows of norm 1 in v's shape; rows of different groups see different inputs and are drawn apart."""
    view = axes.grouped(v)
    kept = (0, 2) if axes.groups > 1 else axes.kept
    order = (*kept, *(d for d in range(view.ndim) if d not in kept))
    shape = [view.shape[d] for d in order]
    rows = math.prod(shape[: len(kept)])
    blocks = [_orthogonal(rows // groups, v.numel() // rows, generator) for _ in range(groups)]
    back = [order.index(d) for d in range(view.ndim)]
    return torch.cat(blocks).reshape(shape).permute(back).reshape(v.shape)


def _orthogonal(rows: int, columns_: int, generator: torch.Generator | None) -> Tensor:
    """A float64 matrix with orthonormal rows; if there are too many, of orthonormal columns with rows scaled to 1."""
    tall = torch.randn(max(rows, columns_), min(rows, columns_), dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(tall)
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)  # uniform over all orthogonal matrices
    matrix = q if rows >= columns_ else q.T
    unit: Tensor = matrix / matrix.norm(dim=1, keepdim=True)
    return unit
