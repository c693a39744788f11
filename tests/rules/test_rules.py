"""Rules by table (ONNX text in, coupled axes out), by the three oracles, and by the official operator tests."""

from __future__ import annotations

import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import cpd_onnx as cpd
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.free import free_channels, keep_without, removable
from cpd_onnx.channels.groups import Combed
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.rules import RULES
from cpd_onnx.rules.shape import regroup
from cpd_onnx.runtime.sessions import execute, open_model, working_feeds
from cpd_onnx.testing import mask_oracle, permutation_oracle, widen_oracle
from tests.support.models import from_text, operator_cases, set_free

CONV = "Conv <pads = [1, 1, 1, 1]>"
HEAD = "(float[2, 3, 8, 8] x, float[8, 3, 3, 3] w, float[5, 8, 3, 3] v"
MLP = "(float[2, 4, 6] x, float[6, 12] w, float[12, 5] v"
SAME = f"h = {CONV}(x, w) y = {CONV}(a, v)"

WINDOWS = np.add.outer(np.add.outer([0, 20], [0, 5, 10, 15]), np.add.outer(range(3), range(3)))
"""Positions in a flattened tensor [2, 4, 5] of windows of three: sample, channel, place, tap."""
WINDOWS_LAST = np.add.outer([0, 20], np.add.outer(4 * np.add.outer(range(3), range(3)), range(4)))
"""The same in a flattened tensor [2, 5, 4]: sample, place, tap, channel."""

