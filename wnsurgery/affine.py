"""A layer as the affine map it is: scale the rows or columns of its weight, in whatever form it is held, and its bias.

All arithmetic is in float64 and rounded once. New values get storage of their own: a Parameter stays the same object,
and whoever holds its old storage (a state dict taken before) keeps the old values.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from wnsurgery.errors import PairError
from wnsurgery.layers import Layer, layer_of, own_row
from wnsurgery.mechanism import WeightNormList
from wnsurgery.reparam import ZERO_LOG, Axes, Magnitude, compose, decompose
from wnsurgery.walk import Slot, slots

__all__ = ["Affine", "Holdings", "affine_of", "any_not_finite", "wide"]

_FORMS = ("plain", "ours", "torch", "legacy")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DECISIVE = ("_conv_forward", "_output_padding", "__call__", "__getattr__")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Affine:
    """A layer that is one affine map of its input.

    Attributes:
        module: the layer.
        row: its row in the layer table.
        slot: its weight.
        axes: the kept axes of the weight.
    """

    module: nn.Module = field(repr=False)
    row: Layer = field(repr=False)
    slot: Slot
    axes: Axes

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.slot.tensor is not None
        return tuple(self.slot.tensor.shape)

    @property
    def outputs(self) -> int:
        return torch.Size(self.axes.magnitude_shape(self.shape)).numel()

    @property
    def inputs(self) -> int:
        """Input channels of a Linear or a convolution; 0 for anything else."""
        if isinstance(self.module, nn.Linear):
            return self.shape[1]
        return self.shape[1] * int(self.module.groups) if isinstance(self.module, _CONVOLUTIONS) else 0

    @property
    def dimensions(self) -> int:
        """How many axes of positions follow the channels: 2 for a Conv2d, 0 for a Linear on (N, C)."""
        assert self.row.output_axis is not None
        return -self.row.output_axis - 1

    @property
    def bias(self) -> nn.Parameter | None:
        return self.module._parameters.get(str(self.row.bias))

    def tensors(self) -> list[Tensor]:
        """The Parameters that make the map."""
        return [t for t in (self.slot.magnitude, self.slot.tensor, self.bias) if t is not None]

    def forward_fault(self) -> str:
        """Why an affine map of its input cannot be taken into it; empty if it can."""
        module: Any = self.module
        if isinstance(module, nn.Linear):
            return ""
        if not isinstance(module, _CONVOLUTIONS):
            return "folding forward is exact for Linear and convolutions only"
        pads: Any = module.padding
        if pads == "same":
            pads = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        padded = pads != "valid" and any(pads)
        return "the convolution after it pads with zeros" if padded and module.padding_mode == "zeros" else ""

    # Values

    def bias_values(self) -> Tensor:
        """The bias in float64; zeros where there is none."""
        assert self.slot.tensor is not None
        bias = self.bias
        return wide(self.slot.tensor).new_zeros(self.outputs) if bias is None else wide(bias)

    def set_bias(self, values: Tensor, *, like: Tensor | None) -> None:
        """Set the bias; a new one asks for gradients as `like` does, or as the weight does."""
        bias, weight = self.bias, self.slot.tensor
        assert weight is not None
        if bias is not None:
            bias.data = values.to(bias)
            return
        trained = weight.requires_grad if like is None else like.requires_grad
        made = nn.Parameter(values.to(weight.dtype).to(weight.device), requires_grad=trained)
        self.module._parameters[str(self.row.bias)] = made

    def drop_bias(self) -> None:
        """Take the bias out; layers that cannot do without one keep it at zero."""
        bias = self.bias
        if bias is None:
            return
        if isinstance(self.module, nn.Linear | nn.Bilinear | nn.modules.conv._ConvNd):
            self.module._parameters[str(self.row.bias)] = None
        else:
            bias.data = torch.zeros_like(bias)

    def scale_outputs(self, scale: Tensor) -> None:
        """w <- scale w, one (float64) factor per output channel; of a pair, |scale| goes to g and the sign to v."""
        v, g = self.slot.tensor, self.slot.magnitude
        assert v is not None
        rows = scale.reshape(self.axes.magnitude_shape(self.shape))
        factors = self.axes.spread(rows.unsqueeze(1) if self.axes.groups > 1 else rows, v)
        if g is None:
            v.data = torch.empty_like(v).copy_(wide(v) * factors)
        elif tuple(g.shape) != tuple(rows.shape):
            self._set_weight(self._weight() * factors)
        else:
            self._settle()
            size = rows.abs()
            if self._rule()[1] == "log":
                g.data = torch.where(size == 0, ZERO_LOG, wide(g) + size.log()).to(g)
            else:
                g.data = (wide(g) * size).to(g)
            v.data = torch.empty_like(v).copy_(torch.where(factors.to(v.device) < 0, -v, v))
            self._settle()

    def scale_inputs(self, scale: Tensor, shift: Tensor, *, like: Tensor | None) -> None:
        """What it makes of scale x + shift instead of x, one factor and shift per input channel."""
        w = self._weight()
        groups = int(getattr(self.module, "groups", 1))
        blocks = w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)
        per_input = (groups, 1, w.shape[1], 1)
        added = (blocks * shift.reshape(per_input)).sum((2, 3)).flatten()
        self.set_bias(self.bias_values() + added, like=like)
        self._set_weight((blocks * scale.reshape(per_input)).reshape(w.shape))

    def _weight(self) -> Tensor:
        """The weight in float64."""
        v, g = self.slot.tensor, self.slot.magnitude
        assert v is not None
        if g is None:
            return wide(v)
        self._settle()
        return compose(wide(g), wide(v), self._rule()[0], magnitude=self._rule()[1])

    def _set_weight(self, w: Tensor) -> None:
        v, g = self.slot.tensor, self.slot.magnitude
        assert v is not None
        if g is None:
            v.data = torch.empty_like(v).copy_(w)
            return
        axes, magnitude = self._rule()
        new_g, new_v = decompose(torch.empty_like(v).copy_(w), axes, magnitude=magnitude, magnitude_dtype=g.dtype)
        g.data, v.data = new_g.reshape(g.shape), new_v
        self._settle()

    def _rule(self) -> tuple[Axes, Magnitude]:
        g, v = self.slot.magnitude, self.slot.tensor
        assert g is not None
        assert v is not None
        if self.slot.form != "ours":
            return Axes.of_pair(g.shape, v.shape), "linear"
        rule: Any = self.slot.entry[0]
        return rule.axes, rule.magnitude

    def _settle(self) -> None:
        """Writes into weights handed out earlier reach the pair before it is read, and not after it is set."""
        if self.slot.form == "ours":
            entry = self.slot.entry
            if isinstance(entry, WeightNormList):
                entry.absorb()
                entry.__dict__.pop("_handed_out", None)


def affine_of(module: nn.Module) -> Affine | str:
    """A module as an affine layer; else why it is none, "" where nobody would take it for one."""
    row = layer_of(module)
    if row is None or row.output_axis is None or row.bias is None or isinstance(module, torch.jit.ScriptModule):
        return ""
    line = [c for c in type(module).__mro__ if c.__module__ != parametrize.__name__]
    maker = next((i for i, cls in enumerate(line) if "forward" in vars(cls)), 0)
    changed = [n for cls in line[:maker] for n in (*_DECISIVE, *row.parameters, row.bias) if n in vars(cls)]
    if own_row(line[maker]) is None or changed or "forward" in vars(module):
        return f"{line[0].__name__} computes its output in a way of its own"
    weights = [s for s in slots(module) if s.module is module and s.form != "buffer" and row.axes(module, s.parameter)]
    if len(weights) != 1 or weights[0].tensor is None or is_lazy(weights[0].tensor):
        return "its weight is not there, or not alone"
    slot = weights[0]
    axes = row.axes(module, slot.parameter)
    assert axes is not None
    try:
        return Affine(module, row, slot, axes.check(slot.shape or ()))
    except PairError as error:
        return error.message


class Holdings:
    """Who holds which tensor and which memory in a model."""

    def __init__(self, model: nn.Module) -> None:
        self.names: dict[int, list[str]] = defaultdict(list)
        self.memory: dict[Any, list[str]] = defaultdict(list)
        self.modules: set[int] = set()
        seen: set[int] = set()
        for slot in slots(model):
            self.modules.add(id(slot.module))
            for tensor in (slot.tensor, slot.magnitude):
                if tensor is None or is_lazy(tensor):
                    continue
                self.names[id(tensor)].append(slot.fqn)
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    self.memory[_memory(tensor)].append(slot.fqn)

    def fault(self, layer: Affine, *, scale: bool = True) -> str:
        """Why a layer's tensors cannot be given new values; with scale=False, why its bias cannot."""
        if id(layer.module) not in self.modules:
            return "it is not a registered submodule"
        if scale and layer.slot.form not in _FORMS:
            return "its weight is under another parametrization, or quantized"
        bias = str(layer.row.bias)
        if bias not in layer.module._parameters and hasattr(layer.module, bias):
            return "its bias is not a plain parameter"
        tensors = layer.tensors() if scale else [t for t in (layer.bias,) if t is not None]
        return next((fault for tensor in tensors if (fault := self._tensor_fault(tensor))), "")

    def _tensor_fault(self, tensor: Tensor) -> str:
        own, *others = self.names[id(tensor)]
        if others:
            return f"its {own.rpartition('.')[2]} is tied: {', '.join((own, *others))}"
        if type(tensor.data) is not Tensor or tensor.layout != torch.strided or tensor.dtype not in _DTYPES:
            return f"its {own.rpartition('.')[2]} is not an ordinary floating-point tensor"
        if tensor.is_inference():
            return "it was made under inference_mode"
        sharing = [name for name in self.memory[_memory(tensor)] if name != own]
        return f"it shares memory with {sharing[0]}" if sharing else ""


def _memory(tensor: Tensor) -> Any:
    plain = type(tensor.data) is Tensor and tensor.layout == torch.strided and not tensor.is_meta and tensor.numel()
    return (tensor.device, tensor.untyped_storage().data_ptr()) if plain else id(tensor)


def wide(tensor: Tensor) -> Tensor:
    """Detached and in float64, on the CPU for devices that have no such type."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def any_not_finite(tensors: Iterable[Tensor]) -> bool:
    return any(not t.is_meta and not bool(torch.isfinite(t).all()) for t in tensors)
