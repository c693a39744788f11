"""Reproduce: repeat the run that a manifest records, and compare the files byte for byte."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpd_onnx.budget.choosing import MEASURED, STEPS
from cpd_onnx.budget.host import AUTO
from cpd_onnx.budget.targets import targets_of
from cpd_onnx.deploy.precision import PRECISIONS
from cpd_onnx.deploy.steps import HABITS
from cpd_onnx.errors import CpdError, PlanError
from cpd_onnx.io import trust
from cpd_onnx.options import build, options_of
from cpd_onnx.passes.lossless import KIND as LOSSLESS
from cpd_onnx.report import manifest
from cpd_onnx.rewrite.plan import load_plan
from cpd_onnx.workflow import defaults, recipe
from cpd_onnx.workflow.compress_files import compress
from cpd_onnx.workflow.deploy import deploy
from cpd_onnx.workflow.places import beside, require_outputs, write_json
from cpd_onnx.workflow.requests import Compress, Deploy, Observer, Reproduce, ignore

_REPEATABLE: dict[str, type[Compress] | type[Deploy]] = {"compress": Compress, "deploy": Deploy}
_ROLES = ("model", "data", "watch", "plan", "cost-table", "profile", "classes")
"""Roles of inputs that a run is repeated with, each an option; data that only measures is not needed."""
_TRACES = ("log", "tensorboard", "teacher_cache", "ort")
"""Options that name outputs which are not written again, or are written elsewhere."""


def reproduce(request: Reproduce, observer: Observer = ignore) -> dict[str, Any]:
    """Repeat the run that a manifest records, compare its files, and return the comparison, see `require_same`."""
    record = manifest.read(request.manifest)
    outputs = {entry["role"]: entry for entry in record["outputs"] if entry.get("repeats")}
    owner = next((owner for run, owner in _REPEATABLE.items() if run == record.get("run", "compress")), None)
    if owner is None or "model" not in outputs or not any(entry["role"] == "model" for entry in record["inputs"]):
        raise PlanError(f"manifest {request.manifest} names no model, or a run other than {' or '.join(_REPEATABLE)}")
    require_outputs(request)
    inputs = _inputs(request, record)
    repeated = _repeated_request(
        request, record, owner, inputs, request.output / _name_of(outputs["model"], request.manifest)
    )
    with _folder(request.output):
        if isinstance(repeated, Compress):
            recorded = recipe.parsed(record["recipe"], owner, request.manifest)
            repeated = _with_recorded_choice(repeated, recorded, lambda: _plan_of(outputs, request))
            compress(
                repeated, observer, called=next(Path(e["file"]).name for e in record["inputs"] if e["role"] == "model")
            )
            if repeated.teacher_cache is not None:
                repeated.teacher_cache.unlink(missing_ok=True)
        else:
            deploy(repeated, observer, merges=_recorded_merges(record), habits=_recorded_habits(record))
    rows = []
    for entry in outputs.values():
        path = request.output / _name_of(entry, request.manifest)
        same = path.exists() and _is_same(path, entry)
        rows.append({"file": path.name, "role": entry["role"], "sha256": entry["sha256"], "same": same})
    content = {"files": rows, "other_versions": manifest.differences(record)}
    write_json(request, content)
    return content


def _recorded_merges(record: Mapping[str, Any]) -> Any:
    """Return the linear runs that a run of `deploy` merged, which may have been chosen by their times; None if none."""
    steps = _recorded_steps(record)
    return (steps["merge"] or {"rounds": []}).get("rounds") if "merge" in steps else None


def _recorded_habits(record: Mapping[str, Any]) -> dict[str, bool]:
    """Return what the version of a run of `deploy` did otherwise in the steps that it recorded, of `HABITS`."""
    found: dict[str, bool] = {}
    for name, options in _recorded_steps(record).items():
        said = options.get("quantization", options)
        found |= {habit: isinstance(said, dict) and bool(said.get(habit)) for habit in HABITS.get(name, ())}
    return found


def _recorded_steps(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the options of the steps of a run of `deploy`, by name; empty ones for steps that changed nothing."""
    steps = record.get("steps")
    found = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    pairs = ((str(step.get("name")), step.get("options")) for step in found)
    return {name: options if isinstance(options, dict) else {} for name, options in pairs}


def _is_same(path: Path, entry: Mapping[str, Any]) -> bool:
    """Return whether a file is the one of the manifest; a plan may have been written in format version 1 then."""
    if manifest.file_entry(path, "")["sha256"] == entry["sha256"]:
        return True
    if entry["role"] != "plan":
        return False
    return hashlib.sha256(load_plan(path).dumps(1).encode()).hexdigest() == str(entry["sha256"])


def require_same(content: Mapping[str, Any]) -> None:
    """Raise CpdError unless all files are identical."""
    if not all(row["same"] for row in content["files"]):
        versions = "; ".join(content["other_versions"])
        cause = versions or "another processor or number of threads (--threads)"
        raise CpdError(f"the files differ from those of the manifest; possible cause: {cause}")


