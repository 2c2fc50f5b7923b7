"""What a layer does with its own weight in training: nobody watches it, and whoever wants to see it still does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import wnsurgery as wn

LAYERS: list[tuple[Callable[[], nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Linear(6, 5), (2, 6)),
    (lambda: nn.Linear(600, 500), (2, 600)),
    (lambda: nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 8)),
    (lambda: nn.Conv1d(256, 300, 3), (2, 256, 8)),
    (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False), (2, 4, 8, 8)),
    (lambda: nn.Conv3d(2, 3, 2, dilation=2), (2, 2, 4, 4, 4)),
    (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 8)),
]


def pair_of(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A plain layer and the same layer converted."""
    torch.manual_seed(0)
    plain = make()
    twin = wn.apply_weight_norm(nn.Sequential(make()))[0]
    with torch.no_grad():
        twin.weight = plain.weight.detach()
        if plain.bias is not None:
            twin.bias.copy_(plain.bias)
    return plain, twin


def entry(layer: nn.Module) -> Any:
    return layer.parametrizations["weight"]  # type: ignore[index]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_outputs_and_gradients_are_those_of_the_plain_layer(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    plain, layer = pair_of(make)
    for _ in range(3):
        x = torch.randn(shape)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        layer.zero_grad()
        plain.zero_grad()
        y, wanted = layer(a), plain(b)
        assert torch.equal(y, wanted)
        y.square().sum().backward()
        wanted.square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)
        g, v = (half.detach().double().requires_grad_() for half in entry(layer).pair())
        dims = [d for d in range(v.ndim) if g.shape[d] == 1]
        (g * v / v.square().sum(dims, keepdim=True).sqrt()).backward(plain.weight.grad.double())  # type: ignore[union-attr]
        for half, exact in zip(entry(layer).pair(), (g, v), strict=True):
            scale = float(exact.grad.abs().max())  # type: ignore[union-attr]
            torch.testing.assert_close(half.grad.double() / scale, exact.grad / scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "shape"), LAYERS[:-1], ids=lambda value: str(value) if isinstance(value, tuple) else ""
)
def test_the_layers_own_weight_is_not_watched_but_the_users_is(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    _, layer = pair_of(make)
    for _ in range(3):
        layer(torch.randn(shape)).sum().backward()
        assert "_handed_out" not in entry(layer).__dict__
    w = layer.weight
    with torch.no_grad():
        w.fill_(0.5)
    layer(torch.randn(shape))
    g, v = entry(layer).pair()
    dims = [d for d in range(v.ndim) if g.shape[d] == 1]
    torch.testing.assert_close(g * v / v.square().sum(dims, keepdim=True).sqrt(), torch.full_like(v, 0.5))


def test_a_weight_the_user_holds_across_the_layers_own_uses() -> None:
    _, layer = pair_of(LAYERS[0][0])
    x = torch.randn(2, 6)
    for _ in range(3):
        w = layer.weight
        y = layer(x)
        (y.sum() + w.sum()).backward()
        with torch.no_grad():
            for p in layer.parameters():
                p.sub_(p.grad, alpha=0.1)
        layer.zero_grad()
        g, v = entry(layer).pair()
        torch.testing.assert_close(layer.weight, g * v / v.norm(dim=1, keepdim=True))


class _Doubled(nn.Conv1d):
    """A convolution with a say in how its weight is used."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        self.seen = weight
        return super()._conv_forward(input, 2 * weight, bias)


def test_a_subclass_with_a_say_in_the_matter_is_asked() -> None:
    torch.manual_seed(0)
    plain = _Doubled(4, 6, 3)
    layer = wn.apply_weight_norm(nn.Sequential(_Doubled(4, 6, 3)))[0]
    layer.weight = plain.weight.detach()
    with torch.no_grad():
        layer.bias.copy_(plain.bias)
    x = torch.randn(2, 4, 8)
    assert torch.equal(layer(x), plain(x))
    with torch.no_grad():
        layer.seen.fill_(0.25)
        assert torch.equal(layer.weight, torch.full((6, 4, 3), 0.25))


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_hooks_caches_and_modes_see_the_weight(index: int) -> None:
    make, shape = LAYERS[index]
    _, layer = pair_of(make)
    x = torch.randn(shape)
    layer(x).sum().backward()
    wanted = layer.weight.detach().clone()
    seen: list[Tensor] = []

    handle = entry(layer).register_forward_hook(lambda _module, _inputs, w: seen.append(w))
    layer(x)
    handle.remove()
    assert len(seen) == 1

    with parametrize.cached():
        layer(x)
        seen.append(layer.weight)
        assert layer.weight is seen[-1]

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (nn.functional.linear, nn.functional.conv1d, torch.conv1d, torch._C._nn.linear):
                seen.append(args[1])
            return function(*args, **(kwargs or {}))

    with Functions():
        layer(x)
    assert len(seen) == 3

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.extend(a for a in args if isinstance(a, Tensor) and a.numel() == wanted.numel() and a.dim() > 1)
            return function(*args, **(kwargs or {}))

    with Operations():
        layer(x)
    assert len(seen) > 3
    assert torch.equal(seen[0], wanted) and torch.equal(seen[1], wanted) and torch.equal(seen[2], wanted)


def test_a_hook_on_the_users_weight_does_not_see_the_layers_own() -> None:
    torch.manual_seed(0)
    net = wn.apply_weight_norm(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    for _ in range(4):
        net(torch.randn(2, 6)).sum().backward()
    uses: list[Tensor] = []
    w = net[0].weight
    w.register_hook(uses.append)
    x = torch.randn(2, 6)
    net(x).sum().backward()
    assert uses == []  # it took no part
    (net[0].weight * 2 + w).sum().backward()
    assert len(uses) == 1 and torch.equal(uses[0], torch.ones(6, 6))


class _WithBias(nn.Linear):
    @property
    def bias(self) -> Any:  # type: ignore[override]
        if "bias" not in self._parameters:
            raise AttributeError("bias")
        return self._parameters["bias"] * 2  # type: ignore[operator]


class _Looking(nn.Linear):
    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return found * 2 if name == "bias" else found


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", [_WithBias, _Looking])
def test_a_class_with_a_say_in_its_bias_is_asked(kind: type[nn.Linear], grad: bool) -> None:
    """A layer takes its bias by the short way only where `layer.bias` would find the same."""
    layer, x = wn.apply_weight_norm(nn.Sequential(kind(3, 2)))[0], torch.randn(2, 3)
    for _ in range(3):
        with torch.set_grad_enabled(grad):
            assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer._parameters["bias"] * 2))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("make", "shape"), [LAYERS[0], LAYERS[2]])
def test_a_bias_put_in_the_others_place_is_used(
    make: Callable[[], nn.Module], shape: tuple[int, ...], grad: bool
) -> None:
    """Whoever replaces the bias, as functional_call, replicas, other parametrizations and old-style hooks do, is heard
    at the next pass."""
    plain, layer = pair_of(make)
    x, other = torch.randn(shape), torch.randn_like(plain.bias)  # type: ignore[call-overload]

    def output(module: nn.Module) -> Tensor:
        with torch.set_grad_enabled(grad):
            return module(x)  # type: ignore[no-any-return]

    usual, wanted = output(plain), torch.func.functional_call(plain, {"bias": other}, x)
    for _ in range(2):
        assert torch.equal(output(layer), usual)
    with torch.set_grad_enabled(grad):
        assert torch.equal(torch.func.functional_call(layer, {"bias": other}, x), wanted)
    layer.__dict__["bias"] = other
    assert torch.equal(output(layer), wanted)
    del layer.__dict__["bias"]
    held = layer._parameters.pop("bias")
    layer.__dict__["bias"] = other
    assert torch.equal(output(layer), wanted)
    del layer.__dict__["bias"]
    layer._parameters["bias"] = held
    parametrize.register_parametrization(layer, "bias", nn.Tanh())
    with torch.no_grad():
        assert torch.equal(layer.bias, held.tanh())
    plain.bias = nn.Parameter(held.detach().tanh())
    assert torch.equal(output(layer), output(plain))
