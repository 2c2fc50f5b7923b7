"""Which children a module's own code calls only as a whole: `self.block(x)`, never `self.block.conv` or a loop over it.

For a module whose forward cannot be traced, this says which of its children can be traced on their own.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from torch import nn

__all__ = ["called_whole"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
# methods of nn.Module that hand out modules or run code on them: after these, anything may have been called
_REACHING = {"apply", "children", "get_submodule", "modules", "named_children", "named_modules", "__dict__"}


def called_whole(module: nn.Module) -> list[nn.Module]:
    """The children (elements of ModuleLists included) that a module's forward uses only by calling them.

    Empty where the source is not at hand or the code does anything with a child but call it.
    """
    forward: Any = module.forward
    plain: Any = getattr(inspect.unwrap(forward), "__func__", inspect.unwrap(forward))
    if isinstance(module, _CONTAINERS) or getattr(plain, "__name__", "") == "_forward_unimplemented":
        return [child for child in module._modules.values() if child is not None]  # nobody calls these through it
    reader = _Reader(module)
    if not isinstance(plain, FunctionType) or not reader.read(plain):
        return []
    whole: list[nn.Module] = []
    for name, child in module._modules.items():
        if child is None or name in reader.reached:
            continue
        if isinstance(child, _CONTAINERS):
            whole += [element for element in child._modules.values() if element is not None]
        elif name not in reader.taken_apart:
            whole.append(child)
    broken = [c for n, c in module._modules.items() if c is not None and (n in reader.reached | reader.taken_apart)]
    touched = {id(m) for child in broken if not isinstance(child, _CONTAINERS) for m in child.modules()}
    touched |= {id(m) for n, c in module._modules.items() if c is not None and n in reader.reached for m in c.modules()}
    return [child for child in whole if not touched & {id(m) for m in child.modules()}]


class _Reader:
    """Reads forward and the methods it calls; collects the children used in other ways than by a call.

    `reached` are used in ways that say nothing, `taken_apart` are iterated over or indexed, their elements called.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.reached: set[str] = set()
        self.taken_apart: set[str] = set()

    def read(self, forward: FunctionType) -> bool:
        """False where something makes the whole question moot."""
        waiting: list[FunctionType] = [forward]
        done: set[Any] = set()
        while waiting:
            function = waiting.pop()
            if function.__code__ in done:
                continue
            done.add(function.__code__)
            tree = _source_tree(function)
            if tree is None or not tree.args.args:
                return False
            me = tree.args.args[0].arg
            for node, path in _walk(tree):
                if isinstance(node, ast.Name) and node.id == "super":
                    return False
                if isinstance(node, ast.Name) and node.id == me and not self._use(node, path, waiting):
                    return False
        return True

    def _use(self, node: ast.Name, path: tuple[ast.AST, ...], waiting: list[FunctionType]) -> bool:
        """One mention of `self`."""
        outer = path[-1]
        if not isinstance(outer, ast.Attribute):
            return False
        name = outer.attr
        if name in self.module._modules:
            self._child(name, outer, path[:-1])
            return True
        if name in _REACHING or name.startswith("_modules"):
            return False
        method: Any = getattr(type(self.module), name, None)
        method = method.fget if isinstance(method, property) else method
        method = inspect.unwrap(method) if callable(method) else None
        if isinstance(method, FunctionType) and method.__module__ != nn.Module.__module__:
            waiting.append(method)
        # other attributes may hold modules in hiding
        value = self.module.__dict__.get(name)
        return not isinstance(value, nn.Module) and not _holds_modules(value)

    def _child(self, name: str, node: ast.AST, path: tuple[ast.AST, ...]) -> None:
        outer = path[-1]
        if isinstance(outer, ast.Call) and outer.func is node:
            return
        if isinstance(outer, ast.Compare):  # `self.downsample is not None`
            return
        if isinstance(outer, ast.Subscript) and outer.value is node:
            calling = path[-2]
            (self.taken_apart if isinstance(calling, ast.Call) and calling.func is outer else self.reached).add(name)
            return
        if isinstance(outer, ast.If | ast.IfExp) and outer.test is node:
            return
        loop = path[-2] if isinstance(outer, ast.Call) and _is_call_of(outer, "enumerate") else outer
        target = loop.target if isinstance(loop, ast.For | ast.comprehension) else None
        if isinstance(target, ast.Tuple) and loop is not outer and len(target.elts) == 2:
            target = target.elts[1]
        scope = path[0] if path else None
        if isinstance(target, ast.Name) and scope is not None and _only_called(target.id, scope):
            self.taken_apart.add(name)
        else:
            self.reached.add(name)


def _source_tree(function: FunctionType) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    return tree.body[0] if tree.body and isinstance(tree.body[0], ast.FunctionDef) else None


def _walk(node: ast.AST, path: tuple[ast.AST, ...] = ()) -> Iterator[tuple[ast.AST, tuple[ast.AST, ...]]]:
    """Every node with the nodes around it, outermost first."""
    for child in ast.iter_child_nodes(node):
        inner = (*path, node)
        yield child, inner
        yield from _walk(child, inner)


def _is_call_of(node: ast.Call, name: str) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == name


def _only_called(name: str, scope: ast.AST) -> bool:
    """Whether a local name stands only where it is called or assigned by a loop."""
    return all(
        isinstance(node.ctx, ast.Store) or (isinstance(path[-1], ast.Call) and path[-1].func is node)
        for node, path in _walk(scope)
        if isinstance(node, ast.Name) and node.id == name
    )


def _holds_modules(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, list | tuple | set) and any(isinstance(v, nn.Module) or _holds_modules(v) for v in value)
