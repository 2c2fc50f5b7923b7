"""How much the learning rate matters, with and without weight norm, on scikit-learn's handwritten digits.

    python examples/learning_rates.py              # minutes on two cores; writes learning_rates.svg beside this file
    python examples/learning_rates.py --quick      # seconds; fewer rates, seeds and epochs, no figure

Salimans & Kingma 2016 (arXiv 1602.07868) argue in section 2.1 that weight norm makes plain SGD robust to the learning
rate: a step is orthogonal to v, so it lengthens v, by sqrt(1 + c^2) where c = ||step|| / ||v||; too large a rate makes
v long, which lowers the effective rate. This trains one small convolutional net under each method at rates over four
decades, prints the training loss and the test error reached, and measures the growth of ||v||.

What makes it a fair comparison, all fixed before the first full run:

- Every method starts from the same weights per seed and sees the same batches in the same order: SGD, batches of 100
  as in the paper, constant rate, no augmentation. No method gets settings of its own. The weights are He's for ReLU
  nets, so that the normal net starts well, too; v starts as these weights, not as small as the paper's.
- Weight norm is on all five weights, the output's included. Batch normalization, whole or mean-only, stands between
  each convolution and its ReLU, and those convolutions have no bias.
- "Normal, data init" is a control: the net of weight norm with data-dependent init, folded back to plain weights. It
  starts from the same function, so what differs is the parametrization alone.
- The L2 penalty is 1 / (training images): a standard normal prior on the weights. The losses shown leave it out.
- Losses and errors are of the finished net in evaluation mode (running statistics) over all images. A run whose loss
  is not finite has diverged: infinite loss, and the error of a guess.
"""

from __future__ import annotations

import argparse
import io
import math
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import wnsurgery as wn

LEARNING_RATES = (0.001, 0.0032, 0.01, 0.032, 0.1, 0.32, 1.0, 3.2, 10.0)
QUICK_RATES = (0.01, 0.1, 1.0)
SEEDS, EPOCHS, BATCH, TEST = 5, 10, 100, 360
INIT_IMAGES = 500  # for data-dependent init
GUESS = 0.9  # test error of a net that says nothing: ten classes

# What counts as a good rate; see `table_of_ranges`.
LOSS_FACTOR, LOSS_LEVEL, ERROR_MARGIN = 10.0, 0.1, 0.02


# The methods ---------------------------------------------------------------------------------------------


def plain_net(norm: Callable[[int], nn.Module] | None = None) -> nn.Sequential:
    """Four convolutions of 16 channels and a linear layer, with a normalization after each convolution or without."""
    layers: list[nn.Module] = []
    for inputs, stride in ((1, 2), (16, 1), (16, 1), (16, 1)):
        layers.append(nn.Conv2d(inputs, 16, 3, stride=stride, padding=1, bias=norm is None))
        layers += [norm(16)] if norm else []
        layers.append(nn.ReLU())
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 4 * 4, 10))
    for layer in linear_maps(net):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return net


def linear_maps(net: nn.Sequential) -> list[nn.Conv2d | nn.Linear]:
    return [m for m in net if isinstance(m, nn.Conv2d | nn.Linear)]


