"""Checkpoint files, end to end: fold and convert a file, load a model or its tensors, save a model.

    fold_checkpoint("generator.pth", "plain.pth")
    convert_checkpoint("plain.safetensors", "wn.safetensors", dim={"ups.*": 1})
    model = load_model("weights.pt", arch="mypackage.nets:build")

Whole modules are read without executing the file when they consist of torch.nn classes; anything else needs
`trust_pickle`, or a state dict together with `arch`.
"""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from wnsurgery.batchnorm import BatchNormMode, BatchNormPlan, without_batch_norm
from wnsurgery.checkpoint import (
    ByModel,
    ByName,
    CheckpointReport,
    DimOption,
    Skip,
    StateDict,
    Step,
    convert_state,
    flat_tensors,
    fold_state,
    plain_keys,
    plan_fold,
    state_dicts,
    translate,
)
from wnsurgery.errors import (
    InputError,
    NonFiniteWeightError,
    PairError,
    SelectionError,
    WnsurgeryError,
    first_line,
    printable,
)
from wnsurgery.keys import Layout
from wnsurgery.mean_only import MeanOnlyBatchNorm1d, MeanOnlyBatchNorm2d, MeanOnlyBatchNorm3d
from wnsurgery.mechanism import PASSING, WeightNormList, rebuild_parametrized
from wnsurgery.plan import Plan, plan_weight_norm
from wnsurgery.reparam import Axes, Magnitude, WeightNorm
from wnsurgery.stores import Stored, check_output, format_for, read_store, write_store
from wnsurgery.stores.modules import ModulePolicy, modules_in
from wnsurgery.surgery import apply_weight_norm, fold_weight_norm, is_weight_normed
from wnsurgery.walk import Slot, slots

__all__ = [
    "convert_checkpoint",
    "fold_checkpoint",
    "load_model",
    "load_object",
    "load_tensors",
    "save_model",
]

_WEIGHT_NORM = ("ours", "torch", "legacy")

Path_ = str | os.PathLike[str]
Arch = str | Callable[[], nn.Module]


# Reading -------------------------------------------------------------------------------------------------


def load_object(path: Path_, *, trust_pickle: bool = False) -> Any:
    """Whatever a checkpoint file holds, tensors on the CPU; nothing of the file is executed without trust.

    >>> load_object("run.ckpt")["epoch"]  # doctest: +SKIP
    3

    Raises:
        InputMissingError, InputError: not there, damaged, or no checkpoint.
        UnsafeFileError: it needs more than tensors, plain containers and torch.nn modules.
    """
    return _read(path, trust_pickle).content


def load_tensors(path: Path_, *, trust_pickle: bool = False) -> dict[str, Tensor]:
    """Every tensor of the state dicts and modules in a file, under its dotted name, as stored (pairs unfolded).

    >>> sorted(load_tensors("generator.pth"))  # doctest: +SKIP
    ['generator.conv_pre.bias', 'generator.conv_pre.weight_g', 'generator.conv_pre.weight_v']

    Raises as `load_object`.
    """
    content = load_object(path, trust_pickle=trust_pickle)
    tensors = flat_tensors(content)
    for where, module in modules_in(content):
        tensors.update(flat_tensors({where: module.state_dict()} if where else module.state_dict()))
    return tensors


