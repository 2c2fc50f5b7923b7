"""Steps of gradient descent on pairs, from dL/dw that goes in to w that comes out, in one pass over memory.

A row is read once: its gradients are those of `fused_kernels.rows_backward`, its weight is that of `rows_forward`; in
between v and g move by the operations of `torch.optim.SGD`, in its order and rounded after each as there.
"""

# mypy: ignore-errors
from __future__ import annotations

import math

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from wnsurgery.fused_kernels import (
    EIGHT,
    add_products,
    add_squares,
    coefficients,
    compiled,
    factor_of,
    floats_at,
    in_parallel,
    is_zero,
    kernel,
    numbers_at,
    parts_of,
    product,
    settle,
    squares,
    strips_of,
    total_of,
    write_columns,
    write_row,
)

__all__ = ["JOBS", "PLACES", "RULE", "columns_step", "in_parallel", "many_step", "rows_step", "worker"]

PLACES = ("up", "v", "g", "norms", "grad_g", "grad_v", "w", "past_v", "past_g", "inputs", "outputs", "columns")
RULE = ("rate", "decay", "keep", "add", "ahead")
_ROWS_STEP, _COLUMNS_STEP, _MANY_STEP = range(3)
JOBS = {"rows_step": _ROWS_STEP, "columns_step": _COLUMNS_STEP, "many_step": _MANY_STEP}  # how a job names its kernel
_LINE, _RULE = len(PLACES), len(RULE)
_W, _ROWS = PLACES.index("w"), PLACES.index("outputs")


@intrinsic
def _fma(_context, a, b, c):
    """a * b + c in float32, rounded once."""

    def generate(_context, builder, _signature, arguments):
        return builder.fma(*arguments)

    number = types.float32
    return number(number, number, number), generate


@njit(nogil=True)
def _move(x, grad, past, rule, start, stop):
    """Some elements of a parameter by one step, with their momentum if they have any."""
    rate, decay, keep, add, ahead = rule[0], rule[1], rule[2], rule[3], rule[4]
    if keep == 0:
        if decay == 0:
            for i in range(start, stop):
                x[i] = _fma(grad[i], rate, x[i])
        else:
            for i in range(start, stop):
                x[i] = _fma(_fma(x[i], decay, grad[i]), rate, x[i])
    elif decay == 0 and ahead == 0:
        for i in range(start, stop):
            move = _fma(grad[i], add, past[i] * keep)
            past[i] = move
            x[i] = _fma(move, rate, x[i])
    else:
        for i in range(start, stop):
            now = grad[i] if decay == 0 else _fma(x[i], decay, grad[i])
            move = _fma(now, add, past[i] * keep)
            past[i] = move
            x[i] = _fma(move if ahead == 0 else _fma(move, ahead, now), rate, x[i])


@njit(nogil=True, fastmath={"contract"})
def _pass_on(up, v, grad_v, across, along, start, stop):
    """dL/dv of a row."""
    for i in range(start, stop):
        grad_v[i] = up[i] * across - v[i] * along


@njit(nogil=True, fastmath={"contract"})
def _pass_on_and_move(up, v, across, along, rate, start, stop):
    """dL/dv of a row in the place of dL/dw, and v moved by it and nothing else."""
    for i in range(start, stop):
        slope = up[i] * across - v[i] * along
        up[i] = slope
        v[i] = _fma(slope, rate, v[i])


