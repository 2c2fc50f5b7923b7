"""The measured difference between two sets of tensors, bit by bit, and between two sets of outputs, within tolerance.

    compare_tensors(state_a, state_b).raise_for_status()       # weights: units in the last place
    compare_outputs(before, after).raise_for_status()          # outputs: |a - b| <= atol + rtol * max|b|

A report never raises by itself; `raise_for_status` does.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wnsurgery.errors import InputError, SelectionError, VerificationError, printable
from wnsurgery.text import by, columns

__all__ = [
    "OutputDifference",
    "OutputsReport",
    "TensorDifference",
    "TensorsReport",
    "as_array",
    "bits_changed",
    "check_tolerances",
    "compare_outputs",
    "compare_tensors",
    "is_float",
    "tolerance",
    "tolerance_reason",
    "ulp_distance",
]

Array = np.ndarray[Any, Any]

_NEVER = np.uint64(2**64 - 1)  # the distance between a number and NaN
_UNSIGNED = "float8_e8m0fnu"  # the one type without a sign: powers of two alone
_SHOWN = 20  # rows a report prints
_SHARE = 0.5  # of the largest element that the default atol is at most
_NEAR_ZERO = 1e-6  # outputs below this may be the rounding errors of larger numbers that cancel


# Bits ----------------------------------------------------------------------------------------------------


def as_array(value: Any) -> Array:
    """A tensor of torch, an array of numpy or anything array-like as a numpy array of the same bits.

    bfloat16 and the 8-bit floats arrive as `ml_dtypes`; tensors come to the CPU, without their graph. Raises InputError
    for meta, quantized and nested tensors, which are no arrays of numbers.

    >>> as_array([1.0, 2.0]).dtype
    dtype('float64')
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return np.asarray(value)
    odd = [kind for kind in ("meta", "quantized", "nested") if getattr(value, f"is_{kind}")]
    if odd:
        raise InputError(f"a {odd[0]} tensor is no array of numbers that could be compared")
    tensor: Any = value.detach().cpu().resolve_conj().resolve_neg()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    name = str(tensor.dtype).removeprefix("torch.")
    if name == "bfloat16" or name.startswith("float8"):
        import ml_dtypes

        bits = torch.int16 if tensor.element_size() == 2 else torch.uint8
        flat: Array = tensor.contiguous().reshape(-1).view(bits).numpy()
        return np.reshape(flat.view(getattr(ml_dtypes, name)), tuple(tensor.shape))
    array: Array = tensor.numpy()
    return array


def ulp_distance(a: Any, b: Any) -> Array:
    """How many representable numbers lie between two arrays, element by element, as uint64.

    0 where they are equal (+0 and -0 included) or both NaN; 2^64 - 1 where one is NaN. Integers and booleans:
    0 or 2^64 - 1.

    >>> ulp_distance(np.float32([1.0, -0.0]), np.float32([1.0000001, 0.0])).tolist()
    [1, 0]

    Args:
        a, b: torch tensors or arrays of the same shape and type: float64, float32, float16, bfloat16, or others.

    Raises ValueError when shapes or types differ.
    """
    x, y = as_array(a), as_array(b)
    if x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(f"arrays differ: {x.dtype} {x.shape} and {y.dtype} {y.shape}")
    if x.dtype.kind == "c":
        pairs = [np.stack([z.real, z.imag]) for z in (x, y)]
        return np.asarray(ulp_distance(*pairs).max(axis=0))
    if not is_float(x.dtype):
        return np.where(x == y, np.uint64(0), _NEVER)
    first, second = _ordered(x), _ordered(y)
    distance = np.maximum(first, second) - np.minimum(first, second)
    nan_x, nan_y = np.isnan(x), np.isnan(y)
    distance = np.where(nan_x != nan_y, _NEVER, distance)
    return np.where(nan_x & nan_y, np.uint64(0), distance)


def bits_changed(a: Any, b: Any) -> int:
    """How many elements differ in any bit; the sign of zero counts, two NaN count as equal.

    >>> bits_changed(np.float32([0.0, 1.0]), np.float32([-0.0, 1.0]))
    1
    """
    x, y = as_array(a), as_array(b)
    if x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(f"arrays differ: {x.dtype} {x.shape} and {y.dtype} {y.shape}")
    if x.dtype.kind == "c":
        pairs = [np.stack([z.real, z.imag]) for z in (x, y)]
        return bits_changed(*pairs)
    if not is_float(x.dtype):
        return int(np.count_nonzero(x != y))
    differ = _bits(x) != _bits(y)
    return int(np.count_nonzero(differ & ~(np.isnan(x) & np.isnan(y))))


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether a type is a real floating-point one, bfloat16 and the 8-bit ones included."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float8"))


