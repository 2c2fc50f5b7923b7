"""Optimizers follow surgery: training goes on as if nothing had happened, in both directions."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import Optimizer

import wnsurgery as wn
from wnsurgery.following import as_optimizers

from nets import NETS, TiedLanguageModel, net, same_bits

Make = Callable[[Any], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "sgd-nesterov-decay": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "sgd-plain": lambda p: torch.optim.SGD(p, 0.05),
    "adam": lambda p: torch.optim.Adam(p, 5e-3),
    "adam-amsgrad-foreach": lambda p: torch.optim.Adam(p, 5e-3, amsgrad=True, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, 5e-3, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 5e-3),
    "nadam": lambda p: torch.optim.NAdam(p, 2e-3),
    "radam": lambda p: torch.optim.RAdam(p, 5e-3),
    "adamax": lambda p: torch.optim.Adamax(p, 5e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "rmsprop-centered-momentum": lambda p: torch.optim.RMSprop(p, 5e-4, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.02),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.5),
    "asgd": lambda p: torch.optim.ASGD(p, 0.05),
}
# no average gradient stands beside their squares, so more of them is model than rule
LOOSE = {"rmsprop", "adagrad", "adamax", "adadelta"}
X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randn(64, 2, generator=torch.Generator().manual_seed(2))


pytestmark = pytest.mark.usefixtures("one_thread")


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2)).to(dtype)


def step(model: nn.Module, optimizer: Optimizer) -> float:
    optimizer.zero_grad()
    dtype = next(model.parameters()).dtype
    loss = (model(X.to(dtype)) - Y.to(dtype)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def run(model: nn.Module, optimizer: Optimizer, steps: int) -> list[float]:
    return [step(model, optimizer) for _ in range(steps)]


def twin(model: nn.Module, optimizer: Optimizer, make: Make) -> tuple[nn.Module, Optimizer]:
    """A copy of a model and of its optimizer."""
    other = copy.deepcopy(model)
    copied = make(other.parameters())
    copied.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return other, copied


def held(optimizer: Optimizer) -> list[int]:
    return [id(p) for group in optimizer.param_groups for p in group["params"]]


# Training goes on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_conversion_in_the_middle_of_training(name: str) -> None:
    """The loss after conversion follows the run without it, far closer than it moves, and does not jump."""
    make = OPTIMIZERS[name]
    model = mlp()
    optimizer = make(model.parameters())
    run(model, optimizer, 20)
    other, followed = twin(model, optimizer, make)
    wn.apply_weight_norm(other, optimizer=followed)
    assert held(followed) == [id(p) for p in other.parameters()]
    assert not wn.stale_parameters(other, followed)
    assert all(state for state in followed.state.values())
    plain, normed = run(model, optimizer, 4), run(other, followed, 4)
    assert plain[0] == normed[0]
    tolerance = 0.2 if name in LOOSE else 0.1
    assert abs(normed[1] - plain[1]) < tolerance * abs(plain[1] - plain[0]) + 1e-6
    assert abs(normed[3] - plain[3]) < tolerance * abs(plain[3] - plain[0]) + 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_folding_in_the_middle_of_training(name: str) -> None:
    """The same for folding, after training under weight norm."""
    make = OPTIMIZERS[name]
    model = wn.apply_weight_norm(mlp())
    optimizer = make(model.parameters())
    run(model, optimizer, 20)
    other, followed = twin(model, optimizer, make)
    wn.fold_weight_norm(other, optimizer=followed)
    assert held(followed) == [id(p) for p in other.parameters()]
    assert not wn.stale_parameters(other, followed)
    normed, plain = run(model, optimizer, 4), run(other, followed, 4)
    assert plain[0] == normed[0]
    assert abs(normed[1] - plain[1]) < (1.0 if name in LOOSE else 0.1) * abs(normed[1] - normed[0]) + 1e-6
    assert plain[3] < plain[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("fold", [False, True], ids=["converted", "folded"])
def test_state_dict_round_trips(name: str, fold: bool) -> None:
    """After surgery the state dict loads into an optimizer newly built over the model, which takes the same steps."""
    make = OPTIMIZERS[name]
    model = mlp()
    optimizer = make(model.parameters())
    run(model, optimizer, 3)
    wn.apply_weight_norm(model, optimizer=optimizer)
    run(model, optimizer, 2)
    if fold:
        wn.fold_weight_norm(model, optimizer=optimizer)
    other, fresh = twin(model, optimizer, make)
    run(model, optimizer, 2)
    run(other, fresh, 2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(a, b)


# The maps, against autograd ------------------------------------------------------------------------------


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    (model(X.double()) - Y.double()).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("magnitude", ["linear", "log"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adam-amsgrad-foreach", "rmsprop-centered-momentum", "adagrad"])
def test_state_of_one_step_is_what_the_pair_would_have(name: str, magnitude: Any) -> None:
    """After one step with lr 0, converted state is that of an optimizer that had g and v from the start."""
    make = OPTIMIZERS[name]
    model = mlp(torch.float64)
    optimizer = make(model.parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    gradients(model)
    optimizer.step()
    other = wn.apply_weight_norm(copy.deepcopy(model), magnitude=magnitude)
    expected = make(other.parameters())
    for group in expected.param_groups:
        group["lr"] = 0.0
    gradients(other)
    expected.step()
    wn.apply_weight_norm(model, magnitude=magnitude, optimizer=optimizer)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[p].keys() == expected.state[q].keys()
        for key, x in expected.state[q].items():
            if name == "adagrad" and key == "sum":
                continue  # no average of gradients stands beside it: see the next test
            if key == "momentum_buffer" and name.startswith("rms"):
                continue  # an average of steps, which differ
            torch.testing.assert_close(optimizer.state[p][key], x, rtol=1e-6, atol=1e-15)


def test_second_moments_are_those_of_projected_noise() -> None:
    """Without a mean, squares are the second moments of the chain rule applied to uncorrelated noise (Monte Carlo)."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    optimizer = torch.optim.Adagrad(layer.parameters())
    variance = torch.rand(3, 4, dtype=torch.float64) + 0.1
    optimizer.state[layer.weight]["sum"] = variance.clone()
    w = layer.weight.detach().clone()
    wn.apply_weight_norm(layer, optimizer=optimizer)
    entry = layer.parametrizations.weight
    noise = torch.randn(200_000, 3, 4, dtype=torch.float64) * variance.sqrt()
    unit = w / w.norm(dim=1, keepdim=True)
    for_g = (noise * unit).sum(-1, keepdim=True)
    for_v = noise - for_g * unit
    torch.testing.assert_close(optimizer.state[entry.original0]["sum"], for_g.square().mean(0), rtol=0.02, atol=0)
    torch.testing.assert_close(optimizer.state[entry.original1]["sum"], for_v.square().mean(0), rtol=0.02, atol=0)


