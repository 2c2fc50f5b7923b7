"""Count, mean and spread per channel, measured piece by piece and merged exactly.

All sums are in float64, over values that are taken relative to a number near their mean, so that a small deviation
beside a large mean keeps its digits. In a CPU's memory float32 is read once, by compiled kernels; of all else, blocks
that stay in the cache are widened one after the other.

Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", the pairwise update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from wnsurgery import fused
from wnsurgery.channelwise import cube_of, is_taken, sums_of
from wnsurgery.norms import row_products, wide_scratch

__all__ = ["Moments", "clearness"]

_BLOCK = 2**16  # elements widened at a time: 512 KiB of float64, half of what a core's cache holds
_AWAY = 2**24  # the same on other devices, where each block is waited for
_NEAR = 2**18  # elements that are looked at twice while they stay in a core's cache
_OF_16_BITS = (torch.float16, torch.bfloat16)  # float32 holds them exactly
_SHORT = 32  # values in a row below which a row's own sum costs more than its values
_SAMPLE = 8  # one in so many values of the first block tells about where the mean is
_ROUNDING = 8.0  # roundings by which the values of a channel may differ that does not vary
_MARGIN = 2.0**10  # how far beyond that a deviation lies for which the largest value need not be known
_NUMPYS = {torch.float32, torch.float64}  # numpy widens these faster than torch


@dataclass(slots=True)  # not frozen, which makes one three times slower
class Moments:
    """Moments of a set of values per channel, in numpy's float64: operations on so few cost a fraction of torch's.

    Attributes:
        count: values per channel.
        mean: their mean, shape (channels,).
        m2: the sum of their squared distances from the mean, shape (channels,).
        peak: the largest absolute value, shape (channels,); a bound of it, or None, where all channels clearly vary.
        eps: relative rounding error of the type the values were stored in.

    >>> halves = [Moments.of(torch.tensor([[1.0], [3.0]]), -1), Moments.of(torch.tensor([[8.0]]), -1)]
    >>> whole = Moments.merged(halves)
    >>> whole.count, whole.mean.item(), round(whole.std.item() ** 2, 6)
    (3, 4.0, 8.666667)
    """

    count: int
    mean: Any
    m2: Any
    peak: Any
    eps: float

    @classmethod
    def of(cls, values: Tensor, axis: int, keep: Tensor | None = None) -> Moments:
        """Moments of a tensor over every axis but `axis`; of the positions where the bool `keep` holds, if given.

        keep: shaped like `values` without `axis`.
        """
        cube = _cube(values.detach(), axis % values.ndim, keep)
        outer, channels, inner = cube.shape
        count, eps = outer * inner, _eps(cube.dtype)
        if not count * channels:
            nothing = np.zeros(channels)
            return cls(0, nothing, nothing, nothing, eps)
        with np.errstate(all="ignore"):  # what is not finite
            if type(cube) is not Tensor or not cube.is_cpu or cube.is_neg():
                return cls._elsewhere(cube, count, eps)
            if cube.dtype in _OF_16_BITS and fused.start():
                wide = (part.contiguous().float() for part in _parts(cube, _NEAR))
                return cls.merged(cls._by_kernels(part, len(part) * inner, eps) for part in wide)
            return cls._by_kernels(cube, count, eps) if is_taken(cube) else cls._exactly(cube, count, eps)

    @classmethod
    def _by_kernels(cls, cube: Tensor, count: int, eps: float) -> Moments:
        """By compiled kernels."""
        mean, m2, clear = sums_of(cube, clearness(count, eps))
        return cls(count, mean, m2, None if clear else _peak(cube).to(torch.float64).numpy(), eps)

    @classmethod
    def _exactly(cls, cube: Tensor, count: int, eps: float) -> Moments:
        """By sums of float64."""
        pivot, first, second = _sums(cube)
        offset = first / count
        m2 = np.maximum(second - first * offset, 0.0)
        mean = pivot + offset
        bound = _bound(count, mean, m2, eps)
        return cls(count, mean, m2, _peak(cube).to(torch.float64).numpy() if bound is None else bound, eps)

    @classmethod
    def _elsewhere(cls, cube: Tensor, count: int, eps: float) -> Moments:
        """By torch's operations, in float64 (float32 where the device has no float64)."""
        parts = _parts(cube, _AWAY)
        if len(parts) > 1:
            return cls.merged(cls._elsewhere(part, len(part) * cube.shape[2], eps) for part in parts)
        peak = _peak(cube)
        wide = cube.to(torch.float32 if cube.device.type == "mps" else torch.float64, copy=True)
        mean = wide.sum(2).sum(0) / count  # one axis at a time: two that do not touch are several times slower
        m2 = wide.sub_(mean[:, None]).square_().sum(2).sum(0)
        found = torch.stack((mean, m2, peak.to(mean.dtype))).cpu().to(torch.float64)  # waits for the device once
        of_mean, of_m2, of_peak = np.array(found.numpy())
        return cls(count, of_mean, of_m2, of_peak, eps)

    @classmethod
    def merged(cls, parts: Iterable[Moments]) -> Moments:
        """The moments of all parts together, merged in their order; ValueError when there is none."""
        total: Moments | None = None
        for part in parts:
            total = part if total is None else total._with(part)
        if total is None:
            raise ValueError("no moments to merge")
        return total

    def _with(self, other: Moments) -> Moments:
        count = self.count + other.count
        if not self.count or not other.count:
            return other if other.count else self
        with np.errstate(all="ignore"):
            step = other.mean - self.mean
            share = other.count / count
            return Moments(
                count,
                self.mean + step * share,
                self.m2 + other.m2 + step * step * (self.count * share),
                np.maximum(self._peaks, other._peaks),
                max(self.eps, other.eps),
            )

    def divided(self, by: Any) -> Moments:
        """Of the same values, each divided by a positive number, one per channel."""
        peak = None if self.peak is None else self.peak / by
        return Moments(self.count, self.mean / by, self.m2 / (by * by), peak, self.eps)

    @property
    def variance(self) -> Any:
        """Population variance per channel, shape (channels,); NaN where there are no values."""
        return self.m2 / self.count if self.count else np.full_like(self.m2, np.nan)

    @property
    def std(self) -> Any:
        """Population standard deviation per channel, shape (channels,)."""
        return np.sqrt(self.variance)

    @property
    def _peaks(self) -> Any:
        return np.abs(self.mean) + np.sqrt(self.m2) if self.peak is None else self.peak

    @property
    def constant(self) -> Any:
        """Channels whose values differ by no more than their own rounding, bool, shape (channels,); None where there is
        none."""
        if self.peak is None:
            return None
        found = self.std <= _ROUNDING * self.eps * self.peak
        return found if found.any() else None

    @property
    def finite(self) -> bool:
        """Whether every value was, and none so large that its square is not."""
        return self.peak is None or bool(np.isfinite(self.m2).all())


