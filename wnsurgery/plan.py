"""Select weights and group ties: the plan, an immutable list of what would change and what would not, and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from wnsurgery.dtensors import is_spread
from wnsurgery.errors import PairError, SelectionError
from wnsurgery.kept import extent
from wnsurgery.layers import Layer, layer_of
from wnsurgery.reparam import Axes
from wnsurgery.text import by, columns
from wnsurgery.walk import Slot, has_own_parametrizations, is_watched, slots

__all__ = ["Dim", "Pattern", "Plan", "Site", "Skipped", "matches", "patterns", "plan_weight_norm"]

Pattern = str | type | Callable[[nn.Module, str], bool] | Sequence[Any]
Dim = str | int | tuple[int, ...] | None


@dataclass(frozen=True)
class Site:
    """One weight to convert: a tensor with its kept axes and all the modules that own it."""

    slot: Slot
    axes: Axes
    ties: tuple[Slot, ...] = ()

    @property
    def fqn(self) -> str:
        return self.slot.fqn

    @property
    def owners(self) -> tuple[Slot, ...]:
        """Every (module, parameter) the tensor is registered at, the first in walking order first."""
        return (self.slot, *self.ties)

    @property
    def weight(self) -> Tensor:
        assert self.slot.tensor is not None
        return self.slot.tensor


@dataclass(frozen=True)
class Skipped:
    """One tensor that is left alone, and why."""

    name: str
    shape: tuple[int, ...] | None
    reason: str


@dataclass(frozen=True)
class Plan:
    """What a conversion would do; prints as a table.

    Attributes:
        sites: the weights to convert.
        skipped: every other tensor of the model, with the reason; vectors and scalars included.

    >>> print(wn.plan_weight_norm(nn.Sequential(nn.Linear(3, 2))))
    1 weights to convert (6 elements)
      weight    layer   shape  kept  magnitudes  note
      0.weight  Linear  2x3    0     2
    <BLANKLINE>
    1 vectors and scalars (biases, norms, counters) are never converted
    """

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        return _table(self)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        sites = [
            {
                "name": site.fqn,
                "layer": _type_name(site.slot.module),
                "shape": tuple(site.weight.shape),
                "kept": site.axes.kept,
                "groups": site.axes.groups,
                "also": [n for s in site.owners for n in s.names if n != site.fqn],
                "frozen": not site.weight.requires_grad,
            }
            for site in self.sites
        ]
        return {"sites": sites, "skipped": self.skipped}


def plan_weight_norm(
    model: nn.Module,
    *,
    include: Pattern | None = None,
    exclude: Pattern | None = None,
    dim: Dim | Mapping[str, Dim] = "auto",
) -> Plan:
    """What `apply_weight_norm` would change, without changing it; look before you cut.

    >>> plan = wn.plan_weight_norm(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm((2, 2))))
    >>> [(site.fqn, site.axes.kept) for site in plan.sites], plan.skipped[-1].reason
    ([('0.weight', (0,))], 'LayerNorm: not in the layer table; register_layer adds it')

    Args:
        model: any module tree.
        include, exclude: what to convert, what not: a layer type, a glob on qualified names, a pattern after
            "re:", a predicate `(module, name) -> bool`, or a sequence of these. A name or type that stands for
            a container takes everything under it; names are tried with and without the parameter
            ("encoder.0" and "encoder.0.weight"). Without `include`, everything in the layer table but lookup
            tables; a lookup table tied to a converted weight goes with it.
        dim: the axis or axes kept: "auto" (one magnitude per output channel), an int, a tuple, None (one magnitude
            per tensor), or a mapping from patterns to these. Numbers and None mean what they do in torch's
            `weight_norm`, but for -1: the last axis, as everywhere else; there it is one magnitude per tensor.

    Returns a Plan: `sites` and `skipped`, each tensor of the model in one of them.

    Raises SelectionError when a pattern, or the whole selection, matches nothing.
    """
    found = slots(model)
    choose = _Selection(found, include, exclude, dim)
    sites: list[Site] = []
    skipped: list[Skipped] = []
    for group in _tie_groups(found):
        verdict = choose.verdict(group)
        if isinstance(verdict, Axes):
            sites.append(Site(group[0], verdict, tuple(group[1:])))
        else:
            skipped += [Skipped(s.fqn, s.shape, verdict) for s in group]
    plan = Plan(tuple(sites), tuple(skipped))
    if not sites and not any(s.form in ("ours", "torch", "legacy") for s in found):
        raise SelectionError("no weight of the model can be weight-normalized", hint=_why_nothing(plan))
    return plan


def _why_nothing(plan: Plan) -> str:
    large = [s for s in plan.skipped if s.shape is None or len(s.shape) > 1]
    if not large:
        return "it has no tensor of 2 or more dimensions"
    return "; ".join(f"{s.name}: {s.reason}" for s in large[:3])


def _tie_groups(found: list[Slot]) -> Iterator[list[Slot]]:
    """Slots that hold one and the same tensor, together, in walking order."""
    groups: dict[int, list[Slot]] = {}
    for slot in found:
        groups.setdefault(id(slot if slot.tensor is None else slot.tensor), []).append(slot)
    yield from groups.values()


class _Selection:
    """The caller's wishes, checked against the names there are."""

    def __init__(
        self,
        found: list[Slot],
        include: Pattern | None,
        exclude: Pattern | None,
        dim: Dim | Mapping[str, Dim],
    ) -> None:
        self.include = None if include is None else patterns(include)
        self.exclude = patterns(exclude)
        self.dim = dim
        self.shared_memory = _shared_memory(found)
        wishes = [("include", p) for p in self.include or ()] + [("exclude", p) for p in self.exclude]
        if isinstance(dim, Mapping):
            wishes += [("dim", p) for p in dim]
        weights = [s for s in found if s.form != "buffer"] if wishes else []
        for option, pattern in wishes:
            if not any(matches(pattern, s) for s in weights):
                shown = pattern if isinstance(pattern, str) else getattr(pattern, "__name__", repr(pattern))
                names = [s.fqn for s in weights if s.shape is None or len(s.shape) > 1]
                raise SelectionError.no_match(option, shown, names)

    def verdict(self, group: list[Slot]) -> Axes | str:
        """The kept axes of a tensor to convert, or the reason why it is left alone."""
        slot = group[0]
        for s in group:
            reason = _refusal(s)
            if reason:
                return reason if s is slot else f"{reason} (as {s.fqn})"
        known = []
        for s in group:
            row = layer_of(s.module)
            own = None if row is None else row.axes(s.module, s.parameter)
            if row is not None and own is not None:
                known.append((s, row, own))
        if not known:
            return _not_in_table(slot, layer_of(slot.module))
        for pattern in self.exclude:
            for s in group:
                if matches(pattern, s):
                    return "excluded" if s is slot else f"tied to {s.fqn}, which is excluded"
        reason = self._not_wanted(group, known) or _module_refusal(group) or self._overlap(slot)
        if reason:
            return reason
        for s, row, _ in known:
            if row.registered:
                row.check(s.module, s.parameter, s.fqn, s.shape or ())
        axes = self._axes(known[0][0], known[0][2])
        for s, _, own in known[1:]:
            if self._axes(s, own) != axes:
                return f"tied under different kept axes: {', '.join(s.fqn for s in group)}"
        return axes.fault(slot.shape or ()) or axes

    def _not_wanted(self, group: list[Slot], known: list[tuple[Slot, Layer, Axes]]) -> str:
        if self.include is not None:
            wanted = any(matches(p, s) for p in self.include for s in group)
            return "" if wanted else "not included"
        for _, row, _ in known:
            if row.by_default:
                return ""
        return f"{_type_name(known[0][0].module)}: {known[0][1].note}"

    def _overlap(self, slot: Slot) -> str:
        other = self.shared_memory.get(id(slot.tensor))
        return f"shares memory with {other} without being the same Parameter" if other else ""

    def _axes(self, slot: Slot, own: Axes) -> Axes:
        wish: Any = self.dim
        if isinstance(wish, Mapping):
            wish = next((d for p, d in wish.items() if matches(p, slot)), "auto")
        if wish == "auto":
            return own.check(slot.shape or ())
        kept = () if wish is None else wish if isinstance(wish, tuple) else (wish,)
        if not all(isinstance(axis, int) and not isinstance(axis, bool) for axis in kept):
            raise SelectionError(f'dim must be "auto", an int, a tuple of ints, None or a mapping, not {wish!r}')
        try:
            return Axes(kept).check(slot.shape or ())
        except PairError as error:
            raise SelectionError(f"{slot.fqn}: {error.message}") from error


