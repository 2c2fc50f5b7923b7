"""One weight under weight norm on its module: a list of torch's `parametrize` that holds (g, v) and hands out w.

Each use gets the weight it would compute now: computed for it, or kept from an earlier use. What is written into a
weight handed out, as `torch.nn.init` does, reaches g and v.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from wnsurgery import fused, other_types
from wnsurgery.deferred import DeferredGroup, DeferredParameter, DeferredWeight, is_plain_pair, weight_of
from wnsurgery.errors import PairError
from wnsurgery.kept import Kept, Rooms, probes_of, steps
from wnsurgery.large_linear import HowLarge, large_linear, nobody_looks_on, takes_input
from wnsurgery.lean_modules import LeanModule, copied_module
from wnsurgery.loans import Lasting, Loan, lend_out, outstanding
from wnsurgery.looked_up import look_up, serves
from wnsurgery.multi_tensor import Item
from wnsurgery.onlookers import aside, depth, is_intercepted
from wnsurgery.preparation import Preparation
from wnsurgery.reparam import compose_in_one_pass
from wnsurgery.straight import Straight

__all__ = ["PASSING", "WeightNormList", "at_hand", "unchanged"]

_MAX_HANDLES = 63  # weights handed out and still alive that are watched for writes
PASSING = frozenset(
    {
        *("_again", "_deferred", "_evaluation", "_handed_out", "_kept", "_lent"),
        *("_once", "_probes", "_ready", "_round", "_way"),
    }
)  # attributes that belong to this process and this moment
_OWN = PASSING | {"_preparation", "_beside"}
_is_compiling, _is_tracing, _grad_enabled = torch.compiler.is_compiling, torch._C._is_tracing, torch.is_grad_enabled


class WeightNormList(LeanModule, ParametrizationList):
    """`module.parametrizations.weight` of a converted module: original0 is g, original1 is v."""

    _again: Loan | None = None  # read in training by others than the layer, for further reads
    _deferred: DeferredWeight | None = None  # in deferred mode
    _kept: Kept | None = None
    _preparation: Preparation | None = None  # with the other weights of its net
    _beside = False  # whether weights of its pair may be out beside the kept one: another owner's, or earlier ones
    _way: Straight | None = None  # for its layer's own use in training

    def forward(self) -> Tensor:
        """The weight for one use."""
        if _is_compiling():  # compiled code would depend on what is kept, and what was made
            return self._computed()
        if _grad_enabled():
            return self.in_training()
        w = unchanged(self)
        return self._computed() if w is None else w

    def in_evaluation(self) -> Tensor:
        """The weight without a graph for its layer's own use, while nothing is compiled."""
        w = unchanged(self)
        return self._computed(private=True) if w is None else w

    def in_training(self, *, private: bool = False) -> Tensor:
        """The weight with its graph, for one use, while nothing is compiled; `private` for the layer's own, which hands
        it to nobody who could write into it."""
        made = None if self._deferred is None else self.leaf_as_it_is()
        if made is None and not private and self._again is not None:
            made = self._read_again()
        if made is None and self._way is not None:
            made = self._go_straight(self._way, private)
        return self._computed(private) if made is None else made

    def _go_straight(self, way: Straight, private: bool) -> Tensor | None:
        """The weight by the way that was found for it; None where something else is to be seen to."""
        if not self._is_quiet():
            return None
        halves = self._parameters
        g: Any = halves.get("original0")
        v: Any = halves.get("original1")
        return self._by(way, g, v, private)

    def _by(self, way: Straight, g: Any, v: Any, private: bool) -> Tensor | None:
        wanted = private or g is None or v is None or _is_wanted(g, v)  # other tensors may be in their place
        if not private and wanted and way.is_read_again() and nobody_looks_on() and way.is_of(g, v):
            return self._lend_for_long(way.lasting(), g, v)
        w = way.weight(g, v)
        if w is not None and not private:
            (self._hand_out if wanted else self._keep)(w, g, v)  # somebody may put other memory under a frozen one
        return w

    def _lend_for_long(self, w: Tensor | None, g: Tensor, v: Tensor) -> Tensor | None:
        """A weight of several uses, for the first of them."""
        again = None if w is None else lend_out(w, self, g, v, Lasting(w, g, v))
        if again is None:
            return None
        self.__dict__["_again"] = again
        outstanding.add(self, v)
        return again.view()

    def _read_again(self) -> Tensor | None:
        """The weight that was read last in training, None where it must be made anew."""
        quiet = self._is_quiet()
        if not quiet:
            self.settle()
            quiet = self._is_quiet()
        again, halves = self._again, self._parameters
        looked_on = not quiet or not nobody_looks_on()
        if again is not None and not looked_on and again.lasting.serves(*map(halves.get, ("original0", "original1"))):
            return again.view()
        if self.__dict__.pop("_again", None) is not None and again is not None and again.views:
            self.__dict__["_handed_out"] = [*self.__dict__.get("_handed_out", ()), again]  # who holds one may write yet
        return None

    def _is_quiet(self) -> bool:
        """Whether its weights that are kept and handed out are as they were, of which the former gives its memory, and
        those of other owners of its pair, and nobody looks on at its rule."""
        state = self.__dict__
        if "_kept" in state and _is_wanted(*self.pair()):  # a frozen weight is the same with gradients on
            self._let_go_of_kept()
        modules, v = state["_modules"], state["_parameters"].get("original1")
        rule = modules["0"]
        owners = outstanding.of.get(id(v))
        return not (
            len(modules) != 1
            or _is_tracing()
            or "_kept" in state
            or ("_again" in state and state["_again"].is_written())
            or ("_handed_out" in state and not all(loan.is_as_it_was() for loan in state["_handed_out"]))
            or "_deferred" in state
            or rule._forward_hooks
            or rule._forward_pre_hooks
            or "forward" in rule.__dict__
            or (owners is not None and (len(owners) > 1 or id(self) not in owners) and self._is_written_beside())
        )

    def _computed(self, private: bool = False) -> Tensor:
        rule: Any = self._modules["0"]
        g, v = self.pair()
        if "1" in self._modules:  # something is stacked on top
            return super().forward()
        if self._deferred is None and type(v) is DeferredParameter:
            self._follow(weight_of(g, v))
        if self._deferred is not None:
            leaf = self._leaf(self._deferred, g, v)
            if leaf is not None:
                return leaf
        if _is_watched(g, v):
            if type(g) is type(v) is nn.Parameter and not (_is_compiling() or _is_tracing()):
                with aside():
                    self.absorb()
            return rule(g, v)  # type: ignore[no-any-return]
        kept = self.__dict__.get("_kept")
        graphs = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        training = graphs and _is_wanted(g, v)
        known = kept is not None and not training and not (graphs and kept.w.requires_grad)  # as somebody wanted it to
        if kept is not None and known and kept.is_of(g, v) and not (self._beside and self._is_written_beside()):
            self._evaluated(kept)
            return kept.w  # type: ignore[no-any-return]
        self.settle()
        return self._for_training(rule, g, v, private) if training else self._for_evaluation(rule, g, v, private)

    def _for_evaluation(self, rule: Any, g: Tensor, v: Tensor, private: bool) -> Tensor:
        """The weight without a graph, kept until its pair changes; for its layer's own use not where the last that was
        kept had no second use, as in a discriminator that sees one fake batch a step."""
        net = self._preparation
        if net is None or not Kept.can_hold(g, v):
            return self._without_graph(rule, g, v)
        state, now = self.__dict__, (g._version, v._version, steps.count)
        is_second = state.get("_once") == now
        if private and "_once" in state and not is_second:
            state["_once"] = now
            way = None if self._way is None or _hooked(rule) else self._way
            w = None if way is None else way.without_graph(g, v, net.rooms)
            if w is not None:
                return _as_parameter(w, g, v)
            with torch.inference_mode(False), torch.no_grad():
                return _as_parameter(rule.compose(g, v, net.rooms), g, v)
        state.pop("_once", None)
        net.keep(self)
        kept = self._kept
        if kept is None:
            return self._without_graph(rule, g, v)
        self._evaluated(kept)
        kept.used = is_second
        return kept.w

    def _evaluated(self, kept: Kept) -> None:
        """An evaluation pass uses the weight kept."""
        kept.used = True
        if self._preparation is not None:
            self._preparation.evaluate(self)

    def is_to_keep(self) -> bool:
        """Whether the weight can be kept for uses in evaluation to come and is not; it is to be computed now."""
        g, v = self.pair()
        plain = "1" not in self._modules and self._deferred is None and not _is_watched(g, v)
        if not plain or not Kept.can_hold(g, v):
            return False
        kept = self.__dict__.get("_kept")
        if kept is not None and kept.is_of(g, v) and not (self._beside and self._is_written_beside()):
            return False
        self.settle()
        return True

    def keep(self, w: Tensor | None = None) -> None:
        """Keep the weight for uses in evaluation to come: one that somebody has computed, or compute it."""
        g, v = self.pair()
        rule: Any = self._modules["0"]
        if w is None or _hooked(rule):
            self._without_graph(rule, g, v)
        else:
            self._keep(w, g, v)

    def _keep(self, w: Tensor, g: Tensor, v: Tensor) -> None:
        w = _as_parameter(w, g, v)
        if Kept.can_hold(g, v):
            state = self.__dict__
            state["_kept"] = Kept(w, g, v, probes=probes_of(self, g, v))
            if "_handed_out" in state or "_again" in state:
                state["_beside"] = True
            outstanding.add(self, v)
        else:
            self._hand_out(w, g, v)

    def _without_graph(self, rule: Any, g: Tensor, v: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # an ordinary tensor, so that its version tells of writes
            w: Tensor = rule.compose(g, v, self._rooms())
        self._keep(w, g, v)
        return w

    def outside(self, w: Tensor) -> Tensor:
        """A weight just handed out in training to somebody else than a forward pass, who may write through `.data`."""
        again = self._again
        if again is not None:
            again.look()
            return w
        for loan in self.__dict__.get("_handed_out", ()):
            if loan() is w:
                loan.look()
        return w

    def _for_training(self, rule: Any, g: Tensor, v: Tensor, private: bool) -> Tensor:
        """The weight with its graph: by the shortest way, or with those that the last pass used."""
        net, ready = self._preparation, None
        hooked = _hooked(rule)  # whoever looks on sees its forward pass
        if v.is_cpu:
            fused.start()  # before the first weight: a pass that runs again must save for its gradients what it saved
        sizes = None if hooked else self._sizes(rule, g, v)
        if sizes is not None and (isinstance(sizes, fused.Sizes) or sizes.as_it_is):
            way = self._way
            if way is None or not way.is_of(g, v):
                way = self.__dict__["_way"] = Straight(g, v, sizes, rule.axes, self._rooms())
            made = self._by(way, g, v, private)
            if made is not None:
                return made
            ready = compose_in_one_pass(g, v, sizes, self._rooms()) if isinstance(sizes, fused.Sizes) else None
        elif sizes is None and net is not None and not hooked:
            ready = net.take(self, g, v)
        w: Tensor = rule.compose(g, v, self._rooms(), ready)
        if not private:
            self._hand_out(w, g, v)
        return w

    @staticmethod
    def _sizes(rule: Any, g: Tensor, v: Tensor) -> fused.Sizes | other_types.Rows | None:
        """How the compiled kernels see the pair; None where they do not take it."""
        how = rule.axes.kept, rule.axes.groups, rule.magnitude
        sizes = fused.plan(g, v, *how)
        return other_types.rows_of(g, v, *how) if sizes is None else sizes

    def item(self) -> Item | None:
        """Its pair and rule, None where the factor cannot be told from the row norms in passing."""
        g, v = self.pair()
        rule: Any = self._modules["0"]
        known = v.device.type == "cpu" and not _is_watched(g, v) and "1" not in self._modules and rule.axes.fit(g, v)
        return Item(g, v, rule.axes, rule.magnitude, v) if known else None

    def _is_shown(self) -> bool:
        """Whether the weight itself is somebody else's matter: a hook's, another parametrization's, deferred mode's."""
        hooked = _hooked(self) or _hooked(self._modules["0"])
        return hooked or self._deferred is not None or "1" in self._modules or bool(parametrize._cache_enabled)

    def rows(self, ids: Tensor, padding: int | None) -> Tensor | None:
        """Rows of the weight in training, None where the whole weight must be computed, or be there already."""
        g, v = self.pair()
        rule: Any = self._modules["0"]
        if not serves(ids, v, rule.axes) or self._is_shown() or _is_watched(g, v) or forward_ad._current_level >= 0:
            return None
        if not (rule.axes.fit(g, v) and g.ndim == 2):
            return None
        self.absorb()
        return look_up(ids, g, v, rule.magnitude, padding)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x w^T + bias in training for a matrix w, None where w is to be computed by itself, as for all but large
        weights."""
        way, halves = self._way, self._parameters
        g: Any = halves.get("original0")
        v: Any = halves.get("original1")
        if g is None or v is None or not _is_wanted(g, v):
            return None
        how = None if way is None or not (self._is_quiet() and way.is_of(g, v)) else way.large
        if how is None:
            how = self._large_way()
        if how is None or not takes_input(x, v, bias):
            return None
        return large_linear(x, g, v, bias, how) if nobody_looks_on() else None

    def _large_way(self) -> HowLarge | None:
        """How a linear layer computes its weight with its output, from the pair as it is; None where that is not for
        it."""
        g, v = self.pair()
        rule: Any = self._modules["0"]
        if self._is_shown() or _is_watched(g, v) or v.ndim != 2 or not rule.axes.fit(g, v):
            return None
        fused.start()
        sizes = fused.plan(g, v, rule.axes.kept, rule.axes.groups, rule.magnitude)
        if sizes is None:
            return None
        self.settle()
        net, own = self._preparation, self._rooms()
        way = self.__dict__["_way"] = Straight(g, v, sizes, rule.axes, own)
        shared, is_far = (Rooms(), True) if net is None else (net.rooms, net.elements >= fused.far())
        how = way.large = HowLarge(rule.axes, sizes, own, shared, is_far)
        return how

    def leaf_as_it_is(self) -> Tensor | None:
        """The weight of deferred mode, where nothing is to be done before its use."""
        weight, halves = self._deferred, self._parameters
        if weight is None or len(self._modules) != 1 or _is_tracing():
            return None
        kept = weight.kept
        if kept is None or not kept.is_of(halves.get("original0"), halves.get("original1")):
            return None
        return None if weight.shown is not weight.leaf and weight.has_strayed() else weight.shown

    def _leaf(self, weight: DeferredWeight, g: Tensor, v: Tensor) -> Tensor | None:
        """The weight of deferred mode, None where whoever is watching must see it computed from g and v."""
        if _is_compiling():  # kept current by optimizer steps and loading
            return weight.shown if type(v) is DeferredParameter and not torch.compiler.is_exporting() else None
        return weight.current(g, v) if not _is_tracing() else None

    def defer(self, weight: DeferredWeight | None, group: DeferredGroup) -> DeferredWeight | None:
        """Enter deferred mode, with the weight another owner of the pair has made if there is one; None where something
        is stacked on top."""
        if "1" in self._modules:
            return None
        self.absorb()
        for name in PASSING:
            self.__dict__.pop(name, None)
        g, v = self.pair()
        rule: Any = self._modules["0"]
        weight = DeferredWeight(group, rule, g, v) if weight is None else weight  # type: ignore[arg-type]
        weight.owners.add(self)
        self.__dict__["_deferred"] = weight
        return weight

    def _follow(self, weight: DeferredWeight | None) -> None:
        """Enter deferred mode, where other owners of the pair have."""
        if weight is not None and not (_is_compiling() or _is_tracing()):
            self.defer(weight, weight.group)

    def undefer(self, *, settle: bool = True) -> None:
        """Leave deferred mode; `settle=False` for a pair that is of no use any more."""
        weight = self._deferred
        if weight is not None:
            del self.__dict__["_deferred"]
            weight.owners.discard(self)
            if not weight.owners:  # others of a tied weight
                weight.release(settle=settle)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As any module's; but to DistributedDataParallel, which asks module by module whose gradients to exchange, a
        deferred pair names its leaf, which is what gets one."""
        leaf = None if recurse or self._deferred is None else self._deferred.shown
        if leaf is not None and sys._getframe(1).f_globals.get("__name__") == "torch.nn.parallel.distributed":
            yield (f"{prefix}." if prefix else "") + "leaf", leaf
            return
        yield from super().named_parameters(prefix, recurse, remove_duplicate)

    def _rooms(self) -> Rooms:
        rooms: Rooms | None = self.__dict__.get("_lent")
        if rooms is None:
            rooms = self.__dict__["_lent"] = Rooms()
        return rooms

    def _hand_out(self, w: Tensor, g: Tensor, v: Tensor) -> None:
        """Watch a weight of this pair for writes from now on."""
        loan = lend_out(w, self, g, v)
        if loan is not None:
            held = self.__dict__.get("_handed_out")
            self.__dict__["_handed_out"] = [loan] if held is None else [*held[-_MAX_HANDLES:], loan]
            outstanding.add(self, v)

    def is_out(self) -> bool:
        """Whether a weight is kept or handed out."""
        state = self.__dict__
        return "_kept" in state or "_handed_out" in state or "_again" in state

    def is_written(self) -> bool:
        """Whether somebody wrote into a weight that is kept or handed out."""
        kept = self._kept
        return (kept is not None and kept.is_written()) or any(loan.is_written() for loan in self._loans())

    def _loans(self) -> list[Loan]:
        """The weights handed out, but for the one that is kept."""
        handed_out = self.__dict__.get("_handed_out", ())
        return [*handed_out] if self._again is None else [self._again, *handed_out]

    def _is_written_beside(self) -> bool:
        """Whether somebody wrote into a weight beside the kept one: another owner's of its pair, or an earlier one."""
        loans, others = self._loans(), outstanding.beside(self, self.pair()[1])
        if not (others or loans):
            self.__dict__.pop("_beside", None)
        return any(loan.is_written() for loan in loans) or any(other.is_written() for other in others)

    def unwatch(self, gone: Loan) -> None:
        """A weight was let go as it was handed out."""
        state = self.__dict__
        left = [loan for loan in state.get("_handed_out", ()) if loan is not gone]
        if left:
            state["_handed_out"] = left
        else:
            state.pop("_handed_out", None)

    def pair(self) -> tuple[Tensor, Tensor]:
        g: Tensor | None = self._parameters.get("original0")
        v: Tensor | None = self._parameters.get("original1")
        if g is None or v is None:  # functional_call and replicas put plain tensors in their place
            g, v = self.__dict__.get("original0", g), self.__dict__.get("original1", v)
        assert g is not None and v is not None
        return g, v

    def settle(self) -> None:
        """Get ready for a weight computed anew: writes reach g and v, and a kept weight gives its memory."""
        self._let_go_of_kept()
        self.absorb()

    def _let_go_of_kept(self) -> None:
        """A weight that is kept gives its memory, unless somebody has written into it; who holds it may write yet."""
        kept = self.__dict__.get("_kept")
        if kept is not None and not kept.is_written():
            self.__dict__.pop("_kept", None)
            if not kept.used:
                self.__dict__["_once"] = None
            g, v = self.pair()
            if kept.is_held() and kept.was_of(g, v):
                self._hand_out(kept.w, g, v)
                self.outside(kept.w)

    def absorb(self) -> None:
        """Let in-place writes into weights handed out reach g and v.

        `nn.init.zeros_(module.weight)` writes into a computed tensor. Its version counter tells; the write is
        taken over before anything else reads the pair, unless g or v themselves changed in between. A write that came
        through another owner of a tied pair is, too, where there is none that came through this one.
        """
        if self._deferred is not None:
            self._deferred.settle()
            return
        if not self._absorb_own() and outstanding.of:
            for other in outstanding.beside(self, self.pair()[1]):
                if other.is_written():
                    other._absorb_own()
        if type(self._parameters.get("original1")) is DeferredParameter:
            weight = weight_of(*self.pair())  # of other owners
            if weight is not None:
                weight.settle()

    def _absorb_own(self) -> bool:
        """Let a write into a weight that this owner has handed out reach g and v; whether one did."""
        kept = self.__dict__.get("_kept")
        again, loans = self._again, self.__dict__.pop("_handed_out", None)
        if kept is None and again is None and not loans:
            return False
        now_g, now_v = self.pair()
        if kept is not None and kept.is_written():
            self.__dict__.pop("_kept", None)
            if kept.was_of(now_g, now_v):
                self._store(kept.w)
                return True
        if again is not None and again.is_written():
            self.__dict__.pop("_again", None)
            if again.is_of(now_g, now_v):
                self._store(again.written())
                return True
        if not loans:
            return False
        live = []
        for loan in loans:
            if not loan.is_of(now_g, now_v):
                continue
            if loan.is_written():
                self._store(loan.written())
                return True
            if loan.is_out():
                live.append(loan)
        if live:
            self.__dict__["_handed_out"] = live
        return False

    def right_inverse(self, value: Tensor) -> None:
        """`module.weight = tensor`: decompose the tensor into g and v, in place."""
        if "1" in self._modules:
            super().right_inverse(value)
            return
        self._store(value)

    def _store(self, value: Tensor) -> None:
        rule: Any = self._modules["0"]
        g, v = self.pair()
        if not isinstance(value, Tensor):
            raise TypeError(f"a weight under weight norm takes a tensor, not {type(value).__name__}")
        if value.shape != v.shape:
            raise PairError(f"a weight of shape {tuple(value.shape)} does not fit {tuple(v.shape)}")
        weight = weight_of(g, v) if type(v) is DeferredParameter else None
        with torch.no_grad():
            new_g, new_v = rule.right_inverse(value.detach().to(v.dtype))
            if weight is not None:
                weight.pass_on()
            g.copy_(new_g)
            v.copy_(new_v)
        for name in ("_again", "_handed_out", "_kept"):
            self.__dict__.pop(name, None)
        self._refresh()

    def _refresh(self) -> None:
        """Let compiled code, which runs on the leaf without asking, see what has become of g and v."""
        weight = self._deferred
        if weight is not None:
            g, v = self.pair()
            if is_plain_pair(g, v):
                if len(weight.owners) > 1 and not (g is weight.g and v is weight.v):
                    weight.owners.discard(self)  # the others keep theirs: `model.to("meta")` parts what was tied
                    weight = self.defer(weight_of(g, v), weight.group) or weight
                else:
                    weight.adopt(g, v)  # type: ignore[arg-type]
            weight.current(g, v)

    def __getattr__(self, name: str) -> Any:
        if name in ("original0", "original1") and not torch.compiler.is_compiling():
            self.absorb()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        self.absorb()
        return {n: value for n, value in super().__getstate__().items() if n not in _OWN}

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightNormList:
        self.absorb()
        twin = copied_module(self, memo, without=_OWN)
        if self._preparation is not None:
            twin.__dict__["_preparation"] = copy.deepcopy(self._preparation, memo)
        return twin

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.absorb()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.absorb()
        if not self._load_pair(*arguments[:3]):
            self.__dict__.pop("_way", None)  # which would keep a pair in memory that another takes the place of
            told: list[str] = arguments[6]
            before = len(told)
            super()._load_from_state_dict(*arguments)
            if len(told) > before and self._keeps_other_axes(*arguments[:2]):
                told.append(
                    f"{arguments[1]}original0 keeps other axes there than in this model: load_model (wnsurgery) loads "
                    "either, and apply_weight_norm takes dim= to keep the axes of a state dict"
                )
        self._refresh()

    def _keeps_other_axes(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether what was to be loaded is a pair for this very weight with a magnitude for each of other rows."""
        (g, v), names = self.pair(), ("original0", "original1")
        given = [getattr(state_dict.get(prefix + name), "shape", None) for name in names]
        return given[0] is not None and given[0] != g.shape and given[1] == v.shape

    def _load_pair(self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> bool:
        """Copy g and v where the entries are just these and fit: what torch's method comes to, in half the time."""
        if (
            len(state_dict) != 2
            or type(self) is not WeightNormList
            or self._load_state_dict_pre_hooks
            or metadata.get("assign_to_params_buffers")
            or torch.__future__.get_swap_module_params_on_conversion()
        ):
            return False
        pairs = [(self._parameters.get(name), state_dict.get(prefix + name)) for name in ("original0", "original1")]
        if not all(_copies_as_it_is(held, given) for held, given in pairs):
            return False
        try:
            with torch.no_grad():
                for held, given in pairs:
                    held.copy_(given)  # type: ignore[union-attr,arg-type]
        except Exception:  # torch's method does it again, and says what went wrong
            return False
        return True

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.absorb()
        weight = self._deferred
        for name in PASSING:
            self.__dict__.pop(name, None)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if weight is not None:
            if not weight.is_laid_as(*self.pair()):
                weight.adopt(*self.pair())  # type: ignore[arg-type]
            self.__dict__["_deferred"] = weight
            self._refresh()
        return self


def _copies_as_it_is(held: Any, given: Any) -> bool:
    """Whether loading a parameter is copying a plain tensor of its shape into it."""
    plain = type(held) is nn.Parameter and type(given) in (Tensor, nn.Parameter)
    return plain and held.shape == given.shape and not held.is_meta


def at_hand(module: nn.Module, name: str) -> Tensor | None:
    """`unchanged` of a module's weight for the module's own use in evaluation, in as few steps as can be: what a pass
    runs between two layers the processor has to find anew each time. None where the long way is to be gone."""
    table = module._modules.get("parametrizations")
    entry: Any = None if table is None else table._modules.get(name)
    if type(entry) is not WeightNormList or entry._forward_hooks or entry._forward_pre_hooks:
        return None
    if "forward" in entry.__dict__:  # put there by somebody, as accelerate does
        return None
    return None if parametrize._cache_enabled else unchanged(entry)


def unchanged(entry: WeightNormList) -> Tensor | None:
    """The weight that was kept and used in evaluation, or deferred mode's, where its pair is as it was and nothing is
    on top; else None, upon which the list is to be asked. For uses without gradients, while nothing is compiled."""
    kept = entry._kept
    if kept is None:
        return None if entry._deferred is None else entry.leaf_as_it_is()
    if not kept.used or len(entry._modules) != 1 or _is_tracing() or (depth() and is_intercepted()):
        return None
    halves = entry._parameters
    if not kept.is_of(halves.get("original0"), halves.get("original1")):
        return None
    if entry._beside and entry._is_written_beside():
        return None
    return kept.w


def _as_parameter(w: Tensor, g: Tensor, v: Tensor) -> Tensor:
    """A weight without a graph with the flag that a Parameter has under no_grad: by it matmul chooses its kernel, and
    so the last bit."""
    if not _is_wanted(g, v):
        return w
    if torch.is_autocast_enabled(w.device.type):
        torch.clear_autocast_cache()  # which would hold a cast of each weight there has been, for it looks like a leaf
    return w.requires_grad_()


def _hooked(module: nn.Module) -> bool:
    """Whether somebody has put something around a module's forward pass, or in its place."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _is_wanted(g: Tensor, v: Tensor) -> bool:
    """Whether g or v is to be trained."""
    return g.requires_grad or v.requires_grad


def _is_watched(g: Tensor, v: Tensor) -> bool:
    """Whether tracing, a function transform or a mode is on: then nothing may be remembered between accesses."""
    return (
        type(v) is not nn.Parameter
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or is_intercepted()
        or g.is_meta
        or v.is_meta
    )
