"""Allocation: how many channels, and which, are removed from each group to meet a budget."""

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
"""Names and fields of the costs that a summary shows."""
KINDS = ("channels", "macs", "params", "bytes", "latency")
"""Kinds of targets."""
POLICIES = ("uniform", "global", "isomorphic", "optimal")
"""Allocation policies, see `Budget`."""
_STEPS = 24
"""Number of bisections of the ratio: their resolution of 2^-24 is finer than one channel of any group."""
_TOLERANCE = 0.02
"""Deviation from the target, as a fraction of the original's cost, above which a note is made (heuristic)."""
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
_ROUNDS = 8
"""Maximum number of allocations that are measured for a latency target (heuristic)."""
_MORE = 0.04
"""Increase of the requested fraction while the cost table predicts that it cannot be reached (heuristic)."""
_NEAR = 0.02
"""Relative deviation from the target at which a measured latency is accepted (heuristic)."""
_HALVINGS = 3
"""Maximum number of times that the multiples at which kernels are fast are halved to reach a target."""
_TOO_WIDE = "the target cannot be reached at the widths where kernels are fast: finer widths were chosen"
_SECONDS, _TIMED_ROUNDS = 2.0, 40
"""Minimum duration in seconds, and number of rounds, of a measurement of latency (heuristic)."""
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

    """

    kind: str = "channels"
    fraction: float = 0.5
    policy: str = field(default="uniform", metadata={RENAMED_FROM: "spread"})
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Check the values; raises TargetError."""
        if self.kind not in KINDS:
            raise TargetError(f"unknown target {self.kind!r}: choose one of {', '.join(KINDS)}")
        if not 0 < self.fraction <= 1:
            raise TargetError(
                f"the target must be the fraction that may remain, above 0 up to 1, got {self.kind}={self.fraction:g}"
            )
        if self.policy not in POLICIES:
            raise TargetError(f"unknown policy {self.policy!r}: choose one of {', '.join(POLICIES)}")

    def as_words(self) -> dict[str, Any]:
        """Return the budget as the entries of a plan."""
        limits = self.limits
        words: dict[str, Any] = {"kind": self.kind, "target": self.fraction, "policy": self.policy}
        words |= {"round_to": limits.round_to, "keep": list(limits.keep)}
        if limits.ratios != Limits.ratios:
            words["ratios"] = list(limits.ratios)
        return words | ({"widths": {name: list(ratios) for name, ratios in limits.of}} if limits.of else {})


@dataclass(frozen=True, eq=False)
class LossCurves:
    """Loss of the model as a function of the number of channels removed from each group.

    Attributes:
        loss: For each group an array with, at index r = 0 … size - 1, the loss without its r least important channels.
            It starts at 0 and never decreases. Losses of different groups are comparable.
    """

    loss: tuple[Floats, ...]

    def check(self, combed: Combed) -> None:
        """Raise ValueError unless there is a valid curve for each group."""
        if [len(curve) for curve in self.loss] != [len(group) for group in combed.groups]:
            raise ValueError("a loss curve must have one number for each of 0 … size - 1 removed channels")
        if any(curve[0] != 0 or bool((np.diff(curve) < 0).any()) for curve in self.loss):
            raise ValueError("a loss curve must start at 0 and never decrease")


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


@dataclass(frozen=True, eq=False, repr=False)
class Allocation(Summarised):
    """The channels to remove.

    Attributes:
        removed: For each group the sorted positions (in `Group.channels`) of the removed channels.
        before: Costs of the original.
        after: Costs of what remains.
        notes: Remarks on a target that was not met exactly, and on measurements.
        latency: For a latency target, the requested, the predicted and, unless a cost table was given, the measured
            ratio to the original's latency.

    """

    removed: list[list[int]]
    before: Costs
    after: Costs
    notes: tuple[str, ...] = field(default=())
    latency: Mapping[str, float] = field(default_factory=dict)

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


