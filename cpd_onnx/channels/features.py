"""The features of a model: the last hidden tensors before the weights that make its outputs.

A map of features holds far more numbers than the class scores computed from it, so that few samples teach more by it
(Wang and Wu, Practical Network Acceleration with Tiny Sets, CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from cpd_onnx.channels.groups import Combed
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.rules import FLOATS


def features_of(combed: Combed) -> list[str]:
    """Return the features in the order of the graph; empty if no output is computed from them by a weight.

    From each output, the way back ends at the first products with weights, whose operands are the features: as they are
    before they are pooled over positions or reshaped.
    """
    scope = combed.folded.scope
    found: list[str] = []
    waiting, seen = list(scope.outputs), set(scope.outputs)
    while waiting:
        node = _maker(combed, waiting.pop(0))
        if node is None:
            continue
        moving = list(_moving(combed, node))
        if traits_of(node).sums_products and len(moving) == 1:
            found.append(_unpooled(combed, moving[0]))
            continue
        waiting += [name for name in moving if name not in seen]
        seen.update(moving)
    return sorted({name for name in found if _is_hidden(combed, name)}, key=lambda name: scope.producers[name])


def _unpooled(combed: Combed, name: str) -> str:
    """Return the tensor that a tensor is pooled, reshaped or copied from, one step after the other."""
    while (node := _maker(combed, name)) is not None:
        traits, moving = traits_of(node), list(_moving(combed, node))
        if len(moving) != 1 or not (traits.maps_zeros_to_zeros or traits.moves_elements):
            break
        name = moving[0]
    return name


def _maker(combed: Combed, name: str) -> NodeProto | None:
    scope = combed.folded.scope
    place = scope.producers.get(name)
    return None if place is None else scope.nodes[place]


def _moving(combed: Combed, node: NodeProto) -> Iterator[str]:
    """Yield the inputs of a node that are floats and not constant; sizes and indices are not."""
    for name in dict.fromkeys(node.input):
        value = combed.folded.scope.values.get(name)
        if name and value is not None and value.dtype in FLOATS and value.constants is None:
            yield name


def _is_hidden(combed: Combed, name: str) -> bool:
    scope = combed.folded.scope
    tensor = combed.tensors.get((scope.path, name))
    is_float = tensor is not None and bool(tensor.axes) and tensor.value.dtype in FLOATS
    return is_float and name in scope.producers and name not in scope.outputs
