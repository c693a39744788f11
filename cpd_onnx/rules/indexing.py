"""Rules of operators that read or write elements by position: slices, lookups, triangles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.ir.model import Array
from cpd_onnx.ops.evaluate import slice_ranges, sliced_axes
from cpd_onnx.ops.sizes import is_constant
from cpd_onnx.rules.api import TABLE_ROWS, GiveUp, Op, Rewrite, Tensor, positions_after, rule
from cpd_onnx.rules.elementwise import MICROSOFT

_FAR = 2**31 - 1
"""Slice ends from this value on mean "to the end" (INT_MAX, as exporters write it)."""
_MOST_LOOKED_UP = 1 << 22
"""Maximum number of constant positions of a lookup that are followed one by one (heuristic)."""


@rule("Slice")
def slice_(op: Op) -> None:
    """Select a range of one or several axes."""
    x, y = op.input(0), op.outputs[0].value
    op.freeze_operands(1)
    out = list(x.axes or [])
    ranges = _known_ranges(op, x)
    if ranges is None:
        out = _sliced_by_data(op, x, y.shape)
        op.set(out)
        return
    for slot, (axis, start, end, step) in enumerate(ranges):
        if not (is_constant(start) and is_constant(end)):
            op.freeze(x[axis], "slices this axis by a range that depends on the input")
        elif not x.value.has_fixed(axis):
            op.freeze(x[axis], "slices this axis, whose size depends on the input")
        if op.atoms.all_frozen(x[axis]):
            if y.shape is None:
                raise op.unknown_shape()
            out[axis] = op.atoms.stretched(x[axis], y.shape[axis])
            continue
        out[axis] = _sliced(op, x[axis], slot, (start, end, step))
        op.accounted.append(x[axis])
    op.set(out)


def _known_ranges(op: Op, x: Tensor) -> list[tuple[int, Any, Any, int]] | None:
    """Return (axis, start, end, step) of each sliced axis, starts and ends as expressions; None if they depend on data.

    None also where the choice of the axes depends on the sizes of the inputs.
    """
    values = list(map(op.value, range(1, len(op.inputs)))) if op.opset >= 10 else []
    if any(v is not None and (v.value is None or (v.is_open and v.expressions is None)) for v in values):
        return None
    if any(v is not None and v.is_open for v in values[2:]):
        return None
    operands = [None if v is None else v.entries for v in values]
    return slice_ranges(op.call, x.rank, operands)


def _sliced_by_data(op: Op, x: Tensor, shape: Sequence[int] | None) -> list[Axis]:
    """Freeze the axes that are sliced by a range that depends on data; return the axes of the output."""
    if shape is None:
        raise GiveUp(f"the range of {op.name} is computed from data")
    operands = list(map(op.value, range(1, len(op.inputs))))
    sliced = None
    if op.opset >= 10 and all(v is None or v.shape is not None for v in operands):
        values = [None if v is None or v.is_open else v.value for v in operands]
        sliced = sliced_axes(x.rank, [None if v is None else v.shape for v in operands], values)
    out = list(x.axes or [])
    for axis in range(x.rank) if sliced is None else sorted(sliced):
        op.freeze(out[axis], "slices this axis by a range computed from data")
        out[axis] = op.frozen(shape[axis], "slices this axis by a range computed from data")
    return out


def _sliced(op: Op, axis: Axis, slot: int, span: tuple[int, int, int]) -> Axis:
    """Return the atoms of a slice of a channel axis, and record its start and end."""
    start, end, step = span
    size = len(axis)
    positions = np.arange(size)[slice(start, end if end > -_FAR else None, step)]
    whole = len(positions) == size
    if step == 1 or (step == -1 and whole):
        remap = _contiguous if step == 1 else _reversed
        _record_slice(op, axis, slot, remap, start, end)
        return axis[positions]
    if step > 1 and size % step == 0 and 0 <= start < step and (end >= size or (end == -1 and start < step - 1)):
        blocks = op.atoms.fresh(size // step)
        op.unite(axis, op.atoms.repeated(blocks, step))
        _record_slice(op, axis, slot, _strided, start, end)
        return axis[positions]
    op.freeze(axis, f"takes every {step}th index")
    return axis[positions]


def _record_slice(op: Op, axis: Axis, slot: int, remap: Any, start: int, end: int) -> None:
    """Record that an element of the starts and one of the ends depend on an axis."""
    for which, old_value in ((0, start), (1, end)):
        rewrite = _replacing_one(axis, slot, remap, which, old_value)
        op.use_size(("starts", "ends")[which] if op.opset < 10 else which + 1, [axis], rewrite)


def _replacing_one(axis: Axis, slot: int, remap: Any, which: int, value: int) -> Rewrite:
    def rewrite(keep: KeepMask, old: Any) -> Any:
        new = remap(keep.mask(axis), value, which)
        if isinstance(old, np.ndarray):
            values = old.copy()
            values[slot] = new
            return values
        return [*old[:slot], new, *old[slot + 1 :]]

    return rewrite


def _contiguous(mask: npt.NDArray[np.bool_], value: int, which: int) -> int:
    """Return the new start or end of a range of step 1; its sign, and values out of range, do not change."""
    size, left = len(mask), int(mask.sum())
    if value >= size or value < -size:
        return value
    position = int(positions_after(mask, np.asarray([value % size if value < 0 else value]))[0])
    if value < 0 and position < left:
        return position - left
    return position


def _reversed(mask: npt.NDArray[np.bool_], value: int, which: int) -> int:
    """Return the new start or end of the whole range backwards."""
    return int(mask.sum()) - 1 if which == 0 and 0 <= value < len(mask) else value


def _strided(mask: npt.NDArray[np.bool_], value: int, which: int) -> int:
    """Return the new end of a strided range from the first block to the last."""
    return int(mask.sum()) if which == 1 and value == len(mask) else value


@rule("Gather")
def gather(op: Op) -> None:
    """Constant positions follow the channels; positions computed from data freeze the axis."""
    x, indices = op.input(0), op.input(1)
    axis = op.get("axis", 0) % x.rank
    where = indices.value.value if indices.value.is_static else None
    axes = x.axes or []
    picked: list[Axis]
    is_known = where is not None and x.value.has_fixed(axis) and where.size <= _MOST_LOOKED_UP
    if where is None or not is_known or op.atoms.all_frozen(x[axis]) or (x.is_constant and where.ndim > 1):
        op.freeze(x[axis], TABLE_ROWS if x.is_constant else "looks up along this axis by index")
        picked = indices.axes or []
    elif where.ndim < 2 or max(where.shape) == where.size > 1:
        op.operand(1)
        picked = _gather_known(op, x[axis], where)
    else:
        picked = _gather_table(op, x[axis], indices, where)
    op.set([*axes[:axis], *picked, *axes[axis + 1 :]])


def _positions(op: Op, axis: Axis, where: Array) -> npt.NDArray[np.int64]:
    """Return the positions that indices name along an axis, from its beginning, in one row."""
    size, row = len(axis), where.reshape(-1)
    positions = np.where(row < 0, row + size, row).astype(np.int64)
    if positions.size and not 0 <= positions.min() <= positions.max() < size:
        raise GiveUp(f"{op.name} has positions out of range of the axis of {size}")
    return positions


def _gather_table(op: Op, axis: Axis, indices: Tensor, where: Array) -> list[Axis]:
    """Return the axes of a lookup by a table of constant positions, as of the windows of a flattened image.

    What is looked up is split by the axes of the table: one along which channels vary takes these, and any other is an
    axis of the table alone.
    """
    positions = _positions(op, axis, where).reshape(where.shape)
    op.accounted.append(axis)
    parts = op.unmerge(axis[positions.ravel()], where.shape)
    for place, own in enumerate(indices.axes or []):
        if op.atoms.all_frozen(parts[place]):
            parts[place] = own
        else:
            op.freeze(own, "takes this as an operand")

    def rewrite(keep: KeepMask, old: Array) -> Array:
        left = np.ix_(*(np.flatnonzero(keep.mask(part)) for part in parts))
        mask = keep.mask(axis)
        after = positions_after(mask, positions[left].ravel()).reshape(positions[left].shape)
        return np.asarray(np.where(where[left] < 0, after - int(mask.sum()), after), old.dtype)

    op.use_size(1, [axis, *parts], rewrite)
    return parts


def _gather_known(op: Op, axis: Axis, where: Array) -> list[Axis]:
    """Return the axes of a lookup at constant positions along one axis of the indices, with others of size one."""
    positions, row = _positions(op, axis, where), where.reshape(-1)
    op.accounted.append(axis)
    if where.ndim == 0:
        op.freeze(axis[positions], "picks this index")

    def rewrite(keep: KeepMask, old: Array) -> Array:
        mask = keep.mask(axis)
        surviving = mask[positions] if where.ndim else np.ones(1, np.bool_)
        after = positions_after(mask, positions[surviving])
        new = np.where(row[surviving] < 0, after - int(mask.sum()), after)
        return np.asarray(new, old.dtype).reshape([len(new) if n == row.size else 1 for n in where.shape])

    op.use_size(1, [axis], rewrite)
    return [axis[positions] if n == row.size else np.zeros(1, np.int64) for n in where.shape]


@rule("GatherElements")
def gather_elements(op: Op) -> None:
    """Read one index per element along one axis, which is frozen; other axes pass where they are read whole."""
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
    """Write one index per element along one axis, which is frozen; other axes pass where they are written whole."""
    x, indices, updates = op.input(0), op.input(1), op.input(2)
    axis = op.get("axis", 0) % x.rank
    op.freeze(x[axis], "writes along this axis by index")
    for position in range(x.rank):
        op.unite(indices[position], updates[position])
        if position != axis:
            _unite_if_whole(op, x[position], indices[position])
    op.freeze(indices[axis], "holds positions")
    op.set(x.axes or [])


@rule("TensorScatter")
def tensor_scatter(op: Op) -> None:
    """Write an update into a cache along one axis, which is frozen; the others unite with those of the update."""
    cache, update = op.input(0), op.input(1)
    axis = op.get("axis", -2) % cache.rank
    op.freeze(cache[axis], "writes along this axis by index")
    op.freeze(update[axis], "is written by index")
    if op.has(2):
        op.unite(op.input(2)[0], cache[0])
    for position in range(cache.rank):
        if position != axis:
            op.unite(cache[position], update[position])
    op.set(cache.axes or [])


def _unite_if_whole(op: Op, data: Axis, indices: Axis) -> None:
    """Unite an axis with that of the indices; freeze both if the indices cover only its start."""
    if len(data) == len(indices):
        op.unite(data, indices)
        return
    op.freeze(data, "is indexed in part")
    op.freeze(indices, "indexes another axis in part")


@rule("GatherND")
@rule("GatherND", domain=MICROSOFT)
def gather_nd(op: Op) -> None:
    """Read at index tuples along the first axes, which are frozen; later axes pass."""
    x, indices = op.input(0), op.input(1)
    batch, depth = op.get("batch_dims", 0), indices.shape[-1]
    op.freeze_all((x.axes or [])[: batch + depth], "looks up along this axis by index")
    op.freeze(indices[-1], "holds index tuples")
    op.freeze_all((indices.axes or [])[:batch], "is a batch axis")
    op.set([*(indices.axes or [])[:-1], *(x.axes or [])[batch + depth :]])


@rule("ScatterND")
def scatter_nd(op: Op) -> None:
    """Write at index tuples along the first axes; later axes unite with those of the updates.

    Of the first axes, those pass along which the tuples are constant and write a grid, as assignments to slices do;
    the others are frozen.
    """
    x, indices, updates = op.input(0), op.input(1), op.input(2)
    depth, lead = indices.shape[-1], indices.rank - 1
    op.freeze_all(indices.axes or [], "holds index tuples")
    where = indices.value.value if indices.value.is_static else None
    along = {} if where is None else _axes_of_grid(where)
    rows = {} if where is None else {k: _row_of_grid(op, x, k, where, d) for k, d in along.items()}
    written = {along[k]: k for k, row in rows.items() if row is not None}
    op.freeze_all([x[k] for k in range(depth) if k not in written.values()], "writes along this axis by index")
    for d in range(lead):
        if d in written:
            axis = x[written[d]]
            op.unite(axis[rows[written[d]]], updates[d])
            op.accounted.append(axis)
        else:
            op.freeze(updates[d], "is written by index")
    for offset, axis in enumerate((x.axes or [])[depth:]):
        op.unite(axis, updates[lead + offset])
    if any(not op.atoms.all_frozen(x[k]) for k in written.values()):
        op.operand(1)
        _record_grid(op, x, written)
    op.set(x.axes or [])


def _axes_of_grid(where: Array) -> dict[int, int]:
    """Return, for each component of index tuples, the axis along which it alone varies, where there is one."""
    varying = {
        k: [d for d in range(where.ndim - 1) if where.shape[d] > 1 and np.diff(where[..., k], axis=d).any()]
        for k in range(where.shape[-1])
    }
    used = [d for axes in varying.values() for d in axes]
    return {k: axes[0] for k, axes in varying.items() if len(axes) == 1 and used.count(axes[0]) == 1}


def _row_of_grid(op: Op, x: Tensor, k: int, where: Array, along: int) -> npt.NDArray[np.int64] | None:
    """Return the positions on axis k that a grid of index tuples writes to; None if they repeat or the size is open."""
    if not x.value.has_fixed(k):
        return None
    size, row = len(x[k]), np.moveaxis(where[..., k], along, 0).reshape(where.shape[along], -1)[:, 0]
    positions = np.where(row < 0, row + size, row).astype(np.int64)
    if not 0 <= positions.min() <= positions.max() < size:
        raise GiveUp(f"{op.name} has positions out of range of the axis of {size}")
    return positions if len(set(positions.tolist())) == len(positions) else None


def _record_grid(op: Op, x: Tensor, written: dict[int, int]) -> None:
    """Record that index tuples depend on the axes of x that they write to, given for the axes of the tuples."""

    def rewrite(keep: KeepMask, old: Array) -> Array:
        new = old.copy()
        for d, k in written.items():
            mask = keep.mask(x[k])
            positions = np.where(new[..., k] < 0, new[..., k] + len(mask), new[..., k])
            after = positions_after(mask, positions)
            surviving = mask[np.moveaxis(positions, d, 0).reshape(positions.shape[d], -1)[:, 0]]
            new[..., k] = np.where(new[..., k] < 0, after - int(mask.sum()), after)
            new = np.compress(surviving, new, axis=d)
        return new

    op.use_size(1, [x[k] for k in written.values()], rewrite)


@rule("OneHot")
def one_hot(op: Op) -> None:
    """Add a frozen axis of the size of the depth."""
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
    """Select along one axis by a condition; the others pass."""
    x, shape = op.input(0), op.outputs[0].value.shape
    if "axis" not in op.call.attributes or shape is None:
        raise GiveUp(f"{op.name} flattens its input")
    axis = op.get("axis") % x.rank
    op.freeze(x[axis], "chooses along this axis")
    op.freeze(op.input(1)[0], "is a condition")
    out = list(x.axes or [])
    out[axis] = op.frozen(shape[axis], "chooses along this axis")
    op.set(out)


@rule("NonZero")
def non_zero(op: Op) -> None:
    """Return the positions, one row for each axis, of all elements that are not zero."""
    op.freeze_all(op.input(0).axes or [], "returns positions on this axis")
    op.set([op.frozen(size, "lists positions") for size in op.sizes()])


@rule("Unique")
def unique(op: Op) -> None:
    """Sort the distinct elements, or the distinct slices along an axis, which all other axes decide."""
    op.freeze_all(op.input(0).axes or [], "compares what lies along this axis")
    for output, tensor in enumerate(op.outputs):
        if tensor.value.name:
            op.set([op.frozen(size, "lists what is distinct") for size in op.sizes(output)], output)


@rule("ReverseSequence")
def reverse_sequence(op: Op) -> None:
    """Reverse one axis up to a length for each sample."""
    x = op.input(0)
    for axis in (op.get("time_axis", 0), op.get("batch_axis", 1)):
        op.freeze(x[axis], "reverses sequences")
    op.freeze(op.input(1)[0], "takes sequence lengths per sample")
    op.set(x.axes or [])


@rule("Trilu")
@rule("Trilu", domain=MICROSOFT)
def trilu(op: Op) -> None:
    """Select a triangle of the last two axes."""
    x = op.input(0)
    op.freeze_all((x.axes or [])[-2:], "cuts a triangle out of this axis")
    op.set(x.axes or [])
