"""Differences in bits and within tolerance, and onnxruntime sessions that are what was asked for."""

from __future__ import annotations

import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from wnsurgery.bisection import first_difference
from wnsurgery.differences import (
    OutputDifference,
    as_array,
    bits_changed,
    compare_outputs,
    compare_tensors,
    tolerance,
    ulp_distance,
)
from wnsurgery.errors import (
    InputError,
    InputMissingError,
    ProviderError,
    SelectionError,
    UnsafeFileError,
    VerificationError,
)
from wnsurgery.inout import write_arrays
from wnsurgery.parity import PROVIDERS, open_session, run_onnx
from wnsurgery.verification import verify

NAN = float("nan")
INF = float("inf")


@pytest.fixture
def doubler(tmp_path: Path) -> Path:
    """y = x + x and z = -n for a float32 matrix with an open first axis and an int64 scalar."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("Neg", ["n"], ["z"])],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("n", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("z", TensorProto.INT64, []),
        ],
    )
    path = tmp_path / "doubler.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


# Bits


@given(st.floats(width=32, allow_nan=False), st.integers(0, 40))
def test_ulp_distance_counts_steps_of_nextafter(start: float, steps: int) -> None:
    """Walking n times to the next float32 is a distance of n, unless infinity stops the walk."""
    x = np.float32(start)
    y = x
    walked = 0
    for _ in range(steps):
        with np.errstate(over="ignore"):
            following = np.nextafter(y, np.float32(INF))
        walked += int(following != y)
        y = following
    assert ulp_distance(np.array([x]), np.array([y])).tolist() == [walked]


@pytest.mark.parametrize(
    ("dtype", "mantissa"),
    [(np.float64, 52), (np.float32, 23), (np.float16, 10), (ml_dtypes.bfloat16, 7)],
)
def test_ulp_distance_between_powers_of_two(dtype: type, mantissa: int) -> None:
    """From 1 to 2 are 2^mantissa steps in every type, from -1 to 1 as many as there are numbers between them."""
    one, two = np.array([1.0], dtype), np.array([2.0], dtype)
    assert ulp_distance(one, two).tolist() == [2**mantissa]
    bits = int.from_bytes(one.tobytes(), "little")
    assert ulp_distance(-one, one).tolist() == [2 * bits]


def test_ulp_distance_of_the_ends_of_float64_does_not_overflow() -> None:
    """The distance from -inf to inf exceeds a signed 64-bit integer and is still right."""
    top = struct.unpack("<Q", struct.pack("<d", INF))[0]
    assert ulp_distance(np.array([-INF]), np.array([INF])).tolist() == [2 * top]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_torch_keep_their_bits(dtype: torch.dtype) -> None:
    """A tensor's bytes arrive unchanged, bfloat16 and non-contiguous ones included."""
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype).t()
    array = as_array(tensor.requires_grad_())
    assert array.shape == (5, 3)
    expected = bytes(tensor.detach().contiguous().view(torch.uint8).reshape(-1).tolist())
    assert np.ascontiguousarray(array).tobytes() == expected
    assert as_array(torch.tensor(2.5, dtype=dtype)).shape == ()


def test_signed_zeros_and_nans() -> None:
    """+0 and -0 are 0 apart but differ in a bit; NaN equals NaN, and nothing else."""
    a, b = np.float32([0.0, NAN, NAN, 1.0]), np.float32([-0.0, -NAN, 1.0, NAN])
    assert ulp_distance(a, b).tolist() == [0, 0, 2**64 - 1, 2**64 - 1]
    assert bits_changed(a, b) == 3
    assert bits_changed(np.complex64([1 + 0j]), np.conj(np.complex64([1 + 0j]))) == 1


