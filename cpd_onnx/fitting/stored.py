"""How weights and biases are stored: as floats, or as integers that stand for real numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cpd_onnx.fitting.moved import Moved
from cpd_onnx.fitting.steps import Steps
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.ir.tensors import held_array, held_type, hold
from cpd_onnx.ops.matrix_view import Linear, Vector
from cpd_onnx.ops.quantized_view import Packing

_SILENT = 1e-6
"""Factor below which a bias has no measurable effect, so that it is not divided by (heuristic)."""
_BYTE = 255
"""Largest difference of two integers of eight bits."""


@dataclass(frozen=True, eq=False)
class Scale:
    """The scales and zero points of integers.

    Attributes:
        name: Initializer or Constant node of the scales; empty if they are computed, and cannot be changed.
        values: The scales at first.
        zero_point: Zero points: one, or one for each scale.
        zero_name: Initializer or Constant node of the zero points, if only these integers use it; else empty.
        is_free: Whether only these integers use the scales, so that they may be changed.
    """

    name: str
    values: Vector
    zero_point: Vector
    zero_name: str = ""
    is_free: bool = False

    def of(self, model: Model) -> Vector:
        """Return the scales in a model."""
        return held_array(model, self.name).astype(np.float64).ravel() if self.name else self.values

    def put(self, model: Model, scales: Vector) -> None:
        """Replace the scales."""
        old = held_array(model, self.name)
        hold(model, self.name, scales.astype(old.dtype).reshape(old.shape))


@dataclass(frozen=True, eq=False)
class Stored:
    """A weight in the file.

    Attributes:
        name: Its initializer or Constant node.
        flipped: Whether the graph transposes it.
        scale: Scales and zero points; None for a float weight.
        cells: Function that returns the number of the scale of each element, in the layout of the initializer.
        packing: How several numbers are packed in a byte; None if each has its own.
        limits: Smallest and largest integer.
        is_rounded: Whether a float weight is rounded to steps by the graph.
        moved: How nodes make a float weight of its initializers; None if it is one itself. `name` is the first then.
    """

    name: str
    flipped: bool = False
    scale: Scale | None = None
    cells: Callable[[], Array] | None = None
    packing: Packing | None = None
    limits: tuple[int, int] = (0, 0)
    is_rounded: bool = False
    moved: Moved | None = None

    @property
    def is_float(self) -> bool:
        """Whether every real number can be stored, up to the precision of its element type."""
        return self.scale is None

    def shape(self, model: Model) -> tuple[int, ...]:
        """Return the shape where the weight is multiplied."""
        if self.packing is not None:
            return self.packing.rows, self.packing.columns
        if self.moved is not None:
            return self.moved.places.shape
        found = held_type(model, self.name)
        assert found is not None, self.name
        return found[1][:: -1 if self.flipped else 1]

    def array(self, model: Model) -> Array:
        """Return the real numbers that the weight stands for, as float64, where it is multiplied."""
        if self.moved is not None:
            return self.moved.array(model).astype(np.float64)
        array = (held_array(model, self.name) if self.is_float else self._integers(model)).astype(np.float64)
        if self.scale is not None:
            scales, zeros = self._each(self.scale.of(model)), self._zeros()
            array = np.clip(np.rint(array / scales) + zeros, *self.limits) if self.is_rounded else array
            array = (array - zeros) * scales
        return array.T if self.flipped else array

    def put(self, model: Model, array: Array, scales: Vector | None = None) -> None:
        """Replace the weight by real numbers; those of a quantised weight are steps of the scales."""
        if self.moved is not None:
            self.moved.put(model, array)
            return
        array = array.T if self.flipped else array
        old = held_array(model, self.name)
        if self.scale is None or scales is None:
            hold(model, self.name, np.ascontiguousarray(array, old.dtype))
            return
        if not self.is_rounded:
            array = np.clip(np.rint(array / self._each(scales)) + self._zeros(), *self.limits)
        array = array if self.packing is None else self.packing.packed(array, old)
        hold(model, self.name, np.ascontiguousarray(array.astype(old.dtype)))
        if self.scale.is_free:
            self.scale.put(model, scales)

    def steps(self, model: Model, linear: Linear) -> Steps | None:
        """Return the steps of a quantised weight in the layout of its matrix; None for a float weight."""
        if self.scale is None or self.cells is None:
            return None

        def laid_out(array: Array) -> Array:
            return np.asarray(linear.matrix(array.T if self.flipped else array))

        numbers, scales, zeros = self._integers(model), self.scale.of(model), self._zeros()
        if self.is_rounded:
            numbers = np.clip(np.rint(numbers / self._each(scales)) + zeros, *self.limits)
        cells = np.broadcast_to(self.cells(), numbers.shape)
        matrix = laid_out(np.broadcast_to(zeros, numbers.shape)).astype(np.float64)
        limits = _used(numbers, self.limits, self.scale.zero_point)
        return Steps(laid_out(cells).astype(np.int64), scales, matrix, limits, self.scale.is_free)

    def _integers(self, model: Model) -> Array:
        array = held_array(model, self.name)
        if self.packing is not None:
            return self.packing.unpacked(array)
        return array if array.dtype.kind in "iuf" else array.astype(np.int8)  # four bits

    def _each(self, numbers: Vector) -> Array:
        assert self.cells is not None
        return np.asarray(numbers[self.cells()])

    def _zeros(self) -> Array:
        assert self.scale is not None
        points = self.scale.zero_point
        return self._each(points) if points.size > 1 else points.reshape(())


def _used(numbers: Array, limits: tuple[int, int], zero_points: Vector) -> tuple[int, int]:
    """Return the limits that the quantiser kept to: some use half of the range, most no integer without a counterpart.

    The first prevents overflow on processors that add products of two bytes in 16 bits, the second is what kernels for
    symmetric weights assume. Of four bits, all are used.
    """
    low, high = limits
    if not numbers.size:
        return limits
    least = int(min(numbers.min(), zero_points.min()))
    most = int(max(numbers.max(), zero_points.max()))
    if 2 * least >= low and 2 * most <= high + 1:
        return least, most
    if high - low >= _BYTE and (2 * zero_points == low + high + 1).all():
        return low + 1, high
    return limits


@dataclass(frozen=True, eq=False)
class Bias:
    """A constant added to the outputs, and the factor by which it is multiplied afterwards [outputs].

    Attributes:
        name: Its initializer or Constant node.
        factor: The factor.
        scale: Scales and zero points of integers; None for floats.
        limits: Smallest and largest integer.
        implied: Scale of the data, where the scale of the bias is the product of that and of the weight's; else 0.
        follows: Whether its scale is such a product that is stored.
        part: First and end index on the last axis, where only some of the numbers belong to the outputs; None for all.
        moved: How nodes make a float bias of its initializers; None if it is one itself. `name` is the first then.
    """

    name: str
    factor: Vector
    scale: Scale | None = None
    limits: tuple[int, int] = (0, 0)
    implied: float = 0.0
    follows: bool = False
    part: tuple[int, int] | None = None
    moved: Moved | None = None

    @property
    def is_float(self) -> bool:
        """Whether every real number can be stored."""
        return self.scale is None and not self.implied

    @property
    def is_coarse(self) -> bool:
        """Whether rounding changes it noticeably."""
        return self.scale is not None and not self.follows

    def times(self, factor: Vector) -> Bias:
        """Return the bias before another factor."""
        return replace(self, factor=self.factor * factor)

    def change_before(self, change: Vector) -> Vector:
        """Return the change of the bias that changes the end of the chain by that much [outputs]."""
        return np.asarray(change / np.where(np.abs(self.factor) > _SILENT, self.factor, 1.0))

    def add(self, model: Model, change: Vector) -> None:
        """Change the values in a model so that the end of the chain changes by that much [outputs]."""
        self.put(model, self.values(model, None), self.change_before(change), None)

    def values(self, model: Model, weight: Vector | None) -> Vector:
        """Return the real numbers, where the scales of the weight are known if they are implied."""
        array = np.asarray(self._array(model)[self._own], np.float64).ravel()
        if self.implied:
            assert weight is not None
            return np.asarray(array * self.implied * weight)
        return array if self.scale is None else (array - self.scale.zero_point) * self.scale.of(model)

    def put(self, model: Model, old: Vector, change: Vector, weights: tuple[Vector, Vector] | None) -> None:
        """Replace the bias by old real numbers and a change of them, given the scales of the weight before and after.

        The integers of a bias that does not change stay as they are.
        """
        stored = self._array(model)
        if self.is_float:
            changed = np.array(stored)
            changed[self._own] = changed[self._own] + change.reshape(changed[self._own].shape)
            if self.moved is not None:
                self.moved.put(model, changed)
            else:
                hold(model, self.name, changed)
            return
        numbers = self._integers(model, old + change, weights)
        hold(model, self.name, np.clip(np.rint(numbers), *self.limits).astype(stored.dtype).reshape(stored.shape))

    def _array(self, model: Model) -> Array:
        return held_array(model, self.name) if self.moved is None else self.moved.array(model)

    @property
    def _own(self) -> Any:  # an index of numpy
        """Index of the numbers that belong to the outputs."""
        return ... if self.part is None else (..., slice(*self.part))

    def rounded(self, model: Model, values: Vector) -> Vector:
        """Return real numbers as the bias stores them."""
        scale, zero = self._coarse(model, values)
        return np.asarray((np.clip(np.rint(values / scale) + zero, *self.limits) - zero) * scale)

    def _integers(self, model: Model, values: Vector, weights: tuple[Vector, Vector] | None) -> Vector:
        if self.implied:
            assert weights is not None
            return np.asarray(values / (self.implied * weights[1]))
        assert self.scale is not None
        if not self.follows:
            scale, zero = self._coarse(model, values)
            if self.scale.is_free:
                self.scale.put(model, scale)
                zeros = held_array(model, self.scale.zero_name)
                hold(model, self.scale.zero_name, np.full(zeros.shape, zero, zeros.dtype))
            return np.asarray(values / scale + zero)
        scale = self.scale.of(model)
        if weights is not None and (weights[0] != weights[1]).any():
            self.scale.put(model, scale * weights[1] / weights[0])
            scale = self.scale.of(model)
        return np.asarray(values / scale + self.scale.zero_point)

    def _coarse(self, model: Model, values: Vector) -> tuple[Vector, Vector]:
        """Return scale and zero point for some values; those of the model if they may not be changed."""
        assert self.scale is not None
        if not self.scale.is_free:
            return self.scale.of(model), self.scale.zero_point
        low, high = self.limits
        least, most = min(0.0, float(values.min())), max(0.0, float(values.max()))
        scale = float(np.float32(max((most - least) / (high - low), float(np.finfo(np.float32).tiny))))
        return np.full(1, scale), np.full(1, np.rint(low - least / scale))
