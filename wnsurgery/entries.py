"""One state dict or module of a checkpoint that holds more: which one `entry` names, and what is left out with it."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from wnsurgery.errors import InputError, printable
from wnsurgery.states import dicts, is_optimizer, state_dicts
from wnsurgery.stores.modules import modules_in

__all__ = ["Entry", "all_entries", "only_tensors", "shown_names", "taken", "the_only"]

Path_ = str | os.PathLike[str]
Entry = tuple[str, Any]

_SHOWN = 5
_MAX_DEPTH = 64


def all_entries(content: Any) -> list[Entry]:
    """The state dicts and modules in a loaded checkpoint, each with its dotted path, "" for the object itself.

    >>> [path for path, _ in all_entries({"generator": {"w": Tensor([1.0])}, "act": nn.ReLU(), "epoch": 3})]
    ['generator', 'act']
    """
    return [(state.path, state.entries) for state in state_dicts(content)] + modules_in(content)


def the_only(path: Path_, found: Sequence[Entry], kind: str) -> Any:
    """What was found under its path, if it is one thing. Raises InputError that names them if there are several."""
    if len(found) == 1:
        return found[0][1]
    names = ", ".join(printable(where or "the file itself") for where, _ in found[:_SHOWN])
    reason = f"several could be meant: {names}" if found else f"no such {kind} in it"
    raise InputError.of(path, reason, "entry='...' (--entry ...) names the one to take")


def taken(path: Path_, content: Any, entry: str | None, *, flat: bool = False) -> tuple[Any, tuple[str, ...]]:
    """One state dict or module of a loaded checkpoint, alone, and the names of what is left out.

    A state dict keeps its own tensors and values; what is nested in it goes, as what stands beside it does.

    >>> taken("g.pth", {"generator": {"w": 1, "b": Tensor([2.0])}, "epoch": 3}, "generator")
    ({'w': 1, 'b': tensor([2.])}, ('epoch',))

    Args:
        path: of the file, for messages.
        content: what it holds.
        entry: dotted path of the one to take; None takes the only one there is.
        flat: keep tensors alone, as a format needs that holds nothing else.

    Raises InputError, naming those that are there, where none has this path, or where several could be meant.
    """
    found = all_entries(content)
    fitting = [(where, item) for where, item in found if entry in (None, where)]
    if len(fitting) != 1:
        names = shown_names([where or "the file itself" for where, _ in found])
        if not fitting:
            reason = f"no state dict or module is called {printable(entry)!r} in it; there are {names}"
            raise InputError.of(path, reason)
        example = printable(next(where for where, _ in found if where))
        hint = f"entry={example!r} (--entry {example}) takes one of them; a .pt file holds all"
        raise InputError.of(path, f"holds several state dicts or modules ({names}), of which one has to be named", hint)
    where, item = fitting[0]
    left = _beside(content, item)
    if isinstance(item, nn.Module):
        return item, left
    gone = [key for key, value in item.items() if (_is_no_tensor(key, value) if flat else _is_nested(value))]
    full = (f"{where}.{key}" if where else str(key) for key in gone)
    return _without(item, gone), (*left, *full)


def only_tensors(state: dict[Any, Any]) -> tuple[dict[Any, Any], tuple[str, ...]]:
    """The tensors of a state dict under names, and the names of what else there is.

    >>> tensors, left = only_tensors({"w": Tensor([1.0]), "_extra_state": 3})
    >>> list(tensors), left
    (['w'], ('_extra_state',))
    """
    gone = [key for key, value in state.items() if _is_no_tensor(key, value)]
    return _without(state, gone), tuple(map(str, gone))


def shown_names(names: Sequence[str]) -> str:
    """Names for a message, the first few of many.

    >>> shown_names(["a", "b", "c", "d", "e", "f", "g"])
    'a, b, c, d, e and 2 more'
    """
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(printable, names[:_SHOWN])) + more


def _without(state: dict[Any, Any], gone: Sequence[Any]) -> dict[Any, Any]:
    """A state dict without some of its entries; itself where there are none of these."""
    if not gone:
        return state
    kept = OrderedDict((key, value) for key, value in state.items() if key not in set(gone))
    if hasattr(state, "_metadata"):
        kept._metadata = state._metadata  # type: ignore[attr-defined]
    return kept


def _is_no_tensor(key: Any, value: Any) -> bool:
    return not (isinstance(key, str) and isinstance(value, Tensor))


def _is_nested(value: Any) -> bool:
    """Whether a value holds a state dict, a module or an optimizer of its own."""
    return bool(all_entries(value)) or any(is_optimizer(item) for _, item in dicts(value))


def _beside(content: Any, item: Any) -> tuple[str, ...]:
    """The dotted paths of everything in nested containers that is neither around an item nor in it."""
    seen: set[int] = set()

    def visit(value: Any, path: str, depth: int) -> tuple[bool, list[str]]:
        if value is item:
            return True, []
        if not isinstance(value, dict | list | tuple) or id(value) in seen or depth > _MAX_DEPTH:
            return False, [path]
        seen.add(id(value))
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        results = [visit(below, f"{path}.{key}" if path else str(key), depth + 1) for key, below in inner]
        if not any(around for around, _ in results):
            return False, [path]
        return True, [name for _, names in results for name in names]

    return tuple(visit(content, "", 0)[1])
