"""Output shared by all commands: standard output, standard error and the progress line."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from cpd_onnx.errors import CpdError
from cpd_onnx.io.progress import ProgressEvent, reporting
from cpd_onnx.io.streams import output_error, print_error, printable, write_stdout
from cpd_onnx.ir.model import load
from cpd_onnx.report import tables as report
from cpd_onnx.report import verdict
from cpd_onnx.runtime.sessions import open_model, working_feeds
from cpd_onnx.shapes.inference import fold
from cpd_onnx.workflow.places import STDOUT, json_text
from cpd_onnx.workflow.requests import QUIET, Request

_LINE_SECONDS = 10.0
"""Seconds between lines of progress where standard error is not a terminal; a heuristic."""
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
    print_lines(report.proof_line(content["verification"]), f"wrote {', '.join(map(str, written))}", "")
    print_lines(*verdict.lines(content["verdict"]))


class _OnStderr(logging.Handler):
    """Prints what the workflow logs before the work; warnings in red."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message as a line."""
        is_warning = record.levelno >= logging.WARNING
        text = f"warning: {record.getMessage()}" if is_warning else record.getMessage()
        err.print(text, soft_wrap=True, style="red" if is_warning else None)


def log_to_stderr(request: Request, *, is_visible: bool = True) -> None:
    """Print what the workflow logs on standard error, or nowhere if it is not to be seen."""
    logger = logging.getLogger("cpd_onnx.workflow")
    logger.handlers = [_OnStderr() if is_visible and request.log_level != QUIET else logging.NullHandler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def printed_json(request: Request, content: Mapping[str, Any]) -> bool:
    """Print the result as JSON if `--json -` was given; returns whether it was."""
    if request.json != STDOUT:
        return False
    write_stdout(json_text(content).replace("\x7f", "\\u007f"))  # json.dumps escapes all other control characters
    return True


class Words(TextColumn):
    """Column that shows a field of a task with its markup unparsed and its control characters escaped."""

    def render(self, task: Task) -> Text:
        """Return the text of the field."""
        return Text(printable(self.text_format.format(task=task)))


class _Line:
    """The progress line of a terminal, on standard error."""

    def __init__(self) -> None:
        columns = (SpinnerColumn(), Words("{task.description}"), BarColumn(), Words("{task.fields[rest]}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=err, transient=True)
        self._task = self._progress.add_task("", total=None, rest="")

    def __call__(self, event: ProgressEvent) -> None:
        """Show an event."""
        self._progress.update(
            self._task, description=event.title, rest=event.rest, completed=event.done, total=event.total
        )

    def __enter__(self) -> _Line:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


class _Lines:
    """Lines on standard error where that is no terminal: the latest event, every `_LINE_SECONDS`."""

    def __init__(self) -> None:
        self._latest: ProgressEvent | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._print, daemon=True)

    def __call__(self, event: ProgressEvent) -> None:
        """Remember an event."""
        self._latest = event

    def _print(self) -> None:
        while not self._ended.wait(_LINE_SECONDS):
            if self._latest is not None:
                print_error(str(self._latest))

    def __enter__(self) -> _Lines:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()


class _Durations:
    """Lines on standard error with the duration of each step that has ended, for `--log-level debug`."""

    def __init__(self, shown: Callable[[ProgressEvent], None]) -> None:
        self._shown, self._title, self._began = shown, "", time.perf_counter()

    def __call__(self, event: ProgressEvent) -> None:
        """Show an event, and the duration of the step before it if it is the first of a step."""
        if event.title != self._title:
            self.end()
            self._title = event.title
        self._shown(event)

    def end(self) -> None:
        """Print the duration of the step that has just ended."""
        now = time.perf_counter()
        if self._title:
            print_error(f"{self._title}: {now - self._began:.2f} s")
        self._title, self._began = "", now


@contextlib.contextmanager
def observed(request: Request, *, is_visible: bool = True) -> Iterator[None]:
    """Show the progress of the block on standard error, beginning with the step "read".

    On a terminal it is one line that changes; elsewhere a line every ten seconds, and none in a shorter run.
    """
    if request.log_level == QUIET or not is_visible:
        yield
        return
    with _Line() if err.is_terminal else _Lines() as shown:
        durations = _Durations(shown) if request.log_level == "debug" else None
        with reporting(durations or shown) as notify:
            notify("read")
            try:
                yield
            finally:
                if durations:
                    durations.end()
