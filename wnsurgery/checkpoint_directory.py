"""A directory of checkpoint files as one set of state dicts: mapped, its tensors left in its files, or read whole.

As the Hugging Face hub has it (shards with an index or without, single files), or torch.distributed.checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from wnsurgery.errors import InputError, UnsafeFileError, WnsurgeryError, printable
from wnsurgery.reading import read
from wnsurgery.stores import Stored, map_store
from wnsurgery.stores.dcp import Distributed, map_distributed
from wnsurgery.stores.hub import Hub, Shards, list_files, read_index
from wnsurgery.stores.mapped import Source

__all__ = ["WEIGHTS", "Folder", "map_directory", "read_directory"]

_SHARD = re.compile(r"(?P<stem>.*?)-\d+-of-\d+(?P<suffix>\.safetensors|\.bin)")
WEIGHTS = re.compile(r".*\.safetensors|(?:.*/)?(?:diffusion_)?(?:pytorch_model|adapter_model)[^/]*\.bin")


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


def read_directory(path: Path) -> Any:
    """What a checkpoint directory holds, in memory.

    Raises as `map_directory`.
    """
    stored = map_directory(path).stored
    assert stored.source is not None
    fetch = stored.source.fetch

    def fetched(content: Any) -> Any:
        if isinstance(content, dict):
            return {name: fetched(value) for name, value in content.items()}
        return fetch(content) if isinstance(content, Tensor) else content

    try:
        return fetched(stored.content)
    finally:
        stored.source.close()


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
        if name not in claimed and WEIGHTS.fullmatch(name):
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
