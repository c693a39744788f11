"""Plans (plan.json): what was removed from which file, to be read, compared, and replayed bit for bit."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.branches import Branches, branches
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.costs import Costs
from cpd_onnx.channels.groups import Combed, Group
from cpd_onnx.errors import PlanError
from cpd_onnx.io.files import read_json, require_free, translate_read_errors, write_atomically
from cpd_onnx.ir.interface import INTEGERS_PREFIX, PREFIX
from cpd_onnx.ir.model import Model, ModelSource, load
from cpd_onnx.ir.tensors import changed_values, stored_tensors
from cpd_onnx.summary import Summarised, Summary, count
from cpd_onnx.version import __version__

FORMAT = "cpd-onnx/plan"
"""Value of the key 'format' of a plan."""
VERSION = 3
"""Version of the format that is written; versions 1, and 2, in which a group keeps at least one channel, are read."""
_RENAMED = {"spread": "policy", "multiple": "round_to", "shares": "ratios"}
"""Keys of `budget`: those of format version 1, and what they are called since version 2."""
_ASKED = ("kind", "target", "policy")
"""Entries of a budget that a summary shows."""
_STAMP = "cpd-onnx."
"""Prefix of the keys that `Plan.stamp` writes to `metadata_props` of a model."""


@dataclass(frozen=True, repr=False)
class Plan(Summarised):
    """The record of what was removed from a model.

    Attributes:
        content: The JSON document, which follows `schema()`.

    """

    content: Mapping[str, Any]

    @property
    def removed(self) -> dict[int, list[int]]:
        """Indices of the channels removed from each group, by group id."""
        return {group["id"]: list(group["removed"]) for group in self.content["groups"]}

    @property
    def sha256(self) -> str:
        """SHA-256 of the source file."""
        return str(self.content["source"]["sha256"])

    @property
    def input_shapes(self) -> dict[str, list[int]]:
        """Input shapes that were given for the analysis, by input name."""
        return {name: list(shape) for name, shape in self.content["source"].get("input_shapes", {}).items()}

    @property
    def free_io(self) -> list[str]:
        """Names of the inputs and outputs that may lose channels."""
        return list(self.content["source"].get("free_io", ()))

    @property
    def values(self) -> dict[str, str]:
        """SHA-256 of the values of weights that were refitted or trained after the removal, see `values_sha256`."""
        return dict(self.content.get("values", {}))

    def with_values(self, before: Model, after: Model) -> Plan:
        """Return the plan with the SHA-256 of all values that differ between two models.

        `before` is the model that this plan describes already.
        """
        changed = changed_values(before, after)
        if not changed:
            return self
        known = self.values | changed
        return Plan({**self.content, "values": {name: known[name] for name in stored_tensors(after) if name in known}})

    def without_values(self) -> Plan:
        """Return the plan of the removal alone, without refitted or trained weights and without steps."""
        return Plan({key: value for key, value in self.content.items() if key not in ("values", "steps")})

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the steps of a plan of nested models, largest first; empty for one model."""
        return tuple(self.content.get("steps", {}))

    def at(self, step: str | None) -> Plan:
        """Return the plan of one step, or of the smallest model without a name; raises PlanError if there is none."""
        alone = {key: value for key, value in self.content.items() if key != "steps"}
        if step is None:
            return Plan(alone) if self.steps else self
        if step not in self.steps:
            known = f"its steps are {', '.join(self.steps)}" if self.steps else "it has no steps"
            raise PlanError(f"the plan has no step {step!r}: {known}")
        changed = self.content["steps"][step]
        removed = {group["id"]: group["removed"] for group in changed.get("groups", ())}
        groups = [{**group, "removed": removed.get(group["id"], group["removed"])} for group in alone["groups"]]
        content = {**alone, **changed, "groups": groups}
        return Plan({key: value for key, value in content.items() if value is not None})

    def dumps(self, version: int = VERSION) -> str:
        """Return the document in a format version, as deterministic JSON text with a line per group and per tensor."""
        return self._text if version == VERSION else _text(_in_version(self.content, version))

    @cached_property
    def _text(self) -> str:
        return _text(self.content)

    def stamp(self, model: Model) -> None:
        """Write tool, source and plan to a model's metadata, unless nothing was removed.

        The plan's SHA-256 excludes `values`: repair and training do not change the entry, and the replay of the plan
        has the same one. It is that of the text in format version 1, so that a model has the same entry whatever
        version its plan is stored in.
        """
        if not any(self.removed.values()):
            return
        entries = {
            "tool": str(self.content.get("made_by", "")),
            "source.sha256": self.sha256,
            "plan.sha256": hashlib.sha256(self.without_values().dumps(1).encode()).hexdigest(),
        }
        properties = model.proto.metadata_props
        for old in [entry for entry in properties if entry.key.startswith(_STAMP)]:  # from the source file
            if not old.key.startswith((PREFIX, INTEGERS_PREFIX)):
                properties.remove(old)
        for key, value in entries.items():
            properties.add(key=f"{_STAMP}{key}", value=value)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the document to a file; raises ModelError if it exists and `overwrite` is not set."""
        require_free(Path(path), overwrite=overwrite)
        write_atomically(Path(path), self.dumps().encode())

    def summary(self) -> Summary:
        """Return source, budget, costs and the numbers of removed channels."""
        content, removed = self.content, self.removed
        costs = {
            name: f"{count(content['before'][key])} -> {count(content['after'][key])}"
            for name, key in (("MACs", "macs"), ("parameters", "params"))
        }
        return Summary.of({
            "plan for": f"{content['source'].get('file', '')} ({self.sha256[:12]}…)",
            "asked for": " ".join(str(content["budget"].get(name, "")) for name in _ASKED).strip(), **costs,
            "groups pruned": f"{sum(map(bool, removed.values()))} of {len(removed)}",
            "channels removed": str(sum(map(len, removed.values()))),
        })  # fmt: skip  # a table


def _in_version(content: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Return a plan's content in the terms of a format version; the order of its keys is the same in all."""
    names = _RENAMED if version > 1 else {new: old for old, new in _RENAMED.items()}
    budget = {names.get(key, key): value for key, value in content["budget"].items()}
    return {**content, "version": version, "budget": budget}


