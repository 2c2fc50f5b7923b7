"""Compare any two of: a live module, a whole-module file, a checkpoint, an ONNX file. Verification can fail.

    verify(model, "model.onnx").raise_for_status()
    print(verify("generator.pth", "generator.plain.pth"))

Weights are compared bit for bit, those of a converted side as the plain weights they stand for. Outputs are compared
within tolerance wherever both sides can run. Two sides that have nothing in common to compare fail.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from wnsurgery.bisection import Parting, first_difference
from wnsurgery.differences import (
    OutputsReport,
    TensorsReport,
    as_array,
    check_tolerances,
    compare_outputs,
    compare_tensors,
    is_float,
    tolerance,
)
from wnsurgery.errors import (
    ExportError,
    InputError,
    InputMissingError,
    SelectionError,
    VerificationError,
    WnsurgeryError,
    printable,
)
from wnsurgery.graph_inputs import made_up_inputs, rows_indexed
from wnsurgery.onnx_weights import constants_of, contradictions, fingerprint, found_in, is_weight
from wnsurgery.parity import cast_to_declared, declared_inputs, open_session, refuse_other_outputs, run_session
from wnsurgery.parts import plain_parts
from wnsurgery.reparam import Magnitude
from wnsurgery.runs import Case, Inputs, copy_of, for_graph, rng_kept, with_eps_of_graphs
from wnsurgery.surgery import fold_weight_norm

__all__ = ["VerifyReport", "verify"]

Path_ = str | os.PathLike[str]
Array = np.ndarray[Any, Any]
Artefact = nn.Module | Path_
Arch = str | Callable[[], nn.Module]


@dataclass(frozen=True)
class VerifyReport:
    """How two artefacts differ; prints as tables.

    Attributes:
        a, b: what was compared.
        weights: the comparison of the plain weights; None where a side has none to compare.
        outputs: one comparison for each set of inputs; empty where a side cannot run.
        notes: what was not compared, and why.
        failures: what is wrong beyond single weights and outputs.
        parting: where the two part; None unless asked for.
    """

    a: str
    b: str
    weights: TensorsReport | None
    outputs: tuple[OutputsReport, ...]
    notes: tuple[str, ...]
    failures: tuple[str, ...]
    parting: Parting | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """A sentence for each thing that is wrong."""
        parts = [self.weights, *self.outputs]
        return (*self._own_problems, *(line for part in parts if part is not None for line in part.problems))

    @property
    def _own_problems(self) -> tuple[str, ...]:
        compared = self.weights is not None or self.outputs or self.failures
        return self.failures if compared else (f"nothing to compare: {'; '.join(self.notes)}",)

    @property
    def ok(self) -> bool:
        """Something was compared, and all of it agrees."""
        return not self.problems

    def raise_for_status(self) -> None:
        """Raise VerificationError unless `ok`."""
        problems = self.problems
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise VerificationError(f"{self.a} and {self.b} differ: {problems[0]}{more}")

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {"ok": self.ok, **{k: getattr(self, k) for k in self.__dataclass_fields__}, "problems": self.problems}

    def __str__(self) -> str:
        lines = [f"{self.a} and {self.b}: {'equal' if self.ok else 'DIFFERENT'}"]
        if self.weights is not None:
            lines.append(str(self.weights))
        if self.outputs:
            worst = max(self.outputs, key=lambda r: (not r.ok, max((o.max_rel for o in r.outputs), default=0.0)))
            lines.append(f"{len(self.outputs)} sets of inputs, the worst:" if len(self.outputs) > 1 else "")
            lines.append(str(worst))
        lines += [] if self.parting is None else [str(self.parting)]
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  failed: {problem}" for problem in self._own_problems]
        return "\n".join(line for line in lines if line)


def verify(  # noqa: PLR0913 - what is compared, how, and how it is loaded; all but three have defaults that fit
    a: Artefact,
    b: Artefact,
    inputs: Inputs | None = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    n_inputs: int = 3,
    more: Sequence[Inputs] = (),
    bisect: bool = False,
    any_dtype: bool = False,
    arch: Arch | None = None,
    trust_pickle: bool = False,
    entry: str | None = None,
    magnitude: Magnitude = "linear",
) -> VerifyReport:
    """Compare two artefacts: plain weights bit for bit, outputs within tolerance.

    Weights: names, shapes, types and every bit. An ONNX graph's are all its constants, in subgraphs and functions, too.
    Exporters rename, transpose and merge weights; so beside a graph that names them differently a weight fails where
    one of the same name, shape and type has other bits (unless a batch norm of its size was merged: it is noted then),
    and the outputs decide about the others. Where outputs cannot be compared, each tensor of a checkpoint must be found
    in the graph, by name or by content. Outputs: `|a - b| <= atol + rtol * max|b|`; NaN fails even where
    both sides hold it; infinities pass where both sides hold the same. Two modules may return any structure, the same
    on both sides, that tensors are found in (containers, dataclasses, caches); beside an ONNX graph, a module must
    return tensors alone, and in float64 its norms may have their eps in float32, as graphs hold it. Both run in eval
    mode, on copies.

    >>> wn.verify(nn.Linear(2, 2), nn.Linear(2, 2)).ok
    False

    Args:
        a, b: a module, or the path of a whole-module file, a checkpoint, a directory of one, or an ONNX file.
        inputs: a tensor, a sequence, or a mapping by name; None makes `n_inputs` random sets from what an ONNX
            graph declares.
        rtol, atol: tolerance on outputs; None goes by type. rtol: 256 eps of float32 and float64 (3.1e-5, 5.7e-14), 8
            eps of 16-bit types; atol: one eps, at most half of an output's largest element. Integers must be equal.
        n_inputs: how many random sets are made. Integers that index a table of the graph go through its rows, from set
            to set, as far as there is room; others are 0 or 1.
        more: further sets of inputs.
        bisect: if the outputs differ, find the layer where the two part, see `first_difference`.
        any_dtype: let the two sides be of different types, say a net in float16 and its float32 original: outputs are
            judged by the coarser type, and weights are not compared bit for bit.
        arch: what builds the model for a checkpoint, see `load_model`.
        trust_pickle: let a file's pickle run code.
        entry: dotted path of the state dict or module to take, where a side holds several ("ema").
        magnitude: "log" when pairs store the logarithm of g without saying so, as our own do.

    Returns a report; it does not raise where they differ, `raise_for_status()` does.

    Raises:
        InputMissingError, InputError, UnsafeFileError: about the files, or inputs on which neither side runs.
        SelectionError: `arch` or `entry` is given but fits neither side, or a tolerance is none.
    """
    check_tolerances(rtol, atol)
    first, second = (_side(x, arch, trust_pickle, magnitude, entry) for x in (a, b))
    if entry is not None and not (first.entered or second.entered):
        raise SelectionError(f"entry={entry!r}: no state dict or module of this name on either side")
    if arch is not None and not (first.built or second.built):
        raise SelectionError("arch is given, but neither side is a checkpoint that it could build a model for")
    notes: list[str] = []
    failures: list[str] = []
    cases = _cases(first, second, inputs, n_inputs, more, notes)
    outputs = _outputs(first, second, cases, inputs is not None, (rtol, atol), any_dtype, notes, failures)
    if first.is_graph != second.is_graph and not (failures or all(report.ok for report in outputs)):
        for module in (side.module for side in (first, second) if side.module is not None):
            with_eps_of_graphs(module)
        again = _outputs(first, second, cases, inputs is not None, (rtol, atol), any_dtype, [], failures)
        outputs = again if all(report.ok for report in again) else outputs
    weights = _weights(first, second, bool(outputs), notes, failures, any_dtype)
    failures += [f"{name}: holds NaN on both sides, which proves nothing" for name in _both_nan(first, second)]
    parting = _parting(first, second, cases, outputs, (rtol, atol), notes) if bisect else None
    return VerifyReport(first.name, second.name, weights, outputs, tuple(notes), tuple(failures), parting)


# The two sides -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """One artefact: its plain weights, and itself as something that runs, where it does."""

    name: str
    tensors: Mapping[str, Any]
    module: nn.Module | None = None
    session: Any = None
    graph: Any = None
    built: bool = field(default=False)
    entered: bool = field(default=False)

    @property
    def is_graph(self) -> bool:
        return self.session is not None

    @property
    def runs(self) -> bool:
        return self.module is not None or self.session is not None

    def takes(self, inputs: Any) -> bool:
        """Whether a graph runs on these inputs."""
        try:
            self.run(inputs)
        except InputError:
            return False
        return True

    def taking(self, inputs: Any, other: _Side) -> Any:
        """Inputs as this side takes them: a graph beside a module those that it declares."""
        if self.session is None or other.module is None:
            return inputs
        return for_graph(inputs, declared_inputs(self.session), other.module)

    def run(self, inputs: Any, *, any_dtype: bool = False, beside_graph: bool = True) -> tuple[list[str], list[Any]]:
        """Names ("" where there are none) and values of the outputs; `any_dtype` casts floats to what it takes.
        Beside a graph a module must return what a graph can, else any nest that holds tensors."""
        if self.session is not None:
            given = [inputs] if isinstance(inputs, Tensor | np.ndarray) else inputs
            given = cast_to_declared(self.session, given) if any_dtype else given
            found = run_session(self.session, given, self.name)
            return list(found), list(found.values())
        assert self.module is not None
        case = Case.fitting(inputs, self.module)
        case = case.cast_for(self.module) if any_dtype else case
        with torch.no_grad(), rng_kept(self.module):
            if not beside_graph:
                found = _comparable(case.run_by_name(self.module))
                return list(found), list(found.values())
            values = case.run(self.module)
        return [""] * len(values), list(values)


def _side(artefact: Artefact, arch: Arch | None, trust_pickle: bool, magnitude: Magnitude, entry: str | None) -> _Side:
    if isinstance(artefact, nn.Module):
        return _of_module(artefact, type(artefact).__name__)
    path = Path(artefact)
    if not path.exists():
        raise InputMissingError.at(path)
    if path.suffix.lower() == ".onnx":
        return _of_graph(path)
    return _of_checkpoint(path, arch, trust_pickle, magnitude, entry)


def _of_module(model: nn.Module, name: str, *, built: bool = False) -> _Side:
    with torch.no_grad():
        running, plain = copy_of(model), copy_of(model)
        running.eval()
        fold_weight_norm(plain)
    tensors = {k: v for k, v in _comparable(plain.state_dict()).items() if isinstance(v, Tensor)}
    return _Side(name, tensors, module=running, built=built)


def _of_graph(path: Path) -> _Side:
    from wnsurgery.graph import fold_model
    from wnsurgery.onnx_checks import blamed_on
    from wnsurgery.onnx_file import read_onnx

    with blamed_on(path):
        model = read_onnx(path)
        fold_model(model)
        tensors = constants_of(model)
    session = open_session(path)
    refuse_other_outputs(session, path)
    return _Side(str(path), tensors, session=session, graph=model)


def _of_checkpoint(path: Path, arch: Arch | None, trust_pickle: bool, magnitude: Magnitude, entry: str | None) -> _Side:
    from wnsurgery.checkpoint import flat_tensors, fold_state, state_dicts
    from wnsurgery.files import load_model, load_object
    from wnsurgery.loading import named
    from wnsurgery.stores.modules import modules_in

    content = load_object(path, trust_pickle=trust_pickle)
    modules = modules_in(content)
    names = [where for where, _ in modules] or [state.path for state in state_dicts(content)]
    entry = entry if entry in names else None  # the other side may hold nothing but what is meant
    if modules:
        side = _of_module(load_model(path, trust_pickle=trust_pickle, entry=entry), str(path))
        return replace(side, entered=entry is not None)
    if arch is not None:
        model = load_model(path, arch=arch, trust_pickle=trust_pickle, magnitude=magnitude, entry=entry)
        return replace(_of_module(model, str(path), built=True), entered=entry is not None)
    fold_state(content, magnitude=magnitude)
    states = [state for state in state_dicts(content) if entry in (None, state.path)]
    # a wrapper around the only state dict ({"model": ...}) is no part of the names
    tensors = states[0].tensors if len(states) == 1 else flat_tensors(content)
    with named(path):
        return _Side(str(path), _comparable(tensors), entered=entry is not None)


def _comparable(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as numbers to compare: what is sparse, quantized or nested as its parts."""
    parts = (plain_parts(k, v) if isinstance(v, Tensor) else {k: v} for k, v in tensors.items())
    return {name: part for entry in parts for name, part in entry.items()}


