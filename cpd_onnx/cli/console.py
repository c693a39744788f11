"""Output shared by all commands: standard output, standard error and the progress line."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from cpd_onnx.errors import CpdError
from cpd_onnx.io.streams import output_error, printable, write_stdout
from cpd_onnx.ir.model import load
from cpd_onnx.report import tables as report
from cpd_onnx.runtime.sessions import open_model, working_feeds
from cpd_onnx.shapes.inference import fold
from cpd_onnx.workflow.places import STDOUT, json_text
from cpd_onnx.workflow.requests import Observer, Request

_PIPE_WIDTH = 120
"""Width of tables, in columns, where standard output is not a terminal; a heuristic."""


class _Console(Console):
    """A console that escapes control characters and raises OutputError when it cannot write."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the text of a line or table cell with its control characters escaped."""
        return super().render_str(printable(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print objects; raises OutputError if the stream cannot be written to."""
        if sys.stdout is None and not self.stderr:
            raise output_error(None)
        try:
            super().print(*objects, **options)
        except OSError as error:
            raise output_error(error) from error

    def on_broken_pipe(self) -> None:
        """Raise OutputError; rich calls this when the reader of a pipe has closed it."""
        raise output_error(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    is_terminal = stream is not None and stream.isatty()
    width = None if is_terminal or "COLUMNS" in os.environ else _PIPE_WIDTH
    return _Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


out = _console()
err = _console(stderr=True)


def fault_of(paths: Iterable[Path]) -> str | None:
    """Return why one of these models is unusable (invalid ONNX, or rejected by onnxruntime); None if all are usable."""
    for path in paths:
        try:
            model = load(path)
            defect = model.defect()
            if defect is not None:
                return f"{path} is not valid ONNX: {defect}"
            if not model.is_over_limit:
                next(working_feeds(fold(model), open_model(model)))
        except CpdError as error:
            return f"{path}: {error}"
    return None


def print_lines(*lines: str) -> None:
    """Print lines of text, which the terminal wraps at its own width."""
    for line in lines:
        out.print(line, soft_wrap=True)


def print_result(content: Mapping[str, Any], *measured: str, written: Iterable[object]) -> None:
    """Print what a pruning run did: its costs, what was measured, its notes and its proof."""
    out.print(report.costs_table(content))
    if any(entry["weights"] for entry in content["kept"]):
        out.print(report.frozen_table(content["kept"], limit=report.FEW_REASONS))
    print_lines(*measured, *(f"note: {note}" for note in (*content["notes"], *content.get("advice", ()))))
    if content["repaired"] is not None:
        print_lines(report.repair_line(content["repaired"]))
    print_lines(report.proof_line(content["verification"]), f"wrote {', '.join(map(str, written))}")


def printed_json(request: Request, content: Mapping[str, Any]) -> bool:
    """Print the result as JSON if `--json -` was given; returns whether it was."""
    if request.json != STDOUT:
        return False
    write_stdout(json_text(content).replace("\x7f", "\\u007f"))  # json.dumps escapes all other control characters
    return True


class _Description(TextColumn):
    """Column that shows the description of a task with its markup unparsed."""

    def render(self, task: Task) -> Text:
        """Return the description of a task with its control characters escaped."""
        return Text(printable(task.description))


def progress_line(*columns: BarColumn) -> Progress:
    """Return a progress line on standard error, disabled where that is not a terminal."""
    shown = (SpinnerColumn(), _Description(""), *columns, TimeElapsedColumn())
    return Progress(*shown, console=err, transient=True, disable=not err.is_terminal)


@contextlib.contextmanager
def observed(step: str, *, visible: bool = True) -> Iterator[Observer]:
    """Yield an observer that updates a progress line, which first shows `step`."""
    with progress_line(BarColumn()) as line:
        task = line.add_task(step, total=None, visible=visible)
        yield lambda now, done, total: line.update(task, description=now, completed=done, total=total)
