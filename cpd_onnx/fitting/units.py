"""Linear units of a graph: weights of matrix products, each with its input and the affine chain after its output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

import numpy as np
from onnx import NodeProto, TensorProto

from cpd_onnx.fitting.graph import Graph
from cpd_onnx.fitting.least_squares import Matrix, Rows, single
from cpd_onnx.fitting.steps import Steps
from cpd_onnx.fitting.stored import Bias, Scale, Stored
from cpd_onnx.ir.model import Array, Model, attributes_of
from cpd_onnx.ops import attention_view
from cpd_onnx.ops.attention_view import projections_of
from cpd_onnx.ops.matrix_view import (
    AFFINE,
    Affine,
    Linear,
    Vector,
    along,
    bounds_of,
    is_transpose,
    key_of,
    linear_of,
    operands_of,
    spread,
)
from cpd_onnx.ops.quantized_view import (
    LIMITS,
    Constants,
    Level,
    Operands,
    binary_of,
    is_dynamic_quantizer,
    level_of,
    packing_of,
    quantised_type,
)
from cpd_onnx.ops.recurrent_view import BIAS, FIRST_STATE, INPUT, INPUT_WEIGHT, STATE_WEIGHT, Gates, gates_of
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.rules.api import FLOATS, Quantized
from cpd_onnx.shapes.values import COMPUTABLE_TYPES, Folded

Bounds: TypeAlias = tuple[float, float]
_UNBOUNDED = (-np.inf, np.inf)
SHARED = "used several times"
"""Why a weight that several nodes take is left."""
_OTHER_TYPE = "neither in half, single or double precision nor integers with constant scales in float32"
"""Why a weight of another type is left."""


@dataclass(frozen=True, eq=False)
class Unit:
    """A weight, the node of the main graph that multiplies by it, and the affine chain after that.

    All are those of real numbers: of quantised tensors, what their integers stand for.

    Attributes:
        position: Position of the node.
        linear: The node as a matrix product.
        data: Tensor that the node multiplies by the weight.
        stored: The weight, whose initializer is used nowhere else.
        gain, shift: Affine function from the product to `end`: end = gain * product + shift [outputs].
        bias: Constant in the chain that may be changed.
        end: Last tensor of the chain.
        target: Tensor to be fitted: `end`, or the sum that it enters.
        other: The other operand of that sum, which is computed before the node.
        bounds: Bounds to which an activation or a quantisation clips the target; infinite for none.
        levels: Scales and zero points of those of these tensors that are quantised, by name.
        noise: Root mean square of the rounding of `end` before it enters the target.
        is_rounded: Whether the node takes or returns integers, so that its output differs from the product of real
            numbers: it may be clipped, sometimes in place of an activation.
        is_inner: Whether the product is inside an operator, as those of the gates of a recurrent one are, and no tensor
            holds it. The target is the operator's output then, all states for example, and only tells the number of
            positions.
        first: Tensor of the states before the first step, where the features are those before each step; None for
            zeros.
    """

    position: int
    linear: Linear
    data: str
    stored: Stored
    gain: Vector
    shift: Vector
    bias: Bias | None
    end: str
    target: str
    other: str | None
    bounds: Bounds
    levels: Mapping[str, Level] = field(default_factory=dict)
    noise: float = 0.0
    is_rounded: bool = False
    is_inner: bool = False
    first: str | None = None

    @property
    def is_observed(self) -> bool:
        """Whether the target in the graph is what the product of real numbers gives."""
        return not (self.is_rounded or self.is_inner)

    @property
    def is_fed_back(self) -> bool:
        """Whether the features are states that the node itself returns."""
        return self.is_inner and self.data == self.target

    @property
    def taken(self) -> tuple[str, ...]:
        """Tensors that the features are computed from."""
        return (self.data,) if self.first is None else (self.data, self.first)

    @property
    def weight(self) -> str:
        """Name of the weight's initializer."""
        return self.stored.name

    @property
    def flipped(self) -> bool:
        """Whether the graph transposes the weight first."""
        return self.stored.flipped

    @property
    def is_float(self) -> bool:
        """Whether weight and bias can be any real numbers."""
        return self.stored.is_float and (self.bias is None or self.bias.is_float)

    @property
    def is_clipped(self) -> bool:
        """Whether something clips the target."""
        return self.bounds != _UNBOUNDED

    def real(self, name: str, array: Array) -> Array:
        """Return the real numbers that the values of one of the unit's tensors stand for, as float32."""
        level = self.levels.get(name)
        return single(array) if level is None else level.real(array)

    def rows(self, tensors: Mapping[str, Array], places: Array, masks: Iterable[Array] = ()) -> Rows:
        """Return the features at some positions [groups, rows, features].

        Args:
            tensors: The tensors of a batch; those of `taken` are needed.
            places: The positions.
            masks: What the data are multiplied by first.
        """
        data = self.real(self.data, tensors[self.data])
        first = None if self.first is None else single(tensors[self.first])
        for mask in masks:
            data = data * mask
        if self.is_fed_back:
            assert isinstance(self.linear, Gates)
            data = self.linear.before(data, first)
        return self.linear.rows(data, places)

    def unrounded(self, rows: Rows, places: Array, real: Mapping[str, Array], matrix: Matrix) -> Rows:
        """Return the target as it is before anything clips or rounds it [groups, rows, outputs].

        Args:
            rows: Features at some positions of a batch.
            places: The positions.
            real: Real numbers of the unit's tensors; `other` is needed.
            matrix: The weight.
        """
        gain, shift = (vector.reshape(len(matrix), 1, -1) for vector in (self.gain, self.shift))
        made = rows @ (matrix * gain).astype(np.float32) + shift.astype(np.float32)
        return np.asarray(made if self.other is None else made + self.linear.targets(real[self.other], places))

    def matrix(self, model: Model) -> Matrix:
        """Return the values of the weight as a matrix [groups, features, outputs]."""
        return np.asarray(self.linear.matrix(np.asarray(self.stored.array(model), np.float64)), np.float64)

    def steps(self, model: Model) -> Steps | None:
        """Return the steps of a quantised weight; None for a float one."""
        return self.stored.steps(model, self.linear)

    def store(self, model: Model, matrix: Array, constant: Array | None = None, scales: Vector | None = None) -> None:
        """Replace the weight, and change the bias so that a constant is added to the products.

        Args:
            model: The model that is changed.
            matrix: The new weight [groups, features, outputs].
            constant: The constant for each output; none is possible without a bias.
            scales: Scales of a quantised weight.
        """
        before, old = self._weight_scales(model), np.zeros(0)
        if self.bias is not None:
            old = self.bias.values(model, before)
        self.stored.put(model, self.linear.weight(matrix), scales)
        after = self._weight_scales(model)
        if self.bias is not None and (constant is not None or scales is not None):
            change = np.zeros(1) if constant is None else self.bias.change_before(constant.ravel() * self.gain)
            self.bias.put(model, old, change, None if before is None or after is None else (before, after))

    def stored_constant(self, model: Model, constant: Array) -> Array:
        """Return the constant that the bias can add to the products in place of another."""
        if self.bias is None or not self.bias.is_coarse:
            return constant
        old = self.bias.values(model, None)
        made = self.bias.rounded(model, old + self.bias.change_before(constant.ravel() * self.gain))
        is_felt = np.abs(self.gain) > 0
        change = np.where(is_felt, (made - old) * self.bias.factor / np.where(is_felt, self.gain, 1.0), 0.0)
        return np.asarray(change.reshape(constant.shape))

    def _weight_scales(self, model: Model) -> Vector | None:
        return None if self.stored.scale is None else self.stored.scale.of(model)


