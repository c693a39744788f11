"""Operators that move indices about: reshaping, permuting, cutting, joining, indexing, padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cpd_onnx.algebra.atoms import Axis, is_uniform
from cpd_onnx.ir.model import Array
from cpd_onnx.ops.evaluate import axes_operand, slice_ranges
from cpd_onnx.ops.sizes import divided, floor, is_constant, product
from cpd_onnx.rules.api import DROP, TABLE_ROWS, GiveUp, Keep, Op, Rewrite, Tensor, positions_after, rule
from cpd_onnx.shapes.values import Value

_FAR = 2**31 - 1
"""Slice ends from this on mean 'to the end' in every exporter."""


@rule("Reshape")
def reshape(op: Op) -> None:
    """Runs of axes with equal product match; each run is merged and split again."""
    out = regroup(op)
    if "shape" in op.call.attributes:
        op.demand(
            "shape", out, lambda keep, old: [keep.count(a) if s > 0 else s for a, s in zip(out, old, strict=True)]
        )
    else:
        shape = op.inputs[1]
        if shape is None or shape.value.value is None:
            raise GiveUp(f"the target shape of {op.name} is computed from data")
        op.hold(1)
        op.demand_sizes(1, out)
    op.set(out)


@rule("Flatten", "Unsqueeze")
def reshape_freely(op: Op) -> None:
    """As Reshape, with nothing that names a size."""
    op.hold(1)
    op.set(regroup(op))


@rule("Squeeze")
def squeeze(op: Op) -> None:
    """As Reshape. Without axes all of size one go: they are written down once another axis shrinks to one.

    They cannot be where an axis of open size may be one too: then two indices of each axis stay.
    """
    op.hold(1)
    out = regroup(op)
    op.set(out)
    if op.has(1) or "axes" in op.call.attributes:
        return
    x = op.input(0)
    if x.value.extents is not None:
        for axis in out:
            if not op.atoms.all_frozen(axis):
                op.freeze(axis[[0, -1]], "would take this axis away if one index of it stayed")
        return
    ones = [i for i, size in enumerate(x.shape) if size == 1]

    def axes(keep: Keep, old: Any) -> Any:
        if all(keep.count(axis) > 1 for axis in out):
            return None
        return ones if op.opset < 13 else np.asarray(ones, np.int64)

    op.demand("axes" if op.opset < 13 else 1, out, axes)


def regroup(op: Op) -> list[Axis]:
    """Atoms of the output of a reshape."""
    x, y = op.input(0), op.outputs[0].value
    if y.shapes is None or y.guessed:
        raise GiveUp(f"the output shape of {op.name} is not known")
    if x.value.shapes is None:
        raise GiveUp(f"the shape of input 0 of {op.name} is not known")
    out: list[Axis] = []
    for before, after in _runs(x.value.shapes, y.shapes):
        axes = [x[i] for i in before]
        _hold_what_differs(op, x.value, y, axes, before, after)
        out += _regroup_run(op, axes, [y.shapes[0][i] for i in after])
    return out


def _hold_what_differs(op: Op, x: Value, y: Value, axes: list[Axis], before: range, after: range) -> None:
    """Freeze the axes of a run that is divided otherwise at other sizes of the inputs.

    Where both sides are products of the same sizes in the same order, the places of the indices follow from these
    whatever they are.
    """
    if x.extents is None and y.extents is None:
        return
    assert x.sizes is not None
    assert y.sizes is not None
    old, new = ([sizes[i] for i in places] for sizes, places in ((x.sizes, before), (y.sizes, after)))
    if not all(map(is_constant, (*old, *new))) and not _refine(old, new):
        for axis in axes:
            op.freeze(axis, "divides this axis otherwise at other sizes of the input")


def _refine(old: list[Any], new: list[Any]) -> bool:
    """Whether two lists of sizes are products of one list of factors in order, numbers that meet apart."""
    left, right = [s for s in old[::-1] if s != 1], [s for s in new[::-1] if s != 1]
    while left and right:
        a, b = left.pop(), right.pop()
        if a == b:
            continue
        if (rest := divided(a, b)) is not None and floor(rest) == rest:
            left.append(rest)
        elif (rest := divided(b, a)) is not None and floor(rest) == rest:
            right.append(rest)
        else:
            return all(map(is_constant, (a, b, *left, *right))) and product((a, *left)) == product((b, *right))
    return not left and not right


def _runs(old: tuple[Sequence[int], ...], new: tuple[Sequence[int], ...]) -> list[tuple[range, range]]:
    """The finest division of the axes into consecutive runs of equal size, under all bindings."""
    runs, i, j = [], 0, 0
    while i < len(old[0]) or j < len(new[0]):
        start_i, start_j = i, j
        left, right = [1] * len(old), [1] * len(new)
        while True:
            take_left = i < len(old[0]) and (left[0] <= right[0] or j >= len(new[0]))
            if take_left:
                left = [p * shape[i] for p, shape in zip(left, old, strict=True)]
                i += 1
            elif j < len(new[0]):
                right = [p * shape[j] for p, shape in zip(right, new, strict=True)]
                j += 1
            if (left == right and i > start_i and j > start_j) or (i == len(old[0]) and j == len(new[0])):
                break
        runs.append((range(start_i, i), range(start_j, j)))
        # What is left on one side alone can only be axes of size one.
        if i == len(old[0]) or j == len(new[0]):
            runs.append((range(i, len(old[0])), range(j, len(new[0]))))
            break
    return runs


def _regroup_run(op: Op, axes: list[Axis], sizes: list[int]) -> list[Axis]:
    """Merge `axes` and split the result into `sizes`; frozen axes at either end are never multiplied out."""
    if len(axes) == len(sizes) == 1:
        return axes
    wide = [(k, s) for k, s in enumerate(sizes) if s != 1]
    axes = [a for a in axes if len(a) != 1]
    made = {k: np.zeros(1, np.int64) for k, s in enumerate(sizes) if s == 1}
    if not axes or math.prod(sizes) == 0:
        return [made.get(k, op.frozen(s)) for k, s in enumerate(sizes)]
    axes = _unrepeated(axes, [s for _, s in wide])
    inner, tail = _strip(op, axes[::-1], [s for _, s in wide][::-1])
    inner, tail = inner[::-1], tail[::-1]
    core_sizes = [core for core, _, _ in tail]
    core_axes, head = _strip(op, inner, core_sizes)
    flat = op.atoms.product(*core_axes) if core_axes else np.zeros(1, np.int64)
    parts = op.unmerge(flat, [core for core, _, _ in head])
    for part, (_, before, cold), (_, after, cold_too), (k, _) in zip(parts, head, tail, wide, strict=True):
        part = part if cold is None else cold
        part = op.atoms.stretched(part, len(part) * before) if before > 1 else part
        part = op.atoms.repeated(part, after) if after > 1 else part
        made[k] = part if cold_too is None else cold_too
    return [made[k] for k in range(len(sizes))]


def _unrepeated(axes: list[Axis], sizes: list[int]) -> list[Axis]:
    """Divide a last axis that repeats each index, as merging with frozen axes makes it, into what it was merged of.

    GroupNorm as exporters write it merges channels with pixels; multiplied out they are many.
    """
    last = axes[-1]
    if len(last) > 1 and not is_uniform(last) and last[0] == last[1]:
        for first in range(1, len(sizes)):
            times = math.prod(sizes[first:])
            if 1 < times < len(last) and len(last) % times == 0:
                rows = last.reshape(-1, times)
                if (rows == rows[:, :1]).all():
                    return [*axes[:-1], rows[:, 0].copy(), np.zeros(times, np.int64)]
    return axes


def _strip(op: Op, axes: list[Axis], sizes: list[int]) -> tuple[list[Axis], list[tuple[int, int, Axis | None]]]:
    """Take the frozen axes at the front away from both sides.

    Returns the axes that are left, and for each output axis (size that is left, factor taken out of it, its frozen
    atoms if nothing is left).
    """
    first = next((i for i, axis in enumerate(axes) if not op.atoms.all_frozen(axis)), len(axes))
    cold = math.prod(len(axis) for axis in axes[:first])
    like = axes[0] if first else None
    axes = axes[first:]
    result: list[tuple[int, int, Axis | None]] = []
    for size in sizes:
        if cold > 1 and cold % size == 0:
            cold //= size
            assert like is not None
            result.append((1, 1, op.atoms.stretched(like, size)))
        elif cold > 1 and size % cold == 0:
            result.append((size // cold, cold, None))
            cold = 1
        else:
            if cold > 1:
                assert like is not None
                axes = [op.atoms.stretched(like, cold), *axes]
                cold = 1
            result.append((size, 1, None))
    return axes, result


@rule("Transpose")
def transpose(op: Op) -> None:
    """Permute the axes."""
    x = op.input(0)
    perm = op.get("perm") or list(range(x.rank))[::-1]
    op.set([x[p] for p in perm])


@rule("DepthToSpace")
def depth_to_space(op: Op) -> None:
    """Each channel comes from a block of channels: interleaved (CRD) or strided (DCR)."""
    x, block = op.input(0), op.get("blocksize") ** 2
    channels = op.atoms.fresh(x.shape[1] // block)
    crd = op.get("mode", "DCR") == "CRD"
    op.unite(x[1], op.atoms.repeated(channels, block) if crd else op.atoms.stretched(channels, x.shape[1]))
    op.set([x[0], channels, *_spatial(op, x)])


@rule("SpaceToDepth")
def space_to_depth(op: Op) -> None:
    """The channels, once for each place in a block."""
    x, block = op.input(0), op.get("blocksize") ** 2
    op.set([x[0], op.atoms.stretched(x[1], len(x[1]) * block), *_spatial(op, x)])


def _spatial(op: Op, x: Tensor) -> list[Axis]:
    """Freeze the spatial axes and make those of the output."""
    shape = op.sizes()
    return [op.along(x[i], shape[i], "moves blocks of this axis") for i in range(2, x.rank)]


@rule("Concat")
def concat(op: Op) -> None:
    """Indices follow one another on one axis, the others unite."""
    parts = [op.input(i) for i in range(len(op.inputs))]
    axis = op.get("axis", 1) % parts[0].rank
    out = list(parts[0].axes or [])
    for position in range(parts[0].rank):
        if position == axis:
            out[position] = op.atoms.joined([part[position] for part in parts])
            continue
        for other in parts[1:]:
            op.unite(parts[0][position], other[position])
    op.set(out)


@rule("Split")
def split(op: Op) -> None:
    """Consecutive pieces of one axis."""
    x = op.input(0)
    axis = op.get("axis", 0) % x.rank
    op.hold(1)
    sizes = []
    for output in op.outputs:
        if output.value.shape is None:
            raise GiveUp(f"the pieces of {op.name} are not known")
        sizes.append(output.value.shape[axis])
    if sum(sizes) != len(x[axis]):
        raise GiveUp(f"the pieces of {op.name} do not add up")
    if not (x.value.has_fixed(axis) and all(output.value.has_fixed(axis) for output in op.outputs)):
        op.freeze(x[axis], "splits this axis, whose size depends on the input")
    pieces = np.split(x[axis], np.cumsum(sizes)[:-1])
    for number, piece in enumerate(pieces):
        out = list(x.axes or [])
        out[axis] = piece
        op.set(out, number)
    if not op.atoms.all_frozen(x[axis]):
        _demand_pieces(op, pieces)


def _demand_pieces(op: Op, pieces: list[Axis]) -> None:
    """Keep the sizes of the pieces right, and write them down once they are no longer what the default gives."""

    def default(keep: Keep) -> bool:
        counts = [keep.count(piece) for piece in pieces]
        if "num_outputs" not in op.call.attributes:
            return len(set(counts)) == 1
        chunk = -(-sum(counts) // len(counts))
        return all(c == min(chunk, sum(counts) - i * chunk) for i, c in enumerate(counts))

    def sizes(keep: Keep, old: Any) -> Any:
        counts = [keep.count(piece) for piece in pieces]
        if old is None and default(keep):
            return None
        return counts if op.opset < 13 else np.asarray(counts, np.int64)

    if op.has(1):
        op.demand_sizes(1, pieces)
        return
    op.demand("split" if op.opset < 13 else 1, pieces, sizes)
    if "num_outputs" in op.call.attributes:
        op.demand("num_outputs", pieces, lambda keep, old: None if default(keep) else DROP)


@rule("Slice")
def slice_(op: Op) -> None:
    """A range of one or several axes."""
    x, y = op.input(0), op.outputs[0].value
    op.hold(1)
    out = list(x.axes or [])
    ranges = _known_ranges(op, x)
    if ranges is None:
        out = _sliced_blindly(op, x, y.shape)
        op.set(out)
        return
    for slot, (axis, start, end, step) in enumerate(ranges):
        if not (is_constant(start) and is_constant(end)):
            op.freeze(x[axis], "slices this axis by a range that depends on the input")
        elif not x.value.has_fixed(axis):
            op.freeze(x[axis], "slices this axis, whose size depends on the input")
        if op.atoms.all_frozen(x[axis]):
            if y.shape is None:
                raise GiveUp(f"the output shape of {op.name} is not known")
            out[axis] = op.atoms.stretched(x[axis], y.shape[axis])
            continue
        out[axis] = _sliced(op, x[axis], slot, (start, end, step))
        op.touched.append(x[axis])
    op.set(out)


def _known_ranges(op: Op, x: Tensor) -> list[tuple[int, Any, Any, int]] | None:
    """(axis, start, end, step) of each sliced axis, starts and ends as expressions; None if they depend on data.

    Which axes are sliced must not depend on the inputs.
    """
    values = [None if t is None else t.value for t in op.inputs[1:]] if op.opset >= 10 else []
    if any(v is not None and (v.value is None or (v.is_open and v.expressions is None)) for v in values):
        return None
    if any(v is not None and v.is_open for v in values[2:]):
        return None
    operands = [None if v is None else v.expressions if v.is_open else v.value for v in values]
    return slice_ranges(op.call, x.rank, operands)


def _sliced_blindly(op: Op, x: Tensor, shape: Sequence[int] | None) -> list[Axis]:
    """The range depends on data: axes of unchanged length could be sliced too, so all are frozen."""
    if shape is None:
        raise GiveUp(f"the range of {op.name} is computed from data")
    for axis in x.axes or []:
        op.freeze(axis, "slices by a range computed from data")
    return [op.frozen(size, "slices by a range computed from data") for size in shape]


def _sliced(op: Op, axis: Axis, slot: int, span: tuple[int, int, int]) -> Axis:
    """Atoms of a slice of a channel axis."""
    start, end, step = span
    size = len(axis)
    positions = np.arange(size)[slice(start, end if end > -_FAR else None, step)]
    whole = len(positions) == size
    if step == 1 or (step == -1 and whole):
        remap = _contiguous if step == 1 else _reversed
        _demand_slice(op, axis, slot, remap, start, end)
        return axis[positions]
    if step > 1 and size % step == 0 and 0 <= start < step and (end >= size or (end == -1 and start < step - 1)):
        blocks = op.atoms.fresh(size // step)
        op.unite(axis, op.atoms.repeated(blocks, step))
        _demand_slice(op, axis, slot, _strided, start, end)
        return axis[positions]
    op.freeze(axis, f"takes every {step}th index")
    return axis[positions]


def _demand_slice(op: Op, axis: Axis, slot: int, remap: Any, start: int, end: int) -> None:
    """Demand new starts and ends at one place of the two lists."""
    for which, old_value in ((0, start), (1, end)):
        rewrite = _replacing_one(axis, slot, remap, which, old_value)
        op.demand(("starts", "ends")[which] if op.opset < 10 else which + 1, [axis], rewrite)


def _replacing_one(axis: Axis, slot: int, remap: Any, which: int, value: int) -> Rewrite:
    def rewrite(keep: Keep, old: Any) -> Any:
        new = remap(keep.mask(axis), value, which)
        if isinstance(old, np.ndarray):
            made = old.copy()
            made[slot] = new
            return made
        return [*old[:slot], new, *old[slot + 1 :]]

    return rewrite


def _contiguous(mask: npt.NDArray[np.bool_], value: int, which: int) -> int:
    """New start or end of a range of step 1; the sign stays, what is out of range stays."""
    size, left = len(mask), int(mask.sum())
    if value >= size or value < -size:
        return value
    position = int(positions_after(mask, np.asarray([value % size if value < 0 else value]))[0])
    if value < 0 and position < left:
        return position - left
    return position


def _reversed(mask: npt.NDArray[np.bool_], value: int, which: int) -> int:
    """New start or end of the whole range backwards."""
    return int(mask.sum()) - 1 if which == 0 and 0 <= value < len(mask) else value


def _strided(mask: npt.NDArray[np.bool_], value: int, which: int) -> int:
    """New end of a strided range from the first block to the last."""
    return int(mask.sum()) if which == 1 and value == len(mask) else value


@rule("Gather")
def gather(op: Op) -> None:
    """Constant positions follow the channels; positions from data hold the axis."""
    x, indices = op.input(0), op.input(1)
    axis = op.get("axis", 0) % x.rank
    where = indices.value.value if indices.value.is_static else None
    axes = x.axes or []
    picked: list[Axis]
    is_row = where is not None and (where.ndim < 2 or (not x.is_constant and max(where.shape) == where.size > 1))
    is_row = is_row and x.value.has_fixed(axis)
    if op.atoms.all_frozen(x[axis]) or where is None or not is_row:
        if x.is_constant and not op.atoms.all_frozen(x[axis]):
            op.atoms.freeze(x[axis], TABLE_ROWS)
        op.freeze(x[axis], "looks up along this axis by index")
        picked = indices.axes or []
    else:
        op.operand(1)
        picked = _gather_known(op, x[axis], where)
    op.set([*axes[:axis], *picked, *axes[axis + 1 :]])


def _gather_known(op: Op, axis: Axis, where: Array) -> list[Axis]:
    """Positions along one axis of the indices; others of size one come with them (a reshape written as a lookup)."""
    size, row = len(axis), where.reshape(-1)
    positions = np.where(row < 0, row + size, row).astype(np.int64)
    if positions.size and not 0 <= positions.min() <= positions.max() < size:
        raise GiveUp(f"{op.name} takes positions that the axis of {size} has not")
    op.touched.append(axis)
    if where.ndim == 0:
        op.freeze(axis[positions], "picks this index")

    def rewrite(keep: Keep, old: Array) -> Array:
        mask = keep.mask(axis)
        stays = mask[positions] if where.ndim else np.ones(1, np.bool_)
        new = positions_after(mask, positions[stays])
        made = np.where(row[stays] < 0, new - int(mask.sum()), new)
        return np.asarray(made, old.dtype).reshape([len(made) if n == row.size else 1 for n in where.shape])

    op.demand(1, [axis], rewrite)
    return [axis[positions] if n == row.size else np.zeros(1, np.int64) for n in where.shape]


@rule("GatherElements")
def gather_elements(op: Op) -> None:
    """One index per element along one axis, which stays; the other axes pass where they are taken whole."""
    x, indices = op.input(0), op.input(1)
    axis = op.get("axis", 0) % x.rank
    op.freeze(x[axis], "looks up along this axis by index")
    out = []
    for position in range(x.rank):
        if position == axis:
            out.append(indices[position])
            continue
        _unite_if_whole(op, x[position], indices[position])
        out.append(indices[position])
    op.set(out)


@rule("ScatterElements", "Scatter")
def scatter_elements(op: Op) -> None:
    """One index per element along one axis, which stays; the other axes pass where they are written whole."""
    x, indices, updates = op.input(0), op.input(1), op.input(2)
    axis = op.get("axis", 0) % x.rank
    op.freeze(x[axis], "writes along this axis by index")
    for position in range(x.rank):
        op.unite(indices[position], updates[position])
        if position != axis:
            _unite_if_whole(op, x[position], indices[position])
    op.freeze(indices[axis], "holds positions")
    op.set(x.axes or [])


def _unite_if_whole(op: Op, data: Axis, indices: Axis) -> None:
    """An axis of which the indices cover only the start stays as it is."""
    if len(data) == len(indices):
        op.unite(data, indices)
        return
    op.freeze(data, "is indexed in part")
    op.freeze(indices, "indexes another axis in part")


@rule("GatherND")
def gather_nd(op: Op) -> None:
    """Index tuples choose along the first axes, which stay; the axes behind them pass."""
    x, indices = op.input(0), op.input(1)
    batch, depth = op.get("batch_dims", 0), indices.shape[-1]
    for axis in (x.axes or [])[: batch + depth]:
        op.freeze(axis, "looks up along this axis by index")
    op.freeze(indices[-1], "holds index tuples")
    for axis in (indices.axes or [])[:batch]:
        op.freeze(axis, "is a batch axis")
    op.set([*(indices.axes or [])[:-1], *(x.axes or [])[batch + depth :]])


@rule("ScatterND")
def scatter_nd(op: Op) -> None:
    """Index tuples choose along the first axes, which stay; the axes behind them unite with the updates'."""
    x, indices, updates = op.input(0), op.input(1), op.input(2)
    depth, lead = indices.shape[-1], indices.rank - 1
    for axis in (x.axes or [])[:depth]:
        op.freeze(axis, "writes along this axis by index")
    for axis in indices.axes or []:
        op.freeze(axis, "holds index tuples")
    for axis in (updates.axes or [])[:lead]:
        op.freeze(axis, "is written by index")
    for offset, axis in enumerate((x.axes or [])[depth:]):
        op.unite(axis, updates[lead + offset])
    op.set(x.axes or [])


