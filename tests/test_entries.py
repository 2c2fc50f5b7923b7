"""One state dict or module out of a checkpoint that holds more: `entry`, and what goes into `.safetensors` alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import wnsurgery as wn
from wnsurgery.cli import main
from wnsurgery.errors import InputError, SelectionError, VerificationError
from wnsurgery.loading import load_object
from wnsurgery.states import every_tensor
from wnsurgery.stores import map_store


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(8, 1))


def legacy_net(seed: int = 0) -> nn.Sequential:
    made = net(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(made[0])
        nn.utils.weight_norm(made[2])
    return made


def plain(seed: int = 0) -> dict[str, torch.Tensor]:
    """The plain weights of `legacy_net`, by torch's own removal."""
    made = legacy_net(seed)
    for layer in made.modules():
        if hasattr(layer, "weight_g"):
            nn.utils.remove_weight_norm(layer)
    return dict(made.state_dict())


def assert_same(tensors: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(tensors[key], value, rtol=1e-6, atol=1e-8)


def optimizer_of(model: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


WRAPPED = {
    "alone": (lambda model: {"generator": model.state_dict()}, ()),
    "beside": (
        lambda model: {
            "state_dict": model.state_dict(),
            "epoch": 3,
            "optimizer": optimizer_of(legacy_net()),
            "hyper": {"lr": [1]},
        },
        ("epoch", "optimizer", "hyper"),
    ),
    "deep": (lambda model: {"run": [{"net": model.state_dict(), "lr": 0.1}], "step": 1}, ("run.0.lr", "step")),
    "flat": (lambda model: {**model.state_dict(), "epoch": 3, "meta": {"name": "x"}}, ("epoch", "meta")),
    "in a list": (lambda model: [model.state_dict(), 3], ("1",)),
    "module": (lambda model: model, ()),
    "module beside": (lambda model: {"net": model, "epoch": 3}, ("epoch",)),
}


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("trust", [False, True])
def test_the_only_state_dict_goes_into_safetensors(wrap: str, trust: bool, tmp_path: Path) -> None:
    """A file with one state dict or module folds into `.safetensors`, names flat, and says what it left out."""
    make, left = WRAPPED[wrap]
    model = legacy_net()
    expected = plain()
    torch.save(make(model), tmp_path / "g.pth")
    report = wn.fold_checkpoint(tmp_path / "g.pth", tmp_path / "g.safetensors", trust_pickle=trust)
    assert_same(safetensors.torch.load_file(tmp_path / "g.safetensors"), expected)
    assert [step.name for step in report.folded] == ["0.weight", "2.weight"]
    assert list(report.warnings) == ([f"left out of the output: {', '.join(left)}"] if left else [])
    again = wn.convert_checkpoint(tmp_path / "g.pth", tmp_path / "wn.safetensors", trust_pickle=trust)
    assert set(again.warnings) == set(report.warnings)
    assert wn.verify(tmp_path / "wn.safetensors", tmp_path / "g.safetensors").ok


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_an_entry_is_written_alone_and_flat(suffix: str, tmp_path: Path) -> None:
    """`entry` takes one of several state dicts; the manifest and the report name its tensors as the output does."""
    content = {"generator": legacy_net().state_dict(), "ema": {"net": legacy_net(1).state_dict()}, "steps": 7}
    torch.save(content, tmp_path / "g.pth")
    out, manifest = tmp_path / f"out{suffix}", tmp_path / "manifest.json"
    report = wn.fold_checkpoint(tmp_path / "g.pth", out, entry="ema.net", manifest=manifest)
    assert_same(load_object(out), plain(1))
    assert report.warnings == ("left out of the output: generator, steps",)
    table = json.loads(manifest.read_text())
    assert [row["name"] for row in table["tensors"]] == sorted(plain(1))
    assert table["removed"] == ["0.weight_g", "0.weight_v", "2.weight_g", "2.weight_v"]
    assert table["warnings"] == list(report.warnings)
    assert wn.verify(tmp_path / "g.pth", out, entry="ema.net").ok
    report = wn.convert_checkpoint(tmp_path / "g.pth", tmp_path / f"wn{suffix}", entry="generator", include="0")
    assert [step.name for step in report.rekeyed] == ["0.weight"]
    assert "0.parametrizations.weight.original0" in load_object(tmp_path / f"wn{suffix}")


def test_a_state_dict_keeps_its_own_values_in_a_pt_file(tmp_path: Path) -> None:
    """Into a `.pt` file goes what torch.load(...)[entry] gives, without what is nested in it."""
    own = {**legacy_net().state_dict(), "version": 2, "_extra_state": {"a": b"1"}}
    torch.save({"net": {**own, "ema": legacy_net(1).state_dict()}}, tmp_path / "g.pth")
    report = wn.fold_checkpoint(tmp_path / "g.pth", tmp_path / "out.pt", entry="net")
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert written["version"] == 2 and written["_extra_state"] == {"a": b"1"}
    assert written.keys() == plain().keys() | {"version", "_extra_state"}
    assert report.warnings == ("left out of the output: net.ema",)


def test_versions_of_modules_stay_with_their_state_dict(tmp_path: Path) -> None:
    """What torch keeps beside the entries of a state dict is there in the output, too."""
    torch.save({"net": legacy_net().state_dict(), "epoch": 1}, tmp_path / "g.pth")
    wn.fold_checkpoint(tmp_path / "g.pth", tmp_path / "out.pt", entry="net", trust_pickle=True)
    assert torch.load(tmp_path / "out.pt", weights_only=True)._metadata["2"] == {"version": 1}


def test_an_entry_may_be_a_module(tmp_path: Path) -> None:
    """A module among several is written whole into `.pt`, as its state dict into `.safetensors`."""
    torch.save({"a": legacy_net(), "b": legacy_net(1), "sd": net().state_dict()}, tmp_path / "g.pth")
    wn.fold_checkpoint(tmp_path / "g.pth", tmp_path / "b.pt", entry="b")
    assert_same(dict(wn.load_model(tmp_path / "b.pt").state_dict()), plain(1))
    wn.fold_checkpoint(tmp_path / "g.pth", tmp_path / "b.safetensors", entry="b")
    assert_same(safetensors.torch.load_file(tmp_path / "b.safetensors"), plain(1))
    report = wn.convert_checkpoint(tmp_path / "g.pth", tmp_path / "sd.safetensors", entry="sd")
    assert [step.name for step in report.converted] == ["0.weight", "2.weight"]


def test_a_whole_module_into_safetensors_is_what_save_model_writes(tmp_path: Path) -> None:
    """The bytes are those of save_model on the folded model; a tie is written twice and told."""
    model = legacy_net()
    model.again = model[2]
    torch.save(model, tmp_path / "m.pth")
    report = wn.fold_checkpoint(tmp_path / "m.pth", tmp_path / "out.safetensors")
    wn.save_model(wn.fold_weight_norm(model), tmp_path / "saved.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "saved.safetensors").read_bytes()
    assert any("holds them as two tensors" in text for text in report.warnings)


class Counting(nn.Linear):
    """A layer with state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_what_a_module_keeps_beside_tensors_is_left_out_and_told(tmp_path: Path) -> None:
    """`.safetensors` holds tensors alone, so a module's extra state is named."""
    torch.save(nn.Sequential(Counting(3, 2)), tmp_path / "m.pth")
    report = wn.convert_checkpoint(tmp_path / "m.pth", tmp_path / "out.safetensors", trust_pickle=True)
    assert report.warnings == ("left out of the output: 0._extra_state",)


def test_several_state_dicts_are_named(tmp_path: Path) -> None:
    """Where several could be meant, and where none has the name, the error says what there is."""
    content = {"generator": legacy_net().state_dict(), "discriminator": net(1).state_dict()}
    torch.save(content, tmp_path / "g.pth")
    for job in (wn.fold_checkpoint, wn.convert_checkpoint):
        with pytest.raises(InputError, match=r"g\.pth: holds several .*\(generator, discriminator\)") as caught:
            job(tmp_path / "g.pth", tmp_path / "out.safetensors")
        assert "--entry generator" in str(caught.value.hint)
        with pytest.raises(InputError, match="called 'gen' in it; there are generator, discriminator"):
            job(tmp_path / "g.pth", tmp_path / "out.pt", entry="gen")
    assert not (tmp_path / "out.safetensors").exists()


def test_nothing_is_lost_in_place(tmp_path: Path) -> None:
    """In place, an entry would cost the rest of the file, and so would a format that does not hold all of it."""
    content = {"generator": legacy_net().state_dict(), "epoch": 3}
    for name in ("g.pth", "g.safetensors"):
        torch.save(content, tmp_path / name)
        before = (tmp_path / name).read_bytes()
        with pytest.raises(SelectionError, match="in place, the rest would be lost"):
            wn.fold_checkpoint(tmp_path / name, tmp_path / name, in_place=True, entry="generator")
        assert (tmp_path / name).read_bytes() == before
    with pytest.raises(SelectionError, match="would be lost: epoch"):
        wn.fold_checkpoint(tmp_path / "g.safetensors", tmp_path / "g.safetensors", in_place=True)
    assert (tmp_path / "g.safetensors").read_bytes() == before


def test_strict_and_dry_runs_know_what_is_left_out(tmp_path: Path) -> None:
    """Under `strict` nothing is written that leaves something out; a dry run names it."""
    torch.save({"generator": legacy_net().state_dict(), "epoch": 3}, tmp_path / "g.pth")
    out = tmp_path / "out.safetensors"
    with pytest.raises(VerificationError, match="left out of the output: epoch"):
        wn.fold_checkpoint(tmp_path / "g.pth", out, strict=True)
    dry = wn.fold_checkpoint(tmp_path / "g.pth", out, dry_run=True)
    assert not out.exists()
    assert dry == wn.fold_checkpoint(tmp_path / "g.pth", out)


def test_an_entry_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of an entry are read one at a time from the file, and nothing that is left out is made."""
    torch.save({"a": legacy_net().state_dict(), "b": legacy_net(1).state_dict()}, tmp_path / "g.pth")
    mapped = map_store(tmp_path / "g.pth")
    assert mapped is not None and mapped.source is not None
    fetched: list[tuple[int, ...]] = []
    real = type(mapped.source).fetch

    def fetch(self: Any, tensor: torch.Tensor) -> torch.Tensor:
        fetched.append(tuple(tensor.shape))
        return real(self, tensor)

    monkeypatch.setattr(type(mapped.source), "fetch", fetch)
    monkeypatch.setattr("wnsurgery.files.read", None)  # what reads a file whole
    wn.fold_checkpoint(tmp_path / "g.pth", tmp_path / "b.safetensors", entry="b")
    entry = [tuple(tensor.shape) for _, tensor in every_tensor(mapped.content["b"])]
    assert sorted(fetched) == sorted(entry)
    mapped.source.close()


def test_the_model_of_an_entry(tmp_path: Path) -> None:
    """`arch` checks and converts the entry, not the file."""
    content = {"generator": net().state_dict(), "ema": net(1).state_dict()}
    torch.save(content, tmp_path / "g.pth")
    wn.convert_checkpoint(tmp_path / "g.pth", tmp_path / "wn.safetensors", entry="ema", arch=net)
    wn.fold_checkpoint(tmp_path / "wn.safetensors", tmp_path / "plain.safetensors", arch=net)
    assert_same(safetensors.torch.load_file(tmp_path / "plain.safetensors"), dict(net(1).state_dict()))


def test_directories_give_an_entry_into_a_file(tmp_path: Path) -> None:
    """Of a directory, an entry goes into a file; a directory is written as it is laid out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = {"model": legacy_net().state_dict(), "ema": legacy_net(1).state_dict()}
        dcp.save(content, checkpoint_id=str(tmp_path / "dcp"))
    wn.fold_checkpoint(tmp_path / "dcp", tmp_path / "ema.safetensors", entry="ema")
    assert_same(safetensors.torch.load_file(tmp_path / "ema.safetensors"), plain(1))
    with pytest.raises(SelectionError, match="of a directory into a file"):
        wn.fold_checkpoint(tmp_path / "dcp", tmp_path / "out", entry="ema")
    (tmp_path / "hub").mkdir()
    for name in ("model.safetensors", "other.safetensors"):
        wn.save_model(legacy_net(), tmp_path / "hub" / name)
    with pytest.raises(InputError, match=r"several.*model\.safetensors, other\.safetensors"):
        wn.fold_checkpoint(tmp_path / "hub", tmp_path / "one.safetensors")
    wn.fold_checkpoint(tmp_path / "hub", tmp_path / "one.safetensors", entry="model.safetensors")
    assert_same(safetensors.torch.load_file(tmp_path / "one.safetensors"), plain())


def test_inspect_looks_at_an_entry(tmp_path: Path) -> None:
    """`inspect` and `compare_weight_norm` look at the entry alone; a side without it counts whole, as in `verify`."""
    model, later = legacy_net(), legacy_net(1)
    torch.save({"generator": model.state_dict(), "ema": later.state_dict()}, tmp_path / "g.pth")
    torch.save({"net": model, "other": later}, tmp_path / "m.pth")
    torch.save(model.state_dict(), tmp_path / "one.pth")
    names = ["0.weight", "2.weight"]
    found = wn.inspect(tmp_path / "g.pth", entry="ema", reference=tmp_path / "one.pth")
    assert [w.name for w in found.weights] == names
    assert all(w.growth is not None for w in found.weights)
    assert [w.name for w in wn.inspect(tmp_path / "m.pth", entry="other").weights] == names
    assert [w.name for w in wn.inspect(tmp_path / "g.pth", entry="ema", arch=net).weights] == []
    assert [w.name for w in wn.compare_weight_norm(tmp_path / "g.pth", model, entry="ema").weights] == names
    for sides in ((tmp_path / "g.pth",), (tmp_path / "g.pth", model)):
        with pytest.raises(SelectionError, match="no state dict or module of this name"):
            (wn.inspect if len(sides) == 1 else wn.compare_weight_norm)(*sides, entry="none")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--entry` and the warning on the command line; under `--strict` it is exit code 7, and ONNX files have none."""
    torch.save({"generator": legacy_net().state_dict(), "epoch": 3}, tmp_path / "g.pth")

    def run(*words: object) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        return stop.value.code or 0, *capsys.readouterr()

    code, out, _ = run("fold", tmp_path / "g.pth", "-o", tmp_path / "a.safetensors", "--json")
    assert code == 0 and json.loads(out)["warnings"] == ["left out of the output: epoch"]
    assert run("fold", tmp_path / "g.pth", "-o", tmp_path / "b.safetensors", "--strict")[0] == 7
    for command in ("fold", "convert"):
        code, out, _ = run(command, tmp_path / "g.pth", "--entry", "generator", "-o", tmp_path / f"{command}.pt")
        assert code == 0 and "warning: left out of the output: epoch" in out
    assert run("inspect", tmp_path / "g.pth", "--entry", "generator")[0] == 0
    code, _, err = run("fold", tmp_path / "g.pth", "--entry", "gen", "-o", tmp_path / "c.pt")
    assert code == 3 and "there are generator" in err
    (tmp_path / "g.onnx").write_bytes(b"x")
    assert "--entry does not apply to ONNX files" in run("fold", tmp_path / "g.onnx", "--entry", "a")[2]
