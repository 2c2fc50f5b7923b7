"""A layer's own use of its weight in training, by the shortest way: the same bits and gradients as by any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import wnsurgery as wn
from wnsurgery.mechanism import WeightNormList
from wnsurgery.reparam import compose
from wnsurgery.straight import Straight

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 5),
    "medium": lambda: nn.Linear(400, 400),
    "convolution": lambda: nn.Conv2d(3, 4, 3),
    "large convolution": lambda: nn.Conv1d(500, 400, 3),
    "transposed": lambda: nn.ConvTranspose1d(3, 4, 3),
}
INPUTS: dict[str, tuple[int, ...]] = {
    "linear": (2, 6),
    "medium": (2, 400),
    "convolution": (2, 3, 5, 5),
    "large convolution": (1, 500, 4),
    "transposed": (2, 3, 5),
}


def entry(layer: Any) -> Any:
    return layer.parametrizations["weight"]


def trained(layer: nn.Module, x: Tensor, steps: int = 2) -> Any:
    """The layer under weight norm, some steps into its training."""
    torch.manual_seed(0)
    made = wn.apply_weight_norm(layer)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        made(x).square().sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    return made


@pytest.mark.parametrize("name", LAYERS)
def test_bits_and_gradients(name: str, straight: list[bool]) -> None:
    """Of each kind of layer: w is `compose`'s to the bit, gradients are those of float64."""
    x = torch.randn(INPUTS[name])
    layer = trained(LAYERS[name](), x)
    straight.clear()
    w = compose(*entry(layer).pair(), entry(layer)[0].axes)
    plain = wn.fold_weight_norm(copy.deepcopy(layer))
    straight.clear()
    y = layer(x)
    assert straight == [True]
    assert torch.equal(y, plain(x))
    assert torch.equal(w, plain.weight)
    y.square().sum().backward()
    wide = copy.deepcopy(layer).double()
    wide.zero_grad()
    wide(x.double()).square().sum().backward()
    for mine, theirs in zip(entry(layer).pair(), entry(wide).pair(), strict=True):
        assert (mine.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max()


CHANGES: dict[str, Callable[[Any], None]] = {
    "in place": lambda one: one.original1.mul_(torch.linspace(1, 2, 6)),
    "through data": lambda one: one.original0.data.mul_(2),
    "a single element through data": lambda one: one.original1.data[2, 3:4].mul_(5),
    "other memory": lambda one: setattr(one.original1, "data", one.original1.data * torch.linspace(1, 2, 6)),
    "other order": lambda one: setattr(one.original1, "data", torch.randn(6, 5).t()),
    "one magnitude for all": lambda one: setattr(one.original0, "data", one.original0.data[:1].expand(5, 1)),
    "an assignment": lambda one: one.right_inverse(torch.randn(5, 6)),
    "a row of zeros": lambda one: (one.original1[1].zero_(), one.original0[1].zero_())[0],
    "a huge row": lambda one: one.original1[1].mul_(1e30),
    "a step": lambda one: torch.optim.SGD([one.original0], lr=1.0, weight_decay=0.5, fused=True).step(),
    "loading": lambda one: one.load_state_dict({k: 2 * v for k, v in one.state_dict().items()}),
    "bfloat16": lambda one: one.to(torch.bfloat16).to(torch.float32),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_of_the_pair_is_missed(change: str, straight: list[bool]) -> None:
    """Whatever is done to g and v between two uses, the second computes what they are then."""
    x = torch.randn(2, 6)
    layer = trained(nn.Linear(6, 5), x)
    layer(x)
    assert straight[-1]
    one = entry(layer)
    one.original0.grad = torch.ones_like(one.original0)
    with torch.no_grad():
        CHANGES[change](one)
    w = compose(*one.pair(), one[0].axes)
    y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, w, layer.bias))
    y.sum().backward()
    assert torch.isfinite(one.original1.grad).all()


@pytest.mark.filterwarnings("ignore")  # torch's own, of forward mode
def test_others_who_look_on_see_the_weight_computed(straight: list[bool]) -> None:
    """Hooks on the rule or the list, a parametrization on top, forward and inference mode, and function transforms."""
    x = torch.randn(2, 6)
    layer = trained(nn.Linear(6, 5), x)
    layer(x)
    assert straight.pop()
    wanted = layer(x).detach()
    one = entry(layer)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        assert forward_ad.unpack_dual(layer(dual)).tangent is not None
    with torch.inference_mode(), torch.enable_grad():
        assert torch.equal(layer(x), wanted)
    state = dict(layer.named_parameters())
    grads = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sum())(state)
    assert set(grads) == set(state)
    jacobian = torch.func.jacrev(lambda a: layer(a).sum(0))(x)
    assert jacobian.shape == (5, 2, 6)
    seen: list[Tensor] = []
    handle = one[0].register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(layer(x), wanted)
    assert len(seen) == 1
    handle.remove()
    handle = one.register_forward_hook(lambda module, args, output: output * 2)
    assert torch.equal(layer(x) - layer.bias, (nn.functional.linear(x, 2 * compose(*one.pair(), one[0].axes))))
    handle.remove()
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
    assert torch.equal(layer(x), nn.functional.linear(x, compose(*one.pair(), one[0].axes).tanh(), layer.bias))


