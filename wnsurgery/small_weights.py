"""Many small weights as one: copied side by side, so that a few calls compute norms, weights or gradients of all.

An operation on a small tensor costs the same few microseconds whatever its size. Here a weight costs its share of a
copy and of a handful of operations on the rows of all weights. Bits are those of `compose` for each weight by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from wnsurgery import fused
from wnsurgery.norms import SMALL, ordinary_factors
from wnsurgery.reparam import Axes, Ready

__all__ = ["Gradients", "Made", "SmallWeights", "is_small", "small_magnitudes"]


_address, _count, _is_dense, _is_negated = Tensor.data_ptr, Tensor.numel, Tensor.is_contiguous, Tensor.is_neg
_type: Any = Tensor.dtype.__get__  # type: ignore[attr-defined]
_FLOAT32 = {torch.float32}


def is_small(g: Tensor, v: Tensor, axes: Axes, magnitude: str, limit: int = SMALL) -> bool:
    """Whether a pair can be one of `SmallWeights`: float32 rows in one piece of the CPU's memory, few elements."""
    plain = g.dtype is torch.float32 and g.is_cpu and g.is_contiguous() and not (g.is_neg() or v.is_neg())
    return magnitude == "linear" and plain and _has_small_rows(v, axes, limit)


def _has_small_rows(v: Tensor, axes: Axes, limit: int = SMALL) -> bool:
    return (
        (type(v) is nn.Parameter or type(v) is Tensor or issubclass(type(v), nn.Parameter))
        and 0 < v.numel() <= limit
        and v.dtype is torch.float32
        and axes.kept in ((0,), ())
        and v.is_cpu
        and v.is_contiguous()
        and v.ndim > 0
        and (1 not in v.shape or v.stride() == _row_major(v.shape))  # an axis of one may say which kernel is to run
    )


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def small_magnitudes(weights: Sequence[tuple[Tensor, Axes]]) -> list[Tensor | None]:
    """What `decompose` stores as g for each weight, where v is the weight itself; None for all others.

    >>> small_magnitudes([(torch.tensor([[3.0, 4.0]]), Axes((0,))), (torch.zeros(1, 2), Axes((0,)))])
    [tensor([[5.]]), None]
    """
    found: list[Tensor | None] = [None] * len(weights)
    chosen = [i for i, (w, axes) in enumerate(weights) if _has_small_rows(w, axes)]
    if not chosen:
        return found
    with torch.no_grad():
        wide = _side_by_side([weights[i][0] for i in chosen]).to(torch.float64).numpy()
        shapes = [axes.magnitude_shape(w.shape) for w, axes in (weights[i] for i in chosen)]
        counts = np.array([math.prod(shape) for shape in shapes])
        lengths = np.repeat(np.array([weights[i][0].numel() for i in chosen]) // counts, counts)
        with np.errstate(all="ignore"):  # what is not finite
            norms = np.sqrt(np.add.reduceat(np.multiply(wide, wide, out=wide), _starts(lengths)))
            ordinary = (norms > 0) & (norms < torch.finfo(torch.float32).max)
            short = torch.from_numpy(norms.astype(np.float32))
        whole = np.logical_and.reduceat(ordinary, _starts(counts))
        parts = torch.unsafe_split_with_sizes(short, counts.tolist())
        for i, part, shape, fine in zip(chosen, parts, shapes, whole, strict=True):
            found[i] = part.resize_(shape).clone() if fine else None
    return found


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    flat: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call] # one loop, not in Python
    return flat if len(tensors) > 1 else flat.clone()  # one alone comes back as it is


def _floats(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device="cpu")


def _starts(lengths: Any) -> Any:
    return np.concatenate(([0], np.cumsum(lengths)[:-1]))


class Made(NamedTuple):
    """What `SmallWeights.make` has made: weights, ||v|| of all their rows in one block, where in it each weight's norms
    begin, and of which weights that is true: others have a row that is not an ordinary one."""

    weights: list[Tensor]
    norms: Tensor
    starts: list[int]
    fine: list[bool]

    def ready(self, i: int, rows: int) -> Ready:
        """One weight that is fine, by itself."""
        return Ready(self.norms[self.starts[i] :][:rows], None, self.weights[i])


