"""Scores: the importance of each coupled channel.

Score functions are registered in a table, and users can add their own:

    @score_function("widest", source="my own idea")
    def widest(context: ScoreContext) -> list[Scores]:
        return [np.arange(len(group), dtype=float) for group in context.combed.groups]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cpd_onnx.channels.free import free_channels, removable
from cpd_onnx.channels.groups import Combed
from cpd_onnx.channels.renormalized import renormalized
from cpd_onnx.data.sources import Source, imported
from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.errors import CpdError, DataError, TargetError, UnsupportedError
from cpd_onnx.io.progress import step

Scores: TypeAlias = npt.NDArray[np.float64]

SAMPLES = 64
"""Default number of samples used for scoring (heuristic)."""


@dataclass(frozen=True)
class ScoreContext:
    """Input of a score function.

    Attributes:
        combed: The model and its coupled channels.
        data: Samples, for scores that need them.
        samples: Number of samples used.
        labels: Whether their labels are used instead of the model's own outputs.
        seed: Seed of all random choices.
        is_repaired: Whether a repair follows, which may replace channels by linear combinations of them.
    """

    combed: Combed
    data: Source | None = None
    samples: int = SAMPLES
    labels: bool = False
    seed: int = 0
    is_repaired: bool = False


@dataclass(frozen=True)
class ScoreFunction:
    """A way to score channels.

    Attributes:
        function: Function that returns one number per coupled channel for each group in order; lower is less important.
        source: Publication that the score is from.
        needs_data: Whether it needs samples.
        is_loss: Whether the numbers estimate the loss of the model without the channel, so that they are comparable
            between groups; otherwise they are taken relative to the mean of the group.
        samples: Default number of samples.
    """

    function: Callable[[ScoreContext], list[Scores]]
    source: str
    needs_data: bool = False
    is_loss: bool = False
    samples: int = SAMPLES


SCORE_FUNCTIONS: dict[str, ScoreFunction] = {}
"""All score functions by name."""


def score_function(
    name: str, *, source: str, needs_data: bool = False, is_loss: bool = False, samples: int = SAMPLES
) -> Callable[[Callable[[ScoreContext], list[Scores]]], Callable[[ScoreContext], list[Scores]]]:
    """Return a decorator that registers a score function; see `ScoreFunction`.

    Raises:
        ValueError: The name is taken.
    """
    if name in SCORE_FUNCTIONS:
        raise ValueError(f"score {name!r} is registered already")

    def enter(function: Callable[[ScoreContext], list[Scores]]) -> Callable[[ScoreContext], list[Scores]]:
        SCORE_FUNCTIONS[name] = ScoreFunction(function, source, needs_data, is_loss, samples)
        return function

    return enter


def needing_torch(error: ModuleNotFoundError) -> CpdError:
    """Return what to say of a score from gradients whose import failed; raises the error if that was not for torch."""
    if error.name != "torch":
        raise error
    return UnsupportedError("scores from gradients need torch: pip install 'cpd-onnx[torch]'")


@step("score")
def score(combed: Combed, kind: str = "l2", *, samples: int | None = None, **more: Any) -> list[Scores]:
    """Return one number per coupled channel for each group in order; lower is less important.

    Channels whose removal changes no output have lower scores than all others of their group, whatever the score.

    Args:
        combed: The model and its coupled channels.
        kind: Name in `SCORE_FUNCTIONS`, or "module:function".
        samples: Number of samples used; None means the default of the score.
        more: Further fields of `ScoreContext`.

    Raises:
        TargetError: There is no such score, or it returned something else.
        DataError: The score needs data and there is none.
    """
    found = find_score_function(kind)
    context = ScoreContext(combed, samples=samples or found.samples, **more)
    if isinstance(context.data, Synthetic):
        context = replace(context, is_repaired=False)  # combinations of channels need real statistics
    if found.needs_data and context.data is None:
        raise DataError(f"score {kind!r} needs samples: give --data, or a source as `data`")
    likened = renormalized(combed, context.data, context.seed) if found.needs_data else None
    context = context if likened is None else replace(context, combed=likened.combed)
    scores = [np.array(values, np.float64) for values in found.function(context)]
    if [s.shape for s in scores] != [(len(group),) for group in combed.groups]:
        raise TargetError(
            f"score {kind!r} must return one number per channel for each of the {len(combed.groups)} groups"
        )
    for values, gone in zip(scores, removable(combed, free_channels(combed)), strict=True):
        if gone:  # one channel of a group that is free altogether keeps its score
            _put_first(values, gone[len(gone) == len(values) :])
    return scores


def _put_first(values: Scores, places: Sequence[int]) -> None:
    """Set the scores at some places to zero, or to below the least of the others if that is not above zero."""
    least = np.nan_to_num(np.delete(values, places)).min()
    values[places] = 0.0 if least > 0 else np.nextafter(least, -np.inf) - np.finfo(np.float64).tiny


def find_score_function(kind: str) -> ScoreFunction:
    """Return the score function of a name, or import that of "module:function".

    An imported function may have the attributes `needs_data` and `is_loss`. Raises TargetError for an unknown name.
    """
    if kind in SCORE_FUNCTIONS:
        return SCORE_FUNCTIONS[kind]
    if kind.count(":") != 1:
        raise TargetError(f"unknown score {kind!r}: choose one of {', '.join(SCORE_FUNCTIONS)}, or module:function")
    function = imported(kind, "that scores channels")
    return ScoreFunction(function, kind, getattr(function, "needs_data", False), getattr(function, "is_loss", False))
