"""Quantised operators as what they compute on real numbers: where their integers, scales and zero points are.

A quantised tensor stands for (integer - zero point) * scale. Linear operators on integers are registered in
`matrix_view` like those on floats; this module says at which slots their operands and levels are, and how weights of
fewer than eight bits are packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from onnx import NodeProto, TensorProto, helper

from cpd_onnx.ir.model import Array, attributes_of
from cpd_onnx.ops.traits import MICROSOFT, traits_of

LIMITS: dict[int, tuple[int, int]] = {
    TensorProto.INT8: (-128, 127), TensorProto.UINT8: (0, 255), TensorProto.INT16: (-32768, 32767),
    TensorProto.UINT16: (0, 65535), TensorProto.INT4: (-8, 7), TensorProto.UINT4: (0, 15),
    TensorProto.INT32: (-(1 << 31), (1 << 31) - 1),
}  # fmt: skip  # a table
"""Smallest and largest value of each integer type (`onnx.TensorProto`) that real numbers are quantised to."""
Slots: TypeAlias = tuple[int, int]
"""Input slots of a scale and its zero point; -1 for none."""
_NONE: Slots = (-1, -1)
Constants: TypeAlias = "Callable[[str], Array | None]"
"""A function that returns the values of a constant by name; None if the tensor is not constant."""


@dataclass(frozen=True)
class Level:
    """One scale and zero point for all elements of a quantised tensor.

    Attributes:
        scale: Difference of the real numbers that two consecutive integers stand for.
        zero_point: Integer that stands for zero.
        data_type: Type of the integers (`onnx.TensorProto`).
    """

    scale: float
    zero_point: float
    data_type: int

    @property
    def noise(self) -> float:
        """Root mean square of the rounding."""
        return self.scale / math.sqrt(12)

    @property
    def limits(self) -> tuple[float, float] | None:
        """Smallest and largest real number that the integers stand for; None for other types."""
        if self.data_type not in LIMITS or not self.scale > 0:
            return None
        low, high = LIMITS[self.data_type]
        return (low - self.zero_point) * self.scale, (high - self.zero_point) * self.scale

    def real(self, array: Array) -> Array:
        """Return the real numbers that integers stand for, as float32."""
        return (np.asarray(array, np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)


def level_of(node: NodeProto, slots: Slots, constants: Constants) -> Level | None:
    """Return the level at some slots of a node; None if it is not constant, or not the same for all elements."""
    names = [node.input[slot] if 0 <= slot < len(node.input) else "" for slot in slots]
    scale, zero = (constants(name) if name else None for name in names)
    if scale is None or scale.size != 1 or (names[1] and (zero is None or zero.size != 1)):
        return None
    kind = attributes_of(node).get("output_dtype", 0) or TensorProto.UINT8
    kind = kind if zero is None else helper.np_dtype_to_tensor_dtype(zero.dtype)
    return Level(float(scale.item()), 0.0 if zero is None else float(zero.item()), kind)


def quantised_type(node: NodeProto, constants: Constants) -> int:
    """Return the type of the integers that a node quantises to (`onnx.TensorProto`); 0 if it is not known."""
    zero = constants(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if zero is not None:
        return int(helper.np_dtype_to_tensor_dtype(zero.dtype))
    if len(node.input) > 2 and node.input[2]:
        return 0
    return int(attributes_of(node).get("output_dtype", 0) or TensorProto.UINT8)


@dataclass(frozen=True)
class Operands:
    """Input slots of a linear operator.

    Attributes:
        data, weight, bias: The operands; -1 without a bias.
        data_level, weight_level, out_level: Scales and zero points of data, weight and output. The bias of an operator
            with such levels is int32, with the product of the scales of data and weight as its scale, unless the
            operator has a float output.
        is_float_bias: Whether the bias is a float.
        is_unscaled: Whether the output is the sum of products of integers, which the graph scales afterwards.
        is_packed: Whether several numbers of the weight share a byte, or blocks of it have an axis, see `packing_of`.
    """

    data: int = 0
    weight: int = 1
    bias: int = -1
    data_level: Slots = _NONE
    weight_level: Slots = _NONE
    out_level: Slots = _NONE
    is_float_bias: bool = True
    is_unscaled: bool = False
    is_packed: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is an integer."""
        return self.weight_level != _NONE


