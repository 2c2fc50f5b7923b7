"""Weight norm and its gradients for 16-bit and float64 rows, and for a g stored as its logarithm, compiled by numba.

A kernel takes addresses of matrices that lie row after row in memory, and their sizes, as in `fused_kernels`. A row of
16 bits is widened to float32 a chunk at a time; what is added and multiplied there is what `fused_kernels` does with
float32. A row of float64 has its norm in a pair of float64, by the arithmetic of `norms`: the bits of both are equal.

Where g is stored as its logarithm s, forward kernels take e^s in float64 as `sizes` and where s lies as `logs_at`,
which is 0 elsewhere. Backward kernels take e^s for g.
"""

# mypy: ignore-errors
from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.core import config
from numba.extending import intrinsic

from wnsurgery.fused_kernels import (
    EIGHT,
    LEAST,
    MOST,
    coefficients,
    column_squares,
    compiled,
    doubles_at,
    factor_of,
    floats_at,
    in_parallel,
    kernel,
    parts_of,
    pointers_to,
    product,
    same_bits,
    squares,
    strips_of,
    total_of,
    write_columns,
    write_row,
)

__all__ = [
    "BFLOAT16",
    "FLOAT16",
    "JOBS",
    "columns_log_forward",
    "double_backward",
    "double_forward",
    "in_parallel",
    "log_forward",
    "short_backward",
    "short_forward",
    "worker",
]

FLOAT16, BFLOAT16 = range(2)
_CHUNK = 1 << 13  # elements widened at a time: they stay in the first level of the cache
_SHORT_FORWARD, _SHORT_BACKWARD, _DOUBLE_FORWARD, _DOUBLE_BACKWARD, _LOG_FORWARD, _COLUMNS_LOG_FORWARD = range(6)
JOBS = {  # how a job names its kernel
    "short_forward": _SHORT_FORWARD,
    "short_backward": _SHORT_BACKWARD,
    "double_forward": _DOUBLE_FORWARD,
    "double_backward": _DOUBLE_BACKWARD,
    "log_forward": _LOG_FORWARD,
    "columns_log_forward": _COLUMNS_LOG_FORWARD,
}
_TINY, _HUGE = 2.0**-100, 2.0**100  # between which g and the largest element of an ordinary float64 row are
_SLACK = 2.0**-62  # relative error of a norm in a pair
_NEAR_LOG = np.uint32(1 << 12)  # units in the last place around a power of two that e^s / ||v|| may stand for
_LOG_SLACK = 2.0**-50  # error of a logarithm, of its size if that is more than one
_LOG_TWO = math.log(2)

_exact = njit(nogil=True)
_shorts_at = pointers_to(types.uint16)


_float_of, _bits_of = same_bits(types.uint32, types.float32), same_bits(types.float32, types.uint32)
_double_of, _long_bits_of = same_bits(types.int64, types.float64), same_bits(types.float64, types.int64)


@intrinsic
def _plus(_context, total, x):
    """total + x, for a sum that may be taken in any order."""

    def generate(_context, builder, _signature, arguments):
        return builder.fadd(*arguments, flags=("reassoc",))

    return types.float64(types.float64, types.float64), generate


def _converts_halves():
    """Whether the processor that numba compiles for turns 16 bits into 32 and back, in the bits of what is below."""
    if config.CPU_NAME or config.CPU_FEATURES or not config.ENABLE_AVX:
        return False
    try:
        return bool(get_host_cpu_features().get("f16c"))
    except RuntimeError:  # it cannot be told
        return False


_has_halves = _converts_halves()


