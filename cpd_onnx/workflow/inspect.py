"""Inspect: what is known of models by their files alone and, with samples, how sensitive their groups are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpd_onnx.budget.latency import CostTable, load_table
from cpd_onnx.budget.widths import held_groups
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.data.open import FORMS
from cpd_onnx.errors import CpdError, DataError
from cpd_onnx.io.files import commit_together, write_atomically
from cpd_onnx.options import options_from
from cpd_onnx.passes import sensitivity
from cpd_onnx.report import figures
from cpd_onnx.report.inspection import page as inspection_page
from cpd_onnx.report.inspection.findings import MANY_FORMAT, inspected
from cpd_onnx.scores.registry import score
from cpd_onnx.workflow.places import read_model, require_apart, require_outputs, source_of, write_json
from cpd_onnx.workflow.requests import Inspect, Observer, ignore


def inspect(request: Inspect, observer: Observer = ignore) -> dict[str, Any]:
    """Inspect models, write the page, the figure and the JSON that were asked for, and return the result.

    It is that of the one model or, for several, a document with the list `models`, in which a model that cannot be
    inspected has the entry `error`; a single model raises CpdError instead.
    """
    written = require_outputs(request)
    _require_options(request)
    if len(request.models) == 1:
        return _one(request, written, observer)
    models: list[dict[str, Any]] = []
    for done, path in enumerate(request.models):
        observer(path.name, done, len(request.models))
        models.append(_entry(request, path))
    content = {"format": MANY_FORMAT, "version": 1, "models": models}
    with commit_together():
        write_json(request, content)
    return content


def _require_options(request: Inspect) -> None:
    """Raise DataError for options that do not go together, UnsupportedError for libraries that are missing."""
    if len(request.models) > 1 and (request.html or request.plot or request.sensitivity or request.cost_table):
        raise DataError("--html, --cost-table, --sensitivity and --plot take one model: give one, or leave them out")
    if request.plot is not None:
        figures.require(request.plot)
    if request.html is not None:
        inspection_page.require()
    if request.cost_table is not None and request.html is None:
        raise DataError("--cost-table predicts the milliseconds in the page of --html: give --html FILE")
    if request.sensitivity != (request.data is not None) or (request.plot and not request.sensitivity):
        raise DataError(f"--sensitivity needs samples, and --data and --plot need --sensitivity: give --data, {FORMS}")


def _entry(request: Inspect, path: Path) -> dict[str, Any]:
    try:
        combed = comb(read_model(path, request.input_shapes, request.free_io), request.input_shapes)
        content = inspected(combed, sorted(held_groups(combed, request.keep)))
    except CpdError as error:
        return {"source": {"file": path.name}, "error": str(error)}
    return content


def _one(request: Inspect, written: list[Path], observer: Observer) -> dict[str, Any]:
    """Inspect the only model of a request."""
    (path,) = request.models
    model = read_model(path, request.input_shapes, request.free_io)
    require_apart(written, model)
    combed = comb(model, request.input_shapes)
    held, table = sorted(held_groups(combed, request.keep)), _table(request, combed)
    content = inspected(combed, held)
    found = _sensitivity(combed, request, observer) if request.sensitivity else {}
    if found:
        content["sensitivity"] = {"error": sensitivity.ERROR, "groups": sensitivity.as_json(found)}
    with commit_together():
        if request.plot and found:
            curves = {name: [(p.width, p.error) for p in points] for name, points in found.items()}
            figures.sensitivity(curves, sensitivity.ERROR).write(request.plot, overwrite=request.force)
        if request.html is not None:
            text = inspection_page.html(combed, content, path, table)
            write_atomically(request.html, text.encode())
        write_json(request, content)
    return content


def _table(request: Inspect, combed: Combed) -> CostTable | None:
    """Return the cost table of a request; raises DataError if it was measured for another model."""
    if request.cost_table is None:
        return None
    table = load_table(request.cost_table)
    table.require(combed.folded.original)
    table.require_parts(combed)
    return table


def _sensitivity(combed: Combed, request: Inspect, observer: Observer) -> Mapping[str, tuple[sensitivity.Point, ...]]:
    """Return the output errors at several widths of each group, by group name."""
    source = source_of(request.data, combed.folded.model, request)
    assert source is not None
    chosen = options_from(sensitivity.SensitivityOptions, request)
    total = len(combed.groups)
    observer("score", 0, None)
    scores = score(combed, request.score, data=source)
    names = iter(range(1, total + 1))
    return sensitivity.sensitivity(
        combed, scores, source, chosen, observer=lambda group: observer(group.name, next(names), total)
    )
