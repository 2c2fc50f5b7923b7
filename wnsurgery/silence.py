"""While code of others runs: nothing that it prints, logs or warns of gets out."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

__all__ = ["silenced"]

_OF_EXPORTERS = ("torch", "onnxscript", "onnx_ir")


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """No print, warning or log line of torch, its exporters or a model reaches the caller, from Python or from C++.

    Warnings that are errors elsewhere are none here. File descriptors 1 and 2 lead nowhere meanwhile, for all threads.

    >>> with silenced():
    ...     print("unheard")
    """

    def drop(record: logging.LogRecord) -> bool:
        return not record.name.startswith(_OF_EXPORTERS)

    loggers = (logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith("torch"))
    handlers: list[logging.Handler] = [handler for logger in loggers for handler in logger.handlers]
    handlers += [logging.lastResort] if logging.lastResort is not None else []
    for handler in handlers:
        handler.addFilter(drop)
    try:
        nowhere = io.StringIO()
        redirected = contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere)
        with _descriptors_lead_nowhere(), warnings.catch_warnings(), redirected[0], redirected[1]:
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(drop)


@contextlib.contextmanager
def _descriptors_lead_nowhere() -> Iterator[None]:
    """What C and C++ write to stdout and stderr is dropped; those that are closed stay closed."""
    there = [number for number in (1, 2) if _is_open(number)]
    _flush()
    kept: dict[int, int] = {}
    try:
        with contextlib.suppress(OSError):  # no descriptor left, or no null device: then it is heard
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                for number in there:
                    kept[number] = os.dup(number)
                    os.dup2(nowhere, number)
            finally:
                os.close(nowhere)
        yield
    finally:
        _flush_c()
        for number, before in kept.items():
            os.dup2(before, number)
            os.close(before)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _flush() -> None:
    """What was written before goes where it was meant to."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):  # a pipe that nobody reads, a closed stream
                stream.flush()
    _flush_c()


def _flush_c() -> None:
    import ctypes

    with contextlib.suppress(OSError, TypeError, AttributeError):  # a system without such a library for all
        ctypes.CDLL(None).fflush(None)
