"""Weights of 16 bits, of float64 and with g as a logarithm, by the compiled kernels: the bits of the other paths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import wnsurgery as wn
from wnsurgery import fused, other_types
from wnsurgery.reparam import Axes, compose, decompose

TYPES = [torch.float64, torch.bfloat16, torch.float16]
ALL_TYPES = [torch.float32, *TYPES]
WHOLE = dict(zip(ALL_TYPES, [torch.int32, torch.int64, torch.int16, torch.int16], strict=True))
ROWS, COLUMNS, ALL, DEPTHWISE, GROUPS = Axes((0,)), Axes((1,)), Axes(()), Axes((1,), groups=9), Axes((1,), groups=3)
SHAPES = [
    ((7, 5), ROWS),
    ((1, 1), ROWS),
    ((9,), ROWS),
    ((33, 3, 3, 3), ROWS),
    ((3, 20000), ROWS),
    ((300, 400), ROWS),
    ((12, 7), COLUMNS),
    ((40, 50, 3), COLUMNS),
    ((200, 300, 2), COLUMNS),
    ((9, 4, 3, 3), DEPTHWISE),
    ((9, 4, 3, 3), GROUPS),
    ((120, 90, 9), GROUPS),
    ((31, 41), ALL),
]


@pytest.fixture(autouse=True)
def started() -> Iterator[None]:
    """With kernels, in as many threads as before."""
    assert fused.start()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def same_bits(a: Tensor, b: Tensor) -> bool:
    whole = WHOLE[a.dtype]
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a.view(whole), b.view(whole))


def by_operations(
    g: Tensor, v: Tensor, axes: Axes, monkeypatch: pytest.MonkeyPatch, magnitude: Any = "linear"
) -> Tensor:
    """The weight as where numba is not installed."""
    with monkeypatch.context() as patch:
        patch.setattr(fused._Kernels, "module", None)
        patch.setattr(fused._Kernels, "asked", True)
        return compose(g, v, axes, magnitude=magnitude)


def by_the_textbook(g: Tensor, v: Tensor, axes: Axes) -> Tensor:
    """g / ||v||, spread over the rows of v."""
    dims = axes.reduced(v.ndim)
    norms = axes.grouped(v).square().sum(dims, keepdim=True).sqrt() if dims else v.abs()
    return axes.spread((g.unsqueeze(1) if axes.groups > 1 else g) / norms, v)


def by_kernels(g: Tensor, v: Tensor, axes: Axes) -> Tensor | None:
    sizes = other_types.rows_of(g, v, axes.kept, axes.groups, "linear")
    found = None if sizes is None else other_types.forward(g, v, sizes)
    return None if found is None else found[0]


def magnitudes(stored: Tensor) -> dict[str, Tensor]:
    """Of a pair as converted, rescaled by powers of two, a unit in the last place off that, in training, and dead."""
    torch.manual_seed(1)
    step = torch.finfo(stored.dtype).eps
    return {
        "converted": stored,
        "rescaled": stored * 4,
        "near": stored * (1 + step * torch.randint(-2, 3, stored.shape)),
        "trained": stored * torch.randn(stored.shape).to(stored.dtype),
        "negative": -stored,
        "dead": torch.where(torch.rand(stored.shape) < 0.5, torch.zeros_like(stored), stored),
    }


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("shape", "axes"), SHAPES, ids=str)
@pytest.mark.parametrize("short", [False, True], ids=["", "g of 16 bits"])
def test_the_bits_are_those_of_torchs_operations(
    shape: tuple[int, ...], axes: Axes, dtype: torch.dtype, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    stored, v = decompose(torch.randn(shape, dtype=torch.float64).to(dtype), axes)
    for kind, g in magnitudes(stored.to(dtype) if short else stored).items():
        wanted = by_operations(g, v, axes, monkeypatch)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = by_kernels(g, v, axes)
            assert found is not None, kind
            assert same_bits(found, wanted), kind
            assert same_bits(compose(g, v, axes), wanted), kind


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rows_of_any_size(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those within the range of the kernels, and those which go the long way, one at a time."""
    torch.manual_seed(0)
    taken = 0
    for power in range(-1070 if dtype == torch.float64 else -26, 1000 if dtype == torch.float64 else 14, 7):
        v = (torch.randn(4, 30, dtype=torch.float64) * 2.0**power).to(dtype)
        if not torch.isfinite(v).all():
            continue
        for g in (
            decompose(v, ROWS)[0],
            torch.rand(4, 1).to(torch.float64 if dtype == torch.float64 else torch.float32),
        ):
            taken += by_kernels(g, v, ROWS) is not None
            assert same_bits(compose(g, v, ROWS), by_operations(g, v, ROWS, monkeypatch)), power
    assert taken > 5


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_rows_that_are_no_ordinary_ones_go_the_long_way(
    dtype: torch.dtype, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    v = torch.randn(3, 5, dtype=torch.float64).to(dtype)
    g, _ = decompose(v, ROWS)
    v[1] = value
    assert by_kernels(g, v, ROWS) is None
    torch.testing.assert_close(
        compose(g, v, ROWS), by_operations(g, v, ROWS, monkeypatch), rtol=0, atol=0, equal_nan=True
    )


def test_a_magnitude_that_may_stand_for_a_norm_beyond_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    v = torch.full((1, 400), 6e4, dtype=torch.float16)
    g = torch.full((1, 1), 65504.0, dtype=torch.float16)
    assert by_kernels(g, v, ROWS) is None
    assert same_bits(compose(g, v, ROWS), by_operations(g, v, ROWS, monkeypatch))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("shape", "axes"), SHAPES, ids=str)
