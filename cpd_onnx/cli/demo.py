"""The embedded example: comb, prune, repair, distill, verify, with an unpruned control and random pruning beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from cpd_onnx.algebra.keep import Kept
from cpd_onnx.channels.costs import CostModel, Costs
from cpd_onnx.data.metrics import open_session
from cpd_onnx.data.metrics import run as run_session
from cpd_onnx.data.sources import LABELS, ArraySource, open_source
from cpd_onnx.errors import ModelError
from cpd_onnx.io.files import require_free
from cpd_onnx.ir.model import Model, load
from cpd_onnx.passes.allocate import Allocate, target_options
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
_SECONDS = 2.0
"""For which the files are timed for the report."""
_FILES = ("digits.onnx", "digits_pruned.onnx", "digits_pruned.onnx.plan.json")
_RECIPE: dict[str, Any] = {"batch_size": _BATCH, "lr": 3e-3, "shift": 1, "threads": 1}


@dataclass(frozen=True, eq=False)
class _Variant:
    """A model of the table."""

    name: str
    model: Model
    costs: Costs
    accuracy: float


def run(request: Demo, out: Path, observer: Callable[[str], None]) -> dict[str, Any]:
    """Compress the embedded digits network: pruned, repaired and, where there is torch, distilled.

    Accuracies are those of the last epoch, on images that were not trained on. `report` of what is given back is the
    content of a report, with latency, memory and operators measured on the files that were written to `out`.

    Raises TargetError if the target cannot be met, ModelError if a file is in the way.
    """
    started = time.perf_counter()
    kind, fraction = request.target
    target = target_options(kind, fraction)
    _prepare(out, overwrite=request.force)
    with resources.as_file(resources.files("cpd_onnx.models")) as folder:
        model = load(folder / "digits.onnx")
        train, test = (_digits(folder / f"digits_{part}.npz", model) for part in ("train", "test"))
    unlabelled = ArraySource({name: array for name, array in train.arrays.items() if name != LABELS})
    is_trained = defaults.can_train()
    observer("comb, prune, repair" + (", distill" if is_trained else ""))
    training = {"epochs": request.epochs, **_RECIPE} if is_trained else False
    made = compressed(model, unlabelled, train=training, seed=request.seed, **target)
    chance = _at_random(model, request)
    by_chance = (chance.model, chance.need("allocation", "allocate").after)
    costs = made.state.need("allocation", "prune").after
    untrained = made.untrained if made.untrained is not None else made.state.model
    variants = [
        _variant("the original", (model, _costs(model)), test),
        _variant("pruned and repaired", (untrained, costs), test),
        _variant("random channels", by_chance, test),
    ]
    if is_trained:
        variants.append(_variant("pruned, repaired, distilled", (made.state.model, costs), test))
        students = {"random channels, distilled": by_chance, "the original, trained on": (model, variants[0].costs)}
        variants += _trained(model, students, (unlabelled, test), request, observer)
    ours = variants[3] if is_trained else variants[1]
    observer("latency")
    seconds = latency_ratio([v.model for v in variants], _feed(model, test), threads=1)
    found = made.found
    content: dict[str, Any] = {
        "settings": {"kind": kind, "fraction": fraction, "epochs": request.epochs, "seed": request.seed},
        "rows": [_row(variant, taken) for variant, taken in zip(variants, seconds, strict=True)],
        "latency": {
            "batch": _BATCH,
            "threads": 1,
            "before_ms": 1e3 * seconds[0],
            "after_ms": 1e3 * seconds[variants.index(ours)],
        },
        "verification": report.comparison(found.comparison),
        "trained_weights": len(found.trained),
        "test_images": test.count,
        "torch": is_trained,
    }
    timed = _save(out, made, _feed(model, test))
    content["files"] = str(out)
    content["report"] = _report(made, variants, timed, request, test.count)
    return content | {"seconds": time.perf_counter() - started}


def _report(
    made: compression.Compressed, variants: Sequence[_Variant], timed: Bench, request: Demo, samples: int
) -> dict[str, Any]:
    """The content of the report; the controls are told in its notes."""
    scores = {variant.name: variant.accuracy for variant in variants}
    names = {
        "the original": "original",
        "pruned and repaired": "pruned and repaired",
        "pruned, repaired, distilled": "distilled",
    }
    values = {short: scores.pop(name) for name, short in names.items() if name in scores}
    content = compression.content(
        made,
        bench=timed,
        accuracy={"metric": "top1", "on": "labels", "samples": samples, "values": values},
        bytes={"before": len(variants[0].model.serialize()), "after": len(made.state.model.serialize())},
        provenance=manifest.provenance([], request.seed),
    )
    content["notes"] += [f"control: {name}: {100 * score:.2f} %" for name, score in scores.items()]
    return content


def table(content: dict[str, Any]) -> Table:
    """Accuracy and costs of each variant."""
    title = f"Handwritten digits, {content['test_images']} test images"
    made = report.table_of(title, "", "accuracy", "MACs", "parameters", "file", "latency")
    for row in content["rows"]:
        costs = (count(row["macs"]), count(row["params"]), f"{count(row['bytes'])}B")
        made.add_row(row["name"], f"{100 * row['accuracy']:.2f} %", *costs, f"{row['latency_ms']:.2f} ms")
    return made


def lines(content: dict[str, Any]) -> list[str]:
    """What else there is to say."""
    latency = content["latency"]
    ratio = latency["before_ms"] / latency["after_ms"]
    said = [
        f"{ratio:.2f} times faster (onnxruntime, batch {latency['batch']}, one thread, interleaved, median)",
        report.proof_line(content["verification"]),
    ]
    if content["torch"]:
        said.append(
            f"distilled without labels, {content['settings']['epochs']} epochs: the values of "
            f"{content['trained_weights']} weights were trained, the file still has the proven structure"
        )
    else:
        said.append("not trained: pip install 'cpd-onnx[torch]' to see distillation bring accuracy back")
    return [*said, f"{content['seconds']:.0f} s in all"]


def _prepare(out: Path, *, overwrite: bool) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot make folder {out}: {error.strerror}") from error
    for name in _FILES:
        require_free(out / name, overwrite=overwrite)


def _save(out: Path, made: compression.Compressed, feed: Mapping[str, Any]) -> Bench:
    """Write the files, and time both."""
    for name, each in zip(_FILES, (made.state.original, made.state.model), strict=False):
        each.save(out / name, overwrite=True)
    made.state.need("plan", "prune").save(out / _FILES[2], overwrite=True)
    return bench([out / name for name in _FILES[:2]], settings=[Setting(_BATCH, 1)], seconds=_SECONDS, feed=feed)


def _digits(path: Path, model: Model) -> ArraySource:
    source = open_source(path, model.proto)
    assert isinstance(source, ArraySource)
    return source


def _feed(model: Model, source: ArraySource) -> dict[str, Any]:
    batch = next(iter(source.batches(_BATCH)))
    return {info.name: batch[info.name] for info in model.graph.input if info.name in batch}


def _at_random(model: Model, request: Demo) -> State:
    """Channels by chance, nothing repaired."""
    allocate = Allocate(**target_options(*request.target))
    return run_passes([Comb(), Score("random", request.seed), allocate, Prune(), Verify()], model)


def _costs(model: Model) -> Costs:
    combed = run_passes([Comb()], model).need("combed", "comb")
    return CostModel(combed).total(Kept(combed.atoms))


def _variant(name: str, made: tuple[Model, Costs], test: ArraySource) -> _Variant:
    model, costs = made
    session = open_session(model.complete_proto())
    right = [run_session(session, batch)[0].argmax(1) == batch[LABELS] for batch in test.batches(_BATCH)]
    # Counted here: the demo works without torch.
    return _Variant(name, model, costs, float(np.concatenate(right).mean()))


def _row(variant: _Variant, seconds: float) -> dict[str, Any]:
    sizes = {"macs": variant.costs.macs, "params": variant.costs.params, "bytes": len(variant.model.serialize())}
    return {"name": variant.name, "accuracy": variant.accuracy, **sizes, "latency_ms": 1e3 * seconds}


def _trained(
    teacher: Model,
    students: dict[str, tuple[Model, Costs]],
    data: tuple[ArraySource, ArraySource],
    request: Demo,
    observer: Callable[[str], None],
) -> list[_Variant]:
    """The students after training against the teacher, all with the same recipe and without labels."""
    from cpd_onnx.passes import distill

    unlabelled, test = data
    options = distill.DistillOptions(epochs=request.epochs, seed=request.seed, **_RECIPE)
    variants = []
    for name, (student, costs) in students.items():
        observer(f"distill: {name}")
        result = distill.distill(teacher.complete_proto(), student.complete_proto(), unlabelled, options)
        variants.append(_variant(name, (distill.trained(student, result), costs), test))
    return variants
