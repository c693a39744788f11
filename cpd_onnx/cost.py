"""What a model costs: multiply-accumulates and parameters, as a function of the channels that stay."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from cpd_onnx.atoms import Axis
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
        self._weights: list[tuple[list[Axis], int]] = []
        self._prunable: list[Axis] = []
        for weight in combed.weights:
            axes = next(combed.weight_axes(weight), None)
            if axes is None or not weight.is_trained:
                continue
            self._weights.append((axes, weight.size))
            self._prunable += [axis for axis in axes if not combed.atoms.all_frozen(axis)]
        for tensor in combed.tensors.values():
            if tensor.value.is_made_weight:
                self._prunable += [axis for axis in tensor.axes or [] if not combed.atoms.all_frozen(axis)]

    def total(self, kept: Kept) -> Costs:
        """Costs with the channels in `kept`."""
        return Costs(self.cost("macs", kept), self.cost("params", kept), self.cost("channels", kept))

    def cost(self, kind: str, kept: Kept) -> float:
        """One of the costs."""
        counts: dict[int, int] = {}

        def count(axis: Axis) -> int:
            if id(axis) not in counts:
                counts[id(axis)] = kept.count(axis)
            return counts[id(axis)]

        if kind == "macs":
            return float(sum(f * np.prod([count(a) for a in axes]) for f, axes in self._work)) / self._batch
        if kind == "params":
            return float(sum(np.prod([count(a) for a in axes]) for axes, _ in self._weights))
        return float(sum(count(axis) for axis in self._prunable))

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


def group_owners(combed: Combed, groups: list[Group]) -> Axis:
    """For each atom the id of its group, -1 where it has none."""
    owner = np.full(len(combed.atoms), -1, np.int64)
    for group in groups:
        owner[group.channels] = group.id
    return owner


def _owners(combed: Combed, owner: Axis, axes: tuple[Axis, ...] | list[Axis]) -> set[int]:
    found: set[int] = set()
    for axis in axes:
        found.update(np.unique(owner[combed.atoms.parts(axis)]).tolist())
    return found - {-1}
