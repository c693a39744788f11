"""Small random models of transformers, by the type of their configuration."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WORDS = 200
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "embedding_size": 32, "emb_dim": 64,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_encoder_layers": 2, "num_decoder_layers": 2, "num_attention_heads": 4, "num_heads": 4, "n_head": 4,
    "n_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "num_decoder_attention_heads": 4, "intermediate_size": 128, "ffn_dim": 128, "ffn_hidden_size": 128,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "d_ff": 128, "hidden_dim": 128, "d_kv": 16, "head_dim": 16,
    "kv_channels": 16, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_source_positions": 64,
    "max_target_positions": 64, "image_size": 64, "patch_size": 16, "type_vocab_size": 2, "projection_dim": 32,
    "encoder_hidden_dim": 64, "decoder_start_token_id": 2, "forced_eos_token_id": None, "forced_bos_token_id": None,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "sliding_window": 32, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "rotary_dim": 8,
    "use_timm_backbone": False, "use_pretrained_backbone": False, "sep_token_id": 2, "cls_token_id": 1,
    "mask_token_id": 3, "num_queries": 10, "num_labels": 5, "max_window_layers": 1, "layer_types": None,
    "begin_suppress_tokens": None, "suppress_tokens": None,
}  # fmt: skip  # a table
"""Small values of the settings that many configurations share; a configuration takes those that it has."""
_AUDIO: dict[str, Any] = {
    "conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "tdnn_dim": (32, 32, 32),
    "tdnn_kernel": (5, 3, 1), "tdnn_dilation": (1, 2, 1), "xvector_output_dim": 32, "classifier_proj_size": 24,
}  # fmt: skip  # a table
_SWIN: dict[str, Any] = {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
_STAGES: dict[str, Any] = {"hidden_sizes": [16, 24], "depths": [1, 2], "embedding_size": 16, "num_groups": 4}
_FOUR: dict[str, Any] = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1], "decoder_hidden_size": 32}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip  # a table
_DETECTION: dict[str, Any] = {
    "d_model": 32, "encoder_hidden_dim": 32, "encoder_in_channels": [24, 32, 40], "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "decoder_in_channels": [32, 32, 32], "num_queries": 12, "encoder_layers": 1,
    "decoder_layers": 2, "num_denoising": 0, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "backbone_config": {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]},
}  # fmt: skip  # a table
_RESNET: dict[str, Any] = {"backbone_config": {"model_type": "resnet", **_FOUR, "embedding_size": 16}, "backbone": None}
MORE: dict[str, dict[str, Any]] = {
    "albert": {"inner_group_num": 1, "num_hidden_groups": 1},
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 32},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    "bloom": {"hidden_size": 64},
    "convnext": _FOUR,
    "convnextv2": _FOUR,
    "cvt": {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 1, 2]},
    "d_fine": _DETECTION,
    "deberta": {"position_buckets": 16},
    "deberta-v2": {"position_buckets": 16, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "deepseek_v3": _LATENT,
    "detr": _RESNET | {"d_model": 32},
    "table-transformer": _RESNET | {"d_model": 32},
    "donut-swin": _SWIN,
    "efficientnet": {"hidden_dim": 64, "width_coefficient": 0.5, "depth_coefficient": 0.4},
    "falcon": {"new_decoder_architecture": False},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
    "flaubert": {"emb_dim": 64, "n_words": WORDS},
    "xlm": {"emb_dim": 64, "n_words": WORDS},
    "glm": {"num_key_value_heads": 2},
    "glpn": {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
             "decoder_hidden_size": 16, "num_encoder_blocks": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16, "intermediate_size": 128},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "groupvit": {"hidden_size": 64, "depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 4]},
    "hiera": {"embed_dim": 16, "image_size": [64, 64], "depths": [1, 1, 2], "num_heads": [1, 2, 4], "num_query_pool": 2,
              "masked_unit_size": [4, 4], "query_stride": [2, 2]},
    "imagegpt": {"n_positions": 64},
    "levit": {"hidden_sizes": [32, 48, 64], "depths": [1, 1, 1], "num_attention_heads": [2, 3, 4], "key_dim": [8, 8, 8]},
    "longformer": {"attention_window": 8},
    "longt5": {"local_radius": 7},
    "layoutlmv3": {"input_size": 64, "coordinate_size": 10, "shape_size": 12, "rel_pos_bins": 8, "rel_2d_pos_bins": 8},
    "mgp-str": {"image_size": [32, 64], "patch_size": 8, "max_token_length": 9, "num_character_labels": 20,
                "num_bpe_labels": 40, "num_wordpiece_labels": 40, "hidden_size": 64},
    "markuplm": {"xpath_unit_hidden_size": 8, "max_depth": 8},
    "mobilebert": {"intra_bottleneck_size": 32, "num_feedforward_networks": 2, "true_hidden_size": 32},
    "mobilevit": {"hidden_sizes": [32, 40, 48], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64], "patch_size": 2,
                  "aspp_out_channels": 24},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.35},
    "modernbert": {"local_attention": 16, "global_attn_every_n_layers": 2, "decoder_bias": True},
    "moonshine": {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 4,
                  "decoder_num_attention_heads": 4},
    "mpt": {"max_seq_len": 64, "expansion_ratio": 2},
    "nystromformer": {"num_landmarks": 4, "segment_means_seq_len": 16},
    "patchtst": {"num_input_channels": 3, "context_length": 32, "prediction_length": 8, "patch_length": 8,
                 "patch_stride": 8},
    "patchtsmixer": {"num_input_channels": 3, "context_length": 32, "prediction_length": 8, "patch_length": 8,
                     "patch_stride": 8},
    "perceiver": {"num_latents": 16, "d_latents": 32, "num_self_attends_per_block": 2, "num_self_attention_heads": 4,
                  "num_cross_attention_heads": 4},
    "poolformer": {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]},
    "pvt": {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 4, 4],
            "patch_sizes": [4, 2, 2, 2]},
    "phi": {"partial_rotary_factor": 0.5},
    "regnet": {"groups_width": 8, **_STAGES},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 48},
    "resnet": _STAGES,
    "rt_detr": _DETECTION,
    "rt_detr_v2": _DETECTION,
    "segformer": {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
                  "decoder_hidden_size": 32, "num_encoder_blocks": 4, "sr_ratios": [4, 2, 1, 1]},
    "sew": _AUDIO | {"squeeze_factor": 2},
    "sew-d": _AUDIO | {"squeeze_factor": 2, "position_buckets": 8},
    "speech_to_text": {"conv_channels": 32, "input_feat_per_channel": 24, "num_conv_layers": 2},
    "speecht5": _AUDIO | {"num_mel_bins": 20, "speaker_embedding_dim": 32, "speech_decoder_prenet_units": 24,
                          "speech_decoder_postnet_units": 24, "speech_decoder_postnet_layers": 3},
    "stablelm": {"partial_rotary_factor": 0.5},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "swin2sr": {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32,
                "patch_size": 1},
    "vitpose": {"backbone_config": {"model_type": "vitpose_backbone", "hidden_size": 64, "num_hidden_layers": 2,
                                    "num_attention_heads": 4, "image_size": [64, 48], "patch_size": [16, 16],
                                    "out_indices": [2]}, "num_labels": 5},
    "vit_mae": {"decoder_hidden_size": 32, "decoder_intermediate_size": 64, "decoder_num_hidden_layers": 1},
    "vits": {"flow_size": 32, "spectrogram_bins": 33, "upsample_initial_channel": 32, "wavenet_dilation_rate": 1,
             "upsample_rates": [4, 2], "upsample_kernel_sizes": [8, 4], "resblock_kernel_sizes": [3, 5],
             "resblock_dilation_sizes": [[1, 3], [1, 3]], "prior_encoder_num_flows": 2, "posterior_encoder_num_wavenet_layers": 2,
             "prior_encoder_num_wavenet_layers": 2, "duration_predictor_num_flows": 2, "depth_separable_num_layers": 2},
    "wav2vec2-conformer": _AUDIO | {"conv_depthwise_kernel_size": 5},
    "whisper": {"num_mel_bins": 20, "max_source_positions": 64},
    "mctct": {"input_feat_per_channel": 20, "conv_kernel": (3,), "conv_stride": (2,)},
    "yolos": {"image_size": [64, 64], "num_detection_tokens": 8},
    "dpt": {"backbone_out_indices": [0, 1, 2, 3], "num_hidden_layers": 4, "neck_hidden_sizes": [16, 24, 32, 40],
            "fusion_hidden_size": 24, "readout_type": "project"},
    "maskformer": {"backbone_config": {"model_type": "swin", **_SWIN, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]},
                   "fpn_feature_size": 24, "mask_feature_size": 24,
                   "decoder_config": {"model_type": "detr", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
                                      "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 8}},
    "beit": {"out_indices": [0, 1]},
    "data2vec-vision": {"out_indices": [0, 1]},
}  # fmt: skip  # a table
"""Settings that one type needs besides `SIZES`, such as lists of widths by stage."""
for _kind in ("hubert", "wav2vec2", "unispeech", "unispeech-sat", "wavlm", "data2vec-audio"):
    MORE.setdefault(_kind, _AUDIO)


def config_of(kind: str, **more: Any) -> Any:
    """Return a small configuration of a type."""
    return _filled(CONFIG_MAPPING[kind], MORE.get(kind, {}) | more)


def _filled(make: Any, more: dict[str, Any]) -> Any:
    """Return a configuration with the small values of the settings that it has, and small configurations inside."""
    standard = make()
    known = standard.to_dict()
    values = {name: value for name, value in SIZES.items() if name in known}
    for name, value in known.items():  # an end of speech, an unknown word and the like have to be words
        if name.endswith("token_id") and name not in SIZES and isinstance(value, int) and value >= WORDS:
            values[name] = 4
    for name, part in vars(standard).items():
        if isinstance(part, transformers.PretrainedConfig) and not isinstance(more.get(name), dict):
            values[name] = _filled(type(part), MORE.get(part.model_type, {})).to_dict()
    for name, value in more.items():
        if isinstance(value, dict) and name.endswith("config"):
            inside = CONFIG_MAPPING[value.get("model_type") or known[name]["model_type"]]
            values[name] = _filled(inside, {k: v for k, v in value.items() if k != "model_type"})
        else:
            values[name] = value
    return make(**values)


def perturbed(model: nn.Module) -> nn.Module:
    """Fill weights that are constant with seeded noise, so that each of them matters to the outputs."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or tensor.numel() < 2 or tensor.min() != tensor.max():
                continue
            uniform = torch.rand(tensor.shape, generator=noise).to(tensor)
            if float(tensor.flatten()[0]) == 0:
                if not name.rpartition(".")[2].startswith(("inv_freq", "original_inv")):
                    tensor.copy_((uniform - 0.5) * 0.3)
            else:
                tensor.mul_(0.7 + 0.6 * uniform)
    return model.eval()
