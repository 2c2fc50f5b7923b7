"""The table: layer type -> its weights, their kept axes, its bias and the axis of its output channels.

What the package knows about a kind of layer stands in one row here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from wnsurgery.errors import PairError, SelectionError
from wnsurgery.reparam import Axes

__all__ = ["KeptAxes", "Layer", "has_own_forward", "layer_of", "own_row", "register_layer"]

KeptAxes = int | tuple[int, ...] | Axes | Callable[[nn.Module], Axes]


@dataclass(frozen=True)
class Layer:
    """One row: which parameters of a layer are weights, and how its output is laid out.

    Attributes:
        parameters: parameter name (or glob) -> kept axes, or a function of the module.
        bias: name of the parameter that adds to each output channel, if there is one.
        output_axis: axis of the output that indexes channels, negative; None where the output is not
            one linear map of the input (recurrent, attention, lookup), so data cannot set g.
        by_default: whether a weight is converted when nobody asks for it by name.
        registered: whether somebody else made the row, who may be wrong about a layer.
        note: why data cannot set g, or why the row is off by default; read by people.
    """

    parameters: Mapping[str, KeptAxes]
    bias: str | None = None
    output_axis: int | None = None
    by_default: bool = True
    note: str = ""
    registered: bool = False

    def axes(self, module: nn.Module, parameter: str) -> Axes | None:
        """Kept axes of a parameter of a module of this type, None where it is not a weight."""
        for name, kept in self.parameters.items():
            if parameter == name or fnmatchcase(parameter, name):
                if isinstance(kept, int):
                    return _kept_axis(kept)
                found = kept(module) if callable(kept) else kept
                if found is None or isinstance(found, Axes):
                    return found
                if not _are_axes(found):
                    raise PairError(f"{type(module).__name__}.{parameter}: {_NO_AXES}, not {found!r}")
                return Axes((found,) if isinstance(found, int) else tuple(found))
        return None

    def check(self, module: nn.Module, parameter: str, fqn: str, shape: Sequence[int]) -> None:
        """Raise PairError, with the qualified name of a weight, where a row does not fit that weight's module."""
        axes = self.axes(module, parameter)
        name, kind = f"{fqn} ({type(module).__name__})", "which register_layer names"
        try:
            None if axes is None else axes.check(shape)
        except PairError as error:
            raise PairError(f"{name}: {error.message}, {kind}") from error
        if self.bias is not None and not hasattr(module, self.bias):
            raise PairError(f"{name}: it has no {self.bias!r}, {kind} as its bias")


_NO_AXES = "kept axes are an int, a tuple of ints or a function of the module that returns these"


def _are_axes(kept: Any) -> bool:
    several = kept if isinstance(kept, tuple | list) else (kept,)
    return isinstance(kept, Axes) or all(isinstance(axis, int) and not isinstance(axis, bool) for axis in several)


@cache
def _kept_axis(axis: int) -> Axes:
    return Axes((axis,))


def _transposed(module: nn.Module) -> Axes:
    """Weight (in, out/groups, k...): one output channel is (group, axis-1 index)."""
    groups = getattr(module, "groups", 1)
    return Axes((1,), groups=groups if isinstance(groups, int) else 1)


_RECURRENT = Layer(
    {"weight_ih*": 0, "weight_hh*": 0, "weight_hr*": 0},
    note="recurrent: its pre-activations feed back, so one pass over data cannot set them",
)
_EXPERTS_OUT_IN = Layer(
    {"gate_up_proj": (0, 1), "gate_proj": (0, 1), "up_proj": (0, 1), "down_proj": (0, 1)},
    note="experts: only some rows see a given batch",
)
_EXPERTS_IN_OUT = Layer({"gate_up_proj": (0, 2), "down_proj": (0, 2)}, note="experts: only some rows see a given batch")
_ROUTER = Layer({"weight": 0}, note="a router: what it chooses is its output, not one linear map")
_STACK_OUT_IN = Layer({"weight": (0, 1)}, note="a stack of linear maps: only some of them see a given batch")
_STACK_IN_OUT = Layer({"weight": (0, 2)}, note="a stack of linear maps: their outputs are not one module's channels")
_GATES = Layer(
    {"input_gate_weight": (0, 2), "recurrent_gate_weight": (0, 2)},
    note="recurrent: its pre-activations feed back, so one pass over data cannot set them",
)
_LOOKUP = Layer({"weight": 0}, by_default=False, note="a lookup table; name it in `include` to convert it")

_by_type: dict[type, Layer] = {
    nn.Linear: Layer({"weight": 0}, bias="bias", output_axis=-1),
    nn.Bilinear: Layer({"weight": 0}, bias="bias", output_axis=-1),
    nn.Conv1d: Layer({"weight": 0}, bias="bias", output_axis=-2),
    nn.Conv2d: Layer({"weight": 0}, bias="bias", output_axis=-3),
    nn.Conv3d: Layer({"weight": 0}, bias="bias", output_axis=-4),
    nn.ConvTranspose1d: Layer({"weight": _transposed}, bias="bias", output_axis=-2),
    nn.ConvTranspose2d: Layer({"weight": _transposed}, bias="bias", output_axis=-3),
    nn.ConvTranspose3d: Layer({"weight": _transposed}, bias="bias", output_axis=-4),
    nn.Embedding: _LOOKUP,
    nn.EmbeddingBag: _LOOKUP,
    nn.RNNBase: _RECURRENT,
    nn.RNNCellBase: _RECURRENT,
    nn.MultiheadAttention: Layer(
        {"in_proj_weight": 0, "q_proj_weight": 0, "k_proj_weight": 0, "v_proj_weight": 0},
        note="attention: its packed projections are not the output of a module",
    ),
}

