"""The page of answers prints what its script prints."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
PAGE = (EXAMPLES / "ANSWERS.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S))
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


@pytest.fixture(scope="module")
def answers() -> Iterator[ModuleType]:
    """The script, on one thread."""
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("answers", EXAMPLES / "answers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    spec.loader.exec_module(module)
    yield module
    torch.set_num_threads(threads)


def test_page_and_script_have_the_same_questions(answers: ModuleType) -> None:
    """Neither asks what the other does not answer."""
    assert list(SECTIONS) == list(answers.SECTIONS)


@pytest.mark.parametrize("question", SECTIONS)
def test_printed_numbers_are_those_of_the_page(
    question: str, answers: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word for word, and digit for digit up to two in the last place: training rounds differently elsewhere."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", SECTIONS[question], flags=re.M | re.S)
    (shown,) = (text for language, text in blocks if not language)
    answers.SECTIONS[question]()
    printed = capsys.readouterr().out
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split()
    for found, stated in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        places = len(stated.partition(".")[2])
        assert float(found) == pytest.approx(float(stated), abs=2.01 * 10**-places if places else 0), printed
