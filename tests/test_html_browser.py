"""The page in a browser: it loads in silence, asks nobody, sorts and searches."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from wnsurgery.html_report import html_page
from wnsurgery.inspection import inspect
from wnsurgery.turning import compare_weight_norm

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
FLAGS += ["--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom"]
HOSTILE = "</script><script>window.harmed=1</script><img src=x onerror=window.harmed=1>\u202e\x1b[2J\x00"

# Put before the page's own script: what goes wrong from the first line on.
WATCH = """<script>window.seen={errors:[],violations:[]};
addEventListener("error",e=>seen.errors.push(String(e.message)));
addEventListener("securitypolicyviolation",e=>seen.violations.push(e.blockedURI));</script>"""

# Put at the end: does what a person does, and leaves what there was to see in the document.
PLAY = """<script>addEventListener("load",()=>{
const part=document.getElementById("weights"),rows=()=>[...part.querySelectorAll("tbody tr")];
const names=()=>rows().filter(r=>!r.hidden).map(r=>r.cells[0].textContent);
const heads=[...part.querySelectorAll("thead th")],box=part.querySelector("input");
const sorts=heads.map(h=>h.getAttribute("aria-sort"));
const press=i=>{heads[i].querySelector("button").click();return [names(),heads[i].getAttribute("aria-sort"),
heads.filter(h=>h.hasAttribute("aria-sort")).length]};
seen.sorts=sorts;seen.start=names();seen.up=press(5);seen.down=press(5);seen.byName=press(0);
const look=text=>{box.value=text;box.dispatchEvent(new Event("input"));
return [names(),part.querySelector("[role=status]").textContent]};
seen.found=look("LAYER10 legacy");seen.none=look("no such");seen.all=look("");
heads[3].querySelector("button").focus();
seen.focus=document.activeElement===heads[3].querySelector("button");
seen.labelled=[...document.querySelectorAll("input")].every(i=>i.labels.length===1);
seen.rowHeads=rows().every(r=>r.cells[0].scope==="row");
seen.harmed=window.harmed===1;seen.images=document.images.length;
seen.resources=performance.getEntriesByType("resource").length;
seen.wide=document.documentElement.scrollWidth<=innerWidth;
document.body.append(Object.assign(document.createElement("pre"),{id:"seen",textContent:JSON.stringify(seen)}));
})</script>"""


def saved(path: Path, *, before: bool = False) -> Path:
    """Twelve layers whose median g is 3, 1, 4, ... and one with a name that would do harm."""
    state = {}
    for i in range(12):
        g = torch.full((3, 1), float((i * 5) % 12 + 1))
        state[f"layer{i}.weight_g"], state[f"layer{i}.weight_v"] = g, torch.eye(3) + (0.1 if before else 0.0)
    state[f"{HOSTILE}.weight_g"], state[f"{HOSTILE}.weight_v"] = torch.full((3, 1), 99.0), torch.eye(3)
    state[f"{HOSTILE}.other"] = torch.ones(2, 2)
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    """What the page's visitor saw, what the browser wrote to its console, and the addresses it asked for."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    here = tmp_path_factory.mktemp("page")
    now, then = saved(here / "now.pt"), saved(here / "then.pt", before=True)
    parity = {"ok": True, HOSTILE: {"max_ulp": 0.5, "list": [HOSTILE]}}
    page = html_page(inspect(now), title=HOSTILE, parity=parity, changes=compare_weight_norm(now, then))
    assert page.count("<script>") == 1
    page = page.replace("<main>", WATCH + "<main>").replace("</body>", PLAY + "</body>")
    (here / "page.html").write_text(page, encoding="utf-8")
    (here / "bare.html").write_text("<p>works</p>", encoding="utf-8")
    bare = browse(here / "bare.html", here / "bare")
    if "works" not in bare.stdout:
        pytest.skip(f"Chromium does not run here: {bare.stderr[-200:]}")
    done = browse(here / "page.html", here / "profile", f"--log-net-log={here / 'net.json'}")
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, f"the page's visitor did not come to an end: {done.stderr[-2000:]}"
    log = (here / "net.json").read_text(encoding="utf-8", errors="replace")
    return json.loads(html.unescape(found[1])), done.stderr, log


def browse(page: Path, profile: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", *more, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_loads_in_silence(visit: tuple[dict[str, Any], str, str]) -> None:
    """No error, nothing on the console, no harm from names, nothing wider than the window."""
    seen, console, _ = visit
    assert seen["errors"] == seen["violations"] == []
    assert "CONSOLE" not in console
    assert not seen["harmed"]
    assert seen["images"] == 0
    assert seen["wide"]


def test_asks_nobody(visit: tuple[dict[str, Any], str, str]) -> None:
    """The page asks for no resource, and the browser sends no request over the network on its account."""
    seen, _, log = visit
    assert seen["resources"] == 0
    assert "example.invalid" not in log
    assert "page.html" in log or "constants" in log


def test_sorts(visit: tuple[dict[str, Any], str, str]) -> None:
    """A button sorts by the median, up and then down, by names with their numbers as numbers, and says so."""
    seen, _, _ = visit
    place = {f"layer{i}.weight": (i * 5) % 12 for i in range(12)}
    assert seen["sorts"] == [None] * 9
    up, direction, marked = seen["up"]
    assert [place.get(n, 99) for n in up] == [*range(12), 99]
    assert (direction, marked) == ("ascending", 1)
    assert seen["down"][:2] == [up[::-1], "descending"]
    layers = [n for n in seen["byName"][0] if n in place]
    assert layers == list(place)


def test_searches(visit: tuple[dict[str, Any], str, str]) -> None:
    """Every word searched for must be in the line, whatever its case; the number found is told."""
    seen, _, _ = visit
    assert seen["found"] == [["layer10.weight"], "1 of 13 shown"]
    assert seen["none"] == [[], "0 of 13 shown"]
    assert len(seen["all"][0]) == 13


def test_keyboard_and_screen_reader(visit: tuple[dict[str, Any], str, str]) -> None:
    """Titles take the focus, boxes have labels, rows have headers."""
    seen, _, _ = visit
    assert seen["focus"]
    assert seen["labelled"]
    assert seen["rowHeads"]