# Weights -------------------------------------------------------------------------------------------------


def _weights(
    a: _Side, b: _Side, ran: bool, notes: list[str], failures: list[str], any_dtype: bool
) -> TensorsReport | None:
    if any_dtype and ran:
        notes.append("weights not compared: the sides may be of different types, so the outputs decide")
        return None
    if not a.tensors or not b.tensors:
        notes.append(f"weights not compared: {a.name if not a.tensors else b.name} holds none")
        return None
    if a.is_graph == b.is_graph and (not a.is_graph or set(a.tensors) == set(b.tensors)):
        return compare_tensors(a.tensors, b.tensors)
    state, graph = (b, a) if a.is_graph and not b.is_graph else (a, b)
    arrays = {name: as_array(value) for name, value in state.tensors.items()}
    known = {name: array for name, array in arrays.items() if is_weight(array)}
    if ran or state.is_graph:
        wrong, merged = contradictions(known if state.is_graph else arrays, graph.tensors, renamed=state.is_graph)
        failures += wrong
        notes.append(_standing(known, graph.tensors))
        if merged:
            which = f"{', '.join(merged[:3])}{f' and {len(merged) - 3} more' if len(merged) > 3 else ''}"
            notes.append(f"{which}: other bits under the same name; a batch norm was merged, so the outputs decide")
        return None
    found = found_in(graph.tensors, known)
    notes.append("outputs cannot be compared, so each weight must stand in the graph; one that was merged fails")
    return compare_tensors(found, known) if a.is_graph else compare_tensors(known, found)


