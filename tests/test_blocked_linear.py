"""Large linear layers, some rows at a time: the bits of the product in one piece, and gradients to rounding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from wnsurgery import blocked_linear as subject
from wnsurgery import fused
from wnsurgery.reparam import Axes, compose

from nets import halves
from nets import large_layer as layer

SIZES = [(1100, 600), (1152, 512), (4096, 512), (131, 8001), (3, 300000), (300001, 3), (1026, 1024)]  # outputs, inputs


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    assert fused.start()
    if not subject._threads_can_multiply():
        pytest.skip("torch's matrix product cannot be called from threads here")
    subject._tried_out.cache_clear()
    yield request.param
    subject._tried_out.cache_clear()
    torch.set_num_threads(before)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows of the weight and rows at a time, of each output that is made this way."""
    found: list[tuple[int, int]] = []
    real = subject.forward

    def forward(x: Tensor, g: Tensor, v: Tensor, bias: Tensor | None, rows: int) -> Any:
        found.append((len(v), rows))
        return real(x, g, v, bias, rows)

    monkeypatch.setattr(subject, "forward", forward)
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (64,), (512,), (2, 3), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_output_has_the_bits_of_the_product_in_one_piece(
    size: tuple[int, int], shape: tuple[int, ...], bias: bool, blocks: list[tuple[int, int]]
) -> None:
    module = layer(*size, bias=bias)
    w = compose(*halves(module), Axes((0,))).detach().requires_grad_()
    for asks in (False, True):
        x = torch.randn(*shape, size[1], requires_grad=asks)
        found = module(x)
        assert found.requires_grad
        assert torch.equal(found, F.linear(x, w, module.bias))
    assert all(outputs == size[0] for outputs, _ in blocks)


def test_blocks_are_what_these_layers_are_made_of(blocks: list[tuple[int, int]]) -> None:
    """Whatever the sums of this machine's matrix product, some sizes can be taken apart."""
    for size in SIZES:
        layer(*size)(torch.randn(16, size[1]))
    assert any(rows < outputs for outputs, rows in blocks)


