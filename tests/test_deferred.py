"""Deferred mode: the training of the default mode at the price of a plain net, and errors where it cannot be had."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import wnsurgery as wn
from wnsurgery.deferred import DeferredParameter

from nets import NETS, TiedLanguageModel, net, same_bits

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.usefixtures("one_thread"),
]

HERE = Path(__file__).parent
STEPS = 100


def made() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(30, 8), nn.Tanh(), nn.Linear(8, 1))


def data(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(8, 2, 7, generator=torch.Generator().manual_seed(step))
    return x, x.sum((1, 2))[:, None].sin()


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = data(step)
    return (model(x) - y).square().mean()


def torchs() -> nn.Sequential:
    """The same net under torch's own weight norm: an oracle that shares no code with ours."""
    model = made()
    for layer in (model[0], model[3], model[5]):
        parametrizations.weight_norm(layer)
    return model


Loop = Callable[[nn.Module, torch.optim.Optimizer], None]


def plain_loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def clipping(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        loss_of(model, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        model.zero_grad()


def clipping_values_and_keeping_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        loss_of(model, step).backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.02)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def accumulation(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        for part in range(4):
            (loss_of(model, 4 * step + part) / 4).backward()
            if part == 1:  # somebody logs a norm in the middle
                assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()


def scaler(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scale = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=7)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, step) * (float("inf") if step == 5 else 1.0)  # a step that is skipped
        scale.scale(loss).backward()
        scale.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scale.step(optimizer)
        scale.update()


def schedule(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=STEPS)
    for step in range(STEPS):
        loss_of(model, step).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def closure(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):

        def evaluate(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        optimizer.step(evaluate)  # type: ignore[arg-type]


def evaluation_in_between(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        loss_of(model, step).backward()
        with torch.no_grad():
            loss_of(model, step + 1)
        optimizer.step()
        with torch.inference_mode():
            loss_of(model, step + 1)
        optimizer.zero_grad()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "foreach": partial(torch.optim.SGD, lr=0.05, foreach=True),
}
LOOPS: dict[str, Loop] = {
    f.__name__: f
    for f in (
        plain_loop,
        clipping,
        clipping_values_and_keeping_gradients,
        accumulation,
        scaler,
        schedule,
        closure,
        evaluation_in_between,
    )
}


@pytest.mark.parametrize(
    ("kind", "loop"),
    [(kind, loop) for kind in OPTIMIZERS for loop in LOOPS if kind in ("sgd", "adamw") or loop == "plain_loop"],
)
def test_a_hundred_steps_take_torchs_course(kind: str, loop: str) -> None:
    """Whatever optimizer and loop, a hundred steps end where torch's weight norm ends, to rounding."""
    ours, theirs = made(), torchs()
    optimizer = OPTIMIZERS[kind](ours.parameters())
    wn.apply_weight_norm(ours, optimizer=optimizer, mode="deferred")
    LOOPS[loop](ours, optimizer)
    LOOPS[loop](theirs, OPTIMIZERS[kind](theirs.parameters()))
    found, expected = ours.state_dict(), theirs.state_dict()
    start = torchs().state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert not torch.equal(value, start[name]), name
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-4, msg=name)


def test_lbfgs() -> None:
    """An optimizer that moves parameters within its step sees the weight follow each time."""
    ends = []
    for model in (wn.apply_weight_norm(made(), mode="deferred"), torchs()):
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5)
        for _ in range(4):
            start = loss_of(model, 0).item()

            def evaluate(model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, 0)
                loss.backward()
                return loss

            optimizer.step(evaluate)  # type: ignore[arg-type]
        ends.append(loss_of(model, 0).item())
        assert ends[-1] < start
    assert ends[0] == pytest.approx(ends[1], rel=1e-2)


@pytest.mark.parametrize("name", [n for n in NETS if n != "branches"])
def test_gradients_of_every_layer(name: str) -> None:
    """Gradients of g, v and all else over two backward passes are autograd's through the default mode."""
    found = []
    for mode in ("deferred", "parametrized"):
        model, x = net(name)
        wn.apply_weight_norm(model, mode=mode)  # type: ignore[arg-type]
        for scale in (1.0, 2.0):
            (model(x) * scale).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    for ours, expected in zip(*found, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None and expected is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("magnitude", ["linear", "log"])
def test_other_types_and_magnitudes(dtype: torch.dtype, magnitude: Any) -> None:
    """Other types, log-scale magnitudes and rows of extreme size train as in the default mode."""
    found = []
    for mode in ("deferred", "parametrized"):
        torch.manual_seed(0)
        layer = nn.Linear(6, 5).to(dtype)
        with torch.no_grad():
            layer.weight[0] = 0
            layer.weight[1] *= 1e-4 if dtype == torch.float16 else 1e-25
        wn.apply_weight_norm(layer, magnitude=magnitude, mode=mode)  # type: ignore[arg-type]
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        for _ in range(3):
            layer(torch.linspace(-1, 1, 12).reshape(2, 6).to(dtype)).float().square().sum().backward()
            optimizer.step()
        found.append(layer.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], msg=name)


