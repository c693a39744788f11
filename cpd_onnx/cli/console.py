"""What the commands share: the two streams, and how far a command is."""

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
from cpd_onnx.runtime.sessions import open_model, working_feeds
from cpd_onnx.shapes.inference import fold
from cpd_onnx.workflow.places import STDOUT, json_text
from cpd_onnx.workflow.requests import Observer, Request

_PIPE_WIDTH = 120
"""Columns of tables that no terminal shows."""


class _Console(Console):
    """A console that shows names as they are written, whatever is in them, and says where it cannot write."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Text of a line or of a cell: no control character in it gets through."""
        return super().render_str(printable(text), **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print; raises OutputError where nothing can be written."""
        if sys.stdout is None and not self.stderr:
            raise output_error(None)
        try:
            super().print(*objects, **options)
        except OSError as error:
            raise output_error(error) from error

    def on_broken_pipe(self) -> None:
        """What rich asks for where nobody reads any more."""
        raise output_error(BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))


def _console(*, stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    is_terminal = stream is not None and stream.isatty()
    width = None if is_terminal or "COLUMNS" in os.environ else _PIPE_WIDTH
    return _Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


out = _console()
err = _console(stderr=True)


# What commands share.


def fault_of(paths: Iterable[Path]) -> str | None:
    """Why a model of these cannot be worked with: it is not valid ONNX, or onnxruntime does not run it."""
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


def printed_json(request: Request, content: Mapping[str, Any]) -> bool:
    """Print the result as JSON if that is where it should go; whether it is."""
    if request.json != STDOUT:
        return False
    write_stdout(json_text(content).replace("\x7f", "\\u007f"))  # the one control character that JSON leaves as it is
    return True


class _Description(TextColumn):
    """What is being done, with names as they are."""

    def render(self, task: Task) -> Text:
        """The description of a task."""
        return Text(printable(task.description))


def progress_line(*columns: BarColumn) -> Progress:
    """A line on a terminal that says what is being done; nothing elsewhere."""
    shown = (SpinnerColumn(), _Description(""), *columns, TimeElapsedColumn())
    return Progress(*shown, console=err, transient=True, disable=not err.is_terminal)


@contextlib.contextmanager
def observed(what: str, *, visible: bool = True) -> Iterator[Observer]:
    """Show on a terminal what is being done, beginning with `what`, as the observer is told."""
    with progress_line(BarColumn()) as line:
        task = line.add_task(what, total=None, visible=visible)
        yield lambda now, done, total: line.update(task, description=now, completed=done, total=total)
