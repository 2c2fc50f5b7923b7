"""A layer's output with each channel scaled and shifted: in its own memory where nobody else can hold that.

Memory that was never used costs more than the arithmetic. Whether anybody but the pass itself holds an output is told
by the references to it, to its memory and to what it is a view of: there are none but those to an output that a module
makes on the spot and forgets. Hooks that ran earlier, attributes, caches and arrays over the memory all show there.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from wnsurgery.moments import Moments
from wnsurgery.ownership import holders_of

__all__ = ["Centred", "Fresh", "scaled"]

_SAMPLE = 8  # one in so many values tells about where the mean is
_NEAR = 16.0  # variances that the square of the distance to the mean may be
_LONG_ENOUGH = 32  # values in a row from which its own sum costs less than its values
_PIECE = 1 << 9  # values summed in float32
_IN_PLACE = (torch.float32, torch.float64)  # others are computed in a wider type


class _Makes(nn.Module):
    """Makes an output and forgets it: a tensor of its own, or a view of one."""

    def forward(self, view: bool) -> Tensor:
        made = torch.empty(2, 2, device="cpu")
        return made.t() if view else made


class Fresh:
    """Knows the outputs that nobody but the running pass holds, from a forward hook with keyword arguments.

    `taken(output, sys.getrefcount(output))` is to be asked as the first thing in the hook. Where somebody watches all
    modules or all operations, no output counts as fresh.

    >>> fresh, seen = Fresh(), []
    >>> layer = nn.Linear(2, 2).requires_grad_(False)
    >>> def hook(module, args, kwargs, output):
    ...     seen.append(fresh.taken(output, sys.getrefcount(output)))
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
    return output.ndim == 4 and output.is_contiguous(memory_format=torch.channels_last)  # noqa: PLR2004


def _is_watched() -> bool:
    dispatch, function = torch._C._len_torch_dispatch_stack(), torch._C._is_torch_function_mode_enabled()
    return bool(dispatch or function or torch_module._global_forward_hooks)


def scaled(output: Tensor, axis: int, scale: Any, shift: Any | None, *, in_place: bool) -> Tensor:
    """output * scale + shift, one (float64) number of numpy for each index of `axis`; computed in float32 at least."""
    work = torch.promote_types(output.dtype, torch.float32)
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


class Centred:
    """An output that holds its distances from a number near each channel's mean, and its moments.

    Written into the output's own memory, which is read three times while it is in the cache. Float32 is wide enough for
    the distances: they are rounded relative to themselves, and summed in short pieces.
    """

    @staticmethod
    def takes(output: Tensor, axis: int) -> bool:
        """Whether channels lie in long pieces, one after the other; of an output that may be written to."""
        axis %= output.ndim
        return (
            output.dtype is torch.float32
            and output.is_contiguous()
            and axis + 1 < output.ndim
            and output.numel() > 0
            and math.prod(output.shape[axis + 1 :]) >= _LONG_ENOUGH
        )

    def __init__(self, output: Tensor, axis: int) -> None:
        axis %= output.ndim
        channels, inner = output.shape[axis], math.prod(output.shape[axis + 1 :])
        self.output, self._cube = output, output.view(-1, channels, inner)
        pivot = self._cube[0, :, : -(-inner // _SAMPLE)].mean(1)
        self._cube.sub_(pivot[:, None])
        self._pivot = pivot.numpy().astype(np.float64)
        offset, m2, count = self._measured()
        if (offset * offset * (_NEAR * count) > m2).any():  # the sample was not like the rest
            closer = torch.from_numpy(offset.astype(np.float32))
            self._cube.sub_(closer[:, None])
            self._pivot += closer.numpy()
            offset, m2, count = self._measured()
        self.moments = Moments.around(self._pivot, offset, m2, count, self._cube)

    def _measured(self) -> tuple[Any, Any, int]:
        outer, channels, inner = self._cube.shape
        piece = math.gcd(inner, _PIECE)
        lines = np.from_dlpack(self._cube.view(-1, piece if piece >= _LONG_ENOUGH else inner))
        squares = np.vecdot(lines, lines).reshape(outer, channels, -1)
        first = self._cube.sum(2).numpy()
        count = outer * inner
        second = np.add.reduce(squares.reshape(outer, channels, -1), axis=(0, 2), dtype=np.float64)
        offset = np.add.reduce(first, axis=0, dtype=np.float64) / count
        return offset, np.maximum(second - offset * offset * count, 0.0), count

    def scaled(self, scale: Any, shift: Any | None) -> Tensor:
        """`scaled` of the output as it was."""
        whole = self._pivot * scale if shift is None else self._pivot * scale + shift
        self._cube.mul_(_numbers(scale, torch.float32, self.output.device)[:, None])
        self._cube.add_(_numbers(whole, torch.float32, self.output.device)[:, None])
        return self.output
