"""What weight norm there is in a module, a checkpoint or an ONNX file, with the numbers of every g and ||v||."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wnsurgery.contents import Contents, Normed, Plain, opened, refuse_unknown
from wnsurgery.csv_text import csv_text
from wnsurgery.dtensors import gathered
from wnsurgery.errors import InputError, SelectionError, printable
from wnsurgery.plan import Skipped
from wnsurgery.reparam import Magnitude
from wnsurgery.spread import Spread, effective_step, log_bins, ratio, row_norms, spread
from wnsurgery.text import by, columns

__all__ = ["Inspection", "Totals", "WeightFacts", "inspect"]

Progress = Callable[[int, int], None]

Bins = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class WeightFacts:
    """One weight-normalized weight.

    `form` says how it is stored: "ours", "torch" or "legacy" in a module, "parametrized" or "legacy" in a file, "graph"
    in an ONNX file, where `also` names the direction's initializer. The four spreads are (min, median, max) over the
    rows, None where there are no values.

    Attributes:
        magnitude, norm: of g and of ||v||.
        zero_rows: rows with v = 0, which have no direction.
        also: its other names (ties).
        step: of lr |g| / ||v||^2, the effective step of the direction.
        growth, gain: of ||v|| and |g| against the reference's, where there is one.
        dead_rows: rows whose weight is zero (g = 0 or v = 0).
    """

    name: str
    form: str
    shape: tuple[int, ...]
    kept: tuple[int, ...]
    groups: int
    dtype: str
    magnitude: Spread | None
    norm: Spread | None
    zero_rows: int
    also: tuple[str, ...] = ()
    step: Spread | None = None
    growth: Spread | None = None
    gain: Spread | None = None
    dead_rows: int = 0
    bins: tuple[Bins, Bins] = field(default=((), ()), repr=False)


@dataclass(frozen=True)
class Totals:
    """Sums over an artefact: memory shared counts once; `saved` is what folding takes away."""

    parameters: int
    bytes: int
    saved_parameters: int
    saved_bytes: int


@dataclass(frozen=True)
class Inspection:
    """Weight-normalized weights, and each other tensor of 2 or more dimensions with the reason; prints as a table."""

    weights: tuple[WeightFacts, ...]
    others: tuple[Skipped, ...]
    totals: Totals = Totals(0, 0, 0, 0)
    lr: float = 1.0

    def __str__(self) -> str:
        lines = [self.head(), *(columns(self.rows()) if self.weights else [])]
        if self.others:
            lines += ["", f"{len(self.others)} other tensors of 2 or more dimensions"]
            table = [(printable(s.name), by(s.shape), printable(s.reason)) for s in self.others]
            lines += columns([("tensor", "shape", "why"), *table])
        return "\n".join(lines)

    def head(self) -> str:
        """The totals in one line."""
        t = self.totals
        saved = f"; folding saves {t.saved_parameters:,} ({t.saved_bytes:,} bytes)" if self.weights else ""
        sizes = f"; {t.parameters:,} numbers ({t.bytes:,} bytes)"
        return f"{len(self.weights)} weights under weight norm{sizes}{saved}"

    def rows(self) -> list[tuple[str, ...]]:
        """The table of weights as text, its titles first."""
        compared = any(w.growth for w in self.weights)
        titles = ("weight", "form", "type", "shape", "kept", "g min/median/max", "||v|| min/median/max")
        more = ("||v|| / before", "|g| / before") if compared else ()
        rows: list[tuple[str, ...]] = [(*titles, f"step at lr {self.lr:g}", *more, "note")]
        return rows + [_row(w, compared) for w in self.weights]

    def to_csv(self) -> str:
        """One line per weight and per other tensor; text that a spreadsheet would take for a formula is defused."""
        spreads = ("magnitude", "norm", "step", "growth", "gain")
        titles = [f"{s}_{part}" for s in spreads for part in Spread._fields]
        rows: list[list[object]] = [
            ["name", "form", "dtype", "shape", "kept", "groups", *titles, "zero_rows", "dead_rows", "also", "reason"]
        ]
        for w in self.weights:
            numbers = [x for s in spreads for x in getattr(w, s) or ("", "", "")]
            kept = " ".join(map(str, w.kept))
            ties = "; ".join(printable(n) for n in w.also)
            start = [printable(w.name), w.form, w.dtype, by(w.shape), kept, w.groups]
            rows.append([*start, *numbers, w.zero_rows, w.dead_rows, ties, ""])
        blank = [""] * (len(titles) + 5)
        rows += [[printable(s.name), "", "", by(s.shape), *blank, printable(s.reason)] for s in self.others]
        return csv_text(rows)


def inspect(
    target: nn.Module | str | os.PathLike[str],
    *,
    arch: str | None = None,
    trust_pickle: bool = False,
    magnitude: Magnitude = "linear",
    lr: float = 1.0,
    reference: nn.Module | str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    entry: str | None = None,
) -> Inspection:
    """List the weight norm in a live module, a checkpoint, a whole-module file or an ONNX file.

    >>> model = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 2)))
    >>> [(w.name, w.form, w.kept) for w in wn.inspect(model).weights]
    [('0.weight', 'ours', (0,))]

    Args:
        target: the module, or a path; state dicts need no model code.
        arch: "package.module:factory" to build the model a state dict belongs to, for layer types and reasons.
        trust_pickle: let code in the file run while it is loaded.
        magnitude: "log" when pairs store the logarithm of g without saying so, as our own do.
        lr: the learning rate that the effective steps lr |g| / ||v||^2 are given for.
        reference: the same net at an earlier time, converted or plain, to compare ||v|| and |g| with.
        progress: told (bytes of directions looked at, bytes in all).
        entry: dotted path of the state dict or module to look at alone, where a side holds several ("ema").

    Raises InputError, UnsafeFileError as the readers do; InputError when the reference has none of the weights,
    SelectionError for a learning rate that is no positive number, a magnitude that is none, or an entry that no side
    has.
    """
    if not 0 < lr < float("inf"):
        raise SelectionError(f"lr must be a positive number, not {lr!r}")
    options = {"arch": arch, "trust_pickle": trust_pickle, "entry": entry}
    with opened(target, magnitude=magnitude, **options) as contents:  # type: ignore[arg-type]
        if reference is None:
            refuse_unknown(entry, contents)
            return _inspected(contents, {}, lr, progress)
        with opened(reference, magnitude=magnitude, **options) as before:  # type: ignore[arg-type]
            refuse_unknown(entry, contents, before)
            known: dict[str, Normed | Plain] = {p.name: p for p in before.others}
            known |= {name: w for w in before.weights for name in (w.name, *w.also)}
            if not any(w.name in known for w in contents.weights):
                raise InputError("the reference has none of the weights that are under weight norm here")
            others = [(w, known[w.name].shape) for w in contents.weights if w.name in known]
            if all(shape != w.shape for w, shape in others) and others:
                w, shape = others[0]
                raise InputError(
                    f"the reference is another net: {printable(w.name)} is {by(w.shape)} here, {by(shape)} there"
                )
            return _inspected(contents, known, lr, progress)


def _inspected(
    contents: Contents, before: dict[str, Normed | Plain], lr: float, progress: Progress | None
) -> Inspection:
    sizes = [math.prod(w.shape) * getattr(getattr(torch, w.dtype, None), "itemsize", 4) for w in contents.weights]
    facts, done, whole = [], 0, sum(sizes)
    for w, size in zip(contents.weights, sizes, strict=True):
        facts.append(_facts(w, before.get(w.name), lr))
        done += size
        if progress is not None:
            progress(done, whole)
    others = tuple(Skipped(p.name, p.shape, p.reason) for p in contents.others)
    saved = [w.extra for w in contents.weights]
    totals = Totals(contents.parameters, contents.bytes, sum(n for n, _ in saved), sum(b for _, b in saved))
    return Inspection(tuple(facts), others, totals, lr)


def _facts(w: Normed, before: Normed | Plain | None, lr: float) -> WeightFacts:
    axes = w.axes
    kept, groups = (axes.kept, axes.groups) if axes else ((), 1)
    bare = WeightFacts(w.name, w.form, w.shape, kept, groups, w.dtype, None, None, 0, w.also)
    if w.values is None or axes is None:
        return bare
    with torch.no_grad():
        g, v = w.values()
        if v.is_meta or g.is_meta:
            return bare
        norms, g = row_norms(v, axes), gathered(g).double().flatten()
        zero, dead = int((norms == 0).sum()), int(((norms == 0) | (g == 0)).sum())
        step = spread(effective_step(g, norms, lr)[norms != 0])
        del v
        growth, gain = _since(w, before, g, norms)
        bins = log_bins(g), log_bins(norms)
    return WeightFacts(
        w.name, w.form, w.shape, kept, groups, w.dtype, spread(g), spread(norms), zero, w.also, step, growth, gain,
        dead, bins,
    )  # fmt: skip


def _since(w: Normed, before: Normed | Plain | None, g: Tensor, norms: Tensor) -> tuple[Spread | None, Spread | None]:
    """||v|| and |g| against what they were; None where the reference cannot tell."""
    if before is None or before.shape != w.shape or w.axes is None:
        return None, None
    if isinstance(before, Plain):
        if before.value is None:
            return None, None
        plain = before.value()
        if plain.is_meta or not plain.is_floating_point():
            return None, None
        start = first = row_norms(plain, w.axes)
    else:
        if before.values is None or before.axes != w.axes:
            return None, None
        start, direction = before.values()
        if direction.is_meta:
            return None, None
        first = row_norms(direction, w.axes)
    return spread(ratio(norms, first)), spread(ratio(g.abs(), start.abs()))


def _row(w: WeightFacts, compared: bool) -> tuple[str, ...]:
    kept = ",".join(map(str, w.kept)) or "none"
    kept += f" in {w.groups} groups" if w.groups > 1 else ""
    notes = [f"{'v is' if w.form == 'graph' else '='} {printable(n)}" for n in w.also]
    notes += [f"{w.zero_rows} rows with v = 0"] if w.zero_rows else []
    notes += [f"{w.dead_rows - w.zero_rows} rows with g = 0"] if w.dead_rows > w.zero_rows else []
    more = (_three(w.growth), _three(w.gain)) if compared else ()
    start = (printable(w.name), w.form, w.dtype, by(w.shape), kept, _three(w.magnitude), _three(w.norm))
    return (*start, _three(w.step), *more, "; ".join(notes))


def _three(values: Iterable[float] | None) -> str:
    return "-" if values is None else " / ".join(f"{v:.4g}" for v in values)
