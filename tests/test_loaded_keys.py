"""Loading into a converted net does what torch does by its long way: with the same words."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wnsurgery as wn
from wnsurgery import hosts, loaded_keys
from wnsurgery.mechanism import WeightNormList
from wnsurgery.reparam import WeightNorm

from nets import NETS, net

State = dict[str, Any]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small nets are treated as large ones are."""
    monkeypatch.setattr(loaded_keys, "_FEW", 0)


@contextmanager
def long_way() -> Iterator[None]:
    """Loading as torch's own code does it, step by step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosts, "take_out", lambda _: None)
        patch.setattr(WeightNormList, "_load_pair", lambda *_: False)
        patch.delattr(WeightNorm, "_load_from_state_dict")
        yield


def outcome(model: nn.Module, state: State, **options: bool) -> tuple[Any, ...]:
    """What loading returns or raises, what the model holds then, and what its watchers saw (`seen`)."""
    try:
        said: Any = tuple(map(tuple, model.load_state_dict(state, **options)))
    except Exception as error:
        said = type(error), str(error)
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    held = [(n, type(t), t.dtype, t.layout, t.shape, t.requires_grad, _values(t)) for n, t in tensors]
    return said, held, getattr(model, "seen", None)


def _values(t: Tensor) -> str:
    """Every number, so that NaN is NaN and -0.0 is not 0.0."""
    return "meta" if t.is_meta else repr((t.to_dense() if t.is_sparse else t).tolist())


def check(make: Callable[[], nn.Module], spoil: Callable[[State], State] = dict, **options: bool) -> tuple[Any, ...]:
    """Load one state dict into two nets of a kind, by the short and the long way: no difference; returns what came."""
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(0)
    other = make()
    state = spoil(_changed(copy.deepcopy(model).state_dict()))
    given = list(state.items())
    short = outcome(model, copy.deepcopy(state), **options)
    with long_way():
        long = outcome(other, copy.deepcopy(state), **options)
    assert short == long
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(given, state.items(), strict=True))
    return short


def _changed(state: State) -> State:
    return {n: t * 2 if t.is_floating_point() else t for n, t in state.items()}


# The same results ----------------------------------------------------------------------------------------


def _legacy(state: State) -> State:
    ends = {f".parametrizations.weight.original{i}": f".weight_{c}" for i, c in enumerate("gv")}
    return {next((n.replace(e, f) for e, f in ends.items() if e in n), n): t for n, t in state.items()}


def _plain(state: State) -> State:
    """Plain weights in place of the pairs: v itself will do."""
    kept = {n: t for n, t in state.items() if not n.endswith(".original0") and "log_scale" not in n}
    return {n.replace("parametrizations.", "").removesuffix(".original1"): t for n, t in kept.items()}


def _some(state: State, change: Callable[[str, Any], State]) -> State:
    """Every third entry replaced by others."""
    out: State = {}
    for i, (n, t) in enumerate(state.items()):
        out.update(change(n, t) if i % 3 == 1 else {n: t})
    return out


SPOILT: dict[str, Callable[[State], State]] = {
    "as it is": dict,
    "legacy": _legacy,
    "plain": _plain,
    "layouts mixed": lambda s: {**_legacy(dict(list(s.items())[::2])), **dict(list(s.items())[1::2])},
    "empty": lambda _: {},
    "missing": lambda s: _some(s, lambda _n, _t: {}),
    "reversed": lambda s: dict(reversed(s.items())),
    "renamed": lambda s: _some(s, lambda n, t: {f"{n}x": t}),
    "more": lambda s: {"a": 1, ".": 2, "": 3, **_some(s, lambda n, t: {n: t, f"{n}.more": t, f"{n}2": t}), "0.z": 4},
    "beside the pair": lambda s: {**s, **{n.replace("original0", "0.x"): t for n, t in s.items()}},
    "misshapen": lambda s: _some(s, lambda n, t: {n: t.reshape(-1)[:1]}),
    "swapped": lambda s: {n.translate(str.maketrans("01", "10")): t for n, t in s.items()},
    "no tensors": lambda s: _some(s, lambda n, _: {n: None}),
    "meta": lambda s: _some(s, lambda n, t: {n: t.to("meta")}),
    "sparse": lambda s: _some(s, lambda n, t: {n: t.to_sparse() if t.ndim else t}),
    "float64": lambda s: {n: t.double() for n, t in s.items()},
    "complex": lambda s: _some(s, lambda n, t: {n: t.to(torch.complex64)}),
    "Parameters": lambda s: {n: nn.Parameter(t, requires_grad=False) for n, t in s.items()},
    "NaN": lambda s: _some(_plain(s), lambda n, t: {n: t * float("nan")}),
    "marked log": lambda s: {**s, **{n.replace("original0", "0.log_scale"): torch.tensor(True) for n in s}},
    "extra state": lambda s: {"_extra_state": 1, **_some(s, lambda n, t: {n: t, f"{n}._extra_state": 2})},
}


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta", "ignore:Casting complex")
@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("name", NETS)
def test_any_state_dict_into_any_net(name: str, spoilt: str) -> None:
    """Results, missing and unexpected keys, messages and their order are those of the long way, strict or not, assigned
    or copied."""
    for strict, assign in itertools.product((True, False), repeat=2):
        check(lambda: wn.apply_weight_norm(net(name)[0]), SPOILT[spoilt], strict=strict, assign=assign)


@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("options", [{"magnitude": "log"}, {"mode": "deferred"}, {"include": "0*"}], ids=str)
def test_any_state_dict_into_any_kind_of_pair(options: Any, spoilt: str) -> None:
    """Log magnitudes, deferred leaves and nets converted in part load as by the long way."""
    make = lambda: wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), **options)  # noqa: E731
    check(make, SPOILT[spoilt])


def test_onto_the_meta_device() -> None:
    """A net on the meta device takes what is assigned, and warns of copies for each key as by the long way."""

    def make() -> nn.Module:
        return wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to("meta"))

    def filled(state: State) -> State:
        return {n: torch.ones(t.shape) for n, t in state.items()}

    check(make, filled, assign=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        check(make, filled)
    words = [str(w.message) for w in told]
    assert len(words) == 12  # six parameters, by both ways
    assert words[:6] == words[6:]


def test_swapped_and_inference_tensors() -> None:
    """Loading by swapping tensors, and into tensors that cannot be written to, is as by the long way."""

    def inference() -> nn.Module:
        layer = wn.apply_weight_norm(nn.Linear(3, 4))
        with torch.inference_mode():
            v = nn.Parameter(torch.ones(4, 3), requires_grad=False)
        layer.get_submodule("parametrizations.weight")._parameters["original1"] = v
        return layer

    said, *_ = check(inference)
    assert "Inplace update to inference tensor" in said[1]

    def referred() -> nn.Module:
        layer = wn.apply_weight_norm(nn.Linear(3, 4))
        layer.__dict__["reference"] = weakref.ref(layer.get_parameter("parametrizations.weight.original1"))
        return layer

    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        check(lambda: wn.apply_weight_norm(net("linear")[0]))
        assert "has weakref associated with it" in check(referred)[0][1]
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_wrapped_net_and_a_part_of_one() -> None:
    """A net under a prefix, as DistributedDataParallel has it, and a part of a larger one load as by the long way."""
    check(lambda: nn.ModuleDict({"module": nn.Sequential(wn.apply_weight_norm(net("branches")[0]), nn.Linear(2, 2))}))
    check(lambda: wn.apply_weight_norm(nn.Sequential(net("linear")[0], net("linear")[0]))[1])
    check(lambda: wn.apply_weight_norm(nn.Linear(3, 4)))


def test_one_module_under_several_names() -> None:
    """A shared layer is loaded once under each of its names; the last one counts."""

    def make() -> nn.Module:
        one = nn.Linear(3, 3)
        return wn.apply_weight_norm(nn.Sequential(one, nn.Sequential(one, nn.Linear(3, 3)), one))

    different = lambda s: {n: torch.full_like(t, i) for i, (n, t) in enumerate(s.items())}  # noqa: E731
    said, held, _ = check(make, different)
    assert said == ((), ())
    last = list(make().state_dict()).index("2.bias")
    assert {n: v for n, *_, v in held}["0.bias"] == repr([float(last)] * 3)
    check(make, lambda s: _some(different(s), lambda _n, _t: {}))


# Who is shown the dicts ----------------------------------------------------------------------------------


class Watched(nn.Sequential):
    """Keeps the dict it is loaded from, in one way or another, and looks again when its children are loaded."""

    def watch(self, seen: list[Any]) -> Watched:
        self.__dict__["seen"] = seen
        self.register_load_state_dict_post_hook(Watched.look)
        return self

    def look(self, _keys: Any) -> None:
        state_dict, before = self.kept
        self.seen.append((before, list(state_dict) == before))


def _keeping(module: Any, state_dict: State, *_rest: Any) -> None:
    module.__dict__["kept"] = state_dict, list(state_dict)


class OwnMethod(Watched):
    def _load_from_state_dict(self, state_dict: State, *rest: Any) -> None:
        _keeping(self, state_dict)
        super()._load_from_state_dict(state_dict, *rest)


class Hooked(Watched):
    def watch(self, seen: list[Any]) -> Watched:
        self.register_load_state_dict_pre_hook(_keeping)
        return super().watch(seen)


class Replaced(Watched):
    def watch(self, seen: list[Any]) -> Watched:
        def method(state_dict: State, *rest: Any) -> None:
            _keeping(self, state_dict)
            nn.Module._load_from_state_dict(self, state_dict, *rest)

        self.__dict__["_load_from_state_dict"] = method
        return super().watch(seen)


@pytest.mark.parametrize("where", range(3))
@pytest.mark.parametrize("kind", [OwnMethod, Hooked, Replaced])
def test_a_dict_that_a_module_was_shown_stays_whole(kind: type[Watched], where: int) -> None:
    """A module with load hooks or a method of its own finds in its dict, to the end, all it was given; root or not."""

    def make() -> nn.Module:
        seen: list[Any] = []
        levels = [nn.Sequential, nn.Sequential, nn.Sequential]
        levels[where] = kind
        inner = [levels[2](nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 3)) for _ in range(2)]
        model = wn.apply_weight_norm(levels[0](levels[1](*inner), nn.Linear(3, 3)))
        for module in model.modules():
            if isinstance(module, kind):
                module.watch(seen)
        model.__dict__["seen"] = seen
        return model

    for spoilt in SPOILT.values():
        *_, seen = check(make, spoilt)
        assert all(whole for _, whole in seen)
    assert len(check(make)[-1]) == (1, 1, 2)[where]


def _rename(module: Any, state_dict: State, prefix: str, *_rest: Any) -> None:
    """Old names to new ones, and entries for others, none of which a hook can reach by its own dict."""
    for key in [k for k in state_dict if k.startswith(f"{prefix}old.")]:
        state_dict[key.replace("old.", "0.")] = state_dict.pop(key)
    state_dict.update({"1.0.bias": torch.zeros(3), "2.bias": torch.zeros(3), f"{prefix}1.bias": torch.ones(3)})


@pytest.mark.parametrize("where", ["", "0", "0.0", "0.0.parametrizations", "0.0.parametrizations.weight", "1"])
def test_hooks_that_change_their_dict(where: str) -> None:
    """What a load hook adds, renames or takes away in its dict counts for its own children, and for nobody else."""

    def make() -> nn.Module:
        inner = [nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2)]
        model = wn.apply_weight_norm(nn.Sequential(*inner, nn.Linear(3, 3)))
        model.get_submodule(where).register_load_state_dict_pre_hook(_rename)
        return model

    for spoilt in SPOILT.values():
        check(make, spoilt)
    check(make, lambda s: {n.replace("0.0.", "0.old.").replace("1.0.", "1.old."): t for n, t in s.items()})


def test_hooks_on_a_layer_and_on_its_rule() -> None:
    """Hooks of a converted layer, its list and its rule run with the entries they always had."""
    seen: list[Any] = []
    model = wn.apply_weight_norm(net("linear")[0])
    part = "0.parametrizations.weight"
    for module in (model[0], model.get_submodule(part), model.get_submodule(f"{part}.0")):
        module.register_load_state_dict_pre_hook(lambda _m, s, p, *_: seen.append((p, list(s))))
    model.load_state_dict(model.state_dict())
    pair = [f"{part}.original0", f"{part}.original1"]
    assert seen == [("0.", ["0.bias", *pair]), (f"{part}.", pair), (f"{part}.0.", [])]


class LoadsAlone(nn.Sequential):
    """Loads its children by itself, from what it is given, before torch does."""

    def _load_from_state_dict(self, state_dict: State, prefix: str, *rest: Any) -> None:
        nested = {n.removeprefix(prefix): t for n, t in state_dict.items()}
        self[0].load_state_dict({n.removeprefix("0."): t for n, t in nested.items() if n.startswith("0.")})
        self[1]._load_from_state_dict(state_dict, f"{prefix}1.", *rest)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_loading_within_loading() -> None:
    """A module that loads a child by `load_state_dict`, or hands it its own dict, finds its entries afterwards."""
    check(lambda: wn.apply_weight_norm(nn.Sequential(LoadsAlone(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Linear(3, 3))))


def test_a_loader_that_is_not_torchs() -> None:
    """Loaders that show one dict to every module, as transformers' did, keep it whole."""
    model = wn.apply_weight_norm(net("branches")[0])
    state = _changed(model.state_dict())
    names = list(state)

    def load(module: nn.Module, local_state_dict: State, prefix: str) -> None:
        child_state_dict = local_state_dict
        module._load_from_state_dict(child_state_dict, prefix, {}, True, [], [], [])
        for name, child in module._modules.items():
            if child is not None:
                load(child, child_state_dict, f"{prefix}{name}.")

    load(model, state, "")
    assert list(state) == names
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