class SmallWeights:
    """The pairs of some weights that `is_small` holds for.

    >>> pair = torch.tensor([[10.0]]), torch.tensor([[3.0, 4.0]])
    >>> found, = SmallWeights([pair]).compute()
    >>> found.w.tolist(), found.norms.tolist()
    ([[6.0, 8.0]], [5.0])
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.g, self.v = [g for g, _ in pairs], [v for _, v in pairs]
        self._shapes = [tuple(v.shape) for v in self.v]
        self._sizes = [v.numel() for v in self.v]
        self.rows = [g.numel() for g in self.g]
        self._all_rows, self._elements = sum(self.rows), sum(self._sizes)
        counts, lengths = np.array(self.rows), np.array(self._sizes) // np.array(self.rows)
        self._lengths = np.repeat(lengths, counts)  # of each row
        self._starts = _starts(self._lengths)
        self._firsts: list[int] = _starts(counts).tolist()  # each weight's first row
        self._table: Any = None

    def _like_v(self, flat: Tensor) -> list[Tensor]:
        chunks = torch.unsafe_split_with_sizes(flat, self._sizes)  # each with a version of its own
        return [chunk.resize_(shape) for chunk, shape in zip(chunks, self._shapes, strict=True)]

    def _like_g(self, flat: Tensor) -> list[Tensor]:
        chunks = torch.unsafe_split_with_sizes(flat, self.rows)
        return [chunk.resize_(g.shape) for chunk, g in zip(chunks, self.g, strict=True)]

    def _copy_pairs(self) -> tuple[Tensor, Tensor]:
        """All v and all g side by side."""
        return _side_by_side(self.v), _side_by_side(self.g)

    def compute(self) -> list[Ready | None]:
        """All weights, in memory of their own; None for one with a row that is not an ordinary one."""
        if fused.started():
            with torch.inference_mode(False), torch.no_grad():
                made = self.make()
            return [made.ready(i, rows) if made.fine[i] else None for i, rows in enumerate(self.rows)]
        weights, norms = self._by_torch()
        parts = norms.split_with_sizes(self.rows)
        return [None if w is None else Ready(n, None, w) for n, w in zip(parts, weights, strict=True)]

    def weights(self) -> list[Tensor | None]:
        """The weights of `compute` alone."""
        if not fused.started():
            return self._by_torch()[0]
        with torch.inference_mode(False), torch.no_grad():
            made = self.make()
        return [w if fine else None for w, fine in zip(made.weights, made.fine, strict=True)]

    def _by_torch(self) -> tuple[list[Tensor | None], Tensor]:
        """The weights, by torch's and numpy's operations, and ||v|| of all their rows."""
        with torch.inference_mode(False), torch.no_grad():
            flat_v, flat_g = self._copy_pairs()
            wide = flat_v.to(torch.float64).numpy()
            norms = np.sqrt(np.add.reduceat(np.multiply(wide, wide, out=wide), self._starts))
            factor, ordinary = ordinary_factors(flat_g.numpy(), norms)
            found: list[Tensor | None] = list(torch._foreach_mul(self.v, self._like_g(torch.from_numpy(factor))))
            if ordinary is not None:
                whole = np.logical_and.reduceat(ordinary, self._firsts)
                found = [w if fine else None for w, fine in zip(found, whole, strict=True)]
            return found, torch.from_numpy(norms.astype(np.float32))

    def make(self, weights: list[Tensor] | None = None) -> Made:
        """All weights by the compiled kernels, which read each pair where it lies and write each weight by itself: into
        these tensors, laid out as v, or into new ones.

        Not for inference mode, in which new tensors are of its kind.
        """
        if self._table is None:
            self._table = np.array(self.lines, dtype=np.int64)
        weights = [torch.empty_like(v) for v in self.v] if weights is None else weights
        norms = _floats(self._all_rows)
        return Made(weights, norms, self._firsts, fused.many_forward(self._table, weights, norms, self._elements))

    @cached_property
    def _addresses(self) -> list[int]:
        return [*(line[1] for line in self.lines), *(line[0] for line in self.lines)]

    @cached_property
    def lines(self) -> list[tuple[int, ...]]:
        """What the kernels know of each weight: see `fused.lines_of`."""
        return fused.lines_of(list(zip(self.g, self.v, strict=True)))

    def is_where_it_was(self, i: int) -> bool:
        """Whether the kernels may read a weight's pair where they read it before."""
        g, v, (v_at, g_at, _, _, rows, columns, _) = self.g[i], self.v[i], self.lines[i]
        return (
            v.data_ptr() == v_at
            and g.data_ptr() == g_at
            and v.numel() == rows * columns
            and g.numel() == rows
            and v.dtype is torch.float32 is g.dtype
            and v.is_contiguous()
            and g.is_contiguous()
            and not (v.is_neg() or g.is_neg())
        )

    def are_where_they_were(self) -> bool:
        """`is_where_it_was` of all, in a few loops outside of Python."""
        halves = (*self.g, *self.v)
        return (
            list(map(_address, halves)) == self._addresses
            and list(map(_count, halves)) == [*self.rows, *self._sizes]
            and all(map(_is_dense, halves))
            and not any(map(_is_negated, halves))
            and set(map(_type, halves)) == _FLOAT32
        )

    def _spread(self, per_row: Any) -> Tensor:
        return torch.from_numpy(np.repeat(per_row, self._lengths))

    def gradients(self, grads: Sequence[Tensor], norms: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """dL/dg and dL/dv of all weights from dL/dw and the norms of `compute` (the paper's equation 3)."""
        with torch.inference_mode(False), torch.no_grad():
            flat_v, flat_g = self._copy_pairs()
            upstream = torch.empty_like(flat_v)
            torch._foreach_copy_(self._like_v(upstream), list(grads))
            lengths = torch.cat([n.reshape(-1) for n in norms]).numpy()
            radial = np.add.reduceat((upstream * flat_v).numpy(), self._starts) / lengths
            ratio = flat_g.numpy() / lengths
            upstream.mul_(self._spread(ratio))
            upstream.addcmul_(flat_v, self._spread(ratio * radial / lengths), value=-1)
            return list(zip(self._like_g(torch.from_numpy(radial)), self._like_v(upstream), strict=True))


class Gradients:
    """dL/dg and dL/dv of some of these weights, which one call of the compiled kernels works out.

    >>> small = SmallWeights([(torch.tensor([[10.0]]), torch.tensor([[3.0, 4.0]]))])
    >>> made, gradients = small.make() if fused.start() else None, Gradients(small)
    >>> found = gradients.take(0, torch.tensor([[1.0, 0.0]]), made.norms.data_ptr())
    >>> gradients.finish()
    >>> found
    (tensor([[0.6000]]), tensor([[ 1.2800, -0.9600]]))
    """

    def __init__(self, small: SmallWeights) -> None:
        self._small, self._all_there = small, small.are_where_they_were()
        self._numbers, self._elements = list[int](), 0
        self._held = list[Tensor]()  # until the kernels have read them

    def take(self, i: int, grad: Tensor, norms_at: int, *, private: bool = False) -> tuple[Tensor, Tensor] | None:
        """Where the gradients of a weight will be once `finish` has run; None where the kernels do not take it.

        `grad` is dL/dw, in ordinary memory; if it is `private`, dL/dv may be written over it. ||v|| lies at `norms_at`.
        """
        small = self._small
        if grad.dtype is not torch.float32 or not (self._all_there or small.is_where_it_was(i)):
            return None
        g, v, (v_at, g_at, _, _, rows, columns, _) = small.g[i], small.v[i], small.lines[i]
        if grad.is_neg() or not grad.is_contiguous():
            grad, private = grad.resolve_neg().contiguous(), False
        self._held.append(grad)
        grad_g, grad_v = torch.empty_like(g), grad if private and grad.stride() == v.stride() else torch.empty_like(v)
        self._numbers += (grad.data_ptr(), v_at, g_at, norms_at, grad_g.data_ptr(), grad_v.data_ptr(), rows, columns)
        self._elements += rows * columns
        return grad_g, grad_v

    def finish(self) -> None:
        """Work them out."""
        fused.many_backward(self._numbers, self._elements)
        self._held.clear()
