"""Gradient descent on deferred weights in one pass over memory: the bits of torch's own steps, or torch's own steps."""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import wnsurgery as wn
from wnsurgery import deferred, fused, sgd_step
from wnsurgery.sgd_step import StepsOfPairs, rules_of

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.02},
    "momentum": {"momentum": 0.9},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.02},
    "dampened": {"momentum": 0.8, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
}


class Net(nn.Module):
    """A lookup table, convolutions with axis 0, axis 1 and no axis kept, a wide layer and a narrow one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 24)
        self.conv = nn.Conv1d(24, 30, 3)
        self.up = nn.ConvTranspose1d(30, 16, 2)
        self.wide = nn.Linear(16, 5000)
        self.narrow = nn.Linear(5000, 1, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.up(self.conv(self.table(ids).transpose(1, 2)).relu()).mean(-1)
        return self.narrow(self.wide(x).tanh())  # type: ignore[no-any-return]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many weights each call of the kernels moved."""
    if not fused.start():
        pytest.skip("numba is not installed")
    assert sgd_step._agree()
    found: list[int] = []
    step = StepsOfPairs.step

    def counted(self: StepsOfPairs, grads: Any, *rest: Any) -> Any:
        found.append(len(grads))
        return step(self, grads, *rest)

    monkeypatch.setattr(StepsOfPairs, "step", counted)
    return found


def made(seed: int = 0, make: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(seed)
    return wn.apply_weight_norm(make(), include="*", mode="deferred")


def by_torch(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer at which somebody looks on, so that it does everything itself."""
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


def same(a: Any, b: Any) -> None:
    """Every bit of two nets: parameters, gradients and weights."""
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert bits(p) == bits(q), name
        assert (p.grad is None) is (q.grad is None), name
        assert p.grad is None or bits(p.grad) == bits(q.grad), f"{name}.grad"
    for (name, m), (_, n) in zip(a.named_modules(), b.named_modules(), strict=True):
        if name.count(".") == 0 and hasattr(m, "parametrizations"):
            assert bits(m.weight) == bits(n.weight), name


def bits(tensor: Any) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()  # type: ignore[no-any-return]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, each: Callable[[], Any] = list) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        for _ in range(1 + step % 2):  # one batch, two batches
            (model(torch.randint(0, 20, (4, 9))) - 1).square().mean().backward()
        optimizer.step()
        each()
        optimizer.zero_grad()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_twelve_steps_have_the_bits_of_torchs_own(options: dict[str, Any], threads: int, runs: list[int]) -> None:
    """g, v, gradients, momenta and weights after each of twelve steps, on one thread and two."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours, theirs = made(), made()
        a = torch.optim.SGD(ours.parameters(), lr=0.002, **options)
        b = by_torch(torch.optim.SGD(theirs.parameters(), lr=0.002, **options))
        for _ in range(6):
            train(ours, a, 2)
            train(theirs, b, 2)
            same(ours, theirs)
        states = zip(a.state_dict()["state"].items(), b.state_dict()["state"].items(), strict=True)
        for (_, mine), (_, other) in states:
            assert mine.keys() == other.keys()
            assert all(x is other[key] or bits(x) == bits(other[key]) for key, x in mine.items())
    finally:
        torch.set_num_threads(before)
    first = 1  # the kernels are loaded by then, and momenta are there
    assert len(runs) >= 12 - first
    assert set(runs) == {5}


def test_gradients_are_there_after_the_step_and_each_group_has_its_own_rate(runs: list[int]) -> None:
    """`g.grad` and `v.grad` are what torch's step leaves; parameter groups with rates and decays of their own."""
    ours, theirs = made(), made()
    pair = []
    for model in (ours, theirs):
        groups = wn.weight_norm_param_groups(model, lr=0.05, magnitude_lr=0.2, weight_decay=0.1)
        pair.append(torch.optim.SGD(groups, momentum=0.5))
    by_torch(pair[1])
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in pair]
    for _ in range(4):
        for model, optimizer, scheduler in zip((ours, theirs), pair, schedulers, strict=True):
            model(torch.arange(18).view(2, 9)).square().mean().backward()
            optimizer.step()
            scheduler.step()
        same(ours, theirs)
        assert all(p.grad is not None for p in ours.parameters())
        for optimizer in pair:
            optimizer.zero_grad()
        assert all(p.grad is None for p in ours.parameters())
    assert runs


def test_a_gradient_that_somebody_saw_is_stepped_by_torch(runs: list[int]) -> None:
    """Clipping and logs before the step see and may change gradients: torch steps with them, to the same bits."""
    ours, theirs = made(), made()
    a, b = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs))
    by_torch(b)
    train(ours, a, 1)
    train(theirs, b, 1)
    runs.clear()
    for model, optimizer in ((ours, a), (theirs, b)):
        model(torch.arange(18).view(2, 9)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    assert not runs
    same(ours, theirs)


def test_a_gradient_negated_without_a_copy_moves_as_any_other(runs: list[int]) -> None:
    """A gradient put on the weight as -u, which is u's memory with a bit beside it, moves g and v as a copy does."""
    up, found = torch.randn(300, 300, generator=torch.Generator().manual_seed(1)), []
    for grad in (torch._neg_view(up), -up):
        torch.manual_seed(0)
        layer = wn.apply_weight_norm(nn.Linear(300, 300, bias=False), mode="deferred")
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        layer.weight.grad = grad
        optimizer.step()
        found.append(layer.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name])
    assert runs == [1]


