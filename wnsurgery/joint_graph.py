"""Small weights that have one node of the autograd graph in common.

A node written in Python costs a small weight many times its arithmetic, forward and backward. Here one node stands for
several weights, and its backward pass is one call of the compiled kernels.

Each weight's gradients are what a node of its own would give, also where only some of the weights take part in a
backward pass, or where several passes share the work among them: nothing is freed after the first, and a weight
without a gradient passes none on. What differs is the time: gradients come when the last of the weights has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from wnsurgery.placed import versions
from wnsurgery.reparam import Axes, first_order_gradients
from wnsurgery.small_weights import Made, SmallWeights

__all__ = [
    "all_may_share",
    "has_hooks",
    "is_in_backward",
    "is_joint",
    "may_share",
    "wants_own_node",
    "with_joint_graph",
]


_task: Any = torch._C._current_graph_task_id
_wants, _hooks, _later_hooks = (
    attrgetter(name) for name in ("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")
)


def is_in_backward() -> bool:
    """Whether this thread is in a backward pass, as it is where a checkpointed part is run again."""
    return _task() != -1  # type: ignore[no-any-return]


def may_share(g: Tensor, v: Tensor) -> bool:
    """Whether nothing hangs on the time at which a pair's gradients come: it wants some, and nobody has hooks on it.

    A hook would also be called without a gradient, where the pair has no part in a backward pass.
    """
    return not (has_hooks(g) or has_hooks(v)) and (g.requires_grad or v.requires_grad)


def all_may_share(small: SmallWeights) -> bool:
    """`may_share` of all pairs, in loops outside of Python; False also where one half of a pair wants no gradient."""
    halves = small.halves
    return all(map(_wants, halves)) and not (any(map(_hooks, halves)) or any(map(_later_hooks, halves)))


def wants_own_node(g: Tensor, v: Tensor) -> bool:
    """Whether a use of a weight now must not have its node in common with others: within a backward pass, and with
    hooks on the pair."""
    return is_in_backward() or has_hooks(g) or has_hooks(v)


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
    many = _Many(small, chosen, made.norms)
    return _apply(many, many.chosen(made.weights), *many.chosen(small.g), *many.chosen(small.v))  # type: ignore[no-any-return]


def is_joint(w: Tensor) -> bool:
    """Whether a weight comes straight from a node that it has in common with others; a hook on it would also be called
    where it has no part in a backward pass, without a gradient."""
    return type(w.grad_fn) is _Node


class _Many:
    """What the backward pass needs: the pairs as they were, and ||v|| of each row."""

    def __init__(self, small: SmallWeights, chosen: Sequence[int], norms: Tensor) -> None:
        self._small, self._norms, self._versions = small, norms, versions(small.halves)
        self._chosen = chosen if len(chosen) < len(small.v) else None  # None: all

    def chosen(self, each: Sequence[Any]) -> Sequence[Any]:
        """Of something for each weight, that of those that take part."""
        return each if self._chosen is None else [each[i] for i in self._chosen]

    def gradients(self, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """dL/dg of each pair, then dL/dv of each, None where no gradient has come."""
        small = self._small
        if self._chosen is not None:
            there = dict(zip(self._chosen, grads, strict=True))
            grads = [there.get(i) for i in range(len(small.v))]
        if versions(small.halves) != self._versions:
            self._refuse_changed(grads)
        to_g: list[Tensor | None] = [None] * len(grads)
        to_v: list[Tensor | None] = to_g.copy()
        differentiable = torch.is_grad_enabled()
        if not differentiable:
            to_g, to_v = small.pass_on(grads, small.norms_at(self._norms.data_ptr()))
        for i, part in enumerate(to_g):
            if part is None:
                to_g[i], to_v[i] = self._one(i, grads[i], differentiable=differentiable)
        return *self.chosen(to_g), *self.chosen(to_v)

    def _one(self, i: int, grad: Tensor | None, *, differentiable: bool) -> tuple[Tensor | None, Tensor | None]:
        """The gradients that the kernels do not take, of one pair."""
        g, v = self._small.g[i], self._small.v[i]
        if grad is None:
            return _no_part(g), _no_part(v)
        norms = None if differentiable else self._small.norms_of(i, self._norms)
        return first_order_gradients(grad, g, v, norms, Axes.of_pair(g.shape, v.shape), "linear")

    def _refuse_changed(self, grads: Sequence[Tensor | None]) -> None:
        """Raise where a pair was written to that a gradient has come for."""
        count, now = len(grads), versions(self._small.halves)
        for i, grad in enumerate(grads):
            if grad is not None and (now[i], now[count + i]) != (self._versions[i], self._versions[count + i]):
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"g or v of a weight of shape {list(self._small.v[i].shape)}"
                )


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
