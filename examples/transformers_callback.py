"""Weight norm for transformers: a callback for its Trainer, and a folded directory that `from_pretrained` takes.

    python examples/transformers_callback.py

Trains a tiny GPT-2 (random weights, nothing downloaded) with it and loads what is left at the end. Needs
`pip install transformers accelerate`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import wnsurgery as wn


class WeightNormCallback(TrainerCallback):
    """Converts the model as soon as the Trainer has it, which makes its optimizer later; folds when training ends.

    Checkpoints written during training hold g and v: `train(resume_from_checkpoint=...)` goes on from them, and
    `wnsurgery fold checkpoint-500` makes a plain directory of one. After `train()` the model, and so
    `trainer.save_model()`, is plain.

    The Trainer decays all that is no bias and no layer norm: v, where decay only raises the effective step, and g. With
    `weight_decay` set, convert before and hand over the groups, which leave both alone:
    `Trainer(..., optimizers=(torch.optim.AdamW(wn.weight_norm_param_groups(model, lr=..., weight_decay=...)), None))`.

    Args:
        renormalize_every: optimizer steps after which `wn.renormalize_` brings every ||v|| back to |g|; no bit of
            a weight changes, the effective step of v becomes what it was at the start. 0: never.
        options: of `wn.apply_weight_norm`: include, exclude, dim, freeze_magnitude, ...
    """

    def __init__(self, renormalize_every: int = 0, **options: Any) -> None:
        self.renormalize_every, self.options = renormalize_every, options

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        model: nn.Module | None = None, optimizer: Any = None, **others: Any,
    ) -> None:  # fmt: skip
        if model is not None:  # None with `model_init`: then let that function convert
            wn.apply_weight_norm(model, optimizer=optimizer, **self.options)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        model: nn.Module | None = None, optimizer: Any = None, **others: Any,
    ) -> None:  # fmt: skip
        if self.renormalize_every and state.global_step % self.renormalize_every == 0:
            wn.renormalize_(bare(model), optimizer=bare(optimizer))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        model: nn.Module | None = None, **others: Any,
    ) -> None:  # fmt: skip
        wn.fold_weight_norm(bare(model))


def bare(wrapped: Any) -> Any:
    """What accelerate and DistributedDataParallel have wrapped."""
    for name in ("module", "optimizer"):
        while hasattr(wrapped, name):
            wrapped = getattr(wrapped, name)
    return wrapped


class Counting(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sequences that count upwards modulo 50, from anywhere."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (index + torch.arange(16)) % 50
        return {"input_ids": ids, "labels": ids}


def main() -> None:
    transformers.set_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    model = GPT2LMHeadModel(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=8, per_device_train_batch_size=16, learning_rate=1e-2, save_strategy="epoch",
            report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=Counting(), callbacks=[WeightNormCallback(renormalize_every=50)]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        last = max(Path(folder).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        report = wn.fold_checkpoint(last, Path(folder) / "plain")
        loaded = GPT2LMHeadModel.from_pretrained(Path(folder) / "plain")
        ids = torch.arange(16)[None]
        with torch.no_grad():
            same = torch.equal(loaded(ids).logits, model.cpu().eval()(ids).logits)
            loss = float(loaded(ids, labels=ids).loss)
        print(f"loss {loss:.3f}; the model is {'converted' if wn.is_weight_normed(model) else 'plain'}")
        print(f"{len(report.folded)} weights of {last.name} folded, the loaded model's output equal to the bit: {same}")


if __name__ == "__main__":
    main()
