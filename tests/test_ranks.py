"""Initialisation over the ranks of torch.distributed: the same g and b everywhere, as one process would set them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import wnsurgery as wn

from rank_worker import made

HERE = Path(__file__).parent


def run(directory: Path, world: int, case: str) -> list[dict[str, Any]]:
    """The results of every rank."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    arguments = [
        [sys.executable, str(HERE / "rank_worker.py"), str(directory), str(r), str(world), case] for r in range(world)
    ]
    processes = [
        subprocess.Popen(a, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for a in arguments
    ]
    try:
        said = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(said)
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(world)]


def expected(name: str) -> dict[str, torch.Tensor]:
    """What one process makes of all batches concatenated."""
    model, batches = made(name)
    wn.data_dependent_init(model, torch.cat(batches))
    return {n: p.detach() for n, p in model.named_parameters()}


def assert_agree(found: list[dict[str, torch.Tensor]], name: str) -> None:
    """All ranks equal to the bit, and to the single process within 1e-5."""
    for n, value in expected(name).items():
        assert all(torch.equal(rank[n], found[0][n]) for rank in found), n
        unit = max(1.0, value.abs().max().item()) if n.endswith("bias") else value.abs().max().item()
        assert torch.allclose(found[0][n], value, rtol=1e-5, atol=1e-5 * unit), n


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_agree_with_one_process(tmp_path: Path, world: int) -> None:
    """1, 2 and 4 processes with uneven numbers of batches, one of them with none: bit-equal, one forward per batch."""
    results = run(tmp_path, world, "plain,wrapped" if world > 1 else "plain")
    for name in ("branches", "small"):
        for memory in ("spill", "recompute"):
            assert_agree([r["plain"][f"{name} {memory}"] for r in results], name)
            assert all(r["plain"][f"{name} {memory} calls"] == 0 for r in results)
    if world > 1:
        assert_agree([r["wrapped"]["ddp"] for r in results], "branches")


def test_an_error_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    """A batch that fails, data that cannot be read, NaN, no data at all, and other layers: raised everywhere."""
    first, last = (r["failing"]["messages"] for r in run(tmp_path, 2, "failing"))
    assert "forward failed on batch 2" in last["forward"]
    assert first["forward"] == f"rank 1: {last['forward']}"
    assert first["data"] == f"rank 1: {last['data']}"
    assert "reading batch 1" in last["data"]
    assert "not finite" in first["nan"]
    assert "not finite" in last["nan"]
    assert first["empty"] == last["empty"]
    assert "gives no batch" in first["empty"]
    assert "different weight-normalized layers" in first["models"]
    assert "different weight-normalized layers" in last["models"]


def test_fully_sharded_models(tmp_path: Path) -> None:
    """FSDP2 over two ranks, also where one has no batch: the sharded g and b are those of a single process."""
    results = run(tmp_path, 2, "sharded,alone")
    for key in results[0]["sharded"]:
        assert_agree([r["sharded"][key] for r in results], "small")


def test_groups_that_are_not_there() -> None:
    """Asking for a group without torch.distributed is a SelectionError; saying nothing is not."""
    model, batches = made("small")
    with pytest.raises(wn.SelectionError, match="not initialised"):
        wn.data_dependent_init(copy.deepcopy(model), batches, process_group=True)
    assert wn.data_dependent_init(model, batches, process_group=False).batches == 7
