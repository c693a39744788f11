"""Allocate: how many channels each group loses, and which, to meet a budget."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cpd_onnx.algebra.atoms import NOTHING, Axis
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.budget.knapsack import solve
from cpd_onnx.budget.latency import CostTable, LatencyProbe
from cpd_onnx.budget.widths import Limits, allowed_widths
from cpd_onnx.channels.costs import CostModel, Costs, Floats, WidthCost
from cpd_onnx.channels.groups import Combed
from cpd_onnx.errors import TargetError
from cpd_onnx.options import RENAMED_FROM, Renaming
from cpd_onnx.scores.registry import Scores
from cpd_onnx.summary import Summarised, Summary, count

_SHOWN = (("MACs", "macs"), ("parameters", "params"))
"""Costs that a summary shows, and their names."""
KINDS = ("channels", "macs", "params", "bytes", "latency")
POLICIES = ("uniform", "global", "isomorphic", "optimal")
_STEPS = 24
"""Halvings of the search interval: finer than any group's channels."""
_TOLERANCE = 0.02
"""Share of the original by which a target may be missed without a note."""
_CORRECTIONS = 6
"""Times that the optimum is looked for again: where single channels cost other than the mean of their group its target
is lowered, and where scores are no losses its weights follow what is left."""
_EVENNESS = 1.5
"""Power of what groups lose: at 1 the widths with the most work for their cost are taken, however uneven; the higher,
the more alike are shares."""
_TOGETHER = 1.5
"""Power of the work that runs through a group: above 1, since layers that share channels are harmed together."""
_LEAST_WEIGHT = 0.05
"""Of a group, where 1 is the mean."""
_ROUNDS = 8
"""Allocations that are measured for a latency target."""
_MORE = 0.04
"""By how much more is asked for if the table takes a target to be out of reach."""
_NEAR = 0.02
"""A measured latency that near to its target will do."""
_HALVINGS = 3
"""Of the multiples at which kernels are fast, for targets out of reach there."""
_TOO_WIDE = "the widths at which kernels are fast do not go that low: finer ones were taken"
_SECONDS, _TIMED_ROUNDS = 2.0, 40
"""For which, and in so many rounds, each of them is timed at least."""
_LEAST_SHARE = 1e-6
"""Of a group's importance: what is taken for nothing."""


@dataclass(frozen=True)
class Budget(metaclass=Renaming):
    """What may remain.

    Attributes:
        kind: "channels", "macs", "params", "bytes" (of the file) or "latency" (median time of a run).
        fraction: of the original that may remain, 0 to 1.
        policy: "uniform" removes the same share from each group, "global" lets all channels compete, "isomorphic" those
            of groups that do the same in different places (each such class loses the same share), "optimal" takes the
            widths with the least loss.
        limits: which widths are allowed.

    """

    kind: str = "channels"
    fraction: float = 0.5
    policy: str = field(default="uniform", metadata={RENAMED_FROM: "spread"})
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.kind not in KINDS:
            raise TargetError(f"no target is called {self.kind!r}: choose one of {', '.join(KINDS)}")
        if not 0 < self.fraction <= 1:
            raise TargetError(
                f"target {self.kind}={self.fraction:g}: give the fraction that may remain, above 0 up to 1"
            )
        if self.policy not in POLICIES:
            raise TargetError(f"unknown policy {self.policy!r}: choose one of {', '.join(POLICIES)}")

    def as_words(self) -> dict[str, Any]:
        """The same in the plan's words."""
        limits = self.limits
        words: dict[str, Any] = {"kind": self.kind, "target": self.fraction, "policy": self.policy}
        words |= {"round_to": limits.round_to, "keep": list(limits.keep)}
        if limits.ratios != Limits.ratios:
            words["ratios"] = list(limits.ratios)
        return words | ({"widths": {name: list(ratios) for name, ratios in limits.of}} if limits.of else {})


