"""The two ways a converted net can run: weights computed in every forward pass, or once per optimizer step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from wnsurgery.deferred import DeferredGroup, DeferredWeight, weight_of
from wnsurgery.errors import ModeError, SelectionError
from wnsurgery.loans import outstanding
from wnsurgery.mechanism import WeightNormList
from wnsurgery.pairs import pairs
from wnsurgery.walk import is_watched, slots

__all__ = ["Mode", "check_can_defer", "check_mode", "set_weight_norm_mode"]

Mode = Literal["parametrized", "deferred"]

M = TypeVar("M", bound=nn.Module)


def set_weight_norm_mode(model: M, mode: Mode) -> M:
    """Choose how a converted model runs, at any time, in place; returns the model.

    "parametrized", the default after `apply_weight_norm`: `module.weight` is computed from g and v wherever it is used,
    as a part of the graph. "deferred": it is a leaf, so that the net runs and differentiates as a plain one, also under
    `torch.compile`. Gradients gather on the leaf over any number of backward passes and pass to g and v once, when
    somebody looks at `g.grad` or `v.grad`: an optimizer, `clip_grad_norm_`, `GradScaler`, `zero_grad`, a log. After a
    step of any torch optimizer all weights are made anew, in place. A tied weight has one mode in all its owners, those
    outside of `model`, too. Parameters, state dicts, copies, folding are
    the same in both modes; training takes the same course to rounding.

    >>> model = wn.set_weight_norm_mode(wn.apply_weight_norm(nn.Linear(3, 2)), "deferred")
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> model(torch.ones(1, 3)).sum().backward()
    >>> model.weight.is_leaf, model.parametrizations.weight.original0.grad is None
    (True, False)

    What deferred mode cannot do raises ModeError: second derivatives through g and v
    (`backward(create_graph=True)`), hooks on the gradients of g and v, and optimizers that step within the backward
    pass. g and v are not in the graph: `torch.autograd.grad` with respect to them finds them unused, which torch
    reports (`allow_unused=True` gives None), and in `backward(inputs=[...])` it takes `module.weight` to reach them,
    for torch passes over g and v there in silence. Penalties on the gradient with respect to inputs work. Copies and
    pickles of the model, and what FSDP, exporters, and `functional_call` with other tensors than its own make of it,
    run in the default mode. Under `torch.compile`, a write into g or v by other means than an optimizer or
    `load_state_dict` is seen at the next eager use of the layer; call this function again after it.

    Args:
        model: a module tree under our weight norm. Torch's own has only its one mode and is left as it is.
        mode: "parametrized" or "deferred".

    Raises SelectionError for another mode or a model without weight norm, ModeError when g or v has a gradient hook
    or an optimizer in the backward pass.
    """
    check_mode(mode)
    entries = _entries(model)
    if mode == "parametrized":
        for entry, _ in entries:
            weight = entry._deferred or weight_of(*entry.pair())
            for owner in list(weight.owners) if weight is not None else ():
                owner.undefer()
        return model
    known: dict[tuple[int, int], DeferredWeight | None] = {}
    for entry, key in entries:
        if entry._deferred is not None:
            known[key] = entry._deferred
            entry._refresh()
        else:
            _check_hooks(entry.pair())
    group = next((weight.group for weight in known.values() if weight is not None), None) or DeferredGroup()
    for entry, key in entries:
        if entry._deferred is None:
            known[key] = entry.defer(known.get(key) or weight_of(*entry.pair()), group)
        weight = known[key]
        for other in outstanding.beside(entry, entry.pair()[1]):  # who has handed out nothing follows at its next use
            if other._deferred is None and weight is not None:
                other.defer(weight, group)
    group.renew(weight for weight in group.weights if weight.kept is None)
    return model


def check_can_defer(model: nn.Module) -> None:
    """ModeError where a weight that is under our weight norm already cannot be deferred."""
    for slot in slots(model, plain=False):
        if slot.form == "ours":
            _check_hooks(half for half in (slot.magnitude, slot.tensor) if half is not None)


def _check_hooks(pair: Iterable[Tensor]) -> None:
    if any(is_watched(half) for half in pair):
        raise ModeError(
            "g or v has a hook on its gradient, or an optimizer in the backward pass: deferred mode runs none"
        )


def check_mode(mode: str) -> None:
    """SelectionError for a mode that does not exist."""
    if mode not in ("parametrized", "deferred"):
        raise SelectionError(f'mode must be "parametrized" or "deferred", not {mode!r}')


def _entries(model: nn.Module) -> list[tuple[WeightNormList, tuple[int, int]]]:
    """The lists of our weight norm in a model, each with its pair's identity."""
    found: list[tuple[WeightNormList, tuple[int, int]]] = []
    for pair in pairs(model):
        for owner in pair.owners:
            table: Any = owner.module._modules.get("parametrizations")
            entry = None if table is None else table._modules.get(owner.parameter)
            if isinstance(entry, WeightNormList):
                found.append((entry, (id(pair.g), id(pair.v))))
    return found
