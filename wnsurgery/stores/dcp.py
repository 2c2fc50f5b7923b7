"""torch.distributed.checkpoint directories, read as data: no class of the file's choice is ever built.

`.metadata` is a pickle. It is rebuilt with an unpickler that knows the dozen names such a file consists of and
turns each into an inert record; every other name is refused. Tensors are torch archives inside `.distcp` files, one
per chunk, and stay in their files until they are read.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from wnsurgery.errors import InputError, UnsafeFileError, printable
from wnsurgery.stores.hub import check_regular, list_files, plain_name
from wnsurgery.stores.mapped import Assembly, MappedFile, Source
from wnsurgery.stores.nesting import flattened, nested
from wnsurgery.stores.torch_file import read_torch
from wnsurgery.stores.torch_map import NotPlainError, map_torch

__all__ = ["Distributed", "map_distributed"]

_METADATA = ".metadata"
_MAX_METADATA = 1 << 30
_MAX_CHUNKS = 4096
_RECORDS = frozenset({
    "torch.distributed.checkpoint.metadata.Metadata",
    "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata.TensorProperties",
    "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.metadata.StorageMeta",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.distributed.checkpoint.filesystem._StoragePrefix",
})  # fmt: skip


@dataclass
class Distributed:
    """A checkpoint as one flat dict, the nesting its names stood for, the files it lies in, and all other files."""

    content: dict[str, Any]
    paths: dict[str, tuple[Any, ...]]
    source: Source
    others: list[str]

    def nested(self) -> dict[Any, Any]:
        """The containers the names stood for."""
        return nested(self.content, self.paths)

    def flattened(self, content: dict[Any, Any]) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
        """Such containers as one level again, and the path of each name."""
        return flattened(content, {path: name for name, path in self.paths.items()})


class _Record:
    """What stands for an object of the metadata: its class's name, what it was called with, its attributes."""

    def __init__(self, kind: str, arguments: tuple[Any, ...]) -> None:
        self.kind, self.arguments = kind, arguments
        self.facts: Any = {}

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            state = state[1]
        self.facts = state

    def __hash__(self) -> int:
        return id(self)

    def get(self, name: str) -> Any:
        if not isinstance(self.facts, dict) or name not in self.facts:
            raise ValueError(f"a {self.kind} without {name}")
        return self.facts[name]


def _maker(kind: str) -> type[_Record]:
    """A class for one kind of record, which pickle may make with or without calling it."""

    class Kind(_Record):
        def __new__(cls, *arguments: Any) -> Kind:
            made = object.__new__(cls)
            _Record.__init__(made, kind, arguments)
            return made

        def __init__(self, *_arguments: Any) -> None:
            pass

    return Kind


class _Restricted(pickle.Unpickler):
    """Builds records, torch.Size as tuples, types and layouts; everything else is refused by name."""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _RECORDS:
            return _maker(name)
        if module in ("pathlib", "pathlib._local") and name.endswith("Path"):
            return _maker(name)  # where it was once written; nobody goes there
        if full == "torch.Size":
            return _as_tuple
        if full in ("torch.serialization._get_layout", "torch.storage._get_layout", "torch._utils._get_layout"):
            return str
        if full == "collections.OrderedDict":
            return dict
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _ForbiddenError(full)

    def persistent_load(self, pid: Any) -> Any:
        raise _ForbiddenError("a persistent object")


class _ForbiddenError(Exception):
    pass


def _as_tuple(*arguments: Any) -> tuple[Any, ...]:
    if len(arguments) != 1 or not isinstance(arguments[0], tuple | list):
        raise ValueError("a size that is none")
    return tuple(arguments[0])


