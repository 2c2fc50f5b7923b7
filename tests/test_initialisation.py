"""Data-dependent initialisation: the paper's recipe, in one pass, leaving nothing else changed."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

import wnsurgery as wn

from nets import Branches, net, same_bits


def first_call_statistics(model: nn.Module, x: Any) -> dict[str, tuple[float, float]]:
    """Largest |mean| and |std - 1| per channel of each convolution's and linear layer's first output."""
    found: dict[str, tuple[float, float]] = {}
    handles = []

    def hook(name: str, axis: int) -> Any:
        def record(_module: nn.Module, _args: Any, out: Tensor) -> None:
            if name not in found:
                rows = out.detach().double().movedim(axis, 0).flatten(1)
                found[name] = rows.mean(1).abs().max().item(), (rows.std(1, unbiased=False) - 1).abs().max().item()

        return record

    for name, module in model.named_modules():
        spatial = {nn.Conv1d: 1, nn.Conv2d: 2, nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.Linear: 0}
        dims = next((d for t, d in spatial.items() if isinstance(module, t)), None)
        if dims is not None:
            handles.append(module.register_forward_hook(hook(name, -1 - dims)))
    with torch.no_grad():
        model(*x) if isinstance(x, tuple) else model(x)
    for handle in handles:
        handle.remove()
    return found


class Deep(nn.Module):
    """Twelve residual blocks with groups and an inner transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(8, 8, 3, padding=1, groups=2), nn.Tanh(), nn.ConvTranspose1d(8, 8, 3, padding=1, groups=4)
            )
            for _ in range(12)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(2))


@pytest.mark.parametrize("magnitude", ["linear", "log"])
def test_every_pre_activation_has_mean_0_and_deviation_1(magnitude: Any) -> None:
    """On residuals, branches, groups, transposed convolutions and shared modules, per channel, on that batch."""
    torch.manual_seed(0)
    for model, x in ((Branches(), torch.randn(64, 3, 8, 8) * 5 + 3), (Deep(), torch.randn(50, 8, 20) * 40 - 7)):
        wn.apply_weight_norm(model.eval(), magnitude=magnitude)
        report = wn.data_dependent_init(model, x)
        seen = first_call_statistics(model, x)
        for layer in report.initialised:
            mean, deviation = seen[layer.name.removesuffix(".weight")]
            assert deviation < 1e-3, layer
            assert layer.scale_only or mean < 1e-4, layer
        assert len(report.initialised) == len(seen)


def test_report_names_what_was_left() -> None:
    """Unreached, recurrent, attention-packed and lookup weights keep g, each with its reason; scale-only is marked."""
    torch.manual_seed(0)
    model = Branches().eval()
    wn.apply_weight_norm(model)
    report = wn.data_dependent_init(model, torch.randn(32, 3, 6, 6))
    assert {s.name: s.reason for s in report.left}.keys() == {"unused.weight"}
    assert [layer.name for layer in report.initialised if layer.scale_only] == ["right.weight"]
    assert "unused.weight" in str(report)
    encoder = wn.apply_weight_norm(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).eval())
    report = wn.data_dependent_init(encoder, torch.randn(16, 5, 8))
    assert [layer.name for layer in report.initialised] == ["linear1.weight", "linear2.weight"]
    left = {s.name: s.reason for s in report.left}
    assert "attention" in left["self_attn.in_proj_weight"]
    lstm = wn.apply_weight_norm(nn.Sequential(nn.Linear(4, 3), nn.LSTM(3, 2)))
    before = copy.deepcopy(lstm[1].state_dict())
    report = wn.data_dependent_init(lstm, torch.randn(9, 5, 4))
    assert all("recurrent" in s.reason for s in report.left)
    assert all(torch.equal(before[k], v) for k, v in lstm[1].state_dict().items())


