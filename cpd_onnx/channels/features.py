"""The features of a model: the last hidden tensors before the weights that make its outputs.

A map of features holds far more numbers than the class scores computed from it, so that few samples teach more by it
(Wang and Wu, Practical Network Acceleration with Tiny Sets, CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Container, Iterator

from onnx import NodeProto

from cpd_onnx.channels.groups import Combed
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.rules import FLOATS


def features_of(combed: Combed) -> list[str]:
    """Return the features in the order of the graph; empty unless each output of floating-point type has some.

    From each output, the way back ends at the first nodes with weights, whose operands are the features: as they are
    before they are pooled over positions or reshaped.
    """
    scope = combed.folded.scope
    weighted = {
        use.use.node
        for weight in combed.weights
        if weight.is_trained and not weight.is_vector
        for use in weight.uses
        if use.use.scope is scope
    }
    each = [_before(combed, name, weighted) for name in scope.outputs if _is_float(combed, name)]
    return sorted(set().union(*each), key=lambda name: scope.producers[name]) if all(each) else []


def _before(combed: Combed, output: str, weighted: Container[int]) -> set[str]:
    """Return the features of an output; `weighted` are the positions of the nodes with weights."""
    scope = combed.folded.scope
    found: set[str] = set()
    waiting, seen = [output], {output}
    while waiting:
        place = scope.producers.get(waiting.pop())
        if place is None:
            continue
        moving = set(_moving(combed, scope.nodes[place]))
        # The weight of a product may come from other constants.
        is_product = traits_of(scope.nodes[place]).sums_products and len(moving) == 1
        if place in weighted or is_product:
            found |= {_unpooled(combed, name) for name in moving}
        else:
            waiting += sorted(moving - seen)
            seen |= moving
    return {name for name in found if _is_hidden(combed, name)}


def _unpooled(combed: Combed, name: str) -> str:
    """Return the tensor that a tensor is pooled, reshaped or copied from, one step after the other."""
    scope = combed.folded.scope
    while name in scope.producers:
        node = scope.nodes[scope.producers[name]]
        traits, moving = traits_of(node), list(_moving(combed, node))
        if len(moving) != 1 or not (traits.maps_zeros_to_zeros or traits.moves_elements):
            break
        name = moving[0]
    return name


def _moving(combed: Combed, node: NodeProto) -> Iterator[str]:
    """Yield the inputs of a node that are floats and not constant; sizes and indices are not."""
    for name in dict.fromkeys(node.input):
        if _is_float(combed, name) and combed.folded.scope.values[name].constants is None:
            yield name


def _is_float(combed: Combed, name: str) -> bool:
    value = combed.folded.scope.values.get(name)
    return value is not None and value.dtype in FLOATS


def _is_hidden(combed: Combed, name: str) -> bool:
    """Return whether a node makes a tensor that is no output and whose channels are known."""
    scope = combed.folded.scope
    tensor = combed.tensors.get((scope.path, name))
    return tensor is not None and bool(tensor.axes) and name in scope.producers and name not in scope.outputs
