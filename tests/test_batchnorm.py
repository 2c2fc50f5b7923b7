"""BatchNorm surgery: what is folded or made mean-only keeps the function, what cannot be is kept and named."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import wnsurgery as wn
from wnsurgery.cli import main

MODES = ("fold", "mean-only")


def lived(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in evaluation mode, its BatchNorms as training might leave them: gammas of both signs and a zero."""
    torch.manual_seed(seed)
    for m in model.modules():
        if isinstance(m, _BatchNorm) and m.running_mean is not None:
            m.running_mean.normal_()
            m.running_var.uniform_(0.2, 3)
            if m.affine:
                m.weight.data.normal_()
                m.weight.data[0] = 0
                m.bias.data.normal_()
    return model.eval()


def difference(a: Any, b: Any) -> float:
    a, b = (getattr(x, "logits", x).detach() for x in (a, b))
    return float((a - b).abs().max() / b.abs().max())


def norms(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if "BatchNorm" in type(m).__name__]


class Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn2 = nn.BatchNorm2d(out)  # defined first: the order of definition says nothing
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        plain = stride == 1 and width == out
        self.down = None if plain else nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return F.relu(h + (x if self.down is None else self.down(x)))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.layers = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2), Block(16, 16, 1))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def mobile() -> nn.Module:
    def block(a: int, b: int, stride: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(a, a, 3, stride, 1, groups=a, bias=False)
        return [depthwise, nn.BatchNorm2d(a), nn.ReLU6(), nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU6()]

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), *block(8, 12, 1), *block(12, 16, 2), *head)


def generator() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (8, 1, 1)),
        nn.ConvTranspose2d(8, 12, 4, groups=2, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 12, 4, 2, 1, groups=12),
        nn.BatchNorm2d(12, affine=False),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 6, 4, 2, 1, groups=3, bias=False),
        nn.Identity(),
        nn.Dropout(0.2),
        nn.BatchNorm2d(6, momentum=None),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 3, 3, 1, 1),
    )


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 16, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


def volumes() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), nn.ReLU(), nn.ConvTranspose3d(4, 6, 2, groups=2), nn.BatchNorm3d(6)
    )


def sequences() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.SyncBatchNorm(4), nn.ReLU(), nn.ConvTranspose1d(4, 4, 3, groups=4), nn.BatchNorm1d(4)
    )


def huggingface() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="bottleneck", num_labels=4
    )
    return transformers.ResNetForImageClassification(config)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (ResNet, (4, 3, 16, 16)),
    "mobile": (mobile, (4, 3, 16, 16)),
    "generator": (generator, (4, 8)),
    "mlp": (mlp, (8, 6)),
    "volumes": (volumes, (2, 2, 4, 4, 4)),
    "sequences": (sequences, (3, 3, 9)),
    "transformers": (huggingface, (2, 3, 32, 32)),
}


@pytest.mark.parametrize("given", [False, True], ids=["traced", "watched"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETS)
def test_real_nets_keep_their_function(name: str, mode: str, given: bool) -> None:
    """Every BatchNorm goes, outputs agree to 1e-5 before and after the final fold, and no BatchNorm is left."""
    make, shape = NETS[name]
    model, x = lived(make()), torch.randn(shape)
    expected, count = model(x), len(norms(model))
    wn.apply_weight_norm(model, batch_norm=mode, inputs=x if given else None)
    assert difference(model(x), expected) < 1e-5
    assert len([n for n in norms(model) if n.startswith("MeanOnly")]) == (count if mode == "mean-only" else 0)
    assert not [n for n in norms(model) if not n.startswith("MeanOnly")]
    wn.fold_weight_norm(model)
    assert difference(model(x), expected) < 1e-5
    assert not norms(model)
    assert not wn.is_weight_normed(model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["resnet", "generator", "mlp"])
def test_float64_keeps_twelve_digits(name: str, mode: str) -> None:
    """In float64 the function is kept to 1e-12."""
    make, shape = NETS[name]
    model, x = lived(make().double()), torch.randn(shape, dtype=torch.float64)
    expected = model(x)
    wn.apply_weight_norm(model, batch_norm=mode)
    assert difference(model(x), expected) < 1e-12
    assert difference(wn.fold_weight_norm(model)(x), expected) < 1e-12


@pytest.mark.parametrize("name", ["resnet", "generator", "mlp"])
def test_mean_only_trains_and_then_folds_to_a_plain_net(name: str) -> None:
    """After training the loss has fallen, the running means have moved, and the plain net gives the same outputs."""
    make, shape = NETS[name]
    model = wn.apply_weight_norm(lived(make()), batch_norm="mean-only").train()
    x = torch.randn([min(size, 8) for size in shape])
    target = 0.1 * torch.randn(model(x).shape) + 2
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    losses, before = [], {k: v.clone() for k, v in model.named_buffers() if k.endswith("running_mean")}
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(v, before[k]) for k, v in model.named_buffers() if k in before)
    expected = model.eval()(x)
    wn.fold_weight_norm(model)
    assert not norms(model)
    assert not list(model.buffers())
    assert difference(model(x), expected) < 1e-5


