"""Branches that disappear with the channels of whole groups, and what takes their place.

A tensor without any index on some axis cannot be stored: it is *lost*, and so is what is computed from it, up to the
nodes that sum over the missing axis. Their output is a *constant*: the bias alone, the same at all places. Elementwise
operators and matrix products of constants are constants as well. Where a constant meets a tensor that is computed from
the inputs, in a sum or a product, it becomes an initializer, and the branch is gone. Nothing has to know what a block
is: residual branches, attention, multilayer perceptrons, gates are all removed by the same few statements.

A group whose loss would spread to an output of the graph cannot be removed as a whole.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
from onnx import NodeProto

from cpd_onnx.algebra.atoms import NOTHING, Axis, Fingerprint, fingerprint
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.groups import Combed, Group
from cpd_onnx.ir.model import attributes_of
from cpd_onnx.ops.evaluate import Call, compute_outputs
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.rules.api import Remainder, Tensor
from cpd_onnx.shapes.order import all_inputs
from cpd_onnx.shapes.values import Scope, Shape, Value

_FIXED = ("training_mode", "broadcast")
"""Attributes with which an elementwise operator depends on more than the place, or aligns its inputs differently."""
_SHARED = "they share all axes with other channels"
"""Why a group cannot be removed as a whole without which all tensors exist."""
Gone: TypeAlias = frozenset[int]
"""Groups, by id, none of whose channels survives."""


@dataclass(frozen=True, eq=False)
class Branches:
    """What disappears from the main graph with all channels of some groups.

    Attributes:
        gone: The groups.
        roots: Nodes, by position, that sum over an axis of which nothing is left.
        constants: Nodes whose output is the same for every input, in the order of the graph, the roots among them; with
            the shape of that output, which has size 1 on each axis along which it does not vary.
        lost: Nodes whose output does not exist.
        unread: Nodes of whose output nothing reads any more.
        dead: The lost and unread nodes without those that compute weights, from which constants may be computed.
        entries: Input slots, as (node, slot), at which a constant meets a tensor that is computed from the inputs, or
            is dequantised for that.
        neutral: Those of them, not among `entries`, at which the constant is zero and is added: the node disappears,
            and what reads its output reads the other term.
        donors: Nodes that read sizes of a tensor which disappears, by position, with a tensor that has the same sizes.
        dropped: Input slots, likewise, of concatenations whose other inputs still exist.
        dequantised: Tensors that stay and are dequantised from constants, so that runtimes compute the sums that they
            enter in integers.
        obstacle: Why the groups cannot be removed as a whole; empty if they can.
    """

    gone: Gone
    roots: tuple[int, ...] = ()
    constants: Mapping[int, Shape] = field(default_factory=dict)
    lost: frozenset[int] = frozenset()
    unread: frozenset[int] = frozenset()
    dead: frozenset[int] = frozenset()
    entries: tuple[tuple[int, int], ...] = ()
    neutral: tuple[tuple[int, int], ...] = ()
    dropped: tuple[tuple[int, int], ...] = ()
    donors: Mapping[int, str] = field(default_factory=dict)
    dequantised: frozenset[str] = frozenset()
    obstacle: str = ""

    @cached_property
    def nodes(self) -> frozenset[int]:
        """Positions of all nodes that disappear."""
        return self.lost | self.unread | frozenset(self.constants) | {position for position, _ in self.neutral}


def gone_groups(combed: Combed, keep: KeepMask) -> Gone:
    """Return the groups of which no channel survives."""
    found = (group.id for group in combed.groups if not keep.surviving(group.channels[:, None]).any())
    return frozenset(found)


def with_last(combed: Combed, keep: KeepMask, gone: Gone) -> KeepMask:
    """Return a mask in which the first channel of each of these groups survives as well."""
    removed = np.flatnonzero(~keep.surviving(np.arange(len(combed.atoms))[:, None]))
    spared = [combed.groups[index].channels[:1] for index in sorted(gone)]
    return KeepMask(combed.atoms, np.setdiff1d(removed, np.concatenate([np.zeros(0, np.int64), *spared])))


def branches(combed: Combed, gone: Collection[int]) -> Branches:
    """Return what disappears with all channels of some groups."""
    return _finder(combed).run(frozenset(gone)) if gone else Branches(frozenset())


def removable_groups(combed: Combed) -> dict[int, Branches]:
    """Return the groups that can be removed as a whole, by id, with what disappears if each is removed alone."""
    finder = _finder(combed)
    if finder.removable is None:
        found = (finder.run(frozenset([group.id])) for group in combed.groups if finder.emptied(group))
        finder.removable = {next(iter(each.gone)): each for each in found if not each.obstacle}
    return finder.removable


def removable_together(combed: Combed) -> Gone:
    """Return groups that can all be removed as a whole at once: as many as are found in the order of the graph."""
    finder = _finder(combed)
    if finder.together is None:
        gone: set[int] = set()
        for index in removable_groups(combed):
            if not finder.run(frozenset(gone | {index})).obstacle:
                gone.add(index)
        finder.together = frozenset(gone)
    return finder.together


class Vanishing:
    """The groups with which each node of the main graph vanishes, alone."""

    def __init__(self, combed: Combed) -> None:
        """Find them."""
        self._finder = _finder(combed)
        self._with: dict[int, set[int]] = {}
        for index, each in removable_groups(combed).items():
            for position in each.nodes:
                self._with.setdefault(position, set()).add(index)

    def of_node(self, position: int, axes: Iterable[Axis] = ()) -> frozenset[int]:
        """Return the groups, by id, with which a node vanishes, except those without which one of the axes is empty."""
        found = frozenset(self._with.get(position, ()))
        return found.difference(*map(self._finder.emptying, axes)) if found else found

    def of_nodes(self, positions: Iterable[int], axes: Iterable[Axis] = ()) -> frozenset[int]:
        """Return the groups with each of which all of some nodes vanish, as `of_node` does."""
        axes = list(axes)
        found = [self.of_node(position, axes) for position in positions]
        return frozenset.intersection(*found) if found else frozenset()


_known: WeakKeyDictionary[Combed, _Finder] = WeakKeyDictionary()


def _finder(combed: Combed) -> _Finder:
    if combed not in _known:
        _known[combed] = _Finder(combed)
    return _known[combed]


@dataclass(eq=False)
class _Fates:
    """What becomes of tensors and nodes; those that are not mentioned stay."""

    constants: dict[int, Shape] = field(default_factory=dict)
    roots: list[int] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)
    entries: list[tuple[int, int]] = field(default_factory=list)
    dropped: list[tuple[int, int]] = field(default_factory=list)
    constant_names: dict[str, Shape] = field(default_factory=dict)
    readers_of_sizes: list[int] = field(default_factory=list)
    lost_names: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)


class _Finder:
    """Follows losses through the main graph; what bodies of nodes and functions read is never constant."""

    def __init__(self, combed: Combed) -> None:
        self.scope: Scope = combed.folded.scope
        self.remainders: Mapping[tuple[str, int], Remainder] = combed.recorder.remainders
        self.tensors: Mapping[tuple[str, str], Tensor] = combed.tensors
        self.inputs = [all_inputs(node) for node in self.scope.nodes]
        self.removable: dict[int, Branches] | None = None
        self.together: Gone | None = None
        self._emptying: dict[Fingerprint, Gone] = {}
        self._tensors_of: dict[int, list[str]] = {}
        self._tensors_of_many: list[tuple[str, frozenset[Gone]]] = []
        owner, _ = combed.owners
        owners = {fingerprint(each.axis): _owners(combed, owner, each.axis) for each in combed.axes}
        self._emptying = {key: frozenset.intersection(*found) for key, found in owners.items() if found}
        for (path, name), tensor in combed.tensors.items():
            if path:
                continue
            for axis in tensor.all_axes:
                for index in self.emptying(axis):
                    self._tensors_of.setdefault(index, []).append(name)
                if len(found := owners.get(fingerprint(axis), frozenset())) > 1:
                    self._tensors_of_many.append((name, found))

    def emptied(self, group: Group) -> Sequence[str]:
        """Return the tensors that do not exist without the group."""
        return self._tensors_of.get(group.id, [])

    def emptying(self, axis: Axis) -> frozenset[int]:
        """Return the groups without which nothing is left of an axis."""
        return self._emptying.get(fingerprint(axis), frozenset())

    def run(self, gone: Gone) -> Branches:
        """Return what disappears with some groups."""
        fates = _Fates()
        fates.lost_names = {name for index in gone for name in self._tensors_of.get(index, [])}
        if len(gone) > 1:  # an axis with channels of several groups, such as that of a concatenation
            fates.lost_names |= {name for name, owners in self._tensors_of_many if all(map(gone.intersection, owners))}
        lost_inputs = fates.lost_names.intersection(self.scope.inputs)
        if not fates.lost_names or lost_inputs:
            return Branches(gone, obstacle=f"input {min(lost_inputs)!r} would be gone" if lost_inputs else _SHARED)
        makers, readers = self.scope.producers, self._readers
        waiting = sorted(
            {makers[name] for name in fates.lost_names if name in makers}
            | {position for name in fates.lost_names for position in readers.get(name, ())}
        )
        heapq.heapify(waiting)
        seen: set[int] = set()
        while waiting:
            position = heapq.heappop(waiting)
            if position in seen:
                continue
            seen.add(position)
            if self._visit(position, gone, fates):
                for name in self.scope.nodes[position].output:
                    for reader in readers.get(name, ()):
                        heapq.heappush(waiting, reader)
        for name in self.scope.outputs:
            if name in fates.lost_names or name in fates.constant_names:
                return Branches(gone, obstacle=fates.reasons.get(name, f"output {name!r} would be gone"))
        return self._result(gone, fates)

    def _visit(self, position: int, gone: Gone, fates: _Fates) -> bool:
        """Decide what becomes of a node; return whether its readers have to be looked at."""
        node, remainder = self.scope.nodes[position], self.remainders.get(("", position))
        taken = self.inputs[position]
        is_emptied = any(name in fates.lost_names for name in node.output)
        if remainder is not None and not is_emptied and self.emptying(remainder.summed) & gone:
            fates.roots.append(position)
            self._make_constant(position, self._root_shape(node, remainder), fates)
            return True
        if traits_of(node).reads_sizes and taken & (fates.lost_names | fates.constant_names.keys()):
            fates.readers_of_sizes.append(position)
            return False
        if not is_emptied and traits_of(node).joins and (slots := self._dropped(node, gone, fates)):
            fates.dropped += [(position, slot) for slot in slots]
            return False
        if is_emptied or taken & fates.lost_names:
            reason = next((fates.reasons[name] for name in sorted(taken) if name in fates.reasons), "")
            if not is_emptied and not reason:
                reason = f"{_named(node)} needs at least one channel"
            self._lose(position, fates, reason)
            return True
        return bool(taken & fates.constant_names.keys()) and self._take_constants(position, fates)

    def _dropped(self, node: NodeProto, gone: Gone, fates: _Fates) -> list[int]:
        """Return the inputs that a concatenation loses, if all others stay as they are."""
        slots = [slot for slot, name in enumerate(node.input) if name in fates.lost_names]
        if not slots or fates.constant_names.keys() & set(node.input):
            return []
        axis = attributes_of(node).get("axis")
        for slot in slots:
            axes = self.tensors[("", node.input[slot])].axes
            if axis is None or axes is None or not self.emptying(axes[axis]) & gone:
                return []
        return slots if len(slots) < len(node.input) else []

    def _take_constants(self, position: int, fates: _Fates) -> bool:
        """Decide what becomes of a node with constant inputs; return whether its readers have to be looked at."""
        node = self.scope.nodes[position]
        if position in self.scope.bodies or self.inputs[position] != set(node.input):
            self._lose(position, fates, f"{_named(node)} reads it in a subgraph")
            return True
        data = node.input[:1] if traits_of(node).is_view else node.input
        live = [slot for slot, name in enumerate(data) if name and self._is_live(name, fates)]
        if not live:
            shape = self._constant_shape(position, fates)
            if shape is not None:
                self._make_constant(position, shape, fates)
            else:
                self._lose(position, fates, f"{_named(node)} depends on more than the channels at a place")
            return True
        slots = [slot for slot, name in enumerate(node.input) if name in fates.constant_names]
        if _is_elementwise(node) and self._keeps_shape(node, live):
            fates.entries += [(position, slot) for slot in slots]
            return False
        self._lose(position, fates, f"{_named(node)} does not take a constant")
        return True

    def _is_live(self, name: str, fates: _Fates) -> bool:
        value = self.scope.lookup(name)
        return name not in fates.constant_names and (value is None or value.constants is None)

    def _root_shape(self, node: NodeProto, remainder: Remainder) -> Shape:
        """Return the shape of what is left of a node that sums over an axis of which nothing is left."""
        tensor = self.tensors[("", node.output[0])]
        shape = [1] * tensor.rank
        if remainder.slot is not None and remainder.axis is None:
            value = self.scope.lookup(node.input[remainder.slot])
            own = (value and value.shape) or ()
            shape[len(shape) - len(own) :] = own
        else:
            axis = -1 if remainder.axis is None else remainder.axis
            shape[axis] = tensor.shape[axis]
        return tuple(shape)

    def _constant_shape(self, position: int, fates: _Fates) -> Shape | None:
        """Return the shape of the constant that a node computes from constants; None if it does not."""
        node, remainder = self.scope.nodes[position], self.remainders.get(("", position))
        known, out = fates.constant_names.get(node.input[0]), self.tensors.get(("", node.output[0]))
        if sum(map(bool, node.output)) != 1 or out is None or out.axes is None:
            return None
        if remainder is not None:
            return self._product_shape(node, remainder, known, out) if remainder.is_local else None
        if traits_of(node).is_view:
            return _viewed(known, self.scope.lookup(node.input[0]), out.value)
        return self._elementwise_shape(node, fates, out) if _is_elementwise(node) or self._has_one_scale(node) else None

    def _has_one_scale(self, node: NodeProto) -> bool:
        """Return whether a node quantises or dequantises all elements alike."""
        if not traits_of(node).is_quantizer:
            return False
        operands = [self.scope.lookup(name) for name in node.input[1:] if name]
        return all(each is not None and each.shape is not None and math.prod(each.shape) == 1 for each in operands)

    def _product_shape(self, node: NodeProto, remainder: Remainder, known: Shape | None, out: Tensor) -> Shape | None:
        """Return the shape of the product of a constant, which is complete along the axis that is summed over."""
        taken = self.tensors.get(("", node.input[0]))
        if known is None or taken is None:  # the constant is the second factor
            return None
        axes = [place for place, axis in enumerate(taken.axes or []) if axis is remainder.summed]
        if len(axes) != 1 or known[axes[0]] != taken.shape[axes[0]]:
            return None
        shape = [1] * out.rank
        shape[axes[0]] = out.shape[axes[0]]
        return tuple(shape) if sum(size != 1 for size in known) <= 1 else None

    def _elementwise_shape(self, node: NodeProto, fates: _Fates, out: Tensor) -> Shape | None:
        shapes = []
        for name in filter(None, node.input):
            value = self.scope.lookup(name)
            known = fates.constant_names.get(name, value.shape if value is not None else None)
            if known is None:
                return None
            shapes.append(known)
        if traits_of(node).moves_elements and not traits_of(node).selects_by_input:
            call = Call(attributes_of(node), self.scope.opset)
            moved = compute_outputs(node.op_type, call, [np.broadcast_to(np.zeros((), np.float32), shapes[0])])
            return None if moved is None else moved[0].shape
        if traits_of(node).stores_statistics:
            return shapes[0]
        try:
            shape = np.broadcast_shapes(*shapes)
        except ValueError:
            return None
        return shape if len(shape) == out.rank else None

    def _keeps_shape(self, node: NodeProto, live: Iterable[int]) -> bool:
        """Return whether the other inputs have the shape of the output, for all sizes of the graph's inputs."""
        out = self.scope.lookup(node.output[0])
        for slot in live:
            value = self.scope.lookup(node.input[slot])
            if (
                value is not None
                and out is not None
                and value.shapes is not None
                and (value.shapes, value.extents) == (out.shapes, out.extents)
                and not value.has_placeholder
            ):
                return True
        return False

    def _make_constant(self, position: int, shape: Shape, fates: _Fates) -> None:
        fates.constants[position] = shape
        fates.constant_names[self.scope.nodes[position].output[0]] = shape

    def _lose(self, position: int, fates: _Fates, reason: str) -> None:
        fates.lost.add(position)
        for name in filter(None, self.scope.nodes[position].output):
            fates.lost_names.add(name)
            if reason:
                fates.reasons.setdefault(name, reason)

    @cached_property
    def _readers(self) -> dict[str, list[int]]:
        """Nodes of the main graph that read each name, in their bodies too."""
        found: dict[str, list[int]] = {}
        for position, names in enumerate(self.inputs):
            for name in names:
                found.setdefault(name, []).append(position)
        return found

    def _result(self, gone: Gone, fates: _Fates) -> Branches:
        entries = [*dict.fromkeys(self._before_dequantising(*entry) for entry in fates.entries)]
        kept = fates.constants.keys() & {position for position, _ in entries}
        constants = {position: shape for position, shape in sorted(fates.constants.items()) if position not in kept}
        dropped = fates.lost | constants.keys()
        unread = self._unread(dropped, {*entries, *fates.dropped})
        entries = [entry for entry in entries if entry[0] not in unread]
        neutral = [entry for entry in entries if self._is_neutral(*entry, fates)]
        donors = {}
        for position in fates.readers_of_sizes:
            if position in unread:
                continue
            donor = self._donor(position, dropped | unread, fates)
            if donor is None:
                return Branches(gone, obstacle=f"{_named(self.scope.nodes[position])} reads sizes that it alone has")
            donors[position] = donor
        return Branches(
            gone, tuple(fates.roots), constants, frozenset(fates.lost), unread,
            frozenset(position for position in fates.lost | unread if not self._is_weight(position)),
            tuple(entry for entry in entries if entry not in neutral), tuple(neutral),
            tuple(entry for entry in fates.dropped if entry[0] not in unread), donors,
            frozenset(self.scope.nodes[position].output[0] for position in kept - unread),
        )  # fmt: skip  # its fields

    def _is_weight(self, position: int) -> bool:
        """Return whether a node computes weights."""
        values = (self.scope.lookup(name) for name in self.scope.nodes[position].output if name)
        return all(value is not None and value.constants is not None for value in values)

    def _donor(self, position: int, gone: Collection[int], fates: _Fates) -> str | None:
        """Return the last tensor before a node that has the sizes which the node reads of another; None without one."""
        node = self.scope.nodes[position]
        read, wanted = self._sizes_read(position, gone), self.tensors.get(("", node.input[0]))
        if wanted is None or wanted.axes is None:
            return None
        for maker in range(position - 1, -1, -1):
            if maker in gone or maker in fates.constants:
                continue
            for name in map(str, self.scope.nodes[maker].output):
                if self._has_sizes(name, wanted, read):
                    return name
        found = [name for name in self.scope.inputs if self._has_sizes(name, wanted, read)]
        return found[0] if found else None

    def _has_sizes(self, name: str, wanted: Tensor, read: Collection[int]) -> bool:
        """Return whether a tensor has the rank of another, and its size on some axes for all sizes of the inputs."""
        tensor = self.tensors.get(("", name))
        if tensor is None or tensor.axes is None or tensor.rank != wanted.rank:
            return False
        ours, theirs = tensor.value, wanted.value
        if ours.has_placeholder or theirs.has_placeholder or ours.shapes is None or theirs.shapes is None:
            return False
        for axis in read:
            if fingerprint(tensor[axis]) != fingerprint(wanted[axis]):
                return False
            if any(a[axis] != b[axis] for a, b in zip(ours.shapes, theirs.shapes, strict=True)):
                return False
            sizes = [value.sizes for value in (ours, theirs)]
            if sizes[0] is None or sizes[1] is None or sizes[0][axis] != sizes[1][axis]:
                return False
        return True

    def _sizes_read(self, position: int, gone: Collection[int]) -> set[int]:
        """Return the axes whose sizes are read from the output of a node by nodes that stay."""
        node = self.scope.nodes[position]
        value, taken = self.scope.lookup(node.output[0]), self.tensors[("", node.input[0])]
        call = Call(attributes_of(node), self.scope.opset)
        everything = np.arange(taken.rank)[slice(call.get("start", 0), call.get("end"))]
        if traits_of(node).multiplies_sizes or value is None:
            return set(range(taken.rank))
        found: set[int] = set()
        for reader in self._readers.get(node.output[0], ()):
            if reader in gone:
                continue
            own = self.scope.nodes[reader]
            operands = [self.scope.lookup(name) for name in own.input[1:]]
            picked = None
            is_picked = traits_of(own).moves_elements and own.input[0] == node.output[0] and not traits_of(own).joins
            if is_picked and all(each is not None and each.value is not None for each in operands):
                arrays = [everything, *(each.value for each in operands if each is not None)]
                picked = compute_outputs(own.op_type, Call(attributes_of(own), self.scope.opset), arrays)
            found.update((everything if picked is None else np.concatenate([p.ravel() for p in picked])).tolist())
        return found

    def _is_neutral(self, position: int, slot: int, fates: _Fates) -> bool:
        """Return whether a node adds a constant that is zero whatever the weights are."""
        node = self.scope.nodes[position]
        maker = self.scope.producers.get(node.input[slot])
        if maker not in fates.roots or not traits_of(node).is_sum or node.output[0] in self.scope.outputs:
            return False
        return self.remainders[("", maker)].slot is None

    def _before_dequantising(self, position: int, slot: int) -> tuple[int, int]:
        """Return where a constant enters that a node takes: at that node, or at the one that dequantises it."""
        maker = self.scope.producers[self.scope.nodes[position].input[slot]]
        traits = traits_of(self.scope.nodes[maker])
        return (maker, 0) if traits.is_quantizer and not traits.saturates else (position, slot)

    def _unread(self, dropped: Collection[int], entered: Collection[tuple[int, int]]) -> frozenset[int]:
        """Return further nodes of whose output nothing reads any more that was read before."""
        waiting = {name for position in dropped for name in self.inputs[position]}
        unread: set[int] = set()
        outputs = set(self.scope.outputs)
        while waiting:
            name = waiting.pop()
            maker = self.scope.producers.get(name)
            if maker is None or maker in dropped or maker in unread:
                continue
            names = [each for each in self.scope.nodes[maker].output if each]
            if not any(each in outputs or self._is_read(each, dropped, unread, entered) for each in names):
                unread.add(maker)
                waiting |= self.inputs[maker]
        return frozenset(unread)

    def _is_read(
        self, name: str, dropped: Collection[int], unread: Collection[int], entered: Collection[tuple[int, int]]
    ) -> bool:
        for position in self._readers.get(name, ()):
            if position in dropped or position in unread:
                continue
            slots = [slot for slot, taken in enumerate(self.scope.nodes[position].input) if taken == name]
            if not slots or any((position, slot) not in entered for slot in slots):
                return True
        return False


