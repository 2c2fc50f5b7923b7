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
from wnsurgery.placed import Placed, addresses
from wnsurgery.reparam import Axes, Ready, is_plain

__all__ = ["Made", "SmallWeights", "is_small", "small_magnitudes"]


_is_dense, _is_negated, _ndim, _type = Tensor.is_contiguous, Tensor.is_neg, Tensor.dim, Tensor.dtype.__get__  # type: ignore[attr-defined]
_has_storage = torch._C._has_storage
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


def _starts(lengths: Any) -> Any:
    return np.concatenate(([0], np.cumsum(lengths)[:-1]))


def _are_all_plain(grads: Sequence[Any]) -> bool:
    """Whether the kernels can read all of these where they lie."""
    return (
        set(map(type, grads)) == {Tensor}
        and all(map(_has_storage, grads))
        and set(map(_type, grads)) == _FLOAT32
        and all(map(_is_dense, grads))
        and not any(map(_is_negated, grads))
    )


class Made(NamedTuple):
    """What `SmallWeights.make` has made: weights, ||v|| of all their rows in one block, and for each weight 0 where it
    was not made, since it has a row that is not an ordinary one."""

    weights: list[Tensor]
    norms: Tensor
    fine: Sequence[int]


class SmallWeights:
    """The pairs of some weights that `is_small` holds for.

    >>> pair = torch.tensor([[10.0]]), torch.tensor([[3.0, 4.0]])
    >>> found, = SmallWeights([pair]).compute()
    >>> found.w.tolist(), found.norms.tolist()
    ([[6.0, 8.0]], [[5.0]])
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.g, self.v = [g for g, _ in pairs], [v for _, v in pairs]
        self._sizes = [v.numel() for v in self.v]
        self.rows = [g.numel() for g in self.g]
        self._all_rows, self._elements = sum(self.rows), sum(self._sizes)
        counts, lengths = np.array(self.rows), np.array(self._sizes) // np.array(self.rows)
        self._lengths = np.repeat(lengths, counts)  # of each row
        self._starts = _starts(self._lengths)
        self._firsts: list[int] = _starts(counts).tolist()  # each weight's first row
        self.halves = (*self.g, *self.v)

    def _like_v(self, flat: Tensor) -> list[Tensor]:
        chunks = torch.unsafe_split_with_sizes(flat, self._sizes)  # each with a version of its own
        return [chunk.resize_(v.shape) for chunk, v in zip(chunks, self.v, strict=True)]

    def _like_g(self, flat: Tensor) -> list[Tensor]:
        ndims = set(map(_ndim, self.g))
        if len(ndims) == 1 and (ndim := ndims.pop()):  # each is one number to a row, and ones
            return list(torch.unsafe_split_with_sizes(flat.view(-1, *(1,) * (ndim - 1)), self.rows))
        chunks = torch.unsafe_split_with_sizes(flat, self.rows)
        return [chunk.resize_(g.shape) for chunk, g in zip(chunks, self.g, strict=True)]

    def _copy_pairs(self) -> tuple[Tensor, Tensor]:
        """All v and all g side by side."""
        return _side_by_side(self.v), _side_by_side(self.g)

    def compute(self) -> list[Ready | None]:
        """All weights, in memory of their own; None for one with a row that is not an ordinary one."""
        weights, norms = self._weights_and_norms()
        parts = norms.split_with_sizes(self.rows)
        shaped = (n.view(g.shape) for n, g in zip(parts, self.g, strict=True))
        return [None if w is None else Ready(n, None, w) for n, w in zip(shaped, weights, strict=True)]

    def weights(self) -> list[Tensor | None]:
        """The weights of `compute` alone."""
        return self._weights_and_norms()[0]

    def _weights_and_norms(self) -> tuple[list[Tensor | None], Tensor]:
        if not fused.started():
            return self._by_torch()
        with torch.inference_mode(False), torch.no_grad():
            made = self.make()
        return [w if fine else None for w, fine in zip(made.weights, made.fine, strict=True)], made.norms

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
        weights = list(map(torch.empty_like, self.v)) if weights is None else weights
        norms = torch.empty_like(self._norms)
        fine = fused.many_forward(self._told[0], addresses(weights), norms, self._elements)
        return Made(weights, norms, fine)

    @cached_property
    def _told(self) -> tuple[Any, Placed]:
        """What the kernels are told of the pairs, and how these lay then."""
        return fused.table_of(list(zip(self.g, self.v, strict=True))), Placed(self.halves)

    @property
    def placed(self) -> Placed:
        """All g, then all v, as they lay when the kernels were first told of them."""
        return self._told[1]

    @cached_property
    def _norms(self) -> Tensor:
        """Like the block of norms."""
        return torch.empty(self._all_rows, dtype=torch.float32, device="cpu")

    def pass_on(
        self, grads: Sequence[Tensor | None], norms_at: Sequence[int], private: Sequence[bool] = ()
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """dL/dg of all weights and dL/dv of all weights, by one call of the compiled kernels; None for those that they
        do not take, or whose dL/dw is None.

        `grads` are dL/dw, in ordinary memory; dL/dv may be written over one that is `private`.

        >>> small = SmallWeights([(torch.tensor([[10.0]]), torch.tensor([[3.0, 4.0]]))])
        >>> made = small.make() if fused.start() else None
        >>> small.pass_on([torch.tensor([[1.0, 0.0]])], [made.norms.data_ptr()])
        ([tensor([[0.6000]])], [tensor([[ 1.2800, -0.9600]])])
        """
        if not (_are_all_plain(grads) and self.placed.are_as_they_were()):
            return self._pass_on_some(grads, norms_at, private)
        to_g: list[Any] = list(map(torch.empty_like, self.g))
        to_v: list[Any] = self._room_for_v(grads, private)
        at = (*addresses(grads), *norms_at, *addresses(to_g), *addresses(to_v))  # type: ignore[arg-type]
        fused.many_backward(self._told[0], at, self._elements)
        return to_g, to_v

    def _room_for_v(self, grads: Sequence[Any], private: Sequence[bool]) -> list[Tensor]:
        if not private:
            return list(map(torch.empty_like, self.v))
        return [
            grad if own and grad.stride() == v.stride() else torch.empty_like(v)
            for grad, v, own in zip(grads, self.v, private, strict=True)
        ]

    def _pass_on_some(
        self, grads: Sequence[Tensor | None], norms_at: Sequence[int], private: Sequence[bool]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        count = len(self.v)
        to_g, to_v, held = list[Tensor | None]([None] * count), list[Tensor | None]([None] * count), list[Tensor]()
        at, elements = [0] * (4 * count), 0
        for i, (grad, g, v) in enumerate(zip(grads, self.g, self.v, strict=True)):
            there = self.placed.is_as_it_was(i) and self.placed.is_as_it_was(count + i)
            if grad is None or not is_plain(grad) or grad.dtype is not torch.float32 or not there:
                continue
            read = grad.resolve_neg().contiguous()
            own = read is grad and bool(private) and private[i] and grad.stride() == v.stride()
            held.append(read)  # until the kernels have read it
            to_g[i] = part_g = torch.empty_like(g)
            to_v[i] = part_v = grad if own else torch.empty_like(v)
            at[i::count] = read.data_ptr(), norms_at[i], part_g.data_ptr(), part_v.data_ptr()
            elements += v.numel()
        if held:
            fused.many_backward(self._told[0], at, elements)
        return to_g, to_v

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
