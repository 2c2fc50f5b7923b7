"""Weight norm of many weights at once: what is done row by row is done for the rows of all of them together.

A layer costs two operations forward (its norms, its product) however small it is; everything between them, some twenty
operations on one value per row, runs once for all layers. Bits and gradients are those of `compose`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wnsurgery.norms import norm, plain_scale, snapped_quotient, wide_dtype
from wnsurgery.reparam import Axes, Magnitude, compose_eagerly, first_order_gradients

__all__ = ["Item", "compose_into", "gradients"]


@dataclass(frozen=True)
class Item:
    """One weight: its pair, its rule, and the memory w is written to (laid out as v)."""

    g: Tensor = field(repr=False)
    v: Tensor = field(repr=False)
    axes: Axes
    magnitude: Magnitude
    w: Tensor = field(repr=False)


def compose_into(items: Sequence[Item]) -> list[Tensor | None]:
    """Write w = g * v / ||v|| into each item's memory, in the bits of `compose`.

    Returns ||v|| per row in float32 for each weight where that serves the gradients, None where rows are extreme.

    >>> g, v, w = torch.tensor([[10.0]]), torch.tensor([[3.0, 4.0]]), torch.empty(1, 2)
    >>> norms, = compose_into([Item(g, v, Axes((0,)), "linear", w)])
    >>> w.tolist(), norms.tolist()
    ([[6.0, 8.0]], [[5.0]])
    """
    done: list[Tensor | None] = [None] * len(items)
    alike: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        if item.v.dtype == torch.float64 or not item.v.numel():
            item.w.copy_(compose_eagerly(item.g, item.v, item.axes, item.magnitude))
        else:
            alike[item.v.device, item.g.dtype, item.magnitude].append(i)
    for places in alike.values():
        for i, norms in zip(places, _alike([items[i] for i in places]), strict=True):
            done[i] = norms
    return done


def _alike(items: Sequence[Item]) -> Iterable[Tensor | None]:
    """Weights of one device, magnitude and type of g."""
    first = items[0]
    norms = [norm(i.axes.grouped(i.v), i.axes.reduced(i.v.ndim), blocked=True) for i in items]
    sizes = [n.numel() for n in norms]
    flat = torch.cat([n.reshape(-1) for n in norms])
    g = torch.cat([i.g.reshape(-1) for i in items])
    if first.v.device.type != "cpu":  # nothing here may look at a value: that would wait for the device
        factor = snapped_quotient(g, flat, wide_dtype(first.v), first.magnitude)
        short: tuple[Tensor | None, ...] = (None,) * len(items)
    else:
        plain = plain_scale(g, flat, first.magnitude)
        if plain is None or not plain[1]:
            if len(items) > 1:  # extreme rows of one do not slow the others
                return [compose_into([item])[0] for item in items]
            first.w.copy_(compose_eagerly(first.g, first.v, first.axes, first.magnitude))
            return [None]
        factor = plain[0]
        short = torch.split(flat.float(), sizes)
    for item, n, rows in zip(items, norms, torch.split(factor, sizes), strict=True):
        torch.mul(item.v, item.axes.spread(rows.view(n.shape), item.v), out=item.w)
    return [None if s is None else s.view(n.shape) for s, n in zip(short, norms, strict=True)]


def gradients(item: Item, norms: Tensor | None, grad: Tensor, *, private: bool) -> tuple[Tensor, Tensor]:
    """dL/dg and dL/dv from dL/dw, the paper's equation 3; `private` lets dL/dv take the memory of dL/dw."""
    return first_order_gradients(grad, item.g, item.v, norms, item.axes, item.magnitude, private=private)
