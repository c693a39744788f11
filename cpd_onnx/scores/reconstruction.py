"""Error of the least-squares reconstruction without each channel, with onnxruntime alone.

A channel is measured where it is consumed: by weights that multiply it and sum. The error of their best fit without the
channel has a closed form in the second moments H of the inputs: W' [(H^-1)cc]^-1 W, that of the optimal brain surgeon
(Hassibi and Stork 1992; for blocks of weights Frantar and Alistarh, NeurIPS 2022). Channels are removed one after the
other, the least important first, with moments and weights updated each time. Errors are relative to the variance of the
consumer's output, or of the sum that it enters, and added over all consumers of a channel. Groups with a common
consumer (the branches of a concatenation) are processed together, since each can replace the other, but not both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.channels.branches import removable_groups
from cpd_onnx.channels.costs import CostModel
from cpd_onnx.channels.groups import Combed
from cpd_onnx.data.images.crops import cropped
from cpd_onnx.data.sources import calibration, inputs_of
from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.fitting.least_squares import MAX_FEATURES, Matrix, Moments, Sampler, Sums, one_thread, summed
from cpd_onnx.fitting.levels import levels_of
from cpd_onnx.fitting.units import Unit, units_of
from cpd_onnx.io.progress import tracked
from cpd_onnx.ir.model import Array
from cpd_onnx.rules.api import Factor
from cpd_onnx.runtime.sessions import Feed, sample_count
from cpd_onnx.runtime.shards import added
from cpd_onnx.runtime.stream import Stop, Stream, Tensors, batch_size, held_feeds
from cpd_onnx.scores.bases import Mixable, combinations, confirmed_groups
from cpd_onnx.scores.magnitude import l2
from cpd_onnx.scores.registry import Scores, needing_torch, score_function

if TYPE_CHECKING:
    from cpd_onnx.scores.registry import ScoreContext

_RIDGE = 1e-3
"""Regularization, as a fraction of the mean square of a feature (heuristic)."""
_ROWS = 1 << 14
"""Maximum number of rows from which moments are computed (heuristic)."""
_STEPS = 48
"""Minimum number of steps in which channels are removed; small groups are processed channel by channel (heuristic)."""
_BATCH = 32
"""Number of samples in a run of the model."""
_MOMENT_BYTES = 256 << 20
"""Approximate number of bytes of the moments that are computed in one run of the model (heuristic)."""
_ITEM = 8
"""Number of bytes of a moment."""
_LEAST = 1e-6
"""Fraction of the variance below which nothing of a signal is left, which keeps its logarithm finite."""


@dataclass(eq=False)
class _Consumer:
    """A weight, or another activation, by which channels are multiplied and summed.

    Attributes:
        inverse: Inverse of the moments of the features [groups, features, features].
        matrix: Weights of the features [groups, features, outputs].
        variance: Total variance of the output, or of the sum that it enters.
        features: Features of each channel of each group, by its id [channels, features of one].
        weight: Name of the weight; empty for another activation.
        is_absolute: Whether errors are losses of the model; otherwise, they are fractions of the variance.
        lost: Sum of the errors so far.
    """

    inverse: Matrix
    matrix: Matrix
    variance: float
    features: dict[int, Axis]
    weight: str = ""
    is_absolute: bool = False
    lost: float = 0.0

    @property
    def left(self) -> float:
        """Fraction of the variance that remains; errors that are losses are not relative to it."""
        return 1.0 if self.is_absolute else max(1.0 - self.lost, _LEAST)

    @property
    def loss(self) -> float:
        """Loss so far: the negative logarithm of the fraction that is left, or the sum of the errors."""
        return self.lost if self.is_absolute else -math.log(self.left)

    @property
    def largest(self) -> float:
        """Loss without any channel."""
        return 1.0 / _LEAST if self.is_absolute else -math.log(_LEAST)

    def at_outputs(self, curvature: Matrix) -> _Consumer:
        """Return the consumer with errors of its outputs as losses of the model [groups, outputs, outputs].

        With the second moments of the gradients as curvature, that is the loss in the second order if features and
        gradients are independent (Martens and Grosse, K-FAC, ICML 2015).
        """
        values, vectors = np.linalg.eigh(curvature)
        root = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
        return replace(self, matrix=self.matrix @ root, variance=1.0, is_absolute=True)

    def in_bases(self, bases: Mapping[Mixable, Matrix]) -> _Consumer:
        """Return the consumer with the channels of groups replaced by combinations of them."""
        made = replace(self, inverse=self.inverse.copy(), matrix=self.matrix.copy())
        for mixable, matrices in bases.items():
            for side in (side for side in mixable.takers if side.unit.weight == self.weight):
                for number, taps in enumerate(side.features):
                    back = np.linalg.inv(matrices[mixable.copy_at(number)])
                    for rows in taps:
                        made.inverse[:, rows] = back.T @ made.inverse[:, rows]
                        made.inverse[:, :, rows] = made.inverse[:, :, rows] @ back
                        made.matrix[:, rows] = back.T @ made.matrix[:, rows]
        return made

    def losses(self, group: int, channels: Sequence[int]) -> Scores:
        """Return the error without each of some channels, as a fraction of the remaining variance."""
        places = self.features[group][list(channels)]
        blocks = self.inverse[:, places[:, :, None], places[:, None, :]]
        rows = self.matrix[:, places]
        return np.asarray((rows * np.linalg.solve(blocks, rows)).sum(axis=(0, 2, 3)) / self.variance / self.left)

    def loss_of(self, group: int) -> float:
        """Return the loss without any channel of a group."""
        places = np.asarray(list(dict.fromkeys(self.features[group].ravel().tolist())))
        rows = self.matrix[:, places]
        lost = (rows * np.linalg.solve(self.inverse[:, places[:, None], places], rows)).sum() / self.variance
        return replace(self, lost=self.lost + float(lost)).loss - self.loss

    def remove(self, channels: Sequence[tuple[int, int]]) -> None:
        """Remove channels, given with their groups, and update the weights of the others to replace them."""
        found = [self.features[group][channel] for group, channel in channels if group in self.features]
        if not found:
            return
        places = np.unique(np.concatenate(found))  # heads and their dimensions may both be removed
        block = np.linalg.inv(self.inverse[:, places[:, None], places[None]])
        rows = self.matrix[:, places]
        self.lost += float((rows * (block @ rows)).sum() / self.variance)
        columns = self.inverse[:, :, places] @ block
        self.matrix -= columns @ rows
        self.inverse -= columns @ self.inverse[:, places]
        self.inverse[:, places] = 0.0
        self.inverse[:, :, places] = 0.0
        self.inverse[:, places, places] = 1.0
        self.matrix[:, places] = 0.0


def losses(context: ScoreContext, curvatures: Mapping[str, Matrix] | None = None) -> list[Scores]:
    """Return the loss with each channel after all less important ones of its group, as a fraction of the variance.

    Channels of groups without an observed consumer get their fraction of the squared magnitude of the group.

    Args:
        context: The model and the samples.
        curvatures: Curvature of the model's loss at the outputs of weights, by name [groups, outputs, outputs]; losses
            are then those of the model, and other weights do not count.

    Raises:
        DataError: The data does not fit the model, or contains no samples.
        UnsupportedError: onnxruntime cannot run the model or a part of it.
    """
    combed, feeds = context.combed, _feeds(context)
    consumers = _Observer(combed, feeds, context.seed).run()
    if curvatures is not None:
        known = [c for c in consumers if not c.weight or c.weight in curvatures]
        consumers = [c.at_outputs(curvatures[c.weight]) if c.weight else c for c in known]
    prices = CostModel(combed).of_groups(combed)
    scores = []
    for magnitude in l2(context):
        squares = np.square(np.nan_to_num(magnitude, nan=np.inf, posinf=1e150))
        scores.append(squares / (squares.sum() or 1.0))
    wholes, mixable = removable_groups(combed), confirmed_groups(combed, feeds) if context.is_repaired else {}
    for together in _components(consumers):
        groups = sorted({group for consumer in together for group in consumer.features})
        sizes = {group: len(combed.groups[group]) for group in groups}
        each = {group: max(1.0, prices[group].macs / size) for group, size in sizes.items()}
        mixed = _bases([mixable[group] for group in groups if group in mixable], together)
        turned = [consumer.in_bases(mixed) for consumer in together] if mixed else []
        found = _removed_in_order(together, sizes, each, wholes)
        if turned:
            are_mixed = {one.group.id for one in mixed}
            losses = _removed_in_order(turned, sizes, each, wholes)
            # The repair replaces whichever channels survive by the best combinations.
            ranks = {group: np.argsort(np.argsort(found[group], kind="stable")) for group in are_mixed}
            found = {g: np.sort(losses[g])[ranks[g]] if g in are_mixed else losses[g] for g in groups}
        for group, values in found.items():
            scores[group] = values
    return scores


def bases(combed: Combed, feeds: Sequence[Feed], seed: int, groups: Container[int]) -> dict[Mixable, Matrix]:
    """Return the combinations of channels with which mixable groups lose least [copies, combinations, channels].

    Args:
        combed: The model and its coupled channels.
        feeds: Batches of samples.
        seed: Seed of the choice of rows.
        groups: Ids of the groups that are wanted.

    Raises UnsupportedError if onnxruntime cannot run a part of the model.
    """
    wanted = [mixable for index, mixable in confirmed_groups(combed, feeds).items() if index in groups]
    weights = {side.unit.weight for mixable in wanted for side in mixable.takers}
    return _bases(wanted, _Observer(combed, feeds, seed).run(weights)) if wanted else {}


def _bases(wanted: Sequence[Mixable], consumers: Sequence[_Consumer]) -> dict[Mixable, Matrix]:
    """Return the best combinations of the channels of some groups whose consumers were all observed."""
    found: dict[Mixable, Matrix] = {}
    for mixable in wanted:
        by_name = {consumer.weight: consumer for consumer in consumers if mixable.group.id in consumer.features}
        if by_name.keys() != {side.unit.weight for side in mixable.takers}:
            continue
        moments, weights = ([list[Matrix]() for _ in range(mixable.copies)] for _ in range(2))
        for side in mixable.takers:
            consumer = by_name[side.unit.weight]
            gram = np.linalg.inv(consumer.inverse[0])
            for number, taps in enumerate(side.features):
                place = mixable.copy_at(number)
                moments[place].append(np.mean([gram[np.ix_(rows, rows)] for rows in taps], axis=0))
                weights[place] += [consumer.matrix[0][rows] / math.sqrt(consumer.variance) for rows in taps]
        found[mixable] = np.stack([combinations(*each) for each in zip(moments, weights, strict=True)])
    return found


def _feeds(context: ScoreContext) -> list[Feed]:
    """Return the samples of a score in batches that are held."""
    assert context.data is not None
    folded = context.combed.folded
    size = batch_size(folded, _BATCH)
    feeds = held_feeds(calibration(folded.model, context.data, context.samples, batch=size, seed=context.seed))
    if isinstance(context.data, Synthetic):
        return feeds
    more = context.samples - sum(map(sample_count, feeds))
    return [*feeds, *cropped(feeds, inputs_of(folded.model.proto), more, context.seed)]


def _components(consumers: Sequence[_Consumer]) -> list[list[_Consumer]]:
    """Return the consumers in components that have no group in common."""
    lots: list[tuple[set[int], list[_Consumer]]] = []
    for consumer in consumers:
        groups, members = set(consumer.features), [consumer]
        for lot in [lot for lot in lots if lot[0] & groups]:
            lots.remove(lot)
            groups, members = groups | lot[0], [*lot[1], *members]
        lots.append((groups, members))
    return [members for _, members in lots]


def _removed_in_order(
    consumers: Sequence[_Consumer],
    sizes: Mapping[int, int],
    prices: Mapping[int, float],
    wholes: Container[int],
) -> dict[int, Scores]:
    """Return the losses when channels are removed in order of loss per cost until each group has one left.

    The remaining fractions of a signal are multiplied from layer to layer, so the loss is the negative logarithm of the
    fraction. In a group, no channel has a lower score than one removed before it. The last channel of a group loses the
    whole signal, unless the group is one of `wholes`, those that can be removed as a whole: then the rest of the sums
    that its consumers enter is left.
    """
    alive = {group: list(range(size)) for group, size in sizes.items()}
    scores, worst = {group: np.zeros(size) for group, size in sizes.items()}, dict.fromkeys(sizes, 0.0)
    whole = {
        group: sum(c.loss_of(group) for c in consumers if group in c.features) for group in sizes if group in wholes
    }
    step = max(1, sum(sizes.values()) // _STEPS)
    while any(len(channels) > 1 for channels in alive.values()):
        gone, fractions = _cheapest(consumers, alive, prices, step)
        before = sum(consumer.loss for consumer in consumers)
        for consumer in consumers:
            consumer.remove(gone)
        loss = sum(consumer.loss for consumer in consumers) - before
        for (group, channel), fraction in zip(gone, fractions.tolist(), strict=True):
            worst[group] = max(worst[group], loss * fraction)
            scores[group][channel] = worst[group]
            alive[group].remove(channel)
    for group, values in scores.items():
        values[alive[group]] = worst[group] + sum(c.largest for c in consumers if group in c.features)
        if group in whole:
            others = float(values.sum() - values[alive[group]].sum())
            values[alive[group]] = max(worst[group], whole[group] - others)
        values += np.finfo(np.float64).tiny * np.argsort(np.argsort(values, kind="stable"))
    return scores


def _cheapest(
    consumers: Sequence[_Consumer], alive: Mapping[int, list[int]], prices: Mapping[int, float], count: int
) -> tuple[list[tuple[int, int]], Scores]:
    """Return the channels, with their groups, of the least loss per cost, and each one's fraction of their loss."""
    offered: list[tuple[float, int, int, float]] = []
    for group, channels in alive.items():
        each = np.sum([c.losses(group, channels) for c in consumers if group in c.features], axis=0)
        order = np.argsort(each, kind="stable")[: len(channels) - 1]
        offered += [
            (float(each[k]) / prices[group], group, channels[k], float(each[k])) for k in order[:count].tolist()
        ]
    taken = sorted(offered)[:count]
    losses = np.array([max(entry[3], 0.0) for entry in taken])
    return [(group, channel) for _, group, channel, _ in taken], losses / (losses.sum() or 1.0)


