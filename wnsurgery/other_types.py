"""Weights of 16 bits, of float64, and of any type with a g stored as its logarithm, in the CPU's memory in one pass, as
`fused` has it for float32 with a linear g.

The kernels for them come with those for float32 (`fused.start`), compiled when the first such weight is met.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wnsurgery import fused
from wnsurgery.norms import ridge_bits

__all__ = [
    "TYPES",
    "Rows",
    "backward",
    "backward_call",
    "forward",
    "forward_call",
    "rows_of",
    "sizes_for_gradients",
    "sizes_of",
]

TYPES = frozenset({torch.float16, torch.bfloat16, torch.float64})
_LARGE_HALF = torch.finfo(torch.float16).max / 4  # a g in 16 bits above which may stand for a norm beyond its type


class Rows(NamedTuple):
    """A weight as the kernels see it: `laid` are the sizes they are told. `across`, where the rows are axis 1 and must
    be laid out one after the other first, are those it has itself; `log` says that g is stored as its logarithm;
    `as_it_is` that the kernels read v where it lies, and write dL/dg in the type of g."""

    laid: fused.Sizes
    across: fused.Sizes | None
    log: bool
    as_it_is: bool


def rows_of(g: Tensor, v: Tensor, kept: tuple[int, ...], groups: int, magnitude: str) -> Rows | None:
    """How the kernels see this pair; None where they are not loaded or do not take it.

    They take those of `TYPES` that `fused.lies_in_rows` in the CPU's memory, with axis 0, axis 1 or no axis kept, and
    those of float32 with the logarithm of g; a logarithm in float64 for float64 weights and in float32 for others.
    """
    log = magnitude == "log"
    if not (v.dtype in TYPES or (log and v.dtype is torch.float32)) or not fused.started():
        return None
    own = _type_of_rows(v)
    types = (own,) if log else (own, v.dtype)
    for kind in (type(g), type(v)):  # no subclass with operations of its own
        if not (kind is Tensor or issubclass(kind, nn.Parameter)):
            return None
    sizes = fused.sizes_of_pair(g, v, kept, groups) if g.dtype in types else None
    if sizes is None:
        return None
    if sizes.inputs and v.dtype is not torch.float32:
        return Rows(fused.Sizes(0, sizes.rows, v.numel() // sizes.rows), sizes, log, as_it_is=False)
    return Rows(sizes, None, log, as_it_is=g.dtype is own)


def sizes_of(g: Tensor, sizes: Rows) -> Tensor:
    """|w| per row in the type that `forward` takes: float64 for such weights and where g is stored as its logarithm,
    else float32."""
    if sizes.log:
        return g.detach().double().exp()
    return g if g.dtype is torch.float64 else g.detach().float()


def sizes_for_gradients(g: Tensor, sizes: Rows) -> Tensor:
    """|w| per row in the type of dL/dg that `backward` makes: float64 for such weights, else float32."""
    size = sizes_of(g, sizes)
    return size if g.dtype is torch.float64 else size.float()


def forward_call(g: Tensor, v: Tensor, sizes: Rows) -> tuple[Callable[..., bool], tuple[int, ...]]:
    """What `forward` calls, as `fused.forward_call` has it: a function of the addresses of v, of what `sizes_of` gives,
    of w and of ||v||, in float64 for such weights and else in float32; and the arguments that come after these."""
    logs, columns = g.data_ptr() if sizes.log else 0, sizes.laid.columns
    if v.dtype is torch.float64:
        return _call("double_forward", v, sizes, (logs, columns, *ridge_bits(columns)))
    if sizes.laid.inputs:
        return _call("columns_log_forward", v, sizes, (logs, *sizes.laid.told))
    if v.dtype is torch.float32:
        return _call("log_forward", v, sizes, (logs, columns))
    return _call("short_forward", v, sizes, (logs, _kind(v), columns))


def backward_call(v: Tensor, sizes: Rows) -> tuple[Callable[..., bool], tuple[int, ...]]:
    """The same of `backward`: of the addresses of dL/dw, v, what `sizes_for_gradients` gives, ||v||, dL/dg and dL/dv;
    where g is stored as its logarithm, dL/dg is yet to be multiplied by those sizes."""
    if v.dtype is torch.float64:
        return _call("double_backward", v, sizes, (sizes.laid.columns,))
    if v.dtype is torch.float32:
        return fused.backward_call(sizes.laid, v.numel())
    return _call("short_backward", v, sizes, (_kind(v), sizes.laid.columns))


def forward(g: Tensor, v: Tensor, sizes: Rows, w: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """w = g * v / ||v||, laid out as v, and ||v|| with the shape of g, in float64 for such weights, else in float32.

    None where a row is not an ordinary one: then nothing in `w`, if it was given, is of use.

    >>> g, v = torch.tensor([[10.0]], dtype=torch.float64), torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    >>> sizes = rows_of(g, v, (0,), 1, "linear") if fused.start() else None
    >>> found = None if sizes is None else forward(g, v, sizes)
    >>> found and [x.tolist() for x in found]
    [[[6.0, 8.0]], [[5.0]]]
    """
    if g.dtype is torch.float16 and bool(g.detach().abs().amax() >= _LARGE_HALF):
        return None
    size, rows = sizes_of(g, sizes), _in_rows(v.detach(), sizes)
    made = torch.empty_like(rows, requires_grad=False) if w is None or sizes.across else w
    norms = torch.empty_like(g, dtype=_type_of_rows(v), requires_grad=False)
    call, rest = forward_call(g, v, sizes)
    if not call(rows.data_ptr(), size.data_ptr(), made.data_ptr(), norms.data_ptr(), *rest):
        return None
    if sizes.across and w is not None:
        _by_rows(w, sizes.across).copy_(made)
        return w, norms
    return _as_stored(made, v, sizes), norms


def backward(up: Tensor, g: Tensor, v: Tensor, norms: Tensor, sizes: Rows) -> tuple[Tensor, Tensor]:
    """dL/dg and dL/dv from dL/dw, a plain tensor of the type of v, and ||v|| as `forward` gave it."""
    up = up.resolve_neg()
    up = up if fused.lies_as(up, v) else torch.empty_like(v, requires_grad=False).copy_(up)
    up, rows, size = _in_rows(up, sizes), _in_rows(v.detach(), sizes), sizes_for_gradients(g, sizes)
    grad_g = torch.empty_like(g, dtype=_type_of_rows(v), requires_grad=False)
    grad_v = torch.empty_like(rows, requires_grad=False)
    call, rest = backward_call(v, sizes)
    call(*(x.data_ptr() for x in (up, rows, size, norms, grad_g, grad_v)), *rest)
    if sizes.log:
        grad_g.mul_(size)
    return grad_g.to(g.dtype), _as_stored(grad_v, v, sizes)


def _call(name: str, v: Tensor, sizes: Rows, rest: tuple[int, ...]) -> tuple[Callable[..., bool], tuple[int, ...]]:
    return fused.call_of(_kernels(), name, v.numel(), sizes.laid.rows, rest)


def _by_rows(x: Tensor, sizes: fused.Sizes) -> Tensor:
    """A weight whose rows are axis 1, seen as (groups, rows of each, inputs, columns)."""
    inputs, outputs, columns = sizes.told
    return x.view(sizes.groups, inputs, outputs, columns).transpose(1, 2)


def _in_rows(x: Tensor, sizes: Rows) -> Tensor:
    """With row after row in memory."""
    return x if sizes.across is None else _by_rows(x, sizes.across).contiguous()


def _as_stored(rows: Tensor, v: Tensor, sizes: Rows) -> Tensor:
    """What `_in_rows` has laid out, as v is once more."""
    return rows if sizes.across is None else rows.transpose(1, 2).contiguous().view(v.shape)


def _type_of_rows(v: Tensor) -> torch.dtype:
    return torch.float64 if v.dtype is torch.float64 else torch.float32


def _kind(v: Tensor) -> int:
    kernels = _kernels()
    return kernels.FLOAT16 if v.dtype is torch.float16 else kernels.BFLOAT16  # type: ignore[no-any-return]


@cache
def _kernels() -> Any:
    from wnsurgery import typed_kernels

    return typed_kernels
