"""What `verify` does."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpd_onnx.cli.console import out, plan_path_of, require_outputs, source_of, write_json
from cpd_onnx.errors import InconclusiveError, PlanError
from cpd_onnx.ir.model import Array, load
from cpd_onnx.proof.comparison import INCONCLUSIVE, Difference
from cpd_onnx.proof.files import FileVerification, data_feeds, verify_files
from cpd_onnx.report import tables as report
from cpd_onnx.rewrite.plan import load_plan
from cpd_onnx.workflow.chain import Chain, Given, is_intact, manifest_of, verify_deployed

_BATCHES = 2
_NAMED = 3
"""Refitted or trained weights whose names are printed; all of them are in the JSON."""


def run(options: argparse.Namespace) -> None:
    """Check a file against its original: by its plan, or by the manifest of `deploy` that names it."""
    plan = options.plan or plan_path_of(options.pruned)
    require_outputs(options, reads=[options.original, options.pruned, plan])
    original = load(options.original)

    def feeds() -> Iterable[Mapping[str, Array]] | None:
        source = source_of(options.data, original, options)
        return None if source is None else data_feeds(original, source, _BATCHES)

    there = None if options.plan is not None and not options.via else manifest_of(options.pruned, options.manifest)
    if there is not None and (options.manifest or is_intact(options.pruned, there) or not plan.is_file()):
        given = Given(options.plan, options.via, feeds, lambda model: source_of(options.data, model, options))
        chain = verify_deployed(original, options.pruned, there, given)
        content = {**_pruned(chain.pruned), "deployed": _deployed(chain)}
        _finish(options, content, chain.pruned, _show_chain)
        return
    if not plan.is_file() and options.plan is None:
        raise PlanError(f"{options.pruned} has neither a plan nor a manifest of deploy beside it: give --plan")
    found = verify_files(original, load(options.pruned), load_plan(plan), feeds(), allow_inconclusive=True)
    _finish(options, _pruned(found), found, lambda content: _show(content, "the file"))


def _finish(
    options: argparse.Namespace,
    content: dict[str, Any],
    found: FileVerification | None,
    show: Callable[[Mapping[str, Any]], None],
) -> None:
    """Write or print the outcome; raises InconclusiveError where the proof of the pruned file shows too little."""
    is_written = write_json(options, content)
    if found is not None and found.comparison.verdict == INCONCLUSIVE:
        raise InconclusiveError(report.proof_line(content))
    if not is_written:
        show(content)


# The outcome as plain values.


def _pruned(found: FileVerification | None) -> dict[str, Any]:
    """The check of a pruned file; nothing where the original itself was deployed."""
    if found is None:
        return {}
    return {
        "is_replay": found.is_replay,
        "same_bytes": found.same_bytes,
        "trained": list(found.trained),
        "measured": _plain(found.measured),
        **report.comparison(found.comparison),
    }


def _deployed(chain: Chain) -> dict[str, Any]:
    links = [
        {
            "file": link.file,
            "source": link.source,
            "steps": [
                {"name": step.name, "what": step.what, "recorded": step.recorded, "measured": _plain(step.measured)}
                for step in link.steps
            ],
        }
        for link in chain.links
    ]
    return {"links": links, "measured": _plain(chain.measured)}


def _plain(found: Difference | None) -> dict[str, Any] | None:
    """A difference as JSON has it: what is not finite is null."""
    if found is None:
        return None
    values = asdict(found).items()
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values}


# What is printed.


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
