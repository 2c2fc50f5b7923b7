"""What surgery itself costs: per layer on many small layers, copying and loading, folding files, starting up."""

from __future__ import annotations

import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from wnsurgery.data_init import data_dependent_init
from wnsurgery.plan import plan_weight_norm
from wnsurgery.surgery import apply_weight_norm, fold_weight_norm

__all__ = ["Figures", "many_layers", "one_batch", "one_file", "start_up"]

Figures = dict[tuple[str, str], float]  # (work, variant) -> seconds; the first variant of a work is what it is held to


def _timed(action: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def _small(layers: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))


def _torch_apply(model: nn.Module) -> nn.Module:
    for layer in model.children():
        parametrizations.weight_norm(layer)
    return model


def _torch_remove(model: nn.Module) -> nn.Module:
    for layer in model.children():
        parametrize.remove_parametrizations(layer, "weight")
    return model


def many_layers(layers: int) -> Figures:
    """Seconds per layer of planning, applying, copying, loading and folding a net of so many small Linear layers."""
    plain, ours, theirs = _small(layers), _small(layers), _small(layers)
    found: Figures = {}
    found["apply", "torch"], _ = _timed(lambda: _torch_apply(theirs))
    found["apply", "ours"], _ = _timed(lambda: apply_weight_norm(ours))
    found["plan", "ours"], _ = _timed(lambda: plan_weight_norm(plain))
    for variant, model in (("plain", plain), ("torch", theirs), ("ours", ours)):
        found["deepcopy", variant], _ = _timed(lambda m=model: copy.deepcopy(m))  # type: ignore[misc]
        state = model.state_dict()
        found["load_state_dict", variant], _ = _timed(lambda m=model, s=state: m.load_state_dict(s))  # type: ignore[misc]
    found["fold", "torch"], _ = _timed(lambda: _torch_remove(theirs))
    found["fold", "ours"], _ = _timed(lambda: fold_weight_norm(ours))
    return {key: seconds / layers for key, seconds in found.items()}


def one_batch(repeats: int) -> Figures:
    """Data-dependent initialisation from one batch, beside one forward pass of the plain net."""

    def make() -> nn.Module:
        return nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(512, 512), nn.ReLU())))

    plain, ours, x = make(), apply_weight_norm(make()), torch.randn(256, 512)
    forward, init = [], []
    for _ in range(repeats + 1):
        with torch.no_grad():
            forward.append(_timed(lambda: plain(x))[0])
        init.append(_timed(lambda: data_dependent_init(ours, x))[0])
    return {
        ("data init", "forward"): statistics.median(forward[1:]),
        ("data init", "ours"): statistics.median(init[1:]),
    }


def one_file(megabytes: int) -> Figures:
    """Folding a .safetensors file of this size, imports apart, beside copying its bytes."""
    import shutil

    from safetensors.torch import save_file

    from wnsurgery.files import fold_checkpoint

    rows = max(1, megabytes * (1 << 18) // 4096 // 8)
    with tempfile.TemporaryDirectory() as place:
        source = Path(place, "a.safetensors")
        tensors = {}
        for i in range(8):
            v = torch.randn(rows, 4096)
            tensors[f"{i}.weight_g"], tensors[f"{i}.weight_v"] = v.norm(dim=1, keepdim=True) * 2, v
        save_file(tensors, source)
        del tensors
        copied, _ = _timed(lambda: shutil.copyfile(source, Path(place, "b.safetensors")))
        folded, _ = _timed(lambda: fold_checkpoint(source, Path(place, "c.safetensors")))
    return {("fold file", "cp"): copied, ("fold file", "ours"): folded}


def start_up(repeats: int) -> Figures:
    """New processes: the help text beside bare click, the import beside a bare interpreter."""
    codes = {
        ("--help", "click"): ["-c", "import click"],
        ("--help", "ours"): ["-m", "wnsurgery", "--help"],
        ("import", "python"): ["-c", "pass"],
        ("import", "ours"): ["-c", "import wnsurgery"],
    }
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in codes}
    for _ in range(repeats + 1):
        for key, code in codes.items():
            run = lambda c=code: subprocess.run([sys.executable, *c], capture_output=True, check=True)  # noqa: E731
            samples[key].append(_timed(run)[0])
    return {key: statistics.median(times[1:]) for key, times in samples.items()}
