"""Linear operators (convolutions, matrix products) as one batched matrix product.

    rows [groups, rows, features]  x  matrix [groups, features, outputs]  =  targets [groups, rows, outputs]

A row holds the input features of one position of the output: a pixel, a token. Quantised operators are such products of
the real numbers that their integers stand for. Affine operators, which scale and shift each channel, are described too.
New operators are registered with `@linear` and `@affine`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view
from onnx import NodeProto

from cpd_onnx.ir.model import Array, attributes_of
from cpd_onnx.ops.evaluate import register_in
from cpd_onnx.ops.quantized_view import (
    DYNAMIC_MATMUL,
    INTEGER_PRODUCT,
    MATMUL_N_BITS,
    MATMUL_TO_FLOAT,
    QGEMM,
    QLINEAR_CONV,
    QLINEAR_MATMUL,
    Constants,
    Operands,
    level_of,
)
from cpd_onnx.ops.traits import MICROSOFT

Key: TypeAlias = "tuple[str, str]"
"""Domain ("" for the standard's) and name of an operator."""
Vector: TypeAlias = npt.NDArray[np.float64]
"""One number for each channel, or one for all."""


@dataclass(frozen=True)
class Window:
    """How a linear operator moves along one spatial axis.

    Attributes:
        size: Number of taps.
        stride: Distance of the places of neighbouring outputs.
        dilation: Distance of neighbouring taps.
        pads: Zeros before and after the data; None if their number follows from the size of the data.
        spread: Distance of neighbouring elements of the data, between which there are zeros.
    """

    size: int
    stride: int = 1
    dilation: int = 1
    pads: tuple[int, int] | None = (0, 0)
    spread: int = 1

    @property
    def is_bare(self) -> bool:
        """Whether all taps are on elements of the data, at each place, so that constant data give a constant."""
        return self.pads == (0, 0) and self.spread == 1

    @property
    def is_point(self) -> bool:
        """Whether each output is computed from the element of the data at its own place."""
        return self.size == self.stride == 1 and self.is_bare


class Linear(Protocol):
    """A linear node as a matrix product of real numbers; `Operands` says at which slots these are."""

    @property
    def groups(self) -> int:
        """Number of groups of channels; the matrix of each is apart."""

    @property
    def windows(self) -> tuple[Window, ...]:
        """How it moves along the spatial axes; empty for a matrix product."""

    @property
    def keeps_pads(self) -> bool:
        """Whether the same attributes give the same pads for a larger kernel."""

    @property
    def in_axis(self) -> int:
        """Axis of the data over which the product sums."""

    @property
    def out_axis(self) -> int:
        """Axis of the output that holds the columns of the matrix, group by group."""

    @property
    def weight_axis(self) -> int:
        """Axis of the weight that holds the outputs, those of one group at least."""

    @property
    def taps(self) -> int:
        """Number of features for each index of `in_axis`: the number of kernel positions."""

    @property
    def is_stacked(self) -> bool:
        """Whether all groups take the same channels and return the same ones, as the matrices of a batch do.

        Otherwise each group has channels of its own.
        """

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the leading axes of a weight that is a stack of matrices; empty for others."""

    def count(self, out: Sequence[int]) -> int:
        """Return the number of positions of an output shape: of one sample, or of all for operators without a batch."""

    def rows(self, data: Array, places: Array) -> Array:
        """Return the input features at some positions [groups, rows, features]."""

    def targets(self, out: Array, places: Array) -> Array:
        """Return the output at the same positions [groups, rows, outputs]."""

    def matrix(self, weight: Array) -> Array:
        """Return a weight as a matrix [groups, features, outputs]."""

    def weight(self, matrix: Array) -> Array:
        """Return a matrix as a weight: the inverse of `matrix`."""

    def resized(self, channels: tuple[int, int, int], kernel: tuple[int, ...]) -> Linear:
        """Return the node with other numbers of groups, inputs and outputs, and another kernel."""


_MakeLinear: TypeAlias = "Callable[[NodeProto, Sequence[int]], Linear | None]"
"""The type of a function in `LINEAR`."""
LINEAR: dict[Key, _MakeLinear] = {}
"""Functions by operator that take a node and the shape of its weight and return its `Linear`; None if not linear."""


_OPERANDS: dict[Key, Operands] = {}
"""Input slots of the operators in `LINEAR`."""


def linear(*names: str, domain: str = "", operands: Operands | None = None) -> Callable[[_MakeLinear], _MakeLinear]:
    """Return a decorator that registers a function in `LINEAR`, for operators with these operands."""
    keys = [(domain, name) for name in names]
    _OPERANDS.update(dict.fromkeys(keys, operands or Operands()))
    return register_in(LINEAR, *keys)


def operands_of(node: NodeProto) -> Operands | None:
    """Return the input slots of a linear operator; None for other operators."""
    return _OPERANDS.get(key_of(node))


def key_of(node: NodeProto) -> Key:
    """Return domain and operator of a node."""
    return ("" if node.domain == "ai.onnx" else node.domain, node.op_type)


def linear_of(node: NodeProto, weight: Sequence[int]) -> Linear | None:
    """Return a node as a matrix product; None if it is not linear or its operator is not registered."""
    make = LINEAR.get(key_of(node))
    return None if make is None else make(node, weight)


@dataclass(frozen=True, eq=False)
class Affine:
    """An affine map of each channel of a tensor: factor * x + addend.

    Attributes:
        factor, addend: One number for each channel, or one for all.
        bias: Name of the constant that is added unscaled and whose values can therefore be refitted; None for none.
    """

    factor: Vector
    addend: Vector
    bias: str | None = None


_MakeAffine: TypeAlias = "Callable[[NodeProto, str, tuple[int, int], Constants], Affine | None]"
"""The type of a function in `AFFINE`."""
AFFINE: dict[Key, _MakeAffine] = {}
"""Functions by operator that return the `Affine` of a node, None if it is not affine. Arguments: the node, the name of
its data input, that input's channel axis counted from the front and from the end, and the constants."""


_MakeBounds: TypeAlias = "Callable[[NodeProto, Constants], tuple[float, float] | None]"
"""The type of a function in `BOUNDS`."""
BOUNDS: dict[Key, _MakeBounds] = {}
"""Functions by operator that return the bounds to which a node clips its first input; None if they are not constant."""


def bounds_of(node: NodeProto, constants: Constants) -> tuple[float, float] | None:
    """Return the bounds to which a node clips its first input; None if it does not clip, or to bounds not known."""
    make = BOUNDS.get(key_of(node))
    return None if make is None else make(node, constants)


def is_transpose(node: NodeProto) -> bool:
    """Whether a node is a Transpose that transposes a matrix."""
    return key_of(node) == ("", "Transpose") and list(attributes_of(node).get("perm", [1, 0])) == [1, 0]


def affine(*names: str, domain: str = "") -> Callable[[_MakeAffine], _MakeAffine]:
    """Return a decorator that registers a function in `AFFINE`."""

    return register_in(AFFINE, *((domain, name) for name in names))


@affine("BatchNormalization")
def _batch_norm(node: NodeProto, name: str, axis: tuple[int, int], constants: Constants) -> Affine | None:
    given = [constants(other) for other in node.input[1:5]]
    found = [array.astype(np.float64) for array in given if array is not None]
    if len(found) < 4 or node.input[0] != name or axis[0] != 1 or attributes_of(node).get("training_mode", 0):
        return None
    scale, shift, mean, var = found
    factor = scale / np.sqrt(var + attributes_of(node).get("epsilon", 1e-5))
    return Affine(factor, shift - mean * factor, node.input[2])


@affine("Add")
def _add(node: NodeProto, name: str, axis: tuple[int, int], constants: Constants) -> Affine | None:
    other = node.input[1] if node.input[0] == name else node.input[0]
    vector = along(constants(other), axis[1])
    return None if vector is None else Affine(np.ones(1), vector, other)


@affine("Mul")
def _mul(node: NodeProto, name: str, axis: tuple[int, int], constants: Constants) -> Affine | None:
    vector = along(constants(node.input[1] if node.input[0] == name else node.input[0]), axis[1])
    return None if vector is None else Affine(vector, np.zeros(1))


@affine("Sub")
def _sub(node: NodeProto, name: str, axis: tuple[int, int], constants: Constants) -> Affine | None:
    is_first = node.input[0] == name
    vector = along(constants(node.input[1] if is_first else node.input[0]), axis[1])
    if vector is None:
        return None
    return Affine(np.ones(1), -vector) if is_first else Affine(-np.ones(1), vector)


@affine("Div")
def _div(node: NodeProto, name: str, axis: tuple[int, int], constants: Constants) -> Affine | None:
    vector = along(constants(node.input[1]), axis[1]) if node.input[0] == name else None
    return None if vector is None or not vector.all() else Affine(1 / vector, np.zeros(1))


@affine("Neg")
def _neg(node: NodeProto, name: str, axis: tuple[int, int], constants: Constants) -> Affine:
    return Affine(-np.ones(1), np.zeros(1))


@register_in(BOUNDS, ("", "Relu"))
def _relu(node: NodeProto, constants: Constants) -> tuple[float, float]:
    return 0.0, math.inf


@register_in(BOUNDS, ("", "Clip"))
def _clip(node: NodeProto, constants: Constants) -> tuple[float, float] | None:
    given = attributes_of(node)  # before opset 11
    found = [float(given.get("min", -math.inf)), float(given.get("max", math.inf))]
    for place, name in enumerate(node.input[1:3]):
        array = constants(name) if name else None
        if name and (array is None or array.size != 1 or not np.issubdtype(array.dtype, np.floating)):
            return None
        found[place] = float(array.ravel()[0]) if array is not None else found[place]
    return (found[0], found[1]) if found[0] < found[1] else None


@register_in(BOUNDS, ("", "QuantizeLinear"), (MICROSOFT, "QuantizeLinear"))
def _quantised(node: NodeProto, constants: Constants) -> tuple[float, float] | None:
    found = level_of(node, (1, 2), constants)
    return None if found is None else found.limits


def along(array: Array | None, axis: int) -> Vector | None:
    """Return a constant as a vector along an axis; None if it varies along another one or is not float."""
    if array is None or not np.issubdtype(array.dtype, np.floating):
        return None
    long = [place - array.ndim for place, size in enumerate(array.shape) if size > 1]
    return array.astype(np.float64).ravel() if long in ([], [axis]) else None


@dataclass(frozen=True)
class _Convolution:
    """A convolution over any number of spatial axes.

    Attributes:
        groups: Number of channel groups.
        shape: Shape of the weight (out, in/groups, …), as of a Conv.
        strides, dilations: One number for each spatial axis.
        pads: (begin, end) pads of each spatial axis; None if they follow from the sizes ("SAME").
        upper: Whether an odd pad of "SAME" is added at the end (SAME_UPPER).
        spread: Strides of a ConvTranspose, which inserts zeros between elements; empty for a convolution.
    """

    groups: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...] | None
    upper: bool = True
    spread: tuple[int, ...] = ()
    in_axis: int = 1
    out_axis: int = 1
    is_stacked: bool = False
    stack: tuple[int, ...] = ()

    @property
    def weight_axis(self) -> int:
        return 0

    @property
    def taps(self) -> int:
        return math.prod(self.shape[2:])

    @property
    def keeps_pads(self) -> bool:
        return self.pads is not None

    @property
    def windows(self) -> tuple[Window, ...]:
        rank = len(self.strides)
        # "SAME" adds nothing for a single tap, whatever the size of the data.
        pads = self.pads or [(0, 0) if size == 1 else None for size in self.shape[2:]]
        return tuple(map(Window, self.shape[2:], self.strides, self.dilations, pads, self.spread or (1,) * rank))

    def resized(self, channels: tuple[int, int, int], kernel: tuple[int, ...]) -> _Convolution:
        groups, inputs, outputs = channels
        return replace(self, groups=groups, shape=(outputs, inputs // groups, *kernel))

    def count(self, out: Sequence[int]) -> int:
        return math.prod(out[2:])

    def rows(self, data: Array, places: Array) -> Array:
        windows = self._windows(data)
        rank = len(self.strides)
        out = windows.shape[2 : 2 + rank]
        index: tuple[Any, ...] = (slice(None), slice(None), *np.unravel_index(places, out))
        taken = windows[index]  # [samples, channels, places, *kernel]
        samples, channels, count = taken.shape[:3]
        taken = taken.reshape(samples, self.groups, channels // self.groups, count, -1)
        return np.ascontiguousarray(taken.transpose(1, 0, 3, 2, 4)).reshape(self.groups, samples * count, -1)

    def _windows(self, data: Array) -> Array:
        if self.spread:
            wide = np.zeros(
                (*data.shape[:2], *((n - 1) * s + 1 for n, s in zip(data.shape[2:], self.spread, strict=True))),
                data.dtype,
            )
            wide[(slice(None), slice(None), *(slice(None, None, s) for s in self.spread))] = data
            data = wide
        kernel = self.shape[2:]
        pads = self.pads or self._same(data.shape[2:])
        # A ConvTranspose may crop instead of pad.
        data = np.pad(data, ((0, 0), (0, 0), *((max(0, a), max(0, b)) for a, b in pads)))
        cuts = tuple(slice(max(0, -a), n - max(0, -b)) for (a, b), n in zip(pads, data.shape[2:], strict=True))
        data = data[(slice(None), slice(None), *cuts)]
        extents = tuple((k - 1) * d + 1 for k, d in zip(kernel, self.dilations, strict=True))
        axes = tuple(range(2, data.ndim))
        windows = sliding_window_view(data, extents, axis=axes)
        steps = tuple(slice(None, None, s) for s in self.strides)
        taps = tuple(slice(None, None, d) for d in self.dilations)
        return windows[(slice(None), slice(None), *steps, *taps)]

    def _same(self, sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
        found = []
        for size, k, s, d in zip(sizes, self.shape[2:], self.strides, self.dilations, strict=True):
            total = max(0, (-(-size // s) - 1) * s + (k - 1) * d + 1 - size)
            small, large = total // 2, total - total // 2
            found.append((small, large) if self.upper else (large, small))
        return tuple(found)

    def targets(self, out: Array, places: Array) -> Array:
        flat = out.reshape(*out.shape[:2], -1)[:, :, places]  # [samples, outputs, places]
        samples, outputs, count = flat.shape
        flat = flat.reshape(samples, self.groups, outputs // self.groups, count)
        return np.ascontiguousarray(flat.transpose(1, 0, 3, 2)).reshape(self.groups, samples * count, -1)

    def matrix(self, weight: Array) -> Array:
        array = weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        return np.ascontiguousarray(array.transpose(0, 2, 1))

    def weight(self, matrix: Array) -> Array:
        return matrix.transpose(0, 2, 1).reshape(self.shape)


@dataclass(frozen=True)
class _Transposed(_Convolution):
    """A ConvTranspose: a convolution of the data with inserted zeros, kernel flipped and channel axes swapped."""

    @property
    def keeps_pads(self) -> bool:
        return False

    @property
    def weight_axis(self) -> int:
        return 1

    def matrix(self, weight: Array) -> Array:
        return super().matrix(self._turned(weight))

    def weight(self, matrix: Array) -> Array:
        array = super().weight(matrix)  # (out, in/groups, …)
        groups, (out, inner), kernel = self.groups, array.shape[:2], array.shape[2:]
        array = array.reshape(groups, out // groups, inner, *kernel).swapaxes(1, 2)
        array = array.reshape(groups * inner, out // groups, *kernel)
        return np.flip(array, tuple(range(2, array.ndim)))

    def _turned(self, weight: Array) -> Array:
        """Return a weight (in, out/groups, …) as (out, in/groups, …) with the kernel flipped."""
        groups, (full, out), kernel = self.groups, weight.shape[:2], weight.shape[2:]
        array = weight.reshape(groups, full // groups, out, *kernel).swapaxes(1, 2)
        array = array.reshape(groups * out, full // groups, *kernel)
        return np.flip(array, tuple(range(2, array.ndim)))


@dataclass(frozen=True)
class _Product:
    """A matrix product with the weight on the right.

    Attributes:
        flipped_data, flipped_weight: Whether the factor is transposed before the product.
    """

    flipped_data: bool = False
    flipped_weight: bool = False
    out_axis: int = -1
    taps: int = 1
    windows: tuple[Window, ...] = ()
    keeps_pads: bool = True
    is_stacked: bool = False
    stack: tuple[int, ...] = ()

    @property
    def groups(self) -> int:
        return 1

    def resized(self, channels: tuple[int, int, int], kernel: tuple[int, ...]) -> _Product:
        return self

    @property
    def in_axis(self) -> int:
        return -2 if self.flipped_data else -1

    @property
    def weight_axis(self) -> int:
        return -2 if self.flipped_weight else -1

    def count(self, out: Sequence[int]) -> int:
        return math.prod(out[:-1])

    def rows(self, data: Array, places: Array) -> Array:
        data = data.swapaxes(-1, -2) if self.flipped_data else data
        return data.reshape(-1, data.shape[-1])[places][None]

    def targets(self, out: Array, places: Array) -> Array:
        return out.reshape(-1, out.shape[-1])[places][None]

    def matrix(self, weight: Array) -> Array:
        return (weight.T if self.flipped_weight else weight)[None]

    def weight(self, matrix: Array) -> Array:
        found: Array = matrix[0].T if self.flipped_weight else matrix[0]
        return found


PRODUCT: Linear = _Product()
"""The product by a matrix [features, outputs] on the right."""


@dataclass(frozen=True)
class _Stacked(_Product):
    """A matrix product with a stack of weights on the right, one matrix for each index of the leading axes.

    Attributes:
        stack: Sizes of the leading axes of the weight, along which the data may be repeated.
    """

    is_stacked: bool = True

    @property
    def groups(self) -> int:
        return math.prod(self.stack)

    def count(self, out: Sequence[int]) -> int:
        return math.prod(out[:-1]) // max(1, self.groups)

    def rows(self, data: Array, places: Array) -> Array:
        data = data[None] if data.ndim == 1 else data
        lead = np.broadcast_shapes(data.shape[:-2], self.stack)
        return self._by_matrix(np.broadcast_to(data, (*lead, *data.shape[-2:])))[:, places]

    def targets(self, out: Array, places: Array) -> Array:
        out = out if out.ndim > len(self.stack) + 1 else out[..., None, :]  # of a vector
        return self._by_matrix(out)[:, places]

    def _by_matrix(self, array: Array) -> Array:
        first = array.ndim - 2 - len(self.stack)
        axes = [first + place for place, size in enumerate(self.stack) if size > 1]
        return np.moveaxis(array, axes, range(len(axes))).reshape(self.groups, -1, array.shape[-1])

    def matrix(self, weight: Array) -> Array:
        return weight.reshape(self.groups, *weight.shape[-2:])

    def weight(self, matrix: Array) -> Array:
        return matrix.reshape(*self.stack, *matrix.shape[-2:])


@linear("Conv", operands=Operands(bias=2))
@linear("ConvInteger", operands=INTEGER_PRODUCT)
@linear("QLinearConv", operands=QLINEAR_CONV)
@linear("QLinearConv", domain=MICROSOFT, operands=QLINEAR_CONV)
def _conv(node: NodeProto, weight: Sequence[int]) -> Linear | None:
    given = attributes_of(node)
    if given.get("channels_last", 0):
        return None
    rank = len(weight) - 2
    auto = given.get("auto_pad", "NOTSET")
    pads = given.get("pads", [0] * (2 * rank)) if auto == "NOTSET" else [0] * (2 * rank)
    pairs = None if auto.startswith("SAME") else tuple(zip(pads[:rank], pads[rank:], strict=True))
    return _Convolution(
        given.get("group", 1),
        tuple(weight),
        tuple(given.get("strides", [1] * rank)),
        tuple(given.get("dilations", [1] * rank)),
        pairs,
        auto != "SAME_LOWER",
    )


@linear("ConvTranspose", operands=Operands(bias=2))
def _conv_transpose(node: NodeProto, weight: Sequence[int]) -> Linear | None:
    given = attributes_of(node)
    rank = len(weight) - 2
    if given.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or "output_shape" in given:
        return None
    groups = given.get("group", 1)
    pads, extra = given.get("pads", [0] * (2 * rank)), given.get("output_padding", [0] * rank)
    dilations = tuple(given.get("dilations", [1] * rank))
    reach = [(k - 1) * d for k, d in zip(weight[2:], dilations, strict=True)]
    pairs = tuple((r - a, r - b + e) for r, a, b, e in zip(reach, pads[:rank], pads[rank:], extra, strict=True))
    shape = (weight[1] * groups, weight[0] // groups, *weight[2:])
    spread = tuple(given.get("strides", [1] * rank))
    return _Transposed(groups, shape, (1,) * rank, dilations, pairs, spread=spread)


@linear("Gemm", operands=Operands(bias=2))
@linear("QGemm", domain=MICROSOFT, operands=QGEMM)
def _gemm(node: NodeProto, weight: Sequence[int]) -> Linear | None:
    given = attributes_of(node)
    if given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0:
        return None
    return _Product(bool(given.get("transA", 0)), bool(given.get("transB", 0)))


@linear("MatMul")
def _matmul(node: NodeProto, weight: Sequence[int]) -> Linear | None:
    return _Stacked(stack=tuple(weight[:-2])) if len(weight) > 2 else _plain_matmul(node, weight)


@linear("MatMulInteger", operands=INTEGER_PRODUCT)
@linear("QLinearMatMul", operands=QLINEAR_MATMUL)
@linear("DynamicQuantizeMatMul", domain=MICROSOFT, operands=DYNAMIC_MATMUL)
@linear("MatMulIntegerToFloat", domain=MICROSOFT, operands=MATMUL_TO_FLOAT)
@linear("MatMulNBits", domain=MICROSOFT, operands=MATMUL_N_BITS)
def _plain_matmul(node: NodeProto, weight: Sequence[int]) -> Linear | None:
    return PRODUCT if len(weight) == 2 else None


def spread(array: Array | None, stack: Sequence[int], outputs: int) -> Vector | None:
    """Return a constant that meets the output of a stack of matrices as one number for each output of each matrix.

    None if it is not float, or varies along another axis.
    """
    if array is None or not np.issubdtype(array.dtype, np.floating):
        return None
    whole = (*stack, 1, outputs)
    with suppress(ValueError):
        return np.broadcast_to(array.astype(np.float64), whole).ravel()
    return None
