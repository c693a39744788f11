"""What `compress` prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cpd_onnx.cli.console import (
    observed,
    out,
    printed_json,
)
from cpd_onnx.report import tables as report
from cpd_onnx.workflow.api import run as carry_out
from cpd_onnx.workflow.compress_files import places_of
from cpd_onnx.workflow.distill import is_first_process
from cpd_onnx.workflow.requests import Compress


def run(request: Compress) -> None:
    """Compress, and say what came out."""
    with observed("comb, score, prune", visible=is_first_process()) as observer:
        content = carry_out(request, observer)
    if content is not None and not printed_json(request, content):
        _show(content, places_of(request).all())


def _show(content: Mapping[str, Any], places: Iterable[Path]) -> None:
    out.print(report.costs_table(content))
    if any(entry["weights"] for entry in content["kept"]):
        out.print(report.frozen_table(content["kept"], limit=report.FEW_REASONS))
    if content["bench"] is not None:
        first, last = (entry["p50"] for entry in content["bench"]["timings"][:2])
        out.print(f"latency {first:.2f} ms -> {last:.2f} ms in the median: {first / last:.2f} times faster")
    if content["accuracy"] is not None:
        said = content["accuracy"]
        values = ", ".join(f"{name} {value:.4f}" for name, value in said["values"].items())
        out.print(f"{said['metric']} against {said['on']}: {values}", soft_wrap=True)
    for note in (*content["notes"], *content["advice"]):
        out.print(f"note: {note}", soft_wrap=True)
    if content["repaired"] is not None:
        out.print(report.repair_line(content["repaired"]), soft_wrap=True)
    out.print(report.proof_line(content["verification"]), soft_wrap=True)
    out.print(f"wrote {', '.join(map(str, places))}", soft_wrap=True)
