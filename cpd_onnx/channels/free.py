"""Channels that cost nothing to remove, by the weights alone, and those that a rewrite of the weights could spare.

A channel is dead if no output of the model changes without it: wherever products are summed over it, each product that
reaches something alive has a factor zero. That is a liveness analysis backward from the outputs, in which channels that
are zero for every input (`Constants`) and weights that are zero carry nothing.

It is sound because the pruned model equals the original with the removed channels masked (`proof.masking`), and masks
act in sums of products only. By induction along the graph, each element without a dead channel is the same in both.
Channels on an axis that a node reduces otherwise (a mean, a variance) are alive, as the node depends on their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cpd_onnx.algebra.atoms import NOTHING, Axis, Mask
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.branches import branches, removable_groups
from cpd_onnx.channels.constant import Constants, nonzero
from cpd_onnx.channels.groups import Combed, Group, Member
from cpd_onnx.channels.weights import dequantized
from cpd_onnx.ir.model import Array
from cpd_onnx.rules.api import EVERY_AXIS, Factor

ALWAYS_ZERO = "zero for every input"
"""Reason: the channel's values are zero, whatever the input."""
UNREAD = "read by no weight that is not zero"
"""Reason: nothing that reaches an output depends on the channel."""


@dataclass(frozen=True)
class FreeChannels:
    """What is free in one group, as sorted positions in `Group.channels`.

    Attributes:
        zero: Dead channels whose values are zero for every input.
        unread: Other dead channels, which only weights of zero or other dead channels read.
        constant: Channels that are alive but the same number for every input: a bias could replace them.
        duplicate: Channels that are alive and computed by the same weights as an earlier one: the weights that read
            them could be added to those that read the earlier one.
    """

    zero: tuple[int, ...] = ()
    unread: tuple[int, ...] = ()
    constant: tuple[int, ...] = ()
    duplicate: tuple[int, ...] = ()

    @cached_property
    def dead(self) -> tuple[int, ...]:
        """Positions of all dead channels."""
        return tuple(sorted((*self.zero, *self.unread)))

    def reason(self, position: int) -> str:
        """Return why the channel at a position is dead."""
        return ALWAYS_ZERO if position in self.zero else UNREAD


def free_channels(combed: Combed) -> list[FreeChannels]:
    """Return what is free in each group of a model."""
    constants = Constants(combed)
    alive = _alive(combed, constants)
    zero, steady = _constant_primitives(combed, constants)
    found = []
    for group in combed.groups:
        dead = ~alive[group.channels]
        found.append(
            FreeChannels(
                _positions(dead & zero[group.channels]),
                _positions(dead & ~zero[group.channels]),
                _positions(~dead & steady[group.channels]),
                _positions(_duplicates(combed, group, ~dead & ~steady[group.channels])),
            )
        )
    return found


def removable(combed: Combed, free: Sequence[FreeChannels]) -> list[list[int]]:
    """Return the dead channels of each group.

    Of a group that is dead altogether, the first channel survives, unless the group can be removed as a whole.
    """
    found = [list(each.dead) for each in free]
    gone: list[int] = []
    for group, dead in zip(combed.groups, found, strict=True):
        if len(dead) < len(group):
            continue
        if group.id in removable_groups(combed) and not branches(combed, [*gone, group.id]).obstacle:
            gone.append(group.id)
        else:
            del dead[0]
    return found


def _positions(mask: Mask) -> tuple[int, ...]:
    return tuple(np.flatnonzero(mask).tolist())


def _constant_primitives(combed: Combed, constants: Constants) -> tuple[Mask, Mask]:
    """Return which primitives are zero, and which are constant, in some factor of a sum of products."""
    zero, steady = (np.zeros(len(combed.atoms), np.bool_) for _ in range(2))
    for product in combed.recorder.products:
        for factor in product:
            for p, value in constants.known.get(factor.value, {}).items():
                (zero if value == 0 else steady)[p] = True
    return zero, steady & ~zero


