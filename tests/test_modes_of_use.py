"""Converted nets as nets are trained and shipped: compiled, in mixed precision, averaged, checkpointed, quantized."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import wnsurgery as wn

from nets import net, same_bits


def converted(name: str) -> tuple[nn.Module, Tensor]:
    model, x = net(name)
    return wn.apply_weight_norm(model), x


def folded(model: nn.Module) -> nn.Module:
    return wn.fold_weight_norm(copy.deepcopy(model))


def steps(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, count: int) -> list[float]:
    """Losses of a few steps of SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = call(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# Compiled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "magnitude"),
    [
        *[(name, "linear") for name in ("linear", "transposed2d-grouped", "attention-packed", "tied")],
        *[(name, "log") for name in ("linear", "conv2d")],
    ],
)
def test_compiled_once_for_training_and_once_for_evaluation(name: str, magnitude: Any) -> None:
    """Five steps of a compiled net use one graph without breaks, evaluation one more, with eager's losses."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model, x = net(name)
    wn.apply_weight_norm(model, magnitude=magnitude)
    twin = copy.deepcopy(model)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    losses = steps(compiled, model.train(), x, 5)
    assert counter.frame_count == 1
    np.testing.assert_allclose(losses, steps(twin, twin.train(), x, 5), rtol=1e-4)
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            compiled(x)
        before = counter.frame_count
        assert before == 2
        model(x)  # eager in between keeps its weight; compiled code neither sees nor needs that
        torch.testing.assert_close(compiled(x), folded(model)(x))
    assert counter.frame_count == before


def test_a_compiled_net_sees_what_training_changed() -> None:
    """Compiled evaluation after more training, in eager or compiled, uses the new weights."""
    model, x = converted("linear")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for call in (compiled, model, compiled):
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), folded(model)(x))
        steps(call, model, x, 2)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), folded(model)(x))


def test_export_with_a_varying_axis() -> None:
    """torch.export with a dynamic batch holds g and v as parameters and runs at other sizes."""
    model, x = converted("conv2d")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"} <= set(program.state_dict)
    more = torch.cat([x, x, x])
    torch.testing.assert_close(program.module()(more), model(more))


# Precision, memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["linear", "conv2d", "encoder-layer"])
def test_mixed_precision_training(name: str, dtype: torch.dtype) -> None:
    """Autocast with a gradient scaler trains g and v in float32, forward as the folded net would under autocast."""
    model, x = converted(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = (model(x).float() - 1).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(np.isfinite(losses))
    assert losses[-1] < losses[0]
    with torch.autocast("cpu", dtype), torch.no_grad():
        assert same_bits(model(x), folded(model)(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_with_dropout(reentrant: bool) -> None:
    """Recomputed forwards give the plain ones' gradients bit for bit, dropout included, in both of torch's ways."""
    model = wn.apply_weight_norm(
        nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 2))
    )
    x = torch.randn(5, 4, requires_grad=True)

    def gradients(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        call(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients(model)
    whole = gradients(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    parts = gradients(lambda x: checkpoint_sequential(model, 2, x, use_reentrant=reentrant))
    assert len(plain) == len(list(model.parameters()))
    for again in (whole, parts):
        assert all(same_bits(a, b) for a, b in zip(plain, again, strict=True))


def test_gradient_checkpointing_of_transformers() -> None:
    """Activation checkpointing of a converted transformers model gives the same gradients."""
    transformers = pytest.importorskip("transformers")
    small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, use_cache=False, **small)
    model = wn.apply_weight_norm(transformers.LlamaForCausalLM(config)).train()
    ids = torch.tensor([[3, 4, 5, 6]])
    plain = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(ids, labels=ids).loss.backward()
    assert all(same_bits(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))  # type: ignore[arg-type]


def test_accumulated_gradients() -> None:
    """Two half batches give the gradients of the whole one, and one step the same weights, to rounding."""
    model, x = converted("conv2d")
    twin = copy.deepcopy(model)
    model(x).square().sum().backward()
    for half in x.chunk(2):
        twin(half).square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


# Copies --------------------------------------------------------------------------------------------------


def test_ensembles() -> None:
    """A stacked ensemble built on a meta skeleton gives its members' outputs, and each member's gradients."""
    members = [wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(members)  # type: ignore[arg-type]
    skeleton = copy.deepcopy(members[0]).to("meta")
    x = torch.randn(5, 3)

    def call(p: Any, b: Any) -> Tensor:
        return torch.func.functional_call(skeleton, (p, b), (x,))

    together = torch.vmap(call)(parameters, buffers)
    torch.testing.assert_close(together, torch.stack([m(x) for m in members]))
    together.square().sum().backward()
    for index, member in enumerate(members):
        member(x).square().sum().backward()
        for name, p in member.named_parameters():
            torch.testing.assert_close(parameters[name].grad[index], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ema", [False, True])
def test_averaged_models(ema: bool) -> None:
    """AveragedModel averages g and v, folds apart from the model it follows, and its state dict goes round."""
    model, x = converted("conv2d")
    options: dict[str, Any] = {"multi_avg_fn": get_ema_multi_avg_fn(0.5)} if ema else {}
    averaged = AveragedModel(model, **options)
    seen = []
    for _ in range(3):
        steps(model, model, x, 1)
        averaged.update_parameters(model)
        seen.append({n: p.detach().double().clone() for n, p in model.named_parameters()})
    for n, p in averaged.module.named_parameters():
        a, b, c = (s[n] for s in seen)
        expected = ((a + b) / 2 + c) / 2 if ema else (a + b + c) / 3
        torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6)
    again = AveragedModel(model, **options)
    again.load_state_dict(averaged.state_dict())
    assert same_bits(again(x), averaged(x))
    expected = averaged(x)
    plain = wn.fold_weight_norm(averaged.module)
    assert same_bits(plain(x), expected)
    assert wn.is_weight_normed(model)
    steps(model, model, x, 1)


@pytest.mark.parametrize("name", ["linear", "lstm", "tied", "attention-packed", "transposed2d-grouped"])
def test_built_on_the_meta_device(name: str) -> None:
    """A net converted without memory takes a converted state dict by assignment, runs, trains and folds."""
    source, x = converted(name)
    steps(source, source, x, 1) if x.is_floating_point() else None
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    with torch.device("meta"):
        model = wn.apply_weight_norm(net(name)[0])
    model.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert not any(t.is_meta for t in model.parameters())
    assert same_bits(model(x), source(x))
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert same_bits(folded(model)(x), source(x))


def test_to_with_swapped_parameters() -> None:
    """`to` keeps g and v tied to their optimizer where torch is told to swap parameters rather than to set them."""
    model, x = converted("tied")
    before = {id(p) for p in model.parameters()}
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert {id(p) for p in model.parameters()} == before
    assert model(x).dtype == torch.float64
    assert same_bits(folded(model)(x), model(x))


@pytest.mark.parametrize("early", [False, True])
def test_channels_last(early: bool) -> None:
    """A net in channels_last, before or after converting, runs and folds to channels_last weights with equal bits."""
    model, x = net("branches")
    x = x.contiguous(memory_format=torch.channels_last)
    plain = copy.deepcopy(model).to(memory_format=torch.channels_last)
    if early:
        wn.apply_weight_norm(model.to(memory_format=torch.channels_last))
    else:
        wn.apply_weight_norm(model).to(memory_format=torch.channels_last)
    weight = model.get_submodule("left").weight
    assert isinstance(weight, Tensor)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert same_bits(model(x), plain(x))
    wn.fold_weight_norm(model)
    assert all(
        a.stride() == b.stride() and same_bits(a, b)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("name", ["linear", "lstm", "transposed2d-grouped"])
def test_torchscript_after_folding(name: str) -> None:
    """A converted net is refused in words of ours, wherever in the tree it is; a folded copy compiles."""
    never, x = net(name)
    model = wn.apply_weight_norm(nn.Sequential(copy.deepcopy(never)).eval())
    children = list(model)
    with pytest.raises(wn.SelectionError, match="TorchScript cannot compile a module under weight norm"):
        torch.jit.script(model)
    assert list(model) == children
    folded = wn.fold_weight_norm(copy.deepcopy(model))
    with torch.no_grad():
        assert same_bits(torch.jit.script(folded)(x), torch.jit.script(nn.Sequential(never))(x))


# Quantized -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch.ao.quantization is deprecated, and still what people use
@pytest.mark.parametrize("name", ["linear", "lstm"])
def test_torch_dynamic_quantization_after_folding(name: str) -> None:
    """The folded net quantizes as a net that was never converted, to the bit."""
    never, x = net(name)
    model = wn.fold_weight_norm(wn.apply_weight_norm(copy.deepcopy(never)))
    kinds = {nn.Linear, nn.LSTM}
    quantized = torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)
    reference = torch.ao.quantization.quantize_dynamic(never, kinds, dtype=torch.qint8)
    assert same_bits(quantized(x), reference(x))
    assert "quantized" in type(next(m for m in quantized.modules() if not list(m.children()))).__module__


@pytest.mark.filterwarnings("ignore")  # the exporter's and onnxruntime's own
def test_onnxruntime_dynamic_quantization(tmp_path: Path) -> None:
    """An exported converted net quantizes in onnxruntime to what the net that was never converted becomes."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    torch.manual_seed(0)
    never = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    model, x = wn.apply_weight_norm(copy.deepcopy(never)), torch.randn(4, 16)
    outputs = []
    for name, net_ in (("never", never), ("model", model)):
        wn.export_onnx(net_, x, tmp_path / f"{name}.onnx")
        try:
            quantize_dynamic(tmp_path / f"{name}.onnx", tmp_path / f"{name}-q.onnx", weight_type=QuantType.QUInt8)
        except onnx.shape_inference.InferenceError:
            if name == "model":
                raise
            pytest.skip("this onnxruntime does not quantize what torch exports")
        graph = onnx.load(tmp_path / f"{name}-q.onnx").graph
        assert sum(t.data_type == onnx.TensorProto.UINT8 and len(t.dims) == 2 for t in graph.initializer) == 2
        given = {graph.input[0].name: x.numpy()}
        outputs.append(next(iter(wn.run_onnx(tmp_path / f"{name}-q.onnx", given).values())))
    expected = model(x).detach().numpy()
    assert np.abs(outputs[1] - expected).max() < 0.05 * np.abs(expected).max()
    assert np.array_equal(*outputs)
