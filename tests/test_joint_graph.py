"""Small weights with a node of the autograd graph in common do what they would do with nodes of their own."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wnsurgery as wn
from wnsurgery import fused
from wnsurgery.reparam import Axes, compose
from wnsurgery.small_weights import SmallWeights


class Branches(nn.Module):
    """Layers by name, so that a pass can leave some out."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x).tanh()).tanh()).tanh())  # type: ignore[no-any-return]


@pytest.fixture(params=["for one use", "for several", "straight"])
def net(request: pytest.FixtureRequest) -> Branches:
    """A net whose next pass makes all its weights when it comes to the first; or each at its use."""
    made = wn.apply_weight_norm(Branches())
    if request.param == "for one use":
        request.getfixturevalue("long_way")
    for last in (False, False, False, False, True):
        made(torch.ones(2, 6)).sum().backward()
        if last or request.param != "for several":  # as after every step
            with torch.no_grad():
                for half in (half for layer in made.children() for half in halves(layer)):
                    half.mul_(1.0)
    made.zero_grad()
    made.each_by_itself = request.param == "straight"  # type: ignore[assignment]
    return made


def entry(layer: nn.Module) -> Any:
    return layer.parametrizations["weight"]  # type: ignore[index]


def halves(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return entry(layer).pair()  # type: ignore[no-any-return]


def loan(layer: nn.Module) -> Any:
    """The weight that waits for its use, or for another."""
    state = entry(layer).__dict__
    return state["_made"] if "_made" in state else state["_again"].ahead


def by_itself(layer: nn.Module) -> Tensor:
    """The layer's weight with a graph of plain operations."""
    g, v = halves(layer)
    return g * v / v.norm(dim=1, keepdim=True)


def share(net: Branches, x: Tensor) -> Tensor:
    """The first layer's output; all layers' weights are made then, with one node, or each by itself."""
    found: Tensor = net.a(x).tanh()
    if net.each_by_itself:
        assert not any("_made" in entry(layer).__dict__ for layer in (net.b, net.c, net.d))
        return found
    others = [loan(layer) for layer in (net.b, net.c, net.d)]
    assert all(one.shared for one in others)
    assert len({id(one.w.grad_fn) for one in others}) == 1
    return found


def check(net: Branches, loss: Callable[[list[Tensor]], Tensor], used: str) -> None:
    """Gradients of all pairs: those of float64, and none where a layer had no part."""
    layers = [net.a, net.b, net.c, net.d]
    wide = copy.deepcopy(net).double()
    with torch.enable_grad():
        leaves = [(layer.bias, *halves(layer)) for layer in (wide.a, wide.b, wide.c, wide.d)]
        loss([w for layer in (wide.a, wide.b, wide.c, wide.d) for w in (by_itself(layer), layer.bias)]).backward()
    for name, layer, (bias, g, v) in zip("abcd", layers, leaves, strict=True):
        mine = halves(layer)
        if name not in used:
            assert mine[0].grad is None
            assert mine[1].grad is None
            continue
        for got, wanted in ((mine[0].grad, g.grad), (mine[1].grad, v.grad), (layer.bias.grad, bias.grad)):
            assert got is not None
            assert wanted is not None
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)


def run(values: list[Tensor], x: Tensor, order: str) -> Tensor:
    for name in order:
        i = "abcd".index(name)
        x = nn.functional.linear(x, values[2 * i], values[2 * i + 1]).tanh()
    return x


X = torch.linspace(-1, 1, 12).view(2, 6)


def test_one_pass(net: Branches) -> None:
    h = share(net, X)
    net.d(net.c(net.b(h).tanh()).tanh()).tanh().square().sum().backward()
    check(net, lambda w: run(w, X.double(), "abcd").square().sum(), "abcd")


def test_a_layer_left_out_gets_no_gradient(net: Branches) -> None:
    h = share(net, X)
    net.c(h).tanh().square().sum().backward()
    check(net, lambda w: run(w, X.double(), "ac").square().sum(), "ac")


def test_two_losses_with_nothing_in_common_but_the_node(net: Branches) -> None:
    """The second pass finds what it needs, as it would with nodes apart."""
    first = share(net, X).square().sum()
    second = net.d(net.c(X).tanh()).tanh().square().sum()
    first.backward()
    assert halves(net.c)[1].grad is None
    second.backward()
    check(net, lambda w: run(w, X.double(), "a").square().sum() + run(w, X.double(), "cd").square().sum(), "acd")


