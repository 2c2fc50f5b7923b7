"""What a batch is, where batches come from, and how a model is called with one."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from wnsurgery.errors import InputError, SelectionError, WnsurgeryError

__all__ = ["NamedArrays", "arguments_of", "batches_of", "call_with", "in_one_line", "is_batch", "moved"]


class NamedArrays(dict[str, Any]):
    """Arrays as a file or a graph names them ("x", "input.1"), not always as `forward` does: see `arguments_of`."""


def is_batch(data: Any) -> bool:
    """Whether data is one batch: a tensor, a tuple of positional arguments, a mapping of keyword ones.

    >>> is_batch((1, 2)), is_batch([1, 2])
    (True, False)
    """
    return isinstance(data, Tensor | Mapping | tuple) or hasattr(data, "keys")


def batches_of(data: Any, limit: int | None = None) -> Iterator[Any]:
    """The batches of data, one after the other, at most `limit`: data itself if it is one, else what it iterates over.

    Raises SelectionError for a limit below 1, InputError for data that is neither, or that fails while it is read.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise SelectionError(f"max_batches must be a positive integer, not {limit!r}")
    if is_batch(data):
        return iter((data,))
    if not isinstance(data, Iterable) or isinstance(data, str | bytes | nn.Module):
        raise InputError(f"data must be a batch or an iterable of batches, not {type(data).__name__}")
    return _read(data, limit)


def _read(data: Iterable[Any], limit: int | None) -> Iterator[Any]:
    count = 0
    last: list[tuple[weakref.ref[Tensor], int]] = []
    try:
        for batch in islice(data, limit):
            if any((tensor := known()) is not None and tensor._version != version for known, version in last):
                raise InputError(
                    f"batch {count} of the data is in the memory of batch {count - 1}, which is still in use",
                    hint="let the iterable give copies",
                )
            yield batch
            count += 1
            last = [(weakref.ref(tensor), tensor._version) for tensor in _tensors(batch)]
            del batch
    except WnsurgeryError:
        raise
    except Exception as error:
        # whatever a data set raises, it means that this batch cannot be had
        raise InputError(f"reading batch {count} of the data failed: {in_one_line(error)}") from error


def _tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch whose writes are counted."""
    if isinstance(batch, Tensor):
        if not batch.is_inference():
            yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def call_with(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch; of a tuple or list as many elements as its forward requires, which leaves labels out.

    >>> call_with(nn.Identity(), (torch.ones(1), "label"))
    tensor([1.])
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping) or hasattr(batch, "keys"):
        args, kwargs = arguments_of(model, batch)
        return model(*args, **kwargs)
    if isinstance(batch, tuple | list):
        return model(*batch[: _required(model, len(batch))])
    return model(batch)


def arguments_of(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that a mapping stands for: keywords; `NamedArrays` of other names than `forward`'s are positional.

    >>> arguments_of(nn.Linear(2, 2), NamedArrays(x=1)), arguments_of(nn.Linear(2, 2), NamedArrays(input=1))
    (((1,), {}), ((), {'input': 1}))
    """
    named = {str(key): batch[key] for key in batch.keys()}  # noqa: SIM118 - BatchEncoding iterates differently
    if not isinstance(batch, NamedArrays):
        return (), named
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return (), named
    known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if known.isdisjoint(named) and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        return tuple(named.values()), {}
    return (), named


def _required(model: nn.Module, available: int) -> int:
    """How many positional arguments `model.forward` cannot do without; all there are if it takes any number."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return available
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return available
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return max(1, sum(p.default is p.empty for p in positional))


def moved(batch: Any, device: torch.device | None, *, fresh: bool = False) -> Any:
    """The batch with its tensors on a device (None: where they are); fresh makes them copies in every case."""
    if isinstance(batch, Tensor):
        there = batch if device is None else batch.to(device)
        return there.clone() if fresh and there is batch else there
    if isinstance(batch, tuple | list):
        parts = [moved(part, device, fresh=fresh) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if isinstance(batch, Mapping) or hasattr(batch, "keys"):
        named = {key: moved(batch[key], device, fresh=fresh) for key in batch.keys()}  # noqa: SIM118
        return NamedArrays(named) if isinstance(batch, NamedArrays) else named
    return batch


def in_one_line(error: BaseException) -> str:
    """An error as `Type: first line of its message`.

    >>> in_one_line(ValueError("bad\\nvery"))
    'ValueError: bad'
    """
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
