"""A weight that is used several times before its pair changes: what is written in between, and who holds what."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wnsurgery as wn

X = torch.linspace(-1, 1, 12).view(2, 6)


def pair(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.parametrizations["weight"].pair()  # type: ignore[no-any-return]


def by_itself(layer: Any) -> Tensor:
    g, v = pair(layer)
    return g * v / v.norm(dim=1, keepdim=True)


def same(layer: Any) -> bool:
    """Whether the layer's weight is that of its pair as it is now."""
    with torch.no_grad():
        return torch.allclose(layer.weight, by_itself(layer), rtol=1e-6) and torch.allclose(
            used(layer), by_itself(layer), rtol=1e-6
        )


def used(layer: Any) -> Tensor:
    with torch.enable_grad():
        return layer.weight.detach().clone()  # type: ignore[no-any-return]


def place(layer: Any) -> int:
    return layer.weight.data_ptr()  # type: ignore[no-any-return]


class Reading(nn.Linear):
    """A layer of the user's own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.fixture(params=[(1, nn.Linear), (3, nn.Linear), (2, Reading)], ids=["one", "three", "reading"])
def net(request: pytest.FixtureRequest) -> nn.Sequential:
    """A net that has seen its weights used again, and read."""
    torch.manual_seed(0)
    count, kind = request.param
    made = wn.apply_weight_norm(nn.Sequential(*[kind(6, 6) for _ in range(count)]))
    for _ in range(4):
        made(X).sum().backward()
        for layer in made:
            layer.weight.sum().backward()  # type: ignore[operator]
    made.zero_grad()
    assert all(layer.parametrizations["weight"]._again is not None for layer in made)  # type: ignore[index,union-attr]
    return made


def test_one_that_is_read_is_made_once(net: nn.Sequential) -> None:
    for layer in net:
        assert len({place(layer) for _ in range(5)}) == 1
    net(X)
    with torch.no_grad():
        pair(net[0])[0].mul_(2.0)
    assert same(net[0])


def test_each_use_has_its_own_place_in_the_graph(net: nn.Sequential) -> None:
    for layer in net:
        first, second = layer.weight, layer.weight
        assert first.requires_grad
        assert first.grad_fn is not second.grad_fn  # hooks on one use see that use
        assert torch.equal(first, wn.fold_weight_norm(copy.deepcopy(layer)).weight)  # type: ignore[arg-type]


def test_gradients_of_many_passes_add_up(net: nn.Sequential) -> None:
    wide = copy.deepcopy(net).double()
    for k in range(5):
        net(X * k).square().sum().backward()
        h = X.double() * k
        for layer in wide:
            h = nn.functional.linear(h, by_itself(layer), layer.bias)  # type: ignore[arg-type]
        h.square().sum().backward()
    for layer, other in zip(net, wide, strict=True):
        for mine, theirs in zip(pair(layer), pair(other), strict=True):
            torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]


def test_uses_in_one_graph_and_gradients_of_gradients(net: nn.Sequential) -> None:
    layer: Any = net[0]
    wide = copy.deepcopy(layer).double()
    y = layer(layer(layer(X).tanh()).tanh()).tanh().square().sum()
    h = X.double()
    for _ in range(3):
        h = nn.functional.linear(h, by_itself(wide), wide.bias).tanh()
    z = h.square().sum()
    mine = torch.autograd.grad(y, pair(layer), create_graph=True)
    theirs = torch.autograd.grad(z, pair(wide), create_graph=True)
    sum(one.square().sum() for one in mine).backward()  # type: ignore[union-attr]
    sum(one.square().sum() for one in theirs).backward()  # type: ignore[union-attr]
    for one, other in zip(
        (*mine, *(p.grad for p in pair(layer))), (*theirs, *(p.grad for p in pair(wide))), strict=True
    ):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("half", [0, 1])
def test_writes_that_nobody_counts_are_seen(net: nn.Sequential, half: int) -> None:
    """One element, written through `.data`, of a layer whose weight is waiting for its next use."""
    for layer in net:
        assert same(layer)
        part = pair(layer)[half]
        before, version = used(layer), part._version
        part.data[3].mul_(1.25)
        assert part._version == version
        assert same(layer)
        net(X)  # makes the others, too
    for layer in net:
        pair(layer)[half].data[2].mul_(0.5)
        assert same(layer)
    assert not torch.equal(before, used(layer))


@pytest.mark.parametrize(
    "write",
    [
        lambda net: torch.optim.SGD(net.parameters(), lr=0.1).step(),
        lambda net: torch.optim.Adam(net.parameters(), lr=0.1, fused=True).step(),
        lambda net: net.load_state_dict({k: v * 1.5 for k, v in net.state_dict().items()}),
        lambda net: [layer.reset_parameters() for layer in net],
        lambda net: [nn.init.normal_(layer.weight) for layer in net],
        lambda net: [setattr(layer, "weight", torch.randn(6, 6)) for layer in net],
        lambda net: [setattr(p, "data", p.data * 2) for p in net.parameters()],
    ],
    ids=["step", "fused step", "load", "reset", "initialise", "assign", "data"],
)
def test_it_is_never_stale(net: nn.Sequential, write: Any) -> None:
    net(X).square().sum().backward()
    before = [used(layer) for layer in net]
    write(net)
    for layer, old in zip(net, before, strict=True):
        assert same(layer)
        assert not torch.equal(used(layer), old)
    net(X).sum().backward()


def test_a_write_into_one_use_reaches_the_pair_when_it_is_let_go(net: nn.Sequential) -> None:
    layer: Any = net[0]
    held = layer.weight
    with torch.no_grad():
        held.copy_(torch.arange(36.0).view(6, 6) + 1)
    del held
    g, v = pair(layer)  # no access in between
    torch.testing.assert_close((g * v / v.norm(dim=1, keepdim=True)).flatten().detach(), torch.arange(36.0) + 1)


def test_a_write_into_one_use_that_is_held_while_others_have_a_weight_of_their_own(net: nn.Sequential) -> None:
    """As where a later read was in a checkpointed part."""
    layer: Any = net[0]
    w = layer.weight
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert layer.weight.data_ptr() != w.data_ptr()
    with torch.no_grad():
        w.mul_(2)
    torch.testing.assert_close(used(layer), w.detach())
    assert same(layer)


def test_a_write_that_is_not_a_weight_is_an_error_once(net: nn.Sequential) -> None:
    layer: Any = net[0]
    before = used(layer)
    nn.init.constant_(layer.weight, float("nan"))
    with pytest.raises(wn.NonFiniteWeightError):
        layer(X)
    assert torch.equal(used(layer), before)
    layer.weight.data.fill_(float("inf"))
    with pytest.raises(wn.NonFiniteWeightError):
        layer(X)
    assert torch.equal(used(layer), before)
    layer(X).sum().backward()


def test_an_operation_in_place_has_its_gradient(net: nn.Sequential) -> None:
    layer: Any = net[0]
    wide = copy.deepcopy(layer).double()
    w = layer.weight
    w.mul_(3.0)
    w.square().sum().backward()
    (by_itself(wide) * 3.0).square().sum().backward()
    torch.testing.assert_close(pair(layer)[0].grad.double(), pair(wide)[0].grad)  # type: ignore[union-attr]


def test_a_hook_sees_the_use_it_was_put_on(net: nn.Sequential) -> None:
    layer: Any = net[0]
    seen: list[Any] = []
    layer.weight.register_hook(seen.append)
    layer(X).sum().backward()
    assert seen == []
    w = layer.weight
    w.register_hook(seen.append)
    nn.functional.linear(X, w).sum().backward()
    assert len(seen) == 1
    assert isinstance(seen[0], Tensor)


def test_a_hook_on_a_weight_that_takes_no_part_is_not_called() -> None:
    """Also where a node of the graph is other weights', too."""
    net = wn.apply_weight_norm(nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(4):
        seen: list[Any] = []
        net[1].weight.register_hook(seen.append)
        net(X).sum().backward()
        assert seen == []
        optimizer.step()


def test_freezing_and_thawing(net: nn.Sequential) -> None:
    layer: Any = net[0]
    g, v = pair(layer)
    layer(X)
    v.requires_grad_(False)
    layer(X).sum().backward()
    assert v.grad is None
    assert g.grad is not None
    g.requires_grad_(False)
    assert not layer.weight.requires_grad
    v.requires_grad_(True)
    layer(X).sum().backward()
    assert v.grad is not None


def test_copies_and_files_are_independent(net: nn.Sequential) -> None:
    twins = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.0)
    for twin in twins:
        for layer, other in zip(twin, net, strict=True):
            assert same(layer)
            assert not torch.equal(used(layer), used(other))


