"""Data-dependent initialisation: set g and the bias so that every pre-activation starts with mean 0, variance 1.

The paper's recipe (section 3, equation 6): with t = v.x / ||v|| over one batch, g = 1/std[t] and b = -mean[t]/std[t],
layer by layer in execution order, later layers seeing the outputs of initialised earlier ones. One forward
pass does it: each layer runs with g = 1 and b = 0, its output is measured, g and b are set, and the output is
replaced by what the layer now gives.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from wnsurgery.errors import InputError, SelectionError
from wnsurgery.layers import layer_of
from wnsurgery.plan import Pattern, Skipped, matches, patterns
from wnsurgery.walk import Slot, slots

__all__ = ["InitReport", "LayerInit", "data_dependent_init"]

_FORMS = ("ours", "torch", "legacy")


@dataclass(frozen=True)
class LayerInit:
    """One initialised weight: its name, number of channels, and the channels left as they were.

    `constant` are channels whose pre-activation did not vary over the batch; `scale_only` says that the layer
    has no bias to take the mean away with: none at all, a frozen one, or one shared with another layer.
    """

    name: str
    channels: int
    constant: tuple[int, ...]
    scale_only: bool


@dataclass(frozen=True)
class InitReport:
    """What data-dependent initialisation did; prints as text.

    Attributes:
        initialised: the weights whose g (and bias) were set, in execution order.
        left: the weight-normalized weights that keep their g, each with the reason.
    """

    initialised: tuple[LayerInit, ...]
    left: tuple[Skipped, ...]

    def __str__(self) -> str:
        lines = [f"{len(self.initialised)} weights initialised from data, {len(self.left)} left as they were"]
        for layer in self.initialised:
            notes = [f"{len(layer.constant)} of {layer.channels} channels constant"] if layer.constant else []
            notes += ["scale only: no bias"] if layer.scale_only else []
            lines.append(f"  {layer.name}: {layer.channels} channels" + "".join(f"; {n}" for n in notes))
        return "\n".join([*lines, *(f"  {skip.name}: {skip.reason}" for skip in self.left)])


def data_dependent_init(
    model: nn.Module,
    data: Any,
    *,
    include: Pattern | None = None,
    exclude: Pattern | None = None,
    init_scale: float = 1.0,
    training: bool | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> InitReport:
    """Set g and the bias of weight-normalized layers from one batch of data, in place.

    Afterwards every pre-activation the batch reaches has mean 0 and standard deviation `init_scale` per output
    channel, over the batch and all positions. Directions v stay. A layer called several times is set by its
    first call; one without a bias of its own gets its scale only; a channel that does not vary over the batch keeps
    its g and b. Recurrent, attention-packed and lookup weights keep theirs, as do weights tied to these and layers the
    data never reaches: each is named in the report. Modes, random state, buffers (running statistics) and gradients
    are as before; on an error g and b are, too. Calling again with the same data gives the same result.

    >>> model = apply_weight_norm(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)))
    >>> report = data_dependent_init(model, torch.randn(500, 3))
    >>> [layer.name for layer in report.initialised]
    ['0.weight', '2.weight']

    Args:
        model: a module tree with weight-normalized layers.
        data: one batch (a tensor; a tuple of positional arguments; a mapping of keyword arguments) or an
            iterable of batches such as a DataLoader, whose first batch is taken. Of a tuple or list as many
            elements are passed as `model.forward` requires, so the labels in (inputs, labels) are left out.
        include, exclude: patterns as in `plan_weight_norm`.
        init_scale: target standard deviation, e.g. 0.1 for the last layer of a residual branch.
        training: run in training (True) or evaluation mode (False); None keeps each module's own mode. The paper's
            authors ran it with dropout on.
        forward: `forward(model, batch)` for models that are called in another way.

    Raises:
        SelectionError: no weight-normalized weight is selected, init_scale is not positive and finite, or the model
            holds lazy tensors.
        InputError: data is empty or gives pre-activations that are not finite.
    """
    if not 0 < init_scale < math.inf:
        raise SelectionError(f"init_scale must be positive, not {init_scale!r}")
    found = slots(model)
    chosen = _select(found, include, exclude)
    run = _Run(init_scale, chosen, found)
    with _undisturbed(model, training), run.hooks():
        batch = _to_device(_first_batch(data), model)
        (forward or _call)(model, batch)
    return run.report(chosen)


def _select(everything: list[Slot], include: Pattern | None, exclude: Pattern | None) -> list[Slot]:
    found = [slot for slot in everything if slot.form in _FORMS]
    names = [slot.fqn for slot in found]
    for option, wish in (("include", include), ("exclude", exclude)):
        for pattern in patterns(wish):
            if not any(matches(pattern, slot) for slot in found):
                raise SelectionError.no_match(option, str(pattern), names)
    chosen = [s for s in found if include is None or any(matches(p, s) for p in patterns(include))]
    chosen = [s for s in chosen if not any(matches(p, s) for p in patterns(exclude))]
    if not chosen:
        raise SelectionError("no weight-normalized weight to initialise", hint="call apply_weight_norm first")
    return chosen


# One pass ------------------------------------------------------------------------------------------------


class _Run:
    """The hooks of one pass and what they saw."""

    def __init__(self, init_scale: float, chosen: list[Slot], everything: list[Slot]) -> None:
        self.init_scale = init_scale
        self.done: list[LayerInit] = []
        self.reasons: dict[str, str] = {}
        self.set_by: dict[int, str] = {}  # id(g) -> the weight whose module set it
        self.undo: list[tuple[Tensor, Tensor]] = []
        self.targets: list[tuple[Slot, int]] = []
        beside, sharing, owners = defaultdict(list), defaultdict(list), Counter[int]()
        for slot in everything:
            beside[id(slot.module)].append(slot)
            sharing[id(slot.magnitude)].append(slot)
            owners[id(slot.tensor)] += 1
        self.shared = {key for key, count in owners.items() if count > 1}
        for slot in chosen:
            reason, axis = _how(slot)
            reason = reason or _entangled(slot, beside[id(slot.module)], sharing[id(slot.magnitude)])
            if reason or axis is None:
                self.reasons[slot.fqn] = reason
            else:
                self.targets.append((slot, axis))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        try:
            for slot, axis in self.targets:
                layer = _Layer(self, slot, axis)
                handles.append(slot.module.register_forward_pre_hook(layer.before, prepend=True))
                handles.append(slot.module.register_forward_hook(layer.after, prepend=True))
            yield
        except BaseException:
            for tensor, old in reversed(self.undo):
                tensor.copy_(old)
            raise
        finally:
            for handle in handles:
                handle.remove()

    def report(self, chosen: list[Slot]) -> InitReport:
        reached = {layer.name for layer in self.done}
        left = []
        for slot in chosen:
            if slot.fqn not in reached:
                setter = self.set_by.get(id(slot.magnitude))
                tied = f"shares its magnitude with {setter}" if setter else ""
                reason = self.reasons.get(slot.fqn) or tied or "the data never reaches it through a module call"
                left.append(Skipped(slot.fqn, slot.shape, reason))
        return InitReport(tuple(self.done), tuple(left))


class _Layer:
    """One layer during the pass: measured at its first call."""

    def __init__(self, run: _Run, slot: Slot, axis: int) -> None:
        self.run, self.slot, self.axis = run, slot, axis
        self.measuring = False

    def before(self, module: nn.Module, args: Any) -> None:
        g = self._g
        if id(g) in self.run.set_by:
            return
        self.run.set_by[id(g)] = self.slot.fqn
        self.measuring = True
        self.old = [(t, t.detach().clone()) for t in (g, self._bias) if t is not None]
        self.run.undo += self.old
        with torch.no_grad():
            g.fill_(0.0 if _is_log(self.slot) else 1.0)
            if self._bias is not None:
                self._bias.zero_()

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.measuring:
            return None
        self.measuring = False
        with torch.no_grad():
            return self._set(output)

    def _set(self, output: Any) -> Tensor | None:
        g, bias, name = self._g, self._bias, self.slot.fqn
        size = g.numel()
        if not isinstance(output, Tensor) or output.ndim < -self.axis or output.shape[self.axis] != size:
            for tensor, old in self.old:
                tensor.copy_(old)
            self.run.reasons[name] = "its output is not one value per output channel"
            return None
        mean, std, constant = _moments(output, self.axis, name)
        old_g = self.old[0][1].double().reshape(-1)
        old_g = old_g.exp() if _is_log(self.slot) else old_g
        old_b = torch.zeros_like(mean) if bias is None else self.old[1][1].double()
        scale = torch.where(constant, old_g, self.run.init_scale / torch.where(constant, 1.0, std))
        shift = torch.where(constant, old_b, -mean * scale)
        settable = bias is not None and bias.requires_grad and id(bias) not in self.run.shared
        if not settable:
            shift = old_b
        stored = torch.where(
            constant, self.old[0][1].double().reshape(-1), scale.log() if _is_log(self.slot) else scale
        )
        g.copy_(stored.reshape(g.shape))
        if bias is not None:
            bias.copy_(shift)
        channels = tuple(constant.nonzero().flatten().tolist())
        self.run.done.append(LayerInit(name, size, channels, scale_only=not settable))
        view = [1] * output.ndim
        view[self.axis] = size
        work = torch.promote_types(output.dtype, torch.float32)
        return (output.to(work) * scale.to(work).reshape(view) + shift.to(work).reshape(view)).to(output.dtype)

    @property
    def _g(self) -> Tensor:
        assert self.slot.magnitude is not None
        return self.slot.magnitude

    @property
    def _bias(self) -> Tensor | None:
        row = layer_of(self.slot.module)
        return None if row is None or row.bias is None else self.slot.module._parameters.get(row.bias)


def _how(slot: Slot) -> tuple[str, int | None]:
    """The channel axis of a layer's output, or the reason why data cannot set its g."""
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
    per_channel = own.magnitude_shape(v.shape)
    if g.numel() != torch.Size(per_channel).numel() or (g.numel() > 1 and tuple(g.shape) != per_channel):
        return f"its magnitude {tuple(g.shape)} is not one value per output channel", None
    return "", row.output_axis


