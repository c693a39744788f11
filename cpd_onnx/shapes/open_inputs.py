"""Inputs of a model: symbols for their open dimensions, and the numbers to which the symbols are bound."""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from onnx import TensorProto, TensorShapeProto, ValueInfoProto

from cpd_onnx.ir.model import Model
from cpd_onnx.ops.sizes import Bindings, Extent, symbol
from cpd_onnx.shapes.checks import credible_shape
from cpd_onnx.shapes.values import BINDINGS, COMPUTABLE_TYPES, Numbers, Shape, Value, for_all_bindings

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip  # a table
"""Functions of the operators that symbolic dimensions may contain ("past + 1")."""
Kind: TypeAlias = "tuple[Numbers, ...]"
"""Numbers for the symbols of one kind of dimension: a row for the first symbol, one for the second and so on; the last
row serves all further symbols. A row has one number for each binding."""


@dataclass(frozen=True)
class SizeProfile:
    """Numbers for the symbols of each kind of dimension.

    Attributes:
        batch: Numbers for axis 0.
        sequence: Numbers for sequence lengths, in tokens.
        image: Numbers for image heights and widths, in pixels.
        sound: Numbers for lengths of audio, in samples.

    """

    batch: Kind
    sequence: Kind
    image: Kind
    sound: Kind = ((1792, 2816, 3328),)

    @cached_property
    def frames(self) -> Kind:
        """Numbers for the second and third axis of three: audio frames, points, tokens; eight times `sequence`."""
        return tuple(tuple(8 * number for number in row) for row in self.sequence)


_BATCHES = ((2, 5, 7),)
"""Batch sizes. Several symbols share them, since models with several batch axes seldom run on different sizes."""
_SEQUENCES = ((14, 22, 5), (15, 26, 6), (13, 21, 4), (17, 19, 3))
"""Sequence lengths, in tokens; short and pairwise different, so that coincidences are unlikely. Heuristic."""
_IMAGES = ((64, 160, 32), (96, 224, 64))
"""Image heights and widths, in pixels: multiples of 32, the total stride of most backbones. Heuristic."""
SIZE_PROFILES = (
    SizeProfile(_BATCHES, _SEQUENCES, ((64, 161, 35), (96, 227, 67))),
    SizeProfile(_BATCHES, _SEQUENCES, _IMAGES),
    # For models whose differently named symbols must be equal, or whose images must be square.
    SizeProfile(_BATCHES, _SEQUENCES[:1], _IMAGES[:1]),
    SizeProfile(_BATCHES, ((64, 96, 80),), ((224, 256, 320), (256, 320, 224))),
    SizeProfile(_BATCHES, ((64, 96, 80),), ((224, 256, 320),)),
    SizeProfile(_BATCHES, ((512, 768, 640),), ((512, 640, 768),)),
    SizeProfile(_BATCHES, ((16000, 24000, 20000),), ((299, 331, 363),), ((16000, 24000, 20000),)),
    # Voice activity detectors take chunks of one fixed size.
    SizeProfile(_BATCHES, _SEQUENCES[:1], _IMAGES[:1], ((512, 512, 512),)),
    SizeProfile(_BATCHES, _SEQUENCES[:1], _IMAGES[:1], ((576, 576, 576),)),
)
"""Profiles in order of preference; the first that leaves fewest operators unknown is used. Heuristic: the sizes that
real models were found to accept; many require images whose sides are multiples of 32."""


def real_inputs(model: Model) -> list[ValueInfoProto]:
    """Return the inputs of a model that are not initializers."""
    return [info for info in model.graph.input if not model.has(info.name)]


def has_open_inputs(model: Model) -> bool:
    """Whether some input has a dimension without a fixed size."""
    return any(dim.dim_value <= 0 for info in real_inputs(model) for dim in info.type.tensor_type.shape.dim)


