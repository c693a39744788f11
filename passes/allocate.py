"""Allocate: how many channels each group loses, and which, to meet a budget."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from cpd_onnx.atoms import NOTHING, Axis
from cpd_onnx.cost import CostModel, Costs, group_owners
from cpd_onnx.errors import TargetError
from cpd_onnx.groups import Combed
from cpd_onnx.kept import Kept
from cpd_onnx.passes.score import Scores, scorer_of
from cpd_onnx.state import State

KINDS = ("channels", "macs", "params")
SPREADS = ("uniform", "global")
_STEPS = 24
"""Halvings of the search interval: finer than any group's channels."""
_WIDE_KINDS = {"channels", "head_dim", "hidden"}
"""Kinds of groups whose width a multiple makes sense for; heads and groups are counts."""


@dataclass(frozen=True)
class Budget:
    """What may remain.

    Attributes:
        kind: "channels", "macs" or "params".
        fraction: of the original that may remain, 0 to 1.
        spread: "uniform" removes the same share from each group, "global" lets all channels compete.
        multiple: widths that remain are multiples of this, where a group has that many channels.
        keep: patterns (with * and ?) of groups, weights and nodes that are not touched.

    """

    kind: str = "channels"
    fraction: float = 0.5
    spread: str = "uniform"
    multiple: int = 1
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.kind not in KINDS:
            raise TargetError(f"no target is called {self.kind!r}: choose one of {', '.join(KINDS)}")
        if not 0 < self.fraction <= 1:
            raise TargetError(
                f"target {self.kind}={self.fraction:g}: give the fraction that may remain, above 0 up to 1"
            )
        if self.spread not in SPREADS:
            raise TargetError(f"no spread is called {self.spread!r}: choose one of {', '.join(SPREADS)}")
        if self.multiple < 1:
            raise TargetError(f"a width multiple of {self.multiple} makes no sense: give 1 or more")


@dataclass(frozen=True, eq=False)
class Allocation:
    """Which channels go.

    Attributes:
        removed: for each group the positions (in `Group.channels`) that go, sorted.
        before: costs of the original.
        after: costs of what remains.
        notes: what kept the target from being met exactly, if anything did.

    """

    removed: list[list[int]]
    before: Costs
    after: Costs
    notes: tuple[str, ...] = field(default=())

    def channels(self, combed: Combed) -> Axis:
        """The primitive atoms that go."""
        gone = [group.channels[removed] for group, removed in zip(combed.groups, self.removed, strict=True)]
        return np.concatenate([np.zeros(0, np.int64), *gone]).astype(np.int64)


def allocate(combed: Combed, scores: Sequence[Scores], budget: Budget, *, is_loss: bool = False) -> Allocation:
    """Choose the channels to remove, at least one stays in each group.

    Where all channels compete, they are ranked by their score over the mean of their group; or, if the scores estimate
    what the model loses with a channel, by the loss for what it saves.

    Raises TargetError if the budget cannot be met, with what stands in the way.
    """
    if not combed.groups:
        raise TargetError(f"nothing can be pruned in this model: {why_nothing(combed)}")
    return _Allocator(combed, scores, budget, is_loss=is_loss).run()


def why_nothing(combed: Combed) -> str:
    """The commonest reasons why a model has no prunable channels."""
    if not any(weight.is_trained and not weight.is_vector for weight in combed.weights):
        ops = ", ".join(combed.without_rule) or "its operators"
        return f"it has no weight matrices or kernels (operators without channels: {ops})"
    if combed.without_rule:
        return f"no rule for {', '.join(combed.without_rule)}"
    reasons = {reason: None for frozen in combed.frozen() for reason in frozen.reasons}
    return "; ".join(list(reasons)[:3]) or "all axes are fixed by its inputs and outputs"


