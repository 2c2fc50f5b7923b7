"""Graphs from outside that are damaged, or made to fill the memory, end in one clear error or are left as they are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_memory import fold, make

from wnsurgery import graph_matching
from wnsurgery.errors import InputError
from wnsurgery.graph import find_weight_norms, fold_onnx
from wnsurgery.inspection import inspect
from wnsurgery.onnx_checks import blamed_on
from wnsurgery.onnx_file import read_onnx
from wnsurgery.verification import verify

V = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
G = np.ones((8, 1), np.float32)


def _model(nodes: list[onnx.NodeProto], *arrays: onnx.TensorProto) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])]
    outs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", ends, outs, list(arrays))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)], ir_version=8)


def _weight_norm() -> onnx.ModelProto:
    nodes = [
        helper.make_node("ReduceL2", ["v"], ["n"], axes=[1], keepdims=1),
        helper.make_node("Div", ["v", "n"], ["d"]),
        helper.make_node("Mul", ["g", "d"], ["w"]),
        helper.make_node("Gemm", ["x", "w"], ["y"], transB=1),
    ]
    return _model(nodes, numpy_helper.from_array(G, "g"), numpy_helper.from_array(V, "v"))


def _save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def _emptied(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.dims[0] = 1 << 45


def _sparse(model: onnx.ModelProto) -> None:
    values, where = numpy_helper.from_array(V.reshape(-1), "v"), numpy_helper.from_array(np.arange(32), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, where, [8, 4]))
    del model.graph.initializer[1]


def _constant(model: onnx.ModelProto) -> onnx.AttributeProto:
    """The attribute of a Constant put before everything else."""
    model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(V, "k")))
    return model.graph.node[0].attribute[0]


def _named(model: onnx.ModelProto, name: str) -> None:
    for node in model.graph.node:
        node.name = name


def _undecodable(model: onnx.ModelProto) -> None:
    """A node whose documentation is no UTF-8, by way of the bytes of the message."""
    model.graph.node[0].doc_string = "~doc~"
    model.MergeFromString(model.SerializeToString().replace(b"~doc~", b"~\xe7\xff~~"))


def _called(model: onnx.ModelProto, results: list[str]) -> None:
    """A function with one result that is called for others."""
    opsets = [helper.make_opsetid("", 12)]
    body = [helper.make_node("ReduceL2", ["a"], ["b"], axes=[1])]
    model.functions.append(helper.make_function("l", "size", ["a"], ["b"], body, opsets))
    model.opset_import.append(helper.make_opsetid("l", 1))
    model.graph.node[0].CopyFrom(helper.make_node("size", ["v"], results, domain="l"))


DAMAGE: dict[str, Callable[[onnx.ModelProto], object]] = {
    "huge size": lambda m: m.graph.initializer[1].dims.__setitem__(0, 1 << 62),
    "negative size": lambda m: m.graph.initializer[1].dims.__setitem__(0, -1),
    "no type": lambda m: setattr(m.graph.initializer[1], "data_type", 0),
    "bytes as strings": lambda m: setattr(m.graph.initializer[1], "data_type", TensorProto.STRING),
    "too few bytes": lambda m: setattr(m.graph.initializer[1], "raw_data", V.tobytes()[:50]),
    "no bytes": lambda m: _emptied(m.graph.initializer[1]),
    "a value from nowhere": lambda m: m.graph.node[3].input.__setitem__(1, "ghost"),
    "a circle": lambda m: m.graph.node[0].input.__setitem__(0, "d"),
    "sparse": _sparse,
    "text that is none": _undecodable,
    "an unknown type": lambda m: setattr(_constant(m).t, "data_type", 255),
    "an attribute without type": lambda m: _constant(m).ClearField("type"),
    "an input left out": lambda m: m.graph.node[0].input.__setitem__(0, ""),
    "no inputs": lambda m: m.graph.node[0].ClearField("input"),
    "too many outputs": lambda m: m.graph.node[0].output.append("more"),
    "two initializers of a name": lambda m: m.graph.initializer.append(m.graph.initializer[1]),
    "two nodes of a name": lambda m: _named(m, "same"),
    "two values of a name": lambda m: m.graph.node[2].output.__setitem__(0, "d"),
    "a call for too much": lambda m: _called(m, ["n", "more"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_error_and_no_file(tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]) -> None:
    """What a graph claims about its constants and operations is checked when it is read; nothing is printed."""
    model = _weight_norm()
    DAMAGE[damage](model)
    path = _save(model, tmp_path / "a.onnx")
    for act in (lambda: fold_onnx(path, tmp_path / "b.onnx"), lambda: inspect(path), lambda: verify(path, path)):
        with pytest.raises(InputError) as caught:
            act()
        assert caught.value.exit_code == 3
        assert caught.value.message.startswith(f"{path}: ")
        assert "\n" not in caught.value.message
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    assert capfd.readouterr() == ("", "")


def test_our_own_errors_are_not_blamed_on_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in this package is no damage of the graph."""
    path = _save(_weight_norm(), tmp_path / "a.onnx")

    def broken(g: np.ndarray, v: np.ndarray, magnitude: str) -> np.ndarray:
        raise KeyError(magnitude)

    monkeypatch.setattr(graph_matching, "_composed", broken)
    with pytest.raises(KeyError):
        fold_onnx(path, tmp_path / "b.onnx")
    with pytest.raises(ZeroDivisionError), blamed_on(path):
        _ = 1 // 0


