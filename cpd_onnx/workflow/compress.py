"""Compress a model in memory: prune it, repair it with samples, distill it with samples and torch; and its report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cpd_onnx.budget.allocation import Allocation
from cpd_onnx.channels.costs import CostModel
from cpd_onnx.channels.groups import Combed, Group
from cpd_onnx.data.sources import Source
from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.deploy.profiles import load_profile
from cpd_onnx.errors import UnsupportedError
from cpd_onnx.ir.model import Model, translate_errors
from cpd_onnx.options import options_from
from cpd_onnx.passes.iterate import Iterate, Round, RunCache
from cpd_onnx.pipeline.state import State
from cpd_onnx.proof.files import FileVerification, verify_files
from cpd_onnx.report import tables as report
from cpd_onnx.rewrite.plan import Plan
from cpd_onnx.runtime.bench import Bench
from cpd_onnx.runtime.sessions import open_model, working_feeds
from cpd_onnx.scores.registry import find_score_function
from cpd_onnx.shapes.inference import fold
from cpd_onnx.summary import Summarised, Summary
from cpd_onnx.workflow import defaults

if TYPE_CHECKING:
    from cpd_onnx.passes.distill import DistillResult, Progress, Traces, Watched

_LOSSLESS = (
    "no data: only channels that change no output were removed. With --data, a few hundred unlabelled samples, more "
    "can be removed, and how much that loses is measured"
)
_BLIND = (
    "no data: channels were chosen, and the remaining weights fitted to the original, on generated inputs at best. "
    "With --data, a few hundred unlabelled samples, the result is more accurate and its agreement with the original is "
    "measured, and with torch the model is distilled as well"
)
_SYNTHETIC = (
    "the samples were synthetic: a few hundred real unlabelled ones improve the choice of channels and the repair"
)
_NO_TORCH = "torch is not installed: with it, the model is distilled as well (pip install 'cpd-onnx[torch]')"
_NO_LABELS = (
    "without labels, the model was only compared with the original: --eval with labelled data, and --metric, measure "
    "how good it is"
)


@dataclass(frozen=True)
class ResumeState:
    """State that a run starts from.

    Attributes:
        plan: Plan whose channels are removed; None to choose channels.
        chosen: The allocation that the plan is of, with its notes and its measurements; None if they are not known.
        cache: Files with the finished rounds of an interrupted run.
        traces: Checkpoint and logs of the training.
        watched: Samples on which the student is measured during training.
    """

    plan: Plan | None = None
    chosen: Allocation | None = None
    cache: RunCache | None = None
    traces: Traces | None = None
    watched: Watched | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Compressed(Summarised):
    """Result of a run.

    Attributes:
        state: State after the last pass; its model is the result.
        untrained: Model after pruning and repair, before training; None unless there was exactly one round of training.
        found: Result of the check against the original and the plan.
        losses: Training loss of each update, in order.
        judged: Metric of the student during training, as pairs of finished updates and value.
        seconds: Duration of each part, in seconds.
    """

    state: State
    untrained: Model | None
    found: FileVerification
    losses: tuple[float, ...] = ()
    judged: tuple[tuple[int, float], ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> Summary:
        """Return the summary of the final state."""
        return self.state.summary()


def step_of(
    options: Any, target: Mapping[str, Any], training: Mapping[str, Any] | None, source: Source | None
) -> Iterate:
    """Return the pass that compresses: `interleave` if the result is to be trained, else `iterate`.

    Args:
        options: Object with the fields of `ScoringOptions`, `score` and `repair`; None leaves a choice to `defaults`.
        target: The target, as an option of `Allocate`; empty for that of `options`.
        training: Fields of `DistillOptions` that `options` lacks; None for no training.
        source: The samples, real or generated ones; None for none.

    Raises UnsupportedError if training needs torch and it is not installed, and the errors of `defaults`.
    """
    kind = defaults.score(options.score, has_data=defaults.informs(source))
    is_real = source is not None and not isinstance(source, Synthetic)
    has_repair = defaults.repair(options.repair, has_data=source is not None)
    decided: dict[str, Any] = {
        "score": kind,
        "policy": defaults.policy(options.policy, has_data=is_real or find_score_function(kind).needs_data),
        "repair": has_repair,
        "effort": defaults.effort(options.effort, has_data=is_real, has_repair=has_repair),
        **_of_profile(options),
        **({"target": None, **target} if target else {}),
    }
    if training is None:
        return options_from(Iterate, options, **decided)
    if not defaults.can_train():
        raise UnsupportedError("distillation needs torch: pip install 'cpd-onnx[torch]'")
    from cpd_onnx.passes.interleave import Interleave

    return options_from(Interleave, options, **decided | dict(training))


def announced(step: Iterate, *, is_given: bool = False, is_search: bool = False) -> Iterator[str]:
    """Yield the names of the steps of `compress`, for its progress.

    A plan may be given that chooses the channels, or a search may find one before the model is pruned.
    """
    is_measured = step.targets.has_latency and step.cost_table is None
    measured = ["cost table"] if is_measured else []
    compared = ["refine"] if step.effort else []
    if is_search:
        yield from ("score", *measured, "search", *compared, *(["search"] if compared else []))
    for number in range(step.rounds):
        yield from () if is_given or is_search else ("score", *([] if number else measured), *compared)
        yield "prune"
        yield from ["repair"] if step.repair else []
        yield from ["distill"] if step.name == "interleave" else []
    yield "verify"


def _of_profile(options: Any) -> dict[str, Any]:
    """Return the options that the profile of a request decides unless they are given; none for other options."""
    if not hasattr(options, "profile"):
        return {}
    profile = None if options.profile is None else load_profile(options.profile)
    return {
        "round_to": defaults.round_to(options.round_to, profile),
        "deploy_as": defaults.deploy_as(options.deploy_as, profile),
    }


def compress(
    step: Iterate,
    state: State,
    resume: ResumeState | None = None,
    *,
    progress: Callable[[int, Progress], None] | None = None,
    allow_inconclusive: bool = False,
) -> Compressed:
    """Run `iterate` or `interleave` on a model, and check the result against the original and the plan.

    `progress` is called with the number of the round and the progress of its training.

    Raises the errors of the passes; ProofError if the result is not that of the plan on the original,
    InconclusiveError if the proof is inconclusive, unless that is allowed.
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
    if not state.original.is_over_limit:  # the proof runs it; fail before the training, not after
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
    if resume.chosen is not None:
        done = state.need("allocation", step.name)
        known = replace(resume.chosen, removed=done.removed, before=done.before, after=done.after)
        state = replace(state, allocation=known)
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
    """Return the measurements of all rounds, with updates counted across rounds."""
    found, before = [], 0
    for result in results:
        found += [(before + step, value) for step, value in result.judged]
        before += len(result.losses)
    return tuple(found)


