"""The command line: what it prints where, and the code it ends with."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import wnsurgery as wn
from wnsurgery.cli import cli, main

COMMANDS = sorted(cli.commands)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        code = stop.value.code
        return (0 if code is None else int(code)), out, err

    return call


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2), nn.Flatten(), nn.LazyLinear(3))


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """A whole-module file of torch.nn classes."""
    model = net()
    model(torch.zeros(1, 1, 8, 8))
    torch.save(model, tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.mark.parametrize("arguments", [["--help"], *([c, "--help"] for c in COMMANDS)], ids=" ".join)
def test_help_imports_no_torch(arguments: list[str]) -> None:
    """`--help` of the program and of each command answers without importing anything heavy."""
    code = (
        "import sys\n"
        "from wnsurgery.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: wnsurgery" in done.stdout


def test_commands_are_the_documented_ones() -> None:
    """The commands of the README are the commands there are."""
    assert COMMANDS == ["bench", "completion", "convert", "export", "fold", "inspect", "run", "verify"]


def test_convert_then_fold_restores_every_bit(run: Any, model_file: Path) -> None:
    """A whole-module file goes through convert and fold and comes back with the same bits and classes."""
    code, out, _ = run("convert", model_file)
    assert code == 0
    assert "0.weight" in out
    converted = model_file.with_name("model.wn.pt")
    assert wn.is_weight_normed(wn.load_model(converted))
    assert run("fold", converted, "-o", model_file.with_name("back.pt"))[0] == 0
    before, after = wn.load_model(model_file), wn.load_model(model_file.with_name("back.pt"))
    assert [type(m) for m in after.modules()] == [type(m) for m in before.modules()]
    pairs = zip(before.state_dict().items(), after.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_safetensors_without_code(run: Any, tmp_path: Path) -> None:
    """A bare state dict converts by names, says what it assumed, and folds back to the same bits."""
    tensors = {"up.weight": torch.randn(4, 6, 3), "up.bias": torch.randn(6), "fc.weight": torch.randn(5, 4)}
    save_file(tensors, tmp_path / "w.safetensors")
    code, out, _ = run(
        "convert", tmp_path / "w.safetensors", "--dim", "0", "--dim", "up.*=1", "-o", tmp_path / "c.safetensors"
    )
    assert code == 0
    assert "assum" in out.lower()
    converted = load_file(tmp_path / "c.safetensors")
    assert converted["up.parametrizations.weight.original0"].shape == (1, 6, 1)
    assert converted["fc.parametrizations.weight.original0"].shape == (5, 1)
    assert run("fold", tmp_path / "c.safetensors", "-o", tmp_path / "b.safetensors")[0] == 0
    back = load_file(tmp_path / "b.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], tensors[k]) for k in tensors)


def test_convert_with_data(run: Any, model_file: Path) -> None:
    """`--init data` sets g and biases so that the first layer's output has deviation 1 on that batch."""
    batch = torch.randn(64, 1, 8, 8) * 3 + 2
    np.save(model_file.with_name("batch.npy"), batch.numpy())
    out_file = model_file.with_name("init.pt")
    arguments = ("--init", "data", "--data", model_file.with_name("batch.npy"), "-o", out_file)
    assert run("convert", model_file, *arguments)[0] == 0
    with torch.no_grad():
        first = wn.load_model(out_file)[0](batch)  # type: ignore[index]
    assert torch.allclose(first.std((0, 2, 3), unbiased=False), torch.ones(4), atol=1e-3)
    code, _, err = run("convert", model_file, "--init", "data", "--force")
    assert code == 2
    assert "--data" in err


def test_convert_with_scales_and_without_data(run: Any, model_file: Path) -> None:
    """`--init-scale PATTERN=X` goes by pattern, `--init fan` needs no data; unfit data is 3, an unfit scale 2."""
    np.save(model_file.with_name("batch.npy"), torch.randn(64, 1, 8, 8).numpy())
    np.save(model_file.with_name("wrong.npy"), torch.randn(64, 5).numpy())
    out_file = model_file.with_name("init.pt")
    data = ("--init", "data", "--data", model_file.with_name("batch.npy"), "-o", out_file, "--force")
    assert run("convert", model_file, *data, "--init-scale", "0=0.5", "--init-scale", "2", "--json")[0] == 0
    batch = torch.from_numpy(np.load(model_file.with_name("batch.npy")))
    with torch.no_grad():
        first = wn.load_model(out_file)[0](batch)  # type: ignore[index]
    assert torch.allclose(first.std((0, 2, 3), unbiased=False), torch.full((4,), 0.5), atol=1e-3)
    code, out, _ = run("convert", model_file, "--init", "fan", "-o", out_file, "--force")
    assert code == 0
    assert "without data" in out
    wrong = ("--init", "data", "--data", model_file.with_name("wrong.npy"), "-o", out_file, "--force")
    code, _, err = run("convert", model_file, *wrong)
    assert code == 3
    assert "forward failed on batch 0" in err
    for scale in ("nope=1", "0=x", "-1"):
        assert run("convert", model_file, *data, "--init-scale", scale)[0] == 2


