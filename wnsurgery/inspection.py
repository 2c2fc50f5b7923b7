"""What weight norm there is in a module, a checkpoint or an ONNX file, with the numbers of every g and ||v||."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wnsurgery.errors import InputError, printable
from wnsurgery.norms import norm
from wnsurgery.plan import Skipped, plan_weight_norm
from wnsurgery.reparam import Axes, Magnitude
from wnsurgery.text import by, columns
from wnsurgery.walk import slots

__all__ = ["Inspection", "WeightFacts", "inspect"]


@dataclass(frozen=True)
class WeightFacts:
    """One weight-normalized weight.

    `magnitude` and `norm` are (min, median, max) of g and of ||v|| over its rows, None where there are no values;
    `form` says how it is stored: "ours", "torch" or "legacy" in a module, "parametrized" or "legacy" in a file, "graph"
    in an ONNX file, where `also` names the direction's initializer.
    """

    name: str
    form: str
    shape: tuple[int, ...]
    kept: tuple[int, ...]
    groups: int
    dtype: str
    magnitude: tuple[float, float, float] | None
    norm: tuple[float, float, float] | None
    zero_rows: int
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """Weight-normalized weights, and each other tensor of 2 or more dimensions with the reason; prints as a table."""

    weights: tuple[WeightFacts, ...]
    others: tuple[Skipped, ...]

    def __str__(self) -> str:
        head = f"{len(self.weights)} weights under weight norm"
        rows: list[tuple[str, ...]] = [
            ("weight", "form", "shape", "kept", "g min/median/max", "||v|| min/median/max", "note")
        ]
        rows += [_row(w) for w in self.weights]
        lines = [head, *(columns(rows) if self.weights else [])]
        if self.others:
            lines += ["", f"{len(self.others)} other tensors of 2 or more dimensions"]
            table = [(printable(s.name), by(s.shape), printable(s.reason)) for s in self.others]
            lines += columns([("tensor", "shape", "why"), *table])
        return "\n".join(lines)


def inspect(
    target: nn.Module | str | os.PathLike[str],
    *,
    arch: str | None = None,
    trust_pickle: bool = False,
    magnitude: Magnitude = "linear",
) -> Inspection:
    """List the weight norm in a live module, a checkpoint, a whole-module file or an ONNX file.

    >>> model = apply_weight_norm(nn.Sequential(nn.Linear(3, 2)))
    >>> [(w.name, w.form, w.kept) for w in inspect(model).weights]
    [('0.weight', 'ours', (0,))]

    Args:
        target: the module, or a path; state dicts need no model code.
        arch: "package.module:factory" to build the model a state dict belongs to, for layer types and reasons.
        trust_pickle: let code in the file run while it is loaded.
        magnitude: "log" when pairs store the logarithm of g without saying so, as our own do.

    Raises InputError, UnsafeFileError as the readers do.
    """
    if isinstance(target, nn.Module):
        return _of_module(target)
    path = Path(target)
    if path.suffix.lower() == ".onnx":
        return _of_graph(path)
    from wnsurgery.files import load_model, load_object
    from wnsurgery.stores import map_store

    content: Any
    if path.is_dir():
        return _of_directory(path, magnitude)
    if arch:
        content = load_model(path, arch=arch, trust_pickle=trust_pickle, magnitude=magnitude)
    else:
        stored = None if trust_pickle else map_store(path)
        if stored is not None and stored.source is not None:
            try:
                return _of_checkpoint(stored.content, path, magnitude, stored.source.fetch)
            finally:
                stored.source.close()
        content = load_object(path, trust_pickle=trust_pickle)
    return _of_module(content) if isinstance(content, nn.Module) else _of_checkpoint(content, path, magnitude)


def _of_module(model: nn.Module) -> Inspection:
    facts = list[WeightFacts]()
    seen = dict[tuple[int, int], int]()
    for slot in slots(model):
        if slot.form not in ("ours", "torch", "legacy") or slot.tensor is None or slot.magnitude is None:
            continue
        key = (id(slot.magnitude), id(slot.tensor))
        if key in seen:
            first = facts[seen[key]]
            facts[seen[key]] = WeightFacts(**{**first.__dict__, "also": (*first.also, *slot.names)})
            continue
        seen[key] = len(facts)
        entry: Any = getattr(slot.module, "parametrizations", {})
        rule = entry[slot.parameter][0] if slot.form == "ours" else None
        axes = rule.axes if rule else Axes.of_pair(slot.magnitude.shape, slot.tensor.shape)
        g = slot.magnitude.detach()
        g = g.exp() if rule and rule.magnitude == "log" else g
        facts.append(_facts(slot.fqn, slot.form, g, slot.tensor.detach(), axes, slot.names[1:]))
    names = {f.name for f in facts} | {n for f in facts for n in f.also}
    try:
        skipped = plan_weight_norm(model).skipped
        sites = [Skipped(s.fqn, tuple(s.weight.shape), "plain") for s in plan_weight_norm(model).sites]
    except ValueError:  # nothing to convert in this model is no error here
        skipped, sites = (), [Skipped(s.fqn, s.shape, "plain") for s in slots(model) if s.shape]
    others = [s for s in (*sites, *skipped) if (s.shape is None or len(s.shape) > 1) and s.name not in names]
    return Inspection(tuple(facts), tuple(others))


def _of_checkpoint(
    content: Any, path: Path, magnitude: Magnitude, fetch: Callable[[Tensor], Tensor] = Tensor.detach
) -> Inspection:
    from wnsurgery.checkpoint import plan_fold, state_dicts

    facts: list[WeightFacts] = []
    others: list[Skipped] = []
    found = state_dicts(content)
    if not found:
        raise InputError.of(path, "holds no tensors under names")
    for state in found:
        tensors = state.tensors
        steps, skips = plan_fold(state)
        reasons = {skip.name: skip.reason for skip in skips}
        for step in steps:
            g, v = (fetch(tensors[key]).detach() for key in step.sources[:2])
            g = g.double().exp() if step.log or magnitude == "log" else g
            form = "legacy" if step.sources[0].endswith("_g") else "parametrized"
            facts.append(_facts(step.name, form, g, v, step.axes))
        used = {key for step in steps for key in step.sources}
        for key, tensor in tensors.items():
            name = state.full(key)
            if key not in used and tensor.ndim > 1:
                others.append(Skipped(name, tuple(tensor.shape), reasons.get(name, "plain")))
    return Inspection(tuple(facts), tuple(others))


def _of_directory(path: Path, magnitude: Magnitude) -> Inspection:
    from wnsurgery.directory import map_directory

    folder = map_directory(path)
    try:
        return _of_checkpoint(folder.stored.content, path, magnitude, folder.source.fetch)
    finally:
        folder.source.close()


def _of_graph(path: Path) -> Inspection:
    from wnsurgery.graph import find_weight_norms

    found = find_weight_norms(path)
    facts = (WeightFacts(f.value, "graph", f.shape, (), 1, f.dtype, None, None, 0, (f.v,)) for f in found)
    return Inspection(tuple(facts), ())


def _facts(name: str, form: str, g: Tensor, v: Tensor, axes: Axes, also: tuple[str, ...] = ()) -> WeightFacts:
    kind = str(v.dtype).removeprefix("torch.")
    if v.is_meta:
        return WeightFacts(name, form, tuple(v.shape), axes.kept, axes.groups, kind, None, None, 0, also)
    norms = norm(axes.grouped(v), axes.reduced(v.ndim), blocked=True)
    zero = int((norms == 0).sum())
    return WeightFacts(name, form, tuple(v.shape), axes.kept, axes.groups, kind, _spread(g), _spread(norms), zero, also)


def _spread(values: Tensor) -> tuple[float, float, float] | None:
    flat = values.detach().double().flatten()
    if not flat.numel():
        return None
    return flat.min().item(), torch.median(flat).item(), flat.max().item()


def _row(w: WeightFacts) -> tuple[str, ...]:
    kept = ",".join(map(str, w.kept)) or "none"
    kept += f" in {w.groups} groups" if w.groups > 1 else ""
    notes = [f"= {printable(n)}" for n in w.also] + ([f"{w.zero_rows} rows with v = 0"] if w.zero_rows else [])
    return (printable(w.name), w.form, by(w.shape), kept, _three(w.magnitude), _three(w.norm), "; ".join(notes))


def _three(values: tuple[float, float, float] | None) -> str:
    return "-" if values is None else " / ".join(f"{v:.4g}" for v in values)
