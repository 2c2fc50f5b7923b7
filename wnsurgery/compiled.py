"""w = g * v / ||v|| for compilers: the bits of eager mode from few plain operations, with no look at the values.

What a compiler takes for a net grows with the number of operations, and every weight brings these. For weights of 16
and 32 bits, whose norms float64 holds whatever they are; float64 weights need more care than fits here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wnsurgery.norms import LARGE_FLOAT32, SLACK, is_stored_norm, wide_dtype

__all__ = ["compose_compiled", "is_for_compiler"]

_FRACTION, _EXPONENT = 52, 0x7FF  # bits of a float64: of the fraction, and of the exponent as it is stored
_DROPPED = _FRACTION - 23  # bits of the fraction that float32 has no room for


def is_for_compiler(v: Tensor) -> bool:
    """Whether it is a compiler that looks on, not an exporter, whose formats know few operations on bits."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    return v.dtype != torch.float64 == wide_dtype(v)


def compose_compiled(g: Tensor, v: Tensor, dims: Sequence[int], magnitude: str) -> Tensor:
    """The weight from one magnitude per row, shaped to broadcast against v, with norms over `dims`.

    Rows of zeros get norms without end, and with them weights and gradients of zero. Factors beyond 2^+-120 may differ
    from eager mode's in their last bit; w stays within 1.5 units in the last place.

    >>> compose_compiled(torch.tensor([[10.0]]), torch.tensor([[3.0, 4.0]]), (1,), "linear")
    tensor([[6., 8.]])
    """
    x = v.double()
    norms = torch.linalg.vector_norm(x, 2, tuple(dims), keepdim=True) if dims else x.abs()
    norms = norms.masked_fill(norms == 0, torch.inf)
    size = g.double().exp() if magnitude == "log" else g.double()
    rough = size / norms  # x + (factor - x) is the factor to the bit, for x agrees with it to many digits
    factor = rough + (_factor(g.detach(), rough.detach(), norms.detach(), magnitude) - rough).detach()
    return (x * factor).float().to(v.dtype)


def _factor(g: Tensor, quotient: Tensor, norms: Tensor, magnitude: str) -> Tensor:
    """The quotient of magnitude and norm rounded to 24 bits; where g is the stored value of 2^k norms, 2^k."""
    bits = quotient.view(torch.int64)
    half = (1 << (_DROPPED - 1)) - 1 + ((bits >> _DROPPED) & 1)  # to the nearest, ties to even
    rounded = (bits + half) & -(1 << _DROPPED)
    nearest = (rounded + (1 << (_FRACTION - 1))) & (_EXPONENT << _FRACTION)
    # the largest g are not rounded up, which would take w to infinity; they may stand for a norm beyond their type
    large = (quotient * norms).abs() >= LARGE_FLOAT32  # not in rows of zeros, where this is NaN
    power = torch.where(large, 1.0, nearest.view(torch.float64))
    stored = is_stored_norm(g, norms * power, SLACK, magnitude)
    return torch.where(stored, power, torch.where(large, quotient, rounded.view(torch.float64)))
