"""Tensors in and out of files: what a file is, reading it without executing it, and writing it all or nothing.

stored = read_store("model.ckpt")          # Stored(content, format, metadata)
write_store("folded.safetensors", stored)  # format by suffix, commit by rename
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from torch import Tensor

from wnsurgery.errors import InputError, InputMissingError, printable
from wnsurgery.stores.commit import check_output, check_space, committed
from wnsurgery.stores.mapped import MappedFile, Source
from wnsurgery.stores.pickles import Scan, scan
from wnsurgery.stores.safetensors_file import map_safetensors, planned_size, read_safetensors, write_safetensors
from wnsurgery.stores.torch_file import (
    LEGACY_MAGIC,
    ZIP_MAGIC,
    Allow,
    read_torch,
    refuse_pickle,
    write_torch,
)
from wnsurgery.stores.torch_map import NotPlainError, map_legacy, map_torch
from wnsurgery.stores.torch_write import plan_archive, write_archive
from wnsurgery.stores.values import Values

__all__ = [
    "Allow",
    "Format",
    "Scan",
    "Stored",
    "check_output",
    "committed",
    "format_for",
    "is_file_name",
    "map_store",
    "open_regular",
    "read_store",
    "write_store",
]

Format = Literal["torch", "safetensors"]

_SUFFIXES: dict[str, Format] = {
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    ".ckpt": "torch",
    ".safetensors": "safetensors",
}


@dataclass(frozen=True)
class Stored:
    """What a file holds.

    Attributes:
        content: the object torch.save was given, or the table of tensors of a safetensors file.
        format: the file's own format, told from its bytes and not from its name.
        metadata: the strings in a safetensors header, None elsewhere.
        source: the files its tensors still lie in, None where they are in memory.
    """

    content: Any
    format: Format
    metadata: Mapping[str, str] | None = None
    source: Source | None = None


def map_store(path: str | os.PathLike[str]) -> Stored | None:
    """A checkpoint file with its tensors left in it, to be read one by one; nothing of it is executed.

    None for a file that has to be read whole (modules, sparse tensors) or that cannot be
    read without running code: `read_store` then reads it, or says why not.

    Raises InputMissingError, InputError as `read_store`; damage inside a tensor is found when it is read.
    """
    path = Path(path)
    file = open_regular(path)
    stored = None
    try:
        start = file.read(len(LEGACY_MAGIC))
        file.seek(0)
        if _is_safetensors(file, path, start):
            mapped = MappedFile(file, path)
            tensors, metadata = map_safetensors(mapped)
            stored = Stored(tensors, "safetensors", metadata, Source([mapped]))
        elif start.startswith(ZIP_MAGIC):
            mapped = MappedFile(file, path)
            content = map_torch(mapped, file, path)
            stored = Stored(content, "torch", None, Source([mapped]))
        elif start == LEGACY_MAGIC:
            mapped = MappedFile(file, path)
            stored = Stored(map_legacy(mapped, path), "torch", None, Source([mapped]))
    except NotPlainError:
        return None
    finally:
        if stored is None:
            file.close()
    return stored


def read_store(path: str | os.PathLike[str], *, trust_pickle: bool = False, allow: Allow | None = None) -> Stored:
    """Read a checkpoint file of any known format; nothing of it is executed.

    >>> read_store("model.pt").content["state_dict"]["conv.weight_g"].shape  # doctest: +SKIP
    torch.Size([8, 1, 1])

    Args:
        path: `.pt .pth .bin .ckpt` (zip or old serialisation) or `.safetensors`, by content.
        trust_pickle: let a pickle run the code it asks for.
        allow: further classes a pickle may use, see `read_torch`.

    Raises:
        InputMissingError: there is no such file.
        InputError: damaged, truncated, of another kind, or not a regular file.
        UnsafeFileError: its pickle would run code.
    """
    path = Path(path)
    with open_regular(path) as file:
        start = file.read(len(LEGACY_MAGIC))
        file.seek(0)
        if _is_safetensors(file, path, start):
            tensors, metadata = read_safetensors(file, path)
            return Stored(tensors, "safetensors", metadata)
        if not start.startswith(ZIP_MAGIC) and start != LEGACY_MAGIC:
            _refuse(file, path, start, trust_pickle)
        return Stored(read_torch(file, path, trust_pickle=trust_pickle, allow=allow), "torch")


def format_for(path: str | os.PathLike[str], default: Format) -> Format:
    """The format an output's suffix asks for, `default` where it says nothing."""
    return _SUFFIXES.get(Path(path).suffix.lower(), default)


