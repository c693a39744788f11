"""Iterate: rounds of scoring, pruning and repair until the target is met.

The rounds share one plan. After each, the new weights are copied into a model of the original size, which the next
round scores; channels that were removed before remain removed. So the result is what its plan makes of the original,
with other weights, for any number of rounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.allocation import Allocation
from cpd_onnx.budget.choosing import Chooser
from cpd_onnx.budget.targets import Asked
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.costs import CostModel, Costs
from cpd_onnx.channels.groups import Combed
from cpd_onnx.channels.weights import weight_array
from cpd_onnx.data.sources import Source
from cpd_onnx.errors import CpdError, DataError, TargetError
from cpd_onnx.io import progress
from cpd_onnx.io.files import read_json, write_atomically
from cpd_onnx.ir.model import Model, load
from cpd_onnx.ir.tensors import held, hold
from cpd_onnx.options import natural, option, positive, same_option
from cpd_onnx.passes.allocate import Allocate, AllocateOptions
from cpd_onnx.passes.prune import prune
from cpd_onnx.passes.repair import RepairOptions, repair, summary
from cpd_onnx.pipeline.state import State
from cpd_onnx.rewrite.plan import Plan, make_plan, match
from cpd_onnx.rewrite.rewriter import evaluation_of, rewrite
from cpd_onnx.scores.registry import SAMPLES, SCORE_FUNCTIONS, Scores, find_score_function, score
from cpd_onnx.shapes.inference import fold_again

_GONE = -1.0
"""Score of channels removed in an earlier round: below all others, which are not negative."""


@dataclass(frozen=True)
class Round:
    """Result of one round.

    Attributes:
        number: Number of the round, from 1.
        combed: The scored model, of the original size.
        kept: Mask of what survives of it.
        small: The pruned model, repaired if a repair was requested.
    """

    number: int
    combed: Combed
    kept: KeepMask
    small: Model


@dataclass(frozen=True, eq=False)
class CachedRound:
    """State of a round before its weights are trained.

    Attributes:
        chosen: The channels to remove.
        model: The pruned model, repaired if a repair was requested; None if it has to be computed again.
        repaired: Summary of the repair.
    """

    chosen: Allocation
    model: Model | None
    repaired: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class RunCache:
    """Files that record the choices and repairs of a run, so that an interrupted run can be resumed.

    Attributes:
        path: Start of the file names, which the number of the round follows.
        identity: Digest of the model and the options, which identifies the run.
    """

    path: Path
    identity: str

    def files(self, number: int) -> tuple[Path, Path]:
        """Return the files of one round: the chosen channels, and the model."""
        words, model = (self.path.with_name(f"{self.path.name}.{number}.{kind}") for kind in ("json", "onnx"))
        return words, model

    def save(self, number: int, cached: CachedRound) -> None:
        """Write the state of a round, without its model where that is too large for one file."""
        words, place = self.files(number)
        if cached.model is not None and not cached.model.is_over_limit:
            cached.model.save(place, overwrite=True, weights="inside")
        chosen = asdict(replace(cached.chosen, table=None))
        content = {"identity": self.identity, "chosen": chosen, "repaired": cached.repaired}
        write_atomically(words, json.dumps(content).encode())

    def load(self, number: int, combed: Combed) -> CachedRound | None:
        """Return the state of a round, None without a file; raises CpdError for another run's or a damaged one."""
        words, place = self.files(number)
        if not words.exists():
            return None
        try:
            content = read_json(words)
        except (OSError, ValueError) as error:
            raise CpdError(f"{words} cannot be read ({error}): start again with --force") from error
        if not isinstance(content, dict) or content.get("identity") != self.identity:
            raise CpdError(f"{words} belongs to a run with another model or other options: start again with --force")
        try:
            allocation, repaired = _allocation(content["chosen"], combed), content["repaired"]
        except (KeyError, TypeError, ValueError) as error:
            raise CpdError(f"{words} is damaged ({error}): start again with --force") from error
        if repaired is not None and not isinstance(repaired, dict):
            raise CpdError(f"{words} is damaged (repaired): start again with --force")
        return CachedRound(allocation, load(place) if place.exists() else None, repaired)

    def discard(self, rounds: int) -> None:
        """Remove the files."""
        for number in range(1, rounds + 1):
            for file in self.files(number):
                file.unlink(missing_ok=True)


def _is_alike(model: Model, other: Model) -> bool:
    """Return whether two models differ in values at most."""
    return _structure(model) == _structure(other)


