"""How gradients, steps and their squares pass between a weight w and its pair (g, v), at one point (g, v).

With u = v/||v||, a = g/||v|| and P = I - u u^T, a small change of the pair changes the weight by dw = u dg + a P dv.
So a gradient goes from w to the pair by the paper's equation 3, m_g = <m, u> and m_v = a P m, and comes back as
m = u m_g + P m_v / a; a step of w goes over as d_g = <d, u>, d_v = P d / a. For a log-scale magnitude s, dg = g ds.

Source: Salimans & Kingma 2016, equation 3 (arXiv 1602.07868).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wnsurgery.norms import norm, wide_dtype
from wnsurgery.reparam import Axes, Magnitude

__all__ = ["ChainRule"]


@dataclass(frozen=True)
class ChainRule:
    """The linear map between a weight and its pair; all tensors in float64, one row per magnitude.

    Attributes:
        axes: kept axes.
        unit: u, the directions of norm one, as `axes.grouped` views the weight; zero for rows of zeros.
        radial: what multiplies <x, u> on the way to g, one value per row.
        tangential: what multiplies P x on the way to v, one value per row.
        pair_shapes: the shapes of g and v.
    """

    axes: Axes
    unit: Tensor
    radial: Tensor
    tangential: Tensor
    pair_shapes: tuple[torch.Size, torch.Size]

    @classmethod
    def of_gradients(cls, g: Tensor, v: Tensor, axes: Axes, magnitude: Magnitude) -> ChainRule:
        """The map of gradients at the point (g, v)."""
        wide, dims = wide_dtype(v), axes.reduced(v.ndim)
        view = axes.grouped(v.detach())
        norms = norm(view, dims, blocked=True)
        size = g.detach().to(wide).reshape(norms.shape)
        size = size.exp() if magnitude == "log" else size
        inverse = _inverse(norms)
        radial = size if magnitude == "log" else torch.ones_like(size)
        return cls(axes, view.to(wide) * inverse, radial, size * inverse, (g.shape, v.shape))

    def of_steps(self) -> ChainRule:
        """The map of steps at the same point, such that a step of the pair moves the weight by the step of w."""
        return ChainRule(self.axes, self.unit, _inverse(self.radial), _inverse(self.tangential), self.pair_shapes)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What belongs to w, shared out to g and v."""
        x = self._rows(x)
        along = self._sum(x * self.unit)
        return self._as_pair(self.radial * along, self.tangential * (x - along * self.unit))

    def join(self, for_g: Tensor | None, for_v: Tensor | None) -> Tensor:
        """What belongs to g and v, as it belongs to w; None stands for zero.

        A row with g = 0 has no way back from v: its tangential part is zero.
        """
        total = torch.zeros_like(self.unit)
        if for_g is not None:
            total = total + self._per_row(for_g) * _inverse(self.radial) * self.unit
        if for_v is not None:
            x = self._rows(for_v)
            total = total + _inverse(self.tangential) * (x - self._sum(x * self.unit) * self.unit)
        return total.reshape(self.pair_shapes[1])

    def split_squares(self, s: Tensor, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Second moments of what `split` gives, for elements of x uncorrelated about their mean.

        For g: sum u_i^2 var_i + mean_g^2; for v: a^2 (var_i (1 - u_i^2)^2 + u_i^2 sum_{j != i} u_j^2 var_j) + mean_v^2.
        Exact where x does not vary; a mean larger than its second moment allows is cut back to it.
        """
        s = self._rows(s)
        mean = self._bounded(mean, s)
        spread = s - mean.square()
        u2 = self.unit.square()
        along = self._sum(u2 * spread)
        across = spread * (1 - u2).square() + u2 * (along - u2 * spread).clamp(min=0)
        mean_g, mean_v = self.split(mean.reshape(self.pair_shapes[1]))
        for_g, for_v = self._as_pair(self.radial.square() * along, self.tangential.square() * across)
        return for_g + mean_g.square(), for_v + mean_v.square()

    def join_squares(
        self, s_g: Tensor | None, s_v: Tensor | None, mean_g: Tensor | None = None, mean_v: Tensor | None = None
    ) -> Tensor:
        """Second moments of what `join` gives, for parts of g and v uncorrelated about their means."""
        total = torch.zeros_like(self.unit)
        if s_g is not None:
            s = self._per_row(s_g)
            middle = self._bounded_row(mean_g, s)
            total = total + (s - middle.square()) * (_inverse(self.radial) * self.unit).square()
            mean_g = middle.reshape(self.pair_shapes[0])
        if s_v is not None:
            s = self._rows(s_v)
            middle = self._bounded(mean_v, s)
            total = total + (s - middle.square()) * _inverse(self.tangential).square()
            mean_v = middle.reshape(self.pair_shapes[1])
        mean = self.join(mean_g if s_g is not None else None, mean_v if s_v is not None else None)
        return total.reshape(self.pair_shapes[1]) + mean.square()

    def _rows(self, x: Tensor) -> Tensor:
        return self.axes.grouped(x.detach().to(self.unit.device, self.unit.dtype))

    def _per_row(self, x: Tensor) -> Tensor:
        return x.detach().to(self.unit.device, self.unit.dtype).reshape(self.radial.shape)

    def _sum(self, x: Tensor) -> Tensor:
        dims = self.axes.reduced(len(self.pair_shapes[1]))
        return x.sum(dims, keepdim=True) if dims else x

    def _as_pair(self, for_g: Tensor, for_v: Tensor) -> tuple[Tensor, Tensor]:
        return for_g.reshape(self.pair_shapes[0]), for_v.reshape(self.pair_shapes[1])

    def _bounded(self, mean: Tensor | None, s: Tensor) -> Tensor:
        return torch.zeros_like(s) if mean is None else _within(self._rows(mean), s)

    def _bounded_row(self, mean: Tensor | None, s: Tensor) -> Tensor:
        return torch.zeros_like(s) if mean is None else _within(self._per_row(mean), s)


def _within(mean: Tensor, s: Tensor) -> Tensor:
    """A mean no larger than the root of its second moment."""
    limit = s.clamp(min=0).sqrt()
    return torch.maximum(torch.minimum(mean, limit), -limit)


def _inverse(x: Tensor) -> Tensor:
    """1/x, zero where that is not finite."""
    quotient = x.reciprocal()
    return torch.where(torch.isfinite(quotient), quotient, torch.zeros_like(quotient))
