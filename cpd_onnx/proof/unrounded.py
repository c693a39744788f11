"""The same model without rounding: half floats become float32, and quantised integers become floats.

Whether the right channels were removed does not depend on the number format, but detecting errors does: rounding to 16
or 8 bits changes outputs as much as a small error would, and a deep network amplifies a single flipped rounding. Models
are therefore compared in this form: half floats become float32, except for numbers that depend on sizes and constants
alone; the result of `QuantizeLinear` is scaled, shifted and clipped to the limits of its type, but not rounded;
operators on integers become operators on floats.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, TypeProto, defs, helper, numpy_helper

from cpd_onnx.ir.model import (
    Array,
    Lazy,
    Model,
    attributes_of,
    bodies_of,
    drop_attribute,
    graphs_of,
    materialize,
    set_attribute,
    to_array,
)
from cpd_onnx.ops.evaluate import Call, compute_outputs
from cpd_onnx.ops.quantized_view import LIMITS
from cpd_onnx.ops.traits import MICROSOFT, traits_of
from cpd_onnx.shapes.editor import Editor
from cpd_onnx.shapes.values import Folded

HALF_TYPES = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
"""16-bit floating-point types (`onnx.TensorProto`), which `single` converts to float32."""
_TYPE_ATTRIBUTES = {"to", "dtype", "output_dtype", "stash_type"}
"""Names of attributes whose value is an element type (ONNX operator specification)."""


class NotUnroundableError(Exception):
    """Raised where a model cannot be expressed without its rounding."""


@dataclass(frozen=True)
class Rounding:
    """How a model rounds.

    Attributes:
        has_halves: Whether it has 16-bit floats.
        has_integers: Whether it rounds activations to integers.

    """

    has_halves: bool
    has_integers: bool

    def __bool__(self) -> bool:
        """Return whether the model rounds at all."""
        return self.has_halves or self.has_integers


def rounding_of(model: Model) -> Rounding:
    """Return how a model rounds."""
    constants = {tensor.name for graph in graphs_of(model.graph) for tensor in graph.initializer}
    nodes = [node for graph in graphs_of(model.graph) for node in graph.node]
    nodes += [node for function in model.proto.functions for node in function.node]
    integers = False
    for node in nodes:
        if not bodies_of(node) and all(name in constants for name in node.input if name):  # bodies use further tensors
            constants.update(node.output)
        else:
            integers |= _is_rounding(node)
    return Rounding(any(kind in HALF_TYPES for kind in _types(model, nodes)), integers)


def _is_rounding(node: NodeProto) -> bool:
    if node.op_type == "MatMulNBits":
        return bool(attributes_of(node).get("accuracy_level", 0) == 4)
    return traits_of(node).rounds_activations


def _types(model: Model, nodes: Iterable[NodeProto]) -> Iterator[int]:
    """Yield the element types that a model names."""
    for graph in graphs_of(model.graph):
        yield from (tensor.data_type for tensor in graph.initializer)
        yield from (info.type.tensor_type.elem_type for info in (*graph.input, *graph.output))
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        if attribute.HasField("t"):
            yield attribute.t.data_type
        elif attribute.name in _TYPE_ATTRIBUTES:
            yield attribute.i


def single(model: Model) -> Model:
    """Return a copy of a model with half floats converted to float32."""
    copy = model.copy()
    for tensor in list(copy.graph.initializer):
        if tensor.data_type in HALF_TYPES:
            copy.retype(tensor.name, _float32(copy.lazy_array(tensor.name)))
    for graph in graphs_of(copy.graph):
        for tensor in graph.initializer if graph is not copy.graph else ():
            _widen(tensor)
        for info in (*graph.input, *graph.output, *graph.value_info):
            _widen_type(info.type)
        rounded = _rounded_numbers(graph)
        _widen_nodes(graph.node)
        _round_again(graph, rounded)
    for function in copy.proto.functions:
        _widen_nodes(function.node)
    return copy


def _rounded_numbers(graph: GraphProto) -> dict[str, int]:
    """Return the half float type of each tensor that is cast to one and depends on sizes and constants alone.

    The pruned model may store such a number as it was, rounded, where the original computes it.
    """
    fixed, found = {tensor.name for tensor in graph.initializer}, {}
    for node in graph.node:
        traits, inputs = traits_of(node), [name for name in node.input if name]
        if bodies_of(node) or not (traits.reads_sizes or traits.is_constant or (inputs and fixed.issuperset(inputs))):
            continue
        fixed.update(node.output)
        kind = attributes_of(node).get("to")
        if kind in HALF_TYPES:
            found[node.output[0]] = int(kind)
    return found


def _round_again(graph: GraphProto, rounded: dict[str, int]) -> None:
    """Round the inputs of the casts that make these tensors."""
    names = {name for node in graph.node for name in (*node.input, *node.output)}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.output and node.output[0] in rounded:
            half = f"{node.output[0]}_half"
            while half in names:
                half += "_"
            nodes.append(helper.make_node("Cast", [node.input[0]], [half], to=rounded[node.output[0]]))
            node.input[0] = half
        nodes.append(node)
    if len(nodes) > len(graph.node):
        copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type in HALF_TYPES:
        tensor.CopyFrom(numpy_helper.from_array(to_array(tensor).astype(np.float32), tensor.name))


def _widen_type(kind: TypeProto) -> None:
    if kind.HasField("tensor_type") and kind.tensor_type.elem_type in HALF_TYPES:
        kind.tensor_type.elem_type = TensorProto.FLOAT
    for inner in (kind.sequence_type, kind.optional_type):
        if inner.HasField("elem_type"):
            _widen_type(inner.elem_type)


def _widen_nodes(nodes: Iterable[NodeProto]) -> None:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        if attribute.HasField("t"):
            _widen(attribute.t)
        elif attribute.name in _TYPE_ATTRIBUTES and attribute.type == AttributeProto.INT and attribute.i in HALF_TYPES:
            attribute.i = TensorProto.FLOAT


def unrounded(model: Model, folded: Folded, rounded: Container[str] = ()) -> tuple[Model, frozenset[str]]:
    """Return a copy without rounding to integers, and the names of tensors that are floats in it, integers in the file.

    Args:
        model: The model.
        folded: The original that it was derived from, with the types of its tensors.
        rounded: Tensors that remain integers.

    Raises NotUnroundableError if no such model exists.
    """
    unrounder = _Unrounder(model.copy(), folded, rounded)
    unrounder.run()
    return unrounder.model, frozenset(unrounder.floating)


class _Unrounder(Editor):
    def __init__(self, model: Model, folded: Folded, rounded: Container[str]) -> None:
        super().__init__(model)
        self.folded, self.rounded = folded, rounded
        self.floating: set[str] = set()
        self.constants: dict[str, TensorProto | NodeProto | None] = {}
        self.nodes: list[NodeProto] = []
        self.opsets = {o.domain if o.domain != "ai.onnx" else "": o.version for o in model.proto.opset_import}

    def run(self) -> None:
        if any(_is_rounding(node) for function in self.model.proto.functions for node in function.node):
            raise NotUnroundableError("a function of the model rounds")
        self.walk(self.model.graph)

    def walk(self, graph: GraphProto) -> None:
        """Rewrite a graph, whose nodes are in topological order."""
        self.constants |= dict.fromkeys(t.name for t in graph.initializer)
        outside, self.nodes = self.nodes, []
        for node in graph.node:
            copy = NodeProto()
            copy.CopyFrom(node)
            self.rewrite(copy)
        written, self.nodes = self.nodes, outside
        del graph.node[:]
        graph.node.extend(written)
        for info in (*graph.output, *graph.value_info):
            if info.name in self.floating:
                info.type.tensor_type.elem_type = TensorProto.FLOAT

    def rewrite(self, node: NodeProto) -> None:
        """Append the nodes that replace a node."""
        if traits_of(node).is_constant:
            self.constants[node.output[0]] = next((a.t for a in node.attribute if a.name == "value"), None)
            self.nodes.append(node)
        elif all(name in self.constants for name in node.input if name) and not bodies_of(node) and node.input:
            self.constants |= dict.fromkeys(node.output, node if len(node.output) == 1 else None)
            self.nodes.append(node)
        elif node.output[0] in self.rounded:
            self.nodes.append(node)
        elif (write := _WRITERS.get((node.domain if node.domain != "ai.onnx" else "", node.op_type))) is not None:
            write(self, node)
        elif node.op_type == "MatMulNBits":
            drop_attribute(node, "accuracy_level")
            self.nodes.append(node)
        elif _is_rounding(node):
            raise NotUnroundableError(f"{node.op_type} rounds inside")
        else:
            self.pass_on(node)

    def pass_on(self, node: NodeProto) -> None:
        """Append an operator that works on integers as on floats, with the types of its inputs changed if needed."""
        bodies = bodies_of(node)
        for body in bodies.values():
            self.walk(body)
        if bodies:
            self.leave(node, list(bodies.values()))
        elif self.floating.isdisjoint(node.input):
            self.nodes.append(node)
        elif node.op_type == "Cast":
            kind = attributes_of(node)["to"]
            is_number = kind in (TensorProto.FLOAT, TensorProto.DOUBLE)
            self.put(
                "Cast" if is_number else "Identity",
                [node.input[0]],
                node.output[0],
                **({"to": kind} if is_number else {}),
            )
            self.floating |= set() if is_number else {node.output[0]}
        else:
            self.widen(node)

    def leave(self, node: NodeProto, bodies: Sequence[GraphProto]) -> None:
        """Append a node with bodies; an output of an If may be float if it is in both branches."""
        results = [[o.name in self.floating for o in body.output] for body in bodies]
        if traits_of(node).branches and all(flags == results[0] for flags in results):
            self.floating |= {name for name, flag in zip(node.output, results[0], strict=True) if flag}
        elif any(map(any, results)) or not self.floating.isdisjoint(node.input):
            raise NotUnroundableError(f"{node.op_type} carries quantised integers")
        self.nodes.append(node)

    def widen(self, node: NodeProto) -> None:
        """Convert all inputs of a node whose type parameter is now float, by the operator's schema."""
        try:
            schema = defs.get_schema(node.op_type, self.opsets.get(node.domain, 1), node.domain)
        except defs.SchemaError as error:
            raise NotUnroundableError(f"{node.op_type} takes quantised integers") from error
        kinds = [_formal(schema.inputs, slot) for slot in range(len(node.input))]
        changed = {kind for kind, name in zip(kinds, node.input, strict=True) if name in self.floating}
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        if not all("tensor(float)" in allowed.get(kind, ()) for kind in changed):
            raise NotUnroundableError(f"{node.op_type} takes quantised integers")
        for slot, (kind, name) in enumerate(zip(kinds, node.input, strict=True)):
            if kind in changed and name and name not in self.floating:
                node.input[slot] = self.number(name)
        self.nodes.append(node)
        outputs = (name for place, name in enumerate(node.output) if name and _formal(schema.outputs, place) in changed)
        self.floating.update(outputs)

    # Helpers that append nodes.

    def put(
        self, operator: str, inputs: Sequence[str], output: str = "", *, domain: str = "", **attributes: Any
    ) -> str:
        """Append a node, and return the name of its output."""
        name = output or self.fresh(f"{operator.lower()}_unrounded")
        self.nodes.append(helper.make_node(operator, list(inputs), [name], domain=domain, **attributes))
        return name

    def constant(self, name: str) -> Array | Lazy | None:
        """Return the values of a constant, or of a node of constants; None for other tensors."""
        if self.model.has(name):
            return self.model.lazy_array(name)
        source = self.constants.get(name)
        if isinstance(source, TensorProto):
            return to_array(source)
        if source is None:
            return None
        values = [self.constant(each) for each in source.input]
        known = [materialize(value) for value in values if value is not None]
        if len(known) < len(values):
            return None
        outputs = compute_outputs(source.op_type, Call(attributes_of(source), self.model.opset), known)
        return None if outputs is None else outputs[0]

    def number(self, name: str) -> str:
        """Return the name of a tensor converted to float."""
        value = self.folded.scope.values.get(name)
        if name in self.floating or (value is not None and value.dtype == TensorProto.FLOAT):
            return name
        values = self.constant(name)
        if values is not None:
            return self.add_fresh(f"{name}_unrounded", _float32(values))
        return self.put("Cast", [name], to=TensorProto.FLOAT)

    def along(self, name: str, axis: int, rank: int | None) -> str:
        """Return the name of a scale or zero point, as floats that broadcast along an axis of a tensor."""
        values = self.constant(name)
        if values is None:
            value = self.folded.scope.values.get(name)
            if value is None or value.shape is None or np.prod(value.shape) != 1:
                raise NotUnroundableError(f"{name!r} is computed")
            return self.number(name)
        array = _as_float(values)
        if array.size == 1:
            return self.add_fresh(f"{name}_unrounded", array.reshape(()))
        if array.ndim != 1 or rank is None:
            raise NotUnroundableError(f"{name!r} belongs to blocks")
        place = axis % rank
        return self.add_fresh(f"{name}_unrounded", array.reshape([-1 if i == place else 1 for i in range(rank)]))

    def rank(self, *names: str) -> int | None:
        for name in names:
            value = self.folded.scope.values.get(name)
            if value is not None and value.shape is not None:
                return len(value.shape)
        return None

    def real(self, node: NodeProto, slots: tuple[int, int, int], axis: int = 1) -> str:
        """Return the name of the dequantised input at a slot, with scale and zero point at others (-1 for none)."""
        x, scale, zero = (_at(node, slot) for slot in slots)
        rank = self.rank(x, node.output[0])
        if x not in self.floating and self.constant(x) is not None:
            return self.stored(x, scale, zero, axis)
        found = self.number(x)
        if zero:
            found = self.put("Sub", [found, self.along(zero, axis, rank)])
        return self.put("Mul", [found, self.along(scale, axis, rank)]) if scale else found

    def stored(self, name: str, scale: str, zero: str, axis: int) -> str:
        """Return the name of a dequantised constant."""
        values = self.constant(name)
        assert values is not None
        numbers = [None if not each else self.constant(each) for each in (scale, zero)]
        if any(each and number is None for each, number in zip((scale, zero), numbers, strict=True)):
            raise NotUnroundableError(f"the scale of {name!r} is computed")
        factor, shift = (None if n is None else _aligned(_as_float(n), values.shape, axis) for n in numbers)

        def dequantized(values: Array | Lazy) -> Array:
            array = _as_float(values)
            array = array if shift is None else array - shift
            return np.asarray(array if factor is None else array * factor, np.float32)

        return self.add_fresh(f"{name}_unrounded", _float32(values, dequantized))

    def bias(self, name: str, scales: tuple[str, str]) -> str:
        """Return the name of a dequantised bias, whose scale is the product of two others."""
        values = [self.constant(each) for each in (name, *scales)]
        if any(value is None for value in values):
            raise NotUnroundableError(f"{name!r} or its scale is computed")
        bias, first, second = (_as_float(value) for value in values if value is not None)
        return self.add_fresh(f"{name}_unrounded", (bias * first * second).astype(np.float32))

    def cut(self, x: str, node: NodeProto, slots: tuple[int, int], axis: int = 1) -> None:
        """Append nodes that scale, shift and clip floats in place of a quantisation to the node's first output."""
        scale, zero = (_at(node, slot) for slot in slots)
        output = node.output[0]
        kind = self.type_of(zero) if zero else attributes_of(node).get("output_dtype", 0) or TensorProto.UINT8
        if kind not in LIMITS:
            raise NotUnroundableError(f"{node.op_type} has a float8 output")
        rank = self.rank(node.input[0], output)
        found = self.put("Div", [x, self.along(scale, axis, rank)])
        if zero:
            found = self.put("Add", [found, self.along(zero, axis, rank)])
        low, high = (self.add_fresh("limit", np.asarray(limit, np.float32)) for limit in LIMITS[kind])
        found = self.put("Max", [found, low])
        self.put("Min", [found, high], output)
        self.floating.add(output)

    def type_of(self, name: str) -> int:
        values = self.constant(name)
        if values is not None:
            return helper.np_dtype_to_tensor_dtype(values.dtype)
        value = self.folded.scope.values.get(name)
        return value.dtype if value is not None else 0


