"""One weight with its graph in as few steps as can be: for a layer's own use in training, where nothing else goes on.

Between two layers the processor forgets most of what it ran, so that every step of a small layer costs several times
what it would in a loop. What decides how a pair is computed is therefore found out once, and from then on only whether
it still holds is asked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wnsurgery import fused, other_types
from wnsurgery.kept import LARGE, Rooms, steps
from wnsurgery.loans import LASTING
from wnsurgery.onlookers import goes_the_long_way
from wnsurgery.ownership import counted, prepare
from wnsurgery.reparam import (
    Axes,
    Magnitude,
    compose_in_one_pass,
    first_order_gradients,
    gradients_by_torch,
    is_by_torch,
    is_plain,
    is_readable,
    is_to_be_had,
    with_graph,
)
from wnsurgery.torch_node import TorchNode, takes

__all__ = ["Straight"]

_ROOMY = 1 << 19  # elements from which memory of its own, though out of the cache, is better than the allocator's
_TWICE = 2  # reads up to which making a weight anew costs less than keeping it
_empty_like, _grad_enabled, _Parameter = torch.empty_like, torch.is_grad_enabled, nn.Parameter


class Straight:
    """A pair of Parameters that the compiled kernels read where it lies, with sizes from `fused.plan`, or from
    `other_types.rows_of` where these say `as_it_is`.

    >>> from wnsurgery import fused
    >>> g, v = nn.Parameter(torch.tensor([[10.0]])), nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> straight = Straight(g, v, fused.plan(g, v, (0,), 1, "linear"), Axes((0,)), Rooms()) if fused.start() else None
    >>> w = straight.weight(g, v)
    >>> w.tolist(), w.requires_grad
    ([[6.0, 8.0]], True)
    """

    __slots__ = (
        *("_at", "_backward", "_count", "_forward", "_g", "_is_by_torch", "_is_small", "_magnitude", "_node"),
        *("_read", "_reads", "_rooms", "_roomy", "_shapes", "_types", "_v"),
        *("axes", "large", "sizes"),
    )

    def __init__(self, g: Tensor, v: Tensor, sizes: fused.Sizes | other_types.Rows, axes: Axes, rooms: Rooms) -> None:
        self._g, self._v, self.sizes, self.axes, self._rooms = g, v, sizes, axes, rooms
        self._at, self._count = (g.data_ptr(), v.data_ptr()), v.numel()
        self._shapes = g.shape, v.shape, g.stride(), v.stride()
        self._types, self._roomy = (g.dtype, v.dtype), False
        self._magnitude: Magnitude = "log" if isinstance(sizes, other_types.Rows) and sizes.log else "linear"
        self._is_by_torch = is_by_torch(g, v, axes, self._magnitude)
        self._node = TorchNode(g, v, axes) if self._is_by_torch and takes(g, v, axes) else None
        if isinstance(sizes, fused.Sizes):
            self._roomy = self._count >= _ROOMY or (self._node is None and self._is_by_torch)
            self._forward, self._backward = (f(sizes, self._count) for f in (fused.forward_call, fused.backward_call))
        else:
            self._forward, self._backward = other_types.forward_call(g, v, sizes), other_types.backward_call(v, sizes)
        self._is_small = max(g.nbytes, v.nbytes) <= LASTING
        self._read, self._reads = (-1, -1, -1), 0
        steps.start()
        if self._count >= LARGE:
            prepare()
        self.large: Any = None  # how a linear layer computes it with its output

    def is_of(self, g: Any, v: Any) -> bool:
        """Whether this is its pair, in the same memory, with the same shapes, in the same order, and not in deferred
        mode, which other owners of a tied one may have gone into."""
        return (
            g is self._g
            and v is self._v
            and type(v) is _Parameter
            and (g.data_ptr(), v.data_ptr()) == self._at
            and (g.shape, v.shape, g.stride(), v.stride()) == self._shapes
            and (g.dtype, v.dtype) == self._types
        )

    def weight(self, g: Tensor | None, v: Tensor | None) -> Tensor | None:
        """The weight of this pair with its graph, None where it must go the long way: another pair, a row that is not
        an ordinary one, forward or inference mode, a function transform, somebody's mode."""
        if not self.is_of(g, v) or goes_the_long_way():
            return None
        if self._roomy:
            ready = compose_in_one_pass(self._g, self._v, self.sizes, self._rooms)  # type: ignore[arg-type]
            how = self.axes, "linear", self._rooms
            return None if ready.w is None else with_graph(self._g, self._v, how, ready)
        node = self._node
        if node is None:
            made = self._made()
            return None if made is None else _apply(self._g, self._v, self, made)
        (call, rest), (g_at, v_at) = self._forward, self._at
        w, norms = node.begin()
        if not call(v_at, g_at, w.data_ptr(), norms.data_ptr(), *rest):
            return None
        node.finish(w)
        return w

    def is_read_again(self) -> bool:
        """Whether others than the layer have read its small weight before from the pair as it is, as far as versions
        and steps tell; this time counts."""
        now = self._g._version, self._v._version, steps.count
        self._reads = self._reads + 1 if now == self._read else 0
        self._read = now
        return self._is_small and self._reads >= _TWICE

    def lasting(self) -> Tensor | None:
        """The weight with a graph that takes any number of backward passes, None where a row is not an ordinary one;
        while `weight` has one."""
        made = self._made()
        return None if made is None else _apply_lasting(self._g, self._v, self, made)

    def without_graph(self, g: Tensor, v: Tensor, rooms: Rooms) -> Tensor | None:
        """The weight of this pair without a graph, outside of training; None as for `weight`."""
        if not self.is_of(g, v) or goes_the_long_way():
            return None
        if self._count >= LARGE and isinstance(self.sizes, fused.Sizes):
            return compose_in_one_pass(g, v, self.sizes, rooms).w
        made = self._made()
        return None if made is None else made[0]

    def _made(self) -> tuple[Tensor, Tensor] | None:
        """w and ||v|| in new memory, None where a row is not an ordinary one."""
        w, norms, size = _empty_like(self._v), _empty_like(self._g), self._g
        if self._magnitude == "log":
            size = other_types.sizes_of(size, self.sizes)  # type: ignore[arg-type]
        (call, rest), (_, v_at) = self._forward, self._at
        return (w, norms) if call(v_at, size.data_ptr(), w.data_ptr(), norms.data_ptr(), *rest) else None

    def gradients(self, grad: Tensor, g: Tensor, v: Tensor, norms: Tensor, count: int = 0) -> tuple[Tensor, Tensor]:
        """dL/dg and dL/dv from dL/dw, for the pair as the graph has saved it, and ||v|| as it was then.

        dL/dv is written over dL/dw where the count of references to that tells that nobody else has it.
        """
        differentiable = _grad_enabled()
        if not differentiable and self.is_of(g, v):
            if self._is_by_torch and is_plain(grad):
                return gradients_by_torch(grad, g, v, norms)
            if is_readable(grad, v):
                over = self._count >= LARGE and is_to_be_had(grad, v, count)
                return self._by_kernel(grad, norms, grad if over else _empty_like(self._v))
        return first_order_gradients(grad, g, v, None if differentiable else norms, self.axes, self._magnitude)

    def _by_kernel(self, grad: Tensor, norms: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor]:
        grad_g, size = _empty_like(self._g), self._g
        log = self._magnitude == "log"
        if log:
            size = other_types.sizes_for_gradients(size, self.sizes)  # type: ignore[arg-type]
        (call, rest), (_, v_at) = self._backward, self._at
        call(grad.data_ptr(), v_at, size.data_ptr(), norms.data_ptr(), grad_g.data_ptr(), grad_v.data_ptr(), *rest)
        return grad_g.mul_(size) if log else grad_g, grad_v


