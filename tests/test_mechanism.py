"""Weight norm on hosts that were not made for it: writes, odd classes, replicas, sharding, loading, stacking."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import wnsurgery as wn

from nets import TiedLanguageModel, same_bits

ONES = torch.ones(1, 3)


def layer() -> Any:
    """A converted Linear(3, 4) that has been called once."""
    host = wn.apply_weight_norm(nn.Linear(3, 4))
    host(ONES)
    return host


# Writing into module.weight ------------------------------------------------------------------------------


def test_a_write_reaches_everything_that_reads_parameters() -> None:
    """nn.init on module.weight is seen at once by parameters(), a step, functional_call and parameters_to_vector."""
    host = layer()
    nn.init.constant_(host.weight, 0.5)
    assert dict(host.named_parameters())["parametrizations.weight.original1"].eq(0.5).all()
    nn.init.constant_(host.weight, 0.25)
    out = torch.func.functional_call(host, dict(host.named_parameters()), (ONES,))
    assert torch.allclose(out, 0.75 + host.bias)
    optimizer = torch.optim.SGD(host.parameters(), lr=0.0)
    host(ONES).sum().backward()
    nn.init.constant_(host.weight, 0.125)
    optimizer.step()
    assert same_bits(host.weight, torch.full((4, 3), 0.125))


@pytest.mark.parametrize("first", ["write", "compile"])
def test_a_write_reaches_compiled_and_exported_code(first: str) -> None:
    """A weight written before or after compiling is the one the compiled call uses; torch.export sees it too."""
    torch.compiler.reset()
    host = layer()
    compiled = torch.compile(host, fullgraph=True, backend="aot_eager")
    if first == "compile":
        compiled(ONES)
    nn.init.constant_(host.weight, 0.5)
    assert torch.allclose(compiled(ONES), 1.5 + host.bias)
    nn.init.constant_(host.weight, 0.25)
    assert torch.allclose(torch.export.export(host, (ONES,)).module()(ONES), 0.75 + host.bias)


def test_partial_writes_and_writes_after_a_step() -> None:
    """Rows, scalings and clamps of module.weight under no_grad take effect, also in a loop with an optimizer."""
    host = layer()
    expected = host.weight.detach().clone()
    expected[1] = 0
    with torch.no_grad():
        host.weight[1] = 0
        assert same_bits(host.weight, expected)
        host.weight.mul_(2)
        assert same_bits(host.weight, expected * 2)
    optimizer = torch.optim.SGD(host.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        host(ONES).sum().backward()
        optimizer.step()
        with torch.no_grad():
            host.weight.clamp_(-0.1, 0.1)
        assert host.weight.abs().max() <= 0.1


def test_a_weight_kept_in_a_variable_can_be_written_again_and_again() -> None:
    """While somebody holds the computed weight, each write into it counts at the next access."""
    host = layer()
    with torch.no_grad():
        held = host.weight
        held.fill_(0.5)
        assert host.state_dict()["parametrizations.weight.original1"].eq(0.5).all()
        held = host.weight
        held.fill_(0.25)
        assert same_bits(host(ONES), 0.75 + host.bias[None])


def test_writes_through_either_owner_of_a_tie() -> None:
    """A tied pair takes writes through each of its owners, and both read the last one."""
    model = wn.apply_weight_norm(TiedLanguageModel())
    nn.init.constant_(model.embed.weight, 0.25)
    assert model.head.weight.eq(0.25).all()
    model(torch.tensor([[1, 2]]))
    nn.init.constant_(model.head.weight, 0.5)
    assert model.embed.weight.eq(0.5).all()


def _tied() -> Any:
    """Two layers with one weight."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("mode", ["parametrized", "deferred"])
