"""What is done for each channel of float32 values: sums, scale and shift, lengths of rows; compiled by numba.

Values lie as (outer, channels, inner). They are cut into tiles: where `inner` is more than `SHORT`, into stretches of
at most `LINE` values of one channel; else into blocks of `STRIP` channels and some rows, the indices of `outer`. The
sums of each tile stand apart and are added in the order of the tiles, so that threads decide no bit.
"""

# mypy: ignore-errors
# ruff: noqa: PLR0913, PLR0917 - addresses and sizes
from __future__ import annotations

import math

import numpy as np
from numba import njit

from wnsurgery.fused_kernels import (
    column_squares,
    compiled,
    doubles_at,
    floats_at,
    in_parallel,
    kernel,
    numbers_at,
    parts_of,
    squares,
    strips_of,
    total_of,
)

__all__ = [
    "FACTORS",
    "JOBS",
    "LINE",
    "SHORT",
    "STRIP",
    "add_up",
    "columns_lengths",
    "in_parallel",
    "lengths",
    "many_lengths",
    "scale",
    "settle",
    "standardise",
    "sums",
    "worker",
]

SHORT = 1 << 7  # values of one channel that lie together, up to which they do not make a tile
LINE = 1 << 12  # values of one channel to a tile
STRIP = 1 << 9  # channels to a tile
FACTORS = 4 * 8  # bytes for each channel from where what `settle` finds begins to where its float32 do
_SUMS, _SCALE, _LENGTHS, _COLUMNS_LENGTHS = range(4)
JOBS = {  # how a job names its kernel
    "sums": _SUMS,
    "scale": _SCALE,
    "lengths": _LENGTHS,
    "columns_lengths": _COLUMNS_LENGTHS,
}

_any_order = njit(nogil=True, fastmath={"reassoc", "contract"})


