"""Checkpoint directories: Hugging Face's and torch's distributed ones, folded whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import strategies as st
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from wnsurgery import directory
from wnsurgery.errors import (
    InputError,
    OutputError,
    OutputExistsError,
    UnsafeFileError,
    VerificationError,
    WnsurgeryError,
)
from wnsurgery.files import convert_checkpoint, fold_checkpoint
from wnsurgery.inspection import inspect
from wnsurgery.loading import load_model, load_object, load_tensors
from wnsurgery.reparam import compose
from wnsurgery.states import every_tensor
from wnsurgery.stores.dcp import map_distributed
from wnsurgery.stores.staging import Staging, staged
from wnsurgery.surgery import apply_weight_norm
from wnsurgery.verification import verify

A, B = "model-00001-of-00002", "model-00002-of-00002"
SHARDS = (".distcp", ".metadata", ".safetensors", ".index.json")


class Odd:
    """An object of a class that no checkpoint needs."""


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(4, 1, 1, generator=generator), torch.randn(4, 3, 2, generator=generator)


def hub(folder: Path, suffix: str = ".safetensors") -> Path:
    """A sharded directory whose pair is split over its shards."""
    folder.mkdir()
    g, v = pair()
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    a, b = (name.replace("model", stem) + suffix for name in (A, B))
    for name, tensors in ((a, {"c.weight_g": g, "c.bias": torch.ones(4)}), (b, {"c.weight_v": v})):
        if suffix == ".safetensors":
            safetensors.torch.save_file(tensors, folder / name, {"format": "pt"})
        else:
            torch.save(tensors, folder / name)
    index = {"metadata": {"total_size": 0, "more": 1}, "weight_map": {"c.weight_g": a, "c.bias": a, "c.weight_v": b}}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"x": 1}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_directories_are_compared(tmp_path: Path, suffix: str) -> None:
    """With each other and with files, converted or folded, sharded or not; one bit is a difference."""
    shards = hub(tmp_path / "a", suffix)
    fold_checkpoint(shards, tmp_path / "b")
    fold_checkpoint(shards, tmp_path / "b.safetensors")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch.distributed")
        state = safetensors.torch.load_file(tmp_path / "b.safetensors")
        dcp.save({"model": state}, checkpoint_id=str(tmp_path / "dcp"))
    for a, b in (("a", "b"), ("b", "b.safetensors"), ("a", "b.safetensors"), ("a", "dcp"), ("dcp", "b")):
        report = verify(tmp_path / a, tmp_path / b)
        assert report.ok, report
        assert report.weights is not None and {one.name for one in report.weights.tensors} == {"c.weight", "c.bias"}
    state["c.weight"].view(torch.int32)[1, 2, 1] += 1
    safetensors.torch.save_file(state, tmp_path / "c.safetensors")
    report = verify(shards, tmp_path / "c.safetensors")
    assert not report.ok
    assert "c.weight" in str(report)
    with pytest.raises(VerificationError):
        report.raise_for_status()


def test_a_directory_that_holds_no_weights_is_not_compared(tmp_path: Path) -> None:
    folder = hub(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="without weights"):
        verify(folder, tmp_path / "empty")


def conv() -> torch.nn.Module:
    return torch.nn.Conv1d(3, 4, 2)


def test_the_model_of_a_directory(tmp_path: Path) -> None:
    """A directory stands for its state dict wherever a file does."""
    folder, x = hub(tmp_path / "a"), torch.randn(2, 3, 9)
    model: Any = load_model(folder, arch=conv)
    assert torch.equal(model.weight, compose(*pair()))
    assert load_tensors(folder).keys() == load_object(folder).keys() >= {"c.weight_g", "c.weight_v", "c.bias"}
    report = verify(folder, model, x, arch=conv)
    assert report.ok
    assert report.outputs
    assert inspect(folder, arch="test_directories:conv").totals.parameters == 28
    with pytest.raises(InputError, match="do not fit the model"):
        load_model(folder, arch=lambda: torch.nn.Conv1d(5, 4, 2))
    with pytest.raises(InputError, match="holds tensors but no module"):
        load_model(folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_pair_split_over_shards_folds(tmp_path: Path, suffix: str) -> None:
    """The weight goes where its direction was, the index is right, everything else is carried along."""
    before = contents(hub(tmp_path / "a", suffix))
    report = fold_checkpoint(tmp_path / "a", tmp_path / "b")
    after = contents(tmp_path / "b")
    assert after.keys() == before.keys()
    assert after["config.json"] == before["config.json"]
    assert "the class that config.json names builds plain layers" in report.assumptions[0]
    assert after["tokenizer/vocab.txt"] == b"a"
    index = json.loads(next(data for name, data in after.items() if name.endswith("index.json")))
    assert index["metadata"] == {"total_size": 4 * (24 + 4), "more": 1}
    load = safetensors.torch.load_file if suffix == ".safetensors" else torch.load
    for key, name in index["weight_map"].items():
        assert key in load(tmp_path / "b" / name)
    assert torch.equal(load(tmp_path / "b" / index["weight_map"]["c.weight"])["c.weight"], compose(*pair()))
    assert contents(tmp_path / "a") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_there_and_back_and_the_same_bytes(tmp_path: Path) -> None:
    """Converting the folded directory and folding it again restores it, with the same manifest anywhere."""
    fold_checkpoint(hub(tmp_path / "a"), tmp_path / "b", manifest=tmp_path / "b.json")
    fold_checkpoint(tmp_path / "a", tmp_path / "other name", manifest=tmp_path / "o.json")
    assert contents(tmp_path / "b") == contents(tmp_path / "other name")
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "o.json").read_bytes()
    convert_checkpoint(tmp_path / "b", tmp_path / "c", layout="legacy")
    fold_checkpoint(tmp_path / "c", tmp_path / "d")
    assert contents(tmp_path / "d") == contents(tmp_path / "b")
    assert [w.name for w in inspect(tmp_path / "c").weights] == ["c.weight"]


def test_a_single_file_directory_and_a_file_out_of_a_directory(tmp_path: Path) -> None:
    """One weight file needs no index; an output with a file's suffix takes all shards into one file."""
    hub(tmp_path / "a")
    fold_checkpoint(tmp_path / "a", tmp_path / "one.safetensors")
    single = tmp_path / "single"
    single.mkdir()
    (tmp_path / "one.safetensors").rename(single / "model.safetensors")
    convert_checkpoint(single, tmp_path / "wn")
    assert sorted(contents(tmp_path / "wn")) == ["model.safetensors"]
    fold_checkpoint(tmp_path / "wn", single, force=True)
    assert torch.equal(safetensors.torch.load_file(single / "model.safetensors")["c.weight"], compose(*pair()))


