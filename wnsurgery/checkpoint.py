"""Fold, convert and re-key the state dicts in a loaded checkpoint, without the model's code.

A checkpoint is whatever torch.save was given: state dicts at any depth among epoch numbers, optimizer states and
hyperparameters. Each state dict is planned from names, shapes and types alone (so a reader that streams can plan
before it reads), then changed step by step; everything else stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wnsurgery.errors import InputError, NonFiniteWeightError, PairError, SelectionError, printable
from wnsurgery.keys import Found, Layout, Pair, find_pairs, is_lookup_name, is_weight_name, pair_of
from wnsurgery.reparam import Axes, Magnitude, compose, decompose

__all__ = [
    "ByModel",
    "ByName",
    "CheckpointReport",
    "Choice",
    "Skip",
    "StateDict",
    "Step",
    "convert_state",
    "flat_tensors",
    "fold_state",
    "plain_keys",
    "plan_convert",
    "plan_fold",
    "run_step",
    "state_dicts",
    "translate",
]

Action = Literal["folded", "converted", "rekeyed"]
DimOption = str | int | tuple[int, ...] | None

_MAX_DEPTH = 64
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# What is in a checkpoint ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateDict:
    """One dict of tensors in a checkpoint, and the dotted path that leads to it ("" at the top)."""

    path: str
    entries: dict[Any, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors with string keys, in order."""
        return {k: v for k, v in self.entries.items() if isinstance(k, str) and isinstance(v, Tensor)}

    def full(self, key: str) -> str:
        """A key with its path."""
        return f"{self.path}.{key}" if self.path else key


def state_dicts(content: Any) -> list[StateDict]:
    """Every state dict in a loaded checkpoint: dicts that hold tensors under string keys, optimizers left out.

    >>> [s.path for s in state_dicts({"epoch": 3, "ema": {"w": torch.ones(2)}, "nets": [{"w": torch.ones(2)}]})]
    ['ema', 'nets.0']

    Raises InputError for containers nested without end.
    """
    found = (StateDict(path, item) for path, item in _dicts(content) if not _is_optimizer(item))
    return [state for state in found if state.tensors]


def flat_tensors(content: Any) -> dict[str, Tensor]:
    """Every tensor of the state dicts in a checkpoint, under its dotted name.

    >>> list(flat_tensors({"generator": {"conv.weight": torch.ones(2, 2)}, "step": 7}))
    ['generator.conv.weight']
    """
    return {state.full(key): tensor for state in state_dicts(content) for key, tensor in state.tensors.items()}


def _dicts(content: Any) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Each dict once, in order, with its path; the inside of an optimizer's state is not entered."""
    seen: set[int] = set()

    def visit(item: Any, path: str, depth: int) -> Iterator[tuple[str, dict[Any, Any]]]:
        if not isinstance(item, dict | list | tuple) or id(item) in seen:
            return
        if depth > _MAX_DEPTH:
            raise InputError(f"{printable(path, 60)}: containers nested deeper than {_MAX_DEPTH} levels")
        seen.add(id(item))
        if isinstance(item, dict):
            yield path, item
            if _is_optimizer(item):
                return
        for key, value in item.items() if isinstance(item, dict) else enumerate(item):
            yield from visit(value, f"{path}.{key}" if path else str(key), depth + 1)

    yield from visit(content, "", 0)


def _is_optimizer(item: dict[Any, Any]) -> bool:
    return "param_groups" in item and "state" in item


# What is done --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One weight to fold, convert or re-key.

    Attributes:
        action: "folded", "converted" or "rekeyed".
        name: the plain weight's name with its path in the file.
        sources, targets: keys in its state dict that go and that come, magnitude before direction.
        axes: the kept axes.
        shape, dtype: of the weight.
        log: whether the pair says, or is to say, that it stores the logarithm of g.
    """

    action: Action
    name: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    axes: Axes
    shape: tuple[int, ...]
    dtype: str
    log: bool = False


@dataclass(frozen=True)
class Skip:
    """One tensor left alone, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class CheckpointReport:
    """What was done to a checkpoint; prints as a table.

    Attributes:
        steps: the weights changed.
        skipped: tensors left alone that a reader might have expected to change, each with its reason.
        assumptions: what had to be assumed because the model's code is not there.
        warnings: what the user should look at (values not finite, optimizer states that no longer fit).
        initialisation: the report of data-dependent initialisation, where there was one.
        batch_norm: what became of each BatchNorm, where it was asked for.
    """

    steps: tuple[Step, ...] = ()
    skipped: tuple[Skip, ...] = ()
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    initialisation: Any = None
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
        return asdict(self)

    def __str__(self) -> str:
        return _table(self)


