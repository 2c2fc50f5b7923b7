"""Modules whose weights are under weight norm: the class they get, and how they get it and lose it.

`install` registers as `torch.nn.utils.parametrize` does, so state-dict keys, `module.weight` and
`remove_parametrizations` are torch's. What differs from torch's own: a converted module can be pickled, saved whole and
deep-copied, and copies are independent; `reset_parameters()` reaches g and v; state dicts of all three layouts load.
"""

from __future__ import annotations

import copy
import copyreg
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wnsurgery.errors import NonFiniteWeightError, PairError, SelectionError
from wnsurgery.lean_modules import LeanModule, blank_module, copied_module
from wnsurgery.loaded_keys import take_out
from wnsurgery.mechanism import WeightNormList, unchanged
from wnsurgery.own_passes import forward_of, read_before
from wnsurgery.preparation import Preparation
from wnsurgery.reparam import ZERO_LOG, WeightNorm
from wnsurgery.safety import is_recurrent

__all__ = [
    "WeightNormDict",
    "fresh_parameter",
    "install",
    "new_parameter",
    "rebuild_parametrized",
    "reorder_parameters",
    "restore_parameter",
]

_ORDER = "_parameter_order"  # on the ModuleDict `parametrizations`: the host's parameter order before
_is_compiling, _grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
_frame = sys._getframe


class WeightNormDict(LeanModule, nn.ModuleDict):
    """`module.parametrizations` of a converted module."""


# On and off ----------------------------------------------------------------------------------------------


def install(
    module: nn.Module,
    name: str,
    rule: WeightNorm,
    pair: tuple[Tensor, Tensor] | tuple[nn.Parameter, nn.Parameter],
    net: Preparation | None = None,
) -> tuple[nn.Parameter, nn.Parameter]:
    """Put `module.name` under weight norm with the given (g, v); returns them as the Parameters they became.

    Given Parameters are registered as they are, so that the owners of a tied weight share one pair. Weights of one net
    are quicker to compute when they have a `Preparation` in common.
    """
    order = tuple(module._parameters)
    old = module._parameters[name]
    assert old is not None
    entry = _new_list(rule, pair, old)
    if net is not None:
        entry.__dict__["_preparation"] = net
        net.elements += old.numel()
    del module._parameters[name]
    table: Any = module._modules.get("parametrizations")
    if not isinstance(table, nn.ModuleDict) or not table._modules:
        table = WeightNormDict.__new__(WeightNormDict)
        blank_module(table, nn.ModuleDict)
        module._modules["parametrizations"] = table  # past any __setattr__ of the user's
        _give_class(module, (name,))
    else:
        _give_class(_undressed(module), (*table._modules, name))
    table._modules[name] = entry
    if not module.training or not table.training:
        table.train(module.training)
    table.__dict__.setdefault(_ORDER, order)
    return entry._parameters["original0"], entry._parameters["original1"]  # type: ignore[return-value]


def _new_list(rule: WeightNorm, pair: tuple[Tensor, Tensor], old: Tensor) -> WeightNormList:
    """A WeightNormList that holds exactly this pair, with the old parameter's attributes on v."""
    entry = WeightNormList.__new__(WeightNormList)
    blank_module(entry, nn.ModuleList)
    entry._modules["0"] = rule
    entry.__dict__.update(unsafe=True, is_tensor=False, ntensors=2)
    for key, tensor in zip(("original0", "original1"), pair, strict=True):
        if type(tensor) is Tensor or not isinstance(tensor, nn.Parameter):
            tensor = new_parameter(tensor, old.requires_grad)  # noqa: PLW2901 - now a Parameter
        entry._parameters[key] = tensor
    if old.__dict__:
        tensor.__dict__.update(old.__dict__)
    return entry


def new_parameter(tensor: Tensor, requires_grad: bool) -> nn.Parameter:
    """`nn.Parameter(tensor, requires_grad)`, which for a plain tensor does little else."""
    if type(tensor) is not Tensor:
        return nn.Parameter(tensor, requires_grad)
    made: nn.Parameter = Tensor._make_subclass(nn.Parameter, tensor, requires_grad)
    return made


