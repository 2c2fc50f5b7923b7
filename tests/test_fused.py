"""The compiled kernels: the bits and gradients of the other paths, for every layout, size and number of threads."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wnsurgery as wn
from wnsurgery import fused, row_threads
from wnsurgery.reparam import Axes, compose, decompose, first_order_gradients, is_readable

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking a process that has threads

SHAPES = [
    ((7, 5), Axes((0,))),
    ((64, 64), Axes((0,))),
    ((1, 1), Axes((0,))),
    ((5,), Axes((0,))),
    ((33, 3, 3, 3), Axes((0,))),
    ((6, 20000), Axes((0,))),
    ((600, 900), Axes((0,))),
    ((12, 7), Axes((1,))),
    ((16, 8, 5), Axes((1,))),
    ((700, 650), Axes((1,))),
    ((40, 50, 3, 3), Axes((1,))),
    ((12, 3, 5), Axes((1,), groups=12)),
    ((300, 2, 8, 8), Axes((1,), groups=300)),
    ((12, 3, 5), Axes((1,), groups=4)),
    ((6, 1, 1, 1), Axes((1,), groups=2)),
    ((160, 70, 4, 4), Axes((1,), groups=5)),
    ((30, 41), Axes(())),
]


@pytest.fixture
def plain_paths() -> Iterator[None]:
    """Everything as where numba is not installed."""
    module, asked = fused._Kernels.module, fused._Kernels.asked
    fused._Kernels.module, fused._Kernels.asked = None, True
    yield
    fused._Kernels.module, fused._Kernels.asked = module, asked


@pytest.fixture
def one_and_two_threads() -> Iterator[tuple[int, ...]]:
    before = torch.get_num_threads()
    yield (1, 2)
    torch.set_num_threads(before)


def pair(shape: tuple[int, ...], axes: Axes, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(shape, generator=generator)
    return torch.randn(axes.magnitude_shape(shape), generator=generator), v


def by_kernels(g: Tensor, v: Tensor, axes: Axes) -> tuple[Tensor, Tensor | None]:
    assert fused.start(), "numba is in the test extra"
    sizes = fused.plan(g, v, axes.kept, axes.groups, "linear")
    assert sizes is not None
    w = torch.full_like(v, torch.nan)
    return w, fused.forward(g, v, sizes, w)


@pytest.mark.parametrize(("shape", "axes"), SHAPES, ids=str)
def test_the_weight_is_that_of_the_other_paths_bit_for_bit(
    shape: tuple[int, ...], axes: Axes, plain_paths: None, one_and_two_threads: tuple[int, ...]
) -> None:
    """For the pair as converted, for one rescaled by powers of two, and for one in training."""
    g, v = pair(shape, axes)
    norm, _ = decompose(v, axes)
    for magnitude in (g, norm, norm * 4, -norm):
        wanted = compose(magnitude, v, axes)
        fused._Kernels.asked = False
        for threads in one_and_two_threads:
            torch.set_num_threads(threads)
            w, norms = by_kernels(magnitude, v, axes)
            assert norms is not None
            assert torch.equal(w, wanted)
            assert torch.equal(norms, norm)
        fused._Kernels.module, fused._Kernels.asked = None, True
    assert torch.equal(compose(norm, v, axes), v)


@pytest.mark.parametrize(("shape", "axes"), SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3, 9])
def test_what_is_written_past_the_cache_is_the_same_to_the_bit_and_stays_in_its_place(
    shape: tuple[int, ...],
    axes: Axes,
    offset: int,
    monkeypatch: pytest.MonkeyPatch,
    one_and_two_threads: tuple[int, ...],
) -> None:
    g, v = pair(shape, axes)
    near, norms = by_kernels(g, v, axes)
    sizes = fused.plan(g, v, axes.kept, axes.groups, "linear")
    assert sizes is not None
    monkeypatch.setattr(fused, "far", lambda: 1)
    monkeypatch.setattr(row_threads, "_SPREAD", 1 << 9)
    for threads in one_and_two_threads:
        torch.set_num_threads(threads)
        memory = torch.full((v.numel() + 32,), 7.0)
        w = memory[offset : offset + v.numel()].view(shape)
        assert torch.equal(fused.forward(g, v, sizes, w), norms)  # type: ignore[arg-type]
        assert torch.equal(w, near)
        assert bool((memory[:offset] == 7).all())
        assert bool((memory[offset + v.numel() :] == 7).all())


@pytest.mark.parametrize(("shape", "axes"), SHAPES, ids=str)
def test_gradients_are_those_of_float64(
    shape: tuple[int, ...], axes: Axes, one_and_two_threads: tuple[int, ...]
) -> None:
    """The paper's equation 3, in the weight's own memory and in another, with one thread as with two."""
    g, v = pair(shape, axes)
    up = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    _, norms = by_kernels(g, v, axes)
    wide = [x.double().requires_grad_() for x in (g, v)]
    compose(*wide, axes).backward(up.double())
    seen = []
    for threads in one_and_two_threads:
        torch.set_num_threads(threads)
        for private in (False, True):
            grads = first_order_gradients(up.clone(), g, v, norms, axes, "linear", private=private)
            sizes = (up.square().sum().sqrt(), (g / norms).abs().max() * up.abs().max())
            for found, exact, size in zip(grads, wide, sizes, strict=True):
                assert exact.grad is not None
                torch.testing.assert_close(found.double(), exact.grad, rtol=1e-5, atol=1e-6 * size.item())
            seen.append(grads)
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("columns", [1, 8, 63, 64, 65, 500])
@pytest.mark.parametrize("in_place", [False, True])
def test_rows_without_a_gradient_are_left_as_they_are(
    columns: int, in_place: bool, one_and_two_threads: tuple[int, ...]
) -> None:
    """As most rows of a lookup table are; the others, also those that begin with zeros, get what they get alone."""
    rows = 3000
    g, v = pair((rows, columns), Axes((0,)))
    _, norms = by_kernels(g, v, Axes((0,)))
    sizes = fused.plan(g, v, (0,), 1, "linear")
    assert norms is not None and sizes is not None
    generator = torch.Generator().manual_seed(1)
    up = torch.randn(rows, columns, generator=generator) * (torch.rand(rows, 1, generator=generator) < 0.2)
    up[5, :-1], up[5, -1] = 0.0, 1e-42
    up[6, : columns // 2], up[6, -1] = 0.0, float("nan")
    up[7] = -0.0
    kept = up.abs().sum(1) != 0
    assert 0.1 < kept.float().mean() < 0.3 and kept[5] and kept[6] and not kept[7]
    alone = torch.empty_like(up[kept])
    part = fused.plan(g[kept], v[kept], (0,), 1, "linear")
    assert part is not None
    wanted_g = fused.backward(up[kept], g[kept], v[kept], norms[kept], part, alone)
    for threads in one_and_two_threads:
        torch.set_num_threads(threads)
        given = up.clone()
        grad_v = given if in_place else torch.full_like(up, 7.0)
        grad_g = fused.backward(given, g, v, norms, sizes, grad_v)
        assert torch.equal(grad_g[kept].nan_to_num(1.5), wanted_g.nan_to_num(1.5))
        assert torch.equal(grad_v[kept].nan_to_num(1.5), alone.nan_to_num(1.5))
        assert not bool(grad_v[~kept].any()) and not bool(grad_g[~kept].any())


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e15, 1e30])
@pytest.mark.parametrize("axes", [Axes((0,)), Axes((1,))])
def test_rows_beyond_the_ordinary_take_the_long_way(size: float, axes: Axes) -> None:
    """One such row is enough; the result is what it is without the kernels."""
    v = torch.randn(9, 9)
    v.select(axes.kept[0], 4).mul_(size)
    g = torch.ones(axes.magnitude_shape(v.shape))
    assert by_kernels(g, v, axes)[1] is None
    w = compose(g, v.requires_grad_(), axes)
    exact = v.detach().double()
    norms = exact.norm(dim=1 - axes.kept[0], keepdim=True)
    torch.testing.assert_close(w.detach().double(), torch.where(norms == 0, 0.0, exact / norms), rtol=3e-7, atol=0)


def test_a_magnitude_of_zero_is_an_ordinary_one() -> None:
    """Rows of zeros have g = 0 and learn; they do not slow the others down."""
    g, v = decompose(torch.tensor([[0.0, -0.0], [3.0, 4.0]]), Axes((0,)))
    w, norms = by_kernels(g, v, Axes((0,)))
    assert norms is not None
    assert torch.equal(w, torch.tensor([[0.0, -0.0], [3.0, 4.0]]))
    assert w.signbit().tolist() == [[False, True], [False, False]]


def test_what_the_kernels_do_not_take() -> None:
    fused.start()
    g, v = torch.ones(4, 1), torch.randn(4, 6)
    linear = ((0,), 1, "linear")
    assert fused.plan(g, v, *linear) == fused.Sizes(0, 4, 6)
    assert fused.plan(g, v, (0,), 1, "log") is None
    assert fused.plan(g, v, (0,), 2, "linear") is None
    assert fused.plan(torch.ones(2, 3, 1), torch.randn(2, 3, 4), (1,), 2, "linear") == fused.Sizes(0, 6, 4)
    assert fused.plan(torch.ones(2, 3, 1), torch.randn(4, 3, 4), (1,), 2, "linear") == fused.Sizes(2, 6, 4, groups=2)
    assert fused.plan(torch.ones(2, 3, 1), torch.randn(5, 3, 4), (1,), 2, "linear") is None
    assert fused.plan(torch.ones(()), torch.randn(4), (), 2, "linear") is None
    assert fused.plan(torch.ones(6, 1, 1), torch.randn(2, 3, 4), (1,), 2, "linear") is None
    assert fused.plan(g.double(), v, *linear) is None
    assert fused.plan(g, v.bfloat16(), *linear) is None
    assert fused.plan(g, v.t().contiguous().t(), *linear) is None
    assert fused.plan(g.t(), v, *linear) is None
    assert fused.plan(g, v.to("meta"), *linear) is None
    assert fused.plan(g[:0], v[:0], *linear) is None
    assert fused.plan(torch.ones(4, 1, 1), torch.randn(4, 6, 2)[..., :1], *linear) is None
    assert fused.plan(torch.ones(2, 3, 1), torch.randn(2, 3, 4), (0, 1), 1, "linear") is None


def test_a_batch_of_gradients_of_a_large_weight() -> None:
    """Which have no memory of their own that a kernel could write to."""
    g, v = (x.requires_grad_() for x in pair((300, 400), Axes((0,))))
    assert fused.start()
    w = compose(g, v, Axes((0,)))
    ups = torch.randn(3, 300, 400)
    together = torch.autograd.grad(w, [g, v], ups, is_grads_batched=True, retain_graph=True)
    for i, up in enumerate(ups):
        for many, one in zip(together, torch.autograd.grad(w, [g, v], up, retain_graph=True), strict=True):
            torch.testing.assert_close(many[i], one, rtol=1e-4, atol=1e-5)


def test_a_gradient_negated_without_a_copy() -> None:
    """torch may hand out -u as u's memory with a bit beside it: the kernels, which see memory alone, get -u."""
    g, v = (x.requires_grad_() for x in pair((700, 700), Axes((0,))))
    assert fused.start()
    w = compose(g, v, Axes((0,)))
    up = torch.randn(700, 700)
    assert is_readable(up, v)
    assert not is_readable(torch._neg_view(up), v)
    found, wanted = (torch.autograd.grad(w, [v], u, retain_graph=True)[0] for u in (torch._neg_view(up), -up))
    assert torch.equal(found, wanted)


