"""Grouped convolutions whose groups lose different channels: as many from each, though not the same ones.

Usually, the channels at one place of all groups are coupled, since they share a column of the weight. That is too much
after a channel shuffle that deals unequal numbers of each group's channels to the groups of the next convolution: it
couples all channels with each other. There, each group may lose channels of its own. The rows of the weight that belong
to a group then lose columns of their own, and all groups must keep the same number of channels.

Channels that a shuffle, a residual connection or another convolution has coupled are joined to sets, each of which has
the same number of channels in each group of each of these convolutions, and which are coupled. Whichever sets are
removed, all groups stay equal. With 5 channels in each of 3 groups, the shuffle deals (2, 2, 1), (2, 1, 2) and
(1, 2, 2) of them to the next 3 groups; the channels at the places 0, 2 and 4 of each group are one set, those at 1 and
3 the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cpd_onnx.algebra.atoms import NOTHING, Atoms, Axis
from cpd_onnx.algebra.reasons import Reason
from cpd_onnx.channels.groups import Combed, Swept
from cpd_onnx.rules.api import WHOLE, rows_and_columns

_STARTS = 16
"""Maximum number of channels from which a set is searched; the smallest of the sets found is taken (heuristic)."""
_NEEDED = "needs equally many channels in each of its groups"
"""Reason for freezing channels that belong to no set."""
Counts: TypeAlias = npt.NDArray[np.int64]


def merged_convolutions(combed: Combed) -> Iterator[frozenset[tuple[str, int]]]:
    """Yield sets of grouped convolutions with a group in which channels are coupled, or frozen for that reason.

    First those with such input channels; then those with such input or output channels.
    """
    known = combed.recorder.grouped
    inputs, outputs = (
        {node for node, (*sides, groups) in known.items() if _is_merged(combed.atoms, sides[side], groups)}
        for side in (0, 1)
    )
    if inputs:
        yield frozenset(inputs)
    if not outputs <= inputs:
        yield frozenset(inputs | outputs)


def _is_merged(atoms: Atoms, axis: Axis, groups: int) -> bool:
    """Return whether channels of the same group of a convolution are coupled, or frozen for that reason."""
    frozen = axis[atoms.is_frozen(axis)]
    if any(reason.text.endswith(WHOLE) for reason in atoms.reasons(frozen)):
        return True
    for fates in atoms.canonical(axis).reshape(groups, -1):
        live = fates[fates != NOTHING]
        if len(np.unique(live)) < len(live):
            return True
    return False


def is_finer(combed: Combed, other: Combed) -> bool:
    """Return whether more weights of a model lie on a prunable axis than by another analysis, or more channels do."""
    here, there = ((c.prunable_fraction(), sum(map(len, c.groups))) for c in (combed, other))
    return here > there


def balance(swept: Swept) -> bool:
    """Couple channels so that each set takes as many from all blocks of `Recorder.balanced`; return whether any was."""
    atoms = swept.atoms
    before = [atoms.parts(axis) for axis, _, _ in swept.recorder.balanced]
    _couple_unknown(swept)
    for axis, _, node in swept.recorder.balanced:
        _free_of_composites(atoms, axis, Reason("operator", node, _NEEDED))
    for channels, counts, node in _components(swept):
        left = np.ones(len(channels), np.bool_)
        for chosen in balanced_sets(counts):
            left[chosen] = False
            atoms.unite(channels[chosen[:-1]], channels[chosen[1:]])
        if left.any():
            atoms.freeze(channels[left], Reason("operator", node, _NEEDED))
    after = (atoms.parts(axis) for axis, _, _ in swept.recorder.balanced)
    return not all(np.array_equal(old, new) for old, new in zip(before, after, strict=True))


def _couple_unknown(swept: Swept) -> None:
    """Couple the blocks of entries of `Recorder.divided` that are no stored weight's: all lose the same columns."""
    known = {rows_and_columns(axes) for weight in swept.weights for axes in weight.axes if len(axes) > 1}
    for key, blocks in swept.recorder.divided.items():
        for block in blocks[1:] if key not in known else ():
            swept.atoms.unite(blocks[0], block)


