"""What `deploy` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from cpd_onnx.cli.console import observed, out, printed_json
from cpd_onnx.report import tables as report
from cpd_onnx.summary import count, share
from cpd_onnx.workflow.deploy import deploy
from cpd_onnx.workflow.requests import Deploy


def run(request: Deploy) -> None:
    """Make a model ready for its target, and say what was done."""
    with observed("read") as observer:
        content = deploy(request, observer)
    if not printed_json(request, content):
        _show(content)


def _show(content: dict[str, Any]) -> None:
    if content["steps"]:
        out.print(_steps_table(content))
    for step in content["steps"]:
        for note in step["notes"]:
            out.print(f"note: {note}", soft_wrap=True)
    before, after = content["bytes"]["before"], content["bytes"]["after"]
    out.print(f"{count(before)}B -> {count(after)}B, {share(after, before)}")
    for name, value in content.get("accuracy", {}).items():
        out.print(f"{content['metric']} {name}: {value:.4f}")
    if content["profile"] is not None:
        name = Path(content["profile"]).name
        for line in [f"{name} objects: {sentence}" for sentence in content["problems"]] or [
            f"{name} objects to nothing"
        ]:
            out.print(line, soft_wrap=True)
    written = ", ".join(str(content[key]) for key in ("output", "ort", "manifest") if content[key])
    out.print(f"wrote {written}", soft_wrap=True)


def _steps_table(content: dict[str, Any]) -> Table:
    """One row a step: how far its outputs are from those of the step before."""
    title = "Outputs of each step beside the one before, of the spread"
    table = report.table_of(title, "step", "what", "at most", "typically", "same answer", "bytes", "seconds")
    table.columns[1].justify = "left"
    for step in content["steps"]:
        apart = step["difference"]
        cells = ["not compared", "", ""]
        if apart is not None:
            agreement = "" if apart["agreement"] is None else f"{100 * apart['agreement']:.1f} %"
            numbers = (apart[name] for name in ("largest", "typical"))
            cells = [*("not finite" if number is None else f"{number:.2g}" for number in numbers), agreement]
        table.add_row(step["name"], step["what"], *cells, count(step["bytes"]), f"{step['seconds']:.2f}")
    return table
