"""The pictures: their scripts run, the arithmetic behind them is right, and the files are what the script draws."""

from __future__ import annotations

import copy
import importlib.util
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn.functional import cross_entropy

import wnsurgery as wn

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("convergence", "growth", "gradient")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def pictures() -> Iterator[ModuleType]:
    """The script, on one thread."""
    pytest.importorskip("sklearn")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("pictures_script", EXAMPLES / "pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(EXAMPLES))
        torch.set_num_threads(threads)


def near(drawn: str, committed: str) -> bool:
    """The same text, numbers up to one unit of the picture: training rounds differently on other processors."""
    found, stated = NUMBER.findall(drawn), NUMBER.findall(committed)
    return (
        NUMBER.sub("#", drawn) == NUMBER.sub("#", committed)
        and len(found) == len(stated)
        and all(abs(float(a) - float(b)) <= 1 for a, b in zip(found, stated, strict=True))
    )


def test_quick_run_writes_the_same_bytes_each_time(tmp_path: Path, pictures: ModuleType) -> None:
    """The command and a second process give the same files; ||v|| keeps to the law under plain SGD alone."""
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / "pictures.py", "--quick", "-o", tmp_path / "new"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(EXAMPLES.parent), "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    apart = re.findall(r"growth of .*, (SGD|Adam)\b.* any row (\S+)", done.stdout)
    assert [float(x) < 1e-5 for _, x in apart] == [True, False, False]
    for name in NAMES:
        written = (tmp_path / "new" / f"{name}.svg").read_bytes()
        assert written == getattr(pictures, name)(30, 2).encode()
        ET.fromstring(written)


def test_quick_run_does_not_replace_the_committed_pictures(
    pictures: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--quick without a folder is refused."""
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--quick"])
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: pytest.fail("written"))
    with pytest.raises(SystemExit) as stop:
        pictures.main()
    assert stop.value.code == 2
    assert "--quick needs -o" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_committed_pictures_can_be_shown_anywhere(name: str) -> None:
    """Small, well-formed, with a title and a description for those who do not see them, and nothing from outside."""
    text = (EXAMPLES / "pictures" / f"{name}.svg").read_text(encoding="utf-8")
    assert len(text.encode()) < 60_000
    root = ET.fromstring(text)
    kinds = [child.tag.rpartition("}")[2] for child in root]
    assert kinds[:3] == ["title", "desc", "rect"]
    assert not re.search(r"href|<script|<image|@import", text)
    assert not re.search(r"\b(nan|inf)\b", text)


@pytest.mark.parametrize("name", ["growth", "gradient"])
def test_committed_picture_is_what_the_script_draws(name: str, pictures: ModuleType) -> None:
    """The full run gives the committed file."""
    drawn = getattr(pictures, name)(pictures.STEPS, pictures.SEEDS)
    assert near(drawn, (EXAMPLES / "pictures" / f"{name}.svg").read_text(encoding="utf-8"))


def test_committed_convergence_is_what_the_script_draws(
    pictures: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first of its three plots stands line by line in the committed file, the numbers printed in the answers."""
    monkeypatch.setattr(pictures, "RATES", pictures.RATES[:1])
    drawn = pictures.convergence(pictures.STEPS, pictures.SEEDS).splitlines()
    committed = (EXAMPLES / "pictures" / "convergence.svg").read_text(encoding="utf-8").splitlines()
    start = drawn.index("</svg>") - len(pictures.METHODS) * 2  # the legend follows all plots
    assert [line for line, other in zip(drawn[:start], committed, strict=False) if not near(line, other)] == []
    (numbers,) = re.findall(r"first layer is (\S+) \|\|v\|\|: .* grow (\d+)-fold", capsys.readouterr().out)
    page = (EXAMPLES / "ANSWERS.md").read_text(encoding="utf-8")
    assert f"g is {numbers[0]} ‖v‖" in page and f"(g/‖v‖)² = {numbers[1]} times" in page
    assert sum("stroke=" in line and "<path" in line for line in drawn[:start]) > 10


def test_parts_are_the_gradient_of_w(pictures: ModuleType) -> None:
    """The two parts, from the gradients of g and v, are those of the gradient of a plain copy's w, rotated to w."""
    model = wn.apply_weight_norm(pictures.net(3))
    with torch.no_grad():
        g, v = pictures.first_pair(model)
        g.mul_(torch.linspace(-2, 2, len(g))[:, None] + 0.01)
        v.mul_(3)
    plain = wn.fold_weight_norm(copy.deepcopy(model))
    for net in (model, plain):
        cross_entropy(net(pictures.X[:100]), pictures.Y[:100]).backward()
    radial, tangential = pictures.parts(model)
    direction = v.detach().double() / v.detach().double().norm(dim=1, keepdim=True)
    whole = plain[0].weight.grad.double()
    along = (whole * direction).sum(1)
    assert torch.allclose(radial, along, atol=1e-6)
    assert torch.allclose(tangential, (whole - along[:, None] * direction).norm(dim=1), atol=1e-6)
    assert tangential.max() > 1e-3 and radial.abs().max() > 1e-4
