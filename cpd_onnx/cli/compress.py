"""What `compress` does."""

from __future__ import annotations

import argparse
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

from rich.progress import BarColumn

from cpd_onnx.cli.console import (
    checkpoint_of,
    is_first_process,
    objections,
    out,
    plan_path_of,
    progress_line,
    read_model,
    recipe_path_of,
    require_apart,
    require_new_run,
    require_outputs,
    saying_what_is_left,
    scored,
    source_of,
    traces_of,
    training_of,
    watched_on,
    wish_of,
    write_both,
    write_json,
)
from cpd_onnx.data.metrics import OF_TWO_MODELS, check_metric, lower_is_better, metric_of
from cpd_onnx.data.sources import Source, calibration
from cpd_onnx.errors import CpdError, InconclusiveError, ModelError, ProofError, UnsupportedError
from cpd_onnx.io.files import commit_together, locked_folder, write_atomically
from cpd_onnx.ir.model import Model
from cpd_onnx.passes import sensitivity
from cpd_onnx.passes.iterate import Iterate, Stages
from cpd_onnx.pipeline.state import State
from cpd_onnx.report import tables as report
from cpd_onnx.rewrite.plan import load_plan
from cpd_onnx.runtime.bench import Bench, Setting, bench
from cpd_onnx.scores.registry import score
from cpd_onnx.workflow import compress as compression
from cpd_onnx.workflow import manifest, recipe

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
class _Places:
    """Where everything goes that is made beside a model."""

    output: Path
    plan: Path
    recipe: Path
    manifest: Path
    pages: tuple[Path, ...]

    def all(self) -> tuple[Path, ...]:
        return (self.output, self.plan, self.recipe, self.manifest, *self.pages)


def _places(options: argparse.Namespace) -> _Places:
    def beside(ending: str) -> Path:
        output: Path = options.output
        return output.with_name(f"{output.name}.{ending}")

    pages = tuple(beside(f"report.{kind}") for kind in (page_kinds() if options.report else ()))
    plan = options.plan or plan_path_of(options.output)
    return _Places(options.output, plan, recipe_path_of(options), manifest.place_of(options.output), pages)


def can_draw() -> bool:
    """Whether there is what makes pages and figures, the extra "report"."""
    return all(util.find_spec(name) for name in ("jinja2", "matplotlib"))


def page_kinds() -> tuple[str, ...]:
    """The forms that a report can be written in here."""
    return ("json", "html", "md") if can_draw() else ("json",)


def compress(options: argparse.Namespace) -> None:
    """Prune, repair, distill and prove a model, and write it with its plan, recipe, report and manifest."""
    content = compressed(options)
    if content is not None and not write_json(options, content):
        _show(content, _places(options))


def compressed(options: argparse.Namespace, *, called: str | None = None) -> dict[str, Any] | None:
    """Do it; the report, or nothing in a process of a training run that is not the first.

    `called` is what the model's file was called, where it has another name now.
    """
    started = time.perf_counter()
    places = _places(options)
    require_outputs(options, *places.all())
    check_metric(options.metric)
    recipe.text(options)  # refuses now what cannot be put on record at the end
    given = None if options.like is None else load_plan(options.like)
    shapes = dict(options.input_shape) or (given.input_shapes if given else {})
    model = read_model(options.model, options.input_shape)
    require_apart(options, model)
    model.path = Path(called or options.model)
    source = source_of(options.data, model, options)
    step = _step(options, source)
    traces, stages = _left_behind(options, step, model)
    known = compression.Known(given, stages if is_first_process() else None, traces, watched_on(options, model))
    with _leaving_no_more(step, stages, traces):
        made = _made(step, State(model, model, shapes, source), known, allow_inconclusive=options.allow_inconclusive)
        if not is_first_process():
            return None
        content = _reported(options, made, source) | {"rounds": step.rounds}
        with locked_folder(options.output.parent), commit_together():
            write_both(options, made.state.model, made.state.need("plan", step.name), places.plan)
            recipe.write(places.recipe, options, overwrite=options.force)
            content["bytes"] = {
                "before": report.size_of(model, options.model),
                "after": report.size_of(made.state.model, options.output),
            }
            _write_pages(
                options, places, content, dict(made.seconds) | {"all": round(time.perf_counter() - started, 2)}
            )
    _discard(step, stages, traces)
    return content


