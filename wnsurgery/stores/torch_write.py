"""Write a torch archive one storage at a time: what torch.save writes, without having it all in memory.

The pickle is made first, from shapes and types; then every storage is fetched, written and forgotten. Tensors
that overlap share a storage, as before; bytes that no tensor shows are not written, so a small view of a large
storage stays small, and what folded pairs leave behind is gone.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor, nn

from wnsurgery.errors import InputError, printable
from wnsurgery.stores.mapped import byte_span, is_plain, no_bytes
from wnsurgery.stores.torch_file import Sink
from wnsurgery.stores.values import Values

__all__ = ["ArchivePlan", "plan_archive", "write_archive"]


@dataclass(frozen=True)
class Cluster:
    """Tensors that overlap in memory, the bytes they span, and one of them; or one promised tensor."""

    start: int
    stop: int
    owner: Tensor = field(compare=False)

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class ArchivePlan:
    """The pickle of an archive and its storages, in the order of their keys."""

    pickled: bytes
    clusters: tuple[Cluster, ...]

    @property
    def size(self) -> int:
        """About how many bytes the archive takes."""
        return len(self.pickled) + sum(c.size + 320 for c in self.clusters) + 4096


def plan_archive(content: Any, values: Values) -> ArchivePlan:
    """Lay out an archive for content whose tensors may be in files, or promised.

    Raises InputError for content that cannot be pickled.
    """
    survey = _Survey(values)
    try:
        survey.dump(content)
        pickler = _Pickler(values, _clusters(survey.seen))
        pickler.dump(content)
    except (pickle.PicklingError, RecursionError, TypeError, AttributeError) as error:
        raise InputError(f"cannot be written to a torch file ({printable(error)})") from error
    return ArchivePlan(pickler.sink.getvalue(), tuple(pickler.keys))


def write_archive(plan: ArchivePlan, values: Values, file: BinaryIO) -> None:
    """Write a planned archive into an open file, at most one storage in memory.

    Raises OSError as the file does, and what `values` raises.
    """
    from torch.serialization import get_crc32_options
    from torch.utils.serialization import config

    sink = Sink(file)
    alignment = config.save.storage_alignment
    writer: Any = torch._C.PyTorchFileWriter(cast(Any, sink), get_crc32_options(), alignment)
    marks = (".format_version", "1"), (".storage_alignment", str(alignment)), ("byteorder", sys.byteorder)
    try:
        writer.write_record("data.pkl", plan.pickled, len(plan.pickled))
        for name, text in marks:
            writer.write_record(name, text, len(text))
        for key, cluster in enumerate(plan.clusters):
            writer.write_record(f"data/{key}", _bytes(cluster, values), cluster.size)
        writer.write_end_of_file()
    except BaseException as error:
        sink.close_silently()  # the writer ends its archive whatever happened, and must not fail at it again
        with contextlib.suppress(Exception):
            writer.write_end_of_file()
        if sink.error is not None and isinstance(error, RuntimeError):
            raise sink.error from error
        raise
    file.flush()


def _bytes(cluster: Cluster, values: Values) -> torch.UntypedStorage:
    wanted = cluster.owner
    if not cluster.size:
        return no_bytes()
    if not values.promised(wanted):
        return values.read(cluster.start, cluster.stop, wanted).untyped_storage()
    made = values.fetch(wanted)
    exact = made.stride() == wanted.stride() and made.untyped_storage().nbytes() == cluster.size
    if not exact or made.storage_offset():
        made = torch.empty_strided(wanted.shape, wanted.stride(), dtype=wanted.dtype).copy_(made)
    return made.untyped_storage()


class _Reducing(pickle.Pickler):
    """torch's own form of a tensor: a rebuild function and a persistent id for its storage."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self.sink = io.BytesIO()
        super().__init__(self.sink, protocol=2)

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is nn.Parameter and not vars(obj):
            return torch._utils._rebuild_parameter, (obj.data, obj.requires_grad, OrderedDict())
        if type(obj) is not Tensor or not (is_plain(obj) or self.values.promised(obj)):
            return NotImplemented
        token, offset = self.locate(obj)
        facts: tuple[Any, ...] = (token, offset, tuple(obj.size()), obj.stride(), obj.requires_grad, OrderedDict())
        rebuild: Any = torch._utils._rebuild_tensor_v2
        if token.dtype is None:
            rebuild, facts = torch._utils._rebuild_tensor_v3, (*facts, obj.dtype)
        special = torch._utils.get_tensor_metadata(obj)  # type: ignore[no-untyped-call]  # conjugate and negative views
        return rebuild, (*facts, special) if special else facts

    def locate(self, tensor: Tensor) -> tuple[_Token, int]:
        raise NotImplementedError

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Token):
            return "storage", obj.kind, obj.key, "cpu", obj.count
        if torch.is_storage(obj):
            raise pickle.PicklingError("a storage outside a tensor")
        return None


