"""The number format of a compressed model: it is chosen before pruning, and the pruned model is converted to it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from cpd_onnx.budget.allocation import Prices
from cpd_onnx.budget.deployed import FewBits
from cpd_onnx.budget.latency import LatencyProbe
from cpd_onnx.budget.targets import Targets, targets_of
from cpd_onnx.channels.combing import comb
from cpd_onnx.data.sources import Source
from cpd_onnx.deploy.precision import (
    PRECISIONS,
    Halves,
    InFewBits,
    Precision,
    fastest,
    in_four_bits,
    narrowest,
    whole,
)
from cpd_onnx.deploy.quantize import Quantization
from cpd_onnx.deploy.steps import Deployment
from cpd_onnx.deploy.steps import deploy as converted_for
from cpd_onnx.deploy.weight_bits import WeightBits
from cpd_onnx.errors import DataError, TargetError, UnsupportedError
from cpd_onnx.ir.model import Model
from cpd_onnx.report.verdict import USUAL_LOSS
from cpd_onnx.runtime.bench import Setting
from cpd_onnx.workflow.quality.samples import Samples
from cpd_onnx.workflow.quality.search import Demand
from cpd_onnx.workflow.requests import Compress, Deploy

FLOAT, HALF, INTEGERS, FOUR_BITS, AUTO = PRECISIONS
Form: TypeAlias = "Precision | Halves | InFewBits"
"""The form in which a compressed model is deployed."""
_OF_A_PROGRAM = frozenset(("flash", "ram"))
"""Kinds of targets for which integers are a gain wherever they are possible."""
_OF_THE_FILE = "bytes"
"""Kind of target for which weights are stored in few bits."""
_PART = 0.25
"""Part of the allowed loss that the conversion of the original may take, so that most is left for the pruning
(heuristic)."""
_PART_OF_BITS = 0.75
"""The same for weights in few bits, which make a file smaller at less loss than fewer channels do (heuristic)."""


def float_place(output: Path) -> Path:
    """Return the path of the pruned float model, from which the output is made by conversion."""
    return output.with_name(f"{output.stem}.{FLOAT}{output.suffix}")


def form_of(request: Compress, model: Model, source: Source | None, samples: Samples, demand: Demand) -> Form | None:
    """Return the form in which the result is deployed, None for that of the original.

    Raises:
        DataError: A conversion is asked for without data.
        TargetError: Weights in four bits are asked for, and a program on a control unit, which has none.
        UnsupportedError: The model cannot be converted to the form that was asked for.
    """
    if request.precision == FLOAT:
        return None
    if request.precision == HALF:
        form = Halves()
        form(model)  # fails now, not after the pruning
        return form
    if source is None:
        raise DataError(f"--precision {request.precision} needs samples that numbers are fitted to: give --data")
    options, bits = Quantization(seed=request.seed), WeightBits(seed=request.seed)
    kinds = frozenset(each.kind for each in targets_of(request.target)) if request.target is not None else frozenset()
    if request.precision == INTEGERS:
        return whole(model, source, options)
    if request.precision == FOUR_BITS:
        if _OF_A_PROGRAM.intersection(kinds):
            raise TargetError(
                f"--precision {FOUR_BITS} makes the file smaller, not a program on a control unit, which computes with "
                f"the weights as they are: give a target of bytes, or --precision {INTEGERS}"
            )
        return in_four_bits(model, source, bits)
    loss, allowed = _allowed(model, samples, demand)
    most = _PART * allowed

    def harmless(form: Form) -> Form | None:
        """Return a form in which the original loses little enough, else None."""
        return form if loss(form(model)) <= most else None

    if _OF_A_PROGRAM.intersection(kinds):
        return _possible(lambda: harmless(whole(model, source, options))) or _possible(lambda: harmless(Halves()))
    if _OF_THE_FILE in kinds:
        narrow = _possible(lambda: narrowest(model, source, bits, loss, _PART_OF_BITS * allowed))
        return narrow or _possible(lambda: harmless(Halves(storage_only=True)))
    setting = Setting(request.latency_batch, request.latency_threads, request.latency_provider)
    probe = LatencyProbe(comb(model, request.input_shapes), setting)
    return _possible(lambda: fastest(probe, source, options, loss=loss, most=most))


def _possible(make: Callable[[], Form | None]) -> Form | None:
    """Return a form, None if the model cannot be converted to it or its outputs cannot be compared."""
    with suppress(UnsupportedError, TargetError):
        return make()
    return None


def _allowed(model: Model, samples: Samples, demand: Demand) -> tuple[Callable[[Model], float], float]:
    """Return what measures the loss by the conversion of the original, and the largest of the whole run."""
    if samples.choosing is None:
        return lambda _: 0.0, 0.0
    usual = USUAL_LOSS["labels" if samples.has_labels else "original"]
    return demand.loss(model, samples), usual if demand.max_loss is None else demand.max_loss


def as_deployed(request: Compress, form: Form | None, model: Model) -> Compress:
    """Return the request with the targets counted in the form in which the result is deployed.

    Those of flash and RAM are parts of what the original takes in that form, those of bytes of its file as it is.
    Beside one of flash or RAM, a target of bytes counts the float file.
    """
    if form is None or request.deploy_as:
        return request
    asked = () if request.target is None else targets_of(request.target)
    kinds = {target.kind for target in asked}
    if not isinstance(form, InFewBits) and (_OF_THE_FILE not in kinds or _OF_A_PROGRAM.intersection(kinds)):
        return replace(request, deploy_as=HALF if isinstance(form, Halves) else INTEGERS)
    combed = comb(model, request.input_shapes)
    weights = Prices(combed, (_OF_THE_FILE,), stored_as=str(FewBits(form.mean))).full(_OF_THE_FILE)
    counted = replace(request, deploy_as=str(FewBits(form.mean, max(0.0, form.size_of(model) - weights))))
    if not asked:
        return counted
    size = float(model.size_bytes())
    each = [
        replace(target, amount=target.amount * size, unit="B")
        if target.kind == _OF_THE_FILE and target.is_fraction
        else target
        for target in asked
    ]
    return replace(counted, target=str(Targets(tuple(each))))


def timed_form(form: Form | None) -> Precision | Halves | None:
    """Return the form whose latency counts: weights that are only stored in one are computed once, and take no time."""
    if isinstance(form, InFewBits) or (isinstance(form, Halves) and form.storage_only):
        return None
    return form


def deployed(model: Model, form: Form, source: Source | None) -> Model:
    """Return a pruned model in its form, as `deploy` converts it: fitted to its own activations."""
    if isinstance(form, Precision):
        return converted_for(model, Deployment(int8=form.options), source).model
    if isinstance(form, Halves):
        return converted_for(model, Deployment(half=HALF, storage_only=form.storage_only), source).model
    return converted_for(model, Deployment(fold=form.is_folded, weights=form.options), source).model


def as_entry(request: Compress, form: Form | None) -> dict[str, Any]:
    """Return what was asked for and what was chosen, as an entry of the report."""
    if form is None:
        return {"asked": request.precision, "what": FLOAT, "file": None, "alone": None}
    alone = form.latency if request.precision == AUTO else None
    return {"asked": request.precision, "what": form.what, "file": request.output.name, "alone": alone}


def notes(request: Compress, form: Form | None) -> list[str]:
    """Return what was chosen, in a sentence; empty if no other number format was asked for."""
    if request.precision == FLOAT:
        return []
    if form is None:
        why = "they are of no use here, lose too much, what they lose cannot be measured, or the model has them already"
        return [f"numbers of fewer bits are not used: {why}"]
    return [f"{request.output.name} has {form.what}, and is made from {float_place(request.output).name}"]


def conversion(request: Compress, form: Form) -> Deploy:
    """Return the request that converts the pruned float model of a run, which can be repeated without the run."""
    how: dict[str, Any]
    if isinstance(form, Precision):
        how = {"int8": True, "float_nodes": form.options.float_nodes}
    elif isinstance(form, Halves):
        how = {"half": HALF, "storage_only": form.storage_only}
    else:
        how = {"weight_bits": form.options.bits, "wide": form.options.wide, "fold": form.is_folded}
    return Deploy(
        model=float_place(request.output),
        output=request.output,
        data=request.data,
        images=request.images,
        seed=request.seed,
        weights=request.weights,
        force=request.force,
        custom_ops=request.custom_ops,
        log_level=request.log_level,
        **how,
    )


def without_conversion(request: Compress) -> Compress:
    """Return the request that only prunes, and writes what `conversion` reads."""
    return replace(request, precision=FLOAT, output=float_place(request.output))