def test_a_type_without_a_sign() -> None:
    """Powers of two in eight bits are as far apart as their exponents: no bit of theirs is a sign."""
    bits = torch.tensor([0, 1, 127, 128, 129, 254, 255], dtype=torch.uint8)
    one = bits.view(torch.float8_e8m0fnu)
    other = torch.tensor([128, 129, 128, 128, 1, 0, 255], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert ulp_distance(one, other).tolist() == [128, 128, 1, 0, 128, 254, 0]
    report = compare_tensors({"w": one[:1]}, {"w": other[:1]})
    assert report.problems == ("w: 1 elements differ, by up to 128 units in the last place (at (0,))",)
    assert compare_tensors({"w": one[2:4]}, {"w": other[2:4]}, max_ulp=1).ok


def test_different_shapes_or_types_have_no_distance() -> None:
    """Broadcasting or casting would hide a difference."""
    for other in (np.zeros(3, np.float32), np.zeros((2, 1), np.float32), np.zeros(2, np.float64)):
        with pytest.raises(ValueError, match="differ"):
            ulp_distance(np.zeros(2, np.float32), other)


# Weights


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"w": torch.randn(4, 4, generator=generator), "n": torch.tensor(3), "h": torch.ones(2).bfloat16()}


def test_equal_tensors_pass_and_the_report_says_so() -> None:
    """Equal states pass, with all elements in the first bin."""
    report = compare_tensors(_weights(), _weights())
    assert report.ok
    assert report.tensors[0].histogram == (16, 0, 0, 0, 0)
    report.raise_for_status()
    assert "passed" in str(report)


@pytest.mark.parametrize("case", ["bit", "nan", "transposed", "type", "shape", "missing", "extra", "integer", "sign"])
def test_every_kind_of_wrong_weight_fails(case: str) -> None:
    """One bit, one NaN, a transposed square weight, another type, shape or set of names: each fails and is named."""
    a, b = _weights(), _weights()
    name = "w"
    if case == "bit":
        b["w"].view(torch.int32)[1, 2] ^= 1
    elif case == "nan":
        b["w"][0, 0] = NAN
    elif case == "transposed":
        b["w"] = b["w"].t().contiguous()
    elif case == "type":
        b["w"] = b["w"].half()
    elif case == "shape":
        b["w"] = b["w"].reshape(2, 8)
    elif case == "missing":
        del b["w"]
    elif case == "extra":
        b[name := "w2"] = b["w"]
    elif case == "integer":
        b[name := "n"] = torch.tensor(4)
    else:
        a["z"], b[name := "z"] = torch.zeros(2), -torch.zeros(2)
    report = compare_tensors(a, b)
    assert not report.ok
    assert len(report.problems) == 1
    with pytest.raises(VerificationError, match=f"^{name}:"):
        report.raise_for_status()
    assert "FAILED" in str(report)


def test_histogram_and_allowed_distance() -> None:
    """Elements fall into the bins 0, 1, 2, 3-4, more; a distance that is allowed passes."""
    steps = np.array([0, 1, 2, 3, 4, 5, 100], np.uint32)
    a = np.ones(7, np.float32)
    b = (a.view(np.uint32) + steps).view(np.float32)
    report = compare_tensors({"w": a}, {"w": b}, max_ulp=100)
    assert report.tensors[0].histogram == (1, 1, 1, 2, 2)
    assert report.tensors[0].max_ulp == 100
    assert report.ok
    assert not compare_tensors({"w": a}, {"w": b}, max_ulp=99).ok


def test_nothing_to_compare_is_a_failure() -> None:
    """Two empty sides agree on nothing."""
    assert not compare_tensors({}, {}).ok
    assert not compare_outputs([], []).ok
    with pytest.raises(VerificationError, match="no tensors"):
        compare_tensors({}, {}).raise_for_status()


# Outputs


def test_outputs_within_tolerance_pass() -> None:
    """Rounding-sized differences pass, judged by the largest element and not by each one's own size."""
    b = np.array([1000.0, 1e-3], np.float32)
    a = b + np.array([1e-3, 1e-3], np.float32)
    report = compare_outputs([a], [b])
    assert report.ok
    assert report.outputs[0].max_abs == pytest.approx(1e-3, rel=0.1)
    assert report.outputs[0].max_rel == pytest.approx(1e-6, rel=0.1)
    assert not compare_outputs([a], [b], rtol=1e-7, atol=0.0).ok


