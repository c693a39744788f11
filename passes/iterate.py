"""Iterate: score, remove a little, repair, and again, until the target is met.

The rounds share one plan. After each, the new values are put back into a model of the original size, where the next
round scores them; channels that went stay away. So the file at the end is what its plan makes of the original, with
other weights, however many rounds there were.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.allocation import Allocation, Chooser
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.costs import CostModel, Costs
from cpd_onnx.channels.groups import Combed
from cpd_onnx.channels.weights import weight_array
from cpd_onnx.data.sources import Source
from cpd_onnx.errors import CpdError, DataError, TargetError
from cpd_onnx.io.files import read_json, write_atomically
from cpd_onnx.ir.model import Model, load
from cpd_onnx.options import again, natural, option, positive
from cpd_onnx.passes.allocate import Allocate, AllocateOptions
from cpd_onnx.passes.prune import prune
from cpd_onnx.passes.repair import RepairOptions, repair, summary
from cpd_onnx.pipeline.state import State
from cpd_onnx.rewrite.plan import Plan, make_plan, match
from cpd_onnx.rewrite.rewriter import evaluation_of, rewrite
from cpd_onnx.scores.registry import SAMPLES, SCORE_FUNCTIONS, Scores, find_score_function, score
from cpd_onnx.shapes.inference import fold_again

_GONE = -1.0
"""Score of channels that went in an earlier round: below all others, which are no less than zero."""


@dataclass(frozen=True)
class Round:
    """What one round has made.

    Attributes:
        number: from 1 on.
        combed: the model of the original size that was scored.
        kept: what stays of it.
        small: the pruned model, repaired if that was asked for.
    """

    number: int
    combed: Combed
    kept: KeepMask
    small: Model


@dataclass(frozen=True, eq=False)
class CachedRound:
    """How far a round is before its weights are tuned.

    Attributes:
        chosen: what goes.
        model: pruned and, if that is wanted, repaired; None where that is to be done again.
        repaired: summary of the repair.
    """

    chosen: Allocation
    model: Model | None
    repaired: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class RunCache:
    """Files that record the choices and repairs of a run, so that an interrupted run can be resumed.

    Attributes:
        path: what their names start with; the number of the round follows.
        identity: what tells this run from others.
    """

    path: Path
    identity: str

    def files(self, number: int) -> tuple[Path, Path]:
        """The files of one round: what was chosen, and the model."""
        words, model = (self.path.with_name(f"{self.path.name}.{number}.{kind}") for kind in ("json", "onnx"))
        return words, model

    def save(self, number: int, cached: CachedRound) -> None:
        """Write the state of a round, without its model where that is too large for one file."""
        words, place = self.files(number)
        if cached.model is not None and not cached.model.is_over_limit:
            cached.model.save(place, overwrite=True, weights="inside")
        content = {"identity": self.identity, "chosen": asdict(cached.chosen), "repaired": cached.repaired}
        write_atomically(words, json.dumps(content).encode())

    def load(self, number: int, combed: Combed) -> CachedRound | None:
        """Return the state of a round, None without a file; raises CpdError for another run's or a damaged one."""
        words, place = self.files(number)
        if not words.exists():
            return None
        try:
            content = read_json(words)
        except (OSError, ValueError) as error:
            raise CpdError(f"{words} cannot be read ({error}): start anew with --force") from error
        if not isinstance(content, dict) or content.get("identity") != self.identity:
            raise CpdError(f"{words} is of a run with another model or other options: start anew with --force")
        try:
            allocation, repaired = _allocation(content["chosen"], combed), content["repaired"]
        except (KeyError, TypeError, ValueError) as error:
            raise CpdError(f"{words} is damaged ({error}): start anew with --force") from error
        if repaired is not None and not isinstance(repaired, dict):
            raise CpdError(f"{words} is damaged (repaired): start anew with --force")
        return CachedRound(allocation, load(place) if place.exists() else None, repaired)

    def discard(self, rounds: int) -> None:
        """Remove the files."""
        for number in range(1, rounds + 1):
            for file in self.files(number):
                file.unlink(missing_ok=True)


def _is_alike(model: Model, other: Model) -> bool:
    """Whether two models differ in values at most."""
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
        raise ValueError("numbers of a wrong type")
    if not all(isinstance(note, str) for note in chosen["notes"]) or not isinstance(chosen.get("latency", {}), dict):
        raise ValueError("notes of a wrong type")
    return Allocation(**chosen | costs | {"notes": tuple(chosen["notes"])})


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(AllocateOptions):
    """How channels are scored and chosen, and what is left is repaired."""

    samples: int | None = option(
        None,
        f"Number of samples used for scoring (default: {SAMPLES}; "
        f"{SCORE_FUNCTIONS['reconstruction'].samples} with reconstruction)",
        read=positive,
    )
    score_labels: bool = option(False, "Score by the labels of the samples instead of the model's own answers")
    repair_samples: int = again(RepairOptions, "samples")
    seed: int = option(0, "Seed of everything random", read=natural)


