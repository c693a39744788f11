"""Allocation: how many channels, and which, are removed from each group to meet a budget."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from cpd_onnx.algebra.atoms import NOTHING, Axis
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.deployed import STORED, few_bits, file_terms, flash_terms
from cpd_onnx.budget.knapsack import Cost, Counts, solve
from cpd_onnx.budget.latency import CostTable
from cpd_onnx.budget.memory import MemoryModel
from cpd_onnx.budget.targets import Asked, Target, slack_of
from cpd_onnx.budget.widths import Limits, allowed_widths
from cpd_onnx.channels.branches import branches, removable_groups, removable_together
from cpd_onnx.channels.costs import CostModel, Costs, Floats, Peak, Term
from cpd_onnx.channels.groups import Combed
from cpd_onnx.errors import TargetError
from cpd_onnx.options import RENAMED_FROM, Renaming
from cpd_onnx.scores.registry import Scores
from cpd_onnx.summary import Summarised, Summary, count

_SHOWN = (("MACs", "macs"), ("parameters", "params"))
"""Names and fields of the costs that a summary shows."""
POLICIES = ("uniform", "global", "isomorphic", "optimal")
"""Allocation policies, see `Budget`."""
_STEPS = 24
"""Number of bisections of the ratio: their resolution of 2^-24 is finer than one channel of any group."""
_TOLERANCE = 0.02
"""Deviation from the target, as a fraction of the original's cost, above which a note is made (heuristic)."""
_EXACT = 1e-9
"""Deviation above a limit that is due to rounding, as a fraction of the original's cost."""
_NORM = 16.0
"""Exponent of the norm that stands for the largest of several costs (heuristic): smooth, and at most 7 % above it."""
_WORK = ("channels", "macs", "params", "bytes")
"""Kinds of costs that stand for the work of a group themselves; for others, its MACs do."""
_CORRECTIONS = 6
"""Maximum number of times that the optimum is computed (heuristic). Between them the target is lowered where channels
cost more than the mean of their group, and the weights of groups follow the remaining work if scores are not losses."""
_EVENNESS = 1.5
"""Exponent of the loss of a group (heuristic): the higher it is above 1, the more evenly groups are pruned."""
_TOGETHER = 1.5
"""Exponent of the work in a group that weights its loss (heuristic): above 1, since layers that share channels lose
accuracy together."""
_LEAST_WEIGHT = 0.05
"""Minimum weight of a group's loss, where the mean weight is about 1 (heuristic)."""
FASTER = 0.95
"""Ratio to the original's latency up to which a model counts as faster; smaller differences may be chance."""
_LEAST_SHARE = 1e-6
"""Smallest fraction of a group's importance that may remain, which keeps its logarithm finite."""


