"""The promises on live modules, over the whole zoo: no bit moves, no trace is left, copies are copies."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel

import wnsurgery as wn
from wnsurgery import fused
from wnsurgery.lean_modules import _LATE, LeanModule
from wnsurgery.mechanism import PASSING
from wnsurgery.runs import copy_of

from nets import NETS, effective, halves, net, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCALES = [1.0, 0.0, -0.0, 1e-30, 1e-23, 1e20, 1e30]


def state(model: nn.Module) -> dict[str, Any]:
    """All that surgery could leave a trace in."""
    return {
        "classes": {n: type(m) for n, m in model.named_modules()},
        "attributes": {n: _attributes(m) for n, m in model.named_modules()},
        "hooks": {n: [k for k, v in m.__dict__.items() if "hook" in k and v] for n, m in model.named_modules()},
        "parameters": [
            (n, type(p), p.requires_grad, p.stride(), p.dtype)
            for n, p in model.named_parameters(remove_duplicate=False)
        ],
        "ties": [n for n, _ in model.named_parameters()],
        "keys": list(model.state_dict()),
    }


def _attributes(module: nn.Module) -> list[str]:
    lazy = _LATE if isinstance(module, LeanModule) else {}  # come into being when somebody looks at them
    return [name for name in module.__dict__ if name not in PASSING and name not in lazy]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_round_trip_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    """Converting keeps every weight and output bit for rows of any size, folding restores model and bits."""
    model, x = net(name, dtype)
    sites = wn.plan_weight_norm(model).sites
    for site in sites:
        rows = site.weight.detach().flatten(1)
        for row, scale in zip(rows[: len(SCALES)], SCALES, strict=False):
            if scale == 0 or float(torch.tensor(scale).to(dtype).abs()) not in (0.0, float("inf")):
                row.mul_(scale)
    before, trace = values(model), state(model)
    with torch.no_grad():
        expected = model(x)
    wn.apply_weight_norm(model)
    for site in sites:
        assert same_bits(effective(model, site.fqn), before[site.fqn]), site.fqn
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with torch.no_grad():
        assert same_bits(model(x), expected)
    wn.fold_weight_norm(model)
    assert state(model) == trace
    after = values(model)
    assert all(same_bits(after[n], before[n]) for n in before)
    with torch.no_grad():
        assert same_bits(model(x), expected)
    assert pickle.loads(pickle.dumps(model)) is not None


@pytest.mark.parametrize("name", NETS)
def test_training_moves_g_and_v_and_folds_to_the_forward_weight(name: str) -> None:
    """One step moves every trainable g and v; the folded weight is the one the forward used, bit for bit."""
    model, x = net(name)
    wn.apply_weight_norm(model)
    sites = wn.inspect(model).weights
    before = values(model)
    model.train()
    if name == "branches":
        model.eval()
    model(x).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.grad is not None], lr=0.05).step()
    for n, p in model.named_parameters():
        idle = "unused" in n or ("cell" in name and "weight_hh" in n)  # a cell's first hidden state is zero
        if p.requires_grad and n.endswith("original0") and not idle:
            assert not torch.equal(p, before[n]), n
    used = {w.name: effective(model, w.name).detach().clone() for w in sites}
    model.eval()
    with torch.no_grad():
        expected = model(x)
    wn.fold_weight_norm(model)
    assert all(same_bits(effective(model, n), w) for n, w in used.items())
    with torch.no_grad():
        assert same_bits(model(x), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fold_leaves_parameters_in_any_grad_mode(mode: Any) -> None:
    """Under no_grad and inference_mode, convert and fold leave ordinary Parameters that train on."""
    model, x = net("frozen")
    with mode():
        wn.apply_weight_norm(model)
        wn.fold_weight_norm(model)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert all(type(p) is nn.Parameter and not p.is_inference() for p in model.parameters())
    model(x).sum().backward()
    assert model[2].weight.grad is not None  # type: ignore[index]


@pytest.mark.parametrize("name", NETS)
def test_copies_are_independent(name: str) -> None:
    """A deep copy, also one made after forward and backward, folds without touching the original, which trains on."""
    model, x = net(name)
    wn.apply_weight_norm(model)
    early = copy.deepcopy(model)
    out = model(x)
    out.square().sum().backward()
    late = copy.deepcopy(model)
    for twin in (early, late):
        wn.fold_weight_norm(twin)
        assert not wn.is_weight_normed(twin)
        assert same_bits(twin(x), out)
    assert wn.is_weight_normed(model)
    before = values(model)
    model(x).square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.grad is not None], lr=0.05).step()
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", NETS)
def test_pickled_whole(name: str) -> None:
    """A converted model pickles, ties included, and the loaded one folds to the same bits."""
    model, x = net(name)
    wn.apply_weight_norm(model)
    with torch.no_grad():
        expected = model(x)
    loaded = pickle.loads(pickle.dumps(model))
    assert [n for n, _ in loaded.named_parameters()] == [n for n, _ in model.named_parameters()]
    with torch.no_grad():
        assert same_bits(loaded(x), expected)
        assert same_bits(wn.fold_weight_norm(loaded)(x), expected)


def test_saved_whole_and_loaded_in_another_process(tmp_path: Path) -> None:
    """torch.save(model) of a converted net loads in a new process and computes the same bits."""
    model, x = net("encoder-layer")
    wn.apply_weight_norm(model)
    with torch.no_grad():
        torch.save({"model": model, "x": x, "y": model(x)}, tmp_path / "m.pt")
    code = (
        "import sys, torch\n"
        "d = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): assert torch.equal(d['model'](d['x']), d['y'])\n"
        "import wnsurgery\n"
        "wnsurgery.fold_weight_norm(d['model'])\n"
        "with torch.no_grad(): assert torch.equal(d['model'](d['x']), d['y'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "m.pt"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_averaged_model_is_a_copy() -> None:
    """torch's AveragedModel averages g and v of a converted net, and folding it leaves the net alone."""
    model, x = net("conv2d")
    wn.apply_weight_norm(model)
    average = AveragedModel(model)
    average.update_parameters(model)
    wn.fold_weight_norm(average)
    assert same_bits(average(x), model(x))
    assert wn.is_weight_normed(model)


