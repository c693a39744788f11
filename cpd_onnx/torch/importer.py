"""From an ONNX graph to a torch module, node by node.

The importer knows no operator. It turns each node into one call of the function registered for it, and shape arithmetic
into scalar arithmetic (`host`). What it cannot import it reports all at once, before it builds anything.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, inliner, numpy_helper
from torch import fx, nn

from cpd_onnx.errors import ModelError, UnsupportedError
from cpd_onnx.torch import host, operators
from cpd_onnx.torch.dtypes import elem_dtype, is_float, numpy_dtype, to_torch, torch_dtype
from cpd_onnx.torch.host import Host
from cpd_onnx.torch.module import OnnxModule
from cpd_onnx.torch.operators.generate import as_numbers, as_tensor
from cpd_onnx.torch.registry import DEFAULT_DOMAINS, Operator, find
from cpd_onnx.torch.weights import read_weights

Array = npt.NDArray[Any]
BatchNormMode = Literal["frozen", "train"]

assert operators.__all__, "importing the package fills the table of operators"

_MASK = 1e4
"""A tensor that holds a value beyond this, or an infinite one, is an attention mask or a bound, not a weight."""

_LARGE = 1024
"""Elements from which an initializer's data is of no use to shape inference."""


@dataclass(frozen=True)
class Weight:
    """A tensor that the file stores."""

    name: str
    array: Array


@dataclass(frozen=True)
class ValueType:
    """What shape inference knows of a value: its ONNX element type, and its rank where it is certain."""

    elem_type: int
    rank: int | None


Value: TypeAlias = fx.Node | Host | Weight | None


def import_model(model: ModelProto, *, batch_norm: BatchNormMode = "frozen") -> OnnxModule:
    """Import an ONNX model, whose external data has been loaded, as a torch module.

    Args:
        model: any float model of the standard operators; it is not changed.
        batch_norm: "frozen" computes BatchNormalization from the stored statistics, in training too; "train" uses the
            statistics of the batch while the module is in training mode and moves the stored ones (its buffers).

    Raises:
        UnsupportedError: nodes that cannot be imported, each with its name, operator and reason.
        ModelError: the graph is inconsistent.
    """
    model = expand(model)
    problems = unsupported(model)
    if problems:
        raise UnsupportedError(f"cannot import {len(problems)} node(s) into torch: " + "; ".join(problems))
    return _Builder(model, live=batch_norm == "train").build()


def unsupported(model: ModelProto) -> list[str]:
    """Nodes that `import_model` does not support, one line each: name, operator and reason."""
    return [f"{_title(node)}: {reason}" for node in model.graph.node if (reason := _reason(node))]


def expand(model: ModelProto) -> ModelProto:
    """Inline the model's own functions, and operators that we have no function for but the standard has."""
    if model.functions:
        model = inliner.inline_local_functions(model, convert_version=True)
    for _ in range(_NESTING):
        names = {(node.domain, node.op_type) for node in model.graph.node if _has_body(node, _opset(model))}
        if not names:
            break
        model = inliner.inline_selected_functions(model, sorted(names), inline_schema_functions=True)
    return model


_NESTING = 4
"""How deep the standard's functions call one another."""

_STRUCTURAL = frozenset({"Constant", "Identity"})


def _has_body(node: NodeProto, opset: int) -> bool:
    """Whether the standard defines an operator that we lack through others."""
    if find(node.domain, node.op_type) or node.domain not in DEFAULT_DOMAINS or node.op_type in _STRUCTURAL:
        return False
    if not onnx.defs.has(node.op_type, opset, ""):
        return False
    schema = onnx.defs.get_schema(node.op_type, opset, "")
    return bool(schema.has_function or schema.has_context_dependent_function)


def _title(node: NodeProto) -> str:
    domain = "" if node.domain in DEFAULT_DOMAINS else f"{node.domain}."
    return f"node {node.name or next(iter(node.output), '')!r} ({domain}{node.op_type})"