@pytest.mark.parametrize("magnitude", ["linear", "log"])
@pytest.mark.parametrize("name", ["linear", "conv2d", "transposed2d-grouped", "lstm", "tied", "channels-last"])
def test_gradients_follow_to_and_fro(name: str, magnitude: Any) -> None:
    """Gradients and momentum become autograd's for g and v at conversion, and for w again on folding."""
    model, x = net(name, torch.float64)

    def backward(m: nn.Module) -> dict[str, Tensor]:
        m.zero_grad()
        m(x).square().sum().backward()
        return {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    plain = backward(model)
    optimizer.step()
    wn.apply_weight_norm(model, magnitude=magnitude, optimizer=optimizer)
    carried = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    momentum = {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
    for n, expected in backward(model).items():
        torch.testing.assert_close(carried[n], expected)
        torch.testing.assert_close(momentum[n], expected)
        assert momentum[n].stride() == expected.stride()
    with torch.no_grad():  # move away from ||v|| = g
        for n, p in model.named_parameters():
            if n.endswith("original1"):
                p.mul_(1.7)
            elif n.endswith("original0"):
                p.add_(0.1) if magnitude == "log" else p.mul_(0.8)
    for p in model.parameters():
        optimizer.state[p].clear()
    backward(model)
    optimizer.step()
    wn.fold_weight_norm(model, optimizer=optimizer)
    carried = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    expected = backward(model)
    assert expected.keys() == plain.keys()
    for n, p in model.named_parameters():
        mask = p.abs().sum(-1, keepdim=True) > 0  # a row of zeros has no way back
        torch.testing.assert_close(carried[n] * mask, expected[n] * mask)
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"] * mask, expected[n] * mask)


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop-centered-momentum"])
def test_converting_and_folding_at_once_returns_momentum(name: str) -> None:
    """w -> (g, v) -> w gives the momentum back to rounding, and second moments closely for wide rows."""
    make = OPTIMIZERS[name]
    model = mlp()
    optimizer = make(model.parameters())
    run(model, optimizer, 10)
    before = [copy.deepcopy(optimizer.state[p]) for p in model.parameters()]
    wn.fold_weight_norm(wn.apply_weight_norm(model, optimizer=optimizer), optimizer=optimizer)
    for p, old in zip(model.parameters(), before, strict=True):
        new = optimizer.state[p]
        assert new.keys() == old.keys()
        for key, x in old.items():
            if "sq" in key:
                assert (new[key] - x).norm() < 0.6 * x.norm()
            else:
                torch.testing.assert_close(new[key], x, rtol=1e-4, atol=1e-6 * float(x.abs().max()))


# Groups --------------------------------------------------------------------------------------------------


def test_groups_keep_their_settings_and_order() -> None:
    """g and v take w's place in w's group; groups listed in the model's order stay so, others keep their own order."""
    model = mlp()
    w0, b0, w1, b1, w2, b2 = model.parameters()
    groups = [{"params": [w0, b0], "lr": 0.1}, {"params": [b2, w2, w1], "lr": 0.2, "name": "late"}, {"params": [b1]}]
    optimizer = torch.optim.SGD(groups, lr=0.3, momentum=0.9)
    lists = [group["params"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    run(model, optimizer, 2)
    scheduler.step()
    wn.apply_weight_norm(model, optimizer=optimizer)
    (g0, v0), (g1, v1), (g2, v2) = (tuple(model[i].parametrizations.weight.parameters()) for i in (0, 2, 4))
    assert [[id(p) for p in group] for group in lists] == [
        [id(b0), id(g0), id(v0)],
        [id(b2), id(g2), id(v2), id(g1), id(v1)],
        [id(b1)],
    ]
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.1, 0.15]
    run(model, optimizer, 2)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.025, 0.05, 0.075]
    wn.fold_weight_norm(model, optimizer=optimizer)
    assert [[id(p) for p in group] for group in lists] == [
        [id(model[0].weight), id(b0)],
        [id(b2), id(model[4].weight), id(model[2].weight)],
        [id(b1)],
    ]
    run(model, optimizer, 2)


def test_named_groups() -> None:
    """Names given to the optimizer follow, with whatever prefix stood before them."""
    model = nn.ModuleDict({"net": mlp()})
    optimizer = torch.optim.AdamW(model.named_parameters(), 1e-3)
    wn.apply_weight_norm(model["net"], optimizer=optimizer)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]
    wn.fold_weight_norm(model["net"], optimizer=optimizer)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]


def test_names_of_parameters_that_go_with_their_batch_norm_go_too() -> None:
    """A folded norm's scale and shift leave the optimizer, and the names beside the others stay theirs."""
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).eval()
    optimizer = torch.optim.AdamW(model.named_parameters(), 1e-3)
    wn.apply_weight_norm(model, batch_norm="fold", optimizer=optimizer)
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]
    assert group["param_names"] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_folding_from_separate_groups(name: str) -> None:
    """With g and v in groups of their own, w goes to v's group; the emptied group stays and steps go on."""
    model = wn.apply_weight_norm(mlp())
    groups = wn.weight_norm_param_groups(model, lr=0.01, magnitude_lr=0.02, weight_decay=0.1)
    optimizer = torch.optim.SGD(groups, momentum=0.9) if name == "sgd" else torch.optim.AdamW(groups)
    run(model, optimizer, 3)
    wn.fold_weight_norm(model, optimizer=optimizer)
    assert [(g["name"], len(g["params"])) for g in optimizer.param_groups] == [
        ("directions", 3),
        ("magnitudes", 0),
        ("vectors", 3),
    ]
    assert not wn.stale_parameters(model, optimizer)
    losses = run(model, optimizer, 4)
    assert losses[-1] < losses[0]
    fresh = copy.deepcopy(optimizer)
    fresh.load_state_dict(optimizer.state_dict())


