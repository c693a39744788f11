"""Affine operators behind linear ones become part of them, as batch normalisation becomes part of a convolution.

Exporters decompose batch normalisation into a product and a sum. onnxruntime makes these part of a convolution before
them, but not of a matrix product. Here each column of the weight is scaled, and the rest becomes the bias: of the node
itself (Gemm) or, as MatMul has none, of one addition behind it. The model computes the same up to rounding: weights are
computed in float64 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, helper

from cpd_onnx.ir.model import Array, Model
from cpd_onnx.ops.matrix_view import Vector
from cpd_onnx.rewrite.linear_runs import WEIGHT, Finder, Operator
from cpd_onnx.rewrite.merging import rounded
from cpd_onnx.shapes.editor import Editor, put_nodes
from cpd_onnx.shapes.inference import fold
from cpd_onnx.shapes.order import all_inputs
from cpd_onnx.shapes.values import Folded


@dataclass(frozen=True, eq=False)
class Tail:
    """A linear operator, and the affine ones that alone read its output, one after the other.

    Attributes:
        operator: The linear operator.
        nodes: Positions of the affine ones, at least one.
        gain: What its output is multiplied with, for each channel.
        shift: What is added to that product, with the bias of the operator.
    """

    operator: Operator
    nodes: tuple[int, ...]
    gain: Vector
    shift: Vector

    @property
    def saves(self) -> bool:
        """Whether the model has fewer nodes without it: MatMul leaves an addition for what it cannot add itself."""
        return len(self.nodes) > (self.operator.bias_slot < 0 and bool(self.shift.any()))


def absorbed(model: Model) -> Model:
    """Return a model in which linear operators have taken up the affine ones behind them; the given one if none can."""
    folded = fold(model, evaluates=False)
    absorber = _Absorber(folded)
    found = [absorber.enter(tail) for tail in tails(folded) if tail.saves]
    return absorber.result() if any(found) else model


def tails(folded: Folded) -> list[Tail]:
    """Return the linear operators of the main graph with affine ones behind them."""
    finder = Finder(folded)
    found = (_tail(finder, position) for position in range(len(folded.scope.nodes)))
    return [tail for tail in found if tail is not None]


def _tail(finder: Finder, position: int) -> Tail | None:
    """Return a linear operator with the affine ones behind it; None for other nodes, and where there are none."""
    first = finder.operator(position)
    if first is None or first.bias is None:
        return None
    nodes: list[int] = []
    gain, shift = np.ones(first.channels[1]), first.bias
    name = finder.scope.nodes[position].output[0]
    while (use := finder.only_use(name)) is not None:
        node = finder.scope.nodes[use.node]
        step = finder.affine(name, node, first)
        if step is None:
            break
        gain, shift = gain * step[0], shift * step[0] + step[1]
        nodes.append(use.node)
        name = node.output[0]
    return Tail(first, tuple(nodes), gain, shift) if nodes else None


class _Absorber(Editor):
    """Replaces tails, which share no node, in a copy of a model."""

    def __init__(self, folded: Folded) -> None:
        super().__init__(folded.model.copy())
        self.scope, self.finder = folded.scope, Finder(folded)
        self.gone: set[int] = set()

    def enter(self, tail: Tail) -> bool:
        """Replace a tail; return whether its type can hold the weights."""
        operator, place = tail.operator, tail.operator.position
        weight = self.finder.constant(self.scope.nodes[place].input[WEIGHT])
        assert weight is not None
        matrix = operator.linear.matrix(weight.astype(np.float64))
        gain = tail.gain.reshape(len(matrix), 1, -1)
        scaled = rounded(np.asarray(operator.linear.weight(matrix * gain)), weight.dtype)
        shift = rounded(tail.shift, weight.dtype)
        if scaled is None or shift is None:
            return False
        node, last = self.node(self.scope, place), self.node(self.scope, tail.nodes[-1])
        gone = set(tail.nodes)
        if not np.array_equal(scaled, weight):
            self.put(node, WEIGHT, scaled, "weight")
        if operator.bias_slot >= 0 and (shift.any() or len(node.input) > operator.bias_slot):
            self.put(node, operator.bias_slot, shift, "bias")
        if operator.bias_slot < 0 and shift.any():
            gone.remove(tail.nodes[-1])
            added = self.add_fresh(f"{node.output[0]}_bias", shift)
            last.CopyFrom(helper.make_node("Add", [node.output[0], added], [last.output[0]], name=last.name))
        else:
            node.output[0] = last.output[0]
        self.gone |= gone
        return True

    def put(self, node: NodeProto, slot: int, array: Array, what: str) -> None:
        """Give a node a new constant in the place of another one."""
        while len(node.input) <= slot:
            node.input.append("")
        node.input[slot] = self.add_fresh(node.input[slot] or f"{node.output[0]}_{what}", array)

    def result(self) -> Model:
        """Return the model without the nodes that are gone, and without what they alone read."""
        places = {self.scope.order[position] for position in self.gone}
        nodes = [node for place, node in enumerate(self.model.graph.node) if place not in places]
        put_nodes(self.model, nodes, {name for node in self.scope.nodes for name in all_inputs(node)})
        return self.model
