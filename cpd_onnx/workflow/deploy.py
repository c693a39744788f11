"""Deploy: convert a model for its target, and write it with its manifest."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cpd_onnx.budget.targets import targets_of
from cpd_onnx.data.metrics import check_metric
from cpd_onnx.data.open import FORMS
from cpd_onnx.data.sources import Source
from cpd_onnx.deploy.c_source import require_generator
from cpd_onnx.deploy.merged import MEASURES, Rounds
from cpd_onnx.deploy.profiles import Profile, load_profile
from cpd_onnx.deploy.quantize import Quantization
from cpd_onnx.deploy.steps import HABITS, Deployed, Deployment, Step, c_measured, ort_measured, shaped
from cpd_onnx.deploy.steps import deploy as deploy_model
from cpd_onnx.deploy.weight_bits import WeightBits
from cpd_onnx.errors import CpdError, DataError, ProofError, UnsupportedError
from cpd_onnx.io.files import commit_together, content_of, locked_folder, write_atomically
from cpd_onnx.ir.interface import interface_of
from cpd_onnx.ir.model import Model, load
from cpd_onnx.options import options_of
from cpd_onnx.report import manifest
from cpd_onnx.report import tables as report
from cpd_onnx.summary import count
from cpd_onnx.workflow import recipe
from cpd_onnx.workflow.places import evaluated, finite, require_apart, require_outputs, source_of, write_json
from cpd_onnx.workflow.quality.checks import checked_samples
from cpd_onnx.workflow.requests import Compress, Deploy, Observer, Prune, ignore

FORMAT = "cpd-onnx/deploy"
"""Format of the JSON result."""
_OF_INT8 = ("samples", "calibration", "int8_form", "per_tensor", "exclude", "float_nodes")
"""Options that have an effect only with --int8."""


def deploy(
    request: Deploy,
    observer: Observer = ignore,
    *,
    model: Model | None = None,
    merges: Rounds | None = None,
    habits: Mapping[str, bool] | None = None,
) -> dict[str, Any]:
    """Convert a model for its target, write it with its manifest, and return the result as plain values.

    Args:
        request: The options.
        observer: Called with the name of each step as it starts.
        model: The content of the file of the request, if it is in memory.
        merges: Linear runs to merge, as an earlier run recorded them; None chooses them.
        habits: What an earlier version did otherwise, of `HABITS`; None for what this one does.
    """
    place = manifest.place_of(request.output)
    places = [request.output, place, *_further_outputs(request)]
    written = require_outputs(request, *places)
    _require_sense(request)
    check_metric(request.metric)
    recipe.text(request)  # fails now, not at the end, if an option cannot be recorded
    started = time.perf_counter()
    profile = None if request.profile is None else load_profile(request.profile)
    deployment = _as_before(replace(_deployment(request, profile), merges=merges), habits or {})
    model = model or load(request.model)
    require_apart(written, model)
    whole = shaped(model, deployment)
    source = source_of(request.data, whole, request)
    checked = checked_samples(request, whole, source)
    deployed = deploy_model(model, deployment, source, lambda name: observer(name, 0, None))
    scores = evaluated(request, {"before": model, "after": deployed.model}, model)
    entry = manifest.file_entry(request.model, "model")  # read now, as the output may replace the file
    with locked_folder(request.output.parent), commit_together():
        deployed = replace(deployed, steps=(*deployed.steps, *_write(request, model, deployed.model, source)))
        content = _content(request, model, deployed) | {"seconds": round(time.perf_counter() - started, 3)}
        content |= {"preflight": checked} if checked else {}
        content |= {"metric": request.metric, "accuracy": scores} if scores else {}
        read = {"model": entry, "data": request.data, "eval": request.eval, "profile": request.profile}
        beside = {} if request.ort is None else {request.ort: "ort"}  # onnxruntime writes different bytes each time
        of_c = dict(zip(("c", "c-header"), c_files(request.c_source), strict=False))
        manifest.write(
            place,
            recipe.text(request),
            read,
            {"model": request.output, **of_c},
            beside=beside,
            run="deploy",
            steps=content["steps"],
        )
        content |= {"manifest": str(place)}
        write_json(request, content)
    return content


def merged_places(request: Prune | Compress) -> list[Path]:
    """Return the paths of the model with merged operators and of its manifest; none if it was not requested."""
    return [] if request.merged is None else [request.merged, manifest.place_of(request.merged)]


def write_merged(request: Prune | Compress, model: Model) -> list[str]:
    """Write the pruned model with merged operators if that was requested, and return what was merged, in sentences.

    A model that cannot be merged is no reason to lose the pruned one: the sentence then says why it was not written.
    """
    if request.merged is None:
        return []
    is_timed = request.target is not None and targets_of(request.target).has_latency and request.cost_table is None
    options = {name: getattr(request, name) for name in ("weights", "force", "custom_ops", "log_level")}
    made = Deploy(model=request.output, output=request.merged, merge=MEASURES[-1 if is_timed else 0], **options)
    try:
        steps = deploy(made, model=model)["steps"]
    except (UnsupportedError, ProofError) as error:
        return [f"{_not_written(request)}: {error}"]
    return [f"{request.merged}: {note}" for step in steps for note in step["notes"]]


def merged_files(request: Prune | Compress, content: Mapping[str, Any]) -> list[Path]:
    """Return the files with merged operators that a run has written, from its result."""
    is_missing = any(note.startswith(_not_written(request)) for note in content["notes"])
    return [] if is_missing else merged_places(request)


def _not_written(request: Prune | Compress) -> str:
    return f"{request.merged} was not written"


def _require_sense(request: Deploy) -> None:
    """Refuse options that would have no effect."""
    if request.int8 and request.data is None:
        raise DataError(f"--int8 needs samples for calibration: give --data, {FORMS}")
    if request.weight_bits is not None and request.data is None:
        raise DataError(f"--weight-bits needs samples that weights are fitted to: give --data, {FORMS}")
    if request.wide and request.weight_bits is None:
        raise CpdError("--wide-weight has no effect without --weight-bits: give --weight-bits as well")
    if request.weight_bits is not None and (request.ort is not None or request.c_source is not None):
        raise CpdError(
            "--weight-bits makes the .onnx file smaller, not what is made of it: an .ort file and a C source hold the "
            "weights in float32 again; give --int8 for these"
        )
    of_int8 = (named for named in options_of(Deploy) if named.name in _OF_INT8)
    given = [named.key for named in of_int8 if getattr(request, named.name) != named.default]
    given = [key for key in given if key != "samples" or request.weight_bits is None]
    if given and not request.int8:
        raise CpdError(f"--{given[0]} has no effect without --int8: give --int8 as well")
    if request.storage_only and request.half is None:
        raise CpdError("--storage-only has no effect without --half: give --half as well")
    sizes, files = (request.profile, request.fix, request.batch), (request.ort, request.c_source)
    more = (request.fold, request.merge, request.int8, request.integer_io, request.half, request.weight_bits)
    if not any((*sizes, *files, request.opset, *more)):
        wishes = (
            "--profile, --fix, --batch, --opset, --fold, --merge, --int8, --integer-io, --half, --weight-bits, --ort "
            "or --c-source"
        )
        raise CpdError(f"nothing to do: give {wishes}")
    if request.c_source is not None:
        require_generator()


def c_files(place: Path | None) -> tuple[Path, ...]:
    """Return the source and the header that are written for a path of C source."""
    return () if place is None else (place, place.with_suffix(".h"))


def _further_outputs(request: Deploy) -> list[Path]:
    """Return the files besides the model and its manifest."""
    return [*([] if request.ort is None else [request.ort]), *c_files(request.c_source)]


def _deployment(request: Deploy, profile: Profile | None) -> Deployment:
    """Return the requested conversions; a profile sets how activations and weights are quantised."""
    of_target: dict[str, Any] = {}
    if profile is not None:
        names = ("activations", "symmetric", "reduce_range", "quantized_bias")
        of_target = {name: getattr(profile, name) for name in names}
    given = {name: getattr(request, name) for name in ("samples", "calibration") if getattr(request, name) is not None}
    given["form"] = request.int8_form or ("qdq" if request.c_source is None else "qoperator")
    int8 = Quantization(
        **given,
        **of_target,
        per_channel=not request.per_tensor,
        exclude=request.exclude,
        float_nodes=request.float_nodes,
        seed=request.seed,
    )
    return Deployment(
        sizes={name: sizes if len(sizes) > 1 else sizes[0] for name, sizes in request.fix.items()},
        batch=request.batch,
        opset=request.opset,
        fold=request.fold or request.c_source is not None,
        merge=request.merge,
        int8=int8 if request.int8 else None,
        integer_io=request.integer_io,
        half=request.half,
        storage_only=request.storage_only,
        weights=None if request.weight_bits is None else _weights(request, request.weight_bits),
        profile=profile,
    )


def _weights(request: Deploy, bits: int) -> WeightBits:
    """Return how weights are stored in few bits."""
    samples = WeightBits.samples if request.samples is None else request.samples
    return WeightBits(bits, request.wide, samples, seed=request.seed)


def _as_before(deployment: Deployment, habits: Mapping[str, bool]) -> Deployment:
    """Return the requested conversions as an earlier version did them."""
    of_int8: dict[str, Any] = {name: habits[name] for name in HABITS["int8"] if name in habits}
    int8 = None if deployment.int8 is None else replace(deployment.int8, **of_int8)
    return replace(deployment, int8=int8, affine=habits.get("affine", deployment.affine))


def _write(request: Deploy, model: Model, converted: Model, source: Source | None) -> Iterator[Step]:
    """Write the model and, if requested, its .ort file and its C source; yield the steps that convert to these."""
    weights = "beside" if request.weights == "as-is" and model.is_external else request.weights
    converted.data_files |= model.data_files  # never overwritten, whatever their names
    converted.save(request.output, overwrite=request.force, weights=weights)
    if request.ort is not None:
        started = time.perf_counter()
        content, difference = ort_measured(converted, request.ort_level)
        seconds = time.perf_counter() - started
        write_atomically(request.ort, content)
        yield Step("ort", request.ort_level, difference, len(content), seconds, (), {"level": request.ort_level})
    if request.c_source is not None:
        started = time.perf_counter()
        written, compared = c_measured(converted, request.c_source.stem, source)
        seconds = time.perf_counter() - started
        for place, text in zip(c_files(request.c_source), (written.text, written.header), strict=True):
            write_atomically(place, text.encode())
        notes = () if compared is not None else ("the C source was not compared: no C compiler was found",)
        what = f"arena {count(written.arena)}B, constants {count(written.constants)}B"
        yield Step("c", what, compared, len(written.text), seconds, notes, {"name": request.c_source.stem})


def _content(request: Deploy, model: Model, deployed: Deployed) -> dict[str, Any]:
    """Return the result as plain values."""
    sizes = {"before": report.size_of(model, request.model), "after": report.size_of(deployed.model, request.output)}
    return {
        "format": FORMAT,
        "version": 1,
        "source": {"file": request.model.name, "sha256": model.sha256()},
        "profile": request.profile,
        "steps": [_plain(step) for step in deployed.steps],
        "integers": {name: asdict(each) for name, each in interface_of(deployed.model).integers.items()},
        "problems": list(deployed.problems),
        "bytes": sizes | ({"ort": content_of(request.ort).stat().st_size} if request.ort is not None else {}),
        "output": str(request.output),
        "ort": None if request.ort is None else str(request.ort),
        "c_source": None if request.c_source is None else str(request.c_source),
    }


def _plain(step: Step) -> dict[str, Any]:
    """Return a step as JSON represents it."""
    difference = None if step.difference is None else finite(asdict(step.difference))
    return asdict(step) | {"difference": difference}