def test_order_of_execution_not_of_definition() -> None:
    """Later layers see earlier ones initialised even when they are defined first."""

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(5, 2), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu())

    torch.manual_seed(0)
    model, x = wn.apply_weight_norm(Backwards()), torch.randn(300, 3) * 9
    report = wn.data_dependent_init(model, x)
    assert [layer.name for layer in report.initialised] == ["first.weight", "last.weight"]
    for mean, deviation in first_call_statistics(model, x).values():
        assert mean < 1e-4
        assert deviation < 1e-3


def test_one_forward_pass() -> None:
    """The net is called once, whatever its depth."""
    model = wn.apply_weight_norm(Deep())
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for block in model.blocks:
        block[0].register_forward_hook(lambda *_: calls.append(1))
    wn.data_dependent_init(model, torch.randn(8, 8, 20))
    assert len(calls) == 13


def test_constant_channels_keep_their_parameters() -> None:
    """A channel whose pre-activation does not vary keeps g and b, is named, and stays finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1] = torch.tensor([1.0, 0.0, 0.0])
        model[0].weight[2] = 0
    wn.apply_weight_norm(model)
    x = torch.randn(50, 3)
    x[:, 0] = 0.7
    g, b = model[0].parametrizations.weight.original0.clone(), model[0].bias.clone()
    report = wn.data_dependent_init(model, x)
    assert 1 in report.initialised[0].constant
    assert torch.equal(model[0].parametrizations.weight.original0[1], g[1])
    assert torch.equal(model[0].bias[1], b[1])
    assert all(torch.isfinite(p).all() for p in model.parameters())
    single = wn.data_dependent_init(model, x[:1])  # one sample: nothing varies
    assert all(len(layer.constant) == layer.channels for layer in single.initialised)


@pytest.mark.parametrize("kind", ["frozen", "shared"])
def test_a_bias_that_may_not_be_set_keeps_its_bits(kind: str) -> None:
    """A frozen bias, and one that two layers have, stay; g is set all the same, and the output comes with that bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    if kind == "frozen":
        model[0].bias.requires_grad_(False)
    else:
        model[2].bias = model[0].bias
    wn.apply_weight_norm(model)
    before = model[0].bias.detach().clone()
    x = torch.randn(64, 8) + 1
    wn.data_dependent_init(model, x)
    assert same_bits(model[0].bias, before)
    assert torch.allclose(model[0](x).std(0, unbiased=False), torch.ones(8), atol=1e-4)


def test_leaves_everything_else_as_it_was() -> None:
    """Modes, random state, running statistics, gradients and hooks are restored, with dropout running or not."""
    model = Branches()
    model.left.eval()
    wn.apply_weight_norm(model)
    x = torch.randn(16, 3, 6, 6)
    model(x).sum().backward()
    modes = [m.training for m in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    random = torch.get_rng_state()
    for training in (None, True, False):
        wn.data_dependent_init(model, x, training=training)
        assert [m.training for m in model.modules()] == modes
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
        assert torch.equal(torch.get_rng_state(), random)
        pairs = zip(model.parameters(), grads, strict=True)
        assert all(p.grad is None if g is None else torch.equal(p.grad, g) for p, g in pairs)  # type: ignore[arg-type]
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_dropout_is_the_callers_choice() -> None:
    """training=True runs dropout and batch statistics, training=False does not: the results differ."""
    results = []
    for training in (True, False):
        torch.manual_seed(0)
        model = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)))
        wn.data_dependent_init(model, torch.randn(64, 3), training=training)
        results.append(model[2].parametrizations.weight.original0.clone())
    assert not torch.allclose(*results)