# Dotted class names, exact or glob: the packages they live in are never imported.
_by_name: dict[str, Layer] = {
    "transformers.pytorch_utils.Conv1D": Layer({"weight": 1}, bias="bias", output_axis=-1),
    "transformers.models.aria.modeling_aria.AriaExperts": _EXPERTS_IN_OUT,
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts": _EXPERTS_IN_OUT,
    "transformers.models.openai_privacy_filter.*Experts": _EXPERTS_IN_OUT,
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts": _EXPERTS_IN_OUT,
    "transformers.models.*.modeling_*ParallelExperts": _STACK_OUT_IN,
    "transformers.models.*.modeling_*Experts": _EXPERTS_OUT_IN,
    "transformers.models.*.modeling_*Router": _ROUTER,
    "transformers.models.*.modeling_*FlexibleLinear": _STACK_OUT_IN,
    "transformers.models.convbert.modeling_convbert.GroupedLinearLayer": _STACK_IN_OUT,
    "transformers.models.csm.modeling_csm.CsmCodebooksHead": _STACK_IN_OUT,
    "transformers.models.recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaRglru": _GATES,
}


def register_layer(
    layer: type | str,
    parameters: Mapping[str, KeptAxes] | None = None,
    *,
    bias: str | None = None,
    output_axis: int | None = None,
    by_default: bool = True,
) -> None:
    """Teach the package a layer of your own; replaces the row of the same name if there is one.

    >>> class Scale(nn.Module): ...
    >>> wn.register_layer(Scale, {"kernel": 1}, bias="shift", output_axis=-1)
    >>> wn.register_layer("mypackage.layers.Experts", {"w1": (0, 1), "w2": (0, 1)})

    Args:
        layer: class (subclasses included), or its dotted name, which may hold `*`, so that the package it
            lives in need not be imported.
        parameters: parameter name or glob -> kept axis or axes; default `{"weight": 0}`.
        bias: parameter added to each output channel, used by data-dependent initialisation.
        output_axis: axis of the module's output that indexes channels; None keeps the layer out of
            data-dependent initialisation.
        by_default: False converts it only when `include` asks for it.

    Raises SelectionError for an empty table of parameters and for names and axes of another type, TypeError for a layer
    that is neither. What only a module can show (no such bias, no such axis) is a PairError when one is planned.
    """
    table = {"weight": 0} if parameters is None else parameters
    if not isinstance(table, Mapping) or not table or not all(isinstance(name, str) for name in table):
        raise SelectionError(f"register_layer needs a mapping with at least one parameter name, not {table!r}")
    for name, kept in table.items():
        if not (callable(kept) or _are_axes(kept)):
            raise SelectionError(f"register_layer: {name}: {_NO_AXES}, not {kept!r}")
    if not (bias is None or isinstance(bias, str)):
        raise SelectionError(f"register_layer: bias is the name of a parameter or None, not {bias!r}")
    if not (output_axis is None or (isinstance(output_axis, int) and not isinstance(output_axis, bool))):
        raise SelectionError(f"register_layer: output_axis is an int or None, not {output_axis!r}")
    row = Layer(dict(table), bias, output_axis, by_default, registered=True)
    if isinstance(layer, str):
        _by_name[layer] = row
        _row_named.cache_clear()
    elif isinstance(layer, type) and issubclass(layer, nn.Module):
        _by_type[layer] = row
    else:
        raise TypeError(f"register_layer takes a module class or a dotted name, not {layer!r}")


def layer_of(module: nn.Module) -> Layer | None:
    """The row of a module: of its class or the nearest base class that has one, by type or dotted name."""
    for cls in type(module).__mro__:
        if cls in (nn.Module, torch.jit.ScriptModule):
            break
        row = own_row(cls)
        if row is not None:
            return row
    return None


def has_own_forward(module: nn.Module) -> bool:
    """Whether the output of a module comes from another forward pass than that of the class its row is for.

    >>> class Sine(nn.Linear):
    ...     def forward(self, x): return super().forward(x).sin()
    >>> has_own_forward(Sine(2, 2)), has_own_forward(nn.Linear(2, 2))
    (True, False)
    """
    kind = type(module)
    while kind.__module__ == parametrize.__name__:  # made by weight norm, over the module's own
        kind = kind.__bases__[0]
    known = next((cls for cls in kind.__mro__ if own_row(cls) is not None), kind)
    others = (getattr(kind, name, None) is not getattr(known, name, None) for name in ("forward", "_conv_forward"))
    return "forward" in module.__dict__ or any(others)


def own_row(cls: type) -> Layer | None:
    """The row of a class itself, whatever its base classes have."""
    return _by_type.get(cls) or _row_named(f"{cls.__module__}.{cls.__qualname__}")


@cache
def _row_named(name: str) -> Layer | None:
    return _by_name.get(name) or next((r for pattern, r in _by_name.items() if fnmatchcase(name, pattern)), None)
