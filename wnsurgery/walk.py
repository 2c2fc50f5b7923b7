"""Walk a module tree: every tensor with all its names and what it is right now.

There is one walker, `slots`. The plan, folding and data-dependent initialisation all read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _WeightNorm as TorchWeightNorm
from torch.nn.utils.parametrize import ParametrizationList

from wnsurgery.reparam import WeightNorm

__all__ = ["Slot", "check_module", "has_own_parametrizations", "is_watched", "legacy_hooks", "modules_of", "slots"]

_KINDS: dict[Any, str] = {WeightNorm: "ours", TorchWeightNorm: "torch"}
_MAX_NAMES = 16  # names kept per shared module; deep diamonds of sharing have exponentially many


class Slot(NamedTuple):
    """One tensor of one module: where it is, under which names, and in what form.

    Attributes:
        module, parameter: the owner and the name the owner knows it by ("weight").
        names: every qualified name, the first met in walking order first.
        form: "plain", "buffer", "ours", "torch", "legacy" (weight norm of the three kinds), "other"
            (another parametrization), "part" (what another parametrization holds beside that), "quantized".
        tensor: the tensor itself ("plain", "buffer"), the direction v for the weight-norm forms.
        magnitude: g for the weight-norm forms, else None.
        ancestors: the modules from the root down to the owner, as (qualified name, module).
    """

    module: nn.Module
    parameter: str
    names: tuple[str, ...]
    form: str
    tensor: Tensor | None
    magnitude: Tensor | None
    ancestors: tuple[tuple[str, nn.Module], ...]

    def __repr__(self) -> str:
        return f"Slot(names={self.names!r}, form={self.form!r})"

    @property
    def fqn(self) -> str:
        """The qualified name of the tensor: `encoder.0.weight`."""
        return self.names[0]

    @property
    def entry(self) -> Any:
        """What holds a parametrized tensor, torch's `ParametrizationList`; None for one that is not parametrized."""
        table: Any = self.module._modules.get("parametrizations")
        return None if table is None else table._modules.get(self.parameter)

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The tensor's shape, None where it has none yet (lazy, quantized)."""
        t = self.tensor
        return None if t is None or (type(t) is not nn.Parameter and is_lazy(t)) else tuple(t.shape)