_epsilons: dict[torch.dtype, float] = {}


def _eps(dtype: torch.dtype) -> float:
    found = _epsilons.get(dtype)
    if found is None:
        found = _epsilons[dtype] = torch.finfo(dtype).eps
    return found


def _cube(values: Tensor, axis: int, keep: Tensor | None) -> Tensor:
    """All values to be counted, as (outer, channels, inner)."""
    return cube_of(values, axis) if keep is None else cube_of(values.movedim(axis, -1)[keep], 1)


def _bound(count: int, mean: Any, m2: Any, eps: float) -> Any:
    """A bound of the largest absolute value per channel; None where some deviation is so small that it takes the value.

    No value lies further from the mean than the root of m2, so that this much tells which channels vary.
    """
    root, size = np.sqrt(m2), np.abs(mean)
    return size + root if (root * clearness(count, eps) > size).all() else None


def clearness(count: int, eps: float = 2.0**-23, margin: float = _MARGIN) -> float:
    """How many times the root of m2 a mean may be for the deviation to be beyond rounding, by some margin where other
    values may come to these that dilute it."""
    return 1.0 / (margin * _ROUNDING * eps * math.sqrt(count)) - 1.0


def _peak(cube: Tensor) -> Tensor:
    """The largest absolute value per channel."""
    return torch.stack([part.abs().amax((0, 2)) for part in _parts(cube, _NEAR)]).amax(0)


