"""What a rule sees and may do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from cpd_onnx.algebra.atoms import NOTHING, Atoms, Axis, Mask, is_uniform, uniform
from cpd_onnx.algebra.reasons import Reason
from cpd_onnx.ir.model import Array
from cpd_onnx.ops.evaluate import Call
from cpd_onnx.shapes.values import Scope, Shape, Value

_MOST_AXES = 1 << 10


class GiveUp(Exception):
    """A rule cannot follow the channels here: all axes of the node are frozen, with this reason."""


class Keep(Protocol):
    """Which indices of an axis stay, once it is decided which channels go."""

    def mask(self, axis: Axis) -> Mask:
        """True where the index stays."""

    def count(self, axis: Axis) -> int:
        """Indices that stay."""


KERNEL_EXTENT = Reason("no channels", "", "extent of a kernel")
"""Reason of the axes of a kernel that slide."""
BLOCK_BYTES = Reason("no channels", "", "bytes of a block of numbers")
"""Reason of the axis of packed weights that holds the numbers of one block."""
TABLE_ROWS = Reason("no channels", "", "rows of a table that is looked up by index")
"""Reason of the first axis of an embedding."""
_NO_ACTIVATIONS = "sums over this axis of weights, through which no activation runs"
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
"""Element types of trained weights."""
EVERY_AXIS = -1
"""Stands for all axes of a weight."""
DROP = "drop"
"""What a rewrite answers to take an attribute away."""
Rewrite: TypeAlias = Callable[[Keep, Any], Any]
"""From what stays and the value in the file to the value in the pruned file."""


@dataclass(eq=False)
class Tensor:
    """An input or output of a node: its value as folded, and one atom per index of each axis.

    `axes` is None where the shape is unknown; nothing can be followed through such a tensor.
    """

    value: Value
    axes: list[Axis] | None

    @property
    def shape(self) -> Shape:
        """Sizes under the first binding."""
        return (
            tuple(map(len, self.axes)) if self.value.shape is None and self.axes is not None else self.value.shape or ()
        )

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def is_constant(self) -> bool:
        """Whether it is computed from weights alone."""
        return self.value.constants is not None

    def __getitem__(self, axis: int) -> Axis:
        """Atoms of one axis; negative numbers count from the end."""
        assert self.axes is not None
        return self.axes[axis]


@dataclass(frozen=True, eq=False)
class Demand:
    """A node's operand or attribute that names sizes of, or positions on, axes that may shrink.

    Attributes:
        scope: where the node is.
        node: its position in the scope.
        slot: input slot, or attribute name.
        axes: what it depends on; for operands with `per_element`, one axis per element.
        rewrite: gives the value in the pruned file from the one in the file, which is None where the node has no
            such operand or attribute. It answers None to leave things as they are and DROP to take them away.
        per_element: whether the operand is a list of sizes, one for each of `axes`. An element that differs from
            its axis' size means something else (-1, 0 to copy, 1 to broadcast) and stays.

    """

    scope: Scope
    node: int
    slot: int | str
    axes: tuple[Axis, ...]
    rewrite: Rewrite
    per_element: bool = False


@dataclass(frozen=True, eq=False)
class Cost:
    """Multiply-accumulates of a node: `factor` times the product of the sizes of `axes`."""

    scope: Scope
    node: int
    factor: float
    axes: tuple[Axis, ...]


@dataclass(frozen=True, eq=False)
class Quantized:
    """What an integer weight stands for: (weight - zero_point) * scale, both per index of `axis` or single numbers.

    None stands for a scale of one and a zero point of zero. Where `block` is not 0, there is one number for each so
    many indices of `axis`, for all indices of the other axes.
    """

    scale: Value | None
    zero_point: Value | None
    axis: int
    block: int = 0

    def aligned(self, numbers: Array, shape: Shape) -> Array:
        """Scales or zero points so that they broadcast against a weight of a shape."""
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
        """Whether there is a number for each element of a weight of a shape."""
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
    """What a node multiplies and sums over: a tensor, the axis of the sum, and its atoms as the node sees them."""

    value: Value
    axis: int
    atoms: Axis


@dataclass(eq=False)
class Recorder:
    """What the rules of a whole model leave behind, beside the atoms.

    Attributes:
        demands: operands and attributes that depend on what is pruned.
        costs: multiply-accumulates.
        labels: kinds of channels.
        kernels: weights that multiply and are summed over, and along which of their axes (`EVERY_AXIS` where they
            are moved about before): where they are zero, nothing passes.
        silenced: for nodes that multiply two activations and sum, the (slot, axis) whose zeros let nothing pass.
        products: for each sum of products its factors, without those that never leave their node. Index meets index
            along the axis of the sum; a weight that works in groups has fewer of them there, and as many blocks on its
            first axis as there are groups.
        quantized: integer weights by their value.
        scales: the values that batch normalisations multiply channels with.
        sensitive: nodes whose result depends on which indices are there, beyond what zeros would add.
        positions: values that count along an axis, and what they are positions in, if not just in that axis.
        is_rounding: whether some node rounds activations to integers inside.

    """

    demands: list[Demand] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    labels: list[tuple[Axis, str]] = field(default_factory=list)
    kernels: dict[str, set[int]] = field(default_factory=dict)
    silenced: dict[tuple[str, int], set[tuple[int, int]]] = field(default_factory=dict)
    products: list[tuple[Factor, ...]] = field(default_factory=list)
    quantized: dict[Value, Quantized] = field(default_factory=dict)
    scales: set[Value] = field(default_factory=set)
    sensitive: set[tuple[str, int]] = field(default_factory=set)
    positions: list[tuple[Scope, str, Axis, Value | None]] = field(default_factory=list)
    is_rounding: bool = False

    @cached_property
    def demanded(self) -> set[tuple[str, int, int]]:
        """The input slots among the demands, as `Use.key` has them; to be asked for when all nodes have been seen."""
        return {(d.scope.path, d.node, d.slot) for d in self.demands if isinstance(d.slot, int)}


@dataclass(eq=False)
class Op:
    """One node as its rule sees it."""

    scope: Scope
    position: int
    call: Call
    inputs: list[Tensor | None]
    outputs: list[Tensor]
    atoms: Atoms
    recorder: Recorder
    touched: list[Axis] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Operator and node name, for reasons."""
        node = self.scope.nodes[self.position]
        return f"{node.op_type} {node.name or (node.output[0] if node.output else '')!r}"

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return self.call.opset

    def get(self, attribute: str, default: Any = None) -> Any:
        """Attribute value or the default; gives up on an axis that no tensor has, which some kernels wrap around."""
        value = self.call.get(attribute, default)
        if attribute == "axis" and isinstance(value, int) and abs(value) > _MOST_AXES:
            raise GiveUp(f"{self.name} goes along axis {value}")
        return value

    def given(self, slot: int) -> Tensor | None:
        """An input, None if the node does not have it; -1 stands for an input that the operator does not know."""
        return self.inputs[slot] if 0 <= slot < len(self.inputs) else None

    def has(self, slot: int) -> bool:
        """Whether the input is there."""
        return self.given(slot) is not None

    def value(self, slot: int) -> Value | None:
        """What is known of the elements of an input; None if it is not there."""
        tensor = self.given(slot)
        return None if tensor is None else tensor.value

    def input(self, slot: int) -> Tensor:
        """An input that the rule cannot do without."""
        tensor = self.given(slot)
        if tensor is None:
            raise GiveUp(f"{self.name} lacks input {slot}")
        if tensor.axes is None:
            raise GiveUp(f"the shape of input {slot} of {self.name} is not known")
        return tensor

    def axes(self, slot: int) -> list[Axis]:
        """The axes of an input; none if it is not there."""
        return (self.input(slot).axes or []) if self.has(slot) else []

    def operand(self, slot: int) -> Array | None:
        """Elements of an operand such as a shape, or None if absent.

        Raises GiveUp if they are there but depend on data.
        """
        tensor = self.given(slot)
        if tensor is None:
            return None
        if tensor.value.value is None:
            raise GiveUp(f"input {slot} of {self.name} is computed from data")
        self.freeze_all(tensor.axes or [], "takes this as an operand")
        if tensor.value.from_shape:
            self.demand(slot, [], lambda keep, old: old)
        return tensor.value.value

    def static_operand(self, slot: int) -> Array | None:
        """As `operand`, but the elements must not depend on the sizes of the inputs."""
        array, value = self.operand(slot), self.value(slot)
        if value is not None and not value.is_static:
            raise GiveUp(f"input {slot} of {self.name} depends on the size of the input")
        return array

    def hold(self, first: int) -> None:
        """Freeze all axes of the inputs from `first` on: they are operands, not data."""
        for tensor in self.inputs[first:]:
            self.freeze_all((tensor and tensor.axes) or [], "takes this as an operand")

    def set(self, axes: Sequence[Axis], output: int = 0) -> None:
        """Say what atoms an output has; an output that the node does not name is skipped."""
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
        """Give two axes the same fate; both count as accounted for."""
        if len(left) != len(right):
            raise GiveUp(f"{self.name} joins axes of {len(left)} and {len(right)} indices")
        self.atoms.unite(left, right)
        self.touched += [left, right]

    def freeze(self, axis: Axis, why: str) -> None:
        """Never delete any index of the axis; `why` is a reason, or completes the sentence '<operator> …'."""
        if not self.atoms.all_frozen(axis):
            self.atoms.freeze(axis, why if isinstance(why, Reason) else Reason("operator", self.name, why))
        self.touched.append(axis)

    def freeze_all(self, axes: Iterable[Axis], why: str) -> None:
        """The same for several axes."""
        for axis in axes:
            self.freeze(axis, why)

    def frozen(self, count: int, why: str = "makes this axis") -> Axis:
        """Atoms of an axis that is never pruned."""
        return self.atoms.frozen(count, Reason("operator", self.name, why))

    def unmerge(self, flat: Axis, sizes: Sequence[int]) -> list[Axis]:
        """Split a merged axis: each part takes what varies along it alone; parts that vary together get fresh atoms."""
        self.touched.append(flat)
        if math.prod(sizes) != len(flat):
            raise GiveUp(f"{self.name} divides an axis of {len(flat)} into {list(sizes)}")
        wide = [k for k, size in enumerate(sizes) if size != 1]
        parts = [uniform(NOTHING, size) for size in sizes]
        if len(wide) == 1:
            parts[wide[0]] = flat
            return parts
        if is_uniform(flat):
            self.freeze(flat, "splits an axis that can only go as a whole")
            return [self.atoms.stretched(flat, size) if k in wide else parts[k] for k, size in enumerate(sizes)]
        fate, table = self.atoms.canonical(flat).reshape(sizes), flat.reshape(sizes)
        varying = [k for k in wide if bool((np.diff(fate, axis=k) != 0).any())]
        if not varying:
            self.freeze(flat, "splits an axis that can only go as a whole")
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
        """Whether the blocks along an axis are tensors that were joined: none of them can go as a whole."""
        origins = np.moveaxis(self.atoms.origin(table.ravel()).reshape(table.shape), axis, 0).reshape(
            table.shape[axis], -1
        )
        uniform = bool((origins == origins[:, :1]).all())
        return uniform and len(set(origins[:, 0].tolist())) == len(origins)

    def _tied(self, table: Axis, axis: int) -> list[Axis]:
        """Parts of an axis whose blocks share one fate index by index."""
        blocks = np.moveaxis(table, axis, 0).reshape(table.shape[axis], -1)
        for block in blocks[1:]:
            self.unite(blocks[0], block)
        rest = [size for k, size in enumerate(table.shape) if k != axis]
        parts = self.unmerge(blocks[0], rest)
        parts.insert(axis, np.zeros(table.shape[axis], np.int64))
        return parts

    def along(self, axis: Axis, size: int, why: str) -> Axis:
        """Freeze an axis and give its atoms, with their reason, to an axis of another size."""
        self.freeze(axis, why)
        return self.atoms.stretched(axis, size) if len(axis) else self.frozen(size, why)

    def sizes(self, output: int = 0) -> Shape:
        """Shape of an output; raises GiveUp if it is not known."""
        shape = self.outputs[output].value.shape
        if shape is None:
            raise GiveUp(f"the output shape of {self.name} is not known")
        return shape

    def positions(self, axis: Axis, output: int = 0, within: Value | None = None) -> None:
        """The values of an output count along an axis, `within` some images: they are others once it shrinks."""
        self.recorder.positions.append((self.scope, self.outputs[output].value.name, axis, within))

    def contract(self, a: Tensor, i: int, b: Tensor, j: int) -> None:
        """Sum over axis i of `a` and axis j of `b`."""
        self.unite(a[i], b[j])
        self.multiply_and_sum((a, i), (b, j))

    @property
    def is_weight_arithmetic(self) -> bool:
        """Whether no activation enters."""
        given = [tensor for tensor in self.inputs if tensor is not None]
        return bool(given) and all(tensor.is_constant for tensor in given)

    def multiply_and_sum(self, *factors: tuple[Tensor, int]) -> None:
        """Sum a product over one axis of each input in it: where a weight among them is zero, nothing passes."""
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
            self.silence(*factors[0])

    def product(self, *factors: tuple[Tensor, int]) -> None:
        """Put on record that inputs are multiplied with one another and summed over one axis of each."""
        found = (Factor(tensor.value, place % tensor.rank, tensor[place]) for tensor, place in factors)
        self.recorder.products.append(tuple(found))

    def silence(self, tensor: Tensor, place: int) -> None:
        """An input is multiplied by others and summed over an axis: where it is zero there, nothing passes."""
        axis = tensor[place]
        self.touched.append(axis)
        if tensor.value.dtype not in FLOATS:
            self.reduce(axis)
        elif self.scope.function:
            self.freeze(axis, "sums over this axis in a function that several nodes may call")
        elif not self.atoms.all_frozen(axis):
            slot = [own and own.value for own in self.inputs].index(tensor.value)
            silenced = self.recorder.silenced.setdefault((self.scope.path, self.position), set())
            silenced.add((slot, place % tensor.rank))

    def reduce(self, axis: Axis) -> None:
        """The result depends on which indices of the axis are there, beyond what zeros would add."""
        self.touched.append(axis)
        if self.atoms.all_frozen(axis):
            return
        if self.is_weight_arithmetic:
            self.freeze(axis, _NO_ACTIVATIONS)
            return
        if self.scope.function:
            self.freeze(axis, "reduces over this axis in a function that several nodes may call")
        self.recorder.sensitive.add((self.scope.path, self.position))

    def label(self, axis: Axis, kind: str) -> None:
        """Name the kind of channel, for reports."""
        self.recorder.labels.append((axis, kind))

    def cost(self, factor: float, *axes: Axis) -> None:
        """Multiply-accumulates: `factor` times the sizes of the axes."""
        self.recorder.costs.append(Cost(self.scope, self.position, factor, axes))

    def demand(self, slot: int | str, axes: Sequence[Axis], rewrite: Rewrite) -> None:
        """An operand or attribute depends on which indices of the axes stay."""
        self.recorder.demands.append(Demand(self.scope, self.position, slot, tuple(axes), rewrite))

    def demand_sizes(self, slot: int, axes: Sequence[Axis]) -> None:
        """An operand lists sizes, one for each of `axes`; elements that are not the size mean something else."""
        self.recorder.demands.append(Demand(self.scope, self.position, slot, tuple(axes), resized(axes), True))

    def attribute_size(self, name: str, axis: Axis) -> None:
        """An attribute is the size of an axis."""
        self.demand(name, [axis], lambda keep, old: keep.count(axis))

    def pin_attribute(self, name: str, value: Any, axis: Axis) -> None:
        """Once `axis` shrinks, an attribute that was derived from its size must be written down."""
        self.demand(name, [axis], lambda keep, old: value if keep.count(axis) != len(axis) else None)


def resized(axes: Sequence[Axis]) -> Rewrite:
    """Rewrite of a list of sizes: those that were their axis' size become its new size."""

    def rewrite(keep: Keep, old: Array) -> Array:
        pairs = zip(axes, old.ravel().tolist(), strict=True)
        sizes = [keep.count(axis) if size == len(axis) else size for axis, size in pairs]
        return np.asarray(sizes, old.dtype).reshape(old.shape)

    return rewrite


Rule: TypeAlias = Callable[[Op], None]
RULES: dict[tuple[str, str], Rule] = {}


def rule(*names: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Register the rule of one or more operators; registering one twice is an error."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert (domain, name) not in RULES, f"{domain}::{name} has a rule already"
            RULES[(domain, name)] = function
        return function

    return register


def positions_after(mask: npt.NDArray[np.bool_], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """New index of each old one when those not in `mask` are deleted; old ones may be len(mask) (an end)."""
    before = np.concatenate([[0], np.cumsum(mask)])
    return np.asarray(before[positions])
