"""A live module as an ONNX file: folded on a copy, exported, checked on the file, compared with the original.

    export_onnx(model, torch.randn(1, 3, 32, 32), "model.onnx")

The file appears only if it holds no weight-norm arithmetic, passes onnx's checker, and onnxruntime computes what the
model computes.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from wnsurgery.differences import check_tolerances
from wnsurgery.errors import (
    ExportError,
    InputError,
    OutputError,
    SelectionError,
    VerificationError,
    first_line,
    printable,
)
from wnsurgery.parity import OutputsReport, compare_outputs, open_session, run_session
from wnsurgery.runs import Case, Inputs, copy_of, rng_kept, tracking, where, with_eps_of_graphs
from wnsurgery.silence import silenced
from wnsurgery.surgery import fold_weight_norm
from wnsurgery.text import columns

if TYPE_CHECKING:
    import onnx_ir as ir

    from wnsurgery.graph import OnnxFoldReport

__all__ = ["ExportReport", "export_onnx", "export_unfolded", "feeds_of"]

Exporter = Literal["dynamo", "torchscript"]

_KEPT_METADATA = "pkg.torch.onnx.name_scopes"  # which module a node comes from; the rest holds paths and source lines


@dataclass(frozen=True)
class ExportReport:
    """What `export_onnx` wrote and how it was proved; prints as a table.

    Attributes:
        files: what was written, the graph first.
        opset: of the graph's operations.
        inputs, outputs: (name, type, shape); dimensions that may vary are names.
        nodes: number of operations.
        folded: number of weights whose norm was folded, in the module or, where the exporter kept a norm, in the graph.
        left: (node, reason) for norms that stay: those of run-time values, and any that could not be folded.
        parity: onnxruntime on the CPU against the folded copy; None with check=False.
        original: onnxruntime against the model as it was given (a float64 norm's eps rounded to float32, as ONNX keeps
            it); None with check=False.
        exporter: "dynamo", or "torchscript" where that was asked for.
    """

    files: tuple[Path, ...]
    opset: int
    inputs: tuple[tuple[str, str, tuple[int | str, ...]], ...]
    outputs: tuple[tuple[str, str, tuple[int | str, ...]], ...]
    nodes: int
    folded: int
    left: tuple[tuple[str, str], ...]
    parity: OutputsReport | None
    original: OutputsReport | None
    exporter: Exporter = "dynamo"

    @property
    def ok(self) -> bool:
        """Checked and equal within tolerance."""
        return all(report is not None and report.ok for report in (self.parity, self.original))

    def raise_for_status(self) -> None:
        """Raise VerificationError where the outputs differ, or were not compared."""
        for report in (self.parity, self.original):
            if report is None:
                raise VerificationError(
                    f"{self.files[0]}: the outputs were not compared", hint="export with check=True"
                )
            report.raise_for_status()

    def __str__(self) -> str:
        lines = [f"wrote {path}" for path in self.files]
        kept = ("1 norm" if len(self.left) == 1 else f"{len(self.left)} norms") if self.left else "no weight norm"
        lines.append(f"opset {self.opset}, {self.nodes} nodes, {self.folded} weights folded, {kept} left")
        rows: list[tuple[str, ...]] = [("", "name", "type", "shape")]
        for kind, values in (("input", self.inputs), ("output", self.outputs)):
            rows += [(kind, name, dtype, "x".join(map(str, shape)) or "scalar") for name, dtype, shape in values]
        lines += columns(rows)
        lines += [f"  left: {name}: {reason}" for name, reason in self.left]
        if self.exporter == "torchscript":
            lines.append("  written by the TorchScript exporter: branches and loops are as they went for these inputs")
        if self.parity is None:
            return "\n".join([*lines, "outputs were not compared"])
        return "\n".join([*lines, "onnxruntime (CPU) against the model:", str(self.original)])


def export_onnx(  # noqa: PLR0913 - what is exported, how, and how it is proved; all but three have defaults that fit
    model: nn.Module,
    inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    dynamic: bool | Mapping[str, Sequence[int]] = False,
    half: bool = False,
    external: bool = False,
    exporter: Exporter = "dynamo",
    force: bool = False,
    check: bool = True,
    rtol: float | None = None,
    atol: float | None = None,
) -> ExportReport:
    """Export a model to ONNX with all weight norm folded, and prove on the file that the function is the same.

    The model itself is not touched: a copy is folded, put into eval mode and exported with
    `torch.onnx.export(dynamo=True)`. Source paths and stack traces are left out of the file, so exporting twice gives
    the same bytes. Weights go into the file; beyond 1.9 GB into `PATH.data` beside it.

    >>> model = wn.apply_weight_norm(nn.Sequential(nn.Conv2d(3, 8, 3)))
    >>> wn.export_onnx(model, torch.randn(1, 3, 32, 32), "model.onnx").parity.ok  # doctest: +SKIP
    True

    Args:
        model: any module that `torch.export` can trace, with or without weight norm (ours, torch's, legacy).
        inputs: a tensor, a sequence of positional arguments, or a mapping of keyword arguments.
        path: the output.
        opset: ONNX opset; None takes the exporter's.
        dynamic: let the first axis of every input vary, or these axes: {"x": [0, 2]}, by parameter of `forward` (also
            checked with twice the size).
        half: ship float16: the folded weights are rounded once and inputs and outputs become float16. The file is held
            to the rounded model as always, and to the original within 32 eps of float16.
        external: put the weights into `PATH.data` even if they would fit into the file; `PATH.HASH.data` where a graph
            that is replaced reads that one for other weights.
        exporter: "torchscript" runs the model once and writes down what it did. It takes some models that the other
            cannot; branches that depend on values are then fixed, which the check with one input cannot see.
        force: overwrite an existing output.
        check: compare with onnxruntime on the CPU.
        rtol, atol: tolerance on outputs; None goes by type, see `verify`.

    Raises:
        SelectionError: there is no such opset or exporter, a tolerance is none, or `path` is called a checkpoint.
        ExportError: the model cannot be traced or translated; the module where it happens is named if known.
        VerificationError: onnxruntime's outputs differ from the model's, or hold NaN. Nothing is written then.
        OutputExistsError, OutputError: about `path`.
    """
    from wnsurgery.stores import is_file_name
    from wnsurgery.stores.commit import check_output

    if is_file_name(path):
        raise SelectionError(f"{path}: would be an ONNX graph, and is called a checkpoint", hint="call it .onnx")
    path = check_output(path, force=force)
    _check_name(path)
    _check_opset(opset)
    if exporter not in get_args(Exporter):
        raise SelectionError(f'exporter must be "dynamo" or "torchscript", not {exporter!r}')
    check_tolerances(rtol, atol)
    with torch.no_grad(), rng_kept(model):
        original, plain = (with_eps_of_graphs(copy_of(model).eval()) for _ in range(2))
        folded = _count_folded(plain)
        fold_weight_norm(plain)
        cases = [Case.of(inputs, plain)]
        axes = _axes(cases[0].named(plain), dynamic)
        if axes:
            cases.append(cases[0].doubled(axes, plain))
        wanted = [case.run(original) for case in cases[:1]]
        wanted += [_run_doubled(case, original, axes) for case in cases[1:]]
        if half:
            plain = plain.half()
            cases = [case.cast_for(plain) for case in cases]
            wanted = [[_halved(x, path) for x in outputs] for outputs in wanted]
        expected = [(case.run(plain), outputs) for case, outputs in zip(cases, wanted, strict=True)]
        graph = (_traced if exporter == "torchscript" else _exported)(plain, cases[-1], opset, axes)
    try:
        proven = list(zip(cases, expected, strict=True)) if check else []
        with _staged(graph, path, force=force, external=external) as (report, staged):
            _check_file(staged)
            session = open_session(staged, trusted=True) if proven else None
            proofs = [
                _compared(session, feeds_of(session, case, plain), ends, path, (rtol, atol), half)
                for case, ends in proven
            ]
            names = sorted(file.name for file in staged.parent.iterdir())
    except VerificationError as error:
        error.hint = error.hint or _rounded_eps(graph)
        raise
    except InputError as error:
        # what is refused here is the exporter's work, not a file of the caller's
        reason = error.message.split(": ", 1)[-1]
        raise ExportError(f"{path}: {reason}", hint="check=False skips onnxruntime") from error
    return ExportReport(
        files=tuple(path.with_name(name) for name in names),
        opset=graph.opset_imports.get("", 0),
        inputs=_signature(graph.graph.inputs),
        outputs=_signature(graph.graph.outputs),
        nodes=report.nodes_after,
        folded=folded + len(report.found),
        left=report.left,
        parity=_worst(tuple(proof[0] for proof in proofs)),
        original=_worst(tuple(proof[1] for proof in proofs)),
        exporter=exporter,
    )


def _halved(output: Tensor, path: Path) -> Tensor:
    """An output of the original in float16, which must be able to hold it."""
    if not output.is_floating_point():
        return output
    half = output.half()
    if bool((half.isinf() & output.isfinite()).any()):
        raise VerificationError(f"{path}: float16 ends at 65504, and an output reaches {float(output.abs().max()):.3g}")
    return half


def export_unfolded(model: nn.Module, inputs: Inputs, path: str | os.PathLike[str]) -> None:
    """Export a model as it is, with its weight norm in the graph, to see what that costs; nothing is checked.

    Raises ExportError where the TorchScript exporter, which keeps all of it, cannot.
    """
    from wnsurgery.onnx_file import write_onnx

    with torch.no_grad(), rng_kept(model):
        graph = _traced(copy_of(model).eval(), Case.of(inputs, model), None, {})
    _strip(graph)
    write_onnx(graph, path, force=True)


def _axes(arguments: Mapping[str, Any], dynamic: bool | Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The axes that may vary, by parameter of `forward`."""
    if isinstance(dynamic, bool):
        return dict.fromkeys(arguments, (0,)) if dynamic else {}
    for name, axes in dynamic.items():
        if name not in arguments:
            raise SelectionError(f"dynamic={name!r} is no input", hint=f"inputs: {', '.join(arguments)}")
        for tensor in (x for x in pytree.tree_leaves(arguments[name]) if isinstance(x, Tensor)):
            wrong = [axis for axis in axes if not -tensor.ndim <= axis < tensor.ndim]
            if wrong:
                raise SelectionError(f"dynamic: {name} has no axis {wrong[0]}, it has {tensor.ndim}")
    return {name: tuple(axes) for name, axes in dynamic.items()}


def _run_doubled(case: Case, model: nn.Module, axes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """The outputs for inputs of twice the size; an error says that they were doubled, and along what."""
    try:
        return case.run(model)
    except ExportError as error:
        which = ", ".join(f"{printable(name)}={','.join(map(str, along))}" for name, along in axes.items() if along)
        reason = f"the dynamic axes ({which}) were tried at twice the size, which the model does not take"
        raise ExportError(f"{reason}: {error.message}") from error


def _check_name(path: Path) -> None:
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise OutputError(f"{path}: onnx takes no name that is not UTF-8") from error


def _check_opset(opset: int | None) -> None:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not 1 <= opset <= newest:
        raise SelectionError(f"opset {opset} does not exist: the installed onnx knows 1 to {newest}")


def _count_folded(model: nn.Module) -> int:
    from wnsurgery.walk import slots

    return sum(slot.form in ("ours", "torch", "legacy") for slot in slots(model))


# Exporting -----------------------------------------------------------------------------------------------


def _exported(model: nn.Module, case: Case, opset: int | None, axes: Mapping[str, tuple[int, ...]]) -> ir.Model:
    """The model as an ONNX graph in memory."""
    shapes = _dynamic_shapes(case.named(model), axes) if axes else None
    fresh = case.fresh()
    try:
        with silenced():
            program: Any = torch.onnx.export(
                model,
                fresh.args,
                kwargs=fresh.kwargs,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as error:
        # the exporter lets any error of torch.export, the model or its own through; all mean "cannot be exported"
        reason = f"{_culprit(model, case, error)}the exporter failed: {first_line(error)}"
        raise ExportError(reason, hint='exporter="torchscript" (--exporter torchscript) may do it') from error
    graph: ir.Model = program.model
    _check_written(graph, opset, axes)
    return graph


def _traced(model: nn.Module, case: Case, opset: int | None, axes: Mapping[str, tuple[int, ...]]) -> ir.Model:
    """The same by the TorchScript exporter, which runs the model once and writes down what it did."""
    import onnx_ir as ir

    file: Any = io.BytesIO()
    fresh = case.fresh()
    bound = fresh.bound(model)
    arguments, forward = dict(bound.arguments), model.forward

    def positional(*values: Any) -> Any:
        bound.arguments.update(zip(arguments, values, strict=True))
        return forward(*bound.args, **bound.kwargs)

    shapes = _dynamic_shapes(arguments, axes)
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # its fused operations have no translation
        if not isinstance(model, torch.jit.ScriptModule):
            model.forward = positional  # the exporter would turn defaults such as is_causal=False into tensors
        with silenced():
            torch.onnx.export(
                model,
                tuple(arguments.values()),
                file,
                dynamo=False,
                opset_version=opset,
                input_names=names if len(names) == len(arguments) else None,
                dynamic_axes={name: shapes[name] for name in names if shapes.get(name)},
                verbose=False,
            )
    except Exception as error:
        _put_back(model, forward)
        raise ExportError(f"{_culprit(model, case, error)}the exporter failed: {first_line(error)}") from error
    finally:
        _put_back(model, forward)
        torch.backends.mha.set_fastpath_enabled(fast)
    import onnx

    graph = ir.from_proto(onnx.load_model_from_string(file.getvalue()))
    _check_written(graph, opset, {})
    return graph


def _put_back(model: nn.Module, forward: Any) -> None:
    if not isinstance(model, torch.jit.ScriptModule):
        model.forward = forward


def _check_written(graph: ir.Model, opset: int | None, axes: Mapping[str, tuple[int, ...]]) -> None:
    """The opset and the open axes are those asked for."""
    written = graph.opset_imports.get("")
    if opset is not None and written != opset:
        raise ExportError(f"opset {opset} cannot be had for this model: the exporter wrote opset {written}")
    others = (0,) if axes and set(axes.values()) == {(0,)} else ()  # parts of a nested input have names of their own
    for value in graph.graph.inputs:
        fixed = [a for a in axes.get(str(value.name), others) if value.shape and isinstance(value.shape[a], int)]
        if fixed:
            which = "first axis" if fixed[0] == 0 else f"axis {fixed[0]}"
            raise ExportError(f"the {which} of {printable(value.name)} cannot vary in this model")


def _dynamic_shapes(arguments: Mapping[str, Any], axes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Axes that may vary, as torch.export wants them; first axes of one size share a name."""
    names: dict[int, str] = {}

    def open_axes(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return None
        found = {}
        for axis in (a % value.ndim for a in axes.get(name, ())):
            batch = names.setdefault(value.shape[0], f"batch{len(names) or ''}")
            found[axis] = f"{name}_{axis}" if axis else batch
        return found or None

    return {name: pytree.tree_map(lambda x, n=name: open_axes(n, x), value) for name, value in arguments.items()}


def _culprit(model: nn.Module, case: Case, error: BaseException) -> str:
    """The module at fault, as `name: `, by tracing once more and looking where it breaks; "" if it cannot be told."""
    fresh = case.fresh()
    with silenced(), tracking(model) as active:
        try:
            program = torch.export.export(model, fresh.args, fresh.kwargs, strict=False).run_decompositions()
        except Exception:  # whatever it is, the error in hand is the one to report
            return where(active)
    node_name = re.search(r"translating node %(\w+)", _chain(error))
    for node in program.graph.nodes:
        if node_name and node.name == node_name[1]:
            modules = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
            return where(modules)
    return ""


def _chain(error: BaseException | None) -> str:
    parts = []
    while error is not None:
        parts.append(str(error))
        error = error.__cause__
    return "\n".join(parts)


def _strip(model: ir.Model) -> None:
    """Remove source paths, stack traces and anything else about where the model was exported."""
    from wnsurgery.onnx_nodes import all_graphs

    model.doc_string = None
    model.metadata_props.clear()
    for graph in all_graphs(model):
        graph.doc_string = None
        graph.metadata_props.clear()
        values = [*graph.inputs, *getattr(graph, "initializers", {}).values()]
        for node in graph:
            kept = node.metadata_props.get(_KEPT_METADATA)
            node.doc_string = None
            node.metadata_props.clear()
            if kept is not None:
                node.metadata_props[_KEPT_METADATA] = kept
            values.extend(node.outputs)
        for value in values:
            value.doc_string = None
            value.metadata_props.clear()


# Checking ------------------------------------------------------------------------------------------------

_HALF_RTOL = 2.0**-5  # 32 eps of float16: rounding all weights and activations of some dozens of layers adds up to that

_Expected = tuple[Case, tuple[list[Tensor], list[Tensor]]]  # arguments, outputs of the folded copy and the original
_Limits = tuple[float | None, float | None]


@contextlib.contextmanager
def _staged(graph: ir.Model, path: Path, *, force: bool, external: bool) -> Iterator[tuple[OnnxFoldReport, Path]]:
    """Clean the graph and write it; it appears when the block ends well."""
    from wnsurgery.graph import fold_model
    from wnsurgery.onnx_file import staged_onnx

    report = fold_model(graph)
    _strip(graph)
    with staged_onnx(graph, path, force=force, external=external) as staged:
        yield report, staged


def _check_file(path: Path) -> None:
    """No weight norm in the file, and onnx's own checker passes it."""
    import onnx

    from wnsurgery.graph import find_weight_norms

    remaining = find_weight_norms(path)
    if remaining:
        raise ExportError(f"weight-norm arithmetic stays in the graph: {', '.join(f.value for f in remaining[:5])}")
    try:
        onnx.checker.check_model(os.fspath(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ExportError(f"the exporter wrote an invalid graph: {first_line(error)}") from error


def _compared(
    session: Any,
    feeds: dict[str, Tensor] | list[Tensor],
    expected: tuple[list[Tensor], list[Tensor]],
    path: Path,
    limits: _Limits,
    half: bool = False,
) -> tuple[OutputsReport, OutputsReport]:
    """onnxruntime's outputs against those of the folded copy and of the original; raises where they differ."""
    names = [output.name for output in session.get_outputs()]
    found = run_session(session, feeds, path)
    reports = []
    for who, tensors in zip(("folded model", "model"), expected, strict=True):
        if len(tensors) != len(names):
            raise VerificationError(f"{path}: {len(names)} outputs where the {who} has {len(tensors)}")
        reference = dict(zip(names, tensors, strict=True))
        rtol = _HALF_RTOL if limits[0] is None and half and who == "model" else limits[0]
        report = compare_outputs(found, reference, rtol=rtol, atol=limits[1])
        if not report.ok:
            raise VerificationError(f"{path}: onnxruntime differs from the {who}: {report.problems[0]}")
        if reference and not any(tensor.numel() for tensor in reference.values()):
            raise VerificationError(f"{path}: every output is empty, which proves nothing", hint="try other inputs")
        holes = [name for name, tensor in reference.items() if bool(torch.isnan(tensor).any())]
        if holes:
            where = ", ".join(map(printable, holes))
            raise VerificationError(f"{path}: NaN in the model's outputs ({where})", hint="try other inputs")
        reports.append(report)
    return reports[0], reports[1]


def _rounded_eps(graph: ir.Model) -> str | None:
    """What explains a small difference in float64, for a norm that the model calls as a function."""
    from wnsurgery.onnx_nodes import all_graphs

    if not any(value.dtype is not None and value.dtype.name == "DOUBLE" for value in graph.graph.outputs):
        return None
    norms = sorted({node.op_type for body in all_graphs(graph) for node in body if "epsilon" in node.attributes})
    return f"ONNX keeps the eps of {', '.join(norms)} in float32: take one that float32 holds" if norms else None


def feeds_of(session: Any, case: Case, model: nn.Module) -> dict[str, Tensor] | list[Tensor]:
    """Tensors for the graph's inputs: by name where the names are those of `forward`, else in order.

    Exporters leave out those that nothing is computed from.
    """
    declared = [value.name for value in session.get_inputs()]
    named = {name: value for name, value in (case.named(model) | case.kwargs).items() if isinstance(value, Tensor)}
    if all(name in named for name in declared):
        return {name: named[name] for name in declared}
    return [x for x in pytree.tree_leaves((case.args, case.kwargs)) if isinstance(x, Tensor)]


def _worst(reports: tuple[OutputsReport, ...]) -> OutputsReport | None:
    """The report with the largest relative difference."""
    return max(reports, key=lambda r: max((o.max_rel for o in r.outputs), default=0.0), default=None)


def _signature(values: Sequence[ir.Value]) -> tuple[tuple[str, str, tuple[int | str, ...]], ...]:
    return tuple(
        (
            str(value.name),
            "?" if value.dtype is None else value.dtype.name.lower(),
            tuple(d if isinstance(d, int) else str(d) for d in value.shape or ()),
        )
        for value in values
    )
