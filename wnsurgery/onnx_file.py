"""ONNX files in and out: read lazily and distrustfully, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from wnsurgery.errors import (
    InputError,
    InputMissingError,
    OutputError,
    UnsafeFileError,
    printable,
)
from wnsurgery.onnx_checks import blamed_on, check_names, check_operations, check_order, one_line, quiet
from wnsurgery.onnx_nodes import all_graphs

__all__ = [
    "external_tensors",
    "read_onnx",
    "refuse_sources",
    "staged_onnx",
    "weight_files",
    "weights_read_by",
    "write_onnx",
]

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
    with blamed_on(path):
        import onnx

        proto = onnx.load(path, format="protobuf", load_external_data=False)
        check_names(proto, path)
        model = ir.from_proto(proto)
        if not model.ir_version or not model.opset_imports:
            raise InputError.of(path, "damaged, or not an ONNX file: it holds no graph")
        base = path.parent.resolve()
        for tensor in _tensors(model):
            if isinstance(tensor, ir.ExternalTensor):
                tensor.base_dir = str(base)
                _check_external(tensor, path, base)
            else:
                _check_inside(tensor, path)
        check_operations(model, path)
        check_order(model, path)
    return model


def write_onnx(model: ir.Model, path: Path_, *, force: bool = False, external: bool = False) -> tuple[Path, ...]:
    """Write a model whole or not at all; returns the files written, the graph first. See `staged_onnx`."""
    with staged_onnx(model, path, force=force, external=external) as staged:
        names = sorted(file.name for file in staged.parent.iterdir())
    return tuple(Path(path).with_name(name) for name in names)


@contextlib.contextmanager
def staged_onnx(model: ir.Model, path: Path_, *, force: bool = False, external: bool = False) -> Iterator[Path]:
    """Write a model into a hidden directory beside its place, let the caller look at it, then rename it into place.

    Weights stay in the file unless they were external before, are too big for one, or `external` asks for it; then
    they go to `NAME.data` beside it, renamed first. Where the graph that is replaced reads that file, other weights go
    to `NAME.HASH.data`, so that each graph has its weights at every moment, and the old ones are removed in the end.
    Nothing is left where the block raises.

    Raises:
        OutputExistsError: the output exists, or comes to exist while it is written, and `force` is not given.
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
            _bring_in(model)
            ir.save(
                model,
                work / path.name,
                format="protobuf",
                external_data=data.name if external else None,
                size_threshold_bytes=_SMALL,
                callback=_release_previous(),
            )
            replaced = _weights_of(path)
            names = [name for name in (_named_data(work, path, replaced), path.name) if name]
            for name in names:
                _flush(work / name)
        yield work / path.name
        with _output_errors(path):
            _publish(work, path.parent, names, force)
        for name in replaced.difference(names):
            with contextlib.suppress(OSError):
                path.with_name(name).unlink()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def weight_files(model: ir.Model) -> set[Path]:
    """The files that hold a model's external weights."""
    return {Path(tensor.path) for tensor in external_tensors(model)}


def weights_read_by(path: Path_) -> set[Path]:
    """The files beside a graph that hold its weights; none where no graph is, which is told where it is read."""
    return {Path(path).parent / name for name in _locations(Path(path))}


def refuse_sources(path: Path_, sources: Iterable[Path_]) -> None:
    """Raise OutputExistsError where a graph written to `path`, or its weights file, would replace one of these."""
    from wnsurgery.stores.commit import refuse_inputs

    for output in (path, f"{os.fspath(path)}.data"):
        refuse_inputs(output, *sources)


def _bring_in(model: ir.Model) -> None:
    """Tensors within nodes are written with the graph, wherever they came from."""
    for node in (node for graph in all_graphs(model) for node in graph):
        for name, attribute in node.attributes.items():
            if not attribute.is_ref() and isinstance(attribute.value, ir.ExternalTensor):
                tensor = attribute.value
                held = ir.Tensor(tensor.numpy().copy(), tensor.dtype, name=tensor.name, doc_string=tensor.doc_string)
                node.attributes[name] = ir.AttrTensor(name, held)


def _weights_of(path: Path) -> set[str]:
    """The weights files that the graph at a path reads, of those that have their name from it."""
    own = re.compile(re.escape(path.name) + r"(\.[0-9a-f]{16})?\.data")
    there = {file.name for file in path.parent.iterdir() if own.fullmatch(file.name)}
    return there & _locations(path) if there else set()


def _locations(path: Path) -> set[str]:
    """The names under which a graph knows the files with its weights."""
    if not path.is_file():
        return set()
    try:
        with quiet():
            return {str(tensor.location) for tensor in external_tensors(ir.load(path, format="protobuf"))}
    except Exception:  # no graph, then, and none that could lose its weights
        return set()


def _named_data(work: Path, path: Path, taken: set[str]) -> str | None:
    """The name of the weights file, which the graph is told if it is a new one; None where all weights are inside."""
    data = work / f"{path.name}.data"
    if not data.exists():
        return None
    if not data.stat().st_size:
        data.unlink()
        return None
    if not taken:
        return data.name
    from wnsurgery.stores.commit import file_digest

    digest = file_digest(data)
    old = (path.with_name(name) for name in sorted(taken))
    same = [file.name for file in old if file.is_file() and file_digest(file) == digest]
    name = same[0] if same else f"{path.name}.{digest[:16]}.data" if data.name in taken else data.name
    if name == data.name:
        return name
    model = ir.load(work / path.name, format="protobuf")
    for value in (value for graph in model.graphs() for value in graph.initializers.values()):
        told: Any = value.const_value
        if isinstance(told, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                name, told.offset, told.length, told.dtype, shape=told.shape, name=told.name,
                doc_string=told.doc_string, metadata_props=dict(told.metadata_props), base_dir=work,
            )  # fmt: skip
    ir.save(model, work / path.name, format="protobuf")
    data.rename(work / name)
    return name


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


def _publish(work: Path, directory: Path, names: list[str], force: bool) -> None:
    """Rename into place, weights before the graph that points to them; undo the first if the second fails.

    Without `force`, a file that appeared meanwhile is an error, and stays as it is.
    """
    from wnsurgery.stores.commit import check_output, publish

    for name in names:
        check_output(directory / name, force=force)
    done: list[str] = []
    for name in names[:-1]:
        with contextlib.suppress(OSError):
            os.link(directory / name, work / ".old")
        publish(work / name, directory / name, force=force)
        done.append(name)
    try:
        publish(work / names[-1], directory / names[-1], force=force)
    except OSError:
        for name in done:
            if (work / ".old").exists():
                (work / ".old").replace(directory / name)
            else:
                (directory / name).unlink()
        raise