@pytest.mark.parametrize("keep", [lambda grad: grad, lambda grad: grad.detach(), lambda grad: grad[:3]])
def test_a_gradient_that_somebody_holds_is_not_written_over(keep: Any, straight: list[bool]) -> None:
    """That of a weight large enough for dL/dv to take its place where nobody does."""
    x = torch.randn(2, 400)
    layer: Any = trained(nn.Linear(400, 400), x)
    held: list[Tensor] = []
    w = layer.weight
    assert straight[-1]
    w.register_hook(lambda grad: held.append(keep(grad)))
    nn.functional.linear(x, w).square().sum().backward()
    wanted = 2 * nn.functional.linear(x, w.detach()).t() @ x
    torch.testing.assert_close(held[0], wanted[: len(held[0])], rtol=1e-5, atol=1e-4)
    assert not torch.equal(held[0], entry(layer).original1.grad[: len(held[0])])


def test_a_gradient_that_nobody_holds_gives_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[tuple[int, int]] = []
    real = Straight._by_kernel

    def by_kernel(self: Any, grad: Tensor, norms: Tensor, grad_v: Tensor) -> Any:
        places.append((grad.data_ptr(), grad_v.data_ptr()))
        return real(self, grad, norms, grad_v)

    monkeypatch.setattr(Straight, "_by_kernel", by_kernel)
    x = torch.randn(2, 400)
    layer = trained(nn.Linear(400, 400), x, steps=3)
    places.clear()
    layer(x).square().sum().backward()
    assert places
    assert all(grad == grad_v for grad, grad_v in places)


def test_gradients_of_micro_batches_are_those_of_one(straight: list[bool]) -> None:
    x = torch.randn(6, 6)
    layer = trained(nn.Linear(6, 5), x)
    twin = copy.deepcopy(layer)
    for part in x.split(1):
        layer(part).square().sum().backward()
    twin(x).square().sum().backward()
    for mine, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert straight


def test_a_graph_offloaded_or_checkpointed(straight: list[bool]) -> None:
    """What a node has saved may come back as other tensors."""
    x = torch.randn(2, 6)
    layer = trained(nn.Linear(6, 5), x)
    plain = copy.deepcopy(layer)
    with torch.autograd.graph.save_on_cpu():
        y = layer(x)
    y.square().sum().backward()
    plain(x).square().sum().backward()
    for mine, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert straight[-1]


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn", "attention"])
def test_layers_that_read_their_weights_several_times_compute_each_once(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    kinds: dict[str, Callable[[], nn.Module]] = {
        "lstm": lambda: nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True),
        "gru": lambda: nn.GRU(6, 5),
        "rnn": lambda: nn.RNN(6, 5),
        "attention": lambda: nn.MultiheadAttention(6, 2, batch_first=True),
    }
    layer = kinds[kind]()
    plain = copy.deepcopy(layer)
    wn.apply_weight_norm(layer)
    x = torch.randn(2, 3, 6)
    arguments = (x, x, x) if kind == "attention" else (x,)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (layer, wn.apply_weight_norm(plain))]
    count = sum(isinstance(m, WeightNormList) for m in layer.modules())
    calls: list[int] = []
    real = WeightNormList.in_training

    def counted(self: Any, *, private: bool = False) -> Tensor:
        calls.append(id(self))
        return real(self, private=private)

    for _ in range(4):
        calls.clear()
        monkeypatch.setattr(WeightNormList, "in_training", counted)
        optimizers[0].zero_grad()
        layer(*arguments)[0].square().sum().backward()
        optimizers[0].step()
        monkeypatch.undo()
        assert len(calls) == len(set(calls)) == count
        optimizers[1].zero_grad()
        with torch.nn.utils.parametrize.cached():  # torch's own way of computing each once
            plain(*arguments)[0].square().sum().backward()
        optimizers[1].step()
    for mine, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        before = layer(*arguments)[0]
    assert torch.equal(before, wn.fold_weight_norm(copy.deepcopy(layer))(*arguments)[0])


def test_a_failed_pass_leaves_nothing_behind() -> None:
    """The next pass computes its weights anew."""
    layer: Any = wn.apply_weight_norm(nn.LSTM(6, 5))
    x = torch.randn(2, 3, 6)
    layer(x)
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 3, 7))
    with torch.no_grad():
        for half in layer.parametrizations["weight_ih_l0"].parameters():
            half.mul_(2)
    wanted = wn.fold_weight_norm(copy.deepcopy(layer))(x)[0]
    assert torch.equal(layer(x)[0], wanted)


@pytest.mark.parametrize("name", LAYERS)
def test_evaluation_once_a_step_goes_straight_and_keeps_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a discriminator that looks at one fake batch a step; with a hook on the rule, or a row of zeros, not."""
    x = torch.randn(INPUTS[name])
    layer = trained(LAYERS[name](), x)
    made: list[bool] = []
    real = Straight.without_graph

    def without_graph(self: Straight, *arguments: Any) -> Tensor | None:
        w = real(self, *arguments)
        made.append(w is not None)
        return w

    monkeypatch.setattr(Straight, "without_graph", without_graph)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)

    def step() -> None:
        layer(x).square().sum().backward()
        optimizer.step()
        wanted = wn.fold_weight_norm(copy.deepcopy(layer))(x)
        with torch.no_grad():
            assert torch.equal(layer(x), wanted)

    for _ in range(4):
        step()
    usual = name != "transposed"  # which reads its weight as any forward pass does
    assert made == ([True] * 3 if usual else [])
    assert entry(layer)._kept is None or not usual
    with torch.no_grad():
        layer(x)
        layer(x)
    assert entry(layer)._kept is not None
    seen: list[Any] = []
    entry(layer)[0].register_forward_hook(lambda *given: seen.append(given))
    step()
    assert len(made) == 3 * usual and seen
    entry(layer)[0]._forward_hooks.clear()
    with torch.no_grad():
        entry(layer).original1[0] = 0
    step()
    assert len(made) <= 4 and all(made[:3])
