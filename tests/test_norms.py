"""||v|| by every route: the right value for any shape, reduced axes, type and memory layout."""

from __future__ import annotations

import itertools

import pytest
import torch

from wnsurgery.norms import norm

SHAPES = [
    (200, 200),
    (40_000,),
    (7,),
    (200, 200, 3),
    (4, 50, 200, 3),
    (1, 40_000),
    (3, 20_000),
    (20_000, 1),
    (5, 3, 2),
    (9_000, 2, 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_of_every_choice_of_axes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Within 2^-40 of a plain float64 computation, in the shape with reduced axes of size 1; v itself untouched."""
    v = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    for count in range(1, len(shape) + 1):
        for dims in itertools.combinations(range(len(shape)), count):
            expected = v.double().square().sum(dims, keepdim=True).sqrt()
            found = norm(v, dims, blocked=True)
            assert found.shape == expected.shape, dims
            assert found.dtype == torch.float64
            assert bool(((found - expected).abs() <= expected * 2.0**-40).all()), dims
            slow = norm(v, dims, blocked=False)
            assert bool(((found - slow).abs() <= expected * 2.0**-40).all()), dims


@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (64, 40, 5, 5)])
def test_norms_of_other_layouts(shape: tuple[int, ...]) -> None:
    """channels_last, transposed and strided weights have the norms of their contiguous copies."""
    v = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=torch.Generator().manual_seed(1))[..., ::2]
    for other in (v.to(memory_format=torch.channels_last), v.transpose(0, 1), wide):
        for dims in ((1, 2, 3), (0, 2, 3), (0, 1, 2, 3), (2, 3)):
            found, expected = norm(other, dims, blocked=True), norm(other.contiguous(), dims, blocked=True)
            assert torch.allclose(found, expected, rtol=2.0**-40, atol=0.0)


def test_values_that_are_not_finite_show() -> None:
    """NaN and infinity are in the norm of their row and of no other."""
    for size in (4, 4_000):
        v = torch.ones(5, size)
        v[1, 2], v[3, 0] = torch.nan, torch.inf
        found = norm(v, (1,), blocked=True).flatten()
        assert bool(found[1].isnan())
        assert bool(found[3].isinf())
        assert found[[0, 2, 4]].tolist() == [size**0.5] * 3
