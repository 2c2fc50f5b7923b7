"""The mathematics of weight normalization: w = g * v / ||v||, both ways, with the paper's gradients.

One `decompose` (w -> g, v) and one `compose` (g, v -> w) serve modules, files and graphs alike.

Source: Salimans & Kingma 2016, "Weight Normalization", equations 2 and 3 (arXiv 1602.07868).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from wnsurgery import fused, other_types
from wnsurgery.compiled import compose_compiled, is_for_compiler
from wnsurgery.dtensors import count_not_finite, is_spread, local_rows, spread_over
from wnsurgery.errors import NonFiniteWeightError, PairError, SelectionError
from wnsurgery.kept import LARGE, Rooms
from wnsurgery.lean_modules import LeanModule, blank_module, shared_by_copies
from wnsurgery.norms import (
    RowScale,
    norm,
    plain_scale,
    row_peak,
    row_products,
    row_scale,
    snapped_quotient,
    stored_magnitude,
    wide_dtype,
)
from wnsurgery.onlookers import is_intercepted
from wnsurgery.ownership import counted, is_private
from wnsurgery.ownership import prepare as prepare_counts

__all__ = ["Axes", "Magnitude", "Ready", "WeightNorm", "compose", "decompose", "magnitude_dtype_for"]

Magnitude = Literal["linear", "log"]

_FRESH = 1 << 23  # elements from which the allocator gives fresh pages each time, which cost more than a pass
_BY_TORCH = 3 << 15  # elements up to which torch's own node costs less, though it makes a weight of its own first
_NODE_TYPES = (torch.float32, torch.float64)
_WIDENED = 1 << 18  # elements widened at a time
_BLOCK = 1 << 19  # elements a block of the backward pass has: few enough for a core's cache, enough for its calls

ZERO_LOG = -1000.0  # e^-1000 is 0 in float64: the logarithm stored for a row of zeros


@shared_by_copies
@dataclass(frozen=True)
class Axes:
    """Which axes of a weight index its outputs (*kept*); a norm is taken over all the others.

    `groups > 1` is the grouped transposed convolution, weight (in, out/groups, k...): axis 0 is `groups`
    blocks of inputs and an output channel is one (block, axis-1 index).

    >>> wn.Axes((0,)).magnitude_shape((8, 3, 5))
    (8, 1, 1)
    >>> wn.Axes((1,), groups=2).magnitude_shape((8, 3, 5))
    (2, 3, 1)
    """

    kept: tuple[int, ...]
    groups: int = 1

    def magnitude_shape(self, weight_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of g for a weight of this shape: size 1 on reduced axes, 0-d when no axis is kept."""
        if self.groups > 1:
            return (self.groups, *(s if d in self.kept else 1 for d, s in enumerate(weight_shape) if d))
        if not self.kept:
            return ()
        return tuple(s if d in self.kept else 1 for d, s in enumerate(weight_shape))

    def reduced(self, ndim: int) -> tuple[int, ...]:
        """The axes a norm sums over, of the weight as `grouped` views it."""
        if self.groups > 1:
            return (1, *(d + 1 for d in range(1, ndim) if d not in self.kept))
        return tuple(d for d in range(ndim) if d not in self.kept)

    def grouped(self, weight: Tensor) -> Tensor:
        """The weight with axis 0 split into (groups, in/groups), or the weight itself."""
        return weight.reshape(self.groups, -1, *weight.shape[1:]) if self.groups > 1 else weight

    def spread(self, per_row: Tensor, weight: Tensor) -> Tensor:
        """A tensor with one value per row, shaped to broadcast against the weight."""
        if self.groups == 1:
            return per_row
        blocks = weight.shape[0] // self.groups
        return per_row.expand(-1, blocks, *per_row.shape[2:]).flatten(0, 1)

    def fit(self, g: Tensor, v: Tensor) -> bool:
        """Whether g has the shape of a magnitude for v; remembered, for use in eager mode."""
        return _known_to_fit(g.shape, v.shape, self.kept, self.groups)

    def fault(self, weight_shape: Sequence[int]) -> str:
        """Why a weight of this shape is left alone, "" if it is not. Along several axes a g of the shape of v is no
        norm, and in a file only its name would tell it from v.

        >>> wn.Axes((0, 1)).fault((3, 4)), wn.Axes((0,)).fault((3, 1))
        ('each element would be a row of its own, without a direction', '')
        """
        several = sum(size != 1 for size in weight_shape) > 1
        elementwise = several and self.magnitude_shape(weight_shape) == tuple(weight_shape)
        return "each element would be a row of its own, without a direction" if elementwise else ""

    def check(self, weight_shape: Sequence[int]) -> Axes:
        """The same axes, non-negative and checked against a weight's shape; PairError where they do not fit."""
        return _checked(self, tuple(weight_shape))

    @classmethod
    def of_pair(cls, g_shape: Sequence[int], v_shape: Sequence[int]) -> Axes:
        """Read the axes off the shape of g: kept where g has the size of v, reduced where it has size 1.

        >>> wn.Axes.of_pair((1, 1, 128), (768, 48, 128))
        Axes(kept=(2,), groups=1)

        Raises PairError when g fits v in no way.
        """
        g, v = tuple(g_shape), tuple(v_shape)
        if g == ():
            return cls(())
        if len(g) == len(v):
            if all(a in (1, b) for a, b in zip(g, v, strict=True)):
                return cls(tuple(d for d, (a, b) in enumerate(zip(g, v, strict=True)) if a == b != 1))
            grouped = len(v) >= 3 and g[0] > 1 and g[1] == v[1] and set(g[2:]) == {1}
            if grouped and v[0] % g[0] == 0:
                return cls((1,), groups=g[0])
        raise PairError(f"a magnitude of shape {g} does not fit a direction of shape {v}")


