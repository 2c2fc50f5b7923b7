"""Tables and shapes as people read them."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["by", "columns"]


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of cells as aligned, indented lines.

    >>> columns([("a", "bb"), ("ccc", "d")])
    ['  a    bb', '  ccc  d']
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def by(shape: Sequence[int] | None) -> str:
    """A shape as `3x4`; "scalar" for a tensor of no dimensions, "?" for what is not known."""
    return "?" if shape is None else "x".join("?" if size < 0 else str(size) for size in shape) or "scalar"
