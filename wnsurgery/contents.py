"""The weights in a module, a checkpoint, a directory or an ONNX file, under weight norm or not; read one by one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wnsurgery.entries import all_entries, taken
from wnsurgery.errors import InputError, SelectionError
from wnsurgery.plan import Skipped, plan_weight_norm
from wnsurgery.reparam import Axes, Magnitude
from wnsurgery.states import identity, shape_of
from wnsurgery.walk import Slot, slots

__all__ = ["Contents", "Normed", "Plain", "opened", "refuse_unknown"]

Path_ = str | os.PathLike[str]


@dataclass
class Normed:
    """One (g, v) pair: where it is, how it is stored, and how to get g (never its logarithm) and v."""

    name: str
    form: str
    shape: tuple[int, ...]
    axes: Axes | None
    dtype: str
    extra: tuple[int, int]  # parameters and bytes that folding saves
    values: Callable[[], tuple[Tensor, Tensor]] | None = field(repr=False)
    also: tuple[str, ...] = ()


@dataclass
class Plain:
    """One tensor that is not under weight norm, and why; `value` is None where it cannot be had."""

    name: str
    shape: tuple[int, ...] | None
    reason: str
    value: Callable[[], Tensor] | None = field(default=None, repr=False)


@dataclass
class Contents:
    """Everything in one artefact.

    Attributes:
        weights: the pairs, ties once.
        others: the other tensors of 2 or more dimensions.
        parameters, bytes: of all tensors, memory shared counted once.
        entered: whether this is what `entry` names in a file that has it.
    """

    weights: list[Normed]
    others: list[Plain]
    parameters: int = 0
    bytes: int = 0
    entered: bool = False


@contextmanager
def opened(
    target: nn.Module | Path_,
    *,
    arch: str | None = None,
    trust_pickle: bool = False,
    magnitude: Magnitude = "linear",
    entry: str | None = None,
) -> Iterator[Contents]:
    """What a module or a file holds, for as long as the block lasts; a checkpoint's values stay in it until asked for.

    Args as of `inspect`; an `entry` that the file does not have is left to the other side.

    Raises InputError, UnsafeFileError as the readers do, SelectionError for a magnitude that is none.
    """
    from wnsurgery.checkpoint import known_magnitude

    known_magnitude(magnitude)
    if isinstance(target, nn.Module):
        yield _of_module(target)
        return
    path = Path(target)
    if path.suffix.lower() == ".onnx":
        yield _of_graph(path)
        return
    from wnsurgery.checkpoint_directory import map_directory
    from wnsurgery.files import load_model, load_object
    from wnsurgery.stores import map_store

    content: Any
    stored = None
    if path.is_dir() and not arch:
        stored = map_directory(path).stored
    elif not arch and not trust_pickle:
        stored = map_store(path)
    if stored is not None and stored.source is not None:
        try:
            content, entered = _entered(path, stored.content, entry)
            yield replace(_of_checkpoint(content, path, magnitude, stored.source.fetch), entered=entered)
        finally:
            stored.source.close()
        return
    content = None if arch and entry is None else load_object(path, trust_pickle=trust_pickle)
    content, entered = _entered(path, content, entry)
    if arch:
        own = entry if entered else None
        content = load_model(path, arch=arch, trust_pickle=trust_pickle, magnitude=magnitude, entry=own)
    found = _of_module(content) if isinstance(content, nn.Module) else _of_checkpoint(content, path, magnitude)
    yield replace(found, entered=entered)


def _entered(path: Path, content: Any, entry: str | None) -> tuple[Any, bool]:
    """What `entry` names in a file, and whether it names anything there; all of the file where it does not."""
    if entry is None or not any(where == entry for where, _ in all_entries(content)):
        return content, False
    return taken(path, content, entry)[0], True


def refuse_unknown(entry: str | None, *sides: Contents) -> None:
    """Raise SelectionError where none of the sides has what `entry` names."""
    if entry is not None and not any(side.entered for side in sides):
        raise SelectionError(f"entry={entry!r}: no state dict or module of this name in it")


# A live module -------------------------------------------------------------------------------------------


def _of_module(model: nn.Module) -> Contents:
    weights: dict[tuple[int, int], Normed] = {}
    found = slots(model)
    for slot in found:
        if slot.form not in ("ours", "torch", "legacy") or slot.tensor is None or slot.magnitude is None:
            continue
        key = (id(slot.magnitude), id(slot.tensor))
        if key in weights:
            weights[key].also += slot.names
        else:
            weights[key] = _normed_slot(slot, slot.tensor, slot.magnitude)
    names = {f.name for f in weights.values()} | {n for f in weights.values() for n in f.also}
    try:
        plan = plan_weight_norm(model)
        rest = [Skipped(s.fqn, tuple(s.weight.shape), "plain") for s in plan.sites] + list(plan.skipped)
    except ValueError:  # nothing to convert in this model is no error here
        rest = [Skipped(s.fqn, s.shape, "plain") for s in found if s.shape]
    tensors = {s.fqn: s.tensor for s in found if s.tensor is not None and s.shape is not None}
    others = [
        Plain(s.name, s.shape, s.reason, tensors[s.name].detach if s.name in tensors else None)
        for s in rest
        if (s.shape is None or len(s.shape) > 1) and s.name not in names
    ]
    held = [t for s in found if s.shape is not None for t in (s.tensor, s.magnitude) if t is not None]
    return Contents(list(weights.values()), others, *_totals(held))


def _normed_slot(slot: Slot, v: Tensor, g: Tensor) -> Normed:
    entry: Any = getattr(slot.module, "parametrizations", {})
    rule = entry[slot.parameter][0] if slot.form == "ours" else None
    axes = rule.axes if rule else Axes.of_pair(g.shape, v.shape)
    log = rule is not None and rule.magnitude == "log"

    def values() -> tuple[Tensor, Tensor]:
        return _linear(g.detach(), log), v.detach()

    extra = (g.numel(), g.numel() * g.element_size())
    return Normed(slot.fqn, slot.form, tuple(v.shape), axes, _kind(v), extra, values, slot.names[1:])


# A checkpoint --------------------------------------------------------------------------------------------


def _of_checkpoint(
    content: Any, path: Path, magnitude: Magnitude, fetch: Callable[[Tensor], Tensor] = Tensor.detach
) -> Contents:
    from wnsurgery.checkpoint import plan_fold, state_dicts
    from wnsurgery.loading import named

    with named(path):
        found = state_dicts(content)
    if not found:
        raise InputError.of(path, "holds no tensors under names")
    weights: dict[Any, Normed] = {}
    others: list[Plain] = []
    for state in found:
        tensors = state.tensors
        steps, skips = plan_fold(state)
        reasons = {skip.name: skip.reason for skip in skips}
        for step in steps:
            g, v = (tensors[key] for key in step.sources[:2])
            tie = identity(g), identity(v)
            if tie in weights:
                weights[tie].also += (step.name,)
                continue
            form = "legacy" if step.sources[0].endswith("_g") else "parametrized"
            extra = (g.numel(), g.numel() * g.element_size())
            values = _fetching(fetch, g, v, step.log or magnitude == "log")
            weights[tie] = Normed(step.name, form, step.shape, step.axes, _kind(v), extra, values)
        used = {key for step in steps for key in step.sources}
        for key, tensor in tensors.items():
            name = state.full(key)
            if key not in used and tensor.ndim > 1:
                value = _one(fetch, tensor)
                others.append(Plain(name, shape_of(tensor), reasons.get(name, "plain"), value))
    held = [tensor for state in found for tensor in state.tensors.values()]
    return Contents(list(weights.values()), others, *_totals(held))


def _fetching(
    fetch: Callable[[Tensor], Tensor], g: Tensor, v: Tensor, log: bool
) -> Callable[[], tuple[Tensor, Tensor]]:
    return lambda: (_linear(fetch(g).detach(), log), fetch(v).detach())


def _one(fetch: Callable[[Tensor], Tensor], tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: fetch(tensor).detach()


# An ONNX graph -------------------------------------------------------------------------------------------


def _of_graph(path: Path) -> Contents:
    from wnsurgery.graph import find_weight_norms
    from wnsurgery.onnx_checks import blamed_on
    from wnsurgery.onnx_file import read_onnx

    model = read_onnx(path)
    arrays: dict[str, Any] = {
        n: x.const_value for n, x in model.graph.initializers.items() if x.const_value is not None
    }
    weights: list[Normed] = []
    with blamed_on(path):
        found = find_weight_norms(model)
    for one in found:
        g, v = arrays.get(one.g or ""), arrays.get(one.v)
        both = g is not None and v is not None
        axes = _graph_axes(tuple(g.shape), tuple(v.shape), one.shape) if g is not None and v is not None else None
        values = _graph_values(g, v, one.magnitude == "log") if both and axes is not None else None
        extra = (0, 0) if g is None else (int(g.size), int(g.nbytes))
        weights.append(Normed(one.value, "graph", one.shape, axes, one.dtype, extra, values, (one.v,)))
    used = {name for one in found for name in (one.g, one.v)}
    others = [Plain(n, tuple(x.shape), "plain") for n, x in arrays.items() if n not in used and len(x.shape) > 1]
    sizes = [(int(x.size), int(x.nbytes)) for x in arrays.values()]
    return Contents(weights, others, sum(n for n, _ in sizes), sum(b for _, b in sizes))


def _graph_axes(g: tuple[int, ...], v: tuple[int, ...], weight: tuple[int, ...]) -> Axes | None:
    """The axes of a pair in a graph; None where the graph reshapes it on the way, and the shapes do not tell."""
    try:
        return Axes.of_pair(g, v) if v == weight else None
    except ValueError:
        return None


def _graph_values(g: Any, v: Any, log: bool) -> Callable[[], tuple[Tensor, Tensor]]:
    def values() -> tuple[Tensor, Tensor]:
        first, second = (torch.from_numpy(x.numpy().astype("float64")) for x in (g, v))
        return _linear(first, log), second

    return values


# Common --------------------------------------------------------------------------------------------------


def _linear(g: Tensor, log: bool) -> Tensor:
    return g.double().exp() if log else g


def _kind(v: Tensor) -> str:
    return str(v.dtype).removeprefix("torch.")


def _totals(held: list[Tensor]) -> tuple[int, int]:
    once = {identity(t): t for t in held}.values()
    return sum(t.numel() for t in once), sum(t.numel() * t.element_size() for t in once)
