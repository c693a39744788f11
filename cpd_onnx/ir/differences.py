"""Differences between two models: every node, attribute, value and description is compared.

Values are compared bit by bit, however they are stored: as raw or typed data, inside the file or beside it. Everything
else must be equal in every field of the message, including fields that ONNX does not define.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto

from cpd_onnx.ir.model import Array, Model, bodies_of, to_array
from cpd_onnx.ir.tensors import address, path_of_body, same_bits, walk

_TYPED = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
"""Fields of a tensor that hold its values as typed data."""
_DATA = {*_TYPED, "raw_data", "external_data", "data_location"}
"""Fields of a tensor that hold its values or their location."""
_MAX_LETTERS = 60
"""Maximum number of characters of a value in a message."""


@dataclass(frozen=True)
class Difference:
    """One difference between two models.

    Attributes:
        place: The node, tensor, attribute or entry that differs.
        change: Its value in the first model and in the second.
        tensor: Name of the tensor, as in `stored_tensors`, if only its values differ; otherwise empty.
    """

    place: str
    change: str
    tensor: str = ""

    def __str__(self) -> str:
        """Return place and change as one line."""
        return f"{self.place}: {self.change}"


def differences(first: Model, second: Model) -> Iterator[Difference]:
    """Yield all differences between two models: in the graph, in functions and in metadata."""
    pair = _Pair(first, second)
    yield from pair.graph(first.graph, second.graph, "")
    functions = first.proto.functions, second.proto.functions
    yield from pair.each("", "function", *functions, _function_name, pair.function)
    yield from pair.fields("", first.proto, second.proto, {"graph", "functions"})


@dataclass(frozen=True)
class _Location:
    """Location of a message in a model.

    Attributes:
        text: Description for a user.
        path: Path of the graph that contains it; None in a function.
        nodes: Nodes of that graph in the first model.
        name: Name of the tensor that an attribute of a Constant node holds; otherwise empty.
    """

    text: str
    path: str | None = None
    nodes: Sequence[NodeProto] = ()
    name: str = ""


class _Pair:
    """Two models that are compared."""

    def __init__(self, first: Model, second: Model) -> None:
        self.models = first, second

    # Graphs and functions.

    def graph(self, one: GraphProto, other: GraphProto, path: str) -> Iterator[Difference]:
        """Compare two graphs at the same path."""
        prefix = f"in {path}: " if path else ""
        where = _Location(prefix, path, one.node)
        yield from self.nodes(where, one.node, other.node)
        yield from self.each(
            prefix,
            "initializer",
            one.initializer,
            other.initializer,
            _named,
            lambda a, b: self.initializer(where, a, b),
        )
        yield from self.each(
            prefix, "sparse initializer", one.sparse_initializer, other.sparse_initializer,
            lambda tensor: tensor.values.name,
            lambda a, b: self.message(_Location(f"{prefix}sparse initializer {a.values.name!r}"), a, b),
        )  # fmt: skip  # what and how
        for field, what in (("input", "input"), ("output", "output"), ("value_info", "described shape")):
            yield from self.each(
                prefix, what, getattr(one, field), getattr(other, field), _named,
                self.described(f"{prefix}{what}"),
            )  # fmt: skip  # what and how
        done = {"node", "initializer", "sparse_initializer", "input", "output", "value_info"}
        yield from self.fields(f"{prefix}graph", one, other, done)

    def described(self, text: str) -> Callable[[Any, Any], Iterator[Difference]]:
        """Return a function that compares two inputs, outputs or value descriptions of the same name."""
        return lambda a, b: self.message(_Location(f"{text} {a.name!r}"), a, b)

    def function(self, one: FunctionProto, other: FunctionProto) -> Iterator[Difference]:
        """Compare two local functions of the same name."""
        text = f"in function {_function_name(one)}: "
        yield from self.nodes(_Location(text, None, one.node), one.node, other.node)
        yield from self.fields(text.removesuffix(": "), one, other, {"node"})

    def nodes(self, where: _Location, one: Sequence[NodeProto], other: Sequence[NodeProto]) -> Iterator[Difference]:
        """Compare the nodes of two graphs or functions, matched by position."""
        if len(one) != len(other):
            place = next((i for i, pair in enumerate(zip(one, other, strict=False)) if not _alike(*pair)), None)
            longer = max(one, other, key=len)
            first = longer[min(len(one), len(other)) if place is None else place]
            change = f"{len(one)} nodes -> {len(other)}, the first that differs is {_node_name(first)}"
            yield Difference(f"{where.text}graph", change)
            return
        for a, b in zip(one, other, strict=True):
            if not _same_bytes(a, b):
                yield from self.node(where, a, b)

    def node(self, where: _Location, one: NodeProto, other: NodeProto) -> Iterator[Difference]:
        """Compare two nodes at the same position."""
        text = f"{where.text}node {_node_name(one)}"
        yield from self.fields(text, one, other, {"attribute"})
        for attribute, body in bodies_of(one).items():
            theirs = bodies_of(other).get(attribute)
            if theirs is not None and where.path is not None:
                yield from self.graph(body, theirs, path_of_body(where.path, one, attribute))
        is_constant = one.op_type == "Constant" and where.path is not None and one.output
        name = one.output[0] if is_constant else ""
        of_node = _Location(text, where.path, where.nodes, name)
        yield from self.each(
            f"{text}, ", "attribute", one.attribute, other.attribute, _named, lambda a, b: self.attribute(of_node, a, b)
        )

    def attribute(self, where: _Location, one: AttributeProto, other: AttributeProto) -> Iterator[Difference]:
        """Compare two attributes of the same name, of nodes at the same position."""
        text = f"{where.text}, attribute {one.name!r}"
        if where.path is not None and one.type == other.type == AttributeProto.GRAPH:
            yield from self.fields(text, one, other, {"g"})  # the graph itself is compared with the node
            return
        if where.name and one.name.startswith("value") and one.type == other.type:
            yield from self.constant(where, one, other)
            return
        yield from self.message(_Location(text), one, other)

    def constant(self, where: _Location, one: AttributeProto, other: AttributeProto) -> Iterator[Difference]:
        """Compare the values of two Constant nodes."""
        assert where.path is not None
        takers = _takers(where.nodes, where.name)
        text = f"{where.text.replace('node Constant', 'constant', 1)} of {where.name!r}{takers}"
        full = address(where.path, where.name)
        if one.name == "value":
            yield from self.fields(text, one, other, {"t"})
            yield from self.tensor(text, (one.t, other.t), (_of_proto, _of_proto), full)
            return
        for found in self.message(_Location(text), one, other):
            is_number = one.name in ("value_float", "value_floats", "value_int", "value_ints")
            yield Difference(found.place, found.change, full if is_number else "")

    def initializer(self, where: _Location, one: TensorProto, other: TensorProto) -> Iterator[Difference]:
        """Compare two initializers of the same name."""
        assert where.path is not None
        values: tuple[_Reader, _Reader] = (_of_proto, _of_proto)
        if not where.path:
            values = (_of_model(self.models[0]), _of_model(self.models[1]))
        text = f"{where.text}initializer {one.name!r}{_takers(where.nodes, one.name)}"
        yield from self.tensor(text, (one, other), values, address(where.path, one.name))

    # Tensors.

    def tensor(
        self, text: str, pair: tuple[TensorProto, TensorProto], values: tuple[_Reader, _Reader], name: str = ""
    ) -> Iterator[Difference]:
        """Compare two tensors; `name` is reported if only their values differ, as after refitting or training."""
        one, other = pair
        found = list(self.fields(text, one, other, _DATA))
        yield from found
        if list(one.dims) != list(other.dims) or one.data_type != other.data_type:
            return
        stores = [_stores(*each) for each in zip(pair, values, strict=True)]
        is_single = all(len(each) < 2 for each in stores)
        if not is_single and (stores[0] != stores[1] or _typed(one) != _typed(other)):
            fields = " and ".join(sorted(stores[1])) or "no field"
            yield Difference(text, f"its values are stored in {fields}")
            return
        change = _change(one, other, values)
        if change is not None:
            yield Difference(text, change, "" if found else name)

    # Messages of any kind.

    def each(
        self,
        prefix: str,
        what: str,
        one: Sequence[Any],
        other: Sequence[Any],
        name: Callable[[Any], str],
        compare: Callable[[Any, Any], Iterator[Difference]],
    ) -> Iterator[Difference]:
        """Compare two lists of named messages, in order."""
        names = [name(entry) for entry in one], [name(entry) for entry in other]
        if names[0] != names[1]:
            yield Difference(*_of_names(prefix, what, *names))
            return
        for a, b in zip(one, other, strict=True):
            yield from compare(a, b)

    def message(self, where: _Location, one: Any, other: Any) -> Iterator[Difference]:
        """Compare two messages of the same type."""
        if isinstance(one, TensorProto):
            yield from self.tensor(where.text, (one, other), (_of_proto, _of_proto))
        elif isinstance(one, NodeProto):
            yield from self.node(_Location(f"{where.text}: "), one, other)
        elif not _same_bytes(one, other):
            yield from self.fields(where.text, one, other)

    def fields(self, text: str, one: Any, other: Any, done: Iterable[str] = ()) -> Iterator[Difference]:
        """Compare the fields of two messages of the same type, except those in `done`, compared elsewhere."""
        for field in one.DESCRIPTOR.fields:
            if field.name in done:
                continue
            place = f"{text}, {field.name}" if text else field.name
            a, b = getattr(one, field.name), getattr(other, field.name)
            if not isinstance(a, int | float | str | bytes | Message):
                yield from self.repeated(place, a, b)
            elif one.HasField(field.name) != other.HasField(field.name) and not _are_both_empty(field, a, b):
                shown = (_short(v) if m.HasField(field.name) else "absent" for m, v in ((one, a), (other, b)))
                yield Difference(place, " -> ".join(shown))
            elif isinstance(a, Message):
                if one.HasField(field.name):
                    yield from self.message(_Location(place), a, b)
            elif _bits(a) != _bits(b):
                yield Difference(place, f"{_short(a)} -> {_short(b)}")
        if _unknown(one) != _unknown(other):
            yield Difference(text or "the model", "it has fields that ONNX does not define")

    def repeated(self, place: str, one: Sequence[Any], other: Sequence[Any]) -> Iterator[Difference]:
        """Compare two lists of messages or of plain values."""
        if len(one) != len(other):
            yield Difference(place, f"{_listed(one)} -> {_listed(other)}")
            return
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            if isinstance(a, Message):
                yield from self.message(_Location(f"{place} {_entry_name(a, number)}"), a, b)
            elif _bits(a) != _bits(b):
                yield Difference(f"{place}[{number}]", f"{_short(a)} -> {_short(b)}")


def named_places(model: Model) -> dict[str, str]:
    """Return a description of each tensor of a model: its name and the first node input that takes it."""
    places: dict[str, str] = {}
    for path, graph in walk(model.graph):
        prefix = f"in {path}: " if path else ""
        constants = (node for node in graph.node if node.op_type == "Constant" and node.output)
        for name in [*(tensor.name for tensor in graph.initializer), *(node.output[0] for node in constants)]:
            places.setdefault(address(path, name), f"{prefix}weight {name!r}{_takers(graph.node, name)}")
    return places


_Reader: TypeAlias = Callable[[TensorProto], tuple[Callable[[], Array], bool]]
"""Returns, for a tensor, a function that returns its values, and whether these are held outside the message."""


def _of_proto(tensor: TensorProto) -> tuple[Callable[[], Array], bool]:
    return lambda: to_array(tensor), False


def _of_model(model: Model) -> _Reader:
    return lambda tensor: (lambda: model.array(tensor.name), model.is_detached(tensor.name))


def _stores(tensor: TensorProto, read: _Reader) -> set[str]:
    """Return the fields that hold values of a tensor; ONNX allows one."""
    found = {field for field in _TYPED if len(getattr(tensor, field))}
    return found | ({"raw_data"} if tensor.raw_data or read(tensor)[1] else set())


def _typed(tensor: TensorProto) -> list[list[Any]]:
    return [[_bits(value) for value in getattr(tensor, field)] for field in _TYPED]


def _change(one: TensorProto, other: TensorProto, values: tuple[_Reader, _Reader]) -> str | None:
    """Return the difference between the values of two tensors of the same type and shape; None if they are equal."""
    if one.data_type == TensorProto.STRING:
        strings = list(one.string_data), list(other.string_data)
        if strings[0] == strings[1]:
            return None
        if len(strings[0]) != len(strings[1]):
            return f"{_listed(strings[0])} -> {_listed(strings[1])}"
        place = next(i for i, pair in enumerate(zip(*strings, strict=True)) if pair[0] != pair[1])
        return f"{_short(strings[0][place])} -> {_short(strings[1][place])} at [{place}]"
    a, b = (read(tensor)[0]() for tensor, read in zip((one, other), values, strict=True))
    return None if same_bits(a, b) else values_change(a, b)


def values_change(one: Array, other: Array) -> str:
    """Return the first element that differs between two arrays of the same type and shape, and how many do."""
    size = one.dtype.itemsize
    rows = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, size) for array in (one, other)]
    places = np.flatnonzero((rows[0] != rows[1]).any(axis=1))
    first = int(places[0])
    change = f"{one.reshape(-1)[first]} -> {other.reshape(-1)[first]}"
    if one.size == 1:
        return change
    index = [int(i) for i in np.unravel_index(first, one.shape)]
    return f"{change} at {index}; {len(places)} of {one.size} values differ"


# Descriptions of names and values.


def _takers(nodes: Iterable[NodeProto], name: str) -> str:
    """Return a description of the first node input that takes a tensor; empty if there is none."""
    for node in nodes:
        for slot, taken in enumerate(node.input):
            if taken == name:
                return f" (input {slot} of {_node_name(node)})"
        for body in bodies_of(node).values():
            found = _takers(body.node, name)
            if found:
                return found
    return ""


def _of_names(prefix: str, what: str, one: list[str], other: list[str]) -> tuple[str, str]:
    """Return place and change for two lists of names that differ."""
    missing = [name for name in one if name not in set(other)]
    new = [name for name in other if name not in set(one)]
    if missing:
        return f"{prefix}{what} {missing[0]!r}", f"absent, but {new[0]!r} is present" if new else "absent"
    if new:
        return f"{prefix}{what} {new[0]!r}", "absent -> present"
    if len(one) != len(other):
        name = next(name for name in other + one if one.count(name) != other.count(name))
        return f"{prefix}{what} {name!r}", f"occurs {one.count(name)} times -> {other.count(name)} times"
    place = next(i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
    return f"{prefix}{what} {other[place]!r}", f"at another position of the list: {one[place]!r} -> {other[place]!r}"


def _node_name(node: NodeProto) -> str:
    return f"{node.op_type} {node.name or (node.output[0] if node.output else '')!r}"


def _function_name(function: FunctionProto) -> str:
    return f"{function.domain}::{function.name}" if function.domain else str(function.name)


def _named(entry: Any) -> str:
    return str(entry.name)


def _entry_name(entry: Message, number: int) -> str:
    """Return the name of an entry of a list, or its number if it has none."""
    for field in ("key", "name", "tensor_name", "domain"):
        name = getattr(entry, field, "")
        if name:
            return repr(name)
    return f"{number}"


def _alike(one: NodeProto, other: NodeProto) -> bool:
    return one.op_type == other.op_type and list(one.output) == list(other.output)


def _same_bytes(one: Message, other: Message) -> bool:
    return bool(one.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True))


def _are_both_empty(field: Any, one: Any, other: Any) -> bool:
    """Return whether one string is empty and the other absent, between which no reader distinguishes."""
    return one == other and isinstance(one, str | bytes) and field.containing_oneof is None


def _bits(value: Any) -> Any:
    """Return a value that compares equal only if all bits are equal."""
    return struct.pack("<d", value) if isinstance(value, float) else value


def _unknown(message: Message) -> list[Any]:
    """Return the fields of a message that its definition does not contain."""
    return [_plain(field) for field in UnknownFieldSet(message)]


def _plain(field: Any) -> tuple[int, int, Any]:
    data = field.data
    is_group = not isinstance(data, int | bytes)
    return field.field_number, field.wire_type, [_plain(each) for each in data] if is_group else data


def _listed(values: Sequence[Any]) -> str:
    if values and isinstance(values[0], Message):
        return f"{len(values)} entries"
    return _short(list(values))


def _short(value: Any) -> str:
    """Return a value as text of at most `_MAX_LETTERS` characters."""
    if isinstance(value, Message):
        text = " ".join(str(value).split()) or "empty"
    else:
        text = str(np.float32(value)) if isinstance(value, float) else repr(value)
    return text if len(text) <= _MAX_LETTERS else f"{text[:_MAX_LETTERS]}…"
