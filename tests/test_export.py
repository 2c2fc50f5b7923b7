"""Exported files hold the model's function, no weight norm, and nothing about where they were made."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import weight_norm as legacy_weight_norm
from torch.nn.utils.parametrizations import weight_norm

import wnsurgery.export
from wnsurgery.bisection import first_difference
from wnsurgery.errors import ExportError, OutputError, OutputExistsError, SelectionError, VerificationError
from wnsurgery.export import export_onnx
from wnsurgery.surgery import apply_weight_norm, is_weight_normed
from wnsurgery.verification import verify

# Models --------------------------------------------------------------------------------------------------


class Vocoder(nn.Module):
    """A HiFi-GAN in small: transposed convolutions and dilated residual stacks."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.Conv1d(20, 64, 7, padding=3)
        self.ups = nn.ModuleList([nn.ConvTranspose1d(64, 32, 8, 4, 2), nn.ConvTranspose1d(32, 16, 4, 2, 1)])
        self.res = nn.ModuleList(
            nn.ModuleList(nn.Conv1d(c, c, 3, padding=d, dilation=d) for d in (1, 3)) for c in (32, 16)
        )
        self.post = nn.Conv1d(16, 1, 7, padding=3)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.pre(mel)
        for up, stack in zip(self.ups, self.res, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            for conv in stack:
                x = x + conv(F.leaky_relu(x, 0.1))
        return torch.tanh(self.post(x))


class Residual(nn.Module):
    """A ResNet in small: batch norms, a strided shortcut, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32)
        self.short = nn.Conv2d(3, 32, 1, 2)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(32, 7))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.head(F.relu(y + self.short(x)).mean((2, 3)))


class Recurrent(nn.Module):
    """A bidirectional LSTM with two outputs, one of them nested."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(24, 48, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y, (h, _) = self.rnn(x)
        return y, {"h": h}


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(96, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vocoder": (Vocoder, (1, 20, 6)),
    "resnet": (Residual, (2, 3, 16, 16)),
    "lstm": (Recurrent, (2, 5, 24)),
    "transformer": (_encoder, (2, 5, 96)),
    "grouped": (lambda: nn.ConvTranspose2d(64, 64, 5, 2, 2, groups=4), (1, 64, 4, 4)),
}
WEIGHT_NORM = {
    "ours": apply_weight_norm,
    "torch": lambda model: _each(model, weight_norm),
    "legacy": lambda model: _each(model, legacy_weight_norm),
}


def _each(model: nn.Module, function: Callable[..., Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for module in list(model.modules()):
            if isinstance(module, nn.LSTM):
                function(module, "weight_hh_l0")
            elif "Conv" in type(module).__name__ or type(module) is nn.Linear:
                function(module)
    return model


def _trained(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    return model


def _run(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    found: list[np.ndarray] = session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    return found


def _flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in _flat(value)]


# The main job --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "ours") for name in MODELS),
        ("vocoder", "torch"), ("vocoder", "legacy"), ("lstm", "torch"), ("lstm", "legacy"), ("grouped", "torch"),
    ],
)  # fmt: skip
def test_exports_the_function_and_leaves_the_model_alone(tmp_path: Path, name: str, form: str) -> None:
    """onnxruntime computes what the weight-normed model computes, and the model is as it was, alive and trainable."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = _trained(WEIGHT_NORM[form](build())).train()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.random.get_rng_state()
    report = export_onnx(model, x, tmp_path / "m.onnx")
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert is_weight_normed(model)
    assert all(module.training for module in model.modules())
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert report.ok
    assert report.folded > 0
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert not [n.op_type for n in graph.node if n.op_type in ("ReduceL2", "ReduceSumSquare", "LpNormalization")]
    with torch.no_grad():
        expected = _flat(model.eval()(x))
    for a, b in zip(_run(tmp_path / "m.onnx", x), expected, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=0, atol=1e-5 * float(b.abs().max()))
    sum(y.sum() for y in _flat(model.train()(x))).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_report_prints_what_was_proved(tmp_path: Path) -> None:
    """Files, opset, inputs, outputs and the measured differences stand in the report."""
    report = export_onnx(nn.Linear(3, 2), torch.ones(4, 3), tmp_path / "m.onnx", opset=18)
    text = str(report)
    assert str(tmp_path / "m.onnx") in text
    assert "opset 18" in text
    assert "4x3" in text
    assert report.inputs[0][1:] == ("float", (4, 3))
    assert report.parity is not None
    assert report.parity.outputs[0].max_rel < 1e-5
    report.raise_for_status()


def test_norms_that_the_module_computes_itself_are_folded_in_the_graph(tmp_path: Path) -> None:
    """A hand-written weight norm that surgery cannot see is folded on the graph; a normalised activation stays."""

    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(torch.randn(128, 96))
            self.g = nn.Parameter(torch.rand(128, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
            return F.linear(x, self.g * self.v / torch.linalg.vector_norm(self.v, dim=1, keepdim=True))

    report = export_onnx(Cosine(), torch.randn(3, 96), tmp_path / "m.onnx")
    assert report.folded == 1
    assert [reason for _, reason in report.left] == ["it normalises a run-time value"]
    assert "1 norm left" in str(report)
    assert "no weight norm left" not in str(report)
    assert report.ok


def test_positional_and_keyword_inputs(tmp_path: Path) -> None:
    """Several inputs, given in order or by name in any order, reach the right parameters."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor, y: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x) * scale, self.b(y) - x.sum()

    model = apply_weight_norm(Two())
    x, y, scale = torch.randn(2, 3), torch.randn(2, 3), torch.randn(())
    report = export_onnx(model, {"scale": scale, "y": y, "x": x}, tmp_path / "a.onnx")
    assert report.ok
    assert {name for name, _, _ in report.inputs} == {"x", "y", "scale"}
    pair = nn.Bilinear(3, 4, 2)
    assert export_onnx(pair, (x, torch.randn(2, 4)), tmp_path / "b.onnx").ok


@pytest.mark.parametrize("batch", [1, 3])
def test_dynamic_first_axes_really_vary(tmp_path: Path, batch: int) -> None:
    """With dynamic=True the file runs for other batch sizes than the one it was exported with, also for 1."""
    model = apply_weight_norm(Residual()).eval()
    report = export_onnx(model, torch.randn(batch, 3, 16, 16), tmp_path / "m.onnx", dynamic=True)
    assert isinstance(report.inputs[0][2][0], str)
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        np.testing.assert_allclose(_run(tmp_path / "m.onnx", x)[0], model(x).numpy(), rtol=1e-4, atol=1e-5)


def test_a_first_axis_that_cannot_vary_is_an_error(tmp_path: Path) -> None:
    """A model that bakes its batch size in cannot be exported with dynamic=True."""

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(12.0).reshape(4, 3)

    with pytest.raises(ExportError):
        export_onnx(Fixed(), torch.randn(4, 3), tmp_path / "m.onnx", dynamic=True)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_is_compared_with_its_own_tolerance(tmp_path: Path) -> None:
    """fp16 models export and pass; asked for fp32 accuracy they fail and leave nothing."""
    model = apply_weight_norm(nn.Sequential(nn.Linear(96, 100), nn.Tanh(), nn.Linear(100, 4))).half()
    x = torch.randn(2, 96).half()
    assert export_onnx(model, x, tmp_path / "m.onnx").outputs[0][1] == "float16"
    with pytest.raises(VerificationError, match="onnxruntime differs"):
        export_onnx(model, x, tmp_path / "n.onnx", rtol=0.0, atol=1e-9)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


# The file ------------------------------------------------------------------------------------------------


def test_the_file_says_nothing_about_where_it_was_made(tmp_path: Path) -> None:
    """No absolute path, source line or stack trace is in the bytes."""
    export_onnx(apply_weight_norm(Vocoder()), torch.randn(1, 20, 6), tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    for text in (str(Path(torch.__file__).parent), str(Path(__file__).parent), str(tmp_path), ".py", "forward("):
        assert text.encode() not in content
    keys = {p.key for node in onnx.load(tmp_path / "m.onnx").graph.node for p in node.metadata_props}
    assert keys <= {"pkg.torch.onnx.name_scopes"}


def _small() -> nn.Module:
    torch.manual_seed(0)
    return apply_weight_norm(nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(48, 5)))


_SCRIPT = """
import sys, torch
from test_export import _small, export_onnx
export_onnx(_small(), torch.ones(2, 3, 8), sys.argv[1], dynamic=True)
"""


def test_exporting_again_gives_the_same_bytes_and_prints_nothing(tmp_path: Path) -> None:
    """Another process with another hash seed writes the same file, prints nothing, and meets no warning."""
    command = [sys.executable, "-W", "error", "-c", _SCRIPT, str(tmp_path / "a.onnx")]
    places = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": places}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with torch.random.fork_rng():
        export_onnx(_small(), torch.ones(2, 3, 8), tmp_path / "b.onnx", dynamic=True)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_big_models_become_a_consistent_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights beyond the limit of one file go to NAME.data, which the graph finds after the rename."""
    monkeypatch.setattr(wnsurgery.onnx_file, "_EMBED_LIMIT", 1000)
    model, x = nn.Linear(64, 64), torch.randn(2, 64)
    report = export_onnx(model, x, tmp_path / "m.onnx")
    assert [p.name for p in report.files] == ["m.onnx", "m.onnx.data"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert b".tmp" not in (tmp_path / "m.onnx").read_bytes()
    np.testing.assert_allclose(_run(tmp_path / "m.onnx", x)[0], model(x).detach().numpy(), rtol=1e-5, atol=1e-5)
    with pytest.raises(OutputExistsError):
        export_onnx(model, x, tmp_path / "m.onnx")
    export_onnx(_trained(model), x, tmp_path / "m.onnx", force=True)
    np.testing.assert_allclose(_run(tmp_path / "m.onnx", x)[0], model(x).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_outputs_are_checked_before_any_work(tmp_path: Path) -> None:
    """An existing output stays unless forced, a directory or a missing parent is refused."""
    (tmp_path / "m.onnx").write_text("precious")

    class Untouchable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the model must not run")

    for path, error in (("m.onnx", OutputExistsError), ("", OutputError), ("no/m.onnx", OutputError)):
        with pytest.raises(error):
            export_onnx(Untouchable(), torch.ones(1), tmp_path / path)
    assert (tmp_path / "m.onnx").read_text() == "precious"
    export_onnx(nn.Linear(1, 1), torch.ones(1), tmp_path / "m.onnx", force=True)
    onnx.checker.check_model(tmp_path / "m.onnx")


@pytest.mark.skipif(os.name != "posix", reason="names are bytes")
def test_names_that_onnx_does_not_take_are_refused_before_any_work(tmp_path: Path) -> None:
    """A name that is not UTF-8 is one that onnx's checker and onnxruntime cannot be told."""
    with pytest.raises(OutputError, match="not UTF-8"):
        export_onnx(nn.Linear(1, 1), torch.ones(1), tmp_path / os.fsdecode(b"a\xff.onnx"))
    assert not list(tmp_path.iterdir())


# What must fail ------------------------------------------------------------------------------------------


def test_a_wrong_graph_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the exporter changed the function, the export fails, and what stood at the output stays."""
    real = torch.onnx.export

    def wrong(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        program = real(model, *args, **kwargs)
        bias = program.model.graph.initializers["bias"]
        array = bias.const_value.numpy().copy()
        array[1] += 0.01
        bias.const_value = ir.tensor(array, name="bias")
        return program

    monkeypatch.setattr(torch.onnx, "export", wrong)
    (tmp_path / "m.onnx").write_text("old")
    with pytest.raises(VerificationError, match="off by") as caught:
        export_onnx(nn.Linear(3, 2), torch.randn(4, 3), tmp_path / "m.onnx", force=True)
    assert caught.value.exit_code == 7
    assert (tmp_path / "m.onnx").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_nan_outputs_prove_nothing(tmp_path: Path) -> None:
    """A model whose outputs are NaN on the given inputs is not exported."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    with pytest.raises(VerificationError, match="NaN"):
        export_onnx(model, torch.ones(1, 2), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_fold_that_changes_the_function_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original model is compared too, not only the folded copy."""

    def clumsy(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        return model

    monkeypatch.setattr(wnsurgery.export, "fold_weight_norm", clumsy)
    with pytest.raises(VerificationError, match="from the model"):
        export_onnx(nn.Linear(3, 2), torch.randn(4, 3), tmp_path / "m.onnx")


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x * 2


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svd(x)[1]


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("no such thing")


class Counting(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x, 3


@pytest.mark.parametrize("culprit", [Branching, Unsupported, Raising])
def test_failures_name_the_module_in_one_line(
    tmp_path: Path, culprit: type[nn.Module], capfd: pytest.CaptureFixture[str]
) -> None:
    """Control flow, operations without translation and errors in forward are one line that names the module."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"deep": nn.Sequential(culprit())})["deep"])
    with pytest.raises(ExportError, match=r"^1\.0: ") as caught:
        export_onnx(model, torch.randn(2, 3), tmp_path / "m.onnx")
    assert "\n" not in caught.value.message
    assert "\x1b" not in caught.value.message
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_unusable_inputs_and_outputs_are_export_errors(tmp_path: Path) -> None:
    """Inputs that do not fit forward, shapes that do not fit a layer and outputs that are no tensors are named."""
    with pytest.raises(ExportError, match=r"Linear\.forward"):
        export_onnx(nn.Linear(3, 2), (torch.ones(1, 3), torch.ones(1)), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"^0: forward failed"):
        export_onnx(nn.Sequential(nn.Linear(3, 2)), torch.ones(1, 4), tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="returns int"):
        export_onnx(Counting(), torch.ones(1), tmp_path / "m.onnx")


def test_unchecked_exports_say_so(tmp_path: Path) -> None:
    """With check=False nothing is proved, and the report does not claim it."""
    report = export_onnx(nn.Linear(3, 2), torch.ones(1, 3), tmp_path / "m.onnx", check=False)
    assert not report.ok
    assert "not compared" in str(report)
    with pytest.raises(VerificationError):
        report.raise_for_status()


# Options -------------------------------------------------------------------------------------------------


def test_half_ships_float16_that_is_held_to_both_models(tmp_path: Path) -> None:
    """With half=True weights, inputs and outputs are float16, the rounded model to the letter, the original closely."""
    model = apply_weight_norm(Vocoder())
    report = export_onnx(model, torch.randn(1, 20, 6), tmp_path / "m.onnx", half=True)
    assert (report.inputs[0][1], report.outputs[0][1]) == ("float16", "float16")
    assert report.parity is not None
    assert report.original is not None
    assert report.parity.outputs[0].rtol < report.original.outputs[0].rtol
    weight = next(p for n, p in apply_weight_norm(Vocoder()).named_parameters() if n == "post.bias")
    assert weight.dtype == torch.float32
    kinds = {t.data_type for t in onnx.load(tmp_path / "m.onnx").graph.initializer if t.name.endswith("weight")}
    assert kinds == {onnx.TensorProto.FLOAT16}


def test_half_that_overflows_is_not_published(tmp_path: Path) -> None:
    """Outputs beyond 65504 are infinite in float16, which is no rounding error."""
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(60000.0)
    with pytest.raises(VerificationError):
        export_onnx(model, torch.full((1, 3), 9.0), tmp_path / "m.onnx", half=True)
    assert list(tmp_path.iterdir()) == []


def test_external_weights_on_request(tmp_path: Path) -> None:
    """external=True writes the pair, and the graph finds its weights."""
    model, x = nn.Linear(64, 64), torch.randn(2, 64)
    report = export_onnx(model, x, tmp_path / "m.onnx", external=True)
    assert [p.name for p in report.files] == ["m.onnx", "m.onnx.data"]
    np.testing.assert_allclose(_run(tmp_path / "m.onnx", x)[0], model(x).detach().numpy(), rtol=1e-5, atol=1e-5)


def test_one_file_can_be_renamed(tmp_path: Path) -> None:
    """By default the weights are inside, and no name in the file has to fit its own."""
    model, x = nn.Linear(64, 64), torch.randn(2, 64)
    export_onnx(model, x, tmp_path / "m.onnx")
    (tmp_path / "m.onnx").rename(tmp_path / "other.onnx")
    np.testing.assert_allclose(_run(tmp_path / "other.onnx", x)[0], model(x).detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vocoder", "lstm", "grouped"])
def test_the_torchscript_exporter_on_request(tmp_path: Path, name: str) -> None:
    """The other exporter writes the same function, folded and proved, and the report says which one it was."""
    build, shape = MODELS[name]
    model = apply_weight_norm(build())
    report = export_onnx(model, torch.randn(shape), tmp_path / "m.onnx", exporter="torchscript", dynamic=True)
    assert report.ok
    assert isinstance(report.inputs[0][2][0], str)
    assert "TorchScript exporter" in str(report)
    content = (tmp_path / "m.onnx").read_bytes()
    assert not [text for text in (str(Path(torch.__file__).parent), ".py", str(tmp_path)) if text.encode() in content]


def test_attention_by_the_torchscript_exporter(tmp_path: Path) -> None:
    """The fast path of attention, which has no translation, is off while exporting and on again afterwards."""
    layer = apply_weight_norm(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True))
    before = torch.backends.mha.get_fastpath_enabled()
    assert export_onnx(layer, torch.randn(2, 5, 16), tmp_path / "m.onnx", exporter="torchscript").ok
    assert torch.backends.mha.get_fastpath_enabled() == before


@pytest.mark.parametrize("exporter", ["TorchScript", "onnx", None])
def test_an_exporter_that_is_none_is_a_usage_error(tmp_path: Path, exporter: Any) -> None:
    """No name is taken for the other exporter's."""
    with pytest.raises(SelectionError, match='exporter must be "dynamo" or "torchscript", not'):
        export_onnx(nn.Linear(2, 1), torch.ones(1, 2), tmp_path / "m.onnx", exporter=exporter)
    assert not list(tmp_path.iterdir())


def test_the_other_exporter_is_offered_where_this_one_fails(tmp_path: Path) -> None:
    """A branch on values fails with a hint; the other exporter takes it and says that branches are fixed."""
    with pytest.raises(ExportError) as caught:
        export_onnx(Branching(), torch.ones(2), tmp_path / "m.onnx")
    assert "--exporter torchscript" in str(caught.value.hint)
    report = export_onnx(Branching(), torch.ones(2), tmp_path / "m.onnx", exporter="torchscript")
    assert "branches and loops are as they went" in str(report)


def test_any_axes_can_vary(tmp_path: Path) -> None:
    """Axes are chosen by input; the file then runs for other sizes; unknown inputs and axes are named."""
    model = apply_weight_norm(Vocoder()).eval()
    report = export_onnx(model, torch.randn(1, 20, 6), tmp_path / "m.onnx", dynamic={"mel": [0, 2]})
    assert [isinstance(d, str) for d in report.inputs[0][2]] == [True, False, True]
    x = torch.randn(3, 20, 11)
    with torch.no_grad():
        np.testing.assert_allclose(_run(tmp_path / "m.onnx", x)[0], model(x).numpy(), rtol=1e-4, atol=1e-5)
    for wrong in ({"melody": [0]}, {"mel": [3]}):
        with pytest.raises(SelectionError, match=next(iter(wrong))):
            export_onnx(model, torch.randn(1, 20, 6), tmp_path / "n.onnx", dynamic=wrong)


# Float64 and its norms -----------------------------------------------------------------------------------

NORMS: dict[str, Callable[[], nn.Module]] = {  # of those that onnxruntime computes in float64
    "layer": lambda: nn.LayerNorm(8),
    "batch": lambda: nn.BatchNorm1d(6),
    "root mean square": lambda: nn.RMSNorm(8, eps=1e-5),
}


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("kind", NORMS)
def test_float64_norms_have_the_eps_that_a_file_can_hold(tmp_path: Path, kind: str, exporter: Any) -> None:
    """ONNX keeps eps in float32, which shows in float64: the reference takes that one, and the model keeps its own."""
    if (kind, exporter) == ("root mean square", "torchscript"):
        pytest.skip("torch's older exporter does not know it")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), NORMS[kind](), nn.Linear(8, 2)).double()
    x = 0.01 * torch.randn(4, 6, 3, dtype=torch.float64)
    assert export_onnx(model, x, tmp_path / "m.onnx", exporter=exporter).ok
    assert model[2].eps == 1e-5
    verify(model.eval(), tmp_path / "m.onnx", x, bisect=True).raise_for_status()
    with torch.no_grad():
        model[3].bias.add_(1e-9)
    assert not verify(model.eval(), tmp_path / "m.onnx", x).ok


@pytest.mark.filterwarnings("ignore")
def test_a_float64_graph_that_holds_eps_as_it_is(tmp_path: Path) -> None:
    """The newer exporter writes a batch norm as single operations, with an eps in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).double().eval()
    x = torch.randn(2, 6, dtype=torch.float64)
    torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=True, opset_version=18, verbose=False)
    verify(model, tmp_path / "m.onnx", x).raise_for_status()


@pytest.mark.parametrize("logit", [-5.0, -13.0, -15.0])
def test_small_probabilities(tmp_path: Path, logit: float) -> None:
    """Runtimes compute a sigmoid to so much of 1, not of a small result."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 1), nn.Sigmoid()), torch.randn(1, 16)
    with torch.no_grad():
        model[0].bias.add_(logit - model[0](x).squeeze())  # type: ignore[operator,arg-type]
    assert export_onnx(model, x, tmp_path / "m.onnx").ok


def test_a_norm_that_is_called_as_a_function_is_named(tmp_path: Path) -> None:
    """Nobody can reach the eps of a functional call: the error says where the difference comes from."""

    class Functional(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(super().forward(x), (8,))

    model = Functional(6, 8).double()
    x = 0.01 * torch.randn(4, 6, dtype=torch.float64)
    with pytest.raises(VerificationError, match="off by") as caught:
        export_onnx(model, x, tmp_path / "m.onnx")
    assert "the eps of LayerNormalization in float32" in str(caught.value.hint)


# Nothing is printed --------------------------------------------------------------------------------------


class Talking(nn.Module):
    """Prints and warns whenever it runs, and cannot be exported if asked so."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.layer, self.fails = nn.Linear(3, 3), fails

    def forward(self, x: Tensor) -> Tensor:
        print("a print of the model")
        os.write(1, b"a print of C++\n")
        warnings.warn("a warning of the model", UserWarning, stacklevel=1)
        return torch.linalg.svd(self.layer(x))[1] if self.fails else self.layer(x)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_nothing_of_the_model_or_the_exporter_is_heard(
    tmp_path: Path, exporter: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither prints nor warnings nor what C++ writes reach the caller, and what was printed before and after does."""
    x = torch.ones(2, 3)
    print("before")
    assert export_onnx(Talking(), x, tmp_path / "m.onnx", exporter=exporter).ok
    verify(Talking(), Talking(), x)
    with pytest.raises(ExportError) as caught:
        export_onnx(Talking(fails=True), x, tmp_path / "n.onnx", exporter=exporter)
    print("after")
    assert "\n" not in caught.value.message
    assert capfd.readouterr() == ("before\nafter\n", "")


_LSTM = """
import os, sys, torch
import wnsurgery as wn
os.close(int(sys.argv[2])) if len(sys.argv) > 2 else None
try:
    wn.export_onnx(torch.nn.LSTM(4, 6, proj_size=3), torch.ones(2, 4), sys.argv[1], exporter="torchscript")
except wn.ExportError:
    sys.exit(9)
"""


@pytest.mark.parametrize("closed", ["", "1", "2"])
def test_a_graph_that_torch_dumps_is_not_heard(tmp_path: Path, closed: str) -> None:
    """What the TorchScript exporter writes from C++ when it fails stays away, whichever stream is closed."""
    words = [sys.executable, "-c", _LSTM, str(tmp_path / "m.onnx"), *closed]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout, done.stderr) == (9, "", "")


# Inputs that are left out, modules that are compiled -----------------------------------------------------


class Unused(nn.Module):
    """Takes two tensors between the two that it uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, unused: Tensor, mask: Tensor | None, scale: Tensor) -> Tensor:
        return self.layer(x) * scale


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_inputs_that_an_exporter_leaves_out(tmp_path: Path, exporter: Any, named: bool) -> None:
    """What nothing is computed from is no input of the file; the others reach it under their names, in every check."""
    x, other, scale = torch.randn(4, 6), torch.randn(2), torch.randn(4, 1)
    inputs: Any = (x, other, other, scale)
    if named:
        inputs = {"scale": scale, "unused": other, "x": x, "mask": other}
    model = Unused()
    report = export_onnx(model, inputs, tmp_path / "m.onnx", exporter=exporter)
    assert report.ok
    assert {"x", "scale"} <= {name for name, _, _ in report.inputs}
    verify(model, tmp_path / "m.onnx", inputs).raise_for_status()
    verify(tmp_path / "m.onnx", model, inputs).raise_for_status()
    assert first_difference(model, tmp_path / "m.onnx", inputs).layer is None
    with torch.no_grad():
        model.layer.bias += 1
    assert verify(model, tmp_path / "m.onnx", inputs, bisect=True).parting is not None


def test_inputs_that_were_left_out_of_a_graph_with_names_of_its_own(tmp_path: Path) -> None:
    """Where an exporter made up the names, types and shapes tell which inputs are left, or it is an error."""
    x, other, scale = torch.randn(4, 6), torch.randn(2), torch.randn(4, 1)
    model, path = Unused().eval(), tmp_path / "m.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x, other, other, scale), path, dynamo=False, verbose=False)
    assert [value.name for value in onnx.load(path).graph.input] not in (["x", "scale"], ["x"])
    verify(model, path, (x, other, other, scale)).raise_for_status()
    verify(model, path, {"scale": scale, "x": x, "mask": other, "unused": other}, bisect=True).raise_for_status()
    same = torch.ones(4, 1)
    verify(model, path, (x, same, same, same)).raise_for_status()
    report = verify(model, path, (x, same, same, 2 * same))
    assert "4 inputs given" in report.problems[0]


@pytest.mark.parametrize("compiled", ["script", "trace"])
def test_modules_of_torchscript(tmp_path: Path, compiled: str) -> None:
    """What torch.jit made is exported by the exporter of its kind, runs in comparisons, and errors are ours."""
    x, plain = torch.randn(4, 6), nn.Sequential(nn.Linear(6, 3), nn.Tanh())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are deprecated
        model = torch.jit.script(plain) if compiled == "script" else torch.jit.trace(plain, x)
    with pytest.raises(ExportError) as caught:
        export_onnx(model, x, tmp_path / "m.onnx")
    assert "--exporter torchscript" in str(caught.value.hint)
    for inputs in ((x, x), (), {"no": x}):
        with pytest.raises(ExportError, match="the inputs do not fit"):
            export_onnx(model, inputs, tmp_path / "m.onnx", exporter="torchscript")
    assert export_onnx(model, x, tmp_path / "m.onnx", exporter="torchscript", dynamic=True).ok
    verify(model, tmp_path / "m.onnx", x).raise_for_status()
    verify(model, plain, x).raise_for_status()


def test_axes_that_cannot_vary_are_named(tmp_path: Path) -> None:
    """Channels cannot vary: the error says that the axis was tried at twice its size, and which one, in one line."""
    model = nn.Sequential(nn.Conv1d(4, 3, 1))
    with pytest.raises(ExportError) as caught:
        export_onnx(model, torch.ones(1, 4, 5), tmp_path / "m.onnx", dynamic={"input": [0, 1]})
    assert "the dynamic axes (input=0,1) were tried at twice the size" in caught.value.message
    assert "0: forward failed" in caught.value.message
    assert "\n" not in caught.value.message
    with pytest.raises(ExportError, match=r"^0: forward failed"):
        export_onnx(model, torch.ones(1, 5, 5), tmp_path / "m.onnx", dynamic={"input": [0, 1]})
