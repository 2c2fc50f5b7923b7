"""Which parameters an optimizer holds: groups made for weight norm, and optimizers that went stale under surgery."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from wnsurgery.following import Optimizers, as_optimizers
from wnsurgery.text import by
from wnsurgery.walk import check_module, slots

__all__ = ["StaleParameter", "StaleReport", "stale_parameters", "weight_norm_param_groups"]


def weight_norm_param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    magnitude_lr: float | None = None,
    weight_decay: float | None = None,
    magnitude_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for torch's optimizers: directions, magnitudes, biases and other weights apart.

    Two of them cannot take these: LBFGS, which takes no groups, and Muon, which takes matrices only.

    The function depends on v / ||v|| alone, so decay on v does not regularise: it only shrinks v and so raises the
    effective step (van Laarhoven 2017, arXiv 1706.05350). v, biases and all other vectors and scalars get no decay; g,
    the norm of the weight, gets `magnitude_weight_decay`.

    >>> model = wn.apply_weight_norm(nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 2)))
    >>> groups = wn.weight_norm_param_groups(model, lr=1e-3, magnitude_lr=1e-2, weight_decay=0.1)
    >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
    [('directions', 0.001, 0.0), ('magnitudes', 0.01, 0.0), ('vectors', 0.001, 0.0), ('weights', 0.001, 0.1)]
    >>> optimizer = torch.optim.AdamW(groups)

    Every trainable parameter is in exactly one group, ties once, in the model's order; frozen ones are left out and so
    are empty groups. Works with our weight norm, torch's new and legacy one, and plain models. Groups made before
    `apply_weight_norm(model, optimizer=...)` keep g and v where w was: make groups after conversion.

    Args:
        model: any module tree.
        lr: learning rate of all groups but the magnitudes; None leaves it to the optimizer.
        magnitude_lr: learning rate of g; None means `lr`.
        weight_decay: decay of the other weights (2 or more dimensions); None leaves it to the optimizer.
        magnitude_weight_decay: decay of g; towards g = 1 where the magnitude is log-scale.

    Returns a list of dicts with `params`, `name`, and `lr` and `weight_decay` where they are known.
    """
    roles: dict[int, str] = {}
    for slot in slots(model):
        if slot.form in ("ours", "torch", "legacy"):
            roles[id(slot.tensor)], roles[id(slot.magnitude)] = "directions", "magnitudes"
    groups: dict[str, dict[str, Any]] = {
        "directions": _group("directions", lr, 0.0),
        "magnitudes": _group("magnitudes", lr if magnitude_lr is None else magnitude_lr, magnitude_weight_decay),
        "vectors": _group("vectors", lr, 0.0),
        "weights": _group("weights", lr, weight_decay),
    }
    for parameter in model.parameters():
        if parameter.requires_grad:
            role = roles.get(id(parameter)) or ("weights" if parameter.ndim > 1 else "vectors")
            groups[role]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def _group(name: str, lr: float | None, weight_decay: float | None) -> dict[str, Any]:
    group: dict[str, Any] = {"params": [], "name": name}
    if lr is not None:
        group["lr"] = lr
    if weight_decay is not None:
        group["weight_decay"] = weight_decay
    return group


@dataclass(frozen=True)
class StaleParameter:
    """One parameter that an optimizer holds and the model does not: where, of what shape, and its name if known."""

    optimizer: int
    group: int
    position: int
    shape: tuple[int, ...]
    name: str

    def __str__(self) -> str:
        name = f"{self.name}, " if self.name else ""
        return f"optimizer {self.optimizer}, group {self.group}, place {self.position}: {name}{by(self.shape)}"


@dataclass(frozen=True)
class StaleReport:
    """What an optimizer and a model do not have in common; prints as text, true if there is anything.

    Attributes:
        gone: parameters the optimizer holds and the model no longer has: steps on them change nothing.
        untrained: names of trainable parameters of the model that no group holds: no step reaches them.

    >>> model = nn.Linear(3, 2)
    >>> report = wn.stale_parameters(model, torch.optim.SGD([model.weight], lr=0.1))
    >>> bool(report), report.gone, report.untrained
    (True, (), ('bias',))
    """

    gone: tuple[StaleParameter, ...]
    untrained: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.gone or self.untrained)

    def __str__(self) -> str:
        if not self:
            return "the optimizer holds the model's trainable parameters"
        lines = [f"{len(self.gone)} parameters in the optimizer that the model does not have"]
        lines += [f"  {entry}" for entry in self.gone]
        lines += [f"{len(self.untrained)} trainable parameters of the model in no optimizer"]
        return "\n".join([*lines, *(f"  {name}" for name in self.untrained)])


def stale_parameters(model: nn.Module, optimizer: Optimizers) -> StaleReport:
    """Whether an optimizer still holds what the model trains: it does not after surgery it was not told of.

    >>> model = nn.Linear(3, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> bool(wn.stale_parameters(wn.apply_weight_norm(model), optimizer))
    True
    >>> print(wn.stale_parameters(model, optimizer))
    1 parameters in the optimizer that the model does not have
      optimizer 0, group 0, place 0: 2x3
    2 trainable parameters of the model in no optimizer
      parametrizations.weight.original0
      parametrizations.weight.original1

    Args:
        model: the model; several models trained by one optimizer can be given as an `nn.ModuleList`.
        optimizer: one optimizer or all that train the model. Where an optimizer trains a part of the model on purpose,
            look at `.gone` alone.
    """
    check_module(model)
    optimizers = as_optimizers(optimizer, flat=True)
    names = {id(p): name for name, p in model.named_parameters()}
    held: set[int] = set()
    gone: list[StaleParameter] = []
    for i, one in enumerate(optimizers):
        for j, group in enumerate(one.param_groups):
            known = group.get("param_names") or [""] * len(group["params"])
            for k, (parameter, name) in enumerate(zip(group["params"], known, strict=True)):
                held.add(id(parameter))
                if id(parameter) not in names:
                    gone.append(StaleParameter(i, j, k, tuple(parameter.shape), name))
    untrained = [names[id(p)] for p in model.parameters() if p.requires_grad and id(p) not in held]
    return StaleReport(tuple(gone), tuple(untrained))