def test_a_size_whose_bits_would_differ_is_done_in_one_piece(
    blocks: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subject.forward

    def off_by_a_bit(*arguments: Any) -> Any:
        found = real(*arguments)
        assert found is not None
        last = found[0].view(-1)[-1:]
        last.copy_(torch.nextafter(last, torch.tensor(torch.inf)))
        return found

    monkeypatch.setattr(subject, "forward", off_by_a_bit)
    module, x = layer(1100, 600), torch.randn(4, 600)
    w = compose(*halves(module), Axes((0,))).detach().requires_grad_()
    assert torch.equal(module(x), F.linear(x, w, module.bias))
    assert len(blocks) == 1  # of the trial


def test_what_is_taken_in_one_piece(blocks: list[tuple[int, int]]) -> None:
    module = layer(1100, 600)
    memory = torch.randn(4 * 600 + 1)
    for x in (
        memory[1:].view(4, 600),  # begins where a product may be summed in another order
        torch.randn(600, 4).t(),
        torch.randn(600),
        torch.randn(513, 600),
        torch.complex(torch.ones(4, 600), torch.ones(4, 600)).conj().imag,  # a view that stands for its negative
    ):
        module(x)
    x, precision = torch.randn(4, 600), torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    for coarse in ("tf32", "bf16"):
        torch.backends.mkldnn.matmul.fp32_precision = coarse  # type: ignore[attr-defined]
        module(x)
        torch.backends.mkldnn.matmul.fp32_precision = precision  # type: ignore[attr-defined]
    for name in ("_sgemm", "thread_number_at"):
        if name == "_sgemm" or torch.get_num_threads() > 1:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(subject, name, lambda: None)
                module(x).sum().backward()
    assert blocks == []
    module(x)
    assert len(blocks) == 2  # tried out, and made
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize("kind", ["expanded", "zeros without memory", "negated", "transposed"])
def test_gradients_that_are_not_laid_out_row_after_row(kind: str) -> None:
    module, x = layer(1100, 600), torch.randn(4, 600, requires_grad=True)
    up = {
        "expanded": torch.ones(1, 1).expand(4, 1100),
        "zeros without memory": torch._efficientzerotensor((4, 1100)),
        "negated": torch.complex(torch.ones(4, 1100), torch.ones(4, 1100)).conj().imag,
        "transposed": torch.randn(1100, 4).t(),
    }[kind]
    laid_out = torch.zeros(4, 1100) if up._is_zerotensor() else up.clone().resolve_neg().contiguous()
    wanted = torch.autograd.grad(module(x), [x, *halves(module)], laid_out)
    for a, b in zip(torch.autograd.grad(module(x), [x, *halves(module)], up), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [3, 5, 16])
def test_more_threads_than_processors(count: int, blocks: list[tuple[int, int]]) -> None:
    module, x, up = layer(1100, 600), torch.randn(16, 600, requires_grad=True), torch.randn(16, 1100)
    wanted = torch.autograd.grad(module(x), [x, *halves(module)], up)
    torch.set_num_threads(count)
    w = compose(*halves(module), Axes((0,))).detach().requires_grad_()
    y = module(x)
    assert torch.equal(y, F.linear(x, w, module.bias))
    for a, b in zip(torch.autograd.grad(y, [x, *halves(module)], up), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert blocks[-1][1] * count < 2 * 1100  # nearly all of them have some


def test_many_inputs() -> None:
    module, x = layer(520, 1030), torch.randn(512, 1030, requires_grad=True)
    y = F.linear(x, compose(*halves(module), Axes((0,))), module.bias)
    assert torch.equal(module(x), y)
    wanted = torch.autograd.grad(y.square().sum(), [x, *halves(module)])
    for a, b in zip(torch.autograd.grad(module(x).square().sum(), [x, *halves(module)]), wanted, strict=True):
        torch.testing.assert_close(a / b.abs().max(), b / b.abs().max(), rtol=1e-4, atol=1e-5)


def test_who_counts_products_sees_them() -> None:
    module, x = layer(1100, 600), torch.randn(4, 600, requires_grad=True)
    y = module(x).sum()
    with FlopCounterMode(display=False) as count:  # type: ignore[no-untyped-call]
        y.backward()
    assert count.get_total_flops() == 2 * 2 * 4 * 1100 * 600


def test_another_default_device_by_the_time_of_the_gradients() -> None:
    module, x, up = layer(1100, 600), torch.randn(4, 600, requires_grad=True), torch.randn(4, 1100)
    wanted = torch.autograd.grad(module(x), [x, *halves(module)], up)
    y = module(x)
    with torch.device("meta"):
        assert all(map(torch.equal, torch.autograd.grad(y, [x, *halves(module)], up), wanted))


def test_a_layer_gives_the_same_gradients_again_and_again() -> None:
    """Parts of dL/dx are added up in one order, whichever thread made them."""
    module, x, up = layer(4096, 600), torch.randn(16, 600, requires_grad=True), torch.randn(16, 4096)
    wanted = torch.autograd.grad(module(x), [x, *halves(module)], up)
    for _ in range(20):
        assert all(map(torch.equal, torch.autograd.grad(module(x), [x, *halves(module)], up), wanted))


def test_layers_of_several_threads_of_python_at_once() -> None:
    modules = [layer(1100, 600, seed=seed) for seed in range(4)]
    x = torch.randn(16, 600)
    wanted = [m(x) for m in modules]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            assert all(map(torch.equal, pool.map(lambda m: m(x), modules), wanted))


def test_a_size_is_tried_out_once_and_without_a_draw_from_the_users_random_numbers() -> None:
    module, x = layer(1100, 600), torch.randn(4, 600)
    before = torch.get_rng_state()
    for _ in range(3):
        module(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert subject._tried_out.cache_info().misses == 1
    with torch.random.fork_rng():
        torch.set_default_dtype(torch.float64)
        try:
            assert module(torch.randn(5, 600, dtype=torch.float32)).dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wants", [True, False])
@pytest.mark.parametrize("inputs", [1, 8, 14, 65, 129])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients_are_those_of_float64(size: tuple[int, int], inputs: int, wants: bool, bias: bool) -> None:
    """With dL/dx added up block by block, at once, and not at all; with dL/dw in blocks and whole."""
    module = layer(*size, bias=bias)
    x = torch.randn(inputs, size[1], requires_grad=wants)
    up = torch.randn(inputs, size[0])
    module(x).backward(up)
    g, v = (half.detach().double().requires_grad_() for half in halves(module))
    exact = x.detach().double().requires_grad_()
    F.linear(exact, g * v / v.norm(dim=1, keepdim=True)).backward(up.double())
    for mine, theirs in zip((x, *halves(module)), (exact, g, v), strict=True):
        if mine.requires_grad:
            assert mine.grad is not None and theirs.grad is not None
            scale = float(theirs.grad.abs().max())
            torch.testing.assert_close(mine.grad.double() / scale, theirs.grad / scale, rtol=1e-4, atol=1e-5)


def test_neither_the_weight_nor_its_gradient_is_kept() -> None:
    module = layer(1100, 1000)
    for _ in range(3):
        module.zero_grad()
        module(torch.randn(8, 1000)).sum().backward()
    rooms = module.parametrizations["weight"]._rooms()._memory  # type: ignore[index,union-attr]
    assert {name for name, _ in rooms} == {"grad"}


@pytest.mark.parametrize("row", [0, 500, 1099])
def test_one_extreme_row_sends_the_weight_the_long_way(row: int, blocks: list[tuple[int, int]]) -> None:
    module, x = layer(1100, 600), torch.randn(4, 600)
    with torch.no_grad():
        halves(module)[1][row].mul_(1e-20)
    w = compose(*halves(module), Axes((0,))).detach().requires_grad_()
    y = module(x)
    assert torch.equal(y, F.linear(x, w, module.bias))
    y.sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in module.parameters())
    assert len(blocks) == 2  # tried out, and given up


def test_a_weight_written_to_before_its_gradient_is_asked_for() -> None:
    module = layer(1100, 600)
    y = module(torch.randn(4, 600)).sum()
    with torch.no_grad():
        halves(module)[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_threads_may_change_between_the_passes() -> None:
    module, x = layer(1100, 600), torch.randn(4, 600, requires_grad=True)
    wanted = torch.autograd.grad(module(x).square().sum(), [x, *halves(module)])
    for there, back in ((1, 2), (2, 1), (2, 2)):
        torch.set_num_threads(there)
        y = module(x).square().sum()
        torch.set_num_threads(back)
        for a, b in zip(torch.autograd.grad(y, [x, *halves(module)]), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_the_output_may_be_written_to() -> None:
    module, x = layer(1100, 600), torch.randn(4, 600)
    F.relu(module(x), inplace=True).sum().backward()
    assert halves(module)[1].grad is not None


@pytest.mark.parametrize("inputs", [1, 8, 32])
def test_what_the_size_of_the_net_decides_is_no_bit(inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients go past the cache in a net whose gradients would not stay there."""
    module, x, found = layer(1100, 1030), torch.randn(inputs, 1030, requires_grad=True), []
    past: list[bool] = []
    real = subject._run

    def noted(kernel: str, tensors: Any, *, far: int = 0, **numbers: int) -> bool:
        if kernel == "linear_backward":
            past.append(bool(far))
        return real(kernel, tensors, far=far, **numbers)

    monkeypatch.setattr(subject, "_run", noted)
    for size in (1, 1 << 40):
        monkeypatch.setattr(fused, "far", lambda size=size: size)
        twin = copy.deepcopy(module)
        found.append(torch.autograd.grad(twin(x).square().sum(), [x, *halves(twin)]))
    assert past == [True, False]
    assert all(map(torch.equal, *found))
