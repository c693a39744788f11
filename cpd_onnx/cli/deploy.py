"""What `deploy` does."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from cpd_onnx.cli.arguments import DATA
from cpd_onnx.cli.console import evaluated, out, progress_line, require_apart, require_outputs, source_of, write_json
from cpd_onnx.data.metrics import check_metric
from cpd_onnx.deploy.profiles import Profile, load_profile
from cpd_onnx.deploy.quantize import Quantization
from cpd_onnx.deploy.steps import Deployed, Deployment, Step, deploy, ort_measured, shaped
from cpd_onnx.errors import CpdError, DataError
from cpd_onnx.io.files import commit_together, content_of, locked_folder, write_atomically
from cpd_onnx.ir.model import Model, load
from cpd_onnx.report import tables as report
from cpd_onnx.summary import count, share
from cpd_onnx.workflow import manifest, recipe

FORMAT = "cpd-onnx/deploy"
_OF_INT8: dict[str, Any] = {"samples": None, "calibration": None, "per_tensor": False, "exclude": []}
"""Options that say how to quantise, and what they are where they are not given."""


def run(options: argparse.Namespace) -> None:
    """Make a model ready for its target, and write it with its manifest."""
    content = deployed(options)
    if not write_json(options, content):
        _show(content)


def deployed(options: argparse.Namespace) -> dict[str, Any]:
    """Do it; what there is to say about it."""
    place = manifest.place_of(options.output)
    places = [options.output, place, *([options.ort] if options.ort is not None else [])]
    require_outputs(options, *places)
    _require_sense(options)
    check_metric(options.metric)
    recipe.text(options)  # refuses now what cannot be put on record at the end
    started = time.perf_counter()
    profile = None if options.profile is None else load_profile(options.profile)
    wish = _wish(options, profile)
    model = load(options.model)
    require_apart(options, model)
    source = source_of(options.data, shaped(model, wish), options)
    with progress_line() as line:
        task = line.add_task("read", total=None)
        made = deploy(model, wish, source, lambda name: line.update(task, description=name))
        scores = evaluated(options, {"before": model, "after": made.model}, model)
    entry = manifest.file_entry(options.model, "model")  # which the output may replace
    with locked_folder(options.output.parent), commit_together():
        made = replace(made, steps=(*made.steps, *_write(options, model, made.model)))
        content = _content(options, model, made) | {"seconds": round(time.perf_counter() - started, 3)}
        content |= {"metric": options.metric, "accuracy": scores} if scores else {}
        read = {"model": entry, "data": options.data, "eval": options.eval, "profile": options.profile}
        beside = {} if options.ort is None else {options.ort: "ort"}  # of which no two are the same
        manifest.write(
            place,
            recipe.text(options),
            read,
            {"model": options.output},
            beside=beside,
            run="deploy",
            steps=content["steps"],
        )
    return content | {"manifest": str(place)}


def _require_sense(options: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    if options.int8 and options.data is None:
        raise DataError(f"quantising looks at samples: give --data, {DATA}")
    given = [name for name, usual in _OF_INT8.items() if getattr(options, name) != usual]
    if given and not options.int8:
        raise CpdError(f"--{given[0].replace('_', '-')} says how to quantise: give --int8 too")
    if options.storage_only and options.half is None:
        raise CpdError("--storage-only says how to store half floats: give --half too")
    wishes = (options.profile, options.fix, options.batch, options.opset, options.int8, options.half, options.ort)
    if not any(wishes):
        raise CpdError("there is nothing to do: give --profile, --fix, --batch, --opset, --int8, --half or --ort")


def _wish(options: argparse.Namespace, profile: Profile | None) -> Deployment:
    """What the command line asks for; how to quantise is the profile's matter where there is one."""
    of_target: dict[str, Any] = {}
    if profile is not None:
        names = ("activations", "symmetric", "reduce_range", "quantized_bias")
        of_target = {name: getattr(profile, name) for name in names}
    given = {name: getattr(options, name) for name in ("samples", "calibration") if getattr(options, name) is not None}
    int8 = Quantization(
        **given, **of_target, per_channel=not options.per_tensor, exclude=tuple(options.exclude), seed=options.seed
    )
    return Deployment(
        sizes={name: sizes if len(sizes) > 1 else sizes[0] for name, sizes in options.fix},
        batch=options.batch,
        opset=options.opset,
        int8=int8 if options.int8 else None,
        half=options.half,
        storage_only=options.storage_only,
        profile=profile,
    )


