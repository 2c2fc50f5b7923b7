"""The page: its structure, its size, and strings from files that would do harm."""

from __future__ import annotations

import copy
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import wnsurgery as wn
from wnsurgery.charts import histogram, ranges
from wnsurgery.html_report import html_page, write_html
from wnsurgery.inspection import inspect


class Seen(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "rect", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "input", "rect", "path"):
            assert self.open.pop() == tag


def test_structure_for_keyboard_and_screen_reader() -> None:
    """Every tag closes; each sortable column is a button in a th with scope; tables have captions, pictures labels."""
    page = html_page(inspect(wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm((2, 2))))))
    seen = Seen(page)
    assert not seen.open
    heads = [a for t, a in seen.tags if t == "th"]
    assert all(a.get("scope") in ("col", "row") for a in heads)
    assert sum(t == "table" for t, _ in seen.tags) == sum(t == "caption" for t, _ in seen.tags) == 2
    assert sum(t == "button" for t, _ in seen.tags) == sum(a.get("scope") == "col" for a in heads)
    assert [a.get("role") for t, a in seen.tags if t == "svg"] == ["img"] * 3
    assert all(a.get("aria-label") for t, a in seen.tags if t == "svg")
    assert not [a for _, a in seen.tags if {"src", "href"} & a.keys()]


def test_changes_are_told_in_pictures_and_a_table() -> None:
    """With a comparison the page holds a picture of angles, of moves and of growth, and a line for each weight."""
    now = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4)))
    then = copy.deepcopy(now)
    with torch.no_grad():
        for p in now.parameters():
            p.add_(torch.rand_like(p))
    page = html_page(inspect(now), changes=wn.compare_weight_norm(now, then))
    labels = [a["aria-label"] or "" for t, a in Seen(page).tags if t == "svg"]
    for title in ("Angle that the direction turned", "Relative move of the magnitude", "Growth of ||v||"):
        assert sum(label.startswith(title) for label in labels) == 1
    section = page[page.index('id="changes"') :]
    assert section[: section.index("</section>")].count('<th scope="row">') == 2


def test_parity_tells_figures_and_all_of_it(tmp_path: Path) -> None:
    """Numbers of a parity report stand in a table; what is no JSON, or too deep, is an error and leaves no page."""
    model = wn.apply_weight_norm(nn.Linear(3, 2))
    page = html_page(inspect(model), parity={"proof": {"max_ulp": 1.25, "none": None}, "steps": [1, 2, 3]})
    assert '<th scope="row">proof.max_ulp</th><td>1.25</td>' in page
    assert '<th scope="row">steps</th><td>3 entries</td>' in page
    for text in ("{", "[" * 100_000):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(wn.InputError):
            write_html(inspect(model), tmp_path / "r.html", parity=tmp_path / "p.json")
        assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    "values",
    [
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0),
        (1e-300, 1.0, 1e300),
        (5e-324, 1e-10, 1.7e308),
        (-3.0, 0.0, 1e-9),
        (2.0, 2.1, 2.2),
        (5e-324, 5e-324, 5e-324),
        (5e-324, 1e-323, 2.5e-323),
        (0.0, 0.0, 2.5e-323),
        (1e306, 1e308, 1.79e308),
        (1e308, 1e308, 1e308),
        (sys.float_info.max,) * 3,
        (-sys.float_info.max, 0.0, sys.float_info.max),
        (5e-324, 1.0, sys.float_info.max),
    ],
)
@pytest.mark.parametrize("log", [False, True])
def test_pictures_of_any_numbers(values: tuple[float, float, float], log: bool) -> None:
    """Whatever the numbers are, lines stay inside the picture and its ticks enclose them."""
    picture = ranges("t", "u", [("a", values), ("b", None), ("c", (1.0, math.nan, 2.0))], log=log)
    if log and max(values) <= 0:
        assert picture == ""
        return
    heights = [float(y) for y in re.findall(r"V([-0-9.einfa]+)M", picture)]
    heights += [float(y) for y in re.findall(r'd="M[0-9.]+ ([-0-9.einfa]+)', picture)]
    assert heights
    assert all(0 <= y <= 210 for y in heights)
    assert "nan" not in picture.replace("nan /", "")
    assert "inf" not in picture


