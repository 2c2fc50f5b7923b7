"""Weights that an ONNX graph computes as g * v / ||v||, found by what they are, however they are spelled.

Every value that a graph computes from constants alone, through a norm, is evaluated and compared with g * v / ||v|| for
the constants it is made of. Where it agrees, the pair is found, and `compose` gives the weight. What decides before a
norm is what the graph's own types make of it; where runtimes may decide otherwise, the weight is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from wnsurgery.errors import PairError, printable
from wnsurgery.onnx_functions import function_norms
from wnsurgery.onnx_nodes import all_graphs
from wnsurgery.onnx_own_types import FLOATS, Evaluated, Unknown, resolution
from wnsurgery.onnx_values import Constants, Memo, is_large

__all__ = ["Found", "Match", "Matcher", "ZeroNorm", "origin", "quietly"]

Array = np.ndarray[Any, Any]

# (g, v, "linear" or "log") -> the plain weight, of v's type and shape; ValueError where they do not fit
ZeroNorm = Literal["error", "zero", "nan"]

_LAYOUT = frozenset(("Cast", "CastLike", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))
_BLOCK = 1 << 18  # elements compared at a time
_TRIES = 6  # magnitudes worth trying for one direction, nearest in size first; computed directions for one weight
_SAME = 4  # units in the last place within which two directions are one
_UNSURE, _UNSURE_IN_16_BITS = 64, 4  # units in the last place of the largest element, by which runtimes may differ
_NEAR = 64  # values inside a weight that may turn out to be the weight
_LOST, _LOST_IN_LARGE = 2.0**-44, 2.0**-20  # of a value, by evaluating it in float64 and in float32
quietly = np.errstate(all="ignore")  # what a graph's numbers overflow to, or are no numbers of, is told in reports


@dataclass(frozen=True)
class Found:
    """One weight that a graph computes as g * v / ||v||.

    Attributes:
        value: name of the computed weight in the graph.
        g: name of the magnitude's initializer; None when the weight is v / ||v||.
        v: name of the direction's initializer, or of the value that constants make it by.
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
class Match:
    """A value of the graph and the constants it is made of."""

    value: ir.Value
    g: ir.Value | None
    g_shape: tuple[int, ...]  # as the magnitude is broadcast against v
    v: ir.Value
    magnitude: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    misfit: float = math.inf  # how far the value is from g * v / ||v||, in units of its type
    empty: int = 0  # elements for which the graph gives 0 / 0

    @property
    def is_exact(self) -> bool:
        """Whether the value is g * v / ||v|| but for what evaluating it lost."""
        return self.misfit * resolution(self.dtype)[0] <= (_LOST if self.wide == np.float64 else _LOST_IN_LARGE)

    @property
    def is_trivial(self) -> bool:
        """Whether every row has one element, so that the weight is g up to signs."""
        return math.prod(self.g_shape) == math.prod(self.shape)

    @property
    def wide(self) -> np.dtype[Any]:
        """The type in which the graph's arithmetic is judged, which is finer than the weight's own but for doubles."""
        return np.dtype(np.float32 if is_large(math.prod(self.shape), self.dtype) else np.float64)

    def magnitude_array(self, constants: Constants, memo: Memo) -> Array:
        """g as `compose` takes it: float32 for 16- and 32-bit weights, wherever that holds it exactly."""
        wide = np.dtype(np.float64 if self.dtype == ir.DataType.DOUBLE else np.float32)
        if self.g is None:
            return np.ones(self.g_shape, wide)
        g = _spread(constants.evaluate(self.g, memo).array, self.g_shape)
        narrow = _exactly(g, wide)
        return g if narrow is None else narrow

    def direction_array(self, constants: Constants, memo: Memo) -> Array:
        """v in the weight's type, raises Unknown where a stored one does not fit.

        A computed one is unrounded unless `memo` holds what the graph's own types make of it.
        """
        v = constants.evaluate(self.v, memo)
        narrow = _exactly(v.array, self.dtype.numpy())
        if narrow is None and (origin(self.v) is not None or v.dtype != self.dtype):
            raise Unknown("the direction is finer than the weight")
        return v.array if narrow is None else narrow


