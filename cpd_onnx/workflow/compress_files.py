"""Compress, from file to file: the model with its plan, recipe, report and manifest."""

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
    require_new_run,
    saying_what_is_left,
    traces_of,
    watched_on,
)
from cpd_onnx.workflow.places import (
    beside,
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
_SAMPLES = 256
"""Samples on which answers are compared with the original's, where there is nothing better."""
_SENSITIVITY = sensitivity.SensitivityOptions((0.5, 0.0), samples=32, repair=False)
"""What the report shows of it: two widths of each group, nothing fitted anew."""
_FEW = 8
"""Samples where so many take too long."""
_PATIENCE = 60.0
"""Seconds, about, that it may take without being asked for."""
_WORTH = 0.6
"""Of the share of work that went, what should be gone of the time."""


@dataclass(frozen=True)
class Places:
    """Where everything goes that is made beside a model."""

    output: Path
    plan: Path
    recipe: Path
    manifest: Path
    pages: tuple[Path, ...]

    def all(self) -> tuple[Path, ...]:
        """All of them, the model first."""
        return (self.output, self.plan, self.recipe, self.manifest, *self.pages)


def places_of(request: Compress) -> Places:
    """Where everything of a run goes."""
    output = request.output
    pages = tuple(beside(output, f"report.{kind}") for kind in (page_kinds() if request.report else ()))
    plan = request.plan or plan_path_of(output)
    return Places(output, plan, recipe_path_of(output), manifest.place_of(output), pages)


def can_draw() -> bool:
    """Whether there is what makes pages and figures, the extra "report"."""
    return all(util.find_spec(name) for name in ("jinja2", "matplotlib"))


def page_kinds() -> tuple[str, ...]:
    """The forms that a report can be written in here."""
    return ("json", "html", "md") if can_draw() else ("json",)


def compress(request: Compress, observer: Observer = ignore, *, called: str | None = None) -> dict[str, Any] | None:
    """Prune, repair, distill and prove a model, and write it with its plan, recipe, report and manifest.

    `called` is what the model's file was called, where it has another name now. The report is given back, or nothing
    in a process of a training run that is not the first.
    """
    started = time.perf_counter()
    places = places_of(request)
    written = require_outputs(request, *places.all())
    check_metric(request.metric)
    recipe.text(request)  # refuses now what cannot be put on record at the end
    given = None if request.like is None else load_plan(request.like)
    shapes = request.input_shapes or (given.input_shapes if given else {})
    model = read_model(request.model, request.input_shapes)
    require_apart(written, model)
    model.path = Path(called or request.model)
    source = source_of(request.data, model, request)
    step = _step(request, source)
    traces, cache = _left_behind(request, step, model)
    resume = compression.ResumeState(given, cache if is_first_process() else None, traces, watched_on(request, model))
    with _leaving_no_more(step, cache, traces):
        made = _made(step, State(model, model, shapes, source), resume, request, observer)
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
def _leaving_no_more(step: Iterate, cache: RunCache, traces: Any) -> Iterator[None]:
    """Where something fails inside, leave what `--resume` goes on from, if that can help, and say so."""
    with saying_what_is_left(lambda: _unfinished(step, cache, traces)):
        try:
            yield
        except (ModelError, ProofError, InconclusiveError) as error:
            # Whoever goes on meets it again, unless it was the disk; a training may be worth keeping.
            is_worth_it = step.name == "interleave" and isinstance(error, InconclusiveError)
            if not isinstance(error.__cause__, OSError) and not is_worth_it:
                _discard(step, cache, traces)
            raise


def _made(
    step: Iterate, state: State, resume: compression.ResumeState, request: Compress, observer: Observer
) -> compression.Compressed:
    """The compressed model."""
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
    """What can be done: with data it is repaired, with torch as well it is trained."""
    has_data = source is not None
    trains = defaults.training(request.distill, has_data=has_data)
    training = vars(picked(DistillOptions, request)) if trains else None
    target = target_options(*request.target)
    return compression.step_of(request, target, training, has_data=has_data)


def _left_behind(request: Compress, step: Iterate, model: Model) -> tuple[Any, RunCache]:
    """What the run writes while it goes on; refuses to lose what an unfinished one has done."""
    place = checkpoint_of(request)
    words = (model.sha256(), step, request.input_shapes, request.data, request.like)
    cache = RunCache(place, hashlib.sha256(repr(words).encode()).hexdigest())
    traces = traces_of(request) if step.name == "interleave" else None
    require_new_run(request, *_unfinished(step, cache, traces))
    if not request.resume:
        cache.discard(step.rounds)
    return traces, cache


def _unfinished(step: Iterate, cache: RunCache, traces: Any) -> Iterator[Path]:
    """The files of a run that was stopped."""
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


# What is measured of the result.


def _reported(request: Compress, made: compression.Compressed, source: Source | None) -> dict[str, Any]:
    """The report, but for what the files that are written add to it; what cannot be measured is said in its notes."""
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
        *_slow(content),
        *_worse(content["accuracy"], request.label_weight),
    ]
    return content


