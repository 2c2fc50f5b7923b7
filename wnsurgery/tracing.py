"""Find a model's data flow: symbolically, every branch of it, and by watching a real run where there are inputs.

Symbolic tracing is torch.fx's with three changes: the leaves are the layers we know; where Python asks for the truth
of a traced value, both answers are followed, each as a way of its own; and a module that cannot be traced becomes a
leaf, of whose children only those are traced that its code calls as a whole.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode

from wnsurgery.axis_counts import known_ranks
from wnsurgery.calls import called_whole
from wnsurgery.dataflow import INPUT, OUTPUT, Call, Flow, Traces, Value, hands_on
from wnsurgery.errors import SelectionError, printable
from wnsurgery.layers import layer_of
from wnsurgery.mean_only import MeanOnlyBatchNorm
from wnsurgery.safety import as_written
from wnsurgery.snapshot import HOOKS, Snapshot
from wnsurgery.walk import legacy_hooks

__all__ = ["trace"]

_MAX_WAYS = 64  # through one module, and decisions on one way; what has more is not followed
_METADATA = {"shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "size", "dim", "numel", "stride"}
_METADATA |= {"element_size", "is_floating_point", "get_device", "ndimension", "is_contiguous"}
_REFUSALS = (AssertionError, ValueError, NotImplementedError)  # what a forward raises on a way that is not taken


def trace(model: nn.Module, inputs: Any = None) -> Traces:
    """The data flow of a model in evaluation mode; leaves no mark on it.

    Args:
        model: any module tree.
        inputs: example arguments (a tensor, a tuple of positional or a mapping of keyword arguments) to watch a run.

    Raises SelectionError when the model fails on the inputs.
    """
    root: Any = model
    while hasattr(root, "_orig_mod"):
        root = root._orig_mod
    scene = _Scene(model)
    traces = Traces(scene.names)
    with _quiet(model, scene):
        _trace_all(root, scene, traces)
        if inputs is not None:
            traces.observed = _observe(model, inputs, scene)
    return traces


@dataclass(eq=False)
class _Scene:
    """What is known of the model before anything runs."""

    model: nn.Module
    names: dict[int, str] = field(init=False)
    owners: dict[int, nn.Module] = field(init=False)
    before: Snapshot = field(init=False)
    hooked: dict[int, tuple[bool, bool]] = field(init=False)  # module -> has it hooks before, after its forward

    def __post_init__(self) -> None:
        modules = list(self.model.named_modules())
        self.names = {id(m): name for name, m in reversed(modules)}
        self.owners = {}
        for _, m in modules:
            for tensor in (*_tables(m, "_parameters"), *_tables(m, "_buffers")):
                self.owners.setdefault(id(tensor), m)
            if is_parametrized(m):
                for tensor in m.parametrizations.parameters():
                    self.owners[id(tensor)] = m
        self.before = Snapshot(m for _, m in modules)
        self.hooked = {id(m): _hooked(m) for _, m in modules}

    @cached_property
    def _around_norms(self) -> set[int]:
        """Modules with a batch normalization somewhere inside: these are entered."""
        kinds = (_BatchNorm, MeanOnlyBatchNorm)
        within = [name for name, m in self.model.named_modules(remove_duplicate=False) if isinstance(m, kinds)]
        outer = {name[:i] for name in within for i, c in enumerate(name) if c == "."} | ({""} if within else set())
        return {id(m) for name, m in self.model.named_modules(remove_duplicate=False) if name in outer - set(within)}

    def is_leaf(self, module: nn.Module) -> bool:
        if isinstance(module, torch.jit.ScriptModule | ParametrizationList | _BatchNorm | MeanOnlyBatchNorm):
            return not (isinstance(module, _BatchNorm) and id(module) in self._around_norms)
        if id(module) in self._around_norms:
            return False
        cls = type(module)
        if is_parametrized(module):
            cls = next(c for c in cls.__mro__ if not c.__module__.startswith("torch.nn.utils."))
        container = issubclass(cls, nn.Sequential | nn.ModuleList | nn.ModuleDict | nn.DataParallel)
        return (cls.__module__.startswith("torch.nn.") and not container) or layer_of(module) is not None

    def reset(self) -> None:
        """The model as it was, but in evaluation mode and without hooks."""
        self.before.restore()
        self.before.without_hooks()
        for module, *_ in self.before.saved:
            module.training = False

    def name(self, module: nn.Module) -> str:
        return self.names.get(id(module)) or type(module).__name__


def _tables(module: nn.Module, table: str) -> Iterable[Tensor]:
    held = module.named_parameters(recurse=False) if table == "_parameters" else module.named_buffers(recurse=False)
    return (tensor for _, tensor in held)


def _hooked(module: nn.Module) -> tuple[bool, bool]:
    if isinstance(module, torch.jit.ScriptModule):
        return False, False
    computing = len(legacy_hooks(module))
    before = len(module._forward_pre_hooks) + len(module._backward_hooks) > computing
    return before, bool(module._forward_hooks or module._backward_pre_hooks or module._backward_hooks)


@contextmanager
def _quiet(model: nn.Module, scene: _Scene) -> Iterator[None]:
    """Evaluation mode without the user's hooks; attributes, buffers, modes and random state come back as they were."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = {b.device for b in (*model.parameters(), *model.buffers()) if b.device.type == "cuda"}
    try:
        with as_written(), torch.random.fork_rng(devices=sorted(devices, key=str)), torch.no_grad():
            scene.reset()
            yield
    finally:
        scene.before.restore()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