def load_model(
    path: Path_,
    *,
    arch: Arch | None = None,
    trust_pickle: bool = False,
    entry: str | None = None,
    magnitude: Magnitude = "linear",
) -> nn.Module:
    """The model in a file: a whole module, or a state dict loaded strictly into what `arch` builds.

    A state dict in another layout than the model's is folded, converted or re-keyed on the way in.

    >>> load_model("weights.safetensors", arch="torchvision.models:resnet18")  # doctest: +SKIP

    Args:
        path: file that `torch.save` or safetensors wrote.
        arch: "package.module:factory", or the factory itself; called without arguments. The working directory
            is searched for the package, too.
        trust_pickle: let the file's pickle run code.
        entry: dotted path of the state dict or module to take, where several fit ("ema").
        magnitude: "log" when the state dict stores the logarithm of g without saying so, as our own do.

    Raises:
        InputError: damaged, ambiguous, or its tensors do not fit the model.
        UnsafeFileError: a whole module of other classes than torch.nn's.
        SelectionError: `arch` names nothing that builds a module, or is missing, or not needed.
    """
    content = _read(path, trust_pickle).content
    modules = modules_in(content)
    if modules:
        if arch is not None:
            raise SelectionError(f"{path}: holds a whole module; arch is for state dicts", hint="leave out --arch")
        model: nn.Module = _only(path, [(w, m) for w, m in modules if entry in (None, w)], "module")
        return model
    if arch is None:
        raise InputError.of(
            path, "holds tensors but no module", "arch='package.module:factory' (--arch) says what builds the model"
        )
    model = _build(arch)
    with _named(path):
        state, prefix = _state_for(path, content, model, entry)
        _load_into(model, _stripped(state, prefix), path, magnitude)
    return model


def _read(path: Path_, trust_pickle: bool) -> Stored:
    policy = _policy()
    stored = read_store(path, trust_pickle=trust_pickle, allow=policy.allow)
    if not trust_pickle:
        policy.vet(stored.content, Path(path))
    return stored


def _policy() -> ModulePolicy:
    """torch.nn's classes and the ones this package puts into a converted module."""
    own = (WeightNormList, WeightNorm, Axes, MeanOnlyBatchNorm1d, MeanOnlyBatchNorm2d, MeanOnlyBatchNorm3d)
    rebuild = rebuild_parametrized
    return ModulePolicy(
        {f"{cls.__module__}.{cls.__qualname__}": cls for cls in own},
        {f"{rebuild.__module__}.{rebuild.__qualname__}": rebuild},
        _fault,
    )


def _fault(module: nn.Module) -> str:
    """What is wrong with a module from a file that claims to be under our weight norm; "" if nothing is."""

    table = module._modules["parametrizations"]
    for name, entry in table._modules.items() if type(table) is nn.ModuleDict else [("", None)]:
        if type(entry) is not WeightNormList or list(entry._modules) != ["0"] or not PASSING.isdisjoint(vars(entry)):
            return "its parametrization is not weight norm"
        rule, g, v = entry._modules["0"], entry._parameters.get("original0"), entry._parameters.get("original1")
        if type(rule) is not WeightNorm or g is None or v is None or not _is_sound_rule(vars(rule), g, v):
            return f"the pair of {printable(name)} does not fit"
        if not isinstance(vars(type(module)).get(name), property):
            return f"{printable(name)} is not parametrized in its class"
    return ""


def _is_sound_rule(rule: Mapping[str, Any], g: Tensor, v: Tensor) -> bool:
    """Whether the attributes of a WeightNorm from a file are what its constructor makes, and fit the pair."""
    axes, dtype = rule.get("axes"), rule.get("magnitude_dtype", 0)
    if type(axes) is not Axes or rule.get("magnitude") not in ("linear", "log"):
        return False
    kept, groups = vars(axes).get("kept"), vars(axes).get("groups")
    if type(groups) is not int or type(kept) is not tuple or any(type(axis) is not int for axis in kept):
        return False
    try:
        fits = tuple(g.shape) == axes.check(v.shape).magnitude_shape(v.shape)
    except PairError:
        return False
    return fits and groups > 0 and (dtype is None or isinstance(dtype, torch.dtype))


def _only(path: Path_, found: Sequence[tuple[str, Any]], kind: str) -> Any:
    if len(found) == 1:
        return found[0][1]
    names = ", ".join(printable(where or "the file itself") for where, _ in found[:5])
    reason = f"several could be meant: {names}" if found else f"no such {kind} in it"
    raise InputError.of(path, reason, "entry='...' names the one to take")


