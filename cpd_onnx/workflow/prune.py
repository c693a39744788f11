"""Prune, apply and verify: workflows on an original, a pruned file and the plan that relates them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cpd_onnx.errors import CpdError, InconclusiveError, PlanError, UnsupportedError
from cpd_onnx.io import progress
from cpd_onnx.io.files import commit_together, locked_folder
from cpd_onnx.ir.model import Array, load
from cpd_onnx.options import options_from
from cpd_onnx.passes.allocate import Allocate
from cpd_onnx.passes.comb import Comb
from cpd_onnx.passes.fold import Fold
from cpd_onnx.passes.iterate import Iterate
from cpd_onnx.passes.prune import Prune as PrunePass
from cpd_onnx.passes.prune import apply as apply_plan
from cpd_onnx.passes.repair import Repair
from cpd_onnx.passes.score import Score
from cpd_onnx.passes.verify import Verify
from cpd_onnx.pipeline import pipeline
from cpd_onnx.pipeline.state import State
from cpd_onnx.proof.comparison import INCONCLUSIVE, OutputDifference
from cpd_onnx.proof.files import FileVerification, data_feeds, verify_files
from cpd_onnx.report import tables as report
from cpd_onnx.report.verdict import verdict as verdict_of
from cpd_onnx.rewrite.plan import load_plan
from cpd_onnx.runtime.processes import Place, in_worker, joined, working
from cpd_onnx.runtime.shards import Group, current_group
from cpd_onnx.workflow.compress import step_of
from cpd_onnx.workflow.deploy import merged_places, write_merged
from cpd_onnx.workflow.distill import is_distributed
from cpd_onnx.workflow.evidence.chain import Chain, Given, is_intact, manifest_of, verify_deployed
from cpd_onnx.workflow.places import (
    executor_of,
    finite,
    objections,
    plan_path_of,
    read_model,
    require_apart,
    require_outputs,
    source_of,
    write_both,
    write_json,
)
from cpd_onnx.workflow.quality import outcome, search
from cpd_onnx.workflow.quality.checks import checked_samples
from cpd_onnx.workflow.quality.samples import Samples, enough_to_fit, samples_of, to_fit
from cpd_onnx.workflow.requests import QUIET, Apply, Observer, Prune, VerifyFile, ignore

_BATCHES = 2
"""Number of batches of data on which a pruned file is compared with its original; a heuristic."""


def prune(request: Prune, observer: Observer = ignore) -> dict[str, Any] | None:
    """Prune a model, prove the result, write it with its plan, and return the result as plain values.

    Several processes can share the work. All but the first write nothing, and return None.
    """
    plan_path = request.plan or plan_path_of(request.output)
    written = require_outputs(
        request, request.output, plan_path, *outcome.table_places(request), *outcome.config_places(request),
        *merged_places(request),
    )  # fmt: skip  # a list
    started = time.perf_counter()
    with _shared(request) as group:
        made = _made(request, written, is_first=group.rank == 0)
    if group.rank > 0:
        return None
    state = made.state
    before = report.size_of(state.original, request.model)
    content = report.result(state, time.perf_counter() - started)
    content |= {"output": str(request.output), "plan": str(plan_path), "preflight": made.checked}
    content |= outcome.content(request, made.demand, made.samples, made.choice, state)
    outcome.require_faster(request, content)
    content["notes"] += [*outcome.target_notes(request, made.choice), *outcome.interface_notes(state.model)]
    content["notes"] += objections(request.profile, state.model)
    with locked_folder(request.output.parent), commit_together():
        write_both(request, state.model, state.need("plan", "prune"), plan_path)
        content["notes"] += [*outcome.written_configs(request, state.model), *write_merged(request, state.model)]
        outcome.kept_table(request, made.choice.chosen or state.need("allocation", "allocate"), content)
        content["bytes"] = {"before": before, "after": report.size_of(state.model, request.output)}
        content["verdict"] = verdict_of(content)
        write_json(request, content)
    return content


@dataclass(frozen=True)
class _Made:
    """A pruned model, and what it was made by.

    Attributes:
        checked: What the samples were found to be like; None where that was not looked at.
        demand: What is to be kept of the quality.
        samples: Samples by their use.
        choice: How channels were chosen.
        state: State after the last pass.
    """

    checked: dict[str, Any] | None
    demand: search.Demand
    samples: Samples
    choice: search.Choice
    state: State


def _made(request: Prune, written: Sequence[Path] = (), *, is_first: bool) -> _Made:
    """Prune a model, without writing anything; only the first of several processes looks at the samples, and proves."""
    request = request if is_first else replace(request, no_verify=True)
    model = read_model(request.model, request.input_shapes, request.free_io)
    require_apart(written, model)
    demand = outcome.demand_of(request, has_labels=False)
    source = source_of(request.data, model, request)
    checked = checked_samples(request, model, source) if is_first else None
    enough = enough_to_fit(model, source, max(request.repair_samples, request.samples or 0))
    samples = samples_of(source, None, request.hold_out, is_search=demand.max_loss is not None, enough=enough)
    fitted = to_fit(samples.fitted, model, request)
    step = step_of(request, outcome.target_of(request), None, fitted)
    _ = step.budget  # raises TargetError for invalid options before the work starts
    start = State(model, model, request.input_shapes, fitted)
    if demand.max_loss is not None and samples.choosing is not None:
        progress.announce(*_announced(request, step))
    choice = search.choice_of(step, start, samples, demand)
    return _Made(checked, demand, samples, choice, _pruned_state(request, step, start, choice))


@contextmanager
def _shared(request: Prune) -> Iterator[Group]:
    """Divide samples among the processes of a request, workers of an executor or a pool, or among those of a launcher.

    Raises CpdError if the workers do not start, or if an executor is given without their number.
    """
    if request.processes is None and request.executor is not None:
        raise CpdError("--executor runs further processes: say how many there are in all, as in --processes 4")
    if request.processes is None or request.processes == 1:
        with _launched() if is_distributed() else nullcontext(current_group()) as group:
            yield group
        return
    executor = executor_of(request.executor, request.processes - 1)
    job = partial(_help, replace(request, processes=None, executor=None))
    with executor, working(executor, request.processes, job, is_local=request.executor is None) as group:
        yield group


def _launched() -> AbstractContextManager[Group]:
    """Share batches with the processes of a launcher; raises UnsupportedError if torch is not installed."""
    try:
        from cpd_onnx.training import process_group
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UnsupportedError("several processes need torch to share a run: pip install 'cpd-onnx[torch]'") from error
    return process_group.launched()


def _help(request: Prune, place: Place) -> None:
    """Take part in a run as one of its workers."""
    with in_worker(request.custom_ops, is_quiet=request.log_level == QUIET), joined(place):
        _made(request, is_first=False)


def _announced(request: Prune, step: Iterate) -> Iterator[str]:
    """Yield the names of the steps of a run with a search; other runs announce their passes."""
    is_measured = step.targets.has_latency and step.cost_table is None
    yield from ("score", *(["cost table"] if is_measured else []), "search")
    yield from ["refine", "search"] if step.effort else []
    yield "prune"
    yield from [] if request.no_verify else ["verify"]
    yield from ["repair"] if step.repair else []
    yield "agreement"


def _pruned_state(request: Prune, step: Iterate, start: State, choice: search.Choice) -> State:
    """Return the state after pruning, the proof and, if it was requested, a repair."""
    passes: list[pipeline.Pass]
    proof: list[pipeline.Pass] = [] if request.no_verify else [Verify(allow_inconclusive=request.allow_inconclusive)]
    fitting = Repair(samples=step.repair_samples, seed=step.seed)
    repair: list[pipeline.Pass] = [fitting] if step.repair and not choice.is_lossless else []
    score = Score(step.score, step.seed, step.samples, step.score_labels, step.repair)
    if choice.plan is not None:
        start = replace(
            start, folded=choice.combed.folded if choice.combed else None, combed=choice.combed,
            allocation=choice.chosen, budget=choice.plan.content["budget"],
        )  # fmt: skip  # what and how
        passes = [PrunePass(), *proof, *repair]
    elif step.rounds > 1:
        passes = [step, *proof]
    else:
        passes = [Fold(), Comb(), score, options_from(Allocate, step), PrunePass(), *proof, *repair]
    return pipeline.run(passes, start)


def apply(request: Apply, observer: Observer = ignore) -> dict[str, Any]:
    """Replay a plan, write the pruned model, and return the result as plain values."""
    written = require_outputs(request, request.output)
    model, plan = load(request.model), load_plan(request.plan).at(request.step)
    require_apart(written, model)
    pruned = apply_plan(model, plan)
    with locked_folder(request.output.parent), commit_together():
        pruned.model.save(request.output, overwrite=request.force, weights=request.weights)
        sizes = {"before": report.size_of(model, request.model), "after": report.size_of(pruned.model, request.output)}
        content = {"output": str(request.output), "plan": str(request.plan), "edits": len(pruned.edits)}
        content |= {"bytes": sizes, "without_values": list(plan.values)}
        write_json(request, content)
    return content


def verify(request: VerifyFile, observer: Observer = ignore) -> dict[str, Any]:
    """Check a file against its original, by its plan or by the manifest of `deploy` that names it.

    Returns the result as plain values, see `require_conclusive`; raises ProofError if the file does not match.
    """
    plan = request.plan or plan_path_of(request.pruned)
    require_outputs(request, reads=[plan])
    progress.announce("verify")
    original = load(request.original)

    def feeds() -> Iterable[Mapping[str, Array]] | None:
        source = source_of(request.data, original, request)
        return None if source is None else data_feeds(original, source, _BATCHES)

    record = None if request.plan is not None and not request.via else manifest_of(request.pruned, request.manifest)
    if record is not None and (request.manifest or is_intact(request.pruned, record) or not plan.is_file()):
        given = Given(request.plan, request.via, feeds, lambda model: source_of(request.data, model, request))
        chain = verify_deployed(original, request.pruned, record, given)
        content = {**_pruned(chain.pruned), "deployed": _deployed(chain)}
    elif not plan.is_file() and request.plan is None:
        raise PlanError(f"{request.pruned} has neither a plan nor a manifest of deploy beside it: give --plan")
    else:
        removal = load_plan(plan).at(request.step)
        found = verify_files(original, load(request.pruned), removal, feeds(), allow_inconclusive=True)
        content = _pruned(found)
    content["has_data"] = request.data is not None
    write_json(request, content)
    return content


def require_conclusive(content: Mapping[str, Any]) -> None:
    """Raise InconclusiveError if the proof of the pruned file is inconclusive."""
    if content.get("verdict") == INCONCLUSIVE:
        raise InconclusiveError(report.proof_line(content))


def _pruned(found: FileVerification | None) -> dict[str, Any]:
    """Return the check of a pruned file as plain values; empty if the original itself was deployed."""
    if found is None:
        return {}
    return {
        "is_replay": found.is_replay,
        "same_bytes": found.same_bytes,
        "trained": list(found.trained),
        "measured": _plain(found.measured),
        **report.comparison(found.comparison),
    }


def _deployed(chain: Chain) -> dict[str, Any]:
    links = [
        {
            "file": link.file,
            "source": link.source,
            "steps": [
                {
                    "name": step.name,
                    "what": step.what,
                    "recorded": step.recorded,
                    "measured": _plain(step.measured),
                    "fitted": step.fitted,
                }
                for step in link.steps
            ],
        }
        for link in chain.links
    ]
    return {"links": links, "measured": _plain(chain.measured)}


def _plain(found: OutputDifference | None) -> dict[str, Any] | None:
    """Return an output difference as JSON represents it."""
    return None if found is None else finite(asdict(found))
