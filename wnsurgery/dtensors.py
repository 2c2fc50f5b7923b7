"""Weights spread over processes as DTensors: every process gets whole rows, works on its own, and puts them back.

A norm needs all elements of its row. Where a weight is split along a kept axis, each process has whole rows already and
nothing is sent. Where it is split along a reduced axis (row-wise tensor parallelism), elements are exchanged so that it
is split along a kept axis for the while. So each row goes through the arithmetic of a single process, bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["count_not_finite", "gathered", "is_spread", "local_rows", "placed_like", "spread_like", "spread_over"]


def is_spread(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, without importing what defines them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(tensor: Any) -> Tensor:
    """All of a tensor, in every process."""
    return tensor.full_tensor() if is_spread(tensor) else tensor  # type: ignore[no-any-return]


def spread_like(tensor: Any, like: Any) -> Any:
    """A tensor with its elements in the processes where another's are."""
    return tensor.redistribute(placements=like.placements) if is_spread(like) and is_spread(tensor) else tensor


def placed_like(tensor: Tensor, like: Any, *, whole: bool = False) -> Any:
    """A tensor that every process has, spread as another is; or, if `whole`, only fit to be multiplied with it."""
    if not is_spread(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = DTensor.from_local(tensor, like.device_mesh, (Replicate(),) * len(like.placements), run_check=False)
    return everywhere if whole else everywhere.redistribute(placements=like.placements)


def _whole_rows(v: Any, kept: Sequence[int], groups: int) -> tuple[Any, ...]:
    """Placements like v's under which every row lies in one process."""
    from torch.distributed.tensor import Replicate, Shard

    if any(type(p) not in (Shard, Replicate) for p in v.placements):
        return (Replicate(),) * len(v.placements)
    home = Shard(kept[0]) if kept and groups == 1 else Replicate()
    return tuple(p if isinstance(p, Replicate) or (groups == 1 and p.dim in kept) else home for p in v.placements)


def local_rows(v: Any, kept: Sequence[int], groups: int = 1) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """This process's whole rows of v, and what makes a DTensor placed like v out of as many rows; differentiable."""
    from torch.distributed.tensor import DTensor

    placements = _whole_rows(v, kept, groups)

    def back(rows: Tensor) -> Tensor:
        made = DTensor.from_local(
            rows, v.device_mesh, placements, run_check=False, shape=v.shape, stride=_dense(v.shape)
        )
        if placements == tuple(v.placements):
            return made
        # dense, since what loads it may look at its memory as one run of elements
        dense = made.redistribute(placements=v.placements).to_local().contiguous()
        return DTensor.from_local(
            dense, v.device_mesh, v.placements, run_check=False, shape=v.shape, stride=_dense(v.shape)
        )

    local = v if placements == tuple(v.placements) else v.redistribute(placements=placements)
    return local.to_local(), back


def spread_over(v: Any, kept: Sequence[int], groups: int, shape: Sequence[int]) -> tuple[Any, Any]:
    """How a magnitude of this shape lies beside the whole rows of v: (to local, from local)."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = v.device_mesh, _whole_rows(v, kept, groups)
    if len(shape) != v.ndim or groups > 1:
        placements = (Replicate(),) * len(placements)

    def to_local(g: Any) -> Tensor:
        if not is_spread(g):
            g = DTensor.from_local(g, mesh, (Replicate(),) * len(placements), run_check=False)
        local: Tensor = g.redistribute(placements=placements).to_local()
        return local

    def from_local(g: Tensor) -> Tensor:
        size = torch.Size(shape)
        return DTensor.from_local(g, mesh, placements, run_check=False, shape=size, stride=_dense(size))

    return to_local, from_local


def count_not_finite(w: Any) -> int:
    """Elements that are NaN or infinite, in all processes together, so that all of them raise or none."""
    total: Any = torch.isfinite(w).logical_not().sum()
    return int(total.full_tensor())


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(tuple(shape)):
        strides.append(step)
        step *= max(1, size)
    return tuple(reversed(strides))