# Symbolically --------------------------------------------------------------------------------------------


def _trace_all(root: nn.Module, scene: _Scene, traces: Traces) -> None:
    """Trace the root; what cannot be traced becomes a leaf, and its children are traced on their own."""
    waiting, seen = [root], {id(root)}
    while waiting:
        start = waiting.pop()
        if scene.is_leaf(start):
            continue
        failed, apart = _trace_from(start, scene, traces)
        for child in (*apart, *(c for module in failed for c in called_whole(module))):
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)


def _trace_from(start: nn.Module, scene: _Scene, traces: Traces) -> tuple[list[nn.Module], list[nn.Module]]:
    """Trace one module, giving up on as few modules in it as possible.

    Returns those given up, and those to trace on their own: a few branches in each of many modules are too many ways
    through the whole, but few through each.
    """
    failed: list[nn.Module] = []
    apart: list[nn.Module] = []
    flags = True
    while True:
        result = _ways(start, scene, traces.opaque.keys() | traces.apart, flags)
        if isinstance(result, list):
            traces.groups.append(result)
            return failed, apart
        if isinstance(result, dict):
            traces.apart |= result.keys()
            apart += result.values()
            continue
        module, reason = result
        if module is start and flags:
            flags = False
            continue
        traces.opaque[id(module)] = reason
        failed.append(module)
        if module is start:
            return failed, apart


def _ways(
    start: nn.Module, scene: _Scene, opaque: Collection[int], flags: bool
) -> list[Flow] | dict[int, nn.Module] | tuple[nn.Module, str]:
    """Every way through a module; or the modules that ask so much that there are too many; or the module that cannot
    be traced and why."""
    asking: dict[int, nn.Module] = {}
    flows: list[Flow] = []
    pending: list[tuple[bool, ...]] = [()]
    reason: tuple[nn.Module, str] = (start, "its forward always raises")
    for _ in range(_MAX_WAYS):
        decisions = pending.pop()
        tracer = _Tracer(scene, opaque, decisions)
        try:
            flows.append(tracer.flow(start, flags))
        except _REFUSALS as error:
            reason = (tracer.failed or start, _in_words(error))
            if not tracer.taken:
                return reason
        except Exception as error:
            # forwards do anything; whatever they do that a tracer cannot follow ends here
            return tracer.failed or start, _in_words(error)
        finally:
            scene.reset()
        asking |= tracer.asking
        taken = tracer.taken
        pending += [(*taken[:i], not taken[i]) for i in range(len(decisions), len(taken))]
        if not pending:
            return flows or reason
    asking.pop(id(start), None)
    return asking or (start, "too many branches")


