"""Control of the magnitudes: freeze and thaw g, clamp it once or after every step, train it or its logarithm."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from wnsurgery.after_step import StepHandle
from wnsurgery.errors import SelectionError
from wnsurgery.following import Optimizers, as_optimizers, warn_if_left_behind
from wnsurgery.pairs import Pair, pairs
from wnsurgery.plan import Pattern
from wnsurgery.reparam import ZERO_LOG, magnitude_dtype_for

__all__ = ["clamp_magnitude_", "freeze_magnitude", "keep_magnitude_within", "unfreeze_magnitude"]

M = TypeVar("M", bound=nn.Module)


def freeze_magnitude(
    model: M,
    *,
    at: Literal["current", "unit"] | float = "current",
    include: Pattern | None = None,
    exclude: Pattern | None = None,
) -> M:
    """Stop training g: at its present values, at one, or at any number; in place, returns the model.

    "current" keeps the function and the learned scale. "unit" sets every g to one, as the last layer of a DINO head has
    it, and a number to that number: both change the function. A gradient waiting in g is dropped; an optimizer may
    go on holding g and skips it. Which g are frozen is not part of a state dict: freeze the fresh model too before
    resuming.

    >>> model = wn.freeze_magnitude(wn.apply_weight_norm(nn.Linear(3, 2)), at="unit")
    >>> g = model.parametrizations.weight.original0
    >>> g.requires_grad, g.flatten().tolist()
    (False, [1.0, 1.0])

    Args:
        model: a module tree under weight norm: ours, torch's or torch's legacy one.
        at: "current", "unit", or a positive number.
        include, exclude: patterns as in `plan_weight_norm`.

    Raises SelectionError when nothing is selected or `at` is none of these, or beyond what some g can be.
    """
    value = {"current": None, "unit": 1.0}.get(at, math.nan) if isinstance(at, str) else _number(at)
    if value is not None and not 0 < value < math.inf:
        raise SelectionError(f'at must be "current", "unit" or a positive number, not {at!r}')
    chosen = pairs(model, include, exclude)
    if value is not None:
        _refuse_beyond(chosen, "at", value)
    with torch.inference_mode(False), torch.no_grad():
        for pair in chosen:
            if value is not None:
                pair.g.fill_(math.log(value) if pair.magnitude == "log" else value)
            pair.g.requires_grad_(False)
            pair.g.grad = None
    return model


def unfreeze_magnitude(model: M, *, include: Pattern | None = None, exclude: Pattern | None = None) -> M:
    """Train g again, in place, where v is trained; a weight frozen as a whole stays frozen. Returns the model.

    The optimizer must hold g: one that followed the conversion does; `stale_parameters` tells. torch's fused SGD with
    momentum fails at any parameter that comes later than others of its group: thaw before its first step, or hand it
    over to an `apply_weight_norm(freeze_magnitude=True)` in the middle of training.

    >>> model = wn.apply_weight_norm(nn.Linear(3, 2), freeze_magnitude=True)
    >>> wn.unfreeze_magnitude(model).parametrizations.weight.original0.requires_grad
    True

    Args:
        model: a module tree under weight norm.
        include, exclude: patterns as in `plan_weight_norm`.

    Raises SelectionError when nothing is selected.
    """
    for pair in pairs(model, include, exclude):
        if pair.v.requires_grad:
            pair.g.requires_grad_(True)
    return model


def clamp_magnitude_(
    model: M,
    min: float | None = None,
    max: float | None = None,
    *,
    include: Pattern | None = None,
    exclude: Pattern | None = None,
) -> M:
    """Bring |g| of every row into [min, max], once and in place; the sign of g stays. Returns the model.

    A log-scale magnitude is held in [log min, log max], so the bounds hold to
    rounding. g = 0 becomes +min. Frozen magnitudes are clamped too.

    >>> model = wn.clamp_magnitude_(wn.apply_weight_norm(nn.Linear(3, 2)), max=0.25)
    >>> bool((model.weight.norm(dim=1) < 0.2501).all())
    True

    Args:
        model: a module tree under weight norm.
        min, max: bounds of |g|, 0 or more; None leaves that side open. One of them must be given.
        include, exclude: patterns as in `plan_weight_norm`.

    Raises SelectionError when no bound is given, a bound is negative, min exceeds max, a bound is beyond what some g
    can be (but for a max that none can reach), or nothing is selected.
    """
    bounds = _bounds(min, max)
    chosen = pairs(model, include, exclude)
    _refuse_bounds(chosen, bounds)
    _clamp(chosen, bounds)
    return model


def keep_magnitude_within(
    model: nn.Module,
    optimizer: Optimizers,
    min: float | None = None,
    max: float | None = None,
    *,
    include: Pattern | None = None,
    exclude: Pattern | None = None,
) -> StepHandle:
    """`clamp_magnitude_` now and after each step of the optimizer, until the handle is removed.

    Optimizer state is left alone: momentum may go on pushing against the bound. A value within the bounds is not
    touched, so that training resumes from a checkpoint in the same bits: load, then call this again. Remove the handle
    before folding.

    >>> model = wn.apply_weight_norm(nn.Linear(3, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    >>> with wn.keep_magnitude_within(model, optimizer, max=1.0):
    ...     model(torch.ones(1, 3)).sum().backward()
    ...     optimizer.step()
    >>> bool((model.parametrizations.weight.original0.abs() <= 1).all())
    True

    Args:
        model: a module tree under weight norm; converted before this call.
        optimizer: one or several; the bounds are restored after each one's step.
        min, max: as of `clamp_magnitude_`.
        include, exclude: patterns as in `plan_weight_norm`.

    Returns a handle with `remove()`, also a context manager. Raises as `clamp_magnitude_`, and for LBFGS.
    """
    bounds = _bounds(min, max)
    optimizers = as_optimizers(optimizer)
    if not optimizers:
        raise SelectionError("keep_magnitude_within needs the optimizer whose steps it follows")
    chosen = pairs(model, include, exclude)
    _refuse_bounds(chosen, bounds)
    warn_if_left_behind(model, optimizers, (half for pair in chosen for half in (pair.g, pair.v)))
    _clamp(chosen, bounds)
    return StepHandle(optimizers, lambda: _clamp(chosen, bounds))


def _bounds(low: float | None, high: float | None) -> tuple[float, float]:
    if low is None and high is None:
        raise SelectionError("give min, max or both")
    bounds = (0.0 if low is None else _number(low), math.inf if high is None else _number(high))
    if not 0 <= bounds[0] <= bounds[1] or bounds[0] == math.inf:
        raise SelectionError(f"0 <= min <= max does not hold for finite numbers min={low!r}, max={high!r}")
    return bounds


def _number(value: Any) -> float:
    """A number that somebody gave; NaN, which passes no comparison, for what is none."""
    try:
        return math.nan if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _refuse_bounds(chosen: list[Pair], bounds: tuple[float, float]) -> None:
    """SelectionError for bounds that no g of some type can have; a max beyond all of them bounds nothing."""
    _refuse_beyond(chosen, "min", bounds[0])
    if bounds[1] < 1:
        _refuse_beyond(chosen, "max", bounds[1])


def _refuse_beyond(chosen: list[Pair], name: str, size: float) -> None:
    """SelectionError where a magnitude of this size is infinite in the type of a g, or positive and 0 there."""
    for pair in chosen:
        kind = magnitude_dtype_for(pair.v.dtype) if pair.magnitude == "log" else pair.g.dtype
        held = float(torch.tensor(size, dtype=torch.float64).to(kind))
        if held == math.inf or (held == 0 and size > 0):
            raise SelectionError(
                f"{pair.fqn}: {name}={size:.6g} is beyond its type, {str(kind).removeprefix('torch.')}"
            )


def _clamp(chosen: list[Pair], bounds: tuple[float, float]) -> None:
    low, high = bounds
    with torch.inference_mode(False), torch.no_grad():
        for pair in chosen:
            g: Tensor = pair.g
            if pair.magnitude == "log":
                g.clamp_(math.log(low) if low else -math.inf, math.log(high) if high else ZERO_LOG)
            else:
                most = torch.finfo(g.dtype).max
                g.copy_(torch.where(g < 0, -1.0, 1.0).to(g.dtype) * g.abs().clamp(low, high if high < most else None))
