"""Which plain weights of a checkpoint are brought under weight norm, and with which kept axes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from wnsurgery.errors import PairError, SelectionError, printable
from wnsurgery.keys import is_lookup_name, is_weight_name
from wnsurgery.reparam import Axes
from wnsurgery.states import StateDict, found_in, identity

__all__ = ["ByModel", "ByName", "Choice", "DimOption", "with_ties"]

DimOption = str | int | tuple[int, ...] | None


class Choice:
    """Decides which plain weights of a state dict are converted, and with which kept axes."""

    assumptions: tuple[str, ...] = ()

    def verdict(self, state: StateDict, key: str, tensor: Tensor) -> Axes | str:
        """The kept axes of a floating-point tensor of 2 or more dimensions, or why it is left alone."""
        raise NotImplementedError

    def wants(self, state: StateDict, key: str) -> bool:
        """Whether a weight that is under weight norm already may be re-keyed."""
        return True


class ByName(Choice):
    """Selection by names, for files whose model is not at hand.

    Args:
        include, exclude: globs on key names or on any dotted beginning of them ("decoder" takes everything under
            it), `re:` before a regular expression, or sequences of these. Paths in the file may be left out.
            Without `include`: the names torch's layers use, lookup tables left out.
        dim: kept axis or axes: "auto" (axis 0), an int, a tuple, None (one magnitude per tensor), or a mapping from
            patterns to these; the first pattern that matches decides.
    """

    def __init__(
        self,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        dim: DimOption | Mapping[str, DimOption] = "auto",
    ) -> None:
        self.include = None if include is None else _patterns("include", include)
        self.exclude = [] if exclude is None else _patterns("exclude", exclude)
        self.dim: Mapping[str, Any] = dim if isinstance(dim, Mapping) else {}
        self.fallback: Any = "auto" if isinstance(dim, Mapping) else dim
        self.assumptions = _ASSUMPTIONS if self.fallback == "auto" else _ASSUMPTIONS[1:]

    def check(self, states: Sequence[StateDict]) -> None:
        """Raise SelectionError when a pattern matches no weight of the file."""
        names = [n for s in states for n in _weight_names(s)]
        options = [("include", p) for p in self.include or ()] + [("exclude", p) for p in self.exclude]
        for option, pattern in [*options, *(("dim", p) for p in self.dim)]:
            if not any(_matches(pattern, n, path) for n, path in names):
                raise SelectionError.no_match(option, pattern, [_full(n, path) for n, path in names])

    def wants(self, state: StateDict, key: str) -> bool:
        if any(_matches(p, key, state.path) for p in self.exclude):
            return False
        return self.include is None or any(_matches(p, key, state.path) for p in self.include)

    def verdict(self, state: StateDict, key: str, tensor: Tensor) -> Axes | str:
        if any(_matches(p, key, state.path) for p in self.exclude):
            return "excluded"
        if self.include is not None:
            if not self.wants(state, key):
                return "not included"
        elif not is_weight_name(key):
            return "its name is none that torch's layers give a weight; include it by name"
        elif tensor.ndim == 2 and is_lookup_name(key):
            return "named like a lookup table (embedding); include it by name"
        return self._axes(state, key, tensor)

    def _axes(self, state: StateDict, key: str, tensor: Tensor) -> Axes:
        return self.told(state, key, tensor) or Axes((0,))

    def told(self, state: StateDict, key: str, tensor: Tensor) -> Axes | None:
        """The kept axes the user named for a weight, None where the names leave it to us."""
        wish = next((d for p, d in self.dim.items() if _matches(p, key, state.path)), self.fallback)
        if wish == "auto":
            return None
        if isinstance(wish, bool) or not (wish is None or isinstance(wish, int | tuple)):
            raise SelectionError(f'dim must be "auto", an int, a tuple, None or a mapping, not {wish!r}')
        kept = () if wish is None else wish if isinstance(wish, tuple) else (wish,)
        try:
            return Axes(kept).check(tuple(tensor.shape))
        except PairError as error:
            raise SelectionError(f"{printable(state.full(key))}: {error.message}") from error


_ASSUMPTIONS = (
    "the kept axis is 0 wherever `dim` says nothing: the outputs of Linear, Conv and RNN weights, but the inputs of a "
    "ConvTranspose, as in torch's own weight_norm, and of a Conv1D of transformers (GPT-2)",
    "weights are told by their names: a file without its model does not tell Conv from ConvTranspose, or Linear from "
    "Embedding; 2-D weights named like lookup tables (embed, emb, wte, wpe) are left out unless included",
)


class ByModel(Choice):
    """Selection by a model: exactly its planned weights, in the state dict that belongs to it.

    Args:
        path: of the state dict in the file.
        prefix: what the file puts before the model's own names ("module.").
        axes: model's name -> kept axes.
        reasons: model's name -> why it is left alone.
    """

    def __init__(self, path: str, prefix: str, axes: Mapping[str, Axes], reasons: Mapping[str, str]) -> None:
        self.path, self.prefix, self.axes, self.reasons = path, prefix, axes, reasons

    def verdict(self, state: StateDict, key: str, tensor: Tensor) -> Axes | str:
        if state.path != self.path:
            return "in a state dict that is not the model's"
        name = key.removeprefix(self.prefix)
        return self.axes.get(name) or self.reasons.get(name, "not in the model")

    def wants(self, state: StateDict, key: str) -> bool:
        return state.path == self.path


def _patterns(option: str, given: str | Sequence[str]) -> list[str]:
    patterns = [given] if isinstance(given, str) else list(given)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise SelectionError(f"{option} takes names for a file without its model, not {pattern!r}")
        if pattern.startswith("re:"):
            _expression(pattern)
    return patterns


def _expression(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern[3:])
    except re.error as error:
        raise SelectionError(f"{pattern!r} is not a regular expression: {error}") from error


def _matches(pattern: str, key: str, path: str) -> bool:
    names = (key, _full(key, path))
    if pattern.startswith("re:"):
        return any(_expression(pattern).search(name) for name in names)
    return any(fnmatchcase(start, pattern) for name in names for start in _beginnings(name))


def _beginnings(name: str) -> Iterator[str]:
    """The name and every dotted beginning of it: a.b.weight, a.b, a."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _weight_names(state: StateDict) -> Iterator[tuple[str, str]]:
    """(plain key, path) of every tensor of 2 or more dimensions, pairs under the name they fold to."""
    halves = {key: pair.plain_key for pair in found_in(state).pairs for key in pair.keys[:2]}
    for key, tensor in state.tensors.items():
        if tensor.ndim >= 2 or key in halves:
            yield halves.get(key, key), state.path


