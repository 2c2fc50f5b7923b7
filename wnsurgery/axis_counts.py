"""How many axes the values of a traced graph have, where the graph shows it: a Conv1d takes (N, C, L).

A symbolic trace knows no shapes. What it does know travels along operations that keep the number of axes, both ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx, nn

__all__ = ["known_ranks"]

_SIZED: dict[int, tuple[type, ...]] = {
    3: (nn.Conv1d, nn.ConvTranspose1d),
    4: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    5: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}
_KEEPING_HOMES = ("torch.nn.modules.activation", "torch.nn.modules.dropout", "torch.nn.modules.batchnorm")
_KEEPING = (nn.Linear, nn.Identity, nn.LayerNorm)
_KEEPING_NAMES = {"relu", "relu_", "gelu", "silu", "elu", "leaky_relu", "tanh", "sigmoid", "softmax", "dropout"}
_KEEPING_NAMES |= {"contiguous", "clone", "float", "to", "detach", "transpose", "permute", "swapaxes"}


def known_ranks(graph: fx.Graph, called: Mapping[fx.Node, nn.Module]) -> dict[fx.Node, int]:
    """The number of axes of each node's value, at least, where something in the graph shows it.

    Args:
        graph: a traced graph.
        called: the modules its call_module nodes call.
    """
    ranks: dict[fx.Node, int] = {}
    pairs: list[tuple[fx.Node, fx.Node]] = []
    for node in graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if source is None:
            continue
        into, out, keeps = _of_module(called[node]) if node in called else _of_operation(node)
        for where, rank in ((source, into), (node, out)):
            ranks[where] = max(rank, ranks.get(where, 0))
        if keeps:
            pairs.append((source, node))
    for _ in pairs:
        spread = [(a, b) for a, b in pairs if ranks.get(a, 0) != ranks.get(b, 0)]
        if not spread:
            break
        for a, b in spread:
            ranks[a] = ranks[b] = max(ranks.get(a, 0), ranks.get(b, 0))
    return {node: rank for node, rank in ranks.items() if rank}


def _of_module(module: nn.Module) -> tuple[int, int, bool]:
    """(axes of the input, axes of the output, whether the two are equal); 0 for unknown."""
    for rank, kinds in _SIZED.items():
        if isinstance(module, kinds):
            return rank, rank, True
    if isinstance(module, nn.Flatten):
        return 0, 2 if (module.start_dim, module.end_dim) == (1, -1) else 0, False
    home = type(module).__module__
    keeps = home in _KEEPING_HOMES and not isinstance(module, nn.MultiheadAttention)
    return 0, 0, keeps or isinstance(module, _KEEPING)


def _of_operation(node: fx.Node) -> tuple[int, int, bool]:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    rest = list(node.args[1:])
    sizes: Any = rest[0] if rest and isinstance(rest[0], tuple | list) else rest
    if name == "permute":
        return len(sizes), len(sizes), True
    if name in ("transpose", "swapaxes"):
        axes = [a if a >= 0 else -a - 1 for a in rest if isinstance(a, int)]
        least = max(axes, default=0) + 1
        return least, least, True
    if name in ("view", "reshape"):
        return 0, len(sizes), False
    if name == "flatten":
        return 0, 2 if rest == [1] else 0, False
    return 0, 0, name in _KEEPING_NAMES