# name, opset, graph, what is coupled: one entry a group, "size: weight.axis …"; values of constants
TABLE: list[tuple[str, int, str, list[str], dict[str, Any]]] = [
    ("conv", 17, f"{HEAD}, float[8] b) => (float[2, 5, 8, 8] y) {{ a = {CONV}(x, w, b) y = {CONV}(a, v) }}", ["8: b.0 v.1 w.0"], {}),
    (
        "conv shared bias", 17,
        "(float[2, 3, 8] x, float[4, 3, 1] w, float[4, 4, 1] u, float[4] b, float[5, 4, 1] v) => (float[2, 5, 8] y) "
        "{ a = Conv(x, w, b) c = Conv(a, u, b) y = Conv(c, v) }",
        ["4: b.0 u.0 v.1", "4: b.0 u.1 w.0"], {},
    ),
    (
        "conv tied kernel", 17,
        "(float[2, 3, 8] x, float[4, 3, 1] w, float[4, 4, 1] u, float[5, 4, 1] v) => (float[2, 5, 8] y) "
        "{ a = Conv(x, w) c = Conv(a, u) d = Conv(c, u) y = Conv(d, v) }",
        ["4: u.0 u.1 v.1 w.0"], {},
    ),
    (
        "conv depthwise", 17,
        f"{HEAD}, float[8, 1, 3, 3] d) => (float[2, 5, 8, 8] y) "
        f"{{ h = {CONV}(x, w) a = Conv <pads = [1, 1, 1, 1], group = 8>(h, d) y = {CONV}(a, v) }}",
        ["8: d.0 v.1 w.0"], {},
    ),
    (
        "conv depthwise multiplier", 17,
        "(float[2, 3, 8] x, float[4, 3, 1] w, float[8, 1, 3] d, float[5, 8, 1] v) => (float[2, 5, 6] y) "
        "{ h = Conv(x, w) a = Conv <group = 4>(h, d) y = Conv(a, v) }",
        ["2: d.0 v.1", "4: d.0 v.1 w.0"], {},
    ),
    (
        "conv grouped", 17,
        f"{HEAD}, float[8, 4, 3, 3] g) => (float[2, 5, 8, 8] y) "
        f"{{ h = {CONV}(x, w) a = Conv <pads = [1, 1, 1, 1], group = 2>(h, g) y = {CONV}(a, v) }}",
        ["2: g.0 v.1 w.0", "4: g.0 v.1", "4: g.1 w.0"], {},
    ),
    (
        "conv transpose", 17,
        "(float[2, 3, 5, 5] x, float[3, 6, 2, 2] w, float[6] b, float[6, 4, 2, 2] v) => (float[2, 4, 7, 7] y) "
        "{ a = ConvTranspose(x, w, b) y = ConvTranspose(a, v) }",
        ["6: b.0 v.0 w.1"], {},
    ),
    (
        "conv transpose grouped", 17,
        "(float[2, 3, 5] x, float[6, 3, 1] w, float[6, 2, 2] g, float[4, 4, 1] v) => (float[2, 4, 6] y) "
        "{ h = Conv(x, w) a = ConvTranspose <group = 2>(h, g) y = Conv(a, v) }",
        ["2: g.0 v.1 w.0", "2: g.1 v.1", "3: g.0 w.0"], {},
    ),
    (
        "residual", 17,
        f"{HEAD}, float[8, 8, 3, 3] u) => (float[2, 5, 8, 8] y) "
        f"{{ h = {CONV}(x, w) k = {CONV}(h, u) a = Add(h, k) y = {CONV}(a, v) }}",
        ["8: u.0 u.1 v.1 w.0"], {},
    ),
    (
        "squeeze excitation", 17,
        f"{HEAD}, float[4, 8, 1, 1] r, float[8, 4, 1, 1] e) => (float[2, 5, 8, 8] y) "
        f"{{ h = {CONV}(x, w) p = GlobalAveragePool(h) q = Conv(p, r) s = Conv(q, e) t = Sigmoid(s) a = Mul(h, t) "
        f"y = {CONV}(a, v) }}",
        ["4: e.1 r.0", "8: e.0 r.1 v.1 w.0"], {},
    ),
    (
        "gemm", 17,
        "(float[2, 4] x, float[8, 4] w, float[8] b, float[8, 3] v) => (float[2, 3] y) "
        "{ a = Gemm <transB = 1>(x, w, b) y = Gemm(a, v) }",
        ["8: b.0 v.0 w.0"], {},
    ),
    ("gemm left constant", 17, "(float[4, 5] x, float[8, 4] w, float[3, 8] v) => (float[3, 5] y) { a = Gemm(w, x) y = MatMul(v, a) }", ["8: v.1 w.0"], {}),
    ("matmul", 17, f"{MLP}, float[12] b) => (float[2, 4, 5] y) {{ h = MatMul(x, w) k = Add(h, b) a = Relu(k) y = MatMul(a, v) }}", ["12: b.0 v.0 w.1"], {}),
    ("matmul vector", 17, "(float[2, 6] x, float[6, 9] w, float[9] v) => (float[2] y) { a = MatMul(x, w) y = MatMul(a, v) }", ["9: v.0 w.1"], {}),
    (
        "weights behind transpose and identity", 17,
        "(float[2, 6] x, float[9, 6] w, float[9, 4] v) => (float[2, 4] y) "
        "{ t = Transpose(w) i = Identity(v) a = MatMul(x, t) y = MatMul(a, i) }",
        ["9: v.0 w.0"], {},
    ),
    (
        "einsum", 17,
        "(float[2, 4, 6] x, float[6, 3, 5] w, float[3, 5, 7] v) => (float[2, 4, 7] y) "
        "{ a = Einsum <equation = \"bsd,dhk->bshk\">(x, w) y = Einsum <equation = \"...hk,hko->...o\">(a, v) }",
        ["3: v.0 w.1", "5: v.1 w.2"], {},
    ),
    (
        "batch norm", 17,
        f"{HEAD}, float[8] s, float[8] b, float[8] m, float[8] q) => (float[2, 5, 8, 8] y) "
        f"{{ h = {CONV}(x, w) a = BatchNormalization(h, s, b, m, q) y = {CONV}(a, v) }}",
        ["8: b.0 m.0 q.0 s.0 v.1 w.0"], {},
    ),
    (
        "layer norm", 17,
        f"{MLP}, float[12] s, float[12] b) => (float[2, 4, 5] y) "
        f"{{ h = MatMul(x, w) a = LayerNormalization(h, s, b) y = MatMul(a, v) }}",
        ["12: b.0 s.0 v.0 w.1"], {},
    ),
    (
        "layer norm decomposed", 17,
        f"{MLP}, float two, float[12] s) => (float[2, 4, 5] y) "
        f"{{ h = MatMul(x, w) m = ReduceMean <axes = [-1]>(h) d = Sub(h, m) p = Pow(d, two) "
        f"q = ReduceMean <axes = [-1]>(p) r = Sqrt(q) n = Div(d, r) a = Mul(n, s) y = MatMul(a, v) }}",
        ["12: s.0 v.0 w.1"], {"two": 2},
    ),
    ("rms norm", 23, f"{MLP}, float[12] s) => (float[2, 4, 5] y) {{ h = MatMul(x, w) a = RMSNormalization(h, s) y = MatMul(a, v) }}", ["12: s.0 v.0 w.1"], {}),
    (
        "instance norm", 17,
        f"{HEAD}, float[8] s, float[8] b) => (float[2, 5, 8, 8] y) "
        f"{{ h = {CONV}(x, w) a = InstanceNormalization(h, s, b) y = {CONV}(a, v) }}",
        ["8: b.0 s.0 v.1 w.0"], {},
    ),
    (
        "group norm", 21,
        f"{HEAD}, float[8] s, float[8] b) => (float[2, 5, 8, 8] y) "
        f"{{ h = {CONV}(x, w) a = GroupNormalization <num_groups = 2>(h, s, b) y = {CONV}(a, v) }}",
        ["2: b.0 s.0 v.1 w.0", "4: b.0 s.0 v.1 w.0"], {},
    ),
    (
        "group norm lowered", 17,
        f"{HEAD}, int64[3] g, int64[4] c, float[2] s, float[2] b) => (float[2, 5, 8, 8] y) "
        f"{{ h = {CONV}(x, w) r = Reshape(h, g) i = InstanceNormalization(r, s, b) a = Reshape(i, c) "
        f"y = {CONV}(a, v) }}",
        ["2: b.0 s.0 v.1 w.0", "4: v.1 w.0"], {"g": [0, 2, -1], "c": [2, 8, 8, 8]},
    ),
    (
        "determinant", 17,
        "(float[2, 3, 4, 4] x, float[6, 3, 1, 1] w, float[6, 5] v) => (float[2, 5] y) "
        "{ h = Conv(x, w) a = Det(h) y = MatMul(a, v) }",
        ["6: v.0 w.0"], {},
    ),
    ("lp norm", 17, f"{MLP}) => (float[2, 4, 5] y) {{ h = MatMul(x, w) a = LpNormalization <axis = -1>(h) y = MatMul(a, v) }}", ["12: v.0 w.1"], {}),
    (
        "lrn", 17,
        "(float[2, 3, 8, 8] x, float[8, 3, 1, 1] w, float[6, 8, 1, 1] u, float[5, 6, 1, 1] v) => (float[2, 5, 8, 8] y) "
        "{ h = Conv(x, w) a = LRN <size = 3>(h) b = Conv(a, u) r = Relu(b) y = Conv(r, v) }",
        ["6: u.0 v.1", "8: u.1 w.0"], {},
    ),
    ("softmax", 17, f"{MLP}) => (float[2, 4, 5] y) {{ h = MatMul(x, w) a = Softmax(h) y = MatMul(a, v) }}", [], {}),
    (
        "pools", 17,
        f"{HEAD}) => (float[2, 5, 8, 8] y) "
        f"{{ h = {CONV}(x, w) p = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(h) "
        f"a = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(p) y = {CONV}(a, v) }}",
        ["8: v.1 w.0"], {},
    ),
    (
        "max unpool", 17,
        "(float[1, 3, 4, 4] x, float[6, 3, 1, 1] w, float[6, 6, 1, 1] u, float[5, 6, 1, 1] v) "
        "=> (float[1, 5, 4, 4] y) "
        "{ h = Conv(x, w) p, i = MaxPool <kernel_shape = [2, 2], strides = [2, 2]>(h) q = Conv(p, u) "
        "a = MaxUnpool <kernel_shape = [2, 2], strides = [2, 2]>(q, i) y = Conv(a, v) }",
        ["6: u.0 u.1 v.1 w.0"], {},
    ),
    (
        "max unpool as torch exports it", 17,
        "(float[1, 3, 4, 4] x, float[6, 3, 1, 1] w, float[5, 6, 1, 1] v, int64[2] from, int64[2] to, int64[2] axes, "
        "int64[1] none, int64[1] two, int64 zero, int64 one, int64 image, int64[2] ones) => (float[1, 5, 4, 4] y) "
        "{ h = Conv(x, w) p, i = MaxPool <kernel_shape = [2, 2], strides = [2, 2]>(h) "
        "q, j = MaxPool <kernel_shape = [1, 1]>(h) f = Slice(j, from, to, axes) d = Sub(i, f) s = Shape(d) "
        "n = Slice(s, none, two, none) c = ReduceProd <keepdims = 0>(n) r = Range(zero, c, one) m = Mul(r, image) "
        "k = Concat <axis = 0>(n, ones) o = Reshape(m, k) e = Add(d, o) "
        "a = MaxUnpool <kernel_shape = [2, 2], strides = [2, 2]>(p, e) y = Conv(a, v) }",
        ["6: v.1 w.0"],
        {"from": [0, 0], "to": [1, 1], "axes": [2, 3], "none": [0], "two": [2], "zero": 0, "one": 1, "image": 16, "ones": [1, 1]},
    ),
    (
        "zeros of a shape", 17,
        "(float[n, 4] x, float[4, 6] w, float[6, 5] v) => (float[n, 5] y) "
        "{ h = MatMul(x, w) s = Shape(h) z = ConstantOfShape(s) a = Add(h, z) y = MatMul(a, v) }",
        ["6: v.0 w.1"], {},
    ),
    (
        "flatten after channels last", 17,
        "(float[2, 3, 4, 4] x, float[6, 3, 1, 1] w, float[96, 5] v) => (float[2, 5] y) "
        "{ h = Conv(x, w) t = Transpose <perm = [0, 2, 3, 1]>(h) a = Flatten(t) y = Gemm(a, v) }",
        ["6: v.0 w.0"], {},
    ),
    (
        "flatten counted from the back", 17,
        "(float[2, 3, 4] x, float[6, 3, 1] w, float[6, 5] v) => (float[8, 5] y) "
        "{ h = Conv(x, w) t = Transpose <perm = [0, 2, 1]>(h) a = Flatten <axis = -1>(t) y = Gemm(a, v) }",
        ["6: v.0 w.0"], {},
    ),
    (
        "conv of single positions along another axis", 17,
        "(float[2, 3, 4] x, float[2, 3, 1] k, float[2] b, float[4, 6] w, float[6, 5] v) => (float[2, 2, 5] y) "
        "{ h = MatMul(x, w) a = Conv(h, k, b) y = MatMul(a, v) }",
        ["6: v.0 w.1"], {},
    ),
    (
        "channel shuffle", 17,
        f"{HEAD}, int64[5] p, int64[4] q, float[8, 1, 3, 3] d) => (float[2, 5, 8, 8] y) "
        f"{{ h = {CONV}(x, w) k = Conv <pads = [1, 1, 1, 1], group = 8>(h, d) r = Reshape(k, p) "
        f"t = Transpose <perm = [0, 2, 1, 3, 4]>(r) a = Reshape(t, q) y = {CONV}(a, v) }}",
        ["2: d.0 v.1 w.0", "4: d.0 v.1 w.0"], {"p": [2, 2, 4, 8, 8], "q": [2, 8, 8, 8]},
    ),
    (
        "heads", 17,
        "(float[2, 4, 6] x, float[6, 36] w, float[12, 5] v, int64[5] p, int64 zero, int64 one, int64 two, int64[3] q) "
        "=> (float[2, 4, 5] y) "
        "{ h = MatMul(x, w) r = Reshape(h, p) t = Transpose <perm = [2, 0, 3, 1, 4]>(r) a = Gather(t, zero) "
        "b = Gather(t, one) c = Gather(t, two) k = Transpose <perm = [0, 1, 3, 2]>(b) s = MatMul(a, k) m = Softmax(s) "
        "o = MatMul(m, c) u = Transpose <perm = [0, 2, 1, 3]>(o) f = Reshape(u, q) y = MatMul(f, v) }",
        ["3: v.0 w.1", "4: v.0 w.1"], {"p": [0, 0, 3, 3, 4], "zero": 0, "one": 1, "two": 2, "q": [0, 0, 12]},
    ),
    (
        "depth to space", 17,
        "(float[1, 3, 4, 4] x, float[12, 3, 1, 1] w, float[5, 3, 1, 1] v) => (float[1, 5, 8, 8] y) "
        "{ h = Conv(x, w) a = DepthToSpace <blocksize = 2, mode = \"CRD\">(h) y = Conv(a, v) }",
        ["3: v.1 w.0"], {},
    ),
    (
        "space to depth", 17,
        "(float[1, 3, 4, 4] x, float[3, 3, 1, 1] w, float[5, 12, 1, 1] v) => (float[1, 5, 2, 2] y) "
        "{ h = Conv(x, w) a = SpaceToDepth <blocksize = 2>(h) y = Conv(a, v) }",
        ["3: v.1 w.0"], {},
    ),
    (
        "concat", 17,
        f"{HEAD.replace('[5, 8', '[5, 14')}, float[6, 3, 3, 3] u) => (float[2, 5, 8, 8] y) "
        f"{{ h = {CONV}(x, w) k = {CONV}(x, u) a = Concat <axis = 1>(h, k) y = {CONV}(a, v) }}",
        ["6: u.0 v.1", "8: v.1 w.0"], {},
    ),
    (
        "split", 17,
        f"{MLP.replace('12, 5', '8, 5')}, int64[2] n) => (float[2, 4, 5] y) "
        f"{{ h = MatMul(x, w) a, b = Split <axis = -1>(h, n) y = MatMul(a, v) }}",
        ["4: w.1", "8: v.0 w.1"], {"n": [8, 4]},
    ),
    (
        "split without sizes", 18,
        f"{MLP.replace('12, 5', '6, 5')}) => (float[2, 4, 5] y) "
        f"{{ h = MatMul(x, w) a, b = Split <axis = -1, num_outputs = 2>(h) g = Sigmoid(b) c = Mul(a, g) "
        f"y = MatMul(c, v) }}",
        ["6: v.0 w.1"], {},
    ),
    (
        "slice", 17,
        f"{MLP.replace('12, 5', '6, 5')}, int64[1] s, int64[1] e, int64[1] t) => (float[2, 4, 5] y) "
        f"{{ h = MatMul(x, w) a = Slice(h, s, e, t) y = MatMul(a, v) }}",
        ["6: v.0 w.1", "6: w.1"], {"s": -9, "e": -3, "t": -1},
    ),
    (
        "slice backwards", 17,
        f"{MLP}, int64[1] s, int64[1] e, int64[1] t, int64[1] u) => (float[2, 4, 5] y) "
        f"{{ h = MatMul(x, w) a = Slice(h, s, e, t, u) y = MatMul(a, v) }}",
        ["12: v.0 w.1"], {"s": -1, "e": -(2**62), "t": -1, "u": -1},
    ),
    (
        "slice from an input", 17,
        f"{MLP}, int64[1] xs, int64[1] e, int64[1] t) => (float[2, N, 5] y) "
        f"{{ h = MatMul(x, w) a = Slice(h, xs, e, t) y = MatMul(a, v) }}",
        ["12: v.0 w.1"], {"e": 4, "t": 1},
    ),
    (
        "slice old", 9,
        f"{MLP.replace('12, 5', '6, 5')}) => (float[2, 4, 5] y) "
        f"{{ h = MatMul(x, w) a = Slice <axes = [2], starts = [6], ends = [2147483647]>(h) y = MatMul(a, v) }}",
        ["6: v.0 w.1", "6: w.1"], {},
    ),
    (
        "gather windows of a flattened tensor", 17,
        "(float[2, 3, 5] x, float[4, 3, 1] w, float[12, 6] v, int64[1] flat, int64[2, 4, 3, 3] windows, int64[3] s) "
        "=> (float[2, 3, 6] y) { h = Conv(x, w) r = Reshape(h, flat) g = Gather(r, windows) "
        "t = Transpose <perm = [0, 2, 1, 3]>(g) a = Reshape(t, s) y = MatMul(a, v) }",
        ["3: v.0", "4: v.0 w.0"], {"flat": [-1], "windows": WINDOWS, "s": [2, 3, 12]},
    ),
    (
        "gather windows by negative positions, channels last", 17,
        "(float[2, 5, 3] x, float[3, 4] w, float[12, 6] v, int64[1] flat, int64[2, 3, 3, 4] windows, int64[3] s) "
        "=> (float[2, 3, 6] y) { h = MatMul(x, w) r = Reshape(h, flat) g = Gather(r, windows) "
        "a = Reshape(g, s) y = MatMul(a, v) }",
        ["3: v.0", "4: v.0 w.1"], {"flat": [-1], "windows": WINDOWS_LAST - 40, "s": [2, 3, 12]},
    ),
    (
        "gather channels by a table", 17,
        "(float[2, 3, 5] x, float[8, 3, 1] w, float[6, 8, 1] v, int64[2, 4] pairs, int64[3] s) => (float[2, 6, 5] y) "
        "{ h = Conv(x, w) g = Gather <axis = 1>(h, pairs) a = Reshape(g, s) y = Conv(a, v) }",
        ["2: v.1 w.0", "4: v.1 w.0"], {"pairs": [[0, 2, 4, 6], [1, 3, 5, 7]], "s": [2, 8, 5]},
    ),
    (
        "gather overlapping channels by a table", 17,
        "(float[2, 3, 5] x, float[6, 3, 1] w, float[6, 8, 1] v, int64[2, 4] pairs, int64[3] s) => (float[2, 6, 5] y) "
        "{ h = Conv(x, w) g = Gather <axis = 1>(h, pairs) a = Reshape(g, s) y = Conv(a, v) }",
        ["2: v.1", "2: w.0", "4: v.1 w.0"], {"pairs": [[0, 1, 2, 3], [0, 1, 2, 3]], "s": [2, 8, 5]},
    ),
    (
        "gather channels", 17,
        f"{MLP.replace('12, 5', '4, 5')}, int64[4] i) => (float[2, 4, 5] y) "
        f"{{ h = MatMul(x, w) a = Gather <axis = -1>(h, i) y = MatMul(a, v) }}",
        ["4: v.0 w.1", "8: w.1"], {"i": [3, 1, -1, 7]},
    ),
    (
        "lookup that reshapes", 17,
        "(float[1, 4] x, float[4, 6] w, int64[1] flat, int64[1, 6, 1, 1] p, float[5, 6, 1, 1] v) "
        "=> (float[1, 5, 1, 1] y) "
        "{ h = MatMul(x, w) r = Reshape(h, flat) a = Gather(r, p) y = Conv(a, v) }",
        ["6: v.1 w.1"], {"flat": -1, "p": [0, 1, 2, -3, 4, 5]},
    ),
    (
        "lookup of overlapping windows", 17,
        "(float[4, 4] x, float[4, 6] w, int64[1] flat, int64[3, 2, 6] p, float[6, 5] v) => (float[3, 2, 5] y) "
        "{ h = MatMul(x, w) r = Reshape(h, flat) a = Gather(r, p) y = MatMul(a, v) }",
        ["6: v.0 w.1"],
        {"flat": -1, "p": (np.arange(24).reshape(4, 6)[np.add.outer(range(3), range(2))] + [0, 0, 0, -24, 0, 0]).tolist()},
    ),
    (
        "lookup of overlapping windows of heads", 17,
        "(float[4, 4] x, float[4, 6] w, int64[3] parts, int64[1] flat, int64[2, 3, 2, 3] p, int64[3] joined, "
        "float[6, 5] v) => (float[3, 2, 5] y) "
        "{ h = MatMul(x, w) s = Reshape(h, parts) t = Transpose <perm = [1, 0, 2]>(s) r = Reshape(t, flat) "
        "a = Gather(r, p) b = Transpose <perm = [1, 2, 0, 3]>(a) c = Reshape(b, joined) y = MatMul(c, v) }",
        ["2: v.0 w.1", "3: v.0 w.1"],
        {"parts": [4, 2, 3], "flat": -1, "joined": [3, 2, 6],
         "p": np.arange(24).reshape(2, 4, 3)[:, np.add.outer(range(3), range(2))].tolist()},
    ),
    (
        "assignment to channels", 17,
        "(float[4, 6] x, float[6, 8] w, float[6, 3] u, int64[3, 1] p, float[8, 5] v) => (float[4, 5] y) "
        "{ h = MatMul(x, w) t = Transpose(h) g = MatMul(x, u) s = Transpose(g) a = ScatterND(t, p, s) "
        "b = Transpose(a) y = MatMul(b, v) }",
        ["3: u.1 v.0 w.1", "5: v.0 w.1"], {"p": [[1], [-1], [2]]},
    ),
    (
        "assignment to a slice", 17,
        "(float[2, 4, 6] x, float[6, 8] w, float[6, 3] u, int64[2] i, int64[2, 2, 3, 3] p, float[8, 5] v) => (float[2, 4, 5] y) "
        "{ h = MatMul(x, w) g = MatMul(x, u) s = Gather <axis = 1>(g, i) a = ScatterND(h, p, s) y = MatMul(a, v) }",
        ["3: u.1 v.0 w.1", "5: v.0 w.1"],
        {"i": [2, 3], "p": np.stack(np.meshgrid([0, 1], [0, 2], [4, 5, 6], indexing="ij"), axis=-1).tolist()},
    ),
    ("embedding", 17, "(int64[2, 4] x, float[9, 6] w, float[6, 5] v) => (float[2, 4, 5] y) { a = Gather(w, x) y = MatMul(a, v) }", ["6: v.0 w.1"], {}),
    (
        "pad channels", 17,
        f"{HEAD.replace('[5, 8', '[5, 12')}, int64[8] p) => (float[2, 5, 8, 8] y) "
        f"{{ h = {CONV}(x, w) a = Pad(h, p) y = {CONV}(a, v) }}",
        ["4: v.1", "8: v.1 w.0"], {"p": [0, 2, 0, 0, 0, 2, 0, 0]},
    ),
    (
        "expand", 17,
        f"{MLP}, float[1] o, int64[1] n) => (float[2, 4, 5] y) "
        f"{{ h = MatMul(x, w) e = Expand(o, n) a = Mul(h, e) y = MatMul(a, v) }}",
        ["12: v.0 w.1"], {"n": 12},
    ),
    (
        "tile", 17,
        f"{MLP}, float[1] o, int64[1] n) => (float[2, 4, 5] y) "
        f"{{ h = MatMul(x, w) e = Tile(o, n) a = Mul(h, e) y = MatMul(a, v) }}",
        ["12: v.0 w.1"], {"n": 12},
    ),
    (
        "resize", 17,
        f"{HEAD}, int64[4] n) => (float[2, 5, 16, 16] y) "
        f"{{ h = {CONV}(x, w) a = Resize(h, , , n) y = {CONV}(a, v) }}",
        ["8: v.1 w.0"], {"n": [2, 8, 16, 16]},
    ),
    (
        "shape arithmetic", 17,
        f"{HEAD.replace('float[5, 8, 3, 3] v', 'float[512, 5] v')}, int64 zero, int64[1] last) => (float[2, 5] y) "
        f"{{ h = {CONV}(x, w) s = Shape(h) n = Gather(s, zero) u = Unsqueeze(n, last) k = Concat <axis = 0>(u, last) "
        f"m = Mul(k, k) a = Reshape(h, k) y = Gemm(a, v) }}",
        ["8: v.0 w.0"], {"zero": 0, "last": -1},
    ),
    (
        "prelu and where", 17,
        f"{HEAD}, float[8, 1, 1] p, bool[1, 1, 1, 1] c) => (float[2, 5, 8, 8] y) "
        f"{{ h = {CONV}(x, w) k = PRelu(h, p) a = Where(c, k, h) y = {CONV}(a, v) }}",
        ["8: p.0 v.1 w.0"], {"c": True},
    ),
    (
        "broadcast old", 6,
        f"{HEAD}, float[8] b) => (float[2, 5, 8, 8] y) "
        f"{{ h = {CONV}(x, w) a = Add <axis = 1, broadcast = 1>(h, b) y = {CONV}(a, v) }}",
        ["8: b.0 v.1 w.0"], {},
    ),
    (
        "lstm", 17,
        "(float[3, 2, 4] x, float[1, 20, 4] w, float[1, 20, 5] r, float[1, 40] b, float[5, 6] v, int64[1] one) "
        "=> (float[3, 2, 6] y) "
        "{ h = LSTM <hidden_size = 5>(x, w, r, b) a = Squeeze(h, one) y = MatMul(a, v) }",
        ["5: b.1 r.1 r.2 v.0 w.1"], {"one": 1},
    ),
    (
        "gru both ways", 17,
        "(float[3, 2, 4] x, float[2, 15, 4] w, float[2, 15, 5] r, float[10, 6] v, int64[3] p) => (float[3, 2, 6] y) "
        "{ h = GRU <hidden_size = 5, direction = \"bidirectional\">(x, w, r) t = Transpose <perm = [0, 2, 1, 3]>(h) "
        "a = Reshape(t, p) y = MatMul(a, v) }",
        ["5: r.1 r.2 v.0 w.1"], {"p": [0, 0, -1]},
    ),
    (
        "attention 4d", 24,
        "(float[2, 4, 6] x, float[6, 8] w, float[6, 8] u, float[6, 8] z, float[8, 5] v, int64[4] p, int64[3] q) "
        "=> (float[2, 4, 5] y) "
        "{ a = MatMul(x, w) b = MatMul(x, u) c = MatMul(x, z) d = Reshape(a, p) e = Reshape(b, p) f = Reshape(c, p) "
        "g = Transpose <perm = [0, 2, 1, 3]>(d) h = Transpose <perm = [0, 2, 1, 3]>(e) "
        "i = Transpose <perm = [0, 2, 1, 3]>(f) o = Attention(g, h, i) t = Transpose <perm = [0, 2, 1, 3]>(o) "
        "s = Reshape(t, q) y = MatMul(s, v) }",
        ["2: u.1 v.0 w.1 z.1", "4: u.1 w.1", "4: v.0 z.1"], {"p": [0, 0, 2, 4], "q": [0, 0, 8]},
    ),
    (
        "attention grouped 3d", 23,
        "(float[2, 4, 6] x, float[6, 16] w, float[6, 8] u, float[6, 8] z, float[16, 5] v) => (float[2, 4, 5] y) "
        "{ a = MatMul(x, w) b = MatMul(x, u) c = MatMul(x, z) "
        "o = Attention <q_num_heads = 4, kv_num_heads = 2>(a, b, c) y = MatMul(o, v) }",
        ["2: u.1 v.0 w.1 z.1", "2: v.0 w.1", "4: u.1 w.1", "4: v.0 z.1"], {},
    ),
    (
        "rotary", 23,
        "(float[2, 3, 6] x, float[6, 16] w, float[6, 16] u, float[6, 16] z, float[16, 5] v, float[2, 3, 4] c, "
        "float[2, 3, 4] s) => (float[2, 3, 5] y) "
        "{ a = MatMul(x, w) b = MatMul(x, u) k = MatMul(x, z) d = RotaryEmbedding <num_heads = 2>(a, c, s) "
        "e = RotaryEmbedding <num_heads = 2>(b, c, s) o = Attention <q_num_heads = 2, kv_num_heads = 2>(d, e, k) "
        "y = MatMul(o, v) }",
        ["2: u.1 v.0 w.1 z.1", "4: c.2 s.2 u.1 w.1", "8: v.0 z.1"], {},
    ),
    (
        "fused conv", 17,
        f"{HEAD}, float[8, 8, 3, 3] u, float[8] b) => (float[2, 5, 8, 8] y) "
        f"{{ h = {CONV}(x, w) a = com.microsoft.FusedConv <pads = [1, 1, 1, 1], activation = \"Relu\">(h, u, b, h) "
        f"y = {CONV}(a, v) }}",
        ["8: b.0 u.0 u.1 v.1 w.0"], {},
    ),
    (
        "fused matmul and bias gelu", 17,
        "(float[2, 4, 6] x, float[12, 6] w, float[12] b, float[12, 5] v) => (float[2, 4, 5] y) "
        "{ h = com.microsoft.FusedMatMul <transB = 1>(x, w) a = com.microsoft.BiasGelu(h, b) y = MatMul(a, v) }",
        ["12: b.0 v.0 w.0"], {},
    ),
    (
        "fused matmul that moves the first axis", 17,
        "(float[3, 2, 6] x, float[6, 12] w, float[6, 12] u, float[6, 8] v, float[8, 5] z) => (float[3, 2, 5] y) "
        "{ q = MatMul(x, w) k = MatMul(x, u) e = MatMul(x, v) "
        "s = com.microsoft.FusedMatMul <transBatchA = 1, transBatchB = 1, transB = 1>(q, k) "
        "o = com.microsoft.FusedMatMul <transBatchB = 1>(s, e) t = Transpose <perm = [1, 0, 2]>(o) y = MatMul(t, z) }",
        ["12: u.1 w.1", "8: v.1 z.0"], {},
    ),
    (
        "skip layer norm", 17,
        f"{MLP}, float[6, 12] u, float[12] s, float[12] b) => (float[2, 4, 5] y) "
        f"{{ h = MatMul(x, w) k = MatMul(x, u) a = com.microsoft.SkipLayerNormalization(h, k, s, b) "
        f"y = MatMul(a, v) }}",
        ["12: b.0 s.0 u.1 v.0 w.1"], {},
    ),
    (
        "multi head attention", 17,
        "(float[2, 4, 6] x, float[6, 8] w, float[6, 8] u, float[6, 8] z, float[24] b, float[8, 5] v) "
        "=> (float[2, 4, 5] y) "
        "{ a = MatMul(x, w) k = MatMul(x, u) c = MatMul(x, z) "
        "o = com.microsoft.MultiHeadAttention <num_heads = 2>(a, k, c, b) y = MatMul(o, v) }",
        ["2: b.0 u.1 v.0 w.1 z.1", "4: b.0 u.1 w.1", "4: b.0 v.0 z.1"], {},
    ),
    (
        "packed attention", 17,
        "(float[2, 4, 6] x, float[6, 24] w, float[24] b, float[8, 5] v) => (float[2, 4, 5] y) "
        "{ o = com.microsoft.Attention <num_heads = 2>(x, w, b) y = MatMul(o, v) }",
        ["2: b.0 v.0 w.1", "4: b.0 v.0 w.1", "4: b.0 w.1"], {},
    ),
    (
        "reduce over channels", 17,
        f"{MLP}, float[12] s) => (float[2, 4, 5] y) "
        f"{{ h = MatMul(x, w) e = ReduceLogSumExp <axes = [-1]>(h) p = Abs(h) l = ReduceLogSum <axes = [-1]>(p) "
        f"c = Celu(h) k = Add(c, e) m = Add(k, l) a = Mul(m, s) y = MatMul(a, v) }}",
        ["12: s.0 v.0 w.1"], {},
    ),
    (
        "compress and reverse", 17,
        "(float[4, 2, 6] x, float[6, 12] w, float[12, 5] v, bool[4] c, int64[2] n) => (float[4, 2, 5] y) "
        "{ h = MatMul(x, w) k = Compress <axis = 0>(h, c) a = ReverseSequence(k, n) y = MatMul(a, v) }",
        ["12: v.0 w.1"], {"c": [True] * 4, "n": [2, 3]},
    ),
    (
        "one hot", 17,
        "(int64[2, 4] x, int64 d, float[2] t, float[6, 12] w, float[12, 5] v) => (float[2, 4, 5] y) "
        "{ o = OneHot(x, d, t) h = MatMul(o, w) y = MatMul(h, v) }",
        ["12: v.0 w.1"], {"d": 6, "t": [0, 1]},
    ),
    (
        "group query attention", 17,
        "(float[2, 4, 6] x, float[6, 32] w, float[6, 16] u, float[6, 16] z, float[32, 5] v, int32[2] n, int32[1] t) "
        "=> (float[2, 4, 5] y) "
        "{ a = MatMul(x, w) b = MatMul(x, u) c = MatMul(x, z) "
        "o, k, p = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2>(a, b, c, , , n, t) "
        "y = MatMul(o, v) }",
        ["2: u.1 v.0 w.1 z.1", "2: v.0 w.1"], {"n": [3, 3], "t": [4]},
    ),
    (
        "group query attention that rotates pairs of dimensions", 17,
        "(float[2, 4, 6] x, float[6, 128] w, float[6, 64] u, float[6, 64] z, float[128, 5] v, int32[2] n, int32[1] t, "
        "float[9, 16] c, float[9, 16] s) => (float[2, 4, 5] y) { a = MatMul(x, w) b = MatMul(x, u) d = MatMul(x, z) "
        "o, k, p = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2, do_rotary = 1>"
        "(a, b, d, , , n, t, c, s) y = MatMul(o, v) }",
        ["2: c.1 s.1 u.1 v.0 w.1 z.1", "2: u.1 v.0 w.1 z.1", "2: v.0 w.1"], {"n": [3, 3], "t": [4]},
    ),
    (
        "group query attention that rotates neighbouring dimensions", 17,
        "(float[2, 4, 6] x, float[6, 128] w, float[6, 64] u, float[6, 64] z, float[128, 5] v, int32[2] n, int32[1] t, "
        "float[9, 16] c, float[9, 16] s) => (float[2, 4, 5] y) { a = MatMul(x, w) b = MatMul(x, u) d = MatMul(x, z) "
        "o, k, p = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2, do_rotary = 1, rotary_interleaved = 1>"
        "(a, b, d, , , n, t, c, s) y = MatMul(o, v) }",
        ["2: c.1 s.1 u.1 v.0 w.1 z.1", "2: u.1 v.0 w.1 z.1", "2: v.0 w.1"], {"n": [3, 3], "t": [4]},
    ),
    (
        "group query attention that rotates a part of the dimensions", 17,
        "(float[2, 4, 6] x, float[6, 256] w, float[6, 128] u, float[6, 128] z, float[256, 5] v, int32[2] n, int32[1] t, "
        "float[9, 16] c, float[9, 16] s) => (float[2, 4, 5] y) { a = MatMul(x, w) b = MatMul(x, u) d = MatMul(x, z) "
        "o, k, p = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2, do_rotary = 1>"
        "(a, b, d, , , n, t, c, s) y = MatMul(o, v) }",
        ["2: c.1 s.1 u.1 v.0 w.1 z.1", "2: u.1 v.0 w.1 z.1", "2: u.1 v.0 w.1 z.1", "2: v.0 w.1"], {"n": [3, 3], "t": [4]},
    ),
    (
        "group query attention that rotates one block of dimensions", 17,
        "(float[2, 4, 6] x, float[6, 64] w, float[6, 32] u, float[6, 32] z, float[64, 5] v, int32[2] n, int32[1] t, "
        "float[9, 8] c, float[9, 8] s) => (float[2, 4, 5] y) { a = MatMul(x, w) b = MatMul(x, u) d = MatMul(x, z) "
        "o, k, p = com.microsoft.GroupQueryAttention <num_heads = 4, kv_num_heads = 2, do_rotary = 1>"
        "(a, b, d, , , n, t, c, s) y = MatMul(o, v) }",
        ["2: u.1 v.0 w.1 z.1", "2: v.0 w.1"], {"n": [3, 3], "t": [4]},
    ),
    (
        "rotary by onnxruntime", 17,
        "(float[2, 3, 6] x, float[6, 16] w, float[6, 16] u, float[16, 5] v, float[9, 4] c, float[9, 4] s, "
        "int64[2, 3] p) => (float[2, 3, 5] y) "
        "{ a = MatMul(x, w) b = MatMul(x, u) d = com.microsoft.RotaryEmbedding <num_heads = 2>(a, p, c, s) "
        "e = com.microsoft.RotaryEmbedding <num_heads = 2>(b, p, c, s) "
        "o = com.microsoft.MultiHeadAttention <num_heads = 2>(d, e, b) y = MatMul(o, v) }",
        ["2: u.1 v.0 w.1", "4: c.1 s.1 u.1 v.0 w.1"], {"p": [[0, 1, 2], [3, 4, 5]]},
    ),
    (
        "dynamically quantised", 17,
        "(float[2, 4, 6] x, float[6, 8] w, uint8[8, 5] q, float[5] s, uint8[5] z, float[5] b, float[5, 3] v) "
        "=> (float[2, 4, 3] y) "
        "{ h = MatMul(x, w) a = com.microsoft.DynamicQuantizeMatMul(h, q, s, z, b) y = MatMul(a, v) }",
        ["5: b.0 s.0 v.0", "8: w.1"], {},
    ),
    (
        "matmul of integers to float", 17,
        "(float[2, 4, 6] x, float[6, 8] w, uint8[8, 5] q, float[5] s, uint8[5] z, float[5] b, float[5, 3] v) "
        "=> (float[2, 4, 3] y) "
        "{ h = MatMul(x, w) i, t, o = DynamicQuantizeLinear(h) "
        "a = com.microsoft.MatMulIntegerToFloat(i, q, t, s, o, z, b) y = MatMul(a, v) }",
        ["5: b.0 s.0 v.0", "8: w.1"], {},
    ),
    (
        "if", 17,
        "(float[2, 4] x, float[4, 6] w, float[6, 3] v, bool c) => (float[2, 3] y) "
        "{ h = MatMul(x, w) "
        "a = If(c) <then_branch = t () => (float[2, 6] p) { p = Relu(h) }, "
        "else_branch = e () => (float[2, 6] q) { q = Neg(h) }> y = MatMul(a, v) }",
        ["6: v.0 w.1"], {"c": True},
    ),
    (
        "if of different lengths", 17,
        "(float[4, 4] x, float[4, 6] w, float[6, 3] v, bool xc, int64[1] s, int64[1] e) => (float[N, 3] y) "
        "{ h = MatMul(x, w) "
        "a = If(xc) <then_branch = t () => (float[N, 6] p) { p = Relu(h) }, "
        "else_branch = e () => (float[N, 6] q) { q = Slice(h, s, e) }> y = MatMul(a, v) }",
        ["6: v.0 w.1"], {"s": [1], "e": [3]},
    ),
    (
        "columns to image", 18,
        "(float[2, 3, 9] x, float[8, 3, 1] w, int64[2] s, int64[2] k, float[5, 2, 1, 1] v) => (float[2, 5, 4, 4] y) "
        "{ h = Conv(x, w) a = Col2Im(h, s, k) y = Conv(a, v) }",
        ["2: v.1 w.0"], {"s": [4, 4], "k": [2, 2]},
    ),
    (
        "spectrum of each channel", 17,
        "(float[1, 3, 16] x, float[6, 3, 1] w, int64[3] p, int64 t, float[8] f, float[6, 5] v) "
        "=> (float[3, 5, 2, 5] y) "
        "{ h = Conv(x, w) r = Reshape(h, p) s = STFT(r, t, f) a = Transpose <perm = [1, 2, 3, 0]>(s) y = MatMul(a, v) }",
        ["6: v.0 w.0"], {"p": [6, 16, 1], "t": 4},
    ),
    (
        "loss of each place", 13,
        "(float[2, 3, 4] x, float[4, 6] w, int64[2, 6] l, float[3] c, float[6, 5] v) => (float[2, 5] y) "
        "{ h = MatMul(x, w) a = NegativeLogLikelihoodLoss <reduction = \"none\">(h, l, c) y = MatMul(a, v) }",
        ["6: v.0 w.1"], {"l": [[0, 1, 2, 1, 0, 2], [2, 1, 0, 0, 1, 1]]},
    ),
    (
        "mean loss and probabilities", 13,
        "(float[2, 3, 4] x, float[4, 6] w, int64[2, 6] l, float[6, 5] v) => (float z, float[2, 3, 5] y) "
        "{ h = MatMul(x, w) z, a = SoftmaxCrossEntropyLoss(h, l) y = MatMul(a, v) }",
        ["6: v.0 w.1"], {"l": [[0, 1, 2, 1, 0, 2], [2, 1, 0, 0, 1, 1]]},
    ),
    (
        "bits", 26,
        f"{MLP}) => (float[2, 4, 5] y) "
        f"{{ h = MatMul(x, w) b = BitCast <to = 6>(h) a = BitCast <to = 1>(b) y = MatMul(a, v) }}",
        ["12: v.0 w.1"], {},
    ),
    (
        "positions", 17,
        "(float[2, 6] x, float[6, 12] w, float[6, 8] u, float[12, 5] v) => (float[2, 5] y, int64[2, N] p) "
        "{ h = MatMul(x, w) y = MatMul(h, v) k = MatMul(x, u) p = NonZero(k) }",
        ["12: v.0 w.1"], {},
    ),
    (
        "distinct values", 17,
        "(float[2, 6] x, float[6, 12] w, float[6, 8] u, float[12, 5] v) => (float[2, 5] y, float[M] d) "
        "{ h = MatMul(x, w) y = MatMul(h, v) k = MatMul(x, u) d = Unique(k) }",
        ["12: v.0 w.1"], {},
    ),
    (
        "split to a sequence", 13,
        f"{MLP}, int64[2] n) => (float[2, 4, 5] y) "
        f"{{ h = MatMul(x, w) s = SplitToSequence <axis = -1>(h, n) a = ConcatFromSequence <axis = 2>(s) "
        f"y = MatMul(a, v) }}",
        ["4: v.0 w.1", "8: v.0 w.1"], {"n": [8, 4]},
    ),
    (
        "split to a sequence of equal parts", 13,
        f"{MLP.replace('12, 5', '5, 5')}, int64 n, int64 i, int64 j) => (float[2, 4, 5] y) "
        f"{{ h = MatMul(x, w) s = SplitToSequence <axis = -1>(h, n) a = SequenceAt(s, i) b = SequenceAt(s, j) "
        f"g = Sigmoid(b) c = Mul(a, g) y = MatMul(c, v) }}",
        ["2: w.1", "5: v.0 w.1"], {"n": 5, "i": 0, "j": -2},
    ),
    (
        "taken apart", 13,
        f"{MLP}, int64 i, int64 j) => (float[2, 1, 5] y) "
        f"{{ h = MatMul(x, w) s = SplitToSequence <axis = 1>(h) b = SequenceAt(s, i) "
        f"t = SplitToSequence <axis = 1, keepdims = 0>(h) c = SequenceAt(t, j) a = Add(b, c) z = MatMul(a, v) "
        f"y = ReduceMax <axes = [1]>(z) }}",
        ["12: v.0 w.1"], {"i": 2, "j": -1},
    ),
    (
        "stacked", 13,
        f"{MLP}, float[6, 12] u) => (float[2, 2, 4, 5] y) "
        f"{{ h = MatMul(x, w) g = MatMul(x, u) s = SequenceConstruct(h, g) "
        f"a = ConcatFromSequence <axis = 1, new_axis = 1>(s) y = MatMul(a, v) }}",
        ["12: u.1 v.0 w.1"], {},
    ),
    (
        "a list that grows and shrinks", 13,
        f"{MLP.replace('12, 5', '18, 5')}, float[6, 10] u, float[6, 8] z, int64 i, int64 j) => (float[2, 4, 5] y) "
        f"{{ h = MatMul(x, w) g = MatMul(x, u) o = MatMul(x, z) e = SequenceEmpty() s = SequenceInsert(e, h) "
        f"t = SequenceInsert(s, g, i) r = SequenceInsert(t, o) d = SequenceErase(r, j) "
        f"a = ConcatFromSequence <axis = 2>(d) b = MatMul(a, v) n = SequenceLength(d) f = Cast <to = 1>(n) "
        f"y = Mul(b, f) }}",
        ["10: u.1 v.0", "12: w.1", "8: v.0 z.1"], {"i": 0, "j": 1},
    ),
    (
        "a list that a graph returns", 13,
        f"{MLP}, float[6, 8] u) => (float[2, 4, 5] y, seq(float[2, 4, N]) s) "
        f"{{ h = MatMul(x, w) y = MatMul(h, v) g = MatMul(x, u) s = SequenceConstruct(g, h) }}",
        [], {},
    ),
    (
        "a list that branches return", 13,
        f"{MLP}, float[6, 12] u, int64 i, bool xc) => (float[2, 4, 5] y, float[2, 4, 5] z) "
        f"{{ h = MatMul(x, w) g = MatMul(x, u) k = Add(h, h) z = MatMul(k, v) "
        f"s = If (xc) <then_branch = t () => (seq(float[2, 4, 12]) p) {{ p = SequenceConstruct(g) }}, "
        f"else_branch = e () => (seq(float[2, 4, 12]) q) {{ q = SequenceConstruct(g) }}> "
        f"a = SequenceAt(s, i) y = MatMul(a, v) }}",
        [], {"i": 0},
    ),
    (
        "channels times channels", 17,
        "(float[6, 4] x, float[8, 6] w, float[5, 8] v) => (float[5, 4] y) "
        "{ h = MatMul(w, x) t = Transpose(h) g = MatMul(h, t) k = MatMul(g, h) y = MatMul(v, k) }",
        ["8: v.1 w.0"], {},
    ),
    ("unknown operator", 17, f"{MLP}) => (float[2, 4, 5] y) {{ h = MatMul(x, w) a = local.Strange(h) y = MatMul(a, v) }}", [], {}),
]  # fmt: skip  # a table
NAMES = [row[0] for row in TABLE]


