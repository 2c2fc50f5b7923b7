"""Rearrangements of folded weights are carried out once, bit for bit, and nothing is stored twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from wnsurgery.graph import fold_onnx
from wnsurgery.reparam import compose

RNG = np.random.default_rng(1)
NORM = "n = ReduceL2(v, axes) q = Div(g, n) w = Mul(v, q)"


def _save(path: Path, body: str, v: np.ndarray, **arrays: np.ndarray) -> Path:
    text = f'<ir_version: 9, opset_import: ["" : 18]> g (float[N, 6] x) => (float[N, M] y) {{ {NORM} {body} }}'
    model = onnx.parser.parse_model(text)
    arrays |= {"v": v, "g": RNG.uniform(0.5, 2, (len(v), 1)).astype(v.dtype), "axes": np.int64([1])}
    model.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in arrays.items())
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def _initializers(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def _plain(path: Path, v: str = "v", g: str = "g") -> np.ndarray:
    held = _initializers(path)
    return compose(torch.from_numpy(held[g].copy()), torch.from_numpy(held[v].copy())).numpy()


def _run(path: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {session.get_inputs()[0].name: x})[0]
    return found


@pytest.mark.parametrize(
    ("moves", "expected"),
    [
        ("t = Transpose(w) y = MatMul(x, t)", lambda w: w.T),
        (
            "u = Unsqueeze(w, axes) s = Squeeze(u, axes) t = Transpose <perm = [1, 0]> (s) y = MatMul(x, t)",
            lambda w: w.T,
        ),
        (
            "a = Slice(w, zero, two) b = Slice(w, two, four) c = Concat <axis = 0> (b, a) y = Gemm <transB = 1> (x, c)",
            lambda w: np.concatenate([w[2:4], w[0:2]]),
        ),
    ],
)
def test_the_weight_stands_as_it_is_read(tmp_path: Path, moves: str, expected: object) -> None:
    """Transposes, slices and joins of a folded weight are gone, and its elements are in their places to the bit."""
    path = _save(
        tmp_path / "a.onnx",
        moves,
        RNG.standard_normal((4, 6)).astype(np.float32),
        zero=np.int64([0]),
        two=np.int64([2]),
        four=np.int64([4]),
    )
    x = RNG.standard_normal((3, 6)).astype(np.float32)
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert report.nodes_after == 1
    node = onnx.load(tmp_path / "b.onnx").graph.node[0]
    found = _initializers(tmp_path / "b.onnx")[node.input[1]]
    assert found.tobytes() == np.ascontiguousarray(expected(_plain(path))).tobytes()  # type: ignore[operator]
    np.testing.assert_allclose(_run(tmp_path / "b.onnx", x), _run(path, x), rtol=1e-5, atol=1e-6)
    assert fold_onnx(tmp_path / "b.onnx", tmp_path / "c.onnx").found == ()
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "c.onnx").read_bytes()


@pytest.mark.parametrize(
    "moves",
    [
        "t = Transpose(w) a = MatMul(x, t) b = Gemm <transB = 1> (x, w) y = Add(a, b)",  # read both ways
        "t = Concat <axis = 0> (w, w) y = Gemm <transB = 1> (x, t)",  # twice the size
        "t = Cast <to = 11> (w) d = Cast <to = 11> (x) z = Gemm <transB = 1> (d, t) y = Cast <to = 1> (z)",  # widened
    ],
)
def test_what_would_grow_the_file_stays(tmp_path: Path, moves: str) -> None:
    """A weight that is read straight too, repeated or widened is stored once, as compose gives it."""
    path = _save(tmp_path / "a.onnx", moves, RNG.standard_normal((4, 6)).astype(np.float32))
    fold_onnx(path, tmp_path / "b.onnx")
    assert _initializers(tmp_path / "b.onnx")["w"].tobytes() == _plain(path).tobytes()
    x = RNG.standard_normal((3, 6)).astype(np.float32)
    np.testing.assert_allclose(_run(tmp_path / "b.onnx", x), _run(path, x), rtol=1e-5, atol=1e-6)


def test_rearranged_constants_that_are_no_folded_weights_stay(tmp_path: Path) -> None:
    """Only what was folded is rearranged: another weight keeps its Transpose."""
    moves = "t = Transpose(w) a = MatMul(x, t) s = Transpose(k) b = MatMul(x, s) y = Add(a, b)"
    k = RNG.standard_normal((4, 6)).astype(np.float32)
    path = _save(tmp_path / "a.onnx", moves, RNG.standard_normal((4, 6)).astype(np.float32), k=k)
    fold_onnx(path, tmp_path / "b.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "b.onnx").graph.node]
    assert kinds == ["MatMul", "Transpose", "MatMul", "Add"]


def _lstm() -> onnx.ModelProto:
    """An LSTM in both directions whose weights are normed, cut into gates, reordered and joined, as exporters do."""
    torch.manual_seed(0)
    lstm = nn.LSTM(6, 5, bidirectional=True)
    nodes, arrays = [], {"axes": np.int64([1]), "zero": np.int64([0])}
    arrays |= {f"at{i}": np.int64([5 * i]) for i in range(5)}
    for kind in ("ih", "hh"):
        ends = []
        for side in ("", "_reverse"):
            name = f"weight_{kind}_l0{side}"
            arrays[f"{name}_v"] = getattr(lstm, name).detach().numpy()
            arrays[f"{name}_g"] = RNG.uniform(0.5, 2, (20, 1)).astype(np.float32)
            nodes += [
                helper.make_node("ReduceL2", [f"{name}_v", "axes"], [f"n{name}"]),
                helper.make_node("Div", [f"{name}_g", f"n{name}"], [f"q{name}"]),
                helper.make_node("Mul", [f"{name}_v", f"q{name}"], [f"w{name}"]),
            ]
            gates = []
            for gate in (0, 3, 1, 2):  # input, forget, cell, output -> input, output, forget, cell
                gates.append(f"{name}{gate}")
                nodes.append(helper.make_node("Slice", [f"w{name}", f"at{gate}", f"at{gate + 1}", "zero"], [gates[-1]]))
            nodes.append(helper.make_node("Concat", gates, [f"c{name}"], axis=0))
            nodes.append(helper.make_node("Unsqueeze", [f"c{name}", "zero"], [f"u{name}"]))
            ends.append(f"u{name}")
        nodes.append(helper.make_node("Concat", ends, [kind], axis=0))
    nodes.append(helper.make_node("LSTM", ["x", "ih", "hh"], ["y"], hidden_size=5, direction="bidirectional"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [3, 2, 6])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3, 2, 2, 5])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_the_gates_of_an_lstm_are_in_place(tmp_path: Path) -> None:
    """Both directions of an LSTM end as one array per weight input, each gate with the bits of compose."""
    onnx.save(_lstm(), tmp_path / "a.onnx")
    report = fold_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert (len(report.found), report.nodes_after) == (4, 1)
    found = _initializers(tmp_path / "b.onnx")
    for kind in ("ih", "hh"):
        for i, side in enumerate(("", "_reverse")):
            name = f"weight_{kind}_l0{side}"
            w = _plain(tmp_path / "a.onnx", f"{name}_v", f"{name}_g").reshape(4, 5, -1)
            assert found[kind][i].tobytes() == w[[0, 3, 1, 2]].tobytes()
    x = RNG.standard_normal((3, 2, 6)).astype(np.float32)
    np.testing.assert_allclose(_run(tmp_path / "b.onnx", x), _run(tmp_path / "a.onnx", x), rtol=1e-5, atol=1e-6)
