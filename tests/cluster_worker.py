"""One process of a gloo group for tests/test_clusters.py: trains and folds nets spread over the processes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import wnsurgery as wn

SPREAD = {"0": ColwiseParallel, "2": RowwiseParallel, "4": ColwiseParallel}


def plain() -> nn.Module:
    """Sizes that the number of processes does not divide, a row of zeros, a transposed convolution's kept axis 1."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 8))
    model = nn.Sequential(*head, nn.Unflatten(1, (4, 2)), nn.ConvTranspose1d(4, 5, 2))
    with torch.no_grad():
        model[2].weight[1].zero_()  # type: ignore[operator,union-attr,index]
    return model


def batch() -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(3))


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor gathered."""
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in state.items()}


def steps(model: nn.Module, x: Tensor, count: int = 5) -> list[float]:
    """Losses of a few steps; under data parallelism the mean over all processes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
    return losses


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def alone(magnitude: Any = "linear") -> tuple[dict[str, Tensor], list[float]]:
    """What one process makes of it: the converted state, then the losses."""
    model = wn.apply_weight_norm(plain(), magnitude=magnitude)
    return whole(model.state_dict()), steps(model, batch())


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    for part in (model[0], model[2], model):  # type: ignore[index]
        fully_shard(part, **options)
    return model


def gathered_fold(state: dict[str, Tensor], magnitude: Any = "linear") -> dict[str, Tensor]:
    model = wn.apply_weight_norm(plain(), magnitude=magnitude)
    model.load_state_dict(state)
    return whole(wn.fold_weight_norm(model).state_dict())


def tensor_parallel(rank: int, world: int, directory: Path) -> None:
    """Column-wise and row-wise layers under tensor parallelism, converted after it was set up."""
    for magnitude in ("linear", "log"):
        mesh = init_device_mesh("cpu", (world,))
        plan = {name: style() for name, style in SPREAD.items()}
        plan["4"] = ColwiseParallel(output_layouts=torch.distributed.tensor.Replicate())
        model = parallelize_module(plain(), mesh, plan)
        wn.apply_weight_norm(model, magnitude=magnitude)  # type: ignore[arg-type]
        state, losses = alone(magnitude)
        if magnitude == "linear":
            model.load_state_dict(model.state_dict())
            assert same(whole(model.state_dict()), state)
        torch.testing.assert_close(steps(model, batch()), losses, rtol=1e-5, atol=1e-7)
        expected = gathered_fold(whole(model.state_dict()), magnitude)
        wn.fold_weight_norm(model)
        assert same(whole(model.state_dict()), expected)
        assert isinstance(model[0].weight, DTensor)  # type: ignore[index]
        assert type(model[0]) is nn.Linear  # type: ignore[index]
        steps(model, batch(), 1)


def data_parallel(rank: int, world: int, directory: Path) -> None:
    """DistributedDataParallel."""
    model = wn.apply_weight_norm(plain())
    losses = steps(nn.parallel.DistributedDataParallel(model), batch().chunk(world)[rank])
    torch.testing.assert_close(losses, alone()[1], rtol=1e-5, atol=1e-7)
    wn.fold_weight_norm(model)


def fully_sharded(rank: int, world: int, directory: Path) -> None:
    """FSDP2: converted before, folded and converted again as shards, materialised from shards alone."""
    import torch.distributed.checkpoint as dcp

    mesh = init_device_mesh("cpu", (world,))
    model = sharded(wn.apply_weight_norm(plain()), mesh=mesh)
    state, losses = alone()
    assert same(whole(model.state_dict()), state)
    mine = batch().chunk(world)[rank]
    torch.testing.assert_close(steps(model, mine), losses, rtol=1e-5, atol=1e-7)
    dcp.save({"model": model.state_dict()}, checkpoint_id=directory / f"converted-{world}")
    expected = gathered_fold(whole(model.state_dict()))
    if rank == 0:
        torch.save(expected, directory / f"expected-{world}.pt")
    refused(wn.fold_weight_norm, model)

    shards = dict(model.state_dict())
    wn.fold_state(shards)
    assert all(isinstance(t, DTensor) and t.to_local().numel() < t.numel() for n, t in shards.items() if t.ndim > 1)
    assert same(whole(shards), expected)
    folded = on_meta(plain, mesh)
    refused(wn.apply_weight_norm, folded)
    folded.load_state_dict(shards, assign=True)
    torch.testing.assert_close(folded(mine), model(mine))

    back = dict(folded.state_dict())
    wn.convert_state(back)
    again = on_meta(lambda: wn.apply_weight_norm(plain(), dim={"6": 0}), mesh)
    again.load_state_dict(back, assign=True)
    torch.testing.assert_close(again(mine), model(mine))
    refolded = dict(again.state_dict())
    wn.fold_state(refolded)
    assert same(whole(refolded), expected)
    steps(again, mine, 1)


def on_meta(make: Callable[[], nn.Module], mesh: Any) -> nn.Module:
    with torch.device("meta"):
        return sharded(make(), mesh=mesh)


def refused(operation: Callable[[nn.Module], Any], model: nn.Module) -> None:
    before = list(model.state_dict())
    try:
        operation(model)
    except wn.SelectionError as error:
        assert "before sharding" in f"{error.message} {error.hint}", error
    else:
        raise AssertionError("surgery under fully_shard went through")
    assert list(model.state_dict()) == before


def two_dimensional(rank: int, world: int, directory: Path) -> None:
    """Tensor parallelism inside, FSDP2 outside."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(plain(), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    wn.apply_weight_norm(model)
    state, losses = alone()
    sharded(model, mesh=mesh["data"])
    assert same(whole(model.state_dict()), state)
    mine = batch().chunk(2)[mesh["data"].get_local_rank()]
    torch.testing.assert_close(steps(model, mine), losses, rtol=1e-5, atol=1e-7)
    shards = dict(model.state_dict())
    expected = gathered_fold(whole(shards))
    wn.fold_state(shards)
    assert same(whole(shards), expected)


def not_finite(rank: int, world: int, directory: Path) -> None:
    """NaN in one process's share is an error in all."""
    model = parallelize_module(plain(), init_device_mesh("cpu", (world,)), {"0": ColwiseParallel()})
    if rank == world - 1:
        model[0].weight.to_local().data[0, 0] = torch.nan  # type: ignore[operator,union-attr,index]
    try:
        wn.apply_weight_norm(model)
    except wn.NonFiniteWeightError as error:
        assert error.message == "0.weight: 1 of 96 elements are NaN or infinite"
    else:
        raise AssertionError("converted NaN")
    assert type(model[0]) is nn.Linear  # type: ignore[index]


def failing_fold(rank: int, world: int, directory: Path) -> None:
    """The last process cannot write its files."""
    from wnsurgery import directory as home

    def broken(*_: Any) -> None:
        raise wn.OutputError("no space left on the device")

    if rank == world - 1:
        home._write_all = broken
    try:
        wn.fold_checkpoint(directory / "source", directory / "output", process_group=None)
    except wn.WnsurgeryError as error:
        said = "no space left on the device"
        assert error.message == (said if rank == world - 1 else f"rank {world - 1}: {said}"), error
    else:
        raise AssertionError("a failure went unnoticed")


if __name__ == "__main__":
    folder, own, size, cases = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{size}", rank=own, world_size=size, timeout=timedelta(seconds=60)
    )
    for case in cases.split(","):
        globals()[case](own, size, folder)
    dist.barrier()
    dist.destroy_process_group()