def test_json_is_json(run: Any, model_file: Path) -> None:
    """With `--json`, stdout is one JSON document and nothing else."""
    for arguments in (("convert", model_file), ("inspect", model_file.with_name("model.wn.pt"))):
        code, out, _ = run(*arguments, "--json")
        assert code == 0
        assert json.loads(out)


def test_dry_run_writes_nothing(run: Any, model_file: Path) -> None:
    """`--dry-run` shows the plan and leaves the directory as it was."""
    before = sorted(model_file.parent.iterdir())
    code, out, _ = run("convert", model_file, "--dry-run")
    assert code == 0
    assert "0.weight" in out
    assert sorted(model_file.parent.iterdir()) == before


def test_existing_output_is_kept(run: Any, model_file: Path) -> None:
    """Without --force an existing output is refused with exit 5 and keeps its bytes."""
    target = model_file.with_name("out.pt")
    target.write_bytes(b"precious")
    code, out, err = run("convert", model_file, "-o", target)
    assert (code, out) == (5, "")
    assert err.startswith("wnsurgery: error: ")
    assert target.read_bytes() == b"precious"
    assert run("convert", model_file, "-o", target, "--force")[0] == 0


def test_output_over_input_needs_in_place(run: Any, model_file: Path) -> None:
    """The input is overwritten only with --in-place, even with --force."""
    before = model_file.read_bytes()
    assert run("convert", model_file, "-o", model_file, "--force")[0] == 5
    assert model_file.read_bytes() == before
    assert run("convert", model_file, "-o", model_file, "--in-place")[0] == 0
    assert wn.is_weight_normed(wn.load_model(model_file))


INPUT_AS_OUTPUT = [
    "inspect m.pt --html m.pt",
    "inspect m.pt --html ./again/../m.pt",
    "inspect m.pt --html link.pt",
    "inspect other.pt --against m.pt --html m.pt",
    "inspect other.pt --reference m.pt --html m.pt",
    "inspect other.pt --html p.json --parity p.json",
    "export m.pt -o m.pt --input-shape 1x1x8x8",
    "export m.pt -o x.npz --input x.npz",
    "run f.onnx --input x.npz -o x.npz",
    "run x.npz --input y.npz -o x.npz",
    "convert m.pt -o x.npz --init data --data x.npz",
    "convert m.pt -o x.npz --batch-norm fold --input x.npz",
    "convert m.pt -o out.pt --manifest x.npz --init data --data x.npz",
    "fold hub -o out --manifest hub/config.json",
    "fold hub -o hub/model.safetensors",
    "fold m.pt -o out.pt --manifest m.pt",
    "fold external.onnx -o f.onnx",
    "fold external.onnx -o f.onnx.data",
    "run external.onnx --input x.npz -o f.onnx.data",
    "run external.onnx --input x.npz -o again/../f.onnx.data",
    "inspect external.onnx --html f.onnx.data",
    "inspect f.onnx --reference external.onnx --html f.onnx.data",
    "inspect f.onnx --against external.onnx --html f.onnx.data",
]


