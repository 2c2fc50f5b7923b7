"""Checkpoint directories, Hugging Face's and torch's distributed ones: folded or converted file by file.

All weights of a directory are planned as one state dict, so a pair may be split over files; a new weight is written
where its direction was. Everything else is carried along byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wnsurgery import __version__
from wnsurgery.checkpoint import CheckpointReport
from wnsurgery.checkpoint_directory import WEIGHTS, Folder, map_directory
from wnsurgery.delivery import Output, every_name, figures, watch
from wnsurgery.errors import OutputError, OutputExistsError, printable
from wnsurgery.manifest import manifest_text
from wnsurgery.promises import Promises
from wnsurgery.ranks import Ranks
from wnsurgery.stores import committed
from wnsurgery.stores.commit import check_space, file_digest
from wnsurgery.stores.dcp import Distributed
from wnsurgery.stores.hub import Hub, Shards, empty_directories, list_files, new_index
from wnsurgery.stores.safetensors_file import planned_size, write_safetensors
from wnsurgery.stores.staging import Staging, staged
from wnsurgery.stores.torch_write import plan_archive, write_archive
from wnsurgery.stores.values import Values

__all__ = ["deliver_directory"]

_OWN = re.compile(rf"{WEIGHTS.pattern}|.*\.(?:safetensors|bin)\.index\.json|[^/]*\.distcp|\.metadata")
_DATA = "__0_0.distcp"


def deliver_directory(
    output: Output, src: Path, folder: Folder, report: CheckpointReport, maker: Promises
) -> CheckpointReport:
    """Write a directory of the input's kind; returns the report with its warnings and figures complete."""
    if output.progress is not None:
        watch(maker, output.progress)

    def whole() -> CheckpointReport:
        return replace(report, warnings=(*maker.notes, *report.warnings))

    if not output.write:
        maker.run_all()
        folder.source.check_all()
        output.settle(whole())
        return replace(whole(), proof=figures(output, whole(), maker, folder.source.size, 0))
    target = Path(output.path)
    lay = folder.layout
    files = _hub_files(src, lay, report, maker) if isinstance(lay, Hub) else _distributed_files(folder, lay, maker)
    files += [(name, (src / name).stat().st_size, _copier(src / name)) for name in lay.others]
    if not output.in_place:
        _refuse_strangers(target, {name for name, _, _ in files})
    check_space(target, sum(size for _, size, _ in files))
    ranks = output.ranks
    mine = _share(files, ranks) if isinstance(lay, Hub) else files if ranks.rank == 0 else []
    with ExitStack() as stack:
        if output.manifest is not None and ranks.rank == 0:
            sink = stack.enter_context(committed(output.manifest, force=output.force))
        work = _digest_of_work(output, src, report, maker)
        with _staged_by_first(output, target, work) as staging:
            for name in empty_directories(src):
                staging.directory(name)
            _write_all(staging, mine, maker)
            maker.learn(ranks.gather(maker.findings()))
            if ranks.rank == 0:
                if list_files(staging.payload) != sorted(name for name, _, _ in files):
                    raise OutputError(f"{target}: files of it came or went while it was written; nothing was written")
                if output.strict or output.manifest is not None:
                    maker.run_all()  # what an earlier run wrote has its warnings, too
                folder.source.check_all()
                output.settle(whole())
                if output.manifest is not None:  # one that cannot be made keeps the output from taking its place
                    sink.write(_manifest(output, staging.payload, whole()))
        if ranks.rank > 0:
            ranks.gather(None)
            return replace(whole(), proof=figures(output, whole(), maker, folder.source.size, 0))
        names = list_files(target)
        written = sum((target / name).stat().st_size for name in names)
    ranks.gather(None)
    return replace(whole(), proof=figures(output, whole(), maker, folder.source.size, written))


def _manifest(output: Output, written: Path, report: CheckpointReport) -> bytes:
    """The manifest of the directory that was written, read back."""
    again = map_directory(written)
    try:
        digests = {name: file_digest(written / name) for name in list_files(written)}
        tensors = every_name(again.stored.content)
        return manifest_text(output.operation, __version__, report, tensors, again.source.fetch, digests)
    finally:
        again.source.close()


def _refuse_strangers(target: Path, written: set[str]) -> None:
    """Raise where an output directory to be replaced holds files that no such output would."""

    def fail(error: OSError) -> None:
        raise OutputError(f"{target}: cannot be looked through ({error.strerror})")

    for folder, inner, names in os.walk(target, onerror=fail) if target.exists() else ():
        for path in (Path(folder, name) for name in (*names, *inner)):
            name = path.relative_to(target).as_posix()
            if (path.is_dir() and not path.is_symlink()) or name in written or _OWN.fullmatch(name):
                continue
            raise OutputExistsError(
                f"{target}: holds {printable(name)}, which is no part of a checkpoint; nothing was written",
                hint="name another directory, or remove this one",
            )


@contextmanager
def _staged_by_first(output: Output, target: Path, work: str) -> Iterator[Staging]:
    """The staging directory of the first process, which alone makes and publishes it; the others write into it."""
    if output.ranks.rank > 0:
        yield Staging(Path(output.ranks.gather(None)[0]))
        return
    force = output.force or output.in_place
    # `telling` within: the others have stopped writing before anything is removed
    with staged(target, work, force=force, resume=output.resume) as staging, output.ranks.telling():
        output.ranks.gather(str(staging.payload))
        yield staging


Writer = Callable[[Any], None]
Planned = tuple[str, int, Writer]


