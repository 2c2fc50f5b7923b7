"""Functions of an ONNX model that normalise what they are given: put into the graph where that is constant."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from wnsurgery.onnx_nodes import graphs_of, nodes_within
from wnsurgery.onnx_values import is_norm

__all__ = ["function_norms", "open_norm_functions"]

_MAX_NODES = 200_000  # of all bodies put in place; functions that call each other twice double at every level
_MAX_COPIES = 1_000  # of one body; to find names for them takes time in the square of their number
_MAX_FUNCTIONS = 300  # that may call each other in a chain

_Sources = (
    frozenset[int] | None
)  # the parameters that a value is computed from; None where it is known at run time only
_Id = tuple[str, str, str]
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def open_norm_functions(model: ir.Model) -> None:
    """Inline the functions that take the norm of a constant somewhere, and no others."""
    from onnx_ir.passes.common import InlinePass

    wanted = {key for key in _wanted(model) if _foreign(model, key) is None}
    if not wanted or not _are_few(model, wanted):
        return
    for key in wanted:
        model.functions[key].opset_imports.update(model.opset_imports)  # by which they mean the same
    with contextlib.suppress(ir.passes.PreconditionError):  # functions that call each other in a circle
        InlinePass(criteria=lambda function: function.identifier() in wanted)(model)


def function_norms(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """The norms that stand in functions after that, and why they do."""
    if not any(is_norm(node) for function in model.functions.values() for node in nodes_within(function)):
        return
    wanted = _wanted(model)
    for key, function in model.functions.items():
        why = _foreign(model, key) or "cannot be opened: its calls go in a circle, or are too many"
        why = why if key in wanted else "takes run-time values"
        yield from ((node, why) for node in nodes_within(function) if is_norm(node))


def _foreign(model: ir.Model, key: _Id) -> str | None:
    """Why a function cannot stand in the graph as it is: an operation means another thing there; None where it can.

    Versions of an operator set differ in some operations only; with the same version of each, the meaning is the same.
    """
    function = model.functions[key]
    known = [model.opset_imports, *(other.opset_imports for other in model.functions.values())]
    for domain, version in function.opset_imports.items():
        others = {imports.get(domain, version) for imports in known} - {version}
        nodes = [node for node in nodes_within(function) if _plain(node.domain) == _plain(domain)] if others else []
        for node in nodes:
            if len({_since(node, v) for v in (version, *others)}) > 1:
                return f"is written for opset {version}, the graph for {model.opset_imports.get(domain, version)}"
    if any(attribute.type in _GRAPHS for attribute in function.attributes.values()):
        return "takes graphs as attributes"
    return None


def _plain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _since(node: ir.Node, version: int) -> int:
    """The opset that gave an operation the meaning it has in a version; that version where nothing is known of it."""
    import onnx

    try:
        return int(onnx.defs.get_schema(node.op_type, version, _plain(node.domain)).since_version)
    except (onnx.defs.SchemaError, TypeError):
        return version


def _wanted(model: ir.Model) -> set[_Id]:
    if len(model.functions) > _MAX_FUNCTIONS:
        return set()
    return _Summaries(model).wanted()


class _Summaries:
    """For every function, what each of the norms in it depends on."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.norms: dict[_Id, tuple[_Sources, ...]] = {}
        self.open: set[_Id] = set()  # being looked at: a function that calls itself has no summary

    def wanted(self) -> set[_Id]:
        """Functions with a norm of constants, and those that they hand such a norm on to."""
        found: set[_Id] = set()
        for node, arguments in self._calls(self.model.graph, dict.fromkeys(self.model.graph.inputs)):
            if any(_seen_from(sources, arguments) is not None for sources in self._of(node.op_identifier())):
                todo = [node.op_identifier()]
                while todo:
                    key = todo.pop()
                    if key not in found and self._of(key):
                        found.add(key)
                        todo += [n.op_identifier() for n in nodes_within(self.model.functions[key]) if self._is_call(n)]
        return found

    def _of(self, key: _Id) -> tuple[_Sources, ...]:
        if key not in self.norms:
            if key in self.open:
                return ()
            self.open.add(key)
            function = self.model.functions[key]
            known: dict[ir.Value, _Sources] = {v: frozenset((i,)) for i, v in enumerate(function.inputs)}
            norms: list[_Sources] = []
            for node, arguments in self._calls(function, known):
                norms += [_seen_from(sources, arguments) for sources in self._of(node.op_identifier())]
            norms += [known.get(n.inputs[0], frozenset()) for n in nodes_within(function) if is_norm(n) and n.inputs[0]]
            self.norms[key] = tuple(dict.fromkeys(norms))
            self.open.discard(key)
        return self.norms[key]

    def _calls(
        self, body: ir.Graph | ir.Function, known: dict[ir.Value, _Sources]
    ) -> list[tuple[ir.Node, list[_Sources]]]:
        """The calls in a body with what their arguments depend on; fills `known` for every value on the way."""
        found = []
        for node in nodes_within(body):
            for value in (v for graph in graphs_of(node) for v in graph.inputs):
                known[value] = None
            arguments = [frozenset() if v is None else known.get(v, frozenset()) for v in node.inputs]
            if self._is_call(node):
                found.append((node, arguments))
            inner = [known.get(v, frozenset()) for graph in graphs_of(node) for v in graph.outputs]
            for output in node.outputs:
                known[output] = _together([*arguments, *inner])
        return found

    def _is_call(self, node: ir.Node) -> bool:
        return node.op_identifier() in self.model.functions


def _together(sources: Sequence[_Sources]) -> _Sources:
    parts = [part for part in sources if part is not None]
    return frozenset().union(*parts) if len(parts) == len(sources) else None


def _seen_from(sources: _Sources, arguments: Sequence[_Sources]) -> _Sources:
    """What a function's norm depends on, in terms of the one who calls it."""
    if sources is None:
        return None
    return _together([arguments[i] if i < len(arguments) else frozenset() for i in sources])


def _are_few(model: ir.Model, wanted: set[_Id]) -> bool:
    """Whether these functions can all be put in place in reasonable time; calls in a circle are told elsewhere."""
    calls = {key: _calls(model.functions[key], wanted) for key in model.functions}
    copies = _calls(model.graph, wanted)
    for key in model.functions.keys() - wanted:
        copies += calls[key]
    order = _callers_first(calls, wanted)
    for key in order:
        for called, times in calls[key].items():
            copies[called] += times * copies[key]
        if copies[key] > _MAX_COPIES:
            return False
    sizes = {key: sum(1 for _ in nodes_within(model.functions[key])) for key in wanted}
    return sum(copies[key] * sizes[key] for key in wanted) <= _MAX_NODES


def _calls(body: ir.Graph | ir.Function, wanted: set[_Id]) -> Counter[_Id]:
    return Counter(node.op_identifier() for node in nodes_within(body) if node.op_identifier() in wanted)


def _callers_first(calls: Mapping[_Id, Counter[_Id]], wanted: set[_Id]) -> list[_Id]:
    """Functions in an order in which each comes after those that call it."""
    order: dict[_Id, None] = {}
    open_: set[_Id] = set()

    def visit(key: _Id) -> None:
        if key not in order and key not in open_:
            open_.add(key)
            for called in calls[key]:
                visit(called)
            order[key] = None

    for key in wanted:
        visit(key)
    return list(reversed(order))
