"""Tables of the torch models: torchvision, timm, transformers and the networks of ``nets.py``."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import nets
import timm
import torch
import torchvision
import transformers
from torch import nn

Spec = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Net:
    """A torch model before export.

    Args:
        name: architecture, the first part of the file name.
        family: architecture family.
        make: builds the module.
        inputs: kind ("image", "ids", "mask", "float") and shape by name, in positional order.
        exporters: those to use.
        scripted: compile with ``torch.jit.script`` in place of tracing.
        high: ids are drawn below this.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    inputs: dict[str, Spec]
    exporters: tuple[str, ...] = ("torchscript", "dynamo")
    scripted: bool = False
    high: int = 90

    def args(self, *, batch: int | None = None, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Draw inputs; ``batch`` replaces the size of axis 0."""
        noise = torch.Generator().manual_seed(seed)
        return tuple(self._draw(kind, (batch or shape[0], *shape[1:]), noise) for kind, shape in self.inputs.values())

    def _draw(self, kind: str, shape: tuple[int, ...], noise: torch.Generator) -> torch.Tensor:
        """Draw one input."""
        if kind == "ids":
            return torch.randint(3, self.high, shape, generator=noise)
        return torch.ones(shape, dtype=torch.long) if kind == "mask" else torch.randn(shape, generator=noise)


def image(size: int, channels: int = 3) -> dict[str, Spec]:
    """Describe one square image input."""
    return {"x": ("image", (1, channels, size, size))}


class Call(nn.Module):
    """Call a transformers model by keyword and keep some of its outputs."""

    def __init__(self, model: nn.Module, names: list[str], keep: list[str]) -> None:
        """Wrap ``model``; ``names`` are the keywords of the positional inputs, ``keep`` the outputs."""
        super().__init__()
        self.model, self.names, self.keep = model, names, keep

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the wrapped model."""
        result = self.model(**dict(zip(self.names, args, strict=True)))
        return tuple(result[key] for key in self.keep)


class First(nn.Module):
    """Give a torchvision model one image tensor and flatten its dicts and lists of outputs."""

    def __init__(self, model: nn.Module, *, listed: bool = False) -> None:
        """Wrap ``model``; ``listed`` models take a list of images."""
        super().__init__()
        self.model, self.listed = model, listed

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the wrapped model."""
        images = [x[0]] if len(x) == 1 else list(x)
        result = self.model(images if self.listed else x)
        return tuple((result[0] if self.listed else result).values())


# name, family, image size, options
TORCHVISION = [
    ("resnet18", "resnet", 64, {}),
    ("mobilenet_v2", "mobilenet", 64, {}),
    ("mobilenet_v3_small", "mobilenet", 64, {}),
    ("densenet121", "densenet", 64, {}),
    ("shufflenet_v2_x1_0", "shufflenet", 64, {}),
    ("squeezenet1_1", "squeezenet", 64, {}),
    ("efficientnet_b0", "efficientnet", 64, {}),
    ("resnet50", "resnet", 64, {}),
    ("swin_t", "swin", 64, {}),
    ("convnext_tiny", "convnext", 64, {}),
    ("mobilenet_v3_large", "mobilenet", 64, {}),
    ("resnext50_32x4d", "resnet", 64, {}),
    ("efficientnet_v2_s", "efficientnet", 64, {}),
    ("googlenet", "inception", 96, {"init_weights": False, "aux_logits": False}),
    ("inception_v3", "inception", 96, {"init_weights": False, "aux_logits": False}),
    ("mnasnet0_5", "mobilenet", 64, {}),
    ("regnet_x_400mf", "regnet", 64, {}),
    ("regnet_y_400mf", "regnet", 64, {}),
    ("swin_v2_t", "swin", 64, {}),
]
SEGMENTATION = ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"]
DETECTION = ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"]

SIZED = {"img_size": 64}
# name, family, image size, options
TIMM = [
    ("ghostnet_050", "ghostnet", 64, {}),
    ("repvgg_a0", "repvgg", 64, {}),
    ("mobilevit_xxs", "mobilevit", 64, {}),
    ("hrnet_w18_small", "hrnet", 64, {}),
    ("seresnet18", "resnet", 64, {}),
    ("deit_tiny_distilled_patch16_224", "vit", 64, SIZED),
    ("levit_128s", "levit", 224, {}),
    ("xcit_nano_12_p16_224", "xcit", 64, SIZED),
    ("edgenext_xx_small", "edgenext", 64, {}),
    ("poolformer_s12", "poolformer", 64, {}),
    ("pvt_v2_b0", "pvt", 64, {}),
    ("resnest14d", "resnet", 64, {}),
    ("gmlp_ti16_224", "mixer", 64, SIZED),
    ("coat_lite_tiny", "coat", 64, SIZED),
    ("cait_xxs24_224", "vit", 64, SIZED),
    ("beit_base_patch16_224", "vit", 64, SIZED | {"embed_dim": 192, "num_heads": 3}),
    ("eva02_tiny_patch14_224", "vit", 56, {"img_size": 56}),
    ("volo_d1_224", "volo", 64, SIZED),
    ("dla34", "dla", 64, {}),
    ("res2net50_26w_4s", "resnet", 64, {}),
    ("skresnet18", "resnet", 64, {}),
    ("nf_regnet_b0", "nfnet", 64, {}),
    ("cs3darknet_s", "darknet", 64, {}),
    ("ese_vovnet19b_slim", "vovnet", 64, {}),
    ("efficientformer_l1", "efficientformer", 224, {}),
    ("fastvit_t8", "fastvit", 64, {}),
    ("tnt_s_patch16_224", "vit", 64, SIZED),
    ("crossvit_9_240", "vit", 240, {}),
    ("dpn48b", "dpn", 64, {}),
    ("botnet26t_256", "botnet", 128, {"img_size": 128}),
    ("halonet26t", "botnet", 256, {}),
    ("lambda_resnet26t", "botnet", 128, {}),
    ("twins_svt_small", "twins", 64, SIZED),
    ("nest_tiny", "nest", 64, SIZED),
    ("visformer_tiny", "visformer", 64, SIZED),
    ("davit_tiny", "davit", 64, {"embed_dims": (32, 64, 128, 256), "num_heads": (2, 4, 8, 16)}),
    ("inception_next_atto", "inception", 64, {}),
    ("mobileone_s0", "mobilenet", 64, {}),
    ("rexnet_100", "rexnet", 64, {}),
    ("convnextv2_atto", "convnext", 64, {}),
    ("mobilenetv4_conv_small", "mobilenet", 64, {}),
    ("mobilenetv4_hybrid_medium", "mobilenet", 64, {}),
    ("mixnet_s", "mobilenet", 64, {}),
    ("regnetz_005", "regnet", 64, {}),
    ("maxvit_pico_rw_256", "maxvit", 128, {"img_size": 128}),
    ("pit_ti_224", "vit", 224, {}),
    ("tiny_vit_5m_224", "vit", 224, {}),
    ("starnet_s050", "starnet", 64, {}),
    ("fasternet_t0", "fasternet", 64, {}),
    ("lcnet_050", "mobilenet", 64, {}),
    ("hgnetv2_b0", "hgnet", 64, {}),
    ("repvit_m0_9", "repvit", 64, {}),
    ("efficientvit_b0", "efficientvit", 64, {}),
    ("efficientvit_m0", "efficientvit", 224, {}),
    ("mambaout_femto", "mambaout", 64, {}),
    ("vit_tiny_patch16_224", "vit", 64, SIZED),
    ("vit_small_patch14_reg4_dinov2", "vit", 56, {"img_size": 56, "embed_dim": 192, "num_heads": 3}),
    ("gcvit_xxtiny", "gcvit", 224, {}),
    ("ecaresnet26t", "resnet", 64, {}),
    ("swiftformer_xs", "swiftformer", 224, {}),
    ("mvitv2_tiny", "mvit", 64, SIZED),
    ("ghostnetv2_100", "ghostnet", 64, {}),
    ("shvit_s1", "vit", 64, {}),
    ("tinynet_e", "mobilenet", 64, {}),
    ("test_vit", "vit", 160, {}),
    ("convit_tiny", "vit", 64, SIZED),
    ("iformer_t", "iformer", 64, {}),
    ("swinv2_cr_tiny_ns_224", "swin", 224, {"embed_dim": 48, "num_heads": (3, 6, 12, 24)}),
]
UNFUSED = {"beit_base_patch16_224", "twins_svt_small", "nest_tiny", "maxvit_pico_rw_256"}


def torchvision_nets() -> Iterator[Net]:
    """List the torchvision models, with ten classes."""
    weights = {"weights": None, "num_classes": 10}
    for name, family, size, options in TORCHVISION:
        yield Net(name, family, lambda n=name, o=options: getattr(torchvision.models, n)(**weights, **o), image(size))
    for name in SEGMENTATION:
        make = getattr(torchvision.models.segmentation, name)
        yield Net(name, "segmentation", lambda m=make: First(m(**weights, weights_backbone=None)), image(96))
    for name in DETECTION:
        make = getattr(torchvision.models.detection, name)
        yield Net(name, "detection", lambda m=make: First(m(**weights, weights_backbone=None), listed=True), image(320))
    fpn = torchvision.models.detection.backbone_utils.resnet_fpn_backbone
    yield Net(
        "resnet18_fpn", "detection", lambda: First(fpn(backbone_name="resnet18", weights=None)), image(96)
    )  # fmt: skip
    clip = {"x": ("image", (1, 3, 8, 64, 64))}
    yield Net("r3d_10", "video", _video_resnet, clip)
    yield Net("vgg11_bn", "vgg", lambda: _slim_head(torchvision.models.vgg11_bn(**weights), 25088), image(224))
    yield Net("alexnet", "vgg", lambda: _slim_head(torchvision.models.alexnet(**weights), 9216), image(224))
    yield Net("vit_16", "vit", lambda: torchvision.models.VisionTransformer(64, 16, 12, 3, 192, 768), image(64))


def _video_resnet() -> nn.Module:
    """Build a 3-D ResNet with one block in each stage."""
    parts = torchvision.models.video.resnet
    return parts.VideoResNet(parts.BasicBlock, [parts.Conv3DSimple] * 4, [1] * 4, parts.BasicStem, num_classes=10)


def _slim_head(model: nn.Module, width: int) -> nn.Module:
    """Replace a classifier that would weigh hundreds of megabytes; it still reads a flattened 7x7 or 6x6 map."""
    model.classifier = nets.mlp(width, 128, 96, 10)
    return model


def timm_nets() -> Iterator[Net]:
    """List the timm models, with ten classes."""
    for name, family, size, options in TIMM:
        yield Net(name, family, lambda n=name, o=options: _timm(n, o), image(size))


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    """Build a timm model, with attention spelt out where the fused form does not export."""
    timm.layers.set_fused_attn(name not in UNFUSED)
    return timm.create_model(name, num_classes=10, **options)


TOKENS: dict[str, Spec] = {"input_ids": ("ids", (1, 16)), "attention_mask": ("mask", (1, 16))}
PIXELS: dict[str, Spec] = {"pixel_values": ("image", (1, 3, 64, 64))}
SOUND: dict[str, Spec] = {"input_values": ("float", (1, 4000))}
MEL: dict[str, Spec] = {"input_features": ("float", (1, 20, 64))}
SERIES: dict[str, Spec] = {"past_values": ("float", (1, 32, 5))}
PAIR = TOKENS | {"decoder_input_ids": ("ids", (1, 12))}
HIDDEN, LOGITS = ["last_hidden_state"], ["logits"]

WIDE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
BERT = WIDE | {"vocab_size": 99, "max_position_embeddings": 64, "initializer_range": 0.1}
DECODER = BERT | {"use_cache": False}
GQA = DECODER | {"num_key_value_heads": 2}
VIT = WIDE | {"image_size": 64, "patch_size": 16, "initializer_range": 0.1}
BART = {
    "vocab_size": 99, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "init_std": 0.1, "use_cache": False,
}  # fmt: skip
T5 = {
    "vocab_size": 99, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4, "use_cache": False,
    "initializer_factor": 3.0, "attn_implementation": "eager",
}  # fmt: skip
WHISPER = BART | {"num_mel_bins": 20, "max_source_positions": 32, "max_target_positions": 32}
SPEECH = WIDE | {
    "vocab_size": 40, "conv_dim": (32,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "initializer_range": 0.1,
}  # fmt: skip
CLIP_TEXT = BERT | {"projection_dim": 48, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
PYRAMID = {"depths": (2, 2, 2, 2), "hidden_sizes": (16, 32, 48, 64), "num_attention_heads": (1, 2, 3, 4)}
SMALL_RESNET = {"embedding_size": 16, "hidden_sizes": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "layer_type": "basic"}
EAGER = {"attn_implementation": "eager"}
# name, family, class, options of its configuration, inputs, outputs
TRANSFORMERS = [
    ("bert", "bert", "BertModel", BERT | EAGER, TOKENS, [*HIDDEN, "pooler_output"]),
    ("distilbert", "bert", "DistilBertForTokenClassification",
     {"vocab_size": 99, "dim": 64, "n_layers": 4, "n_heads": 4, "hidden_dim": 128, "initializer_range": 0.1} | EAGER,
     TOKENS, LOGITS),
    ("gpt2", "gpt", "GPT2LMHeadModel",
     {"vocab_size": 99, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64, "use_cache": False,
      "initializer_range": 0.1}, TOKENS, LOGITS),
    ("llama", "llama", "LlamaForCausalLM", GQA, TOKENS, LOGITS),
    ("t5", "t5", "T5ForConditionalGeneration", T5, PAIR, LOGITS),
    ("bert_sdpa", "bert", "BertForSequenceClassification", BERT, TOKENS, LOGITS),
    ("roberta", "bert", "RobertaForMaskedLM", BERT, TOKENS, LOGITS),
    ("albert", "bert", "AlbertModel", BERT | {"embedding_size": 32}, TOKENS, HIDDEN),
    ("electra", "bert", "ElectraForPreTraining", BERT | {"embedding_size": 32}, TOKENS, LOGITS),
    ("deberta_v2", "bert", "DebertaV2Model",
     BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
             "norm_rel_ebd": "layer_norm", "share_att_key": True}, TOKENS, HIDDEN),
    ("mobilebert", "bert", "MobileBertModel",
     BERT | {"embedding_size": 32, "intra_bottleneck_size": 32, "num_feedforward_networks": 2}, TOKENS, HIDDEN),
    ("squeezebert", "bert", "SqueezeBertModel", BERT | {"embedding_size": 64}, TOKENS, HIDDEN),
    ("convbert", "bert", "ConvBertModel", BERT | {"embedding_size": 32}, TOKENS, HIDDEN),
    ("funnel", "bert", "FunnelModel",
     {"vocab_size": 99, "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 128, "block_sizes": (1, 1, 1)},
     TOKENS, HIDDEN),
    ("longformer", "bert", "LongformerModel", BERT | {"attention_window": 8}, TOKENS, HIDDEN),
    ("mpnet", "bert", "MPNetModel", BERT, TOKENS, HIDDEN),
    ("modernbert", "bert", "ModernBertModel", BERT | {"pad_token_id": 0}, TOKENS, HIDDEN),
    ("xlnet", "bert", "XLNetModel", {"vocab_size": 99, "d_model": 64, "n_layer": 3, "n_head": 4, "d_inner": 128},
     TOKENS, HIDDEN),
    ("gpt_neox", "gpt", "GPTNeoXForCausalLM", DECODER, TOKENS, LOGITS),
    ("gpt_neo", "gpt", "GPTNeoForCausalLM",
     {"vocab_size": 99, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "window_size": 8, "use_cache": False,
      "attention_types": [[["global", "local"], 2]], "max_position_embeddings": 64}, TOKENS, LOGITS),
    ("opt", "gpt", "OPTForCausalLM",
     {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 128,
      "word_embed_proj_dim": 32, "max_position_embeddings": 64, "use_cache": False, "init_std": 0.1}, TOKENS, LOGITS),
    ("bloom", "gpt", "BloomForCausalLM",
     {"vocab_size": 99, "hidden_size": 64, "n_layer": 3, "n_head": 4, "use_cache": False, "initializer_range": 0.1},
     TOKENS, LOGITS),
    ("falcon", "gpt", "FalconForCausalLM", DECODER | {"new_decoder_architecture": False, "multi_query": True},
     TOKENS, LOGITS),
    ("phi", "gpt", "PhiForCausalLM", DECODER, TOKENS, LOGITS),
    ("phi3", "llama", "Phi3ForCausalLM", GQA | {"pad_token_id": 0}, TOKENS, LOGITS),
    ("qwen2", "llama", "Qwen2ForCausalLM", GQA, TOKENS, LOGITS),
    ("qwen3", "llama", "Qwen3ForCausalLM", GQA | {"head_dim": 24}, TOKENS, LOGITS),
    ("mistral", "llama", "MistralForCausalLM", GQA | {"sliding_window": 8}, TOKENS, LOGITS),
    ("gemma", "llama", "GemmaForCausalLM", GQA | {"head_dim": 16}, TOKENS, LOGITS),
    ("gemma2", "llama", "Gemma2ForCausalLM", GQA | {"head_dim": 16, "sliding_window": 8}, TOKENS, LOGITS),
    ("gemma3", "llama", "Gemma3ForCausalLM", GQA | {"head_dim": 16, "sliding_window": 8}, TOKENS, LOGITS),
    ("olmo2", "llama", "Olmo2ForCausalLM", GQA | {"pad_token_id": 0}, TOKENS, LOGITS),
    ("cohere", "llama", "CohereForCausalLM", GQA | {"pad_token_id": 0, "eos_token_id": 1}, TOKENS, LOGITS),
    ("mixtral", "moe", "MixtralForCausalLM",
     GQA | {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "batched_mm"}, TOKENS, LOGITS),
    ("mamba", "ssm", "MambaForCausalLM",
     {"vocab_size": 99, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "use_cache": False},
     {"input_ids": ("ids", (1, 8))}, LOGITS),
    ("t5_encoder", "t5", "T5EncoderModel", T5 | {"feed_forward_proj": "gated-gelu"}, TOKENS, HIDDEN),
    ("bart", "bart", "BartForConditionalGeneration", BART, PAIR, LOGITS),
    ("pegasus", "bart", "PegasusModel", BART, PAIR, HIDDEN),
    ("whisper_encoder", "whisper", "WhisperEncoder", WHISPER, MEL, HIDDEN),
    ("whisper", "whisper", "WhisperForConditionalGeneration",
     WHISPER | {"decoder_start_token_id": 1, "pad_token_id": 0},
     MEL | {"decoder_input_ids": ("ids", (1, 12)), "decoder_attention_mask": ("mask", (1, 12))}, LOGITS),
    ("clip", "clip", "CLIPModel", {"text_config": CLIP_TEXT, "vision_config": VIT, "projection_dim": 48},
     TOKENS | PIXELS, ["logits_per_image", "text_embeds"]),
    ("siglip", "clip", "SiglipModel", {"text_config": CLIP_TEXT | {"projection_size": 64}, "vision_config": VIT},
     {"input_ids": ("ids", (1, 64))} | PIXELS, ["logits_per_image"]),
    ("dinov2", "vit", "Dinov2Model", VIT, PIXELS, HIDDEN),
    ("vit_hf", "vit", "ViTForImageClassification", VIT, PIXELS, LOGITS),
    ("yolos", "detection", "YolosForObjectDetection",
     VIT | {"image_size": [64, 64], "num_detection_tokens": 8}, PIXELS, [*LOGITS, "pred_boxes"]),
    ("detr", "detection", "DetrForObjectDetection", BART | {"num_queries": 8, "use_timm_backbone": False}, PIXELS,
     [*LOGITS, "pred_boxes"]),
    ("vitdet", "vit", "VitDetModel", VIT | {"mlp_ratio": 2, "window_size": 2, "window_block_indices": [0, 2],
     "pretrain_image_size": 64, "use_relative_position_embeddings": True}, PIXELS, HIDDEN),
    ("segformer", "segmentation", "SegformerForSemanticSegmentation",
     PYRAMID | {"decoder_hidden_size": 48, "mlp_ratios": (2,) * 4, "hidden_dropout_prob": 0.0}, PIXELS, LOGITS),
    ("dpt", "segmentation", "DPTForSemanticSegmentation",
     VIT | {"is_hybrid": False, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 24, 32, 40],
            "fusion_hidden_size": 32}, PIXELS, LOGITS),
    ("swin_hf", "swin", "SwinForImageClassification",
     {"image_size": 64, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4} | EAGER,
     PIXELS, LOGITS),
    ("swin2sr", "superresolution", "Swin2SRForImageSuperResolution",
     {"image_size": 32, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "upscale": 2},
     {"pixel_values": ("image", (1, 3, 32, 32))}, ["reconstruction"]),
    ("mobilevit_hf", "mobilevit", "MobileViTForSemanticSegmentation",
     {"image_size": 64, "hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64],
      "num_attention_heads": 4, "aspp_out_channels": 32}, PIXELS, LOGITS),
    ("cvt", "vit", "CvtForImageClassification", {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]},
     PIXELS, LOGITS),
    ("resnet_hf", "resnet", "ResNetForImageClassification", SMALL_RESNET, PIXELS, LOGITS),
    ("convnextv2_hf", "convnext", "ConvNextV2ForImageClassification",
     {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]}, PIXELS, LOGITS),
    ("perceiver", "perceiver", "PerceiverModel",
     {"d_model": 5, "d_latents": 32, "num_latents": 8, "num_blocks": 2, "num_self_attends_per_block": 2,
      "num_self_attention_heads": 4, "num_cross_attention_heads": 1}, {"inputs": ("float", (1, 12, 5))}, HIDDEN),
    ("wav2vec2", "speech", "Wav2Vec2ForCTC", SPEECH, SOUND, LOGITS),
    ("hubert", "speech", "HubertModel", SPEECH, SOUND, HIDDEN),
    ("wavlm", "speech", "WavLMModel", SPEECH, SOUND, HIDDEN),
    ("ast", "speech", "ASTForAudioClassification",
     WIDE | {"max_length": 64, "num_mel_bins": 32, "patch_size": 16}, {"input_values": ("float", (1, 64, 32))}, LOGITS),
    ("patchtst", "series", "PatchTSTForPrediction",
     {"num_input_channels": 5, "context_length": 32, "patch_length": 8, "patch_stride": 8, "prediction_length": 6,
      "d_model": 32, "ffn_dim": 64, "num_attention_heads": 4, "num_hidden_layers": 2}, SERIES, ["prediction_outputs"]),
    ("patchtsmixer", "series", "PatchTSMixerForPrediction",
     {"num_input_channels": 5, "context_length": 32, "patch_length": 8, "patch_stride": 8, "prediction_length": 6,
      "d_model": 16, "num_layers": 2, "mode": "mix_channel"}, SERIES, ["prediction_outputs"]),
    ("rt_detr", "detection", "RTDetrForObjectDetection",
     {"d_model": 32, "encoder_hidden_dim": 32, "encoder_in_channels": [32, 48, 64], "feat_strides": [8, 16, 32],
      "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
      "num_queries": 6, "decoder_layers": 2, "decoder_in_channels": [32, 32, 32], "num_denoising": 0,
      "num_feature_levels": 3, "use_timm_backbone": False}, PIXELS, [*LOGITS, "pred_boxes"]),
]  # fmt: skip
BACKBONES = {
    "DetrForObjectDetection": lambda: transformers.ResNetConfig(**SMALL_RESNET, out_features=["stage4"]),
    "RTDetrForObjectDetection": lambda: transformers.RTDetrResNetConfig(
        **SMALL_RESNET, out_features=["stage2", "stage3", "stage4"]
    ),
}

VECTOR: dict[str, Spec] = {"x": ("float", (2, 16))}
SEQUENCE: dict[str, Spec] = {"x": ("float", (2, 16, 48))}
IDS: dict[str, Spec] = {"ids": ("ids", (2, 16))}
# name, family, maker, inputs
HOME_MADE = [
    ("unet_groupnorm", "unet", lambda: nets.UNet(transpose=False), image(64)),
    ("unet_transpose", "unet", lambda: nets.UNet(transpose=True), image(64)),
    ("yolov8_like", "yolo", nets.YoloV8Like, image(96)),
    ("espcn", "superresolution", nets.espcn, image(24, 1)),
    ("space_to_depth", "superresolution", nets.space_to_depth_net, image(32)),
    ("lstm_tagger", "recurrent", lambda: nets.Tagger(nn.LSTM), IDS),
    ("gru_tagger", "recurrent", lambda: nets.Tagger(nn.GRU), IDS),
    ("rnn_tagger", "recurrent", lambda: nets.Tagger(nn.RNN), IDS),
    ("bilstm_tagger", "recurrent", lambda: nets.Tagger(nn.LSTM, both=True), IDS),
    ("bigru_tagger", "recurrent", lambda: nets.Tagger(nn.GRU, both=True), IDS),
    ("lstm_last_state", "recurrent", nets.LastState, {"x": ("float", (2, 9, 12))}),
    ("tied_language_model", "recurrent", nets.TiedLanguageModel, IDS),
    ("conv_lstm", "recurrent", nets.ConvLSTM, {"x": ("float", (1, 5, 2, 16, 16))}),
    ("glu_mlp", "mlp", lambda: nets.Gated(fused=True), {"x": ("float", (2, 8, 32))}),
    ("swiglu_mlp", "mlp", lambda: nets.Gated(fused=False), {"x": ("float", (2, 8, 32))}),
    ("mlp", "mlp", lambda: nets.mlp(16, 64, 48, 32, 5), VECTOR),
    ("tied_autoencoder", "autoencoder", nets.TiedAutoencoder, {"x": ("float", (2, 40))}),
    ("conv_autoencoder", "autoencoder", nets.conv_autoencoder, image(32)),
    ("odd_densenet", "densenet", nets.OddDenseNet, image(32)),
    ("groupnorm_resnet", "resnet", nets.groupnorm_resnet, image(32)),
    ("padded_resnet", "resnet", nets.padded_resnet, image(32)),
    ("rope_gqa", "llama", lambda: nets.rope_gqa(nn.RMSNorm), IDS),
    ("rope_gqa_plain", "llama", lambda: nets.rope_gqa(nets.PlainRMSNorm), IDS),
    ("mixer", "mixer", lambda: timm.models.mlp_mixer.MlpMixer(10, 64, embed_dim=128), image(64)),
    ("convmixer", "mixer", lambda: timm.models.convmixer.ConvMixer(128, 8, 7, num_classes=10), image(56)),
    ("focalnet", "focalnet", lambda: timm.models.focalnet.FocalNet(embed_dim=24, num_classes=10), image(64)),
    ("linear_attention", "attention", lambda: nets.token_stack(nets.LinearAttention, 4), SEQUENCE),
    ("einsum_attention", "attention", lambda: nets.token_stack(nets.EinsumAttention, 4, 10), SEQUENCE),
    ("torch_transformer", "attention", nets.TorchTransformer, {"x": ("float", (2, 10, 40))}),
    ("cbam_net", "gate", lambda: nets.attention_cnn(nets.CBAM), image(32)),
    ("se_net", "gate", lambda: nets.attention_cnn(nets.SE), image(32)),
    ("eca_net", "gate", lambda: nets.attention_cnn(nets.ECA), image(32)),
    ("grouped_cnn", "grouped", nets.grouped_cnn, image(32)),
    ("gated_cnn", "gate", nets.gated_cnn, image(32)),
    ("wavenet", "conv1d", nets.WaveNet, {"x": ("float", (2, 4, 40))}),
    ("siamese", "multi", nets.Siamese, {"a": ("image", (2, 3, 32, 32)), "b": ("image", (2, 3, 32, 32))}),
    ("three_heads", "multi", nets.Heads, {"x": ("image", (2, 3, 32, 32)), "v": ("float", (2, 10))}),
    ("conv3d", "video", nets.conv3d_net, {"x": ("float", (2, 2, 8, 8, 8))}),
    ("style_net", "generator", nets.style_net, image(32)),
    ("spatial_transformer", "warp", nets.SpatialTransformer, image(32)),
    ("pointnet", "conv1d", nets.PointNet, {"x": ("float", (2, 3, 64))}),
    ("graph_net", "graph", nets.GraphNet, {"x": ("float", (2, 7, 8)), "a": ("float", (2, 7, 7))}),
    ("experts", "moe", nets.Experts, {"x": ("float", (6, 20))}),
    ("dynamic_conv", "hyper", nets.DynamicConv, image(32)),
]  # fmt: skip


def transformers_nets() -> Iterator[Net]:
    """List the transformers models, small in width and depth."""
    for name, family, cls, options, inputs, keep in TRANSFORMERS:
        yield Net(name, family, lambda c=cls, o=options, i=inputs, k=keep: _transformer(c, o, list(i), k), inputs)


def _transformer(cls: str, options: dict[str, Any], names: list[str], keep: list[str]) -> nn.Module:
    """Build a model from its own configuration class."""
    model = _find(cls)
    if cls in BACKBONES:
        options = options | {"backbone_config": BACKBONES[cls]()}
    return Call(model(model.config_class(**options)), names, keep)


def _find(cls: str) -> type[nn.Module]:
    """Look up a class of transformers; the encoder of whisper is not public."""
    if cls == "WhisperEncoder":
        return transformers.models.whisper.modeling_whisper.WhisperEncoder
    return getattr(transformers, cls)


TORCHSCRIPT = dict.fromkeys(
    ["fasterrcnn_mobilenet_v3_large_320_fpn", 
     "ssdlite320_mobilenet_v3_large", "longformer", "xlnet", "control_flow"], ("torchscript",),
)  # fmt: skip
DYNAMO = dict.fromkeys(
    ["rope_gqa", "spatial_transformer", "cohere", "patchtst", "patchtsmixer", "eva02_tiny_patch14_224", "volo_d1_224",
     "halonet26t", "cond"], ("dynamo",),
)  # fmt: skip
EXPORTERS = TORCHSCRIPT | DYNAMO


def home_made_nets() -> Iterator[Net]:
    """List the networks of ``nets.py``."""
    for name, family, make, inputs in HOME_MADE:
        yield Net(name, family, make, inputs)
    yield Net("control_flow", "control", nets.ControlFlow, VECTOR, scripted=True)
    yield Net("cond", "control", nets.Cond, VECTOR)


SENTENCE: dict[str, Spec] = {"input_ids": ("ids", (1, 128)), "attention_mask": ("mask", (1, 128))}
FULL_SIZE = ("resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "convnext_tiny", "swin_t")


def full_size_nets() -> Iterator[Net]:
    """List architectures at the widths, depths and inputs that they were published with, for measurements of time."""
    for name in FULL_SIZE:
        yield Net(name, name, lambda n=name: getattr(torchvision.models, n)(weights=None), image(224))
    vit = lambda: torchvision.models.VisionTransformer(224, 16, 12, 6, 384, 1536)  # noqa: E731  # as ViT-S/16
    yield Net("vit_s_16", "vit", vit, image(224))
    pixels: dict[str, Spec] = {"pixel_values": ("image", (1, 3, 512, 512))}
    yield Net(
        "segformer_b0", "segmentation",
        lambda: Call(transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig()).eval(), list(pixels), LOGITS),
        pixels,
    )  # fmt: skip
    yield Net("yolov8_like", "yolo", lambda: nets.YoloV8Like(80, (16, 32, 64, 128, 256)), image(320))
    yield Net("unet_transpose", "unet", lambda: nets.UNet(transpose=True, widths=(32, 64, 128, 256)), image(256))
    yield Net(
        "bert_base", "bert",
        lambda: Call(transformers.BertModel(transformers.BertConfig(**EAGER)).eval(), list(SENTENCE), HIDDEN),
        SENTENCE,
    )  # fmt: skip
    speech = transformers.WhisperConfig(**EAGER)  # that of whisper-tiny
    mel: dict[str, Spec] = {"input_features": ("float", (1, speech.num_mel_bins, 2 * speech.max_source_positions))}
    yield Net(
        "whisper_tiny_encoder", "whisper",
        lambda: Call(_find("WhisperEncoder")(speech).eval(), list(mel), HIDDEN),
        mel,
    )  # fmt: skip


def all_nets() -> Iterator[Net]:
    """List everything, each with the exporters that take it."""
    for net in (*torchvision_nets(), *home_made_nets(), *transformers_nets(), *timm_nets()):
        yield replace(net, exporters=EXPORTERS.get(net.name, net.exporters))
