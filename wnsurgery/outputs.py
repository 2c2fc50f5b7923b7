"""A layer's output with each channel scaled and shifted: in its own memory where nobody else can hold that.

Memory that was never used costs more than the arithmetic. Whether anybody but the pass itself holds an output is told
by the references to it, to its memory and to what it is a view of: there are none but those to an output that a module
makes on the spot and forgets. Hooks that ran earlier, attributes, caches and arrays over the memory all show there.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from wnsurgery.channelwise import channels_in, scale_and_shift
from wnsurgery.ownership import holders_of

__all__ = ["Fresh", "scaled"]

_IN_PLACE = (torch.float32, torch.float64)  # others are computed in a wider type


class _Makes(nn.Module):
    """Makes an output and forgets it: a tensor of its own, or a view of one."""

    def forward(self, view: bool) -> Tensor:
        made = torch.empty(2, 2, device="cpu")
        return made.t() if view else made


class Fresh:
    """Knows the outputs that nobody but the running pass holds, from a forward hook with keyword arguments.

    `sys.getrefcount(output)` is to be taken as the first thing in the hook, by itself. Where somebody watches all
    modules or all operations, no output counts as fresh.

    >>> fresh, seen = Fresh(), []
    >>> layer = nn.Linear(2, 2).requires_grad_(False)
    >>> def hook(module, args, kwargs, output):
    ...     references = sys.getrefcount(output)
    ...     seen.append(fresh.taken(output, references))
    >>> handle = layer.register_forward_hook(hook, with_kwargs=True)
    >>> _ = layer(torch.ones(1, 2))
    >>> seen
    [True]
    """

    def __init__(self) -> None:
        self._counts: set[tuple[int, ...]] = set()
        if _is_watched() or not (hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")):
            return
        maker = _Makes()
        maker.register_forward_hook(self._see, with_kwargs=True)
        with torch.no_grad():
            maker(False)
            maker(True)

    def _see(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        count = sys.getrefcount(output)
        self._counts.add(holders_of(output, count))

    def taken(self, output: Any, count: int) -> bool:
        """Whether the hook may write into the output."""
        return (
            type(output) is Tensor
            and output.is_cpu
            and output.dtype in _IN_PLACE
            and not (output.requires_grad or output.is_inference())
            and output.layout == torch.strided
            and (output.is_contiguous() or _is_channels_last(output))
            and holders_of(output, count) in self._counts
            and output.untyped_storage().resizable()  # else it may be the memory of an array, or of another process
            and not _is_watched()
        )


def _is_channels_last(output: Tensor) -> bool:
    return output.ndim == 4 and output.is_contiguous(memory_format=torch.channels_last)


def _is_watched() -> bool:
    dispatch, function = torch._C._len_torch_dispatch_stack(), torch._C._is_torch_function_mode_enabled()
    return bool(dispatch or function or torch_module._global_forward_hooks)


def scaled(output: Tensor, axis: int, scale: Any, shift: Any | None, *, in_place: bool) -> Tensor:
    """output * scale + shift, one (float64) number of numpy for each index of `axis`; computed in float32 at least."""
    if in_place and (cube := channels_in(output, axis)) is not None:
        factors = np.empty((2, len(scale)), np.float32)
        factors[0], factors[1] = scale, 0.0 if shift is None else shift
        scale_and_shift(cube, factors)
        return output
    work = output.dtype if in_place else torch.promote_types(output.dtype, torch.float32)
    view = [1] * output.ndim
    view[axis] = len(scale)
    factor = _numbers(scale, work, output.device).view(view)
    result = output.mul_(factor) if in_place else output.to(work) * factor
    if shift is not None:
        result += _numbers(shift, work, output.device).view(view)  # two calls: `addcmul` is several times slower
    return result if result.dtype == output.dtype else result.to(output.dtype)


def _numbers(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype == torch.float32:
        values = values.astype(np.float32)
    found = torch.from_numpy(values)
    return found if device.type == "cpu" else found.to(device)
