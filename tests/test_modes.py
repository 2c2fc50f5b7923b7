"""Converted models under everything people run models under: compile, export, transforms, autocast, checkpointing."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import wnsurgery as wn

from nets import net, same_bits


def moved(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A converted net whose magnitudes no longer equal the norms, as after training."""
    model, x = net(name, dtype)
    wn.apply_weight_norm(model)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("original0"):
                p.mul_(torch.linspace(1.1, 1.7, p.numel(), dtype=p.dtype).reshape(p.shape))
    return model, x


NAMES = ["linear", "conv2d", "transposed2d-grouped", "attention-packed", "tied"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_compile_whole_graph(name: str, dtype: torch.dtype) -> None:
    """torch.compile(fullgraph=True) traces a converted net without a break, with eager's values and gradients."""
    model, x = moved(name, dtype)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(x)
    got = compiled(x)
    torch.testing.assert_close(got, expected)
    eager = torch.autograd.grad(expected.float().square().sum(), list(model.parameters()))
    traced = torch.autograd.grad(got.float().square().sum(), list(model.parameters()))
    tolerance = {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(a, b, **tolerance)  # type: ignore[arg-type]


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # inductor's own start-up
def test_inductor() -> None:
    """The compiled weight equals the eager one to rounding, training included."""
    model, x = moved("linear")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_export(name: str) -> None:
    """torch.export captures a converted net with the same values."""
    model, x = moved(name)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("name", [*NAMES, "lstm"])
def test_functional_call(name: str) -> None:
    """functional_call with the model's own parameters gives its outputs, with others theirs, and leaves no trace."""
    model, x = moved(name)
    expected = model(x)
    parameters = dict(model.named_parameters())
    assert same_bits(torch.func.functional_call(model, parameters, (x,)), expected)
    doubled = {n: p * 2 if n.endswith("original0") else p for n, p in parameters.items()}
    assert not torch.allclose(torch.func.functional_call(model, doubled, (x,)), expected)
    assert same_bits(model(x), expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward mode uses it
def test_vmap_over_an_ensemble() -> None:
    """vmap over stacked parameters equals the members one by one; grad, jacrev and jvp pass through."""
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        members.append(wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))))
    parameters, _ = torch.func.stack_module_state(members)  # type: ignore[arg-type]
    x = torch.randn(5, 3)

    def call(p: Any) -> Tensor:
        return torch.func.functional_call(members[0], p, (x,))

    together = torch.vmap(call)(parameters)
    torch.testing.assert_close(together, torch.stack([m(x) for m in members]))
    one = {n: p[0].detach() for n, p in parameters.items()}
    gradients = torch.func.grad(lambda p: call(p).square().sum())(one)
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients.values())
    torch.func.jacrev(call)(one)
    hessian = torch.func.hessian(lambda p: call(p).square().sum())(one)
    assert all(torch.isfinite(t).all() for row in hessian.values() for t in row.values())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own forward mode uses it
def test_forward_mode() -> None:
    """jvp of a converted layer agrees with finite differences."""
    layer = wn.apply_weight_norm(nn.Linear(3, 2).double())
    x, direction = torch.randn(4, 3).double(), {n: torch.randn_like(p) for n, p in layer.named_parameters()}
    parameters = {n: p.detach() for n, p in layer.named_parameters()}

    def call(p: Any) -> Tensor:
        return torch.func.functional_call(layer, p, (x,))

    _, tangent = torch.func.jvp(call, (parameters,), (direction,))
    step = 1e-6
    ahead = call({n: p + step * direction[n] for n, p in parameters.items()})
    behind = call({n: p - step * direction[n] for n, p in parameters.items()})
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["linear", "conv2d", "gru", "encoder-layer"])
def test_autocast(name: str) -> None:
    """Under autocast a converted net gives what its folded twin gives, bit for bit, and trains."""
    model, x = moved(name)
    twin = wn.fold_weight_norm(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(model(x), twin(x))
        loss = model(x).float().square().sum()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_gradient_checkpointing() -> None:
    """Recomputing the forward pass in backward gives the same gradients."""
    model, x = moved("conv2d")
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    again = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_modes(mode: Any) -> None:
    """no_grad and inference_mode give the bits of the folded twin, and training goes on afterwards."""
    for name in ("linear", "lstm", "encoder-layer"):
        model, x = moved(name)
        twin = wn.fold_weight_norm(copy.deepcopy(model))
        with mode():
            assert same_bits(model(x), twin(x))
        model(x).sum().backward()


def test_moving_dtype_and_device() -> None:
    """to(dtype) after converting keeps g and v finite and the function close; buffers and hooks follow."""
    model, x = moved("conv2d")
    expected = model(x)
    torch.testing.assert_close(model.double()(x.double()), expected.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.float()(x), expected)
    torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), expected, rtol=0.1, atol=0.1)


def test_parametrize_cached() -> None:
    """torch.nn.utils.parametrize.cached() works on converted modules."""
    model, x = moved("linear")
    with torch.nn.utils.parametrize.cached():
        assert model[0].weight is model[0].weight  # type: ignore[index]
        cached = model(x)
    assert same_bits(cached, model(x))
