"""Linear layers that compute their large weight with the output in training: the same bits, gradients and manners."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wnsurgery as wn
from wnsurgery import large_linear as subject
from wnsurgery.reparam import Axes, compose

from nets import halves
from nets import large_layer as layer

SIZES = [(300, 520), (1100, 1000), (7, 40000)]  # outputs and inputs


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With which the gradient is made in parts; for smaller layers than otherwise, too."""
    monkeypatch.setattr(subject, "LARGE_WEIGHT", 1 << 17)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The outputs that were computed this way."""
    found: list[Tensor] = []
    real = subject._apply

    def apply(*arguments: Any) -> Tensor:
        found.append(real(*arguments))
        return found[-1]

    monkeypatch.setattr(subject, "_apply", apply)
    return found


def reference(module: nn.Linear, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output in float64 from plain operations, with the leaves x, g, v and bias that it comes from."""
    g, v = (half.detach().double().requires_grad_() for half in halves(module))
    x = x.detach().double().requires_grad_()
    bias = None if module.bias is None else module.bias.detach().double().requires_grad_()
    y = nn.functional.linear(x, g * v / v.norm(dim=1, keepdim=True), bias)
    return y, [x, g, v] + ([] if bias is None else [bias])


def leaves(module: nn.Linear, x: Tensor) -> list[Tensor]:
    return [x, *halves(module)] + ([] if module.bias is None else [module.bias])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (2, 1, 3), (600,)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_output_is_that_of_the_composed_weight_bit_for_bit(
    size: tuple[int, int], shape: tuple[int, ...], bias: bool, taken: list[Tensor]
) -> None:
    module = layer(*size, bias=bias)
    for x in (torch.randn(*shape, size[1]), torch.randn(size[1], *shape).movedim(0, -1)):
        for asks in (False, True):
            wanted = nn.functional.linear(x.requires_grad_(asks), module.weight, module.bias)
            assert torch.equal(module(x), wanted)
            with torch.no_grad():
                assert torch.equal(module(x), wanted)
    assert len(taken) == 4


def test_a_layer_as_it_was_converted_gives_the_bits_it_gave(taken: list[Tensor]) -> None:
    plain = nn.Linear(700, 500)
    x = torch.randn(9, 700)
    assert torch.equal(wn.apply_weight_norm(copy.deepcopy(plain))(x), plain(x))
    assert len(taken) == 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (600,)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradients_are_those_of_float64(
    size: tuple[int, int], shape: tuple[int, ...], bias: bool, threads: int, taken: list[Tensor]
) -> None:
    torch.set_num_threads(threads)
    module = layer(*size, bias=bias)
    x = torch.randn(*shape, size[1], requires_grad=True)
    up = torch.randn(*shape, size[0])
    for _ in range(3):  # the memory of the first pass serves the others
        module.zero_grad()
        x.grad = None
        module(x).backward(up)
        y, theirs = reference(module, x)
        y.backward(up.double())
        for mine, other in zip(leaves(module, x), theirs, strict=True):
            assert mine.grad is not None
            assert other.grad is not None
            torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-4, atol=1e-4)
    assert len(taken) == 3


def test_a_backward_pass_under_autocast_is_in_the_types_of_the_forward_pass() -> None:
    module = layer(300, 520)
    x = torch.randn(3, 520, requires_grad=True)
    wanted = torch.autograd.grad(module(x).square().sum(), [x, *halves(module)])
    y = module(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, [x, *halves(module)])
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_a_gradient_that_somebody_keeps_stays_as_it_is(taken: list[Tensor]) -> None:
    module = layer(1100, 1000)
    x = torch.randn(4, 1000)
    module(x).sum().backward()
    kept = halves(module)[1].grad
    assert kept is not None
    before = kept.clone()
    part = kept[3]
    module.zero_grad()
    del kept
    module(2 * x).square().sum().backward()
    assert torch.equal(part, before[3])
    assert not torch.equal(halves(module)[1].grad[3], part)  # type: ignore[index]


