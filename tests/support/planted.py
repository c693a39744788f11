"""Planted defects: small networks with all kinds of outputs, and pruned models of them with one defect each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

import cpd_onnx as cpd
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.allocation import Budget, allocate
from cpd_onnx.channels.combing import comb
from cpd_onnx.channels.groups import Combed
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.proof.comparison import WRONG
from cpd_onnx.proof.proving import verify
from cpd_onnx.rewrite.rewriter import rewrite
from cpd_onnx.scores.registry import score
from tests.support.models import from_text

# Networks: a stem, a residual block, logits `l`, and what becomes of them.

CONV = "Conv <pads = [1, 1, 1, 1]>"
WEIGHTS = (
    "float[8, 3, 3, 3] w1, float[8] b1, float[10, 8, 3, 3] w2, float[10] b2, float[8, 10, 3, 3] w3, float[8] b3, "
    "float[6, 8, 1, 1] w4, float[6] b4"
)
BODY = (
    f"c1 = {CONV}(x, w1, b1) r1 = LeakyRelu <alpha = 0.1>(c1) c2 = {CONV}(r1, w2, b2) r2 = Relu(c2) "
    f"c3 = {CONV}(r2, w3, b3) s = Add(r1, c3) r3 = Relu(s) l = Conv(r3, w4, b4)"
)
ENDINGS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "plain": ("", "float[2, 6, 8, 8] y", "y = Identity(l)", {}),
    "argmax": ("", "int64[2, 8, 8] y", "y = ArgMax <axis = 1, keepdims = 0>(l)", {}),
    "argmax and sigmoid": (
        "", "int64[2, 8, 8] y, float[2, 6, 8, 8] z", "y = ArgMax <axis = 1, keepdims = 0>(l) z = Sigmoid(l)", {},
    ),
    "topk": (
        "int64[2] f, int64[1] k", "int64[2, 20] i", "r = Reshape(l, f) v, i = TopK(r, k)", {"f": [2, -1], "k": 20},
    ),
    "picked by topk": (
        "int64[2] f, int64[1] k", "float[2, 20] y",
        "r = Reshape(l, f) m = Abs(r) v, i = TopK(m, k) y = GatherElements <axis = 1>(r, i)", {"f": [2, -1], "k": 20},
    ),
    "topk of an input": (
        "int64[2] f, int64[1] k", "float[2, 6, 8, 8] y, int64[2, 192] i",
        "y = Identity(l) r = Reshape(x, f) v, i = TopK(r, k)", {"f": [2, -1], "k": 192},
    ),
    "nms": (
        "int64[2] split, int64[3] f, int64[3] g, int64 most, float overlap", "int64[N, 3] y",
        "b, c = Split <axis = 1>(l, split) bf = Reshape(b, f) bt = Transpose <perm = [0, 2, 1]>(bf) cf = Reshape(c, g) "
        "y = NonMaxSuppression(bt, cf, most, overlap)",
        {"split": [4, 2], "f": [2, 4, -1], "g": [2, 2, -1], "most": 10, "overlap": 0.5},
    ),
    "comparison": ("float t", "bool[2, 6, 8, 8] y", "y = Greater(l, t)", {"t": 0.5}),
    "masked by a comparison": (
        "float t", "float[2, 6, 8, 8] y", "g = Greater(l, t) h = Cast <to = 1>(g) y = Mul(l, h)", {"t": 0.5},
    ),
    "rounded": ("", "float[2, 6, 8, 8] y", "y = Round(l)", {}),
    "image in steps": (
        "float low, float high, float k", "float[2, 6, 8, 8] y",
        "m = Mul(l, k) r = Round(m) c = Clip(r, low, high) y = Div(c, k)", {"low": -100.0, "high": 100.0, "k": 32.0},
    ),
    "image in bytes": (
        "float low, float high, float k", "uint8[2, 6, 8, 8] y",
        "m = Mul(l, k) r = Round(m) c = Clip(r, low, high) y = Cast <to = 2>(c)", {"low": 0.0, "high": 255.0, "k": 64.0},
    ),
    "sigmoid": ("float k", "float[2, 6, 8, 8] y", "m = Mul(l, k) y = Sigmoid(m)", {"k": 100.0}),
    "softmax": ("float k", "float[2, 6, 8, 8] y", "m = Mul(l, k) y = Softmax <axis = 1>(m)", {"k": 100.0}),
    "tanh": ("float k", "float[2, 6, 8, 8] y", "m = Mul(l, k) y = Tanh(m)", {"k": 100.0}),
    "clip": ("float low, float high", "float[2, 6, 8, 8] y", "y = Clip(l, low, high)", {"low": 0.0, "high": 0.01}),
    "dead rectifier": ("float k", "float[2, 6, 8, 8] y", "m = Sub(l, k) y = Relu(m)", {"k": 1e6}),
    "boxes beside scores": (
        "int64[2] split, float k", "float[2, 6, 8, 8] y",
        "b, c = Split <axis = 1>(l, split) m = Mul(b, k) p = Sigmoid(c) q = Div(p, k) y = Concat <axis = 1>(m, q)",
        {"split": [4, 2], "k": 1000.0},
    ),
    "chaotic": ("float k", "float[2, 6, 8, 8] y", "m = Mul(l, k) y = Sin(m)", {"k": 1e5}),
    "one of two chaotic": (
        "float k", "float[2, 6, 8, 8] y, float[2, 3, 8, 8] z", "y = Identity(l) m = Mul(x, k) z = Sin(m)", {"k": 1e7},
    ),
    "behind an if": (
        "float t", "float[2, 6, 8, 8] y",
        "m = ReduceMean <keepdims = 0>(x) c = Greater(m, t) y = If (c) <then_branch = yes () => (float[2, 6, 8, 8] p) "
        "{ p = Sigmoid(l) }, else_branch = no () => (float[2, 6, 8, 8] q) { q = Identity(l) }>", {"t": -100.0},
    ),
}  # fmt: skip  # a table
"""Endings of the networks by name: additional weights, outputs, nodes, and values of weights."""
SILENT = {"dead rectifier"}
"""Networks whose defects random inputs cannot reveal."""


def network(name: str) -> ModelProto:
    """Return a network with one of the endings, or in one of the number formats."""
    if name in FORMATS:
        return FORMATS[name]()
    more, outputs, nodes, values = ENDINGS[name]
    weights = f"{WEIGHTS}, {more}" if more else WEIGHTS
    model = from_text(f"(float[2, 3, 8, 8] x, {weights}) => ({outputs}) {{ {BODY} {nodes} }}", values=values)
    return _balanced(model)


def _balanced(model: ModelProto) -> ModelProto:
    """Return the model with its kernels scaled such that activations have about the same size in all layers."""
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim == 4:
            scaled = array / np.sqrt(np.prod(array.shape[1:]))
            tensor.CopyFrom(numpy_helper.from_array(scaled.astype(array.dtype), tensor.name))
    return model


def _half() -> ModelProto:
    from cpd_onnx.deploy.float16 import to_half

    return to_half(cpd.load(network("plain")), keep_io=True).complete_proto()


def _levels(array: Array, scale: float) -> Array:
    return np.clip(np.round(array / scale), -127, 127).astype(np.int8)


_STEP, _WEIGHT_STEP = 0.05, 0.01


def _quantised_tensors(*, with_bias: bool) -> list[TensorProto]:
    """Return weights in eight bits, biases in 32 bits, scales and zero points."""
    made = []
    for tensor in network("plain").graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.ndim == 4:
            made.append(numpy_helper.from_array(_levels(array, _WEIGHT_STEP), tensor.name))
        elif with_bias:
            levels = np.round(array / (_STEP * _WEIGHT_STEP)).astype(np.int32)
            made.append(numpy_helper.from_array(levels, tensor.name))
        else:
            made.append(tensor)
    for name, value in (
        ("sx", np.float32(_STEP)),
        ("zx", np.int8(3)),
        ("sw", np.float32(_WEIGHT_STEP)),
        ("zw", np.int8(0)),
    ):
        made.append(numpy_helper.from_array(np.asarray(value), name))
    return made


def _model(nodes: list[Any], output: int, tensors: list[TensorProto]) -> ModelProto:
    graph = helper.make_graph(
        nodes, "quantised", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 8, 8])],
        [helper.make_tensor_value_info("y", output, [2, 6, 8, 8])], tensors,
    )  # fmt: skip  # one call
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)], ir_version=8
    )


def _qdq() -> ModelProto:
    """Return the network with QuantizeLinear and DequantizeLinear around each layer."""
    nodes = []

    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def rounded(name: str) -> str:
        quantised = add("QuantizeLinear", [name, "sx", "zx"], f"{name}_q")
        return add("DequantizeLinear", [quantised, "sx", "zx"], f"{name}_d")

    def conv(x: str, number: int, **attributes: Any) -> str:
        weight = add("DequantizeLinear", [f"w{number}", "sw", "zw"], f"w{number}_d")
        return add("Conv", [x, weight, f"b{number}"], f"c{number}", **attributes)

    pads = {"pads": [1, 1, 1, 1]}
    r1 = rounded(add("LeakyRelu", [conv(rounded("x"), 1, **pads)], "r1", alpha=0.1))
    r2 = rounded(add("Relu", [conv(r1, 2, **pads)], "r2"))
    r3 = rounded(add("Relu", [add("Add", [r1, rounded(conv(r2, 3, **pads))], "s")], "r3"))
    add("Identity", [rounded(conv(r3, 4))], "y")
    return _model(nodes, TensorProto.FLOAT, _quantised_tensors(with_bias=False))


def _qoperator() -> ModelProto:
    """Return the network with integer operators and an integer output."""
    nodes = []

    def add(kind: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **attributes))
        return output

    def conv(x: str, number: int, output: str, **attributes: Any) -> str:
        slots = [x, "sx", "zx", f"w{number}", "sw", "zw", "sx", "zx", f"b{number}"]
        return add("QLinearConv", slots, output, **attributes)

    pads, contrib = {"pads": [1, 1, 1, 1]}, "com.microsoft"
    q = add("QuantizeLinear", ["x", "sx", "zx"], "q")
    r1 = add("QLinearLeakyRelu", [conv(q, 1, "c1", **pads), "sx", "zx", "sx", "zx"], "r1", contrib, alpha=0.1)
    r2 = add("Max", [conv(r1, 2, "c2", **pads), "zx"], "r2")
    c3 = conv(r2, 3, "c3", **pads)
    r3 = add("QLinearAdd", [r1, "sx", "zx", c3, "sx", "zx", "sx", "zx"], "s", contrib)
    conv(r3, 4, "y")
    return _model(nodes, TensorProto.INT8, _quantised_tensors(with_bias=True))


def _dynamic() -> ModelProto:
    """Return the network with dynamically quantised activations."""
    text = (
        "(float[4, 12] x, uint8[12, 16] w1, float[16] b1, uint8[16, 20] w2, float[20] b2, uint8[20, 16] w3, float[16] b3, "
        "uint8[16, 6] w4, float[6] b4, uint8 zw, float sw) => (float[4, 6] y) {"
        "q1, s1, z1 = DynamicQuantizeLinear(x) i1 = MatMulInteger(q1, w1, z1, zw) f1 = Cast <to = 1>(i1) "
        "k1 = Mul(s1, sw) m1 = Mul(f1, k1) c1 = Add(m1, b1) r1 = LeakyRelu <alpha = 0.1>(c1) "
        "q2, s2, z2 = DynamicQuantizeLinear(r1) i2 = MatMulInteger(q2, w2, z2, zw) f2 = Cast <to = 1>(i2) "
        "k2 = Mul(s2, sw) m2 = Mul(f2, k2) c2 = Add(m2, b2) r2 = Relu(c2) "
        "c3 = com.microsoft.DynamicQuantizeMatMul(r2, w3, sw, zw, b3) s = Add(r1, c3) r3 = Relu(s) "
        "y = com.microsoft.DynamicQuantizeMatMul(r3, w4, sw, zw, b4) }"
    )
    rng = np.random.default_rng(5)
    shapes = {"w1": (12, 16), "w2": (16, 20), "w3": (20, 16), "w4": (16, 6)}
    values = {name: rng.integers(0, 256, shape) for name, shape in shapes.items()}
    return from_text(text, values=values | {"zw": 131, "sw": 0.004})


FORMATS: dict[str, Callable[[], ModelProto]] = {
    "float16": _half, "int8, QDQ": _qdq, "int8, operators": _qoperator, "int8, dynamic": _dynamic,
}  # fmt: skip  # a table
NETWORKS = (*ENDINGS, *FORMATS)

# Defects.


@dataclass(frozen=True, eq=False)
class Case:
    """A network, the surviving channels, and the removed channels of each group."""

    combed: Combed
    kept: KeepMask
    removed: list[list[int]]

    def pruned(self) -> Model:
        """Return the correctly pruned model."""
        return rewrite(self.combed, self.kept).model

    def otherwise(self, change: Callable[[list[int], int], list[int]], group: int) -> Model:
        """Return the model with other removed channels in one group."""
        removed = [
            change(gone, len(each)) if each.id == group % len(self.combed.groups) else gone
            for gone, each in zip(self.removed, self.combed.groups, strict=True)
        ]
        kept = KeepMask(self.combed.atoms, _channels(self.combed, removed))
        return rewrite(self.combed, kept).model


def _channels(combed: Combed, removed: list[list[int]]) -> Array:
    return np.concatenate([group.channels[gone] for group, gone in zip(combed.groups, removed, strict=True)])


@cache
def case_of(name: str) -> Case:
    """Return a network with half of its channels chosen for removal."""
    combed = comb(cpd.load(network(name)))
    chosen = allocate(combed, score(combed, "random", seed=3), Budget("channels", 0.5))
    kept = chosen.keep_mask(combed)
    return Case(combed, kept, chosen.removed)


def edited(case: Case, name: str, change: Callable[[Array], Array]) -> Model:
    """Return the correctly pruned model with changed values of one weight."""
    model = case.pruned()
    name = next(t.name for t in model.graph.initializer if t.name == name or t.name.startswith(f"{name}_"))
    array = model.array(name)
    model.set_array(name, np.ascontiguousarray(change(array)).astype(array.dtype))
    return model


def first_alone(factor: float) -> Callable[[Array], Array]:
    """Return a change that scales the weights of the first output, within the range of the type."""

    def change(array: Array) -> Array:
        made = array.astype(np.float64)
        made[0] *= factor
        bounds = np.iinfo(array.dtype) if array.dtype.kind in "iu" else None
        return made if bounds is None else np.clip(np.round(made), bounds.min, bounds.max)

    return change


def _alpha(case: Case) -> Model:
    model = case.pruned()
    node = next(n for n in model.graph.node if "LeakyRelu" in n.op_type)
    node.attribute[0].f = 0.12
    return model


def _without(case: Case, slot: int, name: str) -> Model:
    """Return the correctly pruned model in which an addition takes the same input twice: a missing shortcut."""
    model = case.pruned()
    node = next(n for n in model.graph.node if n.output[0] == "s")
    other = [i for i in node.input if i.startswith(name)]
    node.input[slot] = other[0]
    return model


DEFECTS: dict[str, Callable[[Case], Model]] = {
    "inputs of a kernel in another order": lambda case: edited(case, "w3", lambda w: np.roll(w, 1, axis=w.ndim - 3 if w.ndim == 4 else 0)),
    "outputs of a kernel in another order": lambda case: edited(case, "w2", lambda w: np.roll(w, 1, axis=0 if w.ndim == 4 else 1)),
    "bias of the wrong channels": lambda case: edited(case, "b2", lambda b: np.roll(b, 1)),
    "a forgotten bias": lambda case: edited(case, "b1", np.zeros_like),
    "one filter a tenth larger": lambda case: edited(case, "w2", first_alone(1.1)),
    "one filter with its sign changed": lambda case: edited(case, "w3", first_alone(-1)),
    "one element of the last layer": lambda case: edited(case, "w4", lambda w: np.where(np.arange(w.size).reshape(w.shape) == 0, 0, w)),
    "other channels of the first group": lambda case: case.otherwise(lambda gone, size: sorted((g + 1) % size for g in gone), 0),
    "other channels of the second group": lambda case: case.otherwise(lambda gone, size: sorted((g + 1) % size for g in gone), 1),
    "one channel too many": lambda case: case.otherwise(lambda gone, _: gone[1:], 1),
    "one channel too few": lambda case: case.otherwise(lambda gone, size: sorted({*gone, min(set(range(size)) - set(gone))}), 1),
    "a stale attribute": _alpha,
    "a stale size": lambda case: edited(case, "b2", lambda b: np.concatenate([b, b[:1]])),
    "a shortcut that is forgotten": lambda case: _without(case, 0, "c3"),
}  # fmt: skip  # a table


def verdict_of(name: str, defect: str | None = None) -> str:
    """Return the verdict of the proof on a network, with or without a defect."""
    case = case_of(name)
    try:
        model = case.pruned() if defect is None else DEFECTS[defect](case)
        return verify(case.combed, case.kept, model).verdict
    except (cpd.ProofError, cpd.UnsupportedError):
        return WRONG
