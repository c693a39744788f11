"""Export small random models of libraries that are built on torch.

Environment: pip install torch==2.14.1 torchvision==0.29.1 segmentation-models-pytorch open_clip_torch diffusers transformers
onnx onnxruntime onnxscript

    python export_libraries.py --out DIR [--only REGEX] [--exporter smp|open_clip|diffusers|transformers|transformers-fused]

Models of segmentation-models-pytorch, open_clip and diffusers are exported by TorchScript (`.ts`) and by torch.export
(`.dy`), as their documentation shows. `transformers` are written by its own exporter; `transformers-fused` too, with
its fusions for onnxruntime.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import torch
from torch import nn

Inputs = dict[str, torch.Tensor]
Made = tuple[nn.Module, Inputs]
SEGMENTATION = {
    "Unet": "resnet18 mobilenet_v2 timm-mobilenetv3_small_075 mit_b0 mobileone_s0",
    "UnetPlusPlus": "mobilenet_v2",
    "MAnet": "mobilenet_v2",
    "Linknet": "resnet18 timm-efficientnet-b0",
    "FPN": "mobilenet_v2 mit_b0",
    "PSPNet": "resnet18",
    "PAN": "mobilenet_v2",
    "DeepLabV3": "mobilenet_v2",
    "DeepLabV3Plus": "mobilenet_v2 timm-tf_efficientnet_lite0",
    "UPerNet": "resnet18",
    "Segformer": "mobilenet_v2 mit_b0",
    "DPT": "tu-vit_tiny_patch16_224",
}
"""Decoders of segmentation-models-pytorch, and encoders."""
TEXT = {"context_length": 16, "vocab_size": 200, "width": 64, "heads": 4, "layers": 2}
VISION = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 16, "layers": 2}
CLIPS: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": VISION, "text_cfg": TEXT},
    "vit_quickgelu": {"vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True},
    "vit_pooled": {"vision_cfg": VISION | {"attentional_pool": True, "attn_pooler_heads": 4}, "text_cfg": TEXT},
    "vit_scaled": {"vision_cfg": VISION | {"ls_init_value": 0.5, "pool_type": "avg"}, "text_cfg": TEXT},
    "resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}, "text_cfg": TEXT},
    "convnext": {
        "vision_cfg": {"image_size": 64, "timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
}
"""Settings of the models of open_clip."""
_LATENT = {"sample": (2, 4, 8, 8), "timestep": (), "encoder_hidden_states": (2, 7, 32)}
_BLOCKS = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
_CROSS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
          "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 32}  # fmt: skip
_TALL = {"attention_head_dim": 16, "num_attention_heads": 4}
DIFFUSERS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "unet": ("UNet2DModel", {"sample_size": 16, "in_channels": 3, "out_channels": 3, **_BLOCKS, "attention_head_dim": 8,
             "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
             {"sample": (2, 3, 16, 16), "timestep": ()}),
    "unet_resnet": ("UNet2DModel", {"sample_size": 16, **_BLOCKS, "attention_head_dim": 8, "in_channels": 3,
                    "out_channels": 3, "down_block_types": ("ResnetDownsampleBlock2D", "SkipDownBlock2D"),
                    "resnet_time_scale_shift": "scale_shift", "up_block_types": ("SkipUpBlock2D", "ResnetUpsampleBlock2D")},
                    {"sample": (2, 3, 16, 16), "timestep": ()}),
    "unet_condition": ("UNet2DConditionModel", {"sample_size": 8, **_BLOCKS, **_CROSS, "attention_head_dim": 8}, _LATENT),
    "unet_condition_linear": ("UNet2DConditionModel", {"sample_size": 8, **_BLOCKS, **_CROSS, "attention_head_dim": (4, 8),
                              "use_linear_projection": True, "transformer_layers_per_block": (1, 2)}, _LATENT),
    "unet_1d": ("UNet1DModel", {"block_out_channels": (32, 32, 64), "extra_in_channels": 16, "sample_size": 64},
                {"sample": (2, 2, 64), "timestep": (2,)}),
    "unet_3d": ("UNet3DConditionModel", {"sample_size": 8, **_BLOCKS, "cross_attention_dim": 32, "attention_head_dim": 8,
                "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
                {"sample": (2, 4, 3, 8, 8), "timestep": (), "encoder_hidden_states": (2, 7, 32)}),
    "kandinsky_prior": ("PriorTransformer", {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
                        "embedding_dim": 32, "num_embeddings": 7, "additional_embeddings": 4},
                        {"hidden_states": (2, 32), "timestep": (), "proj_embedding": (2, 32),
                         "encoder_hidden_states": (2, 7, 32)}),
    "dit": ("DiTTransformer2DModel", {**_TALL, "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8,
            "patch_size": 2, "num_embeds_ada_norm": 10},
            {"hidden_states": (2, 4, 8, 8), "timestep": (2,), "class_labels": (2,)}),
    "pixart": ("PixArtTransformer2DModel", {**_TALL, "num_layers": 2, "sample_size": 8, "cross_attention_dim": 64,
               "caption_channels": 32}, {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 7, 32), "timestep": (2,)}),
    "sd3": ("SD3Transformer2DModel", {"sample_size": 8, "in_channels": 4, "num_layers": 2, "attention_head_dim": 16,
            "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 64, "pooled_projection_dim": 24,
            "out_channels": 4, "pos_embed_max_size": 16},
            {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 7, 32), "pooled_projections": (2, 24),
             "timestep": (2,)}),
    "sana": ("SanaTransformer2DModel", {"in_channels": 4, "out_channels": 4, "num_layers": 2, **_TALL, "sample_size": 8,
             "num_cross_attention_heads": 4, "cross_attention_head_dim": 16, "cross_attention_dim": 64,
             "caption_channels": 32},
             {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 7, 32), "timestep": (2,)}),
    "vae": ("AutoencoderKL", {**_BLOCKS, "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2}, {"sample": (2, 3, 16, 16)}),
    "vae_tiny": ("AutoencoderTiny", {"encoder_block_out_channels": (16, 24), "decoder_block_out_channels": (24, 16),
                 "num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1)}, {"sample": (2, 3, 16, 16)}),
    "vae_deep": ("AutoencoderDC", {"encoder_block_out_channels": (32, 64), "decoder_block_out_channels": (32, 64),
                 "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1), "attention_head_dim": 16,
                 "encoder_block_types": ("ResBlock", "EfficientViTBlock"), "latent_channels": 8,
                 "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_qkv_multiscales": ((), (5,)),
                 "decoder_qkv_multiscales": ((), (5,))}, {"sample": (2, 3, 32, 32)}),
    "vq": ("VQModel", {**_BLOCKS, "down_block_types": ("DownEncoderBlock2D",) * 2, "num_vq_embeddings": 32,
           "up_block_types": ("UpDecoderBlock2D",) * 2}, {"sample": (2, 3, 16, 16)}),
}  # fmt: skip  # a table
"""Models of diffusers: class, settings, and shapes of the inputs."""
TRANSFORMERS: dict[str, str] = {
    "text": "bert albert roberta electra deberta-v2 distilbert mpnet modernbert xlm-roberta convbert roformer nystromformer "
            "megatron-bert esm camembert funnel fnet rembert mobilebert squeezebert",
    "causal": "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neo gpt_neox gptj opt bloom falcon mpt "
              "olmo olmo2 olmoe granite starcoder2 stablelm cohere glm helium smollm3 qwen2_moe qwen3_moe mixtral persimmon "
              "codegen biogpt xglm nemotron glm4 ministral exaone4 arcee seed_oss mamba mamba2 rwkv deepseek_v3 gpt_oss",
    "seq2seq": "t5 mt5 bart mbart pegasus marian m2m_100 blenderbot-small longt5 umt5 switch_transformers",
    "image": "vit deit beit swin swinv2 convnext convnextv2 dinov2 resnet regnet mobilenet_v1 mobilenet_v2 mobilevit levit "
             "poolformer pvt pvt_v2 segformer cvt hiera vit_msn focalnet bit efficientnet ijepa dinov2_with_registers "
             "data2vec-vision textnet swiftformer efficientformer dinov3_vit dinov3_convnext vit_mae",
    "audio": "wav2vec2 hubert wavlm unispeech sew wav2vec2-conformer audio-spectrogram-transformer wav2vec2-bert",
}  # fmt: skip  # a table
"""Types of transformers by what they read."""
CLASSES = {"text": "AutoModelForSequenceClassification", "causal": "AutoModelForCausalLM", "audio": "AutoModel",
           "seq2seq": "AutoModelForSeq2SeqLM", "image": "AutoModelForImageClassification"}  # fmt: skip
MODULES = {
    "smp": "segmentation_models_pytorch perturb",
    "open_clip": "open_clip tiny",
    "diffusers": "diffusers.models.unets.unet_2d_condition tiny",
    "transformers": "transformers.exporters.exporter_onnx tiny",
    "transformers-fused": "transformers.exporters.exporter_onnx tiny",
}
"""Modules that the models of an exporter need."""


def segmentation(decoder: str, encoder: str) -> Made:
    """Build a model of segmentation-models-pytorch, its batch norms calibrated on noise."""
    import segmentation_models_pytorch as smp
    from perturb import perturb

    size = {"img_size": 64} if "vit" in encoder else {}
    model = getattr(smp, decoder)(encoder_name=encoder, encoder_weights=None, classes=3, **size)
    image = torch.randn(4, 3, 64, 64) if size else torch.randn(2, 3, 96, 96)
    return perturb(model, [image]), {"image": image[:2]}


def clip(settings: dict[str, Any]) -> Made:
    """Build a model of open_clip, which compares an image with a text."""
    import open_clip
    import tiny

    model = open_clip.CLIP(embed_dim=32, **settings)
    size = settings["vision_cfg"]["image_size"]
    return tiny.perturbed(model), {"image": torch.randn(2, 3, size, size), "text": torch.randint(1, 200, (2, 16))}


def diffuser(kind: str, settings: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Made:
    """Build a model of diffusers that returns a tuple."""
    import diffusers
    import tiny

    model = tiny.perturbed(getattr(diffusers, kind)(**settings))
    inputs = {
        name: torch.randint(1, 9, shape) if name in ("timestep", "class_labels") else torch.randn(shape)
        for name, shape in shapes.items()
    }
    return _Plain(model, list(inputs)), inputs


class _Plain(nn.Module):
    """A model of diffusers that takes its inputs by position and returns the tensor that it makes."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        """Take the model and the names of its inputs."""
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the first output."""
        return self.model(**dict(zip(self.names, inputs, strict=True)), return_dict=False)[0]


