"""Output of `deploy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from cpd_onnx.cli.console import out, print_lines
from cpd_onnx.report import tables as report
from cpd_onnx.summary import count, share
from cpd_onnx.workflow.deploy import c_files
from cpd_onnx.workflow.requests import Deploy


def show(request: Deploy, content: dict[str, Any]) -> None:
    """Print the steps that were done, the file size, the metric, and what conflicts with the profile."""
    if content["steps"]:
        out.print(_steps_table(content))
    print_lines(*(f"note: {note}" for step in content["steps"] for note in step["notes"]))
    before, after = content["bytes"]["before"], content["bytes"]["after"]
    out.print(f"{count(before)}B -> {count(after)}B, {share(after, before)}")
    for name, value in content.get("accuracy", {}).items():
        out.print(f"{content['metric']} {name}: {value:.4f}")
    if request.profile is not None:
        name = Path(request.profile).name
        problems = [f"profile {name}: {problem}" for problem in content["problems"]]
        print_lines(*(problems or [f"profile {name}: no problems found"]))
    written = [content[key] for key in ("output", "ort") if content[key]]
    written += map(str, c_files(request.c_source))
    print_lines(f"wrote {', '.join([*written, content['manifest']])}")


def _steps_table(content: dict[str, Any]) -> Table:
    """Return a table of the steps: how far the outputs of each differ from those of the previous step."""
    title = "Output difference of each step from the previous one"
    table = report.table_of(
        title, "step", "description", "largest / range", "RMS / range", "same answer", "bytes", "seconds"
    )
    table.columns[1].justify = "left"
    for step in content["steps"]:
        difference = step["difference"]
        cells = ["not compared", "", ""]
        if difference is not None:
            agreement = "" if difference["agreement"] is None else f"{100 * difference['agreement']:.1f} %"
            numbers = (difference[name] for name in ("largest", "of_range"))
            cells = [*("not finite" if number is None else f"{number:.2g}" for number in numbers), agreement]
        table.add_row(step["name"], step["what"], *cells, count(step["bytes"]), f"{step['seconds']:.2f}")
    return table
