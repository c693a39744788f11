"""What `verify` prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpd_onnx.cli.console import out, printed_json
from cpd_onnx.report import tables as report
from cpd_onnx.workflow.prune import require_shown, verify
from cpd_onnx.workflow.requests import VerifyFile

_NAMED = 3
"""Refitted or trained weights whose names are printed; all of them are in the JSON."""


def run(request: VerifyFile) -> None:
    """Check a file against its original, and say how that went."""
    content = verify(request)
    is_printed = printed_json(request, content)
    require_shown(content)
    if not is_printed:
        show = _show_chain if "deployed" in content else _show_file
        show(content)


def _show_file(content: Mapping[str, Any]) -> None:
    _show(content, "the file")


def _show(content: Mapping[str, Any], what: str) -> None:
    """The check of a pruned file."""
    trained = content["trained"]
    if not trained:
        how = "byte for byte" if content["same_bytes"] else "value for value"
        out.print(f"{what} is, {how}, what the plan makes of the original", soft_wrap=True)
    else:
        names = ", ".join(trained[:_NAMED]) + (", …" if len(trained) > _NAMED else "")
        out.print(
            f"{what} is, value for value, what the plan makes of the original, but for {len(trained)} refitted or "
            f"trained weights, whose SHA-256 the plan names: {names}",
            soft_wrap=True,
        )
        out.print(f"it runs; beside the original's, {_apart(content['measured'])}", soft_wrap=True)
    out.print(report.proof_line(content), soft_wrap=True)


def _show_chain(content: Mapping[str, Any]) -> None:
    """The check of a deployed file."""
    links = content["deployed"]["links"]
    if "trained" in content:
        _show(content, links[0]["source"])
    for link in links:
        table = report.table_of(
            f"From {link['source']} to {link['file']}: outputs of each step beside the one before, of the spread",
            "step", "what", "at most, on record", "at most", "typically", "same answer",
        )  # fmt: skip  # one column after the other
        table.columns[1].justify = "left"
        for step in link["steps"]:
            table.add_row(step["name"], step["what"], *_cells(step))
        out.print(table)
        is_ort = Path(link["file"]).suffix == ".ort"
        how = "has the SHA-256 that its manifest names" if is_ort else "is, value for value, what these steps make"
        out.print(f"{link['file']} {how}", soft_wrap=True)
    if content["deployed"]["measured"] is not None:
        out.print(
            f"{links[-1]['file']} runs; beside the original's, {_apart(content['deployed']['measured'])}",
            soft_wrap=True,
        )


def _cells(step: Mapping[str, Any]) -> list[str]:
    """What was measured of a step, then and now."""
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


def _apart(found: Mapping[str, Any]) -> str:
    """How far outputs are from others, in words."""
    if found["largest"] is None:
        return "its outputs have other sizes, or are not finite in the same places"
    agreement = found["agreement"]
    same = "" if agreement is None else f", and {100 * agreement:.1f} % of the answers are the same"
    return (
        f"its outputs differ by {_number(found['largest'])} of their spread at most and {_number(found['typical'])} "
        f"typically{same}"
    )
