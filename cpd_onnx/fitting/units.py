"""Linear units of a graph: weights of matrix products, each with its input and the affine chain after its output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto, TensorProto

from cpd_onnx.fitting.least_squares import Matrix
from cpd_onnx.ir.model import Array, Model, constant_array
from cpd_onnx.ops.matrix_view import (
    AFFINE,
    LINEAR,
    Linear,
    Vector,
    bounds_of,
    is_transpose,
    key_of,
    linear_of,
)
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.shapes.editor import Editor
from cpd_onnx.shapes.values import Folded, Use

_UNBOUNDED = (-np.inf, np.inf)
_SILENT = 1e-6
"""Factor below which a bias has no measurable effect, so that it is not divided by (heuristic)."""


@dataclass(frozen=True, eq=False)
class Bias:
    """A constant added to the outputs, and the factor by which it is multiplied afterwards [outputs]."""

    name: str
    factor: Vector

    def add(self, model: Model, change: Vector) -> None:
        """Change the values in a model so that the end of the chain changes by that much [outputs]."""
        old = model.array(self.name)
        change = change / np.where(np.abs(self.factor) > _SILENT, self.factor, 1.0)
        model.set_array(self.name, (old + change.reshape(old.shape)).astype(np.float32))


@dataclass(frozen=True, eq=False)
class Unit:
    """A weight, the node of the main graph that multiplies by it, and the affine chain after that.

    Attributes:
        position: Position of the node.
        linear: The node as a matrix product.
        data: Tensor that the node multiplies by the weight.
        weight: Initializer, used nowhere else.
        flipped: Whether the graph transposes it first.
        gain, shift: Affine function from the product to `end`: end = gain * product + shift [outputs].
        bias: Constant in the chain that may be changed.
        end: Last tensor of the chain.
        target: Tensor to be fitted: `end`, or the sum that it enters.
        other: The other operand of that sum, which is computed before the node.
        bounds: Bounds to which an activation clips the target, such as a rectifier; infinite for none.
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
    bounds: tuple[float, float]

    @property
    def is_clipped(self) -> bool:
        """Whether an activation clips the target."""
        return self.bounds != _UNBOUNDED

    def matrix(self, model: Model) -> Matrix:
        """Return the values of the weight as a matrix [groups, features, outputs]."""
        array = np.asarray(model.array(self.weight), np.float64)
        return np.asarray(self.linear.matrix(array.T if self.flipped else array), np.float64)

    def store(self, model: Model, matrix: Array) -> None:
        """Replace the values of the weight."""
        array = self.linear.weight(matrix)
        model.set_array(self.weight, np.ascontiguousarray(array.T if self.flipped else array, np.float32))


@dataclass(eq=False)
class Units:
    """The linear units of a model.

    Attributes:
        found: The units in the order of the graph.
        left: Weights of linear operators that do not form a unit, and why.
    """

    found: list[Unit] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def units_of(folded: Folded, model: Model | None = None) -> Units:
    """Return the linear units of a model: weights of operators in `LINEAR`.

    Args:
        folded: The analysed model.
        model: A copy of it with the same nodes whose weights are used instead.
    """
    return _UnitFinder(folded, model or folded.model).run()


