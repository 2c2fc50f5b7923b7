"""A linear layer whose large weight is made, used and differentiated some rows at a time, in the cache.

Writing w to memory and reading it back, and the same for dL/dw, costs more than the matrix products of a few inputs do,
and something for many. Here v alone is read, once in each direction: a thread makes some rows of w, multiplies them
with the inputs, and overwrites them with its next; so it does with rows of dL/dw. dL/dx = (dL/dy * g / ||v||) v needs
no w.

The output has the bits of the product in one piece. Which terms a matrix product adds up first is a matter of sizes,
not of values, so every size is tried out once, on random numbers, and done in one piece where a bit differs.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wnsurgery import fused
from wnsurgery.row_threads import address_of, on_all_rows, thread_number_at

__all__ = ["backward", "forward", "rows_for_gradients", "rows_for_output", "scale"]

_FEW = 512  # inputs up to which this way takes less time
_FEW_GRADIENTS = 128  # the same for gradients
_BLOCK = 3 << 17  # elements to a block: enough for what a product costs to begin, and still near when they are read
_MOST_ROWS = 256  # to a block
_SLIM = 1 << 16  # elements to a block of dL/dw that is a sum of few products, which wide rows take longer for
_SLIM_INPUTS, _SLIM_COLUMNS = range(2, 15), 1024
_STRETCHES = 4  # of blocks for each thread, so that others can take some from one that is held up
_LINE = 64  # bytes; blocks and inputs that begin at a multiple are multiplied in the same order
_NUMBERS = 65537  # random ones; a prime, so that no two rows of a weight are alike


def rows_for_output(x: Tensor, v: Tensor, bias: Tensor | None) -> int | None:
    """How many rows of w to make at a time for x w^T + bias; None where it is to be taken in one piece.

    >>> rows_for_output(torch.ones(600, 1024), torch.ones(1024, 1024), None) is None
    True
    """
    if x.numel() > _FEW * v.shape[1] or x.ndim == 1 or x.data_ptr() % _LINE or not _is_readable(x):
        return None
    if (bias is not None and not _is_readable(bias)) or not _threads_can_multiply():
        return None
    return _tried_out(x.shape, v.shape, bias is not None, x.requires_grad, torch.get_num_threads())


def rows_for_gradients(x: Tensor, v: Tensor) -> int | None:
    """How many rows of dL/dw to make at a time for an input that is a matrix; None where it is to be made whole."""
    if len(x) > _FEW_GRADIENTS or not _is_readable(x) or not _threads_can_multiply():
        return None
    slim = len(x) in _SLIM_INPUTS and v.shape[1] >= _SLIM_COLUMNS
    return _rows(v.shape, _SLIM if slim else _BLOCK, torch.get_num_threads())


def forward(x: Tensor, g: Tensor, v: Tensor, bias: Tensor | None, rows: int) -> tuple[Tensor, Tensor] | None:
    """x w^T + bias and ||v||, made so many rows of w at a time; None where a row is not an ordinary one.

    For pairs that the compiled kernels take, with axis 0 kept; `rows` is from `rows_for_output`.
    """
    norms, y = torch.empty_like(g), x.new_empty(*x.shape[:-1], len(v))
    tensors = {"x": x, "g": g, "v": v, "norms": norms, "y": y}
    if bias is not None:
        tensors["bias"] = bias
    inputs = x.numel() // v.shape[1]
    fine = _run("linear_forward", tensors, inputs=inputs, rows=rows, stretches=_stretches(v, rows, _STRETCHES))
    return (y, norms) if fine else None


def backward(
    grad: Tensor,
    x: Tensor,
    g: Tensor,
    v: Tensor,
    norms: Tensor,
    rows: int,
    grad_v: Tensor,
    *,
    wants_x: bool,
    is_far: bool,
) -> tuple[Tensor | None, Tensor]:
    """dL/dx, where it is wanted, and dL/dg from `grad` = dL/dy, a matrix as `x`; dL/dv is written to `grad_v`.

    `is_far` says that the net is too large for its gradients to be in the cache when the optimizer comes to them.
    """
    inputs, grad_g = len(x), torch.empty_like(g)
    up = grad.contiguous().resolve_neg()
    tensors = {"x": x, "g": g, "v": v, "norms": norms, "up": up, "grad_g": grad_g, "grad_v": grad_v}
    # each stretch makes a part of dL/dx: together they are to be less than v
    most = min(_STRETCHES, len(v) // (2 * inputs * torch.get_num_threads())) if wants_x else 0
    stretches = _stretches(v, rows, most or _STRETCHES)
    parts = x.new_empty(stretches, *x.shape) if most else None
    scaled = scale(up, g, norms) if wants_x else None
    if parts is not None and scaled is not None:
        tensors |= {"scaled": scaled, "parts": parts}
    is_added = v.is_leaf and v.grad is not None  # at once, to the one held
    _run("linear_backward", tensors, inputs=inputs, rows=rows, stretches=stretches, far=int(is_far and not is_added))
    if scaled is None:
        return None, grad_g
    if parts is None:
        return torch.mm(scaled, v), grad_g
    return parts[0] if stretches == 1 else parts.sum(0), grad_g


def scale(grad: Tensor, g: Tensor, norms: Tensor) -> Tensor:
    """dL/dy * g / ||v||, of which the product with v is dL/dx."""
    return grad * (g / norms).view(-1)


def _is_readable(x: Tensor) -> bool:
    """Whether the kernels can read it where it lies."""
    return x.is_contiguous() and not x.is_neg() and not x._is_zerotensor()


def _run(kernel: str, tensors: Mapping[str, Tensor], **numbers: int) -> bool:
    """Run a kernel of `linear_kernels` on all stretches; whether no row is out of the ordinary."""
    kernels, (outputs, columns) = _kernels(), tensors["v"].shape
    room = tensors["v"].new_empty(torch.get_num_threads(), numbers["rows"], columns)  # whatever the default device
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    given = {**numbers, **places, "outputs": outputs, "columns": columns, "room": room.data_ptr()}
    given |= {"sgemm": _sgemm(), "thread": thread_number_at() or 0}
    table = array("q", [given.get(name, 0) for name in kernels.PLACES])
    at, _ = table.buffer_info()
    return on_all_rows(kernels, outputs * columns, numbers["stretches"], kernel, at)


def _threads_can_multiply() -> bool:
    """Whether threads can multiply each for itself as torch does; not where somebody wants to see torch's operations,
    nor where these are to round more."""
    precision: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    if precision not in {"none", "ieee"} or torch._C._len_torch_dispatch_stack():
        return False
    return bool(_sgemm()) and (torch.get_num_threads() == 1 or thread_number_at() is not None)


@cache
def _sgemm() -> int:
    """The address of MKL's single-precision product in torch's library; 0 where it has none or does not show it."""
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return 0
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        with suppress(OSError, AttributeError):
            return address_of(ctypes.CDLL(str(path)).sgemm_)
    return 0


@cache
def _kernels() -> Any:
    from wnsurgery import linear_kernels

    return linear_kernels


def _stretches(v: Tensor, rows: int, most: int) -> int:
    """Into how many stretches to divide the blocks of rows, with so many at most for each thread."""
    threads = torch.get_num_threads()
    return 1 if threads == 1 else min(most * threads, -(-len(v) // rows))


@lru_cache(maxsize=4096)
def _rows(weight: torch.Size, elements: int, threads: int) -> int | None:
    """Rows of a weight to a block of about so many elements, such that blocks of the output begin at multiples of
    `_LINE` bytes and each thread has as many; None where a quarter of the threads would have none."""
    outputs, columns = weight
    multiple = _LINE // 4
    most = min(_MOST_ROWS, max(1, elements // columns))
    blocks = -(-outputs // (most * threads)) * threads
    rows = -(-outputs // (blocks * multiple)) * multiple
    return min(outputs, rows) if 4 * -(-outputs // rows) >= 3 * threads else None


@lru_cache(maxsize=4096)
def _tried_out(shape: torch.Size, weight: torch.Size, biased: bool, wanted: bool, threads: int) -> int | None:
    """Rows to a block for which the output has the bits of the one in one piece; None where it does not."""
    rows = _rows(weight, _BLOCK, threads)
    if rows is None:
        return None
    numbers = torch.randn(_NUMBERS, generator=torch.Generator().manual_seed(0), dtype=torch.float32)

    def some(*size: int) -> Tensor:
        count = math.prod(size)
        return numbers.repeat(-(-count // _NUMBERS))[:count].view(size)

    with torch.no_grad():
        x, g, v, bias = some(*shape), some(weight[0], 1), some(*weight), some(weight[0]) if biased else None
        sizes = fused.Sizes(0, *weight)
        w = torch.empty_like(v)
        if fused.forward(g, v, sizes, w) is None:
            return None
        found = forward(x, g, v, bias, rows)
        whole = F.linear(x.requires_grad_(wanted), w.requires_grad_(), bias)
    return rows if found is not None and torch.equal(found[0], whole) else None
