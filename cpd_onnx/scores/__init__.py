"""What a channel is worth: the table of scores, and the scores in it."""

from cpd_onnx.scores import activations, magnitude, reconstruction, taylor  # they enter their scores into the table
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
