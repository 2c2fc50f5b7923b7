"""Verification of any two artefacts passes what is equal and fails whatever is not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import nn

from wnsurgery.bisection import first_difference
from wnsurgery.differences import compare_outputs
from wnsurgery.errors import InputError, InputMissingError, SelectionError, UnsafeFileError, VerificationError
from wnsurgery.export import export_onnx
from wnsurgery.graph import fold_onnx
from wnsurgery.graph_inputs import rows_indexed
from wnsurgery.onnx_weights import contradictions
from wnsurgery.surgery import apply_weight_norm
from wnsurgery.verification import verify


def build() -> nn.Module:
    """The architecture of every file in these tests."""
    return nn.Sequential(nn.Conv1d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 5), nn.Linear(5, 5))


class TwoOutputs(nn.Module):
    """Returns two tensors of the same shape, swapped on request."""

    def __init__(self, *, swapped: bool = False) -> None:
        super().__init__()
        self.layer, self.swapped = nn.Linear(3, 3), swapped

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pair = (self.layer(x), torch.relu(self.layer(x)))
        return pair[::-1] if self.swapped else pair


@pytest.fixture
def model() -> nn.Module:
    """The model that all files come from."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


@pytest.fixture
def inputs() -> torch.Tensor:
    """A batch for it."""
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model as every kind of file, plain and converted."""
    home = tmp_path_factory.mktemp("files")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = build().eval()
    converted = apply_weight_norm(copy.deepcopy(plain))
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    torch.save(plain, home / "module.pt")
    torch.save(converted, home / "converted module.pt")
    torch.save({"epoch": 3, "state_dict": plain.state_dict()}, home / "wrapped.pt")
    torch.save(converted.state_dict(), home / "converted.pt")
    legacy = {}
    for key, value in converted.state_dict().items():
        old = key.replace("parametrizations.weight.original0", "weight_g")
        legacy[old.replace("parametrizations.weight.original1", "weight_v")] = value
    save_file(legacy, home / "legacy.safetensors")
    export_onnx(converted, x, home / "graph.onnx")
    return {path.stem: path for path in home.iterdir()}


# What is equal passes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["module", "converted module", "wrapped", "converted", "legacy"])
def test_weights_of_every_kind_of_file_are_equal(model: nn.Module, files: dict[str, Path], kind: str) -> None:
    """A live module equals each file made from it, converted ones as the weights they stand for."""
    report = verify(model, files[kind])
    assert report.ok
    assert report.weights is not None
    assert [t.name for t in report.weights.tensors] == list(model.state_dict())
    assert "equal" in str(report)
    report.raise_for_status()
    assert verify(files[kind], files["converted"]).ok


@pytest.mark.parametrize("kind", ["module", "converted module"])
def test_outputs_are_compared_with_a_graph_on_made_up_inputs(files: dict[str, Path], kind: str) -> None:
    """Against an ONNX graph both sides run, on inputs made from the graph's declaration."""
    report = verify(files[kind], files["graph"], n_inputs=2)
    assert report.ok
    assert report.weights is None
    assert len(report.outputs) == 2
    assert "stand in the graph bit for bit" in report.notes[-1]


def test_a_checkpoint_with_its_architecture_runs(files: dict[str, Path], inputs: torch.Tensor) -> None:
    """With arch, the outputs of a checkpoint are compared too."""
    report = verify(files["converted"], files["graph"], arch=build)
    assert report.ok
    assert len(report.outputs) == 3
    report = verify(files["wrapped"], files["module"], inputs, arch=build)
    assert report.weights is not None
    assert len(report.outputs) == 1


def test_a_checkpoint_is_found_in_a_graph(files: dict[str, Path]) -> None:
    """Without an architecture, every weight must stand in the graph, whatever the exporter called it."""
    report = verify(files["legacy"], files["graph"])
    assert report.ok
    assert report.weights is not None
    assert len(report.weights.tensors) == 6


