"""What options say in a notation of their own, `PATTERN=VALUE`, as the values that the library takes."""

from __future__ import annotations

from typing import Any

import click

__all__ = ["parse_axes", "parse_dims", "parse_scales"]


def parse_dims(dims: tuple[str, ...]) -> Any:
    """`0`, `0,2`, `none` for all weights, or `PATTERN=AXES` for some."""
    parsed: dict[str, Any] = {}
    for text in dims:
        pattern, _, axes = text.rpartition("=")
        try:
            kept = None if axes == "none" else tuple(int(a) for a in axes.split(","))
        except ValueError:
            raise click.BadParameter(f"{text!r} is not [PATTERN=]AXES, e.g. 'ups.*=1'", param_hint="--dim") from None
        parsed[pattern or "*"] = kept[0] if kept and len(kept) == 1 else kept
    return parsed or "auto"


def parse_axes(texts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """`x=0,2` as {"x": (0, 2)}."""
    found = {}
    for text in texts:
        name, _, axes = text.rpartition("=")
        try:
            found[name] = tuple(int(a) for a in axes.split(","))
        except ValueError:
            raise click.BadParameter(f"{text!r} is not NAME=AXES, e.g. x=0,2", param_hint="--dynamic-axes") from None
    return found


def parse_scales(scales: tuple[str, ...]) -> Any:
    """`0.5` for all weights, or `PATTERN=0.1` for some, these first."""
    parsed: dict[str, float] = {}
    rest: float | None = None
    for text in scales:
        pattern, _, number = text.rpartition("=")
        try:
            scale = float(number)
        except ValueError:
            raise click.BadParameter(
                f"{text!r} is not [PATTERN=]X, e.g. 'head=0.1'", param_hint="--init-scale"
            ) from None
        if pattern:
            parsed.setdefault(pattern, scale)
        else:
            rest = scale
    if not parsed:
        return 1.0 if rest is None else rest
    return parsed if rest is None else {**parsed, "*": rest}
