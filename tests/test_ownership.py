"""Whose a gradient is: dL/dv may take the memory of dL/dw only where nobody else can look at it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wnsurgery import fused, ownership, reparam
from wnsurgery.kept import Rooms
from wnsurgery.ownership import counted, is_private, prepare
from wnsurgery.reparam import Axes, compose_eagerly

X = torch.arange(20.0).view(5, 4)


@counted
class Watched(torch.autograd.Function):
    """Says whether the gradient that comes to it is private."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, found: list[bool]) -> Tensor:
        ctx.found = found
        return w.clone()

    @staticmethod
    def receive(ctx: Any, grad: Tensor, count: int) -> tuple[Tensor, None]:
        ctx.found.append(is_private(grad, count))
        return grad.clone(), None


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda w: F.linear(X, w).square().sum(),
    "batched linear": lambda w: F.linear(X[None], w).square().sum(),
    "product": lambda w: (w * w).sum(),
    "twice": lambda w: F.linear(F.linear(X, w)[:, :4], w).square().sum(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_gradients_of_ordinary_layers_are_private(use: Callable[[Tensor], Tensor]) -> None:
    """Linear maps and products hand their weight's gradient over to its backward function."""
    prepare()
    found: list[bool] = []
    use(Watched.apply(torch.ones(8, 4, requires_grad=True), found)).backward()
    assert found == [True]


KEEPING: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda grad: grad,
    "detached": lambda grad: grad.detach(),
    "a row": lambda grad: grad[0],
    "its storage": lambda grad: grad.untyped_storage(),
    "an array": lambda grad: grad.numpy(),
    "through dlpack": np.from_dlpack,
    "its base": lambda grad: grad._base if grad._base is not None else grad,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("keep", KEEPING.values(), ids=KEEPING.keys())
def test_a_gradient_somebody_keeps_is_not_private(
    keep: Callable[[Tensor], Any], use: Callable[[Tensor], Tensor]
) -> None:
    """A hook that keeps the gradient, a view, its memory or an array over it, is seen."""
    prepare()
    found: list[bool] = []
    kept: list[Any] = []
    w = Watched.apply(torch.ones(8, 4, requires_grad=True), found)
    w.register_hook(lambda grad: kept.append(keep(grad)))
    use(w).backward()
    assert found == [False]


def _judged(keep: bool, run: Callable[[Tensor], None]) -> bool:
    """What is found of a gradient that is kept, or not, in a backward pass run in some surroundings; the counts are
    found out in it, if they are not known."""
    found: list[bool] = []
    w = Watched.apply(torch.ones(8, 4, requires_grad=True), found)
    held: list[Tensor] = []
    if keep:
        w.register_hook(held.append)
    loss = F.linear(X, w).square().sum()
    loss.register_hook(lambda _: prepare())
    run(loss)
    return found[0]


def _plainly(loss: Tensor) -> None:
    loss.backward()


def _beside_a_compiler(loss: Tensor) -> None:
    """From a compiled function that could not be compiled whole: the compiler runs this thread's calls."""
    known: list[bool] = []
    loss.register_hook(lambda _: known.append(torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None))

    @torch.compile(backend="eager")
    def step(x: Tensor) -> Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        loss.backward()
        return y * 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the compiler says of its own doing
        step(torch.ones(2))
    assert known == [True]


def _beside_a_debugger(loss: Tensor) -> None:
    before = sys.gettrace()
    sys.settrace(lambda *_: None)
    try:
        loss.backward()
    finally:
        sys.settrace(before)


BESIDE = {"nothing": _plainly, "a compiler": _beside_a_compiler, "a debugger": _beside_a_debugger}


@pytest.mark.parametrize("used", BESIDE.values(), ids=BESIDE.keys())
@pytest.mark.parametrize("first", BESIDE.values(), ids=BESIDE.keys())
def test_what_runs_beside_does_not_move_the_counts(
    first: Callable[[Tensor], None], used: Callable[[Tensor], None]
) -> None:
    """Wherever the counts are found out, a kept gradient is never taken for a private one, there or elsewhere."""
    ownership._when_private.cache_clear()
    try:
        assert not _judged(keep=True, run=first)
        assert not _judged(keep=True, run=used)
        assert _judged(keep=False, run=_plainly)
    finally:
        ownership._when_private.cache_clear()


def test_gradients_asked_for_or_shared_are_not_private() -> None:
    """`autograd.grad` for the weight, a gradient given by the caller, and one that goes to two tensors, are seen."""
    prepare()
    leaf = torch.ones(8, 4, requires_grad=True)
    asked: list[bool] = []
    w = Watched.apply(leaf, asked)
    torch.autograd.grad((w * w).sum(), [w, leaf])
    given: list[bool] = []
    Watched.apply(leaf, given).backward(torch.ones(8, 4))
    shared: list[bool] = []
    other = torch.ones(8, 4, requires_grad=True).exp()
    (Watched.apply(leaf, shared) + other).square().sum().backward()
    assert asked == given == shared == [False]


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_written_in_place_are_those_of_the_formula(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """dL/dg and dL/dv of a large weight, over a private gradient and beside a kept one, agree with float64."""
    monkeypatch.setattr(reparam, "_FRESH", 1 << 16)
    generator = torch.Generator().manual_seed(3)
    v = torch.randn(40, 9000, generator=generator).requires_grad_()
    g = torch.rand(40, 1, generator=generator).add(0.5).requires_grad_()
    x = torch.randn(3, 9000, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kept: list[Tensor] = []
        results = []
        for keep in (False, True):
            w = compose_eagerly(g, v, Axes((0,)), "linear", Rooms())
            if keep:
                w.register_hook(kept.append)
            loss = F.linear(x, w).square().sum()
            results.append(torch.autograd.grad(loss, [g, v]))
    finally:
        torch.set_num_threads(before)
    wide_g, wide_v = g.detach().double().requires_grad_(), v.detach().double().requires_grad_()
    wide_w = wide_g * wide_v / wide_v.norm(dim=1, keepdim=True)
    exact = torch.autograd.grad(F.linear(x.double(), wide_w).square().sum(), [wide_g, wide_v, wide_w])
    for found in results:
        for got, wanted in zip(found, exact, strict=False):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    torch.testing.assert_close(kept[0].double(), exact[2], rtol=1e-4, atol=1e-5 * float(exact[2].abs().max()))


@pytest.mark.parametrize("compiled", [True, False])
def test_v_grad_takes_the_memory_of_a_private_gradient(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training a large weight needs no second block of its size for dL/dv, by the compiled kernels and without them."""
    monkeypatch.setattr(reparam, "_FRESH", 1 << 16)
    if compiled:
        assert fused.start()
    else:
        monkeypatch.setattr(fused._Kernels, "module", None)
        monkeypatch.setattr(fused._Kernels, "asked", True)
    starts: list[int] = []
    home, name = (fused, "backward") if compiled else (reparam, "_gradients_into")
    written = getattr(home, name)

    def seen(*arguments: Any) -> Any:
        room, grad_w = (arguments[-1], arguments[0]) if compiled else arguments[:2]
        starts.extend((room.data_ptr(), grad_w.data_ptr()))
        return written(*arguments)

    monkeypatch.setattr(home, name, seen)
    v = torch.randn(400, 500, requires_grad=True)
    g = torch.ones(400, 1, requires_grad=True)
    F.linear(torch.randn(2, 500), compose_eagerly(g, v, Axes((0,)), "linear", Rooms())).sum().backward()
    assert v.grad is not None and starts == [v.grad.data_ptr()] * 2