@pytest.mark.parametrize(
    "how", ["closure", "foreach", "maximize", "tensor", "pre hook", "post hook", "global", "subclass", "adam", "scaler"]
)
def test_who_looks_on_or_wants_something_else_gets_torchs_step(how: str, runs: list[int]) -> None:
    """Closures, other implementations, hooks, subclasses, other optimizers, scalers: nothing is done for them."""

    class Own(torch.optim.SGD):
        pass

    model = made()
    kind = {"subclass": Own, "adam": torch.optim.Adam}.get(how, torch.optim.SGD)
    options = {"foreach": {"foreach": True}, "maximize": {"maximize": True}}.get(how, {})
    optimizer: Any = kind(model.parameters(), lr=torch.tensor(0.1) if how == "tensor" else 0.1, **options)
    seen: list[Any] = []
    look = lambda *_: seen.append([p.grad is not None for p in model.parameters()])  # noqa: E731
    handles = []
    if how == "pre hook":
        optimizer.register_step_pre_hook(look)
    elif how == "post hook":
        optimizer.register_step_post_hook(look)
    elif how == "global":
        handles.append(register_optimizer_step_pre_hook(look))
    try:
        model(torch.arange(18).view(2, 9)).sum().backward()
        if how == "closure":
            optimizer.step(lambda: model(torch.arange(18).view(2, 9)).sum())
        elif how == "scaler":
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            scaler.scale(model(torch.arange(18).view(2, 9)).sum()).backward()
            scaler.step(optimizer)
        else:
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert not runs
    assert all(map(all, seen)) and bool(seen) is ("hook" in how or how == "global")
    assert {type(p.grad) for p in model.parameters()} == {Tensor}


@pytest.mark.parametrize("what", ["grad_scale", "found_inf"])
def test_what_a_scaler_tells_an_optimizer_is_heeded(what: str, runs: list[int]) -> None:
    """torch's fused SGD divides by `grad_scale` and moves nothing where `found_inf` is set, whoever looked or not."""
    nets = []
    for mode in ("parametrized", "deferred"):
        net = wn.set_weight_norm_mode(made(), mode)
        optimizer: Any = torch.optim.SGD(net.parameters(), 0.1, fused=True)
        setattr(optimizer, what, torch.tensor(4.0 if what == "grad_scale" else 1.0))
        if what == "found_inf":
            optimizer.grad_scale = torch.tensor(1.0)
        before = [p.detach().clone() for p in net.parameters()]
        net(torch.arange(12).view(2, 6)).square().sum().backward()
        optimizer.step()
        assert any(map(torch.equal, before, net.parameters())) is (what == "found_inf")
        nets.append(net)
    assert not sum(runs)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q)