class Matcher:
    """All the weight norms of one model."""

    def __init__(self, model: ir.Model, zero_norm: ZeroNorm = "zero") -> None:
        self.model = model
        self.zero_norm = zero_norm
        self.holes: dict[ir.Value, Array] = {}
        self._known: dict[ir.Value, Match | None] = {}
        self._squares: dict[ir.Value, float] = {}
        self._unknown: dict[ir.Value, str] = {}  # weights that would be found, but for this
        self.constants = Constants(model)
        self._position = _position(model)
        self.matches = self._search()
        self.dead = self._dead_nodes()
        self._dead = frozenset(self.dead)
        self.found = tuple(self._found(match) for match in self.matches)

    def _search(self) -> list[Match]:
        """Walk up from every constant that something non-constant reads, and stop where a weight is found."""
        matches: list[Match] = []
        seen: set[ir.Value] = set()
        for root in self._frontier():
            memo, self._known = Memo(), {}
            todo = [root]
            while todo:
                value = todo.pop()
                if value in seen or value not in self.constants.normed:
                    continue
                seen.add(value)
                match = self._match(value, memo)
                if match is not None and value is not root and match.is_trivial:
                    match = None  # g itself, in the arithmetic of a larger weight
                if match is None or _rounded_before(value, memo) or self._ends_before(match, memo):
                    todo.extend(v for v in value.producer().inputs if v is not None)  # type: ignore[union-attr]
                else:
                    matches.append(match)
        return sorted(matches, key=lambda match: self._position(match.value.producer()))  # type: ignore[arg-type]

    def _frontier(self) -> list[ir.Value]:
        """Constants behind a norm that a run-time operation, or the caller, reads."""
        normed = self.constants.normed
        return [
            value
            for value in normed
            if value.is_graph_output() or any(out not in normed for node, _ in value.uses() for out in node.outputs)
        ]

    def _match(self, value: ir.Value, memo: Memo) -> Match | None:
        if value not in self._known:
            self._known[value] = self._matched(value, memo)
        return self._known[value]

    def _matched(self, value: ir.Value, memo: Memo) -> Match | None:
        """The g and v that a value is g * v / ||v|| of, the closest of those that fit."""
        made = self.constants.made_of(value)
        if made is None:
            return None
        made = tuple(v for v in made if v is not value)
        try:
            weight = self.constants.evaluate(value, memo)
        except Unknown as unknown:
            self._unknown.setdefault(value, str(unknown))
            return None
        if weight.dtype not in FLOATS or weight.array.ndim == 0 or weight.array.size == 0:
            return None
        fitting = [v for v in made if _fits(memo.kinds[v], weight)]
        stored = [v for v in fitting if origin(v) is not None]
        computed = [v for v in fitting if v in self.constants.under_norms and origin(v) is None][-_TRIES:]
        magnitudes = list(self._magnitudes(made, memo, weight.array))
        best: Match | None = None
        for v, (g, shape, magnitude) in product(stored + computed[::-1], magnitudes):
            match = Match(value, g, shape, v, magnitude, weight.dtype, weight.array.shape)
            if g is not None and (origin(g) or g) is (origin(v) or v):
                continue
            misfit, empty = self._misfit(match, memo, weight.array)
            match = replace(match, misfit=misfit, empty=empty)
            if match.misfit < (math.inf if best is None else best.misfit / 2):
                best = match
            if best is not None and best.is_exact:
                break
        return None if best is None else self._in_own_types(best, computed, memo, weight.array)

    def _in_own_types(self, match: Match, computed: Sequence[ir.Value], memo: Memo, weight: Array) -> Match | None:
        """The match as it holds for what the graph's own types make of g and v; None where it does not."""
        for v in reversed(computed):  # the one nearest to the norm is what is normalised
            if v is match.v or origin(match.v) is None:
                continue
            nearer = replace(match, v=v, misfit=self._misfit(replace(match, v=v), memo, weight)[0])
            if (nearer.is_exact or nearer.misfit <= match.misfit) and self._are_apart(match, nearer):
                match = nearer
                break
        if not self._is_computed(match):
            return match
        own = Memo(own_types=True)
        try:
            for what, value in (("magnitude", match.g), ("direction", match.v)):
                if value is not None:
                    _check_sure(self.constants.evaluate(value, own), what)
            misfit, empty = self._misfit(match, own, self._weight(match))
        except Unknown as unknown:
            self._unknown.setdefault(match.value, str(unknown))
            return None
        return replace(match, empty=empty) if misfit < math.inf else None

    def _is_computed(self, match: Match) -> bool:
        """Whether anything but the constants themselves is normalised, or multiplied with it."""
        return any(v is not None and v.producer() is not None for v in (match.g, match.v))

    def _are_apart(self, match: Match, other: Match) -> bool:
        """Whether two directions make different weights, once each is rounded to its type."""
        memo = Memo(own_types=True)
        try:
            g = match.magnitude_array(self.constants, memo)
            pair = [_as_type(m.direction_array(self.constants, memo), m.wide) for m in (match, other)]
            first, second = (_composed(_as_type(g, match.wide), v, match.magnitude) for v in pair)
            return not _difference(first, second, match.dtype)[0] <= _SAME + _slack(match)
        except (Unknown, PairError, ValueError):
            return True

    def _weight(self, match: Match) -> Array:
        """What the graph makes of g and v as they are in its own types."""
        own, memo = Memo(own_types=True), Memo()
        for value in (match.g, match.v):
            if value is not None:
                memo.put(value, self.constants.evaluate(value, own))
        return self.constants.evaluate(match.value, memo).array

    def _ends_before(self, match: Match, memo: Memo) -> bool:
        """Whether the weight norm ends at a value further in: what follows is near one, and yet changes the weight."""
        if match.is_exact:
            return False
        inner = (v for v in self._inside(match.value) if memo.kinds[v][0] == match.shape)
        found = (self._match(v, memo) for v in inner)
        return any(m is not None and not m.is_trivial and m.misfit < match.misfit / 2 for m in found)

    def _inside(self, value: ir.Value) -> list[ir.Value]:
        """The values behind a norm that a value is computed from, the nearest first, as many as are worth a look."""
        found, seen = [value], {value}
        for current in found:
            for v in current.producer().inputs:  # type: ignore[union-attr]
                if v is not None and v in self.constants.normed and v not in seen and len(found) <= _NEAR:
                    seen.add(v)
                    found.append(v)
        return found[1:]

    def _magnitudes(
        self, sources: Sequence[ir.Value], memo: Memo, weight: Array
    ) -> Iterator[tuple[ir.Value | None, tuple[int, ...], str]]:
        """Magnitudes that fit by shape and by size (the norms of the rows are |g|), best first."""
        target, is_full = _sum_of_squares(weight), _is_full(weight)
        ranked: list[tuple[float, int, tuple[ir.Value | None, tuple[int, ...], str]]] = []
        for value in sources:
            size, dtype = memo.kinds[value]
            for shape in _readings(size, weight.shape) if dtype.is_floating_point() else ():
                log = _logarithm(value)
                if is_full:
                    distance = abs(self._square(value, memo) * math.prod(shape) / max(1, math.prod(size)) - target)
                else:
                    distance = _row_distance(self.constants.evaluate(value, memo).array, shape, weight)
                ranked.append((distance, len(ranked), (value, shape, "linear") if log is None else (log, shape, "log")))
        for shape in _unit_shapes(weight.shape):
            distance = abs(math.prod(shape) - target) if is_full else _row_distance(np.ones(()), shape, weight)
            ranked.append((distance, len(ranked), (None, shape, "linear")))
        ranked.sort(key=lambda entry: entry[:2])
        far = 0.01 * target if ranked and ranked[-1][0] > 0.01 * target and is_full else math.inf
        for distance, _, candidate in ranked[:_TRIES]:
            if distance <= far:
                yield candidate

    def _square(self, value: ir.Value, memo: Memo) -> float:
        """The sum of a magnitude's squares."""
        if value not in self._squares:
            self._squares[value] = _sum_of_squares(self.constants.evaluate(value, memo).array)
        return self._squares[value]

    def _misfit(self, match: Match, memo: Memo, weight: Array) -> tuple[float, int]:
        """The largest difference from g * v / ||v||, in units of the weight's type; infinite where that is too much.

        With it, how many elements are 0 / 0. The graph was evaluated without rounding, so the weight it is
        compared with is not rounded either.
        """
        misfit, empty = 0.0, 0
        try:
            g, v = match.magnitude_array(self.constants, memo), match.direction_array(self.constants, memo)
            slack = _slack(match)
            for rows, magnitude in _rows(g, v):
                expected = _composed(_as_type(magnitude, match.wide), _as_type(v[rows], match.wide), match.magnitude)
                off, nothing = _difference(weight[rows], expected, match.dtype)
                misfit, empty = float(np.maximum(misfit, off)), empty + nothing  # NaN stays NaN
                if not misfit <= slack:
                    return math.inf, 0
        except (Unknown, PairError, ValueError):
            return math.inf, 0
        row = weight.size // max(1, math.prod(match.g_shape))  # 0 / 0 is a matter of whole rows
        return misfit if empty < weight.size and empty % row == 0 else math.inf, empty

    def settle_rows_without_direction(self) -> tuple[str, ...]:
        """What becomes of rows with v = 0 and g != 0, as `zero_norm` says; warnings where they fold to something.

        Raises PairError where that is to be an error.
        """
        warnings = []
        for match in (match for match in self.matches if match.empty):
            value, memo = printable(match.value.name), Memo()
            g = _as_type(match.magnitude_array(self.constants, memo), match.wide)
            scaled = _composed(g, np.ones(match.shape, match.wide), match.magnitude)
            holes = np.isnan(self._weight(match)) & (scaled != 0)
            rows = math.prod(match.g_shape)
            lost = int(np.count_nonzero(holes)) * rows // holes.size
            if not lost:
                continue
            count = f"{value}: {lost} of {rows} rows have v = 0 and g != 0"
            if self.zero_norm == "error":
                hint = "zero_norm='zero' or 'nan' (--zero-norm) says what to write"
                raise PairError(f"{count}, so no direction to fold along", hint=hint)
            if self.zero_norm == "nan":
                self.holes[match.value] = holes
            warnings.append(f"{count}; folded to {self.zero_norm}")
        return tuple(warnings)

    def weight_of(self, match: Match) -> Callable[[], Array]:
        """A function that computes the folded weight, to the bit what `compose` gives, and outlives the graph."""
        memo = Memo(own_types=True)
        g = match.magnitude_array(self.constants, memo)
        stored = match.v.producer() is None  # then it is read again when it is needed, and not held meanwhile
        held = None if stored else match.direction_array(self.constants, memo)
        holes = self.holes.get(match.value)

        @quietly
        def weight() -> Array:
            v = match.direction_array(self.constants, Memo()) if held is None else held
            exact = v.dtype == match.dtype.numpy()
            w = _as_type(_composed(g if exact else _as_type(g, v.dtype), v, match.magnitude), match.dtype.numpy())
            return w if holes is None else np.where(holes, w.dtype.type(np.nan), w)

        return weight

    def _dead_nodes(self) -> list[ir.Node]:
        """Nodes that nothing needs once the matched values are initializers, in the graph's order."""
        replaced = {match.value for match in self.matches}
        cones = {v.producer() for match in self.matches for v in self.constants.cone(match.value)}
        order = sorted((node for node in cones if node is not None), key=self._position)
        dead: set[ir.Node] = set()
        for node in reversed(order):
            needed = (value for value in node.outputs if value not in replaced)
            if not any(v.is_graph_output() or any(user not in dead for user, _ in v.uses()) for v in needed):
                dead.add(node)
        return [node for node in order if node in dead]

    def _found(self, match: Match) -> Found:
        cone = {v.producer() for v in self.constants.cone(match.value)}
        gone = sorted((node for node in cone if node in self._dead), key=self._position)
        nodes = tuple(_node_name(node) for node in gone)
        g = None if match.g is None else origin(match.g) or match.g
        v = origin(match.v) or match.v
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
        reasons, memo, unknown = [], Memo(), self._unknown_nodes()
        for node in self.constants.norms:
            if node not in self._dead:
                reasons.append((_node_name(node), self._why_left(node, memo, unknown.get(node))))
        for node, why in function_norms(self.model):
            reasons.append((_node_name(node), f"inside a function that {why}"))
        return tuple(reasons)

    def _unknown_nodes(self) -> dict[ir.Node, str]:
        """What goes into weights that are not known, with the reason why they are not."""
        reasons: dict[ir.Node, str] = {}
        for value, why in self._unknown.items():
            todo = [value]
            while todo:
                node = todo.pop().producer()
                if node is not None and node not in reasons:
                    reasons[node] = why
                    todo.extend(v for v in node.inputs if v is not None)
        return reasons

    def _why_left(self, node: ir.Node, memo: Memo, unknown: str | None) -> str:
        constants, sources = self.constants, [value for value in node.inputs if value is not None]
        told = [value for value in sources if not constants.is_constant(value)]
        if any(value.const_value is not None for value in told):
            return "a caller may override its initializer"
        if told:
            obstacles = [constants.obstacle(value) for value in told]
            if None in obstacles:
                return "it normalises a run-time value"
            return f"constant, but {obstacles[0].op_type} is not worked out here"  # type: ignore[union-attr]
        try:
            found = [constants.evaluate(value, memo).array for value in (*sources, *node.outputs)]
        except (Unknown, LookupError) as error:
            unknown = str(error)
        if unknown is not None:
            return f"constant, but not in a way that can be evaluated: {printable(unknown)}"
        if any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in found):
            return "constant, but it holds NaN or infinity"
        return "constant, but no part of anything that is found to be g * v / ||v||"


