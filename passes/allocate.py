"""Allocate: how many channels each group loses, and which, to meet a budget."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from cpd_onnx.budget.allocation import KINDS, Budget, Chooser
from cpd_onnx.budget.latency import Clock, load_table, measure_table
from cpd_onnx.budget.widths import Limits, Shares
from cpd_onnx.channels.groups import Combed
from cpd_onnx.errors import TargetError
from cpd_onnx.pipeline.state import State
from cpd_onnx.runtime.bench import Setting
from cpd_onnx.scores.registry import scorer_of


@dataclass(frozen=True)
class Allocate:
    """Choose the channels that go; one of `channels`, `macs`, `params`, `bytes`, `latency` is the share that remains.

    The spread is "uniform" if none is given, and "optimal" for latency. That is measured on this machine, under the
    `latency_` options, until it is met; or predicted by a cost table made elsewhere, the file `cost_table`.

    `widths` are bounds by pattern, as in [("layer1.*", (0.25, 1.0))]; the rest are the fields of `Budget` and `Limits`.
    """

    channels: float | None = None
    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None
    spread: str | None = None
    multiple: int = 1
    keep: tuple[str, ...] = ()
    min_share: float = 0.0
    max_share: float = 1.0
    widths: Sequence[tuple[str, Shares]] = ()
    latency_threads: int = 1
    latency_batch: int | None = None
    latency_provider: str = Setting.provider
    cost_table: str | os.PathLike[str] | None = None
    name: ClassVar[str] = "allocate"
    requires: ClassVar[tuple[str, ...]] = ("combed", "scores")
    provides: ClassVar[tuple[str, ...]] = ("allocation", "budget")
    usual_spread: ClassVar[str] = "uniform"

    @property
    def budget(self) -> Budget:
        """The options as a budget; raises TargetError if they make none."""
        given = {kind: getattr(self, kind) for kind in KINDS if getattr(self, kind) is not None}
        if len(given) > 1:
            raise TargetError(f"give one target, not {' and '.join(given)}")
        kind, fraction = next(iter(given.items()), ("channels", 0.5))
        of = tuple((pattern, (float(low), float(high))) for pattern, (low, high) in self.widths)
        limits = Limits(tuple(self.keep), self.multiple, (self.min_share, self.max_share), of)
        spread = self.spread or ("optimal" if kind == "latency" else self.usual_spread)
        return Budget(kind, fraction, spread, limits)

    def chooser(self, combed: Combed) -> Chooser:
        """What allocates under this budget; for a latency target it measures or reads the cost table first."""
        if self.budget.kind != "latency":
            return Chooser(self.budget)
        if self.cost_table is not None:
            table = load_table(Path(self.cost_table))
            table.require(combed.folded.original)
            table.require_parts(combed)
            return Chooser(self.budget, table)
        setting = Setting(self.latency_batch, self.latency_threads, self.latency_provider)
        clock = Clock(combed, setting)
        return Chooser(self.budget, measure_table(clock), clock)

    def __call__(self, state: State) -> State:
        """Fill in `allocation`."""
        budget = self.budget
        is_loss = bool(state.score) and scorer_of(state.score["score"]).is_loss
        combed, scores = state.need("combed", "comb"), state.need("scores", "score")
        allocation = self.chooser(combed)(combed, scores, is_loss=is_loss, curves=state.curves)
        words = budget.as_words() | ({"latency": dict(allocation.latency)} if allocation.latency else {})
        return replace(state, allocation=allocation, budget=words | dict(state.score))
