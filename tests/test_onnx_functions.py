"""Functions that normalise constants are opened, others are not, and hostile ones do no harm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from wnsurgery.graph import fold_onnx

RNG = np.random.default_rng(2)
G = RNG.uniform(0.5, 2, (4, 1)).astype(np.float32)
V = RNG.standard_normal((4, 6)).astype(np.float32)

NORM = """<domain: "l", opset_import: ["" : 18]> size (a) => (o) { s = Constant <value = int64[1] {1}> ()
    o = ReduceL2(a, s) }"""
WEIGHT = """<domain: "l", opset_import: ["" : 18, "l" : 1]> weight (m, a) => (o) { n = l.size(a) q = Div(m, n)
    o = Mul(a, q) }"""
LINEAR = """<domain: "l", opset_import: ["" : 18, "l" : 1]> linear (x, m, a) => (y) { w = l.weight(m, a)
    y = Gemm <transB = 1> (x, w) }"""
UNIT = """<domain: "l", opset_import: ["" : 18, "l" : 1]> unit (x) => (y) { n = l.size(x) y = Div(x, n) }"""


def _save(path: Path, body: str, *functions: str) -> Path:
    text = f"""<ir_version: 9, opset_import: ["" : 18, "l" : 1]> g (float[N, 6] x) => (float[N, M] y) {{ {body} }}
        {" ".join(functions)}"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend([numpy_helper.from_array(G, "g"), numpy_helper.from_array(V, "v")])
    path.write_bytes(model.SerializeToString())
    return path


def test_norms_deep_in_functions_are_folded(tmp_path: Path) -> None:
    """A norm three functions down is found when the outermost is called with constants."""
    path = _save(tmp_path / "a.onnx", "y = l.linear(x, g, v)", NORM, WEIGHT, LINEAR)
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert len(report.found) == 1
    after = onnx.load(tmp_path / "b.onnx")
    assert [node.op_type for node in after.graph.node] == ["Gemm"]
    weight = numpy_helper.to_array(after.graph.initializer[0]).astype(np.float64)
    np.testing.assert_allclose(weight, G * V / np.sqrt((V.astype(np.float64) ** 2).sum(1, keepdims=True)), rtol=2e-7)


def test_functions_that_normalise_activations_stay_functions(tmp_path: Path) -> None:
    """A call with run-time values is not opened, although a weight beside it is folded."""
    path = _save(
        tmp_path / "a.onnx", "u = l.unit(x) w = l.weight(g, v) y = Gemm <transB = 1> (u, w)", NORM, WEIGHT, UNIT
    )
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert len(report.found) == 1
    after = onnx.load(tmp_path / "b.onnx")
    assert [node.op_type for node in after.graph.node] == ["unit", "Gemm"]
    assert "unit" in {function.name for function in after.functions}
    assert [why for _, why in report.left] == ["inside a function that takes run-time values"]
    before = _save(tmp_path / "c.onnx", "y = l.unit(x)", NORM, UNIT)
    fold_onnx(before, tmp_path / "d.onnx")
    assert before.read_bytes() == (tmp_path / "d.onnx").read_bytes()


def _bomb(path: Path, levels: int, *, circle: bool = False) -> Path:
    """Functions that call the next one twice: 2^levels norms."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("l", 1)]
    functions = []
    for i in range(levels):
        inner = f"f{i + 1}" if i + 1 < levels else "f0" if circle else None
        calls = [helper.make_node(inner, [a], [b], domain="l") for a, b in ("ab", "bc")] if inner else []
        calls = calls or [helper.make_node("ReduceL2", ["a"], ["c"], keepdims=1)]
        functions.append(helper.make_function("l", f"f{i}", ["a"], ["c"], calls, opsets))
    graph = helper.make_graph(
        [helper.make_node("f0", ["v"], ["w"], domain="l"), helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(V, "v")],
    )
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(("levels", "circle"), [(60, False), (60, True), (900, False)])
def test_functions_that_double_at_every_level_do_not_hang(tmp_path: Path, levels: int, circle: bool) -> None:
    """A few kilobytes that stand for 2^60 nodes, or for no end of them, are left as they are at once."""
    path = _bomb(tmp_path / "a.onnx", levels, circle=circle)
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert report.found == ()
    assert path.read_bytes() == (tmp_path / "b.onnx").read_bytes()
