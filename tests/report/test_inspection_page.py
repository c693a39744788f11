"""The page of inspect: whole in itself, safe whatever the names, and its sliders predict what a pruned model costs."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

pytest.importorskip("jinja2")

from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.costs import CostModel
from cpd_onnx.channels.free import keep_without
from cpd_onnx.channels.groups import Combed
from cpd_onnx.report.inspection import graph
from cpd_onnx.report.inspection import page as inspection_page
from cpd_onnx.report.inspection.findings import inspected
from tests.report.test_document import HOSTILE, Parsed, browser  # noqa: F401  # a fixture
from tests.support.graphs import seeded
from tests.support.models import from_text

DIGITS = Path(__file__).parents[2] / "models" / "digits.onnx"
CONV = "Conv <pads = [1, 1, 1, 1]>"
RESIDUAL = (
    "(float[2, 3, 6, 6] x, float[8, 3, 3, 3] w, float[4, 8, 3, 3] u, float[8, 4, 3, 3] t, float[5, 8, 3, 3] v) "
    f"=> (float[2, 5, 6, 6] y) {{ h = {CONV}(x, w) k = {CONV}(h, u) r = Relu(k) l = {CONV}(r, t) s = Add(h, l) y = {CONV}(s, v) }}"
)


def page(combed: Combed, name: str = "model.onnx") -> str:
    return inspection_page.html(combed, inspected(combed), Path(name))


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def predicted(data: dict[str, Any], kind: str, widths: list[int]) -> float:
    """The cost as the script of the page computes it."""
    left = [width / group["size"] for width, group in zip(widths, data["groups"], strict=True)]
    sizes = [
        sum(math.prod([n, *(left[g] for g in groups)]) for n, *groups in rows) for rows in data["kinds"][kind]["axes"]
    ]
    return sum(math.prod([factor, *(sizes[axis] for axis in axes)]) for factor, *axes in data["kinds"][kind]["terms"])


@pytest.mark.parametrize("source", [DIGITS, from_text(RESIDUAL)], ids=["digits", "residual"])
def test_the_page_predicts_what_the_pruned_model_costs(source: Any) -> None:
    combed = comb(source)
    data, costs = data_of(page(combed)), CostModel(combed)
    rng = np.random.default_rng(0)
    for _ in range(3):
        widths = [int(rng.integers(1, len(group) + 1)) for group in combed.groups]
        gone = [range(width, len(group)) for width, group in zip(widths, combed.groups, strict=True)]
        after = costs.total(keep_without(combed, gone))
        for kind in ("macs", "params", "bytes"):
            assert predicted(data, kind, widths) == pytest.approx(after.of(kind), rel=1e-9)


def test_the_page_is_whole_and_runs_its_own_script_alone() -> None:
    text = page(comb(DIGITS))
    parsed = Parsed(text)
    assert parsed.open == []
    assert len(parsed.ids()) == len(set(parsed.ids()))
    assert not [element for element in parsed.elements if {"src", "href", "onclick"} & element[1].keys()]
    assert not re.search(r"https?://", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in text or f"script-src 'sha256-{digest}'" in text
    assert text == page(comb(DIGITS))


def hostile_model() -> ModelProto:
    names = [name for name in HOSTILE if "\ud800" not in name]
    nodes, tensors, source = [], [], "x"
    for number, name in enumerate(names):
        weight = np.ones((4, 4 if number else 3, 1, 1), np.float32)
        tensors.append(numpy_helper.from_array(weight, name))
        nodes.append(helper.make_node("Conv", [source, name], [f"{name} out"], name=f"{name} node"))
        source = f"{name} out"
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [names[0], 3, 4, 4])]
    outputs = [helper.make_tensor_value_info(source, TensorProto.FLOAT, None)]
    made = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, tensors),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    made.producer_name = "".join(names)
    return made


def test_names_cannot_break_the_page() -> None:
    plain, hostile = (
        Parsed(page(comb(m), n)) for m, n in ((from_text(RESIDUAL), "m.onnx"), (hostile_model(), HOSTILE[0]))
    )
    assert hostile.open == []
    assert {tag for tag, _ in hostile.elements} <= {tag for tag, _ in plain.elements}
    assert [tag for tag, _ in hostile.elements].count("script") == 2
    known = {name for _, attributes in plain.elements for name in attributes}
    assert {name for _, attributes in hostile.elements for name in attributes} <= known
    assert HOSTILE[0] in hostile.text


@pytest.mark.parametrize("seed", range(12))
def test_blocks_do_not_overlap_and_all_is_inside(seed: int) -> None:
    drawn = graph.drawing(comb(seeded(seed)))
    rows: dict[float, list[float]] = {}
    for block in drawn.blocks:
        assert 0 <= block.left <= drawn.width - drawn.block_width
        assert 0 <= block.y <= drawn.height - drawn.block_height
        rows.setdefault(block.y, []).append(block.left)
    for lefts in rows.values():
        assert all(b - a >= drawn.block_width for a, b in zip(sorted(lefts), sorted(lefts)[1:], strict=False))
    place = {id(block): number for number, block in enumerate(drawn.blocks)}
    assert all(
        place[id(other)] < place[id(block)] and other.y < block.y for block in drawn.blocks for other in block.before
    )


def test_blocks_hold_their_groups() -> None:
    combed = comb(from_text(RESIDUAL))
    drawn = graph.drawing(combed)
    found = {" ".join(block.operators): (block.groups, sorted(block.touched)) for block in drawn.blocks}
    assert found["Conv Relu"] == ([1], [0, 1])
    assert found["Add"] == ([0], [0])
    assert sum(block.macs for block in drawn.blocks) == CostModel(combed).total(keep_without(combed, [[], []])).macs


def chain(length: int) -> ModelProto:
    nodes = [
        helper.make_node("MatMul", [f"t{k}" if k else "x", "w"], [f"t{k + 1}"], name=f"n{k}") for k in range(length)
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])]
    outputs = [helper.make_tensor_value_info(f"t{length}", TensorProto.FLOAT, [1, 4])]
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    made = helper.make_graph(nodes, "chain", inputs, outputs, [weight])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_long_sequence_becomes_one_block() -> None:
    drawn = graph.drawing(comb(chain(graph.MOST_BLOCKS + 10)))
    assert [len(block.operators) for block in drawn.blocks] == [1, graph.MOST_BLOCKS + 10, 1]
    assert drawn.hidden == 0


def test_what_is_not_drawn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MOST_BLOCKS", 3)
    combed = comb(from_text(RESIDUAL))
    assert graph.drawing(combed).hidden > 0
    assert "more are not drawn" in page(combed)


def test_it_works_in_a_browser(browser: Any, tmp_path: Path) -> None:  # noqa: F811  # the fixture
    combed = comb(DIGITS)
    text = page(combed)
    (tmp_path / "page.html").write_text(text)
    for width in (390, 1440):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500},
        )
        browser.get(f"file://{tmp_path}/page.html")
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    paper = {"width": 794, "height": 1123, "deviceScaleFactor": 1, "mobile": False}  # A4 at 96 dots per inch
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", paper)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    browser.execute_script(
        "const s = document.getElementById('width-all'); s.value = 50; s.dispatchEvent(new Event('input'))"
    )
    widths = [max(1, math.floor(len(group) / 2 + 0.5)) for group in combed.groups]
    data = data_of(text)
    share = predicted(data, "macs", widths) / predicted(data, "macs", [len(group) for group in combed.groups])
    assert f"{100 * share:.1f} % of" in browser.execute_script(
        "return document.querySelector('#cost-macs .detail').textContent"
    )
    browser.execute_script("document.querySelector('button.chip').click()")
    lit = browser.execute_script("return document.querySelectorAll('g.block.lit').length")
    assert lit == sum(0 in block.touched for block in graph.drawing(combed).blocks)
    assert browser.get_log("browser") == []
