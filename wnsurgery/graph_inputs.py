"""Inputs made up for what a graph declares, so that two artefacts can be compared without any being given.

Numbers that index a table are drawn from all of its rows: a table that is wrong in some would pass otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from wnsurgery.declared import Declared
from wnsurgery.errors import InputError, printable

__all__ = ["made_up_inputs", "rows_indexed"]

Array = np.ndarray[Any, Any]
_Given = dict[ir.Value | None, ir.Value | None]  # what a function's inputs are where it is called

_FIRST, _OTHER = 2, 16  # sizes tried for a dimension that a graph leaves open
_ROWS = 1 << 30  # of a table that are looked at
_GOLDEN = 0.6180339887
_CALLS = 1000  # of functions, followed for an input: few bytes may call many
_INDEXING = {"Gather": 1, "GatherElements": 1}  # which of their inputs holds the indices
_KEEPING = frozenset(
    ("Cast", "CastLike", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice")
) | frozenset(("Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"))  # they move the values of their first input
_AS_STORED = frozenset(("Cast", "DequantizeLinear", "Identity"))  # their output has the shape of their first input


def made_up_inputs(declared: Sequence[Declared], name: str, number: int, *, rows: dict[str, int]) -> dict[str, Array]:
    """Numbers for everything a graph declares, from a generator of its own; open dimensions get a small size.

    Args:
        declared: the inputs of the graph.
        name: of the graph, for messages.
        number: which set of inputs this is, from 0; a table's rows are gone through from set to set.
        rows: for inputs that index a table, how many rows it has, see `rows_indexed`; other integers are 0 or 1.

    Raises InputError for an input of a kind that none can be made up for.
    """
    generator = np.random.default_rng(number)
    sizes: dict[str, int] = {}
    made: dict[str, Array] = {}
    for place, one in enumerate(declared):
        if one.is_tensor and one.shape is None:
            reason = "no inputs can be made up where any shape will do; give some"
            raise InputError.of(name, f"{printable(one.name)}: {reason}")
        shape = []
        for axis, size in enumerate(one.shape or ()):
            known = isinstance(size, int)
            shape.append(size if known else sizes.setdefault(str(size or axis), _OTHER if axis else _FIRST))
        dtype = one.dtype or ""
        if dtype in ("float32", "float64", "float16"):
            made[one.name] = np.asarray(generator.standard_normal(shape)).astype(dtype)
        elif dtype.startswith(("int", "uint")) and one.name in rows:
            reached = min(rows[one.name], int(np.iinfo(dtype).max) + 1, _ROWS)
            made[one.name] = _some_of(reached, shape, number, place).astype(dtype)
        elif dtype == "bool" or dtype.startswith(("int", "uint")):
            made[one.name] = np.asarray(generator.integers(0, 2, shape)).astype(dtype)
        else:
            raise InputError.of(name, f"{printable(one.name)}: no inputs can be made up for {one.type}")
    return made


def _some_of(rows: int, shape: Sequence[int], number: int, place: int) -> Array:
    """Rows here and there, each once before one comes again, this set of inputs going on where the last one ended."""
    count = int(np.prod(shape, dtype=np.int64))
    step = int(rows * _GOLDEN) + place
    while math.gcd(step, rows) > 1:  # so that all rows come before one comes again
        step += 1
    at = (number * count + np.arange(count, dtype=np.int64)) % rows
    return np.asarray((at * (step % rows) % rows).reshape(shape))


def rows_indexed(model: ir.Model) -> dict[str, int]:
    """For each input of a graph that comes to a lookup as indices, the rows of the smallest table it looks into.

    One that looks into a table of unknown size is left out.
    """
    found = {str(value.name): [*_tables(value, model)] for value in model.graph.inputs}
    return {name: min(filter(None, rows)) for name, rows in found.items() if rows and all(rows)}


def _tables(value: ir.Value, model: ir.Model) -> Iterator[int | None]:
    """The sizes of the tables that a value, or a rearrangement of it, looks into; None where it is not known."""
    start: tuple[ir.Value, _Given] = (value, {})
    seen, todo = {value}, [start]
    calls = 0
    while todo:
        looked_at, given = todo.pop()
        if calls > _CALLS:
            yield None
            return
        for node, place in looked_at.uses():
            if place == _INDEXING.get(node.op_type):
                yield _size(given.get(node.inputs[0], node.inputs[0]), _axis(node))
            called = model.functions.get(node.op_identifier())
            if called is not None:
                calls += 1
                inner = zip(called.inputs, (given.get(each, each) for each in node.inputs), strict=False)
                todo.append((called.inputs[place], dict(inner)))
            elif _keeps(node, place):
                todo += [(output, given) for output in node.outputs if output not in seen]
                seen.update(node.outputs)


def _keeps(node: ir.Node, place: int) -> bool:
    """Whether an operation's output holds the numbers of its input at a place."""
    if node.op_type == "Where":
        return place > 0
    return node.op_type == "Concat" or (node.op_type in _KEEPING and place == 0)


def _axis(node: ir.Node) -> int:
    attribute = node.attributes.get("axis")
    return 0 if attribute is None or attribute.is_ref() else int(attribute.value)


def _size(table: ir.Value | None, axis: int) -> int | None:
    """How long a table is along an axis, where that is known."""
    while table is not None:
        shape, node = _shape(table), table.producer()
        if shape is not None:
            size = shape[axis] if -len(shape) <= axis < len(shape) else None
            return size if isinstance(size, int) else None
        table = node.inputs[0] if node is not None and node.op_type in _AS_STORED and node.inputs else None
    return None


def _shape(value: ir.Value) -> Any:
    node = value.producer()
    held: Any = value.const_value
    if node is not None and node.op_type == "Constant" and "value" in node.attributes:
        attribute = node.attributes["value"]
        held = None if attribute.is_ref() else attribute.value
    return value.shape if held is None else held.shape