def run_step(step: Step, tensors: Sequence[Tensor], magnitude: Magnitude = "linear") -> tuple[Tensor, ...]:
    """Carry out one step on the tensors of its sources; returns the tensors of its targets.

    `magnitude` is how g is stored in pairs that do not say.

    Raises NonFiniteWeightError or PairError, naming the weight.
    """
    mark = (torch.ones((), dtype=torch.bool),) if step.log else ()
    if step.action == "rekeyed":
        return (*tensors[:2], *mark)
    made: tuple[Tensor, ...]
    try:
        with torch.no_grad():
            if step.action == "folded":
                g, v = tensors[:2]
                stored: Magnitude = "log" if step.log else magnitude
                made, mark = (compose(g.detach(), v.detach(), step.axes, magnitude=stored),), ()
            else:
                made = decompose(tensors[0].detach(), step.axes, magnitude=magnitude)
    except (NonFiniteWeightError, PairError) as error:
        raise type(error)(f"{printable(step.name)}: {error.message}", hint=error.hint) from error
    if not isinstance(tensors[min(1, len(tensors) - 1)], nn.Parameter):
        return (*made, *mark)
    trained = any(t.requires_grad for t in tensors)
    return (*(nn.Parameter(t, requires_grad=trained) for t in made), *mark)


def plan_fold(state: StateDict) -> tuple[list[Step], list[Skip]]:
    """The steps that fold every pair of one state dict, and the look-alikes left alone.

    Looks at names, shapes and types only. Raises PairError for pairs that are broken.
    """
    tensors = state.tensors
    found = _found(state)
    steps = [_pair_step("folded", state, p, (p.plain_key,)) for p in found.pairs]
    _refuse_collisions(state, steps)
    return steps, [Skip(state.full(k), tuple(tensors[k].shape), reason) for k, reason in found.left]


def plan_convert(
    state: StateDict, choose: Choice, layout: Layout, magnitude: Magnitude = "linear"
) -> tuple[list[Step], list[Skip]]:
    """The steps that bring the chosen weights of one state dict under weight norm in the given layout.

    Pairs already there are re-keyed. Every other tensor of 2 or more dimensions is skipped with a reason.
    """
    tensors, steps, skipped = state.tensors, list[Step](), list[Skip]()
    found = _found(state)
    halves = {key: pair for pair in found.pairs for key in pair.keys}
    left, log = dict(found.left), magnitude == "log"
    for key, tensor in tensors.items():
        shape = tuple(tensor.shape)
        pair = halves.get(key)
        if pair is not None:
            if key == pair.v_key:
                _convert_pair(state, pair, pair.named(layout, log=pair.log or log), choose, steps, skipped)
        elif key in left:
            skipped.append(Skip(state.full(key), shape, left[key]))
        elif tensor.ndim >= 2:
            verdict = _refusal(tensor) or choose.verdict(state, key, tensor)
            if isinstance(verdict, str):
                skipped.append(Skip(state.full(key), shape, verdict))
            else:
                keys, kind = pair_of(key, layout, log=log).keys, _dtype_name(tensor)
                steps.append(Step("converted", state.full(key), (key,), keys, verdict.check(shape), shape, kind, log))
    _refuse_collisions(state, steps)
    return steps, skipped


def _convert_pair(
    state: StateDict, pair: Pair, target: Pair, choose: Choice, steps: list[Step], skipped: list[Skip]
) -> None:
    shape, name = tuple(state.entries[pair.v_key].shape), state.full(pair.plain_key)
    if pair.layout == target.layout:
        skipped.append(Skip(name, shape, f"already under weight norm ({pair.layout})"))
    elif not choose.wants(state, pair.plain_key):
        skipped.append(Skip(name, shape, f"under weight norm ({pair.layout}), not selected"))
    else:
        steps.append(_pair_step("rekeyed", state, pair, target.keys, log=target.log))


