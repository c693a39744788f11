"""Results as dictionaries for JSON and as tables for people; nothing here prints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from cpd_onnx.compare import Comparison
from cpd_onnx.cost import CostModel, Costs
from cpd_onnx.groups import Combed
from cpd_onnx.kept import Kept
from cpd_onnx.plan import groups_of, sha256
from cpd_onnx.state import State

INSPECT_FORMAT = "cpd-onnx/inspect"
RESULT_FORMAT = "cpd-onnx/result"


def inspection(combed: Combed) -> dict[str, Any]:
    """What combing found, in the plan's words."""
    costs = CostModel(combed)
    total = costs.total(Kept(combed.atoms))
    per_group = costs.of_groups(combed)
    model = combed.folded.model
    return {
        "format": INSPECT_FORMAT,
        "version": 1,
        "source": {"file": model.path.name if model.path else "", "sha256": sha256(model)},
        "costs": asdict(total),
        "prunable_fraction": combed.prunable_fraction(),
        "groups": [
            group | {"macs": per_group[group["id"]].macs, "params": per_group[group["id"]].params}
            for group in groups_of(combed)
        ],
        "frozen": [
            {"tensor": f.tensor, "axis": f.axis, "indices": f.indices, "of": f.of, "reason": "; ".join(f.reasons)}
            for f in combed.frozen()
        ],
        "without_rule": dict(combed.without_rule),
        "unknown_shapes": dict(combed.folded.unknown),
    }


def groups_table(content: Mapping[str, Any]) -> Table:
    """One row a group."""
    table = Table("id", "group", "kind", "size", "MACs through it", "parameters", "members", title="Groups of coupled channels")
    for column in (0, 3, 4, 5, 6):
        table.columns[column].justify = "right"
    for group in content["groups"]:
        numbers = (count(group["macs"]), count(group["params"]), str(len(group["members"])))
        table.add_row(str(group["id"]), group["name"], group["kind"], str(group["size"]), *numbers)
    return table


def kept_table(frozen: Sequence[Mapping[str, Any]], *, limit: int = 0) -> Table:
    """One row a reason, commonest first; how many axes it holds and an example."""
    axes: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in frozen:
        axes[entry["reason"] or "its size is one, or fixed with that of another"].append(entry)
    table = Table("reason", "axes", "indices", "for example", title="Kept, and why")
    ordered = sorted(axes.items(), key=lambda item: -sum(e["indices"] for e in item[1]))
    for reason, entries in ordered[: limit or None]:
        example = max(entries, key=lambda e: e["indices"])
        indices = sum(e["indices"] for e in entries)
        table.add_row(reason, str(len(entries)), str(indices), f"{example['tensor']} axis {example['axis']}")
    if limit and len(ordered) > limit:
        table.add_row(f"… and {len(ordered) - limit} more reasons, see 'inspect'", "", "", "")
    return table


def result(state: State, output: Path | None, seconds: float) -> dict[str, Any]:
    """What pruning gave."""
    combed, allocation = state.need("combed", "comb"), state.need("allocation", "allocate")
    kept = Kept(combed.atoms)
    kept.remove(allocation.channels(combed))
    content: dict[str, Any] = {
        "format": RESULT_FORMAT,
        "version": 1,
        "source": {"file": str(state.original.path or ""), "sha256": sha256(state.original)},
        "output": str(output) if output else "",
        "budget": dict(state.budget),
        "before": asdict(allocation.before),
        "after": asdict(allocation.after),
        "bytes": {"before": size_of(state.original), "after": size_of(state.model)},
        "groups": len(combed.groups),
        "groups_pruned": sum(bool(removed) for removed in allocation.removed),
        "prunable_fraction": combed.prunable_fraction(),
        "notes": list(allocation.notes),
        "edits": [asdict(edit) for edit in state.edits],
        "verification": None if state.verification is None else comparison(state.verification),
        "seconds": round(seconds, 3),
    }
    return content


def comparison(found: Comparison) -> dict[str, Any]:
    """The outcome of a comparison."""
    return asdict(found) | {"passed": found.passed}


def size_of(model: Any) -> int:
    """Bytes that a model takes in files."""
    return int(model.data_bytes() + model.proto.ByteSize())


def costs_table(content: Mapping[str, Any]) -> Table:
    """Before and after."""
    table = Table("", "before", "after", "remains", title="Pruned")
    for column in (1, 2, 3):
        table.columns[column].justify = "right"
    rows = [("MACs", "macs"), ("parameters", "params"), ("prunable channels", "channels")]
    for name, key in rows:
        before, after = content["before"][key], content["after"][key]
        table.add_row(name, count(before), count(after), share(after, before))
    table.add_row("bytes", count(content["bytes"]["before"]), count(content["bytes"]["after"]), share(content["bytes"]["after"], content["bytes"]["before"]))
    return table


def proof_line(found: Mapping[str, Any] | None) -> str:
    """The proof in one sentence."""
    if found is None:
        return "not verified"
    return (
        f"verified: equals the original with the removed channels silenced to {found['difference']:.1e} "
        f"(allowed {found['tolerance']:.0e}) on {found['runs']} sets of inputs; "
        f"they change the outputs by {found['effect']:.2g} before any training"
    )


def count(number: float) -> str:
    """A large number with a unit.

    >>> count(125485696), count(12)
    ('125.5 M', '12')
    """
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number:.0f}"


def share(part: float, whole: float) -> str:
    """A ratio in percent."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def costs_line(costs: Costs) -> str:
    """MACs and parameters in words."""
    return f"{count(costs.macs)} multiply-accumulates a sample, {count(costs.params)} parameters"