@dataclass(frozen=True)
class Budget(metaclass=Renaming):
    """What may remain of a model.

    Attributes:
        kind: "channels", "macs", "params", "bytes" (of the file) or "latency" (median time of a run).
        fraction: Fraction of the original that may remain, above 0 up to 1.
        policy: "uniform" removes the same ratio of each group; "global" ranks all channels together; "isomorphic" ranks
            those of groups with the same structure together, and removes the same ratio of each such class; "optimal"
            chooses the widths with the least total loss.
        limits: Constraints on the widths.
        also: Further costs, by kind, and the fraction of the original that may remain of each.
        is_limit: Whether the fractions must not be exceeded; otherwise the nearest widths may lie above them.
        stored_as: Element type of the deployed model, "int8" or "float16", for the kinds "flash" and "ram", or that of
            weights in few bits, see `FewBits`, for the kind "bytes"; empty for that of the file.

    """

    kind: str = "channels"
    fraction: float = 0.5
    policy: str = field(default="uniform", metadata={RENAMED_FROM: "spread"})
    limits: Limits = field(default_factory=Limits)
    also: tuple[tuple[str, float], ...] = ()
    is_limit: bool = False
    stored_as: str = ""

    def __post_init__(self) -> None:
        """Check the values; raises TargetError."""
        for kind, fraction in self.fractions:
            Target(kind, fraction)
        if self.policy not in POLICIES:
            raise TargetError(f"unknown policy {self.policy!r}: choose one of {', '.join(POLICIES)}")
        if self.stored_as not in ("", *STORED) and few_bits(self.stored_as) is None:
            raise TargetError(f"a model is deployed as one of {', '.join(STORED)}, got {self.stored_as!r}")

    @property
    def fractions(self) -> tuple[tuple[str, float], ...]:
        """Kind and fraction of all costs that are limited, the first one first."""
        return ((self.kind, self.fraction), *self.also)

    def as_text(self) -> str:
        """Return the kinds and fractions as `targets.parse` reads them."""
        return ",".join(f"{kind}={fraction:g}" for kind, fraction in self.fractions)

    def part(self, progress: float) -> Budget:
        """Return the budget of a round of pruning, where `progress` is the fraction of what is removed in the end."""
        fractions = [(kind, 1 - (1 - fraction) * progress) for kind, fraction in self.fractions]
        return replace(self, fraction=fractions[0][1], also=tuple(fractions[1:]))

    def as_words(self) -> dict[str, Any]:
        """Return the budget as the entries of a plan."""
        limits = self.limits
        words: dict[str, Any] = {"kind": self.kind, "target": self.fraction, "policy": self.policy}
        words |= {"round_to": limits.round_to, "keep": list(limits.keep)}
        if self.also:
            words["also"] = dict(self.also)
        if self.stored_as:
            words["stored_as"] = self.stored_as
        if limits.ratios != Limits.ratios:
            words["ratios"] = list(limits.ratios)
        return words | ({"widths": {name: list(ratios) for name, ratios in limits.of}} if limits.of else {})


@dataclass(frozen=True, eq=False)
class LossCurves:
    """Loss of the model as a function of the number of channels removed from each group.

    Attributes:
        loss: For each group an array with, at index r = 0 … size - 1, the loss without its r least important channels.
            It starts at 0 and never decreases. Losses of different groups are comparable.
        whole: For each group the loss without any channel, infinite for one that keeps at least one; empty if all do.
    """

    loss: tuple[Floats, ...]
    whole: tuple[float, ...] = ()

    @property
    def widths_alone(self) -> LossCurves:
        """The same curves, by which each group keeps at least one channel."""
        return LossCurves(self.loss)

    def check(self, combed: Combed) -> None:
        """Raise ValueError unless there is a valid curve for each group."""
        if [len(curve) for curve in self.loss] != [len(group) for group in combed.groups]:
            raise ValueError("a loss curve must have one number for each of 0 … size - 1 removed channels")
        if any(curve[0] != 0 or bool((np.diff(curve) < 0).any()) for curve in self.loss):
            raise ValueError("a loss curve must start at 0 and never decrease")
        if self.whole and not all(whole >= curve[-1] for whole, curve in zip(self.whole, self.loss, strict=True)):
            raise ValueError("the loss without any channel must be at least that of a single one")


def loss_curves(scores: Sequence[Scores], *, is_loss: bool) -> LossCurves:
    """Return the loss curves that scores imply: sums of the scores of the removed channels.

    Scores that are not losses are importances. A signal is multiplied from layer to layer, so the loss is the negative
    logarithm of the fraction of the importance that remains: removing half of any group costs the same, and removing
    its last channels costs more than any saving. The loss is raised to a power (`_EVENNESS`) so that the first channels
    cost little and groups are pruned evenly unless their costs differ.
    """
    made = []
    for score in scores:
        ascending = np.sort(np.maximum(np.asarray(score, np.float64), 0.0), kind="stable")
        gone = np.concatenate([[0.0], np.cumsum(ascending)])
        if not is_loss:
            share = gone / gone[-1] if gone[-1] else np.arange(len(gone)) / len(ascending)
            gone = (-np.log(np.maximum(1 - share, _LEAST_SHARE))) ** _EVENNESS
        made.append(np.maximum.accumulate(gone[:-1] - gone[0]))
    return LossCurves(tuple(made))


