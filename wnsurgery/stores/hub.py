"""Directories as the Hugging Face hub has them: one weight file or shards with an index, and everything else.

Nothing outside the directory is opened: names in an index are plain names, and links, FIFOs and devices are
refused wherever they stand.
"""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from wnsurgery.errors import InputError, UnsafeFileError, printable
from wnsurgery.stores.mapped import Source

__all__ = ["Hub", "Shards", "empty_directories", "list_files", "new_index", "plain_name", "read_index"]

_MAX_INDEX = 1 << 28
_MAX_FILES = 100_000


@dataclass
class Shards:
    """One set of weights of a directory.

    Attributes:
        index: name of its index, "" for a single file.
        facts: what the index holds beside its weight map.
        owners: tensor -> file.
        entries: file -> what it holds beside tensors.
        formats: file -> "torch" or "safetensors".
        metadata: file -> the strings of its header.
    """

    index: str
    facts: dict[str, Any]
    owners: dict[str, str] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    formats: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class Hub:
    """A directory: its sets of weights, one dict of tensors for each, and the names of all other files."""

    sets: list[Shards]
    content: dict[str, dict[str, Tensor]]
    others: list[str]
    source: Source


def plain_name(directory: Path, name: Any) -> str:
    """A file name from an index, checked: a file of the directory itself.

    Raises UnsafeFileError for a name that leads elsewhere, InputError where there is no such file.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or set(name) & set("/\\\0") or ":" in name:
        raise UnsafeFileError(f"{directory}: refused, its index names {printable(repr(name), 80)}, not a file in it")
    check_regular(directory / name)
    return name


def check_regular(path: Path) -> None:
    """Raise unless a path is a regular file and no link."""
    try:
        mode = path.lstat().st_mode
    except (OSError, ValueError) as error:
        raise InputError.of(path, getattr(error, "strerror", None) or str(error)) from error
    if stat.S_ISLNK(mode):
        raise UnsafeFileError(
            f"{path}: refused, a link, which may lead out of the directory",
            hint="make a copy that follows the links: cp -rL",
        )
    if not stat.S_ISREG(mode):
        raise InputError.of(path, "not a regular file")


def list_files(directory: Path) -> list[str]:
    """Every file below a directory, sorted, with forward slashes; links, FIFOs and devices are refused."""
    found: list[str] = []
    stack = [""]
    while stack:
        inside = stack.pop()
        try:
            entries = sorted(os.scandir(directory / inside), key=lambda e: e.name)
        except OSError as error:
            raise InputError.of(directory / inside, error.strerror or str(error)) from error
        for entry in entries:
            name = f"{inside}/{entry.name}" if inside else entry.name
            if entry.is_dir(follow_symlinks=False):
                stack.append(name)
            else:
                check_regular(directory / name)
                found.append(name)
        if len(found) > _MAX_FILES:
            raise InputError.of(directory, f"more than {_MAX_FILES} files")
    return sorted(found)


def empty_directories(directory: Path) -> list[str]:
    """Every directory below a directory that holds nothing, with forward slashes."""
    empty = (Path(path) for path, inner, files in os.walk(directory) if not inner and not files)
    return sorted(path.relative_to(directory).as_posix() for path in empty)


def read_index(directory: Path, name: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The weight map of an index (tensor -> checked file name) and everything else in it.

    Raises InputError for an index that is no index, UnsafeFileError for names that leave the directory.
    """
    path = directory / name
    if path.stat().st_size > _MAX_INDEX:
        raise InputError.of(path, "larger than any index")
    try:
        table = json.loads(
            path.read_bytes(), object_pairs_hook=_no_duplicates, parse_float=_number, parse_constant=_number
        )
        weights = table.pop("weight_map")
        if not isinstance(weights, dict):
            raise ValueError("weight_map is no table")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise InputError.of(path, f"damaged index ({printable(error)})") from error
    folder = path.parent
    known: dict[str, str] = {}
    for owner in weights.values():
        if not isinstance(owner, str) or owner not in known:
            known[owner] = plain_name(folder, owner)
    return {str(k): v for k, v in weights.items()}, table


def new_index(shards: Shards, owners: dict[str, str], sizes: dict[str, int]) -> bytes:
    """The index of what is written: the right total size, names sorted."""
    facts = dict(shards.facts)
    metadata = facts.pop("metadata", None)
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    metadata["total_size"] = sum(sizes.values())
    table = {"metadata": metadata, **facts, "weight_map": dict(sorted(owners.items()))}
    return (json.dumps(table, indent=2, sort_keys=False) + "\n").encode()


def _number(text: str) -> float:
    if not math.isfinite(float(text)):  # Python reads and writes them, JSON has none
        raise ValueError(f"{text} is no number that JSON can hold")
    return float(text)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is there twice")
    return table
