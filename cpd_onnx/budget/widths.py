"""Allowed widths of groups: pinned groups, minimum and maximum ratios, multiples."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cpd_onnx.channels.groups import Combed, Group
from cpd_onnx.errors import TargetError
from cpd_onnx.options import RENAMED_FROM, Renaming

Counts: TypeAlias = npt.NDArray[np.int64]
Ratios: TypeAlias = tuple[float, float]
"""Minimum and maximum ratio of a group's channels that may survive."""

_COUNTED = {"heads", "groups", "experts"}
"""Kinds of groups whose size is a number of heads, groups or experts, not a width in channels."""


@dataclass(frozen=True)
class Limits(metaclass=Renaming):
    """Constraints on widths.

    Attributes:
        keep: Patterns (with * and ?) of groups, weights and nodes that are pinned: no channel of theirs is removed.
        round_to: Number of which surviving widths are multiples, where a group has that many channels.
        ratios: Minimum and maximum ratio of each group's channels that may survive.
        of: The same by pattern, which matches names of groups or, if it matches none, of weights and nodes; the last
            match takes precedence.
        at_most: Maximum width of each group, in order; empty for none.
        exactly: Width of single groups, as pairs of id and width.

    """

    keep: tuple[str, ...] = ()
    round_to: int = field(default=1, metadata={RENAMED_FROM: "multiple"})
    ratios: Ratios = field(default=(0.0, 1.0), metadata={RENAMED_FROM: "shares"})
    of: tuple[tuple[str, Ratios], ...] = ()
    at_most: tuple[int, ...] = ()
    exactly: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Check the values; raises TargetError."""
        if self.round_to < 1:
            raise TargetError(f"round_to must be at least 1, got {self.round_to}")
        for low, high in (self.ratios, *(ratios for _, ratios in self.of)):
            if not 0 <= low <= high <= 1 or high == 0:
                raise TargetError(f"ratios of a group must be from 0 to 1 and in order, got {low:g} to {high:g}")


@dataclass(frozen=True)
class Widths:
    """Allowed widths of all groups.

    Attributes:
        allowed: Ascending widths of each group, at least one.
        held: Pinned groups, by id.
        free: Groups with no minimum ratio, by id.
    """

    allowed: tuple[Counts, ...]
    held: frozenset[int]
    free: frozenset[int]

    @property
    def least(self) -> list[int]:
        """Smallest allowed width of each group."""
        return [int(widths[0]) for widths in self.allowed]

    @property
    def most(self) -> list[int]:
        """Largest allowed width of each group."""
        return [int(widths[-1]) for widths in self.allowed]

    def nearest(self, index: int, width: float) -> int:
        """Return the allowed width of a group nearest to a number; of two, that at the even index, as `round` does."""
        widths = self.allowed[index]
        place = int(np.searchsorted(widths, width))
        if place == 0 or place == len(widths):
            return int(widths[min(place, len(widths) - 1)])
        below, above = int(widths[place - 1]), int(widths[place])
        part = (width - below) / (above - below)
        return above if part > 0.5 or (part == 0.5 and place % 2) else below


def allowed_widths(combed: Combed, limits: Limits, multiples: Mapping[int, int] | None = None) -> Widths:
    """Return the allowed widths of all groups; `multiples` has further multiples for single groups, by id.

    Raises TargetError if a pattern matches nothing.
    """
    held = held_groups(combed, limits.keep)
    ratios = dict.fromkeys(range(len(combed.groups)), limits.ratios)
    for pattern, bounds in limits.of:
        named = {group.id for group in combed.groups if _matches(group.name, [pattern])}
        ratios |= dict.fromkeys(named or held_groups(combed, (pattern,), "--width"), bounds)
    allowed, exactly = [], dict(limits.exactly)
    free = {index for index, (low, _) in ratios.items() if low == 0} - held - exactly.keys()
    for group in combed.groups:
        if group.id in held:
            allowed.append(np.asarray([len(group)]))
            continue
        if group.id in exactly:
            allowed.append(np.asarray([exactly[group.id]]))
            continue
        multiple = limits.round_to if is_width(combed, group) else 1
        multiple = math.lcm(multiple, (multiples or {}).get(group.id, 1))
        widths = _between(len(group), multiple, ratios[group.id])
        allowed.append(_up_to(widths, limits.at_most[group.id]) if limits.at_most else widths)
    return Widths(tuple(allowed), frozenset(held), frozenset(free))


def is_width(combed: Combed, group: Group) -> bool:
    """Return whether multiples apply to a group: its size is not a number of heads or of groups of several channels."""
    if group.kind not in _COUNTED:
        return True
    return group.kind == "groups" and all(len(m.indices[0]) == 1 for m in combed.members(group))


def _between(size: int, multiple: int, ratios: Ratios) -> Counts:
    """Return the multiples within ratios of a size, and the size itself; the lower bound if there are none."""
    low = max(1, math.ceil(ratios[0] * size - 1e-9))
    high = max(low, math.floor(ratios[1] * size + 1e-9))
    first = -(-low // multiple) * multiple
    widths = [*range(first, min(high, size - 1) + 1, multiple), *([size] if high == size else [])]
    return np.asarray(widths or [low], np.int64)


def _up_to(widths: Counts, most: int) -> Counts:
    """Return the widths that are not above a bound; the bound itself if there are none."""
    found = widths[widths <= most]
    return found if len(found) else np.asarray([most], np.int64)


def held_groups(combed: Combed, patterns: Sequence[str], option: str = "--keep") -> set[int]:
    """Return the ids of groups whose name, or that of a weight or node they run through, matches a pattern.

    Raises TargetError, which names the option, if a pattern matches nothing.
    """
    owner, _ = combed.owners
    held = {g.id for g in combed.groups if _matches(g.name, patterns)}
    used = set()
    for weight in combed.weights if patterns else []:
        nodes = [u.use.scope.nodes[u.use.node] for u in weight.uses]
        names = [weight.name, *(n.name for n in nodes), *(o for n in nodes for o in n.output)]
        for pattern in patterns:
            if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                used.add(pattern)
                for axes in weight.axes:
                    held.update(i for axis in axes for i in owner[combed.atoms.parts(axis)].ravel().tolist())
    unused = [p for p in patterns if p not in used and not any(_matches(g.name, [p]) for g in combed.groups)]
    if unused:
        raise TargetError(f"{option} {unused[0]!r} matches no group, weight or node; see 'inspect' for their names")
    return held - {-1}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
