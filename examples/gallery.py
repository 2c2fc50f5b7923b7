"""Weight norm there and back on real architectures: one row for every net.

    python examples/gallery.py [--only PATTERN] [--onnx]

Tiny nets with random weights, nothing downloaded: families of the transformers library (left out where it is not
installed) and the nets weight norm is known from. Each one is planned, converted, trained for one step, saved, loaded
and folded, and every bit is counted. Leaves with 1 if a net breaks a promise.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import io
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import wnsurgery as wn

from gallery_classics import CLASSICS
from gallery_transformers import FAMILIES

Made = Callable[[], tuple[nn.Module, Mapping[str, Tensor]]]
NETS: dict[str, Made] = {**CLASSICS, **FAMILIES}
LEGEND = """\
convert, fold: elements of weights and outputs whose bits changed. moved: pairs whose g and v both moved in one
training step, of those whose plain weight has a gradient. loads: a saved state dict gives the same bits. removal: ulp
between our fold and torch's own removal (ours from the exact value, torch's from it), for nets that come under torch's
weight norm."""


@dataclass(frozen=True)
class Removal:
    """Our fold and torch's removal, in ulp: how far apart they are, and each from the exact value."""

    apart: float
    ours: float
    torchs: float

    @property
    def ok(self) -> bool:
        """Ours is accurate, and what lies between the two is torch's rounding."""
        return self.ours <= 1.5 and (self.apart <= 3 or self.torchs > 1.5)

    def __str__(self) -> str:
        return f"{self.apart:.1f} ({self.ours:.1f}, {self.torchs:.1f})"


@dataclass(frozen=True)
class Row:
    """What was measured on one net.

    Attributes:
        converted: tensors under weight norm, ties once.
        skipped: tensors of two or more dimensions left alone, by kind of reason.
        missed: tensors of two or more dimensions that the plan does not speak of.
        convert_bits, fold_bits: elements of weights and outputs that differ after converting, after folding.
        trained, still: pairs whose g and v moved in one step, and those that should have but did not.
        loads: whether the saved state dict, loaded into another net of the kind, gives the same bits.
        removal: for nets that come under torch's weight norm, our fold beside torch's own removal.
        onnx: what became of the ONNX file; empty where it was not asked for.
    """

    name: str
    converted: int
    skipped: Counter[str]
    missed: tuple[str, ...]
    convert_bits: int
    fold_bits: int
    trained: int
    still: tuple[str, ...]
    loads: bool
    removal: Removal | None
    onnx: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def ok(self) -> bool:
        bits = self.convert_bits == self.fold_bits == 0
        close = self.removal is None or self.removal.ok
        return bits and close and self.loads and not self.missed and not self.still and "differ" not in self.onnx


def make(name: str, seed: int = 0) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """A net in evaluation mode, and its inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's hooks are deprecated; some families still use them
        torch.manual_seed(seed)
        model, inputs = NETS[name]()
    return model.eval(), inputs


def flat(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors of an output."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from flat(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from flat(part)


def run(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(9)  # some nets draw noise
    given = tuple(inputs.values()) if isinstance(model, nn.Sequential) else ()
    return list(flat(model(*given) if given else model(**inputs)))


def weights(model: nn.Module, plan: wn.Plan) -> dict[str, Tensor]:
    """The weights that the forward uses, by owner: plain or normalized."""
    owners = [owner for site in plan.sites for owner in site.owners]
    return {owner.fqn: getattr(owner_of(model, owner.fqn), owner.parameter).detach().clone() for owner in owners}


def owner_of(model: nn.Module, fqn: str) -> nn.Module:
    return model.get_submodule(fqn.rpartition(".")[0])


def differing(before: list[Tensor], after: list[Tensor]) -> int:
    """Elements whose bits differ; every one where shapes do."""
    count = abs(len(before) - len(after))
    for a, b in zip(before, after, strict=False):
        if a.shape != b.shape:
            count += max(a.numel(), b.numel())
        else:
            kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
            count += int((a.detach().contiguous().view(kind) != b.detach().contiguous().view(kind)).sum())
    return count


def removal(model: nn.Module) -> Removal | None:
    """Fold the net's own weight norm and compare with torch's removal; None for a net without any."""
    if not wn.is_weight_normed(model):
        return None
    theirs, exact = {}, {}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for name, module in model.named_modules():
            for parameter, g, v, weight in removed(module):
                axes = tuple(d for d in range(v.ndim) if g.shape[d] == 1)
                key = f"{name}.{parameter}" if name else parameter
                theirs[key] = weight.double()
                exact[key] = g.double() * (v.double() / v.double().square().sum(axes, keepdim=True).sqrt())
    wn.fold_weight_norm(model)
    ours = {n: p.detach().double() for n, p in model.named_parameters(remove_duplicate=False) if n in theirs}
    return Removal(furthest(ours, theirs, exact), furthest(ours, exact, exact), furthest(theirs, exact, exact))


def fixed_magnitudes(model: nn.Module) -> list[str]:
    """The layers whose own weight norm does not train g."""
    return [name for name, module in model.named_modules() for _, g, *_ in removed(module) if not g.requires_grad]


def furthest(a: Mapping[str, Tensor], b: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """The largest distance of two sets of weights, in float32 units in the last place of the exact one."""
    largest = 0.0
    for name, w in exact.items():
        size = w.float().abs()
        unit = torch.nextafter(size, torch.full_like(size, torch.inf)).double() - size.double()
        largest = max(largest, float(((a[name] - b[name]).abs() / unit).max()))
    return largest


def removed(module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, g, v, what torch's removal would leave) of one module, which itself stays as it is."""
    for hook in module._forward_pre_hooks.values():
        if type(hook).__name__ == "WeightNorm":
            name: str = hook.name  # type: ignore[union-attr,assignment]
            weight = hook.compute_weight(module)  # type: ignore[union-attr,operator]
            yield name, module._parameters[f"{name}_g"], module._parameters[f"{name}_v"], weight  # type: ignore[misc]
    if torch.nn.utils.parametrize.is_parametrized(module):
        for name, entry in module.parametrizations.items():  # type: ignore[operator,union-attr]
            yield name, entry.original0, entry.original1, entry()


