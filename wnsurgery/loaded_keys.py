"""Keys of a state dict whose layer is being loaded, taken out of what torch still looks through.

`nn.Module.load_state_dict` picks the entries of each module out of its parent's by looking through all of them for
every child: modules times keys, and a converted layer has more keys than a plain one. When a layer's own method runs,
its entries have been picked, and no sibling still to come has a name that theirs begin with. Taken out of the dicts of
the modules above they make no difference but to the time, unless a module was shown its dict, as load hooks are. These
dicts are local to torch's function, hence the look at its frames; where they are not as known, all is left as it is.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from torch import nn

__all__ = ["take_out"]

_FEW = 32  # entries that are looked through in less time than it takes to take some out


def _inner(function: Any, name: str) -> CodeType | None:
    """The code of a function that is defined within another."""
    constants = getattr(getattr(function, "__code__", None), "co_consts", ())
    return next((c for c in constants if isinstance(c, CodeType) and c.co_name == name), None)


_LOAD = _inner(nn.Module.load_state_dict, "load")
_OWN_ENTRIES = nn.Module._load_from_state_dict
_frame = sys._getframe


def take_out(entries: dict[str, Any]) -> None:
    """Take a module's entries out of the dicts of the modules above it, and theirs out of those above them.

    To be called by the module's `_load_from_state_dict` itself, before it changes the dict it was given.
    """
    for held, picked, prefix in reversed(list(_above(_frame(1).f_back, entries))):
        for key in picked:
            if key.startswith(prefix):  # not what a hook has added
                held.pop(key, None)


def _above(frame: FrameType | None, entries: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    """Each dict to take entries out of, from the innermost, with those that were picked and how they begin."""
    if frame is None or frame.f_code is not _LOAD:
        return
    picked, frame = entries, frame.f_back
    while frame is not None and frame.f_code is _LOAD:
        names = frame.f_locals
        held: Any = names.get("local_state_dict")
        known = names.get("child_state_dict") is picked and type(held) in (dict, OrderedDict)
        if not known or next(iter(picked), None) not in held:
            return  # as to the latter: taken out with an earlier layer, and so from the dicts above
        if len(held) > _FEW and _keeps_none(names.get("module")):
            yield held, picked, names.get("child_prefix", "")
        picked, frame = held, frame.f_back


def _keeps_none(module: Any) -> bool:
    """Whether a module was loaded by torch's method alone, which forgets the dict that it is shown."""
    method = getattr(module, "_load_from_state_dict", None)
    return getattr(method, "__func__", None) is _OWN_ENTRIES and not module._load_state_dict_pre_hooks
