"""Agreement: how often a model answers like the original, in the terms of the task, with a lower confidence bound.

It needs no labels. What an output holds is told from its values on a few samples: class scores, a segmentation, tokens,
embeddings or numbers. Of several outputs, the one that agrees least counts, or one that agrees no better than chance.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from scipy.special import betaincinv

from cpd_onnx.data.detection import Detections, Size, detections, detector_of
from cpd_onnx.data.metrics import answers, open_session
from cpd_onnx.data.sources import LABELS, Batch, Source, calibration_batch
from cpd_onnx.errors import DataError
from cpd_onnx.io.progress import advance, step
from cpd_onnx.ir.model import Model
from cpd_onnx.shapes.stated import stated

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float64]
Margins: TypeAlias = tuple[Floats, Floats]
"""By how much the answer of each sample leads, and how much of that is lost."""

TASKS = ("classification", "segmentation", "detection", "language", "embedding", "regression")
"""Tasks, each with its measure of agreement."""
CONFIDENCE = 0.95
"""Confidence of the bounds, each of which is one-sided."""

_MEASURES = {
    "classification": "same answer", "segmentation": "same pixels", "detection": "matched boxes",
    "language": "same tokens", "embedding": "cosine similarity", "regression": "explained variance",
}  # fmt: skip  # a table
_SIGNED = ("embedding", "regression")
"""Tasks whose agreement is from -1 to 1."""
_LARGEST_STAKE, _HALVINGS = 0.9, 40
"""Largest part of the capital that is bet, and bisections of a bound (heuristics)."""
_OF_CLASSES = ("classification", "segmentation", "language")
"""Tasks whose outputs hold a score of each class."""
_BATCH = 16
"""Number of samples at a time."""
_LEAST_SCORE, _OVERLAP = 0.3, 0.5
"""Score from which a box counts as found, and intersection over union from which two boxes match (heuristics)."""
_LOOKED_AT = 32
"""Number of samples from which the task is told (heuristic)."""
_RESAMPLED = 2000
"""Number of bootstrap samples."""
_MOST_PAIRED = 2000
"""Number of samples up to which leads are set against falls: of more, the answers that differ can be counted."""
_NEAR_ONE = 1e-3
"""Deviation from 1 up to which probabilities add up to 1, and embeddings have a length of 1."""
_CLASSES = re.compile(r"logit|prob|class|softmax|label")
_VECTORS = re.compile(r"embed|feature|descriptor")
_NUMBERS = re.compile(r"landmark|point|pose|box|coord|regress")
"""Words in the name of an output that say what it holds, where its values do not decide it (heuristics)."""
_EMBEDDINGS = (64, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048, 4096)
"""Usual lengths of embeddings, which hardly occur as numbers of classes (heuristic)."""
_SURE = 0.1
"""Distance from 0 or 1 within which a number counts as a decided yes or no (heuristic)."""
_ROUNDING = 1e-9
"""Distance from 1 within which a fraction of equal answers is all of them."""
LEAST_SKILL = 0.2
"""Part of the way from a constant answer to perfect agreement below which agreement is near chance (heuristic)."""


@dataclass(frozen=True)
class Agreement:
    """How often a model answers like another one.

    Attributes:
        task: One of `TASKS`.
        measure: What is averaged over the samples, such as "same answer".
        value: Its mean over the samples; 1 is perfect.
        low, high: Bounds of the mean over all such inputs, each at the given confidence.
        chance: Value that the best constant answer reaches on these samples.
        samples: Number of samples.
        output: Name of the output that counts.
        confidence: Confidence of each bound.
        interval: Method of the bounds, which hold for any number of samples: "Clopper-Pearson" for yes and no, or
            "betting".
        is_held_out: Whether nothing was fitted to the samples.
        most_lost: Upper bound of the answers that differ, from the margins of the answers; None where it is not known.
        outputs: Number of outputs that were compared.
        uniform: Names of the outputs in which the original gives the same answer for all samples, which shows nothing.
    """

    task: str
    measure: str
    value: float
    low: float
    high: float
    chance: float
    samples: int
    output: str
    confidence: float = CONFIDENCE
    interval: str = "Clopper-Pearson"
    is_held_out: bool = True
    most_lost: float | None = None
    outputs: int = 1
    uniform: tuple[str, ...] = ()

    @property
    def is_near_chance(self) -> bool:
        """Whether a constant answer would agree about as well; False if it would agree perfectly."""
        return self.value - self.chance < LEAST_SKILL * (1 - self.chance)

    def as_json(self) -> dict[str, Any]:
        """Return the agreement as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class _Answers:
    """How the answers of one output are read and compared.

    Attributes:
        task: One of `TASKS`.
        axis: Axis of the classes or of the vectors; None where answers are not read from scores.
        threshold: Score above which the answer is yes, for outputs of single probabilities.
        deviation: Standard deviation of the original's numbers, the unit of their error.
    """

    task: str
    axis: int | None = None
    threshold: float | None = None
    deviation: float = 1.0

    def read(self, output: Array) -> Array:
        """Return the answers in an output: classes, decisions, unit vectors or numbers."""
        if self.threshold is not None:
            return np.asarray(output > self.threshold)
        if output.dtype.kind != "f" or self.axis is None:
            return output
        if self.task == "embedding":
            lengths = np.linalg.norm(output.astype(np.float64), axis=self.axis, keepdims=True)
            return np.asarray(output / np.where(lengths > 0, lengths, 1.0))
        return np.asarray(output.argmax(self.axis))

    def compare(self, wanted: Array, answered: Array) -> Floats:
        """Return the agreement of each sample; 0 where the shapes differ, since sizes may depend on the data."""
        if wanted.shape != answered.shape:
            return np.zeros(len(wanted))
        if self.task == "embedding":
            return _by_sample((wanted * answered).sum(self.axis))
        if self.task == "regression":
            squares = np.square(np.asarray(wanted, np.float64) - np.asarray(answered, np.float64))
            return np.maximum(1 - _by_sample(np.nan_to_num(squares, nan=np.inf)) / self.deviation**2, -1.0)
        same = np.asarray(wanted == answered).reshape(len(wanted), -1)
        return _by_sample(np.asarray(same.all(axis=1)) if self.task == "classification" else same)


