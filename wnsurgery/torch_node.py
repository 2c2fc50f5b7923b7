"""torch's own node of the autograd graph for a small weight: a node written in Python costs that twice as much.

torch makes the node together with a weight of its own bits; whoever asks for it writes his weight and ||v|| over these,
of which the node keeps ||v|| alone. Where gradients are to be differentiated in their turn, the node would take ||v||
for a constant. Then what it gives is replaced by gradients from differentiable operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wnsurgery.reparam import Axes, first_order_gradients, is_by_torch

__all__ = ["TorchNode", "takes"]

_interface: Any = torch._weight_norm_interface
_current_node: Any = getattr(torch._C, "_current_autograd_node", None)
_grad_enabled = torch.is_grad_enabled


def takes(g: Tensor, v: Tensor, axes: Axes) -> bool:
    """Whether torch's node gives a linear g and v the gradients they are to have (`is_by_torch`), and a weight laid out
    as v."""
    plain = type(g) is type(v) is nn.Parameter and g.is_contiguous() and _current_node is not None
    return plain and is_by_torch(g, v, axes, "linear") and v.stride() == torch.empty(v.shape, device="meta").stride()


class TorchNode:
    """Makes the nodes of one pair that `takes` holds for.

    >>> g, v = nn.Parameter(torch.tensor([[10.0]])), nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> node = TorchNode(g, v, Axes((0,)))
    >>> w, norms = node.begin()
    >>> norms.tolist(), w.grad_fn.name()
    ([[5.0]], 'WeightNormInterfaceBackward0')
    >>> node.finish(w)
    >>> once, = torch.autograd.grad(w.square().sum(), v, create_graph=True)
    >>> once.tolist()
    [[0.0, 0.0]]
    """

    __slots__ = ("_g", "_hooks", "_v")

    def __init__(self, g: Tensor, v: Tensor, axes: Axes) -> None:
        self._g, self._v = g, v
        self._hooks: Any = {0: _Differentiable(g, v, axes)}

    def begin(self) -> tuple[Tensor, Tensor]:
        """A weight with its graph, and ||v|| per row, both to be written over past autograd."""
        return _interface(self._v, self._g, 0)  # type: ignore[no-any-return]

    def finish(self, w: Tensor) -> None:
        """See to second derivatives of a weight that `begin` has made."""
        node: Any = w.grad_fn
        if node is not None:
            w._backward_hooks = self._hooks  # what `w.register_hook` does, with a table that serves every time
            node._register_hook_dict(w)
            w._backward_hooks = None


class _Differentiable:
    """Called with each gradient of a weight before torch's node is."""

    __slots__ = ("_axes", "_g", "_kinds", "_v")

    def __init__(self, g: Tensor, v: Tensor, axes: Axes) -> None:
        self._g, self._v, self._axes = g, v, axes
        self._kinds = g.shape, v.shape, g.dtype, v.dtype

    def __call__(self, grad: Tensor | None) -> None:
        if (self._g.shape, self._v.shape, self._g.dtype, self._v.dtype) != self._kinds:  # torch would read past the end
            raise RuntimeError("g or v was given another shape or type through `.data` while its gradient was to come")
        if not _grad_enabled() or grad is None:
            return

        def instead(found: Sequence[Tensor | None], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
            handle.remove()
            to_g, to_v = first_order_gradients(grads[0], self._g, self._v, None, self._axes, "linear")
            return tuple(None if old is None else new for old, new in zip(found, (to_v, to_g), strict=True))

        handle = _current_node().register_hook(instead)
