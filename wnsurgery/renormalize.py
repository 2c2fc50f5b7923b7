"""Keeping directions healthy: ||v|| only grows under plain gradient steps; bring it back, or hold it at one.

Since dL/dv stands at right angles to v, every gradient step makes v longer (Salimans & Kingma 2016, section 2.1),
which shrinks the effective step, about lr / ||v||^2 for SGD and lr / ||v|| for Adam. The function depends on v / ||v||
alone, so v may be rescaled at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from wnsurgery.after_step import StepHandle
from wnsurgery.dtensors import placed_like
from wnsurgery.errors import NonFiniteWeightError, SelectionError
from wnsurgery.following import Optimizers, as_optimizers, rescale_state, warn_if_left_behind
from wnsurgery.pairs import Pair, pairs
from wnsurgery.plan import Pattern
from wnsurgery.text import columns

__all__ = ["RenormReport", "Renormalized", "keep_unit_norm", "renormalize_"]


@dataclass(frozen=True)
class Renormalized:
    """What happened to one weight: rows in all, rows rescaled, rows left alone to keep their bits, and the largest
    ||v|| / aim before, where it was aimed at anything."""

    name: str
    rows: int
    rescaled: int
    kept: int
    growth: float


@dataclass(frozen=True)
class RenormReport:
    """What `renormalize_` did; prints as a table.

    Attributes:
        weights: one entry per weight, ties once.

    >>> model = wn.apply_weight_norm(nn.Linear(4, 3))
    >>> _ = model.parametrizations.weight.original1.data.mul_(8)
    >>> report = wn.renormalize_(model)
    >>> report.rescaled, round(report.growth)
    (3, 8)
    """

    weights: tuple[Renormalized, ...]

    @property
    def rescaled(self) -> int:
        """Rows rescaled, over all weights."""
        return sum(w.rescaled for w in self.weights)

    @property
    def growth(self) -> float:
        """The largest ||v|| / aim there was before."""
        return max((w.growth for w in self.weights), default=0.0)

    def __str__(self) -> str:
        head = f"{self.rescaled} of {sum(w.rows for w in self.weights)} rows rescaled"
        rows = [("weight", "rows", "rescaled", "left alone", "largest ||v|| / aim before")]
        rows += [(w.name, str(w.rows), str(w.rescaled), str(w.kept), f"{w.growth:.3g}") for w in self.weights]
        return "\n".join([head, *columns(rows)])


def renormalize_(
    model: nn.Module,
    to: Literal["magnitude", "unit"] = "magnitude",
    *,
    exact: bool = False,
    include: Pattern | None = None,
    exclude: Pattern | None = None,
    optimizer: Optimizers | None = None,
) -> RenormReport:
    """Rescale the directions v to norm |g| or 1 without changing the function, in place.

    By default every row of v is multiplied by a power of two, which brings its norm within a factor sqrt(2) of the aim
    and changes no bit of any weight; each is compared, before and after. A row is left alone, or scaled
    less, where full scaling would lose bits (subnormal numbers, extreme rows). Rows of zeros, rows with g = 0 when the
    aim is |g|, and weights on the meta device stay as they are. Ours, torch's and torch's legacy weight norm are
    served; gradients accumulated in v are scaled along.

    >>> model = wn.apply_weight_norm(nn.Linear(3, 2))
    >>> w = model.weight.clone()
    >>> report = wn.renormalize_(model, "unit")
    >>> torch.equal(model.weight, w), report.weights[0].rows
    (True, 2)

    From the next step on, the effective step is larger where v got shorter: for v' = c v by 1/c^2 with SGD, by 1/c
    with Adam. That is the purpose on long runs; lower the learning rate of v if it is not yours.

    Args:
        model: a module tree under weight norm.
        to: "magnitude" aims at ||v|| = |g| (then v is about w, as just after conversion), "unit" at 1.
        exact: reach the aim to rounding; the weights then change by rounding too.
        include, exclude: patterns as in `plan_weight_norm`.
        optimizer: one or several whose state is scaled along: averages of gradients by 1/c, of their squares by 1/c^2.

    Raises SelectionError (nothing selected, `to` unknown, LBFGS) and NonFiniteWeightError (v holds NaN or infinity).
    """
    if to not in ("magnitude", "unit"):
        raise SelectionError(f'to must be "magnitude" or "unit", not {to!r}')
    optimizers = as_optimizers(optimizer)
    chosen = _once_per_direction(pairs(model, include, exclude))
    warn_if_left_behind(model, optimizers, (half for pair in chosen for half in (pair.v, pair.g)))
    done: list[Renormalized] = []
    factors: list[tuple[nn.Parameter, Tensor]] = []
    directions: list[Tensor] = []
    with torch.inference_mode(False), torch.no_grad():
        for pair in chosen:
            if pair.is_meta:
                continue
            whole = pair.whole()
            _check_finite(whole)
            factor, growth = _wanted(whole, to)
            v, factor, kept = _exactly(whole, factor) if exact else _keeping_bits(whole, factor)
            rescaled = int((factor != 1).sum())
            done.append(Renormalized(pair.fqn, factor.numel(), rescaled, kept, growth))
            if rescaled:
                factors.append((pair.v, placed_like(whole.spread(factor), pair.v, whole=True)))
                directions.append(placed_like(v, pair.v))
        rescale_state(optimizers, factors)()
        for (parameter, _), direction in zip(factors, directions, strict=True):
            parameter.copy_(direction)
    return RenormReport(tuple(done))


def keep_unit_norm(
    model: nn.Module,
    optimizer: Optimizers,
    *,
    include: Pattern | None = None,
    exclude: Pattern | None = None,
) -> StepHandle:
    """Hold every row of v at norm one: now, and after each step of the optimizer, until the handle is removed.

    The projection of EDM2 ("forced weight normalization", Karras et al. 2023, arXiv 2312.02696, section 2.3). The
    function is kept to rounding; what changes is training: with ||v|| = 1 the effective step on the direction no longer
    decays as v grows: the learning rate alone sets it. Optimizer state is scaled along with the first projection and
    left alone by those after steps, where ||v|| has hardly moved. Rows of zeros and frozen v stay. A row of norm one to
    rounding is not touched, so that training resumes from a checkpoint in the same bits: load, then call this again.
    Remove the handle before folding.

    >>> model = wn.apply_weight_norm(nn.Linear(3, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with wn.keep_unit_norm(model, optimizer):
    ...     model(torch.ones(1, 3)).sum().backward()
    ...     optimizer.step()
    >>> v = model.parametrizations.weight.original1
    >>> torch.allclose(v.norm(dim=1), torch.ones(2))
    True

    Args:
        model: a module tree under weight norm; converted before this call.
        optimizer: one or several; the projection follows each one's step.
        include, exclude: patterns as in `plan_weight_norm`.

    Returns a handle with `remove()`, also a context manager. Raises as `renormalize_`.
    """
    optimizers = as_optimizers(optimizer)
    chosen = [p for p in _once_per_direction(pairs(model, include, exclude)) if p.v.requires_grad and not p.is_meta]
    if not optimizers:
        raise SelectionError("keep_unit_norm needs the optimizer whose steps it follows")
    warn_if_left_behind(model, optimizers, (half for pair in chosen for half in (pair.v, pair.g)))
    _project(chosen, optimizers)
    return StepHandle(optimizers, lambda: _project(chosen, ()))


def _project(chosen: list[Pair], optimizers: tuple[torch.optim.Optimizer, ...]) -> None:
    factors: list[tuple[nn.Parameter, Tensor]] = []
    with torch.inference_mode(False), torch.no_grad():
        for pair in chosen:
            whole = pair.whole()
            norms = whole.norms()
            slack = 2 * torch.finfo(pair.v.dtype).eps  # rounding v moves its norm by half an eps at most
            moved = ((norms - 1).abs() > slack) & torch.isfinite(norms) & torch.isfinite(norms.reciprocal())
            if bool(moved.any()):
                factor = torch.where(moved, norms.reciprocal(), torch.ones_like(norms))
                v, factor, _ = _exactly(whole, factor)
                if optimizers:
                    factors.append((pair.v, placed_like(whole.spread(factor), pair.v, whole=True)))
                pair.v.copy_(placed_like(v, pair.v))
        rescale_state(optimizers, factors)()


# One weight ----------------------------------------------------------------------------------------------


def _once_per_direction(found: list[Pair]) -> list[Pair]:
    """Pairs with a v of their own; where several share one v under different g, the first sets the aim."""
    return list({id(pair.v): pair for pair in reversed(found)}.values())[::-1]


def _check_finite(pair: Pair) -> None:
    if not bool(torch.isfinite(pair.v).all()):
        raise NonFiniteWeightError(f"{pair.fqn}: its direction holds NaN or infinity")


def _wanted(pair: Pair, to: str) -> tuple[Tensor, float]:
    """aim / ||v|| per row, one where there is nothing to aim at; and the largest ||v|| / aim."""
    norms = pair.norms()
    aim = pair.size() if to == "magnitude" else torch.ones_like(norms)
    factor = aim / norms
    usable = torch.isfinite(factor) & (factor > 0)
    factor = torch.where(usable, factor, torch.ones_like(factor))
    growth = float(factor[usable].reciprocal().max()) if bool(usable.any()) else 0.0
    return factor, growth


def _exactly(pair: Pair, factor: Tensor) -> tuple[Tensor, Tensor, int]:
    """The rescaled direction, the factors used, the rows left alone."""
    v = (pair.v.to(factor.dtype) * pair.spread(factor)).to(pair.v.dtype)
    return v, factor, 0


def _keeping_bits(pair: Pair, factor: Tensor) -> tuple[Tensor, Tensor, int]:
    """The same with factors that are powers of two and change no bit of the weight."""
    wished = factor.log2().round().clamp(-1000, 1000)
    exponent = _lossless(pair, wished)
    before = pair.weight(pair.v)
    v = _scaled(pair, exponent)
    same = pair.axes.grouped(_same(pair.weight(v), before))
    dims = pair.axes.reduced(pair.v.ndim)
    differs = ~_all(same, dims)
    if bool(differs.any()):
        exponent = torch.where(differs, torch.zeros_like(exponent), exponent)
        v = _scaled(pair, exponent)
        if not bool(_same(pair.weight(v), before).all()):  # rows are not independent in this arithmetic
            exponent = torch.zeros_like(exponent)
    kept = int((exponent != wished).sum())
    return _scaled(pair, exponent), exponent.exp2(), kept


def _all(same: Tensor, dims: tuple[int, ...]) -> Tensor:
    for d in dims:
        same = same.all(dim=d, keepdim=True)
    return same


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) & (torch.signbit(a) == torch.signbit(b))


def _scaled(pair: Pair, exponent: Tensor) -> Tensor:
    """v * 2^exponent, in two steps so that no power of two leaves its type."""
    half = torch.div(exponent, 2, rounding_mode="trunc")
    v = pair.v.to(exponent.dtype)
    v = v * pair.spread(half.exp2()) * pair.spread((exponent - half).exp2())
    return v.to(pair.v.dtype)


def _lossless(pair: Pair, exponent: Tensor) -> Tensor:
    """The exponents, cut back towards zero in rows where scaling back would not return every bit of v."""
    if bool(_returns(pair, exponent).all()):
        return exponent
    kind = torch.finfo(pair.v.dtype)
    size = pair.axes.grouped(pair.v).abs().to(exponent.dtype)
    dims = pair.axes.reduced(pair.v.ndim)
    smallest = torch.where(size > 0, size, torch.full_like(size, torch.inf))
    low, high = (smallest.amin(dims, True), size.amax(dims, True)) if dims else (smallest, size)
    down = (kind.tiny / low).log2().ceil().clamp(max=0)
    up = (kind.max / high).log2().floor().sub(1).clamp(min=0)
    less = torch.where(torch.isfinite(up + down), exponent.clamp(down, up), torch.zeros_like(exponent))
    exponent = torch.where(_returns(pair, exponent), exponent, less)
    return torch.where(_returns(pair, exponent), exponent, torch.zeros_like(exponent))


def _returns(pair: Pair, exponent: Tensor) -> Tensor:
    """Whether v * 2^e * 2^-e is v, row by row."""
    half = torch.div(exponent, 2, rounding_mode="trunc")
    back = _scaled(pair, exponent).to(exponent.dtype)
    back = back * pair.spread((-half).exp2()) * pair.spread((half - exponent).exp2())
    return _all(pair.axes.grouped(back == pair.v), pair.axes.reduced(pair.v.ndim))
