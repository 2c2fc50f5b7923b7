"""The start without data: the paper's magnitudes, orthogonal directions, zero biases; nothing else touched."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wnsurgery as wn
from wnsurgery import fans

from nets import TiedLanguageModel, effective


def rows_of(module: nn.Module) -> list[Tensor]:
    """v's rows in float64, one matrix (rows, fan in) per group, cut by hand."""
    v = module.parametrizations.weight.original1.detach().double()  # type: ignore[union-attr, union-attr, index]
    groups = getattr(module, "groups", 1)
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d):
        return [block.transpose(0, 1).flatten(1) for block in v.chunk(groups)]
    return [block.flatten(1) for block in v.chunk(groups)]


CASES: dict[str, tuple[Any, int, int]] = {
    "linear": (lambda: nn.Linear(9, 4), 9, 4),
    "linear, more rows": (lambda: nn.Linear(4, 9), 4, 9),
    "conv": (lambda: nn.Conv2d(3, 8, 3), 27, 72),
    "conv in groups": (lambda: nn.Conv1d(4, 8, 3, groups=2), 6, 12),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), 9, 9),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), 12, 18),
    "transposed in groups": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), 8, 12),
}


@pytest.mark.parametrize("magnitude", ["linear", "log"])
@pytest.mark.parametrize("name", CASES)
def test_magnitudes_and_orthogonal_directions(name: str, magnitude: Any) -> None:
    """g = sqrt(2 fan_in / fan_out) on every row; rows of norm 1, orthonormal where they fit."""
    torch.manual_seed(0)
    make, fan_in, fan_out = CASES[name]
    module = wn.apply_weight_norm(make(), magnitude=magnitude)
    report = wn.fan_init(module)
    assert [(layer.fan_in, layer.fan_out) for layer in report.initialised] == [(fan_in, fan_out)]
    g = module.parametrizations.weight.original0
    assert torch.allclose(g.exp() if magnitude == "log" else g, torch.tensor(math.sqrt(2 * fan_in / fan_out)))
    assert not module.bias.any()
    for matrix in rows_of(module):
        assert torch.allclose(matrix.norm(dim=1), torch.ones(1, dtype=torch.float64), atol=1e-6)
        if len(matrix) <= matrix.shape[1]:
            assert torch.allclose(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), atol=1e-6)
        else:
            assert torch.linalg.matrix_rank(matrix) == matrix.shape[1]
    blocks = rows_of(module)
    assert len(blocks) == 1 or not torch.allclose(blocks[0], blocks[1])


def test_size_is_kept_through_a_deep_relu_net() -> None:
    """The summed square of activations stays within a factor of 2 over 20 ReLU layers of changing width."""
    torch.manual_seed(0)
    widths = [256, *(256 if i % 2 else 384 for i in range(20))]
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    model, x = wn.apply_weight_norm(nn.Sequential(*layers)), torch.randn(64, 256)
    before = float(x.square().sum())
    wn.fan_init(model)
    assert 0.5 < float(model(x).detach().square().sum()) / before < 2