def model_of(name: str) -> ModelProto:
    _, opset, graph, _, values = TABLE[NAMES.index(name)]
    return from_text(graph, opset=opset, ir=10 if opset > 20 else 8, values=values)


def signature(combed: Combed) -> list[str]:
    found = []
    for group in combed.groups:
        places = sorted({f"{m.weight.name}.{m.axis}" for m in combed.members(group) if m.weight.is_float})
        found.append(f"{len(group)}: {' '.join(places)}")
    return sorted(found)


@pytest.mark.parametrize("name", NAMES)
def test_signature(name: str) -> None:
    combed = comb(model_of(name))
    assert signature(combed) == TABLE[NAMES.index(name)][3]
    assert combed.unaccounted == []


@pytest.mark.parametrize("name", [n for n in NAMES if TABLE[NAMES.index(n)][3] and n != "broadcast old"])
def test_oracles(name: str) -> None:  # onnxruntime has no Add of opset 6
    model = model_of(name)
    for outcome in (mask_oracle(model), permutation_oracle(model), widen_oracle(model)):
        assert outcome.passed
        assert outcome.groups > 0


def test_what_is_free_changes_no_output() -> None:
    """Of all operators: the weights are random, so that few channels are, such as those that a Slice leaves out."""
    found = 0
    for name in NAMES:
        combed = comb(model_of(name))
        gone = removable(combed, free_channels(combed))
        if not any(gone):
            continue
        found += 1
        small = rewrite(combed, keep_without(combed, gone)).model
        sessions = [open_model(model, threads=1, optimise=False) for model in (combed.folded.model, small)]
        for feed in working_feeds(combed.folded, sessions[0]):
            for before, after in zip(*(execute(session, feed) for session in sessions), strict=True):
                np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6, err_msg=name)
    assert found >= 5


