"""What a request demands of the quality, and the entries of its result that the verdict is computed from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpd_onnx.budget.allocation import Allocation
from cpd_onnx.budget.targets import targets_of
from cpd_onnx.channels.free import free_channels, removable
from cpd_onnx.deploy import cache_configs
from cpd_onnx.errors import NotFasterError
from cpd_onnx.ir.interface import PREFIX, kept_by
from cpd_onnx.ir.model import Model
from cpd_onnx.passes.allocate import target_options
from cpd_onnx.pipeline.state import State
from cpd_onnx.report.verdict import NOT_FASTER, answers
from cpd_onnx.shapes.realistic import judged_inputs
from cpd_onnx.workflow import defaults
from cpd_onnx.workflow.places import table_path_of
from cpd_onnx.workflow.quality.samples import Samples, agreement_on
from cpd_onnx.workflow.quality.search import Choice, Demand
from cpd_onnx.workflow.requests import Compress, Prune

_ROUNDING = 1e-4
"""Effect of masking channels on the outputs, relative to them, that rounding explains (heuristic): none is usual."""
SMALLEST = ("latency", 0.1)
"""Target on the way to which the fastest model within a loss is searched where none is given."""


def target_of(request: Prune | Compress) -> dict[str, Any]:
    """Return the target as an option of `Allocate`; empty for that of the request."""
    return {} if request.target is not None else usual_target(request.max_loss)


def usual_target(max_loss: float | None) -> dict[str, Any]:
    """Return the target of a run that is given none, as an option of `Allocate`."""
    return target_options(*(defaults.TARGET if max_loss in (None, math.inf) else SMALLEST))


def demand_of(request: Prune | Compress, *, has_labels: bool, trains: bool = False) -> Demand:
    """Return what a run is to keep of the original's quality."""
    bound = defaults.max_loss(request.max_loss, has_target=request.target is not None, has_labels=has_labels)
    is_bounded = bound != math.inf and (request.rounds == 1 or request.max_loss is not None)
    metric = getattr(request, "metric", defaults.METRIC)
    detector = getattr(request, "detector", None)
    return Demand(
        bound if is_bounded else None, request.blind, metric, request.task, trains, detector,
        is_asked=request.max_loss is not None,
    )  # fmt: skip  # the fields in order


def content(
    request: Prune | Compress,
    demand: Demand,
    samples: Samples,
    choice: Choice,
    state: State,
    result: Model | None = None,
) -> dict[str, Any]:
    """Return the entries of a result that its verdict is computed from, apart from the measurements of `compress`.

    The result is the pruned model unless another one is given that was made from it.
    """
    chosen = choice.chosen or state.need("allocation", "allocate")
    compared = agreement_on(state.original, result or state.model, samples, demand.task)
    is_wanted = request.target is not None and not choice.is_lossless
    is_lossless = (choice.is_lossless or _removes_free_alone(request, state, result)) and not _is_changed(state)
    return {
        "agreement": None if compared is None else compared.as_json(),
        "asked": [asdict(row) for row in chosen.asked] if is_wanted else [],
        "is_bounded": demand.max_loss is not None and choice.plan is not None and not choice.is_lossless,
        "is_lossless": is_lossless,
        "is_blind": request.data is None and not is_lossless,
        "max_loss": demand.max_loss,
        "is_unbounded": request.max_loss == math.inf,
        "checks_speed": request.check_speed,
        # Who gives neither data nor an aim gets what is free: a smaller model, unless it is slower.
        "aims_at_speed": not choice.is_lossless or request.target is not None or request.max_loss is not None,
        "latency": dict(chosen.latency),
        "slow_because": chosen.slow_because,
        "inputs": judged_inputs(state.need("combed", "comb").folded),
    }


def _removes_free_alone(request: Prune | Compress, state: State, result: Model | None) -> bool:
    """Return whether a run without data that aimed at a target removed free channels alone, and changed no more."""
    is_changed = bool(state.need("plan", "prune").values) or (result is not None and result is not state.model)
    if request.data is not None or request.rounds > 1 or is_changed:
        return False
    combed, chosen = state.need("combed", "comb"), state.need("allocation", "allocate")
    free = removable(combed, free_channels(combed))
    return all(set(gone) <= set(dead) for gone, dead in zip(chosen.removed, free, strict=True))


def _is_changed(state: State) -> bool:
    """Return whether the proof shows that the outputs depend on channels that were taken for free."""
    return state.verification is not None and state.verification.effect > _ROUNDING


def target_notes(request: Prune | Compress, choice: Choice) -> list[str]:
    """Return a note if channels were removed at no loss only, whatever the target; empty otherwise."""
    if request.target is None or not choice.is_lossless:
        return []
    return [
        f"the target {targets_of(request.target)} was not aimed at: without --data or --blind, only channels are "
        "removed that change no output"
    ]


def interface_notes(model: Model) -> list[str]:
    """Return a note that names the inputs and outputs that have lost channels; empty if none has."""
    kept = kept_by(model)
    if not kept:
        return []
    shown = ", ".join(
        f"{name!r} (axis {', '.join(map(str, axes))})" for name, axes in itertools.islice(kept.items(), 4)
    )
    more = f" and {len(kept) - 4} more" if len(kept) > 4 else ""
    return [
        f"inputs and outputs that lost channels, so that the program around the model must change: {shown}{more}; "
        f"the metadata {PREFIX}NAME of the file say which it keeps"
    ]


def config_places(request: Prune | Compress) -> list[Path]:
    """Return the paths of configuration files that name the sizes of caches, if these may change."""
    return cache_configs.places_of(request.model, request.output) if request.free_io else []


def written_configs(request: Prune | Compress, model: Model) -> list[str]:
    """Write the configuration files of `config_places` for a pruned model, and return a sentence for each."""
    if not request.free_io:
        return []
    return cache_configs.write(request.model, request.output, model, overwrite=request.force)


def table_places(request: Prune | Compress) -> list[Path]:
    """Return the path of the cost table of a request if one is measured, which is kept where a target is missed."""
    if request.target is None or request.cost_table is not None or not targets_of(request.target).has_latency:
        return []
    return [table_path_of(request.output)]


def kept_table(request: Prune | Compress, chosen: Allocation, content: dict[str, Any]) -> Path | None:
    """Write the measured cost table if a target was out of reach, and add to the notes what it is good for.

    Returns its path; None if it is not needed.
    """
    is_missed = any(not row["is_met"] for row in content["asked"]) and not content["is_bounded"]
    place = next(iter(table_places(request)), None)
    if place is None or chosen.table is None or not is_missed:
        return None
    chosen.table.save(place)
    content["cost_table"] = str(place)
    content["notes"].append(f"--cost-table {place} tries other targets without measuring the latencies again")
    return place


def require_faster(request: Prune | Compress, content: Mapping[str, Any]) -> None:
    """Raise NotFasterError if the model is not faster than the original, unless it is to be kept anyway."""
    found = answers(content)[0]
    if request.check_speed and found.code == NOT_FASTER and not request.keep_anyway:
        raise NotFasterError(f"{found.line()}; nothing was written (--keep-anyway writes it)")
