"""Compress from file to file: write the model with its plan, recipe, report and manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import util
from pathlib import Path
from typing import Any

from cpd_onnx.data.metrics import OF_TWO_MODELS, check_metric, lower_is_better, metric_of
from cpd_onnx.data.sources import Source, calibration
from cpd_onnx.errors import CpdError, InconclusiveError, ModelError, ProofError, UnsupportedError
from cpd_onnx.io.files import commit_together, locked_folder, write_atomically
from cpd_onnx.ir.model import Model
from cpd_onnx.options import picked
from cpd_onnx.passes import sensitivity
from cpd_onnx.passes.allocate import target_options
from cpd_onnx.passes.iterate import Iterate, RunCache
from cpd_onnx.pipeline.state import State
from cpd_onnx.report import manifest
from cpd_onnx.report import tables as report
from cpd_onnx.rewrite.plan import load_plan
from cpd_onnx.runtime.bench import Bench, Setting, bench
from cpd_onnx.scores.registry import score
from cpd_onnx.training.options import DistillOptions
from cpd_onnx.workflow import compress as compression
from cpd_onnx.workflow import defaults, recipe
from cpd_onnx.workflow.distill import (
    checkpoint_of,
    is_first_process,
    noting_checkpoints,
    require_new_run,
    traces_of,
    watched_on,
)
from cpd_onnx.workflow.places import (
    beside,
    finite,
    objections,
    plan_path_of,
    read_model,
    recipe_path_of,
    require_apart,
    require_outputs,
    scored,
    source_of,
    write_both,
    write_json,
)
from cpd_onnx.workflow.requests import Compress, Compressing, Observer, ignore

_BENCH_SECONDS = 4.0
"""Seconds for which each model is timed; a heuristic."""
_SAMPLES = 256
"""Number of samples on which outputs are compared with the original's if there is no --eval; a heuristic."""
_SENSITIVITY = sensitivity.SensitivityOptions((0.5, 0.0), samples=32, repair=False)
"""Options of the sensitivity in the report: two widths of each group, without repair; a heuristic."""
_FEWER_SAMPLES = 8
"""Number of samples of the sensitivity where more take too long; a heuristic."""
_MOST_SECONDS = 60.0
"""Estimated seconds up to which the sensitivity is measured by default; a heuristic."""
_LEAST_SAVING = 0.6
"""Ratio of saved latency to saved MACs below which a note says that the latency is disappointing; a heuristic."""


@dataclass(frozen=True)
class Places:
    """Paths of all files that a run writes."""

    output: Path
    plan: Path
    recipe: Path
    manifest: Path
    pages: tuple[Path, ...]

    def all(self) -> tuple[Path, ...]:
        """Return all paths, the model first."""
        return (self.output, self.plan, self.recipe, self.manifest, *self.pages)


def places_of(request: Compress) -> Places:
    """Return the paths that a run writes."""
    output = request.output
    pages = tuple(beside(output, f"report.{kind}") for kind in (page_kinds() if request.report else ()))
    plan = request.plan or plan_path_of(output)
    return Places(output, plan, recipe_path_of(output), manifest.place_of(output), pages)


def can_draw() -> bool:
    """Return whether the libraries of the extra "report", which write pages and figures, are installed."""
    return all(util.find_spec(name) for name in ("jinja2", "matplotlib"))


def page_kinds() -> tuple[str, ...]:
    """Return the formats that a report can be written in, as endings of file names."""
    return ("json", "html", "md") if can_draw() else ("json",)


def compress(request: Compress, observer: Observer = ignore, *, called: str | None = None) -> dict[str, Any] | None:
    """Prune, repair, distill and prove a model, and write it with its plan, recipe, report and manifest.

    `called` is the recorded name of the model's file, if it has been renamed since. Returns the report, or None in all
    processes of a training run but the first.
    """
    started = time.perf_counter()
    places = places_of(request)
    written = require_outputs(request, *places.all())
    check_metric(request.metric)
    recipe.text(request)  # fails now, not at the end, if an option cannot be recorded
    given = None if request.like is None else load_plan(request.like)
    shapes = request.input_shapes or (given.input_shapes if given else {})
    model = read_model(request.model, request.input_shapes)
    require_apart(written, model)
    model.path = Path(called or request.model)
    source = source_of(request.data, model, request)
    step = _step(request, source)
    traces, cache = _checkpoints(request, step, model)
    resume = compression.ResumeState(given, cache if is_first_process() else None, traces, watched_on(request, model))
    with _keeping_checkpoints(step, cache, traces):
        made = _compressed(step, State(model, model, shapes, source), resume, request, observer)
        if not is_first_process():
            return None
        content = _reported(request, made, source) | {"rounds": step.rounds}
        with locked_folder(request.output.parent), commit_together():
            write_both(request, made.state.model, made.state.need("plan", step.name), places.plan)
            recipe.write(places.recipe, request, overwrite=request.force)
            content["bytes"] = {
                "before": report.size_of(model, request.model),
                "after": report.size_of(made.state.model, request.output),
            }
            _write_pages(
                request, places, content, dict(made.seconds) | {"all": round(time.perf_counter() - started, 2)}
            )
            write_json(request, content)
    _discard(step, cache, traces)
    return content


