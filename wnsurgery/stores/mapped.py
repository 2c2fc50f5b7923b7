"""Tensors that stay in their files: planned from names, shapes and types, read when their bytes are asked for.

A file is mapped into memory, and its tensors are ordinary CPU tensors over that mapping. Nobody looks at their
values there: `Source.fetch` reads the bytes of one tensor with plain reads, compares the checksum and returns a
tensor in fresh memory. So a file of any size costs address space, not memory; names that share a storage share
it here, too; and a value read by mistake is still the right one.
"""

from __future__ import annotations

import mmap
import os
import warnings
import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from wnsurgery.errors import InputError, printable
from wnsurgery.kept import extent
from wnsurgery.parts import structure_of

__all__ = ["Assembly", "MappedFile", "Record", "Source", "byte_span", "is_plain", "no_bytes", "resolved", "row_major"]

_BLOCK = 1 << 22
_LARGE = 1 << 20  # bytes from which fresh memory costs more than reading into it
_ALONE = 2  # references to a storage that nobody outside holds: its tensor's, and the one counting takes


class Memory:
    """One block of memory, lent again and again as long as nobody holds the last loan: touching fresh pages takes
    several times as long as reading into old ones.

    >>> memory = Memory()
    >>> first = memory.lend(1 << 20)
    >>> second = memory.lend(1 << 20)
    >>> first.data_ptr() == second.data_ptr()
    False
    """

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)

    def lend(self, size: int) -> Tensor:
        """Bytes to write into, of no particular value."""
        if size < _LARGE:
            return torch.empty(size, dtype=torch.uint8)
        if torch._C._storage_Use_Count(self._room.untyped_storage()._cdata) != _ALONE:
            return torch.empty(size, dtype=torch.uint8)
        if self._room.numel() < size:
            self._room = torch.empty(0, dtype=torch.uint8)  # the old goes before the new one comes
            self._room = torch.empty(size, dtype=torch.uint8)
        return torch.empty(0, dtype=torch.uint8).set_(self._room.untyped_storage(), 0, (size,), (1,))


@dataclass(frozen=True)
class Record:
    """Bytes `start` to `stop` of a file, and their CRC-32 where the file tells (0 where it does not)."""

    name: str
    start: int
    stop: int
    crc: int = 0


