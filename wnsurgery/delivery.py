"""The end of a file operation: warnings, the output, its manifest, and the figures of the report."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wnsurgery import __version__
from wnsurgery.checkpoint import AtOnce, CheckpointReport
from wnsurgery.errors import InputError, InputMissingError, SelectionError, VerificationError, printable
from wnsurgery.manifest import manifest_text
from wnsurgery.promises import Promises
from wnsurgery.proof import Proof
from wnsurgery.ranks import Ranks
from wnsurgery.states import every_tensor, flat_tensors
from wnsurgery.stores import Stored, check_output, committed, format_for, is_file_name, map_store, write_store
from wnsurgery.stores.commit import refuse_inputs
from wnsurgery.stores.mapped import byte_span
from wnsurgery.stores.modules import modules_in
from wnsurgery.stores.staging import check_output_directory

__all__ = ["Output", "deliver", "every_name", "figures", "watch"]

Path_ = str | os.PathLike[str]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Output:
    """Where a file operation writes, and how.

    Attributes:
        path: the output.
        operation: "fold" or "convert".
        force, in_place: what may be replaced.
        write: False for a dry run.
        strict: whether warnings are errors.
        manifest: where to write the manifest.
        resume: go on where a killed run left a directory.
        progress: told (bytes done, bytes in all).
        started: when the operation began.
        ranks: the processes that write a directory together.
        entry: the one state dict or module that is written alone; None where the whole file is, if its format can.
    """

    path: Path_
    operation: str
    force: bool = False
    in_place: bool = False
    write: bool = True
    strict: bool = False
    manifest: Path_ | None = None
    resume: bool = False
    progress: Progress | None = None
    started: float = field(default_factory=time.perf_counter)
    ranks: Ranks = field(default_factory=Ranks)
    entry: str | None = None

    def is_directory(self, src: Path_) -> bool:
        """Whether the output is a directory: the input is one, and the output has no file's name."""
        return Path(src).is_dir() and not is_file_name(self.path)

    def check(self, src: Path_) -> None:
        """Refuse before any work what must not be written, and an input that is not there."""
        with suppress(PermissionError):  # what keeps a file from being read is told when it is read
            if not Path(src).exists():
                raise InputMissingError.at(src)
        graphs = [Path(path).suffix.lower() == ".onnx" for path in (src, self.path)]
        if graphs == [False, True]:  # an input that is a graph is told when it is read
            hint = "export_onnx (wnsurgery export) makes an ONNX graph of a model"
            raise SelectionError(f"{self.path}: would be a checkpoint, and is called an ONNX graph", hint=hint)
        whole = self.is_directory(src)
        if self.entry is not None and whole:
            hint = f"-o {Path(self.path).name}.safetensors writes it into one"
            raise SelectionError(f"{src}: entry (--entry) takes one state dict of a directory into a file", hint=hint)
        if self.entry is not None and self.in_place:
            raise SelectionError(
                f"{src}: entry (--entry) writes one state dict alone; in place, the rest would be lost"
            )
        if self.resume and not whole:
            raise SelectionError(f"{self.path}: resume (--resume) is for directories; a file is written at one go")
        if whole:
            if self.write:
                check_output_directory(self.path, src, force=self.force, in_place=self.in_place)
        elif self.write:
            check_output(self.path, src, force=self.force, in_place=self.in_place)
            if Path(src).is_dir():
                refuse_inputs(self.path, src)
        if self.manifest is not None and not self.write:
            raise SelectionError("a manifest (--manifest) tells what was written, and a dry run writes nothing")
        if self.manifest is not None:
            refuse_inputs(self.manifest, src)
            check_output(self.manifest, src, force=self.force)
            manifest, path = (Path(p).parent.resolve() / Path(p).name for p in (self.manifest, self.path))
            if manifest == path:
                raise InputError.of(self.manifest, "the manifest and the output are one file")
            if Path(self.path).resolve() in manifest.parents:
                raise InputError.of(self.manifest, "the manifest lies in the output, which comes as a whole")

    def settle(self, report: CheckpointReport) -> None:
        """Raise VerificationError where warnings are errors and there are some."""
        if self.strict and report.warnings:
            more = f" and {len(report.warnings) - 1} more" if len(report.warnings) > 1 else ""
            raise VerificationError(
                f"{self.path}: {report.warnings[0]}{more}",
                hint="warnings are errors under --strict; nothing was written",
            )


