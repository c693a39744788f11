"""Whether a pruned model is faster than its original: it is timed, other widths are tried, and the reason is found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from cpd_onnx.budget import host
from cpd_onnx.budget.allocation import FASTER, Allocation
from cpd_onnx.budget.latency import CostTable, LatencyProbe, measure_table
from cpd_onnx.budget.timing import busy, is_original, repeated
from cpd_onnx.channels.groups import Combed
from cpd_onnx.errors import TargetError, UnsupportedError
from cpd_onnx.runtime.bench import Setting

Choose = Callable[[Mapping[int, int] | None, CostTable | None, float | None], Allocation]
"""Returns the allocation at multiples of the groups' widths (None: those of a cost table) and, with a table, below a
fraction of the original's latency; raises TargetError if the target cannot be met there."""

_LEAST_MS = 0.2
"""Milliseconds of the original below which other widths are not tried: the time goes into starting kernels, and the
choice would be one of chance (heuristic)."""
_MOST_BYTES = 256e6
"""Bytes of weights up to which a model is timed: onnxruntime holds those of both models in memory (heuristic)."""
_SECONDS, _SURE_SECONDS = 0.4, 1.2
"""Duration in seconds of a first measurement, and of one that decides (heuristic)."""
_DOUBT = 0.1
"""Distance below `FASTER` from which a first measurement does not decide (heuristic)."""
_PLAUSIBLE = 0.8
"""Latency in relation to the MACs, both relative to the original, below which a measurement is repeated (heuristic)."""
_TABLE_SECONDS = 60.0
"""Estimated duration in seconds up to which a cost table is measured for a model that is not faster (heuristic)."""
_TABLE_RUNS = 1200
"""Number of runs of the original that measuring a cost table takes about as long as (heuristic)."""
_LATENCIES = (0.9, 0.75)
"""Fractions of the original's latency that are asked of the cost table if its widths alone do not help (heuristic)."""
_SMALL = 0.012
"""Milliseconds that a kernel takes on average below which most of them goes into starting it (heuristic)."""
_MOST = 0.5
"""Share of the time from which one cause explains it (heuristic)."""


@dataclass(frozen=True, eq=False)
class SpeedCheck:
    """Times allocations beside the original.

    Attributes:
        setting: Conditions of the measurement.
        block: Number of channels in a block of the processor, see `host.multiples`.
        tries: Whether other widths are tried for a slow model, as is right unless the user gave their steps.
        open_probe: Returns what measures the latencies of a model; raises CpdError if onnxruntime cannot run it.
    """

    setting: Setting
    block: int
    tries: bool = True
    open_probe: Callable[[Combed, Setting], LatencyProbe] = LatencyProbe

    def __call__(self, combed: Combed, chosen: Allocation, choose: Choose) -> Allocation:
        """Return the allocation if it is at least 5 % faster than the original, else the fastest of some others.

        Its entry `latency["measured"]` is set. If all are slow, `slow_because` says why. A large model, or one that
        onnxruntime does not run, is not timed; a note says so.
        """
        if combed.folded.model.data_bytes() > _MOST_BYTES:
            return _not_timed(chosen, f"it would take {_MOST_BYTES / 1e6:.0f} MB of memory or more; use bench")
        try:
            return _Check(combed, self.open_probe(combed, self.setting), self, choose).best(chosen)
        except UnsupportedError as error:
            return _not_timed(chosen, str(error))


def _not_timed(chosen: Allocation, reason: str) -> Allocation:
    return replace(chosen, notes=(*chosen.notes, f"the pruned model was not timed: {reason}"))


