"""Where the bytes of a tensor come from when it is written: memory, a file, or a computation that is yet to run."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from wnsurgery.stores.mapped import Source

__all__ = ["Loaded", "Values"]


class Values(Protocol):
    """What a writer asks, one tensor at a time."""

    def promised(self, tensor: Tensor) -> bool:
        """Whether this tensor (a meta tensor) stands for one that `fetch` will make."""

    def fetch(self, tensor: Tensor) -> Tensor:
        """The tensor with its values: same shape, type and strides."""

    def read(self, start: int, stop: int, owner: Tensor) -> Tensor:
        """The bytes between two addresses in the storage of a tensor that is not promised."""


class Loaded:
    """Tensors as they are: in memory, or in the files of a source.

    >>> Loaded().fetch(torch.ones(2))
    tensor([1., 1.])
    """

    def __init__(self, source: Source | None = None) -> None:
        self.source = source or Source()

    def promised(self, tensor: Tensor) -> bool:
        return self.source.holds(tensor)

    def fetch(self, tensor: Tensor) -> Tensor:
        return self.source.fetch(tensor.detach())

    def read(self, start: int, stop: int, owner: Tensor) -> Tensor:
        data = self.source.read(start, stop)
        if data is not None:
            return data
        storage = owner.untyped_storage()
        flat = torch.empty(0, dtype=torch.uint8)
        return flat.set_(storage, start - storage.data_ptr(), (stop - start,), (1,)).clone()