# The net in between is plain -----------------------------------------------------------------------------


def test_the_graph_is_that_of_a_plain_net() -> None:
    """The weight is one leaf at every use, and a backward pass leaves its gradient as a plain net's."""
    model, twin = wn.apply_weight_norm(made(), mode="deferred"), made()
    leaf: Any = model[3].weight
    assert leaf.is_leaf
    assert type(leaf) is nn.Parameter
    for net_ in (model, twin):
        loss_of(net_, 0).backward()
    assert same_bits(leaf.grad, twin[3].weight.grad)  # type: ignore[arg-type]
    assert model[3].weight is leaf
    names = [n for n, _ in model.named_parameters()]
    assert names == [n for n, _ in wn.apply_weight_norm(made()).named_parameters()]


def test_many_backward_passes_pass_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """K backward passes, a clipping and a step turn all dL/dw over once, and write all weights once."""
    calls: list[str] = []
    model = wn.apply_weight_norm(made(), mode="deferred")
    optimizer = torch.optim.Adam(model.parameters())
    for name in ("gradients", "compose"):
        original = getattr(wn.multi_tensor.ManyWeights, name)  # type: ignore[attr-defined]

        def counted(*a: Any, _name: str = name, _original: Any = original, **k: Any) -> Any:
            calls.append(_name)
            return _original(*a, **k)

        monkeypatch.setattr(wn.multi_tensor.ManyWeights, name, counted)  # type: ignore[attr-defined]
    for _ in range(8):
        loss_of(model, 0).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    loss_of(model, 0)
    assert calls == ["gradients", "compose"]


@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_compiled_training() -> None:
    """Compiled as one graph, training follows eager steps, loading, and writes announced by setting the mode."""
    torch.compiler.reset()
    model, twin = (wn.apply_weight_norm(made(), mode="deferred") for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, twin)]
    for step in range(5):
        for net_, optimizer in zip((compiled, twin), optimizers, strict=True):
            loss_of(net_, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(compiled(data(0)[0]), twin(data(0)[0]))
    fresh = wn.apply_weight_norm(made())
    model.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(compiled(data(0)[0]), fresh(data(0)[0]))
    with torch.no_grad():
        for net_ in (model, fresh):
            net_[3].parametrizations.weight.original0.mul_(2)
    wn.set_weight_norm_mode(model, "deferred")
    torch.testing.assert_close(compiled(data(0)[0]), fresh(data(0)[0]))


def test_penalty_on_input_gradients() -> None:
    """A gradient penalty, whose backward pass runs through a gradient, gives g and v what torch's weight norm gives."""
    found = []
    for model in (wn.apply_weight_norm(made(), mode="deferred"), wn.apply_weight_norm(made())):
        x = data(0)[0].requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (slope.square().sum() - 1).square().backward()
        found.append([p.grad for p in model.parameters()])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_what_it_cannot_do_raises() -> None:
    """Second derivatives through g and v and hooks on their gradients are errors; afterwards training goes on."""
    model = wn.apply_weight_norm(made(), mode="deferred")
    loss_of(model, 0).backward(create_graph=True)
    with pytest.raises(wn.ModeError, match="second derivatives"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    g: Any = model[3].parametrizations.weight.original0
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(loss_of(model, 0), g)
    for register in (g.register_hook, g.register_post_accumulate_grad_hook):
        with pytest.raises(wn.ModeError, match="once a step"):
            register(lambda _: None)
    for node in (lambda: g.view_as(g), lambda: g.expand_as(g), lambda: torch.autograd.graph.get_gradient_edge(g)):
        with pytest.raises(wn.ModeError, match="once a step"):
            node()
    with torch.no_grad():
        assert torch.equal(g.view_as(g).expand_as(g), g)
    assert g.view_as(g.detach()).expand_as(g.detach()).requires_grad
    with pytest.raises(wn.SelectionError, match="mode must be"):
        wn.set_weight_norm_mode(model, "lazy")  # type: ignore[arg-type]
    with pytest.raises(wn.SelectionError, match="mode must be"):
        wn.apply_weight_norm(made(), mode="lazy")  # type: ignore[arg-type]
    other = wn.apply_weight_norm(made())
    other[3].parametrizations.weight.original0.register_hook(lambda _: None)
    with pytest.raises(wn.ModeError, match="hook"):
        wn.set_weight_norm_mode(other, "deferred")
    assert not any(isinstance(p, DeferredParameter) for p in other.parameters())
    model.zero_grad()
    loss_of(model, 0).backward()
    assert g.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_optimizer_in_the_backward_pass() -> None:
    """An optimizer that steps as soon as its gradient is there trains the default mode; deferred mode, in which it
    would train nothing, refuses it, set up before or after; a weight that has one already is left alone."""
    from torch.distributed.optim import _apply_optimizer_in_backward

    def hang_on(model: nn.Module) -> None:
        _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})

    model = wn.apply_weight_norm(made(), mode="deferred")
    with pytest.raises(wn.ModeError, match="no optimizer within the backward pass"):
        hang_on(model[3])
    model = wn.apply_weight_norm(made())
    hang_on(model)
    before = model[3].weight.detach().clone()
    loss_of(model, 0).backward()
    assert not torch.equal(model[3].weight, before)
    with pytest.raises(wn.ModeError, match="optimizer in the backward pass"):
        wn.set_weight_norm_mode(model, "deferred")
    assert not any(isinstance(p, DeferredParameter) for p in model.parameters())
    plain = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    hang_on(plain[0])
    plan = wn.plan_weight_norm(plain)
    assert [site.fqn for site in plan.sites] == ["1.weight"]
    assert "optimizer in the backward pass" in plan.skipped[0].reason


