"""Weight norm is found in ONNX graphs by what it computes, and replaced by the weights `compose` gives."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn.utils import weight_norm as legacy_weight_norm
from torch.nn.utils.parametrizations import weight_norm

from wnsurgery import onnx_values
from wnsurgery.errors import (
    InputError,
    InputMissingError,
    OutputError,
    OutputExistsError,
    UnsafeFileError,
)
from wnsurgery.graph import find_weight_norms, fold_onnx
from wnsurgery.onnx_file import read_onnx, write_onnx
from wnsurgery.reparam import compose
from wnsurgery.surgery import apply_weight_norm, fold_weight_norm

RNG = np.random.default_rng(0)
G = RNG.uniform(0.5, 2, (4, 1)).astype(np.float32)
V = RNG.standard_normal((4, 6)).astype(np.float32)
X = RNG.standard_normal((2, 6)).astype(np.float32)


# Helpers -------------------------------------------------------------------------------------------------


def _save(path: Path, body: str, *, opset: int = 18, ir: int = 9, functions: str = "", **arrays: np.ndarray) -> Path:
    """A file with the nodes of `body`, input x (N, 6), output y, and the arrays as initializers."""
    text = f"""<ir_version: {ir}, opset_import: ["" : {opset}, "local" : 1], producer_name: "me">
        g (float[N, 6] x) => (float[N, M] y) {{ {body} }} {functions}"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in arrays.items())
    if ir < 4:
        for name, a in arrays.items():
            kind = helper.np_dtype_to_tensor_dtype(a.dtype)
            model.graph.input.append(helper.make_tensor_value_info(name, kind, a.shape))
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def _run(path: Path, *inputs: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    initializers = {i.name for i in session.get_overridable_initializers()}
    names = [i.name for i in session.get_inputs() if i.name not in initializers]
    found: list[np.ndarray] = session.run(None, dict(zip(names, inputs, strict=True)))
    return found


def _initializers(path: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(path).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def _exact(g: np.ndarray, v: np.ndarray, axis: int | tuple[int, ...] | None) -> np.ndarray:
    """g * v / ||v|| in float64 numpy."""
    wide = v.astype(np.float64)
    return g.astype(np.float64) * wide / np.sqrt((wide * wide).sum(axis=axis, keepdims=True))


def _norms_of_constants(path: Path) -> list[str]:
    """Reductions that depend on nothing the caller passes in, told without the code under test."""
    model = onnx.load(path)
    constant = {tensor.name for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if all(name in constant for name in node.input if name):
            constant.update(node.output)
            if node.op_type.startswith(("Reduce", "Lp")):
                found.append(node.name or node.op_type)
    return found


def _export(model: nn.Module, x: torch.Tensor, path: Path, *, dynamo: bool) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), (x,), path, dynamo=dynamo, external_data=False, verbose=False)


def _trained(model: nn.Module) -> nn.Module:
    """Magnitudes that are no longer the norms."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    return model


def _legacy(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return legacy_weight_norm(layer)


# every one with more than 8192 elements in v, so that no exporter folds it by itself
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "torch": (lambda: weight_norm(nn.Conv1d(48, 64, 3)), (1, 48, 8)),
    "torch, whole": (lambda: weight_norm(nn.Conv1d(48, 64, 3), dim=None), (1, 48, 8)),
    "torch, last": (lambda: weight_norm(nn.Conv1d(48, 64, 3, groups=1), dim=2), (1, 48, 8)),
    "legacy": (lambda: _legacy(nn.Linear(96, 100)), (2, 96)),
    "legacy, transposed": (lambda: _legacy(nn.ConvTranspose1d(48, 64, 3)), (1, 48, 8)),
    "ours": (lambda: apply_weight_norm(nn.Conv1d(48, 64, 3)), (1, 48, 8)),
    "ours, transposed": (lambda: apply_weight_norm(nn.ConvTranspose1d(64, 64, 5, groups=2)), (1, 64, 8)),
    "ours, log": (lambda: apply_weight_norm(nn.Linear(96, 100), magnitude="log"), (2, 96)),
}


@pytest.mark.parametrize(
    ("name", "half"), [*((name, False) for name in NETS), ("torch", True), ("ours, transposed", True)]
)
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_exports_fold_to_the_bits_of_the_module(tmp_path: Path, name: str, dynamo: bool, half: bool) -> None:
    """Whatever exporter wrote it, the folded file holds the very weight that folding the module gives."""
    build, shape = NETS[name]
    model = _trained(build())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if half:
        model, x = model.half(), x.half()
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    _export(model, x, before, dynamo=dynamo)
    assert _norms_of_constants(before)
    report = fold_onnx(before, after)
    assert len(report.found) == 1
    assert report.left == ()
    assert _norms_of_constants(after) == []
    onnx.checker.check_model(after)
    weight = fold_weight_norm(model).weight.detach().numpy()
    if name != "ours, log":  # exporters write e^s in float64 or float32, so s itself is lost
        assert any(a.dtype == weight.dtype and a.tobytes() == weight.tobytes() for a in _initializers(after).values())
    for a, b in zip(_run(before, x.numpy()), _run(after, x.numpy()), strict=True):
        assert np.abs(a.astype(np.float64) - b).max() <= (4e-3 if half else 4e-6) * np.abs(a).max()


def test_folding_twice_changes_nothing(tmp_path: Path) -> None:
    """A folded graph has nothing to find, and folding it copies it byte for byte."""
    model = _trained(weight_norm(nn.Conv1d(48, 64, 3)))
    _export(model, torch.randn(1, 48, 8), tmp_path / "a.onnx", dynamo=True)
    fold_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert find_weight_norms(tmp_path / "b.onnx") == []
    report = fold_onnx(tmp_path / "b.onnx", tmp_path / "c.onnx")
    assert report.found == ()
    assert "no weight norm found" in str(report)
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "c.onnx").read_bytes()


# Spellings -----------------------------------------------------------------------------------------------

AXES = np.int64([1])
TWO = np.float32(2)
SPELLINGS = {
    "ReduceL2, w = v * (g / n)": "n = ReduceL2(v, axes) q = Div(g, n) w = Mul(v, q)",
    "ReduceL2, w = g * (v / n)": "n = ReduceL2(v, axes) q = Div(v, n) w = Mul(g, q)",
    "ReduceL2, w = (g * v) / n": "n = ReduceL2(v, axes) q = Mul(g, v) w = Div(q, n)",
    "ReduceL2, reciprocal": "n = ReduceL2(v, axes) r = Reciprocal(n) q = Mul(g, r) w = Mul(q, v)",
    "Pow, ReduceSum, Sqrt": "s = Pow(v, two) m = ReduceSum(s, axes) n = Sqrt(m) q = Div(g, n) w = Mul(v, q)",
    "Mul, ReduceSum, Pow half": "s = Mul(v, v) m = ReduceSum(s, axes) n = Pow(m, half) q = Div(v, n) w = Mul(q, g)",
    "ReduceSumSquare": "m = ReduceSumSquare(v, axes) n = Sqrt(m) q = Div(v, n) w = Mul(q, g)",
    "LpNormalization": "q = LpNormalization <axis = 1, p = 2> (v) w = Mul(q, g)",
    "no keepdims": "n = ReduceL2 <keepdims = 0> (v, axes) m = Unsqueeze(n, axes) q = Div(v, m) w = Mul(q, g)",
    "epsilon": "n = ReduceL2(v, axes) m = Add(n, eps) q = Div(g, m) w = Mul(v, q)",
    "clipped": "n = ReduceL2(v, axes) m = Clip(n, eps) q = Div(g, m) w = Mul(v, q)",
    "expanded": "n = ReduceL2(v, axes) s = Shape(v) e = Expand(n, s) q = Div(v, e) w = Mul(q, g)",
    "in float64": """d = Cast <to = 11> (v) n = ReduceL2(d, axes) c = Cast <to = 11> (g) q = Div(c, n) p = Mul(d, q)
        w = Cast <to = 1> (p)""",
    "transposed": """t = Transpose <perm = [1, 0]> (v) n = ReduceL2 <keepdims = 1> (t, axes0) h = Transpose(g)
        q = Div(h, n) p = Mul(t, q) w = Transpose <perm = [1, 0]> (p)""",
    "flat g": "n = ReduceL2(v, axes) f = Flatten <axis = 0> (g) u = Transpose(f) q = Div(u, n) w = Mul(v, q)",
    "Einsum": """s = Einsum <equation = "oi,oi->o"> (v, v) r = Sqrt(s) n = Unsqueeze(r, axes) q = Div(g, n)
        w = Mul(v, q)""",
    "squares of two copies": """i = Identity(v) s = Mul(v, i) m = ReduceSum(s, axes) n = Sqrt(m) q = Div(g, n)
        w = Mul(v, q)""",
    "mean of squares": """s = Mul(v, v) m = ReduceMean(s, axes) k = Mul(m, six) n = Sqrt(k) q = Div(g, n)
        w = Mul(v, q)""",
    "scaled by the largest element": """a = Abs(v) m = ReduceMax(a, axes) u = Div(v, m) n = ReduceL2(u, axes)
        q = Div(g, n) w = Mul(u, q)""",
    "Identity and Squeeze": """i = Identity(v) n = ReduceL2(i, axes) z = Squeeze(g, axes) u = Unsqueeze(z, axes)
        q = Div(u, n) w = Mul(i, q)""",
}


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_found(tmp_path: Path, spelling: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same arithmetic in other words is the same weight norm, also where arrays are held in float32."""
    if large:
        monkeypatch.setattr(onnx_values, "_LARGE", 4)
    arrays = {"g": G, "v": V, "axes": AXES, "axes0": np.int64([0]), "two": TWO}
    arrays |= {"six": np.float32(6), "half": np.float32(0.5), "eps": np.float32(1e-12)}
    used = {k: a for k, a in arrays.items() if f"({k})" in spelling or k in SPELLINGS[spelling].replace(")", ",")}
    tail = " y = Gemm <transB = 1> (x, w)"
    path = _save(tmp_path / "a.onnx", SPELLINGS[spelling] + tail, **used)
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert [(f.g, f.v, f.shape) for f in report.found] == [("g", "v", V.shape)]
    folded = _initializers(tmp_path / "b.onnx")
    weights = [a for a in folded.values() if a.shape in (V.shape, V.T.shape) and a.size == V.size]
    assert len(weights) == 1
    weight = weights[0] if weights[0].shape == V.shape else weights[0].T
    assert weight.tobytes() == compose(torch.from_numpy(G), torch.from_numpy(V)).numpy().tobytes()
    np.testing.assert_allclose(weight, _exact(G, V, 1), rtol=2e-7)
    np.testing.assert_allclose(_run(tmp_path / "b.onnx", X)[0], X @ weight.T, rtol=1e-5, atol=1e-6)
    assert _norms_of_constants(tmp_path / "b.onnx") == []


@pytest.mark.parametrize("opset", range(9, onnx.defs.onnx_opset_version() + 1))
def test_every_opset_folds(tmp_path: Path, opset: int) -> None:
    """From opset 9 to the newest, axes being attributes or inputs as each one has it."""
    given = "v, axes" if opset >= 13 else "v"
    reduced = "ReduceSum(s, axes)" if opset >= 13 else "ReduceSum <axes = [1]> (s)"
    l2 = f"ReduceL2({given})" if opset >= 18 else "ReduceL2 <axes = [1]> (v)"
    for body in (f"n = {l2}", f"s = Pow(v, two) m = {reduced} n = Sqrt(m)"):
        text = body + " q = Div(g, n) w = Mul(v, q) y = Gemm <transB = 1> (x, w, b)"
        arrays = {"axes": AXES} if "axes)" in text else {}
        arrays |= {"two": TWO} if "two" in text else {}
        path = _save(tmp_path / "a.onnx", text, opset=opset, ir=9 if opset < 22 else 10, g=G, v=V,
                     b=np.zeros(4, np.float32), **arrays)  # fmt: skip
        report = fold_onnx(path, tmp_path / "b.onnx", force=True)
        assert (len(report.found), report.nodes_after) == (1, 1)
        weight = _initializers(tmp_path / "b.onnx")["w"]
        assert weight.tobytes() == compose(torch.from_numpy(G), torch.from_numpy(V)).numpy().tobytes()
        assert onnx.load(tmp_path / "b.onnx").opset_import[0].version == opset


def test_a_magnitude_that_is_computed_from_constants(tmp_path: Path) -> None:
    """g = softplus(s) is a magnitude like any other."""
    body = "p = Softplus(g) n = ReduceL2(v, axes) q = Div(p, n) w = Mul(v, q) y = Gemm <transB = 1> (x, w)"
    fold_onnx(_save(tmp_path / "a.onnx", body, g=G, v=V, axes=AXES), tmp_path / "b.onnx")
    weight = _initializers(tmp_path / "b.onnx")["w"]
    np.testing.assert_allclose(weight, _exact(np.log1p(np.exp(G.astype(np.float64))), V, 1), rtol=4e-7)


def test_old_opsets_give_axes_as_attributes(tmp_path: Path) -> None:
    """Opset 9, where axes are attributes and initializers are inputs (IR 3), folds as well and stays valid."""
    body = "n = ReduceL2 <axes = [1], keepdims = 1> (v) q = Div(g, n) w = Mul(v, q) y = Gemm <transB = 1> (x, w, b)"
    path = _save(tmp_path / "a.onnx", body, opset=9, ir=3, g=G, v=V, b=np.zeros(4, np.float32))
    before = _run(path, X)[0]
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert len(report.found) == 1
    onnx.checker.check_model(tmp_path / "b.onnx")
    assert {i.name for i in onnx.load(tmp_path / "b.onnx").graph.input} == {"x", "b", "w"}
    np.testing.assert_allclose(_run(tmp_path / "b.onnx", X)[0], before, rtol=1e-5, atol=1e-6)


def test_constant_nodes_count_as_constants(tmp_path: Path) -> None:
    """Weights that stand in Constant nodes fold, and the Constant nodes go."""
    path = _save(tmp_path / "a.onnx", SPELLINGS["ReduceL2, w = v * (g / n)"] + " y = Gemm <transB = 1> (x, w)",
                 g=G, v=V, axes=AXES)  # fmt: skip
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    del model.graph.initializer[:]
    path.write_bytes(model.SerializeToString())
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert (report.nodes_before, report.nodes_after) == (7, 1)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_float_type_folds_to_the_bits_of_compose(tmp_path: Path, dtype: type) -> None:
    """fp64, fp32, fp16 and bf16 weights come out as compose gives them."""
    g, v = (RNG.uniform(0.5, 2, (4, 1)).astype(dtype), RNG.standard_normal((4, 6)).astype(dtype))
    body = "n = ReduceL2(v, axes) q = Div(g, n) w = Mul(v, q) f = Cast <to = 1> (w) y = Gemm <transB = 1> (x, f)"
    path = _save(tmp_path / "a.onnx", body, g=g, v=v, axes=AXES)
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert len(report.found) == 1
    (found,) = _initializers(tmp_path / "b.onnx").values()
    exact = _exact(g, v, 1)
    steps = np.abs(found.astype(np.float64) - exact) / np.abs(exact) / float(ml_dtypes.finfo(dtype).eps)
    assert found.dtype == dtype
    assert steps.max() <= 1.5
    wide = {np.float64: torch.float64}.get(dtype, torch.float32)
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(np.dtype(dtype).name, wide)
    expected = compose(torch.tensor(g.astype(np.float64)).to(wide), torch.tensor(v.astype(np.float64)).to(kind))
    assert (found.astype(np.float64) == expected.double().numpy()).all()


def test_rows_of_zeros_fold_to_zeros(tmp_path: Path) -> None:
    """A dead row, 0 / 0 in the graph, is a row of zeros in the folded weight; the rest is right."""
    v = V.copy()
    v[2] = 0
    path = _save(tmp_path / "a.onnx", SPELLINGS["ReduceL2, w = v * (g / n)"] + " y = Gemm <transB = 1> (x, w)",
                 g=G, v=v, axes=AXES)  # fmt: skip
    fold_onnx(path, tmp_path / "b.onnx")
    weight = _initializers(tmp_path / "b.onnx")["w"]
    assert (weight[2] == 0).all()
    np.testing.assert_allclose(weight[[0, 1, 3]], _exact(G, V, 1)[[0, 1, 3]], rtol=2e-7)


def test_a_normalised_weight_without_magnitude_is_found(tmp_path: Path) -> None:
    """v / ||v|| alone, as in cosine classifiers, is weight norm with g = 1."""
    path = _save(tmp_path / "a.onnx", "n = ReduceL2(v, axes) w = Div(v, n) y = Gemm <transB = 1> (x, w)",
                 v=V, axes=AXES)  # fmt: skip
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert [(f.g, f.v) for f in report.found] == [(None, "v")]
    np.testing.assert_allclose(_initializers(tmp_path / "b.onnx")["w"], _exact(np.float32(1), V, 1), rtol=2e-7)


# What else is in the graph -------------------------------------------------------------------------------


def test_nothing_else_in_the_graph_changes(tmp_path: Path) -> None:
    """Other nodes, names, initializers, opset, metadata and documentation stay as they were."""
    body = SPELLINGS["ReduceL2, w = v * (g / n)"] + " a = Gemm <transB = 1> (x, w) b = Add(a, bias) y = Relu(b)"
    path = _save(tmp_path / "a.onnx", body, g=G, v=V, axes=AXES, bias=np.float32([1, 2, 3, 4]), idle=TWO)
    model = onnx.load(path)
    for i, node in enumerate(model.graph.node):
        node.name, node.doc_string = f"node{i}", f"about {i}"
    model.doc_string, model.model_version = "mine", 7
    helper.set_model_props(model, {"author": "someone"})
    path.write_bytes(model.SerializeToString())
    fold_onnx(path, tmp_path / "b.onnx")
    after = onnx.load(tmp_path / "b.onnx")
    for old, new in zip(model.graph.node[3:], after.graph.node, strict=True):
        old.ClearField("domain")  # the empty domain, spelled out
        assert old == new
    assert {t.name for t in after.graph.initializer} == {"w", "bias", "idle"}
    assert (after.doc_string, after.model_version, after.producer_name) == ("mine", 7, "me")
    assert [(p.key, p.value) for p in after.metadata_props] == [("author", "someone")]
    assert after.opset_import == model.opset_import
    assert after.graph.input == model.graph.input
    assert after.graph.output == model.graph.output


@pytest.mark.parametrize(("g", "v", "name"), [
    ("up.0.weight_g", "up.0.weight_v", "up.0.weight"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1", "weight"),
    ("a.parametrizations.weight_hh_l0.original0", "a.parametrizations.weight_hh_l0.original1", "a.weight_hh_l0"),
])  # fmt: skip
def test_the_weight_gets_its_plain_name_back(tmp_path: Path, g: str, v: str, name: str) -> None:
    """X.weight_g and X.weight_v become X.weight, unless something else has that name."""
    body = "n = ReduceL2(v, axes) q = Div(g, n) w = Mul(v, q) y = Gemm <transB = 1> (x, w, c)"
    for taken in (False, True):
        model = onnx.load(_save(tmp_path / "a.onnx", body, g=G, v=V, axes=AXES, c=np.zeros(4, np.float32)))
        renamed = {"g": g, "v": v} | ({"c": name} if taken else {})
        for tensor in model.graph.initializer:
            tensor.name = renamed.get(tensor.name, tensor.name)
        for node in model.graph.node:
            node.input[:] = [renamed.get(i, i) for i in node.input]
        (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
        fold_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", force=True)
        assert set(_initializers(tmp_path / "b.onnx")) == ({"w", name} if taken else {name, "c"})
        onnx.checker.check_model(tmp_path / "b.onnx")


def test_one_weight_for_two_consumers_stays_one(tmp_path: Path) -> None:
    """A tied weight becomes one initializer; a norm shared by two weights goes once both are folded."""
    body = """n = ReduceL2(v, axes) q = Div(g, n) w = Mul(v, q) p = Div(h, n) u = Mul(v, p)
        a = Gemm <transB = 1> (x, w) b = Gemm <transB = 1> (x, w) c = Gemm <transB = 1> (x, u) y = Sum(a, b, c)"""
    path = _save(tmp_path / "a.onnx", body, g=G, h=2 * G, v=V, axes=AXES)
    before = _run(path, X)[0]
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert {f.g for f in report.found} == {"g", "h"}
    assert set(_initializers(tmp_path / "b.onnx")) == {"w", "u"}
    assert report.nodes_after == 4
    np.testing.assert_allclose(_run(tmp_path / "b.onnx", X)[0], before, rtol=1e-5)


def test_a_weight_that_is_an_output_keeps_its_name(tmp_path: Path) -> None:
    """Graphs may hand out the weight itself."""
    body = "n = ReduceL2(v, axes) q = Div(g, n) y = Mul(v, q)"
    model = onnx.load(_save(tmp_path / "a.onnx", body + " z = Relu(x)", g=G, v=V, axes=AXES))
    model.graph.output.append(helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, ["N", 6]))
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    fold_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")
    np.testing.assert_allclose(_run(tmp_path / "b.onnx", X)[0], _exact(G, V, 1), rtol=2e-7)


def test_weight_norm_inside_a_branch_is_folded(tmp_path: Path) -> None:
    """The arithmetic may stand in the branches of an If, over weights of the graph around it."""
    body = """t = ReduceSum <keepdims = 0> (x) o = Greater(t, zero)
        y = If (o) <
            then_branch = a () => (float[N, M] ya) { na = ReduceL2(v, axes) qa = Div(g, na) wa = Mul(v, qa)
                ya = Gemm <transB = 1> (x, wa) },
            else_branch = b () => (float[N, M] yb) { nb = ReduceL2(v, axes) qb = Div(g, nb) wb = Mul(v, qb)
                cb = Gemm <transB = 1> (x, wb) yb = Neg(cb) }>"""
    path = _save(tmp_path / "a.onnx", body, g=G, v=V, axes=AXES, zero=np.float32(0))
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert len(report.found) == 2
    onnx.checker.check_model(tmp_path / "b.onnx")
    for x in (X, -X):
        np.testing.assert_allclose(_run(tmp_path / "b.onnx", x)[0], _run(path, x)[0], rtol=1e-5, atol=1e-6)
    kept = onnx.load(tmp_path / "b.onnx").graph.node[-1].attribute
    assert not any(n.op_type == "ReduceL2" for branch in kept for n in branch.g.node)


def test_weight_norm_inside_a_function_is_folded(tmp_path: Path) -> None:
    """A function that normalises is opened where it is called with constants."""
    function = """<domain: "local", opset_import: ["" : 18]> normed (a, m, s) => (o) {
        n = ReduceL2(a, s) q = Div(m, n) o = Mul(a, q) }"""
    body = "w = local.normed(v, g, axes) y = Gemm <transB = 1> (x, w)"
    path = _save(tmp_path / "a.onnx", body, functions=function, g=G, v=V, axes=AXES)
    before = _run(path, X)[0]
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert len(report.found) == 1
    np.testing.assert_allclose(_run(tmp_path / "b.onnx", X)[0], before, rtol=1e-5, atol=1e-6)


# What is left alone --------------------------------------------------------------------------------------

UNTOUCHED = {
    "an activation is normalised": ("n = ReduceL2(x, axes) q = Div(x, n) y = Gemm <transB = 1> (q, v)", "run-time"),
    "the magnitude comes from an input": (
        "n = ReduceL2(v, axes) a = ReduceMean(x) q = Div(a, n) w = Mul(v, q) y = Gemm <transB = 1> (x, w)",
        "constant, but no part",
    ),
    "the direction comes from an input": (
        """a = ReduceMean(x) u = Add(v, a) n = ReduceL2(u, axes) q = Div(g, n) w = Mul(u, q)
        y = Gemm <transB = 1> (x, w)""",
        "run-time",
    ),
    "a norm of a weight is only reported": (
        "n = ReduceL2 <keepdims = 0> (v, axes) a = Gemm <transB = 1> (x, v) y = Add(a, n)",
        "constant, but no part",
    ),
    "divided by the norm's square": (
        "n = ReduceSumSquare(v, axes) q = Div(g, n) w = Mul(v, q) y = Gemm <transB = 1> (x, w)",
        "constant, but no part",
    ),
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_what_only_looks_like_it_is_left_and_named(tmp_path: Path, case: str) -> None:
    """Norms that are not g * v / ||v|| of constants stay, the file stays byte for byte, and the report says why."""
    body, reason = UNTOUCHED[case]
    names = {"g": G, "v": V, "axes": AXES}
    path = _save(tmp_path / "a.onnx", body, **{k: a for k, a in names.items() if f"{k}," in body or f"{k})" in body})
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert report.found == ()
    assert len(report.left) == 1
    assert reason in report.left[0][1]
    assert (tmp_path / "b.onnx").read_bytes() == path.read_bytes()


def test_an_initializer_that_a_caller_may_override_is_no_constant(tmp_path: Path) -> None:
    """From IR 4 on, an initializer that is also an input is a default, not a constant."""
    body = SPELLINGS["ReduceL2, w = v * (g / n)"] + " y = Gemm <transB = 1> (x, w)"
    model = onnx.load(_save(tmp_path / "a.onnx", body, g=G, v=V, axes=AXES))
    model.graph.input.append(helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, V.shape))
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    report = fold_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert report.found == ()
    assert "override" in report.left[0][1]


def test_a_hostile_expand_does_not_fill_the_memory(tmp_path: Path) -> None:
    """Constants that would evaluate to terabytes are left alone."""
    body = """e = Expand(v, shape) n = ReduceL2 <keepdims = 0> (e) q = Div(g, n) w = Mul(v, q)
        y = Gemm <transB = 1> (x, w)"""
    path = _save(tmp_path / "a.onnx", body, g=G, v=V, shape=np.int64([1 << 20, 1 << 20, 4, 6]))
    assert find_weight_norms(path) == []


# Files ---------------------------------------------------------------------------------------------------


def _simple(path: Path) -> Path:
    body = SPELLINGS["ReduceL2, w = v * (g / n)"] + " y = Gemm <transB = 1> (x, w)"
    return _save(path, body, g=G, v=V, axes=AXES)


def test_an_existing_output_is_kept_unless_forced(tmp_path: Path) -> None:
    """Without force nothing is overwritten, the input included; with it the new file takes its place."""
    path = _simple(tmp_path / "a.onnx")
    (tmp_path / "b.onnx").write_text("precious")
    with pytest.raises(OutputExistsError):
        fold_onnx(path, tmp_path / "b.onnx")
    with pytest.raises(OutputExistsError):
        fold_onnx(path, path, force=True)
    assert (tmp_path / "b.onnx").read_text() == "precious"
    fold_onnx(path, tmp_path / "b.onnx", force=True)
    assert _norms_of_constants(tmp_path / "b.onnx") == []
    fold_onnx(path, path, in_place=True)
    assert path.read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


def test_damaged_missing_and_foreign_inputs(tmp_path: Path) -> None:
    """What is not an ONNX file is one clear error, and no output appears."""
    content = _simple(tmp_path / "a.onnx").read_bytes()
    for name, data in (("cut", content[: len(content) // 2]), ("empty", b""), ("text", b"hello " * 99)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=f"{name}: ") as caught:
            fold_onnx(tmp_path / name, tmp_path / "out.onnx")
        assert caught.value.exit_code == 3
    with pytest.raises(InputMissingError):
        fold_onnx(tmp_path / "missing.onnx", tmp_path / "out.onnx")
    with pytest.raises(OutputError):
        fold_onnx(tmp_path / "a.onnx", tmp_path / "nowhere" / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_external_weights_fold_into_a_new_pair(tmp_path: Path) -> None:
    """Weights in a second file are read lazily and written to a second file of the output's name."""
    model = onnx.load(_simple(tmp_path / "inline.onnx"))
    onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="a.bin", size_threshold=0)
    v = RNG.standard_normal((128, 6)).astype(np.float32)
    body = SPELLINGS["ReduceL2, w = v * (g / n)"] + " y = Gemm <transB = 1> (x, w)"
    big = onnx.load(_save(tmp_path / "big.onnx", body, g=np.ones((128, 1), np.float32), v=v, axes=AXES))
    onnx.save(big, tmp_path / "a.onnx", save_as_external_data=True, location="a.bin", size_threshold=0)
    report = fold_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert [p.name for p in report.files] == ["b.onnx", "b.onnx.data"]
    (tmp_path / "a.bin").unlink()
    np.testing.assert_allclose(_run(tmp_path / "b.onnx", X)[0], X @ _exact(np.float32(1), v, 1).T, rtol=1e-4, atol=1e-5)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_external_weights_outside_the_directory_are_refused(tmp_path: Path) -> None:
    """A graph that points to a file elsewhere is not read."""
    home = tmp_path / "home"
    home.mkdir()
    model = onnx.load(_simple(home / "a.onnx"))
    onnx.save(model, home / "b.onnx", save_as_external_data=True, location="b.bin", size_threshold=0)
    (home / "b.bin").rename(tmp_path / "b.bin")
    graph = onnx.load(home / "b.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../b.bin" if entry.key == "location" else entry.value
    (home / "b.onnx").write_bytes(graph.SerializeToString())
    with pytest.raises(UnsafeFileError) as caught:
        fold_onnx(home / "b.onnx", home / "c.onnx")
    assert caught.value.exit_code == 4


def test_a_failing_compose_leaves_no_file(tmp_path: Path) -> None:
    """An error while the weights are written takes the half-written output away."""
    calls = []

    def flaky(g: np.ndarray, v: np.ndarray, magnitude: str) -> np.ndarray:
        calls.append(magnitude)
        if len(calls) > 1:
            raise RuntimeError("no memory for the second one")
        return compose(torch.from_numpy(g), torch.from_numpy(v)).numpy()

    path = _simple(tmp_path / "a.onnx")
    with pytest.raises(RuntimeError, match="second"):
        fold_onnx(path, tmp_path / "b.onnx", compose=flaky)
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


_FOLD = """
import sys, numpy, onnx_ir, onnxruntime, torch
torch.set_num_threads(1)
from pathlib import Path
from wnsurgery import reparam
from wnsurgery.graph import fold_onnx
fold_onnx(sys.argv[1] + "/small.onnx", sys.argv[1] + "/out.onnx", force=True)
Path("/proc/self/clear_refs").write_text("5")
status = lambda name: int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])
before = status("VmRSS")
report = fold_onnx(sys.argv[1] + "/big.onnx", sys.argv[1] + "/out.onnx", force=True)
print(len(report.found), status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to tell the peak of memory")
def test_memory_is_that_of_some_weights_and_not_of_the_model(tmp_path: Path) -> None:
    """Folding external weights takes the memory of a dozen of the largest, however many there are."""
    size, count = 1024, 30
    for name, layers in (("small", 1), ("big", count)):
        nodes, tensors = [], [numpy_helper.from_array(AXES, "axes")]
        with (tmp_path / f"{name}.bin").open("wb") as file:
            for i in range(layers):
                for kind, shape in (("g", (size, 1)), ("v", (size, size))):
                    tensor = onnx.TensorProto(name=f"{i}.weight_{kind}", data_type=1, dims=shape, data_location=1)
                    data = RNG.standard_normal(shape).astype(np.float32).tobytes()
                    entries = {"location": f"{name}.bin", "offset": file.tell(), "length": len(data)}
                    for key, value in entries.items():
                        tensor.external_data.add(key=key, value=str(value))
                    file.write(data)
                    tensors.append(tensor)
                nodes += [
                    helper.make_node("ReduceL2", [f"{i}.weight_v", "axes"], [f"n{i}"]),
                    helper.make_node("Div", [f"{i}.weight_g", f"n{i}"], [f"q{i}"]),
                    helper.make_node("Mul", [f"{i}.weight_v", f"q{i}"], [f"w{i}"]),
                    helper.make_node("MatMul", [f"h{i}" if i else "x", f"w{i}"], [f"h{i + 1}"]),
                ]
        ends = [helper.make_tensor_value_info(n, 1, [1, size]) for n in ("x", f"h{layers}")]
        graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString())
    done = subprocess.run(
        [sys.executable, "-c", _FOLD, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    found, kilobytes = map(int, done.stdout.split())
    assert found == count
    assert kilobytes < 16 * size * size * 4 // 1024 < count * size * size * 4 // 1024


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_long_rows_of_a_traced_graph_fold_whole(tmp_path: Path, groups: int) -> None:
    """Rows of hundreds of float32 elements differ by some units from the exact weight; they fold to it all the same,
    and nothing of the arithmetic that made them is taken for a weight of its own."""
    torch.manual_seed(1)
    model = apply_weight_norm(nn.Sequential(nn.ConvTranspose1d(192, 96, 8, groups=groups)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), (torch.randn(1, 192, 9),), tmp_path / "a.onnx", dynamo=False, opset_version=17)
    report = fold_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")
    graph = onnx.load(tmp_path / "b.onnx").graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert [node.op_type for node in graph.node] == ["ConvTranspose"]
    assert len(report.found) == 1
    assert np.array_equal(arrays[graph.node[0].input[1]], fold_weight_norm(model)[0].weight.detach().numpy())


def test_weights_are_found_in_the_graph_s_order(tmp_path: Path) -> None:
    """Reports list weights as the graph computes them, whatever order the search met them in."""
    count = 12
    body = " ".join(
        f"n{i} = ReduceL2 <axes = [1], keepdims = 1> (v{i}) d{i} = Div(v{i}, n{i}) w{i} = Mul(d{i}, g{i}) "
        f"h{i + 1} = MatMul({f'h{i}' if i else 'x'}, w{i})"
        for i in range(count)
    )
    arrays = {f"v{i}": RNG.standard_normal((6, 6)).astype(np.float32) for i in range(count)}
    arrays |= {f"g{i}": RNG.uniform(0.5, 2, (6, 1)).astype(np.float32) for i in range(count)}
    path = _save(tmp_path / "a.onnx", f"{body} y = Identity(h{count})", opset=13, **arrays)
    assert [one.v for one in find_weight_norms(path)] == [f"v{i}" for i in range(count)]


def test_a_graph_under_a_name_of_four_bytes_a_letter(tmp_path: Path) -> None:
    """A name that is valid for the output leaves room for the directory it is written in."""
    name = "\U0001f600" * 61 + ".onnx"
    text = '<ir_version: 9, opset_import: ["": 18]> g (float[1] x) => (float[1] y) {y = Neg(x)}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    write_onnx(read_onnx(tmp_path / "m.onnx"), tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", name]
