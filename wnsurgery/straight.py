"""One weight with its graph in as few steps as can be: for a layer's own use in training, where nothing else goes on.

Between two layers the processor forgets most of what it ran, so that every step of a small layer costs several times
what it would in a loop. What decides how a pair is computed is therefore found out once, and from then on only whether
it still holds is asked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from wnsurgery import fused
from wnsurgery.kept import Rooms, steps
from wnsurgery.loans import LASTING
from wnsurgery.reparam import Axes, compose_in_one_pass, first_order_gradients, is_readable, with_graph

__all__ = ["Straight"]

_ROOMY = 1 << 19  # elements from which memory of its own, though out of the cache, is better than the allocator's
_TWICE = 2  # uses up to which making a weight anew costs less than keeping it
_inference_mode, _transforms = torch.is_inference_mode_enabled, torch._C._functorch.peek_interpreter_stack
_empty_like, _grad_enabled = torch.empty_like, torch.is_grad_enabled


class Straight:
    """A pair of Parameters that the compiled kernels take, with sizes as `fused.plan` gave them.

    >>> from wnsurgery import fused
    >>> g, v = nn.Parameter(torch.tensor([[10.0]])), nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> straight = Straight(g, v, fused.plan(g, v, (0,), 1, "linear"), Axes((0,)), Rooms()) if fused.start() else None
    >>> w = straight.weight(g, v)
    >>> w.tolist(), w.requires_grad
    ([[6.0, 8.0]], True)
    """

    __slots__ = (
        *("_at", "_backward", "_count", "_forward", "_g", "_rooms", "_shapes", "_used", "_uses", "_v"),
        *("axes", "large", "sizes", "small"),
    )

    def __init__(self, g: Tensor, v: Tensor, sizes: fused.Sizes, axes: Axes, rooms: Rooms) -> None:
        steps.start()
        self._g, self._v, self.sizes, self.axes, self._rooms = g, v, sizes, axes, rooms
        self._at, self._shapes, self._count = (g.data_ptr(), v.data_ptr()), (g.shape, v.shape), v.numel()
        self._forward, self._backward = fused.forward_call(sizes, self._count), fused.backward_call(sizes, self._count)
        self._used, self._uses = (-1, -1, -1), 0
        self.large: Any = None  # how a linear layer computes it with its output
        self.small = max(g.nbytes, v.nbytes) <= LASTING  # may be computed once for several uses

    def is_of(self, g: Tensor | None, v: Tensor | None) -> bool:
        """Whether this is its pair, in the same memory, with the same shapes, in the same order."""
        return (
            g is self._g
            and v is self._v
            and (self._g.data_ptr(), self._v.data_ptr()) == self._at
            and (self._g.shape, self._v.shape) == self._shapes
            and self._g.is_contiguous()
            and self._v.is_contiguous()
            and self._v.dtype is torch.float32 is self._g.dtype
        )

    def is_used_again(self) -> bool:
        """Whether its weight has been made `_TWICE` before from the pair as it is, as far as versions and steps tell;
        this use counts."""
        now = self._g._version, self._v._version, steps.count
        self._uses = self._uses + 1 if now == self._used else 0
        self._used = now
        return self._uses >= _TWICE

    def weight(self, g: Tensor | None, v: Tensor | None) -> Tensor | None:
        """The weight of this pair with its graph, None where it must go the long way: another pair, a row that is not
        an ordinary one, forward or inference mode, a function transform."""
        if not self.is_of(g, v) or forward_ad._current_level >= 0 or _inference_mode() or _transforms() is not None:
            return None
        if self._count >= _ROOMY:
            ready = compose_in_one_pass(self._g, self._v, self.sizes, self._rooms)
            how = self.axes, "linear", self._rooms
            return None if ready.w is None else with_graph(self._g, self._v, how, ready)
        w, norms = _empty_like(self._v), _empty_like(self._g)
        call, rest = self._forward
        g_at, v_at = self._at
        fine = call(v_at, g_at, w.data_ptr(), norms.data_ptr(), *rest)
        return _apply(self._g, self._v, self, (w, norms)) if fine else None

    def gradients(self, grad: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
        """dL/dg and dL/dv from dL/dw, which lies in memory as v, while `is_of` holds."""
        grad_g, grad_v = _empty_like(self._g), _empty_like(self._v)
        call, rest = self._backward
        g_at, v_at = self._at
        call(grad.data_ptr(), v_at, g_at, norms.data_ptr(), grad_g.data_ptr(), grad_v.data_ptr(), *rest)
        return grad_g, grad_v


class _ComposeStraight(torch.autograd.Function):
    """What `compose` comes to for a weight that the kernels have made, and whose gradients they take."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, v: Tensor, straight: Straight, made: tuple[Tensor, Tensor]) -> Tensor:
        ctx.straight = straight
        ctx.save_for_backward(g, v, made[1])
        return made[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        straight: Straight = ctx.straight
        g, v, norms = ctx.saved_tensors
        differentiable = _grad_enabled()
        if differentiable or not is_readable(grad) or not straight.is_of(g, v):
            norms = None if differentiable else norms
            return *first_order_gradients(grad, g, v, norms, straight.axes, "linear"), None, None
        return *straight.gradients(grad, norms), None, None


# past the Python half of `Function.apply`, which unwraps what function transforms left: none is on
_apply: Any = torch._C._FunctionBase.__dict__["apply"].__get__(None, _ComposeStraight)
