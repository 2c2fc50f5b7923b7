"""Weights and memory kept between uses: never stale, never shared with somebody who still looks."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wnsurgery as wn
from wnsurgery.kept import Rooms
from wnsurgery.reparam import WeightNorm
from wnsurgery.straight import Straight

from nets import same_bits

Layer = Any


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are computed into kept memory for small weights already, so that these tests are quick."""
    monkeypatch.setattr("wnsurgery.reparam._FRESH", 1 << 16)


def layer(size: int = 8, **options: Any) -> Layer:
    torch.manual_seed(0)
    return wn.apply_weight_norm(nn.Linear(size, size), **options)


def now(module: Layer) -> Tensor:
    """The weight from g and v as they are, past everything that may be kept."""
    pair = module.parametrizations.weight
    return wn.compose(pair.original0.detach().clone(), pair.original1.detach().clone())


def _optimizer(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[Layer], None]:
    def write(module: Layer) -> None:
        optimizer = kind(module.parameters(), lr=0.1, **options)  # type: ignore[call-arg]
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()

    return write


def _swap(module: Layer) -> None:
    for p in module.parameters():
        p.data = p.data.clone() * 2


def _ema(module: Layer) -> None:
    average = torch.optim.swa_utils.AveragedModel(copy.deepcopy(module))
    module.load_state_dict(average.module.state_dict())
    with torch.no_grad():
        for p, q in zip(module.parameters(), average.module.parameters(), strict=True):
            p.lerp_(q * 3, 0.5)


def _data_copy(module: Layer) -> None:
    for p in module.parameters():
        p.data.copy_(p.data * 2 + 1)


def _numpy(module: Layer) -> None:
    module.parametrizations.weight.original0.detach().numpy()[:] *= 2


def _in_place(module: Layer) -> None:
    with torch.no_grad():
        module.parametrizations.weight.original1[3, 4] += 1


def _load(module: Layer) -> None:
    module.load_state_dict({k: v + 1 if v.is_floating_point() else v for k, v in module.state_dict().items()})


def _load_assigned(module: Layer) -> None:
    module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()}, assign=True)


def _write_weight(module: Layer) -> None:
    with torch.no_grad():
        nn.init.uniform_(module.weight)


WRITES: dict[str, Callable[[Layer], None]] = {
    "sgd": _optimizer(torch.optim.SGD),
    "sgd foreach": _optimizer(torch.optim.SGD, foreach=True),
    "sgd fused": _optimizer(torch.optim.SGD, fused=True),
    "adamw fused": _optimizer(torch.optim.AdamW, fused=True),
    "adam": _optimizer(torch.optim.Adam, foreach=False),
    "data swap": _swap,
    "ema": _ema,
    "data copy": _data_copy,
    "numpy": _numpy,
    "one element": _in_place,
    "load": _load,
    "load assign": _load_assigned,
    "write": _write_weight,
    "to and back": lambda m: m.to(torch.float64).to(torch.float32),
    "type": lambda m: m.to(torch.bfloat16).to(torch.float32),
    "reset": lambda m: m.reset_parameters(),
    "assign": lambda m: setattr(m, "weight", torch.eye(len(m.weight))),
}


@pytest.mark.parametrize("size", [8, 300])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_an_evaluation_weight_is_never_stale(write: Callable[[Layer], None], size: int) -> None:
    """Whatever changes g, v or the weight itself, the next evaluation sees it, to the bit."""
    module = layer(size).eval()
    for _ in range(3):
        with torch.no_grad():
            before = module.weight
            assert module.weight is before
        write(module)
        with torch.no_grad():
            found = module.weight
        assert same_bits(found, now(module))
        with torch.inference_mode():
            assert same_bits(module.weight, now(module))


@pytest.mark.parametrize("size", [8, 300])
def test_training_and_evaluation_take_turns(size: int) -> None:
    """A weight kept for evaluation is not the one training differentiates, and steps reach the next evaluation."""
    module = layer(size)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    x = torch.randn(4, size)
    for _ in range(3):
        with torch.no_grad():
            assert same_bits(module(x), nn.functional.linear(x, now(module), module.bias))
        module(x).square().sum().backward()
        assert module.parametrizations.weight.original1.grad.abs().max() > 0
        optimizer.step()
        optimizer.zero_grad()


