"""Score: how much each coupled channel matters.

Scores are functions in a table, and users add theirs:

    @score_function("widest", source="my own idea")
    def widest(context: ScoreContext) -> list[Scores]:
        return [np.arange(len(group), dtype=float) for group in context.combed.groups]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cpd_onnx.channels.groups import Combed
from cpd_onnx.data.sources import Source, imported
from cpd_onnx.errors import DataError, TargetError

Scores: TypeAlias = npt.NDArray[np.float64]

SAMPLES = 64
"""Samples that a score looks at, unless it says otherwise."""


@dataclass(frozen=True)
class ScoreContext:
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
class ScoreFunction:
    """How channels are scored.

    Attributes:
        function: gives one number per coupled channel, for each group in order; small is unimportant.
        source: where the idea is from.
        needs_data: whether it looks at samples.
        is_loss: whether the numbers estimate what the model loses with the channel, so that groups compare as they are;
            otherwise they are relative to the group's mean.
        samples: that it looks at where nobody says how many.
    """

    function: Callable[[ScoreContext], list[Scores]]
    source: str
    needs_data: bool = False
    is_loss: bool = False
    samples: int = SAMPLES


SCORE_FUNCTIONS: dict[str, ScoreFunction] = {}
"""All scores by name."""


def score_function(
    name: str, *, source: str, needs_data: bool = False, is_loss: bool = False, samples: int = SAMPLES
) -> Callable[[Callable[[ScoreContext], list[Scores]]], Callable[[ScoreContext], list[Scores]]]:
    """Enter a function into the table of scores; see `ScoreFunction`.

    Raises:
        ValueError: there is a score of that name.
    """
    if name in SCORE_FUNCTIONS:
        raise ValueError(f"there is a score {name!r} already")

    def enter(function: Callable[[ScoreContext], list[Scores]]) -> Callable[[ScoreContext], list[Scores]]:
        SCORE_FUNCTIONS[name] = ScoreFunction(function, source, needs_data, is_loss, samples)
        return function

    return enter


def score(combed: Combed, kind: str = "l2", *, samples: int | None = None, **more: Any) -> list[Scores]:
    """One number per coupled channel, for each group in order; small is unimportant.

    Args:
        combed: the model.
        kind: a name in `SCORE_FUNCTIONS`.
        samples: that are looked at; None leaves that to the score.
        more: further fields of `ScoreContext`.

    Raises:
        TargetError: no score has that name, or it gives something else.
        DataError: it needs data and there is none.
    """
    found = find_score_function(kind)
    context = ScoreContext(combed, samples=samples or found.samples, **more)
    if found.needs_data and context.data is None:
        raise DataError(f"score {kind!r} looks at samples: give --data, or a source as `data`")
    scores = [np.asarray(values, np.float64) for values in found.function(context)]
    if [s.shape for s in scores] != [(len(group),) for group in combed.groups]:
        raise TargetError(f"score {kind!r} should give one number per channel for each of {len(combed.groups)} groups")
    return scores


def find_score_function(kind: str) -> ScoreFunction:
    """Look a score up, or import the one that "module:function" names.

    A function may have the attributes `needs_data` and `is_loss`. Raises TargetError if there is none of that name.
    """
    if kind in SCORE_FUNCTIONS:
        return SCORE_FUNCTIONS[kind]
    if kind.count(":") != 1:
        raise TargetError(f"unknown score {kind!r}: choose one of {', '.join(SCORE_FUNCTIONS)}, or module:function")
    function = imported(kind, "that scores channels")
    return ScoreFunction(function, kind, getattr(function, "needs_data", False), getattr(function, "is_loss", False))
