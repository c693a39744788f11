"""Provenance of the elements of shape arithmetic, node by node.

Operators that only rearrange elements rearrange the provenance records in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from onnx import NodeProto

from cpd_onnx.ir.model import Array
from cpd_onnx.ops.evaluate import Call, compute_outputs
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.shapes.values import ORIGIN, Origin, Origins, Role, Scope, Use, Value

Place: TypeAlias = "tuple[Scope, int]"
"""A node: its scope and its position there."""


@dataclass
class Provenance:
    """Recorder of the sources of elements.

    Attributes:
        uses: Input slots at which constants enter shape arithmetic; becomes `Folded.uses`.
        products: Factors of each recorded size, as (tensor, axis); becomes `Folded.products`.
        equal: Other sizes that each of some recorded sizes equals; becomes `Folded.equal`.

    """

    uses: list[Use] = field(default_factory=list)
    products: list[tuple[tuple[Value, int], ...]] = field(default_factory=list)
    equal: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def of_size(self, value: Value) -> Origins:
        """Return the origin of a Size output: the product of all sizes of a tensor."""
        return self._product([(value, axis) for axis in range(len(value.shape or ()))], 0)

    def of_shape(self, value: Value) -> Origins:
        """Return the origins of a Shape output: the size of each axis of a tensor."""
        first, rank = len(self.products), len(value.shape or ())
        self.products += [((value, axis),) for axis in range(rank)]
        return _filled((rank,), Role.SIZES, np.arange(first, first + rank))

    def of_outputs(
        self, place: Place, node: NodeProto, call: Call, inputs: Sequence[Value | None], result: Array
    ) -> Sequence[Origins] | None:
        """Return the origins of a node's outputs, None unless it rearranges elements or multiplies sizes.

        `result` is the value of the first output.
        """
        if node.op_type == "Div":
            return self._scaled(place, inputs, Role.DIVISOR, result)
        if node.op_type == "Mul":
            return self._scaled(place, inputs, Role.FACTOR, result) or self._multiplied(inputs, result)
        if node.op_type == "ReduceProd":
            return self._multiplied(inputs[:1], result)
        if node.op_type == "Max":
            return self._largest(inputs, result)
        if not traits_of(node).moves_elements:
            return None
        carried = traits_of(node).carried(len(inputs))
        operands = [
            value and (self._of_input(Use(*place, slot), value) if slot in carried else value.value)
            for slot, value in enumerate(inputs)
        ]
        # Records cannot be cast to another element type.
        return compute_outputs("Identity" if traits_of(node).casts else node.op_type, call, operands)

    def _of_input(self, use: Use, value: Value) -> Origins:
        """Return the origins of an input: its own if they are traced, or the slot itself if it is constant."""
        assert value.value is not None
        found, shape = value.origins, value.value.shape
        is_traced = found is not None and bool((found["role"] >= Role.ELEMENT).all())
        if not is_traced and (value.weight is not None or value.is_static):
            self.uses.append(use)
            return _filled(shape, Role.ELEMENT, len(self.uses) - 1, np.arange(value.value.size).reshape(shape))
        return _filled(shape, Role.UNKNOWN, -1) if found is None else found

    def _scaled(
        self, place: Place, inputs: Sequence[Value | None], role: Role, result: Array
    ) -> Sequence[Origins] | None:
        """Return the origin of a dynamic size multiplied or divided by a constant (batch x heads)."""
        static = [slot for slot, value in enumerate(inputs) if value is not None and value.is_static]
        if result.size != 1 or len(static) != 1 or (role == Role.DIVISOR and static != [1]):
            return None
        self.uses.append(Use(*place, static[0]))
        return [_filled(result.shape, role, len(self.uses) - 1)]

    def _multiplied(self, inputs: Sequence[Value | None], result: Array) -> Sequence[Origins] | None:
        """Return the origin of a product of sizes; None if an element is not a size."""
        origins = [origin for value in inputs if value is not None for origin in value.each_origin()]
        if result.size != 1 or any(origin.role != Role.SIZES or origin.source in self.equal for origin in origins):
            return None
        return [self._product([axis for origin in origins for axis in self.products[origin.source]], result.ndim)]

    def _largest(self, inputs: Sequence[Value | None], result: Array) -> Sequence[Origins] | None:
        """Return the origins of the largest of several sizes, as exporters compute those of a broadcast.

        Sizes and numbers of one say nothing about it. All other sizes are equal, and have to stay so.
        """
        tables = [(value.values or (), value.origins) for value in inputs if value is not None]
        if any(array.shape != result.shape for arrays, _ in tables for array in arrays):
            return None
        found = _filled(result.shape, Role.UNKNOWN, -1)
        for place in np.ndindex(result.shape):
            numbers = [tuple(array[place].item() for array in arrays) for arrays, _ in tables]
            counted = [n for n, each in enumerate(numbers) if max(each) > 1]
            origins = [None if table is None else Origin(*table[place].item()) for _, table in tables]
            sources = [o.source for n in counted if (o := origins[n]) is not None and o.role == Role.SIZES]
            if len(set(sources) & self.equal.keys()) or len({numbers[n] for n in counted}) != 1:
                continue
            if len(sources) == len(counted):
                found[place] = (Role.SIZES, self._alike(sources), 0)
        return [found]

    def _alike(self, sources: Sequence[int]) -> int:
        """Return the number of a recorded size that equals all of some others."""
        first, *others = dict.fromkeys(sources)
        if not others:
            return first
        self.products.append(self.products[first])
        self.equal[len(self.products) - 1] = tuple(others)
        return len(self.products) - 1

    def _product(self, axes: Sequence[tuple[Value, int]], rank: int) -> Origins:
        self.products.append(tuple(axes))
        return _filled((1,) * rank, Role.SIZES, len(self.products) - 1)


def _filled(shape: tuple[int, ...], role: Role, source: int | Array, element: int | Array = 0) -> Origins:
    records = np.empty(shape, ORIGIN)
    records["role"], records["source"], records["element"] = role, source, element
    return records