def _standing(known: Mapping[str, Array], graph: Mapping[str, Any]) -> str:
    """How many weights a graph holds as they are."""
    found = found_in(graph, known)
    same = sum(fingerprint(found[name]) == fingerprint(known[name]) for name in found)
    where = f"{same} of {len(known)} weights stand in the graph bit for bit"
    return f"{where}; exporters rename, transpose and merge some, so for the others the outputs decide"


def _both_nan(a: _Side, b: _Side) -> list[str]:
    """Weights of one name with NaN on either side: equal bits, but no number to be equal to."""
    return [name for name in a.tensors if name in b.tensors and _has_nan(a.tensors[name]) and _has_nan(b.tensors[name])]


def _has_nan(value: Any) -> bool:
    if isinstance(value, Tensor):
        number = value.is_floating_point() or value.is_complex()
        return number and not value.is_meta and bool(torch.isnan(value).any())
    return bool(_nans(as_array(value)).any())


# Outputs -------------------------------------------------------------------------------------------------


def _outputs(
    a: _Side,
    b: _Side,
    cases: Sequence[Any],
    given: bool,
    limits: tuple[float | None, float | None],
    any_dtype: bool,
    notes: list[str],
    failures: list[str],
) -> tuple[OutputsReport, ...]:
    reports: list[OutputsReport] = []
    values: list[Array] = []
    for number, case in enumerate(cases, 1):
        results = []
        for side, other in ((a, b), (b, a)):
            given_here = side.taking(case, other)
            try:
                results.append(side.run(given_here, any_dtype=any_dtype, beside_graph=a.is_graph or b.is_graph))
            except (ExportError, InputError) as error:
                failures.append(f"{side.name} does not run on these inputs: {_reason(error, side.name)}")
        if not results and given:
            raise InputError(f"the inputs fit neither side: {'; '.join(failures[-2:])}")
        if len(results) < 2:
            break
        by_name = not (a.is_graph or b.is_graph)
        report = _report_by_name if by_name else _output_report
        reports.append(report(results[0], results[1], limits, any_dtype))
        values += (as_array(value) for value in results[0][1])
        which = f"set {number} of the inputs" if len(cases) > 1 else "these inputs"
        failures += _holes(_pairs(results, by_name), case, which)
    if values and not any(value.size for value in values):
        failures.append("every output is empty, which proves nothing")
    return tuple(reports)


