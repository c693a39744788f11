"""Scores from the gradients of a loss, which need torch."""

from __future__ import annotations

import numpy as np

from cpd_onnx.errors import DataError
from cpd_onnx.scores.magnitude import Summand
from cpd_onnx.scores.registry import ScoreContext, Scores, needing_torch, score_function


@score_function("taylor", source="Molchanov et al., Importance Estimation, CVPR 2019", needs_data=True, is_loss=True)
def taylor(context: ScoreContext) -> list[Scores]:
    """Return the mean absolute first-order change of the loss when a channel is removed, over the samples."""
    return _from_gradients(context, np.abs)


@score_function(
    "fisher",
    source="Schmitt et al., ITSC 2024, after Liu et al., Group Fisher Pruning, ICML 2021",
    needs_data=True,
    is_loss=True,
)
def fisher(context: ScoreContext) -> list[Scores]:
    """Return the mean squared first-order change of the loss over the samples: a diagonal of its curvature."""
    return _from_gradients(context, np.square)


def _from_gradients(context: ScoreContext, summand: Summand) -> list[Scores]:
    try:
        from cpd_onnx.scores.gradients import changes
    except ModuleNotFoundError as error:
        raise needing_torch(error) from error
    total, count = np.zeros(len(context.combed.atoms)), 0
    for change in changes(context):
        total += summand(change)
        count += 1
    if not count:
        raise DataError("the data contains no samples for scoring")
    return [total[group.channels] / count for group in context.combed.groups]