def map_distributed(directory: Path) -> Distributed:
    """A checkpoint directory with its tensors left in its files; nothing of it is executed.

    Raises:
        InputError: damaged, incomplete, or written with transforms.
        UnsafeFileError: its metadata names other classes, or files outside the directory.
    """
    facts = _metadata(directory / _METADATA)
    files: dict[str, MappedFile] = {}
    others = [name for name in list_files(directory) if name != _METADATA and not _is_data(name)]
    done = False
    try:
        content, assemblies = _content(directory, facts, files)
        paths = _paths(facts, content)
        nested(content, paths)  # raises where they contradict each other
        source = Source([*files.values()], assemblies)
        done = True
        return Distributed(content, paths, source, [name for name in others if name not in files])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        if isinstance(error, InputError | UnsafeFileError):
            raise
        raise InputError.of(directory / _METADATA, f"damaged ({printable(error)})") from error
    finally:
        if not done:
            for file in files.values():
                file.file.close()


def _is_data(name: str) -> bool:
    """Whether a name is that of a data file, of which some may hold nothing that the metadata mentions."""
    return "/" not in name and name.endswith(".distcp")


def _metadata(path: Path) -> _Record:
    check_regular(path)
    if path.stat().st_size > _MAX_METADATA:
        raise InputError.of(path, "larger than any checkpoint's metadata")
    try:
        data = path.read_bytes()
        _check_memo(data)
        facts = _Restricted(io.BytesIO(data)).load()
    except _ForbiddenError as error:
        raise UnsafeFileError(
            f"{path}: refused, its pickle names {printable(error)}, which no such file needs"
        ) from error
    except Exception as error:  # pickle raises what it likes
        raise InputError.of(path, f"damaged ({type(error).__name__}: {printable(error)})") from error
    if not isinstance(facts, _Record) or facts.kind != "Metadata":
        raise InputError.of(path, "holds no checkpoint metadata")
    return facts


def _check_memo(data: bytes) -> None:
    """Refuse a pickle that numbers an object higher than it has instructions: pickle makes a table that long."""
    for count, (opcode, index, _) in enumerate(pickletools.genops(data)):
        if opcode.name in {"PUT", "BINPUT", "LONG_BINPUT"} and int(index) > count:  # type: ignore[arg-type]
            raise ValueError("an object with a number out of all proportion")


def _content(
    directory: Path, facts: _Record, files: dict[str, MappedFile]
) -> tuple[dict[str, Any], dict[int, Assembly]]:
    places: dict[str, list[tuple[tuple[int, ...], _Record]]] = {}
    for index, info in facts.get("storage_data").items():
        offset = index.facts.get("offset") or () if isinstance(index.facts, dict) else ()
        places.setdefault(index.get("fqn"), []).append((tuple(offset), info))
    content: dict[str, Any] = {}
    assemblies: dict[int, Assembly] = {}
    for name, about in facts.get("state_dict_metadata").items():
        if not isinstance(name, str):
            raise ValueError("a name that is no string")
        found = places.get(name, [])
        if about.kind == "BytesStorageMetadata":
            content[name] = _object(directory, name, found, files)
        else:
            content[name] = _tensor(directory, name, about, found, files, assemblies)
    return content, assemblies


def _tensor(
    directory: Path,
    name: str,
    about: _Record,
    found: list[tuple[tuple[int, ...], _Record]],
    files: dict[str, MappedFile],
    assemblies: dict[int, Assembly],
) -> Tensor:
    shape, properties = tuple(about.get("size")), about.get("properties").facts
    dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
    chunks = {tuple(c.get("offsets")): tuple(c.get("sizes")) for c in about.get("chunks")}
    parts: list[tuple[tuple[int, ...], Tensor]] = []
    for offset, info in found:
        at = offset or (0,) * len(shape)
        tensor = _archive(directory, name, info, files)
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype or tuple(tensor.shape) != chunks.get(at):
            raise InputError.of(directory, f"the chunk of {printable(name)} at {at} is not what its metadata says")
        parts.append((at, tensor))
    _check_cover(directory, name, shape, parts)
    if len(parts) == 1 and parts[0][1].shape == shape:
        return parts[0][1]
    whole = torch.empty(shape, dtype=dtype, device="meta")
    assemblies[whole.untyped_storage()._cdata] = Assembly(whole, tuple(parts))
    return whole