def depth_curves(combed: Combed, scores: Sequence[Scores], *, is_loss: bool) -> LossCurves:
    """Return the loss curves that scores imply, with the loss of each group that can be removed as a whole.

    Scores that are not losses do not say what the model loses without the last channel.
    """
    curves = loss_curves(scores, is_loss=is_loss)
    if not is_loss:
        return curves
    whole = [math.inf] * len(curves.loss)
    for index in removable_groups(combed):
        score = np.maximum(np.asarray(scores[index], np.float64), 0.0)
        whole[index] = max(float(score.sum()), float(curves.loss[index][-1]))
    return LossCurves(curves.loss, tuple(whole))


@dataclass(frozen=True, eq=False, repr=False)
class Allocation(Summarised):
    """The channels to remove.

    Attributes:
        removed: For each group the sorted positions (in `Group.channels`) of the removed channels.
        before: Costs of the original.
        after: Costs of what remains.
        notes: Remarks on a target that was not met exactly, and on measurements.
        latency: Ratios to the original's latency: "measured", for any kind of target, if the model was timed; for a
            latency target also "target", the requested, and "predicted", that of the cost table.
        asked: The targets, and what was reached of each.
        slow_because: Reason why the pruned model is not at least 5 % faster; empty if it is, or was not timed.
        round_to: Number of which the widths of large groups are multiples, where that was chosen for the processor.
        table: The cost table that was measured; None if there was none or it was given.
        budget: The budget, as the entries of a plan.

    """

    removed: list[list[int]]
    before: Costs
    after: Costs
    notes: tuple[str, ...] = field(default=())
    latency: Mapping[str, float] = field(default_factory=dict)
    asked: tuple[Asked, ...] = ()
    slow_because: str = ""
    round_to: int = 1
    table: CostTable | None = None
    budget: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_nearest(self) -> bool:
        """Whether a target cannot be reached, and this is the nearest to it."""
        return not all(asked.is_met for asked in self.asked)

    @property
    def is_faster(self) -> bool | None:
        """Whether the pruned model is at least 5 % faster than the original; None if it was not timed."""
        measured = self.latency.get("measured")
        return None if measured is None else measured <= FASTER

    def summary(self) -> Summary:
        """Return the numbers of removed channels and the costs as a table."""
        costs = ((name, getattr(self.before, key), getattr(self.after, key)) for name, key in _SHOWN)
        return Summary.of({
            "groups": f"{sum(map(bool, self.removed))} of {len(self.removed)}",
            "channels removed": str(sum(map(len, self.removed))),
            **{name: f"{count(before)} -> {count(after)}" for name, before, after in costs},
        })  # fmt: skip  # a table

    def channels(self, combed: Combed) -> Axis:
        """Return the primitive atoms of the removed channels."""
        gone = [group.channels[removed] for group, removed in zip(combed.groups, self.removed, strict=True)]
        return np.concatenate([np.zeros(0, np.int64), *gone]).astype(np.int64)

    def keep_mask(self, combed: Combed) -> KeepMask:
        """Return the mask of what survives of each axis."""
        return KeepMask(combed.atoms, self.channels(combed))


class UnreachableError(TargetError):
    """A budget cannot be met at the smallest allowed widths.

    Attributes:
        floors: Fraction of the original that remains of each cost at these widths, by kind.
        obstacle: What keeps widths from becoming smaller.
        nearest: The nearest allocation that was found; None if none was computed.
    """

    def __init__(
        self, text: str, floors: Mapping[str, float], obstacle: str, nearest: Allocation | None = None
    ) -> None:
        """Create the error from its message and its attributes."""
        super().__init__(text)
        self.floors, self.obstacle, self.nearest = floors, obstacle, nearest


