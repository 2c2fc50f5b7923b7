"""`.safetensors`: eight bytes of length, a JSON table, the tensors end to end. Read and written here directly.

The safetensors package writes its metadata in random order, with mode 0600, without fsync, and refuses shared tensors;
written here, equal content is equal bytes. Layout: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from wnsurgery.errors import InputError, printable
from wnsurgery.parts import structure_of
from wnsurgery.stores.mapped import MappedFile, Record, resolved, row_major
from wnsurgery.stores.values import Loaded, Values

__all__ = [
    "DTYPES",
    "Entry",
    "map_safetensors",
    "planned_size",
    "read_header",
    "read_safetensors",
    "read_tensor",
    "write_safetensors",
]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes `start` to `stop` of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_safetensors(file: BinaryIO, path: Path) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """Every tensor of an open file, in the file's order, and its metadata.

    Raises InputError when the header or the sizes are not exactly what the format asks for.
    """
    entries, metadata = read_header(file, path)
    return {entry.name: read_tensor(file, entry, path) for entry in entries}, metadata


def map_safetensors(mapped: MappedFile) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """As `read_safetensors`, every tensor staying in the mapped file until it is asked for."""
    entries, metadata = read_header(mapped.file, mapped.path)
    tensors = {e.name: mapped.tensor(Record(e.name, e.start, e.stop), e.dtype, e.shape) for e in entries}
    return tensors, metadata


def read_header(file: BinaryIO, path: Path) -> tuple[list[Entry], dict[str, str] | None]:
    """The table of an open file: its tensors in the order of their bytes, and its metadata.

    Raises InputError for a table that is no JSON, names a tensor twice, or whose sizes, gaps or overlaps do not
    add up to the file's length.
    """
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(_MAX_HEADER, size - 8):
        raise InputError.of(path, "damaged or truncated: the safetensors header is longer than the file")
    try:
        table = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
        metadata = table.pop(_METADATA, None)
        entries = [_entry(name, facts, 8 + length) for name, facts in table.items()]
        _check_metadata(metadata)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError.of(path, f"damaged safetensors header ({printable(error)})") from error
    entries.sort(key=lambda e: (e.start, e.stop))
    _check_cover(entries, 8 + length, size, path)
    return entries, metadata


def read_tensor(file: BinaryIO, entry: Entry, path: Path) -> Tensor:
    """One tensor of an open file."""
    if entry.start == entry.stop:
        return torch.empty(entry.shape, dtype=entry.dtype)
    data = torch.empty(entry.stop - entry.start, dtype=torch.uint8)
    file.seek(entry.start)
    if file.readinto(data.numpy()) != len(data):  # type: ignore[attr-defined]
        raise InputError.of(path, f"truncated: the bytes of {printable(entry.name)} end early")
    return data.view(entry.dtype).reshape(entry.shape)


def write_safetensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None,
    file: BinaryIO,
    path: Path,
    values: Values | None = None,
) -> None:
    """Write tensors into an open file, widest types first (so that every tensor is aligned), then by name.

    One tensor at a time is in memory where `values` brings them from somewhere else. A tensor that stands under
    two names is written twice: the format has no sharing.

    Raises InputError for a tensor the format cannot hold (sparse, quantized, complex128, ...).
    """
    values = values or Loaded()
    order, header = _plan(tensors, metadata, path, values)
    file.write(len(header).to_bytes(8, "little") + header)
    for name in order:
        if tensors[name].numel():
            flat = row_major(resolved(values.fetch(tensors[name]).detach().cpu()))
            file.write(memoryview(flat.view(torch.uint8).numpy()))  # type: ignore[arg-type]
            del flat


def planned_size(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, path: Path, values: Values | None = None
) -> int:
    """How many bytes `write_safetensors` will write; raises as it does."""
    header = _plan(tensors, metadata, path, values or Loaded())[1]
    return 8 + len(header) + sum(t.numel() * t.element_size() for t in tensors.values())


def _plan(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, path: Path, values: Values
) -> tuple[list[str], bytes]:
    """The order of the tensors, and the header."""
    order = sorted(tensors, key=lambda name: (-_checked(tensors[name], name, path, values).element_size(), name))
    table: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in order:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        table[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > _MAX_HEADER:
        raise InputError.of(path, "too many tensors for the safetensors header")
    return order, header


def _checked(tensor: Tensor, name: str, path: Path, values: Values) -> Tensor:
    meta = tensor.is_meta and not values.promised(tensor)
    if name == _METADATA or not _is_text(name):
        raise InputError.of(
            path, f"the name {printable(name)} does not fit into a .safetensors file", "write a .pt file instead"
        )
    structure = structure_of(tensor)
    if structure or meta or tensor.dtype not in _NAMES:
        kind = "meta" if meta else f"{structure} {tensor.dtype}".replace("torch.", "").strip()
        raise InputError.of(
            path, f"{printable(name)} ({kind}) does not fit into a .safetensors file", "write a .pt file instead"
        )
    return tensor


def _is_text(name: str) -> bool:
    """Whether a string is text that UTF-8 can write: JSON and pickles may hold half of a surrogate pair."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is there twice")
    return table


def _entry(name: str, facts: dict[str, Any], offset: int) -> Entry:
    if not _is_text(name):
        raise ValueError(f"{name}: not text")
    if set(facts) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: has {sorted(facts)}")
    dtype = DTYPES.get(facts["dtype"])
    if dtype is None:
        raise ValueError(f"{name}: the type {facts['dtype']} is not supported")
    shape, (start, stop) = facts["shape"], facts["data_offsets"]
    if any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
        raise ValueError(f"{name}: sizes are not natural numbers")
    if len(shape) > 64 or prod(n or 1 for n in shape) * dtype.itemsize >= 1 << 63:
        raise ValueError(f"{name}: impossible shape")
    if stop - start != prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: {stop - start} bytes do not make a tensor of shape {tuple(shape)}")
    return Entry(name, dtype, tuple(shape), offset + start, offset + stop)


def _check_metadata(metadata: Any) -> None:
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(v, str) and _is_text(k + v) for k, v in metadata.items())
    ):
        raise ValueError(f"{_METADATA} holds something else than strings")


def _check_cover(entries: list[Entry], start: int, size: int, path: Path) -> None:
    position = start
    for entry in entries:
        if entry.start != position:
            fault = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise InputError.of(path, f"damaged safetensors file: {printable(entry.name)} {fault}")
        position = entry.stop
    if position != size:
        raise InputError.of(path, f"damaged or truncated: {size} bytes where the header asks for {position}")
