"""The benchmark suite: plain, torch's two weight norms and both modes of ours on the same nets, in turns."""

from __future__ import annotations

import copy
import fnmatch
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from wnsurgery.bench_models import MODELS
from wnsurgery.bench_surgery import Figures, many_layers, one_batch, one_file, start_up
from wnsurgery.bench_works import WORKS
from wnsurgery.errors import SelectionError
from wnsurgery.plan import plan_weight_norm
from wnsurgery.surgery import apply_weight_norm
from wnsurgery.text import columns

__all__ = ["SuiteReport", "SuiteRow", "SurgeryRow", "bench_suite"]

VARIANTS = ("plain", "torch", "legacy", "ours", "deferred")
_DEFAULT = tuple(name for name in MODELS if name != "tiny")
_REUSING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}  # glibc keeps every page it once had


@dataclass(frozen=True)
class SuiteRow:
    """One part of one work by one variant.

    `milliseconds` is the median; `ratio` the median over rounds of the ratio to the plain net in the same round, with
    quartiles `low` and `high`; `faults` the median number of page faults; `fault_free` the ratio in a process that
    gives no page back, where that was measured.
    """

    model: str
    work: str
    part: str
    variant: str
    threads: int
    device: str
    milliseconds: float
    ratio: float
    low: float
    high: float
    faults: float
    fault_free: float | None = None

    @property
    def key(self) -> tuple[str, str, str, str, int, str]:
        return (self.model, self.work, self.part, self.variant, self.threads, self.device)


@dataclass(frozen=True)
class SurgeryRow:
    """One piece of surgery: microseconds (per layer where there are many), and the ratio to its measure."""

    work: str
    size: str
    variant: str
    microseconds: float
    ratio: float
    measure: str


@dataclass(frozen=True)
class SuiteReport:
    """What the suite measured; prints as tables."""

    rows: tuple[SuiteRow, ...]
    surgery: tuple[SurgeryRow, ...]
    repeats: int

    def __str__(self) -> str:
        table = [("model", "work", "part", "variant", "threads", "ms", "x plain (quartiles)", "page faults", "without")]
        for r in self.rows:
            free = "" if r.fault_free is None else f"{r.fault_free:.3f}"
            name = r.model if r.device == "cpu" else f"{r.model} {r.device}"
            ratio = f"{r.ratio:.3f} ({r.low:.3f} .. {r.high:.3f})"
            time = f"{r.milliseconds:.3f}"
            table.append((name, r.work, r.part, r.variant, str(r.threads), time, ratio, f"{r.faults:.0f}", free))
        lines = columns(table) if self.rows else []
        means = self._means()
        if len(means) > 1:
            lines += ["", *columns(means)]
        if self.surgery:
            surgery = [("surgery", "size", "variant", "us", "ratio")]
            surgery += [
                (r.work, r.size, r.variant, f"{r.microseconds:.1f}", f"{r.ratio:.2f} x {r.measure}")
                for r in self.surgery
            ]
            lines += ["", *columns(surgery)]
        return "\n".join([*lines, f"{self.repeats} interleaved rounds"])

    def _means(self) -> list[tuple[str, ...]]:
        """How much longer than the plain net a whole step takes, on average over the nets; for several of them."""
        groups: dict[tuple[str, str, int, str], list[SuiteRow]] = {}
        for r in self.rows:
            if r.part == "step" and r.variant != "plain":
                groups.setdefault((r.work, r.variant, r.threads, r.device), []).append(r)
        table: list[tuple[str, ...]] = [("mean overhead", "nets", "variant", "threads", "", "without page faults")]
        for (work, variant, threads, device), rows in groups.items():
            if len(rows) > 1:
                name = work if device == "cpu" else f"{work} {device}"
                free = [r.fault_free for r in rows if r.fault_free is not None]
                without = f"{statistics.fmean(free) - 1:+.3f}" if len(free) == len(rows) else ""
                mean = f"{statistics.fmean(r.ratio for r in rows) - 1:+.3f}"
                table.append((name, str(len(rows)), variant, str(threads), mean, without))
        return table


