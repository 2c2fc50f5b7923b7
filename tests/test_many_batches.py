"""Data-dependent initialisation over many batches: the same as over their concatenation, a pass per batch, no trace."""

from __future__ import annotations

import copy
import gc
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import wnsurgery as wn
from wnsurgery.own_state import Spill

from nets import Branches

SIZES = {1: [37], 2: [30, 7], 3: [1, 20, 16], 7: [3, 9, 2, 8, 5, 6, 4]}
MEMORY = ("spill", "live", "recompute")


class Stash(nn.Module):
    """Keeps tensors on itself between its layers, under a name, in a list and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.kept: dict[str, Tensor] = {}
        self.seen: list[Tensor] = []
        self.length = 0
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.skip, self.length = self.a(x), len(x)
        self.kept["skip"] = self.skip.tanh()
        self.seen.append(x.mean(1, keepdim=True))
        h = self.b(self.skip.relu())
        assert len(h) == self.length
        h = h + self.skip + self.kept["skip"] + self.seen.pop()
        return self.c(h)


class Mixed(nn.Module):
    """A recurrent layer, layer norms and a linear layer applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.lstm, self.out = nn.Linear(5, 6), nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.lstm(self.inlet(x[:, None] * torch.ones(3, 1)).tanh())[0])
        return self.out(self.out(h).relu()).mean(1)


def normed(kind: type[nn.Module], *shape: int) -> nn.Module:
    """Batch norms that use statistics of the batch, one of them called twice, in two dimensions."""
    first = nn.Conv2d(3, 6, 3) if len(shape) > 1 else nn.Linear(5, 6)
    last = nn.ConvTranspose2d(6, 4, 2, groups=2) if len(shape) > 1 else nn.Linear(6, 4)
    batch_norm = kind(6)
    return nn.Sequential(first, batch_norm, nn.ReLU(), batch_norm, last, kind(4, affine=False), nn.Identity())


