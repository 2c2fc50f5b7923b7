"""The callbacks of examples/ for Lightning and transformers: converted while they train, plain before and after."""

from __future__ import annotations

import copy
import importlib
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import wnsurgery as wn

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")  # the frameworks' own


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the nets are tiny
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield
    torch.set_num_threads(threads)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Lightning -----------------------------------------------------------------------------------------------


@pytest.fixture
def lightning() -> Any:
    pytest.importorskip("pytorch_lightning")
    return importlib.import_module("lightning_callback")


class _StopError(RuntimeError):
    pass


def fit(module: Any, model: Any, folder: Path, epochs: int, *callbacks: Any, **options: Any) -> Any:
    pl = module.pl
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    keep = pl.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[*callbacks, keep], limit_train_batches=5, **quiet)
    data = torch.utils.data.DataLoader(module.digits()[0].dataset, 64)  # the same order in each run
    trainer.fit(model, data, **options)
    return trainer


def test_lightning(lightning: Any, tmp_path: Path) -> None:
    """Converted during fit only; the checkpoint's fold and what the trainer saves are the plain net, bit for bit."""
    forms = []

    class Spy(lightning.pl.Callback):  # type: ignore[misc,name-defined]
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            forms.append(wn.is_weight_normed(pl_module) and held == {id(p) for p in pl_module.parameters()})

    torch.manual_seed(0)
    model = lightning.Digits()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = fit(lightning, model, tmp_path, 2, lightning.WeightNormCallback(), Spy())
    assert forms == [True] * 10
    assert not wn.is_weight_normed(model)
    assert model.state_dict().keys() == before.keys()
    assert not same(model.state_dict(), before)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    wn.fold_checkpoint(tmp_path / "epoch=1.ckpt", tmp_path / "folded.ckpt")
    for name in ("end.ckpt", "folded.ckpt"):
        assert same(torch.load(tmp_path / name, weights_only=True)["state_dict"], model.state_dict()), name


