"""What has to stay: positions, last channels, and operands that name sizes and cannot be rewritten.

An operand may be a constant, computed from constants, or computed from the sizes of other tensors. Constants are
edited where they enter the computation; what follows from sizes follows by itself; an operand that is the same
whatever the inputs can in the end be written down.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from cpd_onnx.algebra.atoms import NOTHING, Atoms, Axis
from cpd_onnx.algebra.reasons import Reason
from cpd_onnx.channels.groups import Group, Swept
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.rules.api import Recorder, SizeUse
from cpd_onnx.rules.reduce import POSITION_USERS
from cpd_onnx.shapes.values import Origin, Role, Scope, Use, Value


@dataclass(frozen=True, eq=False)
class Element:
    """One size in an operand: its position, the axis that it is the size of, and where it comes from."""

    position: int
    axis: Axis
    origin: Origin


def operand_value(size_use: SizeUse) -> Value | None:
    """The value at a demand's slot; None if the slot is empty or it is an attribute."""
    if isinstance(size_use.slot, str):
        return None
    node = size_use.scope.nodes[size_use.node]
    if size_use.slot >= len(node.input) or not node.input[size_use.slot]:
        return None
    return size_use.scope.lookup(node.input[size_use.slot])


def elements(size_use: SizeUse, value: Value) -> Iterator[Element]:
    """The elements of a list of sizes that are the size of their axis."""
    assert value.value is not None
    origins = value.each_origin()
    for position, (axis, old) in enumerate(zip(size_use.axes, value.value.ravel().tolist(), strict=True)):
        if old == len(axis):
            yield Element(position, axis, origins[position])


def freeze_positions(swept: Swept) -> None:
    """Freeze axes that somebody counts along, unless who uses the positions counts along the same axes."""
    for scope, name, axis, within in swept.recorder.positions:
        if not swept.atoms.all_frozen(axis) and not _stays_a_position(scope, name, within):
            swept.atoms.freeze(axis, Reason("structure", "", f"is counted along by {name!r}"))


def _stays_a_position(scope: Scope, name: str, within: Value | None) -> bool:
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
            waiting += [made for made in node.output if made not in seen]
            seen.update(node.output)
    return True


def freeze_last_channels(swept: Swept) -> None:
    """Freeze channels without which some axis would be empty."""
    for axis in (seen.axis for seen in swept.axes):
        if len(axis) < 1 or (len(axis) == 1 and axis[0] == NOTHING):
            continue
        parts = swept.atoms.parts(axis)
        if parts.shape[1] == 1 and parts[0, 0] != parts[-1, 0]:
            continue
        # What every index hangs on, the first and the last do too.
        for primitive in set(parts[0].tolist()).intersection(parts[-1].tolist()) - {NOTHING}:
            if bool((parts == primitive).any(axis=1).all()):
                swept.atoms.freeze(np.asarray([primitive]), Reason("structure", "", "can only go as a whole"))


def freeze_ungrouped(swept: Swept, groups: Sequence[Group]) -> None:
    """Freeze what is left on the weights' axes: parts of vectors that no matrix has to do with."""
    known = np.zeros(len(swept.atoms), np.bool_)
    known[NOTHING] = True
    for group in groups:
        known[group.channels] = True
    for axis in (axis for weight in swept.weights if weight.is_vector for axes in weight.axes for axis in axes):
        parts = swept.atoms.parts(axis)
        if not known[parts].all():
            swept.atoms.freeze(parts[~known[parts]], Reason("structure", "", "runs through no matrix"))


def freeze_uneditable(swept: Swept) -> None:
    """Freeze, or unite, the axes whose sizes stand where they cannot be rewritten one by one."""
    _freeze_numbers_of_inputs(swept)
    while _one_round(swept):
        pass


def is_number(recorder: Recorder, use: Use) -> bool:
    """Whether a slot takes sizes as numbers to compute with, so that what is made of them is not known beforehand.

    Demands apart, which name sizes or positions.
    """
    made = [use.scope.values.get(output) for output in use.scope.nodes[use.node].output]
    return not all(v is not None and v.values is not None for v in made) and use.key not in recorder.size_slots