def _holes(pairs: Sequence[tuple[str, Any, Any]], case: Any, which: str) -> list[str]:
    """Outputs that are NaN in the same place on both sides: how much, where, and whether the inputs are to blame."""
    given = case.values() if isinstance(case, Mapping) else [case] if isinstance(case, Tensor | np.ndarray) else case
    why = " (they hold NaN)" if any(_nans(leaf).any() for leaf in pytree.tree_leaves(list(given))) else ""
    found = []
    for name, x, y in pairs:
        one, other = _nans(x), _nans(y)
        both = one & other if one.shape == other.shape else np.zeros(0, bool)
        if both.any():
            at = tuple(int(i) for i in np.unravel_index(int(both.argmax()), both.shape))
            where = f"{int(both.sum())} of {both.size} elements are NaN on both sides on {which}{why}, first at {at}"
            found.append(f"{printable(name)}: {where}, which proves nothing")
    return found


def _nans(value: Any) -> Array:
    """Which elements are NaN; none of what is no array of real or complex numbers."""
    array = as_array(value) if isinstance(value, Tensor | np.ndarray) else np.zeros(0)
    return np.isnan(array) if is_float(array.dtype) or array.dtype.kind == "c" else np.zeros(array.shape, bool)


def _pairs(sides: Sequence[tuple[list[str], list[Any]]], by_name: bool = False) -> list[tuple[str, Any, Any]]:
    """The outputs of both sides: of two modules by name, else by position, named after the side that has names."""
    a, b = sides
    if by_name:
        theirs = dict(zip(*b, strict=True))
        return [(name, value, theirs[name]) for name, value in zip(*a, strict=True) if name in theirs]
    names = [y or x or f"output {i}" for i, (x, y) in enumerate(zip(a[0], b[0], strict=False))]
    return list(zip(names, a[1], b[1], strict=False))


