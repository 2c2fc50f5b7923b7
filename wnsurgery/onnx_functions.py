"""Functions of an ONNX model that normalise what they are given: put into the graph where that is constant."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir

from wnsurgery.onnx_values import is_norm

__all__ = ["function_norms", "open_norm_functions"]

_MAX_NODES = 200_000  # of all bodies put in place; functions that call each other twice double at every level
_MAX_FUNCTIONS = 300  # that may call each other in a chain

_Sources = (
    frozenset[int] | None
)  # the parameters that a value is computed from; None where it is known at run time only
_Id = tuple[str, str, str]


def open_norm_functions(model: ir.Model) -> None:
    """Inline the functions that take the norm of a constant somewhere, and no others."""
    from onnx_ir.passes.common import InlinePass

    wanted = _wanted(model)
    if wanted and _expanded(model, wanted) <= _MAX_NODES:
        with contextlib.suppress(ir.passes.PreconditionError):  # functions that call each other in a circle
            InlinePass(criteria=lambda function: function.identifier() in wanted)(model)


def function_norms(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """The norms that stand in functions after that, and why they do."""
    if not any(is_norm(node) for function in model.functions.values() for node in _nodes(function)):
        return
    wanted = _wanted(model)
    for key, function in model.functions.items():
        why = "cannot be opened" if key in wanted else "takes run-time values"
        yield from ((node, why) for node in _nodes(function) if is_norm(node))


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
                        todo += [n.op_identifier() for n in _nodes(self.model.functions[key]) if self._is_call(n)]
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
            norms += [known.get(n.inputs[0], frozenset()) for n in _nodes(function) if is_norm(n) and n.inputs[0]]
            self.norms[key] = tuple(dict.fromkeys(norms))
            self.open.discard(key)
        return self.norms[key]

    def _calls(
        self, body: ir.Graph | ir.Function, known: dict[ir.Value, _Sources]
    ) -> list[tuple[ir.Node, list[_Sources]]]:
        """The calls in a body with what their arguments depend on; fills `known` for every value on the way."""
        found = []
        for node in _nodes(body):
            for value in (v for graph in _graphs(node) for v in graph.inputs):
                known[value] = None
            arguments = [frozenset() if v is None else known.get(v, frozenset()) for v in node.inputs]
            if self._is_call(node):
                found.append((node, arguments))
            inner = [known.get(v, frozenset()) for graph in _graphs(node) for v in graph.outputs]
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


def _expanded(model: ir.Model, wanted: set[_Id]) -> int:
    """How many nodes there would be with these functions in place; their calls are known to be free of cycles."""
    sizes: dict[_Id, int] = {}

    def size(body: Any) -> int:
        return sum(of(n.op_identifier()) if n.op_identifier() in wanted else 1 for n in _nodes(body))

    def of(key: _Id) -> int:
        if key not in sizes:
            sizes[key] = _MAX_NODES + 1  # for whoever calls itself
            sizes[key] = size(model.functions[key])
        return sizes[key]

    return size(model.graph)


def _nodes(body: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """Every node of a body, those of subgraphs just before the node that owns them."""
    for node in body:
        for graph in _graphs(node):
            yield from _nodes(graph)
        yield node


def _graphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.value
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.value
