"""What is known of the tensors of a model: values, the graphs that hold them, and the result of inference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, TypeProto

from cpd_onnx.ir.model import Array, Model
from cpd_onnx.ops.sizes import Expressions, Extents, is_constant

Shape: TypeAlias = tuple[int, ...]
Numbers: TypeAlias = "tuple[int, ...]"
"""What a symbol is bound to, a number for each binding."""
GUESSES = (37, 41, 43)
"""Sizes for dimensions that depend on data (NonZero, TopK of a computed k): any would do."""
BINDINGS = range(len(GUESSES))
"""Each symbol is bound to so many numbers."""
COMPUTABLE_TYPES = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16}
T = TypeVar("T")


class Role(IntEnum):
    """What an element of shape arithmetic is to its source, from `ELEMENT` on a constant."""

    UNKNOWN = 0
    """It has no source that is known."""
    SIZES = 1
    """It is the product of the sizes."""
    ELEMENT = 2
    """It is an element of the constant."""
    FACTOR = 3
    """It is the constant times something that depends on the inputs."""
    DIVISOR = 4
    """It is something that depends on the inputs, divided by the constant."""


@dataclass(frozen=True)
class Origin:
    """Where one element of shape arithmetic comes from.

    Attributes:
        role: what the element is to its source.
        source: number of the source, in `Folded.uses` for a constant and in `Folded.products` for sizes.
        element: position in the constant.

    """

    role: Role = Role.UNKNOWN
    source: int = -1
    element: int = 0

    @property
    def is_constant(self) -> bool:
        """Whether its source is a constant."""
        return self.role >= Role.ELEMENT


Origins: TypeAlias = npt.NDArray[np.void]
"""An array of the records `ORIGIN`, which operators that only move elements move like the elements themselves."""
ORIGIN = np.dtype([("role", np.int8), ("source", np.int64), ("element", np.int64)])
"""The fields of an `Origin`."""


@dataclass(slots=True, eq=False)
class Value:
    """One tensor of the graph.

    Attributes:
        name: its name.
        dtype: ONNX element type, 0 if unknown or not a tensor.
        shapes: its shape under each of the bindings, None if the rank is unknown.
        extents: the same as expressions, where some are no numbers.
        values: its elements under each of the bindings where they are known.
        expressions: the same as expressions, where some are no numbers and the shape is always the same.
        origins: where each element comes from, None if nothing is known of any.
        weight: name of the initializer or Constant output that it is, if it is one.
        constants: the weights it is computed from, if it depends on nothing else.
        moved: whether it holds the elements of `constants` as they are, moved about: zeros stay zeros.
        from_shape: whether its elements depend on the shape of some tensor.
        guessed: whether some dimension is a stand-in for one that depends on data.
        source: where a weight's data lies: its TensorProto, or the attribute of its Constant node.

    """

    name: str
    dtype: int = 0
    shapes: tuple[Shape, ...] | None = None
    extents: Extents | None = None
    values: tuple[Array, ...] | None = None
    expressions: Expressions | None = None
    origins: Origins | None = None
    weight: str | None = None
    constants: frozenset[str] | None = None
    moved: bool = False
    from_shape: bool = False
    guessed: bool = False
    source: TensorProto | onnx.AttributeProto | None = None
    _types: list[TypeProto] | None = None

    @property
    def shape(self) -> Shape | None:
        """Shape under the first binding."""
        return None if self.shapes is None else self.shapes[0]

    @property
    def value(self) -> Array | None:
        """Elements under the first binding."""
        return None if self.values is None else self.values[0]

    @property
    def is_open(self) -> bool:
        """Whether the elements are known but depend on the sizes of the inputs."""
        return self.expressions is not None or (self.values is not None and len(set(self.shapes or ())) > 1)

    @property
    def entries(self) -> Array | Expressions | None:
        """The elements: numbers where they are the same whatever the inputs, expressions otherwise if there are any."""
        return self.expressions if self.is_open else self.value

    @property
    def is_static(self) -> bool:
        """Whether the elements are known and the same whatever the sizes of the inputs."""
        return self.values is not None and not self.is_open

    @property
    def sizes(self) -> Extents | None:
        """The shape: a number for each axis that is as long whatever the inputs, an expression for the others."""
        return self.extents if self.extents is not None or self.shapes is None else self.shapes[0]

    @property
    def holds_sizes(self) -> bool:
        """Whether an operator may take it for a size, a count or a position that depends on the inputs."""
        return self.expressions is not None and self.expressions.ndim < 2

    def each_origin(self) -> list[Origin]:
        """Where each element comes from, in order."""
        if self.origins is None:
            return [Origin()] * (1 if self.value is None else max(1, self.value.size))
        return [Origin(Role(role), source, element) for role, source, element in self.origins.ravel().tolist()]

    def set_sizes(self, sizes: Extents) -> None:
        """Take down the sizes of the axes; those that are the same whatever the inputs are in `shapes` already."""
        if not all(map(is_constant, sizes)):
            self.extents = sizes

    def has_fixed(self, axis: int) -> bool:
        """Whether an axis is as long whatever the inputs."""
        return self.shapes is not None and (self.extents is None or is_constant(self.extents[axis]))

    @property
    def is_made_weight(self) -> bool:
        """Whether it is float and made of constants by the graph itself, as by ConstantOfShape."""
        return self.constants is not None and self.weight is None and self.dtype in COMPUTABLE_TYPES

    def type(self, binding: int) -> TypeProto:
        """The type under a binding, as shape inference wants it."""
        if self._types is None:
            shapes = self.shapes or (None,) * len(BINDINGS)
            self._types = [_type_proto(self.dtype, shape) for shape in shapes]
        return self._types[binding]


@dataclass(eq=False)
class Scope:
    """The values of one graph, subgraph or function call.

    Attributes:
        path: where it hangs, e.g. "" or "/If_3.then_branch".
        nodes: its nodes in topological order.
        values: the values made in it.
        outputs: names of its outputs.
        parent: the enclosing scope, None for the main graph and for functions.
        bodies: for the node at each position, the scopes inside it by attribute name ("body" for a function call).
        function: whether this is the body of a model-local function (or lies in one).
        order: for each node its position in the file.
        address: (position in the file, attribute name) of the nodes that lead here from the main graph.
        opset: version of the default operator set that its nodes are written in.

    """

    path: str
    nodes: list[NodeProto]
    values: dict[str, Value]
    outputs: list[str]
    parent: Scope | None = None
    bodies: dict[int, dict[str, Scope]] = field(default_factory=dict)
    function: bool = False
    inputs: list[str] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    address: tuple[tuple[int, str], ...] = ()
    opset: int = 0

    def lookup(self, name: str) -> Value | None:
        """The value of that name here or in an enclosing graph."""
        return next((scope.values[name] for scope in self.outwards() if name in scope.values), None)

    @cached_property
    def consumers(self) -> dict[str, list[Use]]:
        """The slots that take each name, in this graph and in all inside it."""
        found: dict[str, list[Use]] = {}
        for scope in self.walk():
            for position, node in enumerate(scope.nodes):
                for slot, name in enumerate(node.input):
                    found.setdefault(name, []).append(Use(scope, position, slot))
        return found

    @cached_property
    def makers(self) -> dict[str, int]:
        """The position of the node of this graph that makes each name."""
        return {name: position for position, node in enumerate(self.nodes) for name in node.output}

    def outwards(self) -> Iterator[Scope]:
        """This scope and those around it."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent

    def walk(self) -> Iterator[Scope]:
        """This scope and all inside it."""
        yield self
        for bodies in self.bodies.values():
            for body in bodies.values():
                yield from body.walk()


