"""Fixtures of the core's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from wnsurgery import layers


@pytest.fixture
def registry() -> Iterator[None]:
    """Lets a test register layers and forgets them afterwards."""
    kept = dict(layers._by_type), dict(layers._by_name)
    yield
    for table, before in zip((layers._by_type, layers._by_name), kept, strict=True):
        table.clear()  # type: ignore[attr-defined]
        table.update(before)  # type: ignore[attr-defined]
