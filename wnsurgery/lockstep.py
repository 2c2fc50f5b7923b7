"""Several runs of code that meet at points, only one of them running at a time.

A run that reaches a point calls `meet` and pauses. When every unfinished run is paused, one point is chosen and
settled, and the runs it releases go on, lowest number first. `Lockstep` keeps each paused run on a thread of its own;
`Replay` keeps nothing: it breaks a run off at its first point and runs it again from the start.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

import torch

from wnsurgery.errors import InputError

__all__ = ["Guard", "Lockstep", "Meeting", "Paused", "Replay"]

Point = Hashable
Job = Callable[[], None]

_MAX_WORKERS = 2048  # threads of torch's own that all paused runs together may keep


@dataclass(frozen=True)
class Paused:
    """One run that waits at a point, with the value it brought."""

    point: Point
    value: Any = field(repr=False)


class Meeting(Protocol):
    """How runs meet: which point is next (None: nobody anywhere waits), and which runs may go on once it is settled."""

    def choose(self, waiting: Mapping[int, Point]) -> Point | None: ...

    def settle(self, point: Point, waiting: Mapping[int, Paused]) -> Collection[int]: ...


class Guard(Protocol):
    """State that each run has for itself: put in place before it goes on, put away after it pauses or ends."""

    def inside(self, number: int) -> AbstractContextManager[Any]: ...

    def enter(self, number: int) -> None: ...

    def leave(self, number: int, done: bool) -> None: ...


class Strays:
    """Knows whether each job stays on its thread, and keeps the error that says so of one that did not.

    A thread that a job started cannot wait in the job's place, and no error in it need reach the job.
    """

    def __init__(self) -> None:
        self._caller = threading.get_ident()
        self._stray = False

    def is_stray(self) -> bool:
        """Called by what may be a job: whether it runs on another thread than the job in hand; that is remembered."""
        stray = threading.get_ident() != self._own_thread()
        self._stray = self._stray or stray
        return stray

    def check(self) -> None:
        """Raise InputError if a job has left its thread."""
        if self._stray:
            raise InputError(
                "the model's forward calls its layers from threads of its own, which cannot wait for other batches",
                hint="give one batch: it need not wait",
            )

    def _own_thread(self) -> int | None:
        return self._caller


class _Cancelled(BaseException):
    """Unwinds a paused run after another one failed."""


@dataclass
class _Run:
    """One job on its thread."""

    number: int
    job: Job | None = field(repr=False)
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0), repr=False)
    thread: threading.Thread | None = field(default=None, repr=False)
    paused: Paused | None = None
    request: Callable[[], Any] | None = field(default=None, repr=False)
    reply: Any = field(default=None, repr=False)
    running: bool = False
    done: bool = False
    error: BaseException | None = None


class Lockstep(Strays):
    """Runs every job on a thread of its own, one at a time, each from meeting point to meeting point.

    A single job runs on the caller's thread. Which job runs when depends on the points alone, never on timing. An
    exception in one job, or in the caller, unwinds all others before it is raised; no thread is left behind.
    """

    def __init__(self, meeting: Meeting, guards: Sequence[Guard] = ()) -> None:
        super().__init__()
        self.current = 0
        self.listening = True
        self._meeting, self._guards = meeting, guards
        self._runs: list[_Run] = []
        self._back = threading.Semaphore(0)
        self._cancelled = False
        self._threads = torch.get_num_threads()

    @property
    def alone(self) -> bool:
        """Whether the one job there is runs on the caller's thread."""
        return not self._runs

    def run(self, jobs: Iterable[Job]) -> int:
        """Run all jobs to their end; returns how many there were. Jobs are drawn one by one, when their turn comes."""
        drawn = iter(jobs)
        first = next(drawn, None)
        second = next(drawn, None) if first is not None else None
        if second is None:
            if first is not None:
                first()
            self._finish_alone()
            return int(first is not None)
        assert first is not None
        queue = chain([first, second], drawn)
        del first, second
        try:
            while (job := next(queue, None)) is not None:
                self._start(job)
                del job
            self._rounds()
        finally:
            self._unwind()
        return len(self._runs)

    def meet(self, point: Point, value: Any) -> None:
        """Called by a job: wait here until the point is settled; elsewhere than on its thread it does not wait."""
        if self.is_stray():
            return
        if not self._runs:
            self._meet_alone(point, value)
            return
        run = self._runs[self.current]
        if self._cancelled:
            raise _Cancelled
        self.check()
        run.paused, run.running = Paused(point, value), False
        self._back.release()
        run.go.acquire()
        run.paused = None
        if self._cancelled:
            raise _Cancelled

    def on_callers_thread(self, function: Callable[[], Any]) -> Any:
        """Called by a job: the result of a function that runs on the thread all jobs were started from."""
        run = self._runs[self.current]
        if self._cancelled:
            return function()
        run.request, run.running = function, False
        self._back.release()
        run.go.acquire()
        run.request = None
        reply, run.reply = run.reply, None
        if reply is None:
            raise _Cancelled
        value, error = reply
        if error is not None:
            raise error
        return value

    def _own_thread(self) -> int | None:
        if not self._runs:
            return self._caller
        thread = self._runs[self.current].thread
        return None if thread is None else thread.ident

    def _meet_alone(self, point: Point, value: Any) -> None:
        paused = {0: Paused(point, value)}
        while True:
            chosen = self._meeting.choose({0: point})
            if 0 in self._meeting.settle(chosen, paused):
                return

    def _finish_alone(self) -> None:
        while (chosen := self._meeting.choose({})) is not None:
            self._meeting.settle(chosen, {})

    def _rounds(self) -> None:
        while True:
            waiting = {run.number: run.paused for run in self._runs if run.paused is not None}
            chosen = self._meeting.choose({number: paused.point for number, paused in waiting.items()})
            if chosen is None:
                return
            released = sorted(self._meeting.settle(chosen, waiting))
            del waiting
            for number in released:
                self._resume(self._runs[number])

    def _start(self, job: Job) -> None:
        run = _Run(len(self._runs), job)
        del job
        self._runs.append(run)
        # every thread keeps its own pool of torch's workers for as long as it is paused
        single = len(self._runs) * self._threads > _MAX_WORKERS
        inherit = _thread_state()
        run.thread = threading.Thread(
            target=self._body, args=(run, inherit, single), name=f"batch {run.number}", daemon=True
        )
        try:
            run.thread.start()
        except RuntimeError as error:
            run.thread, run.done = None, True
            raise InputError(
                f"no thread to be had for batch {run.number}: {error}",
                hint='fewer or larger batches, or memory="recompute"',
            ) from error
        self._resume(run)

    def _body(self, run: _Run, inherit: Callable[[], AbstractContextManager[None]], single: bool) -> None:
        run.go.acquire()
        try:
            if not self._cancelled:
                with ExitStack() as stack:
                    stack.enter_context(inherit())
                    for guard in self._guards:
                        stack.enter_context(guard.inside(run.number))
                    if single:
                        torch.set_num_threads(1)
                    job, run.job = run.job, None
                    assert job is not None
                    job()
        except _Cancelled:
            pass
        except BaseException as error:  # handed to the caller's thread, which raises it
            run.error = error
        finally:
            run.done, run.running = True, False
            self._back.release()

    def _resume(self, run: _Run) -> None:
        self.current = run.number
        for guard in self._guards:
            guard.enter(run.number)
        self._let_run(run)
        while run.request is not None:
            try:
                run.reply = (run.request(), None)
            except Exception as problem:  # belongs to the job, whose code may be waiting for it
                run.reply = (None, problem)
            self._let_run(run)
        for guard in reversed(self._guards):
            guard.leave(run.number, run.done)
        if run.done and run.thread is not None:
            run.thread.join()
            run.thread = None
        if run.error is not None:
            error, run.error = run.error, None
            raise error

    def _let_run(self, run: _Run) -> None:
        run.request, run.running = None, True
        run.go.release()
        self._back.acquire()

    def _unwind(self) -> None:
        """Bring every thread to its end, whatever state it is in."""
        self._cancelled = True
        for run in self._runs:
            thread = run.thread
            while thread is not None and thread.is_alive():
                if run.running or run.done:  # the caller was interrupted while this one ran
                    thread.join(0.01)
                    continue
                self.current = run.number
                for guard in self._guards:
                    guard.enter(run.number)
                run.running = True
                run.go.release()
            run.thread, run.error, run.job = None, None, None
        if torch.get_num_threads() != self._threads or len(self._runs) * self._threads > _MAX_WORKERS:
            torch.set_num_threads(self._threads)


