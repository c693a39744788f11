"""Products of linear operators: one that computes what two of them compute one after the other.

With pads, strides and groups, two linear operators are not always one of the same kind. What is here is exact: at the
border of an image too, and whatever the size of the data. One of the two nodes takes the place of both, and its
attributes stay as they are, except for those that name sizes: `kernel_shape` and `group`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cpd_onnx.ir.model import Array
from cpd_onnx.ops.matrix_view import Linear, Vector, Window


@dataclass(frozen=True, eq=False)
class Composition:
    """One linear operator in place of two.

    Attributes:
        first, second: The two operators, in the order in which they are computed.
        is_second: Whether the node of the second one takes the place of both, not that of the first.
        result: What this node computes then.
        groups, inputs, outputs: Its number of groups, and of channels.
        kernel: Its number of taps along each spatial axis.
        steps: Distance of the second operator's taps along each spatial axis, counted in taps of the result.
    """

    first: Linear
    second: Linear
    is_second: bool
    result: Linear
    groups: int
    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    steps: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements of the weight."""
        return self.inputs // self.groups * self.outputs * math.prod(self.kernel)

    @property
    def passes_constants(self) -> bool:
        """Whether constant data of the second operator give a constant: it sees no zeros beside them."""
        return all(window.is_bare for window in self.second.windows)

    def matrix(self, first: Array, second: Array, gain: Vector) -> Array:
        """Return the product of two matrices, as the matrix of the result.

        Args:
            first, second: The matrices of the operators, see `Linear.matrix`.
            gain: What each channel between the two is multiplied by.
        """
        one = _joined(_apart(first * gain.reshape(len(first), 1, -1), self.first), self.groups)
        two = _joined(_apart(second, self.second), self.groups)
        groups, inputs, taps, between = one.shape
        rows = one.reshape(groups, inputs * taps, between)
        found = np.zeros((groups, inputs, math.prod(self.kernel), two.shape[-1]))
        for number, places in enumerate(self._places()):
            found[:, :, places] += (rows @ two[:, :, number]).reshape(groups, inputs, taps, -1)
        return found.reshape(groups, -1, found.shape[-1])

    def _places(self) -> Iterator[Array]:
        """Yield, for each tap of the second operator, the taps of the result that it and each of the first make."""
        ones, twos = (tuple(window.size for window in each.windows) for each in (self.first, self.second))
        own = [np.unravel_index(np.arange(math.prod(ones)), ones)] if ones else []
        for place in np.ndindex(*twos):
            if not own:
                yield np.zeros(1, np.int64)
                continue
            moved = [axis + step * tap for axis, step, tap in zip(own[0], self.steps, place, strict=True)]
            yield np.asarray(np.ravel_multi_index(moved, self.kernel))

    def constant(self, second: Array, shift: Vector) -> Vector:
        """Return what the second operator, with this matrix, makes of data that are constant [channels]."""
        assert self.passes_constants or not shift.any(), "zeros beside the data"
        summed = _apart(second, self.second).sum(axis=2)
        return np.asarray(np.einsum("gi,gio->go", shift.reshape(summed.shape[:2]), summed).ravel())


def compositions(first: Linear, second: Linear, channels: tuple[int, int]) -> Iterator[Composition]:
    """Yield one operator that computes what two compute one after the other, for each node that can take their place.

    The operators are known to fit: the second one reads what the first computes, or that with each channel scaled and
    shifted. `channels` are the number that the first reads, and the number that the second computes.
    """
    if len(first.windows) != len(second.windows) or first.out_axis != second.in_axis:
        return
    groups, ones = math.gcd(first.groups, second.groups), (1,) * len(first.windows)
    if first.in_axis == first.out_axis and all(window.is_point for window in first.windows):
        yield _composed(first, second, (groups, *channels), ones, is_second=True)
    steps = tuple(_step(one, two) for one, two in zip(first.windows, second.windows, strict=True))
    if all(steps) and (first.keeps_pads or all(window.is_point for window in second.windows)):
        yield _composed(first, second, (groups, *channels), steps, is_second=False)


def _composed(
    first: Linear, second: Linear, channels: tuple[int, int, int], steps: tuple[int, ...], *, is_second: bool
) -> Composition:
    pairs = zip(first.windows, second.windows, steps, strict=True)
    kernel = tuple(two.size if is_second else one.size + (two.size - 1) * step for one, two, step in pairs)
    result = (second if is_second else first).resized(channels, kernel)
    return Composition(first, second, is_second, result, *channels, kernel, steps)


def _step(first: Window, second: Window) -> int:
    """Return the distance of the second window's taps in taps of the first; 0 if the first cannot hold both.

    The second must see no zeros at the border, where the first would compute something else.
    """
    if second.is_point:
        return 1
    distance = second.dilation * first.stride
    is_exact = second.is_bare and second.stride == 1 and first.spread == 1
    return distance // first.dilation if is_exact and distance % first.dilation == 0 else 0


def _apart(matrix: Array, linear: Linear) -> Array:
    """Return a matrix [groups, inputs * taps, outputs] as [groups, inputs, taps, outputs]."""
    return matrix.reshape(len(matrix), -1, linear.taps, matrix.shape[-1])


def _joined(matrix: Array, groups: int) -> Array:
    """Return a matrix [groups, inputs, taps, outputs] with fewer groups, and zeros between those that are joined."""
    number, inputs, taps, outputs = matrix.shape
    each = number // groups
    found = np.zeros((groups, each, inputs, taps, each, outputs))
    for place in range(each):
        found[:, place, :, :, place] = matrix[place::each]
    return found.reshape(groups, each * inputs, taps, each * outputs)
