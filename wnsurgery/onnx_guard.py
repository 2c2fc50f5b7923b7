"""Try a graph from outside in a process of its own, with limits on time and memory, before this one opens it.

A few kilobytes of ONNX can keep the checker or onnxruntime busy for years (functions that call each other twice), fill
the memory (constants that expand) or crash the process (graphs nested too deep).
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from wnsurgery.errors import InputError

__all__ = ["GraphLimits", "try_graph"]

_GIB = 1 << 30
_TOO_BIG, _REFUSED = 9, 3

_CHILD = """
import sys
sys.path[:] = sys.argv[4:]
what, path, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
except (ImportError, ValueError, OSError):
    pass
try:
    import onnx, onnxruntime
except BaseException:
    sys.exit(9)
try:
    if what == "check":
        onnx.checker.check_model(path)
    else:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
except MemoryError:
    sys.exit(9)
except Exception as error:
    sys.exit(9 if "alloc" in str(error).lower() else 3)
"""


@dataclass(frozen=True)
class GraphLimits:
    """What a graph from outside may take until it is ready to run.

    Attributes:
        seconds: of wall-clock time.
        memory: bytes of address space, on top of four times the size of the file and its weights.

    >>> limits = wn.GraphLimits(seconds=10, memory=1 << 30)
    >>> session = wn.open_session("from_elsewhere.onnx", limits=limits)  # doctest: +SKIP
    """

    seconds: float = 120.0
    memory: int = 6 * _GIB


def try_graph(
    path: str | os.PathLike[str], *, weights: int = 0, limits: GraphLimits | None = None, check: bool = False
) -> bool:
    """Open a graph in onnxruntime, on the CPU, in a child process; with `check`, run onnx's checker there instead.

    >>> try_graph("model.onnx")  # doctest: +SKIP
    True

    Args:
        path: ONNX file.
        weights: bytes of weights in files beside it.
        limits: of time and memory.

    Returns whether it was accepted; one that is refused in an orderly way will be here as well.

    Raises InputError when it takes too long or too much memory, or crashes the child.
    """
    limits = limits or GraphLimits()
    size = Path(path).stat().st_size + weights
    what = "onnx's checker" if check else "onnxruntime"
    command = [sys.executable, "-c", _CHILD, "check" if check else "session", os.fspath(path)]
    command += [str(limits.memory + 4 * size), *(p for p in sys.path if p)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=limits.seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InputError.of(path, f"{what} is not ready with it after {limits.seconds:g} s; refused") from None
    if done.returncode == _TOO_BIG:
        raise InputError.of(path, f"{what} needs more than {limits.memory / _GIB:.3g} GiB to open it; refused")
    if done.returncode not in (0, _REFUSED):
        raise InputError.of(path, f"{what} crashes on it (exit code {done.returncode}); refused")
    return done.returncode == 0
