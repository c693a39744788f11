"""Analysis of a graph before it is imported: unsupported nodes, trainable tensors, element types and ranks."""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TypeProto,
    ValueInfoProto,
    helper,
    inliner,
    numpy_helper,
)

from cpd_onnx.ops.traits import DEFAULT_DOMAINS, MICROSOFT, traits_of, type_slot
from cpd_onnx.torch import host
from cpd_onnx.torch.dtypes import is_float
from cpd_onnx.torch.registry import find
from cpd_onnx.torch.weights import bodies_of, graph_weights, graphs_of

Array = npt.NDArray[Any]

_NESTING = 4
"""Maximum nesting depth of the operators that the ONNX standard defines as functions."""

_MASK = 1e4
"""Magnitude of a value from which a tensor is taken for an attention mask or a bound, not a weight (heuristic)."""

_LARGE = 1024
"""Number of elements from which the data of an initializer is withheld from shape inference (heuristic)."""


# Nodes.


def opset_of(model: ModelProto) -> int:
    """Return the version of the default operator set that the model imports."""
    return next((entry.version for entry in model.opset_import if entry.domain in DEFAULT_DOMAINS), 1)


def is_structural(node: NodeProto) -> bool:
    """Return whether the importer handles the node itself."""
    own = traits_of(node)
    return own.is_constant or own.is_identity or own.has_bodies


