"""`.pt .pth .bin .ckpt` without reading its tensors: the pickle is rebuilt, every storage stays in the file.

Only for files of plain tensors and containers, which is what checkpoints of state dicts are; everything else (modules,
sparse or quantized tensors) is for `read_torch`.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import torch

from wnsurgery.errors import InputError, printable
from wnsurgery.stores.archive import read_directory
from wnsurgery.stores.claims import refuse_stretched
from wnsurgery.stores.mapped import MappedFile, Record, no_bytes
from wnsurgery.stores.pickles import LEGACY_PICKLES, scan

__all__ = ["NotPlainError", "map_legacy", "map_torch"]

_REBUILD = frozenset({
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
    "collections.OrderedDict",
    "collections.Counter",
    "torch.Size",
    "torch.device",
})  # fmt: skip


class NotPlainError(Exception):
    """The archive holds more than plain tensors and containers, or is damaged: `read_torch` has the say."""


def map_torch(mapped: MappedFile, file: IO[bytes], path: Path, *, base: int = 0) -> Any:
    """The object in a torch archive, its tensors over the mapping of the file.

    Args:
        mapped: the file the archive is (part of).
        file: the archive itself.
        path: its name, for messages.
        base: where in the mapped file it begins.

    Raises:
        NotPlainError: what `read_torch` must read, or refuse.
        InputError: a damaged archive, or a record whose size is not what its tensors need.
    """
    pickled, records = read_directory(file, path, base=base)
    seen = scan(io.BytesIO(pickled))
    if not seen.complete or any(not _is_plain(name) for name in seen.names):
        raise NotPlainError
    order = records.get("byteorder")
    if order is not None:
        file.seek(order.start - base)
        if file.read(order.stop - order.start).decode("latin-1") != sys.byteorder:
            raise NotPlainError
    storages = _Storages(mapped, records, path)
    content = _unpickle(io.BytesIO(pickled), storages)
    refuse_stretched(content, path)
    unused = (r for name, r in records.items() if name.startswith("data/") and name[5:] not in storages.known)
    mapped.records += unused  # no tensor needs them, but damage in them is damage
    return content


def map_legacy(mapped: MappedFile, path: Path) -> Any:
    """The object in a file of torch's old serialisation (before 1.6), its tensors over the mapping of the file.

    Such a file is five pickles (magic number, version, system, the object, the keys of its storages) and then every
    storage as a count and its bytes. Where they begin is known after the object is read, so it is read twice: first
    over storages without memory, which say their sizes.

    Raises as `map_torch`.
    """
    file = mapped.file
    seen = scan(file, LEGACY_PICKLES)
    if not seen.complete or any(not _is_plain(name) for name in seen.names):
        raise NotPlainError
    file.seek(0)
    head = [_unpickle(file, _refuse_storage) for _ in range(3)]
    if not isinstance(head[2], dict) or not head[2].get("little_endian") or sys.byteorder != "little":
        raise NotPlainError
    start = file.tell()
    sizes = _Sizes()
    _unpickle(file, sizes)
    keys = _unpickle(file, _refuse_storage)
    plain = isinstance(keys, list) and all(type(key) is str for key in keys)
    if not plain or len(set(keys)) != len(keys) or not sizes.known.keys() <= set(keys):
        raise NotPlainError
    records = _legacy_records(mapped, keys, sizes.known, file.tell(), path)
    file.seek(start)
    content = _unpickle(file, _Storages(mapped, records, path))
    refuse_stretched(content, path)
    return content


def _legacy_records(
    mapped: MappedFile, keys: list[Any], known: Mapping[str, tuple[int, int]], position: int, path: Path
) -> dict[str, Record]:
    """Where every storage lies, one after the other; sizes no tensor tells are `read_torch`'s to find."""
    records = {}
    for key in keys:
        if key not in known:
            raise NotPlainError
        count, width = known[key]
        mapped.file.seek(position)
        told = mapped.file.read(8)
        stop = position + 8 + count * width
        if len(told) < 8 or stop > mapped.size:
            raise InputError.of(path, f"truncated: the bytes of the storage {printable(key)} end early")
        if int.from_bytes(told, "little", signed=True) != count:
            raise InputError.of(path, f"damaged: the storage {printable(key)} has another size than its tensors")
        records[f"data/{key}"] = Record(f"storage {key}", position + 8, stop)
        position = stop
    return records


class _Sizes:
    """Storages that have a size and no memory: what a first reading needs."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[int, int]] = {}

    def __call__(self, saved: Any) -> torch.storage.TypedStorage:
        key, dtype, count = _facts(saved)
        if count < 0 or self.known.setdefault(key, (count, dtype.itemsize)) != (count, dtype.itemsize):
            raise NotPlainError
        storage = torch.UntypedStorage(count * dtype.itemsize, device="meta")  # type: ignore[no-untyped-call]
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def _refuse_storage(saved: Any) -> NoReturn:
    raise NotPlainError


def _facts(saved: Any) -> tuple[str, torch.dtype, int]:
    """Key, type and number of elements of a storage; what is a view of another is for `read_torch`."""
    kind, storage_type, key, _location, count, *view = saved
    if kind != "storage" or type(key) is not str or type(count) is not int or view not in ([], [None]):
        raise NotPlainError
    return key, torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype, count


def _is_plain(name: str) -> bool:
    if name in _REBUILD:
        return True
    module, _, last = name.rpartition(".")
    if module not in ("torch", "torch.storage"):
        return False
    return last.endswith("Storage") or isinstance(getattr(torch, last, None), torch.dtype)


class _Storages:
    """What the pickle means by its storage keys."""

    def __init__(self, mapped: MappedFile, records: dict[str, Record], path: Path) -> None:
        self.mapped, self.records, self.path = mapped, records, path
        self.known: dict[str, tuple[torch.UntypedStorage, torch.dtype]] = {}

    def __call__(self, saved: Any) -> torch.storage.TypedStorage:
        key, dtype, count = _facts(saved)
        size = count * dtype.itemsize
        if key not in self.known:
            record = self.records.get(f"data/{key}")
            if record is None:
                raise InputError.of(self.path, f"damaged: the record data/{printable(key)} is missing")
            if record.stop - record.start != size:
                held = record.stop - record.start
                raise InputError.of(self.path, f"damaged: {held} bytes in data/{printable(key)}, not {size}")
            self.known[key] = (self.mapped.storage(record) if size else no_bytes()), dtype
        storage, first = self.known[key]
        if first != dtype or storage.nbytes() != size:
            raise NotPlainError
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def _unpickle(file: IO[bytes], storages: Callable[[Any], Any]) -> Any:
    """One pickle, read by torch's restricted unpickler, which builds tensors and plain containers only."""
    from torch import _weights_only_unpickler as restricted

    class Unpickler(restricted.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return storages(pid)

    try:
        return Unpickler(file, encoding="utf-8").load()  # type: ignore[no-untyped-call]
    except InputError:
        raise
    except Exception as error:  # what it means is for torch.load to say
        raise NotPlainError from error
