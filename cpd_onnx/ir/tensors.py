"""The tensors stored in a model file, by name, and the SHA-256 of their values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, numpy_helper

from cpd_onnx.ir.model import (
    DEFAULT_DOMAINS,
    Array,
    Lazy,
    Model,
    bodies_of,
    materialize,
    replace_values,
    to_array,
)

_NUMBERS = {
    "value_float": (TensorProto.FLOAT, np.float32), "value_floats": (TensorProto.FLOAT, np.float32),
    "value_int": (TensorProto.INT64, np.int64), "value_ints": (TensorProto.INT64, np.int64),
}  # fmt: skip  # a table
"""Attributes of Constant nodes that hold plain numbers: element type of the output and numpy type."""


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor stored in a model file.

    Attributes:
        data_type: ONNX element type.
        get: Function that returns the values, lazy if the model is large.
    """

    data_type: int
    get: Callable[[], Array | Lazy]

    def array(self) -> Array:
        """Return the values; read-only for the caller."""
        return materialize(self.get())

    def sha256(self) -> str:
        """Return the SHA-256 of type, shape and values, see `values_sha256`."""
        return values_sha256(self.data_type, self.array())


def values_sha256(data_type: int, values: Array) -> str:
    """Return the SHA-256 of a tensor's type, shape and values as hexadecimal digits.

    The hash covers the name of the ONNX element type, the sizes of the axes in brackets, a line break, and the elements
    in row-major order as in `raw_data`: little-endian, with elements of less than a byte packed. For a float32 tensor
    of shape [2, 3] that is `FLOAT[2,3]`, a line break and 24 bytes.

    >>> values_sha256(TensorProto.FLOAT, np.zeros((2, 3), np.float32))[:16]
    '55f08824a8fd2a54'
    """
    head = f"{TensorProto.DataType.Name(data_type)}[{','.join(map(str, values.shape))}]\n"
    digest = hashlib.sha256(head.encode())
    if data_type in _WHOLE:
        digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    else:
        digest.update(numpy_helper.from_array(np.ascontiguousarray(values)).raw_data)
    return digest.hexdigest()


_WHOLE = {
    TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8,
    TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL,
}  # fmt: skip  # a table
"""Element types with the same layout in memory as in `raw_data`."""


def stored_tensors(model: Model) -> dict[str, StoredTensor]:
    """Return all initializers and Constant nodes of the main graph and its subgraphs by name, in the order of the file.

    A Constant node has the name of its output. In a subgraph the path of the subgraph comes first, as in
    "/If_3.then_branch:weight". Further tensors of the same name are numbered "#2" and so on.
    """
    found: dict[str, StoredTensor] = {}
    for path, graph in walk(model.graph):
        for name, tensor in _of_graph(None if path else model, graph):
            full, number = address(path, name), 2
            while full in found:
                full, number = f"{address(path, name)}#{number}", number + 1
            found[full] = tensor
    return found


def address(path: str, name: str) -> str:
    """Return the name of a tensor in the graph at a path, as in `stored_tensors`."""
    return f"{path}:{name}" if path else name


def walk(graph: GraphProto, path: str = "") -> Iterator[tuple[str, GraphProto]]:
    """Yield a graph and all its subgraphs, each with its path."""
    yield path, graph
    for node in graph.node:
        for name, body in bodies_of(node).items():
            yield from walk(body, path_of_body(path, node, name))


def path_of_body(path: str, node: NodeProto, attribute: str) -> str:
    """Return the path of a subgraph: that of the node's graph, the name of the node and that of the attribute."""
    return f"{path}/{node.name or (node.output[0] if node.output else '')}.{attribute}"


def _of_graph(main: Model | None, graph: GraphProto) -> Iterator[tuple[str, StoredTensor]]:
    for tensor in graph.initializer:
        yield tensor.name, _initializer(main, tensor)
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in DEFAULT_DOMAINS and node.output:
            for attribute in node.attribute:
                constant = _constant(attribute)
                if constant is not None:
                    yield node.output[0], constant