def title(node: NodeProto) -> str:
    """Return the name of a node and its operator, for messages."""
    domain = "" if node.domain in DEFAULT_DOMAINS else f"{node.domain}."
    return f"node {node.name or next(iter(node.output), '')!r} ({domain}{node.op_type})"


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Return the attributes as Python values; lists become tuples and tensors numpy arrays. Graphs are omitted."""
    plain = (entry for entry in node.attribute if entry.type not in (AttributeProto.GRAPH, AttributeProto.GRAPHS))
    return {attribute.name: _attribute(attribute) for attribute in plain}


def _attribute(attribute: AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    if attribute.type == AttributeProto.TENSOR:
        return numpy_helper.to_array(value)
    if attribute.type == AttributeProto.STRING:
        return value.decode()
    if attribute.type == AttributeProto.STRINGS:
        return tuple(text.decode() for text in value)
    return tuple(value) if isinstance(value, Sequence) else value


def free_names(graph: GraphProto) -> list[str]:
    """Return the names that a body captures from the enclosing graphs, in order of use."""
    defined = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer} | {""}
    free: dict[str, None] = {}
    for node in graph.node:
        inner = [name for body in bodies_of(node).values() for name in free_names(body)]
        free |= dict.fromkeys(name for name in [*node.input, *inner] if name not in defined)
        defined |= set(node.output)
    free |= dict.fromkeys(info.name for info in graph.output if info.name not in defined)
    return list(free)


# What can be imported.


def expand(model: ModelProto) -> ModelProto:
    """Inline local functions, and operators without an implementation that are functions in the standard.

    The nodes of the result are sorted: each comes after those whose outputs it reads, unlike in some tools' files.
    """
    if any(order != sorted(order) for order in map(_order, graphs_of(model.graph))):
        given, model = model, ModelProto()
        model.CopyFrom(given)
        for graph in graphs_of(model.graph):
            nodes = [graph.node[place] for place in _order(graph)]
            graph.ClearField("node")
            graph.node.extend(nodes)
    if model.functions:
        model = inliner.inline_local_functions(model, convert_version=True)
    for _ in range(_NESTING):
        names = {(node.domain, node.op_type) for node in model.graph.node if _has_body(node, opset_of(model))}
        if not names:
            break
        model = inliner.inline_selected_functions(model, sorted(names), inline_schema_functions=True)
    return model


def _order(graph: GraphProto) -> list[int]:
    """Return the positions of the nodes such that each comes after those it reads; 0, 1, 2 … for a sorted graph.

    Nodes in a cycle come last, in their order in the file.
    """
    makers = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
    needs: list[set[int]] = []
    readers: list[list[int]] = [[] for _ in graph.node]
    for place, node in enumerate(graph.node):
        captured = (name for body in bodies_of(node).values() for name in free_names(body))
        needs.append({makers[name] for name in (*node.input, *captured) if name in makers})
        for maker in needs[-1]:
            readers[maker].append(place)
    ready = [place for place, before in enumerate(needs) if not before]
    order: list[int] = []
    while ready:  # a heap, so that the order is that of the file where that is possible
        place = heapq.heappop(ready)
        order.append(place)
        for reader in readers[place]:
            needs[reader].remove(place)
            if not needs[reader]:
                heapq.heappush(ready, reader)
    return order + [place for place, before in enumerate(needs) if before]


def _has_body(node: NodeProto, opset: int) -> bool:
    """Return whether an operator without an implementation is a function of other operators in the standard."""
    if find(node.domain, node.op_type) or node.domain not in DEFAULT_DOMAINS or is_structural(node):
        return False
    if not onnx.defs.has(node.op_type, opset, ""):
        return False
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    has_body = schema.has_function or schema.has_context_dependent_function  # type: ignore[attr-defined]  # not in stubs
    return bool(has_body)


def unsupported(model: ModelProto) -> list[str]:
    """Return the nodes that `import_model` does not support, one line each: name, operator and reason."""
    return list(_problems(model.graph))


def _problems(graph: GraphProto) -> Iterator[str]:
    for node in graph.node:
        reason = _reason(node)
        if reason:
            yield f"{title(node)}: {reason}"
        for body in bodies_of(node).values():
            yield from _problems(body)


def _reason(node: NodeProto) -> str | None:
    """Return why a node cannot be imported; None if it can."""
    if is_structural(node):
        return None
    found = find(node.domain, node.op_type)
    if found is None:
        return "no such operator"
    unknown = sorted(attribute.name for attribute in node.attribute if attribute.name not in found.attributes)
    return f"attribute {', '.join(unknown)} is not supported" if unknown else None


# What trains.


def shape_values(graph: GraphProto) -> set[str]:
    """Return the names of values used in shape arithmetic only: every path from them ends in a shape operand."""
    tensors = {info.name for info in graph.output}
    tensors |= {name for node in graph.node for body in bodies_of(node).values() for name in free_names(body)}
    numbers: set[str] = set()
    for node in reversed(graph.node):
        moves = node.domain in DEFAULT_DOMAINS and node.op_type in host.OPERATORS and not tensors & set(node.output)
        found = find(node.domain, node.op_type)
        slots = () if found is None else found.host
        tensors |= {name for slot, name in enumerate(node.input) if slot not in slots and not moves}
        numbers |= set(node.input)
    return numbers - tensors


def trainable_anywhere(graph: GraphProto) -> set[str]:
    """Return the names of trainable tensors in the graph and its bodies that denote a single tensor."""
    parts = list(graphs_of(graph))
    defined = Counter(name for part in parts for name in _defined(part))
    names = {name for part in parts for name in trainable(part, graph_weights(part))}
    return {name for name in names if defined[name] == 1}


def _defined(graph: GraphProto) -> set[str]:
    stored = {entry.name for entries in (graph.input, graph.initializer) for entry in entries}
    return stored | {name for node in graph.node for name in node.output}


def trainable(graph: GraphProto, weights: Mapping[str, Array]) -> set[str]:
    """Return the names of the stored tensors that are trainable.

    A float tensor is trainable if some node uses it as a weight and none as a frozen input (a statistic, a bound, a
    quantisation scale). Single elements are scalars of the architecture, unless listed in `Operator.weights`.
    """
    numbers = shape_values(graph)
    wanted: set[str] = set()
    frozen: set[str] = set()
    alias = {name: name for name in weights}
    for node in itertools.chain.from_iterable(part.node for part in graphs_of(graph)):
        if node.op_type == "Identity" and node.input[0] in alias:
            alias[node.output[0]] = alias[node.input[0]]
            continue
        found = find(node.domain, node.op_type)
        for slot, name in enumerate(node.input):
            if name not in alias or found is None or name in numbers:
                continue
            source = alias[name]
            if slot in found.frozen or slot in found.host:
                frozen.add(source)
            elif weights[source].size > 1 or slot in found.weights:
                wanted.add(source)
    return {name for name in wanted - frozen if _is_weight(weights[name])}


@dataclass(frozen=True)
class Quantised:
    """A weight stored as integers, which a DequantizeLinear node converts to floats."""

    node: NodeProto

    @property
    def scale(self) -> str:
        """Name of the scale."""
        return str(self.node.input[1])

    @property
    def zero_point(self) -> str:
        """Name of the zero point; empty for none."""
        return str(self.node.input[2]) if len(self.node.input) > 2 else ""


_INTEGERS = {np.dtype(kind) for kind in ("int8", "uint8", "int16", "uint16", "int32")}


def quantised(graph: GraphProto, weights: Mapping[str, Array]) -> dict[str, Quantised]:
    """Return stored integers used by equal DequantizeLinear nodes only, with stored scales and zero points.

    Their results must not be frozen inputs of an operator.
    """
    users: dict[str, list[NodeProto | None]] = {}
    fixed: set[str] = set()
    for node in graph.node:
        operator = find(node.domain, node.op_type)
        held = () if operator is None else (*operator.frozen, *operator.host)
        fixed |= {node.input[slot] for slot in held if slot < len(node.input)}
        for slot, name in enumerate(node.input):
            users.setdefault(name, []).append(node if node.op_type == "DequantizeLinear" and slot == 0 else None)
        for body in bodies_of(node).values():
            for name in free_names(body):
                users.setdefault(name, []).append(None)
    found = {}
    for tensor in graph.initializer:
        nodes = users.get(tensor.name, [])
        first = nodes[0] if nodes else None
        if first is None or weights[tensor.name].dtype not in _INTEGERS:
            continue
        operands = [name for name in first.input[1:] if name]
        alike = all(n is not None and n.input == first.input and n.attribute == first.attribute for n in nodes)
        alike = alike and not any(n is not None and n.output[0] in fixed for n in nodes)
        if alike and all(name in weights for name in operands) and is_float(weights[operands[0]].dtype):
            found[tensor.name] = Quantised(first)
    return found


def _is_weight(array: Array) -> bool:
    if not is_float(array.dtype) or not array.size:
        return False
    return bool(np.abs(array.astype(np.float64)).max() < _MASK)  # false for a NaN too


# Types and ranks.


@dataclass(frozen=True)
class ValueType:
    """The ONNX element type of a value, and its rank if that is certain."""

    elem_type: int
    rank: int | None


def infer_types(model: ModelProto) -> dict[str, ValueType]:
    """Return element type and rank of the values, from ONNX shape inference on the graph without its large tensors."""
    skeleton = ModelProto()
    skeleton.CopyFrom(model)
    graph = skeleton.graph
    del graph.value_info[:]  # exporters write wrong ones
    for info in graph.output:
        info.type.tensor_type.ClearField("shape")
    for tensor in graph.initializer:
        if np.prod(tensor.dims) >= _LARGE:
            for content in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                tensor.ClearField(content)
    infos: dict[str, TypeProto] = {}
    for _ in range(_ROUNDS):
        infos = _inferred(skeleton)
        found = [info for node in graph.node for info in [*_reshaped(node, infos), *_contributed(node, infos)]]
        if not found:
            break
        graph.value_info.extend(found)
    return {name: _value_type(info.tensor_type) for name, info in infos.items() if info.HasField("tensor_type")}


_ROUNDS = 3
"""Maximum number of runs of shape inference, each of which starts with more known ranks (heuristic)."""


def _inferred(model: ModelProto) -> dict[str, TypeProto]:
    """Return the types of all values that shape inference finds; those of inputs and initializers if it fails."""
    graph = model.graph
    # without types, shapes are computed with tensors: slower, not wrong
    with contextlib.suppress(onnx.shape_inference.InferenceError, RuntimeError):
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    types: dict[str, TypeProto] = {}
    tensors: dict[str, tuple[int, list[int]]] = {}
    for part in graphs_of(graph):
        types |= {info.name: info.type for info in [*part.value_info, *part.input, *part.output]}
        tensors |= {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in part.initializer}
    return types | {name: helper.make_tensor_type_proto(*tensor) for name, tensor in tensors.items()}


def _reshaped(node: NodeProto, types: Mapping[str, TypeProto]) -> list[ValueInfoProto]:
    """Return the rank of a node's output that follows from the length of its shape operand."""
    slot, done = traits_of(node).shape_slot, types.get(node.output[0]) if node.output else None
    if slot is None or slot >= len(node.input) or node.input[slot] not in types or done is None:
        return []
    operand = types[node.input[slot]].tensor_type
    if done.tensor_type.HasField("shape") or not operand.shape.dim or not operand.shape.dim[0].HasField("dim_value"):
        return []
    rank = operand.shape.dim[0].dim_value
    return [helper.make_tensor_value_info(node.output[0], done.tensor_type.elem_type, [None] * rank)]


_SUM = 3
"""Index of the output that holds the sum before a normalisation."""


def _contributed(node: NodeProto, types: Mapping[str, TypeProto]) -> list[ValueInfoProto]:
    """Return type and rank of the outputs of an operator of onnxruntime's domain, unknown to shape inference."""
    if node.domain != MICROSOFT:
        return []
    own, typed = traits_of(node), type_slot(node)
    like = node.input[own.data_slot]
    if like not in types or typed >= len(node.input) or node.input[typed] not in types:
        return []
    shape = types[like].tensor_type
    rank = own.output_rank or (len(shape.shape.dim) if shape.HasField("shape") else None)
    kind = types[node.input[typed]].tensor_type.elem_type
    names = [name for index, name in enumerate(node.output) if index in (0, _SUM) and name and name not in types]
    if rank is None or not kind:
        return []
    return [helper.make_tensor_value_info(name, kind, [None] * rank) for name in names]


def _value_type(tensor_type: TypeProto.Tensor) -> ValueType:
    rank = len(tensor_type.shape.dim) if tensor_type.HasField("shape") else None
    return ValueType(tensor_type.elem_type, rank)
