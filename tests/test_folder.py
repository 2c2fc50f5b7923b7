"""A folder of inputs is run file by file or in batches, with the same outputs, and nothing is overwritten."""

from __future__ import annotations

from pathlib import Path, PurePath

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from wnsurgery.cli import cli
from wnsurgery.errors import InputError, InputMissingError, OutputExistsError, SelectionError
from wnsurgery.export import export_onnx
from wnsurgery.folder import run_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    path = tmp_path_factory.mktemp("model") / "m.onnx"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Tanh())
    export_onnx(net, torch.randn(2, 2, 5), path, dynamic={"input": [0, 2]})
    return net.eval(), path


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Seven files of one to three rows, two widths, .npz and .npy."""
    folder = tmp_path / "in"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(7):
        x = rng.standard_normal((1 + i % 3, 2, 5 if i < 5 else 6)).astype(np.float32)
        if i % 2:
            np.save(folder / f"x{i}.npy", x)
        else:
            np.savez(folder / f"x{i}.npz", x)
    (folder / "readme.txt").write_text("not an input")
    return folder


@pytest.mark.parametrize(("batch", "runs"), [(1, 7), (2, 4), (100, 2)])
def test_every_file_gets_its_output(
    model: tuple[nn.Module, Path], inputs: Path, tmp_path: Path, batch: int, runs: int
) -> None:
    """Whatever the batch, each output holds what torch computes from its input alone; shapes are never mixed."""
    seen = []
    report = run_folder(model[1], inputs, tmp_path / "out", batch=batch, progress=lambda *n: seen.append(n))
    assert (report.runs, report.provider) == (runs, "CPUExecutionProvider")
    assert seen[-1] == (7, 7)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"x{i}.npz" for i in range(7)]
    for i in range(7):
        loaded = np.load(inputs / (f"x{i}.npy" if i % 2 else f"x{i}.npz"))
        x = loaded if i % 2 else loaded["arr_0"]
        with torch.no_grad():
            expected = model[0](torch.from_numpy(x)).numpy()
        (found,) = np.load(tmp_path / "out" / f"x{i}.npz").values()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_what_stands_in_the_way_is_told_before_anything_runs(
    model: tuple[nn.Module, Path], inputs: Path, tmp_path: Path
) -> None:
    """Existing outputs, the same folder twice, empty folders, twins and odd batches are errors."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x6.npz").write_text("precious")
    with pytest.raises(OutputExistsError):
        run_folder(model[1], inputs, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x6.npz"]
    with pytest.raises(SelectionError):
        run_folder(model[1], inputs, inputs, force=True)
    with pytest.raises(SelectionError):
        run_folder(model[1], inputs, tmp_path / "new", batch=0)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputMissingError):
        run_folder(model[1], tmp_path / "none", tmp_path / "new")
    np.save(inputs / "x0.npy", np.zeros((1, 2, 5), np.float32))
    with pytest.raises(InputError, match="same name"):
        run_folder(model[1], inputs, tmp_path / "new")


def test_no_output_replaces_the_weights_of_the_graph(
    model: tuple[nn.Module, Path], inputs: Path, tmp_path: Path
) -> None:
    """A weights file that lies where an output would go is refused and stays, `force` or not."""
    path = tmp_path / "out" / "m.onnx"
    path.parent.mkdir()
    onnx.save(onnx.load(model[1]), path, save_as_external_data=True, location="x6.npz", size_threshold=0)
    before = (path.parent / "x6.npz").read_bytes()
    with pytest.raises(OutputExistsError, match="this is the input"):
        run_folder(path, inputs, path.parent, force=True)
    assert {p.name for p in path.parent.iterdir()} == {"m.onnx", "x6.npz"}
    assert (path.parent / "x6.npz").read_bytes() == before


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_takes_the_outputs_before_it_along(
    model: tuple[nn.Module, Path], inputs: Path, tmp_path: Path, there: bool
) -> None:
    """What a failed run wrote is gone, so that the next run is not refused; what stood there before stays."""
    target = tmp_path / "out"
    if there:
        target.mkdir()
        (target / "mine.txt").write_text("x")
    (inputs / "x9.npz").write_bytes(b"damaged")
    with pytest.raises(InputError, match="damaged"):
        run_folder(model[1], inputs, target)
    assert target.exists() == there
    assert not there or [p.name for p in target.iterdir()] == ["mine.txt"]
    (inputs / "x9.npz").unlink()
    assert len(run_folder(model[1], inputs, target).files) == 7


