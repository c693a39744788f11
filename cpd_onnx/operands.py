"""Operands that name sizes: whether they can be rewritten, and how.

An operand may be a constant, computed from constants, or computed from the sizes of other tensors. Constants are
edited where they enter the computation; what follows from sizes follows by itself; an operand that is the same
whatever the inputs can in the end be written down.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cpd_onnx.atoms import Atoms, Axis
from cpd_onnx.groups import Combed
from cpd_onnx.rules.api import Demand
from cpd_onnx.shapes import Value


@dataclass(frozen=True, eq=False)
class Element:
    """One size in an operand: its position, the axis that it is the size of, and where it comes from."""

    position: int
    axis: Axis
    leaf: int


def operand_value(demand: Demand) -> Value | None:
    """The value at a demand's slot; None if the slot is empty or it is an attribute."""
    if isinstance(demand.slot, str):
        return None
    node = demand.scope.nodes[demand.node]
    if demand.slot >= len(node.input) or not node.input[demand.slot]:
        return None
    return demand.scope.lookup(node.input[demand.slot])


def elements(demand: Demand, value: Value) -> Iterator[Element]:
    """The elements of a list of sizes that are the size of their axis."""
    assert value.value is not None
    leaves = np.full(value.value.size, -1) if value.leaves is None else value.leaves.ravel()
    for position, (axis, old) in enumerate(zip(demand.axes, value.value.ravel().tolist(), strict=True)):
        if old == len(axis):
            yield Element(position, axis, int(leaves[position]))


def hold_what_cannot_be_edited(combed: Combed) -> None:
    """Freeze, or unite, the axes whose sizes stand where they cannot be rewritten one by one."""
    while _one_round(combed):
        pass


def _one_round(combed: Combed) -> bool:
    """Whether something had to be frozen or united."""
    atoms, changed = combed.atoms, False
    sharing: dict[int, list[Axis]] = defaultdict(list)
    for demand in combed.recorder.demands:
        live = [axis for axis in demand.axes if not atoms.all_frozen(axis)]
        value = operand_value(demand)
        if live and (reason := _uneditable(demand, value)):
            for axis in live:
                atoms.freeze(axis, reason)
            changed = True
        elif value is not None and demand.per_element and not value.is_static:
            changed |= _dynamic_list(combed, demand, value, sharing)
    for axes in sharing.values():
        for other in axes[1:]:
            if not np.array_equal(atoms.canonical(axes[0]), atoms.canonical(other)):
                atoms.unite(axes[0], other)
                changed = True
    return changed


def _uneditable(demand: Demand, value: Value | None) -> str | None:
    node = demand.scope.nodes[demand.node]
    where = f"{node.op_type} {node.name or node.output[0]!r}"
    if demand.scope.function:
        return f"{where} names this size in a function that several nodes may call"
    if value is not None and value.value is None:
        return f"{where} names this size in an operand computed from data"
    if value is not None and not value.is_static and not demand.per_element:
        return f"{where} has an operand that depends on the size of the input"
    return None


def _dynamic_list(combed: Combed, demand: Demand, value: Value, sharing: dict[int, list[Axis]]) -> bool:
    """A list of sizes of which some depend on the inputs."""
    atoms, changed = combed.atoms, False
    node = demand.scope.nodes[demand.node]
    for element in elements(demand, value):
        if element.leaf >= 0:
            if combed.folded.uses[element.leaf >> 32].scope.function:
                changed |= _freeze(atoms, element.axis, "names this size in a function")
            sharing[element.leaf].append(element.axis)
        elif atoms.all_frozen(element.axis):
            continue
        elif element.leaf == -1:
            reason = f"{node.op_type} {node.name or node.output[0]!r} computes this size from that of the input"
            changed |= _freeze(atoms, element.axis, reason)
        else:
            changed |= _follow(combed, element)
    return changed


def _freeze(atoms: Atoms, axis: Axis, reason: str) -> bool:
    if atoms.all_frozen(axis):
        return False
    atoms.freeze(axis, reason)
    return True


def _follow(combed: Combed, element: Element) -> bool:
    """The size is that of other tensors' axes, which must then have the same fate."""
    atoms, axes = combed.atoms, []
    for source, number in combed.folded.dims[-2 - element.leaf]:
        tensor = combed.tensor_of.get(id(source))
        if tensor is None or tensor.axes is None:
            return _freeze(atoms, element.axis, "is the size of a tensor that is not followed")
        axes.append(tensor.axes[number])
    axis = atoms.product(*axes)
    if len(axis) != len(element.axis):
        return _freeze(atoms, element.axis, "is not the size that it is taken for")
    if np.array_equal(atoms.canonical(axis), atoms.canonical(element.axis)):
        return False
    atoms.unite(axis, element.axis)
    return True
