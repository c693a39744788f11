"""Defaults that depend on the inputs, shared by the command line, Python, Olive and onnx-ir.

Defaults that do not depend on the inputs are those of the fields of the passes.
"""

from __future__ import annotations

from importlib import util

from cpd_onnx.budget.deployed import STORED
from cpd_onnx.budget.host import AUTO
from cpd_onnx.channels.renormalized import keeps_statistics
from cpd_onnx.data.sources import Source
from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.deploy.profiles import Profile
from cpd_onnx.errors import DataError
from cpd_onnx.report.verdict import USUAL_LOSS
from cpd_onnx.scores.registry import find_score_function

TARGET = ("latency", 0.5)
"""Target of `compress` and `prune`: half of the original's time remains, unless that loses too much."""
DEMO_TARGET = ("macs", 0.2)
"""Target of `demo`: a fifth of the MACs remain of its network, which is larger than its task needs."""
METRIC = "top1"
"""Metric that measures models."""
_INFORMED, _BLIND = "reconstruction", "l2"
"""Score used with data, the loss that a repair cannot compensate, and the most accurate score that needs no data."""
_COMPARED = 4
"""Number of allocations that are compared by default: by the scores, and by three weightings of their losses."""
HOLD_OUT = 0.2
"""Fraction of the data that nothing is fitted to where there is no other data to measure on."""
SCORE = f"{_INFORMED} with data, else {_BLIND}"
POLICY = "optimal with data, for latency and for several targets, else uniform"
EFFORT = f"{_COMPARED} with data and a repair"
ROUND_TO = "auto, or the profile's"
"""Descriptions of the rules below, for the help."""


def max_loss(given: float | None, *, has_target: bool, has_labels: bool) -> float | None:
    """Return the bound of the loss that the target gives way to; None if a target was given and no bound."""
    if given is not None or has_target:
        return given
    return USUAL_LOSS["labels" if has_labels else "original"]


def score(requested: str | None, *, has_data: bool) -> str:
    """Return the name of the score; raises TargetError if there is no score of that name."""
    kind = requested or (_INFORMED if has_data else _BLIND)
    find_score_function(kind)
    return kind


def informs(source: Source | None) -> bool:
    """Return whether samples show which channels matter: real ones, or generated ones if the model normalises them.

    In other models, the magnitude of the weights chooses channels better, and only the repair uses generated samples.
    """
    return source is not None and not (isinstance(source, Synthetic) and not keeps_statistics(source.folded))


def policy(requested: str | None, *, has_data: bool) -> str | None:
    """Return the allocation policy; None leaves it to `Allocate`, which chooses it by the target."""
    return requested or ("optimal" if has_data else None)


def effort(requested: int | None, *, has_data: bool, has_repair: bool) -> int:
    """Return the number of allocations to compare at the outputs (default: a few if they can be repaired with data)."""
    if requested is not None:
        return requested
    return _COMPARED if has_data and has_repair else 0


def round_to(requested: int | str | None, profile: Profile | None) -> int | str:
    """Return the number of which widths are multiples: the given one, that of the profile, or "auto"."""
    if requested is not None:
        return requested
    return AUTO if profile is None else profile.multiple


def deploy_as(requested: str | None, profile: Profile | None) -> str | None:
    """Return the element type of the deployed model: the given one, that of the profile, or None for the file's."""
    return requested or (profile.dtype if profile is not None and profile.dtype in STORED else None)


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