def test_rules_may_use_the_old_names_of_op(monkeypatch: pytest.MonkeyPatch) -> None:
    def old(op: Any) -> None:
        op.hold(1)
        out = regroup(op)
        op.demand_sizes(1, out)
        op.touched += out
        op.set(out)

    name = next(row[0] for row in TABLE if "Reshape(" in row[2])
    monkeypatch.setitem(RULES, ("", "Reshape"), old)
    with pytest.warns(
        DeprecationWarning, match=r"Op\.(hold|demand_sizes|touched) is now Op\.\w+; .* in version"
    ) as caught:
        combed = comb(model_of(name))
    assert signature(combed) == TABLE[NAMES.index(name)][3]
    assert combed.unaccounted == []
    assert {str(each.message).split()[0] for each in caught} == {"Op.hold", "Op.demand_sizes", "Op.touched"}


def test_an_operator_without_a_rule_keeps_its_channels_and_says_so() -> None:
    combed = comb(model_of("unknown operator"))
    assert combed.without_rule == {"local::Strange": "a"}
    assert any("no rule" in reason for frozen in combed.frozen() for reason in frozen.reasons)


def sampled(name: str) -> bool:
    """A fixed half of the official tests; all of them run in benchmarks/coverage/operators.py."""
    # onnxruntime updates the running mean of a BatchNormalization in training mode in place, input or not.
    return zlib.crc32(name.encode()) % 2 == 0 and "expanded" not in name and "training_mode" not in name