@contextlib.contextmanager
def _keeping_checkpoints(step: Iterate, cache: RunCache, traces: Any) -> Iterator[None]:
    """After an error in the block, keep the files that `--resume` can use, and name them; delete them if it cannot."""
    with noting_checkpoints(lambda: _unfinished(step, cache, traces)):
        try:
            yield
        except (ModelError, ProofError, InconclusiveError) as error:
            # A resumed run would fail again, except after an error of the disk; keep a finished training.
            is_worth_it = step.name == "interleave" and isinstance(error, InconclusiveError)
            if not isinstance(error.__cause__, OSError) and not is_worth_it:
                _discard(step, cache, traces)
            raise


def _compressed(
    step: Iterate, state: State, resume: compression.ResumeState, request: Compress, observer: Observer
) -> compression.Compressed:
    """Return the compressed model."""
    observer("comb, score, prune", 0, None)
    return compression.compress(
        step,
        state,
        resume,
        progress=lambda number, now: observer(
            f"round {number} of {step.rounds}, step {now.step}, loss {now.loss:.4f}", now.step, now.steps
        ),
        allow_inconclusive=request.allow_inconclusive,
    )


def _step(request: Compress, source: Source | None) -> Iterate:
    """Return the pass that compresses: with repair if there is data, and with training if there is torch as well."""
    has_data = source is not None
    trains = defaults.training(request.distill, has_data=has_data)
    training = vars(picked(DistillOptions, request)) if trains else None
    target = target_options(*request.target)
    return compression.step_of(request, target, training, has_data=has_data)


def _checkpoints(request: Compress, step: Iterate, model: Model) -> tuple[Any, RunCache]:
    """Return where the run writes its checkpoints; raises CpdError if those of an unfinished run would be lost."""
    place = checkpoint_of(request)
    identity = (model.sha256(), step, request.input_shapes, request.data, request.like)
    cache = RunCache(place, hashlib.sha256(repr(identity).encode()).hexdigest())
    traces = traces_of(request) if step.name == "interleave" else None
    require_new_run(request, *_unfinished(step, cache, traces))
    if not request.resume:
        cache.discard(step.rounds)
    return traces, cache


def _unfinished(step: Iterate, cache: RunCache, traces: Any) -> Iterator[Path]:
    """Yield the paths of the checkpoints of an unfinished run."""
    for number in range(1, step.rounds + 1):
        yield from cache.files(number)
        if traces is not None:
            from cpd_onnx.passes.interleave import of_round

            checkpoint = of_round(traces, number).checkpoint
            if checkpoint is not None:
                yield checkpoint


def _discard(step: Iterate, cache: RunCache, traces: Any) -> None:
    for path in _unfinished(step, cache, traces):
        path.unlink(missing_ok=True)


# Measurements of the result.


def _reported(request: Compress, made: compression.Compressed, source: Source | None) -> dict[str, Any]:
    """Return the report without the facts about the written files; its notes say what could not be measured."""
    small = made.state.model
    notes: list[str] = []
    found: Bench | None = None
    lost: dict[str, Any] | None = None
    if request.report:
        try:
            found = _bench_before_writing(request, made, source)
        except (CpdError, OSError) as error:
            notes.append(f"latency was not measured: {error}")
        lost = _sensitivity(request, made, source)
    content = compression.content(
        made, bench=found, accuracy=_accuracy(request, made, source), sensitivity=lost,
        advice=compression.advice(data=request.data, has_labels=request.eval is not None),
    )  # fmt: skip  # a table
    content["notes"] += [
        *notes,
        *objections(request.profile, small),
        *_latency_note(content),
        *_training_note(content["accuracy"], request.label_weight),
    ]
    return content


def _bench_before_writing(request: Compress, made: compression.Compressed, source: Source | None) -> Bench:
    """Return the latency, measured on a copy, because the output is written only after all measurements."""
    _require_within_limit(made.state.original)
    with tempfile.TemporaryDirectory(prefix="cpd-onnx-") as folder:
        copy = Path(folder) / request.output.name
        made.state.model.save(copy, weights=request.weights)
        return timed(request, source, made.state.original, [copy], _BENCH_SECONDS)


def timed(request: Compressing, source: Source | None, model: Model, others: Iterable[Path], seconds: float) -> Bench:
    """Return the latency of the original and other models side by side, under the conditions of a latency target."""
    _require_within_limit(model)
    feed = None if source is None else next(calibration(model.proto, source, 1, batch=request.latency_batch or 1))
    setting = Setting(request.latency_batch, request.latency_threads, request.latency_provider)
    return bench(
        [request.model, *others], settings=[setting], seconds=seconds,
        input_shapes=dict(request.input_shapes), feed=feed,
    )  # fmt: skip  # what and how