def test_a_write_through_one_owner_of_a_tie_is_there_for_the_others(mode: Any, counted: bool) -> None:
    """Both layers of a pass, copies, pickles and a part's state dict have what was written through the other owner."""

    def written() -> Any:
        model = wn.apply_weight_norm(_tied(), mode=mode)
        model(ONES)
        with torch.no_grad():
            (model[2].weight if counted else model[2].weight.data).fill_(0.1)
        return model

    model = written()
    output = model(ONES)
    assert torch.allclose(output, 0.3 * torch.tensor(0.3).tanh())
    output.sum().backward()
    for other in (written(), copy.deepcopy(written()), pickle.loads(pickle.dumps(written()))):
        assert other[0].weight.eq(0.1).all()
    assert written()[0].state_dict()["parametrizations.weight.original1"].eq(0.1).all()
    model = written()
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert model[2].weight.eq(0.2).all() and model[0].weight.eq(0.2).all()


@pytest.mark.parametrize("seed", range(20))
def test_a_tie_is_written_and_read_in_any_order(seed: int) -> None:
    """Whoever of the owners is written to, read or run, in training or in evaluation: both have the last write."""
    chosen = random.Random(seed)
    plain = _tied()
    model = wn.apply_weight_norm(copy.deepcopy(plain))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(30):
        owner, other, what = chosen.choice((0, 2)), chosen.choice((0, 2)), chosen.randrange(6)
        with torch.set_grad_enabled(chosen.random() < 0.5):
            if what == 0:
                value = chosen.random()
                with torch.no_grad():
                    plain[owner].weight[1].fill_(value)
                    model[owner].weight[1].fill_(value)
            elif what == 1:
                plain[owner].weight.data.mul_(0.5)
                model[owner].weight.data.mul_(0.5)
            elif what == 2:
                assert torch.equal(model(ONES), plain(ONES))
            elif what == 3:
                optimizer.step()
            elif what == 4:
                model.train(chosen.random() < 0.5)
            else:
                model = copy.deepcopy(model)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            assert same_bits(model[other].weight.detach(), plain[other].weight.detach()), (seed, what)


