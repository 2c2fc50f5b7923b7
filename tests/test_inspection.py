"""Looking inside: numbers against plain float64 arithmetic, names that would do harm, tables that fit."""

from __future__ import annotations

import csv
import io
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import wnsurgery as wn
from wnsurgery.inspection import inspect
from wnsurgery.weight_table import show_weights


def test_effective_step_and_growth(tmp_path: Path) -> None:
    """Steps are lr |g| / ||v||^2 per row, growth and gain the ratios to the reference, by numpy in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    before = {k: t.double().numpy() for k, t in model.state_dict().items()}
    wn.apply_weight_norm(model)
    with torch.no_grad():
        model[0].parametrizations.weight.original1.mul_(4)  # type: ignore[union-attr,index]
        model[0].parametrizations.weight.original0.mul_(-3)  # type: ignore[union-attr,index]
    facts = inspect(model, lr=0.1, reference=tmp_path / "plain.pt").weights[0]
    norms = np.linalg.norm(before["0.weight"], axis=1)
    step = 0.1 * (3 * norms) / (4 * norms) ** 2
    assert facts.step is not None
    assert facts.growth is not None
    assert facts.gain is not None
    assert np.allclose([facts.step.min, facts.step.max], [step.min(), step.max()], rtol=1e-6)
    assert np.allclose(facts.growth, 4, rtol=1e-6)
    assert np.allclose(facts.gain, 3, rtol=1e-6)


def test_totals_count_a_tie_once(tmp_path: Path) -> None:
    """Folding saves one number per row; a tied pair counts once, and its other name is listed, in files too."""
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = wn.apply_weight_norm(nn.Sequential(first, second))
    torch.save(model.state_dict(), tmp_path / "tied.pt")
    for report in (inspect(model), inspect(tmp_path / "tied.pt")):
        assert [(w.name, w.also) for w in report.weights] == [("0.weight", ("1.weight",))]
        assert (report.totals.saved_parameters, report.totals.saved_bytes) == (4, 16)
        assert report.totals.parameters == 4 + 16 + 4 + 4


def test_dead_rows_are_counted() -> None:
    """Rows without direction and rows whose weight is zero are told apart."""
    model = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 4)))
    with torch.no_grad():
        model[0].parametrizations.weight.original1[0] = 0  # type: ignore[union-attr,index]
        model[0].parametrizations.weight.original0[1] = 0  # type: ignore[union-attr,index]
    facts = inspect(model).weights[0]
    assert (facts.zero_rows, facts.dead_rows) == (1, 2)


def test_formulas_in_csv_are_defused(tmp_path: Path) -> None:
    """No cell of text begins as a formula does; numbers below zero stay numbers."""
    names = ["=cmd()", "+1", "-1", "@x", "<script>", "a" * 10_000]
    torch.save({f"{n}.weight": torch.ones(2, 2) for n in names}, tmp_path / "x.pt")
    rows = list(csv.DictReader(io.StringIO(inspect(tmp_path / "x.pt").to_csv())))
    assert len(rows) == len(names)
    assert not [r["name"] for r in rows if r["name"][:1] in "=+-@\t\r"]
    assert max(len(r["name"]) for r in rows) < 300


@pytest.mark.parametrize("width", [40, 80, 160])
def test_a_large_net_fits_the_terminal(width: int) -> None:
    """A table is no wider than the terminal, and many alike weights share a line unless all are asked for."""
    model = wn.apply_weight_norm(nn.Sequential(*(nn.Linear(2, 2) for _ in range(50))))
    texts = []
    for everything in (False, True):
        out = io.StringIO()
        show_weights(inspect(model), everything=everything, console=Console(file=out, width=width))
        assert max(map(len, out.getvalue().splitlines())) <= width
        texts.append(out.getvalue())
    assert len(texts[0].splitlines()) < 60 < len(texts[1].splitlines()) + 10


@pytest.mark.parametrize("against", [False, True])
def test_large_files_are_read_a_weight_at_a_time(tmp_path: Path, against: bool) -> None:
    """600 MB of weights of 15 MB each are looked at, or compared, in a fraction of their size."""
    pytest.importorskip("resource")
    head, at = {}, 0
    for i in range(40):
        for name, shape in ((f"h.{i}.weight_g", [1000, 1]), (f"h.{i}.weight_v", [1000, 3750])):
            size = 4 * shape[0] * shape[1]
            head[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
            at += size
    text = json.dumps(head).encode()
    for name in ("a", "b"):
        with (tmp_path / f"{name}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + at)
    code = (
        "import resource, sys, wnsurgery as wn\n"
        "wn.inspect, wn.compare_weight_norm\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "found = wn.compare_weight_norm(*sys.argv[1:]) if len(sys.argv) > 2 else wn.inspect(sys.argv[1])\n"
        "print(len(found.weights), peak() - before)\n"
    )
    names = ("a", "b") if against else ("a",)
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(tmp_path / f"{n}.safetensors") for n in names)],
        capture_output=True,
        text=True,
        check=True,
    )
    count, kilobytes = map(int, done.stdout.split())
    assert count == 40
    assert kilobytes < 200_000


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    """Each weight adds its bytes, up to all of them, in order."""
    torch.save(
        wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).half())).state_dict(), tmp_path / "a.pt"
    )
    told: list[tuple[int, int]] = []
    wn.inspect(tmp_path / "a.pt", progress=lambda done, whole: told.append((done, whole)))
    assert told == [(48, 64), (64, 64)]
