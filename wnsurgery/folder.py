"""Run an ONNX file over a folder of inputs: read, batched, run and written one batch at a time."""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wnsurgery.declared import Declared
from wnsurgery.differences import as_array
from wnsurgery.errors import InputError, InputMissingError, OutputError, OutputExistsError, SelectionError, printable
from wnsurgery.inout import read_arrays, write_arrays
from wnsurgery.onnx_file import weights_read_by
from wnsurgery.parity import open_session, run_session
from wnsurgery.stores.commit import refuse_inputs

__all__ = ["FolderReport", "run_folder"]

Path_ = str | os.PathLike[str]
Array = np.ndarray[Any, Any]

_FIXED = "its first axis is fixed: run with batch=1 (--batch 1), or export with dynamic=True (--dynamic)"


@dataclass(frozen=True)
class FolderReport:
    """What `run_folder` did; prints as a few lines.

    Attributes:
        files: the outputs, in the order of the inputs.
        runs: how often the graph ran.
        provider: what onnxruntime ran it on.
        milliseconds, low, high: of one run: median and quartiles.
    """

    files: tuple[Path, ...]
    runs: int
    provider: str
    milliseconds: float
    low: float
    high: float

    def __str__(self) -> str:
        spread = f"{self.milliseconds:.3f} ms each ({self.low:.3f} .. {self.high:.3f})"
        return f"wrote {len(self.files)} files to {self.files[0].parent}\n{self.runs} runs on {self.provider}, {spread}"


def run_folder(
    model: Path_,
    source: Path_,
    target: Path_,
    *,
    provider: str = "cpu",
    batch: int = 1,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> FolderReport:
    """Run a graph on every .npz and .npy of a folder; outputs go to another folder under the same names.

    `batch` neighbours of the same shapes are joined along their first axis, run at once and taken apart again, so the
    graph's first axes must be open, and its outputs must have the joined axis first. Inputs that are all scalars have
    no axis to join and run alone.

    >>> wn.run_folder("model.onnx", "inputs", "outputs", batch=8).runs  # doctest: +SKIP
    13

    Args:
        model: ONNX file.
        source: folder of inputs, each file holding the inputs of one run.
        target: folder for the outputs, as .npz; made if it is missing.
        provider: see `open_session`.
        batch: files per run at most.
        force: overwrite existing outputs.
        progress: called with (files done, files in all).

    Where a file fails, the outputs written before it go again, unless `force` let them replace others.

    Raises as `run_onnx`; InputMissingError without inputs; OutputExistsError, before anything runs, where an output
    exists.
    """
    if batch < 1:
        raise SelectionError(f"batch={batch}: at least one file per run")
    paths = sorted(p for p in _folder(source).iterdir() if p.suffix.lower() in (".npz", ".npy") and p.is_file())
    if not paths:
        raise InputMissingError(f"{source}: no .npz or .npy file in it")
    named = Counter(path.stem for path in paths)
    outputs = [_output(Path(target), path, force, twins=named[path.stem] > 1) for path in paths]
    there = [output for output in outputs if output.exists()]
    read = [model, *weights_read_by(model)] if there else []
    for output in there:
        refuse_inputs(output, *read)
    session = open_session(model, provider)
    times: list[float] = []
    with _target(Path(target), keep=force) as written:
        for group in _groups(paths, batch):
            started = time.perf_counter()
            found = _run(session, [arrays for _, arrays in group], model)
            times.append(1e3 * (time.perf_counter() - started))
            for result in found:
                write_arrays(outputs[len(written)], result, force=force)
                written.append(outputs[len(written)])
            if progress is not None:
                progress(len(written), len(paths))
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return FolderReport(tuple(outputs), len(times), session.get_providers()[0], middle, low, high)


@contextmanager
def _target(target: Path, *, keep: bool) -> Iterator[list[Path]]:
    """The folder for the outputs, and a list to note them in: after a failure none stays unless told."""
    there, written = target.exists(), list[Path]()
    try:
        target.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target}: {error.strerror}") from error
    try:
        yield written
    except BaseException:
        with suppress(OSError):
            for path in () if keep else written:
                path.unlink()
            if not there:
                target.rmdir()
        raise


def _folder(source: Path_) -> Path:
    path = Path(source)
    if not path.is_dir():
        raise InputMissingError(f"{path}: no such folder")
    return path


def _output(target: Path, path: Path, force: bool, *, twins: bool) -> Path:
    output = target / f"{path.stem}.npz"
    if twins:
        raise InputError.of(path, "another input has the same name, and would have the same output")
    if path.parent.resolve() == target.resolve():
        raise SelectionError(f"{target}: inputs and outputs need folders of their own")
    if output.exists() and not force:
        raise OutputExistsError(f"{output}: already exists", hint="force=True (--force) replaces it")
    return output


def _groups(paths: Sequence[Path], batch: int) -> Iterator[list[tuple[Path, Any]]]:
    """Neighbours with inputs of the same names, types and sizes beyond the first axis; one without axes is alone."""
    group: list[tuple[Path, Any]] = []
    for path in paths:
        arrays = read_arrays(path)
        joins = any(np.ndim(array) for array in (arrays.values() if isinstance(arrays, dict) else arrays))
        if group and (len(group) == batch or not joins or _kinds(arrays) != _kinds(group[0][1])):
            yield group
            group = []
        group.append((path, arrays))
    yield group


def _kinds(arrays: Any) -> list[Any]:
    named = arrays.items() if isinstance(arrays, dict) else enumerate(arrays)
    # a scalar cannot be joined, so it must be the same for all
    return [(name, a.dtype, a.shape[1:] if a.ndim else a.item()) for name, a in ((n, as_array(x)) for n, x in named)]


def _run(session: Any, group: list[Any], model: Path_) -> list[dict[str, Array]]:
    """Outputs for each member of a group that is run at once."""
    if len(group) == 1:
        return [run_session(session, group[0], model)]
    first = group[0]
    keys = list(first) if isinstance(first, dict) else range(len(first))
    joined = [_joined([member[key] for member in group]) for key in keys]
    sizes = {tuple(len(member[key]) for key in keys if member[key].ndim) for member in group}
    rows = [next(len(member[key]) for key in keys if member[key].ndim) for member in group]
    if any(len(set(size)) > 1 for size in sizes):
        raise InputError.of(model, "inputs of several first axes cannot be batched", hint="run with batch=1")
    inputs = dict(zip(keys, joined, strict=True)) if isinstance(first, dict) else joined
    try:
        found = run_session(session, inputs, model)
    except InputError as error:
        if any(_has_other_batch(declared, sum(rows)) for declared in Declared.needed(session)):
            raise InputError(error.message, hint=_FIXED) from error
        raise
    for name, value in found.items():
        if not value.ndim or len(value) != sum(rows):
            raise InputError.of(model, f"{printable(name)} does not have the batch first", hint="run with batch=1")
    ends = np.cumsum(rows)[:-1]
    parts = {name: np.split(value, ends) for name, value in found.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(group))]


def _has_other_batch(declared: Declared, size: int) -> bool:
    """Whether the first axis of an input is fixed, to another size than this."""
    first = declared.shape[0] if declared.shape else None
    return isinstance(first, int) and first != size


def _joined(arrays: list[Array]) -> Array:
    return np.concatenate(arrays) if arrays[0].ndim else arrays[0]
