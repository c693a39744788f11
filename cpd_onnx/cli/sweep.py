"""What `sweep` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from cpd_onnx.cli.console import observed, out, printed_json
from cpd_onnx.report import tables as report
from cpd_onnx.summary import count
from cpd_onnx.workflow import sweep
from cpd_onnx.workflow.requests import Sweep


def run(request: Sweep) -> None:
    """Make the models, and say how they compare."""
    with observed("comb and score") as observer:
        content = sweep.sweep(request, observer)
    if not printed_json(request, content):
        pages = sweep.pages_of(request)
        _show(content, [path for path in pages if path.suffix != ".svg" or content["sweep"]["metric"] is not None])


def _show(content: Mapping[str, Any], pages: Sequence[Path]) -> None:
    out.print(table(content["sweep"]))
    for note in (*content["notes"], *content["advice"]):
        out.print(f"note: {note}", soft_wrap=True)
    picked = next((point for point in content["sweep"]["points"] if point["picked"]), None)
    if picked is not None:
        out.print(f"picked {picked['file']}: {picked['ms']:.2f} ms", soft_wrap=True)
    out.print(f"wrote {', '.join(map(str, pages))}", soft_wrap=True)


def table(found: Mapping[str, Any]) -> Table:
    """One row a model."""
    columns = ("target", found["metric"] or "", "untrained", "ms", "times faster", "MACs", "parameters", "file")
    made = report.table_of("Sweep", *columns)
    for point in found["points"]:
        scores = ("" if point[key] is None else f"{point[key]:.4f}" for key in ("accuracy", "untrained"))
        shares = (f"{100 * point[key]:.1f} %" for key in ("macs", "params"))
        name = f"{point['name']} *" if point["picked"] else point["name"]
        faster = f"{1 / point['ratio']:.2f}"
        made.add_row(name, *scores, f"{point['ms']:.2f}", faster, *shares, f"{count(point['bytes'])}B")
    return made
