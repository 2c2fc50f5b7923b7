"""Every exception of the package, each knowing its exit code and building its message from facts.

WnsurgeryError
├── SelectionError (ValueError)          2  a selection or option that fits nothing in the model
├── NonFiniteWeightError (ValueError)    3  a weight to convert holds NaN or infinity
├── ModeError (RuntimeError)             2  asked of deferred mode what only the default mode gives
├── PairError (ValueError)               3  (g, v) orphaned, swapped, misshapen, or mixed with something else
├── InputError (ValueError)              3  a file that is damaged, unsupported or ambiguous
│   └── InputMissingError (FileNotFoundError)
├── ExportError (RuntimeError)           3  the exporter could not turn the module into a graph
├── UnsafeFileError (ValueError)         4  the file would have to run code, or leaves its directory
├── OutputError (OSError)                5  the output could not be written; the old one is intact
│   └── OutputExistsError (FileExistsError)
├── ProviderError (RuntimeError)         6  the device or execution provider asked for is not there
├── MissingPackageError (ImportError)    6  an optional package is not installed
└── VerificationError (AssertionError)   7  two artefacts differ
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterable
from difflib import get_close_matches
from os import PathLike
from pathlib import Path

__all__ = [
    "ExportError",
    "InputError",
    "InputMissingError",
    "MissingPackageError",
    "ModeError",
    "NonFiniteWeightError",
    "OutputError",
    "OutputExistsError",
    "PairError",
    "ProviderError",
    "SelectionError",
    "UnsafeFileError",
    "VerificationError",
    "WnsurgeryError",
    "first_line",
    "printable",
]

_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def printable(text: object, limit: int = 200) -> str:
    """A string that came from a file, made safe for a terminal: escapes spelled out, length bounded.

    >>> printable("conv\\x1b[2J")
    'conv\\\\x1b[2J'
    """
    start = str(text)[: limit + 1]
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in start)
    return shown if len(shown) <= limit else f"{shown[:limit]}..."


def first_line(error: BaseException) -> str:
    """The innermost cause of an error in one line, without colours.

    >>> first_line(RuntimeError("size mismatch\\nat line 3"))
    'RuntimeError: size mismatch'
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in _ANSI.sub("", str(error)).splitlines() if line.strip()]
    return printable(f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__, 300)


class WnsurgeryError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the command ends with, `hint` what to do."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class SelectionError(WnsurgeryError, ValueError):
    """A selection or option that fits nothing in the model."""

    exit_code = 2

    @classmethod
    def no_match(
        cls, option: str, wanted: str, names: Iterable[str], what: str = "weight of the model"
    ) -> SelectionError:
        """`include`/`exclude`/`dim` named something that is not there: list the nearest names that are."""
        known = list(dict.fromkeys(names))  # each once: both halves of a pair go by the name of their weight
        near = get_close_matches(wanted.strip("*."), known, n=5, cutoff=0.4) or known[:5]
        shown = ", ".join(near) if near else "none: the model has no tensors of 2 or more dimensions"
        return cls(f"{option}={wanted!r} matches no {what}", hint=f"near names: {shown}")


class NonFiniteWeightError(WnsurgeryError, ValueError):
    """A weight to convert holds NaN or infinity, which weight norm would spread over the whole row."""

    exit_code = 3


class ModeError(WnsurgeryError, RuntimeError):
    """Asked of a weight in deferred mode what only the default mode gives: second derivatives, hooks on g and v,
    an optimizer within the backward pass."""

    exit_code = 2


class PairError(WnsurgeryError, ValueError):
    """A (g, v) pair that is orphaned, swapped, misshapen or mixed with something else."""

    exit_code = 3


class InputError(WnsurgeryError, ValueError):
    """An input file that is damaged, unsupported or ambiguous."""

    exit_code = 3

    @classmethod
    def of(cls, path: str | PathLike[str], reason: str, hint: str | None = None) -> InputError:
        return cls(f"{path}: {reason}", hint=hint)


class InputMissingError(InputError, FileNotFoundError):
    """The input path does not exist."""

    @classmethod
    def at(cls, path: PathLike[str] | str) -> InputMissingError:
        """That nothing is at a path: a link that leads nowhere, or the names most like it in its directory."""
        where = Path(path)
        if (broken := _broken_link(where)) is not None:
            return cls(f"{path}: {broken}")
        near: list[str] = []
        with contextlib.suppress(OSError, ValueError):
            near = get_close_matches(where.name, [other.name for other in where.parent.iterdir()], n=3)
        hint = f"near names: {', '.join(printable(where.with_name(name)) for name in near)}" if near else None
        return cls(f"{path}: no such file", hint=hint)


_BROKEN = {errno.ENOENT: "a link to nothing", errno.ELOOP: "a loop of links"}


def _broken_link(path: Path) -> str | None:
    """What is wrong with the first link on the way to a path that leads nowhere; None where there is none."""
    for step in (*reversed(path.parents), path):
        try:
            if step.is_symlink():
                step.stat()
        except (OSError, ValueError) as error:
            kind = _BROKEN.get(getattr(error, "errno", None) or 0)
            return kind and f"{kind} ({printable(step)} leads to {printable(step.readlink())})"
    return None


class ExportError(WnsurgeryError, RuntimeError):
    """The exporter could not turn the module into an ONNX graph."""

    exit_code = 3


class UnsafeFileError(WnsurgeryError, ValueError):
    """Refused: reading the file would run code from it, or leave its directory."""

    exit_code = 4


class OutputError(WnsurgeryError, OSError):
    """The output could not be written; what stood there before is intact."""

    exit_code = 5


class OutputExistsError(OutputError, FileExistsError):
    """The output is already there and overwriting was not asked for."""


class ProviderError(WnsurgeryError, RuntimeError):
    """The device or onnxruntime execution provider asked for is not available."""

    exit_code = 6


class MissingPackageError(WnsurgeryError, ImportError):
    """An optional package is needed and not installed."""

    exit_code = 6


class VerificationError(WnsurgeryError, AssertionError):
    """Two artefacts that should agree do not."""

    exit_code = 7
