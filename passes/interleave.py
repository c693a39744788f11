"""Interleave: rounds of scoring, pruning and distillation until the target is met (Schmitt et al., ITSC 2024).

A part of the samples is set apart before anything is fitted. A round takes the weights after its training only if they
bring the outputs on these samples nearer to the original's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

from cpd_onnx.data.held_out import divide
from cpd_onnx.data.sources import Source
from cpd_onnx.errors import DataError
from cpd_onnx.fitting.divergence import Divergence
from cpd_onnx.ir.model import Model
from cpd_onnx.options import options_from
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
from cpd_onnx.passes.iterate import Iterate, Round
from cpd_onnx.pipeline.state import State
from cpd_onnx.training.options import EPOCHS
from cpd_onnx.training.process_group import join_process_group

_APART, _MOST_APART = 1 / 8, 256
"""Fraction of the samples that show whether training helped, and the maximum number of them (heuristic)."""

_Compare: TypeAlias = Callable[[Model, Model], dict[str, Any]]
"""Compares the models before and after a training: number of samples, both divergences, and whether to keep it."""


@dataclass(frozen=True)
class Interleave(DistillOptions, Iterate):
    """Prune in rounds, each followed by distillation; epochs and steps are totals over all rounds.

    The options are those of `Iterate` and `DistillOptions`.
    """

    name: ClassVar[str] = "interleave"
    provides: ClassVar[tuple[str, ...]] = (*Iterate.provides, "distilled")

    def __call__(self, state: State) -> State:
        """Fill in everything from `combed` to `distilled`; `model` becomes the pruned and trained one."""
        return self.run(state)

    def run(
        self,
        state: State,
        observer: Callable[[Round, DistillResult], None] | None = None,
        progress: Callable[[Progress], None] | None = None,
        *,
        watched: Watched | None = None,
        traces: Traces | None = None,
        **resume: Any,
    ) -> State:
        """Run the pass; the observer is called with each round and its training result, `progress` after each step.

        Each round has its own files of `traces`, see `of_round`; `resume` has arguments of `in_rounds`.
        """
        if state.data is None:
            raise DataError("distillation needs data: give --data, or a source as `data`")
        whole, teacher = state.data, state.original.complete_proto()
        data, nearer = self._judged(state.original, whole)
        results: list[DistillResult] = []
        compared: list[dict[str, Any]] = []

        def tuned(current: Round) -> Model:
            result = distill(
                teacher, current.small.complete_proto(), data, self._options(current.number), progress,
                overlap=overlap_of(current.combed, current.kept, self.hidden), watched=watched,
                traces=traces and of_round(traces, current.number),
            )  # fmt: skip  # what and how
            results.append(result)
            if observer is not None:
                observer(current, result)
            made = trained(current.small, replace(result, values=process_group.shared(result.values)))
            if nearer is None:
                return made
            compared.append(process_group.shared(nearer(current.small, made) if process_group.is_first else {}))
            return made if compared[-1]["kept"] else current.small

        # One process group for all rounds: processes that leave it cannot join it again.
        with join_process_group(self.device) as process_group:
            state = self.in_rounds(replace(state, data=data), tuned, process_group.shared, **resume)
        distilled = summary(results[-1]) | {
            "steps": sum(len(r.losses) for r in results),
            "seconds": round(sum(r.seconds for r in results), 2),
            "first_loss": results[0].losses[0] if results[0].losses else None,
            "rounds": self.rounds,
            "held_out": compared[-1] if compared else None,
        }
        return replace(state, distilled=distilled, data=whole)

    def _judged(self, original: Model, data: Source) -> tuple[Source, _Compare | None]:
        """Return the samples to fit to, and what compares the weights before and after a training on the others.

        None of them is set apart if they cannot be divided, or if labels take part in the loss: then the outputs are
        not meant to be the original's.
        """
        division = None if self.label_weight or original.is_over_limit else divide(data, _APART, _MOST_APART)
        if division is None:
            return data, None
        measure = Divergence(original, division.second, _MOST_APART, temperature=self.temperature)

        def compare(before: Model, after: Model) -> dict[str, Any]:
            first, second = (float(measure(model).mean()) for model in (before, after))
            return {"samples": measure.count, "before": first, "after": second, "kept": second < first}

        return (division.first, compare) if measure.is_defined else (data, None)

    def _options(self, number: int) -> DistillOptions:
        """Return the options of one round: its part of the steps or epochs, and a seed of its own."""
        options = options_from(DistillOptions, self)
        if self.steps is not None:
            done, then = ((self.steps * n) // self.rounds for n in (number - 1, number))
            return replace(options, steps=max(1, then - done), seed=self.seed + 1000 * (number - 1))
        epochs = self.epochs if self.epochs is not None or self.rounds == 1 else EPOCHS
        share = epochs and max(1, epochs // self.rounds)
        return replace(options, epochs=share, seed=self.seed + 1000 * (number - 1))


def of_round(traces: Traces, number: int) -> Traces:
    """Return the files of one round, with its number in their names; a round without a checkpoint starts from scratch.

    The checkpoint of the last step of a finished round is kept, so that resuming skips the round.
    """
    checkpoint, table, board = (
        path and path.with_name(f"{path.name}.{number}") for path in (traces.checkpoint, traces.csv, traces.tensorboard)
    )
    resume = traces.resume and checkpoint is not None and checkpoint.exists()
    return replace(traces, checkpoint=checkpoint, csv=table, tensorboard=board, resume=resume)
