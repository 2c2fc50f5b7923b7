"""What is to be done to the weights of one state dict: planned from names, shapes and types, then run one by one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from wnsurgery.choice import Choice
from wnsurgery.dtensors import count_not_finite, is_spread
from wnsurgery.errors import NonFiniteWeightError, PairError, printable
from wnsurgery.kept import Rooms
from wnsurgery.keys import Layout, Pair, pair_of
from wnsurgery.reparam import Axes, Magnitude, compose_into, decompose
from wnsurgery.states import StateDict, dtype_name, found_in, refusal, shape_of

__all__ = [
    "Action",
    "Skip",
    "Step",
    "ZeroNorm",
    "pair_step",
    "plan_convert",
    "plan_fold",
    "rows_without_direction",
    "run_step",
]

Action = Literal["folded", "converted", "rekeyed"]
ZeroNorm = Literal["error", "zero", "nan"]


@dataclass(frozen=True)
class Step:
    """One weight to fold, convert or re-key.

    Attributes:
        action: "folded", "converted" or "rekeyed".
        name: the plain weight's name with its path in the file.
        sources, targets: keys in its state dict that go and that come, magnitude before direction; of a module saved
            whole, in what its `state_dict()` gives.
        axes: the kept axes.
        shape, dtype: of the weight.
        log: whether the pair says, or is to say, that it stores the logarithm of g.
        path: of its state dict in the file.
    """

    action: Action
    name: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    axes: Axes
    shape: tuple[int, ...]
    dtype: str
    log: bool = False
    path: str = ""

    @property
    def kept(self) -> str:
        """The kept axes in words: "kept 0", "kept none", "kept 1 in 2 groups"."""
        kept = ",".join(map(str, self.axes.kept)) or "none"
        return f"kept {kept} in {self.axes.groups} groups" if self.axes.groups > 1 else f"kept {kept}"

    @property
    def made(self) -> tuple[str, ...]:
        """The targets with the path of their state dict."""
        return tuple(self.full(key) for key in self.targets)

    def full(self, key: str) -> str:
        """A key with the path of its state dict."""
        return f"{self.path}.{key}" if self.path else key


@dataclass(frozen=True)
class Skip:
    """One tensor left alone, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


def run_step(
    step: Step,
    tensors: Sequence[Tensor],
    magnitude: Magnitude = "linear",
    zero_norm: ZeroNorm = "zero",
    notes: list[str] | None = None,
    rooms: Rooms | None = None,
) -> tuple[Tensor, ...]:
    """Carry out one step on the tensors of its sources; returns the tensors of its targets.

    Args:
        step: the plan.
        tensors: in the order of `step.sources`.
        magnitude: how g is stored in pairs that do not say.
        zero_norm: what a row with v = 0 and g != 0 folds to; it has no direction. "error", "zero" or "nan".
        notes: where to append what the user should know about the values.
        rooms: memory for folded weights, where they are done with one after the other.

    Raises NonFiniteWeightError or PairError, naming the weight.
    """
    mark = (torch.ones((), dtype=torch.bool),) if step.log else ()
    if step.action == "rekeyed":
        return (*tensors[:2], *mark)
    if len({t.is_meta for t in tensors[:2]}) > 1:
        raise PairError(f"{printable(step.name)}: one half of its pair is a meta tensor, which has no values")
    made: tuple[Tensor, ...]
    try:
        with torch.no_grad():
            if step.action == "folded":
                made, mark = (_folded_weight(step, tensors, magnitude, zero_norm, notes, rooms),), ()
            else:
                made = decompose(tensors[0].detach(), step.axes, magnitude=magnitude)
    except (NonFiniteWeightError, PairError) as error:
        raise type(error)(f"{printable(step.name)}: {error.message}", hint=error.hint) from error
    if not isinstance(tensors[min(1, len(tensors) - 1)], nn.Parameter):
        return (*made, *mark)
    trained = any(t.requires_grad for t in tensors)
    return (*(nn.Parameter(t, requires_grad=trained) for t in made), *mark)


def _folded_weight(
    step: Step,
    tensors: Sequence[Tensor],
    magnitude: Magnitude,
    zero_norm: ZeroNorm,
    notes: list[str] | None,
    rooms: Rooms | None,
) -> Tensor:
    g, v = (t.detach() for t in tensors[:2])
    stored: Magnitude = "log" if step.log else magnitude
    lost = rows_without_direction(g, v, step.axes, stored)
    if lost is not None:
        count = f"{int(lost.sum())} of {lost.numel()} rows have v = 0 and g != 0"
        if zero_norm == "error":
            raise PairError(
                f"{count}, so no direction to fold along",
                hint="zero_norm='zero' or 'nan' (--zero-norm) says what to write",
            )
        if notes is not None:
            notes.append(f"{printable(step.name)}: {count}; folded to {zero_norm}")
    w = compose_into(rooms, g, v, step.axes, stored)
    if lost is not None and zero_norm == "nan":
        set_rows_nan(w, lost, step.axes)
    if notes is not None and not _is_finite(w):
        notes.append(f"{printable(step.name)}: holds NaN or infinity")
    return w


