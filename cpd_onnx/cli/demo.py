"""The embedded example: comb, prune, repair, distill and verify, against unpruned and randomly pruned controls."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.targets import targets_of
from cpd_onnx.channels.costs import CostModel, Costs
from cpd_onnx.data.metrics import open_session
from cpd_onnx.data.metrics import run as run_session
from cpd_onnx.data.sources import LABELS, ArraySource, open_source
from cpd_onnx.errors import ModelError
from cpd_onnx.io.files import require_free, write_atomically
from cpd_onnx.io.progress import announce, step
from cpd_onnx.ir.model import Model, load
from cpd_onnx.passes.allocate import Allocate
from cpd_onnx.passes.comb import Comb
from cpd_onnx.passes.prune import Prune
from cpd_onnx.passes.score import Score
from cpd_onnx.passes.verify import Verify
from cpd_onnx.pipeline.pipeline import run as run_passes
from cpd_onnx.pipeline.state import State
from cpd_onnx.report import manifest
from cpd_onnx.report import tables as report
from cpd_onnx.runtime.bench import Bench, Setting, bench
from cpd_onnx.runtime.sessions import latency_ratio
from cpd_onnx.summary import count
from cpd_onnx.workflow import compress as compression
from cpd_onnx.workflow import defaults
from cpd_onnx.workflow.api import compressed
from cpd_onnx.workflow.requests import Demo

_BATCH = 64
"""Batch size of the training and of the latency measurement."""
_SECONDS = 2.0
"""Seconds for which each file is timed for the report; a heuristic."""
_FILES = ("digits.onnx", "digits_pruned.onnx", "digits_pruned.onnx.plan.json")
_DATA = ("digits_train.npz", "digits_test.npz")
_TRAINED_CONTROLS = ("random channels, distilled", "the original, trained on")
"""Names of the controls that are trained like the pruned model."""
_RECIPE: dict[str, Any] = {"batch_size": _BATCH, "lr": 3e-3, "shift": 1, "threads": 1, "compare": "outputs"}
"""Options of the training of all students; the controls, which have no plan, have no features to compare."""


@dataclass(frozen=True, eq=False)
class _Variant:
    """A row of the table: a model with its costs and its accuracy."""

    name: str
    model: Model
    costs: Costs
    accuracy: float


def run(request: Demo, out: Path) -> dict[str, Any]:
    """Compress the embedded digits network: prune and repair it and, if torch is installed, distill it.

    Accuracies are those after the last epoch, on the test images. The entry `report` of the result is the content of a
    report, with latency, memory and operators measured on the files that were written to `out`. The original and its
    data are written as well, so that other commands can be tried on them.

    Raises TargetError if the target cannot be met, ModelError if a file already exists.
    """
    started = time.perf_counter()
    first = targets_of(request.target).each[0]
    _prepare(out, overwrite=request.force)
    with resources.as_file(resources.files("cpd_onnx.models")) as folder:
        model = load(folder / "digits.onnx")
        train, test = (_digits(folder / name, model) for name in _DATA)
        data = {name: (folder / name).read_bytes() for name in _DATA}
    unlabelled = ArraySource({name: array for name, array in train.arrays.items() if name != LABELS})
    is_trained = defaults.can_train()
    announce(*_steps(is_trained=is_trained))
    training = {"epochs": request.epochs, **_RECIPE} if is_trained else False
    outcome = compressed(model, unlabelled, train=training, seed=request.seed, target=request.target)
    control = _randomly_pruned(model, request)
    random_channels = (control.model, control.need("allocation", "allocate").after)
    costs = outcome.state.need("allocation", "prune").after
    untrained = outcome.untrained if outcome.untrained is not None else outcome.state.model
    variants = [
        _variant("the original", (model, _costs(model)), test),
        _variant("pruned and repaired", (untrained, costs), test),
        _variant("random channels", random_channels, test),
    ]
    if is_trained:
        variants.append(_variant("pruned, repaired, distilled", (outcome.state.model, costs), test))
        students = dict(zip(_TRAINED_CONTROLS, (random_channels, (model, variants[0].costs)), strict=True))
        variants += _trained(model, students, (unlabelled, test), request)
    result = variants[3] if is_trained else variants[1]
    with step("latency"):
        seconds = latency_ratio([v.model for v in variants], _feed(model, test), threads=1)
    found = outcome.found
    content: dict[str, Any] = {
        "settings": {
            "kind": first.kind,
            "fraction": first.amount,
            "epochs": request.epochs,
            "seed": request.seed,
        },
        "rows": [_row(variant, taken) for variant, taken in zip(variants, seconds, strict=True)],
        "latency": {
            "batch": _BATCH,
            "threads": 1,
            "before_ms": 1e3 * seconds[0],
            "after_ms": 1e3 * seconds[variants.index(result)],
        },
        "verification": report.comparison(found.comparison),
        "trained_weights": len(found.trained),
        "test_images": test.count,
        "torch": is_trained,
    }
    for name, stored in data.items():
        write_atomically(out / name, stored)
    timed = _save(out, outcome, _feed(model, test))
    content["files"] = str(out)
    content["report"] = _report(outcome, variants, timed, request, test.count)
    return content | {"seconds": time.perf_counter() - started}


def _steps(*, is_trained: bool) -> Iterator[str]:
    """Yield the names of the steps, for the progress."""
    yield from ("score", "prune", "repair", *(["distill"] if is_trained else []), "verify")
    yield from _TRAINED_CONTROLS if is_trained else ()
    yield "latency"


def _report(
    outcome: compression.Compressed, variants: Sequence[_Variant], timed: Bench, request: Demo, samples: int
) -> dict[str, Any]:
    """Return the content of the report; its notes list the controls."""
    scores = {variant.name: variant.accuracy for variant in variants}
    names = {
        "the original": "original",
        "pruned and repaired": "pruned and repaired",
        "pruned, repaired, distilled": "distilled",
    }
    values = {short: scores.pop(name) for name, short in names.items() if name in scores}
    content = compression.content(
        outcome,
        bench=timed,
        accuracy={"metric": "top1", "on": "labels", "samples": samples, "values": values},
        bytes={"before": len(variants[0].model.serialize()), "after": len(outcome.state.model.serialize())},
        provenance=manifest.provenance([], request.seed),
    )
    content["notes"] += [f"control: {name}: {100 * score:.2f} %" for name, score in scores.items()]
    return content


def table(content: dict[str, Any]) -> Table:
    """Return a table of the accuracy and the costs of each variant."""
    title = f"Handwritten digits, {content['test_images']} test images"
    result = report.table_of(title, "", "accuracy", "MACs", "parameters", "file", "latency")
    for row in content["rows"]:
        costs = (count(row["macs"]), count(row["params"]), f"{count(row['bytes'])}B")
        result.add_row(row["name"], f"{100 * row['accuracy']:.2f} %", *costs, f"{row['latency_ms']:.2f} ms")
    return result


def lines(content: dict[str, Any]) -> list[str]:
    """Return the lines that follow the table: latency, proof, training and duration."""
    latency = content["latency"]
    ratio = latency["before_ms"] / latency["after_ms"]
    result = [
        f"{ratio:.2f} times faster (onnxruntime, batch {latency['batch']}, one thread, interleaved, median)",
        report.proof_line(content["verification"]),
    ]
    if content["torch"]:
        epochs = content["settings"]["epochs"]
        result.append(
            f"distilled without labels, {epochs} epoch{'s' if epochs != 1 else ''}: the values of "
            f"{content['trained_weights']} weights were trained, the proven structure is unchanged"
        )
    else:
        result.append("not trained: distillation, which recovers accuracy, needs pip install 'cpd-onnx[torch]'")
    return [*result, f"{content['seconds']:.0f} s in total"]


def _prepare(out: Path, *, overwrite: bool) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot create folder {out}: {error.strerror}") from error
    for name in (*_FILES, *_DATA):
        require_free(out / name, overwrite=overwrite)


def _save(out: Path, outcome: compression.Compressed, feed: Mapping[str, Any]) -> Bench:
    """Write the files, and measure the latency of both models."""
    for name, each in zip(_FILES, (outcome.state.original, outcome.state.model), strict=False):
        each.save(out / name, overwrite=True)
    outcome.state.need("plan", "prune").save(out / _FILES[2], overwrite=True)
    return bench([out / name for name in _FILES[:2]], settings=[Setting(_BATCH, 1)], seconds=_SECONDS, feed=feed)


def _digits(path: Path, model: Model) -> ArraySource:
    source = open_source(path, model.proto)
    assert isinstance(source, ArraySource)
    return source


def _feed(model: Model, source: ArraySource) -> dict[str, Any]:
    batch = next(iter(source.batches(_BATCH)))
    return {info.name: batch[info.name] for info in model.graph.input if info.name in batch}


def _randomly_pruned(model: Model, request: Demo) -> State:
    """Return the control: randomly chosen channels are removed, and nothing is repaired."""
    allocate = Allocate(target=request.target)
    return run_passes([Comb(), Score("random", request.seed), allocate, Prune(), Verify()], model)


def _costs(model: Model) -> Costs:
    combed = run_passes([Comb()], model).need("combed", "comb")
    return CostModel(combed).total(KeepMask(combed.atoms))


def _variant(name: str, model_and_costs: tuple[Model, Costs], test: ArraySource) -> _Variant:
    model, costs = model_and_costs
    session = open_session(model.complete_proto())
    right = [run_session(session, batch)[0].argmax(1) == batch[LABELS] for batch in test.batches(_BATCH)]
    # Computed here, because the demo also works without torch.
    return _Variant(name, model, costs, float(np.concatenate(right).mean()))


def _row(variant: _Variant, seconds: float) -> dict[str, Any]:
    sizes = {"macs": variant.costs.macs, "params": variant.costs.params, "bytes": len(variant.model.serialize())}
    return {"name": variant.name, "accuracy": variant.accuracy, **sizes, "latency_ms": 1e3 * seconds}


def _trained(
    teacher: Model,
    students: dict[str, tuple[Model, Costs]],
    data: tuple[ArraySource, ArraySource],
    request: Demo,
) -> list[_Variant]:
    """Return the students after distillation from the teacher, all with the same options and without labels."""
    from cpd_onnx.passes import distill

    unlabelled, test = data
    options = distill.DistillOptions(epochs=request.epochs, seed=request.seed, **_RECIPE)
    variants = []
    for name, (student, costs) in students.items():
        with step(name):
            result = distill.distill(teacher.complete_proto(), student.complete_proto(), unlabelled, options)
        variants.append(_variant(name, (distill.trained(student, result), costs), test))
    return variants