def is_file_name(path: str | os.PathLike[str]) -> bool:
    """Whether an output's suffix asks for a checkpoint file."""
    return Path(path).suffix.lower() in _SUFFIXES


def write_store(
    path: str | os.PathLike[str],
    stored: Stored,
    *,
    force: bool = False,
    values: Values | None = None,
    last: Callable[[Path], None] | None = None,
) -> None:
    """Write a file whole or not at all, in the format its suffix asks for (else `stored.format`).

    Args:
        path: the output.
        stored: what to write.
        force: replace an existing file.
        values: brings the tensors one by one; None where they are all in memory.
        last: called when everything is written, with where, before that takes the output's place; may raise to
            prevent it.

    Raises:
        InputError: the content does not fit into the format.
        OutputExistsError: the output is there and `force` is not given.
        OutputError: it could not be written; what stood there is intact.
    """
    path = Path(path)
    kind = format_for(path, stored.format)
    if kind == "safetensors":
        _refuse_unflat(stored.content, path)
        check_space(path, planned_size(stored.content, stored.metadata, path, values))
    plan = plan_archive(stored.content, values) if kind == "torch" and values is not None else None
    if plan is not None:
        check_space(path, plan.size)
    with committed(path, force=force) as file:
        if kind == "safetensors":
            write_safetensors(stored.content, stored.metadata, file, path, values)
        elif plan is not None and values is not None:
            write_archive(plan, values, file)
        else:
            write_torch(stored.content, file, path)
        if last is not None:
            last(Path(file.name))


def _refuse_unflat(content: Any, path: Path) -> None:
    reason = ""
    if not isinstance(content, dict):
        reason = f"a {type(content).__name__} does not fit"
    else:
        other = [k for k, v in content.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
        if other:
            nested = all(isinstance(content[key], dict) for key in other)
            kind = "nested dicts" if nested else "entries that are no tensors"
            reason = f"{kind} ({printable(', '.join(map(str, other[:5])))}) do not fit"
    if reason:
        raise InputError.of(path, f"{reason} into a .safetensors file", "write a .pt file instead")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; FIFOs and devices are refused before anything waits on them.

    Raises InputMissingError, InputError.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError.of(path, "a directory; name the file in it")
        if not stat.S_ISREG(mode):
            raise InputError.of(path, "not a regular file")
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise InputMissingError.at(path) from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        if getattr(error, "errno", None) == errno.ELOOP:
            raise InputMissingError.at(path) from None
        raise InputError.of(path, getattr(error, "strerror", None) or str(error)) from error
    return os.fdopen(handle, "rb")


def _is_safetensors(file: BinaryIO, path: Path, start: bytes) -> bool:
    if path.suffix.lower() == ".safetensors":
        return bool(start) and not start.startswith(ZIP_MAGIC) and start != LEGACY_MAGIC
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < os.fstat(file.fileno()).st_size


def _refuse(file: BinaryIO, path: Path, start: bytes, trust_pickle: bool) -> None:
    """Say what a file is that is neither a torch file nor safetensors."""
    if not start:
        raise InputError.of(path, "empty")
    if path.suffix.lower() == ".onnx":
        raise InputError.of(path, "an ONNX graph, not a checkpoint", "fold_onnx (wnsurgery fold) takes graphs")
    if not trust_pickle:
        refuse_pickle(path, scan(file), [])
    if start.startswith(b"\x80"):
        raise InputError.of(path, "a bare pickle, or a truncated torch file", "write checkpoints with torch.save")
    raise InputError.of(path, "damaged, or no checkpoint that torch.save or safetensors wrote")
