"""Whole modules in a pickle (`torch.save(model)`): which classes may be rebuilt without trusting the file, and how.

What an attacker can do with a list of allowed names: call any of them with any arguments, set any attribute of an
instance, and so put one allowed object where torch expects another. Hence

* a class stands in the list as a `Shell`: unpickling makes an empty instance, no constructor ever runs;
* only nn.Module classes that torch.nn defines itself, torch's legacy weight-norm hook and classes the caller
  vouches for are in it, and of functions only element-wise activations;
* strings such as `__setstate__`, which would redirect a method, are refused before anything is built;
* what was built is looked over before anyone uses it: no attribute hides a method, no hook but weight norm's.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm as LegacyHook

from wnsurgery.errors import UnsafeFileError, printable
from wnsurgery.stores.pickles import Scan

__all__ = ["ModulePolicy", "modules_in"]

_MAX_DEPTH = 64

# What torch.nn modules keep in attributes: pure, element-wise, no side effects whatever the arguments.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch.nn.functional.relu": F.relu,
    "torch.nn.functional.relu6": F.relu6,
    "torch.nn.functional.elu": F.elu,
    "torch.nn.functional.selu": F.selu,
    "torch.nn.functional.silu": F.silu,
    "torch.nn.functional.mish": F.mish,
    "torch.nn.functional.tanh": F.tanh,
    "torch.nn.functional.sigmoid": F.sigmoid,
    "torch.nn.functional.leaky_relu": F.leaky_relu,
    "torch.nn.functional.hardswish": F.hardswish,
    "torch._C._nn.gelu": F.gelu,
    "torch._C._nn.softplus": F.softplus,
}
_ALWAYS = vars(nn.Module()).keys()
_LEGACY_HOOK = "torch.nn.utils.weight_norm.WeightNorm"


class Shell:
    """Stands for a class in a pickle: NEWOBJ makes an empty instance of it, and calling it is refused."""

    def __init__(self, cls: Any) -> None:
        self.cls = cls
        self.__dict__["__new__"] = lambda _shell: cls.__new__(cls)

    def __call__(self, *_arguments: Any) -> Any:
        raise pickle.UnpicklingError(f"refuses to reduce: no constructor of {self.cls.__name__} is run for a file")


class ModulePolicy:
    """Which classes a pickled module may consist of; one policy for one file.

    Args:
        classes: classes of the caller's own, beside those of torch.nn: dotted name -> class.
        rebuild: dotted name -> function (module class, parameter names) that makes an empty instance of a class
            derived from a torch.nn class; it is called for torch.nn classes only.
        fault: what is wrong with a module that holds `parametrizations`; "" if nothing is.
    """

    def __init__(
        self,
        classes: Mapping[str, type],
        rebuild: Mapping[str, Callable[[type, tuple[str, ...]], nn.Module]],
        fault: Callable[[nn.Module], str],
    ) -> None:
        self.classes = {_LEGACY_HOOK: LegacyHook, **classes}
        self.rebuild = dict(rebuild)
        self.fault = fault
        self.derived: list[_Rebuild] = []

    def allow(self, seen: Scan, path: Path) -> list[tuple[Callable[..., Any], str]]:
        """What torch's restricted unpickler may use for this pickle, as (object, dotted name)."""
        entries: list[tuple[Callable[..., Any], str]] = []
        for name in seen.names:
            cls = self.classes.get(name) or _torch_class(name)
            if cls is not None:
                entries += [(Shell(cls), name), (cls, _unreachable(cls))]
            elif name in self.rebuild:
                self.derived.append(_Rebuild(self.rebuild[name]))
                entries.append((self.derived[-1], name))
            elif name in _FUNCTIONS:
                entries.append((_FUNCTIONS[name], name))
        if entries and seen.specials:
            raise _refused(path, f"its pickle sets {printable(seen.specials[0])}")
        return entries

    def vet(self, content: Any, path: Path) -> None:
        """Look a rebuilt object over before any method of its modules is called.

        Raises UnsafeFileError for anything a module saved by torch.save does not have.
        """
        for rebuild in self.derived:
            rebuild.finish()
        items = list(_reachable(content))
        for item in items:
            if isinstance(item, Shell):
                raise _refused(path, f"it keeps the class {item.cls.__name__} as a value")
        modules = [item for item in items if isinstance(item, nn.Module)]
        for check in (self._fault, _hook_fault, self._parametrization_fault):  # each relies on the one before
            for module in modules:
                reason = check(module)
                if reason:
                    raise _refused(path, f"{type(module).__name__}: {reason}")

    def _fault(self, module: nn.Module) -> str:
        cls, held = type(module), vars(module)
        if any(not isinstance(key, str) for key in held) or not held.keys() >= _ALWAYS:
            return "it lacks what every module has"
        for key, kinds in (("_parameters", nn.Parameter), ("_buffers", Tensor), ("_modules", nn.Module)):
            table = held[key]
            sound = isinstance(table, dict) and all(isinstance(k, str) for k in table)
            if not sound or any(not isinstance(v, kinds | None) for v in table.values()):
                return f"{key} is not what torch.nn makes it"
        parametrized = "parametrizations" in held["_modules"]
        own = cls.__bases__[0] if parametrized else cls
        if own not in self.classes.values() and _torch_class(_name_of(own)) is not own:
            return "not a class of torch.nn"
        for key in held:
            shared = getattr(cls, key, None)
            if callable(shared) or isinstance(shared, property):
                return f"the attribute {printable(key)} hides a method"
        return ""

    def _parametrization_fault(self, module: nn.Module) -> str:
        return self.fault(module) if "parametrizations" in module._modules else ""


