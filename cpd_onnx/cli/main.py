"""What the commands do: they parse, call the workflow and print."""

from __future__ import annotations

import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cpd_onnx.budget.latency import Clock, measure_table
from cpd_onnx.budget.widths import held_groups
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.cli import compress as cli_compress
from cpd_onnx.cli import demo
from cpd_onnx.cli import deploy as cli_deploy
from cpd_onnx.cli import sweep as cli_sweep
from cpd_onnx.cli import verify as cli_verify
from cpd_onnx.cli.arguments import command_line, request_of
from cpd_onnx.cli.console import fault_of, observed, out, printed_json
from cpd_onnx.data.open import FORMS
from cpd_onnx.errors import CpdError, DataError, InconclusiveError, OutputError, ProofError, StoppedError
from cpd_onnx.io.files import commit_together
from cpd_onnx.io.streams import PIPE_CLOSED, flush_stdout, print_error, redirect_to_null, write_stdout
from cpd_onnx.options import picked
from cpd_onnx.passes import sensitivity
from cpd_onnx.proof.files import data_feeds
from cpd_onnx.report import figures as plots
from cpd_onnx.report import tables as report
from cpd_onnx.rules import supported_operators, unsupported_operators
from cpd_onnx.runtime.bench import Setting, bench
from cpd_onnx.scores.registry import score
from cpd_onnx.summary import Summary
from cpd_onnx.workflow.compress_files import page_kinds, write_page
from cpd_onnx.workflow.distill import distill, is_first_process
from cpd_onnx.workflow.places import read_model, require_apart, require_outputs, source_of, write_json
from cpd_onnx.workflow.prune import apply, prune
from cpd_onnx.workflow.reproduce import reproduce, require_same
from cpd_onnx.workflow.requests import (
    Apply,
    Bench,
    Completion,
    Compress,
    Demo,
    Deploy,
    Distill,
    Inspect,
    Latency,
    Operators,
    Prune,
    Reproduce,
    Sweep,
    VerifyFile,
)

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
    typed, request = None, None
    try:
        typed = command_line().parse_args(arguments)
        request = request_of(typed)
        _COMMANDS[type(request)](request)
    except OutputError:
        raise
    except StoppedError as error:
        print_error(_one_line(str(error)))
        return 130
    except KeyboardInterrupt as error:
        print_error(_one_line("; ".join(["stopped", *getattr(error, "__notes__", ())])))
        return 130
    except Exception as error:
        if getattr(typed, "verbose", False):
            _show_traceback(error)
        print_error(f"error: {_one_line(_complaint(error, request))}")
        return next((code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)), 1)
    return 0


def _complaint(error: Exception, request: Any) -> str:
    """What went wrong, and what else there is to know."""
    more = getattr(error, "__notes__", ())
    return "; ".join([_reason(error, request), *more])


def _reason(error: Exception, request: Any) -> str:
    if isinstance(error, CpdError):
        return str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return "there is not enough memory for this model"
    if isinstance(error, ImportError) or (isinstance(error, OSError) and "shared object" in str(error)):
        return f"a library cannot be loaded, {error}: is it whole, and is there enough memory (ulimit -v)?"
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return f"{error.filename}: {reason}" if error.filename is not None else reason
    fault = _fault(request) if request is not None else None
    if fault:
        return fault
    return f"a defect of ours, {type(error).__name__}: {error}; please report it, with what --verbose prints"


def _show_traceback(error: Exception) -> None:
    for line in "".join(traceback.format_exception(error)).splitlines():
        print_error(line)


def _fault(request: Any) -> str | None:
    """What is wrong with the models that a command was given, if that is why it failed."""
    given = vars(request)
    try:
        return fault_of(given.get("models") or [given[name] for name in _MODELS if given.get(name) is not None])
    except Exception:  # what failed may fail here as well
        return None


def _one_line(text: str) -> str:
    """The text without line breaks, and not without end: what is too much is left out of the middle."""
    line = " ".join(text.split())
    return line if len(line) <= _LINE else f"{line[: _LINE // 2]}…{line[-_LINE // 2 + 1 :]}"


# What the commands do.


def _inspect(request: Inspect) -> None:
    require_outputs(request)
    if request.plot is not None:
        plots.require(request.plot)
    if request.sensitivity != (request.data is not None) or (request.plot and not request.sensitivity):
        raise DataError(f"sensitivity is measured on samples: give --sensitivity and --data, {FORMS}")
    model = read_model(request.model, request.input_shapes)
    combed = comb(model, request.input_shapes)
    content = report.inspection(combed, sorted(held_groups(combed, request.keep)))
    found = _sensitivity(combed, request) if request.sensitivity else {}
    if found:
        content["sensitivity"] = {"error": sensitivity.ERROR, "groups": sensitivity.as_json(found)}
    with commit_together():
        if request.plot and found:
            curves = {name: [(p.width, p.error) for p in points] for name, points in found.items()}
            plots.sensitivity(curves, sensitivity.ERROR).write(request.plot, overwrite=request.force)
        write_json(request, content)
    if printed_json(request, content):
        return
    out.print(f"{request.model.name}: {report.costs_line(content['costs'])}", soft_wrap=True)
    out.print(report.groups_table(content))
    out.print(report.frozen_table(content["kept"]))
    out.print(f"{100 * content['prunable_fraction']:.1f} % of the weights lie on a prunable axis")
    for operator, node in content["without_rule"].items():
        out.print(f"no rule for {operator} (at {node}): its channels are kept", soft_wrap=True)
    if found:
        out.print(report.sensitivity_table(content["sensitivity"]))