def _entangled(slot: Slot, beside: list[Slot], sharing: list[Slot]) -> str:
    """Why g and b alone do not decide a layer's output, or decide more than that; empty if neither.

    `beside` are all tensors of its module, `sharing` all weights with the same g.
    """
    row = layer_of(slot.module)
    weights = [s for s in beside if row is not None and row.axes(s.module, s.parameter)]
    if len(weights) > 1:
        return f"{', '.join(s.parameter for s in weights)}: several weights make its output"
    if any(row is not None and s.parameter == row.bias and s.form != "plain" for s in beside):
        return "its bias is parametrized"
    fixed = next((s.fqn for s in sharing if _how(s)[1] is None), None)
    return "" if fixed is None else f"shares its magnitude with {fixed}, which data cannot set"


def _is_log(slot: Slot) -> bool:
    entry: Any = getattr(slot.module, "parametrizations", {})
    return slot.form == "ours" and entry[slot.parameter][0].magnitude == "log"


def _moments(output: Tensor, axis: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and (population) standard deviation per channel in float64, and which channels do not vary."""
    rows = output.detach().movedim(axis, 0).flatten(1)
    rows = rows.to(torch.float32 if output.device.type == "mps" else torch.float64)
    mean = rows.mean(1)
    std = (rows - mean[:, None]).square().mean(1).sqrt()
    if not bool(torch.isfinite(std).all()):
        raise InputError(f"{name}: its pre-activations on this data are not finite, or the batch is empty")
    noise = 8 * torch.finfo(output.dtype).eps * rows.abs().amax(1)
    return mean, std, std <= noise


# Running the model without a trace -----------------------------------------------------------------------


@contextmanager
def _undisturbed(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Run forward passes; leave modes, random state, buffers and gradients as they were."""
    modules = list(model.modules())
    lazy = next((n for n, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t)), None)
    if lazy is not None:
        raise SelectionError(f"{lazy}: lazy, not initialised yet", hint="run one forward pass first")
    modes = [(m, m.training) for m in modules]
    buffers = [(m, n, b, b.detach().clone()) for m in modules for n, b in m._buffers.items() if b is not None]
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    try:
        eager = torch.compiler.set_stance("force_eager")  # compiled code would not run the hooks that measure
        with eager, torch.random.fork_rng(devices=sorted(devices, key=str)), torch.no_grad():
            if training is not None:
                for module in modules:
                    module.training = training
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                buffer.copy_(value)
                module._buffers[name] = buffer


