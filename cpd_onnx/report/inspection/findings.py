"""What a model file is, as plain values: what it takes and gives, what is free in it, and how far it can be pruned."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnxruntime as ort
from onnx import TensorProto, ValueInfoProto
from rich.table import Table

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.deployed import STORED, flash_terms
from cpd_onnx.budget.memory import MemoryModel
from cpd_onnx.channels.branches import removable_groups
from cpd_onnx.channels.costs import CostModel, Costs
from cpd_onnx.channels.free import FreeChannels, free_channels, keep_without, removable
from cpd_onnx.channels.groups import Combed
from cpd_onnx.errors import ISSUES, CpdError
from cpd_onnx.ir.model import Model, element_bytes
from cpd_onnx.report.inspection.obstacles import obstacles
from cpd_onnx.report.tables import inspection, table_of
from cpd_onnx.rewrite.linear_runs import linear_runs
from cpd_onnx.rewrite.merging import worthwhile
from cpd_onnx.runtime.sessions import open_model
from cpd_onnx.summary import count, share

MANY_FORMAT = "cpd-onnx/inspections"
"""Format name of the inspections of several files."""
_COSTS = ("macs", "params", "bytes")
"""Costs that a pruned model is compared by."""
_MOST_BYTES = 1 << 31
"""Size of a file in bytes up to which its weights are searched and onnxruntime tries it; a heuristic, 2 GiB."""
_MOST_NODES = 2000
"""Number of nodes up to which the memory of a program is planned, in time that grows with its square (heuristic)."""
_AS_IT_IS = "as_it_is"
WHY_NOT = f"{ISSUES.removesuffix('/issues')}/blob/main/docs/limits.md"
"""Address of the page that explains why a model does not become smaller or faster."""
_SHOWN_GROUPS = 3
"""Number of groups that are named as holding most (heuristic)."""


def inspected(combed: Combed, held: Sequence[int] = ()) -> dict[str, Any]:
    """Return all that is known of a model by its file alone; `held` are the groups pinned by the user."""
    model, costs = combed.folded.original, CostModel(combed)
    content = inspection(combed, held, costs)
    whole = costs.total(KeepMask(combed.atoms))
    is_small = whole.bytes <= _MOST_BYTES
    return content | {
        "model": facts(model, is_tried=is_small) | {"required_sizes": dict(combed.folded.solved)},
        "size": _size(combed),
        "deployed": _deployed(combed) if is_small and len(model.graph.node) <= _MOST_NODES else None,
        "free": _free(combed, costs, whole) if is_small else None,
        "reach": _reach(combed, costs, whole, held),
        "merges": _merges(combed, whole) if is_small else None,
        "branches": [
            {"id": index, "nodes": len(each.nodes)}
            for index, each in removable_groups(combed).items()
            if index not in held
        ],
        "obstacles": [asdict(each) for each in obstacles(combed)],
    }


def _merges(combed: Combed, whole: Costs) -> dict[str, Any]:
    """Return how many linear runs there are, how many cost less as one operator, and the fraction of the MACs saved."""
    runs = linear_runs(combed.folded)
    chosen = worthwhile(runs, combed.folded)
    saved = sum(run.before.macs - run.after.macs for run in chosen)
    return {"runs": len(runs), "cheaper": len(chosen), "macs": saved / max(whole.macs, 1.0)}


def facts(model: Model, *, is_tried: bool) -> dict[str, Any]:
    """Return what a model takes and gives, and what wrote it; with `is_tried`, whether onnxruntime loads it."""
    proto, weights = model.proto, {tensor.name for tensor in model.graph.initializer}
    inputs = [_tensor(info) for info in model.graph.input if info.name not in weights]
    outputs = [_tensor(info) for info in model.graph.output]
    return {
        "inputs": inputs,
        "outputs": outputs,
        "open_axes": [
            {"input": entry["name"], "axis": axis, "name": size if isinstance(size, str) else ""}
            for entry in inputs
            for axis, size in enumerate(entry["shape"] or [])
            if not isinstance(size, int)
        ],
        "opset": {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        "ir_version": proto.ir_version,
        "producer": " ".join(filter(None, (proto.producer_name, proto.producer_version))),
        "onnxruntime": {"version": ort.__version__, "loads": None, "reason": ""} | (_loads(model) if is_tried else {}),
    }


def _tensor(info: ValueInfoProto) -> dict[str, Any]:
    """Return name, element type and shape of an input or output: numbers, names of open sizes, None without a name."""
    kind = info.type.tensor_type
    if not info.type.HasField("tensor_type"):
        return {"name": info.name, "type": info.type.WhichOneof("value") or "unknown", "shape": None}
    names = {number: name.lower() for name, number in TensorProto.DataType.items()}
    dims = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim]
    return {
        "name": info.name,
        "type": names.get(kind.elem_type, "unknown"),
        "shape": dims if kind.HasField("shape") else None,
    }


def _loads(model: Model) -> dict[str, Any]:
    try:
        open_model(model, optimise=False, threads=1)
    except CpdError as error:
        return {"loads": False, "reason": str(error)}
    return {"loads": True}


def _size(combed: Combed) -> dict[str, Any]:
    """Return the number of nodes, the bytes of the file and its data files, and those of all constants in use."""
    model = combed.folded.original
    files = [] if model.path is None else [model.path, *model.data_files]
    return {
        "nodes": len(model.graph.node),
        "file_bytes": sum(Path(path).stat().st_size for path in files) if files else None,
        "weight_bytes": math.ceil(sum(element_bytes(weight.value.dtype) * weight.size for weight in combed.weights)),
    }


def _deployed(combed: Combed) -> dict[str, Any]:
    """Return the bytes of flash and of RAM of a program for one sample, for each type that it may be deployed in.

    They are those of the targets `flash` and `ram`: with an estimate of the code and of the stack.
    """
    found = {}
    for kind in ("", *STORED):
        flash = sum(term[0] * math.prod(map(len, term[1])) for term in flash_terms(combed, kind))
        ram = MemoryModel(combed, kind).ram(KeepMask(combed.atoms))
        found[kind or _AS_IT_IS] = {"flash": math.ceil(flash), "ram": math.ceil(ram)}
    return found


def _free(combed: Combed, costs: CostModel, whole: Costs) -> dict[str, Any]:
    """Return what is dead, constant or a duplicate: numbers of channels, and the costs of all that is alike."""
    found = free_channels(combed)
    kinds = {
        "dead": removable(combed, found),
        "constant": [list(free.constant) for free in found],
        "duplicate": [list(free.duplicate) for free in found],
    }
    content: dict[str, Any] = {"channels": sum(map(len, combed.groups))}
    for kind, positions in kinds.items():
        left = costs.total(keep_without(combed, positions)) if any(positions) else whole
        spared = {name: whole.of(name) - left.of(name) for name in _COSTS}
        content[kind] = {"channels": sum(map(len, positions)), **spared}
    content["groups"] = [_of_group(number, free) for number, free in enumerate(found) if any(_lists(free).values())]
    return content


def _lists(free: FreeChannels) -> dict[str, list[int]]:
    return {name: list(positions) for name, positions in asdict(free).items()}


def _of_group(number: int, free: FreeChannels) -> dict[str, Any]:
    return {"id": number, **_lists(free)}


def _reach(combed: Combed, costs: CostModel, whole: Costs, held: Sequence[int]) -> dict[str, float]:
    """Return the smallest fraction of each cost: one channel of each group that is not pinned survives."""
    least = costs.total(keep_without(combed, [[] if g.id in held else range(1, len(g)) for g in combed.groups]))
    return {name: least.of(name) / whole.of(name) if whole.of(name) else 1.0 for name in _COSTS}


# The same as text.


def fact_lines(content: Mapping[str, Any]) -> list[str]:
    """Return what a model takes and gives, and what wrote it."""
    found, size = content["model"], content["size"]
    opsets = ", ".join(f"{domain} {version}" for domain, version in found["opset"].items())
    written = f"opset {opsets}, IR version {found['ir_version']}, by {found['producer'] or 'an unnamed producer'}"
    lines = [f"takes {tensor_text(entry)}" for entry in found["inputs"]]
    lines += [f"gives {tensor_text(entry)}" for entry in found["outputs"]]
    if found["required_sizes"]:
        sizes = ", ".join(f"{name} = {size}" for name, size in found["required_sizes"].items())
        lines.append(f"its operators require {sizes}")
    stored = size["file_bytes"]
    file = "" if stored is None else f"{count(stored)}B in the file, "
    nodes = "1 node" if size["nodes"] == 1 else f"{size['nodes']} nodes"
    return [*lines, f"{file}{count(size['weight_bytes'])}B of it weights; {nodes}; {written}", runtime_line(found)]


def tensor_text(entry: Mapping[str, Any]) -> str:
    """Return name, type and shape of an input or output."""
    shape = "of any shape" if entry["shape"] is None else [("?" if size is None else size) for size in entry["shape"]]
    text = shape if isinstance(shape, str) else f"[{', '.join(map(str, shape))}]"
    return f"{entry['name']}: {entry['type']} {text}"


def runtime_line(found: Mapping[str, Any]) -> str:
    """Return a sentence on whether onnxruntime loads the model."""
    runtime = found["onnxruntime"]
    if runtime["loads"] is None:
        return f"onnxruntime {runtime['version']} was not tried: the model is larger than {count(_MOST_BYTES)}B"
    return f"onnxruntime {runtime['version']} loads it" if runtime["loads"] else str(runtime["reason"])


def outlook_lines(content: Mapping[str, Any], path: Path) -> list[str]:
    """Return what is free in a model, how far it can be pruned, and the command that does it."""
    reach, free = content["reach"], content["free"]
    names = {"macs": "MACs", "params": "parameters", "bytes": "file"}
    lines = [*free_lines(content), *_deployed_lines(content)]
    merges = content["merges"]
    if merges is not None and merges["cheaper"]:
        pairs = (
            "2 linear operators are" if merges["cheaper"] == 1 else f"{merges['cheaper']} pairs of linear operators are"
        )
        command = f"cpd-onnx deploy {shlex.quote(str(path))} -o {shlex.quote(f'{path.stem}.merged.onnx')} --merge macs"
        lines.append(f"{pairs} cheaper as one, by {share(merges['macs'], 1.0)} of the MACs: {command}")
    if content["groups"]:
        least = ", ".join(f"{share(reach[key], 1.0)} of the {name}" for key, name in names.items())
        lines.append(f"smallest reachable: {least}, with one channel in each group{_most_text(content)}")
        branches = len(content["branches"])
        what = f"{branches} of the {len(content['groups'])} groups are" if branches != 1 else "1 group is"
        lines.append(f"{what} on a branch that can be removed as a whole")
        out = shlex.quote(f"{path.stem}.small.onnx")
        command = f"cpd-onnx compress {shlex.quote(str(path))} -o {out}"
        if free is not None and free["dead"]["channels"]:
            lines.append(f"to remove what is free: {command}")
        lines.append(f"to prune further: {command} --data DATA")
    return lines


def obstacle_lines(content: Mapping[str, Any]) -> list[str]:
    """Return what keeps the model from becoming smaller or faster, each with the address of its explanation."""
    lines = [
        f"why not smaller or faster: {each['text']} ({WHY_NOT}#{each['section']})" for each in content["obstacles"]
    ]
    return [*lines, f"what holds the rest, and what else takes time: {WHY_NOT}"]


def _deployed_lines(content: Mapping[str, Any]) -> list[str]:
    """Return a sentence on flash and RAM, unless the model is too large for it."""
    found = content["deployed"]
    if found is None:
        return []
    texts = [f"{count(size['flash'])}B and {count(size['ram'])}B {kind}" for kind, size in _named(found).items()]
    return [f"flash and RAM of a program on a control unit: {', '.join(texts)}"]


def _named(found: Mapping[str, Any]) -> dict[str, Any]:
    return {"as it is" if kind == _AS_IT_IS else f"as {kind}": size for kind, size in found.items()}


def free_lines(content: Mapping[str, Any]) -> list[str]:
    """Return a sentence on the dead, and on the constant and duplicate channels of a model."""
    free, costs = content["free"], content["costs"]
    if free is None:
        return [f"free channels were not looked for: the model is larger than {count(_MOST_BYTES)}B"]
    if not free["channels"]:
        return []
    if not free["dead"]["channels"]:
        lines = [f"free: none of the {free['channels']} channels is dead"]
    else:
        dead = {name: _part(free["dead"][name], costs[name]) for name in _COSTS}
        lines = [
            f"free: {free['dead']['channels']} of the {free['channels']} channels are dead, and hold {dead['macs']} of "
            f"the MACs, {dead['params']} of the parameters and {dead['bytes']} of the file"
        ]
    for kind, what in (("constant", "have the same value for every input"), ("duplicate", "repeat another channel")):
        if free[kind]["channels"]:
            held = _part(free[kind]["macs"], costs["macs"])
            lines.append(f"{free[kind]['channels']} more channels {what}, and hold {held} of the MACs")
    return lines


def _part(spared: float, of: float) -> str:
    return share(spared, of) if of else "nothing"


def _most_text(content: Mapping[str, Any]) -> str:
    """Return the groups that hold most of the MACs, as the rest of a sentence."""
    whole = content["costs"]["macs"]
    if not whole:
        return ""
    ranked = sorted(content["group_costs"], key=lambda entry: -entry["macs"])[:_SHOWN_GROUPS]
    names = {group["id"]: group["name"] for group in content["groups"]}
    most = ", ".join(f"{names[entry['id']]} ({share(entry['macs'], whole)})" for entry in ranked)
    return f"; most of the MACs run through {most}"


def models_table(contents: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with one row for each of several files."""
    table = table_of(
        "Models", "file", "MACs", "parameters", "file size", "channels", "dead", "smallest MACs", "onnxruntime"
    )
    for content in contents:
        name = content["source"]["file"]
        if "error" in content:
            table.add_row(name, *[""] * 6, "")
            continue
        costs, free, loads = content["costs"], content["free"], content["model"]["onnxruntime"]["loads"]
        table.add_row(
            name,
            count(costs["macs"]),
            count(costs["params"]),
            f"{count(content['size']['file_bytes'] or costs['bytes'])}B",
            str(sum(group["size"] for group in content["groups"])),
            "" if free is None else str(free["dead"]["channels"]),
            share(content["reach"]["macs"], 1.0),
            {True: "loads it", False: "refuses it", None: "not tried"}[loads],
        )
    return table
