"""Small pictures as SVG text: counts per logarithmic bin, and from-to lines layer by layer."""

from __future__ import annotations

import html
import math
import sys
from collections.abc import Iterable, Sequence

from wnsurgery.errors import printable

__all__ = ["histogram", "ranges"]

_LEFT, _TOP, _ROOM = 56, 18, 190  # room for the numbers of the axis, above the picture, and for the picture
_TAIL = 60  # letters of a name that a hint shows
_HINTED = 400  # layers up to which each has one: beyond, no pointer hits a single line

Three = Sequence[float]


def histogram(title: str, many: Iterable[Sequence[tuple[int, int]]], per_decade: int) -> str:
    """Rows per logarithmic bin, over several weights, as a figure; "" where there are none.

    >>> histogram("g", [((0, 2), (8, 1))], 8).count("<rect")
    2

    Args:
        title: what is counted.
        many: for each weight (bin, count) as `log_bins` gives them.
        per_decade: bins from 1 to 10.
    """
    total: dict[int, int] = {}
    for bins in many:
        for place, count in bins:
            total[place] = total.get(place, 0) + count
    if not total:
        return ""
    low, high, top = min(total), max(total) + 1, max(total.values())
    wide = (640 - _LEFT) / (high - low)
    bars = "".join(
        f'<rect class="bar" x="{_LEFT + (b - low) * wide:.1f}" y="{_TOP + _ROOM * (1 - n / top):.1f}" '
        f'width="{max(wide - 1, 0.5):.1f}" height="{_ROOM * n / top:.1f}">'
        f"<title>{_span(b, per_decade)}: {n}</title></rect>"
        for b, n in sorted(total.items())
    )
    marks = [b for b in range(low, high + 1) if b % per_decade == 0]
    every = max(1, math.ceil(len(marks) / 8))
    ticks = [low, high] if len(marks) < 2 else marks[::every]
    names = "".join(
        f'<path class="axis" d="M{x:.1f} {_TOP + _ROOM}v5"/><text x="{x:.1f}" y="{_TOP + _ROOM + 18}" '
        f'text-anchor="{"end" if x > 620 else "middle"}">{_power(b / per_decade):.3g}</text>'
        for b, x in ((b, _LEFT + (b - low) * wide) for b in ticks)
    )
    names += f'<text x="{_LEFT - 6}" y="{_TOP + 9}" text-anchor="end">{top:,}</text>'
    names += f'<text x="{_LEFT - 6}" y="{_TOP + _ROOM}" text-anchor="end">0</text>'
    ends = f"{_power(low / per_decade):.3g} to {_power(high / per_decade):.3g}"
    label = f"{title}: rows per logarithmic bin from {ends}, at most {top} in one"
    return _figure(title, "rows per bin, logarithmic", label, 640, bars + names)


def ranges(title: str, unit: str, layers: Sequence[tuple[str, Three | None]], *, log: bool = True) -> str:
    """A line for each layer from its smallest to its largest number, with a mark at the median; "" without numbers.

    >>> ranges("steps", "rad", [("a", (1.0, 2.0, 30.0)), ("b", None)]).count("<title>")
    1

    Args:
        title: what is shown.
        unit: of what, for the caption.
        layers: name and (min, median, max) of each, from left to right.
        log: a logarithmic axis; what is not positive then lies on its lower end.
    """
    there = [(i, name, s) for i, (name, s) in enumerate(layers) if s is not None and all(map(math.isfinite, s))]
    seen = [x for _, _, s in there for x in s if x > 0 or not log]
    if not seen:
        return ""
    ticks = _log_ticks(min(seen), max(seen)) if log else _ticks(min(seen), max(seen))
    low, high = (math.log10(ticks[0]), math.log10(ticks[-1])) if log else (ticks[0], ticks[-1])
    most = max(abs(low), abs(high))  # between the ends of float64 lies more than float64 holds

    def place(x: float) -> str:
        at = min(max((math.log10(x) if x > 0 else low) if log else x, low), high)
        share = (at / most - low / most) / (high / most - low / most)
        return f"{_TOP + _ROOM * (1 - share):.1f}"

    wide = (960 - _LEFT) / len(layers)
    mark = min(0.6 * wide, 14)
    hinted = len(layers) <= _HINTED
    lines = "".join(
        f'<path d="M{_LEFT + (i + 0.5) * wide:.1f} {place(s[0])}V{place(s[2])}'
        f'M{_LEFT + (i + 0.5) * wide - mark / 2:.1f} {place(s[1])}h{mark:.1f}"'
        + (f"><title>{_hint(name)}: {s[0]:.3g} / {s[1]:.3g} / {s[2]:.3g}</title></path>" if hinted else "/>")
        for i, name, s in there
    )
    lines = f'<g class="mark">{lines}</g>'
    axis = "".join(
        f'<path class="axis" d="M{_LEFT} {place(t)}H960"/><text x="{_LEFT - 6}" y="{float(place(t)) + 4:.1f}" '
        f'text-anchor="end">{t:.3g}</text>'
        for t in ticks
    )
    axis += f'<text x="{_LEFT}" y="{_TOP + _ROOM + 18}">first layer</text>'
    axis += f'<text x="960" y="{_TOP + _ROOM + 18}" text-anchor="end">last</text>'
    label = f"{title} of {len(there)} weights, {unit}, from {min(seen):.3g} to {max(seen):.3g}"
    return _figure(title, f"{unit}; min, median (mark), max over the rows of each weight", label, 960, axis + lines)


def _figure(title: str, note: str, label: str, width: int, inside: str) -> str:
    return (
        f'<figure class="w{width}"><figcaption><b>{html.escape(title)}</b> {html.escape(note)}</figcaption>'
        f'<svg viewBox="0 0 {width} {_TOP + _ROOM + 24}" role="img" aria-label="{html.escape(label)}">'
        f"{inside}</svg></figure>"
    )


def _hint(name: str) -> str:
    shown = printable(name)
    return html.escape(shown if len(shown) <= _TAIL else f"...{shown[-_TAIL:]}")


def _span(place: int, per_decade: int) -> str:
    return f"{_power(place / per_decade):.3g} to {_power((place + 1) / per_decade):.3g}"


def _power(exponent: float) -> float:
    """10 to a power, or the number of float64 next to it that is neither zero nor infinite."""
    try:
        return max(math.pow(10.0, exponent), math.ulp(0.0))
    except OverflowError:
        return sys.float_info.max


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that enclose what is seen; of many decades, the powers alone, thinned."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first <= 3:
        decades = range(first - 1, last + 2)  # just below a power of ten the logarithm may be rounded to it
        steps = sorted({t for e in decades for m in (1, 2, 5) if (t := m * _power(e)) < math.inf})
        start = min(max(i for i, t in enumerate(steps) if t <= low), len(steps) - 2)
        end = min((i for i, t in enumerate(steps) if t >= high and i > start), default=len(steps) - 1)
        return steps[start : end + 1]
    every = math.ceil((last - first) / 8)
    last += -(last - first) % every
    return [_power(e) for e in range(first, last + 1, every)]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, evenly spaced, that enclose what is seen and zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    raw = (high / 5 - low / 5) or 1.0
    power = _power(math.floor(math.log10(raw)))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    many = range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    ticks = [i * step for i in many if math.isfinite(i * step)]
    return ticks if len(ticks) > 1 else [0.0, 1.0]
