"""Converted layers of one kind have their class in common; what happens to one of them leaves the others alone."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from abc import ABCMeta
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import wnsurgery as wn

from nets import same_bits


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def two() -> tuple[nn.Sequential, list[Tensor]]:
    """A net of two converted layers of one class, and its weights before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    before = [layer.weight.detach().clone() for layer in model]
    wn.apply_weight_norm(model)
    assert type(model[0]) is type(model[1])
    return model, before


def test_torch_removes_one_layers_and_the_other_stays() -> None:
    model, (first, second) = two()
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear and same_bits(model[0].weight, first)
    assert parametrize.is_parametrized(model[1], "weight") and same_bits(model[1].weight, second)
    assert list(model.state_dict())[:2] == ["0.bias", "0.weight"]
    model(torch.randn(2, 4)).sum().backward()
    assert model[0].weight.grad is not None and model[1].parametrizations.weight.original1.grad is not None
    parametrize.remove_parametrizations(model[1], "weight")
    assert type(model[1]) is nn.Linear and same_bits(model[1].weight, second)


def test_another_parametrization_of_one_layers_bias() -> None:
    """Registered and removed again, with and without torch's cache; the other layer's bias is a Parameter all along."""
    model, _ = two()
    biases = [layer.bias.detach().clone() for layer in model]
    parametrize.register_parametrization(model[0], "bias", Doubled())
    for inside in (False, True):
        with parametrize.cached() if inside else torch.no_grad():
            assert torch.equal(model[0].bias, 2 * biases[0])
            assert model[1].bias is model[1]._parameters["bias"] and torch.equal(model[1].bias, biases[1])
    twin = copy.deepcopy(model)
    assert torch.equal(twin[0].bias, 2 * biases[0]) and torch.equal(twin[1].bias, biases[1])
    model[1].bias = nn.Parameter(torch.ones(4))
    assert torch.equal(model[1].bias, torch.ones(4))
    with pytest.raises(TypeError, match="cannot assign"):
        model[1].bias = torch.zeros(4)
    parametrize.register_parametrization(model[1], "bias", Doubled())
    with parametrize.cached():
        assert torch.equal(model[0].bias, 2 * biases[0]) and torch.equal(model[1].bias, torch.full((4,), 2.0))
    parametrize.remove_parametrizations(model[0], "bias", leave_parametrized=False)
    assert torch.equal(model[0].bias, biases[0]) and torch.equal(model[1].bias, torch.full((4,), 2.0))
    wn.fold_weight_norm(model)
    assert type(model[0]) is nn.Linear and torch.equal(model[1].bias, torch.full((4,), 2.0))


@pytest.mark.parametrize("first", [True, False])
def test_what_another_parametrization_is_left_with_is_torchs_class(first: bool) -> None:
    """Nothing of ours is in it, whichever was there first."""
    theirs, layer = nn.Linear(3, 4), nn.Linear(3, 4)
    parametrize.register_parametrization(theirs, "bias", Doubled())
    if first:
        parametrize.register_parametrization(layer, "bias", Doubled())
    wn.apply_weight_norm(layer)
    if not first:
        parametrize.register_parametrization(layer, "bias", Doubled())
    expected, weight = layer.bias.detach().clone(), layer.weight.detach().clone()
    wn.fold_weight_norm(layer)
    assert vars(type(layer)).keys() == vars(type(theirs)).keys()
    assert same_bits(layer.weight, weight) and torch.equal(layer.bias, expected)
    parametrize.remove_parametrizations(layer, "bias")
    assert type(layer) is nn.Linear and torch.equal(layer.bias, expected)


def test_torchs_weight_norm_of_one_layers_other_weight() -> None:
    """A weight beside ours that torch normalises, on one of two modules, then taken out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Bilinear(2, 3, 4), nn.Bilinear(2, 3, 4))
    for layer in model:
        layer.extra = nn.Parameter(torch.randn(3, 3))
    wn.apply_weight_norm(model, include="*.weight")
    extra = [layer.extra.detach().clone() for layer in model]
    parametrizations.weight_norm(model[0], "extra")
    assert torch.allclose(model[0].extra, extra[0]) and model[1].extra is model[1]._parameters["extra"]
    parametrize.remove_parametrizations(model[0], "extra")
    assert parametrize.is_parametrized(model[0], "weight")
    assert torch.allclose(model[0].extra, extra[0]) and model[0].extra is model[0]._parameters["extra"]


def test_one_weight_of_a_recurrent_layer_removed_by_torch() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.LSTM(3, 4), nn.LSTM(3, 4)])
    x = torch.randn(5, 2, 3)
    expected = [layer(x)[0].detach() for layer in model]
    wn.apply_weight_norm(model)
    assert type(model[0]) is type(model[1])
    parametrize.remove_parametrizations(model[0], "weight_hh_l0")
    assert isinstance(model[0].weight_hh_l0, nn.Parameter) and not isinstance(model[1].weight_hh_l0, nn.Parameter)
    for layer, before in zip(model, expected, strict=True):
        layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]
        assert torch.equal(layer(x)[0], before)
    wn.fold_weight_norm(model)
    assert [type(layer) for layer in model] == [nn.LSTM, nn.LSTM]


def test_attributes_that_are_no_tensors() -> None:
    """A plain attribute under the name of a sibling's parametrized one is read back."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3))
    wn.apply_weight_norm(model)
    parametrize.register_parametrization(model[1], "bias", Doubled())
    assert model[0].bias is None
    del model[0].bias
    assert not hasattr(model[0], "bias")
    model[0].bias = "none"
    assert model[0].bias == "none" and isinstance(model[1].bias, Tensor)


