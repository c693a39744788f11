"""Mean average precision of detections, as COCO computes it; pycocotools is imported on first use."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from cpd_onnx.data.detection import LEAST_SCORE, Detections, detections
from cpd_onnx.data.signature import Array, Batch
from cpd_onnx.errors import DataError, UnsupportedError

_COUNTED = 0.25
"""Score from which a detection of a reference model counts as an object (as YOLOv5 and YOLOv8 show them)."""
_SIDES = (1, 3)
"""Numbers of channels of images."""


@dataclass(frozen=True)
class Shown:
    """What a detector saw.

    Attributes:
        size: Height and width of its input.
        images: Number of images.
        names: Names of its outputs.
        detector: Kind of detector; None to tell it by the outputs.
    """

    size: tuple[int, int]
    images: int
    names: tuple[str, ...] = ()
    detector: str | None = None

    @classmethod
    def of(cls, batch: Batch, names: tuple[str, ...]) -> Shown | None:
        """Return the description of a batch of images; None if no array has four axes and 1 or 3 channels."""
        for array in batch.values():
            if array.ndim == 4 and (array.shape[1] in _SIDES or array.shape[3] in _SIDES):
                height, width = array.shape[2:] if array.shape[1] in _SIDES else array.shape[1:3]
                return cls((height, width), len(array), names)
        return None


Pair: TypeAlias = tuple[Sequence[Array], Sequence[Array], Shown | None]


def average_precision(pairs: Iterable[Pair]) -> float:
    """Return the mean average precision over overlaps from 0.5 to 0.95 (COCO's AP), from 0 to 1.

    Args:
        pairs: For each batch, the outputs of a detector, what they are compared with, and what the detector saw. The
            targets are boxes [N, most, 5] in pixels (left, upper, right, lower, class; -1 marks unused rows), or the
            outputs of another detector, of whose detections the certain ones count.

    Raises:
        DataError: The inputs are no images, the outputs no detections, or there is no object at all.
        UnsupportedError: pycocotools is not installed.
    """
    found: list[Detections] = []
    wanted: list[Array] = []
    for outputs, targets, shown in pairs:
        if shown is None:
            raise DataError("metric map needs images as input; choose another metric")
        found += _decoded(outputs, shown, LEAST_SCORE)
        wanted += _objects(targets, shown)
    return _score(found, wanted)


def _decoded(outputs: Sequence[Array], shown: Shown, least: float) -> list[Detections]:
    return detections(
        outputs, shown.size, names=shown.names, detector=shown.detector, least_score=least, images=shown.images
    )


def _objects(targets: Sequence[Array], shown: Shown) -> list[Array]:
    """Return the boxes and classes [n, 5] of each image."""
    if len(targets) == 1 and targets[0].ndim == 3 and targets[0].shape[2] == 5:
        return [rows[rows[:, 4] >= 0] for rows in targets[0]]
    if len(targets) == 1 and targets[0].ndim < 3:
        raise DataError(f"labels have shape {list(targets[0].shape)}, but metric map needs boxes [N, boxes, 5]")
    found = _decoded(targets, shown, _COUNTED)
    return [np.concatenate([entry.boxes, entry.classes[:, None]], 1) for entry in found]


def _score(found: Sequence[Detections], wanted: Sequence[Array]) -> float:
    coco, evaluation = (_module(f"pycocotools.{name}") for name in ("coco", "cocoeval"))
    objects = [
        {"id": 0, "image_id": image, "category_id": int(row[4]), "iscrowd": 0} | _box(row[:4])
        for image, rows in enumerate(wanted)
        for row in rows
    ]
    if not objects:
        raise DataError("the samples contain no objects to find")
    for number, entry in enumerate(objects):
        entry["id"] = number + 1  # 0 would not be matched
    answers = [
        {"image_id": image, "category_id": int(label), "score": float(score)} | _box(box)
        for image, entry in enumerate(found)
        for box, score, label in zip(entry.boxes, entry.scores, entry.classes, strict=True)
    ]
    if not answers:
        return 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = {
            "images": [{"id": image} for image in range(len(wanted))],
            "categories": [{"id": label} for label in sorted({entry["category_id"] for entry in objects})],
            "annotations": objects,
        }
        truth.createIndex()
        scored = evaluation.COCOeval(truth, truth.loadRes(answers), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return float(scored.stats[0])


def _box(edges: Array) -> dict[str, Any]:
    left, top, right, bottom = map(float, edges)
    return {"bbox": [left, top, right - left, bottom - top], "area": (right - left) * (bottom - top)}


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UnsupportedError("metric map needs pycocotools: pip install 'cpd-onnx[detection]'") from error