def left_alone(model: nn.Module, plan: wn.Plan) -> tuple[Counter[str], tuple[str, ...]]:
    """Kinds of reasons for tensors of two or more dimensions, and tensors that the plan has forgotten."""
    reasons: Counter[str] = Counter()
    kinds = {
        "a lookup table": "lookup table", "not in the layer table": "not a layer we know", "a buffer": "buffer",
        "a vector": "vector", "not a weight": "not a weight",
    }  # fmt: skip
    for skip in plan.skipped:
        if skip.shape is None or len(skip.shape) > 1:
            reasons[next((kind for sign, kind in kinds.items() if sign in skip.reason), skip.reason)] += 1
    planned = {n for site in plan.sites for owner in site.owners for n in owner.names} | {s.name for s in plan.skipped}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return reasons, tuple(name for name, t in tensors if t.ndim > 1 and name not in planned)


def gradients(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Gradients of a fixed random projection of all outputs; evaluation mode, so that dropout decides nothing."""
    model.zero_grad(set_to_none=True)
    outputs = [y for y in run(model, inputs) if y.requires_grad]
    draw = torch.Generator().manual_seed(8)
    sum((y * torch.randn(y.shape, generator=draw)).sum() for y in outputs).backward()  # type: ignore[union-attr]


def step(
    model: nn.Module, plain: nn.Module, plan: wn.Plan, inputs: Mapping[str, Tensor]
) -> tuple[int, tuple[str, ...]]:
    """One step of Adam: the pairs that moved, and those that did not though the plain weight has a gradient."""
    gradients(plain, inputs)
    gradients(model, inputs)
    wanted = {site.fqn: getattr(owner_of(plain, site.fqn), site.slot.parameter) for site in plan.sites}
    pairs: dict[str, Any] = {
        site.fqn: owner_of(model, site.fqn).parametrizations[site.slot.parameter]  # type: ignore[index]
        for site in plan.sites
    }
    before = {name: (p.original0.detach().clone(), p.original1.detach().clone()) for name, p in pairs.items()}
    torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-30).step()
    model.zero_grad(set_to_none=True)
    moved, still = 0, []
    for site in plan.sites:
        grad, pair, (g, v) = wanted[site.fqn].grad, pairs[site.fqn], before[site.fqn]
        if grad is None or not bool(grad.any()):
            continue
        turns = v.numel() > g.numel() and bool(g.any())  # one element has no direction; g = 0 stops v for one step
        grown = not torch.equal(pair.original0, g)
        if grown != pair.original0.requires_grad or (turns and torch.equal(pair.original1, v)):
            still.append(site.fqn)
        else:
            moved += 1
    return moved, tuple(still)


def loaded(name: str, trained: nn.Module, plan: wn.Plan) -> bool:
    """Whether a net of other random weights gives the trained one's bits once its state dict is loaded."""
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    other, inputs = make(name, seed=1)
    wn.apply_weight_norm(wn.fold_weight_norm(other))
    other.load_state_dict(torch.load(file, weights_only=True))
    same_weights = differing([*weights(other, plan).values()], [*weights(trained, plan).values()]) == 0
    with torch.no_grad():
        return same_weights and differing(run(other, inputs), run(trained, inputs)) == 0


def exported(plain: nn.Module, trained: nn.Module, inputs: Mapping[str, Tensor]) -> str:
    """Export the plain net; where that works, the trained one must work, too, with parity."""
    given: Any = tuple(inputs.values()) if isinstance(plain, nn.Sequential) else dict(inputs)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wn.export_onnx(plain, given, Path(folder) / "plain.onnx")
        except wn.WnsurgeryError:
            return "plain net does not export"
        try:
            report = wn.export_onnx(trained, given, Path(folder) / "folded.onnx")
        except wn.WnsurgeryError as error:
            return f"differs: {error.message}"
        return f"{max((c.max_abs for c in report.parity.outputs), default=0.0):.1e}" if report.parity else "unchecked"


def measure(name: str, onnx: bool = False) -> Row:
    """Take one net through everything."""
    started = time.perf_counter()
    model, inputs = make(name)
    frozen = fixed_magnitudes(model)
    ulp = removal(model)
    plain = copy.deepcopy(model)
    plan = wn.plan_weight_norm(model)
    reasons, missed = left_alone(model, plan)
    with torch.no_grad():
        before, outputs = weights(model, plan), run(model, inputs)
        wn.apply_weight_norm(model)
        convert = differing([*before.values()], [*weights(model, plan).values()])
        convert += differing(outputs, run(model, inputs))
        if frozen:
            wn.freeze_magnitude(model, include=frozen)
        restored = wn.fold_weight_norm(copy.deepcopy(model))
        fold = differing([*before.values()], [*weights(restored, plan).values()])
    moved, still = step(model, plain, plan, inputs)
    loads = loaded(name, model, plan)
    with torch.no_grad():
        outputs, before = run(model, inputs), weights(model, plan)
        folded = wn.fold_weight_norm(copy.deepcopy(model))
        fold += differing([*before.values()], [*weights(folded, plan).values()])
        fold += differing(outputs, run(folded, inputs))
    fate = exported(plain, model, inputs) if onnx else ""
    seconds = time.perf_counter() - started
    return Row(name, len(plan.sites), reasons, missed, convert, fold, moved, still, loads, ulp, fate, seconds)


def table(rows: list[Row], onnx: bool) -> Table:
    out = Table(title=f"weight norm, there and back: {len(rows)} nets", show_lines=False)
    right = {"converted", "convert", "fold", "moved", "removal", "seconds"}
    heads = [
        "net",
        "converted",
        "left alone",
        "convert",
        "fold",
        "moved",
        "loads",
        "removal",
        *["ONNX"] * onnx,
        "seconds",
    ]
    for head in heads:
        wraps = head in ("left alone", "ONNX")
        out.add_column(head, justify="right" if head in right else "left", overflow="fold", no_wrap=not wraps)
    for row in rows:
        alone = ", ".join(f"{n} {reason}" for reason, n in row.skipped.most_common())
        moved = f"{row.trained}" + (f" ({len(row.still)} still)" if row.still else "")
        cells = [row.name, str(row.converted), alone, str(row.convert_bits), str(row.fold_bits), moved]
        cells += ["yes" if row.loads else "NO", str(row.removal or ""), *[row.onnx] * onnx, f"{row.seconds:.1f}"]
        out.add_row(*cells, style=None if row.ok else "red")
    alone = sum((row.skipped for row in rows), Counter[str]())
    sums = [
        sum(values)
        for values in zip(*((r.converted, r.convert_bits, r.fold_bits, r.trained) for r in rows), strict=True)
    ]
    ends = ["yes" if all(row.loads for row in rows) else "NO", "", *[""] * onnx, f"{sum(r.seconds for r in rows):.0f}"]
    out.add_section()
    out.add_row("all", str(sums[0]), f"{alone.total()}", *map(str, sums[1:]), *ends)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", metavar="PATTERN", help="nets whose name fits, such as 'gpt*'")
    parser.add_argument("--onnx", action="store_true", help="export every net, too (a few seconds each)")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # the nets are tiny
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 132)  # a table in a pipe need not fit anything
    names = [name for name in NETS if fnmatchcase(name, asked.only)]
    if importlib.util.find_spec("transformers") is None:
        console.print("transformers is not installed: its families are left out")
        names = [name for name in names if name in CLASSICS]
    if not names:
        console.print(f"no net is called {asked.only}; there are: {', '.join(NETS)}")
        return 2
    rows = []
    with console.status("") as status:
        for name in names:
            status.update(name)
            rows.append(measure(name, asked.onnx))
    console.print(table(rows, asked.onnx))
    console.print(LEGEND, highlight=False)
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
