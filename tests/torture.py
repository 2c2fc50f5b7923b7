"""Kill the writer at random moments, many times, and look for torn outputs. Run by hand: python tests/torture.py [N]

A file and a directory are folded over an old output again and again; each run is ended by SIGKILL, SIGTERM or SIGINT
after a random time. Afterwards the output must be the old one or the new one, whole, and SIGTERM and SIGINT must
leave nothing beside it.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch

WORK = """
import sys, torch
torch.set_num_threads(1)
from wnsurgery.files import fold_checkpoint
from wnsurgery.cli import main
print("ready", flush=True)
main(["fold", sys.argv[1], "-o", sys.argv[2], "--force"])
"""


def digest(path: Path) -> str:
    """One hash for a file or a whole directory."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            total.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return total.hexdigest()


def make(folder: Path) -> None:
    """A file and a sharded directory of about 60 MB each."""
    torch.manual_seed(0)
    names = [f"l{i}" for i in range(12)]
    tensors = {f"{n}.weight_{h}": torch.rand(512, 1 if h == "g" else 2400) for n in names for h in "gv"}
    safetensors.torch.save_file(tensors, folder / "in.safetensors")
    (folder / "in").mkdir()
    keys = sorted(tensors)
    for part in range(3):
        name = f"model-0000{part + 1}-of-00003.safetensors"
        safetensors.torch.save_file({k: tensors[k] for k in keys[part::3]}, folder / "in" / name)


def old_output(path: Path) -> None:
    """Put an old output in place of whatever is there."""
    if path.suffix:
        safetensors.torch.save_file({"old": torch.ones(1000)}, path)
        return
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    safetensors.torch.save_file({"old": torch.ones(1000)}, path / "model.safetensors")


def strike(folder: Path, source: str, output: str, pause: float | None) -> str:
    """One run, ended `pause` seconds after it began to work (None: left alone); returns the signal's name."""
    command = [sys.executable, "-c", WORK, folder / source, folder / output]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdout is not None
        run.stdout.readline()
        which = random.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        if pause is not None:
            time.sleep(pause)
            run.send_signal(which)
        run.stdout.read()
    return which.name


def main() -> None:
    """Strike N times at each kind of output and count what came of it."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    folder = Path(tempfile.mkdtemp(dir="."))
    random.seed(0)
    torn = litter = 0
    try:
        make(folder)
        expected = {p.name for p in folder.iterdir()} | {"out", "out.safetensors"}
        for source, output in (("in.safetensors", "out.safetensors"), ("in", "out")):
            old_output(folder / output)
            old = digest(folder / output)
            started = time.perf_counter()
            strike(folder, source, output, None)
            longest, new = time.perf_counter() - started, digest(folder / output)
            finished = 0
            for _ in range(count):
                old_output(folder / output)
                which = strike(folder, source, output, random.uniform(0, 0.25 * longest))
                now = digest(folder / output)
                finished += now == new
                torn += now not in (old, new)
                beside = {p.name for p in folder.iterdir()} - expected
                litter += bool(beside) and which != "SIGKILL"
                for name in beside:
                    left = folder / name
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            print(f"{output}: {count} runs ended, {finished} saw the new output, {torn} torn, {litter} with litter")
    finally:
        shutil.rmtree(folder)
    sys.exit(bool(torn or litter))


if __name__ == "__main__":
    main()