def test_gradients(shape: tuple[int, ...], axes: Axes, dtype: torch.dtype) -> None:
    """Equation 3 in float64, to the rounding of the type."""
    torch.manual_seed(0)
    stored, v = decompose(torch.randn(shape, dtype=torch.float64).to(dtype), axes)
    g = (stored * (0.5 + torch.rand(stored.shape).to(stored.dtype))).requires_grad_()
    v.requires_grad_()
    up = torch.randn(shape, dtype=torch.float64).to(dtype)
    to_g, to_v = torch.autograd.grad(compose(g, v, axes), (g, v), up)
    wide_g, wide_v = g.detach().double().requires_grad_(), v.detach().double().requires_grad_()
    factors = by_the_textbook(wide_g, wide_v, axes)
    exact = torch.autograd.grad(factors * wide_v, (wide_g, wide_v), up.double())
    step = torch.finfo(torch.float32 if dtype != torch.float64 else dtype).eps
    assert to_g.dtype == g.dtype
    assert to_v.dtype == dtype
    scale = float(up.double().abs().max() * factors.detach().abs().max())
    torch.testing.assert_close(to_g.double(), exact[0], rtol=1e-13 if step < 1e-10 else 1e-5, atol=200 * step)
    atol = torch.finfo(dtype).eps * float(exact[1].abs().max()) + 20 * step * scale
    torch.testing.assert_close(to_v.double(), exact[1], rtol=torch.finfo(dtype).eps, atol=atol)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (2, 6)),
    "large": (lambda: nn.Linear(300, 400), (2, 300)),
    "convolution": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(3, 4, 3), (2, 3, 5)),
    "depthwise": (lambda: nn.ConvTranspose1d(4, 8, 3, groups=4), (2, 4, 5)),
    "groups": (lambda: nn.ConvTranspose1d(6, 8, 3, groups=2), (2, 6, 5)),
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_training_is_that_of_the_weight_computed_by_hand(kind: str, dtype: torch.dtype, straight: list[bool]) -> None:
    """Some steps of a layer, and a fold to the bits that its last pass used."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer: Any = wn.apply_weight_norm(make().to(dtype))
    wide = copy.deepcopy(layer).double()
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    for net, inputs in ((layer, x), (wide, x.double())):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            net(inputs).square().mean().backward()
            optimizer.step()
    entry, other = layer.parametrizations["weight"], wide.parametrizations["weight"]
    loose = {torch.float64: 1e-12, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for mine, theirs in zip(entry.pair(), other.pair(), strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=loose, atol=loose)
    assert kind in ("transposed", "groups") or straight[-1]
    used = layer.weight.detach().clone()
    assert same_bits(wn.fold_weight_norm(layer).weight.detach(), used)


def test_first_and_second_derivatives() -> None:
    torch.manual_seed(0)
    layer: Any = wn.apply_weight_norm(nn.Linear(4, 3).double())
    x = torch.randn(2, 4, dtype=torch.float64)
    layer(x).sum().backward()  # the short way is known
    g, v = (half.detach().clone().requires_grad_() for half in layer.parametrizations["weight"].pair())

    def composed(g: Tensor, v: Tensor) -> Tensor:
        return compose(g, v)

    assert torch.autograd.gradcheck(composed, (g, v))
    assert torch.autograd.gradgradcheck(composed, (g, v))
    for made in (layer, copy.deepcopy(layer)):
        pair = made.parametrizations["weight"].pair()
        once = torch.autograd.grad(made(x).tanh().sum(), pair, create_graph=True)
        twice = torch.autograd.grad(sum(part.square().sum() for part in once), pair)
        plain = [half.detach().clone().requires_grad_() for half in pair]
        w = plain[0] * plain[1] / plain[1].norm(dim=1, keepdim=True)
        y = nn.functional.linear(x, w, made.bias.detach()).tanh().sum()
        wanted = torch.autograd.grad(y, plain, create_graph=True)
        again = torch.autograd.grad(sum(part.square().sum() for part in wanted), plain)
        for mine, theirs in zip((*once, *twice), (*wanted, *again), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_gradient_that_somebody_holds_is_not_written_over(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer: Any = wn.apply_weight_norm(nn.Linear(300, 400).to(dtype))
    x = torch.randn(2, 300).to(dtype)
    layer(x).sum().backward()
    held: list[Tensor] = []
    w = layer.weight
    w.register_hook(held.append)
    nn.functional.linear(x, w).sum().backward()
    torch.testing.assert_close(held[0], x.sum(0).expand(400, 300), rtol=1e-2, atol=1e-2)


def test_16_bits_there_and_back() -> None:
    """Every number of 16 bits as float32, and float32 rounded to nearest, ties to even, as torch has it."""
    kernels = other_types._kernels()
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    bits = halves.view(torch.int16).numpy().view(np.uint16)
    found = torch.tensor([kernels._widened(np.uint32(x)) for x in bits])
    torch.testing.assert_close(found, halves.float(), rtol=0, atol=0, equal_nan=True)
    torch.manual_seed(0)
    middle = (halves[:-1].float() + halves[1:].float()) / 2  # ties
    x = torch.cat(
        [torch.randn(20000) * 2.0 ** torch.randint(-30, 18, (20000,)), middle, torch.tensor([65519.9, 65520.0])]
    )
    x = x[~x.isnan()]
    for narrowed, dtype in ((kernels._narrowed, torch.float16), (kernels._narrowed_brain, torch.bfloat16)):
        short = np.array([narrowed(np.float32(one)) for one in x.tolist()], np.uint16)
        assert torch.equal(torch.from_numpy(short.view(np.int16)), x.to(dtype).view(torch.int16))
    assert np.isnan(np.uint16(kernels._narrowed(np.float32(np.nan))).view(np.float16))


def test_what_is_not_taken() -> None:
    g, v = torch.ones(3, 1), torch.ones(3, 4, dtype=torch.bfloat16)
    assert other_types.rows_of(g, v, (0,), 1, "linear") is not None
    for given in (
        (g.to(v.dtype), v, (0,), 1, "log"),
        (g, v, (0,), 3, "linear"),
        (g, v, (0, 1), 1, "linear"),
        (g, v.float(), (0,), 1, "linear"),
        (g.double(), v, (0,), 1, "linear"),
        (g[:2], v, (0,), 1, "linear"),
        (g.view(1, 3), v, (0,), 1, "linear"),
        (g, v.t().contiguous().t(), (0,), 1, "linear"),
        (g, v[:, :0], (0,), 1, "linear"),
    ):
        assert other_types.rows_of(*given) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_deferred_mode_takes_the_steps_of_the_default_mode(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bool] = []
    forward, backward = other_types.forward, other_types.backward
    monkeypatch.setattr(other_types, "forward", lambda *args: made.append(True) or forward(*args))
    monkeypatch.setattr(other_types, "backward", lambda *args: made.append(False) or backward(*args))
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    plain = make().to(dtype)
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    nets: list[Any] = []
    for mode in ("parametrized", "deferred"):
        net = copy.deepcopy(plain)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.5)
        wn.apply_weight_norm(net, mode=mode, optimizer=optimizer)
        made.clear()
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        nets.append(net)
    assert made.count(True) >= 3
    assert made.count(False) == 3
    loose = {torch.float64: 1e-12, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(nets[0].weight, nets[1].weight, rtol=loose, atol=loose)
    g, v = nets[1].parametrizations["weight"].pair()
    used = nets[1].weight.detach().clone()
    assert same_bits(used, compose(g.detach(), v.detach(), nets[1].parametrizations["weight"][0].axes))
    assert same_bits(wn.fold_weight_norm(nets[1]).weight.detach(), used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [5, 300])
@pytest.mark.parametrize("order", [torch.channels_last, torch.channels_last_3d], ids=str)
def test_channels_last(dtype: torch.dtype, width: int, order: Any, straight: list[bool]) -> None:
    """The bits of the same weight in the usual order, by the kernels, and gradients that come in either order."""
    torch.manual_seed(0)
    kind: Any = nn.Conv2d if order == torch.channels_last else nn.Conv3d
    usual: Any = kind(7, width, 3).to(dtype)
    layer = wn.apply_weight_norm(copy.deepcopy(usual).to(memory_format=order))
    usual = wn.apply_weight_norm(usual)
    x = torch.randn(2, 7, *[4] * (usual.weight.ndim - 2)).to(dtype)
    for net, inputs in ((layer, x.to(memory_format=order)), (usual, x)):
        net(inputs).sum().backward()
    g, v = layer.parametrizations["weight"].pair()
    straight.clear()
    assert v.stride() == v.to(memory_format=order).stride() != v.contiguous().stride()
    with torch.no_grad():
        factor = torch.linspace(0.5, 2.0, width, dtype=g.dtype).view_as(g)
        for net in (layer, usual):
            net.parametrizations["weight"].pair()[0].mul_(factor)
    whole = WHOLE[dtype]
    assert torch.equal(layer.weight.detach().contiguous().view(whole), usual.weight.detach().view(whole))
    assert straight == [True, True]
    up = torch.randn(v.shape).to(dtype)
    theirs = torch.autograd.grad(usual.weight, usual.parametrizations["weight"].pair(), up)
    for given in (up, up.to(memory_format=order)):
        mine = torch.autograd.grad(layer.weight, (g, v), given)
        assert mine[1].stride() == v.stride()
        for one, other in zip(mine, theirs, strict=True):
            loose = 1e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(one, other, rtol=loose, atol=loose)


def test_several_threads_at_once_do_not_meet_in_memory() -> None:
    """Each with weights of its own, for which the kernels have rooms of their own."""

    def jobs(seed: int) -> list[tuple[Tensor, Tensor, Tensor, Any]]:
        generator = torch.Generator().manual_seed(seed)
        made: list[tuple[Tensor, Tensor, Tensor, Any]] = []
        for dtype, magnitude in [*((dtype, "linear") for dtype in TYPES), (torch.float32, "log")]:
            for shape in ((5, 33), (40, 700), (2, 20000)):
                w, up = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
                g, v = decompose(w, ROWS, magnitude=magnitude)  # type: ignore[arg-type]
                made.append(((g + 0.1).requires_grad_(), v.requires_grad_(), up, magnitude))
        return made

    def results(given: list[tuple[Tensor, Tensor, Tensor, Any]]) -> list[Tensor]:
        found: list[Tensor] = []
        for g, v, up, magnitude in given:
            w = compose(g, v, ROWS, magnitude=magnitude)
            found += [w.detach(), *torch.autograd.grad(w, (g, v), up)]
        return found

    torch.set_num_threads(1)
    given = [jobs(seed) for seed in range(4)]
    wanted = [results(one) for one in given]
    with ThreadPoolExecutor(len(given)) as pool:
        for _ in range(40):
            for mine, theirs in zip(pool.map(results, given), wanted, strict=True):
                assert all(map(torch.equal, mine, theirs))


def test_deferred_steps_with_channels_last() -> None:
    """With a momentum that lies as the gradients do."""
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 7, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 5, 6, 6).to(memory_format=torch.channels_last)
    nets: list[Any] = []
    for mode in ("parametrized", "deferred"):
        net: Any = copy.deepcopy(plain)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        wn.apply_weight_norm(net, mode=mode, optimizer=optimizer)
        for _ in range(4):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        nets.append(net)
    assert nets[1].weight.stride() == plain.weight.stride()
    for mine, theirs in zip(*(net.parametrizations["weight"].pair() for net in nets), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


# with the logarithm of g ---------------------------------------------------------------------------------


def logarithms(stored: Tensor) -> dict[str, Tensor]:
    """As `magnitudes` has them; a dead row is no ordinary one."""
    torch.manual_seed(1)
    step = torch.finfo(stored.dtype).eps
    return {
        "converted": stored,
        "rescaled": stored + float(np.log(4.0)),
        "near": stored * (1 + step * torch.randint(-2, 3, stored.shape)),
        "nearly": stored + 1e-4 * torch.randn(stored.shape),
        "trained": stored + torch.randn(stored.shape),
    }


@pytest.mark.parametrize("dtype", ALL_TYPES, ids=str)
@pytest.mark.parametrize(("shape", "axes"), SHAPES, ids=str)
def test_the_bits_with_logarithms(
    shape: tuple[int, ...], axes: Axes, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    whole = WHOLE[dtype]
    stored, v = decompose(torch.randn(shape, dtype=torch.float64).to(dtype), axes, magnitude="log")
    for kind, s in logarithms(stored).items():
        before = s.clone()
        wanted = by_operations(s, v, axes, monkeypatch, "log")
        rows = other_types.rows_of(s, v, axes.kept, axes.groups, "log")
        assert rows is not None
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = other_types.forward(s, v, rows)
            assert found is not None, kind
            assert torch.equal(found[0].view(whole), wanted.view(whole)), kind
            assert torch.equal(compose(s, v, axes, magnitude="log").view(whole), wanted.view(whole)), kind
        assert torch.equal(s, before)
        assert kind != "converted" or torch.equal(wanted.view(whole), v.view(whole))


def test_logarithms_in_float64_whose_last_bit_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose s lies as far from the stored one as that may be wrong goes the long way, or has its bits."""
    torch.manual_seed(0)
    stored, v = decompose(torch.randn(1, 40, dtype=torch.float64), ROWS, magnitude="log")
    ways = set()
    for units in range(-40, 41):
        s = stored + units * torch.finfo(torch.float64).eps / 4
        rows = other_types.rows_of(s, v, (0,), 1, "log")
        assert rows is not None
        ways.add(other_types.forward(s, v, rows) is None)
        assert same_bits(compose(s, v, magnitude="log"), by_operations(s, v, ROWS, monkeypatch, "log")), units
    assert ways == {False, True}


