"""What a model costs: multiply-accumulates and parameters, as a function of the channels that stay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cpd_onnx.atoms import Atoms, Axis
from cpd_onnx.groups import Combed, Group
from cpd_onnx.kept import Kept

_Term: TypeAlias = "tuple[float, tuple[Axis, ...]]"
"""A factor, and the axes whose sizes it is multiplied by."""


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

        lists: dict[str, list[_Term]] = {
            "macs": [(factor / self._batch, axes) for factor, axes in self._work],
            "params": [(1.0, axes) for axes, _ in self._weights],
            "channels": [(1.0, (axis,)) for axis in self._prunable],
        }
        self._sizes = _Sizes(combed.atoms, [axis for terms in lists.values() for _, axes in terms for axis in axes])
        self._sums = {kind: self._sizes.laid_out(terms) for kind, terms in lists.items()}

    def total(self, kept: Kept) -> Costs:
        """Costs with the channels in `kept`."""
        return Costs(self.cost("macs", kept), self.cost("params", kept), self.cost("channels", kept))

    def cost(self, kind: str, kept: Kept) -> float:
        """One of the costs."""
        factors, places = self._sums[kind]
        return float((factors * self._sizes.of(kept)[places].prod(axis=1)).sum())

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


class _Sizes:
    """The sizes of many axes at once, for one choice of channels after another."""

    def __init__(self, atoms: Atoms, axes: Sequence[Axis]) -> None:
        known = {id(axis): axis for axis in axes if len(axis)}
        self._places = {key: place for place, key in enumerate(known)}
        tables = [atoms.parts(axis) for axis in known.values()]
        width = max((table.shape[1] for table in tables), default=1)
        self._starts = np.cumsum([0, *map(len, tables)])
        self._parts = np.zeros((self._starts[-1], width), np.int64)
        for start, table in zip(self._starts.tolist(), tables, strict=False):
            self._parts[start : start + len(table), : table.shape[1]] = table

    def of(self, kept: Kept) -> npt.NDArray[np.float64]:
        """Indices that stay on each axis; a one and a zero follow, for axes that are not there and empty ones."""
        before = np.concatenate([[0.0], np.cumsum(kept.stays(self._parts), dtype=np.float64)])
        return np.concatenate([np.diff(before[self._starts]), [1.0, 0.0]])

    def laid_out(self, terms: Sequence[_Term]) -> tuple[npt.NDArray[np.float64], Axis]:
        """Factors of terms, and the places of their axes, a row each."""
        rank = max((len(axes) for _, axes in terms), default=0)
        count = len(self._places)
        places = np.full((len(terms), rank), count, np.int64)
        for row, (_, axes) in enumerate(terms):
            places[row, : len(axes)] = [self._places.get(id(axis), count + 1) for axis in axes]
        return np.asarray([factor for factor, _ in terms]), places


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