def rows_without_direction(g: Tensor, v: Tensor, axes: Axes, magnitude: Magnitude = "linear") -> Tensor | None:
    """The rows with v = 0 and g != 0 as a mask, one value per row; None where there are none.

    >>> rows_without_direction(torch.ones(2, 1), torch.tensor([[1.0], [0.0]]), Axes((0,))).flatten().tolist()
    [False, True]
    """
    if v.is_meta or not v.numel() or is_spread(v):  # rows of a DTensor without direction fold to zeros
        return None
    view, dims = axes.grouped(v), axes.reduced(v.ndim)
    first = view
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    if not bool((first == 0).any()):  # nearly always: one element per row tells
        return None
    peak = torch.linalg.vector_norm(view, float("inf"), dims, keepdim=True) if dims else view
    rows = g.unsqueeze(1) if axes.groups > 1 else g.reshape(peak.shape)
    lost = (peak == 0) & ((rows.double().exp() if magnitude == "log" else rows) != 0)
    return lost if bool(lost.any()) else None


def set_rows_nan(weight: Tensor, rows: Tensor, axes: Axes) -> None:
    """Fill the rows of a mask that `rows_without_direction` gave with NaN, in place."""
    weight.masked_fill_(axes.spread(rows.squeeze(1) if axes.groups > 1 else rows, weight), float("nan"))


def _is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; one pass, no copy."""
    if is_spread(tensor):
        return not count_not_finite(tensor)
    return not tensor.numel() or all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor.detach()))


def plan_fold(state: StateDict) -> tuple[list[Step], list[Skip]]:
    """The steps that fold every pair of one state dict, and the look-alikes left alone.

    Looks at names, shapes and types only. Raises PairError for pairs that are broken.
    """
    tensors = state.tensors
    found = found_in(state)
    steps = [pair_step("folded", state, p, (p.plain_key,)) for p in found.pairs]
    _refuse_collisions(state, steps)
    return steps, [Skip(state.full(k), shape_of(tensors[k]), reason) for k, reason in found.left]


def plan_convert(
    state: StateDict, choose: Choice, layout: Layout, magnitude: Magnitude = "linear"
) -> tuple[list[Step], list[Skip]]:
    """The steps that bring the chosen weights of one state dict under weight norm in the given layout.

    Pairs already there are re-keyed. Every other tensor of 2 or more dimensions is skipped with a reason.
    """
    tensors, steps, skipped = state.tensors, list[Step](), list[Skip]()
    found = found_in(state)
    halves = {key: pair for pair in found.pairs for key in pair.keys}
    left, log = dict(found.left), magnitude == "log"
    for key, tensor in tensors.items():
        shape = shape_of(tensor)
        pair = halves.get(key)
        if pair is not None:
            if key == pair.v_key:
                _convert_pair(state, pair, pair.named(layout, log=pair.log or log), choose, steps, skipped)
        elif key in left:
            skipped.append(Skip(state.full(key), shape, left[key]))
        elif tensor.ndim >= 2:
            verdict = refusal(tensor) or choose.verdict(state, key, tensor)
            if isinstance(verdict, Axes):
                axes = verdict.check(shape)
                verdict = axes.fault(shape) or axes
            if isinstance(verdict, str):
                skipped.append(Skip(state.full(key), shape, verdict))
            else:
                keys, kind = pair_of(key, layout, log=log).keys, dtype_name(tensor)
                steps.append(Step("converted", state.full(key), (key,), keys, verdict, shape, kind, log, state.path))
    _refuse_collisions(state, steps)
    return steps, skipped


def _convert_pair(
    state: StateDict, pair: Pair, target: Pair, choose: Choice, steps: list[Step], skipped: list[Skip]
) -> None:
    shape, name = shape_of(state.entries[pair.v_key]), state.full(pair.plain_key)
    if pair.layout == target.layout:
        skipped.append(Skip(name, shape, f"already under weight norm ({pair.layout})"))
    elif not choose.wants(state, pair.plain_key):
        skipped.append(Skip(name, shape, f"under weight norm ({pair.layout}), not selected"))
    else:
        steps.append(pair_step("rekeyed", state, pair, target.keys, log=target.log))


def pair_step(
    action: Action, state: StateDict, pair: Pair, targets: tuple[str, ...], *, log: bool | None = None
) -> Step:
    g, v = state.entries[pair.g_key], state.entries[pair.v_key]
    name = state.full(pair.plain_key)
    if action == "folded":
        reason = refusal(v) or refusal(g)
        if reason:
            raise PairError(f"{printable(name)}: its pair cannot be folded ({reason})")
    axes = Axes.of_pair(shape_of(g), shape_of(v))
    marked = pair.log if log is None else log
    return Step(action, name, pair.keys, targets, axes, shape_of(v), dtype_name(v), marked, state.path)


def _refuse_collisions(state: StateDict, steps: Iterable[Step]) -> None:
    made: dict[str, Step] = {}
    for step in steps:
        for key in step.targets:
            if (key in state.entries and key not in step.sources) or made.setdefault(key, step) is not step:
                raise PairError(f"{printable(state.full(key))}: would be overwritten by {printable(step.sources[0])}")
