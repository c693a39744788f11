"""Weights that multiply and are summed, each with what it takes and what becomes of its product."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto, TensorProto

from cpd_onnx.fitting.least_squares import Matrix
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.ops.matrix_view import (
    AFFINE,
    LINEAR,
    Linear,
    Vector,
    is_transpose,
    key_of,
    linear_of,
)
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.shapes.editor import Editor
from cpd_onnx.shapes.values import Folded, Use


@dataclass(frozen=True, eq=False)
class Bias:
    """A constant that is added to each output on its way, and what it is multiplied with from there on [outputs]."""

    name: str
    factor: Vector


@dataclass(frozen=True, eq=False)
class Unit:
    """A weight, the node of the main graph that multiplies with it, and what comes behind.

    Attributes:
        position: of the node.
        linear: the node as a matrix product.
        data: tensor that it takes.
        weight: initializer that nobody else uses.
        flipped: whether the graph transposes it first.
        gain, shift: how the product reaches `end`: end = gain * product + shift [outputs].
        bias: what is added on the way and may be given other values.
        end: the last tensor of that chain.
        target: what the product is there for: `end`, or the sum that this goes into.
        other: what else goes into that sum; it is there before the node runs.
        rectified: whether nothing of the target below zero passes.
    """

    position: int
    linear: Linear
    data: str
    weight: str
    flipped: bool
    gain: Vector
    shift: Vector
    bias: Bias | None
    end: str
    target: str
    other: str | None
    rectified: bool

    def matrix(self, model: Model) -> Matrix:
        """Its values as a matrix [groups, features, outputs]."""
        array = np.asarray(model.array(self.weight), np.float64)
        return np.asarray(self.linear.matrix(array.T if self.flipped else array), np.float64)

    def store(self, model: Model, matrix: Array) -> None:
        """Give it other values."""
        array = self.linear.weight(matrix)
        model.set_array(self.weight, np.ascontiguousarray(array.T if self.flipped else array, np.float32))


@dataclass(eq=False)
class Units:
    """All such weights of a model.

    Attributes:
        found: in the order of the graph.
        left: weights of known operators that cannot be told apart from others, and why.
    """

    found: list[Unit] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def units_of(folded: Folded, model: Model | None = None) -> Units:
    """Find the weights of a model that are multiplied and summed by operators of `LINEAR`.

    Args:
        folded: the model.
        model: a copy of it whose weights count instead, with the same nodes.
    """
    return _Finder(folded, model or folded.model).run()


class _Finder:
    def __init__(self, folded: Folded, model: Model) -> None:
        self.model, self.scope = model, folded.scope
        self.editor = Editor(model)
        self.uses = Counter(name for uses in self.scope.consumers.values() for name in self._names(uses))
        self.result = Units()

    def _names(self, uses: Iterable[Use]) -> Iterator[str]:
        """What the counterparts of some slots take in this copy."""
        for use in uses:
            node = self.editor.node(use.scope, use.node) if not use.scope.function else use.scope.nodes[use.node]
            yield node.input[use.slot]

    def run(self) -> Units:
        for position in range(len(self.scope.nodes)):
            node = self.node(position)
            source = self.source(node.input[1]) if len(node.input) > 1 else None
            if source is not None:
                self.enter(position, node, *source)
            elif len(node.input) > 1 and key_of(node) in LINEAR and self.lies_in_a_node(node.input[1]):
                self.result.left[node.input[1]] = "lies in a Constant node"
        return self.result

    def node(self, position: int) -> NodeProto:
        return self.editor.node(self.scope, position)

    def source(self, name: str) -> tuple[str, bool] | None:
        """The initializer that a weight comes from, and whether it is transposed on the way."""
        if self.model.has(name):
            return name, False
        maker = self.scope.makers.get(name)
        node = None if maker is None else self.node(maker)
        if node is None or not is_transpose(node) or self.uses[name] != 1 or not self.model.has(node.input[0]):
            return None
        return (node.input[0], True) if len(self.model.tensor(node.input[0]).dims) == 2 else None

    def lies_in_a_node(self, name: str) -> bool:
        value = self.scope.values.get(name)
        return value is not None and value.weight is not None

    def enter(self, position: int, node: NodeProto, name: str, flipped: bool) -> None:
        shape = list(self.model.tensor(name).dims)
        linear = linear_of(node, shape[::-1] if flipped else shape)
        data = self.scope.values.get(node.input[0])
        if linear is None or data is None or data.constants is not None or data.shape is None:
            return
        if self.model.tensor(name).data_type != TensorProto.FLOAT:
            self.result.left[name] = "is no float32"
        elif self.uses[name] != 1:
            self.result.left[name] = "is used several times"
        elif (unit := self.unit(position, node, linear, name, flipped)) is not None:
            self.result.found.append(unit)

    def unit(self, position: int, node: NodeProto, linear: Linear, name: str, flipped: bool) -> Unit | None:
        """Follow the product as long as each output is only scaled and shifted."""
        shape = linear.matrix(np.empty(tuple(self.model.tensor(name).dims)[:: -1 if flipped else 1], np.int8)).shape
        count = shape[0] * shape[2]
        end, gain, shift = node.output[0], np.ones(count), np.zeros(count)
        own = node.input[linear.bias] if 0 <= linear.bias < len(node.input) else ""
        bias = None
        if own:
            array = self.constant(own)
            if array is None or array.size not in (1, count):
                self.result.left[name] = "is followed by a bias that is computed"
                return None
            shift = shift + array.astype(np.float64).ravel()
            bias = self.editable(own, count)
        rank = len(self.shape(end))
        axis = linear.out_axis % max(1, rank) - rank
        while (follower := self.only_user(end)) is not None:
            make = AFFINE.get(key_of(follower))
            step = make(follower, end, (axis + rank, axis), self.constant) if make is not None else None
            if step is None or self.shape(follower.output[0]) != self.shape(end):
                break
            end = follower.output[0]
            gain, shift = gain * step.factor, shift * step.factor + step.addend
            bias = bias and Bias(bias.name, bias.factor * step.factor)
            bias = bias or (self.editable(step.bias, count) if step.bias else None)
        target, other = self.summed(end, position)
        user = self.only_user(target)
        rectified = user is not None and traits_of(user).is_rectifier
        return Unit(position, linear, node.input[0], name, flipped, gain, shift, bias, end, target, other, rectified)

    def constant(self, name: str) -> Array | None:
        while not self.model.has(name):
            maker = self.scope.makers.get(name)
            # Exporters put an Identity behind constants that several nodes share.
            if maker is None or not traits_of(self.node(maker)).is_identity:
                return None
            name = self.node(maker).input[0]
        return self.model.array(name)

    def shape(self, name: str) -> tuple[int, ...]:
        value = self.scope.values.get(name)
        return (value.shape if value is not None else None) or ()

    def editable(self, name: str, count: int) -> Bias | None:
        """The constant as something that may be changed, if it has one number for each output and one user."""
        if not self.model.has(name) or self.uses[name] != 1:
            return None
        if self.model.tensor(name).data_type != TensorProto.FLOAT:
            return None
        return Bias(name, np.ones(count)) if self.model.array(name).size == count else None

    def only_user(self, name: str) -> NodeProto | None:
        """The one node of the main graph that takes a tensor, if nobody else does."""
        uses = self.scope.consumers.get(name, [])
        if len(uses) != 1 or uses[0].scope is not self.scope or name in self.scope.outputs:
            return None
        return self.node(uses[0].node)

    def summed(self, end: str, position: int) -> tuple[str, str | None]:
        """The sum that a tensor goes into, if all else in it is there when the node at `position` runs."""
        user = self.only_user(end)
        if user is None or not traits_of(user).is_sum:
            return end, None
        other = user.input[1] if user.input[0] == end else user.input[0]
        value = self.scope.values.get(other)
        if value is None or value.constants is not None or self.scope.makers.get(other, -1) >= position:
            return end, None
        return (user.output[0], other) if self.shape(other) == self.shape(end) != () else (end, None)
