"""Every number of ANSWERS.md: what g, v and w do in a small net on scikit-learn's handwritten digits.

    python examples/answers.py

Needs scikit-learn (the `examples` extra); seconds on one core, the same numbers each time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import wnsurgery as wn

TRAIN, BATCH = 1440, 100


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of 64 pixels in [0, 1], and their digits."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


X, Y = digits()


def net(width: int = 64) -> nn.Sequential:
    """Two layers, the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, penalty: Callable[[], Tensor] | None = None
) -> float:
    """Train on the same batches each time; the loss over all training images at the end."""
    order = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = torch.randint(TRAIN, (BATCH,), generator=order)
        loss = cross_entropy(model(X[batch]), Y[batch])
        if penalty is not None:
            loss = loss + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return cross_entropy(model(X[:TRAIN]), Y[:TRAIN]).item()


def sgd(model: nn.Module, lr: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def pair(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """g and v of a converted layer."""
    entry = layer.parametrizations.weight  # type: ignore[union-attr]
    return entry.original0, entry.original1  # type: ignore[union-attr,return-value]


# What is g for, and where does it come from? ----------------------------------------------------------------


def what_is_g() -> None:
    model = net()
    old = model[0].weight.detach().clone()
    wn.apply_weight_norm(model)
    g, _ = pair(model[0])
    print("g of the first three neurons:", *(f"{x:.3f}" for x in g.flatten()[:3].tolist()))
    print("norms of their old weights:  ", *(f"{x:.3f}" for x in old.norm(dim=1)[:3].tolist()))
    print("bits of the weight that changed:", int((model[0].weight != old).sum()))
    wn.data_dependent_init(model, X[:500])
    first = model[0](X[:500])
    print(
        f"after data-dependent init: mean {first.mean().abs():.2f}, deviation {first.std(0, correction=0).mean():.2f}"
    )


# Is w the normalized weight? --------------------------------------------------------------------------------


def is_w_normalized() -> None:
    model = wn.apply_weight_norm(net())
    g, v = pair(model[0])
    with torch.no_grad():
        g[0], v[0] = 3.0, v[0] * 100
    w = model[0].weight
    print(f"norm of v: {v[0].norm():.1f}, of v/||v||: {(v[0] / v[0].norm()).norm():.1f}, of w: {w[0].norm():.1f}")


# How does it work? ------------------------------------------------------------------------------------------


def how_it_works() -> None:
    model = wn.apply_weight_norm(net())
    _, v = pair(model[0])
    cross_entropy(model(X[:TRAIN]), Y[:TRAIN]).backward()
    assert v.grad is not None
    along = (v.grad * v).sum(1).abs().max() / (v.grad.norm() * v.norm())
    print(f"part of v's gradient along v: {along:.0e}" if along > 1e-6 else "part of v's gradient along v: below 1e-06")
    before = v.norm(dim=1).detach().clone()
    c = 0.5 * v.grad.norm(dim=1) / before
    sgd(model).step()
    alive = c > 0
    ratio = (v.norm(dim=1) / before)[alive]
    law = (1 + c.square()).sqrt()[alive]
    print(f"growth of ||v|| in one step against sqrt(1 + c^2): {(ratio / law).min():.5f} to {(ratio / law).max():.5f}")


# Why would it converge faster? ------------------------------------------------------------------------------


def why_faster() -> None:
    print("training loss after 300 steps of SGD")
    print("learning rate    plain    weight norm    with data-dependent init")
    for lr in (0.01, 0.1, 1.0, 10.0):
        plain = net()
        normed = wn.apply_weight_norm(net())
        data = wn.apply_weight_norm(net())
        wn.data_dependent_init(data, X[:500])
        losses = [train(m, sgd(m, lr), 300) for m in (plain, normed, data)]
        print(f"{lr:>13}" + "".join(f"{x:>{n}.2f}" for x, n in zip(losses, (9, 15, 28), strict=True)))


# How does it compare with an L2 penalty? --------------------------------------------------------------------


def against_a_penalty() -> None:
    def norm_of(model: nn.Sequential) -> float:
        return model[0].weight.norm().item()  # type: ignore[union-attr,operator]

    plain, penalised, normed = net(), net(), wn.apply_weight_norm(net())
    slow, shortened = wn.apply_weight_norm(net()), wn.apply_weight_norm(net())
    start = norm_of(plain)
    losses = [
        train(plain, sgd(plain), 500),
        train(
            penalised,
            sgd(penalised),
            500,
            lambda: 0.01 * sum(m.weight.square().sum() for m in (penalised[0], penalised[2])),
        ),  # type: ignore[misc,union-attr,operator]
        train(normed, sgd(normed), 500),
        train(slow, sgd(slow, 0.1), 500),
        train(
            shortened,
            sgd(shortened, 0.1),
            500,
            lambda: 0.01 * sum(pair(m)[1].square().sum() for m in (shortened[0], shortened[2])),
        ),  # type: ignore[misc]
    ]
    print(f"norm of the first layer's weight at the start: {start:.1f}")
    names = ("plain", "L2 penalty on w", "weight norm", "weight norm, rate 0.1", "the same, L2 penalty on v")
    for name, loss, model in zip(names, losses, (plain, penalised, normed, slow, shortened), strict=True):
        v = f", norm of v {pair(model[0])[1].norm():.1f}" if wn.is_weight_normed(model[0]) else ""
        print(f"{name}: loss {loss:.2f}, norm of w {norm_of(model):.1f}{v}")


# What if the magnitude is fixed? ----------------------------------------------------------------------------


def fixed() -> None:
    model = wn.apply_weight_norm(net(), freeze_magnitude=True)
    before = model[0].weight.norm(dim=1).detach()
    loss = train(model, sgd(model), 500)
    change = (model[0].weight.norm(dim=1) / before - 1).abs().max()
    free = wn.apply_weight_norm(net())
    print(f"loss with g frozen {loss:.2f}, with g learned {train(free, sgd(free), 500):.2f}")
    print("largest change of a row's norm:", "below 1e-06" if change < 1e-6 else f"{change:.0e}")


# Or gets its own learning rate? -----------------------------------------------------------------------------


def own_rate() -> None:
    for magnitude_lr in (0.0, 0.05, 0.5, 2.0):
        model = wn.apply_weight_norm(net())
        groups = wn.weight_norm_param_groups(model, lr=0.5, magnitude_lr=magnitude_lr)
        loss = train(model, torch.optim.SGD(groups), 500)
        print(f"learning rate of g {magnitude_lr}: loss {loss:.2f}, mean g {pair(model[0])[0].mean():.2f}")


SECTIONS: dict[str, Callable[[], None]] = {
    "What is g for, and where does it come from?": what_is_g,
    "Is w the normalized weight?": is_w_normalized,
    "How does it work?": how_it_works,
    "Why would it converge faster?": why_faster,
    "How does it compare with an L2 penalty?": against_a_penalty,
    "What if the magnitude is fixed?": fixed,
    "Or gets its own learning rate?": own_rate,
}


def main() -> None:
    torch.set_num_threads(1)
    for question, answer in SECTIONS.items():
        print(f"## {question}")
        answer()
        print()


if __name__ == "__main__":
    main()
