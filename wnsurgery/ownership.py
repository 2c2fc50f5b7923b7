"""Whether a gradient that reaches a backward function is held by nobody else, so that its memory may be taken.

A tensor can be held through its object in Python, through other handles of the same tensor, through views of its
memory, through the tensor it is a view of, and through the memory's own object. What the counts of all these are when
nobody but the engine holds it depends on the versions of Python and torch; it is found out once, on two gradients of
four elements.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["holders", "is_private", "prepare"]

_Counts: TypeAlias = tuple[int, ...]


def holders(grad: Tensor) -> _Counts:
    """Everything that counts who holds a tensor or its memory; to be called with a local variable of a backward."""
    storage, base = grad.untyped_storage(), grad._base
    counts: _Counts = (sys.getrefcount(grad), grad._use_count(), sys.getrefcount(storage))  # type: ignore[attr-defined]
    counts += (torch._C._storage_Use_Count(storage._cdata),)
    return counts if base is None else (*counts, sys.getrefcount(base), base._use_count())  # type: ignore[attr-defined]


class _Upstream(torch.autograd.Function):
    """Passes a fresh gradient on, a tensor of its own or a view."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, view: bool) -> Tensor:
        ctx.view = view
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        fresh = torch.zeros(2, 2)
        return fresh.t() if ctx.view else fresh, None


class _Counting(torch.autograd.Function):
    """Counts who holds the gradient that comes to it."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, found: list[_Counts]) -> Tensor:
        ctx.found = found
        return w.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.found.append(holders(grad))
        return grad.clone(), None


_KEEPING: tuple[Callable[[Tensor], Any], ...] = (
    lambda grad: grad,
    lambda grad: grad.detach(),
    lambda grad: grad.untyped_storage(),
)


@cache
def _when_private() -> frozenset[_Counts]:
    """The counts of a gradient nobody else holds; none where they do not tell it from one that is held."""
    if not (hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")):
        return frozenset()
    alone: list[_Counts] = []
    held: list[_Counts] = []
    upstream: Any = _Upstream.apply
    counting: Any = _Counting.apply
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        for view in (False, True):
            w = torch.zeros(2, 2, requires_grad=True)
            upstream(counting(w, alone), view).backward()
            for keep in _KEEPING:
                kept: list[Any] = []
                passed = counting(w, held)
                passed.register_hook(lambda grad, keep=keep, kept=kept: kept.append(keep(grad)))
                upstream(passed, view).backward()
    return frozenset() if set(alone) & set(held) else frozenset(alone)


def prepare() -> None:
    """Find out the counts, outside of any backward pass."""
    _when_private()


def is_private(counts: _Counts) -> bool:
    """Whether `holders` found nobody but the engine."""
    return counts in _when_private()