class MeanOnlyBatchNorm1d(nn.Module):
    """The paper's mean-only batch norm in its least form."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(width))
        self.register_buffer("running_mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean([0, *range(2, x.ndim)]) if self.training else self.running_mean
        return x + (self.bias - mean).reshape(1, -1, *[1] * (x.ndim - 2))


NETS: dict[str, tuple[Any, tuple[int, ...], bool]] = {
    "branches": (Branches, (3, 8, 8), False),
    "stash": (Stash, (5,), True),
    "mixed": (Mixed, (5,), True),
    "batch norm 1d": (lambda: normed(nn.BatchNorm1d), (5,), True),
    "batch norm 2d": (lambda: normed(nn.BatchNorm2d, 2, 2), (3, 6, 6), True),
    "mean-only": (lambda: nn.Sequential(nn.Linear(5, 6), MeanOnlyBatchNorm1d(6), nn.Linear(6, 4)), (5,), True),
    "branches in training": (lambda: without_dropout(Branches()), (3, 8, 8), True),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
        (5, 8),
        True,
    ),
}


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    make, shape, training = NETS[name]
    x = (
        torch.randn(37, *shape, dtype=dtype) * torch.linspace(0.5, 30, 37, dtype=dtype).reshape(37, *[1] * len(shape))
        + 3
    )
    return wn.apply_weight_norm(make().to(dtype).train(training)), x


def assert_same(a: nn.Module, b: nn.Module, tolerance: float = 1e-5) -> None:
    """Every parameter equal to a relative tolerance; biases, in units of a deviation, relative to 1 or more."""
    others = dict(b.named_parameters())
    for name, p in a.named_parameters():
        q = others[name]
        assert torch.isfinite(p).all(), name
        unit = max(1.0, q.abs().max().item()) if name.endswith("bias") else q.abs().max().item()
        assert torch.allclose(p, q, rtol=tolerance, atol=tolerance * unit), name


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", NETS)
def test_uneven_batches_are_one_large_batch(name: str, count: int, memory: Any) -> None:
    """1, 2, 3 and 7 batches of different sizes give the g and b of their concatenation, in every memory mode."""
    model, x = made(name)
    whole = copy.deepcopy(model)
    wn.data_dependent_init(whole, x)
    report = wn.data_dependent_init(model, list(x.split(SIZES[count])), memory=memory)
    assert report.batches == count
    assert_same(model, whole)


def layer_by_layer(model: nn.Module, x: Tensor, order: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """The recipe by hand in float64: a forward pass per layer over the whole batch, on plain weights."""
    plain = wn.fold_weight_norm(copy.deepcopy(model)).double()
    axes = {nn.Conv2d: 1, nn.ConvTranspose2d: 1, nn.Linear: -1}
    found = {}
    with torch.no_grad():
        for name in order:
            layer = plain.get_submodule(name)
            if isinstance(layer, nn.ConvTranspose2d):
                grouped = layer.weight.reshape(layer.groups, -1, *layer.weight.shape[1:])
                norms = grouped.square().sum((1, 3, 4), keepdim=True).sqrt()
                unit = (grouped / norms).reshape(layer.weight.shape)
            else:
                unit = layer.weight / layer.weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (layer.weight.ndim - 1))
            layer.weight.copy_(unit)
            bias = torch.zeros(1, dtype=torch.float64) if layer.bias is None else layer.bias.zero_()
            outputs: list[Tensor] = []
            handle = layer.register_forward_hook(lambda _m, _a, out, outputs=outputs: outputs.append(out))
            plain(x.double())
            handle.remove()
            rows = outputs[0].movedim(next(a for t, a in axes.items() if isinstance(layer, t)), 0).flatten(1)
            g = 1 / rows.std(1, unbiased=False)
            if layer.bias is not None:
                bias.copy_(-rows.mean(1) * g)
            if isinstance(layer, nn.ConvTranspose2d):
                spread = g.reshape(layer.groups, 1, -1, 1, 1).expand(-1, unit.shape[0] // layer.groups, -1, -1, -1)
                layer.weight.copy_(unit * spread.reshape(unit.shape[0], -1, 1, 1))
            else:
                layer.weight.copy_(unit * g.reshape(-1, *[1] * (unit.ndim - 1)))
            found[name] = (g, bias.clone())
    return found


@pytest.mark.parametrize("name", ["branches", "stash", "branches in training", "batch norm 2d"])
def test_against_the_recipe_by_hand(name: str) -> None:
    """g and b over 7 batches in float64 are those of the paper's recipe done layer by layer on plain weights."""
    model, x = made(name, torch.float64)
    before = copy.deepcopy(model)
    report = wn.data_dependent_init(model, list(x.split(SIZES[7])))
    order = [layer.name.removesuffix(".weight") for layer in report.initialised]
    for key, (g, b) in layer_by_layer(before, x, order).items():
        layer: Any = model.get_submodule(key)
        assert torch.allclose(layer.parametrizations.weight.original0.flatten(), g, rtol=1e-9), key
        if layer.bias is not None:
            assert torch.allclose(layer.bias, b, rtol=1e-8, atol=1e-8), key


@pytest.mark.parametrize("memory", ["spill", "live"])
def test_one_forward_call_per_batch(memory: Any) -> None:
    """The net and each of its layers are called once per batch, whatever its depth; attributes that count agree."""
    model = wn.apply_weight_norm(Stash())
    calls = dict.fromkeys(("", "a", "b", "c"), 0)

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    for name in calls:
        model.get_submodule(name).register_forward_hook(count(name))
    wn.data_dependent_init(model, list(torch.randn(37, 5).split(SIZES[7])), memory=memory)
    assert set(calls.values()) == {7}
    assert model.calls == 7


