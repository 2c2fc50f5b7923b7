"""Run a layer on v itself: its output is that of the unit directions v / ||v||, times ||v|| per channel.

Who measures outputs of unit directions divides by ||v|| afterwards, and no weight need be computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wnsurgery import fused
from wnsurgery.channelwise import is_taken, lengths_of
from wnsurgery.kept import Kept
from wnsurgery.mechanism import WeightNormList
from wnsurgery.norms import norm
from wnsurgery.reparam import Axes
from wnsurgery.walk import Slot

__all__ = ["Directions"]

_SMALL = 2**16  # elements of v that are not worth having in the cache when the layer runs
_RANGE = 2.0**-10, 2.0**10  # norms with which an output neither overflows nor loses digits where v / ||v|| would not


class Directions:
    """What a weight-normalized layer's evaluation forward is to use in place of its weight.

    The layer takes it for the weight that it has kept for its g and v as they were when it was first lent: writing to
    g, or a forward pass with gradients, leaves it unused.
    """

    def __init__(self, slot: Slot) -> None:
        entry = slot.entry
        ours = slot.form == "ours" and isinstance(entry, WeightNormList) and entry._deferred is None
        ours = ours and len(entry._modules) == 1  # nothing is stacked on top
        self._entry: WeightNormList | None = entry if ours else None
        self._lent: _Lent | None = None
        self._norms: Any = None

    @classmethod
    def of(cls, slots: Iterable[Slot]) -> list[Directions]:
        """Of several layers, the rows of all small weights measured at one go: between two layers the code for it would
        have to be fetched anew."""
        made, small, weights = [cls(slot) for slot in slots], [], []
        for directions in made:
            if directions._entry is not None:
                g, v = directions._entry.pair()
                if v.numel() <= _SMALL and (sizes := directions._sizes(g, v)):
                    small.append(directions)
                    weights.append((v, sizes))
        if weights:
            together, start = lengths_of(weights), 0
            all_ordinary = _are_ordinary(together)
            for directions, (_, sizes) in zip(small, weights, strict=True):
                norms = together[start : (start := start + sizes.rows)]
                directions._prepare(norms, all_ordinary or _are_ordinary(norms))
        return made

    def lend(self) -> bool:
        """Let the next forward pass use v, where its rows allow that; whether they do."""
        if self._entry is not None and (self._lent is None or not self._lent.is_of(*self._entry.pair())):
            norms = self._measured(*self._entry.pair())
            self._prepare(norms, norms is not None and _are_ordinary(norms))
        entry, lent = self._entry, self._lent
        if entry is None or lent is None or torch.is_grad_enabled():
            return False
        lent.taken = False
        entry.__dict__["_kept"] = lent
        return True

    def take_back(self) -> Any:
        """||v|| per channel as numpy's float64 if the layer used v, None if it used its weight."""
        entry, lent = self._entry, self._lent
        kept: Any = None if entry is None else entry.__dict__.get("_kept")
        if entry is None or lent is None or kept is not lent:
            return None
        del entry.__dict__["_kept"]
        return self._norms if lent.taken else None

    def _prepare(self, norms: Any, ordinary: bool) -> None:
        """Make what is lent, where rows of these lengths may stand for those of unit length."""
        entry: Any = self._entry
        g, v = entry.pair()
        if not (ordinary and Kept.can_hold(g, v)):
            self._entry = None
            return
        w = v.detach().requires_grad_(g.requires_grad or v.requires_grad)  # as for a kept weight
        self._norms, self._lent = norms, _Lent(w, g, v)

    def _measured(self, g: Tensor, v: Tensor) -> Any:
        """||v|| per channel; None where v is nothing to measure."""
        sizes = self._sizes(g, v)
        if sizes is not None:
            return lengths_of([(v, sizes)])
        v = v.detach()
        if v.dtype is not torch.float32 or type(v) is not Tensor or not v.is_cpu or not v.numel():
            return None
        axes = self._axes
        return norm(axes.grouped(v), axes.reduced(v.ndim), blocked=True).reshape(-1).numpy()

    def _sizes(self, g: Tensor, v: Tensor) -> fused.Sizes | None:
        """How the kernels see the pair; None where they do not take it."""
        axes = self._axes
        return fused.plan(g, v, axes.kept, axes.groups, "linear") if is_taken(v) else None

    @property
    def _axes(self) -> Axes:
        entry: Any = self._entry
        return entry[0].axes  # type: ignore[no-any-return]


def _are_ordinary(norms: Any) -> bool:
    """Whether rows of these lengths may stand for those of unit length."""
    low, high = _RANGE
    return bool(low < np.minimum.reduce(norms) and np.maximum.reduce(norms) < high)


class _Lent(Kept):
    """v in place of a weight that is kept, for a pass that begins at once: versions tell all there is to tell.

    As one that was used before, it is taken in a few steps; it says itself whether it was.
    """

    __slots__ = ("_lent", "taken")

    def __init__(self, w: Tensor, g: Tensor, v: Tensor) -> None:
        self._lent, self._g, self._v, self.used, self.taken = w, g, v, True, False
        self._version, self._g_version, self._v_version = w._version, g._version, v._version

    @property
    def w(self) -> Tensor:  # type: ignore[override]
        self.taken = True
        return self._lent

    def is_written(self) -> bool:
        return self._lent._version != self._version

    def is_of(self, g: Tensor | None, v: Tensor | None) -> bool:
        return self.was_of(g, v) and not self.is_written()
