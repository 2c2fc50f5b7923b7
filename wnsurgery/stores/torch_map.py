"""`.pt .pth .bin .ckpt` without reading its tensors: the pickle is rebuilt, every storage stays in the file.

Only for archives of plain tensors and containers, which is what checkpoints of state dicts are; everything
else (modules, sparse or quantized tensors, the old serialisation) is for `read_torch`.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import IO, Any

import torch

from wnsurgery.errors import InputError, printable
from wnsurgery.stores.archive import read_directory
from wnsurgery.stores.mapped import MappedFile, Record, no_bytes
from wnsurgery.stores.pickles import scan

__all__ = ["NotPlainError", "map_torch"]

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
    content = _unpickle(pickled, storages)
    unused = (r for name, r in records.items() if name.startswith("data/") and name[5:] not in storages.known)
    mapped.records += unused  # no tensor needs them, but damage in them is damage
    return content


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
        kind, storage_type, key, _location, count = saved
        if kind != "storage" or type(key) is not str or type(count) is not int:
            raise NotPlainError
        dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
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


def _unpickle(pickled: bytes, storages: _Storages) -> Any:
    from torch import _weights_only_unpickler as restricted

    class Unpickler(restricted.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return storages(pid)

    try:
        return Unpickler(io.BytesIO(pickled), encoding="utf-8").load()  # type: ignore[no-untyped-call]
    except InputError:
        raise
    except Exception as error:  # what it means is for torch.load to say
        raise NotPlainError from error