def test_batches_of_data_show_the_flow() -> None:
    """With init="data" a batch of the loader, labels left out, tells what tracing cannot: (N, L, C) from (N, C)."""
    model = lived(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)))
    flat, deep = ([(torch.randn(4, *shape), torch.zeros(4))] * 2 for shape in ((5,), (5, 5)))
    wn.apply_weight_norm(folded := copy.deepcopy(model), batch_norm="fold", init="data", data=flat)
    wn.apply_weight_norm(model, batch_norm="fold", init="data", data=deep)
    assert (norms(folded), norms(model)) == ([], ["BatchNorm1d"])


def test_training_mode_does_not_matter() -> None:
    """A model in training mode is cut by its running statistics and stays in training mode."""
    model, x = lived(mlp()), torch.randn(8, 6)
    expected = model(x)
    wn.apply_weight_norm(model.train(), batch_norm="mean-only")
    assert all(m.training for m in model.modules())
    assert difference(model.eval()(x), expected) < 1e-5


# What is kept --------------------------------------------------------------------------------------------


class Case(nn.Module):
    """A convolution, a BatchNorm and a way of using them."""

    def __init__(self, run: Callable[[Any, Tensor], Any], **more: nn.Module) -> None:
        super().__init__()
        self.conv, self.other, self.bn = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        for name, module in more.items():
            setattr(self, name, module)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def stash(m: Any, x: Tensor) -> Tensor:
    m.seen = m.conv(x)
    return m.bn(m.seen)


def drop_out(m: Any, x: Tensor) -> Tensor:
    return m.bn(F.dropout(m.conv(x), 0.5, m.training))


KEPT: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "two producers": (lambda m, x: m.bn(m.conv(x) + m.other(x)), "add"),
    "concatenated producers": (lambda m, x: m.bn(torch.cat([m.conv(x)[:, :2], m.other(x)[:, 2:]], 1)), "cat"),
    "shared producer": (lambda m, x: m.bn(h := m.conv(x)) + h, "used elsewhere"),
    "shared with a layer": (lambda m, x: m.bn(h := m.conv(x)) + m.other(h), "other"),
    "producer returned": (lambda m, x: (m.bn(h := m.conv(x)), {"h": [h]}), "output"),
    "producer stashed": (stash, "seen"),
    "activation between": (lambda m, x: m.bn(m.conv(x).relu()), "relu"),
    "in-place activation": (lambda m, x: m.bn(m.conv(x).relu_()), "relu_"),
    "reshape between": (lambda m, x: m.bn(m.conv(x).flip(2)), "flip"),
    "functional dropout": (drop_out, "dropout"),
    "norm called twice": (lambda m, x: m.bn(m.other(m.bn(m.conv(x)))), "called 2 times"),
    "producer called twice": (lambda m, x: m.bn(m.conv(m.conv(x))), "called 2 times"),
    "never called": (lambda m, x: m.conv(x), "never calls"),
    "input": (lambda m, x: m.conv(m.bn(x)), "input"),
    "weight read": (lambda m, x: m.bn(m.conv(x)) + F.conv1d(x, m.conv.weight, padding=1), "read directly"),
    "norm's weight read": (lambda m, x: m.bn(m.conv(x)) * m.bn.weight[0], "read directly"),
    "functional layer": (lambda m, x: m.bn(F.conv1d(x, m.other.weight)), "conv"),
}