def test_averages_of_different_decay_are_joined_as_means() -> None:
    """g's average falls short of a mean by 1 - 0.5^2 after two steps, v's by 1 - 0.9^2, and w's is in v's group."""
    torch.manual_seed(0)
    layer = wn.apply_weight_norm(nn.Linear(4, 3, bias=False).double())
    g, v = layer.parametrizations.weight.parameters()
    with torch.no_grad():
        g.mul_(1.5)
    optimizer = torch.optim.Adam([{"params": [g], "betas": (0.5, 0.999)}, {"params": [v]}], lr=0.0)
    ups = torch.randn(2, 3, 4, dtype=torch.float64)
    for up in ups:
        optimizer.zero_grad()
        layer.weight.backward(up)
        optimizer.step()
    unit = v.detach() / v.detach().norm(dim=1, keepdim=True)
    along = [(up * unit).sum(1, keepdim=True) * unit for up in ups]
    across = [up - part for up, part in zip(ups, along, strict=True)]
    of_g = (0.5 * 0.5 * along[0] + 0.5 * along[1]) / (1 - 0.5**2)
    of_v = (0.9 * 0.1 * across[0] + 0.1 * across[1]) / (1 - 0.9**2)
    wn.fold_weight_norm(layer, optimizer=optimizer)
    found = optimizer.state[layer.weight]["exp_avg"]
    torch.testing.assert_close(found, (of_g + of_v) * (1 - 0.9**2), rtol=1e-10, atol=1e-12)


def test_several_optimizers_and_strangers() -> None:
    """Each optimizer follows for what it holds; parameters it does not hold, and other models', are left alone."""
    model, other = mlp(), nn.Linear(2, 2)
    first = torch.optim.SGD([*model[0].parameters(), *other.parameters()], 0.1, momentum=0.9)
    second = torch.optim.Adam(model[2].parameters())
    run(model, first, 1)
    second.step()
    wn.apply_weight_norm(model, optimizer=[first, second])
    assert held(first) == [id(p) for p in (*model[0].parameters(), *other.parameters())]
    assert held(second) == [id(p) for p in model[2].parameters()]
    assert wn.stale_parameters(nn.ModuleList([model, other]), [first, second]).gone == ()
    last = model[4].parametrizations.weight
    assert id(last.original0) not in held(first) + held(second)
    apart = [torch.optim.Adam([last.original1], 1e-3), torch.optim.Adam([last.original0], 1e-2)]
    for one in apart:
        step(model, one)
    wn.fold_weight_norm(model, optimizer=[first, second, *apart])
    assert held(apart[0]) == [id(model[4].weight)]
    assert held(apart[1]) == []
    assert apart[0].state[model[4].weight]["exp_avg"].abs().sum() > 0
    assert not apart[1].state


def test_ties_and_frozen_parameters() -> None:
    """A tied weight stands in the groups once; what is frozen keeps its place and trains on when thawed."""
    model = TiedLanguageModel()
    model.body.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ids = torch.tensor([[1, 2], [3, 4]])

    def go() -> None:
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()

    go()
    wn.apply_weight_norm(model, freeze_magnitude=True, optimizer=optimizer)
    assert held(optimizer) == [id(p) for p in model.parameters()]
    pair = model.head.parametrizations.weight
    assert pair.original0 not in optimizer.state
    norms = model.head.weight.detach().norm(dim=1)
    go()
    torch.testing.assert_close(model.head.weight.detach().norm(dim=1), norms)
    wn.fold_weight_norm(model, optimizer=optimizer)
    assert held(optimizer) == [id(p) for p in model.parameters()]
    assert model.head.weight is model.embed.weight
    go()
    assert not torch.allclose(model.head.weight.detach().norm(dim=1), norms)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_no_grad_and_inference_mode(mode: Callable[[], Any]) -> None:
    """Surgery in any grad mode leaves state and gradients that can be trained on."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    for action in (wn.apply_weight_norm, lambda m, optimizer: wn.renormalize_(m, "unit", optimizer=optimizer)):
        run(model, optimizer, 1)
        with mode():
            action(model, optimizer=optimizer)
        (model(X) - Y).square().mean().backward()  # on top of the gradients carried over
    with mode():
        wn.fold_weight_norm(model, optimizer=optimizer)
    (model(X) - Y).square().mean().backward()
    optimizer.step()
    assert len(optimizer.state) == 6


@pytest.mark.parametrize("form", ["torch", "legacy"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_folding_torchs_own_weight_norm(form: str) -> None:
    """Optimizers follow the folding of torch's weight norm, new and legacy."""
    model = mlp()
    for i in (0, 2, 4):
        (parametrizations.weight_norm if form == "torch" else nn.utils.weight_norm)(model[i])
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = run(model, optimizer, 5)
    wn.fold_weight_norm(model, optimizer=optimizer)
    assert held(optimizer) == [id(p) for p in model.parameters()]
    more = run(model, optimizer, 5)
    assert losses[0] > losses[-1] > more[-1]
    assert all(optimizer.state[p]["step"] == 10 for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("sgd", torch.float16), *((n, torch.bfloat16) for n in ("sgd", "adam", "adam-fused", "rmsprop", "adagrad"))],
)
def test_16_bit_weights(name: str, dtype: torch.dtype) -> None:
    """State takes the type the optimizer itself would give it: float32 for g, 16 bits for v."""
    make = OPTIMIZERS[name]
    model = mlp(dtype)
    optimizer = make(model.parameters())
    run(model, optimizer, 2)
    wn.apply_weight_norm(model, optimizer=optimizer)
    expected = make([nn.Parameter(p.detach().clone()) for p in model.parameters()])
    for p in expected.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    expected.step()
    for p, q in zip(model.parameters(), expected.param_groups[0]["params"], strict=True):
        for key, x in expected.state[q].items():
            assert optimizer.state[p][key].dtype == x.dtype, key
            assert torch.isfinite(optimizer.state[p][key]).all()
    run(model, optimizer, 2)
    wn.fold_weight_norm(model, optimizer=optimizer)
    assert all(x.dtype == p.dtype for p in model.parameters() for x in [optimizer.state[p].get("exp_avg", p)])
    run(model, optimizer, 2)