def test_gradients_add_up_over_passes_and_uses(taken: list[Tensor]) -> None:
    module = layer(1100, 1000)
    xs = [torch.randn(4, 1000) for _ in range(3)]
    (module(xs[0]).square().sum() + module(xs[1]).square().sum()).backward()
    module(xs[2]).square().sum().backward()
    total = [torch.zeros(1), *(torch.zeros_like(h, dtype=torch.float64) for h in halves(module))]
    for x in xs:
        y, theirs = reference(module, x)
        y.square().sum().backward()
        total = [total[0], *(a + b.grad for a, b in zip(total[1:], theirs[1:3], strict=True))]  # type: ignore[operator]
    for half, wanted in zip(halves(module), total[1:], strict=True):
        torch.testing.assert_close(half.grad.double(), wanted, rtol=1e-4, atol=1e-3)  # type: ignore[union-attr]
    assert len(taken) == 3


def test_micro_batches_of_two_layers_of_one_shape() -> None:
    """What is only added to an older gradient is made in memory that the layers share."""
    torch.manual_seed(0)
    net = wn.apply_weight_norm(nn.Sequential(nn.Linear(1050, 1050), nn.Tanh(), nn.Linear(1050, 1050)))
    twin = copy.deepcopy(net).double()
    for _ in range(2):
        net.zero_grad()
        twin.zero_grad()
        for _ in range(3):
            x = torch.randn(4, 1050)
            net(x).square().sum().backward()
            twin(x.double()).square().sum().backward()
        for a, b in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-3)  # type: ignore[union-attr]


