"""Count, mean and spread per channel, measured piece by piece and merged exactly.

Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", the pairwise update.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Moments"]

_BLOCK = 2**18  # elements widened at a time


@dataclass(frozen=True)
class Moments:
    """Moments of a set of values per channel, in float64 (float32 where the device has no float64).

    Attributes:
        count: values per channel.
        mean: their mean, shape (channels,).
        m2: the sum of their squared distances from the mean, shape (channels,).
        peak: the largest absolute value, shape (channels,).
        eps: relative rounding error of the type the values were stored in.

    >>> halves = [Moments.of(torch.tensor([[1.0], [3.0]]), -1), Moments.of(torch.tensor([[8.0]]), -1)]
    >>> whole = Moments.merged(halves)
    >>> whole.count, whole.mean.item(), round(whole.std.item() ** 2, 6)
    (3, 4.0, 8.666667)
    """

    count: int
    mean: Tensor
    m2: Tensor
    peak: Tensor
    eps: float

    @classmethod
    def of(cls, values: Tensor, axis: int, keep: Tensor | None = None) -> Moments:
        """Moments of a tensor over every axis but `axis`; of the positions where the bool `keep` holds, if given.

        keep: shaped like `values` without `axis`.
        """
        axis %= values.ndim
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        if keep is not None:
            values, axis = values.detach().movedim(axis, -1)[keep], 1
        cube = values.detach().flatten(axis + 1) if axis + 1 < values.ndim else values.detach()[..., None]
        cube = cube.flatten(0, axis - 1) if axis > 0 else cube[None]
        if 0 < cube.numel() <= _BLOCK:
            return cls._of_block(cube, wide)
        nothing = torch.zeros(cube.shape[1], dtype=wide, device=cube.device)
        empty = cls(0, nothing, nothing, nothing, torch.finfo(cube.dtype).eps)
        # blocks that stay in the cache: a copy of the whole in float64 would cost more than the layer itself
        rows = max(1, _BLOCK // max(1, cube[0].numel())) if len(cube) else 1
        blocks = (
            part
            for block in torch.split(cube, rows)
            for part in torch.split(block, max(1, _BLOCK // max(1, len(block) * block.shape[1])), dim=2)
        )
        return cls.merged([empty, *(cls._of_block(block, wide) for block in blocks if block.numel())])

    @classmethod
    def _of_block(cls, block: Tensor, wide: torch.dtype) -> Moments:
        """Of a block (outer, channels, inner)."""
        eps, count = torch.finfo(block.dtype).eps, block.shape[0] * block.shape[2]
        if block.shape[2] == 1:  # one axis at a time: reductions over two that do not touch are several times slower
            block = block[..., 0]
            peak = torch.maximum(block.amax(0), -block.amin(0)).to(wide)
            centred = block.to(wide, copy=True)
            mean = centred.mean(0)
            return cls(count, mean, centred.sub_(mean).square_().sum(0), peak, eps)
        peak = torch.maximum(block.amax(2).amax(0), -block.amin(2).amin(0)).to(wide)
        centred = block.to(wide, copy=True)
        mean = centred.sum(2).sum(0) / count
        return cls(count, mean, centred.sub_(mean[:, None]).square_().sum(2).sum(0), peak, eps)

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
        step = other.mean - self.mean
        share = other.count / count
        return Moments(
            count,
            self.mean + step * share,
            self.m2 + other.m2 + step.square() * (self.count * share),
            torch.maximum(self.peak, other.peak),
            max(self.eps, other.eps),
        )

    def divided(self, by: Tensor) -> Moments:
        """Of the same values, each divided by a positive number, one per channel."""
        by = by.to(self.mean)
        return Moments(self.count, self.mean / by, self.m2 / by.square(), self.peak / by, self.eps)

    @property
    def variance(self) -> Tensor:
        """Population variance per channel, shape (channels,); NaN where there are no values."""
        return self.m2 / self.count if self.count else torch.full_like(self.m2, torch.nan)

    @property
    def std(self) -> Tensor:
        """Population standard deviation per channel, shape (channels,)."""
        return self.variance.sqrt()

    @property
    def constant(self) -> Tensor:
        """Channels whose values differ by no more than their own rounding, bool, shape (channels,)."""
        return self._is_constant(self.std, self.peak)  # type: ignore[no-any-return]

    def _is_constant(self, std: Any, peak: Any) -> Any:
        return std <= 8 * self.eps * peak

    @property
    def finite(self) -> bool:
        """Whether every value was, and none so large that its square is not."""
        return bool(np.isfinite(self.m2.cpu().numpy()).all())

    def channels(self) -> tuple[Any, Any, Any]:
        """`mean`, `std` and `constant` as numpy's arrays, whose operations on so few values cost a fraction of torch's.

        Not for no values at all.
        """
        mean, m2, peak = (t.cpu().numpy() for t in (self.mean, self.m2, self.peak))
        std = np.sqrt(m2 / self.count)
        return mean, std, self._is_constant(std, peak)

    def to(self, device: torch.device | str) -> Moments:
        """The same moments on another device."""
        return Moments(self.count, self.mean.to(device), self.m2.to(device), self.peak.to(device), self.eps)
