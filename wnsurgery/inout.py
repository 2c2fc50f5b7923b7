"""Arrays in and out of files: batches for initialisation, inputs and outputs of exported models."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wnsurgery.batches import NamedArrays
from wnsurgery.errors import InputError, SelectionError, first_line, printable
from wnsurgery.stores import open_regular
from wnsurgery.stores.commit import check_output, committed

__all__ = ["example_inputs", "random_inputs", "read_arrays", "read_batch", "write_arrays"]

Arrays = dict[str, Any] | list[Any]

_LONGEST_NAME = 0xFFFF  # bytes; names in zip files have their length in two


def read_arrays(path: str | os.PathLike[str]) -> Arrays:
    """Named arrays of an .npz; a list of arrays for an .npy, or an .npz with numpy's own names (arr_0, arr_1, ...).

    Raises InputMissingError, or InputError for anything numpy cannot read without running code or has no memory for.
    """
    path = Path(path)
    with open_regular(path) as file:
        if path.suffix.lower() not in (".npy", ".npz"):
            raise InputError.of(path, "not an .npz or .npy file")
        try:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return [loaded]
            with loaded:
                named = {name: loaded[name] for name in loaded.files}
        except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds on what they cannot read
            reason = printable(" ".join(str(error).split()) or type(error).__name__)
            raise InputError.of(path, f"damaged, too large or not numbers: {reason}") from error
    numbered = all(name == f"arr_{i}" for i, name in enumerate(named))
    return list(named.values()) if numbered else NamedArrays(named)


def read_batch(path: str | os.PathLike[str]) -> Any:
    """One batch for a model: a tensor, a tuple of tensors, or a mapping of keyword tensors.

    .npy gives a tensor; .npz a tensor or tuple if its names are numpy's own (arr_0, arr_1, ...), else keyword
    arguments; .pt and .safetensors what was saved in them, read without executing code.
    """
    path = Path(path)
    if path.suffix.lower() in (".npy", ".npz"):
        arrays = read_arrays(path)
        if isinstance(arrays, list):
            return _unwrap([_tensor(value, path) for value in arrays])
        return NamedArrays((name, _tensor(value, path)) for name, value in arrays.items())
    from wnsurgery.files import load_object

    return _unwrap(load_object(path))


def _tensor(array: Any, path: Path) -> Tensor:
    """An array of a file as a tensor, in this machine's byte order."""
    try:
        return torch.from_numpy(np.asarray(array).astype(array.dtype.newbyteorder("="), copy=False))
    except (TypeError, ValueError) as error:
        raise InputError.of(path, f"holds {array.dtype}, of which torch makes no tensor") from error


def _unwrap(batch: Any) -> Any:
    batch = tuple(batch) if isinstance(batch, list) else batch
    return batch[0] if isinstance(batch, tuple) and len(batch) == 1 else batch


def random_inputs(shapes: Sequence[str], seed: int = 0) -> tuple[Tensor, ...]:
    """Random tensors for shapes such as "1x3x32x32" or "4x16:int64" (integers are 0 or 1), from a generator of its own.

    >>> [tuple(x.shape) for x in random_inputs(["2x3", "2:int64"])]
    [(2, 3), (2,)]
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for text in shapes:
        sizes, _, kind = text.partition(":")
        dtype = getattr(torch, kind or "float32", None)
        if not isinstance(dtype, torch.dtype) or not all(s.isascii() and s.isdecimal() for s in sizes.split("x")):
            raise SelectionError(f"{text!r} is not a shape such as 1x3x32x32 or 4x16:int64")
        try:
            shape = [int(s) for s in sizes.split("x")]
            made = torch.randn if dtype.is_floating_point else partial(torch.randint, 0, 2)
            tensors.append(made(shape, generator=generator).to(dtype))
        except (RuntimeError, TypeError, ValueError, MemoryError) as error:  # too large, or no type of numbers
            raise SelectionError(f"{text!r}: no such input can be made ({first_line(error)})") from error
    return tuple(tensors)


def example_inputs(name: str) -> Any:
    """What `package.module:function` returns, called without arguments: a tensor, a tuple or a mapping of tensors.

    Raises SelectionError where there is no such function, or it fails.
    """
    from importlib import import_module

    from wnsurgery.loading import working_directory_importable

    module, _, function = name.partition(":")
    if not module or not function:
        raise SelectionError(f"{name!r} is not of the form package.module:function")
    with working_directory_importable():
        try:
            return getattr(import_module(module), function)()
        except (Exception, SystemExit) as error:  # the user's own code, which raises what it likes
            raise SelectionError(f"{name}: {first_line(error)}") from error


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any], *, force: bool = False) -> None:
    """Write named arrays to an .npz, or a single one to an .npy; whole or not at all, by rename.

    Raises OutputExistsError unless `force`, OutputError when it cannot be written, InputError for a name that is too
    long for an .npz.
    """
    path = check_output(path, force=force)
    single = path.suffix.lower() == ".npy"
    if path.suffix.lower() not in (".npy", ".npz") or (single and len(arrays) != 1):
        raise SelectionError(f"{path}: outputs go to an .npz file, or to an .npy file if there is one")
    longest = max(map(str, arrays), key=len, default="")
    if not single and len(f"{longest}.npy".encode()) > _LONGEST_NAME:
        reason = f"an output's name of {len(longest)} characters is too long for an .npz: {printable(longest, 40)}"
        raise InputError.of(path, reason)
    with committed(path, force=force) as file:
        if single:
            np.save(file, next(iter(arrays.values())), allow_pickle=False)
        else:
            with zipfile.ZipFile(file, "w") as archive:  # not np.savez: an output may be called "file"
                for name, value in arrays.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                        np.lib.format.write_array(entry, np.asarray(value), allow_pickle=False)
