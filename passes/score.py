"""Score: how much each coupled channel matters.

Scores are functions in a table, and users add theirs:

    @scorer("widest", source="my own idea")
    def widest(question: Question) -> list[Scores]:
        return [np.arange(len(group), dtype=float) for group in question.combed.groups]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from cpd_onnx.data import Source, imported
from cpd_onnx.errors import DataError, TargetError, UnsupportedError
from cpd_onnx.graph import Array
from cpd_onnx.groups import Combed, Weight
from cpd_onnx.state import State
from cpd_onnx.weights import dequantized

Scores: TypeAlias = npt.NDArray[np.float64]
Summand: TypeAlias = Callable[[Array], Array]

SAMPLES = 64
"""Samples that a score looks at, unless it says otherwise."""
_BLOCK = 1 << 22
"""Bytes of a weight that are looked at together."""


@dataclass(frozen=True)
class Question:
    """What a score may look at.

    Attributes:
        combed: the model and its coupled channels.
        data: samples, for scores that need them.
        samples: how many of these are looked at.
        labels: whether their labels count, instead of the model's own answers.
        seed: of everything random.
    """

    combed: Combed
    data: Source | None = None
    samples: int = SAMPLES
    labels: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Scorer:
    """How channels are scored.

    Attributes:
        function: gives one number per coupled channel, for each group in order; small is unimportant.
        source: where the idea is from.
        needs_data: whether it looks at samples.
        is_loss: whether the numbers estimate what the model loses with the channel, so that groups compare as they are;
            otherwise they are relative to the group's mean.
        samples: that it looks at where nobody says how many.
    """

    function: Callable[[Question], list[Scores]]
    source: str
    needs_data: bool = False
    is_loss: bool = False
    samples: int = SAMPLES


SCORERS: dict[str, Scorer] = {}
"""All scores by name."""


def scorer(
    name: str, *, source: str, needs_data: bool = False, is_loss: bool = False, samples: int = SAMPLES
) -> Callable[[Callable[[Question], list[Scores]]], Callable[[Question], list[Scores]]]:
    """Enter a function into the table of scores; see `Scorer`.

    Raises:
        ValueError: there is a score of that name.
    """
    if name in SCORERS:
        raise ValueError(f"there is a score {name!r} already")

    def enter(function: Callable[[Question], list[Scores]]) -> Callable[[Question], list[Scores]]:
        SCORERS[name] = Scorer(function, source, needs_data, is_loss, samples)
        return function

    return enter


def score(combed: Combed, kind: str = "l2", *, samples: int | None = None, **more: Any) -> list[Scores]:
    """One number per coupled channel, for each group in order; small is unimportant.

    Args:
        combed: the model.
        kind: a name in `SCORERS`.
        samples: that are looked at; None leaves that to the score.
        more: further fields of `Question`.

    Raises:
        TargetError: no score has that name, or it gives something else.
        DataError: it needs data and there is none.
    """
    found = scorer_of(kind)
    question = Question(combed, samples=samples or found.samples, **more)
    if found.needs_data and question.data is None:
        raise DataError(f"score {kind!r} looks at samples: give --data, or a source as `data`")
    scores = [np.asarray(values, np.float64) for values in found.function(question)]
    if [s.shape for s in scores] != [(len(group),) for group in combed.groups]:
        raise TargetError(f"score {kind!r} should give one number per channel for each of {len(combed.groups)} groups")
    return scores


def scorer_of(kind: str) -> Scorer:
    """Look a score up, or import the one that "module:function" names.

    A function may have the attributes `needs_data` and `is_loss`. Raises TargetError if there is none of that name.
    """
    if kind in SCORERS:
        return SCORERS[kind]
    if kind.count(":") != 1:
        raise TargetError(f"no score is called {kind!r}: choose one of {', '.join(SCORERS)}, or module:function")
    function = imported(kind, "that scores channels")
    return Scorer(function, kind, getattr(function, "needs_data", False), getattr(function, "is_loss", False))


# From the weights alone.


@scorer("l1", source="Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, summed over the coupled layers")
def l1(question: Question) -> list[Scores]:
    """Sum of absolute values."""
    return _magnitudes(question.combed, np.abs)


@scorer("l2", source="Fang et al., DepGraph, CVPR 2023: group magnitude")
def l2(question: Question) -> list[Scores]:
    """Root of the sum of squares."""
    return [np.sqrt(total) for total in _magnitudes(question.combed, np.square)]


@scorer("lamp", source="Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021", is_loss=True)
def lamp(question: Question) -> list[Scores]:
    """Square over the sum of all squares in the group that are no smaller."""
    found = []
    for total in _magnitudes(question.combed, np.square):
        order = np.argsort(total, kind="stable")
        rest = np.cumsum(total[order][::-1])[::-1]
        made = np.empty_like(total)
        made[order] = total[order] / np.maximum(rest, np.finfo(np.float64).tiny)
        found.append(made)
    return found


@scorer("bn", source="Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017")
def batch_norm_scale(question: Question) -> list[Scores]:
    """Sum of the absolute scales of the batch normalisations that a channel runs through; L2 where there is none."""
    combed = question.combed
    totals = np.zeros(len(combed.atoms))
    for weight in combed.weights:
        if id(weight.value) in combed.recorder.scales:
            add_per_channel(totals, combed, weight, np.abs(dequantized(combed, weight)))
    pairs = zip(combed.groups, l2(question), strict=True)
    return [totals[group.channels] if totals[group.channels].any() else magnitude for group, magnitude in pairs]


@scorer("fpgm", source="He et al., Filter Pruning via Geometric Median, CVPR 2019, over all coupled layers")
def geometric_median(question: Question) -> list[Scores]:
    """Sum of the distances to the other channels of the group: what is near the others can be said by them."""
    found = []
    for group in question.combed.groups:
        squares = np.zeros((len(group), len(group)))
        for member in question.combed.members(group):
            counts = {len(places) for places in member.indices}
            if not member.weight.is_trained or member.weight.is_vector or len(counts) != 1:
                continue
            rows = np.moveaxis(dequantized(question.combed, member.weight), member.axis, 0)
            vectors = rows[np.asarray(member.indices)].reshape(len(group), -1).astype(np.float64)
            lengths = np.square(vectors).sum(1)
            squares += np.maximum(lengths[:, None] + lengths - 2 * vectors @ vectors.T, 0.0)
        found.append(np.sqrt(squares).sum(1))
    return found


@scorer("random", source="a baseline")
def at_random(question: Question) -> list[Scores]:
    """Anything."""
    generator = np.random.default_rng(question.seed)
    return [generator.random(len(group)) for group in question.combed.groups]


# From activations.


@scorer(
    "activation",
    source="mean square of Molchanov et al.'s activations, ICLR 2017, where they are consumed",
    needs_data=True,
)
def activation(question: Question) -> list[Scores]:
    """Energy at the inputs of the consumers, relative to the tensor's: what is zero there does nothing."""
    from cpd_onnx.passes import activations

    return activations.summed(question, activations.energy)


