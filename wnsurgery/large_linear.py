"""A linear layer in training whose weight is large: its gradient in memory that is used again.

The system gives fresh pages for blocks of many megabytes, and the first touch of a page costs more than the arithmetic
on it. A layer that computes w itself can also say where dL/dw goes: to where dL/dv of the last step was, once nobody
holds that any more. The output is that of `torch.nn.functional.linear` with the composed weight, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wnsurgery import fused
from wnsurgery.kept import AHEAD, Rooms
from wnsurgery.reparam import Axes, compose, compose_in_one_pass, first_order_gradients, is_plain

__all__ = ["large_linear", "serves_linear"]

_LARGE = AHEAD  # elements above which w is made at its use
_FRESH = 1 << 20  # elements from which blocks are at times given back to the system
_CACHED = 1 << 18  # elements of dL/dw that a core's cache keeps
_SHORT = 512  # terms of the sums that are dL/dw, up to which their arithmetic costs less than memory does


def serves_linear(x: Tensor, g: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether a layer's weight is large, and its input and setting plain enough for `large_linear`."""
    return (
        v.numel() > _LARGE
        and v.ndim == 2
        and type(x) is Tensor
        and x.dtype is torch.float32
        and x.layout is torch.strided
        and not x.is_nested
        and x.is_cpu
        and x.ndim > 0
        and x.shape[-1] == v.shape[1]
        and x.numel() > 0
        and (bias is None or (bias.dtype is torch.float32 and type(bias.data) is Tensor))
        and (g.requires_grad or v.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._is_torch_function_mode_enabled()
    )


def large_linear(
    x: Tensor, g: Tensor, v: Tensor, bias: Tensor | None, axes: Axes, rooms: Rooms, shared: Rooms
) -> Tensor | None:
    """x w^T + bias for w = g v / ||v||, shapes as in `torch.nn.functional.linear`, for what `serves_linear`; None where
    the compiled kernels do not take the pair.

    `rooms` are the layer's own. A gradient that is only added to another, held since the micro-batch before, is made in
    `shared`, one room for all layers of a shape.

    >>> fused.start()
    True
    >>> g, v = torch.full((2, 1), 5.0, requires_grad=True), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    >>> large_linear(torch.tensor([[1.0, 1.0]]), g, v, None, Axes((0,)), Rooms(), Rooms())
    tensor([[7., 5.]], grad_fn=<_LargeLinearBackward>)
    """
    sizes = fused.plan(g, v, axes.kept, axes.groups, "linear")
    ready = None if sizes is None else compose_in_one_pass(g, v, sizes, rooms)
    if ready is None or ready.w is None:
        return None
    return _apply(x, g, v, bias, ready.w, ready.norms, axes, (rooms, shared))  # type: ignore[no-any-return]


class _LargeLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        g: Tensor,
        v: Tensor,
        bias: Tensor | None,
        w: Tensor,
        norms: Tensor,
        axes: Axes,
        rooms: tuple[Rooms, Rooms],
    ) -> Tensor:
        w.requires_grad_()  # by this flag matmul chooses its kernel, and so the last bit
        y = F.linear(x, w, bias)
        ctx.save_for_backward(x, g, v, w.requires_grad_(False), norms)
        ctx.how = axes, rooms
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast("cpu", enabled=False):  # as in the forward pass
            return _LargeLinear._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, g, v, w, norms = ctx.saved_tensors
        axes, rooms = ctx.how
        wants_x, wants_g, wants_v, wants_bias, *_ = ctx.needs_input_grad
        differentiable = torch.is_grad_enabled()
        if differentiable:
            w = compose(g, v, axes)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = torch.matmul(grad, w) if wants_x else None
        grad_bias = rows.sum(0) if wants_bias else None
        grad_g = grad_v = None
        if wants_g or wants_v:
            inputs = x.reshape(-1, x.shape[-1])
            if differentiable or not is_plain(grad):
                grad_g, grad_v = first_order_gradients(rows.t() @ inputs, g, v, None, axes, "linear")
            else:
                grad_g, grad_v = _gradients(rows.t(), inputs, g, v, norms, axes, _room(v, *rooms))
        return grad_x, grad_g, grad_v, grad_bias, None, None, None, None


def _room(v: Tensor, own: Rooms, shared: Rooms) -> Tensor:
    """Memory for a gradient."""
    room = None
    if v.numel() >= _FRESH:
        room = own.take("grad", v)
        room = shared.take(f"grad of {tuple(v.shape)}", v) if room is None else room
    return torch.empty_like(v) if room is None else room


def _gradients(
    left: Tensor, right: Tensor, g: Tensor, v: Tensor, norms: Tensor, axes: Axes, room: Tensor
) -> tuple[Tensor, Tensor]:
    """dL/dg and dL/dv for dL/dw = left @ right; dL/dv in `room`.

    Where a short sum makes dL/dw, it is made and used up some rows at a time, and never leaves the cache.
    """
    sizes = fused.plan(g, v, axes.kept, axes.groups, "linear")
    count = -(-v.numel() // _CACHED)
    short = len(right) <= _SHORT and torch.get_num_threads() == 1
    if count < 2 or not short or sizes is None or axes.kept != (0,):
        return first_order_gradients(torch.mm(left, right, out=room), g, v, norms, axes, "linear", private=True)
    step = -(-len(v) // count)
    scratch = torch.empty(step, v.shape[1], dtype=v.dtype, device=v.device)
    parts = []
    for start in range(0, len(v), step):
        some = slice(start, start + step)
        up = torch.mm(left[some], right, out=scratch[: len(v) - start])
        parts.append(fused.backward(up, g[some], v[some], norms[some], sizes._replace(rows=len(up)), room[some]))
    return torch.cat(parts), room


# past the Python half of `Function.apply`, which unwraps what function transforms left: none is on
_apply: Any = torch._C._FunctionBase.__dict__["apply"].__get__(None, _LargeLinear)