_STATIC = {"data_level": (1, 2), "weight": 3, "weight_level": (4, 5), "is_float_bias": False}
QLINEAR_CONV = Operands(bias=8, out_level=(6, 7), **_STATIC)  # type: ignore[arg-type]  # values of several types
QGEMM = Operands(bias=6, out_level=(7, 8), **_STATIC)  # type: ignore[arg-type]
QLINEAR_MATMUL = Operands(out_level=(6, 7), **_STATIC)  # type: ignore[arg-type]
INTEGER_PRODUCT = Operands(data_level=(-1, 2), weight_level=(-1, 3), is_unscaled=True)
DYNAMIC_MATMUL = Operands(bias=4, weight_level=(2, 3))
MATMUL_TO_FLOAT = Operands(bias=6, data_level=(2, 4), weight_level=(3, 5))
MATMUL_N_BITS = Operands(bias=5, weight_level=(2, 3), is_packed=True)
"""Operands of the families of quantised linear operators."""


@dataclass(frozen=True)
class Binary:
    """An elementwise operator on two quantised tensors: each with a scale and a zero point, and so is the output.

    Attributes:
        is_sum: Whether it adds; otherwise it multiplies.
        operands: Slots of the operands.
        levels: Their scales and zero points.
        out_level: Scale and zero point of the output.
    """

    is_sum: bool
    operands: tuple[int, int] = (0, 3)
    levels: tuple[Slots, Slots] = ((1, 2), (4, 5))
    out_level: Slots = (6, 7)


_BINARY = {(MICROSOFT, "QLinearAdd"): Binary(is_sum=True), (MICROSOFT, "QLinearMul"): Binary(is_sum=False)}


def binary_of(node: NodeProto) -> Binary | None:
    """Return a sum or product of two tensors; None for other operators.

    That of two floats is one without levels, and is returned for sums only.
    """
    found = _BINARY.get((node.domain, node.op_type))
    if found is None and traits_of(node).is_sum:
        return Binary(is_sum=True, operands=(0, 1), levels=(_NONE, _NONE), out_level=_NONE)
    return found


def is_dynamic_quantizer(node: NodeProto) -> bool:
    """Whether a node quantises its input with the scale (output 1) and zero point (output 2) that its values need."""
    return node.op_type == "DynamicQuantizeLinear"


@dataclass(frozen=True)
class Packing:
    """A matrix [rows, columns] in blocks of rows, column by column, with several numbers in a byte, the lowest first.

    Attributes:
        bits: Bits of a number.
        block: Rows of a block, which share a scale and a zero point.
        rows: Number of rows; the last block may have more.
        columns: Number of columns.
    """

    bits: int
    block: int
    rows: int
    columns: int

    @property
    def blocks(self) -> int:
        """Number of blocks of a column."""
        return -(-self.rows // self.block)

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest number."""
        return 0, (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """Zero point where none is given."""
        return 1 << (self.bits - 1)

    @property
    def cells(self) -> Array:
        """Number of the block of each element [rows, columns]."""
        rows = np.arange(self.rows) // self.block
        return np.asarray(rows[:, None] + np.arange(self.columns) * self.blocks)

    def unpacked(self, stored: Array) -> Array:
        """Return the matrix."""
        numbers = unpack(stored.reshape(-1), self.bits).reshape(self.columns, -1)
        return numbers[:, : self.rows].T

    def packed(self, matrix: Array, stored: Array) -> Array:
        """Return a matrix in the shape of `stored`, which also fills the rest of the last block."""
        numbers = unpack(stored.reshape(-1), self.bits).reshape(self.columns, -1).copy()
        numbers[:, : self.rows] = matrix.T
        return pack(numbers.reshape(-1), self.bits).reshape(stored.shape)

    def zero_points(self, stored: Array) -> Array:
        """Return the zero point of each block; whole bytes are stored for each column."""
        if stored.dtype != np.uint8:
            return stored.reshape(-1)
        numbers = unpack(stored.reshape(-1), self.bits).reshape(self.columns, -1)
        return numbers[:, : self.blocks].reshape(-1)


def packing_of(node: NodeProto) -> Packing | None:
    """Return how a node's weight is packed; None if it is not, or in another order than by blocks of its rows."""
    given, is_reordered = attributes_of(node), len(node.input) > 4 and bool(node.input[4])
    if node.op_type != "MatMulNBits" or given.get("bits", 4) not in (2, 4, 8):
        return None
    if is_reordered or given.get("weight_prepacked", 0):
        return None
    return Packing(given.get("bits", 4), given["block_size"], given["K"], given["N"])


def unpack(stored: Array, bits: int) -> Array:
    """Return the numbers of a list of bytes, the lowest bits first.

    >>> unpack(np.array([0x21, 0x43], np.uint8), 4).tolist()
    [1, 2, 3, 4]
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.asarray((stored[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1)


def pack(numbers: Array, bits: int) -> Array:
    """Return numbers as a list of bytes: the inverse of `unpack`."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = numbers.astype(np.uint8).reshape(-1, len(shifts)) << shifts
    return np.asarray(np.bitwise_or.reduce(parts, axis=1), np.uint8)