def _inputs(request: Reproduce, record: Mapping[str, Any]) -> dict[str, Path]:
    """Return the paths of the inputs by their roles.

    Raises CpdError if one is missing, has changed, or is outside the manifest's folder and not named on the command
    line; the message lists all that must be named.
    """
    entries = {entry["role"]: entry for entry in record["inputs"] if entry["role"] in _ROLES}
    found: dict[str, Path] = {}
    outside: list[str] = []
    for role, entry in entries.items():
        given = getattr(request, role.replace("-", "_"))
        try:
            found[role] = given or trust.inside(entry["file"], request.manifest, f"--{role}")
        except CpdError:
            place = os.path.normpath(request.manifest.parent / entry["file"])
            outside.append(f"--{role} {shlex.quote(place)}")
    if outside:
        raise CpdError(
            f"{request.manifest} names inputs outside its folder; to use them, add these options: {' '.join(outside)}"
        )
    for role, path in found.items():
        _require_the_same(path, role, entries[role])
    return found


def _require_the_same(path: Path, role: str, entry: Mapping[str, Any]) -> None:
    if not path.exists():
        raise CpdError(f"{path} does not exist: name the {role} with --{role}")
    if manifest.file_entry(path, "")["sha256"] != entry["sha256"]:
        raise CpdError(f"{path} has changed: its SHA-256 must be {entry['sha256']}")


def _name_of(entry: Mapping[str, Any], origin: Path) -> str:
    """Return the name of an output, without the folder in which it was."""
    name = Path(entry["file"]).name
    if name in ("", "..") or "\0" in name:
        raise PlanError(f"manifest {origin} names an output {entry['file']!r}, which is not a file name")
    return name


def _plan_of(outputs: Mapping[str, Mapping[str, Any]], request: Reproduce) -> Path | None:
    """Return the path of the plan that the run wrote; None if there is none."""
    if "plan" not in outputs:
        return None
    given: Path | None = request.plan
    place = given or trust.inside(outputs["plan"]["file"], request.manifest, "--plan")
    return place if place.exists() else None


def _repeated_request(
    request: Reproduce,
    record: Mapping[str, Any],
    owner: type[Compress] | type[Deploy],
    inputs: Mapping[str, Path],
    output: Path,
) -> Compress | Deploy:
    """Return the request of the run, with the present paths of its inputs and without its measurements."""
    options = {named.name: named for named in options_of(owner)}
    recorded = recipe.parsed(record["recipe"], owner, request.manifest)
    fixed: dict[str, Any] = {role: str(inputs[role]) for role in ("data", "watch", "profile") if role in inputs}
    fixed |= {"model": inputs["model"], "output": output, "force": request.force, "eval": None, "report": False}
    fixed |= {"max_loss": None, "check_speed": False}  # the recorded channels have been chosen
    fixed |= {"precision": PRECISIONS[0]}  # the conversion is another run, with a manifest of its own
    if "blind" not in recorded and "data" not in inputs:  # versions without that option chose by the weights alone
        fixed |= {"blind": True, "repair": False} | ({} if recorded.get("score") else {"score": "l2"})
    if recorded.get("eval") is not None or "hold_out" not in recorded:
        fixed["hold_out"] = 0.0  # there was other data to measure on, or the version of that run held nothing out
    fixed |= {"like": inputs.get("plan"), "cost_table": inputs.get("cost-table"), **dict.fromkeys(_TRACES)}
    fixed["image_classes"] = inputs.get("classes")
    if recorded.get("teacher_cache") is not None:
        fixed["teacher_cache"] = beside(output, "answers")
    if recorded.get("c_source") is not None:
        fixed["c_source"] = output.parent / Path(recorded["c_source"]).name
    if not recorded.get("patience"):
        fixed |= {"watch": None, "metric": defaults.METRIC}
    others = {name: value for name, value in recorded.items() if name not in fixed}
    trusted = trust.taken(others, options, request.manifest, (*request.trust, str(request.data), str(request.watch)))
    return build(owner, trusted | {name: value for name, value in fixed.items() if name in options})


def _with_recorded_choice(
    repeated: Compress, recorded: Mapping[str, Any], plan_of: Callable[[], Path | None]
) -> Compress:
    """Return the request with the recorded plan if channels were chosen by measurements or for another processor.

    In several rounds, the recorded plan cannot be carried out at once; the steps of its widths are then taken over.
    """
    has_latency = repeated.target is None or targets_of(repeated.target).has_latency
    has_bound = recorded.get("max_loss") is not None or (repeated.target is None and repeated.rounds == 1)
    is_searched = has_bound and recorded.get("max_loss") != math.inf and repeated.data is not None
    if repeated.like is not None or (has_latency and repeated.cost_table is not None and not is_searched):
        return repeated
    plan = plan_of()
    budget = {} if plan is None else load_plan(plan).content["budget"]
    is_converted = recorded.get("precision", PRECISIONS[0]) != PRECISIONS[0]
    is_measured = (
        has_latency or is_searched or is_converted or budget.get("kind") == LOSSLESS or budget.get(STEPS) == MEASURED
    )
    if plan is not None and repeated.rounds == 1 and (is_measured or STEPS in budget):
        return replace(repeated, like=plan)
    if is_measured:
        raise CpdError(
            "the run chose channels by measurements in several rounds, which cannot be repeated; compress with "
            "--cost-table for a reproducible run"
        )
    repeated = replace(repeated, check_speed=False)
    if STEPS in budget:
        return replace(repeated, round_to=f"{AUTO}{budget['round_to']}")
    return repeated if repeated.profile is not None or repeated.round_to else replace(repeated, round_to=1)


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Create a folder if it does not exist; remove it after the block if it was created and is still empty."""
    if folder.exists() and not folder.is_dir():
        raise CpdError(f"{folder} is a file: choose a folder")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
