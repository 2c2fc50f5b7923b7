"""A step of `torch.optim.SGD` on pairs in deferred mode, done in its place in one pass over memory.

Passing gradients on, moving g and v and making w anew are three passes over a net, and in plain gradient descent the
step itself is but one. The kernels do all of it row by row. They are used where they give the bits that torch's own
operations give, which is tried out once in a process, and where nobody can look in between; else all goes as ever.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain, product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim import optimizer as optimizers
from torch.optim.sgd import sgd

from wnsurgery import fused
from wnsurgery.kept import LARGE
from wnsurgery.placed import Placed, addresses
from wnsurgery.row_threads import on_all_rows

__all__ = ["Rule", "Stepped", "StepsOfPairs", "momentum_of", "rules_of"]

_log = logging.getLogger("wnsurgery")
_LINE = 12  # numbers that `sgd_kernels.PLACES` names
_PAIR, _WEIGHT, _SIZES = slice(1, 3), 6, slice(9, 12)  # where among them: v and g, w, and the sizes
_GIVEN = (0, 3, 4, 5, _WEIGHT)  # dL/dw, ||v||, dL/dg, dL/dv, w
_PAST = (7, 8)  # momentum of v and of g
_NUMBERS = {int, float}


class Rule(NamedTuple):
    """What SGD does to a parameter x with gradient d and momentum m: d += decay * x, m = keep * m + add * d, d = m (or
    d + ahead * m), x += rate * d."""

    rate: float
    decay: float
    keep: float
    add: float
    ahead: float


_RULE = len(Rule._fields)


class Stepped(NamedTuple):
    """What a step leaves of each pair: dL/dg, dL/dv, and whether its weight has been written."""

    grads: list[tuple[Tensor, Tensor]]
    fine: list[bool]


def rules_of(optimizer: Any, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> dict[int, Rule]:
    """The rule of each parameter of an optimizer whose step begins, by identity; of those only that can be moved in its
    place.

    >>> x = torch.nn.Parameter(torch.ones(1))
    >>> rules = rules_of(SGD([x], lr=0.1, momentum=0.9), (), {}) if fused.start() else {}
    >>> rules[id(x)]
    Rule(rate=-0.1, decay=0, keep=0.9, add=1, ahead=0.0)
    """
    closure = options.get("closure", arguments[1] if len(arguments) > 1 else None)
    if type(optimizer) is not SGD or closure is not None or not fused.started():
        return {}
    if torch.compiler.is_compiling() or _is_observed(optimizer):
        return {}
    found: dict[int, Rule] = {}
    for group in optimizer.param_groups:
        rule = _rule_of(group)
        if rule is not None:
            found.update(dict.fromkeys(map(id, group["params"]), rule))
    return found if found and _agree() else {}


def _is_observed(optimizer: Any) -> bool:
    """Whether somebody may look at gradients or weights between the parts of a step."""
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return True
    everywhere = optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks
    hooks = (hook for hooks in everywhere for hook in hooks.values())
    return any(not str(getattr(hook, "__module__", "")).startswith("wnsurgery.") for hook in hooks)


def _rule_of(group: Mapping[str, Any]) -> Rule | None:
    if group.get("maximize") or group.get("foreach") or group.get("fused") or group.get("differentiable"):
        return None
    rate, decay, keep, damping = numbers = group["lr"], group["weight_decay"], group["momentum"], group["dampening"]
    if not (_NUMBERS.issuperset(map(type, numbers)) and all(map(math.isfinite, numbers))):
        return None
    return Rule(-rate, decay, keep, 1 - damping, keep if group["nesterov"] else 0.0)


def momentum_of(parameter: Tensor, states: Mapping[Any, Any]) -> Tensor | None:
    """What an optimizer keeps of a parameter's gradients, None where that is not there yet, or not as the kernels take
    it."""
    past: Any = states[parameter].get("momentum_buffer") if parameter in states else None
    plain = type(past) is Tensor and past.is_cpu and past.dtype is torch.float32 and past.shape == parameter.shape
    return past if plain and past.is_contiguous() and not (past.is_neg() or past.is_inference()) else None


class StepsOfPairs:
    """The pairs of a net that are moved together, as the kernels see them.

    >>> v, w, norms = torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]]), torch.tensor([[5.0]])
    >>> pairs = StepsOfPairs([(torch.tensor([[10.0]]), v)], [fused.Sizes(0, 1, 2)])
    >>> rule = Rule(-0.5, 0.0, 0.0, 1.0, 0.0)
    >>> ready = fused.start()
    >>> pairs.step([torch.tensor([[1.0, 0.0]])], [norms], [w], [(rule, rule)], [(None, None)], [False]).fine
    [True]
    >>> v
    tensor([[2.3600, 4.4800]])
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[fused.Sizes]) -> None:
        self._pairs = pairs
        self._lines = np.zeros((len(pairs), _LINE), np.int64)
        for line, (g, v), one in zip(self._lines, pairs, sizes, strict=True):
            line[_PAIR], line[_SIZES] = (v.data_ptr(), g.data_ptr()), one.told
        self._sizes = sizes
        self._placed = Placed(half for pair in pairs for half in pair)
        self._elements = [v.numel() for _, v in pairs]
        small = [n <= LARGE and not one.inputs for n, one in zip(self._elements, sizes, strict=True)]
        self._small = [i for i, is_small in enumerate(small) if is_small]
        self._others = [i for i, is_small in enumerate(small) if not is_small]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._pairs)

    def are_where_they_were(self) -> bool:
        """Whether all lie in the memory that the kernels were told of."""
        return self._placed.are_as_they_were()

    def step(
        self,
        grads: Sequence[Tensor],
        norms: Sequence[Tensor],
        weights: Sequence[Tensor],
        rules: Sequence[tuple[Rule, Rule]],
        pasts: Sequence[tuple[Tensor | None, Tensor | None]],
        private: Sequence[bool],
    ) -> Stepped:
        """Move all pairs and write their weights, while the pairs are where they were.

        Args:
            grads: dL/dw of each, laid out as v.
            norms: ||v|| of their rows, which becomes that of the rows as they are then.
            weights: what is to be written anew, laid out as v.
            rules: of each pair's v and g.
            pasts: the momentum of v and g, where their rules have any.
            private: whether dL/dv may take the place of dL/dw.
        """
        to_g = [torch.empty_like(g) for g, _ in self._pairs]
        to_v = [grad if own else torch.empty_like(grad) for grad, own in zip(grads, private, strict=True)]
        lines = self._lines.copy()
        for column, tensors in zip(_GIVEN, (grads, norms, to_g, to_v, weights), strict=True):
            lines[:, column] = addresses(tensors)
        for column, momenta in zip(_PAST, zip(*pasts, strict=True), strict=True):
            if any(m is not None for m in momenta):
                lines[:, column] = [0 if m is None else m.data_ptr() for m in momenta]
        numbers = chain.from_iterable(chain.from_iterable(rules))
        told = np.fromiter(numbers, np.float32, len(rules) * 2 * _RULE).reshape(-1, 2 * _RULE)
        fine = [True] * len(lines)
        if self._small:
            some, how = (lines[self._small], told[self._small]) if self._others else (lines, told)
            _run("many_step", sum(self._elements[i] for i in self._small), len(some), some, how)
            for i, written in zip(self._small, some[:, _WEIGHT].tolist(), strict=True):
                fine[i] = written != 0
        for i in self._others:
            name, past_cache = "rows_step", int(self._elements[i] >= fused.far())
            if self._sizes[i].inputs:
                name = "columns_step"
            fine[i] = _run(name, self._elements[i], self._sizes[i].rows, lines[i], told[i], past_cache)
        return Stepped(list(zip(to_g, to_v, strict=True)), fine)


