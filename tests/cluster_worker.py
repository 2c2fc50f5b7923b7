"""One process of a gloo group for tests/test_clusters.py: trains and folds nets spread over the processes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
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

    shards = dict(model.state_dict())
    wn.fold_state(shards)
    assert all(isinstance(t, DTensor) and t.to_local().numel() < t.numel() for n, t in shards.items() if t.ndim > 1)
    assert same(whole(shards), expected)
    folded = on_meta(plain, mesh)
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


class Tied(nn.Module):
    """A head that is the embedding, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.body.weight.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)).tanh())  # type: ignore[no-any-return]


def surgery_on_shards(rank: int, world: int, directory: Path) -> None:
    """A net under fully_shard is converted, trained, folded, trained and converted again, and never gathered for it."""
    mesh = init_device_mesh("cpu", (world,))
    mine = batch().chunk(world)[rank]
    model = sharded(plain(), mesh=mesh)
    largest = watch_shards()
    wn.apply_weight_norm(model)
    assert not largest
    state, losses = alone()
    assert same(whole(model.state_dict()), state)
    torch.testing.assert_close(steps(model, mine), losses, rtol=1e-5, atol=1e-7)
    single = wn.apply_weight_norm(plain())
    steps(single, batch())
    expected = gathered_fold(whole(model.state_dict()))
    model(mine)  # the root's parameters stay whole after a forward pass alone
    wn.fold_weight_norm(model)
    assert same(whole(model.state_dict()), expected)
    assert all(p.to_local().numel() < p.numel() or p.numel() < world for p in model.parameters())
    assert not any("weight_norm" in type(m).__name__.lower() for m in model.modules())
    wn.fold_weight_norm(single)
    torch.testing.assert_close(steps(model, mine), steps(single, batch()), rtol=1e-5, atol=1e-7)
    wn.apply_weight_norm(model, magnitude="log")
    wn.apply_weight_norm(single, magnitude="log")
    torch.testing.assert_close(steps(model, mine), steps(single, batch()), rtol=1e-5, atol=1e-7)
    model.load_state_dict(dict(model.state_dict()), assign=True)
    wn.fold_weight_norm(model)
    steps(model, mine, 1)

    shards = dict(sharded(plain(), mesh=mesh).state_dict())
    late, early = on_meta(plain, mesh), on_meta(plain, mesh)
    late.load_state_dict(shards, assign=True)
    wn.apply_weight_norm(late)
    wn.apply_weight_norm(early)  # on the meta device
    assert all(p.is_meta for p in early.parameters())
    early.load_state_dict({name: t.clone() for name, t in late.state_dict().items()}, assign=True)
    for found in (late, early):
        assert same(whole(found.state_dict()), state)
        torch.testing.assert_close(steps(found, mine), losses, rtol=1e-5, atol=1e-7)


def ties_on_shards(rank: int, world: int, directory: Path) -> None:
    """Tied and frozen weights stay so under fully_shard, as one group and as several."""
    ids = torch.arange(8).remainder(7).chunk(world)[rank]
    for parts in (False, True):
        model, single = Tied(), Tied()
        if parts:
            fully_shard(model.body)
        fully_shard(model)
        for operation in (lambda m: wn.apply_weight_norm(m, include="*"), wn.fold_weight_norm):
            before = whole(model.state_dict())
            operation(model)
            single.load_state_dict(before)
            operation(single)
            assert len(list(model.parameters())) == len(list(single.parameters()))
            flags = [p.requires_grad for p in single.parameters()]
            assert [p.requires_grad for p in model.parameters()] == flags
            assert same(whole(model.state_dict()), whole(single.state_dict()))
            found = steps(model, ids)
            torch.testing.assert_close(found, steps(single, torch.arange(8).remainder(7)), rtol=1e-5, atol=1e-7)
        assert model.head.weight is model.embed.weight


def tools_on_shards(rank: int, world: int, directory: Path) -> None:
    """Under fully_shard an optimizer follows; what measures, initialises and rescales gives one process's numbers."""
    mine = batch().chunk(world)[rank]

    def pair(make: Any = torch.optim.AdamW) -> tuple[nn.Module, nn.Module, Any, Any]:
        model, single = sharded(plain()), plain()
        return model, single, make(model.parameters(), lr=0.01), make(single.parameters(), lr=0.01)

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()

    def close(model: nn.Module, single: nn.Module) -> None:
        torch.testing.assert_close(whole(model.state_dict()), whole(single.state_dict()), rtol=1e-4, atol=1e-5)

    for mode in ("parametrized", "deferred"):
        model, single, ours, theirs = pair()
        go(model, ours, mine)
        go(single, theirs, batch())
        for operation in (partial(wn.apply_weight_norm, mode=mode), wn.fold_weight_norm):
            operation(model, optimizer=ours)
            operation(single, optimizer=theirs)
            go(model, ours, mine)
            go(single, theirs, batch())
            close(model, single)

    model, single, ours, theirs = pair(torch.optim.SGD)
    wn.apply_weight_norm(model, optimizer=ours, init="data", data=mine)
    wn.apply_weight_norm(single, optimizer=theirs, init="data", data=batch(), process_group=False)
    close(model, single)
    with wn.WeightNormMonitor(model, ours, every=1) as a, wn.WeightNormMonitor(single, theirs, every=1) as b:
        go(model, ours, mine)
        go(single, theirs, batch())
    assert len(a.records) == len(b.records) > 0
    assert all(abs(x.norm[1] - y.norm[1]) < 1e-4 * y.norm[1] for x, y in zip(a.records, b.records, strict=True))
    single.load_state_dict(whole(model.state_dict()))
    spreads = [
        [(w.norm.min, w.norm.median, w.norm.max) for w in wn.inspect(m).weights if w.norm] for m in (model, single)
    ]
    torch.testing.assert_close(*map(torch.tensor, spreads), rtol=1e-6, atol=0)
    for aim in ("magnitude", "unit"):
        before = folded_bits(model)
        report = wn.renormalize_(model, aim, optimizer=ours)
        assert report == wn.renormalize_(single, aim)
        assert same(whole(model.state_dict()), whole(single.state_dict()))
        assert same(folded_bits(model), before)
    assert any(weight.rescaled for weight in report.weights)
    assert not wn.stale_parameters(model, ours)
    with wn.keep_unit_norm(model, ours):
        go(model, ours, mine)
    for module in model.modules():
        if hasattr(module, "parametrizations"):
            v = module.parametrizations.weight.original1.full_tensor()
            norms = v.flatten(1).norm(dim=1) if module is not model[6] else v.transpose(0, 1).flatten(1).norm(dim=1)
            assert bool(((norms - 1).abs() < 1e-6)[norms > 0].all())


