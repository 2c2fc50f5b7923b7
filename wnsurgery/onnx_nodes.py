"""The graphs and nodes of an ONNX model, however deep they stand in functions and subgraphs."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

__all__ = ["all_graphs", "graphs_of", "nodes_within"]


def all_graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    """The main graph, every function body, and every subgraph under them."""
    todo: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    while todo:
        graph = todo.pop(0)
        yield graph
        todo.extend(inner for node in graph for inner in graphs_of(node))


def nodes_within(body: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """Every node of a body, those of subgraphs just before the node that owns them."""
    for node in body:
        for graph in graphs_of(node):
            yield from nodes_within(graph)
        yield node


def graphs_of(node: ir.Node) -> Iterator[ir.Graph]:
    """The subgraphs that a node holds."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.value
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.value