@pytest.mark.parametrize("dtype", ALL_TYPES, ids=str)
@pytest.mark.parametrize("dead", ["row of zeros", "e^s of zero", "no number"])
def test_rows_with_logarithms_that_go_the_long_way(
    dead: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    s, v = decompose(torch.randn(3, 5).to(dtype), ROWS, magnitude="log")
    if dead == "row of zeros":
        v[1] = 0.0
    else:
        s[1] = -1000.0 if dead == "e^s of zero" else float("nan")
    rows = other_types.rows_of(s, v, (0,), 1, "log")
    assert rows is not None
    assert other_types.forward(s, v, rows) is None
    monkeypatch.setattr(other_types, "rows_of", lambda *_: None)
    wanted = compose(s, v, magnitude="log")
    monkeypatch.undo()
    torch.testing.assert_close(compose(s, v, magnitude="log"), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ALL_TYPES, ids=str)
@pytest.mark.parametrize("mode", ["parametrized", "deferred"])
@pytest.mark.parametrize("kind", LAYERS)
def test_training_with_logarithms(kind: str, mode: Any, dtype: torch.dtype, straight: list[bool]) -> None:
    """Against the textbook's formula in float64, and a fold to the bits that the last pass used."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer: Any = make().to(dtype)
    x = torch.randn(shape).to(dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    wn.apply_weight_norm(layer, magnitude="log", mode=mode, optimizer=optimizer)
    entry = layer.parametrizations["weight"]
    s, v = (half.detach().to(torch.float64, copy=True).requires_grad_() for half in entry.pair())
    plain = copy.deepcopy(wn.fold_weight_norm(copy.deepcopy(layer))).double()
    bias = plain.bias
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        w = by_the_textbook(s.exp(), v, entry[0].axes) * v
        y = torch.func.functional_call(plain, {"weight": w, "bias": bias}, (x.double(),))
        grads = torch.autograd.grad(y.square().mean(), (s, v, bias))
        with torch.no_grad():
            for one, grad in zip((s, v, bias), grads, strict=True):
                one.sub_(0.01 * grad)
    loose = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for mine, theirs in zip((*entry.pair(), layer.bias), (s, v, bias), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=loose, atol=loose / 10)
    turned = kind in ("transposed", "groups") and dtype != torch.float32
    assert mode == "deferred" or turned or straight[-1]
    used = layer.weight.detach().clone()
    assert torch.equal(wn.fold_weight_norm(layer).weight, used)


def test_second_derivatives_with_logarithms() -> None:
    torch.manual_seed(0)
    layer: Any = wn.apply_weight_norm(nn.Linear(4, 3), magnitude="log")
    x = torch.randn(2, 4)
    layer(x).sum().backward()
    pair = layer.parametrizations["weight"].pair()
    once = torch.autograd.grad(layer(x).tanh().sum(), pair, create_graph=True)
    twice = torch.autograd.grad(sum(part.square().sum() for part in once), pair)
    s, v = (half.detach().double().requires_grad_() for half in pair)
    w = s.exp() * v / v.norm(dim=1, keepdim=True)
    y = nn.functional.linear(x.double(), w, layer.bias.detach().double()).tanh().sum()
    wanted = torch.autograd.grad(y, (s, v), create_graph=True)
    again = torch.autograd.grad(sum(part.square().sum() for part in wanted), (s, v))
    for mine, theirs in zip((*once, *twice), (*wanted, *again), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)