def _pair_step(
    action: Action, state: StateDict, pair: Pair, targets: tuple[str, ...], *, log: bool | None = None
) -> Step:
    g, v = state.entries[pair.g_key], state.entries[pair.v_key]
    name = state.full(pair.plain_key)
    if action == "folded":
        reason = _refusal(v) or _refusal(g)
        if reason:
            raise PairError(f"{printable(name)}: its pair cannot be folded ({reason})")
    axes = Axes.of_pair(g.shape, v.shape)
    marked = pair.log if log is None else log
    return Step(action, name, pair.keys, targets, axes, tuple(v.shape), _dtype_name(v), marked)


def _found(state: StateDict) -> Found:
    try:
        return find_pairs({key: tuple(t.shape) for key, t in state.tensors.items()}, _fits)
    except PairError as error:
        if not state.path:
            raise
        raise PairError(f"{printable(state.path)}: {error.message}", hint=error.hint) from error


def _fits(g_shape: Sequence[int], v_shape: Sequence[int]) -> bool:
    try:
        Axes.of_pair(g_shape, v_shape)
    except PairError:
        return False
    return True


def _refuse_collisions(state: StateDict, steps: Iterable[Step]) -> None:
    for step in steps:
        for key in step.targets:
            if key in state.entries and key not in step.sources:
                raise PairError(f"{printable(state.full(key))}: would be overwritten by {printable(step.sources[0])}")


def _refusal(tensor: Tensor) -> str:
    """Why a tensor cannot go in or out of weight norm whatever its name; empty if it can."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "sparse or quantized"
    if tensor.dtype not in _FLOATS:
        return f"{_dtype_name(tensor)}: not a floating-point weight of 16 bits or more"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a tensor subclass ({type(tensor).__name__})"
    return ""


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# Which weights -------------------------------------------------------------------------------------------


class Choice:
    """Decides which plain weights of a state dict are converted, and with which kept axes."""

    assumptions: tuple[str, ...] = ()

    def verdict(self, state: StateDict, key: str, tensor: Tensor) -> Axes | str:
        """The kept axes of a floating-point tensor of 2 or more dimensions, or why it is left alone."""
        raise NotImplementedError

    def wants(self, state: StateDict, key: str) -> bool:
        """Whether a weight that is under weight norm already may be re-keyed."""
        return True


class ByName(Choice):
    """Selection by names, for files whose model is not at hand.

    Args:
        include, exclude: globs on key names or on any dotted beginning of them ("decoder" takes everything under
            it), `re:` before a regular expression, or sequences of these. Paths in the file may be left out.
            Without `include`: the names torch's layers use, lookup tables left out.
        dim: kept axis or axes: "auto" (axis 0), an int, a tuple, None (one magnitude per tensor), or a mapping from
            patterns to these; the first pattern that matches decides.
    """

    def __init__(
        self,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        dim: DimOption | Mapping[str, DimOption] = "auto",
    ) -> None:
        self.include = None if include is None else _patterns("include", include)
        self.exclude = [] if exclude is None else _patterns("exclude", exclude)
        self.dim: Mapping[str, Any] = dim if isinstance(dim, Mapping) else {}
        self.fallback: Any = "auto" if isinstance(dim, Mapping) else dim
        self.assumptions = _ASSUMPTIONS if self.fallback == "auto" else _ASSUMPTIONS[1:]

    def check(self, states: Sequence[StateDict]) -> None:
        """Raise SelectionError when a pattern matches no weight of the file."""
        names = [n for s in states for n in _weight_names(s)]
        options = [("include", p) for p in self.include or ()] + [("exclude", p) for p in self.exclude]
        for option, pattern in [*options, *(("dim", p) for p in self.dim)]:
            if not any(_matches(pattern, n, path) for n, path in names):
                raise SelectionError.no_match(option, pattern, [_full(n, path) for n, path in names])

    def wants(self, state: StateDict, key: str) -> bool:
        if any(_matches(p, key, state.path) for p in self.exclude):
            return False
        return self.include is None or any(_matches(p, key, state.path) for p in self.include)

    def verdict(self, state: StateDict, key: str, tensor: Tensor) -> Axes | str:
        if any(_matches(p, key, state.path) for p in self.exclude):
            return "excluded"
        if self.include is not None:
            if not self.wants(state, key):
                return "not included"
        elif not is_weight_name(key):
            return "its name is none that torch's layers give a weight; include it by name"
        elif tensor.ndim == 2 and is_lookup_name(key):
            return "named like a lookup table (embedding); include it by name"
        return self._axes(state, key, tensor)

    def _axes(self, state: StateDict, key: str, tensor: Tensor) -> Axes:
        wish = next((d for p, d in self.dim.items() if _matches(p, key, state.path)), self.fallback)
        if wish == "auto":
            return Axes((0,))
        if isinstance(wish, bool) or not (wish is None or isinstance(wish, int | tuple)):
            raise SelectionError(f'dim must be "auto", an int, a tuple, None or a mapping, not {wish!r}')
        kept = () if wish is None else wish if isinstance(wish, tuple) else (wish,)
        try:
            return Axes(kept).check(tuple(tensor.shape))
        except PairError as error:
            raise SelectionError(f"{printable(state.full(key))}: {error.message}") from error


_ASSUMPTIONS = (
    "the kept axis is 0 wherever `dim` says nothing: right for Linear, Conv, RNN and attention weights; for a "
    "ConvTranspose it is the input axis, as in torch's own weight_norm",
    "weights are told by their names: a file without its model does not tell Conv from ConvTranspose, or Linear from "
    "Embedding; 2-D weights named like lookup tables (embed, emb, wte, wpe) are left out unless included",
)


class ByModel(Choice):
    """Selection by a model: exactly its planned weights, in the state dict that belongs to it.

    Args:
        path: of the state dict in the file.
        prefix: what the file puts before the model's own names ("module.").
        axes: model's name -> kept axes.
        reasons: model's name -> why it is left alone.
    """

    def __init__(self, path: str, prefix: str, axes: Mapping[str, Axes], reasons: Mapping[str, str]) -> None:
        self.path, self.prefix, self.axes, self.reasons = path, prefix, axes, reasons

    def verdict(self, state: StateDict, key: str, tensor: Tensor) -> Axes | str:
        if state.path != self.path:
            return "in a state dict that is not the model's"
        name = key.removeprefix(self.prefix)
        return self.axes.get(name) or self.reasons.get(name, "not in the model")

    def wants(self, state: StateDict, key: str) -> bool:
        return state.path == self.path


def _patterns(option: str, given: str | Sequence[str]) -> list[str]:
    patterns = [given] if isinstance(given, str) else list(given)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise SelectionError(f"{option} takes names for a file without its model, not {pattern!r}")
        if pattern.startswith("re:"):
            _expression(pattern)
    return patterns


def _expression(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern[3:])
    except re.error as error:
        raise SelectionError(f"{pattern!r} is not a regular expression: {error}") from error


def _matches(pattern: str, key: str, path: str) -> bool:
    names = (key, _full(key, path))
    if pattern.startswith("re:"):
        return any(_expression(pattern).search(name) for name in names)
    return any(fnmatchcase(start, pattern) for name in names for start in _beginnings(name))


def _beginnings(name: str) -> Iterator[str]:
    """The name and every dotted beginning of it: a.b.weight, a.b, a."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _weight_names(state: StateDict) -> Iterator[tuple[str, str]]:
    """(plain key, path) of every tensor of 2 or more dimensions, pairs under the name they fold to."""
    halves = {key: pair.plain_key for pair in _found(state).pairs for key in pair.keys[:2]}
    for key, tensor in state.tensors.items():
        if tensor.ndim >= 2 or key in halves:
            yield halves.get(key, key), state.path