def test_two_graphs_are_compared_in_weights_and_outputs(files: dict[str, Path], tmp_path: Path) -> None:
    """A graph equals its folded copy."""
    fold_onnx(files["graph"], tmp_path / "again.onnx")
    report = verify(files["graph"], tmp_path / "again.onnx")
    assert report.ok
    assert report.weights is not None
    assert len(report.outputs) == 3


def test_the_models_given_are_not_touched(model: nn.Module, inputs: torch.Tensor) -> None:
    """Modes, weights and the random generator are what they were."""
    converted = apply_weight_norm(copy.deepcopy(model)).train()
    keys, rng = list(converted.state_dict()), torch.random.get_rng_state()
    assert verify(model, converted, inputs).ok
    assert converted.training
    assert list(converted.state_dict()) == keys
    assert torch.equal(torch.random.get_rng_state(), rng)


# What is not equal fails ---------------------------------------------------------------------------------


def _damage(model: nn.Module, case: str) -> nn.Module:
    damaged = copy.deepcopy(model)
    weight = damaged[4].weight
    with torch.no_grad():
        if case == "bit":
            weight.view(torch.int32)[2, 3] ^= 1
        elif case == "nan":
            weight[0, 0] = float("nan")
        elif case == "transposed":
            weight.copy_(weight.t().clone())
        else:
            damaged.half()
    return damaged


@pytest.mark.parametrize("case", ["bit", "nan", "transposed", "half"])
@pytest.mark.parametrize("form", ["live", "state dict", "converted"])
def test_wrong_weights_fail(model: nn.Module, tmp_path: Path, case: str, form: str) -> None:
    """One bit, one NaN, a transposed square weight and another type fail in every form of artefact."""
    damaged = _damage(model, case)
    other: nn.Module | Path = damaged
    if form == "state dict":
        other = tmp_path / "m.pt"
        torch.save(damaged.state_dict(), other)
    elif form == "converted" and case != "nan":
        other = apply_weight_norm(damaged)
    report = verify(model, other)
    assert not report.ok
    assert "DIFFERENT" in str(report)
    with pytest.raises(VerificationError) as caught:
        report.raise_for_status()
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("case", ["nan", "transposed", "half"])
def test_a_model_that_computes_something_else_than_the_graph_fails(
    model: nn.Module, files: dict[str, Path], case: str
) -> None:
    """NaN outputs, other values and a model that cannot take the graph's inputs fail against the graph."""
    assert not verify(_damage(model, case), files["graph"]).ok
    assert not verify(files["graph"], _damage(model, case)).ok


def test_a_wrong_bit_in_a_graph_fails_where_weights_are_comparable(files: dict[str, Path], tmp_path: Path) -> None:
    """One bit off in an ONNX file fails against the other graph and against the checkpoint."""
    graph = onnx.load(files["graph"])
    tensor = next(t for t in graph.graph.initializer if t.name == "0.weight")
    array = numpy_helper.to_array(tensor).copy()
    array.reshape(-1).view(np.uint32)[7] ^= 1
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(graph, tmp_path / "bad.onnx")
    assert not verify(files["graph"], tmp_path / "bad.onnx").ok
    report = verify(tmp_path / "bad.onnx", files["converted"])
    assert [p for p in report.problems if p.startswith("0.weight: 1 elements differ, by up to 1 unit")]


def test_swapped_outputs_fail(tmp_path: Path) -> None:
    """The same two outputs in the other order are another function."""
    straight, swapped = TwoOutputs(), TwoOutputs(swapped=True)
    swapped.load_state_dict(straight.state_dict())
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert verify(straight, straight, x).ok
    assert not verify(straight, swapped, x).ok
    export_onnx(straight, x, tmp_path / "m.onnx")
    assert verify(straight, tmp_path / "m.onnx").ok
    assert not verify(swapped, tmp_path / "m.onnx").ok