def test_state_wider_than_its_weight_stays_wide() -> None:
    """Momentum that somebody keeps in float32 beside a bfloat16 weight is float32 for v, and for w again."""
    layer = nn.Linear(4, 3, bias=False).bfloat16()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    momentum = torch.randn(3, 4)
    optimizer.state[layer.weight]["momentum_buffer"] = momentum
    wn.apply_weight_norm(layer, optimizer=optimizer)
    g, v = layer.parametrizations.weight.parameters()
    assert v.dtype == torch.bfloat16
    assert [optimizer.state[p]["momentum_buffer"].dtype for p in (g, v)] == [torch.float32] * 2
    wn.fold_weight_norm(layer, optimizer=optimizer)
    found = optimizer.state[layer.weight]["momentum_buffer"]
    torch.testing.assert_close(found, momentum, rtol=1e-5, atol=1e-5)


def test_zero_rows() -> None:
    """Rows of zeros get finite state: g what lies along their new direction, v nothing; g = 0 folds finitely."""
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight[0] = 0
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        model.weight[0] = 0
    wn.apply_weight_norm(model, optimizer=optimizer)
    g, v = model.parametrizations.weight.parameters()
    assert optimizer.state[g]["exp_avg"][0].abs() > 0
    assert torch.equal(optimizer.state[v]["exp_avg"][0], torch.zeros(3))
    optimizer.state[v]["exp_avg"].fill_(1.0)
    wn.fold_weight_norm(model, optimizer=optimizer)
    assert all(torch.isfinite(x).all() for x in optimizer.state[model.weight].values())


# What cannot follow --------------------------------------------------------------------------------------


class Curious(Optimizer):
    """An optimizer nobody knows: a weight-shaped tensor and a count."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["count"], state["shape"] = 0, torch.zeros_like(p)
                    state["count"] += 1
                    state["shape"] += p.grad
                    p.data -= group["lr"] * state["shape"]


def test_unknown_state_starts_anew_for_converted_weights_only(caplog: pytest.LogCaptureFixture) -> None:
    """State without a rule is dropped whole, said once; biases keep theirs and training goes on."""
    model = mlp()
    optimizer = Curious(model.parameters())
    run(model, optimizer, 2)
    with caplog.at_level(logging.WARNING, "wnsurgery"):
        wn.apply_weight_norm(model, optimizer=optimizer)
    assert [r.message for r in caplog.records] == [
        "Curious: no rule for its state (count, shape), which starts anew for 3 weights"
    ]
    assert {id(p) for p in optimizer.state} == {id(model[i].bias) for i in (0, 2, 4)}
    run(model, optimizer, 2)
    assert optimizer.state[model[0].bias]["count"] == 4
    wn.renormalize_(model, "unit", optimizer=optimizer)
    wn.fold_weight_norm(model, optimizer=optimizer)
    run(model, optimizer, 1)


def test_state_of_g_in_another_shape_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """Momentum of g that cannot be its own is dropped, said once; the weight goes on with what v had."""
    found = []
    for put in (torch.ones(7), torch.zeros(3, 1)):
        torch.manual_seed(0)
        layer = wn.apply_weight_norm(nn.Linear(4, 3, bias=False))
        g, v = layer.parametrizations.weight.parameters()
        optimizer = torch.optim.SGD([g, v], 0.1, momentum=0.9)
        optimizer.state[g]["momentum_buffer"] = put
        optimizer.state[v]["momentum_buffer"] = torch.ones(3, 4)
        with caplog.at_level(logging.WARNING, "wnsurgery"):
            wn.fold_weight_norm(layer, optimizer=optimizer)
        assert list(optimizer.state) == [layer.weight]
        found.append(optimizer.state[layer.weight]["momentum_buffer"])
    assert torch.equal(*found)
    assert [r.message for r in caplog.records] == [
        "SGD: no rule for its state (momentum_buffer), which starts anew for 1 weights"
    ]


def test_refusals_leave_model_and_optimizer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """LBFGS, Muon, schedulers and failures on the way are errors after which model and optimizer are as before."""
    model = mlp()
    muon = torch.optim.Muon([model[0].weight, model[2].weight], lr=0.01)
    for bad, message in (
        (torch.optim.LBFGS(model.parameters()), "LBFGS"),
        (muon, "Muon"),
        (
            torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), 0.1), 1),
            "must be a torch.optim.Optimizer",
        ),
    ):
        with pytest.raises(wn.SelectionError, match=message):
            wn.apply_weight_norm(model, optimizer=bad)  # type: ignore[arg-type]
        assert not wn.is_weight_normed(model)
    optimizer = torch.optim.Adam(model.parameters())
    run(model, optimizer, 2)
    before = held(optimizer), {id(p): dict(s) for p, s in optimizer.state.items()}, list(model.state_dict())
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("wnsurgery.carried_state._stored", lambda *_: 1 // 0)
        wn.apply_weight_norm(model, optimizer=optimizer)
    assert (held(optimizer), {id(p): dict(s) for p, s in optimizer.state.items()}, list(model.state_dict())) == before
    wn.apply_weight_norm(model)
    with pytest.raises(wn.SelectionError, match="LBFGS"):
        wn.fold_weight_norm(model, optimizer=torch.optim.LBFGS(model.parameters()))
    assert wn.is_weight_normed(model)


def test_data_dependent_initialisation_drops_state(caplog: pytest.LogCaptureFixture) -> None:
    """With init="data" the function changes, so that weights start without momentum; groups follow all the same."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    run(model, optimizer, 2)
    with caplog.at_level(logging.WARNING, "wnsurgery"):
        wn.apply_weight_norm(model, init="data", data=X, optimizer=optimizer)
    assert "init='data' changed weights" in caplog.text
    assert "starts anew" in caplog.text
    assert held(optimizer) == [id(p) for p in model.parameters()]
    assert model[0].parametrizations.weight.original1 not in optimizer.state
    run(model, optimizer, 2)


