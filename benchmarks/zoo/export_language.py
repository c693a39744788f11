"""Export small random language models as the programs that run them do.

    python benchmarks/zoo/export_language.py OUT [--by genai|optimum] [--only NAME]

writes OUT/NAME-genai-PRECISION (fp32, fp16, int4) by the model builder of onnxruntime-genai, and OUT/NAME-optimum by
`optimum-cli export onnx`, each with its configuration and a tokenizer. Each exporter needs an environment of its own:

    pip install torch==2.13.0 onnx-ir onnxruntime-genai transformers
    pip install torch==2.13.0 optimum-onnx
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = 200
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip  # a table
GATED = {"intermediate_size": 192, "num_key_value_heads": 3}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GATED),
    "mistral": ("Mistral", GATED),
    "qwen2": ("Qwen2", GATED),
    "qwen3": ("Qwen3", {**GATED, "head_dim": 16}),
    "gemma": ("Gemma", {**GATED, "head_dim": 16}),
    "opt": ("OPT", {"ffn_dim": 192, "word_embed_proj_dim": 96}),
    "gptneox": ("GPTNeoX", {"intermediate_size": 192}),
    "gpt2": ("GPT2", {"n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 256}),
}
"""Families by name: prefix of the classes of transformers, and sizes besides `SIZES`."""
OF_GENAI = ("llama", "mistral", "qwen2", "qwen3", "gemma")
PRECISIONS = {"fp32": "cpu", "int4": "cpu", "fp16": "cuda"}
"""Precisions of the model builder, and the provider that it builds them for."""
_CLASSES = {"GPT2": "GPT2LMHeadModel"}


def make(name: str, folder: Path) -> None:
    """Write a random model of a family, with a tokenizer, as transformers stores it."""
    torch.manual_seed(0)
    prefix, more = FAMILIES[name]
    sizes = {key: value for key, value in SIZES.items() if name != "gpt2" or key.endswith(("vocab_size", "token_id"))}
    config = getattr(transformers, f"{prefix}Config")(**sizes, **more)
    getattr(transformers, _CLASSES.get(prefix, f"{prefix}ForCausalLM"))(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"t{word}": word for word in range(WORDS)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "t1", "eos_token": "t2", "unk_token": "t0", "pad_token": "t0"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def by_genai(name: str, source: Path, out: Path) -> None:
    """Export by the model builder; the configuration then names no provider, so that the model runs on the CPU."""
    for precision, provider in PRECISIONS.items():
        target = out / f"{name}-genai-{precision}"
        words = ["-i", source, "-o", target, "-p", precision, "-e", provider, "-c", out / "cache"]
        done = subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, words)], check=False)
        path = target / "genai_config.json"
        if done.returncode or not path.is_file():
            continue
        content = json.loads(path.read_text())
        content["model"]["decoder"]["session_options"]["provider_options"] = []
        path.write_text(json.dumps(content, indent=4))


def by_optimum(name: str, source: Path, out: Path) -> None:
    """Export by optimum, with caches."""
    words = ["export", "onnx", "-m", source, "--task", "text-generation-with-past", out / f"{name}-optimum"]
    subprocess.run([Path(sys.executable).parent / "optimum-cli", *map(str, words)], check=False)


def main() -> None:
    """Make and export all models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--by", choices=("genai", "optimum"), required=True)
    parser.add_argument("--only", choices=FAMILIES, action="append")
    options = parser.parse_args()
    for name in options.only or (OF_GENAI if options.by == "genai" else FAMILIES):
        source = options.out / "sources" / name
        make(name, source)
        {"genai": by_genai, "optimum": by_optimum}[options.by](name, source, options.out)


if __name__ == "__main__":
    main()
