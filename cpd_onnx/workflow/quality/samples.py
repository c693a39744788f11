"""Samples by their use, and how much a model loses on them against the original."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from cpd_onnx.budget.latency import Convert
from cpd_onnx.data.agreement import Agreement, agreement
from cpd_onnx.data.held_out import at_most, divide
from cpd_onnx.data.metrics import OF_TWO_MODELS, evaluate, metric_of
from cpd_onnx.data.sources import Source, calibration, few_samples, numbers_in_sample
from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.errors import DataError, TargetError, UnsupportedError
from cpd_onnx.ir.model import Model
from cpd_onnx.passes.sensitivity import distance
from cpd_onnx.runtime.sessions import execute, open_model, sample_count
from cpd_onnx.scores.registry import find_score_function
from cpd_onnx.shapes.inference import fold
from cpd_onnx.shapes.stated import stated
from cpd_onnx.shapes.values import Folded

_CHOOSING = 1 / 3
"""Part of the samples for measurements that a search uses (heuristic). The result is judged by the others; the more
there are, the more likely it is that they show what the search has found."""
_GENERATED = 128
"""Number of samples that are generated in place of data (measured: enough for the choice and the repair)."""
_ELEMENTS, _LEAST_GENERATED = 1 << 25, 16
"""Numbers in all generated samples, and samples at least: each large image has many rows to fit to (heuristic)."""
_HIDDEN = 1 << 31
"""Numbers in the tensors of the model for all generated samples, so that a large model is run on fewer (heuristic)."""
_NUMBERS = 1 << 26
"""Numbers in all samples that are kept for fitting where the rest can be held out (heuristic): those of 446 images of
224x224."""
_FEW = 30
"""Number of samples below which equal answers say too little (heuristic): 29 show, at best, that 10 % may differ."""


@dataclass(frozen=True)
class Samples:
    """Samples by what they are used for.

    Attributes:
        fitted: Samples that channels, weights and training are fitted to; None without data.
        choosing: Samples on which models of different sizes are compared; None without real samples.
        judging: Samples on which the result is measured, others than those for choosing if a choice is made.
        has_labels: Whether the last two have labels that the metric is measured against.
        is_held_out: Whether nothing is fitted to the last two.
    """

    fitted: Source | None
    choosing: Source | None = None
    judging: Source | None = None
    has_labels: bool = False
    is_held_out: bool = True


def samples_of(
    data: Source | None, labelled: Source | None, hold_out: float, *, is_search: bool, enough: int | None = None
) -> Samples:
    """Return the samples by their use.

    Args:
        data: Samples to fit to.
        labelled: Further samples, with labels; nothing is fitted to them.
        hold_out: Fraction of `data` that is held out where there are no labelled samples; 0 for none.
        is_search: Whether models of different sizes are to be compared, for which a third of the samples are used that
            nothing is fitted to.
        enough: Number of samples that suffice for fitting, so that all others are held out too; None if more are
            better, as they are for training.
    """
    fitted, judging, is_held_out = data, labelled, True
    if labelled is None and data is not None and not isinstance(data, Synthetic):
        if enough is not None and hold_out and data.count:
            hold_out = max(hold_out, 1 - enough / data.count)
        division = divide(data, hold_out)
        fitted, judging = (data, at_most(data)) if division is None else (division.first, division.second)
        is_held_out = division is not None
    parts = divide(judging, 1 - _CHOOSING) if is_search and judging is not None and is_held_out else None
    choosing, judging = (judging, judging) if parts is None else (parts.first, parts.second)
    return Samples(fitted, choosing, judging, labelled is not None, is_held_out)


def enough_to_fit(model: Model, data: Source | None, most: int) -> int:
    """Return how many samples suffice for scores and a repair that use at most so many: of large ones fewer do."""
    if data is None or data.count is None:
        return most
    return few_samples(most, numbers_in_sample(model, data), _NUMBERS, _GENERATED)


def to_fit(data: Source | None, model: Model, options: Any) -> Source | None:
    """Return the samples to fit to: `data` or, without it in a run with the option `blind`, generated ones.

    None without either, or if the model cannot be run on generated ones or is very large, or if neither the score nor
    the repair in `options` needs any.
    """
    if data is not None or not options.blind:
        return data
    needs_none = options.repair is False and options.score and not find_score_function(options.score).needs_data
    if needs_none or model.is_over_limit:
        return None
    try:
        folded = fold(model, dict(options.input_shapes or {}))
        feed = next(calibration(model, Synthetic(folded), 1))
        execute(open_model(model), feed)
    except (DataError, UnsupportedError):
        return None
    count = min(_ELEMENTS * sample_count(feed) / sum(array.size for array in feed.values()), _HIDDEN / _hidden(folded))
    return Synthetic(folded, int(np.clip(count, _LEAST_GENERATED, _GENERATED)))


def _hidden(folded: Folded) -> float:
    """Return how many numbers the tensors of the main graph have for each sample, as far as their shapes are known."""
    values = [value for value in folded.scope.values.values() if value.constants is None and value.shape is not None]
    return max(1.0, sum(math.prod(value.shape or ()) for value in values) / max(1, folded.batch))


def agreement_on(original: Model, model: Model, samples: Samples, task: str | None) -> Agreement | None:
    """Return how often a model answers like the original on the samples for judging; None without samples."""
    if samples.judging is None:
        return None
    found = agreement(original, model, samples.judging, task)
    return None if found is None else replace(found, is_held_out=samples.is_held_out)


@dataclass(frozen=True)
class Loss:
    """The loss of a model on the samples for choosing.

    Attributes:
        original: The original.
        samples: The samples.
        metric: Metric that is measured where the samples have labels.
        task: Task of the agreement with the original, which is measured otherwise; None to tell it from the outputs.
        detector: Form of the outputs of a detector, for the metric of detections; None to tell it.
        is_certain: Whether the loss is one that is not exceeded at the confidence of the agreement; else it is the
            loss to be expected.
        converted: Returns the form in which models are deployed, which is measured; None for the models themselves.
    """

    original: Model
    samples: Samples
    metric: str
    task: str | None = None
    detector: str | None = None
    is_certain: bool = True
    converted: Convert | None = None

    def __call__(self, model: Model) -> float:
        """Return the loss, of the metric or of the agreement.

        If all answers are the original's, it is at most the bound by their margins where there are scores of classes:
        of few samples, all may be answered alike by luck. Below `_FEW` samples margins say too little as well, and the
        squared error of the outputs over their variance counts if it is larger: a few samples suffice to measure it,
        and where it is 0.1, about 5 % of a classifier's answers differ (measured on GTSRB).
        """
        source = self.samples.choosing
        assert source is not None
        model = model if self.converted is None else self.converted(model)
        found = agreement(self.original, model, source, self.task)
        if found is None:
            raise TargetError("the outputs cannot be compared with those of the original: leave out --max-loss")
        is_counted = found.interval == "Clopper-Pearson"
        least = 0.0
        if is_counted and found.samples < _FEW:
            least = distance(self.original, model, source, found.samples)
        bound = 1 - (found.low if self.is_certain else _expected(found))
        if found.value == 1.0:
            bound = min(bound, found.most_lost or 0.0)
        if not self.samples.has_labels or self.metric in OF_TWO_MODELS:
            return max(least, bound)
        # The metric differs at most where the answers do.
        margin = bound - (1 - found.value) if is_counted else 0.0
        return max(least, self._of_labels(model, source) + margin)

    def advice(self) -> str:
        """Return a clause that asks for more samples; empty if there are enough to tell a loss."""
        count = self.samples.choosing.count if self.samples.choosing is not None else None
        return (
            "" if count is None or count >= _FEW else f" on {count} held-out samples; more --data shows and keeps more"
        )

    def _of_labels(self, model: Model, source: Source) -> float:
        score = evaluate(stated(model, self.original).complete_proto(), source, self.metric, detector=self.detector)
        sign = -1.0 if metric_of(self.metric).lower_is_better else 1.0
        return sign * (self._original_score - score)

    @cached_property
    def _original_score(self) -> float:
        assert self.samples.choosing is not None
        return evaluate(
            stated(self.original).complete_proto(), self.samples.choosing, self.metric, detector=self.detector
        )


def _expected(found: Agreement) -> float:
    """Return the agreement to be expected; of counted answers by the rule of succession, cautious with few samples."""
    is_counted = found.interval == "Clopper-Pearson"
    return (found.value * found.samples + 1) / (found.samples + 2) if is_counted else found.value