@pytest.mark.parametrize("owner", [0, 1])
def test_folding_takes_in_a_write_through_any_owner_of_a_tie(owner: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    wn.apply_weight_norm(model)
    weight = model[owner].weight
    with torch.no_grad():
        weight.fill_(3.0)
    wn.fold_weight_norm(model)
    assert model[0].weight is model[1].weight and torch.equal(model[0].weight, torch.full((4, 4), 3.0))


def test_writing_nan_is_an_error_and_not_a_broken_layer() -> None:
    """NaN written into module.weight raises at the next use and leaves the pair as it was."""
    host = layer()
    before = host.weight.detach().clone()
    nn.init.constant_(host.weight, float("nan"))
    with pytest.raises(wn.NonFiniteWeightError):
        host(ONES)
    assert same_bits(host.weight, before)


def test_no_copy_of_the_weight_outlives_its_use() -> None:
    """After forward and backward nothing but g and v stays in memory."""
    host = layer()
    host(ONES).sum().backward()
    held = [t for t in vars(host.parametrizations.weight).values() if isinstance(t, tuple)]
    assert not [t for entry in held for t in entry if isinstance(t, Tensor) and t.ndim == 2]


def test_assigning_a_parameter_is_refused() -> None:
    """`module.weight = nn.Parameter(...)`, which cannot become part of the pair, raises, says what to do and changes
    nothing; so does what is no tensor. Other parameters can be set."""
    host = layer()
    before = host.weight.detach().clone()
    with pytest.raises(KeyError, match=r"module\.weight = tensor"):
        host.weight = nn.Parameter(torch.ones(4, 3))
    with pytest.raises(TypeError, match="takes a tensor, not NoneType"):
        host.weight = None
    assert same_bits(host.weight, before)
    host.bias = nn.Parameter(torch.ones(4))
    assert host.bias.eq(1).all()
    wn.fold_weight_norm(host).weight = nn.Parameter(torch.ones(4, 3))
    assert host.weight.eq(1).all()


class Replacing(nn.Linear):
    """Its reset_parameters makes new Parameters instead of filling the old ones."""

    def reset_parameters(self) -> None:
        self.weight = nn.Parameter(torch.ones(self.out_features, self.in_features))
        self.bias = nn.Parameter(torch.full((self.out_features,), 7.0))


def test_reset_parameters_that_replaces_parameters() -> None:
    """A reset_parameters that assigns new Parameters sets g and v, and its new bias stays."""
    host = wn.apply_weight_norm(Replacing(3, 4))
    with torch.no_grad():
        host.weight.zero_()
        host.bias.zero_()
    host.reset_parameters()
    assert host.weight.eq(1).all()
    assert host.bias.eq(7).all()
    assert [n for n, _ in wn.fold_weight_norm(host).named_parameters()] == ["weight", "bias"]


def test_meta_then_empty_then_reset() -> None:
    """A layer converted on the meta device is usable after to_empty and reset_parameters."""
    with torch.device("meta"):
        host = nn.Linear(3, 4)
    wn.apply_weight_norm(host)
    host.reset_parameters()
    host.to_empty(device="cpu").reset_parameters()
    assert torch.isfinite(host(ONES)).all()
    assert host.weight.abs().sum() > 0


# Hosts with a mind of their own --------------------------------------------------------------------------


class Reduced(nn.Linear):
    def __reduce__(self) -> Any:
        return Reduced, (self.in_features, self.out_features), self.__dict__


class ReducedByType(nn.Linear):
    def __reduce__(self) -> Any:
        return type(self), (self.in_features, self.out_features), self.__dict__


class NewWithArguments(nn.Linear):
    def __new__(cls, *_args: Any, **_options: Any) -> Any:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> Any:
        return (self.in_features,), {"out_features": self.out_features}


class OwnState(nn.Linear):
    def __getstate__(self) -> Any:
        return {**self.__dict__, "cache": None}

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.restored = True


class NarrowSetattr(nn.Linear):
    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("in_features", "out_features", "weight", "bias", "training") and name[0] != "_":
            raise TypeError(f"no attribute {name}")
        super().__setattr__(name, value)


class Slotted(nn.Linear):
    __slots__ = ("extra",)

    def __deepcopy__(self, memo: Any) -> Any:
        twin = Slotted(self.in_features, self.out_features)
        wn.apply_weight_norm(twin).load_state_dict(self.state_dict())
        return twin

    def __reduce__(self) -> Any:
        return Slotted, (self.in_features, self.out_features), self.__dict__


@pytest.mark.parametrize("kind", [Reduced, ReducedByType, NewWithArguments, OwnState, NarrowSetattr, Slotted])
def test_classes_that_copy_pickle_or_set_attributes_their_own_way(kind: Any) -> None:
    """Convert, deepcopy, pickle and fold work on classes with their own __reduce__, __getstate__, __setattr__, ..."""
    host = kind(3, 4)
    attributes, expected = set(vars(host)), host(ONES).detach()
    wn.apply_weight_norm(host)
    twin, loaded = copy.deepcopy(host), pickle.loads(pickle.dumps(host))
    for other in (twin, loaded):
        assert isinstance(other, kind)
        assert wn.is_weight_normed(other)
        assert same_bits(other(ONES), expected)
        assert type(wn.fold_weight_norm(other)) is kind
        assert same_bits(other(ONES), expected)
    host(ONES).sum().backward()
    wn.fold_weight_norm(host)
    assert type(host) is kind
    assert set(vars(host)) == attributes
    assert same_bits(host(ONES), expected)


class Holder(nn.Module):
    """A child that knows its parent, and a bound method of it, outside of the module tables."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(3, 4)
        self.child.__dict__["parent"] = self
        self.call = self.child.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def test_references_back_to_the_parent() -> None:
    """Cycles through __dict__ and bound methods point into the copy after deepcopy and pickle."""
    model = wn.apply_weight_norm(Holder())
    expected = model(ONES).detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.child.parent is twin
        assert twin.call.__self__ is twin.child
        wn.fold_weight_norm(twin)
        assert same_bits(twin(ONES), expected)
    assert wn.is_weight_normed(model)


class Confusing(nn.Module):
    """Weights named like the halves of pairs."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("g", "original0", "original1", "weight_g", "weight_v", "weight"):
            setattr(self, name, nn.Parameter(torch.randn(3, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.original0 @ self.original1 @ self.weight @ self.weight_g @ self.weight_v @ self.g


def test_parameters_named_like_halves_of_pairs(registry: None) -> None:
    """Parameters called g, original0, weight_g and weight_v convert, load in every layout and fold by name."""
    wn.register_layer(Confusing, {"*": 0})
    model = nn.Sequential(Confusing())
    x, plain = torch.randn(2, 3), copy.deepcopy(model.state_dict())
    expected = model(x).detach()
    wn.apply_weight_norm(model)
    assert same_bits(model(x), expected)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    third = copy.deepcopy(other)
    other.load_state_dict(model.state_dict())
    third.load_state_dict(plain)
    for twin in (model, other, third):
        assert same_bits(twin(x), expected)
        assert list(wn.fold_weight_norm(twin).state_dict()) == list(plain)
        assert same_bits(twin(x), expected)


# Replicas, threads, sharding -----------------------------------------------------------------------------


def replica(model: nn.Module) -> Any:
    """What DataParallel makes for each device: modules with plain tensors in place of Parameters."""
    made = {module: module._replicate_for_data_parallel() for module in model.modules()}  # type: ignore[no-untyped-call]
    for module, twin in made.items():
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else made[child]
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(twin, name, parameter * 1)
    return made[model]


def test_data_parallel_replicas() -> None:
    """Replicas compute what the original does and send gradients to its g and v."""
    model = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    expected = model(ONES)
    twin = replica(model)
    assert same_bits(twin(ONES), expected)
    twin(ONES).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_many_threads_read_one_model() -> None:
    """Concurrent evaluation of one converted net gives the same bits in every thread."""
    model, x = wn.apply_weight_norm(nn.Linear(32, 32)), torch.randn(4, 32)
    wrong: list[int] = []
    with torch.no_grad():
        expected = model(x)

    def read() -> None:
        for _ in range(50):
            with torch.no_grad():
                wrong.extend([1] * (not torch.equal(model(x), expected)))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture
def one_process_group() -> Iterator[Any]:
    dist = pytest.importorskip("torch.distributed")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch.distributed's own
def test_fully_sharded_after_converting(one_process_group: Any) -> None:
    """Under FSDP2 a converted net runs, trains, saves and loads; folding it then is refused and breaks nothing."""
    from torch.distributed.fsdp import fully_shard

    model = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)))
    expected = model(ONES).detach()
    for part in (model[0], model):
        fully_shard(part, mesh=one_process_group)
    torch.testing.assert_close(model(ONES).detach(), expected)
    state = model.state_dict()
    assert "0.parametrizations.weight.original0" in state
    model.load_state_dict(state)
    model(ONES).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    trained = model(ONES).detach()
    assert not torch.allclose(trained, expected)
    with pytest.raises(wn.SelectionError, match="before sharding"):
        wn.fold_weight_norm(model)
    torch.testing.assert_close(model(ONES).detach(), trained)


# Loading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_plain_weights_of_another_precision_load_as_into_a_plain_layer(dtype: torch.dtype) -> None:
    """A float64 state dict loaded into a narrower converted layer gives the bits a plain layer would hold."""
    source = nn.Linear(30, 40).double()
    plain, converted = nn.Linear(30, 40).to(dtype), wn.apply_weight_norm(nn.Linear(30, 40).to(dtype))
    for target in (plain, converted):
        target.load_state_dict(source.state_dict())
    assert same_bits(converted.weight, plain.weight)


def test_plain_weights_load_into_a_meta_model() -> None:
    """A net converted on the meta device takes plain weights with assign=True, and folds to them."""
    source = nn.Sequential(nn.Linear(3, 4))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4))
    wn.apply_weight_norm(model)
    model.load_state_dict(source.state_dict(), assign=True)
    assert same_bits(model(ONES), source(ONES))
    assert same_bits(wn.fold_weight_norm(model)[0].weight, source[0].weight)


