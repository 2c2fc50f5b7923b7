"""Real architectures: a file of each folds to the bits of its folded module and loads into the plain model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from wnsurgery.files import fold_checkpoint
from wnsurgery.surgery import fold_weight_norm, is_weight_normed

transformers = pytest.importorskip("transformers")

_WAVE = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": (8, 8),
    "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2, "vocab_size": 8,
}  # fmt: skip
_VOCODER = {
    "model_in_dim": 8, "upsample_initial_channel": 16, "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4],
    "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]],
}  # fmt: skip


def wav2vec2() -> nn.Module:
    return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**_WAVE))


def hubert() -> nn.Module:
    return transformers.HubertModel(transformers.HubertConfig(**_WAVE))


def encodec() -> nn.Module:
    config = transformers.EncodecConfig(num_filters=4, hidden_size=8, codebook_size=8, upsampling_ratios=[2, 2])
    return transformers.EncodecModel(config)


def dac() -> nn.Module:
    config = transformers.DacConfig(
        encoder_hidden_size=4, downsampling_ratios=[2, 2], decoder_hidden_size=16, n_codebooks=2, codebook_size=8,
        codebook_dim=4, hidden_size=16,
    )  # fmt: skip
    model = transformers.DacModel(config)
    model.apply_weight_norm()
    return model


def vits() -> nn.Module:
    config = transformers.VitsConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, flow_size=16,
        spectrogram_bins=9, upsample_initial_channel=16, upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]], prior_encoder_num_flows=1,
        prior_encoder_num_wavenet_layers=2, posterior_encoder_num_wavenet_layers=2, duration_predictor_num_flows=1,
    )  # fmt: skip
    model = transformers.VitsModel(config)
    model.decoder.apply_weight_norm()
    return model


def hifigan() -> nn.Module:
    model = transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig(**_VOCODER))
    model.apply_weight_norm()
    return model


def univnet() -> nn.Module:
    config = transformers.UnivNetConfig(
        model_in_channels=4, model_hidden_channels=4, num_mel_bins=6, resblock_kernel_sizes=[3],
        resblock_stride_sizes=[2],
        resblock_dilation_sizes=[[1, 3]], kernel_predictor_num_blocks=1, kernel_predictor_hidden_channels=4,
        kernel_predictor_conv_size=3,
    )  # fmt: skip
    model = transformers.UnivNetModel(config)
    model.apply_weight_norm()
    return model


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("build", [wav2vec2, hubert, encodec, dac, vits, hifigan, univnet], ids=lambda b: b.__name__)
def test_the_file_folds_to_the_bits_of_the_module(tmp_path: Path, build: Callable[[], nn.Module], suffix: str) -> None:
    """Folding the file equals folding the module bit for bit, and the result loads strictly into the plain model."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers still uses torch's deprecated hook in places
        model = build()
        assert is_weight_normed(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0 + 0.3 * torch.rand(()))
        state: dict[str, Any] = {k: v.clone() for k, v in model.state_dict().items()}
    (torch.save if suffix == ".pt" else safetensors.torch.save_file)(state, tmp_path / f"a{suffix}")
    report = fold_checkpoint(tmp_path / f"a{suffix}", tmp_path / f"b{suffix}")
    plain = fold_weight_norm(model)
    load = torch.load if suffix == ".pt" else safetensors.torch.load_file
    tensors = load(tmp_path / f"b{suffix}")
    expected = {k: v.clone() for k, v in plain.state_dict().items()}
    assert report.folded
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[k], expected[k]) for k in expected)
    for parameter in plain.parameters():
        parameter.data.zero_()
    plain.load_state_dict(tensors, strict=True)
    assert all(torch.equal(v, expected[k]) for k, v in plain.state_dict().items())
