"""Outputs scaled per channel: in place where nobody else can hold them, and only there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from wnsurgery.outputs import Fresh, scaled


class Made(nn.Module):
    """Makes an output and lets somebody keep something of it."""

    def __init__(self, keep: Callable[[Tensor], Any] = lambda made: None) -> None:
        super().__init__()
        self.keep, self.kept = keep, None

    def forward(self, x: Tensor) -> Tensor:
        made = x + 1
        self.kept = self.keep(made)
        return made


def is_taken(module: nn.Module, x: Tensor, fresh: Fresh) -> bool:
    """Whether a hook may write into what a module returns."""
    found = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        references = sys.getrefcount(output)
        found.append(fresh.taken(output, references))

    handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
    with torch.no_grad():
        module(x)
    handle.remove()
    return found[0]


def test_an_output_made_on_the_spot_is_fresh() -> None:
    """Of linear layers and convolutions of every number of axes, and of modules of one's own."""
    fresh = Fresh()
    for module, x in (
        (nn.Linear(4, 3), torch.randn(2, 4)),
        (nn.Linear(4, 3), torch.randn(2, 5, 4)),
        (nn.Conv1d(4, 3, 2), torch.randn(2, 4, 9)),
        (nn.Conv1d(4, 3, 2), torch.randn(4, 9)),
        (nn.ConvTranspose1d(4, 3, 2), torch.randn(2, 4, 9)),
        (nn.Conv2d(4, 3, 2), torch.randn(2, 4, 9, 9)),
        (nn.Conv2d(4, 3, 2), torch.randn(2, 4, 9, 9).to(memory_format=torch.channels_last)),
        (Made(), torch.randn(3)),
    ):
        assert is_taken(module, x, fresh), module


@pytest.mark.parametrize(
    "keep",
    [
        lambda made: made,
        lambda made: [{"deep": made}],
        lambda made: made.detach(),
        lambda made: made[:1],
        lambda made: made.numpy(),
        np.from_dlpack,
        lambda made: memoryview(made.numpy()),
        lambda made: made.untyped_storage(),
        lambda made: lambda: made,
    ],
)
def test_an_output_that_somebody_keeps_is_not(keep: Callable[[Tensor], Any]) -> None:
    """Kept as it is, as a view, as an array over its memory, as the memory, or by a function."""
    assert not is_taken(Made(keep), torch.randn(3, 4), Fresh())


class Returns(nn.Module):
    """Returns what a function makes of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_memory_from_elsewhere_is_not_fresh() -> None:
    """An input handed through, a view of it, a buffer, part of a kept tensor, an array's memory, overlapping memory."""
    fresh, x, array, kept = Fresh(), torch.randn(3, 4), np.ones((3, 4), dtype=np.float32), torch.zeros(6, 4)
    for function in (
        lambda x: x,
        lambda x: x.view(4, 3),
        lambda x: kept,
        lambda x: kept[:3],
        lambda x: torch.from_numpy(array),
        lambda x: (x.sum(0) + 1).expand(3, 4),
        lambda x: (x + 1).half(),
        lambda x: (x + 1).requires_grad_(),
    ):
        assert not is_taken(Returns(function), x, fresh)


def test_where_all_is_watched_nothing_is_fresh() -> None:
    """Hooks on all modules and modes of dispatch may keep what they see, without its showing."""
    x, held = torch.randn(3, 4), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: held.append(output.detach()))
    try:
        assert not is_taken(Made(), x, Fresh())
    finally:
        handle.remove()

    class Keeps(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            held.append(func(*args, **(kwargs or {})))
            return held[-1]

    fresh = Fresh()
    with Keeps():
        assert not is_taken(Made(), x, fresh)
        assert not is_taken(Made(), x, Fresh())


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("axis", [-1, 1, 0])
def test_scaled_is_scale_and_shift_per_channel(axis: int, in_place: bool) -> None:
    """Numbers of float64 per index of an axis, rounded once to the output's type; the memory is the output's or new."""
    torch.manual_seed(0)
    output = torch.randn(3, 5, 4)
    before, count = output.clone(), output.shape[axis]
    scale, shift = np.linspace(0.5, 2.0, count), np.linspace(-3.0, 3.0, count)
    result = scaled(output, axis, scale, shift, in_place=in_place)
    assert (result.data_ptr() == output.data_ptr()) == in_place
    assert in_place or torch.equal(output, before)
    for index in range(count):
        wanted = before.select(axis, index).double() * scale[index] + shift[index]
        assert torch.allclose(result.select(axis, index).double(), wanted, rtol=1e-6, atol=1e-6)


def test_half_precision_is_scaled_in_float32() -> None:
    """Intermediate values beyond half precision are no infinities."""
    output = torch.full((2, 3), 60000.0, dtype=torch.float16)
    result = scaled(output, 1, np.full(3, 4.0), np.full(3, -239999.0), in_place=False)
    assert result.dtype == torch.float16
    assert torch.equal(result, torch.ones(2, 3, dtype=torch.float16) * (60000.0 * 4 - 239999.0))
