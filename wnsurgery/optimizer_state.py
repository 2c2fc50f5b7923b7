"""An optimizer's state beside weights that are replaced: what belonged to them goes, and it is said what went.

A file numbers an optimizer's parameters in the order in which the model had them, and does not name them. Where
a state dict of the same file has as many parameters with the same shapes in the same order, the numbers can be
told; where not, the whole state goes, since momentum on the wrong weight is worse than none. An earlier surgery has
left gaps in the numbers, which torch itself never does: there went the weights that it replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Parameters", "is_flat_optimizer", "without_states"]

_FLAT = ("state.", "param_groups.")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "log_scale", "_log_scale")


@dataclass(frozen=True)
class Parameters:
    """One state dict before the change: its tensors in order, each tie once, the keys that go, and those of g and v."""

    tensors: Mapping[str, Tensor]
    gone: frozenset[str]
    path: str = ""
    pairs: Sequence[Sequence[str]] = ()

    def candidates(self) -> list[tuple[str, Tensor]]:
        """What may be parameters: floating-point tensors that are no buffer torch's layers are known for."""
        return [
            (key, tensor)
            for key, tensor in self.tensors.items()
            if tensor.is_floating_point() and not tensor.is_nested and not key.endswith(_BUFFERS)
        ]


def without_states(optimizer: Mapping[Any, Any], states: Sequence[Parameters]) -> tuple[dict[Any, Any], str] | None:
    """The optimizer's state dict without what belongs to replaced parameters, and a sentence that says so.

    >>> adam = {"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    >>> sd = {"weight": torch.ones(2, 2)}
    >>> without_states(adam, [Parameters(sd, frozenset({"weight"}))])[0]
    {'state': {}, 'param_groups': [{'lr': 0.1, 'params': []}]}

    None where nothing of it belongs to a replaced parameter.
    """
    if is_flat_optimizer(optimizer):
        return _without_flat_states(optimizer, states)
    state, groups = optimizer["state"], optimizer["param_groups"]
    if not isinstance(state, Mapping) or not isinstance(groups, list | tuple):
        return None
    if not all(isinstance(group, Mapping) for group in groups):
        return None
    numbers = [p for group in groups for p in _listed(group)]
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


def _without_flat_states(entries: Mapping[Any, Any], states: Sequence[Parameters]) -> tuple[dict[Any, Any], str] | None:
    """The same for a state flattened by names: `state.NAME.exp_avg`, `param_groups.NAME.lr`."""
    gone = _full_names(states)
    owners = {key: key.partition(".")[2].rpartition(".")[0] for key in entries if isinstance(key, str)}
    ours = {key: owner for key, owner in owners.items() if key.startswith(_FLAT) and owner}
    lost = {key for key, owner in ours.items() if owner in gone}
    if not lost:
        return None
    told = (
        f"{len({ours[k] for k in lost})} of {len(set(ours.values()))} parameters were replaced; their state is dropped"
    )
    return {key: value for key, value in entries.items() if key not in lost}, told


def is_flat_optimizer(entries: Mapping[Any, Any]) -> bool:
    """Whether all keys of a dict are those of an optimizer's state flattened by names.

    >>> is_flat_optimizer({"state.fc.weight.step": 1, "param_groups.fc.weight.lr": 0.1})
    True
    """
    named = all(isinstance(key, str) and key.startswith(_FLAT) for key in entries)
    return named and len({key.partition(".")[0] for key in entries}) == len(_FLAT)


def _full_names(states: Sequence[Parameters]) -> set[str]:
    """The keys that go, with and without the path of their state dict."""
    return {full for s in states for key in s.gone for full in (key, f"{s.path}.{key}")}


def _listed(group: Mapping[Any, Any]) -> list[Any]:
    listed = group.get("params")
    return list(listed) if isinstance(listed, list | tuple) else []


def _matched(numbers: list[Any], state: Mapping[Any, Any], states: Sequence[Parameters]) -> dict[Any, bool] | None:
    """For every parameter of the optimizer whether it is replaced; None where that cannot be told."""
    if numbers and all(isinstance(n, str) for n in numbers):  # saved by name, as distributed training does
        gone = _full_names(states)
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
        elif _has_gaps(numbers):
            found += [fit for wide in (1, 2) if (fit := _beside_gaps(numbers, state, candidate, wide)) is not None]
    return found[0] if found and all(f == found[0] for f in found) else None


def _has_gaps(numbers: list[Any]) -> bool:
    """Whether numbers rise and leave some out before the last."""
    return all(isinstance(n, int) for n in numbers) and sorted(set(numbers)) == numbers != list(range(len(numbers)))


def _beside_gaps(
    numbers: list[Any], state: Mapping[Any, Any], candidate: Parameters, wide: int
) -> dict[Any, bool] | None:
    """For every parameter whether it is replaced, where each gap of `wide` numbers is a weight replaced earlier.

    A gap is one number wide where the optimizer knew a plain weight, two where it knew g and v.
    """
    tensors, left, at = dict(candidate.candidates()), set(numbers), 0
    halves = {key: pair for pair in candidate.pairs for key in pair}
    found: dict[Any, bool] = {}
    for key in list(tensors):
        entry = [k for k in halves.get(key, (key,)) if k in tensors]
        if not entry:  # the other half of a pair that is done
            continue
        known = [tensors.pop(k) for k in sorted(entry, key=list(tensors).index)]
        if at not in left:
            if not left.isdisjoint(range(at, at + wide)) or (len(known) == 1 and known[0].ndim < 2):
                return None
            at += wide
            continue
        for tensor in known:
            if at not in left or not _could_be(state.get(at), tensor):
                return None
            found[at] = key in candidate.gone
            at += 1
    return found if len(found) == len(numbers) else None


def _could_be(entry: Any, parameter: Tensor) -> bool:
    """Whether the state of one parameter fits it: per-element moments have its shape."""
    if not isinstance(entry, Mapping):
        return entry is None
    shaped = [t for t in entry.values() if isinstance(t, Tensor) and t.ndim]
    return all(t.shape == parameter.shape for t in shaped)
