"""How a weight under weight norm lives on its module: torch's `parametrize`, mended where it is broken.

`install` registers through `torch.nn.utils.parametrize`, so state-dict keys, `module.weight` and
`remove_parametrizations` are torch's. What differs from torch's own: a converted module can be pickled,
saved whole and deep-copied, and copies are independent; `reset_parameters()` and in-place writes into
`module.weight` (as `torch.nn.init` does) reach g and v; state dicts of all three layouts load.
"""

from __future__ import annotations

import copy
import copyreg
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from wnsurgery import fused
from wnsurgery.deferred import DeferredGroup, DeferredParameter, DeferredWeight
from wnsurgery.errors import NonFiniteWeightError, PairError, SelectionError
from wnsurgery.joint_graph import has_hooks, is_in_backward, is_joint, may_share
from wnsurgery.kept import AHEAD, Kept, Rooms, probes_of
from wnsurgery.large_linear import large_linear, serves_linear
from wnsurgery.loans import Loan, lend_out
from wnsurgery.looked_up import look_up, serves
from wnsurgery.multi_tensor import Item
from wnsurgery.preparation import Preparation, may_make
from wnsurgery.reparam import (
    ZERO_LOG,
    Ready,
    WeightNorm,
    blank_module,
    compose_eagerly,
    compose_in_one_pass,
    copied_module,
)

__all__ = ["WeightNormList", "install", "rebuild_parametrized", "restore_parameter"]

_MAX_HANDLES = 63  # weights handed out and still alive that are watched for writes
PASSING = frozenset(
    {
        *("_again", "_deferred", "_evaluation", "_handed_out", "_kept", "_lent"),
        *("_made", "_nested", "_probes", "_ready", "_round"),
    }
)  # attributes that belong to this process and this moment
_is_compiling, _tracing = torch.compiler.is_compiling, torch._C._get_tracing_state
_grad_enabled, _frame = torch.is_grad_enabled, sys._getframe
_ORDER = "_parameter_order"  # on the ModuleDict `parametrizations`: the host's parameter order before