def _as_float(values: Array | Lazy) -> Array:
    return np.asarray(materialize(values)).astype(np.float32)


def _float32(values: Array | Lazy, convert: Callable[[Array | Lazy], Array] = _as_float) -> Array | Lazy:
    """Return values converted to float32: at once, or on each access if they are lazy."""
    if isinstance(values, Lazy):
        return Lazy(np.dtype(np.float32), values.shape, lambda: convert(values))
    return convert(values)


def _aligned(numbers: Array, shape: Sequence[int], axis: int) -> Array:
    """Return scales or zero points in a shape that broadcasts against a weight."""
    if numbers.size == 1:
        return numbers.reshape(())
    if numbers.ndim != 1 or numbers.size != shape[axis]:
        raise NotUnroundableError("scales belong to blocks")
    place = axis % len(shape)
    return numbers.reshape([-1 if i == place else 1 for i in range(len(shape))])


def _at(node: NodeProto, slot: int) -> str:
    return node.input[slot] if 0 <= slot < len(node.input) else ""


def _formal(formal: Sequence[Any], slot: int) -> str:
    """Return the type parameter of a slot of an operator's schema."""
    return str(formal[min(slot, len(formal) - 1)].type_str)


# Operators that round, or take quantised integers.

_ONE_AXIS = 13
"""First opset whose Softmax is along one axis, instead of all from it on (ONNX specification)."""

