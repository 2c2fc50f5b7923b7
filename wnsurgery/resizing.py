"""Embeddings that a model resizes: refused while they are under weight norm, before anything is changed.

Models of the transformers library write a weight of another size into their embedding's, which g and v cannot take, and
then tie a new head to it by the names of g and v, which the head lacks.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from wnsurgery.errors import SelectionError
from wnsurgery.walk import slots

__all__ = ["guard_resizing"]

_NAME = "_resize_token_embeddings"  # what transformers' own `resize_token_embeddings` begins with


def guard_resizing(modules: Sequence[nn.Module]) -> None:
    """Let those of a model's modules that resize their embeddings look first, while these are converted; no longer."""
    able = {kind for kind in set(map(type, modules)) if hasattr(kind, _NAME)}
    for module in modules if able else ():
        if type(module) in able:
            if _converted(module) is not None:
                module.__dict__[_NAME] = _Resize(module)
            elif isinstance(module.__dict__.get(_NAME), _Resize):
                del module.__dict__[_NAME]


def _converted(module: Any) -> nn.Module | None:
    """The input embeddings of a model, if they are under weight norm."""
    try:
        found = module.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    own = slots(found, plain=False) if isinstance(found, nn.Module) else ()
    return found if any(slot.module is found and slot.form in ("ours", "torch") for slot in own) else None


class _Resize:
    """In the place of a model's method: does what that does unless the size of a converted weight would change."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # a cycle would keep models in memory until the garbage collection

    def __reduce__(self) -> Any:
        return _Resize, (self._model(),)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Resize:
        model: Any = self._model()
        return _Resize(memo.get(id(model), model))

    def __call__(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *rest: Any, **options: Any
    ) -> Any:
        model: Any = self._model()
        found: Any = _converted(model)
        if found is not None:
            rows = len(found.weight)
            wanted = rows if new_num_tokens is None else new_num_tokens
            wanted += -wanted % (pad_to_multiple_of or 1)
            if wanted != rows:
                raise SelectionError(
                    f"the embeddings are under weight norm and cannot be resized from {rows} to {wanted} rows",
                    hint="fold_weight_norm first, and apply_weight_norm again after resizing",
                )
        return getattr(type(model), _NAME)(model, new_num_tokens, pad_to_multiple_of, *rest, **options)