@rule("OneHot")
def one_hot(op: Op) -> None:
    """A new axis as long as the depth."""
    indices = op.input(0)
    for slot in (1, 2):
        op.operand(slot)
    shape, axis = op.outputs[0].value.shape, op.get("axis", -1)
    if shape is None:
        raise GiveUp(f"the depth of {op.name} is not known")
    axis %= len(shape)
    out = list(indices.axes or [])
    out.insert(axis, op.frozen(shape[axis], "spans its depth"))
    op.set(out)


@rule("Compress")
def compress(op: Op) -> None:
    """Choose along one axis by a condition; the others pass."""
    x, shape = op.input(0), op.outputs[0].value.shape
    if "axis" not in op.call.attributes or shape is None:
        raise GiveUp(f"{op.name} flattens its input")
    axis = op.get("axis") % x.rank
    op.freeze(x[axis], "chooses along this axis")
    op.freeze(op.input(1)[0], "is a condition")
    out = list(x.axes or [])
    out[axis] = op.frozen(shape[axis], "chooses along this axis")
    op.set(out)


@rule("ReverseSequence")
def reverse_sequence(op: Op) -> None:
    """Reverse one axis up to a length per batch entry."""
    x = op.input(0)
    for axis in (op.get("time_axis", 0), op.get("batch_axis", 1)):
        op.freeze(x[axis], "reverses sequences")
    op.freeze(op.input(1)[0], "takes sequence lengths per sample")
    op.set(x.axes or [])


