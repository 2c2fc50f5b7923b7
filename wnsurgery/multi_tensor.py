"""Weight norm of many weights at once: what is done row by row is done for the rows of all of them together.

A layer costs two operations forward (its norms, its product) however small it is; everything between them, some twenty
operations on one value per row, runs once for all layers. Bits and gradients are those of `compose`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wnsurgery.norms import norm, plain_scale, snapped_quotient, wide_dtype
from wnsurgery.reparam import Axes, Magnitude, Ready, compose_eagerly, first_order_gradients

__all__ = ["Item", "compose_into", "gradients", "row_factors"]


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
    for i, (item, found) in enumerate(zip(items, row_factors(items), strict=True)):
        if found is None or found.factor is None:
            item.w.copy_(compose_eagerly(item.g, item.v, item.axes, item.magnitude))
        else:
            torch.mul(item.v, item.axes.spread(found.factor, item.v), out=item.w)
            done[i] = found.norms
    return done


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
        norms = [norm(i.axes.grouped(i.v), i.axes.reduced(i.v.ndim), blocked=True) for i in chosen]
        for i, found in zip(places, _alike(chosen, norms), strict=True):
            done[i] = found
    return done


def _alike(items: Sequence[Item], norms: Sequence[Tensor]) -> list[Ready | None]:
    """Weights of one device, magnitude and type of g."""
    first = items[0]
    sizes = [n.numel() for n in norms]
    flat = torch.cat([n.reshape(-1) for n in norms])
    g = torch.cat([i.g.reshape(-1) for i in items])
    if first.v.device.type != "cpu":  # nothing here may look at a value: that would wait for the device
        factors = torch.split(snapped_quotient(g, flat, wide_dtype(first.v), first.magnitude), sizes)
        return [Ready(None, rows.view(n.shape)) for rows, n in zip(factors, norms, strict=True)]
    plain = plain_scale(g, flat, first.magnitude)
    if plain is not None and plain[1]:
        factors, short = torch.split(plain[0], sizes), torch.split(flat.float(), sizes)
        return [Ready(s.view(n.shape), f.view(n.shape)) for f, s, n in zip(factors, short, norms, strict=True)]
    if len(items) == 1:
        return [None]
    # extreme rows of one do not slow the others
    return [_alike([item], [n])[0] for item, n in zip(items, norms, strict=True)]


def gradients(item: Item, norms: Tensor | None, grad: Tensor, *, private: bool) -> tuple[Tensor, Tensor]:
    """dL/dg and dL/dv from dL/dw, the paper's equation 3; `private` lets dL/dv take the memory of dL/dw."""
    return first_order_gradients(grad, item.g, item.v, norms, item.axes, item.magnitude, private=private)
