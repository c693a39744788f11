"""Linear runs of a graph: two linear operators, one after the other, with nothing but affine ones between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from onnx import NodeProto

from cpd_onnx.ir.model import Array, Lazy, constant_array, element_bytes, map_lazy, materialize
from cpd_onnx.ops.composition import Composition, compositions
from cpd_onnx.ops.matrix_view import AFFINE, Linear, Vector, is_transpose, key_of, linear_of, operands_of
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.shapes.values import Folded, Use, Value

WEIGHT = 1
"""Input slot of the weight of a linear operator."""
_TYPES = (np.float16, np.float32, np.float64)
"""Element types of weights that are multiplied."""
Pair: TypeAlias = "tuple[str, str]"
"""The outputs of the first and of the last operator of a run, which identify it in a model."""


@dataclass(frozen=True)
class Work:
    """Costs of linear operators: multiply-accumulates of one sample, and bytes of weights.

    Weights that other nodes read as well are not counted, as they stay.
    """

    macs: float = 0
    bytes: float = 0

    def __add__(self, other: Work) -> Work:
        """Return the costs of both."""
        return Work(self.macs + other.macs, self.bytes + other.bytes)


@dataclass(frozen=True, eq=False)
class Operator:
    """A linear node of the main graph whose weight is constant.

    Attributes:
        position: Position of the node.
        linear: The node as a matrix product.
        channels: Numbers of channels of its data and of its output.
        bias: What it adds, in float64 [channels]; None if that is not constant.
        bias_slot: Input slot of the bias; -1 if the operator has none.
        elements: Number of elements of the weight.
        places: Number of places at which all of them are multiplied.
    """

    position: int
    linear: Linear
    channels: tuple[int, int]
    bias: Vector | None
    bias_slot: int
    elements: int
    places: int

    @property
    def has_spread(self) -> bool:
        """Whether it inserts zeros between elements of the data."""
        return any(window.spread > 1 for window in self.linear.windows)


@dataclass(frozen=True, eq=False)
class LinearRun:
    """Two linear operators with nothing but affine ones between them.

    Attributes:
        pair: What identifies it.
        first, second: The two operators.
        between: Positions of the nodes between them, in order.
        gain, shift: What lies between their products: second(gain * first(x) + shift), with the first one's bias.
        composition: One operator in place of all; None if there is none.
        sum: Position of an addition that takes what is added to the result; None if the operator itself does.
        obstacle: Why there is no such operator; empty if there is.
        before, after: Costs of the two, and of the one.
    """

    pair: Pair
    first: Operator
    second: Operator
    between: tuple[int, ...]
    gain: Vector
    shift: Vector
    composition: Composition | None
    sum: int | None
    obstacle: str
    before: Work
    after: Work

    @property
    def nodes(self) -> frozenset[int]:
        """Positions of all nodes that change or disappear."""
        found = {self.first.position, self.second.position, *self.between}
        return frozenset(found if self.sum is None else found | {self.sum})


def linear_runs(folded: Folded) -> list[LinearRun]:
    """Return the linear runs of the main graph, each of two linear operators, in the order of the first."""
    finder = Finder(folded)
    found = (finder.run(position) for position in range(len(folded.scope.nodes)))
    return [run for run in found if run is not None]


class Finder:
    """Looks for linear runs in the main graph of an analysed model."""

    def __init__(self, folded: Folded) -> None:
        """Look in this model."""
        self.model, self.scope, self.batch = folded.model, folded.scope, folded.batch

    def run(self, position: int) -> LinearRun | None:
        """Return the run that starts with a node; None if there is none."""
        first = self.operator(position)
        if first is None or first.bias is None:
            return None
        name = self.scope.nodes[position].output[0]
        gain, shift = np.ones(first.channels[1]), first.bias
        between: list[int] = []
        while (use := self.only_use(name)) is not None:
            node = self.scope.nodes[use.node]
            second = self.operator(use.node) if use.slot == 0 else None
            if second is not None:
                return self.of_two(first, second, tuple(between), gain, shift)
            step = self.affine(name, node, first)
            if step is None:
                return None
            gain, shift = gain * step[0], shift * step[0] + step[1]
            name = node.output[0]
            between.append(use.node)
        return None

    def operator(self, position: int) -> Operator | None:
        """Return a linear node with a constant weight; None for other nodes."""
        node = self.scope.nodes[position]
        if len(node.input) <= WEIGHT or len(node.output) != 1:
            return None
        weight, data, out = (
            self.scope.values.get(name) for name in (node.input[WEIGHT], node.input[0], node.output[0])
        )
        if weight is None or data is None or out is None or data.constants is not None:
            return None
        stored, operands = self.stored(weight.name), operands_of(node)
        linear = None if stored is None else linear_of(node, stored.shape)
        if stored is None or linear is None or operands is None or stored.dtype not in _TYPES or linear.is_stacked:
            return None
        channels = _size(data, linear.in_axis), _size(out, linear.out_axis)
        if 0 in channels or data.shape is None or out.shape is None:
            return None
        name = node.input[operands.bias] if 0 <= operands.bias < len(node.input) else ""
        bias = _vector(self.constant(name), channels[1]) if name else np.zeros(channels[1])
        elements, places = math.prod(stored.shape), math.prod(out.shape) // channels[1]
        found = Operator(position, linear, channels, bias, operands.bias, elements, places)
        return replace(found, places=math.prod(data.shape) // channels[0]) if found.has_spread else found

    def constant(self, name: str) -> Array | None:
        """Return the values of a weight, also behind nodes that only transpose it or return it unchanged."""
        found = self.stored(name)
        return None if found is None else materialize(found)

    def stored(self, name: str) -> Array | Lazy | None:
        """Return what `constant` does, lazy if the model is large."""
        if self.model.has(name):
            return self.model.lazy_array(name)
        position = self.scope.producers.get(name) if name else None
        if position is None:
            return None
        node = self.scope.nodes[position]
        if traits_of(node).is_constant:
            return next((array for a in node.attribute if (array := constant_array(a)) is not None), None)
        if not traits_of(node).is_identity and not is_transpose(node):
            return None
        found = self.stored(node.input[0])
        if found is None or traits_of(node).is_identity:
            return found
        return map_lazy(found, found.shape[::-1], np.transpose) if len(found.shape) == 2 else None

    def only_use(self, name: str) -> Use | None:
        """Return the only use of a tensor, if that is in the main graph and the tensor is no output."""
        uses = self.scope.consumers.get(name, [])
        is_inner = len(uses) == 1 and uses[0].scope is self.scope and name not in self.scope.outputs
        return uses[0] if is_inner else None

    def affine(self, name: str, node: NodeProto, first: Operator) -> tuple[Vector, Vector] | None:
        """Return factor and addend of each channel for an affine node that reads a tensor; None for other nodes."""
        before, after = self.scope.values.get(name), self.scope.values.get(node.output[0])
        if before is None or after is None or before.shapes != after.shapes or before.shape is None:
            return None
        if before.dtype != after.dtype or len([output for output in node.output if output]) != 1:
            return None
        size, rank = first.channels[1], len(before.shape)
        if traits_of(node).is_identity:
            return np.ones(size), np.zeros(size)
        axis = first.linear.out_axis % rank
        make = AFFINE.get(key_of(node))
        step = None if make is None else make(node, name, (axis, axis - rank), self.constant)
        if step is None:
            return None
        factor, addend = _vector(step.factor, size), _vector(step.addend, size)
        return None if factor is None or addend is None else (factor, addend)

    def of_two(
        self, first: Operator, second: Operator, between: tuple[int, ...], gain: Vector, shift: Vector
    ) -> LinearRun | None:
        """Return the run of two operators; None if their sizes or types do not fit."""
        nodes = [self.scope.nodes[each.position] for each in (first, second)]
        weights = [self.scope.values[node.input[WEIGHT]] for node in nodes]
        if first.channels[1] != second.channels[0] or weights[0].dtype != weights[1].dtype:
            return None
        width = element_bytes(weights[0].dtype)
        owned = sum(
            width * each.elements
            for each, weight in zip((first, second), weights, strict=True)
            if len(self.scope.consumers[weight.name]) == 1
        )
        before = Work(sum(each.elements * each.places for each in (first, second)) / self.batch, owned)
        found = LinearRun(
            (nodes[0].output[0], nodes[1].output[0]), first, second, between, gain, shift, None, None,
            "neither operator can have the strides, pads and order of axes of both", before, before,
        )  # fmt: skip  # a list
        for made in compositions(first.linear, second.linear, (first.channels[0], second.channels[1])):
            is_exact = made.passes_constants or not shift.any()
            place = self.place(made, found) if is_exact else None
            if place is None:
                why = "has no place" if is_exact else "would meet zeros beside the data"
                found = replace(found, obstacle=f"what is added between the operators {why}")
                continue
            places = first.places if first.has_spread and not made.is_second else second.places
            after = Work(made.size * places / self.batch, width * made.size)
            return replace(found, composition=made, sum=place if place >= 0 else None, obstacle="", after=after)
        return found

    def place(self, made: Composition, run: LinearRun) -> int | None:
        """Return what takes the constant that is added to the result: the position of an addition, or -1 for the node.

        None if nothing can take it.
        """
        if run.second.bias is None:  # a tensor that is computed: it may stay where it is
            return -1 if made.is_second and not run.shift.any() else None
        stays = run.second if made.is_second else run.first
        if stays.bias_slot >= 0 or not (run.shift.any() or (run.second.bias.any() and not made.is_second)):
            return -1
        use = self.only_use(run.pair[1])
        if use is not None and self.is_sum(use.node, run.pair[1], run.second.channels[1]):
            return use.node
        if made.is_second:
            return None
        size = run.second.channels[0]
        tensors = (self.scope.nodes[at].output[0] for at in (run.first.position, *run.between))
        return next((at for at, name in zip(run.between, tensors, strict=False) if self.is_sum(at, name, size)), None)

    def is_sum(self, position: int, name: str, size: int) -> bool:
        """Return whether a node adds one constant to each channel, along the last axis, of a tensor."""
        node = self.scope.nodes[position]
        if not traits_of(node).is_sum or len(node.input) != 2:
            return False
        before, after = self.scope.values.get(name), self.scope.values.get(node.output[0])
        if before is None or after is None or before.shape is None or before.shapes != after.shapes:
            return False
        array = self.constant(node.input[1 if node.input[0] == name else 0])
        return array is not None and _vector(array, size) is not None and array.ndim <= len(before.shape)


def _size(value: Value, axis: int) -> int:
    """Return the size of an axis; 0 if it is not known or differs."""
    sizes = {shape[axis] if -len(shape) <= axis < len(shape) else 0 for shape in value.shapes or ()}
    return sizes.pop() if len(sizes) == 1 else 0


def _vector(array: Array | None, size: int) -> Vector | None:
    """Return a constant as one number for each channel; None if it is none, or varies along other axes."""
    if array is None or not np.issubdtype(array.dtype, np.floating):
        return None
    if array.size == 1:
        return np.full(size, float(array.ravel()[0]))
    return array.astype(np.float64).ravel() if array.shape[-1] == array.size == size else None
