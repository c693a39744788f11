"""Which preprocessing a model was trained with, judged by its own answers.

With the right one, a model is sure of its answer for each image and gives different answers for different images. Both
are in one number: the mutual information of image and class, the logarithm of the Inception Score (Salimans et al.,
Improved Techniques for Training GANs, NeurIPS 2016). Confidence alone picks wrong, because pixels that are too large
make a model sure of the same few classes. Where there are labels, the share of right answers decides instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from cpd_onnx.data.detection import detections, detector_of
from cpd_onnx.data.images.options import PRESETS, Order, Preprocessing
from cpd_onnx.data.signature import Array
from cpd_onnx.errors import DataError

_SATURATED = 16.0
"""Median margin of the best class over the second, in logits, that training with cross entropy does not exceed: from
-log(2**-23) = 15.9 on, the loss of a sample is 0 in float32 and has no gradient."""
_FLOODED = 100.0
"""Mean number of objects an image above which they are taken for noise (heuristic): a detector answers inputs that are
far too large with boxes everywhere, and images of COCO, on which most are trained, show 7."""
_SURE = 0.25
"""Score from which a detection counts (as YOLOv5 and YOLOv8 show them)."""
_DRAWS = 500
"""Number of bootstrap samples."""
_CONFIDENCE = 0.95
"""Share of the bootstrap samples in which a preprocessing must be better to be recommended."""
_GAIN = 0.02
"""Relative gain under which a preprocessing is not recommended, as it may be chance of a few images (heuristic)."""
_GAIN_OF_BALANCE = 3.0
"""Relative gain under which a preprocessing is not recommended that makes the model no surer and gives no more classes
(heuristic): the classes are only more balanced, which images of few kinds are not by nature."""
_GAIN_OF_LABELS = 0.01
"""Gain in the share of right answers under which a preprocessing is not recommended (heuristic)."""
_LEAST_MERIT = 0.1
"""Merit under which outputs are no classes, but for instance features or colours (heuristic; measured: 0.005 for
features of persons, 0.46 for the classes of pixels with the least)."""
_PIXELS = 64
"""Largest height and width at which the classes of pixels are compared."""

Kind = Literal["classes", "objects"]


@dataclass(frozen=True, eq=False)
class Behaviour:
    """What a model makes of some images under one preprocessing.

    Attributes:
        kind: Whether the outputs are classes (of images or pixels) or objects.
        confidence: Mean probability of the best class; for objects, the mean number an image that the model is sure of.
        classes: Number of different classes that are the best one somewhere.
        margin: Median margin of the best class over the second, in logits; 0 for objects.
        right: Share of right answers for each image, where there are labels.
        shares: Mean probability of each class [images, classes]; for objects, the sum of the sure scores [images, 1].
        doubts: Mean entropy of the probabilities for each image.
    """

    kind: Kind
    confidence: float
    classes: int
    margin: float
    right: Array | None
    shares: Array
    doubts: Array

    @property
    def is_saturated(self) -> bool:
        """Whether the margins, or the objects, are more than training makes them."""
        return self.margin > _SATURATED or (self.kind == "objects" and self.confidence > _FLOODED)

    def merit(self, weights: Array) -> Array:
        """Return how well the preprocessing fits, by images weighted with rows that sum to 1 [draws, images]."""
        if self.kind == "objects":
            return np.asarray(weights @ self.shares[:, 0])
        return np.asarray(_entropy(weights @ self.shares) - weights @ self.doubts)

    @property
    def mean_merit(self) -> float:
        """The merit with all images weighted alike."""
        return float(self.merit(np.full(len(self.doubts), 1 / len(self.doubts))))


@dataclass(frozen=True, eq=False)
class Ranking:
    """Behaviours under several preprocessings, by name.

    Attributes:
        used: Name of the one in use.
        of: Behaviours by name; the name is the arguments of the command line, or the formula for the one in use.
    """

    used: str
    of: Mapping[str, Behaviour]

    @property
    def best(self) -> str | None:
        """The one that fits best; None if the answers are not to be compared, or all are saturated."""
        sane = {name: found for name, found in self.of.items() if not found.is_saturated}
        if not sane:
            return None
        if self._has_labels:
            return max(sane, key=lambda name: float(np.mean(_right(sane[name]))))
        name = max(sane, key=lambda name: sane[name].mean_merit)
        return name if sane[name].mean_merit >= _LEAST_MERIT else None

    @property
    def _has_labels(self) -> bool:
        """Whether labels can decide: they are there, and some preprocessing gets them right more often than chance."""
        rights = [float(found.right.mean()) for found in self.of.values() if found.right is not None]
        classes = next(iter(self.of.values())).shares.shape[1]
        return len(rights) == len(self.of) and max(rights) > max(2 / classes, 0.1)

    def warning(self) -> str | None:
        """Return a sentence if another preprocessing fits clearly better than the one in use, or none fits."""
        used, best = self.of[self.used], self.best
        if used.is_saturated and all(found.is_saturated for found in self.of.values()):
            what = (
                f"the original finds {used.confidence:.0f} objects an image with {self.used}, and too many with every "
                "preset"
                if used.kind == "objects"
                else f"the original's answers are saturated with every preset (with {self.used}, the best class leads "
                f"by {used.margin:.0f} logits)"
            )
            return f"{what}: give its preprocessing with --image-mean, --image-std and --image-scale"
        if best is None or best == self.used or not (used.is_saturated or self._is_better(best)):
            return None
        chosen = self.of[best]
        if self._has_labels:
            ours, theirs = (float(np.mean(_right(found))) for found in (used, chosen))
            return f"the original is right more often with {best} ({theirs:.1%}) than with {self.used} ({ours:.1%})"
        if chosen.kind == "objects" and used.is_saturated:
            return (
                f"the original finds {used.confidence:.0f} objects an image with {self.used}, too many to be right, "
                f"and {chosen.confidence:.1f} with {best}"
            )
        if chosen.kind == "objects":
            return (
                f"the original finds more objects with {best} ({chosen.confidence:.1f} an image) than with {self.used} "
                f"({used.confidence:.1f})"
            )
        return (
            f"the original fits {best} better (confidence {chosen.confidence:.2f}, {chosen.classes} classes) than "
            f"{self.used} ({used.confidence:.2f}, {used.classes} classes)"
        )

    def _is_better(self, best: str) -> bool:
        """Return whether the best one is better in nearly all bootstrap samples of the images, and by enough."""
        ours, theirs = self.of[self.used], self.of[best]
        count = len(ours.doubts)
        weights = np.random.default_rng(0).multinomial(count, [1 / count] * count, _DRAWS) / count
        if self._has_labels:
            gains = weights @ (_right(theirs) - _right(ours))
            return bool(gains.mean() > _GAIN_OF_LABELS and (gains > 0).mean() >= _CONFIDENCE)
        before, after = ours.merit(weights), theirs.merit(weights)
        is_surer = theirs.kind == "objects" or theirs.confidence > ours.confidence * (1 + _GAIN)
        least = 1 + (_GAIN if is_surer or theirs.classes > ours.classes else _GAIN_OF_BALANCE)
        return bool(after.mean() > before.mean() * least) and bool((after > before).mean() >= _CONFIDENCE)


def candidates(channels: int) -> dict[str, Preprocessing]:
    """Return the preprocessings to compare, by the arguments of the command line that choose them."""
    found: dict[str, Preprocessing] = {}
    for name, preset in PRESETS.items():
        values = replace(preset, letterbox=False).for_channels(channels)
        if values not in found.values():
            found[f"--preset {name}"] = values
    return found


def _with_other_order(name: str, values: Preprocessing) -> tuple[str, Preprocessing]:
    order: Order = "RGB" if values.order == "BGR" else "BGR"
    return f"{name} --image-order {order}", replace(values, order=order)


def rank(
    run: Callable[[Preprocessing], list[Array]],
    used: Preprocessing,
    size: tuple[int, int],
    channels: int,
    labels: Array | None = None,
) -> Ranking | None:
    """Compare a preprocessing with the usual ones; returns None if the outputs say nothing about it.

    Args:
        run: Returns all outputs of the model for the same images under a preprocessing.
        used: The one in use.
        size: Height and width of the input.
        channels: Number of channels of the input, 1 or 3.
        labels: Class index of each image [N], or class ids of pixels [N, h, w]; others are not used.
    """
    plain, usual = replace(used, letterbox=False), candidates(channels)
    name = next((name for name, values in usual.items() if values == plain), str(used))
    found: dict[str, Behaviour] = {}
    waiting = {name: plain} | usual
    while waiting:
        key, values = next(iter(waiting.items()))
        behaviour = behaviour_of(run(values), size, labels)
        if behaviour is None:
            return None
        found[key] = behaviour
        del waiting[key]
        best = Ranking(name, found).best
        if not waiting and channels == 3 and best in usual:
            other, changed = _with_other_order(best, usual[best])
            waiting = {other: changed} if other not in found else {}
    return Ranking(name, found)


def behaviour_of(outputs: Sequence[Array], size: tuple[int, int], labels: Array | None = None) -> Behaviour | None:
    """Return what outputs say; None if they are neither classes nor objects, or not finite."""
    if detector_of(outputs, size) is not None:
        return _of_objects(outputs, size)
    scores = class_scores(outputs)
    if scores is None or not np.isfinite(scores).all():
        return None
    rows = np.moveaxis(_thinned(scores), 1, -1)
    logits = _logits(rows.reshape(len(rows), -1, rows.shape[-1]))
    chances = np.exp(logits - logits.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    top = np.sort(logits, -1)[..., -2:]
    return Behaviour(
        "classes",
        float(chances.max(-1).mean()),
        len(np.unique(chances.argmax(-1))),
        float(np.median(top[..., 1] - top[..., 0])),
        _rights(scores, labels),
        chances.mean(1),
        _entropy(chances).mean(1),
    )


def class_scores(outputs: Sequence[Array]) -> Array | None:
    """Return the scores of classes [N, C] or [N, C, h, w]; None if there are none.

    They are the first output that is a probability of each class, else the first output: other outputs of such a model
    may be coordinates. One column or plane may be anything, such as a number or a depth.
    """
    found = [_scores(output) for output in outputs]
    chances = (scores for scores in found if scores is not None and _is_chance(np.moveaxis(scores, 1, -1)))
    return next(chances, found[0] if found else None)


def _scores(output: Array) -> Array | None:
    """Return an output as scores of classes [N, C] or [N, C, h, w]; None if it cannot be any."""
    if output.dtype.kind != "f" or output.ndim not in (2, 4):
        return None
    scores = np.asarray(output, np.float32)
    if scores.ndim == 4 and scores.shape[3] < min(scores.shape[1:3]):
        scores = np.moveaxis(scores, 3, 1)  # classes last, as in TensorFlow
    if scores.ndim == 4 and scores.shape[1] > min(scores.shape[2:]):
        return None
    return scores if scores.shape[1] > 1 else None


def _of_objects(outputs: Sequence[Array], size: tuple[int, int]) -> Behaviour:
    found = detections(outputs, size, least_score=_SURE)
    sums = np.array([[entry.scores.sum()] for entry in found], np.float64)
    classes = len({int(label) for entry in found for label in entry.classes})
    count = float(np.mean([len(entry.scores) for entry in found]))
    return Behaviour("objects", count, classes, 0.0, None, sums, np.zeros(len(found)))


def _thinned(scores: Array) -> Array:
    """Return maps of scores at a lower resolution, every nth pixel."""
    if scores.ndim == 2:
        return scores
    steps = [-(-extent // _PIXELS) for extent in scores.shape[2:]]
    return scores[:, :, :: steps[0], :: steps[1]]


def _logits(rows: Array) -> Array:
    """Return scores [.., classes] as logits; they are probabilities already if they sum to 1."""
    values = rows.astype(np.float64)
    return np.log(np.maximum(values, 1e-30)) if _is_chance(values) else values


def _is_chance(rows: Array) -> bool:
    """Return whether rows of scores [.., classes] are probabilities."""
    return bool(rows.size and rows.min() >= 0 and np.abs(rows.sum(-1, dtype=np.float64) - 1).max() < 1e-2)


def _entropy(chances: Array) -> Array:
    return np.asarray(-(chances * np.log(np.maximum(chances, 1e-30))).sum(-1))


def _rights(scores: Array, labels: Array | None) -> Array | None:
    """Return the share of right answers of each image; None if the labels are not of these classes."""
    if labels is None or labels.dtype.kind not in "iu" or labels.shape != scores.shape[:1] + scores.shape[2:]:
        return None
    counted = labels != 255
    if scores.ndim == 2:
        counted = np.ones(labels.shape, bool)
    if labels[counted].size == 0 or labels.min() < 0 or labels[counted].max() >= scores.shape[1]:
        return None
    rights = ((scores.argmax(1) == labels) & counted).reshape(len(labels), -1).sum(1)
    return np.asarray(rights / np.maximum(counted.reshape(len(labels), -1).sum(1), 1))


def _right(found: Behaviour) -> Array:
    if found.right is None:
        raise DataError("the images have no labels")
    return found.right


def as_table(ranking: Ranking) -> list[dict[str, Any]]:
    """Return the behaviours as plain rows, for measurements."""
    return [
        {
            "preprocessing": name, "confidence": round(found.confidence, 4), "classes": found.classes,
            "margin": round(found.margin, 1), "merit": round(found.mean_merit, 4),
            "right": None if found.right is None else round(float(found.right.mean()), 4),
        }
        for name, found in ranking.of.items()
    ]  # fmt: skip  # a table
