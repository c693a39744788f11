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

from cpd_onnx.algebra.atoms import Atoms, Axis
from cpd_onnx.channels.groups import Combed
from cpd_onnx.rules.api import Demand
from cpd_onnx.shapes.values import Scope, Use, Value


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
    _hold_numbers_of_inputs(combed)
    while _one_round(combed):
        pass


def is_number(combed: Combed, use: Use) -> bool:
    """Whether a slot takes sizes as numbers to compute with, so that what is made of them is not known beforehand.

    Demands apart, which name sizes or positions.
    """
    made = [use.scope.values.get(output) for output in use.scope.nodes[use.node].output]
    return not all(v is not None and v.values is not None for v in made) and use.key not in combed.recorder.demanded


def _hold_numbers_of_inputs(combed: Combed) -> None:
    """Freeze what numbers are computed from that depend on the sizes of the inputs too, as a count of all elements.

    They belong to the function and must stay as they are, but cannot be written down.
    """
    for scope in combed.folded.scope.walk():
        for name, value in scope.values.items():
            if not value.from_shape or value.values is None or value.is_static or scope.function:
                continue
            for use in scope.consumers.get(name, []):
                if is_number(combed, use):
                    node = use.scope.nodes[use.node]
                    reason = f"{node.op_type} {node.name or node.output[0]!r} computes with a number made of this size"
                    for axis in _sizes_in(combed, scope, name):
                        _freeze(combed.atoms, axis, reason)
                    break


def _sizes_in(combed: Combed, scope: Scope, name: str) -> Iterator[Axis]:
    """The axes of whose sizes a value is computed."""
    todo, seen = [name], {name}
    while todo:
        value = scope.lookup(todo[-1])
        maker = scope.makers.get(todo.pop())
        if value is None or not value.from_shape:
            continue
        leaves = np.full(1, -1) if value.leaves is None else value.leaves.ravel()
        for leaf in leaves[leaves < -1].tolist():
            for source, number in combed.folded.dims[-2 - leaf]:
                tensor = combed.tensor_of.get(id(source))
                if tensor is not None and tensor.axes is not None:
                    yield tensor.axes[number]
        if maker is not None and (leaves >= -1).any():
            # A shape that an operator gives its output is no part of the elements.
            named = combed.recorder.demanded
            slots = enumerate(scope.nodes[maker].input)
            inputs = {entry for slot, entry in slots if (scope.path, maker, slot) not in named}
            todo += inputs - seen
            seen |= inputs


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
