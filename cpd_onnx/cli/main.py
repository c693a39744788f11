"""What the commands do: they call, print and write."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn

from cpd_onnx.budget.latency import Clock, measure_table
from cpd_onnx.budget.widths import held_groups
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.cli import demo
from cpd_onnx.cli import deploy as cli_deploy
from cpd_onnx.cli import verify as cli_verify
from cpd_onnx.cli.arguments import DATA, command_line
from cpd_onnx.cli.compress import compress, page_kinds, write_page
from cpd_onnx.cli.console import (
    checkpoint_of,
    distill_module,
    evaluated,
    fault_of,
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
    required_source,
    saying_what_is_left,
    source_of,
    traces_of,
    training_of,
    watched_on,
    wish_of,
    write_both,
    write_json,
)
from cpd_onnx.cli.reproduce import reproduce
from cpd_onnx.cli.sweep import sweep
from cpd_onnx.data.metrics import check_metric
from cpd_onnx.errors import CpdError, DataError, InconclusiveError, OutputError, ProofError, StoppedError
from cpd_onnx.io import trust
from cpd_onnx.io.files import commit_together, locked_folder
from cpd_onnx.io.streams import PIPE_CLOSED, flush_stdout, print_error, redirect_to_null, write_stdout
from cpd_onnx.ir.model import Model, load
from cpd_onnx.passes import sensitivity
from cpd_onnx.passes.allocate import Allocate
from cpd_onnx.passes.comb import Comb
from cpd_onnx.passes.fold import Fold
from cpd_onnx.passes.iterate import Iterate
from cpd_onnx.passes.prune import Prune, apply
from cpd_onnx.passes.repair import Repair
from cpd_onnx.passes.score import Score
from cpd_onnx.passes.verify import Verify
from cpd_onnx.pipeline import pipeline
from cpd_onnx.proof.files import data_feeds
from cpd_onnx.report import figures as plots
from cpd_onnx.report import tables as report
from cpd_onnx.rewrite.plan import Plan, load_plan, planned
from cpd_onnx.rules import supported_operators, unsupported_operators
from cpd_onnx.runtime.bench import Setting, bench
from cpd_onnx.scores.registry import score, scorer_of
from cpd_onnx.summary import Summary
from cpd_onnx.workflow import recipe

_EXIT_CODES: dict[type[Exception], int] = {InconclusiveError: 4, ProofError: 5}
"""Of what is no mere error: two of the three verdicts of a proof."""
_LINE = 1000
"""Characters of a complaint."""
_NO_MEMORY = re.compile("can't allocate memory|bad_alloc|can't start new thread|failed to allocate", re.IGNORECASE)
"""What libraries say in exceptions of other kinds when memory runs out."""
_MODELS = ("model", "original", "pruned", "teacher", "student")
"""Arguments that are models."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code.

    0: done, and what was to be proved is; 1: something that the user can act on; 4: the proof is inconclusive; 5: the
    proof says that the result is wrong; 130: a signal ended it; 141, as of a program that SIGPIPE ends: nobody reads
    what it prints. argparse ends with 2 where the command line makes no sense.
    """
    stopped: SystemExit | None = None
    try:
        try:
            code = _run(arguments)
        except SystemExit as error:  # of the parser: a usage error, or --help
            code, stopped = 1, error
        flush_stdout()
    except OutputError as error:
        redirect_to_null(sys.stdout)
        if error.is_pipe:
            return PIPE_CLOSED
        print_error(f"error: {error}")
        return 1
    if stopped is not None:
        raise stopped
    return code


def _run(arguments: Sequence[str] | None) -> int:
    options = None
    try:
        options = _parsed(arguments)
        _COMMANDS[options.run](options)
    except OutputError:
        raise
    except StoppedError as error:
        print_error(_one_line(str(error)))
        return 130
    except KeyboardInterrupt as error:
        print_error(_one_line("; ".join(["stopped", *getattr(error, "__notes__", ())])))
        return 130
    except Exception as error:
        if getattr(options, "verbose", False):
            _show_traceback(error)
        print_error(f"error: {_one_line(_complaint(error, options))}")
        return next((code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)), 1)
    return 0


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, those of a recipe included."""
    parser = command_line()
    options = parser.parse_args(arguments)
    if getattr(options, "recipe", None) is None:
        return options
    said = recipe.read(options.recipe, options.command)
    options.command.set_defaults(**said)
    options = parser.parse_args(arguments)
    trust.take(options, said, options.recipe, options.trust)
    return options


