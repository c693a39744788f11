"""Results as dictionaries for JSON and as tables for people; nothing here prints."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from cpd_onnx.compare import INCONCLUSIVE, VERIFIED, WRONG, Comparison
from cpd_onnx.cost import CostModel
from cpd_onnx.graph import Model
from cpd_onnx.groups import Combed, Frozen
from cpd_onnx.kept import Kept
from cpd_onnx.plan import Plan, groups_of
from cpd_onnx.rules.api import KERNEL_EXTENT, TABLE_ROWS

if TYPE_CHECKING:
    from cpd_onnx.bench import Bench, Timing
    from cpd_onnx.latency import CostTable
    from cpd_onnx.state import State

INSPECT_FORMAT = "cpd-onnx/inspect"
RESULT_FORMAT = "cpd-onnx/result"
REPORT_FORMAT, REPORT_VERSION = "cpd-onnx/report", 1
_NO_CHANNELS = (KERNEL_EXTENT, TABLE_ROWS)
"""Reasons of axes that hold no channels: told last, or not at all."""
FEW_REASONS = 5
"""For keeping channels: how many are told where space is short."""
_EXAMPLES = 3
_LONGEST = 8
"""Operators of which `bench` says how much time they take."""


def inspection(combed: Combed, held: Sequence[int] = ()) -> dict[str, Any]:
    """What combing found, in the plan's words; `held` are the groups that the user wants to keep."""
    costs = CostModel(combed)
    per_group = costs.of_groups(combed)
    model = combed.folded.model
    return {
        "format": INSPECT_FORMAT,
        "version": 1,
        "source": {"file": model.path.name if model.path else "", "sha256": model.sha256()},
        "costs": asdict(costs.total(Kept(combed.atoms))),
        "prunable_fraction": combed.prunable_fraction(),
        "groups": groups_of(combed),
        "group_costs": [
            {"id": g.id, "macs": per_group[g.id].macs, "params": per_group[g.id].params, "held": g.id in held}
            for g in combed.groups
        ],
        "frozen": [
            {"tensor": f.tensor, "axis": f.axis, "indices": f.indices, "of": f.of, "reason": "; ".join(f.reasons)}
            for f in combed.frozen()
        ],
        "kept": kept_reasons(combed),
        "without_rule": dict(combed.without_rule),
        "unknown_shapes": dict(combed.folded.unknown),
    }


def kept_reasons(combed: Combed) -> list[dict[str, Any]]:
    """Why axes are kept: for each reason how many, how many weights lie in what is kept, and the largest tensors.

    The reason that holds most weights comes first, those of axes without channels last.
    """
    dims = {weight.name: weight.shape for weight in combed.weights}
    found: dict[str, list[Frozen]] = defaultdict(list)
    for frozen in combed.frozen():
        for reason in frozen.reasons or ("its size is one, or fixed with that of another",):
            found[reason].append(frozen)

    def weights(frozen: Frozen) -> int:
        return math.prod(dims[frozen.tensor]) * frozen.indices // frozen.of

    reasons = []
    for reason, entries in found.items():
        entries.sort(key=weights, reverse=True)
        largest = [{"tensor": f.tensor, "axis": f.axis, "dims": list(dims[f.tensor])} for f in entries[:_EXAMPLES]]
        total = sum(weights(frozen) for frozen in entries)
        reasons.append({"reason": reason, "axes": len(entries), "weights": total, "largest": largest})
    return sorted(reasons, key=lambda r: (str(r["reason"]) in _NO_CHANNELS, -int(str(r["weights"]))))


def groups_table(content: Mapping[str, Any]) -> Table:
    """One row a group."""
    table = table_of("Groups of coupled channels", "id", "group", "kind", "size", "MACs", "parameters", "members")
    for group, costs in zip(content["groups"], content["group_costs"], strict=True):
        name = f"{group['name']} (held)" if costs["held"] else group["name"]
        numbers = (count(costs["macs"]), count(costs["params"]), str(len(group["members"])))
        table.add_row(str(group["id"]), name, group["kind"], str(group["size"]), *numbers)
    return table


