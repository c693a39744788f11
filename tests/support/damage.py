"""Structure-aware damage to ONNX files, as by a broken exporter, a bad edit or an attacker."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

NUMBERS = (-(1 << 63), -(1 << 31), -5, -2, -1, 0, 1, 2, 3, 7, 64, 1 << 20, 1 << 31, 1 << 40, (1 << 63) - 1)
FLOATS = (-1e38, -1.0, 0.0, 1e-30, 0.5, 1e38, float("nan"), float("inf"))
OPERATORS = (
    "Relu", "Conv", "Gemm", "MatMul", "Add", "Concat", "Split", "Reshape", "Transpose", "Softmax", "Slice", "Gather",
    "Squeeze", "Unsqueeze", "Pad", "Resize", "If", "Loop", "Scan", "LSTM", "Expand", "ConstantOfShape", "Shape", "",
    "NoSuchOperator", "BatchNormalization", "ReduceMean", "TopK", "Where", "Einsum", "QLinearConv", "Identity",
)  # fmt: skip  # a list


def graphs(graph: GraphProto) -> list[GraphProto]:
    """Yield a graph and its subgraphs."""
    inner = [a.g for node in graph.node for a in node.attribute if a.type == AttributeProto.GRAPH]
    return [graph, *(found for body in inner for found in graphs(body))]


def names(graph: GraphProto) -> list[str]:
    """Return all names of values, and some that do not exist."""
    found = [name for node in graph.node for name in (*node.input, *node.output)]
    return [*found, *(t.name for t in graph.initializer), *(i.name for i in graph.input), "", "nobody"]


def attribute_value(rng: random.Random, attribute: AttributeProto) -> Any:
    """Set another value of an attribute, occasionally of another type."""
    kinds: list[Callable[[], Any]] = [
        lambda: rng.choice(NUMBERS),
        lambda: [rng.choice(NUMBERS) for _ in range(rng.randint(1, 5))],
        lambda: rng.choice(FLOATS),
        lambda: rng.choice(["", "SAME_UPPER", "linear", "nonsense", "ij,jk->ik", "..."]),
    ]
    if rng.random() < 0.7:
        if attribute.ints:
            values = list(attribute.ints)
            values[rng.randrange(len(values))] = rng.choice(NUMBERS)
            return values
        if attribute.type == AttributeProto.INT:
            return rng.choice(NUMBERS)
    return rng.choice(kinds)()


def change_attribute(rng: random.Random, graph: GraphProto) -> None:
    nodes = [node for node in graph.node if node.attribute]
    if not nodes:
        return
    node = rng.choice(nodes)
    place = rng.randrange(len(node.attribute))
    name = node.attribute[place].name
    if rng.random() < 0.2:
        del node.attribute[place]
    elif node.attribute[place].type not in (AttributeProto.GRAPH, AttributeProto.TENSOR):
        made = helper.make_attribute(name, attribute_value(rng, node.attribute[place]))
        node.attribute[place].CopyFrom(made)


def change_input(rng: random.Random, graph: GraphProto) -> None:
    node = rng.choice(graph.node)
    way = rng.randrange(4)
    if way == 0 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(names(graph))
    elif way == 1 and node.input:
        del node.input[rng.randrange(len(node.input))]
    elif way == 2:
        node.input.append(rng.choice(names(graph)))
    elif len(node.input) > 1:
        first, second = rng.sample(range(len(node.input)), 2)
        node.input[first], node.input[second] = node.input[second], node.input[first]


def change_output(rng: random.Random, graph: GraphProto) -> None:
    node = rng.choice(graph.node)
    if node.output and rng.random() < 0.7:
        node.output[rng.randrange(len(node.output))] = rng.choice(names(graph))
    else:
        node.output.append(rng.choice(names(graph)))


def change_nodes(rng: random.Random, graph: GraphProto) -> None:
    place, way = rng.randrange(len(graph.node)), rng.randrange(4)
    if way == 0:
        del graph.node[place]
    elif way == 1:
        graph.node.append(graph.node[place])
    elif way == 2:
        graph.node[place].op_type = rng.choice(OPERATORS)
    else:
        nodes = [NodeProto.FromString(node.SerializeToString()) for node in graph.node]
        rng.shuffle(nodes)
        del graph.node[:]
        graph.node.extend(nodes)


def change_tensor(rng: random.Random, graph: GraphProto) -> None:
    constants = [a.t for node in graph.node for a in node.attribute if a.type == AttributeProto.TENSOR]
    tensors: Sequence[TensorProto] = [*graph.initializer, *constants]
    if not tensors:
        return
    tensor, way = rng.choice(tensors), rng.randrange(6)
    if way == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS)
    elif way == 1:
        tensor.data_type = rng.choice([0, 1, 6, 7, 8, 9, 10, 11, 16, 17, 21, 22, 99, -1])
    elif way == 2:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    elif way == 3:
        content = bytearray(tensor.raw_data)
        for _ in range(min(len(content), 8)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        tensor.raw_data = bytes(content)
    elif way == 4:
        tensor.dims.append(rng.choice((1, 2, -1, 1 << 40)))
    else:
        tensor.name = rng.choice(names(graph))


def change_description(rng: random.Random, graph: GraphProto) -> None:
    infos = [*graph.input, *graph.output, *graph.value_info]
    if not infos:
        return
    info, way = rng.choice(infos), rng.randrange(5)
    dims = info.type.tensor_type.shape.dim
    if way == 0 and dims:
        dims[rng.randrange(len(dims))].dim_value = rng.choice([n for n in NUMBERS if n != 1 << 20])  # valid, but slow
    elif way == 1 and dims:
        dims[rng.randrange(len(dims))].dim_param = rng.choice(["n", "", "a b", "x" * 1000])
    elif way == 2 and dims:
        del dims[rng.randrange(len(dims))]
    elif way == 3:
        info.type.tensor_type.elem_type = rng.choice([0, 1, 6, 7, 8, 9, 10, 99])
    else:
        info.name = rng.choice(names(graph))


def change_lists(rng: random.Random, graph: GraphProto) -> None:
    entries: Any = rng.choice([graph.input, graph.output, graph.initializer, graph.value_info])
    if entries and rng.random() < 0.6:
        del entries[rng.randrange(len(entries))]
    elif entries:
        entries.append(entries[rng.randrange(len(entries))])


CHANGES = (
    change_attribute, change_attribute, change_input, change_output, change_nodes, change_tensor, change_tensor,
    change_description, change_lists,
)  # fmt: skip  # a list


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return the file with one to three changes."""
    if rng.random() < 0.15:
        return damaged_bytes(content, rng)
    model = ModelProto.FromString(content)
    if rng.random() < 0.05 and model.opset_import:
        rng.choice(model.opset_import).version = rng.choice([-1, 0, 1, 6, 7, 9, 11, 12, 13, 17, 21, 26, 99])
    for _ in range(rng.choice((1, 1, 2, 3))):
        graph = rng.choice(graphs(model.graph))
        if graph.node:
            rng.choice(CHANGES)(rng, graph)
    return model.SerializeToString()


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return the file with some bytes changed, removed or duplicated, or truncated."""
    made = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, way = rng.randrange(len(made)), rng.randrange(4)
        size = rng.randint(1, 16)
        if way == 0:
            made[at] = rng.randrange(256)
        elif way == 1:
            del made[at : at + size]
        elif way == 2:
            made[at:at] = made[at : at + size]
        elif rng.random() < 0.3:
            del made[at:]
        if not made:
            return b""
    return bytes(made)