def fresh_parameter(tensor: Tensor, requires_grad: bool) -> nn.Parameter:
    """A plain tensor that was just computed, without a graph, and that nobody else holds, itself as a Parameter."""
    tensor.__class__ = nn.Parameter
    tensor.requires_grad = requires_grad
    return tensor  # type: ignore[return-value]


def restore_parameter(module: nn.Module, name: str, weight: nn.Parameter) -> Any:
    """Make `module.name` the plain parameter `weight` again and take every trace of parametrization away; returns the
    list that held its pair.

    The generated class is left as it is, since torch's copies share it with their original; a module that keeps
    other parametrizations gets a fresh one, torch's where none of them is ours.
    """
    table = _table(module)
    order: tuple[str, ...] = table.__dict__.get(_ORDER, ())
    entry = table._modules.pop(name)
    _undressed(module)
    if not table._modules:
        del module._modules["parametrizations"]
    elif any(isinstance(other, WeightNormList) for other in table._modules.values()):
        _give_class(module, tuple(table._modules))
    else:
        parametrize._inject_new_class(module)
        for other in table._modules:
            parametrize._inject_property(module, other)
    module._parameters[name] = weight
    reorder_parameters(module, order)
    return entry


def _undressed(module: nn.Module) -> nn.Module:
    """A parametrized module with the class it had before."""
    made = _made_by_parametrize(type(module))
    if made is not type(module):
        raise SelectionError(
            f"{type(module).__name__} was made over {made.__name__} after the conversion (fully_shard does so)",
            hint="do the surgery before sharding",
        )
    _set_class(module, made.__bases__[0])
    return module


def _set_class(module: nn.Module, cls: type) -> None:
    object.__setattr__(module, "__class__", cls)  # past nn.Module's `__setattr__`, which looks whether it is a tensor


def _made_by_parametrize(cls: type) -> type:
    """The generated class in a converted module's line: its own, unless somebody made another over it since."""
    if "_made_over" in cls.__dict__:
        return cls
    line = (c for c in cls.__mro__ if c.__module__ == parametrize.__name__ and c.__name__.startswith("Parametrized"))
    return next(line, cls)


def _table(module: nn.Module) -> Any:
    """The ModuleDict of a parametrized module."""
    return module._modules["parametrizations"]


def _is_converted(module: nn.Module) -> bool:
    """Whether a module of a generated class has a weight under a parametrization: `type(layer)(3, 2)` has none."""
    return "parametrizations" in module._modules


def reorder_parameters(module: nn.Module, order: tuple[str, ...]) -> None:
    """Put the parameters named in `order` in that order, among themselves: others keep their place before or after."""
    held = module._parameters
    if len(order) == len(held) and all(map(held.__contains__, order)):
        for name in order:
            held[name] = held.pop(name)
        return
    entries = dict(held)
    known = [name for name in order if name in entries]
    names = [name for name in entries if name not in order] if len(known) < len(entries) else []
    first = next((i for i, name in enumerate(entries) if name in order), 0) if names else 0
    names[first:first] = known
    held.clear()
    for name in names:
        held[name] = entries[name]


# The host's class ----------------------------------------------------------------------------------------


@cache
def _plain_method(name: str) -> Any:
    """A method that writes into parameters, run on the module as it was before conversion."""

    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        method = getattr(_made_by_parametrize(type(self)).__bases__[0], name)
        with _as_plain(self) if _is_converted(self) else nullcontext():
            return method(self, *args, **kwargs)

    wrapper.__name__ = name
    return wrapper


