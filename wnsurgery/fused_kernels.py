"""Weight norm and its gradients in one pass over memory, compiled by numba for the CPU it runs on.

A kernel takes addresses of float32 matrices that lie row after row in memory, and their sizes. Rows are summed in
float64, as in `norms`; a row is one kept index ("rows" kernels) or the columns are, `taps` of them for each kept index
("columns" kernels). The factor g / ||v|| follows the rules of `norms.ordinary_factors`.

numba keeps the compiled code beside this file, or in the user's cache directory, for the next process.
"""

# mypy: ignore-errors
# ruff: noqa: PLR0913, PLR0917 - addresses and sizes
from __future__ import annotations

import logging
import math
from contextlib import suppress

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

__all__ = [
    "EIGHT",
    "JOBS",
    "LEAST",
    "MOST",
    "add_products",
    "add_squares",
    "coefficients",
    "column_squares",
    "columns_backward",
    "columns_forward",
    "compiled",
    "doubles_at",
    "factor_of",
    "floats_at",
    "in_parallel",
    "is_zero",
    "kernel",
    "many_backward",
    "many_forward",
    "number_of_thread",
    "numbers_at",
    "parts_of",
    "pointers_to",
    "product",
    "rows_backward",
    "rows_forward",
    "same_bits",
    "settle",
    "squares",
    "strips_of",
    "total_of",
    "worker",
    "write_columns",
    "write_past_cache",
    "write_row",
]

_log = logging.getLogger("wnsurgery")
_SLACK = 2.0**-40
_NEAR = np.uint32(16)  # units in the last place around a power of two within which a factor may stand for that power
LEAST, MOST = (np.uint32((127 + power) << 23) for power in (-60, 60))  # bits of factors in an ordinary row
_CHUNK = 1 << 13  # elements summed at a stretch
_SHORT_CHUNK = 1 << 9  # the same in float32
_SHORT_PIECE = 1 << 6  # elements looked at to see whether all are zero
_LINE = 5  # numbers to a line of the table of many weights
_ROWS_FORWARD, _ROWS_BACKWARD, _COLUMNS_FORWARD, _COLUMNS_BACKWARD, _MANY_FORWARD, _MANY_BACKWARD = range(6)
JOBS = {  # how a job names its kernel
    "rows_forward": _ROWS_FORWARD,
    "rows_backward": _ROWS_BACKWARD,
    "columns_forward": _COLUMNS_FORWARD,
    "columns_backward": _COLUMNS_BACKWARD,
    "many_forward": _MANY_FORWARD,
    "many_backward": _MANY_BACKWARD,
}
EIGHT = 8  # elements written at a time past the cache

_fast = njit(nogil=True, fastmath={"reassoc", "contract"})  # sums in any order; nothing else is given up
_exact = njit(nogil=True)


def kernel(function):
    """Compile at the first call, or take what an earlier process has compiled."""
    options = {"nogil": True, "fastmath": {"reassoc", "contract"}}
    try:
        made = njit(cache=True, **options)(function)
    except RuntimeError:  # no place to write to
        return njit(**options)(function)
    cache = made._cache
    for name in ("load_overload", "save_overload"):
        setattr(cache, name, _or_start_anew(cache, getattr(cache, name)))
    return made


def _or_start_anew(cache, method):
    """What a damaged file says is forgotten: it is compiled anew, and kept anew the next time."""

    def attempt(*arguments):
        try:
            return method(*arguments)
        except Exception as error:  # unpickling garbage raises anything
            _log.info("numba's cache is damaged (%s): compiling anew", error)
            with suppress(OSError):
                cache.flush()
            return None

    return attempt


def pointers_to(kind):
    """A function that makes a pointer to numbers of this type of an address."""

    @intrinsic
    def at(_context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return at


def same_bits(source, target):
    """A function that takes the bits of one type for those of another."""

    @intrinsic
    def cast(_context, x):
        def generate(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

        return target(source), generate

    return cast


_bits_of = same_bits(types.float32, types.uint32)
floats_at, doubles_at, numbers_at = map(pointers_to, (types.float32, types.float64, types.int64))


def _eight_at(builder, pointer, index):
    """The place of eight elements of a float32 pointer."""
    return builder.bitcast(builder.gep(pointer, [index]), ir.VectorType(ir.FloatType(), EIGHT).as_pointer())


def _store_past_cache(builder, value, place):
    store = builder.store(value, place, align=EIGHT * 4)
    store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))