# Models and their state dicts ----------------------------------------------------------------------------


def _build(arch: Arch) -> nn.Module:
    """The module a factory makes."""
    model: Any
    if callable(arch):
        name, model = getattr(arch, "__name__", repr(arch)), arch()
    else:
        name = arch
        module_name, _, attribute = arch.partition(":")
        if not module_name or not attribute:
            raise SelectionError(f"{arch!r} is not of the form package.module:factory")
        with _working_directory_importable():
            try:  # the user's own code, which raises what it likes
                found: Any = import_module(module_name)
                for part in attribute.split("."):
                    found = getattr(found, part)
            except (Exception, SystemExit) as error:
                raise SelectionError(f"{arch}: {first_line(error)}") from error
            try:
                model = found()
            except (Exception, SystemExit) as error:
                hint = "the factory is called without arguments" if isinstance(error, TypeError) else None
                raise SelectionError(f"{arch}: {first_line(error)}", hint=hint) from error
    if not isinstance(model, nn.Module):
        raise SelectionError(f"{name}: gives a {type(model).__name__}, not a torch.nn.Module")
    return model


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """Let `--arch nets:build` find ./nets.py; last in the path, so that nothing installed is shadowed."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _state_for(path: Path_, content: Any, model: nn.Module, entry: str | None) -> tuple[StateDict, str]:
    """The one state dict in a file whose names are the model's, and what the file puts before them."""
    wanted = set(plain_keys(_template(model)))
    states = [s for s in state_dicts(content) if entry in (None, s.path)]
    fitting = [(s.path, (s, prefix)) for s in states if (prefix := _prefix(set(plain_keys(s)), wanted)) is not None]
    if not fitting and states:
        nearest = max(states, key=lambda s: len(wanted & set(plain_keys(s))))
        raise InputError.of(path, _difference(set(plain_keys(nearest)), wanted))
    state, prefix = _only(path, fitting, "state dict")
    return state, prefix


def _prefix(keys: set[str], wanted: set[str]) -> str | None:
    """What stands before the model's names ("", "module.", "generator."), None if they are not all there.

    Keys under other prefixes may be there too (a checkpoint that holds a discriminator beside the generator).
    """
    some = next(iter(sorted(wanted)), None)
    for key in sorted(keys) if some is not None else ():
        start = key.removesuffix(str(some))
        if key.endswith(str(some)) and (not start or start.endswith(".")):
            own = {k for k in keys if k.startswith(start)}
            if own == {start + name for name in wanted}:
                return start
    return None


def _difference(keys: set[str], wanted: set[str]) -> str:
    parts = [f"{len(wanted - keys)} missing"] if wanted - keys else []
    parts += [f"{len(keys - wanted)} unexpected"] if keys - wanted else []
    names = [printable(n) for n in (*sorted(wanted - keys)[:3], *sorted(keys - wanted)[:3])]
    return f"its tensors do not fit the model: {' and '.join(parts)} ({', '.join(names)}, ...)"


def _template(model: nn.Module) -> StateDict:
    return StateDict("", dict(model.state_dict()))


def _stripped(state: StateDict, prefix: str) -> StateDict:
    """The model's part of a state dict, under the model's own names."""
    entries: dict[str, Any] = OrderedDict(
        (k.removeprefix(prefix), v) for k, v in state.entries.items() if isinstance(k, str) and k.startswith(prefix)
    )
    metadata = getattr(state.entries, "_metadata", None)
    if metadata is not None and not prefix:
        entries._metadata = metadata  # type: ignore[attr-defined]
    return StateDict(state.path, entries)


