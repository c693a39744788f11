"""The page of `inspect --html`: the graph with its groups in colour, and sliders that predict what each width costs.

The page is self-contained. Its one script holds no text of the model: it reads numbers from a block of JSON, and the
content security policy allows that script alone, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from cpd_onnx.budget.latency import CostTable
from cpd_onnx.channels.costs import CostModel, Term
from cpd_onnx.channels.groups import Combed
from cpd_onnx.report import document
from cpd_onnx.report.inspection.findings import fact_lines, outlook_lines, tensor_text
from cpd_onnx.report.inspection.graph import Block, drawing
from cpd_onnx.report.tables import costs_line, largest_text
from cpd_onnx.summary import count, share
from cpd_onnx.version import __version__

_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")
"""Colours that people with any colour vision tell apart (Okabe and Ito, Color Universal Design, 2008); groups repeat
them, and carry their number."""
_DARK_TEXT = frozenset(_PALETTE[3:])
"""Colours on which dark text is read better than white."""
_KINDS = (
    ("macs", "MACs", ""),
    ("params", "parameters", ""),
    ("bytes", "file, estimated", "B"),
    ("ms", "latency", "ms"),
)
"""Costs of the page: key, label and unit."""
_TITLE, _DETAIL = 21, 26
"""Number of letters of the two lines of a block, above which they are cut (heuristic)."""
_LINE = 200
"""Number of letters of a line of a tooltip, above which its end is cut off (heuristic)."""
_MOST_CHIPS = 3
"""Number of labels of groups that a block has room for."""
_MOST_OPERATORS, _MOST_NAMES = 4, 8
"""Number of nodes of a block up to which its title names each operator, and its tooltip each node (heuristic)."""


def require() -> None:
    """Raise UnsupportedError if the library that makes the page is not installed."""
    document.require("jinja2")


def html(combed: Combed, content: Mapping[str, Any], path: Path, table: CostTable | None = None) -> str:
    """Return the page of a model as a self-contained HTML document; the same model gives the same text.

    Args:
        combed: The coupled channels of the model.
        content: Result of `inspected` for it.
        path: Path of the model, for the commands that the page names.
        table: Predicts milliseconds; None for a page without them.

    """
    script = resources.files("cpd_onnx.report").joinpath("templates", "inspection.js").read_text("utf-8").strip()
    drawn = drawing(combed)
    template = document.environment(is_html=True).get_template("inspection.html")
    page = template.render(
        title=path.name,
        lead=f"{costs_line(content['costs'])}.",
        facts=fact_lines(content),
        outlook=outlook_lines(content, path),
        cards=_cards(content, table),
        groups=_groups(content),
        drawn=drawn,
        blocks=[_border(block, content) if block.is_border else _block(block) for block in drawn.blocks],
        reasons=[
            {**entry, "size": count(entry["weights"]), "where": largest_text(entry["largest"])}
            for entry in content["kept"]
        ],
        table=table,
        tool=f"cpd-onnx {__version__}",
        script=_markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_markup(_data(combed, content, table)),
    )
    return f"{page}\n"


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)  # the page's own script, and numbers


def _data(combed: Combed, content: Mapping[str, Any], table: CostTable | None) -> str:
    """Return what the script computes with as JSON; it holds numbers and the keys of the costs only."""
    more: dict[str, Sequence[Term]] = {} if table is None else {"ms": table.terms(combed)}
    costs = CostModel(combed, more)
    dead = {
        entry["id"]: len(entry["zero"]) + len(entry["unread"])
        for entry in (content["free"] or {"groups": []})["groups"]
    }
    kinds = {kind: costs.in_widths(kind).as_terms() for kind, _, _ in _KINDS if kind != "ms" or table is not None}
    groups = [
        {"size": group["size"], "held": costs["held"], "dead": min(dead.get(group["id"], 0), group["size"] - 1)}
        for group, costs in zip(content["groups"], content["group_costs"], strict=True)
    ]
    return json.dumps({"groups": groups, "kinds": kinds}, separators=(",", ":"))


def _cards(content: Mapping[str, Any], table: CostTable | None) -> list[dict[str, str]]:
    """Return the costs of the original, which the script replaces by those of the chosen widths."""
    whole = content["costs"] | {"ms": None if table is None else table.rest + sum(k.ms for k in table.kernels)}
    cards = []
    for kind, label, unit in _KINDS:
        if whole[kind] is not None:
            number = f"{whole[kind]:.3g} " if kind == "ms" else count(whole[kind])
            cards.append({"kind": kind, "label": label, "unit": unit, "value": f"{number}{unit}"})
    return cards


def _groups(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row of the table for each group."""
    whole = content["costs"]
    free = {entry["id"]: entry for entry in (content["free"] or {"groups": []})["groups"]}
    rows = []
    for group, costs in zip(content["groups"], content["group_costs"], strict=True):
        own = free.get(group["id"], {})
        rows.append({
            "id": group["id"], "name": group["name"], "kind": group["kind"], "size": group["size"],
            "held": costs["held"], "chip": _chip(group["id"]),
            "dead": len(own.get("zero", ())) + len(own.get("unread", ())),
            "constant": len(own.get("constant", ())), "duplicate": len(own.get("duplicate", ())),
            "macs": share(costs["macs"], whole["macs"]), "params": share(costs["params"], whole["params"]),
            "members": ", ".join(f"{member['initializer']} axis {member['axis']}" for member in group["members"]),
        })  # fmt: skip  # one column after the other
    return rows


