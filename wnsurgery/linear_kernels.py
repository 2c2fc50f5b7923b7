"""A linear layer some rows of its weight at a time, each multiplied by the thread that made it; compiled by numba.

What one core has written is slow to read for another, so a matrix product that divides rows among the threads as it
likes waits for them. Here a thread makes a few rows of w, or of dL/dw, in memory of its own and calls the BLAS product
that torch calls; inside a parallel region that runs in one thread. Weights are as in `fused_kernels`, axis 0 kept.
"""

# mypy: ignore-errors
# ruff: noqa: PLR0913, PLR0917 - addresses and sizes
from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from wnsurgery.fused_kernels import (
    compiled,
    floats_at,
    in_parallel,
    kernel,
    number_of_thread,
    numbers_at,
    parts_of,
    rows_backward,
    rows_forward,
)

__all__ = ["JOBS", "PLACES", "in_parallel", "linear_backward", "linear_forward", "worker"]

PLACES = (
    *("sgemm", "thread", "stretches", "inputs", "outputs", "columns", "rows", "v", "g", "norms", "x", "room"),
    *("y", "bias"),  # forward alone
    *("up", "scaled", "parts", "grad_g", "grad_v", "far"),  # backward alone
)
_FORWARD, _BACKWARD = range(2)
JOBS = {"linear_forward": _FORWARD, "linear_backward": _BACKWARD}  # how a job names its kernel
_AT = {name: place for place, name in enumerate(PLACES)}
_SGEMM, _THREAD, _STRETCHES, _ROOM = _AT["sgemm"], _AT["thread"], _AT["stretches"], _AT["room"]
_INPUTS, _OUTPUTS, _COLUMNS, _ROWS = _AT["inputs"], _AT["outputs"], _AT["columns"], _AT["rows"]
_V, _G, _NORMS, _X, _Y, _BIAS = _AT["v"], _AT["g"], _AT["norms"], _AT["x"], _AT["y"], _AT["bias"]
_UP, _SCALED, _PARTS, _FAR = _AT["up"], _AT["scaled"], _AT["parts"], _AT["far"]
_GRAD_G, _GRAD_V = _AT["grad_g"], _AT["grad_v"]
_N, _T = ord("N"), ord("T")


@intrinsic
def _call_sgemm(_context, at, of_a, of_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
    """The Fortran routine SGEMM at an address: everything goes by its place, and the lengths of two texts come last."""

    def generate(context, builder, _signature, arguments):
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(64)
        function = ir.FunctionType(ir.VoidType(), [*[pointer] * 13, word, word])
        call, *places = arguments
        given = [builder.inttoptr(place, pointer) for place in places]
        one = ir.Constant(word, 1)
        builder.call(builder.inttoptr(call, function.as_pointer()), [*given, one, one])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 14), generate


@njit(nogil=True)
def _multiply(sgemm, memory, of_a, of_b, m, n, k, a, lda, b, ldb, beta, c, ldc):
    """c = a b + beta c for matrices that lie column after column, a and b transposed where `of_a` and `of_b` say T.

    `memory` is room for eight numbers. Whether the routine reads 32 bits or 64 of an integer, it reads the same."""
    memory[0], memory[1], memory[2], memory[3], memory[4], memory[5] = m, n, k, lda, ldb, ldc
    at = memory.ctypes.data
    factors, texts = floats_at(at + 48), numbers_at(at + 56)
    factors[0], factors[1] = 1.0, beta
    texts[0] = of_a + 256 * of_b
    _call_sgemm(sgemm, at + 56, at + 57, at, at + 8, at + 16, at + 48, a, at + 24, b, at + 32, at + 52, c, at + 40)


@njit(nogil=True)
def _rows_of(table, stretch):
    """The rows from the first to before the last of one of the stretches into which the blocks of rows are divided."""
    rows, outputs, stretches = table[_ROWS], table[_OUTPUTS], table[_STRETCHES]
    blocks = (outputs + rows - 1) // rows
    return blocks * stretch // stretches * rows, min(outputs, blocks * (stretch + 1) // stretches * rows)


@njit(nogil=True)
def _own_room(table):
    """The memory of this thread for a block of rows."""
    thread = number_of_thread(table[_THREAD]) if table[_THREAD] else 0
    return table[_ROOM] + 4 * thread * table[_ROWS] * table[_COLUMNS]


@kernel
def linear_forward(table_at, first, last):
    """y = x w^T + bias and ||v|| for the stretches from `first` to before `last` of a table that `PLACES` names;
    whether each of their rows is an ordinary one, else nothing of it is of use. No bias where its address is 0."""
    t, memory = numbers_at(table_at), np.empty(8, np.int64)
    room, columns, inputs, outputs, block = _own_room(t), t[_COLUMNS], t[_INPUTS], t[_OUTPUTS], t[_ROWS]
    for stretch in range(first, last):
        start, stop = _rows_of(t, stretch)
        for at in range(start, stop, block):
            count = min(block, stop - at)
            v_at, y_at = t[_V] + 4 * at * columns, t[_Y] + 4 * at
            if not rows_forward(v_at, t[_G] + 4 * at, room, t[_NORMS] + 4 * at, columns, 0, 0, count):
                return False
            if t[_BIAS]:  # as torch does, so that the last bit is the same
                y, bias = floats_at(y_at), floats_at(t[_BIAS] + 4 * at)
                for i in range(inputs):
                    for j in range(count):
                        y[i * outputs + j] = bias[j]
            beta = 1.0 if t[_BIAS] else 0.0
            sizes, x_at = (count, inputs, columns), t[_X]
            _multiply(t[_SGEMM], memory, _T, _N, *sizes, room, columns, x_at, columns, beta, y_at, outputs)
    return True


@kernel
def linear_backward(table_at, first, last):
    """dL/dg and dL/dv from dL/dy for some stretches; where `scaled`, which is dL/dy * g / ||v||, has an address, also
    each stretch's part of dL/dx. `far` is that of `rows_backward`."""
    t, memory = numbers_at(table_at), np.empty(8, np.int64)
    room, columns, inputs, outputs, block = _own_room(t), t[_COLUMNS], t[_INPUTS], t[_OUTPUTS], t[_ROWS]
    for stretch in range(first, last):
        start, stop = _rows_of(t, stretch)
        part = t[_PARTS] + 4 * stretch * inputs * columns
        for at in range(start, stop, block):
            count = min(block, stop - at)
            v_at, up_at = t[_V] + 4 * at * columns, t[_UP] + 4 * at
            sizes = columns, count, inputs
            _multiply(t[_SGEMM], memory, _N, _T, *sizes, t[_X], columns, up_at, outputs, 0.0, room, columns)
            places = v_at, t[_G] + 4 * at, t[_NORMS] + 4 * at, t[_GRAD_G] + 4 * at, t[_GRAD_V] + 4 * at * columns
            rows_backward(room, *places, columns, t[_FAR], 0, count)
            if t[_SCALED]:  # last, when these rows of v have come near
                sizes, beta, of_y = (columns, inputs, count), 1.0 if at > start else 0.0, t[_SCALED] + 4 * at
                _multiply(t[_SGEMM], memory, _N, _N, *sizes, v_at, columns, of_y, outputs, beta, part, columns)


def _work(job):
    """This thread's parts of a job of these kernels."""
    for first, last in parts_of(job):
        if job[5] == _BACKWARD:
            linear_backward(job[7], first, last)
        elif not linear_forward(job[7], first, last):
            job[4] = 1


def worker():
    """The C function that does its share of a job of these kernels."""
    return compiled(_work)
