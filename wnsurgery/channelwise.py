"""Sums, scale and shift of the channels of float32 values in the CPU's memory, and lengths of a weight's rows.

One pass over memory each, in the threads that torch has, by compiled kernels where numba is installed.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from wnsurgery import fused
from wnsurgery.row_threads import on_all_rows

__all__ = ["Sums", "channels_in", "cube_of", "is_taken", "lengths_of", "scale_and_shift", "standardise", "sums_of"]

_PLAIN = {Tensor, nn.Parameter}  # subclasses have operations of their own
_TILE = 1 << 15  # values to a tile of rows
_LEAST = 1 << 6  # values of a channel to a tile, at least: its sums take the room of four
_BLOCKS = 1 << 7  # tiles below one another, at most
_SPREAD = 1 << 18  # values from which several threads are worth their call


class Sums(NamedTuple):
    """What `sums_of` finds for each channel, in numpy's float64.

    Attributes:
        mean: the mean.
        m2: the sum of squared distances from it.
        clear: whether all is finite, and each deviation clearly larger than nothing.
    """

    mean: Any
    m2: Any
    clear: bool


def cube_of(values: Tensor, axis: int) -> Tensor:
    """All values as (outer, channels, inner): a view where the channels are at one place in memory's order."""
    if not values.is_contiguous():
        last = values.movedim(axis, -1)
        if last.is_contiguous():  # channels last: no need to copy
            values, axis = last, last.ndim - 1
    shape = values.shape
    return values.reshape(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))


def is_taken(values: Tensor) -> bool:
    """Whether the kernels are there and take this tensor."""
    return (
        type(values) in _PLAIN
        and values.dtype is torch.float32
        and values.is_cpu
        and values.is_contiguous()
        and not values.is_neg()
        and values.numel() > 0
        and fused.start()
    )


def channels_in(values: Tensor, axis: int) -> Tensor | None:
    """The values as `cube_of` gives them, to be written to; None where that is a copy, or nothing the kernels take.

    >>> x = torch.zeros(2, 3, 4)
    >>> channels_in(x, 1) is None or channels_in(x, 1).data_ptr() == x.data_ptr()
    True
    """
    cube = cube_of(values, axis % values.ndim)
    return cube if is_taken(cube) and cube.data_ptr() == values.data_ptr() else None


def sums_of(cube: Tensor, clear: float) -> Sums:
    """Of (outer, channels, inner) values that `is_taken`, summed in float64.

    clear: the root of m2, so many times, is to be more than the mean for a deviation to count as clear.

    >>> found = sums_of(torch.tensor([[1.0], [3.0]]).view(2, 1, 1), 1e6) if fused.start() else None
    >>> found and (found.mean.item(), found.m2.item(), found.clear)
    (2.0, 2.0, True)
    """
    tiled, found = _Tiled.of(cube), np.empty((2, cube.shape[1]))
    is_clear = tiled.add_up(clear, found)
    return Sums(found[0], found[1], is_clear)


def scale_and_shift(cube: Tensor, factors: Any) -> None:
    """x = x * factor + shift in (outer, channels, inner) values that `is_taken`.

    factors: numpy's float32, shape (2, channels): the factors, then the shifts.
    """
    _Tiled.of(cube).scale(factors.ctypes.data)
    increment_version(cube)


def standardise(
    cube: Tensor, clear: float, lengths: Any, target: float, g: Tensor, bias: Tensor | None, shifts: Tensor | None
) -> Any:
    """Scale and shift (outer, channels, inner) values that `is_taken` so that each channel's deviation is `target` and
    its mean zero; write to g and to the bias what does that to the values that rows of unit length would give.

    lengths: those of the rows that gave the values, numpy's float64. shifts: if given, what goes to the bias, and means
    become what they become. g, the bias and the shifts are `is_taken`, too, one number to a channel.

    Returns the values' mean and deviation with rows of unit length, the factors and the shifts, in numpy's float64,
    shape (4, channels); None, and nothing is done, where a deviation is not clear as in `sums_of`.
    """
    tiled, channels = _Tiled.of(cube), cube.shape[1]
    found = np.empty(5 * channels)  # the last row holds the factors in use, as float32
    at = found.ctypes.data
    told = shifts is None and bias is not None, *(0 if t is None else t.data_ptr() for t in (shifts, g, bias)), at
    if not tiled.standardise(clear, lengths.ctypes.data, target, *told):
        return None
    increment_version((cube, g) if bias is None else (cube, g, bias))
    return found[: 4 * channels].reshape(4, channels)


