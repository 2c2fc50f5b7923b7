"""Checkpoint files end to end: fold, convert, load and save; whole modules without running their pickle."""

from __future__ import annotations

import copy
import io
import os
import pickle
import pkgutil
import subprocess
import sys
import threading
import warnings
import zipfile
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import wnsurgery.files
from wnsurgery.errors import (
    InputError,
    InputMissingError,
    NonFiniteWeightError,
    OutputError,
    OutputExistsError,
    PairError,
    SelectionError,
    UnsafeFileError,
)
from wnsurgery.files import convert_checkpoint, fold_checkpoint, load_model, load_object, load_tensors, save_model
from wnsurgery.hosts import rebuild_parametrized
from wnsurgery.inout import example_inputs
from wnsurgery.stores import Stored, write_store
from wnsurgery.surgery import apply_weight_norm, fold_weight_norm, is_weight_normed


def legacy(module, name="weight", dim=0):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module, name, dim)


def plain_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(3, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(30, 5)
    )


def legacy_net():
    net = plain_net()
    for i in (0, 2, 4):
        legacy(net[i])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.25)
    return net


class OwnClass(nn.Module):
    """A user's class: no file may build it without trust."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 2)

    def forward(self, x):
        return self.lin(x)


def x_in():
    return torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))


def listing(directory):
    return sorted(p.name for p in directory.iterdir())


@pytest.fixture
def legacy_file(tmp_path):
    torch.save({"generator": legacy_net().state_dict(), "steps": 7}, tmp_path / "g.pth")
    return tmp_path / "g.pth"


# Fold and convert ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_folded_file_loads_strictly_and_equals_the_folded_module(tmp_path, suffix):
    """The file folds to the bits of the live module and loads into the plain model."""
    net = legacy_net()
    source = tmp_path / f"in{suffix}"
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(net.state_dict(), source)
    before = source.read_bytes()
    report = fold_checkpoint(source, tmp_path / f"out{suffix}")
    assert [s.name for s in report.folded] == ["0.weight", "2.weight", "4.weight"]
    assert source.read_bytes() == before
    tensors = load_tensors(tmp_path / f"out{suffix}")
    plain = plain_net()
    plain.load_state_dict(tensors, strict=True)
    folded = fold_weight_norm(net).state_dict()
    assert all(torch.equal(tensors[k], folded[k]) for k in folded)


def test_wrapped_files_keep_everything_else(legacy_file, tmp_path):
    """Entries beside the state dict come through as they were."""
    report = fold_checkpoint(legacy_file, tmp_path / "out.pth")
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    assert list(content) == ["generator", "steps"]
    assert content["steps"] == 7
    assert type(content["generator"]) is OrderedDict
    assert content["generator"]._metadata == legacy_net().state_dict()._metadata
    assert report.folded[0].name == "generator.0.weight"


def test_there_and_back_restores_the_tensors(tmp_path):
    """Converting a plain file and folding it again gives equal tensors, and the same bytes when done twice."""
    torch.save(plain_net().state_dict(), tmp_path / "a.pt")
    for layout in ("parametrized", "legacy"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", layout=layout, force=True)
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "b2.pt", layout=layout, force=True)
        assert (tmp_path / "b.pt").read_bytes() == (tmp_path / "b2.pt").read_bytes()
        assert not set(load_tensors(tmp_path / "b.pt")) & {"0.weight", "2.weight", "4.weight"}
        fold_checkpoint(tmp_path / "b.pt", tmp_path / "c.pt", force=True)
        a, c = load_tensors(tmp_path / "a.pt"), load_tensors(tmp_path / "c.pt")
        assert list(a) == list(c)
        assert all(torch.equal(a[k], c[k]) for k in a)


def test_layouts_translate_between_files(legacy_file, tmp_path):
    """A legacy file converts to the parametrized layout and back with the same tensors."""
    report = convert_checkpoint(legacy_file, tmp_path / "new.pth", include="generator*")
    assert len(report.rekeyed) == 3
    assert "generator.0.parametrizations.weight.original0" in load_tensors(tmp_path / "new.pth")
    convert_checkpoint(tmp_path / "new.pth", tmp_path / "old.pth", layout="legacy")
    a, b = load_tensors(legacy_file), load_tensors(tmp_path / "old.pth")
    assert set(a) == set(b)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_suffix_decides_the_format_and_losses_are_said(tmp_path):
    """.pt to .safetensors and back; shared tensors and dropped metadata are warnings."""
    w = torch.randn(3, 3)
    torch.save({"a.weight": w, "b.weight": w}, tmp_path / "in.pt")
    report = fold_checkpoint(tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert any("share" in text for text in report.warnings)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out.safetensors")["b.weight"], w)
    safetensors.torch.save_file({"a": w}, tmp_path / "m.safetensors", {"format": "pt"})
    report = fold_checkpoint(tmp_path / "m.safetensors", tmp_path / "m.bin")
    assert any("metadata" in text for text in report.warnings)
    assert torch.equal(torch.load(tmp_path / "m.bin", weights_only=True)["a"], w)
    fold_checkpoint(tmp_path / "m.safetensors", tmp_path / "noext")
    with safetensors.safe_open(tmp_path / "noext", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    torch.save({"sd": {"a": w}, "epoch": 1}, tmp_path / "nested.pt")
    report = fold_checkpoint(tmp_path / "nested.pt", tmp_path / "nested.safetensors")
    assert any("epoch" in text for text in report.warnings)
    assert safetensors.torch.load_file(tmp_path / "nested.safetensors").keys() == {"a"}


@pytest.mark.parametrize("magnitude", ["linear", "log"])
@pytest.mark.parametrize("whole", [True, False])
def test_steps_tell_the_keys_that_go_and_come(whole, magnitude, tmp_path):
    """Sources and targets are keys of state dicts, before and after, also of a module saved whole."""
    net = plain_net()
    torch.save({"net": net if whole else net.state_dict()}, tmp_path / "plain.pt")
    files = [tmp_path / name for name in ("plain.pt", "wn.pt", "folded.pt")]
    reports = [convert_checkpoint(*files[:2], magnitude=magnitude), fold_checkpoint(*files[1:])]
    keys = [set(load_tensors(file)) for file in files]
    for report, before, after in zip(reports, keys[:-1], keys[1:], strict=True):
        steps = report.to_json()["steps"]
        assert {step["path"] for step in steps} == {"net"}
        assert {f"net.{key}" for step in steps for key in step["sources"]} == before - after
        assert {f"net.{key}" for step in steps for key in step["targets"]} == after - before
        assert [step["name"] for step in steps] == [s["name"] for s in reports[0].to_json()["steps"]]


def test_outputs_are_protected(legacy_file, tmp_path):
    """An existing output, and the input itself, are only overwritten when asked, and never by a failed run."""
    out = tmp_path / "out.pth"
    out.write_bytes(b"precious")
    for job in (fold_checkpoint, convert_checkpoint):
        with pytest.raises(OutputExistsError):
            job(legacy_file, out)
        with pytest.raises(OutputExistsError):
            job(legacy_file, legacy_file, force=True)
        with pytest.raises(OutputError):
            job(legacy_file, tmp_path / "none" / "out.pth")
    assert out.read_bytes() == b"precious"
    bad = tmp_path / "bad.pth"
    torch.save({"c.weight_g": torch.ones(2, 1)}, bad)
    with pytest.raises(PairError, match=r"bad\.pth: c\.weight_g"):
        fold_checkpoint(bad, out, force=True)
    assert out.read_bytes() == b"precious"
    fold_checkpoint(legacy_file, out, force=True)
    fold_checkpoint(legacy_file, legacy_file, in_place=True)
    assert legacy_file.read_bytes() == out.read_bytes()
    assert listing(tmp_path) == ["bad.pth", "g.pth", "out.pth"]


def test_a_dry_run_reports_and_writes_nothing(legacy_file, tmp_path):
    """The report of a dry run is the report of the run."""
    before = legacy_file.read_bytes()
    for job in (fold_checkpoint, convert_checkpoint):
        dry = job(legacy_file, legacy_file, dry_run=True)
        assert listing(tmp_path) == ["g.pth"]
        assert legacy_file.read_bytes() == before
        real = job(legacy_file, tmp_path / "out.pth")
        assert dry == real
        (tmp_path / "out.pth").unlink()


def test_errors_have_their_exit_codes(tmp_path):
    """Missing and damaged inputs are 3, unfinite weights 3, patterns without match 2."""
    with pytest.raises(InputMissingError) as caught:
        fold_checkpoint(tmp_path / "none.pt", tmp_path / "out.pt")
    assert caught.value.exit_code == 3
    torch.save(plain_net().state_dict(), tmp_path / "m.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "m.pt").read_bytes()[:-200])
    with pytest.raises(InputError) as caught:
        convert_checkpoint(tmp_path / "cut.pt", tmp_path / "out.pt")
    assert caught.value.exit_code == 3
    with pytest.raises(SelectionError) as caught:
        convert_checkpoint(tmp_path / "m.pt", tmp_path / "out.pt", include="decoder*")
    assert caught.value.exit_code == 2
    torch.save({"a.weight": torch.full((2, 2), torch.nan)}, tmp_path / "nan.pt")
    with pytest.raises(NonFiniteWeightError, match=r"nan\.pt: a\.weight") as caught:
        convert_checkpoint(tmp_path / "nan.pt", tmp_path / "out.pt")
    assert caught.value.exit_code == 3
    assert "out.pt" not in listing(tmp_path)


# Whole modules -------------------------------------------------------------------------------------------


def whole_zoo():
    torch.manual_seed(0)
    return nn.ModuleDict({
        "encoder": nn.TransformerEncoderLayer(8, 2, 16, activation="gelu"),
        "decoder": nn.TransformerDecoderLayer(8, 2, 16, activation=F.silu),
        "attention": nn.MultiheadAttention(8, 2, kdim=4, vdim=4),
        "lstm": nn.LSTM(4, 4, proj_size=2, bidirectional=True),
        "cell": nn.GRUCell(3, 4),
        "list": nn.ParameterList([nn.Parameter(torch.ones(2, 2))]),
        "embedding": nn.Embedding(3, 4),
        "up": nn.ConvTranspose1d(4, 6, 3, groups=2),
        "norm": nn.Sequential(nn.BatchNorm1d(3), nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.Dropout(), nn.Softmax(-1)),
        "bilinear": nn.Bilinear(2, 3, 4),
        "loss": nn.CTCLoss(),
        "upsample": nn.Upsample(scale_factor=2),
        "fp16": nn.Linear(3, 3).half(),
    })  # fmt: skip


def test_whole_modules_of_torch_classes_convert_and_fold_without_trust(tmp_path):
    """Every kind of torch.nn module goes through files whole: converted, loaded in a new process, folded, equal."""
    zoo = whole_zoo()
    torch.save(zoo, tmp_path / "zoo.pt")
    report = convert_checkpoint(tmp_path / "zoo.pt", tmp_path / "wn.pt")
    assert {s.name for s in report.converted} >= {"up.weight", "lstm.weight_hr_l0", "attention.q_proj_weight"}
    assert next(s for s in report.converted if s.name == "up.weight").axes.groups == 2
    assert "lookup" in next(s.reason for s in report.skipped if s.name == "embedding.weight")
    fold = "import sys; from wnsurgery.files import fold_checkpoint as f; print(len(f(*sys.argv[1:]).folded))"
    command = [sys.executable, "-c", fold, str(tmp_path / "wn.pt"), str(tmp_path / "back.pt")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == [
        str(len(report.steps))
    ]
    back = load_model(tmp_path / "back.pt")
    assert str(back) == str(zoo)
    assert list(back.state_dict()) == list(zoo.state_dict())
    assert all(torch.equal(t, back.state_dict()[k]) for k, t in zoo.state_dict().items())


def test_whole_legacy_modules_load_fold_and_run(tmp_path):
    """torch's legacy weight norm in a whole-module file, also inside a wrapper, folds without trust."""
    net = legacy_net()
    torch.save({"model": net, "iteration": 5}, tmp_path / "waveglow.pt")
    loaded = load_model(tmp_path / "waveglow.pt")
    assert torch.equal(loaded(x_in()), net(x_in()))
    report = fold_checkpoint(tmp_path / "waveglow.pt", tmp_path / "plain.pt")
    assert [s.name for s in report.folded] == ["model.0.weight", "model.2.weight", "model.4.weight"]
    assert load_object(tmp_path / "plain.pt")["iteration"] == 5
    folded = load_model(tmp_path / "plain.pt")
    assert not is_weight_normed(folded)
    assert torch.equal(folded[0].weight, fold_weight_norm(net)[0].weight)


