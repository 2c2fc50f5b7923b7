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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wnsurgery import __version__
from wnsurgery.checkpoint import CheckpointReport
from wnsurgery.delivery import Output, every_name, figures, watch
from wnsurgery.errors import InputError, OutputError, OutputExistsError, UnsafeFileError, WnsurgeryError, printable
from wnsurgery.loading import read
from wnsurgery.manifest import manifest_text
from wnsurgery.promises import Promises
from wnsurgery.ranks import Ranks
from wnsurgery.stores import Stored, committed, map_store
from wnsurgery.stores.commit import check_space, file_digest
from wnsurgery.stores.dcp import Distributed, map_distributed
from wnsurgery.stores.hub import Hub, Shards, empty_directories, list_files, new_index, read_index
from wnsurgery.stores.mapped import Source
from wnsurgery.stores.safetensors_file import planned_size, write_safetensors
from wnsurgery.stores.staging import Staging, staged
from wnsurgery.stores.torch_write import plan_archive, write_archive
from wnsurgery.stores.values import Values

__all__ = ["Folder", "deliver_directory", "map_directory"]

_SHARD = re.compile(r"(?P<stem>.*?)-\d+-of-\d+(?P<suffix>\.safetensors|\.bin)")
_WEIGHTS = re.compile(r".*\.safetensors|(?:.*/)?(?:diffusion_)?(?:pytorch_model|adapter_model)[^/]*\.bin")
_OWN = re.compile(rf"{_WEIGHTS.pattern}|.*\.(?:safetensors|bin)\.index\.json|[^/]*\.distcp|\.metadata")
_DATA = "__0_0.distcp"


@dataclass
class Folder:
    """A checkpoint directory: its tensors as `stored`, and how it was laid out."""

    stored: Stored
    layout: Hub | Distributed

    @property
    def source(self) -> Source:
        return self.layout.source


def map_directory(path: Path) -> Folder:
    """A checkpoint directory with its tensors left in its files.

    Raises InputError, UnsafeFileError as the readers do.
    """
    if (path / ".metadata").is_symlink() or (path / ".metadata").exists():
        spread = map_distributed(path)
        return Folder(Stored(spread.nested(), "safetensors", None, spread.source), spread)
    hub = _map_hub(path)
    content: Any = hub.content if len(hub.sets) > 1 else next(iter(hub.content.values()))
    metadata = next(iter(hub.sets[0].metadata.values()), None)
    return Folder(Stored(content, "safetensors", metadata, hub.source), hub)


def _map_hub(path: Path) -> Hub:
    names = list_files(path)
    groups = _groups(path, names)
    if not groups:
        raise InputError.of(
            path, "a directory without weights (*.safetensors, pytorch_model*.bin, .metadata)", "name the file in it"
        )
    sources: list[Source] = []
    content: dict[str, dict[str, Tensor]] = {}
    try:
        for label, (shards, weights, files) in groups.items():
            content[label] = _fill(path, shards, weights, files, sources)
    except BaseException:
        for source in sources:
            source.close()
        raise
    used = {f for shards, _, files in groups.values() for f in (*files, shards.index)}
    merged = Source([file for source in sources for file in source.files])
    return Hub([shards for shards, _, _ in groups.values()], content, [n for n in names if n not in used], merged)


Group = tuple[Shards, dict[str, str], list[str]]


def _groups(path: Path, names: list[str]) -> dict[str, Group]:
    """The sets of weights: those an index names, then shards without one, then single files."""
    groups: dict[str, Group] = {}
    claimed: set[str] = set()
    for name in names:
        if name.endswith((".safetensors.index.json", ".bin.index.json")):
            weights, facts = read_index(path, name)
            folder = name.rpartition("/")[0]
            weights = {key: f"{folder}/{owner}" if folder else owner for key, owner in weights.items()}
            files = sorted(set(weights.values()))
            claimed |= set(files)
            groups[name] = (Shards(name, facts), weights, files)
    for name in names:
        if name not in claimed and _WEIGHTS.fullmatch(name):
            part = _SHARD.fullmatch(name)
            label = part["stem"] + part["suffix"] if part else name
            groups.setdefault(label, (Shards("", {}), {}, []))[2].append(name)
    return groups


def _fill(
    path: Path, shards: Shards, weights: dict[str, str], files: list[str], sources: list[Source]
) -> dict[str, Tensor]:
    """The tensors of all files of a set, each name once; what the index says must be so."""
    tensors: dict[str, Tensor] = {}
    for name in files:
        stored = map_store(path / name)
        if stored is None or stored.source is None or not isinstance(stored.content, dict):
            raise _not_plain(path / name)
        sources.append(stored.source)
        shards.formats[name], shards.metadata[name] = stored.format, stored.metadata
        shards.entries[name] = {k: v for k, v in stored.content.items() if not isinstance(v, Tensor)}
        for key, tensor in stored.content.items():
            if not isinstance(tensor, Tensor):
                continue
            if not isinstance(key, str) or key in tensors:
                raise InputError.of(path / name, f"{printable(key)} is in another file, too")
            if weights.get(key, name) != name:
                raise InputError.of(path / name, f"{printable(key)} is here, and in another file by the index")
            tensors[key], shards.owners[key] = tensor, name
    missing = [key for key in weights if key not in tensors]
    if missing:
        raise InputError.of(path / shards.index, f"names {printable(missing[0])}, which is in no file")
    return tensors


def _not_plain(path: Path) -> WnsurgeryError:
    """Why a file cannot be one of a directory: its pickle would run code, it is damaged, or it holds something else."""
    try:
        read(path, trust_pickle=False)
    except UnsafeFileError as error:
        return UnsafeFileError(error.message, hint="a file that you trust can be named alone, with --trust-pickle")
    except InputError as error:
        return error
    return InputError.of(path, "not a file of plain tensors")


# Writing -------------------------------------------------------------------------------------------------


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
        work = _digest_of_work(output, src, report)
        with _staged_by_first(output, target, work) as staging:
            for name in empty_directories(src):
                staging.directory(name)
            _write_all(staging, mine, maker)
            maker.learn(ranks.gather(maker.findings()))
            if ranks.rank == 0:
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
    with staged(target, work, force=output.force or output.in_place, resume=output.resume) as staging:
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


def _digest_of_work(output: Output, src: Path, report: CheckpointReport) -> str:
    """What makes two runs the same work: the input's files, the steps and the versions."""
    facts = [(name, (src / name).stat().st_size, (src / name).stat().st_mtime_ns) for name in list_files(src)]
    text = json.dumps([__version__, torch.__version__, output.operation, facts, [repr(s) for s in report.steps]])
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