def test_a_fused_step_that_moves_one_row_is_seen() -> None:
    """torch's fused optimizers count no version, and what they moved may lie beside the bytes that are compared."""
    torch.manual_seed(0)
    net, x = wn.apply_weight_norm(nn.Linear(64, 2048, bias=False)), torch.randn(4, 64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, fused=True)
    net(x)[:, 5].square().sum().backward()
    with torch.no_grad():
        before = [net(x) for _ in range(2)][-1]
        optimizer.step()
        after = net(x)
        assert same_bits(after, wn.fold_weight_norm(copy.deepcopy(net))(x))
    assert not torch.equal(after[:, 5], before[:, 5])


def test_a_weight_somebody_holds_is_left_alone() -> None:
    """Memory is used again only when the last weight computed in it is gone, views, graphs and arrays included."""
    module = layer(300)
    x = torch.randn(2, 300)
    held = module.weight
    view, array, copied = module.weight.t(), module.weight.detach().numpy(), held.detach().clone()
    graph = module(x).square().sum()
    with torch.no_grad():
        module.parametrizations.weight.original0.mul_(2)
        evaluated = module.weight
    other = module(x)
    assert same_bits(held, copied)
    assert same_bits(view.t().contiguous(), copied)
    assert same_bits(torch.from_numpy(array), copied)
    assert same_bits(evaluated, now(module))
    del graph, other


def test_two_graphs_of_one_step_do_not_share_memory() -> None:
    """A discriminator on real and on fake images, then backward through both: the gradients of a plain net."""
    module, x, y = layer(300), torch.randn(2, 300), torch.randn(2, 300)
    w = module.weight.detach().clone().requires_grad_()
    for _ in range(2):
        module.zero_grad()
        a, b = module(x), module(y)
        (a.square().sum() + b.exp().sum()).backward()
    plain = nn.functional.linear(x, w, module.bias).square().sum() + nn.functional.linear(y, w, module.bias).exp().sum()
    (grad,) = torch.autograd.grad(plain, w)
    pair = module.parametrizations.weight
    v, norm = pair.original1.detach(), pair.original1.detach().norm(dim=1, keepdim=True)
    radial = (grad * v).sum(1, keepdim=True) / norm
    g = pair.original0.detach()
    assert torch.allclose(pair.original0.grad, radial, rtol=1e-4, atol=1e-4)
    assert torch.allclose(pair.original1.grad, g / norm * (grad - radial * v / norm), rtol=1e-4, atol=1e-4)


def test_gradients_do_not_depend_on_memory() -> None:
    """The same step gives the same bits whether memory was free or held, so that a resumed run is the same run."""
    x = torch.randn(3, 300)
    grads = []
    for hold in (False, True):
        module, held = layer(300), []
        for _ in range(3):
            module.zero_grad()
            held.append(module.weight if hold else None)
            module(x).square().sum().backward()
            held.append(module.parametrizations.weight.original1.grad if hold else None)
        grads.append(module.parametrizations.weight.original1.grad.clone())
    assert same_bits(*grads)


def test_a_kept_gradient_is_not_overwritten() -> None:
    """A gradient that the user, or a second backward, still holds keeps its values."""
    module, x = layer(300), torch.randn(3, 300)
    module(x).square().sum().backward()
    kept = module.parametrizations.weight.original1.grad
    values = kept.clone()
    module.zero_grad()
    module(x).exp().sum().backward()
    assert same_bits(kept, values)
    module(x).exp().sum().backward()  # accumulates
    single = layer(300)
    single(x).exp().sum().backward()
    total = module.parametrizations.weight.original1.grad
    assert torch.allclose(total, 2 * single.parametrizations.weight.original1.grad, rtol=1e-5, atol=1e-6)


def test_nothing_kept_goes_into_copies_or_files() -> None:
    """Copies and pickles hold g and v alone, and keep their own weights."""
    module = layer(300).eval()
    with torch.no_grad():
        first = module.weight
    copied, loaded = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    assert len(pickle.dumps(module)) < 4 * (300 * 300 + 3 * 300) + 20_000
    with torch.no_grad():
        module.parametrizations.weight.original0.mul_(2)
        assert same_bits(copied.weight, first)
        assert same_bits(loaded.weight, first)
        assert same_bits(module.weight, now(module))