@_any_order
def _stretch(tile, inner):
    """Which line a tile of one channel is of, and from where to where it goes."""
    pieces = -(-inner // LINE)
    line = tile // pieces
    start = line * inner + tile % pieces * LINE
    return line, start, min((line + 1) * inner, start + LINE)


@_any_order
def _sums_of_line(x, pivot, start, stop):
    """The sums of the distances from a number, and of their squares."""
    first, second = 0.0, 0.0
    for i in range(start, stop):
        distance = np.float64(x[i]) - pivot
        first += distance
        second += distance * distance
    return first, second


@_any_order
def _add_row(x, start, pivots, first, second, count):
    """Add the distances of a row's values from one number each, and their squares."""
    for c in range(count):
        distance = np.float64(x[start + c]) - pivots[c]
        first[c] += distance
        second[c] += distance * distance


@_any_order
def _add_lines(x, start, pivots, first, second, count, inner):
    """`_add_row` where each channel has several values in the row."""
    for c in range(count):
        line = start + c * inner
        one, two = _sums_of_line(x, pivots[c], line, line + inner)
        first[c] += one
        second[c] += two


@_any_order
def _sum_tiles(x, found, channels, inner, outer, rows, begin, end):
    """The sums of the tiles from `begin` to before `end`, of distances from the channel's very first value and of
    their squares: two numbers to a tile of one channel, two rows of `STRIP` to a tile of `rows` rows."""
    if inner > SHORT:
        for tile in range(begin, end):
            line, start, stop = _stretch(tile, inner)
            pivot = np.float64(x[line % channels * inner])
            found[2 * tile], found[2 * tile + 1] = _sums_of_line(x, pivot, start, stop)
        return
    strips = -(-channels // STRIP)
    pivots, first, second = np.empty(STRIP), np.empty(STRIP), np.empty(STRIP)
    for tile in range(begin, end):
        block, left = tile // strips, tile % strips * STRIP
        count = min(STRIP, channels - left)
        for c in range(count):
            pivots[c], first[c], second[c] = np.float64(x[(left + c) * inner]), 0.0, 0.0
        for row in range(block * rows, min(outer, (block + 1) * rows)):
            start = (row * channels + left) * inner
            if inner == 1:
                _add_row(x, start, pivots, first, second, count)
            else:
                _add_lines(x, start, pivots, first, second, count, inner)
        at = 2 * STRIP * tile
        for c in range(count):
            found[at + c], found[at + STRIP + c] = first[c], second[c]


@_any_order
def _add_up(x, parts, found, channels, inner, outer, tiles, clear):
    """From the sums of the tiles, for each channel: the mean, then the sum of squared distances from it. Whether all
    are finite and the root of every such sum, `clear` times, is more than the mean."""
    for c in range(2 * channels):
        found[c] = 0.0
    if inner > SHORT:
        for tile in range(tiles):
            c = _stretch(tile, inner)[0] % channels
            found[c] += parts[2 * tile]
            found[channels + c] += parts[2 * tile + 1]
    else:
        strips = -(-channels // STRIP)
        for tile in range(tiles):
            left, at = tile % strips * STRIP, 2 * STRIP * tile
            for c in range(min(STRIP, channels - left)):
                found[left + c] += parts[at + c]
                found[channels + left + c] += parts[at + STRIP + c]
    count, fine = np.float64(outer * inner), True
    for c in range(channels):
        offset = found[c] / count
        mean = np.float64(x[c * inner]) + offset
        squared = found[channels + c] - found[c] * offset
        if squared < 0:
            squared = 0.0
        found[c], found[channels + c] = mean, squared
        if not abs(mean) < math.sqrt(squared) * clear:
            fine = False
    return fine


@_any_order
def _scale_tiles(x, factors, channels, inner, outer, rows, begin, end):
    """x = x * factor + shift in the tiles from `begin` to before `end`; first all factors, then all shifts."""
    if inner > SHORT:
        for tile in range(begin, end):
            line, start, stop = _stretch(tile, inner)
            factor, shift = factors[line % channels], factors[channels + line % channels]
            for i in range(start, stop):
                x[i] = x[i] * factor + shift
        return
    strips = -(-channels // STRIP)
    for tile in range(begin, end):
        block, left = tile // strips, tile % strips * STRIP
        right = min(left + STRIP, channels)
        for row in range(block * rows, min(outer, (block + 1) * rows)):
            at = row * channels * inner
            if inner == 1:
                for c in range(left, right):
                    x[at + c] = x[at + c] * factors[c] + factors[channels + c]
            else:
                for c in range(left, right):
                    factor, shift = factors[c], factors[channels + c]
                    for i in range(at + c * inner, at + (c + 1) * inner):
                        x[i] = x[i] * factor + shift


@kernel
def sums(x_at, sums_at, channels, inner, outer, rows, begin, end):
    """`_sum_tiles` of values at an address."""
    _sum_tiles(floats_at(x_at), doubles_at(sums_at), channels, inner, outer, rows, begin, end)


@kernel
def add_up(x_at, sums_at, channels, inner, outer, tiles, clear, found_at):
    """`_add_up` of values at an address."""
    return _add_up(floats_at(x_at), doubles_at(sums_at), doubles_at(found_at), channels, inner, outer, tiles, clear)


@kernel
def scale(x_at, factors_at, channels, inner, outer, rows, begin, end):
    """`_scale_tiles` of values at an address."""
    _scale_tiles(floats_at(x_at), floats_at(factors_at), channels, inner, outer, rows, begin, end)


@_any_order
def _settle(
    x, parts, channels, inner, outer, tiles, clear, lengths_at, target, centre, shifts_at, g_at, bias_at, found_at
):
    """What gives each channel a deviation of `target`, and with `centre` a mean of zero; whether each deviation is
    clear, as in `_add_up`, else nothing is done.

    The values were multiplied by the length of a row each. To `found` go, of values that were not, mean, deviation,
    factor and shift, in four rows, and as float32 what the values as they are need be multiplied and shifted by.
    Without `centre` the shifts are given, or zero. Factors go to g, shifts to the bias if there is one."""
    found, lengths, factors = doubles_at(found_at), doubles_at(lengths_at), _factors_at(found_at, channels)
    shifts, g, bias = floats_at(shifts_at), floats_at(g_at), floats_at(bias_at)
    if not _add_up(x, parts, found, channels, inner, outer, tiles, clear):
        return False
    count = np.float64(outer * inner)
    for c in range(channels):
        length, shift = lengths[c], 0.0
        mean, deviation = found[c] / length, math.sqrt(found[channels + c] / count) / length
        factor = target / deviation
        if centre:
            shift = -mean * factor
        elif shifts_at != 0:
            shift = np.float64(shifts[c])
        found[c], found[channels + c], found[2 * channels + c], found[3 * channels + c] = mean, deviation, factor, shift
        g[c] = np.float32(factor)
        if bias_at != 0:
            bias[c] = np.float32(shift)
        factors[c], factors[channels + c] = np.float32(factor / length), np.float32(shift)
    return True


@_any_order
def _factors_at(found_at, channels):
    """Where what `_settle` finds has its float32."""
    return floats_at(found_at + FACTORS * channels)


@kernel
def settle(x_at, sums_at, channels, inner, outer, tiles, *rest):
    """`_settle` of values at an address, the sums of whose tiles are known."""
    return _settle(floats_at(x_at), doubles_at(sums_at), channels, inner, outer, tiles, *rest)


@kernel
def standardise(x_at, channels, inner, outer, rows, tiles, numbers, *rest):
    """`sums` with `numbers` to a tile, `settle` and `scale` one after the other, in one thread."""
    x, parts = floats_at(x_at), np.empty(tiles * numbers)
    _sum_tiles(x, parts, channels, inner, outer, rows, 0, tiles)
    clear = _settle(x, parts, channels, inner, outer, tiles, *rest)
    if clear:
        _scale_tiles(x, _factors_at(rest[-1], channels), channels, inner, outer, rows, 0, tiles)
    return clear


@kernel
def lengths(v_at, lengths_at, columns, begin, end):
    """||v|| of the rows from `begin` to before `end`, in float64."""
    v, found = floats_at(v_at), doubles_at(lengths_at)
    for r in range(begin, end):
        found[r] = math.sqrt(squares(v, r * columns, (r + 1) * columns))


@kernel
def columns_lengths(v_at, lengths_at, inputs, outputs, taps, first, last):
    """`lengths` with axis 1 kept, for the kept indices from `first` to before `last`: `taps` columns for each of the
    `outputs` of a group in each of its `inputs`."""
    found = doubles_at(lengths_at)
    for begin, end, skipped in strips_of(first, last, inputs, outputs, taps):
        sums = column_squares(floats_at(v_at + skipped), inputs, outputs, taps, begin, end)
        for o in range(end - begin):
            found[begin + o] = math.sqrt(total_of(sums, o, taps))


@kernel
def many_lengths(table_at, count):
    """`lengths` of many weights, or `columns_lengths` where there are inputs: to each belong six numbers, the address
    of v, that of its lengths, inputs, outputs, columns and rows."""
    table = numbers_at(table_at)
    for k in range(0, 6 * count, 6):
        inputs, outputs, columns, rows = table[k + 2], table[k + 3], table[k + 4], table[k + 5]
        if inputs:
            columns_lengths(table[k], table[k + 1], inputs, outputs, columns, 0, rows)
        else:
            lengths(table[k], table[k + 1], columns, 0, rows)


def _work(job):
    """This thread's parts of a job of these kernels."""
    for first, last in parts_of(job):
        if job[5] == _SUMS:
            sums(job[7], job[8], job[9], job[10], job[11], job[12], first, last)
        elif job[5] == _SCALE:
            scale(job[7], job[8], job[9], job[10], job[11], job[12], first, last)
        elif job[5] == _LENGTHS:
            lengths(job[7], job[8], job[9], first, last)
        else:
            columns_lengths(job[7], job[8], job[9], job[10], job[11], first, last)


def worker():
    """The C function that does its share of a job of these kernels."""
    return compiled(_work)