@pytest.mark.parametrize("mode", ["fold", "mean-only"])
def test_batch_norm_surgery_says_that_it_drops_state(mode: Any, caplog: pytest.LogCaptureFixture) -> None:
    """State is dropped where a BatchNorm was taken, and that is the reason given; where none was, state is carried."""
    for net_, words in (
        (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)), f"batch_norm='{mode}' changed weights"),
        (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), ""),
    ):
        optimizer = torch.optim.SGD(net_.parameters(), 0.05, momentum=0.9)
        net_(torch.randn(9, 4)).square().sum().backward()
        optimizer.step()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "wnsurgery"):
            wn.apply_weight_norm(net_, batch_norm=mode, optimizer=optimizer)
        assert words in caplog.text
        assert "init" not in caplog.text
        assert len(caplog.records) == bool(words)
        assert (net_[0].parametrizations.weight.original1 in optimizer.state) is not bool(words)


def test_gradient_scaling_and_clipping_go_on() -> None:
    """Between backward and step, with scaled and clipped gradients, conversion changes the step to first order only."""
    losses = []
    for convert in (False, True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for i in range(4):
            optimizer.zero_grad()
            loss = (model(X) - Y).square().mean()
            scaler.scale(loss).backward()
            if convert and i == 2:
                wn.apply_weight_norm(model, optimizer=optimizer)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    assert norm > 0
    assert losses[:3] == losses[4:7]
    assert abs(losses[7] - losses[3]) < 0.02 * abs(losses[3] - losses[2])


# Optimizers given for nothing ------------------------------------------------------------------------------


def unrelated() -> Optimizer:
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9)


def told(caplog: pytest.LogCaptureFixture) -> bool:
    """Whether there was one warning, and that it was this one; forgets it."""
    found = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(found) <= 1
    caplog.clear()
    assert all("holds none of the" in text and "stale_parameters(model, optimizer)" in text for text in found)
    return bool(found)


