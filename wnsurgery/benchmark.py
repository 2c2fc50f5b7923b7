"""What weight norm costs on a given net: timings as samples, interleaved, as ratios to the plain net."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from wnsurgery.batches import call_with
from wnsurgery.errors import InputError, first_line
from wnsurgery.plan import Plan, plan_weight_norm
from wnsurgery.surgery import apply_weight_norm, fold_weight_norm

__all__ = ["BenchReport", "BenchRow", "bench", "interleaved", "torch_weight_norm"]


@dataclass(frozen=True)
class BenchRow:
    """One variant doing one kind of work.

    `milliseconds` is the median; `ratio` the median of the ratios to the plain net within each round, with
    `low` and `high` their quartiles.
    """

    work: str
    variant: str
    milliseconds: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class BenchReport:
    """Timings of plain, torch's weight norm, ours and folded, measured in turns; prints as a table."""

    rows: tuple[BenchRow, ...]
    repeats: int
    threads: int

    def __str__(self) -> str:
        lines = [f"{'work':<11} {'variant':<7} {'ms':>9}  x plain (quartiles)"]
        for r in self.rows:
            ratio = f"{r.ratio:.3f} ({r.low:.3f} .. {r.high:.3f})"
            lines.append(f"{r.work:<11} {r.variant:<7} {r.milliseconds:9.3f}  {ratio}")
        return "\n".join([*lines, f"{self.repeats} interleaved rounds, {self.threads} threads"])


def bench(model: nn.Module, inputs: Any, *, repeats: int = 20) -> BenchReport:
    """Time a net plain, under torch's weight norm, under ours and folded: one training step, one evaluation.

    The model is copied; a weight-normalized one counts as the plain net it stands for. The variants take turns
    in every round, so that a busy machine slows all alike.

    >>> report = wn.bench(nn.Linear(8, 8), torch.randn(4, 8), repeats=3)
    >>> [row.variant for row in report.rows[:4]]
    ['plain', 'torch', 'ours', 'folded']

    Args:
        model: any module the default selection finds a weight in.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        repeats: rounds; medians and quartiles are over these.

    Raises InputError when the net does not run on these inputs, or its output holds no floating-point tensor to
    differentiate.
    """
    plain = fold_weight_norm(copy.deepcopy(model))
    ours = apply_weight_norm(copy.deepcopy(plain))
    variants = {
        "plain": plain,
        "torch": torch_weight_norm(copy.deepcopy(plain)),
        "ours": ours,
        "folded": fold_weight_norm(copy.deepcopy(ours)),
    }
    _try(plain, inputs)
    rows: list[BenchRow] = []
    for work, make in (("train step", _train_step), ("evaluation", _evaluation)):
        samples = interleaved({name: make(net, inputs) for name, net in variants.items()}, repeats)
        for name, times in samples.items():
            ratios = sorted(t / p for t, p in zip(times, samples["plain"], strict=True))
            low, _, high = statistics.quantiles(ratios, n=4)
            rows.append(BenchRow(work, name, statistics.median(times) * 1e3, statistics.median(ratios), low, high))
    return BenchReport(tuple(rows), repeats, torch.get_num_threads())


def _try(model: nn.Module, inputs: Any) -> None:
    """Say in one line what is wrong with inputs that do not fit, before anything is timed."""
    model.train()
    try:
        loss = _loss(_call(model, inputs))
    except InputError:
        raise
    except Exception as error:  # models raise what they like
        raise InputError(f"{type(model).__name__} does not run on these inputs: {first_line(error)}") from error
    loss.backward()  # type: ignore[no-untyped-call]


def interleaved(work: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each of several things takes, done in turns; the first two rounds are not counted."""
    samples: dict[str, list[float]] = {name: [] for name in work}
    for round_ in range(repeats + 2):
        for name, step in work.items():
            started = time.perf_counter()
            step()
            if round_ >= 2:  # the first two warm up
                samples[name].append(time.perf_counter() - started)
    return samples


def torch_weight_norm(model: nn.Module) -> nn.Module:
    """A plain net under torch's own weight norm, wherever ours would go."""
    plan: Plan = plan_weight_norm(model)
    for site in plan.sites:
        for owner in site.owners:
            parametrizations.weight_norm(owner.module, owner.parameter, dim=(site.axes.kept or (0,))[0])
    return model


def _train_step(model: nn.Module, inputs: Any) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        _loss(_call(model, inputs)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        _synchronize()

    return step


def _evaluation(model: nn.Module, inputs: Any) -> Callable[[], None]:
    model.eval()

    def step() -> None:
        with torch.no_grad():
            _call(model, inputs)
        _synchronize()

    return step


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(*inputs) if isinstance(inputs, tuple) else call_with(model, inputs)


def _loss(output: Any) -> Tensor:
    parts = [t for t in _leaves(output) if t.is_floating_point() and t.requires_grad]
    if not parts:
        raise InputError("the model's output holds no floating-point tensor that depends on its parameters")
    return torch.stack([t.float().square().mean() for t in parts]).sum()


def _leaves(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [leaf for value in values for leaf in _leaves(value)]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