_Writer = Callable[[_Unrounder, NodeProto], None]


def _quantize(to: _Unrounder, node: NodeProto) -> None:
    to.cut(to.number(node.input[0]), node, (1, 2), attributes_of(node).get("axis", 1))


def _dequantize(to: _Unrounder, node: NodeProto) -> None:
    if node.input[0] not in to.floating:
        to.nodes.append(node)
        return
    found = to.real(node, (0, 1, 2), attributes_of(node).get("axis", 1))
    to.put("Identity", [found], node.output[0])


def _dynamic(to: _Unrounder, node: NodeProto) -> None:
    to.put("Identity", [node.input[0]], node.output[0])
    to.floating.add(node.output[0])
    for name, value in zip(node.output[1:], (np.float32(1), np.uint8(0)), strict=False):
        if name:
            tensor = numpy_helper.from_array(np.asarray(value))
            to.put("Constant", [], name, value=tensor)
            to.constants[name] = tensor


def _conv(to: _Unrounder, node: NodeProto) -> None:
    inputs = [to.real(node, (0, 1, 2)), to.real(node, (3, 4, 5), 0)]
    if _at(node, 8):
        inputs.append(to.bias(node.input[8], (node.input[1], node.input[4])))
    to.cut(_laid_out(to, "Conv", node, inputs, attributes_of(node)), node, (6, 7))