@dataclass(frozen=True, eq=False)
class LossCurves:
    """What the model loses with the channels of each group.

    Attributes:
        loss: for each group, at r, the loss without its r least important channels; r = 0 … size - 1. It starts at
            nothing and does not fall. Groups are compared by it as it is.
    """

    loss: tuple[Floats, ...]

    def check(self, combed: Combed) -> None:
        """Raise ValueError where a curve is not that of its group."""
        if [len(curve) for curve in self.loss] != [len(group) for group in combed.groups]:
            raise ValueError("a loss curve has one number for each of 0 … size - 1 channels that go")
        if any(curve[0] != 0 or bool((np.diff(curve) < 0).any()) for curve in self.loss):
            raise ValueError("a loss curve starts at 0 and does not fall")


def loss_curves(scores: Sequence[Scores], *, is_loss: bool) -> LossCurves:
    """Damage that scores tell: the losses of the channels that go, summed.

    Scores that are no losses are importances. What passes through the layers is multiplied from one to the next, so the
    share of the importance that stays counts by its logarithm: half of a group does as much as half of another, and to
    take the last channels does more than any cost can save. A power of it is what counts, so that the first channels
    cost little and shares come out alike, as far as nothing speaks against it.
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


@dataclass(frozen=True, eq=False, repr=False)
class Allocation(Summarised):
    """Which channels go.

    Attributes:
        removed: for each group the positions (in `Group.channels`) that go, sorted.
        before: costs of the original.
        after: costs of what remains.
        notes: what kept the target from being met exactly, if anything did, and what was measured.
        latency: where that was the target: share of the original's time that was asked for, predicted and, unless a
            cost table was given, measured.

    """

    removed: list[list[int]]
    before: Costs
    after: Costs
    notes: tuple[str, ...] = field(default=())
    latency: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> Summary:
        """How much goes."""
        costs = ((name, getattr(self.before, key), getattr(self.after, key)) for name, key in _SHOWN)
        return Summary.of({
            "groups": f"{sum(map(bool, self.removed))} of {len(self.removed)}",
            "channels removed": str(sum(map(len, self.removed))),
            **{name: f"{count(before)} -> {count(after)}" for name, before, after in costs},
        })  # fmt: skip  # a table

    def channels(self, combed: Combed) -> Axis:
        """The primitive atoms that go."""
        gone = [group.channels[removed] for group, removed in zip(combed.groups, self.removed, strict=True)]
        return np.concatenate([np.zeros(0, np.int64), *gone]).astype(np.int64)

    def keep_mask(self, combed: Combed) -> KeepMask:
        """What stays of each axis."""
        return KeepMask(combed.atoms, self.channels(combed))


def allocate(
    combed: Combed,
    scores: Sequence[Scores],
    budget: Budget,
    *,
    is_loss: bool = False,
    curves: LossCurves | None = None,
    table: CostTable | None = None,
) -> Allocation:
    """Choose the channels to remove, at least one stays in each group.

    Where channels compete, they are ranked by their score over the mean of their group; or, if the scores estimate
    what the model loses with a channel, by the loss for what it saves. The policy "optimal" goes by loss curves, see
    `loss_curves`; others may be given. Latency is what `table` says.

    Raises TargetError if the budget cannot be met, with what stands in the way.
    """
    if not combed.groups:
        raise TargetError(f"nothing can be pruned in this model: {why_nothing(combed)}")
    if curves is not None:
        curves.check(combed)
    if budget.kind == "latency" and table is None:
        raise ValueError("a latency target needs a cost table")
    return _Allocator(combed, scores, budget, is_loss=is_loss, curves=curves, table=table).run()


def allocate_measured(
    choose: Callable[[Budget, CostTable], Allocation], budget: Budget, table: CostTable, probe: LatencyProbe
) -> Allocation:
    """Allocate for a latency, measure what comes out beside the original, correct the target, and again.

    `choose` is `allocate` with all but its budget and table given. Of the rounds the one that came nearest counts. What
    the table takes to be out of reach may not be: then more is asked for first, and from there on what it takes to be
    fixed is taken to shrink with the model.

    Raises TargetError if the target is out of reach.
    """
    asked, tried = budget.fraction, list[tuple[float, float]]()
    best: Allocation | None = None
    refused: TargetError | None = None
    known = table
    while len(tried) < _ROUNDS and asked <= 1:
        try:
            chosen = choose(replace(budget, fraction=asked), known)
        except TargetError as error:
            refused = refused or error
            if best is None:
                asked += _MORE
                continue
            if known is not table:
                break
            known, asked, tried = table.loosened(probe.combed), budget.fraction, []
            continue
        measured = probe.ratio(chosen.channels(probe.combed), max(_SECONDS, _TIMED_ROUNDS * 1.5e-3 * table.ms))
        chosen = replace(chosen, latency={**chosen.latency, "target": budget.fraction, "measured": measured})
        if best is None or _miss(chosen) < _miss(best):
            best = chosen
        if _miss(chosen) <= _NEAR:
            break
        tried.append((asked, measured))
        asked = _next_to_ask(tried, budget.fraction)
    if refused is not None and (best is None or best.latency["measured"] > budget.fraction + _TOLERANCE):
        raise refused
    assert best is not None
    return replace(best, notes=(*(n for n in best.notes if n == _TOO_WIDE), *_latency_notes(best, table)))


def _next_to_ask(tried: Sequence[tuple[float, float]], target: float) -> float:
    """What to ask for, so that the target is measured: along the line through the two that came nearest."""
    near = sorted(tried, key=lambda pair: abs(pair[1] - target))[:2]
    asked, measured = near[0]
    slope = measured / asked
    if len(near) > 1 and near[0][0] != near[1][0]:
        slope = (measured - near[1][1]) / (asked - near[1][0])
    slope = min(max(slope, 0.5), 2.0)
    return min(1.0, max(asked + (target - measured) / slope, asked / 2))


def _miss(chosen: Allocation) -> float:
    """By what share the measured latency is not the target."""
    return abs(chosen.latency["measured"] / chosen.latency["target"] - 1)


def _latency_notes(chosen: Allocation, table: CostTable) -> Iterator[str]:
    found, setting = chosen.latency, table.setting
    where = f"onnxruntime, {setting.provider}, threads: {setting.threads}"
    if "measured" not in found:
        yield f"latency {found['predicted']:.3f} by the cost table ({where}), not measured here"
    else:
        yield f"latency {found['measured']:.3f} measured ({where}), {found['predicted']:.3f} predicted"
        if _miss(chosen) > _TOLERANCE:
            yield f"latency={found['measured']:.3f} is the nearest that was found to {found['target']:g}"
    if table.unattributed > _TOLERANCE:
        yield f"{table.unattributed:.0%} of the time is in kernels that come and go: the cost table takes it for fixed"


def why_nothing(combed: Combed) -> str:
    """The commonest reasons why a model has no prunable channels."""
    if not any(weight.is_trained and not weight.is_vector for weight in combed.weights):
        ops = ", ".join(combed.without_rule) or "its operators"
        return f"it has no weight matrices or kernels (operators without channels: {ops})"
    if combed.without_rule:
        return f"no rule for {', '.join(combed.without_rule)}"
    reasons = {reason: None for frozen in combed.frozen() for reason in frozen.reasons}
    return "; ".join(list(reasons)[:3]) or "all axes are fixed by its inputs and outputs"


@dataclass(frozen=True, eq=False)
class Chooser:
    """Allocates under a budget, again and again for what becomes of a model in rounds.

    Attributes:
        table: what latency is predicted by, where that is the target.
        probe: what it is measured with, if it is.
    """

    budget: Budget
    table: CostTable | None = None
    probe: LatencyProbe | None = None

    def __call__(
        self,
        combed: Combed,
        scores: Sequence[Scores],
        fraction: float | None = None,
        *,
        is_loss: bool = False,
        curves: LossCurves | None = None,
    ) -> Allocation:
        """Choose the channels that go; `fraction` is what may remain, if not that of the budget."""
        budget = self.budget if fraction is None else replace(self.budget, fraction=fraction)

        if self.table is None:
            return allocate(combed, scores, budget, is_loss=is_loss, curves=curves)

        def choose(wish: Budget, table: CostTable) -> Allocation:
            """At widths that are fast or, if the target is out of reach there, at finer ones."""
            for halvings in range(_HALVINGS):
                with contextlib.suppress(TargetError):
                    found = allocate(combed, scores, wish, is_loss=is_loss, curves=curves, table=table.finer(halvings))
                    return replace(found, notes=(*found.notes, *([_TOO_WIDE] if halvings else [])))
            return allocate(combed, scores, wish, is_loss=is_loss, curves=curves, table=table.finer(_HALVINGS))

        if self.probe is not None:
            return allocate_measured(choose, budget, self.table, self.probe)
        chosen = choose(budget, self.table)
        return replace(chosen, notes=(*chosen.notes, *_latency_notes(chosen, self.table)))


class _Allocator:
    def __init__(
        self,
        combed: Combed,
        scores: Sequence[Scores],
        budget: Budget,
        *,
        is_loss: bool,
        curves: LossCurves | None,
        table: CostTable | None,
    ) -> None:
        self.is_loss = is_loss
        self.combed, self.scores, self.budget = combed, list(scores), budget
        more = {"latency": table.terms(combed)} if table is not None else {}
        self.costs, whole = CostModel(combed, more), KeepMask(combed.atoms)
        self.before = self.costs.total(whole)
        self.full = self.costs.cost(budget.kind, whole)
        if table is not None:
            self.full = min(self.full, table.ms)  # what the fit leaves out at full width is not there to be saved
        multiples = table.multiples(combed) if table is not None else None
        self.widths = allowed_widths(combed, budget.limits, multiples)
        self.sizes = [len(group) for group in combed.groups]
        self.order = [np.argsort(score, kind="stable") for score in self.scores]
        self.least_first = [g.channels[order] for g, order in zip(combed.groups, self.order, strict=True)]
        self.outer = _outer_groups(combed)
        self.sequence = _outer_first(self.outer, len(combed.groups))
        self.curves = curves
        self.rankings = [self.ranked(groups) for groups in self.competing()]

    def run(self) -> Allocation:
        target = self.budget.fraction * self.full
        floor, tolerance = self.cost(self.widths.least), _TOLERANCE * self.full
        if floor > target + tolerance:
            raise TargetError(self.unreachable(floor))
        counts = self.optimal(target) if self.budget.policy == "optimal" else self.searched(target)
        if counts == self.sizes and self.budget.fraction < 1:
            raise TargetError(
                f"target {self.budget.kind}={self.budget.fraction:g} would remove nothing: the smallest step is larger"
            )
        reached = self.cost(counts)
        notes = []
        if abs(reached - target) > tolerance:
            bounds = "the bounds of the widths" if counts == self.widths.most else "whole channels"
            notes.append(f"{self.budget.kind}={reached / self.full:.3f} is the nearest that {bounds} allow")
        return self.result(counts, tuple(notes))

    def optimal(self, target: float) -> list[int]:
        """The widths with the least loss."""
        curves = self.curves or loss_curves(self.scores, is_loss=self.is_loss)
        allowed, follows = self.widths.allowed, self.curves is None and not self.is_loss
        cost, asked, counts = self.costs.in_widths(self.budget.kind), target, self.sizes
        work = self.costs.in_widths("macs") if self.budget.kind == "latency" else cost
        weights = _weights(work, counts) if follows else np.ones(len(counts))
        for _ in range(_CORRECTIONS):
            loss = [
                weight * curve[size - widths]
                for weight, curve, size, widths in zip(weights, curves.loss, self.sizes, allowed, strict=True)
            ]
            before, counts = counts, solve(allowed, loss, cost, asked)
            over = self.cost(counts) - target
            if over <= 0.1 * _TOLERANCE * self.full and (not follows or counts == before):
                break
            asked -= max(0.0, over)
            if follows:
                weights = (weights + _weights(work, counts)) / 2
        return counts

    def searched(self, target: float) -> list[int]:
        """The widths that one number gives, which is searched for by halving."""
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
        """Of two neighbouring choices, take the second for as many groups as the target allows."""
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
        return above if nearer_above else below

    @staticmethod
    def mixed(low: list[int], high: list[int], taken: Sequence[int]) -> list[int]:
        chosen = set(taken)
        return [high[i] if i in chosen else low[i] for i in range(len(low))]

    def counts(self, ratio: float) -> list[int]:
        """Channels that stay in each group for a share of what may stay."""
        if self.rankings:
            return self.ranked_counts(ratio)
        kept = list(self.sizes)
        for index in self.sequence:
            if index in self.widths.held:
                continue
            already = min(
                (np.prod([kept[o] / self.sizes[o] for o in outer]) for outer in self.outer[index]), default=1.0
            )
            share = min(1.0, ratio / float(already)) if already else 1.0
            kept[index] = self.widths.nearest(index, share * self.sizes[index])
        return kept

    def competing(self) -> list[list[int]]:
        """The groups whose channels compete, in classes that each lose the same share."""
        free = [index for index in range(len(self.sizes)) if index not in self.widths.held]
        if self.budget.policy == "global":
            return [free]
        classes: dict[Any, list[int]] = {}
        for index in free if self.budget.policy == "isomorphic" else []:
            classes.setdefault(self.combed.dependency(self.combed.groups[index]), []).append(index)
        return list(classes.values())

    def ranked(self, groups: Sequence[int]) -> list[int]:
        """Group of each channel of some groups, the least important channel first."""
        pairs = []
        for index in groups:
            score, order = self.scores[index], self.order[index]
            unit = (self.price(index) if self.is_loss else float(score.mean())) or 1.0
            pairs += [(float(value) / unit, index) for value in score[order]]
        return [index for _, index in sorted(pairs)]

    def price(self, index: int) -> float:
        """What one channel of a group costs."""
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
        return self.costs.cost(self.budget.kind, self.kept(counts))

    def kept(self, counts: Sequence[int]) -> KeepMask:
        gone = [channels[: len(channels) - n] for channels, n in zip(self.least_first, counts, strict=True)]
        return KeepMask(self.combed.atoms, np.concatenate(gone))

    def result(self, counts: Sequence[int], notes: tuple[str, ...]) -> Allocation:
        kept = self.kept(counts)
        allocation = Allocation(self.removed(counts), self.before, self.costs.total(kept), notes)
        if self.budget.kind != "latency":
            return allocation
        predicted = self.costs.cost("latency", kept) / self.full
        return replace(allocation, latency={"target": self.budget.fraction, "predicted": predicted})

    def unreachable(self, floor: float) -> str:
        kind, limits = self.budget.kind, self.budget.limits
        least = f"with the least that may stay, {floor / self.full:.3f} remain"
        why = f"target {kind}={self.budget.fraction:g} cannot be reached: {least}"
        if self.widths.held:
            return f"{why}; {len(self.widths.held)} groups are held by --keep"
        if limits.round_to > 1:
            return f"{why}; widths are multiples of {limits.round_to}"
        if limits.ratios[0] > 0 or limits.of:
            return f"{why}; groups have minimum ratios"
        frozen = sorted(self.combed.frozen(), key=lambda f: -f.indices)
        reasons = {reason: None for f in frozen for reason in f.reasons}
        return f"{why}; kept are: {'; '.join(list(reasons)[:3])}"


def _weights(work: WidthCost, counts: Sequence[int]) -> Floats:
    """How much the loss of each group counts where scores are no losses: by the work that is left in it.

    A group that runs through many layers, as a residual stage does, saves much and harms each of them and what they do
    together. So it counts more than they do by themselves.
    """
    fewer = np.asarray(counts) - np.eye(len(counts), dtype=np.int64)
    through = np.maximum(work(np.asarray([counts])) - work(fewer), 0.0) * counts
    return np.asarray((through / (through.mean() or 1.0)) ** _TOGETHER + _LEAST_WEIGHT)


def _outer_groups(combed: Combed) -> dict[int, list[tuple[int, ...]]]:
    """For each group the tuples of groups that stand before it in the composites of some weight axis.

    Where heads and head dimension share an axis, heads are outer: they take the wanted share, the rest follows.
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
    """An order in which each group comes after its outer ones, as far as there is one."""
    done: list[int] = []
    waiting = list(range(count))
    while waiting:
        known = set(done)
        ready = [i for i in waiting if all(o in known for group in outer[i] for o in group)] or waiting[:1]
        done += ready
        waiting = [i for i in waiting if i not in set(ready)]
    return done