def sensitivity_table(content: Mapping[str, Any]) -> Table:
    """One row a group: what is lost at each of its widths."""
    most = max(len(entry["points"]) for entry in content["groups"])
    table = table_of(f"Sensitivity: {content['error']}, at each width", "group", *[""] * (most - 1))
    for entry in content["groups"]:
        full, *points = entry["points"]
        cells = [f"{point['error']:.3g} at {point['width']}" for point in points]
        table.add_row(f"{entry['group']} ({full['width']})", *cells)
    return table


def kept_table(reasons: Sequence[Mapping[str, Any]], *, limit: int = 0) -> Table:
    """One row a reason; with a limit only the first ones, and only those of channels."""
    if limit:
        reasons = [entry for entry in reasons if entry["reason"] not in _NO_CHANNELS]
    table = table_of("Kept, and why", "reason", "axes", "weights", "the largest")
    table.columns[3].justify = "left"
    for entry in reasons[: limit or None]:
        largest = ", ".join(
            f"{e['tensor']} {e['dims']} axis {e['axis']}" for e in entry["largest"][: 1 if limit else None]
        )
        table.add_row(entry["reason"], str(entry["axes"]), count(entry["weights"]), largest)
    if limit and len(reasons) > limit:
        table.add_row(f"… and {len(reasons) - limit} more, see 'inspect'", "", "", "")
    return table


def result(state: State, seconds: float) -> dict[str, Any]:
    """What pruning gave."""
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
        "kept": kept_reasons(combed),
        "notes": list(allocation.notes),
        "edits": [asdict(edit) for edit in state.edits],
        "verification": None if state.verification is None else comparison(state.verification),
        "repaired": None if state.repaired is None else dict(state.repaired),
        "seconds": round(seconds, 3),
    }


def comparison(found: Comparison) -> dict[str, Any]:
    """The outcome of a comparison."""
    return asdict(found) | {"passed": found.passed}


def size_of(model: Model, path: Path) -> int:
    """Bytes that a model takes at its path, with its weights where they cannot be in that file."""
    here = path.stat().st_size
    return here if here >= model.data_bytes() else here + model.data_bytes()


def costs_table(content: Mapping[str, Any]) -> Table:
    """Before and after."""
    table = table_of("", "", "before", "after", "remains")
    for name, key in (("MACs", "macs"), ("parameters", "params"), ("prunable channels", "channels")):
        before, after = content["before"][key], content["after"][key]
        table.add_row(name, count(before), count(after), share(after, before))
    sizes = content["bytes"]
    table.add_row(
        "file", f"{count(sizes['before'])}B", f"{count(sizes['after'])}B", share(sizes["after"], sizes["before"])
    )
    return table


def timings_table(timings: Sequence[Timing]) -> Table:
    """One row a model and setting."""
    columns = ("model", "provider", "batch", "threads", "p50 ms", "p90 ms", "p99 ms", "samples/s", "of the first")
    table = table_of("Latency", *columns)
    for timing in timings:
        place = timing.setting
        numbers = (f"{value:.2f}" for value in (timing.p50, timing.p90, timing.p99))
        table.add_row(
            timing.model, place.provider.removesuffix("ExecutionProvider"), str(place.batch or ""),
            str(place.threads or ""), *numbers, f"{timing.per_second:.0f}", f"{100 * timing.ratio:.1f} %",
        )  # fmt: skip  # a row
    return table


def memory_table(memory: Mapping[str, float]) -> Table:
    """One row a model."""
    table = table_of("Memory", "model", "peak MiB", "of the first")
    first = next(iter(memory.values()), 0.0)
    for name, mebibytes in memory.items():
        table.add_row(name, f"{mebibytes:.1f}", share(mebibytes, first))
    return table


