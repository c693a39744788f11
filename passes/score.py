"""Score: how much each coupled channel matters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from cpd_onnx.errors import TargetError
from cpd_onnx.graph import Array
from cpd_onnx.groups import Combed, Weight
from cpd_onnx.state import State
from cpd_onnx.weights import dequantized

Scores: TypeAlias = npt.NDArray[np.float64]
Magnitude: TypeAlias = Callable[[Array], Array]

MAGNITUDES: dict[str, tuple[Magnitude, Magnitude]] = {
    "l1": (np.abs, lambda total: total),
    "l2": (np.square, np.sqrt),
}
"""Magnitude scores: what is summed over all weights of a channel, and what is made of the sum.

L1: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017; L2 likewise, summed over the coupled layers as in Fang
et al., DepGraph, CVPR 2023.
"""
SCORES = (*MAGNITUDES, "random")


def score(combed: Combed, kind: str = "l2", *, seed: int = 0) -> list[Scores]:
    """One number per coupled channel, for each group in order; small is unimportant.

    A channel's magnitude is taken over all matrices and kernels that it runs through; over vectors where a group has
    nothing else.
    """
    if kind == "random":
        rng = np.random.default_rng(seed)
        return [rng.random(len(group)) for group in combed.groups]
    if kind not in MAGNITUDES:
        raise TargetError(f"no score is called {kind!r}: choose one of {', '.join(SCORES)}")
    summand, finish = MAGNITUDES[kind]
    matrices, vectors = (_summed(combed, summand, vectors=which) for which in (False, True))
    found = []
    for group in combed.groups:
        total = matrices[group.channels]
        found.append(finish(total if total.any() else vectors[group.channels]))
    return found


@dataclass(frozen=True)
class Score:
    """Say how much each channel matters."""

    kind: str = "l2"
    seed: int = 0
    name: ClassVar[str] = "score"

    def __call__(self, state: State) -> State:
        """Fill in `scores`."""
        scores = score(state.need("combed", "comb"), self.kind, seed=self.seed)
        return replace(state, scores=scores, score={"score": self.kind, "seed": self.seed})


def _summed(combed: Combed, summand: Magnitude, *, vectors: bool) -> Scores:
    """The sum over all weights of one sort, per primitive atom."""
    totals = np.zeros(len(combed.atoms))
    for weight in combed.weights:
        if not weight.is_trained or weight.is_vector != vectors or weight.scope.function:
            continue
        for axes in combed.weight_axes(weight):
            live = [i for i, axis in enumerate(axes) if not combed.atoms.all_frozen(axis)]
            if live:
                _add(totals, combed, weight, live, axes, summand)
    return totals


def _add(totals: Scores, combed: Combed, weight: Weight, live: list[int], axes: list[Any], summand: Magnitude) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # a weight that is no number stays, whatever else it is
        values = summand(dequantized(combed, weight).astype(np.float32, copy=False))
    for axis in live:
        # First the axes before, then those behind: so numpy runs along memory.
        size, behind = values.shape[axis], math.prod(values.shape[axis + 1 :])
        rows = values.reshape(-1, size * behind)
        per_index = (rows.sum(axis=0) if len(rows) > 1 else rows).reshape(size, behind).sum(axis=1)
        parts = combed.atoms.parts(axes[axis])
        for column in range(parts.shape[1]):
            np.add.at(totals, parts[:, column], per_index.astype(np.float64))
    totals[0] = 0.0