def _bench_before_writing(request: Compress, made: compression.Compressed, source: Source | None) -> Bench:
    """The latency of a copy: the output appears once everything about it is known."""
    _require_small(made.state.original)
    with tempfile.TemporaryDirectory(prefix="cpd-onnx-") as folder:
        copy = Path(folder) / request.output.name
        made.state.model.save(copy, weights=request.weights)
        return timed(request, source, made.state.original, [copy], _BENCH_SECONDS)


def timed(request: Compressing, source: Source | None, model: Model, others: Iterable[Path], seconds: float) -> Bench:
    """The original and what was made of it side by side, under the conditions that a latency target has."""
    _require_small(model)
    feed = None if source is None else next(calibration(model.proto, source, 1, batch=request.latency_batch or 1))
    setting = Setting(request.latency_batch, request.latency_threads, request.latency_provider)
    return bench(
        [request.model, *others], settings=[setting], seconds=seconds,
        input_shapes=dict(request.input_shapes), feed=feed,
    )  # fmt: skip  # what and how


def _require_small(model: Model) -> None:
    if model.is_over_limit:
        raise UnsupportedError("the model is over 2 GiB; 'cpd-onnx bench' loads it all the same")


def _accuracy(request: Compress, made: compression.Compressed, source: Source | None) -> dict[str, Any] | None:
    """What the models score on the data for that; without any, how far their answers are from the original's."""
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


def _slow(content: Mapping[str, Any]) -> Iterator[str]:
    """Where work went and time did not."""
    if content["bench"] is None or content["budget"]["kind"] == "latency":
        return
    time_left = content["bench"]["timings"][1]["ratio"]
    work_left = content["after"]["macs"] / content["before"]["macs"]
    if 1 - time_left < _WORTH * (1 - work_left):
        yield (
            f"{work_left:.0%} of the work takes {time_left:.0%} of the time: kernels are fast at some widths only. "
            "--target latency=… chooses those by measuring, --profile or --multiple by what they are multiples of"
        )


def _worse(accuracy: Mapping[str, Any] | None, label_weight: float) -> Iterator[str]:
    """Where training without labels has taken the answers away from the original's."""
    values = list((accuracy or {"values": {}})["values"].values())
    if len(values) < 3 or label_weight:
        return
    assert accuracy is not None
    _, before, after = values
    if (after > before) if lower_is_better(accuracy) else (after < before):
        yield (
            f"training made it worse ({before:.4g} before, {after:.4g} after): give it more --steps or a smaller --lr, "
            "or leave it out with --no-distill"
        )


def _sensitivity(request: Compress, made: compression.Compressed, source: Source | None) -> dict[str, Any] | None:
    """What the outputs lose with each group: on fewer samples, or not at all, where that takes long."""
    if source is None or request.sensitivity is False:
        return None
    combed, original = made.state.need("combed", "prune"), made.state.original
    started = time.perf_counter()
    sensitivity.distance(original, original, source, _FEW)
    whole = len(combed.groups) * (time.perf_counter() - started)  # two runs of the model for two widths
    if whole > _PATIENCE and not request.sensitivity:
        return None
    samples = _SENSITIVITY.samples if whole * _SENSITIVITY.samples / _FEW <= _PATIENCE else _FEW
    found = sensitivity.sensitivity(combed, score(combed, "l2"), source, replace(_SENSITIVITY, samples=samples))
    return {"error": sensitivity.ERROR, "groups": sensitivity.as_json(found)}


# What is written of it.


def write_page(path: Path, content: Mapping[str, Any]) -> None:
    """Write the report in the form that the end of the name says."""
    if path.suffix == ".json":
        text = json.dumps(compression.finite(content), indent=1) + "\n"
    else:
        from cpd_onnx.report import document

        text = (document.html if path.suffix == ".html" else document.markdown)(content)
    write_atomically(path, text.encode())


def _write_pages(request: Compress, places: Places, content: dict[str, Any], seconds: Mapping[str, float]) -> None:
    """Write the report and the manifest of what has been written; the report gets what that adds."""
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