@contextmanager
def _as_plain(module: nn.Module) -> Iterator[None]:
    """The module as it was before conversion, for methods that write into its parameters; then take them over."""
    cls, table = type(module), _table(module)
    lists = {n: e for n, e in table._modules.items() if isinstance(e, WeightNormList)}
    if len(lists) != len(table._modules):
        yield  # another parametrization sits beside ours: its weights cannot be laid open
        return
    kept = dict(module._parameters)
    weights = {n: _plain_copy(e) for n, e in lists.items()}
    before = {n: w._version for n, w in weights.items()}
    module.__class__ = _made_by_parametrize(cls).__bases__[0]
    del module._modules["parametrizations"]
    module._parameters.update(weights)
    reorder_parameters(module, table.__dict__.get(_ORDER, ()))
    try:
        yield
        for name, entry in lists.items():
            held = module._parameters[name]
            if held is not None and (held is not weights[name] or held._version != before[name]):
                entry.right_inverse(held)
        kept.update((n, p) for n, p in module._parameters.items() if n not in lists)
    finally:
        module._parameters.clear()
        module._parameters.update(kept)
        module._modules["parametrizations"] = table
        module.__class__ = cls


def _plain_copy(entry: WeightNormList) -> nn.Parameter:
    w = entry().detach()
    return nn.Parameter(w if entry._deferred is None else w.clone(), requires_grad=entry.pair()[1].requires_grad)


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    """Pickle as (base class, names, state): the generated class itself never enters the file."""
    made = _made_by_parametrize(type(self))
    converted = _is_converted(self)
    if converted and _frame(1).f_code is copy.deepcopy.__code__ and made.__dict__.get("_copied_plainly"):
        return _itself, (_Copied(self),)
    base: Any = made.__bases__[0]
    names = tuple(_table(self)._modules) if converted else ()
    function, arguments, *rest = base.__reduce_ex__(self, max(int(protocol), 2))
    function = base if function is type(self) else function
    arguments = tuple(base if a is type(self) else a for a in arguments)
    state = rest[0] if rest else None
    if isinstance(state, dict) and isinstance(state.get("_flat_weights"), list):
        # RNNs keep computed weights in a list; they are computed anew at the next forward
        flat = zip(state["_flat_weights_names"], state["_flat_weights"], strict=True)
        rest[0] = {**state, "_flat_weights": [torch.empty(0) if n in names else w for n, w in flat]}
    if function.__name__ == "__newobj__" and function.__module__ == copyreg.__name__:
        return (rebuild_parametrized, (base, names, *arguments[1:]), *rest)
    return (_rebuild_by, (function, arguments, names), *rest)


def rebuild_parametrized(base: type, names: tuple[str, ...], *arguments: Any) -> nn.Module:
    """Unpickling and copying: an empty module of a fresh class over `base`, its state yet to be set."""
    if not (isinstance(base, type) and issubclass(base, nn.Module)):
        raise TypeError(f"{base!r} is not a module class")
    module: nn.Module = base.__new__(base, *arguments)
    return _give_class(module, names) if names else module


def _rebuild_by(function: Any, arguments: tuple[Any, ...], names: tuple[str, ...]) -> nn.Module:
    module: nn.Module = function(*arguments)
    for name in names:
        module.__dict__.get("_parameters", {}).pop(name, None)
    return _give_class(module, names) if names else module


class _Shared(type):
    """Classes of converted modules, one for all modules that have a class and weights' names in common.

    Torch's `parametrize` takes a module's class for the module's own: what it puts there for one module must do for
    all, and what it deletes for one the others still need. Its properties are therefore ours, which ask each module.
    """

    def __setattr__(cls, name: str, value: Any) -> None:
        torchs = isinstance(value, property) and getattr(value.fget, "__module__", "") == parametrize.__name__
        super().__setattr__(name, _computed(name) if torchs else value)

    def __delattr__(cls, name: str) -> None:
        if cls.__dict__.get(name) is not _computed(name):
            super().__delattr__(name)


_classes: weakref.WeakKeyDictionary[type, dict[tuple[str, ...], weakref.ref[type]]] = weakref.WeakKeyDictionary()


