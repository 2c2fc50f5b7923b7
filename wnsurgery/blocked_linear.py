"""A linear layer whose large weight is made, used and differentiated some rows at a time, in the cache.

For a few inputs at a time, writing w to memory and reading it back, and the same for dL/dw, costs more than the matrix
products do. Here v alone is read, once in each direction: some rows of w are made, multiplied with the inputs, and
overwritten by the next; so are rows of dL/dw. dL/dx = (dL/dy * g / ||v||) v needs no w.

The output has the bits of the product in one piece. Which terms a matrix product adds up first is a matter of sizes,
not of values, so every size is tried out once, on random numbers, and done in one piece where a bit differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from wnsurgery import fused

__all__ = ["backward", "forward", "rows_for_gradients", "rows_for_output", "scale"]

_FEW = 256  # inputs up to which this way takes less time
_FEWEST = 0.5  # inputs to a row of a block up to which it is worth adding up dL/dx block by block
_BLOCK = 5 << 17  # elements of w to a block: enough for what its calls cost, and still near when it is read
_GRADIENTS = 1 << 19  # the same of dL/dw
_SLIM = 1 << 15  # the same where that is a sum of few products, which wide rows take longer for
_SLIM_INPUTS, _SLIM_COLUMNS = range(2, 15), 1024
_LINE = 64  # bytes; blocks and inputs that begin at a multiple are multiplied in the same order
_NUMBERS = 65537  # random ones; a prime, so that no two rows of a weight are alike


def rows_for_output(x: Tensor, v: Tensor, bias: Tensor | None) -> int | None:
    """How many rows of w to make at a time for x w^T + bias; None where it is to be taken in one piece.

    >>> rows_for_output(torch.ones(300, 1024), torch.ones(1024, 1024), None) is None
    True
    """
    if x.numel() > _FEW * v.shape[1] or torch.get_num_threads() > 1:
        return None
    if v.numel() <= _BLOCK:
        return len(v)
    if x.ndim == 1 or not x.is_contiguous() or x.data_ptr() % _LINE:
        return None
    precision: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return _tried_out(x.shape, v.shape, bias is not None, x.requires_grad, precision)


def rows_for_gradients(x: Tensor, v: Tensor) -> int | None:
    """How many rows of dL/dw to make at a time for an input that is a matrix; None where it is to be made whole."""
    if v.numel() <= _GRADIENTS or len(x) > _FEW or torch.get_num_threads() > 1:
        return None
    return _rows(v.shape, _SLIM if len(x) in _SLIM_INPUTS and v.shape[1] >= _SLIM_COLUMNS else _GRADIENTS)


def forward(x: Tensor, g: Tensor, v: Tensor, bias: Tensor | None, rows: int) -> tuple[Tensor, Tensor] | None:
    """x w^T + bias and ||v||, made so many rows of w at a time; None where a row is not an ordinary one.

    For pairs that the compiled kernels take, with axis 0 kept; `rows` is from `rows_for_output`.
    """
    norms, room = torch.empty_like(g), v.new_empty(rows, v.shape[1])
    write = fused.forward_of_rows(g, v, norms, room)
    if rows == len(v):
        # by this flag matmul chooses its kernel, and so the last bit
        return (F.linear(x, room.requires_grad_(), bias), norms) if write(0, rows) else None
    w = room.t()
    y = _product(x, lambda at, count: w.narrow(1, 0, count) if write(at, count) else None, bias, len(v), rows)
    return None if y is None else (y, norms)


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
    outputs, up = len(v), grad.t()
    grad_g, room = torch.empty_like(g), v.new_empty(rows, v.shape[1])
    is_added = v.is_leaf and v.grad is not None  # at once, to the one held
    write = fused.backward_of_rows(room, g, v, norms, grad_g, grad_v, past_cache=is_far and not is_added)
    by_blocks = wants_x and rows < outputs and len(x) <= _FEWEST * rows
    scaled = scale(grad, g, norms) if wants_x else grad
    grad_x = torch.empty_like(x) if by_blocks else torch.mm(scaled, v) if wants_x else None
    for at in range(0, outputs, rows):
        count = min(rows, outputs - at)
        if grad_x is not None and by_blocks:
            some, part = scaled.narrow(1, at, count), v.narrow(0, at, count)
            torch.addmm(grad_x, some, part, beta=1 if at else 0, out=grad_x)
        torch.mm(up.narrow(0, at, count), x, out=room.narrow(0, 0, count))
        write(at, count)
    return grad_x, grad_g


def scale(grad: Tensor, g: Tensor, norms: Tensor) -> Tensor:
    """dL/dy * g / ||v||, of which the product with v is dL/dx."""
    return grad * (g / norms).view(-1)


def _product(
    x: Tensor, rows_of_w: Callable[[int, int], Tensor | None], bias: Tensor | None, outputs: int, rows: int
) -> Tensor | None:
    """x w^T + bias from some columns of w^T at a time, `rows_of_w(at, count)`; None as soon as that is None."""
    inputs = x if x.ndim == 2 else x.view(-1, x.shape[-1])
    y = x.new_empty(len(inputs), outputs)
    for at in range(0, outputs, rows):
        count = min(rows, outputs - at)
        w = rows_of_w(at, count)
        if w is None:
            return None
        if bias is None:
            torch.mm(inputs, w, out=y.narrow(1, at, count))
        else:
            torch.addmm(bias.narrow(0, at, count), inputs, w, out=y.narrow(1, at, count))
    return y if x.ndim == 2 else y.view(*x.shape[:-1], outputs)


@lru_cache(maxsize=4096)
def _rows(weight: torch.Size, elements: int) -> int:
    """Rows of a weight to a block of about so many elements, such that blocks of the output begin at multiples of
    `_LINE` bytes."""
    blocks = -(-weight.numel() // elements)
    multiple = _LINE // 4
    return min(weight[0], -(-weight[0] // (blocks * multiple)) * multiple)


@lru_cache(maxsize=4096)
def _tried_out(shape: torch.Size, weight: torch.Size, biased: bool, wanted: bool, _precision: str) -> int | None:
    """Rows to a block for which the output has the bits of the one in one piece; None where it does not."""
    numbers = torch.randn(_NUMBERS, generator=torch.Generator().manual_seed(0), dtype=torch.float32)

    def some(*size: int) -> Tensor:
        count = math.prod(size)
        return numbers.repeat(-(-count // _NUMBERS))[:count].view(size)

    with torch.no_grad():
        x, w, bias, rows = some(*shape), some(*weight), some(weight[0]) if biased else None, _rows(weight, _BLOCK)
        room = w.new_empty(rows, weight[1])
        found = _product(x, lambda at, n: room.narrow(0, 0, n).copy_(w.narrow(0, at, n)).t(), bias, weight[0], rows)
        whole = F.linear(x.requires_grad_(wanted), w.requires_grad_(), bias)
    return rows if found is not None and torch.equal(found, whole) else None
