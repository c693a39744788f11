"""Detections: every kind of head gives the boxes that were encoded in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import numpy_helper, parser

from cpd_onnx.data.agreement import _BoxTally
from cpd_onnx.data.detection import Detections, detections, detector_of
from cpd_onnx.data.metrics import evaluate
from cpd_onnx.data.precision import Shown, average_precision
from cpd_onnx.data.sources import LABELS, ArraySource
from cpd_onnx.errors import DataError

Array = npt.NDArray[Any]
SIZE = (64, 96)
CELLS = 8 * 12 + 4 * 6 + 2 * 3
"""Rows of heads with strides 8, 16 and 32."""
BOX = (40.0, 12.0, 60.0, 30.0)
CENTRE = (50.0, 21.0, 20.0, 18.0)


def rows(count: int, columns: int, row: Sequence[float], place: int = 0) -> Array:
    """A head without any score, but for one row and its less certain neighbour."""
    head = np.zeros((1, count, columns), np.float32)
    head[0, :, :2] = np.linspace(0, 60, count)[:, None]
    head[0, place, : len(row)] = row
    head[0, place + 1, : len(row)] = row
    head[0, place + 1, 4:] *= 0.9
    return head


def relative() -> Array:
    """A head of YOLOX: in row 2, column 6 of the cells of stride 8."""
    head = rows(CELLS, 8, (0, 0, 0, 0, 0.9, 0.0, 1.0, 0.0), place=2 * 12 + 6)
    head[..., :4] = 0
    head[0, 30, :4] = 50 / 8 - 6, 21 / 8 - 2, np.log(20 / 8), np.log(18 / 8)
    head[0, 31, :4] = 50 / 8 - 7, 21 / 8 - 2, np.log(20 / 8), np.log(18 / 8)
    return head


DECODED = rows(CELLS, 8, (*CENTRE, 0.9, 0.0, 1.0, 0.0))
ONE = np.array([BOX], np.float32)
FRACTIONS = ONE / [96, 64, 96, 64]
MASKED = np.concatenate([rows(CELLS, 7, (*CENTRE, 0.0, 0.9, 0.0)), np.ones((1, CELLS, 32), np.float32)], 2)
HEADS: dict[str, tuple[str, list[Array], list[str]]] = {
    "yolox": ("yolox", [relative()], []),
    "yolox decoded": ("yolox", [DECODED], []),
    "yolov5": ("yolov5", [rows(3 * CELLS, 8, (*CENTRE, 0.9, 0.0, 1.0, 0.0))], []),
    "yolov8": ("yolov8", [rows(CELLS, 7, (*CENTRE, 0.0, 0.9, 0.0)).transpose(0, 2, 1)], []),
    "yolov8 with masks": (
        "yolov8",
        [MASKED.transpose(0, 2, 1), np.zeros((1, 32, 16, 24), np.float32)],
        [],
    ),
    "yolov10": ("nms", [np.array([[[*BOX, 0.9, 1], [0, 0, 0, 0, 0, 0]]], np.float32)], []),
    "yolov7 with suppression": ("nms", [np.array([[0, *BOX, 1, 0.9]], np.float32)], []),
    "openvino": ("nms", [np.array([[[[0, 1, 0.9, *FRACTIONS[0]], [-1, 0, 0, 0, 0, 0, 0]]]], np.float32)], []),
    "torchvision": ("nms", [ONE, np.array([1]), np.array([0.9], np.float32)], ["boxes", "labels", "scores"]),
    "tensorflow": (
        "nms",
        [FRACTIONS[None, :, [1, 0, 3, 2]], np.ones((1, 1), np.float32), np.ones(1), np.array([[0.9]], np.float32)],
        ["detection_boxes", "detection_classes", "num_detections", "detection_scores"],
    ),
}


def assert_found(found: Detections) -> None:
    np.testing.assert_allclose(found.boxes, [BOX], atol=1e-3)
    np.testing.assert_allclose(found.scores, [0.9], atol=1e-6)
    assert found.classes.tolist() == [1]


@pytest.mark.parametrize("name", HEADS)
def test_the_encoded_box_is_found(name: str) -> None:
    kind, outputs, names = HEADS[name]
    assert detector_of(outputs, SIZE) == kind
    (found,) = detections(outputs, SIZE, names=names)
    assert_found(found)


def test_boxes_of_other_classes_and_other_places_survive() -> None:
    head = np.zeros((2, CELLS, 8), np.float32)
    head[1, 0] = *CENTRE, 1.0, 0.6, 0.8, 0.0
    head[1, 1] = 20, 40, 10, 10, 0.5, 0.0, 0.0, 1.0
    nothing, found = detections([head], SIZE, detector="yolox", least_score=0.1)
    assert len(nothing.scores) == 0
    assert found.classes.tolist() == [1, 0, 2]
    np.testing.assert_allclose(found.scores, [0.8, 0.6, 0.5])


def test_an_image_in_which_the_original_finds_nothing_shows_nothing() -> None:
    """The constant answer that nothing is there agrees on it."""
    head = np.zeros((4, CELLS, 8), np.float32)
    head[0, 0] = *CENTRE, 1.0, 0.0, 0.8, 0.0
    tally = _BoxTally(SIZE, [], "yolox")
    tally.add([head], [head])
    assert tally.values().tolist() == [1, 1, 1, 1]
    assert tally.chance() == 0.75


def test_images_without_detections_are_listed_too() -> None:
    outputs = [np.array([[0, *BOX, 1, 0.9]], np.float32)]
    assert [len(found.scores) for found in detections(outputs, SIZE, images=3)] == [1, 0, 0]


@pytest.mark.parametrize("shape", [(4, 10), (1, 12, 64, 96), (1, 7, 5), (2, 50, 6), (1, CELLS, 4)])
def test_other_outputs_are_not_decoded(shape: tuple[int, ...]) -> None:
    outputs = [np.random.default_rng(0).normal(size=shape).astype(np.float32)]
    assert detector_of(outputs, SIZE) is None
    with pytest.raises(DataError, match="choose one of yolox, yolov5, yolov8, nms with --detector"):
        detections(outputs, SIZE)
    with pytest.raises(DataError, match="not those of detector 'yolov5'"):
        detections(outputs, SIZE, detector="yolov5")


# The metric.


def shown_to(outputs: list[Array]) -> Shown:
    return Shown(SIZE, len(outputs[0]))


def truth(*boxes: Sequence[float]) -> Array:
    padding = [(-1.0,) * 5] * (2 - len(boxes))
    return np.array([[*boxes, *padding]], np.float32)


@pytest.mark.parametrize(
    ("wanted", "score"),
    [
        ([(*BOX, 1)], 1.0),
        ([(*BOX, 2)], 0.0),
        ([(*BOX, 1), (0, 0, 9, 9, 1)], 0.5),
        ([(40, 12, 60, 24, 1)], 0.4),  # overlap 2/3: found at 0.50, 0.55, 0.60 and 0.65, of ten thresholds
    ],
)
def test_average_precision(wanted: list[tuple[float, ...]], score: float) -> None:
    pytest.importorskip("pycocotools")
    outputs = HEADS["yolov5"][1]
    found = average_precision([(outputs, [truth(*wanted)], shown_to(outputs))])
    assert found == pytest.approx(score, abs=0.01)


def test_detections_of_a_reference_are_the_objects_without_labels() -> None:
    pytest.importorskip("pycocotools")
    outputs = HEADS["yolov8"][1]
    assert average_precision([(outputs, outputs, shown_to(outputs))]) == pytest.approx(1.0)


def test_what_cannot_be_scored_is_refused() -> None:
    pytest.importorskip("pycocotools")
    outputs = HEADS["yolov5"][1]
    with pytest.raises(DataError, match="needs images as input"):
        average_precision([(outputs, [truth()], None)])
    with pytest.raises(DataError, match="contain no objects to find"):
        average_precision([(outputs, [truth()], shown_to(outputs))])
    with pytest.raises(DataError, match=r"labels have shape \[1\], but metric map needs boxes"):
        average_precision([(outputs, [np.zeros(1, np.int64)], shown_to(outputs))])


def test_metric_map_of_a_model() -> None:
    pytest.importorskip("pycocotools")
    head = numpy_helper.from_array(HEADS["yolov5"][1][0], "head")
    proto = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1,3,64,96] x) => (float[1,A,8] y) '
        "{ m = ReduceMax<keepdims = 0>(x) y = Mul(head, m) }"
    )
    proto.graph.initializer.append(head)
    images = np.ones((3, 3, 64, 96), np.float32)
    source = ArraySource({"x": images, LABELS: np.repeat(truth((*BOX, 1)), 3, 0)})
    assert evaluate(proto, source, "map") == pytest.approx(1.0)
    assert evaluate(proto, source, "map", reference=proto) == pytest.approx(1.0)
    with pytest.raises(DataError, match="not those of detector 'yolov8'"):
        evaluate(proto, source, "map", detector="yolov8")