def _by_sample(values: Array) -> Floats:
    return np.asarray(values.reshape(len(values), -1).mean(axis=1), np.float64)


class _Tally(Protocol):
    """Collects the agreement of samples, batch by batch."""

    output: str

    @property
    def task(self) -> str:
        """One of `TASKS`."""

    def add(self, wanted: Sequence[Array], answered: Sequence[Array]) -> None:
        """Add the outputs of both models for one batch."""

    def values(self) -> Floats:
        """Return the agreement of each sample."""

    def chance(self) -> float:
        """Return the agreement that the best constant answer would reach."""

    def most_lost(self) -> float | None:
        """Return the bound `Agreement.most_lost`."""


@dataclass
class _OutputTally:
    """Agreement of one output."""

    place: int
    output: str
    how: _Answers
    each: list[Floats] = field(default_factory=list)
    counts: Counter[bytes] = field(default_factory=Counter)
    vectors: list[Floats] = field(default_factory=list)
    margins: list[Margins] = field(default_factory=list)

    @property
    def task(self) -> str:
        return self.how.task

    def add(self, wanted: Sequence[Array], answered: Sequence[Array]) -> None:
        first, second = (self.how.read(np.atleast_1d(side[self.place])) for side in (wanted, answered))
        self.each.append(self.how.compare(first, second))
        scores = (wanted[self.place], answered[self.place])
        if self.task == "classification" and self.how.axis == 1 and scores[0].shape == scores[1].shape:
            self.margins.append(_margins(*scores))
        if self.task == "embedding":
            self.vectors.append(np.asarray(first.reshape(len(first), -1), np.float64))
        elif self.task != "regression":
            answers, axis = (first.reshape(len(first), -1), 0) if self.task == "classification" else (first, None)
            for row, count in zip(*np.unique(answers, axis=axis, return_counts=True), strict=True):
                self.counts[row.tobytes()] += int(count)

    def values(self) -> Floats:
        return np.concatenate(self.each)

    def most_lost(self) -> float | None:
        if not self.margins or sum(len(margin) for margin, _ in self.margins) != len(self.values()):
            return None
        margin, fall = (np.concatenate(each) for each in zip(*self.margins, strict=True))
        return _most_lost(margin, fall) if len(margin) <= _MOST_PAIRED else None

    def chance(self) -> float:
        if self.counts:
            return max(self.counts.values()) / self.counts.total()
        if self.vectors:
            vectors = np.concatenate(self.vectors)
            lengths = float(np.linalg.norm(vectors, axis=1).mean()) or 1.0
            return float(np.linalg.norm(vectors.mean(axis=0))) / lengths
        return 0.0


