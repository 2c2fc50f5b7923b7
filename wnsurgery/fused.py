"""Weight norm of a weight in the CPU's memory in one pass: which weights the compiled kernels take, and the calls.

The kernels come with numba, which takes up to a second to start, once in a process: so they are started for training,
where a weight is computed again at every step, and for initialisation from data, which comes before it; they are used
for all else from then on. Where numba is missing, `started()` stays false and everything is done by torch's and numpy's
operations.

The number of threads is torch's; it decides no bit, since each row is summed by one of them.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wnsurgery.row_threads import is_for_one, on_all_rows

__all__ = [
    "Sizes",
    "backward",
    "backward_call",
    "call_of",
    "far",
    "forward",
    "forward_call",
    "lies_as",
    "lies_in_rows",
    "many_backward",
    "many_forward",
    "plan",
    "sizes_of_pair",
    "start",
    "started",
    "table_of",
]

_log = logging.getLogger("wnsurgery")
_FAR = 1 << 21  # elements of a gradient that is written past the cache, in a piece of its own
_LAST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_CACHES = 1 << 24, 1 << 26  # bytes it is taken to have at least, and at most: it may be others', too


class Sizes(NamedTuple):
    """A weight as the kernels see it: `inputs` is 0 where each row lies in one piece of `columns` elements; else so
    many pieces of `columns` elements, one in each of the `inputs`, make a row. `groups` of rows have inputs of their
    own."""

    inputs: int
    rows: int
    columns: int
    groups: int = 1

    @property
    def told(self) -> tuple[int, int, int]:
        """What the kernels that read along the inputs are told: `inputs` and rows of each group, and `columns`."""
        return self.inputs, self.rows // self.groups, self.columns


@cache
def far() -> int:
    """Elements that are out of the cache by the time somebody reads them again: half of the last level."""
    try:
        size = int(_LAST_CACHE.read_text(encoding="ascii").strip().removesuffix("K")) << 10
    except (OSError, ValueError):  # not Linux, or no third level
        size = 0
    least, most = _CACHES
    return min(max(size, least), most) // 2 // 4


class _Kernels:
    """numba's module, once somebody has asked for it."""

    module: Any = None
    asked = False


def start() -> bool:
    """Load the kernels where numba is installed; whether they are there."""
    if not _Kernels.asked:
        _Kernels.asked = True
        try:
            from wnsurgery import fused_kernels
        except ImportError as error:
            _log.info("numba is not of use here (%s): training takes a little longer", error)
        else:
            _Kernels.module = fused_kernels
    return _Kernels.module is not None


def started() -> bool:
    """Whether the kernels are loaded."""
    return _Kernels.module is not None


def plan(g: Tensor, v: Tensor, kept: tuple[int, ...], groups: int, magnitude: str) -> Sizes | None:
    """How the kernels see this pair; None where they are not loaded or do not take it.

    They take float32 that `lies_in_rows` in the CPU's memory, with a linear g and axis 0, axis 1 or no axis kept.
    """
    if _Kernels.module is None or magnitude != "linear" or v.dtype is not torch.float32 or g.dtype is not torch.float32:
        return None
    return sizes_of_pair(g, v, kept, groups)


def sizes_of_pair(g: Tensor, v: Tensor, kept: tuple[int, ...], groups: int) -> Sizes | None:
    """The sizes of a pair, of whatever types, that lies in the CPU's memory as kernels read it; None of others.

    >>> sizes_of_pair(torch.ones(2, 1), torch.ones(2, 3), (0,), 1)
    Sizes(inputs=0, rows=2, columns=3, groups=1)
    """
    if not (v.is_cpu and g.is_cpu and g.is_contiguous() and lies_in_rows(v, kept)) or v.is_neg() or g.is_neg():
        return None
    return _sizes(v.shape, g.shape, kept, groups)


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def lies_in_rows(v: Tensor, kept: tuple[int, ...]) -> bool:
    """Whether a weight's elements follow one another in memory; those of a row on axis 0 also with its channels last.

    >>> lies_in_rows(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last), (0,))
    True
    """
    if v.is_contiguous():
        return True
    order = _CHANNELS_LAST.get(v.ndim) if kept == (0,) else None
    return order is not None and v.is_contiguous(memory_format=order)


def lies_as(x: Tensor, v: Tensor) -> bool:
    """Whether the elements of a tensor lie in the same order as those of v, which has its shape and `lies_in_rows`."""
    return x.stride() == v.stride() or (x.is_contiguous() and v.is_contiguous())


