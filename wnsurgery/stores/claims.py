"""What the tensors of a file claim to be, against the bytes it holds: strides make terabytes out of four bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from wnsurgery.errors import InputError

__all__ = ["refuse_stretched"]

_STRETCH = 1 << 28  # bytes a tensor may claim beyond its storage (an expanded buffer is legitimate)
_ALL, _TIMES = 1 << 30, 16  # bytes all of them may claim: that, and so many times what is there


def refuse_stretched(content: Any, path: Path) -> None:
    """Raise InputError where tensors in nested containers claim far more bytes than their storages have.

    Such a tensor costs nothing until someone copies it, or computes with it. A tensor under two names counts once.
    """
    stack, seen = [content], set[int]()
    known: set[tuple[Any, ...]] = set()
    storages: dict[int, int] = {}
    total = 0
    while stack:
        item = stack.pop()
        if isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            stack += item.values() if isinstance(item, dict) else item
        if not isinstance(item, torch.Tensor) or type(item) not in (torch.Tensor, torch.nn.Parameter):
            continue
        if item.layout != torch.strided or item.is_meta:
            continue
        claimed, held = item.numel() * item.element_size(), item.untyped_storage().nbytes()
        if claimed - held > _STRETCH:
            raise InputError.of(path, f"a tensor of shape {tuple(item.shape)} has only a fraction of its data")
        if item.is_nested:
            continue
        place = (item.data_ptr(), tuple(item.shape), item.stride(), item.dtype)
        if place not in known:
            known.add(place)
            storages[item.untyped_storage().data_ptr()] = held
            total += claimed
    if total > _ALL + _TIMES * sum(storages.values()):
        raise InputError.of(path, f"its tensors claim {total:,} bytes where {sum(storages.values()):,} are")