@rule("Trilu")
def trilu(op: Op) -> None:
    """Triangles of the last two axes."""
    x = op.input(0)
    for axis in (x.axes or [])[-2:]:
        op.freeze(axis, "cuts a triangle out of this axis")
    op.set(x.axes or [])


@rule("Pad")
def pad(op: Op) -> None:
    """New indices before and after; on a channel axis they can go like any other."""
    x = op.input(0)
    op.hold(1)
    shape = op.sizes()
    pads, axes = _pads(op, x.rank)
    out = list(x.axes or [])
    for place, axis in enumerate(axes):
        if op.atoms.all_frozen(x[axis]) or pads is None:
            op.freeze(x[axis], "pads this axis by an amount computed from data")
            out[axis] = op.atoms.stretched(x[axis], shape[axis]) if len(x[axis]) else op.frozen(shape[axis])
            continue
        low, high = pads[place], pads[place + len(axes)]
        if not (is_constant(low) and is_constant(high) and x.value.has_fixed(axis)):
            out[axis] = op.along(x[axis], shape[axis], "pads this axis by an amount that depends on the input")
            continue
        if op.get("mode", "constant") != "constant" and (low or high):
            out[axis] = op.along(x[axis], shape[axis], "pads this axis with copies of its own")
            continue
        out[axis] = _padded(op, x[axis], place, len(axes), (low, high))
    op.set(out)


