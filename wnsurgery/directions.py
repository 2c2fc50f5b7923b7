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
        self._lent: Kept | None = None
        self._norms: Any = None

    @classmethod
    def of(cls, slots: Iterable[Slot]) -> list[Directions]:
        """Of several layers, the rows of all small weights measured at one go: between two layers the code for it would
        have to be fetched anew."""
        made, small, weights = [cls(slot) for slot in slots], [], []
        for directions in made:
            if directions._entry is not None:
                g, v = directions._entry.pair()
                if g is not None and v is not None and v.numel() <= _SMALL and (sizes := directions._sizes(g, v)):
                    small.append(directions)
                    weights.append((v, sizes))
        for directions, norms in zip(small, lengths_of(weights) if weights else (), strict=True):
            directions._prepare(norms)
        return made

    def lend(self) -> bool:
        """Let the next forward pass use v, where its rows allow that; whether they do."""
        if self._entry is not None and (self._lent is None or not self._lent.is_of(*self._entry.pair())):
            self._prepare()
        entry, lent = self._entry, self._lent
        if entry is None or lent is None or torch.is_grad_enabled():
            return False
        lent.used = False
        entry.__dict__["_kept"] = lent
        return True

    def take_back(self) -> Any:
        """||v|| per channel as numpy's float64 if the layer used v, None if it used its weight."""
        entry, lent = self._entry, self._lent
        kept: Any = None if entry is None else entry.__dict__.get("_kept")
        if entry is None or lent is None or kept is not lent:
            return None
        del entry.__dict__["_kept"]
        return self._norms if lent.used else None

    def _prepare(self, norms: Any = None) -> None:
        """Make what is lent if it may stand for v / ||v||; ||v|| is measured if it is not given."""
        entry: Any = self._entry
        g, v = entry.pair()
        w = v.detach()
        if w.dtype is torch.float32 and type(w) is Tensor and w.numel() and Kept.can_hold(g, v):
            self._norms = self._measured(g, w) if norms is None else norms
            low, high = np.minimum.reduce(self._norms), np.maximum.reduce(self._norms)
            if _RANGE[0] < low and high < _RANGE[1]:
                w.requires_grad_(g.requires_grad or v.requires_grad)  # as for a kept weight
                self._lent = _Lent(w, g, v)
                return
        self._entry = None

    def _measured(self, g: Tensor, v: Tensor) -> Any:
        """||v|| per channel."""
        sizes = self._sizes(g, v)
        if sizes is not None:
            return lengths_of([(v, sizes)])[0]
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


class _Lent(Kept):
    """v in place of a weight that is kept, for a pass that begins at once: versions tell all there is to tell."""

    __slots__ = ()

    def __init__(self, w: Tensor, g: Tensor, v: Tensor) -> None:
        self.w, self._g, self._v, self.used = w, g, v, False
        self._version, self._g_version, self._v_version = w._version, g._version, v._version

    def is_written(self) -> bool:
        return self.w._version != self._version

    def is_of(self, g: Tensor | None, v: Tensor | None) -> bool:
        return self.was_of(g, v) and not self.is_written()
