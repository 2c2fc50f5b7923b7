"""The learning-rate example: it runs, its comparison is fair, and its arithmetic is right."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "learning_rates.py"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    pytest.importorskip("sklearn")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the script does: the nets are small
    spec = importlib.util.spec_from_file_location("learning_rates", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["learning_rates"] = module
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)
    del sys.modules["learning_rates"]


def test_quick_run_prints_what_it_measured() -> None:
    """The quick run prints every table; ||v|| grows by the law under plain SGD, and not under momentum."""
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, "--quick"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "HOME": "/tmp"},
    )
    assert done.returncode == 0, done.stderr
    for title in ("final training loss; SGD", "test error in %; SGD", "ranges of learning rates", "how long v became"):
        assert title in done.stdout
    rows = re.findall(r"│ (\S+) +│ (0|0\.9) +│ \S+ \(\S+\) +│ \S+ \(\S+\) +│ (\S+) +│", done.stdout)
    plain = {rate: float(apart) for rate, momentum, apart in rows if momentum == "0"}
    assert set(plain) >= {"0.01", "0.1"}
    assert max(plain.values()) < 1e-5
    assert [float(apart) > 1e-4 for _, momentum, apart in rows if momentum == "0.9"] == [True]
    assert "figure:" not in done.stdout


def test_methods_start_alike(example: ModuleType) -> None:
    """Each method starts from the same directions; a control starts from the very function of its counterpart."""
    models = {m: example.model_of(example.Job(m, 0.1, 3, 1)).eval() for m in example.METHODS}
    rows = {
        name: [layer.weight.detach().flatten(1) for layer in example.linear_maps(model)]
        for name, model in models.items()
    }
    for name, weights in rows.items():
        for weight, first in zip(weights, rows["normal"], strict=True):
            cosine = torch.nn.functional.cosine_similarity(weight.double(), first.double())
            assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-6), name
    images = example.digits()[0][:50]
    with torch.no_grad():
        outputs = {name: model(images) for name, model in models.items()}
    assert torch.equal(outputs["normal"], outputs["weight norm"])
    assert torch.equal(outputs["normal, data init"], outputs["weight norm, data init"])
    assert not torch.allclose(outputs["normal"], outputs["normal, data init"])


def test_seeds_differ_and_runs_repeat(example: ModuleType) -> None:
    """The same run twice gives the same numbers in every bit; another seed gives others."""
    first, again, other = (example.run(example.Job("weight norm", 0.1, seed, 1)) for seed in (0, 0, 1))
    assert first == again
    assert first.loss != other.loss
    assert len(first.growth) == len(first.law) == 4 * 16 + 10


def test_divergence_is_an_infinite_loss(example: ModuleType) -> None:
    """A run whose loss is not finite counts as infinite loss and as a guess, not as NaN and not as left out."""
    assert example.run(example.Job("normal", 1e6, 0, 1)) == example.Outcome(math.inf, 0.9)


@pytest.mark.parametrize(
    ("values", "limit", "found"),
    [
        ([9, 2, 1, 2, 9], 2, range(1, 4)),
        ([1, 9, 0.5, 1, math.inf], 1, range(2, 4)),  # the other side of a bad rate does not count
        ([1, 1, 1], 1, range(3)),
        ([5, 4, 5], 1, range(0)),
        ([math.inf, math.inf], math.inf, range(0)),  # all diverged: nothing is good
    ],
)
def test_good_range(example: ModuleType, values: list[float], limit: float, found: range) -> None:
    """The good rates are the unbroken stretch around the best."""
    assert example.good_range(values, limit) == found


def test_width_says_range_and_spread(example: ModuleType) -> None:
    """The range is of the medians, its width per seed, and a range that meets the end of the rates is marked."""
    rates = (0.01, 0.1, 1.0, 10.0)
    inner = [(9, 9, 9), (1, 1, 9), (1, 1, 1), (9, 9, 9)]
    assert example.width(rates, inner, lambda _: 2) == "0.1..1\n1.0 decades (0.0..1.0)"
    outer = [(9, 9, 9), (9, 9, 9), (1, 1, 1), (1, 1, 1)]
    assert example.width(rates, outer, lambda _: 2) == "1..10\n≥ 1.0 decades (1.0..1.0)"
    assert example.width(rates, inner, lambda _: 0.5) == "none"


def test_figure_is_the_same_every_time(example: ModuleType, tmp_path: Path) -> None:
    """The same numbers give the same SVG file in every byte: small, without a date, infinite losses included."""
    pytest.importorskip("matplotlib")
    losses = ((1.0, 2.0), (0.1, 0.2), (3.0, math.inf))
    curve = example.Curve((0.01, 0.1, 1.0), losses, ((0.5, 0.6), (0.1, 0.0), (0.9, 0.9)))
    files = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for file in files:
        example.save_figure(dict.fromkeys(example.METHODS, curve), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].stat().st_size < 60_000
    assert "<dc:date>" not in files[0].read_text(encoding="utf-8")


def test_committed_figure_shows_every_method(example: ModuleType) -> None:
    """The figure in the repository is small and names every method as the script does."""
    text = SCRIPT.with_suffix(".svg").read_text(encoding="utf-8")
    assert len(text) < 60_000
    assert [m for m in example.METHODS if f">{m}<" not in text] == []


def test_missing_matplotlib_is_said_before_training(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib the script stops at once with one line that says what to do."""
    monkeypatch.setattr(example, "find_spec", lambda name: None)
    monkeypatch.setattr(example, "sweep", lambda *_: pytest.fail("trained first"))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    with pytest.raises(SystemExit) as stop:
        example.main()
    assert re.fullmatch(r"learning_rates\.py: .*matplotlib.*--no-figure.*", str(stop.value.code))