def _load_into(model: nn.Module, state: StateDict, path: Path_, magnitude: Magnitude) -> None:
    wanted = {n: _magnitude(slot) for slot in slots(model) if slot.form in _WEIGHT_NORM for n in slot.names}
    tensors = OrderedDict(translate(state, _template(model), magnitude=magnitude, wanted=wanted))
    extra = {k: v for k, v in state.entries.items() if not isinstance(v, Tensor)}
    tensors.update(extra)
    if hasattr(state.entries, "_metadata"):
        tensors._metadata = state.entries._metadata  # type: ignore[attr-defined]
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError.of(path, f"its tensors do not fit the model: {printable(reason, 400)}") from error


def _magnitude(slot: Slot) -> Magnitude:
    """How a weight under weight norm stores its g; torch's own knows only the linear way."""
    if slot.form != "ours":
        return "linear"
    rule: WeightNorm = slot.module.parametrizations[slot.parameter][0]  # type: ignore[index,assignment]
    return rule.magnitude


# Folding -------------------------------------------------------------------------------------------------


def fold_checkpoint(
    src: Path_,
    dst: Path_,
    *,
    magnitude: Magnitude = "linear",
    arch: Arch | None = None,
    force: bool = False,
    in_place: bool = False,
    trust_pickle: bool = False,
    dry_run: bool = False,
) -> CheckpointReport:
    """Write a copy of a checkpoint with every (g, v) folded into a plain weight; all else stays as it is.

    All three layouts, any tensor name and nesting, mixed; modules saved whole are folded as modules. The bits are
    those of `fold_weight_norm` on the live module. A file without pairs is copied, and the report says so.

    >>> print(fold_checkpoint("generator.pth", "plain.pth"))  # doctest: +SKIP

    Args:
        src: `.pt .pth .bin .ckpt .safetensors`, told by content.
        dst: the output; its suffix decides the format, where it has one of these.
        magnitude: "log" when pairs store the logarithm of g without saying so, as our own do.
        arch: a model the folded state dict must load into, strictly.
        force: overwrite an existing output.
        in_place: let the output be the input.
        trust_pickle: let the file's pickle run code.
        dry_run: report, write nothing.

    Raises:
        InputMissingError, InputError, UnsafeFileError: about the input, see `load_object`.
        PairError: broken pairs, named.
        OutputExistsError, OutputError: about the output.
    """
    if not dry_run:
        check_output(dst, src, force=force, in_place=in_place)
    stored = _read(src, trust_pickle)
    with _named(src):
        _refuse_empty(src, stored.content)
        report = fold_state(stored.content, magnitude=magnitude)
        for where, module in modules_in(stored.content):
            with _surgery_on(src):
                report = _merged(report, _fold_module(where, module))
        if arch is not None:
            model = fold_weight_norm(_build(arch))
            state, prefix = _state_for(src, stored.content, model, None)
            _load_into(model, _stripped(state, prefix), src, magnitude)
    if not report.steps:
        report = replace(report, warnings=(*report.warnings, "no weight norm in this file: nothing to fold"))
    return _finish(dst, stored, report, write=not dry_run, force=force or in_place)


def _fold_module(where: str, module: nn.Module) -> CheckpointReport:
    steps = []
    for slot in slots(module):
        if slot.form in _WEIGHT_NORM and slot.tensor is not None and slot.magnitude is not None:
            shape, name = tuple(slot.tensor.shape), _joined(where, slot.fqn)
            axes = Axes.of_pair(slot.magnitude.shape, shape)
            steps.append(Step("folded", name, (name,), (name,), axes, shape, _type(slot.tensor)))
    fold_weight_norm(module)
    return CheckpointReport(tuple(steps))


# Converting ----------------------------------------------------------------------------------------------


