"""One process of a gloo group for tests/test_deferred.py: trains on half of each batch."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from test_deferred import data, made
from torch import nn

import wnsurgery as wn


def train(rank: int, views: bool) -> dict[str, Any]:
    model = made()
    if rank:  # what rank 0 holds counts
        nn.init.zeros_(model[3].bias)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    wn.apply_weight_norm(model, optimizer=optimizer, mode="deferred")
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=views)
    for step in range(10):
        with ddp.no_sync():  # the gradients of half a batch wait for the other half
            for part in range(2):
                x, y = data(2 * step + part)
                half = slice(4 * rank, 4 * rank + 4)
                loss = (ddp(x[half]) - y[half]).square().mean()
                if part == 0:
                    loss.backward()
        loss = (ddp(x[half]) - y[half]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}


def main() -> None:
    directory, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=100))
    torch.save({str(views): train(rank, views) for views in (False, True)}, directory / f"{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # threads that gloo has not yet joined have ended an interpreter's exit in std::terminate


if __name__ == "__main__":
    main()