def current_budget(budget: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `budget` of any format version in the terms of the present one."""
    return {_RENAMED.get(key, key): value for key, value in budget.items()}


def _text(content: Mapping[str, Any]) -> str:
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {_lines(value)}" for key, value in content.items()) + "\n}\n"


def _lines(value: Any) -> str:
    """Return JSON with one line per entry, from the C encoder, which cannot indent but is ten times as fast."""
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
    has_lines = isinstance(value, Mapping) and (
        any(isinstance(entry, Mapping) for entry in value.values()) or (value and all(map(_is_digest, value.values())))
    )
    if has_lines:
        entries = (f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items())
        return "{\n" + ",\n".join(entries) + "\n }"
    return json.dumps(value)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def schema() -> dict[str, Any]:
    """Return the JSON schema of a plan (draft 2020-12)."""
    text = resources.files("cpd_onnx.rewrite").joinpath("plan.schema.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def load_plan(path: str | Path) -> Plan:
    """Read a plan from a file; a plan of format version 1 is converted to the present one.

    Raises PlanError if the file cannot be read or is not a plan.
    """
    with translate_read_errors(path, "plan", f"plan {path} is not JSON", PlanError):
        content = read_json(path)
    _check(content, str(path))
    return Plan(_in_version(content, VERSION))


def _check(content: Any, where: str) -> None:
    """Raise PlanError where content violates the parts of the schema that a replay depends on."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PlanError(f"{where} is not a plan: 'format' must be {FORMAT!r}")
    if content.get("version") not in range(1, VERSION + 1):
        raise PlanError(f"version of plan {where} must be 1 to {VERSION}, got {content.get('version')!r}")
    source, groups = content.get("source"), content.get("groups")
    if not isinstance(source, dict) or not isinstance(source.get("sha256"), str):
        raise PlanError(f"{where}: 'source' has no 'sha256'")
    _check_shapes(source.get("input_shapes", {}), where)
    free = source.get("free_io", [])
    if not isinstance(free, list) or not all(isinstance(name, str) for name in free):
        raise PlanError(f"{where}: 'free_io' must be a list of names")
    if not isinstance(content.get("budget"), dict) or not isinstance(source.get("file", ""), str):
        raise PlanError(f"{where}: 'budget' or 'file' of 'source' has the wrong type")
    if not isinstance(groups, list):
        raise PlanError(f"{where}: 'groups' must be a list")
    for group in groups:
        _check_group(group, where)
    if len({group["id"] for group in groups}) < len(groups):
        raise PlanError(f"{where}: two groups have the same id")
    values = content.get("values", {})
    if not isinstance(values, dict) or not all(map(_is_digest, values.values())):
        raise PlanError(f"{where}: 'values' must map names of weights to SHA-256 in hexadecimal digits")
    _check_steps(content.get("steps", {}), {group["id"]: group for group in groups}, where)


def _check_shapes(shapes: Any, where: str) -> None:
    if not isinstance(shapes, dict) or not all(isinstance(shape, list) for shape in shapes.values()):
        raise PlanError(f"{where}: 'input_shapes' must map names to lists of sizes")
    if any(
        not isinstance(size, int) or isinstance(size, bool) or size < 1 for shape in shapes.values() for size in shape
    ):
        raise PlanError(f"{where}: 'input_shapes' has sizes that are not positive integers")


def _check_group(group: Any, where: str) -> None:
    if not isinstance(group, dict) or not {"id", "name", "size", "removed"} <= group.keys():
        raise PlanError(f"{where}: a group lacks one of id, name, size, removed")
    removed, size = group["removed"], group["size"]
    if not isinstance(removed, list) or not isinstance(size, int) or not isinstance(group["id"], int):
        raise PlanError(f"{where}: group {group['name']!r} has fields of the wrong type")
    if any(not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < size for i in removed):
        raise PlanError(f"{where}: group {group['name']!r} removes channels out of range")
    if len(set(removed)) != len(removed):
        raise PlanError(f"{where}: group {group['name']!r} removes a channel twice")


def _check_steps(steps: Any, groups: Mapping[int, Mapping[str, Any]], where: str) -> None:
    if not isinstance(steps, dict) or not all(isinstance(step, dict) for step in steps.values()):
        raise PlanError(f"{where}: 'steps' must map names to what differs in a step")
    for step in steps.values():
        changed = step.get("groups", [])
        known = isinstance(changed, list) and all(
            isinstance(each, dict) and each.get("id") in groups for each in changed
        )
        if not known:
            raise PlanError(f"{where}: a step has groups that are not those of the plan")
        for each in changed:
            _check_group({**groups[each["id"]], **each}, where)
        if not isinstance(step.get("budget", {}), dict) or not isinstance(step.get("values") or {}, dict):
            raise PlanError(f"{where}: 'budget' or 'values' of a step has the wrong type")


def make_plan(
    combed: Combed,
    removed: list[list[int]],
    *,
    budget: Mapping[str, Any],
    before: Costs,
    after: Costs,
) -> Plan:
    """Create the plan: what is removed, on which axes of the weights, and which axes are frozen and why."""
    more: dict[str, Any] = {}
    whole = [index for index, positions in enumerate(removed) if len(positions) == len(combed.groups[index])]
    gone = {"gone": _gone(combed, branches(combed, whole))} if whole else {}
    if combed.folded.input_shapes:
        more["input_shapes"] = {name: list(shape) for name, shape in combed.folded.input_shapes.items()}
    if combed.folded.original.free_io:
        more["free_io"] = sorted(combed.folded.original.free_io)
    if combed.folded.evaluated is not None:
        more["evaluated"] = {name: list(parts) for name, parts in combed.folded.evaluated.weights.items()}
    model, keep = combed.folded.original, KeepMask(combed.atoms, channels_of(combed, dict(enumerate(removed))))
    groups = [_group(combed, group, each) for group, each in zip(combed.groups, removed, strict=True)]
    frozen = [
        {"tensor": f.tensor, "axis": f.axis, "indices": f.indices, "of": f.of, "reason": "; ".join(f.reasons)}
        for f in combed.frozen()
    ]
    return Plan(
        {
            "format": FORMAT,
            "version": VERSION,
            "made_by": f"cpd-onnx {__version__}",
            "source": {"file": model.path.name if model.path else "", "sha256": model.sha256(), **more},
            "groups": groups,
            "frozen": frozen,
            "removed": _removed(combed, keep),
            **gone,
            "budget": dict(budget),
            "before": asdict(before),
            "after": asdict(after),
        }
    )


def nested(plans: Mapping[str, Plan]) -> Plan:
    """Return one plan of nested models, with a step for each: that of the last, and what differs in the others.

    Args:
        plans: Plans of one original by the name of their step; each removes what the one before removes, and more.

    Raises PlanError if the models are not nested, or of different originals.
    """
    last = list(plans.values())[-1].content
    steps: dict[str, Any] = {}
    before: Plan | None = None
    for name, plan in plans.items():
        if before is not None and not _is_within(before, plan):
            raise PlanError(f"the model of step {name!r} has channels that the one before lacks")
        content, before = plan.content, plan
        keys = dict.fromkeys((*content, *last))
        steps[name] = {key: content.get(key) for key in keys if key != "groups" and content.get(key) != last.get(key)}
        pairs = zip(content["groups"], last["groups"], strict=True)
        if changed := [{"id": a["id"], "removed": a["removed"]} for a, b in pairs if a["removed"] != b["removed"]]:
            steps[name]["groups"] = changed
    return Plan({**last, "steps": steps})


def _is_within(first: Plan, second: Plan) -> bool:
    """Return whether the second plan removes what the first removes from the same file."""
    more = second.removed
    return first.sha256 == second.sha256 and all(
        set(removed) <= set(more.get(index, ())) for index, removed in first.removed.items()
    )


def groups_of(combed: Combed) -> list[dict[str, Any]]:
    """Return the groups of a model as entries of a plan, with nothing removed."""
    return [_group(combed, group, []) for group in combed.groups]


def channels_of(combed: Combed, removed: Mapping[int, list[int]]) -> Any:
    """Return the primitive atoms of removed channels, which are given by group id."""
    atoms = [combed.groups[index].channels[channels] for index, channels in removed.items() if channels]
    return np.concatenate(atoms) if atoms else np.zeros(0, np.int64)


def match(combed: Combed, plan: Plan) -> dict[int, list[int]]:
    """Return the removed channels of a plan, by group id.

    Raises PlanError if the plan belongs to another model.
    """
    actual = combed.folded.original.sha256()
    if plan.sha256 != actual:
        raise PlanError(
            f"the plan belongs to another file: it names sha256 {plan.sha256[:12]}…, this one has {actual[:12]}…"
        )
    for group in plan.content["groups"]:
        index = group["id"]
        known = combed.groups[index] if 0 <= index < len(combed.groups) else None
        if known is None or known.name != group["name"] or len(known) != group["size"]:
            raise PlanError(f"group {group['name']!r} of the plan is not in the model; was it made by another version?")
    return plan.removed


def _group(combed: Combed, group: Group, removed: list[int]) -> dict[str, Any]:
    members = [
        {"initializer": member.weight.name, "axis": member.axis, **_rows(member.rows), "indices": member.indices}
        for member in combed.members(group)
    ]
    entry: dict[str, Any] = {"id": group.id, "name": group.name, "kind": group.kind, "size": len(group)}
    return entry | {"members": members, "removed": list(removed)}


def _rows(rows: slice) -> dict[str, list[int]]:
    """Return the entry of a plan for the rows of a weight that a member concerns, first and last plus one."""
    return {} if rows == slice(None) else {"rows": [rows.start, rows.stop]}


def _removed(combed: Combed, keep: KeepMask) -> dict[str, dict[str, Any]]:
    """Return the indices removed from each weight, by axis; those of the first use where uses differ.

    Where the rows of a weight lose different columns, these are lists, one for each of its equal blocks of rows.
    """
    found: dict[str, dict[str, Any]] = {}
    for weight in combed.weights:
        axes = weight.axes[0]
        if not weight.is_trained or weight.scope.function:
            continue
        indices: dict[str, Any] = {
            str(i): np.flatnonzero(~keep.mask(a)).tolist() for i, a in enumerate(axes) if keep.shrinks(a)
        }
        if combed.is_divided(axes) and keep.shrinks(axes[1]):
            indices["1"] = [np.flatnonzero(~keep.mask(piece.axes[1])).tolist() for piece in combed.pieces(axes)]
        if indices:
            found[weight.name] = indices
    return found


def _gone(combed: Combed, found: Branches) -> dict[str, list[str]]:
    """Return the names of the nodes and weights that disappear; a node without a name by that of its output."""
    nodes = (combed.folded.scope.nodes[position] for position in sorted(found.nodes))
    weights = (
        weight.name
        for weight in combed.weights
        if not weight.scope.path and all(not u.use.scope.path and u.use.node in found.nodes for u in weight.uses)
    )
    return {"nodes": [node.name or node.output[0] for node in nodes], "weights": sorted(weights)}


def planned(source: ModelSource, plan: Plan) -> tuple[Combed, KeepMask]:
    """Comb the source of a plan, and return it with the surviving channels; raises PlanError for another model."""
    combed = comb(load(source).with_free_io(plan.free_io), plan.input_shapes)
    return combed, KeepMask(combed.atoms, channels_of(combed, match(combed, plan)))
