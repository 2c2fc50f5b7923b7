"""Rescaling v: no bit of the function moves and optimizer state goes along; v held at one; g frozen and clamped."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import wnsurgery as wn

from nets import NETS, effective, net, same_bits

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


pytestmark = pytest.mark.usefixtures("one_thread")


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every weight under weight norm as the forward uses it, by name."""
    ends = {".original1": ".parametrizations.", "_v": ""}
    names = []
    for name, _ in model.named_parameters():
        for end, middle in ends.items():
            if name.endswith(end):
                names.append(f".{name}".replace(middle or "\0", ".").removesuffix(end).removeprefix("."))
    return {name: effective(model, name).detach().clone() for name in names}


def trained(model: nn.Module, spread: float = 3.0) -> nn.Module:
    """A model under weight norm whose g and v have drifted apart, row by row."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("original0", "_g")):
                p.add_(torch.randn_like(p) * 0.3)
            elif name.endswith(("original1", "_v")):
                p.mul_(torch.exp(spread * torch.rand(p.shape[0], *[1] * (p.ndim - 1))).to(p.dtype))
    return model


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("drifted", [False, True], ids=["fresh", "drifted"])
@pytest.mark.parametrize("magnitude", ["linear", "log"])
@pytest.mark.parametrize("to", ["unit", "magnitude"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bit_changes(dtype: torch.dtype, to: Any, magnitude: Any, drifted: bool) -> None:
    """Over the zoo, weights and outputs keep every bit, and norms come within a factor sqrt(2) of their aim."""
    for name in NETS:
        model, x = net(name, dtype)
        wn.apply_weight_norm(model, magnitude=magnitude)
        if drifted:
            trained(model)
        before, output = weights(model), model(x)
        report = wn.renormalize_(model, to)
        for fqn, w in weights(model).items():
            assert same_bits(w, before[fqn]), (name, fqn)
        assert same_bits(model(x), output), name
        assert sum(w.kept for w in report.weights) == 0, str(report)
        for fqn, entry in model.named_modules():
            if to == "unit" and type(entry).__name__ == "WeightNormList":
                v = entry.original1.detach().double()
                axes = entry[0].axes
                norms = axes.grouped(v).square().sum(axes.reduced(v.ndim), keepdim=True).sqrt()
                assert 0.707 < norms.min() <= norms.max() < 1.415, (name, fqn)


@pytest.mark.parametrize("dim", [0, 1, None, (0, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bit_changes_for_any_axes(dtype: torch.dtype, dim: Any) -> None:
    """Whatever axes are kept, one norm for the whole tensor included, no bit changes and rows are rescaled."""
    torch.manual_seed(1)
    model = wn.apply_weight_norm(nn.Conv1d(6, 4, 3).to(dtype), dim=dim)
    with torch.no_grad():
        model.parametrizations.weight.original1.mul_(37.3)
        model.parametrizations.weight.original0.mul_(1.37)
    w = model.weight.clone()
    report = wn.renormalize_(model)
    assert report.rescaled == report.weights[0].rows > 0
    assert same_bits(model.weight, w)


@pytest.mark.parametrize("to", ["unit", "magnitude"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_rows_keep_their_bits(dtype: torch.dtype, to: Any) -> None:
    """Rows near both ends of the type, rows of subnormals, of zeros, and with g = 0 or g < 0 lose no bit."""
    kind = torch.finfo(dtype)
    scales = [kind.max / 64, kind.max / 1e3, 1.0, kind.tiny * 64, kind.tiny, kind.smallest_normal / 8, 0.0, 3.0, 5.0]
    torch.manual_seed(0)
    rows = torch.rand(len(scales), 7, dtype=torch.float64) - 0.5
    layer = nn.Linear(7, len(scales), bias=False).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(rows * torch.tensor(scales, dtype=torch.float64)[:, None])
        wn.apply_weight_norm(layer)
        g = layer.parametrizations.weight.original0
        g[-1], g[-2] = -2.5, 0.0
        for factor in (1.0, 1.7, 1e-6 if dtype == torch.float16 else 1e-30):
            g.mul_(factor)
            w = layer.weight.clone()
            wn.renormalize_(layer, to)
            assert same_bits(layer.weight, w)
            assert torch.isfinite(layer.parametrizations.weight.original1).all()


def test_mixed_magnitudes_within_a_row_are_scaled_less() -> None:
    """A row whose small elements would turn subnormal and lose bits is scaled only as far as they stay whole."""
    layer = nn.Linear(3, 2, bias=False).half()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[4096.0, 1.001, 2.0**-12 * 1.001], [4096.0, 1.0, 2.0]]))
    wn.apply_weight_norm(layer)
    v = layer.parametrizations.weight.original1
    before, w = v.detach().clone(), layer.weight.clone()
    report = wn.renormalize_(layer, "unit")
    assert same_bits(layer.weight, w)
    factor = (v / before)[:, 0]
    assert factor[1] == 2.0**-12
    assert 2.0**-12 < factor[0] <= 2.0**-2
    assert torch.equal(v.float(), before.float() * factor[:, None].float())
    assert report.weights[0].kept == 1


@pytest.mark.parametrize("form", ["torch", "legacy"])
@pytest.mark.parametrize("to", ["unit", "magnitude"])
def test_torchs_own_weight_norm(form: str, to: Any) -> None:
    """Directions under torch's own weight norm, new and legacy, are rescaled without changing a bit of its outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Conv1d(32, 8, 1), nn.ConvTranspose1d(8, 4, 3))
    for layer in model:
        if form == "torch":
            parametrizations.weight_norm(layer)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                nn.utils.weight_norm(layer)
    trained(model)
    inputs = [torch.randn(5, 16), torch.randn(2, 32, 3), torch.randn(2, 8, 3)]
    before = [layer(x) for layer, x in zip(model, inputs, strict=True)]
    report = wn.renormalize_(model, to)
    assert report.rescaled > 30
    for layer, x, y in zip(model, inputs, before, strict=True):
        assert same_bits(layer(x), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("to", ["unit", "magnitude"])
def test_exact_norms(to: Any, dtype: torch.dtype) -> None:
    """With exact=True each row's norm is the aim to rounding, and the weights change by rounding only."""
    model = trained(wn.apply_weight_norm(nn.Linear(64, 8).to(dtype)))
    w = model.weight.detach().double()
    wn.renormalize_(model, to, exact=True)
    g, v = (model.parametrizations.weight[0], *model.parametrizations.weight.parameters())[1:]
    eps = torch.finfo(dtype).eps
    aim = g.detach().double().abs().flatten() if to == "magnitude" else torch.ones(8, dtype=torch.float64)
    torch.testing.assert_close(v.detach().double().norm(dim=1), aim, rtol=eps, atol=0)
    torch.testing.assert_close(model.weight.detach().double(), w, rtol=2 * eps, atol=eps * 1e-3)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_and_state_scale_along(exact: bool) -> None:
    """Waiting gradients, momentum and Adam's averages become what they would have been for the rescaled v."""
    model = trained(wn.apply_weight_norm(nn.Linear(5, 4)).double(), 2.0)
    x = torch.randn(9, 5, dtype=torch.float64)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    adam = torch.optim.Adam(model.parameters(), lr=0.0, amsgrad=True)
    gradients(model, x)
    sgd.step()
    adam.step()
    report = wn.renormalize_(model, "unit", exact=exact, optimizer=[sgd, adam])
    assert report.growth > 1
    kept = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for a, b in zip(kept, gradients(model, x), strict=True):
        torch.testing.assert_close(a, b)
    for p in model.parameters():
        assert p.grad is not None
        torch.testing.assert_close(sgd.state[p]["momentum_buffer"], p.grad)
        torch.testing.assert_close(adam.state[p]["exp_avg"], 0.1 * p.grad)
        torch.testing.assert_close(adam.state[p]["exp_avg_sq"], 0.001 * p.grad.square())
        torch.testing.assert_close(adam.state[p]["max_exp_avg_sq"], 0.001 * p.grad.square())
        assert adam.state[p]["step"] == 1


def test_frozen_and_tied_and_pending() -> None:
    """Frozen pairs are rescaled too and stay frozen, tied ones once; a write into a weight still held is not lost."""
    model, ids = net("tied")
    wn.apply_weight_norm(model, freeze_magnitude=True)
    model.requires_grad_(False)
    held = effective(model, "body.weight")
    nn.init.ones_(held)
    output = wn.renormalize_(model, "unit") and model(ids)
    assert len(wn.renormalize_(model, "unit").weights) == 2
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(effective(model, "body.weight"), torch.ones(6, 6))
    assert same_bits(model(ids), output)


def test_a_direction_under_two_magnitudes_aims_at_the_first() -> None:
    """One v that two weights have is rescaled once, to the length that the first of them wants."""
    torch.manual_seed(0)
    model = wn.apply_weight_norm(nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)}))
    first, second = (model[name].parametrizations.weight for name in "ab")
    second.original1 = first.original1
    with torch.no_grad():
        first.original0.mul_(10)
        second.original0.mul_(100)
    report = wn.renormalize_(model, "magnitude")
    assert [weight.name for weight in report.weights] == ["a.weight"]
    ratios = first.original1.norm(dim=1, keepdim=True) / first.original0.abs()
    assert 0.7 < ratios.min() <= ratios.max() < 1.42


