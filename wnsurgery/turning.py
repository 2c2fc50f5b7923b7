"""What changed between two moments of training: the angle each direction turned, and the magnitudes that moved."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wnsurgery.contents import Contents, Normed, Plain, opened, refuse_unknown
from wnsurgery.csv_text import csv_text
from wnsurgery.errors import InputError, printable
from wnsurgery.reparam import Axes, Magnitude
from wnsurgery.spread import Spread, ratio, row_norms, spread
from wnsurgery.text import by, columns

__all__ = ["TurnReport", "Turned", "angles", "compare_weight_norm"]

_BLOCK = 1 << 20  # elements widened at a time


@dataclass(frozen=True)
class Turned:
    """How the rows of one weight changed, as (min, median, max) over its rows.

    Attributes:
        angle: between the directions before and after, in degrees; rows without direction left out.
        moved: (g - g before) / |g before|; rows with g = 0 before left out.
        growth: ||v|| / ||v|| before.
    """

    name: str
    shape: tuple[int, ...]
    angle: Spread | None
    moved: Spread | None
    growth: Spread | None


@dataclass(frozen=True)
class TurnReport:
    """What `compare_weight_norm` found; prints as a table.

    Attributes:
        weights: those that both sides hold.
        unmatched: (name, reason) for every pair that could not be compared.
    """

    weights: tuple[Turned, ...]
    unmatched: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        rows = [("weight", "shape", "angle, degrees", "g moved by", "||v|| / before")]
        rows += [
            (printable(w.name), by(w.shape), _three(w.angle), _three(w.moved), _three(w.growth)) for w in self.weights
        ]
        lines = [f"{len(self.weights)} weights compared (min / median / max over rows)", *columns(rows)]
        if self.unmatched:
            lines += ["", f"{len(self.unmatched)} not compared"]
            lines += columns([(printable(name), reason) for name, reason in self.unmatched])
        return "\n".join(lines)

    def to_csv(self) -> str:
        """One line per weight."""
        parts = [f"{s}_{p}" for s in ("angle", "moved", "growth") for p in Spread._fields]
        rows: list[list[object]] = [["name", "shape", *parts, "reason"]]
        for w in self.weights:
            numbers = [x for s in (w.angle, w.moved, w.growth) for x in s or ("", "", "")]
            rows.append([printable(w.name), by(w.shape), *numbers, ""])
        rows += [[printable(name), "", *[""] * len(parts), reason] for name, reason in self.unmatched]
        return csv_text(rows)


def compare_weight_norm(
    after: nn.Module | str | os.PathLike[str],
    before: nn.Module | str | os.PathLike[str],
    *,
    arch: str | None = None,
    trust_pickle: bool = False,
    magnitude: Magnitude = "linear",
    progress: Callable[[int, int], None] | None = None,
    entry: str | None = None,
) -> TurnReport:
    """Which directions turned and which magnitudes moved between two moments of training, weight by weight.

    >>> import copy
    >>> start = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 2)))
    >>> wn.compare_weight_norm(start, copy.deepcopy(start)).weights[0].angle
    Spread(min=0.0, median=0.0, max=0.0)

    Args:
        after, before: modules or paths, as `inspect` takes them; a plain weight counts as g = ||w||, v = w, and
            is compared with a pair through the weight that the pair stands for.
        arch, trust_pickle, magnitude, entry: as of `inspect`.
        progress: told (tensors looked at, tensors in all).

    Raises InputError when the two have no weight in common; as `inspect` does.
    """
    options = {"arch": arch, "trust_pickle": trust_pickle, "magnitude": magnitude, "entry": entry}
    with opened(after, **options) as new, opened(before, **options) as old, torch.no_grad():  # type: ignore[arg-type]
        refuse_unknown(entry, new, old)
        return _compared(new, old, progress)


def _compared(new: Contents, old: Contents, progress: Callable[[int, int], None] | None) -> TurnReport:
    known: dict[str, Normed | Plain] = {p.name: p for p in old.others}
    known |= {name: w for w in old.weights for name in (w.name, *w.also)}
    turned: list[Turned] = []
    unmatched: list[tuple[str, str]] = []
    names = set[str]()
    current: list[Normed | Plain] = [*new.weights, *new.others]
    for i, one in enumerate(current):
        if progress is not None:
            progress(i, len(current))
        names |= {one.name, *(one.also if isinstance(one, Normed) else ())}
        was = known.get(one.name)
        if isinstance(one, Plain) and not isinstance(was, Normed):
            continue  # plain on both sides
        found = _turned(one, was)
        if isinstance(found, str):
            unmatched.append((one.name, found))
        else:
            turned.append(found)
    unmatched += [(w.name, "only before") for w in old.weights if not {w.name, *w.also} & names]
    if not turned:
        raise InputError("no weight under weight norm is in both", hint="; ".join(r for _, r in unmatched[:1]) or None)
    return TurnReport(tuple(turned), tuple(unmatched))


def _turned(one: Normed | Plain, was: Normed | Plain | None) -> Turned | str:
    """The change of one weight, or why there is none to tell."""
    if was is None:
        return "only after"
    if one.shape != was.shape or one.shape is None:
        return f"{by(was.shape)} before, {by(one.shape)} after"
    wished = {side.axes for side in (one, was) if isinstance(side, Normed)}
    axes = wished.pop()
    if wished or axes is None:
        return "its kept axes differ or are unknown"
    plain = isinstance(one, Plain) or isinstance(was, Plain)
    now, then = _rows(one, axes, plain), _rows(was, axes, plain)
    if now is None or then is None:
        return "no values"
    (g, v, norms), (g0, v0, norms0) = now, then
    return Turned(
        one.name,
        one.shape,
        spread(angles(v, v0, axes, norms, norms0)),
        spread(ratio(g - g0, g0.abs())),
        spread(ratio(norms, norms0)),
    )


def _rows(one: Normed | Plain, axes: Axes, plain: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """g, v and ||v||; with `plain` signs of g go into ||v||, for a plain weight has no others."""
    if isinstance(one, Plain):
        v = one.value() if one.value else None
        if v is None or v.is_meta or not v.is_floating_point():
            return None
        norms = row_norms(v, axes)
        return norms, v, norms
    if one.values is None:
        return None
    g, v = one.values()
    if v.is_meta:
        return None
    g, norms = g.double().flatten(), row_norms(v, axes)
    if plain and bool((g < 0).any()):
        signs = torch.where(g < 0, -1.0, 1.0)
        view, dims = axes.grouped(v), axes.reduced(v.ndim)
        shape = [1 if d in dims else size for d, size in enumerate(view.shape)]
        v, g = (view * signs.reshape(shape).to(v.dtype)).reshape(v.shape), g.abs()
    return g, v, norms


def angles(a: Tensor, b: Tensor, axes: Axes, norms_a: Tensor, norms_b: Tensor) -> Tensor:
    """The angle between the rows of two directions, in degrees, for rows that are not zero in either; accurate for
    small angles, too: 2 atan2(|x - y|, |x + y|) of the unit vectors x and y (Kahan)."""
    x, y = _matrix(a, axes), _matrix(b, axes)
    rows, width = x.shape
    tall = max(1, _BLOCK // max(width, 1))
    apart, along = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    for top in range(0, rows, tall):
        band = slice(top, top + tall)
        for left in range(0, width, _BLOCK):
            part = slice(left, left + _BLOCK)
            p = x[band, part].double() / norms_a[band, None]
            q = y[band, part].double() / norms_b[band, None]
            apart[band] += (p - q).square().sum(1).cpu()
            along[band] += (p + q).square().sum(1).cpu()
    there = ((norms_a != 0) & (norms_b != 0)).cpu()
    return torch.rad2deg(2 * torch.atan2(apart.sqrt(), along.sqrt()))[there]


def _matrix(v: Tensor, axes: Axes) -> Tensor:
    """A direction as rows by elements, rows in the order of `row_norms`."""
    view = axes.grouped(v)
    dims = axes.reduced(v.ndim)
    kept = [d for d in range(view.ndim) if d not in dims]
    rows = 1
    for d in kept:
        rows *= view.shape[d]
    return view.permute(*kept, *dims).reshape(rows, view.numel() // max(rows, 1))


def _three(values: Iterable[float] | None) -> str:
    return "-" if values is None else " / ".join(f"{v:.4g}" for v in values)