def test_a_failing_forward_changes_nothing() -> None:
    """When the forward pass raises in the middle, every g and b is what it was; apply gives the plain net back."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(6, 2))
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(wn.InputError, match="failed on batch 0: RuntimeError"):
        wn.apply_weight_norm(model, init="data", data=torch.randn(8, 3))
    assert not wn.is_weight_normed(model)
    assert list(before) == [n for n, _ in model.named_parameters()]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    wn.apply_weight_norm(model)
    kept = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(wn.InputError, match="failed on batch 0: RuntimeError"):
        wn.data_dependent_init(model, torch.randn(8, 3))
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())
    with pytest.raises(wn.InputError, match="not finite"):
        wn.data_dependent_init(model[:2], torch.full((8, 3), float("nan")))
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters())


def test_repeating_gives_the_same() -> None:
    """Initialising again on the same data changes g and b by rounding alone."""
    torch.manual_seed(0)
    model, x = wn.apply_weight_norm(Deep()), torch.randn(20, 8, 20)
    wn.data_dependent_init(model, x)
    once = {n: p.clone() for n, p in model.named_parameters()}
    wn.data_dependent_init(model, x)
    assert all(torch.allclose(p, once[n], rtol=1e-5, atol=1e-6) for n, p in model.named_parameters())


def neutral_moments(layer: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of x v / ||v|| in float64."""
    v = layer.parametrizations.weight.original1.detach().double()
    t = x.double() @ (v / v.norm(dim=1, keepdim=True)).T
    return t.mean(0), t.std(0, unbiased=False)


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("gradients", [False, True])
def test_directions_of_any_length_and_forward_passes_with_gradients(scale: float, gradients: bool) -> None:
    """g and b are 1/std[t] and -mean[t]/std[t], t = x v / ||v||, however long v is, whatever mode the forward sets."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(gradients):
                return self.layer(x)

    torch.manual_seed(0)
    model, x = wn.apply_weight_norm(Own()), torch.randn(200, 6) * 3 + 2
    with torch.no_grad():
        model.layer.parametrizations.weight.original1.mul_(scale)
        model.layer.parametrizations.weight.original1[1] *= 100
    wn.data_dependent_init(model, x)
    mean, std = neutral_moments(model.layer, x)
    g = model.layer.parametrizations.weight.original0.flatten().double()
    assert torch.allclose(g, 1 / std, rtol=1e-5)
    assert torch.allclose(model.layer.bias.double(), -mean / std, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        out = model(x)
        assert (out.std(0, unbiased=False) - 1).abs().max() < 1e-4
        assert torch.equal(out, nn.functional.linear(x, model.layer.weight, model.layer.bias))


@pytest.mark.parametrize("gradients", [False, True])
def test_a_write_into_a_weight_before_is_not_lost(gradients: bool) -> None:
    model = wn.apply_weight_norm(nn.Sequential(nn.Linear(4, 3)))
    with torch.set_grad_enabled(gradients):
        w = model[0].weight
    with torch.no_grad():
        w.fill_(2.0)
    wn.data_dependent_init(model, torch.randn(50, 4))
    assert torch.equal(model[0].parametrizations.weight.original1, torch.full((3, 4), 2.0))
    assert (model[0].weight / model[0].weight[0, 0]).sub(1).abs().max() < 1e-6


def test_a_failure_after_a_layer_has_run_lends_nothing_on() -> None:
    """The weight of a layer whose pass broke off in the middle is its own again."""

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no")

    class Inner(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("no")

    for layer in (nn.Linear(4, 4), Inner(4, 4)):
        model = wn.apply_weight_norm(nn.Sequential(layer, Fails()))
        with torch.no_grad():
            before = layer.weight.clone()
        with pytest.raises(wn.InputError, match="no"):
            wn.data_dependent_init(model, torch.randn(9, 4))
        with torch.no_grad():
            assert torch.equal(layer.weight, before)


def test_init_scale_and_selection() -> None:
    """init_scale sets the deviation, include and exclude pick the layers."""
    torch.manual_seed(0)
    model, x = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))), torch.randn(100, 3)
    before = model[0].bias.clone()
    wn.data_dependent_init(model, x, include="1", init_scale=0.1)
    assert torch.equal(model[0].bias, before)
    assert torch.allclose(model(x).std(0, unbiased=False), torch.full((5,), 0.1), atol=1e-4)
    report = wn.data_dependent_init(model, x, exclude="1.*")
    assert [layer.name for layer in report.initialised] == ["0.weight"]


def test_all_in_one_call_with_frozen_magnitude() -> None:
    """apply_weight_norm(init="data", freeze_magnitude=True) sets g from data and then freezes it."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(100, 3) * 4
    wn.apply_weight_norm(model, init="data", data=x, freeze_magnitude=True, init_scale=2.0)
    assert torch.allclose(model(x).std(0, unbiased=False), torch.full((4,), 2.0), atol=1e-3)
    assert not model[0].parametrizations.weight.original0.requires_grad