@lru_cache(maxsize=4096)
def _sizes(shape: torch.Size, g_shape: torch.Size, kept: tuple[int, ...], groups: int) -> Sizes | None:
    elements = math.prod(shape)
    if not elements or kept not in ((0,), (1,), ()) or len(shape) <= (kept[0] if kept else -1):
        return None
    if groups != 1:
        if kept != (1,) or shape[0] % groups or tuple(g_shape) != (groups, shape[1], *[1] * len(shape[2:])):
            return None
        inputs, rows, columns = shape[0] // groups, groups * shape[1], math.prod(shape[2:])
        return Sizes(0, rows, columns) if inputs == 1 else Sizes(inputs, rows, columns, groups)
    rows = shape[kept[0]] if kept else 1
    fits = tuple(g_shape) in (tuple(s if d in kept else 1 for d, s in enumerate(shape)), () if rows == 1 else None)
    if not fits:
        return None
    return Sizes(shape[0], rows, math.prod(shape[2:])) if kept == (1,) else Sizes(0, rows, elements // rows)


def forward_call(sizes: Sizes, elements: int) -> tuple[Callable[..., bool], tuple[int, ...]]:
    """What `forward` calls for a weight of so many elements: a function of the addresses of v, g, w and ||v||, which
    says whether each row is an ordinary one, and the arguments that come after these."""
    past = int(elements >= far())
    across = "columns_forward", (*sizes.told, past)
    name, rest = across if sizes.inputs else ("rows_forward", (sizes.columns, past))
    return call_of(_Kernels.module, name, elements, sizes.rows, rest)


def backward_call(sizes: Sizes, elements: int) -> tuple[Callable[..., bool], tuple[int, ...]]:
    """The same of `backward`: of the addresses of dL/dw, v, g, ||v||, dL/dg and dL/dv."""
    past = int(elements >= _FAR)
    name, rest = ("columns_backward", sizes.told) if sizes.inputs else ("rows_backward", (sizes.columns, past))
    return call_of(_Kernels.module, name, elements, sizes.rows, rest)


def call_of(
    kernels: Any, name: str, elements: int, rows: int, rest: tuple[int, ...]
) -> tuple[Callable[..., bool], tuple[int, ...]]:
    """What runs a kernel on all rows of a weight, in threads that are worth it, and the arguments that come last."""
    if is_for_one(elements):
        return getattr(kernels, name), (*rest, 0, rows)
    return partial(on_all_rows, kernels, elements, rows, name), rest


def forward(g: Tensor, v: Tensor, sizes: Sizes, w: Tensor) -> Tensor | None:
    """Write g * v / ||v|| into `w`, laid out as v; returns ||v|| with the shape of g.

    None where a row is not an ordinary one (see `norms.ordinary_factors`): then nothing in `w` is of use.
    """
    norms = torch.empty_like(g)
    call, rest = forward_call(sizes, v.numel())
    return norms if call(v.data_ptr(), g.data_ptr(), w.data_ptr(), norms.data_ptr(), *rest) else None


def backward(up: Tensor, g: Tensor, v: Tensor, norms: Tensor, sizes: Sizes, grad_v: Tensor) -> Tensor:
    """Write dL/dv into `grad_v`, which may be dL/dw itself; returns dL/dg. All laid out as v."""
    grad_g = torch.empty_like(g)
    call, rest = backward_call(sizes, v.numel())
    places = (up.data_ptr(), v.data_ptr(), g.data_ptr(), norms.data_ptr(), grad_g.data_ptr(), grad_v.data_ptr())
    call(*places, *rest)
    return grad_g


def table_of(pairs: Sequence[tuple[Tensor, Tensor]]) -> array[int]:
    """What the kernels need to know of pairs with kept axis 0 or none that they take, a line for each: the addresses of
    v and g, the place of the norms in one block for all, rows and columns."""
    table, rows = array("q"), 0
    for g, v in pairs:
        table.extend((v.data_ptr(), g.data_ptr(), 4 * rows, g.numel(), v.numel() // g.numel()))
        rows += g.numel()
    return table


def many_forward(table: array[int], weights: Iterable[int], norms: Tensor, elements: int) -> array[int]:
    """`forward` of the weights of a table, of so many elements, to these addresses, with ||v|| of all in one block.

    Returns the addresses, 0 for a weight with a row that is not an ordinary one.
    """
    written = array("q", weights)
    places = table.buffer_info()[0], written.buffer_info()[0], norms.data_ptr()
    on_all_rows(_Kernels.module, elements, len(written), "many_forward", *places)
    return written


def many_backward(table: array[int], places: Iterable[int], elements: int) -> None:
    """`backward` of the weights of a table, of so many elements: the addresses of dL/dw of each, 0 for none, then those
    of the norms of each, of dL/dg and of dL/dv."""
    listed = array("q", places)
    count = len(listed) // 4
    at = table.buffer_info()[0], listed.buffer_info()[0]
    on_all_rows(_Kernels.module, elements, count, "many_backward", *at, count)
