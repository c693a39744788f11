"""Sizes that a file leaves open and its operators require: solved, and right for onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto

import cpd_onnx as cpd
from cpd_onnx.channels.combing import comb
from cpd_onnx.ops.sizes import floor_divided, symbol
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.shapes import inference
from cpd_onnx.shapes.inference import fold
from cpd_onnx.shapes.solving import solved
from tests.support.models import from_text

VIT = """(float[n, c, h, w] x, float[8, 3, 4, 4] k, float[1, 49, 8] table, float[8, 16] up, float[16, 8] down)
=> (float[] y) {
    a = Conv <strides = [4, 4]>(x, k) s = Constant <value = int64[3] {0, 8, -1}>() f = Reshape(a, s)
    t = Transpose <perm = [0, 2, 1]>(f) p = Add(t, table) u = MatMul(p, up) r = Relu(u) y = MatMul(r, down)
}"""
QUANTIZED_VIT = """(float[n, c, h, w] x, uint8[8, 3, 4, 4] k, float s, uint8 z, uint8[1, 1, 8] token, uint8[1, 50, 8] table, uint8[8, 16] up)
=> (float[] y) {
    b = QuantizeLinear(x, s, z) a = QLinearConv <strides = [4, 4]>(b, s, z, k, s, z, s, z)
    l = Constant <value = int64[3] {0, 8, -1}>() f = Reshape(a, l) t = Transpose <perm = [0, 2, 1]>(f)
    n0 = Shape <start = 0, end = 1>(t) one = Constant <value = int64[2] {1, 1}>() g = Concat <axis = 0>(n0, one)
    d = Expand(token, g) i = com.microsoft.QLinearConcat <axis = 1>(s, z, d, s, z, t, s, z)
    p = com.microsoft.QLinearAdd(i, s, z, table, s, z, s, z) u = QLinearMatMul(p, s, z, up, s, z, s, z)
    y = DequantizeLinear(u, s, z)
}"""
CASES = {
    "channels of a convolution": (
        "(float[n, c, 8, 8] x, float[8, 3, 3, 3] k, float[4, 8, 1, 1] u) => (float[] y) "
        "{ a = Conv(x, k) r = Relu(a) y = Conv(r, u) }",
        {"c": 3},
    ),
    "channels of a convolution in groups, behind a cast": (
        "(float16[n, c, 8, 8] x, float[8, 2, 3, 3] k, float[4, 8, 1, 1] u) => (float[] y) "
        "{ f = Cast <to = 1>(x) a = Conv <group = 2>(f, k) r = Relu(a) y = Conv(r, u) }",
        {"c": 4},
    ),
    "channels that come last": (
        "(float[n, 8, 8, c] x, float[8, 3, 3, 3] k, float[4, 8, 1, 1] u) => (float[] y) "
        "{ f = Transpose <perm = [0, 3, 1, 2]>(x) a = Conv(f, k) r = Relu(a) y = Conv(r, u) }",
        {"c": 3},
    ),
    "height and width by a table of positions": (VIT, {"c": 3, "h": 28, "w": 28}),
    "height and width by a table, behind a convolution without pads": (
        VIT.replace("Conv <", 'Conv <auto_pad = "VALID", '),
        {"c": 3, "h": 28, "w": 28},
    ),
    "height and width by a fully connected layer": (
        "(float[n, 3, h, w] x, float[6, 3, 3, 3] k, float[96, 10] d, float[10, 4] e) => (float[] y) "
        "{ a = Conv <strides = [2, 2], pads = [1, 1, 1, 1]>(x, k) p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]>"
        "(a) f = Flatten(p) g = Gemm(f, d) r = Relu(g) y = MatMul(r, e) }",
        {"h": 16, "w": 16},
    ),
    "a length by the scales along it": (
        "(float[n, t, 6] x, float[6, 8] k, float[16] s, uint8[16] z, float[8, 4] v) => (float[] y) { a = MatMul(x, k) "
        "q = QuantizeLinear <axis = 1>(a, s, z) d = DequantizeLinear <axis = 1>(q, s, z) y = MatMul(d, v) }",
        {"t": 16},
    ),
    "height and width by a table, in quantised operators": (QUANTIZED_VIT, {"c": 3, "h": 28, "w": 28}),
    "a batch that a target leaves out, beside an open length": (
        "(float[n, t, 6] x, float[6, 12] u, float[4, 4] v) => (float[] y) { p = Transpose <perm = [1, 0, 2]>(x) "
        "a = MatMul(p, u) r = Relu(a) s = Shape <start = 0, end = 1>(r) e = Constant <value = int64[3] {1, 3, 4}>() "
        "g = Concat <axis = 0>(s, e) h = Reshape(r, g) y = MatMul(h, v) }",
        {"n": 1},
    ),
    "a batch that a state has": (
        "(float[n, 12, 6] x, float[1, 1, 8] xh, float[1, 24, 6] w, float[1, 24, 8] r, float[8, 4] v) => (float[] y) "
        "{ s = Transpose <perm = [1, 0, 2]>(x) o, l = GRU <hidden_size = 8>(s, w, r, , , xh) y = MatMul(l, v) }",
        {"n": 1},
    ),
    "segments of a sequence": (
        "(float[n, s, 6] x, float[6, 8] w, float[8, 4] v) => (float[] y) { a = MatMul(x, w) r = Relu(a) "
        "t = Constant <value = int64[4] {-1, 4, 3, 8}>() g = Reshape(r, t) m = ReduceMean <axes = [2], keepdims = 0>(g) "
        "y = MatMul(m, v) }",
        {"s": 12},
    ),
    "height and width of a table that is resized": (
        "(float[n, 3, h, w] x, float[8, 3, 4, 4] k, float[1, 36, 8] table, float[8, 4] v) => (float[] y) "
        "{ c = Conv <strides = [4, 4]>(x, k) a = Transpose <perm = [0, 2, 3, 1]>(c) s = Shape(a) "
        "i = Constant <value = int64[2] {1, 2}>() e = Gather(s, i) o = Constant <value = int64[1] {1}>() "
        "m = Constant <value = int64[1] {-1}>() q = Concat <axis = 0>(o, e, m) t = Reshape(table, q) b = Add(a, t) "
        "r = Relu(b) y = MatMul(r, v) }",
        {"h": 24, "w": 24},
    ),
    "a height that goes": (
        "(float[n, 3, h, 20] x, float[8, 3, 1, 1] k, float[8, 4] v) => (float[] y) "
        "{ a = Conv(x, k) i = Constant <value = int64[1] {2}>() s = Squeeze(a, i) t = Transpose <perm = [0, 2, 1]>(s) "
        "y = MatMul(t, v) }",
        {"h": 1},
    ),
    "a batch that a target has": (
        "(float[n, 6] x, float[6, 8] w, float[4, 3] v) => (float[] y) "
        "{ a = MatMul(x, w) s = Constant <value = int64[3] {2, 2, 4}>() b = Reshape(a, s) r = Relu(b) "
        "y = MatMul(r, v) }",
        {"n": 2},
    ),
    "columns of a matrix": (
        "(float[n, m2] x, float[10, 8] w, float[8, 3] v) => (float[] y) { a = MatMul(x, w) r = Relu(a) y = MatMul(r, v) }",
        {"m2": 10},
    ),
    "channels of a convolution that was fused": (
        "(float[n, c, 8, 8] x, float[8, 3, 3, 3] k, float[8] b, float[4, 8, 1, 1] u) => (float[] y) "
        '{ a = com.microsoft.FusedConv <activation = "Relu">(x, k, b) y = Conv(a, u) }',
        {"c": 3},
    ),
    "columns of a matrix that was fused": (
        "(float[n, m2] x, float[10, 8] w, float[8] b, float[8, 3] v) => (float[] y) "
        '{ a = com.microsoft.FusedGemm <activation = "Relu">(x, w, b) y = MatMul(a, v) }',
        {"m2": 10},
    ),
    "columns of a matrix in blocks": (
        "(float[n, m2] x, uint8[8, 1, 16] w, float[8] s, float[8, 3] v) => (float[] y) "
        "{ a = com.microsoft.MatMulNBits <K = 32, N = 8, bits = 4, block_size = 32>(x, w, s) r = Relu(a) "
        "y = MatMul(r, v) }",
        {"m2": 32},
    ),
    "a text by what is added to it before a normalisation": (
        "(float[n, l, 8] x, float[1, 5, 8] t, float[8] g, float[8, 6] w, float[6, 3] v) => (float[] y) "
        "{ a = com.microsoft.SkipLayerNormalization(x, t, g, g) h = MatMul(a, w) r = Relu(h) y = MatMul(r, v) }",
        {"l": 5},
    ),
    "sizes that are joined": (
        "(float[n, 3, h, 16] x, float[1, 3, 8, 16] xz, float[6, 3, 1, 1] k, float[4, 6, 1, 1] u) => (float[] y) "
        "{ a = Concat <axis = 0>(x, xz) b = Conv(a, k) r = Relu(b) y = Conv(r, u) }",
        {"h": 8},
    ),
}
OPEN = {
    "images of all sizes": (
        "(float[n, 3, h, w] x, float[8, 3, 3, 3] k, float[8, 1, 1] b, float[4, 8, 1, 1] u) => (float[] y) "
        "{ a = Conv(x, k) c = Add(a, b) r = Relu(c) y = Conv(r, u) }"
    ),
    "a branch that may never run": (
        "(float[n, c] x, float[4] b) => (float[] y) { s = ReduceSum <keepdims = 0>(x) z = Constant <value = float {0}>() "
        "q = Greater(s, z) y = If (q) <then_branch = g () => (float[] p) { p = Add(x, b) }, "
        "else_branch = e () => (float[] p) { p = Identity(x) }> }"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_open_sizes_are_those_that_the_operators_require(name: str) -> None:
    text, sizes = CASES[name]
    model = cpd.load(from_text(text))
    folded = fold(model)
    assert dict(folded.solved) == sizes
    assert not folded.unknown
    rng, feed = np.random.default_rng(0), {}
    for info in model.graph.input:
        value = folded.scope.values[info.name]
        kind = np.float16 if value.dtype == 10 else np.float32
        feed[info.name] = rng.standard_normal(value.shape).astype(kind)
    assert execute(open_model(model), feed)[0].size


@pytest.mark.parametrize("name", OPEN)
def test_what_no_operator_requires_stays_open(name: str) -> None:
    folded = fold(cpd.load(from_text(OPEN[name])))
    assert not folded.solved
    assert not folded.scope.values["x"].has_fixed(0)


def test_pads_that_keep_the_size_divide_it_by_the_stride() -> None:
    text = (
        "(float[1, 3, h, 15] x, float[8, 3, 3, 3] k) => (float[] y) "
        '{ y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]>(x, k) }'
    )
    folded = fold(cpd.load(from_text(text)))
    assert folded.scope.values["y"].sizes == (1, 8, floor_divided(symbol("h") + 1, 2), 8)


@pytest.mark.parametrize(
    "operators",
    [
        "q = QuantizeLinear(x, s, z) a = QLinearConv <strides = [2, 2]>(q, s, z, k, s, z, s, z)",
        "q = QuantizeLinear(x, s, z) a = ConvInteger <strides = [2, 2]>(q, k)",
    ],
)
def test_sizes_behind_quantised_convolutions_stay_symbolic(operators: str) -> None:
    text = f"(float[n, 3, h, w] x, uint8[8, 3, 2, 2] k, float s, uint8 z) => (uint8[] a) {{ {operators} }}"
    half = [floor_divided(symbol(name) - 2, 2) + 1 for name in "hw"]
    assert fold(cpd.load(from_text(text))).scope.values["a"].sizes == (symbol("n"), 8, *half)


ROUNDED = """(float[n, 3, h, w] x, float[8, 3, 1, 1] k, float[6, 16, 1, 1] u, float s, uint8 z) => (float[] y) {
    a = Conv <strides = [8, 8]>(x, k) d = Shape(a) ends = Constant <value = int64[2] {2, 3}>() hw = Gather(d, ends)
    f = Cast <to = 1>(hw) i = QuantizeLinear(f, s, z) g = DequantizeLinear(i, s, z) j = Cast <to = 7>(g)
    c = Constant <value = int64[2] {0, 8}>() t = Concat <axis = 0>(c, j) r = Reshape(a, t) e = Relu(r)
    b = Concat <axis = 1>(a, e) v = Relu(b) y = Conv(v, u)
}"""
"""A quantised file whose exporter rounded the sizes too: they are correct up to the limit of their range."""


def test_rounded_sizes_are_those_at_the_limit_of_their_range() -> None:
    scale = np.float32(4 / 255)
    model = cpd.load(from_text(ROUNDED, values={"s": scale, "z": 0}))
    folded = fold(model)
    assert dict(folded.solved) == {"h": 32, "w": 32}
    assert not folded.unknown
    shape = folded.scope.values["y"].shape
    feed = {"x": np.ones((2, 3, 32, 32), np.float32)}
    assert shape == execute(open_model(model), feed)[0].shape
    assert comb(folded).prunable_fraction() == 1


def test_sizes_that_are_rounded_within_their_range_stay_open() -> None:
    folded = fold(cpd.load(from_text(ROUNDED, values={"s": 1, "z": 0})))
    assert not folded.unknown
    assert not folded.solved


@pytest.mark.parametrize("operators", ["a = QLinearMatMul(t, s, z, u, s, z, s, z)", "a = MatMulInteger(t, u)"])
def test_sizes_behind_quantised_products_stay_symbolic(operators: str) -> None:
    text = (
        "(float[n, 3, h, 6] x, float[8, 3, 2, 2] k, uint8[8, 5] u, float s, uint8 z) => (uint8[] a) { "
        f"b = Conv <strides = [2, 2]>(x, k) q = QuantizeLinear(b, s, z) t = Transpose <perm = [0, 2, 3, 1]>(q) {operators} }}"
    )
    found = fold(cpd.load(from_text(text))).scope.values["a"].sizes
    assert found == (symbol("n"), floor_divided(symbol("h") - 2, 2) + 1, 3, 5)


def test_the_solutions_of_equations() -> None:
    h, w, b = map(symbol, "hwb")
    assert solved([(3 * h + 1, 10)]) == {"h": 3}
    assert solved([(h * w, 49)]) == {"h": 7, "w": 7}
    assert solved([(floor_divided(h, 16) * floor_divided(w, 16) + 1, 197)]) == {"h": 224, "w": 224}
    assert solved([(floor_divided(h + 31, 32), 2)]) == {"h": 64}  # of 33 to 64
    assert solved([(floor_divided(h - 3, 2), 14)]) == {"h": 32}  # of 31 and 32
    assert solved([(h * w * b, 16), (h, 2)]) == {"h": 2}
    assert solved([(16000 * h, 480000)]) == {"h": 30}
    assert solved([(2 * h, 5), (h * w, 50), (h + 4, 2)]) == {}


def test_inspect_names_the_sizes_that_are_required() -> None:
    from cpd_onnx.report.inspection.findings import fact_lines, inspected

    content = inspected(comb(cpd.load(from_text(VIT))))
    assert content["model"]["required_sizes"] == {"c": 3, "h": 28, "w": 28}
    assert "its operators require c = 3, h = 28, w = 28" in fact_lines(content)


def reasons(text: str) -> set[str]:
    return {reason for frozen in comb(cpd.load(from_text(text))).frozen() for reason in frozen.reasons}


def test_a_size_that_does_not_fit_is_named_with_the_option_that_gives_it() -> None:
    three = (
        "(float[a, b, c] x, float[30, 8] w, float[8, 4] v) => (float[] y) "
        "{ f = Flatten <axis = 0>(x) h = MatMul(f, w) r = Relu(h) y = MatMul(r, v) }"
    )
    assert any("does not fit the size assumed for a and b and c: give --input-shape" in each for each in reasons(three))
    sliced = (
        "(float[1, 4, 6] x, int64[2] xs, float[6, 8] w, float[32, 8] table, float[8, 5] v) => (float[] y) "
        "{ both = Constant <value = int64[2] {0, 1}>() c = Constant <value = int64[2] {4, 8}>() e = Add(xs, c) "
        "p = Slice(table, xs, e, both) a = MatMul(x, w) b = Add(a, p) y = MatMul(b, v) }"
    )
    assert any("an axis whose size depends on the data" in reason for reason in reasons(sliced))
    assert not any("37" in reason for reason in reasons(sliced))


def test_a_shape_that_is_unknown_is_named_where_it_is_first_with_the_option_that_gives_it() -> None:
    text = (
        "(float[n, s, 6] x, float[6, 8] w, float[8, 8] u, float[8, 4] v) => (float[] y) { a = MatMul(x, w) r = Relu(a) "
        "t = Constant <value = int64[4] {3, -1, 5, 8}>() g = Reshape(r, t) b = MatMul(g, u) f = Relu(b) y = MatMul(f, v) }"
    )
    found = {str(reason) for reason in reasons(text)}
    assert "the output shape of Reshape 'g' is not known at the sizes assumed for n and s: give --input-shape" in found
    assert not any("MatMul" in reason for reason in found)
    assert comb(cpd.load(from_text(text)), {"x": (3, 5, 6)}).prunable_fraction() == 1.0


def test_a_branch_that_sizes_choose_is_named_also_by_what_a_later_branch_reads() -> None:
    later = (
        "k = If(c) <then_branch = p () => (float[] i) { i = Squeeze(g, zero) }, "
        "else_branch = q () => (float[] j) { j = Identity(g) }>"
    )
    text = (
        "(float[n, 6] x, float[6, 8] w, float[8, 4] v, int64[1] zero, int64[1] one) => (float[] y) "
        "{ h = MatMul(x, w) s = Shape(h) d = Gather(s, zero) c = Equal(d, one) "
        "g = If(c) <then_branch = t () => (float[] a) { a = Squeeze(h, zero) }, "
        f"else_branch = e () => (float[] b) {{ b = Identity(h) }}> {later} y = MatMul(k, v) }}"
    )
    model = from_text(text, values={"zero": [0], "one": [1]})
    found = {str(reason) for frozen in comb(cpd.load(model)).frozen() for reason in frozen.reasons}
    why = "is not known, since sizes of the inputs decide which branch runs: give --input-shape"
    assert f"the output shape of If 'g' {why}" in found
    assert not any("'k'" in reason for reason in found)


def test_a_shape_that_data_decide_is_not_blamed_on_the_sizes_of_inputs() -> None:
    text = (
        "(float[n, 6] x, float[2, 8] w, float[6, 8] u, float[8, 8] t, float[8, 4] v) => (float[] y) { i = NonZero(x) "
        "f = Cast <to = 1>(i) r = Transpose(f) a = MatMul(r, w) b = MatMul(x, u) c = Mul(a, b) d = MatMul(c, t) "
        "y = MatMul(d, v) }"
    )
    found = {str(reason) for reason in reasons(text)}
    assert "the output shape of Mul 'c' is not known, since it depends on the data" in found
    assert not any("--input-shape" in reason for reason in found)


COUNTED = {
    "a slice of a table": "p = Slice(table, xs, e, ax) h = MatMul(x, a) s = Add(h, p)",
    "a slice behind others": "q = Slice(table, xs, e, ax) c = Identity(q) z = Constant <value = int64[1] {0}>() "
    "p = Unsqueeze(c, z) h = MatMul(x, a) s = Add(p, h)",
    "a slice that is multiplied": "q = Slice(table, xs, e, ax) p = Transpose <perm = [1, 0]>(q) h = MatMul(x, a) "
    "m = MatMul(p, h) d = ReduceMean <axes = [1], keepdims = 1>(m) s = Add(h, d)",
}
"""Bodies in which a number of rows that the data decide must be four."""


@pytest.mark.parametrize("body", COUNTED.values(), ids=COUNTED.keys())
def test_a_count_that_data_decide_is_what_its_reader_requires(body: str) -> None:
    """Only the sliced axis is lost: the channels beside it can go."""
    text = (
        "(float[1, 4, 12] x, int64[1] xs, float[32, 14] table, float[12, 14] a, float[14, 10] b, float[10, 5] c2, "
        f"int64[1] four, int64[1] ax) => (float[1, 4, 5] y) {{ e = Add(xs, four) {body} u = MatMul(s, b) r = Relu(u) "
        "y = MatMul(r, c2) }"
    )
    model = from_text(text, values={"four": [4], "ax": [0]})
    combed = comb(model)
    assert not combed.folded.unknown
    assert 10 in [len(group) for group in combed.groups]
    kept = [[0] if len(group) == 10 else [] for group in combed.groups]
    assert any(kept)
    state = cpd.run("comb, score{kind='l2'}, allocate{macs=0.7}, prune, verify", model)
    feed = {"x": np.ones((1, 4, 12), np.float32), "xs": np.asarray([3], np.int64)}
    assert execute(open_model(state.model), feed)[0].shape == (1, 4, 5)


def test_counts_that_fit_nothing_stay_open() -> None:
    """A count that meets one index may be any."""
    model = from_text(
        "(float[1, 14] x, int64[1] xs, float[32, 14] table, float[14, 10] b, int64[1] e, int64[1] ax) => (float[N, 10] y) "
        "{ p = Slice(table, xs, e, ax) s = Add(x, p) y = MatMul(s, b) }",
        values={"e": [30], "ax": [0]},
    )
    assert comb(model).folded.scope.values["p"].has_placeholder


def test_a_size_that_is_given_holds_for_its_symbol_in_all_inputs() -> None:
    model = from_text(
        "(float[n, p, 6] x, float[n, p, 6] xz, float[m, q, 6] xa, float[6, 5] w) => (float[n, p, 5] y, float[m, q, 5] z) "
        "{ s = Add(x, xz) y = MatMul(s, w) z = MatMul(xa, w) }"
    )
    sizes = comb(model, {"xz": (3, 7, 6)}).folded.scope.values
    assert [sizes[name].shape for name in ("x", "xz", "y")] == [(3, 7, 6), (3, 7, 6), (3, 7, 5)]
    assert sizes["x"].has_fixed(1)
    assert not sizes["xa"].has_fixed(1)
    both = comb(model, {"x": (3, 7, 6), "xz": (1, 7, 6)}).folded.scope.values
    assert [both[name].shape for name in ("x", "xz")] == [(3, 7, 6), (1, 7, 6)]


def met(known: str) -> ModelProto:
    """Return a model that multiplies rows of two tensors, of which data decide the number, by as many others."""
    return from_text(
        f"(float[{known}, 6] x, float[6] xs, float[6] xz, float[1, 8] w, float[6, 8] u, float[8, 10] t, float[10, 4] v) "
        "=> (float[r, 4] y) { i = NonZero(xs) j = NonZero(xz) k = Concat <axis = 1>(i, j) f = Cast <to = 1>(k) "
        "n = Transpose <perm = [1, 0]>(f) a = MatMul(n, w) b = MatMul(x, u) c = Mul(a, b) d = MatMul(c, t) "
        "y = MatMul(d, v) }"
    )


def test_a_size_that_data_decide_is_the_known_one_that_it_meets() -> None:
    model = met("12")
    combed = comb(model)
    assert combed.folded.scope.values["c"].shape == (12, 8)
    assert sorted(map(len, combed.groups)) == [8, 10]
    assert cpd.run("comb, score{kind='l2'}, allocate{macs=0.5}, prune, verify", model).verification.passed


def test_a_size_that_data_decide_is_not_one_that_may_be_one() -> None:
    """With a single row in the other tensor, the result has as many rows as the data decide."""
    assert comb(met("n")).folded.scope.values["c"].shapes is None


def test_the_rest_of_a_division_is_what_its_reader_requires() -> None:
    """Two symbols stand for the batch, one of which is used to divide the sizes of a tensor with the other."""
    model = from_text(
        "(float[n, t, 6] x, float[m, t, 1] xm, float[6, 12] k, float[12, 10] v, float[10, 4] u, int64[1] zero, "
        "int64[1] two, int64[1] rest) => (float[n, t, 4] y) { h = MatMul(x, k) z = Mul(xm, h) s = Shape(x) "
        "b = Slice(s, zero, two) c = Concat <axis = 0>(b, rest) r = Reshape(z, c) d = MatMul(r, v) y = MatMul(d, u) }",
        values={"zero": [0], "two": [2], "rest": [-1]},
    )
    combed = comb(model)
    assert combed.folded.scope.values["r"].has_fixed(2)
    assert sorted(map(len, combed.groups)) == [10, 12]
    assert cpd.run("comb, score{kind='l2'}, allocate{macs=0.5}, prune, verify", model).verification.passed


def test_required_sizes_are_found_before_others_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    run = inference._Inference.run
    monkeypatch.setattr(inference._Inference, "run", lambda self: (runs.append(self.profile), run(self))[1])
    folded = fold(cpd.load(from_text(VIT)))
    assert folded.solved == {"c": 3, "h": 28, "w": 28}
    assert not folded.unknown
    assert len(runs) <= 3, "one inference finds what is required, the next needs no other sizes"