def _run(name: str, elements: int, rows: int, places: Any, rules: Any, *rest: int) -> bool:
    """Call a kernel for rows, or lines, of so many elements in all."""
    return on_all_rows(_kernels(), elements, rows, name, places.ctypes.data, rules.ctypes.data, *rest)


@cache
def _kernels() -> Any:
    from wnsurgery import sgd_kernels

    return sgd_kernels


# Whether the kernels do what torch does ------------------------------------------------------------------

_TRIED = [  # below, beside and above what is done at a time
    *(fused.Sizes(0, 3, 7), fused.Sizes(0, 2, 131), fused.Sizes(0, 2, 1030)),
    *(fused.Sizes(5, 3, 4), fused.Sizes(3, 33, 8), fused.Sizes(3, 6, 4, groups=2)),
]
_MOMENTA = ((0.0, 1.0, 0.0), (0.9, 1.0, 0.0), (0.9, 0.7, 0.0), (0.9, 1.0, 0.9))
_RULES = [Rule(-0.1, decay, keep, add, ahead) for decay, (keep, add, ahead) in product((0.0, 0.01), _MOMENTA)]


@cache
def _agree() -> bool:
    """Whether steps by the kernels and steps by torch's operations end in the same bits, in this process."""
    with torch.inference_mode(False), torch.no_grad():
        agree = all(_agree_on(sizes, rule) for sizes in _TRIED for rule in _RULES)
    if not agree:
        _log.info("torch's SGD rounds in another way than the kernels here: it moves deferred weights itself")
    return agree


def _agree_on(sizes: fused.Sizes, rule: Rule) -> bool:
    inputs, outputs, columns = sizes.told
    rows, groups = sizes.rows, sizes.groups
    across = (groups * inputs, outputs, columns), (groups, outputs, 1)
    shape, shape_of_g = across if inputs else ((rows, columns), (rows, 1))

    like: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are

    def wave(phase: float, size: float) -> Tensor:
        return torch.sin(torch.arange(math.prod(shape), **like) * 0.7 + phase).mul_(size).view(shape)

    def made() -> list[Tensor]:
        v, g = wave(0.0, 1.0), torch.linspace(-1.0, 2.0, rows, **like).view(shape_of_g)
        past = (wave(1.0, 0.01), torch.full_like(g, 0.01)) if rule.keep else ()
        return [g, v, wave(2.0, 0.1), torch.empty_like(v), *past]

    g, v, grad, w, *past = theirs = made()
    norms = fused.forward(g, v, sizes, w)
    if norms is None:
        return False
    grad_g = fused.backward(grad, g, v, norms, sizes, grad)
    sgd(
        [v, g],
        [grad, grad_g],
        list[Tensor | None](past) or [None, None],
        foreach=False,
        lr=-rule.rate,
        weight_decay=rule.decay,
        momentum=rule.keep,
        dampening=1 - rule.add,
        nesterov=bool(rule.ahead),
        maximize=False,
    )
    norms_then = fused.forward(g, v, sizes, w)
    ours = made()
    pasts: tuple[Tensor | None, Tensor | None] = (ours[4], ours[5]) if past else (None, None)
    pairs = StepsOfPairs([(ours[0], ours[1])], [sizes])
    stepped = pairs.step([ours[2]], [norms], [ours[3]], [(rule, rule)], [pasts], [True])
    if norms_then is None:
        return False
    same = zip((*theirs, norms_then, grad_g), (*ours, norms, stepped.grads[0][0]), strict=True)
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in same)
