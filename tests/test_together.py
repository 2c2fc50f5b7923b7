"""Weights computed together have the bits, and their gradients the values, of weights computed one by one."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wnsurgery as wn
from wnsurgery.reparam import Axes, compose


def nets() -> nn.Module:
    """Layers small and large, of every kind of axis, one with a row of zeros, one frozen, one used twice."""
    torch.manual_seed(0)
    layers = [nn.Linear(24, 24), nn.Linear(24, 200), nn.Linear(200, 300), nn.Linear(300, 24), nn.Conv1d(1, 6, 5)]
    model = nn.Sequential(*layers, nn.ConvTranspose1d(6, 4, 4), nn.Conv2d(1, 3, 1), nn.Linear(23, 7))
    with torch.no_grad():
        model[3].weight[2].zero_()  # type: ignore[index]
        model[6].weight.mul_(1e-30)  # type: ignore[operator]
    return model


def passed(model: Any, x: Tensor) -> Tensor:
    x = model[0](torch.tanh(model[0](x)))
    x = model[3](torch.tanh(model[2](torch.tanh(model[1](x)))))
    x = model[5](torch.tanh(model[4](x[:, None])))
    return model[7](model[6](x[:, None]).mean((1, 2)))[:, :7]  # type: ignore[no-any-return]


def converted(**options: Any) -> nn.Module:
    model = wn.apply_weight_norm(nets(), **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("original0"):
                p.mul_(torch.linspace(0.5, 1.7, p.numel()).view_as(p))
    return model


def batch(seed: int) -> Tensor:
    return torch.randn(5, 24, generator=torch.Generator().manual_seed(seed))


def alone(model: nn.Module) -> nn.Module:
    """A copy whose weights know nothing of each other, as after loading a pickle."""
    twin: nn.Module = pickle.loads(pickle.dumps(model))
    return twin


@pytest.mark.parametrize("mode", ["parametrized", "deferred"])
def test_weights_in_training_are_those_of_compose(mode: Any) -> None:
    """After every step each weight of the net has the bits of `compose` for its own pair, zero and tiny rows too."""
    model = converted(mode=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(6):
        seen: dict[int, Tensor] = {}
        for i, layer in enumerate(model.children()):
            seen[i] = layer.weight.detach().clone()  # type: ignore[operator]
        passed(model, batch(step)).square().mean().backward()
        for i, layer in enumerate(model.children()):
            entry: Any = layer.parametrizations.weight  # type: ignore[union-attr]
            expected = compose(entry.original0, entry.original1, entry[0].axes)
            assert torch.equal(seen[i].view(torch.int32), expected.detach().view(torch.int32)), i
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("mode", ["parametrized", "deferred"])
def test_together_and_alone_train_alike(mode: Any) -> None:
    """Losses and gradients of a net and of its copy without company agree, with steps, frozen and skipped layers."""
    model = converted()
    model[1].parametrizations.weight.original0.requires_grad_(False)  # type: ignore[index,union-attr]
    twin = alone(model)
    wn.set_weight_norm_mode(model, mode)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, twin)]
    for step in range(5):
        losses = [passed(m, batch(step)).square().mean() for m in (model, twin)]
        for loss in losses:
            loss.backward()
        assert torch.allclose(losses[0], losses[1], rtol=1e-5)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None and q.grad is not None:
                assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5 * float(q.grad.abs().max())), name
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_nothing_prepared_is_stale() -> None:
    """Writes of any kind between two uses are seen, in whatever order layers are used."""
    model = converted()
    first, second = model[0], model[1]

    def expected(layer: Any) -> Tensor:
        entry = layer.parametrizations.weight
        return compose(entry.original0, entry.original1, Axes((0,)))

    def write(layer: Any, how: str) -> None:
        g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
        with torch.no_grad():
            if how == "in place":
                v.mul_(-1.5)
            elif how == "data":
                v.data[0, 0] += 1.0
            elif how == "swap":
                v.data = v.data * 0.5 + 1.0
            elif how == "g":
                g.data[3] *= 2.0
            else:
                layer.load_state_dict({k: t + 0.25 for k, t in layer.state_dict().items()})

    for how in ("in place", "data", "swap", "g", "load"):
        for order in ((first, second), (second, first), (first, first, second)):
            for layer in order:
                assert torch.equal(layer.weight, expected(layer))  # type: ignore[arg-type]
            write(second, how)
            for layer in order:
                assert torch.equal(layer.weight, expected(layer)), how  # type: ignore[arg-type]


def test_a_changed_type_is_followed() -> None:
    """After .double(), .half() and back, weights have the type and values of their pairs."""
    model = converted()
    x = batch(0)
    passed(model, x)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        assert passed(model, x.to(dtype)).dtype == dtype
        assert all(layer.weight.dtype == dtype for layer in model.children())  # type: ignore[union-attr]


def test_copies_keep_their_own_company() -> None:
    """A deep copy computes its weights together, apart from its original's."""
    model = converted()
    twin = copy.deepcopy(model)
    nets_ = [{id(layer.parametrizations.weight._preparation) for layer in m.children()} for m in (model, twin)]  # type: ignore[union-attr]
    assert len(nets_[0]) == len(nets_[1]) == 1
    assert nets_[0] != nets_[1]
    with torch.no_grad():
        twin[0].parametrizations.weight.original1.mul_(3.0).add_(1.0)  # type: ignore[index,union-attr]
    before = model[0].weight.clone()  # type: ignore[index]
    assert not torch.equal(twin[0].weight, before)  # type: ignore[index]
    assert torch.equal(model[0].weight, before)  # type: ignore[index]


def test_second_derivatives_of_weights_computed_together() -> None:
    """`gradcheck` and `gradgradcheck` style: derivatives of derivatives are those of the plain formula."""
    model = converted()
    layer: Any = model[0]
    for _ in range(2):
        layer.weight, model[1].weight  # type: ignore[index]
    w = layer.weight
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    reference = g * v / v.norm(dim=1, keepdim=True)
    found = []
    for weight in (w, reference):
        (first,) = torch.autograd.grad(weight.pow(3).sum(), v, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (g, v)))
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5)
