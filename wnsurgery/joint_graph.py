"""Small weights that have one node of the autograd graph in common.

A node written in Python costs a small weight many times its arithmetic, forward and backward. Here one node stands for
several weights, and its backward pass is one call of the compiled kernels.

Each weight's gradients are what a node of its own would give, also where only some of the weights take part in a
backward pass, or where several passes share the work among them: nothing is freed after the first, and a weight
without a gradient passes none on. What differs is the time: gradients come when the last of the weights has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wnsurgery.reparam import Axes, first_order_gradients, is_plain
from wnsurgery.small_weights import Gradients, Made, SmallWeights

__all__ = ["has_hooks", "is_in_backward", "is_joint", "may_share", "with_joint_graph"]


_task: Any = torch._C._current_graph_task_id


def is_in_backward() -> bool:
    """Whether this thread is in a backward pass, as it is where a checkpointed part is run again."""
    return _task() != -1  # type: ignore[no-any-return]


def may_share(g: Tensor, v: Tensor) -> bool:
    """Whether nothing hangs on the time at which a pair's gradients come: it wants some, and nobody has hooks on it.

    A hook would also be called without a gradient, where the pair has no part in a backward pass.
    """
    return not (has_hooks(g) or has_hooks(v)) and (g.requires_grad or v.requires_grad)


def has_hooks(half: Tensor) -> bool:
    """Whether somebody has put a hook on one half of a pair."""
    return bool(half._backward_hooks or half._post_accumulate_grad_hooks)


def _no_part(half: Tensor) -> Tensor | None:
    """The gradient of a half that has no part in a backward pass: none, but zeros where somebody has put a hook on it
    since its weight was made."""
    return torch.zeros_like(half) if has_hooks(half) else None


def with_joint_graph(small: SmallWeights, chosen: Sequence[int], made: Made) -> tuple[Tensor, ...]:
    """Some of the weights that `small.make` has made, with a graph; their pairs `may_share`.

    >>> from wnsurgery import fused
    >>> g, v = torch.tensor([[10.0]], requires_grad=True), torch.tensor([[3.0, 4.0]], requires_grad=True)
    >>> small = SmallWeights([(g, v)])
    >>> w, = with_joint_graph(small, [0], small.make()) if fused.start() else ()
    >>> w.backward(torch.tensor([[1.0, 0.0]]))
    >>> g.grad, v.grad
    (tensor([[0.6000]]), tensor([[ 1.2800, -0.9600]]))
    """
    halves = [half for i in chosen for half in (small.g[i], small.v[i])]
    weights = tuple([made.weights[i] for i in chosen])
    return _apply(_Many(small, chosen, made.norms), weights, *halves)  # type: ignore[no-any-return]


def is_joint(w: Tensor) -> bool:
    """Whether a weight comes straight from a node that it has in common with others; a hook on it would also be called
    where it has no part in a backward pass, without a gradient."""
    return type(w.grad_fn) is _Node


class _Many:
    """What the backward pass needs: the pairs as they were, and ||v|| of each row."""

    def __init__(self, small: SmallWeights, chosen: Sequence[int], norms: Tensor) -> None:
        self._small, self._chosen, self._norms = small, chosen, norms
        self._versions = [(small.g[i]._version, small.v[i]._version) for i in chosen]

    def gradients(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """dL/dg and dL/dv of each pair in turn, None where no gradient has come."""
        small, found = self._small, list[Tensor | None]()
        together, norms_at = Gradients(small), self._norms.data_ptr()
        differentiable = torch.is_grad_enabled()
        for i, grad, versions in zip(self._chosen, grads, self._versions, strict=True):
            g, v = small.g[i], small.v[i]
            if grad is None:
                found += (_no_part(g), _no_part(v))
                continue
            if (g._version, v._version) != versions:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"g or v of a weight of shape {list(v.shape)}"
                )
            place = small.lines[i][3]
            ours = not differentiable and is_plain(grad)
            both = together.take(i, grad, norms_at + place) if ours else None
            if both is None:
                norms = None if differentiable else self._norms[place // 4 :][: g.numel()]
                both = first_order_gradients(grad, g, v, norms, Axes.of_pair(g.shape, v.shape), "linear")
            found += both
        together.finish()
        return found


class _ComposeTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, many: _Many, weights: Sequence[Tensor], *halves: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.many = many
        return tuple(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.many.gradients(grads)


# past the Python half of `Function.apply`, which unwraps what function transforms left: none is on
_apply: Any = torch._C._FunctionBase.__dict__["apply"].__get__(None, _ComposeTogether)
_Node: Any = _ComposeTogether._backward_cls
