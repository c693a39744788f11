"""The embedded example: comb, prune, distill, verify, with an unpruned control and random pruning beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from importlib import resources, util
from pathlib import Path
from typing import Any

from rich.table import Table

from cpd_onnx import report
from cpd_onnx.cost import CostModel
from cpd_onnx.data import ArraySource, open_source
from cpd_onnx.errors import ModelError
from cpd_onnx.graph import Model, load, require_free
from cpd_onnx.kept import Kept
from cpd_onnx.metrics import evaluate
from cpd_onnx.passes.allocate import Allocate
from cpd_onnx.passes.comb import Comb
from cpd_onnx.passes.prune import Prune
from cpd_onnx.passes.score import Score
from cpd_onnx.passes.verify import Verify, verify_files
from cpd_onnx.pipeline import Pass
from cpd_onnx.pipeline import run as run_passes
from cpd_onnx.runtime import latency_ratio
from cpd_onnx.state import State

SAY: Callable[[str], None] = lambda what: None  # noqa: E731  # a default that does nothing


def run(
    kind: str, fraction: float, *, epochs: int, out: Path | None = None, overwrite: bool = False,
    observer: Callable[[str], None] = SAY,
) -> dict[str, Any]:  # fmt: skip  # one line an option
    """Prune the embedded digits network and train it back.

    Accuracies are those after the last epoch, on images that were never trained on. Without torch the training is left
    out. Raises TargetError if the target cannot be met.
    """
    started = time.perf_counter()
    _prepare(out, overwrite=overwrite)
    folder = resources.files("cpd_onnx.models")
    with resources.as_file(folder.joinpath("digits.onnx")) as path:
        model = load(path)
        train, test = (_digits(path.parent / f"digits_{part}.npz", model) for part in ("train", "test"))
    rows: list[dict[str, Any]] = [_row("the original", model, model, test)]
    observer("comb, prune, verify")
    states = {score: _pruned(model, kind, fraction, score) for score in ("l2", "random")}
    for score, state in states.items():
        rows.append(_row(f"pruned ({score})", model, state.model, test, state))
    trained = util.find_spec("torch") is not None
    if trained:
        rows += _trained(model, states, train, test, epochs, observer)
    observer("latency")
    smaller = rows[-2]["model"] if trained else states["l2"].model
    seconds = latency_ratio([model, smaller], _feed(model, test), threads=1)
    found = verify_files(model, smaller, states["l2"].need("plan", "prune"))
    content = {
        "rows": [{k: v for k, v in row.items() if k != "model"} for row in rows],
        "epochs": epochs if trained else 0,
        "latency": {"before_ms": 1e3 * seconds[0], "after_ms": 1e3 * seconds[1], "batch": 64, "threads": 1},
        "verification": report.comparison(found.comparison)
        | {"is_replay": found.is_replay, "trained": len(found.trained)},
        "torch": trained,
        "seconds": time.perf_counter() - started,
    }
    if out is not None:
        _save(out, model, smaller, states["l2"])
        content["files"] = str(out)
    return content


def table(content: dict[str, Any]) -> Table:
    """Accuracy and costs of each variant."""
    made = Table("", "accuracy", "MACs", "parameters", "bytes", title="Handwritten digits, 797 test images")
    for column in range(1, 5):
        made.columns[column].justify = "right"
    for row in content["rows"]:
        numbers = (report.count(row["macs"]), report.count(row["params"]), report.count(row["bytes"]))
        made.add_row(row["name"], f"{100 * row['accuracy']:.2f} %", *numbers)
    return made


def lines(content: dict[str, Any]) -> list[str]:
    """What else there is to say."""
    latency = content["latency"]
    ratio = latency["before_ms"] / latency["after_ms"]
    said = [
        f"latency: {latency['before_ms']:.2f} -> {latency['after_ms']:.2f} ms, {ratio:.2f} times faster "
        f"(onnxruntime, batch {latency['batch']}, one thread, interleaved, median)",
        report.proof_line(content["verification"]),
    ]
    if not content["torch"]:
        said.append(
            "not trained: install torch (pip install 'cpd-onnx[torch]') to see distillation bring accuracy back"
        )
    return [*said, f"{content['seconds']:.0f} s in all"]


def _prepare(out: Path | None, *, overwrite: bool) -> None:
    if out is None:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"cannot make folder {out}: {error.strerror}") from error
    for name in _FILES:
        require_free(out / name, overwrite=overwrite)


_FILES = ("digits.onnx", "digits_pruned.onnx", "digits_pruned.onnx.plan.json")


def _save(out: Path, model: Model, smaller: Model, state: State) -> None:
    for name, each in zip(_FILES, (model, smaller), strict=False):
        each.save(out / name, overwrite=True)
    state.need("plan", "prune").save(out / _FILES[2], overwrite=True)


def _digits(path: Path, model: Model) -> ArraySource:
    source = open_source(path, model.proto)
    assert isinstance(source, ArraySource)
    return source


def _feed(model: Model, source: ArraySource) -> dict[str, Any]:
    batch = next(iter(source.batches(64)))
    return {info.name: batch[info.name] for info in model.graph.input if info.name in batch}


def _pruned(model: Model, kind: str, fraction: float, score: str) -> State:
    amounts: dict[str, Any] = {kind: fraction}
    allocation = replace(Allocate(), **amounts)
    steps: list[Pass] = [Comb(), Score(score), allocation, Prune(), Verify()]
    return run_passes(steps, model)


def _row(name: str, original: Model, model: Model, test: ArraySource, state: State | None = None) -> dict[str, Any]:
    accuracy = evaluate(model.complete_proto(), test, "top1")
    costs = state.need("allocation", "allocate").after if state is not None else _costs(original)
    sizes = {"macs": costs.macs, "params": costs.params, "bytes": len(model.serialize())}
    return {"name": name, "accuracy": accuracy, **sizes, "model": model}


def _costs(model: Model) -> Any:
    combed = run_passes([Comb()], model).need("combed", "comb")
    return CostModel(combed).total(Kept(combed.atoms))


def _trained(
    model: Model,
    states: dict[str, State],
    train: ArraySource,
    test: ArraySource,
    epochs: int,
    observer: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The control, the random choice and ours, all with the same recipe and without labels; ours is last but one."""
    from cpd_onnx.passes import distill

    options = distill.DistillOptions(epochs=epochs, batch_size=64, lr=3e-3, batch_norm="train", shift=1)
    unlabelled = ArraySource({name: array for name, array in train.arrays.items() if name != "labels"})
    rows = []
    for name, student, state in (
        ("the original, trained on", model, None),
        ("pruned (l2), distilled", states["l2"].model, states["l2"]),
        ("pruned (random), distilled", states["random"].model, states["random"]),
    ):
        observer(f"distill: {name}")
        result = distill.distill(model.complete_proto(), student.complete_proto(), unlabelled, options)
        rows.append(_row(name, model, distill.trained(student, result), test, state))
    return rows
