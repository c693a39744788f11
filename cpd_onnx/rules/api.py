"""The interface of rules: what a rule reads from a node, and what it records about the axes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto

from cpd_onnx.algebra.atoms import NOTHING, Atoms, Axis, Fingerprint, fingerprint, is_uniform, uniform
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.algebra.reasons import Reason
from cpd_onnx.ir.model import DEFAULT_DOMAINS, Array, attributes_of
from cpd_onnx.moved import GONE_IN
from cpd_onnx.ops.evaluate import Call
from cpd_onnx.ops.sizes import Size
from cpd_onnx.ops.traits import MICROSOFT, traits_of
from cpd_onnx.shapes.order import all_inputs
from cpd_onnx.shapes.values import Scope, Shape, Value, is_decided_by_data

_MOST_AXES = 1 << 10
"""Largest absolute value of an axis attribute that is accepted; a heuristic, far above the rank of any tensor."""


class GiveUp(Exception):
    """Raised by a rule that cannot follow the channels; all axes of the node are then frozen with this reason."""


WHOLE = "can only be removed as a whole"
"""Why an axis is frozen of which one channel runs through all indices."""
KERNEL_EXTENT = Reason("no channels", "", "extent of a kernel")
"""Reason for freezing the spatial axes of a convolution kernel."""
BLOCK_BYTES = Reason("no channels", "", "bytes of a block of numbers")
"""Reason for freezing the axis of block-quantised weights that holds the bytes of one block."""
ANGLES = Reason("no channels", "", "angles of positions in a table")
"""Reason for freezing axes of tables of cosines and sines, which are computed, not trained."""
TABLE_ROWS = Reason("no channels", "", "rows of a table that is looked up by index")
"""Reason for freezing the first axis of an embedding table."""
_NO_ACTIVATIONS = "sums over this axis of weights, through which no activation runs"
"""Reason for freezing the summed axes of a product of constants: masking needs an activation to act on."""
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
"""Element types (`onnx.TensorProto`) of trained weights that are not quantised."""
EVERY_AXIS = -1
"""Value of `Recorder.kernels` that stands for all axes of a weight."""
DROP = "drop"
"""Result of a `Rewrite` that removes the attribute."""
Rewrite: TypeAlias = Callable[[KeepMask, Any], Any]
"""A function from the surviving indices and the value in the original file to the value in the pruned file."""


@dataclass(eq=False)
class Tensor:
    """An input or output of a node, with one atom per index of each axis.

    Attributes:
        value: Inferred shape and elements of the tensor.
        axes: Atoms of each axis; None where the shape is unknown, so that no channel can be followed through it.
        elements: Tensors of a sequence; None for a tensor, and for a sequence whose elements are unknown.

    """

    value: Value
    axes: list[Axis] | None
    elements: list[Tensor] | None = None

    @property
    def shape(self) -> Shape:
        """Sizes of the axes under the first binding of the open sizes."""
        return (
            tuple(map(len, self.axes)) if self.value.shape is None and self.axes is not None else self.value.shape or ()
        )

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def all_axes(self) -> list[Axis]:
        """Atoms of each axis, or of each axis of the elements of a sequence."""
        return [*(self.axes or []), *(axis for each in self.elements or [] for axis in each.axes or [])]

    @property
    def is_constant(self) -> bool:
        """Whether the tensor is computed from weights alone."""
        return self.value.constants is not None

    def __getitem__(self, axis: int) -> Axis:
        """Atoms of one axis; negative numbers count from the end."""
        assert self.axes is not None
        return self.axes[axis]


@dataclass(frozen=True, eq=False)
class SizeUse:
    """An operand or attribute of a node that names sizes of axes that may shrink, or positions on them.

    Attributes:
        scope: Graph that holds the node.
        node: Position of the node in the scope.
        slot: Input slot, or name of the attribute.
        axes: Axes whose surviving indices determine the value; with `per_element`, one axis per element.
        rewrite: Function from the original value (None where the node lacks the operand or attribute) to the value in
            the pruned file; it returns None for no change and `DROP` to remove the attribute.
        per_element: Whether the operand is a list of sizes, one for each of `axes`. An element that differs from the
            size of its axis has another meaning (-1, 0 to copy, 1 to broadcast) and is not changed.

    """

    scope: Scope
    node: int
    slot: int | str
    axes: tuple[Axis, ...]
    rewrite: Rewrite
    per_element: bool = False


@dataclass(frozen=True, eq=False)
class Cost:
    """Multiply-accumulates of a node: `factor` times the product of the sizes of `axes`.

    Attributes:
        scope: Graph that holds the node.
        node: Position of the node in the scope.
        factor: Multiply-accumulates for each combination of indices of `axes`.
        axes: Axes that the cost is proportional to.

    """

    scope: Scope
    node: int
    factor: float
    axes: tuple[Axis, ...]


@dataclass(frozen=True, eq=False)
class Quantized:
    """Dequantisation of an integer weight: (weight - zero_point) * scale.

    Attributes:
        scale: Scale, a single number or one per index of `axis`; None for one.
        zero_point: Zero point, likewise; None for zero.
        axis: Axis of the weight that scale and zero point belong to.
        block: Number of consecutive indices of `axis` that share a scale and a zero point; 0 without blocks.

    """

    scale: Value | None
    zero_point: Value | None
    axis: int
    block: int = 0

    def aligned(self, numbers: Array, shape: Shape) -> Array:
        """Return scales or zero points in a shape that broadcasts against a weight of the given shape."""
        if numbers.size == 1:
            return numbers.reshape(())
        if self.block:
            return np.take(numbers, np.arange(shape[self.axis]) // self.block, axis=self.axis)
        if numbers.ndim == 2 and len(shape) == 3:  # recurrent weights, per direction and gate
            return numbers[:, None]
        if numbers.ndim > 1:
            return numbers
        axis = self.axis if numbers.size == shape[self.axis] else 0
        return numbers.reshape([-1 if i == axis else 1 for i in range(len(shape))])

    def fits(self, shape: Shape) -> bool:
        """Return whether scale and zero point broadcast against a weight of the given shape."""
        for value in (self.scale, self.zero_point):
            if value is not None and value.shape is not None:
                try:
                    numbers = self.aligned(np.broadcast_to(np.int8(0), value.shape), shape)
                    if np.broadcast_shapes(numbers.shape, shape) != shape:
                        return False
                except (IndexError, ValueError):
                    return False
        return True


@dataclass(frozen=True, eq=False)
class Factor:
    """One factor of a sum of products.

    Attributes:
        value: The tensor that is multiplied.
        axis: Axis of the tensor that is summed over.
        atoms: Atoms of this axis at the node that sums.

    """

    value: Value
    axis: int
    atoms: Axis


@dataclass(frozen=True, eq=False)
class Remainder:
    """What is left of a node's output where no index of the axis that it sums over survives: a constant.

    Attributes:
        summed: Atoms of the axis that is summed over.
        slot: Input that is added to the sum; None for none.
        axis: Axis of the output that this input lies along; None if it broadcasts from the right.
        factor: Number that this input is multiplied by.
        is_local: Whether the output at a place depends on the input at this place alone, on all its channels.

    """

    summed: Axis
    slot: int | None
    axis: int | None
    factor: float
    is_local: bool


@dataclass(eq=False)
class Recorder:
    """What the rules record about a model, apart from the atoms.

    Attributes:
        size_uses: Operands and attributes that name sizes of axes, or positions on them.
        costs: Multiply-accumulates of each node.
        labels: Axes with the kind of their channels, for reports.
        kernels: Names of weights that are factors of a sum of products, with the axes that are summed over
            (`EVERY_AXIS` for a weight that is transposed or reshaped before): zeros there mask a channel.
        masked_slots: Nodes, as (scope path, position), that multiply two activations and sum, with the (slot, axis)
            pairs whose zeros mask a channel.
        products: Factors of each sum of products, without factors internal to a node. Factors are matched index by
            index along the summed axis; the weight of a grouped convolution has fewer indices there, and one block on
            its first axis for each group.
        quantized: Dequantisation of each integer weight.
        scales: Scale vectors of batch normalisations.
        count_dependent: Nodes, as (scope path, position), whose result changes when indices with value zero are removed
            (a mean, a variance, a maximum).
        remainders: What is left of the output of nodes, as (scope path, position), that sum over an axis.
        positions: Tensors that hold positions on an axis, as (scope, name, axis, image): `image` is the tensor whose
            flattened images are counted through, None where positions are on the axis alone.
        is_rounding: Whether some node rounds activations to integers internally.
        by_group: Grouped convolutions, as (scope path, position), each of whose groups loses channels of its own; in
            the others all groups lose the same ones.
        grouped: The others, with the axes of their input and output channels and the number of groups.
        balanced: Axes that consist of a number of equal blocks, each of which must lose the same number of indices,
            with the name of the node that divides them.
        divided: Weights whose rows are divided into equal blocks with columns of their own: the atoms of the columns
            of each block, by `rows_and_columns` of the weight. The axis of the columns has those of the first block.
        returned: Weights without a use that a subgraph returns, with the graph that holds each.

    """

    size_uses: list[SizeUse] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    labels: list[tuple[Axis, str]] = field(default_factory=list)
    kernels: dict[str, set[int]] = field(default_factory=dict)
    masked_slots: dict[tuple[str, int], set[tuple[int, int]]] = field(default_factory=dict)
    products: list[tuple[Factor, ...]] = field(default_factory=list)
    quantized: dict[Value, Quantized] = field(default_factory=dict)
    scales: set[Value] = field(default_factory=set)
    count_dependent: set[tuple[str, int]] = field(default_factory=set)
    remainders: dict[tuple[str, int], Remainder] = field(default_factory=dict)
    positions: list[tuple[Scope, str, Axis, Value | None]] = field(default_factory=list)
    is_rounding: bool = False
    by_group: frozenset[tuple[str, int]] = frozenset()
    grouped: dict[tuple[str, int], tuple[Axis, Axis, int]] = field(default_factory=dict)
    balanced: list[tuple[Axis, int, str]] = field(default_factory=list)
    divided: dict[tuple[Fingerprint, Fingerprint], tuple[Axis, ...]] = field(default_factory=dict)
    returned: list[tuple[Scope, Tensor]] = field(default_factory=list)

    @cached_property
    def size_slots(self) -> set[tuple[str, int, int]]:
        """The input slots of all size uses, as `Use.key`; complete only after the sweep."""
        return {(d.scope.path, d.node, d.slot) for d in self.size_uses if isinstance(d.slot, int)}


def rows_and_columns(axes: Sequence[Axis]) -> tuple[Fingerprint, Fingerprint]:
    """Return the key of a weight in `Recorder.divided`: the first two of its axes."""
    return fingerprint(axes[0]), fingerprint(axes[1])


_RENAMED = {
    "demand": "use_size",
    "demand_sizes": "use_shape",
    "hold": "freeze_operands",
    "silence": "mask_input",
    "touched": "accounted",
}
"""Names of `Op` in the version before: the old name -> the new one."""


def _name_of(node: NodeProto) -> str:
    return f"{node.op_type} {node.name or (node.output[0] if node.output else '')!r}"


def _unknown_before(scope: Scope, position: int, slot: int | None) -> tuple[Scope, int] | None:
    """Return the node that makes an input, of unknown shape, of a node: that at a slot, or any; None without one.

    What the bodies of the node read from outside counts as its inputs.
    """
    node = scope.nodes[position]
    captured = sorted(all_inputs(node) - set(node.input))
    for name in [*node.input, *captured] if slot is None else node.input[slot : slot + 1]:
        value = scope.lookup(name) if name else None
        if value is None or value.shapes is not None:
            continue
        for here in scope.outwards():
            if name in here.producers:
                return here, here.producers[name]
    return None


def _has_size_of_data(value: Value | None) -> bool:
    """Return whether a size is a multiple of those that stand for what data decide."""
    if value is None or value.shapes is None or value.extents is None:
        return False
    return any(map(is_decided_by_data, zip(*value.shapes, strict=True)))


def _symbols(value: Value | None) -> frozenset[str]:
    """Return the symbols in the sizes and the elements of a tensor."""
    if value is None:
        return frozenset()
    parts = [*(value.sizes or ()), *(() if value.expressions is None else value.expressions.ravel().tolist())]
    return frozenset[str]().union(*(part.symbols for part in parts if isinstance(part, Size)))


@dataclass(eq=False)
class Op:
    """One node of the graph, with the methods that a rule reads it and records its axes by.

    Attributes:
        scope: Graph that holds the node.
        position: Position of the node in the scope.
        call: Attributes and opset of the node.
        inputs: Input tensors; None for an omitted input.
        outputs: Output tensors, whose axes the rule sets.
        atoms: Atoms of the model.
        recorder: Everything else that the rules record.
        accounted: Axes that the rule has united, frozen, summed over or dropped on purpose. An axis of an input that is
            neither here nor carried on to an output is an error of the rule.

    """

    scope: Scope
    position: int
    call: Call
    inputs: list[Tensor | None]
    outputs: list[Tensor]
    atoms: Atoms
    recorder: Recorder
    accounted: list[Axis] = field(default_factory=list)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return what a renamed method or attribute is called now, with a DeprecationWarning."""
            if name not in _RENAMED:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            text = f"Op.{name} is now Op.{_RENAMED[name]}; the old name no longer works in version {GONE_IN}"
            warnings.warn(text, DeprecationWarning, stacklevel=2)
            return getattr(self, _RENAMED[name])

    @property
    def name(self) -> str:
        """Operator type and node name, as reasons give them."""
        return _name_of(self.scope.nodes[self.position])

    @property
    def opset(self) -> int:
        """Opset version of the default domain."""
        return self.call.opset

    def get(self, attribute: str, default: Any = None) -> Any:
        """Return an attribute, or the default; raises GiveUp for an axis that no tensor has."""
        value = self.call.get(attribute, default)
        if attribute == "axis" and isinstance(value, int) and abs(value) > _MOST_AXES:
            raise GiveUp(f"{self.name} has axis {value}, which is out of range")
        return value

    def given(self, slot: int) -> Tensor | None:
        """Return an input; None if the node omits it, or for slot -1 (the operator has no such input)."""
        return self.inputs[slot] if 0 <= slot < len(self.inputs) else None

    def has(self, slot: int) -> bool:
        """Return whether the node has an input at a slot."""
        return self.given(slot) is not None

    def value(self, slot: int) -> Value | None:
        """Return the inferred shape and elements of an input; None if the node omits it."""
        tensor = self.given(slot)
        return None if tensor is None else tensor.value

    def input(self, slot: int) -> Tensor:
        """Return an input; raises GiveUp if the node omits it or its shape is unknown."""
        tensor = self.given(slot)
        if tensor is None:
            raise GiveUp(f"{self.name} has no input {slot}")
        if tensor.axes is None:
            raise self.unknown_shape(slot)
        return tensor

    def unknown_shape(self, slot: int | None = None) -> GiveUp:
        """Return the exception for an unknown shape, of an input or of the output: where the first one on the way is.

        It names the open sizes that the shape was computed from.
        """
        scope, position = self.scope, self.position
        seen = set[tuple[str, int]]()
        while (before := _unknown_before(scope, position, slot)) is not None:
            (scope, position), slot = before, None
            if (scope.path, position) in seen:  # a damaged file may go round in circles
                break
            seen.add((scope.path, position))
        node = scope.nodes[position]
        symbols = frozenset[str]().union(*map(_symbols, map(scope.lookup, filter(None, node.input))))
        what = "the output shape" if slot is None else f"the shape of input {slot}"
        if any(_has_size_of_data(scope.lookup(name)) for name in node.input if name):
            return GiveUp(f"{what} of {_name_of(node)} is not known, since it depends on the data")
        condition = scope.lookup(node.input[0]) if traits_of(node).branches and node.input else None
        if condition is not None and condition.from_shape:
            why = "since sizes of the inputs decide which branch runs: give --input-shape"
            return GiveUp(f"{what} of {_name_of(node)} is not known, {why}")
        if not symbols or node.domain not in (*DEFAULT_DOMAINS, MICROSOFT):
            return GiveUp(f"{what} of {_name_of(node)} is not known")
        assumed = f"{'sizes' if len(symbols) > 1 else 'size'} assumed for {' and '.join(sorted(symbols))}"
        return GiveUp(f"{what} of {_name_of(node)} is not known at the {assumed}: give --input-shape")

    def axes(self, slot: int) -> list[Axis]:
        """Return the axes of an input; an empty list if the node omits it."""
        return (self.input(slot).axes or []) if self.has(slot) else []

    def elements(self, slot: int) -> list[Tensor]:
        """Return the tensors of a sequence; raises GiveUp if they, or their number, are unknown."""
        tensor = self.given(slot)
        if tensor is None or tensor.elements is None:
            raise GiveUp(f"the elements of input {slot} of {self.name} are not known")
        return tensor.elements

    def expected_elements(self) -> tuple[Value, ...]:
        """Return the inferred elements of the sequence that the node makes; raises GiveUp if they are unknown."""
        elements = self.outputs[0].value.elements
        if elements is None:
            raise GiveUp(f"the elements that {self.name} makes are not known")
        return elements

    def set_elements(self, elements: Sequence[Tensor]) -> None:
        """Set the tensors of the sequence that the node makes; raises GiveUp if other shapes were inferred."""
        expected = [value.shape for value in self.expected_elements()]
        if [tuple(map(len, tensor.axes or [])) for tensor in elements] != expected:
            raise GiveUp(f"{self.name} makes other elements than its rule expects")
        self.outputs[0].elements = list(elements)

    def operand(self, slot: int) -> Array | None:
        """Return the elements of an operand such as a shape, and freeze its axes; None if the node omits it.

        Raises GiveUp if the elements are computed from data.
        """
        tensor = self.given(slot)
        if tensor is None:
            return None
        if tensor.value.value is None:
            raise GiveUp(f"input {slot} of {self.name} is computed from data")
        self.freeze_all(tensor.axes or [], "takes this as an operand")
        if tensor.value.from_shape:
            self.use_size(slot, [], lambda keep, old: old)
        return tensor.value.value

    def static_operand(self, slot: int) -> Array | None:
        """Return what `operand` does; raises GiveUp if the elements depend on the sizes of the inputs."""
        array, value = self.operand(slot), self.value(slot)
        if value is not None and not value.is_static:
            raise GiveUp(f"input {slot} of {self.name} depends on the size of the input")
        return array

    def freeze_operands(self, first: int) -> None:
        """Freeze all axes of the inputs from slot `first` on, which are operands (shapes, bounds, pads), not data."""
        for tensor in self.inputs[first:]:
            self.freeze_all((tensor and tensor.axes) or [], "takes this as an operand")

    def set(self, axes: Sequence[Axis], output: int = 0) -> None:
        """Set the axes of an output; nothing happens for an output that the node omits.

        Raises GiveUp if their sizes are not those of the inferred shape.
        """
        if output >= len(self.outputs) or not self.outputs[output].value.name:
            return
        tensor = self.outputs[output]
        shape = tensor.value.shape
        if shape is not None and tuple(len(a) for a in axes) != shape:
            raise GiveUp(f"{self.name} has an output of shape {list(shape)}, its rule expects {[len(a) for a in axes]}")
        for axis in axes:
            if len(axis) == 1:
                self.freeze(axis, "leaves one index of this axis")
        tensor.axes = list(axes)

    def unite(self, left: Axis, right: Axis) -> None:
        """Couple two axes index by index; raises GiveUp if their sizes differ."""
        if len(left) != len(right):
            raise GiveUp(self._misfit(left, right))
        self.atoms.unite(left, right)
        self.accounted += [left, right]

    def meets_size_of_data(self, axes: Sequence[Axis], size: int | None) -> Axis | None:
        """Freeze axes of which one has a size that data decide, and return one of the size that it has to be.

        None if all have the same size already, or none of these is decided by data.
        """
        given = (tensor.value for tensor in self.inputs if tensor is not None)
        if size is None or len({*map(len, axes)}) < 2 or not any(map(_has_size_of_data, given)):
            return None
        self.freeze_all(axes, "joins an axis whose size depends on the data")
        return next((axis for axis in axes if len(axis) == size), None)

    def _misfit(self, left: Axis, right: Axis) -> str:
        """Return why two axes cannot be coupled: a size was assumed, depends on the data, or differs."""
        given = [tensor for tensor in self.inputs if tensor is not None and tensor.axes is not None]
        here = [
            (tensor.value.sizes or ())[place]
            for tensor in given
            for place, axis in enumerate(tensor.axes or ())
            if (axis is left or axis is right) and place < len(tensor.value.sizes or ())
        ]
        sizes = [size for size in here if isinstance(size, Size)]
        if any(_has_size_of_data(tensor.value) for tensor in given):
            return f"{self.name} joins an axis whose size depends on the data"
        if names := sorted(frozenset[str]().union(*(size.symbols for size in sizes))):
            return f"{self.name} does not fit the size assumed for {' and '.join(names)}: give --input-shape"
        if sizes or any(tensor.value.has_placeholder for tensor in given):
            return f"{self.name} joins an axis whose size depends on the data"
        return f"{self.name} joins axes of {len(left)} and {len(right)} indices"

    def freeze(self, axis: Axis, why: str) -> None:
        """Freeze an axis; `why` is a `Reason`, or completes the sentence "<operator> …"."""
        if not self.atoms.all_frozen(axis):
            self.atoms.freeze(axis, why if isinstance(why, Reason) else Reason("operator", self.name, why))
        self.accounted.append(axis)

    def freeze_all(self, axes: Iterable[Axis], why: str) -> None:
        """Freeze several axes for the same reason."""
        for axis in axes:
            self.freeze(axis, why)

    def frozen(self, count: int, why: str = "makes this axis") -> Axis:
        """Return a new frozen axis of `count` indices; `why` is as in `freeze`."""
        return self.atoms.frozen(count, why if isinstance(why, Reason) else Reason("operator", self.name, why))

    def unmerge(self, flat: Axis, sizes: Sequence[int]) -> list[Axis]:
        """Split a merged axis into axes of the given sizes, and return them.

        A part takes the atoms that vary along it alone; parts along which the atoms vary together get fresh atoms,
        whose product is united with the merged axis.
        """
        self.accounted.append(flat)
        if math.prod(sizes) != len(flat):
            raise GiveUp(f"{self.name} divides an axis of {len(flat)} into {list(sizes)}")
        wide = [k for k, size in enumerate(sizes) if size != 1]
        parts = [uniform(NOTHING, size) for size in sizes]
        if len(wide) == 1:
            parts[wide[0]] = flat
            return parts
        if is_uniform(flat):
            self.freeze(flat, f"splits an axis that {WHOLE}")
            return [self.atoms.stretched(flat, size) if k in wide else parts[k] for k, size in enumerate(sizes)]
        fate, table = self.atoms.canonical(flat).reshape(sizes), flat.reshape(sizes)
        varying = [k for k in wide if bool((np.diff(fate, axis=k) != 0).any())]
        if not varying:
            self.freeze(flat, f"splits an axis that {WHOLE}")
        if len(varying) > 1 and self._is_joined(table, varying[0]):
            return self._tied(table, varying[0])
        for k in wide:
            index: list[Any] = [0] * len(sizes)
            index[k] = slice(None)
            parts[k] = table[tuple(index)] if k in varying or not varying else parts[k]
        if len(varying) > 1:
            for k in varying:
                parts[k] = self.atoms.fresh(sizes[k])
            self.unite(self.atoms.product(*(parts[k] for k in wide)), flat)
        return parts

    def _is_joined(self, table: Axis, axis: int) -> bool:
        """Return whether the blocks along an axis are concatenated tensors, none of which can be removed as a whole."""
        origins = np.moveaxis(self.atoms.origin(table.ravel()).reshape(table.shape), axis, 0).reshape(
            table.shape[axis], -1
        )
        uniform = bool((origins == origins[:, :1]).all())
        return uniform and len(set(origins[:, 0].tolist())) == len(origins)

    def _tied(self, table: Axis, axis: int) -> list[Axis]:
        """Unite the blocks along an axis index by index, and return the axes of the split."""
        blocks = np.moveaxis(table, axis, 0).reshape(table.shape[axis], -1)
        for block in blocks[1:]:
            self.unite(blocks[0], block)
        rest = [size for k, size in enumerate(table.shape) if k != axis]
        parts = self.unmerge(blocks[0], rest)
        parts.insert(axis, np.zeros(table.shape[axis], np.int64))
        return parts

    def balance(self, axis: Axis, blocks: int) -> None:
        """Require that each of that many equal blocks of an axis loses the same number of indices."""
        self.recorder.balanced.append((axis, blocks, self.name))
        self.accounted.append(axis)

    def divide(self, weight: Tensor, blocks: Sequence[Axis]) -> None:
        """Give the columns (axis 1) of each of several equal blocks of rows of a weight atoms of their own.

        The weight must be used by this node alone, see `stored_alone`.
        """
        self.unite(weight[1], blocks[0])
        self.recorder.divided[rows_and_columns(weight.axes or [])] = tuple(blocks)
        self.accounted += blocks

    def stored_alone(self, slot: int) -> bool:
        """Return whether an input is a stored weight that nothing else uses, as it is or quantised along its rows."""
        scope, name = self.scope, self.scope.nodes[self.position].input[slot]
        while True:
            value = scope.values.get(name)
            if value is None or scope.function or name in scope.outputs or len(scope.consumers.get(name, ())) != 1:
                return False
            if value.weight is not None:
                return True
            node = scope.nodes[scope.producers[name]] if name in scope.producers else None
            if node is None or not traits_of(node).is_quantizer or not self._is_along_rows(node):
                return False
            name = node.input[0]

    def _is_along_rows(self, node: NodeProto) -> bool:
        """Return whether a node quantises or dequantises by one scale for all, or for each row."""
        given, scale = attributes_of(node), self.scope.lookup(node.input[1]) if len(node.input) > 1 else None
        if scale is None or scale.shape is None or given.get("block_size", 0):
            return False
        return math.prod(scale.shape) == 1 or (len(scale.shape) == 1 and given.get("axis", 1) == 0)

    def along(self, axis: Axis, size: int, why: str) -> Axis:
        """Freeze an axis, and return a frozen axis of another size with the same reason."""
        self.freeze(axis, why)
        return self.atoms.stretched(axis, size) if len(axis) else self.frozen(size, why)

    def sizes(self, output: int = 0) -> Shape:
        """Return the shape of an output; raises GiveUp if it is unknown."""
        shape = self.outputs[output].value.shape
        if shape is None:
            raise self.unknown_shape()
        return shape

    def positions(self, axis: Axis, output: int = 0, within: Value | None = None) -> None:
        """Record that an output holds positions on an axis, or in the flattened images of `within`."""
        self.recorder.positions.append((self.scope, self.outputs[output].value.name, axis, within))

    def contract(self, a: Tensor, i: int, b: Tensor, j: int) -> None:
        """Unite axis i of `a` with axis j of `b`, and record that their product is summed over them."""
        self.unite(a[i], b[j])
        self.multiply_and_sum((a, i), (b, j))

    @property
    def is_weight_arithmetic(self) -> bool:
        """Whether all inputs of the node are constants."""
        given = [tensor for tensor in self.inputs if tensor is not None]
        return bool(given) and all(tensor.is_constant for tensor in given)

    def multiply_and_sum(self, *factors: tuple[Tensor, int]) -> None:
        """Record a sum of products over one axis of each factor; zeros in a weight among them mask a channel."""
        if self.is_weight_arithmetic:
            for tensor, place in factors:
                self.freeze(tensor[place], _NO_ACTIVATIONS)
            return
        self.product(*factors)
        weights = [(tensor, place) for tensor, place in factors if tensor.value.moved]
        for tensor, place in weights:
            along = EVERY_AXIS if tensor.value.weight is None else place % tensor.rank
            for name in tensor.value.constants or ():
                self.recorder.kernels.setdefault(name, set()).add(along)
        if not weights:
            self.mask_input(*factors[0])

    def leaves(
        self, summed: Axis, slot: int | None, axis: int | None = None, *, factor: float = 1.0, is_local: bool
    ) -> None:
        """Record that without any index of an axis the output is an input alone, or zero; see `Remainder`."""
        slot = slot if slot is not None and self.has(slot) else None
        self.recorder.remainders[(self.scope.path, self.position)] = Remainder(summed, slot, axis, factor, is_local)

    def product(self, *factors: tuple[Tensor, int]) -> None:
        """Record the factors of a sum of products, as (tensor, axis), for scores and repair."""
        found = (Factor(tensor.value, place % tensor.rank, tensor[place]) for tensor, place in factors)
        self.recorder.products.append(tuple(found))

    def mask_input(self, tensor: Tensor, place: int) -> None:
        """Record that zeros along an axis of an input mask a channel: the input is multiplied by others and summed."""
        axis = tensor[place]
        self.accounted.append(axis)
        if tensor.value.dtype not in FLOATS:
            self.reduce(axis)
        elif self.scope.function:
            self.freeze(axis, "sums over this axis in a function that several nodes may call")
        elif not self.atoms.all_frozen(axis):
            slot = [own and own.value for own in self.inputs].index(tensor.value)
            masked_slots = self.recorder.masked_slots.setdefault((self.scope.path, self.position), set())
            masked_slots.add((slot, place % tensor.rank))

    def reduce(self, axis: Axis) -> None:
        """Record that the result depends on how many indices the axis has, as a mean or a variance does.

        The mask check then computes the node on the surviving indices alone.
        """
        self.accounted.append(axis)
        if self.atoms.all_frozen(axis):
            return
        if self.is_weight_arithmetic:
            self.freeze(axis, _NO_ACTIVATIONS)
            return
        if self.scope.function:
            self.freeze(axis, "reduces over this axis in a function that several nodes may call")
        self.recorder.count_dependent.add((self.scope.path, self.position))

    def label(self, axis: Axis, kind: str) -> None:
        """Record the kind of the channels on an axis, such as "heads", for reports."""
        self.recorder.labels.append((axis, kind))

    def cost(self, factor: float, *axes: Axis) -> None:
        """Record multiply-accumulates of the node: `factor` times the product of the sizes of the axes."""
        self.recorder.costs.append(Cost(self.scope, self.position, factor, axes))

    def use_size(self, slot: int | str, axes: Sequence[Axis], rewrite: Rewrite) -> None:
        """Record that an operand (by slot) or attribute (by name) depends on which indices of the axes survive."""
        self.recorder.size_uses.append(SizeUse(self.scope, self.position, slot, tuple(axes), rewrite))

    def use_shape(self, slot: int, axes: Sequence[Axis]) -> None:
        """Record that an operand is a shape: a list of sizes, one for each of `axes`.

        An element that is not the size of its axis has another meaning (-1, 0 to copy, 1 to broadcast).
        """
        self.recorder.size_uses.append(SizeUse(self.scope, self.position, slot, tuple(axes), resized(axes), True))

    def attribute_size(self, name: str, axis: Axis) -> None:
        """Record that an attribute is the size of an axis."""
        self.use_size(name, [axis], lambda keep, old: keep.count(axis))

    def pin_attribute(self, name: str, value: Any, axis: Axis) -> None:
        """Record that an attribute, derived from the size of `axis` by default, is set to `value` once it shrinks."""
        self.use_size(name, [axis], lambda keep, old: value if keep.count(axis) != len(axis) else None)


def resized(axes: Sequence[Axis]) -> Rewrite:
    """Return the rewrite of a shape: elements that are the size of their axis become its new size."""

    def rewrite(keep: KeepMask, old: Array) -> Array:
        pairs = zip(axes, old.ravel().tolist(), strict=True)
        sizes = [keep.count(axis) if size == len(axis) else size for axis, size in pairs]
        return np.asarray(sizes, old.dtype).reshape(old.shape)

    return rewrite


Rule: TypeAlias = Callable[[Op], None]
"""A function that records how channels flow through one node."""
RULES: dict[tuple[str, str], Rule] = {}
"""The rule of each operator by (domain, operator type); the default domain is the empty string."""


def rule(*names: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Return a decorator that registers a function as the rule of one or more operators.

    Raises AssertionError if an operator has a rule already.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            assert (domain, name) not in RULES, f"{domain}::{name} has a rule already"
            RULES[(domain, name)] = function
        return function

    return register


def positions_after(mask: npt.NDArray[np.bool_], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the new position of each old one after the indices outside of `mask` are removed.

    A position may be `len(mask)`, the end of a range.
    """
    before = np.concatenate([[0], np.cumsum(mask)])
    return np.asarray(before[positions])
