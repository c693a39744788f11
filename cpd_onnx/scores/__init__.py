"""Importance scores of channels: the table of score functions, and the functions in it."""

from cpd_onnx.scores import activations, magnitude, reconstruction, taylor  # they register their score functions
from cpd_onnx.scores.registry import SCORE_FUNCTIONS, ScoreContext, Scores, find_score_function, score, score_function

__all__ = [
    "SCORE_FUNCTIONS",
    "ScoreContext",
    "Scores",
    "activations",
    "find_score_function",
    "magnitude",
    "reconstruction",
    "score",
    "score_function",
    "taylor",
]
