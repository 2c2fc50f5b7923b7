"""Mutate checkpoint files of every kind; fold, convert and inspect them. Run by hand: python tests/fuzz.py [N] [SEED]

Damage is made where it reaches deep: not only bytes and lengths, but the opcodes of a pickle in an archive that is
put together again with right checksums, the numbers of a safetensors header or an index, and the fields of a zip
directory. An operation must end with a result or with an error of ours (exit codes 3, 4, 5 or 7), soon, in bounded
memory, and a failed one must leave nothing behind.
"""

from __future__ import annotations

import collections
import io
import itertools
import json
import pickletools
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from wnsurgery import apply_weight_norm
from wnsurgery.errors import WnsurgeryError
from wnsurgery.files import convert_checkpoint, fold_checkpoint
from wnsurgery.inspection import inspect

PATIENCE = 20  # seconds one operation may take
NUMBERS = [-1, 0, 1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 1.5, True]
VALUES: list[Any] = [*NUMBERS, None, "", "F32", "I64", "F4", "../x", "/etc/passwd", [], {}, [0], [0, 4], [2**62, 4]]


def pairs() -> dict[str, torch.Tensor]:
    """Pairs of both layouts, one of them tied, and a few other tensors."""
    torch.manual_seed(0)
    v = torch.rand(4, 3)
    state = {"a.weight_g": torch.rand(4, 1), "a.weight_v": v, "a.bias": torch.rand(4), "d.weight": v}
    state |= {"b.parametrizations.weight.original0": torch.rand(2, 1, 1)}
    state |= {"b.parametrizations.weight.original1": torch.rand(2, 3, 2), "n": torch.tensor(3), "e": torch.rand(0, 2)}
    return state


def samples(folder: Path) -> list[Path]:
    """One small checkpoint of each kind."""
    content = {"state_dict": OrderedDict(pairs()), "epoch": 3, "optimizer": {"state": {0: {"m": torch.rand(4, 1)}}}}
    content["optimizer"]["param_groups"] = [{"params": [0, 1, 2], "lr": 0.1}]  # type: ignore[index]
    torch.save(content, folder / "zip.pt")
    torch.save(content, folder / "old.pth", _use_new_zipfile_serialization=False)
    net = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2))
    torch.save(apply_weight_norm(net), folder / "module.pt")
    flat = {k: t.clone() for k, t in pairs().items()}
    safetensors.torch.save_file(flat, folder / "flat.safetensors", {"format": "pt"})
    hub = folder / "hub"
    hub.mkdir()
    shards = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(flat.items())[i::2]) for i in range(2)}
    for name, part in shards.items():
        safetensors.torch.save_file(part, hub / name)
    index = {"metadata": {"total_size": 99}, "weight_map": {k: n for n, part in shards.items() for k in part}}
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    (hub / "config.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": flat, "step": 3}, checkpoint_id=folder / "dcp")
    return [folder / n for n in ("zip.pt", "old.pth", "module.pt", "flat.safetensors", "hub", "dcp")]


# Damage --------------------------------------------------------------------------------------------------


def bytes_changed(data: bytes, dice: random.Random) -> bytes:
    """Bytes set, removed, doubled or cut off."""
    out = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(out) or 1)
        way = dice.randrange(5)
        if way < 2 and out:
            out[at] = dice.choice([0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)])
        elif way == 2:
            del out[at : at + dice.choice([1, 4, 64])]
        elif way == 3:
            out[at:at] = out[at : at + dice.choice([1, 8, 64])]
        elif dice.random() < 0.3:
            del out[at:]
    return bytes(out)


def legacy_changed(data: bytes, dice: random.Random) -> bytes:
    """One of the pickles torch's old serialisation begins with, changed: the content, mostly, or the storage keys."""
    stream, ends = io.BytesIO(data), [0]
    for _ in range(5):
        collections.deque(pickletools.genops(stream), maxlen=0)
        ends.append(stream.tell())
    part = dice.choice([0, 1, 2, 3, 3, 3, 3, 4, 4, 5])
    if part == 5:  # the lengths and bytes of the storages
        return data[: ends[5]] + bytes_changed(data[ends[5] :], dice)
    return data[: ends[part]] + pickle_changed(data[ends[part] : ends[part + 1]], dice) + data[ends[part + 1] :]


def pickle_changed(data: bytes, dice: random.Random) -> bytes:
    """Opcodes dropped, doubled, exchanged, or with another argument."""
    try:
        ops = list(pickletools.genops(data))
    except Exception:
        return bytes_changed(data, dice)
    starts = [at for _, _, at in ops if at is not None] + [len(data)]
    parts = [data[a:b] for a, b in itertools.pairwise(starts)]
    for _ in range(dice.randint(1, 3)):
        at = dice.randrange(len(parts))
        way = dice.randrange(5)
        if way == 0:
            del parts[at]
        elif way == 1:
            parts.insert(at, dice.choice(parts))
        elif way == 2:
            other = dice.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif way == 3:
            number = dice.choice([n for n in NUMBERS if type(n) is int])
            parts[at] = b"\x8a\x09" + (number & (2**72 - 1)).to_bytes(9, "little")
        else:
            parts[at] = dice.choice([b"}", b"]", b")", b"N", b"\x88", b"(", b"t", b"R", b"b", b"Q", b"s", b"u", b"0"])
    return b"".join(parts)