def test_a_magnitude_of_two_weights_takes_the_gradients_of_both(runs: list[int]) -> None:
    """Where two weights have one g, it moves once by the sum, momentum and all."""

    def tied() -> Any:
        model: Any = made(1, lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)))
        wn.set_weight_norm_mode(model, "parametrized")
        model[2].parametrizations.weight._parameters["original0"] = model[0].parametrizations.weight.original0
        return wn.set_weight_norm_mode(model, "deferred") or model

    ours, theirs = tied(), tied()
    a, b = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (ours, theirs))
    by_torch(b)
    for step in range(4):
        for model, optimizer in ((ours, a), (theirs, b)):
            torch.manual_seed(step)
            model(torch.randn(5, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        same(ours, theirs)
    assert set(runs) == {1}


@pytest.mark.parametrize("rate", [1e12, 1e30, float("nan")])
def test_a_step_that_leaves_the_ordinary_range(rate: float, runs: list[int]) -> None:
    """Rows far too long or not finite after the step: the weights are those that torch's step ends in."""
    ours, theirs = made(), made()
    a, b = (torch.optim.SGD(m.parameters(), lr=1e-3) for m in (ours, theirs))
    by_torch(b)
    train(ours, a, 2)
    train(theirs, b, 2)
    for optimizer in (a, b):
        optimizer.param_groups[0]["lr"] = rate
    runs.clear()
    train(ours, a, 1)
    train(theirs, b, 1)
    assert runs == ([5] if math.isfinite(rate) else [])
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=0, atol=0, equal_nan=True)
    for name in ("table", "conv", "wide", "narrow"):
        w, other = getattr(ours, name).weight, getattr(theirs, name).weight
        torch.testing.assert_close(w, other, rtol=0, atol=0, equal_nan=True)


def test_halves_that_are_not_both_moved_are_left_to_torch(runs: list[int]) -> None:
    """Frozen magnitudes, and halves in two optimizers, or in none."""
    ours, theirs = made(), made()
    wn.freeze_magnitude(ours)
    wn.freeze_magnitude(theirs)
    a, b = (torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (ours, theirs))
    train(ours, a, 3)
    train(theirs, by_torch(b), 3)
    same(ours, theirs)
    model = made()
    split = [torch.optim.SGD([p for n, p in model.named_parameters() if n.endswith(h)], lr=0.1) for h in ("0", "1")]
    model(torch.arange(18).view(2, 9)).sum().backward()
    for optimizer in split:
        optimizer.step()
    assert not runs


def test_a_step_that_fails_leaves_a_net_that_goes_on(runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error inside of torch's step: what the kernels moved is moved, and nothing of it is moved again later."""
    model: Any = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, 2)
    twin = copy.deepcopy(model)
    other = torch.optim.SGD(twin.parameters(), lr=0.1)
    runs.clear()
    model(torch.arange(18).view(2, 9)).sum().backward()
    model.wide.bias.grad = None
    monkeypatch.setattr(sys.modules["torch.optim.sgd"], "sgd", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    monkeypatch.undo()
    assert model.conv.parametrizations.weight.original1.grad is None
    now = model.conv.weight.detach().clone()
    assert not torch.equal(now, twin.conv.weight)
    optimizer.zero_grad()
    optimizer.step()
    other.step()
    assert model.conv.parametrizations.weight.original1.grad is None
    assert torch.equal(model.conv.weight, now)
    w = wn.fold_weight_norm(copy.deepcopy(model)).conv.weight
    assert torch.equal(w, now)


def test_a_write_into_a_weight_before_the_step(runs: list[int]) -> None:
    """What is written into `module.weight` reaches g and v first, and so does the gradient; the others move as ever."""
    ours, theirs = made(), made()
    a, b = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs))
    by_torch(b)
    train(ours, a, 1)
    train(theirs, b, 1)
    for model, optimizer in ((ours, a), (theirs, b)):
        model(torch.arange(18).view(2, 9)).sum().backward()
        nn.init.constant_(model.conv.weight, 0.25)  # type: ignore[union-attr,arg-type]
        optimizer.step()
        optimizer.zero_grad()
    same(ours, theirs)
    train(ours, a, 3)
    train(theirs, b, 3)
    same(ours, theirs)


