"""Run ONNX files on the provider that was asked for, and compare what comes out.

    run_onnx("model.onnx", {"input": x}, provider="cuda")      # cuda, or an error; never the CPU in silence

The comparisons themselves are in `differences`; this module hands them on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from wnsurgery.batches import NamedArrays
from wnsurgery.declared import Declared
from wnsurgery.differences import (
    OutputDifference,
    OutputsReport,
    TensorDifference,
    TensorsReport,
    as_array,
    bits_changed,
    compare_outputs,
    compare_tensors,
    is_float,
    tolerance,
    ulp_distance,
)
from wnsurgery.errors import InputError, MissingPackageError, ProviderError, SelectionError, printable
from wnsurgery.onnx_guard import GraphLimits, try_graph
from wnsurgery.text import by

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "PROVIDERS",
    "OutputDifference",
    "OutputsReport",
    "TensorDifference",
    "TensorsReport",
    "bits_changed",
    "cast_to_declared",
    "compare_outputs",
    "compare_tensors",
    "declared_inputs",
    "open_session",
    "open_with_all_values",
    "refuse_other_outputs",
    "run_onnx",
    "run_session",
    "time_session",
    "tolerance",
    "ulp_distance",
]

Array = np.ndarray[Any, Any]
Path_ = str | os.PathLike[str]

# name -> (onnxruntime's name, what brings it)
PROVIDERS: Mapping[str, tuple[str, str]] = {
    "cpu": ("CPUExecutionProvider", "onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
    "tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu and TensorRT"),
    "coreml": ("CoreMLExecutionProvider", "onnxruntime on macOS"),
    "dml": ("DmlExecutionProvider", "onnxruntime-directml"),
    "openvino": ("OpenVINOExecutionProvider", "onnxruntime-openvino"),
}
# what else onnxruntime has names for
_OTHERS = frozenset(
    (
        "acl",
        "armnn",
        "azure",
        "cann",
        "dnnl",
        "js",
        "migraphx",
        "nnapi",
        "nvtensorrtrtx",
        "qnn",
        "rknpu",
        "rocm",
        "snpe",
    )
) | frozenset(("vitisai", "vsinpu", "webgpu", "webnn", "xnnpack"))
_FLOATS = ("float32", "float64", "float16")
_BOUND = ("CUDAExecutionProvider", "TensorrtExecutionProvider")  # they take bound inputs and outputs
_ANY_RANK: WeakKeyDictionary[Any, frozenset[str]] = WeakKeyDictionary()  # onnxruntime calls these scalars
_AUTO = ("tensorrt", "cuda", "coreml", "dml", "openvino", "cpu")


def open_session(
    path: Path_, provider: str = "cpu", *, trusted: bool = False, limits: GraphLimits | None = None
) -> Any:
    """An onnxruntime session on the provider asked for, or an error; never the CPU in silence.

    The graph is first tried in a child process with limits on time and memory, because a small file can keep
    onnxruntime busy for ever; `trusted=True` leaves that out.

    >>> wn.open_session("model.onnx").get_providers()  # doctest: +SKIP
    ['CPUExecutionProvider']

    Args:
        path: ONNX file; weights in files beside it are found there.
        provider: cpu, cuda, tensorrt, coreml, dml or openvino; "auto" takes the first of tensorrt, cuda, coreml,
            dml, openvino and cpu that works.
        trusted: the file is your own.
        limits: what it may take until it is ready, see `GraphLimits`.

    Raises:
        SelectionError: no such provider.
        ProviderError: the provider is not installed, or onnxruntime could not start it.
        InputMissingError, InputError, UnsafeFileError: about the file.
        MissingPackageError: onnxruntime is not installed.
    """
    from wnsurgery.onnx_file import external_tensors, read_onnx

    provider = _known(provider)
    model = read_onnx(path)  # damaged files and weights outside the directory are refused before onnxruntime sees them
    ort = _onnxruntime()
    installed = ort.get_available_providers()
    candidates = [provider] if provider != "auto" else [n for n in _AUTO if PROVIDERS[n][0] in installed]
    for name in candidates:
        _check_installed(ort, name, installed)
    if not trusted:
        try_graph(path, weights=sum(tensor.nbytes for tensor in external_tensors(model)), limits=limits)
    for name in candidates:
        try:
            session = _session(ort, os.fspath(path), name, path)
            _ANY_RANK[session] = frozenset(str(value.name) for value in model.graph.inputs if value.shape is None)
            return session
        except ProviderError:
            if provider != "auto":
                raise
    raise ProviderError("no provider of this onnxruntime works", hint=f"installed: {_names_of(installed)}")


def open_with_all_values(path: Path_, *, trusted: bool = False) -> tuple[ir.Model, Any]:
    """A graph and a session on the CPU that hands out every value computed in it, for looking inside.

    >>> model, session = open_with_all_values("model.onnx")  # doctest: +SKIP

    Raises as `open_session`.
    """
    import onnx_ir as ir

    from wnsurgery.onnx_file import read_onnx

    checked = open_session(path, trusted=trusted)
    model = read_onnx(path)
    known = set(model.graph.outputs)
    for node in model.graph:
        for value in node.outputs:
            if value.name and value not in known and value.dtype != ir.DataType.BFLOAT16 and _is_tensor(value):
                model.graph.outputs.append(value)
    options = {"session.model_external_initializers_file_folder_path": os.fspath(Path(path).resolve().parent)}
    session = _session(_onnxruntime(), ir.to_proto(model).SerializeToString(), "cpu", path, options)
    _ANY_RANK[session] = _ANY_RANK[checked]
    return model, session


def _known(provider: str) -> str:
    """A provider's short name; onnxruntime's own names count too."""
    short = provider.removesuffix("ExecutionProvider").lower()
    if short == "auto" or short in PROVIDERS:
        return short
    if short in _OTHERS:
        reason = "runs nothing here" if short == "azure" else "this package does not know how to prove that it is used"
        raise ProviderError(f"{provider}: {reason}", hint=f"providers: {', '.join((*PROVIDERS, 'auto'))}")
    known = f"{', '.join(PROVIDERS)} and auto"
    raise SelectionError(f"there is no provider {printable(provider)!r}", hint=f"providers (--provider): {known}")


def _is_tensor(value: ir.Value) -> bool:
    return value.type is None or type(value.type).__name__ == "TensorType"


def _check_installed(ort: Any, provider: str, installed: Sequence[str]) -> None:
    full, package = PROVIDERS[provider]
    if full not in installed:
        raise ProviderError(
            f"{provider}: onnxruntime {ort.__version__} here has no {full}",
            hint=f"installed: {_names_of(installed)}; pip install {package}",
        )


def _session(
    ort: Any, content: str | bytes, provider: str, path: Path_, settings: Mapping[str, str] | None = None
) -> Any:
    """A session for a file, or for a graph in memory that came from one."""
    full, package = PROVIDERS[provider]
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong comes back as an exception
    for key, value in (settings or {}).items():
        options.add_session_config_entry(key, value)
    wanted = [full] if provider == "cpu" else [full, "CPUExecutionProvider"]
    try:
        with _quiet():
            session = ort.InferenceSession(content, options, providers=wanted, enable_fallback=0)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        if provider == "cpu" or type(error).__name__ in ("InvalidGraph", "InvalidProtobuf"):
            raise InputError.of(path, f"onnxruntime refuses it: {_reason(error)}") from error
        raise ProviderError(f"{provider}: could not be started: {_reason(error)}") from error
    if full not in session.get_providers():
        taken = ", ".join(session.get_providers())
        raise ProviderError(
            f"{provider}: onnxruntime did not take {full}, it would have run on {taken}",
            hint=f"check the driver and libraries that {package} needs",
        )
    return session


def run_onnx(path: Path_, inputs: Mapping[str, Any] | Sequence[Any] | Any, provider: str = "cpu") -> dict[str, Array]:
    """Run an ONNX file once; the outputs by name.

    >>> wn.run_onnx("model.onnx", [torch.randn(1, 3, 32, 32)])["output"].shape  # doctest: +SKIP
    (1, 10)

    Args:
        path: ONNX file.
        inputs: arrays or tensors by name, or by position in the graph's order, or the only one. Names arr_0, arr_1,
            ... as numpy's savez makes them up count as positions.
        provider: see `open_session`.

    Raises as `open_session`, and InputError when the inputs are not what the graph declares (it says what is), or an
    output is text or a sequence.
    """
    return run_session(open_session(path, provider), inputs, path)


def run_session(
    session: Any, inputs: Mapping[str, Any] | Sequence[Any] | Any, name: Path_, *, some: bool = False
) -> dict[str, Array]:
    """`run_onnx` on an open session; `name` stands in error messages.

    Outputs that are no arrays of numbers, but text or sequences, are an error, or left out with `some`.
    """
    feeds = _feeds(Declared.all_of(session, _ANY_RANK.get(session, ())), inputs, name)
    if not some:
        refuse_other_outputs(session, name)
    names = [output.name for output in session.get_outputs() if _is_numeric(output.type)]
    try:
        with _quiet():
            if session.get_providers()[0] in _BOUND:
                results = _run_bound(session, feeds, names)
            else:
                results = session.run(names, feeds)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise InputError.of(name, f"onnxruntime could not run it: {_reason(error)}") from error
    return dict(zip(names, results, strict=True))


def refuse_other_outputs(session: Any, name: Path_) -> None:
    """Raise InputError where a graph gives text or sequences: outputs are arrays of numbers here."""
    for output in session.get_outputs():
        if not _is_numeric(output.type):
            reason = f"its output {printable(output.name)} is a {output.type}, and no array of numbers"
            raise InputError.of(name, reason)


def _is_numeric(kind: str) -> bool:
    return kind.startswith("tensor(") and kind != "tensor(string)"


def _run_bound(session: Any, feeds: Mapping[str, Array | None], names: Sequence[str]) -> list[Array]:
    """Inputs go to the device once and intermediate copies are left out; outputs come back at the end."""
    binding = session.io_binding()
    for name, array in feeds.items():
        if array is not None:  # an optional input that is left out
            binding.bind_cpu_input(name, array)
    for name in names:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    results: list[Array] = binding.copy_outputs_to_cpu()
    return results


def declared_inputs(session: Any) -> list[Declared]:
    """What a graph declares of the inputs that have no value of their own, for a session that `open_session` gave."""
    return Declared.needed(session, _ANY_RANK.get(session, ()))


def time_session(session: Any, inputs: Any, name: Path_, repeats: int) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the milliseconds that a run takes, after one that warms up."""
    import statistics
    import time

    run_session(session, inputs, name)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run_session(session, inputs, name)
        times.append(1e3 * (time.perf_counter() - started))
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if repeats > 1 else times * 3
    return low, middle, high


