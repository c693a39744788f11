"""Output of `inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpd_onnx.cli.console import out, print_lines
from cpd_onnx.errors import ModelError
from cpd_onnx.report import tables as report
from cpd_onnx.report.inspection import findings
from cpd_onnx.workflow.requests import Inspect


def show(request: Inspect, content: Mapping[str, Any]) -> None:
    """Print what was found: all of it for one model, a row for each of several."""
    if "models" not in content:
        _show_one(request, content)
        return
    out.print(findings.models_table(content["models"]))
    for entry, path in zip(content["models"], request.models, strict=True):
        if "error" in entry:
            print_lines(f"{path}: {entry['error']}")


def require_read(content: Mapping[str, Any]) -> None:
    """Raise ModelError if some of several models could not be inspected."""
    failed = [entry for entry in content.get("models", ()) if "error" in entry]
    if failed:
        raise ModelError(f"{len(failed)} of {len(content['models'])} models could not be inspected, see above")


def _show_one(request: Inspect, content: Mapping[str, Any]) -> None:
    path = Path(request.models[0])
    print_lines(f"{path.name}: {report.costs_line(content['costs'])}", *findings.fact_lines(content))
    out.print(report.groups_table(content))
    out.print(report.frozen_table(content["kept"]))
    print_lines(report.prunable_line(content, "lie on a prunable axis"))
    for operator, node in content["without_rule"].items():
        print_lines(f"no rule for {operator} (at {node}): its channels are frozen")
    print_lines(*findings.outlook_lines(content, path))
    print_lines(*findings.obstacle_lines(content))
    if "sensitivity" in content:
        out.print(report.sensitivity_table(content["sensitivity"]))
    if request.html is not None:
        print_lines(f"wrote {request.html}")
