"""Sweep: compress a model to several targets in one run, and compare the results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from cpd_onnx.budget.targets import AnyTargets, Targets, targets_of
from cpd_onnx.channels.combing import comb
from cpd_onnx.data.metrics import lower_is_better
from cpd_onnx.data.sources import Source
from cpd_onnx.errors import CpdError, DataError, TargetError
from cpd_onnx.io import progress
from cpd_onnx.io.files import commit_together, locked_folder
from cpd_onnx.ir.model import Model
from cpd_onnx.report import figures as plots
from cpd_onnx.report import manifest
from cpd_onnx.report import tables as report
from cpd_onnx.report.verdict import verdict, verdict_of_many
from cpd_onnx.rewrite.plan import load_plan, make_plan, nested
from cpd_onnx.runtime.bench import Bench
from cpd_onnx.runtime.processes import in_worker
from cpd_onnx.runtime.threads import processors
from cpd_onnx.scores.registry import find_score_function, score
from cpd_onnx.workflow import compress as compression
from cpd_onnx.workflow import recipe
from cpd_onnx.workflow.compress_files import can_draw, compress, page_kinds, timed, write_page
from cpd_onnx.workflow.places import (
    executor_of,
    plan_path_of,
    read_model,
    require_apart,
    require_outputs,
    source_of,
    write_json,
)
from cpd_onnx.workflow.quality.checks import checked_samples
from cpd_onnx.workflow.quality.samples import samples_of, to_fit
from cpd_onnx.workflow.requests import QUIET, Compress, Observer, Sweep, ignore

_SECONDS = 2.0
"""Seconds for which each model is timed, interleaved with the others; a heuristic."""


@dataclass(frozen=True)
class SweepPoint:
    """One model of a sweep.

    Attributes:
        name: Target of the model, such as "macs=0.5".
        file: Path of the model.
        quality: Metric of the model; None if it was not measured.
        before: Metric before training; None if it was not trained or not measured.
        macs, params: Fractions of the original's that remain.
        bytes: Size of the file, in bytes.
        ms, ratio: Median latency in milliseconds, and as a fraction of the original's.
        picked: Whether the model is the fastest within the allowed loss.
        agreement: How often it answers like the original; None if that was not measured.
        verdict: Its verdict, see `report.verdict`; None for the original.
    """

    name: str
    file: Path
    quality: float | None
    before: float | None
    macs: float
    params: float
    bytes: int
    ms: float = 0.0
    ratio: float = 0.0
    picked: bool = False
    agreement: float | None = None
    verdict: Mapping[str, Any] | None = None

    def answer(self, question: str) -> str:
        """Return the answer of the verdict to a question; empty without one."""
        entries = (self.verdict or {}).get("answers") or ()
        return next((str(entry["answer"]) for entry in entries if entry["question"] == question), "")

    def as_json(self) -> dict[str, Any]:
        """Return the point as an entry of the report."""
        return {
            "name": self.name, "file": self.file.name, "ms": self.ms, "ratio": self.ratio, "accuracy": self.quality,
            "untrained": self.before, "macs": self.macs, "params": self.params, "bytes": self.bytes,
            "picked": self.picked,
        } | ({} if self.verdict is None else {"verdict": dict(self.verdict)})  # fmt: skip  # a table


def sweep(request: Sweep, observer: Observer = ignore) -> dict[str, Any]:
    """Choose channels for each target by the same scores, compress in parallel, and time the models interleaved.

    Each model is written with its plan, recipe and manifest as soon as it is finished, and the report at the end.
    """
    folder, targets = request.output, _targets(request.targets)
    files = {name: folder / f"{name}.onnx" for name in targets}
    pages = pages_of(request)
    (folder / "plans").mkdir(parents=True, exist_ok=True)
    beside = [
        *nested_plan_of(request),
        *(folder / "plans" / f"{name}.json" for name in targets),
        folder / "sweep.recipe.toml",
    ]
    written = require_outputs(request, *files.values(), *pages, *beside)
    executor = executor_of(request.executor, _most_jobs(request))
    model = read_model(request.model, request.input_shapes, request.free_io)
    require_apart(written, model)
    source, labelled = (source_of(data, model, request) for data in (request.data, request.eval))
    if source is None and not request.blind:
        raise DataError("without data, channels are chosen on generated inputs: give --data, or --blind for that")
    checked = checked_samples(request, model, source)
    source = samples_of(source, labelled, request.hold_out, is_search=False).fitted
    is_measured = next(iter(targets.values())).has_latency and request.cost_table is None
    progress.announce("comb", "score", *(["cost table"] if is_measured else []), "models", "latency", "write")
    observer("comb", 0, None)
    jobs = _jobs(request, files, _planned(request, model, source, targets))
    reports: list[dict[str, Any]] = []
    with executor:
        observer("models", 0, len(targets))
        for content in executor.map(_one, jobs):
            reports.append(content)
            observer("models", len(reports), len(targets))
    found = timed(request, source, model, files.values(), _SECONDS * (1 + len(files)))
    content = _content(request, _points(request, files, reports, found), reports, found) | {"preflight": checked}
    with progress.step("write"), locked_folder(folder), commit_together():
        for path in nested_plan_of(request):
            nested({name: load_plan(plan_path_of(file)) for name, file in files.items()}).save(
                path, overwrite=request.force
            )
        for path in pages:
            if path.suffix == ".svg":
                _draw(content, path, overwrite=request.force)
            else:
                write_page(path, content)
        write_json(request, content)
    return content


def pages_of(request: Sweep) -> list[Path]:
    """Return the paths of the report in its formats."""
    return [request.output / f"sweep.{kind}" for kind in (*page_kinds(), *(["svg"] if can_draw() else []))]


def nested_plan_of(request: Sweep) -> list[Path]:
    """Return the path of the plan of all models, if they are nested; else an empty list."""
    return [request.output / "sweep.plan.json"] if request.nested else []


def _targets(requested: Sequence[AnyTargets]) -> dict[str, Targets]:
    """Return the targets by the name of their file, largest first."""
    found = {str(targets): targets for targets in map(targets_of, requested)}
    if len({(targets.each[0].kind, targets.each[0].is_fraction) for targets in found.values()}) > 1:
        raise TargetError("all targets of a sweep must be of one kind, as in --targets latency=0.7,0.5,0.3")
    return dict(sorted(found.items(), key=lambda pair: -pair[1].each[0].amount * pair[1].each[0].scale))


def _planned(request: Sweep, model: Model, source: Source | None, targets: Mapping[str, Targets]) -> dict[str, Path]:
    """Write a plan for each target and return their paths; combing, scoring and measuring latency happen once."""
    combed = comb(model, request.input_shapes)
    first: Mapping[str, Any] = {"target": next(iter(targets.values()))}
    source = to_fit(source, model, request)
    step = compression.step_of(request, first, None, source)
    kind = step.score
    scores = score(
        combed, kind, samples=request.samples, data=source, labels=request.score_labels, seed=request.seed,
        is_repaired=step.repair,
    )  # fmt: skip  # the fields in order
    chooser = step.chooser(combed)
    place = request.output / "plans"
    paths = {}
    for name, wanted in targets.items():
        chosen = chooser.aiming(wanted)(combed, scores, is_loss=find_score_function(kind).is_loss)
        if request.nested:
            chooser = chooser.within(combed, chosen)
        words = dict(chosen.budget) | {"score": kind, "seed": request.seed}
        costs = {"before": chosen.before, "after": chosen.after}
        paths[name] = place / f"{name}.json"
        plan = make_plan(combed, chosen.removed, budget=words, **costs)
        plan.save(paths[name], overwrite=request.force)
    return paths


def _jobs(request: Sweep, files: Mapping[str, Path], plans: Mapping[str, Path]) -> list[Compress]:
    """Return a request for each model, in order, and write the recipe of all."""
    recipe.write(request.output / "sweep.recipe.toml", request, overwrite=request.force, owner=Compress)
    shared = {entry.name: getattr(request, entry.name) for entry in fields(Compress) if hasattr(request, entry.name)}
    if _most_jobs(request) > 1 and not request.threads:
        shared["threads"] = 1  # parallel jobs would compete for cores
    shared |= {"report": False, "json": None, "recipe": None, "max_loss": None, "check_speed": False}
    shared["free_io"] = ()  # the plans name them, and one configuration of the caches cannot serve several models
    return [
        Compress(**shared | {"target": target, "output": files[name], "like": plans[name]})
        for name, target in _targets(request.targets).items()
    ]


def _most_jobs(request: Sweep) -> int:
    return request.jobs or min(processors(), len(request.targets))


def _one(request: Compress) -> dict[str, Any]:
    """Compress one model, in a worker process that shares the folders."""
    with in_worker(request.custom_ops, is_quiet=request.log_level == QUIET):
        content = compress(request, is_checked=True)
    assert content is not None
    return content


def _points(
    request: Sweep, files: Mapping[str, Path], reports: Sequence[Mapping[str, Any]], found: Bench
) -> list[SweepPoint]:
    points = []
    for (name, file), content, timing in zip(files.items(), reports, found.timings[1:], strict=True):
        values = list((content["accuracy"] or {"values": {}})["values"].values())
        macs, params = (content["after"][kind] / content["before"][kind] for kind in ("macs", "params"))
        score, before = values[-1] if values else None, values[1] if len(values) > 2 else None
        costs = {"macs": macs, "params": params, "bytes": content["bytes"]["after"]}
        timings = {"timings": [asdict(found.timings[0]), asdict(timing)]}
        asked = {"max_loss": request.max_loss, "is_unbounded": request.max_loss == math.inf}
        judged = verdict({**content, "bench": timings, "checks_speed": request.check_speed, **asked})
        compared = (content["agreement"] or {}).get("value")
        points.append(
            SweepPoint(
                name, file, score, before, **costs, ms=timing.p50, ratio=timing.ratio, agreement=compared,
                verdict=judged,
            )
        )  # fmt: skip  # what and how
    best = _picked(points, reports[0]["accuracy"], request.max_loss)
    return [replace(point, picked=point is best) for point in points]


def _picked(
    points: Sequence[SweepPoint], accuracy: Mapping[str, Any] | None, max_loss: float | None
) -> SweepPoint | None:
    """Return the fastest model that loses at most `max_loss` of the original's metric; None without one."""
    if max_loss is None:
        return None
    if accuracy is None:
        raise CpdError("--max-loss needs a metric: give --eval, or --data to compare outputs with the original's")
    if accuracy["on"] != "labels":
        near = [point for point in points if point.agreement is not None and 1 - point.agreement <= max_loss]
        near = [point for point in near if point.answer("as good") != "no"]
        return min(near, key=lambda point: point.ms, default=None)
    whole = accuracy["values"]["original"]
    sign = -1.0 if lower_is_better(accuracy) else 1.0
    good = [point for point in points if point.quality is not None and sign * (whole - point.quality) <= max_loss]
    return min(good, key=lambda point: point.ms, default=None)