@dataclass(frozen=True)
class Allocate:
    """Choose the channels that go; give one of `channels`, `macs`, `params` the fraction that may remain."""

    channels: float | None = None
    macs: float | None = None
    params: float | None = None
    spread: str = "uniform"
    multiple: int = 1
    keep: tuple[str, ...] = ()
    name: ClassVar[str] = "allocate"

    @property
    def budget(self) -> Budget:
        """The options as a budget; raises TargetError if they make none."""
        given = {kind: getattr(self, kind) for kind in KINDS if getattr(self, kind) is not None}
        if len(given) > 1:
            raise TargetError(f"give one target, not {' and '.join(given)}")
        kind, fraction = next(iter(given.items()), ("channels", 0.5))
        return Budget(kind, fraction, self.spread, self.multiple, tuple(self.keep))

    def __call__(self, state: State) -> State:
        """Fill in `allocation`."""
        budget = self.budget
        is_loss = bool(state.score) and scorer_of(state.score["score"]).is_loss
        allocation = allocate(state.need("combed", "comb"), state.need("scores", "score"), budget, is_loss=is_loss)
        words = {"kind": budget.kind, "target": budget.fraction, "spread": budget.spread}
        words |= {"multiple": budget.multiple, "keep": list(budget.keep)}
        return replace(state, allocation=allocation, budget=words | dict(state.score))


class _Allocator:
    def __init__(self, combed: Combed, scores: Sequence[Scores], budget: Budget, *, is_loss: bool) -> None:
        self.is_loss = is_loss
        self.combed, self.scores, self.budget = combed, list(scores), budget
        self.costs, self.kept = CostModel(combed), Kept(combed.atoms)
        self.before = self.costs.total(self.kept)
        self.held = held_groups(combed, budget.keep)
        self.sizes = [len(group) for group in combed.groups]
        self.order = [np.argsort(score, kind="stable") for score in self.scores]
        self.least_first = [g.channels[order] for g, order in zip(combed.groups, self.order, strict=True)]
        self.outer = _outer_groups(combed)
        self.sequence = _outer_first(self.outer, len(combed.groups))
        self.ranking = self.globally_ranked() if budget.spread == "global" else []

    def run(self) -> Allocation:
        target = self.budget.fraction * self.before.of(self.budget.kind)
        least = self.counts(0.0)
        floor = self.cost(least)
        tolerance = 0.02 * self.before.of(self.budget.kind)
        if floor > target + tolerance:
            raise TargetError(self.unreachable(floor))
        low, high = 0.0, 1.0
        few, many = least, self.counts(1.0)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            counts = self.counts(middle)
            if self.cost(counts) <= target:
                low, few = middle, counts
            else:
                high, many = middle, counts
            if few == many:
                break
        counts = self.between(few, many, target)
        if counts == self.sizes and self.budget.fraction < 1:
            raise TargetError(
                f"target {self.budget.kind}={self.budget.fraction:g} would remove nothing: the smallest step is larger"
            )
        reached = self.cost(counts)
        notes = []
        if abs(reached - target) > tolerance:
            share = reached / self.before.of(self.budget.kind)
            notes.append(f"{self.budget.kind}={share:.3f} is the nearest that whole channels allow")
        return self.result(counts, tuple(notes))

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
        if self.budget.spread == "global":
            return self.global_counts(ratio)
        kept = list(self.sizes)
        for index in self.sequence:
            if index in self.held:
                continue
            already = min(
                (np.prod([kept[o] / self.sizes[o] for o in outer]) for outer in self.outer[index]), default=1.0
            )
            share = min(1.0, ratio / float(already)) if already else 1.0
            kept[index] = self.rounded(index, share * self.sizes[index])
        return kept

    def rounded(self, index: int, wish: float) -> int:
        size, multiple = self.sizes[index], self.budget.multiple
        if multiple > 1 and self.combed.groups[index].kind in _WIDE_KINDS:
            if size <= multiple:
                return size
            wish = max(multiple, round(wish / multiple) * multiple)
        return int(min(size, max(1, round(wish))))

    def globally_ranked(self) -> list[int]:
        """Group of each channel, the least important channel first."""
        pairs = []
        for index, (score, order) in enumerate(zip(self.scores, self.order, strict=True)):
            if index not in self.held:
                unit = (self.price(index) if self.is_loss else float(score.mean())) or 1.0
                pairs += [(float(value) / unit, index) for value in score[order]]
        return [index for _, index in sorted(pairs)]

    def price(self, index: int) -> float:
        """What one channel of a group costs."""
        fewer = [size - (place == index and size > 1) for place, size in enumerate(self.sizes)]
        return self.before.of(self.budget.kind) - self.cost(fewer)

    def global_counts(self, ratio: float) -> list[int]:
        gone = np.bincount(self.ranking[: round((1 - ratio) * len(self.ranking))], minlength=len(self.sizes))
        kept = [size - int(g) for size, g in zip(self.sizes, gone, strict=True)]
        return [k if i in self.held else self.rounded(i, k) for i, k in enumerate(kept)]

    def removed(self, counts: Sequence[int]) -> list[list[int]]:
        return [sorted(order[: len(order) - n].tolist()) for order, n in zip(self.order, counts, strict=True)]

    def cost(self, counts: Sequence[int]) -> float:
        self.apply(counts)
        return self.costs.cost(self.budget.kind, self.kept)

    def apply(self, counts: Sequence[int]) -> None:
        gone = [channels[: len(channels) - n] for channels, n in zip(self.least_first, counts, strict=True)]
        self.kept.remove(np.concatenate(gone) if gone else np.zeros(0, np.int64))

    def result(self, counts: Sequence[int], notes: tuple[str, ...]) -> Allocation:
        self.apply(counts)
        return Allocation(self.removed(counts), self.before, self.costs.total(self.kept), notes)

    def unreachable(self, floor: float) -> str:
        kind, before = self.budget.kind, self.before.of(self.budget.kind)
        least = f"with the least that may stay, {floor / before:.3f} remain"
        why = f"target {kind}={self.budget.fraction:g} cannot be reached: {least}"
        if self.held:
            return f"{why}; {len(self.held)} groups are held by --keep"
        if self.budget.multiple > 1:
            return f"{why}; widths are multiples of {self.budget.multiple}"
        frozen = sorted(self.combed.frozen(), key=lambda f: -f.indices)
        reasons = {reason: None for f in frozen for reason in f.reasons}
        return f"{why}; kept are: {'; '.join(list(reasons)[:3])}"