def archive_changed(data: bytes, dice: random.Random) -> bytes:
    """The pickle of an archive changed, or its records renamed, resized, doubled; checksums are right again."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # doubled names
        way = dice.randrange(6)
        entries = old.infolist()
        victim = dice.choice(entries)
        for entry in entries:
            name, content = entry.filename, old.read(entry)
            if way < 3 and name.endswith("data.pkl"):
                content = pickle_changed(content, dice)
            elif way >= 3 and entry is victim:
                if way == 3:
                    content = bytes_changed(content, dice)
                elif way == 4:
                    name = dice.choice(["../x", "/x", dice.choice(entries).filename, "a/../b", "archive/data/99", "é"])
                else:
                    new.writestr(name, content)
            kind = zipfile.ZIP_DEFLATED if way == 5 and dice.random() < 0.3 else zipfile.ZIP_STORED
            new.writestr(name, content, compress_type=kind)
    out = made.getvalue()
    if dice.random() < 0.3:  # fields of the directory at the end
        edge = out.rindex(b"PK\x05\x06")
        start = struct.unpack("<I", out[edge + 16 : edge + 20])[0]
        at = dice.randrange(start, len(out) - 4)
        number = dice.choice([0, 1, 2**31, 2**32 - 1, len(out), dice.randrange(2**32)])
        out = out[:at] + struct.pack("<I", number) + out[at + 4 :]
    return out


def table_changed(table: Any, dice: random.Random) -> Any:
    """One value somewhere in a JSON table replaced, removed or renamed."""
    at = table
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return table
        key = dice.choice(keys)
        deeper = isinstance(at[key], dict | list) and at[key]
        if deeper and dice.random() < 0.8:
            at = at[key]
            continue
        way = dice.randrange(4)
        if way == 0:
            del at[key]
        elif way == 1 and isinstance(at, dict):
            at[dice.choice(["", "__metadata__", "a.weight_v", "a.weight", "x\0", "\ud800"])] = at[key]
        else:
            at[key] = dice.choice(VALUES)
        return table


def header_changed(data: bytes, dice: random.Random) -> bytes:
    """The header of a safetensors file changed, its length right again."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(table_changed(json.loads(data[8 : 8 + size]), dice)).encode()
    if dice.random() < 0.1:
        header = header.replace(b'"shape"', b'"shape": [1], "shape"', 1)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def index_changed(data: bytes, dice: random.Random) -> bytes:
    return json.dumps(table_changed(json.loads(data), dice)).encode()


def damage(path: Path, dice: random.Random) -> None:
    """Change one file of a checkpoint."""
    if path.is_dir():
        path = dice.choice([p for p in sorted(path.iterdir()) if p.name != "config.json"])
    data = path.read_bytes()
    deep: Callable[[bytes, random.Random], bytes] = bytes_changed
    if path.name == ".metadata":
        deep = pickle_changed
    elif path.suffix == ".json":
        deep = index_changed
    elif path.suffix == ".safetensors":
        deep = header_changed
    elif data.startswith(b"PK") and path.suffix == ".pt":
        deep = archive_changed
    elif path.suffix == ".pth":
        deep = legacy_changed
    path.write_bytes((deep if dice.random() < 0.7 else bytes_changed)(data, dice))


# Trial ---------------------------------------------------------------------------------------------------


def trial(folder: Path, path: Path, dice: random.Random) -> str:
    """One damaged copy through one operation; what came of it."""
    mine = folder / "try"
    shutil.rmtree(mine, ignore_errors=True)
    mine.mkdir()
    source, output = mine / path.name, mine / f"out{path.suffix}"
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, source)
    damage(source, dice)
    operation = dice.choice(["fold", "fold", "convert", "inspect"])
    before = signal.signal(signal.SIGALRM, _tired)
    signal.alarm(PATIENCE)
    try:
        if operation == "inspect":
            inspect(source)
        else:
            {"fold": fold_checkpoint, "convert": convert_checkpoint}[operation](source, output)
        return "done"
    except WnsurgeryError as error:
        assert error.exit_code in (3, 4, 5, 7), error
        assert len(str(error).splitlines()) <= 2, str(error)  # a line and a hint
        assert [p.name for p in mine.iterdir()] == [source.name], sorted(mine.iterdir())
        return f"exit code {error.exit_code}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    """N trials over all kinds; prints what came of them, and every failure with its seed."""
    count, first = (int(a) for a in [*sys.argv[1:], *["10000", "0"][len(sys.argv) - 1 :]])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp())
    results: dict[str, Counter[str]] = {}
    started, failures = time.perf_counter(), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        kinds = samples(folder)
        for seed in range(first, first + count):
            path = kinds[seed % len(kinds)]
            try:
                came = trial(folder, path, random.Random(seed))
            except (Exception, SystemExit, KeyboardInterrupt):
                came = "FAILED"
                failures += 1
                print(f"seed {seed}, {path.name}:\n{traceback.format_exc()}", flush=True)
            results.setdefault(path.name, Counter())[came] += 1
    finally:
        shutil.rmtree(folder)
    for name, came in results.items():
        print(f"{name}: {', '.join(f'{n} {what}' for what, n in came.most_common())}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    seconds = time.perf_counter() - started
    print(f"{count} trials, {failures} failures, {seconds:.0f} s, peak memory grew by {grown:.0f} MB")
    sys.exit(bool(failures))


def _tired(*_: Any) -> None:
    raise TimeoutError(f"more than {PATIENCE} seconds")


if __name__ == "__main__":
    main()