def _check_cover(
    directory: Path, name: str, shape: tuple[int, ...], parts: list[tuple[tuple[int, ...], Tensor]]
) -> None:
    """Chunks lie inside the tensor, do not overlap and fill it."""
    boxes = [(at, tuple(a + s for a, s in zip(at, t.shape, strict=True))) for at, t in parts]
    inside = all(
        len(lo) == len(shape) and all(a >= 0 and b <= s for a, b, s in zip(lo, hi, shape, strict=True))
        for lo, hi in boxes
    )
    full = [(lo, hi) for lo, hi in boxes if all(a < b for a, b in zip(lo, hi, strict=True))]
    apart = len(full) <= _MAX_CHUNKS and all(
        any(hi[d] <= lo2[d] or hi2[d] <= lo[d] for d in range(len(shape)))
        for i, (lo, hi) in enumerate(full)
        for lo2, hi2 in full[:i]
    )
    if not (parts and inside and apart) or sum(t.numel() for _, t in parts) != prod(shape):
        raise InputError.of(directory, f"the chunks of {printable(name)} do not make up a tensor of shape {shape}")


def _archive(directory: Path, name: str, info: _Record, files: dict[str, MappedFile]) -> Any:
    mapped, start, length = _place(directory, name, info, files)
    try:
        return map_torch(mapped, cast(Any, _Slice(mapped, start, length)), mapped.path, base=start)
    except NotPlainError:
        raise InputError.of(mapped.path, f"{printable(name)} is not a plain tensor") from None


def _object(
    directory: Path, name: str, found: list[tuple[tuple[int, ...], _Record]], files: dict[str, MappedFile]
) -> Any:
    if len(found) != 1:
        raise InputError.of(directory, f"{printable(name)} is not in its files exactly once")
    mapped, start, length = _place(directory, name, found[0][1], files)
    data = io.BytesIO(mapped.read(start, start + length).numpy().tobytes())
    try:
        return read_torch(data, mapped.path)
    except UnsafeFileError as error:  # directories are read without trust, whatever is asked for
        raise UnsafeFileError(error.message, hint=f"save the checkpoint without {printable(name)}") from error


def _place(directory: Path, name: str, info: _Record, files: dict[str, MappedFile]) -> tuple[MappedFile, int, int]:
    facts: Mapping[str, Any] = info.facts
    if facts.get("transform_descriptors"):
        raise InputError.of(
            directory, f"{printable(name)} is compressed or transformed", "save it without DCP extensions"
        )
    start, length = info.get("offset"), info.get("length")
    relative = plain_name(directory, info.get("relative_path"))
    if relative not in files:
        file = (directory / relative).open("rb")
        try:
            files[relative] = MappedFile(file, directory / relative)
        except InputError:
            file.close()
            raise
    mapped = files[relative]
    if type(start) is not int or type(length) is not int or start < 0 or not 0 < length <= mapped.size - start:
        raise InputError.of(mapped.path, f"truncated: {printable(name)} lies beyond its end")
    return mapped, start, length


class _Slice(io.RawIOBase):
    """Part of a file as a file."""

    def __init__(self, mapped: MappedFile, start: int, length: int) -> None:
        self.mapped, self.start, self.length, self.position = mapped, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        if origin + offset < 0:
            raise ValueError("negative position")
        self.position = origin + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.length - self.position))
        self.mapped.file.seek(self.start + self.position)
        data = self.mapped.file.read(count)
        view[: len(data)] = data
        self.position += len(data)
        return len(data)


def _paths(facts: _Record, content: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The nested keys each flat name stands for, where the file tells."""
    planned = facts.facts.get("planner_data") if isinstance(facts.facts, dict) else None
    if not isinstance(planned, dict):
        return {name: (name,) for name in content}
    return {name: planned[name] if _is_path(planned.get(name)) else (name,) for name in content}


def _is_path(path: Any) -> bool:
    return isinstance(path, tuple) and bool(path) and all(isinstance(part, str | int) for part in path)
