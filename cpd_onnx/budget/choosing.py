"""The allocator of a run: targets become a budget, the budget an allocation, and the allocation is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from cpd_onnx.budget import host
from cpd_onnx.budget.allocation import (
    Allocation,
    Budget,
    LossCurves,
    Prices,
    UnreachableError,
    allocate_at,
    why_nothing,
)
from cpd_onnx.budget.latency import CostTable, LatencyProbe
from cpd_onnx.budget.speed import SpeedCheck
from cpd_onnx.budget.targets import SLACK, Asked, Target, Targets, slack_of
from cpd_onnx.budget.timing import TOO_WIDE, allocate_measured, latency_notes, timed
from cpd_onnx.budget.widths import allowed_widths
from cpd_onnx.channels.alike import alike_groups
from cpd_onnx.channels.groups import Combed
from cpd_onnx.errors import TargetError
from cpd_onnx.scores.registry import Scores

_HALVINGS = 3
"""Maximum number of times that the multiples at which kernels are fast are halved to reach a target."""
_ABOVE, _SHARE_ABOVE = 0.02, 0.1
"""Distance from what is reachable, as a fraction of the original's cost and of what is reachable, the smaller of which
counts: there the nearest allocation is chosen, as the smallest widths of all groups would save little more and lose
much (heuristic)."""

_BELOW = 0.04
"""Deviation below the target, as a fraction of the original's cost, that whole blocks may have (heuristic)."""
_NEAR = 0.04
"""Deviation from the target, relative to it, from which groups that are alike get other widths (heuristic)."""
_WRONG = 2.0
"""Largest ratio of predicted and measured saving of latency that is believed, and its inverse the least (heuristic)."""
STEPS = "steps"
"""Entry of a plan's budget: where the multiples come from, if they were not given as a number."""
MEASURED = "measured"
"""Value of `STEPS` where widths follow a cost table that was measured; else it is `host.AUTO`."""
Allocate = Callable[[Budget, Prices], Allocation]
"""Allocates for a model and its scores."""


