"""Compress: from a model to a smaller one in one go, with what can be had: pruned always, repaired with samples,
distilled with samples and torch; and what there is to say about the outcome.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cpd_onnx.channels.costs import CostModel
from cpd_onnx.channels.groups import Combed, Group
from cpd_onnx.deploy.profiles import load_profile
from cpd_onnx.errors import UnsupportedError
from cpd_onnx.ir.model import Model, translate_errors
from cpd_onnx.options import picked
from cpd_onnx.passes.iterate import Iterate, Round, RunCache
from cpd_onnx.pipeline.state import State
from cpd_onnx.proof.files import FileVerification, verify_files
from cpd_onnx.report import tables as report
from cpd_onnx.rewrite.plan import Plan
from cpd_onnx.runtime.bench import Bench
from cpd_onnx.runtime.sessions import open_model, working_feeds
from cpd_onnx.shapes.inference import fold
from cpd_onnx.summary import Summarised, Summary
from cpd_onnx.workflow import defaults

if TYPE_CHECKING:
    from cpd_onnx.passes.distill import DistillResult, Progress, Traces, Watched

_NO_DATA = (
    "no data: the channels went by their weights alone and nothing was fitted to make up for them. With --data, some "
    "hundred unlabelled inputs, those go that the rest can make up for, the rest is fitted to the original, and "
    "with torch it is distilled as well"
)
_MADE_UP = "the inputs were made up ('synthetic'): some hundred real ones, unlabelled, give better choices and fits"
_NO_TORCH = "torch is not installed: with it the model is distilled too (pip install 'cpd-onnx[torch]')"
_NO_LABELS = "how good the model still is was not measured: --eval takes labelled data, with --metric"


@dataclass(frozen=True)
class ResumeState:
    """What a run may start from.

    Attributes:
        plan: is carried out, instead of choosing channels.
        cache: files with what an earlier run had found out.
        traces: of the training.
        watched: data to judge the student on while it trains.
    """

    plan: Plan | None = None
    cache: RunCache | None = None
    traces: Traces | None = None
    watched: Watched | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Compressed(Summarised):
    """What a run made.

    Attributes:
        state: after the last pass; its model is the result.
        untrained: the pruned and perhaps repaired model before training, where there was one round of it.
        found: outcome of the check against the original and the plan.
        losses: of each update, in order.
        judged: updates done, and what the student scored then.
        seconds: what the parts took.
    """

    state: State
    untrained: Model | None
    found: FileVerification
    losses: tuple[float, ...] = ()
    judged: tuple[tuple[int, float], ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> Summary:
        """How far the model has come."""
        return self.state.summary()


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def step_of(
    options: Any, target: Mapping[str, float], training: Mapping[str, Any] | None, *, has_data: bool
) -> Iterate:
    """The pass that does it: `interleave` where there are options of a training, else `iterate`.

    Args:
        options: has the fields of `ScoringOptions`, and `score` and `repair`, of which None leaves it to `defaults`.
        target: the target, as an option of `Allocate`.
        training: fields of `DistillOptions` that `options` has not; None to train nothing.
        has_data: whether there are samples.

    Raises UnsupportedError if there is no torch for the training, and as `defaults` does.
    """
    decided: dict[str, Any] = {
        "score": defaults.score(options.score, has_data=has_data),
        "spread": defaults.spread(options.spread, has_data=has_data),
        "repair": defaults.repair(options.repair, has_data=has_data),
        "multiple": multiple_of(options),
        **target,
    }
    if training is None:
        return picked(Iterate, options, **decided)
    if not defaults.can_train():
        raise UnsupportedError("distillation needs torch: pip install 'cpd-onnx[torch]'")
    from cpd_onnx.passes.interleave import Interleave

    return picked(Interleave, options, **decided | dict(training))


def multiple_of(options: Any) -> int | None:
    """What widths are multiples of: where nothing is said, as the profile of the target has it, if there is one."""
    profile = getattr(options, "profile", None)
    if options.multiple is not None or profile is None:
        return options.multiple  # type: ignore[no-any-return]  # an option of `Allocate`
    return load_profile(profile).multiple


def compress(
    step: Iterate,
    state: State,
    resume: ResumeState | None = None,
    *,
    progress: Callable[[int, Progress], None] | None = None,
    allow_inconclusive: bool = False,
) -> Compressed:
    """Take a model through `iterate` or `interleave`, and check what came out against the original and the plan.

    `progress` is told the number of the round and where its training is.

    Raises CpdError as the passes do; ProofError if the result is not what the plan makes of the original,
    InconclusiveError if that cannot be told, unless it is allowed.
    """
    with translate_errors(state.original):
        return _compress(step, state, resume or ResumeState(), progress, allow_inconclusive=allow_inconclusive)


def _compress(
    step: Iterate,
    state: State,
    resume: ResumeState,
    progress: Callable[[int, Progress], None] | None,
    *,
    allow_inconclusive: bool,
) -> Compressed:
    started = time.perf_counter()
    if not state.original.is_over_limit:  # the proof runs it: better known before the training than after
        next(working_feeds(fold(state.original, state.input_shapes), open_model(state.original, optimise=False)))
    rounds: list[Round] = []
    results: list[DistillResult] = []
    if step.name == "interleave":
        from cpd_onnx.passes.interleave import Interleave

        assert isinstance(step, Interleave)

        def note(round_: Round, result: DistillResult) -> None:
            rounds.append(round_)
            results.append(result)

        state = step.run(
            state, note, progress and (lambda now: progress(len(results) + 1, now)), watched=resume.watched,
            traces=resume.traces, given=resume.plan, cache=resume.cache,
        )  # fmt: skip  # what and how
    else:
        state = step.in_rounds(state, lambda made: made.small, given=resume.plan, cache=resume.cache)
    ended = time.perf_counter()
    plan = state.need("plan", step.name)
    found = verify_files(state.original, state.model, plan, allow_inconclusive=allow_inconclusive)
    trained = sum(result.seconds for result in results)
    seconds = {"pruning": ended - started - trained, "training": trained, "verification": time.perf_counter() - ended}
    return Compressed(
        replace(state, verification=found.comparison),
        rounds[0].small if len(rounds) == 1 else None,
        found,
        tuple(loss for result in results for loss in result.losses),
        _judged(results),
        {name: round(value, 2) for name, value in seconds.items() if value},
    )


def _judged(results: Sequence[DistillResult]) -> tuple[tuple[int, float], ...]:
    """The scores of all rounds, updates counted through."""
    found, before = [], 0
    for result in results:
        found += [(before + step, value) for step, value in result.judged]
        before += len(result.losses)
    return tuple(found)


def content(
    made: Compressed, *, bench: Bench | None = None, accuracy: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """The report as plain values, see `report.schema.json`; `more` are entries of it that come from elsewhere."""
    state = made.state
    combed, allocation, plan = (state.need(name, "prune") for name in ("combed", "allocation", "plan"))
    per_group = CostModel(combed).of_groups(combed)
    source = state.original.path
    pairs = list(zip(combed.groups, allocation.removed, strict=True))
    groups = [
        {
            "id": group.id, "name": group.name, "kind": group.kind, "size": len(group),
            "kept": len(group) - len(removed), "macs": per_group[group.id].macs, "params": per_group[group.id].params,
        }
        for group, removed in sorted(pairs, key=lambda pair: _place(combed, pair[0]))
    ]  # fmt: skip  # a table
    proof = report.comparison(made.found.comparison)
    proof |= {"is_replay": made.found.is_replay, "trained": len(made.found.trained)}
    return {
        "format": report.REPORT_FORMAT,
        "version": report.REPORT_VERSION,
        "title": source.name if source else "",
        "source": {"file": source.name if source else "", "sha256": plan.sha256},
        "budget": dict(plan.content["budget"]),
        "before": asdict(allocation.before),
        "after": asdict(allocation.after),
        "bench": None if bench is None else bench.as_json(),
        "accuracy": None if accuracy is None else dict(accuracy),
        "groups": groups,
        "sensitivity": None,
        "repaired": None if state.repaired is None else dict(state.repaired),
        "training": _training(made),
        "kept": report.frozen_reasons(combed),
        "without_rule": dict(combed.without_rule),
        "prunable_fraction": combed.prunable_fraction(),
        "edits": len(state.edits),
        "verification": proof,
        "notes": list(allocation.notes),
        "advice": [],
        **more,
    }


def _place(combed: Combed, group: Group) -> tuple[str, int]:
    """Where in the network a group begins: the node that takes the first of its weights."""
    uses = (use.use for member in combed.members(group) for use in member.weight.uses)
    return min(((use.scope.path, use.node) for use in uses), default=("", 0))


def _training(made: Compressed) -> dict[str, Any] | None:
    told = made.state.distilled
    if told is None:
        return None
    by = {"losses_by": told["losses"], "losses": list(made.losses)}
    watched = [{"step": step, "value": value} for step, value in made.judged]
    return dict(told) | by | {"watched": watched}


def advice(*, data: str | None, has_labels: bool) -> list[str]:
    """What else could be had for the asking."""
    if data is None:
        return [_NO_DATA]
    said = [_MADE_UP] if data == "synthetic" else []
    said += [] if defaults.can_train() else [_NO_TORCH]
    return said + ([] if has_labels else [_NO_LABELS])