def patterns(pattern: Pattern | None) -> list[Any]:
    """A selection as a flat list of types, strings and predicates."""
    if pattern is None:
        return []
    if isinstance(pattern, str | type) or callable(pattern):
        return [pattern]
    if not isinstance(pattern, Iterable):
        raise SelectionError(f"a selection is a type, a string, a predicate or a sequence of these, not {pattern!r}")
    return [p for entry in pattern for p in patterns(entry)]


def matches(pattern: Any, slot: Slot) -> bool:
    """Whether a type, glob, `re:` pattern or predicate speaks of a tensor, its module or a container of it."""
    if isinstance(pattern, type):
        return any(isinstance(m, pattern) for _, m in slot.ancestors)
    parts = [n.split(".") for n in slot.names]
    width = slot.parameter.count(".") + 1
    if not isinstance(pattern, str):
        if not callable(pattern):
            raise SelectionError(f"a pattern is a type, a string or a predicate, not {pattern!r}")
        owners = [".".join(p[:-width]) for p in parts]
        return any(bool(pattern(slot.module, n)) for n in (*slot.names, *owners))
    prefixes = {".".join(p[:k]) for p in parts for k in range(1, len(p) + 1)}
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise SelectionError(f"{pattern!r} is not a regular expression: {error}") from error
        return any(expression.search(n) for n in slot.names)
    return any(fnmatchcase(n, pattern) for n in prefixes)