def _complaint(error: Exception, options: argparse.Namespace | None) -> str:
    """What went wrong, and what else there is to know."""
    more = getattr(error, "__notes__", ())
    return "; ".join([_reason(error, options), *more])


def _reason(error: Exception, options: argparse.Namespace | None) -> str:
    if isinstance(error, CpdError):
        return str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return "there is not enough memory for this model"
    if isinstance(error, ImportError) or (isinstance(error, OSError) and "shared object" in str(error)):
        return f"a library cannot be loaded, {error}: is it whole, and is there enough memory (ulimit -v)?"
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return f"{error.filename}: {reason}" if error.filename is not None else reason
    fault = _fault(options) if options is not None else None
    if fault:
        return fault
    return f"a defect of ours, {type(error).__name__}: {error}; please report it, with what --verbose prints"


def _show_traceback(error: Exception) -> None:
    for line in "".join(traceback.format_exception(error)).splitlines():
        print_error(line)


def _fault(options: argparse.Namespace) -> str | None:
    """What is wrong with the models that a command was given, if that is why it failed."""
    given = vars(options)
    try:
        return fault_of(given.get("models") or [given[name] for name in _MODELS if given.get(name) is not None])
    except Exception:  # what failed may fail here as well
        return None


def _one_line(text: str) -> str:
    """The text without line breaks, and not without end: what is too much is left out of the middle."""
    line = " ".join(text.split())
    return line if len(line) <= _LINE else f"{line[: _LINE // 2]}…{line[-_LINE // 2 + 1 :]}"


# What the commands do.


def _inspect(options: argparse.Namespace) -> None:
    require_outputs(options)
    if options.plot is not None:
        plots.require(options.plot)
    if options.sensitivity != (options.data is not None) or (options.plot and not options.sensitivity):
        raise DataError(f"sensitivity is measured on samples: give --sensitivity and --data, {DATA}")
    model = read_model(options.model, options.input_shape)
    combed = comb(model, dict(options.input_shape))
    content = report.inspection(combed, sorted(held_groups(combed, options.keep)))
    found = _sensitivity(combed, options) if options.sensitivity else {}
    if found:
        content["sensitivity"] = {"error": sensitivity.ERROR, "groups": sensitivity.as_json(found)}
    if options.plot and found:
        curves = {name: [(p.width, p.error) for p in points] for name, points in found.items()}
        plots.sensitivity(curves, options.plot, error_name=sensitivity.ERROR, overwrite=options.force)
    if write_json(options, content):
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
    source = source_of(options.data, combed.folded.model, options)
    assert source is not None
    chosen = sensitivity.SensitivityOptions(options.shares, options.score, options.samples, options.repair)
    with progress_line(BarColumn()) as progress:
        task = progress.add_task("score", total=len(combed.groups))
        scores = score(combed, options.score, data=source)
        return sensitivity.sensitivity(
            combed, scores, source, chosen,
            observer=lambda group: progress.update(task, advance=1, description=group.name),
        )  # fmt: skip  # what and how


