"""Magnitudes stored as a plain list of numbers: their length does not tell the axis they belong to; the user does."""

from __future__ import annotations

from collections.abc import Sequence

from wnsurgery.choice import ByName
from wnsurgery.errors import PairError, printable
from wnsurgery.keys import flat_pairs
from wnsurgery.states import StateDict, shape_of

__all__ = ["spread_magnitudes"]


def spread_magnitudes(states: Sequence[StateDict], choose: ByName) -> int:
    """Give every list of magnitudes the shape of the axis that `choose.dim` names for it, in place; how many lists
    there are.

    Only those whose axis is given; the others stay, for `find_pairs` to refuse. Values and memory are the same.

    >>> import torch
    >>> state = StateDict("", {"fc.weight_g": torch.ones(4), "fc.weight_v": torch.ones(4, 4)})
    >>> spread_magnitudes([state], ByName(dim=1))
    1
    >>> state.entries["fc.weight_g"].shape
    torch.Size([1, 4])

    Raises PairError, naming the key, where the axis does not have that length.
    """
    found = [(state, flat_pairs({key: shape_of(t) for key, t in state.tensors.items()})) for state in states]
    for state, pairs in found:
        tensors = state.tensors
        for pair in pairs:
            g, v = tensors[pair.g_key], tensors[pair.v_key]
            axes = choose.told(state, pair.plain_key, v)
            if axes is None:
                continue
            shape = axes.magnitude_shape(v.shape)
            if len(axes.kept) != 1 or v.shape[axes.kept[0]] != len(g):
                kept = ", ".join(map(str, axes.kept)) or "none"
                raise PairError(
                    f"{printable(state.full(pair.g_key))}: {len(g)} magnitudes do not fit the kept axis {kept} of a "
                    f"direction of shape {tuple(v.shape)}"
                )
            state.entries[pair.g_key] = g.reshape(shape)
    return sum(len(pairs) for _, pairs in found)
