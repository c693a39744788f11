"""Sensitivity: the error of the outputs when one group alone loses channels, at some of its widths.

Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, with what consumes the group fitted anew before it is
measured (`repair`), since that is how it would be pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.allocation import LossCurves
from cpd_onnx.channels.groups import Combed, Group
from cpd_onnx.data.sources import Source, calibration
from cpd_onnx.errors import DataError
from cpd_onnx.fitting.output_error import output_error, outputs_of
from cpd_onnx.io.progress import step, tracked
from cpd_onnx.ir.model import Model
from cpd_onnx.options import Renaming, commas, option, positive, ratio
from cpd_onnx.passes.repair import RepairOptions, repair
from cpd_onnx.pipeline.state import State
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.scores.registry import Scores, score

ERROR = "squared error of the outputs over their variance"
"""Name of the error that is measured."""


@dataclass(frozen=True)
class Point:
    """The error at one width of a group."""

    width: int
    error: float


@dataclass(frozen=True)
class SensitivityOptions(metaclass=Renaming):
    """Options of the measurement; `seed` is that of the choice of samples."""

    ratios: tuple[float, ...] = option(
        (0.75, 0.5, 0.25, 0.0),
        "Ratios of each group's channels at which the loss is measured; 0: one channel",
        read=commas(ratio),
        metavar="R,R",
        renamed_from="shares",
        group="sensitivity",
    )
    score: str = option(
        "reconstruction", "Score that determines the order of removal", takes="function", group="sensitivity"
    )
    samples: int = option(64, "Number of samples for the measurement", read=positive, group="sensitivity")
    repair: bool = option(True, "Refit the weights that consume the group before the measurement", group="sensitivity")
    seed: int = 0


@step("sensitivity", is_whole=True)
def sensitivity(
    combed: Combed,
    scores: Sequence[Scores],
    data: Source,
    options: SensitivityOptions | None = None,
    *,
    observer: Callable[[Group], None] | None = None,
) -> dict[str, tuple[Point, ...]]:
    """Return, for each group by name, the error of the outputs at some of its widths, the full width first.

    Args:
        combed: The model and its coupled channels.
        scores: Scores of all groups; channels with the lowest are removed first.
        data: Samples; labels are not used.
        options: Options of the measurement.
        observer: Called with each group before it is measured.

    Raises:
        DataError: The data does not fit the model or there is none.
        UnsupportedError: onnxruntime cannot run the model.
    """
    chosen = options or SensitivityOptions()
    feeds = list(calibration(combed.folded.model, data, chosen.samples, seed=chosen.seed))
    wanted = list(outputs_of(combed.folded.model, feeds))
    found: dict[str, tuple[Point, ...]] = {}
    for group, values in tracked(list(zip(combed.groups, scores, strict=True))):
        if observer is not None:
            observer(group)
        order = np.argsort(values, kind="stable")
        points = [Point(len(group), 0.0)]
        for width in _widths(len(group), chosen.ratios):
            fitting = RepairOptions(samples=chosen.samples, seed=chosen.seed) if chosen.repair else None
            small = narrowed(combed, group, order[: len(group) - width], data, fitting)
            points.append(Point(width, output_error(wanted, outputs_of(small, feeds))))
        found[group.name] = tuple(points)
    return found


def narrowed(
    combed: Combed, group: Group, gone: npt.NDArray[np.int64], data: Source, fitting: RepairOptions | None
) -> Model:
    """Return the model without some channels of a group, by position; its consumers are fitted anew if wanted."""
    kept = KeepMask(combed.atoms, group.channels[gone])
    small = rewrite(combed, kept).model
    if fitting is None:
        return small
    consumers = {member.weight.value.name for member in combed.members(group)}
    return repair(combed, kept, small, data, fitting, only=consumers).model


def distance(original: Model, model: Model, data: Source, samples: int = SensitivityOptions.samples) -> float:
    """Return the `ERROR` of a model's outputs relative to the original's, on that many samples.

    Raises DataError if the data does not fit, UnsupportedError if onnxruntime cannot run a model.
    """
    feeds = list(calibration(original, data, samples))
    return output_error(outputs_of(original, feeds), outputs_of(model, feeds))


def _widths(size: int, ratios: Iterable[float]) -> list[int]:
    """Return the widths below the full one, the widest first."""
    return sorted({max(1, round(each * size)) for each in ratios} - {size}, reverse=True)


def measured_curves(combed: Combed, found: Mapping[str, Sequence[Point]]) -> LossCurves:
    """Return the measured errors as loss curves for the policy "optimal", interpolated linearly between points."""
    loss = []
    for group in combed.groups:
        points = found[group.name]
        gone = [len(group) - point.width for point in points]
        line = np.interp(np.arange(len(group)), gone, [point.error for point in points])
        loss.append(np.maximum.accumulate(line))
    return LossCurves(tuple(loss))


def as_json(found: Mapping[str, Sequence[Point]]) -> list[dict[str, Any]]:
    """Return the measurements as plain values."""
    return [
        {"group": name, "points": [{"width": point.width, "error": point.error} for point in points]}
        for name, points in found.items()
    ]


@dataclass(frozen=True)
class Sensitivity(SensitivityOptions):
    """Measure the effect of each group's channels on the outputs, for an allocation under the policy "optimal"."""

    name: ClassVar[str] = "sensitivity"
    requires: ClassVar[tuple[str, ...]] = ("combed",)
    provides: ClassVar[tuple[str, ...]] = ("scores", "curves")

    def __call__(self, state: State) -> State:
        """Fill in `curves`, and `scores` if they are missing."""
        if state.data is None:
            raise DataError("sensitivity is measured on samples: give --data, or a source as `data`")
        combed = state.need("combed", "comb")
        scores = state.scores
        if scores is None:
            scores = score(combed, self.score, data=state.data, seed=self.seed, is_repaired=self.repair)
        found = sensitivity(combed, scores, state.data, self)
        return replace(state, scores=scores, curves=measured_curves(combed, found))