# Everything around it ------------------------------------------------------------------------------------


def test_modes_can_change_at_any_time() -> None:
    """Changing the mode, gradients waiting or not, changes neither the function nor the course of training."""
    model, twin = wn.apply_weight_norm(made()), wn.apply_weight_norm(made())
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, twin)]
    for step, mode in enumerate(["deferred", "deferred", "parametrized", "deferred", "parametrized"]):
        for net_, optimizer in zip((model, twin), optimizers, strict=True):
            loss_of(net_, step).backward()
            if net_ is model:
                wn.set_weight_norm_mode(model, mode)  # type: ignore[arg-type]
                assert model[3].weight.is_leaf == (mode == "deferred")
            loss_of(net_, step + 50).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, found), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert type(found) is nn.Parameter
        torch.testing.assert_close(found, expected, msg=name)


def test_changes_of_the_pair_are_seen_at_the_next_use() -> None:
    """In-place writes, `.data`, loading, assignment, types and freezing all reach the leaf."""
    model: Any = wn.apply_weight_norm(nn.Linear(6, 5), mode="deferred")
    pair = model.parametrizations.weight

    def check() -> None:
        expected = wn.compose(pair.original0.detach().clone(), pair.original1.detach().clone())
        assert same_bits(model.weight, expected)
        with torch.inference_mode():
            assert same_bits(model.weight, expected)

    check()
    with torch.no_grad():
        pair.original0.mul_(3)
    check()
    pair.original1.data = pair.original1.data.flip(0).clone()
    check()
    pair.original1.data.mul_(torch.linspace(1, 2, 6))
    check()
    for assign in (False, True):
        model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=assign)
        check()
        model(torch.ones(1, 6)).sum().backward()
        assert pair.original1.grad is not None
    model.load_state_dict({"weight_g": torch.ones(5, 1), "weight_v": torch.eye(5, 6), "bias": torch.ones(5)})
    check()
    model.load_state_dict({"weight": torch.full((5, 6), 0.5), "bias": torch.ones(5)})
    assert model.weight.eq(0.5).all()
    check()
    model.double()
    assert model.weight.dtype == torch.float64
    check()
    model.float().requires_grad_(False)
    assert not model.weight.requires_grad
    model.requires_grad_(True)
    assert model.weight.requires_grad