@dataclass
class _BoxTally:
    """Agreement of detections: boxes of the same class that overlap, twice their number over that of all boxes."""

    size: Size
    names: Sequence[str]
    detector: str
    output: str = "detections"
    each: list[float] = field(default_factory=list)
    empty: int = 0

    @property
    def task(self) -> str:
        return "detection"

    def add(self, wanted: Sequence[Array], answered: Sequence[Array]) -> None:
        first, second = (
            detections(side, self.size, names=self.names, detector=self.detector, least_score=_LEAST_SCORE)
            for side in (wanted, answered)
        )
        self.each += [_matched(*pair) for pair in zip(first, second, strict=True)]
        self.empty += sum(not len(found.boxes) for found in first)

    def values(self) -> Floats:
        return np.asarray(self.each)

    def chance(self) -> float:
        return self.empty / len(self.each)  # the answer that nothing is there

    def most_lost(self) -> float | None:
        return None


def _matched(wanted: Detections, answered: Detections) -> float:
    """Return the F1 score of the boxes in an image against those of the original; 1 where both found nothing."""
    if not len(wanted.boxes) or not len(answered.boxes):
        return float(len(wanted.boxes) == len(answered.boxes))
    overlap = _overlaps(wanted.boxes, answered.boxes) * (wanted.classes[:, None] == answered.classes)
    rows, columns = linear_sum_assignment(-overlap)
    return 2 * int((overlap[rows, columns] >= _OVERLAP).sum()) / (len(wanted.boxes) + len(answered.boxes))


def _overlaps(first: Array, second: Array) -> Floats:
    """Return the intersection over union of each pair of boxes [n, m]."""
    upper = np.maximum(first[:, None, :2], second[:, :2])
    lower = np.minimum(first[:, None, 2:], second[:, 2:])
    shared = np.maximum(lower - upper, 0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (first, second)]
    return np.asarray(shared / np.maximum(areas[0][:, None] + areas[1] - shared, 1e-9), np.float64)


@step("agreement")
def agreement(original: Model, model: Model, source: Source, task: str | None = None) -> Agreement | None:
    """Return the agreement of a model with the original on all samples of a source; None if no output can be compared.

    Args:
        original: The model whose answers are right.
        model: The model that is measured, with the same inputs and outputs.
        source: The samples; labels are not used.
        task: One of `TASKS`, where the values of the outputs do not tell it.

    Raises:
        DataError: The task is unknown, or there are no samples.
        UnsupportedError: onnxruntime cannot run a model.
    """
    if task is not None and task not in TASKS:
        raise DataError(f"unknown task {task!r}: choose one of {', '.join(TASKS)}")
    first, second = (open_session(stated(each, original).complete_proto()) for each in (original, model))
    size = calibration_batch(original, source, _BATCH)
    tallies = [each for each in _tallies(first, source, size, task) if each.output not in original.free_io]
    if not tallies:
        return None
    for number, batch in enumerate(_feeds(source, size)):
        advance(number * size, source.count)
        wanted, answered = answers(first, batch), answers(second, batch)
        for tally in tallies:
            tally.add(wanted, answered)
    found = [_summary(tally) for tally in tallies]
    counted = min(found, key=lambda each: (not each.is_near_chance, each.value))
    uniform = tuple(each.output for each in found if each.chance > 1 - _ROUNDING)
    return replace(counted, outputs=len(found), uniform=uniform)