def test_a_file_out_of_a_directory_replaces_no_shard_of_it(tmp_path: Path) -> None:
    """One file for all shards, put where one of them lies, would be the end of the input: force is no reason."""
    source = hub(tmp_path / "a")
    before = contents(source)
    with pytest.raises(OutputExistsError):
        fold_checkpoint(source, source / f"{A}.safetensors", force=True)
    assert contents(source) == before


def link_shard(folder: Path) -> None:
    (folder / f"{A}.safetensors").rename(folder.parent / "elsewhere")
    (folder / f"{A}.safetensors").symlink_to(folder.parent / "elsewhere")


def renamed_in_index(name: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        table = json.loads(path.read_text())
        table["weight_map"]["c.bias"] = name
        path.write_text(json.dumps(table))

    return change


HOSTILE = {
    "index leads up": (renamed_in_index("../secret.safetensors"), UnsafeFileError),
    "index is absolute": (renamed_in_index("/etc/passwd"), UnsafeFileError),
    "index names no string": (renamed_in_index(["x"]), UnsafeFileError),
    "index names nothing": (renamed_in_index("none.safetensors"), InputError),
    "index names the wrong shard": (renamed_in_index(f"{B}.safetensors"), InputError),
    "shard is a link": (link_shard, UnsafeFileError),
    "other file is a link": (lambda d: (d / "link").symlink_to("/etc/passwd"), UnsafeFileError),
    "a fifo": (lambda d: os.mkfifo(d / "fifo"), InputError),
    "index is no json": (lambda d: (d / "model.safetensors.index.json").write_text("{"), InputError),
    "index is no table": (lambda d: (d / "model.safetensors.index.json").write_text("[]"), InputError),
    "shard is missing": (lambda d: (d / f"{A}.safetensors").unlink(), InputError),
    "shard is cut": (lambda d: os.truncate(d / f"{A}.safetensors", 40), InputError),
    "shard is empty": (lambda d: os.truncate(d / f"{A}.safetensors", 0), InputError),
    "same tensor twice": (
        lambda d: safetensors.torch.save_file(
            {"c.bias": torch.ones(1), "c.weight_v": pair()[1]}, d / f"{B}.safetensors"
        ),
        InputError,
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_and_damaged_directories_are_refused(tmp_path: Path, case: str) -> None:
    """Nothing outside the directory is read, damage is an input error, no output and no temporary is left."""
    change, error = HOSTILE[case]
    change(hub(tmp_path / "a"))
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(error) as caught:
        fold_checkpoint(tmp_path / "a", tmp_path / "b")
    assert caught.value.exit_code == (4 if error is UnsafeFileError else 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_output_directories_are_protected(tmp_path: Path) -> None:
    """An existing directory, the input itself, and directories inside each other are only written when asked."""
    source = hub(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "precious").write_text("x")
    for output in (tmp_path / "b", source):
        with pytest.raises(OutputExistsError):
            fold_checkpoint(source, output)
    with pytest.raises(OutputError, match="in the other"):
        fold_checkpoint(source, source / "inner")
    assert contents(tmp_path / "b") == {"precious": b"x"}
    (tmp_path / "b" / "precious").rename(tmp_path / "b" / "model.safetensors")
    fold_checkpoint(source, tmp_path / "b", force=True)
    fold_checkpoint(source, source, in_place=True)
    assert contents(source) == contents(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("name", ["precious.txt", "tokenizer/precious", "link", ".git/config"])
def test_force_replaces_nothing_but_checkpoints(name: str, tmp_path: Path) -> None:
    """A directory with anything in it that no output has is not replaced, whatever is asked for."""
    source = hub(tmp_path / "a")
    path = tmp_path / "b" / name
    path.parent.mkdir(parents=True)
    if name == "link":
        path.symlink_to(tmp_path)
    else:
        path.write_text("x")
    with pytest.raises(OutputExistsError, match=f"holds {name}, which is no part of a checkpoint"):
        fold_checkpoint(source, tmp_path / "b", force=True)
    assert path.is_symlink() or path.read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_manifest_in_the_directory_that_is_replaced(tmp_path: Path) -> None:
    """The manifest cannot lie in a directory that comes as a whole; nothing is written then."""
    source = hub(tmp_path / "a")
    before = contents(source)
    with pytest.raises(InputError, match="lies in the output"):
        fold_checkpoint(source, source, in_place=True, manifest=source / "manifest.json")
    assert contents(source) == before


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_an_index_with_numbers_that_json_has_not(number: str, tmp_path: Path) -> None:
    """Such an index is damaged; it is not passed on as something that other readers refuse."""
    source = hub(tmp_path / "a")
    index = source / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"more": 1', f'"more": {number}'))
    with pytest.raises(InputError, match=f"damaged index.*{number} is no number"):
        fold_checkpoint(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def kill_fold(patch: str, source: Path, output: Path) -> None:
    """Fold a directory in a process that kills itself by what a patch of `wnsurgery.directory`, called d, does."""
    code = (
        f"import os, signal, sys, wnsurgery.directory as d\n{patch}\n"
        "from wnsurgery.files import fold_checkpoint\nfold_checkpoint(sys.argv[1], sys.argv[2])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, source, output], check=False, cwd=Path.cwd())
    assert done.returncode == -signal.SIGKILL


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """After SIGKILL the old output stands; --resume keeps what is complete and ends with the same bytes."""
    source = hub(tmp_path / "a")
    fold_checkpoint(source, tmp_path / "expected")
    kill_fold("d._copier = lambda path: (lambda file: os.kill(os.getpid(), signal.SIGKILL))", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    staged = tmp_path / ".out.partial" / "payload"
    stamp = (staged / f"{B}.safetensors").stat().st_mtime_ns
    time.sleep(0.01)
    fold_checkpoint(source, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert (tmp_path / "out" / f"{B}.safetensors").stat().st_mtime_ns == stamp
    assert not staged.parent.exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_a_run_killed_once_its_output_is_in_place(exchange: bool, tmp_path: Path) -> None:
    """The next run with --resume does not take the old output, which is in the staging directory now, for its own."""
    source, out = hub(tmp_path / "a"), tmp_path / "out"
    out.mkdir()
    for name in (A, B):
        safetensors.torch.save_file({"old": torch.ones(3)}, out / f"{name}.safetensors")
    fold_checkpoint(source, tmp_path / "expected")
    code = (
        "import os, signal, sys, wnsurgery.stores.staging as s\nfrom wnsurgery.files import fold_checkpoint\n"
        "s._Root.remove = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
        "rename = s._rename\n"
        "if sys.argv[3] == 'False':\n    s._rename = lambda a, b, flag: flag != s._EXCHANGE and rename(a, b, flag)\n"
        "fold_checkpoint(sys.argv[1], sys.argv[2], force=True, resume=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, source, out, str(exchange)], check=False, cwd=Path.cwd())
    assert done.returncode == -signal.SIGKILL
    assert contents(out) == contents(tmp_path / "expected")
    fold_checkpoint(source, out, force=True, resume=True)
    assert contents(out) == contents(tmp_path / "expected")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "out", "expected"}


def test_a_run_killed_between_the_two_renames(tmp_path: Path) -> None:
    """Where directories cannot be exchanged, the next run puts the old output back before it does anything."""
    old = tmp_path / ".out.partial" / "old"
    old.mkdir(parents=True)
    (old / "x").write_bytes(b"1")
    with pytest.raises(OutputExistsError), staged(tmp_path / "out", "work", force=False, resume=False):
        assert contents(tmp_path / "out") == {"x": b"1"}
    assert contents(tmp_path / "out") == {"x": b"1"}
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_a_file_whose_comparison_failed_is_not_kept_for_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large weight is compared while it is written; its file is complete once that is done."""
    source = tmp_path / "in"
    source.mkdir()
    v = torch.randn(600, 700, generator=torch.Generator().manual_seed(1))
    tensors = {"a.weight_g": torch.ones(600, 1), "a.weight_v": v}
    safetensors.torch.save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text("{}", encoding="utf-8")

    def broken(*_: object, **__: object) -> float:
        raise RuntimeError("cannot compare")

    with monkeypatch.context() as patch:
        patch.setattr("wnsurgery.checkpoint.ulps_apart", broken)
        with pytest.raises(RuntimeError, match="cannot compare"):
            fold_checkpoint(source, tmp_path / "out", resume=True)
    report = fold_checkpoint(source, tmp_path / "out", resume=True)
    assert report.proof is not None and report.proof.max_ulp is not None


@pytest.mark.parametrize(("first", "then"), [({"zero_norm": "zero"}, {"zero_norm": "nan"}), ({}, {"magnitude": "log"})])
def test_a_run_with_other_options_is_other_work(
    first: dict[str, Any], then: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run with other values for new weights left behind is not kept."""
    source = hub(tmp_path / "a")
    _, v = pair()
    v[1] = 0 if first else 1
    safetensors.torch.save_file({"c.weight_v": v}, source / f"{B}.safetensors", {"format": "pt"})

    def broken(*_: object) -> Any:
        raise OutputError("full")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="full"):
        patch.setattr(directory, "_copier", lambda _: broken)
        fold_checkpoint(source, tmp_path / "out", resume=True, **first)
    assert (tmp_path / ".out.partial" / "payload" / f"{B}.safetensors").exists()
    fold_checkpoint(source, tmp_path / "out", resume=True, **then)
    fold_checkpoint(source, tmp_path / "expected", **then)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_writer_does_not_make_the_directory_anew(tmp_path: Path) -> None:
    """Where the process that made the staging directory has removed it, another one's file is an error."""
    staging = Staging(tmp_path / ".out.partial" / "payload")
    for name in ("x", "deep/x"):
        with pytest.raises(OutputError, match="No such file"), staging.file(name):
            pass
    with pytest.raises(OutputError, match="No such file"):
        staging.directory("deep/empty")
    assert not list(tmp_path.iterdir())


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    """While one run writes a directory, a second one is refused and the first is not disturbed."""
    source = hub(tmp_path / "a")
    with staged(tmp_path / "b", "work", force=False, resume=False) as staging:
        with pytest.raises(OutputError, match="another run"):
            fold_checkpoint(source, tmp_path / "b")
        with staging.file("x") as file:
            file.write(b"1")
    assert contents(tmp_path / "b") == {"x": b"1"}


def test_a_lock_on_what_is_no_longer_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends takes its lock's file with it, and another may have made one since: that is not locked."""
    real = fcntl.flock

    def slow(handle: int, operation: int) -> None:
        lock = tmp_path / ".out.partial" / "lock"
        lock.unlink()
        lock.touch()
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    with pytest.raises(OutputError, match="another run"), staged(tmp_path / "out", "work", force=False, resume=False):
        pass
    assert not (tmp_path / "out").exists()


def test_what_other_work_left_is_not_resumed(tmp_path: Path) -> None:
    """A run goes on with the files of one broken off only where both do the same work."""
    from wnsurgery.stores.staging import staged

    for work, there in (("one", False), ("one", True), ("two", False)):
        with (
            contextlib.suppress(KeyboardInterrupt),
            staged(tmp_path / "b", work, force=False, resume=True) as staging,
        ):
            assert staging.has("a") == there
            with staging.file("a") as file:
                file.write(b"1")
            raise KeyboardInterrupt
    assert not (tmp_path / "b").exists()


def test_a_run_that_ends_does_not_clear_up_after_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock goes last, so that a run which starts meanwhile is refused or keeps its files."""
    out = tmp_path / "out"
    remove, second = os.unlink, contextlib.ExitStack()
    begun = []

    def meanwhile(path: Any, *args: Any, **options: Any) -> None:
        remove(path, *args, **options)
        if Path(path).name == "lock" and not begun:
            begun.append(second.enter_context(staged(out, "work", force=True, resume=False)))
            with begun[0].file("x") as file:
                file.write(b"2")

    for name in ("unlink", "remove"):
        monkeypatch.setattr(os, name, meanwhile)
    monkeypatch.setattr(Path, "unlink", meanwhile)  # Python 3.10 looked it up when it started
    with second:
        with staged(out, "work", force=False, resume=False) as staging:
            with staging.file("x") as file:
                file.write(b"1")
            with staging.file("y") as file:
                file.write(b"1")
        assert contents(out) == {"x": b"1", "y": b"1"}
    assert begun
    assert contents(out) == {"x": b"2"}
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_a_file_that_goes_while_the_directory_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory takes its place with all its files or not at all."""
    source = hub(tmp_path / "a")
    write = directory._write_all

    def losing(staging: Any, *rest: Any) -> None:
        write(staging, *rest)
        (staging.payload / "config.json").unlink()

    monkeypatch.setattr(directory, "_write_all", losing)
    with pytest.raises(OutputError, match="came or went"):
        fold_checkpoint(source, tmp_path / "b")
    assert {p.name for p in tmp_path.iterdir()} == {"a"}


# torch's distributed checkpoints -------------------------------------------------------------------------


@pytest.fixture
def distributed(tmp_path: Path) -> Path:
    """A directory that torch wrote, with nesting, a number and optimizer state."""
    g, v = pair()
    state = {"model": {"c.weight_g": g, "c.weight_v": v, "c.bias": torch.ones(4)}, "epoch": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=str(tmp_path / "dcp"))
    return tmp_path / "dcp"


def test_a_run_killed_between_data_and_metadata_goes_on(distributed: Path, tmp_path: Path) -> None:
    """The file that says where each tensor begins is written though an earlier run wrote the tensors."""
    fold_checkpoint(distributed, tmp_path / "expected")
    kill_fold("d._metadata = lambda *_: os.kill(os.getpid(), signal.SIGKILL)", distributed, tmp_path / "out")
    (data,) = (tmp_path / ".out.partial" / "payload").glob("*.distcp")
    stamp = data.stat().st_mtime_ns
    time.sleep(0.01)
    fold_checkpoint(distributed, tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert (tmp_path / "out" / data.name).stat().st_mtime_ns == stamp


def test_a_distributed_checkpoint_folds_to_one_torch_loads(distributed: Path, tmp_path: Path) -> None:
    """torch's own reader finds the folded weight, the bias and the number in the new directory."""
    fold_checkpoint(distributed, tmp_path / "out")
    state: dict[str, Any] = {"model": {"c.weight": torch.zeros(4, 3, 2), "c.bias": torch.zeros(4)}, "epoch": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=str(tmp_path / "out"))
    assert torch.equal(state["model"]["c.weight"], compose(*pair()))
    assert torch.equal(state["model"]["c.bias"], torch.ones(4))
    assert state["epoch"] == 3
    report = fold_checkpoint(distributed, tmp_path / "out.safetensors")
    assert any("epoch" in text for text in report.warnings)
    assert torch.equal(
        safetensors.torch.load_file(tmp_path / "out.safetensors")["model.c.weight"], state["model"]["c.weight"]
    )


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["hub", "distributed"])
def test_everything_beside_the_weights_is_carried_along(
    kind: str, in_place: bool, distributed: Path, tmp_path: Path
) -> None:
    """Files beside and below the weights, empty directories and executable bits are in the output as in the input."""
    source = distributed if kind == "distributed" else hub(tmp_path / "hub")
    (source / "deep" / "empty").mkdir(parents=True)
    torch.save({"epoch": 3}, source / "meta.pt")
    (source / "deep" / "notes.txt").write_text("words")
    (source / "run.sh").write_text("#!/bin/sh")
    (source / "run.sh").chmod(0o755)
    kept = {n: data for n, data in contents(source).items() if not n.endswith(SHARDS)}
    assert len(kept) >= 3
    target = source if in_place else tmp_path / "out"
    fold_checkpoint(source, target, in_place=in_place)
    assert contents(target).items() >= kept.items()
    assert (target / "deep" / "empty").is_dir()
    if os.name == "posix":
        assert [os.access(target / name, os.X_OK) for name in ("run.sh", "meta.pt")] == [True, False]
    assert inspect(target)


def test_objects_in_a_distributed_checkpoint_are_refused_without_a_hint_that_leads_nowhere(tmp_path: Path) -> None:
    """A directory takes no trust_pickle, so its refusal does not recommend it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"w": torch.ones(2, 2), "odd": Odd()}, checkpoint_id=str(tmp_path / "dcp"))
    with pytest.raises(UnsafeFileError, match="refused") as caught:
        fold_checkpoint(tmp_path / "dcp", tmp_path / "out")
    assert caught.value.hint == "save the checkpoint without odd"


def test_tensors_in_several_chunks_are_put_together(distributed: Path, tmp_path: Path) -> None:
    """What several ranks wrote is one tensor; chunks that overlap or leave a gap are damage."""
    from torch.distributed.checkpoint import metadata as m
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    whole = torch.arange(12.0).reshape(4, 3)
    folder = tmp_path / "chunks"
    folder.mkdir()

    def write(second: int) -> None:
        chunks, places, data = [], {}, b""
        for rank, (start, stop) in enumerate(((0, 2), (second, second + 2))):
            torch.save(whole[start:stop].clone(), tmp_path / "part")
            part = (tmp_path / "part").read_bytes()
            offset, size = torch.Size([start, 0]), torch.Size([stop - start, 3])
            chunks.append(m.ChunkStorageMetadata(offset, size))
            places[m.MetadataIndex("w", offset, rank)] = _StorageInfo("__0_0.distcp", len(data), len(part))
            data += part
        (folder / "__0_0.distcp").write_bytes(data)
        about = m.TensorStorageMetadata(m.TensorProperties(), torch.Size([4, 3]), chunks)
        (folder / ".metadata").write_bytes(pickle.dumps(m.Metadata({"w": about}, storage_data=places)))

    write(2)
    with pytest.raises(InputError, match="chunks"):
        write(1)
        map_distributed(folder)
    write(2)
    convert_checkpoint(folder, tmp_path / "out.safetensors", include="w", layout="legacy")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out.safetensors")["w_v"][1:], whole[1:])


class Calls:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_weights_are_read_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weights file whose pickle calls anything is refused with exit code 4 and its name, and has no effect."""
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    torch.save({"c.weight": torch.ones(2, 2), "x": Calls()}, "a/pytorch_model.bin")
    for job in (lambda: fold_checkpoint("a", "out"), lambda: inspect("a"), lambda: verify("a", "a")):
        with pytest.raises(UnsafeFileError, match=r"pytorch_model\.bin: refused, its pickle would run posix\.system"):
            job()
    torch.save(torch.nn.Linear(2, 2), "a/pytorch_model.bin")
    with pytest.raises(InputError, match="not a file of plain tensors"):
        fold_checkpoint("a", "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_metadata_is_read_as_data(distributed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle that calls anything is refused with exit code 4 and has no effect."""
    monkeypatch.chdir(tmp_path)
    (distributed / ".metadata").write_bytes(pickle.dumps(Calls()))
    with pytest.raises(UnsafeFileError, match="system"):
        fold_checkpoint(distributed, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\x0f", b"p268435455\n"], ids=["binary", "text"])
def test_metadata_that_asks_for_memory_out_of_proportion_is_damaged(distributed: Path, put: bytes) -> None:
    """pickle would make a table of two gigabytes before it sees that there is one object."""
    (distributed / ".metadata").write_bytes(b"\x80\x02]" + put + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="out of all proportion"):
        map_distributed(distributed)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


@hypothesis.settings(
    max_examples=400, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    changes=st.lists(st.tuples(st.booleans(), st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=5)
)
def test_mutated_distributed_checkpoints_raise_our_errors(distributed: Path, changes: Any) -> None:
    """Whatever bytes of the metadata or the data are changed, the reader returns or raises an error of ours."""
    files = {True: distributed / ".metadata", False: distributed / "__0_0.distcp"}
    before = {which: path.read_bytes() for which, path in files.items()}
    try:
        for which, place, value in changes:
            data = bytearray(files[which].read_bytes())
            data[int(place * len(data))] = value
            files[which].write_bytes(data)
        with contextlib.suppress(WnsurgeryError):
            map_distributed(distributed).source.close()
    finally:
        for which, data in before.items():
            files[which].write_bytes(data)


@pytest.mark.parametrize("form", ["numbers", "names", "flat names"])
def test_optimizer_state_in_a_distributed_checkpoint_goes_with_its_parameters(tmp_path: Path, form: str) -> None:
    """What an optimizer kept for folded halves is dropped and it is said, in each form torch saves; the rest stays."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    apply_weight_norm(model, include="0")
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    if form != "numbers":
        options = StateDictOptions(flatten_optimizer_state_dict=form == "flat names")
        state = get_optimizer_state_dict(model, optimizer, options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": model.state_dict(), "optim": state, "step": 3}, checkpoint_id=str(tmp_path / "dcp"))
    report = fold_checkpoint(tmp_path / "dcp", tmp_path / "out")
    assert any("2 of 5 parameters were replaced" in text for text in report.warnings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(tmp_path / "out", tmp_path / "out.pt")
    made = torch.load(tmp_path / "out.pt", weights_only=True)
    assert set(made["model"]) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    kept = [t for t in every_tensor(made["optim"]) if t[0].endswith("exp_avg")]
    moments = {tuple(t.shape) for _, t in kept}
    assert len(kept) == 3
    assert moments == {(4,), (2, 4), (2,)}
    assert made["step"] == 3
    fold_checkpoint(tmp_path / "dcp", tmp_path / "whole.pt")
    assert set(torch.load(tmp_path / "whole.pt", weights_only=True)) == {"model", "optim", "step"}