def _share(files: Sequence[Planned], ranks: Ranks) -> list[Planned]:
    """This process's files, in order: the largest first, each to whoever has least to write."""
    loads, mine = [0] * ranks.size, set()
    for name, size, _ in sorted(files, key=lambda file: (-file[1], file[0])):
        owner = loads.index(min(loads))
        loads[owner] += size + 1
        if owner == ranks.rank:
            mine.add(name)
    return [file for file in files if file[0] in mine]


def _write_all(staging: Staging, files: Iterable[Planned], maker: Promises) -> None:
    for name, _size, write in files:
        if not staging.has(name):
            with staging.file(name) as file:
                write(file)
                maker.forget()  # a file counts as written once its last weight has been compared


def _digest_of_work(output: Output, src: Path, report: CheckpointReport, maker: Promises) -> str:
    """What makes two runs the same work: the input's files, the steps, what decides their values, the versions."""
    facts = [(name, (src / name).stat().st_size, (src / name).stat().st_mtime_ns) for name in list_files(src)]
    options = [output.operation, maker.magnitude, maker.zero_norm]
    text = json.dumps([__version__, torch.__version__, options, facts, [repr(s) for s in report.steps]])
    return hashlib.sha256(text.encode()).hexdigest()


def _hub_files(src: Path, hub: Hub, report: CheckpointReport, values: Values) -> list[Planned]:
    """The weights and indexes of the new directory, their sizes and what writes them."""
    planned: list[Planned] = []
    for shards, (label, tensors) in zip(hub.sets, hub.content.items(), strict=True):
        path = label if len(hub.sets) > 1 else ""
        owners = _owners(shards.owners, tensors, [s for s in report.steps if s.path == path])
        sizes = {key: t.numel() * t.element_size() for key, t in tensors.items()}
        for name, kind in shards.formats.items():
            own = {key: t for key, t in tensors.items() if owners[key] == name}
            planned.append(_weights_file(src / name, name, kind, own, shards, values))
        if shards.index:
            short = {key: owner.rpartition("/")[2] for key, owner in owners.items()}
            planned.append(_bytes_file(shards.index, new_index(shards, short, sizes)))
    return planned


def _owners(before: Mapping[str, str], tensors: Mapping[str, Tensor], steps: Iterable[Any]) -> dict[str, str]:
    """The file of every new tensor: where the direction, or the plain weight, was."""
    owners = {key: owner for key, owner in before.items() if key in tensors}
    for step in steps:
        home = before[step.sources[1 if len(step.sources) > 1 else 0]]
        owners.update(dict.fromkeys(step.targets, home))
    return owners


def _weights_file(
    path: Path, name: str, kind: str, tensors: dict[str, Tensor], shards: Shards, values: Values
) -> Planned:
    if kind == "safetensors":
        metadata = shards.metadata[name]
        size = planned_size(tensors, metadata, path, values)
        return name, size, lambda file: write_safetensors(tensors, metadata, file, path, values)
    plan = plan_archive({**tensors, **shards.entries[name]}, values)
    return name, plan.size, lambda file: write_archive(plan, values, file)


def _bytes_file(name: str, data: bytes) -> Planned:
    return name, len(data), lambda file: file.write(data)


def _copier(path: Path) -> Writer:
    """What carries a file along, byte for byte, executable where it was."""

    def copy(file: Any) -> None:
        with path.open("rb") as source:
            shutil.copyfileobj(source, file, 1 << 22)
            if os.name == "posix" and os.fstat(source.fileno()).st_mode & stat.S_IXUSR:
                mode = os.fstat(file.fileno()).st_mode
                os.fchmod(file.fileno(), mode | (mode & 0o444) >> 2)

    return copy


# torch's distributed checkpoints -------------------------------------------------------------------------


def _distributed_files(folder: Folder, spread: Distributed, values: Values) -> list[Planned]:
    """One data file with an archive for every entry, and the metadata that says where each begins."""
    content, paths = spread.flattened(folder.stored.content)
    plans = {name: plan_archive(value, values) for name, value in content.items()}
    places: dict[str, tuple[int, int]] = {}

    def write(file: Any) -> None:
        for name, plan in plans.items():
            start = file.tell()
            write_archive(plan, values, file)
            places[name] = (start, file.tell() - start)

    def tell(file: Any) -> None:
        if not places:  # an earlier run has written the data
            write(_Nowhere())
        file.write(_metadata(content, paths, places))

    return [(_DATA, sum(p.size for p in plans.values()), write), (".metadata", 256 * len(plans), tell)]


class _Nowhere:
    """A file that keeps nothing of what is written to it but the length."""

    def __init__(self) -> None:
        self._length = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self._length += size
        return size

    def tell(self) -> int:
        return self._length

    def flush(self) -> None:
        pass


def _metadata(
    content: Mapping[str, Any], paths: Mapping[str, tuple[Any, ...]], places: Mapping[str, tuple[int, int]]
) -> bytes:
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    tables: dict[str, Any] = {}
    stored: dict[Any, Any] = {}
    for name, value in content.items():
        info = _StorageInfo(_DATA, *places[name])
        if isinstance(value, Tensor):
            size = torch.Size(value.shape)
            zero = torch.Size([0] * value.ndim)
            properties = dcp.TensorProperties(dtype=value.dtype, requires_grad=value.requires_grad)
            tables[name] = dcp.TensorStorageMetadata(properties, size, [dcp.ChunkStorageMetadata(zero, size)])
            stored[dcp.MetadataIndex(name, zero, 0)] = info
        else:
            tables[name] = dcp.BytesStorageMetadata()
            stored[dcp.MetadataIndex(name)] = info
    return pickle.dumps(dcp.Metadata(tables, planner_data=dict(paths), storage_data=stored), protocol=4)
