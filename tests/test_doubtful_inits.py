"""Data-dependent initialisation of what is not as it seems: layers with a forward pass of their own, buffers that come
and go, loaders that use their memory again, deviations that no g can undo."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wnsurgery as wn
from wnsurgery.errors import InputError


class Sine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(3 * super().forward(x))


class Equalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 0.3 * self.weight, 0.01 * self.bias)


class Residual(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Clamped(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-0.5, 0.5)


class Padded(nn.Conv1d):
    """Causal: its forward pass is its own, and linear."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (2, 0)))


class Standardised(nn.Conv1d):
    """Of which g and v are another matter, but g scales as ever."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, 1.0 * weight, bias)


SETTINGS = [(memory, count) for memory in ("spill", "live", "recompute") for count in (1, 2)]


def pieces(x: Tensor, count: int) -> Any:
    return x if count == 1 else [x[:-10], x[-10:]]


@pytest.mark.parametrize(("memory", "count"), SETTINGS)
@pytest.mark.parametrize("magnitude", ["linear", "log"])
@pytest.mark.parametrize("kind", [Sine, Equalised, Residual])
def test_a_forward_of_its_own_that_is_not_linear(kind: Any, magnitude: Any, memory: Any, count: int) -> None:
    """It is left as it was and named; the layer after it is set for what really reaches it."""
    torch.manual_seed(0)
    x = torch.randn(400, 9)
    net: Any = wn.apply_weight_norm(nn.Sequential(kind(9, 9), nn.Linear(9, 9)), magnitude=magnitude)
    before = copy.deepcopy(net[0].state_dict())
    report = wn.data_dependent_init(net, pieces(x, count), memory=memory)
    assert [skip.name for skip in report.left] == ["0.weight"]
    assert "its own forward pass" in report.left[0].reason
    assert all(torch.equal(before[key], value) for key, value in net[0].state_dict().items())
    with torch.no_grad():
        y = net(x)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(9), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.mean(0), torch.zeros(9), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("memory", "count"), SETTINGS)
@pytest.mark.parametrize("kind", [Padded, Standardised])
def test_a_forward_of_its_own_that_is_linear(kind: Any, memory: Any, count: int, grad: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 3, 30)
    net: Any = wn.apply_weight_norm(nn.Sequential(kind(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3)))
    forward = (lambda model, batch: torch.enable_grad()(model)(batch)) if grad else None
    report = wn.data_dependent_init(net, pieces(x, count), memory=memory, forward=forward)
    assert not report.left
    with torch.no_grad():
        for y in (net[0](x), net(x)):
            torch.testing.assert_close(y.std((0, 2), correction=0), torch.ones(y.shape[1]), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(y.mean((0, 2)), torch.zeros(y.shape[1]), rtol=1e-4, atol=1e-4)


def test_a_clamp_is_seen_and_one_put_on_the_module_too() -> None:
    torch.manual_seed(0)
    net: Any = wn.apply_weight_norm(nn.Sequential(Clamped(3, 4, 3), nn.Conv1d(4, 2, 3)))
    net[1].forward = lambda x: net[1]._conv_forward(x, net[1].weight, net[1].bias).tanh()
    report = wn.data_dependent_init(net, torch.randn(40, 3, 30))
    assert [skip.name for skip in report.left] == ["0.weight", "1.weight"]


def test_half_precision_is_no_reason_for_doubt() -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        net = wn.apply_weight_norm(Padded(3, 4, 3).to(dtype))
        assert not wn.data_dependent_init(net, torch.randn(40, 3, 30).to(dtype)).left


@pytest.mark.parametrize(
    ("dtype", "options", "small"),
    [
        (torch.float32, {}, 1e-40),
        (torch.float32, {"magnitude": "log"}, 1e-40),
        (torch.float16, {}, 1e-6),
        (torch.float16, {"magnitude_dtype": torch.float16}, 1e-6),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_deviations_that_no_g_can_undo(dtype: torch.dtype, options: Any, small: float, count: int) -> None:
    torch.manual_seed(0)
    net = wn.apply_weight_norm(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(dtype), **options)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match=r"0\.weight: .* vary so little"):
        wn.data_dependent_init(net, pieces((torch.randn(500, 4) * small).to(dtype), count))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


class Keeps(nn.Module):
    """Buffers that a forward pass makes, fills, enlarges and gives another type."""

    cache: Tensor | None
    grow: Tensor
    kind: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("cache", None)
        self.register_buffer("grow", torch.arange(2.0))
        self.register_buffer("kind", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = x.mean(0)
        self.register_buffer("new", x[:1], persistent=False)
        self.grow.resize_(5).fill_(1)
        self.kind = self.kind.double()
        return self.layer(x - self.cache)  # type: ignore[no-any-return]


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_are_as_they_were(fails: bool) -> None:
    net = wn.apply_weight_norm(Keeps())
    before, grow = copy.deepcopy(net.state_dict()), net.grow

    def forward(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        if fails:
            raise ValueError("no")

    if fails:
        with pytest.raises(InputError):
            wn.data_dependent_init(net, torch.randn(5, 4), forward=forward)
        assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    else:
        wn.data_dependent_init(net, torch.randn(5, 4), forward=forward)
    assert net.cache is None
    assert net.grow is grow
    assert grow.tolist() == [0, 1]
    assert net.kind.dtype == torch.float32
    assert list(net._buffers) == ["cache", "grow", "kind"]
    assert net.state_dict().keys() == before.keys()
    assert not net._non_persistent_buffers_set


@pytest.mark.parametrize("memory", ["spill", "live", "recompute"])
@pytest.mark.parametrize("pack", [lambda x: x, lambda x: {"input": x}, lambda x: (x, "label")])
def test_a_loader_that_uses_its_memory_again(pack: Any, memory: Any) -> None:
    net = wn.apply_weight_norm(nn.Linear(6, 5))
    room = torch.empty(30, 6)

    def batches() -> Iterator[Any]:
        for scale in (1, 2, 3):
            yield pack(room.copy_(torch.randn(30, 6) * scale))

    with pytest.raises(InputError, match="in the memory of batch 0"):
        wn.data_dependent_init(net, batches(), memory=memory)


def test_the_same_batch_twice_and_inputs_that_the_model_writes_to() -> None:
    class Writes(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input.mul_(1.0), self.weight, self.bias)

    x = torch.randn(30, 6)
    for make in (nn.Linear, Writes):
        assert wn.data_dependent_init(wn.apply_weight_norm(make(6, 5)), (x for _ in range(4))).batches == 4


def test_a_weight_of_many_owners_takes_no_longer_for_each() -> None:
    """Looked at once for each owner, not for each pair of owners."""
    from wnsurgery import targets

    looks: list[int] = []
    real = targets._how
    w = nn.Parameter(torch.randn(4, 4))
    net = nn.ModuleList([nn.Linear(4, 4) for _ in range(50)])
    for layer in net:
        layer.weight = w
    wn.apply_weight_norm(net)
    targets._how = lambda slot: looks.append(1) or real(slot)  # type: ignore[func-returns-value]
    try:
        wn.data_dependent_init(net, torch.randn(20, 4), forward=lambda model, x: [layer(x) for layer in model])
    finally:
        targets._how = real
    assert len(looks) <= 2 * len(net)
