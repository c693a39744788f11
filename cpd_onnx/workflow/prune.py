"""Prune, apply and verify: workflows on an original, a pruned file and the plan that relates them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from cpd_onnx.errors import InconclusiveError, PlanError
from cpd_onnx.io.files import commit_together, locked_folder
from cpd_onnx.ir.model import Array, load
from cpd_onnx.options import picked
from cpd_onnx.passes.allocate import Allocate, target_options
from cpd_onnx.passes.comb import Comb
from cpd_onnx.passes.fold import Fold
from cpd_onnx.passes.prune import Prune as PrunePass
from cpd_onnx.passes.prune import apply as apply_plan
from cpd_onnx.passes.repair import Repair
from cpd_onnx.passes.score import Score
from cpd_onnx.passes.verify import Verify
from cpd_onnx.pipeline import pipeline
from cpd_onnx.proof.comparison import INCONCLUSIVE, OutputDifference
from cpd_onnx.proof.files import FileVerification, data_feeds, verify_files
from cpd_onnx.report import tables as report
from cpd_onnx.rewrite.plan import load_plan
from cpd_onnx.workflow.compress import step_of
from cpd_onnx.workflow.evidence.chain import Chain, Given, is_intact, manifest_of, verify_deployed
from cpd_onnx.workflow.places import (
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
from cpd_onnx.workflow.requests import Apply, Observer, Prune, VerifyFile, ignore

_BATCHES = 2
"""Number of batches of data on which a pruned file is compared with its original; a heuristic."""


def prune(request: Prune, observer: Observer = ignore) -> dict[str, Any]:
    """Prune a model, prove the result, write it with its plan, and return the result as plain values."""
    plan_path = request.plan or plan_path_of(request.output)
    written = require_outputs(request, request.output, plan_path)
    steps = _passes(request)
    started = time.perf_counter()
    model = read_model(request.model, request.input_shapes)
    require_apart(written, model)
    state = pipeline.run(
        steps,
        model,
        data=source_of(request.data, model, request),
        input_shapes=request.input_shapes,
        observer=lambda name, when: observer(name, 0, None),
    )
    before = report.size_of(model, request.model)
    with locked_folder(request.output.parent), commit_together():
        write_both(request, state.model, state.need("plan", "prune"), plan_path)
        content = report.result(state, time.perf_counter() - started)
        content |= {"output": str(request.output), "plan": str(plan_path)}
        content["notes"] += objections(request.profile, state.model)
        content["bytes"] = {"before": before, "after": report.size_of(state.model, request.output)}
        write_json(request, content)
    return content


def _passes(request: Prune) -> list[pipeline.Pass]:
    """Return the passes that a request asks for; the defaults depend on whether it has data."""
    step = step_of(request, target_options(*request.target), None, has_data=request.data is not None)
    _ = step.budget  # raises TargetError for invalid options before the work starts
    proof: list[pipeline.Pass] = [] if request.no_verify else [Verify(allow_inconclusive=request.allow_inconclusive)]
    if step.rounds > 1:
        return [step, *proof]
    repair = [Repair(samples=step.repair_samples, seed=step.seed)] if step.repair else []
    score = Score(step.score, step.seed, step.samples, step.score_labels)
    return [Fold(), Comb(), score, picked(Allocate, step), PrunePass(), *proof, *repair]


def apply(request: Apply, observer: Observer = ignore) -> dict[str, Any]:
    """Replay a plan, write the pruned model, and return the result as plain values."""
    written = require_outputs(request, request.output)
    model, plan = load(request.model), load_plan(request.plan)
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
        found = verify_files(original, load(request.pruned), load_plan(plan), feeds(), allow_inconclusive=True)
        content = _pruned(found)
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
                {"name": step.name, "what": step.what, "recorded": step.recorded, "measured": _plain(step.measured)}
                for step in link.steps
            ],
        }
        for link in chain.links
    ]
    return {"links": links, "measured": _plain(chain.measured)}


def _plain(found: OutputDifference | None) -> dict[str, Any] | None:
    """Return an output difference as JSON represents it."""
    return None if found is None else finite(asdict(found))
