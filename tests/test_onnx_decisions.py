"""Where g or v is rounded, compared or cast before the norm, the folded weight is what the graph's own types give."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper
from torch import nn
from torch.nn.functional import linear, normalize

from wnsurgery import onnx_values
from wnsurgery.graph import OnnxFoldReport, fold_model, fold_onnx

Array = np.ndarray
_TYPES = {np.float32: 1, np.float16: 10, np.float64: 11}


class _Builder:
    """A graph under construction: nodes, constants and fresh names."""

    def __init__(self, rng: np.random.Generator, dtype: type) -> None:
        self.rng, self.dtype, self.type = rng, dtype, _TYPES[dtype]
        self.nodes: list[object] = []
        self.arrays: dict[str, np.ndarray] = {}

    def constant(self, array: object, dtype: type | None = None) -> str:
        name = f"c{len(self.arrays)}"
        self.arrays[name] = np.asarray(array, dtype or self.dtype)
        return name

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def cast(self, value: str, to: int) -> str:
        return self.node("Cast", value, to=to)


def _scaled(b: _Builder, step: Callable[[str], str]) -> Callable[[str], str]:
    """A step in units of a scale: divided by it, or multiplied with its inverse, and back."""

    def apply(v: str) -> str:
        scale = b.constant(b.rng.choice([0.1, 0.05, 0.3, 0.125]))
        kind = b.rng.integers(3)
        if kind == 2:
            into = b.node("Mul", v, b.node("Div", b.constant(1), scale))
        else:
            into = b.node("Div", v, scale) if kind else b.node("Mul", v, b.node("Reciprocal", scale))
        return b.node("Mul", step(into), scale)

    return apply


def _steps(b: _Builder) -> dict[str, Callable[[str], str]]:
    rows = b.constant([1], np.int64)

    def threshold(v: str) -> str:
        limit = b.node("Mul", b.constant(0.1), b.constant(b.rng.integers(-9, 9)))
        kept = b.node(b.rng.choice(["Greater", "Less", "GreaterOrEqual", "LessOrEqual"]), v, limit)
        return b.node("Where", kept, v, b.constant(b.rng.choice([0.0, 1.0])))

    def equal(v: str) -> str:
        same = b.node("Equal", b.node("Mul", v, b.constant(3)), b.constant(0.45))
        return b.node("Where", same, b.constant(1), v)

    def ternary(v: str) -> str:
        size = b.node("Abs", v)
        limit = b.node("Mul", b.node("ReduceMean", size, rows), b.constant(0.7))
        return b.node("Where", b.node("Greater", size, limit), b.node("Sign", v), b.constant(0))

    def magic(v: str) -> str:
        large = b.constant(1.5 * 2.0 ** (np.finfo(b.dtype).nmant - int(b.rng.integers(0, 4))))
        return b.node("Sub", b.node("Add", v, large), large)

    return {
        **{op: _scaled(b, lambda v, op=op: b.node(op, v)) for op in ("Round", "Floor", "Ceil")},
        **{f"to {to}": _scaled(b, lambda v, to=to: b.cast(b.cast(v, to), b.type)) for to in (3, 6, 7)},
        **{f"through {to}": lambda v, to=to: b.cast(b.cast(v, to), b.type) for to in (10, 16, 17, 19, 1)},
        "threshold": threshold,
        "equal": equal,
        "ternary": ternary,
        "magic": magic,
        "centred": lambda v: b.node("Sub", v, b.node("ReduceMean", v, rows)),
        "tanh": lambda v: b.node("Tanh", v),
        "masked": lambda v: b.node("Mul", v, b.constant(b.rng.integers(0, 2, (4, 6)))),
        "scaled": lambda v: b.node("Div", v, b.constant(0.7)),
    }


def random_weight_norm(seed: int, dtype: type) -> tuple[ModelProto, list[str]]:
    """A model that hands out g * u / ||u|| plus x, and the steps that make u of v; x is one zero."""
    rng = np.random.default_rng(seed)
    b = _Builder(rng, dtype)
    steps = _steps(b)
    steps.pop(f"through {b.type}", None)
    v = b.constant(rng.integers(-40, 40, (4, 6)) / 20 if rng.integers(4) else rng.standard_normal((4, 6)))
    u, names = v, [str(name) for name in rng.choice(list(steps), rng.integers(1, 4))]
    for name in names:
        u = steps[name](u)
    g = b.constant(rng.uniform(0.5, 2, (4, 1)))
    if rng.integers(3) == 0:
        g = steps["Round"](g)
    norm = b.node("ReduceL2", u, b.constant([1], np.int64))
    w = b.node("Mul", u, b.node("Div", g, norm))
    b.nodes.append(helper.make_node("Add", [w, "x"], ["y"]))
    ends = [helper.make_tensor_value_info("x", b.type, [1]), helper.make_tensor_value_info("y", b.type, [4, 6])]
    tensors = [numpy_helper.from_array(a, name) for name, a in b.arrays.items()]
    graph = helper.make_graph(b.nodes, "g", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), names


def _run(model: ModelProto, *, optimized: bool = True) -> Array:
    """The weight that a graph adds to its input x, one zero."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    dtype = {"float": np.float32, "double": np.float64, "float16": np.float16}[session.get_inputs()[0].type[7:-1]]
    found: Array = session.run(None, {"x": np.zeros(1, dtype)})[0]
    return found


