"""Batch normalization surgery: fold it into the layer beside it, or keep only its mean, as the paper does.

In evaluation a BatchNorm is y = a (x - m) + beta with a = gamma / sqrt(var + eps), so the layer that makes x can take
it: w' = a w, b' = a (b - m) + beta; or the layer that takes y: its columns times a. Mean-only batch normalization moves
a into the layer's g, and keeps a m as running mean and beta as bias.

Source of mean-only batch normalization: Salimans & Kingma 2016, section 4 (arXiv 1602.07868).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from wnsurgery.affine import Affine, Holdings, affine_of, any_not_finite, wide
from wnsurgery.carried_state import Heir
from wnsurgery.dataflow import Neighbour, Traces
from wnsurgery.errors import NonFiniteWeightError, SelectionError
from wnsurgery.mean_only import MeanOnlyBatchNorm, MeanOnlyBatchNorm1d, MeanOnlyBatchNorm2d, MeanOnlyBatchNorm3d
from wnsurgery.snapshot import HOOKS, Snapshot
from wnsurgery.tracing import trace
from wnsurgery.walk import check_module

__all__ = [
    "BatchNormMode",
    "BatchNormPlan",
    "BatchNormStep",
    "KeptBatchNorm",
    "folded_means",
    "plan_batch_norm",
    "without_batch_norm",
]

_log = logging.getLogger("wnsurgery")

BatchNormMode = Literal["keep", "fold", "mean-only"]
_MEAN_ONLY = {0: MeanOnlyBatchNorm1d, 1: MeanOnlyBatchNorm1d, 2: MeanOnlyBatchNorm2d, 3: MeanOnlyBatchNorm3d}
_DIMENSIONS = {nn.BatchNorm1d: (0, 1), nn.BatchNorm2d: (2,), nn.BatchNorm3d: (3,), nn.SyncBatchNorm: (0, 1, 2, 3)}
_LINK = "_producer"  # on a mean-only BatchNorm: (the layer before it,), in a tuple so that it is not a child


@dataclass(frozen=True)
class BatchNormStep:
    """One BatchNorm that goes: its name, the layer that takes it, and how ("before", "after", "mean-only").

    "before" folds it into the layer before it, "after" into the layer after it; "mean-only" moves its scale into
    the layer before it and leaves a mean-only batch normalization in its place.
    """

    name: str
    layer: str
    how: Literal["before", "after", "mean-only"]


@dataclass(frozen=True)
class KeptBatchNorm:
    """One BatchNorm that stays, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class BatchNormPlan:
    """What BatchNorm surgery would do, or did; prints as text.

    Attributes:
        steps: the BatchNorms that go, in the order they are taken.
        kept: those that stay, each with the reason.

    >>> plan = wn.plan_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    >>> plan.steps[0].name, plan.steps[0].layer, plan.steps[0].how, plan.kept
    ('1', '0', 'before', ())
    """

    steps: tuple[BatchNormStep, ...] = ()
    kept: tuple[KeptBatchNorm, ...] = ()

    def __str__(self) -> str:
        words = {"before": "folded into", "after": "folded forward into", "mean-only": "mean-only, its scale in"}
        lines = [f"{len(self.steps)} BatchNorms taken, {len(self.kept)} kept"]
        lines += [f"  {step.name}: {words[step.how]} {step.layer}" for step in self.steps]
        return "\n".join([*lines, *(f"  {kept.name}: kept: {kept.reason}" for kept in self.kept)])


@dataclass(frozen=True)
class _Cut:
    """A step with the modules it is about."""

    step: BatchNormStep
    norm: Any = field(repr=False)
    layer: Affine = field(repr=False)


def plan_batch_norm(
    model: nn.Module, inputs: Any = None, *, mode: Literal["fold", "mean-only"] = "fold"
) -> BatchNormPlan:
    """What `apply_weight_norm(model, batch_norm=mode)` would do to each BatchNorm, without doing it.

    The data flow is found by tracing the model's forward, in evaluation mode: every branch of it, called with what it
    requires and the defaults of the rest. With `inputs` a real run is watched as well. Taken is a BatchNorm with
    running statistics whose input is the output of one layer that goes nowhere else; in mode "fold" also one
    whose output goes to one Linear, or to one convolution that pads with no zeros. Only Identity and Dropout may
    stand between. All others are kept, with the reason.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8))
    >>> print(wn.plan_batch_norm(model))
    1 BatchNorms taken, 1 kept
      1: folded into 0
      3: kept: its input comes from 2 (ReLU), not from a layer

    Args:
        model: any module tree; left as it is.
        inputs: example arguments: a tensor, a tuple of positional ones, a mapping of keyword ones. They help where
            the forward cannot be traced, and tell (N, C) from (N, L, C): without them, BatchNorm1d after a Linear is
            taken to see (N, C) unless the trace shows otherwise.
        mode: "fold" or "mean-only".

    Raises SelectionError for another mode, or when the model fails on the inputs.
    """
    return _plan(model, mode, inputs)[0]