def test_a_graph_that_is_kept_gives_its_gradients_twice(net: Branches) -> None:
    loss = net.b(share(net, X)).tanh().square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    check(net, lambda w: 2 * run(w, X.double(), "ab").square().sum(), "ab")


def test_gradients_asked_for_by_name(net: Branches) -> None:
    y = net.d(net.c(net.b(share(net, X)).tanh()).tanh()).tanh().square().sum()
    g, v = halves(net.c)
    got = torch.autograd.grad(y, [v, g])
    wide = copy.deepcopy(net).double()
    values = [w for layer in (wide.a, wide.b, wide.c, wide.d) for w in (by_itself(layer), layer.bias)]
    wanted = torch.autograd.grad(run(values, X.double(), "abcd").square().sum(), list(reversed(halves(wide.c))))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


def test_gradients_of_gradients(net: Branches) -> None:
    y = net.b(share(net, X)).tanh().square().sum()
    (grad,) = torch.autograd.grad(y, [halves(net.b)[1]], create_graph=True)
    grad.square().sum().backward()
    wide = copy.deepcopy(net).double()
    wide.zero_grad()
    values = [w for layer in (wide.a, wide.b, wide.c, wide.d) for w in (by_itself(layer), layer.bias)]
    (theirs,) = torch.autograd.grad(
        run(values, X.double(), "ab").square().sum(), [halves(wide.b)[1]], create_graph=True
    )
    theirs.square().sum().backward()
    for mine, other in ((net.a, wide.a), (net.b, wide.b)):
        for got, wanted in zip(halves(mine), halves(other), strict=True):
            torch.testing.assert_close(got.grad.double(), wanted.grad, rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]


def test_a_batch_of_gradients(net: Branches) -> None:
    y = net.b(share(net, X)).tanh().sum(0)
    got = torch.autograd.grad(y, halves(net.b), torch.eye(6), is_grads_batched=True)
    wide = copy.deepcopy(net).double()
    values = [w for layer in (wide.a, wide.b, wide.c, wide.d) for w in (by_itself(layer), layer.bias)]
    out = run(values, X.double(), "ab").sum(0)
    for k in range(6):
        wanted = torch.autograd.grad(out[k], halves(wide.b), retain_graph=True)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one[k].double(), other, rtol=1e-5, atol=1e-6)


def test_a_pair_written_to_before_the_backward_pass_is_refused(net: Branches) -> None:
    y = net.b(share(net, X)).tanh().sum()
    with torch.no_grad():
        halves(net.b)[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_pair_written_to_that_has_no_part_is_none_of_its_business(net: Branches) -> None:
    y = net.b(share(net, X)).tanh().square().sum()
    with torch.no_grad():
        halves(net.d)[1].mul_(2)
    y.backward()
    check(net, lambda w: run(w, X.double(), "ab").square().sum(), "ab")


@pytest.mark.parametrize("half", [0, 1])
def test_hooks_are_called_with_gradients_only(net: Branches, half: int) -> None:
    """A pair with hooks has a node of its own: a hook that takes its argument for a tensor never gets None."""
    seen: list[Tensor] = []
    pair = halves(net.c)
    pair[half].register_hook(lambda grad: seen.append(grad) or grad * 2)  # type: ignore[no-untyped-call,func-returns-value]
    pair[half].register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))  # type: ignore[arg-type,return-value]
    h = net.a(X).tanh()
    net.b(h).sum().backward()  # the pass leaves c out
    assert seen == []
    net(X).sum().backward()
    assert [type(one) for one in seen] == [Tensor, Tensor]


def test_a_hook_that_comes_between(net: Branches) -> None:
    h = share(net, X)
    seen: list[Any] = []
    halves(net.c)[1].register_hook(seen.append)  # type: ignore[no-untyped-call]
    net.c(h).tanh().square().sum().backward()
    check(net, lambda w: run(w, X.double(), "ac").square().sum(), "ac")
    assert len(seen) == 1
    assert isinstance(seen[0], Tensor)


