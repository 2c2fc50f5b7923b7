"""What a net costs where it is deployed: plain and weight-normed in torch, compiled, and in onnxruntime.

print(bench_deployment(model, torch.randn(1, 80, 100)))
"""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from wnsurgery.benchmark import interleaved, torch_weight_norm
from wnsurgery.errors import ExportError, InputError, MissingPackageError, ProviderError, VerificationError, first_line
from wnsurgery.export import export_onnx, export_unfolded, feeds_of
from wnsurgery.parity import open_session, run_session
from wnsurgery.runs import Case, Inputs, rng_kept
from wnsurgery.surgery import fold_weight_norm
from wnsurgery.text import columns

__all__ = ["DeploymentReport", "DeploymentRow", "bench_deployment"]

_STARTS = 3  # sessions are opened this often


@dataclass(frozen=True)
class DeploymentRow:
    """One way to run the net on one device.

    Attributes:
        variant: "torch plain", "torch weight norm", "torch.compile", "onnxruntime folded" or "onnxruntime unfolded".
        device: "cpu" or "cuda".
        milliseconds, low, high: median of one run and its quartiles; None where it could not be run.
        ratio: median over the rounds of its time by that of "torch plain" on the same device.
        start: seconds until it is ready: opening a session (median), or compiling (first call); None where it is.
        file_bytes: size of the file, its external weights included.
        peak_bytes: the most memory it took above what the process held before: on the CPU what the kernel counts, with
            the parameters for torch; on a GPU what torch allocated. None where it cannot be told.
        note: why it was not measured; "" where it was.
    """

    variant: str
    device: str
    milliseconds: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    start: float | None = None
    file_bytes: int | None = None
    peak_bytes: int | None = None
    note: str = ""


@dataclass(frozen=True)
class DeploymentReport:
    """Every way to run a net, measured in turns; prints as a table."""

    rows: tuple[DeploymentRow, ...]
    repeats: int
    threads: int

    def __str__(self) -> str:
        table = [("variant", "device", "ms", "quartiles", "x plain", "start s", "file MB", "peak MB")]
        for r in self.rows:
            spread = "-" if r.low is None else f"{r.low:.3f} .. {r.high:.3f}"
            cells = (_number(r.milliseconds, 3), spread, _number(r.ratio, 3), _number(r.start, 3))
            table.append((r.variant, r.device, *cells, _megabytes(r.file_bytes), _megabytes(r.peak_bytes)))
        lines = [line.removeprefix("  ") for line in columns(table)]
        lines += [f"{r.variant} ({r.device}): {r.note}" for r in self.rows if r.note]
        return "\n".join([*lines, f"{self.repeats} interleaved rounds, {self.threads} threads"])


def bench_deployment(model: nn.Module, inputs: Inputs, *, repeats: int = 20, compiled: bool = True) -> DeploymentReport:
    """Time a net in evaluation plain, under torch's weight norm, compiled, and in onnxruntime folded and unfolded.

    The model is copied. All ways take turns in every round, so that a busy machine slows all alike. "unfolded" is the
    graph as exporters write it with weight norm on. On a machine with CUDA, torch is measured there too, and so is
    onnxruntime if it has the provider.

    >>> report = wn.bench_deployment(nn.Linear(8, 8), torch.randn(4, 8), repeats=3, compiled=False)
    >>> [row.variant for row in report.rows]
    ['torch plain', 'torch weight norm', 'onnxruntime folded', 'onnxruntime unfolded']

    Args:
        model: any module the default selection finds a weight in.
        inputs: a tensor, a sequence of positional or a mapping of keyword arguments.
        repeats: rounds; medians and quartiles are over these.
        compiled: measure `torch.compile`, whose first call takes its time.

    Raises ExportError when the net does not run on these inputs.
    """
    rows: list[DeploymentRow] = []
    case = Case.of(inputs, model)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), rng_kept(model):
        plain = fold_weight_norm(copy.deepcopy(model)).eval().cpu()
        normed = torch_weight_norm(copy.deepcopy(plain)).eval()
        case.run(plain)
        files = _files(plain, normed, inputs, Path(folder), rows)
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            rows += _on(device, plain, normed, case, files, repeats, compiled)
    return DeploymentReport(tuple(rows), repeats, torch.get_num_threads())