def _matmul(to: _Unrounder, node: NodeProto) -> None:
    to.cut(to.put("MatMul", [to.real(node, (0, 1, 2), -2), to.real(node, (3, 4, 5), -1)]), node, (6, 7), -1)


def _integer(operator: str, axes: tuple[int, int], to: _Unrounder, node: NodeProto) -> None:
    inputs = [to.real(node, (0, -1, 2), axes[0]), to.real(node, (1, -1, 3), axes[1])]
    to.put(operator, inputs, node.output[0], **attributes_of(node))
    to.floating.add(node.output[0])


def _biased(to: _Unrounder, node: NodeProto, inputs: list[str], bias: str) -> None:
    if not bias:
        to.put("MatMul", inputs, node.output[0])
    else:
        to.put("Add", [to.put("MatMul", inputs), bias], node.output[0])


def _dynamic_matmul(to: _Unrounder, node: NodeProto) -> None:
    _biased(to, node, [node.input[0], to.real(node, (1, 2, 3), -1)], _at(node, 4))


def _integer_to_float(to: _Unrounder, node: NodeProto) -> None:
    _biased(to, node, [to.real(node, (0, 2, 4), -2), to.real(node, (1, 3, 5), -1)], _at(node, 6))


def _binary(operator: str, to: _Unrounder, node: NodeProto) -> None:
    to.cut(to.put(operator, [to.real(node, (0, 1, 2)), to.real(node, (3, 4, 5))]), node, (6, 7))