@pytest.mark.parametrize("given", [False, True], ids=["traced", "watched"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", KEPT)
def test_what_does_not_fit_is_kept_and_named(name: str, mode: str, given: bool, caplog: Any) -> None:
    """A BatchNorm that is not alone behind one layer stays, the reason is logged, and no weight changes."""
    run, word = KEPT[name]
    model, x = lived(Case(run)), torch.randn(2, 4, 7)
    before = copy.deepcopy(model.state_dict())
    (kept,) = wn.plan_batch_norm(model, x if given else None, mode=mode).kept
    assert kept.name == "bn"
    assert word in kept.reason or (name == "functional dropout" and given), kept.reason
    wn.apply_weight_norm(model, batch_norm=mode, inputs=x if given else None)
    assert isinstance(model.bn, nn.BatchNorm1d)
    assert f"bn is kept: {kept.reason}" in caplog.text
    after = wn.fold_weight_norm(model).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def hooked(model: Any) -> None:
    model.conv.register_forward_hook(lambda *_: None)


def hooked_norm(model: Any) -> None:
    model.bn.register_forward_hook(lambda *_: None)


def tied(model: Any) -> None:
    model.other.weight = model.spare.weight = nn.Parameter(torch.randn(4, 4, 3))
    model.conv.weight = model.spare.weight


def tied_bias(model: Any) -> None:
    model.conv.bias = model.other.bias


def shared_memory(model: Any) -> None:
    model.spare.weight = nn.Parameter(model.conv.weight.data)


def untracked(model: Any) -> None:
    model.bn = nn.BatchNorm1d(4, track_running_stats=False)


def other_forward(model: Any) -> None:
    class Standardised(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model.conv = Standardised(4, 4, 3, padding=1)


def norm_with_activation(model: Any) -> None:
    class Act(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    model.bn = Act(4)


def forward_put_on_the_norm(model: Any) -> None:
    model.bn.forward = lambda x: x * 100


def pruned(model: Any) -> None:
    torch.nn.utils.parametrizations.spectral_norm(model.conv)


STATES = {
    "hook": (hooked, "hook"),
    "hook on the norm": (hooked_norm, "hook"),
    "tied weight": (tied, "tied"),
    "tied bias": (tied_bias, "tied"),
    "shared memory": (shared_memory, "memory"),
    "no running statistics": (untracked, "track_running_stats"),
    "forward of its own": (other_forward, "way of its own"),
    "norm with activation": (norm_with_activation, "forward of its own"),
    "forward put on the norm": (forward_put_on_the_norm, "forward of its own"),
    "other parametrization": (pruned, "parametrization"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", STATES)
def test_layers_in_a_state_that_forbids_it_are_left_alone(name: str, mode: str) -> None:
    """Hooks, ties, shared memory, other parametrizations and forwards of their own rule the surgery out."""
    change, word = STATES[name]
    model = Case(lambda m, x: m.bn(m.conv(x)), spare=nn.Conv1d(4, 4, 3))
    change(model)
    lived(model)
    plan = wn.plan_batch_norm(model, mode=mode)
    assert not plan.steps
    assert word in plan.kept[0].reason


def test_linear_with_positions_is_not_folded_by_the_wrong_axis() -> None:
    """After a Linear on (N, L, C) the BatchNorm's channels are L: inputs, or the trace around it, show that."""
    model = lived(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)))
    assert wn.plan_batch_norm(model, torch.randn(4, 5)).steps
    assert "3-dimensional" in wn.plan_batch_norm(model, torch.randn(4, 5, 5)).kept[0].reason
    tail = nn.Sequential(nn.ReLU(), nn.Conv1d(5, 5, 1))
    assert "3-dimensional" in wn.plan_batch_norm(nn.Sequential(*model, tail)).kept[0].reason
    turned = Case(lambda m, x: m.bn(m.lin(x.transpose(1, 2)).contiguous()), lin=nn.Linear(4, 4))
    assert wn.plan_batch_norm(lived(turned), torch.randn(2, 4, 4)).kept
    turned.run = lambda m, x: m.bn(m.lin(x.transpose(1, 2)))
    assert "3-dimensional" in wn.plan_batch_norm(turned).kept[0].reason
    assert "channels" in wn.plan_batch_norm(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(5))).kept[0].reason


def test_branches_are_all_followed() -> None:
    """A use in a branch that only other data, or a flag, would take counts."""

    class Data(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
            self.safe, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)

        def forward(self, x: Tensor, features: bool = False) -> Tensor:
            if x.mean() > 0:
                x = self.norm(self.safe(x))
            h = self.conv(x)
            return h if features else self.bn(h)

    plan = wn.plan_batch_norm(lived(Data()))
    assert [s.name for s in plan.steps] == ["norm"]
    assert "another branch" in plan.kept[0].reason


def test_type_questions_are_answered_as_for_tensors() -> None:
    """`isinstance(x, Tensor)` and calls that only take real sizes neither mislead the trace nor break it."""

    class Asking(Case):
        def forward(self, x: Any) -> Any:
            inputs = [x] if isinstance(x, Tensor) else x
            h = self.conv(torch.cat(inputs, 1))
            return (self.bn(h), h) if torch.is_tensor(h) else self.bn(h)

    asked = isinstance
    assert "an output" in wn.plan_batch_norm(lived(Asking(lambda *_: None))).kept[0].reason
    sized = Case(lambda m, x: m.bn(m.conv(x)) + torch.zeros(x.size(0), 1, 1))
    assert "could not be traced" in wn.plan_batch_norm(lived(sized)).kept[0].reason
    assert wn.plan_batch_norm(sized, torch.randn(2, 4, 5)).steps
    assert asked is isinstance


class Untraceable(nn.Module):
    """A forward nobody can trace around blocks called whole, a Sequential taken apart and a list of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))
        self.apart = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))
        self.many = nn.ModuleList(nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().max().item()) % 2 + 1):
            x = x + 1
        x, taps = self.block(x), []
        for layer in self.apart:
            x = layer(x)
            taps.append(x)
        for block in self.many:
            x = block(x)
        return x + taps[0] + taps[1]


def test_what_is_traceable_in_an_untraceable_net_is_still_taken() -> None:
    """Blocks that are called as a whole are traced on their own; a Sequential that is taken apart is not trusted."""
    model, x = lived(Untraceable()), torch.randn(2, 4, 5)
    plan = wn.plan_batch_norm(model)
    assert {s.name for s in plan.steps} == {"block.1", "many.0.1", "many.1.1"}
    assert "could not be traced" in plan.kept[0].reason
    assert "used elsewhere" in wn.plan_batch_norm(model, x).kept[0].reason
    expected = model(x)
    assert difference(wn.apply_weight_norm(model, batch_norm="fold")(x), expected) < 1e-5


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("own", [torch.tanh, torch.tanh_])
@pytest.mark.parametrize("between", [nn.Identity, nn.Dropout])
def test_a_forward_put_on_a_module_is_not_passed_through(between: Any, own: Callable[..., Tensor], given: bool) -> None:
    """An Identity or a Dropout that computes something of its own stands between, whatever its type is."""
    model, x = lived(nn.Sequential(nn.Linear(4, 3), between(), nn.BatchNorm1d(3))), torch.randn(5, 4)
    model[1].forward = own
    expected = model(x)
    plan = wn.plan_batch_norm(model, x if given else None)
    name = type(model[1]).__name__
    assert [(k.name, k.reason) for k in plan.kept] == [("2", f"its input comes from 1 ({name}), not from a layer")]
    wn.apply_weight_norm(model, batch_norm="fold", inputs=x if given else None)
    assert torch.equal(model(x), expected)


def test_tracing_leaves_no_mark() -> None:
    """Attributes, lists, buffers, modes, hooks and random state are as before; hooks do not run."""

    class Marks(Case):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x
            self.log.append(x)
            self.count += 1
            return super().forward(x)

    model: Any = Marks(lambda m, x: m.bn(m.conv(x)))
    model.log, calls = [], []
    model.register_buffer("count", torch.zeros(()))
    model.register_forward_hook(lambda *_: calls.append(1))
    before, state = dict(vars(model)), torch.get_rng_state()
    for inputs in (None, torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))):
        wn.plan_batch_norm(model, inputs)
    assert vars(model) == before
    assert not calls
    assert not model.log
    assert model.count == 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert len(model._forward_hooks) == 1


# Folding forward -----------------------------------------------------------------------------------------


def forward_nets() -> dict[str, tuple[nn.Module, tuple[int, ...], bool]]:
    return {
        "linear": (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False)), (5, 4), True),
        "grouped": (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)), (2, 4, 5, 5), True),
        "valid": (nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 3, 3, padding="valid")), (2, 4, 6), True),
        "reflected": (
            nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Conv1d(4, 3, 3, padding=1, padding_mode="reflect")),
            (2, 4, 6),
            True,
        ),
        "two norms": (nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 3)), (5, 4), True),
        "both sides": (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3)), (5, 4), True),
        "zero padding": (nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 3, 3, padding=1)), (2, 4, 6), False),
        "same": (nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 3, 3, padding="same")), (2, 4, 6), False),
        "transposed": (nn.Sequential(nn.BatchNorm1d(4), nn.ConvTranspose1d(4, 3, 3)), (2, 4, 6), False),
    }


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("name", forward_nets())
def test_folding_forward_where_exact(name: str, converted: bool) -> None:
    """A BatchNorm before a Linear or an unpadded convolution folds into its columns; zero padding forbids it."""
    model, shape, folds = forward_nets()[name]
    lived(model)
    if converted:
        wn.apply_weight_norm(model)
    x = torch.randn(shape)
    expected = model(x)
    wn.apply_weight_norm(model, batch_norm="fold")
    assert bool(norms(model)) is not folds
    assert difference(model(x), expected) < 1e-5
    assert difference(wn.fold_weight_norm(model)(x), expected) < 1e-5


# Weights already under weight norm -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["ours", "log", "torch", "legacy", "tensor"])
@pytest.mark.parametrize("layer", [lambda: nn.Conv1d(4, 6, 3), lambda: nn.ConvTranspose1d(4, 6, 3, groups=2)])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_under_weight_norm_take_the_scale(how: str, mode: str, layer: Callable[[], nn.Module]) -> None:
    """A pair of any kind takes the scale into g, signs and zeros included, and v keeps its direction up to sign."""
    conv = layer()
    makers: dict[str, Callable[[], Any]] = {
        "ours": lambda: wn.apply_weight_norm(conv),
        "log": lambda: wn.apply_weight_norm(conv, magnitude="log"),
        "tensor": lambda: wn.apply_weight_norm(conv, dim=None),
        "torch": lambda: torch.nn.utils.parametrizations.weight_norm(conv),
        "legacy": lambda: torch.nn.utils.weight_norm(conv),
    }
    makers[how]()
    model = lived(nn.Sequential(conv, nn.BatchNorm1d(6)))
    if how == "ours":
        v = conv.parametrizations.weight.original1
        before = v.detach().clone()
    x = torch.randn(2, 4, 8)
    expected = model(x)
    wn.apply_weight_norm(model, batch_norm=mode)
    assert difference(model(x), expected) < 1e-5
    if how == "ours":
        assert conv.parametrizations.weight.original1 is v
        assert torch.equal(v.abs(), before.abs())
    assert difference(wn.fold_weight_norm(model)(x), expected) < 1e-5


def test_parameters_stay_the_same_objects_and_old_state_dicts_keep_their_values() -> None:
    """An optimizer still holds the layer's Parameters; a state dict taken before is not written into."""
    model = lived(nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)))
    weight, bias, beta, state = model[0].weight, model[0].bias, model[1].bias, model.state_dict()
    values = copy.deepcopy(state)
    wn.apply_weight_norm(folded := copy.deepcopy(model), batch_norm="fold", include="0")
    with pytest.raises(wn.SelectionError):
        wn.apply_weight_norm(model, batch_norm="fold", include="nothing")
    assert model[0].weight is weight
    wn.apply_weight_norm(model, batch_norm="mean-only")
    assert weight.shape == folded[0].weight.shape
    assert model[0].bias is None
    assert bias is not None
    assert model[1].bias is beta
    assert all(torch.equal(values[k], state[k]) for k in values)


# All or nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_an_error_changes_nothing(mode: str) -> None:
    """When anything fails, in the surgery or after it, classes, tensors and tables are as before."""
    model = lived(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4)))
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(wn.SelectionError):
        wn.apply_weight_norm(model, batch_norm=mode, include="nothing.here")
    with pytest.raises(wn.SelectionError, match="example inputs"):
        wn.apply_weight_norm(model, batch_norm=mode, inputs=torch.randn(2, 9))
    with pytest.raises(wn.SelectionError, match="batch_norm"):
        wn.apply_weight_norm(model, batch_norm="remove")
    model[4].running_mean[1] = float("inf")
    with pytest.raises(wn.NonFiniteWeightError, match=r"^4: "):
        wn.apply_weight_norm(model, batch_norm=mode)
    model[4].running_mean.copy_(before["4.running_mean"])
    after = model.state_dict()
    assert [type(m) for m in model.modules()] == classes
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_tiny_variances_and_half_precision() -> None:
    """A variance of 1e-12 is no error; 16-bit weights are rounded once from the exact product."""
    model = lived(nn.Sequential(nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4, eps=1e-8)))
    model[1].running_var.fill_(1e-12)
    x = torch.randn(2, 3, 6)
    expected = model(x)
    assert difference(wn.apply_weight_norm(copy.deepcopy(model), batch_norm="fold")(x), expected) < 1e-5
    half = copy.deepcopy(model).to(torch.bfloat16)
    model[1].running_var.fill_(2.0)
    half[1].to(torch.float32).running_var.fill_(2.0)
    exact = half[0].weight.double() * (half[1].weight.double() / (2.0 + 1e-8) ** 0.5).reshape(4, 1, 1)
    wn.fold_weight_norm(wn.apply_weight_norm(half, batch_norm="fold"))
    error = (half[0].weight.double() - exact).abs()
    assert bool((error <= exact.abs() * 2.0**-8 * 1.01).all())
    assert half[0].bias.dtype == torch.bfloat16