def convert_checkpoint(  # noqa: PLR0913 - the options of the command, one by one
    src: Path_,
    dst: Path_,
    *,
    layout: Layout = "parametrized",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    dim: DimOption | Mapping[str, DimOption] = "auto",
    magnitude: Magnitude = "linear",
    init: Literal["preserve", "data", "fan"] = "preserve",
    data: Any = None,
    init_scale: float | Mapping[str, float] = 1.0,
    batch_norm: BatchNormMode = "keep",
    inputs: Any = None,
    arch: Arch | None = None,
    force: bool = False,
    in_place: bool = False,
    trust_pickle: bool = False,
    dry_run: bool = False,
) -> CheckpointReport:
    """Write a copy of a checkpoint with its weights under weight norm, bit for bit the same function.

    A state dict is converted by names, and the report states what had to be assumed about axes; with `arch` the
    model's layers say which weights and axes. A module saved whole is converted as a module. Pairs in another
    layout are re-keyed.

    >>> print(convert_checkpoint("plain.pt", "wn.pt", dim={"ups.*": 1}))  # doctest: +SKIP

    Args:
        src, dst, force, in_place, trust_pickle, dry_run: as in `fold_checkpoint`.
        layout: "parametrized" (torch's present keys) or "legacy" (`weight_g`, `weight_v`); for state dicts.
        include, exclude, dim: which weights and which kept axes; globs or `re:` patterns on names, see `ByName`.
        magnitude: "linear" stores g, "log" its logarithm; pairs already in a state dict that do not say are taken
            to do the same.
        init: "data" sets g and biases from `data`, "fan" sets g, v and biases without; both need a model (`arch`, or a
            module saved whole).
        data: one batch, see `data_dependent_init`.
        init_scale: standard deviation that "data" aims at, factor of g for "fan"; a mapping goes by pattern.
        batch_norm: what becomes of each BatchNorm, see `apply_weight_norm`; anything but "keep" needs a model (`arch`,
            or a module saved whole), and the file then fits the model after the same surgery.
        inputs: example arguments that show the data flow for `batch_norm`; `data` serves, too.
        arch: "package.module:factory" of the model whose state dict it is.

    Raises:
        SelectionError: a pattern or the whole selection matches nothing, or options that do not go together.
        NonFiniteWeightError: a weight to convert holds NaN or infinity; named.
        and as `fold_checkpoint`.
    """
    if not dry_run:
        check_output(dst, src, force=force, in_place=in_place)
    stored = _read(src, trust_pickle)
    selection = {"include": include, "exclude": exclude, "dim": dim, "magnitude": magnitude}
    setup = {"init": init, "data": data, "init_scale": init_scale, "batch_norm": batch_norm, "inputs": inputs}
    with _named(src):
        _refuse_empty(src, stored.content)
        report = _convert(src, stored.content, layout, arch, selection, setup)
    if not report.steps and not _holds_weight_norm(stored.content):
        reasons = "; ".join(f"{printable(s.name)}: {s.reason}" for s in report.skipped[:3])
        raise SelectionError(f"{src}: no weight to convert", hint=reasons or "it has no tensor of 2 or more dimensions")
    return _finish(dst, stored, report, write=not dry_run, force=force or in_place)


def _holds_weight_norm(content: Any) -> bool:
    pairs = any(plan_fold(state)[0] for state in state_dicts(content))
    return pairs or any(is_weight_normed(module) for _, module in modules_in(content))


def _refuse_empty(path: Path_, content: Any) -> None:
    if not state_dicts(content) and not modules_in(content):
        raise InputError.of(path, "holds no tensors under names, and no module")


Options = Mapping[str, Any]