def _full(key: str, path: str) -> str:
    return f"{path}.{key}" if path else key


# Whole checkpoints ---------------------------------------------------------------------------------------


def fold_state(content: Any, *, magnitude: Magnitude = "linear") -> CheckpointReport:
    """Fold every (g, v) in the state dicts of a loaded checkpoint, in place.

    The plain weight stands where the pair stood. Ties stay ties: one folded tensor for all names of a pair.
    Either every pair is folded or, on an error, none. A checkpoint without pairs stays as it is.

    >>> sd = {"generator": {"c.weight_g": torch.full((1, 1), 10.0), "c.weight_v": torch.tensor([[3.0, 4.0]])}}
    >>> fold_state(sd).folded[0].name, sd
    ('generator.c.weight', {'generator': {'c.weight': tensor([[6., 8.]])}})

    Args:
        content: what `torch.load` returned: a state dict, or any nesting of dicts and lists around some.
        magnitude: "log" when g is stored as its logarithm.

    Raises PairError, naming the key, for broken pairs.
    """
    return _carry_out(content, plan_fold, magnitude, ())


def convert_state(
    content: Any, choose: Choice | None = None, *, layout: Layout = "parametrized", magnitude: Magnitude = "linear"
) -> CheckpointReport:
    """Bring the chosen weights of a loaded checkpoint under weight norm, in place; re-key pairs already there.

    >>> sd = {"fc.weight": torch.tensor([[3.0, 4.0]]), "fc.bias": torch.zeros(1)}
    >>> report = convert_state(sd, layout="legacy")
    >>> list(sd), report.converted[0].axes.kept
    (['fc.weight_g', 'fc.weight_v', 'fc.bias'], (0,))

    Args:
        content: what `torch.load` returned.
        choose: which weights; default `ByName()`.
        layout: how to name the halves, "parametrized" (torch's present) or "legacy" (`weight_g`, `weight_v`).
        magnitude: "log" stores the logarithm of g, and says that pairs already there do.

    Raises:
        SelectionError: a pattern matches nothing, or an option makes no sense.
        NonFiniteWeightError: a weight to convert holds NaN or infinity; named.
        PairError: broken pairs; named.
    """
    if layout not in ("parametrized", "legacy"):
        raise SelectionError(f'layout must be "parametrized" or "legacy", not {layout!r}')
    choose = choose or ByName()
    if isinstance(choose, ByName):
        choose.check(state_dicts(content))
    plan = _with_ties(choose)
    return _carry_out(content, lambda s: plan_convert(s, plan, layout, magnitude), magnitude, choose.assumptions)