def _hook_fault(module: nn.Module) -> str:
    for key, hooks in vars(module).items():
        if key.endswith("_hooks") and hooks:
            if key != "_forward_pre_hooks" or not isinstance(hooks, dict):
                return f"it carries {printable(key)}"
            if any(not _is_sound_hook(hook, module) for hook in hooks.values()):
                return "it carries a hook that is not weight norm's, or whose pair does not fit"
    return ""


class _Rebuild:
    """The caller's rebuild function, for classes of torch.nn and ordinary parameter names only.

    While the pickle is read, instances keep their torch class, whose state torch's unpickler may set; they get
    their derived classes afterwards. (Each derived class is one of a kind; allowing thousands of them takes torch
    quadratic time.)
    """

    def __init__(self, function: Callable[[type, tuple[str, ...]], nn.Module]) -> None:
        self.function = function
        self.made: list[tuple[nn.Module, tuple[str, ...]]] = []

    def __call__(self, shell: Any, names: Any, *rest: Any) -> nn.Module:
        plain = isinstance(names, tuple) and all(
            isinstance(n, str) and n.isidentifier() and not n.startswith("__") for n in names
        )
        if rest or not plain or not isinstance(shell, Shell) or _torch_class(_name_of(shell.cls)) is None:
            raise pickle.UnpicklingError("refuses to reduce: not a parametrized module of torch.nn")
        if any(getattr(shell.cls, name, None) is not None for name in names):
            raise pickle.UnpicklingError("refuses to reduce: a parameter would hide a method")
        module: nn.Module = shell.cls.__new__(shell.cls)
        self.made.append((module, names))
        return module

    def finish(self) -> None:
        for module, names in self.made:
            module.__class__ = type(self.function(type(module), names))
        self.made.clear()


def modules_in(content: Any) -> list[tuple[str, nn.Module]]:
    """Modules in a loaded object, each once, with the dotted path that leads to it ("" for the object itself).

    >>> [(path, type(m).__name__) for path, m in modules_in({"model": nn.ReLU(), "epoch": 3})]
    [('model', 'ReLU')]
    """
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()

    def visit(item: Any, path: str, depth: int) -> None:
        if id(item) in seen or depth > _MAX_DEPTH:
            return
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found.append((path, item))
        elif isinstance(item, dict | list | tuple):
            for key, value in item.items() if isinstance(item, dict) else enumerate(item):
                visit(value, f"{path}.{key}" if path else str(key), depth + 1)

    visit(content, "", 0)
    return found


def _torch_class(name: str) -> type | None:
    """The nn.Module class that torch.nn.modules defines under this very name."""
    module, _, attribute = name.rpartition(".")
    if not module.startswith("torch.nn.modules."):
        return None
    cls = getattr(sys.modules.get(module), attribute, None)
    sound = isinstance(cls, type) and issubclass(cls, nn.Module) and _name_of(cls) == name
    return cls if sound else None


def _name_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _unreachable(cls: type) -> str:
    """A name no pickle can spell (names end at a newline), so that a class itself is never handed to one."""
    return f"{_name_of(cls)}\n{id(cls)}"


def _reachable(content: Any) -> Iterator[Any]:
    """Every object in containers and in attributes of modules, hooks and vouched-for classes, each once."""
    stack, seen = [content], set[int]()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        inner: Iterable[Any] = ()
        if isinstance(item, dict):
            inner = (*item.keys(), *item.values())
        elif isinstance(item, list | tuple | set):
            inner = item
        elif not isinstance(item, Tensor | type | Shell) and hasattr(item, "__dict__"):
            inner = vars(item).values()
        stack += inner


def _is_sound_hook(hook: Any, module: nn.Module) -> bool:
    """Whether a hook is torch's legacy weight norm with a pair that fits: its kernel checks no shapes itself."""
    if type(hook) is not LegacyHook:
        return False
    name, dim = vars(hook).get("name"), vars(hook).get("dim")
    g, v = module._parameters.get(f"{name}_g"), module._parameters.get(f"{name}_v")
    if not isinstance(name, str) or type(dim) is not int or g is None or v is None:
        return False
    if dim == -1:
        return g.numel() == 1
    return 0 <= dim < v.ndim and tuple(g.shape) == tuple(s if d == dim else 1 for d, s in enumerate(v.shape))


def _refused(path: Path, reason: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{path}: refused, {reason}", hint="if you trust whoever made the file: trust_pickle=True (--trust-pickle)"
    )
