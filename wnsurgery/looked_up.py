"""Embeddings in training: the weight norm of the rows that are looked up, not of the whole table.

A vocabulary has tens of thousands of rows and a batch asks for a few hundred. Their rows of w, bit for bit, are made
from the same rows of g and v; gradients reach g and v as those of any lookup do.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wnsurgery.norms import plain_scale, row_norms
from wnsurgery.reparam import Axes, Magnitude, Ready, compose_eagerly

__all__ = ["look_up", "serves"]

_SHORT = 32  # row norms of shorter rows depend, in the last bit of float64, on how many there are
_FEW = 8  # times as many rows as ids there are to be
_LARGE = 1 << 19  # elements from which the whole table costs more than the calls for some rows of it
_ROWS = Axes((0,))


def serves(ids: Tensor, v: Tensor, axes: Axes) -> bool:
    """Whether it pays to compute the rows of a table (rows, width) for these ids alone, and changes no bit."""
    return (
        v.ndim == 2
        and _FEW * ids.numel() <= v.shape[0]
        and axes == _ROWS
        and v.dtype == torch.float32
        and v.device.type == "cpu"
        and v.is_contiguous()
        and v.shape[1] >= _SHORT
        and v.numel() >= _LARGE
    )


def look_up(ids: Tensor, g: Tensor, v: Tensor, magnitude: Magnitude, padding: int | None) -> Tensor | None:
    """Rows `ids` of w = g * v / ||v||, shape (*ids.shape, width); None where one of them is not an ordinary one.

    >>> g, v = torch.ones(3, 1), torch.tensor([[3.0, 4.0], [6.0, 8.0], [0.0, 2.0]])
    >>> look_up(torch.tensor([2, 1]), g, v, "linear", None).tolist()
    [[0.0, 1.0], [0.6000000238418579, 0.800000011920929]]
    """
    if not ids.numel():
        return None
    rows_g = F.embedding(ids, g, padding).reshape(-1, 1)
    rows_v = F.embedding(ids, v, padding).reshape(-1, v.shape[1])
    with torch.no_grad():
        norms = row_norms(rows_v.detach())
        plain = plain_scale(rows_g.detach(), norms, magnitude)
    if plain is None or not plain[1]:
        return None
    w = compose_eagerly(rows_g, rows_v, _ROWS, magnitude, None, Ready(norms.float(), plain[0]))
    return w.view(*ids.shape, v.shape[1])
