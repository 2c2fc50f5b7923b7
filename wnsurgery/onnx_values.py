"""What an ONNX graph computes from its constants alone, evaluated in float64.

The graph's own types are followed, so that a value knows its type, but floating-point numbers are computed in
float64: the question is what an expression *means*, not how a runtime would round it. Only where values are large and
of 32 bits or fewer is float32 taken, with sums in float64, so that memory stays within a few times that of one weight.
What is rounded, compared or cast before a norm is another matter: there the graph's own types decide, from the
constants on (`onnx_own_types`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

from wnsurgery.onnx_nodes import graphs_of, nodes_within
from wnsurgery.onnx_own_types import STEPS, Evaluated, Unknown, in_own_type

__all__ = ["Constants", "Evaluated", "Memo", "Unknown", "apply", "is_known", "is_large", "is_norm", "native"]

Array = np.ndarray[Any, Any]

_GROWTH = 2  # a result may be so many times as big as the largest constant: a hostile Expand must not fill the memory
_LARGE = 1 << 22  # elements; what is larger is held in float32
_WORK = 256  # multiplications of a product of matrices for each element that a result may have
_SMALL = 1 << 20  # elements that any result may have
_SUMS = frozenset(
    ("Einsum", "LpNormalization", "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare")
)  # in any norm
_MOST = 256  # constants that one weight may be made of
_RANDOM = frozenset(
    ("Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
)
_KEPT = 1 << 14  # elements; larger intermediate results are given up as soon as nothing waits for them


class Memo:
    """What was evaluated: small arrays are kept, of large ones only shape and type, so that memory stays bounded.

    Attributes:
        own_types: whether every value is what the graph's own types make of it, and not only where these decide.
        arrays: values that are at hand.
        kinds: shape and type of everything that was ever evaluated.
    """

    def __init__(self, *, own_types: bool = False) -> None:
        self.own_types = own_types
        self.arrays: dict[ir.Value, Evaluated] = {}
        self.kinds: dict[ir.Value, tuple[tuple[int, ...], ir.DataType]] = {}

    def put(self, value: ir.Value, found: Evaluated) -> None:
        self.arrays[value] = found
        self.kinds[value] = found.array.shape, found.dtype

    def let_go(self, value: ir.Value) -> None:
        found = self.arrays.get(value)
        if found is not None and found.array.size > _KEPT:
            del self.arrays[value]


class Constants:
    """Which values of a model are constant, which of those come out of a sum over axes, and what they are.

    A value is constant when it is an initializer that no caller can override, or comes out of known,
    deterministic operations on such values.
    """

    def __init__(self, model: ir.Model) -> None:
        self._overridable = model.ir_version >= 4  # before, every initializer had to be listed as an input
        self._constant: set[ir.Value] = set()
        self.normed: set[ir.Value] = set()  # comes out of a sum
        self.under_norms: set[ir.Value] = set()  # goes into one
        self._before: set[ir.Value] = set()  # is on the way to one
        self._settled: set[ir.Node] = set()  # decides what goes into a norm, or is on the way to such a decision
        self._made_of: dict[ir.Value, tuple[ir.Value, ...] | None] = {}
        self.norms: list[ir.Node] = []
        nodes = list(nodes_within(model.graph))
        self._limit = max((_SMALL, *(_GROWTH * size for size in _sizes(model.graph, nodes))))
        for node in nodes:
            self._visit(node)
        for node in reversed(nodes):
            self._look_ahead(node)

    def is_constant(self, value: ir.Value) -> bool:
        """Whether nothing a caller passes in can change this value."""
        if value.producer() is not None:
            return value in self._constant
        return value.const_value is not None and not (self._overridable and value.is_graph_input())

    def _visit(self, node: ir.Node) -> None:
        inputs = [value for value in node.inputs if value is not None]
        if is_norm(node):
            self.norms.append(node)
        if not is_known(node) or not all(map(self.is_constant, inputs)):
            return
        self._constant.update(node.outputs)
        if node.op_type in _SUMS or is_norm(node):
            self.under_norms.update(inputs)
        if node.op_type in _SUMS or is_norm(node) or any(value in self.normed for value in inputs):
            self.normed.update(node.outputs)

    def _look_ahead(self, node: ir.Node) -> None:
        """Learn what comes after a node, once that was looked at."""
        if not any(value in self._constant for value in node.outputs):
            return
        users = [user for value in node.outputs for user, _ in value.uses()]
        constant = [user for user in users if any(value in self._constant for value in user.outputs)]
        outputs = {value for user in constant for value in user.outputs}
        if not outputs.isdisjoint(self._before) or not self.under_norms.isdisjoint(node.outputs):
            self._before.update(node.outputs)
        decides = node.op_type in STEPS and all(map(self.may_be_direction, node.outputs))
        if decides or not self._settled.isdisjoint(constant):
            self._settled.add(node)

    def may_be_direction(self, value: ir.Value) -> bool:
        """Whether a constant may be part of what goes into a norm: no norm is behind it, or another one follows."""
        return value not in self.normed or value in self._before

    def obstacle(self, value: ir.Value) -> ir.Node | None:
        """The operation that keeps a value from being told although nothing but constants goes into it; None else.

        What draws random numbers, holds graphs or is no standard operation counts as known at run time only.
        """
        found: ir.Node | None = None
        todo, seen = [value], {value}
        while todo:
            current = todo.pop()
            if self.is_constant(current):
                continue
            node = current.producer()
            if node is None or not _is_plain(node):
                return None
            inputs = [v for v in node.inputs if v is not None]
            found = node if all(map(self.is_constant, inputs)) else found
            todo.extend(v for v in inputs if v not in seen)
            seen.update(inputs)
        return found

    def made_of(self, value: ir.Value) -> tuple[ir.Value, ...] | None:
        """The constants that a value may be a weight norm of, computed ones too; None where they are too many.

        What the values on the way are made of is kept, so that looking at a long chain takes time in its length.
        """
        todo = [value]
        while todo:
            current = todo[-1]
            inputs = _inputs(current)
            missing = [v for v in inputs if v not in self._made_of]
            if missing and current not in self._made_of:
                todo += missing
                continue
            todo.pop()
            if current not in self._made_of:
                self._made_of[current] = self._together(current, inputs)
        return self._made_of[value]

    def _together(self, value: ir.Value, inputs: Sequence[ir.Value]) -> tuple[ir.Value, ...] | None:
        parts = [self._made_of[v] for v in inputs]
        own = (value,) if self.may_be_direction(value) else ()
        whole = tuple(dict.fromkeys(v for part in parts for v in part or ())) + own
        if len(whole) > _MOST or None in parts:
            return None
        return next((part for part in parts if part == whole), whole)  # which most values of a chain have in common

    def cone(self, value: ir.Value) -> list[ir.Value]:
        """Every constant a constant is computed from, itself last, each after what it is computed from."""
        return _in_order(value, ())

    def evaluate(self, value: ir.Value, memo: Memo) -> Evaluated:
        """The value of a constant; `memo` holds what was computed on the way.

        Raises Unknown where an operation cannot be carried out.
        """
        if value in memo.arrays:
            return memo.arrays[value]
        steps = _in_order(value, memo.arrays)
        waiting = Counter(v for step in steps for v in _inputs(step))
        for step in steps:
            if step not in memo.arrays:
                memo.put(step, self._compute(step, memo))
            for used in _inputs(step):
                waiting[used] -= 1
                if not waiting[used]:
                    memo.let_go(used)
        found = memo.arrays[value]
        memo.let_go(value)
        return found

    def _compute(self, value: ir.Value, memo: Memo) -> Evaluated:
        node = value.producer()
        if node is None:
            return _of_tensor(value.const_value)
        inputs = [None if v is None else memo.arrays[v] for v in node.inputs]
        output = value.index() or 0
        if not memo.own_types and node not in self._settled:
            return apply(node, inputs, self._limit, output)
        with np.errstate(all="ignore"):
            found = in_own_type(node, inputs, lambda given: apply(node, given, self._limit, output))
        return _as(found.array, found.dtype)._replace(doubt=found.doubt)


def apply(node: ir.Node, inputs: Sequence[Evaluated | None], limit: int, output: int = 0) -> Evaluated:
    """One output of an operation on evaluated inputs; raises Unknown where it cannot be told in `limit` elements."""
    try:
        with np.errstate(all="ignore"):
            return _OPERATIONS[node.op_type](_Call(node, inputs, limit, output))
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        # numpy raises any of these for attributes and shapes that make no sense, RuntimeError for too many axes
        raise Unknown(f"{node.op_type}: {error}") from error


def _sizes(graph: ir.Graph, nodes: Iterable[ir.Node]) -> Iterator[int]:
    """How many elements the constants of a graph and its subgraphs have."""
    graphs = {graph: None, **{node.graph: None for node in nodes if isinstance(node.graph, ir.Graph)}}
    yield from (v.const_value.size for g in graphs for v in g.initializers.values() if v.const_value is not None)
    for node in nodes:
        value = node.attributes.get("value") if node.op_type == "Constant" else None
        if value is not None and value.type == ir.AttributeType.TENSOR:
            yield value.value.size


def _in_order(value: ir.Value, known: Container[ir.Value]) -> list[ir.Value]:
    """A value and all that it is computed from, each after what it is computed from; nothing beyond what is known."""
    order: list[ir.Value] = []
    seen: set[ir.Value] = set()
    todo: list[tuple[ir.Value, bool]] = [(value, False)]
    while todo:
        current, ready = todo.pop()
        if ready:
            order.append(current)
        elif current not in seen:
            seen.add(current)
            todo.append((current, True))
            if current not in known:
                todo.extend((v, False) for v in _inputs(current) if v not in seen)
    return order


def _inputs(value: ir.Value) -> list[ir.Value]:
    node = value.producer()
    return [] if node is None else [v for v in node.inputs if v is not None]


def native(tensor: Any) -> Array:
    """A tensor's elements in its own type, read and not mapped: pages of a mapped file would pile up.

    Raises Unknown where they cannot be had.
    """
    if tensor is None:
        raise Unknown("no value")
    try:
        if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.bitwidth < 8:
            return np.asarray(tensor.numpy())
        stored = np.dtype(tensor.dtype.numpy()).newbyteorder("<")
        array = np.fromfile(tensor.path, stored, count=tensor.size, offset=tensor.offset or 0)
        return array.astype(stored.newbyteorder("="), copy=False).reshape(tensor.shape.numpy())
    except (ValueError, TypeError, OSError) as error:
        raise Unknown(f"{tensor.name}: {error}") from error


def is_known(node: ir.Node) -> bool:
    """Whether an operation is one of those that can be carried out here."""
    if node.op_type not in _OPERATIONS or (len(node.outputs) != 1 and node.op_type != "Split"):
        return False
    return node.domain in ("", "ai.onnx") and not any(attribute.is_ref() for attribute in node.attributes.values())


def _is_plain(node: ir.Node) -> bool:
    """Whether a node gives the same for the same inputs, and has no more of them than one sees."""
    if node.domain not in ("", "ai.onnx") or node.op_type in _RANDOM:
        return False
    return not any(a.is_ref() for a in node.attributes.values()) and next(graphs_of(node), None) is None


def is_norm(node: ir.Node) -> bool:
    """Whether a node sums squares: the heart of every L2 norm.

    Squares are told one step back: x * x, x ** 2, or |x| ** 2; and a product with a matrix is a sum, too.
    """
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type in ("ReduceL2", "ReduceSumSquare", "LpNormalization"):
        return True
    if node.op_type not in ("Gemm", "MatMul", "ReduceLogSum", "ReduceSum"):
        return False
    read = node.inputs[:1] if node.op_type.startswith("Reduce") else node.inputs[:2]
    return any(_is_square(value) for value in read)


def _is_square(value: ir.Value | None) -> bool:
    source = None if value is None else value.producer()
    if source is None:
        return False
    if source.op_type == "Mul":
        return len(source.inputs) == 2 and source.inputs[0] is source.inputs[1]
    return source.op_type == "Pow" and len(source.inputs) == 2 and _is_two(source.inputs[1])


def _is_two(value: ir.Value | None) -> bool:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.size == 1 and float(tensor.numpy().reshape(-1)[0]) == 2.0


def _of_tensor(tensor: Any) -> Evaluated:
    array = native(tensor)
    return _as(array, tensor.dtype)


def is_large(size: int, dtype: ir.DataType) -> bool:
    """Whether so many elements of a type are held in float32."""
    return size > _LARGE and dtype.is_floating_point() and dtype.itemsize <= 4


# The operations ------------------------------------------------------------------------------------------


class _Call:
    """One operation on evaluated inputs, with the readings of attributes that differ between opsets."""

    def __init__(self, node: ir.Node, inputs: Sequence[Evaluated | None], limit: int, output: int = 0) -> None:
        self.node = node
        self.inputs = inputs
        self.limit = limit
        self.output = output

    def array(self, index: int) -> Array:
        found = self.inputs[index]
        if found is None:
            raise Unknown(f"{self.node.op_type} without its input {index}")
        return found.array

    def has(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] is not None

    def dtype(self, index: int = 0) -> ir.DataType:
        found = self.inputs[index]
        if found is None:
            raise Unknown(f"{self.node.op_type} without its input {index}")
        return found.dtype

    def attribute(self, name: str, default: Any = None) -> Any:
        found = self.node.attributes.get(name)
        return default if found is None else found.value

    def ints(self, name: str, index: int) -> list[int] | None:
        """A list of integers that is an attribute in old opsets and an input in new ones."""
        if self.has(index):
            return [int(i) for i in self.array(index).reshape(-1)]
        found = self.attribute(name)
        return None if found is None else [int(i) for i in found]

    def like(self, array: Any, index: int = 0) -> Evaluated:
        """A result of the type of one of the inputs."""
        return Evaluated(np.asarray(array), self.dtype(index))

    def bounded(self, shape: Iterable[int]) -> tuple[int, ...]:
        """The shape of a result, after a look at its size."""
        sizes = tuple(int(s) for s in shape)
        if any(s < 0 for s in sizes) or np.prod([float(s) for s in sizes]) > self.limit:
            raise Unknown(f"a result of shape {sizes}")
        return sizes


Operation = Callable[[_Call], Evaluated]


def _elementwise(function: Callable[..., Any]) -> Operation:
    def run(call: _Call) -> Evaluated:
        return call.like(function(*_together(call)))

    return run


def _together(call: _Call) -> list[Array]:
    """All inputs, after a look at how big they get when broadcast together."""
    arrays = [call.array(i) for i in range(len(call.inputs))]
    shape = np.broadcast_shapes(*(a.shape for a in arrays))
    if np.prod([float(s) for s in shape]) > max(a.size for a in arrays):
        call.bounded(shape)
    if is_large(int(np.prod(shape)), call.dtype(len(arrays) - 1)):
        return [a.astype(np.float32) if a.dtype == np.float64 else a for a in arrays]
    return arrays


def _fold_left(function: Callable[[Array, Array], Any]) -> Operation:
    def run(call: _Call) -> Evaluated:
        return call.like(reduce(function, _together(call)))

    return run


def _truth(function: Callable[..., Any]) -> Operation:
    def run(call: _Call) -> Evaluated:
        return Evaluated(np.asarray(function(*_together(call))), ir.DataType.BOOL)

    return run


def _reduction(function: Callable[..., Any]) -> Operation:
    def run(call: _Call) -> Evaluated:
        axes, x = call.ints("axes", 1), call.array(0)
        if not axes:
            if call.attribute("noop_with_empty_axes", 0):
                return call.like(x)
            axes = list(range(x.ndim))
        return call.like(function(x, axis=tuple(axes), keepdims=bool(call.attribute("keepdims", 1))))

    return run


def _l2(x: Array, axis: tuple[int, ...], keepdims: bool) -> Any:
    return np.sqrt(_sum(x * x, axis, keepdims))


def _sum(x: Array, axis: tuple[int, ...], keepdims: bool) -> Any:
    return np.sum(x, axis=axis, keepdims=keepdims, dtype=np.float64 if x.dtype.kind == "f" else None)


def _divide(a: Array, b: Array) -> Any:
    if a.dtype.kind in "iu":
        return np.trunc(a / b).astype(a.dtype)
    return a / b


def _cast(call: _Call) -> Evaluated:
    target = ir.DataType(call.attribute("to")) if call.node.op_type == "Cast" else call.dtype(1)
    return _as(call.array(0), target)


def _as(x: Array, target: ir.DataType) -> Evaluated:
    if not target.is_floating_point():
        if x.dtype.kind == "f" and target != ir.DataType.BOOL and not _holds(target, x):
            raise Unknown(f"a number is no {target.name.lower()}")
        return Evaluated(x.astype(target.numpy()), target)
    return Evaluated(x.astype(np.float32 if is_large(x.size, target) else np.float64, copy=False), target)


def _holds(target: ir.DataType, x: Array) -> bool:
    """Whether a type of integers has all these numbers, without what is after the point."""
    import ml_dtypes

    info: Any = ml_dtypes.iinfo(target.numpy())  # type: ignore[no-untyped-call]
    whole = np.trunc(x)
    return bool(np.all((whole >= float(info.min)) & (whole < float(info.max) + 1)))


def _constant(call: _Call) -> Evaluated:
    for name, found in call.node.attributes.items():
        if name == "value":
            return _of_tensor(found.value)
        if name in ("value_float", "value_floats"):
            return Evaluated(np.asarray(found.value, np.float64), ir.DataType.FLOAT)
        if name in ("value_int", "value_ints"):
            return Evaluated(np.asarray(found.value, np.int64), ir.DataType.INT64)
    raise Unknown("a Constant of strings or a sparse one")


def _constant_of_shape(call: _Call) -> Evaluated:
    fill = call.attribute("value")
    value = Evaluated(np.zeros(1), ir.DataType.FLOAT) if fill is None else _of_tensor(fill)
    return Evaluated(np.full(call.bounded(call.array(0).tolist()), value.array.reshape(-1)[0]), value.dtype)


def _reshape(call: _Call) -> Evaluated:
    x, sizes = call.array(0), call.ints("shape", 1) or []
    if not call.attribute("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return call.like(x.reshape(sizes))


def _flatten(call: _Call) -> Evaluated:
    x, axis = call.array(0), call.attribute("axis", 1)
    rows = int(np.prod(x.shape[: axis + x.ndim if axis < 0 else axis], dtype=np.int64))
    return call.like(x.reshape(rows, -1))


def _squeeze(call: _Call) -> Evaluated:
    axes = call.ints("axes", 1)
    return call.like(np.squeeze(call.array(0), axis=None if axes is None else tuple(axes)))


def _unsqueeze(call: _Call) -> Evaluated:
    return call.like(np.expand_dims(call.array(0), tuple(call.ints("axes", 1) or [])))


def _expand(call: _Call) -> Evaluated:
    shape = np.broadcast_shapes(call.array(0).shape, tuple(call.array(1).tolist()))
    return call.like(np.broadcast_to(call.array(0), call.bounded(shape)))


def _tile(call: _Call) -> Evaluated:
    x, repeats = call.array(0), call.array(1).tolist()
    call.bounded([a * b for a, b in zip(x.shape, repeats, strict=True)])
    return call.like(np.tile(x, repeats))


def _slice(call: _Call) -> Evaluated:
    x = call.array(0)
    starts, ends = call.ints("starts", 1) or [], call.ints("ends", 2) or []
    axes, steps = call.ints("axes", 3), call.ints("steps", 4)
    index = [slice(None)] * x.ndim
    for i, axis in enumerate(range(len(starts)) if axes is None else axes):
        step = 1 if steps is None else steps[i]
        end: int | None = ends[i]
        if step < 0 and ends[i] < -x.shape[axis]:
            end = None  # ONNX clamps to "before the first element", which a Python slice cannot spell
        index[axis] = slice(starts[i], end, step)
    return call.like(x[tuple(index)])


def _clip(call: _Call) -> Evaluated:
    x = call.array(0)
    low = call.array(1) if call.has(1) else call.attribute("min")
    high = call.array(2) if call.has(2) else call.attribute("max")
    x = x if low is None else np.maximum(x, np.asarray(low, x.dtype))
    return call.like(x if high is None else np.minimum(x, np.asarray(high, x.dtype)))


def _lp_normalization(call: _Call) -> Evaluated:
    x, axis, power = call.array(0), call.attribute("axis", -1), call.attribute("p", 2)
    size = np.abs(x).sum(axis=axis, keepdims=True) if power == 1 else _l2(x, (axis,), True)
    return call.like(np.where(size == 0, 0.0, x / size))


def _einsum(call: _Call) -> Evaluated:
    equation = call.attribute("equation").replace(" ", "")
    arrays = [call.array(i) for i in range(len(call.inputs))]
    sizes: dict[str, int] = {}
    for letters, array in zip(equation.split("->")[0].split(","), arrays, strict=True):
        if "." in letters:
            raise Unknown("an Einsum with an ellipsis")
        sizes.update(zip(letters, array.shape, strict=True))
    call.bounded(sizes.values())
    return call.like(np.einsum(equation, *arrays))


def _concat(call: _Call) -> Evaluated:
    arrays = [call.array(i) for i in range(len(call.inputs))]
    call.bounded([sum(array.size for array in arrays)])
    return call.like(np.concatenate(arrays, axis=call.attribute("axis")))


def _gather(call: _Call) -> Evaluated:
    x, index, axis = call.array(0), call.array(1).astype(np.int64), call.attribute("axis", 0)
    call.bounded([x.size // max(1, x.shape[axis]), index.size])
    return call.like(np.take(x, index, axis=axis))


def _matmul(call: _Call) -> Evaluated:
    return call.like(_product(call, call.array(0), call.array(1)))


def _product(call: _Call, a: Array, b: Array) -> Array:
    """A product of matrices, after a look at its size and at the work."""
    rows, columns = (1 if a.ndim == 1 else a.shape[-2]), (1 if b.ndim == 1 else b.shape[-1])
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    if np.prod([float(s) for s in call.bounded((*batch, rows, columns))]) * a.shape[-1] > _WORK * call.limit:
        raise Unknown(f"a product of {a.shape} and {b.shape}")
    return np.asarray(np.matmul(a, b))


def _gemm(call: _Call) -> Evaluated:
    a, b = (x.T if call.attribute(name, 0) else x for x, name in ((call.array(0), "transA"), (call.array(1), "transB")))
    product = call.attribute("alpha", 1.0) * _product(call, a, b)
    return call.like(product + call.attribute("beta", 1.0) * call.array(2) if call.has(2) else product)


def _split(call: _Call) -> Evaluated:
    x, axis, sizes = call.array(0), call.attribute("axis", 0), call.ints("split", 1)
    if sizes is None:
        count = len(call.node.outputs)
        part = -(-x.shape[axis] // count)
        sizes = [part] * (count - 1) + [x.shape[axis] - part * (count - 1)]
    if sum(sizes) != x.shape[axis] or len(sizes) != len(call.node.outputs) or min(sizes) < 0:
        raise Unknown(f"Split into {sizes}")
    start = sum(sizes[: call.output])
    return call.like(np.take(x, range(start, start + sizes[call.output]), axis=axis))


def _pad(call: _Call) -> Evaluated:
    x, pads, axes = call.array(0), call.ints("pads", 1) or [], call.ints("axes", 3)
    if call.attribute("mode", "constant") != "constant" or min(pads, default=0) < 0:
        raise Unknown("Pad with other than a constant")
    fill = call.array(2).reshape(-1)[0] if call.has(2) else call.attribute("value", 0.0)
    widths = [(0, 0)] * x.ndim
    for i, axis in enumerate(range(x.ndim) if axes is None else axes):
        widths[axis] = pads[i], pads[i + len(pads) // 2]
    call.bounded(size + sum(width) for size, width in zip(x.shape, widths, strict=True))
    return call.like(np.pad(x, widths, constant_values=fill))


def _dequantize(call: _Call) -> Evaluated:
    x, scale = call.array(0), call.array(1)
    zero = call.array(2) if call.has(2) else np.zeros((), np.int64)
    if call.attribute("block_size", 0):
        raise Unknown("blocks of a scale each")
    if scale.size > 1:
        sides = [1] * x.ndim
        sides[call.attribute("axis", 1)] = -1
        scale, zero = scale.reshape(sides), zero.reshape(sides) if zero.size > 1 else zero
    kind = ir.DataType(call.attribute("output_dtype", 0)) or call.dtype(1)
    return _as((x.astype(np.float64) - zero.astype(np.float64)) * scale, kind)


def _shape(call: _Call) -> Evaluated:
    sizes = call.array(0).shape[call.attribute("start", 0) : call.attribute("end")]
    return Evaluated(np.asarray(sizes, np.int64), ir.DataType.INT64)


_OPERATIONS: dict[str, Operation] = {
    "Abs": _elementwise(np.abs),
    "Add": _elementwise(np.add),
    "And": _truth(np.logical_and),
    "Ceil": _elementwise(np.ceil),
    "Cast": _cast,
    "CastLike": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Einsum": _einsum,
    "DequantizeLinear": _dequantize,
    "Div": _elementwise(_divide),
    "Equal": _truth(np.equal),
    "Exp": _elementwise(np.exp),
    "Expand": _expand,
    "Floor": _elementwise(np.floor),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "Greater": _truth(np.greater),
    "GreaterOrEqual": _truth(np.greater_equal),
    "Identity": _elementwise(lambda x: x),
    "IsInf": _truth(np.isinf),
    "IsNaN": _truth(np.isnan),
    "Less": _truth(np.less),
    "LessOrEqual": _truth(np.less_equal),
    "Log": _elementwise(np.log),
    "LpNormalization": _lp_normalization,
    "MatMul": _matmul,
    "Max": _fold_left(np.maximum),
    "Min": _fold_left(np.minimum),
    "Mul": _elementwise(np.multiply),
    "Neg": _elementwise(np.negative),
    "Not": _truth(np.logical_not),
    "Or": _truth(np.logical_or),
    "Pad": _pad,
    "Pow": _elementwise(np.power),
    "Reciprocal": _elementwise(lambda x: 1.0 / x),
    "ReduceL1": _reduction(lambda x, axis, keepdims: np.abs(x).sum(axis=axis, keepdims=keepdims)),
    "ReduceL2": _reduction(_l2),
    "ReduceLogSum": _reduction(lambda x, axis, keepdims: np.log(_sum(x, axis, keepdims))),
    "ReduceMax": _reduction(np.max),
    "ReduceMean": _reduction(np.mean),
    "ReduceMin": _reduction(np.min),
    "ReduceSum": _reduction(_sum),
    "Relu": _elementwise(lambda x: np.maximum(x, 0)),
    "ReduceSumSquare": _reduction(lambda x, axis, keepdims: _sum(x * x, axis, keepdims)),
    "Round": _elementwise(np.round),
    "Reshape": _reshape,
    "Sigmoid": _elementwise(lambda x: 1.0 / (1.0 + np.exp(-x))),
    "Shape": _shape,
    "Sign": _elementwise(np.sign),
    "Size": lambda call: Evaluated(np.asarray(call.array(0).size, np.int64), ir.DataType.INT64),
    "Softplus": _elementwise(lambda x: np.logaddexp(x, 0)),
    "Slice": _slice,
    "Split": _split,
    "Sqrt": _elementwise(np.sqrt),
    "Squeeze": _squeeze,
    "Sub": _elementwise(np.subtract),
    "Tanh": _elementwise(np.tanh),
    "Sum": _fold_left(np.add),
    "Tile": _tile,
    "Transpose": lambda call: call.like(np.transpose(call.array(0), call.attribute("perm"))),
    "Unsqueeze": _unsqueeze,
    "Where": lambda call: call.like(np.where(*_together(call)), 1),
}
