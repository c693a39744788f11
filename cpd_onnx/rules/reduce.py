"""Rules of operators that reduce over axes, slide along them, or select by value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.ops.evaluate import axes_operand
from cpd_onnx.rules.api import GiveUp, Op, rule
from cpd_onnx.rules.elementwise import MICROSOFT, freeze_rest
from cpd_onnx.shapes.values import Value

_ONE = np.zeros(1, np.int64)
"""A frozen axis of size one."""


def _has_equal_images(counted: Value | None, output: Value | None) -> bool:
    """Return whether an output has images of the same size as those that positions count through, if any."""
    if counted is None:
        return True
    if counted.sizes is None or output is None or output.sizes is None:
        return False
    return counted.sizes[2:] == output.sizes[2:]


POSITION_USERS: dict[tuple[str, int], Callable[[Value | None, Value | None], bool]] = {
    ("MaxUnpool", 1): _has_equal_images,
    ("Shape", 0): lambda counted, output: True,
}
"""Uses of positions, by (operator, input slot), with a function that returns whether the positions remain valid there.
It takes the tensor whose images they count through (None for positions on the axis alone), and the first output."""


@rule(
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)  # fmt: skip  # a table
def reduction(op: Op) -> None:
    """Reduce some axes; the others pass."""
    x = op.input(0)
    axes = axes_operand(op.call, [op.static_operand(1)] if op.has(1) else [])
    if not axes and op.get("noop_with_empty_axes", 0):
        op.set(x.axes or [])
        return
    reduced = {a % x.rank for a in axes} if axes else set(range(x.rank))
    for axis in reduced:
        op.reduce(x[axis])
    keep = op.get("keepdims", 1) == 1
    out = [_ONE if i in reduced else axis for i, axis in enumerate(x.axes or []) if keep or i not in reduced]
    op.set(out)


@rule("Det")
def determinant(op: Op) -> None:
    """Freeze the rows and columns of the matrices; the axes before them pass."""
    axes = op.input(0).axes or []
    for axis in axes[-2:]:
        op.freeze(axis, "takes the determinant over this axis")
    op.set(axes[:-2])


@rule("Inverse", domain=MICROSOFT)
def inverse(op: Op) -> None:
    """Freeze the rows and columns of the matrices; the axes before them pass."""
    axes = op.input(0).axes or []
    op.freeze_all(axes[-2:], "inverts matrices along this axis")
    op.set(axes)


@rule("CDist", domain=MICROSOFT)
def distances(op: Op) -> None:
    """Return the distances between the rows of two matrices, summed over their columns."""
    a, b = op.input(0), op.input(1)
    op.unite(a[1], b[1])
    op.reduce(a[1])
    op.set([a[0], b[0]])


@rule("ArgMax", "ArgMin")
def argument(op: Op) -> None:
    """Freeze the axis, which the result is a position on."""
    x = op.input(0)
    axis = op.get("axis", 0) % x.rank
    op.freeze(x[axis], "returns positions on this axis")
    out = list(x.axes or [])
    out[axis : axis + 1] = [_ONE] if op.get("keepdims", 1) == 1 else []
    op.set(out)


@rule("Softmax", "LogSoftmax", "Hardmax")
def softmax(op: Op) -> None:
    """Normalise to a distribution over the axis; below opset 13 over all axes from it on."""
    is_old = op.opset < 13
    _distribution(op, op.get("axis", 1 if is_old else -1), is_old=is_old)


@rule("QLinearSoftmax", domain=MICROSOFT)
def quantized_softmax(op: Op) -> None:
    """Softmax of a quantised tensor, as in the opset that an attribute names."""
    freeze_rest(op, 1)
    _distribution(op, op.get("axis", -1), is_old=op.get("opset") < 13)


def _distribution(op: Op, axis: int, *, is_old: bool) -> None:
    x = op.input(0)
    first = axis % max(1, x.rank)
    op.freeze_all((x.axes or [])[first : None if is_old else first + 1], "normalises to a distribution over this axis")
    op.set(x.axes or [])


@rule("CumSum", "CumProd")
def cumulative(op: Op) -> None:
    """Accumulate along the axis, whose order matters."""
    x, axis = op.input(0), op.static_operand(1)
    op.freeze(x[int(axis.item()) if axis is not None else 0], "runs along this axis in order")
    op.set(x.axes or [])


@rule("DFT")
def fourier(op: Op) -> None:
    """Transform along one axis, whose order matters; the last axis holds real and imaginary parts."""
    x, shape = op.input(0), op.sizes()
    op.freeze_operands(1)
    given = op.static_operand(2) if op.opset >= 20 else np.asarray(op.get("axis", 1))
    axis = -2 if given is None else int(given.item())
    changed = {axis % x.rank: "is transformed along this axis", x.rank - 1: "holds real and imaginary parts"}
    op.set([op.along(x[i], shape[i], changed[i]) if i in changed else x[i] for i in range(x.rank)])


@rule("STFT")
def short_time_fourier(op: Op) -> None:
    """Transform windows of a signal [N, T, 1 or 2]; the signals pass, everything along them is frozen."""
    x = op.input(0)
    op.freeze_operands(1)
    op.freeze_all((x.axes or [])[1:], "is transformed along this axis")
    op.set([x[0], *(op.frozen(size, "lists the spectrum of each window") for size in op.sizes()[1:])])


@rule("NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss")
def loss(op: Op) -> None:
    """Choose the score of each label along axis 1; the other axes are those of the labels, and averaged or summed."""
    x, labels = op.input(0), op.input(1)
    freeze_rest(op, 2)
    op.freeze(x[1], "chooses the score of the label along this axis")
    rest = [x[0], *(x.axes or [])[2:]]
    for axis, other in zip(rest, labels.axes or [], strict=True):
        op.unite(axis, other)
    is_reduced = op.get("reduction", "mean") != "none"
    if is_reduced:
        for axis in rest:
            op.reduce(axis)
    op.set([] if is_reduced else rest)
    op.set(x.axes or [], 1)


@rule("NonMaxSuppression")
def non_max_suppression(op: Op) -> None:
    """Return which boxes of which class and image overlap none of a higher score."""
    for slot in (0, 1):
        op.freeze_all(op.axes(slot), "returns positions on this axis")
    op.freeze_operands(2)
    op.set([op.frozen(size, "lists positions") for size in op.sizes()])


@rule("TopK")
def top_k(op: Op) -> None:
    """Select along one axis, which is frozen."""
    x = op.input(0)
    axis = op.get("axis", -1) % x.rank
    op.freeze(x[axis], "chooses along this axis")
    freeze_rest(op, 1)
    for output, tensor in enumerate(op.outputs):
        if not tensor.value.name:
            continue
        if tensor.value.shape is None:
            raise GiveUp(f"the number of choices of {op.name} is not known")
        out = list(x.axes or [])
        out[axis] = op.frozen(tensor.value.shape[axis], "chooses along this axis")
        op.set(out, output)


@rule("MaxPool", "AveragePool", "LpPool")
def pool(op: Op) -> None:
    """Slide over the spatial axes; batch and channels pass. Positions of maxima count through all axes."""
    _slide(op)
    if len(op.outputs) > 1 and op.outputs[1].value.name:
        op.positions(op.input(0)[1], 1, op.input(0).value)


@rule("QLinearAveragePool", domain=MICROSOFT)
def quantized_pool(op: Op) -> None:
    """AveragePool of a quantised tensor, whose scales are for the whole tensor."""
    freeze_rest(op, 1)
    _slide(op, channel=-1 if op.get("channels_last", 0) else 1)


@rule("NhwcMaxPool", domain=MICROSOFT)
def pool_channels_last(op: Op) -> None:
    """MaxPool with the channels on the last axis."""
    _slide(op, channel=-1)


@rule("MaxpoolWithMask", domain=MICROSOFT)
def masked_pool(op: Op) -> None:
    """MaxPool of the elements that a mask of one image, shared by all channels, does not hide."""
    x, mask = op.input(0), op.input(1)
    if set(mask.shape[:2]) != {1}:
        op.freeze_all((x.axes or [])[:2], "reads its mask at an offset that depends on the channel")
    op.freeze_all(mask.axes or [], "takes its mask as a whole")
    _slide(op)


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(op: Op) -> None:
    """Reduce all axes after the second, which may hold channels (LayerNorm as exported by tf2onnx)."""
    x = op.input(0)
    for axis in (x.axes or [])[2:]:
        op.reduce(axis)
    op.set([*(x.axes or [])[:2], *([_ONE] * (x.rank - 2))])


@rule("QLinearGlobalAveragePool", domain=MICROSOFT)
def quantized_global_pool(op: Op) -> None:
    """GlobalAveragePool with the channels last or on axis 1."""
    x = op.input(0)
    freeze_rest(op, 1)
    last = op.get("channels_last", 0)
    spatial = range(1, x.rank - 1) if last else range(2, x.rank)
    for axis in spatial:
        op.reduce(x[axis])
    op.set([_ONE if i in spatial else axis for i, axis in enumerate(x.axes or [])])


@rule("MaxUnpool")
def max_unpool(op: Op) -> None:
    """Write values to the positions of their maxima; the positions share batch and channels with the values."""
    x, indices = op.input(0), op.input(1)
    for axis, (left, right) in enumerate(zip(x.axes or [], indices.axes or [], strict=True)):
        op.unite(left, right)
        if axis > 1:
            op.freeze(left, "places values along this axis")
    out = [*(x.axes or [])[:2], *_output_spatial(op, "places values along this axis")]
    if op.has(2):
        op.use_shape(2, out)
        op.freeze_operands(2)
    op.set(out)


@rule("GridSample")
@rule("GridSample", domain=MICROSOFT)
def grid_sample(op: Op) -> None:
    """Sample the spatial axes at the coordinates of a grid (N, …, coordinates)."""
    x, grid = op.input(0), op.input(1)
    op.freeze_all((grid.axes or [])[1:], "takes the grid as a whole")
    op.unite(x[0], grid[0])
    op.set([x[0], x[1], *_output_spatial(op, "samples along this axis")])


@rule("RoiAlign", "MaxRoiPool")
@rule("CropAndResize", domain=MICROSOFT)
def roi(op: Op) -> None:
    """Pool regions of the spatial axes; channels pass."""
    x = op.input(0)
    why = "cuts regions out of this axis"
    op.freeze(x[0], why)
    freeze_rest(op, 1)
    op.set([op.frozen(op.sizes()[0], why), x[1], *_output_spatial(op, why)])


def _slide(op: Op, *, channel: int = 1) -> None:
    """Set the outputs of a pool; an axis passes if window and stride are one along it."""
    x, shape = op.input(0), op.sizes()
    windows = zip(*(op.get(name) or [1] * (x.rank - 2) for name in ("kernel_shape", "strides")), strict=True)
    out = list(x.axes or [])
    for i, window in enumerate(windows, start=2 if channel == 1 else 1):
        if window != (1, 1) or shape[i] != x.shape[i]:
            out[i] = op.along(x[i], shape[i], "slides over this axis")
    for output in range(len(op.outputs)):
        op.set(out, output)


def _output_spatial(op: Op, why: str) -> list[Axis]:
    """Freeze the spatial axes of the first input, and return those of the output with the same reasons."""
    x, shape = op.input(0), op.sizes()
    return [op.along(x[i], shape[i], why) for i in range(2, x.rank)]
