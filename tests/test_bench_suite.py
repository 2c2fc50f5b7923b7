"""The benchmark suite measures what it says, in full and in part; no figure is judged here."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import wnsurgery as wn
from wnsurgery.bench_models import MODELS
from wnsurgery.bench_surgery import many_layers, one_batch, one_file, start_up
from wnsurgery.cli import cli
from wnsurgery.suite import SuiteReport, SuiteRow, SurgeryRow

SHORT: dict[str, Any] = {"models": ["tiny"], "threads": [1], "repeats": 3, "layers": [], "megabytes": 0}


def test_every_work_by_every_variant() -> None:
    """Each work has a row for each variant and part; plain is its own measure, and parts of a step add up to it."""
    report = wn.bench_suite(**SHORT)
    found = {(r.work, r.part, r.variant) for r in report.rows}
    parts = {"train": ["forward", "backward", "optimizer", "step"], "eval": ["step"], "accumulate": ["step"]}
    variants = ["plain", "torch", "legacy", "ours", "deferred"]
    assert found == {(w, p, v) for w, ps in (parts | {"gan": ["step"]}).items() for p in ps for v in variants}
    assert all(r.ratio == 1 for r in report.rows if r.variant == "plain")
    assert all(r.low <= r.ratio <= r.high and r.milliseconds > 0 and r.faults >= 0 for r in report.rows)
    assert "deferred" in str(report)


@pytest.mark.parametrize("name", MODELS)
def test_nets_are_convertible_and_the_same_every_time(name: str) -> None:
    """Each net comes out alike twice, runs on its input and has weights to convert."""
    if name.endswith(("b256", "b16", "8x256")):
        pytest.skip("the same net as its smaller brother, on a larger batch")
    (first, x), (second, y) = MODELS[name].make(), MODELS[name].make()
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert torch.equal(x, y)
    assert wn.plan_weight_norm(first).sites
    with torch.no_grad():
        assert torch.isfinite(first(x)).all()


def test_surgery_figures() -> None:
    """Applying, copying, loading, folding, files and processes each have ours beside a measure."""
    figures = many_layers(5) | one_batch(3) | one_file(1) | start_up(1)
    works = {work for work, _ in figures}
    assert works == {
        *("apply", "plan", "deepcopy", "load_state_dict", "fold"),
        *("fold file", "data init", "--help", "import"),
    }
    assert all((work, "ours") in figures and seconds > 0 for (work, _), seconds in figures.items())


def test_a_second_process_without_page_faults() -> None:
    """With fault_free each row has a second ratio, measured elsewhere."""
    report = wn.bench_suite(**SHORT | {"works": ["eval"]}, fault_free=True)
    assert all(r.fault_free is not None and r.fault_free > 0 for r in report.rows)


def test_names_that_do_not_exist() -> None:
    """Unknown nets and works, and too few rounds, are errors."""
    for wrong in ({"models": ["tin"]}, {"works": ["sleep"]}, {"repeats": 2}):
        with pytest.raises(wn.SelectionError):
            wn.bench_suite(**SHORT | wrong)


def test_command() -> None:
    """`bench --suite` prints the table or JSON, and its options are refused without it."""
    arguments = ["bench", "--suite", "tiny", "--work", "eval", "--threads", "1", "--repeats", "3"]
    done = CliRunner().invoke(cli, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    rows = json.loads(done.output)["rows"]
    assert [row["variant"] for row in rows] == ["plain", "torch", "legacy", "ours", "deferred"]
    assert "x plain" in CliRunner().invoke(cli, arguments).output
    assert isinstance(CliRunner().invoke(cli, ["bench", "--work", "eval"]).exception, wn.SelectionError | SystemExit)
    assert CliRunner().invoke(cli, ["bench"]).exit_code != 0


def test_mean_overhead_of_several_nets() -> None:
    """The table ends with the mean over nets of how much longer a whole step takes, with and without page faults."""

    def row(net: str, variant: str, ratio: float, free: float, part: str = "step") -> SuiteRow:
        return SuiteRow(net, "train", part, variant, 1, "cpu", 1.0, ratio, ratio, ratio, 0.0, free)

    one = [row("a", "plain", 1.0, 1.0), row("a", "ours", 1.25, 1.5), row("a", "ours", 9.0, 9.0, "forward")]
    two = [row("b", "plain", 1.0, 1.0), row("b", "ours", 0.95, 1.0)]
    printed = str(SuiteReport((*one, *two), (), 3)).splitlines()
    head = next(i for i, line in enumerate(printed) if line.strip().startswith("mean overhead"))
    assert [line.split() for line in printed[head + 1 : -1]] == [["train", "2", "ours", "1", "+0.100", "+0.250"]]
    assert "mean overhead" not in str(SuiteReport(tuple(one), (), 3))


def test_surgery_rows_print() -> None:
    """A row of surgery stands in the table with its measure."""
    report = wn.bench_suite(**SHORT | {"models": [], "layers": [3]})
    assert all(isinstance(row, SurgeryRow) for row in report.surgery)
    assert "x torch" in str(report)
