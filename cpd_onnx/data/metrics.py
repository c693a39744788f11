"""Metrics of models: accuracy, mean intersection over union, or similarity to another model.

onnxruntime runs the model and torchmetrics computes the metric; torch is imported on first use.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import ModelProto

from cpd_onnx.data.precision import Shown, average_precision
from cpd_onnx.data.signature import IGNORED as IGNORED
from cpd_onnx.data.sources import LABELS, Batch, Source, imported
from cpd_onnx.errors import DataError, UnsupportedError
from cpd_onnx.io.progress import advance, step
from cpd_onnx.runtime.sessions import execute, open_model

Array: TypeAlias = npt.NDArray[Any]
Outputs: TypeAlias = list[Array]
Model: TypeAlias = "ModelProto | ort.InferenceSession"
Judge: TypeAlias = Callable[[Outputs, Outputs], float]

_SEQUENCE = 3
"""Number of axes of a sequence of vectors."""
_FUNCTION = re.compile(r"[\w.]+:\w+")
_LOWER = re.compile(r"(loss|error|mse|mae|mape|distance|divergence|perplexity)(?![a-z])")
"""Heuristic: a metric whose name has one of these words, the last part of a word or all of it, is an error."""


@dataclass(frozen=True)
class Scored:
    """Outputs of a model for one batch, and the targets that they are compared with.

    `shown` says what a detector saw; None where the inputs are no images.
    """

    outputs: Outputs
    targets: Outputs
    shown: Shown | None = None


@dataclass(frozen=True)
class Metric:
    """A metric of models.

    Attributes:
        name: Name in options.
        function: Function from all batches to the score.
        lower_is_better: Whether lower scores are better.
        of_two_models: Whether it compares the model with a reference model instead of labels.
        is_own: Whether it is a user's function.

    """

    name: str
    function: Callable[[Iterator[Scored]], float]
    lower_is_better: bool = False
    of_two_models: bool = False
    is_own: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return the name and, for a user's function, the direction, as `lower_is_better` reads them."""
        return {"metric": self.name} | ({"lower_is_better": self.lower_is_better} if self.is_own else {})


@step("evaluate")
def evaluate(
    model: Model,
    source: Source,
    metric: str,
    *,
    reference: Model | None = None,
    batch_size: int = 64,
    detector: str | None = None,
) -> float:
    """Score a model on data.

    Args:
        model: to be scored; a model whose batch size is fixed is fed with that one.
        source: the data, with labels unless there is a reference.
        metric: "top1" or "top5", the share of samples (of elements, for labels with more axes) whose label is the
            largest output, or among the five largest; "miou", the mean intersection over union of the classes that
            occur or are predicted, classes in axis 1 of the first output; "map", the mean average
            precision of detections, with labels [N, boxes, 5] as `data.images.folder` gives them; "mse" and
            "cosine", mean squared error and
            mean cosine similarity of all outputs of a sample; or "module:function", called with the outputs and the
            labels (or the reference's outputs) of a batch as lists of arrays, whose answers are averaged by sample
            (see `metric_of` for its direction).
        reference: the model to compare with instead of the labels; for "top1", "top5" and "miou" its largest outputs
            count.
        batch_size: samples at a time.
        detector: kind of detector for "map", see `data.detection`; None to tell it by the outputs.

    Raises:
        DataError: there is nothing to compare with, or it does not fit.
        UnsupportedError: torchmetrics is not installed, or onnxruntime does not run a model.
    """
    chosen = metric_of(metric)
    if chosen.of_two_models and reference is None:
        raise DataError(f"metric {metric} compares two models; give the reference")
    sessions = open_session(model), None if reference is None else open_session(reference)
    pairs = _compare(sessions[0], source, sessions[1], batch_size)
    return chosen.function(replace(scored, shown=_shown(scored.shown, detector)) for scored in pairs)


def _shown(found: Shown | None, detector: str | None) -> Shown | None:
    return found if found is None or detector is None else replace(found, detector=detector)


def metric_of(name: str) -> Metric:
    """Return the metric of a name; "module:function" is imported.

    Higher values of such a function are better unless its attribute `lower_is_better` is true or, without that
    attribute, its name is one such as "rmse" or "my_loss", see `lower_is_better`.

    Raises DataError if there is no such metric.
    """
    check_metric(name)
    if name in _METRICS:
        return _METRICS[name]
    function = imported(name, "of outputs and labels")
    is_lower = bool(getattr(function, "lower_is_better", lower_is_better({"metric": name})))
    return Metric(name, partial(_by_function, function=function), is_lower, is_own=True)


