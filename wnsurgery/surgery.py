"""Apply a plan to a live module, and fold weight norm back into plain weights: all or nothing, in place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from itertools import compress, zip_longest
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from wnsurgery.batchnorm import BatchNormMode, folded_means, without_batch_norm
from wnsurgery.carried_state import Swap
from wnsurgery.data_init import InitReport, data_dependent_init
from wnsurgery.deferred import OWNER
from wnsurgery.errors import NonFiniteWeightError, PairError, SelectionError, first_line
from wnsurgery.fans import FanReport, fan_init
from wnsurgery.following import Follower, Optimizers
from wnsurgery.fully_sharded import FullyShard
from wnsurgery.hosts import fresh_parameter, install, new_parameter, reorder_parameters, restore_parameter
from wnsurgery.mechanism import WeightNormList
from wnsurgery.modes import Mode, check_can_defer, check_mode, set_weight_norm_mode
from wnsurgery.plan import Dim, Pattern, Plan, Site, plan_weight_norm
from wnsurgery.preparation import Preparation
from wnsurgery.reparam import ZERO_LOG, Axes, Magnitude, WeightNorm, compose, decompose
from wnsurgery.resizing import guard_resizing
from wnsurgery.safety import all_or_nothing, collecting_later, is_recurrent, plain_grad_mode, values_kept
from wnsurgery.small_weights import SmallWeights, is_small, small_magnitudes
from wnsurgery.targets import bias_of, check_scales, normed, scales_of
from wnsurgery.tied_names import rename_tied
from wnsurgery.walk import Slot, check_module, legacy_hooks, modules_of, slots

__all__ = ["apply_weight_norm", "fold_weight_norm", "is_weight_normed"]

_log = logging.getLogger("wnsurgery")
_WEIGHT_NORM = ("ours", "torch", "legacy")
_MAGNITUDES = (None, torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FEW = 512  # small weights that are computed at a time

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def apply_weight_norm(  # noqa: PLR0913 - what becomes of weights, of BatchNorms, and where g starts
    model: M,
    *,
    include: Pattern | None = None,
    exclude: Pattern | None = None,
    dim: Dim | Mapping[str, Dim] = "auto",
    magnitude: Magnitude = "linear",
    magnitude_dtype: torch.dtype | None = None,
    freeze_magnitude: bool = False,
    init: Literal["preserve", "data", "fan"] = "preserve",
    data: Any = None,
    optimizer: Optimizers | None = None,
    batch_norm: BatchNormMode = "keep",
    inputs: Any = None,
    mode: Mode = "parametrized",
    **init_options: Any,
) -> M:
    """Replace weights w by g * v / ||v||, in place, keeping the function in every bit; returns the model.

    >>> model = wn.apply_weight_norm(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)))
    >>> [name for name, _ in model.named_parameters()][:3]
    ['0.bias', '0.parametrizations.weight.original0', '0.parametrizations.weight.original1']

    g (`original0`) is ||w||, one value per output channel, shaped like torch's: (out, 1, ...). v (`original1`) is w.
    A tied weight gets one (g, v) for all its owners; a frozen weight gets a frozen g and v. Either every weight of the
    plan is converted or, on an error, none. Weights that are under weight norm already, ours or torch's, stay as
    they are, so calling twice does no harm; that `init` and `freeze_magnitude` leave them alone is logged as
    "wnsurgery": `data_dependent_init`, `fan_init` and `freeze_magnitude` are the calls for them.

    Args:
        model: any module tree; convert it before wrapping it in DistributedDataParallel.
        include, exclude, dim: which weights and which kept axes, see `plan_weight_norm`.
        magnitude: "linear" trains g, "log" trains s with g = e^s.
        magnitude_dtype: type of g; None means float32 (float64 for float64 weights), which 16-bit weights
            need to keep every bit.
        freeze_magnitude: g gets no gradient: the norm of every weight row stays what it is.
        init: "preserve" keeps the function; "data" then sets g and biases from `data`, the paper's recipe; "fan" sets
            g, orthogonal v and zero biases without data, see `fan_init`.
        data: a batch or an iterable of batches for init="data"; see `data_dependent_init` and `fan_init`, which also
            name the further options (`init_scale`, `mask`, `generator`, ...). What they left alone is logged as
            "wnsurgery".
        optimizer: the optimizer in use, or a sequence of them, to train on with: g and v take the place of w in its
            groups, and what it keeps for w (momentum, Adam's averages) and gradients already accumulated pass to g
            and v by the chain rule. Optimizers whose state has no known rule forget these weights' state, as all do
            when weights change (`init`, a BatchNorm that `batch_norm` takes); a warning is logged. torch's fused SGD,
            which takes no mixture, gets momentum of zero for them: under dampening d their next step is 1 - d times
            what it would be without. One that an earlier surgery left behind, or that holds nothing of the model,
            gets a warning; `stale_parameters` tells more. Schedulers go on working. What wraps an optimizer and hands
            out its groups and state, as accelerate does, will do.
        batch_norm: what becomes of each BatchNorm, see `plan_batch_norm`; the evaluation function stays the same to
            rounding. "fold" folds it into the layer beside it, which then gets its weight norm; "mean-only" puts a
            `MeanOnlyBatchNorm2d` or its like in its place, its scale going into g. Those kept are logged as
            "wnsurgery", with the reason.
        inputs: example arguments that show the data flow for `batch_norm`; the first batch of `data` serves, too.
        mode: "deferred" runs the net on plain leaf weights and does the work of weight norm once per optimizer step:
            the same training. It pays with gradient accumulation, under `torch.compile` and for large convolutional
            nets, which then train at nearly the price of the plain net; for nets of tiny layers, and for large Linear
            layers at small batches, the default mode is faster. See `set_weight_norm_mode`.

    Raises:
        SelectionError: a pattern matches nothing, the model holds no weight to convert, a layer's class cannot be
            subclassed, or the optimizer (LBFGS, Muon) cannot follow.
        NonFiniteWeightError: a weight holds NaN or infinity; named.
    """
    if init not in ("preserve", "data", "fan"):
        raise SelectionError(f'init must be "preserve", "data" or "fan", not {init!r}')
    if (init == "data") != (data is not None):
        raise SelectionError('init="data" and data=... go together')
    _check_init_options(init, init_options)
    check_mode(mode)
    modules = _unwrapped(model)
    if mode == "deferred":
        check_can_defer(model)
    sharding = FullyShard(model)
    follower = Follower(model, optimizer)
    with without_batch_norm(model, batch_norm, inputs, data=data) as norms:
        with collecting_later():
            plan = plan_weight_norm(model, include=include, exclude=exclude, dim=dim)
        asked = init != "preserve" or freeze_magnitude
        old = normed(slots(model, plain=False), include, exclude) if asked else []
        if not plan.sites and "init_scale" in init_options:
            scales_of(init_options["init_scale"], slots(model, plain=False))
        options: dict[str, Any] = {"magnitude": magnitude, "magnitude_dtype": magnitude_dtype}
        written = _written_by(init, plan)
        with values_kept(written), all_or_nothing(attributes=init != "preserve") as save:
            options["freeze_magnitude"] = freeze_magnitude and init == "preserve"
            _carry_out(plan, **options, sharding=sharding, save=save)
            if init != "preserve" and plan.sites:
                names = {site.fqn for site in plan.sites}
                init_options["include"] = lambda _, name: name in names
                make = fan_init if init == "fan" else partial(data_dependent_init, data=data)
                _finish_init(plan, make(model, **init_options), freeze_magnitude)
            with plain_grad_mode():
                changes = [f"init={init!r}"] if init != "preserve" else []
                changes += [f"batch_norm={batch_norm!r}"] if norms.steps else []
                follower.split(map(_swap_at, plan.sites), changed_by=" and ".join(changes))
                follower.settle(p for step in norms.steps for p in model.get_submodule(step.layer).parameters())
    _log_old(old, init, freeze_magnitude)
    rename_tied(modules)
    guard_resizing(modules)
    if mode == "deferred":
        set_weight_norm_mode(model, mode)
    return model


def _check_init_options(init: str, options: Mapping[str, Any]) -> None:
    """Raise TypeError for options that the initialisation does not have, SelectionError for scales that are none."""
    makes: dict[str, Callable[..., Any]] = {"data": data_dependent_init, "fan": fan_init}
    known = signature(makes[init]).parameters if init in makes else ()
    if unknown := ", ".join(sorted(options.keys() - set(known))):
        hint = f"init={init!r} has none of these" if known else 'init="data" and init="fan" have more'
        raise TypeError(f"apply_weight_norm got unexpected arguments: {unknown} ({hint})")
    if "init_scale" in options:
        check_scales(options["init_scale"])


def _written_by(init: str, plan: Plan) -> Iterator[Tensor]:
    """The tensors that an initialisation writes to, of those that a model has before its conversion."""
    for site in plan.sites if init != "preserve" else ():
        yield from (bias for owner in site.owners if (bias := bias_of(owner)) is not None)
        if init == "fan":
            yield site.weight


def _finish_init(plan: Plan, report: InitReport | FanReport, freeze_magnitude: bool) -> None:
    """Say what an initialisation left alone; freeze g only now, if it is to be."""
    for skip in report.left:
        _log.warning("%s keeps its magnitude: %s", skip.name, skip.reason)
    for site in plan.sites if freeze_magnitude else ():
        entry = site.slot.entry
        entry.original0.requires_grad_(False)


def _log_old(old: list[Slot], init: str, freeze_magnitude: bool) -> None:
    """Say which wishes do not reach the weights that were under weight norm already, and what does."""
    wishes = [(f"init={init!r}", "data_dependent_init" if init == "data" else "fan_init", old)]
    wishes = wishes if init != "preserve" else []
    if freeze_magnitude:
        thawed = [slot for slot in old if slot.magnitude is not None and slot.magnitude.requires_grad]
        wishes.append(("freeze_magnitude=True", "freeze_magnitude", thawed))
    for wish, call, slots_ in wishes:
        if count := len({id(slot.tensor) for slot in slots_}):
            _log.warning("%s does not reach %d weights that were under weight norm already; call %s", wish, count, call)


def _swap_at(site: Site) -> Swap:
    """The weight of a site just converted, and its pair."""
    entry = site.slot.entry
    weight: Any = site.weight
    return Swap(weight, entry.original0, entry.original1, site.axes, entry[0].magnitude)


def _carry_out(
    plan: Plan,
    magnitude: Magnitude,
    magnitude_dtype: torch.dtype | None,
    freeze_magnitude: bool,
    sharding: FullyShard,
    save: Callable[[nn.Module], None],
) -> None:
    """Apply a plan; on an error the caller puts the modules back."""
    if magnitude not in ("linear", "log"):
        raise SelectionError(f'magnitude must be "linear" or "log", not {magnitude!r}')
    kind = magnitude_dtype
    if kind not in _MAGNITUDES:
        raise SelectionError(f"magnitude_dtype must be torch.float64, float32, bfloat16 or float16, not {kind!r}")
    with plain_grad_mode(), collecting_later():
        pairs = []
        plain = magnitude == "linear" and magnitude_dtype in (None, torch.float32)
        weights = [(site.weight, site.axes) for site in plan.sites] if plain else []
        known = (g for some in _in_cache(weights) for g in small_magnitudes(some))
        for site, g in zip_longest(plan.sites, known):
            if sharding:
                sharding.check(site.fqn, (site.slot.module, site.slot.parameter), site.weight)
            if g is not None:  # all its rows are finite and not zero
                pairs.append((g, site.weight.detach()))
                continue
            try:
                pair = decompose(site.weight, site.axes, magnitude=magnitude, magnitude_dtype=magnitude_dtype)
            except NonFiniteWeightError as error:
                raise NonFiniteWeightError(f"{site.fqn}: {error.message}") from error
            pairs.append(pair)
            if magnitude == "log" and not pair[0].is_meta and bool((pair[0] == ZERO_LOG).any()):
                _log.warning("%s: its rows of zeros stay zero, since e^s never is", site.fqn)
        with sharding.all_or_nothing():
            net = Preparation()
            for site, (g, v) in zip(plan.sites, pairs, strict=True):
                for owner in site.owners:
                    save(owner.module)
                    rule = WeightNorm(site.axes, magnitude, magnitude_dtype)
                    try:
                        g, v = install(owner.module, owner.parameter, rule, (g, v), net)  # noqa: PLW2901 - owners share these
                    except Exception:
                        _check_class(owner)
                        raise
                if freeze_magnitude:
                    g.requires_grad_(False)
                if sharding:
                    places = [(owner.module, owner.parameter) for owner in site.owners]
                    sharding.split(site.fqn, places, [owner.entry for owner in site.owners])
    _log.info("weight norm applied to %d weights", len(plan.sites))


def _check_class(owner: Slot) -> None:
    """Raise SelectionError where the class of a layer is why its weight could not be exchanged."""
    kind: Any = type(owner.module)
    try:
        type(kind)(kind.__name__, (kind,), {})
    except Exception as error:  # `__init_subclass__` and metaclasses raise what they like
        raise SelectionError(
            f"{owner.fqn}: {kind.__name__} cannot be subclassed, which weight norm needs: {first_line(error)}",
            hint=f"exclude={owner.fqn!r}, or let the class have subclasses",
        ) from error


def is_weight_normed(model: nn.Module) -> bool:
    """Whether any weight of a module tree is under weight norm: ours, torch's new or torch's legacy one.

    >>> wn.is_weight_normed(wn.apply_weight_norm(nn.Linear(3, 2)))
    True

    Args:
        model: any module tree.
    """
    return any(
        slot.form in _WEIGHT_NORM or (slot.form == "other" and _is_stacked(slot)) for slot in slots(model, plain=False)
    )


def fold_weight_norm(model: M, *, optimizer: Optimizers | None = None) -> M:
    """Replace every (g, v) by the plain weight g * v / ||v||, in place; returns the model.

    Knows our weight norm, torch's `parametrizations.weight_norm` and torch's legacy `weight_norm`, any tensor name
    and `dim`, mixed in one tree. Afterwards the weight is a Parameter again, frozen if its pair was frozen, ties
    are ties, and no class, hook or attribute of weight norm is left. Folding a plain model does nothing. Either
    every weight is folded or, on an error, none.

    Ours folds to the very bits the forward used. Torch's own arithmetic is up to 3 units in the last place off;
    its weights fold to ours, which are within 1.5 of the exact value, as they do in a checkpoint file.

    >>> layer = nn.Linear(3, 2)
    >>> before = layer.weight.clone()
    >>> torch.equal(wn.fold_weight_norm(wn.apply_weight_norm(layer)).weight, before), type(layer).__name__
    (True, 'Linear')

    A mean-only batch normalization goes into the bias of the layer before it and leaves an `nn.Identity`: the layer
    that tracing finds or, in a forward that cannot be traced, the one it was converted from. One without such a layer
    stays, which is logged as "wnsurgery".

    Args:
        model: any module tree.
        optimizer: the optimizer in use, or a sequence of them: w takes the place of v in its groups (of g, where
            only that is being trained; g and v may be in different groups), and momentum, Adam's averages and
            gradients pass back to w by the chain rule. A row with g = 0 keeps no part across its direction. Those of
            a mean-only batch normalization's bias go over to the layer's, which gets the same gradient; where they
            cannot, a warning is logged.

    Raises PairError when a pair does not fit together or another parametrization is stacked on it, SelectionError
    when the optimizer (LBFGS) cannot follow.
    """
    with plain_grad_mode(), collecting_later():
        modules = _unwrapped(model)
        sharding = FullyShard(model)
        follower = Follower(model, optimizer)
        means = folded_means(model, modules)
        pairs = _pairs(model, sharding)
        weights = _plain_weights(pairs)
        deferred: list[WeightNormList] = []
        recurrent: list[nn.Module] = []
        halves = [_halves(pair.owners[0]) if sharding else None for pair in pairs]
        with all_or_nothing() as save, sharding.all_or_nothing():
            for pair, weight in zip(pairs, weights, strict=True):
                for slot in pair.owners:
                    save(slot.module)
                    if is_recurrent(slot.module):
                        recurrent.append(slot.module)
                    if slot.form == "legacy":
                        _remove_legacy(slot, weight)
                    else:
                        entry = _remove_parametrized(slot, weight)
                        if isinstance(entry, WeightNormList) and entry._deferred is not None:
                            deferred.append(entry)
            for pair, weight, places in zip(pairs, weights, halves, strict=True) if sharding else ():
                if places is not None:
                    sharding.join(weight, places, [(slot.module, slot.parameter) for slot in pair.owners])
            for module in recurrent:
                _refresh_recurrent(module)
            follower.join(map(_Pair.swap, pairs, weights))
        for entry in deferred:
            entry.undefer(settle=False)
        heirs = [fold_mean() for fold_mean in means]
        follower.inherit(heir for heir in heirs if heir is not None)
        follower.settle()
        rename_tied(modules)
        guard_resizing(modules)
    _log.info("weight norm folded out of %d weights", len(pairs))
    return model


class _Pair(NamedTuple):
    """One (g, v) to fold, with its rule and all the slots that hold it."""

    g: Tensor
    v: Tensor
    axes: Axes
    magnitude: Magnitude
    owners: list[Slot]

    def swap(self, weight: nn.Parameter) -> Swap:
        return Swap(weight, self.g, self.v, self.axes, self.magnitude)  # type: ignore[arg-type]


def _pairs(model: nn.Module, sharding: FullyShard) -> list[_Pair]:
    """Every pair of a model, in walking order."""
    found: dict[tuple[int, int], _Pair] = {}
    for slot in slots(model, plain=False):
        if slot.form not in _WEIGHT_NORM:
            if slot.form == "other" and _is_stacked(slot):
                raise PairError(f"{slot.fqn}: another parametrization is stacked on its weight norm; remove that first")
            continue
        g, v = slot.magnitude, slot.tensor
        if g is None or v is None:
            raise PairError(f"{slot.fqn}: one half of the (g, v) pair is missing")
        if sharding:
            sharding.check(slot.fqn, _halves(slot)[1], v)
        try:
            axes, magnitude = _rule_of(slot)  # of each owner: a write may be pending with any of them
        except PairError as error:
            raise PairError(f"{slot.fqn}: {error.message}") from error
        known = found.get((id(g), id(v)))
        if known is not None:
            known.owners.append(slot)
            continue
        found[id(g), id(v)] = _Pair(g, v, axes, magnitude, [slot])
    return list(found.values())


def _halves(slot: Slot) -> tuple[tuple[nn.Module, str], tuple[nn.Module, str]]:
    """Who holds g and v of a pair, and under which names."""
    if slot.form == "legacy":
        return (slot.module, f"{slot.parameter}_g"), (slot.module, f"{slot.parameter}_v")
    return (slot.entry, "original0"), (slot.entry, "original1")


def _plain_weights(pairs: Sequence[_Pair]) -> list[nn.Parameter]:
    """The folded weights as Parameters, with the attributes people hung on v."""
    small = list(map(_is_small, pairs))
    chosen = [(pair.g, pair.v) for pair in compress(pairs, small)]
    known = (w for some in _in_cache(chosen) for w in SmallWeights(some).weights())
    weights = []
    for (g, v, axes, magnitude, owners), is_known in zip(pairs, small, strict=True):
        w = next(known) if is_known else None
        if w is not None:
            weight = fresh_parameter(w, g.requires_grad or v.requires_grad)
        else:
            try:
                w = compose(g, v, axes, magnitude=magnitude).detach()
            except PairError as error:
                raise PairError(f"{owners[0].fqn}: {error.message}") from error
            weight = new_parameter(w, g.requires_grad or v.requires_grad)
        if v.__dict__:
            weight.__dict__.update((name, value) for name, value in v.__dict__.items() if name != OWNER)
        weights.append(weight)
    return weights


def _in_cache(pairs: Sequence[T]) -> Iterator[Sequence[T]]:
    """A few small weights or pairs at a time, so that what is computed on the way to them stays in the cache."""
    return (pairs[first : first + _FEW] for first in range(0, len(pairs), _FEW))


def _is_small(pair: _Pair) -> bool:
    g, v, axes, magnitude, _ = pair
    return is_small(g, v, axes, magnitude) and axes.fit(g, v)


def _rule_of(slot: Slot) -> tuple[Axes, Magnitude]:
    """The rule of a pair, once a write that was pending with this owner has reached it."""
    if slot.form != "ours":  # torch's g tells its axes by its shape
        return Axes.of_pair(slot.magnitude.shape, slot.tensor.shape), "linear"  # type: ignore[union-attr]
    entry = slot.entry
    if isinstance(entry, WeightNormList):
        entry.absorb()
    rule: WeightNorm = entry._modules["0"]
    return rule.axes, rule.magnitude


def _is_stacked(slot: Slot) -> bool:
    """Whether an otherwise parametrized weight is under weight norm, with something else on top of it."""
    kinds = [type(m).__name__ for m in slot.entry._modules.values()]
    return len(kinds) > 1 and any(k in ("WeightNorm", "_WeightNorm") for k in kinds)


def _remove_parametrized(slot: Slot, weight: nn.Parameter) -> Any:
    """Put the weight in the place of its pair; returns the list that held it."""
    module, name = slot.module, slot.parameter
    order = tuple(module._parameters) if slot.form == "torch" else ()
    entry = restore_parameter(module, name, weight)
    if slot.form == "torch":
        reorder_parameters(module, (name, *order))
        for key, hook in list(module._load_state_dict_pre_hooks.items()):
            if getattr(getattr(hook, "hook", hook), "__name__", "") == "_weight_norm_compat_hook":
                del module._load_state_dict_pre_hooks[key]  # which torch leaves behind to rename old keys on loading
    return entry


def _remove_legacy(slot: Slot, weight: nn.Parameter) -> None:
    module, name = slot.module, slot.parameter
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook in (h for h in legacy_hooks(module) if h.name == name):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    order = tuple(n for n in module._parameters if n not in (f"{name}_g", f"{name}_v"))
    del module._parameters[f"{name}_g"], module._parameters[f"{name}_v"]
    module.__dict__.pop(name, None)
    module._parameters[name] = weight
    reorder_parameters(module, (name, *order))


def _recurrent_order(module: nn.Module) -> tuple[str, ...]:
    return tuple(module._flat_weights_names)  # type: ignore[arg-type]


def _refresh_recurrent(module: nn.Module) -> None:
    """RNNs keep a second list of their weights; let it hold the new parameters."""
    reorder_parameters(module, _recurrent_order(module))
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
        if any(p.is_cuda for p in module._parameters.values() if p is not None):
            module.flatten_parameters()


def _unwrapped(model: nn.Module) -> list[nn.Module]:
    """The modules of a model; wrappers that have copied the parameter list cannot follow surgery beneath them."""
    check_module(model)
    modules = modules_of(model)
    wrapped = {kind for kind in set(map(type, modules)) if issubclass(kind, nn.parallel.DistributedDataParallel)}
    for name, module in model.named_modules() if wrapped else ():
        if type(module) in wrapped:
            where = f"{name}: " if name else ""
            raise SelectionError(
                f"{where}DistributedDataParallel holds the old parameters",
                hint="do the surgery on the inner module before wrapping it",
            )
    return modules