@intrinsic
def _scale_past_cache(_context, w, i, v, factors, j):
    """w[i + k] = v[i + k] * factors[j + k] for k below 8, past the cache; w[i] lies at a multiple of 32 bytes."""

    def generate(context, builder, _signature, arguments):
        to, at, source, factors, of = arguments
        v, f = (builder.load(_eight_at(builder, x, i), align=4) for x, i in ((source, at), (factors, of)))
        _store_past_cache(builder, builder.fmul(v, f), _eight_at(builder, to, at))
        return context.get_dummy_value()

    pointer, index = types.CPointer(types.float32), types.int64
    return types.void(pointer, index, pointer, pointer, index), generate


@intrinsic
def _subtract_past_cache(_context, to, i, a, p, b, q):
    """to[i + k] = a[i + k] * p[k] - b[i + k] * q[k] for k below 8, past the cache; to[i] lies at a multiple of 32
    bytes."""

    def generate(context, builder, _signature, arguments):
        to, at, *four = arguments
        zero = ir.Constant(ir.IntType(64), 0)
        places = (_eight_at(builder, x, i) for x, i in zip(four, (at, zero, at, zero), strict=True))
        a, p, b, q = (builder.load(place, align=4) for place in places)
        flags = ("reassoc", "contract")
        value = builder.fsub(builder.fmul(a, p, flags=flags), builder.fmul(b, q, flags=flags), flags=flags)
        _store_past_cache(builder, value, _eight_at(builder, to, at))
        return context.get_dummy_value()

    pointer, index = types.CPointer(types.float32), types.int64
    return types.void(pointer, index, pointer, pointer, pointer, pointer), generate


