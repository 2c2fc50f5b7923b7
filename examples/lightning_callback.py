"""Weight norm for Lightning: a callback that has the net under weight norm while a Trainer runs, and plain otherwise.

    python examples/lightning_callback.py

Trains a classifier of scikit-learn's handwritten digits with it and prints what is left at the end: a plain net. Needs
`pip install pytorch-lightning scikit-learn`.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import wnsurgery as wn


class WeightNormCallback(pl.Callback):
    """Converts before the optimizers are made and checkpoints are restored; folds when the Trainer is done.

    Checkpoints written during training hold g and v: `fit(ckpt_path=...)` resumes from them, `test(ckpt_path=...)`
    takes them too, and `wnsurgery fold last.ckpt` makes plain ones. Once fit() has returned, the net and
    `trainer.save_checkpoint` are plain.

    Args:
        renormalize_every: epochs after which `wn.renormalize_` brings every ||v|| back to |g|; no bit of a weight
            changes, the effective step of v becomes what it was at the start. 0: never.
        options: of `wn.apply_weight_norm`: include, exclude, dim, freeze_magnitude, ...
    """

    def __init__(self, renormalize_every: int = 0, **options: Any) -> None:
        self.renormalize_every, self.options = renormalize_every, options

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        wn.apply_weight_norm(pl_module, **self.options)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.renormalize_every and (trainer.current_epoch + 1) % self.renormalize_every == 0:
            wn.renormalize_(pl_module, optimizer=trainer.optimizers)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        optimizers = trainer.optimizers if stage == "fit" else None  # other stages have made none for their g and v
        wn.fold_weight_norm(pl_module, optimizer=optimizers or None)


class Digits(pl.LightningModule):
    """A small convolutional classifier, written as any other: it knows nothing of weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(144, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = wn.weight_norm_param_groups(self, lr=3e-3, weight_decay=1e-2)  # none on v, biases and magnitudes
        return torch.optim.AdamW(groups)


def digits() -> tuple[DataLoader[Any], DataLoader[Any]]:
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    train, test = TensorDataset(images[:-360], labels[:-360]), TensorDataset(images[-360:], labels[-360:])
    return DataLoader(train, 64, shuffle=True), DataLoader(test, 360)


def main() -> None:
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    pl.seed_everything(0)
    model, (train, test) = Digits(), digits()
    with tempfile.TemporaryDirectory() as folder:
        keep = pl.callbacks.ModelCheckpoint(folder, filename="last")
        trainer = pl.Trainer(
            max_epochs=5, callbacks=[WeightNormCallback(renormalize_every=2), keep], accelerator="cpu", logger=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, train)
        (result,) = trainer.test(model, test, verbose=False)
        form = "converted" if wn.is_weight_normed(model) else "plain"
        print(f"test accuracy {result['accuracy']:.3f}; the net is {form}")
        report = wn.fold_checkpoint(Path(folder) / "last.ckpt", Path(folder) / "plain.ckpt")
        state = torch.load(Path(folder) / "plain.ckpt", weights_only=True)["state_dict"]
        same = all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        print(f"{len(report.folded)} weights of the checkpoint folded, equal to the net's to the bit: {same}")


if __name__ == "__main__":
    main()