def given_symbols(model: Model, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Return the numbers of the symbols in inputs whose shapes are given; none for a symbol that is given two."""
    found: dict[str, set[int]] = {}
    for info in real_inputs(model):
        dims, shape = info.type.tensor_type.shape.dim, shapes.get(info.name, ())
        for dim, size in zip(dims, shape, strict=True) if len(dims) == len(shape) else ():
            if dim.dim_param:
                found.setdefault(dim.dim_param, set()).add(size)
    return {name: next(iter(sizes)) for name, sizes in found.items() if len(sizes) == 1}


@dataclass
class OpenInputs:
    """Inferred values of a model's inputs under one profile.

    Attributes:
        profile: Numbers to which symbols are bound.
        shapes: Shapes of inputs by name, which override those of the file.
        numbers: Numbers of symbols under the first binding, by name; the dimensions remain symbolic.
        bindings: Record of the numbers to which each symbol is bound.
        solved: Numbers that the operators require, by the name of the symbol, which they replace.
        given: Numbers of the symbols in `shapes`, by name, which they replace in all inputs.

    """

    profile: SizeProfile
    shapes: Mapping[str, Shape]
    numbers: Mapping[str, int]
    bindings: Bindings
    solved: Mapping[str, int] = field(default_factory=dict)
    given: Mapping[str, int] = field(default_factory=dict)
    _symbols: dict[str, Extent] = field(default_factory=dict)
    _counts: Counter[Kind] = field(default_factory=Counter)

    def value(self, info: ValueInfoProto) -> Value:
        """Return the inferred value of an input: its element type, shape under each binding and symbolic sizes."""
        kind = info.type.tensor_type
        if not info.type.HasField("tensor_type") or not kind.HasField("shape"):
            return Value(info.name, kind.elem_type)
        if info.name in self.shapes:
            return Value(info.name, kind.elem_type, for_all_bindings(self.shapes[info.name]))
        dims = list(kind.shape.dim)
        # Recurrent states are (layers, batch, hidden).
        is_state = [dim.dim_value > 0 for dim in dims] == [True, False, True]
        sizes = tuple(self._size(info, dim, axis, 0 if is_state else axis) for axis, dim in enumerate(dims))
        numbers = (tuple(int(self.bindings.at(size, binding) or 0) for size in sizes) for binding in BINDINGS)
        value = Value(info.name, kind.elem_type, tuple(map(credible_shape, numbers)))
        value.set_sizes(sizes)
        return value

    def _size(self, info: ValueInfoProto, dim: TensorShapeProto.Dimension, axis: int, seeming: int) -> Extent:
        """Return the size of a dimension; `seeming` is the axis by which its kind is chosen."""
        if dim.dim_value > 0:
            return int(dim.dim_value)
        name = dim.dim_param or f"{info.name}[{axis}]"
        kind = self._kind(0 if "batch" in name else seeming, info)
        if kind is self.profile.image and "sequence" in name:  # the cache of a language model
            kind = self.profile.sequence
        if name not in self._symbols and name not in self.given:
            found = self._expression(name, self.profile.sequence if "sequence" in name else kind)
            if found is not None:
                return found
        return self._symbol(name, kind)

    def _symbol(self, name: str, kind: Kind) -> Extent:
        """Return the symbol of a name, bound to numbers; a number if it is solved or the profile has only one."""
        if name in self.given:
            return self.given[name]
        if name in self.solved:
            return self.solved[name]
        if name not in self._symbols:
            row = kind[min(self._counts[kind], len(kind) - 1)]
            self._counts[kind] += 1
            first = self.numbers.get(name, row[0])
            is_number = len(set(row)) == 1
            self._symbols[name] = row[0] if is_number else self.bindings.bind(symbol(name), (first, *row[1:]))
        return self._symbols[name]

    def _kind(self, axis: int, info: ValueInfoProto) -> Kind:
        """Return the numbers for a symbol on an axis of an input."""
        kind, profile = info.type.tensor_type, self.profile
        if axis == 0:
            return profile.batch
        rank = len(kind.shape.dim)
        if kind.elem_type == TensorProto.UINT8 and rank == 4:
            return profile.image
        if kind.elem_type not in COMPUTABLE_TYPES or rank < 2:
            return profile.sequence
        return {2: profile.sound, 3: profile.frames}.get(rank, profile.image)

    def _expression(self, name: str, kind: Kind) -> Extent | None:
        """Return a size computed from other symbols, as exporters write it ("past + 1", "8*height"); None if plain."""
        if name == "total_sequence_length":
            name = "past_sequence_length + sequence_length"
        try:
            tree = ast.parse(name.strip(), mode="eval").body
            return None if isinstance(tree, ast.Name) else self._parsed(tree, kind)
        except (SyntaxError, ValueError, RecursionError, MemoryError, ZeroDivisionError):
            return None  # a name like any other

    def _parsed(self, tree: ast.expr, kind: Kind) -> Any:
        """Return the size of an expression; ValueError if it has parts other than those exporters write."""
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
