"""Results as dictionaries for JSON and as tables for a terminal; nothing here prints."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.algebra.reasons import Reason
from cpd_onnx.channels.costs import CostModel
from cpd_onnx.channels.groups import Combed, Frozen
from cpd_onnx.io.files import content_of
from cpd_onnx.ir.model import Model
from cpd_onnx.proof.comparison import INCONCLUSIVE, VERIFIED, WRONG, Comparison
from cpd_onnx.rewrite.plan import groups_of
from cpd_onnx.summary import Summary, count, share

if TYPE_CHECKING:
    from cpd_onnx.budget.latency import CostTable
    from cpd_onnx.pipeline.state import State
    from cpd_onnx.runtime.bench import Bench

INSPECT_FORMAT = "cpd-onnx/inspect"
"""Format name of `inspection`."""
RESULT_FORMAT = "cpd-onnx/result"
"""Format name of `result`."""
REPORT_FORMAT, REPORT_VERSION = "cpd-onnx/report", 2
"""Format name and version of a report's content."""
_SIZE_ONE = Reason("structure", "", "its size is one, or fixed with that of another")
FEW_REASONS = 5
"""Maximum number of reasons in a short table of frozen axes (heuristic)."""
_EXAMPLES = 3
"""Number of tensors that are named for each reason (heuristic)."""
_LEAST_SHOWN = 0.0005
"""Smallest fraction that is not 0.0 % if it is printed with one decimal."""
_MAX_OPERATORS = 8
"""Number of operators in the table of time by operator (heuristic)."""


def prunable_line(content: Mapping[str, Any], what: str) -> str:
    """Return which fraction of the weights has a prunable axis, and how many inputs and outputs alone fix."""
    line = f"{100 * content['prunable_fraction']:.1f} % of the weights {what}"
    fixed = content.get("interface_fraction") or 0.0
    if fixed < _LEAST_SHOWN:
        return line
    return f"{line}, not counting the {100 * fixed:.1f} % that inputs and outputs alone fix"


def inspection(combed: Combed, held: Sequence[int] = (), costs: CostModel | None = None) -> dict[str, Any]:
    """Return the result of combing in the terms of the plan; `held` are the groups pinned by the user."""
    costs = costs or CostModel(combed)
    per_group = costs.of_groups(combed)
    model = combed.folded.original
    return {
        "format": INSPECT_FORMAT,
        "version": 1,
        "source": {"file": model.path.name if model.path else "", "sha256": model.sha256()},
        "costs": asdict(costs.total(KeepMask(combed.atoms))),
        "prunable_fraction": combed.prunable_fraction(),
        "interface_fraction": combed.interface_fraction(),
        "groups": groups_of(combed),
        "group_costs": [
            {"id": g.id, "macs": per_group[g.id].macs, "params": per_group[g.id].params, "held": g.id in held}
            for g in combed.groups
        ],
        "frozen": [
            {"tensor": f.tensor, "axis": f.axis, "indices": f.indices, "of": f.of, "reason": "; ".join(f.reasons)}
            for f in combed.frozen()
        ],
        "kept": frozen_reasons(combed),
        "without_rule": dict(combed.without_rule),
        "unknown_shapes": dict(combed.folded.unknown),
    }


def frozen_reasons(combed: Combed) -> list[dict[str, Any]]:
    """Return the reasons why axes are frozen: number of axes, number of weights in them, and the largest tensors.

    Reasons are sorted by the number of weights, largest first; those of axes without channels come last.
    """
    dims = {weight.name: weight.shape for weight in combed.weights}
    found: dict[Reason, list[Frozen]] = defaultdict(list)
    for frozen in combed.frozen():
        for reason in frozen.reasons or (_SIZE_ONE,):
            found[reason].append(frozen)

    def weights(frozen: Frozen) -> int:
        return math.prod(dims[frozen.tensor]) * frozen.indices // frozen.of

    reasons: list[dict[str, Any]] = []
    for reason, entries in found.items():
        entries.sort(key=weights, reverse=True)
        largest = [{"tensor": f.tensor, "axis": f.axis, "dims": list(dims[f.tensor])} for f in entries[:_EXAMPLES]]
        total = sum(weights(frozen) for frozen in entries)
        reasons.append({"reason": reason, "axes": len(entries), "weights": total, "largest": largest})
    return sorted(reasons, key=lambda entry: (entry["reason"].kind == "no channels", -entry["weights"]))


def groups_table(content: Mapping[str, Any]) -> Table:
    """Return a table of the groups, one a row."""
    table = table_of("Groups of coupled channels", "id", "group", "kind", "size", "MACs", "parameters", "members")
    for group, costs in zip(content["groups"], content["group_costs"], strict=True):
        name = f"{group['name']} (held)" if costs["held"] else group["name"]
        numbers = (count(costs["macs"]), count(costs["params"]), str(len(group["members"])))
        table.add_row(str(group["id"]), name, group["kind"], str(group["size"]), *numbers)
    return table


