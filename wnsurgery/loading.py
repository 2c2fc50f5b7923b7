"""What a checkpoint holds, in memory: objects, tensors, and the model a state dict belongs to.

A whole module of other classes than torch.nn's needs `trust_pickle`, or its state dict together with `arch`.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wnsurgery.checkpoint import StateDict, flat_tensors, known_magnitude, plain_keys, state_dicts, translate
from wnsurgery.checkpoint_directory import read_directory
from wnsurgery.entries import the_only
from wnsurgery.errors import (
    InputError,
    NonFiniteWeightError,
    PairError,
    SelectionError,
    WnsurgeryError,
    first_line,
    printable,
)
from wnsurgery.ranks import OtherRankError
from wnsurgery.reading import Path_, read
from wnsurgery.reparam import Magnitude, WeightNorm
from wnsurgery.stores.modules import modules_in
from wnsurgery.walk import Slot, slots

__all__ = [
    "WEIGHT_NORM",
    "Arch",
    "Path_",
    "build",
    "load_into",
    "load_model",
    "load_object",
    "load_tensors",
    "named",
    "state_for",
    "stripped",
    "working_directory_importable",
]

WEIGHT_NORM = ("ours", "torch", "legacy")

Arch = str | Callable[[], nn.Module]


# Reading -------------------------------------------------------------------------------------------------


def load_object(path: Path_, *, trust_pickle: bool = False) -> Any:
    """Whatever a checkpoint file, or a directory of them, holds, tensors on the CPU; nothing is executed without trust.

    >>> load_object("run.ckpt")["epoch"]  # doctest: +SKIP
    3

    Raises:
        InputMissingError, InputError: not there, damaged, or no checkpoint.
        UnsafeFileError: it needs more than tensors, plain containers and torch.nn modules.
    """
    return read_directory(Path(path)) if Path(path).is_dir() else read(path, trust_pickle).content


def load_tensors(path: Path_, *, trust_pickle: bool = False) -> dict[str, Tensor]:
    """Every tensor of the state dicts and modules in a file or directory, under its dotted name, as stored (pairs
    unfolded).

    >>> sorted(load_tensors("generator.pth"))  # doctest: +SKIP
    ['generator.conv_pre.bias', 'generator.conv_pre.weight_g', 'generator.conv_pre.weight_v']

    Args:
        path: what `torch.save` or safetensors wrote, or a directory of state dicts.
        trust_pickle: let the file's pickle run code.

    Raises:
        InputMissingError, InputError: not there, damaged, or no checkpoint.
        UnsafeFileError: it needs more than tensors, plain containers and torch.nn modules.
    """
    content = load_object(path, trust_pickle=trust_pickle)
    tensors = flat_tensors(content)
    for where, module in modules_in(content):
        tensors.update(flat_tensors({where: module.state_dict()} if where else module.state_dict()))
    return tensors


def load_model(
    path: Path_,
    *,
    arch: Arch | None = None,
    trust_pickle: bool = False,
    entry: str | None = None,
    magnitude: Magnitude = "linear",
) -> nn.Module:
    """The model in a file: a whole module, or a state dict, of a file or a directory, loaded strictly into what `arch`
    builds.

    A state dict in another layout than the model's is folded, converted or re-keyed on the way in; a pair that keeps
    other axes (torch's on a ConvTranspose, ours) is folded and split again along the model's.

    >>> load_model("weights.safetensors", arch="torchvision.models:resnet18")  # doctest: +SKIP

    Args:
        path: file that `torch.save` or safetensors wrote, or a directory of state dicts as the Hugging Face hub or
            torch.distributed.checkpoint has it.
        arch: "package.module:factory", or the factory itself; called without arguments. The working directory
            is searched for the package, too.
        trust_pickle: let the file's pickle run code.
        entry: dotted path of the state dict or module to take, where several fit ("ema").
        magnitude: "log" when the state dict stores the logarithm of g without saying so, as our own do.

    Raises:
        InputError: damaged, ambiguous, or its tensors do not fit the model.
        UnsafeFileError: a whole module of other classes than torch.nn's.
        SelectionError: `arch` names nothing that builds a module, or is missing, or not needed; or `magnitude` is none.
    """
    known_magnitude(magnitude)
    content = load_object(path, trust_pickle=trust_pickle)
    modules = modules_in(content)
    if modules:
        if arch is not None:
            raise SelectionError(f"{path}: holds a whole module; arch is for state dicts", hint="leave out --arch")
        model: nn.Module = the_only(path, [(w, m) for w, m in modules if entry in (None, w)], "module")
        return model
    if arch is None:
        raise InputError.of(
            path, "holds tensors but no module", "arch='package.module:factory' (--arch) says what builds the model"
        )
    model = build(arch)
    with named(path):
        state, prefix = state_for(path, content, model, entry)
        load_into(model, stripped(state, prefix), path, magnitude)
    return model


# Models and their state dicts ----------------------------------------------------------------------------


def build(arch: Arch) -> nn.Module:
    """The module a factory makes."""
    model: Any
    if callable(arch):
        name, model = getattr(arch, "__name__", repr(arch)), arch()
    else:
        name = arch
        module_name, _, attribute = arch.partition(":")
        if not module_name or not attribute:
            raise SelectionError(f"{arch!r} is not of the form package.module:factory")
        with working_directory_importable():
            try:  # the user's own code, which raises what it likes
                found: Any = import_module(module_name)
                for part in attribute.split("."):
                    found = getattr(found, part)
            except (Exception, SystemExit) as error:
                raise SelectionError(f"{arch}: {first_line(error)}") from error
            try:
                model = found()
            except (Exception, SystemExit) as error:
                hint = "the factory is called without arguments" if isinstance(error, TypeError) else None
                raise SelectionError(f"{arch}: {first_line(error)}", hint=hint) from error
    if not isinstance(model, nn.Module):
        raise SelectionError(f"{name}: gives a {type(model).__name__}, not a torch.nn.Module")
    return model


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """Let `--arch nets:build` find ./nets.py; last in the path, so that nothing installed is shadowed. What the user's
    own code does to the path stays."""
    here = str(Path.cwd())
    known = here in sys.path
    if not known:
        sys.path.append(here)
    try:
        yield
    finally:
        if not known and here in sys.path:
            sys.path.remove(here)


def state_for(path: Path_, content: Any, model: nn.Module, entry: str | None) -> tuple[StateDict, str]:
    """The one state dict in a file whose names are the model's, and what the file puts before them."""
    wanted = set(plain_keys(_template(model)))
    states = [s for s in state_dicts(content) if entry in (None, s.path)]
    fitting = [(s.path, (s, prefix)) for s in states if (prefix := _prefix(set(plain_keys(s)), wanted)) is not None]
    if not fitting and states:
        nearest = max(states, key=lambda s: len(wanted & set(plain_keys(s))))
        keys = set(plain_keys(nearest))
        raise InputError.of(path, _difference(keys, _required(wanted) | (wanted & keys)))
    state, prefix = the_only(path, fitting, "state dict")
    return state, prefix


def _prefix(keys: set[str], wanted: set[str]) -> str | None:
    """What stands before the model's names ("", "module.", "generator."), None if they are not all there.

    Keys under other prefixes may be there too (a checkpoint that holds a discriminator beside the generator).
    """
    required = _required(wanted)
    some = next(iter(sorted(required)), None)
    for key in sorted(keys) if some is not None else ():
        start = key.removesuffix(str(some))
        if key.endswith(str(some)) and (not start or start.endswith(".")):
            own = {k for k in keys if k.startswith(start)}
            if {start + name for name in required} <= own <= {start + name for name in wanted}:
                return start
    return None


def _required(wanted: set[str]) -> set[str]:
    """Without the counts of batches, which torch's strict load does not ask of the files of its first versions."""
    return {name for name in wanted if name.rpartition(".")[2] != "num_batches_tracked"}


def _difference(keys: set[str], wanted: set[str]) -> str:
    parts = [f"{len(wanted - keys)} missing"] if wanted - keys else []
    parts += [f"{len(keys - wanted)} unexpected"] if keys - wanted else []
    names = [printable(n) for n in (*sorted(wanted - keys)[:3], *sorted(keys - wanted)[:3])]
    return f"its tensors do not fit the model: {' and '.join(parts)} ({', '.join(names)}, ...)"


def _template(model: nn.Module) -> StateDict:
    return StateDict("", dict(model.state_dict()))


def stripped(state: StateDict, prefix: str) -> StateDict:
    """The model's part of a state dict, under the model's own names."""
    entries: dict[str, Any] = OrderedDict(
        (k.removeprefix(prefix), v) for k, v in state.entries.items() if isinstance(k, str) and k.startswith(prefix)
    )
    metadata = getattr(state.entries, "_metadata", None)
    if metadata is not None and not prefix:
        entries._metadata = metadata  # type: ignore[attr-defined]
    return StateDict(state.path, entries)


def load_into(model: nn.Module, state: StateDict, path: Path_, magnitude: Magnitude) -> None:
    wanted = {n: _magnitude(slot) for slot in slots(model) if slot.form in WEIGHT_NORM for n in slot.names}
    tensors = OrderedDict(translate(state, _template(model), magnitude=magnitude, wanted=wanted))
    extra = {k: v for k, v in state.entries.items() if not isinstance(v, Tensor)}
    tensors.update(extra)
    if hasattr(state.entries, "_metadata"):
        tensors._metadata = state.entries._metadata  # type: ignore[attr-defined]
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError.of(path, f"its tensors do not fit the model: {printable(reason, 400)}") from error


def _magnitude(slot: Slot) -> Magnitude:
    """How a weight under weight norm stores its g; torch's own knows only the linear way."""
    if slot.form != "ours":
        return "linear"
    rule: WeightNorm = slot.entry[0]
    return rule.magnitude


@contextmanager
def named(path: Path_) -> Iterator[None]:
    """Errors about a weight, or about what lies around it, say which file it is in."""
    try:
        yield
    except (PairError, NonFiniteWeightError) as error:
        raise _with_path(error, path) from error
    except InputError as error:
        if isinstance(error, OtherRankError) or str(path) in error.message:
            raise
        raise _with_path(error, path) from error


def _with_path(error: WnsurgeryError, path: Path_) -> WnsurgeryError:
    return type(error)(f"{path}: {error.message}", hint=error.hint)
