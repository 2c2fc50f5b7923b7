"""The monitor: its numbers against numpy in float64, both modes, and training it leaves alone."""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import wnsurgery as wn

from nets import TiedLanguageModel

IDS = torch.tensor([[1, 2, 3, 10]])


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()


def rows_of(model: nn.Module, name: str) -> tuple[Any, Any]:
    module, _, parameter = name.rpartition(".")
    entry: Any = model.get_submodule(module).parametrizations
    pair = entry[parameter]
    g, v = (x.detach().double().numpy() for x in (pair.original0, pair.original1))
    return g.reshape(len(v), -1)[:, 0].copy(), v.reshape(len(v), -1).copy()


@pytest.mark.parametrize("mode", ["parametrized", "deferred"])
@pytest.mark.parametrize("magnitude", ["linear", "log"])
def test_numbers_are_those_of_numpy(mode: Any, magnitude: Any) -> None:
    """|g|, ||v||, lr |g| / ||v||^2 and the angle turned are those computed from the parameters, in every mode."""
    torch.manual_seed(0)
    model = wn.apply_weight_norm(TiedLanguageModel(), magnitude=magnitude)
    wn.set_weight_norm_mode(model, mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    with wn.WeightNormMonitor(model, optimizer, every=2) as monitor:
        trained(model, optimizer, 3)
        schedule.step()
        middle = list(monitor.records)
        assert {o.step for o in middle} == {0, 2}
        end = monitor.observe()
    assert monitor.steps == 3
    assert [o.name for o in end] == ["embed.weight", "body.weight"]  # the tie once
    for o in end:
        g, v = rows_of(model, o.name)
        size = np.exp(g) if magnitude == "log" else np.abs(g)
        there = np.linalg.norm(v, axis=1) != 0
        norms = np.linalg.norm(v, axis=1)
        assert o.lr == 0.15
        for found, wanted in ((o.magnitude, size), (o.norm, norms), (o.effective, 0.15 * (size / norms**2)[there])):
            middle_value = np.sort(wanted)[(len(wanted) - 1) // 2]
            assert np.allclose(found or (), [wanted.min(), middle_value, wanted.max()], rtol=1e-6)


@pytest.mark.parametrize("degrees", [0.0, 1e-5, 0.01, 1.0, 90.0, 179.0, 180.0])
@pytest.mark.parametrize("stretch", [1.0, 3.0, 0.5])
def test_known_turns(degrees: float, stretch: float) -> None:
    """A direction turned by a known angle, and stretched, is told to have turned by it."""
    model = wn.apply_weight_norm(nn.Linear(2, 1, bias=False).double())
    v = model.parametrizations.weight.original1  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with wn.WeightNormMonitor(model, optimizer) as monitor, torch.no_grad():
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        v.copy_(v @ torch.tensor([[c, s], [-s, c]], dtype=torch.float64) * stretch)
        found = monitor.observe()[0].angle
    assert found is not None
    assert found.median == pytest.approx(degrees, rel=1e-6, abs=2e-6)


@pytest.mark.parametrize("mode", ["parametrized", "deferred"])
def test_training_is_left_alone(mode: Any) -> None:
    """With a monitor at every step a net ends in the same bits, and nothing of it stays after removal."""
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = wn.set_weight_norm_mode(wn.apply_weight_norm(TiedLanguageModel()), mode)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        if watched:
            with wn.WeightNormMonitor(model, optimizer, every=1) as monitor:
                trained(model, optimizer, 3)
            seen = len(monitor.records)
            trained(model, optimizer, 2)
            assert len(monitor.records) == seen == 8
        else:
            trained(model, optimizer, 5)
        ends.append(copy.deepcopy(model.state_dict()))
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_types_zero_rows_and_foreign_forms(dtype: torch.dtype) -> None:
    """16-bit weights, rows of zeros, frozen v, torch's weight norm and kept axes of any kind are served."""
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Conv1d(2, 3, 2))
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(2, 4, 3), dim=1),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4), dim=None),
        old,
    ).to(dtype)
    model.append(wn.apply_weight_norm(nn.ConvTranspose2d(4, 6, 2, groups=2).to(dtype)))
    v: Any = model[1].parametrizations.weight.original1  # type: ignore[union-attr,index]
    v.requires_grad_(False)
    zeros: Any = model[2].weight_v
    with torch.no_grad():
        zeros[0] = 0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    with wn.WeightNormMonitor(model, optimizer) as monitor:
        found = monitor.observe()
    assert [o.lr for o in found] == [0.5, 0.0, 0.5, 0.5]
    for o in found:
        assert o.angle == (0, 0, 0)
        assert o.effective is not None
        assert all(map(math.isfinite, o.effective))
    assert found[2].norm is not None
    assert found[2].norm.min == 0


