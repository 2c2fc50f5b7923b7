"""Factors at the edges of the number formats, for odd memory layouts, empty weights and every axis."""

from __future__ import annotations

import itertools
import math
import random
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from wnsurgery import Axes, compose, decompose

from nets import same_bits

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
RANGE = {torch.float64: 320, torch.float32: 45, torch.bfloat16: 45, torch.float16: 7}  # decades, past both ends
LAYOUTS: list[tuple[Axes, tuple[int, ...]]] = [
    (Axes((0,)), (3, 4, 2)),
    (Axes((1,)), (3, 4, 2)),
    (Axes((2,)), (3, 4, 2)),
    (Axes((0, 2)), (3, 4, 2)),
    (Axes((0, 1, 2)), (3, 4, 2)),
    (Axes(()), (3, 4, 2)),
    (Axes((1,), groups=2), (4, 3, 2)),
    (Axes((1,), groups=2), (4, 3, 2, 2)),
    (Axes((1,), groups=4), (4, 1, 3)),
    (Axes((0,)), (1, 5)),
    (Axes((0,)), (5, 1)),
]


def hard_weight(pick: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers of any magnitude the type holds, the largest and signed zeros among them."""
    generator = torch.Generator().manual_seed(pick.randrange(1 << 30))
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    size: tuple[int, ...] = shape if pick.random() < 0.5 else (1,) * len(shape)
    decades = torch.rand(size, generator=generator, dtype=torch.float64) * 2 - 1
    w = w * 10 ** (decades * RANGE[dtype] * pick.choice([0, 1, 1]))
    w[torch.rand(shape, generator=generator) < pick.choice([0.0, 0.3, 0.9])] = pick.choice([0.0, -0.0])
    largest = torch.finfo(dtype).max
    return w.clamp(-largest, largest).to(dtype)


@pytest.mark.parametrize("magnitude", ["linear", "log"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_axes_any_magnitudes_any_strides(dtype: torch.dtype, magnitude: Any) -> None:
    """Rows of mixed magnitudes survive bit for bit with their strides, eager and under vmap, for every kept axis."""
    pick = random.Random(1)
    for axes, shape in LAYOUTS * 12:
        w = hard_weight(pick, shape, dtype)
        order = list(range(w.ndim))
        pick.shuffle(order)
        inverse = [order.index(d) for d in range(w.ndim)]
        w = w.permute(order).contiguous().permute(inverse)
        g, v = decompose(w, axes, magnitude=magnitude)
        assert torch.isfinite(g).all()
        assert torch.isfinite(v).all()
        assert v.stride() == w.stride()
        for moved in (compose(g, v, axes, magnitude=magnitude), compose(g * 1.5, v, axes, magnitude=magnitude)):
            assert moved.stride() == w.stride()
        assert same_bits(compose(g, v, axes, magnitude=magnitude), w)
        traced = torch.vmap(lambda a, b, axes=axes: compose(a, b, axes, magnitude=magnitude))(g[None], v[None])[0]
        assert same_bits(traced, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_beyond_the_largest_number(dtype: torch.dtype) -> None:
    """Rows whose norm no float of the type holds keep every bit; g is finite and the ordinary row beside them exact."""
    largest = torch.finfo(dtype).max
    w = torch.tensor([[largest, -largest, largest / 2], [largest, 0.0, -0.0], [3.0, 0.0, 4.0]], dtype=dtype)
    for magnitude in ("linear", "log"):
        g, v = decompose(w, Axes((0,)), magnitude=magnitude)
        assert torch.isfinite(g).all()
        assert same_bits(compose(g, v, Axes((0,)), magnitude=magnitude), w)


def ulps(w: Tensor, g: Tensor, v: Tensor) -> float:
    """Largest distance of w from g * v / ||v||, taken row by row with 80 digits, in units in the last place."""
    digits, lowest = {torch.float64: (53, -1022), torch.float32: (24, -126)}[w.dtype]
    worst = Decimal(0)
    with localcontext() as context:
        context.prec = 80
        for got_row, size, row in zip(w.tolist(), g.flatten().tolist(), v.tolist(), strict=True):
            norm = sum((Decimal(x) ** 2 for x in row), Decimal(0)).sqrt()
            for got, x in zip(got_row, row, strict=True):
                want = Decimal(size) * Decimal(x) / norm
                exponent = max(math.frexp(float(want))[1] - 1, lowest) if want else lowest
                worst = max(worst, abs(Decimal(got) - want) / Decimal(2) ** (exponent - digits + 1))
    return float(worst)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_next_to_the_stored_norm(dtype: torch.dtype) -> None:
    """A g one step away from the norm, as after a small optimizer step, still gives the exact value to 1.5 ulp."""
    generator = torch.Generator().manual_seed(5)
    v = torch.randn(40, 7, generator=generator, dtype=torch.float64).to(dtype)
    g, _ = decompose(v, Axes((0,)))
    for target in (math.inf, 0.0):
        near = g
        for _ in range(3):
            near = torch.nextafter(near, torch.full_like(near, target))
            assert ulps(compose(near, v), near, v) <= 1.5
    mixed = torch.where(torch.arange(40)[:, None] % 2 == 0, g, g * 1.25)  # some rows untouched, some moved
    w = compose(mixed, v)
    assert same_bits(w[::2], v[::2])
    assert ulps(w, mixed, v) <= 1.5


def test_the_largest_magnitude_stays_finite() -> None:
    """g at the end of float32's range gives the largest weight and not infinity."""
    for size in (torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max):
        g, v = torch.tensor([[size]]), torch.tensor([[229494752.0, -0.5665735602378845]])
        w = compose(g, v)
        assert torch.isfinite(w).all()
        assert ulps(w, g, v) <= 1.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_finite_for_every_finite_row(dtype: torch.dtype) -> None:
    """Rows of any magnitude give finite gradients, in the fast path and in the one for second order."""
    pick = random.Random(2)
    for axes, shape in LAYOUTS * 6:
        g, v = decompose(hard_weight(pick, shape, dtype), axes)
        g.requires_grad_()
        v = v.clone().requires_grad_()
        upstream = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        for second in (False, True):
            for gradient in torch.autograd.grad(compose(g, v, axes), (g, v), upstream, create_graph=second):
                assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_have_no_radial_part(dtype: torch.dtype) -> None:
    """dL/dv is perpendicular to v whatever ||v|| and g: for rows of one element it is zero, to rounding."""
    for size, magnitude in itertools.product(range(-30, 31, 3), range(-24, 25, 3)):
        v = torch.tensor([[1.7 * 10.0**size], [-2.9 * 10.0**size]], dtype=dtype, requires_grad=True)
        g = torch.full((2, 1), 1.3 * 10.0**magnitude, requires_grad=True)
        ratio = g.detach().double() / v.detach().double().abs()
        if ratio.max() > 1e30 or ratio.min() < 1e-30:
            continue
        upstream = torch.tensor([[0.7], [0.9]]).to(dtype)
        dg, dv = torch.autograd.grad(compose(g, v), (g, v), upstream)
        assert torch.allclose(dg, upstream.float() * v.sign(), rtol=1e-6)
        assert (dv.double().abs() <= 1e-6 * ratio).all(), (size, magnitude)


def test_a_ratio_beyond_float32_does_not_turn_the_gradient_into_nan() -> None:
    """Where g / ||v|| overflows float32 and the tangential part is zero, dL/dv is zero."""
    for dtype in (torch.float32, torch.bfloat16):
        g = torch.tensor([[83944824832.0]], requires_grad=True)
        v = torch.tensor([[-2.398137151871876e-28]], dtype=dtype, requires_grad=True)
        for second in (False, True):
            dg, dv = torch.autograd.grad(compose(g, v).sum(), (g, v), create_graph=second)
            assert dg.item() == -1
            assert dv.item() == 0


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_without_elements(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Empty weights decompose, compose and differentiate twice, without a special case for the caller."""
    for axes in (Axes((0,)), Axes((1,)), Axes(())):
        g, v = decompose(torch.empty(shape, dtype=dtype), axes)
        assert g.shape == axes.magnitude_shape(shape)
        g, v = g.clone().requires_grad_(), v.clone().requires_grad_()
        w = compose(g, v, axes)
        assert w.shape == shape
        first = torch.autograd.grad(w.sum(), (g, v), create_graph=True)
        assert [t.shape for t in first] == [g.shape, v.shape]
        assert all(torch.isfinite(t).all() for t in first)


def test_the_ambient_device_decides_nothing() -> None:
    """Inside `with torch.device(...)` a weight is worked on where it lies, large ones included."""
    for axes in (Axes((0,)), Axes((1,))):
        w = torch.randn(600, 1000, generator=torch.Generator().manual_seed(0))
        expected = decompose(w, axes)[0]
        with torch.device("meta"):
            g, v = decompose(w, axes)
            back = compose(g, v, axes)
        assert same_bits(g, expected)
        assert same_bits(back, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_not_finite_are_not_hidden(dtype: torch.dtype) -> None:
    """NaN in v makes its row NaN, infinity in g its row not finite; other rows are untouched by either."""
    v = torch.tensor([[3.0, 4.0], [math.nan, 1.0], [0.6, 0.8], [6.0, 8.0]], dtype=dtype)
    w = compose(torch.tensor([[5.0], [1.0], [math.inf], [1.0]], dtype=torch.promote_types(dtype, torch.float32)), v)
    assert w[0].tolist() == [3, 4]
    assert w[1].isnan().all()
    assert not w[2].isfinite().any()
    assert w[3].isfinite().all()


@pytest.mark.parametrize("magnitude", ["linear", "log"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_that_never_moved_among_rows_that_did(dtype: torch.dtype, magnitude: Any) -> None:
    """Dead rows keep their bits beside trained ones, and every path through the arithmetic gives the same weight."""
    w = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    g, v = decompose(w, Axes((0,)), magnitude=magnitude)
    g, v = g.clone(), v.clone()
    moved = torch.arange(24) % 3 == 0
    g[moved] += 0.125
    v[torch.arange(24) % 5 == 0] *= 4  # rescaled by a power of two: still the same weight
    together = compose(g, v, magnitude=magnitude)
    assert same_bits(together[~moved], w[~moved])
    alone = torch.cat([compose(g[i : i + 1], v[i : i + 1], magnitude=magnitude) for i in range(24)])
    assert same_bits(together, alone)
    traced = torch.func.vmap(lambda a, b: compose(a, b, Axes(()), magnitude=magnitude))(g[:, 0], v)
    assert same_bits(together, traced)