def test_kinds_of_iterables_and_the_limit() -> None:
    """Lists, loaders with labels, generators of tuples and mappings, and max_batches, take the batches they name."""
    torch.manual_seed(0)
    model, x = wn.apply_weight_norm(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))), torch.randn(50, 5)
    whole = copy.deepcopy(model)
    wn.data_dependent_init(whole, x)
    parts = x.split(16)
    kinds: list[Any] = [
        list(parts),
        DataLoader(TensorDataset(x, torch.zeros(50)), batch_size=16),
        ((part, "label") for part in parts),
        ({"input": part} for part in parts),
        iter(parts),
    ]
    for data in kinds:
        other = copy.deepcopy(model)
        assert wn.data_dependent_init(other, data).batches == 4
        assert_same(other, whole)
    wn.data_dependent_init(whole, x[:32])
    read = []

    def endless() -> Iterator[Tensor]:
        while True:
            read.append(1)
            yield from parts

    wn.data_dependent_init(model, endless(), max_batches=2)
    assert_same(model, whole)
    assert len(read) == 1
    for limit in (0, -1, 1.5, True):
        with pytest.raises(wn.SelectionError, match="max_batches"):
            wn.data_dependent_init(model, parts, max_batches=limit)  # type: ignore[arg-type]


class Route(nn.Module):
    """Takes another way for batches whose first element is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.last(h if x[0, 0] < 0 else self.b(h))


@pytest.mark.parametrize("memory", MEMORY)
def test_batches_on_different_ways_meet_again(memory: Any) -> None:
    """A layer only some batches reach is set from those; one after it from all."""
    torch.manual_seed(0)
    model = wn.apply_weight_norm(Route())
    parts = [torch.randn(n, 5) for n in (9, 8, 7)]
    for part, sign in zip(parts, (1, -1, 1), strict=True):
        part[0, 0] = sign
    report = wn.data_dependent_init(model, parts, memory=memory)
    assert [layer.name for layer in report.initialised] == ["a.weight", "b.weight", "last.weight"]
    outputs = torch.cat([model(part) for part in parts])
    assert torch.allclose(outputs.std(0, unbiased=False), torch.ones(3), atol=1e-4)
    inner = torch.cat([model.b(model.a(part)) for part in (parts[0], parts[2])])
    assert torch.allclose(inner.std(0, unbiased=False), torch.ones(6), atol=1e-4)


def test_the_same_result_whatever_the_timing() -> None:
    """With dropout running, two runs from one seed agree to the bit."""
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = wn.apply_weight_norm(nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 4)))
        wn.data_dependent_init(model, list(torch.randn(60, 5).split(9)), training=True)
        results.append([p.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_random_numbers_of_a_batch_are_the_same_each_time() -> None:
    """Where passes are run again rather than kept, each batch draws what it drew at first."""
    drawn: dict[float, list[Tensor]] = {}

    class Draw(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            drawn.setdefault(x[0, 0].item(), []).append(torch.rand(8))
            return x

    model = wn.apply_weight_norm(nn.Sequential(Draw(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)))
    wn.data_dependent_init(model, list(torch.randn(20, 5).split(7)), memory="recompute")
    assert len(drawn) == 3
    for draws in drawn.values():
        assert len(draws) > 1
        assert all(torch.equal(draw, draws[0]) for draw in draws)
    firsts = [draws[0] for draws in drawn.values()]
    assert not torch.equal(firsts[0], firsts[1])


def test_threads_inherit_the_callers_modes() -> None:
    """Every batch runs under the caller's grad mode, autocast, default device and inference mode."""
    seen: list[tuple[Any, ...]] = []

    class Look(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            made_here = torch.empty(1).device.type
            seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), x.dtype, made_here))
            return x

    model = wn.apply_weight_norm(nn.Sequential(nn.Linear(5, 6), Look()))
    parts = list(torch.randn(20, 5).split(6))
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        wn.data_dependent_init(model, parts)
    assert seen == [(False, True, torch.bfloat16, "meta")] * 4
    with torch.inference_mode():
        report = wn.data_dependent_init(model, parts)
    assert len(report.initialised) == 1
    model(parts[0]).sum().backward()