def test_file_gets_every_observation(tmp_path: Path) -> None:
    """The CSV has a line per weight and observation at once, defuses names, and replaces nothing unasked."""
    model = nn.Module()
    bad = "=cmd|'/c calc'!A1\n\x1b[2J"
    model.add_module(bad, nn.Linear(2, 2))
    wn.apply_weight_norm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with wn.WeightNormMonitor(model, optimizer, csv=tmp_path / "m.csv", keep=1) as monitor:
        monitor.observe()
        text = (tmp_path / "m.csv").read_text(encoding="utf-8")
        assert len(monitor.records) == 1
    rows = list(csv.DictReader(text.splitlines()))
    assert [r["step"] for r in rows] == ["0", "0"]
    assert [r["angle_max"] for r in rows] == ["", "0.0"]
    assert rows[0]["name"].startswith("'=cmd")
    assert "\x1b" not in text
    with pytest.raises(wn.OutputExistsError):
        wn.WeightNormMonitor(model, optimizer, csv=tmp_path / "m.csv")
    with pytest.raises(wn.OutputError):
        wn.WeightNormMonitor(model, optimizer, csv=tmp_path / "none" / "m.csv")


@pytest.mark.parametrize("there", [False, True])
def test_a_monitor_that_cannot_start_leaves_the_file_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool
) -> None:
    """Whatever fails at the start, an older file stands as it was, a new one does not come, and nothing is left open or
    hooked on."""

    class Full:
        def add_scalar(self, *_: Any) -> None:
            raise OSError("no room")

    class Hookless:
        param_groups: Any = ()

    model = wn.apply_weight_norm(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = tmp_path / "m.csv"
    if there:
        path.write_text("precious")
    with pytest.raises(OSError, match="no room"):
        wn.WeightNormMonitor(model, optimizer, csv=path, tensorboard=Full(), force=True)
    monkeypatch.setattr("wnsurgery.monitor.as_optimizers", lambda *_, **__: [Hookless()])
    with pytest.raises(AttributeError, match="register_step_post_hook"):
        wn.WeightNormMonitor(model, optimizer, csv=path, force=True)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == ([("m.csv", "precious")] if there else [])
    assert not optimizer._optimizer_step_post_hooks


def test_a_file_that_stands_in_the_way_is_told_before_scalars_are_logged(tmp_path: Path) -> None:
    """Where the file exists the writer gets nothing; where the file cannot be written to, it is closed."""
    seen = []

    class Writer:
        def add_scalar(self, *values: Any) -> None:
            seen.append(values)

    model = wn.apply_weight_norm(nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (tmp_path / "m.csv").touch()
    with pytest.raises(wn.OutputExistsError):
        wn.WeightNormMonitor(model, optimizer, csv=tmp_path / "m.csv", tensorboard=Writer())
    assert not seen
    if Path("/dev/full").exists():
        with pytest.raises(wn.OutputError, match="No space"):
            wn.WeightNormMonitor(model, optimizer, csv="/dev/full", force=True)
    assert not optimizer._optimizer_step_post_hooks


def test_scalars_reach_a_writer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A writer gets the medians under the weight's name and stays open; a directory without TensorBoard is an error."""
    import sys

    told = []

    class Writer:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            told.append((tag, value, step))

    model = wn.apply_weight_norm(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with wn.WeightNormMonitor(model, optimizer, tensorboard=Writer()) as monitor:
        monitor.observe()
    assert len(told) == 7
    assert told[0][0] == "weight_norm/magnitude/weight"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(wn.MissingPackageError):
        wn.WeightNormMonitor(model, optimizer, tensorboard=tmp_path)


def test_what_cannot_be_watched_is_an_error() -> None:
    """No weight norm, no optimizer, no steps between: told at once."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(wn.SelectionError):
        wn.WeightNormMonitor(model, optimizer)
    wn.apply_weight_norm(model, optimizer=optimizer)
    for wrong in ({"optimizer": []}, *({"optimizer": optimizer, "every": every} for every in (0, "a", 1.5, None))):
        with pytest.raises(wn.SelectionError):
            wn.WeightNormMonitor(model, **wrong)  # type: ignore[arg-type]
    for keep in (-1, 1.5, "a"):
        with pytest.raises(wn.SelectionError, match="keep must be a whole number, 0 or more"):
            wn.WeightNormMonitor(model, optimizer, keep=keep)  # type: ignore[arg-type]
    for keep, length in ((0, 0), (None, 2)):
        with wn.WeightNormMonitor(model, optimizer, keep=keep) as monitor:
            monitor.observe()
        assert len(monitor.records) == length


@pytest.mark.parametrize("dim", [0, 1, None])
def test_turns_of_kept_axes_of_any_kind(dim: int | None) -> None:
    """Angles over a step are those of the comparison of the two moments, computed from unit vectors, row by row."""
    torch.manual_seed(0)
    model = nn.Sequential(
        wn.apply_weight_norm(nn.Conv1d(3, 4, 2), dim=dim), wn.apply_weight_norm(nn.ConvTranspose2d(4, 6, 2, groups=2))
    )
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with wn.WeightNormMonitor(model, optimizer) as monitor, torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        found = monitor.observe()
    for one, wanted in zip(found, wn.compare_weight_norm(model, before).weights, strict=True):
        assert one.name == wanted.name
        assert np.allclose(one.angle or (), wanted.angle or (0, 0, 0), rtol=1e-5)
        assert min(one.angle or (0,)) > 0.1
