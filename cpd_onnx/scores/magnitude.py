"""Scores from the weights alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.channels.groups import Combed, Weight
from cpd_onnx.channels.weights import dequantized
from cpd_onnx.ir.model import Array
from cpd_onnx.scores.registry import ScoreContext, Scores, score_function

Summand: TypeAlias = Callable[[Array], Array]


_BLOCK = 1 << 22
"""Bytes of a weight that are processed at a time, which bounds temporary memory (heuristic)."""


@score_function(
    "l1", source="Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, summed over the coupled layers"
)
def l1(context: ScoreContext) -> list[Scores]:
    """Return the sum of absolute values of each channel's weights."""
    return _magnitudes(context.combed, np.abs)


@score_function("l2", source="Fang et al., DepGraph, CVPR 2023: group magnitude")
def l2(context: ScoreContext) -> list[Scores]:
    """Return the root of the sum of squares of each channel's weights."""
    return [np.sqrt(total) for total in _magnitudes(context.combed, np.square)]


@score_function(
    "lamp", source="Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021", is_loss=True
)
def lamp(context: ScoreContext) -> list[Scores]:
    """Return each channel's square divided by the sum of all squares in the group that are not smaller."""
    found = []
    for total in _magnitudes(context.combed, np.square):
        order = np.argsort(total, kind="stable")
        rest = np.cumsum(total[order][::-1])[::-1]
        ratios = np.empty_like(total)
        ratios[order] = total[order] / np.maximum(rest, np.finfo(np.float64).tiny)
        found.append(ratios)
    return found


@score_function(
    "bn", source="Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017"
)
def batch_norm_scale(context: ScoreContext) -> list[Scores]:
    """Return the sum of absolute batch normalisation scales of each channel; the L2 norm for groups without any."""
    combed = context.combed
    totals = np.zeros(len(combed.atoms))
    for weight in combed.weights:
        if weight.value in combed.recorder.scales:
            add_per_channel(totals, combed, weight, np.abs(dequantized(combed, weight)))
    pairs = zip(combed.groups, l2(context), strict=True)
    return [totals[group.channels] if totals[group.channels].any() else magnitude for group, magnitude in pairs]


@score_function("fpgm", source="He et al., Filter Pruning via Geometric Median, CVPR 2019, over all coupled layers")
def geometric_median(context: ScoreContext) -> list[Scores]:
    """Return the sum of distances to the other channels of the group: a channel near the others is redundant.

    The L2 norm for groups whose channels have unequal numbers of filters.
    """
    found = []
    for group, magnitude in zip(context.combed.groups, l2(context), strict=True):
        squares = np.zeros((len(group), len(group)))
        for member in context.combed.members(group):
            counts = {len(places) for places in member.indices}
            if not member.weight.is_trained or member.weight.is_vector or len(counts) != 1:
                continue
            rows = np.moveaxis(dequantized(context.combed, member.weight)[member.rows], member.axis, 0)
            vectors = rows[np.asarray(member.indices)].reshape(len(group), -1).astype(np.float64)
            lengths = np.square(vectors).sum(1)
            squares += np.maximum(lengths[:, None] + lengths - 2 * vectors @ vectors.T, 0.0)
        found.append(np.sqrt(squares).sum(1) if squares.any() else magnitude)
    return found


@score_function("random", source="a baseline")
def at_random(context: ScoreContext) -> list[Scores]:
    """Return random numbers."""
    generator = np.random.default_rng(context.seed)
    return [generator.random(len(group)) for group in context.combed.groups]


def _magnitudes(combed: Combed, summand: Summand) -> list[Scores]:
    """Return sums over all matrices and kernels of each channel; over its vectors if the group has nothing else."""
    matrices, vectors = (_summed(combed, summand, vectors=which) for which in (False, True))
    pairs = ((matrices[group.channels], vectors[group.channels]) for group in combed.groups)
    return [total if total.any() else rest for total, rest in pairs]


def _summed(combed: Combed, summand: Summand, *, vectors: bool) -> Scores:
    """Return the sum over all matrices and kernels, or over all vectors, per primitive atom."""
    totals = np.zeros(len(combed.atoms))
    for weight in combed.weights:
        if weight.is_trained and weight.is_vector == vectors and not weight.scope.function and _is_live(combed, weight):
            values = dequantized(combed, weight)
            for rows in _blocks(values):
                with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinity are kept
                    summed = summand(values[rows].astype(np.float32, copy=False))
                add_per_channel(totals, combed, weight, summed, rows)
    return totals


def _blocks(values: Array) -> Iterator[slice]:
    """Return the rows that are processed at a time, so that temporary arrays are small even for large weights."""
    step = max(1, _BLOCK * max(1, len(values)) // max(1, values.nbytes)) if values.ndim else 1
    return (slice(start, start + step) for start in range(0, len(values), step)) if values.ndim else iter([slice(None)])


def _is_live(combed: Combed, weight: Weight) -> bool:
    return any(not combed.atoms.all_frozen(axis) for axes in weight.axes for axis in axes)


def add_per_channel(totals: Scores, combed: Combed, weight: Weight, values: Array, rows: slice = slice(None)) -> None:
    """Add numbers in the shape of a weight, or of some of its rows, to the totals of their primitive atoms."""
    start = rows.start or 0
    for piece in (piece for axes in weight.axes for piece in combed.pieces(axes)):
        if piece.rows == slice(None):
            _add(totals, combed, [axis[rows] if place == 0 else axis for place, axis in enumerate(piece.axes)], values)
            continue
        first, last = max(start, piece.rows.start), min(start + len(values), piece.rows.stop)
        if first < last:
            own = piece.axes[0][first - piece.rows.start : last - piece.rows.start]
            _add(totals, combed, [own, *piece.axes[1:]], values[first - start : last - start])
    totals[0] = 0.0


def _add(totals: Scores, combed: Combed, axes: Sequence[Axis], values: Array) -> None:
    """Add numbers to the totals of the primitive atoms of each axis."""
    for place, axis in enumerate(axes):
        if combed.atoms.all_frozen(axis):
            continue
        # The axes before are summed first, then those after: numpy then reads memory in order.
        size, behind = values.shape[place], math.prod(values.shape[place + 1 :])
        flat = values.reshape(-1, size * behind)
        per_index = (flat.sum(axis=0) if len(flat) > 1 else flat).reshape(size, behind).sum(axis=1)
        parts = combed.atoms.parts(axis)
        for column in range(parts.shape[1]):
            np.add.at(totals, parts[:, column], per_index.astype(np.float64))