def test_rows_without_a_gradient_stay(runs: list[int]) -> None:
    """Rows of a lookup table that no batch asked for: not a bit of v, g and w, and gradients of zero; what was written
    into them unseen shows in w all the same."""
    model: Any = made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, optimizer, 1)
    entry = model.table.parametrizations.weight
    before = [t.detach().clone() for t in (entry.original0, entry.original1, model.table.weight)]
    runs.clear()
    model(torch.arange(9).view(1, 9)).sum().backward()
    optimizer.step()
    assert runs == [5]
    after = entry.original0, entry.original1, model.table.weight
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[9:], new[9:])
        assert not torch.equal(old[:9], new[:9])
    assert not entry.original1.grad[9:].any()
    assert not entry.original0.grad[9:].any()
    optimizer.zero_grad()
    model(torch.arange(9).view(1, 9)).sum().backward()
    entry._parameters["original1"].data[20] *= -1
    optimizer.step()
    assert len(runs) == 2
    assert torch.equal(model.table.weight[20], -before[2][20])


def test_rows_of_magnitude_zero(runs: list[int]) -> None:
    """g = 0, of which v gets no gradient, and g gets one that may wake the row."""
    ours, theirs = made(), made()
    a, b = (torch.optim.SGD(m.parameters(), lr=0.01) for m in (ours, theirs))
    by_torch(b)
    for model, optimizer in ((ours, a), (theirs, b)):
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("original0"):
                    p.view(-1)[::2] = 0.0
        for _ in range(3):
            train(model, optimizer, 1)
            model(torch.arange(18).view(2, 9)).sum().backward()
            optimizer.step()
    same(ours, theirs)
    assert len(runs) > 3


def test_the_kernels_are_used_only_where_they_give_torchs_bits(
    runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are tried beside torch's operations first; a last bit that differs rules them out."""
    x = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([x], lr=0.1)
    sgd_step._agree.cache_clear()
    assert rules_of(optimizer, (), {})
    original = sgd_step._run

    def off_by_one(*arguments: Any) -> Any:
        arguments[4][..., 0] *= 1 + 2.0**-23
        return original(*arguments)

    monkeypatch.setattr(sgd_step, "_run", off_by_one)
    sgd_step._agree.cache_clear()
    assert not rules_of(optimizer, (), {})
    monkeypatch.undo()
    sgd_step._agree.cache_clear()
    assert rules_of(optimizer, (), {})


def test_memory_that_moved(runs: list[int]) -> None:
    """`p.data = ...` between two steps: the kernels do not write to where the pair was."""
    ours, theirs = made(), made()
    a, b = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs))
    by_torch(b)
    for step in range(3):
        train(ours, a, 2)
        train(theirs, b, 2)
        for model in (ours, theirs):
            p = list(model.parameters())[step]
            p.data = p.data.clone() * 0.9
        same(ours, theirs)
    assert isinstance(next(iter(ours.parameters())), deferred.DeferredParameter)


MOMENTA: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "other strides": lambda m: m.t().contiguous().t(),
    "negated": lambda m: torch._neg_view(-m),
}


