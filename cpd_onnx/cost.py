"""What a model costs: multiply-accumulates and parameters, as a function of the channels that stay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cpd_onnx.atoms import Atoms, Axis
from cpd_onnx.groups import Combed, Group
from cpd_onnx.kept import Kept


@dataclass(frozen=True)
class Costs:
    """Costs of a model, or of what a group runs through.

    Attributes:
        macs: multiply-accumulates of one sample (the batch is divided out).
        params: elements of trained weights.
        channels: indices of prunable weight axes.

    """

    macs: float
    params: float
    channels: float

    def of(self, kind: str) -> float:
        """The cost of that name."""
        return float(getattr(self, kind))


class CostModel:
    """Costs of a combed model for any choice of channels."""

    def __init__(self, combed: Combed) -> None:
        """Collect what costs."""
        self._batch = combed.folded.batch
        self._work = [(cost.factor, cost.axes) for cost in combed.recorder.costs]
        self._weights: list[tuple[tuple[Axis, ...], int]] = []
        self._prunable: list[Axis] = []
        for weight in combed.weights:
            axes = next(combed.weight_axes(weight), None)
            if axes is None or not weight.is_trained:
                continue
            self._weights.append((tuple(axes), weight.size))
            self._prunable += [axis for axis in axes if not combed.atoms.all_frozen(axis)]
        for tensor in combed.tensors.values():
            if tensor.value.is_made_weight:
                self._prunable += [axis for axis in tensor.axes or [] if not combed.atoms.all_frozen(axis)]

        self._sums = {
            "macs": _Products(combed.atoms, [(factor / self._batch, axes) for factor, axes in self._work]),
            "params": _Products(combed.atoms, [(1.0, axes) for axes, _ in self._weights]),
            "channels": _Products(combed.atoms, [(1.0, (axis,)) for axis in self._prunable]),
        }

    def total(self, kept: Kept) -> Costs:
        """Costs with the channels in `kept`."""
        return Costs(self.cost("macs", kept), self.cost("params", kept), self.cost("channels", kept))

    def cost(self, kind: str, kept: Kept) -> float:
        """One of the costs."""
        return self._sums[kind].value(kept)

    def of_groups(self, combed: Combed) -> dict[int, Costs]:
        """For each group by id, the costs of the nodes and weights that it runs through."""
        owner = np.full(len(combed.atoms), -1, np.int64)
        for group in combed.groups:
            owner[group.channels] = group.id
        macs: dict[int, float] = defaultdict(float)
        params: dict[int, float] = defaultdict(float)
        for factor, axes in self._work:
            for group_id in _owners(combed, owner, axes):
                macs[group_id] += factor * float(np.prod([len(a) for a in axes])) / self._batch
        for weight_axes, size in self._weights:
            for group_id in _owners(combed, owner, weight_axes):
                params[group_id] += size
        return {g.id: Costs(macs[g.id], params[g.id], float(len(g))) for g in combed.groups}


class _Products:
    """A sum of factors times products of the sizes of axes, laid out so that one choice of channels takes no loop."""

    def __init__(self, atoms: Atoms, terms: Sequence[tuple[float, tuple[Axis, ...]]]) -> None:
        terms = [(factor, group) for factor, group in terms if all(map(len, group))]
        axes = {id(axis): axis for _, group in terms for axis in group}
        places = {key: place for place, key in enumerate(axes)}
        tables = [atoms.parts(axis) for axis in axes.values()]
        width = max((table.shape[1] for table in tables), default=1)
        padded = [np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in tables]
        self._parts = np.concatenate([np.zeros((0, width), np.int64), *padded])
        self._starts = np.cumsum([0, *map(len, tables)])[:-1]
        self._factors = np.asarray([factor for factor, _ in terms])
        rank = max((len(group) for _, group in terms), default=0)
        # The place after the last axis stands for a size of one.
        self._places = np.full((len(terms), rank), len(axes), np.int64)
        for row, (_, group) in enumerate(terms):
            self._places[row, : len(group)] = [places[id(axis)] for axis in group]

    def value(self, kept: Kept) -> float:
        """The sum for what is kept."""
        if not len(self._factors):
            return 0.0
        sizes = np.add.reduceat(kept.stays(self._parts), self._starts, dtype=np.float64)
        return float((self._factors * np.append(sizes, 1.0)[self._places].prod(axis=1)).sum())


def group_owners(combed: Combed, groups: list[Group]) -> Axis:
    """For each atom the id of its group, -1 where it has none."""
    owner = np.full(len(combed.atoms), -1, np.int64)
    for group in groups:
        owner[group.channels] = group.id
    return owner


def _owners(combed: Combed, owner: Axis, axes: tuple[Axis, ...] | list[Axis]) -> set[int]:
    found: set[int] = set()
    for axis in axes:
        found.update(owner[combed.atoms.parts(axis)].ravel().tolist())
    return found - {-1}