@pytest.mark.parametrize("mode", ["parametrized", "deferred"])
def test_an_optimizer_that_holds_nothing_of_the_model_is_told_of(mode: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Handing it over does nothing, whichever call it is handed to."""
    model = wn.apply_weight_norm(mlp(), optimizer=unrelated(), mode=mode)
    assert told(caplog)
    wn.renormalize_(model, optimizer=unrelated())
    assert told(caplog)
    with wn.keep_unit_norm(model, unrelated()):
        assert told(caplog)
    with wn.keep_magnitude_within(model, unrelated(), max=9.0):
        assert told(caplog)
    with wn.WeightNormMonitor(model, unrelated()):
        assert told(caplog)
    wn.fold_weight_norm(model, optimizer=unrelated())
    assert told(caplog)


@pytest.mark.parametrize("mode", ["parametrized", "deferred"])
@pytest.mark.parametrize("bias", [False, True])
def test_an_optimizer_left_behind_is_told_of(bias: bool, mode: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It holds biases of the model, but weights from before a surgery that it was not told of."""
    model = nn.Sequential(nn.Linear(4, 5, bias=bias), nn.ReLU(), nn.Linear(5, 2, bias=bias))
    plain = torch.optim.SGD(model.parameters(), 0.1)
    wn.apply_weight_norm(model, mode=mode)
    pairs = torch.optim.SGD(model.parameters(), 0.1)
    wn.renormalize_(model, optimizer=plain)
    assert told(caplog)
    wn.renormalize_(model, optimizer=pairs)
    assert not told(caplog)
    wn.fold_weight_norm(model, optimizer=plain)
    assert told(caplog)
    wn.apply_weight_norm(model, optimizer=pairs)
    assert told(caplog)


def test_optimizers_given_on_purpose_are_not_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """Of biases alone, of other layers, one of several; frozen weights, and models with nothing to do."""
    wn.apply_weight_norm(model := mlp(), optimizer=torch.optim.SGD([model[0].bias], 0.1))
    wn.apply_weight_norm(model, optimizer=unrelated())
    wn.fold_weight_norm(model, optimizer=torch.optim.SGD([model[0].bias], 0.1))
    wn.fold_weight_norm(model, optimizer=unrelated())
    wn.apply_weight_norm(model, include="0", optimizer=torch.optim.SGD(model[2].parameters(), 0.1))
    wn.apply_weight_norm(model, optimizer=[unrelated(), torch.optim.SGD(model.parameters(), 0.1)])
    with wn.WeightNormMonitor(model, torch.optim.SGD([model[4].parametrizations.weight.original0], 0.1)):
        pass
    frozen = mlp().requires_grad_(False)
    wn.apply_weight_norm(frozen, optimizer=unrelated())
    wn.renormalize_(frozen, optimizer=unrelated())
    wn.fold_weight_norm(frozen, optimizer=unrelated())
    assert not told(caplog)


# Stale optimizers and groups -----------------------------------------------------------------------------


def test_stale_parameters() -> None:
    """An optimizer not told of surgery is stale, one that followed is not; frozen parameters need no optimizer."""
    model = mlp()
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    assert not wn.stale_parameters(model, optimizer)
    wn.apply_weight_norm(model, include="2", optimizer=optimizer)
    assert not wn.stale_parameters(model, optimizer)
    wn.apply_weight_norm(model, include="0")
    report = wn.stale_parameters(model, optimizer)
    assert report
    assert [(p.name, p.shape, p.group) for p in report.gone] == [("0.weight", (24, 6), 0)]
    assert report.untrained == tuple(f"0.parametrizations.weight.original{i}" for i in (0, 1))
    assert "0.weight, 24x6" in str(report)
    model[0].requires_grad_(False)
    assert wn.stale_parameters(model, optimizer).untrained == ()
    optimizer.param_groups[0]["params"].pop(0)
    part = torch.optim.SGD(model[4].parameters(), 0.1)
    assert wn.stale_parameters(model, part).gone == ()
    assert len(wn.stale_parameters(model, part).untrained) == 3


@pytest.mark.parametrize("form", ["ours", "torch", "legacy", "plain"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_param_groups(form: str) -> None:
    """Each trainable parameter is in exactly one group, with no decay on directions, magnitudes and vectors."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Embedding(5, 2), nn.Linear(4, 4), nn.Linear(4, 4))
    model[4].weight = model[3].weight
    model[0].bias.requires_grad_(False)
    if form == "ours":
        wn.apply_weight_norm(model, exclude="0")
    elif form != "plain":
        (parametrizations.weight_norm if form == "torch" else nn.utils.weight_norm)(model[3])
        model[4] = model[3]
    groups = wn.weight_norm_param_groups(model, lr=0.1, magnitude_lr=0.5, weight_decay=0.2, magnitude_weight_decay=0.3)
    everything = [id(p) for group in groups for p in group["params"]]
    assert len(everything) == len(set(everything))
    assert set(everything) == {id(p) for p in model.parameters() if p.requires_grad}
    shown = {g["name"]: (g["lr"], g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in groups}
    assert shown["weights"][:2] == (0.1, 0.2)
    assert shown["vectors"][:2] == (0.1, 0.0)
    assert all(len(shape) == 1 for shape in shown["vectors"][2])
    if form == "plain":
        assert set(shown) == {"vectors", "weights"}
    else:
        assert shown["directions"] == (0.1, 0.0, [(4, 4)])
        assert shown["magnitudes"] == (0.5, 0.3, [(4, 1)])
        assert shown["weights"][2] == [(4, 3), (5, 2)]
    assert all("lr" not in group for group in wn.weight_norm_param_groups(model))
    torch.optim.AdamW(groups)


# Resuming ------------------------------------------------------------------------------------------------


def converted(**options: Any) -> Callable[[], nn.Module]:
    return lambda: wn.apply_weight_norm(mlp(), **options)


def frozen_at_unit() -> nn.Module:
    return wn.freeze_magnitude(converted()(), at="unit")


MODES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Optimizer], Any]]] = {
    "linear": (converted(), lambda m, o: None),
    "log": (converted(magnitude="log"), lambda m, o: None),
    "frozen": (converted(freeze_magnitude=True), lambda m, o: None),
    "frozen-unit": (frozen_at_unit, lambda m, o: None),
    "clamped": (converted(), lambda m, o: wn.keep_magnitude_within(m, o, 0.5, 0.6)),
    "clamped-log": (converted(magnitude="log"), lambda m, o: wn.keep_magnitude_within(m, o, 0.5, 0.6)),
    "projected": (converted(), wn.keep_unit_norm),
    "projected-log": (converted(magnitude="log"), wn.keep_unit_norm),
}


@pytest.mark.parametrize("when", ["handle first", "load first"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("mode", MODES)
def test_resuming_from_a_checkpoint(mode: str, kind: str, when: str, tmp_path: Any) -> None:
    """Six steps give the bits of three, a checkpoint, fresh objects and three more; g has its own learning rate."""
    make, watch = MODES[mode]

    def fresh() -> tuple[nn.Module, Optimizer]:
        model = make()
        groups = wn.weight_norm_param_groups(model, lr=0.02, magnitude_lr=0.05, weight_decay=0.01)
        return model, torch.optim.SGD(groups, momentum=0.9) if kind == "sgd" else torch.optim.AdamW(groups)

    model, optimizer = fresh()
    watch(model, optimizer)
    run(model, optimizer, 3)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "checkpoint.pt")
    losses = run(model, optimizer, 3)
    again, resumed = fresh()
    if when == "handle first":
        watch(again, resumed)
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    if when == "load first":
        watch(again, resumed)
    assert run(again, resumed, 3) == losses
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("exact", [False, True])
def test_resuming_after_renormalizing(exact: bool) -> None:
    """A checkpoint taken after `renormalize_` resumes to the same bits."""
    model = wn.apply_weight_norm(mlp())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    run(model, optimizer, 3)
    wn.renormalize_(model, "unit", exact=exact, optimizer=optimizer)
    again = wn.apply_weight_norm(mlp())
    resumed = torch.optim.AdamW(again.parameters(), 0.01)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert run(model, optimizer, 3) == run(again, resumed, 3)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert same_bits(a, b)


# With BatchNorm surgery ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fold", "mean-only"])
def test_optimizers_follow_batch_norm_surgery(mode: str) -> None:
    """Parameters that BatchNorm surgery takes leave the groups, those it makes enter them, and training goes on."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    x, y = torch.randn(16, 1, 6, 6), torch.randint(0, 2, (16,))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    for _ in range(3):
        step()
    wn.apply_weight_norm(net, optimizer=optimizer, batch_norm=mode)  # type: ignore[arg-type]
    assert not wn.stale_parameters(net, optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in net.parameters()]
    losses = [step() for _ in range(20)]
    assert losses[-1] < losses[0]
    wn.fold_weight_norm(net, optimizer=optimizer)
    assert not wn.stale_parameters(net, optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in net.parameters()]
    assert not any("Norm" in type(m).__name__ for m in net.modules())
    assert step() < losses[0]
    fresh = torch.optim.Adam(net.parameters(), lr=1e-2)
    fresh.load_state_dict(optimizer.state_dict())


def normalized() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


STARTING_ANEW: dict[str, dict[str, Any]] = {
    "fold": {"batch_norm": "fold"},
    "mean-only": {"batch_norm": "mean-only"},
    "data": {"init": "data", "data": X},
    "fan": {"init": "fan"},
    "frozen": {"freeze_magnitude": True},
}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", STARTING_ANEW)
def test_fused_momentum_that_starts_anew_beside_some_that_goes_on(name: str, nesterov: bool) -> None:
    """torch's fused SGD fails where some of a group have no momentum; it goes on as the plain one does."""
    courses = []
    for fused in (False, True):
        model = normalized()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=nesterov, fused=fused)
        run(model, optimizer, 2)
        torch.manual_seed(1)
        wn.apply_weight_norm(model, optimizer=optimizer, **STARTING_ANEW[name])
        losses = run(model, optimizer, 2)
        wn.unfreeze_magnitude(model)
        losses += run(model, optimizer, 2)
        wn.fold_weight_norm(model, optimizer=optimizer)
        courses.append(losses + run(model, optimizer, 2))
    assert courses[1] == pytest.approx(courses[0], rel=1e-5)


def test_momentum_of_zero_under_dampening() -> None:
    """The first step of what starts anew is shorter by the dampening; what goes on has its momentum."""
    model = normalized()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, dampening=0.25, fused=True)
    run(model, optimizer, 2)
    kept = optimizer.state[model[3].bias]["momentum_buffer"]
    before = kept.clone()
    wn.apply_weight_norm(model, batch_norm="mean-only", optimizer=optimizer)
    v = model[0].parametrizations.weight.original1
    assert torch.equal(optimizer.state[v]["momentum_buffer"], torch.zeros_like(v))
    assert optimizer.state[model[3].bias]["momentum_buffer"] is kept
    run(model, optimizer, 1)
    torch.testing.assert_close(optimizer.state[v]["momentum_buffer"], 0.75 * v.grad)
    torch.testing.assert_close(kept, 0.9 * before + 0.75 * model[3].bias.grad)


def test_no_momentum_is_made_where_none_is_needed() -> None:
    """Where a whole group starts anew, or the optimizer takes what has none, state stays empty."""
    for fused, only in ((True, True), (False, False)):
        model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 2, bias=not only))
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, fused=fused)
        run(model, optimizer, 2)
        wn.apply_weight_norm(model, init="fan", optimizer=optimizer)
        assert len(optimizer.state) == (0 if only else 1)
        run(model, optimizer, 2)


