"""Weights that a graph computes from other weights alone, evaluated once.

Spectral and weight normalisation, weight standardisation and parameters cut from one flat buffer reach a file as
nodes between the stored tensors and the operator that uses them. Channels of such arithmetic are no channels of the
network: no activation runs through them, and taking some away changes what the others are. So the result is written
down as an initializer under the name that it has already, and is from then on a weight like any other; nodes and
tensors that nothing uses any more are dropped.

What only moves elements about (Transpose, Reshape, Cast and the like) is left alone: pruning follows it through to the
stored tensor. So are quantised weights, and arithmetic that makes much out of little (tables of angles, masks, factors
of a product): to write that down would let the file grow.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from cpd_onnx.ir.model import (
    Array,
    FunctionName,
    Lazy,
    Model,
    bodies_of,
    called_by,
    element_bytes,
    element_type,
    functions_of,
    graphs_of,
)
from cpd_onnx.ops.traits import traits_of

Known: TypeAlias = "Mapping[str, tuple[int, tuple[int, ...] | None]]"
"""Element type and shape of tensors by name."""

_TRAINED = {
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.INT8,
    TensorProto.UINT8,
}  # fmt: skip  # a table
_FEWEST = 8
"""Constants up to this many elements are settings of the arithmetic (an epsilon, an exponent), no weights."""
_DOMAINS = {"", "ai.onnx", "com.microsoft"}
_GROWTH = 2.0
"""A result takes at most so many times the bytes of what it is computed from: float16 may become float32."""
_SWELL = 16
"""The same of the elements of what is computed on the way."""
_SLACK = 1 << 16
"""Elements, or bytes, that do not matter."""


@dataclass(frozen=True)
class Evaluated:
    """A model with results of weight arithmetic as initializers.

    Attributes:
        model: a copy of the model.
        weights: for each result, by name, the stored weights that it was computed from.
        nodes: what is gone since nothing uses it any more, operator and name of each.
        tensors: the same of stored tensors.

    """

    model: Model
    weights: Mapping[str, tuple[str, ...]]
    nodes: tuple[str, ...]
    tensors: tuple[str, ...]


def evaluated(model: Model, known: Known) -> Evaluated | None:
    """Evaluate the weight arithmetic of a model; None if it has none that is worth it, or onnxruntime does not run it.

    The same model gives the same bytes with one version of onnxruntime on one kind of processor.
    """
    arrays: list[Array | None] = []
    feed: dict[str, Array] = {}
    for constant in _Finder(model.graph, known, functions_of(model.proto)).wanted():
        proto, feed = _part(model, constant, feed)
        arrays.append(_run(proto, feed))
    if all(array is None for array in arrays):
        return None
    copy = model.copy()
    wanted = _Finder(copy.graph, known, functions_of(model.proto)).wanted()
    return _Writer(copy, [(c, a) for c, a in zip(wanted, arrays, strict=True) if a is not None]).run()


@dataclass(eq=False)
class _Constant:
    """A tensor that is stored, or computed from stored ones alone.

    Attributes:
        name, dtype, shape: as in the file; the shape is None if it is not known.
        graph: the graph that holds it or the node that makes it.
        position: of that node, -1 for an initializer.
        inputs: what it is computed from.
        is_computed: whether more was done on the way than moving elements about.

    """

    name: str
    dtype: int
    shape: tuple[int, ...] | None
    graph: GraphProto
    position: int = -1
    inputs: Sequence[_Constant] = ()
    is_computed: bool = False

    @property
    def node(self) -> NodeProto | None:
        """The node that makes it, None for an initializer."""
        return self.graph.node[self.position] if self.position >= 0 else None

    @property
    def is_stored(self) -> bool:
        """Whether its elements lie in the file."""
        return not self.inputs

    @cached_property
    def size(self) -> float:
        """Number of elements; infinite if it is not known."""
        return math.inf if self.shape is None else math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """Bytes that its elements take."""
        return self.size * element_bytes(self.dtype)

    @cached_property
    def largest(self) -> float:
        """Elements of the largest tensor on the way to it."""
        return max([self.size, *(each.largest for each in self.inputs)])

    @cached_property
    def sources(self) -> frozenset[_Constant]:
        """The weights that it is computed from."""
        if self.is_stored:
            return frozenset([self] if self.dtype in _TRAINED and self.size > _FEWEST else [])
        return frozenset().union(*(each.sources for each in self.inputs))

    @property
    def is_affordable(self) -> bool:
        """Whether its value may be written down in place of its sources."""
        there = sum(source.size for source in self.sources)
        stored = sum(source.bytes for source in self.sources)
        return self.bytes <= _GROWTH * stored and self.largest <= _SWELL * there + _SLACK

    def steps(self) -> Iterator[_Constant]:
        """What it is computed from and itself, each once, in an order in which it can be computed."""
        seen: set[int] = set()
        waiting = [(self, False)]
        while waiting:
            constant, is_ready = waiting.pop()
            if is_ready:
                yield constant
            elif id(constant) not in seen:
                seen.add(id(constant))
                waiting.append((constant, True))
                waiting += [(each, False) for each in reversed(constant.inputs)]


@dataclass(eq=False)
class _Finder:
    """Finds the constants of a graph and of those inside it, and which of them enter the network."""

    graph: GraphProto
    known: Known
    functions: Container[FunctionName]
    taken: dict[int, _Constant] = field(default_factory=dict)
    handed_out: set[int] = field(default_factory=set)

    def wanted(self) -> list[_Constant]:
        """The constants whose values are to be written down, in the order of the graph."""
        self.sweep(self.graph, {})
        results = [
            constant
            for constant in self.taken.values()
            if not constant.is_stored and constant.dtype in _TRAINED and id(constant) not in self.handed_out
        ]
        chosen = {id(c) for c in results if c.is_computed and c.sources and c.is_affordable}
        for source in dict.fromkeys(source for c in results for source in _in_order(c)):
            chosen |= self.parts(source, chosen)
        return [constant for constant in results if id(constant) in chosen]

    def parts(self, source: _Constant, chosen: set[int]) -> set[int]:
        """The parts that a buffer is cut into, if it serves nothing else and they are not much more than it.

        What has as many elements is no part but the same in another order, as the gates of recurrent layers.
        """
        if id(source) in self.taken or id(source) in self.handed_out:
            return set()
        parts = [constant for constant in self.taken.values() if source in constant.sources]
        there = frozenset[_Constant]().union(*(part.sources for part in parts))
        fits = sum(part.bytes for part in parts) <= _GROWTH * sum(each.bytes for each in there)
        if len(parts) < 2 or not fits or any(part.dtype not in _TRAINED for part in parts):
            return set()
        known = all((part.size < source.size and part.is_affordable) or id(part) in chosen for part in parts)
        return {id(part) for part in parts if id(part) not in self.handed_out} if known else set()

    def sweep(self, graph: GraphProto, outer: Mapping[str, _Constant]) -> None:
        """Go through a graph that sees some constants outside."""
        here = {name: constant for name, constant in outer.items() if name not in {v.name for v in graph.input}}
        for tensor in graph.initializer:
            here[tensor.name] = _Constant(tensor.name, tensor.data_type, tuple(tensor.dims), graph)
        for position, node in enumerate(graph.node):
            if self.is_constant(node, here):
                made = self.made(graph, position, node, here)
                here |= {constant.name: constant for constant in made}
                continue
            self.taken |= {id(here[name]): here[name] for name in node.input if name in here}
            for body in bodies_of(node).values():
                self.sweep(body, here)
        self.handed_out |= {id(here[output.name]) for output in graph.output if output.name in here}

    def is_constant(self, node: NodeProto, here: Mapping[str, _Constant]) -> bool:
        """Whether a node computes the same whatever the inputs of the model."""
        if node.op_type == "Constant" and node.domain in _DOMAINS:
            return True
        own = traits_of(node)
        # Quantizers stand for the format in which a weight is stored.
        if node.domain not in _DOMAINS or own.is_random or own.is_quantizer or called_by(node) in self.functions:
            return False
        given = [name for name in node.input if name]
        return bool(given) and all(name in here for name in given) and not bodies_of(node)

    def made(
        self, graph: GraphProto, position: int, node: NodeProto, here: Mapping[str, _Constant]
    ) -> Iterator[_Constant]:
        """The outputs of a node."""
        inputs, own = [here[name] for name in node.input if name], traits_of(node)
        weights = [constant for constant in inputs if constant.dtype in _TRAINED]
        for name in filter(None, node.output):
            dtype, shape = self.known.get(name, (TensorProto.UNDEFINED, None))
            constant = _Constant(name, dtype, shape, graph, position, inputs)
            is_new = not (own.moves_elements or own.casts or own.fills_sizes or own.reads_sizes) and bool(inputs)
            constant.is_computed = dtype in _TRAINED and (is_new or any(c.is_computed for c in weights))
            yield constant


def _in_order(constant: _Constant) -> Iterator[_Constant]:
    """The sources of a constant, the same way in each run."""
    return (step for step in constant.steps() if step in constant.sources)


def _stored(constant: _Constant) -> Iterator[str]:
    """Names of the stored numbers that a constant is computed from, sizes and indices apart."""
    return (step.name for step in constant.steps() if step.is_stored and step.dtype in _TRAINED)


def _part(model: Model, constant: _Constant, before: Mapping[str, Array]) -> tuple[ModelProto, dict[str, Array]]:
    """The part of a model that computes a constant, and what enters it; `before` is what the last one took."""
    proto, feed = ModelProto(ir_version=model.proto.ir_version), dict[str, Array]()
    proto.opset_import.extend(model.proto.opset_import)
    proto.graph.name = "weights"
    nodes: dict[tuple[int, int], NodeProto] = {}
    for step in constant.steps():
        if step.node is not None:
            nodes[(id(step.graph), step.position)] = step.node
        elif step.graph is not model.graph:
            proto.graph.initializer.append(next(t for t in step.graph.initializer if t.name == step.name))
        elif element_type(step.dtype).kind in "fiub":
            proto.graph.input.append(helper.make_tensor_value_info(step.name, step.dtype, step.shape))
            feed[step.name] = before[step.name] if step.name in before else model.array(step.name)
        else:
            proto.graph.initializer.append(numpy_helper.from_array(model.array(step.name), step.name))
    proto.graph.node.extend(nodes.values())
    proto.graph.output.append(helper.make_tensor_value_info(constant.name, constant.dtype, None))
    return proto, feed


def _run(proto: ModelProto, feed: Mapping[str, Array]) -> Array | None:
    """The only output of a model, None where onnxruntime does not run it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        (array,) = session.run(None, dict(feed))
    except Exception as error:  # onnxruntime raises classes of its own that share no base but Exception
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        return None
    return np.asarray(array)


