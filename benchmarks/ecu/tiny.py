"""The image classification network of MLPerf Tiny (ResNet-8), trained here on CIFAR-10, pruned and taken to a Cortex-M4F.

    python benchmarks/ecu/tiny.py --data-folder DATA [--epochs N] [--model FILE]

DATA is a folder with `load.py` and CIFAR-10. The layout is that of the benchmark's reference implementation (Banbury et al.,
MLPerf Tiny Benchmark, NeurIPS 2021): 12.5 M MACs, 78 k parameters. It is trained with labels from scratch, on the CPU in
about half an hour, and exported by torch; `--model` takes the file of an earlier run. Then the table of `binary.py` is made
of it, with `compress` in place of `prune`: it also distills, on 10,000 training images without labels. The other three
networks of the benchmark need other data.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from binary import ROOT, Task, loaded, measured, pixels, show
from emulated import missing
from torch import Tensor, nn
from torch.nn import functional as F

from cpd_onnx.ir.model import Array

RESULT = ROOT / "benchmarks" / "results" / "tiny.json"
BATCH = 128
RATE, DECAY = 0.4, 5e-4
GIVEN = 10_000
"""Number of training images that `compress` gets, without labels."""


class Block(nn.Module):
    """Two convolutions and a shortcut, which is one of 1x1 where the size changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet8(nn.Module):
    """The reference network for CIFAR-10."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.relu(self.stem_norm(self.stem(x))))
        scores: Tensor = self.head(y.mean((2, 3)))
        return scores


def train(images: Array, labels: Array, epochs: int, seed: int = 0) -> ResNet8:
    """Return the network after training with shifted and mirrored images and one cycle of the learning rate."""
    torch.manual_seed(seed)
    x, y = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
    net = ResNet8().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), RATE, 0.9, weight_decay=DECAY, nesterov=True)
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, epochs * steps, pct_start=0.2)
    for epoch in range(epochs):
        order, total = torch.randperm(len(x)), 0.0
        for step in range(steps):
            rows = order[step * BATCH : (step + 1) * BATCH]
            batch = shifted(x[rows]).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(net(batch), y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"epoch {epoch + 1} of {epochs}: loss {total / steps:.3f}", flush=True)
    return net.eval()


def shifted(x: Tensor) -> Tensor:
    """Return images moved by up to four pixels, half of them mirrored, alike in a batch but for the mirror."""
    down, right = torch.randint(0, 9, (2,)).tolist()
    moved = F.pad(x, (4, 4, 4, 4))[:, :, down : down + 32, right : right + 32]
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, moved.flip(3), moved)


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--model", type=Path, help="the trained file: read if it exists, else written")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if missing():
        sys.exit(f"not installed: {', '.join(missing())}")
    module: Any = loaded(options.data_folder / "load.py")
    (given, labels), (tested, truth) = module.cifar10("train"), module.cifar10("test")
    with tempfile.TemporaryDirectory() as folder:
        place = options.model or Path(folder) / "resnet8.onnx"
        if not place.exists():
            net = train(pixels(given), labels, options.epochs)
            sample = torch.zeros(1, 3, 32, 32)
            torch.onnx.export(
                net, (sample,), place, dynamo=False, input_names=["image"], output_names=["scores"],
                dynamic_axes={"image": {0: "batch"}, "scores": {0: "batch"}},
            )  # fmt: skip  # a table
        task = Task("resnet8", place, pixels(given[:GIVEN]), pixels(tested), truth, ("compress", "--epochs", "5"))
        rows = measured(task, Path(folder))
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
