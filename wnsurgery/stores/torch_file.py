"""`.pt .pth .bin .ckpt`: whatever torch.save wrote, in and out, with no code of the file executed."""

from __future__ import annotations

import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch

from wnsurgery.errors import InputError, OutputError, UnsafeFileError, printable
from wnsurgery.stores.archive import check_archive
from wnsurgery.stores.claims import refuse_stretched
from wnsurgery.stores.pickles import LEGACY_PICKLES, Scan, scan

__all__ = ["LEGACY_MAGIC", "ZIP_MAGIC", "Allow", "Sink", "read_torch", "refuse_pickle", "write_torch"]

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

Allow = Callable[[Scan, Path], "list[tuple[Callable[..., Any], str]]"]

_LOCK = threading.RLock()  # torch's list of allowed classes is one per process
_TRUST = "if you trust whoever made the file: trust_pickle=True (--trust-pickle)"


def read_torch(file: BinaryIO, path: Path, *, trust_pickle: bool = False, allow: Allow | None = None) -> Any:
    """The object in an open file that torch.save wrote; tensors on the CPU, shared storages still shared.

    Args:
        file: opened for reading, at its start.
        path: its name, for messages.
        trust_pickle: let the file's pickle run whatever it asks for.
        allow: given what the pickle names, further (object, dotted name) it may use without trust.

    Raises:
        InputError: damaged, or not a file torch.save wrote.
        UnsafeFileError: it needs more than tensors and plain containers, and `trust_pickle` is not given.
    """
    zipped = file.read(4) == ZIP_MAGIC
    file.seek(0)
    if zipped:
        seen = scan(io.BytesIO(check_archive(file, path)))
    else:
        seen = scan(file, LEGACY_PICKLES)
        file.seek(0)
    extra: list[tuple[Callable[..., Any], str]] = []
    if not trust_pickle:
        extra += allow(seen, path) if allow is not None else []
        refuse_pickle(path, seen, [name for _, name in extra], module_file=allow is not None)
    with _allowed(extra), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pickle protocols, deprecated storages: nothing the user can act on
        try:
            content = torch.load(file, map_location="cpu", weights_only=not trust_pickle)
        except Exception as error:  # torch lets every kind through: RuntimeError, EOFError, AttributeError, ...
            raise _load_error(path, error, seen, zipped, trust_pickle) from error
    refuse_stretched(content, path)
    return content


def write_torch(content: Any, file: BinaryIO, path: Path) -> None:
    """torch.save into an open file: the archive then carries no file name, so equal content is equal bytes.

    Raises OutputError when it cannot be written or holds what cannot be pickled.
    """
    sink = Sink(file)
    try:
        torch.save(content, sink)  # type: ignore[arg-type]
    except Exception as error:
        if sink.error is not None:  # torch reports a full disk as a bad position in its archive
            raise sink.error from error
        raise OutputError(f"{path}: cannot be saved ({printable(str(error).partition(chr(10))[0])})") from error


def refuse_pickle(path: Path, seen: Scan, extra: list[str], *, module_file: bool = False) -> None:
    """Raise UnsafeFileError when a pickle names anything beyond tensors, plain containers and `extra`."""
    unknown = seen.outside([*_known_to_torch(), *extra])
    if unknown:
        hint = _TRUST
        if module_file:
            hint = f"save its state_dict() instead and give arch='package.module:factory' (--arch), or, {_TRUST}"
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UnsafeFileError(f"{path}: refused, its pickle would run {printable(unknown[0])}{more}", hint=hint)


class Sink(io.RawIOBase):
    """A file for torch.save that remembers the operating system's own error."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None
        self.silent = False

    def close_silently(self) -> None:
        """Take what still comes and write none of it."""
        self.silent = True

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.silent:
            return len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        if not (self.closed or self.silent):
            self.file.flush()

    def close(self) -> None:
        """The file is another's: at the end of a sink, which a traceback may keep for long, it may be closed."""
        self.silent = True
        super().close()


@contextmanager
def _allowed(extra: Sequence[tuple[Callable[..., Any], str]]) -> Iterator[None]:
    """Extend torch's list of allowed classes, and leave it exactly as it was."""
    if not extra:
        yield
        return
    with _LOCK:
        before = torch.serialization.get_safe_globals()
        names = {name for _, name in extra}
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([*(item for item in before if _name_of(item) not in names), *extra])
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def _name_of(item: Any) -> str:
    """The name torch files an allowed object under."""
    return str(item[1]) if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}"


def _known_to_torch() -> set[str]:
    """Names torch.load(weights_only=True) takes: tensors, storages, types, OrderedDict, and what the process added."""
    from torch import _weights_only_unpickler as unpickler

    added = unpickler._get_user_allowed_globals()  # type: ignore[no-untyped-call]
    return {*unpickler._get_allowed_globals(), *added}


def _load_error(path: Path, error: Exception, seen: Scan, zipped: bool, trust_pickle: bool) -> Exception:
    reason = printable(str(error).strip().partition("\n")[0] or type(error).__name__)
    if trust_pickle:
        own = "save its state_dict(), and name what builds the model with --arch" if "__main__" in reason else None
        return InputError.of(path, f"cannot be unpickled ({type(error).__name__}: {reason})", own)
    if isinstance(error, pickle.UnpicklingError):
        if seen.protocol > 2 and seen.complete:
            return UnsafeFileError(
                f"{path}: refused, its pickle (protocol {seen.protocol}) needs the full unpickler",
                hint=f"save it again with torch.save and its default protocol, or, {_TRUST}",
            )
        if not zipped and any(name.startswith("torch.nn.modules.") for name in seen.names):
            return UnsafeFileError(
                f"{path}: refused, a whole module in the old file format, which holds source code", hint=_TRUST
            )
        if seen.complete and ("GLOBAL" in str(error) or "reduce" in str(error)):
            return UnsafeFileError(f"{path}: refused, its pickle calls what no checkpoint needs", hint=_TRUST)
        reason = "its pickle is not one that torch.save writes"
    return InputError.of(path, f"damaged or truncated ({reason})")
