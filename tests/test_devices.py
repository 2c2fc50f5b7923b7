"""The promises on every kind of device at hand: the CPU always, a GPU where there is one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import wnsurgery as wn

from nets import net, same_bits

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
on_devices = pytest.mark.parametrize("device", DEVICES)
with_types = pytest.mark.parametrize("dtype", DTYPES, ids=str)
named = pytest.mark.parametrize(
    "name", ["linear", "conv2d", "transposed2d-grouped", "attention-packed", "tied", "lstm"]
)


@pytest.fixture(autouse=True)
def _plain_float32() -> Any:
    """No TF32: these tests compare bits and small differences."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What the forward uses for every weight of the plain net."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        table = module._modules.get("parametrizations")
        for name in [*module._parameters, *(table._modules if table is not None else ())]:
            if isinstance(getattr(module, name), Tensor) and ".parametrizations" not in f".{prefix}":
                found[f"{prefix}.{name}"] = getattr(module, name).detach().cpu()
    return found


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def train(model: nn.Module, x: Tensor, count: int = 3, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        with torch.autocast(x.device.type, enabled="dtype" in options, **options):
            y = model(x)
            loss = (y[0] if isinstance(y, tuple) else y).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@on_devices
@with_types
@named
def test_converting_changes_no_bit(name: str, dtype: torch.dtype, device: str) -> None:
    """Converted on the device, or on the CPU and moved there, each weight has the plain net's bits, in every mode."""
    model, _ = net(name)
    model = model.to(dtype)
    plain = weights(model)
    for converted in (
        wn.apply_weight_norm(copy.deepcopy(model).to(device)),
        wn.apply_weight_norm(copy.deepcopy(model)).to(device),
        wn.apply_weight_norm(copy.deepcopy(model).to(device), mode="deferred"),
    ):
        assert equal(weights(converted), plain)
        with torch.no_grad():
            assert equal(weights(converted), plain)
        assert equal(weights(wn.fold_weight_norm(converted)), plain)


@on_devices
@with_types
def test_folding_a_trained_net_changes_no_bit(dtype: torch.dtype, device: str) -> None:
    """After training steps the folded weights have the bits of those in use, within 1.5 ulp of the exact ones."""
    model, x = net("conv2d")
    model = wn.apply_weight_norm(model.to(device, dtype))
    train(model, x.to(device, dtype))
    used = weights(model)
    for module in model.modules():
        if hasattr(module, "parametrizations"):
            pair = module.parametrizations.weight  # type: ignore[union-attr]
            g, v = pair.original0.detach().double(), pair.original1.detach().double()
            exact = g * (v / v.square().sum(tuple(range(1, v.ndim)), keepdim=True).sqrt())
            size = exact.abs().to(dtype)
            unit = torch.nextafter(size, torch.full_like(size, torch.inf)).double() - size.double()
            assert float(((module.weight.detach().double() - exact).abs() / unit).max()) <= 1.5  # type: ignore[operator]
    assert equal(weights(wn.fold_weight_norm(model)), used)


@on_devices
@pytest.mark.parametrize("mode", ["parametrized", "deferred"])
def test_training_as_on_the_cpu(mode: Any, device: str) -> None:
    """Losses and gradients are those of the CPU in float64, to float32's rounding."""
    model, x = net("branches")
    model.eval()  # no dropout
    exact = wn.apply_weight_norm(copy.deepcopy(model).double())
    model = wn.apply_weight_norm(model.to(device), mode=mode)
    np.testing.assert_allclose(train(model, x.to(device), 5), train(exact, x.double(), 5), rtol=1e-4)
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours.detach().cpu().double(), theirs.detach(), rtol=1e-3, atol=1e-4)


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    """Under autocast g and v stay float32, and losses follow the plain net's first one exactly."""
    model, x = net("conv2d")
    plain, model = copy.deepcopy(model).to(device), wn.apply_weight_norm(model.to(device))
    first = train(plain, x.to(device), 1, dtype=dtype)
    assert train(model, x.to(device), 3, dtype=dtype)[0] == first[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@on_devices
def test_compiled(device: str) -> None:
    """A compiled net trains with eager's losses, in one graph."""
    model, x = net("conv2d")
    model = wn.apply_weight_norm(model.to(device))
    twin, x = copy.deepcopy(model), x.to(device)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    np.testing.assert_allclose(train(compiled, x), train(twin, x), rtol=1e-4)  # type: ignore[arg-type]


@needs_cuda
@pytest.mark.parametrize("mode", ["parametrized", "deferred"])
def test_cuda_graph_of_a_training_step(mode: Any) -> None:
    """A captured step, replayed, trains as eager steps do."""
    model, x = net("linear")
    model, x = wn.apply_weight_norm(model.cuda(), mode=mode), x.cuda()
    twin = copy.deepcopy(model)
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, twin))

    def step(m: nn.Module, o: torch.optim.Optimizer) -> None:
        o.zero_grad(set_to_none=False)
        m(x).square().mean().backward()
        o.step()

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, optimizer)
    for _ in range(4):
        graph.replay()
    for _ in range(3 + 4):
        step(twin, other)
    with torch.no_grad():
        torch.testing.assert_close(weights(model), weights(twin), rtol=1e-5, atol=1e-6)


@on_devices
def test_onnxruntime(device: str, tmp_path: Path) -> None:
    """A net on the device exports to a file that onnxruntime runs there with parity; never on the CPU in silence."""
    ort = pytest.importorskip("onnxruntime")
    if device == "cuda" and "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    model, x = net("conv2d")
    model = wn.apply_weight_norm(model.to(device)).eval()
    train(model, x.to(device))
    wn.export_onnx(model, (x.to(device),), tmp_path / "m.onnx")
    session = wn.open_session(tmp_path / "m.onnx", device)
    with torch.no_grad():
        expected = model(x.to(device)).cpu().numpy()
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
