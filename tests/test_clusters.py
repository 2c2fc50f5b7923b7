"""Nets spread over several processes: trained as on one, folded to the same bits, saved and folded as files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import wnsurgery as wn

HERE = Path(__file__).parent


def run(directory: Path, world: int, cases: str) -> None:
    """Run the cases on a gloo group; every process must end well."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    worker = [sys.executable, str(HERE / "cluster_worker.py"), str(directory)]
    processes = [
        subprocess.Popen(
            [*worker, str(rank), str(world), cases],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(said)


@pytest.mark.parametrize(
    ("world", "cases"),
    [(2, "tensor_parallel,data_parallel,not_finite"), (4, "tensor_parallel,two_dimensional")],
    ids=["2", "4"],
)
def test_tensor_parallel(tmp_path: Path, world: int, cases: str) -> None:
    """Tensor parallel nets convert to the bits of one process, train with its losses and fold to the gathered fold."""
    run(tmp_path, world, cases)


@pytest.mark.filterwarnings("ignore")  # torch.distributed.checkpoint's own
@pytest.mark.parametrize("world", [2, 4])
def test_fully_sharded(tmp_path: Path, world: int) -> None:
    """FSDP2 trains as one process does; shards fold, convert and materialise; their checkpoint folds as a file."""
    run(tmp_path, world, "fully_sharded")
    expected = torch.load(tmp_path / f"expected-{world}.pt", weights_only=True)
    report = wn.fold_checkpoint(tmp_path / f"converted-{world}", tmp_path / "plain.safetensors")
    assert len(report.folded) == 4
    found = {
        k.removeprefix("model."): t for k, t in safetensors.torch.load_file(tmp_path / "plain.safetensors").items()
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