def test_writes_into_the_weight_reach_the_pair() -> None:
    """`nn.init` on module.weight, assignment and reset_parameters reach g and v before anything steps or saves them."""
    model: Any = wn.apply_weight_norm(nn.Linear(6, 5), mode="deferred")
    model(torch.ones(1, 6)).sum().backward()
    nn.init.constant_(model.weight, 0.5)
    assert model.state_dict()["parametrizations.weight.original1"].eq(0.5).all()
    nn.init.constant_(model.weight, 0.25)
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert model.weight.eq(0.25).all()
    model.weight = torch.full((5, 6), 0.125)
    assert model.weight.eq(0.125).all()
    leaf = model.weight
    model.reset_parameters()
    assert model.weight is leaf
    assert len(set(leaf.flatten().tolist())) == 30
    with pytest.raises(wn.NonFiniteWeightError):
        nn.init.constant_(model.weight, float("nan")).sum() + model.weight.sum()
    assert torch.isfinite(model.weight).all()


def test_a_step_of_another_optimizer_leaves_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two nets in deferred mode, as in a GAN, a step on one neither passes gradients of the other on nor writes its
    weights."""
    first, second = (wn.apply_weight_norm(nn.Linear(6, 5), mode="deferred") for _ in range(2))
    calls: list[int] = []
    original = wn.multi_tensor.ManyWeights.gradients  # type: ignore[attr-defined]
    monkeypatch.setattr(
        wn.multi_tensor.ManyWeights,  # type: ignore[attr-defined]
        "gradients",
        lambda many, grads, *rest: calls.append(len(grads)) or original(many, grads, *rest),
    )
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.1) for net in (first, second)]
    (first(torch.ones(1, 6)).sum() + second(torch.ones(1, 6)).sum()).backward()
    leaf = first.weight
    nn.init.constant_(leaf, 0.5)
    optimizers[1].step()
    assert calls == [1]
    assert leaf.grad is not None
    assert first.weight.eq(0.5).all()
    nn.init.constant_(first.weight, 0.25)
    optimizers[0].param_groups[0]["lr"] = 0.0
    optimizers[0].step()
    assert calls == [1, 1]
    assert first.weight.eq(0.25).all()


@pytest.mark.parametrize("size", [6, 1200])  # the memory of the larger goes back to the system
def test_other_memory_put_under_the_weight_reaches_the_pair(size: int) -> None:
    """`module.weight.data = tensor` is the weight from then on, whatever its memory looks like; its shape must fit."""
    model: Any = wn.apply_weight_norm(nn.Linear(size, size), mode="deferred")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for new in (torch.randn(size, size), torch.randn(size, size).t(), torch.randn(size, size, dtype=torch.float64)):
        model(torch.ones(1, size)).sum().backward()
        model.weight.data = new.clone(memory_format=torch.preserve_format)
        gc.collect()
        assert torch.equal(model.weight, new.float())
        assert model.weight.is_contiguous()
        assert torch.equal(wn.fold_weight_norm(copy.deepcopy(model)).weight, new.float())
        optimizer.step()
        optimizer.zero_grad()
    before = model.weight.clone()
    model.weight.data = torch.ones(size, 1)
    with pytest.raises(wn.PairError, match="does not fit"):
        model(torch.ones(1, size))
    assert torch.equal(model.weight, before)


def test_copies_and_pickles_run_in_the_default_mode() -> None:
    """deepcopy and pickle, gradients waiting, give plain Parameters, ties kept; the original trains on."""
    model = wn.apply_weight_norm(TiedLanguageModel(), mode="deferred")
    ids = torch.tensor([[1, 2]])
    assert model.embed.weight is model.head.weight
    expected = model(ids)
    expected.sum().backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(type(p) is nn.Parameter for p in twin.parameters())
        assert len(list(twin.parameters())) == len(list(model.parameters()))
        assert same_bits(twin(ids), expected)
        wn.fold_weight_norm(twin)
        assert twin.embed.weight is twin.head.weight
    before = model.embed.weight.detach().clone()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.embed.weight, before)


def test_averaging() -> None:
    """An exponential moving average of g and v is that of the default mode, and can be swapped in."""
    found = []
    for mode in ("deferred", "parametrized"):
        model = wn.apply_weight_norm(made(), mode=mode)  # type: ignore[arg-type]
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(20):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(model)
        with torch.no_grad():
            found.append(average(data(0)[0]))
            model.load_state_dict(average.module.state_dict())
            assert same_bits(model(data(0)[0]), found[-1])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(("first", "second"), [("deferred", "deferred"), ("deferred", "parametrized")])
def test_resuming_from_a_checkpoint(first: Any, second: Any, tmp_path: Path) -> None:
    """Three steps, a checkpoint, fresh objects in either mode and three more steps: as six in one go."""

    def fresh(mode: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = made()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        wn.apply_weight_norm(model, optimizer=optimizer, mode=mode)
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def train(parts: Any, steps: range) -> nn.Module:
        model, optimizer, scheduler = parts
        for step in steps:
            loss_of(model, step).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return model  # type: ignore[no-any-return]

    whole = train(fresh(first), range(6))
    parts = fresh(first)
    train(parts, range(3))
    torch.save([part.state_dict() for part in parts], tmp_path / "c.pt")
    parts = fresh(second)
    for part, state in zip(parts, torch.load(tmp_path / "c.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    resumed = train(parts, range(3, 6))
    for (name, found), expected in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        if first == second:
            assert same_bits(found, expected), name
        torch.testing.assert_close(found, expected, msg=name)


def test_tools_for_weight_norm_work() -> None:
    """Freezing, clamping, renormalising, parameter groups and folding with the optimizer do what they do by default."""
    found = []
    for mode in ("deferred", "parametrized"):
        model = wn.apply_weight_norm(made(), mode=mode)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(wn.weight_norm_param_groups(model, lr=0.01, magnitude_lr=0.02, weight_decay=0.1))
        assert not wn.stale_parameters(model, optimizer)
        wn.freeze_magnitude(model, include="0")
        with wn.keep_magnitude_within(model, optimizer, max=1.0), wn.keep_unit_norm(model, optimizer, include="3"):
            for step in range(10):
                loss_of(model, step).backward()
                optimizer.step()
                optimizer.zero_grad()
        wn.renormalize_(model, "unit", optimizer=optimizer)
        loss_of(model, 10).backward()
        assert len(wn.inspect(model).weights) == 3
        wn.fold_weight_norm(model, optimizer=optimizer)
        assert all(type(p) is nn.Parameter and p.grad is not None for p in model.parameters())
        optimizer.step()
        found.append(pickle.loads(pickle.dumps(model)).state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], msg=name)


def test_functional_call_with_other_parameters() -> None:
    """functional_call, grad and vmap with parameters handed in use those, and leave the leaf alone."""
    model: Any = wn.apply_weight_norm(nn.Linear(6, 5), mode="deferred")
    x = torch.ones(2, 6)
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    expected = model(x).detach()
    doubled = {n: p * 2 if n.endswith("original0") else p for n, p in parameters.items()}
    assert not torch.allclose(torch.func.functional_call(model, doubled, (x,)), expected)
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
    assert same_bits(model(x), expected)


def test_models_made_on_the_meta_device() -> None:
    """A model converted without values enters deferred mode when it gets them."""
    with torch.device("meta"):
        model: Any = nn.Sequential(nn.Linear(6, 5))
    wn.apply_weight_norm(model, mode="deferred")
    model.to_empty(device="cpu")
    model[0].reset_parameters()
    assert model[0].weight.is_leaf
    model(torch.ones(2, 6)).sum().backward()
    assert model[0].parametrizations.weight.original0.grad is not None


def test_a_model_let_go_is_gone() -> None:
    """Nothing global keeps a deferred model, its pair or its leaf alive, and optimizers of others pass it by."""
    model: Any = wn.apply_weight_norm(nn.Linear(6, 5), mode="deferred")
    handles = [weakref.ref(t) for t in (model.weight, *model.parameters())]
    del model
    gc.collect()
    other = wn.apply_weight_norm(nn.Linear(6, 5), mode="deferred")
    other(torch.ones(1, 6)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert not any(handle() is not None for handle in handles)


def test_two_processes(tmp_path: Path) -> None:
    """DistributedDataParallel exchanges the gradients: both ranks end where one process with all data ends."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    workers = [
        subprocess.Popen(
            [sys.executable, str(HERE / "deferred_worker.py"), str(tmp_path), str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.returncode == 0 for worker in workers), "\n".join(said)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    model = torchs()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(10):
        for part in range(2):
            x, y = data(2 * step + part)
            (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for views in ("False", "True"):
        for name, value in model.state_dict().items():
            assert torch.equal(first[views][name], second[views][name]), name
            torch.testing.assert_close(first[views][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_torchs_own_weight_norm_is_left_in_its_mode() -> None:
    """A tree that holds torch's weight norm too: ours is deferred, torch's trains as it did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(nn.Linear(3, 4), parametrizations.weight_norm(nn.Linear(4, 2)))
    wn.apply_weight_norm(model, mode="deferred")
    model(torch.ones(1, 3)).sum().backward()
    assert model[0].weight.is_leaf
    assert not model[1].weight.is_leaf
    assert all(p.grad is not None for p in model.parameters())
