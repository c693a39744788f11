"""Import of an ONNX graph as a torch module, node by node.

The importer itself handles only operators that name or select values. It turns each other node into one call of the
function registered for it, and shape arithmetic into scalar arithmetic (`host`). All unsupported nodes are reported
together, before anything is built.
"""

from __future__ import annotations

import itertools
import keyword
import operator
import re
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from onnx import GraphProto, ModelProto, NodeProto
from torch import fx, nn

from cpd_onnx.errors import ModelError, UnsupportedError
from cpd_onnx.ops.evaluate import Call
from cpd_onnx.ops.traits import DEFAULT_DOMAINS, traits_of
from cpd_onnx.torch import control, host, operators
from cpd_onnx.torch.analysis import (
    Quantised,
    ValueType,
    attributes_of,
    expand,
    free_names,
    infer_types,
    is_structural,
    opset_of,
    quantised,
    shape_values,
    title,
    trainable_anywhere,
    unsupported,
)
from cpd_onnx.torch.dtypes import elem_dtype, to_torch, torch_dtype
from cpd_onnx.torch.host import Host
from cpd_onnx.torch.module import OnnxModule, Quantisation
from cpd_onnx.torch.operators import quant
from cpd_onnx.torch.operators.generate import as_numbers, as_tensor
from cpd_onnx.torch.registry import Operator, find
from cpd_onnx.torch.weights import bodies_of, constant_value, graph_weights, graphs_of

Array = npt.NDArray[Any]
BatchNormMode = Literal["frozen", "train"]

assert operators.__all__, "importing the package fills the table of operators"


@dataclass(frozen=True)
class StoredWeight:
    """A tensor stored in the file."""

    name: str
    array: Array


Value: TypeAlias = fx.Node | Host | StoredWeight | None


@dataclass(frozen=True)
class _Facts:
    """The analysis of the whole model.

    Attributes:
        opset: Version of the default operator set.
        live: Whether normalisations train their statistics.
        types: Type and rank of the main graph's values.
        trainable: Stored tensors that become parameters.
        numbers: Values of the main graph used in shape arithmetic only.
        uses: Number of uses of each value by nodes of the main graph.
        quantised: Stored integers that are trained as floats.
    """

    opset: int
    live: bool
    types: Mapping[str, ValueType]
    trainable: Container[str]
    numbers: Container[str]
    uses: Mapping[str, int]
    quantised: Mapping[str, Quantised]


def import_model(model: ModelProto, *, batch_norm: BatchNormMode = "frozen") -> OnnxModule:
    """Import an ONNX model, whose external data has been loaded, as a torch module.

    Args:
        model: Float model of standard operators; it is not changed.
        batch_norm: "frozen" computes BatchNormalization from the stored statistics, in training too; "train" uses the
            statistics of the batch while the module is in training mode and updates the stored ones (its buffers).

    Raises:
        UnsupportedError: There are nodes that cannot be imported; lists each with its name, operator and reason.
        ModelError: The graph is inconsistent.
    """
    model = expand(model)
    problems = unsupported(model)
    if problems:
        raise UnsupportedError(f"cannot import {len(problems)} node(s) into torch: " + "; ".join(problems))
    graph = model.graph
    uses = Counter(name for node in graph.node for name in node.input)
    weights = graph_weights(graph)
    live = batch_norm == "train"
    facts = _Facts(
        opset_of(model), live, infer_types(model), trainable_anywhere(graph), shape_values(graph), uses,
        quantised(graph, weights),
    )  # fmt: skip  # the fields in order
    return _Builder(graph, facts).module()


def identifier(name: str, taken: Container[str]) -> str:
    """Return an unused Python identifier derived from an ONNX name.

    >>> identifier("layer1.0/conv:weight", {"layer1_0_conv_weight"})
    'layer1_0_conv_weight_1'
    """
    text = re.sub(r"[^A-Za-z0-9_]", "_", name)
    if not text or text[0].isdigit() or text[0] == "_" or keyword.iskeyword(text):
        text = f"t{text}"
    numbered = (f"{text}_{number}" for number in itertools.count(1))
    return next(word for word in itertools.chain([text], numbered) if word not in taken)


