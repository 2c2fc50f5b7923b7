"""What an ONNX model must hold to before it is worked on: names given once, operations complete and in order."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from types import TracebackType
from typing import Any

import onnx_ir as ir

from wnsurgery.errors import InputError, WnsurgeryError, printable
from wnsurgery.onnx_nodes import all_graphs, graphs_of, nodes_within

__all__ = ["blamed_on", "check_names", "check_operations", "check_order", "one_line", "quiet"]

Path_ = str | os.PathLike[str]


@contextlib.contextmanager
def blamed_on(path: Path_) -> Iterator[None]:
    """Work on a graph that came from a file: what the libraries choke on is the file, and nothing else is printed.

    Parsers and passes raise errors of many unrelated classes. Those raised under onnx or onnx_ir become InputError;
    those raised by code of ours are bugs, and stay what they are.
    """
    try:
        with quiet():
            yield
    except (WnsurgeryError, MemoryError):
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if _raised_under(cause.__traceback__) == "wnsurgery":
            raise
        if isinstance(cause, OSError) and cause.strerror:
            raise InputError.of(path, cause.strerror) from error
        raise InputError.of(path, f"damaged, or not an ONNX file that can be read: {one_line(cause)}") from error


def _raised_under(trace: TracebackType | None) -> str:
    """The innermost of the packages concerned that was at work."""
    found = ""
    while trace is not None:
        package = str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]
        found = package if package in ("wnsurgery", "onnx", "onnx_ir", "google") else found
        trace = trace.tb_next
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What onnx_ir would log on stderr is dropped: errors say it, and the rest is of no use to who runs a command."""
    logger, nowhere = logging.getLogger("onnx_ir"), logging.NullHandler()
    before = logger.propagate
    logger.addHandler(nowhere)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(nowhere)


def one_line(error: object, limit: int = 300) -> str:
    """An error's message as one printable line."""
    text = " ".join(str(error).split())
    return printable(text, limit) or type(error).__name__


def check_names(proto: Any, path: Path_) -> None:
    """Each name of an initializer, a value or a node is given once in its graph, as onnxruntime demands."""
    bodies: list[Any] = [proto.graph, *proto.functions]
    for body in bodies:
        initializers = [tensor.name for tensor in getattr(body, "initializer", ())]
        _refuse_repeated(initializers, "initializer", path)
        _refuse_repeated((name for node in body.node for name in node.output if name), "value", path)
        _refuse_repeated((node.name for node in body.node if node.name), "node", path)
        for attribute in (attribute for node in body.node for attribute in node.attribute):
            bodies += [attribute.g] if attribute.HasField("g") else []
            bodies += attribute.graphs


def _refuse_repeated(names: Iterable[str], what: str, path: Path_) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InputError.of(path, f"two {what}s have the name {printable(name)}")
        seen.add(name)


def check_operations(model: ir.Model, path: Path_) -> None:
    """Every operation that the ONNX standard knows has as many inputs and outputs as it says, none left out."""
    _check_body(model.graph, model.opset_imports, path)
    for function in model.functions.values():
        _check_body(function, function.opset_imports, path)


def _check_body(body: ir.Graph | ir.Function, imports: Mapping[str, int], path: Path_) -> None:
    for node in nodes_within(body):
        name = printable(node.name or next((v.name for v in node.outputs if v.name), None) or node.op_type)
        if any(a.type == ir.AttributeType.UNDEFINED for a in node.attributes.values()):
            raise InputError.of(path, f"{name}: an attribute without a type")
        version = imports.get("", imports.get("ai.onnx", 0))
        counts = _counts(node.op_type, version) if node.domain in ("", "ai.onnx") else None
        if counts is None:
            continue
        inputs, outputs, needed = counts
        for kind, (least, most), found in (("inputs", inputs, node.inputs), ("outputs", outputs, node.outputs)):
            if not least <= len(found) <= most:
                raise InputError.of(path, f"{name}: {node.op_type} has {len(found)} {kind}, which it cannot have")
        if any(value is None for value, need in zip(node.inputs, needed, strict=False) if need):
            raise InputError.of(path, f"{name}: {node.op_type} lacks an input that it needs")


@cache
def _counts(operation: str, version: int) -> tuple[tuple[int, int], tuple[int, int], tuple[bool, ...]] | None:
    """How many inputs and outputs an operation can have, and which inputs it must have; None where it is not known."""
    import onnx

    try:
        schema: Any = onnx.defs.get_schema(operation, version, "")
    except (onnx.defs.SchemaError, TypeError):
        return None
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    needed = tuple(value.option == single for value in schema.inputs)
    return (schema.min_input, schema.max_input), (schema.min_output, schema.max_output), needed


def check_order(model: ir.Model, path: Path_) -> None:
    """Every value that is read is given by something, and none by itself; operations come in an order they can run."""
    graphs = [graph for graph in all_graphs(model) if isinstance(graph, ir.Graph)]
    for value in (v for graph in graphs for node in graph for v in node.inputs):
        if value is None or value.producer() is not None or value.is_graph_input() or value.is_initializer():
            continue
        name = printable(value.name or "?")
        raise InputError.of(path, f"nothing gives {name}, which an operation reads (sparse initializers are not read)")
    try:
        for graph in graphs:
            if not _in_order(graph):
                model.graph.sort()
                break
    except ValueError as error:
        raise InputError.of(path, "its operations wait for each other in a circle") from error


def _in_order(graph: ir.Graph) -> bool:
    """Whether each node comes after those of its own graph that it reads; subgraphs of a node read for it."""
    seen: set[ir.Node] = set()
    for node in graph:
        if any(maker.graph is graph and maker not in seen for maker in _makers(node)):
            return False
        seen.add(node)
    return True


def _makers(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes whose values a node reads, itself or inside its subgraphs."""
    todo = [node]
    while todo:
        current = todo.pop()
        yield from (v.producer() for v in current.inputs if v is not None and v.producer() is not None)  # type: ignore[misc]
        todo.extend(n for graph in graphs_of(current) for n in graph)
