"""Families of the transformers library as tiny nets with random weights; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES"]

Inputs = Mapping[str, Tensor]
Made = Callable[[], tuple[nn.Module, Inputs]]


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 30, shape, generator=torch.Generator().manual_seed(3))


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def _make(model: str, config: str, options: Mapping[str, Any], inputs: Inputs, norm: str | None = None) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()  # tiny vocabularies do not hold the usual end token, and so on
    settings = getattr(transformers, config)(**options)
    net: Any = getattr(transformers, model)(settings)
    if hasattr(net.config, "use_cache"):
        net.config.use_cache = False  # one pass over one sequence
    if norm is not None:  # families that put their own weight norm on only when asked
        (net.get_submodule(norm) if norm else net).apply_weight_norm()
    return net, dict(inputs)


def _clip(inputs: Inputs) -> Any:
    import transformers

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 32, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}
    vision = {**small, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return transformers.CLIPModel(config), dict(inputs)


_TEXT = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip
_DECODER = {**_TEXT, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MOE = {**_DECODER, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_WAVE = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "conv_dim": (8, 8),
    "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2, "vocab_size": 8, "layerdrop": 0.0, "mask_time_prob": 0.0,
}  # fmt: skip
_SEW = {**_WAVE, "conv_dim": (8, 8), "squeeze_factor": 2}
_VOCODER = {
    "upsample_initial_channel": 16, "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4],
    "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]],
}  # fmt: skip
_DAC = {
    "encoder_hidden_size": 4, "downsampling_ratios": [2, 2], "decoder_hidden_size": 16, "n_codebooks": 2,
    "codebook_size": 8, "codebook_dim": 4, "hidden_size": 16,
}  # fmt: skip
_VITS = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16,
    "flow_size": 16, "spectrogram_bins": 9, "prior_encoder_num_flows": 1, "prior_encoder_num_wavenet_layers": 2,
    "posterior_encoder_num_wavenet_layers": 2, "duration_predictor_num_flows": 1, **_VOCODER,
}  # fmt: skip
_UNIVNET = {
    "model_in_channels": 4, "model_hidden_channels": 4, "num_mel_bins": 6, "resblock_kernel_sizes": [3],
    "resblock_stride_sizes": [2], "resblock_dilation_sizes": [[1, 3]], "kernel_predictor_num_blocks": 1,
    "kernel_predictor_hidden_channels": 4, "kernel_predictor_conv_size": 3,
}  # fmt: skip
_MIMI = {
    "num_filters": 4, "hidden_size": 16, "codebook_size": 8, "codebook_dim": 8, "vector_quantization_hidden_dimension":
    8, "upsampling_ratios": [2, 2], "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 16, "num_quantizers": 2, "num_semantic_quantizers": 1, "upsample_groups": 16,
}  # fmt: skip
_T5 = {
    "vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip
_BART = {
    "vocab_size": 32, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32,
}  # fmt: skip
_WHISPER = {
    **_BART, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_GPT2 = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
_SERIES = {
    "context_length": 16, "patch_length": 4, "patch_stride": 4, "num_input_channels": 2, "d_model": 16,
    "num_attention_heads": 2, "num_hidden_layers": 1, "ffn_dim": 16, "prediction_length": 4,
}  # fmt: skip

_IDS, _TWO = {"input_ids": ids(2, 7)}, {"input_ids": ids(2, 7), "decoder_input_ids": ids(2, 5)}
_SOUND, _CODEC = {"input_values": floats(2, 160)}, {"input_values": floats(2, 1, 64)}
_PIXELS, _LARGE = {"pixel_values": floats(2, 3, 16, 16)}, {"pixel_values": floats(2, 3, 32, 32)}

# name -> (model, config, options, inputs[, submodule whose own weight norm is put on])
_ROWS: dict[str, tuple[Any, ...]] = {
    "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config", _WAVE, _SOUND),
    "hubert": ("HubertModel", "HubertConfig", _WAVE, _SOUND),
    "wavlm": ("WavLMModel", "WavLMConfig", {**_WAVE, "num_buckets": 8, "max_bucket_distance": 16}, _SOUND),
    "unispeech-sat": ("UniSpeechSatModel", "UniSpeechSatConfig", _WAVE, _SOUND),
    "data2vec-audio": ("Data2VecAudioModel", "Data2VecAudioConfig", {**_WAVE, "num_conv_pos_embeddings": 2}, _SOUND),
    "sew": ("SEWModel", "SEWConfig", _SEW, _SOUND),
    "sew-d": ("SEWDModel", "SEWDConfig", {**_SEW, "position_buckets": 8, "max_position_embeddings": 16}, _SOUND),
    "encodec": (
        "EncodecModel", "EncodecConfig",
        {"num_filters": 4, "hidden_size": 8, "codebook_size": 8, "upsampling_ratios": [2, 2]}, _CODEC,
    ),
    "dac": ("DacModel", "DacConfig", _DAC, _CODEC, ""),
    "mimi": ("MimiModel", "MimiConfig", _MIMI, _CODEC),
    "vits": ("VitsModel", "VitsConfig", _VITS, _IDS, "decoder"),
    "univnet": (
        "UnivNetModel", "UnivNetConfig", _UNIVNET,
        {"input_features": floats(1, 8, 6), "noise_sequence": floats(1, 8, 4)}, "",
    ),
    "speecht5-hifigan": (
        "SpeechT5HifiGan", "SpeechT5HifiGanConfig", {"model_in_dim": 8, **_VOCODER},
        {"spectrogram": floats(2, 6, 8)}, "",
    ),
    "fastspeech2-hifigan": (
        "FastSpeech2ConformerHifiGan", "FastSpeech2ConformerHifiGanConfig", {"model_in_dim": 8, **_VOCODER},
        {"spectrogram": floats(2, 6, 8)}, "",
    ),
    "whisper": (
        "WhisperModel", "WhisperConfig", _WHISPER,
        {"input_features": floats(2, 8, 16), "decoder_input_ids": ids(2, 5)},
    ),
    "ast": (
        "ASTModel", "ASTConfig", {**_VISION, "num_mel_bins": 16, "max_length": 32, "patch_size": 8},
        {"input_values": floats(2, 32, 16)},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2, _IDS),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _TEXT, _IDS),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER, _IDS),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _DECODER, _IDS),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER, _IDS),
    "phi": (
        "PhiForCausalLM", "PhiConfig", {**_TEXT, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}, _IDS,
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**_TEXT, "bos_token_id": 1, "eos_token_id": 2}, _IDS),
    "bloom": (
        "BloomForCausalLM", "BloomConfig", {"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 2}, _IDS,
    ),
    "opt": (
        "OPTForCausalLM", "OPTConfig", {**_TEXT, "ffn_dim": 24, "word_embed_proj_dim": 16, "pad_token_id": 1}, _IDS,
    ),
    "mpt": (
        "MptForCausalLM", "MptConfig",
        {"vocab_size": 32, "d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 32}, _IDS,
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _MOE, _IDS),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**_MOE, "shared_expert_intermediate_size": 12}, _IDS,
    ),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", _MOE, _IDS),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM", "DeepseekV3Config",
        {**_MOE, "head_dim": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
         "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
         "num_key_value_heads": 2},
        _IDS,
    ),
    "jetmoe": (
        "JetMoeForCausalLM", "JetMoeConfig",
        {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_key_value_heads": 2, "kv_channels": 8,
         "intermediate_size": 12, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 32,
         "pad_token_id": None},
        _IDS,
    ),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", {**_MOE, "intermediate_size_mlp": 16}, _IDS),
    "switch": (
        "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig",
        {**_T5, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}, _TWO,
    ),
    "mamba": (
        "MambaForCausalLM", "MambaConfig",
        {"vocab_size": 32, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "conv_kernel": 4}, _IDS,
    ),
    "mamba2": (
        "Mamba2ForCausalLM", "Mamba2Config",
        {"vocab_size": 32, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 8,
         "n_groups": 1, "chunk_size": 4},
        _IDS,
    ),
    "rwkv": (
        "RwkvForCausalLM", "RwkvConfig",
        {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}, _IDS,
    ),
    "xlstm": (
        "xLSTMForCausalLM", "xLSTMConfig",
        {"vocab_size": 32, "hidden_size": 128, "num_heads": 2, "num_hidden_layers": 1, "chunk_size": 16}, _IDS,
    ),
    "recurrent-gemma": (
        "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig",
        {**_TEXT, "lru_width": 16, "num_hidden_layers": 3, "num_key_value_heads": 1, "attention_window_size": 8}, _IDS,
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _TEXT, _IDS),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**_TEXT, "embedding_size": 8}, _IDS),
    "convbert": ("ConvBertForMaskedLM", "ConvBertConfig", {**_TEXT, "num_groups": 2, "embedding_size": 16}, _IDS),
    "deberta-v2": (
        "DebertaV2ForMaskedLM", "DebertaV2Config",
        {**_TEXT, "relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]}, _IDS,
    ),
    "distilbert": (
        "DistilBertForMaskedLM", "DistilBertConfig",
        {"vocab_size": 32, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32},
        _IDS,
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5, _TWO),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART, _TWO),
    "vit": ("ViTModel", "ViTConfig", _VISION, _PIXELS),
    "dinov2": ("Dinov2Model", "Dinov2Config", _VISION, _PIXELS),
    "beit": ("BeitModel", "BeitConfig", {**_VISION, "use_relative_position_bias": True}, _PIXELS),
    "swin": (
        "SwinModel", "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 2},
        _PIXELS,
    ),
    "convnext": (
        "ConvNextModel", "ConvNextConfig", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, _PIXELS,
    ),
    "resnet": (
        "ResNetForImageClassification", "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 4},
        _LARGE,
    ),
    "mobilenet-v2": ("MobileNetV2Model", "MobileNetV2Config", {"depth_multiplier": 0.25, "image_size": 32}, _LARGE),
    "segformer": (
        "SegformerForSemanticSegmentation", "SegformerConfig",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [3, 3],
         "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8},
        _LARGE,
    ),
    "patchtst": ("PatchTSTForPrediction", "PatchTSTConfig", _SERIES, {"past_values": floats(2, 16, 2)}),
}  # fmt: skip

FAMILIES: dict[str, Made] = {
    **{name: partial(_make, *row) for name, row in _ROWS.items()},
    "clip": partial(_clip, {"input_ids": ids(2, 7), **_PIXELS}),
}