@dataclass(frozen=True, eq=False)
class _Look:
    """A consumer that is observed.

    Attributes:
        position: Position of the node after which its tensors are known.
        names: These tensors.
        bytes: Approximate number of bytes of its moments.
        sample: Called with the number of a batch and the tensors; returns what is summed over the batches.
        add: Called with the sums.
        finish: Called at the end; returns the consumer, None if there is nothing to lose.
    """

    position: int
    names: tuple[str, ...]
    bytes: int
    sample: Callable[[int, Tensors], Any]
    add: Callable[[Any], None]
    finish: Callable[[], _Consumer | None]


@dataclass(eq=False)
class _Observer:
    """Runs the model batch by batch, and collects the consumers of channels."""

    combed: Combed
    feeds: Sequence[Feed]
    seed: int

    def __post_init__(self) -> None:
        self.owner, self.rank = self.combed.owners
        self.stream = Stream(self.combed.folded, self.combed.folded.model, self.feeds)
        self.sampler = Sampler(_ROWS, self.seed, self.stream.sizes)
        self.makers = self.combed.folded.scope.producers
        self.levels = levels_of(self.combed.folded)

    def run(self, only: Container[str] | None = None) -> list[_Consumer]:
        """Return all consumers of channels, or only some weights."""
        looks: list[_Look] = []
        for units in units_of(self.combed.folded).by_weight:
            channels = self.channels(units[0]) if only is None or units[0].weight in only else {}
            looks += self.at_units(len(looks), units, channels) if channels else []
        looks += [self.at_meeting(left, right) for left, right in self.meetings()] if only is None else []
        looks.sort(key=lambda look: look.position)
        found: list[_Consumer] = []
        for part in tracked(list(_parts(looks))):
            found += self.observed(part)
        return found

    def observed(self, looks: Sequence[_Look]) -> Iterator[_Consumer]:
        """Yield the consumers that are seen in one run of the batches from the held cut to the last of some looks."""
        stops = [Stop(look.position, look.names) for look in looks]
        # The tensors of later looks lie behind the first of these, or are held there.
        totals = self.stream.total(stops, lambda stop, *of: looks[stop].sample(*of))
        for look, total in zip(looks, totals, strict=True):
            look.add(total)
        for look in looks:
            consumer = look.finish()
            if consumer is not None and np.isfinite(consumer.variance) and np.isfinite(consumer.inverse).all():
                yield consumer

    # Weights.

    def channels(self, unit: Unit) -> dict[int, Axis]:
        """Return the features of the channels of each group that a unit consumes."""
        tensor = self.combed.tensors.get(("", unit.data))
        if tensor is None or tensor.axes is None or self.combed.atoms.all_frozen(tensor.axes[unit.linear.in_axis]):
            return {}
        groups, features, _ = unit.matrix(self.combed.folded.model).shape
        if ("", unit.position) in self.combed.recorder.by_group:
            return self.of_aligned(np.sort(self.by_block(unit, groups), axis=1)[0], features, unit.linear.taps)
        blocks = 1 if unit.linear.is_stacked else groups
        return self.features(tensor.axes[unit.linear.in_axis], blocks, features, unit.linear.taps)

    def by_block(self, unit: Unit, groups: int) -> Axis:
        """Return the primitives of the channels that each group of a convolution consumes [groups, channels].

        Each group consumes equally many of each, in an order of its own.
        """
        axes = self.combed.tensors[("", unit.data)].axes or []
        return self.combed.atoms.parts(axes[unit.linear.in_axis])[:, 0].reshape(groups, -1)

    def of_aligned(self, primitives: Axis, features: int, taps: int) -> dict[int, Axis]:
        """Return the features of channels in their sorted order, by group and channel [channels, features of one].

        Where channels have fewer features than others, those from `features` on stand for none, see `_aligned`.
        """
        found: dict[int, Axis] = {}
        for index in sorted(set(self.owner[primitives].tolist()) - {-1}) if features <= MAX_FEATURES else ():
            places = [np.flatnonzero(primitives == atom) for atom in self.combed.groups[index].channels]
            own = [(each[:, None] * taps + np.arange(taps)).ravel() for each in places]
            most = max(map(len, own))
            if min(map(len, own)):
                found[index] = np.stack([np.append(each, features + np.arange(most - len(each))) for each in own])
        return found

    def features(self, axis: Axis, blocks: int, features: int, taps: int) -> dict[int, Axis]:
        """Return features by group and channel [channels, features of one] where all channels have equally many.

        Channels that are whole blocks are left out: removing them removes the block's outputs too.
        """
        parts = self.combed.atoms.parts(axis)
        found: dict[int, Axis] = {}
        inner = features // taps
        for index in sorted(set(self.owner[parts].ravel().tolist()) - {-1}):
            rows, columns = np.nonzero(self.owner[parts] == index)
            channel = self.rank[parts[rows, columns]]
            count = len(self.combed.groups[index])
            each = np.bincount(channel, minlength=count)
            if features > MAX_FEATURES or each.min() != each.max() or len(axis) != blocks * inner:
                continue
            places = rows[np.argsort(channel, kind="stable")].reshape(count, -1)
            if blocks > 1:
                if each[0] % blocks:
                    continue
                by_block = np.sort(places, axis=1).reshape(count, blocks, -1) - np.arange(blocks)[:, None] * inner
                if (by_block != by_block[:, :1]).any():
                    continue
                places = by_block[:, 0]
            found[index] = (places[:, :, None] * taps + np.arange(taps)).reshape(count, -1)
        return found

    def at_units(self, number: int, units: Sequence[Unit], channels: dict[int, Axis]) -> list[_Look]:
        """Return the looks at all uses of a weight, of which the last yields the consumer."""
        sums = list[tuple[Sums, tuple[int, float, float]]]()
        last = sorted(units, key=lambda unit: self.makers[unit.target])[-1]
        sampler = replace(self.sampler, rows=self.sampler.rows // len(units))
        return [self.at_unit((number, sampler), unit, channels, sums, unit is last) for unit in units]

    def at_unit(
        self,
        drawn: tuple[int, Sampler],
        unit: Unit,
        channels: dict[int, Axis],
        sums: list[tuple[Sums, tuple[int, float, float]]],
        is_last: bool,
    ) -> _Look:
        """Return the look at one use of a weight, given the number and the sampler of its rows, and their sums."""
        weight = unit.matrix(self.combed.folded.model)
        number, sampler = drawn
        others = [unit.other] if unit.is_rounded and unit.other else []

        def sample(batch: int, tensors: Tensors) -> Any:
            real = {name: unit.real(name, tensors[name]) for name in (unit.target, *others)}
            out = real[unit.target]
            places = sampler.places((number, batch), unit.linear, weight.shape, out)
            rows = unit.rows(tensors, places)
            is_observed = unit.is_observed
            made = unit.linear.targets(out, places) if is_observed else unit.unrounded(rows, places, real, weight)
            return summed(rows), _spread(made)

        def finish() -> _Consumer | None:
            if not is_last:
                return None
            of_features, of_products = reduce(added, sums)
            moments = Moments(of_features, centred=True)
            inverse = np.asarray(np.linalg.inv(moments.lifted(_RIDGE)), np.float64)
            matrix = weight * unit.gain.reshape(len(weight), 1, -1)
            if ("", unit.position) in self.combed.recorder.by_group:
                order = np.argsort(self.by_block(unit, len(weight)), axis=1, kind="stable")
                taps = np.arange(unit.linear.taps)
                order = (order[:, :, None] * len(taps) + taps).reshape(len(weight), -1)
                inverse, matrix = _aligned(inverse, matrix, order, 1 + max(int(own.max()) for own in channels.values()))
            variance = _variance(of_products) * weight.shape[0] * weight.shape[2]
            return _Consumer(inverse, matrix, variance, channels, unit.weight) if variance > 0 else None

        size = _ITEM * weight.shape[0] * weight.shape[1] ** 2
        names = (*unit.taken, unit.target, *others)
        return _Look(self.makers[unit.target], names, size, sample, sums.append, finish)

    # Products of two activations.

    def meetings(self) -> Iterator[tuple[Factor, Factor]]:
        """Yield pairs of activations that are multiplied and summed over channels, as queries and keys are."""
        scope = self.combed.folded.scope
        for product in self.combed.recorder.products:
            moving = [f for f in product if f.value.constants is None]
            is_visible = all(scope.values.get(f.value.name) is f.value and f.value.shape is not None for f in moving)
            if (
                len(moving) == 2
                and len(product) == 2
                and is_visible
                and not self.combed.atoms.all_frozen(moving[0].atoms)
            ):
                yield moving[0], moving[1]

    def at_meeting(self, left: Factor, right: Factor) -> _Look:
        names = (left.value.name, right.value.name)
        grams: list[Matrix] = []

        def sample(batch: int, tensors: Tensors) -> Matrix:
            first, second = (
                self.levels[name].real(tensors[name]) if name in self.levels else tensors[name] for name in names
            )
            return _met(first, left.axis, second, right.axis)

        def add(result: Matrix) -> None:
            grams[:] = [np.asarray(sum(grams, start=result))]

        def finish() -> _Consumer | None:
            (gram,) = grams
            if gram.ndim != 2:
                return None
            size = len(gram)
            gram = gram + _RIDGE * np.trace(gram) / size * np.eye(size)
            variance, channels = float(gram.sum()), self.features(left.atoms, 1, size, 1)
            if not (variance > 0 and channels):
                return None
            return _Consumer(np.linalg.inv(gram)[None], np.ones((1, size, 1)), variance, channels)

        position = max(self.makers.get(name, -1) for name in names)
        return _Look(position, names, _ITEM * len(left.atoms) ** 2, sample, grams.append, finish)


def _aligned(inverse: Matrix, matrix: Matrix, order: Axis, count: int) -> tuple[Matrix, Matrix]:
    """Return moments and weights with the features of each group in an order [groups, features].

    There are at least `count` features: further ones are independent of all, and have no weight.
    """
    groups = np.arange(len(order))[:, None]
    more = max(0, count - order.shape[1])
    lifted = np.pad(inverse[groups[:, :, None], order[:, :, None], order[:, None, :]], ((0, 0), (0, more), (0, more)))
    added = np.arange(order.shape[1], order.shape[1] + more)
    lifted[:, added, added] = 1.0
    return lifted, np.pad(matrix[groups, order], ((0, 0), (0, more), (0, 0)))


def _parts(looks: Sequence[_Look]) -> Iterator[list[_Look]]:
    """Yield looks in their order, as many together as have moments that fit in memory."""
    part, size = list[_Look](), 0
    for look in looks:
        if part and size + look.bytes > _MOMENT_BYTES:
            yield part
            part, size = [], 0
        part, size = [*part, look], size + look.bytes
    if part:
        yield part


def _spread(array: Array) -> tuple[int, float, float]:
    """Return how many numbers there are, and the sums of them and of their squares."""
    return array.size, float(array.sum(dtype=np.float64)), float(np.square(array, dtype=np.float64).sum())


def _variance(sums: tuple[int, float, float]) -> float:
    """Return the variance of numbers by their sums, see `_spread`."""
    count, total, squares = sums
    return max(0.0, squares / max(1, count) - (total / max(1, count)) ** 2)


def _met(left: Array, i: int, right: Array, j: int) -> npt.NDArray[np.float64]:
    """Return the moments of the summands of a product over all pairs of rows: (A'A) * (B'B), summed over leading axes.

    The second factor is centred, since a constant does not change the softmax that follows. If the leading axes of the
    factors differ, the result is a scalar.
    """
    a, b = (np.moveaxis(np.asarray(x, np.float64), axis, -1) for x, axis in ((left, i), (right, j)))
    if a.ndim < 2 or a.ndim != b.ndim or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-1]:
        return np.zeros(())
    b = b - b.mean(axis=-2, keepdims=True)
    products = (a.swapaxes(-1, -2) @ a) * (b.swapaxes(-1, -2) @ b)
    return np.asarray(products.reshape(-1, *products.shape[-2:]).sum(axis=0))


@score_function(
    "reconstruction",
    source="Frantar and Alistarh, Optimal Brain Compression, NeurIPS 2022, for channels; after He et al., ICCV 2017",
    needs_data=True,
    is_loss=True,
    samples=512,
)
def reconstruction(context: ScoreContext) -> list[Scores]:
    """Return the error of the least-squares reconstruction without each channel, over all its consumers."""
    with one_thread():
        return losses(context)


@score_function(
    "curvature",
    source="Martens and Grosse, K-FAC, ICML 2015, for channels as in Wang et al., EigenDamage, ICML 2019",
    needs_data=True,
    is_loss=True,
    samples=512,
)
def curvature(context: ScoreContext) -> list[Scores]:
    """Return the loss of the model from the errors of the reconstruction without each channel, by its curvature."""
    try:
        from cpd_onnx.scores.gradients import curvatures
    except ModuleNotFoundError as error:
        raise needing_torch(error) from error
    found = curvatures(context)
    with one_thread():
        return losses(context, found)