class Shaped(torch.optim.SGD):
    """Fused SGD that keeps for matrices what nobody knows."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        done = super().step(closure)
        for p in self.param_groups[0]["params"]:
            if p.ndim > 1:
                self.state[p]["shape"] = p.shape
        return done


def test_fused_momentum_of_unknown_state() -> None:
    """Rescaling drops state without a rule, too, and leaves an optimizer that can step."""
    model = wn.apply_weight_norm(mlp())
    optimizer = Shaped(model.parameters(), 0.05, momentum=0.9, fused=True)
    run(model, optimizer, 2)
    wn.renormalize_(model, "unit", exact=True, optimizer=optimizer)
    v = model[0].parametrizations.weight.original1
    assert torch.equal(optimizer.state[v]["momentum_buffer"], torch.zeros_like(v))
    run(model, optimizer, 2)


def with_means(bias: bool = False) -> nn.Module:
    """A net with a mean-only norm, trained under weight norm."""
    torch.manual_seed(0)
    layers = (nn.Linear(6, 5, bias=bias), wn.MeanOnlyBatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    return wn.apply_weight_norm(nn.Sequential(*layers))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bias_of_a_folded_mean_goes_on(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The layer's new bias gets the gradient that the norm's had: state and a waiting gradient are those, unchanged."""
    make = OPTIMIZERS[name]
    model = with_means()
    optimizer = make(model.parameters())
    run(model, optimizer, 3)
    bias = model[1].bias
    value, state, grad = bias.detach().clone(), copy.deepcopy(optimizer.state[bias]), bias.grad.clone()
    with caplog.at_level(logging.WARNING, "wnsurgery"):
        wn.fold_weight_norm(model, optimizer=optimizer)
    assert not caplog.records
    new = model[0].bias
    assert held(optimizer) == [id(p) for p in model.parameters()]
    assert bias not in optimizer.state
    assert torch.equal(new.grad, grad)
    assert optimizer.state[new].keys() == state.keys()
    for key, x in state.items():
        if key == "ax":  # an average of values moves along
            torch.testing.assert_close(optimizer.state[new][key], x + (new - value).detach())
        else:
            assert x is optimizer.state[new][key] is None or torch.equal(optimizer.state[new][key], x)
    run(model, optimizer, 2)


def test_the_bias_of_a_folded_mean_stays_in_its_group() -> None:
    """With the settings it was trained with; in none, where it was in none."""
    model = with_means()
    optimizer = torch.optim.AdamW(wn.weight_norm_param_groups(model, lr=0.01, weight_decay=0.1))
    run(model, optimizer, 2)
    wn.fold_weight_norm(model, optimizer=optimizer)
    assert {g["name"]: [id(p) for p in g["params"]] for g in optimizer.param_groups}["vectors"] == [
        id(model[0].bias),
        id(model[3].bias),
    ]
    model = with_means()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p is not model[1].bias])
    wn.fold_weight_norm(model, optimizer=optimizer)
    assert id(model[0].bias) not in held(optimizer)


def test_the_bias_of_a_folded_mean_beside_one_of_the_layers_own(caplog: pytest.LogCaptureFixture) -> None:
    """A bias before a norm gets no gradient to speak of: from the fold on it has the norm's state, and that is said."""
    model = with_means(bias=True)
    optimizer = torch.optim.Adam(model.parameters())
    run(model, optimizer, 3)
    state, grad = copy.deepcopy(optimizer.state[model[1].bias]), model[1].bias.grad.clone()
    with caplog.at_level(logging.WARNING, "wnsurgery"):
        wn.fold_weight_norm(model, optimizer=optimizer)
    assert [r.message for r in caplog.records] == [
        "0.bias: its optimizer state is now that of 1.bias; its own is dropped"
    ]
    assert all(torch.equal(optimizer.state[model[0].bias][key], x) for key, x in state.items())
    assert torch.equal(model[0].bias.grad, grad)
    assert held(optimizer) == [id(p) for p in model.parameters()]
    run(model, optimizer, 1)


@pytest.mark.parametrize("why", ["frozen", "another optimizer", "shared"])
def test_state_of_a_folded_mean_that_has_no_heir_is_dropped_with_a_warning(
    why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the layer's bias is not trained with the norm's, or the norm's had the sum of several gradients."""
    model = with_means(bias=why != "shared")
    if why == "shared":
        model[2] = nn.Sequential(nn.Linear(5, 5, bias=False), wn.MeanOnlyBatchNorm1d(5))
        model[2][1].bias = model[1].bias
    model[0].requires_grad_(why != "frozen")
    apart = [model[0].bias] if why == "another optimizer" else []
    optimizers = [torch.optim.Adam([p for p in model.parameters() if not any(p is q for q in apart)])]
    optimizers += [torch.optim.SGD(apart, 0.1)] if apart else []
    run(model, optimizers[0], 2)
    with caplog.at_level(logging.WARNING, "wnsurgery"):
        wn.fold_weight_norm(model, optimizer=optimizers)
    text = "it is shared" if why == "shared" else "0.bias is not trained by the same optimizer"
    assert {r.message for r in caplog.records} == {f"1.bias: its optimizer state is dropped: {text}"}
    assert not any(optimizers[0].state.get(model[i].bias) for i in (0, 1) if hasattr(model[i], "bias"))
    run(model, optimizers[0], 1)


EVERY_KIND: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
}