def _first_batch(data: Any) -> Any:
    """One batch: data itself, or the first of an iterable of batches."""
    if isinstance(data, Tensor | Mapping | tuple) or hasattr(data, "keys"):
        return data
    if not isinstance(data, Iterable):
        raise InputError(f"data must be a batch or an iterable of batches, not {type(data).__name__}")
    for batch in data:
        return batch
    raise InputError("data is empty: it gives no batch")


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping) or hasattr(batch, "keys"):
        return model(**{key: batch[key] for key in batch.keys()})  # noqa: SIM118 - BatchEncoding iterates differently
    if isinstance(batch, tuple | list):
        return model(*batch[: _required(model, len(batch))])
    return model(batch)


def _required(model: nn.Module, available: int) -> int:
    """How many positional arguments `model.forward` cannot do without; all there are if it takes any number."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return available
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return available
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return max(1, sum(p.default is p.empty for p in positional))


def _to_device(batch: Any, model: nn.Module) -> Any:
    """The batch on the device of the model's first parameter."""
    first = next(iter(model.parameters()), None)
    if first is None:
        return batch
    if isinstance(batch, Tensor):
        return batch.to(first.device)
    if isinstance(batch, tuple | list):
        moved = [_to_device(part, model) for part in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    if isinstance(batch, Mapping) or hasattr(batch, "keys"):
        return {key: _to_device(batch[key], model) for key in batch.keys()}  # noqa: SIM118
    return batch
