"""How good a model is: accuracy, mean intersection over union, or closeness to another model.

onnxruntime runs the model and numpy counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import ModelProto

from cpd_onnx.data import LABELS, Batch, Source
from cpd_onnx.errors import DataError

Array: TypeAlias = npt.NDArray[Any]
Outputs: TypeAlias = list[Array]
Metric: TypeAlias = Literal["top1", "miou", "mse", "cosine"]
Model: TypeAlias = "ModelProto | ort.InferenceSession"

IGNORED = 255
"""The label of what does not count: void pixels."""


@dataclass(frozen=True)
class Scored:
    """One batch: what the model said, and what it is compared with."""

    outputs: Outputs
    targets: Outputs


def evaluate(
    model: Model, source: Source, metric: Metric, *, reference: Model | None = None, batch_size: int = 64
) -> float:
    """Score a model on data.

    Args:
        model: to be scored; a model whose batch size is fixed is fed with that one.
        source: the data, with labels unless there is a reference.
        metric: "top1", the share of samples (of elements, for labels with more axes) whose largest output is at the
            label; "miou", the mean intersection over union of the classes that occur, classes in axis 1 of the first
            output; "mse" and "cosine", mean squared error and mean cosine similarity of all outputs of a sample.
        reference: the model to compare with instead of the labels; for "top1" and "miou" its largest outputs count.
        batch_size: samples at a time.

    Raises:
        DataError: there is nothing to compare with, or it does not fit.
    """
    if metric not in _METRICS:
        raise ValueError(f"metric {metric!r} is not one of {', '.join(_METRICS)}")
    if metric in ("mse", "cosine") and reference is None:
        raise DataError(f"metric {metric} compares two models; give the reference")
    scored = _compare(open_session(model), source, None if reference is None else open_session(reference), batch_size)
    return _METRICS[metric](scored)


def open_session(model: Model) -> ort.InferenceSession:
    """Load a model into onnxruntime on the CPU; a session is passed on."""
    if isinstance(model, ort.InferenceSession):
        return model
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, batch: Batch) -> Outputs:
    """Outputs for the samples of a batch; filled up by repeating the last one where the model fixes a larger batch."""
    names = [entry.name for entry in session.get_inputs()]
    count = max((len(batch[name]) for name in names if batch[name].ndim), default=1)
    fixed = _fixed_size(session) or count
    feed = {name: _filled(batch[name], fixed) for name in names}
    outputs = [np.asarray(output) for output in session.run(None, feed)]
    return outputs if fixed == count else [output[:count] for output in outputs]


def _filled(array: Array, size: int) -> Array:
    if array.ndim == 0 or len(array) >= size:
        return array
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)])


def _fixed_size(session: ort.InferenceSession) -> int | None:
    sizes = [entry.shape[0] for entry in session.get_inputs() if entry.shape]
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def _compare(
    session: ort.InferenceSession, source: Source, reference: ort.InferenceSession | None, batch_size: int
) -> Iterator[Scored]:
    sizes = [size for size in (_fixed_size(one) for one in (session, reference) if one is not None) if size]
    for batch in source.batches(min(sizes, default=batch_size)):
        if reference is not None:
            yield Scored(run(session, batch), run(reference, batch))
        elif LABELS in batch:
            yield Scored(run(session, batch), [batch[LABELS]])
        else:
            raise DataError(f"the data has no array {LABELS!r} to compare with; add it or give a reference model")


def _classes(scored: Scored) -> tuple[Array, Array]:
    """Predicted and true classes, without those to be ignored, flattened."""
    scores, target = scored.outputs[0], scored.targets[0]
    if scores.ndim < 2:
        raise DataError(f"the first output has shape {list(scores.shape)}, no axis of classes; choose mse or cosine")
    if target.shape == scores.shape and target.dtype.kind == "f":
        target = target.argmax(1)
    predicted = scores.argmax(1)
    if predicted.shape != target.shape:
        raise DataError(
            f"labels have shape {list(target.shape)} but the first output {list(scores.shape)} "
            f"gives classes of shape {list(predicted.shape)}"
        )
    counts = target != IGNORED
    return predicted[counts], target[counts].astype(np.int64)


def _top1(scored: Iterator[Scored]) -> float:
    right = total = 0
    for batch in scored:
        predicted, target = _classes(batch)
        right += int((predicted == target).sum())
        total += target.size
    return right / _counted(total)


def _miou(scored: Iterator[Scored]) -> float:
    confusion = np.zeros((0, 0), np.int64)
    for batch in scored:
        predicted, target = _classes(batch)
        size = max(len(confusion), int(max(predicted.max(initial=-1), target.max(initial=-1))) + 1)
        grown = np.zeros((size, size), np.int64)
        grown[: len(confusion), : len(confusion)] = confusion
        confusion = grown + np.bincount(target * size + predicted, minlength=size * size).reshape(size, size)
    hits, occurring = confusion.diagonal(), confusion.sum(1) > 0
    _counted(int(confusion.sum()))
    unions = confusion.sum(0) + confusion.sum(1) - hits
    return float((hits[occurring] / unions[occurring]).mean())


def _mse(scored: Iterator[Scored]) -> float:
    total, count = 0.0, 0
    for batch in scored:
        for output, target in _pairs(batch):
            total += float(((output - target) ** 2).sum())
            count += output.size
    return total / _counted(count)


def _cosine(scored: Iterator[Scored]) -> float:
    similarities: list[float] = []
    for batch in scored:
        pairs = _pairs(batch)
        a, b = (np.concatenate([pair[side].reshape(len(pair[0]), -1) for pair in pairs], 1) for side in (0, 1))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        products = (a * b).sum(1)
        similarities += np.where(norms > 0, products / np.where(norms > 0, norms, 1), 1.0).tolist()
    return sum(similarities) / _counted(len(similarities))


def _pairs(scored: Scored) -> Sequence[tuple[Array, Array]]:
    shapes = [[output.shape for output in side] for side in (scored.outputs, scored.targets)]
    if shapes[0] != shapes[1]:
        raise DataError(f"the model's outputs have shapes {shapes[0]}, the reference's {shapes[1]}")
    return [
        (output.astype(np.float64), target.astype(np.float64))
        for output, target in zip(scored.outputs, scored.targets, strict=True)
    ]


def _counted(total: int) -> int:
    if total == 0:
        raise DataError("the data holds nothing to score")
    return total


_METRICS: dict[str, Callable[[Iterator[Scored]], float]] = {
    "top1": _top1,
    "miou": _miou,
    "mse": _mse,
    "cosine": _cosine,
}