def test_compiled_models_are_measured() -> None:
    """A compiled model runs eagerly for every batch."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = wn.apply_weight_norm(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4))), torch.randn(40, 5)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    assert len(wn.data_dependent_init(compiled, list(x.split(9))).initialised) == 2
    assert torch.allclose(model(x).std(0, unbiased=False), torch.ones(4), atol=1e-4)


class Failing(nn.Module):
    """Raises in the middle, for batches of one size."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.a, self.b, self.error = nn.Linear(5, 6), nn.Linear(6, 4), error

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        try:
            if len(x) == 8:
                raise self.error
            return self.b(h)
        except ZeroDivisionError:
            return self.b(h)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("error", [RuntimeError("no\nway"), KeyboardInterrupt(), TypeError("bad")])
def test_a_failing_batch_cancels_all_others(error: BaseException, memory: Any) -> None:
    """One batch that raises: g, b, hooks, patched modules and threads are as before; the error names the batch."""
    model = wn.apply_weight_norm(nn.Sequential(Failing(error), nn.BatchNorm1d(4)))
    before = copy.deepcopy(model.state_dict())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    threads = threading.active_count()
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else wn.InputError
    with pytest.raises(expected) as caught:
        wn.data_dependent_init(model, [torch.randn(n, 5) for n in (9, 7, 8, 6)], memory=memory)
    if expected is wn.InputError:
        message = f"the model's forward failed on batch 2: {type(error).__name__}: {str(error).splitlines()[0]}"
        assert caught.value.message == message  # type: ignore[attr-defined]
        assert caught.value.__cause__ is error
    assert threading.active_count() == threads
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not any("forward" in vars(m) for m in model.modules())


def test_bad_data_is_an_input_error_naming_the_batch() -> None:
    """Wrong shapes, types, arguments, nothing at all, values that are not finite, and loaders that raise."""
    model = wn.apply_weight_norm(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)))
    good = torch.randn(9, 5)

    def broken() -> Iterator[Tensor]:
        yield good
        raise OSError("disk gone")

    cases: list[tuple[Any, str]] = [
        ([good, torch.randn(9, 4)], "failed on batch 1"),
        ([good, good, "text"], "failed on batch 2"),
        ({"nonsense": good}, "failed on batch 0: TypeError"),
        ([good, good / 0], "batch 1: 0.weight: .*not finite"),
        (broken(), "reading batch 1 of the data failed: OSError: disk gone"),
        ([], "gives no batch"),
        ([good[:0]], "no position"),
        ("text", "not str"),
    ]
    for data, message in cases:
        with pytest.raises(wn.InputError, match=message) as caught:
            wn.data_dependent_init(model, data)
        assert "\n" not in caught.value.message
    assert wn.data_dependent_init(model, [good, good[:0]]).initialised[0].positions == 9


def test_patched_batch_norm_keeps_running_statistics_and_takes_single_samples() -> None:
    """Batches of one sample, which BatchNorm refuses alone, take part; its buffers are as before."""
    torch.manual_seed(0)
    model, x = (
        wn.apply_weight_norm(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))),
        torch.randn(20, 5),
    )
    whole = copy.deepcopy(model)
    wn.data_dependent_init(whole, x)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    wn.data_dependent_init(model, list(x.split([1, 18, 1])))
    assert_same(model, whole)
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


class Wide(nn.Module):
    """Layers whose inner activations are far larger than its inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = x.repeat(1, 64)
        for block in self.blocks:
            h = h + block(h).tanh()
        return h.sum()


def held_bytes() -> int:
    """Bytes of all tensors alive, each storage once."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is Tensor
    }
    return sum(storages.values())


def peak(count: int, memory: Any) -> int:
    """The most bytes held at any call of the third block, over those before."""
    torch.manual_seed(0)
    model, most = wn.apply_weight_norm(Wide()), [0]
    gc.collect()
    start = held_bytes()

    def look(*_: Any) -> None:
        most[0] = max(most[0], held_bytes() - start)

    model.blocks[2].register_forward_hook(look)
    wn.data_dependent_init(model, (torch.randn(2000, 1) for _ in range(count)), memory=memory)
    return most[0]