def test_selection_and_errors() -> None:
    """Only what is included is rescaled; wrong aims, names, models and directions are errors that change nothing."""
    model = trained(wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))))
    report = wn.renormalize_(model, "unit", include="1")
    assert [w.name for w in report.weights] == ["1.weight"]
    assert "1.weight" in str(report)
    with pytest.raises(wn.SelectionError, match="include='2'"):
        wn.renormalize_(model, include="2")
    with pytest.raises(wn.SelectionError, match="must be"):
        wn.renormalize_(model, "one")  # type: ignore[arg-type]
    with pytest.raises(wn.SelectionError, match="no weight under weight norm"):
        wn.renormalize_(nn.Linear(2, 2))
    trained(model)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        model[1].parametrizations.weight.original1[0, 0] = math.nan
    with pytest.raises(wn.NonFiniteWeightError, match=r"1\.weight"):
        wn.renormalize_(model, "unit")
    assert torch.equal(model[0].parametrizations.weight.original1, before[2])


# Held after every step -----------------------------------------------------------------------------------


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(3))
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 2).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("magnitude", ["linear", "log"])
def test_projection_holds_unit_norm(magnitude: Any) -> None:
    """While the handle is on, ||v|| is one after every step; once it is off, v grows, as the paper says it must."""
    model = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), magnitude=magnitude)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    x = torch.randn(4, 3)
    y = model(x)
    handle = wn.keep_unit_norm(model, optimizer)
    torch.testing.assert_close(model(x), y)
    for _ in range(5):
        fit(model, optimizer, 1)
        for layer in (model[0], model[2]):
            v = layer.parametrizations.weight.original1
            torch.testing.assert_close(v.norm(dim=1), torch.ones(len(v)), rtol=3e-7, atol=0)
    handle.remove()
    handle.remove()
    fit(model, optimizer, 3)
    assert (model[0].parametrizations.weight.original1.norm(dim=1) > 1 + 1e-6).any()


