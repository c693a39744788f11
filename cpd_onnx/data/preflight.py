"""The check of samples before a run: what they are, whether they fit the model, and how they are prepared.

It takes seconds: a few hundred samples are looked at, and the original runs on some of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime as ort

from cpd_onnx.data import ranking, survey
from cpd_onnx.data.images.decoding import image_layout
from cpd_onnx.data.images.folder import ImageFolder
from cpd_onnx.data.images.options import ImageOptions, Preprocessing
from cpd_onnx.data.metrics import OF_TWO_MODELS, answers, evaluate, run
from cpd_onnx.data.signature import IGNORED, LABELS, Array, Batch, Source, fixed_batch, run_inputs
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.errors import CpdError, DataError
from cpd_onnx.ir.model import Model
from cpd_onnx.runtime.sessions import open_model
from cpd_onnx.shapes.stated import stated

_COMPARED = 128
"""Largest number of images on which preprocessings are compared (heuristic)."""
_LEAST_COMPARED = 4
"""Number of images below which that says nothing (heuristic)."""
_SECONDS = 8.0
"""Seconds that the comparison may take; fewer images are compared in a slow model."""
_RUNS = 6
"""Usual number of preprocessings compared."""
_SCORED = 256
"""Number of samples on which the score of the original is compared with chance (heuristic)."""
_AT_ONCE = 16
"""Number of samples in a run of the model."""
_TOGETHER = 4
"""Number of samples that run together and alone, to see whether they depend on each other."""
_DEPENDENT = 0.1
"""Difference of the outputs, relative to their standard deviation, from which they do (heuristic): where ranges of a
dynamic quantisation are those of a batch, they differ by less."""
_SHOWN = 5
"""Number of names in a sentence."""
_CLEAR = 3.0
"""Standard errors by which a score must exceed chance (heuristic)."""
_NO_OBJECTS = 0.01
"""Mean average precision that a detector exceeds if preprocessing and labels fit (heuristic)."""


@dataclass(frozen=True)
class Preflight:
    """What is known of samples before a run.

    Attributes:
        samples: Number of samples; None if it is not known in advance.
        source: Kind of the samples.
        preprocessing: What becomes of images, in one line; None for other samples.
        preset: Name of the preset that is used; None if there is none of these values.
        facts: Whole sentences.
        warnings: Whole sentences about what is likely a mistake.
    """

    samples: int | None
    source: str
    preprocessing: str | None = None
    preset: str | None = None
    facts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON represents them."""
        return {
            "samples": self.samples, "source": self.source, "facts": list(self.facts),
            "preprocessing": self.preprocessing, "preset": self.preset, "warnings": list(self.warnings),
        }  # fmt: skip  # a table

    def lines(self) -> list[str]:
        """Return the text to show: what is fed, the facts, then the warnings."""
        count = "samples" if self.samples is None else f"{self.samples} samples"
        return [
            self.preprocessing or f"{count} ({self.source})",
            *self.facts,
            *(f"warning: {w}" for w in self.warnings),
        ]

    def followed_by(self, other: Preflight, name: str) -> Preflight:
        """Return this with the sentences about other samples, which begin with their name."""
        more = [other.preprocessing] if other.preprocessing else []
        facts = [f"{name}: {text}" for text in (*more, *other.facts)]
        return replace(
            self,
            facts=(*self.facts, *facts),
            warnings=(*self.warnings, *(f"{name}: {text}" for text in other.warnings)),
        )


def preflight(source: Source, model: Model, *, metric: str | None = None, detector: str | None = None) -> Preflight:
    """Check samples before anything is computed with them.

    Args:
        source: The samples, as `open_source` returns them.
        model: The original.
        metric: Metric that will be measured on the labels; None if labels are not used.
        detector: Kind of detector, see `data.detection`.

    Raises:
        DataError: An image cannot be read, or a label is none of the model's classes.
    """
    if isinstance(source, Synthetic):
        return Preflight(source.count, "synthetic")
    found = _surveyed(source)
    session = _session(model)
    if session is None:
        return found
    checks = _Checks(source, model, session)
    found = _with_more(found, facts=checks.label_facts(), warnings=checks.preprocessing_warnings())
    if metric is None:
        return _with_more(found, warnings=checks.batch_warnings())
    checks.require_labels(metric)
    return _with_more(found, warnings=checks.score_warnings(metric, detector))