@pytest.mark.parametrize("constants", [False, True])
def test_official_operator_tests_with_free_axes(constants: bool) -> None:
    pruned = 0
    for case in operator_cases():
        model = set_free(case, constants=constants) if sampled(case.name) else None
        if model is None:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                state = cpd.run("comb, score{kind='random'}, allocate, prune", model)
                assert state.combed is not None
                assert state.combed.unaccounted == [], case.name
                cpd.run("verify", state)
        except (cpd.TargetError, cpd.UnsupportedError, cpd.DataError):
            continue
        except cpd.InconclusiveError:  # thresholds that random inputs do not reach
            assert "shrink" in case.name or "thresholded" in case.name
        pruned += 1
    assert pruned > 80


def test_every_rule_is_exercised() -> None:
    exercised = {("", n.op_type) for case in operator_cases() for n in case.model.graph.node}
    for name in NAMES:
        exercised |= {(n.domain, n.op_type) for n in model_of(name).graph.node}
    assert sorted(set(RULES) - exercised - set(ELSEWHERE)) == []
    assert sorted(set(ELSEWHERE) & exercised) == []


CONTRIB = "com.microsoft"
GRAPHS = "random graphs, in test_fuzz.py and benchmarks/robustness/fuzz.py"
# Rules that no table row or official test holds, and what does.
ELSEWHERE = {
    ("", "SimplifiedLayerNormalization"): "shares its rule with LayerNormalization",
    ("", "GlobalLpPool"): GRAPHS,
    ("", "MaxRoiPool"): GRAPHS,
    ("", "RandomNormalLike"): GRAPHS,
    ("", "Multinomial"): GRAPHS,
    ("", "RandomNormal"): GRAPHS,
    ("", "RandomUniform"): GRAPHS,
    (CONTRIB, "Gelu"): GRAPHS,
    (CONTRIB, "QuickGelu"): GRAPHS,
    (CONTRIB, "FastGelu"): GRAPHS,
    (CONTRIB, "FusedGemm"): GRAPHS,
    (CONTRIB, "TransposeMatMul"): GRAPHS,
    (CONTRIB, "SkipSimplifiedLayerNormalization"): GRAPHS,
    (CONTRIB, "QuantizeLinear"): GRAPHS,
    (CONTRIB, "DequantizeLinear"): GRAPHS,
    ("", "DequantizeLinear"): GRAPHS,
    ("", "BitShift"): GRAPHS,
    (CONTRIB, "QLinearSigmoid"): GRAPHS,
    (CONTRIB, "QLinearLeakyRelu"): GRAPHS,
    (CONTRIB, "QLinearMul"): GRAPHS,
    (CONTRIB, "QLinearAdd"): GRAPHS,
    (CONTRIB, "QLinearConcat"): GRAPHS,
    (CONTRIB, "QLinearGlobalAveragePool"): GRAPHS,
    (CONTRIB, "QLinearAveragePool"): "a quantised model, in tests/deploy/test_c_source.py",
    (CONTRIB, "QGemm"): GRAPHS,
    (CONTRIB, "DynamicQuantizeLSTM"): GRAPHS,
    (CONTRIB, "EmbedLayerNormalization"): GRAPHS,
    (CONTRIB, "GroupNorm"): "onnxruntime has it on GPUs alone",
    (CONTRIB, "MatMulNBits"): GRAPHS,
    (CONTRIB, "GatherBlockQuantized"): "test_rare_operands.py",
    ("onnx.brevitas", "Quant"): "onnxruntime does not run it",
    ("onnx.brevitas", "BipolarQuant"): "onnxruntime does not run it",
    ("qonnx.custom_op.general", "Quant"): "onnxruntime does not run it",
    ("qonnx.custom_op.general", "BipolarQuant"): "onnxruntime does not run it",
}
CONTRIB_ROWS = (
    "CDist", "CausalConvWithState", "ConvTransposeWithDynamicPads", "CropAndResize", "ExpandDims", "GatedAdd",
    "GatedRMSNorm", "GatherND", "GridSample", "Inverse", "LinearAttention", "LinearAttentionGate", "MRotaryEmbedding",
    "MatMulBnb4", "MaxpoolWithMask", "MoE", "NhwcMaxPool", "Pad", "QAttention", "QEmbedLayerNormalization",
    "QLinearConv", "QLinearSoftmax", "QLinearWhere", "QMoE", "ScaledSiLU", "Trilu", "UnfoldTensor",
)  # fmt: skip  # a table
"""Operators of onnxruntime with rows in test_contrib.py."""
ELSEWHERE |= {(CONTRIB, name): "test_contrib.py" for name in CONTRIB_ROWS}