def _require_within_limit(model: Model) -> None:
    if model.is_over_limit:
        raise UnsupportedError("the model is larger than 2 GiB; 'cpd-onnx bench' can measure it")


def _accuracy(request: Compress, made: compression.Compressed, source: Source | None) -> dict[str, Any] | None:
    """Return the metric of the models on the data of --eval or, without it, their output error against the original."""
    original, small = made.state.original, made.state.model
    is_repaired = made.state.repaired is not None
    early = "pruned and repaired" if is_repaired else "pruned"
    models = {"original": original}
    if made.state.distilled is None:
        models[early] = small
    else:
        models |= {early: made.untrained} if made.untrained is not None else {}
        models["distilled"] = small
    if request.eval is not None:
        data = source_of(request.eval, original, request)
        assert data is not None
        on = "the original's answers" if request.metric in OF_TWO_MODELS else "labels"
        values = scored(request, data, models, original)
        return {**metric_of(request.metric).as_json(), "on": on, "samples": data.count, "values": values}
    if source is None:
        return None
    values = {name: sensitivity.distance(original, model, source, _SAMPLES) for name, model in models.items()}
    return {"metric": sensitivity.ERROR, "on": "the original's answers", "samples": _SAMPLES, "values": values}


def _latency_note(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield a note if the latency fell much less than the MACs."""
    if content["bench"] is None or content["budget"]["kind"] == "latency":
        return
    time_left = content["bench"]["timings"][1]["ratio"]
    work_left = content["after"]["macs"] / content["before"]["macs"]
    if 1 - time_left < _LEAST_SAVING * (1 - work_left):
        yield (
            f"{work_left:.0%} of the MACs take {time_left:.0%} of the time: kernels are efficient at some widths only. "
            "Use --target latency=…, which measures the widths, or --profile or --round-to, which round them"
        )


def _training_note(accuracy: Mapping[str, Any] | None, label_weight: float) -> Iterator[str]:
    """Yield a note if training without labels made the metric worse."""
    values = list((accuracy or {"values": {}})["values"].values())
    if len(values) < 3 or label_weight:
        return
    assert accuracy is not None
    _, before, after = values
    if (after > before) if lower_is_better(accuracy) else (after < before):
        yield (
            f"training made the model worse ({before:.4g} before, {after:.4g} after): use more --steps or a smaller "
            "--lr, or skip it with --no-distill"
        )


def _sensitivity(request: Compress, made: compression.Compressed, source: Source | None) -> dict[str, Any] | None:
    """Return the output error of pruning each group alone; None if that was not requested and would take long."""
    if source is None or request.sensitivity is False:
        return None
    combed, original = made.state.need("combed", "prune"), made.state.original
    started = time.perf_counter()
    sensitivity.distance(original, original, source, _FEWER_SAMPLES)
    estimate = len(combed.groups) * (time.perf_counter() - started)  # two runs of the model for two widths
    if estimate > _MOST_SECONDS and not request.sensitivity:
        return None
    samples = (
        _SENSITIVITY.samples if estimate * _SENSITIVITY.samples / _FEWER_SAMPLES <= _MOST_SECONDS else _FEWER_SAMPLES
    )
    found = sensitivity.sensitivity(combed, score(combed, "l2"), source, replace(_SENSITIVITY, samples=samples))
    return {"error": sensitivity.ERROR, "groups": sensitivity.as_json(found)}


# Written files.


def write_page(path: Path, content: Mapping[str, Any]) -> None:
    """Write the report in the format given by the ending of the path: .json, .html or .md."""
    if path.suffix == ".json":
        text = json.dumps(finite(content), indent=1) + "\n"
    else:
        from cpd_onnx.report import document

        text = (document.html if path.suffix == ".html" else document.markdown)(content)
    write_atomically(path, text.encode())


def _write_pages(request: Compress, places: Places, content: dict[str, Any], seconds: Mapping[str, float]) -> None:
    """Add the facts about the written files to the report, and write it with the manifest."""
    content["provenance"] = manifest.provenance((places.output, places.plan, places.recipe), request.seed)
    content["provenance"]["seconds"] |= seconds
    content["output"] = {"file": request.output.name, "sha256": content["provenance"]["files"][0]["sha256"]}
    for path in places.pages:
        write_page(path, content)
    _write_manifest(request, places, content)


def _write_manifest(request: Compress, places: Places, content: Mapping[str, Any]) -> None:
    read = {
        "model": request.model, "data": request.data, "eval": request.eval, "plan": request.like,
        "cost-table": request.cost_table, "profile": request.profile, "watch": request.watch,
    }  # fmt: skip  # a table
    manifest.write(
        places.manifest, recipe.text(request), read, {"model": places.output, "plan": places.plan},
        run="compress", seed=request.seed, budget=content["budget"], verification=content["verification"],
        beside={places.recipe: "recipe"} | dict.fromkeys(places.pages, "report"),
    )  # fmt: skip  # what and how