def test_kinds_of_data() -> None:
    """A tensor, positional and keyword arguments, a loader's batches without their labels, and a function."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
            return (self.a(x) + self.b(y)) * scale

    x, y = torch.randn(40, 3), torch.randn(40, 2)
    for data in ((x, y), {"x": x, "y": y}, [(x, y)], iter([{"y": y, "x": x}])):
        assert len(wn.data_dependent_init(wn.apply_weight_norm(Two()), data).initialised) == 2
    one = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 4)))
    loader = DataLoader(TensorDataset(x, torch.zeros(40)), batch_size=16, shuffle=True)
    state = torch.get_rng_state()
    wn.data_dependent_init(one, loader)
    assert torch.equal(torch.get_rng_state(), state)
    wn.data_dependent_init(one, {"anything": x}, forward=lambda model, batch: model(batch["anything"]))
    for bad in ([], 3):
        with pytest.raises(wn.InputError):
            wn.data_dependent_init(one, bad)


def test_errors() -> None:
    """Plain models, patterns that match nothing, scales that are not positive and half-given options are errors."""
    x = torch.randn(4, 3)
    with pytest.raises(wn.SelectionError, match="apply_weight_norm first"):
        wn.data_dependent_init(nn.Linear(3, 2), x)
    model = wn.apply_weight_norm(nn.Linear(3, 2))
    for options in ({"include": "nope"}, {"init_scale": 0.0}, {"init_scale": float("nan")}, {"init_scale": True}):
        with pytest.raises(wn.SelectionError):
            wn.data_dependent_init(model, x, **options)  # type: ignore[arg-type]
    for options in ({"init": "data"}, {"data": x}, {"init": "zeros"}):
        with pytest.raises(wn.SelectionError):
            wn.apply_weight_norm(nn.Linear(3, 2), **options)
    with pytest.raises(TypeError, match="surprise"):
        wn.apply_weight_norm(nn.Linear(3, 2), surprise=1)


@pytest.mark.parametrize("scale", [np.float32(0.5), np.int64(2), torch.tensor(0.5), torch.tensor(2), Fraction(1, 2)])
def test_scales_are_real_numbers_of_any_kind(scale: Any) -> None:
    """Those of numpy and tensors without axes give what floats give."""
    found = []
    for given in (scale, {"0": scale}, float(scale)):
        torch.manual_seed(0)
        model = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 2)))
        wn.data_dependent_init(model, torch.randn(9, 3), init_scale=given)
        found.append(model[0].parametrizations.weight.original0.detach().clone())
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (np.float32(-0.5), "must be positive and finite, not -0.5"),
        pytest.param(10**400, "must be positive and finite, not inf", id="huge"),
        ("1", r"must be a number, not '1' \(str\)"),
        (True, r"must be a number, not True \(bool\)"),
        (torch.tensor(True), "must be a number, not True"),
        (torch.ones(1), r"must be a number, not tensor\(\[1.\]\) \(Tensor\)"),
        ({"0": 0}, "must be positive and finite for '0', not 0.0"),
    ],
)
def test_scales_that_are_none(scale: Any, message: str) -> None:
    """What was seen is named: its value, or its type."""
    model = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 2)))
    with pytest.raises(wn.SelectionError, match=message):
        wn.fan_init(model, init_scale=scale)


@pytest.mark.parametrize("how", ["fresh", "nothing left"])
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"bogus": 1}, TypeError),
        ({"memory": "live"}, TypeError),
        ({"init_scale": {"*": -3}}, wn.SelectionError),
        ({"init_scale": {"typo*": 1.0}}, wn.SelectionError),
    ],
)
def test_wrong_options_are_refused_before_anything_has_changed(how: str, options: Any, error: Any) -> None:
    """Also where no weight is left to initialise, and BatchNorms are there to be taken."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    if how == "nothing left":
        wn.apply_weight_norm(model)
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(error, match="|".join(options)):
        wn.apply_weight_norm(model, init="fan", batch_norm="fold", **options)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_other_axes_and_frozen_magnitudes_are_left_alone() -> None:
    """A magnitude per input channel, per tensor or frozen cannot be set from outputs: kept and named."""
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.Linear(6, 2), nn.Linear(2, 3))
    wn.apply_weight_norm(model, dim={"0": 0, "1": None})
    model[2].parametrizations.weight.original0.requires_grad_(False)
    report = wn.data_dependent_init(
        model, torch.randn(5, 4, 4), forward=lambda m, x: m[2](m[1](m[0](x).transpose(1, 2)))
    )
    reasons = [s.reason for s in report.left]
    assert [("output channel" in r, "frozen" in r) for r in reasons] == [(True, False), (True, False), (False, True)]