def class_axes(original: Model, source: Source) -> dict[str, int]:
    """Return the axis of the classes of each output that holds scores of classes, by the name of the output.

    Raises DataError if there are no samples, UnsupportedError if onnxruntime cannot run the model.
    """
    session = open_session(stated(original).complete_proto())
    tallies = _tallies(session, source, calibration_batch(original, source, _BATCH), None)
    return {
        tally.output: tally.how.axis
        for tally in tallies
        if isinstance(tally, _OutputTally) and tally.how.axis is not None and tally.task in _OF_CLASSES
    }


def _feeds(source: Source, size: int) -> Iterator[Batch]:
    seen = False
    for batch in source.batches(size):
        seen = True
        yield {name: array for name, array in batch.items() if name != LABELS}
    if not seen:
        raise DataError("there are no samples to compare the answers on")


def _summary(tally: _Tally) -> Agreement:
    values = tally.values()
    is_exact = bool(np.isin(values, (0.0, 1.0)).all())
    least = -1.0 if tally.task in _SIGNED else 0.0
    low, high = exact_bounds(float(values.sum()), len(values)) if is_exact else bounded_bounds(values, least)
    return Agreement(
        tally.task, _MEASURES[tally.task], float(values.mean()), low, high, tally.chance(), len(values), tally.output,
        interval="Clopper-Pearson" if is_exact else "betting", most_lost=tally.most_lost() if is_exact else None,
    )  # fmt: skip  # what and how


def exact_low(right: float, count: int, confidence: float = CONFIDENCE) -> float:
    """Return the one-sided lower bound of Clopper and Pearson (1934) for a probability, from counts.

    >>> round(exact_low(512, 512), 4), round(exact_low(500, 512), 4), exact_low(0, 10)
    (0.9942, 0.9623, 0.0)
    """
    return float(betaincinv(right, count - right + 1, 1 - confidence)) if right > 0 else 0.0


def exact_bounds(right: float, count: int) -> tuple[float, float]:
    """Return the lower and the upper bound of Clopper and Pearson, each at `CONFIDENCE`."""
    return exact_low(right, count), 1 - exact_low(count - right, count)


def bounded_bounds(values: Floats, least: float = 0.0) -> tuple[float, float]:
    """Return the lower and the upper bound of the mean of values from `least` to 1, each at `CONFIDENCE`.

    They hold for every distribution, however few the samples are, and become narrow where the values scatter little
    (betting: Waudby-Smith and Ramdas, Journal of the Royal Statistical Society B, 2024). A bootstrap does not see what
    none of the samples shows.
    """
    scaled = np.clip((values - least) / (1 - least), 0, 1)
    low, high = _bet(scaled), 1 - _bet(1 - scaled)
    return least + (1 - least) * low, least + (1 - least) * high


