"""Data-dependent initialisation: set g and the bias so that every pre-activation starts with mean 0, variance 1.

The paper's recipe (section 3, equation 6): with t = v.x / ||v|| over the data, g = 1/std[t] and b = -mean[t]/std[t],
layer by layer in execution order, later layers seeing the outputs of initialised earlier ones. One forward
pass per batch does it: each layer runs with g = 1 and b = 0, its output is measured, all batches (of all ranks) meet
there, g and b are set from their joint moments, and each output is replaced by what the layer now gives.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from wnsurgery.batches import batches_of, call_with, in_one_line, is_batch, moved
from wnsurgery.channelwise import channels_in, is_taken, standardise
from wnsurgery.directions import Directions
from wnsurgery.errors import InputError, SelectionError, WnsurgeryError
from wnsurgery.joint_norm import JointNorms
from wnsurgery.layers import has_own_forward
from wnsurgery.lockstep import Guard, Lockstep, Paused, Replay
from wnsurgery.masks import Mask, fitting, masks_of
from wnsurgery.moments import Moments, clearness
from wnsurgery.outputs import Fresh, scaled
from wnsurgery.own_state import Attributes, Spill
from wnsurgery.plan import Pattern, Skipped
from wnsurgery.ranks import Ranks
from wnsurgery.safety import as_written, uncached
from wnsurgery.targets import Scale, bias_of, is_log, scales_of, select, settable_bias, sort_out
from wnsurgery.text import columns
from wnsurgery.walk import Slot, legacy_hooks, modules_of, slots

__all__ = ["Channels", "InitReport", "LayerInit", "data_dependent_init"]

Memory = Literal["spill", "live", "recompute"]


@dataclass(frozen=True)
class Channels:
    """Mean and standard deviation of a layer's pre-activations, one value per output channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, mean: Any, std: Any, stored: Sequence[Tensor], log: bool) -> Channels:
        """Of values with these moments at g = 1 and b = 0, with g and b as stored; computed when somebody asks."""
        found = cls.__new__(cls)
        found.__dict__["_origin"] = (mean, std, stored, log)
        return found

    def __getattr__(self, name: str) -> Any:
        if name not in ("mean", "std") or "_origin" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        mean, std, (g, *b), log = self.__dict__["_origin"]
        with np.errstate(all="ignore"):
            scale = _scale(g, log)
            self.__dict__["mean"] = tuple((mean * scale + (_values(b[0]) if b else 0.0)).tolist())
            self.__dict__["std"] = tuple((std * np.abs(scale)).tolist())
        return self.__dict__[name]


@dataclass(frozen=True)
class LayerInit:
    """One initialised weight: its name, number of channels, and the channels left as they were.

    `constant` are channels whose pre-activation did not vary over the data; `scale_only` says that the layer
    has no bias to take the mean away with: none at all, a frozen one, or one shared with another layer. `before` and
    `after` are the pre-activations' mean and standard deviation with the old and with the new g and b, on the same
    inputs: those the layer sees once all before it are initialised. Both follow from the measured moments and the
    stored g and b; no second look is taken. `positions` is the number of values per channel that were measured,
    `masked` whether a mask fitted.
    """

    name: str
    channels: int
    constant: tuple[int, ...]
    scale_only: bool
    before: Channels | None = field(default=None, repr=False)
    after: Channels | None = field(default=None, repr=False)
    positions: int = 0
    masked: bool = False

    def to_json(self) -> dict[str, Any]:
        """The layer as plain data."""
        moments = {
            when: {"mean": list(found.mean), "std": list(found.std)}
            for when, found in (("before", self.before), ("after", self.after))
            if found is not None
        }
        return {
            "name": self.name,
            "channels": self.channels,
            "constant": list(self.constant),
            "scale_only": self.scale_only,
            "positions": self.positions,
            "masked": self.masked,
            **moments,
        }