Planner = Callable[[StateDict], tuple[list[Step], list[Skip]]]


def _carry_out(content: Any, plan: Planner, magnitude: Magnitude, assumptions: tuple[str, ...]) -> CheckpointReport:
    """Plan all state dicts, compute all new tensors, then change the dicts: all or nothing."""
    if magnitude not in ("linear", "log"):
        raise SelectionError(f'magnitude must be "linear" or "log", not {magnitude!r}')
    states = state_dicts(content)
    plans = [plan(state) for state in states]
    known: dict[Any, tuple[Tensor, ...]] = {}
    warnings: list[str] = []
    renewed = [_renewed(s, steps, magnitude, known, warnings) for s, (steps, _) in zip(states, plans, strict=True)]
    for state, entries in zip(states, renewed, strict=True):
        state.entries.clear()
        state.entries.update(entries)
    steps = tuple(step for steps, _ in plans for step in steps)
    if steps:
        warnings += [
            f"{path or 'the file'}: optimizer state belongs to the parameters before this change"
            for path, item in _dicts(content)
            if _is_optimizer(item)
        ]
    converted = any(step.action == "converted" for step in steps)
    skipped = tuple(skip for _, skips in plans for skip in skips)
    return CheckpointReport(steps, skipped, assumptions if converted else (), tuple(warnings))


def _renewed(
    state: StateDict, steps: list[Step], magnitude: Magnitude, known: dict[Any, tuple[Tensor, ...]], warnings: list[str]
) -> dict[Any, Any]:
    """The entries of a state dict after its steps, each new tensor where the first of its sources stood."""
    by_source = {key: step for step in steps for key in step.sources}
    entries: dict[Any, Any] = {}
    for key, value in state.entries.items():
        step = by_source.get(key) if isinstance(key, str) else None
        if step is None:
            entries[key] = value
        elif step.targets[0] not in entries:
            sources = [state.entries[k] for k in step.sources]
            same = (step.action, step.axes, *(_identity(t) for t in sources))
            if same not in known:
                known[same] = run_step(step, sources, magnitude)
                if step.action == "folded" and not _is_finite(known[same][0]):
                    warnings.append(f"{printable(step.name)}: holds NaN or infinity")
            entries.update(zip(step.targets, known[same], strict=True))
    return entries


def _is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; one pass, no copy."""
    return not tensor.numel() or all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor.detach()))


def _identity(tensor: Tensor) -> Any:
    """Equal for two names of one tensor (a tie), however the file came to share it."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or not tensor.numel():
        return id(tensor)
    start = tensor.untyped_storage().data_ptr()
    return start, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _with_ties(choose: Choice) -> Choice:
    """The same choice, with every name of a tied tensor going the same way."""
    return _Tied(choose) if isinstance(choose, ByName) else choose