@dataclass(frozen=True, eq=False)
class Chooser:
    """Allocates under a budget, once in each round of pruning.

    Attributes:
        budget: The policy and the limits; its kind and fraction are the target if there are no `targets`.
        table: Predicts latencies; None for other targets.
        probe: Measures latencies; None to rely on the table.
        targets: The targets as they were asked for; None for those of the budget.
        nearest: Whether the nearest allocation is returned, with a note, if a target cannot be reached.
        check: Times the allocation of the last round for other targets than latency, and tries other widths if it is
            not faster than the original; None for no such check.
        block: Number of channels in a block of the processor, see `host.multiples`; 1 for widths of any number.
        is_measured: Whether the table was measured here, and is returned with the allocation.
        foreseen: Saving of latency that the table predicts, relative to the one that is measured, see `corrected`.
    """

    budget: Budget
    table: CostTable | None = None
    probe: LatencyProbe | None = None
    targets: Targets | None = None
    nearest: bool = False
    check: SpeedCheck | None = None
    block: int = 1
    is_measured: bool = False
    foreseen: float = 1.0

    @property
    def asked(self) -> Targets:
        """The targets."""
        return self.targets or Targets(tuple(Target(kind, fraction) for kind, fraction in self.budget.fractions))

    @property
    def quick(self) -> Chooser:
        """The allocator that neither measures nor fails, whose allocations are only compared with each other."""
        return replace(self, probe=None, check=None, nearest=True)

    def corrected(
        self, combed: Combed, scores: Sequence[Scores], progress: float = 1.0, *, is_loss: bool = False
    ) -> Chooser:
        """Return the allocator that knows by one measurement how far the cost table is from the truth.

        What it only compares (`quick`) is then as fast as what it measures, and its first measurement near the target.

        Args:
            combed: The model.
            scores: Scores of its groups.
            progress: Part of the way to the targets at which the latency is measured.
            is_loss: Whether the scores are losses.
        """
        if self.table is None or self.probe is None:
            return self
        chosen = replace(self.quick, foreseen=1.0)(combed, scores, progress, is_loss=is_loss)
        saved = 1 - timed(self.probe, chosen, self.table.ms, is_trusted=False)
        predicted = 1 - chosen.latency["predicted"]
        if min(saved, predicted) <= SLACK:
            return self
        return replace(self, foreseen=min(max(predicted / saved, 1 / _WRONG), _WRONG))

    def predicted(self, measured: float) -> float:
        """Return the latency, as a fraction of the original, that the table predicts where `measured` is measured."""
        return max(1 - (1 - measured) * self.foreseen, measured / _WRONG)

    def measured(self, predicted: float) -> float:
        """Return the latency, as a fraction of the original, measured where the table predicts `predicted`."""
        return 1 - (1 - predicted) / self.foreseen

    def aiming(self, targets: Targets) -> Chooser:
        """Return the allocator of other targets, of the same kinds."""
        return replace(self, targets=targets)

    def within(self, combed: Combed, larger: Allocation) -> Chooser:
        """Return the allocator of models that lack what a larger one lacks: those of the same scores are nested."""
        widths = [len(group) - len(gone) for group, gone in zip(combed.groups, larger.removed, strict=True)]
        limits = replace(self.budget.limits, at_most=tuple(widths))
        return replace(self, budget=replace(self.budget, limits=limits))

    def words(self, budget: Budget, chosen: Allocation) -> dict[str, Any]:
        """Return the budget of an allocation as the entries of a plan."""
        words = budget.as_words()
        if self.asked.plain is None:
            words["asked"] = list(map(str, self.asked))
        if self.table is None and (chosen.table is not None or chosen.round_to > 1):
            words |= {"round_to": chosen.round_to, STEPS: host.AUTO if chosen.table is None else MEASURED}
        return words | ({"latency": dict(chosen.latency)} if "target" in chosen.latency else {})

    def __call__(
        self,
        combed: Combed,
        scores: Sequence[Scores],
        progress: float = 1.0,
        *,
        is_loss: bool = False,
        curves: LossCurves | None = None,
    ) -> Allocation:
        """Choose the channels to remove; before the last round, that `progress` of them.

        Raises TargetError, which names the targets and what can be reached, if they cannot be.
        """
        if not combed.groups:
            raise TargetError(f"nothing can be pruned in this model: {why_nothing(combed)}")
        if self.table is None and self.asked.has_latency:
            raise ValueError("a latency target needs a cost table")
        run = _Run(self, combed, partial(_allocated, combed, scores, is_loss, curves))
        budget = run.resolved()
        found = run.chosen(budget.part(progress), is_last=progress == 1)
        if alike := alike_groups(combed):
            found = run.evened(budget.part(progress), found, alike, is_last=progress == 1)
        return replace(found, budget=self.words(budget, found))


def _allocated(
    combed: Combed,
    scores: Sequence[Scores],
    is_loss: bool,
    curves: LossCurves | None,
    budget: Budget,
    prices: Prices,
) -> Allocation:
    return allocate_at(prices, combed, scores, budget, is_loss=is_loss, curves=curves)