@dataclass(frozen=True)
class InitReport:
    """What data-dependent initialisation did; prints as a table.

    Attributes:
        initialised: the weights whose g (and bias) were set, in execution order.
        left: the weight-normalized weights that keep their g, each with the reason.
        batches: the number of batches used, of all ranks together.
    """

    initialised: tuple[LayerInit, ...]
    left: tuple[Skipped, ...]
    batches: int = 1

    def __str__(self) -> str:
        lines = [f"{len(self.initialised)} weights initialised from data, {len(self.left)} left as they were"]
        if self.initialised:
            head = ("weight", "channels", "mean before", "after", "std before", "after", "note")
            lines += columns([head, *map(_row, self.initialised)])
        if self.left:
            lines += columns([("left", "reason"), *((skip.name, skip.reason) for skip in self.left)])
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {"initialised": self.initialised, "left": self.left, "batches": self.batches}


def _row(layer: LayerInit) -> tuple[str, ...]:
    notes = [f"{len(layer.constant)} of {layer.channels} channels constant"] if layer.constant else []
    notes += ["scale only: no bias"] if layer.scale_only else []
    notes += ["masked"] if layer.masked else []
    none = Channels((), ())
    before, after = layer.before or none, layer.after or none
    ranges = (_range(before.mean), _range(after.mean), _range(before.std), _range(after.std))
    return (layer.name, str(layer.channels), *ranges, "; ".join(notes))


def _range(values: Sequence[float]) -> str:
    low, high = (f"{round(f(values), 9):.3g}" for f in (min, max)) if values else ("", "")
    return low if low == high else f"{low} to {high}"


