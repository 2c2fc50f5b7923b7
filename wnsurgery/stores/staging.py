"""Write a directory all or nothing: files gather in a staging directory beside it, then one rename.

The staging directory of `model` is `.model.partial`. A run that is killed leaves it; the next run clears it, or,
asked to resume the same work, keeps the files that are complete. A lock tells two writers apart, and goes with
the process that holds it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from wnsurgery.errors import OutputError, OutputExistsError
from wnsurgery.stores.commit import beside, committed

__all__ = ["Staging", "check_output_directory", "staged"]

_NOREPLACE, _EXCHANGE, _HERE = 1, 2, -100
_MAX_NAME = 240  # bytes of an output's name to which more can be added


def check_output_directory(
    output: str | os.PathLike[str], source: str | os.PathLike[str], *, force: bool, in_place: bool
) -> Path:
    """Refuse an output directory that must not be written, before any work is done.

    Raises OutputExistsError, OutputError as `check_output`; an output inside the input, or around it, is refused.
    """
    try:
        return _checked(Path(output), Path(source).absolute(), force, in_place)
    except (OSError, ValueError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{output}: {getattr(error, 'strerror', None) or error}") from error


def _checked(path: Path, src: Path, force: bool, in_place: bool) -> Path:
    if path.is_symlink():
        raise OutputError(f"{path}: a link; name the directory itself")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the directory {path.parent} does not exist")
    if path.exists() and path.samefile(src):
        if not in_place:
            raise OutputExistsError(f"{path}: this is the input", hint="in_place=True (--in-place) replaces it")
        return path
    here, there = path.absolute().parent.resolve() / path.name, src.resolve()
    if there in here.parents or here in there.parents:
        raise OutputError(f"{path}: one of input and output lies in the other")
    if path.exists():
        if not path.is_dir():
            raise OutputError(f"{path}: not a directory; nothing was written")
        if not force:
            raise OutputExistsError(f"{path}: already exists", hint="force=True (--force) replaces it")
    return path


class Staging:
    """Files on their way into one directory."""

    def __init__(self, payload: Path) -> None:
        self.payload = payload

    def has(self, name: str) -> bool:
        """Whether an earlier run completed this file."""
        return (self.payload / name).is_file()

    def directory(self, name: str) -> None:
        """A directory, which may stay empty."""
        self._make(self.payload / name)

    @contextmanager
    def file(self, name: str) -> Iterator[BinaryIO]:
        """A file to write, complete under its name or not there at all."""
        path = self.payload / name
        self._make(path.parent)
        with committed(path, force=True) as file:
            yield file

    def _make(self, folder: Path) -> None:
        """A directory below the payload, which is never made anew: it is gone where the process that made it failed."""
        if folder == self.payload:
            return
        self._make(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: {error.strerror}") from error


@contextmanager
def staged(output: Path, work: str, *, force: bool, resume: bool) -> Iterator[Staging]:
    """A staging directory that becomes `output` when the block ends well.

    When the block fails it vanishes, unless `resume` asks to keep it for the next run.

    Args:
        output: the directory to be.
        work: a digest of what is done to what; files of other work are not kept.
        force: replace an existing directory, in one exchange where the system can.
        resume: keep complete files of the same work.
    """
    root = _root_of(output)
    mine = _Root(root)
    try:
        mine.lock(output)
        payload = _prepared(root, output, work, resume)
        mine.keep = resume
        yield Staging(payload)
        _sync(payload)
        _publish(root, output, force)
        mine.keep = False
    except OSError as error:
        if isinstance(error, OutputError) or error.errno is None:
            raise
        raise OutputError(f"{output}: {error.strerror or error}") from error
    finally:
        try:
            mine.remove()
        finally:  # a signal may have ended the first attempt
            mine.remove()
    with contextlib.suppress(OSError):
        _sync(output.parent)


def _root_of(output: Path) -> Path:
    """The staging directory of an output: a digest stands for the end of a name that leaves no room for more."""
    if len(os.fsencode(output.name)) <= _MAX_NAME:
        return output.with_name(f".{output.name}.partial")
    return beside(output, f".{hashlib.sha256(os.fsencode(output.name)).hexdigest()[:12]}.partial")


class _Root:
    """The staging directory itself, from the first lock to its removal; of another run's nothing is touched."""

    def __init__(self, path: Path) -> None:
        self.path, self.keep = path, False
        self.handle: int | None = None

    def lock(self, output: Path) -> None:
        self.path.mkdir(exist_ok=True)
        self.handle = _lock(self.path, output)

    def remove(self) -> None:
        """Remove the directory unless it is to be kept, and unlock it."""
        if self.handle is None:
            with contextlib.suppress(OSError):
                self.path.rmdir()  # made, but not locked yet; another run's is not empty
            return
        if not self.keep:
            self._clear()
        with contextlib.suppress(OSError):
            os.close(self.handle)
        self.handle = None

    def _clear(self) -> None:
        """Remove everything, the lock last: once it is gone another run may start here."""
        with contextlib.suppress(OSError):
            for path in self.path.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != "lock":
                    path.unlink()
            (self.path / "lock").unlink()
            self.path.rmdir()


def _lock(root: Path, output: Path) -> int:
    try:
        handle = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:  # a run that ends has removed the directory since we made it
        raise OutputError(f"{output}: another run is writing it") from None
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == (root / "lock").stat().st_ino:
            return handle
    except ImportError:
        return handle
    except OSError:
        pass
    os.close(handle)
    raise OutputError(f"{output}: another run is writing it")


def _prepared(root: Path, output: Path, work: str, resume: bool) -> Path:
    payload, note, old = root / "payload", root / "work", root / "old"
    if old.exists() and not output.exists():
        old.rename(output)  # a run was killed between the two renames that replace a directory
    shutil.rmtree(old, ignore_errors=True)
    same = note.is_file() and note.read_text(encoding="ascii", errors="replace") == work
    if not (resume and same):
        shutil.rmtree(payload, ignore_errors=True)
    payload.mkdir(exist_ok=True)
    for left in payload.rglob(".*.tmp"):
        left.unlink()
    note.write_text(work, encoding="ascii")
    return payload


def _publish(root: Path, output: Path, force: bool) -> None:
    payload, old = root / "payload", root / "old"
    if not output.exists():
        if not _rename(payload, output, _NOREPLACE):
            payload.rename(output)
        return
    if not force:
        raise OutputExistsError(f"{output}: already exists", hint="force=True (--force) replaces it")
    (root / "work").unlink()  # it must not vouch for the old output, which an exchange puts in the new one's place
    _sync(root)
    if _rename(payload, output, _EXCHANGE):
        return
    output.rename(old)
    try:
        payload.rename(output)
    except BaseException:
        old.rename(output)
        raise


def _rename(source: Path, target: Path, flag: int) -> bool:
    """renameat2, where system and file system have it: exchange two directories, or never replace one."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    if call(_HERE, os.fsencode(source), _HERE, os.fsencode(target), flag) == 0:
        return True
    if ctypes.get_errno() == errno.EEXIST:
        raise OutputExistsError(f"{target}: already exists", hint="force=True (--force) replaces it")
    return False


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