def test_outputs_without_the_batch_are_not_taken_apart(tmp_path: Path, inputs: Path) -> None:
    """A graph that sums over the batch cannot be batched, and says so."""

    class Total(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum(0)

    export_onnx(Total(), torch.randn(2, 2, 5), tmp_path / "m.onnx", dynamic={"x": [0, 2]})
    with pytest.raises(InputError, match="batch first"):
        run_folder(tmp_path / "m.onnx", inputs, tmp_path / "out", batch=4)


def test_a_fixed_batch_says_what_to_do(tmp_path: Path) -> None:
    """A graph whose first axis is fixed runs file by file, and says so where files are to be joined; of other misfits
    it says nothing like it."""
    export_onnx(nn.Conv1d(2, 3, 1), torch.randn(1, 2, 5), tmp_path / "m.onnx")
    for folder, channels in (("in", 2), ("wrong", 3)):
        (tmp_path / folder).mkdir()
        for i in range(2):
            np.save(tmp_path / folder / f"x{i}.npy", np.zeros((1, channels, 5), np.float32))
    with pytest.raises(InputError, match=r"1x2x5, not float32 2x2x5\nhint: .*--batch 1\), or export .*--dynamic"):
        run_folder(tmp_path / "m.onnx", tmp_path / "in", tmp_path / "out", batch=4)
    assert run_folder(tmp_path / "m.onnx", tmp_path / "in", tmp_path / "out").runs == 2
    with pytest.raises(InputError, match=r"not float32 1x3x5$"):
        run_folder(tmp_path / "m.onnx", tmp_path / "wrong", tmp_path / "no", batch=1)


def test_inputs_that_are_all_scalars_run_alone(tmp_path: Path) -> None:
    """Scalars have no axis to be joined along, so a batch of them is run file by file, equal ones too."""

    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    export_onnx(Twice(), torch.tensor(1.0), tmp_path / "m.onnx")
    (tmp_path / "in").mkdir()
    values = [3.0, 3.0, 3.0, 4.0]
    for i, value in enumerate(values):
        np.save(tmp_path / "in" / f"x{i}.npy", np.float32(value))
    report = run_folder(tmp_path / "m.onnx", tmp_path / "in", tmp_path / "out", batch=4)
    assert report.runs == 4
    found = [np.load(path)["mul"].item() for path in report.files]
    assert found == [6.0, 6.0, 6.0, 8.0]


def test_names_are_compared_once_for_all_files(
    model: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file's name is looked at a few times, however many other files there are."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for i in range(50):
        (tmp_path / "in" / f"x{i:02}.npz").touch()
    (tmp_path / "out" / "x49.npz").touch()
    stem, asked = PurePath.stem.fget, []
    monkeypatch.setattr(PurePath, "stem", property(lambda path: asked.append(path) or stem(path)))
    with pytest.raises(OutputExistsError, match="x49"):
        run_folder(model[1], tmp_path / "in", tmp_path / "out")
    assert 50 <= len(asked) <= 4 * 50


def test_the_command_runs_files_and_folders(model: tuple[nn.Module, Path], inputs: Path, tmp_path: Path) -> None:
    """`run` takes a folder, and times a single file on request."""
    arguments = ["run", str(model[1]), "--input", str(inputs), "-o", str(tmp_path / "out"), "--batch", "3"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert "wrote 7 files" in done.output
    arguments = ["run", str(model[1]), "--input", str(inputs / "x0.npz"), "-o", str(tmp_path / "y.npz"), "--time", "3"]
    done = CliRunner().invoke(cli, arguments)
    assert "in 3 runs on cpu" in done.output
