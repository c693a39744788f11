"""Allocate: choose the channels to remove from each group to meet a budget."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from cpd_onnx.budget import host, targets
from cpd_onnx.budget.allocation import POLICIES, Budget
from cpd_onnx.budget.choosing import Chooser
from cpd_onnx.budget.deployed import STORED
from cpd_onnx.budget.latency import Convert, LatencyProbe, load_table, measure_table
from cpd_onnx.budget.speed import SpeedCheck
from cpd_onnx.budget.targets import KINDS, AnyTargets, Target, Targets
from cpd_onnx.budget.widths import Limits, Ratios
from cpd_onnx.channels.groups import Combed
from cpd_onnx.data.sources import Source
from cpd_onnx.errors import TargetError
from cpd_onnx.io.progress import advance, step
from cpd_onnx.options import Renaming, integer, natural, option, positive, ratio
from cpd_onnx.passes.refine import Choose, Refined, RefineOptions, refined
from cpd_onnx.pipeline.state import State
from cpd_onnx.runtime import providers
from cpd_onnx.runtime.bench import Setting
from cpd_onnx.scores.registry import Scores, find_score_function


def bounds(text: str) -> tuple[str, Ratios]:
    """Return the pattern and ratios of PATTERN=LOW..HIGH, or PATTERN=BOTH; raises ValueError for another text."""
    name, _, ratios = text.rpartition("=")
    low, dots, high = ratios.partition("..")
    if not name or not low or (dots and not high):
        raise ValueError(f"{text!r} is not PATTERN=LOW..HIGH")
    return name, (ratio(low), ratio(high if dots else low))


def steps(text: str) -> int | str:
    """Return the number of which widths are multiples, or "auto", or "auto" with a number; raises ValueError."""
    number = text.removeprefix(host.AUTO)
    if text.startswith(host.AUTO) and (not number or (number.isdecimal() and int(number) > 0)):
        return text
    if not text.removeprefix("-").isdecimal():
        raise ValueError(f"{text!r} is not a whole number of at least 1 or 'auto'")
    return integer(text)  # `Limits` checks it


def target_options(kind: str, fraction: float) -> dict[str, Any]:
    """Return a fraction of the original as an option of `Allocate`; raises TargetError for an unknown kind."""
    return targets.fraction(kind, fraction).options()


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
    round_to: int | str | None = option(
        None,
        "Number of which the remaining widths are multiples; auto: the vector width of this computer's processor, in "
        "groups of several vectors (default: 1)",
        read=steps,
        metavar="N|auto",
        renamed_from="multiple",
    )
    check_speed: bool = option(
        False,
        "Time the pruned model beside the original, and try other widths if it is not at least 5 % faster",
    )
    nearest: bool = option(
        False, "If a target cannot be reached, take the nearest that can, with a note, instead of stopping"
    )
    deploy_as: str | None = option(
        None,
        "Element type of the deployed model, which the targets flash and ram count (default: that of the file)",
        choices=STORED,
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
        is_common=True,
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
        Setting.provider,
        "Execution provider of onnxruntime for the measurement of latency, as in tensorrt:device=0,precision=fp16: "
        f"{', '.join(providers.SHORT_NAMES)}, or a full name",
        read=providers.read,
        metavar="NAME[:KEY=VALUE,…]",
        takes="provider",
        group="latency",
    )
    effort: int | None = option(
        None,
        "Number of allocations that are repaired and compared with the original at the outputs, on samples that "
        "nothing is fitted to; the nearest is taken (policy optimal, with data) (default: 0, which compares none)",
        read=natural,
        metavar="N",
    )
    depth: bool = option(
        True,
        "Remove whole branches, such as residual blocks, where the comparison of allocations (--effort) finds that the "
        "outputs stay nearer to the original's, or where narrower layers alone do not meet the target",
    )
    cost_table: str | os.PathLike[str] | None = option(
        None,
        "Cost table that 'latency' measured, to be used instead of a measurement on this machine",
        read=Path,
        metavar="FILE",
        takes="file",
        suffixes=(".json",),
        group="latency",
    )


@dataclass(frozen=True, kw_only=True)
class Allocate(AllocateOptions):
    """Choose the channels to remove; one of `channels`, `macs`, `params`, `bytes`, `latency` is the remaining fraction.

    `target` is several targets, or an absolute one, as text, as in "latency=5ms,flash=400kB" (see `targets.parse`).
    The default policy is "optimal" for latency and for several targets, else "uniform". Latency is measured on this
    machine under the `latency_` options until the target is met, or predicted by the cost table in the file
    `cost_table`.

    `widths` are minimum and maximum ratios by pattern, as in [("layer1.*", (0.25, 1.0))]; for the other fields see
    `AllocateOptions`.
    """

    channels: float | None = None
    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None
    target: AnyTargets | None = None
    name: ClassVar[str] = "allocate"
    requires: ClassVar[tuple[str, ...]] = ("combed", "scores")
    provides: ClassVar[tuple[str, ...]] = ("allocation", "budget")
    usual_target: ClassVar[tuple[str, float]] = (Budget.kind, Budget.fraction)

    @property
    def targets(self) -> Targets:
        """The targets; raises TargetError if they are not valid, or more than one option gives them."""
        given = [kind for kind in (*KINDS, "target") if getattr(self, kind) is not None]
        if len(given) > 1:
            raise TargetError(f"only one target is allowed, got {' and '.join(given)}")
        if self.target is None:
            kind = given[0] if given else ""
            return targets.fraction(kind, getattr(self, kind)) if kind else targets.fraction(*self.usual_target)
        return targets.targets_of(self.target)

    @property
    def budget(self) -> Budget:
        """The options as a budget, of the first target; raises TargetError if they are not valid.

        An absolute target counts as the whole original here, since its fraction depends on the model.
        """
        wanted = self.targets
        first: Target = wanted.each[0]
        of = tuple((pattern, (float(low), float(high))) for pattern, (low, high) in self.widths)
        round_to = self.round_to if isinstance(self.round_to, int) else 1
        keep = (self.keep,) if isinstance(self.keep, str) else tuple(self.keep)
        limits = Limits(keep, round_to, (self.min_ratio, self.max_ratio), of)
        is_optimal = wanted.has_latency or wanted.plain is None
        policy = self.policy or ("optimal" if is_optimal else Budget.policy)
        fraction = first.amount if first.is_fraction else 1.0
        return Budget(first.kind, fraction, policy, limits, stored_as=self.deploy_as or "")

    @property
    def block(self) -> int:
        """Number of channels in a block of the processor that widths are rounded to; 1 for none."""
        if not isinstance(self.round_to, str):
            return 1
        try:
            number = str(steps(self.round_to)).removeprefix(host.AUTO)
        except ValueError as error:
            raise TargetError(f"round_to: {error}") from error
        return int(number) if number else host.vector_block()

    def chooser(self, combed: Combed, converted: Convert | None = None) -> Chooser:
        """Return the allocator of this budget; for a latency target, measure or read the cost table first.

        `converted` returns the form in which models are deployed, whose latency is measured.
        """
        chooser = Chooser(self.budget, targets=self.targets, nearest=self.nearest, block=self.block)
        if not self.targets.has_latency:
            return replace(chooser, check=self._speed_check(converted))
        if self.cost_table is not None:
            table = load_table(Path(self.cost_table))
            table.require(combed.folded.original)
            table.require_parts(combed)
            return replace(chooser, table=table)
        probe = LatencyProbe(combed, self.setting, converted)
        with step("cost table", is_whole=True):
            table = measure_table(probe, observer=advance)
        return replace(chooser, table=table, probe=probe, is_measured=True)

    def refined(
        self,
        choose: Choose,
        combed: Combed,
        scores: Sequence[Scores],
        data: Source | None,
        *,
        is_loss: bool,
        seed: int = 0,
    ) -> Refined:
        """Return the loss curves to allocate by, chosen among as many allocations as `effort` says."""
        if data is None or self.budget.policy != "optimal":
            return Refined()
        return refined(combed, scores, choose, data, RefineOptions(self.effort or 0, seed, self.depth), is_loss=is_loss)

    def _speed_check(self, converted: Convert | None) -> SpeedCheck | None:
        """Return what times the result; None without `check_speed`."""
        if not self.check_speed:
            return None
        tries = not isinstance(self.round_to, int)
        return SpeedCheck(self.setting, self.block, tries, partial(LatencyProbe, converted=converted))

    @property
    def setting(self) -> Setting:
        """Conditions under which latencies are measured."""
        return Setting(self.latency_batch, self.latency_threads, self.latency_provider)

    def __call__(self, state: State) -> State:
        """Fill in `allocation`."""
        _ = self.budget  # raises TargetError for invalid options before the work starts
        is_loss = bool(state.score) and find_score_function(state.score["score"]).is_loss
        combed, scores = state.need("combed", "comb"), state.need("scores", "score")
        chooser = self.chooser(combed, state.converted)
        found = Refined(state.curves)
        if state.curves is None:
            chooser = chooser.corrected(combed, scores, is_loss=is_loss) if self.effort else chooser
            choose = partial(chooser.quick, combed, scores, is_loss=is_loss)
            found = self.refined(choose, combed, scores, state.data, is_loss=is_loss)
        allocation = found.chosen(partial(chooser, combed, scores, is_loss=is_loss))
        allocation = replace(allocation, notes=(*allocation.notes, *found.notes))
        return replace(state, allocation=allocation, budget=dict(allocation.budget) | dict(state.score))
