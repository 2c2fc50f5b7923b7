"""The state dicts in a checkpoint: dicts of tensors at any depth, and the weight-norm pairs their keys spell.

Everything here looks at names, shapes and types, never at a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wnsurgery.dtensors import is_spread
from wnsurgery.errors import InputError, PairError, printable
from wnsurgery.keys import Found, find_pairs
from wnsurgery.optimizer_state import is_flat_optimizer
from wnsurgery.parts import structure_of
from wnsurgery.reparam import Axes

__all__ = [
    "StateDict",
    "dicts",
    "dtype_name",
    "every_tensor",
    "flat_tensors",
    "found_in",
    "identity",
    "is_optimizer",
    "refusal",
    "shape_of",
    "state_dicts",
]

_MAX_DEPTH = 64
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StateDict:
    """One dict of tensors in a checkpoint, and the dotted path that leads to it ("" at the top)."""

    path: str
    entries: dict[Any, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors with string keys, in order."""
        return {k: v for k, v in self.entries.items() if isinstance(k, str) and isinstance(v, Tensor)}

    def full(self, key: str) -> str:
        """A key with its path."""
        return f"{self.path}.{key}" if self.path else key


def state_dicts(content: Any) -> list[StateDict]:
    """Every state dict in a loaded checkpoint: dicts that hold tensors under string keys, optimizers left out.

    >>> [s.path for s in state_dicts({"epoch": 3, "ema": {"w": torch.ones(2)}, "nets": [{"w": torch.ones(2)}]})]
    ['ema', 'nets.0']

    Raises InputError for containers nested without end.
    """
    found = (StateDict(path, item) for path, item in dicts(content) if not is_optimizer(item))
    return [state for state in found if state.tensors]


def flat_tensors(content: Any) -> dict[str, Tensor]:
    """Every tensor of the state dicts in a checkpoint, under its dotted name.

    >>> list(flat_tensors({"generator": {"conv.weight": torch.ones(2, 2)}, "step": 7}))
    ['generator.conv.weight']
    """
    return {state.full(key): tensor for state in state_dicts(content) for key, tensor in state.tensors.items()}


def every_tensor(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts, lists and tuples, optimizer states included, under its dotted name.

    >>> [name for name, _ in every_tensor({"sd": {"w": torch.ones(1)}, "more": [torch.ones(1)]})]
    ['sd.w', 'more.0']
    """
    stack, seen = [("", content)], set[int]()
    while stack:
        path, item = stack.pop()
        if isinstance(item, Tensor):
            yield path, item
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            inner = item.items() if isinstance(item, dict) else enumerate(item)
            stack += reversed([(f"{path}.{key}" if path else str(key), value) for key, value in inner])


def dicts(content: Any) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Each dict once, in order, with its path; the inside of an optimizer's state is not entered."""
    seen: set[int] = set()

    def visit(item: Any, path: str, depth: int) -> Iterator[tuple[str, dict[Any, Any]]]:
        if not isinstance(item, dict | list | tuple) or id(item) in seen:
            return
        if depth > _MAX_DEPTH:
            raise InputError(f"{printable(path, 60)}: containers nested deeper than {_MAX_DEPTH} levels")
        seen.add(id(item))
        if isinstance(item, dict):
            yield path, item
            if is_optimizer(item):
                return
        for key, value in item.items() if isinstance(item, dict) else enumerate(item):
            yield from visit(value, f"{path}.{key}" if path else str(key), depth + 1)

    yield from visit(content, "", 0)


def is_optimizer(item: dict[Any, Any]) -> bool:
    """Whether a dict is what an optimizer's `state_dict` gives, or torch.distributed.checkpoint makes of it."""
    return ("param_groups" in item and "state" in item) or is_flat_optimizer(item)


def found_in(state: StateDict) -> Found:
    """The pairs of one state dict and the look-alikes; errors carry its path."""
    try:
        return find_pairs({key: shape_of(t) for key, t in state.tensors.items()}, _fits)
    except PairError as error:
        if not state.path:
            raise
        raise PairError(f"{printable(state.path)}: {error.message}", hint=error.hint) from error


def _fits(g_shape: Sequence[int], v_shape: Sequence[int]) -> bool:
    try:
        Axes.of_pair(g_shape, v_shape)
    except PairError:
        return False
    return True


def refusal(tensor: Tensor) -> str:
    """Why a tensor cannot go in or out of weight norm whatever its name; empty if it can."""
    if structure := structure_of(tensor):
        return f"{structure}: not one array of numbers"
    if tensor.dtype not in _FLOATS:
        return f"{dtype_name(tensor)}: not a floating-point weight of 16 bits or more"
    if type(tensor) not in (Tensor, nn.Parameter) and not is_spread(tensor):
        return f"a tensor subclass ({type(tensor).__name__})"
    return ""


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape; of a nested tensor -1 for the sizes in which its parts may differ.

    >>> shape_of(torch.ones(2, 3))
    (2, 3)
    """
    return (tensor.size(0), *[-1] * (tensor.ndim - 1)) if tensor.is_nested else tuple(tensor.shape)


def dtype_name(tensor: Tensor) -> str:
    """The type as people write it: float32."""
    return str(tensor.dtype).removeprefix("torch.")


def identity(tensor: Tensor) -> Any:
    """Equal for two names of one tensor (a tie), however the file came to share it."""
    if structure_of(tensor) or tensor.is_meta or not tensor.numel():
        return id(tensor)
    if is_spread(tensor):  # its memory differs from process to process; a decision must not
        return id(tensor)
    start = tensor.untyped_storage().data_ptr()
    return start, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype
