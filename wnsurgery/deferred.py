"""Deferred mode: a net runs on plain leaf weights; once a step, gradients pass to g and v, and w is made anew.

In between the net is plain: one leaf tensor per weight, no arithmetic in the graph, gradients gathering on it over any
number of backward passes. They pass to g and v (the paper's equation 3, which is linear in dL/dw) when somebody looks
at `g.grad` or `v.grad`: an optimizer, gradient clipping, a gradient scaler, a log. All weights of a net pass theirs at
once. After an optimizer's step on g and v all their weights are written anew into the same memory; after any other
change of g or v the next use of the layer sees to it.
"""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, compress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import optimizer as optimizers

from wnsurgery import fused
from wnsurgery.errors import ModeError, NonFiniteWeightError, PairError
from wnsurgery.kept import Kept, is_alone
from wnsurgery.multi_tensor import Item, ManyWeights
from wnsurgery.onlookers import aside, not_compiled, uncompiled
from wnsurgery.reparam import WeightNorm, direction_of, first_order_gradients, is_readable
from wnsurgery.sgd_step import Rule, StepsOfPairs, momentum_of, rules_of

__all__ = ["OWNER", "DeferredGroup", "DeferredParameter", "DeferredWeight", "is_plain_pair", "weight_of"]

_GRAD: Any = torch.Tensor.grad
_held_by, _hold = _GRAD.__get__, _GRAD.__set__
_WANTED: Any = torch.Tensor.requires_grad
_is_wanted = _WANTED.__get__
OWNER = "_deferred_weight"  # in the __dict__ of g and v: a weak reference to the weight they make
_MAKING = nn.Parameter.__new__.__code__
_SETS = 4  # sets of weights that are remembered
_ALONE = 2  # references to a tensor that only one local name holds


