"""Constraints on the whole graph: freeze counted axes, last channels, and sizes that cannot be rewritten.

An operand that names a size may be a constant, computed from constants, or computed from the sizes of other tensors.
Constants are edited where they enter the computation; operands computed from sizes of tensors follow by themselves; an
operand with the same value for all inputs can be replaced by a constant.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from cpd_onnx.algebra.atoms import NOTHING, Atoms, Axis
from cpd_onnx.algebra.reasons import Reason
from cpd_onnx.channels.balanced import balance
from cpd_onnx.channels.groups import Group, Swept
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.rules.api import WHOLE, Recorder, SizeUse
from cpd_onnx.rules.reduce import POSITION_USERS
from cpd_onnx.shapes.values import Origin, Role, Scope, Use, Value


@dataclass(frozen=True, eq=False)
class Element:
    """One size in an operand.

    Attributes:
        position: Index of the element in the operand.
        axis: Axis that the element is the size of.
        origin: Provenance of the element.

    """

    position: int
    axis: Axis
    origin: Origin


def operand_value(size_use: SizeUse) -> Value | None:
    """Return the value of the operand of a size use; None for an attribute or an omitted input."""
    if isinstance(size_use.slot, str):
        return None
    node = size_use.scope.nodes[size_use.node]
    if size_use.slot >= len(node.input) or not node.input[size_use.slot]:
        return None
    return size_use.scope.lookup(node.input[size_use.slot])


def elements(size_use: SizeUse, value: Value) -> Iterator[Element]:
    """Yield the elements of a shape operand that are the size of their axis."""
    assert value.value is not None
    origins = value.each_origin()
    for position, (axis, old) in enumerate(zip(size_use.axes, value.value.ravel().tolist(), strict=True)):
        if old == len(axis):
            yield Element(position, axis, origins[position])


def freeze_positions(swept: Swept) -> None:
    """Freeze axes on which a tensor holds positions, unless all uses of the positions count along the same axes."""
    for scope, name, axis, within in swept.recorder.positions:
        if not swept.atoms.all_frozen(axis) and not _is_position_only(scope, name, within):
            swept.atoms.freeze(axis, Reason("structure", "", f"has positions in tensor {name!r}"))


def _is_position_only(scope: Scope, name: str, within: Value | None) -> bool:
    """Return whether positions reach only operators that count along the same axes."""
    waiting, seen = [name], {name}
    while waiting:
        taken = waiting.pop()
        if taken in scope.outputs:
            return False
        for use in scope.consumers.get(taken, []):
            node = use.scope.nodes[use.node]
            counts_alike = POSITION_USERS.get((node.op_type, use.slot))
            if counts_alike is not None and counts_alike(within, use.scope.lookup(node.output[0])):
                continue
            if not traits_of(node).carries_positions or use.scope is not scope:
                return False
            waiting += [output for output in node.output if output not in seen]
            seen.update(node.output)
    return True


def freeze_last_channels(swept: Swept) -> None:
    """Freeze channels that every index of some axis depends on: removing them would empty it."""
    for axis in (each.axis for each in swept.axes):
        if len(axis) < 1 or (len(axis) == 1 and axis[0] == NOTHING):
            continue
        parts = swept.atoms.parts(axis)
        if parts.shape[1] == 1 and parts[0, 0] != parts[-1, 0]:
            continue
        # A primitive of every index is one of the first and of the last.
        for primitive in set(parts[0].tolist()).intersection(parts[-1].tolist()) - {NOTHING}:
            if bool((parts == primitive).any(axis=1).all()):
                swept.atoms.freeze(np.asarray([primitive]), Reason("structure", "", WHOLE))


def freeze_ungrouped(swept: Swept, groups: Sequence[Group]) -> None:
    """Freeze primitives of vectors that belong to no group, since no trained matrix has them."""
    known = np.zeros(len(swept.atoms), np.bool_)
    known[NOTHING] = True
    for group in groups:
        known[group.channels] = True
    for axis in (axis for weight in swept.weights if weight.is_vector for axes in weight.axes for axis in axes):
        parts = swept.atoms.parts(axis)
        if not known[parts].all():
            swept.atoms.freeze(parts[~known[parts]], Reason("structure", "", "runs through no matrix"))


def freeze_uneditable(swept: Swept) -> None:
    """Freeze or unite the axes whose sizes are named where they cannot be rewritten independently.

    Channels of grouped convolutions are united so that all groups stay equal, see `channels.balanced`.
    """
    _freeze_numbers_of_inputs(swept)
    while _one_round(swept) or (swept.recorder.balanced and balance(swept)):
        pass


def is_number(recorder: Recorder, use: Use) -> bool:
    """Return whether a slot takes sizes as numbers to compute with, for a result that inference does not know.

    Slots of size uses do not count: they name sizes or positions.
    """
    outputs = [use.scope.values.get(output) for output in use.scope.nodes[use.node].output]
    return not all(v is not None and v.values is not None for v in outputs) and use.key not in recorder.size_slots


def _freeze_numbers_of_inputs(swept: Swept) -> None:
    """Freeze axes whose sizes enter numbers that also depend on open sizes, such as a count of all elements.

    Such a number is part of the computed function and must not change, but no constant can replace it.
    """
    for scope in swept.folded.scope.walk():
        for name, value in scope.values.items():
            if not value.from_shape or value.values is None or value.is_static or scope.function:
                continue
            for use in scope.consumers.get(name, []):
                if is_number(swept.recorder, use):
                    node = use.scope.nodes[use.node]
                    reason = _about(node, "computes with a number derived from this size")
                    for axis in _sizes_in(swept, scope, name):
                        _freeze(swept.atoms, axis, reason)
                    break


def _sizes_in(swept: Swept, scope: Scope, name: str) -> Iterator[Axis]:
    """Yield the axes from whose sizes a value is computed."""
    todo, seen = [name], {name}
    while todo:
        value = scope.lookup(todo[-1])
        maker = scope.producers.get(todo.pop())
        if value is None or not value.from_shape:
            continue
        origins = value.each_origin()
        sizes = [origin for origin in origins if origin.role == Role.SIZES]
        for origin in sizes:
            for source, number in itertools.chain.from_iterable(swept.folded.factors(origin.source)):
                tensor = swept.tensor_of.get(source)
                if tensor is not None and tensor.axes is not None:
                    yield tensor.axes[number]
        if maker is not None and len(sizes) < len(origins):
            # The operand that shapes an output does not enter its elements.
            named = swept.recorder.size_slots
            slots = enumerate(scope.nodes[maker].input)
            inputs = {entry for slot, entry in slots if (scope.path, maker, slot) not in named}
            todo += inputs - seen
            seen |= inputs


def _one_round(swept: Swept) -> bool:
    """Freeze or unite axes once, and return whether that changed anything."""
    atoms, changed = swept.atoms, False
    sharing: dict[Origin, list[Axis]] = defaultdict(list)
    for size_use in swept.recorder.size_uses:
        live = [axis for axis in size_use.axes if not atoms.all_frozen(axis)]
        value = operand_value(size_use)
        if live and (reason := _uneditable(size_use, value)):
            for axis in live:
                atoms.freeze(axis, reason)
            changed = True
        elif value is not None and size_use.per_element and not value.is_static:
            changed |= _dynamic_list(swept, size_use, value, sharing)
    for axes in sharing.values():
        for other in axes[1:]:
            if not atoms.are_as_long(axes[0], other):
                atoms.unite(axes[0], other)
                changed = True
    return changed


def _uneditable(size_use: SizeUse, value: Value | None) -> Reason | None:
    node = size_use.scope.nodes[size_use.node]
    if size_use.scope.function:
        return _about(node, "names this size in a function that several nodes may call")
    if value is not None and value.weight is not None:
        return None  # whatever its size, it is read when it is rewritten
    if value is not None and value.value is None:
        return _about(node, "names this size in an operand computed from data")
    if value is not None and not value.is_static and not size_use.per_element:
        return _about(node, "has an operand that depends on the size of the input")
    return None


def _about(node: NodeProto, text: str) -> Reason:
    return Reason("operator", f"{node.op_type} {node.name or node.output[0]!r}", text)


def _dynamic_list(swept: Swept, size_use: SizeUse, value: Value, sharing: dict[Origin, list[Axis]]) -> bool:
    """Freeze or unite the axes of a shape operand that depends on open sizes; return whether that changed anything."""
    atoms, changed = swept.atoms, False
    node = size_use.scope.nodes[size_use.node]
    for element in elements(size_use, value):
        if element.origin.is_constant:
            if swept.folded.uses[element.origin.source].scope.function:
                changed |= _freeze(atoms, element.axis, Reason("structure", "", "names this size in a function"))
            sharing[element.origin].append(element.axis)
        elif atoms.all_frozen(element.axis):
            continue
        elif element.origin.role == Role.UNKNOWN:
            changed |= _freeze(atoms, element.axis, _about(node, "computes this size from that of the input"))
        else:
            for factors in swept.folded.factors(element.origin.source):
                changed |= _follow(swept, element, factors)
    return changed


def _freeze(atoms: Atoms, axis: Axis, reason: Reason) -> bool:
    if atoms.all_frozen(axis):
        return False
    atoms.freeze(axis, reason)
    return True


def _follow(swept: Swept, element: Element, factors: Sequence[tuple[Value, int]]) -> bool:
    """Unite an axis with the axes of other tensors that its size is computed from; return whether that changed it."""
    atoms, axes = swept.atoms, []
    for source, number in factors:
        tensor = swept.tensor_of.get(source)
        if tensor is None or tensor.axes is None:
            return _freeze(atoms, element.axis, Reason("structure", "", "is the size of a tensor that is not followed"))
        axes.append(tensor.axes[number])
    axis = atoms.product(*axes)
    if len(axis) != len(element.axis):
        return _freeze(atoms, element.axis, Reason("structure", "", "does not have the size that is computed for it"))
    if atoms.are_as_long(axis, element.axis):
        return False
    atoms.unite(axis, element.axis)
    return True
