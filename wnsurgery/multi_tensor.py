"""Weight norm of many weights at once: what is done row by row is done for the rows of all of them together.

A layer costs two operations forward, its norms and its product; everything between them, some twenty operations on one
value per row, runs once for all layers, and small weights lie side by side. Bits and gradients are those of `compose`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from wnsurgery import fused, other_types
from wnsurgery.kept import LARGE
from wnsurgery.norms import norm, plain_scale, snapped_quotient, wide_dtype
from wnsurgery.reparam import Axes, Magnitude, Ready, compose_eagerly, first_order_gradients
from wnsurgery.small_weights import SmallWeights, is_small

__all__ = ["Item", "ManyWeights", "row_factors"]


@dataclass(frozen=True)
class Item:
    """One weight: its pair, its rule, and the memory w is written to (laid out as v)."""

    g: Tensor = field(repr=False)
    v: Tensor = field(repr=False)
    axes: Axes
    magnitude: Magnitude
    w: Tensor = field(repr=False)


class ManyWeights:
    """Weights that are computed, and whose gradients pass to g and v, together.

    >>> g, v, w = torch.tensor([[10.0]]), torch.tensor([[3.0, 4.0]]), torch.empty(1, 2)
    >>> many = ManyWeights([Item(g, v, Axes((0,)), "linear", w)])
    >>> norms = many.compose()
    >>> w.tolist()
    [[6.0, 8.0]]
    >>> many.gradients([torch.tensor([[1.0, 0.0]])], norms, [False])
    [(tensor([[0.6000]]), tensor([[ 1.2800, -0.9600]]))]
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items
        self._small = [i for i, item in enumerate(items) if is_small(item.g, item.v, item.axes, item.magnitude)]
        self._side_by_side: SmallWeights | None = None
        self.lengths: dict[int, Tensor] = {}  # ||v|| per row where `compose` gave None, as of then

    def compose(self) -> list[Tensor | None]:
        """Write w = g * v / ||v|| into each item's memory, in the bits of `compose`.

        Returns ||v|| per row for each weight where that serves the gradients, in float32, or float64 for such weights
        that the kernels take; None where rows are extreme.
        """
        if fused.started():
            return self._in_one_pass()
        found: list[Ready | None] = [None] * len(self._items)
        others = sorted(set(range(len(self._items))).difference(self._small))
        if self._small:
            for i, ready in zip(self._small, self._together().compute(), strict=True):
                found[i] = ready
        for i, ready in zip(others, row_factors([self._items[i] for i in others]), strict=True):
            found[i] = ready
        copies = [
            (item.w, r.w) for item, r in zip(self._items, found, strict=True) if r is not None and r.w is not None
        ]
        if copies:
            torch._foreach_copy_([to for to, _ in copies], [w for _, w in copies])
        for i, ready in enumerate(found):
            if ready is None or ready.w is None:
                self._write(i, ready)
        return [None if ready is None else ready.norms for ready in found]

    def _write(self, i: int, ready: Ready | None) -> None:
        """Write one weight from its factor, or the long way."""
        item = self._items[i]
        if ready is None or ready.factor is None:
            item.w.copy_(compose_eagerly(item.g, item.v, item.axes, item.magnitude))
        else:
            torch.mul(item.v, item.axes.spread(ready.factor, item.v), out=item.w)
        if item.v.numel() and (ready is None or ready.norms is None):
            lengths = None if ready is None else ready.lengths
            self.lengths[i] = _lengths(item) if lengths is None else lengths

    def _together(self) -> SmallWeights:
        if self._side_by_side is None:
            self._side_by_side = SmallWeights([(self._items[i].g, self._items[i].v) for i in self._small])
        return self._side_by_side

    def _in_one_pass(self) -> list[Tensor | None]:
        """`compose` with the compiled kernels, each weight written once; the others as ever."""
        norms = self._by_one_call()
        for i, item in enumerate(self._items):
            if norms[i] is None:
                norms[i] = _pass_over(item)
        left = [i for i, n in enumerate(norms) if n is None]
        for i, ready in zip(left, row_factors([self._items[i] for i in left]), strict=True):
            self._write(i, ready)
            norms[i] = None if ready is None else ready.norms
        return norms

    def _by_one_call(self) -> list[Tensor | None]:
        """Write the small weights; ||v|| of each that is written, in a row."""
        found: list[Tensor | None] = [None] * len(self._items)
        at, table = self._for_one_call
        items = [self._items[i] for i in at]
        if table is not None and table.placed.are_as_they_were() and all(map(_fits, items)):
            made = table.make([item.w for item in items])
            norms = torch.unsafe_split_with_sizes(made.norms, table.rows)
            for i, rows, fine in zip(at, norms, made.fine, strict=True):
                found[i] = rows if fine else None
        return found

    @cached_property
    def _for_one_call(self) -> tuple[list[int], SmallWeights | None]:
        """The weights that the kernels take together, each by one of torch's threads."""
        at = [i for i, item in enumerate(self._items) if is_small(item.g, item.v, item.axes, item.magnitude, LARGE)]
        return at, SmallWeights([(self._items[i].g, self._items[i].v) for i in at]) if at else None

    def gradients(
        self, grads: Sequence[Tensor], norms: Sequence[Tensor | None], private: Sequence[bool]
    ) -> list[tuple[Tensor, Tensor]]:
        """dL/dg and dL/dv from dL/dw, the paper's equation 3.

        `norms` are those `compose` gave, None for weights whose g or v changed since. Where `private`, dL/dv may take
        the memory of dL/dw.
        """
        fused.start()
        done: dict[int, tuple[Tensor, Tensor]] = {}
        lengths = [n for i in self._small if (n := norms[i]) is not None]
        if not fused.started() and self._small and len(lengths) == len(self._small):
            found = self._together().gradients([grads[i] for i in self._small], lengths)
            done.update(zip(self._small, found, strict=True))
        at, table = self._for_one_call if fused.started() else ([], None)
        if table is not None:
            norms_at = [0 if (rows := norms[i]) is None else rows.data_ptr() for i in at]
            known = [grads[i] if there else None for i, there in zip(at, norms_at, strict=True)]
            for i, part_g, part_v in zip(at, *table.pass_on(known, norms_at, [private[i] for i in at]), strict=True):
                if part_g is not None and part_v is not None:
                    done[i] = part_g, part_v
        for i, (item, grad) in enumerate(zip(self._items, grads, strict=True)):
            if i not in done:
                done[i] = first_order_gradients(
                    grad, item.g, item.v, norms[i], item.axes, item.magnitude, private=private[i]
                )
        return [done[i] for i in range(len(grads))]


