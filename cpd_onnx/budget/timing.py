"""Allocation for a latency target: choose by the cost table, measure, correct what is asked of the table, repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from cpd_onnx.budget.allocation import Allocation, Budget, UnreachableError
from cpd_onnx.budget.latency import CostTable, LatencyProbe
from cpd_onnx.budget.targets import SLACK

TOO_WIDE = "the target cannot be reached at the widths where kernels are fast: finer widths were chosen"
"""Note of an allocation whose widths are not those at which kernels are fast."""
_ROUNDS = 8
"""Maximum number of allocations that are measured for a latency target (heuristic)."""
_ABOVE = 0.01
"""Distance of the next request from the smallest fraction that the cost table predicts (heuristic)."""
_NEAR = 0.02
"""Relative deviation from the target at which a measured latency is accepted (heuristic)."""
_INSIDE = 0.1
"""Minimum distance of the next request from those that enclose it, as a fraction of their distance (heuristic)."""
_SECONDS, _TIMED_ROUNDS = 2.0, 40
"""Minimum duration in seconds, and number of rounds, of a measurement of latency (heuristic)."""
_DOUBTFUL = 0.2
"""Relative deviation from the prediction from which a measurement is repeated (heuristic). If the repetitions confirm
it, the prediction is wrong, and later measurements are believed."""
_REPEATS = 3
"""Number of repetitions of a doubtful measurement, of which the median counts (heuristic)."""
_SCATTER = 0.3
"""Interquartile range of the original's run times, relative to their median, above which the machine is busy
(heuristic)."""


def allocate_measured(
    choose: Callable[[Budget, CostTable], Allocation],
    budget: Budget,
    table: CostTable,
    probe: LatencyProbe,
    first: float | None = None,
) -> Allocation:
    """Allocate for a latency target, measure the result beside the original, correct the request, and repeat.

    Returns the allocation whose measured latency is nearest to the target. If the table predicts that the target cannot
    be reached, a larger fraction is requested first; from then on the time that the table takes for constant is assumed
    to shrink with the model.

    Args:
        choose: `allocate` with all arguments but budget and table.
        budget: The budget, whose first kind is "latency".
        table: Predicts latencies.
        probe: Measures latencies.
        first: Fraction that is requested of the table first; None for the target.

    Raises UnreachableError if the target cannot be reached, with the nearest allocation that was measured.
    """
    best, refused = _searched(choose, budget, table, probe, budget.fraction if first is None else first)
    if best is None:
        assert refused is not None
        raise refused
    best = replace(best, notes=(*(n for n in best.notes if n == TOO_WIDE), *latency_notes(best, table), *busy(probe)))
    if refused is not None and best.latency["measured"] > budget.fraction + SLACK:
        raise UnreachableError(str(refused), {"latency": best.latency["measured"]}, refused.obstacle, best)
    return best


def _searched(
    choose: Callable[[Budget, CostTable], Allocation],
    budget: Budget,
    table: CostTable,
    probe: LatencyProbe,
    request: float,
) -> tuple[Allocation | None, UnreachableError | None]:
    """Return the nearest allocation, None if none can be chosen, and the first refusal of the target, if any."""
    tried, measurements = list[tuple[float, float]](), list[float]()
    best: Allocation | None = None
    refused: UnreachableError | None = None
    repeats: Allocation | None = None
    predictor = table
    while len(measurements) < _ROUNDS and request <= 1:
        try:
            chosen = choose(replace(budget, fraction=request), predictor)
        except UnreachableError as error:
            refused = refused or error
            if best is None:
                request = max(request, error.floors["latency"]) + _ABOVE
                continue
            if predictor is not table:
                break
            predictor, request, tried = table.loosened(probe.combed), budget.fraction, []
            continue
        measured = timed(probe, chosen, table.ms, is_trusted=repeats is not None)
        chosen = replace(chosen, latency={**chosen.latency, "target": budget.fraction, "measured": measured})
        repeats = chosen if repeats is None and _is_doubtful(chosen) else repeats
        best = chosen if best is None or _miss(chosen) < _miss(best) else best
        tried.append((request, measured))
        measurements.append(measured)
        if _miss(chosen) <= _NEAR or (refused is not None and _stalls(measurements, budget.fraction)):
            break
        request = _next_request(tried, budget.fraction)
    if best is not None and _is_doubtful(best) and best is not repeats and not is_original(probe, best):
        best = replace(best, latency={**best.latency, "measured": repeated(probe, best, _SECONDS)})
    return best, refused


def timed(probe: LatencyProbe, chosen: Allocation, ms: float, *, is_trusted: bool) -> float:
    """Return the measured ratio of an allocation's latency to the original's, which takes so many milliseconds.

    A measurement far from the prediction is not believed unless the prediction is known to be wrong (`is_trusted`): the
    median of further ones, in new sessions, is.
    """
    if is_original(probe, chosen):
        return 1.0
    seconds = max(_SECONDS, _TIMED_ROUNDS * 1.5e-3 * ms)
    measured = probe.ratio(chosen.channels(probe.combed), seconds)
    if is_trusted or abs(measured / chosen.latency["predicted"] - 1) <= _DOUBTFUL:
        return measured
    return repeated(probe, chosen, seconds)


def is_original(probe: LatencyProbe, chosen: Allocation) -> bool:
    """Return whether an allocation leaves the original as it is: nothing is removed, and it is not converted."""
    return probe.converted is None and not any(chosen.removed)


def repeated(probe: LatencyProbe, chosen: Allocation, seconds: float) -> float:
    """Return the median of several measurements of the ratio, each of that many seconds and in new sessions."""
    channels, found = chosen.channels(probe.combed), []
    for _ in range(_REPEATS):
        probe.reopen()
        found.append(probe.ratio(channels, seconds))
    return float(np.median(found))


def busy(probe: LatencyProbe) -> Iterator[str]:
    """Yield a note if the times of the same model scatter much."""
    if probe.scatter > _SCATTER:
        yield f"the machine is busy: timings of the same model scatter by {probe.scatter:.0%}; measure again with bench"


def latency_notes(chosen: Allocation, table: CostTable) -> Iterator[str]:
    """Yield notes on the predicted and the measured latency."""
    found, setting = chosen.latency, table.setting
    where = table.machine.get("source") or f"onnxruntime, {setting.provider}, threads: {setting.threads}"
    if "measured" not in found:
        yield f"latency {found['predicted']:.3f} by the cost table ({where}), not measured here"
    else:
        yield f"latency {found['measured']:.3f} measured ({where}), {found['predicted']:.3f} predicted"
        if _miss(chosen) > SLACK:
            yield f"latency={found['measured']:.3f} is the nearest to {found['target']:g} that was found"
    if table.unattributed > SLACK:
        yield f"{table.unattributed:.0%} of the time is in kernels not present at all widths: it is taken for constant"


def _stalls(measurements: Sequence[float], target: float) -> bool:
    """Return whether the last two measurements of a target that none has reached came no nearer to it."""
    if len(measurements) < 3 or min(measurements) <= target:
        return False
    recent = min(measurements[-2:])
    return recent > target + SLACK and recent > (1 - _NEAR) * min(measurements[:-2])


def _next_request(tried: Sequence[tuple[float, float]], target: float) -> float:
    """Return the fraction to request next, by (request, measurement) pairs.

    It lies between the nearest pairs below and above the target if there are any: however wrong the table is, they
    enclose it. Else it is that of the secant through the two nearest pairs, whose slope is bounded.
    """
    below = max((pair for pair in tried if pair[1] <= target), key=lambda pair: pair[1], default=None)
    above = min((pair for pair in tried if pair[1] > target), key=lambda pair: pair[1], default=None)
    if below is not None and above is not None and below[0] < above[0]:
        part = (target - below[1]) / (above[1] - below[1])
        return below[0] + float(np.clip(part, _INSIDE, 1 - _INSIDE)) * (above[0] - below[0])
    near = sorted(tried, key=lambda pair: abs(pair[1] - target))[:2]
    request, measured = near[0]
    slope = measured / request
    if len(near) > 1 and near[0][0] != near[1][0]:
        slope = (measured - near[1][1]) / (request - near[1][0])
    slope = min(max(slope, 0.5), 2.0)
    return min(1.0, max(request + (target - measured) / slope, request / 2))


def _is_doubtful(chosen: Allocation) -> bool:
    """Return whether the measurement of an allocation is far from its prediction."""
    return abs(chosen.latency["measured"] / chosen.latency["predicted"] - 1) > _DOUBTFUL


def _miss(chosen: Allocation) -> float:
    """Return the relative deviation of the measured latency from the target."""
    return abs(chosen.latency["measured"] / chosen.latency["target"] - 1)
