"""Allocate: choose the channels to remove from each group to meet a budget."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from cpd_onnx.budget.allocation import KINDS, POLICIES, Budget, Chooser
from cpd_onnx.budget.latency import LatencyProbe, load_table, measure_table
from cpd_onnx.budget.widths import Limits, Ratios
from cpd_onnx.channels.groups import Combed
from cpd_onnx.errors import TargetError
from cpd_onnx.options import Renaming, natural, option, positive, ratio
from cpd_onnx.pipeline.state import State
from cpd_onnx.runtime.bench import Setting
from cpd_onnx.scores.registry import find_score_function


def bounds(text: str) -> tuple[str, Ratios]:
    """Return the pattern and ratios of PATTERN=LOW..HIGH, or PATTERN=BOTH; raises ValueError for another text."""
    name, _, ratios = text.rpartition("=")
    low, dots, high = ratios.partition("..")
    if not name or not low or (dots and not high):
        raise ValueError(f"{text!r} is not PATTERN=LOW..HIGH")
    return name, (ratio(low), ratio(high if dots else low))


def target(text: str) -> tuple[str, float]:
    """Return kind and fraction of KIND=FRACTION; raises ValueError for another text."""
    kind, _, fraction = text.partition("=")
    try:
        return kind, float(fraction)
    except ValueError as error:
        raise ValueError(f"{text!r} is not KIND=FRACTION, as in macs=0.5") from error


def target_options(kind: str, fraction: float) -> dict[str, Any]:
    """Return a target as an option of `Allocate`; raises TargetError for an unknown kind."""
    if kind not in KINDS:
        raise TargetError(f"unknown target {kind!r}: choose one of {', '.join(KINDS)}")
    return {kind: fraction}


@dataclass(frozen=True, kw_only=True)
class AllocateOptions(metaclass=Renaming):
    """Options of the allocation, also of the command line, recipes and Olive."""

    policy: str | None = option(
        None,
        "Allocation policy: the same ratio of each group (uniform), all channels competing (global), those of like "
        "groups competing (isomorphic), or the widths with the least loss (optimal)",
        choices=POLICIES,
        renamed_from="spread",
    )
    round_to: int | None = option(
        None,
        "Number of which the remaining widths are multiples (default: 1, or the profile's)",
        read=int,
        renamed_from="multiple",
    )
    min_ratio: float = option(
        0.0,
        "Minimum ratio of each group's channels that survives",
        read=ratio,
        metavar="RATIO",
        renamed_from="min_share",
    )
    max_ratio: float = option(
        1.0,
        "Maximum ratio of each group's channels that survives",
        read=ratio,
        metavar="RATIO",
        renamed_from="max_share",
    )
    widths: Sequence[tuple[str, Ratios]] = option(
        (),
        "Minimum and maximum ratio for single groups, as in 'layer1.*=0.25..1'; may be repeated",
        read=bounds,
        flag="--width",
        metavar="PATTERN=LOW..HIGH",
        is_many=True,
    )
    keep: Sequence[str] = option(
        (),
        "Groups, weights or nodes that are pinned, from which nothing is removed (* and ? allowed); may be repeated",
        metavar="PATTERN",
        is_many=True,
    )
    latency_threads: int = option(
        1,
        "Number of intra-op threads for the measurement of latency; 0: onnxruntime's default",
        read=natural,
        metavar="N",
        group="latency",
    )
    latency_batch: int | None = option(
        None,
        "Batch size for the measurement of latency (default: the model's)",
        read=positive,
        metavar="N",
        group="latency",
    )
    latency_provider: str = option(
        Setting.provider, "Execution provider of onnxruntime for the measurement of latency", group="latency"
    )
    cost_table: str | os.PathLike[str] | None = option(
        None,
        "Cost table that 'latency' measured, to be used instead of a measurement on this machine",
        read=Path,
        metavar="FILE",
        takes="file",
        group="latency",
    )


@dataclass(frozen=True, kw_only=True)
class Allocate(AllocateOptions):
    """Choose the channels to remove; one of `channels`, `macs`, `params`, `bytes`, `latency` is the remaining fraction.

    The default policy is "optimal" for latency, else "uniform". Latency is measured on this machine under the
    `latency_` options until the target is met, or predicted by the cost table in the file `cost_table`.

    `widths` are minimum and maximum ratios by pattern, as in [("layer1.*", (0.25, 1.0))]; for the other fields see
    `AllocateOptions`.
    """

    channels: float | None = None
    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None
    name: ClassVar[str] = "allocate"
    requires: ClassVar[tuple[str, ...]] = ("combed", "scores")
    provides: ClassVar[tuple[str, ...]] = ("allocation", "budget")
    usual_target: ClassVar[tuple[str, float]] = (Budget.kind, Budget.fraction)

    @property
    def budget(self) -> Budget:
        """The options as a budget; raises TargetError if they are not valid."""
        given = {kind: getattr(self, kind) for kind in KINDS if getattr(self, kind) is not None}
        if len(given) > 1:
            raise TargetError(f"only one target is allowed, got {' and '.join(given)}")
        kind, fraction = next(iter(given.items()), self.usual_target)
        of = tuple((pattern, (float(low), float(high))) for pattern, (low, high) in self.widths)
        round_to = 1 if self.round_to is None else self.round_to
        keep = (self.keep,) if isinstance(self.keep, str) else tuple(self.keep)
        limits = Limits(keep, round_to, (self.min_ratio, self.max_ratio), of)
        policy = self.policy or ("optimal" if kind == "latency" else Budget.policy)
        return Budget(kind, fraction, policy, limits)

    def chooser(self, combed: Combed) -> Chooser:
        """Return the allocator of this budget; for a latency target, measure or read the cost table first."""
        if self.budget.kind != "latency":
            return Chooser(self.budget)
        if self.cost_table is not None:
            table = load_table(Path(self.cost_table))
            table.require(combed.folded.original)
            table.require_parts(combed)
            return Chooser(self.budget, table)
        setting = Setting(self.latency_batch, self.latency_threads, self.latency_provider)
        probe = LatencyProbe(combed, setting)
        return Chooser(self.budget, measure_table(probe), probe)

    def __call__(self, state: State) -> State:
        """Fill in `allocation`."""
        budget = self.budget
        is_loss = bool(state.score) and find_score_function(state.score["score"]).is_loss
        combed, scores = state.need("combed", "comb"), state.need("scores", "score")
        allocation = self.chooser(combed)(combed, scores, is_loss=is_loss, curves=state.curves)
        words = budget.as_words() | ({"latency": dict(allocation.latency)} if allocation.latency else {})
        return replace(state, allocation=allocation, budget=words | dict(state.score))