def folded_bits(model: nn.Module) -> dict[str, Tensor]:
    state = whole(model.state_dict())
    wn.fold_state(state)
    return state


def refusals_on_shards(rank: int, world: int, directory: Path) -> None:
    """What cannot be done under fully_shard is refused with the net as it was, and works on."""
    mine = batch().chunk(world)[rank]
    model = sharded(plain())
    refused("further up in the net", lambda: wn.apply_weight_norm(model[4]), model)
    narrow = sharded(plain().to(torch.bfloat16))
    refused("parameters of one type", lambda: wn.apply_weight_norm(narrow), narrow)
    wn.apply_weight_norm(narrow, magnitude_dtype=torch.bfloat16)
    steps(narrow, mine.bfloat16(), 1)
    from wnsurgery import fully_sharded

    known, fully_sharded._groups = fully_sharded._groups, lambda module: module.no_such_attribute
    refused("is unknown here", lambda: wn.apply_weight_norm(model), model)
    fully_sharded._groups, make = known, fully_sharded._fresh

    def broken(*arguments: Any) -> Any:
        if len(made) == 2:
            raise AttributeError("another torch")
        made.append(make(*arguments))
        return made[-1]

    made: list[Any] = []
    fully_sharded._fresh = broken
    refused("is unknown here", lambda: wn.apply_weight_norm(model), model)
    fully_sharded._fresh = make
    plain_losses = steps(plain(), batch())
    torch.testing.assert_close(steps(model, mine), plain_losses, rtol=1e-5, atol=1e-7)


def refused(said: str, operation: Callable[[], Any], model: nn.Module) -> None:
    before = [(name, id(p)) for name, p in model.named_parameters()]
    try:
        operation()
    except wn.SelectionError as error:
        assert said in error.message, error
        assert "state" in str(error.hint) or "float32" in str(error.hint)
    else:
        raise AssertionError("went through")
    assert [(name, id(p)) for name, p in model.named_parameters()] == before


def watch_shards() -> list[int]:
    """Sizes of what is gathered from now on."""
    seen: list[int] = []
    gather = dist.all_gather_into_tensor

    def watching(output: Tensor, *others: Any, **options: Any) -> Any:
        seen.append(output.numel())
        return gather(output, *others, **options)

    dist.all_gather_into_tensor = watching
    return seen


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


def failing_first(rank: int, world: int, directory: Path) -> None:
    """The first process fails while the others still write."""
    from wnsurgery import directory as home

    write = home._write_all

    def broken(*_: Any) -> None:
        raise wn.OutputError("no space left on the device")

    def late(*arguments: Any) -> None:
        time.sleep(1)  # longer than a failing process takes to clear up
        write(*arguments)

    home._write_all = broken if rank == 0 else late
    try:
        wn.fold_checkpoint(directory / "source", directory / "output", process_group=None)
    except wn.WnsurgeryError as error:
        said = "no space left on the device"
        assert error.message == (said if rank == 0 else f"rank 0: {said}"), error
    else:
        raise AssertionError("a failure went unnoticed")


def folded_file(rank: int, world: int, directory: Path) -> None:
    """All processes fold one file, then a directory into one file, then a file that is not there."""
    source = directory / "source"
    for name, given in (("file", directory / "converted.safetensors"), ("whole", source)):
        report = wn.fold_checkpoint(given, directory / f"{name}.safetensors", process_group=None)
        (directory / f"store-{name}-{rank}").write_text(str(report))
    try:
        wn.fold_checkpoint(directory / "missing.pt", directory / "output.pt", process_group=None)
    except wn.WnsurgeryError as error:
        said = f"{directory / 'missing.pt'}: no such file"
        assert error.message.startswith(said if rank == 0 else f"rank 0: {said}"), error
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
    sys.stdout.flush()
    os._exit(0)  # threads that gloo has not yet joined have ended an interpreter's exit in std::terminate
