"""Modules that are made, copied and thrown away by the thousand.

A module of torch's is born with a dozen empty tables, nearly all of them for hooks. Those of the parametrizations of a
large net are most of its objects, and the collector goes through all of them again and again.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Container
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn

__all__ = ["LeanModule", "blank_module", "copied_module", "shared_by_copies"]

_TABLES = (set, OrderedDict)  # an empty dict costs the collector nothing
_SAME: set[Any] = {bool, int, str, torch.dtype, type(None)}  # what a copy may have in common with its original


class _Table:
    """An empty table of a module that is made when somebody asks for it."""

    def __init__(self, name: str, kind: type) -> None:
        self._name, self._kind = name, kind

    def __get__(self, module: nn.Module | None, owner: Any = None) -> Any:
        return self if module is None else module.__dict__.setdefault(self._name, self._kind())


class LeanModule(nn.Module):
    """A module whose tables of hooks come into being when they are first looked at; in files it has them all."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: kind() for name, kind in _LATE.items()} | self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copied_module(self, memo)


# the tables that a module of this version of torch has, but those that hold its tensors and children
_LATE = {name: type(one) for name, one in nn.Module().__dict__.items() if type(one) in _TABLES and not one}
for _name, _kind in _LATE.items():
    setattr(LeanModule, _name, _Table(_name, _kind))


@cache
def _blank(kind: Any, lean: bool) -> tuple[dict[str, Any], tuple[tuple[str, Any], ...]]:
    """The attributes of a new module of a kind: those that all may share, and the empty tables each has of its own."""
    made = kind().__dict__
    empty = {n: type(one) for n, one in made.items() if type(one) in (dict, *_TABLES) and not one}
    shared = {n: one for n, one in made.items() if n not in empty}
    return shared, tuple((n, make) for n, make in empty.items() if not (lean and n in _LATE))


def blank_module(module: nn.Module, kind: type[nn.Module]) -> None:
    """What `kind.__init__(module)` does."""
    shared, empty = _blank(kind, isinstance(module, LeanModule))  # type: ignore[arg-type]
    attributes = module.__dict__
    attributes.update(shared)
    for name, make in empty:
        attributes[name] = make()


def shared_by_copies(kind: Any) -> Any:
    """A class whose objects never change: copies of modules have them in common."""
    _SAME.add(kind)
    return kind


_Module = TypeVar("_Module", bound=nn.Module)


def copied_module(
    module: _Module, memo: dict[int, Any], twin: _Module | None = None, *, without: Container[str] = ()
) -> _Module:
    """A deep copy of a module that is copied as nn.Module is, whose empty tables need no copier each.

    The copy is `twin` where one is given, an object without attributes yet; it gets all attributes but those `without`.
    """
    if twin is None:
        twin = type(module).__new__(type(module))
    memo[id(module)] = twin
    for name, value in list(module.__dict__.items()):
        kind = type(value)
        if name in without:
            continue
        if kind in _SAME:
            twin.__dict__[name] = value
        else:
            empty = kind in (dict, *_TABLES) and not value
            twin.__dict__[name] = kind() if empty else copy.deepcopy(value, memo)
    return twin
