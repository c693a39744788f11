"""Attributes and inputs that change how channels flow through an operator: followed exactly, or frozen with a reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper, parser

import cpd_onnx as cpd
from cpd_onnx.channels.combing import comb
from cpd_onnx.testing import mask_oracle
from tests.rules.rows import assert_followed, assert_held
from tests.rules.test_rules import CONV, HEAD, MLP, signature
from tests.support.models import from_text

NBITS = "(float[2, 4, 6] x, float[6, 64] w"
STEM = f"h = {CONV}(x, w)"
LAST = f"y = {CONV}(a, v)"
DENSE = "h = MatMul(x, w)"
PAIRS = HEAD.replace("[5, 8", "[5, 14")
STATISTICS = "float[8, 8] s, float[8, 8] b, float[8, 8] m, float[8, 8] r"
GROUPED = "(float[2, 4, 6] x, float[6, 64] w, float[32, 5] v, int32[2] n, int32[1] t"

# name, opset, graph, what is coupled, values of constants
FOLLOWED: list[tuple[str, int, str, list[str], dict[str, Any]]] = [
    (
        "resize by one", 17,
        f"{HEAD}, float[4] s) => (float[2, 5, 9, 16] y) "
        f"{{ {STEM} a = Resize <mode = \"nearest\">(h, , s) {LAST} }}",
        ["8: v.1 w.0"], {"s": [1, 1, 1.2, 2]},
    ),
    (
        "crop that is whole", 17,
        f"{HEAD}, float[8] r, int64[4] n) => (float[2, 5, 16, 16] y) "
        f"{{ {STEM} a = Resize <mode = \"linear\", coordinate_transformation_mode = \"tf_crop_and_resize\">(h, r, , "
        f"n) {LAST} }}",
        ["8: v.1 w.0"], {"r": [0, 0, 0.2, 0, 1, 1, 1, 1], "n": [2, 8, 16, 16]},
    ),
    (
        "sum over a letter of size one", 17,
        "(float[2, 4, 6] x, float[6, 12] w, float[1, 5] q, float[12, 5] v) => (float[2, 4, 5] y) "
        f"{{ {DENSE} g = Einsum <equation = \"abk,kn->abn\">(h, q) i = MatMul(h, v) y = Add(g, i) }}",
        ["12: v.0 w.1"], {},
    ),
    (
        "statistics of each element", 8,
        f"(float[2, 3, 8] x, float[8, 3, 1] w, {STATISTICS}, float[5, 8, 1] v) => (float[2, 5, 8] y) "
        f"{{ h = Conv(x, w) a = BatchNormalization <spatial = 0>(h, s, b, m, r) y = Conv(a, v) }}",
        ["8: b.0 m.0 r.0 s.0 v.1 w.0"], {"r": np.linspace(0.5, 1.5, 64)},
    ),
    (
        "blocks along k", 17,
        f"{NBITS}, uint8[5, 2, 16] q, float[10] s) => (float[2, 4, 5] y) "
        f"{{ {DENSE} y = com.microsoft.MatMulNBits <K = 64, N = 5, bits = 4, block_size = 32>(h, q, s) }}",
        ["2: s.0 w.1"], {},
    ),
    (
        "blocks whose zero points share a byte", 17,
        f"{NBITS}, uint8[16, 4, 8] q, float[64] s, uint8[32] z, float[16, 5] v) => (float[2, 4, 5] y) "
        f"{{ {DENSE} a = com.microsoft.MatMulNBits <K = 64, N = 16, bits = 4, block_size = 16>(h, q, s, z) "
        f"y = MatMul(a, v) }}",
        ["16: s.0 v.0", "4: s.0 w.1"], {},
    ),
    (
        "blocks of which the last is shorter", 17,
        f"(float[2, 4, 6] x, float[6, 40] w, uint8[16, 3, 8] q, float[48] s, float[16, 5] v) => (float[2, 4, 5] y) "
        f"{{ {DENSE} a = com.microsoft.MatMulNBits <K = 40, N = 16, bits = 4, block_size = 16>(h, q, s) "
        f"y = MatMul(a, v) }}",
        ["16: s.0 v.0", "3: s.0 w.1"], {},
    ),
    (
        "blocks of which the last is shorter, with zero points that share bytes", 17,
        f"(float[2, 4, 6] x, float[6, 40] w, uint8[16, 3, 8] q, float[48] s, uint8[32] z, float[16, 5] v) => (float[2, 4, 5] y) "
        f"{{ {DENSE} a = com.microsoft.MatMulNBits <K = 40, N = 16, bits = 4, block_size = 16>(h, q, s, z) "
        f"y = MatMul(a, v) }}",
        ["16: s.0 v.0", "3: s.0 w.1"], {},
    ),
    (
        "blocks whose zero points are one byte", 17,
        "(float[2, 4, 6] x, float[6, 64] w, uint8[16, 2, 16] q, float[16, 2] s, uint8[16, 1] z, float[16, 5] v) "
        f"=> (float[2, 4, 5] y) {{ {DENSE} a = com.microsoft.MatMulNBits <K = 64, N = 16, bits = 4, block_size = 32>"
        f"(h, q, s, z) y = MatMul(a, v) }}",
        ["16: s.0 v.0", "2: s.1 w.1"], {},
    ),
    (
        "blocks and a bias", 17,
        f"{NBITS}, uint8[16, 2, 16] q, float[16, 2] s, float[16] b, float[16, 5] v) => (float[2, 4, 5] y) "
        f"{{ {DENSE} a = com.microsoft.MatMulNBits <K = 64, N = 16, bits = 4, block_size = 32>(h, q, s, , , b) "
        f"y = MatMul(a, v) }}",
        ["16: b.0 s.0 v.0", "2: s.1 w.1"], {},
    ),
    (
        "a matrix that is quantised in blocks", 21,
        f"{NBITS}, int8[64, 5] q, float[4, 5] s, int8[4, 5] z) => (float[2, 4, 5] y) "
        f"{{ {DENSE} d = DequantizeLinear <axis = 0, block_size = 16>(q, s, z) y = MatMul(h, d) }}",
        ["4: s.0 w.1"], {},
    ),
    (
        "a matrix whose last block is short", 21,
        "(float[2, 4, 6] x, float[6, 40] w, int8[40, 8] q, float[3, 8] s, float[8, 5] v) => (float[2, 4, 5] y) "
        f"{{ {DENSE} d = DequantizeLinear <axis = 0, block_size = 16>(q, s) a = MatMul(h, d) y = MatMul(a, v) }}",
        ["3: s.0 w.1", "8: s.1 v.0"], {},
    ),
    (
        "truth values that choose between channels and a number", 17,
        f"{MLP}, bool[1, 1, 12] c, float o) => (float[2, 4, 5] y) "
        f"{{ {DENSE} a = Where(c, h, o) y = MatMul(a, v) }}",
        ["12: v.0 w.1"], {"c": np.arange(12) % 3 > 0},
    ),
    (
        "an order of rows", 17,
        f"{NBITS}, uint8[64, 4, 8] q, float[256] s, int32[64] g, float[64, 5] v) => (float[2, 4, 5] y) "
        f"{{ {DENSE} a = com.microsoft.MatMulNBits <K = 64, N = 64, bits = 4, block_size = 16>(h, q, s, , g) "
        f"y = MatMul(a, v) }}",
        ["64: s.0 v.0"], {"g": np.arange(64) // 16},
    ),
    (
        "a table in blocks", 17,
        "(int64[2, 4] x, uint8[9, 64] w, float[9, 4] s, float[128, 5] v) => (float[2, 4, 5] y) "
        "{ h = com.microsoft.GatherBlockQuantized <bits = 4, block_size = 32, gather_axis = 0, quantize_axis = 1>(w, "
        "x, s) y = MatMul(h, v) }",
        ["4: s.1 v.0"], {},
    ),
    (
        "a table in blocks with zero points that share bytes", 17,
        "(int64[2, 4] x, uint8[9, 36] w, float[9, 5] s, uint8[9, 3] z, float[72, 6] v, float[6, 5] u) => (float[2, 4, 5] y) "
        "{ h = com.microsoft.GatherBlockQuantized <bits = 4, block_size = 16, gather_axis = 0, quantize_axis = 1>(w, "
        "x, s, z) o = MatMul(h, v) y = MatMul(o, u) }",
        ["3: s.1 v.0", "6: u.0 v.1"], {},
    ),
    (
        "a table in blocks of bytes, of which the last is shorter", 17,
        "(int64[2, 4] x, uint8[9, 40] w, float[9, 3] s, uint8[9, 3] z, float[40, 6] v, float[6, 5] u) => (float[2, 4, 5] y) "
        "{ h = com.microsoft.GatherBlockQuantized <bits = 8, block_size = 16, gather_axis = 0, quantize_axis = 1>(w, "
        "x, s, z) o = MatMul(h, v) y = MatMul(o, u) }",
        ["3: s.1 v.0", "6: u.0 v.1"], {},
    ),
    (
        "a table in one block, whose bytes hold two numbers", 17,
        "(int64[2, 4] x, uint8[9, 12] w, float[9, 1] s, uint8[9, 1] z, float[24, 5] v) => (float[2, 4, 5] y) "
        "{ h = com.microsoft.GatherBlockQuantized <bits = 4, block_size = 32, gather_axis = 0, quantize_axis = 1>(w, "
        "x, s, z) y = MatMul(h, v) }",
        ["12: v.0"], {},
    ),
    (
        "a matrix in one block", 21,
        "(float[2, 4, 6] x, float[6, 24] w, int8[24, 5] q, float[1, 5] s) => (float[2, 4, 5] y) "
        f"{{ {DENSE} d = DequantizeLinear <axis = 0, block_size = 32>(q, s) y = MatMul(h, d) }}",
        ["24: w.1"], {},
    ),
    (
        "a table in blocks that ends the network too", 17,
        "(int64[2, 4] x, uint8[9, 4, 16] w, float[9, 4] s, int64[2] two) => (float[2, 4, 9] y) "
        "{ t = Reshape(w, two) h = com.microsoft.GatherBlockQuantized <bits = 4, block_size = 32, gather_axis = 0, "
        "quantize_axis = 1>(t, x, s) y = com.microsoft.MatMulNBits <K = 128, N = 9, bits = 4, block_size = 32>(h, w, "
        "s) }",
        ["4: s.1"], {"two": [9, 64]},
    ),
    (
        "a piece of size zero", 17,
        f"{MLP}, int64[3] n) => (float[2, 4, 5] y) "
        f"{{ {DENSE} a, b, c = Split <axis = 2>(h, n) d = Concat <axis = 2>(c, b, a) y = MatMul(d, v) }}",
        ["5: v.0 w.1", "7: v.0 w.1"], {"n": [5, 0, 7]},
    ),
    (
        "cumulative along an axis in a list", 17,
        f"{MLP}, int64[1] k) => (float[2, 4, 5] y) "
        f"{{ {DENSE} a = CumSum(h, k) y = MatMul(a, v) }}",
        ["12: v.0 w.1"], {"k": 1},
    ),
    (
        "packed queries", 17,
        f"{GROUPED}) => (float[2, 4, 5] y) "
        f"{{ {DENSE} o, k, p = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2, "
        f"local_window_size = 2, softcap = 3.0>(h, , , , , n, t) y = MatMul(o, v) }}",
        ["2: v.0 w.1", "2: v.0 w.1"], {"n": [3, 3], "t": [4]},
    ),
    ("mean and variance", 13, f"{HEAD}) => (float[2, 5, 8, 8] y) {{ {STEM} a = MeanVarianceNormalization <axes = [1, -1]>(h) {LAST} }}", ["8: v.1 w.0"], {}),
]  # fmt: skip  # a table
# name, opset, graph, why it is frozen, values of constants
HELD: list[tuple[str, int, str, str, dict[str, Any]]] = [
    (
        "resize to the same size", 17,
        f"{HEAD}, float[4] s) => (float[2, 5, 16, 16] y) "
        f"{{ {STEM} a = Resize <mode = \"nearest\">(h, , s) {LAST} }}",
        "resamples", {"s": [1, 1.12, 2, 2]},
    ),
    (
        "resize of named axes", 18,
        f"{HEAD}, float[2] s) => (float[2, 5, 16, 8] y) "
        f"{{ {STEM} a = Resize <axes = [-3, 2], mode = \"nearest\">(h, , s) {LAST} }}",
        "resamples", {"s": [1.12, 2]},
    ),
    (
        "a packed matrix in one block", 17,
        "(float[2, 4, 6] x, float[6, 24] w, uint8[5, 1, 16] q, float[5] s) => (float[2, 4, 5] y) "
        f"{{ {DENSE} y = com.microsoft.MatMulNBits <K = 24, N = 5, bits = 4, block_size = 32>(h, q, s) }}",
        "quantises this axis in one block", {},
    ),
    ("resize of opset 10", 10, f"{HEAD}, float[4] s) => (float[2, 5, 16, 16] y) {{ {STEM} a = Resize(h, s) {LAST} }}", "resamples", {"s": [1, 1.12, 2, 2]}),
    ("upsample", 9, f"{HEAD}, float[4] s) => (float[2, 5, 16, 16] y) {{ {STEM} a = Upsample(h, s) {LAST} }}", "resamples", {"s": [1, 1.12, 2, 2]}),
    ("upsample by attribute", 7, f"{HEAD}) => (float[2, 5, 16, 16] y) {{ {STEM} a = Upsample <scales = [1.0, 1.12, 2.0, 2.0]>(h) {LAST} }}", "resamples", {}),
    (
        "crop", 17,
        f"{HEAD}, float[8] r, int64[4] n) => (float[2, 5, 16, 16] y) "
        f"{{ {STEM} a = Resize <mode = \"linear\", coordinate_transformation_mode = \"tf_crop_and_resize\">(h, r, , "
        f"n) {LAST} }}",
        "resamples", {"r": [0, 0.2, 0, 0, 1, 0.9, 1, 1], "n": [2, 8, 16, 16]},
    ),
    (
        "half a pixel on", 11,
        f"{HEAD}, float[8] r, float[0] s, int64[4] n) => (float[2, 5, 16, 16] y) "
        f"{{ {STEM} a = Resize <mode = \"nearest\", nearest_mode = \"ceil\", "
        f"coordinate_transformation_mode = \"tf_half_pixel_for_nn\">(h, r, s, n) {LAST} }}",
        "resamples", {"r": [0, 0, 0, 0, 1, 1, 1, 1], "n": [2, 8, 16, 16]},
    ),
    (
        "mirrored channels", 17,
        f"{PAIRS}, int64[8] p) => (float[2, 5, 8, 8] y) "
        f"{{ {STEM} a = Pad <mode = \"reflect\">(h, p) {LAST} }}",
        "copies of its own", {"p": [0, 3, 0, 0, 0, 3, 0, 0]},
    ),
    (
        "wrapped channels", 19,
        f"{PAIRS}, int64[8] p) => (float[2, 5, 8, 8] y) "
        f"{{ {STEM} a = Pad <mode = \"wrap\">(h, p) {LAST} }}",
        "copies of its own", {"p": [0, 3, 0, 0, 0, 3, 0, 0]},
    ),
    (
        "scores handed out", 17,
        f"{GROUPED}) => (float[2, 4, 5] y, float[2, 4, 4, 4] q) "
        f"{{ {DENSE} o, k, p, q = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2, "
        f"qk_output = 1>(h, , , , , n, t) y = MatMul(o, v) }}",
        "returns its scores", {"n": [3, 3], "t": [4]},
    ),
    (
        "sum over an ellipsis", 17,
        f"{MLP}) => (float[2, 4, 5] y) "
        f"{{ {DENSE} s = Einsum <equation = \"...a->a\">(h) a = Add(h, s) y = MatMul(a, v) }}",
        "ellipsis", {},
    ),
    (
        "assignment along a diagonal", 17,
        f"{MLP}, int64[4, 3] p, float[4] u) => (float[2, 4, 5] y) {{ {DENSE} a = ScatterND(h, p, u) y = MatMul(a, v) }}",
        "writes along this axis by index", {"p": [[0, 0, 0], [1, 1, 1], [0, 2, 2], [1, 3, 3]]},
    ),
    (
        "assignment to a channel twice", 17,
        "(float[4, 6] x, float[6, 8] w, float[6, 3] u, int64[3, 1] p, float[8, 5] v) => (float[4, 5] y) "
        "{ h = MatMul(x, w) t = Transpose(h) g = MatMul(x, u) s = Transpose(g) a = ScatterND(t, p, s) "
        "b = Transpose(a) y = MatMul(b, v) }",
        "writes along this axis by index", {"p": [[1], [7], [-1]]},
    ),
    (
        "tiles of opset 1", 5,
        f"{MLP}, float n, float k) => (float[2, 4, 5] y) "
        f"{{ {DENSE} a = Tile(h, n, k) y = MatMul(a, v) }}",
        "before opset 6", {"n": 1, "k": 2},
    ),
]  # fmt: skip  # a table


@pytest.mark.parametrize("row", FOLLOWED, ids=[row[0] for row in FOLLOWED])
def test_followed(row: tuple[str, int, str, list[str], dict[str, Any]]) -> None:
    assert_followed(row)


@pytest.mark.parametrize("row", HELD, ids=[row[0] for row in HELD])
def test_held(row: tuple[str, int, str, str, dict[str, Any]]) -> None:
    assert_held(row)


def test_slopes_of_before_opset_7_lie_on_the_channels() -> None:
    model = from_text(f"{HEAD}, float[8] s) => (float[2, 5, 8, 8] y) {{ {STEM} a = PRelu(h, s) {LAST} }}", opset=6)
    assert signature(comb(model)) == ["8: s.0 v.1 w.0"]


def test_a_number_for_each_row_of_a_matrix() -> None:
    text = (
        "(float[2, 4, 8] x, uint8[8, 5] q, uint8[2, 4, 1] z, float[5, 3] v) => (float[2, 4, 3] y) "
        "{ i, s, o = DynamicQuantizeLinear(x) m = MatMulInteger(i, q, z) c = Cast <to = 1>(m) y = MatMul(c, v) }"
    )
    assert signature(comb(from_text(text))) == []  # there are numbers for each matrix of the batch
    text = text.replace("uint8[2, 4, 1] z", "uint8[4] z")
    assert signature(comb(from_text(text))) == ["5: v.0"]


def overloaded(first: str) -> ModelProto:
    """Two functions of one name: a rectifier on the channels, and a softmax over them; one of them is called."""
    functions = []
    for overload, operator in (("gate", "Relu"), ("share", "Softmax"))[:: 1 if first == "gate" else -1]:
        body = [helper.make_node(operator, ["a"], ["b"])]
        function = helper.make_function("local", "Act", ["a"], ["b"], body, [helper.make_opsetid("", 18)])
        function.overload = overload
        functions.append(function)
    model = from_text(f"{MLP}) => (float[2, 4, 5] y) {{ {DENSE} a = local.Act(h) y = MatMul(a, v) }}", opset=18, ir=10)
    model.functions.extend(functions)
    return model


@pytest.mark.parametrize("first", ["gate", "share"])
@pytest.mark.parametrize("called", ["gate", "share"])
def test_overloads_of_a_function_are_told_apart(first: str, called: str) -> None:
    model = overloaded(first)
    model.graph.node[1].overload = called
    assert signature(comb(model)) == (["12: v.0 w.1"] if called == "gate" else [])
    if called == "gate":
        assert mask_oracle(model).passed


def test_attributes_of_a_call_reach_the_branches_of_its_function() -> None:
    branch = "then_branch = t () => (float[2, 4, 12] p) { p = Softmax <axis: int = @k>(a) }"
    other = "else_branch = e () => (float[2, 4, 12] q) { q = Neg(a) }"
    function = f'<opset_import: ["": 18], domain: "local"> Act <k>(a, c) => (b) {{ b = If(c) <{branch}, {other}> }}'
    graph = f"{MLP}, bool c) => (float[2, 4, 5] y) {{ {DENSE} a = local.Act <k = 1>(h, c) y = MatMul(a, v) }}"
    model = from_text(graph, opset=18, ir=10, values={"c": True})
    model.functions.append(parser.parse_function(function))
    assert signature(comb(model)) == ["12: v.0 w.1"]


def captured(taken: str) -> ModelProto:
    """A body that is not followed takes something from outside."""
    text = f"{MLP}, float[12] b) => (float[2, 4, 5] y, seq(float[2, 4, 12]) z) {{ {DENSE} a = Add(h, b) y = MatMul(a, v) }}"
    model = from_text(text, opset=17)
    body = helper.make_graph(
        [helper.make_node("Add", ["element", taken], ["out"])],
        "body",
        [helper.make_tensor_value_info("element", TensorProto.FLOAT, [2, 4, 12])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [2, 4, 12])],
    )
    start = numpy_helper.from_array(np.ones((2, 4, 12), np.float32), "start")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["start"], value=start))
    model.graph.node.append(helper.make_node("SequenceConstruct", ["start"], ["list"]))
    model.graph.node.append(helper.make_node("SequenceMap", ["list"], ["z"], body=body))
    return model


def test_what_a_body_that_is_not_followed_takes_stays() -> None:
    combed = comb(captured("h"))
    assert combed.groups == []
    model = captured("b")
    assert [len(group) for group in comb(model).groups] == [12]
    small = cpd.run("comb, score, allocate{channels=0.5}, prune", model).model
    assert small.array("b").shape == (12,)
    assert {tuple(t.dims) for t in small.graph.initializer if t.name.startswith("b_")} == {(6,)}