def _pads(op: Op, rank: int) -> tuple[list[Any] | None, list[int]]:
    """Pad widths (None if they depend on data), and the axes that they are for."""
    axes = axes_operand(op.call, [op.operand(3)] if op.has(3) else [])
    axes = list(range(rank)) if axes is None else [a % rank for a in axes]
    if not op.has(1):
        return list(op.get("pads", op.get("paddings", [0] * (2 * rank)))), axes
    value = op.inputs[1].value if op.inputs[1] else None
    if value is None or value.value is None:
        return None, axes
    if not value.is_open:
        return value.value.ravel().tolist(), axes
    if value.expressions is None:
        return None, axes
    return value.expressions.ravel().tolist(), axes


def _is_computed(op: Op, places: Sequence[int]) -> bool:
    """Whether pad widths come out of arithmetic on sizes, so that zeros need not stay zeros."""
    value = op.inputs[1].value if op.has(1) and op.inputs[1] is not None else None
    if value is None or not value.from_shape:
        return False
    return value.leaves is None or bool((value.leaves.ravel()[list(places)] < 0).any())


def _padded(op: Op, axis: Axis, place: int, count: int, widths: tuple[int, int]) -> Axis:
    """Atoms of a padded channel axis; negative widths cut."""
    low, high = widths
    body = axis[max(0, -low) : len(axis) - max(0, -high)]
    cut = (axis[: max(0, -low)], axis[len(axis) - max(0, -high) :])
    op.touched += [axis]
    new = tuple(op.atoms.fresh(max(0, w), may_vanish=True) for w in widths)
    if not (low or high or _is_computed(op, (place, place + count))):
        return axis
    slot: int | str = 1 if op.has(1) else "pads" if "pads" in op.call.attributes else "paddings"

    def rewrite(keep: Keep, old: Any) -> Any:
        made = old.copy() if isinstance(old, np.ndarray) else list(old)
        for position, side in ((place, 0), (place + count, 1)):
            made[position] = keep.count(new[side]) - keep.count(cut[side])
        return made

    op.demand(slot, [axis, *new], rewrite)
    return op.atoms.joined([new[0], body, new[1]])


