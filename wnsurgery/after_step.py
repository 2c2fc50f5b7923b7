"""Something done after every optimizer step, until it is taken off again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch.optim import Optimizer

__all__ = ["StepHandle"]


class StepHandle:
    """Calls an action after each step of the optimizers; `remove()` ends it, and so does leaving a `with` block.

    With several optimizers the action runs after each one's step. A step that `GradScaler` skips is no step.
    """

    def __init__(self, optimizers: Sequence[Optimizer], action: Callable[[], object]) -> None:
        def after(*_: Any) -> None:
            action()

        self._hooks = [one.register_step_post_hook(after) for one in optimizers]

    def remove(self) -> None:
        """Take the action off; calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> StepHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
