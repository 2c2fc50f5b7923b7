"""How far a folded weight is from g * v / ||v||, computed once more, independently, in plain float64.

The recomputation shares no code with `compose`: it squares, sums and divides block by block in float64 (in the
platform's long double for float64 weights) and counts the difference in units in the last place of the weight's
own type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wnsurgery.reparam import Axes

__all__ = ["Proof", "ulps_apart"]

Array = NDArray[Any]

_BLOCK = 1 << 17  # elements: 1 MiB of float64, which stays in a core's cache
_DIGITS = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
_LEAST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
_EXPONENT = 0x7FF0000000000000


@dataclass(frozen=True)
class Proof:
    """The figures a file operation ends with.

    Attributes:
        pairs: weight-norm pairs in the input.
        left: pairs that stay as they are.
        axes: how many of the changed weights have which kept axes, as ("kept 0 of 3", count).
        max_ulp: largest distance of a folded weight from the float64 recomputation, None where nothing was folded
            or converted; `worst` names the weight.
        bytes_in, bytes_out: sizes of the input and of the output (0 where nothing was written).
        seconds: how long it took.
        output: what was written ("" where nothing was).
    """

    pairs: int = 0
    left: int = 0
    axes: tuple[tuple[str, int], ...] = ()
    max_ulp: float | None = None
    worst: str = ""
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    output: str = ""

    @property
    def rate(self) -> float:
        """Megabytes of input per second."""
        return self.bytes_in / 1e6 / self.seconds if self.seconds else 0.0


def ulps_apart(w: Tensor, g: Tensor, v: Tensor, axes: Axes, *, log: bool = False) -> float:
    """The largest |w - g v / ||v||| in units in the last place of w's type; elements not finite must agree.

    >>> ulps_apart(torch.tensor([[6.0, 8.0]]), torch.tensor([[10.0]]), torch.tensor([[3.0, 4.0]]), Axes((0,)))
    0.0

    Args:
        w: the weight to judge, float64, float32, bfloat16 or float16.
        g, v, axes: the pair it came from.
        log: whether g is stored as its logarithm.

    A row with v = 0 counts as right whatever it is: what it becomes is a choice.
    """
    if not v.numel():
        return 0.0
    w, g, v = (t.detach().resolve_neg() for t in (w, g, v))  # of a tensor that is lazily negated numpy makes no array
    w, v, size = axes.grouped(w), axes.grouped(v), g.double()
    rows = size.unsqueeze(1) if axes.groups > 1 else _beside(size, axes, v)
    dims = axes.reduced(v.ndim - (axes.groups > 1))
    if v.dtype == torch.float64:
        return _float64_apart(w.numpy(), rows.numpy(), v.numpy(), dims, log)
    rows = rows.exp() if log else rows
    rooms = _Rooms(min(v.numel(), _BLOCK))
    total = torch.zeros(rows.shape, dtype=torch.float64)
    for part in _blocks(v.shape):
        squares = rooms.fill(0, v[part]).square_()
        total[_in_rows(part, rows.shape)] += squares.sum(dims, keepdim=True) if dims else squares
    norm = total.sqrt_()
    factor = torch.where(norm == 0, 0.0, rows / norm)
    worst = 0.0
    for part in _blocks(v.shape):
        kept = _in_rows(part, rows.shape)
        exact = rooms.fill(0, v[part]).mul_(factor[kept])
        worst = max(worst, _distance(w[part], exact, norm[kept] == 0, rooms))
    return worst


class _Rooms:
    """Three blocks of float64 memory, used again and again: fresh pages would cost more than the arithmetic."""

    def __init__(self, size: int) -> None:
        self.blocks = [torch.empty(size, dtype=torch.float64) for _ in range(3)]

    def shaped(self, index: int, like: Tensor) -> Tensor:
        return self.blocks[index][: like.numel()].view(like.shape)

    def fill(self, index: int, values: Tensor) -> Tensor:
        """The values in float64."""
        return self.shaped(index, values).copy_(values)


def _float64_apart(w: Array, rows: Array, v: Array, dims: tuple[int, ...], log: bool) -> float:
    """The same for float64, in the longest floating-point type the platform has."""
    with np.errstate(all="ignore"):
        size = np.exp(rows.astype(np.longdouble)) if log else rows.astype(np.longdouble)
        total = np.zeros(rows.shape, np.longdouble)
        for part in _blocks(v.shape):
            total[_in_rows(part, rows.shape)] += (v[part].astype(np.longdouble) ** 2).sum(dims, keepdims=True)
        norm = np.sqrt(total)
        factor, worst = size / norm, 0.0
        for part in _blocks(v.shape):
            kept = _in_rows(part, rows.shape)
            exact, got = v[part].astype(np.longdouble) * factor[kept], w[part]
            nearest = exact.astype(np.float64)
            apart = np.abs(got - exact) / np.spacing(np.minimum(np.abs(nearest), np.finfo(np.float64).max))
            agree = (got == nearest) & ~np.isfinite(got) | (np.isnan(got) & np.isnan(nearest)) | (norm[kept] == 0)
            apart = np.where(agree, 0.0, np.nan_to_num(apart, nan=np.inf))
            worst = max(worst, float(apart.max()))
    return worst


def _beside(size: Tensor, axes: Axes, v: Tensor) -> Tensor:
    return size.reshape([n if d in axes.kept else 1 for d, n in enumerate(v.shape)])


def _distance(w: Tensor, exact: Tensor, free: Tensor, rooms: _Rooms) -> float:
    apart, unit = rooms.fill(1, w).sub_(exact).abs_(), rooms.shaped(2, exact)
    torch.bitwise_and(exact.view(torch.int64), _EXPONENT, out=unit.view(torch.int64))
    unit.mul_(2.0 ** -_DIGITS[w.dtype]).clamp_(min=_LEAST[w.dtype])
    apart.div_(unit)
    worst = apart.max().item()
    if math.isfinite(worst):
        return worst
    limit = torch.finfo(w.dtype).max
    agree = (
        (w == exact) | (w.isnan() & exact.isnan()) | (w.isinf() & (exact.abs() >= limit) & (w.sign() == exact.sign()))
    )
    apart = torch.where(agree | free.expand_as(apart), 0.0, apart.nan_to_num(nan=float("inf")))
    return apart.max().item()


def _blocks(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Parts of a tensor of about `_BLOCK` elements: slices along the first axes, as few as will do."""
    inner = 1
    axis = len(shape)
    while axis and inner * shape[axis - 1] <= _BLOCK:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        yield tuple(slice(None) for _ in shape)
        return
    step = max(1, _BLOCK // inner)
    tail = tuple(slice(None) for _ in shape[axis:])
    outer = [()] if axis == 1 else [tuple(slice(i, i + 1) for i in at) for at in _indices(shape[: axis - 1])]
    for head in outer:
        for start in range(0, shape[axis - 1], step):
            yield (*head, slice(start, start + step), *tail)


def _indices(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    if not shape:
        yield ()
        return
    for first in range(shape[0]):
        for rest in _indices(shape[1:]):
            yield (first, *rest)


def _in_rows(part: tuple[slice, ...], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(None) if size == 1 else at for at, size in zip(part, shape, strict=True))
