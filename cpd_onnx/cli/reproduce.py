"""What `reproduce` does: the run of a manifest once more, and every byte compared."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cpd_onnx.cli.arguments import command_line
from cpd_onnx.cli.compress import compressed
from cpd_onnx.cli.console import out, require_outputs, write_json
from cpd_onnx.cli.deploy import deployed
from cpd_onnx.errors import CpdError, PlanError
from cpd_onnx.io import trust
from cpd_onnx.workflow import manifest, recipe

_RUNS = ("compress", "deploy")
_ROLES = ("model", "data", "watch", "plan", "cost-table", "profile")
"""Inputs that a run is repeated with; each is an option of the same name. What only measured is not looked at."""
_PLACEHOLDER = "output"
"""Stands for the output until its name is known."""
_USUAL_METRIC = "top1"
"""Stands for the metric where nothing is scored."""


def reproduce(options: argparse.Namespace) -> None:
    """Repeat the run of a manifest and compare what comes out with what came out then."""
    there = manifest.read(options.manifest)
    run, made = there.get("run", _RUNS[0]), {entry["role"]: entry for entry in there["outputs"] if entry.get("repeats")}
    if run not in _RUNS or "model" not in made or not any(entry["role"] == "model" for entry in there["inputs"]):
        raise PlanError(f"manifest {options.manifest} names no model, or a run that is none of {', '.join(_RUNS)}")
    require_outputs(options, reads=[path for role in _ROLES if (path := getattr(options, role)) is not None])
    inputs = _inputs(options, there)
    again = _again(options, there, run, inputs)
    again.output, again.force = options.output / _name_of(made["model"], options.manifest), options.force
    with _folder(options.output):
        if run == "compress":
            again.report = False
            _with_choice(again, inputs, lambda: _plan_of(made, options))
            _with_no_traces(again)
            compressed(again, called=next(Path(e["file"]).name for e in there["inputs"] if e["role"] == "model"))
            if again.teacher_cache is not None:
                again.teacher_cache.unlink(missing_ok=True)
        else:
            again.ort = None
            deployed(again)
    rows = []
    for entry in made.values():
        path = options.output / _name_of(entry, options.manifest)
        same = path.exists() and manifest.file_entry(path, "")["sha256"] == entry["sha256"]
        rows.append({"file": path.name, "role": entry["role"], "sha256": entry["sha256"], "same": same})
    others = manifest.differences(there)
    if not write_json(options, {"files": rows, "other_versions": others}):
        for row in rows:
            out.print(f"{row['file']}: {'the same bytes' if row['same'] else 'OTHER BYTES'}", soft_wrap=True)
    if not all(row["same"] for row in rows):
        why = "; ".join(others) or "another processor, or another number of threads (--threads) then"
        raise CpdError(f"what came out differs from what the manifest names: {why}")


def _inputs(options: argparse.Namespace, there: Mapping[str, Any]) -> dict[str, Path]:
    """Where the inputs lie now, by their roles.

    Raises CpdError if one is not there, is another file, or lies outside the manifest's folder and is not named on the
    command line; all that should be named are in the one line.
    """
    entries = {entry["role"]: entry for entry in there["inputs"] if entry["role"] in _ROLES}
    found: dict[str, Path] = {}
    outside: list[str] = []
    for role, entry in entries.items():
        given = getattr(options, role)
        try:
            found[role] = given or trust.inside(entry["file"], options.manifest, f"--{role}")
        except CpdError:
            place = os.path.normpath(options.manifest.parent / entry["file"])
            outside.append(f"--{role} {shlex.quote(place)}")
    if outside:
        raise CpdError(
            f"{options.manifest} names inputs outside its folder; if they should be used, name them too: "
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


def _plan_of(made: Mapping[str, Mapping[str, Any]], options: argparse.Namespace) -> Path | None:
    """The plan that came out then."""
    if "plan" not in made:
        return None
    given: Path | None = options.plan
    place = given or trust.inside(made["plan"]["file"], options.manifest, "--plan")
    return place if place.exists() else None


def _again(
    options: argparse.Namespace, there: Mapping[str, Any], run: str, inputs: Mapping[str, Path]
) -> argparse.Namespace:
    """The options of the run, with the inputs where they lie now; nothing is scored on other data again."""
    parser = command_line()
    typed = [run, str(inputs["model"]), "-o", _PLACEHOLDER]
    again = parser.parse_args(typed)
    said = recipe.parsed(there["recipe"], again.command, options.manifest)
    again.command.set_defaults(**said)
    again = parser.parse_args(typed)
    again.eval, again.manifest = None, options.manifest
    for role in ("data", "watch", "profile"):
        if role in inputs and hasattr(again, role):
            setattr(again, role, str(inputs[role]))
    if not getattr(again, "patience", 0):
        again.watch, again.metric = None, _USUAL_METRIC
    for name in ("log", "tensorboard", "teacher_cache"):  # where they go, see `_with_no_traces`
        said.pop(name, None)
    if "cost-table" in inputs:
        said.pop("cost_table", None)
    if "plan" in inputs:
        said.pop("like", None)
    trust.take(again, said, options.manifest, [*options.trust, str(options.data), str(options.watch)])
    return again


def _with_no_traces(again: argparse.Namespace) -> None:
    """Write no logs; the teacher's answers, where they were kept, are asked for and kept anew."""
    again.log = again.tensorboard = None
    if again.teacher_cache is not None:
        again.teacher_cache = again.output.with_name(f"{again.output.name}.answers")


def _with_choice(again: argparse.Namespace, inputs: Mapping[str, Path], plan_of: Callable[[], Path | None]) -> None:
    """Where channels were chosen by measuring, the plan says which: measuring again would choose others."""
    again.like, again.cost_table = inputs.get("plan"), inputs.get("cost-table")
    if again.target[0] != "latency" or again.cost_table is not None or again.like is not None:
        return
    plan = None if again.rounds > 1 else plan_of()
    if plan is None:
        raise CpdError("its channels were chosen by measuring in rounds, which nobody can repeat: use --cost-table")
    again.like = plan


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
