"""Forward passes of torch's own layers that take their weight by a short way.

They do what the layers' own do, with what a layer under weight norm knows beyond `module.weight`: that the weight goes
nowhere but into its operation, that a large one can be computed with the output, that few rows of a table are asked
for, and that a weight which a pass reads several times is the same each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from wnsurgery import large_linear
from wnsurgery.mechanism import WeightNormList, at_hand

__all__ = ["forward_of", "read_before"]

_is_compiling, _is_tracing, _grad_enabled = torch.compiler.is_compiling, torch._C._is_tracing, torch.is_grad_enabled
_in_function_mode, _dispatch_modes = torch._C._is_torch_function_mode_enabled, torch._C._len_torch_dispatch_stack
_READERS = (  # which read some weight several times, or by `self.weight` alone
    *(nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell, nn.MultiheadAttention, nn.Bilinear),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def forward_of(base: Any, names: tuple[str, ...]) -> Any:
    """A forward pass that does what the class' own does, where that is torch's, for weights of these names; None for
    others."""
    if any(base.forward is reader.forward for reader in _READERS):
        return _each_once(base.forward)
    if "weight" not in names or hasattr(base, "bias") or base.__getattr__ is not nn.Module.__getattr__:
        return None  # the class has a say in what `self.bias` is
    if base.forward is nn.Embedding.forward:
        return _look_up
    if base.forward is nn.Linear.forward:
        return _map
    for theirs in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if base.forward is theirs.forward and base._conv_forward is theirs._conv_forward:
            return _convolve
    return None


class _Reading(threading.local):
    """The weights that the forward pass in hand has read, by `id` of their modules and by name."""

    now: dict[int, dict[str, Tensor]] | None = None


_reading = _Reading()


def _each_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward pass that finds the same weight each time it reads one of its own, or of its output projection, as it
    would a plain one."""

    @wraps(forward)
    def once(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _is_compiling() or not _grad_enabled() or _is_watched():
            return forward(self, *args, **kwargs)
        outer = _reading.now
        _reading.now = {id(self): {}, id(self._modules.get("out_proj")): {}}
        try:
            return forward(self, *args, **kwargs)
        finally:
            _reading.now = outer

    return once


def read_before(module: nn.Module, name: str, entry: WeightNormList) -> Tensor | None:
    """In training, the weight that the forward pass in hand has of its module; None where nobody reads it but once."""
    now = _reading.now
    if now is None or _is_watched():
        return None
    held = now.get(id(module))
    if held is None:
        return None
    w = held.get(name)
    if w is None:
        w = held[name] = entry.in_training(private=True)
    return w


def _is_watched() -> bool:
    """Whether somebody watches what is done with a weight."""
    return bool(_is_tracing() or _in_function_mode() or _dispatch_modes())


def _look_up(self: nn.Embedding, input: Tensor) -> Tensor:
    """An embedding's forward pass; in training, where few rows are asked for, from those rows of g and v alone."""
    if self.max_norm is not None:  # the pass writes into the weight
        return nn.Embedding.forward(self, input)
    if not _grad_enabled():
        w = None if _is_compiling() else at_hand(self, "weight")
        own = _own_entry(self) if w is None else None
        w = own.in_evaluation() if own is not None else w
        return nn.Embedding.forward(self, input) if w is None else _rows_of(self, input, w)
    entry, found = _entry(self), None
    if type(entry) is WeightNormList and not (self.sparse or self.scale_grad_by_freq):
        found = entry.rows(input, self.padding_idx)
    if found is not None:
        return found
    own = _own_entry(self)
    return nn.Embedding.forward(self, input) if own is None else _rows_of(self, input, own.in_training(private=True))


def _rows_of(self: nn.Embedding, input: Tensor, w: Tensor) -> Tensor:
    return F.embedding(input, w, self.padding_idx, None, self.norm_type, self.scale_grad_by_freq, self.sparse)


def _map(self: nn.Linear, input: Tensor) -> Tensor:
    """A linear layer's forward pass; in training, a large weight is computed with the layer's output."""
    if not _grad_enabled() and not _is_compiling() and (w := at_hand(self, "weight")) is not None:
        return F.linear(input, w, _bias(self))
    entry = _own_entry(self)
    if entry is not None and _grad_enabled():
        v, bias = entry._parameters.get("original1"), _bias(self)
        large = v is not None and v.numel() > large_linear.LARGE_WEIGHT and entry._deferred is None
        y = entry.linear(input, bias) if large else None
        return F.linear(input, entry.in_training(private=True), bias) if y is None else y
    return nn.Linear.forward(self, input) if entry is None else F.linear(input, entry.in_evaluation(), _bias(self))


def _convolve(self: Any, input: Tensor) -> Tensor:
    """A convolution's forward pass."""
    if not _grad_enabled() and not _is_compiling() and (w := at_hand(self, "weight")) is not None:
        return self._conv_forward(input, w, _bias(self))  # type: ignore[no-any-return]
    entry = _own_entry(self)
    if entry is not None:
        w = entry.in_training(private=True) if _grad_enabled() else entry.in_evaluation()
        return self._conv_forward(input, w, _bias(self))  # type: ignore[no-any-return]
    return self._conv_forward(input, self.weight, self.bias)  # type: ignore[no-any-return]


def _own_entry(module: nn.Module) -> WeightNormList | None:
    """What holds the weight of a layer, for the layer's own use; None where somebody watches what is done with the
    weight, or wants it in another way."""
    if _is_compiling() or parametrize._cache_enabled or _is_tracing():
        return None
    if _grad_enabled() and (_in_function_mode() or _dispatch_modes()):
        return None
    entry = _entry(module)
    if type(entry) is not WeightNormList or entry._forward_hooks or entry._forward_pre_hooks:
        return None
    return None if "forward" in entry.__dict__ else entry


def _bias(module: nn.Module) -> Any:
    """`module.bias`, past the search that `nn.Module` begins once Python's own has failed."""
    state = module.__dict__
    held = state["_parameters"]
    return held["bias"] if "bias" in held and "bias" not in state else module.bias


def _entry(module: nn.Module) -> Any:
    """What holds the weight of a layer; None for one that was taken out of weight norm through a copy, or whose bound
    method somebody kept."""
    table = module._modules.get("parametrizations")
    return None if table is None else table._modules.get("weight")