@pytest.mark.parametrize("share", ["all", "some", "further inputs"])
@pytest.mark.parametrize("form", ["modules", "graph"])
def test_nan_outputs_prove_nothing(share: str, form: str, tmp_path: Path) -> None:
    """Two sides that agree on NaN do not pass, be it in one element of one set of inputs; the message says where."""
    layer, good = nn.Linear(2, 2), torch.ones(3, 2)
    bad = torch.full((3, 2), torch.nan) if share == "all" else torch.tensor([[1.0, 2.0], [3.0, torch.nan], [5.0, 6.0]])
    if form == "graph":
        export_onnx(layer, good, tmp_path / "m.onnx")
    other = tmp_path / "m.onnx" if form == "graph" else layer
    further = share == "further inputs"
    report = verify(layer, other, good, more=[bad]) if further else verify(layer, other, bad)
    assert not report.ok
    assert len(report.problems) == 1
    assert "6 of 6" in report.problems[0] if share == "all" else "2 of 6" in report.problems[0]
    assert f"on {'set 2 of the' if further else 'these'} inputs (they hold NaN), first at" in report.problems[0]


def test_nan_of_the_model_itself_proves_nothing_and_equal_infinities_pass() -> None:
    """Where no input is to blame the message does not say so; the same infinity on both sides is agreement."""
    problems = verify(_Log(), _Log(), {"x": torch.tensor([-1.0, 0.0, 1.0])}).problems
    assert len(problems) == 1
    assert "1 of 3 elements are NaN on both sides on these inputs, first at (0,)" in problems[0]
    assert verify(_Log(), _Log(), torch.tensor([0.0, 1.0])).ok