def _folded(model: ModelProto) -> tuple[ModelProto, OnnxFoldReport]:
    opened = ir.from_proto(model)
    report = fold_model(opened, zero_norm="nan")
    return ir.to_proto(opened), report


def _steps_off(before: Array, after: Array) -> float:
    """The largest difference in steps of the type at the row's largest element; rows without direction left out."""
    wide, other = before.astype(np.float64), after.astype(np.float64)
    assert np.array_equal(np.isnan(wide), np.isnan(other))
    kept = ~np.isnan(wide).any(1)
    off = np.abs(wide - other)[kept] / np.abs(wide[kept]).max(1, keepdims=True)
    return float(np.nan_to_num(off).max(initial=0)) / float(np.finfo(before.dtype).eps)


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_random_decisions_before_the_norm(dtype: type, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is folded is what onnxruntime makes of the graph, optimized or not, to the rounding of the norm."""
    if large:
        monkeypatch.setattr(onnx_values, "_LARGE", 4)
    folded: Counter[str] = Counter()
    for seed in range(100):
        model, names = random_weight_norm(seed, dtype)
        after, report = _folded(model)
        assert len(report.found) + len(report.left) == 1
        for optimized in (True, False) if report.found else ():
            assert _steps_off(_run(model, optimized=optimized), _run(after)) <= 4, (seed, names)
        folded.update(names * len(report.found))
    assert len(folded) >= 16  # kinds of steps
    assert folded.total() >= 80


V = np.float32([[0.35, 0.15, 0.3, -0.85], [0.95, 0.45, -0.3, 0.7]])
NORM = "n = ReduceL2(u, axes) d = Div(u, n) w = Mul(d, k) y = Add(w, x)"
# every one is decided by the last bit of a float32, or by fewer bits than that
DECIDED = {
    "rounded": "a = Div(v, tenth) b = Round(a) u = Mul(b, tenth) k = Identity(g)",
    "to bfloat16": "a = Cast <to = 16> (v) u = Cast <to = 1> (a) k = Identity(g)",
    "to float16": "a = Cast <to = 10> (v) u = Cast <to = 1> (a) k = Identity(g)",
    "to float8": "a = Cast <to = 17> (v) u = Cast <to = 1> (a) k = Identity(g)",
    "to integers": "a = Div(v, tenth) b = Cast <to = 6> (a) c = Cast <to = 1> (b) u = Mul(c, tenth) k = Identity(g)",
    "above a limit": "a = Mul(tenth, three) b = Greater(v, a) u = Where(b, v, zero) k = Identity(g)",
    "floor": "a = Div(v, twentieth) b = Floor(a) u = Mul(b, twentieth) k = Identity(g)",
    "rounded by a large number": "a = Add(v, large) u = Sub(a, large) k = Identity(g)",
    "a magnitude to bfloat16": "u = Identity(v) a = Cast <to = 16> (g) k = Cast <to = 1> (a)",
    "a magnitude rounded": "u = Identity(v) a = Div(g, tenth) b = Round(a) k = Mul(b, tenth)",
}
# made by sums and products of matrices
MADE = {
    "centred": "m = ReduceMean(v, axes) u = Sub(v, m) k = Identity(g)",
    "ternary": """a = Abs(v) m = ReduceMean(a, axes) t = Mul(m, tenth) b = Greater(a, t) s = Sign(v)
        u = Where(b, s, zero) k = Identity(g)""",
    "a product of matrices": 'u = Einsum <equation = "ij,jk->ik"> (v, square) k = Identity(g)',
    "normalised before": """m = ReduceL2(v, axes) e = Div(v, m) r = Cast <to = 16> (e) u = Cast <to = 1> (r)
        k = Identity(g)""",
    "a row without direction, and many constants": """a = Mul(tenth, three) e = Add(a, twentieth) b = Greater(v, e)
        u = Where(b, v, zero) k = Identity(g)""",
    "one magnitude for all rows": "u = Identity(v) k = Identity(three)",
    "one magnitude for all rows, one element": "u = Identity(v) k = Identity(seven)",
}


def _model(body: str, **more: Array) -> ModelProto:
    text = f"""<ir_version: 10, opset_import: ["" : 20]> g (float[1] x) => (float[2, 4] y) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    arrays = {"v": V, "g": np.float32([[1.123456], [2.35]]), "axes": np.int64([1]), "zero": np.float32(0)}
    arrays |= {"tenth": np.float32(0.1), "twentieth": np.float32(0.05), "three": np.float32(3)}
    arrays |= {"large": np.float32(2**22), "square": np.float32(np.arange(16).reshape(4, 4) % 5)}
    arrays |= {"seven": np.float32([7])} | more
    used = {name: a for name, a in arrays.items() if f"({name}" in body or f" {name})" in body or f" {name}," in body}
    model.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in used.items())
    onnx.checker.check_model(model)
    return model