@intrinsic
def _widened_by_hardware(_context, half):
    """The value of an IEEE number of 16 bits."""

    def generate(_context, builder, _signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def _narrowed_by_hardware(_context, x):
    """An IEEE number of 16 bits, rounded to nearest, ties to even."""

    def generate(_context, builder, _signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


# a g that is stored as its logarithm ---------------------------------------------------------------------


@_exact
def _spread_of(log):
    """The error that a logarithm may have."""
    return max(abs(log), 1.0) * _LOG_SLACK


@_exact
def _log_factor(size, s, norm):
    """e^s / ||v|| in float32 for size = e^s, a power of two exactly where s is the stored logarithm of that multiple of
    ||v||; NaN where the row is not an ordinary one."""
    if not 2.0**-30 < norm < 2.0**30:
        return np.float32(np.nan)
    factor = np.float32(size / norm)
    bits = _bits_of(factor)
    if not LEAST <= bits <= MOST:
        return np.float32(np.nan)
    if ((bits + _NEAR_LOG) & np.uint32(0x7FFFFF)) <= 2 * _NEAR_LOG:
        power = _float_of((bits + _NEAR_LOG) & np.uint32(0x7F800000))
        log = math.log(norm * np.float64(power))
        spread = _spread_of(log)
        if np.float32(log - spread) <= s <= np.float32(log + spread):
            return power
    return factor


@_exact
def _factor_at(sizes_at, logs_at, r, norm):
    """The factor of a row from what is stored for it, in float32."""
    if logs_at:
        return _log_factor(doubles_at(sizes_at)[r], floats_at(logs_at)[r], norm)
    return factor_of(floats_at(sizes_at)[r], norm)


# 16 bits -------------------------------------------------------------------------------------------------


@_exact
def _widened(half):
    """The value of an IEEE number of 16 bits."""
    sign, rest = (half & np.uint32(0x8000)) << np.uint32(16), half & np.uint32(0x7FFF)
    bits = (rest << np.uint32(13)) + np.uint32(112 << 23)
    if rest >= 0x7C00:
        bits += np.uint32(112 << 23)  # infinite, or no number
    least = _float_of(np.uint32(113 << 23))
    small = _bits_of(_float_of((rest << np.uint32(13)) + np.uint32(113 << 23)) - least)  # of the smallest, exactly
    return _float_of(sign | (small if rest < 0x400 else bits))


@_exact
def _narrowed(x):
    """An IEEE number of 16 bits, rounded to nearest, ties to even."""
    bits = _bits_of(x)
    sign, rest = (bits >> np.uint32(16)) & np.uint32(0x8000), bits & np.uint32(0x7FFFFFFF)
    half = np.float32(0.5)
    small = _bits_of(_float_of(rest) + half) - _bits_of(half)
    odd = (rest >> np.uint32(13)) & np.uint32(1)
    normal = (rest - np.uint32(112 << 23) + np.uint32(0xFFF) + odd) >> np.uint32(13)
    found = small if rest < np.uint32(113 << 23) else normal
    if rest >= np.uint32(143 << 23):
        found = np.uint32(0x7E00) if rest > np.uint32(255 << 23) else np.uint32(0x7C00)
    return np.uint16(sign | found)


@_exact
def _narrowed_brain(x):
    """The first 16 bits of a float32, rounded to nearest, ties to even."""
    bits = _bits_of(x)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_number = (bits & np.uint32(0x7FFFFFFF)) <= np.uint32(255 << 23)
    return np.uint16(rounded if is_number else np.uint32(0x7FC0))


@_exact
def _values_of(room):
    """A pointer to the numbers of an array, good for as long as whoever asks still needs the array itself."""
    return floats_at(room.ctypes.data)


@_exact
def _widen(x, kind, start, count, room):
    """`count` elements from `start` on, as float32."""
    wide = _values_of(room)
    if kind == BFLOAT16:
        for i in range(count):
            wide[i] = _float_of(np.uint32(x[start + i]) << np.uint32(16))
    else:
        for i in range(count):
            wide[i] = _widened_by_hardware(x[start + i]) if _has_halves else _widened(np.uint32(x[start + i]))


@_exact
def _narrow(room, count, x, kind, start):
    """What `_widen` has widened, rounded."""
    wide = _values_of(room)
    if kind == BFLOAT16:
        for i in range(count):
            x[start + i] = _narrowed_brain(wide[i])
    else:
        for i in range(count):
            x[start + i] = _narrowed_by_hardware(wide[i]) if _has_halves else _narrowed(wide[i])


@_exact
def _scale(room, count, factor):
    wide = _values_of(room)
    for i in range(count):
        wide[i] *= factor


@_exact
def _combine(up_room, across, v_room, along, count):
    up, v = _values_of(up_room), _values_of(v_room)
    for i in range(count):
        up[i] = up[i] * across - v[i] * along


@kernel
def short_forward(v_at, sizes_at, w_at, norms_at, logs_at, kind, columns, first, last):
    """w = g * v / ||v|| and ||v||, g and ||v|| in float32, for the rows from `first` to before `last`; whether each is
    an ordinary one, else nothing of it is of use."""
    v, w, norms = _shorts_at(v_at), _shorts_at(w_at), floats_at(norms_at)
    room = np.empty(min(columns, _CHUNK), np.float32)
    for r in range(first, last):
        start, stop, total = r * columns, (r + 1) * columns, 0.0
        for begin in range(start, stop, _CHUNK):
            count = min(_CHUNK, stop - begin)
            _widen(v, kind, begin, count, room)
            total += squares(_values_of(room), 0, count)
        norm = math.sqrt(total)
        factor = _factor_at(sizes_at, logs_at, r, norm)
        if math.isnan(factor):
            return False
        norms[r] = np.float32(norm)
        for begin in range(start, stop, _CHUNK):
            count = min(_CHUNK, stop - begin)
            if columns > _CHUNK:
                _widen(v, kind, begin, count, room)
            _scale(room, count, factor)
            _narrow(room, count, w, kind, begin)
    return True


@kernel
def short_backward(up_at, v_at, g_at, norms_at, grad_g_at, grad_v_at, kind, columns, first, last):
    """dL/dg in float32 and dL/dv from dL/dw, whose place dL/dv may take."""
    up, v, grad_v = _shorts_at(up_at), _shorts_at(v_at), _shorts_at(grad_v_at)
    g, norms, grad_g = floats_at(g_at), floats_at(norms_at), floats_at(grad_g_at)
    size = min(columns, _CHUNK)
    wide_up, wide_v = np.empty(size, np.float32), np.empty(size, np.float32)
    for r in range(first, last):
        start, stop, total = r * columns, (r + 1) * columns, 0.0
        for begin in range(start, stop, _CHUNK):
            count = min(_CHUNK, stop - begin)
            _widen(up, kind, begin, count, wide_up)
            _widen(v, kind, begin, count, wide_v)
            total += product(_values_of(wide_up), _values_of(wide_v), 0, count)
        grad_g[r], across, along = coefficients(total, g[r], norms[r])
        for begin in range(start, stop, _CHUNK):
            count = min(_CHUNK, stop - begin)
            if columns > _CHUNK:
                _widen(up, kind, begin, count, wide_up)
                _widen(v, kind, begin, count, wide_v)
            _combine(wide_up, across, wide_v, along, count)
            _narrow(wide_up, count, grad_v, kind, begin)


# float64 -------------------------------------------------------------------------------------------------


@_exact
def _exponent(x):
    """floor(log2 |x|) of a normal number."""
    return ((_long_bits_of(x) >> 52) & 0x7FF) - 1023


@_exact
def _power_of_two(exponent):
    return _double_of((exponent + 1023) << 52)


@_exact
def _peak(v, start, stop):
    """The largest |element|, infinite or no number if one is."""
    most = np.int64(0)
    for i in range(start, stop):
        most = max(most, _long_bits_of(v[i]) & np.int64(0x7FFFFFFFFFFFFFFF))
    return _double_of(most)


@_exact
def _minus_product(c, a, b):
    """c - a * b, as `norms` has it."""
    a_high, b_high = np.float64(np.float32(a)), np.float64(np.float32(b))
    a_low, b_low = a - a_high, b - b_high
    return ((c - a_high * b_high) - a_high * b_low - a_low * b_high) - a_low * b_low


@_exact
def _norm_in_pair(v, start, stop, down, ridge, second_ridge):
    """||v * down|| as high and low, for a `down` with which the largest element comes to lie in [1, 2)."""
    exact, more, rest = 0.0, 0.0, 0.0
    for i in range(start, stop):
        x = v[i] * down
        lead = (x + ridge) - ridge
        left = (x - lead) * (x + lead)
        second = (left + second_ridge) - second_ridge
        exact = _plus(exact, lead * lead)
        more = _plus(more, second)
        rest = _plus(rest, left - second)
    rest = more + rest
    total = exact + rest
    error = rest - (total - exact)
    root = math.sqrt(total)
    return root, (_minus_product(total, root, root) + error) / (2 * root)


@_exact
def _quotient(scaled, high, low):
    """scaled / (high + low), and the exponent of the power of two that is nearest to it."""
    quotient = scaled / high
    quotient += (_minus_product(scaled, quotient, high) - quotient * low) / high
    place = _exponent(quotient)
    return quotient, place if abs(quotient) < 1.4 * _power_of_two(place) else place + 1


@_exact
def _double_factor(g, high, low, exponent):
    """g / ||v|| for ||v|| = (high + low) * 2^exponent: correctly rounded, a power of two exactly where g is the stored
    value of that multiple of ||v||."""
    if g == 0:
        return 0.0
    slack = high * _SLACK
    unscale = _power_of_two(exponent)
    if (high + (low - slack)) * unscale <= g <= (high + (low + slack)) * unscale:
        return 1.0
    own = _exponent(g)
    scaled = g * _power_of_two(-own)
    quotient, place = _quotient(scaled, high, low)
    power = _power_of_two(place)
    if (high + (low - slack)) * power <= scaled <= (high + (low + slack)) * power:
        quotient = power
    return quotient * _power_of_two(own - exponent)


@_exact
def _is_log(s, mantissa, exponent):
    """Whether s is what is stored for the logarithm of e^mantissa * 2^exponent."""
    log = mantissa + exponent * _LOG_TWO
    spread = _spread_of(log)
    return log - spread <= s <= log + spread


@_exact
def _double_log_factor(size, s, high, low, exponent):
    """The same of size = e^s, a power of two exactly where s is the stored logarithm of that multiple of ||v||; NaN
    where the last bit of a logarithm decides, in which libraries differ."""
    own = _exponent(size)
    quotient, place = _quotient(size * _power_of_two(-own), high, low)
    mantissa = math.log(high + low)  # of one or more
    bits = _long_bits_of(mantissa)
    first, last, known = max(np.int64(0), bits - 1), bits + 1, 0
    for others in range(first, last + 1):
        known += _is_log(s, _double_of(others), own + place)
    if known == last + 1 - first:
        quotient = _power_of_two(place)
    elif known:
        return np.nan
    return quotient * _power_of_two(own - exponent)


@kernel
def double_forward(v_at, sizes_at, w_at, norms_at, logs_at, columns, ridge_bits, second_bits, first, last):
    """`short_forward` of float64, with all in float64; for the ridges see `norms`: 1.5 times these powers of two."""
    v, sizes, w, norms = doubles_at(v_at), doubles_at(sizes_at), doubles_at(w_at), doubles_at(norms_at)
    ridge, second_ridge = 1.5 * _power_of_two(ridge_bits), 1.5 * _power_of_two(second_bits)
    for r in range(first, last):
        start, stop = r * columns, (r + 1) * columns
        peak, size = _peak(v, start, stop), abs(sizes[r])
        if not (_TINY < peak < _HUGE and (_TINY < size < _HUGE or (size == 0 and not logs_at))):
            return False
        exponent = _exponent(peak)
        high, low = _norm_in_pair(v, start, stop, _power_of_two(-exponent), ridge, second_ridge)
        norms[r] = (high + low) * _power_of_two(exponent)
        if logs_at:
            factor = _double_log_factor(size, doubles_at(logs_at)[r], high, low, exponent)
        else:
            factor = _double_factor(sizes[r], high, low, exponent)
        if math.isnan(factor):
            return False
        for i in range(start, stop):
            w[i] = v[i] * factor
    return True


@_exact
def _double_product(a, b, start, stop):
    total = 0.0
    for i in range(start, stop):
        total = _plus(total, a[i] * b[i])
    return total


@kernel
def double_backward(up_at, v_at, g_at, norms_at, grad_g_at, grad_v_at, columns, first, last):
    """`short_backward` of float64, with all in float64."""
    up, v, grad_v = doubles_at(up_at), doubles_at(v_at), doubles_at(grad_v_at)
    g, norms, grad_g = doubles_at(g_at), doubles_at(norms_at), doubles_at(grad_g_at)
    for r in range(first, last):
        start, stop = r * columns, (r + 1) * columns
        radial = _double_product(up, v, start, stop) / norms[r]
        grad_g[r] = radial
        across = g[r] / norms[r]
        along = across * radial / norms[r]
        if up_at == grad_v_at:  # a loop of its own, which the compiler knows to be safe in any order
            for i in range(start, stop):
                up[i] = up[i] * across - v[i] * along
        else:
            for i in range(start, stop):
                grad_v[i] = up[i] * across - v[i] * along


# float32 with a g that is stored as its logarithm -------------------------------------------------------


@kernel
def log_forward(v_at, sizes_at, w_at, norms_at, logs_at, columns, first, last):
    """`rows_forward` of float32 with g = e^s, s in float32."""
    v, sizes, norms, logs = floats_at(v_at), doubles_at(sizes_at), floats_at(norms_at), floats_at(logs_at)
    factors = np.empty(EIGHT, np.float32)
    for r in range(first, last):
        start, stop = r * columns, (r + 1) * columns
        norm = math.sqrt(squares(v, start, stop))
        factor = _log_factor(sizes[r], logs[r], norm)
        if math.isnan(factor):
            return False
        norms[r] = np.float32(norm)
        write_row(w_at, v_at, factor, factors, start, stop, 0)
    return True


@kernel
def columns_log_forward(v_at, sizes_at, w_at, norms_at, logs_at, inputs, outputs, taps, first, last):
    """The same with axis 1 kept, as `columns_forward` has it."""
    sizes, norms, logs = doubles_at(sizes_at), floats_at(norms_at), floats_at(logs_at)
    for begin, end, skipped in strips_of(first, last, inputs, outputs, taps):
        width = (end - begin) * taps
        sums = column_squares(floats_at(v_at + skipped), inputs, outputs, taps, begin, end)
        factors = np.empty(width + EIGHT, np.float32)
        for o in range(end - begin):
            norm = math.sqrt(total_of(sums, o, taps))
            factor = _log_factor(sizes[begin + o], logs[begin + o], norm)
            if math.isnan(factor):
                return False
            norms[begin + o] = np.float32(norm)
            for j in range(o * taps, (o + 1) * taps):
                factors[j] = factor
        write_columns(w_at + skipped, v_at + skipped, factors, width, inputs, outputs, taps, begin, 0)
    return True


def _work(job):
    """This thread's parts of a job of these kernels."""
    for first, last in parts_of(job):
        which, fine = job[5], True
        a, b, c, d, e, f = job[7], job[8], job[9], job[10], job[11], job[12]  # as many as the kernel takes
        if which == _SHORT_FORWARD:
            fine = short_forward(a, b, c, d, e, f, job[13], first, last)
        elif which == _SHORT_BACKWARD:
            short_backward(a, b, c, d, e, f, job[13], job[14], first, last)
        elif which == _DOUBLE_FORWARD:
            fine = double_forward(a, b, c, d, e, f, job[13], job[14], first, last)
        elif which == _DOUBLE_BACKWARD:
            double_backward(a, b, c, d, e, f, job[13], first, last)
        elif which == _LOG_FORWARD:
            fine = log_forward(a, b, c, d, e, f, first, last)
        else:
            fine = columns_log_forward(a, b, c, d, e, f, job[13], job[14], first, last)
        if not fine:
            job[4] = 1


def worker():
    """The C function that does its share of a job of these kernels."""
    return compiled(_work)
