"""What surgery is done under: modules and values are put back as they were if anything goes wrong, parameters made are
ordinary ones whatever the caller's mode, compiled code runs as it was written, no weight is a cached one, and the
collector waits."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = [
    "all_or_nothing",
    "as_written",
    "collecting_later",
    "is_recurrent",
    "plain_grad_mode",
    "uncached",
    "values_kept",
]

_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_load_state_dict_pre_hooks")
_TABLES = ("_parameters", "_modules", *_HOOKS)  # of a module: what surgery writes to
_COMPILER = "torch._dynamo"


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module keeps a second list of its weights, as RNNs do."""
    return isinstance(module.__dict__.get("_flat_weights_names"), list)


@contextmanager
def plain_grad_mode() -> Iterator[None]:
    """Parameters made here are ordinary tensors, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def as_written() -> Iterator[None]:
    """What is compiled runs as it was written: compiled code would not run hooks that were hung on meanwhile.

    torch's compiler takes most of a second to import. Where nothing has been compiled yet it is not imported for this;
    what a model compiles in its forward pass all the same is forgotten at the end, with the hooks it was compiled with.
    """
    if _COMPILER in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    try:
        yield
    finally:
        if _COMPILER in sys.modules:
            torch.compiler.reset()


@contextmanager
def uncached() -> Iterator[None]:
    """Every use of a parametrized weight computes it, within `parametrize.cached()`, too; what that has kept is
    forgotten at the end, for the weights may be others."""
    enabled = parametrize._cache_enabled
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        parametrize._cache_enabled = enabled
        parametrize._cache.clear()


@contextmanager
def all_or_nothing(*, attributes: bool = False) -> Iterator[Callable[[nn.Module], None]]:
    """Gives a function to call before a module is changed; puts classes and tables of those modules back as they were
    if anything goes wrong inside. With `attributes`, all that hangs on them, too, for what does more than exchange
    parameters."""
    before = _Before(attributes)
    try:
        yield before.save
    except BaseException:
        before.restore()
        raise


@contextmanager
def values_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Puts values back as they were if anything goes wrong inside."""
    with torch.no_grad():
        before = [(tensor, tensor.clone()) for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.inference_mode(False), torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        torch.clear_autocast_cache()  # which does not see that a Parameter was written to
        raise


class _Before:
    """Modules as they were before each of them was changed."""

    def __init__(self, attributes: bool) -> None:
        self._attributes = attributes
        self._saved: dict[int, tuple[nn.Module, type, dict[str, Any], dict[str, Any], dict[str, Any] | None]] = {}

    def save(self, module: nn.Module) -> None:
        if id(module) in self._saved:
            return
        state = module.__dict__
        tables = {}
        for name in _TABLES:
            if held := state.get(name):
                tables[name] = dict(held)
        if self._attributes or "_forward_pre_hooks" in tables or is_recurrent(module):  # which have weights there
            state = state.copy()
        entries = _parametrizations(module)
        self._saved[id(module)] = module, type(module), state, tables, None if entries is None else dict(entries)

    def restore(self) -> None:
        for module, cls, state, tables, entries in self._saved.values():
            module.__class__ = cls
            if module.__dict__ is not state:
                module.__dict__.clear()
                module.__dict__.update(state)
            for name in _TABLES:
                if name in state:
                    state[name].clear()
                    state[name].update(tables.get(name, {}))
            held = _parametrizations(module)
            if held is not None and entries is not None:
                held.clear()
                held.update(entries)


def _parametrizations(module: nn.Module) -> dict[str, Any] | None:
    """The lists of a parametrized module by name, None of any other."""
    table = module._modules.get("parametrizations")
    return table._modules if isinstance(table, nn.ModuleDict) else None


@contextmanager
def collecting_later() -> Iterator[None]:
    """Without garbage collection meanwhile: among thousands of new objects it looks through all the old ones again and
    again, and finds nothing. Afterwards it leaves the new ones until it looks through the old ones, too."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            if not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()  # what was frozen counts as old
            gc.enable()