@pytest.mark.parametrize(
    ("a", "b", "what"),
    [
        ([1.0, NAN], [1.0, 2.0], "NaN"),
        ([1.0, 2.0], [1.0, NAN], "NaN"),
        ([INF, 2.0], [1.0, 2.0], "infinit"),
        ([INF, 2.0], [-INF, 2.0], "infinit"),
        ([1.0, 2.0], [1.0, 2.001], "off by"),
        ([0.0, 0.0], [0.0, 1e-3], "off by"),
        ([1e-3, 0.0], [0.0, 0.0], "off by"),
    ],
)
def test_wrong_values_fail(a: list[float], b: list[float], what: str) -> None:
    """NaN against a number, other infinities and differences beyond tolerance fail."""
    report = compare_outputs({"y": np.float32(a)}, {"y": np.float32(b)})
    assert not report.ok
    assert what in report.problems[0]
    with pytest.raises(VerificationError, match=r"^y:"):
        report.raise_for_status()


def test_worst_location_is_named() -> None:
    """The report says where the largest difference is."""
    a, b = np.zeros((3, 4), np.float32), np.zeros((3, 4), np.float32)
    b[2, 1] = 1
    assert compare_outputs([a], [b]).outputs[0].worst == (2, 1)


def test_equal_nans_and_infinities_pass() -> None:
    """Where both sides give NaN, or the same infinity, they agree."""
    x = np.float32([NAN, INF, -INF, 1.0])
    assert compare_outputs([x], [x.copy()]).ok


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_the_parts_of_complex_outputs_are_compared_apart(dtype: type) -> None:
    """Where one part is NaN, or infinite, on both sides the other part still counts."""

    def compared(a: complex, b: complex) -> OutputDifference:
        return compare_outputs([np.array([a, 1 + 1j], dtype)], [np.array([b, 1 + 1j], dtype)]).outputs[0]

    for odd in (NAN, INF):
        assert compared(complex(odd, 1), complex(odd, 1)).ok
        assert compared(complex(odd, 1e-16), complex(odd, 0)).ok
        for a, b, apart in ((complex(odd, 1), complex(odd, 2), 1), (complex(1, odd), complex(3, odd), 2)):
            found = compared(a, b)
            assert not found.ok
            assert (found.max_abs, found.worst) == (apart, (0,))
    assert "1 elements are NaN on one side only" in compared(complex(NAN, 1), complex(NAN, NAN)).reason
    assert "1 elements are NaN on one side only" in compared(1 + 1j, complex(1, NAN)).reason
    assert compared(3 + 4j, 0j).max_abs == 5


def test_complex_numbers_whose_size_float64_cannot_hold() -> None:
    """They are held to the largest number it can; what differs by as much still fails, and nothing is warned of."""
    a, b = np.complex128([1.5e308 + 1.5e308j, 1e308]), np.complex128([1.5e308 + 1.5e308j, 1e307])
    assert compare_outputs([a], [a]).ok
    assert compare_outputs([a], [b]).outputs[0].worst == (1,)
    assert not compare_outputs([a], [b]).ok


def test_swapped_missing_and_misshapen_outputs_fail() -> None:
    """Outputs in another order, a lost one, another shape or type fail."""
    x, y = np.float32([1, 2]), np.float32([3, 4])
    assert not compare_outputs([x, y], [y, x]).ok
    assert not compare_outputs({"x": x, "y": y}, {"x": y, "y": x}).ok
    assert not compare_outputs([x, y], [x]).ok
    assert not compare_outputs({"x": x}, {"y": x}).ok
    assert not compare_outputs([x], [x[None]]).ok
    assert not compare_outputs([x], [x.astype(np.float64)]).ok
    assert compare_outputs({"x": x, "y": y}, [x, y]).ok


def test_integers_must_be_equal_to_the_last_digit() -> None:
    """Class indices have no tolerance, and integers that float64 cannot tell apart are told apart."""
    assert compare_outputs([np.int64([2**60])], [np.int64([2**60])]).ok
    assert not compare_outputs([np.int64([2**60])], [np.int64([2**60 + 1])]).ok
    assert not compare_outputs([np.array([True])], [np.array([False])]).ok


def test_values_rounded_to_half_precision_fail_as_float32() -> None:
    """A net that ran in fp16 does not pass for one that ran in fp32."""
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    assert not compare_outputs([x.astype(np.float16).astype(np.float32)], [x]).ok
    assert tolerance(np.float16)[0] < 0.01 < tolerance(ml_dtypes.bfloat16)[0]


# Sessions


def test_inputs_of_the_other_byte_order(doubler: Path) -> None:
    """An array counts by its numbers, whatever the order of their bytes."""
    x = np.arange(6, dtype="f4").reshape(2, 3)
    plain, swapped = (run_onnx(doubler, [x.astype(f"{order}f4"), np.array(5, f"{order}i8")]) for order in "<>")
    assert all(np.array_equal(plain[name], swapped[name]) for name in plain)