@rule("Expand")
def expand(op: Op) -> None:
    """Axes of size one stretch; a stretched axis is as long as whoever uses it needs."""
    x, y = op.input(0), op.outputs[0].value
    if y.shapes is None or op.inputs[1] is None or op.inputs[1].value.value is None:
        raise GiveUp(f"the target shape of {op.name} is not known")
    op.hold(1)
    stretched = [_new_axis(op, y, axis) for axis in range(len(y.shapes[0]))]
    out = broadcast_over(op, x, stretched)
    op.set(out)
    count = op.inputs[1].value.value.size
    if count:
        op.demand_sizes(1, out[len(out) - count :])


def broadcast_over(op: Op, x: Tensor, stretched: list[Axis]) -> list[Axis]:
    """The axes of x where it has them, stretched ones elsewhere."""
    missing = len(stretched) - x.rank
    op.touched.extend(x.axes or [])
    return [
        axis if back < missing or (len(x[back - missing]) == 1 and len(axis) != 1) else x[back - missing]
        for back, axis in enumerate(stretched)
    ]


def _new_axis(op: Op, made: Value, axis: int) -> Axis:
    size = (made.shape or ())[axis]
    return op.atoms.fresh(size) if made.has_fixed(axis) else op.frozen(size, "makes an axis that depends on the input")