def test_lightning_resumes(lightning: Any, tmp_path: Path) -> None:
    """A run that goes on from a checkpoint ends where an uninterrupted one does; other stages take checkpoints, too."""
    torch.manual_seed(0)
    whole, resumed = lightning.Digits(), lightning.Digits()
    fit(lightning, whole, tmp_path, 3, lightning.WeightNormCallback())
    checkpoint = tmp_path / "epoch=0.ckpt"
    trainer = fit(lightning, resumed, tmp_path, 3, lightning.WeightNormCallback(), ckpt_path=checkpoint)
    assert same(resumed.state_dict(), whole.state_dict())
    trainer.test(resumed, lightning.digits()[1], ckpt_path=checkpoint, verbose=False)
    assert not wn.is_weight_normed(resumed)
    wn.fold_checkpoint(checkpoint, tmp_path / "first.ckpt")
    assert same(torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"], resumed.state_dict())


def test_lightning_renormalises(lightning: Any, tmp_path: Path) -> None:
    """Every second epoch the norm of v is back near |g|, which without it grows away; the last state is no other."""
    ratios = []

    class Spy(lightning.pl.Callback):  # type: ignore[misc,name-defined]
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pair = pl_module.net[5].parametrizations.weight
            ratios.append(float((pair.original1.norm(dim=1) / pair.original0[:, 0].abs()).max()))

    callback = lightning.WeightNormCallback(renormalize_every=2, include="net.5")
    torch.manual_seed(0)
    model = lightning.Digits()
    with torch.no_grad():
        model.net[5].weight.mul_(0.01)  # long steps for its size
    fit(lightning, model, tmp_path, 4, callback, Spy())
    assert max(ratios[0], ratios[2]) < 1.5 < min(ratios[1], ratios[3])


def test_lightning_after_an_error(lightning: Any, tmp_path: Path) -> None:
    """Training that raises leaves a net that the next fit takes up and ends plain."""

    class Broken(lightning.pl.Callback):  # type: ignore[misc,name-defined]
        def on_train_batch_end(self, *_: Any) -> None:
            raise _StopError

    model = lightning.Digits()
    with pytest.raises(_StopError):
        fit(lightning, model, tmp_path, 1, lightning.WeightNormCallback(), Broken())
    fit(lightning, model, tmp_path, 1, lightning.WeightNormCallback())
    assert not wn.is_weight_normed(model)


def test_lightning_example(
    lightning: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The script says that the net is plain and the checkpoint folds to it, and has nothing to warn of."""
    lightning.main()
    assert [record for record in caplog.records if record.name == "wnsurgery"] == []
    said = capsys.readouterr().out
    assert "the net is plain" in said
    assert "3 weights of the checkpoint folded, equal to the net's to the bit: True" in said


# transformers --------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return importlib.import_module("transformers_callback")


def gpt2(hub: Any) -> Any:
    torch.manual_seed(0)
    config = hub.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return hub.GPT2LMHeadModel(config)


def trainer_for(hub: Any, model: Any, folder: Path, *callbacks: Any, **options: Any) -> Any:
    arguments = hub.TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=8, save_steps=2, report_to=[], disable_tqdm=True,
        use_cpu=True, logging_strategy="no", learning_rate=1e-2,
    )  # fmt: skip
    return hub.Trainer(model, arguments, train_dataset=hub.Counting(), callbacks=list(callbacks), **options)


def test_trainer(hub: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Converted from the Trainer's start to its end; checkpoints hold g and v once and fold to what is loaded plain."""
    model = gpt2(hub)
    trainer = trainer_for(hub, model, tmp_path, hub.WeightNormCallback(renormalize_every=3))
    assert wn.is_weight_normed(model)
    trainer.train()
    assert not wn.is_weight_normed(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    trainer.save_model(str(tmp_path / "end"))
    wn.fold_checkpoint(tmp_path / "checkpoint-6", tmp_path / "plain")
    ids = torch.arange(16)[None]
    caplog.clear()
    hub.transformers.utils.logging.enable_propagation()
    try:
        for name in ("end", "plain"):
            with caplog.at_level(logging.WARNING):
                loaded, info = hub.GPT2LMHeadModel.from_pretrained(tmp_path / name, output_loading_info=True)
            assert not caplog.records
            assert not any(info.values()), info
            assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    finally:
        hub.transformers.utils.logging.disable_propagation()


def test_trainer_resumes(hub: Any, tmp_path: Path) -> None:
    """A run that goes on from a checkpoint ends where an uninterrupted one does."""
    whole, resumed = gpt2(hub), gpt2(hub)
    trainer_for(hub, whole, tmp_path, hub.WeightNormCallback()).train()
    trainer_for(hub, resumed, tmp_path, hub.WeightNormCallback()).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    assert same(resumed.state_dict(), whole.state_dict())


def test_trainer_with_groups(hub: Any, tmp_path: Path) -> None:
    """With groups handed over, as the docstring says, decay spares v and g, and the callback changes nothing more."""
    model = wn.apply_weight_norm(gpt2(hub))
    groups = wn.weight_norm_param_groups(model, lr=0.0, weight_decay=0.5)
    trainer = trainer_for(hub, model, tmp_path, hub.WeightNormCallback(), optimizers=(torch.optim.AdamW(groups), None))
    before = {name: tensor.clone() for name, tensor in gpt2(hub).state_dict().items()}
    trainer.train()
    assert same(model.state_dict(), before)


def test_transformers_example(hub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The script says that the model is plain and the folded directory loads to the bit."""
    hub.main()
    said = capsys.readouterr().out
    assert "the model is plain" in said
    assert "folded, the loaded model's output equal to the bit: True" in said


# Lists of tied parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["parametrized", "deferred"])
def test_accelerate_offloads(mode: Any) -> None:
    """Weights that accelerate fetches for each pass, and takes away after it, give the output there was."""
    accelerate = pytest.importorskip("accelerate")
    model: Any = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Conv1d(2, 2, 3)).eval()
    x = torch.randn(1, 2, 8)
    with torch.no_grad():
        expected = model(x)
        wn.apply_weight_norm(model, mode=mode)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(model(x), expected) and torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama", "bart"])
def test_tied_names_follow(name: str, tmp_path: Path) -> None:
    """A converted model with tied weights can be saved and tied again; folding leaves its lists as they were."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    bart = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 40}
    options, kind = {
        "gpt2": ({"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40}, "GPT2LMHeadModel"),
        "bert": ({**small, "vocab_size": 40}, "BertForMaskedLM"),
        "llama": ({**small, "vocab_size": 40, "tie_word_embeddings": True}, "LlamaForCausalLM"),
        "t5": (t5, "T5ForConditionalGeneration"),
        "bart": ({**bart, **heads}, "BartForConditionalGeneration"),
    }[name]
    kind = getattr(transformers, kind)
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    model = kind(kind.config_class(**options, **special))
    before = [(m.__dict__.get("_tied_weights_keys"), m.__dict__.get("all_tied_weights_keys")) for m in model.modules()]
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wn.apply_weight_norm(model, include="*")
    names = {id(p): n for n, p in model.named_parameters()}
    model.tie_weights()
    assert {id(p): n for n, p in model.named_parameters()} == names
    model.save_pretrained(tmp_path / "converted")
    wn.fold_checkpoint(tmp_path / "converted", tmp_path / "plain")
    loaded = kind.from_pretrained(tmp_path / "plain")
    assert same(loaded.state_dict(), plain)
    wn.fold_weight_norm(model)
    after = [(m.__dict__.get("_tied_weights_keys"), m.__dict__.get("all_tied_weights_keys")) for m in model.modules()]
    assert after == before
    assert same(model.state_dict(), plain)


@pytest.mark.parametrize("way", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_resizing_converted_embeddings(way: Any) -> None:
    """Refused before anything has changed, in copies too; a size that stays and a folded model are as they were."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, bos_token_id=0, eos_token_id=0)
    original = wn.apply_weight_norm(transformers.GPT2LMHeadModel(config).eval())
    model, ids = way(original), torch.tensor([[1, 2]])
    state, logits = {k: t.clone() for k, t in model.state_dict().items()}, model(ids).logits
    for options in ({"new_num_tokens": 60}, {"pad_to_multiple_of": 16}, {"new_num_tokens": 30}):
        for part in (model, model.transformer):
            with pytest.raises(wn.SelectionError, match="cannot be resized from 40"):
                part.resize_token_embeddings(**options)
    assert model.config.vocab_size == model.transformer.wte.num_embeddings == 40
    assert same(model.state_dict(), state)
    assert torch.equal(model(ids).logits, logits)
    for options in ({}, {"new_num_tokens": 40}, {"pad_to_multiple_of": 8}):
        assert model.resize_token_embeddings(**options) is model.transformer.wte
    fresh = set(vars(transformers.GPT2LMHeadModel(config)))
    assert set(vars(wn.fold_weight_norm(model))) - fresh == {"vocab_size"}  # resizing sets that
    model.resize_token_embeddings(60, mean_resizing=False)
    assert wn.apply_weight_norm(model)(ids).logits.shape == (1, 2, 60)
