"""Reproduce: the run of a manifest once more, and every byte compared."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpd_onnx.errors import CpdError, PlanError
from cpd_onnx.io import trust
from cpd_onnx.options import build, options_of
from cpd_onnx.report import manifest
from cpd_onnx.workflow import defaults, recipe
from cpd_onnx.workflow.compress_files import compress
from cpd_onnx.workflow.deploy import deploy
from cpd_onnx.workflow.places import beside, require_outputs, write_json
from cpd_onnx.workflow.requests import Compress, Deploy, Observer, Reproduce, ignore

_RUNS: dict[str, type[Compress] | type[Deploy]] = {"compress": Compress, "deploy": Deploy}
_ROLES = ("model", "data", "watch", "plan", "cost-table", "profile")
"""Inputs that a run is repeated with, each an option. What only measured is not looked at."""
_TRACES = ("log", "tensorboard", "teacher_cache", "ort")
"""Options that say where things go that are not written again, or elsewhere."""


def reproduce(request: Reproduce, observer: Observer = ignore) -> dict[str, Any]:
    """Repeat the run of a manifest and compare what comes out with what came out then.

    What there is to say about it, see `require_same`.
    """
    there = manifest.read(request.manifest)
    made = {entry["role"]: entry for entry in there["outputs"] if entry.get("repeats")}
    owner = next((owner for run, owner in _RUNS.items() if run == there.get("run", "compress")), None)
    if owner is None or "model" not in made or not any(entry["role"] == "model" for entry in there["inputs"]):
        raise PlanError(f"manifest {request.manifest} names no model, or a run that is none of {', '.join(_RUNS)}")
    require_outputs(request)
    inputs = _inputs(request, there)
    again = _again(request, there, owner, inputs, request.output / _name_of(made["model"], request.manifest))
    with _folder(request.output):
        if isinstance(again, Compress):
            again = _with_choice(again, lambda: _plan_of(made, request))
            compress(
                again, observer, called=next(Path(e["file"]).name for e in there["inputs"] if e["role"] == "model")
            )
            if again.teacher_cache is not None:
                again.teacher_cache.unlink(missing_ok=True)
        else:
            deploy(again, observer)
    rows = []
    for entry in made.values():
        path = request.output / _name_of(entry, request.manifest)
        same = path.exists() and manifest.file_entry(path, "")["sha256"] == entry["sha256"]
        rows.append({"file": path.name, "role": entry["role"], "sha256": entry["sha256"], "same": same})
    content = {"files": rows, "other_versions": manifest.differences(there)}
    write_json(request, content)
    return content


def require_same(content: Mapping[str, Any]) -> None:
    """Raise CpdError unless all files came out the same."""
    if not all(row["same"] for row in content["files"]):
        versions = "; ".join(content["other_versions"])
        why = versions or "another processor, or another number of threads (--threads) then"
        raise CpdError(f"what came out differs from what the manifest names: {why}")


def _inputs(request: Reproduce, there: Mapping[str, Any]) -> dict[str, Path]:
    """Where the inputs lie now, by their roles.

    Raises CpdError if one is not there, is another file, or lies outside the manifest's folder and is not named on the
    command line; all that should be named are in the one line.
    """
    entries = {entry["role"]: entry for entry in there["inputs"] if entry["role"] in _ROLES}
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
            f"{request.manifest} names inputs outside its folder; if they should be used, name them too: "
            f"{' '.join(outside)}"
        )
    for role, path in found.items():
        _require_the_same(path, role, entries[role])
    return found


def _require_the_same(path: Path, role: str, entry: Mapping[str, Any]) -> None:
    if not path.exists():
        raise CpdError(f"{path} is not there: say with --{role} where the {role} is now")
    if manifest.file_entry(path, "")["sha256"] != entry["sha256"]:
        raise CpdError(f"{path} is another file than then: its SHA-256 should be {entry['sha256']}")


def _name_of(entry: Mapping[str, Any], origin: Path) -> str:
    """What an output is called: a plain name, whatever folder it was in."""
    name = Path(entry["file"]).name
    if name in ("", "..") or "\0" in name:
        raise PlanError(f"manifest {origin} names an output {entry['file']!r}, which is not the name of a file")
    return name


def _plan_of(made: Mapping[str, Mapping[str, Any]], request: Reproduce) -> Path | None:
    """The plan that came out then."""
    if "plan" not in made:
        return None
    given: Path | None = request.plan
    place = given or trust.inside(made["plan"]["file"], request.manifest, "--plan")
    return place if place.exists() else None


def _again(
    request: Reproduce,
    there: Mapping[str, Any],
    owner: type[Compress] | type[Deploy],
    inputs: Mapping[str, Path],
    output: Path,
) -> Compress | Deploy:
    """The request of the run, with the inputs where they lie now; nothing is scored on other data again."""
    options = {named.name: named for named in options_of(owner)}
    said = recipe.parsed(there["recipe"], owner, request.manifest)
    fixed: dict[str, Any] = {role: str(inputs[role]) for role in ("data", "watch", "profile") if role in inputs}
    fixed |= {"model": inputs["model"], "output": output, "force": request.force, "eval": None, "report": False}
    fixed |= {"like": inputs.get("plan"), "cost_table": inputs.get("cost-table"), **dict.fromkeys(_TRACES)}
    if said.get("teacher_cache") is not None:
        fixed["teacher_cache"] = beside(output, "answers")
    if not said.get("patience"):
        fixed |= {"watch": None, "metric": defaults.METRIC}
    left = {name: value for name, value in said.items() if name not in fixed}
    found = trust.taken(left, options, request.manifest, (*request.trust, str(request.data), str(request.watch)))
    return build(owner, found | {name: value for name, value in fixed.items() if name in options})


def _with_choice(again: Compress, plan_of: Callable[[], Path | None]) -> Compress:
    """Where channels were chosen by measuring, the plan says which: measuring again would choose others."""
    if again.target[0] != "latency" or again.cost_table is not None or again.like is not None:
        return again
    plan = None if again.rounds > 1 else plan_of()
    if plan is None:
        raise CpdError("its channels were chosen by measuring in rounds, which nobody can repeat: use --cost-table")
    return replace(again, like=plan)


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """A folder that is there, or is made; one that is made and stays empty goes again."""
    if folder.exists() and not folder.is_dir():
        raise CpdError(f"{folder} is a file: name a folder")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
