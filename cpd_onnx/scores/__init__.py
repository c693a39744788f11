"""What a channel is worth: the table of scores, and the scores in it."""

from cpd_onnx.scores import activations, magnitude, reconstruction, taylor  # they enter their scores into the table
from cpd_onnx.scores.registry import SCORERS, Question, Scores, score, scorer, scorer_of

__all__ = [
    "SCORERS",
    "Question",
    "Scores",
    "activations",
    "magnitude",
    "reconstruction",
    "score",
    "scorer",
    "scorer_of",
    "taylor",
]