class Prices:
    """All costs that a budget may limit, as functions of the surviving channels."""

    def __init__(
        self,
        combed: Combed,
        kinds: Collection[str],
        *,
        stored_as: str = "",
        table: CostTable | None = None,
    ) -> None:
        """Collect the costs of some kinds.

        Args:
            combed: The model.
            kinds: Kinds of costs, of `ALL_KINDS`.
            stored_as: Element type of the deployed model, see `Budget`.
            table: Predicts latencies, and has the widths at which kernels are fast.
        """
        self.table = table
        self.multiples: Mapping[int, int] | None = None if table is None else table.multiples(combed)
        more: dict[str, Sequence[Term] | Peak] = {"latency": table.terms(combed)} if table is not None else {}
        bits = few_bits(stored_as)
        program = stored_as if bits is None else ""
        if bits is not None and "bytes" in kinds:
            more["bytes"] = file_terms(combed, bits)
        if "flash" in kinds:
            more["flash"] = flash_terms(combed, program)
        self.memory = MemoryModel(combed, program) if "ram" in kinds else None
        if self.memory is not None:
            more["ram"] = self.memory.program
        self.costs = CostModel(combed, more)
        self._whole = KeepMask(combed.atoms)
        self._full: dict[str, float] = {}

    def at(self, multiples: Mapping[int, int] | None) -> Prices:
        """Return the same costs with other multiples of widths, by the id of the group."""
        found = copy(self)
        found.multiples = multiples
        return found

    def full(self, kind: str) -> float:
        """Return a cost of the original."""
        if kind not in self._full:
            full = self.cost(kind, self._whole)
            if kind == "latency" and self.table is not None:
                # Time that the fit adds at full width cannot be saved; the conversion of the original saves some.
                full = self.table.ms if self.table.is_converted else min(full, self.table.ms)
            self._full[kind] = full
        return self._full[kind]

    def cost(self, kind: str, kept: KeepMask) -> float:
        """Return a cost of what survives; memory as the planner places it."""
        if kind == "ram" and self.memory is not None:
            return self.memory.ram(kept)
        return self.costs.cost(kind, kept)


def allocate(
    combed: Combed,
    scores: Sequence[Scores],
    budget: Budget,
    *,
    is_loss: bool = False,
    curves: LossCurves | None = None,
    table: CostTable | None = None,
) -> Allocation:
    """Choose the channels to remove; at least one of each group survives, unless `curves` say what is lost without any.

    Policies that rank channels use the score relative to the mean of the group or, if scores are losses, the loss per
    cost saved. The policy "optimal" uses `curves`, by default the `loss_curves` of the scores. Latency is predicted by
    `table`.

    Raises UnreachableError, which names the obstacle, if the budget cannot be met.
    """
    kinds = [kind for kind, _ in budget.fractions]
    prices = Prices(combed, kinds, stored_as=budget.stored_as, table=table)
    return allocate_at(prices, combed, scores, budget, is_loss=is_loss, curves=curves)


def allocate_at(
    prices: Prices,
    combed: Combed,
    scores: Sequence[Scores],
    budget: Budget,
    *,
    is_loss: bool = False,
    curves: LossCurves | None = None,
) -> Allocation:
    """Choose the channels to remove as `allocate` does, by costs that are known already."""
    if not combed.groups:
        raise TargetError(f"nothing can be pruned in this model: {why_nothing(combed)}")
    if curves is not None:
        curves.check(combed)
    if prices.table is None and any(kind == "latency" for kind, _ in budget.fractions):
        raise ValueError("a latency target needs a cost table")
    return _Allocator(combed, scores, budget, is_loss=is_loss, curves=curves, prices=prices).run()


def why_nothing(combed: Combed) -> str:
    """Return the commonest reasons why a model has no prunable channels."""
    if not any(weight.is_trained and not weight.is_vector for weight in combed.weights):
        ops = ", ".join(combed.without_rule) or "its operators"
        return f"it has no weight matrices or kernels (operators without channels: {ops})"
    if combed.without_rule:
        return f"no rule for {', '.join(combed.without_rule)}"
    reasons = {reason: None for frozen in combed.frozen() for reason in frozen.reasons}
    return "; ".join(list(reasons)[:3]) or "all axes are fixed by its inputs and outputs"