@kernel
def rows_step(places_at, rules_at, far, first, last):
    """One step of the rows of a weight from `first` to before `last`; whether each is an ordinary one afterwards. If
    not, g and v have moved and nothing in w is of use.

    At `places_at` stand `PLACES`, addresses but for the three numbers at the end, which are `fused.Sizes.told`; at
    `rules_at` the `RULE` of v, then that of g. Where `keep` is 0 there is no momentum. ||v|| is that of before, and
    becomes that of afterwards; dL/dv may take the place of dL/dw. With `far`, w is written past the cache.
    """
    p = numbers_at(places_at)
    up, v, g, norms, grad_g = floats_at(p[0]), floats_at(p[1]), floats_at(p[2]), floats_at(p[3]), floats_at(p[4])
    grad_v, past_v, past_g = floats_at(p[5]), floats_at(p[7]), floats_at(p[8])
    columns, of_v, of_g = p[11], floats_at(rules_at), floats_at(rules_at + 4 * _RULE)
    in_place, bare = p[0] == p[5], of_v[1] == 0 and of_v[2] == 0
    factors, fine = np.empty(EIGHT, np.float32), True
    for r in range(first, last):
        start, stop = r * columns, (r + 1) * columns
        if up[start] == 0 and is_zero(up, start, stop):
            grad_g[r], across, along = np.float32(0.0), np.float32(0.0), np.float32(0.0)
        else:
            grad_g[r], across, along = coefficients(product(up, v, start, stop), g[r], norms[r])
        if in_place and bare:
            _pass_on_and_move(up, v, across, along, of_v[0], start, stop)
        else:
            if in_place:  # told to be one array, which is safe in any order
                _pass_on(up, v, up, across, along, start, stop)
            else:
                _pass_on(up, v, grad_v, across, along, start, stop)
            _move(v, grad_v, past_v, of_v, start, stop)
        _move(g, grad_g, past_g, of_g, r, r + 1)
        norm = math.sqrt(squares(v, start, stop))
        factor = factor_of(g[r], norm)
        if math.isnan(factor):
            fine = False
        norms[r] = np.float32(norm)
        write_row(p[6], p[1], factor, factors, start, stop, far)
    if far:
        settle()
    return fine


@kernel
def columns_step(places_at, rules_at, far, first, last):
    """`rows_step` with axis 1 kept, for the kept indices from `first` to before `last`: so many in each group."""
    p = numbers_at(places_at)
    g, norms, grad_g, past_g = floats_at(p[2]), floats_at(p[3]), floats_at(p[4]), floats_at(p[8])
    inputs, outputs, taps = p[9], p[10], p[11]
    of_v, of_g = floats_at(rules_at), floats_at(rules_at + 4 * _RULE)
    in_place, fine = p[0] == p[5], True
    for begin, end, skipped in strips_of(first, last, inputs, outputs, taps):
        up, v = floats_at(p[0] + skipped), floats_at(p[1] + skipped)
        grad_v, past_v = floats_at(p[5] + skipped), floats_at(p[7] + skipped)
        width = (end - begin) * taps
        sums, factors = np.zeros(width, np.float64), np.empty(width + EIGHT, np.float32)
        across, along = np.empty(width, np.float32), np.empty(width, np.float32)
        add_products(up, v, sums, inputs, outputs, taps, begin)
        for o in range(end - begin):
            grad_g[begin + o], a, b = coefficients(total_of(sums, o, taps), g[begin + o], norms[begin + o])
            for j in range(o * taps, (o + 1) * taps):
                across[j], along[j], sums[j] = a, b, 0.0
        _move(g, grad_g, past_g, of_g, begin, end)
        for i in range(inputs):
            start = (i * outputs + begin) * taps
            if in_place:
                for j in range(width):
                    up[start + j] = up[start + j] * across[j] - v[start + j] * along[j]
            else:
                for j in range(width):
                    grad_v[start + j] = up[start + j] * across[j] - v[start + j] * along[j]
            _move(v, grad_v, past_v, of_v, start, start + width)
            add_squares(v, sums, start)
        for o in range(end - begin):
            norm = math.sqrt(total_of(sums, o, taps))
            factor = factor_of(g[begin + o], norm)
            if math.isnan(factor):
                fine = False
            norms[begin + o] = np.float32(norm)
            for j in range(o * taps, (o + 1) * taps):
                factors[j] = factor
        write_columns(p[6] + skipped, p[1] + skipped, factors, width, inputs, outputs, taps, begin, far)
    return fine


@kernel
def many_step(places_at, rules_at, first, last):
    """`rows_step` of many weights, from the line `first` to before `last`; 0 takes the place of the address of w for a
    weight with a row that is not an ordinary one."""
    p = numbers_at(places_at)
    for i in range(first, last):
        if not rows_step(places_at + 8 * _LINE * i, rules_at + 8 * _RULE * i, 0, 0, p[_LINE * i + _ROWS]):
            p[_LINE * i + _W] = 0


def _work(job):
    """This thread's parts of a job of these kernels."""
    for first, last in parts_of(job):
        fine = True
        if job[5] == _MANY_STEP:
            many_step(job[7], job[8], first, last)
        elif job[5] == _ROWS_STEP:
            fine = rows_step(job[7], job[8], job[9], first, last)
        else:
            fine = columns_step(job[7], job[8], job[9], first, last)
        if not fine:
            job[4] = 1


def worker():
    """The C function that does its share of a job of these kernels."""
    return compiled(_work)
