"""Data model of shape inference: values (tensors), the scopes (graphs) that contain them, and the result."""

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
from cpd_onnx.ops.sizes import Expressions, Extents, Size, is_constant

Shape: TypeAlias = tuple[int, ...]
"""The sizes of the axes of a tensor."""
Place: TypeAlias = "tuple[str, str, int]"
"""Axis of a tensor: path of its scope, its name, and the number of the axis."""
Numbers: TypeAlias = "tuple[int, ...]"
"""The numbers to which a symbol is bound, one for each binding."""
PLACEHOLDER_SIZES = (37, 41, 43)
"""Sizes of data-dependent dimensions (NonZero, TopK of a computed k) under each binding. Heuristic: any primes do."""
BINDINGS = range(len(PLACEHOLDER_SIZES))
"""Indices of the bindings: inference runs once with each number of every symbol."""


def is_decided_by_data(numbers: Numbers) -> bool:
    """Return whether a size, under each binding, is a multiple of those that stand for what data decide."""
    return bool(numbers[0]) and not any(n % size for n, size in zip(numbers, PLACEHOLDER_SIZES, strict=True))


COMPUTABLE_TYPES = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16}
"""Float element types in which weights and activations are computed."""
T = TypeVar("T")


class Role(IntEnum):
    """Relation of an element of shape arithmetic to its source; from `ELEMENT` on, the source is a constant."""

    UNKNOWN = 0
    """The source is unknown."""
    SIZES = 1
    """The element is the product of the sizes of some axes."""
    ELEMENT = 2
    """The element is an element of the constant."""
    FACTOR = 3
    """The element is the constant times a number that depends on the inputs."""
    DIVISOR = 4
    """The element is a number that depends on the inputs, divided by the constant."""


@dataclass(frozen=True)
class Origin:
    """Provenance of one element of shape arithmetic.

    Attributes:
        role: Relation of the element to its source.
        source: Index of the source in `Folded.uses` for a constant, in `Folded.products` for sizes; -1 if unknown.
        element: Position in the constant, in row-major order.

    """

    role: Role = Role.UNKNOWN
    source: int = -1
    element: int = 0

    @property
    def is_constant(self) -> bool:
        """Whether the source is a constant."""
        return self.role >= Role.ELEMENT


Origins: TypeAlias = npt.NDArray[np.void]
"""An array of `ORIGIN` records, which operators that rearrange elements rearrange like the elements themselves."""
ORIGIN = np.dtype([("role", np.int8), ("source", np.int64), ("element", np.int64)])
"""Structured element type with the fields of `Origin`."""