class MappedFile:
    """One open file and its mapping.

    Args:
        file: opened for reading; kept open as long as tensors of it are read.
        path: its name, for messages.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.records: list[Record] = []
        self.checked: set[int] = set()
        self.memory = Memory()
        try:
            mapping = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise InputError.of(path, f"cannot be mapped ({printable(error)})") from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mapping is not writable, and nobody writes
            self._bytes = torch.frombuffer(mapping, dtype=torch.uint8)
        self.address = self._bytes.data_ptr()
        self._whole = self._bytes.untyped_storage()

    def storage(self, record: Record) -> torch.UntypedStorage:
        """The bytes of a record as a storage over the mapping; its checksum is compared when it is read."""
        self.records.append(record)
        made: torch.UntypedStorage = self._whole[record.start : record.stop]
        return made

    def tensor(self, record: Record, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """A contiguous tensor over a record of exactly its size."""
        if record.start == record.stop:
            return torch.empty(tuple(shape), dtype=dtype)
        storage = self.storage(record)
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= size
        return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape), tuple(reversed(strides)))

    def read(self, start: int, stop: int) -> Tensor:
        """Bytes of the file in fresh memory, checked against the checksum of the record they lie in."""
        data = self._read(start, stop)
        record = self._record_of(start)
        if record is not None and record.crc and record.start not in self.checked:
            if (record.start, record.stop) == (start, stop):
                crc = zlib.crc32(_buffer(data))
            else:
                crc = 0
                for at in range(record.start, record.stop, _BLOCK):
                    crc = zlib.crc32(_buffer(self._read(at, min(at + _BLOCK, record.stop))), crc)
            if crc != record.crc:
                raise InputError.of(self.path, f"damaged: Bad CRC-32 for file {printable(record.name)!r}")
            self.checked.add(record.start)
        return data

    def check_all(self) -> None:
        """Compare the checksums of records nothing has read yet."""
        self.records.sort(key=lambda r: r.start)
        for record in self.records:
            if record.crc and record.start not in self.checked:
                self.read(record.start, min(record.start + 1, record.stop))

    def _read(self, start: int, stop: int) -> Tensor:
        data = self.memory.lend(stop - start)
        view = _buffer(data)
        self.file.seek(start)
        done = 0
        try:
            while done < len(view):
                count = self.file.readinto(view[done:])  # type: ignore[attr-defined]
                if not count:
                    raise InputError.of(self.path, "truncated while it was read")
                done += count
        except OSError as error:
            if isinstance(error, InputError):
                raise
            raise InputError.of(self.path, error.strerror or str(error)) from error
        return data

    def _record_of(self, position: int) -> Record | None:
        index = bisect_right(self.records, position, key=lambda r: r.start) - 1
        return self.records[index] if index >= 0 and position < self.records[index].stop else None


@dataclass(frozen=True)
class Assembly:
    """A tensor that lies in several pieces: where each piece goes, and the piece."""

    whole: Tensor
    parts: tuple[tuple[tuple[int, ...], Tensor], ...]


class Source:
    """The files a set of tensors lies in; `watch` is told how many bytes were read, each time.

    Args:
        files: the files.
        assemblies: tensors in pieces, by the storage of the meta tensor that stands for them.
    """

    def __init__(self, files: Sequence[MappedFile] = (), assemblies: Mapping[int, Assembly] | None = None) -> None:
        self.assemblies = dict(assemblies or {})
        self.files = sorted(files, key=lambda f: f.address)
        self._starts = [f.address for f in self.files]
        self.watch: Callable[[int], None] | None = None
        memory = Memory()
        for file in self.files:
            file.memory = memory
            file.records.sort(key=lambda r: r.start)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)

    def check_all(self) -> None:
        """Compare every checksum not compared yet, so that nothing damaged passes because nothing needed it."""
        for file in self.files:
            file.check_all()

    def close(self) -> None:
        """Close the files; tensors over their mappings stay valid."""
        for file in self.files:
            file.file.close()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a meta tensor stands for one in pieces."""
        return tensor.is_meta and tensor.untyped_storage()._cdata in self.assemblies

    def fetch(self, tensor: Tensor) -> Tensor:
        """A tensor in fresh memory with the same shape, strides, type and values; itself where it lies in no file.

        Tensors marked as conjugated or negated are carried out, see `resolved`.

        Raises InputError when the file is shorter than it was, cannot be read, or its checksum does not fit.
        """
        if self.holds(tensor):
            whole = torch.empty(tensor.shape, dtype=tensor.dtype)
            for at, part in self.assemblies[tensor.untyped_storage()._cdata].parts:
                box = tuple(slice(a, a + size) for a, size in zip(at, part.shape, strict=True))
                whole[box] = self.fetch(part)
            return whole
        if not is_plain(tensor) or not tensor.numel():
            return tensor
        data = self.read(*byte_span(tensor))
        if data is None:
            return resolved(tensor)
        made = data.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        made = made.conj() if tensor.is_conj() else made
        return resolved(torch._neg_view(made) if tensor.is_neg() else made)

    def read(self, start: int, stop: int) -> Tensor | None:
        """The bytes between two addresses, where they lie in one of the files."""
        index = bisect_right(self._starts, start) - 1
        if index < 0:
            return None
        file = self.files[index]
        if stop > file.address + file.size:
            return None
        data = file.read(start - file.address, stop - file.address)
        if self.watch is not None:
            self.watch(stop - start)
        return data


def no_bytes() -> torch.UntypedStorage:
    """A storage of no bytes."""
    return torch.empty(0, dtype=torch.uint8).untyped_storage()


def _buffer(data: Tensor) -> memoryview:
    """The memory of a tensor of bytes."""
    return memoryview(data.numpy())  # type: ignore[arg-type]


def resolved(tensor: Tensor) -> Tensor:
    """A tensor with its conjugate and negative bits, by which torch puts work off, carried out in its memory.

    >>> resolved(torch.tensor([1j]).conj()).is_conj()
    False

    Raises InputError where the type has no negative.
    """
    try:
        return tensor.resolve_conj().resolve_neg()
    except NotImplementedError as error:
        raise InputError(f"a {tensor.dtype} tensor is marked as negated, which that type cannot be") from error


def row_major(tensor: Tensor) -> Tensor:
    """The elements of a strided tensor one after the other, so that they can be seen as bytes; a copy where need be.

    >>> row_major(torch.arange(4.0)[::2][:1]).stride()
    (1,)
    """
    flat = tensor.contiguous().reshape(-1)
    return flat.as_strided(flat.shape, (1,))  # to torch a single element is contiguous whatever its stride


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a strided CPU tensor over memory of its own kind."""
    return tensor.is_cpu and not structure_of(tensor)


def byte_span(tensor: Tensor) -> tuple[int, int]:
    """First and last address (exclusive) that a strided tensor with elements touches."""
    start = tensor.data_ptr()
    return start, start + extent(tensor)
