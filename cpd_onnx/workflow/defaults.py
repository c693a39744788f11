"""What is done where nothing is said: decided here, for the command line, Python, Olive and onnx-ir alike.

Numbers that a pass has whatever it is called from are the defaults of its fields.
"""

from __future__ import annotations

from importlib import util

from cpd_onnx.errors import DataError
from cpd_onnx.scores.registry import find_score_function

TARGET = ("macs", 0.5)
"""What `compress` leaves."""
DEMO_TARGET = ("macs", 0.2)
"""What `demo` leaves, of a network that has much to spare."""
METRIC = "top1"
"""What models are measured by."""
_INFORMED, _BLIND = "reconstruction", "l2"
"""The score that says what a repair cannot make up for, and the best of those that look at weights alone."""
SCORE = f"{_INFORMED} with data, else {_BLIND}"
SPREAD = "optimal with data and for latency, else uniform"
"""The rules below in words, for the help."""


def score(said: str | None, *, has_data: bool) -> str:
    """The score; raises TargetError if there is none of that name."""
    kind = said or (_INFORMED if has_data else _BLIND)
    find_score_function(kind)
    return kind


def spread(said: str | None, *, has_data: bool) -> str | None:
    """The allocation policy; None leaves it to `Allocate`, which knows what the target is."""
    return said or ("optimal" if has_data else None)


def repair(said: bool | None, *, has_data: bool) -> bool:
    """Whether weights are fitted to the original: with data. Raises DataError if there is none for it."""
    if said and not has_data:
        raise DataError("a repair needs inputs: give --data, or samples as `data`")
    return has_data if said is None else said


def training(said: bool | None, *, has_data: bool) -> bool:
    """Whether the result is trained: with data, and torch. Raises DataError if there is no data for it."""
    if said and not has_data:
        raise DataError("training needs inputs: give --data, or samples as `data`")
    return has_data and can_train() if said is None else said


def can_train() -> bool:
    """Whether torch is there."""
    return util.find_spec("torch") is not None
