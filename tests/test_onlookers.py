"""Somebody stands between torch's operations and memory, or writes to that from another process."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import wnsurgery as wn
from wnsurgery.onlookers import aside, is_intercepted

MODES: list[Any] = ["parametrized", "deferred"]


class ReadsTwice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight).tanh(), self.weight, self.bias)


def perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def save_all(*_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


def save_but_tanh(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    again = operation == torch.ops.aten.tanh.default
    return CheckpointPolicy.MUST_RECOMPUTE if again else CheckpointPolicy.MUST_SAVE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width", [12, 400, 800])
@pytest.mark.parametrize("policy", [save_all, save_but_tanh])
@pytest.mark.parametrize("make", [lambda width: ReadsTwice(width, width), perceptron])
def test_selective_checkpoints(make: Any, policy: Any, width: int, mode: Any) -> None:
    """Which give back what operations gave before: so that these must be the same ones, without kernels' writes."""
    torch.manual_seed(0)
    net = wn.apply_weight_norm(make(width), mode=mode)
    x = torch.randn(3, width, requires_grad=True)
    context = functools.partial(create_selective_checkpoint_contexts, policy)
    (net(x).square().sum() + net(2 * x).square().sum()).backward()
    wanted = [p.grad for p in net.parameters()]
    for _ in range(2):
        net.zero_grad()
        ys = [checkpoint(net, x * k, use_reentrant=False, context_fn=context) for k in (1, 2)]
        sum(y.square().sum() for y in ys).backward()
        for one, other in zip(wanted, net.parameters(), strict=True):
            assert one is not None
            torch.testing.assert_close(other.grad, one, rtol=1e-5, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [12, 400, 1024])
@pytest.mark.parametrize("before", [False, True])
def test_fake_tensors(width: int, dtype: torch.dtype, mode: Any, before: bool) -> None:
    torch.manual_seed(0)
    net = wn.apply_weight_norm(nn.Linear(width, width).to(dtype), mode=mode)
    if before:
        net(torch.ones(4, width, dtype=dtype)).sum().backward()
        net.zero_grad()
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = net(torch.randn(4, width, dtype=dtype))
        assert isinstance(y, FakeTensor)
        with torch.no_grad():
            assert net(torch.randn(4, width, dtype=dtype)).shape == (4, width)
    net(torch.ones(4, width, dtype=dtype)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("width", "magnitude", "dtype"),
    [
        (12, "linear", torch.float32),
        (400, "linear", torch.float32),
        (800, "linear", torch.float32),
        (12, "log", torch.float32),
        (12, "linear", torch.bfloat16),
        (12, "linear", torch.float64),
    ],
)
def test_recorded_operations_are_those_of_the_weight(
    width: int, magnitude: Any, dtype: torch.dtype, grad: bool
) -> None:
    torch.manual_seed(0)
    net: Any = wn.apply_weight_norm(nn.Linear(width, width).to(dtype), magnitude=magnitude)
    x = torch.randn(4, width).to(dtype)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            net(x)
        recorded = make_fx(functools.partial(net))(x)
        assert torch.equal(recorded(x), net(x))
        with torch.no_grad():
            net.parametrizations.weight.original0.mul_(1.5)
        assert torch.equal(recorded(x), net(x))


def test_who_stands_between() -> None:
    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    class Passive(Looks):
        passive = True

    assert not is_intercepted()
    with Passive():  # type: ignore[no-untyped-call]
        assert not is_intercepted()
        with Looks():  # type: ignore[no-untyped-call]
            assert is_intercepted()
            with aside():
                assert not is_intercepted()
                assert not torch.is_grad_enabled()
        assert not is_intercepted()


def counted(net: nn.Module, x: Tensor) -> Tensor:
    with FlopCounterMode(display=False):
        return net(x)  # type: ignore[no-any-return]


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "vmap": lambda net, x: torch.vmap(net)(x),
    "jvp": lambda net, x: torch.func.jvp(net, (x,), (x,))[0],
    "grad": lambda net, x: torch.func.grad(lambda x: (net(x).sum(), net(x)), has_aux=True)(x)[1],
    "jacrev": lambda net, x: torch.func.jacrev(lambda x: (net(x), net(x)), has_aux=True)(x)[1],
    "a mode": counted,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward mode uses it
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("written", ["a weight that is held", "a weight's data", "g", "v"])
def test_writes_are_seen_inside_of_transforms_and_modes(written: str, transform: str, dtype: Any, mode: Any) -> None:
    """And are kept: the next use finds them, too."""
    torch.manual_seed(0)
    net: Any = wn.apply_weight_norm(nn.Linear(6, 3), mode=mode).to(dtype)
    x, pair = torch.randn(4, 6, dtype=dtype), net.parametrizations.weight._parameters
    net(x)
    held = net.weight
    with torch.no_grad():
        if written == "g":
            pair["original0"].mul_(2)
        elif written == "v":
            pair["original1"][:, 0].mul_(2)
        elif written == "a weight's data":
            held.data.mul_(2)
        else:
            held.mul_(2)
    expected = nn.functional.linear(x, wn.compose(pair["original0"], pair["original1"]), net.bias)
    if written.startswith("a weight"):
        expected = 2 * (expected - net.bias) + net.bias
    torch.testing.assert_close(TRANSFORMS[transform](net, x), expected)
    torch.testing.assert_close(net(x), expected)


def test_a_gradient_that_waits_is_read_inside_of_a_transform() -> None:
    net: Any = wn.apply_weight_norm(nn.Linear(6, 3), mode="deferred")
    v, x = net.parametrizations.weight.original1, torch.randn(4, 6)
    net(x).square().sum().backward()
    seen: list[Tensor] = []

    def f(x: Tensor) -> Tensor:
        seen.append(v.grad)
        return x.sum()

    torch.func.grad(f)(x)
    twin = wn.set_weight_norm_mode(copy.deepcopy(net), "parametrized")
    twin.zero_grad()
    twin(x).square().sum().backward()
    torch.testing.assert_close(seen[0], twin.parametrizations.weight.original1.grad)


@pytest.mark.parametrize("mode", MODES)
def test_memory_that_other_processes_write_to(mode: Any) -> None:
    """A write that leaves no count, to rows that are not looked at, reaches the next use."""
    net: Any = wn.apply_weight_norm(nn.Embedding(5000, 64), include=nn.Embedding, mode=mode)
    net.share_memory()
    g, v = (net.parametrizations.weight._parameters[name] for name in ("original0", "original1"))
    ids = torch.arange(10, 20)
    with torch.no_grad():
        before = [net(ids).clone() for _ in range(3)][-1]
        g.numpy()[10:20] *= 2
        v.numpy()[10:20] += 1
        after = net(ids)
    assert torch.equal(after, wn.compose(g, v)[10:20])
    assert not torch.equal(after, before)