@scorer(
    "wanda",
    source="Sun et al., A Simple and Effective Pruning Approach for LLMs, ICLR 2024, by channel",
    needs_data=True,
)
def wanda(question: Question) -> list[Scores]:
    """Activations times the absolute weights that consume them."""
    from cpd_onnx.passes import activations

    return activations.summed(question, activations.reach)


@scorer("variance", source="An et al., FLAP, AAAI 2024: weighted input feature variance", needs_data=True)
def variance(question: Question) -> list[Scores]:
    """Variance of the activations times the squared weights that consume them: a bias can do what is constant."""
    from cpd_onnx.passes import activations

    return activations.summed(question, activations.fluctuation)


@scorer(
    "reconstruction",
    source="Frantar and Alistarh, Optimal Brain Compression, NeurIPS 2022, for channels; after He et al., ICCV 2017",
    needs_data=True,
    is_loss=True,
    samples=512,
)
def reconstruction(question: Question) -> list[Scores]:
    """What least squares cannot make up for when a channel goes, over all its consumers."""
    from cpd_onnx.fitting import one_thread
    from cpd_onnx.passes.reconstruction import losses

    with one_thread():
        return losses(question)


# From gradients.


@scorer("taylor", source="Molchanov et al., Importance Estimation, CVPR 2019", needs_data=True, is_loss=True)
def taylor(question: Question) -> list[Scores]:
    """Mean over the samples of the absolute first-order change of the loss when a channel goes."""
    return _from_gradients(question, np.abs)


