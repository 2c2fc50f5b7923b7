"""The frame of a self-contained HTML page: styles, tables that sort and search, and everything from files escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from wnsurgery.errors import printable

__all__ = ["document", "facts", "safe", "table"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_CSS = """:root{color-scheme:light dark;--ink:#1a1a1a;--soft:#595959;--page:#fff;--card:#f4f5f7;--line:#c8c8c8;
--bar:#1f5fa8}
@media(prefers-color-scheme:dark){:root{--ink:#eee;--soft:#b3b3b3;--page:#161616;--card:#222428;--line:#4a4a4a;
--bar:#7ab8ff}}
*{box-sizing:border-box}body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0}
main{max-width:110rem;margin:0 auto;padding:1rem 1.5rem}h1,h2{line-height:1.25;overflow-wrap:anywhere}
h2{margin:2rem 0 .5rem}
dl{display:grid;gap:.6rem;grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));margin:1rem 0}
dl div{background:var(--card);border-radius:.5rem;padding:.5rem .8rem}dt,figcaption{color:var(--soft);font-size:.85rem}
dd{margin:0;font-size:1.2rem;font-weight:600;font-variant-numeric:tabular-nums}figcaption b{color:var(--ink)}
.figures{display:grid;gap:1rem 2rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr))}
figure{margin:0}.w960{grid-column:1/-1}svg{display:block;width:100%;height:auto}
.bar{fill:var(--bar)}.mark{stroke:var(--bar);stroke-width:1.5;fill:none}.axis{stroke:var(--line);fill:none}
text{fill:var(--soft);font-size:12px}.find{display:flex;gap:.8rem;align-items:center;flex-wrap:wrap;margin:.4rem 0}
input{font:inherit;color:inherit;background:var(--page);border:1px solid var(--soft);border-radius:.3rem;
padding:.2rem .5rem}
.wide{overflow:auto;max-height:85vh;border:1px solid var(--line);border-radius:.5rem}
table{border-collapse:collapse;width:100%;font-size:.87rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding:.3rem .7rem}
th,td{border-top:1px solid var(--line);padding:.25rem .7rem;text-align:left;white-space:nowrap;vertical-align:top}
thead th{position:sticky;top:0;background:var(--card);border:0}
tbody th{font-weight:500}tbody th,td:last-child{white-space:normal;overflow-wrap:anywhere;min-width:16rem}
tbody th{min-width:20rem}
th button{font:inherit;font-weight:600;color:inherit;background:none;border:0;padding:0;cursor:pointer;text-align:left}
th[aria-sort=ascending] button::after{content:" \\2191"}th[aria-sort=descending] button::after{content:" \\2193"}
pre{overflow:auto;max-height:60vh;background:var(--card);padding:.8rem;border-radius:.5rem}
:focus-visible{outline:3px solid var(--bar);outline-offset:1px}
@media screen and (max-width:40rem){main{padding:.5rem}.w960 text{font-size:22px}tbody th{min-width:12rem}
.w640 text{font-size:16px}}
@media print{@page{size:landscape;margin:1cm}main{padding:0;max-width:none}.find{display:none}
tr[hidden]{display:table-row}
.wide,pre{overflow:visible;max-height:none;border:0}table{font-size:7pt}th,td{padding:.1rem .3rem}
tbody th,td:last-child{min-width:6rem!important}
thead th{position:static}tr,figure,dl div{break-inside:avoid}h2{break-after:avoid}
body{font-size:9pt}.bar,dl div{print-color-adjust:exact}}"""

# What a column sorts by: a spread by its median, a shape by its elements, "-" last, text with its numbers as numbers.
_SCRIPT = """"use strict";
const order=new Intl.Collator(undefined,{numeric:true}).compare;
function key(text){const parts=text.split(" / ");
if(text==="-"||parts[1]==="nan")return null;
if(parts.length===3)return Number(parts[1].replace("inf","Infinity"));
return/^\\d+(x\\d+)*$/.test(text)?text.split("x").reduce((a,b)=>a*b,1):text}
function compare(x,y,down){if(x===null||y===null)return(x===null)-(y===null);
const c=typeof x==="number"&&typeof y==="number"?x-y:order(x,y);return down?-c:c}
for(const part of document.querySelectorAll(".sortable")){
const body=part.querySelector("tbody"),rows=[...body.rows],heads=[...part.querySelectorAll("thead th")];
heads.forEach((head,column)=>head.querySelector("button").addEventListener("click",()=>{
const down=head.getAttribute("aria-sort")==="ascending";
heads.forEach(h=>h.removeAttribute("aria-sort"));head.setAttribute("aria-sort",down?"descending":"ascending");
const keys=new Map(rows.map(r=>[r,column?key(r.cells[column].textContent):r.cells[0].textContent]));
body.append(...[...rows].sort((a,b)=>compare(keys.get(a),keys.get(b),down)))}));
const box=part.querySelector("input"),told=part.querySelector("[role=status]");
box.addEventListener("input",()=>{const words=box.value.toLowerCase().split(/\\s+/);let n=0;
for(const r of rows){const text=r.textContent.toLowerCase();r.hidden=!words.every(w=>text.includes(w));n+=!r.hidden}
told.textContent=n+" of "+rows.length+" shown"})}"""


def safe(text: object) -> str:
    """A string for the page, wherever it came from.

    >>> safe("<b>\\x1b")
    '&lt;b&gt;\\\\x1b'
    """
    return html.escape(printable(text))


def document(title: str, parts: Iterable[str]) -> str:
    """The page around its parts, which are HTML already."""
    name = safe(title)
    return "\n".join(
        [
            f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<style>{_CSS}</style></head><body><main><h1>{name}</h1>",
            *(part for part in parts if part),
            f"</main><script>{_SCRIPT}</script></body></html>\n",
        ]
    )


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Names and values as cards."""
    cards = "".join(f"<div><dt>{safe(name)}</dt><dd>{safe(value)}</dd></div>" for name, value in pairs)
    return f"<dl>{cards}</dl>"


def table(ident: str, heading: str, caption: str, titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table with a heading, a search box and columns that sort; the first column names its row.

    Args:
        ident: of the section, unique on the page.
        heading, caption: above it.
        titles: one for each column.
        rows: what the cells show.
    """
    heads = "".join(f'<th scope="col"><button type="button">{safe(t)}</button></th>' for t in titles)
    lines = "".join(f"<tr>{''.join(_cell(c, i == 0) for i, c in enumerate(row))}</tr>" for row in rows)
    return (
        f'<section class="sortable" id="{ident}"><h2>{safe(heading)}</h2><div class="find"><label>Search '
        f'<input type="search"></label><span role="status"></span></div>'
        f'<div class="wide" tabindex="0" role="region" aria-label="{safe(heading)}"><table>'
        f"<caption>{safe(caption)}</caption><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div></section>"
    )


def _cell(cell: object, first: bool) -> str:
    return f'<th scope="row">{safe(cell)}</th>' if first else f"<td>{safe(cell)}</td>"
