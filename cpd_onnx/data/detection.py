"""Detections in the outputs of object detectors: heads of the YOLO family, and models that contain the suppression.

`detections` decodes the outputs of one run; `detector_of` tells by their shapes which decoder fits. Boxes that overlap
a better one of their class are suppressed by onnxruntime's own `NonMaxSuppression`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto, helper

from cpd_onnx.errors import DataError
from cpd_onnx.runtime.sessions import execute, open_model

Array: TypeAlias = npt.NDArray[Any]
Size: TypeAlias = tuple[int, int]
"""Height and width of the model's input in pixels."""

LEAST_SCORE = 0.01
"""Score from which a box counts: low, because the average precision needs the uncertain ones as well (heuristic)."""
_OVERLAP = 0.65
"""Intersection over union above which the lower of two boxes of a class is suppressed (as YOLOX evaluates)."""
_MOST = 300
"""Largest number of detections of an image (as YOLOv5 and YOLOv8 evaluate)."""
_STRIDES = ((8, 16, 32), (8, 16, 32, 64))
"""Pixels from one cell of a head to the next, for the usual three heads and for large inputs."""
_NORMALISED = 2.0
"""Largest coordinate of boxes that are given as fractions of the input; detectors overshoot 1 a little (heuristic)."""


class Detections(NamedTuple):
    """The detections in one image, best first.

    Attributes:
        boxes: Left, upper, right and lower edge in pixels of the model's input, float32 [n, 4].
        scores: Confidence from 0 to 1, float32 [n].
        classes: Index of the class, int64 [n].
    """

    boxes: Array
    scores: Array
    classes: Array


def detections(
    outputs: Sequence[Array],
    size: Size,
    *,
    names: Sequence[str] = (),
    detector: str | None = None,
    least_score: float = LEAST_SCORE,
    images: int = 1,
) -> list[Detections]:
    """Return the detections in each image of a batch.

    Args:
        outputs: All outputs of one run.
        size: Height and width of the model's input.
        names: Names of the outputs, which tell boxes from scores where the shapes do not.
        detector: One of `DETECTORS`; None for the one that fits the shapes.
        least_score: Score below which a box is dropped.
        images: Number of images in the batch, for outputs that list only what was found.

    Raises:
        DataError: No decoder fits the shapes, or not the one that was named.
    """
    kind = detector or detector_of(outputs, size)
    if kind not in _DECODERS or not _FITS[kind](outputs, size):
        shapes = ", ".join(str(list(output.shape)) for output in outputs)
        asked = f"detector {kind!r}" if kind else "a known detector"
        raise DataError(
            f"outputs of shape {shapes} for an input of {size[0]}x{size[1]} are not those of {asked}: "
            f"choose one of {', '.join(DETECTORS)} with --detector"
        )
    found = _DECODERS[kind](outputs, size, list(names) or [""] * len(outputs), least_score)
    nothing = _sorted(np.zeros((0, 4)), np.zeros(0), np.zeros(0))
    return found + [nothing] * (images - len(found))


def detector_of(outputs: Sequence[Array], size: Size) -> str | None:
    """Return the name of the detector whose outputs have these shapes; None if there is none."""
    return next((name for name in DETECTORS if _FITS[name](outputs, size)), None)


# Which decoder fits.


