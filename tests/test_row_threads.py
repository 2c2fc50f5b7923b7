"""Kernels in several threads: torch's own, or Python's where torch has none; the same bits, and no part left out."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import wnsurgery as wn
from wnsurgery import fused, row_threads
from wnsurgery.norms import norm
from wnsurgery.reparam import Axes

from nets import large_layer

SHAPES = [((64, 900), (0,)), ((3, 30000), (0,)), ((2000, 40), (0,)), ((90, 64, 9), (1,)), ((300, 2, 100), (1,))]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(row_threads, "_SPREAD", 1 << 9)
    monkeypatch.setattr(row_threads, "_PYTHONS", 1 << 9)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def openmp() -> None:
    if row_threads._openmp(os.getpid()) is None:
        pytest.skip("torch does not run its threads with OpenMP here")


@pytest.fixture(params=["torch's", "Python's"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "Python's":
        monkeypatch.setattr(row_threads, "_openmp", lambda _process: None)
    elif row_threads._openmp(os.getpid()) is None:
        pytest.skip("torch does not run its threads with OpenMP here")
    return str(request.param)


def everything(shape: tuple[int, ...], kept: tuple[int, ...], *, extreme: bool = False) -> list[Tensor] | None:
    """w, ||v||, dL/dg and dL/dv by the kernels; None where they give up."""
    assert fused.start()
    torch.manual_seed(0)
    axes = Axes(kept)
    v = torch.randn(shape)
    if extreme:
        v.select(kept[0], shape[kept[0]] - 1).zero_()
    g = torch.rand(axes.magnitude_shape(v.shape)) + 0.5
    sizes = fused.plan(g, v, kept, 1, "linear")
    assert sizes is not None
    w, up, grad_v = torch.full_like(v, torch.nan), torch.randn(shape), torch.full_like(v, torch.nan)
    norms = fused.forward(g, v, sizes, w)
    if norms is None:
        return None
    dims = [d for d in range(v.ndim) if d not in kept]
    assert torch.equal(norms, norm(v, dims, blocked=True).to(torch.float32).reshape(g.shape))
    return [w, norms, fused.backward(up, g, v, norms, sizes, grad_v), grad_v]


@pytest.mark.parametrize(("shape", "kept"), SHAPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_number_of_threads_decides_no_bit(
    shape: tuple[int, ...], kept: tuple[int, ...], count: int, threads: str
) -> None:
    torch.set_num_threads(1)
    alone = everything(shape, kept)
    torch.set_num_threads(count)
    together = everything(shape, kept)
    assert alone is not None and together is not None
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("shape", "kept"), SHAPES, ids=str)
def test_one_part_that_says_no_is_heard(shape: tuple[int, ...], kept: tuple[int, ...], threads: str) -> None:
    torch.set_num_threads(2)
    assert everything(shape, kept, extreme=True) is None


@pytest.mark.usefixtures("openmp")
@pytest.mark.parametrize(("shape", "kept"), SHAPES, ids=str)
def test_a_thread_that_comes_alone_does_the_shares_of_all(
    shape: tuple[int, ...], kept: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As inside of a parallel region, where OpenMP gives no other threads."""
    torch.set_num_threads(1)
    wanted = everything(shape, kept)
    calls = list[int]()

    def alone(_parallel: int, worker: int, job: int, threads: int) -> None:
        calls.append(threads)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(worker)(job)

    monkeypatch.setattr(fused._Kernels.module, "in_parallel", alone)
    torch.set_num_threads(3)
    found = everything(shape, kept)
    assert wanted is not None and found is not None and calls == [3, 3]
    for a, b in zip(wanted, found, strict=True):
        assert torch.equal(a, b)


def test_several_python_threads_at_once(threads: str) -> None:
    torch.set_num_threads(2)
    g, v = torch.ones(64, 1), torch.randn(64, 900)
    sizes = fused.plan(g, v, (0,), 1, "linear")
    assert sizes is not None
    wanted, found = torch.empty_like(v), list[Tensor]()
    fused.forward(g, v, sizes, wanted)

    def work() -> None:
        for _ in range(20):
            w = torch.full_like(v, torch.nan)
            fused.forward(g, v, sizes, w)
            found.append(w)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    assert len(found) == 80
    assert all(torch.equal(w, wanted) for w in found)


def test_a_fork_does_not_wait_for_threads_that_it_does_not_have(threads: str) -> None:
    """As torch's own operations of this size would; nor does a pool of threads survive a fork."""
    torch.set_num_threads(2)
    g, v = torch.ones(600, 1), torch.randn(600, 900)
    sizes = fused.plan(g, v, (0,), 1, "linear")
    assert sizes is not None
    w = torch.empty_like(v)
    norms = fused.forward(g, v, sizes, w)
    assert norms is not None

    def work() -> None:
        fused.forward(g, v, sizes, w)
        fused.backward(w, g, v, norms, sizes, w)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    try:
        assert child.exitcode == 0
    finally:
        child.kill()


def test_torch_finds_its_threads_as_it_left_them() -> None:
    """Its own operations run on after ours, in the same threads: none is started beside them."""
    program = (
        "import os, torch, wnsurgery\n"
        "from wnsurgery import fused, row_threads\n"
        "torch.set_num_threads(2)\n"
        "fused.start()\n"
        "if row_threads._openmp(os.getpid()) is None: raise SystemExit(9)\n"
        "a = torch.randn(400, 400); a @ a; torch.randn(1 << 20).exp()\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "g, v = torch.ones(512, 1), torch.randn(512, 512)\n"
        "sizes = fused.plan(g, v, (0,), 1, 'linear')\n"
        "row_threads._worker(fused._Kernels.module)  # compiled with a thread of the compiler's\n"
        "before = count()\n"
        "for _ in range(5): fused.forward(g, v, sizes, torch.empty_like(v)); a @ a\n"
        "assert count() == before, (before, count())\n"
    )
    if not Path("/proc/self/task").is_dir():
        pytest.skip("no /proc")
    code = subprocess.run([sys.executable, "-c", program], check=False).returncode
    if code == 9:
        pytest.skip("torch does not run its threads with OpenMP here")
    assert code == 0


@pytest.mark.usefixtures("openmp")
def test_workers_are_compiled_once_however_many_modules_take_turns() -> None:
    torch.set_num_threads(2)
    module = large_layer(1100, 600)
    twin = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8)))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    wn.apply_weight_norm(twin, optimizer=optimizer, mode="deferred")
    before = row_threads._worker.cache_info().misses
    for _ in range(3):
        assert everything(*SHAPES[0]) is not None
        module(torch.randn(4, 600)).sum().backward()
        twin(torch.randn(4, 64)).sum().backward()
        optimizer.step()
    assert row_threads._worker.cache_info().misses - before <= 3
