"""What a graph declares of each input: the type as numpy names it, the shape, and whether it may be left out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from wnsurgery.errors import printable

__all__ = ["Declared"]

_NUMPY_NAMES = {"float": "float32", "double": "float64"}  # where onnxruntime's names are others


@dataclass(frozen=True)
class Declared:
    """An input of a graph, read from an onnxruntime session.

    `type` is onnxruntime's, without `optional(...)`; a `shape` of None means any; `default` says that the graph has a
    value of its own, which may be overridden.

    >>> x = Declared("x", "tensor(float)", ("batch", 3))
    >>> x.dtype, x.fits("float32", (8, 3)), x.fits("float32", (8, 4)), str(x)
    ('float32', True, False, 'tensor(float) batchx3')
    """

    name: str
    type: str
    shape: tuple[Any, ...] | None
    optional: bool = False
    default: bool = False

    @classmethod
    def needed(cls, session: Any, any_shape: Collection[str] = ()) -> list[Declared]:
        """The inputs of a session without a value of their own, in its order; those named take `any_shape`."""
        return [cls._of(one, any_shape, default=False) for one in session.get_inputs()]

    @classmethod
    def all_of(cls, session: Any, any_shape: Collection[str] = ()) -> list[Declared]:
        """Those, then the ones that have a value of their own to be overridden."""
        more = [cls._of(one, any_shape, default=True) for one in session.get_overridable_initializers()]
        return cls.needed(session, any_shape) + more

    @classmethod
    def _of(cls, one: Any, any_shape: Collection[str], default: bool) -> Declared:
        kind: str = one.type
        optional = kind.startswith("optional(")
        if optional:
            kind = kind.removeprefix("optional(").removesuffix(")")
            kind += ")" * (kind.count("(") - kind.count(")"))
        return cls(one.name, kind, None if one.name in any_shape else tuple(one.shape), optional, default)

    @property
    def is_tensor(self) -> bool:
        """Whether it is one array, and no sequence or map of them."""
        return self.type.startswith("tensor(")

    @property
    def dtype(self) -> str | None:
        """The type of its elements as numpy and torch name it, None for what is no tensor."""
        if not self.is_tensor:
            return None
        kind = self.type.removeprefix("tensor(").removesuffix(")")
        return _NUMPY_NAMES.get(kind, kind)

    def fits(self, dtype: str, shape: Sequence[int]) -> bool:
        """Whether an array of this type and shape can be given for it."""
        if dtype != self.dtype:
            return False
        if self.shape is None:
            return True
        alike = (not isinstance(one, int) or one == size for one, size in zip(self.shape, shape, strict=False))
        return len(self.shape) == len(shape) and all(alike)

    def __str__(self) -> str:
        shape = "of any shape" if self.shape is None else "x".join(map(printable, self.shape)) or "scalar"
        known = f"{self.type} {shape}" if self.is_tensor else self.type
        return f"optional {known}" if self.optional or self.default else known