class _Tied(Choice):
    """A lookup table tied to a chosen weight goes with it; a weight tied to an excluded one stays."""

    def __init__(self, inner: ByName) -> None:
        self.inner = inner
        self.groups: dict[int, dict[Any, list[str]]] = {}

    def wants(self, state: StateDict, key: str) -> bool:
        return self.inner.wants(state, key)

    def verdict(self, state: StateDict, key: str, tensor: Tensor) -> Axes | str:
        own = self.inner.verdict(state, key, tensor)
        for other in self._ties(state, tensor):
            if other != key:
                theirs = self.inner.verdict(state, other, state.entries[other])
                if theirs == "excluded" and isinstance(own, Axes):
                    return f"tied to {printable(other)}, which is excluded"
                if isinstance(theirs, Axes) and isinstance(own, str) and own != "excluded":
                    own = theirs
                elif isinstance(theirs, Axes) and isinstance(own, Axes) and theirs != own:
                    raise SelectionError(f"{printable(key)} and {printable(other)} are tied under different kept axes")
        return own

    def _ties(self, state: StateDict, tensor: Tensor) -> list[str]:
        groups = self.groups.get(id(state.entries))
        if groups is None:
            groups = self.groups[id(state.entries)] = {}
            for key, other in state.tensors.items():
                groups.setdefault(_identity(other), []).append(key)
        return groups[_identity(tensor)]


# Into a model --------------------------------------------------------------------------------------------


def plain_keys(state: StateDict) -> tuple[str, ...]:
    """The keys a state dict would have with every pair folded."""
    pairs = {pair.g_key: pair.plain_key for pair in _found(state).pairs}
    halves = {key for pair in _found(state).pairs for key in pair.keys[1:]}
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

    Keys the template does not know pass unchanged, so that a strict load can name them. Raises PairError for a weight
    that does not fit its pair in the template.
    """
    targets = {pair.plain_key: pair for pair in _found(template).pairs}
    halves = {key: pair for pair in _found(state).pairs for key in pair.keys}
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
        if pair is not None and asked == stored:
            halves_of = (state.entries[pair.g_key], tensor)
        else:
            plain = _folded(state, pair, magnitude)[1] if pair else tensor
            halves_of = _split_like(template, target, plain, asked)
        out.update(zip(target.keys, (*halves_of, torch.ones((), dtype=torch.bool)), strict=False))
    return out


def _folded(state: StateDict, pair: Pair, magnitude: Magnitude) -> tuple[str, Tensor]:
    step = _pair_step("folded", state, pair, (pair.plain_key,))
    return pair.plain_key, run_step(step, [state.entries[key] for key in pair.keys], magnitude)[0]


def _split_like(template: StateDict, target: Pair, plain: Tensor, magnitude: Magnitude) -> tuple[Tensor, Tensor]:
    """A plain weight as (g, v) with the axes a pair of the template has."""
    shape = tuple(template.entries[target.v_key].shape)
    if tuple(plain.shape) != shape or _refusal(plain):
        raise PairError(f"{printable(target.plain_key)}: {tuple(plain.shape)} where the model has {shape}")
    axes = Axes.of_pair(template.entries[target.g_key].shape, shape)
    keys = (target.g_key, target.v_key)
    step = Step("converted", target.plain_key, (target.plain_key,), keys, axes, shape, _dtype_name(plain))
    g, v = run_step(step, (plain,), magnitude)
    return g, v


# How it reads --------------------------------------------------------------------------------------------


def _table(report: CheckpointReport) -> str:
    counts = ", ".join(f"{len(report.named(a))} {a}" for a in ("folded", "converted", "rekeyed") if report.named(a))
    lines = [counts or "0 weights changed"]
    rows = [(s.action, printable(s.name), _by(s.shape), _kept(s.axes), s.dtype) for s in report.steps]
    lines += _columns([("", "weight", "shape", "kept", "type"), *rows]) if rows else []
    if report.skipped:
        lines += ["", f"{len(report.skipped)} left alone"]
        lines += _columns(
            [("tensor", "shape", "reason"), *((printable(s.name), _by(s.shape), s.reason) for s in report.skipped)]
        )
    lines += [f"assumed: {text}" for text in report.assumptions]
    lines += [f"warning: {text}" for text in report.warnings]
    lines += ["", str(report.batch_norm)] if report.batch_norm is not None else []
    lines += ["", str(report.initialisation)] if report.initialisation is not None else []
    return "\n".join(lines)


def _kept(axes: Axes) -> str:
    kept = ",".join(map(str, axes.kept)) or "none"
    return f"{kept} in {axes.groups} groups" if axes.groups > 1 else kept


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
