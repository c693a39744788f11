"""How good a model is: accuracy, mean intersection over union, or closeness to another model.

onnxruntime runs the model and torchmetrics counts; torch is imported when something is scored.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import ModelProto

from cpd_onnx.data.sources import LABELS, Batch, Source, imported
from cpd_onnx.errors import DataError, UnsupportedError
from cpd_onnx.runtime.sessions import execute, open_model

Array: TypeAlias = npt.NDArray[Any]
Outputs: TypeAlias = list[Array]
Model: TypeAlias = "ModelProto | ort.InferenceSession"
Judge: TypeAlias = Callable[[Outputs, Outputs], float]

IGNORED = 255
"""The label of what does not count: void pixels."""
_FUNCTION = re.compile(r"[\w.]+:\w+")
_LOWER = re.compile(r"(loss|error|mse|mae|mape|distance|divergence|perplexity)(?![a-z])")
"""Heuristic: a metric whose name has one of these words, the last part of a word or all of it, is an error."""


@dataclass(frozen=True)
class Scored:
    """One batch: what the model said, and what it is compared with."""

    outputs: Outputs
    targets: Outputs


@dataclass(frozen=True)
class Metric:
    """A way to score a model.

    Attributes:
        name: as the options take it.
        function: the score over all batches.
        lower_is_better: whether of two models the one with the lower score is better.
        of_two_models: whether it compares the model with a reference instead of labels.
        is_own: whether it is a user's function.

    """

    name: str
    function: Callable[[Iterator[Scored]], float]
    lower_is_better: bool = False
    of_two_models: bool = False
    is_own: bool = False

    def as_json(self) -> dict[str, Any]:
        """Name and, where that does not tell it, direction: what `lower_is_better` reads."""
        return {"metric": self.name} | ({"lower_is_better": self.lower_is_better} if self.is_own else {})


def evaluate(
    model: Model, source: Source, metric: str, *, reference: Model | None = None, batch_size: int = 64
) -> float:
    """Score a model on data.

    Args:
        model: to be scored; a model whose batch size is fixed is fed with that one.
        source: the data, with labels unless there is a reference.
        metric: "top1" or "top5", the share of samples (of elements, for labels with more axes) whose label is the
            largest output, or among the five largest; "miou", the mean intersection over union of the classes that
            occur or are predicted, classes in axis 1 of the first output; "mse" and "cosine", mean squared error and
            mean cosine similarity of all outputs of a sample; or "module:function", called with the outputs and the
            labels (or the reference's outputs) of a batch as lists of arrays, whose answers are averaged by sample
            (see `metric_of` for its direction).
        reference: the model to compare with instead of the labels; for "top1", "top5" and "miou" its largest outputs
            count.
        batch_size: samples at a time.

    Raises:
        DataError: there is nothing to compare with, or it does not fit.
        UnsupportedError: torchmetrics is not installed, or onnxruntime does not run a model.
    """
    chosen = metric_of(metric)
    if chosen.of_two_models and reference is None:
        raise DataError(f"metric {metric} compares two models; give the reference")
    sessions = open_session(model), None if reference is None else open_session(reference)
    return chosen.function(_compare(sessions[0], source, sessions[1], batch_size))


def metric_of(name: str) -> Metric:
    """The metric of that name; "module:function" is imported.

    Of such a function's values the higher ones are better, unless it has an attribute `lower_is_better` that is true
    or, where it has none of that name, a name such as "rmse" or "my_loss", see `lower_is_better`.

    Raises DataError if there is no such metric.
    """
    check_metric(name)
    if name in _METRICS:
        return _METRICS[name]
    function = imported(name, "of outputs and labels")
    is_lower = bool(getattr(function, "lower_is_better", lower_is_better({"metric": name})))
    return Metric(name, partial(_by_function, function=function), is_lower, is_own=True)


def lower_is_better(entry: Mapping[str, Any]) -> bool:
    """Whether lower scores are better in what `Metric.as_json` is part of; nothing is imported for it.

    Where nothing is said the name decides: those of this module are known, others are taken for errors if they end in
    "loss", "error", "mse", "mae", "mape", "distance", "divergence" or "perplexity", or have such a word in them.
    """
    said, name = entry.get("lower_is_better"), str(entry.get("metric"))
    if said is not None:
        return bool(said)
    known = _METRICS.get(name)
    return known.lower_is_better if known else _LOWER.search(name.rpartition(":")[2].lower()) is not None


def check_metric(metric: str) -> None:
    """Raise DataError if there is no metric of that name."""
    if metric not in METRICS and not _FUNCTION.fullmatch(metric):
        raise DataError(f"no metric is called {metric!r}: choose one of {', '.join(METRICS)} or module:function")


def open_session(model: Model, threads: int = 0) -> ort.InferenceSession:
    """Load a model into onnxruntime on the CPU, for so many threads; a session is passed on."""
    if isinstance(model, ort.InferenceSession):
        return model
    return open_model(model, threads=threads)


def run(session: ort.InferenceSession, batch: Batch) -> Outputs:
    """Outputs for the samples of a batch; filled up by repeating the last one where the model fixes a larger batch."""
    names = [entry.name for entry in session.get_inputs()]
    count = max((len(batch[name]) for name in names if batch[name].ndim), default=1)
    fixed = _fixed_size(session) or count
    feed = {name: _filled(batch[name], fixed) for name in names}
    outputs = execute(session, feed)
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
    """Scores [N, classes, ...] and true classes [N, ...]."""
    scores, target = scored.outputs[0], scored.targets[0]
    if scores.ndim < 2:
        raise DataError(f"the first output has shape {list(scores.shape)}, no axis of classes; choose mse or cosine")
    if target.shape == scores.shape and target.dtype.kind == "f":
        target = target.argmax(1)
    if scores.shape[:1] + scores.shape[2:] != target.shape:
        raise DataError(
            f"labels have shape {list(target.shape)} but the first output {list(scores.shape)} "
            f"gives classes of shape {[*scores.shape[:1], *scores.shape[2:]]}"
        )
    outside = target[(target != IGNORED) & ((target < 0) | (target >= scores.shape[1]))]
    if outside.size:
        raise DataError(
            f"label {outside[0]} is none of the {scores.shape[1]} classes; {IGNORED} is what does not count"
        )
    return scores.astype(np.float32), target.astype(np.int64)


def _of_classes(scored: Iterator[Scored], make: Callable[[Any, int], Any]) -> float:
    """A metric of torchmetrics' classification, made when the number of classes is known."""
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
        raise DataError("the data holds nothing to score")


_METRICS = {
    metric.name: metric
    for metric in (
        Metric("top1", _top1),
        Metric("top5", _top5),
        Metric("miou", _miou),
        Metric("mse", _mse, lower_is_better=True, of_two_models=True),
        Metric("cosine", _cosine, of_two_models=True),
    )
}
METRICS = tuple(_METRICS)
"""Names of metrics; `module:function` is one too."""
OF_TWO_MODELS = tuple(name for name, metric in _METRICS.items() if metric.of_two_models)
"""Those that need a reference."""
