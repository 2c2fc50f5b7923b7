"""Surgery under torch's `fully_shard` (FSDP2), which manages parameters by lists of its own.

For every parameter it keeps a record: which module holds it, how it is cut, where its padded memory lies. Surgery
gathers nothing: v takes over the record of w, and w that of v; g gets a new one. The records are torch's own private
ones, so whatever is not as expected there is an error before anything has changed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wnsurgery.dtensors import is_spread
from wnsurgery.errors import SelectionError

__all__ = ["FullyShard", "is_managed"]

Place = tuple[nn.Module, str]  # a module and the name it knows a parameter by
_ELSEWHERE = "do the surgery before `fully_shard`, or on the state dict: convert_state(state), fold_state(state)"


def is_managed(module: nn.Module) -> bool:
    """Whether `fully_shard` manages the parameters of a module."""
    return bool(module.__dict__.get("_is_fsdp_managed_module"))


class FullyShard:
    """The records of a net's parameters, found by who holds them; nothing where nobody has called `fully_shard`."""

    def __init__(self, model: nn.Module) -> None:
        self._found: dict[tuple[int, str], tuple[Any, Any]] = {}
        self._touched: dict[int, Any] = {}
        self._expected = "torch.distributed.fsdp" in sys.modules
        home = sys.modules.get("torch.distributed.fsdp")
        if home is None or not hasattr(home, "FSDPModule"):
            return
        with _expecting():
            for module in model.modules():
                if isinstance(module, home.FSDPModule):
                    module.reshard()  # a root keeps whole parameters after its forward pass
                    for group in _groups(module):
                        for record in group.fsdp_params:
                            for holder, name in _holders(record):
                                self._found[id(holder), name] = group, record

    def __bool__(self) -> bool:
        """Whether `fully_shard` was imported, so that parameters may be managed here or further up."""
        return self._expected

    def check(self, fqn: str, place: Place, tensor: Tensor) -> None:
        """Refuse a sharded parameter that is none of this net's records: the call was on a part of the sharded net."""
        holder, name = place
        if is_spread(tensor) and is_managed(holder) and (id(holder), name) not in self._found:
            raise SelectionError(f"{fqn}: fully_shard manages it further up in the net", hint=_ELSEWHERE)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Put the lists of records back as they were if anything goes wrong inside."""
        groups = {id(group): group for group, _ in self._found.values()}
        before = [(group, list(group.fsdp_params)) for group in groups.values()]
        try:
            with _expecting() if before else _nothing():
                yield
                self._settle()
        except BaseException:
            for group, records in before:
                for record in group.fsdp_params:
                    if record not in records:
                        record._post_load_hook_handle.remove()
                group.fsdp_params[:] = records
            raise
        for group, records in before:
            for record in records:
                if record not in group.fsdp_params:
                    record._post_load_hook_handle.remove()

    def split(self, fqn: str, owners: Sequence[Place], tables: Sequence[nn.Module]) -> None:
        """w of these owners is g and v of these tables (`parametrizations.weight`) from now on."""
        known = self._found.get((id(owners[0][0]), owners[0][1]))
        if known is None:
            return
        group, record = known
        g, v = (getattr(tables[0], name) for name in ("original0", "original1"))
        if record.is_dtensor:
            raise SelectionError(f"{fqn}: tensor parallel below fully_shard", hint="convert between the two")
        if g.dtype != v.dtype:
            raise SelectionError(
                f"{fqn}: fully_shard wants parameters of one type, g is {_name(g)} and v {_name(v)}",
                hint=f"magnitude_dtype=torch.{_name(v)}, or shard a float32 net with a MixedPrecisionPolicy",
            )
        halves = _fresh(group, record, g, [(table, "original0") for table in tables])
        self._replace(group, record, halves, _moved(record, v, [(table, "original1") for table in tables]))

    def join(self, weight: nn.Parameter, halves: tuple[Place, Place], owners: Sequence[Place]) -> None:
        """g and v at these places are the weight of these owners from now on."""
        known = self._found.get((id(halves[1][0]), halves[1][1]))
        if known is None:
            return
        group, record = known
        self._replace(group, record, _moved(record, weight, owners))
        other = self._found.get((id(halves[0][0]), halves[0][1]))
        if other is not None and other[1] in other[0].fsdp_params:
            self._replace(*other)

    def _replace(self, group: Any, record: Any, *others: Any) -> None:
        at = group.fsdp_params.index(record)
        group.fsdp_params[at : at + 1] = others
        self._touched[id(group)] = group

    def _settle(self) -> None:
        """State dicts are taken from shards: the hooks that see to it belong to the modules that hold parameters."""
        for group in self._touched.values():
            handles = (
                group._module_to_pre_save_state_dict_hook_handle,
                group._module_to_pre_load_state_dict_hook_handle,
            )
            if any(handles):
                for table in handles:
                    for handle in table.values():
                        handle.remove()
                    table.clear()
                group._register_state_dict_hooks()


def _groups(module: Any) -> Sequence[Any]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # several since torch 2.12
    return groups if groups is not None else [g for g in (state._fsdp_param_group,) if g is not None]


def _holders(record: Any) -> Iterator[Place]:
    info = record._module_info
    yield info.module, info.param_name
    yield from zip(info.shared_modules, info.shared_param_names, strict=True)


def _info(record: Any, places: Sequence[Place]) -> Any:
    (holder, name), *others = places
    return type(record._module_info)(holder, name, [m for m, _ in others], [n for _, n in others])


def _moved(record: Any, parameter: Any, places: Sequence[Place]) -> Any:
    """The record of a parameter of the same shape, cut in the same way, held elsewhere."""
    new = copy.copy(record)
    new._module_info = _info(record, places)
    new.sharded_param = parameter
    new.__dict__.pop("_unsharded_param", None)  # whole parameters are made anew from gathered memory
    new.all_gather_outputs = []
    new._post_load_hook_handle = _on_load(places[0][0], new)
    new.reset_sharded_param()
    return new


def _fresh(group: Any, record: Any, g: Any, places: Sequence[Place]) -> Any:
    """A record for a magnitude, cut along its first axis, with its elements."""
    from torch.distributed.tensor import Shard

    like = nn.Parameter(torch.empty(g.shape, dtype=g.dtype, device="meta"), requires_grad=g.requires_grad)
    policies = group.mp_policy, group.offload_policy
    meshes = record.mesh_info, record.post_forward_mesh_info
    new = type(record)(like, _info(record, places), *meshes, record.device, lambda _: Shard(0), *policies)
    cut = g.detach().redistribute(placements=new.sharded_param.placements)
    new._setattr_on_modules(nn.Parameter(cut, requires_grad=g.requires_grad))
    new.reset_sharded_param()
    if hasattr(record, "orig_dtype"):  # the net has run already
        new.init_dtype_attrs(group.mp_policy)
    return new


def _on_load(holder: Any, record: Any) -> Any:
    return holder.register_load_state_dict_post_hook(lambda *_: record.reset_sharded_param())


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _expecting() -> Iterator[None]:
    """Say so where torch's own records are not what they are in the versions known here."""
    try:
        yield
    except (AttributeError, TypeError, AssertionError) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SelectionError(
            f"fully_shard of torch {torch.__version__} is unknown here ({said})", hint=_ELSEWHERE
        ) from error
