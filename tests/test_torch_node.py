"""Small weights whose node of the autograd graph is torch's: gradients of every kind, and whatever comes in between."""

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

NODE = "WeightNormInterfaceBackward0"


class Branches(nn.Module):
    """Layers by name, so that a pass can leave some out."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x).tanh()).tanh()).tanh())  # type: ignore[no-any-return]


@pytest.fixture(params=["straight", "long way"])
def net(request: pytest.FixtureRequest) -> Branches:
    """A net some passes into its training."""
    made = wn.apply_weight_norm(Branches())
    if request.param == "long way":
        request.getfixturevalue("long_way")
    for _ in range(3):
        made(torch.ones(2, 6)).sum().backward()
        with torch.no_grad():  # as after every step
            for half in (half for layer in made.children() for half in halves(layer)):
                half.mul_(1.0)
    made.zero_grad()
    assert made.a.weight.grad_fn.name() == NODE  # type: ignore[union-attr]
    return made


def entry(layer: nn.Module) -> Any:
    return layer.parametrizations["weight"]  # type: ignore[index]


def halves(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return entry(layer).pair()  # type: ignore[no-any-return]


def by_itself(layer: nn.Module) -> Tensor:
    """The layer's weight with a graph of plain operations."""
    g, v = halves(layer)
    return g * v / v.norm(dim=1, keepdim=True)


def first(net: Branches, x: Tensor) -> Tensor:
    """The first layer's output."""
    return net.a(x).tanh()  # type: ignore[no-any-return]


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
    h = first(net, X)
    net.d(net.c(net.b(h).tanh()).tanh()).tanh().square().sum().backward()
    check(net, lambda w: run(w, X.double(), "abcd").square().sum(), "abcd")


def test_a_layer_left_out_gets_no_gradient(net: Branches) -> None:
    h = first(net, X)
    net.c(h).tanh().square().sum().backward()
    check(net, lambda w: run(w, X.double(), "ac").square().sum(), "ac")


def test_two_losses(net: Branches) -> None:
    one = first(net, X).square().sum()
    other = net.d(net.c(X).tanh()).tanh().square().sum()
    one.backward()
    assert halves(net.c)[1].grad is None
    other.backward()
    check(net, lambda w: run(w, X.double(), "a").square().sum() + run(w, X.double(), "cd").square().sum(), "acd")


def test_a_graph_that_is_kept_gives_its_gradients_twice(net: Branches) -> None:
    loss = net.b(first(net, X)).tanh().square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    check(net, lambda w: 2 * run(w, X.double(), "ab").square().sum(), "ab")


def test_gradients_asked_for_by_name(net: Branches) -> None:
    y = net.d(net.c(net.b(first(net, X)).tanh()).tanh()).tanh().square().sum()
    g, v = halves(net.c)
    got = torch.autograd.grad(y, [v, g])
    wide = copy.deepcopy(net).double()
    values = [w for layer in (wide.a, wide.b, wide.c, wide.d) for w in (by_itself(layer), layer.bias)]
    wanted = torch.autograd.grad(run(values, X.double(), "abcd").square().sum(), list(reversed(halves(wide.c))))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


def test_gradients_of_gradients(net: Branches) -> None:
    y = net.b(first(net, X)).tanh().square().sum()
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
    y = net.b(first(net, X)).tanh().sum(0)
    got = torch.autograd.grad(y, halves(net.b), torch.eye(6), is_grads_batched=True)
    wide = copy.deepcopy(net).double()
    values = [w for layer in (wide.a, wide.b, wide.c, wide.d) for w in (by_itself(layer), layer.bias)]
    out = run(values, X.double(), "ab").sum(0)
    for k in range(6):
        wanted = torch.autograd.grad(out[k], halves(wide.b), retain_graph=True)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one[k].double(), other, rtol=1e-5, atol=1e-6)


