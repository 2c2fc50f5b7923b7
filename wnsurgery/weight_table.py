"""The weights of an inspection on a terminal: a table as wide as it, those of a large net in groups."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import compress
from typing import TYPE_CHECKING, Any

from wnsurgery.errors import printable
from wnsurgery.text import by

if TYPE_CHECKING:
    from wnsurgery.inspection import Inspection

__all__ = ["show_weights"]

_MANY = 40  # weights from which those that differ in the numbers of their names alone share a line
_NAME = 24  # characters of a name that stand on one line however narrow the terminal
_SHOWN = 60  # lines a table has without `everything`


def show_weights(report: Inspection, *, everything: bool = False, console: Any = None) -> None:
    """Print an inspection on a terminal.

    Args:
        report: what `inspect` found.
        everything: a line for each tensor, however many.
        console: a `rich.console.Console`; default: stdout.
    """
    from rich.console import Console

    console = console or Console()
    console.print(report.head(), markup=False, highlight=False)
    if report.weights:
        _print(console, _weight_lines(report, everything or len(report.weights) <= _MANY), everything)
    if report.others:
        title = f"{len(report.others)} other tensors of 2 or more dimensions"
        console.print(f"\n{title}", markup=False, highlight=False)
        whole = everything or len(report.others) <= _MANY
        groups: dict[tuple[str, ...], int] = {}
        for s in report.others:
            name = printable(s.name)
            key = (name if whole else _pattern(name), by(s.shape), printable(s.reason))
            groups[key] = groups.get(key, 0) + 1
        rows = [(_times(name, n), shape, why) for (name, shape, why), n in groups.items()]
        _print(console, [("tensor", "shape", "why"), *rows], everything)


def _weight_lines(report: Inspection, whole: bool) -> list[tuple[str, ...]]:
    rows = report.rows()
    if whole:
        return rows
    groups: dict[tuple[str, ...], list[int]] = {}
    for i, w in enumerate(report.weights):
        groups.setdefault((_pattern(printable(w.name)), *rows[i + 1][1:5]), []).append(i)
    lines = [rows[0]]
    for (name, *_), members in groups.items():
        first = rows[members[0] + 1]
        if len(members) == 1:
            lines.append(first)
            continue
        spreads = [[getattr(report.weights[i], s) for i in members] for s in ("magnitude", "norm", "step")]
        if len(first) > 9:
            spreads += [[getattr(report.weights[i], s) for i in members] for s in ("growth", "gain")]
        lines.append((_times(name, len(members)), *first[1:5], *(_together(s) for s in spreads), ""))
    return lines


def _together(many: Sequence[Any]) -> str:
    there = [s for s in many if s is not None]
    if not there:
        return "-"
    medians = sorted(s.median for s in there)
    ends = min(s.min for s in there), medians[(len(medians) - 1) // 2], max(s.max for s in there)
    return " / ".join(f"{x:.4g}" for x in ends)


def _pattern(name: str) -> str:
    """A name with its numbers left open: `h.*.attn.weight`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _times(name: str, count: int) -> str:
    return name if count == 1 else f"{name} ({count})"


def _print(console: Any, rows: list[tuple[str, ...]], everything: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=False)
    filled = [any(cells) for cells in zip(*rows[1:], strict=True)]
    longest = max(len(row[0]) for row in rows)
    for title in compress(rows[0], filled):
        table.add_column(Text(title), overflow="fold", min_width=min(longest, _NAME) if title is rows[0][0] else None)
    shown = rows[1:] if everything else rows[1 : _SHOWN + 1]
    for row in shown:
        table.add_row(*map(Text, compress(row, filled)))
    console.print(table)
    if len(shown) < len(rows) - 1:
        console.print(f"{len(rows) - 1 - len(shown)} more lines; --all shows them", markup=False, highlight=False)
