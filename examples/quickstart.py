"""From a plain model file to onnxruntime through weight norm, on scikit-learn's handwritten digits.

    python examples/quickstart.py

Saves a small convolutional net, converts it, initialises it from data, trains it, folds it, exports it and runs
it in onnxruntime; prints what was kept and what was reached. Half a minute on two cores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import wnsurgery as wn
from wnsurgery.graph import find_weight_norms

EPOCHS, BATCH = 10, 128


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,797 images of 8x8 pixels: the last 360 are kept for testing."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16 - 0.5
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:-360], order[-360:]
    return images[train], labels[train], images[test], labels[test]


def plain_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def weights(model: nn.Module) -> list[Tensor]:
    """The weights the forward pass uses, converted or not."""
    return [m.weight.detach().clone() for m in model if hasattr(m, "weight")]


def elements_changed(before: list[Tensor], after: list[Tensor]) -> str:
    changed = sum(int((a.view(torch.int32) != b.view(torch.int32)).sum()) for a, b in zip(before, after, strict=True))
    return f"{changed} of {sum(w.numel() for w in before):,}"


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in track(range(EPOCHS), description="training"):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def accuracy(logits: Tensor, labels: Tensor) -> str:
    return f"{(logits.argmax(1) == labels).float().mean().item():.1%}"


def main() -> None:
    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    table = Table("step", "measured", "value", title="weight norm, there and back")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(plain_net(), Path(folder, "model.pt"))
        model = wn.load_model(Path(folder, "model.pt"))

        before = weights(model)
        wn.apply_weight_norm(model)
        table.add_row("convert", "weight elements changed", elements_changed(before, weights(model)))

        report = wn.data_dependent_init(model, images[:500])
        table.add_row("initialise", "layers set from 500 images", str(len(report.initialised)))

        train(model, images, labels)
        with torch.no_grad():
            table.add_row("train", "test accuracy", accuracy(model(test_images), test_labels))

        before = weights(model)
        wn.fold_weight_norm(model)
        table.add_row("fold", "weight elements changed", elements_changed(before, weights(model)))

        onnx = Path(folder, "model.onnx")
        wn.export_onnx(model, test_images, onnx)
        table.add_row("export", "weight-norm nodes left", str(len(find_weight_norms(onnx))))

        (logits,) = wn.run_onnx(onnx, [test_images.numpy()]).values()
        with torch.no_grad():
            difference = (torch.from_numpy(logits) - model(test_images)).abs().max().item()
        table.add_row("run", "onnxruntime test accuracy", accuracy(torch.from_numpy(logits), test_labels))
        table.add_row("run", "largest difference to torch", f"{difference:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
