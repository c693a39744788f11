"""Shape functions of the most common operators, about ten times as fast as onnx's shape inference of a single node.

Special cases (unknown sizes, automatic padding, ceiling mode, broadcasting by attribute) are left to onnx: a function
returns None for a case that it does not cover.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from cpd_onnx.ops.evaluate import Call, axes_operand, flattened_from, register_in, slice_ranges, sliced_axes
from cpd_onnx.ops.sizes import as_size, floor, is_constant, largest, least, product

Dims: TypeAlias = tuple[Any, ...]
"""A shape: integers, symbolic sizes, or None for an unknown size."""
Function: TypeAlias = Callable[[Call, Sequence[Any], Sequence[Any]], "Dims | list[Dims | None] | None"]
"""A shape function: returns the shape of the first output, or a list for all outputs, from the call and the shapes and
values of its inputs; None for a case that it does not cover. Absent inputs may raise, as in arithmetic with None."""

Values: TypeAlias = Sequence[Any]
"""Elements of the inputs; None for unknown ones."""
STANDARD: dict[tuple[str, str], Function] = {}
"""Shape functions by (domain, operator), for numeric and symbolic sizes."""
OPEN: dict[tuple[str, str], Function] = {}
"""Shape functions by (domain, operator) that are used for symbolic sizes only; numeric ones are left to onnx."""
_TO_THE_END = 2**31 - 1
"""Smallest slice end that means "to the end": exporters write the maximum of int32 or int64."""


def of_domain(table: dict[tuple[str, str], Function], domain: str, *names: str) -> Callable[[Function], Function]:
    """Return a decorator that registers a shape function for the given operators of a domain."""
    return register_in(table, *((domain, name) for name in names))


_plain = functools.partial(of_domain, STANDARD, "")
_open = functools.partial(of_domain, OPEN, "")


def _are_from(low: int, sizes: Sequence[Any]) -> bool:
    """Whether all sizes that are numbers are at least `low`."""
    return all(size >= low for size in sizes if is_constant(size))


@_plain(
    "Abs", "BatchNormalization", "Cast", "Ceil", "Clip", "Cos", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu",
    "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LayerNormalization",
    "LeakyRelu", "Log", "LogSoftmax", "MeanVarianceNormalization", "Mish", "Neg", "Not", "PRelu", "Reciprocal", "Relu",
    "Selu", "Sigmoid", "Sign", "Sin", "Softmax", "Softplus", "Sqrt", "Tanh",
)  # fmt: skip  # a table
def _same(call: Call, shapes: Sequence[Dims], values: Values) -> Dims:
    return shapes[0]


@_plain(
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mul", "Or", "Pow",
    "Sub", "Sum", "Where", "Xor",
)  # fmt: skip  # a table
def _broadcast(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    return broadcast(*shapes) if call.opset >= 7 else None


def broadcast(*shapes: Dims) -> Dims | None:
    """Return the shape to which several shapes broadcast; None if they are incompatible.

    Of two different symbolic sizes, one that is never smaller is the result wherever they are compatible: what is cut
    from a table, at most its length, meets the text that it was cut for.
    """
    first = shapes[0]
    if all(shape == first for shape in shapes):
        return first
    rank = max(map(len, shapes))
    result = [1] * rank
    for shape in shapes:
        for axis, size in enumerate(shape, start=rank - len(shape)):
            here = result[axis]
            if size == 1 or here == size:
                continue
            if here != 1 and (None in (here, size) or (is_constant(here) and is_constant(size))):
                return None
            result[axis] = size if here == 1 else largest(here, size)
            if result[axis] not in (here, size):
                return None
    return tuple(result)


@_plain("MatMul")
def _matmul(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    return _multiplied(*shapes)


def _multiplied(a: Dims, b: Dims) -> Dims | None:
    if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
        return None
    return product_of(a, b)


def product_of(a: Sequence[Any], b: Sequence[Any]) -> Dims | None:
    """Return the shape of a batched matrix product; the inner sizes are assumed to match."""
    batch = broadcast(tuple(a[:-2]), tuple(b[:-2]))
    return None if batch is None or len(a) < 2 or len(b) < 2 else (*batch, a[-2], b[-1])


@_plain("Gemm")
def _gemm(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    a, b = (s[::-1] if call.get(t, 0) else s for s, t in zip(shapes, ("transA", "transB"), strict=False))
    return (a[0], b[1]) if len(a) == len(b) == 2 and a[1] == b[0] else None


@_plain("Conv", "MaxPool", "AveragePool")
def _window(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    return _convolved(call, shapes[0], shapes[1] if len(shapes) > 1 else None)


def _convolved(call: Call, data: Dims, kernel: Dims | None) -> Dims | None:
    window = call.get("kernel_shape") or (kernel and kernel[2:])
    if not window:
        return None
    if len(data) != len(window) + 2 or (kernel is not None and data[1] != kernel[1] * call.get("group", 1)):
        return None
    sizes = pooled_windows(call, data[2:], window)
    if sizes is None or not _are_from(1, sizes):
        return None
    return (data[0], data[1] if kernel is None else kernel[0], *sizes)


def pooled_windows(call: Call, sizes: Sequence[Any], window: Sequence[Any]) -> list[Any] | None:
    """Return the spatial sizes after a sliding window that may be rounded up.

    None where a window might then begin in the padding: runtimes differ in whether they count it.
    """
    if not call.get("ceil_mode", 0):
        return windows(call, sizes, window)
    rank = len(window)
    pads, strides, spans = _explicit(call, window)
    if call.get("auto_pad", "NOTSET") != "NOTSET" or any(spans[i] < strides[i] + pads[i + rank] for i in range(rank)):
        return None
    return [1 - (spans[i] - sizes[i] - pads[i] - pads[i + rank]) // strides[i] for i in range(rank)]


def windows(call: Call, sizes: Sequence[Any], window: Sequence[Any]) -> list[Any]:
    """Return the spatial sizes after a sliding window with explicit or automatic pads."""
    rank, auto = len(window), call.get("auto_pad", "NOTSET")
    pads, strides, spans = _explicit(call, window)
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        return [(size + stride - 1) // stride for size, stride in zip(sizes, strides, strict=True)]
    if auto == "VALID":
        pads = [0] * (2 * rank)
    return [(sizes[i] + pads[i] + pads[i + rank] - spans[i]) // strides[i] + 1 for i in range(rank)]


def _explicit(call: Call, window: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], list[Any]]:
    """Return the pads, the strides, and how far the windows reach with their dilations."""
    rank = len(window)
    dilations = call.get("dilations") or [1] * rank
    spans = [d * (w - 1) + 1 for w, d in zip(window, dilations, strict=True)]
    return call.get("pads") or [0] * (2 * rank), call.get("strides") or [1] * rank, spans


@_plain("Resize")
def _resized(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    # By scales, in float32 like onnxruntime; onnx returns one less if the float32 product is rounded up.
    place = 1 if call.opset < 11 else 2
    scales = values[place] if len(values) == place + 1 else None
    is_plain = call.get("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
    if scales is None or scales.dtype != np.float32 or not is_plain or "axes" in call.attributes:
        return None
    if scales.size != len(shapes[0]) or not all(map(is_constant, shapes[0])):
        return None
    return tuple(int(np.float32(size) * scale) for size, scale in zip(shapes[0], scales, strict=True))


@_plain("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    return pooled(shapes[0]) if len(shapes[0]) > 2 else None


def pooled(shape: Dims) -> Dims:
    """Return the shape after global pooling: one element for each channel."""
    return (*shape[:2], *[1] * (len(shape) - 2))


@_plain("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum")
def _reduce(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    if len(values) > 1 and values[1] is None:
        return None
    axes = axes_operand(call, values[1:])
    if not axes:
        return None
    rank = len(shapes[0])
    removed = {axis + rank if axis < 0 else axis for axis in axes}
    if call.get("keepdims", 1) == 1:
        return tuple(1 if axis in removed else size for axis, size in enumerate(shapes[0]))
    return tuple(size for axis, size in enumerate(shapes[0]) if axis not in removed)


@_plain("Transpose")
def _transpose(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    perm = call.get("perm") or range(len(shapes[0]))[::-1]
    return tuple(shapes[0][axis] for axis in perm) if len(perm) == len(shapes[0]) else None


@_plain("Reshape")
def _reshape(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    wanted = call.get("shape") if len(values) < 2 else values[1]
    sizes = [-1] if wanted is None else [as_size(size) for size in wanted]
    if wanted is None or (call.get("allowzero", 0) and 0 in sizes):
        return None
    sizes = [shapes[0][axis] if size == 0 else size for axis, size in enumerate(sizes)]
    total = product(shapes[0])
    if sizes.count(-1) == 1:
        rest = -product(sizes)
        sizes[sizes.index(-1)] = total // rest
    # For symbolic sizes an equal number of elements is taken for granted, since the operator requires it.
    fits = not all(map(is_constant, (total, *sizes))) or product(sizes) == total
    return tuple(sizes) if fits and _are_from(0, sizes) else None


@_plain("Flatten")
def _flatten(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    axis = flattened_from(call, len(shapes[0]))
    return (product(shapes[0][:axis]), product(shapes[0][axis:])) if 0 <= axis <= len(shapes[0]) else None


@_plain("Concat")
def _concat(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    axis = call.get("axis", 1) % len(shapes[0])
    rest = {(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}
    return joined(shapes, axis) if len(rest) == 1 else None


def joined(shapes: Sequence[Dims], axis: int) -> Dims:
    """Return the shape of a concatenation along an axis."""
    first, axis = shapes[0], axis % len(shapes[0])
    return (*first[:axis], sum(shape[axis] for shape in shapes), *first[axis + 1 :])


@_plain("Gather")
def _gather(call: Call, shapes: Sequence[Dims], values: Values) -> Dims:
    axis = call.get("axis", 0) % len(shapes[0])
    return (*shapes[0][:axis], *shapes[1], *shapes[0][axis + 1 :])


@_plain("GatherElements")
def _gather_elements(call: Call, shapes: Sequence[Dims], values: Values) -> Dims:
    return shapes[1]


@_plain("Unsqueeze")
def _unsqueeze(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    axes = axes_operand(call, values[1:])
    if not axes:
        return None
    rank = len(shapes[0]) + len(axes)
    added, rest = {axis % rank for axis in axes}, iter(shapes[0])
    return tuple(1 if axis in added else next(rest) for axis in range(rank)) if len(added) == len(axes) else None


@_plain("Squeeze")
def _squeeze(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    axes = axes_operand(call, values[1:])
    if not axes:
        return None
    removed = {axis % len(shapes[0]) for axis in axes}
    if any(shapes[0][axis] != 1 for axis in removed):
        return None
    return tuple(size for axis, size in enumerate(shapes[0]) if axis not in removed)


@_plain("Expand")
def _expand(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    return None if values[1] is None else broadcast(shapes[0], tuple(values[1].tolist()))


@_plain("ConstantOfShape")
def _constant_of_shape(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    return None if values[0] is None or not _are_from(0, values[0].tolist()) else tuple(values[0].tolist())


@_plain("Slice")
def _slice(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    sizes: list[Any] = list(shapes[0])
    if call.opset >= 10 and any(value is None for value in values[1:]):
        axes = None if any(shape is None for shape in shapes[1:]) else sliced_axes(len(sizes), shapes[1:], values[1:])
        return None if axes is None else tuple(None if axis in axes else size for axis, size in enumerate(sizes))
    for axis, start, end, step in slice_ranges(call, len(sizes), values[1:]):
        if all(map(is_constant, (sizes[axis], start, end))):
            sizes[axis] = len(range(*slice(start, end if end > -(2**62) else None, step).indices(sizes[axis])))
        else:
            first, last = (_place(position, sizes[axis]) for position in (start, end))
            is_known = step > 0 and first is not None and last is not None
            sizes[axis] = -(-largest(last - first, 0) // step) if is_known else None
    return tuple(sizes)


def _place(position: Any, size: Any) -> Any:
    """Return a start or end of a slice, clamped to an axis of symbolic size; None if its sign is not known."""
    if is_constant(position):
        if position >= _TO_THE_END:
            return size
        return least(position, size) if position >= 0 else largest(size + position, 0)
    return least(position, size) if least(position, 0) == 0 else None


@_open("QLinearConv")
def _quantized_window(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    return _convolved(call, shapes[0], shapes[3])


@_open("ConvInteger")
def _integer_window(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    return _convolved(call, *shapes[:2])


@_open("QLinearMatMul")
def _quantized_matmul(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    return _multiplied(shapes[0], shapes[3])


@_open("MatMulInteger")
def _integer_matmul(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    return _multiplied(*shapes[:2])


@_open("Pad")
def _pad(call: Call, shapes: Sequence[Dims], values: Values) -> Dims:
    sizes = list(shapes[0])
    pads = call.get("pads") if len(values) < 2 else values[1].tolist()
    axes = values[3].tolist() if len(values) > 3 and values[3] is not None else range(len(sizes))
    for place, axis in enumerate(axes):
        sizes[axis] = sizes[axis] + pads[place] + pads[place + len(axes)]
    return tuple(sizes)


@_open("Tile")
def _tile(call: Call, shapes: Sequence[Dims], values: Values) -> Dims:
    return tuple(size * times for size, times in zip(shapes[0], values[1].tolist(), strict=True))


@_open("Resize", "Upsample")
def _resize(call: Call, shapes: Sequence[Dims], values: Values) -> Dims | None:
    if call.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return None
    axes = call.get("axes") or range(len(shapes[0]))
    given = [None if value is None else value.ravel().tolist() for value in values[1:]]
    sizes = list(shapes[0])
    if len(given) > 2 and given[2]:
        wanted = [given[2][place] for place in range(len(axes))]
    else:
        scales: Sequence[Any] = call.get("scales") or (given[0] if len(given) == 1 else given[1]) or ()
        wanted = [floor(sizes[axis] * scale) for axis, scale in zip(axes, scales, strict=True)]
    for axis, size in zip(axes, wanted, strict=True):
        sizes[axis] = size
    return tuple(sizes)


@_open("TopK")
def _top_k(call: Call, shapes: Sequence[Dims], values: Values) -> Dims:
    sizes, axis = list(shapes[0]), call.get("axis", -1)
    sizes[axis] = call.get("k") if len(values) < 2 else values[1].ravel().tolist()[0]
    return tuple(sizes)


@_open("Range")
def _range(call: Call, shapes: Sequence[Dims], values: Values) -> Dims:
    start, limit, step = (value.item() for value in values)
    return (largest(-((start - limit) // step), 0),)


@_open("OneHot")
def _one_hot(call: Call, shapes: Sequence[Dims], values: Values) -> Dims:
    sizes, axis = list(shapes[0]), call.get("axis", -1) % (len(shapes[0]) + 1)
    sizes.insert(axis, values[1].item())
    return tuple(sizes)


@_plain("Split")
def _split(call: Call, shapes: Sequence[Dims], values: Values) -> list[Dims | None] | None:
    count = call.outputs
    axis = call.get("axis", 0) % len(shapes[0])
    size = shapes[0][axis]
    if len(values) > 1:
        parts = None if values[1] is None else values[1].tolist()
    elif "split" in call.attributes or is_constant(size):
        chunk = -(-size // count)
        parts = call.get("split") or [min(chunk, size - index * chunk) for index in range(count)]
    else:
        return None
    if parts is None or len(parts) != count or sum(parts) != size or not _are_from(0, parts):
        return None
    return [(*shapes[0][:axis], part, *shapes[0][axis + 1 :]) for part in parts]
