"""Rules of operators that rearrange axes: reshaping, permuting, concatenating, splitting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cpd_onnx.algebra.atoms import Axis, is_uniform
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.ops.sizes import divided, floor, is_constant, product
from cpd_onnx.rules.api import DROP, GiveUp, Op, Tensor, rule
from cpd_onnx.rules.elementwise import MICROSOFT, freeze_rest
from cpd_onnx.shapes.values import Value


@rule("Reshape")
def reshape(op: Op) -> None:
    """Merge and split runs of axes whose products of sizes match on both sides."""
    out = regroup(op)
    if "shape" in op.call.attributes:
        op.use_size(
            "shape", out, lambda keep, old: [keep.count(a) if s > 0 else s for a, s in zip(out, old, strict=True)]
        )
    else:
        shape = op.value(1)
        if shape is None or shape.value is None:
            raise GiveUp(f"the target shape of {op.name} is computed from data")
        op.freeze_operands(1)
        op.use_shape(1, out)
    op.set(out)


@rule("Flatten", "Unsqueeze")
@rule("ExpandDims", domain=MICROSOFT)
def reshape_freely(op: Op) -> None:
    """Reshape without an operand that names a size."""
    op.freeze_operands(1)
    op.set(regroup(op))


@rule("Squeeze")
def squeeze(op: Op) -> None:
    """Remove axes of size one. Where the node names none, they are named once another axis shrinks to one.

    That is impossible where an axis of open size may be one, too: then two indices of each axis are frozen.
    """
    op.freeze_operands(1)
    out = regroup(op)
    op.set(out)
    if op.has(1) or "axes" in op.call.attributes:
        return
    x = op.input(0)
    if x.value.extents is not None:
        for axis in out:
            if not op.atoms.all_frozen(axis):
                op.freeze(axis[[0, -1]], "would remove this axis if only one index of it survived")
        return
    ones = [i for i, size in enumerate(x.shape) if size == 1]

    def axes(keep: KeepMask, old: Any) -> Any:
        if all(keep.count(axis) > 1 for axis in out):
            return None
        return ones if op.opset < 13 else np.asarray(ones, np.int64)

    op.use_size("axes" if op.opset < 13 else 1, out, axes)


def regroup(op: Op) -> list[Axis]:
    """Return the axes of the output of a reshape."""
    x, y = op.input(0), op.outputs[0].value
    if y.shapes is None or y.has_placeholder:
        raise op.unknown_shape()
    if x.value.shapes is None:
        raise op.unknown_shape(0)
    out: list[Axis] = []
    for before, after in _runs(x.value.shapes, y.shapes):
        axes = [x[i] for i in before]
        _freeze_what_differs(op, x.value, y, axes, before, after)
        out += _regroup_run(op, axes, [y.shapes[0][i] for i in after])
    return out


def _freeze_what_differs(op: Op, x: Value, y: Value, axes: list[Axis], before: range, after: range) -> None:
    """Freeze the axes of a run whose division depends on the sizes of the inputs.

    It does not where both sides are products of the same sizes in the same order.
    """
    if x.extents is None and y.extents is None:
        return
    assert x.sizes is not None
    assert y.sizes is not None
    old, new = ([sizes[i] for i in places] for sizes, places in ((x.sizes, before), (y.sizes, after)))
    if not all(map(is_constant, (*old, *new))) and not _refine(old, new):
        op.freeze_all(axes, "divides this axis differently at other sizes of the input")


def _refine(old: list[Any], new: list[Any]) -> bool:
    """Return whether two lists of sizes are products of one list of factors in order, up to constants at the ends."""
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
    """Return the finest division of the axes into consecutive runs of equal size, under all bindings."""
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
        # The rest on one side alone can only be axes of size one.
        if i == len(old[0]) or j == len(new[0]):
            runs.append((range(i, len(old[0])), range(j, len(new[0]))))
            break
    return runs


def _regroup_run(op: Op, axes: list[Axis], sizes: list[int]) -> list[Axis]:
    """Merge `axes` and split the result into `sizes`; frozen axes at either end are never expanded."""
    if len(axes) == len(sizes) == 1:
        return axes
    wide = [(k, s) for k, s in enumerate(sizes) if s != 1]
    axes = [a for a in axes if len(a) != 1]
    found = {k: np.zeros(1, np.int64) for k, s in enumerate(sizes) if s == 1}
    if not axes or math.prod(sizes) == 0:
        return [found.get(k, op.frozen(s)) for k, s in enumerate(sizes)]
    axes = _unrepeated(axes, [s for _, s in wide])
    inner, tail = _strip(op, axes[::-1], [s for _, s in wide][::-1])
    inner, tail = inner[::-1], tail[::-1]
    core_sizes = [core for core, _, _ in tail]
    core_axes, head = _strip(op, inner, core_sizes)
    flat = op.atoms.product(*core_axes) if core_axes else np.zeros(1, np.int64)
    parts = op.unmerge(flat, [core for core, _, _ in head])
    for part, (_, before, leading), (_, after, trailing), (k, _) in zip(parts, head, tail, wide, strict=True):
        part = part if leading is None else leading
        part = op.atoms.stretched(part, len(part) * before) if before > 1 else part
        part = op.atoms.repeated(part, after) if after > 1 else part
        found[k] = part if trailing is None else trailing
    return [found[k] for k in range(len(sizes))]


def _unrepeated(axes: list[Axis], sizes: list[int]) -> list[Axis]:
    """Split a last axis that repeats each index, the result of merging with frozen axes, into its factors.

    GroupNorm, as exporters write it, merges channels with pixels; expanding them would take much memory.
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
    """Remove the leading frozen axes from both sides of a reshape.

    Returns the other axes, and for each output axis its remaining size, the factor removed from it, and its frozen
    atoms if nothing remains.
    """
    first = next((i for i, axis in enumerate(axes) if not op.atoms.all_frozen(axis)), len(axes))
    frozen = math.prod(len(axis) for axis in axes[:first])
    like = axes[0] if first else None
    axes = axes[first:]
    result: list[tuple[int, int, Axis | None]] = []
    for size in sizes:
        if frozen > 1 and frozen % size == 0:
            frozen //= size
            assert like is not None
            result.append((1, 1, op.atoms.stretched(like, size)))
        elif frozen > 1 and size % frozen == 0:
            result.append((size // frozen, frozen, None))
            frozen = 1
        else:
            if frozen > 1:
                assert like is not None
                axes = [op.atoms.stretched(like, frozen), *axes]
                frozen = 1
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
    """Each output channel comes from a block of channels: interleaved (CRD) or strided (DCR)."""
    x, block = op.input(0), op.get("blocksize") ** 2
    channels = op.atoms.fresh(x.shape[1] // block)
    crd = op.get("mode", "DCR") == "CRD"
    op.unite(x[1], op.atoms.repeated(channels, block) if crd else op.atoms.stretched(channels, x.shape[1]))
    op.set([x[0], channels, *_spatial(op, x)])


@rule("SpaceToDepth")
def space_to_depth(op: Op) -> None:
    """Repeat the channels, once for each position in a block."""
    x, block = op.input(0), op.get("blocksize") ** 2
    op.set([x[0], op.atoms.stretched(x[1], len(x[1]) * block), *_spatial(op, x)])


@rule("Col2Im")
def columns_to_image(op: Op) -> None:
    """Each output channel sums a block of consecutive channels, one for each position in the window."""
    x, block = op.input(0), op.static_operand(2)
    assert block is not None
    op.freeze_operands(1)
    op.freeze(x[2], "places windows along this axis")
    channels = op.atoms.fresh(len(x[1]) // math.prod(block.tolist()))
    op.unite(x[1], op.atoms.repeated(channels, math.prod(block.tolist())))
    op.set([x[0], channels, *(op.frozen(size, "places windows along this axis") for size in op.sizes()[2:])])


def _spatial(op: Op, x: Tensor) -> list[Axis]:
    """Freeze the spatial axes, and return those of the output."""
    shape = op.sizes()
    return [op.along(x[i], shape[i], "moves blocks of this axis") for i in range(2, x.rank)]


@rule("Concat")
def concat(op: Op) -> None:
    """Concatenate along one axis; the others unite."""
    join(op, [op.input(i) for i in range(len(op.inputs))])


@rule("QLinearConcat", domain=MICROSOFT)
def quantized_concat(op: Op) -> None:
    """Concat of the tensors at inputs 2, 5, 8, …; the rest are scales and zero points."""
    slots = range(2, len(op.inputs), 3)
    freeze_rest(op, 0, but=slots)
    join(op, [op.input(slot) for slot in slots])


def join(op: Op, parts: Sequence[Tensor]) -> None:
    """Set the output to the concatenation of `parts` along `axis`; their other axes unite."""
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
    """Split one axis into consecutive pieces."""
    x = op.input(0)
    axis = op.get("axis", 0) % x.rank
    op.freeze_operands(1)
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
        _record_pieces(op, pieces)


def _record_pieces(op: Op, pieces: list[Axis]) -> None:
    """Record the sizes of the pieces, which are stored once they differ from the default."""

    def default(keep: KeepMask) -> bool:
        counts = [keep.count(piece) for piece in pieces]
        if "num_outputs" not in op.call.attributes:
            return len(set(counts)) == 1
        chunk = -(-sum(counts) // len(counts))
        return all(c == min(chunk, sum(counts) - i * chunk) for i, c in enumerate(counts))

    def sizes(keep: KeepMask, old: Any) -> Any:
        counts = [keep.count(piece) for piece in pieces]
        if old is None and default(keep):
            return None
        return counts if op.opset < 13 else np.asarray(counts, np.int64)

    if op.has(1):
        op.use_shape(1, pieces)
        return
    op.use_size("split" if op.opset < 13 else 1, pieces, sizes)
    if "num_outputs" in op.call.attributes:
        op.use_size("num_outputs", pieces, lambda keep, old: None if default(keep) else DROP)
