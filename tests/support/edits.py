"""Edits of a single value in a model, each with the name of the place, which `verify` must report."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

KINDS = ("initializer", "constant", "subgraph", "function", "attribute")
"""Kinds of places in which a value can be stored."""


@dataclass(frozen=True)
class Place:
    """A place where one value can be changed.

    Attributes:
        kind: One of `KINDS`.
        name: Name of the tensor, or of the node of an attribute.
        change: Changes the value, given a random generator.
    """

    kind: str
    name: str
    change: Callable[[random.Random], None]


def places(model: ModelProto) -> list[Place]:
    """Return all places in initializers, Constant nodes, subgraphs, functions and attributes."""
    found = list(_of_graph(model.graph))
    for function in model.functions:
        found += [_inside("function", place) for place in _of_nodes(function.node)]
    return found


def edited(model: ModelProto, seed: int, kinds: tuple[str, ...] = KINDS) -> tuple[ModelProto, Place] | None:
    """Return a copy with one changed value, and its place; None if the model has no place of these kinds."""
    copy = ModelProto()
    copy.CopyFrom(model)
    rng = random.Random(seed)
    found = [place for place in places(copy) if place.kind in kinds]
    if not found:
        return None
    place = rng.choice(found)
    place.change(rng)
    assert copy != model
    return copy, place


def _of_graph(graph: GraphProto) -> Iterator[Place]:
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.STRING and np.prod(tensor.dims):
            yield Place("initializer", tensor.name, _tensor_change(tensor))
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: list[NodeProto]) -> Iterator[Place]:
    for node in nodes:
        name = node.name or (node.output[0] if node.output else "")
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from (_inside("subgraph", place) for place in _of_graph(attribute.g))
            elif attribute.type == AttributeProto.TENSOR and np.prod(attribute.t.dims):
                yield Place("constant", node.output[0] if not node.name else node.name, _tensor_change(attribute.t))
            elif attribute.type in _CHANGES and not attribute.ref_attr_name:
                yield Place("attribute", name, _attribute_change(attribute))


def _inside(kind: str, place: Place) -> Place:
    return place if place.kind == "attribute" else Place(kind, place.name, place.change)


def _tensor_change(tensor: TensorProto) -> Callable[[random.Random], None]:
    def change(rng: random.Random) -> None:
        array = np.array(numpy_helper.to_array(tensor))
        flat = array.reshape(-1)
        index = rng.randrange(flat.size)
        flat[index] = other_value(flat[index], rng)
        external = tensor.data_location
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        assert external == TensorProto.DEFAULT

    return change


def other_value(value: np.generic, rng: random.Random) -> np.generic:
    """Return another value of the same type, which sometimes differs only in the last bit."""
    bits = np.array([value]).view(np.uint8)
    if value.dtype == np.bool_ or rng.random() < 0.3:
        bits[0] ^= 1
    elif value.dtype.kind == "f":
        found = rng.choice([float("nan"), float("inf"), 0.0, -float(value), 7 * float(value), float(value) + 1])
        other = np.array([found]).astype(value.dtype)
        bits = other.view(np.uint8) if other.tobytes() != bits.tobytes() else bits ^ np.uint8(1)
    else:
        bits[0] ^= np.uint8(1 << rng.randrange(7))
    found_value: np.generic = bits.view(value.dtype)[0]
    return found_value


def _attribute_change(attribute: AttributeProto) -> Callable[[random.Random], None]:
    return lambda rng: _CHANGES[attribute.type](attribute, rng)


def _change_int(attribute: AttributeProto, _: random.Random) -> None:
    attribute.i += 1


def _change_float(attribute: AttributeProto, rng: random.Random) -> None:
    attribute.f = float(other_value(np.float32(attribute.f), rng))


def _change_text(attribute: AttributeProto, _: random.Random) -> None:
    attribute.s += b"_"


def _change_ints(attribute: AttributeProto, rng: random.Random) -> None:
    if attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] += 1
    else:
        attribute.ints.append(1)


def _change_floats(attribute: AttributeProto, rng: random.Random) -> None:
    if attribute.floats:
        index = rng.randrange(len(attribute.floats))
        attribute.floats[index] = float(other_value(np.float32(attribute.floats[index]), rng))
    else:
        attribute.floats.append(1.0)


_CHANGES: dict[int, Callable[[AttributeProto, random.Random], None]] = {
    AttributeProto.INT: _change_int,
    AttributeProto.FLOAT: _change_float,
    AttributeProto.STRING: _change_text,
    AttributeProto.INTS: _change_ints,
    AttributeProto.FLOATS: _change_floats,
}


NESTED = """
(float[N, 6] x, float[6, 8] w, float[10, 3] v, float[8] scale, float limit) => (float[N, 3] y)
{
    h = MatMul(x, w)
    g = local.gated(h)
    s = ReduceSum<keepdims = 0>(x)
    zero = Constant<value = float {0.0}>()
    c = Less(s, zero)
    o = If(c) <then_branch = positive () => (float[N, 10] t)
            <float[8, 10] wa = {THEN}, float[10] ba = {BIAS}> { t1 = MatMul(g, wa) t = Add(t1, ba) },
        else_branch = negative () => (float[N, 10] e)
            { wb = Constant<value = float[8, 10] {ELSE}>() e1 = MatMul(g, wb) e = LeakyRelu<alpha = 0.25>(e1) }>
    low = Constant<value_float = -2.0>()
    k = Clip(o, low, limit)
    y = MatMul(k, v)
}
"""
FUNCTION = """
<domain: "local", opset_import: ["": 17]>
gated (h) => (g)
{
    half = Constant<value = float {0.5}>()
    a = Mul(h, half)
    b = LeakyRelu<alpha = 0.125>(a)
    g = Add(h, b)
}
"""


def nested() -> ModelProto:
    """Return a model with weights in initializers, Constant nodes, the branches of an If, and a local function."""
    from tests.support.models import from_text

    rng = np.random.default_rng(3)
    numbers = {name: ", ".join(f"{v:.6f}" for v in rng.standard_normal(n)) for name, n in (("THEN", 80), ("ELSE", 80), ("BIAS", 10))}  # fmt: skip  # one line
    text = NESTED
    for name, values in numbers.items():
        text = text.replace(f"{{{name}}}", f"{{{values}}}")
    model = from_text(text, functions=FUNCTION, values={"limit": 6.0})
    onnx.checker.check_model(model)
    return model
