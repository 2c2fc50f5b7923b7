"""Fold a sparse safetensors file and a .pt file of many gigabytes, and show peak memory and throughput. Run by hand.

    python tests/large_files.py DIRECTORY [GB_SAFETENSORS] [GB_PT]

Each job runs in a process of its own. "above import" is the peak resident set less what importing costs; the bound is
three times the largest tensor plus 300 MB. The load-all script and `cp` run on the same input right after.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FOLD = """
import resource, sys, time, torch, numpy
torch.set_num_threads(1)
from wnsurgery.files import fold_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
base, start = peak(), time.perf_counter()
report = fold_checkpoint(sys.argv[1], sys.argv[2], force=True)
print(f"{peak() - base:.0f} MB above import, {time.perf_counter() - start:.1f} s, {len(report.folded)} folded")
"""
LOAD_ALL = """
import os, resource, sys, time, torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
base, start = peak(), time.perf_counter()
tensors = (load_file if sys.argv[1].endswith("s") else torch.load)(sys.argv[1])
for key in [k for k in tensors if k.endswith("_g")]:
    g, v = tensors.pop(key), tensors.pop(key[:-1] + "v")
    tensors[key[:-2]] = torch._weight_norm(v, g, 0)
(save_file if sys.argv[1].endswith("s") else torch.save)(tensors, sys.argv[2])
os.fsync(os.open(sys.argv[2], os.O_RDWR))
print(f"{peak() - base:.0f} MB above import, {time.perf_counter() - start:.1f} s")
"""
COPY = """
import os, shutil, sys, time
start = time.perf_counter()
shutil.copyfile(sys.argv[1], sys.argv[2])
os.fsync(os.open(sys.argv[2], os.O_RDWR))
print(f"{time.perf_counter() - start:.1f} s")
"""
MAKE_PT = """
import sys, torch
torch.save({f"l{i}.weight_{h}": torch.rand(4096, 1 if h == "g" else 8192) for i in range(int(sys.argv[2])) for h in "gv"}, sys.argv[1])
"""  # noqa: E501
ROWS, COLUMNS = 8192, 32768  # 1 GiB of float32


def sparse(path: Path, gigabytes: int) -> None:
    """A safetensors file of pairs that are all zeros and take no room on the disk."""
    table, position = {}, 0
    for index in range(gigabytes):
        for half, shape in (("g", [ROWS, 1]), ("v", [ROWS, COLUMNS])):
            size = 4 * shape[0] * shape[1]
            offsets = [position, position + size]
            table[f"l{index}.weight_{half}"] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
            position += size
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + position)


def show(what: str, code: str, *arguments: object) -> None:
    """Run a job and print what it says."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    print(f"{what}: {subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()}", flush=True)


def main() -> None:
    """Make both inputs, fold each, compare."""
    folder = Path(sys.argv[1])
    sizes = [int(a) for a in sys.argv[2:]] or [20, 4]
    source, out = folder / "large.safetensors", folder / "out.safetensors"
    sparse(source, sizes[0])
    print(f"sparse .safetensors, {sizes[0]} GiB, largest tensor 1074 MB, bound {3 * 1074 + 300} MB")
    show("  fold", FOLD, source, out)
    out.unlink()
    source.unlink()
    source, out = folder / "large.pt", folder / "out.pt"
    subprocess.run([sys.executable, "-c", MAKE_PT, source, str(sizes[1] * 8)], check=True)
    print(f".pt, {source.stat().st_size / 1e9:.1f} GB, largest tensor 134 MB, bound {3 * 134 + 300} MB")
    for what, code in (("  fold", FOLD), ("  cp", COPY), ("  load all", LOAD_ALL)):
        show(what, code, source, out)
        out.unlink()
    source.unlink()


if __name__ == "__main__":
    main()