def test_training_mode_and_frozen_weights_survive(tmp_path):
    """A module file keeps modes and requires_grad through conversion and folding."""
    net = plain_net().eval()
    net[0].requires_grad_(False)
    torch.save(net, tmp_path / "a.pt")
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt")
    fold_checkpoint(tmp_path / "b.pt", tmp_path / "c.pt")
    for name in ("b.pt", "c.pt"):
        loaded = load_model(tmp_path / name)
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded[0].parameters())
        assert all(p.requires_grad for p in loaded[4].parameters())
        assert torch.equal(loaded(x_in()), net(x_in()))


def test_torch_loads_a_converted_module_whose_classes_it_was_told_of(tmp_path):
    """With what torch names as missing on its list, its restricted loading makes the module; converting one without
    that puts nothing there."""
    before = torch.serialization.get_safe_globals()
    net = apply_weight_norm(plain_net())
    assert torch.serialization.get_safe_globals() == before
    torch.save(net, tmp_path / "m.pt")
    names = torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "m.pt")
    with torch.serialization.safe_globals([pkgutil.resolve_name(name) for name in names]):
        loaded = torch.load(tmp_path / "m.pt", weights_only=True)
    assert torch.equal(loaded(x_in()), net(x_in()))


def test_loading_a_module_leaves_torchs_allow_list_as_it_was(tmp_path):
    """The list of allowed classes is one per process: what the user put there stays, what we needed goes."""
    torch.save(apply_weight_norm(plain_net()), tmp_path / "m.pt")
    before = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([nn.Linear]):
        inside = set(map(id, torch.serialization.get_safe_globals()))
        load_model(tmp_path / "m.pt")
        assert set(map(id, torch.serialization.get_safe_globals())) == inside
    assert set(map(id, torch.serialization.get_safe_globals())) == set(map(id, before))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "m.pt", weights_only=True)


