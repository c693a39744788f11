"""Widths that meet a budget with the least total loss: a multiple-choice knapsack problem.

The loss is a sum over the groups, but the cost of a width depends on the widths of other groups (the cost of a
convolution is the product of two). So the cost is linearised around the current widths, and the resulting knapsack
problem is solved up to its last step (Sinha and Zoltners, The Multiple-Choice Knapsack Problem, Operations Research
1979). This is repeated around each solution, in steps small enough for the linearisation to hold, until there is no
improvement. A group that may vanish has the width 0 as well, which is within reach of all others: what it saves alone
is known exactly. Exchanges of one or two groups, evaluated at the true cost, then use up the rest of the budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Counts: TypeAlias = npt.NDArray[np.int64]
Cost: TypeAlias = Callable[[Counts], Floats]

_CHOICES = 16
"""Number of widths of a group that are considered at a time; later ones lie around the chosen one (heuristic)."""

_STEP = 0.85
"""Fraction of the current cost that remains after one step towards the target (heuristic)."""
_REACH = 2.0
"""Maximum factor by which a step changes a width, if the group has widths that near (heuristic)."""
_ROUNDS = 8
"""Maximum number of linearisations at the target (heuristic)."""
_EXCHANGES = 200
"""Maximum number of exchanges (heuristic)."""
_TRIED = 128
"""Maximum number of exchanges of two groups whose true cost is evaluated in one round, best first (heuristic)."""
_EPSILON = 1e-9
"""Smallest relative improvement that counts, well above the rounding error of float64."""


@dataclass(frozen=True, eq=False)
class _Problem:
    """A problem, with the choices of all groups in one row.

    Attributes:
        owner: Group of each choice.
        width: Width of each choice.
        harm: Loss of each choice.
        starts: Position of the first choice of each group.
        cost: Function from rows of widths to costs.
    """

    owner: Counts
    width: Counts
    harm: Floats
    starts: Counts
    cost: Cost

    def cost_of(self, chosen: Counts) -> float:
        """Return the cost of one choice for each group."""
        return float(self.cost(self.width[None, chosen])[0])

    def loss_of(self, chosen: Counts) -> float:
        """Return the total loss of one choice for each group."""
        return float(self.harm[chosen].sum())

    def moves(self, chosen: Counts) -> Floats:
        """Return the change of the cost for every choice, if its group alone takes it."""
        rows = np.repeat(self.width[None, chosen], len(self.width), axis=0)
        rows[np.arange(len(rows)), self.owner] = self.width
        return self.cost(rows) - self.cost_of(chosen)


def solve(widths: Sequence[Counts], loss: Sequence[Floats], cost: Cost, target: float) -> list[int]:
    """Return widths that cost at most `target` with a small total loss; the cheapest widths if none are that cheap.

    Args:
        widths: For each group its allowed widths, ascending.
        loss: For each group the loss at each of these widths, which is not negative and decreases with the width.
        cost: Function from rows of widths, with a column for each group, to costs; it increases with each width.
        target: Maximum cost.
    """
    least, most = ([int(w[place]) for w in widths] for place in (0, -1))
    for extreme, enough in ((most, True), (least, False)):
        if (float(cost(np.asarray([extreme]))[0]) <= target) == enough:
            return extreme
    scale = max(float(np.max(harm)) for harm in loss) or 1.0
    harms = [harm / scale for harm in loss]
    looked_at = [_spaced(0, len(w) - 1) for w in widths]
    found = [len(w) - 1 for w in widths]
    while True:
        problem = _problem(widths, harms, looked_at, cost)
        chosen = problem.starts + np.asarray(
            [int(np.searchsorted(at, place)) for at, place in zip(looked_at, found, strict=True)]
        )
        chosen = _polished(problem, _at_target(problem, _descended(problem, chosen, target), target), target)
        rows = list(zip(looked_at, (chosen - problem.starts).tolist(), strict=True))
        found = [int(at[row]) for at, row in rows]
        finer = [
            _spaced(int(at[max(row - 1, 0)]), int(at[min(row + 1, len(at) - 1)]), int(at[row])) for at, row in rows
        ]
        if all(np.isin(new, old).all() for new, old in zip(finer, looked_at, strict=True)):
            return [int(w[place]) for w, place in zip(widths, found, strict=True)]
        looked_at = finer


def _spaced(first: int, last: int, present: int | None = None) -> Counts:
    """Return evenly spaced integers from first to last, including both and the present one."""
    places = np.linspace(first, last, min(_CHOICES, last - first + 1)).round()
    return np.unique(np.append(places, first if present is None else present)).astype(np.int64)


def _problem(widths: Sequence[Counts], harms: Sequence[Floats], looked_at: Sequence[Counts], cost: Cost) -> _Problem:
    lengths = [len(at) for at in looked_at]
    return _Problem(
        np.repeat(np.arange(len(lengths)), lengths),
        np.concatenate([w[at] for w, at in zip(widths, looked_at, strict=True)]),
        np.concatenate([harm[at] for harm, at in zip(harms, looked_at, strict=True)]),
        np.cumsum([0, *lengths])[:-1],
        cost,
    )


def _descended(problem: _Problem, chosen: Counts, target: float) -> Counts:
    """Return a choice near the target, reached in steps small enough for the linearisation to hold."""
    while (now := problem.cost_of(chosen)) > target / _STEP:
        after = _linear(problem, chosen, _STEP * now)
        if problem.cost_of(after) >= now * (1 - _EPSILON):
            break
        chosen = after
    return chosen


def _at_target(problem: _Problem, chosen: Counts, target: float) -> Counts:
    """Return the best choice within the target that repeated linearisation finds."""
    best, limit = problem.starts, target
    if problem.cost_of(chosen) <= target:
        best = chosen
    least = problem.loss_of(best)
    for _ in range(_ROUNDS):
        after = _linear(problem, chosen, limit)
        cost, loss = problem.cost_of(after), problem.loss_of(after)
        if cost <= target and loss < least:
            best, least = after, loss
        settled = bool((after == chosen).all())
        if settled and cost <= target:
            break
        limit -= max(0.0, cost - target)
        chosen = after
    return best


def _linear(problem: _Problem, chosen: Counts, target: float) -> Counts:
    """Return a choice near the present one that is optimal, up to the last step, for the linearised cost.

    Starting at the cheapest widths, it takes the steps with the largest reduction of the loss per cost first. Only
    steps along the lower convex hull of a group's (cost, loss) points are considered, so that they come in order.
    """
    change = problem.moves(chosen)
    present = problem.width[chosen][problem.owner]
    width, now = (np.maximum(counts, 0.5) for counts in (problem.width, present))
    reach = (np.abs(np.log(width / now)) <= math.log(_REACH) + _EPSILON) | (problem.width == 0) | (present == 0)
    place = np.arange(len(problem.width)) - chosen[problem.owner]
    near = reach | (np.abs(place) <= 1)
    after = np.empty_like(chosen)
    steps: list[tuple[float, int, int, float]] = []
    for group, choices in enumerate(np.split(np.arange(len(near)), problem.starts[1:])):
        hull = _hull(choices[near[choices]].tolist(), change, problem.harm)
        after[group] = hull[0]
        for order, (low, high) in enumerate(itertools.pairwise(hull)):
            price = float(change[high] - change[low])
            spared = float(problem.harm[low] - problem.harm[high])
            steps.append((-spared / max(price, _EPSILON * target), order, high, price))
    room = target - problem.cost_of(chosen) - float(change[after].sum())
    full: set[int] = set()
    for _, _, high, price in sorted(steps):
        group = int(problem.owner[high])
        if group in full or price > room:
            full.add(group)
            continue
        after[group], room = high, room - price
    return after


def _hull(choices: Sequence[int], cost: Floats, harm: Floats) -> list[int]:
    """Return the choices on the lower convex hull, the cheapest first."""
    hull: list[int] = []
    for choice in sorted(choices, key=lambda c: (cost[c], harm[c])):
        if hull and harm[choice] >= harm[hull[-1]]:
            continue
        while len(hull) > 1 and _is_above(hull[-2], hull[-1], choice, cost, harm):
            hull.pop()
        hull.append(choice)
    return hull


def _is_above(first: int, middle: int, last: int, cost: Floats, harm: Floats) -> bool:
    """Return whether the middle of three choices is on or above the line through the others."""
    left = (harm[middle] - harm[first]) * (cost[last] - cost[first])
    return bool(left >= (harm[last] - harm[first]) * (cost[middle] - cost[first]))


def _polished(problem: _Problem, chosen: Counts, target: float) -> Counts:
    """Return the choice after exchanges of one or two groups that reduce the loss within the target."""
    for _ in range(_EXCHANGES):
        change = problem.moves(chosen)
        gain = problem.harm[chosen][problem.owner] - problem.harm
        room = target - problem.cost_of(chosen)
        better = np.flatnonzero((gain > _EPSILON) & (change <= room))
        if len(better):
            chosen = _moved(problem, chosen, int(better[np.argmax(gain[better])]))
            continue
        pair = _exchange(problem, chosen, change, gain, target)
        if pair is None:
            break
        chosen = pair
    return chosen


def _exchange(problem: _Problem, chosen: Counts, change: Floats, gain: Floats, target: float) -> Counts | None:
    """Return the choice with one group widened and another narrowed, None if no such pair reduces the loss.

    Pairs are filtered by a lower bound of their cost: the sum of both changes plus their product over the cost.
    """
    now = problem.cost_of(chosen)
    wider, narrower = np.flatnonzero(gain > _EPSILON), np.flatnonzero(change < 0)
    net = gain[wider][:, None] + gain[narrower][None, :]
    more, less = change[wider][:, None], change[narrower][None, :]
    fits = more + less + more * less / now <= target - now
    other = problem.owner[wider][:, None] != problem.owner[narrower][None, :]
    rows, columns = np.nonzero((net > _EPSILON) & fits & other)
    best = np.argsort(-net[rows, columns], kind="stable")[:_TRIED]
    if not len(best):
        return None
    pairs = [
        _moved(problem, _moved(problem, chosen, int(wider[row])), int(narrower[column]))
        for row, column in zip(rows[best], columns[best], strict=True)
    ]
    good = np.flatnonzero(problem.cost(problem.width[np.stack(pairs)]) <= target)
    return pairs[int(good[0])] if len(good) else None


def _moved(problem: _Problem, chosen: Counts, choice: int) -> Counts:
    after = chosen.copy()
    after[problem.owner[choice]] = choice
    return after
