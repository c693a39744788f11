"""Affine operators behind linear ones become part of them: the same outputs, fewer nodes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cpd_onnx.cli.main import main
from cpd_onnx.deploy.steps import fold_constants, redo
from cpd_onnx.ir.model import Model, load
from cpd_onnx.rewrite.absorbing import absorbed
from cpd_onnx.runtime.sessions import execute, open_model, random_feed
from cpd_onnx.shapes.inference import fold
from tests.support.models import from_text

NORM = "float[5] g, float[5] h, float[5] m, float[5] v"


def operators(model: Model) -> list[str]:
    return [node.op_type for node in model.graph.node]


def require_equal(before: Model, after: Model) -> None:
    feed = random_feed(fold(before))
    wanted, found = (execute(open_model(model, optimise=False), feed) for model in (before, after))
    for first, second in zip(wanted, found, strict=True):
        assert first.dtype == second.dtype
        np.testing.assert_allclose(second, first, atol=1e-5 * np.abs(first).max())
    assert after.defect() is None


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("x, float[4,5] w, float[5] b, float[5] s, float[1,5] t) { c = Gemm(x, w, b) d = Mul(c, s) y = Add(t, d) }", ["Gemm"]),
        ("x, float[5,4] w, float[5] s) { c = Gemm<transB=1>(x, w) d = Div(c, s) y = Sub(s, d) }", ["Gemm"]),
        ("x, float[5,4] w, float[1,5] b, float s) { c = Gemm<transB=1>(x, w, b) y = Mul(s, c) }", ["Gemm"]),
        ("x, float[4,5] w, float[5] s) { c = MatMul(x, w) d = Mul(c, s) y = Neg(d) }", ["MatMul"]),
        ("x, float[4,5] w, float[5] b, float[5] s) { c = MatMul(x, w) d = Add(b, c) e = Mul(d, s) y = Sub(e, b) }", ["MatMul", "Add"]),
        (f"x, float[4,5] w, {NORM}) {{ c = MatMul(x, w) y = BatchNormalization(c, g, h, m, v) }}", ["MatMul", "BatchNormalization"]),
        (f"x, float[4,5] w, {NORM}) {{ c = Gemm(x, w) y = BatchNormalization(c, g, h, m, v) }}", ["Gemm"]),
        # what must stay
        ("x, float[4,5] w, float[5] b) { c = MatMul(x, w) y = Add(c, b) }", ["MatMul", "Add"]),
        ("x, float[4,5] w, float[3,1] s) { c = Gemm(x, w) y = Mul(c, s) }", ["Gemm", "Mul"]),
        ("x, float[4,5] w, float[3,5] b, float[5] s) { c = Gemm(x, w, b) y = Mul(c, s) }", ["Gemm", "Mul"]),
        ("x, float[4,5] w, float[5] s) { c = Gemm<alpha=2.0>(x, w) y = Mul(c, s) }", ["Gemm", "Mul"]),
        ("x, float[4,5] w, float[2,3,5] s) { c = Gemm(x, w) y = Mul(c, s) }", ["Gemm", "Mul"]),
        ("x, float[4,5] w, float[5] s) { c = Gemm(x, w) d = Mul(c, s) e = Relu(c) y = Add(d, e) }", ["Gemm", "Mul", "Relu", "Add"]),
        ("x, float[4,5] w) { c = Gemm(x, w) d = Relu(c) y = Mul(c, d) }", ["Gemm", "Relu", "Mul"]),
    ],
)  # fmt: skip  # a table
def test_an_affine_operator_becomes_part_of_the_linear_one_before_it(body: str, left: list[str]) -> None:
    inputs, nodes = body.split(") {", 1)
    result = "float[2,3,5] y" if "[2,3,5]" in body else "float[3,5] y"
    before = load(from_text(f"(float[3,4] {inputs}) => ({result}) {{{nodes}"))
    after = absorbed(before)
    assert operators(after) == left
    assert (after is before) == (operators(before) == left)
    used = {name for node in after.graph.node for name in node.input}
    assert {tensor.name for tensor in after.graph.initializer} <= used or after is before
    require_equal(before, after)


def test_weights_that_others_read_stay_and_higher_ranks_are_followed() -> None:
    text = (
        "(float[N,2,4] x, float[4,5] w, float[5] s, float[5] t) => (float[N,2,5] y) "
        "{ a = MatMul(x, w) b = Mul(a, s) c = Add(b, t) d = MatMul(x, w) y = Add(c, d) }"
    )
    before = load(from_text(text))
    after = absorbed(before)
    assert operators(after) == ["MatMul", "Add", "MatMul", "Add"]
    np.testing.assert_array_equal(after.array("w"), before.array("w"))
    require_equal(before, after)


def test_an_output_between_stays() -> None:
    text = "(float[3,4] x, float[4,5] w, float[5] s) => (float[3,5] y, float[3,5] d) { c = Gemm(x, w) d = Mul(c, s) y = Mul(d, s) }"
    before = load(from_text(text))
    after = absorbed(before)
    assert operators(after) == ["Gemm", "Mul"]
    require_equal(before, after)


def test_weights_that_their_type_cannot_hold_stay() -> None:
    text = "(float[3,4] x, float[4,5] w, float[5] s) => (float[3,5] y) { c = Gemm(x, w) y = Mul(c, s) }"
    before = load(from_text(text, values={"w": np.full((4, 5), 1e30), "s": np.full(5, 1e30)}))
    assert absorbed(before) is before


DENSE = (
    "(float[N,4] x, float[4,5] w, float[5] s, float[5] t, float[5,3] u) => (float[N,3] y) "
    "{ a = Gemm(x, w) b = Mul(a, s) c = Add(b, t) r = Relu(c) y = MatMul(r, u) }"
)


def test_fold_does_so_and_verify_repeats_it(tmp_path: Path) -> None:
    load(from_text(DENSE)).save(tmp_path / "net.onnx")
    made = tmp_path / "folded.onnx"
    assert main(["deploy", str(tmp_path / "net.onnx"), "-o", str(made), "--fold"]) == 0
    assert operators(load(made)) == ["Gemm", "Relu", "MatMul"]
    (step,) = json.loads((tmp_path / "folded.onnx.manifest.json").read_text())["steps"]
    assert step["options"] == {"affine": True}
    assert step["difference"]["largest"] < 1e-5
    assert main(["verify", str(tmp_path / "net.onnx"), str(made)]) == 0


def test_a_manifest_that_says_nothing_of_it_is_repeated_as_it_was() -> None:
    model = load(from_text(DENSE))
    older = redo(model, "fold", {})
    assert operators(older) == ["Gemm", "Mul", "Add", "Relu", "MatMul"]
    assert older.serialize() == fold_constants(model, affine=False).serialize()
    assert operators(redo(model, "fold", {"affine": True})) == ["Gemm", "Relu", "MatMul"]