class _Allocator:
    def __init__(
        self,
        combed: Combed,
        scores: Sequence[Scores],
        budget: Budget,
        *,
        is_loss: bool,
        curves: LossCurves | None,
        prices: Prices,
    ) -> None:
        self.is_loss = is_loss
        self.combed, self.scores, self.budget = combed, list(scores), budget
        self.prices, self.costs = prices, prices.costs
        self.before = self.costs.total(KeepMask(combed.atoms))
        self.is_strict = budget.is_limit or bool(budget.also)
        self.full = prices.full(budget.kind)
        self.limits = {kind: fraction * prices.full(kind) for kind, fraction in budget.fractions}
        if budget.also:  # costs are then fractions of what is allowed
            self.full = max(prices.full(kind) / limit for kind, limit in self.limits.items())
        self.widths = allowed_widths(combed, budget.limits, prices.multiples)
        self.kept_in_part: set[int] = set()
        self.sizes = [len(group) for group in combed.groups]
        self.order = [np.argsort(score, kind="stable") for score in self.scores]
        self.least_first = [g.channels[order] for g, order in zip(combed.groups, self.order, strict=True)]
        self.outer = _outer_groups(combed)
        self.sequence = _outer_first(self.outer, len(combed.groups))
        self.curves = curves
        self.rankings = [self.ranked(groups) for groups in self.competing()]

    def run(self) -> Allocation:
        target = 1.0 if self.budget.also else self.budget.fraction * self.full
        slack = _EXACT if self.is_strict else slack_of(self.budget.fraction)
        floor, tolerance = self.cost(self.least()), slack * self.full
        if floor > target + tolerance:
            raise self.unreachable()
        counts = self.counted(target)
        while (obstructed := self.obstructed(counts)) is not None:
            self.kept_in_part.add(obstructed)
            counts = self.counted(target)
        if self.is_strict and self.cost(counts) > target + tolerance:
            counts = self.searched(target)
        if self.budget.policy == "optimal" and any(kind == "ram" for kind, _ in self.budget.fractions):
            counts = self.regrown(counts, target)
        if counts == self.sizes and all(fraction < 1 for _, fraction in self.budget.fractions):
            raise TargetError(f"target {self.budget.as_text()} would remove nothing: the smallest step is larger")
        reached = self.cost(counts)
        notes = []
        if abs(reached - target) > _TOLERANCE * self.full and not self.budget.also:
            bounds = "the bounds of the widths" if counts == self.widths.most else "whole channels"
            notes.append(f"{self.budget.kind}={reached / self.full:.3f} is the nearest that {bounds} allow")
        return self.result(counts, tuple(notes))

    def obstructed(self, counts: Sequence[int]) -> int | None:
        """Return a group that cannot be removed as a whole together with others that are; None if all can."""
        gone = [index for index, count in enumerate(counts) if not count]
        if not gone or not branches(self.combed, gone).obstacle:
            return None
        return next(gone[n] for n in range(len(gone)) if branches(self.combed, gone[: n + 1]).obstacle)

    def least(self) -> list[int]:
        """Return the smallest width of each group that may be chosen."""
        if self.curves is None or not self.curves.whole or self.budget.policy != "optimal":
            return self.widths.least
        gone = self.widths.free & removable_together(self.combed)
        wholes = [index in gone and whole < math.inf for index, whole in enumerate(self.curves.whole)]
        return [0 if is_gone else width for is_gone, width in zip(wholes, self.widths.least, strict=True)]

    def choices(self, curves: LossCurves, weights: Floats) -> tuple[list[Counts], list[Floats]]:
        """Return the widths of each group to choose from, 0 among them if it may vanish, and their losses."""
        allowed, losses = [], []
        for index, (curve, size, widths) in enumerate(zip(curves.loss, self.sizes, self.widths.allowed, strict=True)):
            loss = weights[index] * curve[size - widths]
            whole = curves.whole[index] if curves.whole else math.inf
            if whole < math.inf and index in self.widths.free and index not in self.kept_in_part:
                widths, loss = np.append(0, widths), np.append(weights[index] * whole, loss)
            allowed.append(widths)
            losses.append(loss)
        return allowed, losses

    def counted(self, target: float) -> list[int]:
        """Return the widths by the policy of the budget."""
        if self.budget.policy != "optimal":
            return self.searched(target)
        return self.jointly_optimal() if self.budget.also else self.optimal(target)

    def jointly_optimal(self) -> list[int]:
        """Return widths within all limits with a small total loss.

        The knapsack takes a smooth bound of the largest cost in relation to its limit. Where the bound leaves room, all
        limits are raised for it, and where a cost is above its limit all the same, that limit is lowered.
        """
        curves = self.curves or loss_curves(self.scores, is_loss=self.is_loss)
        follows = self.curves is None and not self.is_loss
        work = self.costs.in_widths("macs")
        weights: Floats = _weights(work, self.sizes) if follows else np.ones(len(self.sizes))
        limits, best, nearest = dict(self.limits), None, 0.0
        for _ in range(_CORRECTIONS):
            allowed, loss = self.choices(curves, weights)
            counts = solve(allowed, loss, self.norm(limits), 1.0)
            kept = self.kept(counts)
            used = {kind: self.prices.cost(kind, kept) / limit for kind, limit in self.limits.items()}
            most = max(used.values())
            if nearest < most <= 1 + _EXACT:
                best, nearest = counts, most
            if 1 - _TOLERANCE <= most <= 1 + _EXACT:
                break
            if most < 1:
                limits = {kind: limit / most for kind, limit in limits.items()}
            else:
                limits = {kind: limit / max(1.0, used[kind] + _EXACT) for kind, limit in limits.items()}
            weights = (weights + _weights(work, counts)) / 2 if follows else weights
        return self.searched(1.0) if best is None else best

    def optimal(self, target: float) -> list[int]:
        """Return the widths with the least total loss."""
        curves = self.curves or loss_curves(self.scores, is_loss=self.is_loss)
        follows = self.curves is None and not self.is_loss
        cost, limit, counts = self.costs.in_widths(self.budget.kind), target, self.sizes
        work = cost if self.budget.kind in _WORK else self.costs.in_widths("macs")
        weights: Floats = _weights(work, counts) if follows else np.ones(len(counts))
        for _ in range(_CORRECTIONS):
            allowed, loss = self.choices(curves, weights)
            before, counts = counts, solve(allowed, loss, cost, limit)
            over = self.cost(counts) - target
            most = _EXACT if self.is_strict else 0.1 * _TOLERANCE
            if over <= most * self.full and (not follows or counts == before):
                break
            limit -= max(0.0, over)
            if follows:
                weights = (weights + _weights(work, counts)) / 2
        return counts

    def regrown(self, counts: Sequence[int], target: float) -> list[int]:
        """Return widths that lose less within the target, where the cost is not what the knapsack takes it for.

        The planner's arena jumps with the widths, so that the knapsack may aim far below the target, and narrow groups
        that have no part in the largest sum. These get their channels back first, as they cost nothing, and then the
        others as many as fit.
        """
        curves = self.curves or loss_curves(self.scores, is_loss=self.is_loss)
        allowed, losses = self.choices(curves, np.ones(len(self.sizes)))
        found = list(counts)

        def lost(index: int) -> float:
            return float(losses[index][np.searchsorted(allowed[index], found[index])])

        least = self.cost(found)
        for limit in (least, max(least, target)):
            for index in sorted((index for index, width in enumerate(found) if width), key=lost, reverse=True):
                is_gain = np.diff(losses[index], prepend=math.inf) < 0
                wider = allowed[index][is_gain & (allowed[index] > found[index])].tolist()
                costs = partial(self.with_width, found, index)
                count = bisect_right(wider, limit, key=costs)
                found[index] = wider[count - 1] if count else found[index]
        return found

    def with_width(self, counts: Sequence[int], index: int, width: int) -> float:
        """Return the cost of some widths with another one of a group."""
        return self.cost([*counts[:index], width, *counts[index + 1 :]])

    def searched(self, target: float) -> list[int]:
        """Return the widths of the ratio that meets the target, found by bisection."""
        low, high = 0.0, 1.0
        few, many = self.counts(0.0), self.counts(1.0)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            counts = self.counts(middle)
            if self.cost(counts) <= target:
                low, few = middle, counts
            else:
                high, many = middle, counts
            if few == many:
                break
        return self.between(few, many, target)

    def between(self, low: list[int], high: list[int], target: float) -> list[int]:
        """Return the second of two neighbouring choices for as many groups as the target allows, else the first."""
        differing = [i for i, (a, b) in enumerate(zip(low, high, strict=True)) if a != b]
        first, last = 0, len(differing)
        while first < last:
            middle = (first + last + 1) // 2
            first, last = (
                (middle, last)
                if self.cost(self.mixed(low, high, differing[:middle])) <= target
                else (first, middle - 1)
            )
        below = self.mixed(low, high, differing[:first])
        above = self.mixed(low, high, differing[: first + 1])
        nearer_above = abs(self.cost(above) - target) < 0.5 * abs(self.cost(below) - target)
        return above if nearer_above and not self.is_strict else below

    @staticmethod
    def mixed(low: list[int], high: list[int], taken: Sequence[int]) -> list[int]:
        chosen = set(taken)
        return [high[i] if i in chosen else low[i] for i in range(len(low))]

    def counts(self, ratio: float) -> list[int]:
        """Return the number of surviving channels of each group at a ratio."""
        if self.rankings:
            return self.ranked_counts(ratio)
        found = list(self.sizes)
        for index in self.sequence:
            if index in self.widths.held:
                continue
            already = min(
                (np.prod([found[o] / self.sizes[o] for o in outer]) for outer in self.outer[index]), default=1.0
            )
            own = min(1.0, ratio / float(already)) if already else 1.0
            found[index] = self.widths.nearest(index, own * self.sizes[index])
        return found

    def competing(self) -> list[list[int]]:
        """Return the classes of groups whose channels are ranked together; each class loses the same ratio."""
        free = [index for index in range(len(self.sizes)) if index not in self.widths.held]
        if self.budget.policy == "global":
            return [free]
        classes: dict[Any, list[int]] = {}
        for index in free if self.budget.policy == "isomorphic" else []:
            classes.setdefault(self.combed.dependency(self.combed.groups[index]), []).append(index)
        return list(classes.values())

    def ranked(self, groups: Sequence[int]) -> list[int]:
        """Return the group of each channel of a class, the least important channel first."""
        pairs = []
        for index in groups:
            score, order = self.scores[index], self.order[index]
            unit = (self.price(index) if self.is_loss else float(score.mean())) or 1.0
            pairs += [(float(value) / unit, index) for value in score[order]]
        return [index for _, index in sorted(pairs)]

    def price(self, index: int) -> float:
        """Return the cost of one channel of a group."""
        fewer = [size - (place == index and size > 1) for place, size in enumerate(self.sizes)]
        return self.cost(self.sizes) - self.cost(fewer)

    def ranked_counts(self, ratio: float) -> list[int]:
        gone = np.zeros(len(self.sizes), np.int64)
        for ranking in self.rankings:
            gone += np.bincount(ranking[: round((1 - ratio) * len(ranking))], minlength=len(self.sizes))
        return [self.widths.nearest(i, size - int(g)) for i, (size, g) in enumerate(zip(self.sizes, gone, strict=True))]

    def removed(self, counts: Sequence[int]) -> list[list[int]]:
        return [sorted(order[: len(order) - n].tolist()) for order, n in zip(self.order, counts, strict=True)]

    def cost(self, counts: Sequence[int]) -> float:
        """Return the cost of some widths; with several limits, the largest cost as a fraction of what is allowed."""
        kept = self.kept(counts)
        if not self.budget.also:
            return self.prices.cost(self.budget.kind, kept)
        return max(self.prices.cost(kind, kept) / limit for kind, limit in self.limits.items())

    def norm(self, limits: Mapping[str, float]) -> Cost:
        """Return a smooth upper bound of the largest of several costs in relation to its limit, by widths."""
        costs = [(self.costs.in_widths(kind), limit) for kind, limit in limits.items()]

        def cost(widths: Counts) -> Floats:
            parts = np.stack([cost(widths) / limit for cost, limit in costs])
            return np.asarray((parts**_NORM).sum(axis=0) ** (1 / _NORM))

        return cost

    def kept(self, counts: Sequence[int]) -> KeepMask:
        gone = [channels[: len(channels) - n] for channels, n in zip(self.least_first, counts, strict=True)]
        return KeepMask(self.combed.atoms, np.concatenate(gone))

    def result(self, counts: Sequence[int], notes: tuple[str, ...]) -> Allocation:
        kept = self.kept(counts)
        allocation = Allocation(self.removed(counts), self.before, self.costs.total(kept), notes)
        if self.budget.kind != "latency":
            return allocation
        predicted = self.prices.cost("latency", kept) / self.prices.full("latency")
        return replace(allocation, latency={"target": self.budget.fraction, "predicted": predicted})

    def unreachable(self) -> UnreachableError:
        kept = self.kept(self.least())
        floors = {kind: self.prices.cost(kind, kept) / self.prices.full(kind) for kind, _ in self.budget.fractions}
        least = ", ".join(f"{left:.3f}" + (f" of {kind}" if len(floors) > 1 else "") for kind, left in floors.items())
        why, obstacle = f"target {self.budget.as_text()} cannot be reached", self.obstacle()
        text = f"{why}: at the smallest allowed widths, {least} remains; {obstacle}"
        return UnreachableError(text, floors, obstacle)

    def obstacle(self) -> str:
        """Return what keeps widths from becoming smaller."""
        limits = self.budget.limits
        if self.widths.held:
            return f"{len(self.widths.held)} groups are pinned by --keep"
        if limits.round_to > 1:
            return f"widths are multiples of {limits.round_to}"
        if limits.ratios[0] > 0 or limits.of:
            return "groups have minimum ratios"
        frozen = sorted(self.combed.frozen(), key=lambda f: -f.indices)
        reasons = {reason: None for f in frozen for reason in f.reasons}
        return f"not prunable: {'; '.join(list(reasons)[:3])}"


