"""Compress a small U-Net that finds circles, squares and triangles in noisy images.

    python examples/segmentation.py

The script generates the data and trains the network for some seconds; the rest uses only the ONNX model and unlabelled
images, as with a model from a third party.
"""

from __future__ import annotations

import numpy as np
import torch
from shared import KINDS, Arrays, Task, arguments, compare, export, shapes, shuffled
from torch import Tensor, nn
from torch.nn import functional as F

from cpd_onnx.data.metrics import evaluate
from cpd_onnx.data.sources import LABELS, ArraySource

WIDTHS = (12, 24, 48)


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Return two convolutions with batch normalisation and ReLU."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net with two levels: features of the encoder are concatenated in the decoder."""

    def __init__(self) -> None:
        """Create the layers."""
        super().__init__()
        one, two, three = WIDTHS
        self.down1, self.down2, self.middle = block(3, one), block(one, two), block(two, three)
        self.widen2, self.up2 = nn.ConvTranspose2d(three, two, 2, 2), block(2 * two, two)
        self.widen1, self.up1 = nn.ConvTranspose2d(two, one, 2, 2), block(2 * one, one)
        self.head = nn.Conv2d(one, 1 + len(KINDS), 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return scores [N, classes, H, W] of images [N, 3, H, W]."""
        first = self.down1(image)
        second = self.down2(F.max_pool2d(first, 2))
        third = self.middle(F.max_pool2d(second, 2))
        second = self.up2(torch.cat([self.widen2(third), second], 1))
        first = self.up1(torch.cat([self.widen1(second), first], 1))
        scores: Tensor = self.head(first)
        return scores


def train(data: Arrays, steps: int, rng: np.random.Generator) -> UNet:
    """Train with labels; the background, which is the majority, gets less weight."""
    model, weight = UNet(), torch.tensor([0.3, 1.0, 1.0, 1.0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    images, labels = torch.from_numpy(data["image"]), torch.from_numpy(data[LABELS])
    for rows in shuffled(rng, len(images), 32, steps):
        loss = F.cross_entropy(model(images[rows]), labels[rows], weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model


def main() -> None:
    """Generate data, train, export, compress and print the comparison."""
    given = arguments(__doc__)
    rng = np.random.default_rng(0)
    (data, _), (test, _) = (shapes(rng, count) for count in ((256, 128) if given.quick else (1024, 512)))
    trained = train(data, 5 if given.quick else 120, rng)
    model = export(trained, torch.zeros(2, 3, 32, 32), ["image", "scores"])
    task = Task(
        "Segmentation, U-Net",
        "mIoU",
        judge=lambda proto: evaluate(proto, ArraySource(test), "miou"),
        data={"image": data["image"]},
        recipe={"steps": 2 if given.quick else 40, "lr": 3e-3, "batch_size": 32},
        macs=0.4,
        samples=16 if given.quick else 64,
    )
    compare(model, task, given.out)


if __name__ == "__main__":
    main()
