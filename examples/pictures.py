"""Three pictures of weight norm at work, from real training runs on scikit-learn's handwritten digits.

    python examples/pictures.py                # a minute on one core; writes three files into pictures/ beside this
    python examples/pictures.py --quick -o DIR # seconds: fewer steps and two seeds

- convergence.svg: training loss step by step, at three learning rates, plain and under weight norm.
- growth.svg: how ||v|| grows, against the law of Salimans & Kingma 2016 (arXiv 1602.07868), section 2.1: a step at
  right angles to v with c = ||step|| / ||v|| lengthens it by sqrt(1 + c^2).
- gradient.svg: the gradient of w as its parts along w, which is g's (their equation 3, left), and at right
  angles to it, which is v's (equation 3, right, and equation 4).

The net has two layers (64-64-10), batches of 100, seeds 0 to 4, of which none was chosen: lines are medians over the
seeds, bands go from the lowest seed to the highest. Needs scikit-learn (the `examples` extra) and no matplotlib.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import wnsurgery as wn

from svg_plot import BLUE, GREEN, GREY, INK, PURPLE, RED, Panel, legend, picture

STEPS, SEEDS, BATCH, TRAIN, INIT_IMAGES = 300, 5, 100, 1440, 500
RATES = (0.01, 0.1, 1.0)


def digits() -> tuple[Tensor, Tensor]:
    """1,440 images of 64 pixels in [0, 1], and their digits."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:TRAIN], dtype=torch.float32) / 16, torch.tensor(labels[:TRAIN])


X, Y = digits()


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def data_init(model: nn.Module) -> nn.Module:
    return wn.apply_weight_norm(model, init="data", data=X[:INIT_IMAGES])


METHODS: dict[str, tuple[Callable[[nn.Module], nn.Module], str, str]] = {
    "plain": (lambda m: m, INK, ""),
    "weight norm": (wn.apply_weight_norm, BLUE, "7 3"),
    "plain, data init (control)": (lambda m: wn.fold_weight_norm(data_init(m)), RED, "2 3"),
    "weight norm, data init": (data_init, GREEN, "9 3 2 3"),
}