@contextmanager
def without_batch_norm(
    model: nn.Module, mode: BatchNormMode, inputs: Any = None, *, data: Any = None
) -> Iterator[BatchNormPlan]:
    """Carry out the surgery; gives what was done, and undoes it if anything inside the block raises.

    What is kept is logged as "wnsurgery", with the reason. Without inputs, a batch of `data` may serve.

    Raises:
        SelectionError: as `plan_batch_norm`.
        NonFiniteWeightError: a BatchNorm whose scale or shift is not finite, or makes a weight so; named.
    """
    if mode == "keep":
        yield BatchNormPlan()
        return
    plan, cuts = _plan(model, mode, inputs, data)
    touched = [module for cut in cuts for module in (cut.norm, cut.layer.module)]
    tensors = [(t, t.data) for cut in cuts for t in cut.layer.tensors()]
    before = Snapshot(touched)
    try:
        with torch.inference_mode(False), torch.no_grad():
            for cut in cuts:
                _carry_out(cut)
        for kept in plan.kept:
            _log.warning("BatchNorm %s is kept: %s", kept.name or "(the model)", kept.reason)
        _log.info("%d BatchNorms taken (%s)", len(plan.steps), mode)
        yield plan
    except BaseException:
        before.restore()
        for tensor, values in tensors:
            tensor.data = values
        raise


# Planning ------------------------------------------------------------------------------------------------


def _plan(model: nn.Module, mode: str, inputs: Any, data: Any = None) -> tuple[BatchNormPlan, list[_Cut]]:
    if mode not in ("fold", "mean-only"):
        raise SelectionError(f'batch_norm must be "keep" (in apply_weight_norm), "fold" or "mean-only", not {mode!r}')
    check_module(model)
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    if not norms:
        return BatchNormPlan(), []
    chooser = _Chooser(model, _traced(model, inputs, data), mode)
    cuts: list[_Cut] = []
    reasons: dict[str, str] = {}
    found = True
    while found:  # what goes lets others reach through
        found = False
        for name, norm in norms:
            if id(norm) in chooser.gone or (mode == "mean-only" and any(cut.norm is norm for cut in cuts)):
                continue
            cut = chooser.cut(name, norm)
            if isinstance(cut, str):
                reasons[name] = cut
                continue
            cuts.append(cut)
            found = True
            if mode == "fold":
                chooser.gone.add(id(norm))
    taken = {id(cut.norm) for cut in cuts}
    kept = tuple(KeptBatchNorm(name, reasons[name]) for name, norm in norms if id(norm) not in taken)
    return BatchNormPlan(tuple(cut.step for cut in cuts), kept), cuts