@pytest.mark.parametrize("case", [*DECIDED, *MADE])
def test_a_direction_is_what_the_graph_s_own_types_make_of_it(case: str) -> None:
    """Each of these folds, to the weight that onnxruntime has without folding."""
    model = _model((DECIDED | MADE)[case] + " " + NORM)
    after, report = _folded(model)
    assert (len(report.found), report.left) == (1, ())
    assert _steps_off(_run(model), _run(after)) <= 2


UNDECIDED = {
    "a product with an inverse, or a division": ("r = Div(one, tenth) a = Mul(v, r) b = Round(a) u = Mul(b, tenth)", V),
    "an exponential": ("a = Exp(v) u = Round(a)", np.log(np.float32([[1.5, 2, 2.5, 3], [3.5, 1, 1, 1]]))),
    "a sigmoid": (
        "p = Sigmoid(v) a = Mul(p, many) u = Round(a)",
        np.float32([[-10.7, -9.1, -11.3, -8.2], [-10.1, -9.9, -8.8, -7.5]]),
    ),
    "a sum": ("m = ReduceMean(v, axes) q = Sub(v, m) u = Sign(q)", np.float32([[0.1, 0.2, 0.3, 0.2], [1, 2, 3, 7]])),
    "a sum, to fewer bits": (
        "m = ReduceMean(v, axes) a = Add(m, one) b = Cast <to = 16> (a) c = Cast <to = 1> (b) u = Add(v, c)",
        np.float32([[0.1, 0.2, 0.3, 2.0**-6 - 0.6], [1, 2, 3, 7]]),
    ),
    "too large for integers": ("a = Cast <to = 3> (v) u = Cast <to = 1> (a)", 200 * V),
}


@pytest.mark.parametrize("case", UNDECIDED)
def test_what_runtimes_decide_differently_is_left(case: str) -> None:
    """A number at the edge of two decisions, as near as runtimes agree on it, is left for them to decide."""
    made, v = UNDECIDED[case]
    model = _model(f"{made} k = Identity(g) {NORM}", v=v, one=np.float32(1), many=np.float32(1e6))
    after, report = _folded(model)
    assert report.found == ()
    reason = "is no int8" if "integers" in case else "differ from one runtime to the next"
    assert reason in report.left[0][1]
    assert np.array_equal(_run(model), _run(after))


class _Narrowed(nn.Module):
    """A weight normalised in float32 after its direction went through a narrower type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.v = nn.Parameter(torch.randn(96, 100, generator=generator))
        self.g = nn.Parameter(torch.rand(96, 1, generator=generator))
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.g * normalize(self.v.to(self.dtype).float(), dim=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_exports_of_narrowed_directions(tmp_path: Path, dtype: torch.dtype, dynamo: bool) -> None:
    """What torch exports of v.bfloat16().float() folds to the model's own weight."""
    model, x = _Narrowed(dtype).eval(), torch.eye(100)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), tmp_path / "a.onnx", dynamo=dynamo, external_data=False, verbose=False)
    assert len(fold_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx").found) == 1
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(tmp_path / "b.onnx", options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-6)
