"""Weights that the graph computes from other weights are evaluated, and pruned like stored ones."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import ModelProto

import cpd_onnx as cpd
from cpd_onnx.channels.combing import comb
from cpd_onnx.passes.prune import apply
from cpd_onnx.testing import mask_oracle, permutation_oracle, widen_oracle
from tests.support.models import from_text

NORM = "n = ReduceL2 <axes = [1], keepdims = 1>(w) d = Div(w, n) f = Mul(d, g)"
SIGMA = "m = MatMul(w, p) s = MatMul(q, m) f = Div(w, s)"
STANDARD = "e = ReduceMean <axes = [1]>(w) c = Sub(w, e) k = Mul(c, c) l = ReduceMean <axes = [1]>(k) r = Sqrt(l) f = Div(c, r)"
DENSE = "(float[2, 6] x, float[12, 6] w, float[12, 1] g, float[6] p, float[12] q, float[5, 12] v"
NET = "h = Gemm <transB = 1>(x, f) a = Relu(h) y = Gemm <transB = 1>(a, v)"
BUFFER = "(float[2, 6] x, float[132] buffer, int64[2] sizes, int64[2] one, int64[2] two"
CUT = (
    "c, d = Split(buffer, sizes) w = Reshape(c, one) v = Reshape(d, two) h = MatMul(x, w) a = Relu(h) y = MatMul(a, v)"
)
PARTS = {"sizes": [72, 60], "one": [6, 12], "two": [12, 5]}
SLICED = (
    "c = Slice(buffer, zero, edge) d = Slice(buffer, edge, end) w = Reshape(c, one) v = Reshape(d, two) "
    "h = MatMul(x, w) a = Relu(h) y = MatMul(a, v)"
)
STACK = "(float[2, 6] x, float[3, 6, 6] stack, int64 zero, int64 one, int64 two"
LAYERS = (
    "u = Gather(stack, zero) v = Gather(stack, one) w = Gather(stack, two) "
    "h = MatMul(x, u) a = Relu(h) i = MatMul(a, v) b = Relu(i) y = MatMul(b, w)"
)


def norm(arithmetic: str, **options: int) -> ModelProto:
    return from_text(f"{DENSE}) => (float[2, 5] y) {{ {arithmetic} {NET} }}", **options)


def layers(body: str, more: str = "") -> ModelProto:
    values = PARTS | {"zero": 0, "edge": 72, "end": 200}
    return from_text(f"{BUFFER}{more}) => (float[2, 5] y) {{ {body} }}", values=values)


def stacked() -> ModelProto:
    return from_text(f"{STACK}) => (float[2, 6] y) {{ {LAYERS} }}", values={"zero": 0, "one": 1, "two": 2})


def float_names(model: ModelProto) -> list[str]:
    return [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]


@pytest.mark.parametrize("arithmetic", [NORM, SIGMA, STANDARD], ids=["weight norm", "spectral norm", "standardised"])
@pytest.mark.parametrize("ir", [3, 8])
def test_channels_are_those_that_activations_run_through(arithmetic: str, ir: int) -> None:
    model = norm(arithmetic, ir=ir)
    if ir == 3:
        for tensor in model.graph.initializer:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    combed = comb(model)
    assert [(len(g), sorted(m.weight.name for m in combed.members(g))) for g in combed.groups] == [(12, ["f", "v"])]
    for oracle in (mask_oracle, permutation_oracle, widen_oracle):
        outcome = oracle(model)
        assert outcome.passed
        assert outcome.groups == 1


@pytest.mark.parametrize("arithmetic", [NORM, SIGMA, STANDARD], ids=["weight norm", "spectral norm", "standardised"])
def test_what_is_kept_is_what_it_was(arithmetic: str) -> None:
    state = cpd.run("comb, score, allocate{channels=0.5}, prune, verify", norm(arithmetic))
    assert state.verification is not None
    assert state.verification.passed
    small = state.model.complete_proto()
    assert [node.op_type for node in small.graph.node] == ["Gemm", "Relu", "Gemm"]
    assert "f" in float_names(small)
    assert "w" not in float_names(small)
    assert {edit.what for edit in state.edits} >= {"evaluated", "gone", "weight"}
    whole = onnx.ModelProto()
    whole.CopyFrom(norm(arithmetic))
    whole.graph.output.append(onnx.helper.make_tensor_value_info("f", onnx.TensorProto.FLOAT, [12, 6]))
    _, weight = onnx.reference.ReferenceEvaluator(whole).run(None, {"x": np.ones((2, 6), np.float32)})
    stays = sorted(set(range(12)) - set(state.allocation.removed[0]))
    np.testing.assert_allclose(state.model.array("f"), weight[stays], rtol=1e-5)


def test_a_plan_gives_the_same_bytes_again() -> None:
    state = cpd.run("comb, score, allocate{channels=0.5}, prune", norm(SIGMA))
    assert state.plan.content["source"]["evaluated"] == {"f": ["p", "q", "w"]}
    again = apply(norm(SIGMA), state.plan)
    assert again.model.serialize() == state.model.serialize()


def test_rounds_list_what_was_evaluated() -> None:
    state = cpd.run("iterate{channels=0.5, rounds=2, repair=False, score='l2'}", norm(SIGMA))
    assert {edit.where for edit in state.edits if edit.what == "evaluated"} == {"f"}
    assert apply(norm(SIGMA), state.plan).model.serialize() == state.model.serialize()


@pytest.mark.parametrize("body", [CUT, SLICED], ids=["split", "sliced"])
def test_a_buffer_shrinks_part_by_part(body: str) -> None:
    model = layers(body, ", int64[1] zero, int64[1] edge, int64[1] end" if body == SLICED else "")
    state = cpd.run("comb, score, allocate{channels=0.5}, prune, verify", model)
    assert sorted(float_names(state.model.proto)) == ["v", "w"]
    assert [node.op_type for node in state.model.graph.node] == ["MatMul", "Relu", "MatMul"]
    assert state.model.array("w").shape == (6, 6)
    assert sorted(state.plan.content["removed"]) == ["v", "w"]
    assert state.allocation.before.params == 132
    assert state.allocation.after.params == 66
    assert permutation_oracle(model).passed


def test_a_buffer_in_a_constant_node() -> None:
    model = layers(CUT)
    buffer = next(t for t in model.graph.initializer if t.name == "buffer")
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["buffer"], value=buffer))
    model.graph.initializer.remove(buffer)
    state = cpd.run("comb, score, allocate{channels=0.5}, prune, verify", model)
    assert [node.op_type for node in state.model.graph.node] == ["MatMul", "Relu", "MatMul"]
    assert len(state.model.serialize()) < 0.8 * model.ByteSize()


def test_layers_in_one_stack_are_pruned_each_for_itself() -> None:
    combed = comb(stacked())
    assert [len(group) for group in combed.groups] == [6, 6]
    assert mask_oracle(stacked()).passed


def test_arithmetic_inside_a_branch() -> None:
    body = f"then_branch = t () => (float[2, 5] p1) {{ {NORM} h = Gemm <transB = 1>(x, f) a = Relu(h) p1 = Gemm <transB = 1>(a, v) }}"
    other = "else_branch = e () => (float[2, 5] p2) { i = Gemm <transB = 1>(x, w2) b = Relu(i) p2 = Gemm <transB = 1>(b, v) }"
    model = from_text(f"{DENSE}, float[12, 6] w2, bool c) => (float[2, 5] y) {{ y = If(c) <{body}, {other}> }}")
    state = cpd.run("comb, score, allocate{channels=0.5}, prune, verify", model)
    assert state.verification.passed
    assert [t.name for t in state.model.graph.node[0].attribute[0].g.initializer] == ["f"]
    assert "w" not in float_names(state.model.proto)


def test_branches_that_give_one_name_to_different_weights() -> None:
    branches = [
        f"{key} = {key}_ () => (float[2, 5] p) "
        f"{{ n = ReduceL2 <axes = [1], keepdims = 1>({w}) f = Div({w}, n) h = Gemm <transB = 1>(x, f) a = Relu(h) "
        f"p = Gemm <transB = 1>(a, v) }}"
        for key, w in (("then_branch", "w"), ("else_branch", "u"))
    ]
    head = "(float[2, 6] x, float[12, 6] w, float[12, 6] u, float[5, 12] v, bool c"
    model = from_text(f"{head}) => (float[2, 5] y) {{ y = If(c) <{', '.join(branches)}> }}", values={"c": True})
    small = cpd.run("comb, score, allocate{channels=0.5}, prune, verify", model).model
    stored = [onnx.numpy_helper.to_array(a.g.initializer[0]) for a in small.graph.node[0].attribute]
    assert [array.shape for array in stored] == [(6, 6), (6, 6)]
    assert not np.array_equal(*stored)


@pytest.mark.parametrize(
    "graph",
    [
        f"{DENSE}) => (float[2, 5] y) {{ c = Identity(w) t = Transpose(c) h = MatMul(x, t) a = Relu(h) y = Gemm <transB = 1>(a, v) }}",
        "(float[2, 6] x, int8[6, 12] w, float[12] s, float[12, 5] v) => (float[2, 5] y) "
        "{ f = DequantizeLinear(w, s) h = MatMul(x, f) a = Relu(h) y = MatMul(a, v) }",
        "(float[2, 6] x, int8[6, 12] w, float[12] s, float[12, 5] v) => (float[2, 5] y) "
        "{ c = Cast <to = 1>(w) f = Mul(c, s) h = MatMul(x, f) a = Relu(h) y = MatMul(a, v) }",
    ],
    ids=["moved", "quantised", "quantised by hand"],
)
def test_what_is_stored_otherwise_stays_so(graph: str) -> None:
    combed = comb(from_text(graph))
    assert combed.folded.evaluated is None
    assert "w" in {member.weight.name for group in combed.groups for member in combed.members(group)}
    assert mask_oracle(from_text(graph)).passed


def test_gates_in_another_order_stay_where_they_are_stored() -> None:
    """Exporters reorder them, in each branch of an If where the network is written twice."""
    order = "i, o, c = Split <axis = 0>(w, sizes) s = Concat <axis = 0>(o, i, c) u = Unsqueeze(s, zero) q, h = GRU <hidden_size = 4>(x, u, r)"
    branches = [
        f"{key} = {key}_ () => (float[1, 2, 4] g) {{ {order} g = Identity(h) }}"
        for key in ("then_branch", "else_branch")
    ]
    head = "(float[3, 2, 6] x0, float[6, 6] k, float[12, 6] w, float[1, 12, 4] r, float[4, 5] v, int64[3] sizes, int64[1] zero, bool c"
    text = f"{head}) => (float[1, 2, 5] y) {{ x = MatMul(x0, k) a = If(c) <{', '.join(branches)}> y = MatMul(a, v) }}"
    combed = comb(from_text(text, values={"sizes": [4, 4, 4], "zero": 0, "c": True}))
    assert combed.folded.evaluated is None
    assert combed.prunable_fraction() == 1.0


def test_factors_of_a_product_have_no_channels_between_them() -> None:
    graph = (
        "(float[2, 60] x, float[60, 2] w, float[2, 60] u, float[60, 5] v) => (float[2, 5] y) "
        "{ f = MatMul(w, u) h = MatMul(x, f) a = Relu(h) y = MatMul(a, v) }"
    )
    combed = comb(from_text(graph))
    assert combed.folded.evaluated is None
    assert [sorted(m.weight.name for m in combed.members(g)) for g in combed.groups] == [["u", "v"]]
    assert any("no activation runs" in reason for frozen in combed.frozen() for reason in frozen.reasons)


def test_a_weight_that_is_used_as_it_is_too_stays() -> None:
    text = f"{DENSE}) => (float[2, 5] y) {{ {NORM} h = Gemm <transB = 1>(x, f) i = Gemm <transB = 1>(x, w) a = Add(h, i) y = Gemm <transB = 1>(a, v) }}"
    state = cpd.run("comb, score, allocate{channels=0.5}, prune, verify", from_text(text))
    assert state.verification.passed
    assert "g" not in float_names(state.model.proto)
    assert state.model.array("w").shape == state.model.array("f").shape == (6, 6)


def test_what_is_handed_out_is_not_evaluated() -> None:
    text = f"{DENSE}) => (float[2, 5] y, float[12, 6] f) {{ {NORM} {NET} }}"
    assert comb(from_text(text)).folded.evaluated is None


def test_random_weights_are_not_evaluated() -> None:
    text = f"{DENSE}) => (float[2, 5] y) {{ n = RandomNormalLike(w) f = Add(w, n) {NET} }}"
    assert comb(from_text(text)).folded.evaluated is None


def test_a_result_that_would_be_huge_is_not_computed() -> None:
    text = (
        "(float[2, 9] x, float[9, 9] w, int64[4] n) => (float[9, 9, 2, 9] y) "
        "{ r = Expand(w, n) s = Neg(r) m = ReduceMax <axes = [0, 1], keepdims = 0>(s) k = Add(w, m) y = Add(k, x) }"
    )
    model = from_text(text, values={"n": [1 << 14, 1 << 14, 9, 9]})
    assert comb(model).folded.evaluated is None