def _is_inexact(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "c" or is_float(dtype)


def _bits(x: Array) -> Array:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}").reshape(x.shape)


def _ordered(x: Array) -> Array:
    """Bit patterns as unsigned integers in the order of the numbers, -0 on +0."""
    middle = np.uint64(1 << 63)
    bits = _bits(x).astype(np.uint64)
    if x.dtype.name == _UNSIGNED:
        return bits
    sign = np.uint64(1 << (8 * x.dtype.itemsize - 1))
    size = bits & (sign - np.uint64(1))
    return np.where(bits & sign != 0, middle - size, middle + size)


# Weights -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorDifference:
    """One tensor on both sides.

    Attributes:
        histogram: elements that are 0, 1, 2, 3-4 and more than 4 units in the last place apart.
        max_ulp: the largest distance; None where there is a NaN (or another integer) on one side only.
        bits_changed: elements that differ in any bit.
        reason: why it fails; "" where it does not.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    histogram: tuple[int, int, int, int, int]
    max_ulp: int | None
    bits_changed: int
    reason: str

    @property
    def ok(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class TensorsReport:
    """Two sets of tensors side by side; prints as a table of what differs.

    Attributes:
        tensors: every name that stands on both sides.
        only_a, only_b: names on one side only; each of them is a failure.
        max_ulp: the distance that was allowed.
    """

    tensors: tuple[TensorDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    max_ulp: int

    @property
    def ok(self) -> bool:
        """Same names, shapes and types, no NaN on one side only, nothing further apart than allowed; not empty."""
        return bool(self.tensors) and not self.only_a and not self.only_b and all(t.ok for t in self.tensors)

    @property
    def problems(self) -> tuple[str, ...]:
        """A sentence for each thing that is wrong."""
        lines = [] if self.tensors or self.only_a or self.only_b else ["there are no tensors to compare"]
        lines += [f"{name}: only on the first side" for name in self.only_a]
        lines += [f"{name}: only on the second side" for name in self.only_b]
        return (*lines, *(f"{t.name}: {t.reason}" for t in self.tensors if t.reason))

    def raise_for_status(self) -> None:
        """Raise VerificationError unless `ok`."""
        _raise_for(self.problems)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {"ok": self.ok, **{k: getattr(self, k) for k in ("tensors", "only_a", "only_b", "max_ulp")}}

    def __str__(self) -> str:
        changed = [t for t in self.tensors if t.bits_changed or t.reason]
        total = sum(int(np.prod(t.shape, dtype=np.int64)) for t in self.tensors)
        bits = sum(t.bits_changed for t in self.tensors)
        verdict = "passed" if self.ok else "FAILED"
        lines = [f"weights: {len(self.tensors)} tensors, {total} elements, {bits} differ: {verdict}"]
        if changed:
            rows: list[tuple[str, ...]] = [("tensor", "shape", "type", "0", "1", "2", "3-4", ">4 ulp", "max")]
            rows += [_tensor_row(t) for t in changed[:_SHOWN]]
            lines += columns(rows)
        return "\n".join([*lines, *_problem_lines(self.problems)])


def compare_tensors(a: Mapping[str, Any], b: Mapping[str, Any], *, max_ulp: int = 0) -> TensorsReport:
    """Compare two mappings from names to tensors: names, shapes, types, and every bit.

    >>> compare_tensors({"w": np.float32([1.0])}, {"w": np.float32([1.0])}).ok
    True

    Args:
        a, b: torch tensors or arrays under their names.
        max_ulp: the distance in units in the last place that still passes; 0 asks for equal bits.
    """
    shared = [name for name in a if name in b]
    return TensorsReport(
        tuple(_tensor_difference(name, as_array(a[name]), as_array(b[name]), max_ulp) for name in shared),
        tuple(printable(name) for name in a if name not in b),
        tuple(printable(name) for name in b if name not in a),
        max_ulp,
    )


def _tensor_difference(name: str, a: Array, b: Array, max_ulp: int) -> TensorDifference:
    shape, dtype, name = tuple(a.shape), a.dtype.name, printable(name)
    reason = _other_kind(a, b)
    if reason:
        return TensorDifference(name, shape, dtype, (0,) * 5, None, a.size, reason)
    ulp, changed = ulp_distance(a, b), bits_changed(a, b)
    edges = [np.count_nonzero(ulp <= np.uint64(limit)) for limit in (0, 1, 2, 4)]
    counts = [int(n) for n in np.diff([0, *edges, ulp.size])]
    histogram = (counts[0], counts[1], counts[2], counts[3], counts[4])
    largest = int(ulp.max(initial=np.uint64(0)))
    if largest == int(_NEVER):
        lost = int(np.count_nonzero(ulp == _NEVER))
        reason = f"{lost} elements are NaN on one side only" if is_float(a.dtype) else f"{lost} elements differ"
        return TensorDifference(name, shape, dtype, histogram, None, changed, reason)
    if largest > max_ulp:
        where = tuple(int(i) for i in np.unravel_index(int(ulp.argmax()), ulp.shape))
        reason = f"{changed} elements differ, by up to {largest} units in the last place (at {where})"
    elif changed and max_ulp == 0:
        reason = f"{changed} zeros differ in sign"
    return TensorDifference(name, shape, dtype, histogram, largest, changed, reason)


def _other_kind(a: Array, b: Array) -> str:
    if a.shape != b.shape:
        return f"shape {by(a.shape)} against {by(b.shape)}"
    return "" if a.dtype == b.dtype else f"type {a.dtype.name} against {b.dtype.name}"


def _tensor_row(t: TensorDifference) -> tuple[str, ...]:
    counts = ("-",) * 5 if t.bits_changed and not any(t.histogram) else tuple(map(str, t.histogram))
    return (t.name, by(t.shape), t.dtype, *counts, "-" if t.max_ulp is None else str(t.max_ulp))


# Outputs -------------------------------------------------------------------------------------------------


def tolerance(dtype: Any) -> tuple[float, float]:
    """The default (rtol, atol) for outputs of a type.

    float32 and float64: 256 eps relative to the largest element. Two correct runtimes add up the same products in
    different orders and use different exponentials; sums of thousands of terms through some dozens of layers end
    up tens of eps apart, wrong weights thousands. 16-bit types: 8 eps, because every layer rounds its result to
    eps / 2 and runtimes differ in where they do. atol is one eps, for outputs that should be zero beside others of size
    1 and for what is computed to so much of 1, as sigmoids are; at most half the largest element, though: outputs of
    1e-9 are held to their own size. Integers and booleans must be equal.

    >>> tolerance(np.float32)
    (3.0517578125e-05, 1.1920928955078125e-07)
    """
    dtype = _dtype(dtype)
    if dtype.kind == "c":
        dtype = np.dtype(np.float32 if dtype.itemsize == 8 else np.float64)
    if not is_float(dtype):
        return 0.0, 0.0
    import ml_dtypes

    eps = float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]
    return (256 if dtype.itemsize >= 4 else 8) * eps, eps


def check_tolerances(rtol: float | None, atol: float | None) -> None:
    """Refuse tolerances under which nothing could fail, or nothing could pass; None stands for the default.

    >>> check_tolerances(1e-3, None)

    Raises SelectionError for a tolerance that is negative, infinite or NaN.
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not 0 <= value < np.inf:
            raise SelectionError(f"{name}={value}: a tolerance is a number of 0 or more")