def test_loading_nan_names_the_weight() -> None:
    """A plain weight with NaN is refused by name."""
    model, source = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 4))), nn.Sequential(nn.Linear(3, 4))
    with torch.no_grad():
        source[0].weight[0, 0] = float("nan")
    with pytest.raises(wn.NonFiniteWeightError, match=r"^0\.weight: 1 of 12"):
        model.load_state_dict(source.state_dict())


def test_swapped_and_half_pairs_do_not_load() -> None:
    """Swapped halves are a size mismatch and a half alone is a missing key, in either layout."""
    host = layer()
    state = host.state_dict()
    g, v = (f"parametrizations.weight.original{i}" for i in range(2))
    for broken, words in (
        ({**state, g: state[v], v: state[g]}, "size mismatch"),
        ({"bias": state["bias"], "weight_g": state[v], "weight_v": state[g]}, "size mismatch"),
        ({"bias": state["bias"], "weight_g": state[g]}, "Missing key"),
        ({"bias": state["bias"], v: state[v]}, "Missing key"),
    ):
        with pytest.raises(RuntimeError, match=words):
            host.load_state_dict(broken)


# Beside and below other things ---------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * 2


def test_a_parametrization_stacked_on_top() -> None:
    """Another parametrization stacked on ours works; it counts as weight-normed and folding asks to remove it first."""
    host = layer()
    w = host.weight.detach().clone()
    parametrize.register_parametrization(host, "weight", Doubled())
    assert same_bits(host.weight, w * 2)
    assert same_bits(copy.deepcopy(host).weight, w * 2)
    assert wn.is_weight_normed(host)
    with pytest.raises(wn.PairError, match="stacked"):
        wn.fold_weight_norm(host)
    assert same_bits(host.weight, w * 2)


