"""Random sequences of what people do to a net in training: every weight and gradient is that of plain arithmetic."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wnsurgery as wn

LAYERS = 5


class _Walk:
    """A net, and one thing after another that is done to it."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.chance = random.Random(seed)
        self.width = self.chance.choice([4, 8, 370])  # the last is large enough for a linear layer's own way
        self.renew(wn.apply_weight_norm(nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(LAYERS))))

    def renew(self, net: Any) -> None:
        self.net, self.hooks = net, list[Any]()
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.5)

    def pair(self, i: int) -> tuple[Tensor, Tensor]:
        return self.net[i].parametrizations["weight"].pair()  # type: ignore[no-any-return]

    def some_pair(self) -> tuple[Tensor, Tensor]:
        return self.pair(self.chance.randrange(LAYERS))

    def some_half(self) -> Tensor:
        return self.chance.choice(self.some_pair())

    # What is done

    def write(self) -> None:
        with torch.no_grad():
            self.some_half().mul_(1.1)

    def write_unseen(self) -> None:
        """As optimizers written by hand do: no version counts it."""
        g, v = self.some_pair()
        g.data.mul_(1.05)
        v.data.mul_(torch.linspace(0.9, 1.1, v.numel()).view_as(v))

    def touch(self) -> None:
        """What may be done to a weight that is no leaf; its later uses know nothing of it."""
        w = self.chance.choice(self.net).weight
        if w.requires_grad:
            if self.chance.random() < 0.5:
                w.register_hook(lambda grad: grad * 3.0)
            else:
                w.retain_grad()

    def replace(self) -> None:
        half = self.some_half()
        half.data = half.data * 0.9

    def freeze(self) -> None:
        half = self.some_half()
        half.requires_grad_(not half.requires_grad)

    def hook(self) -> None:
        half = self.some_half()
        if half.requires_grad:
            self.hooks.append(half.register_hook(lambda grad: grad * 1.0))  # type: ignore[no-untyped-call]

    def unhook(self) -> None:
        if self.hooks:
            self.hooks.pop().remove()

    def step(self) -> None:
        self.optimizer.step()

    def initialise(self) -> None:
        nn.init.normal_(self.chance.choice(self.net).weight, std=0.3)

    def initialise_unseen(self) -> None:
        self.chance.choice(self.net).weight.data.normal_(std=0.3)
        self.net.state_dict()

    def duplicate(self) -> None:
        again = self.chance.random() < 0.5
        self.renew(copy.deepcopy(self.net) if again else pickle.loads(pickle.dumps(self.net)))

    def evaluate(self) -> None:
        i = self.chance.randrange(LAYERS)
        with torch.no_grad():
            g, v = self.pair(i)
            torch.testing.assert_close(self.net[i].weight, g * v / v.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-6)

    def train(self, passes: int = 1, *, twice: bool = False) -> None:
        """Passes through random layers, each with a backward pass, or two of one graph."""
        for p in self.net.parameters():
            p.grad = None
        wide = [
            [t.detach().double().requires_grad_(t.requires_grad) for t in (*self.pair(i), self.net[i].bias)]
            for i in range(LAYERS)
        ]
        x = torch.linspace(-1, 1, 2 * self.width).view(2, self.width)
        orders = [[self.chance.randrange(LAYERS) for _ in range(self.chance.randint(1, 6))] for _ in range(passes)]
        losses = []
        for order in orders:
            y, z = x, x.double()
            for i in order:
                g, v, bias = wide[i]
                y = self.net[i](y).tanh()
                z = nn.functional.linear(z, g * v / v.norm(dim=1, keepdim=True), bias).tanh()
            losses.append((y.square().sum(), z.square().sum()))
        for loss, wanted in losses:
            torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-6)
            for one in (loss, wanted) if loss.requires_grad else ():
                one.backward(retain_graph=twice)
                if twice:
                    one.backward()
        for i in range(LAYERS):
            for mine, other in zip((*self.pair(i), self.net[i].bias), wide[i], strict=True):
                if other.grad is None:  # zeros where a hook came while the weight was waiting
                    assert mine.grad is None or not bool(mine.grad.any())
                else:
                    assert mine.grad is not None
                    scale = float(other.grad.abs().max()) + 1e-3
                    torch.testing.assert_close(mine.grad.double() / scale, other.grad / scale, rtol=0, atol=1e-3)

    def run(self, steps: int) -> None:
        deeds: list[Callable[[], None]] = [
            *[self.train] * 3,
            lambda: self.train(2),
            lambda: self.train(twice=True),
            *(self.write, self.write_unseen, self.touch, self.replace, self.freeze, self.hook, self.unhook, self.step),
            *(self.initialise, self.initialise_unseen, self.duplicate, self.evaluate),
        ]
        for _ in range(steps):
            self.chance.choice(deeds)()


@pytest.mark.parametrize("seed", range(40))
def test_any_order(seed: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _Walk(seed).run(40)
    finally:
        torch.set_num_threads(before)