@dataclass(frozen=True, eq=False)
class _Check:
    """The check of one model."""

    combed: Combed
    probe: LatencyProbe
    check: SpeedCheck
    choose: Choose

    def best(self, chosen: Allocation) -> Allocation:
        """Return the fastest allocation, timed."""
        tried = [self.timed(chosen)]
        table: CostTable | None = None
        is_tiny = 0 < self.probe.ms < _LEAST_MS
        tries = self.check.tries and not is_tiny
        if tries and not tried[0].is_faster:
            tried += self.at_other_steps(tried[0])
        is_cheap = self.probe.ms * _TABLE_RUNS < 1e3 * _TABLE_SECONDS
        if tries and is_cheap and not any(found.is_faster for found in tried):
            table = measure_table(self.probe)
            tried += self.by_table(table)
        best = min(tried, key=lambda found: found.latency["measured"])
        if best is not tried[0]:
            best = self.timed(best, sure=True)
        reason = "" if best.is_faster else slow_because(self.combed, best, self.probe, self.check.block)
        reason = "; ".join([reason, *busy(self.probe)]) if reason else ""
        return replace(best, slow_because=reason, table=table)

    def timed(self, chosen: Allocation, *, sure: bool = False) -> Allocation:
        """Return the allocation with its measured latency.

        One near the limit or above it decides about the widths, and one that fell by more than the MACs is not
        plausible: these are repeated.
        """
        measured = 1.0
        if not is_original(self.probe, chosen):
            channels = chosen.channels(self.probe.combed)
            measured = self.probe.ratio(channels, _SURE_SECONDS if sure else _SECONDS)
            is_too_fast = measured < _PLAUSIBLE * chosen.after.macs / max(chosen.before.macs, 1.0)
            if is_too_fast or (measured > FASTER - _DOUBT and not sure):
                measured = repeated(self.probe, chosen, _SURE_SECONDS / 2)
        return replace(chosen, latency={**chosen.latency, "measured": measured})

    def at_other_steps(self, chosen: Allocation) -> Iterator[Allocation]:
        """Yield allocations at coarser and finer widths, until one is faster than the original."""
        own = self.check.block
        for block in (2 * own, max(1, own // 2), 4 * own):
            found = self.attempt(host.multiples(self.combed, block), None, None)
            if found is None or found.removed == chosen.removed:
                continue
            found = self.timed(replace(found, round_to=block))
            yield found
            if found.is_faster:
                return

    def by_table(self, table: CostTable) -> Iterator[Allocation]:
        """Yield allocations at the widths that the cost table says are fast, until one is faster than the original."""
        for fraction in (None, *_LATENCIES):
            found = self.attempt(None, table, fraction)
            if found is None:
                continue
            found = self.timed(found)
            yield found
            if found.is_faster:
                return

    def attempt(
        self, multiples: Mapping[int, int] | None, table: CostTable | None, latency: float | None
    ) -> Allocation | None:
        """Return an allocation; None if the target cannot be met that way."""
        try:
            return self.choose(multiples, table, latency)
        except TargetError:
            return None


def slow_because(combed: Combed, chosen: Allocation, probe: LatencyProbe, block: int) -> str:
    """Return in words why a pruned model is not faster than its original."""
    if not any(chosen.removed):
        return "nothing was removed"
    kernels, ms, _ = probe.profile(probe.pruned(chosen.channels(probe.combed)))
    total = sum(kernel.ms for kernel in kernels.values())
    if not total:
        return "onnxruntime's profiler does not say where the time goes"
    if ms / len(kernels) < _SMALL:
        return (
            f"the model is small: {len(kernels)} kernels take {ms:.2f} ms together, most of it to start them, whatever "
            "their width"
        )
    nodes = combed.folded.scope.nodes
    working = {nodes[cost.node].name for cost in combed.recorder.costs if not cost.scope.path}
    moving: dict[str, float] = defaultdict(float)
    for node, kernel in kernels.items():
        moving[kernel.operator] += 0.0 if node in working else kernel.ms
    share = sum(moving.values()) / total
    if share > _MOST:
        names = ", ".join(sorted(moving, key=lambda operator: -moving[operator])[:3])
        return f"{share:.0%} of the time goes into moving data in memory ({names}), not into multiplications"
    name, largest = max(kernels.items(), key=lambda pair: pair[1].ms)
    if largest.ms > _MOST * total:
        return f"one kernel, {name} ({largest.operator}), takes {largest.ms / total:.0%} of the time"
    return _narrow(combed, chosen, block)


def _narrow(combed: Combed, chosen: Allocation, block: int) -> str:
    """Return that kernels are not faster at the widths of an allocation."""
    pairs = zip(combed.groups, chosen.removed, strict=True)
    widths = [len(group) - len(removed) for group, removed in pairs if removed]
    odd = sum(width % block > 0 for width in widths)
    more = f"; {odd} of {len(widths)} are no multiples of {block}" if odd else ""
    return (
        f"the kernels take as long at the smaller widths, {float(np.median(widths)):.0f} channels in the median{more}"
    )