def test_nothing_is_left_for_the_collector(net: nn.Sequential) -> None:
    net(X).sum().backward()
    gone = [weakref.ref(layer.parametrizations["weight"].__dict__["_again"].lasting.w) for layer in net]  # type: ignore[index]
    entries = [weakref.ref(layer.parametrizations["weight"]) for layer in net]  # type: ignore[index]
    gc.collect()
    gc.disable()
    try:
        wn.fold_weight_norm(net)
        assert [one() for one in (*gone, *entries)] == [None] * 2 * len(net)
    finally:
        gc.enable()


def test_a_write_that_nobody_counts_into_a_larger_weight_is_seen() -> None:
    layer: Any = wn.apply_weight_norm(nn.Linear(80, 80))
    for _ in range(4):
        layer(torch.ones(2, 80)).sum().backward()
    pair(layer)[1].data[17, 3] += 1.0
    assert same(layer)


def initialise(module: nn.Module) -> None:
    """As in the code of many GANs."""
    if isinstance(module, nn.Linear):
        module.weight.data.normal_(5.0, 2.0)


@pytest.mark.parametrize("width", [4, 60, 400])
@pytest.mark.parametrize("passes", [0, 1, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["parametrized", "deferred"])
def test_a_write_through_data_reaches_the_pair(width: int, passes: int, training: bool, mode: Any) -> None:
    net = nn.Sequential(*[nn.Linear(width, width) for _ in range(2)])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    wn.apply_weight_norm(net, mode=mode, optimizer=optimizer)
    for _ in range(passes):
        net(torch.ones(2, width)).sum().backward()
    optimizer.zero_grad()
    with torch.set_grad_enabled(training):
        net.apply(initialise)
    for layer in net:
        w = used(layer)
        assert abs(float(w.mean()) - 5.0) < 2.0
        assert same(layer)
    folded = wn.fold_weight_norm(copy.deepcopy(net))
    for layer, plain in zip(net, folded, strict=True):
        assert torch.equal(used(layer), plain.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [lambda w: w.data, lambda w: w.detach().view(-1), lambda w: w.untyped_storage()])
def test_who_has_the_memory_of_a_weight_that_is_gone_may_still_write(net: nn.Sequential, keep: Any) -> None:
    layer: Any = net[0]
    with torch.no_grad():
        pair(layer)[1].add_(0.125)  # a weight of its own for the next use
    held = keep(layer.weight)
    layer(X)
    raw = torch.empty(0).set_(held) if isinstance(held, torch.UntypedStorage) else held.view(-1).data
    raw[5] = 7.0
    assert used(layer).view(-1)[5].item() == pytest.approx(7.0)
    assert same(layer)


def test_data_that_is_held_and_written_to_later(net: nn.Sequential) -> None:
    layer: Any = net[0]
    data = layer.weight.data
    layer(X)
    data[2, 3] = 7.0
    assert used(layer)[2, 3].item() == pytest.approx(7.0)
    assert same(layer)


@pytest.mark.parametrize("width", [4, 60, 300, 800])
def test_looking_at_weights_takes_no_memory(width: int) -> None:
    """As penalties do at every step, outside of any forward pass."""
    layer: Any = wn.apply_weight_norm(nn.Linear(width, width))
    state = layer.parametrizations["weight"].__dict__
    places = set()
    for _ in range(8):
        loss = layer(torch.ones(2, width)).sum() + layer.weight.square().sum()
        loss.backward()
        del loss
        places.add(place(layer))
        assert "_handed_out" not in state
    assert len(places) <= 3 or width < 800  # memory that is kept is kept for its next use


def test_evaluation_after_a_step_is_that_of_each_weight_alone() -> None:
    """Small weights are computed together; not one with a row of zeros, with a hook, or a large one beside them."""
    torch.manual_seed(0)
    net = wn.apply_weight_norm(nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)], nn.Linear(6, 90_000)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net[3].parametrizations["weight"][0].register_forward_hook(lambda _, pair, w: w * 2)  # type: ignore[index]
    for half in pair(net[4]):
        half.requires_grad_(False)
    for _ in range(3):
        net(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            pair(net[1])[0][2] = 0.0
            pair(net[1])[1][2] = 0.0
            net(X)
            for i, layer in enumerate(net):
                w = by_itself(layer).nan_to_num() * (2 if i == 3 else 1)
                torch.testing.assert_close(layer.weight, w, rtol=1e-6, atol=0)  # type: ignore[arg-type]
                assert layer.weight.requires_grad == (i != 4)
                assert layer.weight is layer.weight or i == 3
            kept = [layer.weight for layer in net]
            with torch.inference_mode():
                assert all(a is layer.weight for i, (a, layer) in enumerate(zip(kept, net, strict=True)) if i != 3)
