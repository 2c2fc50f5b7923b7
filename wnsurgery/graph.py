"""Find weight-norm arithmetic in an ONNX graph by what it computes, and replace it by folded initializers.

Exporters spell g * v / ||v|| in many ways. So no spelling is looked for: every value that a graph computes from
constants alone, through a norm, is evaluated and compared with g * v / ||v|| for the constants it is made of. Where it
agrees, the pair is found, and `compose` gives the weight, as it does for modules and checkpoint files.

    find_weight_norms("generator.onnx")                 # which weights, made of what
    fold_onnx("generator.onnx", "generator.plain.onnx")
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from wnsurgery.errors import PairError, SelectionError, printable
from wnsurgery.onnx_file import all_graphs, external_tensors, read_onnx, write_onnx
from wnsurgery.onnx_functions import function_norms, open_norm_functions
from wnsurgery.onnx_layout import drop_unused, put_initializer, settle
from wnsurgery.onnx_values import Constants, Evaluated, Memo, Unknown, is_large
from wnsurgery.text import by, columns

__all__ = ["Compose", "Found", "OnnxFoldReport", "find_weight_norms", "fold_model", "fold_onnx"]

Array = np.ndarray[Any, Any]
Path_ = str | os.PathLike[str]

# (g, v, "linear" or "log") -> the plain weight, of v's type and shape; ValueError where they do not fit
Compose = Callable[[Array, Array, str], Array]

_FLOATS = (ir.DataType.DOUBLE, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_LAYOUT = frozenset(("Cast", "CastLike", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))
_HALF = re.compile(r"(?:(?P<stem>.*)\.)?parametrizations\.(?P<new>[^.]+)\.original1|(?P<old>.+)_v", re.DOTALL)
_BLOCK = 1 << 18  # elements compared at a time
_TRIES = 6  # magnitudes worth trying for one direction, nearest in size first


@dataclass(frozen=True)
class Found:
    """One weight that a graph computes as g * v / ||v||.

    Attributes:
        value: name of the computed weight in the graph.
        g: name of the magnitude's initializer; None when the weight is v / ||v||.
        v: name of the direction's initializer.
        magnitude: "linear", or "log" when the initializer holds the logarithm of g.
        nodes: the nodes that compute it and nothing else, which folding removes.
        shape, dtype: of the weight.
    """

    value: str
    g: str | None
    v: str
    magnitude: str
    nodes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class OnnxFoldReport:
    """What `fold_onnx` did; prints as a table.

    Attributes:
        found: the weights that were folded.
        left: (node, reason) for every norm that stays.
        nodes_before, nodes_after: size of the graph, subgraphs included.
        files: what was written, the graph first.
    """

    found: tuple[Found, ...]
    left: tuple[tuple[str, str], ...]
    nodes_before: int
    nodes_after: int
    files: tuple[Path, ...] = field(default=())

    def __str__(self) -> str:
        head = f"{len(self.found)} weights folded, {self.nodes_before} -> {self.nodes_after} nodes"
        lines = [head if self.found else f"no weight norm found, {self.nodes_before} nodes kept"]
        lines += columns([(f.value, by(f.shape), f.dtype, f"from {f.g or 'no magnitude'}, {f.v}") for f in self.found])
        lines += [f"  left: {name}: {reason}" for name, reason in self.left]
        return "\n".join([*lines, *(f"wrote {path}" for path in self.files)])


def find_weight_norms(model: Path_ | ir.Model, *, compose: Compose | None = None) -> list[Found]:
    """Every weight that an ONNX graph computes as g * v / ||v|| from constants, whatever operations it uses.

    >>> find_weight_norms("generator.onnx")[0].v  # doctest: +SKIP
    'ups.0.weight_v'

    Args:
        model: path of an ONNX file, or an `onnx_ir.Model`, which is not changed.
        compose: (g, v, magnitude) -> weight on numpy arrays; default: this package's `compose`.

    Raises InputMissingError, InputError or UnsafeFileError for a file that cannot be read.
    """
    if not isinstance(model, ir.Model):
        opened = read_onnx(model)
    else:
        opened = ir.from_proto(ir.to_proto(model)) if model.functions else model
    open_norm_functions(opened)
    return list(_Matcher(opened, compose).found)


def fold_onnx(
    src: Path_, dst: Path_, *, force: bool = False, in_place: bool = False, compose: Compose | None = None
) -> OnnxFoldReport:
    """Write a copy of an ONNX file with every g * v / ||v|| of constants replaced by the plain weight.

    The weights are bit for bit those of `compose`, computed when they are written, one at a time. Names of inputs,
    outputs and remaining nodes, opset and metadata stay; a weight made of `X.weight_g`, `X.weight_v` is called
    `X.weight` if that name is free. A graph without weight norm is copied byte for byte (unless its weights live in
    a second file, whose name must change).

    >>> print(fold_onnx("generator.onnx", "generator.plain.onnx"))  # doctest: +SKIP
    78 weights folded, 661 -> 427 nodes

    Args:
        src: ONNX file, weights inside or in files beside it.
        dst: the output; with external weights, `dst.data` beside it is written too.
        force: overwrite an existing output.
        in_place: let the output be the input.
        compose: (g, v, magnitude) -> weight on numpy arrays; default: this package's `compose`.

    Raises:
        InputMissingError, InputError: `src` or its weights are missing or damaged.
        UnsafeFileError: its weights lie outside its directory.
        OutputExistsError, OutputError: `dst` exists, or could not be written.
        SelectionError: `dst` has the suffix of a checkpoint.
    """
    from wnsurgery.stores import is_file_name
    from wnsurgery.stores.commit import check_output, committed, refuse_inputs

    if is_file_name(dst):
        raise SelectionError(f"{dst}: would be an ONNX graph, and is called a checkpoint", hint="call it .onnx")
    check_output(dst, src, force=force, in_place=in_place)
    model = read_onnx(src)
    weights = {Path(tensor.base_dir) / tensor.location for tensor in external_tensors(model)}
    external = bool(weights)
    refuse_inputs(dst, *weights)
    if not in_place:
        refuse_inputs(f"{dst}.data", *weights)
    report = fold_model(model, compose=compose)
    if report.found or external:
        files = write_onnx(model, dst, force=force or in_place, external=external)
    else:
        content = Path(src).read_bytes()
        with committed(dst, force=force or in_place) as file:
            file.write(content)
        files = (Path(dst),)
    return OnnxFoldReport(report.found, report.left, report.nodes_before, report.nodes_after, files)


def fold_model(model: ir.Model, *, compose: Compose | None = None) -> OnnxFoldReport:
    """`fold_onnx` on a model in memory, in place.

    >>> fold_model(ir.load("generator.onnx")).nodes_after  # doctest: +SKIP
    427
    """
    before = _count(model)
    open_norm_functions(model)
    matcher = _Matcher(model, compose)
    sources = dict.fromkeys(v for match in matcher.matches for v in matcher.constants.cone(match.value))
    weights = [_replace(match, model, matcher) for match in matcher.matches]
    for node in reversed(matcher.dead):
        node.graph.remove(node, safe=True)  # type: ignore[union-attr]
    for value in sources:
        drop_unused(value, model)
    settle(model, weights)
    return OnnxFoldReport(matcher.found, matcher.left(), before, _count(model))


# Matching ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Match:
    """A value of the graph and the constants it is made of."""

    value: ir.Value
    g: ir.Value | None
    g_shape: tuple[int, ...]  # as the magnitude is broadcast against v
    v: ir.Value
    magnitude: str
    dtype: ir.DataType
    shape: tuple[int, ...]

    @property
    def is_trivial(self) -> bool:
        """Whether every row has one element, so that the weight is g up to signs."""
        return math.prod(self.g_shape) == math.prod(self.shape)

    def magnitude_array(self, constants: Constants, memo: Memo) -> Array:
        """g as `compose` takes it: float32 for 16- and 32-bit weights, wherever that holds it exactly."""
        wide = np.dtype(np.float64 if self.dtype == ir.DataType.DOUBLE else np.float32)
        if self.g is None:
            return np.ones(self.g_shape, wide)
        g = constants.evaluate(self.g, memo).array.reshape(self.g_shape)
        narrow = _exactly(g, wide)
        return g if narrow is None else narrow

    def direction_array(self, constants: Constants, memo: Memo) -> Array:
        """v in the weight's type; raises Unknown where it does not fit into that."""
        v = _exactly(constants.evaluate(self.v, memo).array, self.dtype.numpy())
        if v is None:
            raise Unknown("the direction is finer than the weight")
        return v


class _Matcher:
    """All the weight norms of one model."""

    def __init__(self, model: ir.Model, compose: Compose | None) -> None:
        self.model = model
        self.constants = Constants(model)
        self.compose = compose or _default_compose
        self.matches = self._search()
        self.dead = self._dead_nodes()
        self.found = tuple(self._found(match) for match in self.matches)

    def _search(self) -> list[_Match]:
        """Walk up from every constant that something non-constant reads, and stop where a weight is found."""
        matches: list[_Match] = []
        seen: set[ir.Value] = set()
        for root in self._frontier():
            memo = Memo()
            todo = [root]
            while todo:
                value = todo.pop()
                if value in seen or value not in self.constants.normed:
                    continue
                seen.add(value)
                match = self._match(value, memo)
                if match is not None and value is not root and match.is_trivial:
                    match = None  # g itself, in the arithmetic of a larger weight
                if match is not None and not _rounded_before(value, memo):
                    matches.append(match)
                else:
                    todo.extend(v for v in value.producer().inputs if v is not None)  # type: ignore[union-attr]
        position = _position(self.model)
        return sorted(matches, key=lambda match: position(match.value.producer()))  # type: ignore[arg-type]

    def _frontier(self) -> list[ir.Value]:
        """Constants behind a norm that a run-time operation, or the caller, reads."""
        normed = self.constants.normed
        return [
            value
            for value in normed
            if value.is_graph_output() or any(out not in normed for node, _ in value.uses() for out in node.outputs)
        ]

    def _match(self, value: ir.Value, memo: Memo) -> _Match | None:
        try:
            weight = self.constants.evaluate(value, memo)
        except Unknown:
            return None
        if weight.dtype not in _FLOATS or weight.array.ndim == 0 or weight.array.size == 0:
            return None
        cone = self.constants.cone(value)
        sources = [v for v in cone if v not in self.constants.normed]
        directions = [v for v in sources if _fits(memo.kinds[v], weight) and _origin(v) is not None]
        magnitudes = list(self._magnitudes(sources, memo, weight.array))
        for v, (g, shape, magnitude) in product(directions, magnitudes):
            match = _Match(value, g, shape, v, magnitude, weight.dtype, weight.array.shape)
            if (g is None or _origin(g) is not _origin(v)) and self._agrees(match, memo, weight.array):
                return match
        return None

    def _magnitudes(
        self, sources: list[ir.Value], memo: Memo, weight: Array
    ) -> Iterator[tuple[ir.Value | None, tuple[int, ...], str]]:
        """Magnitudes that fit by shape and by size (the norms of the rows are |g|), best first."""
        target = _sum_of_squares(weight)
        ranked: list[tuple[float, int, tuple[ir.Value | None, tuple[int, ...], str]]] = []
        for value in sources:
            size, dtype = memo.kinds[value]
            for shape in _readings(size, weight.shape) if dtype.is_floating_point() else ():
                distance = abs(_sum_of_squares(self.constants.evaluate(value, memo).array) - target)
                log = _logarithm(value)
                ranked.append((distance, len(ranked), (value, shape, "linear") if log is None else (log, shape, "log")))
        for shape in _unit_shapes(weight.shape):
            distance = abs(float(np.prod(shape, dtype=np.float64)) - target)
            ranked.append((distance, len(ranked), (None, shape, "linear")))
        for _, _, candidate in sorted(ranked, key=lambda entry: entry[:2])[:_TRIES]:
            yield candidate

    def _agrees(self, match: _Match, memo: Memo, weight: Array) -> bool:
        try:
            g, v = match.magnitude_array(self.constants, memo), match.direction_array(self.constants, memo)
            empty = 0
            slack = _slack(match, weight.size)
            for rows, magnitude in _rows(g, v):
                expected = self.compose(magnitude, v[rows], match.magnitude)
                found = _zeros_for_nan(weight[rows], expected, match.dtype, slack)
                if found is None:
                    return False
                empty += found
        except (Unknown, PairError, ValueError):
            return False
        return empty < weight.size

    def weight_of(self, match: _Match) -> Callable[[], Array]:
        """A function that computes the folded weight, to the bit what `compose` gives, and outlives the graph."""
        memo = Memo()
        g = match.magnitude_array(self.constants, memo)
        stored = match.v.producer() is None  # then it is read again when it is needed, and not held meanwhile
        held = None if stored else match.direction_array(self.constants, memo)

        def weight() -> Array:
            v = match.direction_array(self.constants, Memo()) if held is None else held
            return self.compose(g, v, match.magnitude)

        return weight

    def _dead_nodes(self) -> list[ir.Node]:
        """Nodes that nothing needs once the matched values are initializers, in the graph's order."""
        replaced = {match.value for match in self.matches}
        cones = {v.producer() for match in self.matches for v in self.constants.cone(match.value)}
        order = sorted((node for node in cones if node is not None), key=_position(self.model))
        dead: set[ir.Node] = set()
        for node in reversed(order):
            value = node.outputs[0]
            read = value.is_graph_output() or any(user not in dead for user, _ in value.uses())
            if value in replaced or not read:
                dead.add(node)
        return [node for node in order if node in dead]

    def _found(self, match: _Match) -> Found:
        cone = {v.producer() for v in self.constants.cone(match.value)}
        nodes = tuple(_node_name(node) for node in self.dead if node in cone)
        g = None if match.g is None else _origin(match.g) or match.g
        v = _origin(match.v) or match.v
        return Found(
            printable(match.value.name),
            None if g is None else printable(g.name),
            printable(v.name),
            match.magnitude,
            nodes,
            match.shape,
            match.dtype.name.lower(),
        )

    def left(self) -> tuple[tuple[str, str], ...]:
        """Every norm that stays in the graph, and why."""
        dead = set(self.dead)
        reasons = []
        for node in self.constants.norms:
            if node not in dead:
                reasons.append((_node_name(node), self._why_left(node)))
        for node, why in function_norms(self.model):
            reasons.append((_node_name(node), f"inside a function that {why}"))
        return tuple(reasons)

    def _why_left(self, node: ir.Node) -> str:
        source = node.inputs[0]
        if source is None or not self.constants.is_constant(source):
            overridable = source is not None and source.const_value is not None
            return "a caller may override its initializer" if overridable else "it normalises a run-time value"
        if node.outputs[0] in self.constants.normed:
            return "constant, but no part of g * v / ||v||"
        return "constant, but not in a way that can be evaluated"