def test_threads_may_load_at_once(tmp_path):
    """Two threads that load module files do not take each other's permissions away."""
    torch.save(apply_weight_norm(plain_net()), tmp_path / "m.pt")
    failures = []

    def work():
        try:
            for _ in range(5):
                load_model(tmp_path / "m.pt")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []


# Whole modules from strangers ----------------------------------------------------------------------------


class Calls:
    """Pickles as a call, with a state to set afterwards if one is given."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


def with_state(module, **state):
    module.__dict__.update(state)
    return module


def bad_hook_pair():
    net = legacy(nn.Linear(4, 4))
    net.weight_g = nn.Parameter(torch.ones(2, 1))
    return net


def own_hook(hook):
    net = nn.Linear(2, 2)
    net._forward_pre_hooks[0] = hook
    return net


def posing_hook():
    net = legacy(nn.Linear(2, 2))
    net._forward_pre_hooks[0] = with_state(nn.ReLU(), name="weight", dim=0)
    return net


def state_hook():
    net = nn.Linear(2, 2)
    net._state_dict_hooks[0] = F.relu
    return net


def no_tables():
    net = nn.Linear(2, 2)
    del net.__dict__["_modules"]
    return net


HOSTILE = {
    "own class": OwnClass,
    "system": lambda: [nn.Linear(2, 2), Calls(os.system, "exit 1")],
    "constructor": lambda: [Calls(nn.Linear, 10, 10)],
    "constructor of hook": lambda: [nn.Linear(2, 2), Calls(nn.utils.weight_norm.__globals__["WeightNorm"], "w", 0)],
    "rebuild with dunder": lambda: Calls(rebuild_parametrized, nn.Linear, ("__class__",)),
    "rebuild over forward": lambda: Calls(rebuild_parametrized, nn.Linear, ("forward",)),
    "rebuild of a function": lambda: Calls(rebuild_parametrized, F.relu, ("weight",)),
    "rebuild with arguments": lambda: Calls(rebuild_parametrized, nn.Linear, ("weight",), 4, 4),
    "rebuild by": lambda: Calls(wnsurgery.hosts._rebuild_by, F.relu, (torch.ones(1),), ("weight",)),
    "forward replaced": lambda: with_state(nn.Linear(2, 2), forward=F.relu),
    "setstate replaced": lambda: with_state(nn.Linear(2, 2), __setstate__=F.relu),
    "reduce replaced": lambda: with_state(nn.Linear(2, 2), __deepcopy__=F.relu),
    "property hidden": lambda: with_state(nn.LSTM(2, 2), all_weights=[["weight_ih_l0"]]),
    "class as a value": lambda: with_state(nn.Linear(2, 2), kind=nn.ReLU),
    "foreign hook": lambda: own_hook(F.relu),
    "module as hook": lambda: own_hook(nn.ReLU()),
    "module that poses as weight norm's hook": posing_hook,
    "state-dict hook": state_hook,
    "hook with a pair that does not fit": bad_hook_pair,
    "no tables": no_tables,
    "parameter table": lambda: with_state(nn.Linear(2, 2), _parameters={"weight": F.relu}),
    "module table": lambda: with_state(nn.Linear(2, 2), _modules={"a": torch.ones(1)}),
    "lazy": lambda: nn.LazyLinear(3),
    "data parallel": lambda: nn.DataParallel(nn.Linear(2, 2)),
    "partial": lambda: with_state(nn.Linear(2, 2), f=__import__("functools").partial(F.relu)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_modules_that_are_more_than_torch_classes_are_refused(tmp_path, case):
    """Calls, constructors, redirected methods, foreign hooks and own classes are exit 4, for every command."""
    path = tmp_path / "m.pt"
    torch.save(HOSTILE[case](), path)
    for job in (load_object, load_model, load_tensors, lambda p: fold_checkpoint(p, tmp_path / "out.pt")):
        with pytest.raises(UnsafeFileError) as caught:
            job(path)
        assert caught.value.exit_code == 4
        assert "trust" in caught.value.hint
    assert listing(tmp_path) == ["m.pt"]


def test_the_refusal_names_the_class_and_both_ways_out(tmp_path):
    """The error says which class was met and what to do about it, and trust then loads it."""
    torch.save(OwnClass(), tmp_path / "m.pt")
    with pytest.raises(UnsafeFileError, match="OwnClass") as caught:
        load_model(tmp_path / "m.pt")
    assert "--arch" in caught.value.hint
    assert "--trust-pickle" in caught.value.hint
    assert isinstance(load_model(tmp_path / "m.pt", trust_pickle=True), OwnClass)
    report = convert_checkpoint(tmp_path / "m.pt", tmp_path / "wn.pt", trust_pickle=True)
    assert [s.name for s in report.converted] == ["lin.weight"]
    assert is_weight_normed(load_model(tmp_path / "wn.pt", trust_pickle=True))


def test_old_serialisation_of_whole_modules_needs_trust(tmp_path):
    """Files of that age carry source code, which torch reads only when trusted."""
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsafeFileError, match="old file format"):
        load_model(tmp_path / "m.pt")
    assert isinstance(load_model(tmp_path / "m.pt", trust_pickle=True), nn.Sequential)


def test_no_constructor_runs_while_a_module_is_read(tmp_path, monkeypatch):
    """Reading makes empty instances and sets their state; random numbers stay where they were."""
    torch.save(plain_net(), tmp_path / "m.pt")

    def init(*_args, **_kwargs):
        raise AssertionError("a constructor ran")

    monkeypatch.setattr(nn.Linear, "__init__", init)
    monkeypatch.setattr(nn.Conv1d, "__init__", init)
    before = torch.get_rng_state()
    load_model(tmp_path / "m.pt")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_changed_pickle_behind_a_clean_one_is_not_read(tmp_path):
    """The pickle that is looked over and the one torch reads are the same record."""
    torch.save(plain_net(), tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as old:
        records = [(i.filename, old.read(i)) for i in old.infolist()]
    evil = io.BytesIO()
    torch.save(Calls(os.system, f"touch {tmp_path / 'owned'}"), evil)
    with zipfile.ZipFile(evil) as z:
        payload = z.read("archive/data.pkl")
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as new:
        new.writestr("x/data.pkl", payload)
        for name, data in records:
            new.writestr(name, data)
    with pytest.raises((UnsafeFileError, InputError)):
        load_model(tmp_path / "m.pt")
    assert not (tmp_path / "owned").exists()


# With the model's code -----------------------------------------------------------------------------------


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module `some_nets` in the working directory."""
    (tmp_path / "some_nets.py").write_text(
        "import warnings\nfrom torch import nn\n"
        "def plain():\n    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 6, 2, groups=2),"
        " nn.Flatten(), nn.Linear(30, 5))\n"
        "def new():\n    m = plain()\n    nn.utils.parametrizations.weight_norm(m[0])\n    return m\n"
        "def needs_arguments(x):\n    return plain()\n"
        "def nothing():\n    return None\n"
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("some_nets", None)


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 1}, lambda s: {f"module.{k}": v for k, v in s.items()}]
)
@pytest.mark.parametrize("arch", ["some_nets:plain", "some_nets:new"])
def test_state_dicts_load_into_any_layout_of_the_model(nets, arch, wrap):
    """Legacy pairs, wrapped or prefixed by DDP, load strictly into plain and parametrized models."""
    net = legacy_net()
    torch.save(wrap(dict(net.state_dict())), "sd.pt")
    path_before = list(sys.path)
    model = load_model("sd.pt", arch=arch)
    assert sys.path == path_before
    assert torch.allclose(model(x_in()), net(x_in()), rtol=1e-5, atol=1e-6)
    assert torch.equal(fold_weight_norm(model)[0].weight, fold_weight_norm(net)[0].weight)


