"""The commands: each parses its request, calls the workflow and prints the result."""

from __future__ import annotations

import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpd_onnx.budget.latency import LatencyProbe, measure_table
from cpd_onnx.budget.widths import held_groups
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.cli import compress as cli_compress
from cpd_onnx.cli import demo
from cpd_onnx.cli import deploy as cli_deploy
from cpd_onnx.cli import sweep as cli_sweep
from cpd_onnx.cli import verify as cli_verify
from cpd_onnx.cli.arguments import command_line, request_of
from cpd_onnx.cli.console import fault_of, observed, out, print_lines, print_result, printed_json
from cpd_onnx.data.open import FORMS
from cpd_onnx.errors import REPORT_BUG, CpdError, DataError, InconclusiveError, OutputError, ProofError, StoppedError
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
from cpd_onnx.workflow.api import run as carry_out
from cpd_onnx.workflow.compress_files import page_kinds, write_page
from cpd_onnx.workflow.distill import is_first_process
from cpd_onnx.workflow.evidence.reproduce import require_same
from cpd_onnx.workflow.places import read_model, require_apart, require_outputs, source_of, write_json
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
"""Exit codes of the two verdicts of a proof that are failures; every other error ends with 1."""
_LINE = 1000
"""Length of an error message, in characters, above which its middle is cut out; a heuristic."""
_NO_MEMORY = re.compile("can't allocate memory|bad_alloc|can't start new thread|failed to allocate", re.IGNORECASE)
"""Messages of RuntimeErrors that libraries raise when memory runs out."""
_MODELS = ("model", "original", "pruned", "teacher", "student")
"""Fields of requests that are paths of models."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: success, with every required proof; 1: an error that the user can act on; 2, from argparse: a usage error; 4: the
    proof is inconclusive; 5: the proof shows that the result is wrong; 130: interrupted by a signal; 141, as for a
    program that SIGPIPE ends: the reader of standard output closed it.
    """
    ended: SystemExit | None = None
    try:
        try:
            code = _run(arguments)
        except SystemExit as error:  # of the parser: a usage error, or --help
            code, ended = 1, error
        flush_stdout()
    except OutputError as error:
        redirect_to_null(sys.stdout)
        if error.is_pipe:
            return PIPE_CLOSED
        print_error(f"error: {error}")
        return 1
    if ended is not None:
        raise ended
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
        print_error(_one_line("; ".join(["interrupted", *getattr(error, "__notes__", ())])))
        return 130
    except Exception as error:
        if getattr(typed, "verbose", False):
            _show_traceback(error)
        print_error(f"error: {_one_line(_complaint(error, request))}")
        return next((code for kind, code in _EXIT_CODES.items() if isinstance(error, kind)), 1)
    return 0


def _complaint(error: Exception, request: Any) -> str:
    """Return the message for an error, followed by the notes that were added to it."""
    return "; ".join([_reason(error, request), *getattr(error, "__notes__", ())])


def _reason(error: Exception, request: Any) -> str:
    if isinstance(error, CpdError):
        return str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return "not enough memory for this model"
    if isinstance(error, ImportError) or (isinstance(error, OSError) and "shared object" in str(error)):
        return f"cannot load a library: {error}; check its installation and the memory limit (ulimit -v)"
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return f"{error.filename}: {reason}" if error.filename is not None else reason
    fault = _fault(request) if request is not None else None
    if fault:
        return fault
    return f"internal error: {type(error).__name__}: {error}; {REPORT_BUG} with the output of --verbose"


def _show_traceback(error: Exception) -> None:
    for line in "".join(traceback.format_exception(error)).splitlines():
        print_error(line)


def _fault(request: Any) -> str | None:
    """Return what is wrong with the models of a request, if that is why the command failed."""
    given = vars(request)
    try:
        return fault_of(given.get("models") or [given[name] for name in _MODELS if given.get(name) is not None])
    except Exception:  # the same failure may occur again here
        return None


def _one_line(text: str) -> str:
    """Return the text as one line of limited length, with an ellipsis in the middle if it is longer."""
    line = " ".join(text.split())
    return line if len(line) <= _LINE else f"{line[: _LINE // 2]}…{line[-_LINE // 2 + 1 :]}"


def _inspect(request: Inspect) -> None:
    require_outputs(request)
    if request.plot is not None:
        plots.require(request.plot)
    if request.sensitivity != (request.data is not None) or (request.plot and not request.sensitivity):
        raise DataError(f"--sensitivity needs samples, and --data and --plot need --sensitivity: give --data, {FORMS}")
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
    print_lines(f"{request.model.name}: {report.costs_line(content['costs'])}")
    out.print(report.groups_table(content))
    out.print(report.frozen_table(content["kept"]))
    out.print(f"{100 * content['prunable_fraction']:.1f} % of the weights lie on a prunable axis")
    for operator, node in content["without_rule"].items():
        print_lines(f"no rule for {operator} (at {node}): its channels are frozen")
    if found:
        out.print(report.sensitivity_table(content["sensitivity"]))


