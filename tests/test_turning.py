"""What changed between two moments: angles and magnitudes against numpy."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import wnsurgery as wn
from wnsurgery.turning import compare_weight_norm


def test_known_rotations_and_moves(tmp_path: Path) -> None:
    """Angles, also tiny ones, relative moves of g and growth of ||v|| are those that were put in."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]))
    wn.apply_weight_norm(model)
    before = copy.deepcopy(model)
    torch.save(before.state_dict(), tmp_path / "before.pt")
    turn = np.deg2rad([0.0, 90.0, 1e-7])
    with torch.no_grad():
        pair = model[0].parametrizations.weight  # type: ignore[union-attr]
        for row, t in enumerate(turn):
            c, s = np.cos(t), np.sin(t)
            pair.original1[row] = 2 * torch.tensor([[c, -s], [s, c]]) @ pair.original1[row]
        pair.original0[0] *= -1
        pair.original0[1] *= 1.5
    for old in (before, tmp_path / "before.pt"):
        found = compare_weight_norm(model, old).weights[0]
        assert found.angle is not None
        assert np.allclose(found.angle, [0, 1e-7, 90], rtol=1e-6, atol=1e-12)
        assert np.allclose(found.moved or (), [-2, 0, 0.5])
        assert np.allclose(found.growth or (), 2)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_a_plain_reference_counts_as_its_weight(dim: int | None) -> None:
    """Against plain weights a pair is compared through the weight it stands for, negative g included."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv1d(3, 4, 2))
    model = wn.apply_weight_norm(copy.deepcopy(plain), dim=dim)
    with torch.no_grad():
        pair = model[0].parametrizations.weight  # type: ignore[union-attr,index]
        pair.original0.neg_()
        pair.original1.neg_()
    found = compare_weight_norm(model, plain).weights[0]
    assert np.allclose(found.angle or (), 0, atol=1e-6)
    assert np.allclose(found.moved or (), 0, atol=1e-6)


def test_nothing_in_common_is_an_error() -> None:
    """Two nets that share no weight cannot be compared; one that lacks some says which."""
    a = wn.apply_weight_norm(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(wn.InputError):
        compare_weight_norm(a, wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 2))))
    report = compare_weight_norm(a, wn.apply_weight_norm(nn.Sequential(nn.Linear(2, 2))))
    assert report.unmatched == (("1.weight", "only after"),)