def _content(
    request: Sweep, points: Sequence[SweepPoint], reports: Sequence[Mapping[str, Any]], found: Bench
) -> dict[str, Any]:
    """Return the report of the sweep."""
    first = reports[0]
    accuracy = first["accuracy"] or {"metric": None, "on": None, "values": {"original": None}}
    whole = accuracy["values"]["original"]
    costs = {"macs": 1.0, "params": 1.0, "bytes": first["bytes"]["before"]}
    dense = SweepPoint("the original", request.model, whole, None, **costs, ms=found.timings[0].p50, ratio=1.0)
    pairs = zip(points, reports, strict=True)
    picked = next((point.name for point in points if point.picked), None)
    verdicts = {point.name: point.verdict for point in points if point.verdict is not None}
    return {
        "format": report.REPORT_FORMAT,
        "version": report.REPORT_VERSION,
        "title": request.model.name,
        "source": first["source"],
        "sweep": {
            **{key: accuracy[key] for key in ("metric", "lower_is_better", "on") if key in accuracy},
            "points": [
                dense.as_json(),
                *(_judged(one) | point.as_json() for point, one in zip(points, reports, strict=True)),
            ],
        },
        "verdict": verdict_of_many(verdicts, picked, request.max_loss),
        "bench": found.as_json(),
        "notes": [f"{point.name}: {note}" for point, content in pairs for note in content["notes"]],
        "advice": compression.advice(data=request.data, is_blind=request.blind, has_labels=request.eval is not None),
        "provenance": manifest.provenance([point.file for point in points], request.seed),
    }


def _judged(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the report of one model says about its worth: its verdict, its agreement and that of its proof."""
    proof = content["verification"]
    verdicts = {key: content[key] for key in ("verdict", "agreement") if content.get(key)}
    return verdicts | {"verification": {key: proof[key] for key in ("verdict", "passed") if key in proof}}


def _draw(content: Mapping[str, Any], path: Path, *, overwrite: bool) -> None:
    """Draw the metric against the latency, if the metric was measured."""
    found = content["sweep"]
    points = [point for point in found["points"] if point["accuracy"] is not None]
    if points:
        first = found["points"][0]  # the original
        choices = [plots.Choice(p["name"], p["ms"], p["accuracy"], p["picked"], p is first) for p in points]
        less = lower_is_better(found)
        plots.tradeoff(choices, found["metric"], is_less_better=less).write(path, overwrite=overwrite)
