"""The notation of options, `PATTERN=VALUE`."""

from __future__ import annotations

from typing import Any

import click
import pytest

from wnsurgery.arguments import parse_axes, parse_dims, parse_scales


@pytest.mark.parametrize(
    ("texts", "dims", "scales"),
    [
        ([], "auto", 1.0),
        (["2"], {"*": 2}, 2.0),
        (["1", "a.*=0"], {"a.*": 0, "*": 1}, {"a.*": 0.0, "*": 1.0}),
        (["a.*=0", "1"], {"a.*": 0, "*": 1}, {"a.*": 0.0, "*": 1.0}),
        (["b=1", "a=0", "b=1"], {"b": 1, "a": 0}, {"b": 1.0, "a": 0.0}),
        (["*=1", "1"], {"*": 1}, 1.0),
        (["re:^a=b$=1"], {"re:^a=b$": 1}, {"re:^a=b$": 1.0}),
    ],
)
def test_the_general_value_is_for_what_no_pattern_fits(texts: list[str], dims: Any, scales: Any) -> None:
    """Wherever it stands, it comes last, since the first pattern that fits decides; --dim and --init-scale alike."""
    for parse, expected in ((parse_dims, dims), (parse_scales, scales)):
        found = parse(tuple(texts))
        assert found == expected
        assert not isinstance(found, dict) or list(found) == list(expected)


def test_axes_in_every_form() -> None:
    """Several axes, none of them, and names with their axes."""
    assert parse_dims(("0,2", "a=none")) == {"a": None, "*": (0, 2)}
    assert parse_axes(("x=0,2", "y=1")) == {"x": (0, 2), "y": (1,)}


@pytest.mark.parametrize("parse", [parse_dims, parse_axes, parse_scales])
@pytest.mark.parametrize("texts", [["a=0", "a=1"], ["0", "1"], ["*=0", "1"], ["=1"], ["="], ["a="], ["x"], ["a=y"]])
def test_contradictions_are_usage_errors(parse: Any, texts: list[str]) -> None:
    """Two values for the same, no pattern before the sign, and what is no value: exit code 2."""
    with pytest.raises(click.BadParameter) as caught:
        parse(tuple(texts))
    assert caught.value.exit_code == 2
    assert any(repr(text) in caught.value.message for text in texts)