def _write(options: argparse.Namespace, model: Model, made: Model) -> Iterator[Step]:
    """Write the model, and what onnxruntime makes of it, which is a step."""
    weights = "beside" if options.weights == "as-is" and model.is_external else options.weights
    made.data_files |= model.data_files  # which stay, whatever they are called
    if options.ort is not None:
        started = time.perf_counter()
        content, difference = ort_measured(made, options.ort_level)
        seconds = time.perf_counter() - started
        write_atomically(options.ort, content)
        yield Step("ort", options.ort_level, difference, len(content), seconds, (), {"level": options.ort_level})
    made.save(options.output, overwrite=options.force, weights=weights)


def _content(options: argparse.Namespace, model: Model, made: Deployed) -> dict[str, Any]:
    """The result."""
    sizes = {"before": report.size_of(model, options.model), "after": report.size_of(made.model, options.output)}
    return {
        "format": FORMAT,
        "version": 1,
        "source": {"file": options.model.name, "sha256": model.sha256()},
        "profile": options.profile,
        "steps": [_plain(step) for step in made.steps],
        "problems": list(made.problems),
        "bytes": sizes | ({"ort": content_of(options.ort).stat().st_size} if options.ort is not None else {}),
        "output": str(options.output),
        "ort": None if options.ort is None else str(options.ort),
    }


def _plain(step: Step) -> dict[str, Any]:
    """A step as JSON has it: what is not finite is null."""
    content = asdict(step)
    if step.difference is not None:
        values = asdict(step.difference).items()
        content["difference"] = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values
        }
    return content


def _show(content: dict[str, Any]) -> None:
    if content["steps"]:
        out.print(_steps_table(content))
    for step in content["steps"]:
        for note in step["notes"]:
            out.print(f"note: {note}", soft_wrap=True)
    before, after = content["bytes"]["before"], content["bytes"]["after"]
    out.print(f"{count(before)}B -> {count(after)}B, {share(after, before)}")
    for name, value in content.get("accuracy", {}).items():
        out.print(f"{content['metric']} {name}: {value:.4f}")
    if content["profile"] is not None:
        name = Path(content["profile"]).name
        for line in [f"{name} objects: {sentence}" for sentence in content["problems"]] or [
            f"{name} objects to nothing"
        ]:
            out.print(line, soft_wrap=True)
    written = ", ".join(str(content[key]) for key in ("output", "ort", "manifest") if content[key])
    out.print(f"wrote {written}", soft_wrap=True)


def _steps_table(content: dict[str, Any]) -> Table:
    """One row a step: how far its outputs are from those of the step before."""
    title = "Outputs of each step beside the one before, of the spread"
    table = report.table_of(title, "step", "what", "at most", "typically", "same answer", "bytes", "seconds")
    table.columns[1].justify = "left"
    for step in content["steps"]:
        apart = step["difference"]
        cells = ["not compared", "", ""]
        if apart is not None:
            agreement = "" if apart["agreement"] is None else f"{100 * apart['agreement']:.1f} %"
            numbers = (apart[name] for name in ("largest", "typical"))
            cells = [*("not finite" if number is None else f"{number:.2g}" for number in numbers), agreement]
        table.add_row(step["name"], step["what"], *cells, count(step["bytes"]), f"{step['seconds']:.2f}")
    return table
