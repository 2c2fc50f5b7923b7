"""Write a file all or nothing: a temporary beside it, flushed to the disk, then one rename."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from wnsurgery.errors import InputError, OutputError, OutputExistsError

__all__ = [
    "beside",
    "check_output",
    "check_space",
    "committed",
    "file_digest",
    "is_same_file",
    "publish",
    "refuse_inputs",
]

_MAX_LINKS = 40  # in a chain, as Linux has it
_MAX_START = 200  # bytes, of the 255 that names may have nearly everywhere


def check_output(
    output: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    in_place: bool = False,
) -> Path:
    """Refuse an output that must not be written, before any work is done.

    >>> check_output("folded.pt", "model.pt")
    PosixPath('folded.pt')

    Raises:
        OutputExistsError: it exists and `force` is not given, or it is the input and `in_place` is not given.
        OutputError: its directory is missing, it is something else than a regular file, or it belongs to the system.
    """
    path = Path(output)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise OutputError(f"{path}: the directory {path.parent} does not exist") from None
        if path.is_symlink():
            raise OutputError(f"{path}: a link that leads nowhere") from None
        _refuse_system(path)
        return path
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: {_reason(error)}") from error
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise OutputError(f"{path}: {kind}; nothing was written")
    _refuse_system(path)
    if source is not None and is_same_file(path, source):
        if not in_place:
            raise OutputExistsError(f"{path}: this is the input", hint="in_place=True (--in-place) replaces it")
    elif not force:
        raise OutputExistsError(f"{path}: already exists", hint="force=True (--force) replaces it")
    return path


def _refuse_system(path: Path) -> None:
    """Raise OutputError for what lies in /proc or among the devices, or is a link there, as /dev/stdout is: a rename
    would replace the system's own link."""
    for _ in range(_MAX_LINKS):
        folder = path.parent.resolve()
        if folder == Path("/dev") or folder.parts[:2] in (("/", "proc"), ("/", "sys")):
            raise OutputError(f"{path}: {folder} belongs to the system; nothing was written")
        if not path.is_symlink():
            return
        path = folder / path.readlink()


def beside(path: Path, ending: str) -> Path:
    """A hidden path beside another: the start of its name, no longer in bytes than names may be, and an ending.

    >>> beside(Path("models/a.pt"), ".tmp").name
    '.a.pt.tmp'
    """
    name = path.name[:64]
    while len(os.fsencode(name)) > _MAX_START:
        name = name[:-1]
    return path.with_name(f".{name}{ending}")


def refuse_inputs(output: str | os.PathLike[str], *inputs: str | os.PathLike[str] | None) -> None:
    """Refuse an output that is one of the inputs, under whatever name, or a file in a directory that is one.

    >>> refuse_inputs("report.html", "model.pt", None)

    Raises OutputExistsError.
    """
    path = Path(output)
    try:
        places = [path, *path.resolve(strict=True).parents]
    except (OSError, RuntimeError, ValueError):  # nothing is there, or nothing that can be looked at
        return
    for source in inputs:
        if source is not None and any(is_same_file(place, source) for place in places):
            raise OutputExistsError(f"{path}: this is the input, or a part of it; nothing was written")


def check_space(output: str | os.PathLike[str], needed: int) -> None:
    """Raise OutputError where the file system has less room than `needed` bytes, before any work is done."""
    try:
        free = shutil.disk_usage(Path(output).parent).free
    except OSError:
        return  # the write itself will tell
    if free < needed:
        raise OutputError(f"{output}: no space left on the device ({needed:,} bytes needed, {free:,} free)")


@contextmanager
def committed(output: str | os.PathLike[str], *, force: bool) -> Iterator[BinaryIO]:
    """A file to write to that becomes `output` when the block ends well, and vanishes when it does not.

    The mode follows the umask. Where `output` is a symbolic link, the link is replaced, not what it points to.
    Without `force`, an output that appears while we write is left as it is.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "x.bin"
    >>> with committed(path, force=False) as file:
    ...     _ = file.write(b"whole")
    >>> path.read_bytes()
    b'whole'

    Raises:
        OutputError: the file could not be written (no space, no permission, ...).
        OutputExistsError: it exists and `force` is not given.
    """
    path = Path(output)
    temporary = beside(path, f".{secrets.token_hex(6)}.tmp")
    try:
        try:
            with _create(temporary, path) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            publish(temporary, path, force=force)
        except InputError:  # some input errors are OSErrors too; they speak of another file
            raise
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"{path}: {_reason(error)}") from error
    finally:
        try:
            with contextlib.suppress(OSError):
                temporary.unlink()
        finally:  # a signal may have ended the first attempt
            with contextlib.suppress(OSError):
                temporary.unlink()
    _sync_directory(path.parent)


def _create(temporary: Path, path: Path) -> BinaryIO:
    try:
        # not tempfile: its files are private (0600), and the kernel applies the umask here without a race
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise OutputError(f"{path}: {_reason(error)}") from error
    return cast(BinaryIO, _Unbuffered(temporary, "wb", opener=lambda *_: handle))  # so that it knows its name


_AT_ONCE = 1 << 16  # bytes: writes of many megabytes took half as long again, and up to five times as long


class _Unbuffered(io.FileIO):
    """A file whose writes go to the system as they come, whole: they are large, and a buffer would only copy them."""

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            rest = rest[super().write(rest[:_AT_ONCE]) or 0 :]
        return size


def publish(temporary: Path, path: Path, *, force: bool) -> None:
    """Put a complete file in its place; without `force`, one that appeared there meanwhile is left as it is.

    Raises OutputExistsError; OSError as the system does.
    """
    if force:
        temporary.replace(path)
        return
    try:
        os.link(temporary, path)  # unlike a rename, fails where someone else was quicker
        with contextlib.suppress(OSError):
            temporary.unlink()
    except FileExistsError:
        raise OutputExistsError(f"{path}: already exists", hint="force=True (--force) replaces it") from None
    except (OSError, NotImplementedError, AttributeError):
        if path.exists():  # file systems without hard links
            raise OutputExistsError(f"{path}: already exists", hint="force=True replaces it") from None
        temporary.replace(path)


def _sync_directory(directory: Path) -> None:
    """Make the rename itself survive a power cut, where the system lets a directory be flushed."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_same_file(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether both are there and are one file."""
    try:
        return Path(a).samefile(b)
    except (OSError, ValueError):
        return False


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
