"""The number format of a compressed model: it is chosen before pruning, and the pruned model is converted to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpd_onnx.budget.latency import LatencyProbe
from cpd_onnx.budget.targets import targets_of
from cpd_onnx.channels.combing import comb
from cpd_onnx.data.sources import Source
from cpd_onnx.deploy.precision import PRECISIONS, Precision, fastest, whole
from cpd_onnx.deploy.quantize import Quantization
from cpd_onnx.deploy.steps import Deployment
from cpd_onnx.deploy.steps import deploy as converted_for
from cpd_onnx.errors import DataError, TargetError, UnsupportedError
from cpd_onnx.ir.model import Model
from cpd_onnx.report.verdict import USUAL_LOSS
from cpd_onnx.runtime.bench import Setting
from cpd_onnx.workflow.quality.samples import Samples
from cpd_onnx.workflow.quality.search import Demand
from cpd_onnx.workflow.requests import Compress, Deploy

FLOAT, INTEGERS, AUTO = PRECISIONS
_COUNTS_BYTES = frozenset(("flash", "ram"))
"""Kinds of targets for which integers are a gain wherever they are possible."""
_PART = 0.25
"""Part of the allowed loss that the conversion of the original may take, so that most is left for the pruning
(heuristic)."""


def float_place(output: Path) -> Path:
    """Return the path of the pruned float model, from which the output is made by conversion."""
    return output.with_name(f"{output.stem}.{FLOAT}{output.suffix}")


def form_of(
    request: Compress, model: Model, source: Source | None, samples: Samples, demand: Demand
) -> Precision | None:
    """Return the form in which the result is deployed, None for that of the original.

    Raises:
        DataError: A conversion is asked for without data.
        UnsupportedError: The model cannot be converted to 8-bit integers, which were asked for.
    """
    if request.precision == FLOAT:
        return None
    if source is None:
        raise DataError(f"--precision {request.precision} needs samples for the ranges of activations: give --data")
    options = Quantization(seed=request.seed)
    if request.precision == INTEGERS:
        return whole(model, source, options)
    loss, most = _allowed(model, samples, demand)
    try:
        if request.target is not None and _COUNTS_BYTES.intersection(each.kind for each in targets_of(request.target)):
            form = whole(model, source, options)
            return form if loss(form(model)) <= most else None
        setting = Setting(request.latency_batch, request.latency_threads, request.latency_provider)
        probe = LatencyProbe(comb(model, request.input_shapes), setting)
        return fastest(probe, source, options, loss=loss, most=most)
    except (UnsupportedError, TargetError):  # it cannot be quantised, or its outputs cannot be compared
        return None


def _allowed(model: Model, samples: Samples, demand: Demand) -> tuple[Callable[[Model], float], float]:
    """Return what measures the loss by the conversion of the original, and the largest that is allowed."""
    if samples.choosing is None:
        return lambda _: 0.0, 0.0
    usual = USUAL_LOSS["labels" if samples.has_labels else "original"]
    return demand.loss(model, samples), _PART * (usual if demand.max_loss is None else demand.max_loss)


def as_deployed(request: Compress, form: Precision | None) -> Compress:
    """Return the request with the targets of flash and RAM counted in the form in which the result is deployed."""
    return request if form is None or request.deploy_as else replace(request, deploy_as=INTEGERS)


def deployed(model: Model, form: Precision, source: Source | None) -> Model:
    """Return a pruned model in its form, as `deploy` converts it: with ranges of its own activations."""
    return converted_for(model, Deployment(int8=form.options), source).model


def as_entry(request: Compress, form: Precision | None) -> dict[str, Any]:
    """Return what was asked for and what was chosen, as an entry of the report."""
    if form is None:
        return {"asked": request.precision, "what": FLOAT, "file": None, "alone": None}
    alone = form.latency if request.precision == AUTO else None
    return {"asked": request.precision, "what": form.what, "file": request.output.name, "alone": alone}


def notes(request: Compress, form: Precision | None) -> list[str]:
    """Return what was chosen, in a sentence; empty if no other number format was asked for."""
    if request.precision == FLOAT:
        return []
    if form is None:
        why = (
            "they are not faster here, lose too much, what they lose cannot be measured, or the model has them already"
        )
        return [f"8-bit integers are not used: {why}"]
    return [f"{request.output.name} has {form.what}, and is made from {float_place(request.output).name}"]


def conversion(request: Compress, form: Precision) -> Deploy:
    """Return the request that converts the pruned float model of a run, which can be repeated without the run."""
    return Deploy(
        model=float_place(request.output),
        output=request.output,
        data=request.data,
        images=request.images,
        int8=True,
        float_nodes=form.options.float_nodes,
        seed=request.seed,
        weights=request.weights,
        force=request.force,
        custom_ops=request.custom_ops,
        log_level=request.log_level,
    )


def without_conversion(request: Compress) -> Compress:
    """Return the request that only prunes, and writes what `conversion` reads."""
    return replace(request, precision=FLOAT, output=float_place(request.output))
