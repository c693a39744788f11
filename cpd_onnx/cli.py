"""What the commands do: they call, print and write."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cpd_onnx import demo, pipeline, plots, recipe, report
from cpd_onnx.bench import Setting, bench
from cpd_onnx.data import ImageOptions, Source, open_source
from cpd_onnx.errors import CpdError, DataError, ModelError, StoppedError, TargetError, UnsupportedError
from cpd_onnx.files import locked, replacing, require_free, write_atomically
from cpd_onnx.graph import Model, load
from cpd_onnx.groups import Combed
from cpd_onnx.latency import Clock, measure_table
from cpd_onnx.metrics import OF_TWO_MODELS, check_metric, evaluate
from cpd_onnx.options import DATA, LOSSES, SYNTHETIC, TRAINING, command_line, not_negative
from cpd_onnx.passes import sensitivity
from cpd_onnx.passes.allocate import KINDS, Allocate
from cpd_onnx.passes.comb import Comb, comb, planned
from cpd_onnx.passes.fold import Fold
from cpd_onnx.passes.iterate import Iterate
from cpd_onnx.passes.prune import Prune, apply
from cpd_onnx.passes.repair import Repair
from cpd_onnx.passes.score import Score, score, scorer_of
from cpd_onnx.passes.verify import Verify, data_feeds, verify_files
from cpd_onnx.plan import Plan, load_plan
from cpd_onnx.rules import supported_operators, unsupported_operators
from cpd_onnx.runtime import Synthetic
from cpd_onnx.shapes import fold
from cpd_onnx.state import State
from cpd_onnx.widths import held_groups

_PIPE_WIDTH = 120
"""Columns of tables that no terminal shows."""
_LINE = 1000
"""Characters of a complaint."""
_KEPT_REASONS = 5
"""Reasons for keeping channels that `prune` tells."""
_VERIFY_BATCHES = 2


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else _PIPE_WIDTH
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


out = _console()
err = _console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, or 1 for what the user can act on."""
    parser = command_line()
    options = parser.parse_args(arguments)
    try:
        if getattr(options, "recipe", None) is not None:
            options.command.set_defaults(**recipe.read(options.recipe, options.command))
            options = parser.parse_args(arguments)
        _COMMANDS[options.run](options)
    except StoppedError as error:
        print(error, file=sys.stderr)
        return 130
    except (CpdError, MemoryError) as error:
        if options.verbose:
            traceback.print_exc()
        complaint = str(error) if isinstance(error, CpdError) else "there is not enough memory for this model"
        print(f"error: {_one_line(complaint)}", file=sys.stderr)
        return 1
    except Exception as error:
        if options.verbose:
            traceback.print_exc()
        what = _one_line(f"{type(error).__name__}: {error}")
        print(f"error: a defect of ours, {what}; please report it, with what --verbose prints", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def _one_line(text: str) -> str:
    """The text without line breaks, and not without end."""
    line = " ".join(text.split())
    return line if len(line) <= _LINE else f"{line[: _LINE - 1]}…"


def entry() -> None:
    """The `cpd-onnx` command."""
    sys.exit(main())


# What the commands do.


def _inspect(options: argparse.Namespace) -> None:
    _require_outputs(options, reads=[options.model])
    if options.plot is not None:
        plots.require(options.plot)
    if options.sensitivity != (options.data is not None) or (options.plot and not options.sensitivity):
        raise DataError(f"sensitivity is measured on samples: give --sensitivity and --data, {DATA}")
    model = _read(options.model, options.input_shape)
    combed = comb(model, dict(options.input_shape))
    content = report.inspection(combed, sorted(held_groups(combed, options.keep)))
    found = _sensitivity(combed, options) if options.sensitivity else {}
    if found:
        content["sensitivity"] = {"error": sensitivity.ERROR, "groups": sensitivity.as_json(found)}
    if options.plot and found:
        curves = {name: [(p.width, p.error) for p in points] for name, points in found.items()}
        plots.sensitivity(curves, options.plot, error_name=sensitivity.ERROR, overwrite=options.force)
    if _write_json(options, content):
        return
    out.print(f"{options.model.name}: {report.costs_line(content['costs'])}", soft_wrap=True)
    out.print(report.groups_table(content))
    out.print(report.kept_table(content["kept"]))
    out.print(f"{100 * content['prunable_fraction']:.1f} % of the weights lie on a prunable axis")
    for operator, node in content["without_rule"].items():
        out.print(f"no rule for {operator} (at {node}): its channels are kept", soft_wrap=True)
    if found:
        out.print(report.sensitivity_table(content["sensitivity"]))


def _sensitivity(combed: Combed, options: argparse.Namespace) -> dict[str, tuple[sensitivity.Point, ...]]:
    """The errors of the outputs at some widths of each group."""
    source = _source(options.data, combed.folded.model, options)
    assert source is not None
    chosen = sensitivity.SensitivityOptions(options.shares, options.score, options.samples, options.repair)
    with _progress(BarColumn()) as progress:
        task = progress.add_task("score", total=len(combed.groups))
        scores = score(combed, options.score, data=source)
        return sensitivity.sensitivity(
            combed, scores, source, chosen,
            observer=lambda group: progress.update(task, advance=1, description=group.name),
        )  # fmt: skip  # what and how


def _prune(options: argparse.Namespace) -> None:
    plan_path = options.plan or _beside(options.output)
    _require_outputs(options, options.output, plan_path, reads=[options.model])
    steps = _pruning(options)
    started = time.perf_counter()
    model = _read(options.model, options.input_shape)
    with _progress() as progress:
        task = progress.add_task("read", total=None)
        state = pipeline.run(
            steps,
            model,
            data=_source(options.data, model, options),
            input_shapes=dict(options.input_shape),
            observer=lambda name, when: progress.update(task, description=name),
        )
    before = report.size_of(model, options.model)
    plan = state.need("plan", "prune")
    _write_both(options, state.model, plan, plan_path)
    content = report.result(state, time.perf_counter() - started)
    content |= {"output": str(options.output), "plan": str(plan_path)}
    content["bytes"] = {"before": before, "after": report.size_of(state.model, options.output)}
    if not _write_json(options, content):
        _print_pruned(content)


def _pruning(options: argparse.Namespace) -> list[pipeline.Pass]:
    """The passes of `prune`: with data, channels are chosen by what a repair cannot make up for, and repaired."""
    has_data = options.data is not None
    repairs = has_data if options.repair is None else options.repair
    if repairs and not has_data:
        raise DataError(f"a repair looks at samples: give --data, {DATA}")
    kind = options.score or ("reconstruction" if has_data else "l2")
    wish = _wish(options)
    if kind == "reconstruction" and wish["spread"] is None:
        wish["spread"] = "optimal"
    step = pipeline.make("allocate", wish)
    assert isinstance(step, Allocate)
    _ = step.budget  # refuses what makes no sense before the work starts
    scorer_of(kind)
    proof: list[pipeline.Pass] = [] if options.no_verify else [Verify()]
    if options.rounds > 1:
        chosen = {"score": kind, "samples": options.samples, "score_labels": options.score_labels}
        return [
            Iterate(
                **wish, **chosen, seed=options.seed, rounds=options.rounds, repair=repairs,
                repair_samples=options.repair_samples,
            ),
            *proof,
        ]  # fmt: skip  # its options
    repair = [Repair(samples=options.repair_samples, seed=options.seed)] if repairs else []
    score = Score(kind, options.seed, options.samples, options.score_labels)
    return [Fold(), Comb(), score, step, Prune(), *proof, *repair]


def _print_pruned(content: dict[str, Any]) -> None:
    out.print(report.costs_table(content))
    if any(entry["weights"] for entry in content["kept"]):
        out.print(report.kept_table(content["kept"], limit=_KEPT_REASONS))
    out.print(
        f"{content['groups_pruned']} of {content['groups']} groups pruned, {len(content['edits'])} edits, "
        f"{content['seconds']:.1f} s"
    )
    for note in content["notes"]:
        out.print(f"note: {note}", soft_wrap=True)
    if content["repaired"] is not None:
        out.print(report.repair_line(content["repaired"]), soft_wrap=True)
    out.print(report.proof_line(content["verification"]), soft_wrap=True)
    out.print(f"wrote {content['output']} and {content['plan']}", soft_wrap=True)


def _verify(options: argparse.Namespace) -> None:
    plan = options.plan or _beside(options.pruned)
    _require_outputs(options, reads=[options.original, options.pruned, plan])
    original = load(options.original)
    source = _source(options.data, original, options)
    feeds = None if source is None else data_feeds(original, source, _VERIFY_BATCHES)
    found = verify_files(original, load(options.pruned), load_plan(plan), feeds)
    content = {"is_replay": found.is_replay, "trained": list(found.trained), **report.comparison(found.comparison)}
    if _write_json(options, content):
        return
    if found.is_replay:
        out.print("the file is, byte for byte, what the plan makes of the original", soft_wrap=True)
    else:
        out.print(
            "structure proven: the file is what the plan makes of the original; "
            f"weights whose values were trained since: {len(found.trained)}",
            soft_wrap=True,
        )
    out.print(report.proof_line(content), soft_wrap=True)


def _apply(options: argparse.Namespace) -> None:
    _require_outputs(options, options.output, reads=[options.model, options.plan])
    pruned = apply(load(options.model), load_plan(options.plan))
    pruned.model.save(options.output, overwrite=options.force, weights=options.weights)
    out.print(f"wrote {options.output}", soft_wrap=True)


def _distill(options: argparse.Namespace) -> None:
    _require_outputs(options, options.output, _recipe_path(options), reads=[options.teacher, options.student])
    distill = _distill_module()
    check_metric(options.metric)
    models = {"teacher": load(options.teacher), "student": load(options.student)}
    source = _required_source(models["student"], options)
    settings = distill.DistillOptions(**_training(options))
    overlap = _overlap(options, models["teacher"])
    checkpoint = _checkpoint(options)
    _require_new_run(options, checkpoint)
    watched = _watched(options, models["student"])
    accuracies = _evaluated(options, models, models["teacher"]) if is_first_process() else {}
    teacher, student = (model.complete_proto() for model in models.values())
    with _progress(BarColumn()) as progress:
        task = progress.add_task("distill", total=None, visible=is_first_process())
        result = distill.distill(
            teacher,
            student,
            source,
            settings,
            lambda now: progress.update(
                task,
                total=now.steps,
                completed=now.step,
                description=f"distill, step {now.step} of {now.steps}, loss {now.loss:.4f}",
            ),
            overlap=overlap,
            watched=watched,
            traces=_traces(options),
        )
    if not is_first_process():
        return
    made = distill.trained(models["student"], result)
    accuracies |= _evaluated(options, {"distilled": made}, models["teacher"])
    made.save(options.output, overwrite=options.force, weights=options.weights)
    recipe.write(_recipe_path(options), options, overwrite=options.force)
    checkpoint.unlink(missing_ok=True)
    content = distill.summary(result) | {"output": str(options.output)}
    content |= {"metric": options.metric, **accuracies} if accuracies else {}
    if not _write_json(options, content):
        _print_distilled(content)


def _compress(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    plan_path = options.plan or _beside(options.output)
    _require_outputs(options, options.output, plan_path, _recipe_path(options), reads=[options.model])
    check_metric(options.metric)
    scorer_of(options.score)
    _distill_module()
    from cpd_onnx.passes.interleave import Interleave, of_round

    model = load(options.model)
    chosen = {
        name: getattr(options, name) for name in ("score", "rounds", "samples", "score_labels", "repair_samples")
    } | {"repair": options.repair is not False}
    step = Interleave(**_training(options), **chosen, **_wish(options))
    state = State(model, model, dict(options.input_shape), _required_source(model, options))
    traces = _traces(options)
    paths = [of_round(traces, number).checkpoint for number in range(1, step.rounds + 1)]
    checkpoints = [path for path in paths if path is not None]
    _require_new_run(options, *checkpoints)
    rounds: list[dict[str, Any]] = []
    with _progress(BarColumn()) as progress:
        task = progress.add_task("comb", total=None, visible=is_first_process())
        state = step.run(
            state,
            lambda number, result: rounds.append({"round": number, "seconds": round(result.seconds, 2)}),
            lambda now: progress.update(
                task,
                total=now.steps,
                completed=now.step,
                description=f"round {len(rounds) + 1} of {step.rounds}, step {now.step}, loss {now.loss:.4f}",
            ),
            watched=_watched(options, model),
            traces=traces,
        )
    if not is_first_process():
        return
    before = report.size_of(model, options.model)
    plan = state.need("plan", "interleave")
    found = verify_files(model, state.model, plan)
    _write_both(options, state.model, plan, plan_path)
    recipe.write(_recipe_path(options), options, overwrite=options.force)
    for path in checkpoints:
        path.unlink(missing_ok=True)
    state = replace(state, verification=found.comparison)
    content = report.result(state, time.perf_counter() - started)
    content |= {"output": str(options.output), "plan": str(plan_path), "training": state.distilled, "rounds": rounds}
    content["bytes"] = {"before": before}
    content["bytes"]["after"] = report.size_of(state.model, options.output)
    accuracies = _evaluated(options, {"original": model, "compressed": state.model}, model)
    content |= {"metric": options.metric, **accuracies} if accuracies else {}
    if not _write_json(options, content):
        _print_pruned(content)
        for name, value in accuracies.items():
            out.print(f"{name} {options.metric} {value:.4f}")


def _wish(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `Allocate` that the command line gives."""
    kind, fraction = options.target
    if kind not in KINDS:
        raise TargetError(f"no target is called {kind!r}: choose one of {', '.join(KINDS)}")
    names = [
        "spread", "multiple", "min_share", "max_share", "latency_threads", "latency_batch", "latency_provider",
        "cost_table",
    ]  # fmt: skip  # a table
    return {kind: fraction, **{name: getattr(options, name) for name in names}, "keep": tuple(options.keep)} | {
        "widths": tuple(options.width)
    }


def _checkpoint(options: argparse.Namespace) -> Path:
    path: Path | None = options.checkpoint
    return path or Path(f"{options.output}.checkpoint")


def _traces(options: argparse.Namespace) -> Any:
    """What the run leaves behind while it goes on."""
    return _distill_module().Traces(
        _checkpoint(options), options.checkpoint_seconds, options.resume, options.log, options.tensorboard
    )


def _require_new_run(options: argparse.Namespace, *checkpoints: Path) -> None:
    """Refuse to lose what an unfinished run has done."""
    for path in checkpoints:
        if path.exists() and not (options.resume or options.force):
            raise CpdError(f"{path} holds an unfinished run: go on with --resume, or start anew with --force")


def _watched(options: argparse.Namespace, model: Model) -> Any:
    """The data to judge the student on while it trains, if any."""
    source = _source(options.watch, model, options)
    if source is None:
        return None
    return _distill_module().Watched(source, options.metric, options.watch_every, options.patience)


def _training(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `DistillOptions` that the command line gives."""
    return {name: getattr(options, name) for name in TRAINING} | {
        "freeze": tuple(options.freeze),
        "losses": dict(_pairs(options.loss, _loss_kind)),
        "output_weights": dict(_pairs(options.weight, not_negative)),
    }


def _pairs(texts: Sequence[str], read: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
    """OUTPUT=VALUE options; the last = counts, names may hold others."""
    for text in texts:
        name, sign, value = text.rpartition("=")
        if not sign or not name:
            raise CpdError(f"{text!r} should be OUTPUT=VALUE")
        try:
            yield name, read(value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise CpdError(f"{text!r}: {error}") from error


def _loss_kind(text: str) -> str:
    if text not in LOSSES:
        raise ValueError(f"a loss is one of {', '.join(LOSSES)}")
    return text


def _overlap(options: argparse.Namespace, teacher: Model) -> Any:
    """What both models have, from the plan beside the student; nothing where there is none and none is needed."""
    path = options.plan or _beside(options.student)
    if not path.exists() and options.plan is None and not options.hidden:
        return None
    combed, kept = planned(teacher, load_plan(path))
    return _distill_module().overlap_of(combed, kept, options.hidden)


def is_first_process() -> bool:
    """Whether this is the only process of a training run, or the first one that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _print_distilled(content: dict[str, Any]) -> None:
    values = {"steps": f"{content['steps']}, {content['seconds']:.1f} s on {content['device']}"}
    if content["steps"]:
        kinds = ", ".join(f"{name} by {kind}" for name, kind in content["losses"].items())
        values = {"loss": f"{content['first_loss']:.4f} -> {content['last_loss']:.4f} ({kinds})"} | values
    if content["restored"]:
        values["batch norms put back"] = f"{content['restored']}, and folded again"
    if content["compared"]:
        values["inner tensors compared"] = ", ".join(content["compared"])
    for name in ("teacher", "student", "distilled"):
        if name in content:
            values[f"{name} {content['metric']}"] = f"{content[name]:.4f}"
    out.print(report.values_table(values))
    out.print(f"wrote {content['output']}", soft_wrap=True)


def _distill_module() -> ModuleType:
    try:
        from cpd_onnx.passes import distill
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UnsupportedError("distillation needs torch: pip install 'cpd-onnx[torch]'") from error
    return distill


def _evaluated(options: argparse.Namespace, models: dict[str, Model], teacher: Model) -> dict[str, float]:
    """What the models score on the data for that, by name; nothing where there is no such data."""
    source = _source(options.eval, teacher, options)
    if source is None:
        return {}
    reference = teacher.complete_proto() if options.metric in OF_TWO_MODELS else None
    return {
        name: evaluate(model.complete_proto(), source, options.metric, reference=reference)
        for name, model in models.items()
    }


def _bench(options: argparse.Namespace) -> None:
    _require_outputs(options, reads=options.models)
    if options.plot is not None:
        plots.require(options.plot)
    first = _read(options.models[0], options.input_shape)
    source = _source(options.data, first, options)
    feed = None if source is None else next(iter(data_feeds(first, source, 1)))
    settings = [
        Setting(batch, threads, provider)
        for provider in options.provider or [Setting.provider]
        for threads in options.threads
        for batch in options.batch
    ]
    found = bench(
        options.models,
        settings=settings,
        seconds=options.seconds,
        input_shapes=dict(options.input_shape),
        feed=feed,
    )
    if options.plot is not None:
        plots.bench(found, options.plot, overwrite=options.force)
    if not _write_json(options, found.as_json()):
        out.print(report.timings_table(found.timings))
        out.print(report.profiles_table(found))
        out.print(report.memory_table(found.memory))
        if options.plot is not None:
            out.print(f"wrote {options.plot}", soft_wrap=True)


def _latency(options: argparse.Namespace) -> None:
    _require_outputs(options, options.output, reads=[options.model])
    shapes = dict(options.input_shape)
    combed = comb(_read(options.model, options.input_shape), shapes)
    setting = Setting(options.latency_batch, options.latency_threads, options.latency_provider)
    with _progress(BarColumn()) as progress:
        task = progress.add_task("measure", total=None)
        table = measure_table(
            Clock(combed, setting, shapes),
            seed=options.seed,
            observer=lambda done, of: progress.update(task, completed=done, total=of),
        )
    table.save(options.output)
    if not _write_json(options, table.as_json()):
        out.print(report.latency_table(table))
        out.print(f"wrote {options.output}", soft_wrap=True)


def _demo(options: argparse.Namespace) -> None:
    _require_outputs(options)
    kind, fraction = options.target
    with _progress() as progress:
        task = progress.add_task("", total=None)
        content = demo.run(
            demo.Settings(kind, fraction, options.epochs, options.seed),
            out=options.out,
            overwrite=options.force,
            observer=lambda what: progress.update(task, description=what),
        )
    if not _write_json(options, content):
        out.print(demo.table(content))
        for line in demo.lines(content):
            out.print(line, soft_wrap=True)


def _operators(options: argparse.Namespace) -> None:
    names = unsupported_operators() if options.missing else supported_operators()
    out.print("\n".join(names), soft_wrap=True)


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "inspect": _inspect, "prune": _prune, "verify": _verify, "apply": _apply, "distill": _distill,
    "compress": _compress, "bench": _bench, "latency": _latency, "demo": _demo, "operators": _operators,
}  # fmt: skip  # a table


# Files.


def _read(path: Path, shapes: Sequence[tuple[str, tuple[int, ...]]] = ()) -> Model:
    """Load a model; a shape for an input that it has not is an error."""
    model = load(path)
    known = {info.name for info in model.graph.input}
    for name, _ in shapes:
        if name not in known:
            raise DataError(f"--input-shape names {name!r}, but the inputs are {', '.join(sorted(known))}")
    return model


def _source(data: str | None, model: Model, options: argparse.Namespace) -> Source | None:
    images = ImageOptions(
        options.image_mean, options.image_std, options.image_scale, options.image_order, options.image_size,
        options.image_resize,
    )  # fmt: skip  # the fields in order
    if data == SYNTHETIC:
        return Synthetic(fold(model, dict(getattr(options, "input_shape", ()))))
    return None if data is None else open_source(data, model.proto, images)


def _required_source(model: Model, options: argparse.Namespace) -> Source:
    source = _source(options.data, model, options)
    if source is None:
        raise DataError(f"training needs inputs: give --data, {DATA}")
    return source


def _recipe_path(options: argparse.Namespace) -> Path:
    """Where the options that made a file are put on record."""
    output: Path = options.output
    return output.with_name(f"{output.name}.recipe.toml")


def _beside(path: Path) -> Path:
    """Where the plan of a file lies."""
    return path.with_name(f"{path.name}.plan.json")


def _require_outputs(options: argparse.Namespace, *paths: Path, reads: Sequence[Path] = ()) -> None:
    """Refuse before the work starts: files that are there, folders that are not, one file for two things.

    Only the model that is written may, with --force, replace one that is read.
    """
    beside = [getattr(options, name, None) for name in ("json", "plot")]
    written = [*paths, *(Path(name) for name in beside if name not in (None, "-"))]
    for place, path in enumerate(written):
        require_free(path, overwrite=options.force)
        others = [*written[:place], *(reads if place or not paths else ())]
        if any(path.absolute() == other.absolute() for other in others):
            raise ModelError(f"{path} is named for two things: choose another name")


def _write_both(options: argparse.Namespace, model: Model, plan: Plan, plan_path: Path) -> None:
    """Write the model and its plan; if one cannot be written, neither is, and what was there stays."""
    require_free(plan_path, overwrite=options.force)
    with locked(options.output.parent), replacing(plan_path) as stream:
        stream.write(plan.dumps().encode())
        model.save(options.output, overwrite=options.force, weights=options.weights)


def _write_json(options: argparse.Namespace, content: dict[str, Any]) -> bool:
    """Write the result as JSON if asked to; whether that went to standard output."""
    if not options.json:
        return False
    text = json.dumps(content, indent=1) + "\n"
    if options.json == "-":
        sys.stdout.write(text)
        return True
    write_atomically(Path(options.json), text.encode())
    return False


def _progress(*columns: BarColumn) -> Progress:
    """A line on a terminal that says what is being done; nothing elsewhere."""
    shown = (SpinnerColumn(), TextColumn("{task.description}"), *columns, TimeElapsedColumn())
    return Progress(*shown, console=err, transient=True, disable=not err.is_terminal)
