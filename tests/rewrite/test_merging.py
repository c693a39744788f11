"""Linear runs as single operators: which there are, what stays of them, and that the outputs are the same."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from cpd_onnx.ir.model import Model, attributes_of, load
from cpd_onnx.rewrite.linear_runs import LinearRun, linear_runs
from cpd_onnx.rewrite.merging import Merged, merge, merge_again, saved_bytes
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.shapes.inference import fold
from cpd_onnx.shapes.values import Folded
from tests.support.models import from_text

ROUNDING = 1e-5
IMAGE, TOKENS = (2, 4, 9, 8), (2, 5, 4)


def always(run: LinearRun, folded: Folded) -> float:
    return 1.0


def difference(model: Model, other: Model, shape: Sequence[int]) -> float:
    """Largest difference of the outputs on random inputs, as a fraction of the largest output."""
    rng = np.random.default_rng(1)
    kinds = {"x": helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)}
    feed = {"x": rng.standard_normal(tuple(shape)).astype(kinds["x"])}
    expected, found = (execute(open_model(each, optimise=False), feed) for each in (model, other))
    assert [each.shape for each in expected] == [each.shape for each in found]
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(expected, found, strict=True))


def checked(proto: ModelProto, shape: Sequence[int], **options: Any) -> Merged:
    """Merge, and check that the result is valid, the same function, and reproducible from its record."""
    model = load(proto)
    before = model.serialize()
    made = merge(model, **options)
    assert model.serialize() == before
    assert made.model.defect() is None
    again = merge_again(model, made.rounds)
    assert again.serialize() == made.model.serialize()
    assert merge(model, **options).model.serialize() == made.model.serialize()
    tolerance = 5e-3 if model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16 else ROUNDING
    assert difference(model, made.model, shape) <= tolerance
    _is_subsequence(model, made)
    return made


def _is_subsequence(model: Model, made: Merged) -> None:
    """Nodes that stay keep name, operator and order, those that go are named, and attributes change only in sizes."""
    places = {_name(node): place for place, node in enumerate(model.graph.node)}
    stay = {node.name for node in made.model.graph.node}
    assert sorted(made.gone) == sorted(name for name in places if name not in stay)
    assert [places[node.name] for node in made.model.graph.node] == sorted(places[name] for name in stay)
    for node in made.model.graph.node:
        old = model.graph.node[places[node.name]]
        assert node.op_type == old.op_type
        before, after = attributes_of(old), attributes_of(node)
        assert {key for key in before | after if before.get(key) != after.get(key)} <= {"kernel_shape", "group"}
    read, was_read = ({name for node in each.graph.node for name in node.input} for each in (made.model, model))
    assert not {tensor.name for tensor in made.model.graph.initializer} & (was_read - read)


def _name(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


def named(graph: str, **options: Any) -> ModelProto:
    """A model from text whose nodes are named after their outputs."""
    proto = from_text(graph, **options)
    for node in proto.graph.node:
        node.name = f"the {node.output[0]}"
    return proto


POINT = "(float[N,4,H,W] x, float[16,4,1,1] w, float[16] b, float[5,16,1,1] v, float[5] c) => (float[N,5,K,L] y) "

MERGED = {
    "two pointwise": (POINT + "{ h = Conv(x, w, b) y = Conv(h, v, c) }", IMAGE, ["the h"]),
    "a constant and no bias to take it": (POINT + "{ h = Conv(x, w, b) y = Conv(h, v) }", IMAGE, ["the h"]),
    "no bias but the second's": (POINT + "{ h = Conv(x, w) y = Conv(h, v, c) }", IMAGE, ["the h"]),
    "three": (POINT + "{ h = Conv(x, w, b) i = Identity(h) j = Neg(i) y = Conv(j, v, c) }", IMAGE, ["the h", "the i", "the j"]),
    "a stride of the first": (POINT + "{ h = Conv<strides=[2,2]>(x, w, b) y = Conv(h, v, c) }", IMAGE, ["the y"]),
    "a stride of the second": (POINT + "{ h = Conv(x, w, b) y = Conv<strides=[2,1]>(h, v, c) }", IMAGE, ["the h"]),
    "padding of the first": (
        "(float[N,4,H,W] x, float[16,4,3,3] w, float[16] b, float[5,16,1,1] v) => (float[N,5,K,L] y) "
        "{ h = Conv<kernel_shape=[3,3],pads=[1,0,2,1],strides=[2,1],dilations=[1,2]>(x, w, b) y = Conv(h, v) }",
        IMAGE, ["the y"],
    ),
    "padding that follows from the sizes": (
        "(float[N,4,H,W] x, float[16,4,3,3] w, float[16] b, float[5,16,1,1] v) => (float[N,5,K,L] y) "
        '{ h = Conv<auto_pad="SAME_LOWER",strides=[2,2]>(x, w, b) y = Conv<auto_pad="SAME_UPPER">(h, v) }',
        IMAGE, ["the y"],
    ),
    "padding of the second, and nothing added before": (
        "(float[N,4,H,W] x, float[16,4,1,1] w, float[5,16,3,3] v, float[5] c) => (float[N,5,K,L] y) "
        "{ h = Conv(x, w) y = Conv<kernel_shape=[3,3],pads=[1,1,1,1],strides=[2,1],dilations=[2,1]>(h, v, c) }",
        IMAGE, ["the h"],
    ),
    "no padding of the second": (
        "(float[N,4,H,W] x, float[16,4,1,1] w, float[16] b, float[5,16,3,3] v) => (float[N,5,K,L] y) "
        "{ h = Conv(x, w, b) y = Conv(h, v) }",
        IMAGE, ["the h"],
    ),
    "kernels that add up": (
        "(float[N,4,H,W] x, float[30,4,3,2] w, float[30] b, float[5,30,2,3] v) => (float[N,5,K,L] y) "
        "{ h = Conv<kernel_shape=[3,2],pads=[1,1,0,2],strides=[1,2]>(x, w, b) y = Conv<kernel_shape=[2,3]>(h, v) }",
        IMAGE, ["the y"],
    ),
    "a normalisation": (
        "(float[N,4,H,W] x, float[16,4,1,1] w, float[16] s, float[16] t, float[16] m, float[16] u, float[5,16,1,1] v) "
        "=> (float[N,5,K,L] y) { h = Conv(x, w) n = BatchNormalization(h, s, t, m, u) y = Conv(n, v) }",
        IMAGE, ["the h", "the n"],
    ),
    "sums and products": (
        "(float[N,4,H,W] x, float[16,4,1,1] w, float[1,16,1,1] s, float[1] t, float[16,1,1] m, float[5,16,1,1] v) => "
        "(float[N,5,K,L] y) { h = Conv(x, w) a = Mul(s, h) b = Sub(t, a) c = Div(b, m) d = Add(c, s) y = Conv(d, v) }",
        IMAGE, ["the h", "the a", "the b", "the c", "the d"],
    ),
    "depthwise and pointwise, to few channels": (
        "(float[N,4,H,W] x, float[16,1,3,3] w, float[16] b, float[2,16,1,1] v, float[2] c) => (float[N,2,K,L] y) "
        "{ h = Conv<group=4,kernel_shape=[3,3],pads=[1,1,1,1]>(x, w, b) y = Conv(h, v, c) }",
        IMAGE, ["the y"],
    ),
    "groups that divide each other": (
        "(float[N,4,H,W] x, float[16,1,1,1] w, float[4,8,3,3] v, float[4] c) => (float[N,4,K,L] y) "
        "{ h = Conv<group=4>(x, w) y = Conv<group=2,kernel_shape=[3,3],pads=[1,1,1,1]>(h, v, c) }",
        IMAGE, ["the h"],
    ),
    "a transposed convolution after": (
        "(float[N,4,H,W] x, float[16,4,1,1] w, float[16,5,3,2] v, float[5] c) => (float[N,5,K,L] y) "
        "{ h = Conv(x, w) y = ConvTranspose<strides=[2,2],pads=[1,0,0,1],output_padding=[1,0]>(h, v, c) }",
        IMAGE, ["the h"],
    ),
    "a transposed convolution before": (
        "(float[N,4,H,W] x, float[4,8,3,2] w, float[16] b, float[5,16,1,1] v, float[5] c) => (float[N,5,K,L] y) "
        "{ h = ConvTranspose<group=2,strides=[3,2],pads=[1,0,0,1]>(x, w, b) y = Conv(h, v, c) }",
        IMAGE, ["the y"],
    ),
    "matrix products": (
        "(float[N,T,4] x, float[4,16] w, float[16,5] v) => (float[N,T,5] y) { h = MatMul(x, w) y = MatMul(h, v) }",
        TOKENS, ["the h"],
    ),
    "a sum after takes the constant": (
        "(float[N,T,4] x, float[4,16] w, float[16] b, float[16,5] v, float[1,1,5] c) => (float[N,T,5] y) "
        "{ h = MatMul(x, w) i = Add(b, h) j = MatMul(i, v) y = Add(c, j) }",
        TOKENS, ["the h", "the i"],
    ),
    "a sum between takes the constant": (
        "(float[N,T,4] x, float[4,16] w, float[1,16] b, float[16] s, float[16,5] v) => (float[N,T,5] y) "
        "{ h = MatMul(x, w) i = Add(h, b) j = Mul(i, s) y = MatMul(j, v) }",
        TOKENS, ["the j", "the y"],
    ),
    "weights that the graph transposes": (
        "(float[N,T,4] x, float[16,4] w, float[5,16] v) => (float[N,T,5] y) "
        "{ a = Transpose(w) b = Transpose<perm=[1,0]>(v) h = MatMul(x, a) y = MatMul(h, b) }",
        TOKENS, ["the a", "the b", "the h"],
    ),
    "a sum after adds to places, not to channels": (
        "(float[N,5,4] x, float[4,16] w, float[16] b, float[16,5] v, float[5,1] c) => (float[N,5,5] y) "
        "{ h = MatMul(x, w) i = Add(b, h) j = MatMul(i, v) y = Add(c, j) }",
        TOKENS, ["the j"],
    ),
    "a sum after has other numbers at each place": (
        "(float[N,5,4] x, float[4,16] w, float[16] b, float[16,5] v, float[5,5] c) => (float[N,5,5] y) "
        "{ h = MatMul(x, w) i = Add(b, h) j = MatMul(i, v) y = Add(c, j) }",
        TOKENS, ["the j"],
    ),
    "a sum after adds one number": (
        "(float[N,T,4] x, float[4,16] w, float[16] b, float[16,5] v, float[1] c) => (float[N,T,5] y) "
        "{ h = MatMul(x, w) i = Add(b, h) j = MatMul(i, v) y = Add(c, j) }",
        TOKENS, ["the h", "the i"],
    ),
    "a sum between has the second operator's bias as well": (
        "(float[N,4] x, float[4,16] w, float[16] b, float[16,5] v, float[5] c) => (float[N,5] y) "
        "{ h = MatMul(x, w) i = Add(h, b) y = Gemm(i, v, c) }",
        (3, 4), ["the h", "the i"],
    ),
    "transposed in the operator": (
        "(float[4,N] x, float[16,4] w, float[16] b, float[5,16] v, float[1,5] c) => (float[N,5] y) "
        "{ h = Gemm<transA=1,transB=1>(x, w, b) y = Gemm<transB=1>(h, v, c) }",
        (4, 7), ["the y"],
    ),
    "one with a bias, one without": (
        "(float[N,4] x, float[4,16] w, float[16] b, float[16,5] v) => (float[N,5] y) "
        "{ h = Gemm(x, w, b) y = MatMul(h, v) }",
        (3, 4), ["the y"],
    ),
    "one spatial axis": (
        "(float[N,4,W] x, float[16,4,3] w, float[16] b, float[5,16,1] v) => (float[N,5,K] y) "
        "{ h = Conv<pads=[1,1]>(x, w, b) y = Conv(h, v) }",
        (2, 4, 9), ["the y"],
    ),
    "half precision": (
        "(float16[N,4,H,W] x, float16[16,4,1,1] w, float16[16] b, float16[5,16,1,1] v) => (float16[N,5,K,L] y) "
        "{ h = Conv(x, w, b) y = Conv(h, v) }",
        IMAGE, ["the h"],
    ),
    "double precision": (
        "(double[N,T,4] x, double[4,16] w, double[16,5] v) => (double[N,T,5] y) { h = MatMul(x, w) y = MatMul(h, v) }",
        TOKENS, ["the h"],
    ),
}  # fmt: skip  # a table


@pytest.mark.parametrize("name", MERGED)
def test_a_linear_run_becomes_one_operator(name: str) -> None:
    graph, shape, gone = MERGED[name]
    made = checked(named(graph), shape)
    assert sorted(made.gone) == sorted(gone)
    assert made.after.macs < made.before.macs


LEFT = {
    "padding beside a constant": (
        "(float[N,4,H,W] x, float[16,4,1,1] w, float[16] b, float[5,16,3,3] v) => (float[N,5,K,L] y) "
        "{ h = Conv(x, w, b) y = Conv<kernel_shape=[3,3],pads=[0,0,0,1]>(h, v) }",
        IMAGE, "what is added between the operators would meet zeros beside the data",
    ),
    "padding between kernels": (
        "(float[N,4,H,W] x, float[40,4,2,2] w, float[5,40,2,2] v) => (float[N,5,K,L] y) "
        "{ h = Conv(x, w) y = Conv<pads=[1,0,0,0]>(h, v) }",
        IMAGE, "neither operator can have the strides, pads and order of axes of both",
    ),
    "padding that follows from the sizes, between kernels": (
        "(float[N,4,H,W] x, float[40,4,2,2] w, float[5,40,2,2] v) => (float[N,5,K,L] y) "
        '{ h = Conv(x, w) y = Conv<auto_pad="SAME_UPPER">(h, v) }',
        IMAGE, "neither operator can have the strides, pads and order of axes of both",
    ),
    "padding that follows from the sizes, of a point that would grow": (
        "(float[N,4,H,W] x, float[40,4,1,1] w, float[40] b, float[5,40,2,2] v) => (float[N,5,K,L] y) "
        '{ h = Conv<auto_pad="SAME_UPPER",strides=[2,2]>(x, w, b) y = Conv(h, v) }',
        IMAGE, "neither operator can have the strides, pads and order of axes of both",
    ),
    "two strides": (
        POINT + "{ h = Conv<strides=[2,2]>(x, w, b) y = Conv<strides=[2,2]>(h, v, c) }",
        IMAGE, "neither operator can have the strides, pads and order of axes of both",
    ),
    "a point with a stride, and a kernel": (
        "(float[N,4,H,W] x, float[16,4,1,1] w, float[5,16,3,3] v) => (float[N,5,K,L] y) "
        "{ h = Conv<strides=[2,2]>(x, w) y = Conv<kernel_shape=[3,3],pads=[1,1,1,1]>(h, v) }",
        IMAGE, "neither operator can have the strides, pads and order of axes of both",
    ),
    "a point with padding": (
        POINT + "{ h = Conv<pads=[1,1,1,1],strides=[2,2]>(x, w, b) y = Conv<pads=[1,1,1,1]>(h, v, c) }",
        IMAGE, "neither operator can have the strides, pads and order of axes of both",
    ),
    "a constant before a transposed convolution": (
        "(float[N,4,H,W] x, float[16,4,1,1] w, float[16] b, float[16,5,2,2] v) => (float[N,5,K,L] y) "
        "{ h = Conv(x, w, b) y = ConvTranspose<strides=[2,2]>(h, v) }",
        IMAGE, "what is added between the operators would meet zeros beside the data",
    ),
    "two transposed convolutions": (
        "(float[N,4,H,W] x, float[4,16,2,2] w, float[16,5,2,2] v) => (float[N,5,K,L] y) "
        "{ h = ConvTranspose(x, w) y = ConvTranspose(h, v) }",
        IMAGE, "neither operator can have the strides, pads and order of axes of both",
    ),
    "a kernel after a transposed convolution": (
        "(float[N,4,H,W] x, float[4,16,2,2] w, float[5,16,2,2] v) => (float[N,5,K,L] y) "
        "{ h = ConvTranspose(x, w) y = Conv(h, v) }",
        IMAGE, "neither operator can have the strides, pads and order of axes of both",
    ),
    "an order of axes between": (
        "(float[4,4] x, float[4,4] w, float[4,3] v) => (float[4,3] y) "
        "{ h = Gemm<transA=1>(x, w) y = Gemm<transA=1>(h, v) }",
        (4, 4), "neither operator can have the strides, pads and order of axes of both",
    ),
    "a constant that nothing takes": (
        "(float[N,T,4] x, float[4,16] w, float[16] b, float[16] s, float[16,5] v) => (float[N,T,5] y) "
        "{ h = MatMul(x, w) i = Sub(h, b) y = MatMul(i, v) }",
        TOKENS, "what is added between the operators has no place",
    ),
    "more work as one": (
        "(float[N,4,H,W] x, float[2,4,1,1] w, float[4,2,1,1] v) => (float[N,4,K,L] y) { h = Conv(x, w) y = Conv(h, v) }",
        IMAGE, "one operator would not cost less",
    ),
    "more work as one, depthwise": (
        "(float[N,4,H,W] x, float[4,1,3,3] w, float[16,4,1,1] v) => (float[N,16,K,L] y) "
        "{ h = Conv<group=4>(x, w) y = Conv(h, v) }",
        IMAGE, "one operator would not cost less",
    ),
}  # fmt: skip  # a table


@pytest.mark.parametrize("name", LEFT)
def test_a_run_that_one_operator_cannot_be_is_left_and_the_reason_is_named(name: str) -> None:
    graph, shape, reason = LEFT[name]
    made = checked(named(graph), shape)
    (run,) = linear_runs(fold(load(named(graph))))
    assert made.notes == (f"1 linear run not merged, as {reason}: '{run.pair[0]}' to '{run.pair[1]}'",)
    assert made.rounds == ()


NO_RUNS = {
    "an activation": (POINT + "{ h = Conv(x, w, b) r = Relu(h) y = Conv(r, v, c) }", IMAGE),
    "two that read it": (
        "(float[N,4,H,W] x, float[16,4,1,1] w, float[5,16,1,1] v) => (float[N,5,K,L] y, float[N,16,H,W] z) "
        "{ h = Conv(x, w) y = Conv(h, v) z = Relu(h) }",
        IMAGE,
    ),
    "an output": (
        "(float[N,4,H,W] x, float[16,4,1,1] w, float[5,16,1,1] v) => (float[N,5,K,L] y, float[N,16,H,W] h) "
        "{ h = Conv(x, w) y = Conv(h, v) }",
        IMAGE,
    ),
    "a scale that is computed": (
        "(float[N,16,H,W] x, float[16,16,1,1] w, float[5,16,1,1] v) => (float[N,5,K,L] y) "
        "{ h = Conv(x, w) g = GlobalAveragePool(x) s = Mul(h, g) y = Conv(s, v) }",
        (2, 16, 9, 8),
    ),
    "a scale along another axis": (
        "(float[N,4,9,8] x, float[16,4,1,1] w, float[8] s, float[5,16,1,1] v) => (float[N,5,K,L] y) "
        "{ h = Conv(x, w) m = Mul(h, s) y = Conv(m, v) }",
        IMAGE,
    ),
    "a sum with itself": (POINT + "{ h = Conv(x, w, b) s = Add(h, h) y = Conv(s, v, c) }", IMAGE),
    "weights for each sample": (
        "(float[2,5,4] x, float[2,4,16] w, float[2,16,5] v) => (float[2,5,5] y) { h = MatMul(x, w) y = MatMul(h, v) }",
        TOKENS,
    ),
    "a weight on the left": (
        "(float[4,5] x, float[16,4] w, float[5,16] v) => (float[5,5] y) { h = MatMul(w, x) y = MatMul(v, h) }",
        (4, 5),
    ),
    "a factor of the operator": (
        "(float[N,4] x, float[4,16] w, float[16,5] v) => (float[N,5] y) "
        "{ h = Gemm<alpha=0.5>(x, w) y = Gemm(h, v) }",
        (3, 4),
    ),
    "queries and keys": (
        "(float[N,T,4] x, float[4,16] w, float[4,16] v) => (float[N,T,T] y) "
        "{ q = MatMul(x, w) k = MatMul(x, v) t = Transpose<perm=[0,2,1]>(k) y = MatMul(q, t) }",
        TOKENS,
    ),
    "training statistics": (
        "(float[N,4,H,W] x, float[16,4,1,1] w, float[16] s, float[16] t, float[16] m, float[16] u, float[5,16,1,1] v) "
        "=> (float[N,5,K,L] y) "
        "{ h = Conv(x, w) n, o, p = BatchNormalization<training_mode=1>(h, s, t, m, u) y = Conv(n, v) }",
        IMAGE,
    ),
}  # fmt: skip  # a table


@pytest.mark.parametrize("name", NO_RUNS)
def test_what_is_not_a_linear_run(name: str) -> None:
    graph, shape = NO_RUNS[name]
    made = checked(named(graph), shape, saving=always)
    assert (made.rounds, made.notes) == ((), ())


def test_the_dearer_operator_is_made_on_request() -> None:
    graph, shape, _ = LEFT["more work as one, depthwise"]
    made = checked(named(graph), shape, saving=always)
    (node,) = made.model.graph.node
    assert (node.name, attributes_of(node)["group"]) == ("the h", 1)
    assert made.after.macs > made.before.macs


def test_longer_runs_are_merged_pair_by_pair() -> None:
    graph = (
        "(float[N,4] x, float[4,20] a, float[20] b, float[20,30] c, float[30,30] d, float[30] e, float[30,3] f) "
        "=> (float[N,3] y) { h = Gemm(x, a, b) i = MatMul(h, c) j = Gemm(i, d, e) y = MatMul(j, f) }"
    )
    made = checked(named(graph), (3, 4))
    assert len(made.model.graph.node) == 1
    assert len(made.rounds) > 1
    assert made.after.macs < made.before.macs


def test_only_the_pairs_that_pay_are_merged() -> None:
    graph = (
        "(float[N,40] x, float[40,2] a, float[2,40] b, float[40,3] c) => (float[N,3] y) "
        "{ h = MatMul(x, a) i = MatMul(h, b) y = MatMul(i, c) }"
    )
    made = checked(named(graph), (3, 40))
    assert [node.name for node in made.model.graph.node] == ["the h", "the y"]
    assert made.notes[-1] == "1 linear run not merged, as one operator would not cost less: 'h' to 'y'"


def test_weights_that_others_read_stay() -> None:
    graph = (
        "(float[N,4,H,W] x, float[8,4,1,1] w, float[8] b, float[4,8,1,1] v) => (float[N,4,K,L] y) "
        "{ h = Conv(x, w, b) i = Conv(h, v) r = Relu(i) j = Conv(r, w, b) s = Relu(j) y = Conv(s, v) }"
    )
    made = checked(named(graph), IMAGE)
    assert made.gone == ("the h",)
    assert made.model.has("v_merged")
    assert {"w", "b", "v"} <= {tensor.name for tensor in made.model.graph.initializer}
    assert checked(named(graph), IMAGE, saving=saved_bytes).rounds == ()


def test_constants_in_nodes_go_with_the_run() -> None:
    proto = named(POINT + "{ h = Conv(x, w, b) y = Conv(h, v, c) }")
    values = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes = [helper.make_node("Constant", [], [name], f"the {name}", value=values[name]) for name in values]
    nodes += [type(node).FromString(node.SerializeToString()) for node in proto.graph.node]
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.node.extend(nodes)
    made = checked(proto, IMAGE)
    assert sorted(made.gone) == ["the b", "the c", "the h", "the v", "the w"]
    assert made.notes[-1] == "removed with that, as nothing else reads it: the w, the b, the v, the c"


def test_weights_that_are_computed_stay_computed() -> None:
    graph = POINT + "{ h = Conv(x, w, b) i = Conv(h, v, c) r = Relu(i) a = Add(d, d) y = Mul(r, a) }"
    proto = named(graph.replace("float[5] c)", "float[5] c, float[5,1,1] d)"))
    assert checked(proto, IMAGE).gone == ("the h",)


def test_initializers_among_the_inputs_keep_their_entries_right() -> None:
    proto = named(POINT + "{ h = Conv(x, w, b) y = Conv(h, v) }", ir=3)
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    made = checked(proto, IMAGE)
    shapes = {info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in made.model.graph.input}
    assert shapes == {"x": [0, 4, 0, 0], "v": [5, 4, 1, 1], "c": [5], "v_bias": [5]}


def test_descriptions_of_tensors_that_are_gone_go() -> None:
    proto = named(POINT + "{ h = Conv(x, w, b) j = Conv(h, v, c) y = Relu(j) }")
    proto.graph.value_info.append(helper.make_tensor_value_info("h", 1, ["N", 16, "H", "W"]))
    proto.graph.value_info.append(helper.make_tensor_value_info("j", 1, ["N", 5, "H", "W"]))
    proto.graph.value_info.append(helper.make_tensor_value_info("v", 1, [5, 16, 1, 1]))
    made = checked(proto, IMAGE)
    shapes = {
        info.name: [dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in made.model.graph.value_info
    }
    assert shapes == {"j": [0, 5, 0, 0], "v": [5, 4, 1, 1]}


def test_weights_that_half_precision_cannot_hold_are_left() -> None:
    graph = (
        "(float16[N,4] x, float16[4,16] w, float16[16,2] v) => (float16[N,2] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    )
    for scale in (1e-3, 1e3):  # products near 1e-6, below the smallest normal number, and beyond the largest
        values = {"w": np.full((4, 16), scale), "v": np.full((16, 2), scale)}
        model = load(named(graph, values=values))
        made = merge(model)
        assert made.rounds == ()
        assert made.notes == ("1 linear run not merged, as float16 cannot hold the product of the weights: 'h' to 'y'",)


def test_a_record_that_does_not_fit_is_refused() -> None:
    model = load(named(POINT + "{ h = Conv(x, w, b) y = Conv(h, v, c) }"))
    with pytest.raises(ValueError, match="the model has no linear run 'h' to 'z' that can be merged"):
        merge_again(model, [[["h", "z"]]])
    with pytest.raises(ValueError, match="two linear runs of a round have a node in common"):
        merge_again(model, [[["h", "y"], ["h", "y"]]])


# Random runs.


class Grown:
    """A random chain of linear and affine operators."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[TensorProto] = []
        self.name, self.channels = "x", 4

    def weight(self, *shape: int) -> str:
        name = f"w{len(self.weights)}"
        values = self.rng.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def pick(self, *among: Any) -> Any:
        return among[self.rng.integers(len(among))]

    def node(self, kind: str, *inputs: str, **attributes: Any) -> None:
        out = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, [self.name, *inputs], [out], f"node {out}", **attributes))
        self.name = out

    def convolution(self, rank: int) -> None:
        group = self.pick(1, 1, 1, 2, self.channels)
        outputs = group * self.pick(1, 2, 3) if group > 1 else self.pick(2, 4, 6, 8)
        is_transposed = self.pick(False, False, False, True)
        kernel = [1] * rank if self.pick(True, False) else [self.pick(1, 2, 3) for _ in range(rank)]
        given: dict[str, Any] = {"group": group} if group > 1 or self.pick(True, False) else {}
        if self.pick(True, False):
            given["kernel_shape"] = kernel
        if self.pick(False, False, True):
            given["strides"] = [self.pick(1, 2) for _ in range(rank)]
        if self.pick(False, False, True):
            given["dilations"] = [self.pick(1, 2) for _ in range(rank)]
        if self.pick(True, False) and kernel != [1] * rank:
            given["pads"] = [self.pick(0, 1) if size > 1 else 0 for size in kernel] * 2
        elif not is_transposed and self.pick(True, False) and "dilations" not in given:
            given["auto_pad"] = self.pick("SAME_UPPER", "SAME_LOWER", "VALID")
        sizes = (self.channels, outputs // group) if is_transposed else (outputs, self.channels // group)
        bias = [self.weight(outputs)] if self.pick(True, False, False) else []
        self.node("ConvTranspose" if is_transposed else "Conv", self.weight(*sizes, *kernel), *bias, **given)
        self.channels = outputs

    def product(self, rank: int) -> None:
        outputs = self.pick(2, 4, 6, 8)
        sizes = [self.channels, outputs]
        if rank == 0 and self.pick(True, False):
            is_turned = self.pick(True, False)
            bias = [self.weight(*self.pick([outputs], [1, outputs], [1]))] if self.pick(True, False) else []
            turned = {"transB": 1} if is_turned else {}
            self.node("Gemm", self.weight(*(sizes[::-1] if is_turned else sizes)), *bias, **turned)
        else:
            self.node("MatMul", self.weight(*sizes))
        self.channels = outputs

    def affine(self, rank: int, *, is_last: bool = False) -> None:
        axes = [self.channels] if is_last else [self.channels, *[1] * rank]
        kind = self.pick("Mul", "Mul", "Div", "Neg", "Identity", "BatchNormalization", "Add", "Sub")
        kind = "Add" if is_last and kind == "BatchNormalization" else kind
        if kind in ("Neg", "Identity"):
            self.node(kind)
        elif kind == "BatchNormalization":
            positive = f"w{len(self.weights)}"
            self.weights.append(numpy_helper.from_array(np.float32(0.5 + self.rng.random(self.channels)), positive))
            self.node(kind, *(self.weight(self.channels) for _ in range(3)), positive)
        else:
            self.node(kind, self.weight(*axes))

    def model(self, rank: int, *, is_last: bool = False) -> ModelProto:
        places = [f"S{axis}" for axis in range(rank)]
        sizes = ["N", *places, 4] if is_last else ["N", 4, *places]
        x = helper.make_tensor_value_info("x", 1, sizes)
        y = helper.make_tensor_value_info(self.name, 1, [f"Y{axis}" for axis in range(rank + 2)])
        graph = helper.make_graph(self.nodes, "grown", [x], [y], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def grown(seed: int) -> tuple[ModelProto, tuple[int, ...]]:
    made = Grown(seed)
    rank = made.pick(1, 2, 2, 3)
    for _ in range(made.pick(2, 3, 4)):
        made.convolution(rank)
        for _ in range(made.pick(0, 0, 1, 2)):
            made.affine(rank)
    return made.model(rank), (2, 4, *(17 + 2 * axis for axis in range(rank)))


def grown_products(seed: int) -> tuple[ModelProto, tuple[int, ...]]:
    made = Grown(seed)
    rank = made.pick(0, 1)
    for _ in range(made.pick(2, 3, 4)):
        made.product(rank)
        for _ in range(made.pick(0, 1, 1, 2)):
            made.affine(rank, is_last=True)
    return made.model(rank, is_last=True), (3, *[5] * rank, 4)


@pytest.mark.parametrize("start", range(0, 200, 50))
@pytest.mark.parametrize("make", [grown, grown_products])
def test_random_runs(start: int, make: Any) -> None:
    merged = 0
    for seed in range(start, start + 50):
        proto, shape = make(seed)
        merged += len(checked(proto, shape, saving=always).gone) > 0
    assert merged >= 10


# Files of others.

REAL = Path(os.environ.get("CPD_DATA", Path(__file__).parents[3] / "shared" / "data")) / "onnx"


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the folder of data")
@pytest.mark.parametrize("name", ["person_reid_0248", "fastestdet"])
def test_runs_of_trained_files(name: str) -> None:
    model = load(REAL / f"{name}.onnx")
    made = merge(model, always)
    assert made.rounds
    feed = {
        entry.name: np.random.default_rng(0).random(
            [dim.dim_value or 1 for dim in entry.type.tensor_type.shape.dim], np.float32
        )
        for entry in model.graph.input
        if not model.has(entry.name)
    }
    expected, found = (execute(open_model(each, optimise=False), feed) for each in (model, made.model))
    for one, two in zip(expected, found, strict=True):
        assert np.abs(one - two).max() <= ROUNDING * np.abs(one).max()
