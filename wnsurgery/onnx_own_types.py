"""Operations of an ONNX graph in its own types: what a runtime computes, and how far another one may be from it.

Where numbers are rounded or compared, the last bit of what goes in decides what comes out. So what leads there is
computed as a runtime does, each operation on numbers of its types and its result rounded to its type. Sums,
exponentials and the like come out differently from one runtime to the next, and numbers of 16 bits are rounded by some
at every operation and by some at the last one: these carry a doubt along, and a decision within it is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

__all__ = ["FLOATS", "STEPS", "Evaluated", "Unknown", "in_own_type", "resolution"]

Array = np.ndarray[Any, Any]

FLOATS = (ir.DataType.DOUBLE, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_BYTES = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E5M2FNUZ)
_CASTS = frozenset(("Cast", "CastLike"))
_ROUNDING = frozenset(("Ceil", "Floor", "Round", "Sign"))
# the smallest change of an input may change the output by a whole step
STEPS = _CASTS | _ROUNDING | {"Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual"}

_MOVES = frozenset(
    ("Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Shape")
) | {"Size", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"}
_CHOICES = frozenset(("Abs", "Clip", "Max", "Min", "Neg", "ReduceMax", "ReduceMin", "Relu"))
_CORRECTLY_ROUNDED = frozenset(("Add", "DequantizeLinear", "Div", "Mul", "Reciprocal", "Sqrt", "Sub", "Sum"))
_SAME_EVERYWHERE = _MOVES | _CHOICES | _CORRECTLY_ROUNDED | STEPS
_SUMS = frozenset(("LpNormalization", "ReduceL1", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare"))
_PRODUCTS = frozenset(("Einsum", "Gemm", "MatMul"))
_NEAR_ONE = frozenset(("Erf", "HardSigmoid", "Sigmoid"))  # runtimes are right to so much of 1, not of small results
_FEW = 4  # units in the last place by which runtimes may differ in an exponential or the like
_SIGNS = ((1, 1), (-1, -1), (1, -1), (-1, 1))


class Unknown(Exception):  # noqa: N818 - not an error: an answer
    """The value of an expression cannot be told; its text says why."""


class Evaluated(NamedTuple):
    """A constant.

    Attributes:
        array: its value, floats as float64, large ones as float32.
        dtype: the type it has in the graph.
        doubt: by how much each element may be another one in another runtime; None where all agree.
    """

    array: Array
    dtype: ir.DataType
    doubt: Array | None = None


_Inputs = Sequence[Evaluated | None]


def in_own_type(node: ir.Node, inputs: _Inputs, run: Callable[[_Inputs], Evaluated]) -> Evaluated:
    """What an operation gives in the graph's own types; `run` carries it out on arrays, without rounding.

    Raises Unknown where runtimes may decide otherwise.
    """
    given = [None if x is None else x._replace(array=_plain(x.array, x.dtype)) for x in inputs]
    found = run(given)
    result, is_float = _rounded(found, node), _is_float(found.dtype)
    if _decides(node, found.dtype, given) or not is_float:
        for moved in _nudged(given):
            if not np.array_equal(_rounded(run(moved), node), result, equal_nan=is_float):
                raise Unknown(f"{node.op_type} decides on numbers that differ from one runtime to the next")
        return Evaluated(result, found.dtype)
    doubt = _own_doubt(node, given, found, result, run)
    passed_on = np.zeros((), doubt.dtype)
    for moved in _nudged(given):
        passed_on = np.maximum(passed_on, _distance(run(moved).array, found.array))
    doubt = doubt + passed_on
    return Evaluated(result, found.dtype, doubt if np.any(doubt) else None)


def resolution(dtype: ir.DataType) -> tuple[float, float]:
    """The relative step of a type, and the smallest number above zero."""
    import ml_dtypes

    info: Any = ml_dtypes.finfo(dtype.numpy())  # type: ignore[no-untyped-call]
    return float(info.eps), float(info.smallest_subnormal)


def _is_float(dtype: ir.DataType) -> bool:
    return bool(dtype.is_floating_point())


def _plain(array: Array, dtype: ir.DataType) -> Array:
    """A value in the type in which it is computed: float32 for all that is no wider, float64 for doubles."""
    if not _is_float(dtype):
        return array
    return array.astype(np.float64 if dtype == ir.DataType.DOUBLE else np.float32, copy=False)


def _decides(node: ir.Node, result: ir.DataType, inputs: _Inputs) -> bool:
    """Whether an operation takes numbers in steps, so that a small difference does not stay small."""
    source = None if not inputs or inputs[0] is None else inputs[0].dtype
    if node.op_type in _CASTS and source in FLOATS and result in FLOATS:
        return resolution(result)[0] > resolution(source)[0]
    return node.op_type in STEPS or not _is_float(result)


def _rounded(found: Evaluated, node: ir.Node) -> Array:
    """A result as its type holds it."""
    array, dtype = found.array, found.dtype
    if not _is_float(dtype):
        return array
    if dtype not in FLOATS + _BYTES:
        raise Unknown(f"{node.op_type} to {dtype.name.lower()}")
    if dtype in _BYTES:
        array = _saturated(array, dtype, node)
    narrow = array.astype(dtype.numpy())
    if dtype.itemsize < 4 and array.dtype == np.float64:
        twice = array.astype(np.float32).astype(dtype.numpy())  # as some runtimes do
        if not np.array_equal(narrow.astype(np.float32), twice.astype(np.float32), equal_nan=True):
            raise Unknown(f"{node.op_type} from double to {dtype.name.lower()} is rounded once or twice")
    return _plain(narrow, dtype)


def _saturated(array: Array, dtype: ir.DataType, node: ir.Node) -> Array:
    """Numbers too large for a type of 8 bits, infinity too, become its largest, unless a Cast says otherwise."""
    import ml_dtypes

    saturate = node.attributes.get("saturate")
    if saturate is not None and not saturate.value:
        return array
    largest: Any = float(ml_dtypes.finfo(dtype.numpy()).max)  # type: ignore[no-untyped-call]
    return np.clip(array, -largest, largest)


def _nudged(inputs: _Inputs) -> Iterator[list[Evaluated | None]]:
    """The inputs moved to where other runtimes may have them."""
    doubted = [i for i, x in enumerate(inputs) if x is not None and x.doubt is not None]
    for signs in _SIGNS[: 2 * min(len(doubted), 2)]:
        moved = list(inputs)
        for place, i in enumerate(doubted):
            x: Any = inputs[i]
            moved[i] = x._replace(array=(x.array + signs[place % 2] * x.doubt).astype(x.array.dtype))
        yield moved


def _distance(a: Array, b: Array) -> Array:
    """How far two results are apart; infinitely far where one of them is no number."""
    off = np.asarray(np.subtract(a, b))
    np.abs(off, out=off)
    np.copyto(off, np.inf, where=np.isnan(off))
    np.copyto(off, 0, where=(a == b) | (np.isnan(a) & np.isnan(b)))
    return off


def _own_doubt(
    node: ir.Node, inputs: _Inputs, found: Evaluated, result: Array, run: Callable[[_Inputs], Evaluated]
) -> Array:
    """By how much runtimes may differ in an operation on the same numbers."""
    eps = resolution(ir.DataType.DOUBLE if found.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT)[0]
    kept = _distance(found.array, result) if found.dtype.itemsize < 4 else np.zeros((), np.float32)
    if node.op_type in _SUMS | _PRODUCTS:
        sizes = [x._replace(array=np.abs(x.array)) if x is not None and _is_float(x.dtype) else x for x in inputs]
        return kept + eps * (_FEW + math.sqrt(_terms(node, inputs, found))) * np.abs(run(sizes).array)
    if node.op_type == "ReduceLogSum":
        return kept + eps * (_FEW + math.sqrt(_terms(node, inputs, found))) * (1 + np.abs(found.array))
    if _is_inverse(node, inputs):  # x * (1 / y) is x / y for some
        return kept + eps * np.abs(found.array)
    if node.op_type in _NEAR_ONE:
        return np.asarray(kept + eps * np.maximum(_FEW * np.abs(found.array), 1))
    return kept if node.op_type in _SAME_EVERYWHERE else kept + _FEW * eps * np.abs(found.array)


def _terms(node: ir.Node, inputs: _Inputs, found: Evaluated) -> int:
    """How many numbers make one of a sum."""
    arrays = [x.array for x in inputs if x is not None]
    if node.op_type in _PRODUCTS:
        return max(max(array.shape, default=1) for array in arrays)
    if node.op_type == "LpNormalization":
        return int(arrays[0].shape[node.attributes["axis"].value if "axis" in node.attributes else -1])
    return int(arrays[0].size // max(1, found.array.size))


def _is_inverse(node: ir.Node, inputs: _Inputs) -> bool:
    if node.op_type == "Div":
        return inputs[0] is not None and _is_float(inputs[0].dtype) and bool(np.all(inputs[0].array == 1))
    return node.op_type == "Reciprocal"
