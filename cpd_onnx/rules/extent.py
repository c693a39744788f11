"""Rules of operators that change the sizes of axes or create tensors from sizes: padding, resampling, counting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.ops.evaluate import axes_operand
from cpd_onnx.ops.sizes import is_constant
from cpd_onnx.rules.api import GiveUp, Op, Tensor, rule
from cpd_onnx.rules.elementwise import MICROSOFT
from cpd_onnx.shapes.values import Value


@rule("Pad")
@rule("Pad", domain=MICROSOFT)
def pad(op: Op) -> None:
    """Add or cut indices at the ends of axes; padding of a channel axis can be removed like any channel."""
    x = op.input(0)
    op.freeze_operands(1)
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
            out[axis] = op.along(x[axis], shape[axis], "pads this axis with copies of its own elements")
            continue
        out[axis] = _padded(op, x[axis], place, len(axes), (low, high))
    op.set(out)


def _pads(op: Op, rank: int) -> tuple[list[Any] | None, list[int]]:
    """Return the pad widths (None if they depend on data), and the axes they apply to."""
    axes = axes_operand(op.call, [op.operand(3)] if op.has(3) else [])
    axes = list(range(rank)) if axes is None else [a % rank for a in axes]
    if not op.has(1):
        return list(op.get("pads", op.get("paddings", [0] * (2 * rank)))), axes
    value = op.value(1)
    if value is None or value.value is None:
        return None, axes
    if value.value.ndim != 1:
        raise GiveUp(f"{op.name} has a matrix of pads")
    if not value.is_open:
        return value.value.ravel().tolist(), axes
    if value.expressions is None:
        return None, axes
    return value.expressions.ravel().tolist(), axes


def _is_computed(op: Op, places: Sequence[int]) -> bool:
    """Return whether pad widths are computed from sizes, so that zeros may change."""
    value = op.value(1)
    if value is None or not value.from_shape:
        return False
    origins = value.each_origin()
    return value.origins is None or not all(origins[place].is_constant for place in places)


def _padded(op: Op, axis: Axis, place: int, count: int, widths: tuple[int, int]) -> Axis:
    """Return the atoms of a padded channel axis; negative widths cut."""
    low, high = widths
    body = axis[max(0, -low) : len(axis) - max(0, -high)]
    cut = (axis[: max(0, -low)], axis[len(axis) - max(0, -high) :])
    op.accounted += [axis]
    new = tuple(op.atoms.fresh(max(0, w), may_vanish=True) for w in widths)
    if not (low or high or _is_computed(op, (place, place + count))):
        return axis
    slot: int | str = 1 if op.has(1) else "pads" if "pads" in op.call.attributes else "paddings"

    def rewrite(keep: KeepMask, old: Any) -> Any:
        pads = old.copy() if isinstance(old, np.ndarray) else list(old)
        for position, side in ((place, 0), (place + count, 1)):
            pads[position] = keep.count(new[side]) - keep.count(cut[side])
        return pads

    op.use_size(slot, [axis, *new], rewrite)
    return op.atoms.joined([new[0], body, new[1]])


@rule("Expand")
def expand(op: Op) -> None:
    """Stretch axes of size one; a stretched axis takes the channels of the tensors it is combined with."""
    x, y, shape = op.input(0), op.outputs[0].value, op.value(1)
    if y.shapes is None or shape is None or shape.value is None:
        raise GiveUp(f"the target shape of {op.name} is not known")
    op.freeze_operands(1)
    stretched = [_new_axis(op, y, axis) for axis in range(len(y.shapes[0]))]
    out = broadcast_over(op, x, stretched)
    op.set(out)
    if shape.value.size:
        op.use_shape(1, out[len(out) - shape.value.size :])


def broadcast_over(op: Op, x: Tensor, stretched: list[Axis]) -> list[Axis]:
    """Return the axes of `x` where it is not broadcast, and the stretched axes elsewhere."""
    missing = len(stretched) - x.rank
    op.accounted.extend(x.axes or [])
    return [
        axis if back < missing or (len(x[back - missing]) == 1 and len(axis) != 1) else x[back - missing]
        for back, axis in enumerate(stretched)
    ]


def _new_axis(op: Op, output: Value, axis: int) -> Axis:
    size = (output.shape or ())[axis]
    return (
        op.atoms.fresh(size) if output.has_fixed(axis) else op.frozen(size, "makes an axis that depends on the input")
    )


@rule("ConstantOfShape")
def constant_of_shape(op: Op) -> None:
    """Fill a tensor with one value; each axis takes the channels of the tensors it is combined with."""
    y, shape = op.outputs[0].value, op.value(0)
    if y.shapes is None or y.has_placeholder or shape is None or shape.value is None:
        raise GiveUp(f"the shape of {op.name} is not known")
    op.freeze_operands(0)
    out = [_new_axis(op, y, axis) for axis in range(len(y.shapes[0]))]
    op.set(out)
    if out:
        op.use_shape(0, out)


@rule("Tile")
def tile(op: Op) -> None:
    """Repeat axes; an axis of size one stretches."""
    x, y, repeats = op.input(0), op.outputs[0].value, op.value(1)
    if op.opset < 6:
        raise GiveUp(f"{op.name} had other inputs before opset 6")
    if y.shapes is None or y.has_placeholder or repeats is None or repeats.value is None:
        raise GiveUp(f"the repeats of {op.name} are not known")
    op.freeze_operands(1)
    out, counted = [], []
    for place, axis in enumerate(x.axes or []):
        if len(axis) == 1:
            out.append(_new_axis(op, y, place))
            counted.append(out[-1])
            continue
        out.append(op.atoms.stretched(axis, y.shapes[0][place]))
        counted.append(np.zeros(0, np.int64))
    op.set(out)
    op.use_shape(1, counted)


@rule("Resize", "Upsample")
def resize(op: Op) -> None:
    """Resample axes, even to their present size; axes that are not resampled (channels) pass."""
    x, y = op.input(0), op.outputs[0].value
    if y.sizes is None or x.value.sizes is None or y.has_placeholder:
        raise GiveUp(f"the output shape of {op.name} is not known")
    op.freeze_operands(1)
    axes = [axis % x.rank for axis in op.get("axes") or range(x.rank)]
    out = []
    for position in range(x.rank):
        same = x.value.sizes[position] == y.sizes[position]
        passes = same and (position not in axes or _is_unchanged(op, axes.index(position), len(axes)))
        out.append(x[position] if passes else op.along(x[position], op.sizes()[position], "resamples this axis"))
    op.set(out)
    if op.has(3):
        if op.get("keep_aspect_ratio_policy", "stretch") != "stretch":
            for axis in axes:
                op.freeze(x[axis], "keeps the ratio of this axis to others")
        op.use_shape(3, [out[a] for a in axes])


def _is_unchanged(op: Op, place: int, count: int) -> bool:
    """Return whether resampling leaves the values on an axis of unchanged size, one of `count`, unchanged.

    It does if the scale is exactly one (8 x 1.12 gives 8, too) and sampling starts at the first index.
    """
    mode = op.get("coordinate_transformation_mode", "half_pixel")
    if mode == "tf_crop_and_resize" and not _is_whole(op, place, count):
        return False
    if mode == "tf_half_pixel_for_nn" and op.get("nearest_mode", "round_prefer_floor") not in _ROUND_DOWN:
        return False
    value = op.value(2 if op.opset > 10 else 1)
    if value is not None:
        scales = value.entries
        # An empty list means no scales.
        return scales is not None and (scales.size != count or bool(scales[place] == 1))
    scales = op.get("scales")
    return bool(scales is None or scales[place] == 1)


_ROUND_DOWN = {"floor", "round_prefer_floor"}
"""Values of `nearest_mode` that sample index i at i + 0.5 (ONNX specification of Resize)."""


def _is_whole(op: Op, place: int, count: int) -> bool:
    """Return whether the region of interest is a whole axis."""
    roi = op.value(1)
    if roi is None or not roi.is_static or roi.value is None or roi.value.size != 2 * count:
        return False
    return bool(roi.value[place] == 0 and roi.value[place + count] == 1)


@rule("Size")
def size_(op: Op) -> None:
    """Return the number of elements, which others compute with; it can be restored only where inference knows it."""
    if op.outputs[0].value.values is None:
        raise GiveUp(f"the output of {op.name} is not known")
    shape_(op)


@rule("Shape")
def shape_(op: Op) -> None:
    """Return sizes, which the pruned model computes by itself."""
    data = op.given(0)
    op.accounted.extend((data and data.axes) or [])
    op.set([op.frozen(size, "lists sizes") for size in op.sizes()])


@rule("Range")
def range_(op: Op) -> None:
    """Return positions along an axis, as many as the tensors they are combined with need."""
    start, limit, step = op.input(0).value, op.input(1).value, op.input(2).value
    if not (start.is_static and limit.is_static and step.is_static):
        created(op)
        return
    op.freeze_operands(0)
    assert start.value is not None
    assert step.value is not None
    count = op.sizes()[0]
    if start.value.item() != 0 or step.value.item() != 1 or count < 2:
        op.set([op.frozen(count, "counts along this axis")])
        return
    axis = op.atoms.fresh(count)
    op.set([axis])
    op.positions(axis)
    op.use_size(1, [axis], lambda keep, old: np.asarray(keep.count(axis), old.dtype))


@rule(
    "AffineGrid", "Bernoulli", "BlackmanWindow", "EyeLike", "HammingWindow", "HannWindow", "MelWeightMatrix",
    "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
)  # fmt: skip  # a table
def created(op: Op) -> None:
    """Create a tensor from sizes and numbers; its axes are frozen."""
    op.freeze_operands(0)
    op.set([op.frozen(size) for size in op.sizes()])


@rule("UnfoldTensor", domain=MICROSOFT)
def unfold(op: Op) -> None:
    """Cut overlapping windows out of an axis, whose elements make a new last axis."""
    x, shape = op.input(0), op.sizes()
    axis, why = op.get("dim", -1) % x.rank, "cuts windows out of this axis"
    out = list(x.axes or [])
    out[axis] = op.along(x[axis], shape[axis], why)
    op.set([*out, op.frozen(shape[-1], why)])
