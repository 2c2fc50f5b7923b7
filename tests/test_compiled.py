"""Weights computed under torch.compile: eager mode's bits, gradients of the formula, few operations."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wnsurgery as wn
from wnsurgery.reparam import Axes, compose, decompose

from nets import same_bits

LARGEST = torch.finfo(torch.float32).max
LAYOUTS = {
    "rows": (Axes((0,)), (24, 3, 5)),
    "columns": (Axes((1,)), (7, 24, 2)),
    "groups": (Axes((1,), 3), (6, 8, 3)),
    "last": (Axes((2,)), (5, 2, 24)),
    "whole": (Axes(()), (4, 6)),
    "elements": (Axes((0,)), (24,)),
}
inductor = pytest.param(
    "inductor",
    marks=[
        pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
        pytest.mark.filterwarnings("ignore"),  # its own start-up
    ],
)


def compiled(axes: Axes, magnitude: Any, backend: str = "aot_eager") -> Callable[[Tensor, Tensor], Tensor]:
    torch.compiler.reset()
    function: Any = torch.compile(
        lambda g, v: compose(g, v, axes, magnitude=magnitude), backend=backend, fullgraph=True, dynamic=False
    )
    return function  # type: ignore[no-any-return]


def ulps(g: Tensor, steps: int) -> Tensor:
    """g moved by so many units in the last place."""
    towards = torch.full_like(g, LARGEST if steps > 0 else -LARGEST)
    for _ in range(abs(steps)):
        g = torch.nextafter(g, towards)
    return g


@pytest.mark.parametrize("backend", ["aot_eager", inductor])
@pytest.mark.parametrize("magnitude", ["linear", "log"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_of_eager_mode(layout: str, magnitude: Any, backend: str) -> None:
    """As stored, moved by few units in the last place, multiplied by powers of two and by anything: one compilation."""
    axes, shape = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(1)
    function = compiled(axes, magnitude, backend)
    for scale in (1.0, 3e-5, 1e4):
        v = torch.randn(shape, generator=generator) * scale
        stored, _ = decompose(v, axes, magnitude=magnitude)
        cases = [ulps(stored, steps) for steps in (0, 1, -1, 2, -2)]
        cases.append(stored + torch.randn(stored.shape, generator=generator))
        cases += [stored * 4, -stored, stored / 1024] if magnitude == "linear" else [stored + 1]
        for g in cases:
            found = function(g, v)
            assert same_bits(found, compose(g, v, axes, magnitude=magnitude))
            assert found.stride() == v.stride()
        assert same_bits(function(stored, v), v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("magnitude_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("magnitude", ["linear", "log"])
def test_bits_of_every_type(dtype: torch.dtype, magnitude_dtype: torch.dtype, magnitude: Any) -> None:
    if dtype == torch.float64 != magnitude_dtype:
        pytest.skip("a magnitude in float32 cannot stand for the norm of a float64 weight")
    axes = Axes((0,))
    function = compiled(axes, magnitude)
    v = torch.randn(40, 9, generator=torch.Generator().manual_seed(2)).to(dtype)
    g, _ = decompose(v, axes, magnitude=magnitude, magnitude_dtype=magnitude_dtype)
    assert same_bits(function(g, v), v)
    for moved in (g * 1.7, g + 0.1):
        assert same_bits(function(moved, v), compose(moved, v, axes, magnitude=magnitude))


@pytest.mark.parametrize("backend", ["aot_eager", inductor])
def test_extreme_rows(backend: str) -> None:
    """Zeros, subnormals, norms beyond float32, the largest g: as they were stored every row comes back, and no gradient
    is NaN."""
    axes = Axes((0,))
    function = compiled(axes, "linear", backend)
    rows = torch.randn(10, 16, generator=torch.Generator().manual_seed(3))
    size = torch.tensor([1, 1e-30, 1e-42, 1e-45, 1e30, 1e37, 1, 1, 1e-20, 1e20])
    v = (rows * size[:, None]).clamp(-LARGEST, LARGEST)
    v[5] = LARGEST * rows[5].sign()
    v[6] = torch.eye(16)[0] * 2.0**-149
    v[7] = 0
    stored, _ = decompose(v[:7], axes)
    stored = torch.cat([stored, torch.ones(3, 1)])
    stored[8:], _ = decompose(v[8:], axes)
    w = function(stored, v)
    assert same_bits(torch.cat([w[:7], w[8:]]), torch.cat([v[:7], v[8:]])) and not w[7].any()
    for value in (torch.full_like(stored, LARGEST), torch.full_like(stored, 2.0**-140), torch.zeros(10, 1), -stored):
        g, leaf = value.clone().requires_grad_(), v.clone().requires_grad_()
        w = function(g, leaf)
        assert torch.isfinite(w).all()
        close = compose(g, leaf, axes)
        assert ((w == close) | (torch.nextafter(w, close) == close)).all()  # far factors may differ in the last bit
        w.sum().backward()
        assert g.grad is not None and leaf.grad is not None
        assert not g.grad.isnan().any() and not leaf.grad.isnan().any()
        assert not g.grad[7].any() and not leaf.grad[7].any()


@pytest.mark.parametrize("magnitude", ["linear", "log"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_formula(layout: str, magnitude: Any) -> None:
    axes, shape = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(4)
    v = torch.randn(shape, generator=generator).requires_grad_()
    g = torch.rand(axes.magnitude_shape(shape), generator=generator).add(0.5).requires_grad_()
    upstream = torch.randn(shape, generator=generator)
    found = torch.autograd.grad((compiled(axes, magnitude)(g, v) * upstream).sum(), [g, v])
    wide_g, wide_v = g.detach().double().requires_grad_(), v.detach().double().requires_grad_()
    exact = torch.autograd.grad(
        (compose(wide_g, wide_v, axes, magnitude=magnitude) * upstream.double()).sum(), [wide_g, wide_v]
    )
    for got, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


def test_second_derivatives() -> None:
    """By a backend that differentiates its own graph again."""
    v = torch.randn(3, 4, generator=torch.Generator().manual_seed(5)).requires_grad_()
    g = torch.tensor([[1.0], [0.5], [2.0]]).requires_grad_()

    def curvature(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(g, v).pow(3).sum(), [g, v], create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in first), [g, v])  # type: ignore[arg-type]

    found = curvature(compiled(Axes((0,)), "linear", "eager"))
    for got, wanted in zip(found, curvature(lambda g, v: compose(g, v, Axes((0,)))), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_few_operations() -> None:
    """What a compiler takes grows with the operations of each weight, forward and backward."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    counts: list[int] = []

    def count(graph: Any, _: Any) -> Any:
        counts.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    model = wn.apply_weight_norm(nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(2))))
    plain = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(2)))
    totals = []
    for one in (model, plain):
        counts.clear()
        torch.compiler.reset()
        run: Any = torch.compile(one, backend=aot_autograd(fw_compiler=count, bw_compiler=count), fullgraph=True)
        run(torch.ones(3, 6)).sum().backward()
        assert len(counts) == 2
        totals.append(sum(counts))
    assert (totals[0] - totals[1]) / 2 < 80


@pytest.mark.parametrize("backend", ["aot_eager", inductor])
def test_training_steps(backend: str) -> None:
    """Three steps of a compiled net in one graph: eager mode's weights, to rounding of the gradients."""
    torch.manual_seed(6)
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 4, 3, groups=2), nn.Flatten())
    model.append(nn.Linear(4 * 12, 5))
    wn.apply_weight_norm(model)
    before = [p.detach().clone() for p in model.parameters()]
    x, results = torch.randn(2, 3, 12), []
    for way in ("eager", "compiled"):
        with torch.no_grad():
            for p, start in zip(model.parameters(), before, strict=True):
                p.copy_(start)
        torch.compiler.reset()
        run: Any = torch.compile(model, backend=backend, fullgraph=True) if way == "compiled" else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(run(x), torch.ones(2, 5)).backward()
            optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-6)
