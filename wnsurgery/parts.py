"""Tensors that are no plain array of numbers, as the plain tensors they consist of: sparse, quantized, nested."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from wnsurgery.errors import InputError, printable

__all__ = ["plain_parts", "structure_of"]


def structure_of(tensor: Tensor) -> str:
    """What a tensor is that is no plain array of numbers: "nested", "quantized" or "sparse"; else empty.

    >>> structure_of(torch.eye(2)), structure_of(torch.eye(2).to_sparse())
    ('', 'sparse')
    """
    if tensor.is_nested:  # whose layout may be strided
        return "nested"
    if tensor.is_quantized:  # whose layout is
        return "quantized"
    return "" if tensor.layout == torch.strided else "sparse"


def plain_parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What tells a tensor from every other of its kind, under names of its own; a plain one is its only part.

    >>> list(plain_parts("w", torch.eye(2).to_sparse()))
    ['w (shape)', 'w (indices)', 'w (values)']

    Raises InputError for a meta tensor, which has no values, and a nested one that reaches beyond its memory.
    """
    if tensor.is_meta:
        raise InputError(f"{printable(name)}: a meta tensor, which has no values")
    if tensor.is_nested:
        parts = _nested(name, tensor)
        return {f"{name} ({part})": value for part, value in parts.items()}
    tensor = tensor.detach()
    if tensor.is_quantized:
        parts = _quantized(tensor)
    elif tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        parts = {"indices": tensor.indices(), "values": tensor.values()}
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = {"rows": tensor.crow_indices(), "columns": tensor.col_indices(), "values": tensor.values()}
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = {"columns": tensor.ccol_indices(), "rows": tensor.row_indices(), "values": tensor.values()}
    else:
        return {name: tensor if tensor.layout == torch.strided else tensor.to_dense()}
    shape = torch.tensor(tensor.shape)
    return {f"{name} ({part})": value for part, value in {"shape": shape, **parts}.items()}


def _nested(name: str, tensor: Tensor) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch's nested tensors will change: nothing the user can act on
            parts = tensor.detach().unbind()
        return {"count": torch.tensor(len(parts)), **{f"part {i}": part for i, part in enumerate(parts)}}
    except RuntimeError as error:
        raise InputError(f"{printable(name)}: a nested tensor that is damaged") from error


def _quantized(tensor: Tensor) -> dict[str, Tensor]:
    numbers = {"numbers": tensor.int_repr()}
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        scale, zero = torch.tensor(tensor.q_scale(), dtype=torch.float64), torch.tensor(tensor.q_zero_point())
        return {**numbers, "scale": scale, "zero point": zero}
    scales, zeros = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    return {**numbers, "scales": scales, "zero points": zeros, "axis": torch.tensor(tensor.q_per_channel_axis())}
