"""What the commands share: how options become arguments, where files go, and the two streams."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from cpd_onnx.budget.allocation import KINDS
from cpd_onnx.cli.arguments import DATA, LOSSES, TRAINING, not_negative
from cpd_onnx.data import open as sources
from cpd_onnx.data.metrics import OF_TWO_MODELS, evaluate
from cpd_onnx.data.sources import IMAGE_SUFFIXES, ImageOptions, Source
from cpd_onnx.deploy.profiles import load_profile, problems
from cpd_onnx.errors import CpdError, DataError, ModelError, StoppedError, TargetError, UnsupportedError
from cpd_onnx.io.files import commit_together, is_same_file, locked_folder, require_free, write_atomically
from cpd_onnx.io.streams import output_error, printable, write_stdout
from cpd_onnx.ir.model import Model, load
from cpd_onnx.rewrite.plan import Plan
from cpd_onnx.runtime.sessions import open_model, working_feeds
from cpd_onnx.shapes.inference import fold

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


# What commands share: files.


def read_model(path: Path, shapes: Sequence[tuple[str, tuple[int, ...]]] = ()) -> Model:
    """Load a model; a shape for an input that it has not is an error."""
    model = load(path)
    known = {info.name for info in model.graph.input}
    for name, _ in shapes:
        if name not in known:
            raise DataError(f"--input-shape names {name!r}, but the inputs are {', '.join(sorted(known))}")
    return model


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


def source_of(data: str | None, model: Model, options: argparse.Namespace) -> Source | None:
    """Where samples for a model come from, if data is named."""
    images = ImageOptions(
        options.image_mean, options.image_std, options.image_scale, options.image_order, options.image_size,
        options.image_resize,
    )  # fmt: skip  # the fields in order
    shapes = dict(getattr(options, "input_shape", ()))
    return None if data is None else sources.source_of(data, model, shapes, images)


def required_source(model: Model, options: argparse.Namespace) -> Source:
    """The same for `--data`; raises DataError if there is none."""
    source = source_of(options.data, model, options)
    if source is None:
        raise DataError(f"training needs inputs: give --data, {DATA}")
    return source


def recipe_path_of(options: argparse.Namespace) -> Path:
    """Where the options that made a file are put on record."""
    output: Path = options.output
    return output.with_name(f"{output.name}.recipe.toml")


def plan_path_of(path: Path) -> Path:
    """Where the plan of a file lies."""
    return path.with_name(f"{path.name}.plan.json")


_INPUTS = (
    "model", "models", "original", "pruned", "teacher", "student", "manifest", "recipe", "like", "cost_table",
    "profile", "data", "eval", "watch",
)  # fmt: skip  # a table
"""Options that are read, or may be: a name that is no file does no harm here."""


def require_outputs(options: argparse.Namespace, *paths: Path, reads: Sequence[Path] = ()) -> None:
    """Refuse before the work starts: files that are there, folders that are not, one file for two things.

    No file that is read is ever replaced, in whatever spelling or through whatever link it is named.
    """
    beside = [getattr(options, name, None) for name in ("json", "plot")]
    written = [*paths, *(Path(name) for name in beside if name not in (None, "-"))]
    log, read = getattr(options, "log", None), [*reads, *_inputs(options)]
    kept = [path for name in ("teacher_cache", "checkpoint") if (path := getattr(options, name, None)) is not None]
    options.written = [*written, *([log] if log is not None else []), *kept]
    for place, path in enumerate(options.written):
        if any(is_same_file(path, other) for other in read) or _is_sample(path, read):
            raise ModelError(f"{path} is named for two things, it is read and would be lost: choose another name")
        if any(is_same_file(path, other) for other in options.written[:place]):
            raise ModelError(f"{path} is named for two things: choose another name")
    for path in written:
        require_free(path, overwrite=options.force)
    if log is not None:
        require_free(log, overwrite=options.force or options.resume)
    for path in kept:  # from an earlier run, perhaps
        require_free(path, overwrite=True)
    if paths:
        _require_room(paths[0])


def require_apart(options: argparse.Namespace, *models: Model) -> None:
    """Refuse to replace the data files of the models that are read, which are known once these are."""
    for path in options.written:
        if any(is_same_file(path, file) for model in models for file in model.data_files):
            raise ModelError(f"{path} holds weights of the model that is read, and would be lost: choose another name")


def _inputs(options: argparse.Namespace) -> Iterator[Path]:
    """The paths that a command reads."""
    for name in _INPUTS:
        value = getattr(options, name, None)
        for path in value if isinstance(value, list) else [value]:
            if path is not None and str(path):
                yield Path(path)


def _require_room(path: Path) -> None:
    """Refuse a name so long that the names of what lies beside the file would be too long."""
    for ending in (".00000000.data", ".checkpoint.00.onnx"):
        try:
            os.lstat(path.with_name(path.name + ending))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ModelError(f"cannot write {path.name}{ending} beside {path}: {error.strerror}") from error


def _is_sample(path: Path, read: Iterable[Path]) -> bool:
    """Whether a file is one of the images in a folder that is read."""
    if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
        return False
    return any(folder.is_dir() and path.resolve().is_relative_to(folder.resolve()) for folder in read)


def write_both(options: argparse.Namespace, model: Model, plan: Plan, plan_path: Path) -> None:
    """Write the model and its plan; if one cannot be written, neither is, and what was there stays."""
    with locked_folder(options.output.parent), commit_together():
        plan.save(plan_path, overwrite=options.force)
        model.save(options.output, overwrite=options.force, weights=options.weights)


def write_json(options: argparse.Namespace, content: dict[str, Any]) -> bool:
    """Write the result as JSON if asked to; whether that went to standard output."""
    if not options.json:
        return False
    text = json.dumps(content, indent=1) + "\n"
    if options.json == "-":
        write_stdout(text.replace("\x7f", "\\u007f"))  # the one control character that JSON leaves as it is
        return True
    write_atomically(Path(options.json), text.encode())
    return False


class _Description(TextColumn):
    """What is being done, with names as they are."""

    def render(self, task: Task) -> Text:
        """The description of a task."""
        return Text(printable(task.description))


def progress_line(*columns: BarColumn) -> Progress:
    """A line on a terminal that says what is being done; nothing elsewhere."""
    shown = (SpinnerColumn(), _Description(""), *columns, TimeElapsedColumn())
    return Progress(*shown, console=err, transient=True, disable=not err.is_terminal)


# What they share: options.


def wish_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `Allocate` that the command line gives."""
    kind, fraction = options.target
    if kind not in KINDS:
        raise TargetError(f"no target is called {kind!r}: choose one of {', '.join(KINDS)}")
    names = [
        "spread", "multiple", "min_share", "max_share", "latency_threads", "latency_batch", "latency_provider",
        "cost_table",
    ]  # fmt: skip  # a table
    wish = {kind: fraction, **{name: getattr(options, name) for name in names}, "keep": tuple(options.keep)} | {
        "widths": tuple(options.width)
    }
    if wish["multiple"] is None:
        wish["multiple"] = 1 if options.profile is None else load_profile(options.profile).multiple
    return wish


