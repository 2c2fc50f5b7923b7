"""Weight norm is found in ONNX graphs by what it computes, and replaced by the weights `compose` gives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.nn.utils import weight_norm as legacy_weight_norm
from torch.nn.utils.parametrizations import weight_norm

from wnsurgery import graph, graph_matching, onnx_values
from wnsurgery.errors import (
    InputError,
    InputMissingError,
    OutputError,
    OutputExistsError,
    PairError,
    SelectionError,
    UnsafeFileError,
)
from wnsurgery.graph import find_weight_norms, fold_onnx
from wnsurgery.onnx_file import read_onnx, staged_onnx, write_onnx
from wnsurgery.reparam import compose
from wnsurgery.stores import commit
from wnsurgery.surgery import apply_weight_norm, fold_weight_norm

RNG = np.random.default_rng(0)
G = RNG.uniform(0.5, 2, (4, 1)).astype(np.float32)
V = RNG.standard_normal((4, 6)).astype(np.float32)
X = RNG.standard_normal((2, 6)).astype(np.float32)

_OLD_ONNX = tuple(map(int, onnx.__version__.split(".")[:2])) < (1, 19)
BFLOAT16 = pytest.param(ml_dtypes.bfloat16, marks=pytest.mark.skipif(_OLD_ONNX, reason="onnx makes no such tensors"))


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
    "MatMul with ones": "s = Mul(v, v) m = MatMul(s, column) n = Sqrt(m) q = Div(g, n) w = Mul(v, q)",
    "Gemm with ones": "s = Pow(v, two) m = Gemm(s, column) n = Sqrt(m) q = Div(g, n) w = Mul(v, q)",
    "by logarithms": """s = Mul(v, v) m = ReduceLogSum(s, axes) l = Mul(m, half) n = Exp(l) q = Div(g, n)
        w = Mul(v, q)""",
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
    arrays |= {
        "column": np.ones((6, 1), np.float32),
        "six": np.float32(6),
        "half": np.float32(0.5),
        "eps": np.float32(1e-12),
    }
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


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, BFLOAT16])
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


MADE = {
    "u = DequantizeLinear(bytes, scale)": lambda a: a["bytes"] * np.float64(a["scale"]),
    "u = DequantizeLinear <axis = 0> (bytes, scales, zeros)": lambda a: (
        (a["bytes"] - np.float64(a["zeros"])[:, None]) * np.float64(a["scales"])[:, None]
    ),
    "u, rest = Split <axis = 0> (tall, parts)": lambda a: a["tall"][:4],
    "rest, u = Split <axis = 0, num_outputs = 2> (tall)": lambda a: a["tall"][4:],
    "p = Pad(tall, pads, one) u = Slice(p, two, six, rows)": lambda a: np.pad(a["tall"], 1, constant_values=1)[
        2:6, 1:7
    ],
    "u = Gemm <transA = 1, alpha = 2.0> (square, v, v)": lambda a: 2 * np.float64(a["square"]).T @ a["v"] + a["v"],
    "p = MatMul(square, v) u = Add(p, v)": lambda a: np.float64(a["square"]) @ a["v"] + a["v"],
}


@pytest.mark.parametrize("made", MADE)
def test_whatever_makes_a_direction_of_constants_is_worked_out(tmp_path: Path, made: str) -> None:
    """Quantised weights, parts of others and products of matrices are normalised as they come out."""
    rng = np.random.default_rng(1)
    arrays = {"bytes": rng.integers(-99, 99, (4, 6)).astype(np.int8), "scale": np.float32(0.03), "v": V}
    arrays |= {"scales": G[:, 0], "zeros": np.int8([3, -5, 0, 9]), "one": np.float32(1), "rows": np.int64([0, 1])}
    arrays |= {"tall": rng.standard_normal((8, 6)).astype(np.float32), "parts": np.int64([4, 4])}
    arrays |= {"square": rng.standard_normal((4, 4)).astype(np.float32), "pads": np.int64([1, 1, 1, 1])}
    arrays |= {"two": np.int64([2, 1]), "six": np.int64([6, 7])}
    body = made + " n = ReduceL2(u, axes) q = Div(g, n) w = Mul(u, q) y = Gemm <transB = 1> (x, w)"
    used = {k: a for k, a in arrays.items() if re.search(rf"[(, ]{k}[,)]", made)}
    path = _save(tmp_path / "a.onnx", body, opset=18, g=G, axes=AXES, **used)
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert ([(f.g, f.v) for f in report.found], report.left) == ([("g", "u")], ())
    weight = _run(tmp_path / "b.onnx", np.eye(6, dtype=np.float32))[0].T
    np.testing.assert_allclose(weight, _exact(G, MADE[made](arrays), 1), rtol=4e-7, atol=1e-8)
    np.testing.assert_allclose(_run(tmp_path / "b.onnx", X)[0], _run(path, X)[0], rtol=1e-5, atol=1e-5)


def _with_dead_row(path: Path, spelling: str, **more: np.ndarray) -> Path:
    v = V.copy()
    v[2] = 0
    return _save(path, spelling + " y = Gemm <transB = 1> (x, w)", v=v, axes=AXES, **more)


def test_rows_of_zeros_fold_as_asked(tmp_path: Path) -> None:
    """0 / 0 in the graph is an error, zeros or NaN in the folded weight, as for checkpoints; the rest is right."""
    path = _with_dead_row(tmp_path / "a.onnx", SPELLINGS["ReduceL2, w = v * (g / n)"], g=G)
    with pytest.raises(PairError, match="1 of 4 rows have v = 0 and g != 0") as caught:
        fold_onnx(path, tmp_path / "b.onnx")
    assert "--zero-norm" in str(caught.value.hint)
    assert not (tmp_path / "b.onnx").exists()
    for choice, expected in (("zero", 0.0), ("nan", np.nan)):
        report = fold_onnx(path, tmp_path / "b.onnx", zero_norm=choice, force=True)
        assert report.warnings == (f"w: 1 of 4 rows have v = 0 and g != 0; folded to {choice}",)
        assert str(report.warnings[0]) in str(report)
        weight = _initializers(tmp_path / "b.onnx")["w"]
        np.testing.assert_array_equal(weight[2], np.full(6, expected, np.float32))
        np.testing.assert_allclose(weight[[0, 1, 3]], _exact(G, V, 1)[[0, 1, 3]], rtol=2e-7)
    with pytest.raises(SelectionError, match="zero_norm"):
        fold_onnx(path, tmp_path / "c.onnx", zero_norm="maybe")  # type: ignore[arg-type]


def test_rows_of_zeros_that_the_graph_takes_care_of_fold(tmp_path: Path) -> None:
    """A graph that keeps the norm from zero gives zeros there; so does a row whose magnitude is zero too."""
    g = G.copy()
    g[2] = 0
    for spelling, more in (
        (SPELLINGS["clipped"], {"g": G, "eps": np.float32(1e-12)}),
        (SPELLINGS["LpNormalization"], {"g": G}),
        (SPELLINGS["ReduceL2, w = v * (g / n)"], {"g": g}),
    ):
        path = _with_dead_row(tmp_path / "a.onnx", spelling, **more)
        report = fold_onnx(path, tmp_path / "b.onnx", force=True)
        assert (len(report.found), report.warnings) == (1, ())
        assert (_initializers(tmp_path / "b.onnx")["w"][2] == 0).all()


def test_a_normalised_weight_without_magnitude_is_found(tmp_path: Path) -> None:
    """v / ||v|| alone, as in cosine classifiers, is weight norm with g = 1."""
    path = _save(tmp_path / "a.onnx", "n = ReduceL2(v, axes) w = Div(v, n) y = Gemm <transB = 1> (x, w)",
                 v=V, axes=AXES)  # fmt: skip
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert [(f.g, f.v) for f in report.found] == [(None, "v")]
    np.testing.assert_allclose(_initializers(tmp_path / "b.onnx")["w"], _exact(np.float32(1), V, 1), rtol=2e-7)


def _evaluated(path: Path) -> np.ndarray:
    """The weight of a last Gemm, made by Mul, Add, Div, Cast and ReduceL2 over axis 1, in float64 numpy."""
    graph = onnx.load(path).graph
    values = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in graph.initializer}
    for node in graph.node:
        if all(i in values for i in node.input):
            one, *more = (values[i] for i in node.input)
            functions = {"Mul": np.multiply, "Add": np.add, "Div": np.divide, "Cast": np.copy}
            if node.op_type == "ReduceL2":
                values[node.output[0]] = np.sqrt((one * one).sum(1, keepdims=True))
            else:
                values[node.output[0]] = functions[node.op_type](one, *more)
    return values[graph.node[-1].input[1]]


FACTORS = {
    "after the weight": "u = Mul(v, q) w = Mul(u, c)",
    "on the magnitude": "k = Mul(q, c) w = Mul(v, k)",
    "element by element": "u = Mul(v, q) w = Mul(u, d)",
    "an addend": "u = Mul(v, q) w = Add(u, a)",
}


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("units", [-0.5, 1, 2, 3, 20])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
def test_a_factor_near_one_is_not_lost(tmp_path: Path, factor: str, units: float, dtype: type) -> None:
    """What follows a weight norm stays, however little it changes: the folded weight is what the graph computes."""
    eps = float(ml_dtypes.finfo(dtype).eps)
    arrays = {"g": G.astype(dtype), "v": V.astype(dtype), "c": np.asarray(1 + units * eps, dtype)}
    arrays |= {"d": np.full(V.shape, arrays["c"]), "a": (units * eps / 8 * np.sign(V)).astype(dtype)}
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    head, tail = "n = ReduceL2(v, axes) q = Div(g, n)", f"h = Cast <to = {kind}> (x) y = Gemm <transB = 1> (h, w)"
    body = f"{head} {FACTORS[factor]} {tail}"
    used = {k: a for k, a in arrays.items() if f"({k}, " in body or f", {k})" in body}
    path = _save(tmp_path / "a.onnx", body, axes=AXES, **used)
    fold_onnx(path, tmp_path / "b.onnx")
    before, after = _evaluated(path), _evaluated(tmp_path / "b.onnx")
    # exporters work some norms out in float32, a few units off, and a factor on the magnitude looks no different
    close = 4 if dtype is np.float32 and factor == "on the magnitude" else 1.5 if dtype is np.float32 else 0.6
    np.testing.assert_allclose(after, before, rtol=close * eps, atol=eps / 99)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_epsilon_in_the_norm_is_no_obstacle(tmp_path: Path, dtype: type) -> None:
    """A small number added to the norm, or to its square, to divide by something: it is still weight norm."""
    small = np.asarray(6e-8, dtype)
    for body in (
        "n = ReduceL2(v, axes) m = Add(n, e) q = Div(v, m) w = Mul(g, q)",
        "s = ReduceSumSquare(v, axes) m = Add(s, e) n = Sqrt(m) q = Div(g, n) w = Mul(v, q)",
    ):
        path = _save(tmp_path / "a.onnx", body + " f = Cast <to = 1> (w) y = Gemm <transB = 1> (x, f)",
                     g=G.astype(dtype), v=V.astype(dtype), e=small, axes=AXES)  # fmt: skip
        value = "w" if dtype is np.float16 else "f"
        assert [(f.value, f.g, f.v) for f in find_weight_norms(path)] == [(value, "g", "v")]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, BFLOAT16])
@pytest.mark.parametrize("operation", ["Mul(v, mask)", "Add(v, mask)", "Tanh(v)"])
def test_a_direction_may_be_computed_from_constants(tmp_path: Path, operation: str, dtype: type) -> None:
    """w = g * u / ||u|| with u a constant expression, such as a masked v, is weight norm along what u comes to."""
    g, v, mask = G.astype(dtype), (V / np.float64(3)).astype(dtype), np.tri(4, 6, 2).astype(dtype)
    body = f"""u = {operation} n = ReduceL2(u, axes) q = Div(g, n) w = Mul(u, q) f = Cast <to = 1> (w)
        y = Gemm <transB = 1> (x, f)"""
    path = _save(tmp_path / "a.onnx", body, g=g, v=v, axes=AXES, **({"mask": mask} if "mask" in body else {}))
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert [(f.g, f.v) for f in report.found] == [("g", "u")]
    assert _norms_of_constants(tmp_path / "b.onnx") == []
    wide, kept = v.astype(np.float64), mask.astype(np.float64)
    u = {"M": wide * kept, "A": wide + kept, "T": np.tanh(wide)}[operation[0]]
    (weight,) = _initializers(tmp_path / "b.onnx").values()
    assert weight.dtype == dtype
    np.testing.assert_allclose(weight.astype(np.float64), _exact(g, u, 1), rtol=1.5 * float(ml_dtypes.finfo(dtype).eps))


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


def test_names_are_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many weights get their plain names back, the graph's names are gathered once; each is given once."""
    count, calls, names = 5, [], graph._names

    def counted(model: ir.Model) -> set[str]:
        calls.append(model)
        return names(model)

    monkeypatch.setattr(graph, "_names", counted)
    body = " ".join(
        f"n{i} = ReduceL2(v{i}, axes) d{i} = Div(v{i}, n{i}) w{i} = Mul(d{i}, g) "
        f"h{i + 1} = MatMul({f'h{i}' if i else 'x'}, w{i})"
        for i in range(count)
    )
    arrays = {f"v{i}": RNG.standard_normal((6, 6)).astype(np.float32) for i in range(count)}
    arrays |= {"g": np.ones((6, 1), np.float32), "axes": AXES}
    model = onnx.load(_save(tmp_path / "a.onnx", f"{body} y = Identity(h{count})", **arrays))
    renamed = {f"v{i}": f"up.{i}.weight_v" for i in range(3)}
    renamed |= {"v3": "low.weight_v", "v4": "low.parametrizations.weight.original1"}
    for tensor in model.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [renamed.get(i, i) for i in node.input]
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    fold_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert len(calls) == 1
    assert set(_initializers(tmp_path / "b.onnx")) == {"up.0.weight", "up.1.weight", "up.2.weight", "low.weight", "w4"}


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


