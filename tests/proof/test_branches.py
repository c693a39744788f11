"""Branches of an If in the proof: what each output depends on, and that each branch shows an error."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import cpd_onnx as cpd
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.allocation import Budget, allocate
from cpd_onnx.channels.combing import comb
from cpd_onnx.passes.prune import prune
from cpd_onnx.proof.comparison import INCONCLUSIVE, VERIFIED, WRONG, Comparison
from cpd_onnx.proof.observing import compared_tensors
from cpd_onnx.proof.proving import verify
from cpd_onnx.scores.registry import score
from tests.proof.test_verdicts import proof
from tests.support.models import from_text

DECODER = """
(float[n, 6] x, float[m, 6] xcache, bool xflag, float[6, 8] k, float[8, 4] v, float[6, 5] w) => (float[n, 4] y, float[p, 5] cache) {
    y, cache = If (xflag) <
        then_branch = with () => (y1, c1) { a1 = MatMul(x, k) r1 = Relu(a1) y1 = MatMul(r1, v) c1 = Constant <value = float[0, 5] {}>() },
        else_branch = without () => (y2, c2) { c2 = MatMul(xcache, w) a2 = MatMul(x, k) r2 = Tanh(a2) y2 = MatMul(r2, v) }>
}"""
"""A decoder with and without a cache: one output is not behind a removed channel, and empty in one branch."""


def pruned(model: onnx.ModelProto) -> tuple[cpd.Combed, KeepMask, cpd.Model]:
    combed = comb(cpd.load(model))
    chosen = allocate(combed, score(combed, "l2"), Budget("channels", 0.5))
    return combed, chosen.keep_mask(combed), prune(combed, chosen).model


def test_an_output_of_a_branch_is_affected_by_what_it_is_computed_from() -> None:
    combed, keep, _ = pruned(from_text(DECODER))
    found = {one.name: one.is_affected for one in compared_tensors(combed, keep)}
    assert (found["y"], found["cache"]) == (True, False)


def test_both_branches_are_proved_and_named() -> None:
    found = proof(from_text(DECODER))
    assert found.verdict == VERIFIED
    assert "the then branch of If 'y' and the else branch of If 'y' were each compared" in found.notes


def test_a_condition_that_depends_on_removed_channels_affects_all_outputs() -> None:
    text = (
        "(float[n, 6] x, float[6, 8] k, float[8, 4] v) => (float[n, 4] y, float[n, 6] z) {"
        " a = MatMul(x, k) r = Relu(a) b = MatMul(r, v) s = ReduceSum <keepdims = 0> (b) o = Sub(s, s) c = Less(s, o)"
        " y, z = If (c) <then_branch = one () => (y1, z1) { y1 = Identity(b) z1 = Identity(x) },"
        " else_branch = two () => (y2, z2) { y2 = Neg(b) z2 = Neg(x) }> }"
    )
    combed, keep, _ = pruned(from_text(text))
    assert {one.name for one in compared_tensors(combed, keep) if one.is_affected} >= {"y", "z"}


@pytest.mark.parametrize("branch", ["then_branch", "else_branch"])
def test_an_error_in_one_branch_is_wrong(branch: str) -> None:
    """The weights are in the branches, so that one of them can be changed."""
    text = (
        "(float[n, 6] x, bool xflag) => (float[n, 4] y) { y = If (xflag) <"
        "then_branch = one () => (y1) <float[6, 8] k1, float[8, 4] v1> { a1 = MatMul(x, k1) r1 = Relu(a1) y1 = MatMul(r1, v1) },"
        "else_branch = two () => (y2) <float[6, 8] k2, float[8, 4] v2> { a2 = MatMul(x, k2) r2 = Relu(a2) y2 = MatMul(r2, v2) }> }"
    )
    model, rng = from_text(text), np.random.default_rng(0)
    for attribute in model.graph.node[-1].attribute:
        for info in attribute.g.value_info:
            shape = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
            attribute.g.initializer.append(numpy_helper.from_array(rng.standard_normal(shape, np.float32), info.name))
        del attribute.g.value_info[:]
    combed, keep, small = pruned(model)
    assert verify(combed, keep, small).verdict == VERIFIED
    body = next(a.g for a in small.graph.node[-1].attribute if a.name == branch)
    body.initializer[1].CopyFrom(
        numpy_helper.from_array(1.1 * numpy_helper.to_array(body.initializer[1]), body.initializer[1].name)
    )
    assert verify(combed, keep, small).verdict == WRONG


def test_a_branch_in_which_nothing_responds_is_inconclusive() -> None:
    """One branch rectifies negative numbers only, so that channels removed there change nothing."""
    text = (
        "(float[n, 6] x, bool xflag, float[6, 8] k, float[8, 4] v) => (float[n, 4] y) { y = If (xflag) <"
        "then_branch = one () => (y1) { a1 = MatMul(x, k) r1 = Relu(a1) y1 = MatMul(r1, v) },"
        "else_branch = two () => (y2) { a2 = MatMul(x, k) b2 = Abs(a2) n2 = Neg(b2) r2 = Relu(n2) y2 = MatMul(r2, v) }> }"
    )
    found: Comparison = proof(from_text(text))
    assert found.verdict == INCONCLUSIVE
    assert "masking the channels removed in the else branch of If 'y' does not change the outputs" in "; ".join(
        found.notes
    )


def test_inputs_that_reach_a_branch_show_something_where_others_than_zeros_do() -> None:
    """The second branch runs where no number is above zero, as for zeros, which show nothing."""
    text = (
        "(float[2, 4] x, float[4, 6] w, float[6, 6] u, float[6, 3] v) => (float[2, 3] y) {"
        " h = MatMul(x, w) s = ReduceMax <keepdims = 0> (h) zero = Constant <value_float = 0.0> () q = Greater(s, zero)"
        " a = If (q) <then_branch = t () => (p) { p = MatMul(h, u) }, "
        "else_branch = e () => (r) { k = Constant <value = float[6] {1, 2, 3, 4, 5, 6}> () r = Mul(h, k) }>"
        " y = MatMul(a, v) }"
    )
    found = proof(from_text(text))
    assert found.verdict == VERIFIED
    assert "the then branch of If 'a' and the else branch of If 'a' were each compared" in found.notes


RETURNED = """(float[{batch}, 6] x, bool xflag, float[6, 8] k, float[8, 4] v) => (float[p, 4] y) {{
    h = If (xflag) <then_branch = with () => (h1) {{ h1 = Constant <value = float[{rows}, 8] {{{values}}}>() }},
        else_branch = without () => (h2) {{ a2 = MatMul(x, k) h2 = Relu(a2) }}>
    y = MatMul(h, v)
}}"""
"""A branch that returns a constant where the other computes channels."""


@pytest.mark.parametrize(
    ("batch", "rows", "value", "groups"), [("n", 0, "", 1), ("2", 2, "0", 1), ("2", 2, "1", 0)], ids=["empty", "0", "1"]
)
def test_a_constant_that_a_branch_returns_loses_channels_if_it_is_zero(
    batch: str, rows: int, value: str, groups: int
) -> None:
    values = ", ".join([value] * 8 * rows)
    model = from_text(RETURNED.format(batch=batch, rows=rows, values=values))
    assert len(comb(cpd.load(model)).groups) == groups
    if groups:
        combed, keep, small = pruned(model)
        (branch,) = (a.g for node in small.graph.node for a in node.attribute if a.name == "then_branch")
        assert list(branch.node[0].attribute[0].t.dims) == [rows, 4]
        assert verify(combed, keep, small).verdict == VERIFIED