class _Builder:
    """Builds an fx graph from an ONNX graph; `values` maps the ONNX names defined so far to their values."""

    def __init__(self, proto: GraphProto, facts: _Facts) -> None:
        self.proto, self.facts = proto, facts
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.names: dict[str, str] = {}
        self.quantisations: dict[str, Quantisation] = {}
        self.values: dict[str, Value] = {"": None}
        self.nodes: dict[str, fx.Node] = {}
        self._masked = {name for node in proto.node if traits_of(node).may_mask for name in node.output}
        self.taken = {"meta", *dir(OnnxModule), *dir(nn.Module())}
        self.like: fx.Node | None = None
        self._structural: dict[str, Callable[[NodeProto, Sequence[Value]], Sequence[Value]]] = {
            "Constant": self._constant,
            "Identity": lambda node, inputs: inputs,
            "If": self._if,
            "Loop": self._loop,
            "Scan": self._scan,
        }

    def module(self) -> OnnxModule:
        """Import the main graph."""
        stored = {tensor.name for tensor in self.proto.initializer}
        self._declare_inputs([info.name for info in self.proto.input if info.name not in stored])
        for name, array in graph_weights(self.proto, nodes=False).items():
            self._declare_weight(name, array)
        for name, how in self.facts.quantised.items():
            self._declare_quantised(name, how)
        for name, array in self._of_bodies(self.proto).items():
            self._declare_weight(name, array)
        self._add_all()
        return OnnxModule(self.root, self.graph, self.names, self.quantisations)

    def body(self, captured: Sequence[str]) -> fx.GraphModule:
        """Import a body as a module; captured values and trained tensors are additional inputs."""
        self._declare_inputs([*(info.name for info in self.proto.input), *captured])
        for name, array in graph_weights(self.proto, nodes=False).items():
            self.values.setdefault(name, StoredWeight(name, array))
        self._add_all()
        return fx.GraphModule(self.root, self.graph)

    def _of_bodies(self, graph: GraphProto) -> dict[str, Array]:
        """Return the tensors in the bodies of a graph's nodes that become parameters of the whole module."""
        bodies = [body for node in graph.node for body in bodies_of(node).values()]
        inner = [part for body in bodies for part in graphs_of(body)]
        stored = {name: array for part in inner for name, array in graph_weights(part).items()}
        return {name: array for name, array in stored.items() if name in self.facts.trainable}

    def _add_all(self) -> None:
        for node in self.proto.node:
            self._add(node)
        self.graph.output(tuple(self._tensor(self._value(info.name)) for info in self.proto.output))

    def _declare_inputs(self, names: Sequence[str]) -> None:
        arguments: set[str] = set()
        for name in names:
            argument = identifier(name, arguments | {"self"})
            arguments.add(argument)
            node = self.graph.placeholder(argument)
            self.values[name] = node
            self.like = self.like or node

    def _declare_weight(self, name: str, array: Array) -> None:
        """Register a stored tensor; one of a type that torch lacks can still be an operand of shape arithmetic."""
        self.values[name] = StoredWeight(name, array)
        try:
            tensor = to_torch(array)
        except UnsupportedError:
            return
        self.names[name] = self._hold(name, nn.Parameter(tensor) if name in self.facts.trainable else tensor)

    def _declare_quantised(self, name: str, how: Quantised) -> None:
        """Register stored integers as trainable floats, if these quantise to the same integers."""
        scale, zero = self.names.get(how.scale), self.names.get(how.zero_point)
        if name not in self.names or scale is None or (how.zero_point and zero is None):
            return
        stored: torch.Tensor = self.root[self.names[name]]
        zero = zero or self._hold("constant", torch.zeros((), dtype=stored.dtype))
        options = {key: value for key, value in attributes_of(how.node).items() if key in ("axis", "block_size")}
        operands = self.root[scale], self.root[zero]
        values = quant.dequantize_linear(stored, *operands, **options)
        if torch.equal(quant.quantize_linear(values, *operands, **options), stored):
            self.root[self.names[name]] = nn.Parameter(values)
            self.quantisations[name] = Quantisation(scale, zero, options)

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
        """Import one node: bind its outputs' names to values, and store its title in the metadata of its calls."""
        last = next(iter(reversed(self.graph.nodes)), None)
        inputs = [self._value(name) for name in node.input]
        results: Sequence[Value]
        if is_structural(node):
            results = self._structural[node.op_type](node, inputs)
        else:
            results = self._on_host(node, inputs) or self._call(node, inputs)
        self.values |= {name: result for name, result in zip(node.output, results, strict=False) if name}
        for call in itertools.takewhile(lambda other: other is not last, reversed(self.graph.nodes)):
            call.meta["onnx"] = title(node)

    # Nodes that name or select values.

    def _constant(self, node: NodeProto, inputs: Sequence[Value]) -> Sequence[Value]:
        name, array = node.output[0], constant_value(node)
        if name in self.values:  # trained, and passed to the body that contains it
            return [self.values[name]]
        if array is None:
            raise UnsupportedError(f"{title(node)}: only dense numeric tensors can be imported into torch")
        if name in self.facts.trainable:
            self._declare_weight(name, array)
        return [StoredWeight(name, array)]

    def _if(self, node: NodeProto, inputs: Sequence[Value]) -> Sequence[Value]:
        """Import the branch that is taken inline if it is known; otherwise both as modules."""
        condition, bodies = self._host(inputs[0]), bodies_of(node)
        if condition is not None and condition.is_known:
            return self._in_place(bodies["then_branch" if condition.array.item() else "else_branch"])
        then, otherwise = self._module(bodies["then_branch"]), self._module(bodies["else_branch"])
        return self._outputs(node, control.branch, (self._tensor(inputs[0]), *then, *otherwise), {})

    def _in_place(self, body: GraphProto) -> Sequence[Value]:
        for name, array in graph_weights(body, nodes=False).items():
            self.values.setdefault(name, StoredWeight(name, array))
        for node in body.node:
            self._add(node)
        return [self._value(info.name) for info in body.output]

    def _loop(self, node: NodeProto, inputs: Sequence[Value]) -> Sequence[Value]:
        trips, condition, *state = (self._tensor(value) for value in inputs)
        body = self._module(bodies_of(node)["body"])
        return self._outputs(node, control.loop, (*body, trips, condition, tuple(state)), {"outputs": len(node.output)})

    def _scan(self, node: NodeProto, inputs: Sequence[Value]) -> Sequence[Value]:
        given = (
            inputs if self.facts.opset >= 9 else inputs[1:]
        )  # before opset 9, the first input was the lengths of the sequences
        body = self._module(bodies_of(node)["body"])
        keywords = attributes_of(node) | {"opset": self.facts.opset}
        return self._outputs(node, control.scan, (*body, tuple(map(self._tensor, given))), keywords)

    def _module(self, body: GraphProto) -> tuple[fx.Node, tuple[fx.Node | None, ...]]:
        """Return a body as a module, and the values of this graph that are passed to it."""
        builder = _Builder(body, self.facts)
        captured: dict[str, fx.Node | None] = {}
        trained = [name for part in graphs_of(body) for name in graph_weights(part)]
        for name in [*free_names(body), *(name for name in trained if name in self.facts.trainable)]:
            value = self._value(name)
            if self._is_constant(value):
                builder.values[name] = value
            else:
                captured[name] = self._tensor(value)
        attribute = self._hold("body", builder.body(list(captured)))
        return self.graph.get_attr(attribute), tuple(captured.values())

    def _is_constant(self, value: Value) -> bool:
        """Return whether a value is known at import time, and thus inside a body too."""
        if isinstance(value, StoredWeight):
            return value.name not in self.facts.trainable
        return value is None or (isinstance(value, Host) and value.is_known)

    def _outputs(
        self, node: NodeProto, function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> list[Value]:
        """Emit a call that returns several tensors, and return those that the node lists."""
        call = self.graph.call_function(function, arguments, keywords)
        return [self.graph.call_function(operator.getitem, (call, index)) for index in range(len(node.output))]

    # Shape arithmetic.

    def _on_host(self, node: NodeProto, inputs: Sequence[Value]) -> list[Host] | None:
        """Compute a node at import time; None if it has to be computed with tensors."""
        if node.domain not in DEFAULT_DOMAINS:
            return None
        if traits_of(node).reads_sizes:
            return self._sizes(node, inputs[0])
        if node.op_type not in host.OPERATORS:
            return None
        known = [value if value is None else self._host(value) for value in inputs]
        if any(found is None and value is not None for found, value in zip(known, inputs, strict=True)):
            return None
        try:
            results = host.compute(node.op_type, self._emit, known, Call(attributes_of(node), self.facts.opset))
        except host.NotOnHostError:
            return None
        return results if len(results) >= len(node.output) else None

    def _sizes(self, node: NodeProto, value: Value) -> list[Host] | None:
        sizes: Sequence[Any]
        if isinstance(value, (Host, StoredWeight)):
            sizes = value.array.shape
        else:
            known = self.facts.types.get(node.input[0])
            if value is None or known is None or known.rank is None:
                return None
            sizes = [self.graph.call_method("size", (value, axis)) for axis in range(known.rank)]
        if node.op_type == "Size":
            return [host.element_count(self._emit, sizes)]
        return [host.shape_of(sizes, attributes_of(node))]

    def _host(self, value: Value) -> Host | None:
        """Return the value as numbers, if it is small and not a weight."""
        if isinstance(value, Host):
            return value
        if (
            not isinstance(value, StoredWeight)
            or value.name in self.facts.trainable
            or value.array.size > host.MAX_HOST_ELEMENTS
        ):
            return None
        if value.array.dtype.kind not in "iub" and value.array.size > 1 and value.name not in self.facts.numbers:
            return None
        return host.make(value.array, value.array.dtype)

    def _emit(self, function: Any, arguments: tuple[Any, ...]) -> fx.Node:
        return self.graph.call_function(function, arguments)

    # Calls.

    def _call(self, node: NodeProto, inputs: Sequence[Value]) -> list[Value]:
        found = find(node.domain, node.op_type)
        assert found is not None, node.op_type
        arguments = [
            self._numbers(value) if slot in found.host else self._tensor(value) for slot, value in enumerate(inputs)
        ]
        if found.function is quant.dequantize_linear:
            both = self._rounded(inputs, arguments, attributes_of(node))
            if both is not None:
                return [both]
        attributes = attributes_of(node)
        if self.facts.live and found.live is not None and self._owns_statistics(node, found):
            module = self._hold(node.name or node.op_type, found.live(attributes))
            return [self.graph.call_module(module, tuple(arguments))]
        keywords = {key: self._argument(value) for key, value in attributes.items()} | self._reserved(node, found)
        if found.many:
            return self._outputs(node, found.function, tuple(arguments), keywords)
        return [self.graph.call_function(found.function, tuple(arguments), keywords)]

    def _rounded(
        self, inputs: Sequence[Value], arguments: Sequence[Any], attributes: Mapping[str, Any]
    ) -> fx.Node | None:
        """Return one call for a QuantizeLinear and the inverse DequantizeLinear; None if the node is something else."""
        value = inputs[0]
        if isinstance(value, StoredWeight) and value.name in self.quantisations:
            how = self.quantisations[value.name]
            operands = arguments[0], *(self.graph.get_attr(attribute) for attribute in (how.scale, how.zero_point))
            return self.graph.call_function(quant.fake_quantize, operands, dict(how.options))
        is_quantised = isinstance(value, fx.Node) and value.target is quant.quantize_linear
        if not is_quantised or len(arguments) < 3 or arguments[2] is None:
            return None
        assert isinstance(value, fx.Node)
        plain = not {"output_dtype", "precision"} & (set(attributes) | set(value.kwargs))
        if not plain or value.args[1:] != tuple(arguments[1:]) or {**value.kwargs, **attributes} != value.kwargs:
            return None
        return self.graph.call_function(quant.fake_quantize, value.args, dict(value.kwargs))

    def _owns_statistics(self, node: NodeProto, found: Operator) -> bool:
        """Return whether a normalisation's statistics are stored tensors used nowhere else."""
        names = [node.input[slot] for slot in found.frozen]
        return len(node.output) == 1 and all(name in self.names and self.facts.uses[name] == 1 for name in names)

    def _reserved(self, node: NodeProto, found: Operator) -> dict[str, Any]:
        """Return the arguments for reserved parameters, which are neither inputs nor attributes."""
        makers: dict[str, Callable[[], Any]] = {
            "opset": lambda: self.facts.opset,
            "outputs": lambda: len(node.output),
            "like": lambda: self.like,
            "input_type": lambda: self._input_type(node),
            "masked": lambda: node.input[0] in self._masked,
        }
        return {name: makers[name]() for name in sorted(found.reserved)}

    def _input_type(self, node: NodeProto) -> torch.dtype:
        """Return the torch type of the node's first input."""
        value, known = self.values[node.input[0]], self.facts.types.get(node.input[0])
        if isinstance(value, Host):
            return torch_dtype(value.dtype)
        if isinstance(value, StoredWeight):
            return torch_dtype(value.array.dtype)
        if known is None or not known.elem_type:
            raise UnsupportedError(f"{title(node)}: the type of its input {node.input[0]!r} cannot be inferred")
        return elem_dtype(known.elem_type)

    def _argument(self, value: Any) -> Any:
        return self._unnamed(value) if isinstance(value, np.ndarray) else value

    def _numbers(self, value: Value) -> Any:
        """Return the value as a flat tuple of numbers, or of nodes that compute numbers."""
        if value is None:
            return None
        if isinstance(value, StoredWeight):
            return tuple(value.array.reshape(-1).tolist())
        if isinstance(value, Host):
            return value.scalars()
        return self.graph.call_function(as_numbers, (value,))

    def _tensor(self, value: Value) -> fx.Node | None:
        """Return the value as a tensor."""
        if isinstance(value, StoredWeight):
            return self._stored(value)
        if not isinstance(value, Host):
            return value
        if value.is_known:
            return self._unnamed(value.array)
        dtype, shape = torch_dtype(value.dtype), tuple(value.array.shape)
        return self.graph.call_function(as_tensor, (value.scalars(), shape), {"dtype": dtype, "like": self.like})

    def _stored(self, weight: StoredWeight) -> fx.Node:
        if weight.name not in self.nodes:
            held = weight.name in self.names
            self.nodes[weight.name] = (
                self.graph.get_attr(self.names[weight.name]) if held else self._unnamed(weight.array)
            )
        return self.nodes[weight.name]

    def _unnamed(self, array: Array) -> fx.Node:
        """Register a tensor that has no name of its own in the file."""
        return self.graph.get_attr(self._hold("constant", to_torch(array)))
