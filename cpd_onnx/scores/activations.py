"""Scores from the activations of each channel, with onnxruntime alone.

A channel is measured where it is consumed: at the inputs of nodes that multiply it by weights or another activation
and sum over it. Each batch is reduced to sums, so that memory does not grow with the data.

Some consumers cannot be observed: those inside subgraphs and model-local functions, the state of a recurrent operator,
and projections inside a fused operator. Groups without an observed consumer are scored by their weights.
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
from cpd_onnx.fitting.levels import levels_of
from cpd_onnx.io.progress import advance
from cpd_onnx.ir.model import Array
from cpd_onnx.rules.api import FLOATS, Factor
from cpd_onnx.runtime.draws import with_fixed_draws
from cpd_onnx.runtime.sessions import execute, open_model
from cpd_onnx.scores.magnitude import l2
from cpd_onnx.scores.registry import Scores, score_function
from cpd_onnx.shapes.values import Value

if TYPE_CHECKING:
    from cpd_onnx.scores.registry import ScoreContext

CHUNK_BYTES = 1 << 28
"""Maximum size in bytes of the tensors that one run returns, if it is more than one (heuristic)."""
_ITEM = 4
"""Bytes of an element, taken for all types."""
_LARGEST = float(np.finfo(np.float32).max)
"""Upper bound of scores, low enough for sums of them to be finite in float64."""


@dataclass(frozen=True, eq=False)
class ChannelMoments:
    """Moments for each index of one axis of a tensor, over all other axes and all samples.

    Attributes:
        energy: Mean square; the variance for integers whose zero point is not known.
        variance: Variance.
    """

    energy: Scores
    variance: Scores


@dataclass(frozen=True, eq=False)
class Consumed:
    """One activation at the input of a node that multiplies it and sums over one of its axes.

    Attributes:
        channels: Atoms of that axis; all other attributes have one entry for each.
        own: Moments of the activation.
        met: Mean square of the other activations in the product; 1 if there are only weights.
        absolute: Sum of absolute weights, or root mean square of activations, that each index is multiplied by.
        squares: Sum of squared weights, or mean square of activations, that each index is multiplied by.
    """

    channels: Axis
    own: ChannelMoments
    met: Scores
    absolute: Scores
    squares: Scores


Measure: TypeAlias = Callable[[Consumed], Scores]
"""Function from one consumer to scores of the channels that it consumes."""


def energy(consumed: Consumed) -> Scores:
    """Return the mean square relative to that of all channels in the tensor, or of the product of two activations."""
    product = consumed.own.energy * consumed.met
    return np.asarray(product / (product.mean() or 1.0))


def reach(consumed: Consumed) -> Scores:
    """Return the root mean square times the absolute weights that multiply it.

    The root mean square replaces the L2 norm of Wanda, which grows with the number of samples.
    """
    return np.asarray(np.sqrt(consumed.own.energy) * consumed.absolute)


def fluctuation(consumed: Consumed) -> Scores:
    """Return the variance times the squared weights: the error if a bias replaces the channel by its mean."""
    return consumed.own.variance * consumed.squares


def summed(context: ScoreContext, measure: Measure) -> list[Scores]:
    """Return the sum of a measure over all consumers of each channel; the L2 norm for groups without any observed.

    A composite index counts towards each of its parts: the score of a head is the sum over its dimensions.

    Raises:
        DataError: The data does not fit the model, or contains no samples.
        UnsupportedError: onnxruntime cannot run the model.
    """
    combed = context.combed
    totals, is_observed = np.zeros(len(combed.atoms)), np.zeros(len(combed.atoms), np.bool_)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity and NaN are replaced below
        for consumed in consumers(context):
            values = np.nan_to_num(measure(consumed), nan=_LARGEST, posinf=_LARGEST)
            parts = combed.atoms.parts(consumed.channels)
            for column in range(parts.shape[1]):
                np.add.at(totals, parts[:, column], values)
            is_observed[parts] = True
    totals[NOTHING], is_observed[NOTHING] = 0.0, False
    pairs = zip(combed.groups, l2(context), strict=True)
    return [totals[g.channels] if is_observed[g.channels].any() else magnitude for g, magnitude in pairs]


def consumers(context: ScoreContext) -> Iterator[Consumed]:
    """Yield every activation with channels that a node multiplies and sums over, with its moments on the samples.

    Raises as `summed`.
    """
    combed = context.combed
    products = [p for p in combed.recorder.products if any(not combed.atoms.all_frozen(f.atoms) for f in p)]
    carried = [f for product in products for f in _activations(product) if _is_visible(combed, f.value)]
    moments = _observed(context, carried)
    computed = _computed(context, [f.value for product in products for f in product if _is_computed(combed, f.value)])
    for product in products:
        for factor in _activations(product):
            own = moments.get((factor.value, factor.axis))
            if own is not None and not combed.atoms.all_frozen(factor.atoms):
                others = [_side(combed, other, moments, computed) for other in product if other is not factor]
                yield _consumed(factor, own, others)


def _activations(product: Sequence[Factor]) -> list[Factor]:
    """Return the factors that depend on the inputs; if none does, those computed from constants, such as positions.

    In a product with an activation, a factor computed from constants is a weight.
    """
    return [f for f in product if f.value.constants is None] or [f for f in product if not f.value.moved]


def _is_visible(combed: Combed, value: Value) -> bool:
    """Return whether the value can be made a graph output: it is in the main graph and has a type and a shape."""
    return combed.folded.scope.values.get(value.name) is value and bool(value.dtype) and value.shapes is not None


def _is_computed(combed: Combed, value: Value) -> bool:
    return value.constants is not None and value not in combed.weight_of and _is_visible(combed, value)


@dataclass(frozen=True, eq=False)
class _WeightFactor:
    """The values of a weight and the axis along which it is summed."""

    values: Array
    axis: int

    def per_index(self, function: Callable[[Array], Array], count: int) -> Scores:
        """Return sums of a function of the values for each of `count` indices of the activation.

        The weight of a grouped operator has fewer indices: its first axis then consists of one block per group.
        """
        values, size = function(self.values.astype(np.float64)), self.values.shape[self.axis]
        groups = max(1, count // size)
        groups = 1 if values.shape[0] % groups else groups
        blocks = values.reshape(groups, values.shape[0] // groups, *values.shape[1:])
        others = tuple(place for place in range(1, blocks.ndim) if place != self.axis + 1)
        return _fitted(blocks.sum(axis=others).ravel(), count)


def _fitted(values: Scores, count: int) -> Scores:
    """Return the values, or their mean for all indices if sizes differ, as of the queries of heads that share keys."""
    return values if len(values) == count else np.full(count, values.mean())


_Side: TypeAlias = ChannelMoments | _WeightFactor | None


def _side(
    combed: Combed, factor: Factor, moments: Mapping[tuple[Value, int], ChannelMoments], computed: Mapping[Value, Array]
) -> _Side:
    """Return the weight or the moments of a factor, None if neither is known."""
    weight = combed.weight_of.get(factor.value)
    if weight is not None:
        return _WeightFactor(dequantized(combed, weight), factor.axis)
    if factor.value in computed:
        return _WeightFactor(computed[factor.value], factor.axis)
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


# Observation in onnxruntime.


@dataclass(eq=False)
class _Sums:
    """Sums of a tensor along one axis over all batches so far."""

    count: int = 0
    total: Scores | float = 0.0
    squares: Scores | float = 0.0

    def add(self, array: Array, axis: int) -> None:
        """Add one batch."""
        size = array.shape[axis]
        rows = array.astype(np.float64).reshape(math.prod(array.shape[:axis]), size, -1)
        self.count += rows.shape[0] * rows.shape[2]
        self.total = self.total + rows.sum(axis=(0, 2))
        self.squares = self.squares + np.einsum("anb,anb->n", rows, rows)

    def moments(self, *, is_float: bool) -> ChannelMoments:
        """Return the moments of all batches."""
        count = max(1, self.count)
        mean, energy = np.asarray(self.total) / count, np.asarray(self.squares) / count
        variance = np.maximum(energy - mean**2, 0.0)
        return ChannelMoments(energy if is_float else variance, variance)


def _observed(context: ScoreContext, factors: Sequence[Factor]) -> dict[tuple[Value, int], ChannelMoments]:
    """Return the moments of the activations along the axes of the factors."""
    values = {factor.value.name: factor.value for factor in factors}
    levels = levels_of(context.combed.folded)
    sums: dict[str, dict[int, _Sums]] = {name: {} for name in values}
    for factor in factors:
        sums[factor.value.name].setdefault(factor.axis, _Sums())
    for chunk in _chunks(context, list(values.values())):
        for arrays in batches(context, chunk):
            for name, array in arrays.items():
                real = levels[name].real(array) if name in levels else array
                for axis, found in sums[name].items():
                    found.add(real, axis)
    return {
        (values[name], axis): found.moments(is_float=values[name].dtype in FLOATS or name in levels)
        for name, axes in sums.items()
        for axis, found in axes.items()
    }


def _computed(context: ScoreContext, values: Sequence[Value]) -> dict[Value, Array]:
    """Return the values of weights that the graph transposes or scales before use."""
    named = {value.name: value for value in values}
    arrays = next(batches(context, list(named))) if named else {}
    return {named[name]: array for name, array in arrays.items()}


def _chunks(context: ScoreContext, values: Sequence[Value]) -> Iterator[list[str]]:
    """Yield names of values that fit in memory together, see `CHUNK_BYTES`."""
    assert context.data is not None
    batch = calibration_batch(context.combed.folded.model, context.data, context.samples)
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
    """Yield the named values of each batch; raises DataError if there is no batch."""
    model = context.combed.folded.model.copy()
    values = context.combed.folded.scope.values
    fed = {info.name for info in model.graph.input if not model.has(info.name)}
    wanted = [name for name in names if name not in fed]
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, values[name].dtype, None) for name in wanted)
    session = open_model(with_fixed_draws(model)) if wanted else None
    assert context.data is not None
    source = context.combed.folded.model
    size = calibration_batch(source, context.data, context.samples)
    for number, feed in enumerate(calibration(source, context.data, context.samples, seed=context.seed)):
        advance(number * size, context.samples)
        found = execute(session, feed) if session is not None else []
        yield {name: feed[name] for name in names if name in fed} | dict(zip(wanted, found, strict=True))


@score_function(
    "activation",
    source="mean square of Molchanov et al.'s activations, ICLR 2017, where they are consumed",
    needs_data=True,
)
def activation(context: ScoreContext) -> list[Scores]:
    """Return the energy at the inputs of the consumers relative to that of the tensor."""
    return summed(context, energy)


@score_function(
    "wanda",
    source="Sun et al., A Simple and Effective Pruning Approach for LLMs, ICLR 2024, by channel",
    needs_data=True,
)
def wanda(context: ScoreContext) -> list[Scores]:
    """Return the activations times the absolute weights that consume them."""
    return summed(context, reach)


@score_function("variance", source="An et al., FLAP, AAAI 2024: weighted input feature variance", needs_data=True)
def variance(context: ScoreContext) -> list[Scores]:
    """Return the variance of the activations times the squared weights: a bias replaces the constant part."""
    return summed(context, fluctuation)
