"""A checkpoint file read into memory; nothing in it is executed without trust.

Whole modules are read without executing the file when they consist of torch.nn's classes and ours.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wnsurgery.errors import PairError, printable
from wnsurgery.hosts import WeightNormDict, rebuild_parametrized
from wnsurgery.mean_only import MeanOnlyBatchNorm1d, MeanOnlyBatchNorm2d, MeanOnlyBatchNorm3d
from wnsurgery.mechanism import PASSING, WeightNormList
from wnsurgery.reparam import Axes, WeightNorm
from wnsurgery.stores import Stored, read_store
from wnsurgery.stores.modules import ModulePolicy

__all__ = ["Path_", "read"]

Path_ = str | os.PathLike[str]


def read(path: Path_, trust_pickle: bool) -> Stored:
    """What a file holds; without trust, only if it is tensors, plain containers and modules that the policy knows.

    Raises InputMissingError, InputError, UnsafeFileError.
    """
    policy = _policy()
    stored = read_store(path, trust_pickle=trust_pickle, allow=policy.allow)
    if not trust_pickle:
        policy.vet(stored.content, Path(path))
    return stored


def _policy() -> ModulePolicy:
    """torch.nn's classes and the ones this package puts into a converted module."""
    own = (
        WeightNormDict,
        WeightNormList,
        WeightNorm,
        Axes,
        MeanOnlyBatchNorm1d,
        MeanOnlyBatchNorm2d,
        MeanOnlyBatchNorm3d,
    )
    rebuild = rebuild_parametrized
    return ModulePolicy(
        {f"{cls.__module__}.{cls.__qualname__}": cls for cls in own},
        {f"{rebuild.__module__}.{rebuild.__qualname__}": rebuild},
        _fault,
    )


def _fault(module: nn.Module) -> str:
    """What is wrong with a module from a file that claims to be under our weight norm; "" if nothing is."""

    table: Any = module._modules["parametrizations"]
    known = type(table) in (nn.ModuleDict, WeightNormDict)  # the former where torch made it first
    for name, entry in table._modules.items() if known else [("", None)]:
        if type(entry) is not WeightNormList or list(entry._modules) != ["0"] or not PASSING.isdisjoint(vars(entry)):
            return "its parametrization is not weight norm"
        rule, g, v = entry._modules["0"], entry._parameters.get("original0"), entry._parameters.get("original1")
        if type(rule) is not WeightNorm or g is None or v is None or not _is_sound_rule(vars(rule), g, v):
            return f"the pair of {printable(name)} does not fit"
        if not isinstance(vars(type(module)).get(name), property):
            return f"{printable(name)} is not parametrized in its class"
    return ""


def _is_sound_rule(rule: Mapping[str, Any], g: Tensor, v: Tensor) -> bool:
    """Whether the attributes of a WeightNorm from a file are what its constructor makes, and fit the pair."""
    axes, dtype = rule.get("axes"), rule.get("magnitude_dtype", 0)
    if type(axes) is not Axes or rule.get("magnitude") not in ("linear", "log"):
        return False
    kept, groups = vars(axes).get("kept"), vars(axes).get("groups")
    if type(groups) is not int or type(kept) is not tuple or any(type(axis) is not int for axis in kept):
        return False
    try:
        fits = tuple(g.shape) == axes.check(v.shape).magnitude_shape(v.shape)
    except PairError:
        return False
    return fits and groups > 0 and (dtype is None or isinstance(dtype, torch.dtype))
