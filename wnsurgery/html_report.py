"""An inspection as one self-contained HTML page: no network, light and dark, keyboard, screen reader, printer."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from wnsurgery.charts import histogram, ranges
from wnsurgery.errors import InputError, printable
from wnsurgery.page import document, facts, table
from wnsurgery.text import by

if TYPE_CHECKING:
    from wnsurgery.inspection import Inspection
    from wnsurgery.turning import TurnReport

__all__ = ["html_page", "write_html"]

_DETAILS = 100_000  # letters of a parity report that the page takes
_LARGEST = 1 << 26  # bytes of a parity report that are read
_CAPTION = "min / median / max over the rows of each weight; the titles sort, by the median"


def write_html(
    report: Inspection,
    path: str | os.PathLike[str],
    *,
    title: str = "model",
    parity: str | os.PathLike[str] | None = None,
    changes: TurnReport | None = None,
    force: bool = False,
) -> None:
    """Write an inspection as a page, whole or not at all.

    Args:
        report: what `inspect` found.
        path: the output.
        title: what the page is about.
        parity: a JSON file that a convert, fold, export or verify printed, to show beside it.
        changes: what `compare_weight_norm` found, to show beside it.
        force: replace an existing file.

    Raises InputError for a parity file that is no JSON, OutputExistsError, OutputError.
    """
    from wnsurgery.stores.commit import check_output, committed

    check_output(path, force=force)
    beside = None if parity is None else _read(parity)
    page = html_page(report, title=title, parity=beside, changes=changes)
    with committed(path, force=force) as file:
        file.write(page.encode("utf-8", "backslashreplace"))


def html_page(
    report: Inspection, *, title: str = "model", parity: Any = None, changes: TurnReport | None = None
) -> str:
    """The page as text; every string of the report is escaped."""
    from wnsurgery.spread import BINS_PER_DECADE  # which imports torch

    steps = [(w.name, w.step) for w in report.weights]
    figures = [
        ranges("Effective step of the direction", f"lr |g| / ||v||^2 at lr {report.lr:g}, log scale", steps),
        histogram("Magnitudes |g|", [w.bins[0] for w in report.weights], BINS_PER_DECADE),
        histogram("Norms ||v||", [w.bins[1] for w in report.weights], BINS_PER_DECADE),
    ]
    shown = "".join(figures)
    parts = [
        _summary(report),
        "" if changes is None else _changes(changes),
        f'<h2>Pictures</h2><div class="figures">{shown}</div>' if shown else "",
        _weights(report),
        _others(report),
        "" if parity is None else _parity(parity),
    ]
    return document(f"Weight norm in {printable(title)}", parts)


def _read(path: str | os.PathLike[str]) -> Any:
    from pathlib import Path

    from wnsurgery.stores import open_regular

    with open_regular(Path(path)) as file:
        text = file.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise InputError.of(path, "is too large for a parity report")
    try:
        found = json.loads(text)
        json.dumps(found, indent=1)
    except (ValueError, RecursionError) as error:
        raise InputError.of(path, f"cannot be read as JSON: {printable(error)}") from error
    return found


def _summary(report: Inspection) -> str:
    t = report.totals
    dead, ties = sum(w.dead_rows for w in report.weights), sum(len(w.also) for w in report.weights if w.form != "graph")
    cards: list[tuple[str, object]] = [
        ("weights under weight norm", f"{len(report.weights):,}"),
        ("other tensors of 2+ dimensions", f"{len(report.others):,}"),
        ("numbers", f"{t.parameters:,}"),
        ("bytes", f"{t.bytes:,}"),
    ]
    if report.weights:
        cards += [("bytes that folding saves", f"{t.saved_bytes:,}"), ("rows that are zero", f"{dead:,}")]
        cards += [("other names of tied weights", f"{ties:,}")] if ties else []
    return facts(cards)


def _three(values: Iterable[float] | None) -> str:
    return "-" if values is None else " / ".join(f"{v:.4g}" for v in values)


def _weights(report: Inspection) -> str:
    if not report.weights:
        return ""
    titles, *rows = report.rows()
    return table("weights", "Weights under weight norm", _CAPTION, titles, rows)


def _others(report: Inspection) -> str:
    if not report.others:
        return ""
    rows = [(s.name, by(s.shape), s.reason) for s in report.others]
    return table("others", "Not under weight norm", "and why; the titles sort", ("tensor", "shape", "why"), rows)


def _changes(changes: TurnReport) -> str:
    """What turned and what moved, as pictures and as a table."""
    angles, moves, growths = ([(w.name, getattr(w, s)) for w in changes.weights] for s in ("angle", "moved", "growth"))
    shown = ranges("Angle that the direction turned", "degrees", angles, log=False)
    shown += ranges("Relative move of the magnitude", "(g - g before) / |g before|", moves, log=False)
    shown += ranges("Growth of ||v||", "||v|| / ||v|| before", growths)
    rows = [(w.name, by(w.shape), _three(w.angle), _three(w.moved), _three(w.growth)) for w in changes.weights]
    titles = ("weight", "shape", "angle, degrees", "g moved by", "||v|| / before")
    text = f'<h2>What changed</h2><div class="figures">{shown}</div>' if shown else ""
    text += table("changes", "Changes, weight by weight", _CAPTION, titles, rows)
    if changes.unmatched:
        text += table("unmatched", "Not compared", "and why", ("weight", "why"), changes.unmatched)
    return text


def _parity(parity: Any) -> str:
    """The figures of the report as a table, all of it below, folded away."""
    rows = list(_figures(parity))[:200]
    whole = json.dumps(parity, indent=1)
    cut = "" if len(whole) <= _DETAILS else f"<p>The first {_DETAILS:,} of {len(whole):,} characters.</p>"
    figures = (
        table("parity", "Parity report", "figures of the last operation", ("figure", "value"), rows) if rows else ""
    )
    heading = "" if rows else "<h2>Parity report</h2>"
    details = f"<details><summary>All of it, as JSON</summary>{cut}<pre>{html.escape(whole[:_DETAILS])}</pre></details>"
    return heading + figures + details


def _figures(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and depth < 4:
        for key, inner in value.items():
            yield from _figures(inner, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(value, list):
        yield name, f"{len(value)} entries"
    elif not isinstance(value, dict) and value is not None:
        yield name, str(value)