_ORDINARY = (nn.Parameter, Tensor)


class _Place(NamedTuple):
    """Where a tensor lies in the memory of a device, in bytes."""

    device: int
    start: int
    end: int
    number: int  # in the order of the walk
    tensor: Tensor
    slot: Slot


_Where = tuple[int, int, int, int, Tensor, Slot]  # the same for each tensor of a net, nearly all of which lie apart


def _shared_memory(found: list[Slot]) -> dict[int, str]:
    """Of tensors that have memory in common with another tensor of the model, by identity: the name of one such."""
    seen: set[int] = set()
    places: list[_Where] = []
    for slot in found:
        for t in (slot.tensor, slot.magnitude):
            if t is not None and id(t) not in seen and _has_place(t):
                seen.add(id(t))
                start = t.data_ptr()
                places.append((t.get_device(), start, start + extent(t), len(places), t, slot))
    places.sort()
    shared: dict[int, str] = {}
    for group in _touching(places):
        for one, other in _overlaps(group):
            shared.setdefault(id(one.tensor), other.slot.fqn)
            shared.setdefault(id(other.tensor), one.slot.fqn)
    return shared


def _has_place(t: Tensor) -> bool:
    """Whether a tensor is an ordinary one with elements in memory."""
    if type(t) not in _ORDINARY and (is_lazy(t) or type(t.data) is not Tensor):
        return False
    return t.layout == torch.strided and not t.is_meta and t.numel() > 0


def _touching(places: list[_Where]) -> Iterator[list[_Place]]:
    """Groups of two or more sorted places whose ranges hang together."""
    device, reach, first = -2, 0, 0
    for i, (where, start, end, *_) in enumerate(places):
        if where != device or start >= reach:
            if i - first > 1:
                yield [_Place(*place) for place in places[first:i]]
            device, reach, first = where, end, i
        elif end > reach:
            reach = end
    if len(places) - first > 1:
        yield [_Place(*place) for place in places[first:]]