@lru_cache(maxsize=4096)
def _checked(axes: Axes, shape: tuple[int, ...]) -> Axes:
    ndim = len(shape)
    if any(not -ndim <= d < ndim for d in axes.kept):
        raise PairError(f"kept axes {axes.kept} do not exist in a weight of shape {shape}")
    kept = tuple(sorted({d % ndim for d in axes.kept}))
    if axes.groups > 1 and (kept != (1,) or shape[0] % axes.groups):
        raise PairError(f"{axes.groups} groups do not divide a weight of shape {shape}")
    return Axes(kept, axes.groups)


_ROWS, _COLUMNS = Axes((0,)), Axes((1,))


def kept_axes(told: Axes | int | Sequence[int] | None) -> Axes:
    """Kept axes however they were told: an axis, several, or None for one magnitude per tensor.

    >>> kept_axes(0), kept_axes([0, 1]), kept_axes(None)
    (Axes(kept=(0,), groups=1), Axes(kept=(0, 1), groups=1), Axes(kept=(), groups=1))

    Raises SelectionError for anything else.
    """
    if isinstance(told, Axes):
        return told
    kept = () if told is None else tuple(told) if isinstance(told, tuple | list) else (told,)
    if not all(isinstance(axis, int) and not isinstance(axis, bool) for axis in kept):
        raise SelectionError(f"kept axes are an int, a tuple of ints, None or Axes((0,)), not {told!r}")
    return Axes(kept)


def magnitude_dtype_for(weight_dtype: torch.dtype) -> torch.dtype:
    """The type g needs to reproduce a weight of this type bit for bit: float32 for 16-bit weights."""
    return torch.promote_types(weight_dtype, torch.float32)


