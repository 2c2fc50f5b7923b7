"""What options say in a notation of their own, `PATTERN=VALUE`, as the values that the library takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

__all__ = ["parse_axes", "parse_dims", "parse_scales"]

_ALL = "*"  # the pattern that a value without one gets, behind all others


def parse_dims(dims: tuple[str, ...]) -> Any:
    """`0`, `0,2`, `none` for all weights that no pattern fits, `PATTERN=AXES` for some."""

    def read(axes: str) -> Any:
        kept = None if axes == "none" else _axes(axes)
        return kept[0] if kept and len(kept) == 1 else kept

    return _assigned(dims, read, "--dim", "[PATTERN=]AXES, e.g. 'ups.*=1'") or "auto"


def parse_axes(texts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """`x=0,2` as {"x": (0, 2)}."""
    for text in texts:
        if "=" not in text:
            raise click.BadParameter(f"{text!r} is not NAME=AXES, e.g. x=0,2", param_hint="--dynamic-axes")
    return _assigned(texts, _axes, "--dynamic-axes", "NAME=AXES, e.g. x=0,2")


def parse_scales(scales: tuple[str, ...]) -> Any:
    """`0.5` for all weights that no pattern fits, `PATTERN=0.1` for some."""
    table = _assigned(scales, float, "--init-scale", "[PATTERN=]X, e.g. 'head=0.1'")
    return table if table.keys() - {_ALL} else table.get(_ALL, 1.0)


def _axes(text: str) -> tuple[int, ...]:
    return tuple(int(axis) for axis in text.split(","))


def _assigned(texts: tuple[str, ...], read: Callable[[str], Any], option: str, form: str) -> dict[str, Any]:
    """Values by pattern in the order given, the first that fits to decide; the value for the rest comes last."""
    table: dict[str, Any] = {}
    for text in sorted(texts, key=lambda text: "=" not in text):  # a stable sort
        pattern, sign, value = text.rpartition("=")
        try:
            parsed = read(value)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not {form}", param_hint=option) from None
        if sign and not pattern:
            raise click.BadParameter(f"{text!r}: nothing stands before the =", param_hint=option)
        if table.setdefault(pattern or _ALL, parsed) != parsed:
            named = pattern or "what no pattern fits"
            raise click.BadParameter(f"{text!r}: {named} has another value already", param_hint=option)
    return table
