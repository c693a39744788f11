"""Iterate: score, remove a little, repair, and again, until the target is met.

The rounds share one plan. After each, the new values are put back into a model of the original size, where the next
round scores them; channels that went stay away. So the file at the end is what its plan makes of the original, with
other weights, however many rounds there were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from cpd_onnx.cost import CostModel
from cpd_onnx.errors import DataError, TargetError
from cpd_onnx.graph import Model
from cpd_onnx.groups import Combed
from cpd_onnx.kept import Kept
from cpd_onnx.passes.allocate import Allocate, Allocation
from cpd_onnx.passes.comb import comb
from cpd_onnx.passes.prune import prune
from cpd_onnx.passes.repair import SAMPLES as REPAIR_SAMPLES
from cpd_onnx.passes.repair import RepairOptions, repair, summary
from cpd_onnx.passes.score import Scores, score, scorer_of
from cpd_onnx.plan import make_plan
from cpd_onnx.state import State
from cpd_onnx.weights import weight_array

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
    kept: Kept
    small: Model


@dataclass(frozen=True)
class Iterate(Allocate):
    """Prune in rounds, each followed by a repair; the options are those of `Allocate` and `Score`.

    `repair` says whether weights are fitted to the original by least squares, on so many `repair_samples`.
    """

    score: str = "reconstruction"
    samples: int | None = None
    score_labels: bool = False
    seed: int = 0
    rounds: int = 1
    repair: bool = True
    repair_samples: int = REPAIR_SAMPLES
    name: ClassVar[str] = "iterate"
    usual_spread: ClassVar[str] = "optimal"

    def __call__(self, state: State) -> State:
        """Fill in everything from `combed` to `repaired`; `model` becomes the pruned one."""
        return self.in_rounds(state, lambda made: made.small)

    def in_rounds(
        self,
        state: State,
        tuned: Callable[[Round], Model],
        shared: Callable[[Allocation], Allocation] = lambda chosen: chosen,
    ) -> State:
        """Go through the rounds; `tuned` gives other weights to what each has made.

        Where several processes go together, rounding may let them choose differently: `shared` is what the first says.
        """
        if self.rounds < 1:
            raise TargetError(f"{self.rounds} rounds make no sense: give 1 or more")
        if self.repair and state.data is None:
            raise DataError("a repair looks at samples: give --data, or a source as `data`")
        original = now = comb(state.model, state.input_shapes)
        chooser = self.chooser(original, state.input_shapes)
        target, is_loss = self.budget, scorer_of(self.score).is_loss
        removed: list[list[int]] = [[] for _ in original.groups]
        repaired: dict[str, object] | None = None
        for number in range(1, self.rounds + 1):
            asked = {"labels": self.score_labels, "seed": self.seed}
            scores = score(now, self.score, samples=self.samples, data=state.data, **asked)
            share = 1 - (1 - target.fraction) * number / self.rounds
            chosen = shared(_joined(chooser(now, _without(scores, removed), share, is_loss=is_loss), removed))
            removed = chosen.removed
            kept = Kept(now.atoms)
            kept.remove(chosen.channels(now))
            chosen = replace(chosen, after=CostModel(now).total(kept))
            pruned = prune(now, chosen, state.input_shapes)
            small = pruned.model
            if self.repair:
                assert state.data is not None
                options = RepairOptions(samples=self.repair_samples, seed=self.seed)
                made = repair(original, kept, small, state.data, options)
                small, repaired = made.model, summary(made)
            small = tuned(Round(number, now, kept, small))
            if number < self.rounds:
                now = comb(_enlarged(now, kept, small), state.input_shapes)
        words: dict[str, Any] = target.as_words()
        words |= {"latency": dict(chosen.latency)} if chosen.latency else {}
        words |= {"rounds": self.rounds, "score": self.score, "seed": self.seed}
        plan = make_plan(
            original, removed, budget=words, before=chosen.before, after=chosen.after, input_shapes=state.input_shapes
        )
        plan.stamp(small)
        return replace(
            state, model=small, combed=original, allocation=chosen, edits=pruned.edits, plan=plan, budget=words,
            repaired=repaired,
        )  # fmt: skip


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


def _enlarged(combed: Combed, kept: Kept, small: Model) -> Model:
    """The model that was combed with the values of the pruned one where it still has them."""
    made = combed.folded.model.copy()
    for weight in combed.weights:
        name = weight.value.name
        if weight.scope.address or weight.scope.function or not weight.is_trained or not small.has(name):
            continue
        axes = next(combed.weight_axes(weight))
        places = [np.flatnonzero(kept.mask(axis)) for axis in axes]
        new = small.array(name)
        if new.shape == tuple(map(len, places)) and made.has(name):
            full = np.array(weight_array(combed.folded.model, weight))
            full[np.ix_(*places)] = new
            made.set_array(name, full)
    return made
