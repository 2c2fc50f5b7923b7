"""An optimizer's state beside weights that are replaced: what belonged to them goes, and it is said what went.

A file numbers an optimizer's parameters in the order in which the model had them, and does not name them. Where
a state dict of the same file has as many parameters with the same shapes in the same order, the numbers can be
told; where not, the whole state goes, since momentum on the wrong weight is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Parameters", "without_states"]

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "log_scale", "_log_scale")


@dataclass(frozen=True)
class Parameters:
    """One state dict before the change: its tensors in order, each tie once, and the keys that go."""

    tensors: Mapping[str, Tensor]
    gone: frozenset[str]
    path: str = ""

    def candidates(self) -> list[tuple[str, Tensor]]:
        """What may be parameters: floating-point tensors that are no buffer torch's layers are known for."""
        return [
            (key, tensor)
            for key, tensor in self.tensors.items()
            if tensor.is_floating_point() and not key.endswith(_BUFFERS)
        ]


def without_states(optimizer: Mapping[Any, Any], states: Sequence[Parameters]) -> tuple[dict[Any, Any], str] | None:
    """The optimizer's state dict without what belongs to replaced parameters, and a sentence that says so.

    >>> adam = {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    >>> sd = {"weight": torch.ones(2, 2)}
    >>> without_states(adam, [Parameters(sd, frozenset({"weight"}))])[0]
    {'state': {}, 'param_groups': [{'lr': 0.1, 'params': []}]}

    None where nothing of it belongs to a replaced parameter.
    """
    state, groups = optimizer["state"], optimizer["param_groups"]
    if not isinstance(state, Mapping) or not isinstance(groups, list | tuple):
        return None
    numbers = [p for group in groups if isinstance(group, Mapping) for p in _listed(group)]
    names = _matched(numbers, state, states)
    if names is None:
        if not state:
            return None
        return {**optimizer, "state": {}}, "its parameters cannot be told by shape; all of its state is dropped"
    dropped = {number for number, gone in names.items() if gone}
    if not dropped:
        return None
    kept = {k: v for k, v in state.items() if k not in dropped}
    fewer = [{**g, "params": [p for p in _listed(g) if p not in dropped]} for g in groups]
    told = f"{len(dropped)} of {len(names)} parameters were replaced; their state is dropped"
    return {**optimizer, "state": kept, "param_groups": fewer}, told


def _listed(group: Mapping[Any, Any]) -> list[Any]:
    listed = group.get("params")
    return list(listed) if isinstance(listed, list | tuple) else []


def _matched(numbers: list[Any], state: Mapping[Any, Any], states: Sequence[Parameters]) -> dict[Any, bool] | None:
    """For every parameter of the optimizer whether it is replaced; None where that cannot be told."""
    if numbers and all(isinstance(n, str) for n in numbers):  # saved by name, as distributed training does
        gone = {full for s in states for key in s.gone for full in (key, f"{s.path}.{key}")}
        return {n: n in gone for n in numbers}
    if len(set(map(repr, numbers))) != len(numbers) or not numbers:
        return None
    found = []
    for candidate in states:
        parameters = candidate.candidates()
        if len(parameters) == len(numbers) and all(
            _could_be(state.get(n), tensor) for n, (_, tensor) in zip(numbers, parameters, strict=True)
        ):
            found.append({n: key in candidate.gone for n, (key, _) in zip(numbers, parameters, strict=True)})
    return found[0] if found and all(f == found[0] for f in found) else None


def _could_be(entry: Any, parameter: Tensor) -> bool:
    """Whether the state of one parameter fits it: per-element moments have its shape."""
    if not isinstance(entry, Mapping):
        return entry is None
    shaped = [t for t in entry.values() if isinstance(t, Tensor) and t.ndim]
    return all(t.shape == parameter.shape for t in shaped)