def test_a_graph_that_is_kept_gives_its_gradients_twice() -> None:
    module = layer(1100, 1000)
    y = module(torch.randn(4, 1000)).square().sum()
    y.backward(retain_graph=True)
    once = halves(module)[1].grad.clone()  # type: ignore[union-attr]
    y.backward()
    torch.testing.assert_close(halves(module)[1].grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_gradients_of_gradients() -> None:
    module = layer(300, 520)
    x = torch.randn(3, 520, requires_grad=True)
    mine = torch.autograd.grad(module(x).square().sum(), [x, *halves(module)], create_graph=True)
    sum(g.square().sum() for g in mine).backward()  # type: ignore[union-attr]
    y, theirs = reference(module, x)
    firsts = torch.autograd.grad(y.square().sum(), theirs[:3], create_graph=True)
    sum(g.square().sum() for g in firsts).backward()  # type: ignore[union-attr]
    for one, other in zip(leaves(module, x), theirs, strict=True):
        if other.grad is not None:
            scale = float(other.grad.abs().max())
            torch.testing.assert_close(one.grad.double() / scale, other.grad / scale, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


def test_a_batch_of_gradients() -> None:
    module = layer(300, 520)
    x = torch.randn(3, 520, requires_grad=True)
    ups = torch.randn(4, 3, 300)
    mine = torch.autograd.grad(module(x), [x, *halves(module)], ups, is_grads_batched=True)
    for k in range(4):
        one = torch.autograd.grad(module(x), [x, *halves(module)], ups[k])
        for a, b in zip(mine, one, strict=True):
            torch.testing.assert_close(a[k], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_what_is_frozen_gets_no_gradient(frozen: tuple[int, ...]) -> None:
    module = layer(300, 520)
    parts = [*halves(module), module.bias]
    for i in frozen:
        parts[i].requires_grad_(False)
    x = torch.randn(3, 520, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    for i, part in enumerate(parts):
        assert (part.grad is None) == (i in frozen)


@pytest.mark.parametrize("size", ["zeros", "huge"])
def test_rows_beyond_the_ordinary_take_the_long_way(size: str, taken: list[Tensor]) -> None:
    module = layer(300, 520)
    with torch.no_grad():
        halves(module)[1][5] *= 0.0 if size == "zeros" else 1e30
    x = torch.randn(3, 520)
    assert torch.equal(module(x), nn.functional.linear(x, compose(*halves(module), Axes((0,))), module.bias))
    module(x).sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in module.parameters())
    assert taken == []


@pytest.mark.filterwarnings("ignore")  # torch.jit and nested tensors are on their way out and in
def test_what_goes_the_common_way(taken: list[Tensor]) -> None:
    """Whoever sees, holds or changes the weight itself, and other types and settings."""
    module = layer(300, 520)
    x = torch.randn(3, 520)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    with torch.nn.utils.parametrize.cached():
        module(x)
    handle = module.parametrizations["weight"].register_forward_hook(lambda *_: None)  # type: ignore[index]
    module(x)
    handle.remove()
    with torch.no_grad():
        module(x)
    with torch.autograd.graph.save_on_cpu():
        module(x).sum().backward()
    others = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    torch.func.functional_call(module, others, (x,)).sum().backward()
    torch.func.vmap(module)(x)
    torch.func.grad(lambda w: module(w).sum())(x)
    torch.jit.trace(module, (x,))
    module(torch.nested.nested_tensor([x, x[:2]])).unbind()
    assert taken == []
    layer(300, 400)(torch.randn(3, 400))  # a small one
    assert taken == []
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module(torch.randn(3, 519))
    with pytest.raises(RuntimeError, match="dtype"):
        module(x.double())


def test_deferred_and_log_layers_go_the_common_way(taken: list[Tensor]) -> None:
    x = torch.randn(3, 520)
    for options in ({"mode": "deferred"}, {"magnitude": "log"}):
        net = wn.apply_weight_norm(nn.Sequential(nn.Linear(520, 300)), **options)  # type: ignore[arg-type]
        net(x).sum().backward()
    assert taken == []


def test_a_write_into_a_weight_handed_out_before_is_seen() -> None:
    module = layer(300, 520)
    w = module.weight
    with torch.no_grad():
        w.fill_(0.25)
    torch.testing.assert_close(module(torch.ones(1, 520)) - module.bias, torch.full((1, 300), 130.0))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant: bool) -> None:
    first, second = layer(520, 300), layer(300, 520, seed=1)
    x = torch.randn(3, 300, requires_grad=True)
    checkpoint(lambda x: second(first(x).tanh()), x, use_reentrant=reentrant).square().sum().backward()
    mine = [p.grad.clone() for p in (*first.parameters(), *second.parameters())]  # type: ignore[union-attr]
    for module in (first, second):
        module.zero_grad()
    second(first(x).tanh()).square().sum().backward()
    for a, p in zip(mine, (*first.parameters(), *second.parameters()), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_copies_and_files_work_as_the_original_does(taken: list[Tensor]) -> None:
    module = layer(300, 520)
    x = torch.randn(3, 520)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        taken.clear()
        assert torch.equal(twin(x), module(x))
        assert len(taken) == 2
        twin(x).sum().backward()
        assert halves(module)[1].grad is None
    folded = wn.fold_weight_norm(module)
    assert type(folded).forward is nn.Linear.forward


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_takes_the_steps_of_the_common_way(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    nets = [wn.apply_weight_norm(nn.Sequential(nn.Linear(400, 500), nn.Tanh(), nn.Linear(500, 400)))]
    nets.append(copy.deepcopy(nets[0]))
    steps = [optimizer(net.parameters(), lr=1e-3) for net in nets]
    for i in range(20):
        x = torch.randn(8, 400)
        for k, (net, step) in enumerate(zip(nets, steps, strict=True)):
            monkeypatch.setattr(subject, "LARGE_WEIGHT", (1 << 17) if k == 0 else (1 << 60))
            step.zero_grad(set_to_none=i % 2 == 0)
            (net(x) - x).square().mean().backward()
            step.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_compiled_layers(backend: str, taken: list[Tensor]) -> None:
    module = layer(300, 520)
    x = torch.randn(3, 520)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), nn.functional.linear(x, module.weight, module.bias))
    compiled(x).sum().backward()
    assert halves(module)[1].grad is not None
    assert taken == []
