"""Sequences of tensors where they meet bodies, functions, open sizes and declared types."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

import cpd_onnx as cpd
from cpd_onnx.channels.combing import comb
from cpd_onnx.proof.comparison import VERIFIED
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.testing import mask_oracle, permutation_oracle
from tests.rules.test_rules import signature
from tests.support.models import from_text

IN = "(float[2, 4, 6] x, float[6, 12] w, float[12, 5] v"
OUT = "=> (float[2, 4, 5] y)"
SPLIT = "h = MatMul(x, w) s = SplitToSequence <axis = -1>(h, n)"
GROWS = (
    "<body = b (int64 k, bool g, seq(float[2, 4, 12]) before) => (bool g, seq(float[2, 4, 12]) after) "
    "{ after = SequenceInsert(before, h) }>"
)
TABLE = {
    "the length depends on the inputs": (
        "(float[2, T, 6] x, float[6, 12] w, float[12, 5] v, int64 i) => (float[2, 5] y) "
        "{ h = MatMul(x, w) s = SplitToSequence <axis = 1, keepdims = 0>(h) a = SequenceAt(s, i) "
        "y = MatMul(a, v) }",
        [], "the elements that SplitToSequence 's' makes are not known",
    ),
    "another axis is open": (
        f"(float[N, 4, 6] x, float[6, 12] w, float[12, 5] v, int64[2] n) => (float[N, 4, 5] y) "
        f"{{ {SPLIT} a = ConcatFromSequence <axis = 2>(s) y = MatMul(a, v) }}",
        ["4: v.0 w.1", "8: v.0 w.1"], "",
    ),
    "the position is computed": (
        f"{IN}, int64[2] n, int64 xi) => (float[2, 4, N] y) {{ {SPLIT} y = SequenceAt(s, xi) }}",
        [], "input 1 of SequenceAt 'y' is computed from data",
    ),
    "a body takes an element of an outer sequence": (
        f"{IN.replace('12, 5', '8, 5')}, int64[2] n, int64 i, bool xc) {OUT} "
        f"{{ {SPLIT} a = If (xc) <then_branch = t () => (float[2, 4, 8] p) {{ p = SequenceAt(s, i) }}, "
        f"else_branch = e () => (float[2, 4, 8] q) {{ r = SequenceAt(s, i) q = Neg(r) }}> y = MatMul(a, v) }}",
        ["4: w.1", "8: v.0 w.1"], "",
    ),
    "a loop makes the sequence": (
        f"{IN}, int64 m, bool c, int64 i) {OUT} "
        f"{{ h = MatMul(x, w) e = SequenceEmpty() s = Loop(m, c, e) {GROWS} a = SequenceAt(s, i) y = MatMul(a, v) }}",
        [], "the elements of input 0 of SequenceInsert 'after' are not known",
    ),
    "a function takes and makes a sequence": (
        f"{IN.replace('12, 5', '4, 5')}, float[12, 5] q, int64[2] j) {OUT} "
        f"{{ {SPLIT.replace(', n)', ', j)')} t = local.first(s) a = ConcatFromSequence <axis = 2>(t) b = MatMul(a, v) "
        "c = MatMul(h, q) y = Add(b, c) }"
        ' <domain: "local", opset_import: ["": 13]> first (p) => (q) { q = SequenceErase(p) }',
        ["8: q.0 w.1"], "is an element of a sequence that a function returns",
    ),
}  # fmt: skip  # a table
VALUES = {"n": [8, 4], "j": [4, 8], "i": 0, "m": 2, "c": True}


def model_of(name: str) -> ModelProto:
    text, _, function = TABLE[name][0].partition(" <domain")
    return from_text(text, opset=13, values=VALUES, functions=f"<domain{function}" if function else "")


@pytest.mark.parametrize("name", TABLE)
def test_what_flows(name: str) -> None:
    combed = comb(model_of(name))
    assert combed.unaccounted == []
    assert signature(combed) == TABLE[name][1]
    reasons = {str(reason) for frozen in combed.frozen() for reason in frozen.reasons}
    assert not TABLE[name][2] or any(TABLE[name][2] in reason for reason in reasons), reasons


@pytest.mark.parametrize("name", [name for name in TABLE if TABLE[name][1]])
def test_what_flows_is_proven(name: str) -> None:
    model = model_of(name)
    for outcome in (mask_oracle(model), permutation_oracle(model)):
        assert outcome.passed
        assert outcome.groups > 0


def test_the_declared_type_of_a_sequence_loses_the_shape_that_is_no_longer_true() -> None:
    text = f"{IN}, int64 n) {OUT} {{ {SPLIT} a = ConcatFromSequence <axis = 2>(s) y = MatMul(a, v) }}"
    model = from_text(text, opset=13, values={"n": 6})
    element = helper.make_tensor_type_proto(TensorProto.FLOAT, [2, 4, 6])
    model.graph.value_info.append(helper.make_value_info("s", helper.make_sequence_type_proto(element)))
    state = cpd.run("comb, score{kind='random'}, allocate{channels=0.6}, prune, verify", model)
    proto = state.model.proto
    assert not proto.graph.value_info[0].type.sequence_type.elem_type.tensor_type.HasField("shape")
    onnx.checker.check_model(proto, full_check=True)


def test_a_sequence_of_different_shapes_may_be_an_output() -> None:
    text = (
        f"{IN}, int64[2] n) => (seq(float[2, 4, N]) y) "
        "{ h = MatMul(x, w) a = MatMul(h, v) y = SplitToSequence <axis = -1>(a, n) }"
    )
    model = from_text(text, values={"n": [2, 3]})
    state = cpd.run("comb, score, allocate{macs=0.5}, prune, verify", model)
    assert state.verification is not None
    assert state.verification.verdict == VERIFIED
    assert state.combed is not None
    assert [len(group) for group in state.combed.groups] == [12]


def test_sequences_that_are_split_elsewhere_differ() -> None:
    text = "(float[5, 2] x, int64[2] n) => (seq(float[N, 2]) y) { y = SplitToSequence <axis = 0>(x, n) }"
    feed = {"x": np.arange(1, 11, dtype=np.float32).reshape(5, 2)}
    first, second = (
        execute(open_model(cpd.load(from_text(text, values={"n": sizes}))), feed)[0] for sizes in ([2, 3], [3, 2])
    )
    assert first.shape == second.shape == (2, 3, 2)
    assert (first != second).any()
