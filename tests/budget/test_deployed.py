"""Flash of a program: what the converted model holds, and an estimate of its code; no names."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.allocation import Prices
from cpd_onnx.budget.deployed import flash_terms
from cpd_onnx.channels.combing import comb
from cpd_onnx.data.sources import ArraySource
from cpd_onnx.deploy.quantize import Quantization
from cpd_onnx.deploy.steps import Deployment, deploy
from cpd_onnx.ir.model import Model, element_bytes, load
from tests.support.models import from_text

NET = (
    "(float[N,3,8,8] x, float[8,3,3,3] w, float[8] g, float[8] h, float[8] m, float[8] v, float[8,8,1,1] u, float[8] b, "
    "float[512,6] p, float[6] s, float[6] t, float[6,5] q, float[5] e) => (float[N,5] y) { c = Conv<pads=[1,1,1,1]>(x, w)"
    " n = BatchNormalization(c, g, h, m, v) r = Relu(n) d = Conv(r, u, b) a = Add(d, r) f = Flatten(a) l = MatMul(f, p)"
    " i = Mul(l, s) j = Add(i, t) k = Relu(j) o = Gemm(k, q) y = Add(o, e) }"
)
"""Conv, BatchNormalization, Relu, Conv, Add, MatMul, Mul, Add, Relu, Gemm, Add: in float32 seven operators that stay."""


def flash(model: Model, stored_as: str = "") -> float:
    combed = comb(model)
    return float(sum(term[0] * math.prod(map(len, term[1])) for term in flash_terms(combed, stored_as)))


def constants(model: Model) -> float:
    """Return the bytes of the constants in a program: those of all initializers but the shapes that views name."""
    return sum(element_bytes(t.data_type) * math.prod(t.dims) for t in model.graph.initializer)


def test_float_programs_hold_the_folded_weights_and_a_function_for_each_operator() -> None:
    model = load(from_text(NET))
    folded = deploy(model, Deployment(batch=1, fold=True)).model
    operators = [node.op_type for node in folded.graph.node]
    assert operators == ["Conv", "Relu", "Conv", "Add", "Flatten", "Gemm", "Relu", "Gemm"]
    assert flash(model) == constants(folded) + 2500 + 7 * 420


def test_int8_programs_hold_integers_scales_and_biases() -> None:
    model = load(from_text(NET))
    data = ArraySource({"x": np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(np.float32)})
    options = Quantization(form="qoperator", samples=16)
    made = deploy(model, Deployment(batch=1, fold=True, int8=options, integer_io=True), data).model
    operators = [node.op_type for node in made.graph.node]
    assert operators == ["QLinearConv", "QLinearConv", "QLinearAdd", "Flatten", "QGemm", "QGemm"]
    assert flash(model, "int8") - 6500 - 5 * 580 == pytest.approx(constants(made), abs=20 * len(operators))


def test_names_and_order_of_the_file_do_not_count() -> None:
    model, named = load(from_text(NET)), from_text(NET)
    for node in named.graph.node:
        node.name = f"{'very_long' * 20}{node.output[0]}"
        node.doc_string = "text" * 100
    assert flash(load(named)) == flash(model)
    assert flash(load(named), "int8") == flash(model, "int8")


def test_the_target_counts_the_same_and_falls_with_the_channels() -> None:
    combed = comb(load(from_text(NET)))
    whole = KeepMask(combed.atoms)
    prices = Prices(combed, ("flash",), stored_as="int8")
    assert prices.full("flash") == flash(load(from_text(NET)), "int8")
    group = max(combed.groups, key=len)
    half = KeepMask(combed.atoms, np.asarray(group.channels[: len(group) // 2]))
    assert prices.cost("flash", half) < prices.cost("flash", whole)
