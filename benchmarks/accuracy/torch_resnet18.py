"""Train ResNet-18 for 32x32 images in torch on labelled images, or prune it by torch-pruning, and export it to ONNX.

    python benchmarks/accuracy/torch_resnet18.py train IMAGES OUT --classes 43 [--share 1.0] [--epochs 12] [--device cuda]
    python benchmarks/accuracy/torch_resnet18.py prune WEIGHTS OUT --share 0.5
    python benchmarks/accuracy/torch_resnet18.py export WEIGHTS OUT [--share 1.0]

IMAGES is an .npz with `input` [N, 3, 32, 32] and `labels` [N]. OUT.onnx is the exported model, OUT.pt its weights. The
widths are those of He et al. 2016, 64 to 512, times --share, in multiples of 8. `prune` needs torch-pruning and keeps
the ratio --share of the channels of each layer, by L2 over coupled channels, in multiples of 8.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

WIDTHS = (64, 128, 256, 512)
"""Channels of the four stages (He et al. 2016)."""
MULTIPLE = 8
"""Divisor of all widths."""


class Block(nn.Module):
    """Residual block of two convolutions, with a convolution as the shortcut if shapes change."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        changes = stride > 1 or before != width
        shortcut = [nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)] if changes else []
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18: four stages of two blocks, the first at full resolution."""

    def __init__(self, classes: int, share: float = 1.0) -> None:
        super().__init__()
        widths = [max(1, round(width * share / MULTIPLE)) * MULTIPLE for width in WIDTHS]
        self.conv1, self.bn1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0])
        blocks: list[Block] = []
        for stage, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            blocks += [Block(before, width, 2 if stage else 1), Block(width, width, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


def trained(
    network: ResNet18, images: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int, batch: int = 64
) -> None:
    """Train by AdamW on shifted images with a one-cycle learning rate and bfloat16 autocast, on the device of the images."""
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    network.to(images.device, memory_format=torch.channels_last).train()  # twice as fast in bfloat16
    started = time.perf_counter()
    for epoch in range(epochs):
        total = torch.zeros((), device=images.device)
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for chosen in order.split(batch)[: len(images) // batch]:
            top, left = torch.randint(0, 5, (2,), generator=generator).tolist()
            x = F.pad(images[chosen], (2, 2, 2, 2))[:, :, top : top + 32, left : left + 32]
            with torch.autocast(images.device.type, torch.bfloat16):
                loss = F.cross_entropy(network(x).float(), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        seconds = time.perf_counter() - started
        print(f"epoch {epoch + 1}: {total.item() / (len(images) // batch):.4f}, {seconds:.0f} s", flush=True)


def export(network: nn.Module, out: Path) -> None:
    """Write the ONNX model, with its BatchNormalization, and the weights."""
    network.cpu().eval()
    torch.save(network.state_dict(), f"{out}.pt")
    torch.onnx.export(
        network, (torch.randn(1, 3, 32, 32),), f"{out}.onnx", input_names=["input"], output_names=["logits"],
        dynamic_axes={"input": {0: "n"}, "logits": {0: "n"}}, training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False, dynamo=False,
    )  # fmt: skip  # one call


def main() -> None:
    """Train or prune, then export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("train", "prune", "export"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--classes", type=int, default=43)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    if options.job == "train":
        network = ResNet18(options.classes, options.share)
        with np.load(options.source) as archive:
            images, labels = torch.from_numpy(archive["input"]), torch.from_numpy(archive["labels"].astype(np.int64))
        if options.epochs:
            trained(network, images.to(options.device), labels.to(options.device), options.epochs, options.seed)
    else:
        weights = torch.load(options.source)
        network = ResNet18(len(weights["linear.weight"]), options.share if options.job == "export" else 1.0)
        network.load_state_dict(weights)
        network.eval()
    if options.job == "prune":
        import torch_pruning as tp

        tp.pruner.BasePruner(
            network, torch.randn(1, 3, 32, 32), importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=1 - options.share, round_to=MULTIPLE, ignored_layers=[network.linear],
        ).step()  # fmt: skip  # one call
    export(network, options.out)


if __name__ == "__main__":
    main()