def lower_is_better(entry: Mapping[str, Any]) -> bool:
    """Return whether lower scores are better, from the entries of `Metric.as_json`; no metric is imported.

    Without an entry for the direction the name determines it: metrics of this module are known, and others are taken
    for errors if they contain a word that ends in "loss", "error", "mse", "mae", "mape", "distance", "divergence" or
    "perplexity".
    """
    recorded, name = entry.get("lower_is_better"), str(entry.get("metric"))
    if recorded is not None:
        return bool(recorded)
    known = _METRICS.get(name)
    return known.lower_is_better if known else _LOWER.search(name.rpartition(":")[2].lower()) is not None


def check_metric(metric: str) -> None:
    """Raise DataError if there is no metric of that name."""
    if metric not in METRICS and not _FUNCTION.fullmatch(metric):
        raise DataError(f"unknown metric {metric!r}: choose one of {', '.join(METRICS)} or module:function")


def open_session(model: Model, threads: int = 0) -> ort.InferenceSession:
    """Return a session of onnxruntime on the CPU with that many threads; an open session is returned as it is."""
    if isinstance(model, ort.InferenceSession):
        return model
    return open_model(model, threads=threads)


def run(session: ort.InferenceSession, batch: Batch) -> Outputs:
    """Return the outputs for a batch, padded with its last sample if the model has a larger fixed batch size."""
    names = [entry.name for entry in session.get_inputs()]
    count = max((len(batch[name]) for name in names if batch[name].ndim), default=1)
    fixed = _fixed_size(session) or count
    feed = {name: _filled(batch[name], fixed) for name in names}
    outputs = execute(session, feed)
    if fixed == count:
        return outputs
    axes = sample_axes(session, outputs, fixed)
    cut = slice(0, count)
    return [output[(slice(None),) * axis + (cut,)] for output, axis in zip(outputs, axes, strict=True)]


def answers(session: ort.InferenceSession, batch: Batch) -> Outputs:
    """Return the outputs for a batch, see `run`, with the axis of the samples first; numbers alone get an axis."""
    outputs = run(session, batch)
    count = max((len(batch[entry.name]) for entry in session.get_inputs() if batch[entry.name].ndim), default=1)
    axes = sample_axes(session, outputs, count)
    return [np.moveaxis(np.atleast_1d(output), axis, 0) for output, axis in zip(outputs, axes, strict=True)]


def sample_axes(session: ort.InferenceSession, outputs: Outputs, count: int) -> list[int]:
    """Return the axis of the samples of each output, for that many samples.

    It is the first one, but for sequences [steps, samples, values], as recurrent networks give them: where the second
    size has the name of that which the inputs begin with, or else only the second one is the number of samples.
    """
    first = next((entry.shape[0] for entry in session.get_inputs() if entry.shape), None)
    return [
        _sample_axis(entry.shape, output.shape, first if isinstance(first, str) else "", count)
        for entry, output in zip(session.get_outputs(), outputs, strict=True)
    ]


def _sample_axis(declared: Sequence[Any], shape: Sequence[int], symbol: str, count: int) -> int:
    if len(shape) != _SEQUENCE or shape[1] != count:
        return 0
    is_named = bool(symbol) and len(declared) == _SEQUENCE and symbol in declared[:2]
    return int(declared[0] != symbol if is_named else shape[0] != count)


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
    size = min(sizes, default=batch_size)
    for number, batch in enumerate(source.batches(size)):
        advance(number * size, source.count)
        shown = Shown.of(batch, tuple(output.name for output in session.get_outputs()))
        if reference is not None:
            yield Scored(run(session, batch), run(reference, batch), shown)
        elif LABELS in batch:
            yield Scored(run(session, batch), [batch[LABELS]], shown)
        else:
            raise DataError(f"the data has no array {LABELS!r} to compare with; add it or give a reference model")


def _classes(scored: Scored) -> tuple[Array, Array]:
    """Return scores [N, classes, ...] and true classes [N, ...]."""
    scores, target = scored.outputs[0], scored.targets[0]
    if scores.ndim < 2:
        raise DataError(f"the first output has shape {list(scores.shape)}, no axis of classes; choose mse or cosine")
    if target.shape == scores.shape and target.dtype.kind == "f":
        target = target.argmax(1)
    if scores.shape[:-1] == target.shape != scores.shape[:1] + scores.shape[2:]:
        scores = np.moveaxis(scores, -1, 1)  # classes last, as in TensorFlow
    if scores.shape[:1] + scores.shape[2:] != target.shape:
        raise DataError(
            f"labels have shape {list(target.shape)} but the first output {list(scores.shape)} "
            f"gives classes of shape {[*scores.shape[:1], *scores.shape[2:]]}"
        )
    outside = target[(target != IGNORED) & ((target < 0) | (target >= scores.shape[1]))]
    if outside.size:
        raise DataError(f"label {outside[0]} is not one of the {scores.shape[1]} classes; label {IGNORED} is ignored")
    return scores.astype(np.float32), target.astype(np.int64)


