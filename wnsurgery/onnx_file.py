"""ONNX files in and out: read lazily and distrustfully, written whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from wnsurgery.errors import InputError, InputMissingError, OutputError, UnsafeFileError, printable

__all__ = ["all_graphs", "external_tensors", "one_line", "read_onnx", "staged_onnx", "write_onnx"]

Path_ = str | os.PathLike[str]

_EMBED_LIMIT = 1_900_000_000  # protobuf messages end at 2 GiB; weights beyond this go to a file of their own
_SMALL = 256  # bytes; what is smaller stays in the graph, as in other exporters


def read_onnx(path: Path_) -> ir.Model:
    """Read an ONNX file; weights in external files are checked now and read when they are looked at.

    >>> read_onnx("model.onnx").graph.inputs[0].name  # doctest: +SKIP
    'input'

    Raises:
        InputMissingError: the file, or one with its weights, does not exist.
        InputError: damaged, not ONNX, or its external weights do not fit their file.
        UnsafeFileError: external weights outside the file's own directory.
    """
    path = Path(path)
    _refuse_irregular(path, path)
    try:
        with _quiet():
            model = ir.load(path, format="protobuf")
    except (MemoryError, KeyboardInterrupt):
        raise
    except OSError as error:
        raise InputError.of(path, error.strerror or one_line(error)) from error
    except Exception as error:
        # parsers raise errors of many unrelated classes; whatever they choke on is the file
        raise InputError.of(path, f"damaged, or not an ONNX file: {one_line(error)}") from error
    if not model.ir_version or not model.opset_imports:
        raise InputError.of(path, "damaged, or not an ONNX file: it holds no graph")
    base = path.parent.resolve()
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = str(base)
            _check_external(tensor, path, base)
        else:
            _check_inside(tensor, path)
    _check_order(model, path)
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The reader says on stderr, once for each, what `_check_order` will refuse."""
    logger = logging.getLogger("onnx_ir.serde")

    def drop(_: logging.LogRecord) -> bool:
        return False

    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


def _check_order(model: ir.Model, path: Path) -> None:
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
        for attribute in current.attributes.values():
            if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
                continue
            inner = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else attribute.value
            todo.extend(n for graph in inner for n in graph)


def write_onnx(model: ir.Model, path: Path_, *, force: bool = False, external: bool = False) -> tuple[Path, ...]:
    """Write a model whole or not at all; returns the files written, the graph first. See `staged_onnx`."""
    with staged_onnx(model, path, force=force, external=external) as staged:
        names = sorted(file.name for file in staged.parent.iterdir())
    return tuple(Path(path).with_name(name) for name in names)


@contextlib.contextmanager
def staged_onnx(model: ir.Model, path: Path_, *, force: bool = False, external: bool = False) -> Iterator[Path]:
    """Write a model into a hidden directory beside its place, let the caller look at it, then rename it into place.

    Weights stay in the file unless they were external before, are too big for one, or `external` asks for it; then
    they all go to `NAME.data` beside it, and are renamed first. Nothing is left where the block raises.

    Raises:
        OutputExistsError: the output exists and `force` is not given.
        OutputError: it could not be written; what stood there is intact.
    """
    from wnsurgery.stores.commit import beside, check_output

    path = Path(path)
    data = path.with_name(f"{path.name}.data")
    external = external or _needs_external(model)
    for output in (path, data) if external else (path,):
        # the old file may still be read from: renaming over it is safe where writing would not be
        check_output(output, force=force)
    work = beside(path, f".{secrets.token_hex(6)}.tmp")
    try:
        with _output_errors(path):
            work.mkdir()
            ir.save(
                model,
                work / path.name,
                external_data=data.name if external else None,
                size_threshold_bytes=_SMALL,
                callback=_release_previous(),
            )
            names = [name for name in (data.name, path.name) if (work / name).exists()]
            for name in names:
                _flush(work / name)
        yield work / path.name
        with _output_errors(path):
            _publish(work, path.parent, names)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _release_previous() -> Callable[[Any, Any], None]:
    """Let go of the mapped file behind each tensor once the next one is written: its pages would pile up."""
    previous: list[Any] = []

    def step(tensor: Any, _: Any) -> None:
        if previous and isinstance(previous[0], ir.ExternalTensor):
            previous[0].release()
        previous[:] = [tensor]

    return step