class _Chooser:
    """Decides about one BatchNorm after the other; `gone` are those already folded away."""

    def __init__(self, model: nn.Module, traces: Traces, mode: str) -> None:
        self.traces, self.mode = traces, mode
        self.holdings = Holdings(model)
        self.gone: set[int] = set()

    def cut(self, name: str, norm: _BatchNorm) -> _Cut | str:
        fault = _norm_fault(norm) or self._read(norm)
        if fault:
            return fault
        before = self.traces.before(norm, self.gone)
        layer = self.layer_before(norm, before)
        if isinstance(layer, Affine):
            how: Literal["before", "mean-only"] = "mean-only" if self.mode == "mean-only" else "before"
            return _Cut(BatchNormStep(name, self.traces.names[id(layer.module)], how), norm, layer)
        if self.mode == "fold":
            after = self.layer_after(norm, self.traces.after(norm, self.gone))
            if isinstance(after, Affine):
                return _Cut(BatchNormStep(name, self.traces.names[id(after.module)], "after"), norm, after)
        return layer

    def layer_before(self, norm: nn.Module, before: Neighbour, *, scale: bool = True) -> Affine | str:
        """The layer whose output alone is a norm's input, or the reason why there is none to take it."""
        layer = self._affine(before, forwards=False)
        if isinstance(layer, str):
            return layer
        return (
            before.fault or self._misfit(norm, layer, layer.outputs, before.rank) or self._fault(layer, scale) or layer
        )

    def layer_for_mean(self, norm: nn.Module, link: nn.Module | None) -> Affine | str:
        """The layer whose bias takes the mean of a norm; `link`: the one it was converted from, where there is one."""
        before = self.traces.before(norm)
        if link is not None and before.hidden and self.traces.after(link).hidden:
            return affine_of(link)
        return self.layer_before(norm, before, scale=False)

    def layer_after(self, norm: nn.Module, after: Neighbour) -> Affine | str:
        layer = self._affine(after, forwards=True)
        if isinstance(layer, str):
            return layer
        fault = after.fault or self._misfit(norm, layer, layer.inputs, after.rank) or self._fault(layer, True)
        return fault or layer.forward_fault() or layer

    def _affine(self, neighbour: Neighbour, *, forwards: bool) -> Affine | str:
        if neighbour.module is None:
            return neighbour.fault
        name = self.traces.names.get(id(neighbour.module))
        if name is None:
            return f"its neighbour ({type(neighbour.module).__name__}) is not a registered submodule"
        layer = affine_of(neighbour.module)
        if isinstance(layer, Affine):
            return layer
        kind = f"{name} ({type(neighbour.module).__name__})"
        if layer:
            return f"{kind}: {layer}"
        if forwards:
            return f"its output goes to {kind}, not to a layer"
        return f"its input comes from {kind}, not from a layer"

    def _misfit(self, norm: nn.Module, layer: Affine, channels: int, rank: int | None) -> str:
        """Whether a norm's channels, axis 1, are the layer's."""
        name = self.traces.names[id(layer.module)]
        if norm.num_features != channels:
            return f"its {norm.num_features} channels are not the {channels} of {name}"
        if layer.dimensions not in _dimensions(norm):
            return f"{type(norm).__name__} does not take its channels from a {type(layer.module).__name__} ({name})"
        if rank is not None and rank != layer.dimensions + 2:
            return f"its channels (axis 1) are not those of {name} on a {rank}-dimensional input"
        return ""

    def _fault(self, layer: Affine, scale: bool) -> str:
        read = self.traces.read(layer.module)
        name = self.traces.names[id(layer.module)]
        if read:
            return f"a tensor of {name} is also read directly (by {read})"
        fault = self.holdings.fault(layer, scale=scale)
        return fault and f"{name}: {fault}"

    def _read(self, norm: nn.Module) -> str:
        read = self.traces.read(norm)
        return f"one of its tensors is also read directly (by {read})" if read else ""


def _dimensions(norm: nn.Module) -> tuple[int, ...]:
    """The numbers of positional axes a norm can have: (N, C) has none."""
    if isinstance(norm, MeanOnlyBatchNorm):
        return tuple(rank - 2 for rank in norm.ranks)
    return next((d for cls, d in _DIMENSIONS.items() if isinstance(norm, cls)), ())


def _norm_fault(norm: _BatchNorm) -> str:
    """Why a BatchNorm is no fixed affine map in evaluation; empty if it is."""
    maker = next(cls for cls in type(norm).__mro__ if "forward" in vars(cls))
    if maker not in (_BatchNorm, nn.SyncBatchNorm) or "forward" in vars(norm) or not _dimensions(norm):
        return f"{type(norm).__name__} is not torch's own BatchNorm: it has a forward of its own"
    if "parametrizations" in norm._modules:
        return "its parameters are parametrized"
    if any(vars(norm).get(table) for table in HOOKS):
        return "it carries a hook"
    held = [t for t in (*norm._parameters.values(), *norm._buffers.values()) if t is not None]
    if any(is_lazy(t) for t in held):
        return "lazy: not initialised yet; run one forward pass first"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics (track_running_stats=False): it normalizes by the batch in evaluation, too"
    return ""


def _traced(model: nn.Module, inputs: Any, data: Any) -> Traces:
    """The data flow, watched on the inputs, or on a batch of the data if the model can be called with one."""
    if inputs is None and data is not None:
        try:
            return trace(model, _example(model, data))
        except SelectionError:  # data may be meant for another way of calling the model
            return trace(model)
    return trace(model, inputs)


def _example(model: nn.Module, data: Any) -> Any:
    """One batch out of data for initialisation; None where taking one would use it up."""
    batch = data
    if not isinstance(data, Tensor | Mapping | tuple) and not hasattr(data, "keys"):
        if not isinstance(data, Iterable) or iter(data) is data:
            return None
        with torch.random.fork_rng(devices=[]):
            batch = next(iter(data), None)
    first = next(model.parameters(), None)
    if isinstance(batch, tuple | list):  # labels and the like, which forward does not take, come last
        parameters = inspect.signature(model.forward).parameters.values()
        wanted = sum(
            p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters
        )
        batch = tuple(batch[: max(1, wanted)])
    return batch if first is None else pytree.tree_map_only(Tensor, lambda t: t.to(first.device), batch)


# Carrying out --------------------------------------------------------------------------------------------