def _owners(combed: Combed, owner: Axis, axis: Axis) -> frozenset[Gone]:
    """Return the groups of the channels at each index of an axis; none if some index has none, as frozen ones do.

    Nothing is left of the axis without a group from each of these sets.
    """
    if not len(axis) or combed.atoms.all_frozen(axis):
        return frozenset()
    parts = combed.atoms.parts(axis)
    groups = np.unique(np.where(parts == NOTHING, -1, owner[parts]), axis=0)
    found = frozenset(frozenset(row) - {-1} for row in groups.tolist())
    return found if all(found) else frozenset()


def _viewed(known: Shape | None, value: Value | None, out: Value) -> Shape | None:
    """Return the shape of a constant that varies along one axis at most, where a node divides or merges axes."""
    if known is None or value is None or value.shapes is None or out.shapes is None or value.shape is None:
        return None
    varying = [place for place, size in enumerate(known) if size != 1]
    if len(varying) > 1 or any(known[place] != value.shape[place] for place in varying):
        return None
    shape = [1] * len(out.shapes[0])
    if not varying:
        return tuple(shape)
    for place in range(len(shape)):
        if all(
            before[varying[0] :][:1] == after[place:][:1]
            and math.prod(before[varying[0] + 1 :]) == math.prod(after[place + 1 :])
            for before, after in zip(value.shapes, out.shapes, strict=True)
        ):
            shape[place] = known[varying[0]]
            return tuple(shape)
    return None


def _is_elementwise(node: NodeProto) -> bool:
    attributes = attributes_of(node)
    return traits_of(node).is_local and not any(attributes.get(name) for name in _FIXED)


def _named(node: NodeProto) -> str:
    return f"{node.op_type} {node.name or node.output[0]!r}"
