"""The constants of an ONNX graph, wherever they stand, and the weights of a model among them.

Exporters rename, transpose, split and merge weights, so one that is not found proves nothing. One that stands there
under its own name, in its own shape and type, with other bits, is another weight; only batch norms that were merged
into it explain that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from hashlib import sha256
from typing import Any

import numpy as np
import onnx_ir as ir

from wnsurgery.differences import as_array, compare_tensors
from wnsurgery.errors import printable
from wnsurgery.onnx_nodes import all_graphs

__all__ = ["constants_of", "contradictions", "fingerprint", "found_in", "is_weight"]

Array = np.ndarray[Any, Any]
Known = Mapping[str, Array]

_VARIANCES = ("running_var", "moving_variance")  # as torch and Keras call that of a batch norm


def constants_of(model: ir.Model) -> dict[str, Array]:
    """Every constant of a model by name: initializers and `Constant` nodes, of subgraphs and functions, too.

    A name that is given again, in another scope, is numbered: "w", "w (2)".
    """
    found: dict[str, Array] = {}
    for graph in all_graphs(model):
        for name, value in _constants(graph):
            number = 1
            while (key := name if number == 1 else f"{name} ({number})") in found:
                number += 1
            found[key] = value
    return found


def _constants(graph: ir.Graph | ir.Function) -> Iterator[tuple[str, Array]]:
    for value in getattr(graph, "initializers", {}).values():
        if value.const_value is not None:
            yield str(value.name), value.const_value.numpy()
    for node in graph:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            for attribute in node.attributes.values():
                array = None if attribute.is_ref() else _number(attribute)
                if array is not None:
                    yield str(node.outputs[0].name), array


def _number(attribute: ir.Attr) -> Array | None:
    """What a `Constant` gives; None for text and sparse tensors."""
    kind = attribute.type
    if kind == ir.AttributeType.TENSOR:
        array: Array = attribute.value.numpy()
        return array
    if kind in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
        return np.asarray(attribute.value, np.float32)
    return np.asarray(attribute.value, np.int64) if kind in (ir.AttributeType.INT, ir.AttributeType.INTS) else None


def is_weight(array: Array) -> bool:
    """Whether it is more than a counter or a flag, which do not go into a graph."""
    return array.ndim > 0 and array.dtype.kind not in "iub"


def found_in(graph: Mapping[str, Any], known: Known) -> dict[str, Array]:
    """For each tensor that of a graph which has its name, shape and type; else one with its very bytes, straight or
    transposed; else the one of its name."""
    arrays = {name: as_array(value) for name, value in graph.items()}
    by_bytes = _by_bytes(arrays)
    found: dict[str, Array] = {}
    for name, array in known.items():
        own = arrays.get(name)
        if own is not None and _alike(own, array) and not _is_transpose(own, array):
            found[name] = own
        elif fingerprint(array) in by_bytes:
            found[name] = arrays[by_bytes[fingerprint(array)]]
        elif array.ndim == 2 and fingerprint(array.T) in by_bytes:
            found[name] = arrays[by_bytes[fingerprint(array.T)]].T
        elif own is not None:
            found[name] = own
    return found


def contradictions(known: Known, graph: Mapping[str, Any], *, renamed: bool) -> tuple[list[str], list[str]]:
    """Weights that a graph holds under the same name, in the same shape and type, with other bits.

    Args:
        known: the weights.
        graph: the constants of the graph.
        renamed: names are such as exporters make up, so that a weight which stands there under another one is none.

    Returns a sentence for each that nothing explains, and the names of those that a batch norm may have been merged
    into: one of the size of an axis stands on one side only.
    """
    arrays = {name: as_array(value) for name, value in graph.items()}
    wrong = {name: array for name, array in known.items() if name in arrays and _contradict(array, arrays[name])}
    if wrong and renamed:
        by_bytes = _by_bytes(arrays)
        moved = [n for n, x in wrong.items() if fingerprint(x) in by_bytes or fingerprint(x.T) in by_bytes]
        wrong = {name: array for name, array in wrong.items() if name not in moved}
    if not wrong:
        return [], []
    sizes = {*_missing_variances(known, arrays), *_missing_variances(arrays, known)}
    merged = [name for name, array in wrong.items() if _may_be_scaled(array, arrays[name], sizes)]
    rest = {name: array for name, array in wrong.items() if name not in merged}
    problems = compare_tensors(rest, {name: arrays[name] for name in rest}).problems if rest else ()
    return [f"{problem}, under the same name" for problem in problems], [printable(name) for name in merged]


def _contradict(a: Array, b: Array) -> bool:
    """Whether two arrays of one shape and type have other bits, in either order of their axes."""
    return _alike(a, b) and not _same_bits(a, b) and not (a.ndim == 2 and _same_bits(a, b.T))


def _may_be_scaled(a: Array, b: Array, sizes: set[int]) -> bool:
    """Whether two arrays are one with its rows along an axis of one of these sizes scaled: each row stays as it is, or
    most of it changes."""
    changed, counts = a != b, a != 0
    for axis, size in enumerate(a.shape):
        if size in sizes:
            others = tuple(i for i in range(a.ndim) if i != axis)
            changes = changed.sum(axis=others)
            if bool(np.all((changes == 0) | (2 * changes > counts.sum(axis=others)))):
                return True
    return False


def _missing_variances(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[int]:
    """The sizes of batch norms that stand in one and not in the other, by name or by content."""
    names = [name for name in one if name.endswith(_VARIANCES) and name not in other]
    there = _by_bytes({name: as_array(value) for name, value in other.items()}) if names else {}
    for array in (as_array(one[name]) for name in names):
        if array.ndim == 1 and fingerprint(array) not in there:
            yield array.shape[0]


def _alike(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool(a.dtype == b.dtype)


def _is_transpose(a: Array, b: Array) -> bool:
    return a.ndim == 2 and not _same_bits(a, b) and _same_bits(a, b.T)


def _same_bits(a: Array, b: Array) -> bool:
    return _alike(a, b) and bool(a.tobytes() == b.tobytes())


def _by_bytes(arrays: Known) -> dict[tuple[str, tuple[int, ...], bytes], str]:
    found: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    for name, array in arrays.items():
        found.setdefault(fingerprint(array), name)
    return found


def fingerprint(array: Array) -> tuple[str, tuple[int, ...], bytes]:
    """Type, shape and a digest of an array's bytes."""
    return array.dtype.name, array.shape, sha256(np.ascontiguousarray(array).tobytes()).digest()
