"""Functions that normalise constants are opened, others are not, and hostile ones do no harm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
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


def _save(path: Path, body: str, *functions: str, opset: int = 18) -> Path:
    text = f"""<ir_version: 9, opset_import: ["" : {opset}, "l" : 1]> g (float[N, 6] x) => (float[N, M] y) {{ {body} }}
        {" ".join(functions)}"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend([numpy_helper.from_array(G, "g"), numpy_helper.from_array(V, "v")])
    path.write_bytes(model.SerializeToString())
    return path


def _outputs(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 6)})
    return np.asarray(found)


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


BODY = """s = Constant <value = int64[1] {1}> () p = Mul(a, a) t = ReduceSum(p, s) n = Sqrt(t) q = Div(m, n)
    o = Mul(a, q)"""


@pytest.mark.parametrize(("own", "opset"), [(14, 18), (17, 18), (18, 17), (18, 18)])
def test_a_function_of_another_opset_that_means_the_same_is_folded(tmp_path: Path, own: int, opset: int) -> None:
    """Opsets differ in some operations only; a function whose operations are the same in both is opened."""
    function = f"""<domain: "l", opset_import: ["" : {own}]> weight (m, a) => (o) {{ {BODY} }}"""
    path = _save(tmp_path / "a.onnx", "w = l.weight(g, v) y = Gemm <transB = 1> (x, w)", function, opset=opset)
    report = fold_onnx(path, tmp_path / "b.onnx")
    ours, theirs = (_outputs(tmp_path / name) for name in ("b.onnx", "a.onnx"))
    assert (len(report.found), report.left) == (1, ())
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_function_whose_operations_mean_something_else_stays(tmp_path: Path) -> None:
    """Where an operation changed between the opsets, the function is left, with a reason."""
    old = """<domain: "l", opset_import: ["" : 13]> size (a) => (o) { o = ReduceL2 <axes = [1]> (a) }"""
    path = _save(tmp_path / "a.onnx", "w = l.weight(g, v) y = Gemm <transB = 1> (x, w)", old, WEIGHT)
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert report.found == ()
    assert [why for _, why in report.left] == ["inside a function that is written for opset 13, the graph for 18"]
    assert path.read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize("levels", [8, 12, 14, 60])
def test_functions_that_would_be_copied_too_often_stay_with_a_reason(tmp_path: Path, levels: int) -> None:
    """Hundreds of copies of a norm are put in place, thousands are not, for finding names for them takes too long."""
    path = _bomb(tmp_path / "a.onnx", levels)
    report = fold_onnx(path, tmp_path / "b.onnx")
    reasons = {why for _, why in report.left}
    assert ("too many" in str(reasons)) == (levels > 9)
    assert len(report.left) == (1 if levels > 9 else 2 ** (levels - 1))
