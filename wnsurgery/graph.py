"""Find weight-norm arithmetic in an ONNX graph by what it computes, and replace it by folded initializers.

Exporters spell g * v / ||v|| in many ways. So no spelling is looked for, but what is computed (`graph_matching`); and
`compose` gives the weight, as it does for modules and checkpoint files.

    find_weight_norms("generator.onnx")                 # which weights, made of what
    fold_onnx("generator.onnx", "generator.plain.onnx")
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from wnsurgery.errors import PairError, SelectionError
from wnsurgery.graph_matching import Found, Match, Matcher, ZeroNorm, origin, quietly
from wnsurgery.onnx_checks import blamed_on
from wnsurgery.onnx_file import read_onnx, refuse_sources, weight_files, write_onnx
from wnsurgery.onnx_functions import open_norm_functions
from wnsurgery.onnx_layout import drop_unused, put_initializer, settle
from wnsurgery.onnx_nodes import all_graphs
from wnsurgery.text import by, columns

__all__ = ["Found", "OnnxFoldReport", "find_weight_norms", "fold_model", "fold_onnx"]

Path_ = str | os.PathLike[str]

_HALF = re.compile(r"(?:(?P<stem>.*)\.)?parametrizations\.(?P<new>[^.]+)\.original1|(?P<old>.+)_v", re.DOTALL)


@dataclass(frozen=True)
class OnnxFoldReport:
    """What `fold_onnx` did; prints as a table.

    Attributes:
        found: the weights that were folded.
        left: (node, reason) for every norm that stays.
        nodes_before, nodes_after: size of the graph, subgraphs included.
        files: what was written, the graph first.
        warnings: what the user should look at.
    """

    found: tuple[Found, ...]
    left: tuple[tuple[str, str], ...]
    nodes_before: int
    nodes_after: int
    files: tuple[Path, ...] = field(default=())
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"{len(self.found)} weights folded, {self.nodes_before} -> {self.nodes_after} nodes"
        what = "folded" if self.left else "found"
        lines = [head if self.found else f"no weight norm {what}, {self.nodes_before} nodes kept"]
        lines += columns([(f.value, by(f.shape), f.dtype, f"from {f.g or 'no magnitude'}, {f.v}") for f in self.found])
        lines += [f"  left: {name}: {reason}" for name, reason in self.left]
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join([*lines, *(f"wrote {path}" for path in self.files)])


@quietly
def find_weight_norms(model: Path_ | ir.Model) -> list[Found]:
    """Every weight that an ONNX graph computes as g * v / ||v|| from constants, whatever operations it uses.

    >>> find_weight_norms("generator.onnx")[0].v  # doctest: +SKIP
    'ups.0.weight_v'

    Args:
        model: path of an ONNX file, or an `onnx_ir.Model`, which is not changed.

    Raises InputMissingError, InputError or UnsafeFileError for a file that cannot be read.
    """
    if not isinstance(model, ir.Model):
        with blamed_on(model):
            opened = read_onnx(model)
            open_norm_functions(opened)
            return list(Matcher(opened).found)
    opened = ir.from_proto(ir.to_proto(model)) if model.functions else model
    open_norm_functions(opened)
    return list(Matcher(opened).found)


@quietly
def fold_onnx(
    src: Path_,
    dst: Path_,
    *,
    zero_norm: ZeroNorm = "error",
    force: bool = False,
    in_place: bool = False,
) -> OnnxFoldReport:
    """Write a copy of an ONNX file with every g * v / ||v|| of constants replaced by the plain weight.

    The weights are bit for bit those of `compose`, computed when they are written, one at a time. Names of inputs,
    outputs and remaining nodes, opset and metadata stay; a weight made of `X.weight_g`, `X.weight_v` is called
    `X.weight` if that name is free. A graph without weight norm is copied byte for byte (unless its weights live in
    a second file, whose name must change).

    >>> print(wn.fold_onnx("generator.onnx", "generator.plain.onnx"))  # doctest: +SKIP
    78 weights folded, 661 -> 427 nodes

    Args:
        src: ONNX file, weights inside or in files beside it.
        dst: the output; with external weights, `dst.data` beside it is written too, or `dst.HASH.data` where a graph
            that is replaced reads that one for other weights.
        zero_norm: what a row with v = 0 and g != 0 becomes, for which the graph gives 0 / 0: "error", "zero" or "nan".
        force: overwrite an existing output.
        in_place: let the output be the input.

    Raises:
        InputMissingError, InputError: `src` or its weights are missing or damaged.
        PairError: a row has v = 0 and g != 0, and `zero_norm` does not say what that becomes.
        UnsafeFileError: its weights lie outside its directory.
        OutputExistsError, OutputError: `dst` exists, is a file of the input, or could not be written.
        SelectionError: `dst` has the suffix of a checkpoint.
    """
    from wnsurgery.stores import is_file_name
    from wnsurgery.stores.commit import check_output, committed, is_same_file

    if is_file_name(dst):
        raise SelectionError(f"{dst}: would be an ONNX graph, and is called a checkpoint", hint="call it .onnx")
    if zero_norm not in ("error", "zero", "nan"):
        raise SelectionError(f'zero_norm must be "error", "zero" or "nan", not {zero_norm!r}')
    check_output(dst, src, force=force, in_place=in_place)
    with blamed_on(src):
        model = read_onnx(src)
        weights = weight_files(model)
        if not is_same_file(src, dst):
            refuse_sources(dst, (src, *weights))
        try:
            report = fold_model(model, zero_norm=zero_norm)
        except PairError as error:
            raise PairError(f"{src}: {error.message}", hint=error.hint) from error
        if not report.found and is_same_file(src, dst):
            files = (Path(dst), *sorted(weights))
        elif report.found or weights:
            files = write_onnx(model, dst, force=force or in_place, external=bool(weights))
        else:
            content = Path(src).read_bytes()
            with committed(dst, force=force or in_place) as file:
                file.write(content)
            files = (Path(dst),)
    return replace(report, files=files)


@quietly
def fold_model(model: ir.Model, *, zero_norm: ZeroNorm = "zero") -> OnnxFoldReport:
    """`fold_onnx` on a model in memory, in place.

    >>> fold_model(ir.load("generator.onnx")).nodes_after  # doctest: +SKIP
    427
    """
    before = _count(model)
    open_norm_functions(model)
    matcher = Matcher(model, zero_norm)
    warnings = matcher.settle_rows_without_direction()
    sources = dict.fromkeys(v for match in matcher.matches for v in matcher.constants.cone(match.value))
    taken = _names(model)
    weights = [_replace(match, model, matcher, taken) for match in matcher.matches]
    for node in reversed(matcher.dead):
        node.graph.remove(node, safe=True)  # type: ignore[union-attr]
    for value in sources:
        drop_unused(value, model)
    settle(model, weights)
    return OnnxFoldReport(matcher.found, matcher.left(), before, _count(model), warnings=warnings)


# Changing the graph --------------------------------------------------------------------------------------


def _replace(match: Match, model: ir.Model, matcher: Matcher, taken: set[str]) -> ir.Value:
    """Let an initializer stand where the computed weight stood; its name is taken from then on."""
    name, weight = _plain_name(match, taken), matcher.weight_of(match)
    taken.add(name)
    return put_initializer(model, match.value, name, weight, match.dtype, match.shape)


def _plain_name(match: Match, taken: set[str]) -> str:
    """`X.weight` for a weight made of `X.weight_v` or `X.parametrizations.weight.original1`, if that is free."""
    name = str(match.value.name)
    half = _HALF.fullmatch(str((origin(match.v) or match.v).name))
    if match.value.is_graph_output() or half is None:
        return name
    plain = half["old"] or (f"{half['stem']}.{half['new']}" if half["stem"] else half["new"])
    return name if plain in taken else plain


def _names(model: ir.Model) -> set[str]:
    names: set[str] = set()
    for graph in all_graphs(model):
        values: Iterable[ir.Value] = (*graph.inputs, *getattr(graph, "initializers", {}).values())
        names.update(str(v.name) for v in values)
        names.update(str(v.name) for node in graph for v in node.outputs)
    return names


def _count(model: ir.Model) -> int:
    return sum(len(graph) for graph in all_graphs(model))
