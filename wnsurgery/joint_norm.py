"""Batch normalisation over several batches that run in turn: with the statistics of all of them together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wnsurgery.moments import Moments

__all__ = ["JointNorms"]

_MEAN_ONLY = ("MeanOnlyBatchNorm1d", "MeanOnlyBatchNorm2d", "MeanOnlyBatchNorm3d")
_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


class _Passes(Protocol):
    @property
    def current(self) -> int: ...

    def meet(self, point: Any, value: Any) -> None: ...


class JointNorms:
    """The batch normalisations of a model, each call of each a point where all batches meet.

    Takes torch's BatchNorm1d/2d/3d and SyncBatchNorm, and mean-only batch norms by their class name, wherever they
    would use statistics of the batch. Subclasses with a forward of their own keep it, and normalise over one batch.
    """

    def __init__(self, model: nn.Module, passes: Callable[[], _Passes]) -> None:
        self._passes = passes
        self._model = model
        self._joint: dict[tuple[str, str, int], Moments] = {}
        self._calls: Counter[tuple[int, str]] = Counter()

    @cached_property
    def _found(self) -> list[tuple[str, nn.Module]]:
        """They and their names; looked for when the first of several batches asks, for a batch alone never does."""
        return [(name, module) for name, module in self._model.named_modules() if _is_batch_norm(module)]

    def __bool__(self) -> bool:
        return bool(self._found)

    def begin(self, number: int) -> None:
        """A forward pass of this batch starts: its calls are counted anew."""
        for point in [point for point in self._calls if point[0] == number]:
            del self._calls[point]

    def settle(self, point: tuple[str, str, int], moments: Moments) -> None:
        self._joint[point] = moments

    @contextmanager
    def patched(self) -> Iterator[None]:
        """The model with joint statistics; afterwards as it was."""
        replaced = [module for _, module in self._found if "forward" not in module.__dict__]
        try:
            for name, module in self._found:
                if module in replaced:
                    module.__dict__["forward"] = self._forward(name, module)
            yield
        finally:
            for module in replaced:
                module.__dict__.pop("forward", None)

    def _forward(self, name: str, module: Any) -> Callable[[Tensor], Tensor]:
        plain = type(module).forward

        def forward(input: Tensor) -> Tensor:
            if not (module.training or getattr(module, "running_mean", None) is None):
                return plain(module, input)  # type: ignore[no-any-return]
            number = self._passes().current
            self._calls[number, name] += 1
            point = ("batch norm", name, self._calls[number, name])
            if point not in self._joint:
                self._passes().meet(point, Moments.of(input, 1))
            joint = self._joint.get(point)
            if joint is None:  # a pass whose result nobody uses
                return input
            return _normalised(module, input, joint)

        return forward


def _is_batch_norm(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):
        return type(module).forward in _FORWARDS
    return type(module).__name__ in _MEAN_ONLY


def _normalised(module: Any, x: Tensor, joint: Moments) -> Tensor:
    if not isinstance(module, _BatchNorm):
        bias = getattr(module, "bias", None)
        mean = _like(x, joint.mean, torch.float32 if x.device.type == "mps" else torch.float64)
        shift = -mean if bias is None else bias.to(mean.dtype) - mean
        work = torch.promote_types(x.dtype, torch.float32)
        return (x.to(work) + shift.to(work).reshape(1, -1, *[1] * (x.ndim - 2))).to(x.dtype)
    held = module.running_mean if module.running_mean is not None else module.weight
    dtype = x.dtype if held is None else held.dtype
    mean, variance = _like(x, joint.mean, dtype), _like(x, joint.variance, dtype)
    return F.batch_norm(x, mean, variance, module.weight, module.bias, False, 0.0, module.eps)


def _like(x: Tensor, values: Any, dtype: torch.dtype) -> Tensor:
    """Numbers of numpy as a tensor of a type beside another tensor."""
    return torch.from_numpy(values).to(dtype).to(x.device)
