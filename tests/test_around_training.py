"""What loops do around forward and backward passes: freezing, writing, keeping, starting anew. Ours follow the plain
arithmetic of g * v / ||v|| in both modes."""

from __future__ import annotations

import copy
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrizations, vector_to_parameters

import wnsurgery as wn
from wnsurgery.kept import Rooms

MODES = ("parametrized", "deferred")
Net = Any


pytestmark = pytest.mark.usefixtures("one_thread")


def plain(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)


def torchs(model: nn.Module) -> nn.Module:
    """Under torch's own weight norm: an oracle that shares no code with ours."""
    for layer in model:  # type: ignore[attr-defined]
        if isinstance(layer, nn.Linear):
            parametrizations.weight_norm(layer)
    return model


def inputs(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pair(model: Net, layer: int = 0) -> tuple[nn.Parameter, nn.Parameter]:
    entry = model[layer].parametrizations.weight
    return entry.original0, entry.original1


def freeze_before_the_step(model: Net, optimizer: torch.optim.Optimizer) -> None:
    model(inputs()).square().mean().backward()
    model.requires_grad_(False)
    model(inputs(1).requires_grad_()).sum().backward()
    optimizer.step()
    model.requires_grad_(True)


def step_while_frozen(model: Net, optimizer: torch.optim.Optimizer) -> None:
    model(inputs()).square().mean().backward()
    model.requires_grad_(False)
    optimizer.step()
    model.requires_grad_(True)


def frozen_graph_beside(model: Net, optimizer: torch.optim.Optimizer) -> None:
    loss = model(inputs()).square().mean()
    model.requires_grad_(False)
    loss = loss + model(inputs(1).requires_grad_()).sum()
    model.requires_grad_(True)
    loss.backward()
    optimizer.step()


def frozen_during_backward(model: Net, optimizer: torch.optim.Optimizer) -> None:
    loss = model(inputs().requires_grad_()).square().mean()
    model.requires_grad_(False)
    loss.backward()
    model.requires_grad_(True)
    optimizer.step()


def magnitude_free_at_the_step(model: Net, optimizer: torch.optim.Optimizer) -> None:
    g, _ = pair(model)
    g.requires_grad = False
    model(inputs()).square().mean().backward()
    g.requires_grad = True
    optimizer.step()


LOOPS = (
    freeze_before_the_step,
    step_while_frozen,
    frozen_graph_beside,
    frozen_during_backward,
    magnitude_free_at_the_step,
)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("mode", MODES)
def test_what_is_frozen_when(mode: Any, loop: Callable[[Net, torch.optim.Optimizer], None]) -> None:
    """Who gets a gradient is decided by the flags at the forward and at the backward pass, not at the step."""
    ours, theirs = wn.apply_weight_norm(plain(), mode=mode), torchs(plain())
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loop(model, optimizer)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
        assert (mine.grad is None) == (other.grad is None)


@pytest.mark.parametrize("kind", ["float32", "float64", "log", "zero g"])
@pytest.mark.parametrize("mode", MODES)
def test_a_pair_written_before_its_gradient_is_looked_at(mode: Any, kind: str) -> None:
    """Sharpness-aware steps: the gradient is that at the pair the pass used, though it is written before anybody
    looks."""
    dtype = torch.float64 if kind == "float64" else torch.float32
    options: dict[str, Any] = {"magnitude": "log"} if kind == "log" else {}
    ours, reference = (wn.apply_weight_norm(plain(dtype), **options) for _ in range(2))
    if kind == "zero g":
        for model in (ours, reference):
            pair(model)[0].data[3] = 0.0
    wn.set_weight_norm_mode(ours, mode)
    halves, others = list(ours.parameters()), list(reference.parameters())
    for model in (ours, reference):
        model(inputs(dtype=dtype)).square().mean().backward()
    wanted = [p.grad for p in others]
    with torch.no_grad():
        for p in halves:
            p.mul_(0.5).add_(0.1)
    rows = torch.arange(16) != 3 if kind == "zero g" else torch.ones(16, dtype=torch.bool)
    for p, grad in zip(halves, wanted, strict=True):
        assert p.grad is not None and grad is not None
        some = rows if len(p) == 16 else slice(None)
        torch.testing.assert_close(p.grad[some], grad[some], rtol=1e-5, atol=1e-7)


def test_a_pair_written_between_two_passes() -> None:
    """In deferred mode each of two backward passes counts at its own pair."""
    ours, theirs = wn.apply_weight_norm(plain(), mode="deferred"), torchs(plain())
    for model in (ours, theirs):
        model(inputs()).square().mean().backward()
        with torch.no_grad():
            for half in pair(model):
                half.mul_(1.5)
        model(inputs(1)).square().mean().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("by", ["hand", "SGD", "Adam"])
def test_a_graph_from_before_a_change_raises(mode: Any, by: str) -> None:
    """As in a plain net, a graph whose weights were written since is an error."""
    model = wn.apply_weight_norm(plain(), mode=mode)
    model(inputs()).sum().backward()
    x = inputs().requires_grad_()
    stale = model(x)
    if by == "hand":
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3)
    else:
        getattr(torch.optim, by)(model.parameters(), lr=0.1).step()
    fresh = model(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (stale * fresh).sum().backward()


@pytest.mark.parametrize("width", [16, 1024])  # the memory of the larger goes back to the system
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_memory_under_g_and_v(width: int, dtype: torch.dtype) -> None:
    """`vector_to_parameters` and its like put new memory under every parameter; deferred weights are kept as before."""
    model = wn.apply_weight_norm(nn.Sequential(nn.Linear(width, width, dtype=dtype)), mode="deferred")
    x = torch.ones(1, width, dtype=dtype)
    model(x).sum().backward()
    vector_to_parameters(parameters_to_vector(model.parameters()) * 1.01, model.parameters())
    (model(x).sum() + model(2 * x).square().sum()).backward()
    g, v = pair(model)
    assert torch.equal(model[0].weight, wn.compose(g.detach().clone(), v.detach().clone()))
    version = model[0].weight._version
    model(x)
    assert model[0].weight._version == version  # nothing is written anew


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gradients", [False, True])
def test_a_write_into_a_weight_still_held_comes_before_the_step(mode: Any, gradients: bool) -> None:
    """What is written into `module.weight` reaches g and v before an optimizer moves them."""
    model: Net = wn.apply_weight_norm(nn.Sequential(nn.Linear(4, 3)), mode=mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 4)).sum().backward()
        with torch.set_grad_enabled(gradients):
            held = model[0].weight
        with torch.no_grad():
            held.fill_(0.5)
        optimizer.step()
        torch.testing.assert_close(model[0].weight, torch.full((3, 4), 0.5), rtol=0, atol=1e-4)
        with torch.no_grad():
            model[0].weight.fill_(0.25)


