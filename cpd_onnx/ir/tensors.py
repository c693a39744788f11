"""The tensors that a file stores, by name, and the SHA-256 of their values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, numpy_helper

from cpd_onnx.ir.model import Array, Lazy, Model, bodies_of, made, to_array

DEFAULT_DOMAINS = ("", "ai.onnx")
_NUMBERS = {
    "value_float": (TensorProto.FLOAT, np.float32), "value_floats": (TensorProto.FLOAT, np.float32),
    "value_int": (TensorProto.INT64, np.int64), "value_ints": (TensorProto.INT64, np.int64),
}  # fmt: skip  # a table
"""Attributes of Constant that hold numbers without being tensors."""


@dataclass(frozen=True, eq=False)
class Stored:
    """One tensor of a file.

    Attributes:
        data_type: ONNX element type.
        get: gives the values, or what reads them.
    """

    data_type: int
    get: Callable[[], Array | Lazy]

    def array(self) -> Array:
        """The values; do not write into them."""
        return made(self.get())

    def sha256(self) -> str:
        """See `values_sha256`."""
        return values_sha256(self.data_type, self.array())


def values_sha256(data_type: int, values: Array) -> str:
    """SHA-256 of a tensor's type, shape and values, in hexadecimal digits.

    Hashed are the name of the ONNX element type, the sizes of the axes in brackets, a line break, and the elements in
    row-major order as they lie in `raw_data`: little-endian, elements of less than a byte packed. A float32 tensor of
    shape [2, 3] so starts with `FLOAT[2,3]` and has 24 bytes behind the line break.

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
"""Element types that lie in memory as in a file."""


def stored_tensors(model: Model) -> dict[str, Stored]:
    """All initializers and Constant nodes of the main graph and its subgraphs, in the order of the file.

    Initializers have their own name, values of Constant nodes that of the output; in subgraphs the path of these stands
    before it, as in "/If_3.then_branch:weight". Where two had the same name, "#2" and so on follows.
    """
    found: dict[str, Stored] = {}
    for path, graph in walk(model.graph):
        for name, tensor in _of_graph(None if path else model, graph):
            full, number = address(path, name), 2
            while full in found:
                full, number = f"{address(path, name)}#{number}", number + 1
            found[full] = tensor
    return found


def address(path: str, name: str) -> str:
    """The name of a tensor in the graph that hangs at a path."""
    return f"{path}:{name}" if path else name


def walk(graph: GraphProto, path: str = "") -> Iterator[tuple[str, GraphProto]]:
    """A graph and all below it, each with its path."""
    yield path, graph
    for node in graph.node:
        for name, body in bodies_of(node).items():
            yield from walk(body, path_of_body(path, node, name))


def path_of_body(path: str, node: NodeProto, attribute: str) -> str:
    """The path of a subgraph of a node: that of the node's graph, the node and the attribute."""
    return f"{path}/{node.name or (node.output[0] if node.output else '')}.{attribute}"


def _of_graph(main: Model | None, graph: GraphProto) -> Iterator[tuple[str, Stored]]:
    for tensor in graph.initializer:
        yield tensor.name, _initializer(main, tensor)
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in DEFAULT_DOMAINS and node.output:
            for attribute in node.attribute:
                constant = _constant(attribute)
                if constant is not None:
                    yield node.output[0], constant


def _initializer(main: Model | None, tensor: TensorProto) -> Stored:
    """An initializer; those of the main graph are looked up in the model."""
    if main is not None:
        return Stored(tensor.data_type, lambda: main.lazily(tensor.name))
    return Stored(tensor.data_type, lambda: to_array(tensor))


def _constant(attribute: AttributeProto) -> Stored | None:
    """The value of a Constant node; None where that is no dense tensor of numbers."""
    if attribute.name == "value" and attribute.HasField("t"):
        return Stored(attribute.t.data_type, lambda: to_array(attribute.t))
    if attribute.name not in _NUMBERS:
        return None
    kind, dtype = _NUMBERS[attribute.name]
    field = {"value_float": "f", "value_floats": "floats", "value_int": "i", "value_ints": "ints"}[attribute.name]
    return Stored(kind, lambda: np.asarray(getattr(attribute, field), dtype))


def same_bits(one: Array, other: Array) -> bool:
    """Whether two arrays of one type and shape have the same bits; strings are compared as such."""
    if one is other:
        return True
    if one.dtype.kind in "OSU":
        return bool(np.array_equal(one, other))
    first, second = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (one, other))
    return bool(np.array_equal(first, second))


def changed_values(before: Model, after: Model) -> dict[str, str]:
    """SHA-256 of the tensors of a model that have other values than those of the same name in another one."""
    old = stored_tensors(before)
    found = {}
    for name, tensor in stored_tensors(after).items():
        if name not in old or _differs(old[name], tensor):
            found[name] = tensor.sha256()
    return found


def _differs(one: Stored, other: Stored) -> bool:
    first, second = one.get(), other.get()
    if first is second:
        return False
    if one.data_type != other.data_type or tuple(first.shape) != tuple(second.shape):
        return True
    return not same_bits(made(first), made(second))