@dataclass(frozen=True, eq=False)
class _Reader:
    """A factor of a sum of products whose zeros mask channels.

    Attributes:
        parts: Primitives of each index of the summed axis.
        zero: Indices at which another factor is zero, for every input.
        other: Primitives of the other axes that can shrink.
        filled: Which elements are not zero, over the summed axis and then `other`; None if all may be nonzero.
    """

    parts: Axis
    zero: Mask
    other: tuple[Axis, ...]
    filled: Mask | None

    def reads(self, alive: Mask) -> Axis:
        """Return the primitives whose products reach an element that is alive."""
        masks = [np.asarray((alive[parts] | (parts == NOTHING)).all(axis=1)) for parts in self.other]
        if self.filled is None:
            read: Mask = np.full(len(self.parts), all(bool(mask.any()) for mask in masks))
        else:
            read = self.filled
            for mask in reversed(masks):
                read = np.asarray(read[..., mask].any(axis=-1))
        return self.parts[read & ~self.zero].ravel()


def _alive(combed: Combed, constants: Constants) -> Mask:
    """Return for each primitive whether an output may depend on it."""
    alive = np.zeros(len(combed.atoms), np.bool_)
    alive[_of_counted_axes(combed)] = True
    alive[_of_unread_masks(combed, constants)] = True
    readers = [
        reader for product in reversed(combed.recorder.products) for reader in _readers(combed, constants, product)
    ]
    before = -1
    while before != (now := int(alive.sum())):
        before = now
        for reader in readers:
            alive[reader.reads(alive)] = True
    return alive


def _of_counted_axes(combed: Combed) -> Axis:
    """Return the primitives on tensors of nodes whose result depends on the number of indices."""
    scopes = {scope.path: scope for scope in combed.folded.scope.walk()}
    at_slot = {use.use.key: use.axes for weight in combed.weights for use in weight.uses}
    axes: list[Axis] = []
    for path, position in combed.recorder.count_dependent:
        node = scopes[path].nodes[position]
        for name in filter(None, (*node.input, *node.output)):
            value = scopes[path].lookup(name)
            tensor = combed.tensor_of.get(value) if value is not None else None
            axes += (tensor.axes if tensor is not None else None) or []
        for slot in range(len(node.input)):
            axes += at_slot.get((path, position, slot), [])
    return np.concatenate([np.zeros(0, np.int64), *(combed.atoms.parts(axis).ravel() for axis in axes)])


def _of_unread_masks(combed: Combed, constants: Constants) -> Axis:
    """Return the primitives that are masked in products of two activations of which neither is zero there."""
    scopes = {scope.path: scope for scope in combed.folded.scope.walk()}
    found = [np.zeros(0, np.int64)]
    for (path, position), slots in combed.recorder.masked_slots.items():
        for slot, place in slots:
            value = scopes[path].lookup(scopes[path].nodes[position].input[slot])
            tensor = combed.tensor_of.get(value) if value is not None else None
            if value is None or tensor is None or tensor.axes is None:
                continue
            zero = constants.zeros(value) | _zero_elsewhere(combed, constants, Factor(value, place, tensor.axes[place]))
            parts = combed.atoms.parts(tensor.axes[place])
            found.append(parts[~np.isin(parts, list(zero)).any(axis=1)].ravel())
    return np.concatenate(found)


def _zero_elsewhere(combed: Combed, constants: Constants, masked: Factor) -> set[int]:
    """Return the primitives at which every sum of products that a factor leads has another factor that is zero."""
    products = [p for p in combed.recorder.products if p[0].value is masked.value and p[0].axis == masked.axis]
    zeros = [_zeros(combed, constants, product[1:]) for product in products]
    return set.intersection(*zeros) if zeros else set()


def _zeros(combed: Combed, constants: Constants, factors: Sequence[Factor]) -> set[int]:
    """Return the primitives of the summed axes of some factors at which one of them is zero."""
    held = (set(combed.atoms.parts(f.atoms).ravel().tolist()) & constants.zeros(f.value) for f in factors)
    return set().union(*held) - {NOTHING}


