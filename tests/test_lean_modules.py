"""The modules parametrizations are made of: few objects, and to whoever looks at them like any module."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import nn

import wnsurgery as wn
from wnsurgery.lean_modules import LeanModule


def converted() -> Any:
    torch.manual_seed(0)
    return wn.apply_weight_norm(nn.Linear(5, 3))


def machinery(layer: Any) -> list[nn.Module]:
    return [layer.parametrizations, layer.parametrizations.weight, layer.parametrizations.weight[0]]


def test_every_table_a_module_of_torch_has_is_there_when_asked_for() -> None:
    """Empty, of the same kind, the same one each time, and not another module's."""
    first, second = machinery(converted()), machinery(converted())
    for mine, other in zip(first, second, strict=True):
        assert isinstance(mine, LeanModule)
        for name, table in vars(nn.Module()).items():
            found = getattr(mine, name)
            assert type(found) is type(table), name
            assert found is getattr(mine, name)
            assert not isinstance(table, dict | set) or found is not getattr(other, name), name


@pytest.mark.parametrize("prepend", [False, True])
def test_hooks_run_and_go(prepend: bool) -> None:
    """On each part of the machinery that is called, in the order asked for."""
    layer, x = converted(), torch.randn(2, 5)
    _, entry, rule = machinery(layer)
    expected, seen = layer(x), []
    handles = []
    for part, name in ((entry, "list"), (rule, "rule")):
        for i in range(2):
            note = lambda *_, mark=f"{name}{i}": seen.append(mark)  # noqa: E731
            handles.append(part.register_forward_hook(note, prepend=prepend))
    assert torch.equal(layer(x), expected)
    assert [mark for mark in seen if mark[:4] == "rule"] == (["rule1", "rule0"] if prepend else ["rule0", "rule1"])
    assert [mark for mark in seen if mark[:4] == "list"] == (["list1", "list0"] if prepend else ["list0", "list1"])
    for handle in handles:
        handle.remove()
    seen.clear()
    assert torch.equal(layer(x), expected)
    assert not seen


def test_copies_have_hooks_of_their_own() -> None:
    """A deep copy has the hooks of its original, and what is done to them later stays with it."""
    layer, seen = converted(), []
    layer.parametrizations.weight[0].register_forward_hook(lambda *_: seen.append("a"))
    twin = copy.deepcopy(layer)
    twin.parametrizations.weight[0].register_forward_hook(lambda *_: seen.append("b"))
    _ = layer.weight, twin.weight
    assert seen == ["a", "a", "b"]


def test_pickles_hold_every_table() -> None:
    """What is written to a file lacks nothing that a module of torch's has, looked at before or not."""
    for part in (*machinery(converted()), *machinery(pickle.loads(pickle.dumps(converted())))):
        assert part.__getstate__().keys() >= vars(nn.Module()).keys()


def test_a_converted_layer_costs_the_collector_little() -> None:
    """Fewer objects that it looks through than another plain layer would be."""

    def objects(make: Any) -> int:
        gc.collect()
        before = len(gc.get_objects())
        held = [make() for _ in range(100)]
        gc.collect()
        return (len(gc.get_objects()) - before) // len(held)

    converted()
    most = 2 if sys.version_info >= (3, 11) else 2.2  # until then every object has a dictionary from the start
    assert objects(converted) < most * objects(lambda: nn.Linear(5, 3))