@pytest.mark.parametrize(
    "x",
    [5e-324, 1e-323, 0.7, 1.0, 3e7, 1e308, 1.7e308, sys.float_info.max]
    + [math.nextafter(10.0**e, 0) for e in (-300, -2, -1, 0, 1, 2, 15, 300)],
)
def test_ticks_stand_on_both_sides_of_a_single_number(x: float) -> None:
    """The lowest tick is at the number or below, the highest at it or above, and there are two at least."""
    picture = ranges("t", "u", [("a", (x, x, x))])
    assert ">u; min, median (mark), max over" in picture.replace("</b> ", ">")
    ticks = [float(t) for t in re.findall(r'text-anchor="end">([-0-9.e+]+)</text>', picture)]
    assert len(ticks) >= 2
    assert ticks[0] <= x * 1.01
    assert ticks[-1] >= x * 0.99


@pytest.mark.parametrize("g", [5e-324, 1e-323, 1.7e308, 1.79e308, sys.float_info.max])
@pytest.mark.parametrize("lr", [1.0, 1e-300, 1e300])
def test_magnitudes_at_the_ends_of_float64_have_a_page(g: float, lr: float) -> None:
    """The page is written, and no coordinate on it is without a number."""
    model = wn.apply_weight_norm(nn.Linear(3, 2).double())
    with torch.no_grad():
        model.parametrizations.weight.original0.copy_(torch.tensor([[g], [1.0]], dtype=torch.float64))
    page = html_page(inspect(model, lr=lr))
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    drawn = " ".join(re.findall(r' (?:d|x|y|width|height)="([^"]*)"', pictures))
    assert drawn
    assert not re.search("nan|inf", drawn)


def test_bins_of_extreme_numbers() -> None:
    """A histogram over many decades, or of one bin, has a handful of ticks and every row in a bar."""
    for bins in ([((-2400, 1), (2400, 3))], [((0, 5),)], [((-3, 1),), ((-2, 4), (-3, 1))]):
        picture = histogram("t", bins, 8)
        counts = [int(n) for n in re.findall(r": (\d+)</title>", picture)]
        assert sum(counts) == sum(n for one in bins for _, n in one)
        assert 2 <= picture.count('class="axis"') <= 10


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    """No name, title or parity string adds a tag or ends the script."""
    bad = "</script><script>alert(1)</script>\x1b[2J\"'"
    names = [f"{bad}.weight", "a" * 10_000 + ".weight"]
    state = {f"{n}{end}": torch.ones(2, 1 if end == "_g" else 2) for n in names for end in ("_g", "_v")}
    torch.save(state, tmp_path / "x.pt")
    page = html_page(inspect(tmp_path / "x.pt"), title=bad, parity={bad: bad})
    assert sum(t == "script" for t, _ in Seen(page).tags) == 1
    assert "<script>alert" not in page
    assert "\x1b" not in page
    assert len(page) < 30_000


def test_a_thousand_layers_stay_below_a_megabyte(tmp_path: Path) -> None:
    """The page of 1,000 layers with long names is under 1 MB, is written whole, and replaces nothing unasked."""
    after, before = (
        {
            f"module.transformer.h.{i}.attention.self.projection_{i}.{end}": t
            for i in range(1000)
            for end, t in (("weight_g", torch.rand(4, 1)), ("weight_v", torch.rand(4, 3)))
        }
        for _ in range(2)
    )
    torch.save(after, tmp_path / "x.pt")
    torch.save(before, tmp_path / "y.pt")
    changes = wn.compare_weight_norm(tmp_path / "x.pt", tmp_path / "y.pt")
    write_html(inspect(tmp_path / "x.pt", reference=tmp_path / "y.pt"), tmp_path / "r.html", changes=changes)
    assert 100_000 < (tmp_path / "r.html").stat().st_size < 1_000_000
    with pytest.raises(wn.OutputError):
        write_html(inspect(tmp_path / "x.pt"), tmp_path / "r.html")
