"""Output of `verify`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cpd_onnx.cli.console import observed, out, print_lines, printed_json
from cpd_onnx.report import checks
from cpd_onnx.workflow.api import run as carry_out
from cpd_onnx.workflow.prune import require_conclusive
from cpd_onnx.workflow.requests import VerifyFile


def run(request: VerifyFile) -> None:
    """Check a file against its original, and print the result."""
    with observed(request):
        content = carry_out(request)
    assert content is not None
    is_printed = printed_json(request, content)
    require_conclusive(content)
    if not is_printed:
        show(content)


def show(content: Mapping[str, Any]) -> None:
    """Print the outcome of a check."""
    for said in checks.outcome(content):
        if isinstance(said, str):
            print_lines(said)
        else:
            out.print(said)
