"""What each of several interleaved forward passes keeps for itself: attributes on modules, activations in memory."""

from __future__ import annotations

import ctypes
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from operator import eq, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from wnsurgery.errors import OutputError
from wnsurgery.lean_modules import LeanModule

__all__ = ["Attributes", "Spill"]

_GONE = object()


class Attributes:
    """Gives every run back what it wrote on modules itself (`self.x = ...`), whoever wrote there since.

    What a run has not written, it sees as it is now; so counters count all runs. Lists and dicts that a module held
    before count as changed when a tensor was put into them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: nn.Module | None = model
        self._dicts: list[dict[Any, Any]] = []
        self._lists: list[list[Any]] = []
        self._own: defaultdict[int, dict[tuple[int, Any], Any]] = defaultdict(dict)
        self._own_lists: defaultdict[int, dict[int, list[Any]]] = defaultdict(dict)

    def _look(self, model: nn.Module) -> None:
        """Before the first of several runs; a run alone needs none of this."""
        everything = list(model.modules())
        kinds = (torch.jit.ScriptModule, ParametrizationList, LeanModule)
        machines = {id(m._modules.get("parametrizations")) for m in everything}
        machines |= {id(m) for m in everything if isinstance(m, kinds)}
        for module in everything:
            if id(module) in machines:
                continue
            self._dicts += [module.__dict__, module._buffers]
            for name, value in module.__dict__.items():
                if name in _MACHINERY:
                    continue
                if type(value) is dict:
                    self._dicts.append(value)
                elif type(value) is list:
                    self._lists.append(value)
        self._seen = [dict(d) for d in self._dicts]
        self._seen_lists = [list(entries) for entries in self._lists]

    def _is_unchanged(self) -> bool:
        """Whether no dict and no list has other entries than at the last look; most runs leave all as they are."""
        rows = zip(_in_a_row(self._dicts, self._lists), _in_a_row(self._seen, self._seen_lists), strict=True)
        return all(all(map(same, now, then)) for same, (now, then) in zip((eq, is_, is_, is_), rows, strict=True))

    def inside(self, number: int) -> AbstractContextManager[Any]:
        return nullcontext()

    def enter(self, number: int) -> None:
        if self._model is not None:
            self._look(self._model)
            self._model = None
        for (place, key), value in self._own[number].items():
            for there in (self._dicts[place], self._seen[place]):
                if value is _GONE:
                    there.pop(key, None)
                else:
                    there[key] = value
        for place, entries in self._own_lists[number].items():
            self._lists[place][:] = entries
            self._seen_lists[place] = list(entries)

    def leave(self, number: int, done: bool) -> None:
        if not self._is_unchanged():
            self._take_over(number)
        if done:
            del self._own[number]
            self._own_lists.pop(number, None)

    def _take_over(self, number: int) -> None:
        """What a run has changed is its own."""
        own = self._own[number]
        for place, (now, before) in enumerate(zip(self._dicts, self._seen, strict=True)):
            if len(now) == len(before) and all(map(is_, now.values(), before.values())) and now.keys() == before.keys():
                continue
            for key in {**before, **now}:
                value = now.get(key, _GONE)
                if value is not before.get(key, _GONE):
                    own[place, key] = value
            self._seen[place] = dict(now)
        for place, (entries, seen) in enumerate(zip(self._lists, self._seen_lists, strict=True)):
            if len(entries) == len(seen) and all(map(is_, entries, seen)):
                continue
            known = set(map(id, seen))
            if any(isinstance(entry, Tensor) for entry in entries if id(entry) not in known):
                self._own_lists[number][place] = list(entries)
            self._seen_lists[place] = list(entries)


def _in_a_row(dicts: list[dict[Any, Any]], lists: list[list[Any]]) -> tuple[Iterator[Any], ...]:
    """The lengths of all, all keys, all values, and all entries of the lists."""
    return map(len, chain(dicts, lists)), *map(chain.from_iterable, (dicts, map(dict.values, dicts), lists))


_MACHINERY = frozenset(nn.Module().__dict__)  # parameters, hooks, children: no place where a forward keeps values


_LIGHT = 2**16  # bytes: operations on less need no thread's workspace worth speaking of


class Spill:
    """Takes the activations of paused runs out of memory: from the CPU to a temporary file, from a GPU to the CPU.

    Memory that a run allocated and still holds when it pauses is written out and given back, and read again before
    the run goes on, or when another run touches it. Parameters, buffers, weights that converted layers compute, the
    caller's own tensors and anything smaller than 16 KiB stay. The file lies in Python's directory for temporary files
    (`TMPDIR`).

    `on_one_thread` runs a function where it always is the same thread: allocators, and the libraries behind
    convolutions and matrix products, keep memory for each thread that ever called them.
    """

    smallest = 2**14

    def __init__(self, on_one_thread: Callable[[Callable[[], Any]], Any] | None = None) -> None:
        self.on_one_thread = on_one_thread
        self._made: defaultdict[int, dict[int, StorageWeakRef]] = defaultdict(dict)
        self._out: dict[int, tuple[StorageWeakRef, int, Any]] = {}  # storage -> itself, bytes, where they are
        self._file: Any = None
        self._end = 0
        self._free: defaultdict[int, list[int]] = defaultdict(list)

    def inside(self, number: int) -> AbstractContextManager[Any]:
        return self._watching(number)

    @contextmanager
    def _watching(self, number: int) -> Iterator[None]:
        # pushed without `__enter__`, whose global flags ask for last in, first out over all threads
        _python_dispatch._push_mode(_Watch(self, self._made[number]))
        try:
            yield
        finally:
            _python_dispatch._pop_mode()

    def enter(self, number: int) -> None:
        for key in list(self._made[number]):
            if key in self._out:
                self._bring_back(key)

    def leave(self, number: int, done: bool) -> None:
        made = self._made[number]
        for key, reference in list(made.items()):
            if reference.expired():  # type: ignore[no-untyped-call]
                del made[key]
                self._forget(key)
            elif not done:
                self._put_out(key, reference)
        if done:
            del self._made[number]

    def close(self) -> None:
        """Bring back everything that is still alive; drop the file."""
        for key in list(self._out):
            self._bring_back(key)
        if self._file is not None:
            self._file.close()
            self._file = None

    def touch(self, tensors: Iterable[Any]) -> None:
        """Make sure that these tensors are in memory."""
        if not self._out:
            return
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                key = _key(tensor)
                if key in self._out:
                    self._bring_back(key)
            elif isinstance(tensor, list | tuple):
                self.touch(tensor)

    def _put_out(self, key: int, reference: StorageWeakRef) -> None:
        storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
        if storage is None or storage.nbytes() < self.smallest or not storage.resizable():
            return
        size = storage.nbytes()
        if storage.device.type == "cuda":
            place: Any = torch.empty(size, dtype=torch.uint8)
            place.untyped_storage().copy_(storage)
        elif storage.device.type == "cpu":
            place = self._write(storage, size)
        else:
            return
        storage.resize_(0)
        self._out[key] = (reference, size, place)

    def _bring_back(self, key: int) -> None:
        reference, size, place = self._out[key]
        storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
        if storage is not None:
            storage.resize_(size)
            if isinstance(place, Tensor):
                storage.copy_(place.untyped_storage())
            else:
                self._read(storage, size, place)
        self._forget(key)

    def _forget(self, key: int) -> None:
        _, size, place = self._out.pop(key, (None, 0, None))
        if isinstance(place, int):
            self._free[_slot(size)].append(place)

    def _write(self, storage: Any, size: int) -> int:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed by close()
            if self._free[_slot(size)]:
                place = self._free[_slot(size)].pop()
            else:
                place, self._end = self._end, self._end + _slot(size)
            self._file.seek(place)
            data = _bytes(storage, size)
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise OutputError(
                f"activations do not fit the directory for temporary files: {error.strerror or error}",
                hint='set TMPDIR, or memory="live" keeps them in memory',
            ) from error
        return place

    def _read(self, storage: Any, size: int, place: int) -> None:
        self._file.seek(place)
        data = _bytes(storage, size)
        while data:
            count = self._file.readinto(data)
            if not count:
                raise OutputError("the temporary file of activations was cut short")
            data = data[count:]


class _Watch(TorchDispatchMode):
    """Sees every operation of one run: which storages it makes, and whether it touches one that is out."""

    supports_higher_order_operators = True
    passive = True

    def __init__(self, spill: Spill, made: dict[int, StorageWeakRef]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._spill, self._made = spill, made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._spill.touch(args)
        self._spill.touch(kwargs.values())
        elsewhere = self._spill.on_one_thread
        if elsewhere is None or all(t.nbytes < _LIGHT for t in _tensors((*args, *kwargs.values()))):
            output = func(*args, **kwargs)
        else:
            output = elsewhere(_as_dispatched_here(func, args, kwargs))
        given: set[int] | None = None
        for tensor in output if isinstance(output, list | tuple) else (output,):
            key = _key(tensor)
            if key and key not in self._made:
                given = {_key(t) for t in _tensors((*args, *kwargs.values()))} if given is None else given
                if key not in given and not _is_weight(tensor, self._spill.smallest):
                    self._made[key] = StorageWeakRef(  # type: ignore[no-untyped-call]
                        tensor.untyped_storage()
                    )
        return output


def _as_dispatched_here(func: Any, args: Any, kwargs: Any) -> Callable[[], Any]:
    """A call that goes on, on another thread, from where dispatch stands on this one: below autograd and autocast."""
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    inference = torch.is_inference_mode_enabled()

    def call() -> Any:
        with torch.inference_mode(inference), torch._C._ForceDispatchKeyGuard(included, excluded):
            return func(*args, **kwargs)

    return call


_WEIGHTS = frozenset(f"wnsurgery.{name}" for name in ("mechanism", "preparation", "reparam"))


def _is_weight(tensor: Tensor, smallest: int) -> bool:
    """Whether what was just made belongs to a converted layer's weight: that is kept for other runs too, and a place of
    its own is how the layer knows that nobody wrote to it."""
    if tensor.untyped_storage().nbytes() < smallest:
        return False
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_name != "_call_impl":
        if frame.f_globals.get("__name__") in _WEIGHTS:
            return True
        frame = frame.f_back
    return False


def _key(tensor: Any) -> int:
    """What tells a tensor's storage from others; 0 for what has none that could be moved."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return tensor.untyped_storage()._cdata if plain and tensor.device.type in ("cpu", "cuda") else 0


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _slot(size: int) -> int:
    """Room for so many bytes, rounded up so that it fits others later."""
    return 1 << (size - 1).bit_length()


def _bytes(storage: Any, size: int) -> memoryview:
    # not through numpy: that would forbid resizing the storage ever after
    return memoryview((ctypes.c_char * size).from_address(storage.data_ptr())).cast("B")