def test_a_norm_that_is_an_output_stays(tmp_path: Path) -> None:
    """Graphs may hand out ||v|| as well: the weight folds, and the norm is computed for the output alone."""
    body = "n = ReduceL2(v, axes) q = Div(g, n) w = Mul(q, v) y = Gemm <transB = 1> (x, w)"
    model = onnx.load(_save(tmp_path / "a.onnx", body, g=G, v=V, axes=AXES))
    model.graph.output.append(helper.make_tensor_value_info("n", onnx.TensorProto.FLOAT, [4, 1]))
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    before = _run(tmp_path / "a.onnx", X)
    report = fold_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert len(report.found) == 1
    assert [output.name for output in onnx.load(tmp_path / "b.onnx").graph.output] == ["y", "n"]
    for found, wanted in zip(_run(tmp_path / "b.onnx", X), before, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


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
    "an operation that is not worked out": (
        "k = CumSum(v, one) n = ReduceL2(k, axes) q = Div(g, n) w = Mul(k, q) y = Gemm <transB = 1> (x, w)",
        "constant, but CumSum is not worked out",
    ),
    "random numbers": (
        """r = RandomNormalLike(v) u = Add(v, r) n = ReduceL2(u, axes) q = Div(g, n) w = Mul(u, q)
        y = Gemm <transB = 1> (x, w)""",
        "run-time",
    ),
    "not a number": (
        "n = ReduceL2(h, axes) q = Div(g, n) w = Mul(h, q) y = Gemm <transB = 1> (x, w)",
        "NaN or infinity",
    ),
    "a product that is no norm": (
        "s = Mul(x, x) n = MatMul(s, c) y = Gemm <transB = 1> (n, v)",
        "run-time",
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
    holes = np.where(V > 1, np.float32(np.inf), V)
    names = {"g": G, "v": V, "axes": AXES, "one": np.int64(1), "h": holes, "c": np.ones((6, 6), np.float32)}
    path = _save(tmp_path / "a.onnx", body, **{k: a for k, a in names.items() if f"{k}," in body or f"{k})" in body})
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert report.found == ()
    assert len(report.left) == 1
    assert reason in report.left[0][1]
    assert str(report).startswith("no weight norm folded, ")
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


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("where", ["g", "v", "both"])
def test_signalling_nan_is_nan_without_a_warning(tmp_path: Path, where: str, dtype: type) -> None:
    """NaN that processors complain about is folded or left like any other, and numpy says nothing of it."""
    g, v = G.astype(dtype), V.astype(dtype)
    kind, signal = {np.float32: (np.uint32, 0x7F800001), np.float16: (np.uint16, 0x7C01)}[dtype]
    for name, array in (("g", g), ("v", v)):
        if where in (name, "both"):
            array.view(kind)[1, 0] = signal
    body = "n = ReduceL2(v, axes) q = Div(g, n) w = Mul(v, q) f = Cast <to = 1> (w) y = Gemm <transB = 1> (x, f)"
    path = _save(tmp_path / "a.onnx", body, g=g, v=v, axes=AXES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find_weight_norms(path)
        assert list(fold_onnx(path, tmp_path / "b.onnx").found) == found
    before, after = _run(path, X)[0], _run(tmp_path / "b.onnx", X)[0]
    assert np.array_equal(np.isnan(before), np.isnan(after))


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


def _external(path: Path, data: str, seed: int = 0, *, constant: bool = False) -> Path:
    """A graph with a weight norm and another weight, both in a file beside it."""
    rng = np.random.default_rng(seed)
    v, other = rng.standard_normal((128, 6)).astype(np.float32), rng.standard_normal((128, 4)).astype(np.float32)
    body = SPELLINGS["ReduceL2, w = v * (g / n)"] + " a = Gemm <transB = 1> (x, w) y = MatMul(a, b)"
    model = onnx.load(_save(path, body, g=np.ones((128, 1), np.float32), v=v, axes=AXES, b=other))
    onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=100)
    if constant:  # a weight within a node, whose bytes are in the file all the same
        model = onnx.load(path, load_external_data=False)
        (held,) = [tensor for tensor in model.graph.initializer if tensor.name == "b"]
        model.graph.node.insert(0, helper.make_node("Constant", [], ["b"], value=held))
        model.graph.initializer.remove(held)
        path.write_bytes(model.SerializeToString())
    return path


def _names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


@pytest.mark.parametrize("data", ["a.onnx.data", "weights.bin"])
def test_a_pair_is_replaced_at_one_stroke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    """In place, the graph on the disk has its weights at every moment; what it no longer reads is removed in the end.

    A file with another name may be read by other graphs, too, and stays.
    """
    path = _external(tmp_path / "a.onnx", data)
    before, steps = _run(path, X)[0], []
    for name in ("replace", "unlink"):
        act = getattr(Path, name)

        def watched(self: Path, *rest: object, act: Callable[..., object] = act, **more: object) -> object:
            done = act(self, *rest, **more)
            steps.append(_run(path, X)[0])
            return done

        monkeypatch.setattr(Path, name, watched)
    report = fold_onnx(path, path, in_place=True)
    assert len(steps) == (3 if data == "a.onnx.data" else 2)
    for found in steps:
        np.testing.assert_allclose(found, before, rtol=1e-4, atol=1e-5)
    assert [p.name for p in report.files] == [n for n in _names(tmp_path) if n != "weights.bin"]
    assert ("weights.bin" in _names(tmp_path)) == (data == "weights.bin")
    assert _norms_of_constants(path) == []
    files = {name: (tmp_path / name).read_bytes() for name in _names(tmp_path)}
    assert fold_onnx(path, path, in_place=True).files == report.files
    assert files == {name: (tmp_path / name).read_bytes() for name in _names(tmp_path)}


def test_the_same_weights_keep_their_file(tmp_path: Path) -> None:
    """Folding onto an output of before gives the same two files again, and other weights another name."""
    first, second = _external(tmp_path / "a.onnx", "a.bin"), _external(tmp_path / "c.onnx", "c.bin", 1)
    found = []
    for source in (first, first, second, second, first):
        files = fold_onnx(source, tmp_path / "b.onnx", force=True).files
        assert [p.name for p in files] == [n for n in _names(tmp_path) if n.startswith("b.")]
        np.testing.assert_allclose(_run(files[0], X)[0], _run(source, X)[0], rtol=1e-4, atol=1e-5)
        found.append([(p.name, p.read_bytes()) for p in files])
    assert found[0] == found[1] == found[4]
    assert found[2] == found[3]
    assert found[0][1][0] == "b.onnx.data" != found[2][1][0]


@pytest.mark.parametrize("moment", ["before", "between"])
@pytest.mark.parametrize("name", ["b.onnx", "b.onnx.data"])
def test_a_file_that_appears_meanwhile_is_not_replaced(
    name: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without `force` neither graph nor weights replace what came while they were written, and none stays alone."""
    model = read_onnx(_external(tmp_path / "a.onnx", "a.bin"))
    put = commit.publish

    def late(temporary: Path, path: Path, *, force: bool) -> None:
        if path.name == name:
            path.write_bytes(b"theirs")
        put(temporary, path, force=force)

    with pytest.raises(OutputExistsError, match=f"{name}: already exists"), staged_onnx(model, tmp_path / "b.onnx"):
        if moment == "before":
            (tmp_path / name).write_bytes(b"theirs")
        else:
            monkeypatch.setattr(commit, "publish", late)
    assert _names(tmp_path) == ["a.bin", "a.onnx", name]
    assert (tmp_path / name).read_bytes() == b"theirs"


def test_no_file_of_the_input_is_replaced(tmp_path: Path) -> None:
    """An output whose name, or whose weights file's name, is taken by the input's weights is refused, even by force."""
    path = _external(tmp_path / "a.onnx", "b.onnx.data")
    before = {name: (tmp_path / name).read_bytes() for name in _names(tmp_path)}
    for output in ("b.onnx", "b.onnx.data"):
        with pytest.raises(OutputExistsError, match="this is the input") as caught:
            fold_onnx(path, tmp_path / output, force=True, in_place=True)
        assert caught.value.exit_code == 5
    assert before == {name: (tmp_path / name).read_bytes() for name in _names(tmp_path)}


def test_weights_within_nodes_come_along(tmp_path: Path) -> None:
    """A Constant whose bytes are in another file is written with the graph, which needs the old file no more."""
    path = _external(tmp_path / "a.onnx", "a.bin", constant=True)
    home = tmp_path / "home"
    home.mkdir()
    model = onnx.load(path)
    (held,) = [node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"]
    expected = numpy_helper.to_array(held)
    fold_onnx(path, home / "b.onnx")
    (node,) = [node for node in onnx.load(home / "b.onnx").graph.node if node.op_type == "Constant"]
    np.testing.assert_array_equal(numpy_helper.to_array(node.attribute[0].t), expected)


def test_small_weights_leave_no_empty_file(tmp_path: Path) -> None:
    """Weights that all fit into the graph come without a second file."""
    model = onnx.load(_simple(tmp_path / "inline.onnx"))
    onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="a.bin", size_threshold=0)
    report = fold_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert [p.name for p in report.files] == ["b.onnx"]
    assert _names(tmp_path) == ["a.bin", "a.onnx", "b.onnx", "inline.onnx"]


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


def test_a_failing_compose_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while the weights are written takes the half-written output away."""
    calls = []

    def flaky(g: np.ndarray, v: np.ndarray, magnitude: str) -> np.ndarray:
        calls.append(magnitude)
        if len(calls) > 1:
            raise RuntimeError("no memory for the second one")
        return compose(torch.from_numpy(g), torch.from_numpy(v)).numpy()

    path = _simple(tmp_path / "a.onnx")
    monkeypatch.setattr(graph_matching, "_composed", flaky)
    with pytest.raises(RuntimeError, match="second"):
        fold_onnx(path, tmp_path / "b.onnx")
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