def data_dependent_init(  # noqa: PLR0913 - one call with the options of one recipe, all but two by name
    model: nn.Module,
    data: Any,
    *,
    include: Pattern | None = None,
    exclude: Pattern | None = None,
    init_scale: Scale = 1.0,
    training: bool | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    mask: Mask | None = None,
    max_batches: int | None = None,
    memory: Memory = "spill",
    process_group: Any = None,
) -> InitReport:
    """Set g and the bias of weight-normalized layers from data, in place.

    Afterwards every pre-activation the data reaches has mean 0 and standard deviation `init_scale` per output
    channel, over all batches and positions. Directions v stay. A layer called several times is set by its
    first call; one without a bias of its own gets its scale only; a channel that does not vary over the data keeps
    its g and b. Recurrent, attention-packed and lookup weights keep theirs, as do weights tied to these, layers whose
    own forward pass is not a linear map with g for its scale and b for its shift, and layers the data never reaches:
    each is named in the report. A forward may turn gradients on and differentiate its own layers.
    Modes, random state, buffers (running statistics) and gradients are as before; on an error g and b are, too. Calling
    again with the same data gives the same result.

    Any number of batches of any sizes gives what all of them concatenated would, up to rounding, in one forward
    pass per batch; with torch.distributed, the batches of all ranks. BatchNorm in training mode normalises over all
    batches together. Dropout draws differ from those of one large batch.

    >>> model = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)))
    >>> report = wn.data_dependent_init(model, [torch.randn(500, 3), torch.randn(20, 3)])
    >>> [layer.name for layer in report.initialised]
    ['0.weight', '2.weight']

    Args:
        model: a module tree with weight-normalized layers. Of DistributedDataParallel, the inner module is run.
        data: one batch (a tensor; a tuple of positional arguments; a mapping of keyword arguments) or an
            iterable of batches such as a list or a DataLoader. Of a tuple or list as many
            elements are passed as `model.forward` requires, so the labels in (inputs, labels) are left out.
        include, exclude: patterns as in `plan_weight_norm`.
        init_scale: target standard deviation, or a mapping from patterns to these, the first that fits, 1 where none
            does: `{"blocks.*.conv2": 0.1}` for the last layer of residual branches.
        training: run in training (True) or evaluation mode (False); None keeps each module's own mode. The paper's
            authors ran it with dropout on.
        forward: `forward(model, batch)` for models that are called in another way.
        mask: which positions count: a key of the batch ("attention_mask"), or a function of the batch that returns a
            bool tensor, several, or None. Each layer takes the first whose shape is that of its output without the
            channel axis, or of the leading axes of that; where none fits (after pooling), every position counts
            and the report says `masked=False`. It must fit at least one layer.
        max_batches: use at most so many batches.
        memory: where a batch waits while the others catch up. "spill": its activations are moved out, to a temporary
            file (from a GPU: to the CPU's memory), so that one batch at a time is in memory; "live": they stay;
            "recompute": nothing is kept but the inputs, and the batch is run again up to each layer, for models that
            cannot be interrupted. One batch alone never waits. FSDP2 models always recompute, whole passes at a time.
        process_group: the ranks to reduce over: None takes the default group if torch.distributed is initialised,
            False only this process. All ranks must call, with the same model; a rank may have no data.

    Raises:
        SelectionError: no weight-normalized weight is selected, init_scale is not positive and finite or names
            nothing, or the model holds lazy tensors.
        InputError: data is empty, gives pre-activations that are not finite or vary so little that g leaves its type,
            or comes in memory that is written over by the next batch; the model's forward fails on a batch
            (which is named) or calls layers from threads of its own where there are several batches, or another rank
            failed.
        OutputError: no room for the temporary file.
    """
    if memory not in ("spill", "live", "recompute"):
        raise SelectionError(f'memory must be "spill", "live" or "recompute", not {memory!r}')
    found = slots(model)
    scales = scales_of(init_scale, found)
    chosen = select(found, include, exclude)
    batches = batches_of(data, max_batches)
    ranks = Ranks.of(process_group)
    inner = _unwrapped(model)
    with _undisturbed(model, training):
        try:
            run = _Run(inner, chosen, found, scales, ranks, forward or call_with, mask)
            with run.hooks():
                count = run.through(batches, memory, kept=is_batch(data) or isinstance(data, Sequence))
        except Exception as error:
            ranks.fail(error.message if isinstance(error, WnsurgeryError) else in_one_line(error))
            raise
    return run.report(chosen, count)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside data-parallel wrappers, whose forward would wait for other ranks or split the batch."""
    while isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        model = model.module
    return model


# One pass per batch --------------------------------------------------------------------------------------


class _Run:
    """The layers to set, what was seen of them, and how the batches meet."""

    def __init__(
        self,
        model: nn.Module,
        chosen: list[Slot],
        everything: list[Slot],
        scales: Mapping[int, float],
        ranks: Ranks,
        forward: Callable[[nn.Module, Any], Any],
        mask: Mask | None,
    ) -> None:
        self.model, self.ranks, self.forward, self.mask = model, ranks, forward, mask
        self.sharded = _is_sharded(everything)
        self.done: dict[str, Callable[[], LayerInit]] = {}  # what tells how a weight was set, in that order
        self.set_by: dict[int, tuple[str, Any]] = {}  # id(g) -> the weight that set it, its scale
        targets, self.reasons = sort_out(chosen, everything)
        free = settable_bias(everything)
        directions = Directions.of(slot for slot, _ in targets)
        self.layers = {
            s.fqn: _Layer(self, s, axis, scales[id(s)], free, lent)
            for (s, axis), lent in zip(targets, directions, strict=True)
        }
        self.masks: dict[int, tuple[Tensor, ...]] = {}
        self.mask_fitted = False
        self.alone = False  # whether the batch in hand is the only one of all ranks
        self.fresh: Fresh | None = None
        self.passes: Lockstep | Replay = Lockstep(self)
        self.norms = JointNorms(model, lambda: self.passes)
        if len({tuple(names) for names in ranks.gather(list(self.layers))}) > 1:
            raise InputError("the ranks hold different weight-normalized layers")

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        try:
            for layer in self.layers.values():
                module = layer.slot.module
                others = bool(module._forward_pre_hooks)
                begin = layer.before if others else layer.before_without_graph
                handles.append(module.register_forward_pre_hook(begin, prepend=True))
                if others:
                    handles.append(module.register_forward_pre_hook(layer.without_graph))
                options = {"prepend": True, "with_kwargs": True, "always_call": True}
                handles.append(module.register_forward_hook(layer.after, **options))
            yield
        except BaseException:
            for layer in self.layers.values():
                layer.restore()
            raise
        finally:
            for handle in handles:
                handle.remove()
        for layer in self.layers.values():
            if not layer.settled:
                layer.restore()

    def through(self, batches: Iterator[Any], memory: Memory, *, kept: bool) -> int:
        """Run every batch; returns how many there were on all ranks. `kept`: the caller holds them all anyway."""
        spill = Spill() if memory == "spill" and not self.sharded else None
        if self.sharded or memory == "recompute":
            queue = list(batches)
            self.passes = self._replay(queue) if self.sharded else self._one_by_one(queue)
            jobs: Iterator[Callable[[], None]] = (partial(self._pass, n, [b]) for n, b in enumerate(queue))
        else:
            guards: list[Guard] = [Attributes(self.model)]
            if spill is not None:
                guards.append(spill)
            self.passes = together = Lockstep(self, guards)
            if spill is not None:
                spill.on_one_thread = together.on_callers_thread
            jobs = self._drawn(batches, fresh=spill is not None and not kept)
        try:
            count = self._all(jobs)
            self.passes.check()
        finally:
            if spill is not None:
                spill.close()
        total: int = sum(self.ranks.gather(count))
        if not total:
            raise InputError("data is empty: it gives no batch")
        if self.mask is not None and not any(self.ranks.gather(self.mask_fitted)):
            raise InputError("the mask fits the output of no layer: it must be shaped like one without its channels")
        return total

    def _all(self, jobs: Iterator[Callable[[], None]]) -> int:
        if self.sharded:
            for layer in self.layers.values():
                layer.neutral()
        several = self.ranks.size > 1
        first, second = next(jobs, None), next(jobs, None)
        queue = chain((job for job in (first, second) if job is not None), jobs)
        several = several or second is not None
        del first, second
        with self.norms.patched() if several and self.norms else nullcontext():
            return self.passes.run(queue)

    def _drawn(self, batches: Iterator[Any], *, fresh: bool) -> Iterator[Callable[[], None]]:
        for number, batch in enumerate(batches):
            held = [batch]
            del batch  # the pass alone holds it, and may let go of it
            yield partial(self._pass, number, held, fresh=fresh, once=True)
            del held

    def _one_by_one(self, queue: list[Any]) -> Lockstep | Replay:
        return Lockstep(self) if len(queue) == 1 == self.ranks.size else Replay(self)

    def _replay(self, queue: list[Any]) -> Replay:
        """Whole passes, as many on every rank: the collectives in their forwards must find each other."""
        counts = self.ranks.gather(len(queue))
        spare = None
        if min(counts) < max(counts) and not all(counts):
            donor = next(rank for rank, count in enumerate(counts) if count)
            lent = self.ranks.gather(moved(queue[0], torch.device("cpu")) if self.ranks.rank == donor else None)
            spare = partial(self._pass, 0, [lent[donor]])
        return Replay(self, whole=True, rounds_of=max(counts), spare=spare)

    def _pass(self, number: int, held: list[Any], *, fresh: bool = False, once: bool = False) -> None:
        """One batch through the model."""
        self.norms.begin(number)
        alone = isinstance(self.passes, Lockstep) and self.passes.alone
        self.alone = alone and self.ranks.size == 1
        self.fresh = Fresh() if self.alone else None
        try:
            batch = moved(held.pop() if once else held[0], _device(self.model), fresh=fresh and not alone)
            self.masks[number] = masks_of(self.mask, batch)
            self.forward(self.model, batch)
            self.passes.check()
        except InputError as error:
            if alone:
                raise
            raise InputError(f"batch {number}: {error.message}", hint=error.hint) from error
        except WnsurgeryError:
            raise
        except Exception as error:
            # models raise what they like; all of it means that this batch does not work
            self.passes.check()
            raise InputError(f"the model's forward failed on batch {number}: {in_one_line(error)}") from error
        finally:
            self.masks.pop(number, None)
            if self.sharded:
                for module in self.model.modules():
                    if callable(getattr(module, "reshard", None)):
                        module.reshard()  # type: ignore[operator]

    # how batches meet: see `lockstep.Meeting`

    def choose(self, waiting: Mapping[int, Any]) -> Any:
        return self.ranks.most_wanted(waiting)

    def settle(self, point: Any, waiting: Mapping[int, Paused]) -> Collection[int]:
        mine = [waiting[number].value for number in sorted(waiting) if waiting[number].point == point]
        if self.ranks.size > 1:
            part = Moments.merged(mine) if mine else None
            mine = [theirs for theirs in self.ranks.gather(part) if theirs is not None]
        moments = Moments.merged(mine)
        kind, name, _ = point
        if kind == "layer":
            with np.errstate(all="ignore"):
                self.layers[name].set(moments)
        else:
            self.norms.settle(point, moments)
        return [number for number, paused in waiting.items() if paused.point == point or self._is_settled(paused.point)]

    def _is_settled(self, point: Any) -> bool:
        kind, name, _ = point
        return kind == "layer" and self.layers[name].settled

    def report(self, chosen: list[Slot], batches: int) -> InitReport:
        left = []
        for slot in chosen:
            if slot.fqn not in self.done:
                setter, _ = self.set_by.get(id(slot.magnitude), ("", None))
                tied = f"shares its magnitude with {setter}" if setter else ""
                reason = self.reasons.get(slot.fqn) or tied or "the data never reaches it through a module call"
                left.append(Skipped(slot.fqn, slot.shape, reason))
        return InitReport(tuple(found() for found in self.done.values()), tuple(left), batches)


class _Layer:
    """One layer: measured at each batch's first call, with g = 1 and b = 0; then set."""

    def __init__(
        self, run: _Run, slot: Slot, axis: int, target: float, free: Collection[int], directions: Directions
    ) -> None:
        self.run, self.slot, self.axis, self.target = run, slot, axis, target
        self.open: set[int] = set()  # the batches inside its forward
        self.quiet: set[int] = set()  # the threads inside its forward that had gradients on
        self.refused = self.masked = self.lent = False
        self.own_shift: Any = None
        self.directions = directions
        self.log = is_log(slot)
        g, bias = slot.magnitude, bias_of(slot)
        assert g is not None
        self.g, self.bias, self.channels = g, bias, g.numel()
        self.most = min(torch.finfo(t.dtype).max for t in (g, slot.tensor) if t is not None)  # that g may be
        self.is_doubtful = has_own_forward(slot.module)
        self.settable = id(bias) in free
        self.old = [(t, t.clone()) for t in (g, bias) if t is not None]  # without a graph, as all of this
        self.plain = not self.log and all(is_taken(t) for t, _ in self.old)

    @property
    def settled(self) -> bool:
        return id(self.g) in self.run.set_by

    def neutral(self) -> None:
        """g = 1 and b = 0."""
        with torch.no_grad():
            self.g.fill_(0.0 if self.log else 1.0)
            if self.bias is not None:
                self.bias.zero_()
        torch.clear_autocast_cache()

    def lend(self) -> bool:
        """v for the weight and b = 0, where that does; whether it does."""
        if not self.directions.lend():
            return False
        if self.bias is not None:
            self.bias.zero_()
            torch.clear_autocast_cache()
        return True

    def restore(self, *, only_bias: bool = False) -> None:
        with torch.no_grad():
            for tensor, value in self.old[only_bias:]:
                tensor.copy_(value)
        torch.clear_autocast_cache()  # which does not see that a Parameter was written to

    def before(self, module: nn.Module, args: Any) -> None:
        passes = self.run.passes
        if self.settled or self.refused or not passes.listening or passes.current in self.open:
            return
        if not self.run.alone and passes.is_stray():
            return
        self.open.add(passes.current)
        if not self.run.sharded:
            self.lent = self.lend()
            if not self.lent:
                self.neutral()

    def before_without_graph(self, module: nn.Module, args: Any) -> None:
        """Both at once, where no other hooks are to run in between."""
        self.before(module, args)
        self.without_graph(module, args)

    def without_graph(self, module: nn.Module, args: Any) -> None:
        """Measure without a graph, after all other hooks: what `after` makes anew has the only one."""
        if torch.is_grad_enabled() and not self.run.sharded and self.run.passes.current in self.open:
            self.quiet.add(threading.get_ident())
            torch.set_grad_enabled(False)

    def with_graph(self) -> None:
        """Gradients again."""
        if threading.get_ident() in self.quiet:
            self.quiet.discard(threading.get_ident())
            torch.set_grad_enabled(True)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Called after the forward pass, also after one that failed, which some models go on from."""
        references = sys.getrefcount(output)
        run = self.run
        if self.quiet:
            self.with_graph()
        if output is None and sys.exc_info()[1] is not None:
            return None
        number = run.passes.current
        if number not in self.open:
            return None
        self.open.discard(number)
        norms = self.directions.take_back()
        if self.settled:
            return None
        if self.lent and norms is None:  # it ran with its weight after all
            self.lent = False
            self.neutral()
            output, references = self._again(module, args, kwargs), 0
        reason = "" if self._is_per_channel(output) else "its output is not one value per output channel"
        if not reason and self.is_doubtful and not run.sharded:
            self.is_doubtful = False
            affine = self._is_affine(output, norms, lambda: self._again(module, args, kwargs))
            reason = "" if affine else "its own forward pass does more than scale its output by g and shift it by b"
        if reason:
            run.reasons[self.slot.fqn] = reason
            if not run.sharded:
                self.restore()
            output = self._again(module, args, kwargs)  # that output was made with g = 1
            self.refused = True
            return output
        if not (run.sharded or run.alone):  # alone, it is set before anybody sees it
            self.restore(only_bias=self.lent)
        fresh = run.fresh is not None and run.fresh.taken(output, references)
        if not torch.is_grad_enabled():
            if fresh and norms is not None and self._standardise(output, norms, number):
                return output
            self._meet(output, number, norms)
            return self._final(output, norms, fresh) if self.settled else None
        with torch.no_grad():
            self._meet(output, number, norms)
        if not self.settled:
            return None
        return self._again(module, args, kwargs)

    def _again(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What the layer gives with its g and b as they are, with its graph; other hooks have run or will run."""
        for hook in legacy_hooks(module) if self.slot.form == "legacy" else ():
            hook(module, args)
        return module.forward(*args, **kwargs)

    def _is_per_channel(self, output: Any) -> bool:
        return (
            isinstance(output, Tensor)
            and -output.ndim <= self.axis < output.ndim
            and output.shape[self.axis] == self.channels
            and output.is_floating_point()
        )

    def _is_affine(self, output: Tensor, norms: Any, again: Callable[[], Any]) -> bool:
        """Whether the output, made with g = 1 and b = 0, or multiplied by `norms`, is scaled and shifted by other
        values of these: tried out on some. Leaves g as it was when it was made."""
        two, one = np.full(self.channels, 2.0), None if self.bias is None else np.ones(self.channels)
        wanted = scaled(output, self.axis, two if norms is None else two / norms, one, in_place=False)
        with torch.no_grad():
            self.g.fill_(math.log(2.0) if self.log else 2.0)
            if self.bias is not None:
                self.bias.fill_(1.0)
            torch.clear_autocast_cache()
            found = again()
            if norms is None:
                self.neutral()
            else:
                self.restore()
            if not isinstance(found, Tensor) or found.shape != wanted.shape:
                return False
            size, off = (float(x.double().abs().max()) if x.numel() else 0.0 for x in (wanted, found - wanted))
            loose = 1e-3 + 16 * torch.finfo(output.dtype).eps
            return not math.isfinite(size) or off <= loose * size  # what is not finite is told of elsewhere

    def _meet(self, output: Tensor, number: int, norms: Any) -> None:
        """Wait with the moments of one batch's output until g and b are set, or in a whole pass that goes on for the
        sake of others no longer.

        norms: what the output is multiplied by per channel; None where it was made with g = 1.
        """
        run = self.run
        masks = run.masks.get(number, ())
        keep = fitting(masks, output, self.axis) if masks else None
        if keep is not None:
            self.masked = run.mask_fitted = True
        moments = Moments.of(output, self.axis, keep)
        with np.errstate(all="ignore"):  # what is not finite
            if not moments.finite and moments.count:
                raise _not_finite(self.slot.fqn)
            if run.alone:
                self.set(moments, norms)
            else:
                run.passes.meet(("layer", self.slot.fqn, 0), moments if norms is None else moments.divided(norms))

    def _standardise(self, output: Tensor, norms: Any, number: int) -> bool:
        """What `_meet` and `_final` do with an output that nobody else holds, in a few calls of compiled code; whether
        that was done, as it is for all but masks, odd types and channels that do not vary."""
        cube = channels_in(output, self.axis) if self.plain and not self.run.masks.get(number) else None
        if cube is None:
            return False
        count = cube.numel() // self.channels
        shifts = None if self.settable or self.bias is None else self.old[1][1]
        clear = clearness(count, margin=1.0)
        found = standardise(cube, clear, norms, self.target, self.g, self.bias, shifts)
        if found is None:
            return False
        torch.clear_autocast_cache()
        mean, std, scale, shift = found
        self._is_set(mean, std, scale, shift, found[2 : 2 + len(self.old)], count, ())
        return True

    def _final(self, output: Tensor, norms: Any, fresh: bool) -> Tensor:
        """What the layer gives with its g and b as they are set now. fresh: nobody else holds the output."""
        _, scale = self.run.set_by[id(self.g)]
        shift = self.own_shift
        if shift is None and self.bias is not None:
            shift = _values(self.old[1][1])
        with np.errstate(all="ignore"):
            return scaled(output, self.axis, scale if norms is None else scale / norms, shift, in_place=fresh)

    def set(self, moments: Moments, norms: Any = None) -> None:
        """Set g and b such that outputs with these moments (at g = 1, b = 0) get mean 0 and the target deviation.

        norms: what these outputs were multiplied by.
        """
        if not moments.count:
            raise InputError(f"{self.slot.fqn}: no position of the data counts; the batches are empty or masked out")
        if not moments.finite:
            raise _not_finite(self.slot.fqn)
        mean, std, constant = moments.mean, moments.std, moments.constant
        if norms is not None:
            mean, std = mean / norms, std / norms
        scale = self.target / std
        shift = -mean * scale if self.settable else None
        if constant is not None:
            scale = np.where(constant, _scale(self.old[0][1], self.log), scale)
            shift = None if shift is None else np.where(constant, _values(self.old[1][1]), shift)
        held = np.log(scale) if self.log else scale
        if constant is not None and self.log:
            held = np.where(constant, _values(self.old[0][1]), held)
        stored = [_assign(self.g, held)]
        if shift is not None:
            stored.append(_assign(self.bias, shift))
        elif self.bias is not None:
            stored.append(_assign(self.bias, _values(self.old[1][1])))
        torch.clear_autocast_cache()
        flat = () if constant is None else tuple(np.flatnonzero(constant).tolist())
        self._is_set(mean, std, scale, shift, stored, moments.count, flat)

    def _is_set(self, mean: Any, std: Any, scale: Any, shift: Any, stored: Any, count: int, flat: Any) -> None:
        """Remember how g and b were set, for the report and for outputs that are still to come."""
        if not np.maximum.reduce(np.abs(scale)) <= self.most:
            raise InputError(
                f"{self.slot.fqn}: its pre-activations on this data vary so little (a standard deviation of "
                f"{np.min(std):.3g}) that g leaves the range of its type or of the weight's",
                hint="scale the data, or exclude this weight",
            )
        self.run.set_by[id(self.g)] = (self.slot.fqn, scale)
        self.own_shift = shift
        before = [old for _, old in self.old]
        if self.run.sharded:  # while all ranks are here
            before = [torch.from_numpy(_values(old)) for old in before]
        self.run.done[self.slot.fqn] = partial(self._report, mean, std, before, stored, count, flat)

    def _report(self, mean: Any, std: Any, before: list[Tensor], stored: Any, count: int, flat: Any) -> LayerInit:
        return LayerInit(
            self.slot.fqn,
            self.channels,
            flat,
            scale_only=not self.settable,
            before=Channels.of(mean, std, before, self.log),
            after=Channels.of(mean, std, stored, self.log),
            positions=count,
            masked=self.masked,
        )


