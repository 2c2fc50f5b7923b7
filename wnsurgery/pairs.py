"""Every (g, v) pair of a model, once, with its rule: what tools for models under weight norm work on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from wnsurgery.dtensors import gathered, is_spread
from wnsurgery.errors import PairError, SelectionError
from wnsurgery.mechanism import WeightNormList
from wnsurgery.norms import norm, wide_dtype
from wnsurgery.plan import Pattern, matches, patterns
from wnsurgery.reparam import Axes, Magnitude, WeightNorm, compose
from wnsurgery.walk import Slot, legacy_hooks, slots

__all__ = ["Pair", "pairs"]


@dataclass(frozen=True)
class Pair:
    """One (g, v) with all its owners.

    Attributes:
        owners: every (module, parameter) that has this pair, the first in walking order first.
        g, v: the Parameters; g holds the logarithm where `magnitude` is "log".
        axes, magnitude: the rule of our weight norm; for torch's, what the shape of g says, and "linear".
    """

    owners: tuple[Slot, ...] = field(repr=False)
    g: nn.Parameter = field(repr=False)
    v: nn.Parameter = field(repr=False)
    axes: Axes
    magnitude: Magnitude

    @property
    def fqn(self) -> str:
        return self.owners[0].fqn

    @property
    def form(self) -> str:
        return self.owners[0].form

    @property
    def is_meta(self) -> bool:
        return self.g.is_meta or self.v.is_meta

    def weight(self, v: Tensor) -> Tensor:
        """The weight the forward would use with this direction, by the arithmetic of its own form."""
        slot = self.owners[0]
        if slot.form == "ours":
            return compose(self.g, v, self.axes, magnitude=self.magnitude)
        if slot.form == "torch":
            entry = slot.entry
            return entry[0](self.g, v)  # type: ignore[no-any-return]
        hook = next(hook for hook in legacy_hooks(slot.module) if hook.name == slot.parameter)
        return torch._weight_norm(v, self.g, hook.dim)

    def whole(self) -> Pair:
        """The same with all of g and v in every process, of which changes do not come back; itself where they are."""
        if not is_spread(self.v):
            return self
        g, v = (nn.Parameter(gathered(half.detach()), half.requires_grad) for half in (self.g, self.v))
        return replace(self, g=g, v=v)

    def norms(self) -> Tensor:
        """||v|| per row, in float64, shaped like the reduced direction."""
        return gathered(norm(self.axes.grouped(self.v.detach()), self.axes.reduced(self.v.ndim), blocked=True))

    def size(self) -> Tensor:
        """|g|, or e^s for a log-scale magnitude, in float64, shaped like `norms()`."""
        g = gathered(self.g.detach()).to(wide_dtype(self.v))
        view = self.axes.grouped(self.v)
        dims = self.axes.reduced(self.v.ndim)
        return (g.exp() if self.magnitude == "log" else g.abs()).reshape(
            [1 if d in dims else size for d, size in enumerate(view.shape)]
        )

    def spread(self, per_row: Tensor) -> Tensor:
        """One value per row, shaped to broadcast against v."""
        return self.axes.spread(per_row, self.v)


def pairs(model: nn.Module, include: Pattern | None = None, exclude: Pattern | None = None) -> list[Pair]:
    """The pairs of a model that a selection speaks of, in walking order, ties once; writes still pending are done.

    Raises SelectionError when a pattern matches no weight under weight norm or nothing is selected, PairError when one
    half of a pair is missing.
    """
    groups: dict[tuple[int, int], list[Slot]] = {}
    for slot in slots(model):
        if slot.form in ("ours", "torch", "legacy"):
            groups.setdefault((id(slot.magnitude), id(slot.tensor)), []).append(slot)
    everything = [slot for group in groups.values() for slot in group]
    for option, wish in (("include", include), ("exclude", exclude)):
        for pattern in patterns(wish):
            if not any(matches(pattern, slot) for slot in everything):
                raise SelectionError.no_match(option, str(pattern), [slot.fqn for slot in everything])
    chosen = [
        group
        for group in groups.values()
        if (include is None or any(matches(p, s) for p in patterns(include) for s in group))
        and not any(matches(p, s) for p in patterns(exclude) for s in group)
    ]
    if not chosen:
        raise SelectionError("no weight under weight norm is selected", hint="call apply_weight_norm first")
    return [_pair(group) for group in chosen]


def _pair(group: list[Slot]) -> Pair:
    slot = group[0]
    g: Any = slot.magnitude
    v: Any = slot.tensor
    if g is None or v is None:
        raise PairError(f"{slot.fqn}: one half of the (g, v) pair is missing")
    if slot.form != "ours":
        return Pair(tuple(group), g, v, Axes.of_pair(g.shape, v.shape), "linear")
    for owner in group:
        entry: Any = owner.module.parametrizations[owner.parameter]  # type: ignore[index]
        if isinstance(entry, WeightNormList):
            entry.absorb()
    rule: WeightNorm = entry[0]
    return Pair(tuple(group), g, v, rule.axes, rule.magnitude)