class _Writer:
    """Puts results into a copy of the model and drops what nothing uses any more."""

    def __init__(self, model: Model, results: Sequence[tuple[_Constant, Array]]) -> None:
        self.model, self.arrays = model, results
        self.results = [constant for constant, _ in results]
        graphs = list(graphs_of(model.graph))
        self.uses = Counter(name for graph in graphs for node in graph.node for name in node.input)
        self.uses.update(output.name for graph in graphs for output in graph.output)
        self.order = {id(graph): place for place, graph in enumerate(graphs)}
        self.names = model.names()

    def run(self) -> Evaluated:
        steps = list({id(step): step for result in self.results for step in result.steps()}.values())
        weights = {result.name: tuple(sorted(_stored(result))) for result in self.results}
        nodes = {(id(step.graph), step.position): step for step in steps if step.node is not None}
        dead = [step for step in sorted(nodes.values(), key=self.place, reverse=True) if self.is_unused(step)]
        words = [f"{step.node.op_type} {step.node.name or step.name!r}" for step in reversed(dead) if step.node]
        stored = [step for step in steps if step.position < 0 and not self.uses[step.name]]
        for step in dead:
            del step.graph.node[step.position]
        for step in stored:
            self.drop(step)
        for result, array in self.arrays:
            self.store(result, array)
        gone = {step.name for step in (*dead, *stored)} - weights.keys()
        for graph in graphs_of(self.model.graph):
            _without(graph.value_info, gone)
        return Evaluated(self.model, weights, tuple(words), tuple(step.name for step in stored))

    def place(self, step: _Constant) -> tuple[int, int]:
        """Where a node stands; graphs inside others come after them."""
        return self.order[id(step.graph)], step.position

    def is_unused(self, step: _Constant) -> bool:
        """Whether a node can go; what it takes has a use less then, and what it shares a name with has one no more."""
        node = step.node
        assert node is not None
        results = {result.name for result in self.results if result.graph is step.graph}
        if any(self.uses[name] and name not in results for name in node.output):
            for number, name in enumerate(node.output):
                if name in results:
                    node.output[number] = self.fresh(f"{name}_unused")
            return False
        self.uses.subtract(node.input)
        return True

    def fresh(self, wish: str) -> str:
        name, number = wish, 1
        while name in self.names:
            name, number = f"{wish}_{number}", number + 1
        self.names.add(name)
        return name

    def drop(self, step: _Constant) -> None:
        """Take a stored tensor out of the file."""
        if step.graph is self.model.graph:
            self.model.drop_initializer(step.name)
        else:
            _without(step.graph.initializer, {step.name})
        _without(step.graph.input, {step.name})

    def store(self, result: _Constant, array: Array) -> None:
        """Put a result into the graph that computed it."""
        if result.graph is not self.model.graph:
            result.graph.initializer.append(numpy_helper.from_array(array, result.name))
            return
        self.model.add_initializer(result.name, Lazy(array.dtype, array.shape, lambda: array))
        if self.model.proto.ir_version < 4:
            self.model.graph.input.append(helper.make_tensor_value_info(result.name, result.dtype, array.shape))


def _without(entries: Any, names: set[str]) -> None:
    """Delete the entries of some names from a list of protobuf."""
    for position in reversed([n for n, entry in enumerate(entries) if entry.name in names]):
        del entries[position]