def _structure(model: Model) -> tuple[list[bytes], list[tuple[str, int, tuple[int, ...]]]]:
    graph = model.graph
    tensors = [(tensor.name, tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer]
    return [node.SerializeToString(deterministic=True) for node in graph.node], tensors


def _allocation(chosen: Any, combed: Combed) -> Allocation:
    """Return the allocation of a cached round; raises TypeError, KeyError or ValueError if it is not valid."""
    costs = {name: Costs(**chosen[name]) for name in ("before", "after")}
    numbers = [value for cost in costs.values() for value in asdict(cost).values()]
    pairs = zip(combed.groups, chosen["removed"], strict=True)
    if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers) or any(
        isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(group) for group, gone in pairs for i in gone
    ):
        raise ValueError("numbers have a wrong type")
    if not all(isinstance(note, str) for note in chosen["notes"]) or any(
        not isinstance(chosen.get(name, {}), dict) for name in ("latency", "budget")
    ):
        raise ValueError("notes have a wrong type")
    asked = tuple(Asked(**entry) for entry in chosen.get("asked", ()))
    return Allocation(**chosen | costs | {"notes": tuple(chosen["notes"]), "asked": asked})


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(AllocateOptions):
    """Options of scoring, allocation and repair."""

    samples: int | None = option(
        None,
        f"Number of samples used for scoring (default: {SAMPLES}; "
        f"{SCORE_FUNCTIONS['reconstruction'].samples} with reconstruction and curvature)",
        read=positive,
    )
    score_labels: bool = option(False, "Score by the labels of the samples instead of the model's own outputs")
    repair_samples: int = same_option(RepairOptions, "samples")
    seed: int = option(0, "Seed of all random choices", read=natural)


@dataclass(frozen=True, kw_only=True)
class Iterate(ScoringOptions, Allocate):
    """Prune in rounds, each followed by a repair; the options are those of `Allocate` and `Score`.

    With `repair`, weights are fitted to the original by least squares on `repair_samples` samples.
    """

    policy: str | None = same_option(AllocateOptions, "policy", default="optimal")
    score: str = "reconstruction"
    repair: bool = True
    rounds: int = option(
        1, "Number of rounds of scoring, pruning, repair and, in compress, distillation", read=positive
    )
    name: ClassVar[str] = "iterate"
    requires: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[tuple[str, ...]] = ("combed", "allocation", "budget", "edits", "plan")

    def __call__(self, state: State) -> State:
        """Fill in everything from `combed` to `repaired`; `model` becomes the pruned one."""
        return self.in_rounds(state, lambda current: current.small)

    def in_rounds(
        self,
        state: State,
        tuned: Callable[[Round], Model],
        shared: Callable[[Any], Any] = lambda value: value,
        *,
        given: Plan | None = None,
        cache: RunCache | None = None,
    ) -> State:
        """Run the rounds.

        Args:
            state: State with the model and, for scores and repairs that need it, the data.
            tuned: Returns the model of a round with trained weights.
            shared: Returns the first process's value in all processes, whose rounding errors may differ.
            given: Plan to carry out in one round, instead of choosing channels.
            cache: Files with the results of an interrupted run, which are not computed again.
        """
        self._check(state, given)
        original = now = comb(state.model, state.input_shapes)
        choose = _Choice(self, state, original, given)
        for number in range(1, self.rounds + 1):
            cached = cache.load(number, now) if cache else None
            chosen = shared(cached.chosen if cached else choose(now, number))
            kept = chosen.keep_mask(now)
            with progress.step("prune"):
                pruned = rewrite(now, kept)
            if cached is not None and cached.model is not None and not _is_alike(cached.model, pruned.model):
                raise CpdError("the model of the interrupted run does not match its plan: start again with --force")
            if cached is None or cached.model is None:
                cached = self._repaired(state.data, (original, kept), CachedRound(chosen, pruned.model))
                if cache:
                    cache.save(number, cached)
            assert cached.model is not None
            small, repaired = tuned(Round(number, now, kept, cached.model)), cached.repaired
            choose.removed = chosen.removed
            if number < self.rounds:
                now = comb(fold_again(now.folded, _enlarged(now, kept, small)))
        plan = given.without_values() if given else self._plan(original, chosen)
        replay = pruned if self.rounds == 1 else prune(original, chosen)
        plan = plan.with_values(replay.model, small)
        plan.stamp(small)
        edits = pruned.edits if now is original else (*evaluation_of(original.folded), *pruned.edits)
        return replace(
            state, model=small, combed=original, allocation=chosen, edits=edits, plan=plan,
            budget=plan.content["budget"], repaired=repaired,
        )  # fmt: skip

    def _check(self, state: State, given: Plan | None) -> None:
        if self.rounds < 1:
            raise TargetError(f"rounds must be at least 1, got {self.rounds}")
        if given is not None and self.rounds > 1:
            raise TargetError(f"a plan is carried out in one round, got {self.rounds} rounds")
        if self.repair and state.data is None:
            raise DataError("a repair needs samples: give --data, or a source as `data`")

    def _repaired(self, data: Source | None, of: tuple[Combed, KeepMask], cached: CachedRound) -> CachedRound:
        """Return the round with its model's weights fitted to the original, if a repair was requested."""
        if not self.repair:
            return cached
        assert data is not None
        assert cached.model is not None
        options = RepairOptions(samples=self.repair_samples, seed=self.seed)
        repaired = repair(*of, cached.model, data, options)
        return replace(cached, model=repaired.model, repaired=summary(repaired))

    def _plan(self, original: Combed, chosen: Allocation) -> Plan:
        words = dict(chosen.budget) | {"rounds": self.rounds, "score": self.score, "seed": self.seed}
        costs = {"before": chosen.before, "after": chosen.after}
        return make_plan(original, chosen.removed, budget=words, **costs)