def _prune(options: argparse.Namespace) -> None:
    plan_path = options.plan or plan_path_of(options.output)
    require_outputs(options, options.output, plan_path)
    steps = _pruning(options)
    started = time.perf_counter()
    model = read_model(options.model, options.input_shape)
    require_apart(options, model)
    with progress_line() as progress:
        task = progress.add_task("read", total=None)
        state = pipeline.run(
            steps,
            model,
            data=source_of(options.data, model, options),
            input_shapes=dict(options.input_shape),
            observer=lambda name, when: progress.update(task, description=name),
        )
    before = report.size_of(model, options.model)
    plan = state.need("plan", "prune")
    write_both(options, state.model, plan, plan_path)
    content = report.result(state, time.perf_counter() - started)
    content |= {"output": str(options.output), "plan": str(plan_path)}
    content["notes"] += objections(options, state.model)
    content["bytes"] = {"before": before, "after": report.size_of(state.model, options.output)}
    if not write_json(options, content):
        _print_pruned(content)


def _pruning(options: argparse.Namespace) -> list[pipeline.Pass]:
    """The passes of `prune`: with data, channels are chosen by what a repair cannot make up for, and repaired."""
    has_data = options.data is not None
    repairs = has_data if options.repair is None else options.repair
    if repairs and not has_data:
        raise DataError(f"a repair looks at samples: give --data, {DATA}")
    kind = options.score or ("reconstruction" if has_data else "l2")
    wish = wish_of(options)
    if kind == "reconstruction" and wish["spread"] is None:
        wish["spread"] = "optimal"
    step = pipeline.make("allocate", wish)
    assert isinstance(step, Allocate)
    _ = step.budget  # refuses what makes no sense before the work starts
    scorer_of(kind)
    proof: list[pipeline.Pass] = [] if options.no_verify else [Verify(allow_inconclusive=options.allow_inconclusive)]
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
        out.print(report.kept_table(content["kept"], limit=report.FEW_REASONS))
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


def _apply(options: argparse.Namespace) -> None:
    require_outputs(options, options.output, reads=[options.plan])
    model, plan = load(options.model), load_plan(options.plan)
    require_apart(options, model)
    pruned = apply(model, plan)
    pruned.model.save(options.output, overwrite=options.force, weights=options.weights)
    bytes_ = {"before": report.size_of(model, options.model), "after": report.size_of(pruned.model, options.output)}
    content = {"output": str(options.output), "plan": str(options.plan), "edits": len(pruned.edits), "bytes": bytes_}
    content["without_values"] = list(plan.values)
    if not write_json(options, content):
        if plan.values:
            said = f"{len(plan.values)} weights that were refitted or trained later"
            out.print(f"note: the plan names {said}; here they have the original's values", soft_wrap=True)
        out.print(f"wrote {options.output}", soft_wrap=True)


def _distill(options: argparse.Namespace) -> None:
    plan = _student_plan(options)
    places = [options.output, recipe_path_of(options), *([] if plan is None else [plan_path_of(options.output)])]
    require_outputs(options, *places, reads=[options.plan or plan_path_of(options.student)])
    distill = distill_module()
    check_metric(options.metric)
    recipe.text(options)  # refuses now what cannot be put on record at the end
    models = {"teacher": load(options.teacher), "student": load(options.student)}
    require_apart(options, *models.values())
    source = required_source(models["student"], options)
    settings = distill.DistillOptions(**training_of(options))
    overlap = None
    if plan is not None:
        overlap = distill.overlap_of(*planned(models["teacher"], plan), options.hidden)
    checkpoint = checkpoint_of(options)
    require_new_run(options, checkpoint)
    watched = watched_on(options, models["student"])
    accuracies = evaluated(options, models, models["teacher"]) if is_first_process() else {}
    teacher, student = (model.complete_proto() for model in models.values())
    with saying_what_is_left(lambda: [checkpoint]):
        with progress_line(BarColumn()) as progress:
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
                traces=traces_of(options),
            )
        if not is_first_process():
            return
        made = distill.trained(models["student"], result)
        accuracies |= evaluated(options, {"distilled": made}, models["teacher"])
        with locked_folder(options.output.parent), commit_together():
            _write_distilled(options, models["student"], made, plan)
    checkpoint.unlink(missing_ok=True)
    content = distill.summary(result) | {"output": str(options.output)}
    content |= {"plan": str(plan_path_of(options.output))} if plan is not None else {}
    content |= {"metric": options.metric, **accuracies} if accuracies else {}
    if not write_json(options, content):
        _print_distilled(content)


