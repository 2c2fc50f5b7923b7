"""Graphs from outside cannot hang, exhaust or crash the process, nor reach files they should not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from wnsurgery.errors import InputError, InputMissingError, UnsafeFileError
from wnsurgery.graph import fold_onnx
from wnsurgery.onnx_guard import GraphLimits, try_graph
from wnsurgery.parity import open_session

OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("l", 1)]
X = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
Y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])


def _save(path: Path, nodes: list[onnx.NodeProto], *initializers: onnx.TensorProto, functions: tuple = ()) -> Path:
    graph = helper.make_graph(nodes, "g", [X], [Y], list(initializers))
    model = helper.make_model(graph, opset_imports=OPSETS, functions=list(functions), ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def _doubling(path: Path, levels: int) -> Path:
    functions = []
    for i in range(levels):
        calls = [helper.make_node(f"f{i + 1}", [a], [b], domain="l") for a, b in ("ab", "bc")]
        calls = calls if i + 1 < levels else [helper.make_node("Neg", ["a"], ["c"])]
        functions.append(helper.make_function("l", f"f{i}", ["a"], ["c"], calls, OPSETS))
    return _save(path, [helper.make_node("f0", ["x"], ["y"], domain="l")], functions=tuple(functions))


def test_a_graph_that_never_gets_ready_is_given_up(tmp_path: Path) -> None:
    """Functions that double forty times over are refused after the time limit, with exit code 3."""
    path = _doubling(tmp_path / "a.onnx", 40)
    assert path.stat().st_size < 10_000
    with pytest.raises(InputError, match="not ready with it after 3 s") as caught:
        open_session(path, limits=GraphLimits(seconds=3))
    assert caught.value.exit_code == 3
    fold_onnx(path, tmp_path / "b.onnx")  # which needs neither the checker nor onnxruntime


def test_a_graph_that_fills_the_memory_is_refused(tmp_path: Path) -> None:
    """Constants that onnxruntime would expand to terabytes end in the child."""
    shape = numpy_helper.from_array(np.int64([1 << 20, 1 << 20, 4]), "shape")
    nodes = [helper.make_node("ConstantOfShape", ["shape"], ["big"]), helper.make_node("Add", ["x", "big"], ["y"])]
    path = _save(tmp_path / "a.onnx", nodes, shape)
    try:
        accepted = try_graph(path)
    except InputError as error:
        assert "GiB" in error.message
    else:
        assert accepted  # an onnxruntime that leaves the constant for later needs no memory to get ready


def test_an_ordinary_graph_passes_within_the_limits(tmp_path: Path) -> None:
    """The limits leave room for onnxruntime and for the checker."""
    path = _save(tmp_path / "a.onnx", [helper.make_node("Neg", ["x"], ["y"])])
    assert try_graph(path)
    assert try_graph(path, check=True)
    assert not try_graph(_save(tmp_path / "b.onnx", [helper.make_node("NoSuch", ["x"], ["y"])]), check=True)


def test_a_child_that_is_cut_short_is_a_refusal(tmp_path: Path) -> None:
    """With too little memory for onnxruntime itself (how much it takes depends on the threads), nothing is opened."""
    path = _save(tmp_path / "a.onnx", [helper.make_node("Neg", ["x"], ["y"])])
    with pytest.raises(InputError, match="refused"):
        open_session(path, limits=GraphLimits(memory=16 << 20))


# External weights ----------------------------------------------------------------------------------------


def _external(directory: Path, **entries: object) -> Path:
    """y = x + w with w in w.bin; the entries of its external data can be changed."""
    (directory / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in ({"location": "w.bin", "offset": 0, "length": 16} | entries).items():
        tensor.external_data.add(key=key, value=str(value))
    return _save(directory / "a.onnx", [helper.make_node("Add", ["x", "w"], ["y"])], tensor)


def test_external_weights_beside_the_model_are_read(tmp_path: Path) -> None:
    """What is refused below is refused for its place, not for being external."""
    assert open_session(_external(tmp_path)) is not None


@pytest.mark.parametrize(
    "entries",
    [
        {"location": "../w.bin"},
        {"location": "/etc/hostname"},
        {"location": "/dev/zero"},
        {"location": "sub/../../w.bin"},
        {"location": "missing.bin"},
        {"location": "."},
        {"location": "link.bin"},
        {"location": "outside.bin"},
        {"location": "hard.bin"},
        {"location": "pipe"},
        {"location": "dir/w.bin"},
        {"location": "nul\0.bin"},
        {"offset": 4},
        {"offset": -4},
        {"offset": 1 << 62},
        {"length": -16},
        {"length": 8},
        {"length": 1 << 62},
        {"offset": "four"},
    ],
    ids=str,
)
def test_external_weights_elsewhere_are_refused(tmp_path: Path, entries: dict[str, object]) -> None:
    """Outside the directory, past the end, negative, links, pipes, devices: exit code 3 or 4, and no output."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(16))
    path = _external(home, **entries)
    (home / "link.bin").symlink_to("w.bin")
    (home / "outside.bin").symlink_to(tmp_path / "w.bin")
    (home / "dir").symlink_to(tmp_path)
    (home / "copy.bin").write_bytes(bytes(16))
    os.link(home / "copy.bin", home / "hard.bin")
    os.mkfifo(home / "pipe")
    for action in (open_session, lambda p: fold_onnx(p, home / "b.onnx")):
        with pytest.raises((InputError, UnsafeFileError, InputMissingError)) as caught:
            action(path)
        assert caught.value.exit_code in (3, 4)
        assert "\n" not in caught.value.message
    assert not (home / "b.onnx").exists()
