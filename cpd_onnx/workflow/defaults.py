"""Defaults that depend on the inputs, shared by the command line, Python, Olive and onnx-ir.

Defaults that do not depend on the inputs are those of the fields of the passes.
"""

from __future__ import annotations

from importlib import util

from cpd_onnx.errors import DataError
from cpd_onnx.scores.registry import find_score_function

TARGET = ("macs", 0.5)
"""Target of `compress`: half of the original's MACs remain."""
DEMO_TARGET = ("macs", 0.2)
"""Target of `demo`: a fifth of the MACs remain of its network, which is larger than its task needs."""
METRIC = "top1"
"""Metric that measures models."""
_INFORMED, _BLIND = "reconstruction", "l2"
"""Score used with data, the loss that a repair cannot compensate, and the most accurate score that needs no data."""
SCORE = f"{_INFORMED} with data, else {_BLIND}"
POLICY = "optimal with data and for latency, else uniform"
"""Descriptions of the rules below, for the help."""


def score(said: str | None, *, has_data: bool) -> str:
    """Return the name of the score; raises TargetError if there is no score of that name."""
    kind = said or (_INFORMED if has_data else _BLIND)
    find_score_function(kind)
    return kind


def policy(said: str | None, *, has_data: bool) -> str | None:
    """Return the allocation policy; None leaves it to `Allocate`, which chooses it by the target."""
    return said or ("optimal" if has_data else None)


def repair(requested: bool | None, *, has_data: bool) -> bool:
    """Return whether weights are fitted to the original (default: with data); raises DataError without data."""
    if requested and not has_data:
        raise DataError("repair needs samples: give --data, or `data` in Python")
    return has_data if requested is None else requested


def training(requested: bool | None, *, has_data: bool) -> bool:
    """Return whether the result is trained (default: with data and torch); raises DataError without data."""
    if requested and not has_data:
        raise DataError("training needs samples: give --data, or `data` in Python")
    return has_data and can_train() if requested is None else requested


def can_train() -> bool:
    """Return whether torch is installed."""
    return util.find_spec("torch") is not None