def normalized_net(start: nn.Sequential, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """The same weights with a normalization after each convolution, whose bias it makes superfluous."""
    net = plain_net(norm)
    for layer, old in zip(linear_maps(net), linear_maps(start), strict=True):
        layer.weight.data.copy_(old.weight.data)  # biases are zero in both
    return net


METHODS: dict[str, Callable[[nn.Sequential, Tensor], nn.Module]] = {
    "normal": lambda net, _: net,
    "normal, L2": lambda net, _: net,
    "normal, data init": lambda net, images: wn.fold_weight_norm(wn.apply_weight_norm(net, init="data", data=images)),
    "batch norm": lambda net, _: normalized_net(net, nn.BatchNorm2d),
    "weight norm": lambda net, _: wn.apply_weight_norm(net),
    "weight norm, data init": lambda net, images: wn.apply_weight_norm(net, init="data", data=images),
    "weight norm, data init, mean-only BN": lambda net, images: wn.apply_weight_norm(
        normalized_net(net, wn.MeanOnlyBatchNorm2d), init="data", data=images
    ),
}


# One run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    method: str
    rate: float
    seed: int
    epochs: int
    momentum: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a run reached; `growth` and `law` are ||v|| at the end over ||v|| at the start, per output channel."""

    loss: float
    error: float
    growth: tuple[float, ...] = ()
    law: tuple[float, ...] = ()


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,797 images of 8x8 pixels: the last 360 of a fixed shuffle are kept for testing."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16 - 0.5
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:-TEST], order[-TEST:]
    return images[train], labels[train], images[test], labels[test]


def model_of(job: Job) -> nn.Module:
    torch.manual_seed(job.seed)
    return METHODS[job.method](plain_net(), digits()[0][:INIT_IMAGES])


class Growth:
    """Follows ||v|| of every output channel, and the product of sqrt(1 + c^2) that section 2.1 says it is."""

    def __init__(self, model: nn.Module) -> None:
        self.directions = [p for name, p in model.named_parameters() if name.endswith("weight.original1")]
        self.start = _norms(self.directions)
        self.law = torch.ones_like(self.start)

    @contextmanager
    def step(self) -> Iterator[None]:
        before = [v.detach().clone() for v in self.directions]
        yield
        steps = [v.detach() - old for v, old in zip(self.directions, before, strict=True)]
        self.law *= (1 + (_norms(steps) / _norms(before)).square()).sqrt()

    def measured(self) -> Tensor:
        return _norms(self.directions) / self.start


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().flatten(1).norm(dim=1) for t in tensors])


def train(model: nn.Module, job: Job) -> Growth | None:
    """Train in place; None if the loss was not finite on the way."""
    images, labels, *_ = digits()
    decay = 1 / len(images) if job.method == "normal, L2" else 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=job.rate, momentum=job.momentum, weight_decay=decay)
    order = torch.Generator().manual_seed(job.seed)
    growth = Growth(model) if job.method == "weight norm" else None
    for _ in range(job.epochs):
        for batch in torch.randperm(len(images), generator=order)[: len(images) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            if not math.isfinite(loss.item()):
                return None
            loss.backward()
            with growth.step() if growth else nullcontext():
                optimizer.step()
    return growth


def run(job: Job) -> Outcome:
    images, labels, test_images, test_labels = digits()
    model = model_of(job)
    growth = train(model, job)
    model.eval()
    with torch.no_grad():
        loss = F.cross_entropy(model(images), labels).item()
        wrong = model(test_images).argmax(1) != test_labels
    if not math.isfinite(loss):
        return Outcome(math.inf, GUESS)
    lengths = (growth.measured(), growth.law) if growth else ()
    return Outcome(loss, wrong.float().mean().item(), *(tuple(t.tolist()) for t in lengths))


def sweep(jobs: Sequence[Job], workers: int) -> dict[Job, Outcome]:
    """Run every job on one thread; the outcomes do not depend on the number of processes."""
    console = Console(stderr=True)
    with processes(workers) as apply:
        results = track(apply(run, jobs), description="training", total=len(jobs), console=console)
        return dict(zip(jobs, results, strict=True))


@contextmanager
def processes(workers: int) -> Iterator[Callable[..., Iterable[Outcome]]]:
    """`map` over that many processes; over none but this one for a single worker."""
    if workers == 1:
        torch.set_num_threads(1)
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool.map


# What came out -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One method: per learning rate the losses and the errors of all seeds."""

    rates: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    errors: tuple[tuple[float, ...], ...]


def curves_of(outcomes: dict[Job, Outcome], momentum: float) -> dict[str, Curve]:
    curves = {}
    for method in METHODS:
        mine = {j: o for j, o in outcomes.items() if j.method == method and j.momentum == momentum}
        rates = tuple(sorted({j.rate for j in mine}))
        groups = [[o for j, o in mine.items() if j.rate == rate] for rate in rates]
        losses, errors = ([tuple(getattr(o, k) for o in group) for group in groups] for k in ("loss", "error"))
        curves[method] = Curve(rates, tuple(losses), tuple(errors))
    return curves


def good_range(values: Sequence[float], limit: float) -> range:
    """The unbroken run of rates around the lowest value whose values are within the limit; empty if none is."""
    best = min(range(len(values)), key=values.__getitem__)
    if not (math.isfinite(values[best]) and values[best] <= limit):
        return range(0)
    low = high = best
    while low > 0 and values[low - 1] <= limit:
        low -= 1
    while high + 1 < len(values) and values[high + 1] <= limit:
        high += 1
    return range(low, high + 1)


def decades(rates: Sequence[float], found: range) -> float:
    return math.log10(rates[found[-1]] / rates[found[0]]) if found else 0.0


def width(rates: Sequence[float], groups: Sequence[Sequence[float]], limit: Callable[[Sequence[float]], float]) -> str:
    """The good rates of the medians, and how wide each seed's own range is: median (min..max)."""
    middle = [median(group) for group in groups]
    found = good_range(middle, limit(middle))
    if not found:
        return "none"
    each = sorted(decades(rates, good_range(seed, limit(seed))) for seed in zip(*groups, strict=True))
    ends = "≥ " if found[0] == 0 or found[-1] == len(rates) - 1 else ""
    return (
        f"{rates[found[0]]:g}..{rates[found[-1]]:g}\n{ends}{median(each):.1f} decades ({each[0]:.1f}..{each[-1]:.1f})"
    )


def number(value: float) -> str:
    if not math.isfinite(value):
        return "∞"
    return f"{value:.2g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    return f"{show(median(values))}\n{show(min(values))}..{show(max(values))}"


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def table_of_values(curves: dict[str, Curve], what: str, title: str, show: Callable[[float], str]) -> Table:
    table = Table("learning rate", *curves, title=title)
    for i, rate in enumerate(next(iter(curves.values())).rates):
        table.add_row(f"{rate:g}", *(spread(getattr(c, what)[i], show) for c in curves.values()), end_section=True)
    return table


def table_of_ranges(curves: dict[str, Curve]) -> Table:
    """Per method the best rate by training loss, and how wide a range of rates is nearly as good."""
    lowest = min(median(group) for c in curves.values() for group in c.errors)
    table = Table(
        "method",
        "best rate",
        "training loss there",
        "test error there, %",
        f"loss within {LOSS_FACTOR:g} x own best",
        f"loss under {LOSS_LEVEL:g}",
        f"test error within {100 * ERROR_MARGIN:g} points of any method's best",
        title="ranges of learning rates: of the medians, and of each seed as median (min..max)",
    )
    for method, curve in curves.items():
        best = min(range(len(curve.rates)), key=lambda i: median(curve.losses[i]))
        table.add_row(
            method,
            f"{curve.rates[best]:g}",
            spread(curve.losses[best], number),
            spread(curve.errors[best], percent),
            width(curve.rates, curve.losses, lambda losses: LOSS_FACTOR * min(losses)),
            width(curve.rates, curve.losses, lambda _: LOSS_LEVEL),
            width(curve.rates, curve.errors, lambda _: lowest + ERROR_MARGIN),
            end_section=True,
        )
    return table


def table_of_growth(outcomes: dict[Job, Outcome]) -> Table:
    """||v|| measured against section 2.1's law, over all output channels and seeds."""
    table = Table(
        "learning rate",
        "momentum",
        "growth of ||v||, median (largest)",
        "product of sqrt(1 + c²), median (largest)",
        "largest relative difference",
        "rate / growth², median",
        title="weight norm: how long v became, and how long the law says",
    )
    for momentum, rate in sorted({(j.momentum, j.rate) for j in outcomes}):
        mine = [o for j, o in outcomes.items() if (j.momentum, j.rate) == (momentum, rate) and o.growth]
        growth, law = ([x for o in mine for x in getattr(o, k)] for k in ("growth", "law"))
        if not growth:
            table.add_row(f"{rate:g}", f"{momentum:g}", *["diverged"] * 4)
            continue
        columns = [f"{median(values):.3g} ({max(values):.3g})" for values in (growth, law)]
        apart = max(abs(a - b) / b for a, b in zip(growth, law, strict=True))
        table.add_row(f"{rate:g}", f"{momentum:g}", *columns, f"{apart:.1e}", f"{rate / median(growth) ** 2:.2g}")
    return table


def save_figure(curves: dict[str, Curve], path: Path) -> None:
    """Both measures against the learning rate as SVG: medians, and bars from min to max of the seeds."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    with mpl.rc_context({"svg.hashsalt": "learning_rates", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        for axes, what, label, top in zip(
            figure.subplots(1, 2),
            ("losses", "errors"),
            ("final training loss (10: diverged)", "test error"),
            (10.0, 1.0),
            strict=True,
        ):
            for i, (method, curve) in enumerate(curves.items()):
                # A diverged run has an infinite loss: drawn at the upper edge. Moved apart sideways to be seen.
                groups = [[min(max(v, 1e-6), top) for v in group] for group in getattr(curve, what)]
                middle = [median(group) for group in groups]
                bars = [[m - min(g) for m, g in zip(middle, groups, strict=True)]]
                bars += [[max(g) - m for m, g in zip(middle, groups, strict=True)]]
                rates = [rate * 1.06 ** (i - len(curves) // 2) for rate in curve.rates]
                style = {"marker": "osv^Dx+"[i % 7], "markersize": 4, "linewidth": 1, "elinewidth": 0.6}
                axes.errorbar(rates, middle, bars, label=method, color=f"C{i}", **style)
            axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel=label)
            for side in (axes.xaxis, axes.yaxis):
                side.set_minor_locator(NullLocator())
                side.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    # A hundredth of a point is enough; that and no indentation save a third of the file.
    text = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", drawn.getvalue())
    path.write_text(re.sub(r"\n\s+", "\n", text), encoding="utf-8")


# The command ---------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Learning-rate robustness with and without weight norm.")
    parser.add_argument("--quick", action="store_true", help="3 rates, 2 seeds, 1 epoch, and no figure unless asked")
    parser.add_argument("--seeds", type=int, help=f"runs per method and rate (default {SEEDS})")
    parser.add_argument("--epochs", type=int, help=f"passes over the training images (default {EPOCHS})")
    parser.add_argument("--momentum", type=float, default=0.0, help="of SGD (default 0, as section 2.1 assumes)")
    parser.add_argument("--figure", type=Path, help="SVG file to write (default learning_rates.svg, not with --quick)")
    parser.add_argument("--no-figure", action="store_true", help="tables only: needs no matplotlib")
    parser.add_argument("--workers", type=int, help="processes (default: one per core; 1 with --quick)")
    chosen = parser.parse_args()
    chosen.seeds = chosen.seeds or (2 if chosen.quick else SEEDS)
    chosen.epochs = chosen.epochs or (1 if chosen.quick else EPOCHS)
    chosen.workers = chosen.workers or (1 if chosen.quick else os.cpu_count() or 1)
    if chosen.no_figure:
        chosen.figure = None
    elif chosen.figure is None and not chosen.quick:
        chosen.figure = Path(__file__).with_suffix(".svg")
    return chosen


def main() -> None:
    chosen = options()
    if chosen.figure and find_spec("matplotlib") is None:
        sys.exit("learning_rates.py: the figure needs matplotlib, which is not installed; --no-figure does without")
    rates = QUICK_RATES if chosen.quick else LEARNING_RATES
    seeds = range(chosen.seeds)
    jobs = [Job(m, r, s, chosen.epochs, chosen.momentum) for r in rates for m in METHODS for s in seeds]
    # The law speaks of steps along the gradient alone: what the other momentum does to it.
    other = 0.0 if chosen.momentum else 0.9
    jobs += [Job("weight norm", 0.1, s, chosen.epochs, other) for s in seeds]
    outcomes = sweep(jobs, chosen.workers)
    curves = curves_of(outcomes, chosen.momentum)

    console = Console(width=132)
    setting = f"SGD, momentum {chosen.momentum:g}, {chosen.epochs} epochs, {chosen.seeds} seeds: median, min..max"
    console.print(table_of_values(curves, "losses", f"final training loss; {setting}", number))
    console.print(table_of_values(curves, "errors", f"test error in %; {setting}", percent))
    console.print(table_of_ranges(curves))
    console.print(table_of_growth(outcomes))
    if chosen.figure:
        save_figure(curves, chosen.figure)
        console.print(f"figure: {chosen.figure}", soft_wrap=True)


if __name__ == "__main__":
    main()