def test_half_precision_nets() -> None:
    """bf16 nets come out at deviation 1 to the precision of their outputs."""
    torch.manual_seed(0)
    model, _ = net("conv2d", torch.bfloat16)
    wn.apply_weight_norm(model)
    x = torch.randn(32, 3, 8, 8).bfloat16()
    wn.data_dependent_init(model, x)
    assert all(deviation < 0.02 for _, deviation in first_call_statistics(model, x).values())


def hand_made(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of a Conv1d's output with unit directions and no bias, in float64 loops."""
    v = layer.parametrizations.weight.original1.detach().double()
    x = nn.functional.pad(x.double(), (layer.padding[0], layer.padding[0]))
    means, stds = [], []
    for row in v:
        unit = row / row.square().sum().sqrt()
        windows = x.unfold(2, unit.shape[1], 1)  # (batch, channels, positions, taps)
        t = sum(windows[:, c, :, k] * unit[c, k] for c in range(unit.shape[0]) for k in range(unit.shape[1]))
        mean = t.sum() / t.numel()
        means.append(mean)
        stds.append(((t - mean).square().sum() / t.numel()).sqrt())
    return torch.stack(means), torch.stack(stds)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 500), (40, 3, 6), (50, 3, 1)])
@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (500.0, 1.0), (0.0, 1e-12), (3e10, 1e12)])
def test_large_means_and_any_scale(mean: float, deviation: float, shape: Any, several: bool) -> None:
    """g and b are those of float64 loops for activations far from zero, tiny and huge, long and of one position."""
    torch.manual_seed(0)
    model = wn.apply_weight_norm(nn.Sequential(nn.Conv1d(3, 5, 1)).double())
    x = torch.randn(shape, dtype=torch.float64) * deviation + mean
    wide_mean, wide_std = hand_made(model[0], x)
    model, x = model.float(), x.float()
    wn.data_dependent_init(model, list(x.split([1, len(x) - 1])) if several else x)
    g = model[0].parametrizations.weight.original0.flatten().double()
    rounding = 1e-6 * (1 + mean / deviation)  # of the activations themselves, to float32
    assert torch.allclose(g, 1 / wide_std, rtol=1e-5 + rounding)
    assert torch.allclose(model[0].bias.double(), -wide_mean / wide_std, rtol=1e-5 + rounding, atol=1e-5)