def deliver(output: Output, src: Path_, stored: Stored, report: CheckpointReport, maker: AtOnce) -> CheckpointReport:
    """Write what was planned or made; returns the report with its warnings and figures complete.

    Raises:
        VerificationError: there are warnings, and they are errors.
        OutputError, OutputExistsError, InputError: as `write_store`.
    """
    promises = maker if isinstance(maker, Promises) else None
    planned = replace(report, warnings=(*report.warnings, *_losses(output, stored)))

    def whole() -> CheckpointReport:
        late = promises.notes if promises is not None else []
        return replace(planned, warnings=(*late, *planned.warnings))

    def last() -> None:
        if promises is not None:
            promises.settle()
        if stored.source is not None:
            stored.source.check_all()
        output.settle(whole())

    def told(written: Path) -> None:
        """A manifest that cannot be made keeps the output from taking its place."""
        last()
        if sink is not None:
            sink.write(_manifest(output, written, stored, whole()))

    if promises is not None and output.progress is not None:
        watch(promises, output.progress)
    written, sink = 0, None
    if not output.write:
        if promises is not None:
            promises.run_all()
        last()
    else:
        with ExitStack() as stack:
            if output.manifest is not None:
                sink = stack.enter_context(committed(output.manifest, force=output.force))
            write_store(output.path, stored, force=output.force or output.in_place, values=promises, last=told)
            written = Path(output.path).stat().st_size
    read = stored.source.size if stored.source is not None else Path(src).stat().st_size
    return replace(whole(), proof=figures(output, whole(), maker, read, written))


def figures(output: Output, report: CheckpointReport, maker: AtOnce, read: int, written: int) -> Proof:
    """What the report ends with."""
    changed = [s for s in report.steps if s.action != "rekeyed"]
    axes = Counter(f"{s.kept} of {len(s.shape)}" for s in changed)
    pairs = len(report.folded) + len(report.rekeyed)
    left = sum(skip.reason.startswith(("under weight norm", "already under weight norm")) for skip in report.skipped)
    return Proof(
        pairs + left,
        left,
        tuple(sorted(axes.items())),
        maker.max_ulp,
        maker.worst,
        read,
        written,
        time.perf_counter() - output.started,
        str(output.path) if written else "",
    )


def every_name(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a loaded file under its dotted name, those of modules included."""
    yield from every_tensor(content)
    for where, module in modules_in(content):
        yield from flat_tensors({where: module.state_dict()} if where else module.state_dict()).items()


def _manifest(output: Output, written: Path, stored: Stored, report: CheckpointReport) -> bytes:
    """The manifest of what was written, read back; a module in memory is what was written."""
    again = map_store(written)
    if again is None or again.source is None:
        return manifest_text(output.operation, __version__, report, every_name(stored.content), lambda t: t)
    try:
        return manifest_text(output.operation, __version__, report, every_name(again.content), again.source.fetch)
    finally:
        again.source.close()


def watch(promises: Promises, progress: Progress) -> None:
    """Report what is read of the input as progress."""
    total, done = promises.source.size, 0

    def add(count: int) -> None:
        nonlocal done
        done = min(total, done + count)
        progress(done, total)

    promises.source.watch = add


def _losses(output: Output, stored: Stored) -> list[str]:
    """What the output's format cannot keep."""
    kind = format_for(output.path, stored.format)
    warnings = []
    if kind == "torch" and stored.metadata:
        warnings.append("the safetensors metadata has no place in a .pt file and is left out")
    if kind == "safetensors" and stored.format == "torch":
        tied = _tied(stored.content)
        if tied:
            warnings.append(
                f"{printable(tied[0])} and {printable(tied[1])} share memory; .safetensors holds them as two tensors"
            )
    return warnings


def _tied(content: Any) -> tuple[str, str] | None:
    """Two names that share memory. Tensors of one storage that do not overlap are apart as well as together."""
    promised: dict[int, str] = {}
    spans: list[tuple[int, int, str]] = []
    for name, tensor in flat_tensors(content).items():
        if tensor.layout != torch.strided or tensor.is_nested or not tensor.numel():
            continue
        if not tensor.is_meta:
            spans.append((*byte_span(tensor), name))
        elif promised.setdefault(tensor.untyped_storage()._cdata, name) != name:
            return promised[tensor.untyped_storage()._cdata], name
    spans.sort(key=lambda span: span[0])
    for (_, stop, name), (start, _, other) in pairwise(spans):
        if start < stop:
            return name, other
    return None