def _with_more(found: Preflight, facts: Sequence[str] = (), warnings: Sequence[str] = ()) -> Preflight:
    return replace(found, facts=(*found.facts, *facts), warnings=(*found.warnings, *warnings))


def _session(model: Model) -> ort.InferenceSession | None:
    """Return a session of the original; None if onnxruntime cannot run it, which a later step reports."""
    if model.is_over_limit:
        return None
    try:
        return open_model(stated(model))
    except CpdError:
        return None


def _surveyed(source: Source) -> Preflight:
    if isinstance(source, ImageFolder):
        found = survey.of_images(source)
        height, width, channels, first = source.layout
        shape = [channels, height, width] if first else [height, width, channels]
        text = str(source.decoder.preprocessing) if source.entry.dtype.kind == "f" else "x"
        how = ", letterboxed" if source.decoder.preprocessing.letterbox else ""
        line = f"{found.summary} -> {source.entry.dtype} {str(shape).replace(' ', '')}, {text}{how}"
        return Preflight(source.count, "folder of images", line, source.options.name, found.facts, found.warnings)
    if isinstance(source, ArraySource):
        found = survey.of_arrays(source.arrays)
        return Preflight(source.count, "arrays", None, None, found.facts, found.warnings)
    return Preflight(source.count, "function")