@dataclass(frozen=True, eq=False)
class Use:
    """One input slot of one node."""

    scope: Scope
    node: int
    slot: int

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells it from other slots."""
        return (self.scope.path, self.node, self.slot)


@dataclass(frozen=True)
class Evaluated:
    """A model with results of weight arithmetic as initializers.

    Attributes:
        model: a copy of the model.
        weights: for each result, by name, the stored weights that it was computed from.
        nodes: what is gone since nothing uses it any more, operator and name of each.
        tensors: the same of stored tensors.

    """

    model: Model
    weights: Mapping[str, tuple[str, ...]]
    nodes: tuple[str, ...]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Folded:
    """What is known of a model's tensors.

    Attributes:
        model: the model, with weights that the graph computed from others evaluated.
        scope: the main graph.
        uses: slots where constants enter shape arithmetic.
        products: sizes that are elements of tensors, each as the (tensor, axis) whose sizes are multiplied.
        unknown: operators whose output shapes could not be inferred, "domain::op_type" to the first node's name.
        batch: size that the first binding gives to the leading dynamic dimension, 1 if it is fixed.
        evaluated: what was evaluated, None if there was nothing.
        source: the model as it was given, None if that is `model`.
        input_shapes: shapes that `fold` was given, by input name.
        numbers: numbers that `fold` was given for the first binding of symbols, by name.

    """

    model: Model
    scope: Scope
    uses: tuple[Use, ...]
    products: tuple[tuple[tuple[Value, int], ...], ...]
    unknown: Mapping[str, str]
    batch: int
    evaluated: Evaluated | None = None
    source: Model | None = None
    input_shapes: Mapping[str, Shape] = field(default_factory=dict)
    numbers: Mapping[str, int] = field(default_factory=dict)

    @property
    def original(self) -> Model:
        """The model as it was given."""
        return self.source or self.model

    def __repr__(self) -> str:
        """One line, without the values."""
        return f"Folded({self.original!r})"


def always(found: T) -> tuple[T, ...]:
    """What is the same under all bindings."""
    return (found,) * len(BINDINGS)


def taken_branch(condition: Value | None) -> str | None:
    """The branch of an If that runs whatever the inputs, if that is known."""
    if condition is None or not condition.is_static:
        return None
    assert condition.value is not None
    return "then_branch" if bool(condition.value.item()) else "else_branch"


def _type_proto(dtype: int, shape: Shape | None) -> TypeProto:
    proto = TypeProto()
    if not dtype:
        return proto
    proto.tensor_type.elem_type = dtype
    if shape is not None:
        proto.tensor_type.shape.SetInParent()
        for size in shape:
            proto.tensor_type.shape.dim.add().dim_value = size
    return proto
