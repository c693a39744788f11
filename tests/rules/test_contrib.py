"""Operators of onnxruntime: what is coupled, by the oracles, or why channels stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto

from cpd_onnx.budget.allocation import Budget, allocate
from cpd_onnx.budget.widths import is_width
from cpd_onnx.channels.combing import comb
from cpd_onnx.ir.model import attributes_of, load
from cpd_onnx.ops.traits import MICROSOFT
from cpd_onnx.passes.prune import prune
from cpd_onnx.proof.proving import verify
from cpd_onnx.proof.unrounded import unrounded
from cpd_onnx.rules import RULES, Op
from cpd_onnx.scores.registry import score
from cpd_onnx.testing import mask_oracle
from tests.rules.rows import assert_followed, assert_held, built
from tests.rules.test_mutations import is_caught
from tests.rules.test_rules import CONTRIB_ROWS, CONV, HEAD, MLP, signature
from tests.support.models import from_text

M = "com.microsoft."
DENSE = "h = MatMul(x, w)"
LAST = "y = MatMul(a, v)"
STEM = f"h = {CONV}(x, w)"
END = f"y = {CONV}(a, v)"
BYTES = "float s, uint8 z"
STEPS = {"s": 0.05, "z": 128}
INTO = "q = QuantizeLinear(h, s, z)"
BACK = "a = DequantizeLinear(p, s, z)"
EXPERTS = "(float[2, 4, 6] x, float[6, 8] w, float[8, 4] r, float[8, 5] v, int64[2] n"
ROUTER = f"{DENSE} t = MatMul(h, r) o = Reshape(t, n)"
ROUTED = {"n": [-1, 4]}

# name, opset, graph, what is coupled, values of constants
FOLLOWED: list[tuple[str, int, str, list[str], dict[str, Any]]] = [
    (
        "softmax of bytes", 17,
        f"{MLP}, {BYTES}) => (float[2, 4, 5] y) "
        f"{{ {DENSE} {INTO} p = {M}QLinearSoftmax <axis = 1, opset = 13>(q, s, z, s, z) {BACK} {LAST} }}",
        ["12: v.0 w.1"], STEPS,
    ),
    (
        "one of two in bytes", 17,
        f"{MLP}, float[6, 12] u, bool[4, 1] c, {BYTES}) => (float[2, 4, 5] y) "
        f"{{ {DENSE} {INTO} k = MatMul(x, u) l = QuantizeLinear(k, s, z) "
        f"p = {M}QLinearWhere(c, q, s, z, l, s, z, s, z) {BACK} {LAST} }}",
        ["12: u.1 v.0 w.1"], STEPS | {"c": [[True], [False], [True], [False]]},
    ),
    (
        "pool with channels last", 17,
        f"{HEAD}, {BYTES}) => (float[2, 5, 4, 4] y) "
        f"{{ {STEM} g = Transpose <perm = [0, 2, 3, 1]>(h) q = QuantizeLinear(g, s, z) "
        f"p = {M}NhwcMaxPool <kernel_shape = [2, 2], strides = [2, 2]>(q) b = DequantizeLinear(p, s, z) "
        f"a = Transpose <perm = [0, 3, 1, 2]>(b) {END} }}",
        ["8: v.1 w.0"], STEPS,
    ),
    (
        "mean of windows with channels last", 17,
        f"{HEAD}, {BYTES}) => (float[2, 5, 4, 4] y) "
        f"{{ {STEM} g = Transpose <perm = [0, 2, 3, 1]>(h) q = QuantizeLinear(g, s, z) "
        f"p = {M}QLinearAveragePool <channels_last = 1, kernel_shape = [2, 2], strides = [2, 2]>(q, s, z, s, z) "
        f"b = DequantizeLinear(p, s, z) a = Transpose <perm = [0, 3, 1, 2]>(b) {END} }}",
        ["8: v.1 w.0"], STEPS,
    ),
    (
        "pool with one mask", 17,
        f"{HEAD}, int32[1, 1, 8, 8] m) => (float[2, 5, 4, 4] y) "
        f"{{ {STEM} a = {M}MaxpoolWithMask <kernel_shape = [2, 2], strides = [2, 2]>(h, m) {END} }}",
        ["8: v.1 w.0"], {"m": np.ones(64)},
    ),
    (
        "conv of bytes with channels last", 17,
        f"{HEAD}, {BYTES}, uint8[6, 8, 3, 3] k, float[6] t, uint8 e, int32[6] c, float[5, 6, 1, 1] o) "
        "=> (float[2, 5, 8, 8] y) "
        f"{{ {STEM} g = Transpose <perm = [0, 2, 3, 1]>(h) q = QuantizeLinear(g, s, z) "
        f"p = {M}QLinearConv <channels_last = 1, pads = [1, 1, 1, 1]>(q, s, z, k, t, e, s, z, c) "
        f"b = DequantizeLinear(p, s, z) a = Transpose <perm = [0, 3, 1, 2]>(b) y = Conv(a, o) }}",
        ["6: o.1 t.0", "8: w.0"], STEPS | {"t": np.linspace(0.005, 0.02, 6), "e": 25},
    ),
    (
        "grouped conv of bytes with channels last", 17,
        f"{HEAD}, {BYTES}, uint8[8, 1, 3, 3] k, float t, uint8 e) => (float[2, 5, 8, 8] y) "
        f"{{ {STEM} g = Transpose <perm = [0, 2, 3, 1]>(h) q = QuantizeLinear(g, s, z) "
        f"p = {M}QLinearConv <channels_last = 1, pads = [1, 1, 1, 1], group = 8>(q, s, z, k, t, e, s, z) "
        f"b = DequantizeLinear(p, s, z) a = Transpose <perm = [0, 3, 1, 2]>(b) {END} }}",
        ["8: v.1 w.0"], STEPS | {"t": 0.02, "e": 25},
    ),
    (
        "conv transpose with pads", 17,
        "(float[2, 3, 8, 8] x, float[8, 3, 3, 3] w, float[8, 6, 3, 3] u, float[6] b, int64[4] n, float[5, 6, 1, 1] v) "
        "=> (float[2, 5, 15, 15] y) "
        f"{{ {STEM} a = {M}ConvTransposeWithDynamicPads <strides = [2, 2]>(h, u, n, b) y = Conv(a, v) }}",
        ["6: b.0 u.1 v.1", "8: u.0 w.0"], {"n": [1, 1, 1, 1]},
    ),
    (
        "experts", 17,
        f"{EXPERTS}, float[4, 10, 8] f, float[4, 10] b, float[4, 8, 10] g, float[4, 8] c) => (float[2, 4, 5] y) "
        f"{{ {ROUTER} a = {M}MoE <k = 2, activation_type = \"gelu\">(h, o, f, b, g, c) {LAST} }}",
        ["10: b.1 f.1 g.2", "4: b.0 c.0 f.0 g.0 r.1", "8: c.1 f.2 g.1 r.0 v.0 w.1"], ROUTED,
    ),
    (
        "experts with gates", 17,
        f"{EXPERTS}, float[4, 20, 8] f, float[4, 20] b, float[4, 8, 10] g) => (float[2, 4, 5] y) "
        f"{{ {ROUTER} a = {M}MoE <k = 3, activation_type = \"swiglu\", swiglu_fusion = 1, "
        f"normalize_routing_weights = 1>(h, o, f, b, g) {LAST} }}",
        ["10: b.1 f.1 g.2", "4: b.0 f.0 g.0 r.1", "8: f.2 g.1 r.0 v.0 w.1"], ROUTED,
    ),
    (
        "experts of bytes", 17,
        f"{EXPERTS}, uint8[4, 10, 8] f, float[4, 10] d, float[4, 10] b, uint8[4, 8, 10] g, float[4, 8] e) "
        "=> (float[2, 4, 5] y) "
        f"{{ {ROUTER} a = {M}QMoE <k = 2, expert_weight_bits = 8, weights_prepacked = 0, "
        f"activation_type = \"gelu\">(h, o, f, d, b, g, e) {LAST} }}",
        ["10: b.1 d.1", "4: b.0 d.0 e.0 r.1", "8: e.1 r.0 v.0 w.1"], ROUTED,
    ),
    (
        "experts of half bytes", 17,
        f"{EXPERTS}, uint8[4, 12, 4] f, float[4, 12] d, uint8[4, 8, 6] g, float[4, 8] e) "
        "=> (float[2, 4, 5] y) "
        f"{{ {ROUTER} a = {M}QMoE <k = 1, expert_weight_bits = 4, weights_prepacked = 0>(h, o, f, d, , g, e) {LAST} }}",
        ["4: d.0 e.0 r.1", "4: e.1 r.0 v.0 w.1", "6: d.1"], ROUTED,
    ),
    (
        "experts of bytes in a layout of GPUs", 17,
        f"{EXPERTS}, uint8[4, 10, 8] f, float[4, 10] d, uint8[4, 8, 10] g, float[4, 8] e) => (float[2, 4, 5] y) "
        f"{{ {ROUTER} a = {M}QMoE <k = 2, expert_weight_bits = 8>(h, o, f, d, , g, e) {LAST} }}",
        ["4: d.0 e.0 r.1"], ROUTED,
    ),
    (
        "experts of half bytes with zero points", 17,
        f"{EXPERTS}, uint8[4, 12, 4] f, float[4, 12] d, uint8[4, 8, 6] g, float[4, 8] e, uint8[4, 6] p, uint8[4, 4] q) "
        "=> (float[2, 4, 5] y) "
        f"{{ {ROUTER} a = {M}QMoE <k = 1, expert_weight_bits = 4, weights_prepacked = 0>(h, o, f, d, , g, e, , , , , p, q) "
        f"{LAST} }}",
        ["4: d.0 e.0 r.1"], ROUTED,
    ),
    (
        "experts in blocks", 17,
        "(float[2, 4, 6] x, float[6, 64] w, float[64, 4] r, float[64, 5] v, int64[2] n, "
        "uint8[4, 32, 32] f, float[4, 32, 4] d, uint8[4, 64, 16] g, float[4, 64, 2] e) "
        "=> (float[2, 4, 5] y) "
        f"{{ {ROUTER} a = {M}QMoE <k = 4, expert_weight_bits = 4, block_size = 16, weights_prepacked = 0>(h, o, f, d, , "
        f"g, e) {LAST} }}",
        ["2: d.1 e.2", "4: d.0 e.0 r.1", "4: d.2 e.1 r.0 v.0 w.1"], ROUTED,
    ),
    (
        "packed attention of bytes", 17,
        f"(float[2, 4, 6] x, float[6, 8] w, {BYTES}, int8[8, 24] u, float[24] b, float[24] t, int8[24] e, "
        "float[8, 5] v) => (float[2, 4, 5] y) "
        f"{{ {DENSE} {INTO} a = {M}QAttention <num_heads = 2>(q, u, b, s, t, , z, e) {LAST} }}",
        ["2: b.0 t.0 v.0", "4: b.0 t.0 v.0", "8: w.1"],
        STEPS | {"t": np.linspace(0.01, 0.02, 24), "e": np.zeros(24)},
    ),
    (
        "embeddings of bytes", 17,
        "(int32[2, 4] x, uint8[9, 12] w, uint8[4, 12] p, uint8[12] g, uint8[12] b, float s, uint8 z, float[12, 5] v) "
        "=> (float[2, 4, 5] y) "
        f"{{ a, m = {M}QEmbedLayerNormalization(x, , w, p, , g, b, , s, s, , s, s, z, z, , z, z) {LAST} }}",
        ["12: v.0"], {"s": 0.05, "z": 20},
    ),
    (
        "inverse", 17,
        "(float[4, 3, 3] x, float[6, 3, 3] w, int64[1] one, int64[2] last, float[6, 5] v) => (float[4, 5] y) "
        f"{{ b = Unsqueeze(x, one) h = Mul(b, w) i = {M}Inverse(h) a = ReduceSum <keepdims = 0>(i, last) {LAST} }}",
        ["6: v.0 w.0"], {"one": [1], "last": [2, 3], "w": np.ones((6, 3, 3)) + np.eye(3)},
    ),
    (
        "triangle", 17,
        "(float[2, 4, 6] x, float[6, 12] w, float[12, 5] v) => (float[2, 4, 5] y) "
        f"{{ {DENSE} t = Transpose <perm = [2, 0, 1]>(h) b = {M}Trilu <upper = 0>(t) "
        f"a = Transpose <perm = [1, 2, 0]>(b) {LAST} }}",
        ["12: v.0 w.1"], {},
    ),
    (
        "pad", 17,
        f"{HEAD.replace('[5, 8', '[5, 10')}, int64[8] n) => (float[2, 5, 9, 8] y) "
        f"{{ {STEM} a = {M}Pad(h, n) {END} }}",
        ["2: v.1", "8: v.1 w.0"], {"n": [0, 1, 1, 0, 0, 1, 0, 0]},
    ),
    (
        "lookup by tuples", 17,
        f"{MLP}, int64[3, 2] n) => (float[3, 5] y) {{ {DENSE} a = {M}GatherND(h, n) {LAST} }}",
        ["12: v.0 w.1"], {"n": [[0, 1], [1, 3], [0, 0]]},
    ),
    (
        "sample at a grid", 17,
        f"{HEAD}, float[2, 4, 4, 2] n) => (float[2, 5, 4, 4] y) {{ {STEM} a = {M}GridSample(h, n) {END} }}",
        ["8: v.1 w.0"], {"n": np.linspace(-0.9, 0.9, 64)},
    ),
    (
        "crops", 17,
        f"{HEAD}, float[3, 4] r, int32[3] i, int32[2] n) => (float[3, 5, 4, 4] y) "
        f"{{ {STEM} a = {M}CropAndResize(h, r, i, n) {END} }}",
        ["8: v.1 w.0"], {"r": [[0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], [0, 0.5, 0.5, 1]], "i": [0, 1, 1], "n": [4, 4]},
    ),
    (
        "new axis", 17,
        f"{MLP}, int32 n) => (float[2, 1, 4, 5] y) {{ {DENSE} a = {M}ExpandDims(h, n) {LAST} }}",
        ["12: v.0 w.1"], {"n": 1},
    ),
    (
        "distances", 17,
        "(float[3, 6] x, float[6, 12] w, float[7, 12] v) => (float[3, 7] y) "
        f"{{ h = MatMul(x, w) y = {M}CDist <metric = \"euclidean\">(h, v) }}",
        ["12: v.1 w.1"], {},
    ),
    (
        "windows", 17,
        f"{MLP}) => (float[2, 3, 2, 5] y) "
        f"{{ {DENSE} g = {M}UnfoldTensor <dim = 1, size = 2>(h) a = Transpose <perm = [0, 1, 3, 2]>(g) {LAST} }}",
        ["12: v.0 w.1"], {},
    ),
    (
        "four bits in one list", 17,
        "(float[2, 4, 6] x, float[6, 64] w, uint8[512] q, float[64] s, float[16, 5] v) => (float[2, 4, 5] y) "
        f"{{ {DENSE} a = {M}MatMulBnb4 <K = 64, N = 16, block_size = 16, quant_type = 1>(h, q, s) {LAST} }}",
        ["16: s.0 v.0", "4: s.0 w.1"], {},
    ),
    (
        "rotary by three positions", 17,
        "(float[2, 3, 6] x, float[6, 16] w, float[9, 4] c, float[9, 4] s, int64[3, 2, 3] p, float[16, 5] v) "
        "=> (float[2, 3, 5] y) "
        f"{{ {DENSE} a = {M}MRotaryEmbedding <num_heads = 2, mrope_section = [2, 1, 1]>(h, p, c, s) {LAST} }}",
        ["2: v.0 w.1"], {"p": np.arange(18) % 8},
    ),
    (
        "causal conv", 17,
        "(float[2, 3, 8] x, float[8, 3, 1] w, float[8, 1, 4] k, float[8] b, float[5, 8, 1] v) => (float[2, 5, 8] y) "
        f"{{ h = Conv(x, w) a, c = {M}CausalConvWithState <activation = \"silu\">(h, k, b) y = Conv(a, v) }}",
        ["8: b.0 k.0 v.1 w.0"], {},
    ),
    (
        "causal conv with channels last", 17,
        f"{MLP}, float[12, 1, 4] k) => (float[2, 4, 5] y) "
        f"{{ {DENSE} a, c = {M}CausalConvWithState <channels_last = 1, dilation = 2>(h, k) {LAST} }}",
        ["12: k.0 v.0 w.1"], {},
    ),
    (
        "linear attention", 17,
        "(float[2, 4, 6] x, float[6, 16] w, float[6, 8] u, float[6, 12] z, float[6, 2] d, float[24, 5] v) "
        "=> (float[2, 4, 5] y) "
        f"{{ {DENSE} k = MatMul(x, u) l = MatMul(x, z) e = MatMul(x, d) g = Neg(e) f = Sigmoid(e) "
        f"a, t = {M}LinearAttention <q_num_heads = 4, kv_num_heads = 2>(h, k, l, , g, f) {LAST} }}",
        ["2: d.1 u.1 v.0 w.1 z.1", "2: v.0 w.1", "4: u.1 w.1", "6: v.0 z.1"], {"d": np.linspace(0.1, 0.3, 12)},
    ),
    (
        "linear attention from a state", 17,
        "(float[2, 4, 6] x, float[6, 16] w, float[6, 8] u, float[6, 12] z, float[6, 8] d, float[2, 2, 4, 6] p, "
        "float[24, 5] v) => (float[2, 4, 5] y) "
        f"{{ {DENSE} k = MatMul(x, u) l = MatMul(x, z) e = MatMul(x, d) g = Neg(e) "
        f"a, t = {M}LinearAttention <q_num_heads = 4, kv_num_heads = 2, update_rule = \"gated\">(h, k, l, p, g) {LAST} }}",
        ["2: d.1 p.1 u.1 v.0 w.1 z.1", "2: v.0 w.1", "4: d.1 p.2 u.1 w.1", "6: p.3 v.0 z.1"],
        {"d": np.linspace(0.1, 0.3, 48)},
    ),
    (
        "causal conv from a state", 17,
        "(float[2, 3, 8] x, float[8, 3, 1] w, float[8, 1, 4] k, float[2, 8, 3] p, float[5, 8, 1] v, float[5, 8, 1] z) "
        "=> (float[2, 5, 8] y, float[2, 5, 3] xs) "
        f"{{ h = Conv(x, w) a, c = {M}CausalConvWithState(h, k, , p) y = Conv(a, v) xs = Conv(c, z) }}",
        ["8: k.0 p.1 v.1 w.0 z.1"], {},
    ),
    (
        "gates of linear attention", 17,
        f"{MLP}, float[6, 12] u, float[12] b, float[12] d) => (float[2, 4, 5] y) "
        f"{{ {DENSE} k = MatMul(x, u) e, f = {M}LinearAttentionGate(h, b, d, k) a = Add(e, f) {LAST} }}",
        ["12: b.0 d.0 u.1 v.0 w.1"], {},
    ),
    (
        "scaled gate", 17,
        f"{MLP}, float s) => (float[2, 4, 5] y) {{ {DENSE} a = {M}ScaledSiLU(h, s) {LAST} }}",
        ["12: v.0 w.1"], {},
    ),
    (
        "addition by rows", 17,
        f"{MLP}, float[6, 12] u, float[6, 1] g) => (float[2, 4, 5] y) "
        f"{{ {DENSE} k = MatMul(x, u) l = MatMul(x, g) a = {M}GatedAdd(h, k, l) {LAST} }}",
        ["12: u.1 v.0 w.1"], {},
    ),
    (
        "norm with a gate", 17,
        f"{MLP}, float[6, 12] u, float[4] g) => (float[2, 4, 5] y) "
        f"{{ {DENSE} k = MatMul(x, u) a = {M}GatedRMSNorm(h, g, k) {LAST} }}",
        ["3: u.1 v.0 w.1", "4: g.0 u.1 v.0 w.1"], {},
    ),
]  # fmt: skip  # a table


@pytest.mark.parametrize("row", FOLLOWED, ids=[row[0] for row in FOLLOWED])
def test_followed(row: tuple[str, int, str, list[str], dict[str, Any]]) -> None:
    assert_followed(row)


# name, opset, graph, why channels stay, values of constants
HELD: list[tuple[str, int, str, str, dict[str, Any]]] = [
    (
        "softmax over bytes", 17,
        f"{MLP}, {BYTES}) => (float[2, 4, 5] y) "
        f"{{ {DENSE} {INTO} p = {M}QLinearSoftmax <opset = 13>(q, s, z, s, z) {BACK} {LAST} }}",
        "normalises to a distribution", STEPS,
    ),
    (
        "softmax over all axes from one on", 17,
        f"{MLP}, {BYTES}) => (float[2, 4, 5] y) "
        f"{{ {DENSE} {INTO} p = {M}QLinearSoftmax <axis = 1, opset = 11>(q, s, z, s, z) {BACK} {LAST} }}",
        "normalises to a distribution", STEPS,
    ),
    (
        "pool with a mask for each channel", 17,
        f"{HEAD}, int32[2, 8, 8, 8] m) => (float[2, 5, 4, 4] y) "
        f"{{ {STEM} a = {M}MaxpoolWithMask <kernel_shape = [2, 2], strides = [2, 2]>(h, m) {END} }}",
        "reads its mask at an offset", {},
    ),
    (
        "experts with a third matrix", 17,
        f"{EXPERTS}, float[4, 10, 8] f, float[4, 8, 10] g, float[4, 10, 8] u) => (float[2, 4, 5] y) "
        f"{{ {ROUTER} a = {M}MoE(h, o, f, , g, , u) {LAST} }}",
        "has a third matrix", ROUTED,
    ),
    (
        "packed attention of bytes with a cache", 17,
        f"(float[2, 4, 6] x, float[6, 8] w, {BYTES}, int8[8, 24] u, float[24] b, float t, int8 e, "
        "float[2, 2, 2, 3, 4] p, float[8, 5] v) => (float[2, 4, 5] y) "
        f"{{ {DENSE} {INTO} a, c = {M}QAttention <num_heads = 2>(q, u, b, s, t, , z, e, p) {LAST} }}",
        "has a packed cache", STEPS,
    ),
    (
        "matrix of pads", 17,
        f"{HEAD}, int64[1, 8] n) => (float[2, 5, 9, 8] y) {{ {STEM} a = {M}Pad(h, n) {END} }}",
        "has a matrix of pads", {"n": [0, 0, 1, 0, 0, 0, 0, 0]},
    ),
    (
        "blocks that cross rows", 17,
        "(float[2, 4, 6] x, float[6, 24] w, uint8[192] q, float[24] s, float[16, 5] v) => (float[2, 4, 5] y) "
        f"{{ {DENSE} a = {M}MatMulBnb4 <K = 24, N = 16, block_size = 16, quant_type = 1>(h, q, s) {LAST} }}",
        "do not end with a row", {},
    ),
    (
        "causal conv with several states", 17,
        "(float[2, 3, 8] x, float[8, 3, 1] w, float[8, 1, 4] k, float[5, 8, 1] v) => (float[2, 5, 8] y) "
        f"{{ h = Conv(x, w) a, c = {M}CausalConvWithState <state_window = 2>(h, k) y = Conv(a, v) }}",
        "has a form that its rule does not handle", {},
    ),
    (
        "more values than queries", 17,
        "(float[2, 4, 6] x, float[6, 8] w, float[6, 16] u, float[6, 16] z, float[16, 5] v) => (float[2, 4, 5] y) "
        f"{{ {DENSE} k = MatMul(x, u) l = MatMul(x, z) "
        f"a, t = {M}LinearAttention <q_num_heads = 2, kv_num_heads = 4, update_rule = \"linear\">(h, k, l) {LAST} }}",
        "has a form that its rule does not handle", {},
    ),
    (
        "a gate that is projected", 17,
        f"{MLP}, float[6, 12] u, float[12, 1] g) => (float[2, 4, 5] y) "
        f"{{ {DENSE} k = MatMul(x, u) a = {M}GatedAdd(h, k, h, g) {LAST} }}",
        "projects its gate", {},
    ),
]  # fmt: skip  # a table


@pytest.mark.parametrize("row", HELD, ids=[row[0] for row in HELD])
def test_held(row: tuple[str, int, str, str, dict[str, Any]]) -> None:
    assert_held(row)


def test_experts_are_counted_and_not_rounded_to_multiples() -> None:
    combed = comb(built(next(row for row in FOLLOWED if row[0] == "experts")))
    kinds = {len(group): group.kind for group in combed.groups}
    assert kinds == {10: "channels", 8: "channels", 4: "experts"}
    assert {group.kind: is_width(combed, group) for group in combed.groups} == {"channels": True, "experts": False}


def test_experts_that_mix_in_pairs_stay_but_their_widths_do_not() -> None:
    row = next(row for row in FOLLOWED if row[0] == "experts")
    combed = comb(from_text(row[2].replace("k = 2", "k = 2, use_sparse_mixer = 1"), values=row[4]))
    assert signature(combed) == [groups for groups in row[3] if "r.1" not in groups]
    assert "chooses its experts in pairs" in str([frozen.reasons for frozen in combed.frozen()])


def smaller(model: ModelProto, removes: Callable[[int], range]) -> ModelProto:
    """Return the model without the channels that a function names for the size of a group, proved."""
    combed = comb(model)
    chosen = allocate(combed, score(combed, "random"), Budget("channels", 0.5))
    chosen = replace(chosen, removed=[list(removes(len(group))) for group in combed.groups])
    pruned = prune(combed, chosen)
    assert verify(combed, chosen.keep_mask(combed), pruned.model).verdict == "verified"
    return pruned.model.proto


@pytest.mark.parametrize("row", FOLLOWED, ids=[row[0] for row in FOLLOWED])
def test_a_part_of_every_group_can_go(row: tuple[str, int, str, list[str], dict[str, Any]]) -> None:
    smaller(built(row), lambda size: range(size // 2))


@pytest.mark.parametrize(
    ("name", "size", "attribute"),
    [
        ("experts with gates", 4, "k"),
        ("experts of half bytes", 4, "k"),
        ("packed attention of bytes", 2, "num_heads"),
        ("rotary by three positions", 2, "num_heads"),
        ("linear attention", 2, "kv_num_heads"),
    ],
)
def test_attributes_follow_what_remains(name: str, size: int, attribute: str) -> None:
    """Of heads one remains, and of fewer experts than a token takes all are taken."""
    model = smaller(
        built(next(row for row in FOLLOWED if row[0] == name)), lambda found: range(1, found if found == size else 1)
    )
    (found,) = (attributes_of(node)[attribute] for node in model.graph.node if node.domain)
    assert found == 1


BYTES_ROWS = [row for row in FOLLOWED if "DequantizeLinear(p" in row[2] or "QAttention" in row[2] or "QEmbed" in row[2]]


@pytest.mark.parametrize("row", BYTES_ROWS, ids=[row[0] for row in BYTES_ROWS])
def test_rounding_is_left_out_of_the_comparison(row: tuple[str, int, str, list[str], dict[str, Any]]) -> None:
    """The floats that it is compared in are those of the integers, but for their rounding."""
    model = built(row)
    assert mask_oracle(model).notes == ("compared as float32, without rounding to integers",)
    loaded = load(model)
    smooth, _ = unrounded(loaded, comb(loaded).folded)
    rng, feeds = np.random.default_rng(0), {}
    for info in model.graph.input:
        shape = [size.dim_value for size in info.type.tensor_type.shape.dim]
        is_float = info.type.tensor_type.elem_type == TensorProto.FLOAT
        feeds[info.name] = (
            rng.standard_normal(shape).astype(np.float32) if is_float else rng.integers(0, 9, shape).astype(np.int32)
        )
    expected, found = (
        onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for data in (model.SerializeToString(), smooth.serialize())
    )
    assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.97


@pytest.mark.parametrize(("opset", "version"), [(11, 13), (17, 11)])
def test_softmax_of_another_opset_is_compared_with_its_rounding(opset: int, version: int) -> None:
    row = next(row for row in FOLLOWED if row[0] == "softmax of bytes")
    axis, order = (1, [0, 1, 2]) if version == 13 else (2, [2, 0, 1])
    back = np.argsort(order).tolist()
    text = row[2].replace("opset = 13", f"opset = {version}").replace("axis = 1", f"axis = {axis}")
    text = text.replace("QuantizeLinear(h, s, z)", "QuantizeLinear(g, s, z)", 1)
    text = text.replace(DENSE, f"{DENSE} g = Transpose <perm = {order}>(h)").replace(
        LAST, f"k = Transpose <perm = {back}>(a) y = MatMul(k, v)"
    )
    outcome = mask_oracle(from_text(text, opset=opset, values=row[4]))
    assert outcome.passed
    assert "another opset" in outcome.notes[0]


def touch_all(op: Op) -> None:
    """Silence the accounting, so that the oracles have to see it."""
    op.accounted += [axis for tensor in op.inputs if tensor for axis in tensor.axes or []]


def without(name: str, slot: int | str) -> Callable[[Op], None]:
    """Return a rule that forgets an operand or attribute that names a size."""
    before = RULES[(MICROSOFT, name)]

    def mutation(op: Op) -> None:
        before(op)
        op.recorder.size_uses[:] = [use for use in op.recorder.size_uses if use.slot != slot]

    return mutation


def alone(name: str, *slots: int) -> Callable[[Op], None]:
    """Return a rule that follows the operator without the inputs at some slots, and takes them for accounted for."""
    before = RULES[(MICROSOFT, name)]

    def mutation(op: Op) -> None:
        given = list(op.inputs)
        op.inputs = [None if slot in slots else tensor for slot, tensor in enumerate(given)]
        before(op)
        op.inputs = given
        touch_all(op)

    return mutation


def where_forgets_one(op: Op) -> None:
    touch_all(op)
    op.set(op.input(1).axes or [])


def passes_first(op: Op) -> None:
    touch_all(op)
    op.set(op.input(0).axes or [])


def experts_do_not_interleave(op: Op) -> None:
    real = op.atoms.repeated
    op.atoms.repeated = lambda axis, times: op.atoms.stretched(axis, len(axis) * times)  # type: ignore[method-assign]
    try:
        RULES_BEFORE[(MICROSOFT, "MoE")](op)
    finally:
        op.atoms.repeated = real  # type: ignore[method-assign]


def swapped(name: str) -> Callable[[Op], None]:
    """Return a rule that merges axes in the other order."""

    def mutation(op: Op) -> None:
        real = op.atoms.product
        op.atoms.product = lambda *axes: real(*axes[::-1])  # type: ignore[method-assign]
        try:
            RULES_BEFORE[(MICROSOFT, name)](op)
        finally:
            op.atoms.product = real  # type: ignore[method-assign]

    return mutation


def distances_without_their_sum(op: Op) -> None:
    a, b = op.input(0), op.input(1)
    op.unite(a[1], b[1])
    op.set([a[0], b[0]])


RULES_BEFORE = dict(RULES)
MUTATIONS: list[tuple[str, Callable[[Op], None], str]] = [
    ("QLinearWhere", where_forgets_one, "one of two in bytes"),
    ("QLinearConv", alone("QLinearConv", 4), "conv of bytes with channels last"),
    ("QLinearConv", without("QLinearConv", "group"), "grouped conv of bytes with channels last"),
    ("ConvTransposeWithDynamicPads", alone("ConvTransposeWithDynamicPads", 3), "conv transpose with pads"),
    ("MoE", without("MoE", "k"), "experts with gates"),
    ("MoE", alone("MoE", 3), "experts"),
    ("MoE", experts_do_not_interleave, "experts with gates"),
    ("QMoE", alone("QMoE", 4), "experts of bytes"),
    ("QMoE", without("QMoE", "k"), "experts in blocks"),
    ("QAttention", alone("QAttention", 4), "packed attention of bytes"),
    ("QAttention", swapped("QAttention"), "packed attention of bytes"),
    ("QEmbedLayerNormalization", alone("QEmbedLayerNormalization", 3), "embeddings of bytes"),
    ("Pad", without("Pad", 1), "pad"),
    ("CDist", distances_without_their_sum, "distances"),
    ("MatMulBnb4", swapped("MatMulBnb4"), "four bits in one list"),
    ("MRotaryEmbedding", swapped("MRotaryEmbedding"), "rotary by three positions"),
    ("CausalConvWithState", alone("CausalConvWithState", 2), "causal conv"),
    ("LinearAttention", alone("LinearAttention", 4, 5), "linear attention"),
    ("LinearAttention", without("LinearAttention", "scale"), "linear attention"),
    ("LinearAttention", swapped("LinearAttention"), "linear attention"),
    ("LinearAttentionGate", passes_first, "gates of linear attention"),
    ("GatedAdd", passes_first, "addition by rows"),
    ("GatedRMSNorm", swapped("GatedRMSNorm"), "norm with a gate"),
]


@pytest.mark.parametrize(
    ("operator", "mutation", "name"), MUTATIONS, ids=[f"{m[0]}-{number}" for number, m in enumerate(MUTATIONS)]
)
def test_planted_defect_is_caught(
    operator: str, mutation: Callable[[Op], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(next(row for row in FOLLOWED if row[0] == name))
    monkeypatch.setitem(RULES, (MICROSOFT, operator), mutation)
    assert is_caught(model)


def test_the_rows_are_right_without_a_defect() -> None:
    names = {name for _, _, name in MUTATIONS}
    assert not any(is_caught(built(row)) for row in FOLLOWED if row[0] in names)


def test_every_operator_has_a_row() -> None:
    operators = {node.op_type for row in FOLLOWED for node in built(row).graph.node if node.domain == MICROSOFT}
    assert set(CONTRIB_ROWS) <= operators