def held_groups(combed: Combed, patterns: Sequence[str]) -> set[int]:
    """Groups that a keep pattern names, by their own name, a weight or a node."""
    owner = group_owners(combed, combed.groups)
    held = {g.id for g in combed.groups if _matches(g.name, patterns)}
    used = set()
    for weight in combed.weights if patterns else []:
        nodes = [u.use.scope.nodes[u.use.node] for u in weight.uses]
        names = [weight.name, *(n.name for n in nodes), *(o for n in nodes for o in n.output)]
        for pattern in patterns:
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                used.add(pattern)
                for axes in combed.weight_axes(weight):
                    held.update(i for axis in axes for i in owner[combed.atoms.parts(axis)].ravel().tolist())
    unused = [p for p in patterns if p not in used and not any(_matches(g.name, [p]) for g in combed.groups)]
    if unused:
        raise TargetError(f"--keep {unused[0]!r} matches no group, weight or node; see 'inspect' for their names")
    return held - {-1}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _outer_groups(combed: Combed) -> dict[int, list[tuple[int, ...]]]:
    """For each group the tuples of groups that stand before it in the composites of some weight axis.

    Where heads and head dimension share an axis, heads are outer: they take the wanted share, the rest follows.
    """
    owner = group_owners(combed, combed.groups)
    found: dict[int, set[tuple[int, ...]]] = {group.id: set() for group in combed.groups}
    for weight in combed.weights:
        for axes in combed.weight_axes(weight):
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
