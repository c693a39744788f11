"""Compress from file to file: write the model with its plan, recipe, report and manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

from cpd_onnx.channels.combing import comb
from cpd_onnx.data.metrics import OF_TWO_MODELS, check_metric, lower_is_better, metric_of
from cpd_onnx.data.sources import Source, calibration
from cpd_onnx.errors import (
    CpdError,
    InconclusiveError,
    LossError,
    ModelError,
    NotFasterError,
    ProofError,
    TargetError,
    UnsupportedError,
)
from cpd_onnx.io import progress
from cpd_onnx.io.files import commit_together, locked_folder, write_atomically
from cpd_onnx.ir.model import Model
from cpd_onnx.options import options_from
from cpd_onnx.passes import sensitivity
from cpd_onnx.passes.iterate import CachedRound, Iterate, RunCache
from cpd_onnx.pipeline.state import State
from cpd_onnx.report import manifest
from cpd_onnx.report import tables as report
from cpd_onnx.report.verdict import verdict
from cpd_onnx.rewrite.plan import Plan, load_plan
from cpd_onnx.runtime.bench import Bench, Setting, bench
from cpd_onnx.scores.registry import score
from cpd_onnx.training.options import DistillOptions
from cpd_onnx.workflow import compress as compression
from cpd_onnx.workflow import defaults, recipe
from cpd_onnx.workflow.deploy import deploy, merged_places, write_merged
from cpd_onnx.workflow.distill import (
    checkpoint_of,
    is_distributed,
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
from cpd_onnx.workflow.quality import outcome, precise, search
from cpd_onnx.workflow.quality.checks import checked_samples
from cpd_onnx.workflow.quality.samples import Samples, samples_of, to_fit
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
_CONVERTED = "converted"
"""Name of the result in a comparison of models, if it has another number format than the pruned model."""
_LOOSE, _STRICT = 1, 2
"""Numbers of the recorded choices: the one that relies on training, and the one that meets the bound without it."""


@dataclass(frozen=True)
class Places:
    """Paths of all files that a run writes.

    Attributes:
        output: The pruned model.
        plan: Its plan.
        recipe: The options of the run.
        manifest: The manifest of the pruned model.
        pages: The report in several formats.
        table: The cost table; None if it is not kept.
        converted: The model that is made from the pruned one in another number format, with its manifest; empty if that
            one is the result.
    """

    output: Path
    plan: Path
    recipe: Path
    manifest: Path
    pages: tuple[Path, ...]
    table: Path | None = None
    converted: tuple[Path, ...] = ()

    def all(self) -> tuple[Path, ...]:
        """Return all paths, the result first."""
        return (*self.converted, self.output, self.plan, self.recipe, self.manifest, *self.pages)


def places_of(request: Compress, *, is_converted: bool = False) -> Places:
    """Return the paths that a run writes; if it converts the pruned model, that one lies beside its result."""
    result = request.output
    output = precise.float_place(result) if is_converted else result
    pages = tuple(beside(output, f"report.{kind}") for kind in (page_kinds() if request.report else ()))
    plan = request.plan or plan_path_of(output)
    converted = (result, manifest.place_of(result)) if is_converted else ()
    return Places(output, plan, recipe_path_of(output), manifest.place_of(output), pages, converted=converted)


def can_draw() -> bool:
    """Return whether the libraries of the extra "report", which write pages and figures, are installed."""
    return all(util.find_spec(name) for name in ("jinja2", "matplotlib"))


def page_kinds() -> tuple[str, ...]:
    """Return the formats that a report can be written in, as endings of file names."""
    return ("json", "html", "md") if can_draw() else ("json",)


def compress(
    request: Compress, observer: Observer = ignore, *, called: str | None = None, is_checked: bool = False
) -> dict[str, Any] | None:
    """Prune, repair, distill and prove a model, and write it with its plan, recipe, report and manifest.

    `called` is the recorded name of the model's file, if it has been renamed since; `is_checked` says that the caller
    has checked the samples. Returns the report, or None in all processes of a training run but the first.
    """
    started = time.perf_counter()
    may_convert = request.precision != precise.FLOAT
    free = dict.fromkeys((*places_of(request).all(), *places_of(request, is_converted=may_convert).all()))
    written = require_outputs(
        request, *free, *outcome.table_places(request), *outcome.config_places(request), *merged_places(request)
    )
    check_metric(request.metric)
    recipe.text(request)  # fails now, not at the end, if an option cannot be recorded
    given = None if request.like is None else load_plan(request.like)
    shapes = request.input_shapes or (given.input_shapes if given else {})
    model = read_model(request.model, request.input_shapes, request.free_io)
    require_apart(written, model)
    if given is not None:
        model = model.with_free_io(given.free_io)
    model.path = Path(called or request.model)
    source = source_of(request.data, model, request)
    checked = None if is_checked else checked_samples(request, model, source)
    run = _run_of(request, model, source)
    places = places_of(request, is_converted=run.form is not None)
    progress.announce(*_announced(run))
    state = State(model, model, shapes, run.fitted, precise.timed_form(run.form))
    with _keeping_checkpoints(run):
        observer("comb", 0, None)
        made, choice = run.compressed(state, given)
        if not is_first_process():
            return None
        result = made.state.model if run.form is None else precise.deployed(made.state.model, run.form, run.data)
        content = _reported(request, made, run.samples, result) | {"rounds": run.step.rounds, "preflight": checked}
        content |= outcome.content(request, run.demand, run.samples, choice, made.state, result)
        content |= {"precision": precise.as_entry(request, run.form)}
        content["notes"] += [*outcome.target_notes(request, choice), *outcome.interface_notes(made.state.model)]
        content["notes"] += precise.notes(request, run.form)
        outcome.require_faster(request, content)
        with progress.step("write"), locked_folder(request.output.parent), commit_together():
            pruned = request if run.form is None else precise.without_conversion(request)
            write_both(pruned, made.state.model, made.state.need("plan", run.step.name), places.plan)
            recipe.write(places.recipe, request, overwrite=request.force)
            small = made.state.model
            content["notes"] += [*outcome.written_configs(request, small), *write_merged(pruned, small)]
            table = outcome.kept_table(request, choice.chosen or made.state.need("allocation", "allocate"), content)
            if run.form is not None:
                deploy(precise.conversion(request, run.form), model=small)
            content["bytes"] = {
                "before": report.size_of(model, request.model),
                "after": report.size_of(result, request.output),
            }
            content["verdict"] = verdict(content)
            seconds = dict(made.seconds) | {"all": round(time.perf_counter() - started, 2)}
            _write_pages(request, replace(places, table=table), content, seconds)
            write_json(request, content)
    run.discard()
    return content


@dataclass(frozen=True)
class _Run:
    """One run: its request, what follows from it, and the files from which it can be resumed.

    Attributes:
        request: The options.
        step: The pass that compresses.
        samples: Samples by their use.
        fitted: Samples that channels, weights and training are fitted to: real or generated ones.
        demand: What is to be kept of the quality.
        cache: Files with the finished rounds.
        traces: Checkpoint and logs of the training; None if there is none.
        watched: Samples on which the student is measured during training, or None.
        data: The samples as they were given; None without.
        form: The form in which the result is deployed; None for that of the original.
    """

    request: Compress
    step: Iterate
    samples: Samples
    fitted: Source | None
    demand: search.Demand
    cache: RunCache
    traces: Any
    watched: Any
    data: Source | None = None
    form: precise.Form | None = None

    def compressed(self, state: State, given: Plan | None) -> tuple[compression.Compressed, search.Choice]:
        """Return the compressed model and how its channels were chosen, by a given plan if there is one."""
        choice = search.Choice(given) if given else self._choice(state)
        made = self._carried_out(state, choice)
        if choice.stricter is None or not is_first_process():
            return made, choice
        loss = self.demand.loss(state.original, self.samples)
        if loss(made.state.model) <= (self.demand.max_loss or 0.0):
            return made, choice
        self.discard()
        choice = self._recorded(choice.stricter())
        return self._carried_out(state, choice), choice

    def _choice(self, state: State) -> search.Choice:
        """Return how channels are chosen; an interrupted run has recorded it, since latencies differ in each run."""
        found = next((n for n in (_STRICT, _LOOSE) if self.choices.files(n)[0].exists()), None)
        if found is None or not self.request.resume:
            return self._recorded(search.choice_of(self.step, state, self.samples, self.demand))
        combed = comb(state.model, state.input_shapes)
        recorded = self.choices.load(found, combed)
        assert recorded is not None
        choice = search.carrying_out(self.step, combed, recorded.chosen)
        if found == _STRICT:
            return choice
        return replace(choice, stricter=partial(search.strict, self.step, state, self.samples, self.demand))

    def _recorded(self, choice: search.Choice) -> search.Choice:
        """Return the choice, recorded for a resumed run if a search has found it."""
        if choice.chosen is not None and not choice.is_lossless and is_first_process():
            self.choices.save(_STRICT if choice.stricter is None else _LOOSE, CachedRound(choice.chosen, None))
        return choice

    def _carried_out(self, state: State, choice: search.Choice) -> compression.Compressed:
        cache = self.cache if is_first_process() else None
        return compression.compress(
            self.step,
            state,
            compression.ResumeState(choice.plan, choice.chosen, cache, self.traces, self.watched),
            allow_inconclusive=self.request.allow_inconclusive,
        )

    @property
    def choices(self) -> RunCache:
        """Files with the channels that a search has chosen, numbered `_LOOSE` and `_STRICT`."""
        return replace(self.cache, path=self.cache.path.with_name(f"{self.cache.path.name}.choice"))

    def unfinished(self) -> Iterator[Path]:
        """Yield the paths of the checkpoints of an unfinished run."""
        for number in (_LOOSE, _STRICT):
            yield self.choices.files(number)[0]
        for number in range(1, self.step.rounds + 1):
            yield from self.cache.files(number)
            if self.traces is not None:
                from cpd_onnx.passes.interleave import of_round

                checkpoint = of_round(self.traces, number).checkpoint
                if checkpoint is not None:
                    yield checkpoint

    def discard(self) -> None:
        """Delete the checkpoints."""
        for path in self.unfinished():
            path.unlink(missing_ok=True)


def _announced(run: _Run) -> Iterator[str]:
    """Yield the names of the steps of a run, for its progress."""
    request, is_given = run.request, run.request.like is not None
    is_search = not is_given and run.demand.max_loss is not None and run.samples.choosing is not None
    yield "comb"
    yield from compression.announced(run.step, is_given=is_given, is_search=is_search)
    yield from ["latency", "sensitivity"] if request.report else []
    yield from ["evaluate"] if request.eval is not None else []
    yield from ["agreement"] if run.samples.judging is not None else []
    yield "write"


def _run_of(request: Compress, model: Model, source: Source | None) -> _Run:
    """Return the run of a request; raises CpdError if the checkpoints of an unfinished run would be lost."""
    labelled = source_of(request.eval, model, request)
    has_data = source is not None
    trains = defaults.training(request.distill, has_data=has_data)
    demand = outcome.demand_of(request, has_labels=labelled is not None, trains=trains)
    if is_distributed() and demand.max_loss is not None:
        demand = _without_search(request, demand)
    samples = samples_of(source, labelled, request.hold_out, is_search=demand.max_loss is not None)
    training = vars(options_from(DistillOptions, request)) if trains else None
    fitted = to_fit(samples.fitted, model, request)
    form = precise.form_of(request, model, source, samples, demand)
    demand = replace(demand, converted=form)
    counted = precise.as_deployed(request, form, model)
    step = compression.step_of(counted, outcome.target_of(request), training, fitted)
    hold_out = request.hold_out if labelled is None else 0.0
    others = (request.data, request.like, request.max_loss, hold_out, sorted(model.free_io))
    identity = (model.sha256(), step, request.input_shapes, *others)
    cache = RunCache(checkpoint_of(request), hashlib.sha256(repr(identity).encode()).hexdigest())
    traces = traces_of(request) if trains else None
    run = _Run(request, step, samples, fitted, demand, cache, traces, watched_on(request, model), source, form)
    require_new_run(request, *run.unfinished())
    if not request.resume and is_first_process():
        run.discard()
    return run


def _without_search(request: Compress, demand: search.Demand) -> search.Demand:
    """Return the demand of a run of several processes, whose searches could end at different channels.

    Raises TargetError if a bound was asked for.
    """
    if request.max_loss is not None:
        raise TargetError(
            "--max-loss searches in one process: run it with --no-distill, then train its plan with --like"
        )
    return replace(demand, max_loss=None)


@contextlib.contextmanager
def _keeping_checkpoints(run: _Run) -> Iterator[None]:
    """After an error in the block, keep the files that `--resume` can use, and name them; delete them if it cannot."""
    with noting_checkpoints(run.unfinished):
        try:
            yield
        except (ModelError, ProofError, InconclusiveError, NotFasterError, LossError) as error:
            # A resumed run would fail again, except after an error of the disk; keep a finished training.
            is_worth_it = run.traces is not None and isinstance(error, InconclusiveError)
            if not isinstance(error.__cause__, OSError) and not is_worth_it:
                run.discard()
            raise


# Measurements of the result.


def _reported(request: Compress, made: compression.Compressed, samples: Samples, result: Model) -> dict[str, Any]:
    """Return the report without the facts about the written files; its notes say what could not be measured.

    The result is the pruned model, or what is made from it in another number format.
    """
    source = samples.fitted
    notes: list[str] = []
    found: Bench | None = None
    lost: dict[str, Any] | None = None
    if request.report:
        try:
            found = _bench_before_writing(request, made.state.original, result, source)
        except (CpdError, OSError) as error:
            notes.append(f"latency was not measured: {error}")
        lost = _sensitivity(request, made, source)
    content = compression.content(
        made, bench=found, accuracy=_accuracy(request, made, samples, result), sensitivity=lost,
        advice=compression.advice(data=request.data, is_blind=request.blind, has_labels=request.eval is not None),
    )  # fmt: skip  # a table
    content["notes"] += [
        *notes,
        *objections(request.profile, result),
        *_latency_note(content),
        *_training_note(content, request.label_weight),
    ]
    return content


def _bench_before_writing(request: Compress, original: Model, result: Model, source: Source | None) -> Bench:
    """Return the latency, measured on a copy, because the output is written only after all measurements."""
    _require_within_limit(original)
    with tempfile.TemporaryDirectory(prefix="cpd-onnx-") as folder:
        copy = Path(folder) / request.output.name
        result.save(copy, weights=request.weights)
        return timed(request, source, original, [copy], _BENCH_SECONDS)


def timed(request: Compressing, source: Source | None, model: Model, others: Iterable[Path], seconds: float) -> Bench:
    """Return the latency of the original and other models side by side, under the conditions of a latency target."""
    _require_within_limit(model)
    feed = None if source is None else next(calibration(model, source, 1, batch=request.latency_batch or 1))
    setting = Setting(request.latency_batch, request.latency_threads, request.latency_provider)
    return bench(
        [request.model, *others], settings=[setting], seconds=seconds,
        input_shapes=dict(request.input_shapes), feed=feed,
    )  # fmt: skip  # what and how


def _require_within_limit(model: Model) -> None:
    if model.is_over_limit:
        raise UnsupportedError("the model is larger than 2 GiB; 'cpd-onnx bench' can measure it")


def _accuracy(
    request: Compress, made: compression.Compressed, samples: Samples, result: Model
) -> dict[str, Any] | None:
    """Return the metric of the models on labelled samples or, without them, their output error against the original."""
    source = samples.judging
    if source is None:
        return None
    original, small = made.state.original, made.state.model
    is_repaired = made.state.repaired is not None
    early = "pruned and repaired" if is_repaired else "pruned"
    models = {"original": original}
    if made.state.distilled is None:
        models[early] = small
    else:
        models |= {early: made.untrained} if made.untrained is not None else {}
        models["distilled"] = small
    models |= {_CONVERTED: result} if result is not small else {}
    if samples.has_labels:
        on = "the original's answers" if request.metric in OF_TWO_MODELS else "labels"
        values = scored(request, source, models, original)
        return {**metric_of(request.metric).as_json(), "on": on, "samples": source.count, "values": values}
    count = min(_SAMPLES, source.count or _SAMPLES)
    values = {name: sensitivity.distance(original, model, source, count) for name, model in models.items()}
    return {"metric": sensitivity.ERROR, "on": "the original's answers", "samples": count, "values": values}


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


def _training_note(content: Mapping[str, Any], label_weight: float) -> Iterator[str]:
    """Yield a note if training was in vain: undone, or without labels and with a metric that it made worse."""
    held_out = (content["training"] or {}).get("held_out")
    if held_out is not None and not held_out["kept"]:
        yield (
            f"training was undone: it moved the outputs on {held_out['samples']} samples that were not trained on away "
            f"from the original's (divergence {held_out['before']:.3g} before, {held_out['after']:.3g} after); use "
            "more samples, or a smaller --lr, or skip it with --no-distill"
        )
        return
    accuracy = content["accuracy"] or {"values": {}}
    values = [value for name, value in accuracy["values"].items() if name != _CONVERTED]
    if len(values) < 3 or label_weight:
        return
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
    files = (places.output, places.plan, places.recipe)
    content["provenance"] = manifest.provenance(files, request.seed, places.manifest)
    content["provenance"]["seconds"] |= seconds
    content["output"] = {"file": places.output.name, "sha256": content["provenance"]["files"][0]["sha256"]}
    for path in places.pages:
        write_page(path, content)
    _write_manifest(request, places, content)


def _write_manifest(request: Compress, places: Places, content: Mapping[str, Any]) -> None:
    read = {
        "model": request.model, "data": request.data, "eval": request.eval, "plan": request.like,
        "cost-table": request.cost_table, "profile": request.profile, "watch": request.watch,
        "classes": request.images.classes,
    }  # fmt: skip  # a table
    tables = {} if places.table is None else {places.table: "cost-table"}
    manifest.write(
        places.manifest, recipe.text(request), read, {"model": places.output, "plan": places.plan},
        run="compress", seed=request.seed, budget=content["budget"], verification=content["verification"],
        beside={places.recipe: "recipe"} | dict.fromkeys(places.pages, "report") | tables,
    )  # fmt: skip  # what and how