@dataclass(frozen=True, eq=False)
class _Run:
    """One allocation of a chooser."""

    chooser: Chooser
    combed: Combed
    allocate: Allocate
    known: dict[int, Prices] = field(default_factory=dict)

    def prices(self, table: CostTable | None = None, multiples: Mapping[int, int] | None = None) -> Prices:
        """Return all costs at the multiples of a table (default: that of the chooser), or at others."""
        table = self.chooser.table if table is None else table
        key = 0 if table is None else id(table.kernels)  # tables with finer widths have the same
        if key not in self.known:
            kinds = [target.kind for target in self.chooser.asked]
            self.known[key] = Prices(self.combed, kinds, stored_as=self.chooser.budget.stored_as, table=table)
        if multiples is None and table is not None:
            multiples = table.multiples(self.combed)
        return self.known[key].at(multiples)

    def resolved(self) -> Budget:
        """Return the budget with all targets as fractions of the original.

        Raises TargetError if the original meets absolute targets already.
        """
        prices, asked = self.prices(), self.chooser.asked
        found = [(target, target.fraction_of(prices.full(target.kind))) for target in asked]
        if all(fraction >= 1 and not target.is_fraction for target, fraction in found):
            has = ", ".join(str(target.asked(prices.full(target.kind), 1.0)) for target, _ in found)
            raise TargetError(f"the original meets {asked} already: it has {has}")
        found.sort(key=lambda pair: pair[0].kind != "latency")
        (first, fraction), *others = [(target.kind, min(1.0, fraction)) for target, fraction in found]
        is_limit = any(not target.is_fraction for target, _ in found)
        return replace(self.chooser.budget, kind=first, fraction=fraction, also=tuple(others), is_limit=is_limit)

    def chosen(self, budget: Budget, *, is_last: bool) -> Allocation:
        """Return the allocation; if the budget cannot be met, the nearest one if that is wanted."""
        try:
            found = self.within(budget, is_last=is_last)
        except UnreachableError as error:
            if not self.chooser.nearest:
                raise UnreachableError(self.refusal(error), error.floors, error.obstacle, error.nearest) from error
            found = error.nearest or self.within(_relaxed(budget, error.floors), is_last=is_last)
            found = replace(found, notes=(*found.notes, self.refusal(error)))
        table = self.chooser.table if self.chooser.is_measured else found.table
        return replace(found, asked=tuple(self.became(found)), table=table)

    def evened(
        self, budget: Budget, found: Allocation, alike: Sequence[tuple[int, ...]], *, is_last: bool
    ) -> Allocation:
        """Return the allocation of which groups that must be alike keep the same ratio, and others make up for it.

        That is the ratio nearest to those in `found` or, if it misses the target, one that comes nearer to it.
        """
        sizes = [len(group) for group in self.combed.groups]
        allowed = allowed_widths(self.combed, budget.limits).allowed
        choices: list[list[dict[int, int]]] = []
        for ids in alike:
            step = math.gcd(*(sizes[i] for i in ids))
            widths = ({i: count * sizes[i] // step for i in ids} for count in range(1, step + 1))
            choices.append([each for each in widths if all(width in allowed[i] for i, width in each.items())])
        choices = [each for each in choices if each]
        left = [size - len(gone) for gone, size in zip(found.removed, sizes, strict=True)]
        if all(any(all(left[i] == width for i, width in widths.items()) for widths in each) for each in choices):
            return found
        quick = replace(self, chooser=self.chooser.quick)
        known: dict[tuple[int, ...], float] = {}

        def at(places: tuple[int, ...]) -> Budget:
            pairs = (pair for each, place in zip(choices, places, strict=True) for pair in each[place].items())
            return replace(budget, limits=replace(budget.limits, exactly=tuple(pairs)))

        def apart(places: tuple[int, ...]) -> float:
            if places not in known:
                made = quick.chosen(at(places), is_last=is_last)
                known[places] = max((abs(one.got / one.asked - 1) for one in made.asked), default=0.0)
            return known[places]

        def nearest(each: list[dict[int, int]]) -> int:
            distances = [sum(abs(width - left[i]) / sizes[i] for i, width in widths.items()) for widths in each]
            return distances.index(min(distances))

        here = tuple(map(nearest, choices))
        while apart(here) > _NEAR:
            moves = [
                (*here[:number], place, *here[number + 1 :])
                for number, each in enumerate(choices)
                for place in (here[number] - 1, here[number] + 1)
                if 0 <= place < len(each)
            ]
            best = min(moves, key=apart, default=here)
            if apart(best) >= apart(here):
                break
            here = best
        return self.chosen(at(here), is_last=is_last)

    def within(self, budget: Budget, *, is_last: bool) -> Allocation:
        """Return the allocation within a budget."""
        chooser = self.chooser
        if chooser.table is not None and budget.kind == "latency":
            first = chooser.predicted(budget.fraction)
            if chooser.probe is not None:
                return allocate_measured(self.at_fast_widths, budget, chooser.table, chooser.probe, first)
            try:
                found = self.at_fast_widths(replace(budget, fraction=first), chooser.table)
            except UnreachableError as error:
                floors = {**error.floors, "latency": chooser.measured(error.floors["latency"])}
                raise UnreachableError(str(error), floors, error.obstacle) from error
            found = replace(found, latency={**found.latency, "target": budget.fraction})
            return replace(found, notes=(*found.notes, *latency_notes(found, chooser.table)))
        found = self.at_blocks(budget)
        if chooser.check is None or not is_last:
            return found

        def choose(multiples: Mapping[int, int] | None, table: CostTable | None, latency: float | None) -> Allocation:
            wanted = budget if latency is None else replace(budget, also=(*budget.also, ("latency", latency)))
            return self.allocate(wanted, self.prices(table, multiples))

        return chooser.check(self.combed, found, choose)

    def at_fast_widths(self, budget: Budget, table: CostTable) -> Allocation:
        """Allocate at widths where kernels are fast or, if these cannot reach the target, at finer ones."""
        for halvings in range(_HALVINGS):
            try:
                found = self.allocate(budget, self.prices(table.finer(halvings)))
            except TargetError:
                continue
            return replace(found, notes=(*found.notes, *([TOO_WIDE] if halvings else [])))
        return self.allocate(budget, self.prices(table.finer(_HALVINGS)))

    def at_blocks(self, budget: Budget) -> Allocation:
        """Allocate at multiples of the processor's blocks or, if these are too coarse for the target, at finer ones."""
        block = self.chooser.block
        while block > 1:
            multiples = host.multiples(self.combed, block)
            if max(multiples.values()) == 1:
                break
            prices = self.prices(None, multiples)
            with suppress(TargetError):
                found = self.allocate(budget, prices)
                left = prices.cost(budget.kind, found.keep_mask(self.combed)) / prices.full(budget.kind)
                if budget.also or -_BELOW <= left - budget.fraction <= slack_of(budget.fraction):
                    return replace(found, round_to=block)
            block //= 2
        return self.allocate(budget, self.prices())

    def became(self, found: Allocation) -> Iterator[Asked]:
        """Yield what was reached of each target."""
        prices, kept = self.prices(), found.keep_mask(self.combed)
        for target in self.chooser.asked:
            full = prices.full(target.kind)
            got = prices.cost(target.kind, kept)
            if target.kind == "latency" and "measured" in found.latency:
                got = found.latency["measured"] * full
            elif target.kind == "latency" and "predicted" in found.latency:
                got = self.chooser.measured(found.latency["predicted"]) * full
            yield target.asked(got, full)

    def refusal(self, error: UnreachableError) -> str:
        """Return that the targets cannot be reached, and what can be of each."""
        prices = self.prices()
        floors = []
        for target in self.chooser.asked:
            if target.kind in error.floors:
                full = prices.full(target.kind)
                floors.append(target.asked(error.floors[target.kind] * full, full))
        missed = [str(floor) for floor in floors if not floor.is_met] or list(map(str, floors))
        least = "the nearest that was measured" if error.nearest else "at the smallest allowed widths, what remains"
        return f"target {self.chooser.asked} cannot be reached: {least} is {' and '.join(missed)}; {error.obstacle}"


def _relaxed(budget: Budget, floors: Mapping[str, float]) -> Budget:
    """Return the budget with the fractions that cannot be reached raised to slightly above what can be."""
    fractions = []
    for kind, fraction in budget.fractions:
        reachable = floors.get(kind, 0.0)
        nearest = min(1.0, reachable + min(_ABOVE, _SHARE_ABOVE * reachable))
        fractions.append((kind, fraction if reachable <= fraction else nearest))
    return replace(budget, fraction=fractions[0][1], also=tuple(fractions[1:]))
