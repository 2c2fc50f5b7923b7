"""The rows of a weight in several threads: those that torch itself runs its operations in.

torch's threads wait for their next work without leaving their processors. Threads of another kind would have to share
these with them, so the work goes to the OpenMP library that torch has loaded, by the function that compilers call for
a parallel region. Where there is no such library, it goes to a pool of Python's threads.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["address_of", "is_for_one", "on_all_rows", "thread_number_at"]

_SPREAD = 1 << 15  # elements for which another of torch's threads is worth its call
_PYTHONS = 1 << 17  # the same of Python's threads
_NUMBERS = 16  # to a job, before those of its shares
_FIRST = 7  # of them are not the kernel's
_PARTS = 4  # parts of the work for each thread, so that others can take some from one that is held up
_LIBRARIES = ("libgomp", "libiomp5", "libomp")
_PROCESS = os.getpid()


def is_for_one(elements: int) -> bool:
    """Whether a weight of so many elements is too small to be the work of several threads."""
    return elements < 2 * _SPREAD


def on_all_rows(kernels: Any, elements: int, rows: int, name: str, *numbers: int) -> bool:
    """Run a kernel of `fused_kernels` or another module of kernels on all rows of a weight, stretches of them, tiles or
    lines of a table of weights, in as many threads as torch has where it pays; whether no part says False. `numbers`
    are what it takes before the first and the last.
    """
    kernel = getattr(kernels, name)
    if is_for_one(elements) or (threads := torch.get_num_threads()) == 1:
        return kernel(*numbers, 0, rows) is not False
    library = _openmp(os.getpid())
    pieces = 1 if library is None or name.startswith("columns") else _PARTS  # strips of columns are narrow enough
    parts = min(pieces * threads, elements // (_PYTHONS if library is None else _SPREAD), rows)
    if parts < 2:
        return kernel(*numbers, 0, rows) is not False
    if library is not None:
        shares = min(threads, parts)
        unused = [0] * (_NUMBERS - _FIRST - len(numbers))
        told = 0, library.number_of_thread, shares, parts // shares, 0, kernels.JOBS[name], rows
        job = array("q", [*told, *numbers, *unused, *[0] * shares])
        at, _ = job.buffer_info()
        job[0] = at + 8 * _NUMBERS
        kernels.in_parallel(library.parallel, _worker(kernels).address, at, threads)
        return not job[4]
    bounds = [rows * i // parts for i in range(parts + 1)]
    waiting = [_pool(os.getpid(), parts - 1).submit(kernel, *numbers, *pair) for pair in pairwise(bounds[1:])]
    found = [kernel(*numbers, 0, bounds[1]), *(one.result() for one in waiting)]
    return all(one is not False for one in found)


def thread_number_at() -> int | None:
    """Where a thread that runs a kernel can ask which of torch's threads it is; None where they are Python's."""
    library = _openmp(os.getpid())
    return None if library is None else library.number_of_thread


class _OpenMP(NamedTuple):
    """Where an OpenMP library takes work, and where it tells a thread which it is."""

    parallel: int
    number_of_thread: int


@lru_cache(maxsize=4)
def _openmp(process: int) -> _OpenMP | None:
    """The OpenMP library of torch; None where there is none, or its threads did not survive a fork."""
    if process != _PROCESS or "OpenMP" not in torch.__config__.parallel_info() or not hasattr(os, "RTLD_NOLOAD"):
        return None
    home = Path(torch.__file__).parent
    places = (home / "lib", home.with_name("torch.libs"))
    own = [str(path) for place in places for name in _LIBRARIES for path in sorted(place.glob(f"{name}[.-]*"))]
    for path in own or ("libgomp.so.1", "libiomp5.so"):  # the system's, where torch comes without one
        try:
            library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD)
            return _OpenMP(address_of(library.GOMP_parallel), address_of(library.omp_get_thread_num))
        except (OSError, AttributeError):
            continue
    return None


def address_of(function: Any) -> int:
    """Where a function of a loaded library lies."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@cache
def _worker(kernels: Any) -> Any:
    return kernels.worker()


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process; a fork has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="wnsurgery")