class DeferredParameter(nn.Parameter):
    """g or v of a weight in deferred mode: whoever looks at `grad` finds what has gathered on the weight.

    What gathered before it is frozen, or freed, passes on as it was then. Copies and pickles are plain Parameters, and
    so is what a call makes: `nn.Parameter(g)`, or one of the type of g.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        _set_plain(self)

    def detach(self) -> Tensor:
        made = super().detach()
        if sys._getframe(1).f_code is _MAKING:  # which takes no subclass but one that gives its own type
            made = Tensor._make_subclass(DeferredParameter, made, False)
        return made

    @property
    def grad(self) -> Tensor | None:
        reference = self.__dict__.get(OWNER)  # in one frame: an optimizer's step asks several times
        weight = None if reference is None else reference()
        if weight is not None and (leaf := weight.leaf) is not None:
            if leaf.grad is not None or weight.shares:
                weight.settle()
            elif weight.group.is_passing:  # in another thread, or in this one further out
                weight.group.wait()
        return _held_by(self)  # type: ignore[no-any-return]

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self._pass_on()
        _hold(self, value)

    @grad.deleter
    def grad(self) -> None:
        self._pass_on()
        _GRAD.__delete__(self)

    @property
    def requires_grad(self) -> bool:
        return _is_wanted(self)  # type: ignore[no-any-return]

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value is not _is_wanted(self):
            self._pass_on()
            _WANTED.__set__(self, value)
            weight = owner_of(self)
            if weight is not None:
                weight.show()

    def requires_grad_(self, requires_grad: bool = True) -> DeferredParameter:
        self.requires_grad = requires_grad
        return self

    def _pass_on(self) -> None:
        """Let what waits on the weight reach the other half, too, before this one is written over."""
        weight = owner_of(self)
        if weight is not None and weight.leaf is not None and (weight.leaf.grad is not None or weight.shares):
            weight.settle()

    def register_hook(self, hook: Any) -> Any:
        raise _no_hooks()

    def register_post_accumulate_grad_hook(self, hook: Any) -> Any:
        raise _no_hooks()

    def view_as(self, other: Tensor) -> Tensor:
        """Of itself, it is asked for to reach its node of the graph and hang a hook there, as an optimizer in the
        backward pass does; so is `expand_as`."""
        self._refuse_node(other)
        return super().view_as(other)

    def expand_as(self, other: Tensor) -> Tensor:
        self._refuse_node(other)
        return super().expand_as(other)

    def _refuse_node(self, other: Tensor) -> None:
        if other is self and torch.is_grad_enabled() and _is_wanted(self):
            raise _no_hooks()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = _plain(self, self.data.clone(memory_format=torch.preserve_format))
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self, self.data).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


not_compiled(DeferredParameter.grad.fget)  # type: ignore[attr-defined]


def owner_of(half: Tensor) -> DeferredWeight | None:
    """The weight in deferred mode that g or v is a half of; the last, where several have it."""
    reference = half.__dict__.get(OWNER)
    return None if reference is None else reference()


def weight_of(g: Tensor, v: Tensor) -> DeferredWeight | None:
    """The weight in deferred mode that is made of this pair, in whichever module."""
    weight = owner_of(v)
    return weight if weight is not None and weight.g is g and weight.v is v else None


def is_plain_pair(g: Tensor, v: Tensor) -> bool:
    """Whether both are Parameters of which one at least would not tell of its gradients: new, or swapped for another
    (`torch.utils.swap_tensors`)."""
    kinds = {type(g), type(v)}
    return nn.Parameter in kinds and kinds <= {nn.Parameter, DeferredParameter}


def _plain(half: DeferredParameter, data: Tensor) -> nn.Parameter:
    made = nn.Parameter(data, half.requires_grad)
    made.__dict__.update((name, value) for name, value in half.__dict__.items() if name != OWNER)
    return made


def _no_hooks() -> ModeError:
    return ModeError(
        "in deferred mode g and v get their gradients once a step, outside of the backward pass: no hook on them runs, "
        "and no optimizer within the backward pass",
        hint='set_weight_norm_mode(model, "parametrized")',
    )


def _no_second_derivatives() -> ModeError:
    return ModeError(
        "a weight in deferred mode has no second derivatives with respect to g and v",
        hint='set_weight_norm_mode(model, "parametrized") before the forward pass of backward(create_graph=True)',
    )


class DeferredWeight:
    """One (g, v) in deferred mode with the leaf weight the net runs on.

    A use gets `shown`: the leaf, or where neither g nor v is to be trained its memory without a gradient, while graphs
    of earlier uses still end at the leaf. `leaf` is None where there are no values to compute (meta device), or g and v
    are not ordinary tensors, or do not fit; the weight is then computed from them by `compose`, as in the default mode.
    """

    g: nn.Parameter
    v: nn.Parameter

    def __init__(self, group: DeferredGroup, rule: WeightNorm, g: nn.Parameter, v: nn.Parameter) -> None:
        self.group, self.rule = group, rule
        self.owners: weakref.WeakSet[Any] = weakref.WeakSet()  # that have the pair and use this for its weight
        self.shares = False  # whether another weight has a half of the pair, too
        self.leaf: nn.Parameter | None = None
        self.shown: nn.Parameter | None = None
        self.norms: Tensor | None = None
        self.lengths: Tensor | None = None
        self.then: Tensor | None = None  # g as the weight was computed
        self.kept: Kept | None = None
        self.adopt(g, v)
        group.add(self)

    def adopt(self, g: nn.Parameter, v: nn.Parameter) -> None:
        """Take this pair, whatever was held before, and give it a leaf of its type on its device; the same leaf where
        it is the same pair. The weight is computed at its first use."""
        if self.leaf is not None and not (g is self.g and v is self.v):
            self._leave_leaf()
        for old in (self.__dict__.get("g"), self.__dict__.get("v")):
            if old is not None and old is not g and old is not v:
                _set_plain(old)
        self.g, self.v, self.kept, self.norms, self.lengths, self.then = g, v, None, None, None, None
        self.group.forget()
        if not (_can_defer(g, v) and self.rule.axes.fit(g, v)):
            self.leaf = self.shown = None
            return
        for half in (g, v):
            self.shares = self.shares or owner_of(half) not in (None, self)
            half.__class__ = DeferredParameter
            half.__dict__[OWNER] = weakref.ref(self)
        with aside():
            memory = torch.empty_like(v, requires_grad=False)
            if self.leaf is None:
                self.leaf = nn.Parameter(memory)
            else:
                self.leaf.data = memory
        self.show()

    def show(self) -> None:
        """Choose what uses get, by who is to be trained."""
        leaf = self.leaf
        if leaf is None or _is_wanted(self.g) or _is_wanted(self.v):
            self.shown = leaf
        else:
            with aside():
                self.shown = Tensor._make_subclass(nn.Parameter, leaf.detach(), False)

    def is_laid_as(self, g: Tensor, v: Tensor) -> bool:
        """Whether this is its pair, of the type and in the memory that the weight was computed from."""
        leaf, kept = self.leaf, self.kept
        if leaf is None or kept is None or g is not self.g or v is not self.v or type(v) is not DeferredParameter:
            return False
        return _is_like(leaf, v) and kept.is_where_it_was()

    def release(self, *, settle: bool = True) -> None:
        """Back to the default mode: g and v are plain Parameters again, with the gradients there were if `settle`, and
        those that graphs are yet to give."""
        if settle:
            self.settle()
            self._leave_leaf()
        self.leaf = self.shown = self.kept = None
        self.group.forget()
        for half in (self.g, self.v):
            _set_plain(half)

    def _leave_leaf(self) -> None:
        """Be done with the leaf: what graphs are yet to give it passes on to the pair they were made with."""
        if self.leaf is not None and self.kept is not None:
            self.leaf.register_post_accumulate_grad_hook(_PassLate(self))  # type: ignore[no-untyped-call]
        self.leaf = self.shown = None

    def current(self, g: Tensor, v: Tensor) -> nn.Parameter | None:
        """The leaf with the weight of this pair as it is now; None where the pair is not its own, as under
        `functional_call`, or has no leaf."""
        leaf = self.leaf
        if g is not self.g or v is not self.v or leaf is None:
            return None
        if self.kept is None or not self.kept.is_of(g, v) or self.has_strayed():
            self.settle()
            fits = _is_like(leaf, v) and self.rule.axes.fit(g, v)  # no other type or shape through `.data`
            if not fits or is_plain_pair(g, v):  # by `swap_tensors`
                self.adopt(self.g, self.v)
            self.group.renew([self])
        return self.shown

    def has_strayed(self) -> bool:
        """Whether somebody has put other memory under what uses get, where that is not the leaf itself."""
        leaf, shown = self.leaf, self.shown
        return shown is not leaf and shown is not None and leaf is not None and shown.data_ptr() != leaf.data_ptr()

    @uncompiled
    def settle(self) -> None:
        """Let gradients and writes that reached the leaf reach g and v."""
        leaf = self.leaf
        if leaf is not None:
            if self.has_strayed():
                leaf.data = self.shown.data  # type: ignore[union-attr]
            self.pass_on()
            if self.kept is not None and self.kept.is_written():
                self.absorb()

    @uncompiled
    def pass_on(self) -> None:
        """Let gradients that reached the leaf reach g and v."""
        if self.leaf is not None and (self.leaf.grad is not None or self.shares):
            self.group.project()
        elif self.group.is_passing:  # another thread has just taken what was there
            self.group.wait()

    def absorb(self) -> None:
        """Take over a write into the leaf, unless g or v were written to since."""
        kept, leaf = self.kept, self.leaf
        if kept is None or leaf is None or not kept.is_written():
            return
        with aside():
            value = leaf.detach().clone()
            if (value.shape, value.stride(), value.dtype) != (self.v.shape, self.v.stride(), self.v.dtype):
                leaf.data = torch.empty_like(self.v, requires_grad=False)  # somebody has set its `.data`
                self.show()
            if value.shape != self.v.shape:
                self.kept = None
                raise PairError(f"a weight of shape {tuple(value.shape)} does not fit {tuple(self.v.shape)}")
            if not kept.was_of(self.g, self.v):
                self.kept = None
                return
            try:
                new_g, new_v = self.rule.right_inverse(value.to(self.v))
            except NonFiniteWeightError:
                self.kept = None
                self.group.renew([self])
                raise
            self.g.copy_(new_g)
            self.v.copy_(new_v)
            self.kept = None

    def take_grad(self) -> tuple[Tensor, bool]:
        """dL/dw, from now on the caller's, and whether nobody else holds it."""
        leaf: Any = self.leaf
        grad, leaf.grad = leaf.grad, None
        private = sys.getrefcount(grad) == _ALONE and is_alone(grad)
        return (grad if grad.layout == torch.strided else grad.to_dense()), private

    def has_moved(self) -> bool:
        """Whether g or v changed since the weight was computed."""
        return self.kept is None or not self.kept.is_pair_as_it_was(self.g, self.v)

    def has_gradient(self) -> bool:
        """Whether g or v has one of its own, past what waits on the leaf."""
        return _held_by(self.g) is not None or _held_by(self.v) is not None

    def past_grads(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """dL/dg and dL/dv at the pair the weight was computed from, where that has changed since: v was w ||v|| / g,
        but in rows with g = 0, which do not tell."""
        axes, magnitude, leaf, kept = self.rule.axes, self.rule.magnitude, self.leaf, self.kept
        lengths = self.lengths if self.norms is None else self.norms
        if leaf is None or kept is None or self.then is None or lengths is None:
            return first_order_gradients(grad, self.g, self.v, None, axes, magnitude)
        if kept.is_written():
            g = self.then if kept.has_v_as_it_was(self.v) else self.g
            return first_order_gradients(grad, g, self.v, None, axes, magnitude)
        v = direction_of(leaf, self.then, lengths, axes, magnitude, instead=self.v)
        return first_order_gradients(grad, self.then, v, None, axes, magnitude)

    def pass_on_alone(self) -> None:
        """Let the gradient of this leaf reach g and v."""
        grad, _ = self.take_grad()
        if self.has_moved():
            self.add_grads(*self.past_grads(grad))
        else:
            rule = self.rule
            self.add_grads(*first_order_gradients(grad, self.g, self.v, self.norms, rule.axes, rule.magnitude))

    def add_grads(self, part_g: Tensor, part_v: Tensor) -> None:
        """Add dL/dg and dL/dv to what g and v hold."""
        for half, part in ((self.g, part_g), (self.v, part_v)):
            if not _is_wanted(half):
                continue
            held = _held_by(half)
            if held is None:  # laid out as its half, for fused optimizers go through the memory of both
                alike = part.stride() == half.stride()
                own = part if alike else torch.empty_like(half, requires_grad=False).copy_(part)
                _hold(half, own if own._base is None else own.detach())  # compilers take no view for a gradient
            else:
                held.add_(part)

    def move(self, rules: Mapping[int, Rule], states: Mapping[Any, Any]) -> Move | None:
        """How an optimizer with these rules and states is to move g and v, where a gradient waits that the kernels can
        read and of which nobody has seen anything yet; else None. The weight itself has not been written to."""
        leaf, g, v, kept = self.leaf, self.g, self.v, self.kept
        if leaf is None or (grad := leaf.grad) is None:
            return None
        of_g, of_v = rules.get(id(g)), rules.get(id(v))
        if (
            kept is None
            or of_g is None
            or of_v is None
            or self.norms is None
            or grad.dtype is not torch.float32
            or not is_readable(grad, v)
            or grad.requires_grad
            or not (_is_wanted(g) and _is_wanted(v))
            or self.has_gradient()
            or not kept.is_pair_as_it_was(g, v)
        ):
            return None
        past_v = momentum_of(v, states) if of_v.keep else None
        past_g = momentum_of(g, states) if of_g.keep else None
        if (of_v.keep and past_v is None) or (of_g.keep and past_g is None):
            return None
        return Move(self, (of_v, of_g), (past_v, past_g))

    def moved(self) -> None:
        """g and v were moved, and the weight and ||v|| in `norms` made anew, each in its memory."""
        self.lengths = None
        if self.kept is not None:
            self.kept.renew()

    def lose(self) -> None:
        """g and v were moved, and the weight is to be made anew."""
        self.kept = self.norms = self.lengths = None

    def item(self) -> Item:
        assert self.leaf is not None
        return Item(self.g, self.v, self.rule.axes, self.rule.magnitude, self.leaf)

    def renewed(self, norms: Tensor | None, lengths: Tensor | None) -> None:
        """The weight was computed; ||v|| of its rows is `norms` where these serve the gradients, else `lengths`."""
        assert self.leaf is not None
        self.norms, self.lengths = norms, lengths
        if self.kept is None or not self.kept.is_where_it_was():
            self.kept = Kept(self.leaf, self.g, self.v, count_steps=False)
        else:
            self.kept.renew()


class _PassLate:
    """Called when a graph gives a leaf a gradient after its weight has left deferred mode or taken another pair.

    Of the weight it keeps all but the leaf, which holds this and ends with its graphs.
    """

    def __init__(self, weight: DeferredWeight) -> None:
        self._weight, self._kept = copy.copy(weight), weight.kept
        self._put(None)

    def _put(self, leaf: nn.Parameter | None) -> None:
        weight, kept = self._weight, self._kept
        weight.leaf = leaf
        weight.shown, weight.kept = None, None if leaf is None else kept
        if kept is not None:
            kept.w = leaf  # type: ignore[assignment]

    def __call__(self, leaf: nn.Parameter) -> None:
        if torch.is_grad_enabled():
            leaf.grad = None
            raise _no_second_derivatives()
        with self._weight.group.lock, aside():
            self._put(leaf)
            try:
                self._weight.pass_on_alone()
            finally:
                self._put(None)


class Move(NamedTuple):
    """A weight whose pair is to be moved, with rule and momentum of v and of g."""

    weight: DeferredWeight
    rules: tuple[Rule, Rule]
    pasts: tuple[Tensor | None, Tensor | None]


def _can_defer(g: Tensor, v: Tensor) -> bool:
    return all(
        type(half) in (nn.Parameter, DeferredParameter)
        and type(half.data) is Tensor
        and not (half.is_meta or half.is_inference())
        and not (half.is_cpu and half.is_shared())  # type: ignore[no-untyped-call] # and written to by other processes
        for half in (g, v)
    )


def _is_like(leaf: Tensor, v: Tensor) -> bool:
    return leaf.dtype is v.dtype and leaf.device == v.device and leaf.shape == v.shape


def _set_plain(half: nn.Parameter) -> None:
    half.__dict__.pop(OWNER, None)
    if type(half) is DeferredParameter:
        half.__class__ = nn.Parameter  # type: ignore[assignment]


def _place_for_g(weight: DeferredWeight) -> Tensor:
    then, g = weight.then, weight.g
    if then is None or then.shape != g.shape or then.dtype is not g.dtype or then.device != g.device:
        then = weight.then = torch.empty_like(g, requires_grad=False)
    return then


class DeferredGroup:
    """The deferred weights of a model: what one of them needs done is done for all."""

    def __init__(self) -> None:
        self._weights: list[weakref.ref[DeferredWeight]] = []
        self._many: dict[tuple[int, ...], ManyWeights] = {}
        self._steps: tuple[tuple[int, ...], list[bool], StepsOfPairs] | None = None
        self._stepped: dict[int, list[tuple[DeferredWeight, tuple[Tensor, Tensor], bool]]] = {}  # by optimizers' `id`
        self.lock = threading.RLock()
        self.is_passing = False  # gradients on, in the thread that has the lock
        _watch_steps(self)

    def add(self, weight: DeferredWeight) -> None:
        self._weights.append(weakref.ref(weight, self._lose))

    def _lose(self, reference: weakref.ref[DeferredWeight]) -> None:
        """A weight has gone, with its module."""
        self._weights.remove(reference)
        self.forget()

    @uncompiled
    def wait(self) -> None:
        """Until no other thread passes gradients on."""
        with self.lock:
            pass

    def forget(self) -> None:
        """Some pair became another, or of another type, or another weight's: a new one may have a lost one's `id`."""
        self._many.clear()
        for group in list(_groups):  # in any of which another weight may have a half of this one's
            group._steps = None

    @property
    def weights(self) -> list[DeferredWeight]:
        return [weight for reference in list(self._weights) if (weight := reference()) is not None]

    def renew(self, weights: Iterable[DeferredWeight]) -> None:
        """Compute the weights of these anew, each into its memory."""
        weights = [weight for weight in weights if weight.leaf is not None]
        if not weights:
            return
        with self.lock, aside():
            if any(weight.leaf.grad is not None for weight in weights):  # type: ignore[union-attr]
                self.project()
            many = self._together(weights)
            norms = many.compose()
            torch.autograd.graph.increment_version([item for w in weights if (item := w.leaf) is not None])
            torch.clear_autocast_cache()  # which would go on with the weights there were
            for i, (weight, rows) in enumerate(zip(weights, norms, strict=True)):
                weight.renewed(rows, many.lengths.get(i))
            torch._foreach_copy_(list(map(_place_for_g, weights)), [weight.g for weight in weights])

    def _together(self, weights: Sequence[DeferredWeight]) -> ManyWeights:
        """The same weights as one, remembered: a net's come again and again."""
        key = tuple(map(id, weights))
        many = self._many.get(key)
        if many is None:
            if len(self._many) >= _SETS:
                self._many.clear()
            many = self._many[key] = ManyWeights([weight.item() for weight in weights])
        return many

    def project(self) -> None:
        """Pass on what has gathered on all weights."""
        with self.lock, aside():
            waiting = [w for w in self.weights if w.leaf is not None and w.leaf.grad is not None]
            if any(w.leaf.grad.requires_grad for w in waiting):  # type: ignore[union-attr]
                for weight in waiting:
                    weight.leaf.grad = None  # type: ignore[union-attr]
                raise _no_second_derivatives()
            if not waiting:
                return
            self.is_passing = True
            try:
                moved = [weight.has_moved() for weight in waiting]
                for weight in compress(waiting, moved):
                    weight.pass_on_alone()
                waiting = [weight for weight, has_moved in zip(waiting, moved, strict=True) if not has_moved]
                if not waiting:
                    return
                grads, private = zip(*[weight.take_grad() for weight in waiting], strict=True)
                parts = self._together(waiting).gradients(grads, [weight.norms for weight in waiting], private)
                for weight, halves in zip(waiting, parts, strict=True):
                    weight.add_grads(*halves)
            finally:
                self.is_passing = False

    def before_step(
        self, optimizer: optimizers.Optimizer, arguments: tuple[Any, ...], options: Mapping[str, Any]
    ) -> None:
        """An optimizer is about to move its parameters: let writes that reached a leaf reach its pair. Gradients follow
        when it asks for them, unless the kernels move all at once in its place."""
        weights = self.weights
        written = [weight for weight in weights if weight.kept is not None and weight.kept.is_written()]
        if written:
            moved = set(map(id, self._moved_by(optimizer)))
            for weight in written:
                if id(weight) in moved:
                    weight.settle()
        rules = rules_of(optimizer, arguments, options)
        moves = [move for w in weights if (move := w.move(rules, optimizer.state)) is not None] if rules else []
        self._stepped.pop(id(optimizer), None)  # of a step that failed
        if moves:
            self._stepped[id(optimizer)] = self._step(moves)

    def _step(self, moves: Sequence[Move]) -> list[tuple[DeferredWeight, tuple[Tensor, Tensor], bool]]:
        """Move g and v in an optimizer's place and make their weights anew, all in one pass, where the kernels take
        them; which they did, dL/dg and dL/dv, and whether the weight is there.

        Until the optimizer's step ends they have no gradients for it to see.
        """
        with self.lock, aside():
            taken, pairs = self._pairs_of(moves)
            weights, rules, pasts = zip(*compress(moves, taken), strict=True) if pairs.count else ((), (), ())
            if not weights or not pairs.are_where_they_were():
                return []
            grads, private = zip(*[weight.take_grad() for weight in weights], strict=True)
            done = pairs.step(grads, [w.norms for w in weights], [w.leaf for w in weights], rules, pasts, private)
            written = chain.from_iterable((w.leaf, w.g, w.v, *past) for w, past in zip(weights, pasts, strict=True))
            torch.autograd.graph.increment_version([tensor for tensor in written if tensor is not None])
            torch.clear_autocast_cache()
            torch._foreach_copy_([w.then for w in weights], [w.g for w in weights])
            for weight, fine in zip(weights, done.fine, strict=True):
                weight.moved() if fine else weight.lose()
            return list(zip(weights, done.grads, done.fine, strict=True))

    def _pairs_of(self, moves: Sequence[Move]) -> tuple[list[bool], StepsOfPairs]:
        """Which pairs the kernels take, none with a half that other weights have, too, and these as they see them;
        remembered."""
        key = tuple([id(move.weight) for move in moves])
        if self._steps is None or self._steps[0] != key:
            weights = [move.weight for move in moves]
            owners = Counter(id(half) for group in _groups for w in group.weights for half in (w.g, w.v))
            alone = [owners[id(w.g)] == owners[id(w.v)] == 1 and w.v.is_contiguous() for w in weights]
            how = [(w.g, w.v, w.rule.axes.kept, w.rule.axes.groups, w.rule.magnitude) for w in weights]
            sizes = [fused.plan(*one) if is_alone else None for one, is_alone in zip(how, alone, strict=True)]
            taken = [one is not None for one in sizes]
            pairs = [(w.g, w.v) for w in compress(weights, taken)]
            self._steps = key, taken, StepsOfPairs(pairs, [one for one in sizes if one is not None])
        return self._steps[1:]

    def after_step(self, optimizer: optimizers.Optimizer) -> None:
        """An optimizer has moved its parameters: also one whose kernels leave tensor versions as they are."""
        stepped = self._stepped.pop(id(optimizer), [])
        for weight, (part_g, part_v), _ in stepped:
            _hold(weight.g, part_g)  # neither had any: `move` saw to that
            _hold(weight.v, part_v)
        ready = {id(weight) for weight, _, fine in stepped if fine}
        if len(ready) < len(self._weights):
            others = (weight for weight in self._moved_by(optimizer) if id(weight) not in ready)
            self.renew([weight for weight in others if weight.has_gradient() or weight.has_moved()])

    def _moved_by(self, optimizer: optimizers.Optimizer) -> list[DeferredWeight]:
        moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [w for w in self.weights if id(w.g) in moved or id(w.v) in moved]


_groups: weakref.WeakSet[DeferredGroup] = weakref.WeakSet()


def _watch_steps(group: DeferredGroup) -> None:
    """Tell a group of every optimizer step of this process; and torch that our Parameters are ordinary ones."""
    if DeferredParameter not in optimizers._foreach_supported_types:
        optimizers._foreach_supported_types.append(DeferredParameter)
        optimizers.register_optimizer_step_pre_hook(_before_step)
        optimizers.register_optimizer_step_post_hook(_after_step)
    _groups.add(group)


@uncompiled
def _before_step(optimizer: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    for group in list(_groups):
        group.before_step(optimizer, arguments, options)


@uncompiled
def _after_step(optimizer: Any, *_: Any) -> None:
    for group in list(_groups):
        group.after_step(optimizer)
