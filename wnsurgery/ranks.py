"""Agreement between the processes of torch.distributed: what is next, and everybody's values in the order of ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from wnsurgery.errors import InputError, SelectionError, WnsurgeryError, first_line

__all__ = ["OtherRankError", "Ranks", "launched"]


class OtherRankError(InputError):
    """Another process of the group failed; its own message says at what."""


class Ranks:
    """The processes that work on one thing together; a process alone is a group of one.

    Every method is a collective: all ranks must call it, in the same order. After a call of `fail` on one rank, the
    next call raises on all others.
    """

    def __init__(self, group: Any = None, size: int = 1) -> None:
        self._group, self.size = group, size
        self.rank = 0
        self._broken = False
        if size > 1:
            self.rank = torch.distributed.get_rank(group)

    @classmethod
    def of(cls, process_group: Any = None) -> Ranks:
        """The group meant by an option: None takes the default group if there is one, False stays alone.

        Raises SelectionError when a group is asked for and there is none, or this process is not in it.
        """
        there = torch.distributed.is_available() and torch.distributed.is_initialized()
        if process_group is False or (process_group is None and not there):
            return cls()
        if not there:
            raise SelectionError("process_group: torch.distributed is not initialised")
        group = None if process_group is None or process_group is True else process_group
        size = torch.distributed.get_world_size(group)
        if size < 1:
            raise SelectionError("process_group: this process is not in the group")
        return cls(group, size)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order; OtherRankError when a rank has failed."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        self._exchange(gathered, (None, value))
        for rank, (error, _) in enumerate(gathered):
            if error is not None:
                self._broken = True
                raise OtherRankError(f"rank {rank}: {error}")
        return [value for _, value in gathered]

    def fail(self, message: str) -> None:
        """Let the others know that this rank cannot go on; does nothing where they know or cannot be reached."""
        if self.size > 1 and not self._broken:
            self._exchange([None] * self.size, (message, None))
            self._broken = True

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Let the others know where the block fails; they are at their next call, or done, once it is left."""
        try:
            yield
        except Exception as error:
            self.fail(error.message if isinstance(error, WnsurgeryError) else f"{type(error).__name__}: {error}")
            raise

    def _exchange(self, gathered: list[Any], value: Any) -> None:
        try:
            torch.distributed.all_gather_object(gathered, value, group=self._group)
        except BaseException:
            self._broken = True  # nobody can say where the others are now
            raise

    def most_wanted(self, waiting: Mapping[int, Any]) -> Any:
        """The point most runs of all ranks wait at; of several, the one with the lowest rank and run; None if none."""
        count: dict[Any, int] = {}
        for theirs in self.gather({number: waiting[number] for number in sorted(waiting)}):
            for point in theirs.values():
                count[point] = count.get(point, 0) + 1
        return max(count, key=lambda point: count[point]) if count else None


@contextmanager
def launched() -> Iterator[Ranks]:
    """The group `torchrun` has started this process in, for as long as the block lasts; alone where nothing has.

    Raises SelectionError where what torchrun leaves in the environment makes no group.
    """
    try:
        alone = "TORCHELASTIC_RUN_ID" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2
        if not alone:
            torch.distributed.init_process_group("gloo")
    except (ValueError, RuntimeError, OverflowError) as error:
        raise SelectionError(
            f"the processes that torchrun started do not meet ({first_line(error)})",
            hint="TORCHELASTIC_RUN_ID, WORLD_SIZE, RANK, MASTER_ADDR and MASTER_PORT in the environment are torchrun's",
        ) from error
    if alone:
        yield Ranks()
        return
    try:
        yield Ranks.of()
    finally:
        torch.distributed.destroy_process_group()
