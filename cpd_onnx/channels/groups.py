"""What combing finds: groups of coupled channels, where they lie, and why the rest is kept."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from onnx import TensorProto

from cpd_onnx.algebra.atoms import NOTHING, Atoms, Axis, Fingerprint, fingerprint
from cpd_onnx.algebra.reasons import Reason
from cpd_onnx.rules.api import FLOATS, Recorder, Tensor
from cpd_onnx.shapes.values import Folded, Scope, Use, Value
from cpd_onnx.summary import Summarised, Summary

QUANTIZED = {
    TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2FNUZ,
}  # fmt: skip  # a table
_MADE_UP = re.compile(r"^(onnx::|val_|_val|const|_*\d|\w*::\w*_\d+$)")
"""Initializer names that exporters invent; the node's name says more."""
_WORD = (1 << 64) - 1


@dataclass(frozen=True, eq=False)
class WeightUse:
    """One input slot that takes a weight, and the atoms of the weight as this slot sees it."""

    use: Use
    axes: list[Axis]


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant tensor of the model: an initializer or the output of a Constant node.

    Attributes:
        value: the tensor; its name is unique in its scope.
        scope: the graph that holds it.
        uses: the slots that take it. Vectors have atoms of their own in each, others share theirs.
        is_held: whether something that is not followed takes it as it is.

    """

    value: Value
    scope: Scope
    uses: tuple[WeightUse, ...]
    keeps_original: bool

    def __repr__(self) -> str:
        """One line, without its values."""
        return f"Weight({self.name!r}, {self.shape})"

    @property
    def name(self) -> str:
        """Its name, with the path of the subgraph that holds it."""
        return f"{self.scope.path}:{self.value.name}" if self.scope.path else self.value.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dims."""
        return self.value.shape or ()

    @property
    def is_float(self) -> bool:
        """Whether it is trained in floating point."""
        return self.value.dtype in FLOATS

    @property
    def is_trained(self) -> bool:
        """Whether it is a float weight or a quantised one."""
        return self.value.dtype in FLOATS or self.value.dtype in QUANTIZED

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @cached_property
    def is_vector(self) -> bool:
        """Whether at most one axis is longer than one."""
        return is_vector(self.value)

    @property
    def has_own_axes_per_use(self) -> bool:
        """Whether each use has atoms of its own: exporters give unrelated layers one vector if theirs are equal."""
        return self.is_vector and not self.scope.function

    @property
    def axes(self) -> list[list[Axis]]:
        """The sets of atoms that its uses see: one for each, or one for all; one at least."""
        return [use.axes for use in (self.uses if self.has_own_axes_per_use else self.uses[:1])]


def is_vector(value: Value) -> bool:
    """Whether a tensor has at most one axis that is longer than one."""
    return sum(size != 1 for size in value.shape or ()) <= 1


@dataclass(frozen=True, eq=False)
class Member:
    """An axis of a weight that a group runs through.

    `indices[k]` are the positions on the axis that go with the group's channel k.
    """

    weight: Weight
    axis: int
    indices: list[list[int]]


@dataclass(frozen=True, eq=False)
class Group:
    """Coupled channels that run through the same axes of the same tensors.

    Attributes:
        id: position in `Combed.groups`.
        name: after the first weight or node that it runs through.
        kind: "channels", "heads", "head_dim", "hidden", "groups".
        channels: the primitive atoms, one per coupled channel.

    """

    id: int
    name: str
    kind: str
    channels: Axis

    def __len__(self) -> int:
        """Number of coupled channels."""
        return len(self.channels)

    def __repr__(self) -> str:
        """One line, without the atoms."""
        return f"Group({self.id}, {self.name!r}, {self.kind!r}, {len(self)} channels)"


@dataclass(frozen=True)
class Frozen:
    """An axis of a weight with indices that are kept, and why."""

    tensor: str
    axis: int
    indices: int
    of: int
    reasons: tuple[Reason, ...]