def _sensitivity(combed: Combed, request: Inspect) -> dict[str, tuple[sensitivity.Point, ...]]:
    """The errors of the outputs at some widths of each group."""
    source = source_of(request.data, combed.folded.model, request)
    assert source is not None
    chosen = picked(sensitivity.SensitivityOptions, request)
    total = len(combed.groups)
    with observed("score") as observer:
        scores = score(combed, request.score, data=source)
        names = iter(range(1, total + 1))
        return sensitivity.sensitivity(
            combed, scores, source, chosen, observer=lambda group: observer(group.name, next(names), total)
        )


def _prune(request: Prune) -> None:
    with observed("read") as observer:
        content = prune(request, observer)
    if not printed_json(request, content):
        _print_pruned(content)


def _print_pruned(content: dict[str, Any]) -> None:
    out.print(report.costs_table(content))
    if any(entry["weights"] for entry in content["kept"]):
        out.print(report.frozen_table(content["kept"], limit=report.FEW_REASONS))
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


def _apply(request: Apply) -> None:
    content = apply(request)
    if not printed_json(request, content):
        if content["without_values"]:
            said = f"{len(content['without_values'])} weights that were refitted or trained later"
            out.print(f"note: the plan names {said}; here they have the original's values", soft_wrap=True)
        out.print(f"wrote {request.output}", soft_wrap=True)


def _distill(request: Distill) -> None:
    with observed("distill", visible=is_first_process()) as observer:
        content = distill(request, observer)
    if content is not None and not printed_json(request, content):
        _print_distilled(content)


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
    out.print(report.summary_table(Summary.of(values)))
    written = [content[name] for name in ("output", "plan") if name in content]
    out.print(f"wrote {' and '.join(written)}", soft_wrap=True)


def _reproduce(request: Reproduce) -> None:
    with observed("compare") as observer:
        content = reproduce(request, observer)
    if not printed_json(request, content):
        for row in content["files"]:
            out.print(f"{row['file']}: {'the same bytes' if row['same'] else 'OTHER BYTES'}", soft_wrap=True)
    require_same(content)


def _bench(request: Bench) -> None:
    require_outputs(request)
    if request.plot is not None:
        plots.require(request.plot)
    first = read_model(request.models[0], request.input_shapes)
    source = source_of(request.data, first, request)
    feed = None if source is None else next(iter(data_feeds(first, source, 1)))
    settings = [
        Setting(batch, threads, provider)
        for provider in request.provider or [Setting.provider]
        for threads in request.threads
        for batch in request.batch
    ]
    found = bench(
        request.models,
        settings=settings,
        seconds=request.seconds,
        input_shapes=dict(request.input_shapes),
        feed=feed,
    )
    with commit_together():
        if request.plot is not None:
            plots.bench(found).write(request.plot, overwrite=request.force)
        write_json(request, found.as_json())
    if not printed_json(request, found.as_json()):
        out.print(report.summary_table(found.latency_summary()))
        out.print(report.profiles_table(found))
        out.print(report.summary_table(found.memory_summary()))
        if request.plot is not None:
            out.print(f"wrote {request.plot}", soft_wrap=True)


def _latency(request: Latency) -> None:
    written = require_outputs(request, request.output)
    model = read_model(request.model, request.input_shapes)
    require_apart(written, model)
    combed = comb(model, request.input_shapes)
    setting = Setting(request.latency_batch, request.latency_threads, request.latency_provider)
    with observed("measure") as observer:
        table = measure_table(
            Clock(combed, setting),
            seed=request.seed,
            observer=lambda done, of: observer("measure", done, of),
        )
    with commit_together():
        table.save(request.output)
        write_json(request, table.as_json())
    if not printed_json(request, table.as_json()):
        out.print(report.latency_table(table))
        out.print(f"wrote {request.output}", soft_wrap=True)


def _demo(request: Demo) -> None:
    require_outputs(request)
    folder = request.out or Path(tempfile.mkdtemp(prefix="cpd-onnx-demo-"))
    pages = [folder / f"report.{kind}" for kind in page_kinds()]
    if request.out is not None and request.out.is_dir():
        require_outputs(request, *pages)
    with observed("") as observer:
        content = demo.run(request, folder, lambda what: observer(what, 0, None))
    for page in pages:
        write_page(page, content["report"])
    write_json(request, content)
    if not printed_json(request, content):
        to_read = next((page for page in pages if page.suffix == ".html"), pages[0])
        out.print(demo.table(content))
        for line in (*demo.lines(content), f"a report to read: {to_read}"):
            out.print(line, soft_wrap=True)


def _operators(request: Operators) -> None:
    require_outputs(request)
    names = unsupported_operators() if request.missing else supported_operators()
    content = {"followed": not request.missing, "operators": list(names)}
    write_json(request, content)
    if not printed_json(request, content):
        for name in names:
            out.print(name, soft_wrap=True)


def _completion(request: Completion) -> None:
    from cpd_onnx.cli import completion  # and the library behind it, which nothing else takes

    write_stdout(completion.script(request.shell))


_COMMANDS: dict[type, Callable[[Any], None]] = {
    Inspect: _inspect, Prune: _prune, VerifyFile: cli_verify.run, Apply: _apply, Distill: _distill,
    Compress: cli_compress.run, Reproduce: _reproduce, Sweep: cli_sweep.run, Deploy: cli_deploy.run, Bench: _bench,
    Latency: _latency, Demo: _demo, Operators: _operators, Completion: _completion,
}  # fmt: skip  # a table
