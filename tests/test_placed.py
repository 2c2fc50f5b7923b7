"""What the compiled kernels were told of tensors holds for as long as these lie where they lay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from wnsurgery import fused
from wnsurgery.placed import Placed, addresses
from wnsurgery.small_weights import Made, SmallWeights

MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "elsewhere": Tensor.clone,
    "in another order": Tensor.t,
    "in part": lambda v: v[:2],
    "as another type": lambda v: v.view(torch.int32),
}


@pytest.mark.parametrize("how", MOVES)
def test_what_no_version_counts_is_seen(how: str) -> None:
    still, moved = torch.randn(4, 4), torch.randn(4, 4)
    placed = Placed([still, moved])
    still.mul_(2.0)
    assert placed.are_as_they_were()
    before = moved._version
    moved.data = MOVES[how](moved.data)
    assert moved._version == before
    assert not placed.are_as_they_were()
    assert placed.is_as_it_was(0)
    assert not placed.is_as_it_was(1)


def test_addresses() -> None:
    a = torch.zeros(4)
    assert addresses([a, a[1:]]) == [a.data_ptr(), a.data_ptr() + 4]


def norms_at(made: Made) -> list[int]:
    """Where the norms of each weight lie, of three rows each."""
    return [made.norms.data_ptr() + 4 * 3 * i for i in range(len(made.weights))]


@pytest.mark.parametrize("half", ["g", "v"])
def test_gradients_of_a_pair_that_has_moved_are_not_read_where_it_was(half: str) -> None:
    """The kernels leave it to others, also where its new memory was known before the first gradients came."""
    assert fused.start()
    pairs = [(torch.rand(3, 1), torch.randn(3, 3)) for _ in range(2)]
    small = SmallWeights(pairs)
    made = small.make()
    moved = pairs[1][0] if half == "g" else pairs[1][1]
    moved.data = moved.data.clone()
    grads = [torch.randn(3, 3), torch.randn(3, 3)]
    to_g, to_v = small.pass_on(grads, norms_at(made))
    assert [part is None for part in (*to_g, *to_v)] == [False, True, False, True]
    (g, v), grad = pairs[0], grads[0]
    g, v = g.double().requires_grad_(), v.double().requires_grad_()
    (g * v / v.norm(dim=1, keepdim=True)).backward(grad.double())
    torch.testing.assert_close(to_g[0], g.grad, check_dtype=False)
    torch.testing.assert_close(to_v[0], v.grad, check_dtype=False)


@pytest.mark.parametrize(
    "grad",
    [torch.ones(()).expand(3, 3), torch.randn(3, 3).t(), torch._neg_view(torch.randn(3, 3)), None],
    ids=["expanded", "transposed", "negated", "none"],
)
@pytest.mark.parametrize("private", [False, True])
def test_gradients_in_any_layout(grad: Tensor | None, private: bool) -> None:
    """Those the kernels cannot read in place are copied, and never written over."""
    assert fused.start()
    pairs = [(torch.rand(3, 1), torch.randn(3, 3)) for _ in range(2)]
    small = SmallWeights(pairs)
    norms = norms_at(made := small.make())
    other = torch.randn(3, 3)
    kept = None if grad is None else grad.clone()
    to_g, to_v = small.pass_on([other.clone(), grad], norms, [private] * 2)
    _, wanted = small.pass_on([other, torch.zeros(3, 3) if kept is None else kept.contiguous()], norms)
    assert torch.equal(to_v[0], wanted[0])  # type: ignore[arg-type]
    if grad is None:
        assert to_g[1] is to_v[1] is None
    else:
        assert torch.equal(to_v[1], wanted[1])  # type: ignore[arg-type]
        assert torch.equal(grad, kept)  # type: ignore[arg-type]
    assert all(made.fine)


def test_a_plain_private_gradient_is_written_over() -> None:
    assert fused.start()
    small = SmallWeights([(torch.rand(3, 1), torch.randn(3, 3))])
    grad = torch.randn(3, 3)
    _, (to_v,) = small.pass_on([grad], norms_at(made := small.make()), [True])
    assert to_v is grad
    assert made.weights[0].shape == grad.shape
