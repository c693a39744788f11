"""Refine: weight the loss of each group by what whole allocations, repaired, lose at the outputs.

The loss that a score assigns to a group is that of the layers that consume it, and says nothing of what the outputs
make of it. Its weight is found in three steps. First, each group alone is narrowed, its consumers are fitted anew, and
the divergence of the outputs is set against the loss. Then whole allocations by the scores alone and by powers of these
weights, with an exponent found by a line search, are repaired and compared at the outputs. At last the best weights are
varied at random, as long as the effort allows (Frantar and Alistarh, SPDY, ICML 2022, with a repair of each candidate).
Where groups can be removed as a whole, one more allocation by the scores alone may do so, and the others do if that one
is nearer to the original, or if only that one meets the targets.

All comparisons are made on samples that no candidate is fitted to. Labels are not needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cpd_onnx.budget.allocation import Allocation, LossCurves, depth_curves
from cpd_onnx.budget.targets import SLACK
from cpd_onnx.channels.groups import Combed
from cpd_onnx.data.held_out import Division, divide
from cpd_onnx.data.sources import Source, calibration, few_samples
from cpd_onnx.errors import TargetError
from cpd_onnx.fitting.divergence import Divergence, Floats, is_nearer
from cpd_onnx.io.progress import advance, step
from cpd_onnx.passes.repair import RepairOptions, repair
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.runtime.stream import batch_size, held_feeds
from cpd_onnx.scores.alone import Alone
from cpd_onnx.scores.registry import Scores

_HELD_OUT = 0.25
"""Fraction of the samples on which candidates are compared (heuristic)."""
_SAMPLES = 128
"""Maximum number of samples that a candidate is fitted to, and on which it is compared (heuristic)."""
_ELEMENTS = 1 << 23
"""Numbers in all samples that a candidate is fitted to, if these are not very few (heuristic)."""
_ALONE = 2
"""One in this many of the samples serves to measure a group alone (heuristic)."""
_BATCHES = 8
"""Least number of batches in which a group alone is fitted, as far as there are samples (heuristic)."""
_ROWS = 1 << 13
"""Approximate number of rows for each fit of a candidate (heuristic)."""
_ROUNDS = 1
"""Number of times that targets of a candidate which an activation clips are replaced (heuristic)."""
_USUAL = 0.25
"""Ratio of its channels that a group loses where its weight is measured, if the scores leave it whole (heuristic)."""
_LARGEST, _FINEST = 4.0, 0.25
"""Largest exponent of the measured weights that is tried, and smallest distance of two exponents (heuristic)."""
_MOST = 64
"""Maximum number of groups whose weights are measured (heuristic)."""
_FURTHEST = 6.0
"""Maximum deviation of the logarithm of a weight from the median (heuristic)."""
_STEP, _LARGER, _SMALLER = 0.25, 1.3, 0.85
"""Standard deviation of the first changes of logarithms, and its factors after a success and a failure (heuristic)."""


class Choose(Protocol):
    """Allocates by loss curves, or by those that the scores imply."""

    def __call__(self, *, curves: LossCurves | None) -> Allocation:
        """Return the allocation."""


@dataclass(frozen=True)
class RefineOptions:
    """Options of the comparison.

    Attributes:
        effort: Number of allocations to compare.
        seed: Seed of the samples and of the random changes.
        depth: Whether allocations are compared in which branches disappear as a whole.
    """

    effort: int
    seed: int = 0
    depth: bool = True


@dataclass(frozen=True, eq=False)
class Refined:
    """Loss curves with weights, and what they were chosen by.

    Attributes:
        curves: The curves; None for those that the scores imply.
        tried: Number of different allocations that were compared.
        before: Divergence at the outputs of the allocation by the scores alone, of two of these the one that meets the
            targets.
        after: That of the best.
        fallback: The curves to allocate by where the targets cannot be met by `curves`: whole branches may be removed
            by these if they may not by `curves`, and the other way round. None if none can ever be removed.
    """

    curves: LossCurves | None = None
    tried: int = 0
    before: float = math.nan
    after: float = math.nan
    fallback: LossCurves | None = None

    def chosen(self, choose: Choose, allows: Callable[[Allocation], bool] = lambda _: True) -> Allocation:
        """Return the allocation by the curves, or that by the fallback if only this meets the targets, or nearly so.

        Args:
            choose: Allocates by curves.
            allows: Whether an allocation by the fallback may be chosen.

        Raises TargetError if the targets cannot be reached.
        """
        if self.fallback is None:
            return choose(curves=self.curves)
        found = _reached(choose, self.curves)
        if found is None:
            return choose(curves=self.fallback)
        other = _reached(choose, self.fallback) if found.is_nearest else None
        return found if other is None or not (_is_nearer_target(other, found) and allows(other)) else other

    @property
    def notes(self) -> tuple[str, ...]:
        """A note on the comparison; empty if fewer than two allocations were compared."""
        if self.tried < 2:
            return ()
        words = (
            f"{self.tried} allocations were repaired and compared with the original on samples not used for the repair"
        )
        first = f"the one chosen by the errors of the layers, whose outputs diverge by {self.before:.3g}"
        if not self.after < self.before:
            return (f"{words}; none was clearly closer than {first}",)
        return (f"{words}; the outputs of the best diverge by {self.after:.3g}, closer than {first}",)


def refined(
    combed: Combed, scores: Sequence[Scores], choose: Choose, data: Source, options: RefineOptions, *, is_loss: bool
) -> Refined:
    """Return loss curves whose allocation is nearest to the original at the outputs.

    Args:
        combed: The model.
        scores: Scores of its groups.
        choose: Returns the allocation of loss curves, all of which meet the same targets.
        data: Samples, a quarter of which no candidate is fitted to.
        options: How much is tried.
        is_loss: Whether the scores are losses.

    The scores alone decide if the samples cannot be divided, the model has no outputs of floating-point type, or it is
    too large for one file.

    Raises:
        DataError: The samples do not fit the model.
        UnsupportedError: onnxruntime cannot run it.
        TargetError: The targets cannot be reached.
    """
    curves = depth_curves(combed, scores, is_loss=is_loss)
    curves = curves if options.depth else curves.widths_alone
    unrefined = Refined(fallback=_fallback(curves, None))
    division = divide(data, _HELD_OUT, _SAMPLES)
    if division is None or options.effort < 2 or combed.folded.model.is_over_limit:
        return unrefined
    with step("refine", is_whole=True):
        refiner = _Refiner(combed, scores, choose, division, curves, options)
        return refiner.run() if refiner.measure.is_defined else unrefined


class _Refiner:
    """Compares whole allocations, by curves with different weights."""

    def __init__(
        self,
        combed: Combed,
        scores: Sequence[Scores],
        choose: Choose,
        division: Division,
        local: LossCurves,
        options: RefineOptions,
    ) -> None:
        self.combed, self.scores, self.choose, self.local = combed, scores, choose, local
        self.effort, self.seed = options.effort, options.seed
        self.fitted, self.held_out = division.first, division.second
        self.measure = Divergence(combed.folded.model, self.held_out, _SAMPLES)
        self.samples = few_samples(_SAMPLES, self.measure.sample_size, _ELEMENTS)
        self.known: dict[tuple[tuple[int, ...], ...], Floats] = {}

    def run(self) -> Refined:
        """Return the best of all candidates."""
        first = self.choose(curves=None)
        groups = self.measured_alone(first)
        total = len(groups) + self.effort
        best = before = self.divergence(first)
        logs = self.logs(first, groups, total)
        weights, curves, local = np.zeros_like(logs), None, self.local.widths_alone
        deep = _reached(self.choose, self.local) if np.isfinite(self.local.whole).any() else None
        if deep is not None:
            found, is_needed = self.divergence(deep), _is_nearer_target(deep, first)
            local = self.local if is_needed or found.mean() < best.mean() else local
            if is_needed or is_nearer(found, best):
                best, curves = found, self.local
            before = found if is_needed else before
        rng, width = np.random.default_rng(self.seed), _STEP
        along = {0.0: float(best.mean())}
        for number in range(1, self.effort):
            advance(len(groups) + number, total, f"divergence {best.mean():.3g}")
            exponent = _next_exponent(along)
            trial = weights + width * rng.standard_normal(len(logs)) if exponent is None else exponent * logs
            weighted = _weighted(local, trial)
            found = self.tried(weighted)
            if is_better := is_nearer(found, best):
                best, weights, curves = found, trial, weighted
            if exponent is None:
                width *= _LARGER if is_better else _SMALLER
            else:
                along[exponent] = float(found.mean())
        fallback = _fallback(_weighted(self.local, weights), curves)
        return Refined(curves, len(self.known), float(before.mean()), float(best.mean()), fallback)

    def tried(self, curves: LossCurves) -> Floats:
        """Return the divergence after an allocation by some curves, infinite if they cannot meet the targets."""
        chosen = _reached(self.choose, curves)
        return np.full(1, np.inf) if chosen is None else self.divergence(chosen)

    def divergence(self, chosen: Allocation) -> Floats:
        """Return the divergence of each held-out sample after the allocation is carried out and repaired."""
        key = tuple(map(tuple, chosen.removed))
        if key not in self.known:
            kept = chosen.keep_mask(self.combed)
            options = RepairOptions(samples=self.samples, rows=_ROWS, rounds=_ROUNDS, seed=self.seed, refits=False)
            small = repair(self.combed, kept, rewrite(self.combed, kept).model, self.fitted, options).model
            self.known[key] = self.measure(small)
        return self.known[key]

    def measured_alone(self, first: Allocation) -> list[int]:
        """Return the groups that lose most by the scores, whose weights are measured."""
        lost = [self.lost(first, number) for number in range(len(self.combed.groups))]
        order = sorted(range(len(lost)), key=lambda number: -lost[number])
        return sorted(number for number in order[:_MOST] if lost[number] > 0)

    def lost(self, first: Allocation, number: int) -> float:
        """Return the loss of a group by the scores where its weight is measured."""
        gone = self.gone(first, number)
        return float(self.local.loss[number][gone])

    def gone(self, first: Allocation, number: int) -> int:
        """Return how many channels a group loses for the measurement of its weight."""
        size = len(self.combed.groups[number])
        return min(size - 1, len(first.removed[number]) or round(_USUAL * size))

    def logs(self, first: Allocation, groups: Sequence[int], total: int) -> Floats:
        """Return the logarithm of the measured weight of each group, relative to the median."""
        alone, folded = self.samples // _ALONE, self.combed.folded
        measure = Divergence(folded.model, self.held_out, alone)
        batch = batch_size(folded, max(1, alone // _BATCHES))
        feeds = held_feeds(calibration(folded.model, self.fitted, alone, batch=batch, seed=self.seed))
        gone = {number: np.argsort(self.scores[number], kind="stable")[: self.gone(first, number)] for number in groups}
        found = np.full(len(self.combed.groups), np.nan)
        diverged = Alone(self.combed, feeds, measure, self.seed).diverged(gone)
        for done, (number, values) in enumerate(diverged):
            advance(done, total, self.combed.groups[number].name)
            mean = float(values.mean())
            if 0 < mean < math.inf:
                found[number] = math.log(mean / self.lost(first, number))
        known = found[np.isfinite(found)]
        middle = float(np.median(known)) if len(known) else 0.0
        return np.asarray(np.clip(np.where(np.isfinite(found), found - middle, 0.0), -_FURTHEST, _FURTHEST))


def _reached(choose: Choose, curves: LossCurves | None) -> Allocation | None:
    """Return the allocation by some curves; None if they cannot meet the targets."""
    try:
        return choose(curves=curves)
    except TargetError:
        return None


def _fallback(deep: LossCurves, chosen: LossCurves | None) -> LossCurves | None:
    """Return the curves to allocate by where the chosen ones miss the targets, see `Refined`."""
    if not np.isfinite(deep.whole).any():
        return None
    return deep if chosen is None or not np.isfinite(chosen.whole).any() else chosen.widths_alone


def _is_nearer_target(chosen: Allocation, other: Allocation) -> bool:
    """Return whether an allocation meets the targets that another misses, or misses them by clearly less."""
    return _over(chosen) < _over(other) - SLACK


def _over(chosen: Allocation) -> float:
    """Return by how much the target that is missed most is exceeded, relative to it; 0 if all are met."""
    return max((asked.got / asked.asked - 1 for asked in chosen.asked if not asked.is_met), default=0.0)


def _next_exponent(found: Mapping[float, float]) -> float | None:
    """Return the exponent to try next by the divergence of others; None if the best is known closely.

    The largest is doubled as long as it is the best, and then the wider of the gaps beside the best is halved.
    """
    best = min(found, key=found.__getitem__)
    above = min((exponent for exponent in found if exponent > best), default=None)
    below = max((exponent for exponent in found if exponent < best), default=best)
    if above is None and best < _LARGEST:
        return max(1.0, 2 * best)
    gaps = {(best + other) / 2: abs(best - other) for other in (above, below) if other is not None}
    middle = max(gaps, key=gaps.__getitem__)
    return middle if gaps[middle] > _FINEST else None


def _weighted(local: LossCurves, logs: Floats) -> LossCurves:
    """Return loss curves multiplied by weights, given by their logarithms."""
    factors = np.exp(logs)
    loss = tuple(factor * curve for factor, curve in zip(factors, local.loss, strict=True))
    return LossCurves(loss, tuple(factor * whole for factor, whole in zip(factors.tolist(), local.whole, strict=False)))
