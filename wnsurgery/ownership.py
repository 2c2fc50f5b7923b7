"""Whether a gradient that reaches a backward function is held by nobody else, so that its memory may be taken.

A tensor can be held through its object in Python, through other handles of the same tensor, through views of its
memory, through the tensor it is a view of, and through the memory's own object. What the counts of all these are when
nobody but the engine holds it depends on the versions of Python and torch; it is found out once, on gradients of four
elements. The references to its object are counted in the function that the engine itself calls: how many more there
are further in depends on how Python runs its calls, which a compiler or a debugger changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from threading import Thread
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

__all__ = ["counted", "holders_of", "is_private", "prepare"]

_Counts: TypeAlias = tuple[int, ...]
_Function = TypeVar("_Function", bound=type[torch.autograd.Function])


def counted(function: _Function) -> _Function:
    """Give an autograd function of one output its backward pass from its `receive(ctx, grad, count)`.

    The count is of the references to the gradient's object, for `is_private`; 0 where it could not be taken.
    """
    receive: Callable[[Any, Tensor, int], Any] = function.receive  # type: ignore[attr-defined]

    def apply(self: Any, grad: Tensor) -> Any:
        return receive(self, grad, sys.getrefcount(grad))

    function._backward_cls.apply = apply  # type: ignore[attr-defined]
    function.backward = staticmethod(lambda ctx, grad: receive(ctx, grad, 0))  # type: ignore[method-assign]
    return function


def is_private(grad: Tensor, count: int) -> bool:
    """Whether nobody but the engine holds a gradient, by the count that `receive` was given with it."""
    return count > 0 and _counts_are_plain() and holders_of(grad, count) in _when_private()


def prepare() -> None:
    """Find out the counts, outside of any backward pass."""
    _when_private()


def _counts_are_plain() -> bool:
    """Whether the interpreter itself runs this thread's calls; a compiler that does holds references of its own."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() is None


def holders_of(grad: Tensor, count: int) -> _Counts:
    """Everything that counts who holds a tensor or its memory; `count` is of the references to its object."""
    storage, base = grad.untyped_storage(), grad._base
    counts: _Counts = (count, grad._use_count(), sys.getrefcount(storage))  # type: ignore[attr-defined]
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


@counted
class _Counting(torch.autograd.Function):
    """Counts who holds the gradient that comes to it."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, found: list[_Counts]) -> Tensor:
        ctx.found = found
        return w.clone()

    @staticmethod
    def receive(ctx: Any, grad: Tensor, count: int) -> tuple[Tensor, None]:
        ctx.found.append(holders_of(grad, count))
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
    apart = Thread(target=_count, args=(alone, held))  # whose calls no compiler runs, whoever asks
    apart.start()
    apart.join()
    return frozenset() if set(alone) & set(held) else frozenset(alone)


def _count(alone: list[_Counts], held: list[_Counts]) -> None:
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