@dataclass(frozen=True, kw_only=True)
class Iterate(ScoringOptions, Allocate):
    """Prune in rounds, each followed by a repair; the options are those of `Allocate` and `Score`.

    `repair` says whether weights are fitted to the original by least squares, on so many `repair_samples`.
    """

    policy: str | None = again(AllocateOptions, "policy", default="optimal")
    score: str = "reconstruction"
    repair: bool = True
    rounds: int = option(1, "Rounds of scoring, pruning, repairing and, in compress, distilling", read=positive)
    name: ClassVar[str] = "iterate"
    requires: ClassVar[tuple[str, ...]] = ()
    provides: ClassVar[tuple[str, ...]] = ("combed", "allocation", "budget", "edits", "plan")

    def __call__(self, state: State) -> State:
        """Fill in everything from `combed` to `repaired`; `model` becomes the pruned one."""
        return self.in_rounds(state, lambda made: made.small)

    def in_rounds(
        self,
        state: State,
        tuned: Callable[[Round], Model],
        shared: Callable[[Any], Any] = lambda said: said,
        *,
        given: Plan | None = None,
        cache: RunCache | None = None,
    ) -> State:
        """Go through the rounds; `tuned` gives other weights to what each has made.

        Where several processes go together, rounding may let them choose differently: `shared` is what the first says.
        A plan that is `given` is carried out, in one round, instead of choosing anything. What `cache` has on record
        is not done again.
        """
        self._check(state, given)
        original = now = comb(state.model, state.input_shapes)
        choose = _Choice(self, state, original, given)
        for number in range(1, self.rounds + 1):
            cached = cache.load(number, now) if cache else None
            chosen = shared(cached.chosen if cached else choose(now, number))
            kept = chosen.keep_mask(now)
            pruned = rewrite(now, kept)
            if cached is not None and cached.model is not None and not _is_alike(cached.model, pruned.model):
                raise CpdError("the model of the unfinished run is not what its choice makes: start anew with --force")
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
            raise TargetError(f"{self.rounds} rounds make no sense: give 1 or more")
        if given is not None and self.rounds > 1:
            raise TargetError(f"a plan is carried out in one round, not in {self.rounds}")
        if self.repair and state.data is None:
            raise DataError("a repair looks at samples: give --data, or a source as `data`")

    def _repaired(self, data: Source | None, of: tuple[Combed, KeepMask], cached: CachedRound) -> CachedRound:
        """Return the round with its model's weights fitted to the original, if a repair was requested."""
        if not self.repair:
            return cached
        assert data is not None
        assert cached.model is not None
        options = RepairOptions(samples=self.repair_samples, seed=self.seed)
        made = repair(*of, cached.model, data, options)
        return replace(cached, model=made.model, repaired=summary(made))

    def _plan(self, original: Combed, chosen: Allocation) -> Plan:
        words: dict[str, Any] = self.budget.as_words()
        words |= {"latency": dict(chosen.latency)} if chosen.latency else {}
        words |= {"rounds": self.rounds, "score": self.score, "seed": self.seed}
        costs = {"before": chosen.before, "after": chosen.after}
        return make_plan(original, chosen.removed, budget=words, **costs)


class _Choice:
    """What goes in each round, by score and budget, or as a plan says.

    What it takes to choose, a cost table perhaps, is made when something is chosen first.
    """

    def __init__(self, options: Iterate, state: State, original: Combed, given: Plan | None) -> None:
        self.options, self.state, self.original, self.given = options, state, original, given
        self.removed: list[list[int]] = [[] for _ in original.groups]

    @cached_property
    def chooser(self) -> Chooser:
        return self.options.chooser(self.original)

    def __call__(self, now: Combed, number: int) -> Allocation:
        """The channels that are gone after this round; costs are those of the model as it is now, and of the rest."""
        options = self.options
        if self.given is not None:
            removed, whole = match(now, self.given), CostModel(now).total(KeepMask(now.atoms))
            chosen = Allocation([removed.get(group.id, []) for group in now.groups], whole, whole)
        else:
            asked = {"labels": options.score_labels, "seed": options.seed}
            scores = score(now, options.score, samples=options.samples, data=self.state.data, **asked)
            share = 1 - (1 - self.chooser.budget.fraction) * number / options.rounds
            is_loss = find_score_function(options.score).is_loss
            found = self.chooser(now, _without(scores, self.removed), share, is_loss=is_loss)
            chosen = _joined(found, self.removed)
        return replace(chosen, after=CostModel(now).total(chosen.keep_mask(now)))


def _without(scores: list[Scores], removed: list[list[int]]) -> list[Scores]:
    """The scores with those of channels that are gone below all others."""
    made = []
    for values, gone in zip(scores, removed, strict=True):
        lowered = values.copy()
        lowered[gone] = _GONE
        made.append(lowered)
    return made


def _joined(chosen: Allocation, removed: list[list[int]]) -> Allocation:
    """The allocation, and what went before."""
    both = [sorted({*now, *before}) for now, before in zip(chosen.removed, removed, strict=True)]
    return replace(chosen, removed=both)


def _enlarged(combed: Combed, kept: KeepMask, small: Model) -> Model:
    """The model that was combed with the values of the pruned one where it still has them."""
    made = combed.folded.model.copy()
    for weight in combed.weights:
        name = weight.value.name
        if weight.scope.address or weight.scope.function or not weight.is_trained or not small.has(name):
            continue
        axes = weight.axes[0]
        places = [np.flatnonzero(kept.mask(axis)) for axis in axes]
        new = small.array(name)
        if new.shape == tuple(map(len, places)) and made.has(name):
            full = np.array(weight_array(combed.folded.model, weight))
            full[np.ix_(*places)] = new
            made.set_array(name, full)
    return made