@rule("ConstantOfShape")
def constant_of_shape(op: Op) -> None:
    """All equal: each axis is as long as whoever uses it needs."""
    y, shape = op.outputs[0].value, op.inputs[0]
    if y.shapes is None or y.guessed or shape is None or shape.value.value is None:
        raise GiveUp(f"the shape of {op.name} is not known")
    op.hold(0)
    out = [_new_axis(op, y, axis) for axis in range(len(y.shapes[0]))]
    op.set(out)
    if out:
        op.demand_sizes(0, out)


@rule("Tile")
def tile(op: Op) -> None:
    """Copies of an axis; an axis of size one stretches."""
    x, y = op.input(0), op.outputs[0].value
    if op.opset < 6:
        raise GiveUp(f"{op.name} had other inputs before opset 6")
    if y.shapes is None or y.guessed or op.inputs[1] is None or op.inputs[1].value.value is None:
        raise GiveUp(f"the repeats of {op.name} are not known")
    op.hold(1)
    out, counted = [], []
    for place, axis in enumerate(x.axes or []):
        if len(axis) == 1:
            out.append(_new_axis(op, y, place))
            counted.append(out[-1])
            continue
        out.append(op.atoms.stretched(axis, y.shapes[0][place]))
        counted.append(np.zeros(0, np.int64))
    op.set(out)
    op.demand_sizes(1, counted)