class _Checks:
    """Checks of samples that run the original."""

    def __init__(self, source: Source, model: Model, session: ort.InferenceSession) -> None:
        self.source, self.session = source, session
        self.inputs = run_inputs(model)
        self.batch = fixed_batch(self.inputs) or _AT_ONCE if source.count is not None else _AT_ONCE

    def label_facts(self) -> list[str]:
        """Return how class folders are numbered."""
        found = self.source.found if isinstance(self.source, ImageFolder) else None
        if found is None:
            return []
        if found.masks:
            return [f"labels are the class ids of masks such as {found.masks[0].name}; {IGNORED} is ignored"]
        if found.boxes:
            return [f"labels are {sum(map(len, found.boxes))} boxes"]
        if found.classes is None:
            return []
        pairs = [f"{index} {name}" for name, index in found.classes.index.items()]
        more = f" and {len(pairs) - _SHOWN} more" if len(pairs) > _SHOWN else ""
        return [f"labels are {len(pairs)} class folders by {found.classes.source}: {', '.join(pairs[:_SHOWN])}{more}"]

    # Preprocessing.

    def preprocessing_warnings(self) -> list[str]:
        """Return a sentence if another preset fits the original better."""
        try:
            pixels, labels, used = self._pixels()
        except DataError:
            return []  # no images
        if pixels is None or len(pixels) < _LEAST_COMPARED:
            return []
        height, width, channels, first = image_layout(self.inputs[0], ImageOptions(size=pixels.shape[1:3]))
        chosen = len(pixels)

        def outputs(preprocessing: Preprocessing, *, is_first: bool = False) -> list[Array]:
            nonlocal chosen
            made: list[list[Array]] = []
            started = time.perf_counter()
            for start in range(0, chosen, self.batch):
                part = self._prepared(pixels[start : start + self.batch], preprocessing, first=first)
                made.append(run(self.session, {self.inputs[0].name: part}))
                spent, done = time.perf_counter() - started, start + len(part)
                if is_first and chosen == len(pixels) and spent * _RUNS * chosen / done > _SECONDS:
                    chosen = max(done, int(_SECONDS * done / spent / _RUNS))
            return [np.concatenate(parts)[:chosen] for parts in zip(*made, strict=True)]

        try:
            outputs(used, is_first=True)  # determines how many, for all alike
            found = ranking.rank(outputs, used, (height, width), channels, None if labels is None else labels[:chosen])
        except (CpdError, ValueError):  # outputs without an axis of samples; a later step says what does not run
            return []
        warning = None if found is None or chosen < _LEAST_COMPARED else found.warning()
        return [] if warning is None else [warning]

    def _pixels(self) -> tuple[Array | None, Array | None, Preprocessing]:
        """Return some images as pixels 0..255 with their labels, and how they are prepared; None for other samples."""
        source = self.source
        if len(self.inputs) != 1 or self.inputs[0].dtype.kind != "f":
            return None, None, Preprocessing()
        if isinstance(source, ImageFolder):
            rows = survey.chosen(source.count, _COMPARED)
            read = [source.decoder.pixels(source.files[row]) for row in rows]
            labels = None if source.found.boxes else source.labels(rows, [place for _, place in read])
            return np.stack([pixels for pixels, _ in read]), labels, source.decoder.preprocessing
        if isinstance(source, ArraySource):
            array = source.arrays[self.inputs[0].name]
            _, _, _, first = image_layout(self.inputs[0], ImageOptions(size=(1, 1)))
            rows = survey.chosen(len(array), _COMPARED)
            chosen = np.asarray(array[rows])
            labels = np.asarray(source.arrays[LABELS][rows]) if LABELS in source.arrays else None
            is_raw = bool(chosen.size) and float(chosen.max()) > 2
            return survey.raw_pixels(chosen, first=first), labels, Preprocessing(scale=1.0 if is_raw else 1 / 255)
        return None, None, Preprocessing()

    def _prepared(self, pixels: Array, chosen: Preprocessing, *, first: bool) -> Array:
        ordered = pixels[..., ::-1] if chosen.order == "BGR" else pixels
        values = (ordered * chosen.scale - np.asarray(chosen.mean)) / np.asarray(chosen.std)
        return np.ascontiguousarray(np.moveaxis(values, -1, 1) if first else values, self.inputs[0].dtype)

    # Batches.

    def batch_warnings(self) -> list[str]:
        """Return a sentence if the answers for a sample depend on the samples that run with it."""
        batch = next(iter(self.source.batches(_TOGETHER)), None)
        if batch is None or fixed_batch(self.inputs) is not None:
            return []
        feed = {entry.name: batch[entry.name] for entry in self.inputs}
        try:
            together = answers(self.session, feed)
            alone = [answers(self.session, _sample(feed, index)) for index in range(len(together[0]))]
            apart = [_deviation(a, np.concatenate(b)) for a, b in zip(together, zip(*alone, strict=True), strict=True)]
            if max(apart) <= _DEPENDENT:
                return []
            chance = map(_deviation, together, answers(self.session, feed))
        except (CpdError, ValueError, IndexError):  # it takes no single sample; a later step says what does not run
            return []
        if max(found - usual for found, usual in zip(apart, chance, strict=True)) <= _DEPENDENT:
            return []
        return [
            "the original's outputs for a sample depend on the other samples of its batch, and the pruned model is "
            "fitted to batches: if the model is used with one sample at a time, fix its batch size first, with "
            "'cpd-onnx deploy MODEL -o FILE --batch 1', and prune that file"
        ]

    # Labels.

    def require_labels(self, metric: str) -> None:
        """Raise DataError if a label cannot be one of the model's classes, before anything is computed."""
        classes = self._classes()
        found = self.source.found if isinstance(self.source, ImageFolder) else None
        if found is None or found.classes is None or classes is None or metric in OF_TWO_MODELS:
            return
        index = found.classes.index
        if max(index.values()) >= classes:
            name = max(index, key=lambda folder: index[folder])
            advice = "number folders from 0" if found.classes.source == "number" else "use --classes, or other folders"
            raise DataError(
                f"folder {name!r} is class {index[name]}, but the model has only {classes} classes (from 0): {advice}"
            )

    def _classes(self) -> int | None:
        """Return the number of classes of a classifier; None for other models."""
        batch = next(iter(self.source.batches(1)), None)
        if batch is None:
            return None
        try:
            outputs = run(self.session, {entry.name: batch[entry.name] for entry in self.inputs})
        except CpdError:
            return None
        return int(outputs[0].shape[1]) if outputs and outputs[0].ndim == 2 and outputs[0].shape[1] > 1 else None

    def score_warnings(self, metric: str, detector: str | None) -> list[str]:
        """Return sentences about labels that do not fit, and a score of the original that is near chance."""
        return [*self._sparse_classes(), *self._binary_masks(), *self._near_chance(metric, detector)]

    def _sparse_classes(self) -> Iterator[str]:
        found = self.source.found if isinstance(self.source, ImageFolder) else None
        classes = self._classes() if found is not None and found.classes is not None else None
        if found is None or found.classes is None or classes is None or found.classes.source != "alphabet":
            return
        if len(found.classes.index) < classes:
            yield (
                f"{len(found.classes.index)} folders are numbered by the alphabet, but the model has {classes} "
                "classes: give their order with --classes"
            )

    def _binary_masks(self) -> Iterator[str]:
        found = self.source.found if isinstance(self.source, ImageFolder) else None
        if found is None or not found.masks:
            return
        assert isinstance(self.source, ImageFolder)
        ids = {int(v) for p in found.masks[:_SHOWN] for v in np.unique(self.source.decoder.mask(p, (64, 64)))}
        if ids and ids <= {0, IGNORED} and IGNORED in ids:
            yield f"masks have the values 0 and {IGNORED} only, and {IGNORED} is ignored: write 1 for the foreground"

    def _near_chance(self, metric: str, detector: str | None) -> Iterator[str]:
        if metric not in _NEAR:
            return
        sample = _Some(self.source, _SCORED)
        try:
            score = evaluate(self.session, sample, metric, detector=detector)
        except (DataError, ValueError):
            raise
        except CpdError:  # torchmetrics is missing; the measurement says so
            return
        chance, error = _NEAR[metric](sample.labels, self._classes() or sample.highest + 1)
        if score <= chance + _CLEAR * error:
            yield (
                f"the original itself scores {score:.1%} {metric} on {sample.seen} samples"
                + ("" if metric == "map" else f", chance is {chance:.1%}")
                + ": the preprocessing or the labels do not fit"
            )


