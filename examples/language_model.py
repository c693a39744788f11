"""Compress a small decoder-only transformer over bytes of text, and compare its perplexity.

    python examples/language_model.py
    python examples/language_model.py TEXT

The text is the source code of this package, or your own file. The script trains the network for some seconds; the rest
uses only the ONNX model and unlabelled text. Heads, their dimensions, the hidden widths of the MLPs and the width of
the residual stream are separate groups, and all of them can shrink.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from shared import Task, arguments, compare, export
from torch import Tensor, nn
from torch.nn import functional as F

import cpd_onnx
from cpd_onnx.data.metrics import open_session

CONTEXT, WIDTH, HEADS, LAYERS, BYTES = 64, 96, 4, 3, 256
Tokens = npt.NDArray[np.int64]


class Block(nn.Module):
    """Causal attention, then an MLP, each with a shortcut."""

    def __init__(self) -> None:
        """Create the layers."""
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.register_buffer("future", torch.full((CONTEXT, CONTEXT), -1e4).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream [N, CONTEXT, WIDTH] after the block."""
        normal = self.before(x)
        query, key, value = (
            part(normal).view(-1, CONTEXT, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        match = query @ key.transpose(2, 3) / math.sqrt(WIDTH // HEADS) + self.future
        mixed = (match.softmax(-1) @ value).transpose(1, 2).reshape(-1, CONTEXT, WIDTH)
        x = x + self.out(mixed)
        after: Tensor = x + self.mlp(self.between(x))
        return after


class Decoder(nn.Module):
    """Decoder with the scores of all positions in one axis, so that distillation compares distributions."""

    def __init__(self) -> None:
        """Create the layers."""
        super().__init__()
        self.table, self.place = nn.Embedding(BYTES, WIDTH), nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, BYTES)

    def forward(self, text: Tensor) -> Tensor:
        """Return the scores [N * CONTEXT, 256] of the next bytes of texts [N, CONTEXT]."""
        scores: Tensor = self.head(self.last(self.blocks(self.table(text) + self.place)))
        return scores.reshape(-1, BYTES)


def windows(path: Path | None) -> tuple[Tokens, Tokens]:
    """Return windows of CONTEXT + 1 bytes for training and testing; every twentieth stretch of text is for testing."""
    files = [path] if path is not None else sorted(Path(cpd_onnx.__file__).parent.rglob("*.py"))
    text = np.frombuffer(b"\n".join(file.read_bytes() for file in files), np.uint8).astype(np.int64)
    rows = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    is_test = np.arange(len(rows)) // 20 % 20 == 19
    return rows[~is_test], rows[is_test]


def train(rows: Tokens, steps: int, rng: np.random.Generator) -> Decoder:
    """Train a decoder to predict the next byte."""
    model, text = Decoder(), torch.from_numpy(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        batch = text[rng.integers(0, len(text), 16)]
        loss = F.cross_entropy(model(batch[:, :-1]), batch[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model


def perplexity(model: onnx.ModelProto, rows: Tokens) -> float:
    """Return the perplexity of the next byte: the exponential of the mean cross-entropy; 256 is a uniform guess."""
    (scores,) = open_session(model).run(None, {"text": rows[:, :-1]})
    return math.exp(F.cross_entropy(torch.from_numpy(scores), torch.from_numpy(rows[:, 1:].reshape(-1))).item())


def main() -> None:
    """Train, export, compress and print the comparison."""
    given = arguments(__doc__, "text")
    rng = np.random.default_rng(0)
    rows, test = windows(given.text)
    test = test[: 32 if given.quick else 256]
    trained = train(rows, 5 if given.quick else 250, rng)
    model = export(trained, torch.from_numpy(rows[:2, :-1]), ["text", "scores"])
    task = Task(
        "Language model, bytes",
        "perplexity",
        judge=lambda proto: perplexity(proto, test),
        data={"text": rng.permutation(rows)[:1024, :-1]},
        recipe={"steps": 2 if given.quick else 50, "lr": 1e-3, "batch_size": 16, "temperature": 1.0},
        macs=0.5,
        samples=16 if given.quick else 64,
    )
    compare(model, task, given.out)


if __name__ == "__main__":
    main()