def content(
    made: Compressed, *, bench: Bench | None = None, accuracy: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """Return the report as plain values, see `report.schema.json`; `more` are additional entries."""
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
        "interface_fraction": combed.interface_fraction(),
        "edits": len(state.edits),
        "verification": proof,
        "notes": [*allocation.notes, *(state.repaired or {}).get("notes", ())],
        "advice": [],
        **more,
    }


def _place(combed: Combed, group: Group) -> tuple[str, int]:
    """Return the position of a group in the graph: that of the first node that uses one of its weights."""
    uses = (use.use for member in combed.members(group) for use in member.weight.uses)
    return min(((use.scope.path, use.node) for use in uses), default=("", 0))


def _training(made: Compressed) -> dict[str, Any] | None:
    summary = made.state.distilled
    if summary is None:
        return None
    watched = [{"step": step, "value": value} for step, value in made.judged]
    return {**summary, "losses_by": summary["losses"], "losses": list(made.losses), "watched": watched}


def advice(*, data: str | None, is_blind: bool, has_labels: bool) -> list[str]:
    """Return advice on what further inputs would improve the result or measure it."""
    if data is None:
        return [_BLIND if is_blind else _LOSSLESS]
    is_given = {_SYNTHETIC: data != "synthetic", _NO_TORCH: defaults.can_train(), _NO_LABELS: has_labels}
    return [text for text, given in is_given.items() if not given]
