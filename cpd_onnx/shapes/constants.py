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
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

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
from cpd_onnx.shapes.editor import Editor
from cpd_onnx.shapes.values import Evaluated, Scope, Value

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


def evaluated(model: Model, scope: Scope) -> Evaluated | None:
    """Evaluate the weight arithmetic of a model; None if it has none that is worth it, or onnxruntime does not run it.

    The same model gives the same bytes with one version of onnxruntime on one kind of processor.
    """
    results: list[tuple[_Constant, Array]] = []
    feed: dict[str, Array] = {}
    for constant in _Finder(model).wanted(scope):
        proto, feed = _part(model, constant, feed)
        array = _run(proto, feed)
        if array is not None:
            results.append((constant, array))
    return _Writer(model.copy(), scope, results).run() if results else None


@dataclass(eq=False)
class _Constant:
    """A tensor that is stored, or computed from stored ones alone.

    Attributes:
        value: what is known of it.
        scope: the graph that holds it or the node that makes it.
        position: of that node, -1 for an initializer.
        inputs: what it is computed from.
        is_computed: whether more was done on the way than moving elements about.

    """

    value: Value
    scope: Scope
    position: int = -1
    inputs: Sequence[_Constant] = ()
    is_computed: bool = False

    @property
    def name(self) -> str:
        """As in the file."""
        return self.value.name

    @property
    def node(self) -> NodeProto | None:
        """The node that makes it, None for an initializer."""
        return self.scope.nodes[self.position] if self.position >= 0 else None

    @property
    def is_weight(self) -> bool:
        """Whether it holds numbers as they are trained, and no sizes or indices."""
        return self.value.dtype in _TRAINED

    @property
    def is_stored(self) -> bool:
        """Whether its elements lie in the file."""
        return not self.inputs

    @cached_property
    def size(self) -> float:
        """Number of elements; infinite if it is not known."""
        return math.inf if self.value.shape is None else math.prod(self.value.shape)

    @property
    def bytes(self) -> float:
        """Bytes that its elements take."""
        return self.size * element_bytes(self.value.dtype)

    @cached_property
    def largest(self) -> float:
        """Elements of the largest tensor on the way to it."""
        return max([self.size, *(each.largest for each in self.inputs)])

    @cached_property
    def sources(self) -> frozenset[_Constant]:
        """The weights that it is computed from."""
        if self.is_stored:
            return frozenset([self] if self.is_weight and self.size > _FEWEST else [])
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
    """Finds the constants of a model, and which of them enter the network."""

    model: Model
    taken: dict[int, _Constant] = field(default_factory=dict)
    handed_out: set[int] = field(default_factory=set)

    def wanted(self, scope: Scope) -> list[_Constant]:
        """The constants whose values are to be written down, in the order of the graph."""
        self.sweep(scope, {})
        results = [c for c in self.taken.values() if not c.is_stored and c.is_weight and id(c) not in self.handed_out]
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
        if len(parts) < 2 or not fits or not all(part.is_weight for part in parts):
            return set()
        known = all((part.size < source.size and part.is_affordable) or id(part) in chosen for part in parts)
        return {id(part) for part in parts if id(part) not in self.handed_out} if known else set()

    def sweep(self, scope: Scope, outer: Mapping[str, _Constant]) -> None:
        """Go through a graph that sees some constants outside."""
        here = {name: constant for name, constant in outer.items() if name not in scope.inputs}
        stored = [value for value in scope.values.values() if isinstance(value.source, TensorProto)]
        here |= {value.name: _Constant(value, scope) for value in stored}
        for position, node in enumerate(scope.nodes):
            if self.is_constant(node, here):
                here |= {constant.name: constant for constant in _made(scope, position, node, here)}
                continue
            self.taken |= {id(here[name]): here[name] for name in node.input if name in here}
            for body in scope.bodies.get(position, {}).values():
                if not body.function:
                    self.sweep(body, here)
        self.handed_out |= {id(here[name]) for name in scope.outputs if name in here}

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

    @cached_property
    def functions(self) -> Container[FunctionName]:
        """Names of the functions that stand in the model itself."""
        return functions_of(self.model.proto)


def _made(scope: Scope, position: int, node: NodeProto, here: Mapping[str, _Constant]) -> Iterator[_Constant]:
    """The outputs of a node."""
    inputs, own = [here[name] for name in node.input if name], traits_of(node)
    is_new = not (own.moves_elements or own.casts or own.fills_sizes or own.reads_sizes) and bool(inputs)
    for name in filter(None, node.output):
        constant = _Constant(scope.values.get(name) or Value(name), scope, position, inputs)
        constant.is_computed = constant.is_weight and (is_new or any(c.is_computed for c in inputs if c.is_weight))
        yield constant


