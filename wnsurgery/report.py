"""What a person or a program reads: results as text or JSON, messages on stderr, strings from files escaped."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import click

__all__ = ["counting", "discard", "escape", "quiet", "say", "show", "speak", "to_jsonable", "verbose", "working"]


def escape(text: str) -> str:
    """A string on one line, with control characters and terminal escapes made visible.

    >>> escape("a\\x1b[31m\\nb")
    'a\\\\x1b[31m\\\\nb'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """A message for the person at the terminal, on stderr; a stderr that takes none changes nothing else."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def discard(stream: Any) -> None:
    """Let what is still to come on a stream go nowhere, the interpreter's own last flush included."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def speak(manner: str) -> Callable[[click.Context, Any, bool], None]:
    """What an option does that sets how much is said, wherever it stands on the line."""

    def note(context: click.Context, _: Any, value: bool) -> None:
        if not value or context.meta.get(f"wnsurgery.{manner}"):
            return
        context.meta[f"wnsurgery.{manner}"] = True
        if manner == "verbose":
            context.find_root().call_on_close(partial(_say_cost, time.perf_counter()))

    return note


def _say_cost(started: float) -> None:
    """With what the work was done, how long it took and how much memory it had at the most."""
    modules = ("wnsurgery", "torch", "onnx", "onnxruntime")
    parts = [f"Python {sys.version.split()[0]}"]
    parts += [
        f"{name} {sys.modules[name].__version__}" for name in modules if hasattr(sys.modules.get(name), "__version__")
    ]
    parts.append(f"{time.perf_counter() - started:.1f} s")
    with suppress(ImportError):  # Windows does not tell
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        parts.append(f"at most {peak / 1e6:.0f} MB of memory")
    say(f"wnsurgery: {', '.join(parts)}")


def quiet() -> bool:
    """Whether nothing but errors is to be said."""
    return _manner("quiet")


def verbose() -> bool:
    """Whether everything is to be said."""
    return _manner("verbose") and not quiet()


def _manner(manner: str) -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(f"wnsurgery.{manner}"))


def _is_terminal() -> bool:
    """Whether stderr can show something that moves."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not quiet()


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner on stderr while something takes its time; nothing where stderr is no terminal."""
    if not _is_terminal():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(escape(what), spinner="line"):
        yield


@contextmanager
def counting(what: str, *, data: bool = False) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr, to be told (done, in all); None where stderr is no terminal. `data`: they are bytes."""
    if not _is_terminal():
        yield None
        return
    from rich import progress as rich
    from rich.console import Console
    from rich.progress import Progress

    columns: Any = Progress.get_default_columns()
    if data:
        columns = [rich.TextColumn("{task.description}"), rich.BarColumn(), rich.DownloadColumn()]
        columns += [rich.TransferSpeedColumn(), rich.TextColumn("left:"), rich.TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(what).replace("[", "\\["), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def show(result: Any, *, as_json: bool) -> None:
    """A result on stdout: JSON on one line if asked for, else what `str(result)` prints, if anything is to be said."""
    if quiet() and not as_json:
        return
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