def test_an_output_that_somebody_holds_is_not_written_to() -> None:
    """What a layer puts on itself, or a hook on all modules sees, stays what the layer computed; the next layer gets
    what the initialised layer gives."""

    class Keeping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            self.copy = self.kept.clone()
            return self.kept

    torch.manual_seed(0)
    model, x = nn.Sequential(Keeping(4, 5), nn.Linear(5, 3)), torch.randn(60, 4)
    wn.apply_weight_norm(model)
    twin = copy.deepcopy(model)
    wn.data_dependent_init(model, x)
    assert torch.equal(model[0].kept, model[0].copy)
    seen, copies = [], []

    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(output)
        copies.append(output.clone())

    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        wn.data_dependent_init(twin, x)
    finally:
        handle.remove()
    assert all(torch.equal(output, before) for output, before in zip(seen, copies, strict=True))
    for net_ in (model, twin):
        assert (net_(x).std(0, unbiased=False) - 1).abs().max() < 1e-4


def test_a_layer_that_wants_gradients_in_its_own_forward() -> None:
    """It computes its weight then, whatever it was lent: g and b come out as ever."""

    class Inside(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                return super().forward(x)

    torch.manual_seed(0)
    layer, x = Inside(6, 4), torch.randn(200, 6) * 3 + 2
    model = wn.apply_weight_norm(nn.Sequential(layer))
    for data in (x, list(x.split(70))):
        wn.data_dependent_init(model, data)
        mean, std = neutral_moments(layer, x)
        assert torch.allclose(layer.parametrizations.weight.original0.flatten().double(), 1 / std, rtol=1e-5)
        assert torch.allclose(layer.bias.double(), -mean / std, rtol=1e-4, atol=1e-5)
        assert "_kept" not in layer.parametrizations.weight.__dict__ or layer.weight.shape == (4, 6)


@pytest.mark.parametrize("inference", [False, True])
def test_one_batch_in_inference_mode(inference: bool) -> None:
    """The caller's inference mode changes nothing of what is set, nor of training afterwards."""
    torch.manual_seed(0)
    model, x = wn.apply_weight_norm(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))), torch.randn(90, 6)
    with torch.inference_mode(inference):
        wn.data_dependent_init(model, x)
    assert (model(x).std(0, unbiased=False) - 1).abs().max() < 1e-4
    model(x).sum().backward()


def test_a_report_is_plain_data_whenever_it_is_read() -> None:
    """Training after the call, copies and pickles change nothing of what the report says of before and after."""
    torch.manual_seed(0)
    model, x = wn.apply_weight_norm(nn.Sequential(nn.Linear(5, 3))), torch.randn(90, 5)
    before = model(x).detach().double()
    report = wn.data_dependent_init(model, x)
    after = model(x).detach().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    layer = pickle.loads(pickle.dumps(copy.deepcopy(report))).initialised[0]
    for said, seen in ((layer.before, before), (layer.after, after)):
        assert said.mean == pytest.approx(seen.mean(0).tolist(), abs=1e-6)
        assert said.std == pytest.approx(seen.std(0, unbiased=False).tolist(), rel=1e-6)
    assert layer == report.initialised[0]
    assert "mean=(" in repr(layer.before)
    with pytest.raises(AttributeError, match="median"):
        layer.before.median  # noqa: B018


COMPILING = """
import sys, torch, wnsurgery as wn
from torch import nn

class Net(nn.Sequential):
    def forward(self, x):
        if len(sys.argv) > 1:  # compiles when it is first called, as some attention does
            return torch.compile(self[2], backend="eager")(self[1](self[0](x)))
        return super().forward(x)

net = wn.apply_weight_norm(Net(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)))
x = torch.randn(100, 8)
before = "torch._dynamo" in sys.modules
assert len(wn.data_dependent_init(net, x).initialised) == 2
assert before or ("torch._dynamo" in sys.modules) == (len(sys.argv) > 1)
with torch.no_grad():
    y = net(x)
torch.testing.assert_close(y.std(0, correction=0), torch.ones(8))
torch.testing.assert_close(y.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
assert not net[2]._forward_hooks
"""