@counted
class _ComposeStraight(torch.autograd.Function):
    """What `compose` comes to for a weight that the kernels have made, and whose gradients they take."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, v: Tensor, straight: Straight, made: tuple[Tensor, Tensor]) -> Tensor:
        ctx.straight = straight
        ctx.save_for_backward(g, v, made[1])
        return made[0]

    @staticmethod
    def receive(ctx: Any, grad: Tensor, count: int) -> tuple[Tensor | None, ...]:
        straight: Straight = ctx.straight
        g, v, norms = ctx.saved_tensors
        return *straight.gradients(grad, g, v, norms, count), None, None


class _ComposeLasting(torch.autograd.Function):
    """The same for a weight of several uses: nothing is freed after the first backward pass."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, v: Tensor, straight: Straight, made: tuple[Tensor, Tensor]) -> Tensor:
        ctx.of = straight, g, v, made[1], g._version, v._version
        return made[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        straight, g, v, norms, *then = ctx.of
        if [g._version, v._version] != then:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"g or v of a weight of shape {list(v.shape)}"
            )
        return *straight.gradients(grad, g, v, norms), None, None


# past the Python half of `Function.apply`, which unwraps what function transforms left: none is on
_apply: Any = torch._C._FunctionBase.__dict__["apply"].__get__(None, _ComposeStraight)
_apply_lasting: Any = torch._C._FunctionBase.__dict__["apply"].__get__(None, _ComposeLasting)
