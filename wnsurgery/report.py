"""What a person or a program reads: results as text or JSON, messages on stderr, strings from files escaped."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["counting", "escape", "say", "show", "to_jsonable", "working"]


def escape(text: str) -> str:
    """A string on one line, with control characters and terminal escapes made visible.

    >>> escape("a\\x1b[31m\\nb")
    'a\\\\x1b[31m\\\\nb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """A message for the person at the terminal, on stderr."""
    print(text, file=sys.stderr)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on stderr while something takes its time; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(escape(what), spinner="line"):
        yield


@contextmanager
def counting(what: str, *, data: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr, to be told (done, in all); None where stderr is no terminal. `data`: they are bytes."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns: Any = Progress.get_default_columns()
    if data:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(what).replace("[", "\\["), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show(result: Any, *, as_json: bool) -> None:
    """A result on stdout: JSON on one line if asked for, else what `str(result)` prints."""
    if as_json:
        text = json.dumps(to_jsonable(result), ensure_ascii=True, allow_nan=False)
    else:
        text = "\n".join(escape(line) for line in str(result).split("\n"))
    print(text)
    sys.stdout.flush()  # a full disk is to be told here, not after the exit code is settled


def to_jsonable(value: Any) -> Any:
    """Dataclasses, mappings, sequences and scalars as what `json` can write; NaN and infinities as strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        custom = getattr(value, "to_json", None)
        if callable(custom):
            return to_jsonable(custom())
        return {f.name: to_jsonable(getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr}
    if isinstance(value, Mapping):
        return {str(k): to_jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_jsonable(v) for v in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)