def test_memory_is_not_lent_while_its_storage_is_held() -> None:
    """Neither where somebody holds the storage itself, nor where another process can see it; nor when it was freed."""
    rooms, like = Rooms(), torch.zeros(1 << 16)
    first: Any = rooms.take("w", like)
    start, storage = first.data_ptr(), first.untyped_storage()
    del first
    assert rooms.take("w", like) is None
    del storage
    again: Any = rooms.take("w", like)
    assert again.data_ptr() == start
    again.share_memory_()
    shared = again.data_ptr()
    del again
    third: Any = rooms.take("w", like)
    assert third.data_ptr() != shared
    third.untyped_storage().resize_(0)
    del third
    fourth: Any = rooms.take("w", like)
    assert fourth.untyped_storage().nbytes() == 4 << 16


def test_a_gradient_that_was_freed() -> None:
    """`storage.resize_(0)` on a gradient, as sharding libraries do, leaves the next steps alone."""
    model = wn.apply_weight_norm(nn.Sequential(nn.Linear(1024, 1024)))
    _, v = pair(model)
    for _ in range(4):
        model.zero_grad()
        model(torch.ones(8, 1024)).square().mean().backward()
        assert v.grad is not None and torch.isfinite(v.grad).all()
        v.grad.untyped_storage().resize_(0)


@pytest.mark.parametrize(
    "make", [lambda: nn.ConvTranspose1d(4, 8, 3), lambda: nn.Linear(300, 300), lambda: nn.Conv1d(1100, 1000, 1)]
)
def test_a_batch_of_gradients(make: Callable[[], Net]) -> None:
    """`is_grads_batched=True` gives each row what a pass of its own would, for any kept axis and size."""
    torch.manual_seed(0)
    model = wn.apply_weight_norm(make())
    width = 4 if isinstance(model, nn.ConvTranspose1d) else model.weight.shape[1]
    shape = (2, width) if isinstance(model, nn.Linear) else (2, width, 5)
    halves = list(model.parameters())
    y = model(torch.randn(shape)).flatten()[:3]
    together = torch.autograd.grad(y, halves, torch.eye(3), is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for many, one in zip(together, torch.autograd.grad(y[i], halves, retain_graph=True), strict=True):
            torch.testing.assert_close(many[i], one, rtol=1e-4, atol=1e-6)


FIRST = """
import torch, wnsurgery as wn
from functools import partial
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
torch.set_num_threads(1)
keep = lambda ctx, op, *a, **k: (
    CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE)
options = {} if %r == "all" else {"context_fn": partial(create_selective_checkpoint_contexts, keep)}
torch.manual_seed(0)
nets = [nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8)) for _ in range(2)]
nets[1].load_state_dict(nets[0].state_dict())
for net in nets:
    wn.apply_weight_norm(net)
for _ in range(3):
    x = torch.randn(4, 16)
    checkpoint(nets[0], x, use_reentrant=False, **options).square().mean().backward()
for p in nets[0].parameters():
    assert p.grad is not None
torch.manual_seed(1)
x = torch.randn(4, 16)
for net in nets:
    net.zero_grad()
checkpoint(nets[0], x, use_reentrant=False, **options).square().mean().backward()
nets[1](x).square().mean().backward()
for p, q in zip(nets[0].parameters(), nets[1].parameters()):
    torch.testing.assert_close(p.grad, q.grad)
"""


@pytest.mark.parametrize("what", ["all", "selected"])
def test_checkpointing_from_the_first_pass_of_a_process(what: str) -> None:
    """The recomputed pass saves what the first one did, though kernels were loaded in between."""
    done = subprocess.run([sys.executable, "-c", FIRST % what], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_evaluation_between_steps_inside_one_autocast_leaves_no_casts() -> None:
    """Autocast holds the cast of a parameter until its context ends; kept weights that come and go do not pile up."""
    model = wn.apply_weight_norm(nn.Sequential(nn.Linear(2048, 2048)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, peaks = torch.ones(2, 2048), []
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(24):
            optimizer.zero_grad()
            model(x).float().square().mean().backward()
            optimizer.step()
            with torch.no_grad():
                out = model(x)
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        assert torch.equal(out, copy.deepcopy(model)(x))
    assert peaks[-1] - peaks[3] < 80_000  # in KiB: a cast takes 8 MiB, and there have been twenty
