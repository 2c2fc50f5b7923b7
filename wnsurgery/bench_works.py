"""What is timed on a net: a training step with its parts, evaluation, gradient accumulation, a discriminator's step."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["WORKS", "Work"]

Work = Callable[[nn.Module, Tensor], Callable[[], dict[str, float]]]  # seconds by part; "step" is the whole

_MICRO_BATCHES = 8


class _Clock:
    """Seconds between calls, the device's work done."""

    def __init__(self, device: torch.device) -> None:
        self._wait = torch.cuda.synchronize if device.type == "cuda" else None
        self.lap()

    def lap(self) -> float:
        if self._wait is not None:
            self._wait()
        now = time.perf_counter()
        passed, self._last = now - getattr(self, "_last", now), now
        return passed


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def _loss(output: Tensor) -> Tensor:
    return output.float().square().mean()


def _train(model: nn.Module, x: Tensor) -> Callable[[], dict[str, float]]:
    model.train()
    optimizer = _optimizer(model)

    def step() -> dict[str, float]:
        clock = _Clock(x.device)
        loss = _loss(model(x))
        forward = clock.lap()
        loss.backward()  # type: ignore[no-untyped-call]
        backward = clock.lap()
        optimizer.step()
        optimizer.zero_grad()
        update = clock.lap()
        return {"forward": forward, "backward": backward, "optimizer": update, "step": forward + backward + update}

    return step


def _evaluate(model: nn.Module, x: Tensor) -> Callable[[], dict[str, float]]:
    model.eval()

    def step() -> dict[str, float]:
        clock = _Clock(x.device)
        with torch.no_grad():
            model(x)
        return {"step": clock.lap()}

    return step


def _accumulate(model: nn.Module, x: Tensor) -> Callable[[], dict[str, float]]:
    model.train()
    optimizer = _optimizer(model)

    def step() -> dict[str, float]:
        clock = _Clock(x.device)
        for _ in range(_MICRO_BATCHES):
            _loss(model(x)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        return {"step": clock.lap()}

    return step


def _discriminate(model: nn.Module, x: Tensor) -> Callable[[], dict[str, float]]:
    """The net as a discriminator: trained on real and fake, then looked at by the generator's loss."""
    model.train()
    optimizer = _optimizer(model)
    fake = x.flip(0).clone() if x.is_floating_point() else x.roll(1, -1)

    def step() -> dict[str, float]:
        clock = _Clock(x.device)
        (_loss(model(x) - 1) + _loss(model(fake))).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            _loss(model(fake))
        return {"step": clock.lap()}

    return step


WORKS: dict[str, Work] = {"train": _train, "eval": _evaluate, "accumulate": _accumulate, "gan": _discriminate}