def _overlaps(group: list[_Place]) -> Iterator[tuple[_Place, _Place]]:
    """Pairs of places with memory in common, so that each place that has some is in a pair."""
    if all(extent(place.tensor) == place.tensor.nbytes for place in group):
        furthest = group[0]
        for place in group[1:]:
            yield place, furthest
            furthest = max(furthest, place, key=lambda p: p.end)
        return
    # with gaps, as half the columns of a matrix: who owns which element
    start, end = group[0].start, max(place.end for place in group)
    unit = gcd(*(n for place in group for n in (place.tensor.element_size(), place.start - start)))
    owners = torch.full(((end - start) // unit,), -1, dtype=torch.int32)
    for number, (_, begin, _, _, t, _) in enumerate(group):
        width = t.element_size() // unit
        axes = [(n, stride * width) for n, stride in zip(t.shape, t.stride(), strict=True) if stride] + [(width, 1)]
        sizes, strides = zip(*axes, strict=True)
        mine = owners.as_strided(sizes, strides, (begin - start) // unit)
        yield from ((group[number], group[other]) for other in mine.unique().tolist() if other >= 0)  # type: ignore[no-untyped-call]
        mine.fill_(number)


# Why not -------------------------------------------------------------------------------------------------


_FORMS = {
    "buffer": "a buffer, not a parameter",
    "ours": "already weight-normalized",
    "torch": "already under torch's weight norm; fold_weight_norm takes it out",
    "legacy": "already under torch's legacy weight norm; fold_weight_norm takes it out",
    "quantized": "quantized: its integers have no direction to train",
}


_WIDE = {torch.float64, torch.float32, torch.bfloat16, torch.float16}  # types that hold a direction


def _refusal(slot: Slot) -> str:
    """Why a tensor cannot be converted for what it is, whatever module it is in; empty if it can."""
    t = slot.tensor
    if slot.form != "plain":
        return _form_refusal(slot)
    if isinstance(slot.module, torch.jit.ScriptModule):
        return "TorchScript: a compiled module cannot be changed"
    if t is None or (type(t) is not nn.Parameter and is_lazy(t)):
        return "lazy: not initialised yet; run one forward pass first"
    if t.ndim < 2:
        return "a vector or scalar, not a neuron's weight"
    if t.dtype not in _WIDE or t.layout != torch.strided:
        return _type_refusal(t)
    if type(t) is not nn.Parameter and not is_spread(t):
        return f"a tensor subclass ({type(t if type(t.data) is Tensor else t.data).__name__})"
    if t.is_inference():
        return "made under inference_mode: it cannot be trained"
    if is_watched(t):
        return "a hook on its gradient, or its optimizer in the backward pass, would be lost: set that up afterwards"
    return ""


def _form_refusal(slot: Slot) -> str:
    if slot.form == "other":
        kinds = ", ".join(type(m).__name__ for m in slot.entry._modules.values())
        return f"already parametrized by {kinds}"
    if slot.form == "part":
        owner, _, path = slot.fqn.rpartition("parametrizations.")
        return f"belongs to the parametrization of {owner}{path.partition('.')[0]}"
    return _FORMS[slot.form]


def _type_refusal(t: Tensor) -> str:
    kind = str(t.dtype).removeprefix("torch.")
    if t.is_complex():
        return "complex: weight norm is defined for real weights"
    if t.is_quantized:
        return _FORMS["quantized"]
    if not t.is_floating_point():
        return f"{kind}: not a floating-point weight"
    if t.layout != torch.strided:
        return f"sparse ({str(t.layout).removeprefix('torch.')}): a norm would need its dense form"
    return f"{kind}: too narrow to hold a direction"


def _not_in_table(slot: Slot, row: Layer | None) -> str:
    if slot.parameter.endswith("_orig"):
        return "under a hook-based reparametrization (pruning or spectral norm)"
    if row is None:
        return f"{_type_name(slot.module)}: not in the layer table; register_layer adds it"
    return f"{_type_name(slot.module)}.{slot.parameter}: not a weight in the layer table"


def _module_refusal(group: list[Slot]) -> str:
    """Why a module's way of using its weight rules weight norm out; empty if it does not."""
    for slot in group:
        module = slot.module
        if has_own_parametrizations(module):
            return "its layer has an attribute `parametrizations` of its own, where weight norm is kept"
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            if getattr(module, "max_norm", None) is not None:
                return "max_norm rewrites the rows at every lookup"
            if getattr(module, "sparse", False):
                return "sparse=True: sparse gradients do not pass through a norm"
        if module._forward_pre_hooks and any(
            type(h).__name__ in ("SpectralNorm", "WeightNorm") and getattr(h, "name", None) == slot.parameter
            for h in module._forward_pre_hooks.values()
        ):
            return "recomputed by a hook before every forward"
    return ""


def _type_name(module: nn.Module) -> str:
    return type(module).__name__


# How it reads --------------------------------------------------------------------------------------------


def _table(plan: Plan) -> str:
    rows = [("weight", "layer", "shape", "kept", "magnitudes", "note")]
    for site in plan.sites:
        shape = tuple(site.weight.shape)
        count = 1
        for size in site.axes.magnitude_shape(shape):
            count *= size
        kept = "none" if not site.axes.kept else ",".join(map(str, site.axes.kept))
        kept += f" in {site.axes.groups} groups" if site.axes.groups > 1 else ""
        notes = [f"= {n}" for s in site.owners for n in s.names if n != site.fqn]
        notes += [] if site.weight.requires_grad else ["frozen"]
        rows.append((site.fqn, _type_name(site.slot.module), by(shape), kept, str(count), "; ".join(notes)))
    left = [s for s in plan.skipped if s.shape is None or len(s.shape) > 1]
    small = len(plan.skipped) - len(left)
    total = sum(s.weight.numel() for s in plan.sites)
    lines = (
        [f"{len(plan.sites)} weights to convert ({total:,} elements)", *columns(rows)]
        if plan.sites
        else ["0 weights to convert"]
    )
    if left:
        lines += ["", f"{len(left)} tensors left alone"]
        lines += columns([("tensor", "shape", "reason"), *((s.name, by(s.shape), s.reason) for s in left)])
    if small:
        lines += ["", f"{small} vectors and scalars (biases, norms, counters) are never converted"]
    return "\n".join(lines)