def _weights(work: Cost, counts: Sequence[int]) -> Floats:
    """Return the weight of each group's loss where scores are importances: a power of the work that remains in it.

    Removing a channel from a group that runs through many layers, as in a residual stage, saves much but degrades all
    of them, so that its loss counts more than theirs taken one by one.
    """
    fewer = np.asarray(counts) - np.eye(len(counts), dtype=np.int64)
    through = np.maximum(work(np.asarray([counts])) - work(fewer), 0.0) * counts
    return np.asarray((through / (through.mean() or 1.0)) ** _TOGETHER + _LEAST_WEIGHT)


def _outer_groups(combed: Combed) -> dict[int, list[tuple[int, ...]]]:
    """Return, for each group, the tuples of groups that precede it in the composite indices of some weight axis.

    Where heads and head dimension share an axis, heads are outer: the ratio applies to them first, then to the rest.
    """
    owner, _ = combed.owners
    found: dict[int, set[tuple[int, ...]]] = {group.id: set() for group in combed.groups}
    for weight in combed.weights:
        for axes in weight.axes:
            for axis in axes:
                parts = combed.atoms.parts(axis)
                if parts.shape[1] > 1:
                    _note_rows(found, np.where(parts == NOTHING, -1, owner[parts]))
    return {index: sorted(outer) for index, outer in found.items()}


def _note_rows(found: dict[int, set[tuple[int, ...]]], rows: Axis) -> None:
    for row in sorted(set(map(tuple, rows.tolist()))):
        groups = list(dict.fromkeys(g for g in row if g >= 0))
        for place, group in enumerate(groups[1:], start=1):
            found[group].add(tuple(groups[:place]))


def _outer_first(outer: dict[int, list[tuple[int, ...]]], count: int) -> list[int]:
    """Return an order in which each group follows its outer ones, as far as there is one."""
    done: list[int] = []
    waiting = list(range(count))
    while waiting:
        known = set(done)
        ready = [i for i in waiting if all(o in known for group in outer[i] for o in group)] or waiting[:1]
        done += ready
        waiting = [i for i in waiting if i not in set(ready)]
    return done