def _readers(combed: Combed, constants: Constants, product: Sequence[Factor]) -> Iterator[_Reader]:
    """Yield the weights of a sum of products, with what they read."""
    atoms = combed.atoms
    for factor in product:
        axes = _axes(combed, factor)
        if not factor.value.moved or axes is None or atoms.all_frozen(factor.atoms):
            continue
        parts = atoms.parts(factor.atoms)
        zeros = _zeros(combed, constants, [f for f in product if f is not factor])
        summed = _summed_axes(combed, product, factor)
        shrinking = [i for i, axis in enumerate(axes) if i not in summed and not atoms.all_frozen(axis)]
        other = tuple(atoms.parts(axes[i]) for i in shrinking)
        filled = _filled(constants.array(factor.value), factor.axis, shrinking)
        zero: Mask = np.asarray(np.isin(parts, list(zeros)).any(axis=1))
        yield _Reader(parts, zero, other, filled if filled is None or len(filled) == len(parts) else None)


def _summed_axes(combed: Combed, product: Sequence[Factor], factor: Factor) -> set[int]:
    """Return the axes of a factor that the same node may sum over, several for an Einsum: no output has them."""
    together = (other for other in combed.recorder.products if other[0].value is product[0].value)
    return {each.axis for other in together for each in other if each.value is factor.value}


def _axes(combed: Combed, factor: Factor) -> list[Axis] | None:
    """Return the axes of a factor at the node that sums; None if they are not known."""
    weight = combed.weight_of.get(factor.value)
    if weight is None:
        tensor = combed.tensor_of.get(factor.value)
        return tensor.axes if tensor is not None else None
    axes = list(weight.uses[0].axes if weight.uses else weight.axes[0])
    axes[factor.axis] = factor.atoms  # that of this use, where vectors have separate ones
    return axes


def _filled(array: Array | None, summed: int, shrinking: Sequence[int]) -> Mask | None:
    """Return which elements are not zero over the summed axis and others, anywhere along the rest; None if all are."""
    if array is None:
        return None
    filled = nonzero(array)
    if filled.all():
        return None
    rest = tuple(i for i in range(array.ndim) if i != summed and i not in shrinking)
    kept = [i for i in range(array.ndim) if i not in rest]
    filled = np.moveaxis(np.asarray(filled.any(axis=rest)), kept.index(summed), 0)
    return None if filled.all() else np.ascontiguousarray(filled)


def _duplicates(combed: Combed, group: Group, among: Mask) -> Mask:
    """Return which channels are computed by the same weights as an earlier one among those of a group."""
    made = [member for member in combed.members(group) if _computes(combed, member)]
    found = np.zeros(len(group), np.bool_)
    if not any(not member.weight.is_vector for member in made):
        return found
    if any(combed.is_divided(member.weight.axes[0]) for member in made):
        return found  # rows of several groups read different channels
    arrays = [np.moveaxis(dequantized(combed, member.weight), member.axis, 0) for member in made]
    sums = [array.reshape(len(array), -1).sum(axis=1, dtype=np.float64) for array in arrays]
    alike: dict[tuple[float, ...], list[int]] = {}
    for position in np.flatnonzero(among).tolist():
        key = tuple(each[index] for each, member in zip(sums, made, strict=True) for index in member.indices[position])
        alike.setdefault(key, []).append(position)
    for positions in (each for each in alike.values() if len(each) > 1):
        seen = set()
        for position in positions:
            rows = tuple(a[m.indices[position]].tobytes() for a, m in zip(arrays, made, strict=True))
            found[position] = rows in seen
            seen.add(rows)
    return found


def _computes(combed: Combed, member: Member) -> bool:
    """Return whether a weight computes the channels on its axis, rather than reading them."""
    axes = combed.recorder.kernels.get(member.weight.value.name, set())
    return member.weight.is_trained and member.axis not in axes and EVERY_AXIS not in axes


def keep_without(combed: Combed, positions: Sequence[Sequence[int]]) -> KeepMask:
    """Return the mask of what survives without the channels at some positions of each group."""
    gone = [group.channels[list(own)] for group, own in zip(combed.groups, positions, strict=True)]
    return KeepMask(combed.atoms, np.concatenate([np.zeros(0, np.int64), *gone]).astype(np.int64))
