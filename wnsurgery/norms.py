"""The factor g / ||v|| for every row of a weight, accurate to half a unit in the last place at any magnitude.

Three rules make conversion exact and folding accurate:

* norms of 16- and 32-bit weights are taken in float64, norms of float64 weights in pairs of float64, so
  that neither the number of threads nor the device decides a bit of the result;
* where g is the stored value of ||v||, the factor is exactly one, so v is returned bit for bit; where it is
  that of 2^k ||v||, the factor is exactly 2^k, so that rescaling v by powers of two changes no bit of w;
* factors outside the range of the weight's type stay finite, and a row of zeros gets the factor zero.

A *row* is one kept index of the weight; "small" tensors below have one element per row.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "LARGE_FLOAT32",
    "SLACK",
    "SMALL",
    "RowScale",
    "is_stored_norm",
    "norm",
    "ordinary_factors",
    "plain_scale",
    "ridge_bits",
    "row_norms",
    "row_peak",
    "row_products",
    "row_scale",
    "snapped_quotient",
    "stored_magnitude",
    "wide_dtype",
    "wide_scratch",
]

_BLOCK = 1 << 18  # elements widened at a time: 2 MiB of float64, which stay in a core's cache
SMALL = 1 << 14  # elements up to which the calls cost more than the arithmetic
_SHORT = 32  # elements of a row below which a call for each row costs more than the row
_LONG = 1 << 13  # elements of a row from which BLAS would start threads of its own
SLACK = 2.0**-40  # more than the relative error of a norm in float64, whatever the order of summation
_NEAR = 8  # units in the last place around a power of two within which a factor may stand for that power


class RowScale(NamedTuple):
    """w = v * factor * shift^2, row by row. `shift` is a power of two, one unless g/||v|| leaves float64."""

    factor: Tensor
    shift: Tensor | None


def wide_dtype(v: Tensor) -> torch.dtype:
    """The type norms are computed in: float64, or float32 on devices without it."""
    return torch.float32 if v.device.type == "mps" else torch.float64


_ORDINARY = (Tensor, torch.nn.Parameter)  # subclasses have operations of their own


def norm(v: Tensor, dims: Sequence[int], *, blocked: bool) -> Tensor:
    """||v|| over `dims`, kept as size 1, in the wide type; float64 rows of any magnitude stay in range.

    `blocked` widens a cache-sized block of a large weight at a time, several times faster on a CPU; tracing and
    function transforms need the plain expression.
    """
    if v.dtype == torch.float64:
        return _Float64Rows(v, dims, blocked=blocked).value
    wide = wide_dtype(v)
    if not dims:
        return v.to(wide).abs()
    shape = [1 if d in dims else s for d, s in enumerate(v.shape)]
    blocked = blocked and v.device.type == "cpu" and v.numel() > 0 and type(v) in _ORDINARY
    rows = _as_rows(v, dims) if blocked else None
    if rows is not None:
        return (_small_row_norms if v.numel() <= SMALL else row_norms)(rows).view(shape)
    if not blocked or v.numel() <= SMALL:
        short: Tensor = torch.linalg.vector_norm(v, 2, tuple(dims), keepdim=True, dtype=wide)
        return short
    if dims[0] == 0 and v.is_contiguous():
        return _column_norms(v.view(v.shape[0], -1), v.shape[1:], [d - 1 for d in dims[1:]]).view(shape)
    step = max(1, _BLOCK * v.shape[0] // v.numel())
    total = torch.zeros(shape, dtype=wide, device=v.device) if 0 in dims else _empty(shape, v)
    room = _scratch(v[:step])
    for start in range(0, v.shape[0], step):
        part = room[: min(step, v.shape[0] - start)].copy_(v[start : start + step])
        if 0 not in dims:
            torch.linalg.vector_norm(part, 2, tuple(dims), keepdim=True, out=total[start : start + step])
            continue
        inner = tuple(d for d in dims if d)  # inner axes first: one reduction over both is several times slower
        part.square_()
        total += (part.sum(inner, keepdim=True) if inner else part).sum(0, keepdim=True)
    return total.sqrt_() if 0 in dims else total


def _as_rows(v: Tensor, dims: Sequence[int]) -> Tensor | None:
    """A view of the weight as a matrix whose rows the norms are of, None where its memory is in another order."""
    if tuple(dims) != tuple(range(dims[0], v.ndim)) or (dims[0] == 0 and v.numel() > SMALL):
        return None
    if not v.is_contiguous():
        if v.ndim != 4 or dims[0] != 1 or not v.is_contiguous(memory_format=torch.channels_last):
            return None
        v = v.permute(0, 2, 3, 1)
    return v.reshape(math.prod(v.shape[: dims[0]]), -1)


def _small_row_norms(rows: Tensor) -> Tensor:
    """||row|| for each row of a small matrix, in the order of summation of rows side by side."""
    wide = rows.to(torch.float64).view(-1).numpy()
    return torch.from_numpy(np.sqrt(np.add.reduceat(np.multiply(wide, wide, out=wide), _starts(*rows.shape))))


@lru_cache(maxsize=1024)
def _starts(count: int, length: int) -> Any:
    return np.arange(0, count * length, length)


def row_norms(rows: Tensor) -> Tensor:
    """||row|| for each row of a matrix, a block of rows at a time."""
    count, length = rows.shape
    step = max(1, _BLOCK // length)
    if length < _SHORT or (count * length >= _BLOCK and torch.get_num_threads() > 1):
        total = _empty((count, 1), rows)
        room = _scratch(rows[:step])
        for start in range(0, count, step):
            part = room[: min(step, count - start)].copy_(rows[start : start + step])
            if length < _SHORT:
                torch.linalg.vector_norm(part, 2, 1, keepdim=True, out=total[start : start + step])
            else:  # two operations that torch spreads over its threads, each row summed by one of them
                torch.sum(part.mul_(part), 1, keepdim=True, out=total[start : start + step])
        return total if length < _SHORT else total.sqrt_()
    squares = np.empty(count)
    most = min(step, count)
    wide = wide_scratch(most * length).reshape(most, length)
    # numpy widens faster than torch; `.numpy()` would forbid the storage to be resized, for good
    narrow = np.from_dlpack(rows.detach()) if rows.dtype == torch.float32 else None
    for start in range(0, count, step):
        block, stop = wide[: count - start], start + step
        if narrow is not None:
            np.copyto(block, narrow[start:stop])
        else:
            torch.from_numpy(block).copy_(rows[start:stop])
        row_products(block, block, squares[start:stop])
    return torch.from_numpy(np.sqrt(squares, out=squares)).view(count, 1)


def row_products(a: Any, b: Any, out: Any) -> None:
    """The scalar products of the rows of two matrices, in the calling thread."""
    np.vecdot(a[:, :_LONG], b[:, :_LONG], out=out)
    for column in range(_LONG, a.shape[1], _LONG):
        here = slice(column, column + _LONG)
        out += np.vecdot(a[:, here], b[:, here])


def _column_norms(v: Tensor, shape: Sequence[int], inner: Sequence[int]) -> Tensor:
    """||column|| of a matrix with the columns laid out in a shape of which the axes `inner` are summed over, too."""
    total = np.zeros(v.shape[1])
    step = max(1, _BLOCK // v.shape[1])
    room = _scratch(v[:step])
    for start in range(0, v.shape[0], step):
        part = room[: min(step, v.shape[0] - start)].copy_(v[start : start + step]).numpy()
        total += np.einsum("ij,ij->j", part, part)
    return torch.from_numpy(np.sqrt(np.atleast_1d(total.reshape(tuple(shape)).sum(tuple(inner)))))


class _Scratch(threading.local):
    """One block of float64 for each thread, warm: allocating it anew costs more than the arithmetic."""

    memory: Tensor | None = None
    array: Any = None


_scratches = _Scratch()


def wide_scratch(size: int) -> Any:
    """The thread's own memory as an array of so many float64, for what is done with before it is asked for again."""
    if size > _BLOCK:
        return np.empty(size)
    if _scratches.array is None:
        with torch.inference_mode(False):
            _scratches.array = _scratch(torch.empty(_BLOCK, dtype=torch.float64, device="cpu")).numpy()
    return _scratches.array[:size]


