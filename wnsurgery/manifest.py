"""A manifest: every tensor of a written checkpoint with what was done to it and the SHA-256 of its bytes.

It is read back from the output, not from what was meant to be written, and holds no clock, host or path: the same
input, options and version give the same manifest wherever it is made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from wnsurgery.checkpoint import CheckpointReport
from wnsurgery.parts import plain_parts, structure_of
from wnsurgery.states import dtype_name, shape_of
from wnsurgery.stores.mapped import row_major

__all__ = ["manifest_text", "tensor_digest"]


def manifest_text(
    operation: str,
    version: str,
    report: CheckpointReport,
    tensors: Iterable[tuple[str, Tensor]],
    fetch: Callable[[Tensor], Tensor],
    files: Mapping[str, str] | None = None,
) -> bytes:
    """The manifest as JSON.

    Args:
        operation: "fold" or "convert".
        version: of this package.
        report: what was done.
        tensors: every tensor of the output under its dotted name.
        fetch: reads one of them.
        files: name -> SHA-256 of the files of an output directory.
    """
    made = {full: step for step in report.steps for full in step.made}
    table: dict[str, Any] = {"wnsurgery": version, "operation": operation}
    if files is not None:
        table["files"] = dict(sorted(files.items()))
    rows = []
    for name, tensor in tensors:
        step = made.get(name)
        row: dict[str, Any] = {"name": name, "action": step.action if step else "kept"}
        if step is not None:
            row["from"] = [step.full(key) for key in step.sources]
        shown = {"dtype": dtype_name(tensor), "shape": list(shape_of(tensor)), "sha256": tensor_digest(fetch(tensor))}
        rows.append({**row, **shown})
    table["tensors"] = sorted(rows, key=lambda row: row["name"])
    table["removed"] = sorted(
        {step.full(key) for step in report.steps for key in step.sources} - {row["name"] for row in rows}
    )
    table["warnings"] = list(report.warnings)
    return (json.dumps(table, indent=1, ensure_ascii=True) + "\n").encode()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order; of those of its parts where it is no plain one.

    >>> tensor_digest(torch.zeros(2, dtype=torch.uint8)) == hashlib.sha256(bytes(2)).hexdigest()
    True
    """
    if tensor.is_meta:
        return hashlib.sha256(str(tensor).encode()).hexdigest()
    if structure_of(tensor):
        digests = [f"{name} {tensor_digest(part)}" for name, part in plain_parts("", tensor).items()]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()
    flat = row_major(tensor.detach().cpu().resolve_conj().resolve_neg())
    data = memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b""  # type: ignore[arg-type]
    return hashlib.sha256(data).hexdigest()
