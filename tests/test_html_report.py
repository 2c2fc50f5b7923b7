"""The page: its structure, its size, and strings from files that would do harm."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import wnsurgery as wn
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
    assert [a.get("role") for t, a in seen.tags if t == "svg"] == ["img"] * 3
    assert all(a.get("aria-label") for t, a in seen.tags if t == "svg")
    columns = sum(t == "button" for t, _ in seen.tags)
    keys = re.search(r'id="keys">(.*?)</script>', page)
    assert keys is not None
    assert [len(k) for k in json.loads(keys[1])] == [columns]
    assert not [a for _, a in seen.tags if {"src", "href"} & a.keys()]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    """No name, title or parity string adds a tag or ends the script."""
    bad = "</script><script>alert(1)</script>\x1b[2J\"'"
    names = [f"{bad}.weight", "a" * 10_000 + ".weight"]
    state = {f"{n}{end}": torch.ones(2, 1 if end == "_g" else 2) for n in names for end in ("_g", "_v")}
    torch.save(state, tmp_path / "x.pt")
    page = html_page(inspect(tmp_path / "x.pt"), title=bad, parity={bad: bad})
    assert sum(t == "script" for t, _ in Seen(page).tags) == 2
    assert "<script>alert" not in page
    assert "\x1b" not in page
    assert len(page) < 30_000


def test_a_thousand_layers_stay_below_a_megabyte(tmp_path: Path) -> None:
    """The page of 1,000 layers with long names is under 1 MB, is written whole, and replaces nothing unasked."""
    layers = {f"transformer.h.{i}.attention.projection": nn.Linear(2, 2) for i in range(1000)}
    state = {
        f"{k}.{end}": t
        for k, m in layers.items()
        for end, t in (("weight_g", torch.ones(2, 1)), ("weight_v", m.weight))
    }
    torch.save(state, tmp_path / "x.pt")
    write_html(inspect(tmp_path / "x.pt"), tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 1_000_000
    with pytest.raises(wn.OutputError):
        write_html(inspect(tmp_path / "x.pt"), tmp_path / "r.html")