def _train(model: nn.Module, steps: int) -> list[float]:
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 3, 16)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 600, 4), nn.Conv1d(600, 600, 1))


@pytest.mark.parametrize("mode", ["parametrized", "deferred"])
def test_training_is_the_same_without_numba(mode: str, plain_paths: None) -> None:
    model = wn.apply_weight_norm(_net(), mode=mode)
    twin = copy.deepcopy(model)
    losses = _train(model, 5)
    assert not fused.started()
    fused._Kernels.asked = False
    assert _train(twin, 5) == pytest.approx(losses, rel=1e-5)
    assert fused.started()


def _layers(count: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    net = wn.apply_weight_norm(nn.Sequential(*(nn.Linear(6, 6) for _ in range(count))))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    for _ in range(3):
        net(torch.ones(2, 6)).sum().backward()
        optimizer.step()
    net.zero_grad()
    return net


def _entry(net: nn.Sequential, index: int) -> Any:
    return net[index].parametrizations.weight  # type: ignore[union-attr]


def test_gradients_come_in_their_turn_in_the_backward_pass() -> None:
    """Gradients are ready layer by layer from the last to the first, which DistributedDataParallel counts on."""
    net = _layers()
    order: list[int] = []
    for i in range(len(net)):
        _entry(net, i).original1.register_post_accumulate_grad_hook(lambda _, i=i: order.append(i))
    x = torch.ones(2, 6)
    marks: list[str] = []
    for i, layer in enumerate(net):
        x = layer(x)
        x.register_hook(lambda _, i=i: marks.append(f"{i}:{len(order)}"))  # type: ignore[no-untyped-call]
    x.sum().backward()
    assert order == [3, 2, 1, 0]
    assert marks == ["3:0", "2:1", "1:2", "0:3"]


def test_a_pair_frozen_in_between_gets_no_gradient() -> None:
    net = _layers()
    x = net[0](torch.ones(2, 6))
    entry = _entry(net, 2)
    entry.original0.requires_grad_(False)
    net[1:](x).sum().backward()
    assert entry.original0.grad is None
    assert entry.original1.grad is not None


def test_checkpointed_layers_beside_others() -> None:
    """Activation checkpointing counts what is saved in its region: no weight may come from outside of it."""
    net, plain = _layers(), _layers()
    for _ in range(4):
        for model, checkpointed in ((net, True), (plain, False)):
            model.zero_grad()
            x = model[0](torch.ones(2, 6))
            x = checkpoint(model[1:3], x, use_reentrant=False) if checkpointed else model[1:3](x)
            model[3](x).square().sum().backward()
        for a, b in zip(net.parameters(), plain.parameters(), strict=True):
            assert a.grad is not None and b.grad is not None
            torch.testing.assert_close(a.grad, b.grad)


def test_evaluation_weights_are_renewed_together() -> None:
    """After a step, the first layer that is evaluated renews those that the last evaluation used."""
    net = _layers()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        net(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            net[:3](net[:3](torch.ones(2, 6)))
    net(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        net[0](torch.ones(2, 6))
    kept = [i for i in range(len(net)) if _entry(net, i).__dict__.get("_kept") is not None]
    assert kept == [0, 1, 2]
    for i in kept:
        entry = _entry(net, i)
        with torch.no_grad():
            assert torch.equal(net[i].weight, compose(entry.original0, entry.original1, Axes((0,))))  # type: ignore[arg-type]


def test_evaluation_and_folding_do_not_start_the_compiler() -> None:
    """Which takes about a second: only training makes up for it."""
    program = (
        "import sys, torch, wnsurgery as wn; from torch import nn\n"
        "net = wn.apply_weight_norm(nn.Linear(3, 2)).eval()\n"
        "with torch.no_grad(): net(torch.ones(1, 3))\n"
        "wn.fold_weight_norm(net)\n"
        "assert 'numba' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_numba_a_net_trains_as_before() -> None:
    program = (
        "import sys, torch; sys.modules['numba'] = None; import wnsurgery as wn; from torch import nn\n"
        "from wnsurgery import fused\n"
        "net = wn.apply_weight_norm(nn.Linear(3, 2)); net(torch.ones(1, 3)).sum().backward()\n"
        "assert not fused.started() and net.parametrizations.weight.original1.grad is not None\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_damaged_files_of_compiled_kernels_are_written_anew(tmp_path: Path) -> None:
    """As a full disk leaves them."""
    program = (
        "import torch, wnsurgery as wn; from torch import nn\n"
        "net = wn.apply_weight_norm(nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose1d(4, 2, 3)))\n"
        "for _ in range(3): net(torch.ones(1, 4, 4)).sum().backward()\n"
        "assert net[0].parametrizations.weight.original1.grad is not None\n"
    )
    places = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for damage in (lambda data: data, lambda data: data[: len(data) // 2], lambda data: b""):
        for path in tmp_path.rglob("*.nb?"):
            path.write_bytes(damage(path.read_bytes()))
        subprocess.run([sys.executable, "-c", program], check=True, env=places)
    assert all(path.stat().st_size for path in tmp_path.rglob("*.nbi"))
    assert len(list(tmp_path.rglob("*.nbi"))) >= 2