class Pair(nn.Module):
    """Two weights and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 3))
        self.b = nn.Parameter(torch.randn(3, 3))
        self.c = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a @ self.b + self.c

    def reset_parameters(self) -> None:
        nn.init.ones_(self.a)
        nn.init.constant_(self.b, 0.5)


def test_beside_spectral_norm(registry: None) -> None:
    """One weight under spectral norm and one under ours: copies, writes and folding leave the other alone."""
    wn.register_layer(Pair, {"a": 0, "b": 0})
    model = Pair().eval()
    parametrizations.spectral_norm(model, "a")
    expected = model(ONES).detach()
    wn.apply_weight_norm(model)
    twin = copy.deepcopy(model)
    assert same_bits(wn.fold_weight_norm(twin)(ONES), expected)
    assert parametrize.is_parametrized(twin, "a")
    model.reset_parameters()
    assert model.b.eq(0.5).all()
    wn.fold_weight_norm(model)
    parametrize.remove_parametrizations(model, "a")
    assert type(model) is Pair


def test_weight_norm_of_two_makers_on_one_module(registry: None) -> None:
    """Ours, torch's and partial removal in any sequence give back class, keys and order."""
    wn.register_layer(Pair, {"a": 0, "b": 0})
    model = Pair()
    expected, keys = model(ONES).detach(), list(model.state_dict())
    for steps in (
        [lambda: wn.apply_weight_norm(model, exclude="a"), lambda: wn.apply_weight_norm(model)],
        [lambda: wn.apply_weight_norm(model, include="b"), lambda: wn.apply_weight_norm(model, include="a")],
        [lambda: wn.apply_weight_norm(model), lambda: parametrize.remove_parametrizations(model, "b")],
        [lambda: wn.apply_weight_norm(model), lambda: parametrize.remove_parametrizations(model, "a")],
    ):
        for step in steps:
            step()  # type: ignore[no-untyped-call]
            assert same_bits(model(ONES), expected)
        wn.fold_weight_norm(model)
        assert type(model) is Pair
        assert list(model.state_dict()) == keys
        assert same_bits(model(ONES), expected)
    parametrizations.weight_norm(model, "a")
    wn.apply_weight_norm(model)
    wn.fold_weight_norm(model)
    assert list(model.state_dict()) == keys
    assert not model._load_state_dict_pre_hooks