@pytest.mark.parametrize("size", [8, 300])
@pytest.mark.parametrize("name", ["original0", "original1"])
def test_halves_in_the_others_place(name: str, size: int) -> None:
    """A half put in the place of the one that a kept weight was computed from is the one in use, and only while there:
    as a Parameter, as a plain tensor of the module, and by functional_call."""
    module, x = layer(size).eval(), torch.randn(2, size)
    pair = module.parametrizations.weight
    with torch.no_grad():
        first = module(x), module.weight.clone()
        half, other = pair._parameters[name], pair._parameters[name].detach().clone() + 1
        given = {f"parametrizations.weight.{name}": other}
        changed = torch.func.functional_call(module, given, x)
        assert not torch.equal(changed, first[0])
        assert torch.equal(module(x), first[0])
        pair._parameters[name] = nn.Parameter(other)
        assert torch.equal(module(x), changed)
        pair._parameters[name] = half
        assert torch.equal(module(x), first[0])
        del pair._parameters[name]
        pair.__dict__[name] = other
        assert torch.equal(module(x), changed)
        del pair.__dict__[name]
        pair._parameters[name] = half
        assert same_bits(module.weight, first[1])
        assert torch.equal(module(x), first[0])


@pytest.mark.parametrize("half", [0, 1])
def test_a_half_turned_in_place(half: int) -> None:
    """Bytes and place can stay while the weight does not: a direction transposed in place, memory lent to another."""
    module = layer(8).eval()
    pair = module.parametrizations.weight
    with torch.no_grad():
        for _ in range(2):
            module.weight  # noqa: B018 - kept from here on
        before = pair._parameters["original0"].data
        if half:
            pair._parameters["original1"].t_()
        else:
            pair._parameters["original0"].data = before.flip(0)
        assert same_bits(module.weight, now(module))


def test_who_comes_after_a_weight_was_kept_is_asked() -> None:
    """A hook on the list, a parametrization on top and torch's cache, none of which touch the pair, see the very next
    evaluation."""
    module, x = layer(8).eval(), torch.randn(2, 8)
    pair, calls = module.parametrizations.weight, []
    with torch.no_grad():
        for _ in range(3):
            usual = module(x)
        hook = pair.register_forward_hook(lambda *_: calls.append(1))
        assert torch.equal(module(x), usual)
        assert torch.equal(module.weight, now(module))
        assert calls == [1, 1]
        hook.remove()
        with nn.utils.parametrize.cached():
            assert module.weight is module.weight
            assert torch.equal(module(x), usual)
        nn.utils.parametrize.register_parametrization(module, "weight", nn.Tanh())
        assert torch.equal(module.weight, now(module).tanh())
        assert not torch.equal(module(x), usual)


def test_rooms_lend_once() -> None:
    """A room is lent again only when its last loan is gone; small or other tensors get none or their own."""
    rooms, like = Rooms(), torch.zeros(1 << 16)
    loan = rooms.take("w", like)
    assert loan is not None
    assert rooms.take("w", like) is None
    assert rooms.take("grad", like) is not None
    kept = loan[5:]
    del loan
    assert rooms.take("w", like) is None
    del kept
    gc.collect()
    assert rooms.take("w", like) is not None
    assert rooms.take("w", torch.zeros(1 << 16, dtype=torch.float64)).dtype == torch.float64  # type: ignore[union-attr]
    assert rooms.take("w", torch.zeros((1 << 16) - 1)) is None


@pytest.mark.parametrize("change", ["freed", "shared", "inference"])
def test_memory_that_is_no_longer_ours_is_not_lent_again(change: str) -> None:
    """A loan whose storage was freed, is shared with other processes or came of inference mode is the last of it."""
    rooms, like = Rooms(), torch.zeros(1 << 16)
    with torch.inference_mode(change == "inference"):
        loan = rooms.take("w", like)
    assert loan is not None
    if change == "freed":
        loan.untyped_storage().resize_(0)
    elif change == "shared":
        loan.share_memory_()
    at = loan.data_ptr()
    del loan
    new = rooms.take("w", like)
    assert new is not None
    assert new.untyped_storage().nbytes() == like.nbytes
    assert new.data_ptr() != at
    assert not new.is_shared()
    assert not new.is_inference()
    new.fill_(1.0)


@pytest.mark.parametrize("size", [6, 300])
@pytest.mark.parametrize("taken", ["in training", "in evaluation"])
@pytest.mark.parametrize("then", ["training", "evaluation", "evaluation twice", "frozen", "outside"])
@pytest.mark.parametrize("asked", ["training", "evaluation", "outside", "frozen"])
def test_a_write_into_a_weight_that_somebody_holds(size: int, taken: str, then: str, asked: str) -> None:
    """Passes of any kind in between and afterwards: the next use sees it, as that of a plain layer would."""
    module, x = layer(size), torch.eye(size)
    nn.init.zeros_(module.bias)

    def use(how: str) -> Tensor:
        module.requires_grad_(how != "frozen")
        with torch.set_grad_enabled(not how.startswith("evaluation")):
            for _ in range(1 + how.endswith("twice")):
                found = module.weight if how == "outside" else module(x).T
        return found

    with torch.set_grad_enabled(taken == "in training"):
        held = module.weight
    use(then)
    with torch.no_grad():
        held.fill_(1.0)
    assert torch.equal(use(asked), torch.ones(size, size))
    assert torch.equal(module.parametrizations.weight.original1, torch.ones(size, size))


