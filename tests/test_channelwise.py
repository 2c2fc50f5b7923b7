"""Sums, scale and shift per channel by compiled kernels: exact sums, and bits that no number of threads decides."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wnsurgery import fused
from wnsurgery.channelwise import channels_in, cube_of, is_taken, lengths_of, scale_and_shift, standardise, sums_of
from wnsurgery.moments import clearness
from wnsurgery.outputs import scaled

pytestmark = pytest.mark.skipif(not fused.start(), reason="numba is not installed")

CUBES = [
    *((1, 1, 1), (3, 1, 1), (1, 5, 1), (7, 3, 1), (500, 513, 1), (3, 1025, 1), (40000, 3, 1), (2, 40000, 1)),
    *((1, 3, 2), (5, 4, 3), (2, 600, 17), (300, 2, 128), (9, 5, 129), (3000, 600, 2), (20000, 3, 4)),
    *((1, 8, 8192), (2, 3, 4097), (3, 1, 70000), (16, 64, 1024)),
]


@pytest.fixture
def threads() -> Iterator[None]:
    """As many threads afterwards as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def values_of(cube: tuple[int, int, int]) -> Tensor:
    torch.manual_seed(sum(cube))
    return torch.randn(cube) * 3 + torch.linspace(-50, 50, cube[1])[:, None]


@pytest.mark.parametrize("cube", CUBES, ids=str)
def test_sums_are_those_of_float64(cube: tuple[int, int, int]) -> None:
    """Mean and squared distances of every channel, whatever the sizes of the tiles leave over."""
    x = values_of(cube)
    wide = x.double()
    mean = wide.mean((0, 2))
    m2 = (wide - mean[:, None]).square().sum((0, 2))
    found = sums_of(x, 1e6)
    assert np.allclose(found.mean, mean, rtol=1e-12, atol=1e-12)
    assert np.allclose(found.m2, m2, rtol=1e-11, atol=0)
    assert found.clear == (cube[0] * cube[2] > 1)


@pytest.mark.parametrize("cube", CUBES, ids=str)
def test_scale_and_shift(cube: tuple[int, int, int]) -> None:
    """In place, rounded once or twice, and counted as a write."""
    x = values_of(cube)
    factors = np.random.default_rng(0).standard_normal((2, cube[1])).astype(np.float32)
    factor, shift = (torch.from_numpy(row)[:, None] for row in factors)
    right = x.double() * factor + shift
    bound = 2.0**-23 * ((x * factor).abs() + shift.abs() + 1e-30)
    version = x._version
    scale_and_shift(x, factors)
    assert bool(((x - right).abs() <= bound).all())
    assert x._version == version + 1


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("cube", [c for c in CUBES if np.prod(c) > 2**16], ids=str)
def test_threads_decide_no_bit(cube: tuple[int, int, int]) -> None:
    """One, two, three and seven threads give the same sums and the same values."""
    seen: set[Any] = set()
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        x = values_of(cube)
        mean, m2, clear = sums_of(x, 1e6)
        scale_and_shift(x, np.stack([m2, mean]).astype(np.float32))
        outer, channels, inner = cube
        every = [fused.Sizes(0, outer, channels * inner), fused.Sizes(outer, channels, inner)]
        lengths = [lengths_of([(x, sizes)]).tobytes() for sizes in every]
        seen.add((mean.tobytes(), m2.tobytes(), clear, x.numpy().tobytes(), *lengths))
    assert len(seen) == 1


def test_a_deviation_that_is_not_clear_shows() -> None:
    """Channels that hardly vary beside their mean, and values that are not finite."""
    x = torch.randn(64, 3, 1)
    assert sums_of(x, clearness(64)).clear
    for bad in (1e4, torch.inf, torch.nan):
        y = x.clone()
        y[:, 1] *= 1e-4
        y[:, 1] += bad
        assert not sums_of(y, clearness(64)).clear
    y = x.clone()
    y[63, 2] = torch.nan
    assert not sums_of(y, clearness(64)).clear


