"""State-dict key algebra: recognise, pair and rename the three layouts. Strings and shapes only, no tensors.

    parametrized   P.parametrizations.NAME.original0 (g)   P.parametrizations.NAME.original1 (v)
    legacy         P.NAME_g                                P.NAME_v
    plain          P.NAME

A pair that stores the logarithm of g (g = e^s) has a third entry, P.parametrizations.NAME.0.log_scale or
P.NAME_log_scale, so that a file tells, and a model that knows only the linear g refuses it.

Other things use the same spellings: hook-based spectral norm writes `weight_v` (with `weight_u`,
`weight_orig`), other parametrizations write `original0` and `original1`, some attention layers own a
`weight_q`, `weight_k`, `weight_v`. What is clearly not weight norm is left alone with a reason; what is clearly broken
weight norm is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from wnsurgery.errors import PairError, printable

__all__ = [
    "Found",
    "Layout",
    "Pair",
    "find_pairs",
    "flat_pairs",
    "is_lookup_name",
    "is_weight_name",
    "pair_of",
]

Layout = Literal["parametrized", "legacy"]
Shape = Sequence[int]
Fits = Callable[[Shape, Shape], bool]

_STEM = re.compile(r"(?P<prefix>(?:.*\.)?)parametrizations\.(?P<name>[^.]*)\.(?P<tail>.+)", re.DOTALL)
_HALF = re.compile(r"(?P<prefix>(?:.*\.)?)(?P<name>[^.]*)_(?P<half>[gv])", re.DOTALL)
_SIBLING = re.compile(r"(?P<stem>.+)_(?:[a-fh-uw-z]|orig|bar)", re.DOTALL)
_WEIGHT_NAME = re.compile(r"weight(?:_(?:ih|hh|hr)(?:_l\d+)?(?:_reverse)?)?|in_proj_weight|[qkv]_proj_weight")
_MARK = "0.log_scale"
_LOOKUP_NAME = re.compile(r"embed|(?:^|[._])(?:emb|wte|wpe)(?:[._]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """One weight under weight norm in a state dict.

    >>> Pair("ups.0.", "weight", "legacy").g_key
    'ups.0.weight_g'
    >>> Pair("", "h_mat", "parametrized").v_key
    'parametrizations.h_mat.original1'

    Attributes:
        prefix: qualified name of the module with the dot behind it, "" at the root: a name may itself begin with a dot.
        name: the tensor's name ("weight", "weight_hh_l0", "h_mat").
        layout: how the two halves are named.
        log: whether the state dict says that it stores the logarithm of g.
    """

    prefix: str
    name: str
    layout: Layout
    log: bool = False

    @property
    def plain_key(self) -> str:
        """Key of the folded weight."""
        return self._join(self.name)

    @property
    def g_key(self) -> str:
        """Key of the magnitude."""
        return self._join(f"{self.name}_g" if self.layout == "legacy" else f"parametrizations.{self.name}.original0")

    @property
    def v_key(self) -> str:
        """Key of the direction."""
        return self._join(f"{self.name}_v" if self.layout == "legacy" else f"parametrizations.{self.name}.original1")

    @property
    def mark_key(self) -> str:
        """Key of the entry that says that g is stored as its logarithm."""
        legacy = f"{self.name}_log_scale"
        return self._join(legacy if self.layout == "legacy" else f"parametrizations.{self.name}.{_MARK}")

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key of the pair, magnitude and direction first."""
        return (self.g_key, self.v_key, *((self.mark_key,) if self.log else ()))

    def named(self, layout: Layout, *, log: bool = False) -> Pair:
        """The same pair in another layout."""
        return replace(self, layout=layout, log=log)

    def _join(self, tail: str) -> str:
        return self.prefix + tail


@dataclass(frozen=True)
class Found:
    """What `find_pairs` saw: the pairs, and look-alikes left alone as (key, reason)."""

    pairs: tuple[Pair, ...]
    left: tuple[tuple[str, str], ...]


def pair_of(plain_key: str, layout: Layout, *, log: bool = False) -> Pair:
    """The pair a plain weight becomes.

    >>> pair_of("rnn.weight_hh_l0", "legacy").v_key
    'rnn.weight_hh_l0_v'
    """
    prefix, dot, name = plain_key.rpartition(".")
    return Pair(prefix + dot, name, layout, log)


