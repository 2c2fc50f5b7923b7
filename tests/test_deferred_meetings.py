"""Deferred mode where something else happens between a forward pass and the optimizer's step: writes, switches, other
owners, other threads."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import wnsurgery as wn
from wnsurgery import fused
from wnsurgery.errors import ModeError, PairError

MODES: list[Any] = ["parametrized", "deferred"]
LAID = (torch.channels_last, torch.contiguous_format)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.01),
}


def perceptron(mode: Any, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    return wn.apply_weight_norm(net, mode=mode)


def flat(parameters: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters])


def decay(net: nn.Module, _: Tensor) -> None:
    for p in net.parameters():
        p.data.mul_(0.95)


def average(net: nn.Module, x: Tensor) -> None:
    """An average's values for an evaluation, in the middle of a step."""
    kept = [p.data.clone() for p in net.parameters()]
    for p in net.parameters():
        p.data.copy_(p.data * 0.8)
    with torch.no_grad():
        net(x)
    for p, value in zip(net.parameters(), kept, strict=True):
        p.data.copy_(value)
    net(2 * x).square().mean().backward()


def exchange(net: nn.Module, _: Tensor) -> None:
    for p in net.parameters():
        p.data = p.data * 0.9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("write", [decay, average, exchange])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_writes_without_a_trace_while_a_gradient_waits(write: Any, kind: str, dtype: torch.dtype) -> None:
    found = []
    for mode in MODES:
        net = perceptron(mode, dtype)
        optimizer, x = OPTIMIZERS[kind](net.parameters()), torch.randn(7, 5).to(dtype)
        for _ in range(10):
            net(x).square().mean().backward()
            write(net, x)
            optimizer.step()
            optimizer.zero_grad()
        found.append(flat(net.parameters()))
    loose = 1e-12 if dtype == torch.float64 else 1e-4 if kind == "adam" else 1e-5
    torch.testing.assert_close(*found, rtol=loose, atol=loose)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_a_switch_between_forward_and_backward(again: bool, moved: bool) -> None:
    """Gradients reach g and v, those of what they were, whatever the mode is by then."""
    found = []
    for mode in MODES:
        net = perceptron(mode)
        loss = net(torch.linspace(-1, 1, 10, dtype=torch.float64).view(2, 5)).square().sum()
        if mode == "deferred":
            wn.set_weight_norm_mode(net, "parametrized")
        if mode == "deferred" and again:
            wn.set_weight_norm_mode(net, "deferred")
        if moved and mode == "deferred":
            for p in net.parameters():
                p.data.mul_(2)
        loss.backward()
        found.append([p.grad for p in net.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_switch_and_then_second_derivatives() -> None:
    net = perceptron("deferred")
    loss = net(torch.ones(2, 5, dtype=torch.float64)).square().sum()
    wn.set_weight_norm_mode(net, "parametrized")
    with pytest.raises(ModeError, match="before the forward pass"):
        loss.backward(create_graph=True)


def test_a_switch_keeps_no_leaf() -> None:
    net = perceptron("deferred")
    net(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
    leaf = weakref.ref(net[0].weight)
    gc.disable()
    try:
        wn.set_weight_norm_mode(net, "parametrized")
        assert leaf() is None
    finally:
        gc.enable()


@pytest.fixture
def swapping() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def test_loading_by_swaps(swapping: None) -> None:
    net = wn.apply_weight_norm(nn.Linear(5, 5), mode="deferred")
    net.load_state_dict(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(2):
        net(torch.ones(2, 5)).square().sum().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        assert all(p.grad is not None for p in net.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert not any(map(torch.equal, before, net.parameters()))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["whole", "each", "one left", "one left and back"])
def test_a_tied_weight_whose_owners_are_switched_apart(how: str) -> None:
    """It has one mode, that which one of its owners was given last."""
    found = []
    for mode in MODES:
        torch.manual_seed(0)
        net: Any = wn.apply_weight_norm(Tied().double())
        for part in [net.embed, net.head] if how == "each" else [net]:
            wn.set_weight_norm_mode(part, mode)
        if how.startswith("one left"):
            wn.set_weight_norm_mode(net.head, "parametrized")
        if how.endswith("back"):
            wn.set_weight_norm_mode(net, mode)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(3):
            net(torch.tensor([1, 2, 2])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        deferred = mode == "deferred" and how != "one left"
        assert [net.embed.weight.is_leaf, net.head.weight is net.embed.weight] == [deferred, deferred]
        found.append(flat(net.parameters()))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("before", ["nothing", "training", "evaluation", "held"])
@pytest.mark.parametrize(("through", "asked"), [("embed", "head"), ("head", "embed"), ("head", "head")])
@pytest.mark.parametrize("what", ["weight", "output", "state", "copy", "part", "fold"])
def test_one_owner_of_a_tied_weight_is_deferred(before: str, through: str, asked: str, what: str) -> None:
    """The others, of which the call was not told, follow; a write through any owner is there for all."""
    net: Any = wn.apply_weight_norm(Tied())
    held = net.head.weight if before == "held" else None
    for _ in range(3 if before in ("training", "evaluation") else 0):
        with torch.set_grad_enabled(before == "training"):
            net(torch.tensor([1, 2]))
    wn.set_weight_norm_mode(net.embed, "deferred")
    assert held is None or held.shape == (6, 4)
    ones = torch.ones(6, 4)
    nn.init.ones_(getattr(net, through).weight)
    owner = getattr(net, asked)
    if what == "weight":
        found = owner.weight
    elif what == "output":
        found = owner(torch.arange(6) if asked == "embed" else torch.eye(4))
        found = found if asked == "embed" else found.T
    elif what == "state":
        found = owner.state_dict()["parametrizations.weight.original1"]
    elif what == "copy":
        found = copy.deepcopy(owner).weight
    elif what == "part":
        found = owner.parametrizations.weight.original1
    else:
        found = wn.fold_weight_norm(owner).weight
    assert torch.equal(found, ones)


def test_one_owner_of_a_tied_weight_leaves_deferred_mode() -> None:
    """So do the others, whoever came to it how, and what waits on the leaf is passed on."""
    net: Any = wn.apply_weight_norm(Tied())
    wn.set_weight_norm_mode(net.embed, "deferred")
    net(torch.tensor([1, 2])).square().sum().backward()
    wn.set_weight_norm_mode(net.head, "parametrized")
    g, v = net.embed.parametrizations.weight.original0, net.embed.parametrizations.weight.original1
    assert {type(g), type(v)} == {nn.Parameter}
    assert not net.embed.weight.is_leaf
    found = g.grad.clone(), v.grad.clone()
    net.zero_grad()
    net(torch.tensor([1, 2])).square().sum().backward()
    torch.testing.assert_close(found, (g.grad, v.grad))


@pytest.mark.parametrize("then", ["assign", "write g"])
def test_a_new_weight_while_a_gradient_waits_on_a_written_one(then: str) -> None:
    """The gradient is that at the pair which the pass ran on."""
    found = []
    for mode in MODES:
        torch.manual_seed(0)
        layer: Any = wn.apply_weight_norm(nn.Linear(4, 3, dtype=torch.float64), mode=mode)
        layer(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
        nn.init.constant_(layer.weight, 0.5)
        if then == "assign":
            layer.weight = torch.randn(3, 4, dtype=torch.float64)
        else:
            with torch.no_grad():
                dict(layer.named_parameters())["parametrizations.weight.original0"].fill_(2.0)
        pair = layer.parametrizations.weight
        found.append([pair.original0.grad.clone(), pair.original1.grad.clone()])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_parameters_made_of_a_half(mode: Any) -> None:
    """They are ordinary Parameters with its memory, as those made of any Parameter."""
    layer: Any = wn.apply_weight_norm(nn.Linear(4, 3), mode=mode)
    for half in (layer.parametrizations.weight.original0, layer.parametrizations.weight.original1):
        for made in (nn.Parameter(half), type(half)(half.detach().clone(), requires_grad=False)):
            assert type(made) is nn.Parameter
            assert made.grad is None
            assert torch.equal(made, half)
        assert nn.Parameter(half).data_ptr() == half.data_ptr()
        assert not nn.Parameter(half, requires_grad=False).requires_grad


@pytest.mark.parametrize("which", ["both", "g", "v"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("load", [False, True])
def test_parameters_that_were_swapped_are_trained(which: str, tied: bool, load: bool) -> None:
    """`torch.utils.swap_tensors` takes away what a Parameter of deferred mode knew."""
    found = []
    for mode in MODES:
        torch.manual_seed(0)
        net: Any = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
        if tied:
            net[2].weight = net[0].weight
        wn.apply_weight_norm(net, mode=mode)
        for name, parameter in list(net.named_parameters()):
            if which == "both" or name.endswith("0" if which == "g" else "1"):
                torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * 1.2))
        if load:
            net.load_state_dict({k: 1.1 * v for k, v in net.state_dict().items()})
        optimizer = torch.optim.Adam(net.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        found.append(flat(net.parameters()))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("what", ["a step", "all"])
def test_a_compiled_optimizer_step(kind: Any, what: str) -> None:
    torch.compiler.reset()
    found = []
    for mode in MODES:  # both compiled: Adam counts its steps in float32 there
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        optimizer = kind(net.parameters(), 0.05)
        wn.apply_weight_norm(net, optimizer=optimizer, mode=mode)

        def step(net: Any = net, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            net(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
            optimizer.step()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if what == "all":
                step = torch.compile(step, backend="eager")
            else:
                optimizer.step = torch.compile(optimizer.step, backend="eager")
            for _ in range(3):
                step()
        found.append(flat(net.parameters()))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_gradients_are_no_views() -> None:
    """Which torch's compiler does not take for gradients once their Parameter has another type."""
    net = wn.apply_weight_norm(nn.ConvTranspose1d(6, 4, 4).double(), mode="deferred")
    net(torch.randn(2, 6, 8, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None and p.grad._base is None for p in net.parameters())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["load", "one half"])
def test_a_graph_gives_its_gradient_to_the_pair_it_was_made_with(mode: Any, how: str) -> None:
    """Also when another pair has taken that one's place since, and with what had gathered before."""
    torch.manual_seed(0)
    layer: Any = wn.apply_weight_norm(nn.Linear(4, 3), mode=mode)
    x, pair = torch.randn(2, 4), layer.parametrizations.weight
    old: Any = [pair.original0, pair.original1]
    layer(x).square().sum().backward()
    alone = [half.grad.clone() for half in old]
    loss = layer(x).square().sum()
    if how == "load":
        layer.load_state_dict({k: 2 * v.detach() for k, v in layer.state_dict().items()}, assign=True)
    else:
        pair.original0 = nn.Parameter(torch.ones(3, 1))
    layer(x)
    loss.backward()
    for half, once in zip(old, alone, strict=True):
        torch.testing.assert_close(half.grad, 2 * once)
    assert pair.original0 is not old[0] and pair.original0.grad is None
    assert (pair.original1 is old[1]) is (how == "one half")
    pair.original1.grad = None
    layer(x).square().sum().backward()
    found = [pair.original0.grad, pair.original1.grad]
    g, v = (half.detach().clone().requires_grad_() for half in (pair.original0, pair.original1))
    w = g * v / v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found, torch.autograd.grad((x @ w.T + layer.bias).square().sum(), [g, v]))


@pytest.mark.parametrize("mode", MODES)
def test_assigning_a_weight_of_a_recurrent_layer(mode: Any) -> None:
    torch.manual_seed(0)
    net: Any = wn.apply_weight_norm(nn.LSTM(2, 3, batch_first=True), mode=mode)
    x = torch.ones(2, 4, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(x)[0].sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    net.weight_hh_l0 = torch.ones(12, 3) * 0.1
    net(x)[0].square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    optimizer.step()
    net.load_state_dict({k: 2 * v if "original0" in k else v for k, v in net.state_dict().items()})
    assert torch.equal(net(x)[0], copy.deepcopy(net)(x)[0])


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(jobs: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_several_nets_trained_in_several_threads(hasty_threads: None) -> None:
    """Each step is taken once."""
    steps, x = 400, torch.ones(1, 1)
    nets = [wn.apply_weight_norm(nn.Linear(1, 1, bias=False), mode="deferred") for _ in range(3)]
    sizes: list[Any] = [net.parametrizations["weight"]._parameters["original0"] for net in nets]  # type: ignore[index]
    for g in sizes:
        g.data.zero_()

    def job(net: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(net.parameters(), 1.0)

        def train() -> None:
            for _ in range(steps):
                net(x).sum().backward()
                optimizer.step()
                optimizer.zero_grad()

        return train

    together([job(net) for net in nets])
    assert [abs(g.item()) for g in sizes] == [steps] * 3


def test_gradients_read_in_several_threads(hasty_threads: None) -> None:
    net = wn.apply_weight_norm(nn.Sequential(*[nn.Linear(30, 30) for _ in range(10)]), mode="deferred")
    missing: list[int] = []
    for _ in range(30):
        net(torch.randn(4, 30)).sum().backward()
        barrier = threading.Barrier(3)

        def look(barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            missing.append(sum(p.grad is None for p in net.parameters()))

        together([look] * 3)
        net.zero_grad()
    assert not any(missing)


def test_a_magnitude_of_two_weights_of_which_one_is_used() -> None:
    moved = []
    for mode in MODES:
        torch.manual_seed(0)
        net: Any = wn.apply_weight_norm(nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)]))
        g = net[0].parametrizations.weight.original0
        net[1].parametrizations.weight.original0 = g
        wn.set_weight_norm_mode(net, mode)
        net[0](torch.ones(2, 5)).square().sum().backward()
        torch.optim.SGD([g], 0.1).step()
        moved.append(g.detach().clone())
    torch.testing.assert_close(*moved)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_between_forward_and_backward_of_another_layer(kind: str) -> None:
    found = []
    for mode in MODES:
        heads = nn.ModuleList([perceptron(mode) for _ in range(2)])
        optimizer, x = OPTIMIZERS[kind](heads.parameters()), torch.ones(7, 5, dtype=torch.float64)
        losses = [head(x).square().mean() for head in heads]
        for loss in losses:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(flat(heads.parameters()))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_a_step_that_leaves_no_trace_where_one_would_look() -> None:
    """Fused optimizers count no version, and of a large table most rows stay: whoever had a gradient is made anew."""
    table: Any = wn.apply_weight_norm(nn.Embedding(5000, 64), include=nn.Embedding, mode="deferred")
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1, fused=True)
    table(torch.arange(3)).square().sum().backward()
    optimizer.step()
    g, v = table.parametrizations.weight.original0.detach(), table.parametrizations.weight.original1.detach()
    torch.testing.assert_close(table.weight.detach(), g * v / v.norm(dim=1, keepdim=True))


def test_a_weight_written_over_tells_nothing_of_the_pair_before() -> None:
    """A gradient waits, g moves, and the weight is written over: dL/dg is that along the v there is."""
    layer: Any = wn.apply_weight_norm(nn.Linear(5, 3, bias=False).double(), mode="deferred")
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    up = torch.arange(15.0, dtype=torch.float64).view(3, 5)
    w = layer.weight
    (w * up).sum().backward()
    with torch.no_grad():
        g.mul_(2)
        w.fill_(1.0)
    torch.testing.assert_close(g.grad, (up * v).sum(1, keepdim=True) / v.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("move", [lambda net: net.cpu(), lambda net: net.to("cpu"), lambda net: net.double()])
def test_a_move_to_where_it_is_between_forward_and_backward(move: Callable[[nn.Module], Any]) -> None:
    net = perceptron("deferred")
    loss = net(torch.ones(2, 5, dtype=torch.float64)).sum()
    move(net)
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_another_type_through_data(dtype: torch.dtype) -> None:
    found = []
    for mode in MODES:
        net = perceptron(mode)
        for p in net.parameters():
            p.data = p.data.to(dtype)
        net(torch.ones(2, 5, dtype=dtype)).sum().backward()
        found.append([p.grad for p in net.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(6, 1), (1, 1), (3,), (3, 5)], ids=str)
def test_a_magnitude_of_another_shape_is_refused(shape: tuple[int, ...], mode: Any) -> None:
    """Put under g through `.data`, whatever broadcasting would make of it; also where the mode is entered with it."""
    layer: Any = wn.apply_weight_norm(nn.Linear(5, 3), mode=mode)
    layer(torch.ones(2, 5)).sum().backward()
    layer.parametrizations.weight.original0.data = torch.ones(shape)
    for _ in range(2):
        with pytest.raises(PairError, match="magnitude of shape"):
            layer(torch.ones(2, 5))
        wn.set_weight_norm_mode(layer, "parametrized")
        wn.set_weight_norm_mode(layer, mode)


def weight_by_numpy(layer: Any) -> Tensor:
    """g v / ||v|| with axis 0 kept, in float64."""
    g, v = (p.detach().double().numpy() for p in layer.parametrizations.weight._parameters.values())
    return torch.from_numpy(g * v / np.sqrt((v * v).sum(axis=tuple(range(1, v.ndim)), keepdims=True))).float()


def test_other_memory_under_the_direction_again_and_again() -> None:
    """A weight made by the compiled kernels is made of the memory that is there, not of what they were told once."""
    fused.start()
    layer: Any = wn.apply_weight_norm(nn.Linear(5, 3), mode="deferred")
    kept = []  # so that none of the memory is given out again
    for step in range(3):
        kept.append(layer.parametrizations.weight.original1.data)
        layer.parametrizations.weight.original1.data = torch.linspace(-1, step, 15).view(3, 5)
        torch.testing.assert_close(layer.weight.detach(), weight_by_numpy(layer))


@pytest.mark.parametrize("channels", [(4, 6), (64, 128)], ids=["small", "large"])
@pytest.mark.parametrize("formats", [LAID, LAID[::-1]], ids=str)
def test_a_direction_laid_out_in_another_way(channels: tuple[int, int], formats: Any) -> None:
    """Through `.data`: the weight, in memory laid out as v was, has each element in its place."""
    fused.start()
    net = nn.Sequential(nn.Conv2d(*channels, 3), nn.Conv2d(4, 4, 3)).to(memory_format=formats[0])
    layer: Any = wn.apply_weight_norm(net, mode="deferred")[0]
    v = layer.parametrizations.weight.original1
    v.data = torch.randn(v.shape).contiguous(memory_format=formats[1])
    torch.testing.assert_close(layer.weight.detach(), weight_by_numpy(layer))


def test_a_loop_inside_autocast_trains() -> None:
    """The casts that autocast keeps of leaves are those of weights as they are."""
    losses = []
    for around in (torch.autocast("cpu", torch.bfloat16), nullcontext()):
        net = perceptron("deferred", torch.float32)
        optimizer, x, found = torch.optim.SGD(net.parameters(), 0.05), torch.ones(2, 5), []
        with around:
            for _ in range(4):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = (net(x) - 1).square().mean()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        losses.append(found)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("how", ["folded", "replaced"])
def test_a_weight_that_is_gone_leaves_no_memory(how: str) -> None:
    net = perceptron("deferred")
    optimizer, x = torch.optim.SGD(net.parameters(), 0.1), torch.ones(2, 5, dtype=torch.float64)
    for _ in range(2):
        net(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    v = weakref.ref(net[0].parametrizations.weight.original1)
    if how == "folded":
        wn.fold_weight_norm(net[0], optimizer=optimizer)
    else:
        net[0], optimizer = nn.Identity(), torch.optim.SGD(net[2].parameters(), 0.1)
        x = torch.ones(2, 8, dtype=torch.float64)
    net(x).sum().backward()
    optimizer.step()
    gc.collect()
    assert v() is None


def test_owners_that_are_parted_by_the_meta_device_have_weights_of_their_own() -> None:
    """torch makes a Parameter for each of the owners there, of plain modules, too."""
    model = nn.ModuleDict({"table": nn.Embedding(6, 6), "head": nn.Linear(6, 6, bias=False)})
    model["head"].weight = model["table"].weight  # type: ignore[union-attr]
    wn.apply_weight_norm(model, include="*", mode="deferred")
    state = {name: x.clone() for name, x in model.state_dict().items()}
    before = model["head"].weight.detach().clone()  # type: ignore[union-attr]
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    for layer, other in (("table", 1.0), ("head", 1.5)):
        with torch.no_grad():
            model[layer].weight.mul_(1.5)  # type: ignore[union-attr, operator]
        model.state_dict()
        assert torch.allclose(model[layer].weight, 1.5 * before)  # type: ignore[union-attr, arg-type]
        beside = model["head" if layer == "table" else "table"].weight  # type: ignore[union-attr]
        assert torch.allclose(beside, other * before)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model["head"](model["table"](torch.tensor([1, 2]))).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    then = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, was in zip(model.parameters(), then, strict=True):
        torch.testing.assert_close(p.detach(), was - 0.1 * p.grad)  # type: ignore[operator]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_optimizers_find_gradients_laid_out_as_the_pair(kind: Any, dtype: torch.dtype) -> None:
    """Which go through memory, whatever the strides: of a weight in groups with its axes exchanged, too."""
    torch.manual_seed(0)
    base = nn.ConvTranspose1d(8, 4, 3, groups=2).to(dtype)
    base.weight.data = base.weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    x, seen = torch.randn(4, 8, 9, dtype=dtype), []
    for mode in ("parametrized", "deferred"):
        model = wn.apply_weight_norm(copy.deepcopy(base), mode=mode)  # type: ignore[arg-type]
        optimizer = kind(model.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        v = model.parametrizations.weight.original1  # type: ignore[union-attr, index]
        assert v.grad.stride() == v.stride()
        seen.append(v.detach().clone())
    torch.testing.assert_close(*seen)