def cast_to_declared(session: Any, inputs: Any) -> Any:
    """Floating-point inputs in the types that a graph declares; whatever does not fit is left for its error."""
    declared = Declared.needed(session)
    kinds = {d.name: d.dtype for d in declared}

    def cast(name: str, value: Any) -> Any:
        if value is None:  # an optional input that is left out
            return None
        array, kind = as_array(value), kinds.get(name)
        return array.astype(kind) if kind in _FLOATS and is_float(array.dtype) else array

    if isinstance(inputs, Mapping):
        return {name: cast(str(name), value) for name, value in inputs.items()}
    if len(inputs) != len(declared):
        return inputs
    return [cast(d.name, value) for d, value in zip(declared, inputs, strict=True)]


def _feeds(declared: Sequence[Declared], inputs: Any, path: Path_) -> dict[str, Array | None]:
    needed = [d.name for d in declared if not d.default]
    if isinstance(inputs, NamedArrays) and {d.name for d in declared}.isdisjoint(inputs):
        inputs = list(inputs.values())
    if isinstance(inputs, Mapping) and not _is_numbered(inputs):
        given = {str(k): v for k, v in inputs.items()}
    else:
        inputs = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
        values = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        if not len(needed) <= len(values) <= len(declared):
            raise InputError.of(path, f"{len(values)} inputs given, it takes {_declaration(declared)}")
        given = {d.name: v for d, v in zip(declared, values, strict=False)}
    names = [d.name for d in declared]
    wrong = [
        f"{printable(d.name)} is missing" for d in declared if d.name not in given and not (d.default or d.optional)
    ]
    wrong += [f"{printable(n)} is not one of its inputs" for n in given if n not in names]
    if wrong:
        raise InputError.of(path, f"{'; '.join(wrong)}; it takes {_declaration(declared)}")
    return {
        d.name: None if d.optional and given.get(d.name) is None else _checked(d, as_array(given[d.name]), path)
        for d in declared
        if d.name in given or d.optional
    }