def test_tied_weights_are_one_pair() -> None:
    """Tied embedding and head: one (g, v), one count, one step moves both, fold ties them again."""
    model, ids = net("tied")
    count = sum(p.numel() for p in model.parameters())
    wn.apply_weight_norm(model)
    embed, head = model.embed, model.head  # type: ignore[attr-defined]
    assert embed.parametrizations.weight.original0 is head.parametrizations.weight.original0
    assert embed.parametrizations.weight.original1 is head.parametrizations.weight.original1
    assert sum(p.numel() for p in model.parameters()) == count + 11 + 6
    model(ids).logsumexp(-1).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert torch.equal(embed.weight, head.weight)
    wn.fold_weight_norm(model)
    assert embed.weight is head.weight
    assert isinstance(embed.weight, nn.Parameter)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.ConvTranspose1d(4, 6, 3), torch.randn(2, 4, 5)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5)),
        (nn.ConvTranspose1d(4, 4, 3, groups=4), torch.randn(2, 4, 5)),
        (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5)),
        (nn.Linear(4, 6), torch.randn(7, 4)),
    ],
    ids=["transposed", "transposed-grouped", "transposed-depthwise", "grouped", "linear"],
)
def test_one_magnitude_is_one_output_channel(layer: nn.Module, x: Tensor) -> None:
    """Scaling one g changes exactly one output channel."""
    wn.apply_weight_norm(layer)
    g = layer.parametrizations.weight.original0  # type: ignore[union-attr]
    before = layer(x)
    axis = -1 if isinstance(layer, nn.Linear) else 1
    assert g.numel() == before.shape[axis]
    for channel in range(g.numel()):
        kept = g.detach().clone()
        with torch.no_grad():
            g.view(-1)[channel] *= 3
        changed = (layer(x) != before).movedim(axis, 0).flatten(1).any(1)
        assert changed.nonzero().flatten().tolist() == [channel]
        with torch.no_grad():
            g.copy_(kept)