@pytest.mark.parametrize("stored", ["plain", "linear", "log"])
@pytest.mark.parametrize("model", ["linear", "log"])
def test_linear_and_log_magnitudes_are_not_confused(nets, stored, model):
    """Whichever way the file and the model keep g, the loaded weight is the file's weight."""
    net = plain_net()
    w = net[0].weight.detach().clone()
    if stored != "plain":
        apply_weight_norm(net, magnitude=stored)
    torch.save(net.state_dict(), "sd.pt")

    def arch():
        return apply_weight_norm(plain_net().requires_grad_(True), magnitude=model)

    loaded = load_model("sd.pt", arch=arch)
    assert torch.allclose(loaded[0].weight, w, rtol=1e-6, atol=0)
    folded = fold_checkpoint("sd.pt", "f.pt")
    assert len(folded.folded) == (0 if stored == "plain" else 3)
    assert torch.equal(load_tensors("f.pt")["0.weight"], w)


def test_other_keys_beside_the_models_are_ignored_by_prefix(nets):
    """A checkpoint with a generator and a discriminator loads the one that fits."""
    sd = {f"net_g.{k}": v for k, v in plain_net().state_dict().items()} | {"net_d.weight": torch.ones(2, 2)}
    torch.save({"state_dict": sd}, "sd.pt")
    model = load_model("sd.pt", arch="some_nets:plain")
    assert torch.equal(model(x_in()), plain_net()(x_in()))