def _sensitivity(combed: Combed, request: Inspect) -> dict[str, tuple[sensitivity.Point, ...]]:
    """Return the output errors at several widths of each group, by group name."""
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


def _show_pruned(_: Prune, content: dict[str, Any]) -> None:
    pruned = (
        f"{content['groups_pruned']} of {content['groups']} groups pruned, {len(content['edits'])} edits, "
        f"{content['seconds']:.1f} s"
    )
    print_result(content, pruned, written=[f"{content['output']} and {content['plan']}"])


def _show_applied(request: Apply, content: dict[str, Any]) -> None:
    if content["without_values"]:
        print_lines(
            f"note: the plan lists {len(content['without_values'])} weights that were refitted or trained afterwards; "
            "the output has the original's values for them"
        )
    print_lines(f"wrote {request.output}")


def _show_distilled(_: Distill, content: dict[str, Any]) -> None:
    values = {"steps": f"{content['steps']}, {content['seconds']:.1f} s on {content['device']}"}
    if content["steps"]:
        kinds = ", ".join(f"{name} by {kind}" for name, kind in content["losses"].items())
        values = {"loss": f"{content['first_loss']:.4f} -> {content['last_loss']:.4f} ({kinds})"} | values
    if content["restored"]:
        values["batch norms restored"] = f"{content['restored']}, refolded after training"
    if content["compared"]:
        values["inner tensors compared"] = ", ".join(content["compared"])
    for name in ("teacher", "student", "distilled"):
        if name in content:
            values[f"{name} {content['metric']}"] = f"{content[name]:.4f}"
    out.print(report.summary_table(Summary.of(values)))
    written = [content[name] for name in ("output", "plan") if name in content]
    print_lines(f"wrote {' and '.join(written)}")


def _show_reproduced(_: Reproduce, content: dict[str, Any]) -> None:
    print_lines(*(f"{row['file']}: {'identical' if row['same'] else 'DIFFERENT'}" for row in content["files"]))


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
            print_lines(f"wrote {request.plot}")


def _latency(request: Latency) -> None:
    written = require_outputs(request, request.output)
    model = read_model(request.model, request.input_shapes)
    require_apart(written, model)
    combed = comb(model, request.input_shapes)
    setting = Setting(request.latency_batch, request.latency_threads, request.latency_provider)
    with observed("measure") as observer:
        table = measure_table(
            LatencyProbe(combed, setting),
            seed=request.seed,
            observer=lambda done, of: observer("measure", done, of),
        )
    with commit_together():
        table.save(request.output)
        write_json(request, table.as_json())
    if not printed_json(request, table.as_json()):
        out.print(report.latency_table(table))
        print_lines(f"wrote {request.output}")


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
        print_lines(*demo.lines(content), f"report: {to_read}")


def _operators(request: Operators) -> None:
    require_outputs(request)
    names = unsupported_operators() if request.missing else supported_operators()
    content = {"followed": not request.missing, "operators": list(names)}
    write_json(request, content)
    if not printed_json(request, content):
        print_lines(*names)


def _completion(request: Completion) -> None:
    from cpd_onnx.cli import completion  # only this command needs shtab

    write_stdout(completion.script(request.shell))


@dataclass(frozen=True)
class _Work:
    """A command that `workflow.api.run` carries out.

    Attributes:
        first_step: Description on the progress line until the workflow reports another one.
        show: Prints the result, unless it was printed as JSON.
        require: Raises CpdError if the result is a failure.
    """

    first_step: str
    show: Callable[[Any, dict[str, Any]], None]
    require: Callable[[dict[str, Any]], None] = lambda _: None

    def __call__(self, request: Any) -> None:
        """Carry out a request and print its result; only the first process of a training run prints."""
        with observed(self.first_step, visible=is_first_process()) as observer:
            content = carry_out(request, observer)
        if content is None:
            return
        if not printed_json(request, content):
            self.show(request, content)
        self.require(content)


_COMMANDS: dict[type, Callable[[Any], None]] = {
    Inspect: _inspect,
    Prune: _Work("read", _show_pruned),
    VerifyFile: cli_verify.run,
    Apply: _Work("apply", _show_applied),
    Distill: _Work("distill", _show_distilled),
    Compress: _Work("comb, score, prune", cli_compress.show),
    Reproduce: _Work("compare", _show_reproduced, require_same),
    Sweep: _Work("comb and score", cli_sweep.show),
    Deploy: _Work("read", cli_deploy.show),
    Bench: _bench,
    Latency: _latency,
    Demo: _demo,
    Operators: _operators,
    Completion: _completion,
}
