"""Models that leave sizes open: pruned right at sizes that nobody used before, or kept with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

import cpd_onnx as cpd
from cpd_onnx.channels.combing import at_sizes, comb
from cpd_onnx.proof.inputs import proof_inputs
from cpd_onnx.runtime.sessions import open_model
from cpd_onnx.shapes.inference import fold
from cpd_onnx.testing import mask_oracle
from tests.support.models import from_text
from tests.support.open_outcome import open_outcome, outcome_of

CASES = Path(os.environ.get("CPD_DATA", Path(__file__).parents[3] / "shared" / "data")).parent / "cases" / "proof"
IMAGE = "(float[n, 3, h, w] x, float[8, 3, 1, 1] k, float[8, 4] v, float[4, 8, 1, 1] u) => (float[] y)"
TOKENS = "(float[n, t, 6] x, float[m, s, 6] xz, float[6, 8] k, float[8, 4] v) => (float[] y)"


def sizes(**axes: int) -> str:
    """Nodes that read sizes of the tensor c."""
    constants = " ".join(f"i{a} = Constant <value = int64[1] {{{a}}}>()" for a in axes.values())
    return f"{constants} s = Shape(c) " + " ".join(f"{name} = Gather(s, i{a})" for name, a in axes.items())


def ints(name: str, *values: int) -> str:
    return f"{name} = Constant <value = int64[{len(values)}] {{{', '.join(map(str, values))}}}>()"


KEPT = {
    "channels and pixels mixed": (
        f"{IMAGE} {{ c = Conv(x, k) {ints('t', 0, -1, 8)} r = Reshape(c, t) m = MatMul(r, v) "
        f"y = ReduceMean <axes = [1], keepdims = 0>(m) }}"
    ),
    "a number of sizes that cancel for squares": (
        f"{IMAGE} {{ c = Conv(x, k) {sizes(a=1, b=2, d=3)} p = Mul(a, b) q = Div(p, d) f = Cast <to = 1>(q) "
        f"g = Div(c, f) y = Conv(g, u) }}"
    ),
    "cut at the smaller of a number and a size": (
        f"{IMAGE} {{ c = Conv(x, k) {sizes(b=2)} {ints('e', 8)} {ints('o', 0)} {ints('one', 1)} m = Min(e, b) "
        f"g = Slice(c, o, m, one) y = ReduceSum <keepdims = 1>(g, one) }}"
    ),
    "cut at a size over a number": (
        f"{IMAGE} {{ c = Conv(x, k) {sizes(b=2)} {ints('e', 8)} {ints('o', 0)} {ints('one', 1)} m = Div(b, e) "
        f"g = Slice(c, o, m, one) y = ReduceSum <keepdims = 1>(g, one) }}"
    ),
    "sizes written down though they are open": f"{IMAGE} {{ c = Conv(x, k) {ints('t', -1, 8, 8, 8)} r = Reshape(c, t) y = Conv(r, u) }}",
    "split at a size": (
        f"{IMAGE} {{ c = Conv(x, k) {sizes(a=1, b=2)} {ints('two', 2)} h1 = Min(b, two) h2 = Sub(a, h1) "
        f"q = Concat <axis = 0>(h1, h2) l, r = Split <axis = 1>(c, q) {ints('one', 1)} y = ReduceSum(l, one) }}"
    ),
    "padded by a size": (
        f"{IMAGE} {{ c = Conv(x, k) {sizes(b=2)} {ints('z1', 0)} {ints('z2', 0, 0, 0)} {ints('z5', 0, 0, 0)} "
        f"p = Concat <axis = 0>(z1, b, z2, z5) q = Pad(c, p) {ints('one', 1)} y = ReduceSum(q, one) }}"
    ),
    "a batch that is squeezed away": (
        "(float[n, 3, 8, 8] x, float[2, 3, 1, 1] k, float[2, 3] v) => (float[] y) "
        "{ c = Conv(x, k) p = GlobalAveragePool(c) q = Squeeze(p) y = MatMul(q, v) }"
    ),
    "tokens read as channels": (
        f"{TOKENS} {{ c = MatMul(x, k) {sizes(a=0, b=1)} {ints('d', 8)} q = Concat <axis = 0>(a, d, b) "
        f"r = Reshape(c, q) {ints('one', 1)} y = ReduceSum(r, one) }}"
    ),
}  # fmt: skip  # a table
PRUNED = {
    "channels as what halves of a size leave, which a kernel requires to be all": (
        f"{IMAGE} {{ c = Conv(x, k) {sizes(a=0, d=2, e=3)} {ints('two', 2)} {ints('m', -1)} h1 = Div(d, two) "
        f"h2 = Mul(h1, two) q = Concat <axis = 0>(a, m, h2, e) g = Reshape(c, q) y = Conv(g, u) }}"
    ),
    "flattened pixels": f"{IMAGE} {{ c = Conv(x, k) {ints('t', 0, 8, -1)} r = Reshape(c, t) g = Transpose <perm = [0, 2, 1]>(r) y = MatMul(g, v) }}",
    "flattened and back": (
        f"{IMAGE} {{ c = Conv(x, k) {sizes(a=0, b=1, d=2, e=3)} p = Mul(d, e) q = Concat <axis = 0>(a, b, p) "
        f"r = Reshape(c, q) f = Relu(r) o = Concat <axis = 0>(a, b, d, e) g = Reshape(f, o) y = Conv(g, u) }}"
    ),
    "channels merged with the batch": (
        f"{IMAGE} {{ c = Conv(x, k) g = Flatten <axis = 2>(c) f = Softmax <axis = 1>(g) {sizes(a=0, b=1, d=2, e=3)} "
        f"q = Concat <axis = 0>(a, b, d, e) r = Reshape(f, q) y = Conv(r, u) }}"
    ),
    "a norm over channels and the batch's sizes": (
        f"{IMAGE} {{ c = Conv(x, k) {ints('t', 0, 2, -1)} g = Reshape(c, t) "
        f"one = Constant <value = float[2] {{1.0, 1.0}}>() nil = Constant <value = float[2] {{0.0, 0.0}}>() "
        f"f = InstanceNormalization(g, one, nil) r0 = Shape(c) r = Reshape(f, r0) y = Conv(r, u) }}"
    ),
    "padded to a multiple": (
        f"{IMAGE} {{ c = Conv(x, k) {sizes(d=2)} {ints('four', 4)} l = Mod(d, four) o = Sub(four, l) i = Mod(o, four) "
        f"{ints('z', 0, 0, 0, 0, 0, 0)} {ints('z1', 0)} p = Concat <axis = 0>(z, i, z1) g = Pad(c, p) y = Conv(g, u) }}"
    ),
    "padded by what is no less than nothing": (
        f"{IMAGE} {{ c = Conv(x, k) {sizes(d=2)} {ints('nine', 9)} o = Sub(nine, d) zero = Constant <value_int = 0>() "
        f"i = Clip(o, zero) {ints('z', 0, 0, 0, 0, 0, 0)} {ints('z1', 0)} p = Concat <axis = 0>(z, i, z1) g = Pad(c, p) "
        f"y = Conv(g, u) }}"
    ),
    "tokens as long as another input's": (
        f"{TOKENS} {{ c = MatMul(x, k) {sizes(a=0, b=1)} {ints('m', -1)} q = Concat <axis = 0>(a, b, m) "
        f"r = Reshape(c, q) y = MatMul(r, v) }}"
    ),
    "heads of what positions of a table were added to": (
        f"(float[n, t, 6] x, float[6, 8] k, float[1, 512, 8] table, float[8, 4] v) => (float[] y) {{ c = MatMul(x, k) "
        f"{sizes(a=0, b=1)} {ints('o', 0)} {ints('one', 1)} p = Slice(table, o, b, one) z = Expand(p, s) g = Add(z, c) "
        f"{ints('h', -1, 2, 4)} q = Concat <axis = 0>(a, h) r = Reshape(g, q) f = Relu(r) "
        f"{ints('w', -1, 8)} e = Concat <axis = 0>(a, w) s2 = Reshape(f, e) y = MatMul(s2, v) }}"
    ),
    "rows of a table": (
        f"{TOKENS} {{ c0 = MatMul(x, k) c = Relu(c0) {sizes(b=1)} {ints('o', 0)} {ints('one', 1)} "
        f"{ints('shape', 1, 1, 8)} table = ConstantOfShape <value = float[1] {{0.5}}>(shape) {ints('shape2', 1)} "
        f"g = Add(c, table) y = MatMul(g, v) }}"
    ),
    "halves shaped as neighbours by the size of halves": (
        "(float[n, t, 6] x, float[6, 16] k, float[16, 4] v, float[900, 16] table) => (float[] y) { c = MatMul(x, k) "
        f"{sizes(b=1)} {ints('o', 0)} {ints('e', 8)} {ints('f', 16)} {ints('one', 1)} {ints('two', 2)} "
        f"g = Slice(table, o, b) l = Slice(g, o, e, one) h = Slice(g, e, f, one) ul = Unsqueeze(l, two) "
        f"uh = Unsqueeze(h, two) cl = Concat <axis = 2>(ul, ul) ch = Concat <axis = 2>(uh, uh) sg = Shape(g) "
        f"rl = Reshape(cl, sg) rh = Reshape(ch, sg) ml = Mul(c, rl) mh = Mul(c, rh) m = Add(ml, mh) y = MatMul(m, v) }}"
    ),
}  # fmt: skip  # a table


@pytest.mark.parametrize("kind", KEPT)
def test_what_only_holds_at_some_sizes_is_kept(kind: str) -> None:
    assert outcome_of(from_text(KEPT[kind]), 0) == "nothing to prune"


@pytest.mark.parametrize("kind", PRUNED)
def test_what_holds_at_all_sizes_is_pruned(kind: str) -> None:
    assert outcome_of(from_text(PRUNED[kind]), 0) == "right"


@pytest.mark.parametrize("start", range(0, 30, 10))
def test_random_graphs_with_open_sizes(start: int) -> None:
    found = {seed: open_outcome(seed) for seed in range(start, start + 10)}
    assert {seed: said for seed, said in found.items() if said[:3].isupper()} == {}


@pytest.mark.parametrize("seed", [85, 119, 483, 522, 608, 13339, 14779, 15083, 31603])
def test_random_graphs_that_were_pruned_wrong_once(seed: int) -> None:
    """Sizes of zero, a minimum that several operators pass on, a scale that keeps the size, sizes that only seem required.

    In the last one, a branch that is gone is needed at sizes that the proof tries.
    """
    assert not open_outcome(seed)[:3].isupper()


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in CASES.glob("*.onnx")) or [pytest.param("", marks=pytest.mark.skip)]
)
def test_cases(name: str) -> None:
    """Right at sizes that nobody used, or not written."""
    found = outcome_of(onnx.load(CASES / f"{name}.onnx"), 0)
    assert found.split(",")[0] in ("right", "nothing to prune", "not written"), found
    assert "wrong" not in found


def test_the_reason_names_the_operator() -> None:
    with pytest.raises(cpd.TargetError, match="divides this axis differently at other sizes of the input"):
        cpd.run("comb, score, allocate{channels=0.5}", from_text(KEPT["channels and pixels mixed"]))


def test_images_are_no_squares_and_symbols_differ() -> None:
    folded = fold(cpd.load(from_text(KEPT["channels and pixels mixed"])))
    shapes = folded.scope.values["x"].shapes
    assert shapes is not None
    assert all(h != w for _, _, h, w in shapes)
    assert str(folded.scope.values["r"].sizes) == "(n, h*w, 8)"


def test_caches_are_no_longer_than_texts() -> None:
    """A causal mask of a table may have fewer rows than an image has pixels."""
    shape = "float[batch_size, 4, past_sequence_length, 16]"
    folded = fold(cpd.load(from_text(f"({shape} x) => ({shape} y) {{ y = Relu(x) }}")))
    longest = max(found[2] for found in folded.scope.values["x"].shapes or ())
    assert longest < 30


def test_dimensions_that_the_file_computes_are_computed() -> None:
    """As exporters write them: a multiple of a symbol, a sum of two."""
    model = from_text("(float[b, c] x, float[b, d] xz) => (float[] y) { y = Relu(x) u = Relu(xz) }")
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "8*s"
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "p + q"
    values = fold(cpd.load(model)).scope.values
    assert [str(values[name].sizes) for name in ("x", "xz")] == ["(b, 8*s)", "(b, q + p)"]


# Inputs of the proof.


def test_the_proof_runs_at_sizes_that_combing_did_not_use() -> None:
    folded = fold(cpd.load(from_text(PRUNED["flattened pixels"])))
    found = proof_inputs(folded, open_model(folded.model, optimise=False))
    shapes = [feed["x"].shape for feed in found.feeds]
    assert shapes[0] == (1, 3, 1, 1)
    assert len(shapes) == 3
    assert all(h % 2 and w % 2 and h != w for _, _, h, w in shapes[1:])
    assert not set(shapes) & set(folded.scope.values["x"].shapes or ())


def test_the_least_sizes_are_those_that_the_model_accepts() -> None:
    text = "(float[n, 3, h, w] x, float[8, 3, 5, 5] k) => (float[] y) { y = Conv(x, k) }"
    folded = fold(cpd.load(from_text(text)))
    found = proof_inputs(folded, open_model(folded.model, optimise=False))
    assert found.feeds[0]["x"].shape == (1, 3, 5, 5)


BRANCHES = "y = If(b) <then_branch = t () => (float[n, 4] r) { r = Identity(o) }, else_branch = e () => (float[n, 4] q) { q = MatMul(d, v) }> }"


def branched(condition: str, more: str = "") -> onnx.ModelProto:
    """A model with an If whose one branch holds the weights that can be pruned."""
    head = f"(float[n, 6] x{more}, float[6, 8] k, float[8, 4] v, float[6, 4] w) => (float[n, 4] y)"
    return from_text(f"{head} {{ d = MatMul(x, k) o = MatMul(x, w) {condition} {BRANCHES}")


@pytest.mark.parametrize(
    ("condition", "more"),
    [
        ("s = Shape(x) i = Constant <value = int64 {0}>() l = Gather(s, i) one = Constant <value = int64 {1}>() b = Equal(l, one)", ""),
        ("s = Shape(x) i = Constant <value = int64 {0}>() l = Gather(s, i) big = Constant <value = int64 {17}>() g = Less(l, big) b = Identity(g)", ""),
        ("b = Identity(xflag)", ", bool xflag"),
        ("rate = Constant <value = int64 {16000}>() e = Equal(xnumber, rate) b = Not(e)", ", int64 xnumber"),
        ("m = ReduceMax <keepdims = 0>(x) limit = Constant <value = float {100.0}>() b = Less(m, limit)", ""),
        ("m = ReduceMax <keepdims = 0>(x) limit = Constant <value = float {0.0001}>() g = Less(m, limit) b = Not(g)", ""),
    ],
)  # fmt: skip  # a table
def test_branches_are_reached_where_an_input_can(condition: str, more: str) -> None:
    folded = fold(cpd.load(branched(condition, more)))
    assert proof_inputs(folded, open_model(folded.model, optimise=False)).unreached == ()


def test_a_branch_that_nothing_reaches_makes_the_verdict_inconclusive() -> None:
    condition = "m = ReduceMax <keepdims = 0>(x) a = Sin(m) big = Constant <value = float {2.0}>() b = Less(a, big)"
    with pytest.raises(cpd.InconclusiveError, match=r"no input reached the else branch of If 'y'; give inputs that do"):
        cpd.run("comb, score, allocate{channels=0.5}, prune, verify", branched(condition))


def test_a_branch_that_nothing_reaches_is_named_where_nothing_was_pruned_in_it() -> None:
    condition = (
        "m = ReduceMax <keepdims = 0>(x) a = Sin(m) small = Constant <value = float {-2.0}>() b = Less(a, small)"
    )
    state = cpd.run("comb, score, allocate{channels=0.5}, prune, verify", branched(condition))
    assert state.verification is not None
    assert state.verification.passed
    assert any("then branch of If 'y'" in note for note in state.verification.notes)


def test_loops_run_without_an_iteration_and_with_several() -> None:
    text = """
    (float[n, 6] x, int64 xcount, float[6, 8] k, float[8, 4] v) => (float[n, 4] y) {
        c = MatMul(x, k)
        yes = Constant <value = bool {1}>()
        l = Loop(xcount, yes, c) <body = body (int64 i, bool go, float[n, 8] a) => (bool on, float[n, 8] r) { on = Identity(go) r = Relu(a) }>
        y = MatMul(l, v)
    }"""
    folded = fold(cpd.load(from_text(text)))
    found = proof_inputs(folded, open_model(folded.model, optimise=False))
    assert found.unreached == ()
    assert {int(feed["xcount"]) for feed in found.feeds} >= {0, 3}


def test_masks_along_the_batch_are_those_of_its_size() -> None:
    """Channels are one axis with the batch in front of a normalisation: the masked original is made for each size."""
    model = from_text(PRUNED["channels merged with the batch"])
    state = cpd.run("comb, score, allocate{channels=0.5}, prune, verify", model)
    assert state.verification is not None
    assert state.verification.passed
    combed = comb(cpd.load(model))
    assert state.allocation is not None
    found = at_sizes(combed, state.allocation.keep_mask(combed), {"n": 3, "h": 5, "w": 7})
    assert found is not None
    sizes = [found[1].count(axis) for axis in found[0].tensors[("", "g")].axes or []]
    assert sizes == [3 * 4, 35]
    assert np.prod(sizes) == 420


def test_symbols_in_products_are_bound_to_different_numbers() -> None:
    proto = from_text("(float[n, 3, h, w] x) => (float[] y) { y = Relu(x) }")
    for axis, name in ((2, "2*h"), (3, "2*w")):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    values = fold(cpd.load(proto)).scope.values
    assert len(set(values["x"].shape or ())) == 4
    assert list(map(str, values["y"].sizes or ())) == ["n", "3", "2*h", "2*w"]


@pytest.mark.parametrize("opset", [13, 17])
def test_a_split_without_sizes_has_as_many_equal_parts_as_outputs(opset: int) -> None:
    model = from_text(
        "(float[N, 12] x, float[12, 16] w, float[16, 5] v, int64[1] m) => (float[N, 5] y) "
        "{ s = Shape(x) n, k = Split(s) t = Concat <axis = 0>(n, m) h = MatMul(x, w) r = Reshape(h, t) y = MatMul(r, v) }",
        opset=opset, values={"m": [-1]},
    )  # fmt: skip  # text, then numbers
    assert comb(fold(cpd.load(model))).prunable_fraction() == 1.0
    assert mask_oracle(model).passed
