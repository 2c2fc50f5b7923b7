"""Read a pickle as text: which classes and functions it names, without building anything.

Safety does not rest on this reading (torch's restricted unpickler refuses by itself); it tells the user
*which* name a file wanted, and the reader of whole modules which torch classes to expect.
"""

from __future__ import annotations

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Any

__all__ = ["LEGACY_PICKLES", "Scan", "scan"]

LEGACY_PICKLES = (
    5  # of a file of torch's old serialisation: magic number, version, system, the object, the storage keys
)

_STRINGS = frozenset({
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"
})  # fmt: skip
_EXTENSIONS = frozenset({"EXT1", "EXT2", "EXT4"})


@dataclass(frozen=True)
class Scan:
    """What a pickle mentions.

    Attributes:
        names: dotted names of the classes and functions, in order, each once.
        specials: strings such as "__setstate__", with which a pickle could redirect a method.
        protocol: highest protocol declared.
        complete: False where the bytes stopped being a pickle before its end.
    """

    names: tuple[str, ...]
    specials: tuple[str, ...]
    protocol: int
    complete: bool

    def outside(self, known: Iterable[str]) -> tuple[str, ...]:
        """The names that are not among `known`."""
        allowed = frozenset(known)
        return tuple(name for name in self.names if name not in allowed)


class _Reader:
    """Follows strings through the stack and the memo, just far enough to name protocol-4 globals."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}
        self.specials: dict[str, None] = {}
        self.protocol = 0
        self.recent: list[str] = ["", ""]
        self.memo: dict[int, str] = {}

    def see(self, opcode: str, arg: Any) -> None:
        if opcode in _STRINGS:
            text = arg if isinstance(arg, str) else arg.decode("latin-1")
            self._push(text)
            if text.startswith("__") and text.endswith("__"):
                self.specials[text] = None
        elif opcode in ("GLOBAL", "INST"):
            module, _, name = arg.partition(" ")
            self._name(module, name)
        elif opcode == "STACK_GLOBAL":
            self._name(*self.recent)
        elif opcode in _EXTENSIONS:
            self.names[f"copyreg extension {arg}"] = None
        elif opcode in ("BINGET", "LONG_BINGET", "GET"):
            self._push(self.memo.get(int(arg), ""))
        elif opcode in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[int(arg)] = self.recent[-1]
        elif opcode == "MEMOIZE":
            self.memo[len(self.memo)] = self.recent[-1]
        elif opcode == "PROTO":
            self.protocol = max(self.protocol, arg)

    def _push(self, text: str) -> None:
        self.recent = [self.recent[-1], text]

    def _name(self, module: str, name: str) -> None:
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[module, name]
        else:
            module = IMPORT_MAPPING.get(module, module)
        self.names[f"{module}.{name}"] = None
        self._push("")


def scan(stream: IO[bytes], pickles: int = 1) -> Scan:
    """Read up to `pickles` pickles that follow each other in a stream, and list what they name.

    >>> import io, pickle, collections
    >>> scan(io.BytesIO(pickle.dumps(collections.Counter("aab")))).names
    ('collections.Counter',)
    """
    reader = _Reader()
    complete = True
    for _ in range(pickles):
        try:
            for opcode, arg, _position in pickletools.genops(stream):
                reader.see(opcode.name, arg)
        except Exception:  # pickletools raises what it likes on bytes that are no pickle
            complete = False
            break
    return Scan(tuple(reader.names), tuple(reader.specials), reader.protocol, complete)
