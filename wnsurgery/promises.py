"""New tensors as promises: shapes and types now, values when the writer asks for them, one weight at a time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wnsurgery.checkpoint import AtOnce
from wnsurgery.kept import Rooms
from wnsurgery.reparam import Magnitude, magnitude_dtype_for
from wnsurgery.steps import Step, ZeroNorm, run_step
from wnsurgery.stores.mapped import Source
from wnsurgery.stores.values import Loaded

__all__ = ["Promises"]

_LARGE = 1 << 20  # bytes of a weight from which it is compared while it is written
_KEEP = 1 << 24  # bytes of magnitudes kept, so that writing g and v apart does not compute them twice


@dataclass(frozen=True)
class _Job:
    """One step to run, and how many tensors it makes."""

    step: Step
    sources: tuple[Tensor, ...]


class Promises(AtOnce, Loaded):
    """Makes meta tensors that stand for the tensors of a step, and fetches what they stand for.

    Args:
        source: the files the tensors of the checkpoint are in.
        magnitude: how g is stored in pairs that do not say.
        zero_norm: what rows with v = 0 and g != 0 fold to.
        judge: compare every result with the float64 recomputation.
    """

    def __init__(
        self, source: Source, magnitude: Magnitude = "linear", zero_norm: ZeroNorm = "zero", *, judge: bool = True
    ) -> None:
        AtOnce.__init__(self, magnitude, zero_norm, judge=judge)
        Loaded.__init__(self, source)
        self._jobs: dict[int, tuple[_Job, int]] = {}
        self._told: set[int] = set()
        self._last: tuple[_Job | None, tuple[Tensor, ...]] = (None, ())
        self._small: dict[tuple[int, int], Tensor] = {}
        self._room = _KEEP
        self._rooms = Rooms()
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="proof")  # starts its thread when it is first used
        self._comparing: Future[None] | None = None

    def make(self, step: Step, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if step.action == "rekeyed" or any(t.is_meta and not self.source.holds(t) for t in sources):
            return run_step(step, sources, self.magnitude, self.zero_norm)
        job = _Job(step, tuple(sources))
        made = _like(step, sources)
        for index, tensor in enumerate(made):
            if tensor.is_meta:
                self._jobs[tensor.untyped_storage()._cdata] = (job, index)
        return made

    def promised(self, tensor: Tensor) -> bool:
        return tensor.is_meta and (tensor.untyped_storage()._cdata in self._jobs or self.source.holds(tensor))

    def fetch(self, tensor: Tensor) -> Tensor:
        job, index = self._jobs.get(tensor.untyped_storage()._cdata, (None, 0)) if tensor.is_meta else (None, 0)
        if job is None:
            self.settle()
            return super().fetch(tensor)
        kept = self._small.get((id(job), index))
        if kept is not None:
            return kept
        if self._last[0] is not job:
            self._last = (None, ())  # the memory of the last weight goes before the next one comes
            self._last = (job, self._run(job))
        return self._last[1][index].detach()

    def read(self, start: int, stop: int, owner: Tensor) -> Tensor:
        self.settle()
        return super().read(start, stop, owner)

    def forget(self) -> None:
        """Let go of the last weight."""
        self.settle()
        self._last = (None, ())

    def run_all(self) -> None:
        """Keep every promise and throw the tensors away: what a dry run does."""
        for job, index in list(self._jobs.values()):
            if id(job) not in self._told and index == 0:
                self._run(job)
        self.settle()

    def settle(self) -> None:
        """Wait until the last weight, which is written meanwhile, has been compared."""
        comparing, self._comparing = self._comparing, None
        if comparing is not None:
            comparing.result()

    def findings(self) -> tuple[list[str], float | None, str]:
        """What this process found out about the weights it made."""
        self.settle()
        return self.notes, self.max_ulp, self.worst

    def learn(self, theirs: Sequence[tuple[list[str], float | None, str]]) -> None:
        """Take over what all processes found, in the order of ranks."""
        self.notes[:] = list(dict.fromkeys(note for notes, _, _ in theirs for note in notes))
        known = [(ulp, worst) for _, ulp, worst in theirs if ulp is not None]
        if known:
            self.max_ulp, self.worst = max(known, key=lambda entry: entry[0])

    def _run(self, job: _Job) -> tuple[Tensor, ...]:
        self.settle()
        sources = [super(Promises, self).fetch(t) for t in job.sources]
        again = id(job) in self._told
        made = run_step(job.step, sources, self.magnitude, self.zero_norm, None if again else self.notes, self._rooms)
        if not again:
            self._told.add(id(job))
            if self.judge and max(t.nbytes for t in made) < _LARGE:
                self.measure(job.step, sources, made)
            elif self.judge:
                self._comparing = self._beside.submit(self._compare, job.step, [(sources, made)])
        if job.step.action == "converted" and made[0].nbytes <= self._room:
            self._room -= made[0].nbytes
            self._small[id(job), 0] = made[0].detach()
        return made

    def _compare(self, step: Step, held: list[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> None:
        """`measure`, after which nobody holds the tensors: their memory is to serve the next weight."""
        self.measure(step, *held.pop())


def _like(step: Step, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Meta tensors of the shapes, strides and types `run_step` will give."""
    weight = sources[1 if step.action == "folded" else 0]
    plain = torch.empty_like(weight.detach(), device="meta")
    made: tuple[Tensor, ...] = (plain,)
    mark: tuple[Tensor, ...] = ()
    if step.action == "converted":
        g = torch.empty(step.axes.magnitude_shape(weight.shape), dtype=magnitude_dtype_for(weight.dtype), device="meta")
        made = (g, plain)
        mark = (torch.ones((), dtype=torch.bool),) if step.log else ()
    if isinstance(weight, nn.Parameter):
        trained = any(t.requires_grad for t in sources)
        made = tuple(nn.Parameter(t, requires_grad=trained) for t in made)
    return (*made, *mark)
