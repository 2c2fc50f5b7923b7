"""Sparse, quantized, nested and meta tensors in checkpoints: left alone, compared, or refused in a sentence."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wnsurgery.errors import InputError
from wnsurgery.files import convert_checkpoint, fold_checkpoint, load_object
from wnsurgery.inspection import inspect
from wnsurgery.verification import verify

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about kinds of tensors that are to change


def matrix(last: float = 5.0) -> Tensor:
    return torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, last]])


KINDS: dict[str, Callable[[float], Tensor]] = {
    "coo": lambda x: matrix(x).to_sparse(),
    "csr": lambda x: matrix(x).to_sparse_csr(),
    "csc": lambda x: matrix(x).to_sparse_csc(),
    "bsr": lambda x: torch.cat([matrix(x), matrix(x)]).to_sparse_bsr((2, 3)),
    "quantized": lambda x: torch.quantize_per_tensor(matrix(x), 0.5, 3, torch.qint8),
    "quantized by channel": lambda x: torch.quantize_per_channel(
        matrix(x), torch.tensor([0.5, 0.25]), torch.tensor([0, 1]), 0, torch.quint8
    ),
    "nested": lambda x: torch.nested.nested_tensor([torch.ones(2, 3), torch.full((4, 3), x)]),
}


def saved(path: Path, odd: Tensor) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"fc.weight": torch.eye(2), "odd": odd}, path)
    return path


def plain(odd: Tensor) -> list[Tensor]:
    """The numbers of a tensor, by torch's own conversions."""
    if odd.is_nested:
        return list(odd.unbind())
    return [odd.dequantize() if odd.is_quantized else odd.to_dense()]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tensors_that_are_left_alone(kind: str, tmp_path: Path) -> None:
    """Convert and fold carry the tensor over unchanged, say why, and hash it; a .safetensors file cannot hold it."""
    odd = KINDS[kind](5.0)
    source = saved(tmp_path / "a.pt", odd)
    report = convert_checkpoint(source, tmp_path / "b.pt", manifest=tmp_path / "b.json")
    assert [skip.name for skip in report.skipped] == ["odd"]
    structure = "nested" if odd.is_nested else "quantized" if odd.is_quantized else "sparse"
    assert report.skipped[0].reason == f"{structure}: not one array of numbers"
    fold_checkpoint(tmp_path / "b.pt", tmp_path / "c.pt", manifest=tmp_path / "c.json")
    again = load_object(tmp_path / "c.pt")["odd"]
    assert again.layout == odd.layout
    assert again.dtype == odd.dtype
    assert all(torch.equal(x, y) for x, y in zip(plain(again), plain(odd), strict=True))
    assert [other.name for other in inspect(tmp_path / "c.pt").others] == ["fc.weight", "odd"]
    convert_checkpoint(saved(tmp_path / "d.pt", KINDS[kind](6.0)), tmp_path / "e.pt", manifest=tmp_path / "e.json")
    rows = [json.loads((tmp_path / f"{name}.json").read_text())["tensors"] for name in "bce"]
    digests = [next(row["sha256"] for row in table if row["name"] == "odd") for table in rows]
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(InputError, match=r"odd \(.*does not fit into a .safetensors file"):
        convert_checkpoint(source, tmp_path / "f.safetensors")
    assert not (tmp_path / "f.safetensors").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tensors_that_are_compared(kind: str, tmp_path: Path) -> None:
    """Equal ones pass, one number more or another shape fails and is named."""
    a, b = (saved(tmp_path / name, KINDS[kind](5.0)) for name in ("a.pt", "b.pt"))
    verify(a, b).raise_for_status()
    report = verify(a, saved(tmp_path / "c.pt", KINDS[kind](6.0)))
    assert len(report.problems) == 1
    assert report.problems[0].startswith("odd (")
    assert not verify(a, saved(tmp_path / "d.pt", torch.ones(2, 3))).ok


def test_a_sparse_tensor_of_more_elements_than_memory_holds(tmp_path: Path) -> None:
    """Sparse tensors are compared entry by entry, never spread out."""
    odd = torch.sparse_coo_tensor(torch.tensor([[0, 5], [1, 7]]), torch.ones(2), (1 << 40, 1 << 20))
    assert verify(saved(tmp_path / "a.pt", odd), tmp_path / "a.pt").ok
    other = torch.sparse_coo_tensor(torch.tensor([[0, 5], [1, 7]]), torch.ones(2), (1 << 40, 1 << 21))
    assert "shape" in verify(tmp_path / "a.pt", saved(tmp_path / "b.pt", other)).problems[0]


def test_meta_tensors_have_nothing_to_compare(tmp_path: Path) -> None:
    """A file with one is carried over, with its manifest; comparing it is an input error that names the tensor."""
    saved(tmp_path / "a.pt", torch.empty(2, 3, device="meta"))
    convert_checkpoint(tmp_path / "a.pt", tmp_path / "b.pt", manifest=tmp_path / "b.json")
    assert load_object(tmp_path / "b.pt")["odd"].is_meta
    with pytest.raises(InputError, match=r"b\.pt: odd: a meta tensor"):
        verify(tmp_path / "b.pt", tmp_path / "b.pt")


class Odd(torch.nn.Module):
    """Returns a tensor of an odd kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return KINDS[self.kind](float(x.sum()))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_such_kinds_are_compared(kind: str) -> None:
    """Two modules that return such tensors pass where they are equal and fail where they differ."""
    a = Odd(kind)
    assert verify(a, a, torch.ones(5)).ok
    b = Odd(kind)
    b.forward = lambda x: KINDS[kind](float(x.sum()) + 1)  # type: ignore[method-assign]
    assert not verify(a, b, torch.ones(5)).ok
