"""Line plots and arrows as SVG text, the same bytes for the same numbers; what `pictures.py` draws with."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

# Okabe and Ito's colours, told apart by colour-blind readers, too; each line has a dash pattern of its own besides.
BLUE, RED, GREEN, PURPLE, INK, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#222222", "#767676"

Point = tuple[float, float]


@dataclass
class Panel:
    """One pair of axes, placed by its left edge; marks are added in data units.

    x and y are (lowest, highest) in data units; `ticks` the numbers written along each axis.
    """

    left: float
    width: float
    x: tuple[float, float]
    y: tuple[float, float]
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    title: str
    x_label: str
    y_label: str = ""
    log: bool = False
    top: float = 62
    height: float = 220
    marks: list[str] = field(default_factory=list)

    def at(self, point: Point) -> str:
        """A point in the picture's units; what is outside lies on the edge."""
        low, high, value = (math.log10(max(v, 1e-30)) if self.log else v for v in (*self.y, point[1]))
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = min(max((value - low) / (high - low), 0.0), 1.0)
        return f"{self.left + self.width * across:.1f} {self.top + self.height * (1 - up):.1f}"

    def line(self, points: Sequence[Point], colour: str, dash: str = "", width: float = 1.8) -> None:
        path = "L".join(map(self.at, points))
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.marks.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashes}/>')

    def band(self, steps: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str) -> None:
        there = list(zip(steps, low, strict=True)) + list(zip(steps, high, strict=True))[::-1]
        self.marks.append(f'<path d="M{"L".join(map(self.at, there))}Z" fill="{colour}" fill-opacity="0.18"/>')

    def arrow(self, start: Point, end: Point, colour: str, dash: str = "") -> None:
        self.line([start, end], colour, dash, 2.4)
        (x0, y0), (x1, y1) = (tuple(map(float, self.at(p).split())) for p in (start, end))
        turn = math.atan2(y1 - y0, x1 - x0)
        wings = [f"{x1 - 9 * math.cos(turn + a):.1f} {y1 - 9 * math.sin(turn + a):.1f}" for a in (-0.4, 0.4)]
        self.marks.append(f'<path d="M{x1:.1f} {y1:.1f}L{"L".join(wings)}Z" fill="{colour}"/>')

    def note(self, point: Point, text: str, colour: str = INK, anchor: str = "start", shift: Point = (0, 0)) -> None:
        x, y = (float(v) + s for v, s in zip(self.at(point).split(), shift, strict=True))
        self.marks.append(words(x, y, text, anchor, colour))

    def draw(self) -> str:
        bottom, right = self.top + self.height, self.left + self.width
        parts = [words(self.left + self.width / 2, self.top - 8, self.title, "middle")]
        for tick in self.x_ticks:
            x = self.at((tick, self.y[0])).split()[0]
            parts.append(f'<path d="M{x} {bottom:.1f}v4" stroke="{GREY}"/>')
            parts.append(words(float(x), bottom + 17, f"{tick:g}", "middle"))
        for tick in self.y_ticks:
            y = self.at((self.x[0], tick)).split()[1]
            parts.append(f'<path d="M{self.left:.1f} {y}H{right:.1f}" stroke="#D8D8D4"/>')
            parts.append(words(self.left - 6, float(y) + 4, f"{tick:g}", "end"))
        parts.append(words(self.left + self.width / 2, bottom + 35, self.x_label, "middle"))
        if self.y_label:
            middle = self.top + self.height / 2
            turned = f'transform="rotate(-90 {self.left - 40:.1f} {middle:.1f})"'
            parts.append(words(self.left - 40, middle, self.y_label, "middle", INK, turned))
        frame = f'<path d="M{self.left:.1f} {self.top:.1f}V{bottom:.1f}H{right:.1f}" fill="none" stroke="{GREY}"/>'
        return "\n".join([*parts, *self.marks, *([frame] if self.x_ticks else [])])


def words(x: float, y: float, text: str, anchor: str = "start", colour: str = INK, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" {more}>{html.escape(text)}</text>'


def legend(entries: Sequence[tuple[str, str, str]], y: float, left: float, apart: float) -> str:
    """(name, colour, dash) side by side."""
    parts = []
    for i, (name, colour, dash) in enumerate(entries):
        x = left + i * apart
        dashes = f'stroke-dasharray="{dash or "none"}"'
        parts.append(f'<path d="M{x:.1f} {y - 4:.1f}h26" stroke="{colour}" stroke-width="2.4" {dashes}/>')
        parts.append(words(x + 32, y, name))
    return "\n".join(parts)


def picture(title: str, description: str, panels: Sequence[Panel], *more: str, size: tuple[int, int]) -> str:
    """The whole file, on a light background of its own so that it reads on dark pages, too."""
    width, height = size
    heading = f'<text x="{width / 2:.1f}" y="24" text-anchor="middle" font-size="15" font-weight="bold" fill="{INK}">'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'role="img" font-family="Helvetica, Arial, sans-serif" font-size="12">',
            f"<title>{html.escape(title)}</title>",
            f"<desc>{html.escape(description)}</desc>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#FAFAF7"/>',
            f"{heading}{html.escape(title)}</text>",
            *(panel.draw() for panel in panels),
            *more,
            "</svg>\n",
        ]
    )