def _scratch(like: Tensor) -> Tensor:
    """Uninitialised float64 memory of a block's shape, the thread's own where it fits."""
    if like.numel() > _BLOCK:
        return _empty(like.shape, like)
    if _scratches.memory is None:
        with torch.inference_mode(False):
            _scratches.memory = _empty((_BLOCK,), like)
    return _scratches.memory[: like.numel()].view(like.shape)


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(tuple(shape), dtype=torch.float64, device=like.device)


def row_peak(v: Tensor, dims: Sequence[int]) -> Tensor:
    """The largest |element| of each row, kept as size 1; zero for rows without elements."""
    if not dims:
        return v.abs()
    return v.abs().amax(tuple(dims), keepdim=True) if v.numel() else v.abs().sum(tuple(dims), keepdim=True)


def stored_magnitude(v: Tensor, dims: Sequence[int], magnitude: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `decompose` stores for each row, and which rows are zeros: ||v||, saturating at the largest finite value,
    or its logarithm."""
    if v.dtype == torch.float64:
        rows = _Float64Rows(v, dims, blocked=True)
        return _store(rows.log if magnitude == "log" else rows.value, dtype), rows.zero
    norms = norm(v, dims, blocked=True)
    return _store(norms.log() if magnitude == "log" else norms, dtype), norms == 0


def _store(values: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return values.to(dtype).clamp(-limit, limit)


def row_scale(g: Tensor, v: Tensor, dims: Sequence[int], magnitude: str, *, blocked: bool) -> RowScale:
    """g / ||v|| per row, or e^g / ||v|| for a log-scale magnitude; `g` has the shape of the reduced v.

    float64 weights get the correctly rounded quotient; others get it rounded to 24 bits, held in the
    wide type so that no row overflows.
    """
    if v.dtype == torch.float64:
        return _row_scale_float64(g, v, dims, magnitude, blocked=blocked)
    wide = wide_dtype(v)
    norms = norm(v, dims, blocked=blocked)
    return RowScale(snapped_quotient(g, norms, wide, magnitude), None)


def plain_scale(g: Tensor, norms: Tensor, magnitude: str) -> tuple[Tensor, bool] | None:
    """`row_scale` in float32 for norms already taken, in a few operations, where every row is an ordinary one.

    Also says whether the norms can be squared in float32. None where some row needs the long way: its factor leaves
    float32, is zero or not finite, or g is so large that it may stand for a norm beyond its type. Looks at values: for
    eager mode on a CPU.
    """
    if magnitude == "linear" and g.dtype == torch.float32 and norms.ndim:
        return _linear_scale(g.detach(), norms.detach())
    low, high = torch.aminmax(norms)
    least, most = low.item(), high.item()
    squarable = least > 2.0**-30 and most < 2.0**30
    if not squarable or g.dtype == torch.float16:  # else g is bounded by the factor
        low, high = torch.aminmax(g)
        if magnitude == "linear" and max(-low.item(), high.item()) >= _large(g.dtype):
            return None
    factor = torch.div(g.to(norms.dtype).exp() if magnitude == "log" else g, norms).float()
    low, high = torch.aminmax(factor.abs())
    if not (low.item() >= 2.0**-60 and high.item() <= 2.0**60):
        return None
    if _may_be_powers(factor.abs(), magnitude):
        factor = snapped_quotient(g, norms, norms.dtype, magnitude).float()
    return factor, squarable


def _linear_scale(g: Tensor, norms: Tensor) -> tuple[Tensor, bool] | None:
    """`plain_scale` of float32 magnitudes.

    g itself is not handed to numpy, after which its storage could not be resized any more.
    """
    sums = norms.numpy()
    squarable = sums.min() > 2.0**-30 and sums.max() < 2.0**30
    if not squarable and not (sums.min() > 0 and sums.max() < math.inf and g.abs().max() < LARGE_FLOAT32):
        return None
    factor = _factors(g.clone().numpy(), sums)
    return (torch.from_numpy(factor), bool(squarable)) if _in_range(factor).all() else None


def ordinary_factors(g: Any, norms: Any) -> tuple[Any, Any]:
    """g / ||v|| in float32 from arrays of float32 and float64, one value per row, and which rows are ordinary ones.

    None for the latter means all. An ordinary row has a norm that can be squared in float32, and a factor well inside
    its range; the others need `row_scale`. In numpy, whose calls cost a fraction of torch's on so little.
    """
    factor = _factors(g, norms)
    sizes = np.abs(factor)
    if norms.min() > 2.0**-30 and norms.max() < 2.0**30 and sizes.min() >= 2.0**-60 and sizes.max() <= 2.0**60:
        return factor, None
    return factor, (norms > 2.0**-30) & (norms < 2.0**30) & _in_range(factor)


def _in_range(factor: Any) -> Any:
    sizes = np.abs(factor)
    return (sizes >= 2.0**-60) & (sizes <= 2.0**60)


def _factors(g: Any, norms: Any) -> Any:
    """g / ||v|| rounded to float32, a power of two exactly where g is the stored value of that multiple of ||v||."""
    with np.errstate(all="ignore"):  # rows that are not ordinary
        factor = (g / norms).astype(np.float32)
        near = ((factor.view(np.int32) + _NEAR) & 0x7FFFFF) <= 2 * _NEAR  # the bits of the fraction
        if near.any():  # rows that have not moved since conversion: all at first, dead ones later
            rows = np.nonzero(near)
            fraction, exponent = np.frexp(np.abs(factor[rows]))
            power = np.ldexp(1.0, exponent - (fraction < 0.75))
            stored, base = g[rows], norms[rows] * power
            low, high = (base * (1 - SLACK)).astype(np.float32), (base * (1 + SLACK)).astype(np.float32)
            factor[rows] = np.where((low <= stored) & (stored <= high), power.astype(np.float32), factor[rows])
    return factor


def _may_be_powers(sizes: Tensor, magnitude: str) -> bool:
    """Whether a factor is so close to a power of two that g may be the stored norm of the row, or of a rescaled one."""
    low, high = torch.aminmax(torch.frexp(sizes)[0])
    near = 2.0**-12 if magnitude == "log" else 2.0**-21
    return not (low.item() > 0.5 + near and high.item() < 1 - near)


def _large(dtype: torch.dtype) -> float:
    """A quarter of the largest finite value."""
    return torch.finfo(dtype).max / 4


LARGE_FLOAT32 = _large(torch.float32)


def snapped_quotient(g: Tensor, norms: Tensor, wide: torch.dtype, magnitude: str) -> Tensor:
    """|w| / ||v|| rounded to 24 bits, zero for rows of zeros, exactly one where g is the stored norm."""
    size = g.to(wide).exp() if magnitude == "log" else g.to(wide)
    zero = norms == 0
    quotient = size / torch.where(zero, torch.ones_like(norms), norms)
    quotient = torch.where(zero, torch.zeros_like(quotient), quotient)
    # the largest g are not rounded up, which would take w to infinity; they may stand for a norm beyond their type
    large = size.abs() >= LARGE_FLOAT32
    if wide == torch.float64:
        narrow = (quotient.abs().clamp(2.0**-120, 2.0**120) == quotient.abs()) & ~large
        quotient = torch.where(narrow, quotient.float().to(wide), quotient)
    slack = SLACK if wide == torch.float64 else 2.0**-22
    power = _nearest_power(torch.where(zero | large, torch.ones_like(quotient), quotient))
    same = is_stored_norm(g, norms * power, slack, magnitude)
    quotient = torch.where(same, power, quotient)
    return torch.where(zero, torch.zeros_like(quotient), quotient)


def _nearest_power(x: Tensor) -> Tensor:
    """The power of two nearest to |x| in ratio to within a factor sqrt(2), one for zero and what is not finite."""
    size = x.detach().abs()
    usable = torch.isfinite(size) & (size > 0)
    exponent = torch.where(usable, size, torch.ones_like(size)).log2().round()
    return torch.pow(2.0, exponent)  # exact for whole numbers; exporters know no exp2


def is_stored_norm(g: Tensor, norms: Tensor, slack: float, magnitude: str) -> Tensor:
    """Whether g, in 16 bits taken as float32, is what `stored_magnitude` gives for norms with an error of their own."""
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    if magnitude == "log":
        return _is_stored_log(g, norms.log())
    limit = torch.finfo(g.dtype).max
    low = (norms * (1 - slack)).to(g.dtype).clamp(max=limit)
    high = (norms * (1 + slack)).to(g.dtype)
    return (low <= g) & (g <= high)


def _is_stored_log(s: Tensor, logs: Tensor) -> Tensor:
    """The same for logarithms, whose own error is a few units in the last place."""
    spread = logs.abs().clamp(min=1.0) * (4 * torch.finfo(logs.dtype).eps)
    return ((logs - spread).to(s.dtype) <= s) & (s <= (logs + spread).to(s.dtype))


# float64: norms in pairs ---------------------------------------------------------------------------------


class _Float64Rows:
    """||v|| of float64 rows as high + low, about 2^-64 accurate, of v scaled by a power of two per row.

    ||v|| = (high + low) * unscale / lift. Each row is scaled so that its largest element lies in [1, 2).
    The leading bits of every element are split off so that their squares add up without any rounding,
    whatever the order (the idea of Ozaki's exact dot product); so are the leading bits of what they leave. The rest
    of that is so small that the order in which it is added decides nothing.
    """

    def __init__(self, v: Tensor, dims: Sequence[int], *, blocked: bool) -> None:
        blocked = blocked and v.numel() > _BLOCK and v.device.type == "cpu" and bool(dims)
        peak = torch.linalg.vector_norm(v, math.inf, tuple(dims), keepdim=True) if blocked else row_peak(v, dims)
        self.lift = torch.where(peak < 2.0**-900, 2.0**100, 1.0).to(v.dtype)
        exponent = _exponent(peak * self.lift)
        self.unscale = _power_of_two(exponent)
        self.exponent = exponent - torch.where(peak < 2.0**-900, 100, 0)
        down = _power_of_two(-exponent)
        count = int(max(1, v.numel() // max(1, peak.numel())))  # which `jit.trace` makes a tensor of
        ridges = tuple(1.5 * 2.0**bits for bits in ridge_bits(count))
        if not blocked:
            exact, second, rest = self._squares(v * self.lift * down, ridges, dims)
        else:
            exact, second, rest = (torch.zeros_like(peak) for _ in range(3))
            step = max(1, _BLOCK * v.shape[0] // v.numel())
            for start in range(0, v.shape[0], step):
                rows = slice(None) if 0 in dims else slice(start, start + step)
                scaled = v[start : start + step] * self.lift[rows] * down[rows]
                for sums, more in zip((exact, second, rest), self._squares(scaled, ridges, dims), strict=True):
                    sums[rows] += more
        rest = second + rest
        total = exact + rest
        error = rest - (total - exact)
        self.zero = total == 0
        total = torch.where(self.zero, torch.ones_like(total), total)
        root = total.sqrt()
        self.low = (_minus_product(total, root, root) + error) / (2 * root)
        self.high = torch.where(self.zero, torch.zeros_like(root), root)

    @staticmethod
    def _squares(scaled: Tensor, ridges: tuple[float, ...], dims: Sequence[int]) -> tuple[Tensor, ...]:
        """Sums over `dims` of the squares of the leading bits, of the leading bits of what they leave, both of which
        are exact, and of the rest."""
        first, second = ridges
        lead = (scaled + first) - first
        left = (scaled - lead) * (scaled + lead)
        leading = (left + second) - second
        parts = lead * lead, leading, left - leading
        return tuple(part.sum(tuple(dims), keepdim=True) for part in parts) if dims else parts

    @property
    def value(self) -> Tensor:
        """||v|| rounded to float64, infinite where it is beyond its range."""
        return (self.high + self.low) * self.unscale / self.lift

    @property
    def log(self) -> Tensor:
        """log ||v||, finite for every row but zeros."""
        return self.log_mantissa + self.exponent.to(self.high.dtype) * math.log(2)

    @property
    def log_mantissa(self) -> Tensor:
        """log ||v|| of the scaled rows."""
        return (self.high + self.low).log()


def ridge_bits(count: int) -> tuple[int, int]:
    """Powers of two such that adding 1.5 times them, and taking them off again, leaves of numbers below 2 the bits
    whose squares can be added up exactly, `count` of them; and those of what these squares lack, for their sum."""
    length = count.bit_length()
    bits = (49 - length) // 2
    second = 50 + bits - length  # what is left is below 2^(1 - bits)
    return 52 - bits, 52 - second


def _row_scale_float64(g: Tensor, v: Tensor, dims: Sequence[int], magnitude: str, *, blocked: bool) -> RowScale:
    rows = _Float64Rows(v, dims, blocked=blocked)
    size = g.to(v.dtype).exp() if magnitude == "log" else g.to(v.dtype)
    root = torch.where(rows.zero, torch.ones_like(rows.high), rows.high)
    exponent = _exponent(size)
    scaled = size * _power_of_two(-exponent)
    quotient = scaled / root
    quotient = quotient + (_minus_product(scaled, quotient, root) - quotient * rows.low) / root
    power = _nearest_power(quotient)
    if magnitude == "log":
        near = _is_stored_log(g.to(v.dtype), rows.log_mantissa + (exponent + power.log2()) * math.log(2))
    else:
        slack = root * 2.0**-62
        near = ((root + (rows.low - slack)) * power <= scaled) & (scaled <= (root + (rows.low + slack)) * power)
    quotient = torch.where(near, power, quotient)
    same = _is_stored_norm_float64(g.to(v.dtype), rows, magnitude)
    shift = torch.where(same, torch.zeros_like(exponent), exponent - rows.exponent)
    half = torch.div(shift - shift.clamp(-900, 900), 2, rounding_mode="trunc")
    half = torch.where(rows.zero, torch.zeros_like(half), half)
    factor = torch.where(same, torch.ones_like(quotient), quotient * _power_of_two(shift - 2 * half))
    factor = torch.where(rows.zero, torch.zeros_like(factor), factor)
    return RowScale(factor, _power_of_two(half))


def _is_stored_norm_float64(g: Tensor, rows: _Float64Rows, magnitude: str) -> Tensor:
    if magnitude == "log":
        return _is_stored_log(g, rows.log)
    limit = torch.finfo(g.dtype).max
    slack = rows.high * 2.0**-62
    low = ((rows.high + (rows.low - slack)) * rows.unscale / rows.lift).clamp(max=limit)
    high = ((rows.high + (rows.low + slack)) * rows.unscale / rows.lift).clamp(max=limit)
    return (low <= g) & (g <= high)


def _minus_product(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """c - a * b without the rounding of the product, for a * b close to c and all within float32's range."""
    a_high, b_high = a.float().to(a.dtype), b.float().to(b.dtype)
    a_low, b_low = a - a_high, b - b_high
    return ((c - a_high * b_high) - a_high * b_low - a_low * b_high) - a_low * b_low


def _exponent(x: Tensor) -> Tensor:
    """floor(log2 |x|) of normal float64 numbers, clamped to [-1000, 1022]; -1000 for zero and subnormals."""
    size = x.detach().abs()
    if torch._C._get_tracing_state() is not None:  # where numbers have no bits
        exponent = torch.frexp(size)[1].to(torch.int64) - 1
        exponent = torch.where(torch.isfinite(size), exponent, torch.full_like(exponent, 1022))
        return torch.where(size == 0, torch.full_like(exponent, -1000), exponent).clamp(-1000, 1022)
    return ((size.contiguous().view(torch.int64) >> 52) - 1023).clamp(-1000, 1022)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, exactly, for integers in [-1022, 1023]."""
    if torch._C._get_tracing_state() is not None:
        return torch.pow(2.0, exponent.to(torch.float64))
    return ((exponent + 1023) << 52).view(torch.float64)