def _initializer(main: Model | None, tensor: TensorProto) -> StoredTensor:
    """Return an initializer; those of the main graph may be detached and are looked up in the model."""
    if main is not None:
        return StoredTensor(tensor.data_type, lambda: main.lazy_array(tensor.name))
    return StoredTensor(tensor.data_type, lambda: to_array(tensor))


def _constant(attribute: AttributeProto) -> StoredTensor | None:
    """Return the value of a Constant node; None if it is not a dense numeric tensor."""
    if attribute.name == "value" and attribute.HasField("t"):
        return StoredTensor(attribute.t.data_type, lambda: to_array(attribute.t))
    if attribute.name not in _NUMBERS:
        return None
    kind, dtype = _NUMBERS[attribute.name]
    field = {"value_float": "f", "value_floats": "floats", "value_int": "i", "value_ints": "ints"}[attribute.name]
    return StoredTensor(kind, lambda: np.asarray(getattr(attribute, field), dtype))


def held(model: Model, name: str) -> Array | None:
    """Return the values of an initializer or a Constant node of the main graph, read-only; None for other tensors."""
    if model.has(name):
        return model.array(name)
    tensor = _constant_tensor(model, name)
    return None if tensor is None else to_array(tensor)


def held_array(model: Model, name: str) -> Array:
    """Return the values of an initializer or a Constant node of the main graph, which must exist, read-only."""
    found = held(model, name)
    assert found is not None, name
    return found


def held_type(model: Model, name: str) -> tuple[int, tuple[int, ...]] | None:
    """Return element type and shape of an initializer or a Constant node of the main graph; None for other tensors."""
    tensor = model.tensor(name) if model.has(name) else _constant_tensor(model, name)
    return None if tensor is None else (tensor.data_type, tuple(tensor.dims))


def hold(model: Model, name: str, values: Array) -> None:
    """Replace the values of an initializer or a Constant node of the main graph, of the same element type."""
    if model.has(name):
        model.set_array(name, values)
        return
    tensor = _constant_tensor(model, name)
    assert tensor is not None, name
    replace_values(tensor, values)


def constant_tensors(model: Model) -> dict[str, TensorProto]:
    """Return the tensors that Constant nodes of the main graph hold, by name."""
    pairs = ((node, _tensor_of(node)) for node in model.graph.node)
    return {node.output[0]: tensor for node, tensor in pairs if tensor is not None}


def _constant_tensor(model: Model, name: str) -> TensorProto | None:
    return next((_tensor_of(node) for node in model.graph.node if name and name in node.output), None)


def _tensor_of(node: NodeProto) -> TensorProto | None:
    """Return the tensor of a Constant node; None for other nodes, and for numbers that are no tensor."""
    if node.op_type != "Constant" or node.domain not in DEFAULT_DOMAINS or not node.output:
        return None
    return next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)


def same_bits(one: Array, other: Array) -> bool:
    """Return whether two arrays of the same type and shape have equal bits; strings are compared as strings."""
    if one is other:
        return True
    if one.dtype.kind in "OSU":
        return bool(np.array_equal(one, other))
    first, second = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (one, other))
    return bool(np.array_equal(first, second))


def changed_values(before: Model, after: Model) -> dict[str, str]:
    """Return the SHA-256, by name, of each tensor in `after` that is new or has other values than in `before`."""
    old = stored_tensors(before)
    found = {}
    for name, tensor in stored_tensors(after).items():
        if name not in old or _differs(old[name], tensor):
            found[name] = tensor.sha256()
    return found


def _differs(one: StoredTensor, other: StoredTensor) -> bool:
    first, second = one.get(), other.get()
    if first is second:
        return False
    if one.data_type != other.data_type or tuple(first.shape) != tuple(second.shape):
        return True
    return not same_bits(materialize(first), materialize(second))