@pytest.mark.parametrize("words", INPUT_AS_OUTPUT)
def test_no_output_replaces_an_input(run: Any, model_file: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever --force says, what a command reads is there afterwards, by whatever path its output names it."""
    monkeypatch.chdir(model_file.parent)
    model_file.rename("m.pt")
    torch.save(wn.apply_weight_norm(torch.load("m.pt", weights_only=False)), "other.pt")
    Path("again").mkdir()
    Path("link.pt").symlink_to("m.pt")
    Path("p.json").write_text("{}")
    x = np.zeros((1, 1, 8, 8), "f4")
    np.savez("x.npz", x)
    np.savez("y.npz", x)
    Path("hub").mkdir()
    save_file({"a.weight_g": torch.ones(8, 1), "a.weight_v": torch.ones(8, 64)}, "hub/model.safetensors")
    Path("hub/config.json").write_text("{}")
    wn.export_onnx(torch.load("m.pt", weights_only=False), torch.from_numpy(x), "f.onnx")
    split = {"save_as_external_data": True, "location": "f.onnx.data", "size_threshold": 0}
    onnx.save(onnx.load("f.onnx"), "external.onnx", **split)
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    code, out, err = run(*words.split(), "--force")
    assert (code, out) == (5, "")
    assert "this is the input" in err
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("fold m.pt -o o.onnx", "would be a checkpoint, and is called an ONNX graph"),
        ("convert m.pt -o o.onnx", "would be a checkpoint, and is called an ONNX graph"),
        ("fold f.onnx -o o.pt", "would be an ONNX graph, and is called a checkpoint"),
        ("export m.pt --input-shape 1x1x8x8 -o o.pt", "would be an ONNX graph, and is called a checkpoint"),
        ("fold ", "an empty path"),
        ("fold m.pt -o ", "an empty path"),
        ("run f.onnx -o y.npz --input ", "an empty path"),
        ("fold a\0b.pt", "no path holds a NUL"),
        ("inspect m.pt --html a\0b.html", "no path holds a NUL"),
    ],
)
def test_names_that_say_something_else(run: Any, model_file: Path, words: str, said: str) -> None:
    """An output is called what it is, an empty path is not the current directory, and none holds a NUL."""
    graph = model_file.with_name("f.onnx")
    wn.export_onnx(wn.load_model(model_file), torch.zeros(1, 1, 8, 8), graph)
    before = sorted(model_file.parent.iterdir())
    names = {"m.pt": model_file, "f.onnx": graph, "o.onnx": graph.with_name("o.onnx"), "o.pt": graph.with_name("o.pt")}
    code, out, err = run(*(names.get(word, word) for word in words.split(" ")))
    assert (code, out) == (2, "")
    assert said in err
    assert sorted(model_file.parent.iterdir()) == before


def test_verify_takes_an_entry(run: Any, model_file: Path, tmp_path: Path) -> None:
    """Of a file with several modules or state dicts, --entry says which is meant; one that nobody has is an error."""
    model, other = wn.load_model(model_file), net()
    other(torch.zeros(1, 1, 8, 8))
    with torch.no_grad():
        other[0].bias.add_(1)
    torch.save({"net": other, "ema": model}, tmp_path / "two.pt")
    torch.save({"net": other.state_dict(), "ema": model.state_dict()}, tmp_path / "states.pt")
    assert run("verify", tmp_path / "two.pt", model_file)[0] == 3
    for file in ("two.pt", "states.pt"):
        for sides in ([tmp_path / file, model_file], [model_file, tmp_path / file]):
            assert run("verify", *sides, "--entry", "ema")[0] == 0
            assert run("verify", *sides, "--entry", "net")[0] == 7
            assert run("verify", *sides, "--entry", "none")[0] == (3 if file == "two.pt" else 2)


def test_empty_outputs_prove_nothing(run: Any, model_file: Path) -> None:
    """Outputs without a single number are told as what they are, and fail."""
    code, out, _ = run("verify", model_file, model_file, "--input-shape", "0x1x8x8")
    assert code == 7
    assert "every output is empty, which proves nothing" in out


class _Hostile:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("command", ["convert", "fold", "inspect", "bench", "export"])
def test_hostile_pickle_is_refused(run: Any, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle that would run code ends every command with exit 4, and none of it runs, whatever the environment."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"w": torch.ones(2, 2), "x": _Hostile(tmp_path / "owned")}, tmp_path / "bad.pt")
    extra = ["--input-shape", "1x2"] if command in ("bench", "export") else []
    code, out, err = run(command, tmp_path / "bad.pt", *extra)
    assert (code, out) == (4, "")
    assert len(err.splitlines()) <= 2
    assert "Traceback" not in err
    assert not (tmp_path / "owned").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pt"]


def test_bare_pickle_is_refused(run: Any, tmp_path: Path) -> None:
    """A plain pickle that is no checkpoint is refused before anything of it runs."""
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(_Hostile(tmp_path / "owned")))
    assert run("fold", tmp_path / "bad.pt")[0] in (3, 4)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_file(run: Any, model_file: Path, keep: float) -> None:
    """A file cut off anywhere is exit 3 with a message of one line and a hint at most, and no output."""
    data = model_file.read_bytes()
    cut = model_file.with_name("cut.pt")
    cut.write_bytes(data[: int(keep if keep >= 1 or keep == 0 else keep * len(data))])
    code, out, err = run("fold", cut)
    assert (code, out) == (3, "")
    assert len(err.splitlines()) <= 2
    assert not model_file.with_name("cut.folded.pt").exists()


def test_missing_input(run: Any, tmp_path: Path) -> None:
    """A missing input is exit 3 for every command that reads one, and names the path."""
    for arguments in (
        ("fold", "no.pt"),
        ("fold", "no.onnx"),
        ("inspect", "no.safetensors"),
        ("verify", "no.pt", "no.pt"),
    ):
        code, _, err = run(*arguments)
        assert code == 3, arguments
        assert "no." in err


def test_a_missing_input_in_a_missing_directory(run: Any, tmp_path: Path) -> None:
    """What is missing is the input, not the directory beside it that the output would go to."""
    for command in ("fold", "convert"):
        code, _, err = run(command, tmp_path / "none" / "m.pt")
        assert (code, err) == (3, f"wnsurgery: error: {tmp_path / 'none' / 'm.pt'}: no such file\n")


def test_usage_errors(run: Any, model_file: Path) -> None:
    """Wrong options, patterns that match nothing and bad axes are exit 2."""
    for arguments in (
        ("convert",),
        ("convert", model_file, "--nope"),
        ("convert", model_file, "--include", "9.weight"),
        ("convert", model_file, "--dim", "0.weight=x"),
        ("convert", model_file, "--dim", "0.weight=7"),
        ("nonsense",),
        ("export", model_file),
        ("export", model_file, "--input-shape", "1xbx3"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), (arguments, code, err)
        assert err.startswith("wnsurgery: error: ")


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("convert m.pt --init-scale nan", "--init-scale"),
        ("convert m.pt --init-scale 1", "--init-scale"),
        ("convert m.pt --input x.npz", "--input"),
        ("convert m.pt --resume", "--resume"),
        ("fold m.pt --resume", "--resume"),
        ("fold folder -o out.pt --resume", "--resume"),
        ("run m.onnx --input folder -o out --time 3", "--time"),
        ("run m.onnx --input x.npz -o y.npz --batch 5", "--batch"),
        ("bench m.pt --input-shape 1x1x8x8 --no-compile", "--no-compile"),
        ("bench --suite --input x.npz", "--input"),
        ("bench --suite --arch os:getcwd", "--arch"),
        ("bench --suite --deploy", "--deploy"),
    ],
)
def test_no_option_is_ignored_in_silence(
    run: Any, words: str, option: str, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option that means nothing beside the others is a usage error that names it, and nothing is written."""
    monkeypatch.chdir(model_file.parent)
    model_file.rename("m.pt")
    np.savez("x.npz", np.zeros((1, 1, 8, 8), "f4"))
    Path("folder").mkdir()
    before = sorted(Path.cwd().iterdir())
    code, out, err = run(*words.split())
    assert (code, out) == (2, "")
    assert option.lstrip("-") in err.partition("hint:")[0].replace("_", "-")
    assert sorted(Path.cwd().iterdir()) == before


@pytest.mark.parametrize("options", [{"init_scale": 0.5}, {"inputs": [torch.ones(1)]}, {"resume": True}])
def test_no_argument_is_ignored_in_silence(options: dict[str, Any], model_file: Path) -> None:
    """The same in the library."""
    with pytest.raises(wn.SelectionError, match=next(iter(options))):
        wn.convert_checkpoint(model_file, model_file.with_name("out.pt"), **options)


def test_selection_reaches_the_library(run: Any, model_file: Path) -> None:
    """--include and --exclude pick weights by glob and regular expression."""
    assert run("convert", model_file, "--include", "re:^(0|2)", "--exclude", "2.*")[0] == 0
    converted = wn.load_model(model_file.with_name("model.wn.pt"))
    assert [w.name for w in wn.inspect(converted).weights] == ["0.weight"]


def test_export_run_verify(run: Any, model_file: Path, tmp_path: Path) -> None:
    """A converted file exports, runs in onnxruntime, and verifies against the plain file."""
    assert run("convert", model_file)[0] == 0
    converted, graph = model_file.with_name("model.wn.pt"), tmp_path / "model.onnx"
    assert run("export", converted, "-o", graph, "--input-shape", "2x1x8x8")[0] == 0
    x = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x)
    code, _, err = run("run", graph, "--input", tmp_path / "x.npz", "-o", tmp_path / "y.npz")
    assert code == 0, err
    timed = run("run", graph, "--input", tmp_path / "x.npz", "-o", tmp_path / "z.npz", "--time", "3", "--json")
    told = json.loads(timed[1])
    assert list(told["outputs"].values()) == [[2, *y.shape[1:]] for y in np.load(tmp_path / "y.npz").values()]
    assert told["provider"] == "CPUExecutionProvider"
    assert told["runs"] == 3
    assert 0 < told["milliseconds"]["least"] <= told["milliseconds"]["median"] <= told["milliseconds"]["most"]
    (y,) = np.load(tmp_path / "y.npz").values()
    with torch.no_grad():
        expected = wn.load_model(model_file)(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert run("verify", model_file, converted)[0] == 0
    assert run("verify", model_file, graph, "--input-shape", "2x1x8x8")[0] == 0


def test_verify_fails_with_7(run: Any, tmp_path: Path) -> None:
    """One wrong weight bit makes `verify` end with exit 7, the report still on stdout."""
    w = torch.randn(3, 4)
    other = w.clone()
    other.view(torch.int32)[1, 2] += 1
    torch.save({"weight": w}, tmp_path / "a.pt")
    torch.save({"weight": other}, tmp_path / "b.pt")
    code, out, err = run("verify", tmp_path / "a.pt", tmp_path / "b.pt")
    assert code == 7
    assert "weight" in out
    assert err.startswith("wnsurgery: error: ")


@pytest.mark.parametrize("command", ["verify", "export"])
@pytest.mark.parametrize("tolerance", ["nan", "-1", "inf"])
def test_tolerances_that_are_none(run: Any, model_file: Path, command: str, tolerance: str) -> None:
    """A tolerance that nothing could exceed is a usage error, and nothing is called equal under it."""
    words = [model_file] if command == "verify" else ["-o", model_file.with_name("m.onnx")]
    code, out, err = run(command, model_file, *words, "--input-shape", "1x1x8x8", "--rtol", tolerance)
    assert (code, out) == (2, "")
    assert "a tolerance is a number of 0 or more" in err


def test_export_of_empty_outputs_proves_nothing(run: Any, tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv1d(3, 4, 3)), tmp_path / "m.pt")
    code, _, err = run("export", tmp_path / "m.pt", "-o", tmp_path / "m.onnx", "--input-shape", "0x3x20")
    assert code == 7
    assert "every output is empty, which proves nothing" in err
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "dml", "coreml", "openvino"])
def test_missing_provider(run: Any, model_file: Path, tmp_path: Path, provider: str) -> None:
    """A provider that is not there is exit 6, never a run on the CPU."""
    import onnxruntime

    if any(provider in p.lower() for p in onnxruntime.get_available_providers()):
        pytest.skip(f"{provider} is available here")
    graph = tmp_path / "m.onnx"
    assert run("export", model_file, "-o", graph, "--input-shape", "1x1x8x8")[0] == 0
    np.save(tmp_path / "x.npy", np.zeros((1, 1, 8, 8), np.float32))
    arguments = ("--input", tmp_path / "x.npy", "-o", tmp_path / "y.npz", "--provider", provider)
    code, _, err = run("run", graph, *arguments)
    assert code == 6
    assert provider in err.lower()
    assert not (tmp_path / "y.npz").exists()