def test_external_rules_share_their_function() -> None:
    assert RULES[("", "Upsample")] is RULES[("", "Resize")]
    assert RULES[(CONTRIB, "FastGelu")] is RULES[(CONTRIB, "BiasGelu")]


def quantized_convolutions() -> ModelProto:
    """Two convolutions with int8 weights per channel, as onnxruntime's quantiser writes them."""
    rng = np.random.default_rng(0)
    tensors, nodes = [], []
    for number, (out, inner) in enumerate(((8, 3), (5, 8))):
        w = rng.integers(-100, 100, (out, inner, 3, 3)).astype(np.int8)
        bias = rng.integers(-50, 50, out).astype(np.int32)
        scale = rng.random(out).astype(np.float32) / 50
        for name, array in (
            ("w", w),
            ("b", bias),
            ("s", scale),
            ("z", np.zeros(out, np.int8)),
            ("bz", np.zeros(out, np.int32)),
        ):
            tensors.append(numpy_helper.from_array(array, f"{name}{number}"))
        nodes += [
            helper.make_node("DequantizeLinear", [f"w{number}", f"s{number}", f"z{number}"], [f"wf{number}"], axis=0),
            helper.make_node("DequantizeLinear", [f"b{number}", f"s{number}", f"bz{number}"], [f"bf{number}"], axis=0),
            helper.make_node("Conv", [f"h{number}", f"wf{number}", f"bf{number}"], [f"h{number + 1}"]),
        ]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("h0", [1, 3, 9, 9]), ("h2", [1, 5, 5, 5]))
    ]
    graph = helper.make_graph(nodes, "qdq", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_quantized_weights_per_channel() -> None:
    model = quantized_convolutions()
    combed = comb(model)
    assert [len(group) for group in combed.groups] == [8]
    places = {f"{m.weight.name}.{m.axis}" for m in combed.members(combed.groups[0])}
    assert places == {"w0.0", "b0.0", "s0.0", "z0.0", "bz0.0", "w1.1"}
    assert mask_oracle(model).passed
    assert permutation_oracle(model).passed
