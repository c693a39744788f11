"""What the outputs lose where one group alone is narrowed and what consumes it is fitted anew.

Where one group alone loses channels, its consumers get what is left of the original's activations. So one run of the
original gives the moments of all features, and these give the weights of all consumers in closed form; a consumer
behind another one of the same group is fitted to the original's activations as well. Each narrowed model then runs from
the first node that differs, on what the original has computed before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cpd_onnx.algebra.atoms import Mask
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.groups import Combed
from cpd_onnx.fitting.divergence import Divergence, Floats
from cpd_onnx.fitting.least_squares import Matrix, Moments, Sampler, lift, one_thread, summed
from cpd_onnx.fitting.units import Unit, units_of
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.rewrite.rewriter import resized
from cpd_onnx.runtime.sessions import Feed
from cpd_onnx.runtime.stream import HELD_BYTES, Stop, Stream, Tensors, first_difference

Places: TypeAlias = npt.NDArray[np.int64]
Consumer: TypeAlias = tuple[Unit, dict[int, Places]]
"""A unit, with its features that are left where groups are narrowed, by group."""
_RIDGE, _STRONGER, _MOST_TRIED = 1e-3, 10.0**0.5, 9
"""Least strength of the regularization, as a fraction of the mean square of a feature, factor from one strength to the
next that is tried, and maximum number of these (heuristic)."""
_FEWEST_ROWS, _MOST_ROWS, _ROWS_PER_FEATURE = 1 << 11, 1 << 14, 4
"""Approximate number of rows of a fit: at least, at most, and in between for each feature (heuristic)."""
_MOST_FEATURES = 5 << 10
"""Number of features above which a weight is not fitted: the matrices of a fit take about 1.5 GB then (heuristic)."""
_MOMENT_BYTES = 256 << 20
"""Approximate number of bytes of the moments that are computed in one run of the original (heuristic)."""
_ITEM = 8
"""Number of bytes of a moment."""
_CHECKED = 8
"""One in this many batches validates the fits (heuristic)."""


class Alone:
    """Narrows one group of a model at a time, and measures the outputs."""

    def __init__(self, combed: Combed, feeds: Sequence[Feed], measure: Divergence, seed: int) -> None:
        """Prepare to narrow groups.

        Args:
            combed: The model.
            feeds: Batches of samples to fit to.
            measure: Divergence from the original's outputs, on other samples.
            seed: Seed of the choice of rows.
        """
        self.combed, self.feeds, self.measure, self.seed = combed, feeds, measure, seed
        self.scope = combed.folded.scope
        self.held_out = max(1, len(feeds) // _CHECKED) if len(feeds) > 1 else 0

    def diverged(self, gone: Mapping[int, Places]) -> Iterator[tuple[int, Floats]]:
        """Yield each group by id, with the divergence of each sample where that group alone loses channels.

        Args:
            gone: Positions of the channels that each group loses.

        Raises UnsupportedError if onnxruntime cannot run a part of the model.
        """
        channels = {index: self.combed.groups[index].channels for index in gone}
        kept = {index: KeepMask(self.combed.atoms, channels[index][places]) for index, places in gone.items()}
        narrow = {index: resized(self.combed, mask) for index, mask in kept.items()}
        with one_thread():
            self.fit(kept, narrow)
        yield from self.measured(narrow)

    # Measurement.

    def measured(self, narrow: dict[int, Model]) -> Iterator[tuple[int, Floats]]:
        """Yield the divergence of each model, those that differ from the original late in the graph last."""
        folded, end = self.combed.folded, len(self.scope.nodes)
        stream = Stream(folded, folded.model, self.measure.feeds)
        outputs = [name for name in self.measure.outputs if stream.is_computed(name)]
        stream.keep_alive(dict.fromkeys(outputs, end))
        stops = [Stop(end - 1, tuple(outputs))]

        def look(_: int, batch: int, tensors: Tensors) -> Floats:
            made = {name: np.asarray(tensors[name], np.float32) for name in outputs}
            return self.measure.of_batch(batch, self.measure.wanted[batch] | made)

        firsts = {index: first_difference(folded, model) for index, model in narrow.items()}
        for index in sorted(narrow, key=lambda index: (firsts[index], index)):
            stream.move(firsts[index] - 1, HELD_BYTES)
            runs = stream.of(narrow.pop(index)).run(stops, look)
            yield index, np.concatenate([found for (found,) in runs])

    # Fits.

    def fit(self, kept: Mapping[int, KeepMask], narrow: Mapping[int, Model]) -> None:
        """Fit the weights of narrowed models, by group, that consume what is left of the group."""
        folded = self.combed.folded
        consumers = [(unit, self.consumed(unit, kept)) for unit in units_of(folded).found]
        consumers = [(unit, groups) for unit, groups in consumers if groups]
        stream = Stream(folded, folded.model, self.feeds, self.held_out)
        stream.keep_alive({name: self.end(unit) for unit, _ in consumers for name in unit.taken})
        small = {
            index: {unit.weight: unit for unit in units_of(folded, model).found} for index, model in narrow.items()
        }
        for part in _parts(sorted(consumers, key=lambda each: self.end(each[0])), folded.model):
            stream.move(min(unit.position for unit, _ in part) - 1, HELD_BYTES)
            moments = self.moments(stream, [unit for unit, _ in part])
            for (unit, groups), sums in zip(part, moments, strict=True):
                whole = unit.matrix(folded.model)
                for index, features in groups.items():
                    own = small[index].get(unit.weight)
                    if own is not None:
                        self.store(own, narrow[index], kept[index], _Fit(*sums, whole, features))

    def end(self, unit: Unit) -> int:
        """Return the position of the node behind which data and target of a unit are known."""
        return max(unit.position, self.scope.producers[unit.target])

    def consumed(self, unit: Unit, kept: Mapping[int, KeepMask]) -> dict[int, Places]:
        """Return the features of a unit that are left in each group that it consumes [groups, features]."""
        ends = [self.combed.tensors.get(("", name)) for name in (unit.data, unit.target)]
        groups, features, outputs = unit.matrix(self.combed.folded.model).shape
        data, target = [(tensor and tensor.axes) or [] for tensor in ends]
        if not data or not target or features > _MOST_FEATURES:
            return {}
        axis = data[unit.linear.in_axis]
        is_stacked = unit.linear.is_stacked
        if not is_stacked and len(target[unit.linear.out_axis]) != groups * outputs:
            return {}
        owners = set(self.combed.owners[0][self.combed.atoms.parts(axis)].ravel().tolist())
        found = {
            index: _features(
                np.tile(kept[index].mask(axis), groups if is_stacked else 1), groups, features, unit.linear.taps
            )
            for index in owners & kept.keys()
        }
        return {index: places for index, places in found.items() if places is not None}

    def moments(self, stream: Stream, units: Sequence[Unit]) -> list[tuple[Moments, Moments]]:
        """Return the moments of the features of units in the original, of rows to fit to and of rows to check."""
        shapes = [unit.matrix(self.combed.folded.model).shape for unit in units]
        rows = [int(np.clip(_ROWS_PER_FEATURE * shape[1], _FEWEST_ROWS, _MOST_ROWS)) for shape in shapes]
        samplers = [Sampler(count, self.seed, stream.sizes) for count in rows]

        def look(number: int, batch: int, tensors: Tensors) -> tuple[int, Matrix, Array]:
            unit = units[number]
            places = samplers[number].places((unit.position, batch), unit.linear, shapes[number], tensors[unit.target])
            return summed(unit.rows(tensors, places))

        stops = [Stop(self.end(unit), (*unit.taken, unit.target)) for unit in units]
        place = len(self.feeds) - self.held_out
        sums = stream.total(stops, look, slice(0, place))
        checks = stream.total(stops, look, slice(place, None)) if self.held_out else sums
        return [
            (Moments(first, centred=unit.bias is not None), Moments(second, centred=False))
            for unit, first, second in zip(units, sums, checks, strict=True)
        ]

    def store(self, unit: Unit, model: Model, kept: KeepMask, fit: _Fit) -> None:
        """Fit a weight of a narrowed model, unless that does not make it better on the rows to check."""
        axes = self.combed.tensors[("", unit.target)].axes or []
        survive = kept.mask(axes[unit.linear.out_axis])
        if unit.linear.is_stacked:
            survive = np.tile(survive, fit.whole[:, 0].size // len(survive))
        survive = survive.reshape(len(fit.whole), -1)
        if (survive != survive[0]).any() or unit.matrix(model).shape != (*fit.places.shape, survive[0].sum()):
            return
        fit = replace(fit, whole=fit.whole[:, :, survive[0]])
        found = fit.best()
        if found is None:
            return
        ridge, weight = found
        scales = None
        if (steps := unit.steps(model)) is not None:
            weight, scales = steps.rounded(weight, fit.left.lifted(ridge))
        constant = unit.stored_constant(model, fit.moments.mean @ fit.whole - fit.left.mean @ weight)
        unit.store(model, weight, constant if unit.bias is not None else None, scales)


@dataclass(frozen=True, eq=False)
class _Fit:
    """The fit of a weight to the original's products, by what is left of its features.

    Attributes:
        moments, checks: Moments of all features, of rows to fit to and of rows to check.
        whole: The original's weight [groups, features, outputs].
        places: Features that are left [groups, features].
    """

    moments: Moments
    checks: Moments
    whole: Matrix
    places: Places

    @cached_property
    def left(self) -> Moments:
        """Moments of the features that are left."""
        return self.moments.part(self.places)

    @cached_property
    def right(self) -> Matrix:
        """Mean products of the features that are left and the original's products."""
        return np.asarray(self.moments.gram[self.rows] @ self.whole)

    @property
    def rows(self) -> tuple[Places, Places]:
        """Index of the rows of the features that are left."""
        return np.arange(len(self.places))[:, None], self.places

    def best(self) -> tuple[float, Matrix] | None:
        """Return the best strength of the regularization, and the weight; None if the old weight is no worse."""
        about = self.checks.about(self.moments.mean)
        ridge, best = _RIDGE, self.at(_RIDGE)
        error = self.error(best, about)
        for _ in range(_MOST_TRIED - 1):
            stronger = self.at(ridge * _STRONGER)
            if not (now := self.error(stronger, about)) < error:
                break
            best, ridge, error = stronger, ridge * _STRONGER, now
        before = self.error(self.whole[self.rows], self.checks.about(np.zeros(1)))
        return (ridge, best) if error < before else None

    def at(self, ridge: float) -> Matrix:
        """Return the fit for one strength of the regularization."""
        return self.left.solved(ridge, self.right + lift(self.left.gram, ridge) * self.whole[self.rows])

    def error(self, weight: Matrix, about: Matrix) -> float:
        """Return the sum of the squared errors of the products, by moments of all features."""
        change = -self.whole
        change[self.rows] += weight
        return float((change * (about @ change)).sum())


def _features(mask: Mask, groups: int, features: int, taps: int) -> Places | None:
    """Return the features of the channels that survive [groups, features]; None if all do, or groups differ."""
    if len(mask) * taps != groups * features:
        return None
    survive = mask.reshape(groups, -1)
    counts = survive.sum(axis=1)
    if counts.min() != counts.max() or counts[0] in {0, survive.shape[1]}:
        return None
    places = np.nonzero(survive)[1].reshape(groups, -1)
    return (places[:, :, None] * taps + np.arange(taps)).reshape(groups, -1)


def _parts(consumers: Sequence[Consumer], model: Model) -> Iterator[list[Consumer]]:
    """Yield consumers in their order, as many together as have moments that fit in memory."""
    part, size = list[Consumer](), 0
    for consumer in consumers:
        groups, features, _ = consumer[0].matrix(model).shape
        bytes_ = 2 * _ITEM * groups * features**2
        if part and size + bytes_ > _MOMENT_BYTES:
            yield part
            part, size = [], 0
        part, size = [*part, consumer], size + bytes_
    if part:
        yield part
