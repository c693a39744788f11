"""Manifests: the inputs and outputs of a run with their SHA-256, so that the run can be checked and repeated."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from cpd_onnx.errors import PlanError
from cpd_onnx.io.files import (
    StoredFile,
    content_of,
    pending_files,
    read_json,
    translate_read_errors,
    write_atomically,
)
from cpd_onnx.runtime.bench import machine
from cpd_onnx.version import __version__

FORMAT = "cpd-onnx/manifest"
VERSION = 2
_PACKAGES = ("numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "scipy", "torch", "torchmetrics")
"""Packages whose versions may affect a result."""
GENERATOR = "emx-onnx-cgen"
"""Package whose version affects C source only; other runs do not record it."""


def file_entry(path: Path, role: str, **more: Any) -> dict[str, Any]:
    """Return name, size and SHA-256 of a file, or of all files below a folder in the order of their names.

    Raises ModelError if it cannot be read.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest, size = hashlib.sha256(), 0
    for file in files:
        stored = StoredFile(content_of(file))
        if path.is_dir():
            digest.update(f"{file.relative_to(path).as_posix()}\0{stored.size}\0".encode())
        for piece in stored.chunks():
            digest.update(piece)
        size += stored.size
    return {"role": role, "file": str(path), "bytes": size, "sha256": digest.hexdigest(), **more}


def versions(*more: str) -> dict[str, str]:
    """Return the versions of Python, this package, the packages that results depend on, and further ones."""
    found = {"cpd-onnx": __version__, "python": platform.python_version()}
    for name in sorted((*_PACKAGES, *more)):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def place_of(output: Path) -> Path:
    """Return the path of the manifest of a file."""
    return output.with_name(f"{output.name}.manifest.json")


def inputs_of(read: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of the inputs; an entry that exists already, of a replaced file, is taken as it is."""
    found = []
    for role, path in read.items():
        if isinstance(path, dict):
            found.append(path)
        elif path is not None and Path(path).exists():
            found.append(file_entry(Path(path), role))
    return found


def write(place: Path, recipe: str, read: Mapping[str, Any], written: Mapping[str, Path | None], **more: Any) -> None:
    """Write a manifest.

    Args:
        place: Path of the manifest; the file names in it are relative to its folder.
        recipe: Text of the recipe that repeats the command.
        read: Inputs by role; those that are not a file or folder are omitted, as the recipe contains them.
        written: Reproducible outputs by role; the data file of the model is found by its name.
        more: Further entries: `run`, the name of the command; `beside`, outputs by path that differ in each run.
    """
    beside = more.pop("beside", {})
    further = [GENERATOR] if "c" in written else []
    inputs = inputs_of(read)
    outputs = [file_entry(path, role, repeats=True) for role, path in written.items() if path is not None]
    model = Path(str(written["model"]))
    outputs += [file_entry(path, "weights", repeats=True) for path in _data_of(model)]
    outputs += [file_entry(path, role, repeats=False) for path, role in beside.items()]
    for entry in (*inputs, *outputs):
        entry["file"] = relative(Path(entry["file"]), place.parent)
    document = {
        "format": FORMAT, "version": VERSION, "command": typed(), "recipe": recipe, "inputs": inputs,
        "outputs": outputs, "versions": versions(*further), "machine": machine(), **more,
    }  # fmt: skip  # a table
    write_atomically(place, (json.dumps(document, indent=1) + "\n").encode())


def _data_of(model: Path) -> list[Path]:
    """Return the data files of a written model, which may still be pending in `commit_together`."""
    name = re.compile(re.escape(model.name) + r"\.[0-9a-f]{8}\.data")
    written = pending_files()
    there = model.parent.iterdir() if written is None else written
    return sorted(path for path in there if path.parent == model.parent and name.fullmatch(path.name))


def provenance(paths: Iterable[Path], seed: int, record: Path | None = None) -> dict[str, Any]:
    """Return the provenance section of a report: the date, the command, the environment and the output files.

    `record` is the path of the manifest, from which the run can be repeated. The date is in the report only: models,
    plans and manifests are the same for the same run on any day.
    """
    files = [file_entry(path, "") for path in paths]
    return {
        "tool": f"cpd-onnx {__version__}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "manifest": None if record is None else record.name,
        "command": shlex.join(typed()),
        "seed": seed,
        "versions": versions(),
        "machine": machine(),
        "files": [{"file": Path(e["file"]).name, "bytes": e["bytes"], "sha256": e["sha256"]} for e in files],
        "seconds": {},
    }


def read(path: Path) -> dict[str, Any]:
    """Read a manifest; raises PlanError for a file that is not one."""
    with translate_read_errors(path, "manifest", f"manifest {path} is not JSON", PlanError):
        content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") not in (1, VERSION):
        raise PlanError(f"{path} is not a manifest: 'format' must be {FORMAT!r} and 'version' 1 or {VERSION}")
    if not isinstance(content.get("recipe"), str) or not all(_is_list(content.get(n)) for n in ("inputs", "outputs")):
        raise PlanError(f"manifest {path} lacks its recipe, inputs or outputs")
    if not _are_versions(content.get("versions", {})):
        raise PlanError(f"manifest {path}: 'versions' should map names to versions")
    return content


def _are_versions(versions: Any) -> bool:
    return isinstance(versions, dict) and all(isinstance(version, str) for version in versions.values())


def _is_list(entries: Any) -> bool:
    return isinstance(entries, list) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("role", "file", "sha256"))
        for entry in entries
    )


def differences(there: Mapping[str, Any]) -> list[str]:
    """Return a description of the versions that differ from those in a manifest."""
    then = there.get("versions", {})
    here = versions(*({GENERATOR} & then.keys()))
    return [f"{name} {then.get(name, 'none')} then, {here.get(name, 'none')} now" for name in sorted({*here, *then})
            if here.get(name) != then.get(name)]  # fmt: skip


def typed() -> list[str]:
    """Return the command line of this process."""
    return ["cpd-onnx", *sys.argv[1:]]


def relative(path: Path, folder: Path) -> str:
    """Return a path relative to a folder, so that both can be moved together."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
