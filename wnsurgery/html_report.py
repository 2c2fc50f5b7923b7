"""An inspection as one self-contained HTML page: no network, light and dark, keyboard, screen reader, printer."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wnsurgery.errors import InputError, printable

if TYPE_CHECKING:
    from wnsurgery.inspection import Inspection

__all__ = ["html_page", "write_html"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_CSS = """:root{color-scheme:light dark;--ink:#1a1a1a;--page:#fff;--line:#999;--bar:#1f5fa8}
@media(prefers-color-scheme:dark){:root{--ink:#eee;--page:#161616;--line:#777;--bar:#7ab8ff}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:1.5rem}
table{border-collapse:collapse}caption{text-align:left;font-weight:600}
th,td{border-bottom:1px solid var(--line);padding:.2rem .6rem;text-align:left;overflow-wrap:anywhere}
th button{font:inherit;font-weight:600;color:inherit;background:none;border:0;padding:0;cursor:pointer}
th[aria-sort=ascending] button::after{content:" \\2191"}th[aria-sort=descending] button::after{content:" \\2193"}
:focus-visible{outline:3px solid var(--bar)}.wide{overflow-x:auto}svg{max-width:100%;height:auto}
.bar{fill:var(--bar)}.mark{stroke:var(--bar);fill:none}text{fill:var(--ink);font-size:11px}
@media print{label,#found{display:none}th button{cursor:auto}tr[hidden]{display:table-row}body{margin:0}}"""

_SCRIPT = """"use strict";
const keys=JSON.parse(document.getElementById("keys").textContent);
const body=document.querySelector("#weights tbody");
if(body){const rows=[...body.rows];const heads=[...document.querySelectorAll("#weights thead th")];
heads.forEach((head,column)=>head.querySelector("button").addEventListener("click",()=>{
const down=head.getAttribute("aria-sort")==="ascending";
heads.forEach(h=>h.removeAttribute("aria-sort"));head.setAttribute("aria-sort",down?"descending":"ascending");
const key=i=>keys[i][column];const order=rows.map((_,i)=>i).sort((a,b)=>{const x=key(a),y=key(b);
if(x===null||y===null)return(x===null)-(y===null);
const c=typeof x==="number"&&typeof y==="number"?x-y:String(x).localeCompare(String(y),undefined,{numeric:true});
return down?-c:c});order.forEach(i=>body.append(rows[i]))}));
const box=document.getElementById("search"),told=document.getElementById("found");
box.addEventListener("input",()=>{const word=box.value.toLowerCase();let n=0;
rows.forEach(r=>{r.hidden=!r.textContent.toLowerCase().includes(word);n+=!r.hidden});
told.textContent=n+" of "+rows.length+" weights shown"})}"""


def write_html(
    report: Inspection,
    path: str | os.PathLike[str],
    *,
    title: str = "model",
    parity: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> None:
    """Write an inspection as a page, whole or not at all.

    Args:
        report: what `inspect` found.
        path: the output.
        title: what the page is about.
        parity: a JSON file that a convert, fold, export or verify printed, to show beside it.
        force: replace an existing file.

    Raises InputError for a parity file that is no JSON, OutputExistsError, OutputError.
    """
    from pathlib import Path

    from wnsurgery.stores.commit import committed

    beside: Any = None
    if parity is not None:
        try:
            beside = json.loads(Path(parity).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError.of(parity, f"cannot be read as JSON: {printable(error)}") from error
    page = html_page(report, title=title, parity=beside)
    with committed(path, force=force) as file:
        file.write(page.encode("utf-8", "backslashreplace"))


def html_page(report: Inspection, *, title: str = "model", parity: Any = None) -> str:
    """The page as text; every string of the report is escaped."""
    name = _safe(title)
    keys = json.dumps([_keys(w) for w in report.weights], separators=(",", ":")).replace("<", "\\u003c")
    bins = [[w.bins[side] for w in report.weights] for side in (0, 1)]
    parts = [
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Weight norm in {name}</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<style>{_CSS}</style></head><body><main><h1>Weight norm in {name}</h1><p>{_safe(report.head())}</p>",
        _steps(report),
        _histogram("Magnitudes |g|", bins[0]),
        _histogram("Norms ||v||", bins[1]),
        _table(report),
        _others(report),
        "" if parity is None else _parity(parity),
        f'</main><script type="application/json" id="keys">{keys}</script><script>{_SCRIPT}</script></body></html>\n',
    ]
    return "\n".join(part for part in parts if part)


def _safe(text: object) -> str:
    return html.escape(printable(text))


def _keys(w: Any) -> list[Any]:
    """What a weight's columns sort by; None sorts last."""
    middle = [s.median if s is not None and math.isfinite(s.median) else None for s in (w.magnitude, w.norm, w.step)]
    growth = [s.median if s is not None and math.isfinite(s.median) else None for s in (w.growth, w.gain)]
    return [printable(w.name), w.form, w.dtype, math.prod(w.shape), len(w.kept), *middle, *growth, w.dead_rows]


def _table(report: Inspection) -> str:
    rows = report.rows()
    compared = len(rows[0]) > 9
    titles = rows[0][:-1] if compared else (*rows[0][:-1], "||v|| / before", "|g| / before")
    heads = "".join(f'<th scope="col"><button type="button">{_safe(t)}</button></th>' for t in (*titles, "note"))
    lines = []
    for row in rows[1:]:
        cells = row if compared else (*row[:-1], "-", "-", row[-1])
        rest = "".join(f"<td>{_safe(c)}</td>" for c in cells[1:])
        lines.append(f'<tr><th scope="row">{_safe(cells[0])}</th>{rest}</tr>')
    return (
        '<h2>Weights</h2><label>Search <input type="search" id="search"></label> '
        '<span id="found" role="status" aria-live="polite"></span><div class="wide"><table id="weights">'
        f"<caption>Weights under weight norm; the buttons sort</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _others(report: Inspection) -> str:
    if not report.others:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{_safe(s.name)}</th><td>{_safe(s.shape)}</td><td>{_safe(s.reason)}</td></tr>'
        for s in report.others
    )
    heads = "".join(f'<th scope="col">{t}</th>' for t in ("tensor", "shape", "why"))
    return (
        f'<h2>Others</h2><div class="wide"><table><caption>Not under weight norm</caption><thead><tr>{heads}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _parity(parity: Any) -> str:
    text = html.escape(json.dumps(parity, indent=1)[:100_000])
    return f"<h2>Parity report</h2><pre>{text}</pre>"


def _histogram(title: str, many: Sequence[Sequence[tuple[int, int]]]) -> str:
    total: dict[int, int] = {}
    for bins in many:
        for place, count in bins:
            total[place] = total.get(place, 0) + count
    if not total:
        return ""
    low, high, top = min(total), max(total), max(total.values())
    wide = 640 / (high - low + 1)
    bars = "".join(
        f'<rect class="bar" x="{(b - low) * wide:.1f}" y="{120 - 110 * n / top:.1f}" width="{max(wide - 1, 0.5):.1f}" '
        f'height="{110 * n / top:.1f}"/>'
        for b, n in sorted(total.items())
    )
    start, end = f"{10 ** (low / 8):.3g}", f"{10 ** ((high + 1) / 8):.3g}"
    label = f"{title}, rows per logarithmic bin from {start} to {end}, at most {top}"
    ends = f'<text x="0" y="135">{start}</text><text x="640" y="135" text-anchor="end">{end}</text>'
    return (
        f'<h2>{_safe(title)}</h2><svg viewBox="0 0 640 140" role="img" aria-label="{_safe(label)}">{bars}{ends}</svg>'
    )


def _steps(report: Inspection) -> str:
    """Layers from left to right, each a line from the smallest to the largest step with a mark at the median."""
    logs = [
        (i, [math.log10(x) for x in w.step])
        for i, w in enumerate(report.weights)
        if w.step is not None and all(0 < x < math.inf for x in w.step)
    ]
    if not logs:
        return ""
    low, high = min(s[0] for _, s in logs), max(s[2] for _, s in logs)
    scale, wide = 180 / max(high - low, 1e-9), 640 / len(report.weights)
    path = "".join(
        f"M{(i + 0.5) * wide:.1f} {190 - (s[0] - low) * scale:.1f}V{190 - (s[2] - low) * scale:.1f}"
        f"M{(i + 0.2) * wide:.1f} {190 - (s[1] - low) * scale:.1f}h{0.6 * wide:.1f}"
        for i, s in logs
    )
    label = f"effective step lr |g| / ||v||^2 by layer at lr {report.lr:g}, from {10**low:.3g} to {10**high:.3g}"
    ends = f'<text x="0" y="10">{10**high:.3g}</text><text x="0" y="204">{10**low:.3g}</text>'
    return (
        f'<h2>Effective steps, layer by layer</h2><svg viewBox="0 0 640 208" role="img" aria-label="{_safe(label)}">'
        f'<path class="mark" d="{path}"/>{ends}</svg>'
    )
