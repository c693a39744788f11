"""Constant folding of weight arithmetic: weights that a graph computes from other weights alone are evaluated once.

Spectral and weight normalisation, weight standardisation and parameters sliced from one flat buffer appear in a file as
nodes between the stored tensors and the operator that uses them. Channels of such arithmetic are not channels of the
network: no activation passes through them, and removing some changes the values of the others. The result is therefore
stored as an initializer under the name of the computed tensor and is a weight like any other from then on; unused nodes
and tensors are removed.

Operators that only rearrange elements (Transpose, Reshape, Cast and the like) are left in place, since pruning traces
them back to the stored tensor. So are quantised weights, and arithmetic that expands small inputs into large results
(tables of angles, masks, factors of a product), because storing its results would enlarge the file.
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

_WEIGHT_TYPES = {
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.INT8,
    TensorProto.UINT8,
}  # fmt: skip  # a table
"""Element types of trained parameters; sizes, indices and masks have other types."""
_MAX_SETTING_ELEMENTS = 8
"""Largest size, in elements, of a constant that counts as a setting (an epsilon, an exponent), not as a weight.
Heuristic."""
_DOMAINS = {"", "ai.onnx", "com.microsoft"}
"""Operator domains whose operators onnxruntime evaluates: the standard's and its own."""
_MAX_STORED_GROWTH = 2.0
"""Largest ratio of the bytes of a result to those of its sources: float16 may become float32. Heuristic."""
_MAX_INTERMEDIATE_GROWTH = 16
"""Largest ratio of the elements of an intermediate result to those of the sources. Heuristic that bounds memory."""
_NEGLIGIBLE_ELEMENTS = 1 << 16
"""Intermediate results up to this many elements are allowed whatever the size of the sources. Heuristic."""


def evaluate_weights(model: Model, scope: Scope) -> Evaluated | None:
    """Evaluate the weight arithmetic of a model; None if there is none to evaluate or onnxruntime cannot run it.

    The result is deterministic for one version of onnxruntime and one type of processor.
    """
    results: list[tuple[_Constant, Array]] = []
    feed: dict[str, Array] = {}
    for constant in _ConstantFinder(model).wanted(scope):
        proto, feed = _part(model, constant, feed)
        array = _run(proto, feed)
        if array is not None:
            results.append((constant, array))
    return _Writer(model.copy(), scope, results).run() if results else None


@dataclass(eq=False)
class _Constant:
    """A tensor that is stored in the file or computed from stored tensors alone.

    Attributes:
        value: Inferred properties of the tensor.
        scope: Graph that contains the tensor, or its producer.
        position: Position of the producer in `scope`; -1 for an initializer.
        inputs: Constants that the producer takes.
        is_computed: Whether the tensor results from arithmetic, not from rearranging elements only.

    """

    value: Value
    scope: Scope
    position: int = -1
    inputs: Sequence[_Constant] = ()
    is_computed: bool = False

    @property
    def name(self) -> str:
        """Name of the tensor in the file."""
        return self.value.name

    @property
    def node(self) -> NodeProto | None:
        """Producer of the tensor; None for an initializer."""
        return self.scope.nodes[self.position] if self.position >= 0 else None

    @property
    def is_weight(self) -> bool:
        """Whether the element type is one of trained parameters, not of sizes or indices."""
        return self.value.dtype in _WEIGHT_TYPES

    @property
    def is_stored(self) -> bool:
        """Whether the elements are stored in the file."""
        return not self.inputs

    @cached_property
    def size(self) -> float:
        """Number of elements; infinite if unknown."""
        return math.inf if self.value.shape is None else math.prod(self.value.shape)

    @property
    def bytes(self) -> float:
        """Size of the elements in bytes."""
        return self.size * element_bytes(self.value.dtype)

    @cached_property
    def largest(self) -> float:
        """Number of elements of the largest tensor in its computation, itself included."""
        return max([self.size, *(each.largest for each in self.inputs)])

    @cached_property
    def sources(self) -> frozenset[_Constant]:
        """Stored weights from which it is computed."""
        if self.is_stored:
            return frozenset([self] if self.is_weight and self.size > _MAX_SETTING_ELEMENTS else [])
        return frozenset().union(*(each.sources for each in self.inputs))

    @property
    def is_affordable(self) -> bool:
        """Whether storing the value in place of its sources keeps the growth of file and memory within the limits."""
        there = sum(source.size for source in self.sources)
        stored = sum(source.bytes for source in self.sources)
        return (
            self.bytes <= _MAX_STORED_GROWTH * stored
            and self.largest <= _MAX_INTERMEDIATE_GROWTH * there + _NEGLIGIBLE_ELEMENTS
        )

    def steps(self) -> Iterator[_Constant]:
        """Yield the constants in its computation and itself, each once, in topological order."""
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
class _ConstantFinder:
    """Finds the constants of a model and those that are operands of its data-dependent nodes.

    Attributes:
        model: Model to search.
        taken: Constants that data-dependent nodes consume, by `id`.
        outputs: `id` of the constants that are outputs of a graph.

    """

    model: Model
    taken: dict[int, _Constant] = field(default_factory=dict)
    outputs: set[int] = field(default_factory=set)

    def wanted(self, scope: Scope) -> list[_Constant]:
        """Return the constants to be replaced by their values, in the order of the graph."""
        self.sweep(scope, {})
        results = [c for c in self.taken.values() if not c.is_stored and c.is_weight and id(c) not in self.outputs]
        chosen = {id(c) for c in results if c.is_computed and c.sources and c.is_affordable}
        for source in dict.fromkeys(source for c in results for source in _in_order(c)):
            chosen |= self.parts(source, chosen)
        return [constant for constant in results if id(constant) in chosen]

    def parts(self, source: _Constant, chosen: set[int]) -> set[int]:
        """Return the `id` of the slices of a flat buffer, if it has no other use and they are not much larger.

        A tensor with as many elements as the buffer is a permutation of it (gates of recurrent layers), not a slice.
        """
        if id(source) in self.taken or id(source) in self.outputs:
            return set()
        parts = [constant for constant in self.taken.values() if source in constant.sources]
        there = frozenset[_Constant]().union(*(part.sources for part in parts))
        fits = sum(part.bytes for part in parts) <= _MAX_STORED_GROWTH * sum(each.bytes for each in there)
        if len(parts) < 2 or not fits or not all(part.is_weight for part in parts):
            return set()
        known = all((part.size < source.size and part.is_affordable) or id(part) in chosen for part in parts)
        return {id(part) for part in parts if id(part) not in self.outputs} if known else set()

    def sweep(self, scope: Scope, outer: Mapping[str, _Constant]) -> None:
        """Collect the constants of a graph and its subgraphs; `outer` are those of the enclosing graphs by name."""
        here = {name: constant for name, constant in outer.items() if name not in scope.inputs}
        stored = [value for value in scope.values.values() if isinstance(value.source, TensorProto)]
        here |= {value.name: _Constant(value, scope) for value in stored}
        for position, node in enumerate(scope.nodes):
            if self.is_constant(node, here):
                here |= {constant.name: constant for constant in _outputs_of(scope, position, node, here)}
                continue
            self.taken |= {id(here[name]): here[name] for name in node.input if name in here}
            for body in scope.bodies.get(position, {}).values():
                if not body.function:
                    self.sweep(body, here)
        self.outputs |= {id(here[name]) for name in scope.outputs if name in here}

    def is_constant(self, node: NodeProto, here: Mapping[str, _Constant]) -> bool:
        """Whether the outputs of a node are independent of the inputs of the model."""
        own = traits_of(node)
        if own.is_constant:
            return True
        # Quantizers belong to the format in which a weight is stored.
        if node.domain not in _DOMAINS or own.is_random or own.is_quantizer or called_by(node) in self.functions:
            return False
        given = [name for name in node.input if name]
        return bool(given) and all(name in here for name in given) and not bodies_of(node)

    @cached_property
    def functions(self) -> Container[FunctionName]:
        """Names of the model-local functions."""
        return functions_of(self.model.proto)


