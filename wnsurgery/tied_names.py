"""Names of tied parameters that a model keeps a list of: they follow the surgery.

Models of the transformers library name the parameters that are others by another name, in `_tied_weights_keys` and
`all_tied_weights_keys`. Saving leaves these out, and refuses shared tensors that are not listed; tying looks them up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["rename_tied"]

_LISTS = ("_tied_weights_keys", "all_tied_weights_keys")  # {name of the copy: name of the tensor it is tied to}
_HALF = re.compile(r"(.*\.|)parametrizations\.([^.]+)\.original[01]")


def rename_tied(modules: Sequence[nn.Module]) -> None:
    """Name g and v of converted weights in the lists of tied parameters of a model's modules, and plain weights again
    once they are folded. Patterns stay as they are."""
    kinds = set(map(type, modules))
    for attribute in _LISTS:
        defaults = {kind: getattr(kind, attribute, None) for kind in kinds}
        for module in modules:
            default = defaults[type(module)]
            known = module.__dict__.get(attribute, default)
            if not known or not isinstance(known, dict):
                continue
            renamed = _renamed(module, known)
            if renamed == known:
                continue
            if renamed == default:
                del module.__dict__[attribute]
            else:
                module.__dict__[attribute] = renamed


def _renamed(module: nn.Module, names: dict[str, str]) -> dict[str, str]:
    renamed: dict[str, str] = {}
    for pair in dict.fromkeys((_plain(copy), _plain(source)) for copy, source in names.items()):
        halves = [_halves(module, name) for name in pair]
        if all(halves):
            renamed.update(zip(*halves, strict=True))
        else:
            renamed[pair[0]] = pair[1]
    return renamed


def _plain(name: str) -> str:
    """The name of the weight that a half belongs to, of any other tensor its own."""
    found = _HALF.fullmatch(name)
    return name if found is None else "".join(found.groups())


def _halves(module: nn.Module, name: str) -> list[str]:
    """The names of g and v where the named weight is converted; nothing where it is plain, or the name is a pattern."""
    owner, _, parameter = name.rpartition(".")
    try:
        table: Any = module.get_submodule(owner)._modules.get("parametrizations")
    except AttributeError:
        return []
    entry = table._modules.get(parameter) if isinstance(table, nn.ModuleDict) else None
    if entry is None or "original1" not in entry._parameters:
        return []
    return [f"{owner}{'.' if owner else ''}parametrizations.{parameter}.original{half}" for half in (0, 1)]
