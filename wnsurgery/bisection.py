"""The layer where two models part: the first whose output differs although everything before it agrees.

first_difference(model_a, model_b, inputs)                  # two modules: layer by layer
first_difference("a.onnx", "b.onnx", inputs)                # two graphs: value by value
first_difference(model, "model.onnx", inputs)               # a module and its export
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from wnsurgery.differences import OutputDifference, as_array, check_tolerances, compare_outputs
from wnsurgery.errors import printable
from wnsurgery.parity import declared_inputs, open_with_all_values, run_session
from wnsurgery.runs import Case, copy_of, for_graph, named_outputs, rng_kept, with_eps_of_graphs

__all__ = ["Parting", "first_difference"]

Path_ = str | os.PathLike[str]
Limits = tuple[float | None, float | None]


@dataclass(frozen=True)
class Parting:
    """Where two models part; prints as a few lines.

    Attributes:
        layer: name of the module, or of the value in a graph, whose output is the first to differ; None where all
            that could be compared agree.
        kind: its class, or the operation.
        difference: how its output differs; None with `layer`.
        before: the last layer before it that agrees; "" where it is the first.
        weights: tensors of that layer that differ between the sides, where both hold them.
        compared: how many layers were compared.
        alone: how many stand on one side only, and were not.
    """

    layer: str | None
    kind: str
    difference: OutputDifference | None
    before: str
    weights: tuple[str, ...]
    compared: int
    alone: int

    def __str__(self) -> str:
        rest = f", {self.alone} stand on one side only" if self.alone else ""
        if self.layer is None or self.difference is None:
            what = "all of them agree" if self.compared else "nothing in common to compare"
            return f"first difference: none in {self.compared} layers, {what}{rest}"
        after = f"agree up to {self.before}" if self.before else "nothing before it"
        lines = [f"first difference: {self.layer} ({self.kind}): {self.difference.reason}"]
        lines.append(f"  {self.compared} layers compared, {after}{rest}")
        lines += [f"  its weights differ: {', '.join(self.weights)}"] if self.weights else []
        return "\n".join(lines)


def first_difference(
    a: nn.Module | Path_, b: nn.Module | Path_, inputs: Any, *, rtol: float | None = None, atol: float | None = None
) -> Parting:
    """Find the first layer, in the order of execution, whose output differs between two models.

    Modules are matched by name, values of graphs by name, and a module with a graph by the scopes that exporters write
    on nodes. Exporters merge layers (a BatchNorm into its convolution); there, a layer does not count as different if
    the next one computed from it agrees. Evaluation mode, on copies.

    >>> import copy
    >>> a = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> b = copy.deepcopy(a)
    >>> _ = b[2].bias.data.add_(1)
    >>> wn.first_difference(a, b, torch.ones(1, 2)).layer
    '2'

    Args:
        a, b: modules, or paths of ONNX files.
        inputs: a tensor, a sequence of positional arguments, or a mapping by name.
        rtol, atol: tolerance on each layer's output; None goes by type, see `verify`.

    Raises ExportError or InputError where a side does not run on the inputs, SelectionError for tolerances that are
    none.
    """
    check_tolerances(rtol, atol)
    sides = [_trace(x, inputs, y) for x, y in ((a, b), (b, a))]
    pair = _pairs(sides[0], sides[1])
    verdicts = [_compared(x, y, (rtol, atol)) for x, y in pair]
    alone = len(sides[0].steps) + len(sides[1].steps) - 2 * len(pair)
    agreed = ""
    for i, ((x, _), difference) in enumerate(zip(pair, verdicts, strict=True)):
        if difference.ok:
            agreed = x.name
            continue
        if sides[0].is_graph != sides[1].is_graph and _agrees_again(pair[i:], verdicts[i:]):
            continue
        weights = _weights_that_differ(a, b, x.name)
        return Parting(printable(x.name or "the whole"), x.kind, difference, agreed, weights, len(pair), alone)
    return Parting(None, "", None, agreed, (), len(pair), alone)


# What was computed on the way ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """One layer's output, or one value of a graph."""

    name: str
    kind: str
    values: tuple[Any, ...]
    value: Any = None  # of a graph, to follow what is computed from it
    scope: str | None = None  # the module a graph's value comes from

    def reaches(self, other: _Step) -> bool:
        """Whether the other value is computed from this one; modules do not tell."""
        if self.value is None or other.value is None:
            return False
        seen, todo = {self.value}, [self.value]
        while todo:
            for node, _ in todo.pop().uses():
                for output in node.outputs:
                    if output is other.value:
                        return True
                    if output not in seen:
                        seen.add(output)
                        todo.append(output)
        return False


@dataclass(frozen=True)
class _Trace:
    steps: tuple[_Step, ...]
    is_graph: bool


def _trace(side: nn.Module | Path_, inputs: Any, other: nn.Module | Path_) -> _Trace:
    if isinstance(side, nn.Module):
        return _trace_of_module(side, inputs, beside_graph=not isinstance(other, nn.Module))
    return _trace_of_graph(side, inputs, other)


