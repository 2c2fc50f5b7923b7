"""Whether somebody stands between torch's operations and memory: a mode that records operations, gives back what it has
saved of them, or computes something else in their place.

What compiled kernels write, such a mode does not see, and what it hands out need have no memory. Weights are then
computed by operations, the same ones each time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

__all__ = ["depth", "goes_the_long_way", "is_intercepted", "past_modes"]

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


def past_modes() -> AbstractContextManager[Any]:
    """For what is computed once for all later uses, whoever looks at this one."""
    return _disable_current_modes() if is_intercepted() else nullcontext()