def _free_of_composites(atoms: Atoms, axis: Axis, reason: Reason) -> None:
    """Freeze all parts of each composite index but one, those that are part of most indices.

    Such a part is a whole group of another convolution, of which no group takes an equal share.
    """
    while (parts := atoms.parts(axis)).shape[1] > 1 and (is_composite := parts[:, 1] != NOTHING).any():
        primitives, inverse, uses = np.unique(parts, return_inverse=True, return_counts=True)
        uses = np.where(primitives == NOTHING, 0, uses)[inverse.reshape(parts.shape)]
        widest = np.take_along_axis(parts, uses.argmax(axis=1)[:, None], axis=1)[:, 0]
        atoms.freeze(widest[is_composite], reason)


def _components(swept: Swept) -> Iterator[tuple[Axis, Counts, str]]:
    """Yield the channels that are to be balanced together, how many of each lie in each block, and the first node.

    The counts are those beyond the mean of the blocks, times their number, so that a balanced set has the sum zero.
    """
    rows = [swept.atoms.parts(axis)[:, 0] for axis, _, _ in swept.recorder.balanced]
    known = np.unique(np.concatenate([np.zeros(1, np.int64), *rows]))
    tables: dict[bytes, tuple[Counts, str]] = {}
    for primitives, (axis, blocks, node) in zip(rows, swept.recorder.balanced, strict=True):
        table = np.zeros((len(known), blocks), np.int64)
        np.add.at(table, (np.searchsorted(known, primitives), np.repeat(np.arange(blocks), len(axis) // blocks)), 1)
        table[0] = 0  # of NOTHING, the smallest
        tables.setdefault(table.tobytes(), (table, node))
    waiting = list(tables.values())
    while waiting:
        taken, grown, live = [waiting.pop(0)], True, np.zeros(len(known), np.bool_)
        while grown:
            live |= np.any([table.any(axis=1) for table, _ in taken], axis=0)
            meets = [bool((table.any(axis=1) & live).any()) for table, _ in waiting]
            grown = any(meets)
            taken += [each for each, met in zip(waiting, meets, strict=True) if met]
            waiting = [each for each, met in zip(waiting, meets, strict=True) if not met]
        if live.any():
            excess = [table.shape[1] * table - table.sum(axis=1, keepdims=True) for table, _ in taken]
            yield known[live], np.concatenate(excess, axis=1)[live], taken[0][1]


def balanced_sets(vectors: Counts) -> list[list[int]]:
    """Return disjoint sets of vectors, by index, each of which has the sum zero: small ones, as many as are found.

    The vectors of a set are added one by one, always the one that makes the sum smallest; where a sum occurs for the
    second time, the vectors added since then are a set.

    >>> balanced_sets(np.asarray([[2, -2], [0, 0], [-1, 1], [-1, 1], [1, -1]]))
    [[1], [2, 4]]
    """
    kinds, kind_of = np.unique(vectors, axis=0, return_inverse=True)
    waiting = [np.flatnonzero(kind_of.ravel() == kind).tolist() for kind in range(len(kinds))]
    order = sorted(range(len(kinds)), key=lambda kind: waiting[kind][0])
    kinds, waiting = kinds[order], [waiting[kind] for kind in order]
    found: list[list[int]] = []
    while (uses := _smallest_set(kinds, np.asarray(list(map(len, waiting))))) is not None:
        for _ in range(min(len(waiting[kind]) // uses[kind] for kind in np.flatnonzero(uses).tolist())):
            found.append(sorted(waiting[kind].pop(0) for kind in np.repeat(np.arange(len(uses)), uses).tolist()))
    return sorted(found)


def _smallest_set(kinds: Counts, available: Counts) -> Counts | None:
    """Return how many vectors of each kind form the smallest set found; None if there is none."""
    starts = np.flatnonzero(available)[:_STARTS].tolist()
    sets = [uses for start in starts if (uses := _set_from(kinds, available, start)) is not None]
    return min(sets, key=lambda uses: int(uses.sum()), default=None)


def _set_from(kinds: Counts, available: Counts, start: int) -> Counts | None:
    left, total = available.copy(), np.zeros(kinds.shape[1], np.int64)
    steps: list[int] = []
    seen = {total.tobytes(): 0}
    kind = start
    while True:
        left[kind] -= 1
        total = total + kinds[kind]
        steps.append(kind)
        first = seen.setdefault(total.tobytes(), len(steps))
        if first < len(steps):
            return np.bincount(steps[first:], minlength=len(kinds))
        candidates = np.flatnonzero(left)
        if not len(candidates):
            return None
        sizes = np.square(total + kinds[candidates]).sum(axis=1)
        kind = int(candidates[int(np.argmin(sizes))])