def _not_finite(name: str) -> InputError:
    return InputError(f"{name}: its pre-activations on this data are not finite")


def _values(tensor: Any) -> Any:
    """All values of a tensor, the shards of other ranks included, in a row of numpy's float64."""
    if isinstance(tensor, np.ndarray):  # what was written into float32
        return tensor.astype(np.float32).astype(np.float64)
    if type(tensor) is Tensor and tensor.dtype == torch.float32 and tensor.is_cpu:
        return tensor.numpy().reshape(-1).astype(np.float64)
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu().to(torch.float64, copy=True).reshape(-1).numpy()


def _scale(g: Tensor, log: bool) -> Any:
    """What a magnitude multiplies by, from how it is stored."""
    return np.exp(_values(g)) if log else _values(g)


def _assign(tensor: Any, values: Any) -> Tensor:
    """Write values into a parameter, or this rank's slice of them into its shard; returns all as they are stored."""
    if tensor.dtype is torch.float32:
        value = torch.from_numpy(values.astype(np.float32))
    else:
        value = torch.from_numpy(values).to(tensor.dtype)
    shaped = value.view(tensor.shape)
    if type(tensor) is not nn.Parameter and hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        mesh, places = tensor.device_mesh, tensor.placements
        shaped = distribute_tensor(shaped.to(tensor.device), mesh, places, src_data_rank=None)
    tensor.copy_(shaped)
    return value


