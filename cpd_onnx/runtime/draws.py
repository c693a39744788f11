"""The same model with fixed numbers in place of those that it draws at random.

A model that draws numbers gives other outputs in each run, so that two runs cannot be compared. Each operator that
draws is replaced by operators that compute its numbers from their positions: in all models that are compared, alike in
each run. Uniform numbers are the fractional parts of a large multiple of a sine, as in shaders; normal numbers are made
of two of them (Box and Muller, 1958), samples of a distribution by the largest sum of a logarithm and Gumbel noise.
Dropout that is in training mode passes its input on.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from cpd_onnx.ir.model import Array, Model, attributes_of, graphs_of, to_array
from cpd_onnx.ops.traits import traits_of

NOTE = "random numbers that the graph draws are replaced by fixed ones, alike in both models"
"""Sentence that says of a proof what the compared models have in place of random numbers."""
_OLDEST = 9
"""Version of the operator set that has the operators by which numbers are computed (`ConstantOfShape`)."""
_STEPS = (12.9898, 78.233)
"""Angles between the positions of the numbers, for two sequences (those commonly used in shaders)."""
_MULTIPLE = 43758.5453
"""Multiple of the sine of which the fractional part is taken (that commonly used in shaders)."""
_LEAST = 1e-7
"""Smallest number whose logarithm is taken, about one rounding of a float32."""


def draws(model: Model) -> bool:
    """Return whether a model draws random numbers."""
    nodes = [node for graph in graphs_of(model.graph) for node in graph.node]
    nodes += [node for function in model.proto.functions for node in function.node]
    truths = _truths(model)
    return any(_is_drawn(node, truths) for node in nodes)


def with_fixed_draws(model: Model) -> Model:
    """Return a model whose numbers are computed instead of drawn: a copy, or the model itself if it draws none.

    Models of operator sets before version 9 are returned as they are.
    """
    if not draws(model):
        return model
    copy = model.copy()
    truths, names = _truths(copy), copy.names()
    for graph in reversed(list(graphs_of(copy.graph))):
        _replace(graph.node, copy.opset, names, truths)
    for function in copy.proto.functions:
        opset = next((o.version for o in function.opset_import if o.domain in ("", "ai.onnx")), copy.opset)
        _replace(function.node, opset, names, truths)
    return copy


def _truths(model: Model) -> dict[str, bool]:
    """Return the constants by name that say whether a Dropout is in training mode."""
    graphs = list(graphs_of(model.graph))
    flags = {_mode(node) for graph in graphs for node in graph.node if traits_of(node).is_random} - {""}
    found: dict[str, bool] = {}
    for graph in graphs:
        for tensor in graph.initializer:
            if tensor.name in flags:  # that of the main graph may lie in another file
                array = model.array(tensor.name) if model.has(tensor.name) else to_array(tensor)
                found[tensor.name] = bool(array.any())
        for node in graph.node:
            for value in node.attribute if traits_of(node).is_constant and node.output[0] in flags else ():
                if value.name == "value":
                    found[node.output[0]] = bool(to_array(value.t).any())
    return found


def _mode(node: NodeProto) -> str:
    """Return the name of the input that says whether an operator is in training mode, or an empty string."""
    slot = traits_of(node).training_slot
    return "" if slot is None or len(node.input) <= slot else node.input[slot]


def _is_drawn(node: NodeProto, truths: Mapping[str, bool]) -> bool:
    write = _WRITERS.get(node.op_type) if traits_of(node).is_random else None
    if write is _dropout:
        return bool(_mode(node)) and truths.get(_mode(node), True)
    return write is not None


def _replace(nodes: Any, opset: int, names: set[str], truths: Mapping[str, bool]) -> None:
    """Replace the operators that draw in the nodes of a graph or function."""
    if opset < _OLDEST or not any(_is_drawn(node, truths) for node in nodes):
        return
    written: list[NodeProto] = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        if not _is_drawn(copy, truths):
            written.append(copy)
            continue
        drawn = _Drawn(copy, opset, names)
        _WRITERS[copy.op_type](drawn)
        written += drawn.nodes
    del nodes[:]
    nodes.extend(written)


class _Drawn:
    """The nodes that replace one node; the last one has its name and its output."""

    def __init__(self, node: NodeProto, opset: int, names: set[str]) -> None:
        self.node, self.opset, self.names = node, opset, names
        self.attributes = attributes_of(node)
        self.nodes: list[NodeProto] = []
        self.offset = zlib.crc32(node.output[0].encode()) / 2**32  # models that are compared have the same names

    def put(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Append a node, and return the name of its output."""
        name = f"{self.node.output[0]}_drawn"
        while name in self.names:
            name = f"{self.node.output[0]}_drawn_{len(self.names)}"
        self.names.add(name)
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, array: Array) -> str:
        return self.put("Constant", value=numpy_helper.from_array(array))

    def double(self, number: float) -> str:
        return self.constant(np.asarray(number, np.float64))

    def uniform(self, shape: str, step: float = _STEPS[0]) -> str:
        """Return double numbers in [0, 1) in a shape."""
        count = self.put("ReduceProd", self.put("Concat", self.constant(np.ones(1, np.int64)), shape, axis=0))
        ones = self.put("ConstantOfShape", count, value=numpy_helper.from_array(np.ones(1, np.int64)))
        flat = self.put("Reshape", self.put("NonZero", ones), self.constant(np.asarray([-1], np.int64)))
        index = self.put("Cast", flat, to=TensorProto.DOUBLE)
        angle = self.put("Add", self.put("Mul", index, self.double(step)), self.double(self.offset))
        wave = self.put("Mul", self.put("Sin", angle), self.double(_MULTIPLE))
        found = self.put("Sub", wave, self.put("Floor", wave))
        return self.put("Reshape", found, shape, **({"allowzero": 1} if self.opset >= 14 else {}))

    def logarithm(self, x: str) -> str:
        """Return the logarithm of numbers, or of a small one in place of zeros, as float32."""
        least = self.constant(np.asarray(_LEAST, np.float32))
        return self.put("Log", self.put("Max", self.put("Cast", x, to=TensorProto.FLOAT), least))

    def normal(self, shape: str) -> str:
        """Return normal numbers as float32 in a shape."""
        minus, angle = (self.constant(np.asarray(n, np.float32)) for n in (-2.0, 2 * np.pi))
        length = self.put("Sqrt", self.put("Mul", self.logarithm(self.uniform(shape)), minus))
        turn = self.put("Cast", self.uniform(shape, _STEPS[1]), to=TensorProto.FLOAT)
        return self.put("Mul", length, self.put("Cos", self.put("Mul", turn, angle)))

    def scaled(self, x: str, factor: float, shift: float) -> str:
        """Return double numbers: `factor * x + shift`."""
        wide = self.put("Cast", x, to=TensorProto.DOUBLE)
        return self.put("Add", self.put("Mul", wide, self.double(factor)), self.double(shift))

    def ends(self, x: str, default: int | None) -> None:
        """Convert numbers to the type of the node's output: that of its attribute, the default, or of its input."""
        kind = self.attributes.get("dtype", default)
        if kind is None and self.opset < 15:
            kind = TensorProto.FLOAT
        if kind is not None:
            self.put("Cast", x, to=kind)
        else:
            self.put("CastLike", x, self.node.input[0])
        self.nodes[-1].name = self.node.name
        self.nodes[-1].output[0] = self.node.output[0]

    def shape(self) -> str:
        """Return the shape of the output: the attribute, or that of the input."""
        if self.node.input:
            return self.put("Shape", self.node.input[0])
        return self.constant(np.asarray(self.attributes["shape"], np.int64))

    @property
    def default_type(self) -> int | None:
        """Type of the output without an attribute; None for that of the input."""
        return None if self.node.input else TensorProto.FLOAT