def _parts(cube: Tensor, elements: int) -> tuple[Tensor, ...]:
    """Parts along the first axis, of about so many elements."""
    return torch.split(cube, max(1, elements // (cube.shape[1] * cube.shape[2])))


# In the CPU's memory -------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """A number near the mean of each channel, and the sums of the distances from it and of their squares.

    The number is the mean of a share p of all values, so that it lies within sqrt(1/p) deviations of their mean: that
    little is what the difference between the sums loses.
    """

    pivot: Any
    first: Any
    second: Any

    def plus(self, other: _Sums) -> _Sums:
        """Of the values of both, which have one pivot."""
        return _Sums(self.pivot, self.first + other.first, self.second + other.second)


def _sums(cube: Tensor) -> _Sums:
    outer, channels, inner = cube.shape
    narrow = np.from_dlpack(cube) if cube.dtype in _NUMPYS else cube  # `.numpy()` would forbid resizing for good
    line = channels * inner
    if outer * line <= _BLOCK:
        return _sums_of(_widened(narrow, (outer, channels, inner)), None)
    rows = max(1, _BLOCK // line)
    width = inner if line <= _BLOCK else max(1, _BLOCK // channels)
    total: _Sums | None = None
    for at in range(0, outer, rows):
        for column in range(0, inner, width):
            part = narrow[at : at + rows, :, column : column + width]
            found = _sums_of(_widened(part, tuple(part.shape)), total and total.pivot)
            total = found if total is None else found.plus(total)
    assert total is not None
    return total


def _widened(values: Any, shape: tuple[int, ...]) -> Any:
    """A block of numpy's or torch's in float64, in memory that serves every block."""
    wide = wide_scratch(math.prod(shape)).reshape(shape)
    if isinstance(values, Tensor):
        torch.from_numpy(wide).copy_(values)
    else:
        np.copyto(wide, values)
    return wide


def _sums_of(block: Any, pivot: Any) -> _Sums:
    """Of one block, which is written to; its own pivot where none is given."""
    rows, channels, inner = block.shape
    if pivot is None:
        pivot = _near_mean(block)
    np.subtract(block, pivot[:, None], out=block)
    if inner == 1 or (rows > 1 and inner < _SHORT):
        first = _over_rows(block)
        return _Sums(pivot, first, _over_rows(np.multiply(block, block, out=block)))
    lines = block.reshape(rows * channels, inner)
    first, squares = np.add.reduce(lines, axis=1), np.empty(rows * channels)
    row_products(lines, lines, squares)
    if rows > 1:
        first, squares = (np.add.reduce(part.reshape(rows, channels), axis=0) for part in (first, squares))
    return _Sums(pivot, first, squares)


def _near_mean(block: Any) -> Any:
    rows, _, inner = block.shape
    if rows > 1 or inner == 1:
        sample = block[: -(-rows // _SAMPLE)]
        return _over_rows(sample) / (len(sample) * inner)
    sample = block[0, :, : -(-inner // _SAMPLE)]
    return np.add.reduce(sample, axis=1) / sample.shape[1]


def _over_rows(block: Any) -> Any:
    """Sums per channel, those over the first axis first."""
    total = np.add.reduce(block, axis=0)
    return total[:, 0] if block.shape[2] == 1 else np.add.reduce(total, axis=1)