def _in_words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return printable(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__, 120)


class _Proxy(fx.Proxy):
    """A traced value."""


@contextmanager
def _passing_for_tensors() -> Iterator[None]:
    """Let `isinstance(x, Tensor)` be true of traced values: forwards ask it, and would take the wrong branch.

    (A `__class__` that says Tensor would make torch's C++ read a tensor where there is none.)
    """
    kept = builtins.isinstance

    def asked(value: Any, kinds: Any) -> bool:
        if type(value) is _Proxy and (kinds is Tensor or (type(kinds) is tuple and Tensor in kinds)):
            return True
        return kept(value, kinds)

    builtins.isinstance = asked
    try:
        yield
    finally:
        builtins.isinstance = kept


class _Tracer(fx.Tracer):
    """One way through a module."""

    def __init__(self, scene: _Scene, opaque: Collection[int], decisions: tuple[bool, ...]) -> None:
        super().__init__()
        self.scene, self.opaque, self.decisions = scene, opaque, decisions
        self.taken: list[bool] = []
        self.answers: dict[fx.Node, bool] = {}
        self.stack: list[nn.Module] = []
        self.failed: nn.Module | None = None
        self.asking: dict[int, nn.Module] = {}
        self.called: dict[fx.Node, nn.Module] = {}
        self.reading: dict[fx.Node, nn.Module] = {}
        self.marks: list[tuple[fx.Node, str]] = []
        self.read: dict[int, str] = {}
        self.flags = False

    def flow(self, start: nn.Module, flags: bool) -> Flow:
        self.stack.append(start)
        self.flags = flags
        with _passing_for_tensors():
            self.trace(start)
        for module, name, value in self.scene.before.changed():
            self.marks += [(p.node, f"{type(module).__name__}.{name}") for p in _proxies(value)]
        return self._as_flow()

    # What torch.fx asks of a tracer

    def proxy(self, node: fx.Node) -> _Proxy:
        return _Proxy(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        forward = self.root.forward
        args, kwargs = self._placeholders(inspect.signature(forward))

        def run() -> list[_Proxy]:
            output = forward(*args, **kwargs)
            before, after = self.scene.hooked.get(id(self.root), (False, False))
            if before:
                self.marks += [(p.node, "a hook") for p in _proxies((args, kwargs))]
            return _proxies(output) + (_proxies(output) if after else [])

        return run, []

    def _placeholders(self, signature: inspect.Signature) -> tuple[list[Any], dict[str, Any]]:
        """Arguments for forward: traced values for what must be given and for flags, defaults for the rest."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name, p in signature.parameters.items():
            if p.kind is p.VAR_KEYWORD or (p.kind is p.VAR_POSITIONAL and args):
                continue
            wanted = p.default is p.empty or not (args or kwargs) or (isinstance(p.default, bool) and self.flags)
            if not wanted:
                continue
            value = self.create_proxy("placeholder", name, (), {})
            if p.kind is p.KEYWORD_ONLY or (p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty):
                kwargs[name] = value
            else:
                args.append(value)
        return args, kwargs

    def create_arg(self, a: Any) -> Any:
        if type(a) is _Proxy:
            return a.node
        if isinstance(a, Tensor | nn.Module):
            if id(a) in self.scene.owners:
                self.read[id(self.scene.owners[id(a)])] = "the code around it"
            return None
        try:
            return super().create_arg(a)
        except NotImplementedError:
            return tuple(p.node for p in _proxies(a))

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if type(attr_val) is not _Proxy and isinstance(attr_val, Tensor):
            key = str(id(attr_val))
            if key not in parameter_proxy_cache:
                made = self.create_proxy("get_attr", attr, (), {})
                parameter_proxy_cache[key] = made
                owner = self.scene.owners.get(id(attr_val))
                if owner is not None:
                    self.reading[made.node] = owner
            return parameter_proxy_cache[key]
        return attr_val

    def to_bool(self, obj: fx.Proxy) -> bool:
        if obj.node not in self.answers:
            if len(self.taken) >= _MAX_WAYS:
                raise fx.proxy.TraceError("its control flow depends on data in too many places")
            self.asking[id(self.stack[-1])] = self.stack[-1]
            n = len(self.taken)
            self.answers[obj.node] = self.decisions[n] if n < len(self.decisions) else True
            self.taken.append(self.answers[obj.node])
        return self.answers[obj.node]

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if "_orig_mod" in m._modules:  # torch.compile's wrapper: what it wraps is the same function
            return m._modules["_orig_mod"](*args, **kwargs)  # type: ignore[misc]
        before, after = self.scene.hooked.get(id(m), (False, False))
        if before:
            self.marks += [(p.node, f"a hook on {self.scene.name(m)}") for p in _proxies((args, kwargs))]
        if id(m) in self.opaque or self.scene.is_leaf(m):
            output = self.create_proxy("call_module", self.scene.name(m), args, kwargs)
            self.called[output.node] = m
        else:
            self.stack.append(m)
            try:
                output = forward(*args, **kwargs)
            except BaseException:
                self.failed = self.failed or m
                raise
            finally:
                self.stack.pop()
        if after:
            self.marks += [(p.node, f"a hook on {self.scene.name(m)}") for p in _proxies(output)]
        return output

    # What comes of it

    def _as_flow(self) -> Flow:
        flow = Flow(read=self.read)
        values: dict[fx.Node, Value] = {}
        takers: dict[fx.Node, Call] = {}
        ranks = known_ranks(self.graph, self.called)
        for node in self.graph.nodes:
            module = self.called.get(node)
            if isinstance(module, ParametrizationList):
                owner = next(
                    (self.scene.owners[id(p)] for p in module.parameters() if id(p) in self.scene.owners), None
                )
                self.reading[node] = owner or module
            if module is None or isinstance(module, ParametrizationList):
                values[node] = Value(_origin(node))
                continue
            sources = [*node.args, *node.kwargs.values()]
            single = len(sources) == 1 and isinstance(sources[0], fx.Node)
            takers[node] = Call(
                module, values[sources[0]] if single else None, ranks.get(sources[0]) if single else None
            )
            values[node] = takers[node].result
            flow.add(takers[node])
        for node, value in values.items():
            for user in node.users:
                if not _is_metadata(user):
                    value.uses.append(takers.get(user) or _origin(user))
        for node, what in self.marks:
            values[node].uses.append(what)
        for node, owner in self.reading.items():
            used = [user for user in node.users if not _is_metadata(user)]
            if used:
                flow.read[id(owner)] = _origin(used[0])
        return flow


def _origin(node: fx.Node) -> str:
    """A node that is no call of a leaf, as people call it."""
    if node.op == "placeholder":
        return INPUT
    if node.op == "output":
        return OUTPUT
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _is_metadata(node: fx.Node) -> bool:
    """Whether a node asks for the shape or kind of a value only."""
    if node.op == "call_method":
        return node.target in _METADATA
    return node.op == "call_function" and node.target is getattr and len(node.args) > 1 and node.args[1] in _METADATA


def _proxies(value: Any) -> list[_Proxy]:
    """The traced values in a nest of containers and plain objects."""
    found: list[_Proxy] = []
    seen: set[int] = set()

    def visit(item: Any, depth: int) -> None:
        if type(item) is _Proxy:
            found.append(item)
        elif depth < 8 and id(item) not in seen and not isinstance(item, str | int | float | Tensor | nn.Module | type):
            seen.add(id(item))
            if isinstance(item, Mapping):
                inner: Iterable[Any] = item.values()
            elif isinstance(item, list | tuple | set | frozenset):
                inner = item
            else:
                plain = is_dataclass(item) or type(item).__module__ not in ("builtins", "torch")
                inner = vars(item).values() if plain and hasattr(item, "__dict__") else ()
            for part in list(inner):
                visit(part, depth + 1)

    visit(value, 0)
    return found


# By watching a run ---------------------------------------------------------------------------------------


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which leaf makes and which takes each tensor of a run, and every operation between leaves."""

    passive = True

    def __init__(self, scene: _Scene) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scene, self.flow = scene, Flow()
        self.inside: list[nn.Module] = []
        self.values: dict[int, Value] = {}
        self.alive: list[Tensor] = []  # so that no identity is used twice

    def value(self, tensor: Tensor) -> Value:
        if id(tensor) not in self.values:
            self.made(tensor, Value(INPUT))
        return self.values[id(tensor)]

    def made(self, tensor: Tensor, value: Value) -> None:
        self.alive.append(tensor)
        self.values[id(tensor)] = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.inside:
            name = func._schema.name.partition("::")[2]
            for tensor in _tensors((args, kwargs)):
                self.use(tensor, name)
            for tensor in _tensors(output):
                self.made(tensor, Value(name))
        return output

    def use(self, tensor: Tensor, what: str) -> None:
        owner = self.scene.owners.get(id(tensor))
        if owner is not None:
            self.flow.read[id(owner)] = what
        self.value(tensor).uses.append(what)

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.inside and self.scene.hooked[id(module)][0]:
            for tensor in _tensors((args, kwargs)):
                self.use(tensor, f"a hook on {self.scene.name(module)}")
        if self.scene.is_leaf(module):
            self.inside.append(module)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        leaf = self.scene.is_leaf(module)
        if leaf:
            self.inside.pop()
        if self.inside:
            return
        taken, given = _tensors((args, kwargs)), _tensors(output)
        handed_on = len(taken) == len(given) == 1 and taken[0] is given[0] and hands_on(module)
        if leaf and not handed_on:
            single = len(args) + len(kwargs) == 1 and len(taken) == 1
            call = Call(module, self.value(taken[0]) if single else None, taken[0].dim() if single else None)
            for tensor in taken:
                self.value(tensor).uses.append(call)
            self.flow.add(call)
            for tensor in given:
                self.made(tensor, call.result)
        if self.scene.hooked[id(module)][1]:
            for tensor in given:
                self.use(tensor, f"a hook on {self.scene.name(module)}")


def _observe(model: nn.Module, inputs: Any, scene: _Scene) -> Flow:
    watch = _Watch(scene)
    args, kwargs = _arguments(inputs)
    handles = []
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule | ParametrizationList):
            handles.append(module.register_forward_pre_hook(watch.enter, with_kwargs=True))
            handles.append(module.register_forward_hook(watch.leave, with_kwargs=True))
    try:
        with watch:
            output = model(*args, **kwargs)
    except Exception as error:
        # models raise what they like; all of it means that these inputs do not work
        raise SelectionError(f"the model fails on the example inputs: {_in_words(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    for tensor in _tensors(output):
        watch.use(tensor, OUTPUT)
    for module, name, value in scene.before.changed():
        for tensor in _tensors(value) if name not in (*HOOKS, "_parameters", "_buffers") else ():
            if id(tensor) in watch.values:
                watch.use(tensor, f"{type(module).__name__}.{name}")
    return watch.flow


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping) or hasattr(inputs, "keys"):
        return (), {key: inputs[key] for key in inputs.keys()}  # noqa: SIM118 - BatchEncoding iterates differently
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a nest of containers and plain objects."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for part in value.values() for t in _tensors(part)]
    if isinstance(value, list | tuple | set | frozenset):
        return [t for part in value for t in _tensors(part)]
    if is_dataclass(value) and not isinstance(value, type):
        return [t for part in vars(value).values() for t in _tensors(part)]
    return []