def _is_numbered(inputs: Mapping[str, Any]) -> bool:
    """Whether the names are the ones numpy's savez gives to arrays that have none."""
    return bool(inputs) and list(inputs) == [f"arr_{i}" for i in range(len(inputs))]


def _checked(declared: Declared, array: Array, path: Path_) -> Array:
    if not declared.fits(array.dtype.name, array.shape):
        seen = f"{array.dtype.name} {by(array.shape)}"
        raise InputError.of(path, f"{printable(declared.name)}: takes {declared}, not {seen}")
    if declared.dtype == "bfloat16":
        raise InputError.of(path, f"{printable(declared.name)}: onnxruntime takes no bfloat16 from Python")
    # onnxruntime takes bytes of the other order for its own
    return np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)


def _declaration(declared: Sequence[Declared]) -> str:
    return ", ".join(f"{printable(d.name)}: {d}" for d in declared) or "none"


def _names_of(installed: Sequence[str]) -> str:
    short = {full: name for name, (full, _) in PROVIDERS.items()}
    return ", ".join(short[p] for p in installed if p in short) or "none"


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return printable(text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text, 300)


def _onnxruntime() -> Any:
    try:
        with _quiet():
            import onnxruntime
    except ImportError as error:
        raise MissingPackageError("onnxruntime is not installed", hint="pip install onnxruntime") from error
    return onnxruntime


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What onnxruntime prints from Python goes to stderr; stdout is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