class _UnitFinder:
    def __init__(self, folded: Folded, model: Model) -> None:
        self.model, self.scope = model, folded.scope
        self.editor = Editor(model)
        self.uses = Counter(name for uses in self.scope.consumers.values() for name in self._names(uses))
        self.result = Units()

    def _names(self, uses: Iterable[Use]) -> Iterator[str]:
        """Yield the names at the corresponding inputs in the copy."""
        for use in uses:
            node = self.editor.node(use.scope, use.node) if not use.scope.function else use.scope.nodes[use.node]
            yield node.input[use.slot]

    def run(self) -> Units:
        for position in range(len(self.scope.nodes)):
            node = self.node(position)
            source = self.source(node.input[1]) if len(node.input) > 1 else None
            if source is not None:
                self.enter(position, node, *source)
            elif len(node.input) > 1 and key_of(node) in LINEAR and self.is_constant_node(node.input[1]):
                self.result.left[node.input[1]] = "in a Constant node"
        return self.result

    def node(self, position: int) -> NodeProto:
        return self.editor.node(self.scope, position)

    def source(self, name: str) -> tuple[str, bool] | None:
        """Return the initializer that a weight comes from, and whether the graph transposes it."""
        if self.model.has(name):
            return name, False
        maker = self.scope.producers.get(name)
        node = None if maker is None else self.node(maker)
        if node is None or not is_transpose(node) or self.uses[name] != 1 or not self.model.has(node.input[0]):
            return None
        return (node.input[0], True) if len(self.model.tensor(node.input[0]).dims) == 2 else None

    def is_constant_node(self, name: str) -> bool:
        value = self.scope.values.get(name)
        return value is not None and value.weight is not None

    def enter(self, position: int, node: NodeProto, name: str, flipped: bool) -> None:
        shape = list(self.model.tensor(name).dims)
        linear = linear_of(node, shape[::-1] if flipped else shape)
        data = self.scope.values.get(node.input[0])
        if linear is None or data is None or data.constants is not None or data.shape is None:
            return
        if self.model.tensor(name).data_type != TensorProto.FLOAT:
            self.result.left[name] = "not float32"
        elif self.uses[name] != 1:
            self.result.left[name] = "used several times"
        elif (unit := self.unit(position, node, linear, name, flipped)) is not None:
            self.result.found.append(unit)

    def unit(self, position: int, node: NodeProto, linear: Linear, name: str, flipped: bool) -> Unit | None:
        """Return the unit of a weight, following the product as long as each output is only scaled and shifted."""
        shape = linear.matrix(np.empty(tuple(self.model.tensor(name).dims)[:: -1 if flipped else 1], np.int8)).shape
        count = shape[0] * shape[2]
        end, gain, shift = node.output[0], np.ones(count), np.zeros(count)
        own = node.input[linear.bias] if 0 <= linear.bias < len(node.input) else ""
        bias = None
        if own:
            array = self.constant(own)
            if array is None or array.size not in (1, count):
                self.result.left[name] = "with a computed bias"
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
        bounds = None if user is None or user.input[0] != target else bounds_of(user, self.constant)
        return Unit(
            position, linear, node.input[0], name, flipped, gain, shift, bias, end, target, other, bounds or _UNBOUNDED
        )

    def constant(self, name: str) -> Array | None:
        while not self.model.has(name):
            maker = self.scope.producers.get(name)
            node = None if maker is None else self.node(maker)
            if node is not None and traits_of(node).is_constant:
                return next((array for a in node.attribute if (array := constant_array(a)) is not None), None)
            # Exporters put an Identity behind constants that several nodes share.
            if node is None or not traits_of(node).is_identity:
                return None
            name = node.input[0]
        return self.model.array(name)

    def shape(self, name: str) -> tuple[int, ...]:
        value = self.scope.values.get(name)
        return (value.shape if value is not None else None) or ()

    def editable(self, name: str, count: int) -> Bias | None:
        """Return the constant as a bias that may be changed, if it has one number for each output and one user."""
        if not self.model.has(name) or self.uses[name] != 1:
            return None
        if self.model.tensor(name).data_type != TensorProto.FLOAT:
            return None
        return Bias(name, np.ones(count)) if self.model.array(name).size == count else None

    def only_user(self, name: str) -> NodeProto | None:
        """Return the only user of a tensor, if that is a node of the main graph."""
        uses = self.scope.consumers.get(name, [])
        if len(uses) != 1 or uses[0].scope is not self.scope or name in self.scope.outputs:
            return None
        return self.node(uses[0].node)

    def summed(self, end: str, position: int) -> tuple[str, str | None]:
        """Return the sum that a tensor enters and its other operand, if that is computed before `position`."""
        user = self.only_user(end)
        if user is None or not traits_of(user).is_sum:
            return end, None
        other = user.input[1] if user.input[0] == end else user.input[0]
        value = self.scope.values.get(other)
        if value is None or value.constants is not None or self.scope.producers.get(other, -1) >= position:
            return end, None
        return (user.output[0], other) if self.shape(other) == self.shape(end) != () else (end, None)
