"""Costs of a model: multiply-accumulates, parameters and bytes as functions of the surviving channels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cpd_onnx.algebra.atoms import NOTHING, Axis, fingerprint
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.branches import Vanishing
from cpd_onnx.channels.groups import Combed
from cpd_onnx.channels.judged import terms_of_work
from cpd_onnx.ir.model import element_bytes

Floats: TypeAlias = npt.NDArray[np.float64]
Product: TypeAlias = "tuple[float, tuple[Axis, ...]]"
"""A factor, and the axes whose sizes it is multiplied with."""
Term: TypeAlias = "Product | tuple[float, tuple[Axis, ...], frozenset[int]]"
"""A product, and the groups, by id, without each of which it is zero; none if they are left out."""

_IN_A_BODY = -1
"""Position of a node that is not in the main graph."""
_AT_ONCE = 4_000_000
"""Limit on the elements of the arrays that `WidthCost` allocates at a time (32 MB each); a heuristic."""


@dataclass(frozen=True, eq=False)
class Peak:
    """A cost that is the largest of several sums, as the memory at each time.

    Attributes:
        terms: The parts of all sums.
        sums: Which parts each sum has: a row for each part, a column for each sum, of ones and zeros.
    """

    terms: Sequence[Term]
    sums: Floats

    def of(self, parts: Floats) -> Floats:
        """Return the largest sum for each row of parts."""
        return np.asarray((parts @ self.sums).max(axis=1, initial=0.0))


@dataclass(frozen=True)
class Costs:
    """Costs of a model, or of the nodes and weights of a group.

    Attributes:
        macs: Multiply-accumulates of one sample (divided by the batch size).
        params: Number of elements of trained weights.
        channels: Number of indices of prunable weight axes.
        bytes: Size of the file in bytes: its weights, and a constant remainder.

    """

    macs: float
    params: float
    channels: float
    bytes: float

    def of(self, kind: str) -> float:
        """Return the cost of a given name."""
        return float(getattr(self, kind))


class CostModel:
    """Costs of a combed model for any set of surviving channels."""

    def __init__(self, combed: Combed, more: Mapping[str, Sequence[Term] | Peak] | None = None) -> None:
        """Collect the terms of all costs; `more` are further costs by name, each a sum of terms or a peak."""
        self._combed = combed
        self._batch = combed.folded.batch
        self._work = terms_of_work(combed)
        self._weights: list[tuple[float, tuple[Axis, ...], frozenset[int]]] = []
        self._prunable: list[Axis] = []
        self._stored: list[tuple[float, tuple[Axis, ...], frozenset[int]]] = []
        vanishing = Vanishing(combed)
        for weight in combed.weights:
            axes = weight.axes[0]
            places = [_IN_A_BODY if use.use.scope.path else use.use.node for use in weight.uses]
            needed = vanishing.of_nodes(places, axes)
            self._stored.append((element_bytes(weight.value.dtype), tuple(axes), needed))
            if not weight.is_trained:
                continue
            self._weights.append((1.0, tuple(axes), needed))
            self._prunable += [axis for axis in axes if not combed.atoms.all_frozen(axis)]
        for tensor in combed.tensors.values():
            if tensor.value.is_generated_weight:
                self._prunable += [axis for axis in tensor.axes or [] if not combed.atoms.all_frozen(axis)]

        model = combed.folded.model
        rest = (
            model.data_bytes()
            + model.proto.ByteSize()
            - sum(f * math.prod(map(len, axes)) for f, axes, _ in self._stored)
        )
        lists: dict[str, Sequence[Term]] = {
            "macs": [
                (factor / self._batch, axes, vanishing.of_node(_IN_A_BODY if cost.scope.path else cost.node, axes))
                for (factor, axes), cost in zip(self._work, combed.recorder.costs, strict=True)
            ],
            "params": self._weights,
            "channels": [(1.0, (axis,)) for axis in self._prunable],
            "bytes": [*self._stored, (float(rest), ())],
        }
        self._peaks = {kind: peak for kind, peak in (more or {}).items() if isinstance(peak, Peak)}
        lists |= {kind: terms.terms if isinstance(terms, Peak) else terms for kind, terms in (more or {}).items()}
        self._sizes = _Sizes(combed, [axis for terms in lists.values() for term in terms for axis in term[1]])
        self._sums = {kind: self._sizes.laid_out(terms) for kind, terms in lists.items()}

    def total(self, keep: KeepMask) -> Costs:
        """Return the costs with the surviving channels of `keep`."""
        return Costs(*(self.cost(kind, keep) for kind in ("macs", "params", "channels", "bytes")))

    def cost(self, kind: str, keep: KeepMask) -> float:
        """Return one cost with the surviving channels of `keep`."""
        factors, places = self._sums[kind]
        parts = factors * self._sizes.of(keep)[places].prod(axis=1)
        return float(self._peaks[kind].of(parts[None])[0] if kind in self._peaks else parts.sum())

    def in_widths(self, kind: str) -> WidthCost:
        """Return one cost as a function of the number of surviving channels of each group."""
        return WidthCost(self._combed, self._sizes, self._sums[kind], self._peaks.get(kind))

    def of_groups(self, combed: Combed) -> dict[int, Costs]:
        """Return, for each group by id, the costs of the nodes and weights that have its channels."""
        owner, _ = combed.owners

        def by_group(terms: Sequence[Term], batch: int = 1) -> dict[int, float]:
            found: dict[int, float] = defaultdict(float)
            for factor, axes, *_ in terms:
                for group_id in _owners(combed, owner, axes):
                    found[group_id] += factor * math.prod(map(len, axes)) / batch
            return found

        macs, params, stored = by_group(self._work, self._batch), by_group(self._weights), by_group(self._stored)
        return {g.id: Costs(macs[g.id], params[g.id], float(len(g)), stored[g.id]) for g in combed.groups}


_Sum: TypeAlias = "tuple[Floats, Axis]"
"""Factors of terms, and a row of axis numbers for each: the number of axes where a term has fewer, and after it the
groups that must have a channel."""


class WidthCost:
    """A cost as a polynomial in the widths of the groups.

    The size of an axis is the number of indices with no removed primitive. It is estimated from the fraction of each
    group that survives, which is exact where the channels of a group have equally many indices, as in almost all
    models, and thousands of choices are evaluated at once.
    """

    def __init__(self, combed: Combed, sizes: _Sizes, terms: _Sum, peak: Peak | None = None) -> None:
        """Count the indices of each axis by the set of groups they depend on."""
        self.factors, self._places = terms
        self._peak = peak
        count = len(combed.groups)
        used = np.unique(self._places[self._places < sizes.count])
        place_of = np.full(sizes.count + 1, len(used), np.int64)
        place_of[used] = np.arange(len(used))
        place_of = np.append(place_of, len(used) + 1 + np.arange(count))  # whether groups have any channel
        self._places = place_of[self._places]
        owner = np.where(combed.owners[0] < 0, count, combed.owners[0])
        axis, parts = sizes.rows(used)
        groups = np.sort(np.where(parts == NOTHING, count, owner[parts]), axis=1)
        groups[:, 1:][groups[:, 1:] == groups[:, :-1]] = count
        found, self._counts = np.unique(np.column_stack([place_of[axis], groups]), axis=0, return_counts=True)
        self._groups = found[:, 1:]
        self._starts = np.searchsorted(found[:, 0], np.arange(len(used)))
        self._full = np.asarray([len(group) for group in combed.groups], np.float64)

    def __call__(self, widths: npt.NDArray[np.int64]) -> Floats:
        """Return the costs of many choices, given as rows of widths."""
        row = len(self._counts) * max(1, self._groups.shape[1]) + self._places.size
        step = max(1, _AT_ONCE // max(1, row))
        blocks = [self._costs(widths[start : start + step]) for start in range(0, len(widths), step)]
        return np.concatenate([np.zeros(0), *blocks])

    def as_terms(self) -> dict[str, list[Any]]:
        """Return the polynomial as plain values, for a page that evaluates it.

        `axes` holds for each axis its addends, a count followed by the groups whose surviving fractions multiply it;
        `terms` holds a factor each, followed by the axes whose sizes multiply it.
        """
        count = len(self._full)
        ends = [*self._starts[1:].tolist(), len(self._counts)][: len(self._starts)]
        rows = [
            [int(number), *(group for group in groups if group < count)]
            for number, groups in zip(self._counts.tolist(), self._groups.tolist(), strict=True)
        ]
        axes = [rows[start:end] for start, end in zip(self._starts.tolist(), ends, strict=True)]
        merged: dict[tuple[int, ...], float] = defaultdict(float)
        for factor, places in zip(self.factors.tolist(), self._places.tolist(), strict=True):
            merged[tuple(sorted(place for place in places if place < len(axes)))] += factor
        return {"axes": axes, "terms": [[factor, *places] for places, factor in merged.items()]}

    def _costs(self, widths: npt.NDArray[np.int64]) -> Floats:
        left = np.column_stack([widths / self._full, np.ones(len(widths))])
        counted = self._counts * left[:, self._groups].prod(axis=2)
        sizes = np.add.reduceat(counted, self._starts, axis=1) if len(self._starts) else counted
        sizes = np.column_stack([sizes, np.ones(len(widths)), widths > 0])
        products = sizes[:, self._places].prod(axis=2)
        return np.asarray(products @ self.factors) if self._peak is None else self._peak.of(products * self.factors)


class _Sizes:
    """The sizes of all axes that can shrink, computed together for a set of surviving channels."""

    def __init__(self, combed: Combed, axes: Sequence[Axis]) -> None:
        atoms, self._groups = combed.atoms, [group.channels for group in combed.groups]
        known = {fingerprint(axis): axis for axis in axes if not atoms.all_frozen(axis)}
        self.count = len(known)
        self._places = {key: place for place, key in enumerate(known)}
        tables = [atoms.parts(axis) for axis in known.values()]
        width = max((table.shape[1] for table in tables), default=1)
        self._starts = np.cumsum([0, *map(len, tables)])
        self._parts = np.zeros((self._starts[-1], width), np.int64)
        for start, table in zip(self._starts.tolist(), tables, strict=False):
            self._parts[start : start + len(table), : table.shape[1]] = table

    def of(self, keep: KeepMask) -> Floats:
        """Return the number of surviving indices of each axis, a one for missing axes, and which groups survive."""
        before = np.concatenate([[0.0], np.cumsum(keep.surviving(self._parts), dtype=np.float64)])
        survives = [float(keep.surviving(channels[:, None]).any()) for channels in self._groups]
        return np.concatenate([np.diff(before[self._starts]), [1.0], survives])

    def rows(self, places: Axis) -> tuple[Axis, Axis]:
        """Return, for each index of the chosen axes, the number of its axis and its primitives."""
        which = np.repeat(np.arange(self.count), np.diff(self._starts))
        chosen = np.isin(which, places)
        return which[chosen], self._parts[chosen]

    def laid_out(self, terms: Sequence[Term]) -> _Sum:
        """Return terms with the sizes of frozen axes multiplied into the factors, and the numbers of other axes."""
        rank = max((len(axes) + sum(map(len, groups)) for _, axes, *groups in terms), default=0)
        factors, places = np.zeros(len(terms)), np.full((len(terms), rank), self.count, np.int64)
        for row, (factor, axes, *groups) in enumerate(terms):
            found = [(len(axis), self._places.get(fingerprint(axis))) for axis in axes]
            shrinking = [place for _, place in found if place is not None]
            shrinking += [self.count + 1 + group for needed in groups for group in sorted(needed)]
            places[row, : len(shrinking)] = shrinking
            factors[row] = factor * math.prod(size for size, place in found if place is None)
        return factors, places


def _owners(combed: Combed, owner: Axis, axes: tuple[Axis, ...] | list[Axis]) -> set[int]:
    found: set[int] = set()
    for axis in axes:
        found.update(owner[combed.atoms.parts(axis)].ravel().tolist())
    return found - {-1}
