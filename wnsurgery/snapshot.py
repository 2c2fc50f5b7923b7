"""Modules as they were: remember classes, attributes and tables of a module tree and put them back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["HOOKS", "Snapshot"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Snapshot:
    """The class and the attributes of modules, containers in attributes included; tensors by identity only.

    >>> layer = nn.Linear(2, 2)
    >>> before = Snapshot([layer])
    >>> layer.note, layer.__class__ = "changed", nn.Identity
    >>> before.restore()
    >>> type(layer).__name__, hasattr(layer, "note")
    ('Linear', False)
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.saved: list[tuple[nn.Module, type, dict[str, Any], dict[str, Any]]] = []
        for module in modules:
            if not isinstance(module, torch.jit.ScriptModule):
                attributes = dict(module.__dict__)
                containers = {k: _copy(v) for k, v in attributes.items() if isinstance(v, dict | list | set)}
                self.saved.append((module, type(module), attributes, containers))

    def restore(self) -> None:
        """Put everything back; does no harm when nothing has changed."""
        for module, cls, attributes, containers in self.saved:
            if type(module) is not cls:
                module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, before in containers.items():
                _refill(attributes[name], before)

    def changed(self) -> Iterable[tuple[nn.Module, str, Any]]:
        """(module, attribute, value) of every attribute that is another object, or whose contents have changed."""
        for module, _, attributes, containers in self.saved:
            for name, value in module.__dict__.items():
                if attributes.get(name, self) is not value or (
                    name in containers and _differs(containers[name], value)
                ):
                    yield module, name, value

    def without_hooks(self) -> None:
        """Take hooks and compiled calls off until `restore`: they are the user's, and see what they should not."""
        for module, _, attributes, _ in self.saved:
            for name in HOOKS:
                if attributes.get(name):
                    module.__dict__[name] = OrderedDict()
            if attributes.get("_compiled_call_impl") is not None:
                module.__dict__["_compiled_call_impl"] = None


def _copy(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else set(value)


def _differs(before: Any, now: Any) -> bool:
    if isinstance(before, dict):
        return before.keys() != now.keys() or any(before[k] is not now[k] for k in before)
    if isinstance(before, list):
        return len(before) != len(now) or any(a is not b for a, b in zip(before, now, strict=True))
    return bool(before != now)


def _refill(container: Any, before: Any) -> None:
    if not _differs(before, container):
        return
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(before)
