"""Tables as CSV that a spreadsheet cannot take for formulas."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

__all__ = ["cell", "csv_text"]


def cell(value: object) -> object:
    """A cell's value; text that a spreadsheet would run as a formula gets an apostrophe in front.

    >>> cell("=1+1"), cell(-2.5), cell("conv")
    ("'=1+1", -2.5, 'conv')
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    r"""Rows as CSV (RFC 4180 but for line ends, which are single newlines).

    >>> csv_text([("name", "rows"), ("a,b", 3)])
    'name,rows\n"a,b",3\n'
    """
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([cell(value) for value in row] for row in rows)
    return out.getvalue()