@dataclass(frozen=True)
class _Token:
    """A storage as the pickle refers to it; `dtype` None for types that have no storage class."""

    key: str
    nbytes: int
    dtype: torch.dtype | None

    @property
    def kind(self) -> type:
        if self.dtype is None:
            return torch.UntypedStorage
        return getattr(torch, torch.storage._dtype_to_storage_type_map()[self.dtype])  # type: ignore[no-any-return]

    @property
    def count(self) -> int:
        return self.nbytes if self.dtype is None else self.nbytes // self.dtype.itemsize


class _Survey(_Reducing):
    """First pass: which tensors there are."""

    def __init__(self, values: Values) -> None:
        super().__init__(values)
        self.seen: list[Tensor] = []

    def locate(self, tensor: Tensor) -> tuple[_Token, int]:
        if not self.values.promised(tensor):
            self.seen.append(tensor)
        return _token("", 0, tensor.dtype), 0


class _Pickler(_Reducing):
    """Second pass: every tensor with the storage it is to have; keys count in the order of their first use."""

    def __init__(self, values: Values, clusters: list[Cluster]) -> None:
        super().__init__(values)
        self.known = clusters
        self.starts = [c.start for c in clusters]
        self.keys: dict[Cluster, str] = {}
        self.promises: dict[int, Cluster] = {}

    def locate(self, tensor: Tensor) -> tuple[_Token, int]:
        if self.values.promised(tensor):
            identity = tensor.untyped_storage()._cdata
            size = tensor.numel() * tensor.element_size()
            fresh = Cluster(-identity, size - identity, tensor)
            cluster, offset = self.promises.setdefault(identity, fresh), 0
        elif not tensor.numel():
            identity = tensor.untyped_storage()._cdata
            cluster, offset = self.promises.setdefault(identity, Cluster(-identity, -identity, tensor)), 0
        else:
            start, _stop = byte_span(tensor)
            cluster = self.known[bisect_right(self.starts, start) - 1]
            offset = (start - cluster.start) // tensor.element_size()
        key = self.keys.setdefault(cluster, str(len(self.keys)))
        return _token(key, cluster.size, tensor.dtype), offset


def _token(key: str, nbytes: int, dtype: torch.dtype) -> _Token:
    return _Token(key, nbytes, None if dtype in torch.storage._new_dtypes() else dtype)


def _clusters(tensors: list[Tensor]) -> list[Cluster]:
    """Maximal runs of overlapping tensors, in the order of their addresses.

    Each begins at a multiple, within its storage, of the largest element there, so that every offset in it is whole.
    """
    units: dict[int, int] = {}
    for tensor in tensors:
        base = tensor.untyped_storage().data_ptr()
        units[base] = max(units.get(base, 1), tensor.element_size())
    spans = []
    for tensor in tensors:
        if tensor.numel():
            base, (start, stop) = tensor.untyped_storage().data_ptr(), byte_span(tensor)
            spans.append((start - (start - base) % units[base], stop, tensor))
    merged: list[tuple[int, int, Tensor]] = []
    for start, stop, tensor in sorted(spans, key=lambda span: span[:2]):
        if merged and start < merged[-1][1]:
            first, end, owner = merged[-1]
            merged[-1] = (first, max(end, stop), owner)
        else:
            merged.append((start, stop, tensor))
    return [Cluster(*run) for run in merged]