@contextlib.contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except ir.serde.SerdeError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None  # what went wrong with a weight, without the layers it passed through
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror or one_line(error)}") from error
    except ValueError as error:
        raise InputError.of(path, f"cannot be written: {one_line(error)}") from error


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Every tensor of a model, functions and subgraphs included, whose bytes live in another file."""
    return (tensor for tensor in _tensors(model) if isinstance(tensor, ir.ExternalTensor))


def _tensors(model: ir.Model) -> Iterator[Any]:
    for graph in all_graphs(model):
        for value in getattr(graph, "initializers", {}).values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.value
                if attribute.type == ir.AttributeType.TENSORS:
                    yield from attribute.value


def all_graphs(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    """The main graph, every function body, and every subgraph under them."""
    todo: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    while todo:
        graph = todo.pop(0)
        yield graph
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.GRAPH:
                    todo.append(attribute.value)
                elif attribute.type == ir.AttributeType.GRAPHS:
                    todo.extend(attribute.value)


def one_line(error: object, limit: int = 300) -> str:
    """An error's message as one printable line."""
    text = " ".join(str(error).split())
    return printable(text, limit) or type(error).__name__


def _refuse_irregular(path: Path, blame: Path) -> int:
    """The size of a regular file; anything else is refused before something waits on it."""
    try:
        found = path.stat()
    except FileNotFoundError:
        where = "" if path == blame else f"its weights file {printable(path.name)} is missing: "
        raise InputMissingError(f"{blame}: {where}no such file") from None
    except (OSError, ValueError) as error:
        raise InputError.of(blame, getattr(error, "strerror", None) or one_line(error)) from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise InputError.of(blame, kind if path == blame else f"its weights file {printable(path.name)} is {kind}")
    return found.st_size


def _check_inside(tensor: Any, path: Path) -> None:
    """A tensor in the graph itself must hold as many elements as its shape says, of a type that there is."""
    name = printable(tensor.name or "?")
    if tensor.dtype == ir.DataType.UNDEFINED or any(not isinstance(s, int) or s < 0 for s in tensor.shape):
        raise InputError.of(path, f"{name}: a tensor without a type, or of negative size")
    try:
        if isinstance(tensor, ir.StringTensor):
            tensor.numpy()
    except ValueError as error:
        raise InputError.of(path, f"{name}: {one_line(error)}") from error
    if not isinstance(tensor, ir.serde.TensorProtoTensor):
        return
    proto = tensor.raw
    if proto.HasField("raw_data") and tensor.dtype != ir.DataType.STRING:
        held = len(proto.raw_data)
        if held != tensor.nbytes:
            raise InputError.of(path, f"{name}: {held} bytes where its shape needs {tensor.nbytes}")
        return
    fields = (proto.float_data, proto.int32_data, proto.int64_data, proto.uint64_data, proto.double_data)
    if tensor.size and not any(map(len, (*fields, proto.string_data))):
        raise InputError.of(path, f"{name}: no elements where its shape needs {tensor.size}")
    try:
        if tensor.size:
            tensor.numpy()
    except (ValueError, TypeError, AssertionError, OverflowError) as error:
        raise InputError.of(path, f"{name}: {one_line(error)}") from error


def _check_external(tensor: ir.ExternalTensor, path: Path, base: Path) -> None:
    name, place = printable(tensor.name or "?"), printable(str(tensor.location))
    try:
        target = Path(base, str(tensor.location)).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError.of(path, f"{name}: its weights file {place} cannot be found") from error
    if not target.is_relative_to(base):
        raise UnsafeFileError(f"{path}: {name}: its weights file {place} lies outside the model's directory")
    if target != base / os.path.normpath(tensor.location):
        raise UnsafeFileError(f"{path}: {name}: its weights file {place} is a link")
    size = _refuse_irregular(target, path)
    if target.stat().st_nlink > 1:
        # as onnx and onnxruntime do: whoever may make links here can bring in a file he may not read
        raise UnsafeFileError(f"{path}: {name}: its weights file {place} has several names (hard links)")
    offset, length = tensor.offset or 0, tensor.nbytes if tensor.length is None else tensor.length
    if offset < 0 or length < 0 or offset + length > size:
        raise InputError.of(path, f"{name}: bytes {offset} to {offset + length} do not exist in {place} ({size} bytes)")
    if length != tensor.nbytes:
        raise InputError.of(path, f"{name}: {length} bytes in {place} where its shape needs {tensor.nbytes}")


def _needs_external(model: ir.Model) -> bool:
    if next(external_tensors(model), None) is not None:
        return True
    sizes = (v.const_value.nbytes for g in all_graphs(model) for v in getattr(g, "initializers", {}).values())
    return bool(sum(sizes) > _EMBED_LIMIT)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _publish(work: Path, directory: Path, names: list[str]) -> None:
    """Rename into place, weights before the graph that points to them; undo the first if the second fails."""
    done: list[str] = []
    for name in names[:-1]:
        with contextlib.suppress(OSError):
            os.link(directory / name, work / ".old")
        (work / name).replace(directory / name)
        done.append(name)
    try:
        (work / names[-1]).replace(directory / names[-1])
    except OSError:
        for name in done:
            if (work / ".old").exists():
                (work / ".old").replace(directory / name)
            else:
                (directory / name).unlink()
        raise