class _Tiled(NamedTuple):
    """Values as the kernels take them: where they are, their sizes, how many tiles they make, and how many numbers the
    sums of one take."""

    kernels: Any
    elements: int
    at: int
    sizes: tuple[int, int, int, int]
    tiles: int
    numbers: int

    @classmethod
    def of(cls, cube: Tensor) -> _Tiled:
        outer, channels, inner = cube.shape
        kernels, elements = _kernels(), outer * channels * inner
        if channels == 1:
            outer, inner = 1, elements
        if inner > kernels.SHORT:
            tiles = outer * channels * -(-inner // kernels.LINE)
            return cls(kernels, elements, cube.data_ptr(), (channels, inner, outer, 0), tiles, 2)
        strip = kernels.STRIP
        rows = max(_TILE // (min(channels, strip) * inner), -(-_LEAST // inner), -(-outer // _BLOCKS))
        tiles = -(-outer // rows) * -(-channels // strip)
        return cls(kernels, elements, cube.data_ptr(), (channels, inner, outer, rows), tiles, 2 * strip)

    def add_up(self, clear: float, found: Any) -> bool:
        """Mean and m2 of each channel; whether all deviations are clear."""
        parts = self._sums()
        at = parts.ctypes.data
        return self.kernels.add_up(self.at, at, *self.sizes[:3], self.tiles, clear, found.ctypes.data)  # type: ignore[no-any-return]

    def standardise(self, *numbers: Any) -> bool:
        """What the kernel of that name does, in several threads where there is enough to do; whether it did."""
        kernels = self.kernels
        if self._is_for_one():
            return kernels.standardise(self.at, *self.sizes, self.tiles, self.numbers, *numbers)  # type: ignore[no-any-return]
        parts = self._sums()
        clear: bool = kernels.settle(self.at, parts.ctypes.data, *self.sizes[:3], self.tiles, *numbers)
        if clear:
            self.scale(numbers[-1] + kernels.FACTORS * self.sizes[0])
        return clear

    def scale(self, factors_at: int) -> None:
        self._run("scale", self.at, factors_at, *self.sizes)

    def _sums(self) -> Any:
        """Those of the tiles."""
        parts = np.empty(self.tiles * self.numbers)
        self._run("sums", self.at, parts.ctypes.data, *self.sizes)
        return parts

    def _is_for_one(self) -> bool:
        """Whether there is too little to do for several threads."""
        return self.elements < _SPREAD or torch.get_num_threads() == 1

    def _run(self, name: str, *numbers: int) -> None:
        """Call a kernel for all tiles, in several threads where there is enough to do."""
        if self._is_for_one():
            getattr(self.kernels, name)(*numbers, 0, self.tiles)
        else:
            on_all_rows(self.kernels, self.elements, self.tiles, name, *numbers)


def lengths_of(weights: Sequence[tuple[Tensor, fused.Sizes]]) -> Any:
    """||v|| of each row of weights that `is_taken`, those of one after those of the other, in numpy's float64.

    >>> sizes = fused.Sizes(inputs=0, rows=1, columns=2)
    >>> lengths_of([(torch.tensor([[3.0, 4.0]]), sizes)]).tolist() if fused.start() else [5.0]
    [5.0]
    """
    kernels, found = _kernels(), np.empty(sum(sizes.rows for _, sizes in weights))
    at = found.ctypes.data
    if len(weights) == 1:
        v, sizes = weights[0]
        name, numbers = ("columns_lengths", sizes.told) if sizes.inputs else ("lengths", (sizes.columns,))
        on_all_rows(kernels, v.numel(), sizes.rows, name, v.data_ptr(), at, *numbers)
        return found
    table = array("q")
    for v, sizes in weights:
        table.extend((v.data_ptr(), at, *sizes.told, sizes.rows))
        at += found.itemsize * sizes.rows
    kernels.many_lengths(table.buffer_info()[0], len(weights))
    return found


@cache
def _kernels() -> Any:
    from wnsurgery import channel_kernels

    return channel_kernels