def decompose(
    w: Tensor,
    axes: Axes | int | Sequence[int] | None,
    *,
    magnitude: Magnitude = "linear",
    magnitude_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Split a weight into magnitude and direction such that `compose` returns it bit for bit.

    v is w itself (same storage) with g = ||w||, so no bit moves. Rows of zeros get g = 0 and a fixed
    direction of norm one, so that they can still learn; v is then a copy.

    >>> g, v = wn.decompose(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 0)
    >>> g.flatten().tolist()
    [5.0, 0.0]

    Args:
        w: weight of any shape, float64, float32, bfloat16 or float16.
        axes: the axis or axes kept, one norm for each index along them: an int, a tuple of ints, None (one magnitude
            per tensor), or `Axes`. g has shape `axes.magnitude_shape(w.shape)`: (out, 1, ...) for axis 0.
        magnitude: "linear" stores g; "log" stores s with g = e^s (a row of zeros then stays zero: e^s never is).
        magnitude_dtype: type of g; default float32, float64 for float64 weights.

    Raises:
        NonFiniteWeightError: w holds NaN or infinity.
        PairError: the axes do not fit w.
        SelectionError: the axes are none.
    """
    axes = kept_axes(axes).check(w.shape)
    dtype = magnitude_dtype or magnitude_dtype_for(w.dtype)
    shape = axes.magnitude_shape(w.shape)
    with torch.no_grad():
        if is_spread(w):
            return _decompose_spread(w.detach(), axes, magnitude, dtype)
        if w.is_meta:
            return torch.empty(shape, dtype=dtype, device=w.device), w.detach()
        if w.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(w.detach())):
            bad = int((~torch.isfinite(w)).sum())
            raise NonFiniteWeightError(f"{bad} of {w.numel()} elements are NaN or infinite")
        view, dims = axes.grouped(w.detach()), axes.reduced(w.ndim)
        stored, zero = stored_magnitude(view, dims, magnitude, dtype)
        v = w.detach()
        if bool(zero.any()):
            count = max(1, w.numel() // max(1, zero.numel()))
            fixed = torch.copysign(torch.full_like(v, count**-0.5), v)
            v = _laid_out_as(torch.where(axes.spread(zero, w), fixed, v), v)
            stored = torch.where(zero, ZERO_LOG if magnitude == "log" else 0.0, stored).to(dtype)
        return stored.reshape(shape), v


def _decompose_spread(w: Tensor, axes: Axes, magnitude: Magnitude, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`decompose` of a DTensor: g and v are DTensors, v placed like w."""
    bad = 0 if w.is_meta else count_not_finite(w)
    if bad:
        raise NonFiniteWeightError(f"{bad} of {w.numel()} elements are NaN or infinite")
    _, spread = spread_over(w, axes.kept, axes.groups, axes.magnitude_shape(w.shape))
    rows, back = local_rows(w, axes.kept, axes.groups)
    g, v = decompose(rows, axes, magnitude=magnitude, magnitude_dtype=dtype)
    return spread(g), back(v)


def compose(
    g: Tensor, v: Tensor, axes: Axes | int | Sequence[int] | None = None, *, magnitude: Magnitude = "linear"
) -> Tensor:
    """The plain weight w = g * v / ||v||, in v's shape, type and memory format; differentiable to any order.

    The result is within 1.5 units in the last place of the exact value in float32 and float64, and within
    0.51 in 16-bit types; it equals v in every bit where g is the stored norm of v. Gradients are the
    paper's: dL/dg = (dL/dw . v)/||v||, dL/dv = (g/||v||) dL/dw - (g dL/dg/||v||^2) v. A row with v = 0 gives w = 0
    and gradients 0.

    >>> wn.compose(torch.tensor([[10.0]]), torch.tensor([[3.0, 4.0]]))
    tensor([[6., 8.]])

    Args:
        g: magnitude, any shape `Axes.of_pair` accepts; with magnitude="log", its logarithm.
        v: direction, the shape of the weight.
        axes: kept axes as `decompose` takes them; None reads them from g's shape.
        magnitude: "linear" or "log", how g is stored.

    Raises PairError when g does not fit v, SelectionError for axes that are none.
    """
    if not isinstance(axes, Axes):
        axes = Axes.of_pair(g.shape, v.shape) if axes is None else kept_axes(axes).check(v.shape)
    if is_spread(v):
        gather, _ = spread_over(v, axes.kept, axes.groups, g.shape)
        part, back = local_rows(v, axes.kept, axes.groups)
        return back(compose(gather(g), part, axes, magnitude=magnitude))
    if torch._C._get_tracing_state() is None and not _shapes_fit(g.shape, v.shape, axes.kept, axes.groups):
        raise PairError(f"a magnitude of shape {tuple(g.shape)} does not fit {axes} of {tuple(v.shape)}")
    if _needs_plain_operations(g, v):
        return _compose_traceable(g, v, axes, magnitude)
    return compose_eagerly(g, v, axes, magnitude)


def compose_into(rooms: Rooms | None, g: Tensor, v: Tensor, axes: Axes, magnitude: Magnitude) -> Tensor:
    """`compose` with memory to take for large results, lent again when nobody holds them."""
    if rooms is None or is_spread(v) or _needs_plain_operations(g, v) or not axes.fit(g, v):
        return compose(g, v, axes, magnitude=magnitude)
    return compose_eagerly(g, v, axes, magnitude, rooms)


def compose_eagerly(
    g: Tensor,
    v: Tensor,
    axes: Axes,
    magnitude: Magnitude,
    rooms: Rooms | None = None,
    ready: Ready | None = None,
) -> Tensor:
    """`compose` for a pair known to fit, in eager mode; w and later dL/dv in memory of `rooms` where there is some."""
    if torch.is_grad_enabled() and v.is_cpu and (v.requires_grad or g.requires_grad):
        fused.start()
    if ready is None:
        sizes = fused.plan(g, v, axes.kept, axes.groups, magnitude)
        ready = None if sizes is None else compose_in_one_pass(g, v, sizes, rooms)
    return with_graph(g, v, (axes, magnitude, rooms), ready)  # type: ignore[no-any-return]


def compose_in_one_pass(g: Tensor, v: Tensor, sizes: fused.Sizes, rooms: Rooms | None = None) -> Ready:
    """w and ||v|| by the compiled kernels, for a pair they take; nothing where a row needs the long way."""
    if v.numel() >= LARGE:
        prepare_counts()
    w = None
    if rooms is not None and v.numel() >= LARGE:
        w = rooms.take("w", v)
        w = rooms.take("second w", v) if w is None else w  # a discriminator has two in use, for real and fake
    w = torch.empty_like(v) if w is None else w
    norms = fused.forward(g, v, sizes, w)
    return Ready(None) if norms is None else Ready(norms, None, w)


def _shapes_fit(g: torch.Size, v: torch.Size, kept: tuple[int, ...], groups: int) -> bool:
    shape = Axes(kept, groups).magnitude_shape(v)
    return tuple(g) == shape or math.prod(g) == 1 == math.prod(shape)  # 0-d and (1, 1, ...) mean the same


_known_to_fit = lru_cache(maxsize=4096)(_shapes_fit)  # which compilers do not read


def _needs_plain_operations(g: Tensor, v: Tensor) -> bool:
    """Whether someone is watching the operations: compilers, tracers, function transforms, forward mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or is_intercepted()
        or v.is_meta
        or type(v.data) is not Tensor
        or type(g.data) is not Tensor
    )


def _per_row(g: Tensor, v: Tensor, axes: Axes) -> Tensor:
    """g with the shape of the reduced (grouped) weight."""
    if axes.groups > 1:
        return g.unsqueeze(1)
    if g.ndim == v.ndim:
        return g
    return g.reshape([s if d in axes.kept else 1 for d, s in enumerate(v.shape)])


def _compose_traceable(g: Tensor, v: Tensor, axes: Axes, magnitude: str) -> Tensor:
    """The same bits from plain differentiable operations, with no look at the values."""
    view, dims, rows = axes.grouped(v), axes.reduced(v.ndim), _per_row(g, v, axes)
    if is_for_compiler(v):
        return compose_compiled(rows, view, dims, magnitude).reshape(v.shape)
    scale = row_scale(rows.detach(), view.detach(), dims, magnitude, blocked=False)
    factor = _with_gradient(scale, rows, view, dims, magnitude)
    w = v.to(factor.dtype) * axes.spread(factor, v)
    if scale.shift is not None:
        shift = axes.spread(scale.shift, v)
        w = w * shift * shift
    return w.to(torch.promote_types(v.dtype, torch.float32)).to(v.dtype)


def _with_gradient(scale: RowScale, g: Tensor, v: Tensor, dims: tuple[int, ...], magnitude: str) -> Tensor:
    """The accurate factor as a value, with the gradient of plain g / ||v||.

    x + (factor - x) is the factor to the bit because x agrees with it to many digits; where x leaves the
    range of its type (float64 rows beyond 2^+-900), the factor is a constant.
    """
    size, norms = _size_and_norm(g, v, dims, magnitude)
    rough = size / norms if scale.shift is None else size / norms / scale.shift / scale.shift
    usable = torch.isfinite(rough) & (scale.factor != 0)
    rough = torch.where(usable | (size.detach() == 0), rough, torch.zeros_like(rough))
    return rough + (scale.factor - rough).detach()


def _size_and_norm(g: Tensor, v: Tensor, dims: tuple[int, ...], magnitude: str) -> tuple[Tensor, Tensor]:
    """|w| and ||v|| per row in the wide type, differentiable, with ||v|| = 1 for rows of zeros."""
    wide = wide_dtype(v)
    x = v.to(wide)
    peak = row_peak(x.detach(), dims)
    extreme = (peak > 2.0**400) | ((peak < 2.0**-400) & (peak > 0))
    unit = torch.where(extreme, peak, torch.ones_like(peak)) if wide == torch.float64 else torch.ones_like(peak)
    squares = (x / unit).square()
    total = squares.sum(dims, keepdim=True) if dims else squares
    total = torch.where(peak == 0, torch.ones_like(total), total)
    size = g.to(wide).exp() if magnitude == "log" else g.to(wide)
    return size, total.sqrt() * unit


class Ready(NamedTuple):
    """What somebody has computed of a weight already: ||v|| per row in float32, and w or g / ||v|| per row.

    Neither w nor the factor where somebody tried, and found that its rows need the long way. `lengths` is ||v|| in the
    wide type where there are no norms for gradients to use.
    """

    norms: Tensor | None
    factor: Tensor | None = None
    w: Tensor | None = None
    lengths: Tensor | None = None


_How: TypeAlias = tuple[Axes, Magnitude, Rooms | None]


@counted
class _Compose(torch.autograd.Function):
    """compose() for eager mode: one pass for the norm, one for the product, the paper's formula backward."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, v: Tensor, how: _How, ready: Ready | None) -> Tensor:
        ctx.how = how
        if ready is not None and ready.w is not None:
            ctx.save_for_backward(g, v, ready.norms)
            return ready.w
        axes, magnitude, rooms = how
        if v.numel() >= _FRESH:
            prepare_counts()
        other = other_types.rows_of(g, v, axes.kept, axes.groups, magnitude)
        found = None if other is None else other_types.forward(g, v, other)
        if found is not None:
            ctx.save_for_backward(g, v, found[1])
            return found[0]
        if ready is None or ready.factor is None:
            view, dims, rows = axes.grouped(v), axes.reduced(v.ndim), _per_row(g, v, axes)
            if v.dtype == torch.float64:
                ctx.save_for_backward(g, v, None)
                return _laid_out_as(_apply_scale(v, row_scale(rows, view, dims, magnitude, blocked=True), axes), v)
            norms = norm(view, dims, blocked=True)
            plain = plain_scale(rows, norms, magnitude) if v.device.type == "cpu" and v.numel() else None
            if plain is None:
                ctx.save_for_backward(g, v, None)
                scale = RowScale(snapped_quotient(rows, norms, wide_dtype(v), magnitude), None)
                return _laid_out_as(_apply_scale(v, scale, axes), v)
            ready = Ready(norms.float() if plain[1] else None, plain[0])
        assert ready.factor is not None
        ctx.save_for_backward(g, v, ready.norms)
        factor = axes.spread(ready.factor, v)
        if v.dtype != torch.float32:
            return _laid_out_as(_in_blocks(_rounded_product, v, factor), v)
        room = None if rooms is None else rooms.take("w", v)
        return _laid_out_as(torch.mul(v, factor) if room is None else torch.mul(v, factor, out=room), v)

    @staticmethod
    def receive(ctx: Any, grad_w: Tensor, count: int) -> tuple[Tensor | None, ...]:
        g, v, norms = ctx.saved_tensors
        axes, magnitude, rooms = ctx.how
        if norms is None or torch.is_grad_enabled() or not torch._C._has_storage(grad_w):  # a batch of gradients
            grad_g, grad_v = _gradients(grad_w, g, v, axes, magnitude)
        elif is_by_torch(g, v, axes, magnitude):
            grad_g, grad_v = gradients_by_torch(grad_w, g, v, norms)
        elif (found := _gradients_of_other_types(grad_w, g, v, norms, axes, magnitude)) is not None:
            grad_g, grad_v = found
        else:
            size = v.numel() if v.dtype == torch.float32 else 0
            big = size >= _FRESH
            over = big or (size >= LARGE and fused.started())
            room = None
            if over and is_to_be_had(grad_w, v, count):
                room = grad_w
            elif big and rooms is not None:
                room = rooms.take("grad", v)
            grad_g, grad_v = _plain_gradients(grad_w, g, v, norms, axes, magnitude, room, _FRESH)
        return grad_g, grad_v, None, None


def is_by_torch(g: Tensor, v: Tensor, axes: Axes, magnitude: str) -> bool:
    """Whether gradients of ordinary rows are those of torch's own operation, in whichever way a weight was made: its
    node of the graph costs small weights less than any other (`torch_node`)."""
    fits = axes == _ROWS and magnitude == "linear" and 1 < v.ndim == g.ndim and v.numel() <= _BY_TORCH
    return fits and v.dtype is g.dtype in _NODE_TYPES and v.is_cpu and v.is_contiguous()


def gradients_by_torch(grad_w: Tensor, g: Tensor, v: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dg and dL/dv from dL/dw and ||v|| where `is_by_torch`."""
    grad_v, grad_g = _fused_backward(grad_w.contiguous(), v, g.contiguous(), norms.view(g.shape), 0)
    return grad_g, grad_v


def is_plain(grad: Tensor) -> bool:
    """Whether a gradient is what it seems: no batch of gradients, no subclass, no zeros without memory."""
    return type(grad) is Tensor and torch._C._has_storage(grad) and not grad._is_zerotensor()


def is_readable(grad: Tensor, v: Tensor) -> bool:
    """Whether the kernels can read a gradient of the weight that v gives where it lies."""
    return is_plain(grad) and grad.dtype is v.dtype and fused.lies_as(grad, v) and not grad.is_neg()


def is_to_be_had(grad: Tensor, v: Tensor, count: int) -> bool:
    """Whether dL/dv may be written over a gradient that has all of its memory, by the count of references to it that
    `ownership.counted` gives."""
    plain = is_plain(grad) and grad.layout is torch.strided and fused.lies_as(grad, v)
    fills = plain and grad.dtype is v.dtype and grad.untyped_storage().nbytes() == grad.nbytes
    return fills and is_private(grad, count)


# past the Python half of `Function.apply`, which unwraps what function transforms left: none is on
with_graph: Any = torch._C._FunctionBase.__dict__["apply"].__get__(None, _Compose)  # of g, v, `_How`, Ready or None
_fused_backward: Any = torch.ops.aten._weight_norm_interface_backward.default


def _laid_out_as(w: Tensor, v: Tensor) -> Tensor:
    """w with v's strides: broadcasting g over a permuted v may have chosen others."""
    return w if w.stride() == v.stride() else torch.empty_like(v).copy_(w)


def _apply_scale(v: Tensor, scale: RowScale, axes: Axes) -> Tensor:
    """v * factor * shift^2, in the weight's own type where the factors fit it, in the wide type elsewhere."""
    factor = axes.spread(scale.factor, v)
    if v.dtype == torch.float64:
        w = v * factor
        if scale.shift is None or bool((scale.shift == 1).all()):
            return w
        shift = axes.spread(scale.shift, v)
        return w.mul_(shift).mul_(shift)
    narrow = factor.float()
    if v.device.type == "cpu" and torch.equal(narrow.to(factor.dtype), factor):
        return _in_blocks(_rounded_product, v, narrow)
    return _in_blocks(lambda part, scales: (part.to(scales.dtype) * scales).float().to(part.dtype), v, factor)


def _rounded_product(v: Tensor, factor: Tensor) -> Tensor:
    return (v * factor).to(v.dtype)


def _in_blocks(product: Callable[[Tensor, Tensor], Tensor], v: Tensor, factor: Tensor) -> Tensor:
    """product(v, factor) for one value per row, where it widens v a cache-sized block at a time on a CPU."""
    size = v.numel()
    if v.device.type != "cpu" or size <= _WIDENED or v.dtype == factor.dtype:
        return product(v, factor)
    w = torch.empty_like(v)
    step = max(1, _WIDENED * v.shape[0] // size)
    for start in range(0, v.shape[0], step):
        rows = slice(start, start + step)
        w[rows] = product(v[rows], factor if factor.shape[0] == 1 else factor[rows])
    return w


def first_order_gradients(
    grad_w: Tensor, g: Tensor, v: Tensor, norms: Tensor | None, axes: Axes, magnitude: str, *, private: bool = False
) -> tuple[Tensor, Tensor]:
    """dL/dg and dL/dv from dL/dw outside of autograd, as the backward pass of `compose` gives them.

    `norms` is ||v|| per row in float32, for float64 weights in float64; None where rows are extreme. With `private`,
    nobody else looks at `grad_w`, and dL/dv may be written over it.
    """
    if norms is None or not torch._C._has_storage(grad_w):  # a batch of gradients, as `is_grads_batched` makes them
        return _gradients(grad_w, g, v, axes, magnitude)
    if (found := _gradients_of_other_types(grad_w, g, v, norms, axes, magnitude)) is not None:
        return found
    room = grad_w if private and grad_w.stride() == v.stride() and grad_w.dtype == v.dtype else None
    # two gradients of one weight at a time, a new and an old one, outgrow what the allocator keeps warm much sooner
    return _plain_gradients(grad_w, g, v, norms, axes, magnitude, room, 1 << 16)


def _gradients_of_other_types(
    grad_w: Tensor, g: Tensor, v: Tensor, norms: Tensor, axes: Axes, magnitude: str
) -> tuple[Tensor, Tensor] | None:
    """dL/dg and dL/dv of a weight of `other_types` that the kernels take, or of any of float64; None for others."""
    plain = is_plain(grad_w) and grad_w.dtype is v.dtype
    rows = other_types.rows_of(g, v, axes.kept, axes.groups, magnitude) if plain else None
    if rows is not None:
        return other_types.backward(grad_w, g, v, norms, rows)
    return _gradients(grad_w, g, v, axes, magnitude) if v.dtype is torch.float64 else None


def direction_of(w: Tensor, g: Tensor, lengths: Tensor, axes: Axes, magnitude: str, *, instead: Tensor) -> Tensor:
    """v = w ||v|| / g, to rounding, from a weight, its magnitude, and ||v|| per row; rows with g = 0 from `instead`.

    >>> w, g = torch.tensor([[6.0, 8.0]]), torch.tensor([[10.0]])
    >>> direction_of(w, g, torch.tensor([[5.0]]), Axes((0,)), "linear", instead=w)
    tensor([[3., 4.]])
    """
    rows = _per_row(g, w, axes)
    lengths = lengths.reshape(rows.shape)
    scale = axes.spread(lengths / (rows.exp() if magnitude == "log" else rows).to(lengths.dtype), w)
    return torch.where(torch.isfinite(scale), w * scale, instead).to(w.dtype)


def _plain_gradients(
    grad_w: Tensor,
    g: Tensor,
    v: Tensor,
    norms: Tensor,
    axes: Axes,
    magnitude: str,
    room: Tensor | None,
    large: int,
) -> tuple[Tensor, Tensor]:
    """The paper's equation 3 for ordinary rows, first order only, in as few passes as torch offers."""
    sizes = fused.plan(g, v, axes.kept, axes.groups, magnitude)
    if sizes is not None and grad_w.dtype == torch.float32 and is_plain(grad_w):
        grad_v = torch.empty_like(v) if room is None else room
        grad_w = grad_w.resolve_neg()
        grad_w = grad_w if fused.lies_as(grad_w, v) else _laid_out_as(grad_w, v)
        return fused.backward(grad_w, g, v, norms, sizes, grad_v), grad_v
    rows = _per_row(g, v, axes)
    norms = norms.reshape(rows.shape)
    dense = v.dtype == torch.float32 == g.dtype and v.is_contiguous()
    if dense and axes.kept == (0,) and 1 < v.ndim == g.ndim and v.numel() < large and magnitude == "linear":
        grad_v, grad_g = _fused_backward(grad_w.contiguous(), v, g.contiguous(), norms, 0)
        return grad_g, grad_v
    size = rows.exp() if magnitude == "log" else rows
    whole = dense and axes.kept == (0,)
    if dense and axes == _COLUMNS:
        radial, grad_v = _column_gradients(grad_w, size, v, norms)
    elif whole and v.ndim > 1 and v.numel() >= large:  # by size alone, so that memory decides no bit
        grad_v = torch.empty_like(v) if room is None else room
        radial = _gradients_into(grad_v, grad_w, size, v, norms)
    elif whole and v.ndim > 1:
        grad_v, radial = _fused_backward(grad_w.contiguous(), v, size.contiguous(), norms, 0)
    else:
        view, upstream, dims = axes.grouped(v), axes.grouped(grad_w), axes.reduced(v.ndim)
        product = upstream.float() * view
        radial = (product.sum(dims, keepdim=True) if dims else product) / norms
        grad_v = upstream * (size / norms).float()
        grad_v = torch.addcmul(grad_v, view.float(), size * radial / norms.square(), value=-1).reshape(v.shape)
    grad_g = radial * size if magnitude == "log" else radial
    return grad_g.to(g.dtype).reshape(g.shape), grad_v.to(v.dtype)


def _column_gradients(grad_w: Tensor, size: Tensor, v: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dw . v / ||v|| and dL/dv with axis 1 kept: transposed convolutions, Conv1D of GPT-2."""
    inputs, outputs = v.shape[:2]
    flat_v, flat_w = v.reshape(inputs, -1), grad_w.reshape(inputs, -1)
    taps = flat_v.shape[1] // outputs
    grad_v = torch.empty_like(flat_v)
    step = max(1, _BLOCK // max(1, flat_v.shape[1]))
    blocks = [slice(start, start + step) for start in range(0, inputs, step)]
    total = torch.zeros_like(flat_v[0])
    for rows in blocks:
        total += torch.mul(flat_w[rows], flat_v[rows], out=grad_v[rows]).sum(0)
    radial = total.view(outputs, taps).sum(1).view_as(norms) / norms
    scale = size / norms
    across = scale.reshape(-1).repeat_interleave(taps)
    along = (scale * radial / norms).reshape(-1).repeat_interleave(taps)
    for rows in blocks:
        torch.mul(flat_w[rows], across, out=grad_v[rows]).addcmul_(flat_v[rows], along, value=-1)
    return radial, grad_v.view_as(v)


def _gradients_into(room: Tensor, grad_w: Tensor, size: Tensor, v: Tensor, norms: Tensor) -> Tensor:
    """dL/dv into `room`, which may be `grad_w` itself, a cache-sized block of rows at a time; returns
    dL/dw . v / ||v||. Kept axis 0."""
    flat_v, flat_w, out = v.flatten(1), grad_w.reshape(v.shape).flatten(1), room.flatten(1)
    norms, size = norms.flatten(1), size.flatten(1)
    scale = size / norms
    radial = torch.empty_like(norms)
    step = max(1, _BLOCK // max(1, flat_v.shape[1]))
    products = _products(flat_w, flat_v, step)
    for start in range(0, len(flat_v), step):
        rows = slice(start, start + step)
        products(rows, radial[rows]).div_(norms[rows])
        torch.mul(flat_w[rows], scale[rows], out=out[rows])
        out[rows].addcmul_(flat_v[rows], scale[rows] * radial[rows] / norms[rows], value=-1)
    return radial.reshape(-1, *[1] * (v.ndim - 1))


def _products(a: Tensor, b: Tensor, step: int) -> Callable[[slice, Tensor], Tensor]:
    """Scalar products of the rows of two matrices, up to `step` rows at a time, into one value per row."""
    if torch.get_num_threads() > 1:
        scratch = torch.empty_like(a[:step])

        def spread(rows: slice, out: Tensor) -> Tensor:
            torch.mul(a[rows], b[rows], out=scratch[: len(out)])
            return torch.sum(scratch[: len(out)], 1, keepdim=True, out=out)

        return spread
    one, other = np.from_dlpack(a.detach()), np.from_dlpack(b.detach())

    def alone(rows: slice, out: Tensor) -> Tensor:
        row_products(one[rows], other[rows], out.numpy()[:, 0])
        return out

    return alone


def _gradients(grad_w: Tensor, g: Tensor, v: Tensor, axes: Axes, magnitude: str) -> tuple[Tensor, Tensor]:
    """The paper's equation 3, from differentiable operations, so that gradients of gradients are right too.

    With u = v/||v|| and a = |w|/||v||: dL/dg = dL/dw . u and dL/dv = a (dL/dw - (dL/dw . u) u).
    """
    dims = axes.reduced(v.ndim)
    view, upstream, rows = axes.grouped(v), axes.grouped(grad_w), _per_row(g, v, axes)
    size, norms = _size_and_norm(rows, view, dims, magnitude)
    # the radial part is taken in the weight's type (at least float32) from unit vectors: no row over- or underflows
    work = torch.promote_types(v.dtype, torch.float32)
    unit = (view.to(norms.dtype) / norms).to(work) if _extreme(norms) else view.to(work) * norms.reciprocal().to(work)
    product = upstream.to(work) * unit
    radial = product.sum(dims, keepdim=True) if dims else product
    tangential = upstream.to(work) - radial * unit
    ratio = size / norms
    grad_v = (ratio if bool((ratio.detach().abs() > 2.0**100).any()) else ratio.to(work)) * tangential
    grad_g = radial * size if magnitude == "log" else radial
    if axes.groups > 1:
        grad_v = grad_v.reshape(v.shape)
    return grad_g.to(g.dtype).reshape(g.shape), grad_v.to(v.dtype)


def _extreme(norms: Tensor) -> bool:
    """Whether 1/||v|| leaves float32 for some row."""
    n = norms.detach()
    return norms.dtype != torch.float32 and bool(((n > 2.0**100) | (n < 2.0**-100)).any())


class WeightNorm(LeanModule):
    """The parametrization: forward(g, v) -> w, right_inverse(w) -> (g, v), as `torch.nn.utils.parametrize` asks.

    Equation 2: w = g v / ||v||, row by row. Equation 3: dL/dg = (dL/dw . v) / ||v||,
    dL/dv = (g / ||v||) dL/dw - (g dL/dg / ||v||^2) v. v has the shape of w, (out, in, ...); g has size 1 on every axis
    that the norm sums over, (out, 1, ...) with axis 0 kept. `apply_weight_norm` puts one on each weight, where it is
    `module.parametrizations.weight[0]`, with g = original0 and v = original1.

    >>> rule = wn.WeightNorm(wn.Axes((0,)))
    >>> g, v = rule.right_inverse(torch.tensor([[3.0, 4.0]]))
    >>> g, rule(2 * g, v)
    (tensor([[5.]]), tensor([[6., 8.]]))

    Args:
        axes: kept axes of the weight.
        magnitude: "linear" (original0 is g) or "log" (original0 is s with g = e^s; a buffer `log_scale` then says so
            in every state dict, and a model that knows only the linear g does not take it by mistake).
        magnitude_dtype: type of g; None for float32 (float64 for float64 weights).

    Source: Salimans & Kingma 2016, "Weight Normalization", section 2 (arXiv 1602.07868).
    """

    axes: Axes
    magnitude: Magnitude
    magnitude_dtype: torch.dtype | None

    def __init__(self, axes: Axes, magnitude: Magnitude = "linear", magnitude_dtype: torch.dtype | None = None) -> None:
        blank_module(self, nn.Module)
        self.__dict__.update(axes=axes, magnitude=magnitude, magnitude_dtype=magnitude_dtype)
        if magnitude == "log":
            self.register_buffer("log_scale", torch.ones((), dtype=torch.bool))

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return compose(g, v, self.axes, magnitude=self.magnitude)

    def compose(self, g: Tensor, v: Tensor, rooms: Rooms, ready: Ready | None = None) -> Tensor:
        """`forward` for its own pair in eager mode, with memory that may be used again; see `compose_eagerly`."""
        axes = self.axes
        fits = ready is not None or axes.fit(g, v)
        plain = fits and not (self._forward_hooks or self._forward_pre_hooks or "forward" in self.__dict__)
        if not plain or torch.autograd.forward_ad._current_level >= 0:
            return self(g, v)  # type: ignore[no-any-return]
        return compose_eagerly(g, v, axes, self.magnitude, rooms, ready)

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return decompose(w, self.axes, magnitude=self.magnitude, magnitude_dtype=self.magnitude_dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], *rest: Any) -> None:
        """As any module's, which for one without entries, tensors and hooks does nothing, in many steps."""
        tensors, derived = self._parameters or self._buffers, type(self) is not WeightNorm
        if state_dict or tensors or self._load_state_dict_pre_hooks or derived:
            super()._load_from_state_dict(state_dict, *rest)

    def extra_repr(self) -> str:
        groups = f", groups={self.axes.groups}" if self.axes.groups > 1 else ""
        return f"kept={self.axes.kept}{groups}, magnitude={self.magnitude!r}"