@pytest.mark.parametrize("size", [6, 1200])  # the memory of the larger goes back to the system
def test_other_memory_put_under_a_kept_weight_reaches_the_pair(size: int) -> None:
    """`module.weight.data = tensor` in evaluation is the weight from then on; another shape is an error, once."""
    layer: Any = wn.apply_weight_norm(nn.Linear(size, size))
    with torch.no_grad():
        layer(torch.ones(1, size))
        new = torch.randn(size, size)
        layer.weight.data = new.clone()
        assert torch.equal(layer(torch.eye(size)) - layer.bias, (torch.eye(size) @ new.t() + layer.bias) - layer.bias)
        assert torch.equal(layer.parametrizations.weight.original1, new)
        layer.weight.data = torch.ones(size, 1)
        with pytest.raises(wn.PairError, match="does not fit"):
            layer(torch.ones(1, size))
        assert torch.equal(layer.weight, new)


@pytest.mark.parametrize("mode", ["parametrized", "deferred"])
@pytest.mark.parametrize("size", [6, 1200])
@pytest.mark.parametrize("was_trained", [False, True])
def test_a_frozen_weight_takes_other_memory_with_gradients_on(mode: Any, size: int, was_trained: bool) -> None:
    """`module.weight.data = tensor` is the weight of a frozen pair from then on, for all who ask."""
    layer: Any = wn.apply_weight_norm(nn.Linear(size, size, bias=False), mode=mode)
    x = torch.ones(1, size, requires_grad=True)
    if was_trained:
        layer(x).sum().backward()
        assert all(layer.weight.requires_grad for _ in range(4))
    layer.requires_grad_(False)
    for new in (torch.randn(size, size), torch.randn(size, size).t()):
        layer(x).sum().backward()
        layer.weight.data = new.clone(memory_format=torch.preserve_format)
        state = dict(layer.state_dict())
        wn.fold_state(state)
        assert torch.equal(state["weight"], new)
        assert torch.equal(layer(x), torch.nn.functional.linear(x, new.contiguous()))
        assert torch.equal(wn.fold_weight_norm(copy.deepcopy(layer)).weight, new)
    layer.weight.data = torch.ones(size, 1)
    with pytest.raises(wn.PairError, match="does not fit"):
        layer(x)
    assert torch.equal(layer.weight, new)


@pytest.mark.parametrize("size", [6, 1200])
def test_a_frozen_weight_is_kept_while_others_train(size: int) -> None:
    """With gradients on, too, it is computed when its pair has changed; a gradient that somebody wants of it is of the
    weight he has, and it can be trained at any time."""
    net: Any = nn.Sequential(wn.apply_weight_norm(nn.Linear(size, size)).requires_grad_(False), nn.Linear(size, 1))
    x = torch.randn(2, size, requires_grad=True)
    net(x), net(x)
    kept = net[0].weight
    assert not kept.requires_grad and net[0].weight is kept
    with torch.no_grad():
        net[0].parametrizations.weight.original0.mul_(2)
    assert torch.allclose(net[0].weight, 2 * kept)
    wanted = net[0].weight.requires_grad_()
    assert net[0].weight is not wanted and not net[0].weight.requires_grad
    net.requires_grad_(True)
    net(x).sum().backward()
    plain = wn.fold_weight_norm(copy.deepcopy(net))
    plain.zero_grad()
    x.grad = None
    (expected,) = torch.autograd.grad(plain(x).sum(), plain[0].weight)
    pair = net[0].parametrizations.weight
    assert torch.allclose(pair.original0.grad[:, 0], (expected * plain[0].weight).sum(1) / plain[0].weight.norm(dim=1))