def by_torch(make: Callable[[], Made], path: Path, *, dynamo: bool) -> None:
    """Export a model by one of torch's exporters, with a free batch size where the model allows it."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model, inputs = make()
    args, names = tuple(inputs.values()), list(inputs)
    free = {name: {0: "batch"} for name, tensor in inputs.items() if tensor.ndim > 0}
    for axes in (free, None):
        shapes = tuple(axes.get(name) for name in names) if axes else None
        if isinstance(model, _Plain) and shapes:
            shapes = (shapes,)
        how = {"dynamic_shapes": shapes, "external_data": False} if dynamo else {"dynamic_axes": axes}
        try:
            torch.onnx.export(
                model.eval(), args, str(path), dynamo=dynamo, input_names=names, opset_version=18,
                verbose=False, **how,
            )  # fmt: skip
            return
        except Exception:
            if axes is None:
                raise


def by_transformers(kind: str, what: str, path: Path, *, fused: bool) -> None:
    """Export a model by the exporter of transformers, with free sizes."""
    import onnx_ir
    import tiny
    import transformers
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    torch.set_num_threads(2)
    torch.manual_seed(0)
    config = tiny.config_of(kind)
    config.use_cache = False
    model = tiny.perturbed(getattr(transformers, CLASSES[what]).from_config(config))
    words = torch.randint(4, 60, (2, 12))
    inputs: dict[str, torch.Tensor] = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    if what == "seq2seq":
        inputs["decoder_input_ids"] = torch.randint(4, 60, (2, 9))
    elif what == "image":
        inputs = {"pixel_values": torch.randn(2, 3, 64, 64)}
    elif what == "audio":
        name = model.main_input_name
        width = getattr(config, "num_mel_bins", None) or getattr(config, "feature_projection_input_dim", 160)
        inputs = {name: torch.randn(2, 1600) if name == "input_values" and "spectrogram" not in kind
                  else torch.randn(2, 64, width)}  # fmt: skip
    exporter = OnnxExporter()
    settings = {"ort_fusions": "cpu"} if fused else {}
    exported = exporter.export(model, inputs, config=OnnxConfig(dynamic=what != "image", **settings))
    onnx_ir.save(exported.program, str(path))


def jobs(exporter: str) -> Iterator[common.Job]:
    """List the models of an exporter."""
    made: dict[str, Callable[[], Made]] = {}
    if exporter == "smp":
        made = {
            f"{decoder}-{encoder}": partial(segmentation, decoder, encoder)
            for decoder, encoders in SEGMENTATION.items()
            for encoder in encoders.split()
        }
    elif exporter == "open_clip":
        made = {name: partial(clip, settings) for name, settings in CLIPS.items()}
    elif exporter == "diffusers":
        made = {name: partial(diffuser, *entry) for name, entry in DIFFUSERS.items()}
    for name, make in made.items():
        for suffix, dynamo in (("ts", False), ("dy", True)):
            yield common.Job(f"{name}.{suffix}", name.partition("-")[0], partial(by_torch, make, dynamo=dynamo), high=9)
    if exporter in ("transformers", "transformers-fused"):
        fused = exporter == "transformers-fused"
        for what, kinds in TRANSFORMERS.items():
            for kind in kinds.split():
                build = partial(by_transformers, kind, what, fused=fused)
                dims = {"sequence_length": 1600} if what == "audio" else {}
                if not fused or what != "image":
                    yield common.Job(kind, kind, build, dims=dims)


def _warm() -> None:
    """Load what exports need before processes are forked for the models, each of which would load it for itself."""
    torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as folder:
        for dynamo in (False, True):
            path = str(Path(folder) / "warm.onnx")
            torch.onnx.export(nn.Linear(2, 2), (torch.zeros(2, 2),), path, dynamo=dynamo, verbose=False)


def main() -> None:
    """Export the models selected by the command line."""
    libraries = {"smp": "segmentation_models_pytorch", "open_clip": "open_clip_torch", "diffusers": "diffusers",
                 "transformers": "transformers", "transformers-fused": "transformers"}  # fmt: skip
    args = common.arguments(__doc__, exporter=list(libraries))
    _warm()
    for exporter in [args.exporter] if args.exporter else libraries:
        for module in MODULES[exporter].split():
            import_module(module)
        common.run(jobs(exporter), args, exporter=exporter, version=version(libraries[exporter]))


if __name__ == "__main__":
    main()
