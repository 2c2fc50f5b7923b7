"""A file in any layout loads into a model in any layout, whatever axes either keeps and however few channels."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import wnsurgery as wn
from wnsurgery.errors import InputError

LAYERS = {
    "linear, one output": lambda: nn.Linear(16, 1),
    "linear, one input": lambda: nn.Linear(1, 5),
    "linear, one of each": lambda: nn.Linear(1, 1),
    "conv 1d": lambda: nn.Conv1d(3, 4, 3),
    "conv 1d, one output": lambda: nn.Conv1d(6, 1, 3),
    "conv 1d, one input": lambda: nn.Conv1d(1, 6, 3),
    "conv 2d, one output": lambda: nn.Conv2d(3, 1, (2, 3)),
    "conv 2d, one input": lambda: nn.Conv2d(1, 3, 1),
    "conv 1d, depthwise": lambda: nn.Conv1d(4, 4, 3, groups=4),
    "transposed 1d": lambda: nn.ConvTranspose1d(8, 4, 4),
    "transposed 1d, one output": lambda: nn.ConvTranspose1d(8, 1, 4),
    "transposed 1d, one input": lambda: nn.ConvTranspose1d(1, 8, 4),
    "transposed 2d, as many outputs as inputs": lambda: nn.ConvTranspose2d(4, 4, 2),
    "transposed 1d, two groups": lambda: nn.ConvTranspose1d(8, 6, 4, groups=2),
    "transposed 1d, depthwise": lambda: nn.ConvTranspose1d(4, 4, 2, groups=4),
    "transposed 1d, one output in each group": lambda: nn.ConvTranspose1d(8, 2, 3, groups=2),
}


def _legacy(layer, dim):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, dim=dim)


def _ours(layer, dim, magnitude="linear"):
    chosen = "auto" if dim == "ours" else dim
    return wn.apply_weight_norm(nn.ModuleList([layer]), magnitude=magnitude, dim=chosen)[0]


LAYOUTS = {
    "plain": lambda layer: layer,
    "legacy": partial(_legacy, dim=0),
    "legacy, axis 1": partial(_legacy, dim=1),
    "legacy, no axis": partial(_legacy, dim=None),
    "torch": partial(parametrizations.weight_norm, dim=0),
    "torch, axis 1": partial(parametrizations.weight_norm, dim=1),
    "torch, no axis": partial(parametrizations.weight_norm, dim=None),
    "ours": partial(_ours, dim="ours"),
    "ours, no axis": partial(_ours, dim=None),
    "log": partial(_ours, dim="ours", magnitude="log"),
    "log, no axis": partial(_ours, dim=None, magnitude="log"),
}


def made(layer, layout, seed):
    torch.manual_seed(seed)
    return nn.Sequential(LAYOUTS[layout](LAYERS[layer]()))


def trained(net):
    """The net with g no longer the norm of v."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.rand_like(parameter), alpha=0.1)
    return net


def weight_of(net):
    """The weight that a net's state dict stands for, in float64, by numpy alone."""
    state = {key: value.double().numpy() for key, value in net.state_dict().items()}
    if "0.weight" in state:
        return state["0.weight"]
    legacy = "0.weight_g" in state
    stem = "0.weight_" if legacy else "0.parametrizations.weight.original"
    g, v = (state[stem + half] for half in ("gv" if legacy else "01"))
    if any(key.endswith("log_scale") for key in state):
        g = np.exp(g)
    if g.ndim and g.shape[0] not in (1, v.shape[0]):  # one for each group and output
        blocks = v.reshape(g.shape[0], -1, *v.shape[1:])
        lengths = np.sqrt((blocks**2).sum(axis=(1, *range(3, blocks.ndim)), keepdims=True))
        return (g[:, None] * blocks / lengths).reshape(v.shape)
    over = tuple(d for d in range(v.ndim) if g.ndim == 0 or g.shape[d] == 1)
    return g * v / np.sqrt((v**2).sum(axis=over, keepdims=True))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("stored", LAYOUTS)
def test_a_file_in_any_layout_loads_into_a_model_in_any_layout(layer, stored, tmp_path):
    """The loaded model has the weight the file stands for, and keeps the axes it was built with."""
    net = trained(made(layer, stored, 0))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    expected = weight_of(net)
    for layout in LAYOUTS:
        before = {key: value.shape for key, value in made(layer, layout, 1).state_dict().items()}
        loaded = wn.load_model(tmp_path / "net.pt", arch=partial(made, layer, layout, 1))
        assert {key: value.shape for key, value in loaded.state_dict().items()} == before, layout
        np.testing.assert_allclose(weight_of(loaded), expected, rtol=2e-6, atol=1e-9, err_msg=layout)
        assert torch.equal(loaded[0].bias, net[0].bias)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("stored", ["legacy", "torch", "ours"])
def test_halves_that_fit_are_copied_bit_for_bit(layer, stored, tmp_path):
    """Between models that keep the same axes g and v are copied, not computed, whatever shape one magnitude has."""
    net = trained(made(layer, stored, 0))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    g, v = list(net.state_dict().values())[1:]
    for layout in ("legacy", "torch", "ours"):
        again = wn.load_model(tmp_path / "net.pt", arch=partial(made, layer, layout, 1))
        ours = list(again.state_dict().values())[1:]
        if ours[0].numel() == g.numel() == 1 or ours[0].shape == g.shape:
            assert torch.equal(ours[0].flatten(), g.flatten()) and torch.equal(ours[1], v)


def test_directions_of_another_shape_are_named(tmp_path):
    """A pair whose v has another shape than the model's is an error that names it, not something to convert."""
    torch.save(made("transposed 1d", "legacy", 0).state_dict(), tmp_path / "net.pt")
    with pytest.raises(InputError, match=r"do not fit the model.*original1"):
        wn.load_model(tmp_path / "net.pt", arch=lambda: nn.Sequential(LAYOUTS["ours"](nn.ConvTranspose1d(8, 4, 5))))


@pytest.mark.parametrize("mode", ["parametrized", "deferred"])
@pytest.mark.parametrize(("kernel", "told"), [(4, True), (5, False)])
def test_load_state_dict_says_that_the_axes_differ(mode, kernel, told):
    """Beside torch's own message about the shape of g stands what to do; not where the weight is another one."""
    model = wn.apply_weight_norm(nn.Sequential(nn.ConvTranspose1d(8, 4, 4)), mode=mode)
    other = nn.Sequential(LAYOUTS["torch"](nn.ConvTranspose1d(8, 4, kernel)))
    with pytest.raises(RuntimeError, match="size mismatch") as caught:
        model.load_state_dict(other.state_dict())
    assert ("0.parametrizations.weight.original0 keeps other axes there" in str(caught.value)) == told
    alike = wn.apply_weight_norm(nn.Sequential(nn.ConvTranspose1d(8, 4, kernel)), mode=mode, dim={"0": 0})
    alike.load_state_dict(other.state_dict())
