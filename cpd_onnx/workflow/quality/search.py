"""The smallest model that loses no more than is allowed, and the channels that can be removed at no loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from cpd_onnx.budget.allocation import FASTER, Allocation
from cpd_onnx.budget.choosing import Chooser
from cpd_onnx.budget.latency import Convert, LatencyProbe
from cpd_onnx.budget.speed import SpeedCheck
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.data.sources import few_samples, numbers_in_sample
from cpd_onnx.errors import LossError, TargetError
from cpd_onnx.io.progress import advance
from cpd_onnx.io.progress import step as reported
from cpd_onnx.ir.model import Model
from cpd_onnx.passes.comb import Comb
from cpd_onnx.passes.fold import Fold
from cpd_onnx.passes.iterate import Iterate
from cpd_onnx.passes.lossless import Lossless, in_blocks
from cpd_onnx.passes.refine import Refined
from cpd_onnx.passes.repair import RepairOptions, repair
from cpd_onnx.pipeline.state import State
from cpd_onnx.rewrite.plan import Plan, make_plan
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.scores.registry import find_score_function, score
from cpd_onnx.workflow import defaults
from cpd_onnx.workflow.quality.samples import Loss, Samples

_FIRST = 0.6
"""Part of the way to the targets that a search tries after the whole way, and factor to the next one (heuristic)."""
_LAST = 0.05
"""Part of the way below which a search ends: so little is removed that nothing is gained (heuristic)."""
_BISECTIONS = 3
"""Number of bisections between a candidate that loses too much and one that does not (heuristic)."""
_ELEMENTS = 1 << 24
"""Numbers in all samples of a repair that only serves a comparison, if these are not very few (heuristic)."""
TRAINABLE = 3.0
"""Loss before training, relative to the allowed one, that training usually recovers (heuristic)."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A choice of channels part of the way to the targets.

    Attributes:
        progress: Part of the way, above 0 up to 1, where the targets are met.
        chosen: The channels.
        loss: Loss of the pruned model, repaired if a repair was requested, before any training.
        by: Loss curves that chose them.
    """

    progress: float
    chosen: Allocation
    loss: float
    by: Refined


class Search:
    """Finds the smallest model on the way to the targets that loses at most what is allowed.

    The original is combed and scored once; candidates are pruned and repaired, but neither timed nor trained. The loss
    curves are refined once, where the scores alone end, and the search goes on from there.
    """

    def __init__(self, step: Iterate, state: State, loss: Loss) -> None:
        """Comb and score the original; raises TargetError for several rounds."""
        if step.rounds > 1:
            raise TargetError(f"a bound of the loss is met by a search in one round, got {step.rounds} rounds")
        self.step, self.state, self.loss = step, state, loss
        self.combed = comb(state.model, state.input_shapes)
        self.scores = score(
            self.combed, step.score, samples=step.samples, data=state.data, labels=step.score_labels, seed=step.seed,
            is_repaired=step.repair,
        )  # fmt: skip  # the fields in order
        self.is_loss = find_score_function(step.score).is_loss
        chooser: Chooser = replace(step.chooser(self.combed, state.converted), nearest=True)
        self.chooser = chooser.corrected(self.combed, self.scores, is_loss=self.is_loss)
        self.tried: dict[float, Candidate | None] = {}
        self.by: Refined | None = None

    def at(self, progress: float) -> Candidate | None:
        """Return the candidate at a part of the way; None if so little would be removed that nothing can be."""
        if progress not in self.tried:
            with reported("search", is_whole=True):
                advance(len(self.tried), None, f"{progress:.0%} of the way to the target")
                try:
                    self.tried[progress] = self._candidate(progress)
                except TargetError:
                    self.tried[progress] = None
        return self.tried[progress]

    def _candidate(self, progress: float) -> Candidate:
        by = self.by or Refined()
        chosen = self.chooser.quick(self.combed, self.scores, progress, is_loss=self.is_loss, curves=by.curves)
        return Candidate(progress, chosen, self.loss_of(chosen), by)

    def loss_of(self, chosen: Allocation) -> float:
        """Return the loss of the model without some channels, repaired if a repair was requested."""
        kept = chosen.keep_mask(self.combed)
        small = rewrite(self.combed, kept).model
        if self.step.repair:
            assert self.state.data is not None
            options = RepairOptions(samples=self.repair_samples, seed=self.step.seed)
            small = repair(self.combed, kept, small, self.state.data, options).model
        return self.loss(small)

    @cached_property
    def repair_samples(self) -> int:
        """Number of samples that a candidate is repaired on."""
        assert self.state.data is not None
        return few_samples(self.step.repair_samples, numbers_in_sample(self.state.model, self.state.data), _ELEMENTS)

    def furthest(self, max_loss: float) -> Candidate | None:
        """Return the candidate nearest to the targets that loses at most `max_loss`; None if there is none.

        If the scores alone find none, the loss curves are refined for the smallest step that was tried.
        """
        found = self._backwards(max_loss)
        made = [candidate.progress for candidate in self.tried.values() if candidate is not None]
        if self.by is not None or not made:
            return found
        progress = min(made) if found is None else found.progress
        self.by = self._refined(progress)
        if self.by.curves is None:
            return found
        self.tried = {}
        return self._onwards(progress, max_loss) or found

    def _refined(self, progress: float) -> Refined:
        """Return the loss curves that are best part of the way to the targets."""
        choose = partial(self.chooser.quick, self.combed, self.scores, progress, is_loss=self.is_loss)
        data, seed = self.state.data, self.step.seed
        return self.step.refined(choose, self.combed, self.scores, data, is_loss=self.is_loss, seed=seed)

    def _passes(self, progress: float, max_loss: float) -> bool:
        candidate = self.at(progress)
        return candidate is not None and candidate.loss <= max_loss

    def _backwards(self, max_loss: float) -> Candidate | None:
        """Return the furthest candidate, searched from the targets backwards."""
        if self._passes(1.0, max_loss):
            return self.at(1.0)
        bad, good = 1.0, _FIRST
        while good > _LAST and not self._passes(good, max_loss):
            bad, good = good, good * _FIRST
        return None if good <= _LAST else self._between(good, bad, max_loss)

    def _onwards(self, good: float, max_loss: float) -> Candidate | None:
        """Return the furthest candidate from a part of the way on; None if that loses too much already."""
        if not self._passes(good, max_loss):
            return None
        while good < 1.0:
            further = min(1.0, good / _FIRST)
            if not self._passes(further, max_loss):
                return self._between(good, further, max_loss)
            good = further
        return self.at(good)

    def _between(self, good: float, bad: float, max_loss: float) -> Candidate | None:
        for _ in range(_BISECTIONS):
            middle = (good + bad) / 2
            good, bad = (middle, bad) if self._passes(middle, max_loss) else (good, middle)
        return self.at(good)

    def choice(self, candidate: Candidate, max_loss: float) -> Choice:
        """Return the choice of a candidate, whose channels are chosen again with the latency measured, if it counts.

        They remain those of the candidate if the others lose more than `max_loss`.
        """
        with reported("search"):
            choose = partial(self.chooser, self.combed, self.scores, candidate.progress, is_loss=self.is_loss)
            chosen = candidate.by.chosen(choose, lambda other: self.loss_of(other) <= max_loss)
            if chosen.removed != candidate.chosen.removed and self.loss_of(chosen) > max_loss:
                chosen = candidate.chosen
            chosen = timed(self.step, self.combed, chosen, self.state.converted)
            chosen = replace(chosen, notes=(*chosen.notes, *candidate.by.notes))
        words = _part_of(chosen.budget, candidate.progress)
        return carrying_out(self.step, self.combed, replace(chosen, budget=words))

    def strict(self, max_loss: float) -> Choice:
        """Return the choice that loses at most `max_loss` before any training; raises LossError if there is none."""
        found = self.furthest(max_loss)
        if found is None:
            least = min((c.loss for c in self.tried.values() if c is not None), default=math.nan)
            said = f"no smaller model loses at most {max_loss:g}: the least that was found is {least:.3g}"
            raise LossError(f"{said}{self.loss.advice()}")
        return self.choice(found, max_loss)


def _part_of(words: Mapping[str, Any], progress: float) -> dict[str, Any]:
    """Return the budget of a plan with the fractions that a search ended at, part of the way to the targets."""
    also = {kind: 1 - (1 - fraction) * progress for kind, fraction in words.get("also", {}).items()}
    return {**words, "target": 1 - (1 - words["target"]) * progress, **({"also": also} if also else {})}


def timed(step: Iterate, combed: Combed, chosen: Allocation, converted: Convert | None = None) -> Allocation:
    """Return the channels with the measured latency of the model without them, if it counts and is not known yet."""
    if not step.check_speed or "measured" in chosen.latency or not any(chosen.removed):
        return chosen
    check = SpeedCheck(step.setting, step.block, False, partial(LatencyProbe, converted=converted))
    return check(combed, chosen, lambda *_: chosen)


@dataclass(frozen=True)
class Demand:
    """What a run is to keep of the original's quality.

    Attributes:
        max_loss: Largest loss that is allowed; None for no bound.
        is_asked: Whether the bound was asked for, so that a model must be shown to meet it; a default one need only be
            met in expectation, and the verdict says what is known.
        is_blind: Whether channels may be chosen without data.
        metric: Metric on labelled samples.
        task: Task of the agreement with the original; None to tell it from the outputs.
        trains: Whether the model is trained afterwards, which recovers part of the loss.
        detector: Form of the outputs of a detector; None to tell it.
        converted: Returns the form in which models are deployed, whose loss counts; None for the models themselves.
    """

    max_loss: float | None = None
    is_blind: bool = False
    metric: str = defaults.METRIC
    task: str | None = None
    trains: bool = False
    detector: str | None = None
    is_asked: bool = True
    converted: Convert | None = None

    def loss(self, original: Model, samples: Samples) -> Loss:
        """Return what measures the loss of models against the original."""
        return Loss(original, samples, self.metric, self.task, self.detector, self.is_asked, self.converted)


@dataclass(frozen=True, eq=False)
class Choice:
    """How a run chooses its channels.

    Attributes:
        plan: Plan to carry out; None if the run chooses by score and budget.
        chosen: The channels of the plan; None without one.
        combed: The model that they were chosen for; None without them.
        is_lossless: Whether only channels are removed that change no output.
        stricter: Returns the choice that meets the bound without relying on training; None if this one does.
    """

    plan: Plan | None = None
    chosen: Allocation | None = None
    combed: Combed | None = None
    is_lossless: bool = False
    stricter: Callable[[], Choice] | None = None


def choice_of(step: Iterate, state: State, samples: Samples, demand: Demand) -> Choice:
    """Return how the channels are chosen: without data at no loss, under a bound by a search, else within the run.

    Raises:
        TargetError: Without data, no channel can be removed at no loss.
        LossError: Every smaller model loses more than is allowed.
    """
    if state.data is None and not demand.is_blind:
        return _lossless(state, step)
    if demand.max_loss is None or samples.choosing is None:
        return Choice()
    max_loss = demand.max_loss
    search = _search(step, state, samples, demand)
    loose = search.furthest(TRAINABLE * max_loss) if demand.trains else None
    if loose is None:
        return search.strict(max_loss)
    return replace(search.choice(loose, TRAINABLE * max_loss), stricter=lambda: search.strict(max_loss))


def strict(step: Iterate, state: State, samples: Samples, demand: Demand) -> Choice:
    """Return the choice that meets the bound of the loss before any training, by a new search; raises LossError."""
    assert demand.max_loss is not None
    return _search(step, state, samples, demand).strict(demand.max_loss)


def carrying_out(step: Iterate, combed: Combed, chosen: Allocation) -> Choice:
    """Return the choice of channels that a search has found."""
    words = dict(chosen.budget) | {"rounds": 1, "score": step.score, "seed": step.seed}
    plan = make_plan(combed, chosen.removed, budget=words, before=chosen.before, after=chosen.after)
    return Choice(plan, chosen, combed)


def _search(step: Iterate, state: State, samples: Samples, demand: Demand) -> Search:
    return Search(step, state, demand.loss(state.original, samples))


def _fastest(step: Iterate, combed: Combed, free: Allocation) -> Allocation:
    """Return the removal of free channels or, if that is not faster, of fewer whose widths are whole blocks and are."""
    best = timed(step, combed, free)
    for block in (step.block, 2 * step.block):
        if best.is_faster is not False or step.block == 1:
            break
        found = timed(step, combed, in_blocks(combed, free, block))
        if any(found.removed) and found.latency["measured"] < FASTER * best.latency["measured"]:
            best = found
    return best


def _lossless(state: State, step: Iterate) -> Choice:
    """Return the choice of the channels that change no output."""
    if step.rounds > 1:
        raise TargetError(
            f"without data, only channels that change no output are removed, which takes one round, got {step.rounds} "
            "rounds: give --data, or --blind"
        )
    free = Lossless()(Comb()(Fold()(state)))
    combed = free.need("combed", "comb")
    chosen = _fastest(step, combed, free.need("allocation", "lossless"))
    if not any(chosen.removed):
        raise TargetError(
            "no channel can be removed without a change of the outputs: give --data, a few hundred unlabelled samples, "
            "or --blind to choose channels on generated inputs, which probably loses accuracy"
        )
    words = dict(free.budget) | {"seed": step.seed}
    plan = make_plan(combed, chosen.removed, budget=words, before=chosen.before, after=chosen.after)
    return Choice(plan, chosen, combed, is_lossless=True)