@pytest.mark.parametrize("net", ["for one use", "for several"], indirect=True)
def test_a_hook_that_comes_while_a_weight_waits_for_a_later_pass(net: Branches) -> None:
    """The node of weights that were left out lives on with those that were not; no hook is called with None."""
    share(net, X).sum().backward()
    seen: list[Any] = []
    halves(net.c)[1].register_hook(lambda grad: seen.append(grad) or grad * 2)  # type: ignore[no-untyped-call,func-returns-value]
    net.zero_grad()
    net.b(X).tanh().square().sum().backward()
    assert len(seen) == 1
    assert isinstance(seen[0], Tensor)
    assert not bool(seen[0].any())
    assert halves(net.d)[1].grad is None
    assert halves(net.b)[1].grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(net: Branches, reentrant: bool) -> None:
    """A pass inside of a backward pass takes no part in a node that another pass waits for."""
    calls: list[int] = []
    nodes = [torch.autograd.graph.get_gradient_edge(halves(layer)[1]).node for layer in (net.a, net.b, net.c, net.d)]
    for i, node in enumerate(nodes):
        node.register_prehook(lambda grads, i=i: calls.append(i))
    for step in range(4):
        net.zero_grad()
        calls.clear()
        h = net.a(X.clone().requires_grad_()).tanh()
        h = checkpoint(lambda x: net.b(x).tanh(), h, use_reentrant=reentrant)
        h = checkpoint(lambda x: net.c(x).tanh(), h, use_reentrant=reentrant)
        net.d(h).tanh().square().sum().backward()
        check(net, lambda w: run(w, X.double(), "abcd").square().sum(), "abcd")
        if step:  # in the first, weights are there that were made before anybody saw a checkpoint
            assert sorted(calls) == [0, 1, 2, 3]