@dataclass(slots=True)
class SeenAxis:
    """One axis, the positions at which tensors have it, and the first at which a trained matrix does."""

    axis: Axis
    positions: list[int]
    trained: int | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Swept:
    """What the sweep over a model leaves, before it is clear what has to stay and which channels belong together.

    Attributes:
        folded: the model with its shapes.
        atoms: the channel algebra after the sweep.
        recorder: what the rules left behind.
        tensors: atoms of every value, by scope path and name.
        weights: all constants in order of use.

    """

    folded: Folded
    atoms: Atoms
    recorder: Recorder
    tensors: Mapping[tuple[str, str], Tensor]
    weights: tuple[Weight, ...]

    @cached_property
    def axes(self) -> Sequence[SeenAxis]:
        """The axes of all tensors, weights last and in order of use; equal ones together.

        A channel that runs through vectors alone is a part of them that nobody looks at.
        What is made of constants counts as trained: some files make their weights by ConstantOfShape.
        """
        found: dict[Fingerprint, SeenAxis] = {}
        position = 0
        tensors = ((tensor.axes or [], tensor.value.is_generated_weight) for tensor in self.tensors.values())
        weights = (
            (axes, weight.is_trained and not weight.is_vector) for weight in self.weights for axes in weight.axes
        )
        for axes, is_trained in itertools.chain(tensors, weights):
            for axis in axes:
                key = fingerprint(axis)
                seen = found.get(key) or found.setdefault(key, SeenAxis(axis, []))
                seen.positions.append(position)
                if is_trained and seen.trained is None:
                    seen.trained = position
                position += 1
        return list(found.values())

    @cached_property
    def weight_of(self) -> dict[Value, Weight]:
        """The weights by their value."""
        return {weight.value: weight for weight in self.weights}

    @cached_property
    def tensor_of(self) -> dict[Value, Tensor]:
        """The tensors by their value."""
        return {tensor.value: tensor for tensor in self.tensors.values()}


@dataclass(frozen=True, eq=False, repr=False)
class Combed(Swept, Summarised):
    """The coupled channels of a model.

    Attributes:
        groups: the groups, in order of the graph.
        without_rule: operators that no rule covers, with a node name each.
        unaccounted: axes that a rule failed to account for (its defect; they were frozen).

    """

    groups: Sequence[Group]
    without_rule: Mapping[str, str]
    unaccounted: Sequence[str]

    def summary(self) -> Summary:
        """How much is coupled."""
        return Summary.of({
            "model": str(self.folded.original.path or self.folded.original.graph.name),
            "groups": str(len(self.groups)), "channels": str(sum(map(len, self.groups))),
            "weights": str(len(self.weights)),
        })  # fmt: skip  # a table

    def members(self, group: Group) -> list[Member]:
        """Where in the weights a group lies."""
        return self._members.get(group.id, [])

    @cached_property
    def owners(self) -> tuple[Axis, Axis]:
        """For each atom the id of its group and its place in it, -1 where it has none; do not write into them."""
        owner, rank = (np.full(len(self.atoms), -1, np.int64) for _ in range(2))
        for group in self.groups:
            owner[group.channels], rank[group.channels] = group.id, np.arange(len(group))
        return owner, rank

    @cached_property
    def _members(self) -> dict[int, list[Member]]:
        """The members of all groups, found in one pass over the weights."""
        owner, rank = self.owners
        found: dict[tuple[int, int, int], Member] = {}
        shared: dict[tuple[bytes, bytes], list[list[int]]] = {}
        for number, weight in enumerate(self.weights):
            for axes in weight.axes:
                for axis, atoms in enumerate(axes):
                    parts = self.atoms.parts(atoms)
                    owners = owner[parts]
                    for index in sorted(set(owners.ravel().tolist()) - {-1}) if parts.any() else ():
                        if (index, number, axis) not in found:
                            rows, columns = np.nonzero(owners == index)
                            places = rank[parts[rows, columns]]
                            key = (rows.tobytes(), places.tobytes())  # most members have the same ones
                            if key not in shared:
                                shared[key] = _listed(rows, places, len(self.groups[index]))
                            found[(index, number, axis)] = Member(weight, axis, shared[key])
        members: dict[int, list[Member]] = defaultdict(list)
        for (index, _, _), member in found.items():
            members[index].append(member)
        return dict(members)

    def dependency(self, group: Group) -> tuple[tuple[str, int, int], ...]:
        """The shape of a group's dependency: (operator, input slot, axis) of each weight that it runs through, sorted.

        Groups of one shape do the same in different places (Fang et al., Isomorphic Pruning, ECCV 2024).
        """
        slots = {
            (use.use.scope.path, use.use.node, use.use.slot, member.axis): use.use.scope.nodes[use.use.node].op_type
            for member in self.members(group)
            for use in member.weight.uses
        }
        return tuple(sorted((operator, slot, axis) for (_, _, slot, axis), operator in slots.items()))

    def frozen(self) -> list[Frozen]:
        """The axes of trained weights with indices that are kept, and why."""
        found: dict[tuple[str, int], Frozen] = {}
        for weight in self.weights:
            if not weight.is_trained:
                continue
            for axes in weight.axes:
                for axis, atoms in enumerate(axes):
                    frozen = int(self.atoms.is_frozen(atoms).sum())
                    if len(atoms) > 1 and frozen and (weight.name, axis) not in found:
                        reasons = tuple(self.atoms.reasons(atoms))
                        found[(weight.name, axis)] = Frozen(weight.name, axis, frozen, len(atoms), reasons)
        return list(found.values())

    def prunable_fraction(self) -> float:
        """Share of the trained weights that lie on a prunable axis.

        Weights of which every axis is fixed by a graph input or output alone do not count.
        """
        prunable = total = 0.0
        for weight in self.weights:
            axes = weight.axes[0]
            if not weight.is_trained or weight.size <= 1:
                continue
            frozen = float(np.prod([self.atoms.is_frozen(a).mean() for a in axes if len(a) > 1]))
            if frozen == 1.0 and self._only_interface(axes):
                continue
            total += weight.size
            prunable += weight.size * (1.0 - frozen)
        return prunable / total if total else 1.0

    def _only_interface(self, axes: list[Axis]) -> bool:
        reasons = [reason for axis in axes if len(axis) > 1 for reason in self.atoms.reasons(axis)]
        return all(reason.kind in ("interface", "no channels") for reason in reasons)