def test_a_pair_written_to_before_the_backward_pass_is_refused(net: Branches) -> None:
    y = net.b(first(net, X)).tanh().sum()
    with torch.no_grad():
        halves(net.b)[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_pair_written_to_that_has_no_part_is_none_of_its_business(net: Branches) -> None:
    y = net.b(first(net, X)).tanh().square().sum()
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
    h = first(net, X)
    seen: list[Any] = []
    halves(net.c)[1].register_hook(seen.append)  # type: ignore[no-untyped-call]
    net.c(h).tanh().square().sum().backward()
    check(net, lambda w: run(w, X.double(), "ac").square().sum(), "ac")
    assert len(seen) == 1
    assert isinstance(seen[0], Tensor)


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
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


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


def test_memory_is_let_go(net: Branches) -> None:
    """The graph of a pass is gone with what it computed: no cycle is left for the collector."""
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        h = first(net, X)
        made = weakref.ref(net.d.weight)
        y = net.d(net.c(net.b(h)))
        y.sum().backward()
        del y, h
        assert made() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("other", ["layout", "more", "fewer", "type", "magnitudes"])
def test_a_pair_replaced_through_data_in_between_is_refused(net: Branches, other: str) -> None:
    """torch's node reads what lies there: another shape or order is an error, not memory past the end."""
    y = net.b(first(net, X)).tanh().square().sum()
    g, v = halves(net.b)
    if other == "magnitudes":
        g.data = torch.ones(900, 1)
    else:
        v.data = {
            "layout": v.data.t().contiguous().t(),
            "more": torch.randn(900, 900),
            "fewer": v.data[:2],
            "type": v.data.double(),
        }[other]
    with pytest.raises(RuntimeError, match=r"contiguous|another shape or type"):
        y.backward()


def test_a_pair_replaced_by_another_of_its_kind_gives_gradients_at_that(net: Branches) -> None:
    """As with torch's own weight norm."""
    y = net.b(first(net, X)).tanh().square().sum()
    v = halves(net.b)[1]
    v.data = v.data.clone()
    y.backward()
    check(net, lambda w: run(w, X.double(), "ab").square().sum(), "ab")


@pytest.mark.parametrize("kept", [True, False])
def test_second_and_third_derivatives_of_a_layer_used_twice(net: Branches, kept: bool) -> None:
    """Also where the graph is not kept, if nothing but the weight depends on the pair."""

    def derivative(
        b: Callable[[Tensor], Tensor], x: Tensor, pair: tuple[Tensor, Tensor], retain_graph: bool = True
    ) -> list[Tensor]:
        y = b(b(x).tanh()).tanh().square().sum() if kept else b(x).sum()
        once = torch.autograd.grad(y, pair, create_graph=True, retain_graph=retain_graph)
        twice = torch.autograd.grad(sum(one.square().sum() for one in once), pair, create_graph=True)
        return [*once, *twice, *torch.autograd.grad(sum(one.sin().sum() for one in twice), pair)]

    wide = copy.deepcopy(net.b).double()
    pair: Any = halves(wide)
    plain: list[Tensor] = derivative(lambda x: nn.functional.linear(x, by_itself(wide), wide.bias), X.double(), pair)
    found = derivative(net.b, X, halves(net.b), kept)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
    loss = net.b(X).square().sum()
    once = torch.autograd.grad(loss, halves(net.b), create_graph=True)
    again = torch.autograd.grad(loss, halves(net.b))  # the same node, once more and without
    for one, other in zip(once, again, strict=True):
        assert one.requires_grad and not other.requires_grad
        torch.testing.assert_close(one, other)


def direct(module: Any) -> Tensor:
    """The weight as its layer's own use has it."""
    w = entry(module).in_training(private=True)
    assert w.grad_fn is not None
    return w  # type: ignore[no-any-return]


def read(module: Any, x: Tensor) -> Tensor:
    """The layer's output, by somebody else's hand."""
    w = module.weight
    if isinstance(module, nn.Linear):
        return nn.functional.linear(x, w, module.bias)
    if isinstance(module, nn.ConvTranspose1d):
        return nn.functional.conv_transpose1d(x, w, module.bias)
    return module._conv_forward(x, w, module.bias)  # type: ignore[no-any-return]


def test_a_pair_written_to_while_a_weight_of_several_uses_waits_is_refused() -> None:
    layer: Any = wn.apply_weight_norm(nn.Linear(6, 6))
    for _ in range(4):
        layer.weight.sum().backward()
    loss = layer.weight.sin().sum() + layer.weight.cos().sum()
    assert loss.grad_fn.name() and entry(layer)._again is not None  # type: ignore[union-attr]
    with torch.no_grad():
        halves(layer)[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_have_the_same_bits_by_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass of a resumed run is not made as later ones are, nor is one of a weight that somebody holds."""
    torch.manual_seed(0)
    shapes: list[tuple[nn.Module, tuple[int, ...]]] = [
        (nn.Linear(300, 37), (5, 300)),
        (nn.Linear(7, 5), (2, 7)),
        (nn.Conv2d(3, 8, 3), (1, 3, 9, 9)),
        (nn.Conv1d(5, 6, 1), (2, 5, 4)),
        (nn.ConvTranspose1d(6, 4, 3), (1, 6, 8)),
        (nn.Linear(400, 400), (3, 400)),
    ]
    for layer, size in shapes:
        module: Any = wn.apply_weight_norm(layer)
        x, found = torch.randn(size), []
        for held in (False, False, True, False):
            module.zero_grad()
            w = module.weight if held else None
            module(x).square().sum().backward()
            found.append([half.grad.clone() for half in halves(module)])  # type: ignore[union-attr]
            del w
        for _ in range(5):  # read again and again, it is made once for all of them
            module.zero_grad()
            y = read(module, x)
            y.square().sum().backward()
        found.append([half.grad.clone() for half in halves(module)])  # type: ignore[union-attr]
        odd = torch.randn(()).expand_as(module.weight)  # in no order that anybody could read in place
        grads = [torch.autograd.grad(w, halves(module), odd) for w in (module.weight, direct(module))]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        with monkeypatch.context() as patch:
            patch.setattr(type(entry(module)), "_go_straight", lambda self, way, private: None)
            module.zero_grad()
            module(x).square().sum().backward()
            found.append([half.grad.clone() for half in halves(module)])  # type: ignore[union-attr]
            entry(module)[0].register_forward_hook(lambda *_: None)
            module.zero_grad()
            module(x).square().sum().backward()
            found.append([half.grad.clone() for half in halves(module)])  # type: ignore[union-attr]
        assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True)), layer


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