def _unary(operator: str, to: _Unrounder, node: NodeProto) -> None:
    attributes = attributes_of(node)
    to.cut(_laid_out(to, operator, node, [to.real(node, (0, 1, 2))], attributes), node, (3, 4))


def _softmax(to: _Unrounder, node: NodeProto) -> None:
    attributes = attributes_of(node)
    if (attributes.pop("opset") < _ONE_AXIS) != (to.opsets.get("", 1) < _ONE_AXIS):
        raise NotUnroundableError(f"{node.op_type} is that of another opset than the model's")
    to.cut(to.put("Softmax", [to.real(node, (0, 1, 2))], **({"axis": -1} | attributes)), node, (3, 4))


def _laid_out(to: _Unrounder, operator: str, node: NodeProto, inputs: list[str], attributes: dict[str, Any]) -> str:
    """Append an operator on channels first, between transpositions if the node has its channels last."""
    if not attributes.pop("channels_last", 0):
        return to.put(operator, inputs, **attributes)
    rank = to.rank(node.input[0], node.output[0])
    if rank is None:
        raise NotUnroundableError(f"{node.op_type} has channels last in a tensor of unknown rank")
    first = to.put("Transpose", inputs[:1], perm=[0, rank - 1, *range(1, rank - 1)])
    return to.put("Transpose", [to.put(operator, [first, *inputs[1:]], **attributes)], perm=[0, *range(2, rank), 1])


