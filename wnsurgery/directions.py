"""Run a layer on v itself: its output is that of the unit directions v / ||v||, times ||v|| per channel.

Who measures outputs of unit directions divides by ||v|| afterwards, and no weight need be computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from wnsurgery.kept import Kept, probes_of
from wnsurgery.mechanism import WeightNormList
from wnsurgery.norms import norm, short_row_norms
from wnsurgery.reparam import Axes
from wnsurgery.walk import Slot

__all__ = ["Directions"]

_RANGE = 2.0**-10, 2.0**10  # norms with which an output neither overflows nor loses digits where v / ||v|| would not


class Directions:
    """What a weight-normalized layer's evaluation forward is to use in place of its weight.

    The layer takes it for the weight that it has kept for its g and v as they are when it is lent: writing to g, or a
    forward pass with gradients, ends the loan.
    """

    def __init__(self, slot: Slot) -> None:
        table: Any = slot.module._modules.get("parametrizations")
        entry = None if table is None else table._modules.get(slot.parameter)
        self._entry = entry if slot.form == "ours" and isinstance(entry, WeightNormList) else None
        self._lent: Kept | None = None
        self._norms: Any = None

    def lend(self) -> None:
        """Let the next forward pass use v, where its rows allow that."""
        entry = self._entry
        if entry is None or entry._deferred is not None or self._extreme():
            return
        g, v = entry.pair()
        if Kept.can_hold(g, v):
            w = v.detach()
            w.requires_grad_(g.requires_grad or v.requires_grad)  # as for a kept weight
            self._lent = entry.__dict__["_kept"] = Kept(w, g, v, probes=probes_of(entry, g, v))

    def take_back(self) -> Any:
        """||v|| per channel as numpy's float64 if the layer used v, None if it used its weight."""
        entry, lent = self._entry, self._lent
        self._lent = None
        kept: Any = None if entry is None else entry.__dict__.get("_kept")
        if lent is None or kept is not lent:
            return None
        del entry.__dict__["_kept"]
        return self._norms if lent.used else None

    def _extreme(self) -> bool:
        """Whether v would not do in place of v / ||v||; measured once, since initialisation leaves v alone."""
        if self._norms is None:
            entry: Any = self._entry
            v, axes = entry.pair()[1].detach(), entry[0].axes
            if v.dtype != torch.float32 or type(v) is not Tensor or not v.is_cpu or not v.numel():
                self._entry = None
                return True
            self._norms = _lengths(v, axes)
            low, high = np.minimum.reduce(self._norms), np.maximum.reduce(self._norms)
            if not (_RANGE[0] < low and high < _RANGE[1]):
                self._entry = None
                return True
        return False


def _lengths(v: Tensor, axes: Axes) -> Any:
    """||v|| per channel."""
    if axes.kept == (0,) and axes.groups == 1 and v.is_contiguous() and not v.is_neg():
        with np.errstate(all="ignore"):  # rows out of range
            return short_row_norms(np.from_dlpack(v).reshape(len(v), -1))
    return norm(axes.grouped(v), axes.reduced(v.ndim), blocked=True).reshape(-1).numpy()