def test_terminal_escapes_from_a_file_are_shown_not_sent(run: Any, tmp_path: Path) -> None:
    """Control characters in names that come from a file never reach the terminal."""
    torch.save({"a\x1b[31m.weight": torch.randn(2, 2), "b\nc.weight_g": torch.ones(2, 1)}, tmp_path / "x.pt")
    for command in ("inspect", "convert", "fold"):
        _, out, err = run(command, tmp_path / "x.pt")
        assert "\x1b" not in out + err
        assert "b\nc" not in out + err


def test_internal_error_asks_for_a_report(run: Any, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unforeseen exception is exit 1, one line, a request to report it; the traceback only with --debug."""

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("wnsurgery.files.fold_checkpoint", broken)
    code, _, err = run("fold", model_file)
    assert code == 1
    assert "report" in err
    assert "Traceback" not in err
    assert "Traceback" in run("fold", model_file, "--debug")[2]


def test_interrupt_is_130() -> None:
    """Ctrl-C ends with the code of the signal, without a traceback."""
    code = (
        "import wnsurgery.cli as c, wnsurgery.inspection as i\n"
        "def look(*a, **k): raise KeyboardInterrupt\n"
        "i.inspect = look\n"
        "c.main(['inspect', 'x.pt'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (130, b"")


@pytest.mark.parametrize("arguments", [["inspect", "FILE"], ["inspect", "FILE", "--json"], ["fold", "--help"]])
def test_a_reader_that_is_gone_is_141(model_file: Path, arguments: list[str]) -> None:
    """`wnsurgery ... | head` ends quietly with the code of SIGPIPE."""
    arguments = [str(model_file) if a == "FILE" else a for a in arguments]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "wnsurgery", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_results_that_cannot_be_written_are_5(model_file: Path) -> None:
    """A full disk behind stdout is an output error of one line, not a bug."""
    command = [sys.executable, "-m", "wnsurgery", "inspect", str(model_file)]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 5
    assert done.stderr == "wnsurgery: error: stdout: No space left on device\n"


def test_a_selection_that_leaves_nothing_is_an_error(run: Any, model_file: Path, tmp_path: Path) -> None:
    """Nothing selected, or nothing to select from, is no success; converting twice is."""
    sd = {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)}
    torch.save(sd, tmp_path / "sd.pt")
    for file in (tmp_path / "sd.pt", model_file):
        name = "a" if file.name == "sd.pt" else "0"
        code, _, err = run("convert", file, "--include", name, "--exclude", name)
        assert code == 2
        assert "excluded" in err
        assert not file.with_name(f"{file.stem}.wn.pt").exists()
    assert run("convert", tmp_path / "sd.pt")[0] == 0
    assert run("convert", tmp_path / "sd.wn.pt")[0] == 0


@pytest.mark.parametrize("content", [{}, [], torch.ones(3), {"epoch": 3}], ids=str)
@pytest.mark.parametrize("command", ["fold", "convert", "inspect"])
def test_a_file_without_named_tensors_is_an_error(run: Any, tmp_path: Path, command: str, content: Any) -> None:
    """Nothing was done must not look like done."""
    torch.save(content, tmp_path / "x.pt")
    code, _, err = run(command, tmp_path / "x.pt")
    assert code == 3
    assert "no tensors" in err


def test_folding_a_plain_file_says_so(run: Any, model_file: Path) -> None:
    """A file without weight norm is copied, with a warning that there was nothing to fold."""
    code, out, _ = run("fold", model_file)
    assert code == 0
    assert "nothing to fold" in out


@pytest.mark.parametrize("shape", ["2x3x8x8", "2x1", "2x1x8x8:int64"])
@pytest.mark.parametrize("command", ["bench", "export", "verify"])
def test_inputs_that_do_not_fit_are_the_users_error(run: Any, model_file: Path, command: str, shape: str) -> None:
    """A wrong shape or type is named in one line and ends with 3, whichever command meets it."""
    files = [model_file, model_file] if command == "verify" else [model_file]
    code, _, err = run(command, *files, "--input-shape", shape)
    assert code == 3
    assert err.count("\n") <= 2 and "internal" not in err


@pytest.mark.parametrize("names", [("arr_0",), ("input",), ("image",)], ids=str)
def test_named_inputs_mean_the_same_to_every_command(run: Any, model_file: Path, tmp_path: Path, names: Any) -> None:
    """Arrays under numpy's names, `forward`'s or others: the same arguments for every command."""
    file = tmp_path / "x.npz"
    np.savez(file, **{name: np.random.default_rng(0).standard_normal((4, 1, 8, 8), np.float32) for name in names})
    onnx, converted = tmp_path / "m.onnx", tmp_path / "c.pt"
    assert run("convert", model_file, "--init", "data", "--data", file, "-o", converted)[0] == 0
    assert run("verify", model_file, model_file, "--input", file)[0] == 0
    assert run("bench", model_file, "--input", file, "--repeats", 3)[0] == 0
    assert run("export", converted, "--input", file, "-o", onnx)[0] == 0
    assert run("verify", converted, onnx, "--input", file)[0] == 0
    assert run("run", onnx, "--input", file, "-o", tmp_path / "y.npz")[0] == 0


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (4, 1), ()])
def test_a_batch_that_does_not_fit_is_the_users_error(
    run: Any, model_file: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    """`convert --init data` with a batch of a wrong shape, a wrong name or nothing at all ends with 3, in one line."""
    np.savez(tmp_path / "x.npz", **({"arr_0": np.zeros(shape, np.float32)} if shape else {}))
    code, _, err = run("convert", model_file, "--init", "data", "--data", tmp_path / "x.npz")
    assert code == 3
    assert err.count("\n") <= 2 and "internal" not in err


def test_a_factory_that_fails_is_a_usage_error(
    run: Any, model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the code behind --arch raises is said in one line."""
    source = "def build():\n    raise RuntimeError('no such size')\nclass Net:\n    pass\n"
    (tmp_path / "failing_nets.py").write_text(source)
    (tmp_path / "broken_nets.py").write_text("raise OSError('not today')\n")
    (tmp_path / "leaving_nets.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    torch.save(torch.load(model_file, weights_only=False).state_dict(), tmp_path / "sd.pt")
    for arch, reason in (
        ("failing_nets:build", "no such size"),
        ("failing_nets:Net", "not a torch.nn.Module"),
        ("broken_nets:build", "not today"),
        ("leaving_nets:build", "SystemExit"),
    ):
        code, _, err = run("convert", tmp_path / "sd.pt", "--arch", arch)
        assert code == 2
        assert reason in err


def test_log_scale_files_need_no_option(run: Any, tmp_path: Path) -> None:
    """A state dict that stores log g says so: every command reads it right."""
    torch.save({"a.weight": torch.randn(4, 3)}, tmp_path / "sd.pt")
    assert run("convert", tmp_path / "sd.pt", "--magnitude", "log", "-o", tmp_path / "log.pt")[0] == 0
    assert run("verify", tmp_path / "sd.pt", tmp_path / "log.pt")[0] == 0
    assert run("fold", tmp_path / "log.pt", "-o", tmp_path / "plain.pt")[0] == 0
    assert torch.equal(torch.load(tmp_path / "plain.pt")["a.weight"], torch.load(tmp_path / "sd.pt")["a.weight"])
    _, out, _ = run("inspect", tmp_path / "log.pt", "--json")
    norms = torch.load(tmp_path / "sd.pt")["a.weight"].double().norm(dim=1)
    low, _, high = json.loads(out)["weights"][0]["magnitude"]
    assert (low, high) == pytest.approx((norms.min().item(), norms.max().item()), rel=1e-6)


SHAPES = ["²x3", "2x²", "٢x3", "2x3:quint8", "2x3:bits8", "2x3:int4", "2x3:float4_e2m1fn_x2", "99999999999999999x3"]
SHAPES += ["99999999999999999999999x3", "9223372036854775807x9223372036854775807"]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_types_that_cannot_be_made(run: Any, model_file: Path, shape: str) -> None:
    """Digits that are none, types without numbers and sizes beyond all memory are usage errors."""
    code, out, err = run("verify", model_file, model_file, "--input-shape", shape)
    assert (code, out) == (2, "")
    assert shape in err


def npy(dtype: str, shape: str, data: bytes = b"") -> bytes:
    """An .npy file of a type and a shape that it claims."""
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data


def npz(change: Any = lambda data: data, **options: Any) -> bytes:
    """An .npz file of one array, changed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("x.npy", npy("<f4", "(1, 1, 8, 8)", np.random.default_rng(0).bytes(256)))
    return bytes(change(bytearray(file.getvalue())))


def poked(*places: tuple[bytes, int, int]) -> Any:
    """A change of bytes at offsets behind marks."""

    def change(data: bytearray) -> bytearray:
        for mark, offset, value in places:
            data[data.index(mark) + offset] = value
        return data

    return change


ARRAYS = {
    "huge.npy": npy("<f4", "(1099511627776,)"),
    "overflow.npy": npy("<f4", "(9223372036854775807, 9223372036854775807)"),
    "void.npy": npy("|V16", "(1,)", bytes(16)),
    "text.npy": npy("<U4", "(1,)", bytes(16)),
    "date.npy": npy("<M8[ns]", "(1,)", bytes(8)),
    "wide.npy": npy("<f16", "(1,)", bytes(16)),
    "method.npz": npz(poked((b"PK\3\4", 8, 99), (b"PK\1\2", 10, 99))),
    "encrypted.npz": npz(poked((b"PK\3\4", 6, 1), (b"PK\1\2", 8, 1))),
    "deflated.npz": npz(poked((b"x.npy", 5, 255)), compression=zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_cannot_be_read_are_input_errors(run: Any, model_file: Path, name: str) -> None:
    """Sizes beyond memory, unknown and encrypted compression, damage and types without numbers: exit code 3."""
    path = model_file.with_name(name)
    path.write_bytes(ARRAYS[name])
    code, out, err = run("export", model_file, "-o", path.with_name("m.onnx"), "--input", path)
    assert (code, out) == (3, "")
    assert err.startswith(f"wnsurgery: error: {path}: ")


def test_arrays_of_the_other_byte_order(run: Any, model_file: Path) -> None:
    """Inputs that another machine wrote are the numbers that they are."""
    np.save(model_file.with_name("x.npy"), np.ones((1, 1, 8, 8), ">f4"))
    graph, out = model_file.with_name("m.onnx"), model_file.with_name("y.npy")
    assert run("export", model_file, "-o", graph, "--input", model_file.with_name("x.npy"))[0] == 0
    assert run("run", graph, "--input", model_file.with_name("x.npy"), "-o", out)[0] == 0
    expected = wn.load_model(model_file).eval()(torch.ones(1, 1, 8, 8)).detach().numpy()
    np.testing.assert_allclose(np.load(out), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize(
    "words",
    [
        "run {0} --input {1}.npy -o y.npy",
        "run {0} --input {1}.npz -o y.npy",
        "export {0} -o m.onnx --input {1}.npz",
        "inspect {0} --html p.html --parity {1}.json",
    ],
)
def test_fifos_are_refused_before_anything_waits(run: Any, model_file: Path, words: str) -> None:
    """A FIFO is no input: nothing waits for somebody to write into it."""
    name = words.format(model_file, model_file.with_name("fifo"))
    fifo = next(word for word in name.split() if Path(word).stem == "fifo")
    os.mkfifo(fifo)
    code, _, err = run(*name.split())
    assert (code, err) == (3, f"wnsurgery: error: {fifo}: not a regular file\n")


@pytest.mark.parametrize("facts", [{"WORLD_SIZE": "x"}, {"MASTER_PORT": "x"}, {"MASTER_PORT": "99999999"}])
def test_an_environment_that_makes_no_group(
    run: Any, model_file: Path, facts: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torchrun would not have left in the environment is told in a line, and nobody waits."""
    whole = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"} | facts
    for name, value in whole.items():
        monkeypatch.setenv(name, value)
    code, out, err = run("fold", model_file)
    assert (code, out) == (2, "")
    assert "the processes that torchrun started do not meet" in err


def test_an_opset_that_does_not_exist(run: Any, model_file: Path) -> None:
    """--opset 999 is a usage error that says which there are."""
    code, _, err = run("export", model_file, "--input-shape", "1x1x8x8", "--opset", "999")
    assert code == 2
    assert "1 to" in err


def test_module_entry_point() -> None:
    """`python -m wnsurgery` is the command."""
    done = subprocess.run([sys.executable, "-m", "wnsurgery", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, f"wnsurgery {wn.__version__}")


def test_bench_prints_four_variants(run: Any, model_file: Path) -> None:
    """`bench` times plain, torch's, ours and folded for training and evaluation."""
    code, out, _ = run("bench", model_file, "--input-shape", "2x1x8x8", "--repeats", "3", "--json")
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [r["variant"] for r in rows] == ["plain", "torch", "ours", "folded"] * 2
    assert all(r["milliseconds"] > 0 for r in rows)


def test_options_that_mean_nothing_for_a_graph_are_refused(run: Any, tmp_path: Path) -> None:
    """On an ONNX file, an option of fold either does something or is a usage error, never ignored."""
    graph = tmp_path / "a.onnx"
    graph.write_bytes(b"")
    given: list[tuple[str, ...]] = [("--magnitude", "log"), ("--magnitude", "linear"), ("--arch", "os:getcwd")]
    given += [("--trust-pickle",), ("--dim", "0"), ("--strict",), ("--manifest", "m.json"), ("--resume",)]
    for options in [*given, ("--dry-run",)]:
        code, _, err = run("fold", graph, *options)
        assert (code, f"{options[0]} does not apply to ONNX files" in err) == (2, True), options
    assert run("fold", graph, "--zero-norm", "nan")[0] == 3


def test_zero_norm_is_for_graphs_too(run: Any, tmp_path: Path) -> None:
    """A row of v = 0 in a graph is exit code 3, unless the option says what it becomes."""
    import onnx.parser

    text = """<ir_version: 9, opset_import: ["" : 18]> g (float[N, 2] x) => (float[N, 2] y)
        <float[2, 2] v = {3.0, 4.0, 0.0, 0.0}, int64[1] axes = {1}>
        { n = ReduceL2(v, axes) w = Div(v, n) y = Gemm <transB = 1> (x, w) }"""
    graph, output = tmp_path / "a.onnx", tmp_path / "b.onnx"
    graph.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    code, _, err = run("fold", graph, "-o", output)
    assert (code, "--zero-norm" in err, output.exists()) == (3, True, False)
    for choice in ("zero", "nan"):
        code, out, _ = run("fold", graph, "-o", output, "--zero-norm", choice, "--force")
        assert (code, f"1 of 2 rows have v = 0 and g != 0; folded to {choice}" in out) == (0, True)


def test_export_does_not_replace_what_it_exports(run: Any, model_file: Path, tmp_path: Path) -> None:
    """A model whose name is that of the output, or of its weights file, is refused and stays, --force or not."""
    model = model_file.rename(tmp_path / "m.onnx.data")
    before = model.read_bytes()
    for output in ("m.onnx", "m.onnx.data"):
        options = ("-o", tmp_path / output, "--external", "--force", "--input-shape", "1x1x8x8")
        code, _, err = run("export", model, *options)
        assert (code, "this is the input" in err) == (5, True)
    assert model.read_bytes() == before