def test_what_does_not_fit_is_an_input_error(nets):
    """Missing, unexpected and misshapen tensors are named; several fitting state dicts are ambiguous."""
    sd = dict(plain_net().state_dict())
    torch.save({k: v for k, v in sd.items() if k != "0.bias"}, "missing.pt")
    with pytest.raises(InputError, match=r"0\.bias"):
        load_model("missing.pt", arch="some_nets:plain")
    torch.save(sd | {"extra": torch.ones(1)}, "extra.pt")
    with pytest.raises(InputError, match="extra"):
        load_model("extra.pt", arch="some_nets:plain")
    torch.save(sd | {"0.bias": torch.ones(7)}, "shape.pt")
    with pytest.raises(InputError, match=r"0\.bias"):
        load_model("shape.pt", arch="some_nets:plain")
    torch.save({"model": sd, "ema": {k: v + 1 for k, v in sd.items()}}, "two.pt")
    with pytest.raises(InputError, match="model, ema"):
        load_model("two.pt", arch="some_nets:plain")
    ema = load_model("two.pt", arch="some_nets:plain", entry="ema")
    assert torch.equal(ema[0].bias, sd["0.bias"] + 1)
    with pytest.raises(InputError, match="arch"):
        load_model("extra.pt")
    torch.save({"epoch": 1}, "nothing.pt")
    with pytest.raises(InputError):
        load_model("nothing.pt", arch="some_nets:plain")