def _student_plan(options: argparse.Namespace) -> Plan | None:
    """The plan that the student was made by; None where there is none and none is needed."""
    path = options.plan or plan_path_of(options.student)
    if not path.exists() and options.plan is None and not options.hidden:
        return None
    return load_plan(path)


def _write_distilled(options: argparse.Namespace, student: Model, made: Model, plan: Plan | None) -> None:
    """Write the trained model, the options, and a plan that names the trained weights, if the student has one."""
    if plan is None:
        made.save(options.output, overwrite=options.force, weights=options.weights)
    else:
        write_both(options, made, plan.with_values(student, made), plan_path_of(options.output))
    recipe.write(recipe_path_of(options), options, overwrite=options.force)


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
    out.print(report.printed(Summary.of(values)))
    written = [content[name] for name in ("output", "plan") if name in content]
    out.print(f"wrote {' and '.join(written)}", soft_wrap=True)


def _bench(options: argparse.Namespace) -> None:
    require_outputs(options)
    if options.plot is not None:
        plots.require(options.plot)
    first = read_model(options.models[0], options.input_shape)
    source = source_of(options.data, first, options)
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
    if not write_json(options, found.as_json()):
        out.print(report.printed(found.latency_summary()))
        out.print(report.profiles_table(found))
        out.print(report.printed(found.memory_summary()))
        if options.plot is not None:
            out.print(f"wrote {options.plot}", soft_wrap=True)


def _latency(options: argparse.Namespace) -> None:
    require_outputs(options, options.output)
    model = read_model(options.model, options.input_shape)
    require_apart(options, model)
    combed = comb(model, dict(options.input_shape))
    setting = Setting(options.latency_batch, options.latency_threads, options.latency_provider)
    with progress_line(BarColumn()) as progress:
        task = progress.add_task("measure", total=None)
        table = measure_table(
            Clock(combed, setting),
            seed=options.seed,
            observer=lambda done, of: progress.update(task, completed=done, total=of),
        )
    table.save(options.output)
    if not write_json(options, table.as_json()):
        out.print(report.latency_table(table))
        out.print(f"wrote {options.output}", soft_wrap=True)


def _demo(options: argparse.Namespace) -> None:
    require_outputs(options)
    folder = options.out or Path(tempfile.mkdtemp(prefix="cpd-onnx-demo-"))
    pages = [folder / f"report.{kind}" for kind in page_kinds()]
    if options.out is not None and options.out.is_dir():
        require_outputs(options, *pages)
    kind, fraction = options.target
    with progress_line() as progress:
        task = progress.add_task("", total=None)
        content = demo.run(
            demo.Settings(kind, fraction, options.epochs, options.seed),
            out=folder,
            overwrite=options.force,
            observer=lambda what: progress.update(task, description=what),
        )
    for page in pages:
        write_page(page, content["report"])
    if not write_json(options, content):
        to_read = next((page for page in pages if page.suffix == ".html"), pages[0])
        out.print(demo.table(content))
        for line in (*demo.lines(content), f"a report to read: {to_read}"):
            out.print(line, soft_wrap=True)


def _operators(options: argparse.Namespace) -> None:
    require_outputs(options)
    names = unsupported_operators() if options.missing else supported_operators()
    if not write_json(options, {"followed": not options.missing, "operators": list(names)}):
        for name in names:
            out.print(name, soft_wrap=True)


def _completion(options: argparse.Namespace) -> None:
    from cpd_onnx.cli import completion  # and the library behind it, which nothing else takes

    write_stdout(completion.script(options.shell))


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "inspect": _inspect, "prune": _prune, "verify": cli_verify.run, "apply": _apply, "distill": _distill,
    "compress": compress, "reproduce": reproduce, "sweep": sweep, "deploy": cli_deploy.run, "bench": _bench,
    "latency": _latency, "demo": _demo, "operators": _operators, "completion": _completion,
}  # fmt: skip  # a table