@intrinsic
def take_one(_context, at):
    """The number at an address, which another thread that asks finds greater by one."""

    def generate(_context, builder, _signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(types.int64), generate


@intrinsic
def _call_parallel(_context, parallel_at, worker_at, job_at, threads):
    """GOMP_parallel(worker, job, threads, 0), as compilers call it for OpenMP."""

    def generate(context, builder, _signature, arguments):
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = ir.FunctionType(ir.VoidType(), [pointer, pointer, word, word])
        parallel, worker, job = (
            builder.inttoptr(at, to)
            for at, to in zip(arguments, (function.as_pointer(), pointer, pointer), strict=False)
        )
        builder.call(parallel, [worker, job, builder.trunc(arguments[3], word), ir.Constant(word, 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def number_of_thread(_context, number_at):
    """omp_get_thread_num(), which lies there."""

    def generate(_context, builder, _signature, arguments):
        word = ir.IntType(32)
        function = builder.inttoptr(arguments[0], ir.FunctionType(word, []).as_pointer())
        return builder.sext(builder.call(function, []), ir.IntType(64))

    return types.int64(types.int64), generate


@intrinsic
def settle(_context):
    """Everything written is there for other threads to read, also what went past the cache."""

    def generate(context, builder, _signature, _arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@_exact
def factor_of(g, norm):
    """g / ||v|| in float32, a power of two exactly where g is the stored value of that multiple of ||v||; NaN where the
    row is not an ordinary one."""
    if not 2.0**-30 < norm < 2.0**30:
        return np.float32(np.nan)
    factor = np.float32(np.float64(g) / norm)
    if g == 0:
        return factor
    size = _bits_of(factor) & np.uint32(0x7FFFFFFF)
    if not LEAST <= size <= MOST:
        return np.float32(np.nan)
    if ((size + _NEAR) & np.uint32(0x7FFFFF)) <= 2 * _NEAR:
        fraction, exponent = math.frexp(np.float64(abs(factor)))
        power = math.ldexp(1.0, exponent - 1 if fraction < 0.75 else exponent)
        low = np.float32(norm * power * (1.0 - _SLACK))
        high = np.float32(norm * power * (1.0 + _SLACK))
        if low <= g <= high:
            return np.float32(power)
    return factor


@_fast
def squares(v, start, stop):
    total = 0.0
    for begin in range(start, stop, _CHUNK):
        part = 0.0
        for i in range(begin, min(begin + _CHUNK, stop)):
            x = np.float64(v[i])
            part += x * x
        total += part
    return total


@_fast
def product(a, b, start, stop):
    total = 0.0
    for begin in range(start, stop, _SHORT_CHUNK):
        part = np.float32(0.0)
        for i in range(begin, min(begin + _SHORT_CHUNK, stop)):
            part += a[i] * b[i]
        total += np.float64(part)
    return total


@_fast
def is_zero(up, start, stop):
    """Whether a row is all zeros."""
    for begin in range(start, stop, _SHORT_PIECE):
        part = np.float32(0.0)
        for i in range(begin, min(begin + _SHORT_PIECE, stop)):
            part += abs(up[i])
        if part != 0:
            return False
    return True


@_exact
def _whole_eights(at, start, stop):
    """From where to where, between two elements, eight of them at a time lie at multiples of 32 bytes."""
    first = min(stop, start + -(at // 4 + start) % EIGHT)
    return first, stop - (stop - first) % EIGHT


@_fast
def write_past_cache(w_at, v_at, factors_at, moving, start, stop):
    """w[i] = v[i] * factors[(i - start) * moving] from `start` to before `stop`; at least eight factors are there."""
    w, v, factors = floats_at(w_at), floats_at(v_at), floats_at(factors_at)
    first, last = _whole_eights(w_at, start, stop)
    for i in range(start, first):
        w[i] = v[i] * factors[(i - start) * moving]
    for i in range(first, last, EIGHT):
        _scale_past_cache(w, i, v, factors, (i - start) * moving)
    for i in range(last, stop):
        w[i] = v[i] * factors[(i - start) * moving]


@_fast
def write_row(w_at, v_at, factor, factors, start, stop, far):
    """w = v * factor for one row; `factors` is room for eight of them."""
    w, v = floats_at(w_at), floats_at(v_at)
    if far:
        factors[:] = factor
        write_past_cache(w_at, v_at, factors.ctypes.data, 0, start, stop)
    else:
        for i in range(start, stop):
            w[i] = v[i] * factor


@_exact
def strips_of(first, last, inputs, outputs, taps):
    """The kept indices from `first` to before `last` of a weight with axis 1 kept, those of each group by themselves:
    where they begin, where they end, and how many bytes further on the elements of that group lie than they would if it
    was the only one, and its first kept index 0."""
    while first < last:
        group = first // outputs
        end = min(last, (group + 1) * outputs)
        yield first, end, 4 * group * outputs * (inputs - 1) * taps
        first = end


@_fast
def add_products(a, b, sums, inputs, outputs, taps, first):
    """Add products over the inputs to one sum for each column, those of the kept index `first` and of more after it."""
    for i in range(inputs):
        start = (i * outputs + first) * taps
        for j in range(len(sums)):
            sums[j] += np.float64(a[start + j] * b[start + j])


@_fast
def add_squares(v, sums, start):
    """Add the squares of the elements from `start` on to one sum for each."""
    for j in range(len(sums)):
        x = np.float64(v[start + j])
        sums[j] += x * x


@_fast
def column_squares(v, inputs, outputs, taps, first, last):
    """The sum of squares over the inputs of each column, those of the kept indices from `first` to before `last`."""
    sums = np.zeros((last - first) * taps, np.float64)
    for i in range(inputs):
        add_squares(v, sums, (i * outputs + first) * taps)
    return sums


@_fast
def total_of(sums, o, taps):
    """The sum over the columns of one kept index."""
    total = 0.0
    for j in range(o * taps, (o + 1) * taps):
        total += sums[j]
    return total


@_fast
def write_columns(w_at, v_at, factors, width, inputs, outputs, taps, first, far):
    """w = v * factors for so many columns, from the kept index `first` on; at least eight factors more are there."""
    w, v = floats_at(w_at), floats_at(v_at)
    for i in range(inputs):
        start = (i * outputs + first) * taps
        if far:
            write_past_cache(w_at, v_at, factors.ctypes.data, 1, start, start + width)
        else:
            for j in range(width):
                w[start + j] = v[start + j] * factors[j]
    if far:
        settle()


@_exact
def coefficients(product, g, norm):
    """dL/dg, and what dL/dw and v are multiplied by in dL/dv."""
    inverse = 1.0 / np.float64(norm)
    radial, across = product * inverse, np.float64(g) * inverse
    return np.float32(radial), np.float32(across), np.float32(across * radial * inverse)


@kernel
def rows_forward(v_at, g_at, w_at, norms_at, columns, far, first, last):
    """w = g * v / ||v|| and ||v|| for the rows from `first` to before `last`; whether each is an ordinary one, else
    nothing of it is of use.

    With `far`, w is written past the cache: what is to be overwritten is not read first, nor kept near for a reader.
    """
    v, g, norms = floats_at(v_at), floats_at(g_at), floats_at(norms_at)
    factors = np.empty(EIGHT, np.float32)
    for r in range(first, last):
        start, stop = r * columns, (r + 1) * columns
        norm = math.sqrt(squares(v, start, stop))
        factor = factor_of(g[r], norm)
        if math.isnan(factor):
            return False
        norms[r] = np.float32(norm)
        write_row(w_at, v_at, factor, factors, start, stop, far)
    if far:
        settle()
    return True


@kernel
def rows_backward(up_at, v_at, g_at, norms_at, grad_g_at, grad_v_at, columns, far, first, last):
    """dL/dg and dL/dv from dL/dw; dL/dv may take the place of dL/dw. With `far`, it is else written past the cache.

    Rows without a gradient, as most of a lookup table's, are not read any further.
    """
    up, v, grad_v = floats_at(up_at), floats_at(v_at), floats_at(grad_v_at)
    g, norms, grad_g = floats_at(g_at), floats_at(norms_at), floats_at(grad_g_at)
    factors = np.empty(2 * EIGHT, np.float32)
    across_at = factors.ctypes.data
    p, q = floats_at(across_at), floats_at(across_at + 4 * EIGHT)
    for r in range(first, last):
        start, stop = r * columns, (r + 1) * columns
        if up[start] == 0 and is_zero(up, start, stop):
            grad_g[r] = 0.0
            if up_at != grad_v_at:
                for i in range(start, stop):
                    grad_v[i] = 0.0
            continue
        grad_g[r], across, along = coefficients(product(up, v, start, stop), g[r], norms[r])
        if up_at == grad_v_at:  # a loop of its own, which the compiler knows to be safe in any order
            for i in range(start, stop):
                up[i] = up[i] * across - v[i] * along
        elif far:
            factors[:EIGHT], factors[EIGHT:] = across, along
            begin, end = _whole_eights(grad_v_at, start, stop)
            for i in range(start, begin):
                grad_v[i] = up[i] * across - v[i] * along
            for i in range(begin, end, EIGHT):
                _subtract_past_cache(grad_v, i, up, p, v, q)
            for i in range(end, stop):
                grad_v[i] = up[i] * across - v[i] * along
        else:
            for i in range(start, stop):
                grad_v[i] = up[i] * across - v[i] * along
    if far:
        settle()


@kernel
def many_forward(table_at, weights_at, norms_at, first, last):
    """`rows_forward` of many weights, from the line `first` of a table to before `last`: a line holds the addresses of
    v and g, the place of the norms in their block, rows and columns. The address of w is taken from a list, where the
    answer takes its place: 0 for a weight with a row that is not an ordinary one."""
    t, w = numbers_at(table_at), numbers_at(weights_at)
    for i in range(first, last):
        k = i * _LINE
        if not rows_forward(t[k], t[k + 1], w[i], norms_at + t[k + 2], t[k + 4], 0, 0, t[k + 3]):
            w[i] = 0


@kernel
def many_backward(table_at, places_at, count, first, last):
    """`rows_backward` of many weights, by the same table of `count` lines; the addresses of dL/dw, norms, dL/dg and
    dL/dv are taken from four lists, one after the other. No dL/dw, no gradients."""
    t, p = numbers_at(table_at), numbers_at(places_at)
    for i in range(first, last):
        if p[i]:
            k = i * _LINE
            places = (p[i], t[k], t[k + 1], p[i + count], p[i + 2 * count], p[i + 3 * count])
            rows_backward(*places, t[k + 4], 0, 0, t[k + 3])


@kernel
def columns_forward(v_at, g_at, w_at, norms_at, inputs, outputs, taps, far, first, last):
    """`rows_forward` with axis 1 kept, for the kept indices from `first` to before `last`: `outputs` of them in each
    group, with so many `inputs` each."""
    g, norms = floats_at(g_at), floats_at(norms_at)
    for begin, end, skipped in strips_of(first, last, inputs, outputs, taps):
        width = (end - begin) * taps
        sums = column_squares(floats_at(v_at + skipped), inputs, outputs, taps, begin, end)
        factors = np.empty(width + EIGHT, np.float32)
        for o in range(end - begin):
            norm = math.sqrt(total_of(sums, o, taps))
            factor = factor_of(g[begin + o], norm)
            if math.isnan(factor):
                return False
            norms[begin + o] = np.float32(norm)
            for j in range(o * taps, (o + 1) * taps):
                factors[j] = factor
        write_columns(w_at + skipped, v_at + skipped, factors, width, inputs, outputs, taps, begin, far)
    return True


@kernel
def columns_backward(up_at, v_at, g_at, norms_at, grad_g_at, grad_v_at, inputs, outputs, taps, first, last):
    """`rows_backward` with axis 1 kept, for the kept indices from `first` to before `last`."""
    g, norms, grad_g = floats_at(g_at), floats_at(norms_at), floats_at(grad_g_at)
    for begin, end, skipped in strips_of(first, last, inputs, outputs, taps):
        up, v, grad_v = floats_at(up_at + skipped), floats_at(v_at + skipped), floats_at(grad_v_at + skipped)
        width = (end - begin) * taps
        sums = np.zeros(width, np.float64)
        across, along = np.empty(width, np.float32), np.empty(width, np.float32)
        add_products(up, v, sums, inputs, outputs, taps, begin)
        for o in range(end - begin):
            grad_g[begin + o], a, b = coefficients(total_of(sums, o, taps), g[begin + o], norms[begin + o])
            for j in range(o * taps, (o + 1) * taps):
                across[j], along[j] = a, b
        for i in range(inputs):
            start = (i * outputs + begin) * taps
            if up_at == grad_v_at:
                for j in range(width):
                    up[start + j] = up[start + j] * across[j] - v[start + j] * along[j]
            else:
                for j in range(width):
                    grad_v[start + j] = up[start + j] * across[j] - v[start + j] * along[j]


@_exact
def parts_of(job):
    """The parts of a job that this thread is to do, one after the other: the first row of each, and the one after its
    last.

    Each of the threads has a share, rows that lie one after the other, as torch's own operations divide them: so most
    of what a thread reads is what it wrote before. What others have not come to is taken last, so that one that is held
    up does less. A job holds the address of the numbers of the next pieces of the shares, that of `omp_get_thread_num`,
    the number of shares, of pieces to a share, whether a part said False, the kernel, the number of rows, what the
    kernel takes, and at the end those numbers.
    """
    shares, pieces, rows = job[2], job[3], job[6]
    share = number_of_thread(job[1])
    while share < 2 * shares:
        piece = take_one(job[0] + 8 * (share % shares))
        if piece < pieces:
            part = share % shares * pieces + piece
            yield rows * part // (shares * pieces), rows * (part + 1) // (shares * pieces)
        else:
            share += 1


def _work(job):
    """This thread's parts of a job of these kernels."""
    for first, last in parts_of(job):
        which, fine = job[5], True
        a, b, c, d, e, f = job[7], job[8], job[9], job[10], job[11], job[12]  # as many as the kernel takes
        if which == _ROWS_FORWARD:
            fine = rows_forward(a, b, c, d, e, f, first, last)
        elif which == _ROWS_BACKWARD:
            rows_backward(a, b, c, d, e, f, job[13], job[14], first, last)
        elif which == _COLUMNS_FORWARD:
            fine = columns_forward(a, b, c, d, e, f, job[13], job[14], first, last)
        elif which == _COLUMNS_BACKWARD:
            columns_backward(a, b, c, d, e, f, job[13], job[14], job[15], first, last)
        elif which == _MANY_FORWARD:
            many_forward(a, b, c, first, last)
        else:
            many_backward(a, b, c, first, last)
        if not fine:
            job[4] = 1


def worker():
    """The C function that does its share of a job of these kernels."""
    return compiled(_work)


def compiled(work):
    """A C function that does its share of a job, for `in_parallel`; it must be kept as long as its address is used."""
    signature = types.void(types.CPointer(types.int64))
    try:
        found = cfunc(signature, cache=True)(work)
    except Exception as error:  # no place to write to, or a damaged file
        _log.info("numba's cache is of no use (%s): compiling anew", error)
        with suppress(Exception):
            FunctionCache(work).flush()
        found = cfunc(signature)(work)
    return found


@kernel
def in_parallel(parallel_at, worker_at, job_at, threads):
    """Let so many threads of an OpenMP library work on a job, this one among them, until it is done."""
    _call_parallel(parallel_at, worker_at, job_at, threads)