def _carry_out(cut: _Cut) -> None:
    norm, layer = cut.norm, cut.layer
    scale, mean, beta = _affine_map(norm)
    how = cut.step.how
    if how == "after":
        layer.scale_inputs(scale, beta - scale * mean, like=norm.bias)
        _become(norm, nn.Identity())
    elif how == "before":
        layer.scale_outputs(scale)
        old = layer.bias_values()
        layer.set_bias(scale * (old - mean) + beta, like=norm.bias)
        _become(norm, nn.Identity())
    else:
        running = scale * (mean - layer.bias_values())
        layer.scale_outputs(scale)
        layer.drop_bias()
        _become(norm, _mean_only(norm, layer, running))
        norm.__dict__[_LINK] = (layer.module,)
    held = [*layer.tensors(), *(t for t in (*norm._parameters.values(), *norm._buffers.values()) if t is not None)]
    if any_not_finite(held):
        raise NonFiniteWeightError(f"{cut.step.name}: folding it makes {cut.step.layer} infinite or NaN")


def _affine_map(norm: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """(a, m, beta) of y = a (x - m) + beta, in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = wide(norm.running_mean), wide(norm.running_var)
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * wide(norm.weight)
    return scale, mean, torch.zeros_like(mean) if norm.bias is None else wide(norm.bias)


def _mean_only(norm: Any, layer: Affine, running: Tensor) -> MeanOnlyBatchNorm:
    made = _MEAN_ONLY[layer.dimensions](
        norm.num_features,
        norm.momentum,
        bias=norm.bias is not None,
        sync=isinstance(norm, nn.SyncBatchNorm),
        process_group=getattr(norm, "process_group", None),
        device="meta",
    )
    made.track_running_stats = norm.track_running_stats
    made._parameters["bias"] = norm.bias
    made._buffers["running_mean"] = running.to(norm.running_mean)
    made._buffers["num_batches_tracked"] = norm.num_batches_tracked
    return made


def _become(old: nn.Module, new: nn.Module) -> None:
    """Turn a module into another in place, so that whoever holds it, holds the new one."""
    training = old.training
    old.__class__ = type(new)
    old.__dict__.clear()
    old.__dict__.update(new.__dict__)
    old.training = training


# Folding mean-only batch normalization -------------------------------------------------------------------


def folded_means(model: nn.Module, modules: Sequence[nn.Module]) -> list[Callable[[], Heir | None]]:
    """What folds every mean-only BatchNorm among the modules of a model: functions to call without arguments, none of
    which can fail. Each returns the norm's bias, if it had one, with the layer's bias that it went into.

    Each goes into the layer that tracing finds before it: modules may have been put together anew since the conversion.
    Where code around it cannot be traced, it goes into the layer it was converted from. Logs a warning for each that
    cannot be folded, with the reason.
    """
    if not any(issubclass(kind, MeanOnlyBatchNorm) for kind in set(map(type, modules))):
        return []
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, MeanOnlyBatchNorm)]
    inside = {id(m) for m in model.modules()}
    chooser = _Chooser(model, trace(model), "mean-only")
    actions: list[Callable[[], Heir | None]] = []
    shifts: dict[int, Tensor] = {}
    for name, norm in norms:
        link = vars(norm).get(_LINK, ())
        layer: Affine | str
        if norm.running_mean is None:
            layer = "it has no running mean (track_running_stats=False): it subtracts that of the batch"
        else:
            layer = chooser.layer_for_mean(norm, link[0] if len(link) == 1 and id(link[0]) in inside else None)
        if isinstance(layer, str):
            _log.warning("mean-only BatchNorm %s is kept: %s", name or "(the model)", layer)
            continue
        shift = _fold_mean(norm, layer, shifts)
        if any_not_finite([shift]):
            raise NonFiniteWeightError(f"{name}: its mean or bias is not finite")
        actions.append(partial(_put_mean, norm, layer, shift))
    return actions


def _fold_mean(norm: MeanOnlyBatchNorm, layer: Affine, shifts: dict[int, Tensor]) -> Tensor:
    """The layer's bias with a norm's in it, in float64."""
    assert norm.running_mean is not None
    shift = shifts.get(id(layer.module), layer.bias_values()) - wide(norm.running_mean)
    if norm.bias is not None:
        shift = shift + wide(norm.bias)
    shifts[id(layer.module)] = shift
    return shift


def _put_mean(norm: MeanOnlyBatchNorm, layer: Affine, shift: Tensor) -> Heir | None:
    """Returns what became of the norm's bias."""
    old, made = norm.bias, layer.bias is None
    layer.set_bias(shift, like=old)
    _become(norm, nn.Identity())
    return None if old is None or layer.bias is None else Heir(old, layer.bias, made)
