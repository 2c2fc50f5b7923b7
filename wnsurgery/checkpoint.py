"""Fold, convert and re-key the state dicts in a loaded checkpoint, without the model's code.

A checkpoint is whatever torch.save was given: state dicts at any depth among epoch numbers, optimizer states and
hyperparameters. Each state dict is planned from names, shapes and types alone (so a reader that streams can plan
before it reads), then changed step by step; everything else stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from wnsurgery.choice import ByModel, ByName, Choice, DimOption, with_ties
from wnsurgery.errors import PairError, SelectionError, printable
from wnsurgery.keys import Layout, Pair
from wnsurgery.optimizer_state import Parameters, without_states
from wnsurgery.proof import Proof, ulps_apart
from wnsurgery.reparam import Axes, Magnitude
from wnsurgery.states import (
    StateDict,
    dicts,
    dtype_name,
    flat_tensors,
    found_in,
    identity,
    is_optimizer,
    refusal,
    shape_of,
    state_dicts,
)
from wnsurgery.steps import Action, Skip, Step, ZeroNorm, pair_step, plan_convert, plan_fold, run_step
from wnsurgery.text import by, columns

__all__ = [
    "ByModel",
    "ByName",
    "CheckpointReport",
    "Choice",
    "DimOption",
    "Maker",
    "Skip",
    "StateDict",
    "Step",
    "convert_chosen",
    "convert_state",
    "flat_tensors",
    "fold_state",
    "fold_with",
    "known_magnitude",
    "plain_keys",
    "plan_convert",
    "plan_fold",
    "run_step",
    "state_dicts",
    "translate",
]


@dataclass(frozen=True)
class CheckpointReport:
    """What was done to a checkpoint; prints as a table.

    Attributes:
        steps: the weights changed.
        skipped: tensors left alone that a reader might have expected to change, each with its reason.
        assumptions: what had to be assumed because the model's code is not there.
        warnings: what the user should look at (values not finite, optimizer states that no longer fit).
        initialisation: the report of data-dependent initialisation, where there was one.
        proof: sizes, time and the distance from an independent recomputation; for file operations.
        batch_norm: what became of each BatchNorm, where it was asked for.
    """

    steps: tuple[Step, ...] = ()
    skipped: tuple[Skip, ...] = ()
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    initialisation: Any = None
    proof: Proof | None = field(default=None, compare=False)
    batch_norm: Any = None

    def named(self, action: Action) -> tuple[Step, ...]:
        """The steps of one kind."""
        return tuple(step for step in self.steps if step.action == action)

    @property
    def folded(self) -> tuple[Step, ...]:
        return self.named("folded")

    @property
    def converted(self) -> tuple[Step, ...]:
        return self.named("converted")

    @property
    def rekeyed(self) -> tuple[Step, ...]:
        return self.named("rekeyed")

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        table = asdict(self)
        if self.proof is not None:
            table["proof"]["megabytes_per_second"] = self.proof.rate
        return table

    def __str__(self) -> str:
        return _table(self)


# Whole checkpoints ---------------------------------------------------------------------------------------


def fold_state(content: Any, *, magnitude: Magnitude = "linear") -> CheckpointReport:
    """Fold every (g, v) in the state dicts of a loaded checkpoint, in place.

    The plain weight stands where the pair stood. Ties stay ties: one folded tensor for all names of a pair.
    Either every pair is folded or, on an error, none. A checkpoint without pairs stays as it is.

    >>> sd = {"generator": {"c.weight_g": torch.full((1, 1), 10.0), "c.weight_v": torch.tensor([[3.0, 4.0]])}}
    >>> wn.fold_state(sd).folded[0].name, sd
    ('generator.c.weight', {'generator': {'c.weight': tensor([[6., 8.]])}})

    Args:
        content: what `torch.load` returned: a state dict, or any nesting of dicts and lists around some.
        magnitude: "log" when g is stored as its logarithm.

    A row with v = 0 folds to zeros.

    Raises PairError, naming the key, for broken pairs, and SelectionError for a magnitude that is none.
    """
    return fold_with(AtOnce(known_magnitude(magnitude)), content)


def fold_with(maker: Maker, content: Any) -> CheckpointReport:
    """`fold_state` with tensors that somebody else makes."""
    return _carry_out(content, plan_fold, maker, ())


def convert_state(
    content: Any,
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    dim: DimOption | Mapping[str, DimOption] = "auto",
    layout: Layout = "parametrized",
    magnitude: Magnitude = "linear",
) -> CheckpointReport:
    """Bring the chosen weights of a loaded checkpoint under weight norm, in place; re-key pairs already there.

    >>> sd = {"fc.weight": torch.tensor([[3.0, 4.0]]), "fc.bias": torch.zeros(1)}
    >>> report = wn.convert_state(sd, layout="legacy")
    >>> list(sd), report.converted[0].axes.kept
    (['fc.weight_g', 'fc.weight_v', 'fc.bias'], (0,))

    Args:
        content: what `torch.load` returned.
        include, exclude: globs on key names or on any dotted beginning of them ("decoder" takes everything under it),
            `re:` before a regular expression, or sequences of these. Without `include`: the names torch's layers use,
            lookup tables left out.
        dim: kept axis or axes: "auto" (axis 0), an int, a tuple, None (one magnitude per tensor), or a mapping from
            patterns to these; the first pattern that matches decides.
        layout: how to name the halves, "parametrized" (torch's present) or "legacy" (`weight_g`, `weight_v`).
        magnitude: "log" stores the logarithm of g, and says that pairs already there do.

    Raises:
        SelectionError: a pattern matches nothing, or an option makes no sense.
        NonFiniteWeightError: a weight to convert holds NaN or infinity; named.
        PairError: broken pairs; named.
    """
    return convert_chosen(content, ByName(include, exclude, dim), layout=layout, magnitude=magnitude)


def convert_chosen(
    content: Any, choose: Choice, *, layout: Layout, magnitude: Magnitude, maker: Maker | None = None
) -> CheckpointReport:
    """`convert_state` with any choice of weights, and tensors that somebody else makes."""
    if layout not in ("parametrized", "legacy"):
        raise SelectionError(f'layout must be "parametrized" or "legacy", not {layout!r}')
    if isinstance(choose, ByName):
        choose.check(state_dicts(content))
    plan = with_ties(choose)
    known = known_magnitude(magnitude)
    return _carry_out(
        content, lambda s: plan_convert(s, plan, layout, known), maker or AtOnce(known), choose.assumptions
    )


def known_magnitude(magnitude: str) -> Magnitude:
    """A way to store g, if it is one; SelectionError if not."""
    if magnitude not in ("linear", "log"):
        raise SelectionError(f'magnitude must be "linear" or "log", not {magnitude!r}')
    return magnitude  # type: ignore[return-value]


Planner = Callable[[StateDict], tuple[list[Step], list[Skip]]]


class Maker(Protocol):
    """Makes the tensors of a step: at once, or as promises that are kept when they are written."""

    notes: list[str]

    def make(self, step: Step, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors of the step's targets."""


class AtOnce:
    """Runs every step when it is asked for, and compares each result with the float64 recomputation."""

    def __init__(self, magnitude: Magnitude = "linear", zero_norm: ZeroNorm = "zero", *, judge: bool = False) -> None:
        self.magnitude, self.zero_norm, self.judge = magnitude, zero_norm, judge
        self.notes: list[str] = []
        self.max_ulp: float | None = None
        self.worst = ""

    def make(self, step: Step, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
        made = run_step(step, sources, self.magnitude, self.zero_norm, self.notes)
        if self.judge and step.action != "rekeyed":
            self.measure(step, sources, made)
        return made

    def measure(self, step: Step, sources: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Note how far the plain weight of a step is from its pair, recomputed."""
        (w, (g, v)) = (made[0], sources[:2]) if step.action == "folded" else (sources[0], made[:2])
        if w.is_meta or v.is_meta:
            return
        ulps = ulps_apart(w, g, v, step.axes, log=step.log or self.magnitude == "log")
        if self.max_ulp is None or ulps > self.max_ulp:
            self.max_ulp, self.worst = ulps, step.name


def _carry_out(content: Any, plan: Planner, maker: Maker, assumptions: tuple[str, ...]) -> CheckpointReport:
    """Plan all state dicts, make all new tensors, then change the dicts: all or nothing."""
    states = state_dicts(content)
    plans = [plan(state) for state in states]
    known: dict[Any, tuple[Tensor, ...]] = {}
    renewed = [_renewed(s, steps, maker, known) for s, (steps, _) in zip(states, plans, strict=True)]
    before = [_parameters(state, steps) for state, (steps, _) in zip(states, plans, strict=True)]
    optimizers = [(path, item, without_states(item, before)) for path, item in dicts(content) if is_optimizer(item)]
    changed = any(p.gone for p in before)
    told = []
    for path, item, fewer in optimizers if changed else ():
        if fewer is not None:
            item.clear()
            item.update(fewer[0])
            told.append(f"optimizer {printable(path or 'state')}: {fewer[1]}")
    for state, entries in zip(states, renewed, strict=True):
        state.entries.clear()
        state.entries.update(entries)
    steps = tuple(step for steps, _ in plans for step in steps)
    converted = any(step.action == "converted" for step in steps)
    skipped = tuple(skip for _, skips in plans for skip in skips)
    return CheckpointReport(steps, skipped, assumptions if converted else (), (*maker.notes, *told))


def _parameters(state: StateDict, steps: list[Step]) -> Parameters:
    """The parameters of a state dict before its steps, ties once, and which of them are replaced."""
    firsts: dict[Any, str] = {}
    for key, tensor in state.tensors.items():
        firsts.setdefault(identity(tensor), key)
    gone = {key for step in steps if step.action != "rekeyed" for key in step.sources}
    pairs = [pair.keys[:2] for pair in found_in(state).pairs]
    return Parameters({k: state.entries[k] for k in firsts.values()}, frozenset(gone), state.path, pairs)


def _renewed(state: StateDict, steps: list[Step], maker: Maker, known: dict[Any, tuple[Tensor, ...]]) -> dict[Any, Any]:
    """The entries of a state dict after its steps, each new tensor where the first of its sources stood."""
    by_source = {key: step for step in steps for key in step.sources}
    entries: dict[Any, Any] = {}
    for key, value in state.entries.items():
        step = by_source.get(key) if isinstance(key, str) else None
        if step is None:
            entries[key] = value
        elif step.targets[0] not in entries:
            sources = [state.entries[k] for k in step.sources]
            same = (step.axes, *(identity(t) for t in sources))
            if same not in known:
                known[same] = maker.make(step, sources)
            entries.update(zip(step.targets, known[same], strict=True))
    return entries


# Into a model --------------------------------------------------------------------------------------------


def plain_keys(state: StateDict) -> tuple[str, ...]:
    """The keys a state dict would have with every pair folded."""
    pairs = {pair.g_key: pair.plain_key for pair in found_in(state).pairs}
    halves = {key for pair in found_in(state).pairs for key in pair.keys[1:]}
    return tuple(pairs.get(key, key) for key in state.tensors if key not in halves)


def translate(
    state: StateDict,
    template: StateDict,
    *,
    magnitude: Magnitude = "linear",
    wanted: Mapping[str, Magnitude] | None = None,
) -> dict[str, Tensor]:
    """The tensors of one state dict in the layout of another: pairs folded, made or re-keyed as it has them.

    >>> old = StateDict("", {"weight_g": torch.full((1, 1), 5.0), "weight_v": torch.tensor([[3.0, 4.0]])})
    >>> translate(old, StateDict("", {"weight": torch.zeros(1, 2)}))
    {'weight': tensor([[3., 4.]])}

    Args:
        magnitude: how `state` stores g in pairs that do not say.
        wanted: how `template` stores g, by plain key; default: as its own keys say.

    A pair whose g is stored in the same way along the same axes is copied, bit for bit; any other is folded and split
    again as the template has it. Keys the template does not know pass unchanged, so that a strict load can name them.
    Raises PairError for a weight that does not fit its pair in the template.
    """
    targets = {pair.plain_key: pair for pair in found_in(template).pairs}
    halves = {key: pair for pair in found_in(state).pairs for key in pair.keys}
    out: dict[str, Tensor] = {}
    for key, tensor in state.tensors.items():
        pair = halves.get(key)
        if pair is not None and key != pair.v_key:
            continue
        target = targets.get(pair.plain_key if pair else key)
        stored: Magnitude = "log" if pair and pair.log else magnitude
        if target is None:
            name, plain = _folded(state, pair, magnitude) if pair else (key, tensor)
            out[name] = plain
            continue
        asked = (wanted or {}).get(target.plain_key, "log" if target.log else stored)
        halves_of = _halves_like(template, target, state, pair) if pair and asked == stored else None
        if halves_of is None:
            plain = _folded(state, pair, magnitude)[1] if pair else tensor
            halves_of = _split_like(template, target, plain, asked)
        out.update(zip(target.keys, (*halves_of, torch.ones((), dtype=torch.bool)), strict=False))
    return out


def _folded(state: StateDict, pair: Pair, magnitude: Magnitude) -> tuple[str, Tensor]:
    step = pair_step("folded", state, pair, (pair.plain_key,))
    return pair.plain_key, run_step(step, [state.entries[key] for key in pair.keys], magnitude)[0]


def _halves_like(template: StateDict, target: Pair, state: StateDict, pair: Pair) -> tuple[Tensor, Tensor] | None:
    """A pair as it is, g in the shape that a pair of the template has; None where the two keep other axes.

    Of directions that differ in shape, nothing is said here: a strict load names them.
    """
    (g, v), shape = (state.entries[key] for key in pair.keys[:2]), shape_of(template.entries[target.v_key])
    if shape_of(v) != shape:
        return g, v
    as_wanted = shape_of(template.entries[target.g_key])
    if shape_of(g) == as_wanted:
        return g, v
    same = Axes.of_pair(shape_of(g), shape) == Axes.of_pair(as_wanted, shape)
    return (g.detach().reshape(as_wanted), v) if same else None


def _split_like(template: StateDict, target: Pair, plain: Tensor, magnitude: Magnitude) -> tuple[Tensor, Tensor]:
    """A plain weight as (g, v) with the axes, and the shape of g, that a pair of the template has."""
    shape = shape_of(template.entries[target.v_key])
    if shape_of(plain) != shape or refusal(plain):
        raise PairError(f"{printable(target.plain_key)}: {shape_of(plain)} where the model has {shape}")
    as_wanted = shape_of(template.entries[target.g_key])
    axes = Axes.of_pair(as_wanted, shape)
    keys = (target.g_key, target.v_key)
    step = Step("converted", target.plain_key, (target.plain_key,), keys, axes, shape, dtype_name(plain))
    g, v = run_step(step, (plain,), magnitude)
    return g.reshape(as_wanted), v  # a single magnitude is (1, 1) as well as 0-d


# How it reads --------------------------------------------------------------------------------------------


def _table(report: CheckpointReport) -> str:
    counts = ", ".join(f"{len(report.named(a))} {a}" for a in ("folded", "converted", "rekeyed") if report.named(a))
    lines = [counts or "0 weights changed"]
    rows = [(s.action, printable(s.name), by(s.shape), s.kept.removeprefix("kept "), s.dtype) for s in report.steps]
    lines += columns([("", "weight", "shape", "kept", "type"), *rows]) if rows else []
    if report.skipped:
        lines += ["", f"{len(report.skipped)} left alone"]
        lines += columns(
            [("tensor", "shape", "reason"), *((printable(s.name), by(s.shape), s.reason) for s in report.skipped)]
        )
    lines += [f"assumed: {text}" for text in report.assumptions]
    lines += [f"warning: {text}" for text in report.warnings]
    lines += ["", str(report.batch_norm)] if report.batch_norm is not None else []
    lines += ["", str(report.initialisation)] if report.initialisation is not None else []
    lines += ["", *columns(_figures(report, report.proof))] if report.proof is not None else []
    return "\n".join(lines)


def _figures(report: CheckpointReport, proof: Proof) -> list[tuple[str, ...]]:
    done = ", ".join(f"{len(report.named(a))} {a}" for a in ("folded", "converted", "rekeyed"))
    rows: list[tuple[str, ...]] = [("pairs found", f"{proof.pairs}"), ("done", done), ("pairs left", f"{proof.left}")]
    rows += [("kept axes", f"{axes.removeprefix('kept ')}: {count}") for axes, count in proof.axes]
    if proof.max_ulp is not None:
        rows.append(("max ulp against float64", f"{proof.max_ulp:.3g} in {printable(proof.worst)}"))
    if proof.output:
        rows.append(("output", printable(proof.output)))
    out = f"{proof.bytes_out:,} bytes out" if proof.bytes_out else "nothing written"
    rows.append(("size", f"{proof.bytes_in:,} bytes in, {out}"))
    rows.append(("time", f"{proof.seconds:.2f} s, {proof.rate:.0f} MB/s"))
    return rows
