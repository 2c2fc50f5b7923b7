"""Which weight-normalized weights an initialisation may set, which it leaves and why, and the scale wished for each."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from wnsurgery.errors import SelectionError
from wnsurgery.layers import layer_of
from wnsurgery.mechanism import WeightNormList
from wnsurgery.plan import Pattern, matches, patterns
from wnsurgery.walk import Slot

__all__ = ["Scale", "bias_of", "check_scales", "is_log", "normed", "scales_of", "select", "settable_bias", "sort_out"]

Scale = float | Mapping[str, float]

_FORMS = ("ours", "torch", "legacy")


def select(everything: list[Slot], include: Pattern | None, exclude: Pattern | None) -> list[Slot]:
    """The weight-normalized weights of a selection, writes into them that are still pending done.

    Raises SelectionError where a pattern or the whole selection fits none.
    """
    found = [slot for slot in everything if slot.form in _FORMS]
    for option, wish in (("include", include), ("exclude", exclude)):
        for pattern in patterns(wish):
            _check(option, pattern, found)
    chosen = normed(found, include, exclude)
    if not chosen:
        raise SelectionError("no weight-normalized weight to initialise", hint="call apply_weight_norm first")
    for slot in chosen:
        if slot.form == "ours":
            entry = slot.entry
            if isinstance(entry, WeightNormList):
                entry.absorb()
    return chosen


def normed(everything: list[Slot], include: Pattern | None, exclude: Pattern | None) -> list[Slot]:
    """The weight-normalized weights of a selection, be there any or not."""
    found = [slot for slot in everything if slot.form in _FORMS]
    chosen = [s for s in found if include is None or any(matches(p, s) for p in patterns(include))]
    return [s for s in chosen if not any(matches(p, s) for p in patterns(exclude))]


def scales_of(wish: Scale, everything: list[Slot]) -> dict[int, float]:
    """The scale of every weight-normalized weight, by the identity of its slot; the first pattern that fits wins.

    Raises SelectionError for a scale that is not positive and finite, and for a pattern that fits nothing.
    """
    found = [slot for slot in everything if slot.form in _FORMS]
    if not isinstance(wish, Mapping):
        scale = _scale(wish, "")
        return {id(s): scale for s in found}
    table = _table(wish)
    for pattern in table:
        _check("init_scale", pattern, found)
    return {id(s): next((x for p, x in table.items() if matches(p, s)), 1.0) for s in found}


def check_scales(wish: Scale) -> None:
    """Raise SelectionError for a scale that is not positive and finite, whatever its pattern fits."""
    if isinstance(wish, Mapping):
        _table(wish)
    else:
        _scale(wish, "")


def _table(wish: Mapping[str, float]) -> dict[str, float]:
    return {pattern: _scale(scale, f" for {pattern!r}") for pattern, scale in wish.items()}


def _scale(scale: Any, where: str) -> float:
    """A real number of any kind, or a tensor without axes that holds one, as a float."""
    if isinstance(scale, Tensor) and scale.ndim == 0 and not (scale.is_meta or scale.is_complex()):
        scale = scale.item()
    if not isinstance(scale, Real) or isinstance(scale, bool):
        raise SelectionError(f"init_scale must be a number{where}, not {scale!r} ({type(scale).__name__})")
    try:
        value = float(scale)
    except OverflowError:
        value = math.inf
    if not 0 < value < math.inf:
        raise SelectionError(f"init_scale must be positive and finite{where}, not {value!r}")
    return value


def _check(option: str, pattern: Any, found: list[Slot]) -> None:
    if not any(matches(pattern, slot) for slot in found):
        raise SelectionError.no_match(option, str(pattern), [slot.fqn for slot in found])


def sort_out(chosen: list[Slot], everything: list[Slot]) -> tuple[list[tuple[Slot, int]], dict[str, str]]:
    """The weights whose g decides the scale of an output axis, with that axis; the others with the reason."""
    beside, sharing = defaultdict(list), defaultdict(list)
    for slot in everything:
        beside[id(slot.module)].append(slot)
        sharing[id(slot.magnitude)].append(slot)
    targets: list[tuple[Slot, int]] = []
    reasons: dict[str, str] = {}
    barred: dict[int, list[Slot]] = {}  # by magnitude, once for all owners of a tied weight
    for slot in chosen:
        reason, axis = _how(slot)
        if not reason and (key := id(slot.magnitude)) not in barred:
            barred[key] = [s for s in sharing[key] if _how(s)[1] is None]
        reason = reason or _entangled(slot, beside[id(slot.module)], barred[id(slot.magnitude)])
        if reason or axis is None:
            reasons[slot.fqn] = reason
        else:
            targets.append((slot, axis))
    return targets, reasons


def bias_of(slot: Slot) -> Tensor | None:
    """The bias of a weight's layer as it is registered now."""
    row = layer_of(slot.module)
    return None if row is None or row.bias is None else slot.module._parameters.get(row.bias)


def settable_bias(everything: list[Slot]) -> set[int]:
    """The identities of all parameters that one module alone owns and training may change."""
    owners = Counter(id(slot.tensor) for slot in everything if slot.tensor is not None)
    return {
        id(s.tensor)
        for s in everything
        if s.tensor is not None and s.form == "plain" and s.tensor.requires_grad and owners[id(s.tensor)] == 1
    }


def is_log(slot: Slot) -> bool:
    """Whether a weight's g is stored as its logarithm."""
    return slot.form == "ours" and slot.entry._modules["0"].magnitude == "log"


def _how(slot: Slot) -> tuple[str, int | None]:
    """The channel axis of a layer's output, or the reason why its g cannot be set for it."""
    row = layer_of(slot.module)
    own = None if row is None else row.axes(slot.module, slot.parameter)
    g, v = slot.magnitude, slot.tensor
    if row is None or own is None or row.output_axis is None:
        note = row.note if row else ""
        return note or f"{type(slot.module).__name__}: the layer table names no output axis", None
    if g is None or v is None:
        return "one half of its pair is missing", None
    if not g.requires_grad:
        return "its magnitude is frozen", None
    if g.is_meta or v.is_meta:
        return "on the meta device: it holds no values yet", None
    if not v.numel():
        return "it has no elements", None
    if row.registered:
        row.check(slot.module, slot.parameter, slot.fqn, v.shape)
    per_channel = own.check(v.shape).magnitude_shape(v.shape)
    if g.numel() != torch.Size(per_channel).numel() or (g.numel() > 1 and tuple(g.shape) != per_channel):
        return f"its magnitude {tuple(g.shape)} is not one value per output channel", None
    return "", row.output_axis


def _entangled(slot: Slot, beside: list[Slot], barred: list[Slot]) -> str:
    """Why g and b alone do not decide a layer's output, or decide more than that; empty if neither.

    `beside` are all tensors of its module, `barred` all weights with the same g that data cannot set.
    """
    row = layer_of(slot.module)
    weights = [s for s in beside if row is not None and (s is slot or row.axes(s.module, s.parameter))]
    if len(weights) > 1:
        return f"{', '.join(s.parameter for s in weights)}: several weights make its output"
    if any(row is not None and s.parameter == row.bias and s.form != "plain" for s in beside):
        return "its bias is parametrized"
    fixed = next((s.fqn for s in barred if s is not slot), None)
    return "" if fixed is None else f"shares its magnitude with {fixed}, which data cannot set"
