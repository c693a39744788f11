"""Atoms: which indices of which axes must be removed together.

Every axis of every tensor carries one *atom* per index. An atom is *primitive* (a free channel), *composite*
(an ordered tuple of primitives, removed if and only if any part is removed: an index of an axis merged from heads and
head dimension) or *frozen* (never removed, with a reason).

>>> atoms = Atoms()
>>> conv1, conv2 = atoms.fresh(3), atoms.fresh(3)
>>> atoms.unite(conv1, conv2)
>>> bool((atoms.find(conv1) == atoms.find(conv2)).all())
True
>>> heads, dims = atoms.fresh(2), atoms.fresh(2)
>>> atoms.parts(atoms.product(heads, dims)).shape
(4, 2)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cpd_onnx.algebra.reasons import Reason

Axis: TypeAlias = npt.NDArray[np.int64]
"""The atoms of an axis, one per index; do not write into it.

A plain array, so that rules slice, concatenate and compare axes with numpy. The identity of an axis is its atoms: a
copy is the same axis, and caches are keyed by `fingerprint`. An axis of a single atom (`is_uniform`) should be built
with `uniform`, which stores the atom once.
"""
Mask: TypeAlias = npt.NDArray[np.bool_]
"""One truth value per index of an axis."""
Fingerprint: TypeAlias = tuple[int, bytes]
"""Dictionary key of an axis, as `fingerprint` computes it."""

NOTHING = 0
"""Padding of a row of parts: a frozen atom whose reason is not reported."""

_WIDTH = 6
"""Maximum number of parts of a composite atom, a heuristic; further parts are united with the last one, which is
coarser and still sound."""

_MOST_BYTES = 1 << 30
"""Limit on the memory of indices followed one by one, in bytes (1 GiB, a heuristic); one axis may take a quarter of
it."""
_INDEX_BYTES, _ATOM_BYTES, _COMPOSITE_BYTES = 8, 33, 128
"""Bytes per index of a copied axis, per new primitive atom, and per new composite atom: sizes of the array entries
below, rounded up for composites."""


class Atoms:
    """A union-find over atoms, vectorised over whole axes.

    Methods take and return integer arrays of atom numbers, one per index of an axis.
    """

    def __init__(self) -> None:
        """Create the structure with its one permanent atom, `NOTHING`."""
        self._size = 0
        self._parent: Axis = np.zeros(1024, np.int64)
        self._row: Axis = np.zeros(1024, np.int64)
        self._frozen: Mask = np.zeros(1024, np.bool_)
        self._rows = 0
        self._parts: Axis = np.zeros((256, _WIDTH), np.int64)
        self._origin: Axis = np.zeros(1024, np.int64)
        self._origins = 0
        self._known: dict[Fingerprint, Axis] | None = None
        self._reasons: dict[Reason, int] = {}
        self._frozen_axes: dict[tuple[int, int], Axis] = {}
        self._bytes = 0
        self._texts: dict[int, Reason] = {NOTHING: Reason("structure", "", "of size one")}
        self._allocate(1)
        self._frozen[NOTHING] = True

    def __len__(self) -> int:
        """Return the number of atoms allocated so far."""
        return self._size

    def fresh(self, count: int, *, may_vanish: bool = False) -> Axis:
        """Return an axis of `count` new primitive atoms; a single one is frozen unless its axis may vanish.

        Raises ValueError if the count is negative, TypeError if it is not an integer.
        """
        if operator.index(count) < 0:
            raise ValueError(f"count must be at least 0, got {count}")
        if count == 1 and not may_vanish:
            return np.zeros(1, np.int64)
        return self._allocate(count) if self._has_room(count, _ATOM_BYTES) else self._too_long(count)

    def frozen(self, count: int, reason: Reason) -> Axis:
        """Return a frozen axis of `count` indices; the same array for the same reason."""
        key = (count, self.reason_atom(reason))
        if key not in self._frozen_axes:
            self._frozen_axes[key] = uniform(key[1], count)
        return self._frozen_axes[key]

    def freeze(self, axis: Axis, reason: Reason) -> None:
        """Freeze all indices of an axis, the parts of composites included."""
        table = self.parts(axis)
        table = table[:1] if is_uniform(axis) else table
        live = table[table != NOTHING]
        self._changed()
        self._parent[live] = self.reason_atom(reason)

    def reason_atom(self, reason: Reason) -> int:
        """Return the frozen atom that carries `reason`."""
        if reason not in self._reasons:
            atom = int(self._allocate(1)[0])
            self._frozen[atom] = True
            self._reasons[reason] = atom
            self._texts[atom] = reason
        return self._reasons[reason]

    def is_frozen(self, axis: Axis) -> Mask:
        """Return which indices of an axis are frozen."""
        return np.asarray(self.parts(axis)[:, 0] == NOTHING)

    def all_frozen(self, axis: Axis) -> bool:
        """Return whether all indices of an axis are frozen."""
        axis = axis[:1] if is_uniform(axis) else axis
        if not len(axis):
            return True
        # The first index decides for most axes.
        first = self._parent[axis[0]]
        if not self._frozen[self._parent[first]] and not self._row[first] and self._parent[first] == first:
            return False
        roots = self.find(axis)
        if self._frozen[roots].all():
            return True
        return bool(self._row[roots].any()) and bool(self.is_frozen(axis).all())

    def reasons(self, axis: Axis) -> list[Reason]:
        """Return the distinct reasons why indices of an axis are frozen."""
        roots = self._root_parts(axis[:1] if is_uniform(axis) else axis)
        frozen = roots[self._frozen[roots] & (roots != NOTHING)]
        return [self._texts[atom] for atom in sorted(set(frozen.tolist()))]

    def find(self, axis: Axis) -> Axis:
        """Return the representative of each atom."""
        if axis.strides == (0,) and len(axis) > 1:  # a uniform axis built by `uniform`
            return np.broadcast_to(self.find(axis[:1]), len(axis))
        parent = self._parent
        root = parent[axis]
        above = parent[root]
        if _same(above, root):
            return root
        while True:
            root, above = above, parent[above]
            if _same(above, root):
                break
        parent[axis] = root
        return root

    def parts(self, axis: Axis) -> Axis:
        """Return the primitives that each index is removed with: shape (len(axis), width), padded with `NOTHING`.

        The first column is `NOTHING` exactly where the index is frozen.
        """
        if self._known is None:
            return self._parts_now(axis)
        key = fingerprint(axis)
        if key not in self._known:
            self._known[key] = self._parts_now(axis)
        return self._known[key]

    def settle(self) -> None:
        """Start caching the result of `parts`; every change of the atoms clears the cache."""
        self._known = {}

    def _changed(self) -> None:
        if self._known:
            self._known = {}

    def _parts_now(self, axis: Axis) -> Axis:
        if is_uniform(axis):
            table = self._parts_now(axis[:1])
            return np.broadcast_to(table, (len(axis), table.shape[1]))
        roots = self.find(np.asarray(axis, np.int64))
        if not self._rows or not self._row[roots].any():
            return np.where(self._frozen[roots], NOTHING, roots)[:, None]
        table = self._root_parts(axis)
        table[self._frozen[table]] = NOTHING
        return _compress(table)

    def canonical(self, axis: Axis) -> Axis:
        """Return a number per index: equal for indices that are removed by the same primitives, 0 if frozen.

        The numbers of composites hold within this axis only; two axes are compared with `are_alike`.
        """
        table = self.parts(axis)
        if table.shape[1] == 1:
            return np.asarray(table[:, 0])
        table = np.sort(table, axis=1)
        order = np.lexsort(table.T)
        ranked = table[order]
        number = np.zeros(len(table), np.int64)
        number[order[1:]] = np.cumsum((ranked[1:] != ranked[:-1]).any(axis=1))
        return np.where(table[:, -1] == NOTHING, 0, number + 1 + self._size)

    def are_alike(self, left: Axis, right: Axis) -> bool:
        """Return whether two axes have the same size and each index of both is removed by the same primitives.

        >>> atoms = Atoms()
        >>> first, second = (atoms.product(atoms.fresh(2), atoms.fresh(3)) for _ in range(2))
        >>> atoms.are_alike(first, second)
        False
        >>> atoms.unite(first, second)
        >>> atoms.are_alike(first, second)
        True
        """
        if len(left) != len(right):
            return False
        a, b = _same_width(self.parts(left), self.parts(right))
        return bool((np.sort(a, axis=1) == np.sort(b, axis=1)).all())

    def are_as_long(self, left: Axis, right: Axis) -> bool:
        """Return whether two axes have the same size whatever is removed: the same indices, in any order.

        >>> atoms = Atoms()
        >>> pairs = atoms.fresh(3)
        >>> halves, neighbours = np.tile(pairs, 2), np.repeat(pairs, 2)
        >>> atoms.are_as_long(halves, neighbours), atoms.are_alike(halves, neighbours)
        (True, False)
        """
        if len(left) != len(right):
            return False
        rows = [np.sort(parts, axis=1) for parts in _same_width(self.parts(left), self.parts(right))]
        a, b = (own[np.lexsort(own.T)] for own in rows)
        return bool((a == b).all())

    def origin(self, axis: Axis) -> Axis:
        """Return a number per index: equal for atoms (first parts of composites) allocated by the same call."""
        return np.asarray(self._origin[self.parts(axis)[:, 0]])

    def product(self, *axes: Axis) -> Axis:
        """Return the axis that merges `axes` in row-major order; frozen factors drop out."""
        count = math.prod(map(len, axes))
        if not count:
            return np.zeros(0, np.int64)
        if all(is_uniform(axis) and self.all_frozen(axis) for axis in axes):
            return uniform(axes[0][0], count)
        if not self._has_room(count, _COMPOSITE_BYTES):
            return self._too_long(count, *axes)
        merged = np.asarray(axes[0], np.int64)
        for axis in axes[1:]:
            merged = self._product(merged, np.asarray(axis, np.int64))
        return merged

    def joined(self, axes: Sequence[Axis]) -> Axis:
        """Return the concatenation of `axes`."""
        count = sum(map(len, axes))
        return np.concatenate(axes) if self._has_room(count, _INDEX_BYTES) else self._too_long(count, *axes)

    def stretched(self, axis: Axis, count: int) -> Axis:
        """Return an axis of `count` indices that repeats a whole axis cyclically."""
        if is_uniform(axis):
            return uniform(axis[0], count)
        return np.resize(axis, count) if self._has_room(count, _INDEX_BYTES) else self._too_long(count, axis)

    def repeated(self, axis: Axis, times: int) -> Axis:
        """Return an axis that repeats each index of an axis `times` times in a row."""
        count = len(axis) * times
        if is_uniform(axis):
            return uniform(axis[0], count)
        return np.repeat(axis, times) if self._has_room(count, _INDEX_BYTES) else self._too_long(count, axis)

    def unite(self, left: Axis, right: Axis) -> None:
        """Couple two axes index by index; raises ValueError if their sizes differ."""
        if left.shape != right.shape:
            raise ValueError(f"axes of {left.shape} and {right.shape} indices cannot be united")
        if not len(left):
            return
        if is_uniform(left) and is_uniform(right):
            left, right = left[:1], right[:1]
        left, right = self.find(left.ravel()), self.find(right.ravel())
        if _same(left, right):
            return
        self._changed()
        if not self._row[left].any() and not self._row[right].any():
            self._unite_primitives(left, right)
            return
        known, self._known = self._known, None
        while len(left):
            left, right = self._unite_step(left, right)
        self._known = None if known is None else {}

    def _unite_primitives(self, left: Axis, right: Axis) -> None:
        """Unite axes of primitive roots."""
        left_frozen, right_frozen = self._frozen[left], self._frozen[right]
        free = ~(left_frozen | right_frozen)
        if free.any():
            self._union(left[free], right[free])
        sides = ((left, right, left_frozen & ~right_frozen), (right, left, right_frozen & ~left_frozen))
        for frozen, other, mask in sides:
            if mask.any():
                self._parent[self.find(other[mask])] = frozen[mask]

    def _has_room(self, count: int, each: int) -> bool:
        """Return whether `count` more indices of `each` bytes fit the memory limit; if so, reserve them."""
        taken = count * each
        if taken > _MOST_BYTES // 4 or self._bytes + taken > _MOST_BYTES:
            return False
        self._bytes += taken
        return True

    def _too_long(self, count: int, *axes: Axis) -> Axis:
        """Freeze axes whose combination is too long, and return a frozen axis of `count` indices in its place."""
        text = f"leads to an axis of {count:,} indices, which are too many to follow one by one"
        reason = Reason("structure", "", text)
        for axis in axes:
            if not self.all_frozen(axis):
                self.freeze(axis, reason)
        return self.frozen(count, reason)

    def _allocate(self, count: int) -> Axis:
        start, self._size = self._size, self._size + count
        while self._size > len(self._parent):
            room = len(self._parent)
            self._parent = np.concatenate([self._parent, np.zeros(room, np.int64)])
            self._row = np.concatenate([self._row, np.zeros(room, np.int64)])
            self._frozen = np.concatenate([self._frozen, np.zeros(room, np.bool_)])
            self._origin = np.concatenate([self._origin, np.zeros(room, np.int64)])
        atoms = np.arange(start, self._size)
        self._parent[start : self._size] = atoms
        self._origins += 1
        self._origin[start : self._size] = self._origins
        return atoms

    def _allocate_rows(self, table: Axis) -> Axis:
        """Store rows of parts and return their row numbers; row 0 is reserved for primitives."""
        start = self._rows + 1
        self._rows += len(table)
        while self._rows >= len(self._parts):
            self._parts = np.concatenate([self._parts, np.zeros_like(self._parts)])
        width = min(table.shape[1], _WIDTH)
        self._parts[start : start + len(table), :width] = table[:, :width]
        return np.arange(start, start + len(table))

    def _root_parts(self, axis: Axis) -> Axis:
        """Return the roots of `parts`, before frozen places are cleared and columns compressed."""
        table = self.find(np.asarray(axis, np.int64))[:, None]
        while True:
            rows = self._row[table]
            if not (rows > 0).any():
                return table
            wide = self._parts[rows]
            primitive = rows == 0
            wide[primitive, 0] = table[primitive]
            table = self.find(_compress(wide.reshape(len(table), -1)))

    def _product(self, left: Axis, right: Axis) -> Axis:
        outer, inner = np.repeat(left, len(right)), np.tile(right, len(left))
        left_free, right_free = ~self.is_frozen(outer), ~self.is_frozen(inner)
        merged = np.where(left_free, outer, inner)
        both = left_free & right_free
        if both.any():
            table = np.concatenate([self.parts(outer[both]), self.parts(inner[both])], axis=1)
            merged[both] = self._composites(_compress(table))
        return merged

    def _composites(self, table: Axis) -> Axis:
        """Return an atom for each row of at least one part: the part itself, or a new composite."""
        if table.shape[1] > _WIDTH:
            for column in range(_WIDTH, table.shape[1]):
                extra = table[:, column] != NOTHING
                self.unite(table[extra, _WIDTH - 1], table[extra, column])
            table = self.find(table[:, :_WIDTH])
        single = (table[:, 1] == NOTHING) if table.shape[1] > 1 else np.ones(len(table), np.bool_)
        found = table[:, 0].copy()
        atoms = self._allocate(int((~single).sum()))
        self._row[atoms] = self._allocate_rows(table[~single])
        found[~single] = atoms
        return found

    def _unite_step(self, left: Axis, right: Axis) -> tuple[Axis, Axis]:
        """Unite the simple pairs, and return the pairs that remain."""
        a, b = _same_width(self.parts(left), self.parts(right))
        count_a, count_b = (a != NOTHING).sum(1), (b != NOTHING).sum(1)
        frozen = (count_a == 0) | (count_b == 0)
        if frozen.any():
            self._freeze_pairs(left[frozen], right[frozen], a[frozen], b[frozen])
        simple = (count_a == 1) & (count_b == 1)
        self._union(a[simple, 0], b[simple, 0])
        hard = ~(frozen | simple)
        if not hard.any():
            return left[:0], right[:0]
        if frozen.any() or simple.any():
            return left[hard], right[hard]
        return self._unite_composites(left, right, a, b)

    def _freeze_pairs(self, left: Axis, right: Axis, a: Axis, b: Axis) -> None:
        """Freeze both sides of pairs of which one is frozen, for its reason."""
        root = np.where(a[:, 0] == NOTHING, self._frozen_root(left), NOTHING)
        root = np.where((root == NOTHING) & (b[:, 0] == NOTHING), self._frozen_root(right), root)
        for table in (a, b):
            live = table != NOTHING
            self._parent[table[live]] = np.broadcast_to(root[:, None], table.shape)[live]

    def _frozen_root(self, axis: Axis) -> Axis:
        """Return a frozen root per frozen index, one with a reason if any has one."""
        roots = self._root_parts(axis)
        return np.asarray(np.where(self._frozen[roots], roots, NOTHING).max(axis=1))

    def _union(self, a: Axis, b: Axis) -> None:
        while len(a):
            a, b = self.find(a), self.find(b)
            apart = a != b
            a, b = a[apart], b[apart]
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))

    def _unite_composites(self, left: Axis, right: Axis, a: Axis, b: Axis) -> tuple[Axis, Axis]:
        """Unite pairs of which at least one side has several parts, and return the pairs that remain."""
        first = np.stack([a[:, 0], b[:, 0]])
        common_a = ((a[:, :, None] == b[:, None, :]) & (a != NOTHING)[:, :, None]).any(2)
        common_b = ((b[:, :, None] == a[:, None, :]) & (b != NOTHING)[:, :, None]).any(2)
        rest_a, rest_b = _compress(np.where(common_a, NOTHING, a)), _compress(np.where(common_b, NOTHING, b))
        rest_a, rest_b = _same_width(rest_a, rest_b)
        count_a, count_b = (rest_a != NOTHING).sum(1), (rest_b != NOTHING).sum(1)
        todo: list[tuple[Axis, Axis]] = []
        # One side contains the other: its other parts are united with the first part of the contained side.
        for rest, other, anchor in ((rest_a, count_b, first[1]), (rest_b, count_a, first[0])):
            rows, columns = np.nonzero((rest != NOTHING) & (other == 0)[:, None])
            todo.append((rest[rows, columns], anchor[rows]))
        becomes = ((count_a == 1) & (count_b > 1)) | ((count_b == 1) & (count_a > 1))
        if becomes.any():
            one = np.where(count_a == 1, rest_a[:, 0], rest_b[:, 0])[becomes]
            many = np.where((count_a == 1)[:, None], rest_b, rest_a)[becomes]
            done = self._become(one, many)
            later = np.flatnonzero(becomes)[~done]
            todo.append((left[later], right[later]))
        paired = (count_a > 0) & (count_b > 0) & ~becomes
        if paired.any():
            todo.extend(_pair_parts(rest_a[paired], rest_b[paired]))
        return np.concatenate([x for x, _ in todo]), np.concatenate([y for _, y in todo])

    def _become(self, one: Axis, many: Axis) -> Mask:
        """Turn each primitive of `one` into the composite of its row of `many`, and return which rows were done."""
        order = np.argsort(one, kind="stable")
        ranked = one[order]
        chosen = np.ones(len(one), np.bool_)
        chosen[order[1:]] = ranked[1:] != ranked[:-1]
        taken = set(many[chosen].ravel().tolist())
        chosen &= np.asarray([primitive not in taken for primitive in one.tolist()])
        if not chosen.any():
            chosen[0] = True
        self._row[one[chosen]] = self._allocate_rows(many[chosen])
        return chosen


def uniform(atom: int | np.int64, count: int) -> Axis:
    """Return an axis of `count` indices with one atom, which takes the memory of one index."""
    return np.broadcast_to(np.int64(atom), count)


def is_uniform(axis: Axis) -> bool:
    """Return whether an axis has several indices, all with the same atom."""
    if axis.ndim != 1 or len(axis) < 2:
        return False
    if axis.strides == (0,):  # built by `uniform`
        return True
    return bool(axis.item(0) == axis.item(-1)) and bool((axis == axis[0]).all())


def fingerprint(axis: Axis) -> Fingerprint:
    """Return the dictionary key of an axis: equal for axes of equal atoms."""
    atoms = axis[:1] if is_uniform(axis) else axis
    return len(axis), atoms.tobytes()


def _same(left: Axis, right: Axis) -> bool:
    """Return whether two arrays of one shape are equal; five times as fast as `np.array_equal` on short ones."""
    return left.tobytes() == right.tobytes()


def _same_width(a: Axis, b: Axis) -> tuple[Axis, Axis]:
    width = max(a.shape[1], b.shape[1])
    return tuple(np.pad(t, ((0, 0), (0, width - t.shape[1]))) if t.shape[1] < width else t for t in (a, b))  # type: ignore[return-value]  # a pair in, a pair out


def _pair_parts(a: Axis, b: Axis) -> list[tuple[Axis, Axis]]:
    """Pair the parts of two sides in order; surplus parts of one side are paired with the last part of the other."""
    counts = [(t != NOTHING).sum(1) for t in (a, b)]
    pairs = []
    for column in range(a.shape[1]):
        take = [np.minimum(column, count - 1) for count in counts]
        live = column < np.maximum(*counts)
        rows = np.arange(len(a))
        pairs.append((a[rows, take[0]][live], b[rows, take[1]][live]))
    return pairs


def _compress(table: Axis) -> Axis:
    """Drop repeated parts of each row and move the padding to its end."""
    if table.shape[1] == 1:
        return table
    copied = False
    for column in range(1, table.shape[1]):
        seen = (table[:, :column] == table[:, column : column + 1]).any(1)
        if seen.any():
            table = table if copied else table.copy()
            copied = True
            table[seen, column] = NOTHING
    empty = table == NOTHING
    if not empty.any():
        return table
    if not (empty[:, :-1] & ~empty[:, 1:]).any():
        return table[:, : max(1, int((~empty).sum(1).max()))]
    order = np.argsort(table == NOTHING, axis=1, kind="stable")
    table = np.take_along_axis(table, order, axis=1)
    width = max(1, int((table != NOTHING).sum(1).max(initial=0)))
    return table[:, :width]