def _convert(
    path: Path_, content: Any, layout: Layout, arch: Arch | None, selection: Options, setup: Options
) -> CheckpointReport:
    """Convert a loaded file in place, by whichever of the three ways it calls for."""
    if (setup["init"] == "data") != (setup["data"] is not None):
        raise SelectionError('init="data" and data go together')
    modules = modules_in(content)
    if modules:
        if layout != "parametrized" or arch is not None:
            raise SelectionError("layout and arch are for state dicts; this file holds a whole module")
        report = CheckpointReport()
        for where, module in modules:
            with _surgery_on(path):
                own = _convert_module(where, module, selection, setup)
            report = _merged(report, replace(own, initialisation=_initialised(module, setup)))
        return report
    if arch is not None:
        return _convert_with_model(path, content, _build(arch), layout, selection, setup)
    if setup["init"] != "preserve":
        raise SelectionError(f"init={setup['init']!r} needs the model", hint="arch='package.module:factory' (--arch)")
    if setup["batch_norm"] != "keep":
        reason = "a state dict alone does not say what a BatchNorm follows: batch_norm needs the model"
        raise SelectionError(reason, hint="arch='package.module:factory' (--arch)")
    choose = ByName(selection["include"], selection["exclude"], selection["dim"])
    return convert_state(content, choose, layout=layout, magnitude=selection["magnitude"])


def _convert_module(where: str, module: nn.Module, selection: Options, setup: Options) -> CheckpointReport:
    with without_batch_norm(module, setup["batch_norm"], setup["inputs"], data=setup["data"]) as done:
        plan = _plan(module, selection)
        steps = []
        for site in plan.sites:
            name, shape = _joined(where, site.fqn), tuple(site.weight.shape)
            steps.append(Step("converted", name, (name,), (name,), site.axes, shape, _type(site.weight)))
        large = [s for s in plan.skipped if s.shape is None or len(s.shape) > 1]
        apply_weight_norm(module, **selection)
    left = tuple(Skip(_joined(where, s.name), s.shape or (), s.reason) for s in large)
    return CheckpointReport(tuple(steps), left, batch_norm=_norm_report(where, done, setup))


def _norm_report(where: str, done: BatchNormPlan, setup: Options) -> BatchNormPlan | None:
    """What became of each BatchNorm, under its name in the file; None where nobody asked."""
    if setup["batch_norm"] == "keep":
        return None
    steps = (replace(s, name=_joined(where, s.name), layer=_joined(where, s.layer)) for s in done.steps)
    return BatchNormPlan(tuple(steps), tuple(replace(k, name=_joined(where, k.name)) for k in done.kept))


def _plan(model: nn.Module, selection: Options) -> Plan:
    return plan_weight_norm(model, **{k: selection[k] for k in ("include", "exclude", "dim")})


def _initialised(model: nn.Module, setup: Options) -> Any:
    if setup["init"] == "preserve":
        return None
    if setup["init"] == "fan":
        from wnsurgery.fans import fan_init

        return fan_init(model, init_scale=setup["init_scale"])
    from wnsurgery.data_init import data_dependent_init

    return data_dependent_init(model, setup["data"], init_scale=setup["init_scale"])


def _convert_with_model(
    path: Path_, content: Any, model: nn.Module, layout: Layout, selection: Options, setup: Options
) -> CheckpointReport:
    """Convert a state dict with the axes its model's layers have."""
    fold_weight_norm(model)
    state, prefix = _state_for(path, content, model, None)
    with _cut_state(path, state, prefix, model, selection, setup) as done:
        plan = _plan(model, selection)
    axes = {name: site.axes for site in plan.sites for slot in site.owners for name in slot.names}
    choose = ByModel(state.path, prefix, axes, {s.name: s.reason for s in plan.skipped})
    report = convert_state(content, choose, layout=layout, magnitude=selection["magnitude"])
    report = replace(report, batch_norm=_norm_report(_joined(state.path, prefix.rstrip(".")), done, setup))
    if setup["init"] != "preserve":
        # the file has its new keys; the model, initialised in memory, gives them new values
        _load_into(model, _stripped(state, prefix), path, selection["magnitude"])
        apply_weight_norm(model, **selection)
        report = replace(report, initialisation=_initialised(model, setup))
        ours = StateDict("", dict(model.state_dict()))
        for name, tensor in translate(ours, _stripped(state, prefix), magnitude=selection["magnitude"]).items():
            state.entries[prefix + name] = tensor
    return report