@dataclass(eq=False)
class Units:
    """The linear units of a model.

    Attributes:
        found: The units in the order of the graph, whose weights no other node uses.
        shared: Units with a common weight, as in a head that is applied to several feature maps: they differ only in
            their data and target.
        left: Weights of linear operators that do not form a unit, and why.
    """

    found: list[Unit] = field(default_factory=list)
    shared: list[tuple[Unit, ...]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def by_weight(self) -> list[tuple[Unit, ...]]:
        """The units of each weight, in the order of the graph."""
        return sorted([*((unit,) for unit in self.found), *self.shared], key=lambda units: units[0].position)


def units_of(folded: Folded, model: Model | None = None) -> Units:
    """Return the linear units of a model: weights of operators in `LINEAR`.

    Args:
        folded: The analysed model.
        model: A copy of it with the same nodes whose weights are used instead.
    """
    return _UnitFinder(folded, model or folded.model).run()


class _UnitFinder(Graph):
    def __init__(self, folded: Folded, model: Model) -> None:
        super().__init__(folded, model)
        self.result = Units()
        self.together: dict[str, list[Unit]] = {}
        nodes = map(self.node, range(len(self.scope.nodes)))
        self.passed = [(node.input[0], node.output[0]) for node in nodes if self.passes_on(node)]

    def run(self) -> Units:
        for position in range(len(self.scope.nodes)):
            node = self.node(position)
            for gates in gates_of(node):
                self.enter_gates(position, node, gates)
            if (projections := projections_of(node)) is not None:
                self.enter_projections(position, node, projections)
            operands = operands_of(node)
            if operands is None or len(node.input) <= operands.weight:
                continue
            found = self.source(node, operands)
            if isinstance(found, Stored):
                self.enter(position, node, operands, found)
            elif found:
                self.result.left[node.input[operands.weight]] = found
        for name, units in self.together.items():
            if not self.are_alike(units):
                self.result.left[name] = SHARED
                continue
            bounds = units[0].bounds if len({unit.bounds for unit in units}) == 1 else _UNBOUNDED
            self.result.shared.append(tuple(replace(unit, bounds=bounds) for unit in units))
        return self.result

    def are_alike(self, units: Sequence[Unit]) -> bool:
        """Return whether all uses of a weight are these units, which do the same to their data but for activations."""
        if not units or len(units) != self.count_uses(units[0].weight):
            return False
        first, biases = units[0], {unit.bias and unit.bias.name for unit in units}
        shape = first.matrix(self.model).shape
        return all(
            unit.is_float
            and unit.flipped == first.flipped
            and unit.matrix(self.model).shape == shape
            and np.array_equal(unit.gain, first.gain)
            and np.array_equal(unit.shift, first.shift)
            and biases == {first.bias and first.bias.name}
            for unit in units
        )

    def count_uses(self, name: str) -> int:
        """Return the number of input slots that take a tensor, directly or from nodes that pass it on."""
        behind = [made for given, made in self.passed if given == name]
        return self.uses[name] - len(behind) + sum(map(self.count_uses, behind))

    # Weights.

    def source(self, node: NodeProto, operands: Operands) -> Stored | str:
        """Return the weight of a node as it is stored; why it is left, empty if the operand is none."""
        name, flipped = self.before_transpose(node.input[operands.weight])
        if operands.is_quantized:
            return self.of_operator(node, operands, name) if not flipped else ""
        maker = self.maker(name)
        if maker is not None and traits_of(maker).is_quantizer and self.uses[name] == 1:
            return self.dequantised(maker, flipped=flipped)
        if maker is not None and traits_of(maker).is_bilinear and traits_of(maker).is_local and self.uses[name] == 1:
            return self.multiplied(maker, flipped=flipped)
        name = self.passed_on(name)
        held = self.held_type(name)
        if held is not None:
            return Stored(name, flipped) if not flipped or len(held[1]) == 2 else ""
        return self.moved_weight(node.input[operands.weight]) or ""

    def moved_weight(self, name: str) -> Stored | None:
        """Return a weight that nodes put together for one node; None for other tensors."""
        moved = self.moved(name) if self.uses[name] == 1 else None
        return None if moved is None else Stored(moved.sources[0], moved=moved)

    def before_transpose(self, name: str) -> tuple[str, bool]:
        """Return the matrix that the graph transposes before it becomes a tensor, or the tensor itself."""
        maker = self.maker(name)
        if maker is None or not is_transpose(maker) or self.uses[name] != 1:
            return name, False
        return maker.input[0], True

    def passed_on(self, name: str) -> str:
        """Return the first tensor that a chain of nodes passes on as another."""
        while (maker := self.maker(name)) is not None and self.passes_on(maker):
            name = maker.input[0]
        return name

    def dequantised(self, node: NodeProto, *, flipped: bool) -> Stored | str:
        """Return a weight that a node dequantises; a float one that the graph quantises before that is rounded."""
        name, users, shape = node.input[0], 1, self.shape(node.output[0])
        quantizer = self.maker(name)
        if quantizer is not None and traits_of(quantizer).is_quantizer:
            if self.uses[name] != 1 or list(quantizer.input[1:]) != list(node.input[1:]):
                return ""
            kind = quantised_type(quantizer, self.constant)
            name, users = quantizer.input[0], 2
        else:
            kind = self.kind(name)
        if not self.is_held(name):
            return ""
        scale = self.scale(node.input, (1, 2), users)
        if scale is None or kind not in LIMITS or (flipped and len(shape) != 2):
            return _OTHER_TYPE
        given = attributes_of(node)
        spread = Quantized(None, None, given.get("axis", 1) % max(1, len(shape)), given.get("block_size", 0))
        form = self.constant(node.input[1])
        assert form is not None

        def cells() -> Array:
            weight = self.held_type(name)
            assert weight is not None
            return spread.aligned(np.arange(form.size).reshape(form.shape), weight[1])

        return Stored(name, flipped, scale, cells, None, LIMITS[kind], is_rounded=users > 1)

    def multiplied(self, node: NodeProto, *, flipped: bool) -> Stored | str:
        """Return a weight whose integers a Cast makes floats and a node scales, as `deploy --weight-bits` stores it."""
        for given, other in (node.input, node.input[::-1]) if len(node.input) == 2 else ():
            cast = self.maker(given)
            name = cast.input[0] if cast is not None and traits_of(cast).casts and self.uses[given] == 1 else ""
            if self.kind(name) not in LIMITS or self.uses[name] != 1:
                continue
            scale, form = self.scale([other], (0, -1), 1), self.constant(other)
            if scale is None or form is None or (flipped and len(self.shape(node.output[0])) != 2):
                return _OTHER_TYPE
            numbers = np.arange(form.size).reshape(form.shape)

            def cells(name: str = name, numbers: Array = numbers) -> Array:
                weight = self.held_type(name)
                assert weight is not None
                return np.broadcast_to(numbers, weight[1])

            return Stored(name, flipped, scale, cells, None, LIMITS[self.kind(name)])
        return ""

    def of_operator(self, node: NodeProto, operands: Operands, name: str) -> Stored | str:
        """Return the weight of an operator that takes integers, with one scale for all, each output or each block."""
        packing, weight = packing_of(node), self.held_type(name)
        if weight is None:
            return ""
        kind, shape = weight
        names, level = node.input, operands.weight_level
        if operands.is_unscaled:
            scaled = self.scaled(node)
            if scaled is None:
                return ""
            names, level = [*node.input, scaled.scale], (len(node.input), level[1])
        if packing is None and (operands.is_packed or kind not in LIMITS):
            return _OTHER_TYPE
        scale = self.scale(names, level, 1, packing)
        if scale is None:
            return _OTHER_TYPE
        count = scale.of(self.model).size
        if packing is not None:
            return Stored(name, False, scale, lambda: packing.cells, packing, packing.limits)
        linear = linear_of(node, shape)
        if linear is None:
            return "in a layout that is not fitted"

        def cells() -> Array:
            if count == 1:
                return np.zeros((1,) * len(shape), np.int64)
            groups, features, outputs = linear.matrix(np.broadcast_to(np.int8(0), shape)).shape
            numbers = np.arange(groups * outputs).reshape(groups, 1, outputs)
            return linear.weight(np.broadcast_to(numbers, (groups, features, outputs)))

        return Stored(name, False, scale, cells, None, LIMITS[kind])

    # Units.

    def enter(self, position: int, node: NodeProto, operands: Operands, stored: Stored) -> None:
        linear = linear_of(node, stored.shape(self.model))
        data = self.data(node, operands)
        value = self.scope.values.get(data[0])
        if linear is None or value is None or value.constants is not None or value.shape is None:
            return
        taken = self.scope.values.get(self.scope.nodes[position].input[operands.weight])
        is_computable = taken is not None and taken.dtype in COMPUTABLE_TYPES and self.kind(stored.name) in FLOATS
        if stored.is_float and not is_computable:
            self.result.left[stored.name] = _OTHER_TYPE
            return
        users = self.count_uses(stored.name) if stored.moved is None else 1
        if stored.name in self.scope.outputs or (users > 1 and not stored.is_float):
            self.result.left[stored.name] = SHARED
            return
        unit = self.unit(position, operands, linear, stored, data, users)
        own = self.result.found if users == 1 else self.together.setdefault(stored.name, [])
        own += [] if unit is None else [unit]

    def enter_gates(self, position: int, node: NodeProto, gates: Gates) -> None:
        """Enter the weight by which a recurrent operator multiplies inputs or states, if it may be changed."""
        given = node.input[STATE_WEIGHT if gates.is_state else INPUT_WEIGHT]
        name = self.passed_on(given)
        stored = Stored(name) if self.is_held(name) else self.moved_weight(given)
        if stored is None:
            return
        states, bias = node.output[0], node.input[BIAS] if len(node.input) > BIAS else ""
        value = self.scope.values.get(states)
        numbers = self.constant(bias) if bias else np.zeros((gates.groups, 2 * stored.shape(self.model)[1]))
        why = ""
        if self.kind(stored.name) not in FLOATS:
            why = _OTHER_TYPE
        elif stored.moved is None and (self.count_uses(name) > 1 or name in self.scope.outputs):
            why = SHARED
        elif value is None or value.shape is None:
            why = "all states of its operator are no tensor of the graph"
        elif numbers is None:
            why = "with a computed bias"
        if why or numbers is None:
            self.result.left[stored.name] = why
            return
        half = numbers.shape[1] // 2
        part = (half, 2 * half) if gates.is_state else (0, half)
        shift = numbers[:, slice(*part)].astype(np.float64).ravel()
        first = node.input[FIRST_STATE] if gates.is_state and len(node.input) > FIRST_STATE else ""
        start = self.scope.values.get(first)
        self.result.found.append(
            Unit(
                position, gates, states if gates.is_state else node.input[INPUT], stored, np.ones(len(shift)), shift,
                self.editable_part(bias, len(shift), part) if bias else None, states, states, None, _UNBOUNDED,
                is_inner=True, first=first if start is not None and start.constants is None else None,
            )
        )  # fmt: skip  # a list

    def enter_projections(self, position: int, node: NodeProto, projections: Linear) -> None:
        """Enter the weight by which attention projects its input, if it may be changed."""
        name, bias, made = self.passed_on(node.input[attention_view.WEIGHT]), "", node.output[0]
        if len(node.input) > attention_view.BIAS:
            bias = node.input[attention_view.BIAS]
        value, stored = self.scope.values.get(made), Stored(name)
        numbers = self.constant(bias) if bias else np.zeros(1)
        why = ""
        if not self.is_held(name) or self.kind(name) not in FLOATS:
            why = _OTHER_TYPE
        elif self.count_uses(name) > 1 or name in self.scope.outputs:
            why = SHARED
        elif value is None or value.shape is None or numbers is None:
            why = "with a computed bias or an output of unknown shape"
        if why or numbers is None:
            self.result.left[name] = why
            return
        count = stored.shape(self.model)[1]
        self.result.found.append(
            Unit(
                position, projections, node.input[attention_view.INPUT], stored, np.ones(count),
                np.broadcast_to(numbers.astype(np.float64), count), self.editable(bias, count, 1) if bias else None,
                made, made, None, _UNBOUNDED, is_inner=True,
            )
        )  # fmt: skip  # a list

    def editable_part(self, name: str, count: int, part: tuple[int, int]) -> Bias | None:
        """Return half of the bias of a recurrent operator, which may be changed if nothing else takes it."""
        bias = self.editable(name, 2 * count, 1)
        return None if bias is None else replace(bias, factor=np.ones(count), part=part)

    def data(self, node: NodeProto, operands: Operands) -> tuple[str, dict[str, Level]]:
        """Return the tensor that a node multiplies, and its level if it is quantised.

        Where it is quantised by its own range, that is the tensor before.
        """
        name = node.input[operands.data]
        maker = self.maker(name)
        if operands.data_level == (-1, -1):
            return name, {}
        if maker is not None and is_dynamic_quantizer(maker):
            return maker.input[0], {}
        level = level_of(node, operands.data_level, self.constant)
        return (name, {name: level}) if level is not None else ("", {})

    def scaled(self, node: NodeProto) -> _Scaled | None:
        """Return how the graph scales the product of integers of a node, with the range of its data."""
        cast = self.only_user(node.output[0])
        user = None if cast is None or not traits_of(cast).casts else self.only_user(cast.output[0])
        if cast is None or user is None or not traits_of(user).is_bilinear:
            return None
        other = user.input[1] if user.input[0] == cast.output[0] else user.input[0]
        maker, source = self.maker(other), self.maker(node.input[0])
        if maker is None or source is None or not traits_of(maker).is_bilinear or not is_dynamic_quantizer(source):
            return None
        factors = [name for name in maker.input if name != source.output[1]]
        if len(factors) != 1 or self.uses[other] != 1 or self.constant(factors[0]) is None:
            return None
        return _Scaled(user.output[0], factors[0])

    def unit(
        self,
        position: int,
        operands: Operands,
        linear: Linear,
        stored: Stored,
        data: tuple[str, dict[str, Level]],
        users: int,
    ) -> Unit | None:
        """Return the unit of a weight, following the product as long as each output is only scaled and shifted.

        A bias with as many users as the weight may be changed, since they are taken for the same ones.
        """
        node, levels = self.node(position), data[1]
        shape = linear.matrix(np.broadcast_to(np.int8(0), stored.shape(self.model))).shape
        count = shape[0] * shape[2]
        chain = _Chain(node.output[0], np.ones(count), np.zeros(count), None, levels)
        if operands.is_unscaled:
            scaled = self.scaled(node)
            assert scaled is not None  # or its weight would have no scale
            chain.end = scaled.output
        own = node.input[operands.bias] if 0 <= operands.bias < len(node.input) else ""
        if own:
            bias = self.own_bias(own, count, operands, stored, levels.get(data[0]), users)
            if bias is None:
                self.result.left[stored.name] = "with a computed bias"
                return None
            chain.shift, chain.bias = chain.shift + bias[0], bias[1]
            if bias[1] is None and stored.scale is not None and not bias[2]:
                stored = replace(stored, scale=replace(stored.scale, is_free=False))
        if not self.leveled(chain, node, operands.out_level):
            return None
        rank = len(self.shape(chain.end))
        axis = linear.out_axis % max(1, rank) - rank
        constants = self.constant if not linear.stack else partial(self.spread, linear.stack, shape[2])
        while self.extended(chain, (axis + rank, axis), count, users, constants):
            pass
        target, other = self.summed(chain, position)
        noise = 0.0 if operands.is_quantized else chain.noise
        return Unit(
            position, linear, data[0], stored, chain.gain, chain.shift, chain.bias, chain.end, target, other,
            self.bounds(target, chain.levels.get(target)), chain.levels, noise, operands.is_quantized,
        )  # fmt: skip  # a list

    def own_bias(
        self, name: str, count: int, operands: Operands, stored: Stored, data: Level | None, users: int
    ) -> tuple[Vector, Bias | None, bool] | None:
        """Return the values of a node's own bias, the bias if it may be changed, and whether it is a float.

        None if it is not constant.
        """
        array = self.constant(name)
        if array is None or array.size not in (1, count):
            return None
        if not operands.is_float_bias:
            assert stored.scale is not None
            factor = 1.0 if data is None else data.scale
            values = array.astype(np.float64).ravel() * factor * stored.scale.of(self.model)
            is_own = self.is_held(name) and self.uses[name] == 1 and array.size == count and data is not None
            limits = LIMITS[TensorProto.INT32]
            return values, Bias(name, np.ones(count), None, limits, factor) if is_own else None, False
        bias = self.editable(name, count, users)
        maker = self.maker(name)
        is_float = maker is None or not traits_of(maker).is_quantizer
        weight = stored.scale
        if bias is not None and bias.scale is not None and bias.limits == LIMITS[TensorProto.INT32]:
            # Runtimes take the product of the scales of data and weight for that of the bias.
            follows = weight is not None and bias.scale.is_free and weight.values.size == bias.scale.values.size
            bias = replace(bias, follows=True) if follows else None
        return array.astype(np.float64).ravel(), bias, is_float

    def leveled(self, chain: _Chain, node: NodeProto, slots: tuple[int, int]) -> bool:
        """Enter the level of a node's output if it is quantised; returns False if that is not known."""
        if slots == (-1, -1) or len(node.input) <= slots[0]:
            return True
        level = level_of(node, slots, self.constant)
        if level is None or level.limits is None:
            return False
        chain.levels[node.output[0]] = level
        return True

    def spread(self, stack: tuple[int, ...], outputs: int, name: str) -> Array | None:
        """Return a constant that meets the output of a stack of matrices, see `ops.matrix_view.spread`."""
        return spread(self.constant(name), stack, outputs)

    def extended(self, chain: _Chain, axes: tuple[int, int], count: int, users: int, constants: Constants) -> bool:
        """Append the next affine node to the chain, if there is one."""
        at, noise = self.unrounded(chain)
        follower = self.only_user(at)
        if follower is None or self.shape(follower.output[0]) != self.shape(at):
            return False
        found = self.step(follower, at, axes, count, users, constants)
        if found is None or not self.leveled(chain, follower, found[2]):
            return False
        step, bias, _ = found
        chain.end, chain.noise = follower.output[0], noise
        chain.gain, chain.shift = chain.gain * step.factor, chain.shift * step.factor + step.addend
        chain.bias = chain.bias and chain.bias.times(step.factor)
        chain.bias = chain.bias or bias
        return True

    def step(
        self, node: NodeProto, name: str, axes: tuple[int, int], count: int, users: int, constants: Constants
    ) -> tuple[Affine, Bias | None, tuple[int, int]] | None:
        """Return what an affine node does to a tensor, its bias if that may be changed, and the slots of its level."""
        make = AFFINE.get(key_of(node))
        if make is not None:
            step = make(node, name, axes, constants)
            bias = self.editable(step.bias, count, users) if step is not None and step.bias else None
            return None if step is None else (step, bias, (-1, -1))
        binary = binary_of(node)
        if binary is None or name not in (node.input[slot] for slot in binary.operands):
            return None
        which = int(node.input[binary.operands[0]] == name)
        other = node.input[binary.operands[which]]
        scale = self.scale(node.input, binary.levels[which], 1)
        array = self.constant(other)
        if array is None or scale is None or scale.values.size != 1:
            return None
        vector = along((array - scale.zero_point) * scale.values, axes[1])
        if vector is None:
            return None
        if not binary.is_sum:
            return Affine(vector, np.zeros(1)), None, binary.out_level
        bias = self.of_integers(other, scale, count)
        return Affine(np.ones(1), vector), bias, binary.out_level

    def unrounded(self, chain: _Chain) -> tuple[str, float]:
        """Return the tensor behind the quantisations that follow the chain, and the noise of their rounding."""
        name = chain.end
        noise = chain.levels[name].noise if name in chain.levels else chain.noise
        while (user := self.only_user(name)) is not None and user.input[0] == name and self.is_passed(user):
            level = level_of(user, (1, 2), self.constant)
            if level is None and traits_of(user).is_quantizer:
                break
            name, noise = user.output[0], noise if level is None else level.noise
        return name, noise

    def editable(self, name: str, count: int, users: int) -> Bias | None:
        """Return the constant as a bias that may be changed, if it has one number for each output and so many users."""
        maker = self.maker(name)
        if maker is not None and traits_of(maker).is_quantizer and self.uses[name] == 1:
            scale = self.scale(maker.input, (1, 2), 1)
            return None if scale is None else self.of_integers(maker.input[0], scale, count)
        name = self.passed_on(name)
        found = self.held_type(name)
        if found is None and users == 1 and (made := self.moved_weight(name)) is not None:
            is_own = made.moved is not None and made.moved.places.size == count
            return Bias(made.name, np.ones(count), moved=made.moved) if is_own else None
        if found is None or found[0] not in FLOATS or math.prod(found[1]) != count:
            return None
        if self.count_uses(name) != users:
            return None
        return Bias(name, np.ones(count))

    def of_integers(self, name: str, scale: Scale, count: int) -> Bias | None:
        """Return integers as a bias that may be changed, as `editable` does.

        Of integers of eight bits, scale and zero point must be changed together.
        """
        found = self.held_type(name)
        if found is None or self.uses[name] != 1 or math.prod(found[1]) != count or found[0] not in LIMITS:
            return None
        kind = found[0]
        if LIMITS[kind] != LIMITS[TensorProto.INT32]:
            is_free = scale.is_free and bool(scale.zero_name) and scale.values.size == 1
            scale = replace(scale, is_free=is_free)
        return Bias(name, np.ones(count), scale, LIMITS[kind])

    def summed(self, chain: _Chain, position: int) -> tuple[str, str | None]:
        """Return the sum that the chain enters and its other operand, if that is computed before `position`.

        Otherwise the end of the chain; levels and noise are entered in the chain.
        """
        at, noise = self.unrounded(chain)
        user = self.only_user(at)
        binary = None if user is None else binary_of(user)
        if user is None or binary is None or not binary.is_sum:
            return chain.end, None
        which = int(user.input[binary.operands[0]] == at)
        level = level_of(user, binary.levels[which], self.constant)
        other, level = self.made_before(user.input[binary.operands[which]], level, position)
        value = self.scope.values.get(other)
        if value is None or value.constants is not None or self.scope.producers.get(other, -1) >= position:
            return chain.end, None
        if not self.shape(other) == self.shape(chain.end) != () or not self.leveled(chain, user, binary.out_level):
            return chain.end, None
        chain.noise = noise
        chain.levels |= {} if level is None else {other: level}
        return user.output[0], other

    def made_before(self, name: str, level: Level | None, position: int) -> tuple[str, Level | None]:
        """Return the tensor before the quantisations that make another after a position, and its level."""
        while self.scope.producers.get(name, -1) >= position:
            maker = self.maker(name)
            if maker is None or not self.is_passed(maker):
                break
            value = self.scope.values.get(maker.input[0])
            is_real = value is not None and value.dtype == TensorProto.FLOAT
            made = level_of(maker, (1, 2), self.constant) if traits_of(maker).is_quantizer else level
            name, level = maker.input[0], None if is_real else made
            if not is_real and level is None:
                break
        return name, level

    def bounds(self, target: str, level: Level | None) -> Bounds:
        """Return the bounds to which what follows a tensor clips it: quantisations, and then an activation."""
        low, high = (level and level.limits) or _UNBOUNDED
        name = target
        while (user := self.only_user(name)) is not None and user.input[0] == name:
            found = bounds_of(user, self.constant)
            if found is not None:
                low, high = max(low, found[0]), min(high, found[1])
            if not self.is_passed(user):
                break
            name = user.output[0]
        return (low, high) if low < high else _UNBOUNDED


@dataclass(frozen=True)
class _Scaled:
    """How the graph scales a product of integers: name of the result, and of the scale of the weight."""

    output: str
    scale: str


@dataclass(eq=False)
class _Chain:
    """The affine chain after a product, while it is followed; its attributes are those of `Unit`."""

    end: str
    gain: Vector
    shift: Vector
    bias: Bias | None
    levels: dict[str, Level]
    noise: float = 0.0