@pytest.mark.parametrize("bias", ["settable", "given", "none"])
@pytest.mark.parametrize("cube", [(300, 7, 1), (2, 5, 90), (1, 1, 40000)], ids=str)
def test_standardise(cube: tuple[int, int, int], bias: str) -> None:
    """Values, g and bias become what their definition says, for rows of unit length."""
    x, channels = values_of(cube), cube[1]
    before, lengths = x.double(), np.linspace(0.5, 3.0, channels)
    g = nn.Parameter(torch.full((channels, 1), 7.0))
    b = None if bias == "none" else nn.Parameter(torch.full((channels,), 8.0))
    shifts = torch.linspace(-1, 1, channels) if bias == "given" else None
    versions = g._version, x._version
    with torch.no_grad():
        found = standardise(x, 1e6, lengths, 0.5, g, b, shifts)
    unit = before / torch.from_numpy(lengths)[:, None]
    mean, std = unit.mean((0, 2)), unit.std((0, 2), correction=0)
    shift = {"settable": -mean * 0.5 / std, "given": shifts, "none": torch.zeros(channels)}[bias]
    assert shift is not None
    for row, right in zip(found, (mean, std, 0.5 / std, shift), strict=True):
        assert np.allclose(row, right, rtol=1e-9)
    right = unit * (0.5 / std)[:, None] + shift[:, None]
    assert torch.allclose(x.double(), right, rtol=1e-5, atol=2e-5)
    assert torch.allclose(g.detach().double().flatten(), 0.5 / std, rtol=1e-6)
    assert b is None or torch.allclose(b.detach().double(), shift.double(), rtol=1e-6)
    assert g._version > versions[0]
    assert x._version > versions[1]


def test_nothing_is_done_where_a_channel_does_not_vary() -> None:
    """Who asked is told, and has everything as it was."""
    x, g, b = torch.ones(5, 2, 1), torch.full((2,), 7.0), torch.full((2,), 8.0)
    assert standardise(x, 1e6, np.ones(2), 1.0, g, b, None) is None
    assert [set(t.flatten().tolist()) for t in (x, g, b)] == [{1.0}, {7.0}, {8.0}]


def test_lengths_of_rows() -> None:
    """Of one weight, and of many at one go."""
    rows = [torch.randn(5, 3), torch.randn(1, 70000), torch.randn(300, 4, 3, 3), nn.Parameter(torch.randn(2, 1))]
    columns = [torch.randn(3, 5), torch.randn(600, 8, 30), torch.randn(2, 7, 3, 2), torch.randn(1, 1)]
    groups = [torch.randn(6, 2, 3), torch.randn(300, 40, 9)]
    weights = [(v, fused.Sizes(0, len(v), v[0].numel())) for v in rows]
    weights += [(v, fused.Sizes(len(v), v.shape[1], v[0, 0].numel())) for v in columns]
    weights += [(v, fused.Sizes(len(v) // 3, 3 * v.shape[1], v[0, 0].numel(), groups=3)) for v in groups]
    together = np.split(lengths_of(weights), np.cumsum([sizes.rows for _, sizes in weights])[:-1])
    for (v, sizes), lengths in zip(weights, together, strict=True):
        wide = v.detach().double()
        in_groups = wide.reshape(sizes.groups, -1, *wide.shape[1:])
        right = (in_groups.transpose(1, 2).flatten(0, 1) if sizes.inputs else wide).flatten(1).norm(dim=1)
        assert np.allclose(lengths, right, rtol=1e-14)
        assert lengths_of([(v, sizes)]).tobytes() == lengths.tobytes()


def test_what_is_taken() -> None:
    """Plain float32 in the CPU's memory, all in a row."""
    x = torch.randn(4, 6)
    assert is_taken(x)
    assert is_taken(nn.Parameter(x))
    for other in (x.double(), x.half(), x.T, x[:, ::2], x.to("meta"), x[:0], torch._neg_view(x)):
        assert not is_taken(other)


def test_views_of_the_channels() -> None:
    """Channels first, in the middle, last in memory or last by name: a view of the same memory."""
    x = torch.randn(2, 3, 4, 5)
    for values, axis in ((x, 1), (x, 0), (x, 3), (x.to(memory_format=torch.channels_last), 1), (x.view(2, 3, 20), -1)):
        cube = cube_of(values, axis % values.ndim)
        assert cube.shape[1] == values.shape[axis]
        assert cube.data_ptr() == values.data_ptr()
        assert cube.numel() == values.numel()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_a_fork() -> None:
    """A process forked after torch's threads have run computes, too."""
    x = values_of((16, 64, 1024))
    mean = sums_of(x, 1e6).mean.tobytes()
    child = os.fork()
    if not child:
        os._exit(0 if sums_of(x, 1e6).mean.tobytes() == mean else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_only_views_are_written_to() -> None:
    """Where the channels are not in one place of memory's order, there is nothing to write to."""
    x = torch.randn(2, 3, 4, 5)
    last = x.to(memory_format=torch.channels_last)
    for values, axis, found in ((x, 1, True), (x, -1, True), (last, 1, True), (last, -1, False), (last, 0, False)):
        cube = channels_in(values, axis)
        assert (cube is not None) == found
        if cube is not None:
            version = values._version
            scale_and_shift(cube, np.full((2, values.shape[axis]), 2.0, np.float32))
            assert values._version == version + 1
    right = last.double() * torch.arange(5) + 1
    assert scaled(last, -1, np.arange(5.0), np.ones(5), in_place=True) is last
    assert torch.allclose(last.double(), right, rtol=1e-6)