@contextmanager
def _cut_state(
    path: Path_, state: StateDict, prefix: str, model: nn.Module, selection: Options, setup: Options
) -> Iterator[BatchNormPlan]:
    """BatchNorm surgery on a model with the file's values, and then on the file's entries."""
    if setup["batch_norm"] == "keep":
        yield BatchNormPlan()
        return
    magnitude = selection["magnitude"]
    _load_into(model, _stripped(state, prefix), path, magnitude)
    before = dict(model.state_dict())
    with without_batch_norm(model, setup["batch_norm"], setup["inputs"], data=setup["data"]) as done:
        after = dict(model.state_dict())
        fresh = {k: v for k, v in after.items() if k not in before or v.data_ptr() != before[k].data_ptr()}
        new = translate(StateDict("", fresh), _stripped(state, prefix), magnitude=magnitude)
        for name in before.keys() - after.keys():
            del state.entries[prefix + name]
        state.entries.update((prefix + name, tensor) for name, tensor in new.items())
        yield done


# Writing -------------------------------------------------------------------------------------------------


def save_model(model: nn.Module, path: Path_, *, force: bool = False, state_only: bool = False) -> None:
    """Save a module whole, or its state dict (`state_only`, or a `.safetensors` path); whole or not at all.

    >>> save_model(nn.Linear(3, 2), "linear.pt")  # doctest: +SKIP

    Raises OutputExistsError unless `force`; OutputError when it cannot be written or pickled.
    """
    kind = format_for(path, "torch")
    check_output(path, force=force)
    content = model.state_dict() if state_only or kind == "safetensors" else model
    write_store(path, Stored(content, kind), force=force)


def _finish(dst: Path_, stored: Stored, report: CheckpointReport, *, write: bool, force: bool) -> CheckpointReport:
    kind = format_for(dst, stored.format)
    warnings = list(report.warnings)
    if kind == "torch" and stored.metadata:
        warnings.append("the safetensors metadata has no place in a .pt file and is left out")
    if kind == "safetensors" and stored.format == "torch":
        tied = _tied(stored.content)
        if tied:
            warnings.append(f"{tied[0]} and {tied[1]} share memory; .safetensors holds them as two tensors")
    if write:
        write_store(dst, stored, force=force)
    return replace(report, warnings=tuple(warnings))


def _tied(content: Any) -> tuple[str, str] | None:
    seen: dict[int, str] = {}
    for name, tensor in flat_tensors(content).items():
        start = tensor.untyped_storage().data_ptr() if tensor.numel() and not tensor.is_sparse else 0
        if start and seen.setdefault(start, name) != name:
            return seen[start], name
    return None


def _merged(a: CheckpointReport, b: CheckpointReport) -> CheckpointReport:
    return CheckpointReport(
        a.steps + b.steps,
        a.skipped + b.skipped,
        a.assumptions + b.assumptions,
        a.warnings + b.warnings,
        b.initialisation or a.initialisation,
        _merged_norms(a.batch_norm, b.batch_norm),
    )


def _merged_norms(a: BatchNormPlan | None, b: BatchNormPlan | None) -> BatchNormPlan | None:
    return b if a is None else a if b is None else BatchNormPlan(a.steps + b.steps, a.kept + b.kept)


@contextmanager
def _named(path: Path_) -> Iterator[None]:
    """Errors about a weight say which file it is in."""
    try:
        yield
    except (PairError, NonFiniteWeightError) as error:
        raise _with_path(error, path) from error


@contextmanager
def _surgery_on(path: Path_) -> Iterator[None]:
    """A module from a file has whatever attributes the file gave it; those that break surgery are damage."""
    try:
        yield
    except (AttributeError, LookupError, TypeError) as error:
        raise InputError.of(path, f"damaged module ({type(error).__name__}: {printable(error)})") from error


def _with_path(error: WnsurgeryError, path: Path_) -> WnsurgeryError:
    return type(error)(f"{path}: {error.message}", hint=error.hint)


def _joined(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