def sensitivity_table(content: Mapping[str, Any]) -> Table:
    """Return a table of the error at each width, one group a row."""
    most = max(len(entry["points"]) for entry in content["groups"])
    table = table_of(f"Sensitivity: {content['error']}, at each width", "group", *[""] * (most - 1))
    for entry in content["groups"]:
        full, *points = entry["points"]
        cells = [f"{point['error']:.3g} at {point['width']}" for point in points]
        table.add_row(f"{entry['group']} ({full['width']})", *cells)
    return table


def frozen_table(reasons: Sequence[Mapping[str, Any]], *, limit: int = 0) -> Table:
    """Return a table of the reasons why axes are frozen, one a row.

    With a limit it has only that many reasons, of axes that hold channels, and one tensor for each.
    """
    if limit:
        reasons = [entry for entry in reasons if entry["reason"].kind != "no channels"]
    table = table_of("Not prunable, and why", "reason", "axes", "weights", "the largest")
    table.columns[3].justify = "left"
    for entry in reasons[: limit or None]:
        largest = largest_text(entry["largest"][: 1 if limit else None])
        table.add_row(entry["reason"], str(entry["axes"]), count(entry["weights"]), largest)
    if limit and len(reasons) > limit:
        table.add_row(f"… and {len(reasons) - limit} more, see 'inspect'", "", "", "")
    return table


def largest_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the largest tensors of a reason as text: name, dims and axis of each."""
    return ", ".join(f"{e['tensor']} {e['dims']} axis {e['axis']}" for e in entries)


def result(state: State, seconds: float) -> dict[str, Any]:
    """Return the result of pruning as plain values; `seconds` is the time that it took."""
    combed, allocation = state.need("combed", "comb"), state.need("allocation", "allocate")
    source = state.original.path
    return {
        "format": RESULT_FORMAT,
        "version": 1,
        "source": {"file": source.name if source else "", "sha256": state.original.sha256()},
        "budget": dict(state.budget),
        "before": asdict(allocation.before),
        "after": asdict(allocation.after),
        "groups": len(combed.groups),
        "groups_pruned": sum(bool(removed) for removed in allocation.removed),
        "prunable_fraction": combed.prunable_fraction(),
        "interface_fraction": combed.interface_fraction(),
        "kept": frozen_reasons(combed),
        "notes": [*allocation.notes, *(state.repaired or {}).get("notes", ())],
        "edits": [asdict(edit) for edit in state.edits],
        "verification": None if state.verification is None else comparison(state.verification),
        "repaired": None if state.repaired is None else dict(state.repaired),
        "seconds": round(seconds, 3),
    }


def comparison(found: Comparison) -> dict[str, Any]:
    """Return the outcome of a proof as plain values."""
    content = asdict(found)
    return content | {"outputs": list(content["outputs"]), "notes": list(found.notes), "passed": found.passed}


def size_of(model: Model, path: Path) -> int:
    """Return the size of a model in bytes: that of its file, plus its weights if they are not in that file."""
    size = content_of(path).stat().st_size
    return size if size >= model.data_bytes() else size + model.data_bytes()


def cost_rows(content: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Return name, value before and value after of each cost that a result or report has."""
    before, after, sizes = (content.get(name) or {} for name in ("before", "after", "bytes"))
    names = {"MACs": "macs", "parameters": "params", "prunable channels": "channels"}
    rows = [(name, before[key], after[key]) for name, key in names.items() if key in before and key in after]
    return rows + ([("file", sizes["before"], sizes["after"])] if {"before", "after"} <= sizes.keys() else [])


def bytes_text(number: float) -> str:
    """Return a number of bytes with its unit.

    >>> bytes_text(1234567), bytes_text(12)
    ('1.2 MB', '12 B')
    """
    text = count(number)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def costs_table(content: Mapping[str, Any]) -> Table:
    """Return a table of the costs before and after pruning."""
    table = table_of("", "", "before", "after", "remains")
    for name, before, after in cost_rows(content):
        text = bytes_text if name == "file" else count
        table.add_row(name, text(before), text(after), share(after, before))
    return table


def latency_table(found: CostTable) -> Table:
    """Return a table of the slowdown of widths that are multiples of other numbers than the fastest one.

    Groups are in one row if their widths are fast at multiples of the same number.
    """
    multiples = sorted({multiple for group in found.groups for multiple in group.slowdown})
    title = f"{found.ms:.2f} ms; time for the same work, by what the widths are multiples of"
    table = table_of(title, "fast at multiples of", "groups", *(str(m) for m in multiples))
    for fast in sorted({group.multiple for group in found.groups}):
        groups = [group for group in found.groups if group.multiple == fast]
        cells = ([g.slowdown[m] for g in groups if m in g.slowdown] for m in multiples)
        table.add_row(str(fast), str(len(groups)), *(f"{median(values):.2f}" if values else "" for values in cells))
    return table