def _chip(group: int) -> dict[str, Any]:
    """Return number and colours of the label of a group."""
    colour = _PALETTE[group % len(_PALETTE)]
    return {"id": group, "fill": colour, "ink": "#111111" if colour in _DARK_TEXT else "#ffffff"}


def _block(block: Block) -> dict[str, Any]:
    """Return a block with its text."""
    is_long = len(block.operators) > _MOST_OPERATORS
    title = " · ".join(dict.fromkeys(block.operators) if is_long else block.operators)
    title = f"{len(block.operators)} nodes: {title}" if is_long else title
    more = len(block.names) - _MOST_NAMES
    names = [*block.names[:_MOST_NAMES], *([f"… and {more} more"] if more > 0 else [])]
    macs = f"{count(block.macs)} MACs" if block.macs else ""
    detail = block.weight or block.names[0]
    told = (" · ".join(block.operators[:_MOST_NAMES]), *names, block.weight, macs)
    full = "\n".join(_short(line, _LINE) for line in told if line)
    return _drawn(block, title, detail, full) | {
        "chips": [_chip(group) for group in block.groups[:_MOST_CHIPS]],
        "touched": sorted(block.touched),
    }


def _border(block: Block, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the block of an input or output with its text."""
    (kind,), (name,) = block.operators, block.names
    entries = content["model"][f"{kind}s"]
    described = next((tensor_text(entry) for entry in entries if entry["name"] == name), name)
    return _drawn(block, f"{kind} {name}", described.removeprefix(f"{name}: "), f"{kind} {described}")


def _drawn(block: Block, title: str, detail: str, full: str) -> dict[str, Any]:
    """Return a block as the template draws it; labels of groups may be added."""
    lines = {"title": _short(title, _TITLE), "detail": _short(detail, _DETAIL, keep_end=not block.is_border)}
    place = {"x": block.left, "y": block.y, "is_border": block.is_border}
    return {**place, **lines, "full": full, "chips": [], "touched": []}


def _short(text: str, letters: int, *, keep_end: bool = False) -> str:
    """Return a text cut to a number of letters; with `keep_end`, its beginning is cut off."""
    if len(text) <= letters:
        return text
    return f"…{text[1 - letters :]}" if keep_end else f"{text[: letters - 1]}…"
