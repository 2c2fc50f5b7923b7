"""Names that come from a file and mean harm: in the terminal, the page, CSV and JSON, looking in and comparing."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from wnsurgery.cli import main
from wnsurgery.csv_text import csv_text
from wnsurgery.inspection import inspect
from wnsurgery.weight_table import show_weights

NAMES = {
    "script": "<script>alert(1)</script>",
    "closing": "</script></style></title><img src=x onerror=alert(1)>",
    "quotes": "\"' onmouseover='alert(1)' x=\"",
    "escapes": "\x1b[2J\x1b]0;owned\x07\x1b[31m\x9b31m",
    "bidi": "a\u202egnp.exe\u2066\u200f",
    "long": "L" * 10_000,
    "formula": "=cmd|' /C calc'!A0",
    "plus": "+1+1",
    "minus": "-2+3+cmd|' /C calc'!A0",
    "at": '@SUM(1+1)*cmd|" /C calc"!A0',
    "spaced": "  =1+1",
    "wide": "\uff1d1+1",
    "semicolon": "x;=1+1",
    "lines": "one\nwnsurgery: error: two\r\x0b\x85\u2028three",
    "nul": "nul\x00byte",
    "tab": "\t=1+1",
    "markup": "[bold red]x[/bold red] [link=http://x]y[/link]",
    "surrogate": "lone\ud800",
    "template": "{0}{name}%s$(id)`id`",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two moments of a net whose every name is hostile, as pairs and as plain weights."""
    here = tmp_path_factory.mktemp("hostile")
    paths = here / "now.pt", here / "then.pt"
    for number, path in enumerate(paths):
        state = {}
        for i, name in enumerate(NAMES.values()):
            state |= {f"{name}{i}.weight_g": torch.ones(2, 1), f"{name}{i}.weight_v": torch.eye(2) + number}
            state[f"{name}{i}.plain"] = torch.ones(2, 2)
            state |= {f"{number}{name}_g": torch.ones(2, 1), f"{number}{name}_v": torch.ones(2, 2)}  # in one file only
        torch.save(state, path)
    return paths


@pytest.fixture(params=["inspect", "against"])
def told(request: pytest.FixtureRequest, files: tuple[Path, Path], capsys: Any, tmp_path: Path) -> Any:
    """What the command prints with further options; the page lies in `tmp_path`."""
    against = ["--against", str(files[1])] if request.param == "against" else []

    def run(*options: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["inspect", str(files[0]), *against, *options])
        assert not ended.value.code, capsys.readouterr().err
        return str(capsys.readouterr().out)

    return run


def harmless(text: str) -> bool:
    """Whether a text holds nothing but printable characters and line ends."""
    return all(c == "\n" or (unicodedata.category(c)[0] not in "C" and c not in "\u2028\u2029") for c in text)


def test_terminal(told: Any) -> None:
    """No control or bidi character reaches the terminal, and no name starts a line or fills the screen."""
    text = told()
    assert harmless(text)
    assert not [line for line in text.splitlines() if line.startswith("wnsurgery")]
    assert "L" * 300 not in text
    assert "\\x1b[2J" in text
    assert "\\u202e" in text


@pytest.mark.parametrize("everything", [False, True])
def test_rich_table(files: tuple[Path, Path], everything: bool) -> None:
    """On a terminal, too: colours are ours alone, markup in names is text, no line is wider than the window."""
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    show_weights(inspect(files[0]), everything=everything, console=console)
    text = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert harmless(text)
    assert "[bold red]" in text.replace("\n", "")
    assert max(map(len, text.splitlines())) <= 100


def test_csv(told: Any) -> None:
    """No cell, whatever a spreadsheet takes for the separator, begins as a formula does; all lines have all cells."""
    text = told("--csv")
    assert harmless(text)
    rows = list(csv.reader(io.StringIO(text)))
    assert len({len(row) for row in rows}) == 1
    assert len(rows) > len(NAMES)
    for separator in ",;\t":
        for row in csv.reader(io.StringIO(text), delimiter=separator):
            for value in row[:1] if separator == "," else row:
                assert value.lstrip()[:1] not in ("=", "+", "-", "@", "\uff1d"), value


def test_csv_cells() -> None:
    """Formulas in any column, behind spaces or in full width, are defused; numbers are not."""
    rows = list(csv.reader(io.StringIO(csv_text([(-1, 2.5, "=1", " +1", "\uff1d1", 'a"b', "", None, "a-b")]))))
    assert rows == [["-1", "2.5", "'=1", "' +1", "'\uff1d1", 'a"b', "", "", "a-b"]]


def test_json(told: Any) -> None:
    """JSON is one line of ASCII that a strict reader takes and that holds every name as it was."""
    text = told("--json")
    assert text.isascii()
    assert text.count("\n") == 1

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(text, parse_constant=refuse)
    names = {w["name"] for w in read["weights"]}
    assert {f"{name}{i}.weight" for i, name in enumerate(NAMES.values())} <= names


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}


def test_page(told: Any, tmp_path: Path) -> None:
    """The page has one script, no image, no handler, no control character, and is not swollen by a long name."""
    (tmp_path / "parity.json").write_text(json.dumps(NAMES | {"list": list(NAMES.values())}))
    told("--html", str(tmp_path / "r.html"), "--parity", str(tmp_path / "parity.json"))
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    seen = Tags(text)
    assert seen.tags.count("script") == seen.tags.count("style") == 1
    assert not {"img", "iframe", "a", "link"} & set(seen.tags)
    assert not [name for name in seen.attributes if name.startswith("on") or name in ("src", "href")]
    assert harmless(text)
    assert len(text) < 300_000