def test_folding_takes_the_hooks_that_torch_left_behind() -> None:
    """Those that rename old keys, of the weight folded and of one that torch itself has folded; others stay."""
    model, seen = Pair(), []
    parametrizations.weight_norm(model, "a")
    parametrizations.weight_norm(model, "b")
    parametrize.remove_parametrizations(model, "b")
    model.register_load_state_dict_pre_hook(lambda *_: seen.append(1))
    wn.fold_weight_norm(model)
    assert len(model._load_state_dict_pre_hooks) == 1
    model.load_state_dict(model.state_dict())
    assert seen == [1]


# Other machinery of torch --------------------------------------------------------------------------------


def test_swapping_conversion_and_shared_memory() -> None:
    """Conversion by swapping tensors and share_memory work on a layer in use."""
    host = layer()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        host.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert host(ONES.double()).dtype == torch.float64
    host.share_memory()
    assert host.parametrizations.weight.original1.is_shared()


def test_saved_tensors_on_the_cpu_and_batched_gradients() -> None:
    """Offloaded activations and is_grads_batched give the gradients of single calls."""
    host = layer()
    parameters = list(host.parameters())
    with torch.autograd.graph.save_on_cpu():
        offloaded = host(ONES)
    seeds = torch.eye(4)[:, None]
    together = torch.autograd.grad(offloaded, parameters, seeds, is_grads_batched=True)
    for i in range(4):
        alone = torch.autograd.grad(host(ONES), parameters, seeds[i])
        for many, one in zip(together, alone, strict=True):
            torch.testing.assert_close(many[i], one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("magnitude", ["linear", "log"])
def test_traced_by_jit(magnitude: Any, dtype: torch.dtype) -> None:
    """torch.jit.trace records a converted net that works on other inputs, and leaves the net as it was."""
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    with torch.no_grad():
        model[0].weight[0] *= 1e-30
        model[0].weight[1] *= 1e30
        model[1].weight[0] = 0 if magnitude == "linear" else 1
    wn.apply_weight_norm(model, magnitude=magnitude)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated
        traced = torch.jit.trace(model, torch.randn(2, 3).to(dtype))
    with torch.no_grad():
        model[0].parametrizations.weight.original1.mul_(1.5)
        model[1].parametrizations.weight.original1.add_(0.5)
    x = torch.randn(5, 3).to(dtype)
    torch.testing.assert_close(traced(x), model(x))
    assert type(wn.fold_weight_norm(model)[0]) is nn.Linear


def test_parameters_replaced_behind_the_version_counter() -> None:
    """vector_to_parameters and .data writes, as EMA code does them, are what the next forward uses."""
    host = layer()
    vector = nn.utils.parameters_to_vector(host.parameters())
    nn.utils.vector_to_parameters(vector * 2, host.parameters())
    doubled = host.weight.detach().clone()
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.data.mul_(0.5)
    torch.testing.assert_close(host.weight * 2, doubled)
    used = host.weight.detach().clone()
    assert same_bits(wn.fold_weight_norm(host).weight, used)


def test_folding_a_shallow_copy_leaves_both_usable() -> None:
    """copy.copy shares the tables of its original: both then hold the plain weight."""
    layer = wn.apply_weight_norm(nn.Linear(5, 6))
    shallow, before = copy.copy(layer), layer.weight.detach().clone()
    wn.fold_weight_norm(shallow)
    assert torch.equal(layer.weight, before)
    assert torch.equal(shallow.weight, before)
    assert layer(torch.randn(2, 5)).shape == (2, 6)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_a_bound_method_kept_from_before_folding(kind: type[nn.Module]) -> None:
    """Callers that hold `layer.forward` go on with the plain layer."""
    layer = wn.apply_weight_norm(nn.Sequential(kind(5, 6)), include="0")[0]
    x = torch.randn(2, 5) if kind is nn.Linear else torch.tensor([1, 4])
    forward, before = layer.forward, layer(input=x).detach()
    assert list(inspect.signature(forward).parameters) == ["input"]
    wn.fold_weight_norm(layer)
    assert torch.equal(forward(x), before)