def _sample(feed: Batch, index: int) -> Batch:
    """Return one sample of a batch, as a batch."""
    return {name: array[index : index + 1] if array.ndim else array for name, array in feed.items()}


def _deviation(expected: Array, found: Array) -> float:
    """Return the root mean square difference of outputs relative to their standard deviation; 0 for other shapes."""
    if expected.shape != found.shape or expected.dtype.kind != "f" or not expected.size:
        return 0.0
    spread = float(expected.std(dtype=np.float64))
    return float(np.sqrt(np.square(np.subtract(expected, found, dtype=np.float64)).mean())) / spread if spread else 0.0


class _Some:
    """The first samples of a shuffled source; keeps their labels."""

    def __init__(self, source: Source, most: int) -> None:
        self.source, self.most = source, most
        self.count = None if source.count is None else min(most, source.count)
        self.kept: list[Array] = []
        self.seen = 0

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Yield batches until there are enough samples."""
        self.kept, self.seen = [], 0
        for batch in self.source.batches(size, seed=0):
            if LABELS in batch:
                self.kept.append(batch[LABELS])
            self.seen += max((len(array) for array in batch.values() if array.ndim), default=1)
            yield batch
            if self.seen >= self.most:
                return

    @property
    def labels(self) -> Array:
        """Labels of the samples that were yielded, without ignored ones, in one dimension."""
        flat = np.concatenate([labels.ravel() for labels in self.kept]) if self.kept else np.zeros(0, np.int64)
        return np.asarray(flat[flat != IGNORED])

    @property
    def highest(self) -> int:
        """The highest label; 0 if there is none."""
        return int(self.labels.max(initial=0))


def _of_answers(labels: Array, classes: int, answers: int) -> tuple[float, float]:
    """Return the share of right answers by chance, or of the commonest classes, and its standard error."""
    _, counts = np.unique(labels, return_counts=True)
    common = np.sort(counts)[::-1][:answers].sum() / max(len(labels), 1)
    chance = max(min(answers / classes, 1.0), float(common))
    return chance, float(np.sqrt(chance * (1 - chance) / max(len(labels), 1)))


def _of_pixels(labels: Array, classes: int) -> tuple[float, float]:
    """Return the mean intersection over union of calling every pixel the commonest class."""
    _, counts = np.unique(labels, return_counts=True)
    return (float(counts.max() / counts.sum() / len(counts)) if counts.size else 0.0), 0.01


_NEAR: dict[str, Callable[[Array, int], tuple[float, float]]] = {
    "top1": lambda labels, classes: _of_answers(labels, classes, 1),
    "top5": lambda labels, classes: _of_answers(labels, classes, 5),
    "miou": _of_pixels,
    "map": lambda labels, classes: (_NO_OBJECTS, 0.0),
}
"""Score that is reached without any knowledge, and its standard error, by metric."""
