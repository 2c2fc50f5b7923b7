"""Deployment figures: every way to run a net stands in the report, measured or with the reason why not."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from wnsurgery.deployment import bench_deployment
from wnsurgery.errors import ExportError
from wnsurgery.report import to_jsonable
from wnsurgery.surgery import apply_weight_norm, is_weight_normed


def test_every_way_is_measured_in_turns() -> None:
    """Times, spread, start, file size and memory are there, and the model is as it was."""
    model = apply_weight_norm(nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 8))).train()
    report = bench_deployment(model, torch.randn(2, 128), repeats=4, compiled=False)
    assert is_weight_normed(model)
    assert model.training
    rows = {(row.variant, row.device): row for row in report.rows}
    for variant in ("torch plain", "torch weight norm", "onnxruntime folded", "onnxruntime unfolded"):
        row = rows[variant, "cpu"]
        assert row.milliseconds is not None
        assert row.low is not None
        assert row.high is not None
        assert 0 < row.low <= row.milliseconds <= row.high
        assert row.note == ""
        assert variant in str(report)
    assert rows["torch plain", "cpu"].ratio == 1.0
    folded, unfolded = (rows[f"onnxruntime {kind}", "cpu"] for kind in ("folded", "unfolded"))
    assert folded.file_bytes is not None
    assert unfolded.file_bytes is not None
    assert 128 * 256 * 4 < folded.file_bytes < unfolded.file_bytes
    assert folded.start is not None
    data = json.loads(json.dumps(to_jsonable(report), allow_nan=False))
    assert len(data["rows"]) == len(report.rows)


def test_a_compiler_that_fails_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be compiled, or exported, is said so; the rest is measured."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svd(self.layer(x))[1]

    def broken(net: nn.Module) -> object:
        def call(*_: object) -> None:
            raise RuntimeError("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    report = bench_deployment(Odd(), torch.randn(4, 4), repeats=3)
    notes = {row.variant: row.note for row in report.rows if row.device == "cpu"}
    assert "no compiler here" in notes["torch.compile"]
    assert notes["onnxruntime folded"]
    assert notes["torch plain"] == ""
    assert "no compiler here" in str(report)


def test_inputs_that_do_not_fit_are_an_error() -> None:
    """Nothing is timed that does not run."""
    with pytest.raises(ExportError):
        bench_deployment(nn.Linear(3, 2), torch.ones(1, 4), repeats=3)