def test_the_same_generator_gives_the_same_start() -> None:
    """A generator decides the result and leaves torch's own alone; init at once and afterwards agree."""
    results = []
    state = torch.get_rng_state()
    for how in ("apply", "call"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)).requires_grad_(True)
        state = torch.get_rng_state()
        source = torch.Generator().manual_seed(7)
        if how == "apply":
            wn.apply_weight_norm(model, init="fan", generator=source)
        else:
            wn.fan_init(wn.apply_weight_norm(model), generator=source)
        assert torch.equal(torch.get_rng_state(), state)
        results.append([p.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_left_is_named() -> None:
    """Recurrent weights, frozen magnitudes and directions, weights tied to a lookup table: named, unchanged."""
    model = nn.ModuleDict(
        {"lstm": nn.LSTM(3, 2), "frozen": nn.Linear(3, 2), "still": nn.Linear(3, 2), "tied": TiedLanguageModel()}
    )
    wn.apply_weight_norm(model)
    frozen: Any = model["frozen"]
    still: Any = model["still"]
    frozen.parametrizations.weight.original0.requires_grad_(False)
    still.parametrizations.weight.original1.requires_grad_(False)
    names = ("lstm.weight_hh_l0", "frozen.weight", "still.weight", "tied.head.weight")
    before = {name: effective(model, name).detach().clone() for name in names}
    report = wn.fan_init(model)
    left = {skip.name: skip.reason for skip in report.left}
    assert [layer.name for layer in report.initialised] == ["tied.body.weight"]
    assert "recurrent" in left["lstm.weight_hh_l0"]
    assert "magnitude is frozen" in left["frozen.weight"]
    assert "direction is frozen" in left["still.weight"]
    assert "embed.weight" in left["tied.head.weight"]
    assert all(torch.equal(effective(model, name), before[name]) for name in names)


def test_tied_weights_biases_scales_and_the_report() -> None:
    """A pair with two owners is set once, shared and frozen biases stay, init_scale goes by pattern; it prints."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[3].bias = model[2].bias
    model[0].bias.requires_grad_(False)
    biases = [layer.bias.clone() for layer in model]
    wn.apply_weight_norm(model)
    report = wn.fan_init(model, init_scale={"2": 0.1})
    assert [(x.name, x.bias) for x in report.initialised] == [
        ("0.weight", False),
        ("2.weight", False),
        ("3.weight", False),
    ]
    assert [round(x.magnitude, 4) for x in report.initialised] == [1.4142, 0.1414, 1.4142]
    assert all(
        torch.equal(layer.bias, bias) for layer, bias in zip(model, biases, strict=True) if layer is not model[1]
    )
    assert {skip.name: skip.reason for skip in report.left} == {"1.weight": "tied to 0.weight"}
    assert "function changed" in str(report)
    assert "tied to 0.weight" in str(report)


def test_refusals() -> None:
    """Plain models, patterns that match nothing, bad scales, data with init="fan": SelectionError."""
    with pytest.raises(wn.SelectionError, match="apply_weight_norm first"):
        wn.fan_init(nn.Linear(3, 2))
    model = wn.apply_weight_norm(nn.Linear(3, 2))
    for options in ({"include": "nope"}, {"init_scale": -1.0}, {"init_scale": {"nope": 1.0}}):
        with pytest.raises(wn.SelectionError):
            wn.fan_init(model, **options)  # type: ignore[arg-type]
    with pytest.raises(wn.SelectionError, match="go together"):
        wn.apply_weight_norm(nn.Linear(3, 2), init="fan", data=torch.ones(1, 3))


@pytest.mark.parametrize("options", [{"init_scale": {"1": 1e39}}, {"generator": 42}, {"generator": "damaged"}], ids=str)
def test_an_error_leaves_all_as_it_was(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is met when some weights are set already."""
    model = wn.apply_weight_norm(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    before = copy.deepcopy(model.state_dict())
    if options.get("generator") == "damaged":
        draws, options = iter([fans._orthogonal(4, 4, None)]), {}
        monkeypatch.setattr(fans, "_orthogonal", lambda *_: next(draws))
    with pytest.raises((wn.SelectionError, TypeError, StopIteration)):
        wn.fan_init(model, **options)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(4, 0),
        lambda: nn.Linear(0, 4),
        lambda: nn.Conv2d(4, 0, 2),
        lambda: nn.ConvTranspose1d(4, 0, 3),
    ],
)
def test_weights_without_elements_are_named(make: Callable[[], nn.Module]) -> None:
    model = wn.apply_weight_norm(nn.Sequential(nn.Linear(4, 4), make()))
    report = wn.fan_init(model)
    assert [fan.name for fan in report.initialised] == ["0.weight"]
    assert {skip.name: skip.reason for skip in report.left} == {"1.weight": "it has no elements"}