def test_where_processes_exchange_gradients_each_weight_has_a_node_of_its_own(
    net: Branches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exchanges start as gradients come, and count every one of them."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    net.a(X)
    waiting = [entry(layer).__dict__.get("_made") for layer in (net.b, net.c, net.d)]
    assert net.each_by_itself or None not in waiting
    assert not any(one is not None and one.shared for one in waiting)


def test_one_half_frozen(net: Branches) -> None:
    halves(net.b)[0].requires_grad_(False)
    halves(net.c)[1].requires_grad_(False)
    for _ in range(2):
        net.zero_grad()
        net(X).tanh().square().sum().backward()
        assert halves(net.b)[0].grad is None
        assert halves(net.c)[1].grad is None
        assert halves(net.b)[1].grad is not None
        assert halves(net.c)[0].grad is not None


def test_a_frozen_layer_asks_for_no_gradient(net: Branches) -> None:
    for half in halves(net.b):
        half.requires_grad_(False)
    for _ in range(2):
        share_or_not = net.a(X)
        assert share_or_not.requires_grad
        assert not net.b.weight.requires_grad
        net(X).sum().backward()


def test_a_row_of_zeros_takes_the_long_way_beside_others(net: Branches) -> None:
    with torch.no_grad():
        halves(net.b)[1][2] = 0
        halves(net.b)[0][2] = 0
    for _ in range(2):
        net.zero_grad()
        net(X).tanh().square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
        assert halves(net.b)[1].grad is not None


def test_tied_weights_add_up() -> None:
    net = Branches()
    net.c.weight = net.b.weight
    wn.apply_weight_norm(net)
    assert halves(net.b)[1] is halves(net.c)[1]
    for _ in range(3):
        net.zero_grad()
        net(X).square().sum().backward()
    wide = copy.deepcopy(net).double()
    wide.zero_grad()
    v = halves(wide.b)[1]
    h = X.double()
    for layer in (wide.a, wide.b, wide.c, wide.d):
        h = nn.functional.linear(h, by_itself(layer), layer.bias)
        h = h if layer is wide.d else h.tanh()
    h.square().sum().backward()
    assert v.grad is not None
    torch.testing.assert_close(halves(net.b)[1].grad.double(), v.grad, rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]


def test_more_weights_than_share_a_node() -> None:
    net = wn.apply_weight_norm(nn.Sequential(*[nn.Linear(4, 4) for _ in range(150)]))
    for _ in range(3):
        net.zero_grad()
        x = net[0](torch.ones(1, 4))
        net[1:](x).sum().backward()
    net.zero_grad()
    net[0](torch.ones(1, 4))
    nodes = [loan(layer).w.grad_fn for layer in list(net)[1:]]
    assert len({id(node) for node in nodes}) == 3
    for layer in net:
        w = compose(*halves(layer), Axes((0,)))
        assert torch.equal(layer.weight, w)  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", ["float64", "meta"])
def test_defaults_of_the_process_do_not_change_what_is_made(net: Branches, setting: str) -> None:
    wanted = [compose(*halves(layer), Axes((0,))) for layer in (net.a, net.b, net.c, net.d)]
    before = torch.get_default_dtype()
    try:
        if setting == "float64":
            torch.set_default_dtype(torch.float64)
            made = [layer.weight for layer in (net.a, net.b, net.c, net.d)]
        else:
            with torch.device("meta"):
                made = [layer.weight for layer in (net.a, net.b, net.c, net.d)]
        for one, other in zip(made, wanted, strict=True):
            assert one.dtype == torch.float32
            assert torch.equal(one, other)
        made[3].sum().backward()
        assert halves(net.d)[1].grad is not None
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("net", ["for one use", "straight"], indirect=True)
def test_memory_is_let_go(net: Branches) -> None:
    """The graph of a pass is gone with what it computed: no cycle is left for the collector."""
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        h = share(net, X)
        made = weakref.ref(net.d.weight if net.each_by_itself else entry(net.b).__dict__["_made"].w)
        y = net.d(net.c(net.b(h)))
        y.sum().backward()
        del y, h
        assert made() is None
    finally:
        gc.enable()


def test_a_direction_replaced_through_data_in_between(net: Branches) -> None:
    """What the kernels read is looked at again: another size or layout takes another way, or is refused."""
    assert fused.started()
    y = net.b(share(net, X)).tanh().square().sum()
    v = halves(net.b)[1]
    old = v.data
    v.data = old.t().contiguous().t()
    y.backward()
    check(net, lambda w: run(w, X.double(), "ab").square().sum(), "ab")


@pytest.mark.parametrize("net", ["for one use"], indirect=True)
def test_evaluation_in_between_leaves_the_weights_together(net: Branches) -> None:
    """As in a loop that looks at a validation loss after every step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        with torch.no_grad():
            net(X)
        h = share(net, X)
        nodes = [entry(layer).__dict__["_made"].w.grad_fn for layer in (net.b, net.c, net.d)]
        loss = net.d(net.c(net.b(h).tanh()).tanh()).square().sum()
        assert [layer.parametrizations["weight"].__dict__.get("_made") for layer in (net.b, net.c, net.d)] == [None] * 3
        assert nodes[0] is nodes[2]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_threads_that_run_one_net_do_not_write_into_each_others_weights() -> None:
    pairs = [(torch.rand(200, 1), torch.randn(200, 200)) for _ in range(6)]
    assert fused.start()
    small = SmallWeights(pairs)
    wanted = [compose(g, v, Axes((0,))) for g, v in pairs]

    def work(_: int) -> bool:
        return all(torch.equal(one, other) for one, other in zip(small.make().weights, wanted, strict=True))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(400)))


@pytest.mark.parametrize("width", [40, 600])
def test_threads_train_and_evaluate_one_net(width: int) -> None:
    net = wn.apply_weight_norm(nn.Sequential(*[nn.Linear(width, width) for _ in range(4)]))
    parts = [half for layer in net for half in halves(layer)]
    x = torch.randn(3, width)
    wanted = net(x).detach()
    grads = torch.autograd.grad(net(x).square().sum(), parts)

    def work(i: int) -> bool:
        if i % 3 == 0:
            with torch.no_grad():
                return torch.equal(net(x), wanted)
        y = net(x)
        found = torch.autograd.grad(y.square().sum(), parts)
        same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, grads, strict=True))
        return torch.equal(y, wanted) and same

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(work, range(200)))
    finally:
        sys.setswitchinterval(before)


def test_a_direction_transposed_through_data_between_passes(net: Branches) -> None:
    """The same memory, read in another order."""
    v = halves(net.c)[1]
    v.data = v.data.t()
    for _ in range(2):
        net.a(X)
        torch.testing.assert_close(net.c.weight, by_itself(net.c))
        assert net.b.weight.shape == net.d.weight.shape
