"""Which positions of a layer's output count: padding left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from wnsurgery.errors import InputError, SelectionError

__all__ = ["Mask", "fitting", "masks_of"]

Mask = str | Callable[[Any], Any]


def masks_of(mask: Mask | None, batch: Any) -> tuple[Tensor, ...]:
    """The masks of a batch as bool tensors: of a key of the batch, or what a function of the batch returns.

    >>> masks_of("attention_mask", {"attention_mask": torch.tensor([[1, 0]])})
    (tensor([[ True, False]]),)

    Raises SelectionError for a mask that is neither a key nor a function, InputError where there is no such key, or
    the function returns anything but a tensor, several, or None.
    """
    if mask is None:
        return ()
    if isinstance(mask, str):
        if not (isinstance(batch, Mapping) or hasattr(batch, "keys")) or mask not in batch.keys():  # noqa: SIM118
            raise InputError(f"the batch has no entry {mask!r} to mask with")
        found = batch[mask]
    elif callable(mask):
        found = mask(batch)
    else:
        raise SelectionError(f"mask must be a key of the batch or a function of it, not {type(mask).__name__}")
    several: Sequence[Any] = found if isinstance(found, tuple | list) else () if found is None else (found,)
    if not all(isinstance(one, Tensor) for one in several):
        raise InputError("a mask must be a tensor of bool, several, or None")
    return tuple(one != 0 for one in several)


def fitting(masks: Sequence[Tensor], output: Tensor, axis: int) -> Tensor | None:
    """The first mask that fits a layer's output, as bool over all its positions (its shape without `axis`); else None.

    A mask fits if its shape is that of the positions, or of their leading axes (then it holds for all that follow),
    or if the positions are the mask's, flattened.
    """
    axis %= output.ndim
    positions = (*output.shape[:axis], *output.shape[axis + 1 :])
    for mask in masks:
        if 0 < mask.ndim <= len(positions) and tuple(mask.shape) == positions[: mask.ndim]:
            spread = mask.reshape(*mask.shape, *[1] * (len(positions) - mask.ndim))
            return spread.expand(positions).to(output.device)
        if positions == (mask.numel(),):
            return mask.reshape(-1).to(output.device)
    return None