def _check_sure(found: Evaluated, what: str) -> None:
    """Raise Unknown where runtimes differ by more than some units in the last place of the largest element."""
    if found.doubt is not None:
        units = _UNSURE if found.dtype.itemsize > 2 else _UNSURE_IN_16_BITS
        if not found.doubt.max(initial=0) <= units * resolution(found.dtype)[0] * np.abs(found.array).max(initial=0):
            raise Unknown(f"the {what} differs from one runtime to the next")


def origin(value: ir.Value) -> ir.Value | None:
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


def _is_full(array: Array) -> bool:
    """Whether no element is zero or NaN, and so no row without direction."""
    flat = array.reshape(-1)
    return all(bool(np.all(flat[block]) and not np.isnan(flat[block]).any()) for block in _blocks(flat.size))


def _spread(g: Array, shape: tuple[int, ...]) -> Array:
    """A magnitude as it is broadcast against v: in another shape, or the same for several rows."""
    return g.reshape(shape) if g.size == math.prod(shape) else np.broadcast_to(g, shape)


def _row_distance(g: Array, shape: tuple[int, ...], weight: Array) -> float:
    """How far the squares of a magnitude are from those of the rows' norms, rows without direction left out."""
    kept = shape or (1,) * weight.ndim
    if kept == weight.shape or any(s not in (1, w) for s, w in zip(kept, weight.shape, strict=True)):
        return abs(_sum_of_squares(g) - _sum_of_squares(weight))  # rows of one element, or in groups
    rows, axes = np.zeros(kept), tuple(i for i, s in enumerate(kept) if s == 1)
    step = max(1, _BLOCK // max(1, weight[:1].size))
    for start in range(0, len(weight), step):
        squares = np.square(weight[start : start + step], dtype=np.float64)
        squares[np.isnan(squares)] = 0
        place = slice(start, start + step) if kept[0] > 1 else slice(None)
        rows[place] += squares.sum(axis=axes, keepdims=True)
    off = np.abs(np.square(_spread(g, shape).reshape(kept), dtype=np.float64) - rows)
    return float(np.nansum(off[rows > 0]))


def _rows(g: Array, v: Array) -> Iterator[tuple[slice, Array]]:
    """Rows of v with their magnitudes, as many at a time as are compared in one go; all where rows share a norm."""
    if g.ndim != v.ndim or g.shape[0] != v.shape[0] or set(g.shape[1:]) - {1}:
        yield slice(None), g
        return
    step = max(1, _BLOCK * 2 // max(1, v[:1].size))
    for start in range(0, len(v), step):
        yield slice(start, start + step), g[start : start + step]


def _slack(match: Match) -> float:
    """By how many units of the weight's type a graph may differ from g * v / ||v||, for an epsilon in it.

    In 16 bits it is less than there is between one and the numbers beside it, so that no factor passes for an epsilon.
    Float32 norms that an exporter worked out itself, in sums of a row, lose a little with each doubling.
    """
    if match.dtype == ir.DataType.DOUBLE:
        return 64
    if match.dtype != ir.DataType.FLOAT:
        return 0.4
    row = max(1, math.prod(match.shape) // max(1, math.prod(match.g_shape)))
    slack = 8 if match.wide == np.float32 else 4  # a large one was rounded at every step
    return slack + 2 * math.log2(row)


def _difference(weight: Array, expected: Array, dtype: ir.DataType) -> tuple[float, int]:
    """The largest difference in units of a type, NaN where it cannot be told; how many are NaN for an expected zero."""
    eps, tiny = resolution(dtype)
    largest, empty = 0.0, 0
    for block in _blocks(weight.size):
        w = weight.reshape(-1)[block].astype(np.float64, copy=False)
        e = expected.reshape(-1)[block].astype(np.float64, copy=False)
        with np.errstate(all="ignore"):
            off = np.abs(e - w) / (eps * np.abs(w) + tiny)
        # 0 / 0: the graph gives NaN for a row of zeros, where the folded weight is zero
        nothing = np.isnan(w) & (e == 0)
        off[nothing] = 0
        largest = float(np.maximum(largest, off.max(initial=0)))
        empty += int(np.count_nonzero(nothing))
        if not largest < math.inf:
            break
    return largest, empty


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
    """The shapes under which a constant can be a magnitude of v: broadcast as ONNX does, or one row per group.

    Each as it is first, then spread over rows that have their norms for themselves.
    """
    padded = (1,) * (len(v) - len(g)) + g
    if g == () or (len(padded) == len(v) and all(a in (1, b) for a, b in zip(padded, v, strict=True))):
        rows = (tuple(map(max, zip(padded, unit, strict=True))) for unit in _unit_shapes(v) if unit)
        return list(dict.fromkeys((g if g == () else padded, *sorted(shape for shape in rows if shape != v))))
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


def _as_type(array: Array, dtype: np.dtype[Any]) -> Array:
    return array.astype(dtype, copy=False)


def _exactly(array: Array, dtype: np.dtype[Any]) -> Array | None:
    """float64 values in a narrower type, if they survive the trip."""
    narrow = array.astype(dtype, copy=False)
    if narrow is array:
        return array
    for block in _blocks(array.size):
        if not np.array_equal(narrow.reshape(-1)[block].astype(np.float64), array.reshape(-1)[block], equal_nan=True):
            return None
    return narrow


def _composed(g: Array, v: Array, magnitude: str) -> Array:
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


def _node_name(node: ir.Node) -> str:
    return printable(node.name or node.outputs[0].name or node.op_type)


def _position(model: ir.Model) -> Callable[[ir.Node], int]:
    place = {node: i for i, node in enumerate(n for graph in all_graphs(model) for n in graph)}
    return lambda node: place[node]