def _give_class(module: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """A class over the module's present one, as torch's `parametrize` makes it, with what torch's lacks: pickling,
    copying, all layouts, resetting, and `module.weight` by a short way."""
    base: Any = type(module)
    kind = _Shared if type(base) in (type, _Shared) else type  # others may have rules for classes of their own
    known = _classes.setdefault(base, {}) if kind is _Shared else {}
    cls: Any = known[names]() if names in known else None
    if cls is None or cls._made_over != _changeable(base):
        cls = kind(f"Parametrized{base.__name__}", (base,), _members(base, names))
        known[names] = weakref.ref(cls)
    _set_class(module, cls)
    allowed = torch.serialization.get_safe_globals()
    if rebuild_parametrized in allowed:
        # a reader that executes nothing only sets the state of classes it was told of
        torch.serialization.add_safe_globals([(cls, f"{__name__}.{cls.__name__}.{id(cls)}")])
    return module


def _changeable(base: Any) -> tuple[Any, ...]:
    """What of a class decides how it is converted, and is at times replaced at run time."""
    return tuple(getattr(base, name, None) for name in ("forward", "reset_parameters", "_reset_parameters"))


def _members(base: Any, names: tuple[str, ...]) -> dict[str, Any]:
    members: dict[str, Any] = {"__module__": parametrize.__name__, "_made_over": _changeable(base)}
    members |= {"__reduce_ex__": _reduce_ex, "_load_from_state_dict": _load_any_layout}
    members |= {"_copied_plainly": _is_copied_plainly(base), "__prepare_scriptable__": _refuse_scripting}
    members |= {"register_parameter": _register_parameter}
    for name in ("reset_parameters", "_reset_parameters"):
        if callable(getattr(base, name, None)):
            members[name] = _plain_method(name)
    members |= {name: _computed(name) for name in names}
    if (forward := forward_of(base, names)) is not None:
        members["forward"] = forward
    return members


def _register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """As any module's, but it says what to do instead where `module.weight = nn.Parameter(...)` cannot be done."""
    if _is_converted(self) and name in _table(self)._modules:
        raise KeyError(
            f"{name!r} is under weight norm, and no Parameter can become part of its pair: assign the values, "
            f"module.{name} = tensor, or fold the layer first"
        )
    base: Any = _made_by_parametrize(type(self)).__bases__[0]
    base.register_parameter(self, name, param)


def _refuse_scripting(self: nn.Module) -> nn.Module:
    """What `torch.jit.script` compiles in a module's place: its compiler reads no property, and says so obscurely."""
    if not _is_converted(self):
        return self
    raise SelectionError(
        "TorchScript cannot compile a module under weight norm",
        hint="script a copy that is folded, fold_weight_norm(copy.deepcopy(model)), or use torch.jit.trace",
    )


def _is_copied_plainly(base: Any) -> bool:
    """Whether a class leaves all of how it is copied and pickled to nn.Module."""
    names = ("__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__")
    same = all(getattr(base, name, None) is getattr(nn.Module, name, None) for name in names)
    return same and base.__new__ is object.__new__ and not hasattr(base, "__deepcopy__")


class _Copied:
    """A module to be copied: in a fraction of the time that copying the state takes which `_reduce_ex` gives.

    Not by a `__deepcopy__` of the module's: a wrapper that hands attributes it lacks on to the module in it, as peft's
    does, would be copied by that, and come out as the module alone.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        module = self._module
        base = _made_by_parametrize(type(module)).__bases__[0]
        twin = memo[id(module)] = rebuild_parametrized(base, tuple(_table(module)._modules))
        return copied_module(module, memo, twin)


def _itself(module: nn.Module) -> nn.Module:
    return module


@cache
def _computed(name: str) -> property:
    """`module.weight`: straight from our list, past two module calls, where nobody has hooks there; of a module whose
    weight is a plain one, that."""

    def weight(self: nn.Module) -> Tensor:
        table = self._modules.get("parametrizations")
        entry: Any = None if table is None else table._modules.get(name)
        if type(entry) is WeightNormList and not (
            entry._forward_hooks
            or entry._forward_pre_hooks
            or "forward" in entry.__dict__
            or parametrize._cache_enabled
        ):
            if _is_compiling():
                return entry.forward()
            if not _grad_enabled():
                w = unchanged(entry)
                return entry.forward() if w is None else w
            if (w := read_before(self, name, entry)) is not None:
                return w
            w = entry.in_training()
            if _frame(1).f_code.co_name == "forward":
                return w
            again = entry._again
            return w if again is not None and again.own is not None else entry.outside(w)
        if entry is None:
            if name in self.__dict__:
                return self.__dict__[name]  # type: ignore[no-any-return]
            if name in self._parameters:
                return self._parameters[name]  # type: ignore[return-value]
            raise AttributeError(name)
        return _as_torch_does(self, name)

    def assign(self: nn.Module, value: Any) -> None:
        table = self._modules.get("parametrizations")
        if table is None or name not in table._modules:
            self.__dict__[name] = value
        else:
            table._modules[name].right_inverse(value)  # type: ignore[union-attr,operator]
            if is_recurrent(self) and name in self._flat_weights_names:  # type: ignore[operator]
                # torch has put the value into the module's second list, which it makes anew where a weight is another
                self._flat_weight_refs[self._flat_weights_names.index(name)] = weakref.ref(value)  # type: ignore

    return property(weight, assign)


def _as_torch_does(module: nn.Module, name: str) -> Tensor:
    """With hooks, and within `parametrize.cached()`."""
    entry: Any = module.parametrizations[name]  # type: ignore[index]
    if not parametrize._cache_enabled:
        return entry()  # type: ignore[no-any-return]
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("Cannot trace a model while caching parametrizations.")
    cached: Any = parametrize._cache
    key = (id(module), name)
    if cached.get(key) is None:
        cached[key] = entry()
    return cached[key]  # type: ignore[no-any-return]


def _load_any_layout(
    self: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
) -> None:
    """Accept `weight_g`/`weight_v` and plain `weight` keys where the pair's own keys are missing."""
    take_out(state_dict)
    base: Any = _made_by_parametrize(type(self)).__bases__[0]
    for name, entry in _table(self)._modules.items() if _is_converted(self) else ():
        if isinstance(entry, WeightNormList):
            _to_own_layout(state_dict, f"{prefix}{name}", f"{prefix}parametrizations.{name}.original", entry)
    base._load_from_state_dict(self, state_dict, prefix, metadata, *rest)


def _to_own_layout(state_dict: dict[str, Any], plain: str, own: str, entry: WeightNormList) -> None:
    """Rename, split or rescale what a state dict holds for one weight, so that it is this pair's."""
    rule: Any = entry._modules["0"]
    mark = f"{own.removesuffix('original')}0.log_scale"
    if f"{plain}_log_scale" in state_dict:
        state_dict[mark] = state_dict.pop(f"{plain}_log_scale")
    stored = "log" if mark in state_dict else "linear"
    if f"{own}0" not in state_dict and f"{own}1" not in state_dict:
        for mine, theirs in ((f"{own}0", f"{plain}_g"), (f"{own}1", f"{plain}_v")):
            if theirs in state_dict:
                state_dict[mine] = state_dict.pop(theirs)
    if plain in state_dict and f"{own}0" not in state_dict:
        weight, (g, v) = state_dict.pop(plain), entry.pair()
        if isinstance(weight, Tensor) and weight.shape == v.shape and not weight.is_meta:
            try:
                state_dict[f"{own}0"], state_dict[f"{own}1"] = rule.right_inverse(weight.detach().to(v.dtype))
            except NonFiniteWeightError as error:
                raise NonFiniteWeightError(f"{plain}: {error.message}") from error
        else:  # let torch name the shape that does not fit
            state_dict[f"{own}0"], state_dict[f"{own}1"] = g, weight
        stored = rule.magnitude
    held = state_dict.get(f"{own}0")
    if isinstance(held, Tensor) and stored != rule.magnitude:
        state_dict[f"{own}0"] = (
            _logarithm(held, plain) if rule.magnitude == "log" else held.double().exp().to(held.dtype)
        )
    if rule.magnitude != "log":
        state_dict.pop(mark, None)
    elif f"{own}0" in state_dict:
        state_dict.setdefault(mark, rule.log_scale)


def _logarithm(g: Tensor, key: str) -> Tensor:
    if not g.is_meta and bool((g < 0).any()):
        raise PairError(f"{key}: a negative magnitude has no logarithm; load it into a linear one")
    return torch.where(g == 0, torch.full_like(g, ZERO_LOG), g.log())
