"""Checkpoint files, end to end: fold and convert a file, save a model.

    fold_checkpoint("generator.pth", "plain.pth")
    convert_checkpoint("plain.safetensors", "wn.safetensors", dim={"ups.*": 1})

State dicts go from file to file one tensor at a time; whole modules, and whatever needs a model, through memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from wnsurgery.batchnorm import BatchNormMode, BatchNormPlan, without_batch_norm
from wnsurgery.checkpoint import (
    AtOnce,
    ByModel,
    ByName,
    CheckpointReport,
    DimOption,
    Skip,
    StateDict,
    Step,
    convert_chosen,
    fold_with,
    known_magnitude,
    plain_keys,
    plan_fold,
    state_dicts,
    translate,
)
from wnsurgery.checkpoint_directory import Folder, map_directory
from wnsurgery.delivery import Output, Progress, deliver
from wnsurgery.directory import deliver_directory
from wnsurgery.entries import only_tensors, shown_names, taken
from wnsurgery.errors import InputError, PairError, SelectionError, printable
from wnsurgery.flat_magnitudes import spread_magnitudes
from wnsurgery.keys import Layout, pair_of
from wnsurgery.loading import (
    WEIGHT_NORM,
    Arch,
    Path_,
    build,
    load_into,
    load_model,
    load_object,
    load_tensors,
    named,
    state_for,
    stripped,
)
from wnsurgery.plan import Plan, plan_weight_norm
from wnsurgery.promises import Promises
from wnsurgery.ranks import Ranks
from wnsurgery.reading import read
from wnsurgery.reparam import Axes, Magnitude
from wnsurgery.steps import ZeroNorm, rows_without_direction
from wnsurgery.stores import Stored, check_output, format_for, is_file_name, map_store, write_store
from wnsurgery.stores.dcp import Distributed
from wnsurgery.stores.modules import modules_in
from wnsurgery.surgery import apply_weight_norm, fold_weight_norm, is_weight_normed
from wnsurgery.walk import slots

__all__ = [
    "convert_checkpoint",
    "fold_checkpoint",
    "load_model",
    "load_object",
    "load_tensors",
    "save_model",
]


# Folding -------------------------------------------------------------------------------------------------


_PLAIN_CLASS = (
    "the class that config.json names builds plain layers; one that puts weight norm on itself, as those of wav2vec2, "
    "VITS and EnCodec do, looks for its pairs: load such weights with load_model"
)


def fold_checkpoint(  # noqa: PLR0913 - the options of the command, one by one
    src: Path_,
    dst: Path_,
    *,
    magnitude: Magnitude = "linear",
    zero_norm: ZeroNorm = "error",
    dim: DimOption | Mapping[str, DimOption] = "auto",
    arch: Arch | None = None,
    force: bool = False,
    in_place: bool = False,
    trust_pickle: bool = False,
    dry_run: bool = False,
    strict: bool = False,
    manifest: Path_ | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    process_group: Any = False,
    entry: str | None = None,
) -> CheckpointReport:
    """Write a copy of a checkpoint with every (g, v) folded into a plain weight; all else stays as it is.

    All three layouts, any tensor name and nesting, mixed; modules saved whole are folded as modules. The bits are
    those of `fold_weight_norm` on the live module. A file without pairs is copied, and the report says so. State
    dicts of any size go through one tensor at a time.

    >>> print(wn.fold_checkpoint("generator.pth", "plain.pth"))  # doctest: +SKIP

    Args:
        src: `.pt .pth .bin .ckpt .safetensors`, told by content; a directory of such files as the Hugging Face hub has
            them (shards and index included), or one of torch.distributed.checkpoint.
        dst: the output; its suffix decides the format, where it has one of these. A directory gives a directory.
        magnitude: "log" when pairs store the logarithm of g without saying so, as our own do.
        zero_norm: what a row with v = 0 and g != 0 becomes, which has no direction: "error", "zero" or "nan".
        dim: the axis that magnitudes stored as a plain list belong to, for all or by pattern; every other magnitude
            tells by its shape.
        arch: a model the folded state dict must load into, strictly.
        force: overwrite an existing output.
        in_place: let the output be the input.
        trust_pickle: let the file's pickle run code.
        dry_run: report, write nothing.
        strict: treat warnings as errors; nothing is written then.
        manifest: where to write a JSON table of every tensor, what was done to it, and its SHA-256.
        resume: go on where a killed run on a directory left off.
        progress: called with (bytes done, bytes in all).
        process_group: None or a group of torch.distributed, all of whose processes make this call, to share the files
            of a directory among them; a single file is written by the first of them, and the others wait for its
            report. False works alone. The output is the same to the byte.
        entry: dotted path of the one state dict or module to write, alone ("generator"); of a directory, into a file.
            None writes the whole file. Into `.safetensors`, which holds one state dict and nothing else, goes the only
            one there is, a module's as `save_model` writes it. Whatever is left out is named in a warning.

    Raises:
        InputMissingError, InputError, UnsafeFileError: about the input, see `load_tensors`.
        PairError: broken pairs, named.
        OutputExistsError, OutputError: about the output.
        VerificationError: warnings, with `strict`.
    """
    if zero_norm not in ("error", "zero", "nan"):
        raise SelectionError(f'zero_norm must be "error", "zero" or "nan", not {zero_norm!r}')
    ranks = Ranks.of(process_group)
    write = not dry_run
    output = Output(dst, "fold", force, in_place, write, strict, manifest, resume, progress, ranks=ranks, entry=entry)
    options = magnitude, zero_norm, dim, arch, trust_pickle
    with ranks.telling():
        if ranks.size == 1 or output.is_directory(src):
            return _fold_file(src, output, *options)
        alone = replace(output, ranks=Ranks())
        report = _fold_file(src, alone, *options) if ranks.rank == 0 else None
        first: CheckpointReport = ranks.gather(report)[0]
        return first


def _fold_file(
    src: Path_,
    output: Output,
    magnitude: Magnitude,
    zero_norm: ZeroNorm,
    dim: DimOption | Mapping[str, DimOption],
    arch: Arch | None,
    trust_pickle: bool,
) -> CheckpointReport:
    output.check(src)
    whole = trust_pickle or arch is not None
    opened = _open(output, src, magnitude, zero_norm, whole=whole, trust=trust_pickle)
    with named(src), opened as (stored, maker, folder, left):
        if dim != "auto":
            choose, states = ByName(dim=dim), state_dicts(stored.content)
            if not spread_magnitudes(states, choose):
                raise SelectionError("dim (--dim) is for magnitudes stored as a plain list; there are none here")
            choose.check(states)
        known_magnitude(magnitude)
        report = fold_with(maker, stored.content)
        report = replace(report, warnings=(*report.warnings, *left))
        for where, module in modules_in(stored.content):
            with _surgery_on(src):
                report = _merged(report, _fold_module(where, module, maker))
        if arch is not None:
            model = fold_weight_norm(build(arch))
            state, prefix = state_for(src, stored.content, model, None)
            load_into(model, stripped(state, prefix), src, magnitude)
        if not report.steps:
            report = replace(report, warnings=(*report.warnings, "no weight norm in this file: nothing to fold"))
        elif folder is not None and (Path(src) / "config.json").exists():
            report = replace(report, assumptions=(*report.assumptions, _PLAIN_CLASS))
        return _deliver(output, src, stored, report, maker, folder)


@contextmanager
def _open(
    output: Output, src: Path_, magnitude: Magnitude, zero_norm: ZeroNorm, *, whole: bool, trust: bool
) -> Iterator[tuple[Stored, AtOnce, Folder | None, tuple[str, ...]]]:
    """What is to be written of a checkpoint, what makes its new tensors, and a warning of what is left out."""
    with _open_whole(src, magnitude, zero_norm, whole=whole, trust=trust) as (stored, maker, folder):
        _refuse_empty(src, stored.content)
        chosen, left = _alone(output, src, stored, folder)
        yield chosen, maker, folder if output.entry is None else None, left


@contextmanager
def _open_whole(
    src: Path_, magnitude: Magnitude, zero_norm: ZeroNorm, *, whole: bool, trust: bool
) -> Iterator[tuple[Stored, AtOnce, Folder | None]]:
    """A checkpoint with its tensors still in the file, where that will do, and what makes the new ones."""
    if Path(src).is_dir():
        if whole:
            raise SelectionError(f"{src}: a directory; arch, data and trust_pickle are for files")
        folder = map_directory(Path(src))
        try:
            yield folder.stored, Promises(folder.source, magnitude, zero_norm), folder
        finally:
            folder.source.close()
        return
    stored = None if whole else map_store(src)
    if stored is None or stored.source is None:
        yield read(src, trust), AtOnce(magnitude, zero_norm, judge=True), None
        return
    try:
        yield stored, Promises(stored.source, magnitude, zero_norm), None
    finally:
        stored.source.close()


def _alone(output: Output, src: Path_, stored: Stored, folder: Folder | None) -> tuple[Stored, tuple[str, ...]]:
    """A checkpoint reduced to one state dict or module, where no more is to be written, and a warning of the rest."""
    flat = _is_into_safetensors(output, stored, folder)
    if folder is not None and isinstance(folder.layout, Distributed) and output.entry is None:
        return stored, ()  # its names are flat ones, of everything in it
    if output.entry is None and not flat:
        return stored, ()
    content, left = taken(src, stored.content, output.entry, flat=flat)
    if left and output.in_place:
        raise SelectionError(f"{src}: in place, what does not fit into .safetensors would be lost: {shown_names(left)}")
    return replace(stored, content=content), _left_out(left)


def _is_into_safetensors(output: Output, stored: Stored, folder: Folder | None) -> bool:
    """Whether the output is one `.safetensors` file, which holds nothing but tensors."""
    into_file = folder is None or is_file_name(output.path)
    return into_file and format_for(output.path, stored.format) == "safetensors"


def _left_out(names: Sequence[str]) -> tuple[str, ...]:
    """A warning of what the output does not hold, if there is anything."""
    return (f"left out of the output: {shown_names(names)}",) if names else ()


def _deliver(
    output: Output, src: Path_, stored: Stored, report: CheckpointReport, maker: AtOnce, folder: Folder | None
) -> CheckpointReport:
    if folder is not None and isinstance(folder.layout, Distributed) and _is_into_safetensors(output, stored, folder):
        flat = folder.layout.flattened(stored.content)[0]
        other = [key for key, value in flat.items() if not isinstance(value, Tensor | dict)]
        stored = replace(stored, content={key: value for key, value in flat.items() if key not in set(other)})
        left = f"{len(other)} entries that are no tensors are left out: {printable(', '.join(map(str, other[:5])))}"
        report = replace(report, warnings=(*report.warnings, left)) if other else report
    if isinstance(stored.content, nn.Module) and format_for(output.path, stored.format) == "safetensors":
        tensors, extra = only_tensors(stored.content.state_dict())
        stored = replace(stored, content=tensors)
        report = replace(report, warnings=(*report.warnings, *_left_out(extra)))
    if folder is None or is_file_name(output.path):
        return deliver(output, src, stored, report, maker)
    assert isinstance(maker, Promises)
    return deliver_directory(output, Path(src), folder, report, maker)


def _fold_module(where: str, module: nn.Module, maker: AtOnce) -> CheckpointReport:
    found = []
    for slot in slots(module):
        if slot.form in WEIGHT_NORM and slot.tensor is not None and slot.magnitude is not None:
            shape, name = tuple(slot.tensor.shape), _joined(where, slot.fqn)
            rule: Any = getattr(slot.module, "parametrizations", {})
            own = rule[slot.parameter][0] if slot.form == "ours" else None
            axes = own.axes if own else Axes.of_pair(slot.magnitude.shape, shape)
            log = own is not None and own.magnitude == "log"
            pair = pair_of(slot.fqn, "legacy" if slot.form == "legacy" else "parametrized", log=log)
            step = Step("folded", name, pair.keys, (slot.fqn,), axes, shape, _type(slot.tensor), log, where)
            found.append((slot, step, slot.magnitude.detach(), slot.tensor.detach()))
    lost = [rows_without_direction(g, v, step.axes, _scale(step)) for _, step, g, v in found]
    for (_, step, _, _), rows in zip(found, lost, strict=True):
        if rows is not None:
            count = f"{printable(step.name)}: {int(rows.sum())} of {rows.numel()} rows have v = 0 and g != 0"
            if maker.zero_norm == "error":
                hint = "zero_norm='zero' or 'nan' (--zero-norm) says what to write"
                raise PairError(f"{count}, so no direction to fold along", hint=hint)
            maker.notes.append(f"{count}; folded to {maker.zero_norm}")
    fold_weight_norm(module)
    for (slot, step, g, v), rows in zip(found, lost, strict=True):
        weight = getattr(slot.module, slot.parameter).detach()
        if rows is not None and maker.zero_norm == "nan":
            weight.masked_fill_(
                step.axes.spread(rows.squeeze(1) if step.axes.groups > 1 else rows, weight), float("nan")
            )
        maker.measure(step, (g, v), (weight,))
    return CheckpointReport(tuple(step for _, step, _, _ in found), warnings=tuple(maker.notes))


def _scale(step: Step) -> Magnitude:
    return "log" if step.log else "linear"


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
    strict: bool = False,
    manifest: Path_ | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    entry: str | None = None,
) -> CheckpointReport:
    """Write a copy of a checkpoint with its weights under weight norm, bit for bit the same function.

    A state dict is converted by names, and the report states what had to be assumed about axes; with `arch` the
    model's layers say which weights and axes. A module saved whole is converted as a module. Pairs in another
    layout are re-keyed.

    >>> print(wn.convert_checkpoint("plain.pt", "wn.pt", dim={"ups.*": 1}))  # doctest: +SKIP

    Args:
        src, dst, force, in_place, trust_pickle, dry_run, strict, manifest, resume, progress, entry: as in
            `fold_checkpoint`.
        layout: "parametrized" (torch's present keys) or "legacy" (`weight_g`, `weight_v`); for state dicts.
        include, exclude, dim: which weights and which kept axes; globs or `re:` patterns on names, see `convert_state`.
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
    write = not dry_run
    output = Output(dst, "convert", force, in_place, write, strict, manifest, resume, progress, entry=entry)
    output.check(src)
    whole = trust_pickle or arch is not None or init != "preserve" or batch_norm != "keep"
    selection = {"include": include, "exclude": exclude, "dim": dim, "magnitude": magnitude}
    setup = {"init": init, "data": data, "init_scale": init_scale, "batch_norm": batch_norm, "inputs": inputs}
    opened = _open(output, src, magnitude, "error", whole=whole, trust=trust_pickle)
    with named(src), opened as (stored, maker, folder, left):
        report = _convert(src, stored.content, layout, arch, selection, setup, maker)
        report = replace(report, warnings=(*report.warnings, *left))
        if not report.steps and not _holds_weight_norm(stored.content):
            reasons = "; ".join(f"{printable(s.name)}: {s.reason}" for s in report.skipped[:3])
            raise SelectionError(
                f"{src}: no weight to convert", hint=reasons or "it has no tensor of 2 or more dimensions"
            )
        return _deliver(output, src, stored, report, maker, folder)


def _holds_weight_norm(content: Any) -> bool:
    pairs = any(plan_fold(state)[0] for state in state_dicts(content))
    return pairs or any(is_weight_normed(module) for _, module in modules_in(content))


def _refuse_empty(path: Path_, content: Any) -> None:
    if not state_dicts(content) and not modules_in(content):
        raise InputError.of(path, "holds no tensors under names, and no module")


Options = Mapping[str, Any]


def _convert(
    path: Path_,
    content: Any,
    layout: Layout,
    arch: Arch | None,
    selection: Options,
    setup: Options,
    maker: AtOnce,
) -> CheckpointReport:
    """Convert a loaded file in place, by whichever of the three ways it calls for."""
    if setup["init"] not in ("preserve", "data", "fan"):
        raise SelectionError(f'init must be "preserve", "data" or "fan", not {setup["init"]!r}')
    if (setup["init"] == "data") != (setup["data"] is not None):
        raise SelectionError('init="data" and data go together')
    if setup["init"] == "preserve" and setup["init_scale"] != 1.0:
        raise SelectionError('init_scale goes with init="data" or init="fan"')
    if setup["batch_norm"] == "keep" and setup["inputs"] is not None:
        raise SelectionError('inputs go with batch_norm="fold" or batch_norm="mean-only"')
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
        return _convert_with_model(path, content, build(arch), layout, selection, setup)
    if setup["init"] != "preserve":
        raise SelectionError(f"init={setup['init']!r} needs the model", hint="arch='package.module:factory' (--arch)")
    if setup["batch_norm"] != "keep":
        reason = "a state dict alone does not say what a BatchNorm follows: batch_norm needs the model"
        raise SelectionError(reason, hint="arch='package.module:factory' (--arch)")
    choose = ByName(selection["include"], selection["exclude"], selection["dim"])
    spread_magnitudes(state_dicts(content), choose)
    return convert_chosen(content, choose, layout=layout, magnitude=selection["magnitude"], maker=maker)


def _convert_module(where: str, module: nn.Module, selection: Options, setup: Options) -> CheckpointReport:
    with without_batch_norm(module, setup["batch_norm"], setup["inputs"], data=setup["data"]) as done:
        plan, log = _plan(module, selection), selection["magnitude"] == "log"
        steps = []
        for site in plan.sites:
            name, shape = _joined(where, site.fqn), tuple(site.weight.shape)
            keys, kind = pair_of(site.fqn, "parametrized", log=log).keys, _type(site.weight)
            steps.append(Step("converted", name, (site.fqn,), keys, site.axes, shape, kind, log, where))
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
    state, prefix = state_for(path, content, model, None)
    with _cut_state(path, state, prefix, model, selection, setup) as done:
        plan = _plan(model, selection)
    axes = {name: site.axes for site in plan.sites for slot in site.owners for name in slot.names}
    choose = ByModel(state.path, prefix, axes, {s.name: s.reason for s in plan.skipped})
    report = convert_chosen(content, choose, layout=layout, magnitude=selection["magnitude"])
    report = replace(report, batch_norm=_norm_report(_joined(state.path, prefix.rstrip(".")), done, setup))
    if setup["init"] != "preserve":
        # the file has its new keys; the model, initialised in memory, gives them new values
        load_into(model, stripped(state, prefix), path, selection["magnitude"])
        apply_weight_norm(model, **selection)
        report = replace(report, initialisation=_initialised(model, setup))
        ours = StateDict("", dict(model.state_dict()))
        for name, tensor in translate(ours, stripped(state, prefix), magnitude=selection["magnitude"]).items():
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
    load_into(model, stripped(state, prefix), path, magnitude)
    before, held = dict(model.state_dict()), set(plain_keys(stripped(state, prefix)))
    with without_batch_norm(model, setup["batch_norm"], setup["inputs"], data=setup["data"]) as done:
        after = dict(model.state_dict())
        fresh = {k: v for k, v in after.items() if k not in held or v.data_ptr() != before[k].data_ptr()}
        new = translate(StateDict("", fresh), stripped(state, prefix), magnitude=magnitude)
        for name in before.keys() - after.keys():
            state.entries.pop(prefix + name, None)
        state.entries.update((prefix + name, tensor) for name, tensor in new.items())
        yield done


# Writing -------------------------------------------------------------------------------------------------


def save_model(model: nn.Module, path: Path_, *, force: bool = False, state_only: bool = False) -> None:
    """Save a module whole, or its state dict (`state_only`, or a `.safetensors` path); whole or not at all.

    >>> wn.save_model(nn.Linear(3, 2), "linear.pt")  # doctest: +SKIP

    Args:
        model: any module; a whole one is pickled, which asks who loads it to trust the file.
        path: the output; its suffix decides the format, `.safetensors` or torch's own.
        force: overwrite an existing output.
        state_only: save the state dict alone.

    Raises OutputExistsError unless `force`; OutputError when it cannot be written or pickled.
    """
    kind = format_for(path, "torch")
    check_output(path, force=force)
    content = model.state_dict() if state_only or kind == "safetensors" else model
    write_store(path, Stored(content, kind), force=force)


def _merged(a: CheckpointReport, b: CheckpointReport) -> CheckpointReport:
    return CheckpointReport(
        a.steps + b.steps,
        a.skipped + b.skipped,
        a.assumptions + b.assumptions,
        a.warnings + b.warnings,
        b.initialisation or a.initialisation,
        batch_norm=_merged_norms(a.batch_norm, b.batch_norm),
    )


def _merged_norms(a: BatchNormPlan | None, b: BatchNormPlan | None) -> BatchNormPlan | None:
    return b if a is None else a if b is None else BatchNormPlan(a.steps + b.steps, a.kept + b.kept)


@contextmanager
def _surgery_on(path: Path_) -> Iterator[None]:
    """A module from a file has whatever attributes the file gave it; those that break surgery are damage."""
    try:
        yield
    except (AttributeError, LookupError, TypeError) as error:
        raise InputError.of(path, f"damaged module ({type(error).__name__}: {printable(error)})") from error


def _joined(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