@pytest.mark.parametrize(
    "arch",
    [
        "some_nets",
        "some_nets:",
        ":plain",
        "no_such_module_here:f",
        "some_nets:absent",
        "some_nets:needs_arguments",
        "some_nets:nothing",
        ".x:y",
    ],
)
def test_archs_that_build_nothing_are_usage_errors(nets, arch):
    """A name that is malformed, absent or no factory is exit 2."""
    torch.save(plain_net().state_dict(), "sd.pt")
    with pytest.raises(SelectionError) as caught:
        load_model("sd.pt", arch=arch)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("call", [lambda name: load_model("sd.pt", arch=name), example_inputs])
@pytest.mark.parametrize("known", [False, True])
def test_the_path_keeps_what_the_users_code_did_to_it(nets, monkeypatch, call, known):
    """The working directory is in the path while the user's module is looked for, and where it was before afterwards;
    an entry that the module adds stays."""
    torch.save(nn.Linear(2, 1).state_dict(), "sd.pt")
    (nets / "adding.py").write_text(
        "import sys\nfrom torch import nn\nsys.path.append('theirs')\ndef make():\n    return nn.Linear(2, 1)\n"
    )
    here = [str(nets)] if known else []
    monkeypatch.setattr(sys, "path", [*here, *(p for p in sys.path if p)])
    before = list(sys.path)
    try:
        assert call("adding:make").in_features == 2
        assert sys.path == [*before, "theirs"]
    finally:
        sys.modules.pop("adding", None)