@contextlib.contextmanager
def _leaving_no_more(step: Iterate, stages: Stages, traces: Any) -> Iterator[None]:
    """Where something fails inside, leave what `--resume` goes on from, if that can help, and say so."""
    with saying_what_is_left(lambda: _unfinished(step, stages, traces)):
        try:
            yield
        except (ModelError, ProofError, InconclusiveError) as error:
            # Whoever goes on meets it again, unless it was the disk; a training may be worth keeping.
            is_worth_it = step.name == "interleave" and isinstance(error, InconclusiveError)
            if not isinstance(error.__cause__, OSError) and not is_worth_it:
                _discard(step, stages, traces)
            raise


def _made(step: Iterate, state: State, known: compression.Known, *, allow_inconclusive: bool) -> compression.Compressed:
    """The compressed model; a line shows how far it is."""
    with progress_line(BarColumn()) as line:
        task = line.add_task("comb, score, prune", total=None, visible=is_first_process())
        return compression.compress(
            step,
            state,
            known,
            progress=lambda number, now: line.update(
                task,
                total=now.steps,
                completed=now.step,
                description=f"round {number} of {step.rounds}, step {now.step}, loss {now.loss:.4f}",
            ),
            allow_inconclusive=allow_inconclusive,
        )


def choice_of(options: argparse.Namespace, source: Source | None) -> tuple[str, dict[str, Any]]:
    """The score, and the fields of `Allocate`: with data what least squares cannot make up for, else weights."""
    return compression.choice(options.score, wish_of(options), has_data=source is not None)


def _step(options: argparse.Namespace, source: Source | None) -> Iterate:
    """What can be done: with data it is repaired, with torch as well it is trained."""
    repairs, trains = compression.efforts(repair=options.repair, train=options.distill, has_data=source is not None)
    kind, wish = choice_of(options, source)
    chosen = {name: getattr(options, name) for name in ("rounds", "samples", "score_labels", "repair_samples")}
    seed = {} if trains else {"seed": options.seed}
    wished = wish | chosen | seed | {"score": kind, "repair": repairs}
    return compression.step_of(wished, training_of(options) if trains else None)


def _left_behind(options: argparse.Namespace, step: Iterate, model: Model) -> tuple[Any, Stages]:
    """What the run writes while it goes on; refuses to lose what an unfinished one has done."""
    place = checkpoint_of(options)
    words = (model.sha256(), step, options.input_shape, options.data, options.like)
    stages = Stages(place, hashlib.sha256(repr(words).encode()).hexdigest())
    traces = traces_of(options) if step.name == "interleave" else None
    require_new_run(options, *_unfinished(step, stages, traces))
    if not options.resume:
        stages.discard(step.rounds)
    return traces, stages


def _unfinished(step: Iterate, stages: Stages, traces: Any) -> Iterator[Path]:
    """The files of a run that was stopped."""
    for number in range(1, step.rounds + 1):
        yield from stages.files(number)
        if traces is not None:
            from cpd_onnx.passes.interleave import of_round

            checkpoint = of_round(traces, number).checkpoint
            if checkpoint is not None:
                yield checkpoint


def _discard(step: Iterate, stages: Stages, traces: Any) -> None:
    for path in _unfinished(step, stages, traces):
        path.unlink(missing_ok=True)


# What is measured of the result.


def _reported(options: argparse.Namespace, made: compression.Compressed, source: Source | None) -> dict[str, Any]:
    """The report, but for what the files that are written add to it; what cannot be measured is said in its notes."""
    small = made.state.model
    notes: list[str] = []
    found: Bench | None = None
    lost: dict[str, Any] | None = None
    if options.report:
        try:
            found = _bench_before_writing(options, made, source)
        except (CpdError, OSError) as error:
            notes.append(f"latency was not measured: {error}")
        lost = _sensitivity(options, made, source)
    content = compression.content(
        made, bench=found, accuracy=_accuracy(options, made, source), sensitivity=lost,
        advice=compression.advice(data=options.data, has_labels=options.eval is not None),
    )  # fmt: skip  # a table
    content["notes"] += [
        *notes,
        *objections(options, small),
        *_slow(content),
        *_worse(content["accuracy"], options.label_weight),
    ]
    return content