def test_names_that_no_npz_holds(tmp_path: Path) -> None:
    """A name beyond what a zip file can hold is told, and nothing is written."""
    with pytest.raises(InputError, match="too long for an"):
        write_arrays(tmp_path / "y.npz", {"x" * 70_000: np.ones(2)})
    assert not list(tmp_path.iterdir())


def test_runs_by_name_by_position_and_alone(doubler: Path) -> None:
    """Inputs are taken by name or in the graph's order, torch tensors included; outputs come by name."""
    x = np.float32([[1, 2, 3]])
    pair = [x, np.int64(5)]
    numbered = {"arr_0": x, "arr_1": pair[1]}
    for inputs in ({"n": pair[1], "x": x}, pair, (torch.from_numpy(x), torch.tensor(5)), numbered):
        found = run_onnx(doubler, inputs)
        assert found["y"].tolist() == [[2, 4, 6]]
        assert found["z"] == -5


@pytest.mark.parametrize(
    ("inputs", "what"),
    [
        ({"x": np.zeros((1, 3), np.float32)}, "n is missing"),
        ({"x": np.zeros((1, 3), np.float32), "n": np.int64(1), "q": 1}, "q is not one"),
        ([np.zeros((1, 3), np.float32)], "1 inputs given"),
        ([np.zeros((1, 3)), np.int64(1)], "float64 1x3"),
        ([np.zeros((1, 4), np.float32), np.int64(1)], "float32 1x4"),
        ([np.zeros(3, np.float32), np.int64(1)], "float32 3"),
    ],
)
def test_wrong_inputs_say_what_was_expected(doubler: Path, inputs: object, what: str) -> None:
    """Missing, surplus, misshapen and mistyped inputs are refused with the declaration."""
    with pytest.raises(InputError, match=what) as caught:
        run_onnx(doubler, inputs)
    assert "tensor(float) batchx3" in caught.value.message


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "coreml", "dml", "openvino"])
def test_a_provider_that_is_not_there_is_an_error(
    doubler: Path, provider: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking for hardware that is missing is exit code 6 with the package to install, and nothing is printed."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ProviderError, match=provider) as caught:
        open_session(doubler, provider)
    assert caught.value.exit_code == 6
    assert "installed: cpu" in str(caught.value.hint)
    assert PROVIDERS[provider][1] in str(caught.value.hint)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "provider", ["CUDAExecutionProvider", "CUDA", "azure", "AzureExecutionProvider", "rocm", "QNN"]
)
def test_other_names_of_providers_are_never_the_cpu(
    doubler: Path, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime's own names count, and one that is listed as installed but runs nothing is refused."""
    import onnxruntime

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["AzureExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.raises(ProviderError) as caught:
        open_session(doubler, provider)
    assert caught.value.exit_code == 6
    assert open_session(doubler, "CPUExecutionProvider").get_providers() == ["CPUExecutionProvider"]


def test_a_provider_that_onnxruntime_drops_is_an_error(doubler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that would run on the CPU although CUDA is listed as installed is refused."""
    import onnxruntime

    class Fallen:
        def __init__(self, *args: object, **kwargs: object) -> None:
            print("EP Error: falling back")

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Fallen)
    with pytest.raises(ProviderError, match="did not take CUDAExecutionProvider"):
        open_session(doubler, "cuda")


def test_bound_inputs_and_outputs_give_the_same(doubler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that GPUs take, tried on the CPU: the same outputs under the same names."""
    inputs = [np.float32([[1, 2, 3]]), np.int64(5)]
    plain = run_onnx(doubler, inputs)
    monkeypatch.setattr("wnsurgery.parity._BOUND", ("CPUExecutionProvider",))
    bound = run_onnx(doubler, inputs)
    assert {k: v.tolist() for k, v in bound.items()} == {k: v.tolist() for k, v in plain.items()}


def test_auto_takes_what_works(doubler: Path) -> None:
    """`auto` gives some session whose provider is known."""
    assert open_session(doubler, "auto").get_providers()[-1] == "CPUExecutionProvider"


def test_an_unknown_provider_is_a_usage_error_before_anything_prints(
    doubler: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A misspelt provider lists the right ones; onnxruntime's banner never reaches stdout."""
    with pytest.raises(SelectionError, match="cpu, cuda"):
        open_session(doubler, "cudaa")
    assert capfd.readouterr() == ("", "")


def test_prints_of_onnxruntime_do_not_reach_stdout(
    doubler: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever onnxruntime prints while a session starts goes to stderr."""
    import onnxruntime

    real = onnxruntime.InferenceSession

    def chatty(*args: object, **kwargs: object) -> object:
        print("*** EP Error ***")
        return real(*args, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", chatty)
    open_session(doubler)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "EP Error" in captured.err


def test_damaged_and_missing_files(doubler: Path, tmp_path: Path) -> None:
    """A truncated, an empty, a foreign and a missing file are input errors in one line each."""
    content = doubler.read_bytes()
    for name, data in (("cut", content[: len(content) // 2]), ("empty", b""), ("text", b"hello " * 50)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=f"{name}: ") as caught:
            open_session(tmp_path / name)
        assert "\n" not in caught.value.message
    with pytest.raises(InputMissingError):
        open_session(tmp_path / "missing.onnx")
    with pytest.raises(InputError, match="directory"):
        open_session(tmp_path)


def test_a_graph_onnxruntime_cannot_run_is_an_input_error(tmp_path: Path) -> None:
    """Parsable files with an unknown operation are refused, not crashed on."""
    graph = helper.make_graph(
        [helper.make_node("NoSuchOperation", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    path = tmp_path / "odd.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    with pytest.raises(InputError, match="onnxruntime refuses it"):
        open_session(path)


def _external(path: Path, location: str, offset: int = 0, length: int = 12) -> None:
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [3], np.zeros(3, np.float32).tobytes(), raw=True)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [info], [out], [tensor])
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()
    )


def test_external_weights_must_stay_beside_the_model(tmp_path: Path) -> None:
    """Weights in the parent, at an absolute path or behind a link out of the directory are refused as unsafe."""
    home = tmp_path / "home"
    home.mkdir()
    outside = tmp_path / "outside.bin"
    outside.write_bytes(bytes(12))
    (home / "link.bin").symlink_to(outside)
    for location in ("../outside.bin", str(outside), "link.bin"):
        _external(home / "m.onnx", location)
        with pytest.raises(UnsafeFileError, match="outside the model's directory"):
            open_session(home / "m.onnx")


@pytest.mark.parametrize(("offset", "length"), [(4, 12), (0, 8), (-4, 12), (0, -12), (1 << 40, 12)])
def test_external_weights_must_be_where_they_claim(tmp_path: Path, offset: int, length: int) -> None:
    """Offsets and lengths past the end, negative or not of the tensor's size are input errors."""
    (tmp_path / "w.bin").write_bytes(bytes(12))
    _external(tmp_path / "m.onnx", "w.bin", offset, length)
    with pytest.raises(InputError):
        open_session(tmp_path / "m.onnx")


def test_external_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    """A model that came without its weights file says which file it wants."""
    _external(tmp_path / "m.onnx", "w.bin")
    with pytest.raises(InputMissingError, match=r"w\.bin"):
        open_session(tmp_path / "m.onnx")
    (tmp_path / "w.bin").write_bytes(np.float32([1, 2, 3]).tobytes())
    assert run_onnx(tmp_path / "m.onnx", [np.zeros(3, np.float32)])["y"].tolist() == [1, 2, 3]


OUTPUTS = {
    "text": ('y = Constant <value_strings = ["a"]> ()', helper.make_tensor_value_info("y", TensorProto.STRING, [1])),
    "a sequence": ("y = SequenceConstruct(x, x)", helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_that_are_no_arrays_of_numbers_are_an_error(tmp_path: Path, kind: str) -> None:
    """Text and sequences can be neither stored nor compared: exit code 3, with the name of the output."""
    body, declared = OUTPUTS[kind]
    text = f'<ir_version: 9, opset_import: ["" : 18]> g (float[2] x) => (float[2] z) {{ {body} z = Neg(x) }}'
    model = onnx.parser.parse_model(text)
    model.graph.output.append(declared)
    path = tmp_path / "a.onnx"
    path.write_bytes(model.SerializeToString())
    for act in (lambda: run_onnx(path, [np.zeros(2, np.float32)]), lambda: verify(path, path)):
        with pytest.raises(InputError, match=r"its output y is a .*, and no array of numbers") as caught:
            act()
        assert caught.value.exit_code == 3
    assert first_difference(path, path, [np.zeros(2, np.float32)]).layer is None


def test_a_name_too_long_for_an_npz_is_an_error(tmp_path: Path) -> None:
    """Names of outputs are names in a zip file, which have an end; nothing is written then."""
    with pytest.raises(InputError, match="70000 characters") as caught:
        write_arrays(tmp_path / "y.npz", {"n" * 70_000: np.zeros(2)})
    assert (caught.value.exit_code, list(tmp_path.iterdir())) == (3, [])
    write_arrays(tmp_path / "y.npz", {"n" * 65_000: np.zeros(2)})
    write_arrays(tmp_path / "y.npy", {"n" * 70_000: np.zeros(2)})


# What a graph may declare


def _written(path: Path, text: str) -> Path:
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    return path


def test_inputs_of_any_shape(tmp_path: Path) -> None:
    """A graph that leaves the number of axes open takes any; one that declares a scalar takes a scalar."""
    node = helper.make_node("Relu", ["x"], ["y"])
    for shape, name in ((None, "any.onnx"), ([], "scalar.onnx")):
        ends = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "xy")
        graph = helper.make_graph([node], "g", *([end] for end in ends))
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / name)
    for x in (np.float32(1), np.ones(3, np.float32), np.ones((2, 3), np.float32)):
        assert np.array_equal(run_onnx(tmp_path / "any.onnx", [x])["y"], x)
        verify(tmp_path / "any.onnx", tmp_path / "any.onnx", [x]).raise_for_status()
    assert first_difference(tmp_path / "any.onnx", tmp_path / "any.onnx", [x]).compared == 1
    with pytest.raises(InputError, match=r"takes tensor\(float\) of any shape, not int64 2"):
        run_onnx(tmp_path / "any.onnx", [np.ones(2, np.int64)])
    with pytest.raises(InputError, match="x: no inputs can be made up where any shape will do"):
        verify(tmp_path / "any.onnx", tmp_path / "any.onnx")
    with pytest.raises(InputError, match=r"takes tensor\(float\) scalar, not float32 3"):
        run_onnx(tmp_path / "scalar.onnx", [np.ones(3, np.float32)])


def test_inputs_with_a_value_of_their_own_can_be_overridden(tmp_path: Path) -> None:
    """An initializer that is listed as an input is left out, or given by name or after the others."""
    text = '<ir_version: 9, opset_import: ["" : 18]> g (float[2] x, float[1] k = {2.0}) => (float[2] y) {y = Mul(x, k)}'
    path, x, k = _written(tmp_path / "m.onnx", text), np.ones(2, np.float32), np.float32([5])
    assert [run_onnx(path, inputs)["y"].tolist() for inputs in ([x], {"x": x})] == [[2, 2]] * 2
    assert [run_onnx(path, inputs)["y"].tolist() for inputs in ([x, k], {"k": k, "x": x})] == [[5, 5]] * 2
    for wrong, what in (([x, k, k], "3 inputs given"), ({"k": k}, "x is missing"), ([x, x], "k: takes optional")):
        with pytest.raises(InputError, match=what):
            run_onnx(path, wrong)
    assert verify(path, path).ok


def test_optional_inputs(tmp_path: Path) -> None:
    """An `optional(tensor)` takes its tensor, None, or nothing, and no other type or shape."""
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [2]))
    graph = helper.make_graph(
        [helper.make_node("OptionalHasElement", ["o"], ["y"])],
        "g",
        [helper.make_value_info("o", kind)],
        [helper.make_tensor_value_info("y", TensorProto.BOOL, [])],
    )
    path, x = tmp_path / "m.onnx", np.ones(2, np.float32)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    assert [bool(run_onnx(path, inputs)["y"]) for inputs in ([x], {"o": x}, [None], {})] == [True, True, False, False]
    for wrong in ([np.ones(3, np.float32)], [np.ones(2)]):
        with pytest.raises(InputError, match=r"takes optional tensor\(float\) 2"):
            run_onnx(path, wrong)
    assert verify(path, path).ok