def allocate(
    combed: Combed,
    scores: Sequence[Scores],
    budget: Budget,
    *,
    is_loss: bool = False,
    curves: LossCurves | None = None,
    table: CostTable | None = None,
) -> Allocation:
    """Choose the channels to remove; at least one of each group survives.

    Policies that rank channels use the score relative to the mean of the group or, if scores are losses, the loss per
    cost saved. The policy "optimal" uses `curves`, by default the `loss_curves` of the scores. Latency is predicted by
    `table`.

    Raises TargetError, which names the obstacle, if the budget cannot be met.
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
    """Allocate for a latency target, measure the result beside the original, correct the request, and repeat.

    Returns the allocation whose measured latency is nearest to the target. If the table predicts that the target cannot
    be reached, a larger fraction is requested first; from then on the time that the table takes for constant is assumed
    to shrink with the model.

    Args:
        choose: `allocate` with all arguments but budget and table.
        budget: The budget, of kind "latency".
        table: Predicts latencies.
        probe: Measures latencies.

    Raises TargetError if the target cannot be reached.
    """
    request, tried = budget.fraction, list[tuple[float, float]]()
    best: Allocation | None = None
    refused: TargetError | None = None
    predictor = table
    while len(tried) < _ROUNDS and request <= 1:
        try:
            chosen = choose(replace(budget, fraction=request), predictor)
        except TargetError as error:
            refused = refused or error
            if best is None:
                request += _MORE
                continue
            if predictor is not table:
                break
            predictor, request, tried = table.loosened(probe.combed), budget.fraction, []
            continue
        measured = probe.ratio(chosen.channels(probe.combed), max(_SECONDS, _TIMED_ROUNDS * 1.5e-3 * table.ms))
        chosen = replace(chosen, latency={**chosen.latency, "target": budget.fraction, "measured": measured})
        if best is None or _miss(chosen) < _miss(best):
            best = chosen
        if _miss(chosen) <= _NEAR:
            break
        tried.append((request, measured))
        request = _next_request(tried, budget.fraction)
    if refused is not None and (best is None or best.latency["measured"] > budget.fraction + _TOLERANCE):
        raise refused
    assert best is not None
    return replace(best, notes=(*(n for n in best.notes if n == _TOO_WIDE), *_latency_notes(best, table)))


def _next_request(tried: Sequence[tuple[float, float]], target: float) -> float:
    """Return the fraction to request next, by the secant through the two (request, measurement) pairs nearest to it."""
    near = sorted(tried, key=lambda pair: abs(pair[1] - target))[:2]
    request, measured = near[0]
    slope = measured / request
    if len(near) > 1 and near[0][0] != near[1][0]:
        slope = (measured - near[1][1]) / (request - near[1][0])
    slope = min(max(slope, 0.5), 2.0)
    return min(1.0, max(request + (target - measured) / slope, request / 2))


def _miss(chosen: Allocation) -> float:
    """Return the relative deviation of the measured latency from the target."""
    return abs(chosen.latency["measured"] / chosen.latency["target"] - 1)


def _latency_notes(chosen: Allocation, table: CostTable) -> Iterator[str]:
    found, setting = chosen.latency, table.setting
    where = f"onnxruntime, {setting.provider}, threads: {setting.threads}"
    if "measured" not in found:
        yield f"latency {found['predicted']:.3f} by the cost table ({where}), not measured here"
    else:
        yield f"latency {found['measured']:.3f} measured ({where}), {found['predicted']:.3f} predicted"
        if _miss(chosen) > _TOLERANCE:
            yield f"latency={found['measured']:.3f} is the nearest to {found['target']:g} that was found"
    if table.unattributed > _TOLERANCE:
        yield f"{table.unattributed:.0%} of the time is in kernels not present at all widths: it is taken for constant"


def why_nothing(combed: Combed) -> str:
    """Return the commonest reasons why a model has no prunable channels."""
    if not any(weight.is_trained and not weight.is_vector for weight in combed.weights):
        ops = ", ".join(combed.without_rule) or "its operators"
        return f"it has no weight matrices or kernels (operators without channels: {ops})"
    if combed.without_rule:
        return f"no rule for {', '.join(combed.without_rule)}"
    reasons = {reason: None for frozen in combed.frozen() for reason in frozen.reasons}
    return "; ".join(list(reasons)[:3]) or "all axes are fixed by its inputs and outputs"


@dataclass(frozen=True, eq=False)
class Chooser:
    """Allocates under a budget, once in each round of pruning.

    Attributes:
        budget: The budget.
        table: Predicts latencies; None for other targets.
        probe: Measures latencies; None to rely on the table.
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
        """Choose the channels to remove; `fraction` replaces that of the budget."""
        budget = self.budget if fraction is None else replace(self.budget, fraction=fraction)

        if self.table is None:
            return allocate(combed, scores, budget, is_loss=is_loss, curves=curves)

        def choose(wanted: Budget, table: CostTable) -> Allocation:
            """Allocate at widths where kernels are fast or, if these cannot reach the target, at finer ones."""
            for halvings in range(_HALVINGS):
                with contextlib.suppress(TargetError):
                    finer = table.finer(halvings)
                    found = allocate(combed, scores, wanted, is_loss=is_loss, curves=curves, table=finer)
                    return replace(found, notes=(*found.notes, *([_TOO_WIDE] if halvings else [])))
            return allocate(combed, scores, wanted, is_loss=is_loss, curves=curves, table=table.finer(_HALVINGS))

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
            self.full = min(self.full, table.ms)  # time that the fit adds at full width cannot be saved
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
        """Return the widths with the least total loss."""
        curves = self.curves or loss_curves(self.scores, is_loss=self.is_loss)
        allowed, follows = self.widths.allowed, self.curves is None and not self.is_loss
        cost, limit, counts = self.costs.in_widths(self.budget.kind), target, self.sizes
        work = self.costs.in_widths("macs") if self.budget.kind == "latency" else cost
        weights = _weights(work, counts) if follows else np.ones(len(counts))
        for _ in range(_CORRECTIONS):
            loss = [
                weight * curve[size - widths]
                for weight, curve, size, widths in zip(weights, curves.loss, self.sizes, allowed, strict=True)
            ]
            before, counts = counts, solve(allowed, loss, cost, limit)
            over = self.cost(counts) - target
            if over <= 0.1 * _TOLERANCE * self.full and (not follows or counts == before):
                break
            limit -= max(0.0, over)
            if follows:
                weights = (weights + _weights(work, counts)) / 2
        return counts

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
        return above if nearer_above else below

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
        least = f"at the smallest allowed widths, {floor / self.full:.3f} remains"
        why = f"target {kind}={self.budget.fraction:g} cannot be reached: {least}"
        if self.widths.held:
            return f"{why}; {len(self.widths.held)} groups are pinned by --keep"
        if limits.round_to > 1:
            return f"{why}; widths are multiples of {limits.round_to}"
        if limits.ratios[0] > 0 or limits.of:
            return f"{why}; groups have minimum ratios"
        frozen = sorted(self.combed.frozen(), key=lambda f: -f.indices)
        reasons = {reason: None for f in frozen for reason in f.reasons}
        return f"{why}; not prunable: {'; '.join(list(reasons)[:3])}"


def _weights(work: WidthCost, counts: Sequence[int]) -> Floats:
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
