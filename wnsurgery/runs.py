"""Run a module on a set of arguments without leaving a mark on it: copies, fresh inputs, the place of an error."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from wnsurgery.batches import NamedArrays, arguments_of
from wnsurgery.declared import Declared
from wnsurgery.errors import ExportError, first_line, printable
from wnsurgery.silence import silenced

__all__ = [
    "Case",
    "Inputs",
    "copy_of",
    "named_outputs",
    "rng_kept",
    "tensor_outputs",
    "tracking",
    "where",
    "with_eps_of_graphs",
]

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


def copy_of(model: nn.Module) -> nn.Module:
    """An independent copy of a module; compile and parallel wrappers come off.

    Computed tensors that modules hold (torch's legacy weight norm leaves its weight there) cannot be deep-copied by
    torch; their values are.
    """
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        inner: Any = model.module if hasattr(model, "module") else model._orig_mod
        model = inner
    computed: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Tensor) and not tensor.is_leaf:
                    computed[id(tensor)] = tensor.detach().clone()
    copied = copy.deepcopy(model, computed)
    for module in copied.modules():
        cls = type(module)
        if cls.__module__ == parametrize.__name__ and "parametrizations" in module._modules:
            # parametrize makes a class for one module, and a copy shares it: surgery on one would break the other
            members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
            module.__class__ = type(cls.__name__, cls.__bases__, members)
    return copied


_NO_CACHE = "wrap the model so that it returns tensors; one of transformers: model.config.use_cache = False"
_FEW = 12  # tensors, of which every choice is looked at
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def with_eps_of_graphs(model: nn.Module) -> nn.Module:
    """Give the norms of a copy that computes in float64 the eps that a graph can hold, in place: ONNX keeps that of
    LayerNormalization, BatchNormalization and the like in float32.
    """
    if any(tensor.dtype in (torch.float64, torch.complex128) for tensor in (*model.parameters(), *model.buffers())):
        for norm in (module for module in model.modules() if isinstance(module, _NORMS) and module.eps is not None):
            norm.eps = float(np.float32(norm.eps))
    return model


@contextlib.contextmanager
def rng_kept(model: nn.Module) -> Iterator[None]:
    """Give the random generators of the CPU and of the model's devices back as they were."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        yield


def tensor_outputs(output: Any) -> list[Tensor]:
    """The tensors in a model's output, in the order exporters give them.

    Raises ExportError for outputs that are neither tensors nor None.
    """
    leaves = pytree.tree_leaves(output)
    other = sorted({type(leaf).__name__ for leaf in leaves if leaf is not None and not isinstance(leaf, Tensor)})
    if other:
        raise ExportError(
            f"the model returns {', '.join(other)}: only tensors can be outputs of an ONNX graph", hint=_NO_CACHE
        )
    return [leaf for leaf in leaves if leaf is not None]


def named_outputs(output: Any) -> dict[str, Tensor]:
    """The tensors anywhere in an output, by their way there: in containers, dataclasses and the attributes of other
    objects, such as caches. What is no tensor is passed over.

    >>> list(named_outputs((torch.ones(1), {"cache": [torch.ones(2), "a word"]})))
    ['output 0', 'output 1.cache.0']
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()

    def visit(value: Any, way: str) -> None:
        if isinstance(value, Tensor):
            found[way if way not in found else f"{way} ({len(found)})"] = value
            return
        parts = _parts_of(value)
        if parts and id(value) not in seen:
            seen.add(id(value))
            for name, part in parts.items():
                visit(part, f"{way}.{name}" if way else f"output {name}" if isinstance(name, int) else str(name))

    visit((output,) if isinstance(output, Tensor) else output, "")
    return found


def _parts_of(value: Any) -> Mapping[Any, Any]:
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if isinstance(value, type | ModuleType | nn.Module):
        return {}
    return getattr(value, "__dict__", {})


@dataclass(frozen=True)
class Case:
    """One set of arguments; what a model prints or warns of when it runs on them is not heard."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, inputs: Inputs, model: nn.Module) -> Case:
        """Arguments given as a tensor, a sequence of positional ones, or a mapping, see `batches.arguments_of`."""
        if isinstance(inputs, Mapping):
            return cls(*arguments_of(model, inputs))
        return cls((inputs,), {}) if isinstance(inputs, Tensor) else cls(tuple(inputs), {})

    @classmethod
    def fitting(cls, inputs: Any, model: nn.Module) -> Case:
        """Inputs of any kind for a module: tensors on its device, by name where `forward` has the names."""
        place = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))

        def tensor(value: Any) -> Any:
            if isinstance(value, np.ndarray):
                value = torch.from_numpy(np.array(value))
            return value.to(place) if isinstance(value, Tensor) else value

        if isinstance(inputs, Mapping):
            return cls.of(NamedArrays((str(k), tensor(v)) for k, v in inputs.items()), model)
        if isinstance(inputs, Tensor | np.ndarray):
            return cls((tensor(inputs),), {})
        return cls(tuple(tensor(value) for value in inputs), {})

    def cast_for(self, model: nn.Module) -> Case:
        """Floating-point arguments in the type of the model's parameters."""
        kind = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda x: x.to(kind) if x.is_floating_point() else x, (self.args, self.kwargs)
        )
        return Case(args, kwargs)

    def fresh(self) -> Case:
        """The same values in tensors of their own: models may write into their inputs."""
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), (self.args, self.kwargs))
        return Case(args, kwargs)

    def doubled(self, axes: Mapping[str, Sequence[int]], model: nn.Module) -> Case:
        """Everything twice along these axes of these parameters of `forward`: 1 would be taken for a constant."""

        def twice(tensor: Tensor, along: Sequence[int]) -> Tensor:
            for axis in along if tensor.ndim else ():
                tensor = torch.cat([tensor, tensor], axis)
            return tensor

        arguments = {
            name: pytree.tree_map_only(Tensor, partial(twice, along=axes.get(name, ())), value)
            for name, value in self.named(model).items()
        }
        bound = self.bound(model)
        bound.arguments.update(arguments)
        return Case(bound.args, dict(bound.kwargs))

    def named(self, model: nn.Module) -> dict[str, Any]:
        """The arguments by parameter name of `forward`, in its order."""
        return dict(self.bound(model).arguments)

    def bound(self, model: nn.Module) -> inspect.BoundArguments:
        """The arguments as `forward` takes them; ExportError where it does not."""
        try:
            return _signature(model).bind(*self.args, **self.kwargs)
        except (TypeError, ValueError) as error:
            reason = f"the inputs do not fit {type(model).__name__}.forward: {printable(error, 300)}"
            raise ExportError(reason) from error

    def run(self, model: nn.Module) -> list[Tensor]:
        """The model's output tensors; an error names the module it happened in."""
        return [tensor.detach().clone() for tensor in tensor_outputs(self._output(model))]

    def run_by_name(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors anywhere in the model's output, see `named_outputs`; ExportError if there is none."""
        output = self._output(model)
        found = {name: tensor.detach().clone() for name, tensor in named_outputs(output).items()}
        if not found:
            raise ExportError(f"the model returns {type(output).__name__} without any tensor in it")
        return found

    def _output(self, model: nn.Module) -> Any:
        self.named(model)
        try:
            return self._call(model)
        except Exception as error:
            # models raise what they like; all of it means that these inputs do not work
            raise ExportError(f"{self._where_it_fails(model)}forward failed: {first_line(error)}") from error

    def _call(self, model: nn.Module) -> Any:
        case = self.fresh()
        torch.manual_seed(0)  # inside fork_rng; a model that draws noise draws the same each time
        with silenced():
            return model(*case.args, **case.kwargs)

    def _where_it_fails(self, model: nn.Module) -> str:
        # a second run, because hooks switch off the fast paths that the first one should take
        with tracking(model) as active, contextlib.suppress(Exception):
            self._call(model)
        return where(active)


def _signature(model: nn.Module) -> inspect.Signature:
    """What `forward` takes, of compiled modules of TorchScript, too."""
    schema: Any = getattr(model.forward, "schema", None)
    if schema is None:
        return inspect.signature(model.forward)
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return inspect.Signature(
        [
            inspect.Parameter(
                one.name,
                kinds[one.kwarg_only],
                default=one.default_value if one.has_default_value() else inspect.Parameter.empty,
            )
            for one in schema.arguments[1:]
        ]
    )


def for_graph(inputs: Any, declared: Sequence[Declared], model: nn.Module) -> Any:
    """Inputs of a module for a graph of it, without those that an exporter left out because nothing is computed from
    them: by name where the graph's names are those of `forward`, else the only ones of its types and shapes, else all.
    """
    try:
        arguments = Case.fitting(inputs, model).named(model)
    except ExportError:
        return inputs
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    names = [one.name for one in declared]
    if names and tensors.keys() >= set(names):
        return {name: tensors[name] for name in names}
    fitting = _only_choice(list(tensors.values()), declared)
    return inputs if fitting is None else fitting


def _only_choice(tensors: Sequence[Tensor], declared: Sequence[Declared]) -> list[Tensor] | None:
    """As many tensors as a graph declares, in order, of its types and shapes; None unless there is one choice."""
    if not 0 < len(declared) < len(tensors) <= _FEW:
        return None
    found = [
        chosen
        for chosen in combinations(tensors, len(declared))
        if all(one.fits(_dtype(tensor), tensor.shape) for tensor, one in zip(chosen, declared, strict=True))
    ]
    alike = all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))
    return list(found[0]) if found and alike else None


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


@contextlib.contextmanager
def tracking(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose forward is running, innermost last; where it broke off if something raises."""
    active: list[str] = []

    def leave(*_: Any) -> None:
        active.pop()

    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: active.append(name)))
            handles.append(module.register_forward_hook(leave))
    try:
        yield active
    finally:
        for handle in handles:
            handle.remove()


def where(active: Sequence[str]) -> str:
    return f"{printable(active[-1])}: " if active and active[-1] else ""