def _in_order(constant: _Constant) -> Iterator[_Constant]:
    """The sources of a constant, the same way in each run."""
    return (step for step in constant.steps() if step in constant.sources)


def _stored(constant: _Constant) -> Iterator[str]:
    """Names of the stored numbers that a constant is computed from, sizes and indices apart."""
    return (step.name for step in constant.steps() if step.is_stored and step.is_weight)


def _part(model: Model, constant: _Constant, before: Mapping[str, Array]) -> tuple[ModelProto, dict[str, Array]]:
    """The part of a model that computes a constant, and what enters it; `before` is what the last one took."""
    proto, feed = ModelProto(ir_version=model.proto.ir_version), dict[str, Array]()
    proto.opset_import.extend(model.proto.opset_import)
    proto.graph.name = "weights"
    nodes: dict[tuple[int, int], NodeProto] = {}
    for step in constant.steps():
        name, source = step.name, step.value.source
        if step.node is not None:
            nodes[(id(step.scope), step.position)] = step.node
        elif step.scope.parent is not None:
            proto.graph.initializer.append(source)
        elif element_type(step.value.dtype).kind in "fiub":
            proto.graph.input.append(helper.make_tensor_value_info(name, step.value.dtype, step.value.shape))
            feed[name] = before[name] if name in before else model.array(name)
        else:
            proto.graph.initializer.append(numpy_helper.from_array(model.array(name), name))
    proto.graph.node.extend(nodes.values())
    proto.graph.output.append(helper.make_tensor_value_info(constant.name, constant.value.dtype, None))
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


class _Writer(Editor):
    """Puts results into a copy of the model and drops what nothing uses any more."""

    def __init__(self, model: Model, scope: Scope, results: Sequence[tuple[_Constant, Array]]) -> None:
        super().__init__(model)
        self.results = results
        self.kept = {(result.scope, result.name) for result, _ in results}
        graphs = list(graphs_of(model.graph))
        self.uses = Counter(name for graph in graphs for node in graph.node for name in node.input)
        self.uses.update(output.name for graph in graphs for output in graph.output)
        self.order = {each: place for place, each in enumerate(scope.walk())}

    def run(self) -> Evaluated:
        steps = list({id(step): step for result, _ in self.results for step in result.steps()}.values())
        weights = {result.name: tuple(sorted(_stored(result))) for result, _ in self.results}
        nodes = {(step.scope, step.position): step for step in steps if step.node is not None}
        dead = [step for step in sorted(nodes.values(), key=self.place, reverse=True) if self.is_unused(step)]
        words = [f"{step.node.op_type} {step.node.name or step.name!r}" for step in reversed(dead) if step.node]
        stored = [step for step in steps if step.position < 0 and not self.uses[step.name]]
        for step in dead:
            del self.graph(step.scope).node[self.place(step)[1]]
        for step in stored:
            self.drop(step)
        for result, array in self.results:
            self.store(result, array)
        gone = {step.name for step in (*dead, *stored)} - weights.keys()
        for graph in graphs_of(self.model.graph):
            _without(graph.value_info, gone)
        return Evaluated(self.model, weights, tuple(words), tuple(step.name for step in stored))

    def place(self, step: _Constant) -> tuple[int, int]:
        """Where a node stands; graphs inside others come after them."""
        return self.order[step.scope], step.scope.order[step.position]

    def is_unused(self, step: _Constant) -> bool:
        """Whether a node can go; what it takes has a use less then, and what it shares a name with has one no more."""
        node = self.node(step.scope, step.position)
        if any(self.uses[name] and (step.scope, name) not in self.kept for name in node.output):
            for number, name in enumerate(node.output):
                if (step.scope, name) in self.kept:
                    node.output[number] = self.fresh(f"{name}_unused")
            return False
        self.uses.subtract(node.input)
        return True

    def drop(self, step: _Constant) -> None:
        """Take a stored tensor out of the file."""
        graph = self.graph(step.scope)
        if step.scope.parent is None:
            self.model.drop_initializer(step.name)
        else:
            _without(graph.initializer, {step.name})
        _without(graph.input, {step.name})

    def store(self, result: _Constant, array: Array) -> None:
        """Put a result into the graph that computed it."""
        if result.scope.parent is None:
            self.add(result.name, Lazy(array.dtype, array.shape, lambda: array))
        else:
            self.graph(result.scope).initializer.append(numpy_helper.from_array(array, result.name))


def _without(entries: Any, names: set[str]) -> None:
    """Delete the entries of some names from a list of protobuf."""
    for position in reversed([n for n, entry in enumerate(entries) if entry.name in names]):
        del entries[position]