def _normal(to: _Drawn) -> None:
    mean, scale = (to.attributes.get(name, value) for name, value in (("mean", 0.0), ("scale", 1.0)))
    to.ends(to.scaled(to.normal(to.shape()), scale, mean), to.default_type)


def _uniform(to: _Drawn) -> None:
    low, high = (to.attributes.get(name, value) for name, value in (("low", 0.0), ("high", 1.0)))
    to.ends(to.scaled(to.uniform(to.shape()), high - low, low), to.default_type)


def _bernoulli(to: _Drawn) -> None:
    probability = to.put("Cast", to.node.input[0], to=TensorProto.DOUBLE)
    to.ends(to.put("Less", to.uniform(to.shape()), probability), None)


def _multinomial(to: _Drawn) -> None:
    sizes = to.shape()
    batch, classes = (to.put("Gather", sizes, to.constant(np.asarray([place], np.int64))) for place in (0, 1))
    samples = to.constant(np.asarray([to.attributes.get("sample_size", 1)], np.int64))
    inner = to.put("Neg", to.logarithm(to.uniform(to.put("Concat", batch, samples, classes, axis=0))))
    noise = to.put("Neg", to.logarithm(inner))
    logarithms = to.put("Cast", to.node.input[0], to=TensorProto.FLOAT)
    apart = to.put("Reshape", logarithms, to.constant(np.asarray([0, 1, -1], np.int64)))
    to.ends(to.put("ArgMax", to.put("Add", apart, noise), axis=2, keepdims=0), TensorProto.INT32)


def _dropout(to: _Drawn) -> None:
    del to.node.input[1:]
    to.nodes.append(to.node)


_WRITERS: dict[str, Callable[[_Drawn], None]] = {
    "Bernoulli": _bernoulli, "Dropout": _dropout, "Multinomial": _multinomial,
    "RandomNormal": _normal, "RandomNormalLike": _normal,
    "RandomUniform": _uniform, "RandomUniformLike": _uniform,
}  # fmt: skip  # a table