def check_module(model: Any) -> None:
    """Raise TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")


def slots(model: nn.Module, *, plain: bool = True) -> list[Slot]:
    """Every tensor of a module tree, each module once, with all its names, in the order of definition; without `plain`,
    those under a parametrization alone."""
    check_module(model)
    found: list[Slot] = []
    for module, names, ancestors, entries in _modules(model):
        own = _tensors(module, entries) if plain else _under_parametrization(module, entries)
        for parameter, form, tensor, magnitude in own:
            fqns = tuple([f"{n}.{parameter}" if n else parameter for n in names])
            found.append(Slot(module, parameter, fqns, form, tensor, magnitude, ancestors))
            if plain and form == "other":
                found += _parts(found[-1])
    return found


def _parts(slot: Slot) -> Iterator[Slot]:
    """What a parametrization that is not weight norm holds beside the tensor that stands for it."""
    for inner, module in slot.entry.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor is not slot.tensor:
                path = f"parametrizations.{slot.parameter}.{inner}{'.' if inner else ''}{name}"
                names = tuple([f"{n.removesuffix(slot.parameter)}{path}" for n in slot.names])
                ancestors = (*slot.ancestors, (names[0].removesuffix(f".{name}"), module))
                yield Slot(module, name, names, "part", tensor, None, ancestors)


def modules_of(model: nn.Module, *, machinery: bool = False) -> list[nn.Module]:
    """Each module of a tree once, in no order; with those that parametrizations are made of, or without.

    Many times quicker in deep trees than `model.modules()`.
    """
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            children = module._modules
            if not children:
                continue
            own = "parametrizations" if not machinery and _entries(module) else None
            if not (own and len(children) == 1):
                waiting += [child for name, child in children.items() if child is not None and name != own]
    return list(found.values())


_Entries = dict[str, ParametrizationList]
_Found = tuple[nn.Module, list[str], tuple[tuple[str, nn.Module], ...], _Entries]


def _modules(model: nn.Module) -> Iterable[_Found]:
    """Each module once, with all its names, its first chain of ancestors and its parametrized tensors; the machinery of
    these left out."""
    found: dict[int, _Found] = {}

    def visit(module: nn.Module, name: str, path: tuple[tuple[str, nn.Module], ...]) -> None:
        known = found.get(id(module))
        if known is None:
            path = (*path, (name, module))
            known = found[id(module)] = module, [name], path, _entries(module)
        else:
            names = known[1]
            if len(names) >= _MAX_NAMES or any(m is module for _, m in path):
                return
            names.append(name)
            path = (*path, (name, module))
        children, entries = module._modules, known[3]
        if entries and len(children) == 1:
            return
        for child_name, child in children.items():
            if child is not None and not (entries and child_name == "parametrizations"):
                visit(child, f"{name}.{child_name}" if name else child_name, path)

    visit(model, "", ())
    return found.values()


_NONE: _Entries = {}


def _entries(module: nn.Module) -> _Entries:
    """What torch keeps in a module for its parametrized tensors; one may have something else of that name."""
    if "parametrizations" not in module._modules or isinstance(module, torch.jit.ScriptModule):
        return _NONE  # the tables of TorchScript are not dicts
    table = module._modules["parametrizations"]
    if not isinstance(table, nn.ModuleDict):
        return _NONE
    entries: Any = table._modules
    for entry in entries.values():
        if not isinstance(entry, ParametrizationList):
            return _NONE
    return entries  # type: ignore[no-any-return]


def has_own_parametrizations(module: nn.Module) -> bool:
    """Whether a module has something of its own under the name that torch keeps parametrizations by."""
    name = "parametrizations"
    own = name in module.__dict__ or name in module._modules or name in module._parameters or name in module._buffers
    return (own or hasattr(type(module), name)) and not _entries(module)


_Tensor = tuple[str, str, Tensor | None, Tensor | None]  # parameter, form, tensor, magnitude


def is_watched(tensor: Tensor) -> bool:
    """Whether somebody is called in the backward pass when its gradient is there: a hook, or an optimizer that steps
    there (`torch.distributed.optim`)."""
    hooks = tensor._backward_hooks or tensor._post_accumulate_grad_hooks
    return bool(hooks) or "_in_backward_optimizers" in tensor.__dict__


def _under_parametrization(module: nn.Module, entries: _Entries) -> list[_Tensor]:
    """The parametrized tensors that a module holds itself."""
    found: list[_Tensor] = []
    if module._forward_pre_hooks:
        for name in _legacy_names(module):
            found.append((name, "legacy", module._parameters[f"{name}_v"], module._parameters[f"{name}_g"]))
    for name, entry in entries.items():
        found.append((name, *_parametrized(entry)))
    return found


def _legacy_names(module: nn.Module) -> list[str]:
    if isinstance(module, torch.jit.ScriptModule):
        return []
    return sorted({hook.name for hook in legacy_hooks(module)})


def _tensors(module: nn.Module, entries: _Entries) -> Iterator[_Tensor]:
    """Everything a module holds itself."""
    if isinstance(module, torch.jit.ScriptModule):
        yield from ((name, "plain", parameter, None) for name, parameter in module.named_parameters(recurse=False))
        yield from ((name, "buffer", buffer, None) for name, buffer in module.named_buffers(recurse=False))
        return
    under = _under_parametrization(module, entries)
    legacy = [name for name, form, _, _ in under if form == "legacy"] if under else ()
    parts = {f"{name}{end}" for name in legacy for end in ("_g", "_v")} if legacy else ()
    for name, parameter in module._parameters.items():
        if parameter is not None and name not in parts:
            yield name, "plain", parameter, None
    yield from under
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield name, "buffer", buffer, None
    if _is_quantized(type(module)) and callable(getattr(module, "weight", None)):
        yield "weight", "quantized", None, None


def _is_quantized(kind: type) -> bool:
    return kind.__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized"))


def _parametrized(entry: ParametrizationList) -> tuple[str, Tensor | None, Tensor | None]:
    modules, parameters = entry._modules, entry._parameters
    kind = _KINDS.get(type(modules.get("0")), "other")
    if kind != "other" and "1" not in modules:
        return kind, parameters.get("original1"), parameters.get("original0")
    held = {**entry._parameters, **entry._buffers}
    return "other", held.get("original", held.get("original1")), None


def legacy_hooks(module: nn.Module) -> list[Any]:
    """The hooks of `torch.nn.utils.weight_norm`, or of a copy of it, that act on a module."""
    return [
        hook
        for hook in module._forward_pre_hooks.values()
        if type(hook).__name__ == "WeightNorm"
        and hasattr(hook, "name")
        and {f"{hook.name}_g", f"{hook.name}_v"} <= module._parameters.keys()
    ]