def _bet(values: Floats) -> float:
    """Return the lower bound of the mean of values from 0 to 1: the least mean against which no bettor grows rich.

    The stake of each bet follows from the values before it, so that the capital can hardly grow if the mean is true.
    """
    count, wanted = len(values), -math.log(1 - CONFIDENCE)
    before = np.arange(1, count + 1)
    means = (0.5 + np.concatenate([[0.0], np.cumsum(values)[:-1]])) / before
    squares = np.concatenate([[0.0], np.cumsum(np.square(values - means))[:-1]])
    stakes = np.sqrt(2 * wanted / (count * np.maximum((0.25 + squares) / before, 1e-12)))

    def is_refuted(mean: float) -> bool:
        gains = 1 + np.minimum(stakes, _LARGEST_STAKE / mean) * (values - mean)
        return bool(np.cumsum(np.log(gains)).max() >= wanted)

    low, high = 0.0, float(values.mean())
    for _ in range(_HALVINGS if high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if is_refuted(middle) else (low, middle)
    return low


def _margins(wanted: Array, answered: Array) -> Margins:
    """Return by how much the original's answer leads in its scores [N, classes], and how much of that lead is lost."""
    rows, best = np.arange(len(wanted)), wanted.argmax(1)

    def lead(scores: Array) -> Floats:
        rivals = scores.astype(np.float64)
        rivals[rows, best] = -np.inf
        return np.asarray(scores[rows, best] - rivals.max(1), np.float64)

    margin = lead(wanted)
    return margin, margin - lead(answered)


def _most_lost(margin: Floats, fall: Floats) -> float:
    """Return an upper bound of the probability that an answer changes, because its lead is lost.

    Each lead is set against the fall of every sample, which tells more than a count of the answers that changed: few
    samples have a narrow lead. The bound is that of a bootstrap over the samples.
    """
    is_lost = (fall[:, None] > margin[None, :]).astype(np.float32)
    rng, count = np.random.default_rng(0), len(margin)
    drawn = rng.multinomial(count, np.full(count, 1 / count), _RESAMPLED).astype(np.float32) / count
    return float(np.quantile(((drawn @ is_lost) * drawn).sum(1), CONFIDENCE))


# What an output holds.


def _tallies(session: Any, source: Source, size: int, task: str | None) -> list[_Tally]:
    """Return how outputs are compared; outputs that only pass on a state are left out where there are others."""
    outputs: list[list[Array]] = []
    inputs: Batch = {}
    for batch in _feeds(source, size):
        outputs.append(list(answers(session, batch)))
        inputs = batch
        if sum(len(row[0]) for row in outputs) >= _LOOKED_AT:
            break
    names = [entry.name for entry in session.get_outputs()]
    image = _image_size(next(iter(inputs.values())))
    detector = detector_of(outputs[0], image) if image and task in (None, "detection") else None
    if image and detector:
        return [_BoxTally(image, names, detector)]
    if task == "detection":
        raise DataError("the outputs are not those of a known detector: choose another --task")
    takes_tokens = any(array.dtype.kind in "iu" and array.ndim == 2 for array in inputs.values())
    held = [array.shape for array in list(inputs.values())[1:] if array.ndim > 1]
    states = {shape[1:] for shape in held} | {shape[:1] + shape[2:] for shape in held}  # [layers, samples, width] too
    values = [_all_of([row[place] for row in outputs]) for place in range(len(names))]
    certain = frozenset(count for each in values if each is not None and (count := _certain_classes(each)))
    found: list[_Tally] = []
    passed_on: list[_Tally] = []
    for place, (name, each) in enumerate(zip(names, values, strict=True)):
        if each is not None:
            how = _as(task, each) if task else _told(name, each, takes_tokens=takes_tokens, certain=certain)
            is_state = each.ndim > 2 and each.shape[1:] in states
            (passed_on if is_state else found).append(_OutputTally(place, name, how))
    return found or passed_on


def _all_of(arrays: Sequence[Array]) -> Array | None:
    """Return an output of all batches; None if it is empty, no number, or its size depends on the data."""
    if any(array.shape[1:] != arrays[0].shape[1:] for array in arrays) or arrays[0].dtype.kind not in "fiub":
        return None
    values = np.concatenate(arrays)
    return values if values.size else None


def _certain_classes(values: Array) -> int | None:
    """Return the number of classes of an output of probabilities that add up to 1; None for other outputs."""
    axis = 1 if values.ndim == 2 else _class_axis(values) if values.ndim > 3 else None
    if values.dtype.kind != "f" or axis is None or values.shape[axis] < 2 or not _is_normalised(values, axis):
        return None
    return int(values.shape[axis])


def _image_size(array: Array) -> Size | None:
    """Return height and width of images; None for other inputs."""
    if array.ndim != 4:
        return None
    height, width = array.shape[2:] if array.shape[1] in (1, 3) else array.shape[1:3]
    return height, width


def _as(task: str, values: Array) -> _Answers:
    """Return how an output is compared under a given task."""
    if task == "regression" or values.ndim < 2:
        return _numbers(values)
    if task == "embedding":
        return _Answers(task, values.ndim - 1)
    if task == "segmentation":
        return _Answers(task, _class_axis(values) or 1) if values.ndim > 2 else _Answers(task, 1)
    axis = values.ndim - 1
    return _Answers(task, axis) if values.shape[axis] > 1 else _Answers(task, threshold=_middle(values))


def _told(name: str, values: Array, *, takes_tokens: bool, certain: frozenset[int] = frozenset()) -> _Answers:
    """Return how an output is compared, told from its values [samples, …].

    Beside outputs of probabilities, of `certain` numbers of classes, one of another length holds something else, such
    as the coordinates of a box.
    """
    if values.dtype.kind in "iub":
        return _Answers("classification" if values.ndim < 3 else "segmentation")
    if values.ndim <= 2:
        return _of_vectors(name.lower(), values.reshape(len(values), -1), certain)
    if values.ndim == 3:
        return _of_sequences(name.lower(), values, takes_tokens=takes_tokens)
    axis = _class_axis(values)
    if axis is None:
        return _numbers(values)
    count = values.shape[axis]
    if count == 1:
        return _Answers("segmentation", threshold=0.5) if _is_decided(values) else _numbers(values)
    if certain and count not in certain:
        return _numbers(values)
    is_image = count == 3 and not _is_normalised(values, axis) and float(values.min()) > -1.5
    return _numbers(values) if is_image else _Answers("segmentation", axis)


def _of_vectors(name: str, values: Array, certain: frozenset[int]) -> _Answers:
    if values.shape[1] == 1:
        return _Answers("classification", threshold=0.5) if _is_probability(values) else _numbers(values)
    if _is_normalised(values, 1) or _CLASSES.search(name):
        return _Answers("classification", 1)
    lengths = np.linalg.norm(values.astype(np.float64), axis=1)
    is_embedding = bool((np.abs(lengths - 1) < _NEAR_ONE).all()) or values.shape[1] in _EMBEDDINGS
    if is_embedding or _VECTORS.search(name):
        return _Answers("embedding", 1)
    if _NUMBERS.search(name):
        return _numbers(values)
    if _is_decided(values):
        return _Answers("classification", threshold=0.5)
    # Numbers such as coordinates differ from each other more than from sample to sample; scores of classes do not.
    spread = float(values.astype(np.float64).var(axis=0).mean())
    between = float(values.astype(np.float64).mean(axis=0).var())
    is_other = bool(certain) and values.shape[1] not in certain
    return _numbers(values) if is_other or (len(values) > 1 and between > spread) else _Answers("classification", 1)


def _of_sequences(name: str, values: Array, *, takes_tokens: bool) -> _Answers:
    if _is_normalised(values, 2) or (takes_tokens and values.shape[2] > 2 * values.shape[1]):
        return _Answers("language", 2)
    if min(values.shape[1:]) == 1:
        return _numbers(values)
    if _CLASSES.search(name):
        return _Answers("language", 2)
    return _Answers("embedding", 2)


def _class_axis(values: Array) -> int | None:
    """Return the axis of the classes of a map [N, C, H, W, …] or [N, H, W, …, C]: the one below all others, or None."""
    last = values.ndim - 1
    for axis, others in ((1, values.shape[2:]), (last, values.shape[1:last])):
        if values.shape[axis] < min(others):
            return axis
    return None


def _is_normalised(values: Array, axis: int) -> bool:
    """Return whether values are probabilities that add up to 1 along an axis, or their logarithms."""
    numbers = values.astype(np.float64)
    with np.errstate(over="ignore"):
        logarithms = np.exp(numbers).sum(axis) if float(numbers.max()) <= _NEAR_ONE else np.zeros(1)
    is_share = float(numbers.min()) >= -_NEAR_ONE and bool((np.abs(numbers.sum(axis) - 1) < 10 * _NEAR_ONE).all())
    return is_share or bool((np.abs(logarithms - 1) < 10 * _NEAR_ONE).all())


def _is_probability(values: Array) -> bool:
    return float(values.min()) >= 0 and float(values.max()) <= 1


def _is_decided(values: Array) -> bool:
    """Return whether most values are near 0 or 1, and none is outside."""
    return _is_probability(values) and float(((values < _SURE) | (values > 1 - _SURE)).mean()) > 0.8


def _middle(values: Array) -> float:
    return 0.5 if _is_probability(values) else 0.0


def _numbers(values: Array) -> _Answers:
    numbers = np.nan_to_num(values.astype(np.float64))
    deviation = float(np.sqrt(numbers.var(axis=0).mean())) if len(numbers) > 1 else 0.0
    return _Answers("regression", deviation=deviation or float(numbers.std()) or 1.0)