def _cells(size: Size, anchors: int) -> dict[int, Sequence[int]]:
    """Return the strides of the heads by the number of rows that they have together."""
    height, width = size
    return {anchors * sum(-(-height // s) * -(-width // s) for s in strides): strides for strides in _STRIDES}


def _is_head(outputs: Sequence[Array], size: Size, anchors: int, axis: int, columns: int) -> bool:
    """Return whether the first output has a row for each cell along an axis, and enough columns along the other."""
    first = outputs[0] if outputs else np.zeros(0)
    return first.ndim == 3 and first.shape[axis] in _cells(size, anchors) and first.shape[3 - axis] >= columns


def _with_suppression(outputs: Sequence[Array], size: Size) -> bool:
    if len(outputs) == 1:
        found = _single(outputs[0])
        return found is not None and all(_is_plausible(scores, classes) for _, scores, classes in found)
    return _roles(outputs, [""] * len(outputs)) is not None


def _is_plausible(scores: Array, classes: Array) -> bool:
    """Return whether columns can be scores from 0 to 1 (unused rows: -1) and indices of classes."""
    return bool((np.abs(scores) <= 1).all() and (classes == np.round(classes)).all())


_FITS: dict[str, Callable[[Sequence[Array], Size], bool]] = {
    "yolox": lambda outputs, size: _is_head(outputs, size, 1, 1, 6),
    "yolov5": lambda outputs, size: _is_head(outputs, size, 3, 1, 6),
    "yolov8": lambda outputs, size: _is_head(outputs, size, 1, 2, 5),
    "nms": _with_suppression,
}


# Heads with a row for each cell.


def _yolox(outputs: Sequence[Array], size: Size, names: Sequence[str], least: float) -> list[Detections]:
    """Decode rows of centre, size, objectness and classes, whose boxes may be relative to cells (Ge et al. 2021)."""
    rows = np.asarray(outputs[0], np.float32)
    cells, strides = _grid(size, _cells(size, 1)[rows.shape[1]])
    centres, sizes = rows[..., :2], rows[..., 2:4]
    away = np.median(np.abs(centres - (cells + 0.5) * strides) / strides)
    if np.median(np.abs(centres - 0.5)) < away:
        centres, sizes = (centres + cells) * strides, np.exp(np.minimum(sizes, 10.0)) * strides
    return _best(centres, sizes, rows[..., 4:5] * rows[..., 5 : _end(outputs)], least)


def _yolov5(outputs: Sequence[Array], size: Size, names: Sequence[str], least: float) -> list[Detections]:
    """Decode rows of centre, size, objectness and classes in pixels, three anchors a cell (also YOLOv7)."""
    rows = np.asarray(outputs[0], np.float32)
    return _best(rows[..., :2], rows[..., 2:4], rows[..., 4:5] * rows[..., 5 : _end(outputs)], least)


def _yolov8(outputs: Sequence[Array], size: Size, names: Sequence[str], least: float) -> list[Detections]:
    """Decode columns of centre, size and classes in pixels (also YOLOv9, YOLO11)."""
    rows = np.asarray(outputs[0], np.float32).transpose(0, 2, 1)
    return _best(rows[..., :2], rows[..., 2:4], rows[..., 4 : _end(outputs)], least)


def _end(outputs: Sequence[Array]) -> int | None:
    """Return where the columns of classes end: those of models with masks are followed by coefficients."""
    prototypes = [output.shape[1] for output in outputs[1:] if output.ndim == 4 and output.shape[1] <= 64]
    return -prototypes[0] if len(outputs) == 2 and prototypes else None


def _grid(size: Size, strides: Sequence[int]) -> tuple[Array, Array]:
    """Return column and row [rows, 2] and stride [rows, 1] of every cell, head by head."""
    places = []
    for stride in strides:
        across, down = np.meshgrid(np.arange(-(-size[1] // stride)), np.arange(-(-size[0] // stride)))
        places.append(np.stack([across.ravel(), down.ravel()], 1).astype(np.float32))
    lengths = np.concatenate([np.full((len(p), 1), s, np.float32) for p, s in zip(places, strides, strict=True)])
    return np.concatenate(places), lengths


def _best(centres: Array, sizes: Array, scores: Array, least: float) -> list[Detections]:
    """Return the boxes that survive suppression, from centres, sizes [images, boxes, 2] and scores [.., classes]."""
    boxes = np.ascontiguousarray(np.concatenate([centres - sizes / 2, centres + sizes / 2], -1), np.float32)
    feed: dict[str, Array] = {
        "boxes": boxes,
        "scores": np.ascontiguousarray(scores.transpose(0, 2, 1), np.float32),
        "most": np.array([_MOST], np.int64),
        "overlap": np.array([_OVERLAP], np.float32),
        "least": np.array([least], np.float32),
    }
    (chosen,) = execute(_suppression(), feed)
    found = []
    for image in range(len(boxes)):
        classes, places = chosen[chosen[:, 0] == image, 1:].T
        found.append(_sorted(boxes[image, places], scores[image, places, classes], classes))
    return found


@functools.cache
def _suppression() -> ort.InferenceSession:
    inputs: dict[str, tuple[int, list[int | None]]] = {
        "boxes": (TensorProto.FLOAT, [None, None, 4]),
        "scores": (TensorProto.FLOAT, [None, None, None]),
        "most": (TensorProto.INT64, [1]),
        "overlap": (TensorProto.FLOAT, [1]),
        "least": (TensorProto.FLOAT, [1]),
    }
    graph = helper.make_graph(
        [helper.make_node("NonMaxSuppression", list(inputs), ["chosen"])],
        "suppression",
        [helper.make_tensor_value_info(name, *what) for name, what in inputs.items()],
        [helper.make_tensor_value_info("chosen", TensorProto.INT64, [None, 3])],
    )
    return open_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), threads=1)


def _sorted(boxes: Array, scores: Array, classes: Array) -> Detections:
    order = np.argsort(-np.asarray(scores, np.float32), kind="stable")[:_MOST]
    return Detections(
        np.asarray(boxes, np.float32).reshape(-1, 4)[order],
        np.asarray(scores, np.float32)[order],
        np.asarray(classes, np.int64)[order],
    )


# Models that suppress by themselves.


def _suppressed(outputs: Sequence[Array], size: Size, names: Sequence[str], least: float) -> list[Detections]:
    """Return the detections of outputs that are boxes, scores and classes, in one tensor or in several."""
    if len(outputs) == 1:
        images = _single(outputs[0])
    else:
        roles = _roles(outputs, names)
        images = None if roles is None else _several(*roles, is_rows_first="detection_boxes" in names)
    assert images is not None  # it fits
    found = []
    for boxes, scores, classes in images:
        factor = [size[1], size[0]] * 2 if boxes.size and np.abs(boxes).max() <= _NORMALISED else 1
        is_kept = scores >= max(least, 1e-6)  # unused rows have score 0 or -1
        found.append(_sorted((boxes * np.asarray(factor, np.float32))[is_kept], scores[is_kept], classes[is_kept]))
    return found


def _single(output: Array) -> list[tuple[Array, Array, Array]] | None:
    """Return boxes, scores and classes of each image from one tensor; None if its shape is another.

    [N, n, 6] has rows of box, score and class (YOLOv10, YOLO26); [n, 7] rows of image, box, class and score (YOLOv7
    with suppression); [1, 1, n, 7] rows of image, class, score and box (OpenVINO's DetectionOutput).
    """
    rows = np.asarray(output, np.float32)
    if rows.ndim == 3 and rows.shape[2] == 6:
        return [(image[:, :4], image[:, 4], image[:, 5]) for image in rows]
    if rows.ndim == 2 and rows.shape[1] == 7:
        count = int(rows[:, 0].max(initial=0)) + 1
        parts = [rows[rows[:, 0] == image] for image in range(count)]
        return [(part[:, 1:5], part[:, 6], part[:, 5]) for part in parts]
    if rows.ndim == 4 and rows.shape[:2] == (1, 1) and rows.shape[3] == 7:
        parts = [rows[0, 0][rows[0, 0, :, 0] == image] for image in range(max(int(rows[..., 0].max(initial=0)), 0) + 1)]
        return [(part[:, 3:], part[:, 2], part[:, 1]) for part in parts]
    return None


def _roles(outputs: Sequence[Array], names: Sequence[str]) -> tuple[Array, Array, Array] | None:
    """Return the boxes [.., n, 4], scores [.., n] and classes [.., n] among several outputs; None if there are none."""
    boxes = [output for output in outputs if output.ndim in (2, 3) and output.shape[-1] == 4]
    if len(boxes) != 1:
        return None
    named = [(n, o) for n, o in zip(names, outputs, strict=True) if o.shape == boxes[0].shape[:-1] and "num" not in n]
    if len(named) != 2:
        return None
    (_, first), (_, second) = sorted(named, key=lambda entry: not _is_score(entry[0], entry[1]))
    return boxes[0], first, second


def _is_score(name: str, values: Array) -> bool:
    """Return whether an output is scores rather than classes, which are whole numbers."""
    if any(word in name.lower() for word in ("class", "label", "cls")):
        return False
    is_whole = values.dtype.kind in "iu" or (values.size > 0 and bool((values == np.round(values)).all()))
    return "score" in name.lower() or not is_whole


def _several(boxes: Array, scores: Array, classes: Array, *, is_rows_first: bool) -> list[tuple[Array, Array, Array]]:
    """Return boxes, scores and classes of each image; TensorFlow's boxes begin with the upper edge."""
    if boxes.ndim == 2:
        boxes, scores, classes = boxes[None], scores[None], classes[None]
    edges = boxes[..., [1, 0, 3, 2]] if is_rows_first else boxes
    return [(b, s, c) for b, s, c in zip(np.asarray(edges, np.float32), scores, classes, strict=True)]


_DECODERS: dict[str, Callable[[Sequence[Array], Size, Sequence[str], float], list[Detections]]] = {
    "yolox": _yolox, "yolov5": _yolov5, "yolov8": _yolov8, "nms": _suppressed,
}  # fmt: skip  # a table
DETECTORS = tuple(_DECODERS)
"""Names of detectors whose outputs can be decoded."""
