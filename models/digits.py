"""Train the example model: a small residual network on scikit-learn's handwritten digits, written as ONNX.

    python models/digits.py

writes to its own folder `digits.onnx`, the split as `digits_train.npz` and `digits_test.npz` (arrays named like the
model's input, and `labels`, in the format of `--data`), and the model's entry in `manifest.json`. It needs torch and
scikit-learn, and takes about one minute on one core. The architecture has the structures that make pruning difficult:
residual sums, a depthwise and a grouped convolution, a concatenation and squeeze-and-excitation.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpd_onnx.data.metrics import evaluate
from cpd_onnx.data.sources import LABELS, ArraySource

HERE = Path(__file__).parent
INPUT = "image"
EPOCHS, BATCH, RATE, SEED = 80, 64, 3e-3, 0

Arrays = dict[str, npt.NDArray[Any]]


def split() -> tuple[Arrays, Arrays]:
    """Return a fixed, stratified split of the digits: 1,000 to train, 797 to test, images [N, 1, 8, 8] in 0..1."""
    from sklearn.datasets import load_digits  # slow to import
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images[:, None] / 16).astype(np.float32)
    labels = digits.target.astype(np.int64)
    parts = train_test_split(images, labels, test_size=797, random_state=SEED, stratify=labels)
    return {INPUT: parts[0], LABELS: parts[2]}, {INPUT: parts[1], LABELS: parts[3]}


def conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution followed by batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


class Squeeze(nn.Module):
    """Squeeze-and-excitation: scales each channel by a function of the spatial means of all channels."""

    def __init__(self, channels: int) -> None:
        """Create the two layers that compute the scales."""
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the channels of x [N, C, H, W]."""
        scale = self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1))))
        scaled: Tensor = x * torch.sigmoid(scale)
        return scaled


class Residual(nn.Module):
    """Two convolutions, squeeze-and-excitation, and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Create the layers; the shortcut is a convolution if the shape changes."""
        super().__init__()
        self.conv1, self.conv2 = conv(inputs, outputs, 3, stride=stride), conv(outputs, outputs, 3)
        self.scale = Squeeze(outputs)
        self.shortcut = conv(inputs, outputs, 1, stride=stride) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block for x [N, C, H, W]."""
        branch: Tensor = self.scale(self.conv2(F.relu(self.conv1(x))))
        return F.relu(branch + self.shortcut(x))


class Inverted(nn.Module):
    """The inverted residual block of MobileNetV2: expansion, depthwise convolution, projection and a residual sum."""

    def __init__(self, channels: int, width: int) -> None:
        """Create the three convolutions."""
        super().__init__()
        self.widen, self.filter = conv(channels, width, 1), conv(width, width, 3, groups=width)
        self.narrow = conv(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block for x [N, C, H, W]."""
        branch: Tensor = self.narrow(F.relu(self.filter(F.relu(self.widen(x)))))
        return x + branch


class Digits(nn.Module):
    """A network of about 210,000 parameters: stem, residual blocks, an inverted block and two concatenated branches."""

    def __init__(self) -> None:
        """Create the layers."""
        super().__init__()
        self.stem = conv(1, 32, 3)
        self.block1, self.block2 = Residual(32, 32, 1), Residual(32, 64, 2)
        self.block3 = Inverted(64, 128)
        self.left, self.right = conv(64, 48, 3, groups=4), conv(64, 48, 1)
        self.block4 = Residual(96, 64, 2)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores [N, 10] of images [N, 1, 8, 8]."""
        x = self.block3(self.block2(self.block1(F.relu(self.stem(x)))))
        x = F.relu(torch.cat([self.left(x), self.right(x)], 1))
        scores: Tensor = self.head(self.block4(x).mean((2, 3)))
        return scores


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images, each shifted by a random step of up to one pixel."""
    padded = F.pad(images, [1, 1, 1, 1])
    steps = torch.randint(0, 3, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, steps, strict=True)])


def train(data: Arrays) -> Digits:
    """Train from random weights; the same seed gives the same model on the same machine."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = Digits().train()
    images, labels = torch.from_numpy(data[INPUT]), torch.from_numpy(data[LABELS])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-2)
    steps = EPOCHS * (len(images) // BATCH)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        for rows in torch.split(order[: len(order) // BATCH * BATCH], BATCH):
            loss = F.cross_entropy(model(shifted(images[rows], generator)), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            optimizer.step()
            scheduler.step()
    return model.eval()


def export(model: Digits, path: Path) -> None:
    """Write the model with opset 17 and a symbolic batch size; BatchNormalization is preserved for further training."""
    with warnings.catch_warnings():
        # torch's newer exporter needs onnxscript, and the older one warns that it is deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            model,
            (torch.zeros(2, 1, 8, 8),),
            str(path),
            input_names=[INPUT],
            output_names=["scores"],
            dynamic_axes={INPUT: {0: "batch"}, "scores": {0: "batch"}},
            opset_version=17,
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
        )


def main() -> None:
    """Train, export and evaluate the model, and write its manifest."""
    torch.set_num_threads(1)  # the layers are too small for more, and results then do not depend on the number of cores
    training, test = split()
    for name, part in (("train", training), ("test", test)):
        np.savez_compressed(HERE / f"digits_{name}.npz", image=part[INPUT], labels=part[LABELS])
    path = HERE / "digits.onnx"
    model = train(training)
    export(model, path)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    manifest = HERE / "manifest.json"
    entries = json.loads(manifest.read_text()) if manifest.exists() else {}
    entries["digits.onnx"] = {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "command": "python models/digits.py",
        "parameters": sum(p.numel() for p in model.parameters()),
        "metric": "top1 with onnxruntime on digits_test.npz",
        "accuracy": evaluate(proto, ArraySource(test), "top1"),
        "data": "UCI Optical Recognition of Handwritten Digits (CC BY 4.0), as shipped with scikit-learn",
        "torch": torch.__version__,
    }
    manifest.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
