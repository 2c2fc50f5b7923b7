"""Rearrangements of constant weights, carried out once: what stays is the array that an operation reads.

Exporters transpose a weight before a MatMul, or slice it into gates and put it together again for an LSTM. With weight
norm on they cannot do it beforehand, as they do for plain weights; once the weight is plain, it can be done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from wnsurgery.onnx_values import Constants, Evaluated, Unknown, apply, native

__all__ = ["drop_unused", "put_initializer", "settle"]

Array = np.ndarray[Any, Any]

# they move elements and change none; Cast is not among them, for widening would grow the file
_MOVES = frozenset(("Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"))


def settle(model: ir.Model, weights: Iterable[ir.Value]) -> None:
    """Replace constant rearrangements of these initializers by what comes out of them, bit for bit.

    A weight that is also read as it stands keeps its shape, and so does one whose rearrangements together are bigger
    than what they are made of: nothing is stored twice.
    """
    constants = Constants(model)
    for weight in weights:
        ends = _ends(weight, constants)
        if weight in ends or not ends or any(end.is_graph_output() for end in ends):
            continue
        try:
            recipes = {end: _Recipe(end, constants) for end in ends}
            sizes = {end: recipe.run() for end, recipe in recipes.items()}
        except Unknown:
            continue
        shapes = {end: found.shape for end, found in sizes.items()}
        grown = sum(found.nbytes for found in sizes.values())
        del sizes
        cone = list(dict.fromkeys(step for end in ends for step in constants.cone(end)))
        sources = [step for step in cone if step.producer() is None]
        tensors: list[Any] = [source.const_value for source in sources if _ends(source, constants) <= ends]
        freed = sum(tensor.nbytes for tensor in tensors)
        if grown > freed:
            continue
        for end, recipe in recipes.items():
            put_initializer(model, end, str(end.name), recipe.run, recipe.dtype, shapes[end])
        for step in reversed(cone):
            remove_unread(step)
        for source in sources:
            drop_unused(source, model)


def put_initializer(
    model: ir.Model,
    old: ir.Value,
    name: str,
    array: Callable[[], Array],
    dtype: ir.DataType,
    shape: tuple[int, ...],
) -> ir.Value:
    """Let an initializer stand where a computed value stood; its array is computed when it is written."""
    graph: Any = old.producer().graph  # type: ignore[union-attr]
    tensor = ir.LazyTensor(lambda: ir.tensor(array(), name=name), dtype, ir.Shape(shape), name=name)
    new = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
    new.metadata_props.update(old.metadata_props)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name = f"{old.name}_unfolded"  # its node goes; meanwhile the name must be free
    graph.register_initializer(new)
    if model.ir_version < 4:
        graph.inputs.append(new)
    return new


def remove_unread(value: ir.Value) -> None:
    """Remove the node behind a value that nothing reads any more."""
    node = value.producer()
    if node is None or node.graph is None:
        return
    if not any(output.uses() or output.is_graph_output() for output in node.outputs):
        node.graph.remove(node, safe=True)


def drop_unused(value: ir.Value, model: ir.Model) -> None:
    """Remove an initializer that only removed nodes read."""
    if value.producer() is not None or value.uses() or value.is_graph_output() or not value.is_initializer():
        return
    graph: Any = value.graph
    del graph.initializers[str(value.name)]
    if model.ir_version < 4 and value.is_graph_input():
        graph.inputs.remove(value)


def _ends(weight: ir.Value, constants: Constants) -> set[ir.Value]:
    """Where the rearrangements of a constant stop: the values that something else reads."""
    ends: set[ir.Value] = set()
    seen = {weight}
    todo = [weight]
    while todo:
        value = todo.pop()
        for node, _ in value.uses():
            if node.op_type in _MOVES and len(node.outputs) == 1 and constants.is_constant(node.outputs[0]):
                if node.outputs[0] not in seen:
                    seen.add(node.outputs[0])
                    todo.append(node.outputs[0])
            else:
                ends.add(value)
        if value.is_graph_output():
            ends.add(value)
    return ends


class _Recipe:
    """How a value is made of initializers; it outlives the nodes that say so."""

    def __init__(self, end: ir.Value, constants: Constants) -> None:
        self.end = end
        self.steps = [
            (value, value.producer(), () if value.producer() is None else tuple(value.producer().inputs))  # type: ignore[union-attr]
            for value in constants.cone(end)
        ]
        if any(node is not None and node.op_type not in (*_MOVES, "Constant") for _, node, _ in self.steps):
            raise Unknown("more than a rearrangement")
        self.tensors = {value: value.const_value for value, node, _ in self.steps if node is None}
        first = next(value for value, node, _ in self.steps if node is None)
        tensors: list[Any] = list(self.tensors.values())
        self.limit = 2 * sum(tensor.size for tensor in tensors)
        self.dtype: ir.DataType = self.tensors[first].dtype  # type: ignore[union-attr]

    def run(self) -> Array:
        found: dict[ir.Value, Evaluated] = {}
        for value, node, inputs in self.steps:
            if node is None:
                tensor: Any = self.tensors[value]
                found[value] = Evaluated(native(tensor), tensor.dtype)
            else:
                found[value] = apply(node, [None if v is None else found[v] for v in inputs], self.limit)
        self.dtype = found[self.end].dtype
        return np.ascontiguousarray(found[self.end].array)
