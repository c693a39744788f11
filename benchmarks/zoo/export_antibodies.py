"""Export IgLM, a causal language model of antibodies, and make sequences for it.

    python benchmarks/zoo/export_antibodies.py FOLDER

It needs torch, onnxscript, transformers, and the packages iglm and airrship. IgLM (Shuai et al., Cell Systems 2023) is a GPT-2 of
13 million parameters whose package holds its trained weights. airrship (Sutherland and Cowan, Bioinformatics 2023) assembles
antibodies from human genes with the frequencies and mutations of real ones; they are translated, and their first residues are
the samples. FOLDER/iglm.onnx gives logits for tokens [N, 112]; train.npz has 4,000 samples, test.npz 1,000 others.
"""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch
import transformers

LENGTH, MADE, TRAINED, TESTED = 110, 9000, 4000, 1000
"""Residues of a sample, sequences that are made, and samples."""
ACIDS = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"
"""Amino acids of the codons in the order T, C, A, G; * ends a protein."""


class Logits(torch.nn.Module):
    """The logits of a language model, without a cache."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return logits [N, length, tokens]."""
        return self.model(input_ids=input_ids, use_cache=False).logits


def sequences(folder: Path) -> list[str]:
    """Return different human heavy chains."""
    command = [Path(sys.executable).with_name("airrship"), "-o", "made", "--number_seqs", str(MADE), "--outdir", folder]
    subprocess.run([*command, "--seed", "7", "--shm"], check=True, capture_output=True)
    acid = dict(zip(map("".join, product("TCAG", repeat=3)), ACIDS, strict=True))
    found: dict[str, None] = {}
    with (folder / "made.tsv").open() as stream:
        for row in csv.DictReader(stream, delimiter="\t"):
            bases = row["sequence"].upper()
            chain = "".join(acid.get(bases[at : at + 3], "*") for at in range(0, len(bases) - 2, 3))
            if "*" not in chain and len(chain) >= LENGTH:
                found[chain[:LENGTH]] = None
    return list(found)


def main() -> None:
    """Write the model and the samples."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    trained = Path(importlib.util.find_spec("iglm").submodule_search_locations[0]) / "trained_models"
    token = {line.strip(): place for place, line in enumerate((trained / "vocab.txt").read_text().splitlines())}
    rows = [[token["[HEAVY]"], token["[HUMAN]"], *(token[acid] for acid in chain)] for chain in sequences(folder)]
    samples = np.asarray(rows, np.int64)
    np.savez(folder / "train.npz", input_ids=samples[:TRAINED])
    np.savez(folder / "test.npz", input_ids=samples[TRAINED : TRAINED + TESTED])
    model = transformers.GPT2LMHeadModel.from_pretrained(trained / "IgLM", attn_implementation="eager").eval()
    batch = torch.export.Dim("batch", min=1, max=512)
    torch.onnx.export(
        Logits(model), (torch.from_numpy(samples[:8]),), folder / "iglm.onnx", dynamo=True, opset_version=18,
        input_names=["input_ids"], output_names=["logits"], dynamic_shapes={"input_ids": {0: batch}}, external_data=False,
    )  # fmt: skip  # one call


if __name__ == "__main__":
    main()