def _files(
    plain: nn.Module, normed: nn.Module, inputs: Inputs, folder: Path, rows: list[DeploymentRow]
) -> dict[str, Path]:
    files = {}
    for variant, write in (
        ("onnxruntime folded", lambda path: export_onnx(plain, inputs, path)),
        ("onnxruntime unfolded", lambda path: export_unfolded(normed, inputs, path)),
    ):
        path = folder / f"{variant.split()[1]}.onnx"
        try:
            write(path)
            files[variant] = path
        except (ExportError, VerificationError) as error:
            rows.append(DeploymentRow(variant, "cpu", note=error.message))
    return files


def _on(
    device: str,
    plain: nn.Module,
    normed: nn.Module,
    case: Case,
    files: Mapping[str, Path],
    repeats: int,
    compiled: bool,
) -> list[DeploymentRow]:
    """All variants on one device, timed in turns."""
    rows: dict[str, DeploymentRow] = {}
    steps: dict[str, _Step] = {}
    on_device = Case(*pytree.tree_map_only(Tensor, lambda x: x.to(device), (case.args, case.kwargs)))
    nets = {"torch plain": copy.deepcopy(plain).to(device), "torch weight norm": copy.deepcopy(normed).to(device)}
    if compiled:
        nets["torch.compile"] = copy.deepcopy(nets["torch plain"])
    for variant, net in nets.items():
        row, step = _torch_variant(variant, device, net, on_device)
        rows[variant] = row
        if step is not None:
            steps[variant] = step
    for variant, path in files.items():
        row, step = _session_variant(variant, device, path, case, plain)
        rows[variant] = row
        if step is not None:
            steps[variant] = step
    samples = interleaved(steps, repeats)
    for variant, times in samples.items():
        low, middle, high = (1e3 * t for t in statistics.quantiles(times, n=4, method="inclusive"))
        ratio = statistics.median(t / p for t, p in zip(times, samples["torch plain"], strict=True))
        rows[variant] = replace(rows[variant], milliseconds=middle, low=low, high=high, ratio=ratio)
    return list(rows.values())


_Step = Callable[[], None]


def _torch_variant(variant: str, device: str, net: nn.Module, case: Case) -> tuple[DeploymentRow, _Step | None]:
    run: Any = torch.compile(net) if variant == "torch.compile" else net

    def step() -> None:
        run(*case.args, **case.kwargs)
        if device == "cuda":
            torch.cuda.synchronize()

    row = DeploymentRow(variant, device)
    try:
        with _peak(device) as peak:
            started = time.perf_counter()
            step()
            seconds = time.perf_counter() - started
    except Exception as error:
        # a compiler that is not installed, operations it cannot do: whatever it is, this way cannot be measured
        return replace(row, note=first_line(error)), None
    held = sum(t.nbytes for t in (*net.parameters(), *net.buffers())) if device == "cpu" else 0
    risen = peak()
    row = replace(row, peak_bytes=None if risen is None else risen + held)
    return (replace(row, start=seconds) if variant == "torch.compile" else row), step


def _session_variant(
    variant: str, device: str, path: Path, case: Case, model: nn.Module
) -> tuple[DeploymentRow, _Step | None]:
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    row = DeploymentRow(variant, device, file_bytes=size)
    starts = []
    try:
        with _peak("cpu") as peak:
            session = open_session(path, device, trusted=True)
            feeds = feeds_of(session, case, model)
            run_session(session, feeds, path)
        for _ in range(_STARTS):
            started = time.perf_counter()
            open_session(path, device, trusted=True)
            starts.append(time.perf_counter() - started)
    except (ProviderError, MissingPackageError, InputError) as error:
        return replace(row, note=error.message), None
    memory = peak() if device == "cpu" else None
    row = replace(row, start=statistics.median(starts), peak_bytes=memory)
    return row, lambda: _discard(run_session(session, feeds, path))


def _discard(_: Any) -> None:
    pass


@contextlib.contextmanager
def _peak(device: str) -> Iterator[Callable[[], int | None]]:
    """How far memory rises within the block; what it gives is asked afterwards."""
    gc.collect()
    found: list[int | None] = [None]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield lambda: found[0]
        found[0] = int(torch.cuda.max_memory_allocated())
        return
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # lets the high-water mark start again
        before = _kilobytes(status, "VmRSS")
    except (OSError, LookupError):
        before = None
    yield lambda: found[0]
    if before is not None:
        found[0] = max(0, _kilobytes(status, "VmHWM") - before) * 1024


def _kilobytes(status: Path, name: str) -> int:
    for line in status.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise LookupError(name)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.2f}"