# The link between a mean-only BatchNorm and its layer ----------------------------------------------------


def saved_whole(model: nn.Module) -> Any:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_whole])
def test_copies_and_files_fold_too(carry: Callable[[nn.Module], Any]) -> None:
    """A copy or a file of a converted net folds on its own, the original staying converted."""
    model, x = wn.apply_weight_norm(lived(ResNet()), batch_norm="mean-only"), torch.randn(2, 3, 16, 16)
    expected, state = model(x), model.state_dict()
    assert not [k for k in state if "_producer" in k]
    other = carry(model)
    assert torch.equal(other(x), expected)
    assert difference(wn.fold_weight_norm(other)(x), expected) < 1e-5
    assert not norms(other)
    assert len(norms(model)) == 8
    assert torch.equal(model(x), expected)


def test_state_dict_round_trip() -> None:
    """The state dict of a converted net loads into another one converted alike."""
    model, x = wn.apply_weight_norm(lived(ResNet()), batch_norm="mean-only"), torch.randn(2, 3, 16, 16)
    other = wn.apply_weight_norm(lived(ResNet(), seed=1), batch_norm="mean-only")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_nets_built_with_mean_only_fold_by_tracing(caplog: Any) -> None:
    """Without the link the layer is found by tracing; where there is none the norm stays, with a warning."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), wn.MeanOnlyBatchNorm2d(4), nn.ReLU(), wn.MeanOnlyBatchNorm2d(4))
    wn.apply_weight_norm(model)
    for _ in range(3):
        model(torch.randn(2, 3, 6, 6) + 1)
    x = torch.randn(2, 3, 6, 6)
    expected = model.eval()(x)
    wn.fold_weight_norm(model)
    assert [type(m).__name__ for m in model] == ["Conv2d", "Identity", "ReLU", "MeanOnlyBatchNorm2d"]
    assert difference(model(x), expected) < 1e-5
    assert "3 is kept" in caplog.text


def test_a_norm_that_moved_to_another_net_leaves_its_old_layer_alone(caplog: Any) -> None:
    """What stood before a norm when it was converted may be no part of the net that is folded: the norm stays there."""
    first = wn.apply_weight_norm(lived(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), batch_norm="mean-only")
    second = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), first[1]).eval()
    x, y = torch.randn(6, 3), torch.randn(6, 5)
    expected = first(x), second(y)
    wn.fold_weight_norm(second)
    assert first[0].bias is None
    assert isinstance(second[2], wn.MeanOnlyBatchNorm1d)
    assert "2 is kept" in caplog.text
    assert torch.equal(first(x), expected[0])
    assert torch.equal(second(y), expected[1])


class Rearranged(nn.Module):
    """A layer and a norm, put together in one of several ways."""

    def __init__(self, layer: nn.Module, norm: nn.Module, how: str) -> None:
        super().__init__()
        self.layer, self.norm, self.how = layer, norm, how
        self.tail = nn.Sequential(norm, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        if self.how.startswith("untraceable") and float(x.detach().sum()) > 1e9:
            return x
        h = self.layer(x)
        if self.how == "relu":
            return self.norm(F.relu(h))
        if self.how == "used twice":
            return self.norm(h) + h.sum()
        if self.how == "never called":
            return h
        return self.tail(h) if self.how.endswith("in a block") else self.norm(h)


def linked() -> tuple[nn.Module, nn.Module]:
    """A layer and the mean-only norm that came of the BatchNorm behind it."""
    model = lived(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)))
    wn.apply_weight_norm(model, batch_norm="mean-only")
    return model[0], model[1]


@pytest.mark.parametrize("how", ["relu", "used twice", "never called"])
def test_a_norm_that_its_layer_does_not_feed_any_more_is_kept(how: str, caplog: Any) -> None:
    """Where the modules were put together anew, folding keeps the function and says that the norm stays."""
    layer, norm = linked()
    model, x = Rearranged(layer, norm, how).eval(), torch.randn(6, 4)
    expected = model(x)
    wn.fold_weight_norm(model)
    assert difference(model(x), expected) < 1e-6
    assert norms(model) == ["MeanOnlyBatchNorm1d"]
    assert "norm is kept" in caplog.text


def test_a_norm_that_another_layer_feeds_now_goes_into_that() -> None:
    """The data flow decides, not what a norm was converted from."""
    (layer, norm), other = linked(), nn.Linear(5, 5)
    model, x = nn.Sequential(layer, nn.ReLU(), other, norm).eval(), torch.randn(6, 4)
    expected, bias = model(x), layer.bias
    wn.fold_weight_norm(model)
    assert difference(model(x), expected) < 1e-5
    assert not norms(model)
    assert layer.bias is bias is None


@pytest.mark.parametrize("how", ["untraceable", "untraceable, in a block"])
def test_a_norm_in_a_forward_that_cannot_be_traced_goes_into_the_layer_it_came_from(how: str) -> None:
    """Where tracing shows nothing of a norm or of what comes into its block, the conversion is believed."""
    layer, norm = linked()
    model, x = Rearranged(layer, norm, how).eval(), torch.randn(6, 4)
    expected = model(x)
    wn.fold_weight_norm(model)
    assert difference(model(x), expected) < 1e-5
    assert not norms(model)


def test_a_layer_seen_to_feed_another_module_is_not_believed_to_feed_its_norm(caplog: Any) -> None:
    """Although the forward around both cannot be traced."""
    layer, norm = linked()
    model, x = Rearranged(nn.Sequential(layer, nn.ReLU()), norm, "untraceable").eval(), torch.randn(6, 4)
    expected = model(x)
    wn.fold_weight_norm(model)
    assert difference(model(x), expected) < 1e-6
    assert norms(model) == ["MeanOnlyBatchNorm1d"]
    assert "norm is kept" in caplog.text


# Files ---------------------------------------------------------------------------------------------------


def _run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0)


@pytest.mark.parametrize("mode", MODES)
def test_command_line_converts_and_names(mode: str, tmp_path: Path, capsys: Any) -> None:
    """convert --batch-norm works on whole modules and with --arch, and prints what it took and kept."""
    model = lived(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 6, 6)
    torch.save(model, tmp_path / "whole.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    out = tmp_path / "out.pt"
    assert _run(["convert", str(tmp_path / "whole.pt"), "-o", str(out), "--batch-norm", mode]) == 0
    printed = capsys.readouterr().out
    assert "1 BatchNorms taken, 1 kept" in printed
    assert "3: kept" in printed
    assert difference(wn.load_model(out)(x), model(x)) < 1e-5
    assert _run(["fold", str(out), "-o", str(tmp_path / "plain.pt")]) == 0
    assert difference(wn.load_model(tmp_path / "plain.pt")(x), model(x)) < 1e-5

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()

    report = wn.convert_checkpoint(tmp_path / "state.pt", tmp_path / "wn.pt", arch=build, batch_norm=mode)
    assert [s.name for s in report.batch_norm.steps] == ["1"]
    other = wn.apply_weight_norm(build(), batch_norm=mode)
    other.load_state_dict(torch.load(tmp_path / "wn.pt", weights_only=True))
    assert difference(other(x), model(x)) < 1e-5
    assert _run(["convert", str(tmp_path / "state.pt"), "--batch-norm", mode]) == 2
    assert "needs the model" in capsys.readouterr().err


@pytest.mark.parametrize("start", ["", "module."])
def test_files_without_counts_of_batches(start: str, tmp_path: Path) -> None:
    """State dicts from before `num_batches_tracked` fit their model, as torch's strict load has it."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()

    model, x = lived(build()), torch.randn(2, 3, 6, 6)
    state = {start + k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "state.pt")
    assert torch.equal(wn.load_model(tmp_path / "state.pt", arch=build).eval()(x), model(x))
    for mode in ("keep", *MODES):
        wn.convert_checkpoint(tmp_path / "state.pt", tmp_path / f"{mode}.pt", arch=build, batch_norm=mode)
        converted = torch.load(tmp_path / f"{mode}.pt", weights_only=True)
        other = wn.apply_weight_norm(build(), batch_norm=mode)
        other.load_state_dict({k.removeprefix(start): v for k, v in converted.items()})
        assert difference(other(x), model(x)) < 1e-5
    report = wn.fold_checkpoint(tmp_path / "keep.pt", tmp_path / "plain.pt", arch=build)
    assert [s.name for s in report.folded] == [f"{start}0.weight"]
    assert torch.load(tmp_path / "plain.pt", weights_only=True).keys() == state.keys()
    torch.save({k: v for k, v in state.items() if "running_mean" not in k}, tmp_path / "less.pt")
    with pytest.raises(wn.InputError, match="do not fit the model"):
        wn.load_model(tmp_path / "less.pt", arch=build)


def test_keep_is_the_default_and_logs_nothing(caplog: Any) -> None:
    """Nobody asked: every BatchNorm stays, without a word."""
    caplog.set_level(logging.WARNING)
    model = wn.apply_weight_norm(lived(ResNet()))
    assert len(norms(model)) == 8
    assert not caplog.records


class _Asking(nn.Module):
    """A block whose padding depends on the size of its input, as ports from TensorFlow have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2 == 0:
            x = nn.functional.pad(x, (1, 1, 1, 1))
        if x.shape[3] % 2 == 0:
            x = nn.functional.pad(x, (1, 0, 1, 0))
        return self.norm(self.conv(x)).relu()


def test_branches_in_many_blocks_are_followed_block_by_block() -> None:
    """A few branches in each of many blocks are too many ways through the net, but few through each block."""
    torch.manual_seed(0)
    model = nn.Sequential(*(_Asking(4) for _ in range(12))).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean)
    plan = wn.plan_batch_norm(model)
    assert len(plan.steps) == 12
    x = torch.randn(2, 4, 16, 17)
    with torch.no_grad():
        before = model(x)
        wn.apply_weight_norm(model, batch_norm="fold")
        after = model(x)
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
