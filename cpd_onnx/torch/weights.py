"""The tensors stored in an ONNX file, by name: initializers, and values of Constant nodes by their output's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from cpd_onnx.errors import ModelError
from cpd_onnx.ops.traits import traits_of

Array = npt.NDArray[Any]


def bodies_of(node: NodeProto) -> dict[str, GraphProto]:
    """Return the subgraphs of a node by attribute name."""
    return {attribute.name: attribute.g for attribute in node.attribute if attribute.type == AttributeProto.GRAPH}


def graphs_of(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield the graph and all bodies in it."""
    yield graph
    for node in graph.node:
        for body in bodies_of(node).values():
            yield from graphs_of(body)


def read_weights(model: ModelProto) -> dict[str, Array]:
    """Return all initializers and Constant tensors of the main graph, as read-only arrays in ONNX layout."""
    return graph_weights(model.graph)


def graph_weights(graph: GraphProto, *, nodes: bool = True) -> dict[str, Array]:
    """Return all initializers of one graph and, unless `nodes` is false, its Constant tensors."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in _constants(graph) if nodes else ():
        value = constant_value(node)
        if value is not None:
            arrays[node.output[0]] = value
    return arrays


def write_weights(model: ModelProto, values: Mapping[str, Array]) -> ModelProto:
    """Return a copy of the model in which these tensors replace those of the same name.

    Raises:
        ModelError: The model has no such tensor, or one of another shape or type.
    """
    result = ModelProto()
    result.CopyFrom(model)
    places = dict(_places(result))
    for name, value in values.items():
        if name not in places:
            raise ModelError(f"the model has no tensor {name!r} to write to; give the model that the values came from")
        _store(places[name], name, value)
    return result


def constant_value(node: NodeProto) -> Array | None:
    """Return the value of a Constant node; None if it is not a dense numeric tensor."""
    attribute = node.attribute[0]
    match attribute.name:
        case "value":
            return numpy_helper.to_array(attribute.t)
        case "value_float":
            return np.array(attribute.f, np.float32)
        case "value_floats":
            return np.array(attribute.floats, np.float32)
        case "value_int":
            return np.array(attribute.i, np.int64)
        case "value_ints":
            return np.array(attribute.ints, np.int64)
        case _:
            return None


def _constants(graph: GraphProto) -> Iterator[NodeProto]:
    return (node for node in graph.node if traits_of(node).is_constant)


def _places(model: ModelProto) -> Iterator[tuple[str, TensorProto | NodeProto]]:
    """Return the initializers and Constant nodes that store tensors, by name; the main graph takes precedence."""
    for graph in reversed(list(graphs_of(model.graph))):
        yield from ((tensor.name, tensor) for tensor in graph.initializer)
        yield from ((node.output[0], node) for node in _constants(graph) if constant_value(node) is not None)


def _store(place: TensorProto | NodeProto, name: str, value: Array) -> None:
    """Overwrite a tensor; if it is equal, its bytes and its encoding are unchanged."""
    old = numpy_helper.to_array(place) if isinstance(place, TensorProto) else constant_value(place)
    assert old is not None
    if old.shape != value.shape or old.dtype != value.dtype:
        raise ModelError(
            f"tensor {name!r} is {old.dtype}{list(old.shape)} in the model but {value.dtype}{list(value.shape)} "
            "in the new values; give the model that the values came from"
        )
    if old.tobytes() == value.tobytes():
        return
    if isinstance(place, NodeProto) and place.attribute[0].name != "value":
        _store_numbers(place.attribute[0], value)
        return
    tensor = place if isinstance(place, TensorProto) else place.attribute[0].t
    fresh = numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), tensor.name)
    for content in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        tensor.ClearField(content)
    tensor.raw_data = fresh.raw_data


def _store_numbers(attribute: AttributeProto, value: Array) -> None:
    """Overwrite the number or the list of numbers of a Constant node."""
    if attribute.name in ("value_float", "value_int"):
        setattr(attribute, attribute.name.removeprefix("value_")[0], value.item())
        return
    numbers = attribute.floats if attribute.name == "value_floats" else attribute.ints
    del numbers[:]
    numbers.extend(value.tolist())