def _bench_before_writing(options: argparse.Namespace, made: compression.Compressed, source: Source | None) -> Bench:
    """The latency of a copy: the output appears once everything about it is known."""
    _require_small(made.state.original)
    with tempfile.TemporaryDirectory(prefix="cpd-onnx-") as folder:
        copy = Path(folder) / options.output.name
        made.state.model.save(copy, weights=options.weights)
        return timed(options, source, made.state.original, [copy], _BENCH_SECONDS)


def timed(
    options: argparse.Namespace, source: Source | None, model: Model, others: Iterable[Path], seconds: float
) -> Bench:
    """The original and what was made of it side by side, under the conditions that a latency target has."""
    _require_small(model)
    feed = None if source is None else next(calibration(model.proto, source, 1, batch=options.latency_batch or 1))
    setting = Setting(options.latency_batch, options.latency_threads, options.latency_provider)
    return bench(
        [options.model, *others], settings=[setting], seconds=seconds,
        input_shapes=dict(options.input_shape), feed=feed,
    )  # fmt: skip  # what and how


def _require_small(model: Model) -> None:
    if model.is_over_limit:
        raise UnsupportedError("the model is over 2 GiB; 'cpd-onnx bench' loads it all the same")


def _accuracy(
    options: argparse.Namespace, made: compression.Compressed, source: Source | None
) -> dict[str, Any] | None:
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
    if options.eval is not None:
        data = source_of(options.eval, original, options)
        assert data is not None
        on = "the original's answers" if options.metric in OF_TWO_MODELS else "labels"
        values = scored(options, data, models, original)
        return {**metric_of(options.metric).as_json(), "on": on, "samples": data.count, "values": values}
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


def _sensitivity(
    options: argparse.Namespace, made: compression.Compressed, source: Source | None
) -> dict[str, Any] | None:
    """What the outputs lose with each group: on fewer samples, or not at all, where that takes long."""
    if source is None or options.sensitivity is False:
        return None
    combed, original = made.state.need("combed", "prune"), made.state.original
    started = time.perf_counter()
    sensitivity.distance(original, original, source, _FEW)
    whole = len(combed.groups) * (time.perf_counter() - started)  # two runs of the model for two widths
    if whole > _PATIENCE and not options.sensitivity:
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


def _write_pages(
    options: argparse.Namespace, places: _Places, content: dict[str, Any], seconds: Mapping[str, float]
) -> None:
    """Write the report and the manifest of what has been written; the report gets what that adds."""
    content["provenance"] = manifest.provenance((places.output, places.plan, places.recipe), options.seed)
    content["provenance"]["seconds"] |= seconds
    content["output"] = {"file": options.output.name, "sha256": content["provenance"]["files"][0]["sha256"]}
    for path in places.pages:
        write_page(path, content)
    _write_manifest(options, places, content)


def _write_manifest(options: argparse.Namespace, places: _Places, content: Mapping[str, Any]) -> None:
    read = {
        "model": options.model, "data": options.data, "eval": options.eval, "plan": options.like,
        "cost-table": options.cost_table, "profile": options.profile, "watch": options.watch,
    }  # fmt: skip  # a table
    manifest.write(
        places.manifest, recipe.text(options), read, {"model": places.output, "plan": places.plan},
        run="compress", seed=options.seed, budget=content["budget"], verification=content["verification"],
        beside={places.recipe: "recipe"} | dict.fromkeys(places.pages, "report"),
    )  # fmt: skip  # what and how


def _show(content: Mapping[str, Any], places: _Places) -> None:
    out.print(report.costs_table(content))
    if any(entry["weights"] for entry in content["kept"]):
        out.print(report.kept_table(content["kept"], limit=report.FEW_REASONS))
    if content["bench"] is not None:
        first, last = (entry["p50"] for entry in content["bench"]["timings"][:2])
        out.print(f"latency {first:.2f} ms -> {last:.2f} ms in the median: {first / last:.2f} times faster")
    if content["accuracy"] is not None:
        said = content["accuracy"]
        values = ", ".join(f"{name} {value:.4f}" for name, value in said["values"].items())
        out.print(f"{said['metric']} against {said['on']}: {values}", soft_wrap=True)
    for note in (*content["notes"], *content["advice"]):
        out.print(f"note: {note}", soft_wrap=True)
    if content["repaired"] is not None:
        out.print(report.repair_line(content["repaired"]), soft_wrap=True)
    out.print(report.proof_line(content["verification"]), soft_wrap=True)
    out.print(f"wrote {', '.join(map(str, places.all()))}", soft_wrap=True)