@pytest.mark.parametrize("name", ["attention-packed", "attention-unpacked", "encoder-layer", "lstm-projected", "gru"])
def test_every_magnitude_is_used(name: str) -> None:
    """Scaling any g changes the output, also through attention's fast path (evaluation without gradients)."""
    model, x = net(name)
    wn.apply_weight_norm(model)
    for fast in (False, True):
        with torch.set_grad_enabled(not fast):
            before = model(x)
            for n, p in model.named_parameters():
                if n.endswith("original0"):
                    kept = p.detach().clone()
                    with torch.no_grad():
                        p.mul_(torch.linspace(1.5, 3.0, p.numel()).reshape(p.shape))
                    assert not torch.equal(model(x), before), n
                    with torch.no_grad():
                        p.copy_(kept)
            assert same_bits(model(x), before)


# Interoperation ------------------------------------------------------------------------------------------


def _legacy(layer: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, name, dim)


def test_state_dicts_cross_both_ways() -> None:
    """torch's state dicts, both layouts, load into ours; ours load into torch's; plain ones load into ours."""
    x = torch.randn(2, 3, 7)
    ours, theirs = wn.apply_weight_norm(nn.Conv1d(3, 4, 2)), parametrizations.weight_norm(nn.Conv1d(3, 4, 2))
    ours.load_state_dict(theirs.state_dict())
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    other = parametrizations.weight_norm(nn.Conv1d(3, 4, 2))
    other.load_state_dict(ours.state_dict())
    assert torch.allclose(other(x), ours(x), atol=1e-6)
    old = _legacy(nn.Conv1d(3, 4, 2))
    nested = nn.Sequential(wn.apply_weight_norm(nn.Conv1d(3, 4, 2)))
    nested.load_state_dict({f"0.{k}": v for k, v in old.state_dict().items()})
    assert torch.allclose(nested(x), old(x), atol=1e-6)
    plain = nn.Conv1d(3, 4, 2)
    ours.load_state_dict(plain.state_dict())
    assert same_bits(ours.weight, plain.weight)
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict(nn.Conv1d(3, 4, 3).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict({"bias": torch.zeros(4)})


def test_old_files_load_into_log_scale() -> None:
    """weight_g of an old file is g itself; a log-scale layer takes its logarithm."""
    old = _legacy(nn.Linear(3, 4))
    ours = wn.apply_weight_norm(nn.Linear(3, 4), magnitude="log")
    ours.load_state_dict(old.state_dict())
    x = torch.randn(2, 3)
    assert torch.allclose(ours(x), old(x), atol=1e-6)
    with torch.no_grad():
        old.weight_g[0] = -1
    with pytest.raises(wn.PairError, match="weight: a negative"):
        ours.load_state_dict(old.state_dict())


def test_modes_reach_the_parametrization() -> None:
    """A model converted in evaluation mode has no module in training mode, and train() reaches all."""
    model, _ = net("conv2d")
    wn.apply_weight_norm(model)
    assert not any(m.training for m in model.modules())
    assert all(m.training for m in model.train().modules())


def test_torch_removes_ours() -> None:
    """torch's remove_parametrizations takes our weight norm off, one tensor at a time."""
    lstm = nn.LSTM(3, 4)
    before = lstm.weight_hh_l0.detach().clone()
    wn.apply_weight_norm(lstm)
    parametrize.remove_parametrizations(lstm, "weight_hh_l0")
    assert same_bits(lstm.weight_hh_l0, before)
    assert parametrize.is_parametrized(lstm, "weight_ih_l0")
    wn.fold_weight_norm(lstm)
    assert type(lstm) is nn.LSTM
    lstm(torch.randn(2, 1, 3))


def test_fold_takes_all_kinds_in_one_tree() -> None:
    """Ours, torch's new and torch's legacy weight norm fold together, any dim and name, within 3 ulp of torch's op."""
    torch.manual_seed(0)
    model = nn.Sequential(
        wn.apply_weight_norm(nn.Linear(5, 4)),
        parametrizations.weight_norm(nn.Linear(5, 4)),
        parametrizations.weight_norm(nn.ConvTranspose1d(4, 4, 3), dim=1),
        parametrizations.weight_norm(nn.Conv1d(4, 4, 3), dim=2),
        _legacy(nn.Linear(5, 4), dim=None),
        _legacy(nn.LSTM(3, 4), "weight_hh_l0"),
    )
    model[1].requires_grad_(False)
    used = [m.weight_hh_l0 if isinstance(m, nn.LSTM) else m.weight for m in model]
    used = [u.detach().clone() for u in used]
    wn.fold_weight_norm(model)
    plain = [nn.Linear, nn.Linear, nn.ConvTranspose1d, nn.Conv1d, nn.Linear, nn.LSTM]
    assert [type(m) for m in model] == plain
    for module, w in zip(model, used, strict=True):
        folded = module.weight_hh_l0 if isinstance(module, nn.LSTM) else module.weight
        assert isinstance(folded, nn.Parameter)
        assert ((folded - w).abs() <= 3 * 2.0**-23 * w.abs()).all()
        assert not module._forward_pre_hooks
        assert not module._load_state_dict_pre_hooks
        assert list(module.state_dict()) == list(type(module)(*_arguments(module)).state_dict())
    assert not model[1].weight.requires_grad
    again = {n: id(p) for n, p in model.named_parameters()}
    assert {n: id(p) for n, p in wn.fold_weight_norm(model).named_parameters()} == again
    pickle.dumps(model)


def _arguments(module: Any) -> tuple[int, ...]:
    if isinstance(module, nn.LSTM):
        return 3, 4
    return (5, 4) if isinstance(module, nn.Linear) else (4, 4, 3)


def test_folding_a_copy_of_torchs_own_leaves_the_original() -> None:
    """A deep copy of a model under torch's weight norm shares its generated class; folding one spares the other."""
    for other in (False, True):
        model = parametrizations.weight_norm(nn.Linear(3, 4))
        if other:
            parametrize.register_parametrization(model, "bias", nn.Identity())
        twin, x = copy.deepcopy(model), torch.randn(2, 3)
        expected = model(x)
        wn.fold_weight_norm(twin)
        assert torch.allclose(twin(x), expected)
        assert same_bits(model(x), expected)
        assert parametrize.is_parametrized(twin, "bias") == other
        wn.apply_weight_norm(twin)
        assert same_bits(model(x), expected)
        wn.fold_weight_norm(model)
        assert type(twin) is not type(model)


@pytest.mark.parametrize("form", ["ours", "torch's", "legacy"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_model_under_any_weight_norm_is_compared_and_exported_as_the_plain_net(form: str, tmp_path: Path) -> None:
    make: Any = {"ours": wn.apply_weight_norm, "torch's": parametrizations.weight_norm, "legacy": nn.utils.weight_norm}
    torch.manual_seed(0)
    model, x = nn.Sequential(make[form](nn.Conv1d(40, 40, 3)), nn.ReLU()).eval(), torch.randn(2, 40, 9)
    plain: Any = wn.fold_weight_norm(copy_of(model))
    assert wn.is_weight_normed(model)
    assert not wn.is_weight_normed(plain)
    assert wn.verify(model, plain, x).ok
    assert wn.export_onnx(model, x, tmp_path / "a.onnx").folded == 1
    stored = [onnx.numpy_helper.to_array(item) for item in onnx.load(tmp_path / "a.onnx").graph.initializer]
    assert any(np.array_equal(item, plain[0].weight.detach().numpy()) for item in stored)


def test_recurrent_order_survives_a_mixture() -> None:
    """A legacy-normed LSTM whose other weights we convert folds to the order LSTM defines."""
    lstm = nn.LSTM(3, 4)
    order = list(lstm.state_dict())
    model = wn.apply_weight_norm(_legacy(lstm, "weight_hh_l0"))
    assert list(wn.fold_weight_norm(model).state_dict()) == order


def test_zero_rows_under_torch_fold_to_zeros() -> None:
    """A row where torch's weight norm gives NaN (v = 0, g = 0) folds to zeros."""
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[0] = 0
    parametrizations.weight_norm(layer)
    assert layer.weight[0].isnan().all()
    wn.fold_weight_norm(layer)
    assert torch.equal(layer.weight[0], torch.zeros(3))


# All or nothing ------------------------------------------------------------------------------------------


def test_an_error_in_the_middle_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the third weight fails, apply and fold leave the model exactly as it was."""
    from wnsurgery import hosts, surgery

    model, x = net("encoder-layer")
    for action, broken in ((wn.apply_weight_norm, "install"), (wn.fold_weight_norm, "restore_parameter")):
        trace, expected = state(model), model(x)
        original, calls = getattr(hosts, broken), []

        def fail(*args: Any, original: Any = original, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise MemoryError("the third")
            return original(*args)

        monkeypatch.setattr(surgery, broken, fail)
        with pytest.raises(MemoryError):
            action(model)
        monkeypatch.undo()
        assert state(model) == trace
        assert same_bits(model(x), expected)
        action(model)
        assert same_bits(model(x), expected)
    assert state(model) == state(net("encoder-layer")[0])


def _of_all_forms() -> nn.Module:
    """Our pairs, torch's and legacy ones, in modules that keep weights in lists, and that hold two kinds."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        legacy = nn.utils.weight_norm(nn.Linear(3, 4))
        mixed = nn.utils.weight_norm(wn.apply_weight_norm(nn.GRUCell(3, 4), include="*weight_ih"), "weight_hh")
    ours = wn.apply_weight_norm(nn.LSTM(3, 4, 2))
    return nn.ModuleList([legacy, parametrizations.weight_norm(nn.Linear(3, 4)), ours, mixed, nn.Linear(3, 4)])


class Final(nn.Linear):
    """Forbids subclasses."""

    def __init_subclass__(cls) -> None:
        raise TypeError("Final is final")


class Keyed(nn.Linear):
    """Wants a keyword of its subclasses."""

    def __init_subclass__(cls, *, key: str) -> None:
        cls.key = key  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [Final, Keyed])
def test_classes_that_cannot_be_subclassed_are_named(kind: type[nn.Module]) -> None:
    """The error names the layer and says what to do; the net is as it was, and converts without that layer."""
    model = nn.Sequential(nn.Linear(3, 3), kind(3, 3))
    before, bits = state(model), values(model)
    with pytest.raises(wn.SelectionError, match=rf"1\.weight: {kind.__name__} cannot be subclassed") as caught:
        wn.apply_weight_norm(model)
    assert "exclude='1.weight'" in str(caught.value.hint)
    assert state(model) == before
    assert all(torch.equal(bits[name], value) for name, value in values(model).items())
    wn.apply_weight_norm(model, exclude="1.weight")


@pytest.mark.parametrize("failing", range(1, 13))
def test_folding_that_fails_puts_every_form_back(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever weight of whatever form folding fails at, all modules have their attributes, tables and classes again,
    the very same objects."""
    from wnsurgery import surgery

    def everything(model: nn.Module) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, module in model.named_modules():
            found[f"{name} class"] = type(module)
            found |= {f"{name}.{n}": id(a) for n, a in module.__dict__.items() if n not in PASSING}
            tables = {n: a for n, a in module.__dict__.items() if isinstance(a, dict)}
            found |= {f"{name}.{n} table": [(key, id(held)) for key, held in a.items()] for n, a in tables.items()}
        return found

    model = _of_all_forms()
    before, calls = everything(model), []

    def counted(original: Any) -> Any:
        def run(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == failing:
                raise MemoryError
            return original(*args)

        return run

    monkeypatch.setattr(surgery, "_remove_legacy", counted(surgery._remove_legacy))
    monkeypatch.setattr(surgery, "_remove_parametrized", counted(surgery._remove_parametrized))
    monkeypatch.setattr(surgery, "_refresh_recurrent", counted(surgery._refresh_recurrent))
    with pytest.raises(MemoryError):
        wn.fold_weight_norm(model)
    assert everything(model) == before
    monkeypatch.undo()
    wn.fold_weight_norm(model)
    assert not wn.is_weight_normed(model)


@pytest.mark.parametrize("few", [1, 2, 3, 512])
@pytest.mark.parametrize("kernels", [False, True])
def test_small_weights_computed_a_few_at_a_time(few: int, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many small weights are computed at once, each is folded to its own bits, ordinary or not, and is a
    Parameter like any other: with its flag, in memory of its own, that can be trained, copied and resized."""
    if kernels and not fused.start():
        pytest.skip("needs numba")
    monkeypatch.setattr("wnsurgery.fused.started", lambda: kernels)
    monkeypatch.setattr("wnsurgery.surgery._FEW", few)
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(3, 2 + i % 3) for i in range(7)])
    with torch.no_grad():
        model[2].weight[0] = 0
        model[4].weight.mul_(1e-30)
    model[5].weight.requires_grad_(False)
    plain = [layer.weight.detach().clone() for layer in model]
    wn.apply_weight_norm(model)
    pairs = [halves(layer) for layer in model]
    assert [g.requires_grad and v.requires_grad for g, v in pairs] == [i != 5 for i in range(7)]
    assert all(same_bits(layer.weight, w) for layer, w in zip(model, plain, strict=True))
    with torch.no_grad():
        for g, _ in pairs:
            g.mul_(1.7)
    expected = [wn.compose(g.detach(), v.detach()) for g, v in pairs]
    with torch.inference_mode():
        wn.fold_weight_norm(model)
    for i, (layer, w) in enumerate(zip(model, expected, strict=True)):
        weight = layer.weight
        assert type(weight) is nn.Parameter
        assert same_bits(weight, w)
        assert weight.requires_grad is (i != 5)
        assert weight.is_leaf
        assert weight.untyped_storage().nbytes() == weight.nbytes
        assert not weight.is_inference()
        assert same_bits(copy.deepcopy(weight), w)
    model[0](torch.randn(2, 3)).sum().backward()
    assert model[0].weight.grad is not None
    with torch.no_grad():
        model[5].weight.resize_(1, 3)


def test_not_finite_weights_are_refused_by_name() -> None:
    """NaN or infinity in one weight refuses the whole conversion, names it, and changes nothing."""
    model, _ = net("linear")
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(wn.NonFiniteWeightError, match=r"2\.weight: 1 of 8"):
        wn.apply_weight_norm(model)
    assert not wn.is_weight_normed(model)


def test_applying_twice_is_harmless() -> None:
    """A converted model is left as it is; a freshly added layer is converted."""
    model, x = net("linear")
    wn.apply_weight_norm(model)
    ids = [id(p) for p in model.parameters()]
    wn.apply_weight_norm(model)
    assert [id(p) for p in model.parameters()] == ids
    model.append(nn.Linear(2, 2))  # type: ignore[operator]
    wn.apply_weight_norm(model)
    assert len(wn.inspect(model).weights) == 3
    model(x)


# Writing through the weight ------------------------------------------------------------------------------


@pytest.mark.parametrize("made_by", [wn.apply_weight_norm, lambda m: parametrizations.weight_norm(m[0]) and m])
def test_wishes_that_do_not_reach_weights_converted_before_are_logged(made_by: Any, caplog: Any) -> None:
    """Applying again with an initialisation or frozen magnitudes changes nothing of what is converted, and says so."""
    caplog.set_level("WARNING", logger="wnsurgery")
    model = made_by(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    before = copy.deepcopy(model.state_dict())
    for options, words in (
        ({}, []),
        ({"init": "data", "data": torch.randn(9, 3)}, ["init='data'", "1 weights", "data_dependent_init"]),
        ({"init": "fan"}, ["init='fan'", "1 weights", "fan_init"]),
        ({"freeze_magnitude": True}, ["freeze_magnitude=True", "1 weights", "call freeze_magnitude"]),
    ):
        caplog.clear()
        wn.apply_weight_norm(model, **options)
        assert len(caplog.records) == bool(words)
        assert all(word in caplog.text for word in words)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.append(nn.Linear(3, 3))
    caplog.clear()
    wn.apply_weight_norm(model, include="2", init="fan", freeze_magnitude=True)
    assert not caplog.records
    wn.freeze_magnitude(model)
    wn.apply_weight_norm(model, freeze_magnitude=True)
    assert not caplog.records


def test_writes_into_the_weight_take_effect() -> None:
    """nn.init on module.weight, reset_parameters and assignment reach g and v before anything else reads them."""
    layer = wn.apply_weight_norm(nn.Linear(3, 4))
    nn.init.constant_(layer.weight, 0.5)
    assert same_bits(layer.weight, torch.full((4, 3), 0.5))
    nn.init.constant_(layer.weight, 0.25)
    assert torch.equal(layer.state_dict()["parametrizations.weight.original1"], torch.full((4, 3), 0.25))
    nn.init.zeros_(layer.weight)
    assert torch.equal(layer(torch.ones(1, 3)), layer.bias[None])
    w = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, w)
    target = torch.randn(4, 3)
    layer.weight = target
    assert same_bits(layer.weight, target)
    with torch.no_grad():
        target.zero_()
    assert layer.weight.abs().sum() > 0
    with pytest.raises(wn.PairError):
        layer.weight = torch.randn(4, 2)


def test_writes_through_any_live_handle_take_effect() -> None:
    """A write lands even if the weight was read again before it, as in nn.init.normal_(m.weight, std=f(m.weight))."""

    def fresh() -> tuple[nn.Module, Tensor]:
        layer = wn.apply_weight_norm(nn.Linear(3, 4))
        return layer, layer.weight.detach().clone()

    layer, w = fresh()
    nn.init.constant_(layer.weight, float(layer.weight.shape[0]))
    assert same_bits(layer.weight, torch.full((4, 3), 4.0))
    layer, w = fresh()
    with torch.no_grad():
        layer.weight.copy_(layer.weight * 2)
    assert same_bits(layer.weight, w * 2)
    layer, w = fresh()
    first, _second = layer.weight, layer.weight
    with torch.no_grad():
        first.fill_(3.0)
    assert same_bits(layer.weight, torch.full((4, 3), 3.0))
    layer, w = fresh()
    with torch.inference_mode():
        nn.init.ones_(layer.weight)
    assert same_bits(layer.weight, torch.ones(4, 3))
    layer(torch.ones(1, 3)).sum().backward()


def test_a_write_followed_by_a_load_is_overruled() -> None:
    """What is written last wins: a state dict loaded after nn.init is not undone by the earlier write."""
    layer = wn.apply_weight_norm(nn.Linear(3, 4))
    kept = copy.deepcopy(layer.state_dict())
    expected = layer.weight.detach().clone()
    nn.init.ones_(layer.weight)
    layer.load_state_dict(kept)
    assert same_bits(layer.weight, expected)


def test_recurrent_reset_draws_plain_weights() -> None:
    """LSTM.reset_parameters, which fills every parameter, fills the weights and not g and v."""
    lstm = wn.apply_weight_norm(nn.LSTM(3, 16))
    lstm.reset_parameters()
    assert lstm.weight_hh_l0.abs().max() <= 0.25
    assert (lstm.parametrizations.weight_hh_l0.original0 > 0).all()  # type: ignore[union-attr]
    lstm(torch.randn(2, 1, 3))


# Options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, -1, (0, 1), None])
@pytest.mark.parametrize("magnitude", ["linear", "log"])
def test_kept_axes_can_be_asked_for(dim: Any, magnitude: Any) -> None:
    """Any kept axes, linear or log-scale, convert and fold exactly; torch reads the same g where it can."""
    layer = nn.ConvTranspose1d(4, 6, 3)
    before = layer.weight.detach().clone()
    wn.apply_weight_norm(layer, dim=dim, magnitude=magnitude)
    assert same_bits(layer.weight, before)
    if magnitude == "linear" and not isinstance(dim, tuple):
        theirs = parametrizations.weight_norm(nn.ConvTranspose1d(4, 6, 3), dim=2 if dim == -1 else dim)
        theirs.load_state_dict(layer.state_dict())
        assert (theirs.weight - before).abs().max() < 1e-6
    with torch.no_grad():
        layer.parametrizations.weight.original0.add_(0.5)  # type: ignore[union-attr]
    used = layer.weight.detach().clone()
    wn.fold_weight_norm(layer)
    assert same_bits(layer.weight, used)


def test_frozen_magnitude_keeps_every_norm() -> None:
    """freeze_magnitude trains directions only: row norms stay, directions turn."""
    layer = wn.apply_weight_norm(nn.Linear(3, 4), freeze_magnitude=True)
    norms, w = layer.weight.norm(dim=1).detach(), layer.weight.detach().clone()
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], 0.1)
    for _ in range(5):
        layer(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    assert torch.allclose(layer.weight.norm(dim=1), norms, rtol=1e-6)
    assert not torch.allclose(layer.weight, w, atol=1e-2)
    assert wn.fold_weight_norm(layer).weight.requires_grad


def test_meta_device_then_load() -> None:
    """A net converted on the meta device takes its values from a state dict with assign=True."""
    source, x = net("conv2d")
    wn.apply_weight_norm(source)
    with torch.device("meta"):
        model = net("conv2d")[0]
    wn.apply_weight_norm(model)
    assert all(p.is_meta for n, p in model.named_parameters() if "original" in n)
    model.load_state_dict(source.state_dict(), assign=True)
    assert same_bits(model(x), source(x))


def test_wrapped_models_are_refused() -> None:
    """Surgery under DistributedDataParallel, which holds the old parameters, is an error and not a silent failure."""
    model = nn.Sequential(nn.Linear(2, 2))
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    with pytest.raises(wn.SelectionError, match="DistributedDataParallel"):
        wn.apply_weight_norm(wrapper)


def test_attributes_on_parameters_survive() -> None:
    """What people hang on a Parameter is on v while converted and on the weight again after folding."""
    layer = nn.Linear(3, 4)
    layer.weight.decay = False  # type: ignore[attr-defined]
    wn.apply_weight_norm(layer)
    assert layer.parametrizations.weight.original1.decay is False  # type: ignore[union-attr]
    assert wn.fold_weight_norm(layer).weight.decay is False  # type: ignore[attr-defined]


@pytest.mark.parametrize("stored", ["linear", "log"])
@pytest.mark.parametrize("model", ["linear", "log"])
def test_a_live_model_reads_either_magnitude(stored: str, model: str) -> None:
    """load_state_dict tells g from log g by the file's own mark, whichever the model trains."""
    source = wn.apply_weight_norm(nn.Linear(3, 4), magnitude=stored)  # type: ignore[arg-type]
    target = wn.apply_weight_norm(nn.Linear(3, 4), magnitude=model)  # type: ignore[arg-type]
    target.load_state_dict(source.state_dict())
    assert torch.allclose(target.weight, source.weight, rtol=1e-6, atol=0)
    if stored == model:
        assert same_bits(target.weight, source.weight)


def test_a_log_scale_state_dict_does_not_pass_for_a_linear_one() -> None:
    """torch's own weight norm knows only g: loading log g into it is an error, not another function."""
    ours = wn.apply_weight_norm(nn.Linear(3, 4), magnitude="log")
    with pytest.raises(RuntimeError, match="log_scale"):
        parametrizations.weight_norm(nn.Linear(3, 4)).load_state_dict(ours.state_dict())