def _listed(rows: Axis, places: Axis, count: int) -> list[list[int]]:
    """For each channel its rows, in order."""
    rows = rows[np.argsort(places, kind="stable")]
    counts = np.bincount(places, minlength=count)
    if counts.min() == counts.max():
        listed: list[list[int]] = rows.reshape(count, -1).tolist()
        return listed
    return [part.tolist() for part in np.split(rows, np.cumsum(counts)[:-1])]


def grouped(swept: Swept) -> list[Group]:
    """Sort the surviving primitives by the tensor axes, and the places in their composites, that they run through."""
    atoms = swept.atoms
    signature = np.zeros(len(atoms), np.uint64)
    trained = np.zeros(len(atoms), np.bool_)
    first = np.full(len(atoms), np.iinfo(np.int64).max)
    for seen in swept.axes:
        parts = atoms.parts(seen.axis) if len(seen.axis) > 1 else np.zeros((1, 1), np.int64)
        for column in range(parts.shape[1] if parts.any() else 0):
            primitives = parts[:, column]
            # Of a primitive that comes several times, numpy adds to the first: a set is what is hashed.
            signature[primitives] += np.uint64(sum(_hashed(p, column) for p in seen.positions) & _WORD)
            if seen.trained is not None:
                trained[primitives] = True
                first[primitives] = np.minimum(first[primitives], seen.trained)
    trained[NOTHING] = False
    live = np.flatnonzero(trained)
    if not len(live):
        return []
    order = np.lexsort((live, signature[live], first[live]))
    live = live[order]
    cuts = np.flatnonzero(np.diff(signature[live]) != 0) + 1
    kinds = _kinds(swept)
    names = _names(swept)
    made: list[Group] = []
    for channels in np.split(live, cuts):
        lead = int(channels[0])
        made.append(
            Group(len(made), names.get(lead, f"group{len(made)}"), kinds.get(lead, "channels"), np.sort(channels))
        )
    return _uniquely_named(made)


def _hashed(position: int, column: int) -> int:
    """Sixty-four well mixed bits (splitmix64), the same in every run."""
    z = (16 * position + column + 1) * 0x9E3779B97F4A7C15 & _WORD
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _WORD
    return z ^ z >> 31


def _kinds(swept: Swept) -> dict[int, str]:
    kinds: dict[int, str] = {}
    for axis, kind in swept.recorder.labels:
        for primitive in set(swept.atoms.parts(axis).ravel().tolist()):
            if kind != "heads" or primitive not in kinds:
                kinds.setdefault(primitive, kind)
    return kinds


def _names(swept: Swept) -> dict[int, str]:
    """A name for each primitive: of the first trained weight, matrices before vectors, on its axis."""
    names: list[str] = []
    name_of = np.full(len(swept.atoms), -1, np.int64)
    for vectors in (False, True):
        for weight in swept.weights:
            if not weight.is_trained or weight.is_vector != vectors:
                continue
            for axes in weight.axes:
                for axis in axes:
                    parts = swept.atoms.parts(axis).ravel()
                    name_of[parts[name_of[parts] < 0]] = len(names)
            names.append(_speaking_name(weight))
    return {int(primitive): names[name_of[primitive]] for primitive in np.flatnonzero(name_of >= 0)}


def _speaking_name(weight: Weight) -> str:
    name = weight.name
    if _MADE_UP.match(weight.value.name) and weight.uses:
        use = weight.uses[0].use
        name = use.scope.nodes[use.node].name or name
    return re.sub(r"[./](weight|kernel|W|w)(:0)?$", "", name)


def _uniquely_named(groups: list[Group]) -> list[Group]:
    counts: dict[str, int] = defaultdict(int)
    made = []
    for group in groups:
        counts[group.name] += 1
        name = group.name if counts[group.name] == 1 else f"{group.name}#{counts[group.name]}"
        made.append(Group(group.id, name, group.kind, group.channels))
    return made