# No trace ------------------------------------------------------------------------------------------------


def test_nothing_is_left_behind() -> None:
    """The given dict keeps its entries and metadata, and its tensors are held by nobody after loading or failing."""
    model = wn.apply_weight_norm(net("branches")[0])
    state: Any = model.state_dict()
    names, metadata = list(state), copy.deepcopy(state._metadata)
    model.load_state_dict(state)
    assert list(state) == names
    assert state._metadata == metadata
    for wrong in (False, True):
        given = {n: t.clone() for n, t in state.items()}
        if wrong:
            given["head.parametrizations.weight.original1"] = torch.zeros(1)
            with pytest.raises(RuntimeError, match="size mismatch for head"):
                model.load_state_dict(given)
        else:
            model.load_state_dict(given)
        watch = [weakref.ref(t) for t in given.values()]
        del given
        if wrong:
            gc.collect()  # torch's function holds itself where it raises
        assert not any(w() is not None for w in watch)


def test_many_threads_load_at_once() -> None:
    """Nets loaded at the same time, one of them by several threads, get what they were given."""
    shared = wn.apply_weight_norm(nn.Sequential(*(nn.Linear(4, 4) for _ in range(20))))
    state = _changed(shared.state_dict())
    wrong: list[Any] = []

    def load(model: nn.Module) -> None:
        for _ in range(20):
            if outcome(model, state)[0] != ((), ()):
                wrong.append(model)

    models = [shared, shared, *(copy.deepcopy(shared) for _ in range(2))]
    threads = [threading.Thread(target=load, args=(m,)) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(torch.equal(t, state[n]) for m in models for n, t in m.state_dict().items())


# The use of it -------------------------------------------------------------------------------------------


class Counted(str):
    """A key that counts how often somebody looks how it begins."""

    __slots__ = ()
    looks = 0

    def startswith(self, *arguments: Any) -> bool:  # type: ignore[override]
        Counted.looks += 1
        return super().startswith(*arguments)


def looks(model: nn.Module) -> int:
    Counted.looks = 0
    model.load_state_dict({Counted(n): t for n, t in model.state_dict().items()})
    return Counted.looks


def _chain(layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))


TREES: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: _chain(60),
    "in blocks": lambda: nn.Sequential(*(_chain(5) for _ in range(60))),
    "under prefixes": lambda: nn.ModuleDict({"module": nn.ModuleDict({"model": _chain(60)})}),
    "with norms": lambda: nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for _ in range(60))),
}


@pytest.mark.parametrize("tree", TREES)
def test_torch_looks_through_fewer_keys_than_for_the_plain_net(tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However its layers are nested, a converted net's keys are looked at less often than the plain net's."""
    monkeypatch.undo()
    plain = looks(TREES[tree]())
    assert looks(wn.apply_weight_norm(TREES[tree]())) < plain
    with long_way():
        assert looks(wn.apply_weight_norm(TREES[tree]())) > plain


def test_another_torch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch's function is not as known, nothing is taken out, and all is loaded."""
    assert loaded_keys._inner(loaded_keys._LOAD, "load") is loaded_keys._inner(len, "load") is None
    monkeypatch.setattr(loaded_keys, "_LOAD", None)
    model = wn.apply_weight_norm(_chain(20))
    state = _changed(model.state_dict())
    model.load_state_dict(state)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