def objections(options: argparse.Namespace, model: Model) -> list[str]:
    """What the target of `--profile` objects to in a model; nothing where none is named."""
    if options.profile is None:
        return []
    profile = load_profile(options.profile)
    return [f"{profile.name} objects: {sentence}" for sentence in problems(model, profile)]


def training_of(options: argparse.Namespace) -> dict[str, Any]:
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


def checkpoint_of(options: argparse.Namespace) -> Path:
    """Where a run that is stopped leaves what it has done."""
    path: Path | None = options.checkpoint
    return path or Path(f"{options.output}.checkpoint")


def traces_of(options: argparse.Namespace) -> Any:
    """What the run leaves behind while it goes on."""
    return distill_module().Traces(
        checkpoint_of(options), options.checkpoint_seconds, options.resume, options.log, options.tensorboard
    )


@contextlib.contextmanager
def saying_what_is_left(unfinished: Callable[[], Iterable[Path]]) -> Iterator[None]:
    """Where something fails inside, add to the error which files hold what was done until then, if any do."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        left = [path.name for path in unfinished() if path.exists()]
        if left and not isinstance(error, StoppedError):  # which says so itself
            error.add_note(
                f"what was done so far is in {', '.join(left)}: go on with --resume, or start anew with --force"
            )
        raise


def require_new_run(options: argparse.Namespace, *checkpoints: Path) -> None:
    """Refuse to lose what an unfinished run has done."""
    for path in checkpoints:
        if path.exists() and not (options.resume or options.force):
            raise CpdError(f"{path} holds an unfinished run: go on with --resume, or start anew with --force")


def watched_on(options: argparse.Namespace, model: Model) -> Any:
    """The data to judge the student on while it trains, if any."""
    source = source_of(options.watch, model, options)
    if source is None:
        return None
    return distill_module().Watched(source, options.metric, options.watch_every, options.patience)


def evaluated(options: argparse.Namespace, models: dict[str, Model], teacher: Model) -> dict[str, float]:
    """What the models score on the data for that, by name; nothing where there is no such data."""
    source = source_of(options.eval, teacher, options)
    return {} if source is None else scored(options, source, models, teacher)


def scored(options: argparse.Namespace, source: Source, models: dict[str, Model], teacher: Model) -> dict[str, float]:
    """What the models score on some data, by name."""
    reference = teacher.complete_proto() if options.metric in OF_TWO_MODELS else None
    return {
        name: evaluate(model.complete_proto(), source, options.metric, reference=reference)
        for name, model in models.items()
    }


def distill_module() -> ModuleType:
    """`cpd_onnx.passes.distill`; raises UnsupportedError if there is no torch."""
    try:
        from cpd_onnx.passes import distill
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UnsupportedError("distillation needs torch: pip install 'cpd-onnx[torch]'") from error
    return distill


def is_first_process() -> bool:
    """Whether this is the only process of a training run, or the first one that a launcher started."""
    return os.environ.get("RANK", "0") == "0"
