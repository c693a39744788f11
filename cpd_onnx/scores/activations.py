"""What each channel carries on data, from onnxruntime alone.

A channel is looked at where it is consumed: at the inputs of the nodes that multiply it and sum over it, with weights
or with another activation. Batch after batch is reduced to sums, so that memory does not grow with the data.

Some consumers are not seen: those inside subgraphs and model-local functions, the state of a recurrent operator, and
what a fused operator projects within itself. A group that nobody is seen to consume is scored by its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from onnx import helper

from cpd_onnx.algebra.atoms import NOTHING, Axis
from cpd_onnx.channels.groups import Combed
from cpd_onnx.channels.weights import dequantized
from cpd_onnx.data.sources import calibration, calibration_batch
from cpd_onnx.ir.model import Array
from cpd_onnx.rules.api import FLOATS, Factor
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.scores.magnitude import l2
from cpd_onnx.scores.registry import Scores, score_function
from cpd_onnx.shapes.values import Value

if TYPE_CHECKING:
    from cpd_onnx.scores.registry import ScoreContext

CHUNK_BYTES = 1 << 28
"""What the tensors that one run gives back may take together, one tensor at least."""
_ITEM = 4
_LARGEST = float(np.finfo(np.float32).max)
"""Of all scores, with room to add them up."""


@dataclass(frozen=True, eq=False)
class ChannelMoments:
    """Of a tensor, for each index of one axis: over all other axes and all samples.

    Attributes:
        energy: mean square. Integers have no zero of their own: of these it is the variance.
        variance: mean square of the distance to the mean.
    """

    energy: Scores
    variance: Scores


@dataclass(frozen=True, eq=False)
class Consumed:
    """One activation at the input of a node that multiplies it and sums over one of its axes.

    Attributes:
        channels: the atoms of that axis; everything else has one entry for each.
        own: what the activation is.
        met: mean square of the other activations in the product; one where there are only weights.
        absolute: what a unit is multiplied with at most: sum of absolute weights, root mean square of activations.
        squares: sum of squared weights, mean square of activations.
    """

    channels: Axis
    own: ChannelMoments
    met: Scores
    absolute: Scores
    squares: Scores


Measure: TypeAlias = Callable[[Consumed], Scores]
"""What one consumer says about the channels that it consumes."""


def energy(consumed: Consumed) -> Scores:
    """Mean square, relative to that of all channels in the tensor; of two activations that meet, of their product."""
    product = consumed.own.energy * consumed.met
    return np.asarray(product / (product.mean() or 1.0))


def reach(consumed: Consumed) -> Scores:
    """Root mean square times the absolute weights that it meets.

    The root mean square stands for the L2 norm of Wanda, which grows with the number of samples.
    """
    return np.asarray(np.sqrt(consumed.own.energy) * consumed.absolute)


def fluctuation(consumed: Consumed) -> Scores:
    """Variance times the squared weights that it meets: what is left once a bias replaces the channel by its mean."""
    return consumed.own.variance * consumed.squares


def summed(context: ScoreContext, measure: Measure) -> list[Scores]:
    """Sum a measure over all consumers of each channel; L2 norm of the weights for groups that none is seen to consume.

    A composite index counts towards each of its parts: the d dimensions of a head make up the head's sum.

    Raises:
        DataError: the data does not fit the model, or holds no samples.
        UnsupportedError: onnxruntime does not run the model.
    """
    combed = context.combed
    totals, is_seen = np.zeros(len(combed.atoms)), np.zeros(len(combed.atoms), np.bool_)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows, or is no number, stays
        for consumed in consumers(context):
            values = np.nan_to_num(measure(consumed), nan=_LARGEST, posinf=_LARGEST)
            parts = combed.atoms.parts(consumed.channels)
            for column in range(parts.shape[1]):
                np.add.at(totals, parts[:, column], values)
            is_seen[parts] = True
    totals[NOTHING], is_seen[NOTHING] = 0.0, False
    pairs = zip(combed.groups, l2(context), strict=True)
    return [totals[g.channels] if is_seen[g.channels].any() else magnitude for g, magnitude in pairs]


def consumers(context: ScoreContext) -> Iterator[Consumed]:
    """Every activation with channels that some node multiplies and sums over, as the samples show it.

    Raises as `summed`.
    """
    combed = context.combed
    products = [p for p in combed.recorder.products if any(not combed.atoms.all_frozen(f.atoms) for f in p)]
    carried = [f for product in products for f in _activations(product) if _is_visible(combed, f.value)]
    moments = _observed(context, carried)
    made = _computed(context, [f.value for product in products for f in product if _is_computed(combed, f.value)])
    for product in products:
        for factor in _activations(product):
            own = moments.get((factor.value, factor.axis))
            if own is not None and not combed.atoms.all_frozen(factor.atoms):
                others = [_side(combed, other, moments, made) for other in product if other is not factor]
                yield _consumed(factor, own, others)


def _activations(product: Sequence[Factor]) -> list[Factor]:
    """The factors that carry something: what depends on the inputs; else what is made of constants (of positions, say).

    In a product with an activation, what is made of constants is a weight.
    """
    return [f for f in product if f.value.constants is None] or [f for f in product if not f.value.moved]


def _is_visible(combed: Combed, value: Value) -> bool:
    """Whether a graph output could show the value: it lies in the main graph and has a type and a shape."""
    return combed.folded.scope.values.get(value.name) is value and bool(value.dtype) and value.shapes is not None


def _is_computed(combed: Combed, value: Value) -> bool:
    return value.constants is not None and value not in combed.weight_of and _is_visible(combed, value)


@dataclass(frozen=True, eq=False)
class _WeightFactor:
    """The values of a weight and the axis along which it is summed."""

    values: Array
    axis: int

    def per_index(self, function: Callable[[Array], Array], count: int) -> Scores:
        """Sums of a function of the values for each of `count` indices of the activation.

        A weight that works in groups has fewer: its first axis then is as many blocks.
        """
        values, size = function(self.values.astype(np.float64)), self.values.shape[self.axis]
        groups = max(1, count // size)
        groups = 1 if values.shape[0] % groups else groups
        blocks = values.reshape(groups, values.shape[0] // groups, *values.shape[1:])
        others = tuple(place for place in range(1, blocks.ndim) if place != self.axis + 1)
        return _fitted(blocks.sum(axis=others).ravel(), count)


def _fitted(values: Scores, count: int) -> Scores:
    """Index by index, but the mean where sizes differ: queries of several heads meet the keys of one."""
    return values if len(values) == count else np.full(count, values.mean())


_Side: TypeAlias = ChannelMoments | _WeightFactor | None


def _side(
    combed: Combed, factor: Factor, moments: Mapping[tuple[Value, int], ChannelMoments], made: Mapping[Value, Array]
) -> _Side:
    """What is known of a factor."""
    weight = combed.weight_of.get(factor.value)
    if weight is not None:
        return _WeightFactor(dequantized(combed, weight), factor.axis)
    if factor.value in made:
        return _WeightFactor(made[factor.value], factor.axis)
    return moments.get((factor.value, factor.axis))


def _consumed(factor: Factor, own: ChannelMoments, others: Sequence[_Side]) -> Consumed:
    count = len(factor.atoms)
    met, absolute, squares = np.ones(count), np.ones(count), np.ones(count)
    for other in others:
        if isinstance(other, ChannelMoments):
            meets = _fitted(other.energy, count)
            met, absolute, squares = met * meets, absolute * np.sqrt(meets), squares * meets
        elif other is not None:
            absolute, squares = absolute * other.per_index(np.abs, count), squares * other.per_index(np.square, count)
    return Consumed(factor.atoms, own, met, absolute, squares)


# What onnxruntime shows.


@dataclass(eq=False)
class _Sums:
    """Of a tensor along one axis, over all batches so far."""

    count: int = 0
    total: Scores | float = 0.0
    squares: Scores | float = 0.0

    def add(self, array: Array, axis: int) -> None:
        """Take one batch."""
        size = array.shape[axis]
        rows = array.astype(np.float64).reshape(math.prod(array.shape[:axis]), size, -1)
        self.count += rows.shape[0] * rows.shape[2]
        self.total = self.total + rows.sum(axis=(0, 2))
        self.squares = self.squares + np.einsum("anb,anb->n", rows, rows)

    def moments(self, *, is_float: bool) -> ChannelMoments:
        """What the sums come to."""
        count = max(1, self.count)
        mean, energy = np.asarray(self.total) / count, np.asarray(self.squares) / count
        variance = np.maximum(energy - mean**2, 0.0)
        return ChannelMoments(energy if is_float else variance, variance)


def _observed(context: ScoreContext, factors: Sequence[Factor]) -> dict[tuple[Value, int], ChannelMoments]:
    """Moments of the activations along the axes of the factors."""
    values = {factor.value.name: factor.value for factor in factors}
    sums: dict[str, dict[int, _Sums]] = {name: {} for name in values}
    for factor in factors:
        sums[factor.value.name].setdefault(factor.axis, _Sums())
    for chunk in _chunks(context, list(values.values())):
        for arrays in batches(context, chunk):
            for name, array in arrays.items():
                for axis, found in sums[name].items():
                    found.add(array, axis)
    return {
        (values[name], axis): found.moments(is_float=values[name].dtype in FLOATS)
        for name, axes in sums.items()
        for axis, found in axes.items()
    }


def _computed(context: ScoreContext, values: Sequence[Value]) -> dict[Value, Array]:
    """Weights that the graph itself transposes or scales before they are used."""
    named = {value.name: value for value in values}
    arrays = next(batches(context, list(named))) if named else {}
    return {named[name]: array for name, array in arrays.items()}


def _chunks(context: ScoreContext, values: Sequence[Value]) -> Iterator[list[str]]:
    """Names of values that may be held together."""
    assert context.data is not None
    batch = calibration_batch(context.combed.folded.model.proto, context.data, context.samples)
    names, held = list[str](), 0
    for value in values:
        shape = value.shape or ()
        is_batched = bool(shape) and not value.has_fixed(0)
        size = _ITEM * math.prod(shape) * (batch // shape[0] + 1 if is_batched else 1)
        if names and held + size > CHUNK_BYTES:
            yield names
            names, held = [], 0
        names, held = [*names, value.name], held + size
    if names:
        yield names


def batches(context: ScoreContext, names: Sequence[str]) -> Iterator[dict[str, Array]]:
    """The named values on one batch after the other.

    Raises DataError if there is no batch.
    """
    model = context.combed.folded.model.copy()
    values = context.combed.folded.scope.values
    fed = {info.name for info in model.graph.input if not model.has(info.name)}
    wanted = [name for name in names if name not in fed]
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, values[name].dtype, None) for name in wanted)
    session = open_model(model) if wanted else None
    assert context.data is not None
    proto = context.combed.folded.model.proto
    for feed in calibration(proto, context.data, context.samples, seed=context.seed):
        found = execute(session, feed) if session is not None else []
        yield {name: feed[name] for name in names if name in fed} | dict(zip(wanted, found, strict=True))


@score_function(
    "activation",
    source="mean square of Molchanov et al.'s activations, ICLR 2017, where they are consumed",
    needs_data=True,
)
def activation(context: ScoreContext) -> list[Scores]:
    """Energy at the inputs of the consumers, relative to the tensor's: what is zero there does nothing."""
    return summed(context, energy)


@score_function(
    "wanda",
    source="Sun et al., A Simple and Effective Pruning Approach for LLMs, ICLR 2024, by channel",
    needs_data=True,
)
def wanda(context: ScoreContext) -> list[Scores]:
    """Activations times the absolute weights that consume them."""
    return summed(context, reach)


@score_function("variance", source="An et al., FLAP, AAAI 2024: weighted input feature variance", needs_data=True)
def variance(context: ScoreContext) -> list[Scores]:
    """Variance of the activations times the squared weights that consume them: a bias can do what is constant."""
    return summed(context, fluctuation)
