"""Output of `verify`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpd_onnx.cli.console import out, print_lines, printed_json
from cpd_onnx.report import tables as report
from cpd_onnx.workflow.prune import require_conclusive, verify
from cpd_onnx.workflow.requests import VerifyFile

_NAMED = 3
"""Number of refitted or trained weights whose names are printed; the JSON holds all of them."""


def run(request: VerifyFile) -> None:
    """Check a file against its original, and print the result."""
    content = verify(request)
    is_printed = printed_json(request, content)
    require_conclusive(content)
    if is_printed:
        return
    if "deployed" in content:
        _show_chain(content)
    else:
        _show_pruned(content, "the file")


def _show_pruned(content: Mapping[str, Any], name: str) -> None:
    """Print the check of a pruned file."""
    trained = content["trained"]
    if not trained:
        how = "byte for byte" if content["same_bytes"] else "value for value"
        print_lines(f"{name} equals, {how}, the result of replaying the plan on the original")
    else:
        names = ", ".join(trained[:_NAMED]) + (", …" if len(trained) > _NAMED else "")
        print_lines(
            f"{name} equals, value for value, the result of replaying the plan on the original, except for "
            f"{len(trained)} refitted or trained weights, whose SHA-256 the plan holds: {names}",
            f"it runs; compared with the original, {_difference(content['measured'])}",
        )
    print_lines(report.proof_line(content))


def _show_chain(content: Mapping[str, Any]) -> None:
    """Print the check of a deployed file."""
    links = content["deployed"]["links"]
    if "trained" in content:
        _show_pruned(content, links[0]["source"])
    for link in links:
        table = report.table_of(
            f"From {link['source']} to {link['file']}: output difference of each step from the previous one",
            "step", "description", "recorded", "largest / range", "RMS / std", "same answer",
        )  # fmt: skip  # one column after the other
        table.columns[1].justify = "left"
        for step in link["steps"]:
            table.add_row(step["name"], step["what"], *_cells(step))
        out.print(table)
        is_ort = Path(link["file"]).suffix == ".ort"
        how = "has the SHA-256 of its manifest" if is_ort else "equals, value for value, the result of these steps"
        print_lines(f"{link['file']} {how}")
    measured = content["deployed"]["measured"]
    if measured is not None:
        print_lines(f"{links[-1]['file']} runs; compared with the original, {_difference(measured)}")


def _cells(step: Mapping[str, Any]) -> list[str]:
    """Return the recorded and the measured differences of a step as table cells."""
    then, now = step["recorded"], step["measured"]
    agreement = None if now is None else now["agreement"]
    return [
        "not compared" if then is None else _number(then.get("largest")),
        "not compared" if now is None else _number(now["largest"]),
        "" if now is None else _number(now["typical"]),
        "" if agreement is None else f"{100 * agreement:.1f} %",
    ]


def _number(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, int | float) else "not finite"


def _difference(found: Mapping[str, Any]) -> str:
    """Return a clause that says how far outputs differ."""
    if found["largest"] is None:
        return "its outputs differ in shape, or in where they are not finite"
    agreement = found["agreement"]
    same = "" if agreement is None else f"; {100 * agreement:.1f} % of the answers are the same"
    return (
        f"its outputs differ by at most {_number(found['largest'])} of their range, with an RMS difference of "
        f"{_number(found['typical'])} standard deviations{same}"
    )
