"""The layer where two models part is found and named, in modules, graphs and exports."""

from __future__ import annotations

import copy
import io
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from torch import Tensor, nn

from wnsurgery.bisection import first_difference
from wnsurgery.cli import cli
from wnsurgery.export import export_onnx
from wnsurgery.surgery import apply_weight_norm
from wnsurgery.verification import verify


def _deep(layers: int = 25) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(layers)))


def _plant(model: nn.Sequential, layer: int) -> nn.Sequential:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed[layer][0].weight[3, 4] += 0.05
    return changed


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", [0, 1, 13, 24])
def test_a_planted_difference_in_fifty_layers_is_named(layer: int) -> None:
    """The first layer that differs is the one whose weight was changed, and the weight is named."""
    a = _deep()
    found = first_difference(a, _plant(a, layer), X)
    assert (found.layer, found.kind) == (f"{layer}.0", "Linear")
    assert found.weights == (f"{layer}.0.weight",)
    assert found.before == (f"{layer - 1}" if layer else "")
    assert f"{layer}.0" in str(found)


def test_a_converted_side_is_looked_at_layer_by_layer() -> None:
    """Weight norm on one side hides nothing and adds nothing."""
    a = _deep()
    assert first_difference(a, apply_weight_norm(copy.deepcopy(a)), X).layer is None
    assert first_difference(apply_weight_norm(copy.deepcopy(a)), _plant(a, 7), X).layer == "7.0"


@pytest.mark.parametrize("planted", [False, True])
def test_a_module_against_its_export(tmp_path: Path, planted: bool) -> None:
    """The exporter's scopes tell which layer of the graph is which."""
    a = _deep()
    export_onnx(_plant(a, 17) if planted else a, X, tmp_path / "b.onnx")
    for pair in ((a, tmp_path / "b.onnx"), (tmp_path / "b.onnx", a)):
        found = first_difference(*pair, X)
        assert found.layer == ("17.0" if planted else None)
        assert found.compared >= 50


def test_an_export_of_the_other_exporter(tmp_path: Path) -> None:
    """Node names of the TorchScript exporter serve as well."""
    a = _deep(4)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(_plant(a, 2).eval(), (X,), str(tmp_path / "b.onnx"), dynamo=False)
    assert first_difference(a, tmp_path / "b.onnx", X).layer == "2.0"


class Branches(nn.Module):
    """Two branches of which one is computed first; a batch norm that exporters merge into its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.left, self.right = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1)
        self.norm.running_mean.uniform_(0.5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return self.left(x) + self.right(x).tanh()


@pytest.mark.parametrize("layer", ["left", "right", None])
def test_merged_layers_and_branches(tmp_path: Path, layer: str | None) -> None:
    """A convolution that took a BatchNorm in does not count as different; a branch that agrees hides no other."""
    torch.manual_seed(0)
    a = Branches().eval()
    b = copy.deepcopy(a)
    if layer:
        with torch.no_grad():
            getattr(b, layer).weight.mul_(1.01)
    x = torch.randn(2, 3, 7)
    export_onnx(b, x, tmp_path / "b.onnx")
    assert first_difference(a, b, x).layer == layer
    assert first_difference(a, tmp_path / "b.onnx", x).layer == layer


def test_two_graphs_are_compared_value_by_value(tmp_path: Path) -> None:
    """In two graphs with the same names the first differing value is found."""
    export_onnx(_deep(), X, tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    tensor = next(t for t in model.graph.initializer if t.name == "11.0.weight")
    array = numpy_helper.to_array(tensor).copy()
    array[0, 0] += 0.1
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "b.onnx")
    found = first_difference(tmp_path / "a.onnx", tmp_path / "b.onnx", X)
    node = next(n for n in model.graph.node if "11.0.weight" in n.input)
    assert (found.layer, found.kind) == (node.output[0], node.op_type)


def test_nan_and_other_shapes_are_differences() -> None:
    """A layer that gives NaN, or another shape, is where two models part."""
    a = _deep(3)
    b = copy.deepcopy(a)
    with torch.no_grad():
        b[1][0].bias[0] = float("nan")
    assert first_difference(a, b, X).layer == "1.0"
    c = nn.Sequential(a[0], nn.Sequential(nn.Linear(12, 6), nn.Tanh()), nn.Linear(6, 12))
    assert first_difference(a, c, X).layer == "1.0"


def test_a_module_called_twice_is_told_apart_by_call() -> None:
    """A shared layer that first agrees and then gets other inputs is named with its call, or what came before is."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.between = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.between(self.shared(x)))

    a = Twice()
    b = copy.deepcopy(a)
    with torch.no_grad():
        b.between.bias.add_(1)
    assert first_difference(a, b, X).layer == "between"


def test_the_models_are_left_alone() -> None:
    """No hook, mode or gradient stays behind."""
    a = _deep(2).train()
    first_difference(a, a, X)
    assert a.training
    assert not any(module._forward_hooks for module in a.modules())


def test_verify_names_the_layer(tmp_path: Path) -> None:
    """`verify --bisect` says where, fails with exit code 7, and says so when nothing differs."""
    a = _deep()
    torch.save(a, tmp_path / "a.pt")
    torch.save(_plant(a, 9), tmp_path / "b.pt")
    arguments = ["--input-shape", "4x12", "--trust-pickle", "--bisect"]
    done = CliRunner().invoke(cli, ["verify", str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), *arguments])
    assert "first difference: 9.0 (Linear)" in done.output
    report = verify(a, _plant(a, 9), X, bisect=True)
    assert not report.ok
    assert report.parting is not None
    assert report.parting.layer == "9.0"
    assert "none in" in str(verify(a, a, X, bisect=True))
    assert any("no layer was looked for" in note for note in verify(a, a, bisect=True).notes)


def test_half_precision_passes_only_when_told() -> None:
    """fp16 against fp32 fails, passes with any_dtype within fp16's tolerance, and a wrong weight still fails."""
    a = _deep(3)
    half = copy.deepcopy(a).half()
    assert not verify(a, half, X).ok
    report = verify(a, half, X, any_dtype=True)
    assert report.ok
    assert report.outputs[0].outputs[0].dtype == "float16"
    assert not verify(a, _plant(a, 1).half(), X, any_dtype=True).ok
    assert not verify(a, np_damaged(half), X, any_dtype=True).ok


def np_damaged(model: nn.Module) -> nn.Module:
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged[0][0].bias[0] = float(np.nan)
    return damaged


def test_the_smallest_tolerance_is_enough_and_no_smaller_one() -> None:
    """The report's smallest rtol passes when used, and a little less does not; percentiles are numpy's."""
    a = _deep(3)
    b = _plant(a, 2)
    found = verify(a, b, X).outputs[0].outputs[0]
    assert found.smallest is not None
    assert verify(a, b, X, rtol=found.smallest, atol=found.atol).outputs[0].ok
    assert not verify(a, b, X, rtol=found.smallest * 0.999, atol=found.atol).outputs[0].ok
    with torch.no_grad():
        difference = (a(X) - b(X)).abs().double().numpy()
    np.testing.assert_allclose(found.percentiles, np.percentile(difference, (50, 90, 99, 99.9)), rtol=1e-6)
    assert "rtol needed" in str(verify(a, b, X))
    assert "256 eps" in str(verify(a, b, X))
