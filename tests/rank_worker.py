"""One process of a gloo group for tests/test_ranks.py: initialises nets from its share of the batches."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import wnsurgery as wn

from nets import Branches

SIZES = [3, 9, 2, 8, 5, 6, 4]
SHARES = {1: [7], 2: [5, 2], 4: [3, 0, 3, 1]}


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def made(name: str) -> tuple[nn.Module, list[Tensor]]:
    """The same model and the same 7 uneven batches on every rank."""
    torch.manual_seed(1)
    model = without_dropout(Branches()) if name == "branches" else small()
    shape = (3, 8, 8) if name == "branches" else (5,)
    x = torch.randn(sum(SIZES), *shape) * 5 + 2
    return wn.apply_weight_norm(model), list(x.split(SIZES))


def share(batches: list[Tensor], rank: int, world: int) -> list[Tensor]:
    counts = SHARES[world]
    return batches[sum(counts[:rank]) : sum(counts[: rank + 1])]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    values = ((n.removeprefix("module."), p.detach()) for n, p in model.named_parameters())
    return {n: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for n, p in values}


class Counted(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.inner(x)


def plain(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("branches", "small"):
        for memory in ("spill", "recompute"):
            model, batches = made(name)
            counted, mine = Counted(model), share(batches, rank, world)
            report = wn.data_dependent_init(counted, mine, memory=memory, mask=None)  # type: ignore[arg-type]
            found[f"{name} {memory}"] = parameters(model)
            found[f"{name} {memory} calls"] = counted.calls - len(mine) if memory == "spill" else 0
            assert report.batches == len(SIZES)
    return found


def wrapped(rank: int, world: int) -> dict[str, Any]:
    """DistributedDataParallel."""
    model, batches = made("branches")
    ddp = nn.parallel.DistributedDataParallel(model)
    wn.data_dependent_init(ddp, share(batches, rank, world))
    ddp(batches[rank]).sum().backward()
    return {"ddp": parameters(model)}


def alone(rank: int, world: int) -> dict[str, Any]:
    """A process that keeps to itself, and groups of one."""
    model, batches = made("small")
    wn.data_dependent_init(model, batches[rank : rank + 1], process_group=False)
    other, _ = made("small")
    groups = [dist.new_group([r]) for r in range(world)]
    wn.data_dependent_init(other, batches[rank : rank + 1], process_group=groups[rank])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    return {}


def failing(rank: int, world: int) -> dict[str, Any]:
    """An error on one rank is an error on all, and nobody's parameters have changed."""
    messages: dict[str, Any] = {}
    for case in ("forward", "data", "nan", "empty", "models"):
        model, batches = made("small")
        mine: Any = share(batches, rank, world)
        last = rank == world - 1
        if case == "forward" and last:
            mine = [*mine, torch.randn(3, 4)]
        if case == "data" and last:
            mine = (batch if i < 1 else 1 // 0 for i, batch in enumerate([*mine, *mine]))
        if case == "nan" and last:
            mine = [batch / 0 for batch in mine]
        if case == "empty":
            mine = []
        if case == "models" and last:
            model = wn.apply_weight_norm(nn.Sequential(nn.Linear(5, 6)))
        before = parameters(model)
        try:
            wn.data_dependent_init(model, mine)
        except wn.InputError as error:
            messages[case] = error.message
        assert all(torch.equal(p, before[n]) for n, p in parameters(model).items())
    return {"messages": messages}


def sharded(rank: int, world: int) -> dict[str, Any]:
    """FSDP2: layers of their own groups, a root that keeps its parameters, a frozen bias; uneven shares."""
    from torch.distributed.fsdp import fully_shard

    found: dict[str, Any] = {}
    for counts in ([5, 2], [7, 0]):
        model, batches = made("small")
        for index in (0, 3):
            fully_shard(model[index])  # type: ignore[index]
        fully_shard(model)
        SHARES[world] = counts
        report = wn.data_dependent_init(model, share(batches, rank, world))
        assert len(report.initialised) == 3
        found[f"fsdp {counts}"] = parameters(model)
        model(batches[0]).sum().backward()
    return found


if __name__ == "__main__":
    directory, rank, world, case = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    result = {name: globals()[name](rank, world) for name in case.split(",")}
    torch.save(result, directory / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads that gloo has not yet joined have ended an interpreter's exit in std::terminate
