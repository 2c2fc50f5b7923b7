"""Random weight norms whose direction is rounded, compared or cast on the way, in ONNX."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import ModelProto, helper, numpy_helper

__all__ = ["random_weight_norm"]

Nodes = list[object]
_TYPES = {np.float32: 1, np.float16: 10, np.float64: 11}


class _Builder:
    """A graph under construction: nodes, constants and fresh names."""

    def __init__(self, rng: np.random.Generator, dtype: type) -> None:
        self.rng, self.dtype, self.type = rng, dtype, _TYPES[dtype]
        self.nodes: Nodes = []
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
    if dtype is np.float16:
        del steps["through 1"]
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