class WeightNormList(ParametrizationList):
    """`module.parametrizations.weight` of a converted module: original0 is g, original1 is v."""

    _again: Loan | None = None  # handed out in training, for further uses
    _deferred: DeferredWeight | None = None  # in deferred mode
    _kept: Kept | None = None
    _made: Loan | None = None  # for the next use in training
    _preparation: Preparation | None = None  # with the other weights of its net

    def forward(self) -> Tensor:
        if _is_compiling():  # compiled code would depend on what is kept, and what was made
            return self._computed()
        if _grad_enabled():
            made = None if self._again is None else self._use_again()
            if made is None and self._made is not None:
                made = self._take_made()
            return self._computed() if made is None else made
        kept = self._kept
        if kept is not None:
            halves = self._parameters
            known = kept.is_of(halves.get("original0"), halves.get("original1"))
            if known and len(self._modules) == 1 and _tracing() is None:
                if not kept.used:
                    self._evaluated(kept)
                return kept.w
        return self._computed()

    def _computed(self) -> Tensor:
        rule: Any = self._modules["0"]
        g, v = self.pair()
        if "1" in self._modules:  # something is stacked on top
            return super().forward()
        if self._deferred is not None:
            leaf = self._leaf(self._deferred, g, v)
            if leaf is not None:
                return leaf
        if _is_watched(g, v):
            return rule(g, v)  # type: ignore[no-any-return]
        kept = self.__dict__.get("_kept")
        training = torch.is_grad_enabled()
        if kept is not None and not training and kept.is_of(g, v):
            self._evaluated(kept)
            return kept.w  # type: ignore[no-any-return]
        self.settle()
        return self._for_training(rule, g, v) if training else self._for_evaluation(rule, g, v)

    def _for_evaluation(self, rule: Any, g: Tensor, v: Tensor) -> Tensor:
        """The weight without a graph, kept until its pair changes."""
        net = self._preparation
        if net is None or not Kept.can_hold(g, v):
            return self._without_graph(rule, g, v)
        net.keep(self)
        kept = self._kept
        if kept is None:
            return self._without_graph(rule, g, v)
        self._evaluated(kept)
        return kept.w

    def _evaluated(self, kept: Kept) -> None:
        """An evaluation pass uses the weight kept."""
        kept.used = True
        if self._preparation is not None:
            self._preparation.evaluate(self)

    def is_to_keep(self) -> bool:
        """Whether the weight can be kept for uses in evaluation to come and is not; it is to be computed now."""
        g, v = self.pair()
        plain = "1" not in self._modules and self._deferred is None and not _is_watched(g, v)
        if not plain or not Kept.can_hold(g, v):
            return False
        kept = self.__dict__.get("_kept")
        if kept is not None and kept.is_of(g, v):
            return False
        self.settle()
        return True

    def keep(self, w: Tensor | None = None) -> None:
        """Keep the weight for uses in evaluation to come: one that somebody has computed, or compute it."""
        g, v = self.pair()
        rule: Any = self._modules["0"]
        if w is None or _hooked(rule):
            self._without_graph(rule, g, v)
        else:
            self._keep(w, g, v)

    def _keep(self, w: Tensor, g: Tensor, v: Tensor) -> None:
        if g.requires_grad or v.requires_grad:
            # as a Parameter would under no_grad: matmul chooses its kernel, and so the last bit, by this flag
            w.requires_grad_()
        if Kept.can_hold(g, v):
            self.__dict__["_kept"] = Kept(w, g, v, probes=probes_of(self, g, v))
        elif (record := lend_out(w, self, g, v)) is not None:
            self._watch(record)

    def _without_graph(self, rule: Any, g: Tensor, v: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # an ordinary tensor, so that its version tells of writes
            w: Tensor = rule.compose(g, v, self._rooms())
        self._keep(w, g, v)
        return w

    def _use_again(self) -> Tensor | None:
        """The weight of the last use in training, None where this one must have its own."""
        state, halves, modules = self.__dict__, self._parameters, self._modules
        again: Loan | None = state.get("_again")
        if again is None:
            return None
        if "_kept" in state or "_handed_out" in state or again.is_written():
            self.absorb()
        g, v = halves.get("original0"), halves.get("original1")
        if (
            "_again" in state
            and again.serves(g, v)
            and len(modules) == 1
            and "_kept" not in state
            and "_deferred" not in state
            and not _hooked(modules["0"])
            and _tracing() is None
            and may_make()
            and not is_in_backward()
            and (self._preparation is None or self._preparation.lasting)
            and not (has_hooks(g) or has_hooks(v))
        ):
            return again.view()
        state.pop("_again", None)
        return None

    def outside(self, w: Tensor) -> Tensor:
        """A weight just handed out in training, for somebody else than a forward pass, who may write through `.data` or
        hang a hook on it without using it: a node that is others', too, would call that without a gradient."""
        again = self._again
        if again is not None:
            again.look()
            return w
        if is_joint(w):
            w = w.clone()
            loan = lend_out(w, self, *self.pair())
            if loan is not None:
                self._watch(loan)
        for loan in self.__dict__.get("_handed_out", ()):
            if loan() is w:
                loan.look()
        return w

    def _take_made(self) -> Tensor | None:
        """The weight that was made ahead for this use, None if it does not serve it; it serves no other."""
        state, halves, modules = self.__dict__, self._parameters, self._modules
        if "_handed_out" in state or "_kept" in state:
            self.absorb()
        made: Loan | None = state.pop("_made", None)  # None where another thread was quicker
        rule: Any = modules["0"]
        if (
            made is None
            or len(modules) != 1
            or "_kept" in state
            or "_deferred" in state
            or _hooked(rule)
            or _tracing() is not None
            or not may_make()
            or not made.serves(halves.get("original0"), halves.get("original1"))
            or (made.shared and (is_in_backward() or not may_share(*self.pair())))
        ):
            return None
        return self._hand_over(made)

    def _hand_over(self, made: Loan) -> Tensor:
        net = self._preparation
        if net is not None:
            net.use(self)
        if made.lasting:
            self.__dict__["_again"] = made
        else:
            self._watch(made)
        return made.use()

    def _for_training(self, rule: Any, g: Tensor, v: Tensor) -> Tensor:
        """The weight with its graph: made by itself, or with those that the last pass used."""
        net, ready = self._preparation, None
        if is_in_backward():
            self.__dict__["_nested"] = True
            if net is not None:
                net.nest()
        sizes = fused.plan(g, v, rule.axes.kept, rule.axes.groups, rule.magnitude)
        if sizes is not None:
            made = net.make(self) if net is not None and v.numel() <= AHEAD and may_make() else None
            if made is not None:
                return self._hand_over(made)
            ready = compose_in_one_pass(g, v, sizes, self._rooms())
        elif net is not None:
            ready = net.take(self, g, v)
        w: Tensor = rule.compose(g, v, self._rooms(), ready)
        record = lend_out(w, self, g, v)
        if record is not None:
            self._watch(record)
        return w

    def make(self, ready: Ready | None = None) -> Loan | None:
        """The weight for a use in training to come, None where only the use itself can tell what it is.

        `ready` is what somebody has computed of it, from the pair as it is.
        """
        g, v = self.pair()
        rule: Any = self._modules["0"]
        if len(self._modules) != 1 or _hooked(rule):
            return None
        if ready is None:
            if _is_watched(g, v):
                return None
            sizes = fused.plan(g, v, rule.axes.kept, rule.axes.groups, rule.magnitude)
            ready = None if sizes is None else compose_in_one_pass(g, v, sizes, self._rooms())
        if ready is None or ready.w is None:
            return None
        w = compose_eagerly(g, v, rule.axes, rule.magnitude, self._rooms(), ready)
        return lend_out(w, self, g, v, ahead=True)

    def item(self) -> Item | None:
        """Its pair and rule, None where the factor cannot be told from the row norms in passing."""
        g, v = self.pair()
        rule: Any = self._modules["0"]
        known = v.device.type == "cpu" and not _is_watched(g, v) and "1" not in self._modules and rule.fits(g, v)
        return Item(g, v, rule.axes, rule.magnitude, v) if known else None

    def _is_shown(self) -> bool:
        """Whether the weight itself is somebody else's matter: a hook's, another parametrization's, deferred mode's."""
        hooked = _hooked(self) or _hooked(self._modules["0"])
        return hooked or self._deferred is not None or "1" in self._modules or bool(parametrize._cache_enabled)

    def rows(self, ids: Tensor, padding: int | None) -> Tensor | None:
        """Rows of the weight in training, None where the whole weight must be computed, or be there already."""
        g, v = self.pair()
        rule: Any = self._modules["0"]
        if self._is_shown() or _is_watched(g, v) or torch.autograd.forward_ad._current_level >= 0:
            return None
        if not (serves(ids, v, rule.axes) and rule.fits(g, v) and g.ndim == 2):
            return None
        self.absorb()
        return look_up(ids, g, v, rule.magnitude, padding)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x w^T + bias in training, None where w is to be computed by itself, as for all but large weights."""
        g, v = self.pair()
        if not serves_linear(x, g, v, bias):
            return None
        rule: Any = self._modules["0"]
        if self._is_shown() or not may_make() or _is_watched(g, v) or rule.magnitude != "linear" or not rule.fits(g, v):
            return None
        fused.start()
        self.settle()
        net = self._preparation
        return large_linear(x, g, v, bias, rule.axes, self._rooms(), Rooms() if net is None else net.rooms)

    def _leaf(self, weight: DeferredWeight, g: Tensor, v: Tensor) -> Tensor | None:
        """The weight of deferred mode, None where whoever is watching must see it computed from g and v."""
        if _is_compiling():  # kept current by optimizer steps and loading
            return weight.leaf if type(v) is DeferredParameter and not torch.compiler.is_exporting() else None
        return weight.current(g, v) if _tracing() is None else None

    def defer(self, weight: DeferredWeight | None, group: DeferredGroup) -> DeferredWeight | None:
        """Enter deferred mode, with the weight another owner of the pair has made if there is one; None where something
        is stacked on top."""
        if "1" in self._modules:
            return None
        self.absorb()
        for name in PASSING:
            self.__dict__.pop(name, None)
        g, v = self.pair()
        rule: Any = self._modules["0"]
        weight = DeferredWeight(group, rule, g, v) if weight is None else weight  # type: ignore[arg-type]
        self.__dict__["_deferred"] = weight
        return weight

    def undefer(self, *, settle: bool = True) -> None:
        """Leave deferred mode; `settle=False` for a pair that is of no use any more."""
        weight = self._deferred
        if weight is not None:
            weight.release(settle=settle)
            del self.__dict__["_deferred"]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As any module's; but to DistributedDataParallel, which asks module by module whose gradients to exchange, a
        deferred pair names its leaf, which is what gets one."""
        leaf = None if recurse or self._deferred is None else self._deferred.leaf
        if leaf is not None and sys._getframe(1).f_globals.get("__name__") == "torch.nn.parallel.distributed":
            yield (f"{prefix}." if prefix else "") + "leaf", leaf
            return
        yield from super().named_parameters(prefix, recurse, remove_duplicate)

    def _rooms(self) -> Rooms:
        rooms: Rooms | None = self.__dict__.get("_lent")
        if rooms is None:
            rooms = self.__dict__["_lent"] = Rooms()
        return rooms

    def _watch(self, loan: Loan) -> None:
        held = self.__dict__.get("_handed_out")
        self.__dict__["_handed_out"] = [loan] if held is None else [*held[-_MAX_HANDLES:], loan]

    def unwatch(self, gone: Loan) -> None:
        """A weight was let go as it was handed out."""
        state = self.__dict__
        left = [loan for loan in state.get("_handed_out", ()) if loan is not gone]
        if left:
            state["_handed_out"] = left
        else:
            state.pop("_handed_out", None)

    def pair(self) -> tuple[Tensor, Tensor]:
        g: Tensor | None = self._parameters.get("original0")
        v: Tensor | None = self._parameters.get("original1")
        if g is None or v is None:  # functional_call and replicas put plain tensors in their place
            g, v = self.__dict__.get("original0", g), self.__dict__.get("original1", v)
        assert g is not None and v is not None
        return g, v

    def settle(self) -> None:
        """Get ready for a weight computed anew: writes reach g and v, and a kept weight gives its memory."""
        kept = self.__dict__.get("_kept")
        if kept is not None and not kept.is_written():
            self.__dict__.pop("_kept", None)
        self.absorb()

    def absorb(self) -> None:
        """Let in-place writes into weights handed out reach g and v.

        `nn.init.zeros_(module.weight)` writes into a computed tensor. Its version counter tells; the write is
        taken over before anything else reads the pair, unless g or v themselves changed in between.
        """
        if self._deferred is not None:
            self._deferred.settle()
            return
        kept = self.__dict__.get("_kept")
        again, loans = self._again, self.__dict__.pop("_handed_out", None)
        if kept is None and again is None and not loans:
            return
        now_g, now_v = self.pair()
        if kept is not None and kept.is_written():
            self.__dict__.pop("_kept", None)
            if kept.was_of(now_g, now_v):
                self._store(kept.w)
                return
        if again is not None and again.is_written():
            self.__dict__.pop("_again", None)
            if again.is_of(now_g, now_v):
                self._store(again.written())
                return
        if not loans:
            return
        live = []
        for loan in loans:
            if not loan.is_of(now_g, now_v):
                continue
            if loan.is_written():
                self._store(loan.written())
                return
            if loan.is_out():
                live.append(loan)
        if live:
            self.__dict__["_handed_out"] = live

    def right_inverse(self, value: Tensor) -> None:
        """`module.weight = tensor`: decompose the tensor into g and v, in place."""
        if "1" in self._modules:
            super().right_inverse(value)
            return
        v = self.pair()[1]
        if value.shape != v.shape:
            raise PairError(f"a weight of shape {tuple(value.shape)} does not fit {tuple(v.shape)}")
        self._store(value)

    def _store(self, value: Tensor) -> None:
        rule: Any = self._modules["0"]
        g, v = self.pair()
        with torch.no_grad():
            new_g, new_v = rule.right_inverse(value.detach().to(v.dtype))
            g.copy_(new_g)
            v.copy_(new_v)
        for name in ("_again", "_handed_out", "_kept"):
            self.__dict__.pop(name, None)
        self._refresh()

    def _refresh(self) -> None:
        """Let compiled code, which runs on the leaf without asking, see what has become of g and v."""
        weight = self._deferred
        if weight is not None:
            g, v = self.pair()
            if (g is not weight.g or v is not weight.v) and type(g) is type(v) is nn.Parameter:
                weight.adopt(g, v)
            weight.current(g, v)

    def __getattr__(self, name: str) -> Any:
        if name in ("original0", "original1") and not torch.compiler.is_compiling():
            self.absorb()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        self.absorb()
        return {n: value for n, value in self.__dict__.items() if n not in PASSING and n != "_preparation"}

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightNormList:
        twin = copied_module(self, memo)
        if self._preparation is not None:
            twin.__dict__["_preparation"] = copy.deepcopy(self._preparation, memo)
        return twin

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.absorb()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.absorb()
        super()._load_from_state_dict(*arguments)
        self._refresh()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.absorb()
        weight = self._deferred
        for name in PASSING:
            self.__dict__.pop(name, None)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if weight is not None:
            weight.adopt(*self.pair())  # type: ignore[arg-type]
            self.__dict__["_deferred"] = weight
            self._refresh()
        return self


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_watched(g: Tensor, v: Tensor) -> bool:
    """Whether tracing or a function transform is on: then nothing may be remembered between accesses."""
    return (
        type(v) is not nn.Parameter
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or g.is_meta
        or v.is_meta
    )


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
    del module._parameters[name]
    table: Any = module._modules.get("parametrizations")
    if not isinstance(table, nn.ModuleDict) or not table._modules:
        table = nn.ModuleDict.__new__(nn.ModuleDict)
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


def restore_parameter(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    """Make `module.name` the plain parameter `weight` again and take every trace of parametrization away.

    The generated class is left as it is, since torch's copies share it with their original; a module that keeps
    other parametrizations gets a fresh one.
    """
    table = _table(module)
    order: tuple[str, ...] = table.__dict__.get(_ORDER, ())
    del table._modules[name]
    _undressed(module)
    if table._modules:
        _give_class(module, tuple(table._modules))
    else:
        del module._modules["parametrizations"]
    module._parameters[name] = weight
    reorder_parameters(module, order)


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


def reorder_parameters(module: nn.Module, order: tuple[str, ...]) -> None:
    """Put the parameters named in `order` in that order, among themselves: others keep their place before or after."""
    entries = dict(module._parameters)
    known = [name for name in order if name in entries]
    names = [name for name in entries if name not in order] if len(known) < len(entries) else []
    first = next((i for i, name in enumerate(entries) if name in order), 0) if names else 0
    names[first:first] = known
    module._parameters.clear()
    for name in names:
        module._parameters[name] = entries[name]


# The host's class ----------------------------------------------------------------------------------------


@cache
def _plain_method(name: str) -> Any:
    """A method that writes into parameters, run on the module as it was before conversion."""

    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        method = getattr(_made_by_parametrize(type(self)).__bases__[0], name)
        with _as_plain(self):
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
    base: Any = _made_by_parametrize(type(self)).__bases__[0]
    names = tuple(_table(self)._modules)
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
    return _give_class(base.__new__(base, *arguments), names)


def _rebuild_by(function: Any, arguments: tuple[Any, ...], names: tuple[str, ...]) -> nn.Module:
    module: nn.Module = function(*arguments)
    for name in names:
        module.__dict__.get("_parameters", {}).pop(name, None)
    return _give_class(module, names)


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
    if _is_copied_plainly(base):
        members["__deepcopy__"] = _deepcopy
    for name in ("reset_parameters", "_reset_parameters"):
        if callable(getattr(base, name, None)):
            members[name] = _plain_method(name)
    members |= {name: _computed(name) for name in names}
    for theirs, ours in ((nn.Embedding.forward, _look_up), (nn.Linear.forward, _map)):
        if base.forward is theirs and "weight" in names:
            members["forward"] = ours
    return members


def _is_copied_plainly(base: Any) -> bool:
    """Whether a class leaves all of how it is copied and pickled to nn.Module."""
    names = ("__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__")
    same = all(getattr(base, name, None) is getattr(nn.Module, name, None) for name in names)
    return same and base.__new__ is object.__new__ and not hasattr(base, "__deepcopy__") and not _has_slots(base)


def _has_slots(base: Any) -> bool:
    return any(c.__dict__.get("__slots__") for c in base.__mro__)


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What copying by way of `_reduce_ex` comes to for such a class, in a fraction of the time."""
    base, table = _made_by_parametrize(type(self)).__bases__[0], _table(self)
    twin = memo[id(self)] = rebuild_parametrized(base, tuple(table._modules))
    if type(table) is nn.ModuleDict:
        copied_module(table, memo)
    return copied_module(self, memo, twin)


@cache
def _computed(name: str) -> property:
    """`module.weight`: straight from our list, past two module calls, where nobody has hooks there; of a module whose
    weight is a plain one, that."""

    def weight(self: nn.Module) -> Tensor:
        table = self._modules.get("parametrizations")
        entry: Any = None if table is None else table._modules.get(name)
        if type(entry) is WeightNormList and not (
            entry._forward_hooks or entry._forward_pre_hooks or parametrize._cache_enabled
        ):
            w = entry.forward()
            if not _grad_enabled() or _is_compiling() or _frame(1).f_code.co_name == "forward":
                return w
            again = entry._again
            return w if again is not None and again.own else entry.outside(w)
        if entry is None:
            if name in self.__dict__:
                return self.__dict__[name]  # type: ignore[no-any-return]
            raise AttributeError(name)  # upon which `nn.Module.__getattr__` looks among its parameters
        return _as_torch_does(self, name)

    def assign(self: nn.Module, value: Any) -> None:
        table = self._modules.get("parametrizations")
        if table is None or name not in table._modules:
            self.__dict__[name] = value
        else:
            table._modules[name].right_inverse(value)  # type: ignore[union-attr,operator]

    return property(weight, assign)


def _look_up(self: nn.Embedding, input: Tensor) -> Tensor:
    """An embedding's forward pass; in training, where few rows are asked for, from those rows of g and v alone."""
    entry, found = _entry(self), None
    if torch.is_grad_enabled() and type(entry) is WeightNormList and self.max_norm is None:
        found = None if self.sparse or self.scale_grad_by_freq else entry.rows(input, self.padding_idx)
    return nn.Embedding.forward(self, input) if found is None else found


def _map(self: nn.Linear, input: Tensor) -> Tensor:
    """A linear layer's forward pass; in training, a large weight is computed with the layer's output."""
    y = None
    if not _is_compiling() and _grad_enabled() and _tracing() is None:
        entry = _entry(self)
        v = entry._parameters.get("original1") if type(entry) is WeightNormList else None
        y = entry.linear(input, self.bias) if v is not None and v.numel() > AHEAD else None
    return nn.Linear.forward(self, input) if y is None else y


def _entry(module: nn.Module) -> Any:
    """What holds the weight of a layer; None for one that was taken out of weight norm through a copy, or whose bound
    method somebody kept."""
    table = module._modules.get("parametrizations")
    return None if table is None else table._modules.get("weight")


def _as_torch_does(module: nn.Module, name: str) -> Tensor:
    """With hooks, and within `parametrize.cached()`."""
    entry: Any = module.parametrizations[name]  # type: ignore[index]
    if not parametrize._cache_enabled:
        return entry()  # type: ignore[no-any-return]
    if _tracing() is not None:
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
    base: Any = _made_by_parametrize(type(self)).__bases__[0]
    table = _table(self)
    for name, entry in table._modules.items():
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
