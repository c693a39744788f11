"""What a request names: code, and paths to write and read, whose conflicts are refused before the work starts."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cpd_onnx.data import open as sources
from cpd_onnx.data.metrics import OF_TWO_MODELS, evaluate
from cpd_onnx.data.sources import IMAGE_SUFFIXES, Source, imported
from cpd_onnx.deploy.profiles import load_profile, problems
from cpd_onnx.errors import CpdError, DataError, ModelError
from cpd_onnx.io.files import commit_together, is_same_file, locked_folder, require_free, write_atomically
from cpd_onnx.ir.model import Model, load
from cpd_onnx.options import options_of
from cpd_onnx.rewrite.plan import Plan
from cpd_onnx.shapes.stated import stated
from cpd_onnx.workflow.requests import Evaluating, OnSamples, Request, Saving

STDOUT = "-"
"""File name that stands for standard output."""


def beside(path: Path, ending: str) -> Path:
    """Return the path with a further ending appended to its name."""
    return path.with_name(f"{path.name}.{ending}")


def plan_path_of(path: Path) -> Path:
    """Return the default path of the plan of a model file."""
    return beside(path, "plan.json")


def recipe_path_of(path: Path) -> Path:
    """Return the path of the recipe of a model file."""
    return beside(path, "recipe.toml")


def table_path_of(path: Path) -> Path:
    """Return the path of the cost table of a run that missed its target, beside its model file."""
    return beside(path, "cost-table.json")


def executor_of(name: str | None, processes: int) -> Executor:
    """Return the executor that a function makes, named as module:function; without one, a pool of processes.

    Raises DataError if there is no such function, CpdError if it returns something else.
    """
    if name is None:
        return ProcessPoolExecutor(processes, get_context("spawn"))
    executor = imported(name, "that gives a concurrent.futures.Executor")()
    if not isinstance(executor, Executor):
        raise CpdError(f"--executor {name} returned a {type(executor).__name__}, not a concurrent.futures.Executor")
    return executor


def _inputs(request: Request) -> list[Path]:
    """Return the paths that a request may read; those that are not files do no harm."""
    found: list[Path] = []
    for named in options_of(type(request)):
        value = getattr(request, named.name, None)
        if named.option.takes in ("file", "data", "profile") and not named.option.is_output and value:
            found += map(Path, value if isinstance(value, tuple) else [value])
    return found


def require_outputs(request: Request, *paths: Path, reads: Sequence[Path] = ()) -> list[Path]:
    """Raise ModelError for outputs that exist, whose folder is missing, or that are also an input or another output.

    A file that is read is never replaced, whatever the spelling of its path or the links to it. Returns the paths that
    will be written, for `require_apart`.
    """
    more = [getattr(request, name, None) for name in ("json", "plot", "html", "csv", "runner", "template")]
    new = [*paths, *(Path(name) for name in more if name not in (None, STDOUT))]
    log, read = getattr(request, "log", None), [*reads, *_inputs(request)]
    continued = [path for name in ("teacher_cache", "checkpoint") if (path := getattr(request, name, None)) is not None]
    written = [*new, *([log] if log is not None else []), *continued]
    for place, path in enumerate(written):
        if any(is_same_file(path, other) for other in read) or _is_sample(path, read):
            raise ModelError(f"{path} is both an input and an output, and would be overwritten: choose another name")
        if any(is_same_file(path, other) for other in written[:place]):
            raise ModelError(f"{path} is given for two outputs: choose another name")
    for path in new:
        require_free(path, overwrite=request.force)
    if log is not None:
        require_free(log, overwrite=request.force or bool(getattr(request, "resume", False)))
    for path in continued:  # possibly from an earlier run
        require_free(path, overwrite=True)
    if paths:
        _require_room(paths[0])
    return written


def require_apart(written: Iterable[Path], *models: Model) -> None:
    """Raise ModelError if an output would replace an external data file of a model that is read."""
    for path in written:
        if any(is_same_file(path, file) for model in models for file in model.data_files):
            raise ModelError(f"{path} holds weights of an input model, and would be overwritten: choose another name")


def _require_room(path: Path) -> None:
    """Raise ModelError if the names of files beside the output would be too long for the file system."""
    for ending in (".00000000.data", ".checkpoint.00.onnx"):
        try:
            os.lstat(path.with_name(path.name + ending))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ModelError(f"cannot write {path.name}{ending} beside {path}: {error.strerror}") from error


def _is_sample(path: Path, read: Iterable[Path]) -> bool:
    """Return whether a file is one of the images in a folder that is read."""
    if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
        return False
    return any(folder.is_dir() and path.resolve().is_relative_to(folder.resolve()) for folder in read)


# What is read.


_CACHES = re.compile(r"(?<![a-z])(past|present|kv|k_?cache|v_?cache|cache)(?![a-z])", re.IGNORECASE)
"""Names of the inputs and outputs that carry keys and values of an attention, as exporters give them (heuristic)."""


def read_model(path: Path, shapes: Mapping[str, Sequence[int]] | None = None, free_io: Sequence[str] = ()) -> Model:
    """Return the model of a file, of which the inputs and outputs that match a pattern may lose channels.

    Raises DataError if a shape is given for an input that it does not have, or nothing matches a pattern.
    """
    model = load(path)
    model = model.with_free_io(_matching(model, free_io))
    known = {info.name for info in model.graph.input}
    for name in shapes or {}:
        if name not in known:
            raise DataError(f"--input-shape names {name!r}, but the inputs are {', '.join(sorted(known))}")
    return model


def _matching(model: Model, patterns: Sequence[str]) -> frozenset[str]:
    """Return the names of the inputs and outputs that match patterns; "caches" matches those that speak of a cache."""
    inputs = [info.name for info in model.graph.input if not model.has(info.name)]
    names = list(dict.fromkeys((*inputs, *(info.name for info in model.graph.output))))
    found: set[str] = set()
    for pattern in patterns:
        is_preset = pattern == "caches" and pattern not in names
        matched = {n for n in names if (_CACHES.search(n) if is_preset else fnmatchcase(n, pattern))}
        if not matched:
            raise DataError(f"--free-io {pattern!r} matches none of the inputs and outputs: {', '.join(names)}")
        found |= matched
    return frozenset(found)


def source_of(data: str | None, model: Model, request: OnSamples) -> Source | None:
    """Return the source of samples for a model; None if no data is given."""
    shapes = getattr(request, "input_shapes", None)
    return None if data is None else sources.source_of(data, model, shapes, request.images)


def evaluated(request: Evaluating, models: Mapping[str, Model], teacher: Model) -> dict[str, float]:
    """Return the metric of each model on the data of --eval, by name; empty without such data."""
    source = source_of(request.eval, teacher, request)
    return {} if source is None else scored(request, source, models, teacher)


def scored(request: Evaluating, source: Source, models: Mapping[str, Model], teacher: Model) -> dict[str, float]:
    """Return the metric of each model on a source of samples, by name."""
    reference = stated(teacher).complete_proto() if request.metric in OF_TWO_MODELS else None

    def score(model: Model) -> float:
        proto = stated(model, teacher).complete_proto()
        return evaluate(proto, source, request.metric, reference=reference, detector=request.detector)

    return {name: score(model) for name, model in models.items()}


def objections(profile: str | None, model: Model) -> list[str]:
    """Return the problems of a model under a profile; empty without a profile."""
    if profile is None:
        return []
    found = load_profile(profile)
    return [f"profile {found.name}: {sentence}" for sentence in problems(model, found)]


# What is written.


def write_both(request: Saving, model: Model, plan: Plan, plan_path: Path) -> None:
    """Write the model and its plan; if one cannot be written, neither is, and existing files are unchanged."""
    with locked_folder(request.output.parent), commit_together():
        # The model comes first: where the process is killed between the moves, a run without --force is refused for
        # the sake of the model, or not at all.
        model.save(request.output, overwrite=request.force, weights=request.weights)
        plan.save(plan_path, overwrite=request.force)


def write_json(request: Request, content: Mapping[str, Any]) -> None:
    """Write the result as JSON if --json names a file."""
    if request.json not in (None, "", STDOUT):
        write_atomically(Path(str(request.json)), json_text(content).encode())


def finite(value: Any) -> Any:
    """Return a value with None for every number that JSON cannot represent."""
    if isinstance(value, Mapping):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(content: Mapping[str, Any]) -> str:
    """Return the result as JSON text."""
    return json.dumps(content, indent=1) + "\n"
