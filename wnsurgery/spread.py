"""How the numbers of a weight's rows lie: smallest, median, largest, and counts per logarithmic bin."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wnsurgery.dtensors import gathered
from wnsurgery.norms import norm
from wnsurgery.reparam import Axes

__all__ = [
    "BINS_PER_DECADE",
    "Spread",
    "effective_step",
    "log_bins",
    "ratio",
    "row_norms",
    "spread",
]

BINS_PER_DECADE = 8


class Spread(NamedTuple):
    """The smallest, the median and the largest of some numbers."""

    min: float
    median: float
    max: float


def spread(values: Tensor) -> Spread | None:
    """The spread of a tensor's elements; None where there are none, NaN where one of them is.

    >>> spread(torch.tensor([3.0, 1.0, 2.0]))
    Spread(min=1.0, median=2.0, max=3.0)
    """
    flat = values.detach().double().flatten()
    if not flat.numel():
        return None
    return Spread(flat.min().item(), torch.median(flat).item(), flat.max().item())


def row_norms(v: Tensor, axes: Axes) -> Tensor:
    """||v|| of each row, flat, in float64."""
    return gathered(norm(axes.grouped(v), axes.reduced(v.ndim), blocked=True)).double().flatten()


def effective_step(g: Tensor, norms: Tensor, lr: float = 1.0) -> Tensor:
    """The learning rate that a row's direction sees, lr |g| / ||v||^2: the angle it turns, in radians, for a gradient
    of the plain weight that is one long, at right angles to it (equation 3, to first order, plain gradient descent).

    >>> effective_step(torch.tensor([2.0]), torch.tensor([4.0]), lr=0.5)
    tensor([0.0625], dtype=torch.float64)

    Args:
        g: the magnitudes, one per row.
        norms: ||v||, one per row.
        lr: the learning rate of v.
    """
    size, length = g.double().abs().flatten(), norms.double().flatten()
    return size / length / length * lr


def ratio(now: Tensor, before: Tensor) -> Tensor:
    """now / before, of the rows where before is not zero."""
    top, bottom = now.double().flatten(), before.double().flatten()
    there = bottom != 0
    return top[there] / bottom[there]


def log_bins(values: Tensor) -> tuple[tuple[int, int], ...]:
    """How many numbers lie in each logarithmic bin, as (bin, count): bin b is 10^(b/8) to 10^((b+1)/8).

    Zeros and what is not finite are in no bin.

    >>> log_bins(torch.tensor([1.0, 1.1, 10.0, 0.0]))
    ((0, 2), (8, 1))
    """
    sizes = values.detach().double().abs().flatten()
    sizes = sizes[(sizes > 0) & torch.isfinite(sizes)]
    places = torch.floor(torch.log10(sizes) * BINS_PER_DECADE).long()
    found, counts = torch.unique(places, return_counts=True)
    return tuple(zip(found.tolist(), counts.tolist(), strict=True))