def _pass_over(item: Item) -> Tensor | None:
    """Write one weight by the compiled kernels; None where they do not take it, or a row is not an ordinary one."""
    if not _fits(item):
        return None
    how = item.g, item.v, item.axes.kept, item.axes.groups, item.magnitude
    sizes = fused.plan(*how)
    if sizes is not None:
        return fused.forward(item.g, item.v, sizes, item.w)
    rows = other_types.rows_of(*how)
    found = None if rows is None else other_types.forward(item.g, item.v, rows, item.w)
    return None if found is None else found[1]


def _fits(item: Item) -> bool:
    """Whether the memory for a weight is like that of v, as it no longer is where somebody has set its `.data`."""
    w, v = item.w, item.v
    return w.shape == v.shape and w.stride() == v.stride() and w.dtype is v.dtype


def row_factors(items: Sequence[Item]) -> list[Ready | None]:
    """g / ||v|| and ||v|| per row in float32 for each weight, shaped to broadcast against the (grouped) weight.

    The norms are None on devices whose values cannot be looked at in passing; all is None for a weight that needs the
    long way: float64, no elements, extreme rows.
    """
    done: list[Ready | None] = [None] * len(items)
    alike: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        if item.v.dtype != torch.float64 and item.v.numel():
            alike[item.v.device, item.g.dtype, item.magnitude].append(i)
    for places in alike.values():
        chosen = [items[i] for i in places]
        norms = list(map(_lengths, chosen))
        for i, found in zip(places, _alike(chosen, norms), strict=True):
            done[i] = found
    return done


def _lengths(item: Item) -> Tensor:
    """||v|| per row, shaped to broadcast against the (grouped) weight."""
    return norm(item.axes.grouped(item.v), item.axes.reduced(item.v.ndim), blocked=True)


def _alike(items: Sequence[Item], norms: Sequence[Tensor]) -> list[Ready | None]:
    """Weights of one device, magnitude and type of g."""
    first = items[0]
    sizes = [n.numel() for n in norms]
    flat = torch.cat([n.reshape(-1) for n in norms])
    g = torch.cat([i.g.reshape(-1) for i in items])
    if first.v.device.type != "cpu":  # nothing here may look at a value: that would wait for the device
        factors = torch.split(snapped_quotient(g, flat, wide_dtype(first.v), first.magnitude), sizes)
        return [Ready(None, rows.view(n.shape), None, n) for rows, n in zip(factors, norms, strict=True)]
    plain = plain_scale(g, flat, first.magnitude)
    if plain is not None and plain[1]:
        factors, short = torch.split(plain[0], sizes), torch.split(flat.float(), sizes)
        return [Ready(s.view(n.shape), f.view(n.shape)) for f, s, n in zip(factors, short, norms, strict=True)]
    if len(items) == 1:
        return [None]
    # extreme rows of one do not slow the others
    return [_alike([item], [n])[0] for item, n in zip(items, norms, strict=True)]