@pytest.mark.parametrize("mode", ["parametrized", "deferred"])
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "ConvTranspose1d", "Embedding"])
def test_a_forward_in_the_place_of_the_lists_or_the_rules_is_asked(mode: Any, graph: bool, kind: str) -> None:
    """As torch's parametrizations are called, whoever has put a `forward` of his own there."""
    made = getattr(nn, kind)(4, 4, **({"kernel_size": 1} if "Conv" in kind else {}))
    layer: Any = wn.apply_weight_norm(made, include=type(made), mode=mode)
    x = torch.tensor([[1, 2]]) if kind == "Embedding" else torch.ones(1, 4, 4)
    with torch.set_grad_enabled(graph):
        usual, bias = layer(x), 0.0 if kind == "Embedding" else layer(x) * 0
        if kind != "Embedding":
            bias = layer.bias.view(-1, *(1,) * ("Conv" in kind)).expand_as(usual)
        entry = layer.parametrizations.weight
        real = entry.forward
        entry.forward = lambda: real() * 2
        assert torch.allclose(layer(x), 2 * (usual - bias) + bias, atol=1e-6)
        assert torch.allclose(layer.weight, 2 * real())
        del entry.forward
        assert torch.equal(layer(x), usual)
        if mode == "parametrized":
            rule = entry[0]
            computed = type(rule).forward
            rule.forward = lambda g, v: computed(rule, g, v) * 2
            with torch.no_grad():
                entry.original0.copy_(entry.original0.clone())  # what is kept goes
            assert torch.allclose(layer(x), 2 * (usual - bias) + bias, atol=1e-6)


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of elements of each weight that is computed for evaluation."""
    found: list[int] = []
    real = WeightNorm.compose

    def compose(self: WeightNorm, g: Tensor, v: Tensor, *rest: Any) -> Tensor:
        found.append(v.numel())
        return real(self, g, v, *rest)

    monkeypatch.setattr(WeightNorm, "compose", compose)
    straight = Straight.without_graph

    def without_graph(self: Straight, g: Tensor, v: Tensor, rooms: Rooms) -> Tensor | None:
        found.append(v.numel())
        return straight(self, g, v, rooms)

    monkeypatch.setattr(Straight, "without_graph", without_graph)
    return found


def test_weights_that_evaluation_uses_once_a_step_are_not_kept(composed: list[int]) -> None:
    """What nobody reads again is not worth a record; a second use has it kept, and a third finds it."""
    large, small = 512, 16
    net = wn.apply_weight_norm(nn.Sequential(nn.Linear(small, small), nn.Linear(small, large), nn.Linear(large, large)))
    optimizer, x = torch.optim.SGD(net.parameters(), lr=1e-6), torch.randn(2, small)

    def step(uses: int) -> list[bool]:
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        composed.clear()
        with torch.no_grad():
            wanted = x
            for layer in net:
                wanted = nn.functional.linear(wanted, now(layer), layer.bias)
            for _ in range(uses):
                assert same_bits(net(x), wanted)
        return [layer.parametrizations.weight._kept is not None for layer in net]  # type: ignore[union-attr,index]

    assert step(1) == [True, True, True]
    for _ in range(2):
        assert step(1) == [False, False, False]
        assert composed.count(large * large) == 1
    assert step(3) == [True, True, True]
    assert composed.count(large * large) == 2
    for _ in range(2):
        assert step(3) == [True, True, True]
        assert composed.count(large * large) == 1
    with torch.inference_mode():
        assert same_bits(net[2].weight, now(net[2]))


def test_a_weight_that_is_not_kept_is_when_somebody_else_asks_for_it() -> None:
    """Whoever reads `module.weight` may write into it in ways that only a kept one tells of."""
    net = wn.apply_weight_norm(nn.Sequential(nn.Linear(512, 512)))
    layer, x = net[0], torch.randn(2, 512)
    for _ in range(3):
        net(x).sum().backward()
        with torch.no_grad():
            net(x)
            layer.parametrizations.weight.original0.mul_(2)  # type: ignore[union-attr,index,operator]
    with torch.no_grad():
        layer.weight.data.fill_(0.5)
        assert torch.equal(layer.weight, torch.full((512, 512), 0.5))
        assert torch.equal(layer.parametrizations.weight.original1, layer.weight)  # type: ignore[union-attr,index]


def test_layers_that_pass_their_memory_on_do_not_meet() -> None:
    """One layer's weight is gone by the time another's takes its place, also where threads run the same net."""
    net = wn.apply_weight_norm(nn.Sequential(*(nn.Linear(400, 400) for _ in range(3))))
    x = torch.randn(2, 400)
    for _ in range(2):
        net(x).sum().backward()
        with torch.no_grad():
            net(x)
            for p in net.parameters():
                p.mul_(1.5)

    def run(_: int) -> Tensor:
        with torch.no_grad():
            return net(x)

    wanted = x
    for layer in net:
        wanted = nn.functional.linear(wanted, now(layer), layer.bias).detach()
    with ThreadPoolExecutor(8) as pool:
        assert all(same_bits(found, wanted) for found in pool.map(run, range(24)))