def _origin(value: ir.Value) -> ir.Value | None:
    """The initializer or Constant behind nothing but casts and changes of shape."""
    node = value.producer()
    while node is not None and node.op_type in _LAYOUT and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value if node is None or node.op_type == "Constant" else None


def _fits(kind: tuple[tuple[int, ...], ir.DataType], weight: Evaluated) -> bool:
    return kind[0] == weight.array.shape and kind[1].is_floating_point()


def _blocks(size: int) -> Iterator[slice]:
    """Slices over a flat array, so that comparing two large ones needs no third."""
    return (slice(i, i + _BLOCK) for i in range(0, size, _BLOCK))


def _sum_of_squares(array: Array) -> float:
    flat = array.reshape(-1)
    return float(sum(np.nansum(np.square(flat[block], dtype=np.float64)) for block in _blocks(flat.size)))


def _rows(g: Array, v: Array) -> Iterator[tuple[slice, Array]]:
    """Rows of v with their magnitudes, as many at a time as are compared in one go; all where rows share a norm."""
    if g.ndim != v.ndim or g.shape[0] != v.shape[0] or set(g.shape[1:]) - {1}:
        yield slice(None), g
        return
    step = max(1, _BLOCK * 2 // max(1, v[:1].size))
    for start in range(0, len(v), step):
        yield slice(start, start + step), g[start : start + step]


def _slack(match: _Match, size: int) -> float:
    """By how many units a graph's own arithmetic may differ: float32 sums of a row lose a little with each doubling."""
    if match.dtype == ir.DataType.DOUBLE:
        return 64
    slack = 8 if is_large(size, match.dtype) else 4  # a large one was rounded at every step
    row = max(1, math.prod(match.shape) // max(1, math.prod(match.g_shape)))
    return slack + 2 * math.log2(row) if match.dtype == ir.DataType.FLOAT else slack


def _zeros_for_nan(weight: Array, expected: Array, dtype: ir.DataType, slack: float) -> int | None:
    """How many elements are NaN where zero is expected; None where the two differ by more than `slack` units."""
    eps, tiny = _resolution(dtype)
    empty = 0
    for block in _blocks(weight.size):
        w = weight.reshape(-1)[block].astype(np.float64, copy=False)
        e = expected.reshape(-1)[block].astype(np.float64)
        close = np.abs(e - w) <= slack * (eps * np.abs(w) + tiny)
        # 0 / 0: the graph gives NaN for a row of zeros, where the folded weight is zero
        nothing = np.isnan(w) & (e == 0)
        if not bool((close | nothing).all()):
            return None
        empty += int(np.count_nonzero(nothing))
    return empty


def _rounded_before(value: ir.Value, memo: Memo) -> bool:
    """Whether a value is a widened copy of a narrower one: the weight is the narrow one, rounding included."""
    size = memo.kinds[value][1].itemsize
    node = value.producer()
    while node is not None and node.op_type in _LAYOUT and node.inputs[0] in memo.kinds:
        if memo.kinds[node.inputs[0]][1].itemsize < size:
            return True
        node = node.inputs[0].producer()
    return False


def _logarithm(value: ir.Value) -> ir.Value | None:
    node = value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Exp" else None


def _readings(g: tuple[int, ...], v: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes under which a constant can be a magnitude of v: broadcast as ONNX does, or one row per group."""
    padded = (1,) * (len(v) - len(g)) + g
    if g == () or (len(padded) == len(v) and all(a in (1, b) for a, b in zip(padded, v, strict=True))):
        return [g if g == () else padded]
    if len(g) == len(v) + 1 and g[1] == 1:
        g = (g[0], *g[2:])  # (groups, 1, out/groups, 1...) against (groups, in/groups, out/groups, k...)
    groups = len(g) == len(v) >= 3 and g[0] > 1 and g[1] == v[1] and set(g[2:]) == {1} and v[0] % g[0] == 0
    return [g] if groups else []


def _unit_shapes(v: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Shapes of a magnitude of ones, for weights that are v / ||v||: one kept axis, one reduced axis, or none kept."""
    shapes: set[tuple[int, ...]] = {()}
    for axis in range(len(v)):
        shapes.add(tuple(s if d == axis else 1 for d, s in enumerate(v)))
        shapes.add(tuple(1 if d == axis else s for d, s in enumerate(v)))
    return shapes


def _exactly(array: Array, dtype: np.dtype[Any]) -> Array | None:
    """float64 values in a narrower type, if they survive the trip."""
    narrow = array.astype(dtype, copy=False)
    if narrow is array:
        return array
    for block in _blocks(array.size):
        if not np.array_equal(narrow.reshape(-1)[block].astype(np.float64), array.reshape(-1)[block], equal_nan=True):
            return None
    return narrow


def _resolution(dtype: ir.DataType) -> tuple[float, float]:
    """The relative step of a type, and the smallest number above zero."""
    import ml_dtypes

    info: Any = ml_dtypes.finfo(dtype.numpy())  # type: ignore[no-untyped-call]
    return float(info.eps), float(info.smallest_subnormal)


def _default_compose(g: Array, v: Array, magnitude: str) -> Array:
    """This package's `compose` on numpy arrays, bfloat16 included."""
    import torch

    from wnsurgery.reparam import compose

    def tensor(array: Array) -> torch.Tensor:
        array = np.require(array, requirements=["C", "W"])
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    with torch.no_grad():
        w = compose(tensor(g), tensor(v), magnitude="log" if magnitude == "log" else "linear")
    if w.dtype == torch.bfloat16:
        return w.contiguous().view(torch.int16).numpy().view(v.dtype)
    return w.contiguous().numpy()


# Changing the graph --------------------------------------------------------------------------------------


def _replace(match: _Match, model: ir.Model, matcher: _Matcher) -> ir.Value:
    """Let an initializer stand where the computed weight stood."""
    name, weight = _plain_name(match, model), matcher.weight_of(match)
    return put_initializer(model, match.value, name, weight, match.dtype, match.shape)


def _plain_name(match: _Match, model: ir.Model) -> str:
    """`X.weight` for a weight made of `X.weight_v` or `X.parametrizations.weight.original1`, if that is free."""
    name = str(match.value.name)
    half = _HALF.fullmatch(str((_origin(match.v) or match.v).name))
    if match.value.is_graph_output() or half is None:
        return name
    plain = half["old"] or (f"{half['stem']}.{half['new']}" if half["stem"] else half["new"])
    return name if plain in _names(model) else plain


def _names(model: ir.Model) -> set[str]:
    names: set[str] = set()
    for graph in all_graphs(model):
        values: Iterable[ir.Value] = (*graph.inputs, *getattr(graph, "initializers", {}).values())
        names.update(str(v.name) for v in values)
        names.update(str(v.name) for node in graph for v in node.outputs)
    return names


def _count(model: ir.Model) -> int:
    return sum(len(graph) for graph in all_graphs(model))


def _node_name(node: ir.Node) -> str:
    return printable(node.name or node.outputs[0].name or node.op_type)


def _position(model: ir.Model) -> Callable[[ir.Node], int]:
    place = {node: i for i, node in enumerate(n for graph in all_graphs(model) for n in graph)}
    return lambda node: place[node]
