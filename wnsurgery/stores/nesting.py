"""Nested containers as flat names and back: torch.distributed.checkpoint stores one level and the path of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["flattened", "nested"]

Path_ = tuple[Any, ...]


def nested(content: Mapping[str, Any], paths: Mapping[str, Path_]) -> dict[Any, Any]:
    """The containers that flat names stand for.

    The paths have strings for the keys of dicts and numbers for places in lists. Numbered parameters of an optimizer
    come back as numbers.

    >>> nested({"m.w": 1, "l.0": 2}, {"m.w": ("m", "w"), "l.0": ("l", 0)})
    {'m': {'w': 1}, 'l': [2]}

    Raises ValueError where one path goes through the end of another.
    """
    tree: dict[Any, Any] = {}
    branches = {id(tree)}
    for name, value in content.items():
        node, path = tree, paths[name]
        for part in path[:-1]:
            below = node.setdefault(part, {})
            if not node[part]:
                branches.add(id(below))
            if id(below) not in branches:
                raise ValueError(f"{name} goes through another entry")
            node = below
        if path[-1] in node:
            raise ValueError(f"{name} is there twice")
        node[path[-1]] = value
    return dict(_numbered(_listed(tree, branches)))


def _listed(node: Any, branches: set[int]) -> Any:
    """Branches whose keys are 0, 1, 2, ... as lists."""
    if id(node) not in branches:
        return node
    inner = {key: _listed(value, branches) for key, value in node.items()}
    places = all(type(key) is int for key in inner) and sorted(inner) == list(range(len(inner)))
    return [inner[i] for i in range(len(inner))] if places and inner else inner


def _numbered(node: Any) -> Any:
    """Optimizer states with their parameters' numbers as numbers."""
    if isinstance(node, list):
        return [_numbered(value) for value in node]
    if not isinstance(node, dict):
        return node
    state = node.get("state")
    if "param_groups" in node and isinstance(state, dict) and all(isinstance(k, str) and k.isdigit() for k in state):
        return {**node, "state": {int(k): v for k, v in state.items()}}
    return {key: _numbered(value) for key, value in node.items()}


def flattened(content: Mapping[Any, Any], names: Mapping[Path_, str]) -> tuple[dict[str, Any], dict[str, Path_]]:
    """Nested containers as one level, as torch flattens them: dicts always, lists where tensors or dicts are in them.

    >>> flattened({"m": {"w": 1}, "l": [2, 3]}, {})
    ({'m.w': 1, 'l': [2, 3]}, {'m.w': ('m', 'w'), 'l': ('l',)})

    Args:
        content: what `nested` gave, perhaps changed.
        names: the names known paths have; others get their parts with dots between.

    Raises ValueError where two paths have one name.
    """
    flat: dict[str, Any] = {}
    paths: dict[str, Path_] = {}
    for path, value in _leaves(content, ()):
        name = names.get(path) or ".".join(map(str, path))
        if name in flat:
            raise ValueError(f"{name} is there twice")
        flat[name], paths[name] = value, path
    return flat, paths


def _leaves(value: Any, path: Path_) -> Iterator[tuple[Path_, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, str(key)))
    elif isinstance(value, list) and _holds_more(value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*path, index))
    else:
        yield path, value


def _holds_more(value: Any) -> bool:
    if isinstance(value, list):
        return any(_holds_more(inner) for inner in value)
    return isinstance(value, Tensor | dict)