def test_memory_does_not_grow_with_the_number_of_batches() -> None:
    """Eight batches hold about what one holds, by spilling or recomputing; kept live they hold eight times as much."""
    one = peak(1, "spill")
    assert peak(8, "spill") < 1.3 * one
    assert peak(8, "recompute") < 1.3 * one
    assert peak(8, "live") > 4 * one


def test_spilled_tensors_come_back_when_another_batch_touches_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache filled by one batch and read by all is right although its owner is paused and out of memory."""
    monkeypatch.setattr(Spill, "smallest", 1)
    cache: dict[int, Tensor] = {}

    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            if not cache:
                cache[0] = torch.arange(6.0) + 1
            return self.b(self.a(x) * cache[0]) * cache[0]

    torch.manual_seed(0)
    model, x = wn.apply_weight_norm(Cached()), torch.randn(40, 5)
    whole = copy.deepcopy(model)
    wn.data_dependent_init(model, list(x.split(9)))
    assert torch.equal(cache[0], torch.arange(6.0) + 1)
    wn.data_dependent_init(whole, x)
    assert_same(model, whole)


def test_a_full_disk_is_an_output_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the temporary file cannot be made, the error says so and nothing changes."""

    def full(**_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wnsurgery.own_state.tempfile.TemporaryFile", full)
    model = wn.apply_weight_norm(Wide())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(wn.OutputError, match="No space left") as caught:
        wn.data_dependent_init(model, [torch.randn(200, 1) for _ in range(3)])
    assert "memory" in str(caught.value.hint)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def padded(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    mask = torch.arange(x.shape[1]) < lengths[:, None]
    return torch.where(mask[..., None], x, 1e3), mask


def test_masked_positions_do_not_count() -> None:
    """Padding behind a mask changes nothing: sequences one by one without padding give the same g and b."""
    torch.manual_seed(0)
    model = wn.apply_weight_norm(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)))
    alone = copy.deepcopy(model)
    lengths = torch.tensor([3, 7, 1, 5, 6, 2])
    x, mask = padded(torch.randn(6, 7, 5), lengths)
    wn.data_dependent_init(alone, [x[i : i + 1, :n] for i, n in enumerate(lengths.tolist())])
    for data, how in (
        ({"input": x, "keep": mask}, "keep"),
        ([{"input": x[:2], "keep": mask[:2].long()}, {"input": x[2:], "keep": mask[2:].long()}], "keep"),
        ((x,), lambda batch: batch[0][..., 0] != 1e3),
    ):
        other = copy.deepcopy(model)
        call = (lambda m, batch: m(batch["input"])) if how == "keep" else None
        report = wn.data_dependent_init(other, data, mask=how, forward=call)  # type: ignore[arg-type]
        assert [layer.positions for layer in report.initialised] == [24, 24]
        assert all(layer.masked for layer in report.initialised)
        assert_same(other, alone)


def test_masks_that_fit_nothing_are_errors() -> None:
    """A missing key, a mask of another shape, one that leaves nothing, and something that is no mask."""
    model, x = wn.apply_weight_norm(nn.Sequential(nn.Linear(5, 4))), torch.randn(6, 7, 5)
    for mask, error in (
        ("keep", "no entry 'keep'"),
        (lambda _: torch.ones(3, 3), "fits the output of no layer"),
        (lambda _: torch.zeros(6, 7), "no position"),
        (lambda _: 3, "must be a tensor"),
    ):
        with pytest.raises(wn.InputError, match=error):
            wn.data_dependent_init(model, {"input": x}, mask=mask)  # type: ignore[arg-type]
    with pytest.raises(wn.SelectionError, match="mask"):
        wn.data_dependent_init(model, x, mask=3)  # type: ignore[arg-type]