def _reason(node: NodeProto) -> str | None:
    """Why a node cannot be imported; None if it can."""
    if any(attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for attribute in node.attribute):
        return "control flow is not supported"
    if node.domain in DEFAULT_DOMAINS and node.op_type in _STRUCTURAL:
        return None
    found = find(node.domain, node.op_type)
    if found is None:
        return "no such operator"
    unknown = sorted(attribute.name for attribute in node.attribute if attribute.name not in found.attributes)
    return f"attribute {', '.join(unknown)} is not supported" if unknown else None


def _opset(model: ModelProto) -> int:
    return next((entry.version for entry in model.opset_import if entry.domain in DEFAULT_DOMAINS), 1)


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {attribute.name: _attribute(attribute) for attribute in node.attribute}


def _attribute(attribute: AttributeProto) -> Any:
    """Python value of an attribute; lists become tuples and tensors numpy arrays."""
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.type == AttributeProto.TENSOR:
        return numpy_helper.to_array(value)
    if attribute.type == AttributeProto.STRING:
        return value.decode()
    if attribute.type == AttributeProto.STRINGS:
        return tuple(text.decode() for text in value)
    return tuple(value) if isinstance(value, Sequence) else value


def infer_types(model: ModelProto) -> dict[str, ValueType]:
    """Element type and rank of the values, from ONNX shape inference on the graph without its large tensors."""
    skeleton = ModelProto()
    skeleton.CopyFrom(model)
    graph = skeleton.graph
    del graph.value_info[:]  # exporters write wrong ones
    for tensor in graph.initializer:
        if np.prod(tensor.dims) >= _LARGE:
            for content in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                tensor.ClearField(content)  # type: ignore[arg-type]  # the names are fields of TensorProto
    try:
        graph = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    except (onnx.shape_inference.InferenceError, RuntimeError):
        pass  # without types, shapes are computed with tensors: slower, not wrong
    infos = [*graph.value_info, *graph.input, *graph.output]
    types = {info.name: _value_type(info.type.tensor_type) for info in infos if info.type.HasField("tensor_type")}
    return types | {tensor.name: ValueType(tensor.data_type, len(tensor.dims)) for tensor in graph.initializer}


def _value_type(tensor_type: onnx.TypeProto.Tensor) -> ValueType:
    rank = len(tensor_type.shape.dim) if tensor_type.HasField("shape") else None
    return ValueType(tensor_type.elem_type, rank)


def trainable(graph: GraphProto, weights: Mapping[str, Array]) -> set[str]:
    """Names of the stored tensors that training may change.

    A float tensor is trained if some node uses it as a weight and none as something frozen (a statistic, a bound, a
    quantisation scale). Single elements are scalars of the architecture, except where the operator says otherwise.
    """
    wanted: set[str] = set()
    frozen: set[str] = set()
    alias = {name: name for name in weights}
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in alias:
            alias[node.output[0]] = alias[node.input[0]]
            continue
        found = find(node.domain, node.op_type)
        for slot, name in enumerate(node.input):
            if name not in alias or found is None:
                continue
            source = alias[name]
            if slot in found.frozen or slot in found.host:
                frozen.add(source)
            elif weights[source].size > 1 or slot in found.weights:
                wanted.add(source)
    return {name for name in wanted - frozen if _is_weight(weights[name])}


def _is_weight(array: Array) -> bool:
    if not is_float(array.dtype) or not array.size:
        return False
    return bool(np.abs(array.astype(np.float64)).max() < _MASK)  # false for a NaN too


def identifier(name: str, taken: Iterable[str]) -> str:
    """Python identifier that reads like an ONNX name and is not taken.

    >>> identifier("layer1.0/conv:weight", {"layer1_0_conv_weight"})
    'layer1_0_conv_weight_1'
    """
    text = re.sub(r"[^A-Za-z0-9_]", "_", name)
    if not text or text[0].isdigit() or text[0] == "_" or keyword.iskeyword(text):
        text = f"t{text}"
    return next(word for word in (text, *(f"{text}_{n}" for n in range(1, 1 << 30))) if word not in taken)