def _cases(
    a: _Side, b: _Side, inputs: Inputs | None, n_inputs: int, more: Sequence[Inputs], notes: list[str]
) -> list[Any]:
    """The sets of inputs to run both sides on; none where that cannot be done."""
    still = [side.name for side in (a, b) if not side.runs]
    if still:
        notes.append(f"outputs not compared: {' and '.join(still)} cannot run (a checkpoint needs arch=...)")
        return []
    graph = a if a.is_graph else b
    if inputs is None and not graph.is_graph:
        if not more:
            notes.append("outputs not compared: no inputs were given")
        return list(more)
    return [*([inputs] if inputs is not None else _made_up(graph, b, n_inputs, notes)), *more]


def _made_up(graph: _Side, other: _Side, count: int, notes: list[str]) -> list[dict[str, Array]]:
    """Sets of inputs for a graph; what indexes tables fits those of both sides."""
    rows = rows_indexed(graph.graph)
    if other.is_graph:
        theirs = rows_indexed(other.graph)
        rows = {name: min(each[name] for each in (rows, theirs) if name in each) for name in rows | theirs}

    def sets(rows: dict[str, int]) -> list[dict[str, Array]]:
        declared = declared_inputs(graph.session)
        return [made_up_inputs(declared, graph.name, number, rows=rows) for number in range(count)]

    made = sets(rows)
    if rows and not all(graph.takes(inputs) for inputs in made):
        notes.append(f"{graph.name} does not take all indices of its tables, so 0 and 1 were tried")
        return sets({})
    return made


def _parting(
    a: _Side,
    b: _Side,
    cases: Sequence[Any],
    outputs: Sequence[OutputsReport],
    limits: tuple[float | None, float | None],
    notes: list[str],
) -> Parting | None:
    """Where the sides part on the first set of inputs on which they do."""
    if not outputs:
        notes.append("no layer was looked for: the outputs were not compared")
        return None
    case = next((c for c, report in zip(cases, outputs, strict=False) if not report.ok), cases[0])
    sides: list[Any] = [side.name if side.is_graph else side.module for side in (a, b)]
    return first_difference(sides[0], sides[1], case, rtol=limits[0], atol=limits[1])


def _output_report(
    a: tuple[list[str], list[Any]],
    b: tuple[list[str], list[Any]],
    limits: tuple[float | None, float | None],
    any_dtype: bool,
) -> OutputsReport:
    """Compared by position, as callers of either side unpack them."""
    if len(a[1]) != len(b[1]):
        return compare_outputs(a[1], b[1])
    if any_dtype:
        judged = [_coarser(x, y) for x, y in zip(a[1], b[1], strict=True)]
        a, b = (a[0], [x for x, _ in judged]), (b[0], [y for _, y in judged])
    pairs = _pairs((a, b))
    return compare_outputs({n: x for n, x, _ in pairs}, {n: y for n, _, y in pairs}, rtol=limits[0], atol=limits[1])


def _report_by_name(
    a: tuple[list[str], list[Any]],
    b: tuple[list[str], list[Any]],
    limits: tuple[float | None, float | None],
    any_dtype: bool,
) -> OutputsReport:
    """Compared by the way to each tensor: two modules are to return the same structure."""
    x, y = (dict(zip(*side, strict=True)) for side in (a, b))
    for name in x.keys() & y.keys() if any_dtype else ():
        x[name], y[name] = _coarser(x[name], y[name])
    return compare_outputs(x, y, rtol=limits[0], atol=limits[1])


def _coarser(a: Any, b: Any) -> tuple[Array, Array]:
    """Two outputs in the type with the larger steps."""
    x, y = as_array(a), as_array(b)
    if x.dtype == y.dtype or not (is_float(x.dtype) and is_float(y.dtype)):
        return x, y
    kind = max(x.dtype, y.dtype, key=lambda dtype: tolerance(dtype)[0])
    return x.astype(kind), y.astype(kind)


def _reason(error: WnsurgeryError, name: str) -> str:
    return error.message.removeprefix(f"{name}: ")