def latency_table(found: CostTable) -> Table:
    """One row for each multiple that some groups' widths should be of, with what the others would cost these groups."""
    multiples = sorted({multiple for group in found.groups for multiple in group.slowdown})
    title = f"{found.ms:.2f} ms; time for the same work, by what the widths are multiples of"
    table = table_of(title, "fast at multiples of", "groups", *(str(m) for m in multiples))
    for fast in sorted({group.multiple for group in found.groups}):
        groups = [group for group in found.groups if group.multiple == fast]
        seen = ([g.slowdown[m] for g in groups if m in g.slowdown] for m in multiples)
        table.add_row(str(fast), str(len(groups)), *(f"{median(values):.2f}" if values else "" for values in seen))
    return table


def profiles_table(found: Bench) -> Table:
    """One row an operator, one column a model: milliseconds in one run, and what that is of the first model's."""
    place = found.profiled
    batch = f", batch {place.batch}" if place.batch else ""
    provider = place.provider.removesuffix("ExecutionProvider")
    table = table_of(f"Where the time goes, ms ({provider}{batch}, one thread)", "operator", *found.profiles)
    for operator, spent in longest(found.profiles, _LONGEST):
        first, *others = spent
        table.add_row(operator, f"{first:.3f}", *(f"{each:.3f} ({share(each, first)})" for each in others))
    return table