@pytest.mark.parametrize("arguments", [[], ["compile"]], ids=["plain", "compiling"])
def test_the_compiler_is_left_alone_where_nothing_is_compiled(arguments: list[str]) -> None:
    """It takes most of a second to import; a net that compiles a part of itself in its forward pass is set as any."""
    done = subprocess.run([sys.executable, "-c", COMPILING, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_within_cached_parametrizations() -> None:
    """Weights cached before, and those in use while g is measured, are none that any later use gets."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(self.first(x).relu()).relu())

    torch.manual_seed(0)
    model, x = wn.apply_weight_norm(Twice()), torch.randn(64, 8)
    inside = copy.deepcopy(model)
    wn.data_dependent_init(model, x)
    with parametrize.cached():
        inside(x)
        wn.data_dependent_init(inside, x)
        assert torch.equal(inside(x), model(x))
        assert parametrize._cache
    assert all(map(torch.equal, inside.parameters(), model.parameters()))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("mode", ["parametrized", "deferred"])
def test_gradients_are_as_before(mode: str, trained: bool, several: bool) -> None:
    """A forward that differentiates its own layers leaves no gradient behind and changes none: the same tensors, the
    same values; one that waits on a deferred weight passes on as it was before g changed."""

    class Differentiating(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                super().forward(x).sum().backward()
                self[0](x.detach()).sum().backward()
            return super().forward(x)

    def lived() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)
        model = wn.apply_weight_norm(Differentiating(*layers), mode=mode)
        model[2].bias.requires_grad_(False)
        if trained:
            model[2](model[0](x)).square().sum().backward()
        return model

    x = torch.randn(50, 6)
    model, expected = lived(), [p.grad for p in lived().parameters()]
    before = model[0].bias.grad
    wn.data_dependent_init(model, list(x.split(20)) if several else x)
    assert model[0].bias.grad is before
    found = [p.grad for p in model.parameters()]
    assert [g is None for g in found] == [g is None for g in expected]
    assert all(torch.equal(g, e) for g, e in zip(found, expected, strict=True) if e is not None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    model[2](model[0](x)).square().sum().backward()
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


def test_a_layer_that_fails_once_is_measured_when_it_succeeds() -> None:
    """A model that catches a layer's error and calls it again has it set, and gradients are on or off as before."""

    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                try:
                    self.layer(x[:, :2])
                except RuntimeError:
                    assert torch.is_grad_enabled()
                return self.layer(x)

    model = wn.apply_weight_norm(Stubborn())
    x = torch.randn(50, 4)
    report = wn.data_dependent_init(model, x)
    assert [layer.name for layer in report.initialised] == ["layer.weight"]
    y = model(x)
    torch.testing.assert_close(y.std(0, correction=0), torch.ones(3))


def test_other_hooks_run_as_ever() -> None:
    """With pre-hooks of its own or without, a layer is set alike, and each of them sees gradients as they are."""
    seen: list[bool] = []
    weights = []
    for hooked in (False, True):
        torch.manual_seed(0)
        model = wn.apply_weight_norm(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        if hooked:
            for layer in (model[0], model[2]):
                layer.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
        with torch.enable_grad():
            wn.data_dependent_init(model, torch.randn(50, 4), forward=with_gradients)
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    assert seen == [True, True]
    assert torch.equal(*weights)


def with_gradients(model: nn.Module, batch: Tensor) -> Tensor:
    """A forward pass with gradients."""
    with torch.enable_grad():
        return model(batch)  # type: ignore[no-any-return]
