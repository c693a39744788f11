"""The check of the samples of a request before anything is computed with them."""

from __future__ import annotations

import logging
from typing import Any

from cpd_onnx.data.preflight import Preflight, preflight
from cpd_onnx.data.sources import Source
from cpd_onnx.ir.model import Model
from cpd_onnx.workflow.places import source_of

log = logging.getLogger(__name__)
"""Facts about the samples are logged as information, likely mistakes as warnings."""


def checked_samples(request: Any, model: Model, source: Source | None) -> dict[str, Any] | None:
    """Check the samples of --data and --eval of a request, and log what is found; None without samples.

    Args:
        request: A request with `data` and, if samples are scored, `eval`, `metric` and `detector`.
        model: The original.
        source: The opened samples of --data.

    Raises:
        DataError: The samples cannot be read or do not fit the model.
    """
    found = None if source is None else preflight(source, model)
    given = getattr(request, "eval", None)
    if given is not None:
        data = source if given == request.data and source is not None else source_of(given, model, request)
        assert data is not None
        scored = preflight(data, model, metric=request.metric, detector=request.detector)
        found = scored if found is None or data is source else found.followed_by(scored, "--eval")
    if found is None:
        return None
    _log(found)
    return found.as_json()


def _log(found: Preflight) -> None:
    """Log how images are prepared and labelled, which a user has to check, and the warnings."""
    for line in (found.preprocessing, *found.facts) if found.preprocessing else ():
        log.info(line)
    for line in found.warnings:
        log.warning(line)
