"""Embeddings in training compute the rows they are asked for: the same bits and gradients as from the whole table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wnsurgery as wn
from wnsurgery import looked_up
from wnsurgery.reparam import Axes

ROWS, WIDTH = 700, 48
IDS = torch.tensor([[5, 5, 9], [0, 699, 3]])


@pytest.fixture(autouse=True)
def small_tables_count_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looked_up, "_LARGE", 1 << 14)


def test_few_rows_of_large_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    large = torch.zeros(1 << 13, 64)
    rows = Axes((0,))
    assert looked_up.serves(torch.arange(1 << 10), large, rows)
    assert not looked_up.serves(torch.arange((1 << 10) + 1), large, rows)
    assert not looked_up.serves(torch.arange(8), large[: 1 << 12], rows)


def table(**options: Any) -> nn.Embedding:
    torch.manual_seed(0)
    made = wn.apply_weight_norm(nn.Embedding(ROWS, WIDTH, **options), include=["weight"])
    with torch.no_grad():
        pair(made)[0].mul_(torch.linspace(0.5, 2, ROWS)[:, None])
    return made


def pair(module: Any) -> tuple[Tensor, Tensor]:
    return module.parametrizations.weight.original0, module.parametrizations.weight.original1


def formula(module: nn.Embedding, ids: Tensor) -> Tensor:
    """The lookup in float64 with the textbook formula, differentiable in g and v."""
    g, v = (half.double() for half in pair(module))
    return F.embedding(ids, g * v / v.norm(dim=1, keepdim=True), module.padding_idx)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 5}])
@pytest.mark.parametrize("magnitude", ["linear", "log"])
def test_rows_are_those_of_the_whole_weight(options: Any, magnitude: Any) -> None:
    """Bits of the output are those of a lookup in `module.weight`; gradients those of the formula."""
    torch.manual_seed(0)
    module = wn.apply_weight_norm(nn.Embedding(ROWS, WIDTH, **options), include=["weight"], magnitude=magnitude)
    with torch.no_grad():
        pair(module)[0].add_(torch.linspace(0.1, 1, ROWS)[:, None])
    out = module(IDS)
    assert torch.equal(out, F.embedding(IDS, module.weight, module.padding_idx))
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, pair(module), up)
    dense = torch.autograd.grad(F.embedding(IDS, module.weight, module.padding_idx), pair(module), up)
    for mine, theirs in zip(found, dense, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_only_the_rows_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small batch never computes the whole weight; a batch of most ids, and evaluation, do."""
    module, whole = table(), []
    original = type(module.parametrizations.weight)._computed  # type: ignore[union-attr, index]

    def counted(self: Any, private: bool = False) -> Tensor:
        whole.append(1)
        return original(self, private)  # type: ignore[no-any-return]

    monkeypatch.setattr(type(module.parametrizations.weight), "_computed", counted)  # type: ignore[union-attr, index]
    module(IDS)
    assert not whole
    module(torch.arange(ROWS))
    with torch.no_grad():
        module(IDS)
    assert len(whole) == 2


def test_training_takes_the_same_course() -> None:
    """Ten steps of Adam with weight decay end where they end when the whole weight is computed."""
    one, other = table(), table()
    other.parametrizations.weight.register_forward_hook(lambda *_: None)  # type: ignore[union-attr, index]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (one, other)]
    generator = torch.Generator().manual_seed(2)
    for _ in range(10):
        ids = torch.randint(0, ROWS, (4, 6), generator=generator)
        for module, optimizer in zip((one, other), optimizers, strict=True):
            module(ids).cos().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, theirs in zip(pair(one), pair(other), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_rows_of_zeros_and_extreme_rows_take_the_long_way() -> None:
    """They are looked up as right as in the whole weight."""
    module = table()
    with torch.no_grad():
        g, v = pair(module)
        v[5].zero_()
        g[9].mul_(1e-30)
        v[0].mul_(1e25)
    out = module(IDS)
    assert torch.equal(out, F.embedding(IDS, module.weight))
    assert bool(torch.isfinite(out).all())
    out.sum().backward()
    assert bool(torch.isfinite(g.grad).all())  # type: ignore[arg-type]


def test_second_derivatives() -> None:
    """Gradients of gradients agree with the formula in float64."""
    module = table()
    results = []
    for out in (module(IDS), formula(module, IDS)):
        (first,) = torch.autograd.grad(out.pow(3).sum(), pair(module)[1], create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), pair(module)))
    for mine, theirs in zip(*results, strict=True):
        assert torch.allclose(mine.double(), theirs.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"scale_grad_by_freq": True}])
def test_other_kinds_of_lookup_are_left_to_torch(options: Any) -> None:
    """What torch does to the whole weight, or with its gradient, it goes on doing."""
    module = table(**options)
    plain = nn.Embedding.from_pretrained(module.weight.detach().clone(), freeze=False, **options)
    assert torch.equal(module(IDS), plain(IDS))


def test_a_tied_head_and_writes_into_the_weight() -> None:
    """The lookup sees what was written into `module.weight`, and shares its pair with a tied layer."""
    net = nn.Sequential(nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, ROWS, bias=False))
    net[1].weight = net[0].weight
    wn.apply_weight_norm(net, include=["*weight"])
    nn.init.constant_(net[0].weight, 0.5)  # type: ignore[arg-type]
    assert torch.equal(net[0](IDS), torch.full((2, 3, WIDTH), 0.5))
    net(IDS).square().mean().backward()
    assert all(half.grad is not None for half in pair(net[0]))


def test_no_ids() -> None:
    """An empty batch gives an empty output."""
    assert table()(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, WIDTH)


def test_ids_out_of_range_are_torch_s_error() -> None:
    """An id beyond the table is an IndexError, as in a plain embedding."""
    with pytest.raises(IndexError):
        table()(torch.tensor([ROWS]))
