"""compose and decompose: exact there and back, accurate, with the paper's gradients, at any magnitude."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from wnsurgery import Axes, NonFiniteWeightError, PairError, SelectionError, compose, decompose

from nets import same_bits

LAYOUTS: dict[str, tuple[Axes, tuple[int, ...]]] = {
    "first": (Axes((0,)), (3, 4, 2)),
    "middle": (Axes((1,)), (3, 4, 2)),
    "last": (Axes((2,)), (3, 4, 2)),
    "first-and-last": (Axes((0, 2)), (3, 4, 2)),
    "all": (Axes((0, 1)), (3, 4)),
    "none": (Axes(()), (3, 4)),
    "grouped": (Axes((1,), groups=2), (4, 3, 2)),
    "depthwise": (Axes((1,), groups=4), (4, 1, 3)),
}
FORMATS = {torch.float64: (53, -1022), torch.float32: (24, -126), torch.float16: (11, -14), torch.bfloat16: (8, -126)}


def exact(g: Tensor, v: Tensor) -> list[list[Any]]:
    """g * v / ||v|| per row with 60 digits."""
    with mpmath.workdps(60):
        rows = []
        for size, row in zip(g.double().flatten().tolist(), v.double().tolist(), strict=True):
            numbers = [mpmath.mpf(x) for x in row]
            norm = mpmath.sqrt(mpmath.fsum(x * x for x in numbers))
            rows.append([mpmath.mpf(size) * x / norm for x in numbers])
        return rows


def worst_ulp(w: Tensor, expected: list[list[Any]]) -> float:
    """The largest distance to the exact values, in units in the last place of w's type."""
    digits, lowest = FORMATS[w.dtype]
    worst = mpmath.mpf(0)
    for got_row, want_row in zip(w.double().tolist(), expected, strict=True):
        for got, want in zip(got_row, want_row, strict=True):
            exponent = lowest if want == 0 else max(int(mpmath.floor(mpmath.log(abs(want), 2))), lowest)
            worst = max(worst, abs(mpmath.mpf(got) - want) / mpmath.mpf(2) ** (exponent - digits + 1))
    return float(worst)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_accuracy(dtype: torch.dtype, threads: int) -> None:
    """At most 1.5 ulp in fp32 and fp64 and 0.51 in 16 bit against exact arithmetic, extreme rows included."""
    generator = torch.Generator().manual_seed(1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for width in (1, 2, 9, 200):
            spread = {torch.float64: 290, torch.float16: 1}.get(dtype, 30)
            scale = 10.0 ** torch.linspace(-spread, spread, 24, dtype=torch.float64)[:, None]
            v = (torch.randn(24, width, generator=generator, dtype=torch.float64) * scale).to(dtype)
            g, _ = decompose(v, Axes((0,)))
            g = g * (0.1 + torch.rand(24, 1, generator=generator, dtype=torch.float64).to(g.dtype))
            limit = 1.5 if dtype in (torch.float64, torch.float32) else 0.51
            assert worst_ulp(compose(g, v), exact(g, v)) <= limit
            moved = torch.ones_like(g) * 3  # magnitudes far from the norms
            assert worst_ulp(compose(moved, v), exact(moved, v)) <= limit
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("magnitude", ["linear", "log"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_there_and_back(dtype: torch.dtype, layout: str, magnitude: Any) -> None:
    """compose(decompose(w)) is w in every bit, for any axes, in one type up for g, finite throughout."""
    axes, shape = LAYOUTS[layout]
    torch.manual_seed(0)
    w = torch.randn(shape, dtype=torch.float64).to(dtype)
    w[0, 0] = 0
    g, v = decompose(w, axes, magnitude=magnitude)
    assert g.shape == axes.magnitude_shape(shape)
    assert g.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(g).all()
    assert torch.isfinite(v).all()
    assert same_bits(compose(g, v, axes, magnitude=magnitude), w)
    if magnitude == "linear":
        assert same_bits(compose(g, v), w)  # the axes read from the shape of g


floats64 = st.floats(allow_nan=False, allow_infinity=False, width=64)
floats32 = st.floats(allow_nan=False, allow_infinity=False, width=32)
floats16 = st.floats(allow_nan=False, allow_infinity=False, width=16)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from([torch.float64, torch.float32, torch.float16]), st.sampled_from(["linear", "log"]))
def test_any_finite_weight(data: st.DataObject, dtype: torch.dtype, magnitude: Any) -> None:
    """Any finite numbers, subnormals and the largest included, survive bit for bit with a finite g."""
    element = {torch.float64: floats64, torch.float32: floats32, torch.float16: floats16}[dtype]
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    numbers = data.draw(st.lists(element, min_size=rows * columns, max_size=rows * columns))
    w = torch.tensor(numbers, dtype=dtype).reshape(rows, columns)
    g, v = decompose(w, Axes((0,)), magnitude=magnitude)
    assert torch.isfinite(g).all()
    assert same_bits(compose(g, v, Axes((0,)), magnitude=magnitude), w)
    traced = torch.vmap(lambda a, b: compose(a, b, Axes((0,)), magnitude=magnitude))(g[None], v[None])[0]
    assert same_bits(traced, w)


@settings(max_examples=100, deadline=None)
@given(st.lists(floats64, min_size=4, max_size=4), st.floats(-1.7e308, 1.7e308))  # the largest stands for beyond
def test_float64_products_stay_right_at_any_range(numbers: list[float], size: float) -> None:
    """Any finite g and v in float64 give the exact value to 1.5 ulp, also where g/||v|| leaves the type's range."""
    v, g = torch.tensor([numbers], dtype=torch.float64), torch.tensor([[size]], dtype=torch.float64)
    w = compose(g, v)
    if not v.any():
        assert not w.any()
        return
    assert worst_ulp(w, exact(g, v)) <= 1.5


@settings(max_examples=100, deadline=None)
@given(st.lists(floats32, min_size=4, max_size=4), st.floats(2.0**-6, 1.0))
@example([2.0**-149, 0.0, 0.0, 0.0], 1.0)
@example([3e-43, -2e-43, 1e-44, 0.0], 1.0)
def test_the_largest_magnitudes_stay_right(numbers: list[float], share: float) -> None:
    """Up to the largest float32, which stands for norms beyond it where v has one, g gives the exact value."""
    v, g = torch.tensor([numbers]), torch.tensor([[share * torch.finfo(torch.float32).max]])
    if v.any() and v.double().norm() < 2.0**127:
        assert worst_ulp(compose(g, v), exact(g, v)) <= 1.5


def test_threads_and_order_do_not_decide_a_bit() -> None:
    """A weight converted with two threads composes to itself with one, for long rows summed in parts."""
    torch.manual_seed(0)
    w, before = torch.randn(3, 300_000), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        g, v = decompose(w, Axes((0,)))
        torch.set_num_threads(1)
        assert same_bits(compose(g, v), w)
        g, v = decompose(w, Axes((1,)))
        torch.set_num_threads(2)
        assert same_bits(compose(g, v), w)
    finally:
        torch.set_num_threads(before)


def test_zero_rows_can_learn() -> None:
    """A row of zeros gets g = 0 and a direction that is not zero: dL/dg is not zero, so the first step moves it."""
    w = torch.tensor([[0.0, -0.0, 0.0], [1.0, 2.0, 2.0]])
    g, v = decompose(w, Axes((0,)))
    assert g.flatten().tolist() == [0.0, 3.0]
    assert torch.allclose(v[0].norm(), torch.tensor(1.0))
    g.requires_grad_()
    compose(g, v)[0].sum().backward()
    assert g.grad is not None
    assert g.grad[0].abs() > 0.1


def test_zero_directions_give_zeros_and_no_nan() -> None:
    """v = 0 composes to 0 with zero gradients instead of torch's NaN, in first and second order."""
    v = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    g = torch.tensor([[0.0], [2.0]], dtype=torch.float64, requires_grad=True)
    w = compose(g, v)
    assert not w.any()
    first = torch.autograd.grad(w.sum(), (g, v), create_graph=True)
    second = torch.autograd.grad(sum(t.sum() for t in first), (g, v), allow_unused=True)
    assert all(torch.isfinite(t).all() for t in (*first, *second) if t is not None)


# Gradients -----------------------------------------------------------------------------------------------


def pair(layout: str) -> tuple[Axes, Tensor, Tensor]:
    axes, shape = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    g = torch.rand(axes.magnitude_shape(shape), generator=generator, dtype=torch.float64) + 0.5
    return axes, g.requires_grad_(), v


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward mode uses it
@pytest.mark.parametrize("magnitude", ["linear", "log"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_to_second_order(layout: str, magnitude: Any) -> None:
    """gradcheck (forward mode too) and gradgradcheck pass for every kind of axes, eager and under vmap."""
    axes, g, v = pair(layout)

    def f(g: Tensor, v: Tensor) -> Tensor:
        return compose(g, v, axes, magnitude=magnitude)

    assert torch.autograd.gradcheck(f, (g, v), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, (g, v))
    assert torch.autograd.gradcheck(lambda g, v: torch.vmap(f)(g[None], v[None]), (g, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-23, 1e20, 1e30])
@pytest.mark.parametrize("moved", [False, True])
def test_gradients_are_the_papers_at_any_scale(dtype: torch.dtype, scale: float, moved: bool) -> None:
    """dL/dg and dL/dv equal equation 3 in numpy float64, for tiny and huge rows."""
    generator = np.random.default_rng(0)
    v = torch.tensor(generator.standard_normal((3, 6)) * scale).to(dtype)
    g, v = decompose(v, Axes((0,)))
    g = g * 1.7 if moved else g
    g.requires_grad_()
    v.requires_grad_()
    upstream = torch.tensor(generator.standard_normal((3, 6))).to(dtype)
    compose(g, v).backward(upstream)
    dw, vv, gg = upstream.double().numpy(), v.detach().double().numpy(), g.detach().double().numpy()
    norm = np.sqrt((vv**2).sum(1, keepdims=True))
    dg = (dw * vv).sum(1, keepdims=True) / norm
    dv = gg / norm * dw - gg * dg / norm**2 * vv
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    np.testing.assert_allclose(g.grad.double().numpy(), dg, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(v.grad.double().numpy(), dv, rtol=rtol, atol=rtol * np.abs(dv).max())


def test_fast_and_careful_gradients_agree() -> None:
    """The fused first-order path and the differentiable one give the same gradients to rounding."""
    for axes, shape in ((Axes((0,)), (5, 7, 3)), (Axes((1,)), (5, 7, 3)), (Axes((1,), 2), (4, 7, 3))):
        torch.manual_seed(0)
        v = torch.randn(shape, requires_grad=True)
        g = (torch.rand(axes.magnitude_shape(shape)) + 0.5).requires_grad_()
        upstream = torch.randn(shape)
        fast = torch.autograd.grad(compose(g, v, axes), (g, v), upstream)
        careful = torch.autograd.grad(compose(g, v, axes), (g, v), upstream, create_graph=True)
        for a, b in zip(fast, careful, strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_directions_only_grow() -> None:
    """Under plain gradient descent ||v|| grows by sqrt(1 + c^2), c = ||dv||/||v|| (the paper's section 2.1)."""
    torch.manual_seed(0)
    v = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    g = torch.rand(4, 1, dtype=torch.float64) + 0.5
    (compose(g, v) * torch.randn(4, 9, dtype=torch.float64)).sum().backward()
    step = 0.3 * v.grad
    before, c = v.detach().norm(dim=1), step.norm(dim=1) / v.detach().norm(dim=1)
    assert torch.allclose((v.detach() - step).norm(dim=1), before * (1 + c**2).sqrt(), rtol=1e-12)


# Axes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("g", "v", "axes"),
    [
        ((8, 1, 1), (8, 3, 5), Axes((0,))),
        ((1, 1, 128), (768, 48, 128), Axes((2,))),
        ((16, 1), (16, 4), Axes((0,))),
        ((), (3, 4), Axes(())),
        ((1, 1), (1, 5), Axes(())),
        ((2, 3, 1), (4, 3, 2), Axes((1,), groups=2)),
        ((4, 6), (4, 6), Axes((0, 1))),
        ((5,), (5,), Axes((0,))),
    ],
)
def test_the_shape_of_g_tells_its_axes(g: tuple[int, ...], v: tuple[int, ...], axes: Axes) -> None:
    """Kept where g has the size of v, reduced where it has size 1; grouped transposed convolutions too."""
    assert Axes.of_pair(g, v) == axes


@pytest.mark.parametrize(
    ("g", "v"),
    [((3, 1), (4, 5)), ((4,), (4, 5)), ((4, 5), (4, 1)), ((4, 2), (4, 6)), ((3, 3, 1), (4, 3, 2))],
)
def test_shapes_that_do_not_fit(g: tuple[int, ...], v: tuple[int, ...]) -> None:
    """A short, swapped or misshapen g is an error before any kernel sees it."""
    with pytest.raises(PairError):
        Axes.of_pair(g, v)
    with pytest.raises(PairError):
        compose(torch.ones(g), torch.ones(v))
    with pytest.raises(PairError):
        compose(torch.ones(g), torch.ones(v), Axes((0,)))


@pytest.mark.parametrize(
    ("told", "axes"),
    [(0, (0,)), (-1, (2,)), ((0, 2), (0, 2)), ([1, 0], (0, 1)), ([], ()), (None, ()), (Axes((-1,)), (2,))],
)
def test_axes_are_told_as_dim_is(told: Any, axes: tuple[int, ...]) -> None:
    """An int, a tuple or list of ints and None mean what they do for `dim`: the axes kept."""
    w = torch.randn(3, 4, 2)
    g, v = decompose(w, told)
    assert g.shape == Axes(axes).magnitude_shape(w.shape)
    if not isinstance(told, Axes):
        assert same_bits(compose(g, v, told), w)


@pytest.mark.parametrize("told", ["auto", True, 1.0, (0, "1"), {0: 1}])
def test_axes_that_are_none(told: Any) -> None:
    """What names no axes is an error that shows what does; an axis the weight has not is one about the pair."""
    w = torch.randn(3, 4)
    for call in (lambda: decompose(w, told), lambda: compose(torch.ones(3, 1), w, told)):
        with pytest.raises(SelectionError, match=r"Axes\(\(0,\)\)"):
            call()
    for call in (lambda: decompose(w, 2), lambda: compose(torch.ones(3, 1), w, (0, 2))):
        with pytest.raises(PairError, match="do not exist"):
            call()


def test_errors_of_decompose() -> None:
    """Axes that do not exist and weights that are not finite are refused."""
    for axes in (Axes((2,)), Axes((-3,)), Axes((1,), groups=3), Axes((0,), groups=2)):
        with pytest.raises(PairError):
            decompose(torch.ones(4, 3), axes)
    for bad in (math.nan, math.inf):
        with pytest.raises(NonFiniteWeightError, match="1 of 2"):
            decompose(torch.tensor([[1.0, bad]]), Axes((0,)))


def test_memory_format_and_empty_weights() -> None:
    """The composed weight has v's strides; weights without elements pass through."""
    w = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    for axes in (Axes((0,)), Axes((1,), groups=2)):
        g, v = decompose(w, axes)
        assert compose(g * 1.5, v, axes).stride() == w.stride()
    for shape in ((0, 3), (3, 0)):
        g, v = decompose(torch.empty(shape), Axes((0,)))
        assert compose(g, v).shape == shape


def test_the_oracle_itself() -> None:
    """The exact oracle gives 6/5 and 8/5 for g = 2 and v = (3, 4)."""
    (row,) = exact(torch.tensor([[2.0]]), torch.tensor([[3.0, 4.0]]))
    assert [Fraction(str(x)) for x in row] == [Fraction(6, 5), Fraction(8, 5)]
    assert worst_ulp(torch.tensor([[1.0 + 2**-23]]), [[mpmath.mpf(1)]]) == 1.0
