"""Compress a small single-shot detector of circles, squares and triangles: boxes and scores in one forward pass.

    python examples/detection.py

Each cell of an 8 x 8 grid predicts a class (nothing, or one of three shapes) and the bounding box of the shape. The
script generates the data and trains the network for some seconds; the rest uses only the ONNX model and unlabelled
images.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import torch
from shared import KINDS, Box, Task, arguments, compare, export, shapes, shuffled
from torch import Tensor, nn
from torch.nn import functional as F

from cpd_onnx.data.metrics import open_session

SIZE, CELL = 32, 4
GRID = SIZE // CELL
Objects = list[list[tuple[int, Box]]]


def layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Detector(nn.Module):
    """Residual backbone down to the grid, with one head for boxes and one for scores."""

    def __init__(self) -> None:
        """Create the layers."""
        super().__init__()
        self.stem = nn.Sequential(layer(3, 16), layer(16, 32, 2), layer(32, 48, 2))
        self.blocks = nn.ModuleList(nn.Sequential(layer(48, 48), layer(48, 48)) for _ in range(2))
        self.boxes, self.scores = nn.Conv2d(48, 4, 1), nn.Conv2d(48, 1 + len(KINDS), 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return boxes [N, 4, GRID, GRID], in cells from the centre of each, and scores [N, classes, GRID, GRID]."""
        x = self.stem(image)
        for block in self.blocks:
            x = x + block(x)
        return self.boxes(x), self.scores(x)


def targets(objects: Objects) -> tuple[Tensor, Tensor]:
    """Return the target boxes and classes of the cells; a shape belongs to the cell that contains its centre."""
    boxes, classes = np.zeros((len(objects), 4, GRID, GRID), np.float32), np.zeros((len(objects), GRID, GRID), np.int64)
    for number, found in enumerate(objects):
        for kind, (left, top, right, bottom) in found:
            column, row = (int((a + b) / 2 / CELL) for a, b in ((left, right), (top, bottom)))
            middle = np.array([column, row, column, row]) + 0.5
            boxes[number, :, row, column] = np.array([left, top, right, bottom]) / CELL - middle
            classes[number, row, column] = kind
    return torch.from_numpy(boxes), torch.from_numpy(classes)


def train(images: Tensor, objects: Objects, steps: int, rng: np.random.Generator) -> Detector:
    """Train with boxes and classes; empty cells, which are the majority, get less weight."""
    model, weight = Detector(), torch.tensor([0.2, 1.0, 1.0, 1.0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    boxes, classes = targets(objects)
    for rows in shuffled(rng, len(images), 32, steps):
        said, scores = model(images[rows])
        is_there = (classes[rows] > 0)[:, None].expand_as(said)
        loss = F.cross_entropy(scores, classes[rows], weight)
        loss = loss + F.smooth_l1_loss(said[is_there], boxes[rows][is_there])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return model


def decoded(boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the boxes [cells, 4] of one image in pixels."""
    rows, columns = np.mgrid[:GRID, :GRID] + 0.5
    return ((boxes + np.stack([columns, rows, columns, rows])) * CELL).reshape(4, -1).T.astype(np.float32)


def overlap(box: npt.NDArray[np.float32], other: Box) -> float:
    """Return the intersection over union of two boxes."""
    sides = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    areas = [float(np.prod(np.maximum(np.subtract(b[2:], b[:2]), 0))) for b in (box, other)]
    return shared / (sum(areas) - shared) if shared else 0.0


def average_precision(model: onnx.ModelProto, images: npt.NDArray[np.float32], objects: Objects) -> float:
    """Return the mean over the classes of the average precision, at an intersection over union of 0.5."""
    boxes, scores = open_session(model).run(None, {"image": images})
    sure = np.exp(scores - scores.max(1, keepdims=True))
    sure = (sure / sure.sum(1, keepdims=True)).reshape(len(images), 1 + len(KINDS), -1)
    places = [decoded(each) for each in boxes]
    precisions = []
    for kind in range(1, 1 + len(KINDS)):
        order = np.argwhere(sure[:, kind] > 0.05)
        order = order[np.argsort(-sure[order[:, 0], kind, order[:, 1]], kind="stable")]
        left = [[box for k, box in found if k == kind] for found in objects]
        total, hits = sum(map(len, left)), []
        for image, cell in order:
            best = max(left[image], key=lambda box: overlap(places[image][cell], box), default=None)
            hits.append(best is not None and overlap(places[image][cell], best) >= 0.5)
            if hits[-1]:
                left[image].remove(best)
        found = np.cumsum(hits)
        precision = np.maximum.accumulate((found / np.arange(1, len(hits) + 1))[::-1])[::-1]
        precisions.append(float(precision[np.array(hits, bool)].sum()) / total if total else 0.0)
    return float(np.mean(precisions))


def main() -> None:
    """Generate data, train, export, compress and print the comparison."""
    given = arguments(__doc__)
    rng = np.random.default_rng(0)
    (data, known), (test, wanted) = (shapes(rng, count) for count in ((256, 64) if given.quick else (1024, 256)))
    trained = train(torch.from_numpy(data["image"]), known, 5 if given.quick else 200, rng)
    model = export(trained, torch.zeros(2, 3, SIZE, SIZE), ["image", "boxes", "scores"])
    task = Task(
        "Detection, single shot",
        "mAP at 0.5",
        judge=lambda proto: average_precision(proto, test["image"], wanted),
        data={"image": data["image"]},
        recipe={
            "steps": 2 if given.quick else 60,
            "lr": 3e-3,
            "batch_size": 32,
            "losses": {"boxes": "mse", "scores": "kl"},
        },
        macs=0.4,
        samples=32 if given.quick else 128,
    )
    compare(model, task, given.out)


if __name__ == "__main__":
    main()