def is_weight_name(key: str) -> bool:
    """Whether the last part of a key is a name torch's own layers give a weight.

    >>> [is_weight_name(k) for k in ("a.weight", "rnn.weight_ih_l1_reverse", "attn.in_proj_weight", "a.bias")]
    [True, True, True, False]
    """
    return _WEIGHT_NAME.fullmatch(key.rpartition(".")[2]) is not None


def is_lookup_name(key: str) -> bool:
    """Whether a key reads like a lookup table (an embedding), which weight norm is not for.

    >>> [is_lookup_name(k) for k in ("tok_embeddings.weight", "h.wte.weight", "member.weight")]
    [True, True, False]
    """
    return _LOOKUP_NAME.search(key) is not None


def find_pairs(shapes: Mapping[str, Shape], fits: Fits) -> Found:
    """Pair up the keys of one state dict.

    >>> fits = lambda g, v: len(g) == len(v) and all(a in (1, b) for a, b in zip(g, v))
    >>> found = find_pairs({"a.weight_g": (4, 1), "a.weight_v": (4, 3), "a.bias": (4,)}, fits)
    >>> found.pairs[0].plain_key
    'a.weight'

    Args:
        shapes: every tensor of one state dict, key -> shape, in the file's order.
        fits: whether a magnitude of the first shape fits a direction of the second.

    Returns the pairs in the order of their first key, both layouts mixed, and the look-alikes left alone.

    Raises PairError, naming the key, for half a pair, swapped or misshapen halves, a plain weight beside its
    pair, and one weight in both layouts.
    """
    pairs: list[Pair] = []
    left: list[tuple[str, str]] = []
    halves = _legacy_halves(shapes)
    crowded = {m["stem"] for key in shapes if (m := _SIBLING.fullmatch(key))}
    for stem, tails in _parametrized_tails(shapes).items():
        _sort_in(_parametrized_verdict(stem, tails, shapes, fits), pairs, left)
    for pair, keys in halves.items():
        _sort_in(_legacy_verdict(pair, keys, shapes, fits, pair.plain_key in crowded), pairs, left)
    _refuse_duplicates(pairs)
    place = {key: index for index, key in enumerate(shapes)}
    return Found(tuple(sorted(pairs, key=lambda p: min(place[p.g_key], place[p.v_key]))), tuple(left))


def flat_pairs(shapes: Mapping[str, Shape]) -> tuple[Pair, ...]:
    """Pairs in the legacy layout whose magnitude is a list as long as some axis of a direction of 2 or more.

    >>> [pair.plain_key for pair in flat_pairs({"a.weight_g": (4,), "a.weight_v": (4, 3)})]
    ['a.weight']
    """
    halves = _legacy_halves(shapes)
    return tuple(p for p, keys in halves.items() if len(keys) == 2 and _is_flat(shapes[p.g_key], shapes[p.v_key]))


def _is_flat(g: Shape, v: Shape) -> bool:
    return len(g) == 1 and len(v) >= 2 and g[0] in v


Verdict = Pair | list[tuple[str, str]]


def _sort_in(verdict: Verdict, pairs: list[Pair], left: list[tuple[str, str]]) -> None:
    if isinstance(verdict, Pair):
        pairs.append(verdict)
    else:
        left += verdict


def _parametrized_tails(keys: Iterable[str]) -> dict[Pair, list[str]]:
    """Everything below each `parametrizations.NAME`, as {pair it would be: [what follows the name]}."""
    stems: dict[Pair, list[str]] = {}
    for key in keys:
        m = _STEM.fullmatch(key)
        if m:
            stems.setdefault(Pair(m["prefix"], m["name"], "parametrized"), []).append(m["tail"])
    return stems


def _legacy_halves(keys: Iterable[str]) -> dict[Pair, list[str]]:
    """Keys that end in _g or _v, as {pair it would be: [its keys]}."""
    halves: dict[Pair, list[str]] = {}
    for key in keys:
        m = _HALF.fullmatch(key)
        if m and not _STEM.fullmatch(key):
            halves.setdefault(Pair(m["prefix"], m["name"], "legacy"), []).append(key)
    return halves