def test_projection_leaves_a_frozen_direction_alone() -> None:
    """Where v is frozen, neither the first projection nor those after steps touch a bit of it."""
    model = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)))
    frozen, other = (model[i].parametrizations.weight.original1 for i in (0, 2))
    frozen.requires_grad_(False)
    before = frozen.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    with wn.keep_unit_norm(model, optimizer):
        fit(model, optimizer, 2)
        torch.testing.assert_close(other.norm(dim=1), torch.ones(2))
    assert same_bits(frozen, before)


@pytest.mark.parametrize("magnitude", ["linear", "log"])
def test_clamping(magnitude: Any) -> None:
    """Clamping brings norms of weights into the bounds, once or after every step, and keeps the sign of g."""
    model = wn.apply_weight_norm(nn.Linear(3, 6), magnitude=magnitude)
    g = model.parametrizations.weight.original0
    if magnitude == "linear":
        with torch.no_grad():
            g[0] = -5.0
    wn.clamp_magnitude_(model, 0.4, 0.6)
    norms = model.weight.detach().norm(dim=1)
    assert 0.4 - 1e-6 < norms.min() <= norms.max() < 0.6 + 1e-6
    assert magnitude == "log" or torch.equal(g[0], torch.tensor([-0.6]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with wn.keep_magnitude_within(model, optimizer, min=0.5):
        for _ in range(4):
            fit(model, optimizer, 1)
            assert model.weight.detach().norm(dim=1).min() > 0.5 - 1e-6
    fit(model, optimizer, 4)
    assert model.weight.detach().norm(dim=1).min() < 0.49
    for bounds in ({}, {"min": -1.0}, {"min": 2.0, "max": 1.0}, {"min": "a"}, {"min": math.inf}, {"max": "1"}):
        with pytest.raises(wn.SelectionError):
            wn.clamp_magnitude_(model, **bounds)


@pytest.mark.parametrize("magnitude", ["linear", "log"])
def test_freezing(magnitude: Any) -> None:
    """A frozen g keeps its value through training; unit and numbers set it; thawing spares frozen weights."""
    model = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), magnitude=magnitude)
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fit(model, optimizer, 2)
    w = model[0].weight.clone()
    wn.freeze_magnitude(model)
    assert same_bits(model[0].weight, w)
    norms = w.norm(dim=1)
    fit(model, optimizer, 3)
    torch.testing.assert_close(model[0].weight.norm(dim=1), norms)
    assert not torch.allclose(model[0].weight, w)
    wn.freeze_magnitude(model, at="unit", include="0")
    torch.testing.assert_close(model[0].weight.norm(dim=1), torch.ones(4))
    wn.freeze_magnitude(model, at=0.25, include="0")
    torch.testing.assert_close(model[0].weight.norm(dim=1), torch.full((4,), 0.25))
    wn.unfreeze_magnitude(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("0")] == [
        "0.parametrizations.weight.original0"
    ]
    fit(model, optimizer, 1)
    assert not torch.allclose(model[0].weight.norm(dim=1), torch.full((4,), 0.25))
    for at in ("none", -1.0, math.inf, None, True, [1.0], "1.0"):
        with pytest.raises(wn.SelectionError):
            wn.freeze_magnitude(model, at=at)  # type: ignore[arg-type]