def test_convert_with_the_model_takes_axes_from_its_layers(nets):
    """With arch the grouped transposed convolution keeps its output channels, and nothing is assumed."""
    torch.save({"state_dict": plain_net().state_dict(), "epoch": 2}, "sd.pt")
    report = convert_checkpoint("sd.pt", "wn.pt", arch="some_nets:plain")
    assert report.assumptions == ()
    assert load_tensors("wn.pt")["state_dict.2.parametrizations.weight.original0"].shape == (2, 3, 1)
    live = apply_weight_norm(plain_net()).state_dict()
    assert all(torch.equal(t, load_tensors("wn.pt")[f"state_dict.{k}"]) for k, t in live.items())
    fold_checkpoint("wn.pt", "back.pt", arch="some_nets:plain")
    back = load_tensors("back.pt")
    assert all(torch.equal(t, back[f"state_dict.{k}"]) for k, t in plain_net().state_dict().items())


def test_a_fold_that_would_not_load_is_found_before_it_is_written(nets):
    """fold with arch proves that the result loads strictly."""
    sd = dict(legacy_net().state_dict())
    sd.pop("4.bias")
    torch.save(sd, "sd.pt")
    with pytest.raises(InputError, match=r"4\.bias"):
        fold_checkpoint("sd.pt", "out.pt", arch="some_nets:plain")
    assert "out.pt" not in listing(nets)


@pytest.mark.parametrize("layout", ["parametrized", "legacy"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "state dict"])
def test_data_dependent_init_through_files(nets, whole, layout):
    """init="data" sets g and biases from a batch: each channel of the first layer has mean 0 and std 1."""
    if whole and layout == "legacy":
        torch.save(plain_net(), "in.pt")
        with pytest.raises(SelectionError, match="state dicts"):
            convert_checkpoint("in.pt", "wn.pt", layout=layout)
        return
    torch.save(plain_net() if whole else {"sd": plain_net().state_dict(), "n": 1}, "in.pt")
    batch = torch.randn(64, 3, 6, generator=torch.Generator().manual_seed(2))
    arch = None if whole else "some_nets:plain"
    for magnitude in ("log", "linear"):
        options = {"magnitude": magnitude, "layout": layout, "force": True}
        report = convert_checkpoint("in.pt", "wn.pt", arch=arch, init="data", data=batch, **options)
        assert len(report.initialisation.initialised) == 3
        assert "initialised" in str(report)
        net = load_model("wn.pt", arch=arch)
        y = net[0](batch)
        assert y.mean((0, 2)).abs().max() < 1e-4
        assert (y.std((0, 2), unbiased=False) - 1).abs().max() < 1e-3
    keys = set(load_tensors("wn.pt"))
    assert ("sd.0.weight_g" in keys) == (layout == "legacy")


def test_options_that_do_not_go_together(nets):
    """Data without init, init without a model, arch with a whole module: usage errors."""
    torch.save(plain_net().state_dict(), "sd.pt")
    torch.save(plain_net(), "whole.pt")
    for path, options in (
        ("sd.pt", {"init": "data"}),
        ("sd.pt", {"data": torch.ones(1)}),
        ("sd.pt", {"init": "data", "data": torch.ones(1)}),
        ("whole.pt", {"arch": "some_nets:plain"}),
        ("sd.pt", {"layout": "plain"}),
        ("sd.pt", {"magnitude": "square"}),
        ("sd.pt", {"init": "fna"}),
        ("sd.pt", {"init": "fna", "arch": "some_nets:plain"}),
        ("sd.pt", {"init": "fna", "arch": "some_nets:plain", "data": torch.ones(1)}),
    ):
        with pytest.raises(SelectionError):
            convert_checkpoint(path, "out.pt", **options)
    with pytest.raises(SelectionError):
        load_model("whole.pt", arch="some_nets:plain")
    with pytest.raises(SelectionError, match='init must be "preserve", "data" or "fan", not \'fna\''):
        convert_checkpoint("sd.pt", "out.pt", init="fna", arch="some_nets:plain")
    assert "out.pt" not in listing(nets)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("magnitude", ["Log", "", None])
