"""Scales and zero points of quantised activations, so that they can be observed as the real numbers they stand for."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from cpd_onnx.fitting.graph import Graph
from cpd_onnx.ops.matrix_view import operands_of
from cpd_onnx.ops.quantized_view import LIMITS, Level, Slots, binary_of, level_of
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.shapes.values import Folded

_NONE: Slots = (-1, -1)


def levels_of(folded: Folded) -> dict[str, Level]:
    """Return the level of each quantised tensor of the main graph that a node takes with a constant one."""
    graph = Graph(folded, folded.model)
    found: dict[str, Level] = {}
    for node in folded.scope.nodes:
        for slot, slots in _leveled(node):
            name = node.input[slot] if slot < len(node.input) else ""
            value = folded.scope.values.get(name)
            if value is None or value.dtype not in LIMITS or value.constants is not None:
                continue
            level = level_of(node, slots, graph.constant)
            if level is not None:
                found.setdefault(name, level)
    return found


def _leveled(node: NodeProto) -> Iterator[tuple[int, Slots]]:
    """Yield the input slots of quantised operands, with those of their scales and zero points."""
    operands, binary = operands_of(node), binary_of(node)
    pairs: list[tuple[int, Slots]] = []
    if operands is not None:
        pairs = [(operands.data, operands.data_level), (operands.weight, operands.weight_level)]
    elif binary is not None:
        pairs = list(zip(binary.operands, binary.levels, strict=True))
    elif traits_of(node).is_quantizer:
        pairs = [(0, (1, 2))]
    yield from (pair for pair in pairs if pair[1] != _NONE)