@dataclass(slots=True, eq=False)
class Value:
    """Inferred properties of one tensor of the graph.

    Attributes:
        name: Name of the tensor.
        dtype: ONNX element type; 0 if unknown or not a tensor.
        shapes: Shape under each binding; None if the rank is unknown.
        extents: Shape as symbolic sizes; None if all sizes are the same for all inputs.
        values: Elements under each binding; None if unknown.
        expressions: Elements as symbolic sizes; None if all are the same for all inputs, or the shape is dynamic.
        origins: Provenance of each element; None if none is known.
        weight: Name of the initializer or Constant output that the tensor is; None for any other tensor.
        constants: Names of the weights from which it is computed; None if it depends on the inputs.
        moved: Whether its elements are those of `constants`, only rearranged, so that zeros remain zeros.
        from_shape: Whether its elements depend on the shape of a tensor.
        has_placeholder: Whether a placeholder stands for the size of a data-dependent dimension.
        source: Storage of a weight: its TensorProto, or the attribute of its Constant node; None for other tensors.
        elements: Tensors of a sequence; None for a tensor, and for a sequence whose elements are unknown.

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
    has_placeholder: bool = False
    source: TensorProto | onnx.AttributeProto | None = None
    elements: tuple[Value, ...] | None = None
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
        """Whether the elements are known as functions of the input sizes."""
        return self.expressions is not None or (self.values is not None and len(set(self.shapes or ())) > 1)

    @property
    def entries(self) -> Array | Expressions | None:
        """Elements: numbers if they are the same for all inputs, else symbolic sizes; None if unknown."""
        return self.expressions if self.is_open else self.value

    @property
    def is_static(self) -> bool:
        """Whether the elements are known and the same for all input sizes."""
        return self.values is not None and not self.is_open

    @property
    def sizes(self) -> Extents | None:
        """Shape: a number for each axis of fixed size, a symbolic size for the others; None if the rank is unknown."""
        return self.extents if self.extents is not None or self.shapes is None else self.shapes[0]

    @property
    def holds_sizes(self) -> bool:
        """Whether it may be an operand that gives a dynamic size, count or position: a scalar or vector of sizes."""
        return self.expressions is not None and self.expressions.ndim < 2

    def each_origin(self) -> list[Origin]:
        """Return the origin of each element, in row-major order."""
        if self.origins is None:
            return [Origin()] * (1 if self.value is None else max(1, self.value.size))
        return [Origin(Role(role), source, element) for role, source, element in self.origins.ravel().tolist()]

    def set_sizes(self, sizes: Extents) -> None:
        """Set the symbolic sizes of the axes; without effect if all are numbers, which `shapes` has already."""
        if not all(map(is_constant, sizes)):
            self.extents = sizes

    def has_fixed(self, axis: int) -> bool:
        """Whether an axis has the same size for all inputs."""
        return self.shapes is not None and (self.extents is None or is_constant(self.extents[axis]))

    @property
    def depends_on_values(self) -> bool:
        """Whether the size of an axis may depend on values, not only on the sizes of the inputs."""
        if self.shapes is None or self.has_placeholder:
            return True
        if self.extents is None:
            return len(set(self.shapes)) > 1
        return any(isinstance(extent, Size) and extent.has_unknowns for extent in self.extents)

    @property
    def is_generated_weight(self) -> bool:
        """Whether it is a float tensor that nodes generate from constants alone (ConstantOfShape)."""
        return self.constants is not None and self.weight is None and self.dtype in COMPUTABLE_TYPES

    def type(self, binding: int) -> TypeProto:
        """Return the type under a binding, for shape inference by onnx."""
        if self._types is None:
            shapes = self.shapes or (None,) * len(BINDINGS)
            self._types = [_type_proto(self.dtype, shape) for shape in shapes]
        return self._types[binding]


@dataclass(eq=False)
class Scope:
    """The values of one graph, subgraph or function call.

    Attributes:
        path: Path from the main graph, such as "" or "/If_3.then_branch".
        nodes: Nodes in topological order.
        values: Values defined in the scope, by name.
        outputs: Names of the outputs.
        parent: Enclosing scope; None for the main graph and for functions.
        bodies: Scopes inside a node, by its position and the attribute name ("body" for a function call).
        function: Whether this is the body of a model-local function, or inside one.
        inputs: Names of the inputs.
        order: Position in the file of each node.
        address: (position in the file, attribute name) of the nodes that lead here from the main graph.
        opset: Version of the default operator set of the nodes.

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
        """Return the value of a name in this scope or the nearest enclosing one; None if there is none."""
        return next((scope.values[name] for scope in self.outwards() if name in scope.values), None)

    @cached_property
    def consumers(self) -> dict[str, list[Use]]:
        """Input slots that consume each name, in this graph and its subgraphs."""
        found: dict[str, list[Use]] = {}
        for scope in self.walk():
            for position, node in enumerate(scope.nodes):
                for slot, name in enumerate(node.input):
                    found.setdefault(name, []).append(Use(scope, position, slot))
        return found

    @cached_property
    def producers(self) -> dict[str, int]:
        """Position of the node of this graph that produces each name."""
        return {name: position for position, node in enumerate(self.nodes) for name in node.output}

    def outwards(self) -> Iterator[Scope]:
        """Yield this scope and its enclosing scopes, innermost first."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent

    def walk(self) -> Iterator[Scope]:
        """Yield this scope and all scopes inside it, depth first."""
        yield self
        for bodies in self.bodies.values():
            for body in bodies.values():
                yield from body.walk()


@dataclass(frozen=True, eq=False)
class Use:
    """One input slot of one node.

    Attributes:
        scope: Scope of the node.
        node: Position of the node in the scope.
        slot: Index of the input.

    """

    scope: Scope
    node: int
    slot: int

    @property
    def key(self) -> tuple[str, int, int]:
        """Unique, sortable key of the slot."""
        return (self.scope.path, self.node, self.slot)


@dataclass(frozen=True)
class Evaluated:
    """A model whose weight arithmetic was evaluated.

    Attributes:
        model: Copy of the model with the results as initializers.
        weights: Names of the stored weights from which each result was computed, by the result's name.
        nodes: Removed nodes, which are no longer used: operator and name of each.
        tensors: Names of removed initializers, which are no longer used.

    """

    model: Model
    weights: Mapping[str, tuple[str, ...]]
    nodes: tuple[str, ...]
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Folded:
    """Result of shape inference: a model with the inferred properties of its tensors.

    Attributes:
        model: Model whose weight arithmetic is evaluated.
        scope: Main graph.
        uses: Input slots at which constants enter shape arithmetic.
        products: Sizes that are elements of tensors, each as the (tensor, axis) pairs whose sizes are multiplied.
        unknown: Operators whose output shapes could not be inferred: "domain::op_type" -> name of the first node.
        batch: Size of the leading dynamic dimension under the first binding; 1 if it is fixed.
        evaluated: Evaluated weight arithmetic; None if there was none.
        source: Model as given to `fold`; None if that is `model`.
        input_shapes: Shapes given to `fold`, by input name.
        numbers: Numbers given to `fold` for the first binding of symbols, by name.
        solved: Numbers that the operators require of symbols, by name.
        counts: Numbers that the operators require of sizes that data decide, by the axis of a tensor.
        profile: Number of the profile by which the other symbols are bound, see `open_inputs.SIZE_PROFILES`.
        equal: For some of the `products`, by number, others that have to stay equal to it.
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
    solved: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[Place, int] = field(default_factory=dict)
    profile: int = 0
    equal: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def factors(self, product: int) -> Iterator[tuple[tuple[Value, int], ...]]:
        """Yield the factors of a recorded size, as (tensor, axis), and those of the sizes that have to equal it."""
        for number in (product, *self.equal.get(product, ())):
            yield self.products[number]

    @property
    def original(self) -> Model:
        """Model as given to `fold`."""
        return self.source or self.model

    def __repr__(self) -> str:
        """Return one line that names the model."""
        return f"Folded({self.original!r})"


def for_all_bindings(found: T) -> tuple[T, ...]:
    """Return one entry for each binding, all the same."""
    return (found,) * len(BINDINGS)


def taken_branch(condition: Value | None) -> str | None:
    """Return the attribute name of the branch of an If that always runs; None if it depends on the inputs."""
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