def test_a_tiny_bert_with_its_attention_mask() -> None:
    """transformers' BERT: uneven batches of BatchEncoding, padding left out, equal one batch; pooler unmasked."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model = wn.apply_weight_norm(transformers.BertModel(config).eval())
    whole = copy.deepcopy(model)
    ids, lengths = torch.randint(0, 30, (13, 9)), torch.randint(1, 10, (13,))
    mask = (torch.arange(9) < lengths[:, None]).long()
    batches = [
        transformers.BatchEncoding({"input_ids": i, "attention_mask": m})
        for i, m in zip(ids.split([5, 1, 7]), mask.split([5, 1, 7]), strict=True)
    ]
    report = wn.data_dependent_init(model, batches, mask="attention_mask")
    wn.data_dependent_init(whole, {"input_ids": ids, "attention_mask": mask}, mask="attention_mask")
    assert_same(model, whole)
    positions = {layer.name: layer.positions for layer in report.initialised}
    assert positions.pop("pooler.dense.weight") == 13
    assert set(positions.values()) == {int(mask.sum())}


def test_again_and_again_with_and_without_selection() -> None:
    """On a converted net, once more on the same batches changes rounding alone; excluded layers never change."""
    model, x = made("branches")
    parts = list(x.split(SIZES[3]))
    wn.data_dependent_init(model, parts)
    once = copy.deepcopy(model)
    for _ in range(2):
        wn.data_dependent_init(model, parts)
    assert_same(model, once)
    kept = {n: p.clone() for n, p in model.named_parameters()}
    wn.data_dependent_init(model, [part * 3 for part in parts], include="stem", exclude="head")
    changed = {n.split(".")[0] for n, p in model.named_parameters() if not torch.equal(p, kept[n])}
    assert changed == {"stem"}


def test_init_scale_by_pattern() -> None:
    """The first pattern that fits decides; a layer that none fits gets 1; one that fits nothing is an error."""
    torch.manual_seed(0)
    model, x = wn.apply_weight_norm(nn.Sequential(*(nn.Linear(5, 5) for _ in range(4)))), torch.randn(90, 5)
    report = wn.data_dependent_init(model, list(x.split(40)), init_scale={"0": 0.1, "re:^[01]": 0.5, "3.weight": 2})
    after = [sum(layer.after.std) / 5 for layer in report.initialised if layer.after]
    assert after == pytest.approx([0.1, 0.5, 1.0, 2.0], rel=1e-5)
    for wrong in ({"9": 1.0}, {"0": 0.0}, {"0": float("nan")}, {"0": "1"}):
        with pytest.raises(wn.SelectionError, match="init_scale"):
            wn.data_dependent_init(model, x, init_scale=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("magnitude", ["linear", "log"])
def test_report_tells_before_and_after(magnitude: Any) -> None:
    """Means and deviations before are those of the old g and b, after those of the new, per channel; it prints."""
    torch.manual_seed(0)
    model, x = (
        wn.apply_weight_norm(nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4)), magnitude=magnitude),
        torch.randn(90, 5),
    )
    first = model[0](x).detach()
    report = wn.data_dependent_init(model, list(x.split(40)))
    layer = report.initialised[0]
    assert layer.before is not None and layer.after is not None
    assert layer.before.mean == pytest.approx(first.mean(0).tolist(), abs=1e-5)
    assert layer.before.std == pytest.approx(first.std(0, unbiased=False).tolist(), rel=1e-5)
    assert layer.after.mean == pytest.approx([0] * 6, abs=1e-6)
    assert layer.after.std == pytest.approx([1] * 6, rel=1e-6)
    plain = report.initialised[0].to_json()
    assert plain["positions"] == 90
    assert plain["before"]["std"] == list(layer.before.std)
    assert [line.split()[0] for line in str(report).splitlines()[1:]] == ["weight", "0.weight", "1.weight"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handling of SIGINT, which a process started in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_from_the_keyboard_leaves_nothing_behind() -> None:
    """A real SIGINT while a batch runs on its thread ends all threads and restores g and b."""

    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 7:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(1000):
                    x = x + 1
            return x

    model = wn.apply_weight_norm(nn.Sequential(nn.Linear(5, 6), Interrupted(), nn.Linear(6, 4)))
    before, threads = copy.deepcopy(model.state_dict()), threading.active_count()
    for memory in MEMORY:
        with pytest.raises(KeyboardInterrupt):
            wn.data_dependent_init(model, [torch.randn(n, 5) for n in (9, 7, 8)], memory=memory)  # type: ignore[arg-type]
        assert threading.active_count() == threads
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert torch.get_num_threads() >= 1


class Peculiar(nn.Module):
    """Takes gradients inside its forward, leaves autocast, and has more channels than a small tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 4096), nn.Linear(4096, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            h = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(h.pow(3).sum() + self.c(self.b(self.a(h))).sum(), h)
        with torch.autocast("cpu", enabled=False):
            y = self.a(x + slope.detach())
        return self.c(self.b(y.relu()).float())


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_and_modes_inside_a_forward(autocast: bool) -> None:
    """A forward that differentiates and switches autocast runs interleaved as it runs alone."""
    torch.manual_seed(0)
    model, x = wn.apply_weight_norm(Peculiar()), torch.randn(60, 5)
    whole = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wn.data_dependent_init(model, list(x.split([30, 20, 10])))
        wn.data_dependent_init(whole, x)
    assert_same(model, whole, 2e-2 if autocast else 1e-5)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("inside", [False, True])
def test_biases_that_autocast_has_cast_before(memory: Any, count: int, inside: bool) -> None:
    """Autocast keeps casts of Parameters: none of a bias or g that is written to meanwhile is used again, neither in a
    second call of the layer nor in a forward pass of the caller's within the same context."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.last = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=inside or torch.is_autocast_enabled("cpu")):
                return self.last(self.again(self.again(self.first(x)).relu()))

    torch.manual_seed(0)
    model, x = wn.apply_weight_norm(Twice()), torch.randn(200, 8) + 1
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside), torch.no_grad():
        model(x)
        wn.data_dependent_init(model, list(x.split(200 // count + 1)), memory=memory)
        y = model(x).float()
    assert max(y.mean(0).abs().max(), (y.std(0) - 1).abs().max()) < 0.05
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(x)
        wn.fan_init(model)
        y = model(x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(y, model(x))


class Energy(nn.Module):
    """Takes the gradient of a scalar that its own layers make, and goes on from that: a force field."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.energy, self.last = nn.Linear(5, 16), nn.Linear(16, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.energy(self.inlet(x).tanh())
            (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return self.last(force)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("magnitude", ["linear", "log"])
def test_a_forward_that_differentiates_its_own_layers(memory: Any, count: int, magnitude: Any) -> None:
    """Where gradients are on inside a forward, they pass through the layers as they are once g and b are set."""
    torch.manual_seed(0)
    model, x = wn.apply_weight_norm(Energy(), magnitude=magnitude), torch.randn(300, 5)
    report = wn.data_dependent_init(model, list(x.split(300 // count)), memory=memory)
    assert [layer.name for layer in report.initialised] == ["inlet.weight", "energy.weight", "last.weight"]
    for layer in (model.inlet, model.energy, model.last):
        outputs: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _m, _a, out, outputs=outputs: outputs.append(out.detach()))
        model(x)
        handle.remove()
        assert outputs[0].mean(0).abs().max() < 1e-4
        assert (outputs[0].std(0, unbiased=False) - 1).abs().max() < 1e-4
    assert all(p.grad is None for p in model.parameters())
    model(x).square().sum().backward()


class Checkpointed(Energy):
    """The same with a checkpoint, which counts what its layers save for the backward pass, and hooks on a layer."""

    counted = True

    def __init__(self) -> None:
        super().__init__()
        self.inlet.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
        self.inlet.register_forward_hook(lambda _m, _a, output: output * 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            first = lambda x: self.inlet(x).tanh()  # noqa: E731
            energy = self.energy(checkpoint(first, x, use_reentrant=False) if self.counted else first(x))
            (force,) = torch.autograd.grad(energy.sum(), x)
        return self.last(force)


def plainly(model: nn.Module) -> nn.Module:
    return wn.apply_weight_norm(model)


def by_torch(model: nn.Module) -> nn.Module:
    for layer in model.children():
        parametrizations.weight_norm(layer)
    return model


def by_hooks(model: nn.Module) -> nn.Module:
    for layer in model.children():
        nn.utils.weight_norm(layer)
    return model


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("convert", [plainly, by_torch, by_hooks])
def test_hooks_of_a_layer_that_is_measured_act_once(memory: Any, count: int, convert: Any) -> None:
    """Where gradients are on, a layer is measured without a graph, and each of its other hooks acts once on what the
    pass goes on with."""
    torch.manual_seed(0)
    model, x = convert(Checkpointed()), torch.randn(300, 5)
    model.counted = convert is not by_hooks  # which compute the weight before the forward
    wn.data_dependent_init(model, list(x.split(300 // count)), memory=memory)
    outputs: list[Tensor] = []
    for layer in model.children():
        layer.register_forward_hook(lambda _m, _a, output: outputs.append(output.detach()), prepend=True)
    model(x)
    for output in (outputs[0], outputs[1], outputs[-1]):
        assert output.mean(0).abs().max() < 1e-4
        assert (output.std(0, unbiased=False) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "log", "frozen", "energy"])
def test_directions_stay_to_the_bit(memory: Any, dtype: torch.dtype, kind: str) -> None:
    """Weights that layers compute and keep while batches wait come to nothing: v, and g that is not set, stay."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(5, 4096), nn.ReLU(), nn.Linear(4096, 5), nn.ReLU(), nn.Linear(5, 5))
    if kind == "energy":
        model = Energy()
        model.inlet, model.energy = nn.Linear(5, 4096), nn.Linear(4096, 1)
    wn.apply_weight_norm(model.to(dtype), magnitude="log" if kind == "log" else "linear")
    if kind == "frozen":
        wn.freeze_magnitude(model, include="0")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("original1"):
                p.mul_(1e5)  # too long to stand for unit directions
    before = copy.deepcopy(model.state_dict())
    report = wn.data_dependent_init(model, list(torch.randn(60, 5, dtype=dtype).split(20)), memory=memory)
    kept = [name for name in before if name.endswith("original1")]
    kept += [f"{left.name.removesuffix('weight')}parametrizations.weight.original0" for left in report.left]
    assert len(kept) == 3 + (kind == "frozen")
    model(torch.randn(3, 5, dtype=dtype))
    for name in kept:
        assert torch.equal(model.state_dict()[name], before[name]), name


class Pool(nn.Module):
    """Calls layers from threads of its own: of a pool whose results it takes, or one it only joins."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.results = kind, {0: torch.zeros(()), 1: torch.zeros(())}
        self.a, self.b, self.norm, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        def work(number: int) -> None:
            if self.kind != "norm":
                self.results[number] = (self.a, self.b)[number](x)
            else:
                self.results[number] = self.norm(x)

        if self.kind == "pool":
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(work, (0, 1)))
        else:
            threads = [threading.Thread(target=work, args=(n,)) for n in (0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return self.last(torch.tanh(self.results[0]) + self.results[1] + 1)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("kind", ["pool", "threads", "norm"])
def test_layers_called_from_threads_of_the_forward(memory: Any, kind: str) -> None:
    """Several batches cannot meet there: that is an error, whatever becomes of the threads; one batch works."""
    torch.manual_seed(0)
    model, parts = wn.apply_weight_norm(Pool(kind)), [torch.randn(n, 8) for n in (64, 30, 7)]
    before, threads = copy.deepcopy(model.state_dict()), threading.active_count()
    with pytest.raises(wn.InputError, match="threads of its own") as caught:
        wn.data_dependent_init(model, parts, memory=memory)
    assert "one batch" in str(caught.value.hint)
    assert threading.active_count() == threads
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    wn.data_dependent_init(model, parts[0], memory=memory)
    first = model.last if kind == "norm" else model.a
    x = torch.tanh(model.norm(parts[0])) + model.norm(parts[0]) + 1 if kind == "norm" else parts[0]
    assert (first(x).std(0, unbiased=False) - 1).abs().max() < 1e-3