def longest(profiles: Mapping[str, Mapping[str, float]], limit: int) -> list[tuple[str, list[float]]]:
    """What each model spends on the operators that take longest in any of them, on the others, and on all.

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


def values_table(values: Mapping[str, str]) -> Table:
    """Names and values."""
    table = table_of("", "", "")
    for name, value in values.items():
        table.add_row(name, value)
    table.show_header = False
    return table


def model_table(model: Model) -> Table:
    """What a file holds, in a few rows."""
    shapes = {
        kind: ", ".join(f"{i.name} {_dims(i)}" for i in entries if not model.has(i.name))
        for kind, entries in (("inputs", model.graph.input), ("outputs", model.graph.output))
    }
    return values_table({
        "model": str(model.path or model.graph.name), "opset": str(model.opset),
        "nodes": str(len(model.graph.node)), "initializers": str(len(model.graph.initializer)), **shapes,
    })  # fmt: skip  # a table


def _dims(entry: Any) -> str:
    """The shape of an input or output, as the file has it."""
    dims = entry.type.tensor_type.shape.dim
    return f"[{', '.join(dim.dim_param or str(dim.dim_value or '?') for dim in dims)}]"


def plan_table(plan: Plan) -> Table:
    """What a plan takes away, in a few rows."""
    content, removed = plan.content, plan.removed
    asked = " ".join(f"{content['budget'].get(name)}" for name in ("kind", "target", "spread"))
    costs = {
        name: f"{count(content['before'][key])} -> {count(content['after'][key])}"
        for name, key in (("MACs", "macs"), ("parameters", "params"))
    }
    return values_table({
        "plan for": f"{content['source'].get('file', '')} ({plan.sha256[:12]}…)", "asked for": asked, **costs,
        "groups pruned": f"{sum(map(bool, removed.values()))} of {len(removed)}",
        "channels removed": str(sum(map(len, removed.values()))),
    })  # fmt: skip  # a table


def comparison_table(found: Comparison) -> Table:
    """A comparison in a few rows."""
    return values_table({
        "verdict": found.verdict, "difference": f"{found.difference:.2g}",
        "allowed": f"{found.allowed:.2g}", "by rounding alone": f"{found.noise:.2g}",
        "by the removal itself": f"{found.effect:.2g}", "sets of inputs": str(found.runs),
    })  # fmt: skip  # a table


def state_table(state: State) -> Table:
    """How far a model has come, in a few rows."""
    values = {"model": str(state.original.path or state.original.graph.name)}
    if state.combed is not None:
        values["groups"] = str(len(state.combed.groups))
    if state.allocation is not None:
        before, after = state.allocation.before, state.allocation.after
        values["MACs"] = f"{count(before.macs)} -> {count(after.macs)}"
        values["parameters"] = f"{count(before.params)} -> {count(after.params)}"
    if state.plan is not None:
        values["edits"] = str(len(state.edits))
        values["proof"] = proof_line(None if state.verification is None else comparison(state.verification))
    if state.repaired is not None:
        values["repair"] = repair_line(state.repaired)
    if state.distilled is not None:
        values["training"] = f"{state.distilled['steps']} steps"
    return values_table(values)


def as_html(*tables: Table) -> str:
    """Tables for a notebook, with everything escaped.

    >>> as_html(values_table({"a<b": "1"}))
    '<table><tr><td style="text-align: left">a&lt;b</td><td style="text-align: right">1</td></tr></table>'
    """
    return "".join(map(_html, tables))


def _html(table: Table) -> str:
    places = [f' style="text-align: {column.justify}"' for column in table.columns]
    heads = [str(column.header) for column in table.columns] if table.show_header else []
    rows = zip(*(column.cells for column in table.columns), strict=True)
    drawn = [_row("th", heads, places)] if heads else []
    drawn += [_row("td", map(str, row), places) for row in rows]
    caption = f"<caption>{escape(str(table.title))}</caption>" if table.title else ""
    return f"<table>{caption}{''.join(drawn)}</table>"


def _row(kind: str, cells: Iterable[str], places: Sequence[str]) -> str:
    found = (f"<{kind}{place}>{escape(cell)}</{kind}>" for cell, place in zip(cells, places, strict=True))
    return f"<tr>{''.join(found)}</tr>"


def proof_line(found: Mapping[str, Any] | None) -> str:
    """The proof in one sentence."""
    if found is None:
        return "not verified"
    notes = "; ".join(found.get("notes") or ())
    verdict = found.get("verdict", VERIFIED)
    if verdict == INCONCLUSIVE:
        return f"inconclusive: {notes}"
    allowed, effect = found["allowed"], found["effect"]
    why = f"{allowed:.0e}"
    if verdict == WRONG:
        return (
            f"wrong: differs from the original with the removed channels masked by {found['difference']:.1e} "
            f"(allowed {why}) on {found['runs']} sets of inputs"
        )
    if allowed > found["tolerance"]:
        why += ", what rounding does here"
    if 100 * allowed <= effect:
        why += f", a hundredth of the effect is {effect / 100:.0e}"
    line = (
        f"verified: equals the original with the removed channels masked to {found['difference']:.1e} "
        f"(allowed {why}) on {found['runs']} sets of inputs; "
        f"they change the outputs by {effect:.2g} before any training"
    )
    if 100 * allowed > effect > 0 or effect == 0 < allowed < found["tolerance"]:
        line += ", others that were masked to try the comparison by more"
    return f"{line}; {notes}" if notes else line


def repair_line(found: Mapping[str, Any]) -> str:
    """What a repair did, in one sentence."""
    fits, left = found["fitted"], found["left"]
    line = f"repaired: {len(fits)} weights fitted to the original"
    if fits:
        before, after = (100 * median(fit[key] for fit in fits) for key in ("before", "after"))
        line += f", median error {before:.1f} % of the spread -> {after:.1f} %"
    reasons = ", ".join(sorted(set(left.values())))
    return f"{line}; {len(left)} left: what {reasons}" if left else line


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
    return f"{100 * part / whole:.1f} %" if whole else "–"  # noqa: RUF001  # a dash is meant


def costs_line(costs: Mapping[str, float]) -> str:
    """MACs and parameters in words."""
    return f"{count(costs['macs'])} multiply-accumulates a sample, {count(costs['params'])} parameters"


def table_of(title: str, *columns: str) -> Table:
    """A table of names, to the left, and numbers, to the right; what is too long is folded, never cut."""
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for place, name in enumerate(columns):
        is_text = place == 0 or name in ("group", "kind", "reason")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    return table