@rule("Resize", "Upsample")
def resize(op: Op) -> None:
    """Axes that are taken as they are pass (channels), the others are resampled, even to the size that they have."""
    x, y = op.input(0), op.outputs[0].value
    if y.sizes is None or x.value.sizes is None or y.guessed:
        raise GiveUp(f"the output shape of {op.name} is not known")
    op.hold(1)
    axes = [axis % x.rank for axis in op.get("axes") or range(x.rank)]
    out = []
    for position in range(x.rank):
        same = x.value.sizes[position] == y.sizes[position]
        passes = same and (position not in axes or _is_left_alone(op, axes.index(position), len(axes)))
        out.append(x[position] if passes else op.along(x[position], op.sizes()[position], "resamples this axis"))
    op.set(out)
    if op.has(3):
        if op.get("keep_aspect_ratio_policy", "stretch") != "stretch":
            for axis in axes:
                op.freeze(x[axis], "keeps the ratio of this axis to others")
        op.demand_sizes(3, [out[a] for a in axes])


def _is_left_alone(op: Op, place: int, count: int) -> bool:
    """Whether an axis that keeps its size, one of `count` that are resized, keeps its values.

    It does unless its scale is another than one (8 x 1.12 makes 8 again) or sampling starts elsewhere.
    """
    mode = op.get("coordinate_transformation_mode", "half_pixel")
    if mode == "tf_crop_and_resize" and not _is_whole(op, place, count):
        return False
    if mode == "tf_half_pixel_for_nn" and op.get("nearest_mode", "round_prefer_floor") not in _ROUND_DOWN:
        return False
    slot = 2 if op.opset > 10 else 1
    if op.has(slot):
        value = op.inputs[slot].value  # type: ignore[union-attr]  # it is there
        scales = value.expressions if value.is_open else value.value
        # An empty list stands for none.
        return scales is not None and (scales.size != count or bool(scales[place] == 1))
    scales = op.get("scales")
    return bool(scales is None or scales[place] == 1)


