"""Output of `sweep`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from cpd_onnx.cli.console import out, print_lines
from cpd_onnx.report import tables as report
from cpd_onnx.report.verdict import lines
from cpd_onnx.summary import count
from cpd_onnx.workflow import sweep
from cpd_onnx.workflow.requests import Sweep


def show(request: Sweep, content: Mapping[str, Any]) -> None:
    """Print a comparison of the models, the notes, and the model that was picked."""
    out.print(_table(content["sweep"]))
    print_lines(*(f"note: {note}" for note in (*content["notes"], *content["advice"])))
    print_lines(
        *(f"picked {point['file']}: {point['ms']:.2f} ms" for point in content["sweep"]["points"] if point["picked"])
    )
    has_metric = content["sweep"]["metric"] is not None
    written = [path for path in sweep.pages_of(request) if path.suffix != ".svg" or has_metric]
    written += sweep.nested_plan_of(request)
    print_lines(f"wrote {', '.join(map(str, written))}", *lines(content["verdict"]))


def _table(found: Mapping[str, Any]) -> Table:
    """Return a table with one row per model."""
    columns = (
        "target", found["metric"] or "", "untrained", "ms", "times faster", "MACs", "parameters", "file", "as good",
    )  # fmt: skip  # one column after the other
    table = report.table_of("Sweep", *columns)
    for point in found["points"]:
        scores = ("" if point[key] is None else f"{point[key]:.4f}" for key in ("accuracy", "untrained"))
        fractions = (f"{100 * point[key]:.1f} %" for key in ("macs", "params"))
        name = f"{point['name']} *" if point["picked"] else point["name"]
        faster = f"{1 / point['ratio']:.2f}"
        good = _answer(point, "as good")
        table.add_row(name, *scores, f"{point['ms']:.2f}", faster, *fractions, f"{count(point['bytes'])}B", good)
    return table


def _answer(point: Mapping[str, Any], question: str) -> str:
    """Return the answer of a model's verdict to a question; empty for the original."""
    found = (point.get("verdict") or {}).get("answers") or ()
    return next((str(entry["answer"]) for entry in found if entry["question"] == question), "")
