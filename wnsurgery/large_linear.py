"""A linear layer in training whose weight is large: some rows of w at a time, gradients in memory that is used again.

The system gives fresh pages for blocks of many megabytes, and the first touch of a page costs more than the arithmetic
on it. A layer that computes w itself can also say where dL/dw goes: to where dL/dv of the last step was, once nobody
holds that any more. For few inputs, neither w nor dL/dw is ever there as a whole (`blocked_linear`). The output is that
of `torch.nn.functional.linear` with the composed weight, bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from wnsurgery import blocked_linear, fused
from wnsurgery.blocked_linear import rows_for_gradients, rows_for_output, scale
from wnsurgery.kept import Rooms
from wnsurgery.onlookers import goes_the_long_way
from wnsurgery.reparam import Axes, compose, compose_in_one_pass, first_order_gradients, is_plain

__all__ = ["LARGE_WEIGHT", "HowLarge", "large_linear", "nobody_looks_on", "takes_input"]

LARGE_WEIGHT = 7 << 16  # elements above which memory is what a layer waits for
_saving_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks
_FRESH = 1 << 20  # elements from which blocks are at times given back to the system


class HowLarge(NamedTuple):
    """How the weight of a large linear layer is computed, and where.

    `rooms` are the layer's own. A gradient that is only added to another, held since the micro-batch before, is made in
    `shared`, one room for all layers of a shape. `is_far` says that the net is too large for its gradients to be in the
    cache when the optimizer comes to them.
    """

    axes: Axes
    sizes: fused.Sizes
    rooms: Rooms
    shared: Rooms
    is_far: bool = True


def takes_input(x: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether a layer's input and setting are plain enough for `large_linear`; v is a matrix."""
    return (
        type(x) is Tensor
        and x.dtype is torch.float32
        and x.layout is torch.strided
        and not x.is_nested
        and x.is_cpu
        and x.ndim > 0
        and x.shape[-1] == v.shape[1]
        and x.numel() > 0
        and (bias is None or (bias.dtype is torch.float32 and type(bias.data) is Tensor))
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._is_torch_function_mode_enabled()
    )


def nobody_looks_on() -> bool:
    """Whether nobody wants to see the weight computed: not where somebody watches what each layer saves for its
    backward pass, as activation checkpointing does, in forward or inference mode, or in a function transform or mode of
    theirs."""
    return _saving_hooks(True) is None and not goes_the_long_way()


def large_linear(x: Tensor, g: Tensor, v: Tensor, bias: Tensor | None, how: HowLarge) -> Tensor | None:
    """x w^T + bias for w = g v / ||v||, shapes as in `torch.nn.functional.linear`, where `takes_input`; None where a
    row is not an ordinary one.

    >>> fused.start()
    True
    >>> g, v = torch.full((2, 1), 5.0, requires_grad=True), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    >>> how = HowLarge(Axes((0,)), fused.plan(g, v, (0,), 1, "linear"), Rooms(), Rooms())
    >>> large_linear(torch.tensor([[1.0, 1.0]]), g, v, None, how)
    tensor([[7., 5.]], grad_fn=<_LargeLinearBackward>)
    """
    rows = rows_for_output(x, v, bias) if how.axes.kept == (0,) else None
    try:
        return _apply(x, g, v, bias, rows, how)  # type: ignore[no-any-return]
    except _ExtremeRowError:
        return None


class _ExtremeRowError(Exception):
    """A row of v is not an ordinary one: the weight is to be computed the long way."""


class _LargeLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        g: Tensor,
        v: Tensor,
        bias: Tensor | None,
        rows: int | None,
        how: HowLarge,
    ) -> Tensor:
        ctx.how = how
        if rows is not None:
            found = blocked_linear.forward(x, g, v, bias, rows)
            if found is None:
                raise _ExtremeRowError
            y, norms = found
            ctx.save_for_backward(x, g, v, norms)
            return y
        ready = compose_in_one_pass(g, v, how.sizes, how.rooms)
        if ready.w is None:
            raise _ExtremeRowError
        w = ready.w.requires_grad_()  # by this flag matmul chooses its kernel, and so the last bit
        y = F.linear(x, w, bias)
        ctx.save_for_backward(x, g, v, ready.norms, w.requires_grad_(False))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):  # as in the forward pass
                return (*_gradients(ctx, grad), None, None)
        return (*_gradients(ctx, grad), None, None)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dL/dx, dL/dg, dL/dv and that of the bias from dL/dy."""
    x, g, v, norms, *made = ctx.saved_tensors
    axes, sizes, rooms, shared, is_far = ctx.how
    wants_x, wants_g, wants_v, wants_bias, *_ = ctx.needs_input_grad
    up, inputs = _matrix(grad), _matrix(x)
    grad_bias = up.sum(0) if wants_bias else None
    grad_x = grad_g = grad_v = None
    wants_weight = wants_g or wants_v
    if torch.is_grad_enabled() or not is_plain(grad):
        if wants_x:
            grad_x = torch.matmul(grad, compose(g, v, axes))
        if wants_weight:
            grad_g, grad_v = first_order_gradients(up.t() @ inputs, g, v, None, axes, "linear")
        return grad_x, grad_g, grad_v, grad_bias
    grad_v = _room(v, rooms, shared) if wants_weight else None
    rows = rows_for_gradients(inputs, v) if axes.kept == (0,) else None
    if grad_v is not None and rows is not None:
        wanted = {"wants_x": wants_x, "is_far": is_far}
        grad_x, grad_g = blocked_linear.backward(up, inputs, g, v, norms, rows, grad_v, **wanted)
    else:
        if wants_x:
            grad_x = torch.mm(up, made[0]) if made else torch.mm(scale(up, g, norms), v)
        if grad_v is not None:
            grad_g = fused.backward(torch.mm(up.t(), inputs, out=grad_v), g, v, norms, sizes, grad_v)
    return None if grad_x is None else grad_x.view(x.shape), grad_g, grad_v, grad_bias


def _matrix(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _room(v: Tensor, own: Rooms, shared: Rooms) -> Tensor:
    """Memory for a gradient."""
    room = None
    if v.numel() >= _FRESH:
        room = own.take("grad", v)
        room = shared.take("grad", v) if room is None else room
    return torch.empty_like(v) if room is None else room


# past the Python half of `Function.apply`, which unwraps what function transforms left: none is on
_apply: Any = torch._C._FunctionBase.__dict__["apply"].__get__(None, _LargeLinear)
