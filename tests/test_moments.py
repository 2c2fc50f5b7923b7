"""Moments per channel: those of float64 arithmetic, on whatever data and layout, however they are cut."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wnsurgery.moments import Moments

SHAPES = {
    "rows": ((300, 7), 1),
    "many rows": ((40000, 7), -1),
    "long": ((1, 5, 9000), 1),
    "longer than a line": ((2, 3, 8200), 1),
    "prime": ((2, 3, 8209), 1),
    "pictures": ((9, 4, 12, 11), 1),
    "short pieces": ((50, 6, 5), 1),
    "channels first": ((6, 700), 0),
    "larger than a block": ((7, 3, 40000), 1),
    "wide": ((3, 70000), 1),
}
DATA: dict[str, tuple[float, float]] = {
    "ordinary": (0.3, 1.0),
    "far from zero": (3.0, 0.5),
    "large mean, small deviation": (1e4, 1e-2),
    "tiny": (0.0, 1e-30),
    "huge": (1e29, 1e30),
}


@pytest.fixture(params=[True, False], ids=["kernels", "no kernels"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every test once with the compiled kernels and once as if numba were not installed."""
    if not request.param:
        monkeypatch.setattr("wnsurgery.moments.is_taken", lambda _: False)
    return bool(request.param)


def by_hand(values: Tensor, axis: int) -> list[tuple[float, float, float]]:
    """Mean, deviation and largest absolute value of each channel, by sums that are exact."""
    rows = np.moveaxis(values.double().numpy(), axis, 0).reshape(values.shape[axis], -1)
    found = []
    for row in rows.tolist():
        mean = math.fsum(row) / len(row)
        found.append((mean, math.sqrt(math.fsum((x - mean) ** 2 for x in row) / len(row)), max(map(abs, row))))
    return found


def assert_close(moments: Moments, values: Tensor, axis: int, tolerance: float) -> None:
    mean, std, peak = np.array(by_hand(values, axis % values.ndim)).T
    assert (np.abs(moments.mean - mean) <= tolerance * std).all()
    assert (np.abs(moments.std - std) <= tolerance * std).all()
    assert moments.peak is None or (moments.peak >= peak * (1 - 1e-12)).all()


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_those_of_exact_sums(shape: str, data: str) -> None:
    """In every layout, for every mean and scale, to the accuracy of a float32."""
    sizes, axis = SHAPES[shape]
    mean, std = DATA[data]
    torch.manual_seed(0)
    values = torch.randn(sizes) * std + mean
    assert_close(Moments.of(values, axis), values, axis, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_summed_in_float64(dtype: torch.dtype) -> None:
    """Half precision is widened before anything is summed; float64 keeps its digits."""
    torch.manual_seed(0)
    for sizes, axis in ((300, 7), 1), ((2, 5, 400), 1):
        values = (torch.randn(sizes, dtype=torch.float64) * 0.1 + 20).to(dtype)
        assert_close(Moments.of(values, axis), values, axis, 1e-9)


def test_layouts_in_memory_do_not_matter() -> None:
    """Channels last, transposed and sliced tensors give what their contiguous copies give."""
    torch.manual_seed(0)
    whole = torch.randn(6, 8, 10, 12)
    for values in (whole.to(memory_format=torch.channels_last), whole.transpose(2, 3), whole[:, :, 1:, ::2]):
        assert_close(Moments.of(values, 1), values.contiguous(), 1, 1e-6)


class Elsewhere(Tensor):
    """Stands for a tensor that numpy cannot look into."""


def test_tensors_that_numpy_cannot_look_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's operations give the same moments, in blocks and as one."""
    torch.manual_seed(0)
    values = torch.randn(50, 6, 7) * 1e-2 + 1e4
    for block in (2**24, 100):
        monkeypatch.setattr("wnsurgery.moments._AWAY", block)
        found = Moments.of(values.as_subclass(Elsewhere), 1)
        assert_close(found, values, 1, 1e-6)
        assert found.peak.tolist() == values.abs().amax((0, 2)).tolist()


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_moments_do_not_depend_on_how_the_values_are_cut(mean: float) -> None:
    """Pieces of any sizes, one position and none included, merge to the moments of the whole."""
    torch.manual_seed(0)
    values = torch.cat([torch.zeros(100, 3), torch.randn(900, 3)]) * 1e-2 + mean
    for sizes in ([1000], [1, 999], [500, 0, 500], [100, 7, 893]):
        found = Moments.merged([Moments.of(part, 1) for part in values.split(sizes)])
        assert found.count == 1000
        assert_close(found, values, 1, 1e-6)


def test_channels_that_do_not_vary_are_told_from_those_that_do() -> None:
    """By more than rounding of the largest value: equal values do not, a deviation of a hundred roundings does."""
    torch.manual_seed(0)
    step = 2.0**-23
    columns = [torch.full((400,), 0.1), torch.zeros(400), 1 + step * torch.randint(0, 2, (400,))]
    columns += [1 + 100 * step * torch.randint(0, 2, (400,)), torch.randn(400)]
    values = torch.stack(columns, 1)
    for laid, axis in ((values, 1), (values.T.contiguous(), 0)):
        assert Moments.of(laid, axis).constant.tolist() == [True, True, True, False, False]
    assert Moments.of(torch.randn(400, 3), 1).constant is None
    assert Moments.of(torch.randn(1, 3), 1).constant.all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_channels_of_all_kinds_side_by_side(axis: int) -> None:
    """Those far from zero in their deviations, and one that does not vary, blur none of the rest."""
    torch.manual_seed(0)
    values = torch.randn(400, 40)
    values[:, 7] = 1e4 + 1e-2 * torch.randn(400)
    values[:, 11] = 3.0
    values[:, 13] = -20 + torch.randn(400)
    laid = {0: values.T, 1: values, 2: values.reshape(20, 20, 40)}[axis].contiguous()
    found = Moments.of(laid, axis)
    assert_close(found, laid, axis, 1e-6)
    assert found.constant.tolist() == [i == 11 for i in range(40)]
    assert_close(Moments.merged([found, found]), torch.cat([laid, laid], (axis + 1) % 2), axis, 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sizes", [(400, 3), (2, 3, 100)])
def test_values_that_are_not_finite_show(sizes: Any, bad: float) -> None:
    """One such value anywhere is seen, without a warning."""
    values = torch.randn(sizes)
    assert Moments.of(values, 1).finite
    values.view(-1)[-1] = bad
    assert not Moments.of(values, 1).finite