def tolerance_reason(dtype: Any) -> str:
    """Why `tolerance` allows what it does, in a sentence.

    >>> tolerance_reason(np.int64)
    'whole numbers must be equal'
    """
    dtype = _dtype(dtype)
    if not _is_inexact(dtype):
        return "whole numbers must be equal"
    if dtype.itemsize >= (8 if dtype.kind == "c" else 4):
        return "256 eps of the largest element: runtimes add up the same products in other orders"
    return "8 eps of the largest element: every layer rounds to 16 bits, and runtimes differ in where"


def _dtype(dtype: Any) -> np.dtype[Any]:
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    found: np.dtype[Any] = np.dtype(dtype)
    return found


@dataclass(frozen=True)
class OutputDifference:
    """One output on both sides.

    Attributes:
        max_abs, mean_abs: of |a - b| where both are finite.
        percentiles: of |a - b|: the median, 90 %, 99 % and 99.9 %.
        max_rel: max |a - b| / max |b|, the scale by which it is judged; inf where b is zero and a is not.
        mean_rel: mean |a - b| / max |b|.
        smallest: the smallest rtol that would have passed, with this atol; None where none would (NaN, infinities,
            other shapes or types).
        rtol, atol: passes when |a - b| <= atol + rtol * max |b| everywhere.
        worst: index of the largest difference.
        reason: why it fails; "" where it does not.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    max_abs: float
    mean_abs: float
    max_rel: float
    rtol: float
    atol: float
    worst: tuple[int, ...]
    reason: str
    mean_rel: float = 0.0
    percentiles: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    smallest: float | None = None

    @property
    def ok(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class OutputsReport:
    """Outputs of two runnables side by side; prints as a table."""

    outputs: tuple[OutputDifference, ...]
    missing: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Every output there on both sides and within tolerance; not empty."""
        return bool(self.outputs) and not self.missing and all(o.ok for o in self.outputs)

    @property
    def problems(self) -> tuple[str, ...]:
        """A sentence for each thing that is wrong."""
        lines = self.missing if self.outputs or self.missing else ("there are no outputs to compare",)
        return (*lines, *(f"{o.name}: {o.reason}" for o in self.outputs if o.reason))

    def raise_for_status(self) -> None:
        """Raise VerificationError unless `ok`."""
        _raise_for(self.problems)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {"ok": self.ok, "outputs": self.outputs, "missing": self.missing}

    def __str__(self) -> str:
        lines = [f"outputs: {len(self.outputs)} compared: {'passed' if self.ok else 'FAILED'}"]
        if self.outputs:
            head = ("max abs", "mean abs", "99 %", "max rel", "allowed rel", "rtol needed")
            rows: list[tuple[str, ...]] = [("output", "shape", "type", *head)]
            rows += [_output_row(o) for o in self.outputs[:_SHOWN]]
            lines += columns(rows)
            limits = ((o, *tolerance(o.dtype)) for o in self.outputs)
            kinds = dict.fromkeys(o.dtype for o, rtol, atol in limits if o.rtol == rtol and o.atol <= atol)
            lines += [f"  allowed for {kind}: {reason}" for kind in kinds if (reason := tolerance_reason(kind))]
        return "\n".join([*lines, *_problem_lines(self.problems)])


