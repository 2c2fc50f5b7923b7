"""Tensors as they lie in memory, and whether they still do.

Addresses that were written down once, as for the compiled kernels, are good for as long as nobody puts other memory
under a tensor (`tensor.data = other`), or reads the same memory in another way, which no version counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["Placed", "addresses"]

_address, _count, _is_dense = Tensor.data_ptr, Tensor.numel, Tensor.is_contiguous
_type: Any = Tensor.dtype.__get__  # type: ignore[attr-defined]


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Where each begins."""
    return list(map(_address, tensors))


class Placed:
    """Some tensors with what must not change while their addresses are in use; asked in loops outside of Python.

    >>> import torch
    >>> v = torch.ones(2, 3)
    >>> placed = Placed([v])
    >>> _ = v.mul_(2.0)
    >>> placed.are_as_they_were()
    True
    >>> v.data = v.data.clone()
    >>> placed.are_as_they_were()
    False
    """

    __slots__ = ("_addresses", "_counts", "_dense", "_types", "tensors")

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = tuple(tensors)
        self._addresses, self._counts = addresses(self.tensors), list(map(_count, self.tensors))
        self._dense, self._types = list(map(_is_dense, self.tensors)), list(map(_type, self.tensors))

    def are_as_they_were(self) -> bool:
        """Whether all lie where they lay, with as many elements of the same type."""
        tensors = self.tensors
        return (
            list(map(_address, tensors)) == self._addresses
            and list(map(_count, tensors)) == self._counts
            and list(map(_is_dense, tensors)) == self._dense
            and list(map(_type, tensors)) == self._types
        )

    def is_as_it_was(self, i: int) -> bool:
        """The same of one of them."""
        tensor = self.tensors[i]
        return (
            tensor.data_ptr() == self._addresses[i]
            and tensor.numel() == self._counts[i]
            and tensor.is_contiguous() == self._dense[i]
            and tensor.dtype is self._types[i]
        )