def test_freezing_lets_a_waiting_gradient_go() -> None:
    """A step between freezing and the next backward pass leaves g where it was frozen."""
    model = wn.apply_weight_norm(nn.Linear(3, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    g, v = model.parametrizations.weight.parameters()
    model(torch.randn(5, 3)).square().sum().backward()
    before = g.detach().clone(), v.detach().clone()
    wn.freeze_magnitude(model)
    assert g.grad is None
    optimizer.step()
    assert same_bits(g, before[0])
    assert not torch.equal(v, before[1])


@pytest.mark.parametrize("magnitude", ["linear", "log"])
def test_a_magnitude_beyond_its_type_is_refused_before_anything_has_changed(magnitude: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 5).double(), nn.Linear(5, 3))
    wn.apply_weight_norm(model, magnitude=magnitude)
    before = copy.deepcopy(model.state_dict())
    for size in (1e39, 1e-60):
        with pytest.raises(wn.SelectionError, match=r"1\.weight: at=1e.* is beyond its type, float32"):
            wn.freeze_magnitude(model, at=size)
    with pytest.raises(wn.SelectionError, match="min=1e"):
        wn.clamp_magnitude_(model, min=1e39)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for bound in ("min", "max"):
        with pytest.raises(wn.SelectionError, match=rf"1\.weight: {bound}=1e-50 is beyond its type, float32"):
            wn.clamp_magnitude_(model, **{bound: 1e-50})
        with pytest.raises(wn.SelectionError, match=rf"1\.weight: {bound}=1e-50 is beyond its type, float32"):
            wn.keep_magnitude_within(model, optimizer, **{bound: 1e-50})
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    wn.clamp_magnitude_(model, max=1e39)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    for kind in (torch.float8_e4m3fn, torch.int32, "float32"):
        with pytest.raises(wn.SelectionError, match="magnitude_dtype"):
            wn.apply_weight_norm(nn.Linear(4, 3), magnitude_dtype=kind)  # type: ignore[arg-type]