def _parametrized_verdict(pair: Pair, tails: list[str], shapes: Mapping[str, Shape], fits: Fits) -> Verdict:
    stem = pair.g_key.removesuffix("original0")
    log = _MARK in tails
    if set(tails) - {_MARK} == {"original0", "original1"}:
        if pair.plain_key in shapes:
            raise _stale(pair)
        g, v = shapes[pair.g_key], shapes[pair.v_key]
        if _is_ours(g, v, fits):
            return replace(pair, log=log)
        if _is_ours(v, g, fits) or _is_broken_magnitude(g, v):
            raise _misfit(pair, g, v, fits)
    elif set(tails) - {_MARK} in ({"original0"}, {"original1"}):
        magnitude = "original0" in tails
        raise _orphan(pair.g_key if magnitude else pair.v_key, pair.v_key if magnitude else pair.g_key)
    return [(f"{stem}{tail}", "another parametrization, not weight norm") for tail in tails]


def _legacy_verdict(pair: Pair, keys: list[str], shapes: Mapping[str, Shape], fits: Fits, crowded: bool) -> Verdict:
    """What to make of NAME_g / NAME_v; `crowded` when NAME_u, NAME_q, NAME_orig... stand beside them."""
    certain = is_weight_name(pair.name) and not crowded
    why = "ends like half a weight-norm pair but is not one"
    if crowded:
        why = "one of a family of tensors (spectral norm, gates, attention), not weight norm"
    if len(keys) == 1:
        if certain and pair.plain_key not in shapes:
            raise _orphan(keys[0], pair.v_key if keys == [pair.g_key] else pair.g_key)
        return [(keys[0], why)]
    g, v = shapes[pair.g_key], shapes[pair.v_key]
    if _is_ours(g, v, fits) and (certain or len(v) >= 2 or pair.name == "bias"):
        if pair.plain_key not in shapes:
            return replace(pair, log=pair.mark_key in shapes)
        if certain:
            raise _stale(pair)
    elif certain:
        raise _misfit(pair, g, v, fits)
    return [(key, why) for key in keys]


def _is_ours(g: Shape, v: Shape, fits: Fits) -> bool:
    """Whether g is a magnitude of v. One value per element is no norm, unless one axis holds all elements."""
    same = tuple(g) == tuple(v) and sum(size != 1 for size in v) > 1
    return fits(g, v) and not same


def _is_broken_magnitude(g: Shape, v: Shape) -> bool:
    """Whether g has the form of a magnitude (one axis long, the others 1) but not v's sizes."""
    return len(g) == len(v) >= 2 and sum(size != 1 for size in g) == 1 and sum(size != 1 for size in v) > 1


def _refuse_duplicates(pairs: list[Pair]) -> None:
    seen: dict[str, Pair] = {}
    for pair in pairs:
        other = seen.setdefault(pair.plain_key, pair)
        if other is not pair:
            raise PairError(f"{printable(pair.g_key)}: {printable(other.g_key)} is the same weight in another layout")


def _orphan(key: str, missing: str) -> PairError:
    return PairError(f"{printable(key)}: half a weight-norm pair, {printable(missing)} is missing")


def _stale(pair: Pair) -> PairError:
    return PairError(
        f"{printable(pair.plain_key)}: a plain weight beside its pair {printable(pair.g_key)}",
        hint="one of the two is stale; remove it",
    )


def _misfit(pair: Pair, g: Shape, v: Shape, fits: Fits) -> PairError:
    if _is_ours(v, g, fits):
        return PairError(f"{printable(pair.g_key)}: magnitude {tuple(g)} and direction {tuple(v)} are swapped")
    if _is_flat(g, v):
        axes = " or ".join(str(axis) for axis, size in enumerate(v) if size == g[0])
        return PairError(
            f"{printable(pair.g_key)}: magnitude {tuple(g)} may belong to axis {axes} of direction {tuple(v)}",
            hint=f"fold and convert take dim={{{pair.plain_key!r}: AXIS}} (--dim '{pair.plain_key}=AXIS')",
        )
    return PairError(f"{printable(pair.g_key)}: magnitude {tuple(g)} does not fit direction {tuple(v)}")