class _Builder:
    """Fills an fx graph; `values` maps the ONNX names met so far to what they are."""

    def __init__(self, model: ModelProto, *, live: bool) -> None:
        self.model = model
        self.live = live
        self.opset = _opset(model)
        self.weights = read_weights(model)
        self.trainable = trainable(model.graph, self.weights)
        self.types = infer_types(model)
        self.uses = Counter(name for node in model.graph.node for name in node.input)
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        self.values: dict[str, Value] = {"": None}
        self.nodes: dict[int | str, fx.Node] = {}
        self.taken = set(dir(OnnxModule)) | set(dir(nn.Module()))
        self.like: fx.Node | None = None

    def build(self) -> OnnxModule:
        self._declare_inputs()
        for tensor in self.model.graph.initializer:
            self._declare_weight(tensor.name)
        for node in self.model.graph.node:
            self._add(node)
        self.graph.output(tuple(self._tensor(self._value(info.name)) for info in self.model.graph.output))
        self.graph.eliminate_dead_code()
        return OnnxModule(self.root, self.graph, self.names)

    def _declare_inputs(self) -> None:
        arguments: set[str] = set()
        for info in self.model.graph.input:
            if info.name in self.weights:
                continue
            argument = identifier(info.name, arguments | {"self"})
            arguments.add(argument)
            self.values[info.name] = self.graph.placeholder(argument)
            self.like = self.like or self.values[info.name]  # type: ignore[assignment]  # just set to a node

    def _declare_weight(self, name: str) -> None:
        """Hold a stored tensor; what torch has no type for can still be the operand of shape arithmetic."""
        array = self.weights[name]
        self.values[name] = Weight(name, array)
        try:
            tensor = to_torch(array)
        except UnsupportedError:
            return
        self.names[name] = self._hold(name, nn.Parameter(tensor) if name in self.trainable else tensor)

    def _hold(self, name: str, value: Any) -> str:
        attribute = identifier(name, self.taken)
        self.taken.add(attribute)
        self.root[attribute] = value
        return attribute

    def _value(self, name: str) -> Value:
        if name not in self.values:
            raise ModelError(f"tensor {name!r} is used before any node computes it; check the model with onnx.checker")
        return self.values[name]

    def _add(self, node: NodeProto) -> None:
        """Import one node: bind its outputs' names to values."""
        if node.op_type == "Constant" and node.domain in DEFAULT_DOMAINS:
            self._declare_constant(node)
            return
        inputs = [self._value(name) for name in node.input]
        if node.op_type == "Identity" and node.domain in DEFAULT_DOMAINS:
            self.values[node.output[0]] = inputs[0]
            return
        results = self._on_host(node, inputs)
        if results is None:
            results = self._call(node, inputs)
        self.values |= {name: result for name, result in zip(node.output, results, strict=False) if name}

    def _declare_constant(self, node: NodeProto) -> None:
        name = node.output[0]
        if name not in self.weights:
            raise UnsupportedError(f"{_title(node)}: only dense tensors of numbers can be imported into torch")
        if name in self.trainable:
            self._declare_weight(name)
        else:
            self.values[name] = Weight(name, self.weights[name])

    # Shape arithmetic.

    def _on_host(self, node: NodeProto, inputs: Sequence[Value]) -> list[Host] | None:
        """Compute a node while importing; None if it has to be computed with tensors."""
        if node.domain not in DEFAULT_DOMAINS:
            return None
        if node.op_type in ("Shape", "Size"):
            return self._sizes(node, inputs[0])
        rule = host.RULES.get(node.op_type)
        known = [value if value is None else self._host(value) for value in inputs]
        if rule is None or any(found is None and value is not None for found, value in zip(known, inputs, strict=True)):
            return None
        try:
            result = rule(self._emit, known, _attributes(node))
        except host.NotOnHostError:
            return None
        return result if isinstance(result, list) else [result]

    def _sizes(self, node: NodeProto, value: Value) -> list[Host] | None:
        sizes: Sequence[Any]
        if isinstance(value, (Host, Weight)):
            sizes = value.array.shape
        else:
            known = self.types.get(node.input[0])
            if value is None or known is None or known.rank is None:
                return None
            sizes = [self.graph.call_method("size", (value, axis)) for axis in range(known.rank)]
        if node.op_type == "Size":
            return [host.number_of(self._emit, sizes)]
        return [host.shape_of(sizes, _attributes(node))]

    def _host(self, value: Value) -> Host | None:
        """The value as numbers, if it is small and no weight."""
        if isinstance(value, Host):
            return value
        if not isinstance(value, Weight) or value.name in self.trainable or value.array.size > host.LARGEST:
            return None
        if value.array.dtype.kind not in "iub" and value.array.size > 1:
            return None
        return host.make(value.array, value.array.dtype)

    def _emit(self, function: Any, arguments: tuple[Any, ...]) -> fx.Node:
        return self.graph.call_function(function, arguments)

    # Calls.

    def _call(self, node: NodeProto, inputs: Sequence[Value]) -> list[fx.Node]:
        found = find(node.domain, node.op_type)
        assert found is not None, node.op_type
        arguments = [
            self._numbers(value) if slot in found.host else self._tensor(value) for slot, value in enumerate(inputs)
        ]
        attributes = _attributes(node)
        if self.live and found.live is not None and self._owns_statistics(node, found):
            module = self._hold(node.name or node.op_type, found.live(attributes))
            return [self.graph.call_module(module, tuple(arguments))]
        keywords = {key: self._argument(value) for key, value in attributes.items()} | self._reserved(node, found)
        call = self.graph.call_function(found.function, tuple(arguments), keywords)
        if not found.many:
            return [call]
        return [self.graph.call_function(operator.getitem, (call, index)) for index in range(len(node.output))]

    def _owns_statistics(self, node: NodeProto, found: Operator) -> bool:
        """Whether a normalisation's statistics are stored tensors that nobody else uses."""
        names = [node.input[slot] for slot in found.frozen]
        return len(node.output) == 1 and all(name in self.names and self.uses[name] == 1 for name in names)

    def _reserved(self, node: NodeProto, found: Operator) -> dict[str, Any]:
        """Arguments that do not come from the node's inputs or attributes."""
        makers = {
            "opset": lambda: self.opset,
            "outputs": lambda: len(node.output),
            "like": lambda: self.like,
            "dtype": lambda: self._dtype(node),
        }
        return {name: makers[name]() for name in found.reserved}

    def _dtype(self, node: NodeProto) -> torch.dtype:
        """Torch type of the node's first input."""
        value, known = self.values[node.input[0]], self.types.get(node.input[0])
        if isinstance(value, Host):
            return torch_dtype(value.dtype)
        if known is None or not known.elem_type:
            raise UnsupportedError(f"{_title(node)}: the type of its input {node.input[0]!r} cannot be inferred")
        return elem_dtype(known.elem_type)

    def _argument(self, value: Any) -> Any:
        return self._constant(value) if isinstance(value, np.ndarray) else value

    def _numbers(self, value: Value) -> Any:
        """The value as a flat tuple of numbers (or of nodes that are numbers)."""
        if value is None:
            return None
        if isinstance(value, Weight):
            return tuple(value.array.reshape(-1).tolist())
        if isinstance(value, Host):
            return value.scalars()
        return self.graph.call_function(as_numbers, (value,))

    def _tensor(self, value: Value) -> fx.Node | None:
        """The value as a tensor."""
        if isinstance(value, Weight):
            return self._stored(value)
        if not isinstance(value, Host):
            return value
        if value.known:
            return self._constant(value.array)
        dtype, shape = torch_dtype(value.dtype), tuple(value.array.shape)
        return self.graph.call_function(as_tensor, (value.scalars(), shape), {"dtype": dtype, "like": self.like})

    def _stored(self, weight: Weight) -> fx.Node:
        if weight.name not in self.names:
            return self._constant(weight.array)
        if weight.name not in self.nodes:
            self.nodes[weight.name] = self.graph.get_attr(self.names[weight.name])
        return self.nodes[weight.name]

    def _constant(self, array: Array) -> fx.Node:
        """A tensor that the file does not store under a name of its own."""
        if id(array) not in self.nodes:
            self.nodes[id(array)] = self.graph.get_attr(self._hold("constant", to_torch(array)))
        return self.nodes[id(array)]


def input_dtypes(model: ModelProto) -> dict[str, np.dtype[Any]]:
    """Numpy type of each graph input that is no initializer."""
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = (info for info in model.graph.input if info.name not in stored)
    return {info.name: numpy_dtype(info.type.tensor_type.elem_type) for info in inputs}