@scorer(
    "fisher",
    source="Schmitt et al., ITSC 2024, after Liu et al., Group Fisher Pruning, ICML 2021",
    needs_data=True,
    is_loss=True,
)
def fisher(question: Question) -> list[Scores]:
    """Mean over the samples of the squared first-order change of the loss: the diagonal of its curvature."""
    return _from_gradients(question, np.square)


def _from_gradients(question: Question, summand: Summand) -> list[Scores]:
    try:
        from cpd_onnx.passes.gradients import changes
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UnsupportedError("scores from gradients need torch: pip install 'cpd-onnx[torch]'") from error
    total, count = np.zeros(len(question.combed.atoms)), 0
    for change in changes(question):
        total += summand(change)
        count += 1
    if not count:
        raise DataError("the data has no samples to score with")
    return [total[group.channels] / count for group in question.combed.groups]


@dataclass(frozen=True)
class Score:
    """Say how much each channel matters; the options are those of `Question`."""

    kind: str = "l2"
    seed: int = 0
    samples: int | None = None
    labels: bool = False
    name: ClassVar[str] = "score"

    def __call__(self, state: State) -> State:
        """Fill in `scores`."""
        more = {"samples": self.samples, "labels": self.labels, "seed": self.seed}
        scores = score(state.need("combed", "comb"), self.kind, data=state.data, **more)
        words = {"score": self.kind, "seed": self.seed}
        if scorer_of(self.kind).needs_data:
            words |= {"samples": self.samples or scorer_of(self.kind).samples, "labels": self.labels}
        return replace(state, scores=scores, score=words)


def _magnitudes(combed: Combed, summand: Summand) -> list[Scores]:
    """Sums over all matrices and kernels that a channel runs through; over vectors where a group has nothing else."""
    matrices, vectors = (_summed(combed, summand, vectors=which) for which in (False, True))
    pairs = ((matrices[group.channels], vectors[group.channels]) for group in combed.groups)
    return [total if total.any() else rest for total, rest in pairs]


def _summed(combed: Combed, summand: Summand, *, vectors: bool) -> Scores:
    """The sum over all weights of one sort, per primitive atom."""
    totals = np.zeros(len(combed.atoms))
    for weight in combed.weights:
        if weight.is_trained and weight.is_vector == vectors and not weight.scope.function and _is_live(combed, weight):
            values = dequantized(combed, weight)
            for rows in _blocks(values):
                with np.errstate(over="ignore", invalid="ignore"):  # what is no number stays, whatever else it is
                    summed = summand(values[rows].astype(np.float32, copy=False))
                add_per_channel(totals, combed, weight, summed, rows)
    return totals


def _blocks(values: Array) -> Iterator[slice]:
    """Rows that are looked at together: what is made of a large weight need not be as large."""
    step = max(1, _BLOCK * max(1, len(values)) // max(1, values.nbytes)) if values.ndim else 1
    return (slice(start, start + step) for start in range(0, len(values), step)) if values.ndim else iter([slice(None)])


def _is_live(combed: Combed, weight: Weight) -> bool:
    return any(not combed.atoms.all_frozen(axis) for axes in combed.weight_axes(weight) for axis in axes)


def add_per_channel(totals: Scores, combed: Combed, weight: Weight, values: Array, rows: slice = slice(None)) -> None:
    """Add numbers in the shape of a weight, or of some rows of it, to the totals of the primitive atoms they lie on."""
    for axes in combed.weight_axes(weight):
        for place, whole in enumerate(axes):
            axis = whole[rows] if place == 0 else whole
            if combed.atoms.all_frozen(axis):
                continue
            # First the axes before, then those behind: so numpy runs along memory.
            size, behind = values.shape[place], math.prod(values.shape[place + 1 :])
            flat = values.reshape(-1, size * behind)
            per_index = (flat.sum(axis=0) if len(flat) > 1 else flat).reshape(size, behind).sum(axis=1)
            parts = combed.atoms.parts(axis)
            for column in range(parts.shape[1]):
                np.add.at(totals, parts[:, column], per_index.astype(np.float64))
    totals[0] = 0.0