def _is_sharded(everything: list[Slot]) -> bool:
    tensors = (t for slot in everything if slot.form != "buffer" for t in (slot.tensor, slot.magnitude))
    return any(hasattr(kind, "full_tensor") for kind in set(map(type, tensors)))


def _device(model: nn.Module) -> torch.device | None:
    """Where a model's first parameter is."""
    first = next(iter(model.parameters()), None)
    return None if first is None else first.device


# Running the model without a trace -----------------------------------------------------------------------


@contextmanager
def _undisturbed(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Run forward passes; leave modes, random state, buffers and gradients as they were."""
    modules = modules_of(model, machinery=True)
    held = [t for m in modules for table in (m._parameters, m._buffers) for t in table.values() if t is not None]
    if any(map(is_lazy, {type(t): t for t in held}.values())):
        lazy = next(n for n, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t))
        raise SelectionError(f"{lazy}: lazy, not initialised yet", hint="run one forward pass first")
    modes = [m.training for m in modules]
    tables = [(m, dict(m._buffers)) for m in modules if not isinstance(m, torch.jit.ScriptModule)]
    values = [(b, b.detach().clone()) for m in modules for b in m._buffers.values() if b is not None]
    devices = {t.device for t in held if t.is_cuda}
    try:
        with as_written(), uncached(), torch.random.fork_rng(devices=sorted(devices, key=str)), torch.no_grad():
            if training is not None:
                for module in modules:
                    module.training = training
            with _gradients_aside(held):
                yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            if module.training is not mode:
                module.training = mode
        with torch.no_grad():
            for buffer, value in values:
                if buffer.shape != value.shape or buffer.dtype != value.dtype:
                    buffer.data = value
                else:
                    buffer.copy_(value)
        for module, buffers in tables:
            if module._buffers.keys() != buffers.keys():
                module._non_persistent_buffers_set.intersection_update(buffers)
            module._buffers.clear()
            module._buffers.update(buffers)


@contextmanager
def _gradients_aside(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Keep gradients out of reach and put them back; those that a forward makes of its own are dropped."""
    leaves = list({id(t): t for t in tensors if t.is_leaf}.values())
    before = [t.grad for t in leaves]
    for leaf, grad in zip(leaves, before, strict=True):
        if grad is not None:
            leaf.grad = None
    try:
        yield
    finally:
        # all are read first: in deferred mode the gradients of a pair arrive together when one is looked at
        made = [t.grad for t in leaves]
        for leaf, grad, own in zip(leaves, before, made, strict=True):
            if own is not grad:
                leaf.grad = grad
