"""The outcome of `verify` as lines and tables, for a terminal and for the record of an audit."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

from cpd_onnx.report.tables import proof_line, table_of

Said: TypeAlias = "str | Table"
"""A line, or a table."""

_NAMED = 3
"""Number of refitted or trained weights that are named; the JSON holds all of them."""
_WIDTH = 120
"""Width in columns of a table that is written to a file (heuristic)."""


def outcome(content: Mapping[str, Any]) -> Iterator[Said]:
    """Yield what `verify` found about a file, from its plain values."""
    if "deployed" in content:
        yield from _chain(content)
    else:
        yield from _pruned(content, "the file")


def text(content: Mapping[str, Any]) -> str:
    """Return the outcome as text, the same for the same content."""
    written = io.StringIO()
    console = Console(file=written, width=_WIDTH, highlight=False, markup=False, emoji=False, color_system=None)
    for said in outcome(content):
        console.print(said, soft_wrap=isinstance(said, str))
    lines = (line.rstrip() for line in written.getvalue().splitlines())
    return "\n".join(lines) + "\n"


def _pruned(content: Mapping[str, Any], name: str) -> Iterator[Said]:
    """Yield the check of a pruned file."""
    trained = content["trained"]
    if not trained:
        how = "byte for byte" if content["same_bytes"] else "value for value"
        yield f"{name} equals, {how}, the result of replaying the plan on the original"
    else:
        names = ", ".join(trained[:_NAMED]) + (", …" if len(trained) > _NAMED else "")
        yield (
            f"{name} equals, value for value, the result of replaying the plan on the original, except for "
            f"{len(trained)} refitted or trained weights, whose SHA-256 the plan holds: {names}"
        )
        yield f"it runs; compared with the original{_inputs(content)}, {_difference(content['measured'])}"
    yield proof_line(content)


def _chain(content: Mapping[str, Any]) -> Iterator[Said]:
    """Yield the check of a deployed file."""
    links = content["deployed"]["links"]
    if "trained" in content:
        yield from _pruned(content, links[0]["source"])
    for link in links:
        yield _steps(link)
        how = _HOW.get(Path(link["file"]).suffix, "equals, value for value, the result of these steps")
        fitted = sum(step["fitted"] for step in link["steps"])
        but = f", except for {fitted} weights fitted to samples, whose SHA-256 the manifest holds" if fitted else ""
        yield f"{link['file']} {how}{but}"
    measured = content["deployed"]["measured"]
    if measured is not None:
        yield f"{links[-1]['file']} runs; compared with the original{_inputs(content)}, {_difference(measured)}"


_HOW = {
    ".ort": "has the SHA-256 of its manifest",
    ".c": "equals, byte for byte, the result of these steps",
}
"""How a file that is not in ONNX was checked, by its suffix."""


def _inputs(content: Mapping[str, Any]) -> str:
    """Return a phrase that names random inputs, on which answers say little about the accuracy."""
    return " on random inputs" if content.get("has_data") is False else ""


def _steps(link: Mapping[str, Any]) -> Table:
    """Return a table of the steps of one deploy run."""
    title = f"From {link['source']} to {link['file']}: output difference of each step from the previous one"
    table = table_of(title, "step", "description", "recorded", "largest / range", "RMS / range", "same answer")
    table.columns[1].justify = "left"
    for step in link["steps"]:
        then, now = step["recorded"], step["measured"]
        agreement = None if now is None else now["agreement"]
        table.add_row(
            step["name"],
            step["what"],
            "not compared" if then is None else _number(then.get("largest")),
            "not compared" if now is None else _number(now["largest"]),
            "" if now is None else _number(now["of_range"]),
            "" if agreement is None else f"{100 * agreement:.1f} %",
        )
    return table


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
        f"{_number(found['of_range'])} of it{same}"
    )