def _outputs_of(scope: Scope, position: int, node: NodeProto, here: Mapping[str, _Constant]) -> Iterator[_Constant]:
    """Yield the outputs of a node whose inputs are constants."""
    inputs, own = [here[name] for name in node.input if name], traits_of(node)
    is_new = not (own.moves_elements or own.casts or own.fills_sizes or own.reads_sizes) and bool(inputs)
    for name in filter(None, node.output):
        constant = _Constant(scope.values.get(name) or Value(name), scope, position, inputs)
        constant.is_computed = constant.is_weight and (is_new or any(c.is_computed for c in inputs if c.is_weight))
        yield constant


def _in_order(constant: _Constant) -> Iterator[_Constant]:
    """Yield the sources of a constant in a deterministic order."""
    return (step for step in constant.steps() if step in constant.sources)


def _stored(constant: _Constant) -> Iterator[str]:
    """Yield the names of the stored weights from which a constant is computed."""
    return (step.name for step in constant.steps() if step.is_stored and step.is_weight)


def _part(model: Model, constant: _Constant, before: Mapping[str, Array]) -> tuple[ModelProto, dict[str, Array]]:
    """Return the part of a model that computes a constant, and its inputs; `before` are arrays already loaded."""
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
    """Return the only output of a model; None if onnxruntime cannot run it."""
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
    """Stores results in a copy of the model and removes unused nodes and tensors."""

    def __init__(self, model: Model, scope: Scope, results: Sequence[tuple[_Constant, Array]]) -> None:
        super().__init__(model)
        self.results = results
        self.results_by_name = {(result.scope, result.name) for result, _ in results}
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
        """Return the sort key of a node: its graph, enclosing graphs first, and its position in the file."""
        return self.order[step.scope], step.scope.order[step.position]

    def is_unused(self, step: _Constant) -> bool:
        """Whether a node is unused; if so, its inputs lose a use, if not, outputs that results replace are renamed."""
        node = self.node(step.scope, step.position)
        if any(self.uses[name] and (step.scope, name) not in self.results_by_name for name in node.output):
            for number, name in enumerate(node.output):
                if (step.scope, name) in self.results_by_name:
                    node.output[number] = self.fresh(f"{name}_unused")
            return False
        self.uses.subtract(node.input)
        return True

    def drop(self, step: _Constant) -> None:
        """Remove a stored tensor from the file."""
        graph = self.graph(step.scope)
        if step.scope.parent is None:
            self.model.drop_initializer(step.name)
        else:
            _without(graph.initializer, {step.name})
        _without(graph.input, {step.name})

    def store(self, result: _Constant, array: Array) -> None:
        """Store a result as an initializer of the graph that computed it."""
        if result.scope.parent is None:
            self.add(result.name, Lazy(array.dtype, array.shape, lambda: array))
        else:
            self.graph(result.scope).initializer.append(numpy_helper.from_array(array, result.name))


def _without(entries: Any, names: set[str]) -> None:
    """Delete the entries with the given names from a repeated protobuf field."""
    for position in reversed([n for n, entry in enumerate(entries) if entry.name in names]):
        del entries[position]
