"""Nets spread over several processes: trained as on one, folded to the same bits, saved and folded as files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

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


@pytest.mark.parametrize("world", [2, 4])
def test_surgery_under_fully_shard(tmp_path: Path, world: int) -> None:
    """Converting and folding in place under FSDP2, before and after it has run: bits and losses of one process."""
    run(tmp_path, world, "surgery_on_shards,ties_on_shards,tools_on_shards,refusals_on_shards")


# Files ---------------------------------------------------------------------------------------------------


def torchrun(arguments: list[str], world: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "wnsurgery", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=150,
    )


def shards(folder: Path) -> Path:
    """A directory of 5 files with their index; each magnitude lies in another file than its direction."""
    torch.manual_seed(0)
    state = wn.apply_weight_norm(nn.Sequential(*[nn.Linear(30 + i, 31 + i) for i in range(9)])).state_dict()
    state = {k: v * 1.25 if k.endswith("original0") else v.clone() for k, v in state.items()}
    folder.mkdir()
    names = [f"model-{i:05}-of-00005.safetensors" for i in range(1, 6)]
    owners = {key: names[i % 5] for i, key in enumerate(state)}
    for name in names:
        part = {k: v for k, v in state.items() if owners[k] == name}
        safetensors.torch.save_file(part, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": owners}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_fold_one_directory(tmp_path: Path, world: int) -> None:
    """`torchrun -m wnsurgery fold` shares the files and gives the bytes of one process, one report and one manifest."""
    source = shards(tmp_path / "source")
    alone = wn.fold_checkpoint(source, tmp_path / "alone", manifest=tmp_path / "alone.json")
    together = ["fold", str(source), "-o", str(tmp_path / "together"), "--manifest", str(tmp_path / "together.json")]
    done = torchrun([*together, "--json"], world)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
    assert (tmp_path / "together.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
    report = json.loads(done.stdout)
    assert len(report["steps"]) == len(alone.folded) == 9
    assert alone.proof is not None
    assert report["proof"]["max_ulp"] == alone.proof.max_ulp
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["source", "alone", "together", "alone.json", "together.json"]
    )


@pytest.mark.parametrize("case", ["failing_fold", "failing_first"])
def test_an_error_in_one_process_leaves_nothing(case: str, tmp_path: Path) -> None:
    """Where one of several processes fails at its share, all fail, and neither output nor litter is left."""
    source = shards(tmp_path / "source")
    run(tmp_path, 2, case)
    left = {p.name for p in tmp_path.iterdir() if not p.name.startswith("store")}
    assert left == {"source"}, source


def test_several_processes_fold_one_file(tmp_path: Path) -> None:
    """Where the output is one file, the first process writes it and all return its report, or its error."""
    source = shards(tmp_path / "source")
    wn.fold_checkpoint(source, tmp_path / "alone.safetensors")
    wn.convert_checkpoint(tmp_path / "alone.safetensors", tmp_path / "converted.safetensors")
    run(tmp_path, 2, "folded_file")
    for name in ("file", "whole"):
        first, second = ((tmp_path / f"store-{name}-{rank}").read_text() for rank in range(2))
        assert f"{name}.safetensors" in first
        assert first == second
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
    left = {p.name for p in tmp_path.iterdir() if not p.name.startswith("store")}
    files = {f"{name}.safetensors" for name in ("alone", "converted", "file", "whole")}
    assert left == {"source"} | files