def kernels_table(found: CostTable) -> Table:
    """Return a table of the layers of a cost table: time in the original, and the error of the fitted times."""
    title = f"{found.ms:.3g} ms, by {found.machine.get('source', 'onnxruntime')}"
    table = table_of(title, "layer", "operator", "ms", "error of the fit")
    for kernel in found.kernels:
        table.add_row(kernel.name, kernel.operator, f"{kernel.ms:.3g}", f"{kernel.error:.1%}")
    return table


def profiles_table(found: Bench) -> Table:
    """Return a table of milliseconds in one run by operator, one column a model, with the ratio to the first model."""
    setting = found.profiled.words(("threads",))
    table = table_of(f"Time by operator, ms ({setting}, one thread)", "operator", *found.profiles)
    for operator, spent in longest(found.profiles, _MAX_OPERATORS):
        first, *others = spent
        table.add_row(operator, f"{first:.3f}", *(f"{each:.3f} ({share(each, first)})" for each in others))
    return table


def longest(profiles: Mapping[str, Mapping[str, float]], limit: int) -> list[tuple[str, list[float]]]:
    """Return the time of each model in the operators that take longest in any of them, in all others, and in total.

    >>> longest({"a": {"Conv": 3.0, "Relu": 1.0}, "b": {"Conv": 1.0, "Add": 0.5, "Relu": 0.25}}, 1)
    [('Conv', [3.0, 1.0]), ('the others', [1.0, 0.75]), ('all', [4.0, 1.75])]
    """
    most: dict[str, float] = defaultdict(float)
    for profile in profiles.values():
        for operator, spent in profile.items():
            most[operator] = max(most[operator], spent)
    names = sorted(most, key=lambda operator: -most[operator])
    shown, rest = names[:limit], names[limit:]
    rows = [(name, [profile.get(name, 0.0) for profile in profiles.values()]) for name in shown]
    if rest:
        rows.append(("the others", [sum(p.get(name, 0.0) for name in rest) for p in profiles.values()]))
    return [*rows, ("all", [sum(profile.values()) for profile in profiles.values()])]


def summary_table(summary: Summary) -> Table:
    """Return a summary as a table for a terminal."""
    width = len(summary.rows[0]) if summary.rows else len(summary.columns)
    table = table_of(summary.title, *(summary.columns or [""] * width))
    for row in summary.rows:
        table.add_row(*row)
    table.show_header = bool(summary.columns)
    return table


def proof_line(found: Mapping[str, Any] | None) -> str:
    """Return the outcome of a proof as one sentence."""
    if found is None:
        return "not verified"
    notes = "; ".join(found.get("notes") or ())
    verdict = found.get("verdict", VERIFIED)
    if verdict == INCONCLUSIVE:
        return f"inconclusive: {notes}"
    allowed, effect = found["allowed"], found["effect"]
    bound = f"{allowed:.0e}"
    if verdict == WRONG:
        return (
            f"wrong: differs from the original with the removed channels masked by {found['difference']:.1e} "
            f"(allowed {bound}) on {found['runs']} sets of inputs"
        )
    if allowed > found["tolerance"]:
        bound += ", the effect of rounding"
    if 100 * allowed <= effect < math.inf:
        bound += f", a hundredth of the effect is {effect / 100:.0e}"
    line = (
        f"verified: equals the original with the removed channels masked to {found['difference']:.1e} "
        f"(allowed {bound}) on {found['runs']} sets of inputs; "
        f"masking changes {effect_words(effect)} before any training"
    )
    if 100 * allowed > effect > 0 or effect == 0 < allowed < found["tolerance"]:
        line += ", masking other channels, to test the comparison, by more"
    return f"{line}; {notes}" if notes else line


def effect_words(effect: float) -> str:
    """Return what masking changes, and by how much: the values of outputs, or their sizes, which is infinitely much."""
    if effect == math.inf:
        return "sizes of outputs, or which of their values are finite,"
    return f"the outputs by {effect:.2g}"


def repair_line(found: Mapping[str, Any]) -> str:
    """Return the outcome of a repair as one sentence."""
    fits, left = found["fitted"], found["left"]
    line = f"repaired: {len(fits)} weights fitted to the original"
    if fits:
        before, after = (100 * median(fit[key] for fit in fits) for key in ("before", "after"))
        line += f", median error {before:.1f} % of the standard deviation -> {after:.1f} %"
    reasons = ", ".join(sorted(set(left.values())))
    return f"{line}; {len(left)} not fitted ({reasons})" if left else line


def costs_line(costs: Mapping[str, float]) -> str:
    """Return MACs and parameters as text."""
    return f"{count(costs['macs'])} multiply-accumulates a sample, {count(costs['params'])} parameters"


def table_of(title: str, *columns: str) -> Table:
    """Return an empty table: names are left-aligned, numbers right-aligned, and long cells are wrapped, never cut."""
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for place, name in enumerate(columns):
        is_text = place == 0 or name in ("group", "kind", "reason")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    return table
