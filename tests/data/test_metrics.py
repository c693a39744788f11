"""Metrics, against values worked out by hand."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

pytest.importorskip("torchmetrics")

from onnx import ModelProto, parser

from cpd_onnx.data.metrics import METRICS, Scored, evaluate, lower_is_better, metric_of, open_session
from cpd_onnx.data.sources import LABELS, ArraySource, read_npz
from cpd_onnx.errors import DataError
from cpd_onnx.passes.sensitivity import ERROR

Array = npt.NDArray[Any]


def model(shape: str, factor: float = 1.0, offset: float = 0.0) -> ModelProto:
    """y = factor x + offset."""
    return parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[{shape}] x) => (float[{shape}] y) '
        f"<float a = {{{factor}}}, float b = {{{offset}}}> {{ m = Mul(x,a) y = Add(m,b) }}"
    )


def source(x: Any, labels: Any = None) -> ArraySource:
    arrays = {"x": np.asarray(x, np.float32)}
    return ArraySource(arrays if labels is None else arrays | {LABELS: np.asarray(labels)})


SCORES = [[3.0, 1.0], [0.0, 2.0], [5.0, 4.0], [0.0, 1.0]]


def test_top1_is_the_share_of_right_answers() -> None:
    assert evaluate(model("N,2"), source(SCORES, [0, 1, 1, 1]), "top1") == 0.75
    assert evaluate(model("N,2"), source(SCORES, [0, 255, 1, 255]), "top1") == 0.5


def test_top1_against_a_reference_is_agreement() -> None:
    assert evaluate(model("N,2"), source(SCORES), "top1", reference=model("N,2", -1.0)) == 0.0
    assert evaluate(model("N,2"), source(SCORES), "top1", reference=model("N,2", 2.0)) == 1.0


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_result_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    data, reference = source(SCORES, [0, 1, 1, 1]), model("N,2", 1.5, 1.0)
    assert evaluate(model("N,2"), data, "top1", batch_size=batch_size) == 0.75
    assert evaluate(model("N,2"), data, "mse", reference=reference, batch_size=batch_size) == pytest.approx(
        np.square(0.5 * np.array(SCORES) + 1).mean()
    )


def test_model_of_fixed_batch_size_is_filled_up() -> None:
    data = source(SCORES[:3], [0, 1, 1])
    assert evaluate(model("2,2"), data, "top1") == pytest.approx(2 / 3)
    assert evaluate(model("2,2"), data, "mse", reference=model("N,2", 1.0, 2.0)) == pytest.approx(4.0)
    assert evaluate(model("N,2"), data, "mse", reference=model("2,2", 1.0, 2.0)) == pytest.approx(4.0)


def test_top5_counts_the_five_largest() -> None:
    scores = np.arange(8.0)[None].repeat(4, 0)
    assert evaluate(model("N,8"), source(scores, [7, 3, 2, 0]), "top5") == 0.5
    assert evaluate(model("N,2"), source(SCORES, [0, 0, 0, 0]), "top5") == 1.0


def wins(outputs: list[Array], labels: list[Array]) -> float:
    """A metric of a user's own: the share of samples whose first score is the larger."""
    assert len(outputs[0]) == len(labels[0])
    return float((outputs[0][:, 0] > outputs[0][:, 1]).mean())


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_function_is_a_metric(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_metrics", SimpleNamespace(wins=wins, number=3))
    result = evaluate(model("N,2"), source(SCORES, [0, 1, 1, 1]), "my_metrics:wins", batch_size=batch_size)
    assert result == pytest.approx(0.5)
    for name, message in (("my_metrics:number", "is a int"), ("no_such:f", "cannot be imported")):
        with pytest.raises(DataError, match=message):
            evaluate(model("N,2"), source(SCORES, [0, 1, 1, 1]), name)


@pytest.mark.parametrize(
    ("name", "said", "is_lower"),
    [
        ("rmse", None, True),
        ("my_loss", None, True),
        ("L1Loss", None, True),
        ("mean_absolute_error_at_5", None, True),
        ("accuracy", None, False),
        ("errorless", None, False),
        ("rmse", False, False),
        ("accuracy", True, True),
    ],
)
def test_a_function_says_its_direction_or_has_it_by_its_name(
    name: str, said: bool | None, is_lower: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(outputs: list[Array], labels: list[Array]) -> float:
        return wins(outputs, labels)

    if said is not None:
        own.lower_is_better = said  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "loss_functions", SimpleNamespace(**{name: own}))
    metric = metric_of(f"loss_functions:{name}")
    assert metric.lower_is_better == is_lower
    assert metric.function(iter([Scored([np.asarray([[1.0, 0.0]])], [np.zeros(1)])])) == 1.0
    assert lower_is_better(metric.as_json()) == is_lower
    assert metric.as_json() == {"metric": f"loss_functions:{name}", "lower_is_better": is_lower}


def test_named_metrics_have_a_direction() -> None:
    assert {name for name in METRICS if metric_of(name).lower_is_better} == {"mse"}
    assert {name for name in METRICS if lower_is_better(metric_of(name).as_json())} == {"mse"}
    assert lower_is_better({"metric": ERROR})
    assert not lower_is_better({"metric": None})


def test_labels_beyond_the_classes_are_refused() -> None:
    with pytest.raises(DataError, match="label 7 is not one of the 2 classes"):
        evaluate(model("N,2"), source(SCORES, [0, 7, 1, 1]), "top1")


def test_miou_is_the_mean_over_the_classes_that_occur() -> None:
    predicted = np.array([[0, 0, 1], [2, 1, 1]])
    scores = np.moveaxis(np.eye(4)[predicted], -1, 0)[None]
    labels = np.array([[[0, 1, 1], [0, 1, 255]]])
    # class 0: 1 of 3 (two true, two predicted, one common); class 1: 2 of 3; class 2 is predicted but never true
    assert evaluate(model("N,4,2,3"), source(scores, labels), "miou") == pytest.approx((1 / 3 + 2 / 3) / 3)


def test_miou_adds_up_over_batches() -> None:
    generator = np.random.default_rng(0)
    scores, labels = generator.normal(size=(5, 3, 4, 4)), generator.integers(0, 3, (5, 4, 4))
    labels[0] = 0
    data = source(scores, labels)
    assert evaluate(model("N,3,4,4"), data, "miou", batch_size=1) == evaluate(model("N,3,4,4"), data, "miou")


def test_cosine() -> None:
    data = source([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert evaluate(model("N,2"), data, "cosine", reference=model("N,2", 3.0)) == pytest.approx(1.0)
    shifted = evaluate(model("N,2"), source([[1.0, 0.0]]), "cosine", reference=model("N,2", 1.0, 1.0))
    assert shifted == pytest.approx(2 / np.sqrt(5))


def test_session_is_taken_as_it_is() -> None:
    assert evaluate(open_session(model("N,2")), source(SCORES, [0, 1, 0, 1]), "top1") == 1.0


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(DataError, match="no array 'labels'"):
        evaluate(model("N,2"), source(SCORES), "top1")
    with pytest.raises(DataError, match="give the reference"):
        evaluate(model("N,2"), source(SCORES), "mse")
    with pytest.raises(DataError, match=r"labels have shape \[4, 1\]"):
        evaluate(model("N,2"), source(SCORES, np.zeros((4, 1), int)), "top1")
    with pytest.raises(DataError, match="no axis of classes"):
        evaluate(model("N"), source([1.0, 2.0], [0, 1]), "top1")
    with pytest.raises(DataError, match="no samples to score"):
        evaluate(model("N,2"), source(SCORES, [255] * 4), "miou")
    with pytest.raises(DataError, match="unknown metric 'f1'"):
        evaluate(model("N,2"), source(SCORES), "f1")


def test_example_model_is_what_its_manifest_says() -> None:
    folder = Path(__file__).parents[2] / "models"
    entry = json.loads((folder / "manifest.json").read_text())["digits.onnx"]
    content = (folder / "digits.onnx").read_bytes()
    assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    test = ArraySource(read_npz(folder / "digits_test.npz"))
    assert evaluate(onnx.load_from_string(content), test, "top1") == pytest.approx(entry["accuracy"], abs=2e-3)


def test_outputs_of_other_shapes_are_refused() -> None:
    reference = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,2] x) => (float[N] y) { y = ReduceSum<keepdims=0>(x) }'
    )
    with pytest.raises(DataError, match="the model's outputs have shapes"):
        evaluate(model("N,2"), source(SCORES), "mse", reference=reference)