@pytest.mark.parametrize("kind", MOMENTA)
def test_momenta_that_the_kernels_cannot_read_are_torchs_to_move(kind: str, runs: list[int]) -> None:
    """Those of a net that was of another type before, or laid out in another way: the course is torch's."""
    ours, theirs = (made(1, lambda: nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 3))) for _ in range(2))
    a, b = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (ours, theirs))
    by_torch(b)
    for model, optimizer in ((ours, a), (theirs, b)):
        for step in range(3):
            torch.manual_seed(step)
            model(torch.randn(5, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                for state in optimizer.state.values():
                    if state["momentum_buffer"].ndim == 2:
                        state["momentum_buffer"] = MOMENTA[kind](state["momentum_buffer"])
    assert len(runs) == 1
    same(ours, theirs)


@pytest.mark.parametrize("how", ["differentiable", "momentum of another shape", "momentum made in inference mode"])
def test_a_step_that_torch_refuses_is_refused(how: str, runs: list[int]) -> None:
    """A differentiable step of leaves, and momenta that are not to be written: torch says so, and nothing has moved."""
    layer = made(1, lambda: nn.Linear(6, 3, bias=False))
    options = {"differentiable": True} if how == "differentiable" else {"momentum": 0.9}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, **options)  # type: ignore[arg-type]
    before = copy.deepcopy(layer.state_dict())
    for p in layer.parameters() if "momentum" in options else ():
        with torch.inference_mode("inference" in how):
            optimizer.state[p]["momentum_buffer"] = torch.zeros(p.shape if "inference" in how else p.shape[:1])
    layer(torch.ones(2, 6)).sum().backward()
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert not runs
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_gradient_with_a_graph_is_refused(runs: list[int]) -> None:
    """After `backward(create_graph=True)` a step says that there are no second derivatives, and moves nothing."""
    layer = made(1, lambda: nn.Linear(6, 3, bias=False))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = copy.deepcopy(layer.state_dict())
    layer(torch.ones(2, 6)).square().sum().backward(create_graph=True)
    with pytest.raises(wn.ModeError, match="second derivatives"):
        optimizer.step()
    assert not runs
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("which", ["weight", "g", "v", "momentum of g", "momentum of v"])
def test_a_graph_made_before_the_step_notices_it(which: str, runs: list[int]) -> None:
    """What was saved for a backward pass and has moved since is refused, as after torch's own step."""
    layer: Any = made(1, lambda: nn.Linear(6, 3, bias=False))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

    def step() -> None:
        layer(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    moved = {"weight": layer.weight, "g": g, "v": v}
    moved |= {f"momentum of {n}": optimizer.state[p]["momentum_buffer"] for n, p in (("g", g), ("v", v))}
    x = torch.ones_like(moved[which], requires_grad=True)
    loss = (x * moved[which]).sum()
    runs.clear()
    step()
    assert runs == [1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_magnitude_that_another_net_has_taken_too(runs: list[int]) -> None:
    """A net whose weights the kernels have moved before, and one g of which is a second net's now: it moves once."""
    pairs = []
    for _ in range(2):
        first: Any = made(1, lambda: nn.Linear(6, 3))
        second: Any = made(2, lambda: nn.Linear(6, 3))
        optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
        pairs.append((first, second, optimizer))
    by_torch(pairs[1][2])
    for first, second, optimizer in pairs:
        first(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        wn.set_weight_norm_mode(second, "parametrized")
        second.parametrizations.weight._parameters["original0"] = first.parametrizations.weight.original0
        wn.set_weight_norm_mode(second, "deferred")
        for _ in range(2):
            (first(torch.ones(2, 6)).square().sum() + second(torch.ones(2, 6)).square().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert runs
    for ours, theirs in zip(pairs[0][:2], pairs[1][:2], strict=True):
        same(ours, theirs)


class _Twins:
    """Two like nets to which the same things happen; one is stepped by the kernels where they may, the other never."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.nets: list[Any] = [
            made(seed, lambda: nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)))
            for _ in range(2)
        ]
        self.equip()

    def equip(self) -> None:
        options = self.chance.choice(list(OPTIONS.values()))
        self.optimizers: Any = [torch.optim.SGD(net.parameters(), lr=0.02, **options) for net in self.nets]
        by_torch(self.optimizers[1])

    def each(self, deed: Callable[[Any, Any], Any]) -> None:
        for net, optimizer in zip(self.nets, self.optimizers, strict=True):
            deed(net, optimizer)

    def some(self) -> Callable[[Any], nn.Parameter]:
        at, half = self.chance.choice((0, 1, 3)), self.chance.choice(("original0", "original1"))
        return lambda net: net[at].parametrizations.weight._parameters[half]  # type: ignore[no-any-return]

    def backward(self) -> None:
        ids = torch.tensor([self.chance.randrange(9) for _ in range(5)])
        self.each(lambda net, _: (net(ids) - 0.1).square().sum().backward())

    def step(self) -> None:
        self.each(lambda _, optimizer: optimizer.step())

    def step_and_zero(self) -> None:
        self.each(lambda _, optimizer: (optimizer.step(), optimizer.zero_grad()))

    def zero(self) -> None:
        to_none = self.chance.random() < 0.5
        self.each(lambda _, optimizer: optimizer.zero_grad(to_none))

    def look(self) -> None:
        some = self.some()
        self.each(lambda net, _: some(net).grad)

    def clip(self) -> None:
        self.each(lambda net, _: nn.utils.clip_grad_norm_(net.parameters(), 0.5))

    def freeze(self) -> None:
        some = self.some()
        self.each(lambda net, _: some(net).requires_grad_(not some(net).requires_grad))

    def write(self) -> None:
        some = self.some()
        with torch.no_grad():
            self.each(lambda net, _: some(net).mul_(1.25))

    def write_unseen(self) -> None:
        some = self.some()
        self.each(lambda net, _: some(net).data.mul_(1.25))

    def replace(self) -> None:
        some = self.some()

        def deed(net: Any, _: Any) -> None:
            some(net).data = some(net).data * 0.75

        self.each(deed)

    def write_weight(self) -> None:
        at = self.chance.choice((0, 1, 3))
        self.each(lambda net, _: nn.init.normal_(net[at].weight, generator=torch.Generator().manual_seed(at)))

    def settings(self) -> None:
        name, value = self.chance.choice((("lr", 0.05), ("weight_decay", 0.1), ("momentum", 0.5), ("momentum", 0.0)))
        self.each(lambda _, optimizer: optimizer.param_groups[0].update({name: value, "nesterov": False}))

    def copy(self) -> None:
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        self.nets = [copy.deepcopy(net) for net in self.nets]
        for net in self.nets:
            wn.set_weight_norm_mode(net, "deferred")
        self.equip()
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def load(self) -> None:
        self.each(lambda net, _: net.load_state_dict({k: x * 1.1 for k, x in net.state_dict().items()}))

    def mode(self) -> None:
        for mode in ("parametrized", "deferred"):
            self.each(lambda net, _, mode=mode: wn.set_weight_norm_mode(net, mode))

    def evaluate(self) -> None:
        with torch.no_grad():
            self.each(lambda net, _: net(torch.arange(9)))

    def run(self, deeds: int) -> None:
        often: list[Any] = [self.backward] * 6 + [self.step_and_zero] * 6 + [self.step] * 2
        rare = [self.look, self.clip, self.freeze, self.write, self.write_unseen, self.replace, self.write_weight]
        rare += [self.zero, self.settings, self.copy, self.load, self.mode, self.evaluate]
        done = []
        for _ in range(deeds):
            deed = self.chance.choice(often + rare)
            done.append(deed.__name__)
            deed()
            if self.chance.random() < 0.5:
                for net in self.nets:
                    net(torch.arange(9))
            if self.chance.random() < 0.9:
                continue
            for a, b in zip(self.nets[0].state_dict().values(), self.nets[1].state_dict().values(), strict=True):
                assert bits(a) == bits(b), done
        same(*self.nets)


@pytest.mark.parametrize("seed", range(0, 60, 6))
def test_whatever_else_is_done_the_course_is_torchs(seed: int, runs: list[int]) -> None:
    """Forty things in any order, each to two nets: the bits of the one that the kernels step are those of the other."""
    for one in range(seed, seed + 6):
        _Twins(one).run(40)
    assert runs
