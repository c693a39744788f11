"""What `reproduce` does: the run of a manifest once more, and every byte compared."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpd_onnx import manifest, recipe
from cpd_onnx.cli_compress import compressed
from cpd_onnx.cli_deploy import deployed
from cpd_onnx.console import out, write_json
from cpd_onnx.errors import CpdError, PlanError
from cpd_onnx.options import command_line

_RUNS = ("compress", "deploy")


def reproduce(options: argparse.Namespace) -> None:
    """Repeat the run of a manifest and compare what comes out with what came out then."""
    there = manifest.read(options.manifest)
    folder = options.manifest.parent
    run = there.get("run", _RUNS[0])
    inputs = {entry["role"]: _found(entry, folder, getattr(options, entry["role"], None)) for entry in there["inputs"]}
    made = {entry["role"]: entry for entry in there["outputs"] if entry.get("repeats")}
    if run not in _RUNS or "model" not in inputs or "model" not in made:
        raise PlanError(f"manifest {options.manifest} names no model, or a run that is none of {', '.join(_RUNS)}")
    _require_folder(options.output)
    again = _again(options, there, inputs)
    again.output, again.force = options.output / Path(made["model"]["file"]).name, options.force
    if run == "compress":
        again.report = False
        _with_choice(again, inputs, folder / made["plan"]["file"] if "plan" in made else None)
        compressed(again, called=next(Path(e["file"]).name for e in there["inputs"] if e["role"] == "model"))
    else:
        again.ort = None
        deployed(again)
    rows = []
    for entry in made.values():
        path = options.output / Path(entry["file"]).name
        same = path.exists() and manifest.file_entry(path, "")["sha256"] == entry["sha256"]
        rows.append({"file": path.name, "role": entry["role"], "sha256": entry["sha256"], "same": same})
    others = manifest.differences(there)
    if not write_json(options, {"files": rows, "other_versions": others}):
        for row in rows:
            out.print(f"{row['file']}: {'the same bytes' if row['same'] else 'OTHER BYTES'}", soft_wrap=True)
    if not all(row["same"] for row in rows):
        why = "; ".join(others) or "another processor, or another number of threads (--threads) then"
        raise CpdError(f"what came out differs from what the manifest names: {why}")


def _found(entry: Mapping[str, Any], folder: Path, given: Path | None) -> Path:
    """Where an input lies now; raises CpdError if it is not there or another file."""
    path = given or folder / entry["file"]
    if not path.exists():
        raise CpdError(f"{path} is not there: say with --{entry['role']} where the {entry['role']} is now")
    if manifest.file_entry(path, "")["sha256"] != entry["sha256"]:
        raise CpdError(f"{path} is another file than then: its SHA-256 should be {entry['sha256']}")
    return path


def _again(options: argparse.Namespace, there: Mapping[str, Any], inputs: Mapping[str, Path]) -> argparse.Namespace:
    """The options of the run, with the inputs where they lie now; nothing is scored on other data again."""
    parser = command_line()
    said = [there.get("run", _RUNS[0]), str(inputs["model"]), "-o", ""]
    again = parser.parse_args(said)
    again.command.set_defaults(**recipe.parsed(there["recipe"], again.command, options.manifest))
    again = parser.parse_args(said)
    again.data = str(inputs["data"]) if "data" in inputs else again.data
    again.profile = str(inputs["profile"]) if "profile" in inputs else again.profile
    again.eval = None
    return again


def _with_choice(again: argparse.Namespace, inputs: Mapping[str, Path], plan: Path | None) -> None:
    """Where channels were chosen by measuring, the plan says which: measuring again would choose others."""
    again.watch = again.watch if again.patience else None
    again.like, again.cost_table = inputs.get("plan"), inputs.get("cost-table")
    if again.target[0] != "latency" or again.cost_table is not None or again.like is not None:
        return
    if again.rounds > 1 or plan is None or not plan.exists():
        raise CpdError("its channels were chosen by measuring in rounds, which nobody can repeat: use --cost-table")
    again.like = plan


def _require_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CpdError(f"{folder} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)