def _pool(to: _Unrounder, node: NodeProto) -> None:
    if node.input[0] not in to.floating:
        to.nodes.append(node)
        return
    found = _laid_out(to, "MaxPool", node, [node.input[0]], attributes_of(node) | {"channels_last": 1})
    to.put("Identity", [found], node.output[0])
    to.floating.add(node.output[0])


def _where(to: _Unrounder, node: NodeProto) -> None:
    to.cut(to.put("Where", [node.input[0], to.real(node, (1, 2, 3)), to.real(node, (4, 5, 6))]), node, (7, 8))


def _concat(to: _Unrounder, node: NodeProto) -> None:
    parts = [to.real(node, (slot, slot + 1, slot + 2)) for slot in range(2, len(node.input), 3)]
    to.cut(to.put("Concat", parts, **attributes_of(node)), node, (0, 1))


def _gemm(to: _Unrounder, node: NodeProto) -> None:
    attributes = attributes_of(node)
    inputs = [to.real(node, (0, 1, 2)), to.real(node, (3, 4, 5), 0 if attributes.get("transB", 0) else 1)]
    if _at(node, 6):
        inputs.append(to.bias(node.input[6], (node.input[1], node.input[4])))
    if not _at(node, 7):
        to.put("Gemm", inputs, node.output[0], **attributes)
        return
    to.cut(to.put("Gemm", inputs, **attributes), node, (7, 8))


