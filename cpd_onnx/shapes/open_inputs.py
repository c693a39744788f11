"""The inputs of a model: symbols for their open sizes, and the numbers that these are bound to."""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from onnx import TensorShapeProto, ValueInfoProto

from cpd_onnx.ir.model import Model
from cpd_onnx.ops.sizes import Bindings, Extent, symbol
from cpd_onnx.shapes.checks import sane
from cpd_onnx.shapes.values import BINDINGS, COMPUTABLE_TYPES, Numbers, Shape, Value, always

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip  # a table
Kind: TypeAlias = "tuple[Numbers, ...]"
"""What symbols of one kind are bound to: a row for the first symbol, one for the second and so on."""


@dataclass(frozen=True)
class Profile:
    """Numbers for batch, sequence-like, image-like dimensions and samples of sound; last rows serve all that follow."""

    batch: Kind
    sequence: Kind
    image: Kind
    sound: Kind = ((1792, 2816, 3328),)

    @cached_property
    def frames(self) -> Kind:
        """What the second and third axes of three are bound to: frames of sound, points, tokens."""
        return tuple(tuple(8 * number for number in row) for row in self.sequence)


_BATCHES = ((2, 5, 7),)  # symbols of their own, but models that have several seldom run on different ones
_SEQUENCES = ((14, 22, 5), (15, 26, 6), (13, 21, 4), (17, 19, 3))
_IMAGES = ((64, 160, 32), (96, 224, 64))
PROFILES = (
    Profile(_BATCHES, _SEQUENCES, ((64, 161, 35), (96, 227, 67))),
    Profile(_BATCHES, _SEQUENCES, _IMAGES),
    # Differently named symbols that must be equal, images that must be square.
    Profile(_BATCHES, _SEQUENCES[:1], _IMAGES[:1]),
    Profile(_BATCHES, ((64, 96, 80),), ((224, 256, 320), (256, 320, 224))),
    Profile(_BATCHES, ((64, 96, 80),), ((224, 256, 320),)),
    Profile(_BATCHES, ((512, 768, 640),), ((512, 640, 768),)),
    Profile(_BATCHES, ((16000, 24000, 20000),), ((299, 331, 363),), ((16000, 24000, 20000),)),
    # Detectors of speech take chunks of one size only.
    Profile(_BATCHES, _SEQUENCES[:1], _IMAGES[:1], ((512, 512, 512),)),
    Profile(_BATCHES, _SEQUENCES[:1], _IMAGES[:1], ((576, 576, 576),)),
)
"""Ways to bind symbols, of which the first that leaves no shape unknown is taken; many models want images whose sides
are multiples of 32."""


def real_inputs(model: Model) -> list[ValueInfoProto]:
    """The inputs of a model that are not initializers too."""
    return [info for info in model.graph.input if not model.has(info.name)]


def has_open_inputs(model: Model) -> bool:
    """Whether some input has an axis whose size the file does not say."""
    return any(dim.dim_value <= 0 for info in real_inputs(model) for dim in info.type.tensor_type.shape.dim)


@dataclass
class OpenInputs:
    """Values for the inputs of a model, by one profile.

    Attributes:
        profile: what symbols are bound to.
        shapes: shapes of inputs by name, which take the place of those in the file.
        numbers: what symbols are bound to first, by name; they stay symbols.
        bindings: the record of what each symbol is bound to.

    """

    profile: Profile
    shapes: Mapping[str, Shape]
    numbers: Mapping[str, int]
    bindings: Bindings
    _symbols: dict[str, Extent] = field(default_factory=dict)
    _counts: Counter[Kind] = field(default_factory=Counter)

    def value(self, info: ValueInfoProto) -> Value:
        """An input as it is known before any node ran."""
        kind = info.type.tensor_type
        if not info.type.HasField("tensor_type") or not kind.HasField("shape"):
            return Value(info.name, kind.elem_type)
        if info.name in self.shapes:
            return Value(info.name, kind.elem_type, always(self.shapes[info.name]))
        dims = list(kind.shape.dim)
        # Recurrent states are (layers, batch, hidden).
        is_state = [dim.dim_value > 0 for dim in dims] == [True, False, True]
        sizes = tuple(self._size(info, dim, axis, 0 if is_state else axis) for axis, dim in enumerate(dims))
        numbers = (tuple(int(self.bindings.at(size, binding) or 0) for size in sizes) for binding in BINDINGS)
        value = Value(info.name, kind.elem_type, tuple(map(sane, numbers)))
        value.set_sizes(sizes)
        return value

    def _size(self, info: ValueInfoProto, dim: TensorShapeProto.Dimension, axis: int, seeming: int) -> Extent:
        """The size of an axis, which seems to be of the kind of another."""
        if dim.dim_value > 0:
            return int(dim.dim_value)
        name = dim.dim_param or f"{info.name}[{axis}]"
        kind = self._kind(0 if "batch" in name else seeming, info)
        if name not in self._symbols:
            found = self._expression(name, self.profile.sequence if "sequence" in name else kind)
            if found is not None:
                return found
        return self._symbol(name, kind)

    def _symbol(self, name: str, kind: Kind) -> Extent:
        """A symbol and what it is bound to; a number where the profile knows but one."""
        if name not in self._symbols:
            row = kind[min(self._counts[kind], len(kind) - 1)]
            self._counts[kind] += 1
            first = self.numbers.get(name, row[0])
            is_number = len(set(row)) == 1
            self._symbols[name] = row[0] if is_number else self.bindings.bind(symbol(name), (first, *row[1:]))
        return self._symbols[name]

    def _kind(self, axis: int, info: ValueInfoProto) -> Kind:
        """What a symbol may be bound to."""
        kind, profile = info.type.tensor_type, self.profile
        if axis == 0:
            return profile.batch
        rank = len(kind.shape.dim)
        if kind.elem_type not in COMPUTABLE_TYPES or rank < 2:
            return profile.sequence
        return {2: profile.sound, 3: profile.frames}.get(rank, profile.image)

    def _expression(self, name: str, kind: Kind) -> Extent | None:
        """A size that is computed from other symbols, as exporters write ("past + 1", "8*height")."""
        if name == "total_sequence_length":
            name = "past_sequence_length + sequence_length"
        try:
            tree = ast.parse(name.strip(), mode="eval").body
            return None if isinstance(tree, ast.Name) else self._parsed(tree, kind)
        except (SyntaxError, ValueError, RecursionError, MemoryError, ZeroDivisionError):
            return None  # a name like any other

    def _parsed(self, tree: ast.expr, kind: Kind) -> Any:
        """What an expression of symbols comes to; ValueError where it has other parts than exporters write."""
        if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
            return tree.value
        if isinstance(tree, ast.Name):
            return self._symbol(tree.id, kind)
        if not isinstance(tree, ast.BinOp) or type(tree.op) not in _ARITHMETIC:
            raise ValueError
        factor = tree.left.value if isinstance(tree.left, ast.Constant) else 1
        if isinstance(tree.op, ast.Mult) and isinstance(factor, int) and factor > 1:  # the product is of the usual size
            kind = tuple(tuple(max(1, number // factor) for number in row) for row in kind)
        return _ARITHMETIC[type(tree.op)](self._parsed(tree.left, kind), self._parsed(tree.right, kind))