class _Stop(BaseException):
    """Breaks a run off at the point it will be run up to again."""


class Replay(Strays):
    """Runs the jobs one after the other, each only up to its first unsettled point, again and again.

    Keeps no run half done, and so no activations; costs one (partial) run per job and point. Random draws of a job
    are the same each time. With `whole`, jobs always run to their end, and `rounds_of` of them in each round on
    every rank, so that collectives inside them find their partners; `spare` is run where there is no job.
    """

    def __init__(
        self, meeting: Meeting, *, whole: bool = False, rounds_of: int | None = None, spare: Job | None = None
    ) -> None:
        super().__init__()
        self.current = 0
        self.listening = True
        self._meeting, self._whole, self._rounds_of, self._spare = meeting, whole, rounds_of, spare
        self._first: Paused | None = None

    def run(self, jobs: Iterable[Job]) -> int:
        """Run all jobs until none meets a point any more; returns how many there were."""
        queue = list(jobs)
        unfinished = dict.fromkeys(range(len(queue)))
        random: dict[int, Any] = {}
        while True:
            waiting = {}
            for number in range(self._rounds_of or len(queue)):
                counts = number < len(queue)
                if not self._whole and number not in unfinished:
                    continue
                self.current = number if counts else 0
                job = queue[self.current] if queue else self._spare
                found = None if job is None else self._once(job, random, counts)
                if found is None:
                    unfinished.pop(number, None)
                else:
                    waiting[number] = found
            chosen = self._meeting.choose({number: paused.point for number, paused in waiting.items()})
            if chosen is None:
                return len(queue)
            self._meeting.settle(chosen, waiting)

    def meet(self, point: Point, value: Any) -> None:
        """Called by a job: the first point it meets in this run counts; on another thread none does."""
        if self.is_stray():
            return
        if self.listening:
            self._first, self.listening = Paused(point, value), False
        if not self._whole:
            raise _Stop

    def _once(self, job: Job, random: dict[int, Any], counts: bool) -> Paused | None:
        self._first, self.listening = None, counts
        devices = list(range(torch.cuda.device_count())) if _cuda() else []
        state = random.setdefault(
            self.current, (torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices])
        )
        torch.set_rng_state(state[0])
        for device, value in zip(devices, state[1], strict=False):
            torch.cuda.set_rng_state(value, device)
        try:
            job()
        except _Stop:
            pass
        finally:
            self.listening = True
        found, self._first = self._first, None
        return found


def _cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


# What a thread inherits ----------------------------------------------------------------------------------


def _thread_state() -> Callable[[], AbstractContextManager[None]]:
    """What torch and Python keep per thread in the calling thread, as a context to enter in another one."""
    import contextvars

    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    kinds = [k for k in ("cpu", "cuda", "mps", "xpu") if torch.is_autocast_enabled(k)]
    casts = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()) for kind in kinds]
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]  # type: ignore[no-untyped-call]
    variables = contextvars.copy_context()
    stream = torch.cuda.current_stream() if _cuda() else None

    @contextmanager
    def applied() -> Iterator[None]:
        for variable, value in variables.items():
            variable.set(value)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype, cache in casts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cache))
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            for mode in modes:
                stack.enter_context(_pushed(mode))
            yield

    return applied


@contextmanager
def _pushed(mode: Any) -> Iterator[None]:
    """A mode on this thread's stack, past its `__enter__`: that has been called, and may do more than push."""
    from torch import overrides
    from torch.utils import _python_dispatch

    place: Any = _python_dispatch if isinstance(mode, _python_dispatch.TorchDispatchMode) else overrides
    place._push_mode(mode)
    try:
        yield
    finally:
        place._pop_mode()