class _Log(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.log()


def test_tolerances_can_be_set(model: nn.Module, files: dict[str, Path]) -> None:
    """What rounding hides is seen with a tolerance of nothing, and a large one hides a real difference."""
    assert not verify(model, files["graph"], rtol=0.0, atol=0.0).ok
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[4].bias.add_(1e-3)
    assert not verify(other, files["graph"]).ok
    report = verify(other, files["graph"], rtol=0.5, atol=0.0)
    assert all(outputs.ok for outputs in report.outputs)
    assert report.problems[0].startswith("4.bias: 5 elements differ")  # tolerances are of outputs
    assert verify(other, files["graph"], rtol=0.5, atol=0.0, any_dtype=True).ok


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("value", [float("nan"), -1e-9, float("inf"), float("-inf")])
def test_tolerances_under_which_nothing_fails_are_refused(name: str, value: float, tmp_path: Path) -> None:
    """NaN, negative and infinite tolerances are errors before anything runs, wherever one can be given."""
    limits, x = {name: value}, torch.ones(1, 2)
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    calls = (
        lambda: verify(a, b, x, **limits),
        lambda: compare_outputs([x], [x], **limits),
        lambda: first_difference(a, b, x, **limits),
        lambda: export_onnx(a, x, tmp_path / "m.onnx", **limits),
    )
    for call in calls:
        with pytest.raises(SelectionError, match=f"{name}={value}: a tolerance is"):
            call()
    assert not list(tmp_path.iterdir())


def test_no_common_ground_is_a_failure_with_a_sentence(tmp_path: Path) -> None:
    """Two models without weights and without inputs cannot be compared, and that is no pass."""
    report = verify(nn.Tanh(), nn.ReLU())
    assert not report.ok
    assert report.problems[0].startswith("nothing to compare")
    with pytest.raises(VerificationError, match="nothing to compare"):
        report.raise_for_status()
    assert "failed: nothing to compare" in str(report)
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    assert not verify(tmp_path / "empty.pt", tmp_path / "empty.pt").ok


def test_other_names_fail_by_name(model: nn.Module) -> None:
    """Tensors that only one side has are listed."""
    report = verify(model, nn.Sequential(*list(model)[:4]))
    assert report.problems == ("4.weight: only on the first side", "4.bias: only on the first side")


# What cannot be read -------------------------------------------------------------------------------------


class Mine(nn.Linear):
    """A class of the user's own, which a file cannot bring along without running code."""


def test_unreadable_and_unsafe_files_are_errors(model: nn.Module, tmp_path: Path) -> None:
    """Missing, damaged and hostile files raise what reading them raises; they are not merely different."""
    with pytest.raises(InputMissingError):
        verify(model, tmp_path / "missing.pt")
    for name in ("cut.pt", "cut.onnx"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 nothing")
        with pytest.raises(InputError):
            verify(model, tmp_path / name)
    torch.save(Mine(2, 2), tmp_path / "mine.pt")
    with pytest.raises(UnsafeFileError):
        verify(model, tmp_path / "mine.pt")
    assert verify(tmp_path / "mine.pt", tmp_path / "mine.pt", trust_pickle=True).ok


def test_an_architecture_nobody_needs_is_an_error(model: nn.Module, files: dict[str, Path]) -> None:
    """arch without a checkpoint to build for would be ignored in silence."""
    with pytest.raises(SelectionError, match="arch"):
        verify(model, files["graph"], arch=build)


def test_inputs_that_do_not_fit_are_named(model: nn.Module, files: dict[str, Path]) -> None:
    """Inputs that neither side takes are an error of the caller's; where one side takes them, the sides differ."""
    with pytest.raises(InputError, match=r"fit neither side: .*mat1.*2x3x8"):
        verify(model, files["graph"], torch.randn(2, 3, 9))
    report = verify(nn.Identity(), files["graph"], torch.randn(2, 3, 9))
    assert not report.ok
    assert any("does not run on these inputs" in p and "2x3x8" in p for p in report.problems)


@pytest.mark.parametrize("kind", [torch.float32, torch.complex64, torch.float8_e5m2])
def test_nan_weights_prove_nothing(kind: torch.dtype, tmp_path: Path) -> None:
    """A file with NaN in a weight does not pass for equal to itself."""
    torch.save({"w": torch.tensor([[1.0, float("nan")]]).to(kind)}, tmp_path / "a.pt")
    report = verify(tmp_path / "a.pt", tmp_path / "a.pt")
    assert not report.ok
    assert "NaN on both sides" in report.problems[0]


class Cache:
    """Keeps tensors in an attribute, as the caches of language models do, beside what is no tensor."""

    def __init__(self, keys: list[torch.Tensor]) -> None:
        self.keys, self.name, self.itself = keys, "cache", self


class Structured(nn.Module):
    """Returns a nest of containers and objects: what it is, is decided from outside."""

    def __init__(self, make: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.make = nn.Linear(3, 3), nn.Linear(3, 3), make

    def forward(self, x: torch.Tensor) -> Any:
        return self.make(self.first(x), self.second(x))


@dataclass
class Both:
    """A dataclass of outputs."""

    y: torch.Tensor
    cache: Any


@pytest.mark.parametrize(
    "make",
    [
        lambda y, k: {"y": y, "cache": Cache([k]), "note": "no tensor"},
        lambda y, k: (y, None, 3, Cache([k])),
        lambda y, k: Both(y, [Cache([k]), {"more": k}]),
        lambda y, k: [Cache([y]), (k, "a word")],
    ],
)
def test_two_modules_that_return_any_structure_with_tensors(make: Any) -> None:
    """Every tensor in it counts, and nothing else; a difference that shows in a cache alone fails and is found."""
    torch.manual_seed(0)
    a, x = Structured(make), torch.randn(4, 3)
    b = apply_weight_norm(copy.deepcopy(a))
    verify(a, b, x).raise_for_status()
    assert len(verify(a, b, x).outputs[0].outputs) >= 2
    assert first_difference(a, b, x).layer is None
    with torch.no_grad():
        b.second.bias[0] += 1
    report = verify(a, b, x, any_dtype=True)
    assert not report.ok
    assert len([o for o in report.outputs[0].outputs if o.ok]) == 1
    assert first_difference(a, b, x).layer == "second"


def test_outputs_of_other_structure_or_without_tensors_fail(tmp_path: Path) -> None:
    """Two modules must return the same structure, with a tensor in it; beside a graph only tensors will do."""
    torch.manual_seed(0)
    a, x = Structured(lambda y, k: (y, Cache([k]))), torch.randn(4, 3)
    for make in (lambda y, k: (y,), lambda y, k: (y, Cache([k, k])), lambda y, k: {"y": y, "cache": Cache([k])}):
        b = copy.deepcopy(a)
        b.make = make
        for pair in ((a, b), (b, a)):
            with pytest.raises(VerificationError, match="only on the"):
                verify(*pair, x).raise_for_status()
    for nothing in (lambda y, k: None, lambda y, k: Cache([]), lambda y, k: "y", lambda y, k: [nn.Linear(1, 1), Cache]):
        b.make = nothing
        with pytest.raises(InputError, match="without any tensor"):
            verify(b, b, x)
        assert not verify(a, b, x).ok
    b.make = lambda y, k: (y, Cache([k + 1]))
    assert first_difference(a, b, x).layer == "the whole"
    plain = copy.deepcopy(a)
    plain.make = lambda y, k: (y, k)
    export_onnx(plain, x, tmp_path / "model.onnx")
    verify(plain, tmp_path / "model.onnx", x).raise_for_status()
    assert "Cache" in verify(a, tmp_path / "model.onnx", x).failures[0]


def test_language_models_that_return_a_cache() -> None:
    """transformers' models return their keys and values in an object of their own; these are compared."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, intermediate_size=16, num_key_value_heads=2)
    torch.manual_seed(0)
    a, ids = transformers.LlamaForCausalLM(config).eval(), torch.tensor([[1, 2, 3]])
    b = apply_weight_norm(copy.deepcopy(a))
    report = verify(a, b, {"input_ids": ids})
    report.raise_for_status()
    assert len(report.outputs[0].outputs) == 3
    with torch.no_grad():
        b.model.layers[0].self_attn.v_proj.parametrizations.weight.original0.mul_(1.01)
    report = verify(a, b, {"input_ids": ids}, bisect=True)
    assert sum(o.ok for o in report.outputs[0].outputs) == 1
    assert report.parting is not None
    assert report.parting.layer == "model.layers.0.self_attn.v_proj"


# What random inputs and names do not show ----------------------------------------------------------------

_FLOAT, _INT, _BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL


def _info(name: str, kind: int, shape: list[int] | None) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, kind, shape)


def _saved(path: Path, graph: onnx.GraphProto, functions: Sequence[onnx.FunctionProto] = ()) -> Path:
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("own", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=functions), path)
    return path


def _product(path: Path, weight: np.ndarray, place: str) -> Path:
    """x @ w, the weight in another place of the graph; `then` is a branch that is never taken."""
    node, tensor = onnx.helper.make_node, numpy_helper.from_array(weight, "w")
    ends = [_info("x", _FLOAT, [4, 8])], [_info("y", _FLOAT, [4, 8])]
    product, constant = node("MatMul", ["x", "w"], ["y"]), node("Constant", [], ["w"], value=tensor)
    if place == "constant":
        return _saved(path, onnx.helper.make_graph([constant, product], "g", *ends))
    if place == "function":
        opset = [onnx.helper.make_opsetid("", 18)]
        body = onnx.helper.make_function("own", "Product", ["x"], ["y"], [constant, product], opset)
        call = node("Product", ["x"], ["y"], domain="own")
        return _saved(path, onnx.helper.make_graph([call], "g", *ends), [body])
    one = numpy_helper.from_array(np.eye(8, dtype=np.float32), "one")
    branches = {
        "then_branch": onnx.helper.make_graph([product], "then", [], [_info("y", _FLOAT, [4, 8])], [tensor]),
        "else_branch": onnx.helper.make_graph(
            [node("MatMul", ["x", "one"], ["z"])], "else", [], [_info("z", _FLOAT, [4, 8])], [one]
        ),
    }
    never = numpy_helper.from_array(np.array(False), "never")
    return _saved(path, onnx.helper.make_graph([node("If", ["never"], ["y"], **branches)], "g", *ends, [never]))


@pytest.mark.parametrize("place", ["constant", "function", "then"])
def test_weights_count_wherever_they_stand_in_a_graph(tmp_path: Path, place: str) -> None:
    """One bit off in a `Constant`, in a function or in a branch that no input takes: the two graphs differ."""
    right = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    wrong = right.copy()
    wrong.view(np.uint32)[3, 4] ^= 1
    a, b = _product(tmp_path / "a.onnx", right, place), _product(tmp_path / "b.onnx", wrong, place)
    assert verify(a, _product(tmp_path / "c.onnx", right, place)).ok
    assert verify(a, b).problems[0].startswith("w: 1 elements differ, by up to 1 unit")


def _lookup(path: Path, table: np.ndarray, name: str, positions: int = 10) -> Path:
    """Rows of a table, the indices by a way that rearranges them."""
    node = onnx.helper.make_node
    shape = numpy_helper.from_array(np.array([-1]), "shape")
    nodes = [
        node("Cast", ["ids"], ["wide"], to=_INT),
        node("Reshape", ["wide", "shape"], ["flat"]),
        node("Gather", [name, "flat"], ["y"], axis=0),
    ]
    ends = [_info("ids", onnx.TensorProto.INT32, [2, positions // 2])], [_info("y", _FLOAT, None)]
    return _saved(path, onnx.helper.make_graph(nodes, "g", *ends, [shape, numpy_helper.from_array(table, name)]))


@pytest.mark.parametrize("called", ["own.Look (both, small)", "Gather <axis = 0> (small, both)"])
@pytest.mark.parametrize("known", [True, False])
def test_the_rows_that_an_input_can_mean_are_found(tmp_path: Path, called: str, known: bool) -> None:
    """Through functions, branches and rearrangements the smallest table counts; what may be too large is not tried."""
    text = """<ir_version: 9, opset_import: ["" : 18, "own" : 1]>
    g (int64[2, 3] ids, int64[2, 3] mask, bool c) => (float[6, 2] y)
    <float[9, 2] wide, float[5, 2] small, int64[1] flat, int64 one> {
        row = Reshape (ids, flat)
        moved = SHIFT
        both = Where (c, row, moved)
        y0 = If (c) <then_branch = t () => (float[6, 2] y1) {y1 = Gather <axis = 0> (wide, both)},
                     else_branch = e () => (float[6, 2] y2) {y2 = CALLED}>
        kept = Cast <to = 1> (mask)
        sum = ReduceMax <keepdims = 0> (kept)
        y = Add (y0, sum)
    }
    <domain: "own", opset_import: ["" : 18]> Look (i, table) => (o) {o = Gather <axis = 0> (table, i)}"""
    shift = "Identity (row)" if known else "Add (row, one)"
    model = onnx.parser.parse_model(text.replace("CALLED", called).replace("SHIFT", shift))
    sizes = {"wide": np.zeros((9, 2), np.float32), "small": np.zeros((5, 2), np.float32)}
    arrays = {**sizes, "flat": np.array([-1]), "one": np.array(1)}
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    assert rows_indexed(ir.from_proto(model)) == {"ids": 5}
    onnx.save(model, tmp_path / "m.onnx")
    report = verify(tmp_path / "m.onnx", tmp_path / "m.onnx")
    report.raise_for_status()
    assert any("so 0 and 1 were tried" in note for note in report.notes) != known


def test_functions_that_call_each_other_twice_end_the_search() -> None:
    """A graph of a few lines may stand for 2^40 lookups: what they mean is not known then, and soon."""
    lines = [
        f'<domain: "own", opset_import: ["own" : 1]> F{i} (x) => (y) {{ z = own.F{i + 1} (x) y = own.F{i + 1} (x) }}'
        for i in range(40)
    ]
    last = '<domain: "own", opset_import: ["" : 18]> F40 (x) => (y) { y = Identity (x) }'
    head = '<ir_version: 9, opset_import: ["" : 18, "own" : 1]> g (int64[2] x) => (int64[2] y) { y = own.F0 (x) }'
    model = onnx.parser.parse_model("\n".join([head, *lines, last]))
    assert rows_indexed(ir.from_proto(model)) == {}


@pytest.mark.parametrize("row", [0, 1, 17, 29])
def test_tables_are_tried_in_every_row_that_there_is_room_for(tmp_path: Path, row: int) -> None:
    """Three sets of ten indices see each of 30 rows, whatever the table is called on either side."""
    right = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    wrong = right.copy()
    wrong[row] += 1
    a, b = _lookup(tmp_path / "a.onnx", right, "table"), _lookup(tmp_path / "b.onnx", wrong, "rows")
    assert verify(a, _lookup(tmp_path / "c.onnx", right, "rows")).ok
    assert "off by" in verify(a, b).problems[0]


@pytest.mark.parametrize("rows", [(40, 64), (64, 40)])
def test_indices_fit_the_smaller_table_of_two_graphs(tmp_path: Path, rows: tuple[int, int]) -> None:
    """Tables that agree as far as both go give the same outputs, whichever graph has the longer one."""
    table = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    a, b = (_lookup(tmp_path / f"{number}.onnx", table[:number], "table") for number in rows)
    report = verify(a, b)
    assert report.notes == ()
    assert report.outputs
    assert all(outputs.ok for outputs in report.outputs)


def test_embeddings_of_a_module_are_tried_in_more_than_two_rows(tmp_path: Path) -> None:
    """An embedding that is wrong in a row which the ids reach, under another name than the graph's, fails."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 4))
    export_onnx(model, torch.zeros(2, 6, dtype=torch.int64), tmp_path / "m.onnx")
    other = nn.Sequential(nn.Sequential(copy.deepcopy(model[0])), copy.deepcopy(model[1]))
    verify(other, tmp_path / "m.onnx").raise_for_status()
    with torch.no_grad():
        other[0][0].weight[2:] = 5.0
    assert "off by" in verify(other, tmp_path / "m.onnx").problems[0]


def test_a_weight_of_the_same_name_with_other_bits_fails_beside_a_graph_that_runs(model: nn.Module, files: Any) -> None:
    """Outputs within tolerance are no excuse: the graph names the weight, and it is another one."""
    report = verify(_damage(model, "bit"), files["graph"])
    assert all(outputs.ok for outputs in report.outputs)
    assert report.problems == (
        "4.weight: 1 elements differ, by up to 1 units in the last place (at (2, 3)), under the same name",
    )
    assert not verify(files["graph"], _damage(model, "bit")).ok


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_batch_norms_that_an_exporter_merges_are_no_other_weights(tmp_path: Path, exporter: Any) -> None:
    """A convolution that took its BatchNorm in has other bits under the same name: it is named, and outputs decide."""
    torch.manual_seed(0)
    layers = nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 8, 1), nn.Flatten(), nn.Linear(48, 5)
    model: Any = nn.Sequential(*layers).train()
    model(torch.randn(4, 3, 8))
    export_onnx(model, torch.randn(2, 3, 8), tmp_path / "m.onnx", exporter=exporter)
    report = verify(model, tmp_path / "m.onnx")
    report.raise_for_status()
    assert any("0.weight" in n and "other bits" in n for n in report.notes) == (exporter == "dynamo")
    for number, place in ((4, (1, 2)), (2, (1, 2, 0))):
        with torch.no_grad():
            model[number].weight.view(torch.int32)[place] ^= 1
        assert verify(model, tmp_path / "m.onnx").problems[0].startswith(f"{number}.weight: 1 elements differ")
        with torch.no_grad():
            model[number].weight.view(torch.int32)[place] ^= 1


def test_names_that_exporters_make_up_may_change_places(tmp_path: Path) -> None:
    """Graphs that number their weights differently are judged by their outputs; a wrong bit under one name fails."""

    def graph(name: str, order: list[str], bit: int = 0) -> Path:
        rng, node = np.random.default_rng(0), onnx.helper.make_node
        arrays = [rng.standard_normal((8, 8)).astype(np.float32) for _ in order]
        arrays[-1].view(np.uint32)[0, 0] ^= bit
        nodes = [node("MatMul", [f"x{i}" if i else "x", w], [f"x{i + 1}"]) for i, w in enumerate(order)]
        ends = [_info("x", _FLOAT, [2, 8])], [_info(f"x{len(order)}", _FLOAT, [2, 8])]
        tensors = [numpy_helper.from_array(array, w) for array, w in zip(arrays, order, strict=True)]
        return _saved(tmp_path / name, onnx.helper.make_graph(nodes, "g", *ends, tensors))

    a = graph("a.onnx", ["w1", "w2", "w3"])
    verify(a, graph("b.onnx", ["w2", "w1", "other"])).raise_for_status()
    assert "w3: 1 elements differ" in verify(a, graph("c.onnx", ["w1", "other", "w3"], bit=1)).problems[0]


def test_a_weight_that_a_graph_holds_the_other_way_round_is_no_contradiction() -> None:
    """Exporters transpose: a square weight under its own name may have its axes in the other order."""
    a = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    assert contradictions({"w": a}, {"w": a.T.copy()}, renamed=False) == ([], [])
    problems, merged = contradictions({"w": a}, {"w": a[::-1].copy()}, renamed=False)
    assert (len(problems), merged) == (1, [])


def test_a_batch_norm_that_is_still_there_excuses_no_other_weight() -> None:
    """Rows that are scaled are a merged batch norm only where its variance is gone, not where it has another name."""
    a, variance = np.random.default_rng(0).random((3, 5), np.float32), np.ones(3, np.float32)
    known, scaled = {"w": a, "bn.running_var": variance}, a * np.float32([[2], [3], [4]])
    problems, merged = contradictions(known, {"w": scaled, "var": variance}, renamed=False)
    assert (len(problems), merged) == (1, [])
    assert contradictions(known, {"w": scaled}, renamed=False) == ([], ["w"])


def test_swapped_weights_of_a_checkpoint_fail_against_the_graph(tmp_path: Path) -> None:
    """Two weights of one shape in each other's place both stand in the graph, under the wrong name."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    export_onnx(model, torch.ones(1, 4), tmp_path / "m.onnx")
    state = model.state_dict()
    torch.save(state, tmp_path / "right.pt")
    torch.save({**state, "0.weight": state["2.weight"], "2.weight": state["0.weight"]}, tmp_path / "wrong.pt")
    assert verify(tmp_path / "right.pt", tmp_path / "m.onnx").ok
    assert not verify(tmp_path / "wrong.pt", tmp_path / "m.onnx").ok


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e-30])
def test_small_outputs_are_held_to_their_own_size(scale: float) -> None:
    """Flipped signs fail at any magnitude; rounding errors pass, and so do elements that cancel among larger ones."""
    y = np.float32([1.0, -2.0, 0.5]) * np.float32(scale)
    assert not compare_outputs([-y], [y]).ok
    assert compare_outputs([y * np.float32(1 + 1e-5)], [y]).ok
    assert compare_outputs([y - np.float32([0, 0, 0.5]) * np.float32(scale)], [y * np.float32([1, 1, 1e-6])]).ok
    assert compare_outputs([0 * y], [0 * y]).ok
    assert "atol allows" in compare_outputs([np.float32([1e-9])], [np.float32([0.0])]).problems[0]


@pytest.mark.parametrize("rows", [10**9, 10**12])
def test_a_table_that_claims_to_be_large(rows: int, tmp_path: Path) -> None:
    """The size that a graph gives a computed table is a claim: nothing of that size is made."""
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "one"], ["t"]), onnx.helper.make_node("Gather", ["t", "i"], ["y"])],
        "g",
        [tensor("i", 7, [2]), tensor("x", 1, ["n"])],
        [tensor("y", 1, [2])],
        [onnx.numpy_helper.from_array(np.ones(1, np.float32), "one")],
        value_info=[tensor("t", 1, [rows])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "a.onnx")
    assert verify(tmp_path / "a.onnx", tmp_path / "a.onnx").ok


class _SmallIds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids.long())  # type: ignore[no-any-return]


def test_made_up_ids_stay_within_their_type(tmp_path: Path) -> None:
    model = _SmallIds().eval()
    export_onnx(model, torch.zeros(2, 5, dtype=torch.int8), tmp_path / "a.onnx")
    assert verify(model, tmp_path / "a.onnx").ok