@pytest.mark.parametrize("name", sorted(NETS))
def test_every_net_and_optimizer_goes_there_and_back(name: str) -> None:
    """State of every kind follows weights of every shape, grouped and transposed ones included."""
    for make in EVERY_KIND.values():
        model, _ = net(name)
        optimizer = make(model.parameters())
        generator = torch.Generator().manual_seed(0)

        def step(model: nn.Module = model, optimizer: Optimizer = optimizer, generator: Any = generator) -> None:
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) if p.requires_grad else None
            optimizer.step()
            optimizer.zero_grad()

        step()
        for surgery in (wn.apply_weight_norm, wn.renormalize_, wn.fold_weight_norm):
            surgery(model, optimizer=optimizer)  # type: ignore[operator]
            assert not wn.stale_parameters(model, optimizer)
            for p in model.parameters():
                for x in optimizer.state[p].values() if p in optimizer.state else ():
                    assert not isinstance(x, Tensor) or x.ndim == 0 or (x.shape == p.shape and x.isfinite().all())
            step()


class Around:
    """An optimizer around another, whose groups and state it hands out as its own."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.param_groups, self.state = optimizer.param_groups, optimizer.state

    def step(self) -> None:
        self.optimizer.step()


class Beside:
    """An optimizer around another, whose groups it hands out as its own, with a state beside it."""

    def __init__(self, optimizer: Any) -> None:
        self._inner = optimizer
        self.param_groups, self.state = optimizer.param_groups, defaultdict[Any, Any](dict)

    def step(self) -> None:
        self._inner.step()


def accelerated(optimizer: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(optimizer)


@pytest.mark.parametrize("wrap", [Around, lambda one: Around(Around(one)), Beside, accelerated])
def test_wrapped_optimizers_follow_as_the_ones_inside(wrap: Any, caplog: pytest.LogCaptureFixture) -> None:
    """What a wrapper delegates to keeps its state at conversion, renormalisation and folding, with nothing logged."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    nets = [plain, copy.deepcopy(plain)]
    inner = [torch.optim.Adam(net.parameters(), 0.01) for net in nets]
    given: list[Any] = [inner[0], wrap(inner[1])]
    x = torch.randn(9, 4)

    def train() -> None:
        for net, optimizer in zip(nets, given, strict=True):
            inner[given.index(optimizer)].zero_grad()
            net(x).square().sum().backward()
            optimizer.step()

    train()
    with caplog.at_level(logging.WARNING, "wnsurgery"):
        for act in (wn.apply_weight_norm, wn.renormalize_, wn.fold_weight_norm):
            for net, optimizer in zip(nets, given, strict=True):
                act(net, optimizer=optimizer)
            assert all(state for optimizer in inner for state in optimizer.state.values())
            assert not wn.stale_parameters(nets[1], given[1])
            train()
            for a, b in zip(*(net.parameters() for net in nets), strict=True):
                assert torch.equal(a, b)
    assert not caplog.records
    assert len(inner[1].state) == 4


def test_an_optimizer_with_groups_of_its_own_is_taken_as_it_is() -> None:
    """Only what has the very list of groups of an optimizer inside is followed there."""
    model = nn.Linear(3, 2)
    inner = torch.optim.SGD(model.parameters(), 0.1)
    outer: Any = Around(inner)
    assert as_optimizers(outer) == as_optimizers(Around(outer)) == (inner,)
    outer.param_groups = list(inner.param_groups)
    assert as_optimizers(outer) == (outer,)
    assert as_optimizers(Around(outer)) == (outer,)


@pytest.mark.parametrize("mode", ["parametrized", "deferred"])
@pytest.mark.parametrize("form", ["ours", "fold alone"])
def test_what_no_optimizer_held_is_held_by_none_afterwards(mode: Any, form: str) -> None:
    """Biases alone, as in BitFit: weights left out of an optimizer stay as they are."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    biases = [model[0].bias, model[2].bias]
    optimizer = torch.optim.SGD(biases, lr=0.1)
    wn.apply_weight_norm(model, mode=mode, optimizer=optimizer if form == "ours" else None)
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, biases))
    before = [model[i].weight.detach().clone() for i in (0, 2)]
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(w, model[i].weight) for w, i in zip(before, (0, 2), strict=True))
    wn.fold_weight_norm(model, optimizer=optimizer)
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, biases))


def test_weights_with_another_optimizer_than_the_one_given() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    weights = torch.optim.SGD([model[0].weight, model[1].weight], lr=0.1)
    biases = torch.optim.SGD([model[0].bias, model[1].bias], lr=0.1)
    wn.apply_weight_norm(model, optimizer=biases)
    assert len(biases.param_groups[0]["params"]) == 2
    wn.fold_weight_norm(model)
    weights = torch.optim.SGD([model[0].weight, model[1].weight], lr=0.1)
    wn.apply_weight_norm(model, optimizer=[biases, weights])
    assert [len(one.param_groups[0]["params"]) for one in (biases, weights)] == [2, 4]


@pytest.mark.parametrize("batch_norm", ["fold", "mean-only"])
def test_a_bias_made_in_a_frozen_layer_is_held_as_the_layer_is(batch_norm: Any) -> None:
    """So that its optimizer's state dict fits one newly built over the model."""
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    model(torch.randn(9, 4))
    for parameter in [*model[0].parameters(), *model[1].parameters()]:
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    wn.apply_weight_norm(model, batch_norm=batch_norm, optimizer=optimizer)
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, model.parameters()))
    wn.fold_weight_norm(model, optimizer=optimizer)
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, model.parameters()))


@pytest.mark.parametrize("init", ["fan", "data"])
def test_an_initialisation_that_comes_to_nothing_leaves_values(init: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Muon([model[0].weight, model[1].weight], lr=0.1)
    options = {"data": torch.randn(8, 4)} if init == "data" else {}
    with pytest.raises(wn.SelectionError, match="Muon"):
        wn.apply_weight_norm(model, init=init, optimizer=optimizer, **options)
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_deferred_mode_refuses_before_anything_has_changed() -> None:
    model = wn.apply_weight_norm(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), include="0")
    model[0].parametrizations.weight.original0.register_hook(lambda grad: grad)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = list(map(id, optimizer.param_groups[0]["params"]))
    with pytest.raises(wn.ModeError):
        wn.apply_weight_norm(model, mode="deferred", optimizer=optimizer)
    assert type(model[1]) is nn.Linear
    assert list(map(id, optimizer.param_groups[0]["params"])) == held
