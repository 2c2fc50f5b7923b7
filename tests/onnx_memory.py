"""Memory that folding a large ONNX model with external weights takes; run by hand for the full size.

    python tests/onnx_memory.py FOLDER [ROWS LAYERS]

The default is ten float32 weights of 8192 x 8192, 2.5 GiB in all; FOLDER needs twice that. Prints the peak resident
memory of the process that folds beyond what its imports took, in MB, and fails beyond three times the largest weight
and 100 MB.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

_FOLD = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from wnsurgery import fold_onnx

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

imported = peak()
report = fold_onnx(sys.argv[1] + "/big.onnx", sys.argv[1] + "/folded.onnx", force=True)
print(len(report.found), peak(), imported)
"""


def make(folder: Path, rows: int, layers: int) -> None:
    """A chain of MatMuls by square weights under weight norm, with v in an external file."""
    generator = np.random.default_rng(0)
    nodes, tensors = [], []
    with (folder / "big.bin").open("wb") as file:
        for i in range(layers):
            tensor = onnx.TensorProto(name=f"{i}.weight_v", data_type=1, dims=(rows, rows), data_location=1)
            for key, value in {"location": "big.bin", "offset": file.tell(), "length": 4 * rows * rows}.items():
                tensor.external_data.add(key=key, value=str(value))
            for _ in range(rows):
                file.write(generator.standard_normal(rows, dtype=np.float32).tobytes())
            g = numpy_helper.from_array(generator.random((rows, 1), dtype=np.float32), f"{i}.weight_g")
            tensors += [tensor, g]
            nodes += [
                helper.make_node("ReduceL2", [f"{i}.weight_v"], [f"n{i}"], axes=[1], keepdims=1),
                helper.make_node("Div", [f"{i}.weight_v", f"n{i}"], [f"d{i}"]),
                helper.make_node("Mul", [f"{i}.weight_g", f"d{i}"], [f"w{i}"]),
                helper.make_node("MatMul", [f"h{i}" if i else "x", f"w{i}"], [f"h{i + 1}"]),
            ]
    ends = [helper.make_tensor_value_info(name, 1, [1, rows]) for name in ("x", f"h{layers}")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    (folder / "big.onnx").write_bytes(model.SerializeToString())


def fold(folder: Path) -> tuple[int, int]:
    """Weights folded, and the peak memory in bytes of the process that did it, beyond what its imports took."""
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", _FOLD, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    found, peak, imported = map(int, done.stdout.split())
    return found, (peak - imported) * 1024


def main() -> None:
    folder = Path(sys.argv[1])
    rows, layers = map(int, sys.argv[2:] or (8192, 10))
    make(folder, rows, layers)
    found, peak = fold(folder)
    bound = 3 * 4 * rows * rows + 100_000_000
    print(f"{found} weights folded, peak beyond imports {peak / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB")
    sys.exit(found != layers or peak > bound)


if __name__ == "__main__":
    main()
