"""Mutated checkpoints: the damage of fuzz.py, a fixed number of times for each kind of file."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest
from fuzz import samples, trial

KINDS = ["zip.pt", "old.pth", "module.pt", "flat.safetensors", "hub", "dcp"]
TRIALS = 1700


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One small checkpoint of each kind."""
    return {path.name: path for path in samples(tmp_path_factory.mktemp("samples"))}


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_checkpoints_end_with_a_result_or_an_error_of_ours(
    made: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Fold, convert and inspect never let another exception out, take long, or leave anything behind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch about shares it will not write again; nothing a mutation changes
        came = {trial(tmp_path, made[kind], random.Random(seed)) for seed in range(TRIALS)}
    assert {"done", "exit code 3"} <= came
