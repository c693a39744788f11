"""Export small random language models with the model builder of onnxruntime-genai.

Environment: pip install torch==2.13.0 onnx-ir onnxruntime-genai transformers onnx onnxruntime

    python export_builder.py --out DIR [--only REGEX]

The folders that the programs need to run the models are written by export_language.py; here, only the graphs are kept.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import tiny
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

KINDS: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {}, "gemma": {}, "gemma2": {}, "gemma3_text": {}, "phi": {}, "phi3": {},
    "olmo": {}, "nemotron": {}, "granite": {}, "smollm3": {}, "gpt_oss": {}, "ernie4_5": {}, "hunyuan_v1_dense": {},
}  # fmt: skip  # a table
"""Types of transformers that the builder knows, with settings besides those of all."""
WIDE = {
    "hidden_size": 128,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
}
PRECISIONS: dict[str, list[str]] = {
    "fp32": ["-p", "fp32", "-e", "cpu"],
    "fp16": ["-p", "fp16", "-e", "cuda"],
    "int4": ["-p", "int4", "-e", "cpu"],
    "int4-blocks": ["-p", "int4", "-e", "cpu", "--extra_options", "int4_block_size=16", "int4_is_symmetric=false"],
}
"""Precisions, with the arguments of the builder."""


def build(kind: str, precision: str, folder: Path) -> None:
    """Write a random model as transformers stores it, with a tokenizer, and run the builder on it."""
    torch.manual_seed(0)
    config = tiny.config_of(kind, **WIDE, **KINDS[kind])
    with tempfile.TemporaryDirectory() as source:
        model = tiny.perturbed(transformers.AutoModelForCausalLM.from_config(config))
        model.save_pretrained(source)
        tokenizer = Tokenizer(models.WordLevel({f"t{word}": word for word in range(tiny.WORDS)}, unk_token="t0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        special = {"bos_token": "t1", "eos_token": "t2", "unk_token": "t0", "pad_token": "t0"}
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(source)
        words = ["-i", source, "-o", str(folder), *PRECISIONS[precision], "-c", str(Path(source) / "cache")]
        subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", *words], check=True)


def jobs() -> Iterator[common.Job]:
    """List the types in all precisions; what is run has a past of 16 words."""
    for kind in KINDS:
        for precision in PRECISIONS:
            dims = {"batch_size": 1, "sequence_length": 4, "past_sequence_length": 16, "total_sequence_length": 20,
                    "kv_cache_dim": WIDE["head_dim"]}  # fmt: skip
            yield common.Job(f"{kind}.{precision}", kind, partial(build, kind, precision), dims=dims)


def main() -> None:
    """Export the models selected by the command line."""
    args = common.arguments(__doc__)
    common.run(jobs(), args, exporter="genai", version=version("onnxruntime-genai"), parts=True)


if __name__ == "__main__":
    main()
