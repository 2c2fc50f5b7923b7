"""A net that no process holds whole: built without memory, sharded, converted, trained, saved and folded.

    torchrun --standalone --nproc-per-node 2 examples/fully_sharded.py

The first process writes a checkpoint, as a stand-in for one that exists already; from then on each has its shards only.
Seconds on the CPU.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import wnsurgery as wn

WIDTH, LAYERS, STEPS = 256, 4, 5


def net() -> nn.Sequential:
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def materialised(checkpoint: Path) -> nn.Sequential:
    """The net, sharded, with the checkpoint's weights: every process reads its part of them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with torch.device("meta"):
        model = net()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    state = model.state_dict()
    dcp.load(state, checkpoint_id=checkpoint)
    model.load_state_dict(state)
    return model


def train(model: nn.Module) -> list[float]:
    """Each process on its own batches; the losses are means over all."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)  # made after the surgery
    draw = torch.Generator().manual_seed(dist.get_rank())
    x, y = torch.randn(64, WIDTH, generator=draw), torch.randint(10, (64,), generator=draw)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
    return losses


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.full_tensor() for name, tensor in state.items()}


def main(folder: Path) -> None:
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        dcp.save(net().state_dict(), checkpoint_id=folder / "plain", no_dist=True)
    dist.barrier()
    model = materialised(folder / "plain")
    before = whole(model.state_dict())
    wn.apply_weight_norm(model)
    held = sum(p.to_local().numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
    changed = sum(int((layer.weight.full_tensor() != before[f"{i}.weight"]).sum())
                  for i, layer in enumerate(model) if isinstance(layer, nn.Linear))  # fmt: skip
    losses = train(model)
    dcp.save(model.state_dict(), checkpoint_id=folder / "trained")
    wn.fold_weight_norm(model)
    after = whole(model.state_dict())
    if dist.get_rank() == 0:
        report = wn.fold_checkpoint(folder / "trained", folder / "folded.safetensors", process_group=False)
        file = load_file(folder / "folded.safetensors")
        same = file.keys() == after.keys() and all(torch.equal(file[name], after[name]) for name in after)
        print(
            f"{dist.get_world_size()} processes, each with {held:.0%} of the net; {changed} bits changed by converting"
        )
        print("losses", *(f"{loss:.3f}" for loss in losses))
        print(f"{len(report.folded)} weights of the checkpoint folded, equal to the net folded in place: {same}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # the first process saves alone
    dist.init_process_group("gloo")
    shared: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    try:
        main(Path(shared[0]))
        dist.barrier()
    finally:
        shutil.rmtree(shared[0], ignore_errors=True)
        dist.destroy_process_group()
