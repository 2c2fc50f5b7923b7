"""Whether somebody stands between torch's operations and memory: a mode that records operations, gives back what it has
saved of them, or computes something else in their place; and how to get past him, and past function transforms and
compilers.

What compiled kernels write, such a mode does not see, and what it hands out need have no memory. Weights are then
computed by operations, the same ones each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

__all__ = ["aside", "depth", "goes_the_long_way", "is_intercepted", "not_compiled", "uncompiled"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_compiler: Any = torch._C._dynamo.eval_frame
_inference_mode, _transforms = torch.is_inference_mode_enabled, torch._C._functorch.peek_interpreter_stack
depth = torch._C._len_torch_dispatch_stack  # how many modes there are: none, nearly always


def is_intercepted() -> bool:
    """Whether torch's operations go through somebody's mode: not one that says it is `passive`, and leaves them alone.

    >>> is_intercepted()
    False
    """
    return bool(depth()) and not all(getattr(mode, "passive", False) for mode in _get_current_dispatch_mode_stack())


def goes_the_long_way() -> bool:
    """Whether a weight is not to be made by kernels here: in forward and inference mode, in function transforms and in
    somebody's mode."""
    special = forward_ad._current_level >= 0 or _inference_mode() or _transforms() is not None
    return special or bool(depth() and is_intercepted())


def not_compiled(function: Any) -> None:
    """Let torch's compiler neither look into a function nor compile it; what it calls is another matter."""
    function._torchdynamo_disable = True
    with suppress(AttributeError):  # torch's own `skip_code`, which lies in the compiler
        skip = _compiler._FrameExecStrategy(_compiler._FrameAction.SKIP, _compiler._FrameAction.DEFAULT)
        _compiler.set_code_exec_strategy(function.__code__, skip)


def uncompiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """A function that runs as it is written, with all it calls, wherever compiled code comes to it: what
    `torch.compiler.disable` makes, which would import the compiler."""

    @wraps(function)
    def as_written(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        before = _compiler.set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            _compiler.set_eval_frame(before)

    not_compiled(as_written)
    return as_written


@contextmanager
def aside() -> Iterator[None]:
    """For what is done once for all later uses, whoever looks at this one: past modes and function transforms, without
    graphs, and with ordinary tensors.

    >>> def f(x):
    ...     with aside():
    ...         assert torch.zeros(1).data_ptr()
    ...     return x
    >>> torch.func.grad(f)(torch.tensor(1.0))
    tensor(1.)
    """
    with ExitStack() as stack:
        if _transforms() is not None:
            stack.enter_context(temporarily_clear_interpreter_stack())
        if is_intercepted():
            stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield
