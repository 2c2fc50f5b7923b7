"""While code of others runs: nothing that it prints, logs or warns of gets out."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

__all__ = ["silenced"]

_OF_EXPORTERS = ("torch", "onnxscript", "onnx_ir")


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """No print, warning or log line of torch, its exporters or a model reaches the caller, from Python or from C++.

    Warnings that are errors elsewhere are none here. It is quiet for all threads until the last of those that asked for
    it is done: file descriptors 1 and 2 lead nowhere meanwhile.

    >>> with silenced():
    ...     print("unheard")
    """
    _quiet.enter()
    try:
        yield
    finally:
        _quiet.leave()


class _Quiet:
    """The silence of a process, however many threads and calls within calls ask for it."""

    def __init__(self) -> None:
        self._lock, self._asked = threading.Lock(), 0
        self._end = contextlib.ExitStack()

    def enter(self) -> None:
        with self._lock:
            if not self._asked:
                with contextlib.ExitStack() as stack:
                    stack.enter_context(_all_quiet())
                    self._end = stack.pop_all()
            self._asked += 1

    def leave(self) -> None:
        with self._lock:
            self._asked -= 1
            if not self._asked:
                self._end.close()


_quiet = _Quiet()


class _Nowhere(io.RawIOBase):
    """What is written is dropped; it has the descriptor of the stream in whose place it stands."""

    def __init__(self, number: int) -> None:
        self._number = number

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return memoryview(data).nbytes

    def fileno(self) -> int:
        return self._number


def _stream_to_nowhere(number: int) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(_Nowhere(number)), "utf-8", "replace")


@contextlib.contextmanager
def _all_quiet() -> Iterator[None]:
    def drop(record: logging.LogRecord) -> bool:
        return not record.name.startswith(_OF_EXPORTERS)

    loggers = (logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith("torch"))
    handlers: list[logging.Handler] = [handler for logger in loggers for handler in logger.handlers]
    handlers += [logging.lastResort] if logging.lastResort is not None else []
    for handler in handlers:
        handler.addFilter(drop)
    try:
        redirected = (
            contextlib.redirect_stdout(_stream_to_nowhere(1)),
            contextlib.redirect_stderr(_stream_to_nowhere(2)),
        )
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
    streams = sys.stdout, sys.stderr
    _flush(*streams)
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
        _flush(*streams)
        for number, before in kept.items():
            os.dup2(before, number)
            os.close(before)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _flush(*streams: Any) -> None:
    """What was written so far goes where it leads now."""
    for stream in streams:
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):  # a pipe that nobody reads, a closed stream
                stream.flush()
    _flush_c()


def _flush_c() -> None:
    import ctypes

    with contextlib.suppress(OSError, TypeError, AttributeError, ValueError):  # a system without such a library for all
        library = ctypes.CDLL(None)
        for name in ("stdout", "stderr"):  # and not stdin, for which another thread may be waiting
            library.fflush(ctypes.c_void_p.in_dll(library, name))
