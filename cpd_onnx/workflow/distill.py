"""Distill: train a pruned model against its original, from files to files; and helpers of every training."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cpd_onnx.data.metrics import check_metric
from cpd_onnx.data.open import FORMS
from cpd_onnx.data.sources import Source
from cpd_onnx.errors import CpdError, DataError, StoppedError, UnsupportedError
from cpd_onnx.io import progress
from cpd_onnx.io.files import commit_together, locked_folder
from cpd_onnx.ir.model import Model, load
from cpd_onnx.options import options_from
from cpd_onnx.rewrite.plan import Plan, load_plan, planned
from cpd_onnx.training.options import DistillOptions
from cpd_onnx.workflow import recipe
from cpd_onnx.workflow.places import (
    evaluated,
    plan_path_of,
    recipe_path_of,
    require_apart,
    require_outputs,
    source_of,
    write_both,
    write_json,
)
from cpd_onnx.workflow.quality.checks import checked_samples
from cpd_onnx.workflow.requests import Compress, Distill, Observer, Tracing, ignore

if TYPE_CHECKING:
    from cpd_onnx.passes.distill import Traces, Watched


def distill_module() -> ModuleType:
    """Return `cpd_onnx.passes.distill`; raises UnsupportedError if torch is not installed."""
    try:
        from cpd_onnx.passes import distill
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UnsupportedError("distillation needs torch: pip install 'cpd-onnx[torch]'") from error
    return distill


def is_first_process() -> bool:
    """Return whether this is the only process of a training run, or the first of a distributed one."""
    return os.environ.get("RANK", "0") == "0"


def is_distributed() -> bool:
    """Return whether several processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def checkpoint_of(request: Tracing) -> Path:
    """Return the path of the checkpoint of a run."""
    return request.checkpoint or Path(f"{request.output}.checkpoint")


def traces_of(request: Tracing) -> Traces:
    """Return where the training writes its checkpoint and its logs."""
    traces: Traces = distill_module().Traces(
        checkpoint_of(request), request.checkpoint_seconds, request.resume, request.log, request.tensorboard
    )
    return traces


def watched_on(request: Compress | Distill, model: Model) -> Watched | None:
    """Return the samples on which the student is measured during training, or None."""
    source = source_of(request.watch, model, request)
    if source is None:
        return None
    watched: Watched = distill_module().Watched(source, request.metric, request.watch_every, request.patience)
    return watched


@contextlib.contextmanager
def noting_checkpoints(unfinished: Callable[[], Iterable[Path]]) -> Iterator[None]:
    """Add to an error in the block a note that names the existing files from which the run can be continued."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        left = [path.name for path in unfinished() if path.exists()]
        if left and not isinstance(error, StoppedError):  # its message names the checkpoint
            error.add_note(f"checkpoint written to {', '.join(left)}: continue with --resume, or restart with --force")
        raise


def require_new_run(request: Tracing, *checkpoints: Path) -> None:
    """Raise CpdError if a checkpoint of an unfinished run would be lost."""
    for path in checkpoints:
        if path.exists() and not (request.resume or request.force):
            raise CpdError(f"{path} holds an unfinished run: continue with --resume, or restart with --force")


def distill(request: Distill, observer: Observer = ignore) -> dict[str, Any] | None:
    """Train the student, write it, and return the result; None in all processes of a run but the first."""
    plan = _student_plan(request)
    plan_path = None if plan is None else plan_path_of(request.output)
    places = [request.output, recipe_path_of(request.output), *([] if plan_path is None else [plan_path])]
    written = require_outputs(request, *places, reads=[request.plan or plan_path_of(request.student)])
    training = distill_module()
    check_metric(request.metric)
    recipe.text(request)  # fails now, not at the end, if an option cannot be recorded
    models = {"teacher": load(request.teacher), "student": load(request.student)}
    require_apart(written, *models.values())
    source = _required_source(models["student"], request)
    checked = checked_samples(request, models["teacher"], source) if is_first_process() else None
    settings = options_from(DistillOptions, request)
    overlap = None
    if plan is not None:
        overlap = training.overlap_of(*planned(models["teacher"], plan), request.hidden)
    checkpoint = checkpoint_of(request)
    require_new_run(request, checkpoint)
    measured = ["evaluate"] if request.eval is not None else []
    progress.announce(*measured, "distill", *measured, "write")
    watched = watched_on(request, models["student"])
    accuracies = evaluated(request, models, models["teacher"]) if is_first_process() else {}
    teacher, student = (model.complete_proto() for model in models.values())
    with noting_checkpoints(lambda: [checkpoint]):
        result = training.distill(
            teacher, student, source, settings,
            overlap=overlap, watched=watched, traces=traces_of(request),
        )  # fmt: skip  # what and how
        if not is_first_process():
            return None
        trained = training.trained(models["student"], result)
        accuracies |= evaluated(request, {"distilled": trained}, models["teacher"])
        content: dict[str, Any] = training.summary(result) | {"output": str(request.output), "preflight": checked}
        content |= {} if plan_path is None else {"plan": str(plan_path)}
        content |= {"metric": request.metric, **accuracies} if accuracies else {}
        with progress.step("write"), locked_folder(request.output.parent), commit_together():
            _write(request, models["student"], trained, plan)
            write_json(request, content)
    checkpoint.unlink(missing_ok=True)
    return content


def _required_source(model: Model, request: Distill) -> Source:
    source = source_of(request.data, model, request)
    if source is None:
        raise DataError(f"training needs samples: give --data, {FORMS}")
    return source


def _student_plan(request: Distill) -> Plan | None:
    """Return the plan of the student; None if it has none and none is needed."""
    path = request.plan or plan_path_of(request.student)
    if not path.exists() and request.plan is None and not request.hidden:
        return None
    return load_plan(path)


def _write(request: Distill, student: Model, trained: Model, plan: Plan | None) -> None:
    """Write the trained model and the recipe and, if the student has a plan, one that records the trained weights."""
    if plan is None:
        trained.save(request.output, overwrite=request.force, weights=request.weights)
    else:
        write_both(request, trained, plan.with_values(student, trained), plan_path_of(request.output))
    recipe.write(recipe_path_of(request.output), request, overwrite=request.force)