def test_a_class_whose_methods_are_replaced_gets_a_new_class() -> None:
    class Layer(nn.Linear):
        pass

    first = wn.apply_weight_norm(Layer(3, 2))
    Layer.reset_parameters = lambda self: nn.init.ones_(self.weight)  # type: ignore[method-assign]
    second = wn.apply_weight_norm(Layer(3, 2))
    assert type(first) is not type(second)
    second.reset_parameters()
    assert torch.equal(second.weight, torch.ones(2, 3))
    assert type(wn.apply_weight_norm(Layer(3, 2))) is type(second)


def test_a_class_with_rules_for_its_subclasses_gets_one_for_each_module() -> None:
    class Abstract(nn.Linear, metaclass=ABCMeta):
        pass

    model = wn.apply_weight_norm(nn.Sequential(Abstract(3, 3), Abstract(3, 3)))
    assert type(model[0]) is not type(model[1])
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is Abstract and parametrize.is_parametrized(model[1], "weight")


def test_classes_go_with_their_modules() -> None:
    class Local(nn.Linear):
        pass

    base, model = weakref.ref(Local), wn.apply_weight_norm(nn.Sequential(Local(3, 2), Local(2, 3)))
    made = weakref.ref(type(model[0]))
    del model, Local
    gc.collect()
    assert made() is None and base() is None


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_of_the_same_class(way: str) -> None:
    model, (first, _) = two()
    twin: Any = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert type(twin[0]) is type(model[0])
    parametrize.remove_parametrizations(twin[0], "weight")
    assert same_bits(twin[0].weight, first) and same_bits(model[0].weight, first)
    assert parametrize.is_parametrized(model[0], "weight") and parametrize.is_parametrized(twin[1], "weight")


def test_a_method_put_on_the_class_of_one_can_be_taken_away() -> None:
    model, _ = two()
    kind: Any = type(model[0])
    kind.hello = lambda self: "hello"
    assert model[1].hello() == "hello"
    del kind.hello
    assert not hasattr(model[0], "hello")


def test_a_property_put_on_the_class_of_one() -> None:
    """One that somebody else made, and one that can only be set."""
    model, _ = two()
    kind: Any = type(model[0])
    seen: list[int] = []
    kind.size = property(lambda self: self.in_features)
    kind.told = property(None, lambda self, value: seen.append(value))
    model[1].told = 7
    assert (model[0].size, model[1].size) == (4, 3) and seen == [7]


def test_a_plain_bias_beside_a_parametrized_one_compiles() -> None:
    """A layer whose bias is plain compiles in one graph, though torch has put a property for the bias of another on the
    class they have in common."""
    model, x = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))), torch.randn(2, 3)
    parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    assert type(model[0]) is type(model[1])
    assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


class Wrapper(nn.Module):
    """Hands what it lacks on to the module in it, as peft's wrappers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 100  # type: ignore[no-any-return]


def test_a_wrapper_that_hands_attributes_on_is_copied_itself() -> None:
    """Copies, averages and comparisons of such a wrapper are of the wrapper, not of the converted layer in it."""
    plain = Wrapper(nn.Linear(4, 3))
    model = wn.apply_weight_norm(copy.deepcopy(plain))
    x = torch.ones(1, 4)
    twin = copy.deepcopy(model)
    assert type(twin) is Wrapper and type(twin.inner) is type(model.inner)
    assert same_bits(twin(x), plain(x))
    assert twin.inner.weight is not model.inner.weight
    assert same_bits(torch.optim.swa_utils.AveragedModel(model)(x), plain(x))
    assert same_bits(pickle.loads(pickle.dumps(model))(x), plain(x))
    assert wn.verify(plain, model, x).ok


class Cloned(nn.Linear):
    def clone(self) -> Cloned:
        twin = type(self)(self.in_features, self.out_features)
        with torch.no_grad():
            twin.weight.copy_(self.weight)
            twin.bias.copy_(self.bias)
        return twin


@pytest.mark.parametrize("kind", [nn.Linear, Cloned])
def test_a_layer_made_by_its_class(kind: type[nn.Linear]) -> None:
    """`type(layer)(...)` is a plain layer, which can be copied, pickled, loaded, reset, and converted."""
    layer: Any = wn.apply_weight_norm(kind(4, 3))
    made = layer.clone() if kind is Cloned else type(layer)(4, 3)
    assert isinstance(made.weight, nn.Parameter) and list(made.state_dict()) == ["weight", "bias"]
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(twin) is kind and same_bits(twin.weight, made.weight)
    if kind is Cloned:
        assert same_bits(made.weight, layer.weight)
    made.load_state_dict(made.state_dict())
    made.reset_parameters()
    before = made.weight.detach().clone()
    assert same_bits(wn.apply_weight_norm(made).weight, before)
    assert same_bits(wn.fold_weight_norm(made).weight, before)