def test_a_magnitude_that_is_none_is_a_usage_error(nets, magnitude, trust):
    """Nothing that reads pairs takes an unknown way of storing g for the linear one."""
    torch.save(legacy_net().state_dict(), "wn.pt")
    torch.save(apply_weight_norm(plain_net()), "whole.pt")
    options = {"magnitude": magnitude, "trust_pickle": trust}
    said = {"match": 'magnitude must be "linear" or "log", not'}
    for path in ("wn.pt", "whole.pt"):
        with pytest.raises(SelectionError, **said):
            fold_checkpoint(path, "out.pt", **options)
        with pytest.raises(SelectionError, **said):
            wnsurgery.inspect(path, **options)
        with pytest.raises(SelectionError, **said):
            load_model(path, arch="some_nets:plain" if path == "wn.pt" else None, **options)
    with pytest.raises(SelectionError, **said):
        wnsurgery.compare_weight_norm("wn.pt", "wn.pt", **options)
    with pytest.raises(SelectionError, **said):
        wnsurgery.inspect(plain_net(), magnitude=magnitude)
    assert "out.pt" not in listing(nets)


# Saving --------------------------------------------------------------------------------------------------


def test_save_model_whole_and_as_state_dict(tmp_path):
    """Suffix and option decide what is saved; an existing file is kept; torch's own parametrization is explained."""
    net = apply_weight_norm(plain_net())
    save_model(net, tmp_path / "m.pt")
    assert torch.equal(load_model(tmp_path / "m.pt")(x_in()), net(x_in()))
    save_model(net, tmp_path / "m.safetensors")
    save_model(net, tmp_path / "sd.pt", state_only=True)
    for name in ("m.safetensors", "sd.pt"):
        tensors = load_tensors(tmp_path / name)
        assert all(torch.equal(t, tensors[k]) for k, t in net.state_dict().items())
    with pytest.raises(OutputExistsError):
        save_model(net, tmp_path / "m.pt")
    with pytest.raises(OutputError):
        save_model(parametrizations.weight_norm(nn.Linear(2, 2)), tmp_path / "torch.pt")
    assert "torch.pt" not in listing(tmp_path)


def test_load_tensors_flattens_everything(tmp_path):
    """State dicts and whole modules give one flat table of dotted names."""
    torch.save({"net": nn.Linear(2, 2), "ema": {"w": torch.ones(1)}, "epoch": 1}, tmp_path / "m.pt")
    assert sorted(load_tensors(tmp_path / "m.pt")) == ["ema.w", "net.bias", "net.weight"]
    original = copy.deepcopy(plain_net())
    torch.save(original, tmp_path / "n.pt")
    assert sorted(load_tensors(tmp_path / "n.pt")) == sorted(original.state_dict())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_axis_of_a_list_of_magnitudes_is_asked_for(tmp_path, suffix, axis):
    """g of shape (n,) does not tell its axis: an error that names the key and --dim, and then what --dim says."""
    g, v = torch.rand(4) + 0.5, torch.randn(4, 4)
    source = tmp_path / f"a{suffix}"
    write_store(source, Stored({"fc.weight_g": g, "fc.weight_v": v}, "torch"))
    with pytest.raises(PairError, match=r"fc\.weight_g: magnitude \(4,\) may belong to axis 0 or 1") as caught:
        fold_checkpoint(source, tmp_path / f"b{suffix}")
    assert "--dim 'fc.weight=AXIS'" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == [source.name]
    fold_checkpoint(source, tmp_path / f"b{suffix}", dim={"fc": axis})
    convert_checkpoint(source, tmp_path / f"c{suffix}", dim=axis)
    shape = [1, 1]
    shape[axis] = 4
    expected = v.double() * g.double().reshape(shape) / v.double().norm(dim=1 - axis, keepdim=True)
    torch.testing.assert_close(load_tensors(tmp_path / f"b{suffix}")["fc.weight"].double(), expected)
    assert load_tensors(tmp_path / f"c{suffix}")["fc.parametrizations.weight.original0"].shape == tuple(shape)


def test_a_list_of_magnitudes_must_fit_the_axis_named(tmp_path):
    """The axis named for a list of magnitudes has their number, or it is an error that names the key."""
    torch.save({"fc.weight_g": torch.ones(4), "fc.weight_v": torch.ones(4, 3)}, tmp_path / "a.pt")
    with pytest.raises(PairError, match=r"fc\.weight_g: 4 magnitudes do not fit the kept axis 1"):
        fold_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", dim=1)