def _lstm(to: _Unrounder, node: NodeProto) -> None:
    matrices = []
    for slot, scale in ((1, 8), (2, 10)):
        arrays = [to.constant(node.input[place]) for place in (slot, scale, scale + 1)]
        if any(array is None for array in arrays):
            raise NotUnroundableError("the weights of DynamicQuantizeLSTM are computed")
        values, factor, zero = (_as_float(array) for array in arrays if array is not None)
        factor, zero = (a.reshape(len(values), 1, -1) for a in (factor, zero))
        array = np.ascontiguousarray(((values - zero) * factor).transpose(0, 2, 1), np.float32)
        matrices.append(to.add_fresh(f"{node.input[slot]}_unrounded", array))
    _replaced(to, node, "LSTM", [node.input[0], *matrices, *node.input[3:8]])


def _attention(to: _Unrounder, node: NodeProto) -> None:
    inputs = [to.real(node, (0, 3, 6)), to.real(node, (1, 4, 7), 1), node.input[2], _at(node, 5), _at(node, 8)]
    while not inputs[-1]:
        inputs.pop()
    _replaced(to, node, "Attention", inputs, MICROSOFT)


def _embedding(to: _Unrounder, node: NodeProto) -> None:
    tables = [to.real(node, (slot, slot + 6, slot + 11)) if _at(node, slot) else "" for slot in range(2, 7)]
    inputs = [*node.input[:2], *tables, _at(node, 7)]
    _replaced(to, node, "EmbedLayerNormalization", inputs if inputs[-1] else inputs[:-1], MICROSOFT)


def _replaced(to: _Unrounder, node: NodeProto, operator: str, inputs: Sequence[str], domain: str = "") -> None:
    """Append an operator with the outputs and attributes of a node."""
    replacement = helper.make_node(operator, list(inputs), list(node.output), domain=domain)
    for name, value in attributes_of(node).items():
        set_attribute(replacement, name, value)
    to.nodes.append(replacement)


_WRITERS: dict[tuple[str, str], _Writer] = {
    ("", "QuantizeLinear"): _quantize, (MICROSOFT, "QuantizeLinear"): _quantize,
    ("", "DequantizeLinear"): _dequantize, (MICROSOFT, "DequantizeLinear"): _dequantize,
    ("", "DynamicQuantizeLinear"): _dynamic, ("", "QLinearConv"): _conv, ("", "QLinearMatMul"): _matmul,
    ("", "ConvInteger"): partial(_integer, "Conv", (1, 0)),
    ("", "MatMulInteger"): partial(_integer, "MatMul", (-2, -1)),
    (MICROSOFT, "DynamicQuantizeMatMul"): _dynamic_matmul, (MICROSOFT, "MatMulIntegerToFloat"): _integer_to_float,
    (MICROSOFT, "QLinearAdd"): partial(_binary, "Add"), (MICROSOFT, "QLinearMul"): partial(_binary, "Mul"),
    (MICROSOFT, "QLinearSigmoid"): partial(_unary, "Sigmoid"),
    (MICROSOFT, "QLinearSoftmax"): _softmax,
    (MICROSOFT, "QLinearLeakyRelu"): partial(_unary, "LeakyRelu"),
    (MICROSOFT, "QLinearGlobalAveragePool"): partial(_unary, "GlobalAveragePool"),
    (MICROSOFT, "QLinearAveragePool"): partial(_unary, "AveragePool"),
    (MICROSOFT, "QLinearConcat"): _concat, (MICROSOFT, "QGemm"): _gemm, (MICROSOFT, "DynamicQuantizeLSTM"): _lstm,
    (MICROSOFT, "QAttention"): _attention, (MICROSOFT, "QLinearConv"): _conv,
    (MICROSOFT, "QEmbedLayerNormalization"): _embedding, (MICROSOFT, "QLinearWhere"): _where,
    (MICROSOFT, "NhwcMaxPool"): _pool,
}  # fmt: skip  # a table