def _trace_of_module(model: nn.Module, inputs: Any, beside_graph: bool) -> _Trace:
    with torch.no_grad():
        model = with_eps_of_graphs(copy_of(model).eval()) if beside_graph else copy_of(model).eval()
    steps: list[_Step] = []
    calls: dict[str, int] = {}

    def record(module: nn.Module, name: str, output: Any) -> None:
        count = calls[name] = calls.get(name, 0) + 1
        tensors = pytree.tree_leaves(output) if beside_graph else named_outputs(output).values()
        values = tuple(as_array(x).copy() for x in tensors if isinstance(x, Tensor))
        called = name if count == 1 else f"{name} (call {count})"
        steps.append(_Step(called, _kind(module), values))

    for name, module in model.named_modules():
        if "parametrizations" not in name.split(".") and not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_hook(lambda m, _, output, name=name: record(m, name, output))
    case = Case.fitting(inputs, model)
    with torch.no_grad(), rng_kept(model):
        case.run(model) if beside_graph else case.run_by_name(model)
    return _Trace(tuple(steps), is_graph=False)


def _kind(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Parametrized")


def _trace_of_graph(path: Path_, inputs: Any, other: nn.Module | Path_) -> _Trace:
    model, session = open_with_all_values(path)
    if isinstance(other, nn.Module):
        inputs = for_graph(inputs, declared_inputs(session), other)
    given = [inputs] if isinstance(inputs, Tensor | np.ndarray) else inputs
    found = run_session(session, given, path, some=True)
    steps = []
    for node in model.graph:
        for value in node.outputs:
            if value.name in found:
                steps.append(_Step(value.name, node.op_type, (found[value.name],), value, _scope(node)))
    return _Trace(tuple(steps), is_graph=True)


def _scope(node: Any) -> str | None:
    """Name of the module that a node comes from, as the exporters write it."""
    written = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if written is not None:
        try:
            scopes = ast.literal_eval(written)
            return str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else None
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    parts = str(node.name or "").split("/")  # "/up/up.0/ConvTranspose"
    return parts[-2] if len(parts) > 2 and not parts[0] else None


# Side by side --------------------------------------------------------------------------------------------


def _pairs(a: _Trace, b: _Trace) -> list[tuple[_Step, _Step]]:
    if a.is_graph != b.is_graph:
        pairs = list(_by_scope(*((a, b) if b.is_graph else (b, a))))
        return pairs if b.is_graph else [(y, x) for x, y in pairs]
    other = {step.name: step for step in b.steps}
    return [(step, other[step.name]) for step in a.steps if step.name in other]


def _by_scope(modules: _Trace, graph: _Trace) -> Iterator[tuple[_Step, _Step]]:
    """A module's output with the last value of that module's nodes that has its shape."""
    scopes: dict[str, list[_Step]] = {}
    for step in graph.steps:
        if step.scope is not None:
            scopes.setdefault(step.scope, []).append(step)
    called_again = {step.name.partition(" (call ")[0] for step in modules.steps if " (call " in step.name}
    for step in modules.steps:
        if len(step.values) != 1 or step.name in called_again:
            continue
        shape = step.values[0].shape
        fitting = [found for found in scopes.get(step.name, ()) if found.values[0].shape == shape]
        if fitting:
            found = fitting[-1]
            yield step, _Step(step.name, found.kind, found.values, found.value)


def _agrees_again(pairs: Sequence[tuple[_Step, _Step]], verdicts: Sequence[OutputDifference]) -> bool:
    """Whether the next layer that is computed from the first one agrees: exporters merge layers."""
    for step, following in zip(pairs[0], zip(*pairs[1:], strict=True), strict=False):
        for other, verdict in zip(following, verdicts[1:], strict=True):
            if step.reaches(other):
                return verdict.ok
    return False


def _compared(a: _Step, b: _Step, limits: Limits) -> OutputDifference:
    """The worst of a layer's outputs."""
    report = compare_outputs(a.values, b.values, rtol=limits[0], atol=limits[1])
    wrong = [output for output in report.outputs if not output.ok]
    if wrong:
        return wrong[0]
    if report.outputs and not report.missing:
        return max(report.outputs, key=lambda o: o.max_rel)
    reason = "; ".join(report.missing)  # a layer without any output tensors agrees with another such
    return OutputDifference("", (), "", 0.0, 0.0, 0.0, 0.0, 0.0, (), reason)


def _weights_that_differ(a: Any, b: Any, layer: str) -> tuple[str, ...]:
    if not isinstance(a, nn.Module) or not isinstance(b, nn.Module):
        return ()
    found: Sequence[Mapping[str, Tensor]] = [_effective(side, layer.partition(" (call ")[0]) for side in (a, b)]
    names = [name for name in found[0] if name in found[1]]
    return tuple(printable(n) for n in names if not torch.equal(found[0][n], found[1][n]))


def _effective(model: nn.Module, layer: str) -> dict[str, Tensor]:
    """The tensors that a layer itself uses, computed ones as they are used."""
    from torch.nn.utils import parametrize

    module = dict(model.named_modules()).get(layer)
    if module is None:
        return {}
    names = [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
    if parametrize.is_parametrized(module):
        names += [str(name) for name in module.parametrizations]
    with torch.no_grad():
        return {f"{layer}.{name}".lstrip("."): getattr(module, name).detach().cpu() for name in names}
