"""The commands: each parses its request, calls the workflow and prints the result."""

from __future__ import annotations

import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpd_onnx.budget import foreign
from cpd_onnx.budget.latency import CostTable, LatencyProbe, measure_table
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.cli import compress as cli_compress
from cpd_onnx.cli import demo
from cpd_onnx.cli import deploy as cli_deploy
from cpd_onnx.cli import inspect as cli_inspect
from cpd_onnx.cli import sweep as cli_sweep
from cpd_onnx.cli import verify as cli_verify
from cpd_onnx.cli.arguments import command_line, former_names, request_of
from cpd_onnx.cli.console import fault_of, log_to_stderr, observed, out, print_lines, print_result, printed_json
from cpd_onnx.errors import (
    REPORT_BUG,
    CpdError,
    InconclusiveError,
    LossError,
    NotFasterError,
    OutputError,
    ProofError,
    StoppedError,
)
from cpd_onnx.io.files import commit_together, write_atomically
from cpd_onnx.io.progress import advance, announce, step
from cpd_onnx.io.streams import PIPE_CLOSED, flush_stdout, print_error, redirect_to_null, write_stdout
from cpd_onnx.proof.files import data_feeds
from cpd_onnx.report import figures as plots
from cpd_onnx.report import tables as report
from cpd_onnx.report.verdict import NOT_AS_GOOD, NOT_FASTER, WRONG_RESULT
from cpd_onnx.report.words import joined
from cpd_onnx.rules import supported_operators, unsupported_operators
from cpd_onnx.runtime import bench as benchmark
from cpd_onnx.runtime.bench import Setting, bench
from cpd_onnx.runtime.sessions import Method, custom_operators
from cpd_onnx.runtime.times import read_times, runner_source
from cpd_onnx.summary import Summary
from cpd_onnx.workflow.api import run as carry_out
from cpd_onnx.workflow.compress_files import page_kinds, write_page
from cpd_onnx.workflow.deploy import merged_files
from cpd_onnx.workflow.distill import is_first_process
from cpd_onnx.workflow.evidence.reproduce import require_same
from cpd_onnx.workflow.places import read_model, require_apart, require_outputs, source_of, write_json
from cpd_onnx.workflow.prune import require_conclusive
from cpd_onnx.workflow.requests import (
    QUIET,
    Apply,
    Audit,
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

_EXIT_CODES: dict[type[Exception], int] = {
    NotFasterError: NOT_FASTER, LossError: NOT_AS_GOOD, InconclusiveError: NOT_AS_GOOD, ProofError: WRONG_RESULT,
}  # fmt: skip  # a table
"""Exit codes of verdicts that are failures; every other error ends with 1."""
_LINE = 1000
"""Length of an error message, in characters, above which its middle is cut out; a heuristic."""
_NO_MEMORY = re.compile("can't allocate memory|bad_alloc|can't start new thread|failed to allocate", re.IGNORECASE)
"""Messages of RuntimeErrors that libraries raise when memory runs out."""
_MODELS = ("model", "original", "pruned", "teacher", "student")
"""Fields of requests that are paths of models."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: success, with every required proof; 1: an error that the user can act on; 2, from argparse: a usage error; 3 to
    6: a verdict that is no success, see `report.verdict`; 130: interrupted by a signal; 141, as for a
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
        # Some commands are not carried out by `workflow.api.run`, which does the same.
        with warnings.catch_warnings(), custom_operators(getattr(request, "custom_ops", ())):
            if getattr(request, "log_level", None) == QUIET:  # completion has none
                warnings.simplefilter("ignore")
            else:
                _warn_of_former_names(typed)
            code = _COMMANDS[type(request)](request) or 0
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
    return code


def _warn_of_former_names(typed: Any) -> None:
    for line in former_names(typed):
        print_error(f"warning: {line}")


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


def _show_pruned(request: Prune, content: dict[str, Any]) -> None:
    pruned = (
        f"{content['groups_pruned']} of {content['groups']} groups pruned, {len(content['edits'])} edits, "
        f"{content['seconds']:.1f} s"
    )
    written = [content[name] for name in ("output", "plan", "cost_table") if name in content]
    written += map(str, merged_files(request, content))
    print_result(content, pruned, written=[joined(written)])


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
        kinds = ", ".join(f"{name} by {kind}" for name, kind in content["losses"].items()) or "hidden tensors"
        values = {"loss": f"{content['first_loss']:.4f} -> {content['last_loss']:.4f} ({kinds})"} | values
    if content["restored"]:
        values["batch norms restored"] = f"{content['restored']}, refolded after training"
    if content["compared"]:
        values["hidden tensors compared"] = ", ".join(content["compared"])
    for name in ("teacher", "student", "distilled"):
        if name in content:
            values[f"{name} {content['metric']}"] = f"{content[name]:.4f}"
    out.print(report.summary_table(Summary.of(values)))
    written = [content[name] for name in ("output", "plan") if name in content]
    print_lines(f"wrote {' and '.join(written)}")


def _show_reproduced(_: Reproduce, content: dict[str, Any]) -> None:
    print_lines(*(f"{row['file']}: {'identical' if row['same'] else 'DIFFERENT'}" for row in content["files"]))


def _show_audit(request: Audit, content: dict[str, Any]) -> None:
    cli_verify.show(content["verification"])
    original = content["original"]
    left = "" if original["is_included"] else f"; the original is not included, its SHA-256 is {original['sha256']}"
    print_lines(*(f"note: without {what}" for what in content["missing"]))
    print_lines(f"wrote {request.output} with {len(content['files'])} files and their SHA-256{left}")


def _require_audited(content: dict[str, Any]) -> None:
    require_conclusive(content["verification"])


def _bench(request: Bench) -> None:
    require_outputs(request)
    given = {"models": request.models, "--from": request.times, "--runner": request.runner}
    if sum(map(bool, given.values())) != 1:
        raise CpdError("bench takes either models to measure, or --from, or --runner: see cpd-onnx bench --help")
    if request.plot is not None:
        plots.require(request.plot)
    if request.runner is not None:
        write_atomically(request.runner, runner_source().encode())
        print_lines(f"wrote {request.runner}; how to build and run it stands at its top")
        return
    found = read_times(request.times) if request.times else _measured(request)
    with commit_together():
        if request.plot is not None:
            plots.bench(found).write(request.plot, overwrite=request.force)
        if request.csv is not None:
            write_atomically(request.csv, found.csv().encode())
        write_json(request, found.as_json())
    if printed_json(request, found.as_json()):
        return
    out.print(report.summary_table(found.latency_summary()))
    print_lines(found.method_text())
    if found.profiles:
        out.print(report.profiles_table(found))
        out.print(report.summary_table(found.memory_summary()))
    print_lines(*(f"wrote {path}" for path in (request.plot, request.csv) if path is not None))


def _measured(request: Bench) -> benchmark.Bench:
    first = read_model(request.models[0], request.input_shapes)
    source = source_of(request.data, first, request)
    feed = None if source is None else next(iter(data_feeds(first, source, 1)))
    settings = [
        Setting(batch, threads, provider)
        for provider in request.provider or [Setting.provider]
        for threads in request.threads
        for batch in request.batch
    ]
    with observed(request):
        announce("latency")
        return bench(
            request.models,
            settings=settings,
            seconds=request.seconds,
            input_shapes=dict(request.input_shapes),
            feed=feed,
            method=Method(request.warmup, request.runs, request.io_binding),
        )


def _latency(request: Latency) -> None:
    if (request.output is None) == (request.template is None):
        raise CpdError("latency takes -o FILE for a cost table, or --template FILE for the widths to time elsewhere")
    if request.source is not None and request.timings is None:
        raise CpdError("--source says where --timings come from: give both")
    written = require_outputs(request, *([request.output] if request.output else []))
    model = read_model(request.model, request.input_shapes, request.free_io)
    require_apart(written, model)
    combed = comb(model, request.input_shapes)
    if request.template is not None:
        write_atomically(request.template, foreign.template(combed).encode())
        print_lines(f"wrote {request.template}: fill in the times in milliseconds, and give it to --timings")
        return
    assert request.output is not None
    table = _table(request, combed)
    with commit_together():
        table.save(request.output)
        write_json(request, table.as_json())
    if not printed_json(request, table.as_json()):
        out.print(report.kernels_table(table) if request.timings else report.latency_table(table))
        print_lines(f"wrote {request.output}")


def _table(request: Latency, combed: Combed) -> CostTable:
    setting = Setting(request.latency_batch, request.latency_threads, request.latency_provider)
    if request.timings is not None:
        return foreign.table_from(combed, request.timings, setting, request.source)
    with observed(request):
        announce("cost table")
        with step("cost table", is_whole=True):
            return measure_table(LatencyProbe(combed, setting), seed=request.seed, observer=advance)


def _demo(request: Demo) -> None:
    require_outputs(request)
    folder = request.out or Path(tempfile.mkdtemp(prefix="cpd-onnx-demo-"))
    pages = [folder / f"report.{kind}" for kind in page_kinds()]
    if request.out is not None and request.out.is_dir():
        require_outputs(request, *pages)
    with observed(request):
        content = demo.run(request, folder)
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
        show: Prints the result, unless it was printed as JSON.
        require: Raises CpdError if the result is a failure.
    """

    show: Callable[[Any, dict[str, Any]], None]
    require: Callable[[dict[str, Any]], None] = lambda _: None

    def __call__(self, request: Any) -> int:
        """Carry out a request, print its result and return the code of its verdict.

        Only the first of the processes of a launcher prints.
        """
        log_to_stderr(request, is_visible=is_first_process())
        with observed(request, is_visible=is_first_process()):
            content = carry_out(request)
        if content is None:
            return 0
        if not printed_json(request, content):
            self.show(request, content)
        self.require(content)
        return int((content.get("verdict") or {}).get("code", 0))


_COMMANDS: dict[type, Callable[[Any], int | None]] = {
    Inspect: _Work(cli_inspect.show, cli_inspect.require_read),
    Prune: _Work(_show_pruned),
    VerifyFile: cli_verify.run,
    Apply: _Work(_show_applied),
    Distill: _Work(_show_distilled),
    Compress: _Work(cli_compress.show),
    Reproduce: _Work(_show_reproduced, require_same),
    Audit: _Work(_show_audit, _require_audited),
    Sweep: _Work(cli_sweep.show),
    Deploy: _Work(cli_deploy.show),
    Bench: _bench,
    Latency: _latency,
    Demo: _demo,
    Operators: _operators,
    Completion: _completion,
}