def test_operations_in_any_order_are_folded(tmp_path: Path) -> None:
    """onnxruntime sorts operations itself, so a graph that is not sorted is a good one."""
    model = _weight_norm()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    report = fold_onnx(_save(model, tmp_path / "a.onnx"), tmp_path / "b.onnx")
    assert (len(report.found), report.nodes_after) == (1, 1)


def _chain(kind: str) -> onnx.ModelProto:
    """Operations on constants that grow without end, before a norm."""
    nodes, last = [], "v"
    arrays = [numpy_helper.from_array(V, "v"), numpy_helper.from_array(np.zeros(30_000, np.int64), "i")]
    for step in range(60):
        if kind == "Concat":
            node = helper.make_node("Concat", [last, last], [f"c{step}"], axis=0)
        elif kind == "Gather":
            node = helper.make_node("Gather", [last, "i"], [f"c{step}"], axis=step % 2)
        else:
            node = helper.make_node("Unsqueeze", [last], [f"c{step}"], axes=[0])
        nodes.append(node)
        last = f"c{step}"
    nodes += [
        helper.make_node("ReduceL2", [last], ["n"], axes=[1]),
        helper.make_node("Div", [last, "n"], ["w"]),
        helper.make_node("Add", ["x", "w"], ["y"]),
    ]
    return _model(nodes, *arrays)


@pytest.mark.parametrize("kind", ["Concat", "Gather", "Unsqueeze"])
def test_constants_that_grow_do_not_fill_the_memory(tmp_path: Path, kind: str) -> None:
    """Results far beyond the model's own constants, or of more axes than arrays have, are not worked out."""
    path = _save(_chain(kind), tmp_path / "a.onnx")
    report = fold_onnx(path, tmp_path / "b.onnx")
    assert report.found == ()
    assert (tmp_path / "b.onnx").read_bytes() == path.read_bytes()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell the peak of memory")
def test_large_weights_fold_in_three_times_their_size(tmp_path: Path) -> None:
    """Peak memory, imports apart, stays below three times the largest weight and 100 MB, all weights being five times
    the largest."""
    rows, layers = 6144, 5
    make(tmp_path, rows, layers)
    found, peak = fold(tmp_path)
    assert found == layers
    assert peak < 3 * 4 * rows * rows + 100_000_000


def _after_a_norm(path: Path, count: int) -> Path:
    """A chain of additions to what a norm gave."""
    nodes = [helper.make_node("ReduceL2", ["v"], ["n"], axes=[1]), helper.make_node("Div", ["v", "n"], ["c0"])]
    nodes += [helper.make_node("Add", [f"c{i}", "g"], [f"c{i + 1}"]) for i in range(count)]
    nodes.append(helper.make_node("Gemm", ["x", f"c{count}"], ["y"], transB=1))
    return _save(_model(nodes, numpy_helper.from_array(G, "g"), numpy_helper.from_array(V, "v")), path)


def test_a_long_chain_takes_time_in_its_length(tmp_path: Path) -> None:
    """Twice as many constants after a norm are about twice the work, counted in lines of Python."""
    counts = []
    for count in (200, 400):
        path, lines = _after_a_norm(tmp_path / f"{count}.onnx", count), 0

        def step(frame: object, event: str, _: object) -> object:
            nonlocal lines
            lines += event == "line"
            return step

        model = read_onnx(path)
        before = sys.gettrace()
        sys.settrace(step)
        try:
            found = find_weight_norms(model)
        finally:
            sys.settrace(before)
        assert [f.value for f in found] == ["c0"]
        counts.append(lines)
    assert counts[1] < 2.5 * counts[0]