def _freeze_numbers_of_inputs(swept: Swept) -> None:
    """Freeze what numbers are computed from that depend on the sizes of the inputs too, as a count of all elements.

    They belong to the function and must stay as they are, but cannot be written down.
    """
    for scope in swept.folded.scope.walk():
        for name, value in scope.values.items():
            if not value.from_shape or value.values is None or value.is_static or scope.function:
                continue
            for use in scope.consumers.get(name, []):
                if is_number(swept.recorder, use):
                    node = use.scope.nodes[use.node]
                    reason = _about(node, "computes with a number made of this size")
                    for axis in _sizes_in(swept, scope, name):
                        _freeze(swept.atoms, axis, reason)
                    break


def _sizes_in(swept: Swept, scope: Scope, name: str) -> Iterator[Axis]:
    """The axes of whose sizes a value is computed."""
    todo, seen = [name], {name}
    while todo:
        value = scope.lookup(todo[-1])
        maker = scope.producers.get(todo.pop())
        if value is None or not value.from_shape:
            continue
        origins = value.each_origin()
        sizes = [origin for origin in origins if origin.role == Role.SIZES]
        for origin in sizes:
            for source, number in swept.folded.products[origin.source]:
                tensor = swept.tensor_of.get(source)
                if tensor is not None and tensor.axes is not None:
                    yield tensor.axes[number]
        if maker is not None and len(sizes) < len(origins):
            # A shape that an operator gives its output is no part of the elements.
            named = swept.recorder.size_slots
            slots = enumerate(scope.nodes[maker].input)
            inputs = {entry for slot, entry in slots if (scope.path, maker, slot) not in named}
            todo += inputs - seen
            seen |= inputs


def _one_round(swept: Swept) -> bool:
    """Whether something had to be frozen or united."""
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
            if not np.array_equal(atoms.canonical(axes[0]), atoms.canonical(other)):
                atoms.unite(axes[0], other)
                changed = True
    return changed


def _uneditable(size_use: SizeUse, value: Value | None) -> Reason | None:
    node = size_use.scope.nodes[size_use.node]
    if size_use.scope.function:
        return _about(node, "names this size in a function that several nodes may call")
    if value is not None and value.value is None:
        return _about(node, "names this size in an operand computed from data")
    if value is not None and not value.is_static and not size_use.per_element:
        return _about(node, "has an operand that depends on the size of the input")
    return None


def _about(node: NodeProto, text: str) -> Reason:
    return Reason("operator", f"{node.op_type} {node.name or node.output[0]!r}", text)


def _dynamic_list(swept: Swept, size_use: SizeUse, value: Value, sharing: dict[Origin, list[Axis]]) -> bool:
    """A list of sizes of which some depend on the inputs."""
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
            changed |= _follow(swept, element)
    return changed


def _freeze(atoms: Atoms, axis: Axis, reason: Reason) -> bool:
    if atoms.all_frozen(axis):
        return False
    atoms.freeze(axis, reason)
    return True


def _follow(swept: Swept, element: Element) -> bool:
    """The size is that of other tensors' axes, which must then have the same fate."""
    atoms, axes = swept.atoms, []
    for source, number in swept.folded.products[element.origin.source]:
        tensor = swept.tensor_of.get(source)
        if tensor is None or tensor.axes is None:
            return _freeze(atoms, element.axis, Reason("structure", "", "is the size of a tensor that is not followed"))
        axes.append(tensor.axes[number])
    axis = atoms.product(*axes)
    if len(axis) != len(element.axis):
        return _freeze(atoms, element.axis, Reason("structure", "", "is not the size that it is taken for"))
    if np.array_equal(atoms.canonical(axis), atoms.canonical(element.axis)):
        return False
    atoms.unite(axis, element.axis)
    return True
