"""Tables as CSV that a spreadsheet cannot take for formulas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["cell", "csv_text"]

_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # of formulas; the last four are full-width = + - @
_SPLITS = ',;"\t\r\n'  # what some spreadsheet's locale takes for the end of a cell


def cell(value: object) -> object:
    """A cell's value; text that a spreadsheet would run as a formula gets an apostrophe in front.

    >>> cell("=1+1"), cell(-2.5), cell("conv")
    ("'=1+1", -2.5, 'conv')
    """
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(_STARTS) else value


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    r"""Rows as CSV (RFC 4180 but for line ends, which are single newlines).

    >>> csv_text([("name", "rows"), ("a,b", 3)])
    'name,rows\n"a,b",3\n'
    """
    return "".join(",".join(_quoted("" if value is None else str(cell(value))) for value in row) + "\n" for row in rows)


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in _SPLITS) else text
