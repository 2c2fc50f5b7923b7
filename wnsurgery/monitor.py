"""What weight norm does during training: g, ||v||, effective step and angle turned, every few steps.

After each observed step a weight costs two norms over v, a subtraction and a copy; everything else is per row.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wnsurgery.after_step import StepHandle
from wnsurgery.csv_text import csv_text
from wnsurgery.dtensors import gathered
from wnsurgery.errors import MissingPackageError, OutputError, OutputExistsError, SelectionError, printable
from wnsurgery.following import Optimizers, as_optimizers, warn_if_left_behind
from wnsurgery.norms import norm
from wnsurgery.pairs import Pair, pairs
from wnsurgery.plan import Pattern
from wnsurgery.spread import Spread

__all__ = ["Observed", "WeightNormMonitor"]

_SPREADS = ("magnitude", "norm", "effective", "angle")


@dataclass(frozen=True)
class Observed:
    """One weight after one step; the spreads are (min, median, max) over its rows.

    Attributes:
        step: optimizer steps since the monitor was built.
        name: of the weight, the first of its names.
        lr: the learning rate v has now, 0 where it is in none of the optimizers.
        magnitude, norm: of |g| and of ||v||.
        effective: of lr |g| / ||v||^2, the effective step of the direction; rows of zeros left out.
        angle: by which the direction turned since the observation before, in degrees; None at the first one.
    """

    step: int
    name: str
    lr: float
    magnitude: Spread | None
    norm: Spread | None
    effective: Spread | None
    angle: Spread | None


class WeightNormMonitor:
    """Watches the weights of a model in training: now, and after every few steps of the optimizer, until removed.

    It changes nothing: training takes the same course to the last bit. Both modes, ours, torch's and torch's legacy
    weight norm, logarithmic magnitudes and ties (once, under the first name) are served.

    >>> model = wn.apply_weight_norm(nn.Linear(3, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with wn.WeightNormMonitor(model, optimizer, every=1) as monitor:
    ...     model(torch.ones(1, 3)).sum().backward()
    ...     optimizer.step()
    >>> [(one.step, one.name, one.angle is None) for one in monitor.records]
    [(0, 'weight', True), (1, 'weight', False)]

    Args:
        model: a module tree under weight norm, converted and on its device before this call.
        optimizer: one or several; with several, a step is counted after the last one's.
        every: steps between observations.
        csv: a new file that gets a line per weight and observation, at once.
        tensorboard: a directory to log medians to, or a `SummaryWriter` that stays yours.
        keep: observations of single weights held in `records`, the latest ones, None for all; the file has all.
        force: replace an existing `csv`, once the first observation is made.
        include, exclude: patterns as in `plan_weight_norm`.

    Attributes:
        records: a deque of observations, one for each weight and moment.
        steps: optimizer steps seen.

    One copy of every v is held, for the angles. Raises SelectionError (nothing selected, no optimizer, `every` below
    1, `keep` below 0), OutputExistsError, OutputError (in a step, too, when the file cannot be written any more) and
    MissingPackageError without TensorBoard. Remove the monitor before folding.

    Source of the effective step: Salimans & Kingma 2016, section 2.1, equation 3.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizers,
        *,
        every: int = 10,
        csv: str | os.PathLike[str] | None = None,
        tensorboard: Any = None,
        keep: int | None = 100_000,
        force: bool = False,
        include: Pattern | None = None,
        exclude: Pattern | None = None,
    ) -> None:
        optimizers = as_optimizers(optimizer, flat=True)
        if not optimizers:
            raise SelectionError("the monitor needs an optimizer to follow")
        between: Any = every
        if not isinstance(between, Integral) or every < 1:
            raise SelectionError(f"every must be a whole number, 1 or more, not {every!r}")
        held: Any = keep
        if held is not None and (not isinstance(held, Integral) or held < 0):
            raise SelectionError(f"keep must be a whole number, 0 or more, or None to hold all, not {keep!r}")
        self._pairs = [p for p in pairs(model, include, exclude) if not p.is_meta]
        warn_if_left_behind(model, optimizers, (half for pair in self._pairs for half in (pair.v, pair.g)))
        self._optimizers, self.every, self.steps = optimizers, every, 0
        self.records: deque[Observed] = deque(maxlen=None if keep is None else int(keep))
        self._before: dict[int, tuple[Tensor, Any]] = {}
        self._file: Any = None
        self._writer, self._own = None, False
        if csv is not None and not force and os.path.lexists(csv):
            raise _exists(csv)
        self._handle = StepHandle([optimizers[-1]], self._stepped)
        try:  # the file comes last: what it replaces is gone
            self._writer, self._own = _writer(tensorboard)
            found = self.observe()
            self._file = None if csv is None else _opened(csv, force=force)
            titles: list[object] = ["step", "name", "lr", *(f"{s}_{part}" for s in _SPREADS for part in Spread._fields)]
            self._write_rows([titles, *_rows(found)])
        except BaseException:
            with suppress(OSError):  # of a full disk closing tells once more
                self.remove()
            raise

    def remove(self) -> None:
        """Stop watching and close the file; `records` stay. Calling it again does nothing."""
        self._handle.remove()
        self._before.clear()
        if self._writer is not None and self._own:
            self._writer.close()
        self._writer = None
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def __enter__(self) -> WeightNormMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def observe(self) -> tuple[Observed, ...]:
        """Look now, whatever the step; returns what was seen."""
        with torch.inference_mode(False), torch.no_grad():
            found = tuple(self._observed())
        self.records.extend(found)
        self._write_rows(_rows(found))
        if self._writer is not None:
            for one in found:
                for s in _SPREADS:
                    if (seen := getattr(one, s)) is not None:
                        self._writer.add_scalar(f"weight_norm/{s}/{printable(one.name)}", seen.median, one.step)
        return found

    def _write_rows(self, rows: list[list[object]]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(csv_text(rows))
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self._file.name}: {printable(error.strerror or error)}") from error

    def _stepped(self) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            self.observe()

    def _observed(self) -> Iterator[Observed]:
        rates = {id(p): float(g["lr"]) for o in self._optimizers for g in o.param_groups for p in g["params"]}
        measured = [part for pair in self._pairs for part in self._measured(pair)]
        sizes = [part.numel() for part in measured]
        flat = torch.cat([part.flatten().cpu() for part in measured]) if measured else torch.empty(0)
        split = np.split(flat.double().numpy(), np.cumsum(sizes)[:-1]) if measured else []
        for i, pair in enumerate(self._pairs):
            g, norms, moved = split[3 * i : 3 * i + 3]
            before = self._before.get(id(pair))
            lr = rates.get(id(pair.v), 0.0)
            angle = None if before is None or before[1] is None or not moved.size else _angle(before[1], norms, moved)
            there = norms != 0
            with np.errstate(all="ignore"):
                step = g[there] / norms[there] / norms[there] * lr
            if before is not None:
                self._before[id(pair)] = before[0], norms
            yield Observed(self.steps, pair.fqn, lr, _three(g), _three(norms), _three(step), _maybe(angle))

    def _measured(self, pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
        """|g|, ||v|| and ||v - v before|| per row; v is v before from now on."""
        v = pair.v.detach()
        wide = torch.float32 if v.dtype in (torch.float16, torch.bfloat16) else v.dtype
        held = self._before.get(id(pair))
        memory = None if held is None else held[0]
        if memory is None or memory.device != v.device or memory.dtype != wide or memory.shape != v.shape:
            self._before[id(pair)] = v.to(wide, copy=True), None
            moved = torch.empty(0)
        else:
            memory.sub_(v)
            moved = gathered(norm(pair.axes.grouped(memory), pair.axes.reduced(v.ndim), blocked=True))
            memory.copy_(v)
        return pair.size(), pair.norms(), moved


def _rows(found: Sequence[Observed]) -> list[list[object]]:
    """A line of the file for each observation."""
    numbers = [[x for s in _SPREADS for x in getattr(one, s) or ("", "", "")] for one in found]
    return [[one.step, printable(one.name), one.lr, *row] for one, row in zip(found, numbers, strict=True)]


def _angle(a: Any, b: Any, c: Any) -> Any:
    """The angle in degrees between two sides of triangles, of lengths a and b, with the third side c opposite: Kahan's
    formula, accurate for needles; rows with a side of no length left out."""
    there = (a != 0) & (b != 0)
    long, short, c = np.maximum(a, b)[there], np.minimum(a, b)[there], c[there]
    with np.errstate(all="ignore"):
        short, c = short / long, c / long
        rest = np.where(short >= c, c - (1 - short), short - (1 - c)).clip(0)
        top, bottom = ((1 - short) + c) * rest, (1 + (short + c)) * ((1 - c) + short)
        return np.degrees(2 * np.arctan2(np.sqrt(top), np.sqrt(bottom.clip(0))))


def _three(values: Any) -> Spread | None:
    """As `spread`, of a numpy array: the lower of two middles, NaN where one is."""
    if not values.size:
        return None
    low, high = float(values.min()), float(values.max())
    middle = (values.size - 1) // 2
    return Spread(low, low if low != low else float(np.partition(values, middle)[middle]), high)  # noqa: PLR0124


def _maybe(values: Any) -> Spread | None:
    return None if values is None else _three(values)


def _opened(path: str | os.PathLike[str], *, force: bool) -> Any:
    from pathlib import Path

    try:
        return Path(path).open("w" if force else "x", encoding="utf-8", newline="")
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise OutputError(f"{path}: {printable(error.strerror or error)}") from error


def _exists(path: str | os.PathLike[str]) -> OutputExistsError:
    return OutputExistsError(f"{os.fspath(path)}: already exists", hint="force=True replaces it")


def _writer(wanted: Any) -> tuple[Any, bool]:
    """Something with `add_scalar`, and whether it is ours to close."""
    if wanted is None or hasattr(wanted, "add_scalar"):
        return wanted, False
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingPackageError("tensorboard is not installed", hint="install it, or give csv=") from error
    return SummaryWriter(os.fspath(wanted)), True