def _of_classes(scored: Iterator[Scored], make: Callable[[Any, int], Any]) -> float:
    """Return a classification metric of torchmetrics, created when the number of classes is known."""
    torch, classification = _torch("torch"), _torch("torchmetrics.classification")
    metric: Any = None
    counted = 0
    for batch in scored:
        scores, target = _classes(batch)
        metric = metric or make(classification, scores.shape[1])
        metric.update(torch.from_numpy(scores), torch.from_numpy(target))
        counted += int((target != IGNORED).sum())
    _counted(counted)
    return float(metric.compute())


def _top1(scored: Iterator[Scored]) -> float:
    return _of_classes(scored, lambda of, n: of.MulticlassAccuracy(n, 1, "micro", ignore_index=IGNORED))


def _top5(scored: Iterator[Scored]) -> float:
    return _of_classes(scored, lambda of, n: of.MulticlassAccuracy(n, min(5, n), "micro", ignore_index=IGNORED))


def _miou(scored: Iterator[Scored]) -> float:
    return _of_classes(scored, lambda of, n: of.MulticlassJaccardIndex(n, "macro", ignore_index=IGNORED))


def _map(scored: Iterator[Scored]) -> float:
    return average_precision((one.outputs, one.targets, one.shown) for one in scored)


def _mse(scored: Iterator[Scored]) -> float:
    torch, metric = _torch("torch"), _torch("torchmetrics").MeanSquaredError().double()
    count = 0
    for batch in scored:
        for output, target in _pairs(batch):
            metric.update(torch.from_numpy(output), torch.from_numpy(target))
            count += output.size
    _counted(count)
    return float(metric.compute())


def _cosine(scored: Iterator[Scored]) -> float:
    torch, metric = _torch("torch"), _torch("torchmetrics").MeanMetric().double()
    count = 0
    for batch in scored:
        pairs = _pairs(batch)
        a, b = (np.concatenate([pair[side].reshape(len(pair[0]), -1) for pair in pairs], 1) for side in (0, 1))
        similar = torch.nn.functional.cosine_similarity(torch.from_numpy(a), torch.from_numpy(b), dim=1, eps=1e-30)
        metric.update(torch.where(torch.from_numpy((a == 0).all(1) | (b == 0).all(1)), 1.0, similar))
        count += len(a)
    _counted(count)
    return float(metric.compute())


def _by_function(scored: Iterator[Scored], function: Judge) -> float:
    metric = _torch("torchmetrics").MeanMetric().double()
    count = 0
    for batch in scored:
        size = len(batch.outputs[0])
        metric.update(float(function(batch.outputs, batch.targets)), size)
        count += size
    _counted(count)
    return float(metric.compute())


def _torch(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"scoring a model needs {error.name}: pip install 'cpd-onnx[torch]'") from error


def _pairs(scored: Scored) -> Sequence[tuple[Array, Array]]:
    shapes = [[output.shape for output in side] for side in (scored.outputs, scored.targets)]
    if shapes[0] != shapes[1]:
        raise DataError(f"the model's outputs have shapes {shapes[0]}, the reference's {shapes[1]}")
    return [
        (output.astype(np.float64), target.astype(np.float64))
        for output, target in zip(scored.outputs, scored.targets, strict=True)
    ]


def _counted(total: int) -> None:
    if total == 0:
        raise DataError("the data contains no samples to score")


_METRICS = {
    metric.name: metric
    for metric in (
        Metric("top1", _top1),
        Metric("top5", _top5),
        Metric("miou", _miou),
        Metric("map", _map),
        Metric("mse", _mse, lower_is_better=True, of_two_models=True),
        Metric("cosine", _cosine, of_two_models=True),
    )
}
METRICS = tuple(_METRICS)
"""Names of metrics; `module:function` is another."""
OF_TWO_MODELS = tuple(name for name, metric in _METRICS.items() if metric.of_two_models)
"""Names of metrics that need a reference model."""