def bench_suite(
    *,
    models: Sequence[str] = _DEFAULT,
    works: Sequence[str] = tuple(WORKS),
    threads: Sequence[int] = (1, 2),
    repeats: int = 15,
    layers: Sequence[int] = (1000, 10000),
    megabytes: int = 256,
    fault_free: bool = False,
) -> SuiteReport:
    """Time weight norm on a fixed set of nets: plain, torch's parametrization, torch's legacy hook, ours in both modes.

    >>> report = wn.bench_suite(models=["tiny"], works=["train"], threads=[1], repeats=3, layers=[], megabytes=0)
    >>> [row.variant for row in report.rows if row.part == "step"]
    ['plain', 'torch', 'legacy', 'ours', 'deferred']

    The variants take turns within each round, so that a busy machine slows all alike. Works: "train" (forward, backward
    and optimizer apart, and the whole step), "eval", "accumulate" (8 micro-batches to a step), "gan" (a discriminator
    on real and fake). CUDA is measured too where there is one.

    Args:
        models: names or globs over the nets of the suite; "tiny" is for trying it out.
        works: which of the four.
        threads: numbers of CPU threads.
        repeats: rounds, at least 3; medians and quartiles are over these.
        layers: sizes of nets of small layers for the cost of surgery per layer; empty leaves it out.
        megabytes: size of the file to fold; 0 leaves it out, and start-up times and data-dependent initialisation.
        fault_free: measure again in a process that gives no memory back (glibc), for ratios without page faults.

    Raises SelectionError for names that do not exist.
    """
    chosen = [name for name in MODELS if any(fnmatch.fnmatchcase(name, pattern) for pattern in models)]
    for pattern in models:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in MODELS):
            raise SelectionError.no_match("models", pattern, MODELS, "net of the suite")
    for work in works:
        if work not in WORKS:
            raise SelectionError(f"works={work!r} is none of {', '.join(WORKS)}")
    if repeats < 3:
        raise SelectionError(f"repeats must be at least 3, not {repeats}")
    rows: list[SuiteRow] = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for count in threads if device == "cpu" else threads[:1]:
            with _threads(count):
                for name in chosen:
                    for work in works:
                        rows += _rows(name, work, count, device, repeats)
    if fault_free:
        rows = _with_fault_free(rows, chosen, works, threads, repeats)
    return SuiteReport(tuple(rows), tuple(_surgery(layers, megabytes, repeats)), repeats)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _variants(name: str, device: str) -> Iterator[tuple[str, nn.Module, Tensor]]:
    plain, x = MODELS[name].make()
    plain, x = plain.to(device), x.to(device)
    for variant in VARIANTS:
        yield variant, _converted(copy.deepcopy(plain), variant), x


def _converted(model: nn.Module, variant: str) -> nn.Module:
    if variant == "plain":
        return model
    if variant in ("ours", "deferred"):
        return apply_weight_norm(model, mode="deferred" if variant == "deferred" else "parametrized")
    theirs: Any = parametrizations.weight_norm if variant == "torch" else nn.utils.weight_norm
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the legacy hook is deprecated
        for site in plan_weight_norm(model).sites:
            for owner in site.owners:
                theirs(owner.module, owner.parameter, dim=(site.axes.kept or (0,))[0])
    return model


def _rows(name: str, work: str, threads: int, device: str, repeats: int) -> Iterator[SuiteRow]:
    """One work on one net by all variants, in turns."""
    steps = {variant: WORKS[work](model, x) for variant, model, x in _variants(name, device)}
    samples: dict[str, list[dict[str, float]]] = {variant: [] for variant in steps}
    for round_, (variant, step) in _without_collector(product(range(repeats + 2), steps.items())):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        times = step()
        times["faults"] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        if round_ >= 2:  # the first two warm up
            samples[variant].append(times)
    for part in (p for p in samples["plain"][0] if p != "faults"):
        for variant, rounds in samples.items():
            ratios = [r[part] / p[part] for r, p in zip(rounds, samples["plain"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            median = statistics.median(r[part] for r in rounds) * 1e3
            faults = statistics.median(r["faults"] for r in rounds)
            yield SuiteRow(name, work, part, variant, threads, device, median, middle, low, high, faults)


_Item = TypeVar("_Item")


def _without_collector(items: Iterable[_Item]) -> Iterator[_Item]:
    """The items, while the garbage collector rests, as in `timeit`: what it finds to do depends on all variants."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield from items
    finally:
        if was_on:
            gc.enable()


def _with_fault_free(
    rows: list[SuiteRow], models: Sequence[str], works: Sequence[str], threads: Sequence[int], repeats: int
) -> list[SuiteRow]:
    """The same rows with the ratios of a second process that keeps its memory."""
    options = {"models": models, "works": works, "threads": threads, "repeats": repeats, "layers": [], "megabytes": 0}
    code = (
        "import json, sys; from wnsurgery.suite import bench_suite; r = bench_suite(**json.loads(sys.argv[1]));"
        "print(json.dumps([[*row.key, row.ratio] for row in r.rows]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(options)],
        env=os.environ | _REUSING,
        capture_output=True,
        text=True,
        check=True,
    )
    found = {tuple(key): ratio for *key, ratio in json.loads(done.stdout)}
    return [replace(row, fault_free=found.get(row.key)) for row in rows]


def _surgery(layers: Sequence[int], megabytes: int, repeats: int) -> Iterator[SurgeryRow]:
    for count in layers:
        yield from _surgery_rows(many_layers(count), f"{count} layers")
    if megabytes:
        yield from _surgery_rows(one_file(megabytes), f"{megabytes} MB")
        yield from _surgery_rows(one_batch(repeats), "6 layers")
        yield from _surgery_rows(start_up(repeats), "process")


def _surgery_rows(figures: Figures, size: str) -> Iterator[SurgeryRow]:
    measures: dict[str, str] = {}
    for work, variant in figures:
        measures.setdefault(work, variant)
    for (work, variant), seconds in figures.items():
        measure = measures[work]
        yield SurgeryRow(work, size, variant, seconds * 1e6, seconds / figures[work, measure], measure)