def _full(key: str, path: str) -> str:
    return f"{path}.{key}" if path else key


def with_ties(choose: Choice) -> Choice:
    """The same choice, with every name of a tied tensor going the same way."""
    return _Tied(choose) if isinstance(choose, ByName) else choose


class _Tied(Choice):
    """A lookup table tied to a chosen weight goes with it; a weight tied to an excluded one stays."""

    def __init__(self, inner: ByName) -> None:
        self.inner = inner
        self.groups: dict[int, dict[Any, list[str]]] = {}

    def wants(self, state: StateDict, key: str) -> bool:
        return self.inner.wants(state, key)

    def verdict(self, state: StateDict, key: str, tensor: Tensor) -> Axes | str:
        own = self.inner.verdict(state, key, tensor)
        for other in self._ties(state, tensor):
            if other != key:
                theirs = self.inner.verdict(state, other, state.entries[other])
                if theirs == "excluded" and isinstance(own, Axes):
                    return f"tied to {printable(other)}, which is excluded"
                if isinstance(theirs, Axes) and isinstance(own, str) and own != "excluded":
                    own = theirs
                elif isinstance(theirs, Axes) and isinstance(own, Axes) and theirs != own:
                    raise SelectionError(f"{printable(key)} and {printable(other)} are tied under different kept axes")
        return own

    def _ties(self, state: StateDict, tensor: Tensor) -> list[str]:
        groups = self.groups.get(id(state.entries))
        if groups is None:
            groups = self.groups[id(state.entries)] = {}
            for key, other in state.tensors.items():
                groups.setdefault(identity(other), []).append(key)
        return groups[identity(tensor)]
