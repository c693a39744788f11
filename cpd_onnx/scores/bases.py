"""Bases: linear combinations of channels that take their place before some are removed.

Where channels are only added, moved and multiplied by weights, an invertible matrix may be multiplied into the weights
that make them and its inverse into those that consume them, and the outputs stay the same. If the combinations that
matter most to the consumers come first, then the last ones cost less than any channels would (as Ashkboos et al.,
SliceGPT, ICLR 2024, do with the hidden state of language models). Such groups are called mixable here: the narrow
tensors of inverted residuals, the values of attention heads, projections without an activation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from onnx import NodeProto

from cpd_onnx.algebra.atoms import Axis, Mask
from cpd_onnx.channels.groups import Combed, Group
from cpd_onnx.fitting.least_squares import Matrix
from cpd_onnx.fitting.output_error import output_error, outputs_of
from cpd_onnx.fitting.units import Unit, units_of
from cpd_onnx.ir.model import Model
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.runtime.sessions import Feed

_LARGEST_ERROR = 1e-6
"""Maximum error of the outputs in another basis, relative to their variance: that of rounding (heuristic)."""
_SMALLEST_GAIN = 1e-3
"""Minimum factor after a weight, relative to the largest, by which its outputs can be divided (heuristic)."""


@dataclass(frozen=True, eq=False)
class Side:
    """A weight that makes or takes the channels of a group.

    Attributes:
        unit: The weight and its node.
        places: Outputs of the weight, or indices of the axis that it sums over, for each channel [copies, channels];
            copies are heads, for example, which share their channels but not their combinations.
    """

    unit: Unit
    places: Axis

    @property
    def features(self) -> Axis:
        """Features of each channel where the weight takes it [copies, taps, channels]."""
        taps = self.unit.linear.taps
        return np.asarray(self.places[:, None, :] * taps + np.arange(taps)[:, None])


@dataclass(frozen=True, eq=False)
class Mixable:
    """A group whose channels may be replaced by linear combinations of them.

    Attributes:
        group: The group.
        makers, takers: Weights that make and take its channels.
    """

    group: Group
    makers: tuple[Side, ...]
    takers: tuple[Side, ...]

    @property
    def copies(self) -> int:
        """Number of bases: one for each copy of the channels that a weight makes."""
        return len(self.makers[0].places)

    def copy_at(self, number: int) -> int:
        """Return the basis of a copy of the channels; all copies of channels that are made once have the same."""
        return number if self.copies > 1 else 0


def combinations(moments: Sequence[Matrix], weights: Sequence[Matrix]) -> Matrix:
    """Return combinations of channels, those that matter most to the weights first [combinations, channels].

    They are orthogonal under the mean of the moments. Where all moments are alike, the error of the products that
    remains without the last ones is the least possible.

    Args:
        moments: Second moments of the channels where each weight takes them [channels, channels].
        weights: The weights, relative to the deviation of their products [channels, outputs].
    """
    scales = [np.trace(each) / len(each) for each in moments]
    mean = sum(each / scale for each, scale in zip(moments, scales, strict=True)) / len(moments)
    root = np.linalg.cholesky(mean)
    through = root.T @ np.concatenate(weights, axis=1)
    _, vectors = np.linalg.eigh(through @ through.T)
    return np.asarray(np.linalg.solve(root.T, vectors[:, ::-1]).T)


def changed(combed: Combed, bases: Mapping[Mixable, Matrix]) -> tuple[Model, list[str]]:
    """Return a copy of the model with groups in other bases, and the names of the weights that differ.

    Args:
        combed: The model and its coupled channels.
        bases: Invertible matrices for each copy [copies, combinations, channels].
    """
    model = combed.folded.model.copy()
    names: set[str] = set()
    for mixable, matrices in bases.items():
        for side in mixable.makers:
            matrix, shift = side.unit.matrix(model), side.unit.shift
            change = np.zeros(len(shift))
            for number, places in enumerate(side.places):
                basis, gain = matrices[mixable.copy_at(number)], side.unit.gain[places]
                matrix[0][:, places] = (matrix[0][:, places] * gain) @ basis.T / gain
                change[places] = basis @ shift[places] - shift[places]
            side.unit.store(model, matrix)
            names.add(side.unit.weight)
            if side.unit.bias is not None:
                side.unit.bias.add(model, change)
                names.add(side.unit.bias.name)
        for side in mixable.takers:
            matrix = side.unit.matrix(model)
            for number, places in enumerate(side.features):
                inverse = np.linalg.inv(matrices[mixable.copy_at(number)])
                for rows in places:
                    matrix[0][rows] = inverse.T @ matrix[0][rows]
            side.unit.store(model, matrix)
            names.add(side.unit.weight)
    return model, sorted(names)


def first_survive(basis: Matrix, survives: Mask) -> Matrix:
    """Return a basis [copies, combinations, channels] whose first combinations are where channels survive."""
    order = np.empty(len(survives), np.int64)
    order[np.concatenate([np.flatnonzero(survives), np.flatnonzero(~survives)])] = np.arange(len(survives))
    return np.asarray(basis[:, order])


_known: WeakKeyDictionary[Combed, dict[int, Mixable]] = WeakKeyDictionary()
_confirmed: WeakKeyDictionary[Combed, dict[int, Mixable]] = WeakKeyDictionary()


def mixable_groups(combed: Combed) -> dict[int, Mixable]:
    """Return the mixable groups of a model by id, by the traits of its operators."""
    if combed not in _known:
        _known[combed] = _Finder(combed).run()
    return _known[combed]


def confirmed_groups(combed: Combed, feeds: Sequence[Feed]) -> dict[int, Mixable]:
    """Return the mixable groups that can be in a random basis without another output for the first of some feeds.

    Raises UnsupportedError if onnxruntime cannot run the model.
    """
    if combed not in _confirmed:
        found = mixable_groups(combed)
        is_run = bool(found) and not combed.folded.model.is_over_limit
        _confirmed[combed] = _unchanging(combed, found, feeds[:1]) if is_run else {}
    return _confirmed[combed]


def _unchanging(combed: Combed, found: dict[int, Mixable], feeds: Sequence[Feed]) -> dict[int, Mixable]:
    """Return the groups of which all, or else each alone, can be in a random basis."""
    wanted = list(outputs_of(combed.folded.model, feeds))

    def is_same(some: Iterable[Mixable]) -> bool:
        model, _ = changed(combed, {mixable: _random(mixable) for mixable in some})
        return output_error(wanted, outputs_of(model, feeds)) <= _LARGEST_ERROR

    if is_same(found.values()):
        return found
    return {index: mixable for index, mixable in found.items() if is_same([mixable])}


def _random(mixable: Mixable) -> Matrix:
    """Return orthogonal matrices, the same in each run."""
    size = len(mixable.group)
    numbers = np.random.default_rng(mixable.group.id).standard_normal((mixable.copies, size, size))
    return np.asarray(np.linalg.qr(numbers)[0])


class _Finder:
    """Finds mixable groups: every node that touches one makes, takes or moves its channels, or adds them."""

    def __init__(self, combed: Combed) -> None:
        self.combed, self.scope = combed, combed.folded.scope
        self.owner, self.rank = combed.owners
        found = units_of(combed.folded).found
        units = [unit for unit in found if unit.is_float and not unit.is_inner and unit.stored.moved is None]
        self.at = {unit.position: unit for unit in units}
        self.chains = {unit: list(self.chain(unit)) for unit in units}
        self.maker = {position: unit for unit, positions in self.chains.items() for position in positions}

    def chain(self, unit: Unit) -> Iterator[int]:
        """Yield the positions of the nodes from a weight's product to the end of the affine chain after it."""
        position = unit.position
        yield position
        while (name := self.scope.nodes[position].output[0]) != unit.end:
            (use,) = self.scope.consumers[name]
            position = use.node
            yield position

    def run(self) -> dict[int, Mixable]:
        where = self.where()
        found = ((group.id, self.mixable(group, where[group.id])) for group in self.combed.groups)
        return {index: mixable for index, mixable in found if mixable is not None}

    def where(self) -> Mapping[int, dict[tuple[str, str], set[int]]]:
        """Return the tensors that each group is on, by scope and name, with their axes."""
        found: dict[int, dict[tuple[str, str], set[int]]] = defaultdict(dict)
        for key, tensor in self.combed.tensors.items():
            for place, axis in enumerate(tensor.axes or ()):
                if len(axis) > 1:
                    for index in np.unique(self.owner[self.combed.atoms.parts(axis)]).tolist():
                        found[index].setdefault(key, set()).add(place)
        return found

    def mixable(self, group: Group, where: Mapping[tuple[str, str], set[int]]) -> Mixable | None:
        """Return a group with the weights that make and take it; None if it is used otherwise, or has one channel."""
        if len(group) < 2 or any(path or len(axes) > 1 for (path, _), axes in where.items()):
            return None
        on = {name: next(iter(axes)) for (_, name), axes in where.items()}
        uses = [use for name in on for use in self.scope.consumers.get(name, ())]
        nodes = {*(self.scope.producers.get(name, -1) for name in on), *(use.node for use in uses)}
        if (
            -1 in nodes
            or any(use.scope is not self.scope for use in uses)
            or not on.keys().isdisjoint(self.scope.outputs)
        ):
            return None
        makers, takers = (list[tuple[Unit, Axis | None]]() for _ in range(2))
        for position in sorted(nodes):
            unit, made = self.at.get(position), self.maker.get(position)
            takes, makes = unit is not None and unit.data in on, made is not None and made.end in on
            if unit is not None and takes:
                takers.append((unit, self.places(group, unit.data, on, unit.linear.in_axis)))
            if unit is not None and makes:
                makers.append((unit, self.places(group, unit.end, on, unit.linear.out_axis)))
            if not takes and not makes and not self.is_moved(self.scope.nodes[position], on):
                return None
        sides = ([Side(unit, at) for unit, at in some if at is not None] for some in (makers, takers))
        return self.complete(group, *sides) if all(at is not None for _, at in (*makers, *takers)) else None

    def places(self, group: Group, name: str, on: Mapping[str, int], axis: int) -> Axis | None:
        """Return the indices of a group's channels [copies, channels] on an axis; None unless all have equally many."""
        axes = self.combed.tensors[("", name)].axes or []
        if on[name] != axis % len(axes):
            return None
        parts = self.combed.atoms.parts(axes[on[name]])
        rows, columns = np.nonzero(self.owner[parts] == group.id)
        channel = self.rank[parts[rows, columns]]
        each = np.bincount(channel, minlength=len(group))
        if each.min() != each.max() or len(np.unique(rows)) < len(rows):
            return None
        return rows[np.argsort(channel, kind="stable")].reshape(len(group), -1).T

    def is_moved(self, node: NodeProto, on: Mapping[str, int]) -> bool:
        """Return whether a node moves, averages or adds the channels of a group, or only reads sizes."""
        traits, given = traits_of(node), [name in on for name in node.input]
        if traits.reads_sizes:
            return True
        if not any(name in on for name in node.output):
            return False
        if traits.is_additive:
            return all(given) or traits.moves_elements
        return (traits.is_linear and given[0] and sum(given) == 1) or (traits.is_bilinear and sum(given) == 1)

    def complete(self, group: Group, makers: Sequence[Side], takers: Sequence[Side]) -> Mixable | None:
        """Return a group with both sides if they have all of its weights and can be changed, else None."""
        if not makers or not takers:
            return None
        copies = {len(side.places) for side in makers}
        if len(copies) > 1 or (copies != {1} and {len(side.places) for side in takers} != copies):
            return None
        sides = (*makers, *takers)
        if any(side.unit.matrix(self.combed.folded.model).shape[0] > 1 for side in sides):
            return None
        known = {side.unit.weight for side in sides}
        known |= {n for side in makers for place in self.chains[side.unit] for n in self.scope.nodes[place].input}
        members = self.combed.members(group)
        if any(each.weight.value.name not in known or each.weight.scope.address for each in members):
            return None
        for side in makers:
            places, gain = side.places.ravel(), np.abs(side.unit.gain)
            shift = side.unit.shift[places]
            if gain[places].min() <= _SMALLEST_GAIN * gain.max() or (side.unit.bias is None and shift.any()):
                return None
        return Mixable(group, tuple(makers), tuple(takers))