def compare_outputs(
    a: Mapping[str, Any] | Sequence[Any],
    b: Mapping[str, Any] | Sequence[Any],
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> OutputsReport:
    """Compare the outputs of two runnables, b being the reference: |a - b| <= atol + rtol * max|b|, per output.

    The scale is the output's largest element and not each element's own size: rounding errors of a sum follow its
    largest terms, so an element that cancels to almost nothing carries the error of its neighbours.

    NaN against anything but NaN fails, in either part of a complex number, and so do infinities that differ, other
    shapes, other types.

    >>> compare_outputs([np.float32([1.0, 2.0])], [np.float32([1.0, 2.1])]).ok
    False

    Args:
        a, b: both mappings (compared by name) or both sequences (compared by position).
        rtol, atol: override `tolerance(dtype)`.

    Raises SelectionError for tolerances that are none.
    """
    check_tolerances(rtol, atol)
    if isinstance(a, Mapping) != isinstance(b, Mapping):
        a, b = (list(x.values()) if isinstance(x, Mapping) else list(x) for x in (a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        missing = [f"{printable(n)}: only on the first side" for n in a if n not in b]
        missing += [f"{printable(n)}: only on the second side" for n in b if n not in a]
        pairs = [(str(n), a[n], b[n]) for n in a if n in b]
    else:
        missing = [] if len(a) == len(b) else [f"{len(a)} outputs against {len(b)}"]
        pairs = [(f"output {i}", x, y) for i, (x, y) in enumerate(zip(a, b, strict=False))]
    compared = (_output_difference(name, as_array(x), as_array(y), rtol, atol) for name, x, y in pairs)
    return OutputsReport(tuple(compared), tuple(missing))


def _output_difference(name: str, a: Array, b: Array, rtol: float | None, atol: float | None) -> OutputDifference:
    name, default = printable(name), tolerance(b.dtype)
    x, y = _parts(a), _parts(b)
    with np.errstate(over="ignore"):  # the modulus of a complex number may lie beyond float64
        scale = float(min(np.max(_modulus(np.where(np.isfinite(y), y, 0.0)), initial=0.0), np.finfo(np.float64).max))
    rtol = default[0] if rtol is None else rtol
    atol = min(default[1], _SHARE * scale) if atol is None else atol

    def verdict(reason: str, *figures: Any) -> OutputDifference:
        max_abs, mean_abs, max_rel, worst, *more = figures or (np.inf, np.inf, np.inf, ())
        parts = (name, a.shape, a.dtype.name, max_abs, mean_abs, max_rel, rtol, atol, worst, reason)
        return OutputDifference(*parts, *more)

    if reason := _other_kind(a, b):
        return verdict(reason)
    if a.size == 0:
        return verdict("", 0.0, 0.0, 0.0, (), 0.0, (0.0,) * 4, 0.0)
    with np.errstate(all="ignore"):
        alike = (x == y) | (np.isnan(x) & np.isnan(y))
        difference = _modulus(np.where(alike, 0.0, np.abs(x - y)))
    if not _is_inexact(a.dtype):  # beyond 2^53 they differ by one at least, even where float64 cannot tell them apart
        difference = np.where(a == b, 0.0, np.maximum(difference, 1.0))
    lost = (np.isnan(x) != np.isnan(y)).any(axis=0)
    finite = np.isfinite(difference)
    max_abs = float(difference[finite].max(initial=0.0))
    mean_abs = float(difference[finite].mean()) if finite.any() else np.inf
    worst = tuple(int(i) for i in np.unravel_index(int(np.where(finite, difference, np.inf).argmax()), a.shape))
    relative = [x / scale if scale else (0.0 if x == 0 else np.inf) for x in (max_abs, mean_abs)]
    figures: tuple[Any, ...] = (max_abs, mean_abs, relative[0], worst, relative[1], _percentiles(difference[finite]))
    if lost.any():
        return verdict(f"{int(lost.sum())} elements are NaN on one side only (first at {worst})", *figures)
    if not finite.all():
        return verdict(f"{int((~finite).sum())} infinities differ (first at {worst})", *figures)
    figures = (*figures, _smallest(max_abs, atol, scale))
    if not max_abs <= atol + rtol * scale:
        zeros = "; atol allows for what should be zero" if scale < _NEAR_ZERO and max_abs < _NEAR_ZERO else ""
        return verdict(f"off by {max_abs:.3g}, more than {atol + rtol * scale:.3g} (at {worst}){zeros}", *figures)
    return verdict("", *figures)


def _percentiles(differences: Array) -> tuple[float, float, float, float]:
    if not differences.size:
        return (np.inf,) * 4
    found = np.percentile(differences, (50, 90, 99, 99.9))
    return (float(found[0]), float(found[1]), float(found[2]), float(found[3]))


def _smallest(max_abs: float, atol: float, scale: float) -> float | None:
    """The rtol at which max_abs <= atol + rtol * scale just holds."""
    over = max(max_abs - atol, 0.0)
    if over == 0:
        return 0.0
    return float(np.nextafter(over / scale, np.inf)) if scale else None


def _parts(x: Array) -> Array:
    """The real and the imaginary parts of numbers, or real numbers alone, along a first axis, in float64."""
    if x.dtype.kind == "c":
        return np.stack([x.real, x.imag]).astype(np.float64)
    return x[np.newaxis].astype(np.float64)


def _modulus(parts: Array) -> Array:
    return np.asarray(np.hypot(parts[0], parts[1]) if len(parts) == 2 else np.abs(parts[0]))


def _output_row(o: OutputDifference) -> tuple[str, ...]:
    figures = (o.max_abs, o.mean_abs, o.percentiles[2], o.max_rel, o.rtol)
    return (o.name, by(o.shape), o.dtype, *(f"{x:.2e}" for x in figures), _enough(o.smallest))


def _enough(smallest: float | None) -> str:
    return "none" if smallest is None else f"{smallest:.2e}"


def _problem_lines(problems: Sequence[str]) -> list[str]:
    more = [f"  ... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return [f"  failed: {line}" for line in problems[:_SHOWN]] + more


def _raise_for(problems: Sequence[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise VerificationError(f"{problems[0]}{more}")