class _Choice:
    """Chooses the channels to remove in each round, by score and budget or from a plan.

    The chooser, which may have to measure a cost table, is created on first use.
    """

    def __init__(self, options: Iterate, state: State, original: Combed, given: Plan | None) -> None:
        self.options, self.state, self.original, self.given = options, state, original, given
        self.removed: list[list[int]] = [[] for _ in original.groups]

    @cached_property
    def chooser(self) -> Chooser:
        return self.options.chooser(self.original, self.state.converted)

    def __call__(self, now: Combed, number: int) -> Allocation:
        """Return all channels removed up to this round; costs are those of the whole model and of what remains."""
        options = self.options
        if self.given is not None:
            removed, whole = match(now, self.given), CostModel(now).total(KeepMask(now.atoms))
            chosen = Allocation([removed.get(group.id, []) for group in now.groups], whole, whole)
        else:
            more = {"labels": options.score_labels, "seed": options.seed, "is_repaired": options.repair}
            scores = score(now, options.score, samples=options.samples, data=self.state.data, **more)
            is_loss = find_score_function(options.score).is_loss
            progress = number / options.rounds
            scores, data = _without(scores, self.removed), self.state.data
            chooser = self.chooser.corrected(now, scores, progress, is_loss=is_loss) if options.effort else self.chooser
            choose = partial(chooser.quick, now, scores, progress, is_loss=is_loss)
            best = options.refined(choose, now, scores, data, is_loss=is_loss, seed=options.seed)
            found = best.chosen(partial(chooser, now, scores, progress, is_loss=is_loss))
            chosen = _joined(replace(found, notes=(*found.notes, *best.notes)), self.removed)
        return replace(chosen, after=CostModel(now).total(chosen.keep_mask(now)))


def _without(scores: list[Scores], removed: list[list[int]]) -> list[Scores]:
    """Return the scores with those of removed channels below all others."""
    results = []
    for values, gone in zip(scores, removed, strict=True):
        lowered = values.copy()
        lowered[gone] = _GONE
        results.append(lowered)
    return results


def _joined(chosen: Allocation, removed: list[list[int]]) -> Allocation:
    """Return the allocation with the channels removed before added."""
    both = [sorted({*now, *before}) for now, before in zip(chosen.removed, removed, strict=True)]
    return replace(chosen, removed=both)


def _enlarged(combed: Combed, keep: KeepMask, small: Model) -> Model:
    """Return the combed model with the values of the pruned one at the surviving positions."""
    model = combed.folded.model.copy()
    for weight in combed.weights:
        name = weight.value.name
        if weight.scope.address or weight.scope.function or not weight.is_trained:
            continue
        new = held(small, name)
        if new is not None and new.shape == tuple(map(keep.count, weight.axes[0])):
            full = np.array(weight_array(combed.folded.model, weight))
            pieces = combed.pieces(weight.axes[0])
            ends = np.cumsum([keep.count(piece.axes[0]) for piece in pieces[:-1]]).astype(np.int64)
            for piece, rows in zip(pieces, np.split(new, ends) if len(pieces) > 1 else [new], strict=True):
                places = [np.flatnonzero(keep.mask(axis)) for axis in piece.axes]
                (full[piece.rows] if len(pieces) > 1 else full)[np.ix_(*places)] = rows
            hold(model, name, full)
    return model
