"""Fixtures of the core's tests."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from wnsurgery import fused, layers
from wnsurgery.mechanism import WeightNormList
from wnsurgery.straight import Straight

settings.register_profile("fixed", derandomize=True)  # a run that passes here passes elsewhere
settings.register_profile("explore", max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """The command lets through what the library logs as information, for as long as its process lasts."""
    logger = logging.getLogger("wnsurgery")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and lose much when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def registry() -> Iterator[None]:
    """Lets a test register layers and forgets them afterwards."""
    kept = dict(layers._by_type), dict(layers._by_name)
    yield
    for table, before in zip((layers._by_type, layers._by_name), kept, strict=True):
        table.clear()  # type: ignore[attr-defined]
        table.update(before)  # type: ignore[attr-defined]


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers make their weights as for a forward pass of the user's own, which reads `module.weight`."""
    monkeypatch.setattr(WeightNormList, "_go_straight", lambda self, way, private: None)


@pytest.fixture
def straight(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each time a weight was to go straight, by the compiled kernels, whether it did."""
    assert fused.start()
    ways: list[bool] = []
    real = WeightNormList._go_straight

    def go(self: Any, way: Straight, private: bool) -> Tensor | None:
        w = real(self, way, private)
        ways.append(w is not None)
        return w

    monkeypatch.setattr(WeightNormList, "_go_straight", go)
    return ways
