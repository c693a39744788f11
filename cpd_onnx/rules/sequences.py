"""Rules of sequences of tensors whose number of elements is known: each element keeps its own channels."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.ir.model import Array
from cpd_onnx.rules.api import GiveUp, Op, Tensor, rule
from cpd_onnx.rules.shape import join


@rule("SequenceConstruct")
def construct(op: Op) -> None:
    """Collect tensors, whose channels do not meet."""
    op.set_elements([op.input(slot) for slot in range(len(op.inputs))])


@rule("SequenceEmpty")
def empty(op: Op) -> None:
    """Return a sequence without elements."""
    op.set_elements([])


@rule("SequenceInsert")
def insert(op: Op) -> None:
    """Insert a tensor before a position, by default at the end."""
    elements, given = op.elements(0), op.static_operand(2)
    place = len(elements) if given is None else int(given.item())
    op.set_elements([*elements[:place], op.input(1), *elements[place:]])


@rule("SequenceErase")
def erase(op: Op) -> None:
    """Leave one element out, by default the last."""
    elements, given = op.elements(0), op.static_operand(1)
    place = (-1 if given is None else int(given.item())) % max(1, len(elements))
    op.accounted += [axis for tensor in elements for axis in tensor.axes or []]
    op.set_elements([*elements[:place], *elements[place + 1 :]])


@rule("SequenceAt")
def at(op: Op) -> None:
    """Return the element at a constant position; nothing is said about the others."""
    elements, given = op.elements(0), op.static_operand(1)
    assert given is not None
    op.accounted += [axis for tensor in elements for axis in tensor.axes or []]
    op.set(elements[int(given.item())].axes or [])


@rule("SequenceLength")
def length(op: Op) -> None:
    """Count the elements, of which pruning removes none."""
    op.accounted += [axis for tensor in op.elements(0) for axis in tensor.axes or []]
    op.set([])


@rule("ConcatFromSequence")
def concat_from_sequence(op: Op) -> None:
    """Concatenate the elements along an axis, or stack them along a new one; their other axes unite."""
    elements = op.elements(0)
    if not elements:
        raise GiveUp(f"{op.name} has no elements")
    if not op.get("new_axis", 0):
        join(op, elements)
        return
    axes = list(elements[0].axes or [])
    for other in elements[1:]:
        for left, right in zip(axes, other.axes or [], strict=True):
            op.unite(left, right)
    axes.insert(op.get("axis") % (len(axes) + 1), op.frozen(len(elements), "stacks a sequence along this axis"))
    op.set(axes)


@rule("SplitToSequence")
def split_to_sequence(op: Op) -> None:
    """Split one axis into consecutive pieces: of given sizes, of one size, or into its single indices."""
    x, pieces = op.input(0), op.expected_elements()
    axis, operand = op.get("axis", 0) % x.rank, op.static_operand(1)
    others = list(x.axes or [])
    if operand is None:
        op.freeze(x[axis], "takes this axis apart")
        single = [np.zeros(1, np.int64)] if op.get("keepdims", 1) else []
        op.set_elements([Tensor(piece, [*others[:axis], *single, *others[axis + 1 :]]) for piece in pieces])
        return
    ends = np.cumsum([(piece.shape or ())[axis] for piece in pieces])
    parts = np.split(x[axis], ends[:-1])
    for part in parts:
        if len(part) == 1:
            op.freeze(part, "leaves one index of this axis")
    op.accounted.append(x[axis])
    op.set_elements(
        [Tensor(piece, [*others[:axis], part, *others[axis + 1 :]]) for piece, part in zip(pieces, parts, strict=True)]
    )
    if operand.ndim:
        op.use_shape(1, parts)
    else:
        op.use_size(1, parts, _sizes_of(parts))


def _sizes_of(parts: list[Axis]) -> Any:
    """Return the rewrite of one size for all pieces into the size of each."""

    def sizes(keep: KeepMask, old: Array) -> Array:
        return np.asarray([keep.count(part) for part in parts], old.dtype)

    return sizes