def training(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> Iterator[int]:
    """Train on the same batches for every method; pauses at each step with the gradients there, before the update."""
    order = torch.Generator().manual_seed(seed)
    for step in range(steps):
        batch = torch.randint(TRAIN, (BATCH,), generator=order)
        optimizer.zero_grad()
        cross_entropy(model(X[batch]), Y[batch]).backward()
        yield step
        optimizer.step()


def first_pair(model: nn.Module) -> tuple[Tensor, Tensor]:
    """g and v of the first layer."""
    entry = model[0].parametrizations.weight  # type: ignore[index,union-attr]
    return entry.original0, entry.original1  # type: ignore[union-attr,return-value]


def lengths(rows: Tensor) -> Tensor:
    return rows.detach().double().norm(dim=1)


# Convergence ---------------------------------------------------------------------------------------------


def losses(method: str, rate: float, seed: int, steps: int) -> list[float]:
    """Loss over all training images at every tenth step, the last included."""
    model = METHODS[method][0](net(seed))
    found = []

    def measure() -> None:
        with torch.no_grad():
            loss = cross_entropy(model(X), Y).item()
        found.append(loss if math.isfinite(loss) else math.inf)

    for step in training(model, torch.optim.SGD(model.parameters(), lr=rate), steps, seed):
        if step % 10 == 0:
            measure()
    measure()
    return found


def convergence(steps: int, seeds: int) -> str:
    panels = []
    print(f"training loss after {steps} steps: median (lowest..highest) of {seeds} seeds")
    for i, rate in enumerate(RATES):
        label = "training loss (cross-entropy, nats)" if i == 0 else ""
        panel = Panel(
            70 + 290 * i, 240, (0, steps), (0.003, 5), [0, steps // 3, steps * 2 // 3, steps],
            (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
            f"learning rate {rate:g}", "step of SGD", label, log=True,
        )  # fmt: skip
        for method, (_, colour, dash) in METHODS.items():
            runs = [losses(method, rate, seed, steps) for seed in range(seeds)]
            at = [min(10.0 * k, steps) for k in range(len(runs[0]))]
            each = list(zip(*runs, strict=True))
            panel.band(at, list(map(min, each)), list(map(max, each)), colour)
            panel.line(list(zip(at, map(median, each), strict=True)), colour, dash)
            last = each[-1]
            print(f"  rate {rate:g}, {method}: {median(last):.3f} ({min(last):.3f}..{max(last):.3f})")
        panels.append(panel)
    pairs = [first_pair(data_init(net(seed))) for seed in range(seeds)]
    ratio = median((g.flatten() / lengths(v)).median().item() for g, v in pairs)
    print(f"after data init g of the first layer is {ratio:.1f} ||v||: steps of w across it grow {ratio**2:.0f}-fold")
    names = [(name, colour, dash) for name, (_, colour, dash) in METHODS.items()]
    return picture(
        "Training loss on handwritten digits, plain and under weight norm",
        f"Three plots of training loss against step, medians and ranges of {seeds} seeds, for four methods.",
        panels,
        legend(names, 350, 70, 212),
        size=(930, 368),
    )


# Growth of ||v|| -----------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD, rate 0.5": lambda m: torch.optim.SGD(m.parameters(), lr=0.5),
    "SGD, momentum 0.9, rate 0.1": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "Adam, rate 0.01": lambda m: torch.optim.Adam(m.parameters(), lr=0.01),
}


def grown(optimizer: str, seed: int, points: int) -> tuple[list[float], list[float], float]:
    """||v|| over its start and the product of sqrt(1 + c^2), medians over rows at each step; how far they part."""
    model = wn.apply_weight_norm(net(seed))
    _, v = first_pair(model)
    start, law = lengths(v), torch.ones(len(v), dtype=torch.float64)
    measured, predicted, before = [], [], v.detach().clone()
    apart = 0.0
    for _ in training(model, OPTIMIZERS[optimizer](model), points, seed):
        law *= (1 + (lengths(v.detach() - before) / lengths(before)) ** 2).sqrt()
        before = v.detach().clone()
        measured.append((lengths(v) / start).median().item())
        predicted.append(law.median().item())
        apart = (lengths(v) / start / law - 1).abs().max().item()
    return measured, predicted, apart


def growth(steps: int, seeds: int) -> str:
    results = {name: [grown(name, seed, steps + 1) for seed in range(seeds)] for name in OPTIMIZERS}
    top = max(x for runs in results.values() for run in runs for x in run[0] + run[1])
    every = next(t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 100) if (top - 1) / t <= 8)
    ticks = [1 + every * k for k in range(math.ceil((top - 1) / every) + 1)]
    panels = []
    for i, (name, runs) in enumerate(results.items()):
        label = "length of v over its start (no unit)" if i == 0 else ""
        panel = Panel(
            70 + 290 * i, 240, (0, steps), (1, ticks[-1]), [0, steps // 3, steps * 2 // 3, steps], ticks,
            name, "step", label,
        )  # fmt: skip
        for which, colour, dash, width in ((0, BLUE, "", 3.2), (1, RED, "5 4", 1.8)):
            each = list(zip(*(run[which] for run in runs), strict=True))
            shown = [*range(0, steps, 5), steps]
            panel.band(shown, [min(each[k]) for k in shown], [max(each[k]) for k in shown], colour)
            panel.line([(k, median(each[k])) for k in shown], colour, dash, width)
        print(
            f"growth of ||v|| in {steps} steps, {name}: measured x{median(r[0][-1] for r in runs):.3f}, "
            f"law x{median(r[1][-1] for r in runs):.3f}; largest difference of any row {max(r[2] for r in runs):.1e}"
        )
        panels.append(panel)
    return picture(
        "How v grows in training, and section 2.1's law",
        "Three plots of the length of v against step, measured and by the law, which agree under plain SGD alone.",
        panels,
        legend([("measured", BLUE, ""), ("law: product of √(1 + c²) over the steps", RED, "5 4")], 350, 220, 160),
        size=(930, 368),
    )


# The gradient's two parts --------------------------------------------------------------------------------


def parts(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Per row: the gradient of w along w, from g's, and the length of its rest, from v's (equation 3)."""
    g, v = first_pair(model)
    assert g.grad is not None and v.grad is not None
    radial = g.grad.double().flatten()
    tangential = lengths(v.grad) * lengths(v) / g.detach().double().flatten().abs()
    return radial, tangential


def gradient(steps: int, seeds: int) -> str:
    shares: list[list[float]] = []
    for seed in range(seeds):
        model = wn.apply_weight_norm(net(seed))
        shares.append([])
        for step in training(model, torch.optim.SGD(model.parameters(), lr=0.1), steps + 1, seed):
            radial, tangential = parts(model)
            total = radial**2 + tangential**2
            shares[-1].append((100 * radial**2 / total)[total > 0].median().item())
            if seed == 0 and step == steps // 6:
                alive = [r for r in range(len(total)) if total[r] > 0]
                row = sorted(alive, key=lambda r: (radial[r] ** 2 / total[r]).item())[len(alive) // 2]
                along, across = radial[row].item(), tangential[row].item()
    each = list(zip(*shares, strict=True))
    print(
        f"gradient of row {row}, seed 0, step {steps // 6}: along w {along:+.5f}, at right angles to it {across:.5f}; "
        f"share of its square along w {100 * along**2 / (along**2 + across**2):.1f} %"
    )
    middle = list(map(median, each))
    print(f"share along w, median row and seed: {median(middle):.1f} % over {steps} steps; by chance {100 / 64:.1f} %")
    return picture(
        "The gradient of w: g gets the part along w, v the part at right angles",
        "An arrow diagram of one gradient and its two parts, and a plot of the share along w against the step.",
        [triangle(row, steps // 6, along, across), share_panel(each, steps)],
        size=(930, 332),
    )


def triangle(row: int, step: int, along: float, across: float) -> Panel:
    """The negative gradient of one row in the plane it spans with w, to scale, w's direction to the right."""
    size = 1.15 * max(abs(along), across)
    ratio = 390 / 220
    panel = Panel(
        70, 390, (-ratio / 2 * size, ratio / 2 * size), (-0.1 * size, 0.9 * size), (), (),
        f"one row (neuron {row}, seed 0, step {step}); descent direction -∇w L, to scale", "direction of w →",
    )  # fmt: skip
    r, t, end = (-along, 0.0), (0.0, across), (-along, across)
    edge = ratio / 2 * size
    panel.line([(-edge, 0), (edge, 0)], GREY, "3 4", 1)
    panel.line([r, end, t], GREY, "3 3", 1)
    panel.arrow((0, 0), t, BLUE)
    panel.arrow((0, 0), r, RED)
    panel.arrow((0, 0), end, INK)
    side = -1 if r[0] < 0 else 1
    anchors = ("start", "end")[::side]
    panel.note(t, f"at right angles: {across:.4f} (v)", BLUE, anchors[1], (-8 * side, 14))
    panel.note(r, f"along w: {-along:+.4f} (g)", RED, anchors[0], (4 * side, 16))
    panel.note(end, f"whole: {math.hypot(along, across):.4f}", INK, anchors[0], (8 * side, 4))
    return panel


def share_panel(each: list[tuple[float, ...]], steps: int) -> Panel:
    top = 5 * math.ceil(max(map(max, each)) / 5)
    panel = Panel(
        540, 360, (0, steps), (0, top), [0, steps // 3, steps * 2 // 3, steps], [top * k / 5 for k in range(6)],
        "all rows of the first layer, SGD at rate 0.1", "step", "share of ‖∇w L‖² along w, %",
    )  # fmt: skip
    panel.band(range(steps + 1), list(map(min, each)), list(map(max, each)), PURPLE)
    panel.line(list(enumerate(map(median, each))), PURPLE)
    panel.line([(0, 100 / 64), (steps, 100 / 64)], INK, "4 4", 1.4)
    panel.note((steps, top), "solid: median row; dashed: chance, 1/64", INK, "end", (0, 14))
    return panel


# The command ---------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Three pictures of weight norm at work.")
    parser.add_argument("--quick", action="store_true", help="30 steps and 2 seeds")
    parser.add_argument("-o", "--output", type=Path, help="folder to write to (default: pictures/ beside this file)")
    chosen = parser.parse_args()
    if chosen.quick and chosen.output is None:
        parser.error("--quick needs -o: the pictures of the full run are not to be overwritten")
    torch.set_num_threads(1)  # the nets are small, and the files then come out the same
    folder = chosen.output or Path(__file__).parent / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    steps, seeds = (30, 2) if chosen.quick else (STEPS, SEEDS)
    for draw in (convergence, growth, gradient):
        (folder / f"{draw.__name__}.svg").write_text(draw(steps, seeds), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