_ROUND_DOWN = {"floor", "round_prefer_floor"}


def _is_whole(op: Op, place: int, count: int) -> bool:
    """Whether the region of interest is the whole of an axis."""
    roi = op.inputs[1].value if op.has(1) and op.inputs[1] is not None else None
    if roi is None or not roi.is_static or roi.value is None or roi.value.size != 2 * count:
        return False
    return bool(roi.value[place] == 0 and roi.value[place + count] == 1)


@rule("Size")
def size_(op: Op) -> None:
    """A number that others compute with; where it is not known beforehand, it cannot be put back to what it was."""
    if op.outputs[0].value.values is None:
        raise GiveUp(f"the number that {op.name} gives is not known")
    shape_(op)


@rule("Shape")
def shape_(op: Op) -> None:
    """Sizes, which follow by themselves."""
    for axis in (op.inputs[0].axes if op.inputs[0] is not None else None) or []:
        op.touched.append(axis)
    op.set([op.frozen(size, "lists sizes") for size in op.sizes()])


@rule("Range")
def range_(op: Op) -> None:
    """Positions along an axis that somebody else shrinks."""
    start, limit, step = op.input(0).value, op.input(1).value, op.input(2).value
    if not (start.is_static and limit.is_static and step.is_static):
        made_up(op)
        return
    op.hold(0)
    assert start.value is not None
    assert step.value is not None
    count = op.sizes()[0]
    if start.value.item() != 0 or step.value.item() != 1 or count < 2:
        op.set([op.frozen(count, "counts along this axis")])
        return
    axis = op.atoms.fresh(count)
    op.set([axis])
    op.positions(axis)
    op.demand(1, [axis], lambda keep, old: np.asarray(keep.count(axis), old.dtype))


@rule("EyeLike", "AffineGrid", "RandomNormalLike", "RandomUniformLike", "Bernoulli")
def made_up(op: Op) -> None:
    """Made from sizes and numbers: nothing to prune in it."""
    op.hold(0)
    op.set([op.frozen(size) for size in op.sizes()])
