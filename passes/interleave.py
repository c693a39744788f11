"""Interleave: score, remove a little, distill, and again, until the target is met (Schmitt et al., ITSC 2024).

The rounds share one plan. After each, the trained values are put back into a model of the original size, where the
next round scores them; channels that went stay away. So the file at the end is what its plan makes of the original,
with trained weights, however many rounds there were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from cpd_onnx.cost import CostModel
from cpd_onnx.errors import DataError, TargetError
from cpd_onnx.graph import Model, load
from cpd_onnx.groups import Combed
from cpd_onnx.kept import Kept
from cpd_onnx.passes.allocate import Allocate, Allocation
from cpd_onnx.passes.comb import comb
from cpd_onnx.passes.distill import (
    DistillOptions,
    DistillResult,
    Progress,
    Traces,
    Watched,
    distill,
    overlap_of,
    summary,
    trained,
)
from cpd_onnx.passes.prune import prune
from cpd_onnx.passes.score import SAMPLES, Scores, score, scorer_of
from cpd_onnx.plan import make_plan
from cpd_onnx.state import State
from cpd_onnx.torch import read_weights, write_weights
from cpd_onnx.training.world import world
from cpd_onnx.weights import weight_array

Array = npt.NDArray[Any]

_GONE = -1.0
"""Score of channels that went in an earlier round: below all others, which are no less than zero."""


@dataclass(frozen=True)
class Interleave(DistillOptions, Allocate):
    """Prune in rounds with distillation between them; epochs and steps are those of all rounds together.

    The options are those of `Allocate`, `Score` and `DistillOptions`, and the number of `rounds`.
    """

    score: str = "fisher"
    samples: int = SAMPLES
    score_labels: bool = False
    rounds: int = 4
    name: ClassVar[str] = "interleave"
    usual_spread: ClassVar[str] = "global"

    def __call__(self, state: State) -> State:
        """Fill in everything from `combed` to `distilled`; `model` becomes the pruned and trained one."""
        return self.run(state)

    def run(
        self,
        state: State,
        observer: Callable[[int, DistillResult], None] | None = None,
        progress: Callable[[Progress], None] | None = None,
        *,
        watched: Watched | None = None,
        traces: Traces | None = None,
    ) -> State:
        """As a pass; the observer is told the number of each round and what training gave, `progress` each step.

        The files of `traces` are made for each round, see `of_round`.
        """
        if state.data is None:
            raise DataError("distillation needs data: give --data, or a source as `data`")
        if self.rounds < 1:
            raise TargetError(f"{self.rounds} rounds make no sense: give 1 or more")
        with world(self.device):  # once for all rounds: processes that part do not find each other again
            return self._rounds(state, observer, progress, watched, traces)

    def _rounds(
        self,
        state: State,
        observer: Callable[[int, DistillResult], None] | None,
        progress: Callable[[Progress], None] | None,
        watched: Watched | None,
        traces: Traces | None,
    ) -> State:
        assert state.data is not None
        target = self.budget
        combed = now = comb(state.model, state.input_shapes)
        chooser = self.chooser(combed, state.input_shapes)
        teacher = state.original.complete_proto()
        removed: list[list[int]] = [[] for _ in combed.groups]
        results: list[DistillResult] = []
        for number in range(1, self.rounds + 1):
            share = 1 - (1 - target.fraction) * number / self.rounds
            asked = {"samples": self.samples, "labels": self.score_labels, "seed": self.seed}
            scores = _without(score(now, self.score, data=state.data, **asked), removed)
            is_loss = scorer_of(self.score).is_loss
            chosen = _joined(chooser(now, scores, share, is_loss=is_loss), removed)
            removed = chosen.removed
            kept = Kept(now.atoms)
            kept.remove(chosen.channels(now))
            chosen = replace(chosen, after=CostModel(now).total(kept))
            pruned = prune(now, chosen, state.input_shapes)
            overlap = overlap_of(now, kept, self.hidden)
            options = self._options(number)
            result = distill(
                teacher, pruned.model.complete_proto(), state.data, options, progress,
                overlap=overlap, watched=watched, traces=traces and of_round(traces, number),
            )  # fmt: skip  # what and how
            results.append(result)
            small = trained(pruned.model, result)
            if observer is not None:
                observer(number, result)
            if number < self.rounds:
                now = comb(_enlarged(now, kept, small), state.input_shapes)
        words = target.as_words() | ({"latency": dict(chosen.latency)} if chosen.latency else {})
        words |= {"rounds": self.rounds, "score": self.score, "seed": self.seed}
        plan = make_plan(
            combed, removed, budget=words, before=chosen.before, after=chosen.after, input_shapes=state.input_shapes
        )
        distilled = summary(results[-1]) | {
            "steps": sum(len(r.losses) for r in results),
            "seconds": round(sum(r.seconds for r in results), 2),
            "first_loss": results[0].losses[0] if results[0].losses else None,
            "rounds": self.rounds,
        }
        return replace(
            state, model=small, combed=combed, allocation=chosen, edits=pruned.edits, plan=plan, budget=words,
            distilled=distilled,
        )  # fmt: skip

    def _options(self, number: int) -> DistillOptions:
        """This round's share of the training; each has an order of the data of its own."""
        options = DistillOptions(**{f.name: getattr(self, f.name) for f in fields(DistillOptions)})
        if self.steps is not None:
            done, then = ((self.steps * n) // self.rounds for n in (number - 1, number))
            return replace(options, steps=max(1, then - done), seed=self.seed + 1000 * (number - 1))
        return replace(options, epochs=max(1, self.epochs // self.rounds), seed=self.seed + 1000 * (number - 1))


def of_round(traces: Traces, number: int) -> Traces:
    """The files of one round, its number in their names; a round that has no checkpoint yet starts anew.

    A finished round leaves the checkpoint of its last step, so that resuming passes over it.
    """
    checkpoint, table, board = (
        path and path.with_name(f"{path.name}.{number}") for path in (traces.checkpoint, traces.csv, traces.tensorboard)
    )
    resume = traces.resume and checkpoint is not None and checkpoint.exists()
    return replace(traces, checkpoint=checkpoint, csv=table, tensorboard=board, resume=resume)


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
    values: dict[str, Array] = {}
    trained_values = read_weights(small.complete_proto())
    for weight in combed.weights:
        if weight.scope.address or weight.scope.function or not weight.is_trained:
            continue
        axes = next(combed.weight_axes(weight))
        places = [np.flatnonzero(kept.mask(axis)) for axis in axes]
        new = trained_values.get(weight.value.name)
        if new is None or new.shape != tuple(map(len, places)):
            continue
        full = np.array(weight_array(combed.folded.model, weight))
        full[np.ix_(*places)] = new
        values[weight.value.name] = full
    return load(write_weights(combed.folded.model.complete_proto(), values))
