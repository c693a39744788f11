"""Output shapes of the commonest operators, in a tenth of the time that onnx's own inference takes for one node.

Whatever is out of the ordinary (unknown sizes, automatic padding, ceiling mode, broadcasting by attribute) is left to
onnx: a function here answers only where the answer is plain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from onnx import TensorProto

from cpd_onnx.ir.model import Array
from cpd_onnx.ops.evaluate import Call, axes_operand, slice_ranges
from cpd_onnx.ops.sizes import floor, is_constant, largest, least, product, whole
from cpd_onnx.ops.traits import traits

Dims: TypeAlias = tuple[Any, ...]
"""A shape: whole numbers, or sizes that depend on the inputs."""
Plain: TypeAlias = Callable[[Call, "Sequence[Dims]", "Sequence[Array | None]"], "Dims | None"]

_FUNCTIONS: dict[str, Plain] = {}
_FAR = 2**31 - 1
"""Slice ends from this on mean "to the end" in every exporter."""
_OPTIONAL_INPUTS = {"Clip", "Resize"}
"""Operators of which inputs after the first may be missing without a change of shape."""


def output_shapes(
    op_type: str, call: Call, shapes: Sequence[Dims | None], values: Sequence[Array | None], count: int
) -> list[Dims] | None:
    """Shapes of the `count` outputs of a node of the default domain; None where onnx has to be asked."""
    function = _FUNCTIONS.get(op_type)
    if op_type in _OPTIONAL_INPUTS:
        shapes = shapes[:1]
    if not shapes or None in shapes:
        return None
    try:
        if op_type == "Split":
            return _split(call, shapes, values, count)  # type: ignore[arg-type]  # without None
        made = function(call, shapes, values) if function is not None and count == 1 else None  # type: ignore[arg-type]
        return None if made is None else [tuple(None if size is None else whole(size) for size in made)]
    except (IndexError, NotImplementedError, TypeError, ValueError, ZeroDivisionError):
        return None


def _are_from(low: int, sizes: Sequence[Any]) -> bool:
    """Whether no size that is a number is below a bound."""
    return all(size >= low for size in sizes if is_constant(size))


def output_type(op_type: str, call: Call, types: Sequence[int]) -> int:
    """Element type of the outputs of those nodes, from that of the inputs."""
    if traits(op_type).is_boolean:
        return int(TensorProto.BOOL)
    if op_type == "Cast":
        return int(call.get("to"))
    if op_type == "ConstantOfShape":
        return int(call.attributes["value"].data_type) if "value" in call.attributes else int(TensorProto.FLOAT)
    return types[traits(op_type).type_slot or 0]


def _plain(*names: str) -> Callable[[Plain], Plain]:
    def add(function: Plain) -> Plain:
        for name in names:
            _FUNCTIONS[name] = function
        return function

    return add


@_plain(
    "Abs", "BatchNormalization", "Cast", "Ceil", "Clip", "Cos", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu",
    "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LayerNormalization",
    "LeakyRelu", "Log", "LogSoftmax", "MeanVarianceNormalization", "Mish", "Neg", "Not", "PRelu", "Reciprocal", "Relu",
    "Selu", "Sigmoid", "Sign", "Sin", "Softmax", "Softplus", "Sqrt", "Tanh",
)  # fmt: skip  # a table
def _same(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims:
    return shapes[0]


@_plain(
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mul", "Or", "Pow",
    "Sub", "Sum", "Where", "Xor",
)  # fmt: skip  # a table
def _broadcast(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims | None:
    return broadcast(*shapes) if call.opset >= 7 else None


def broadcast(*shapes: Dims) -> Dims | None:
    """The shape that several broadcast to, None if they do not."""
    first = shapes[0]
    if all(shape == first for shape in shapes):
        return first
    rank = max(map(len, shapes))
    result = [1] * rank
    for shape in shapes:
        for axis, size in enumerate(shape, start=rank - len(shape)):
            if size != 1:
                if result[axis] not in (1, size):
                    return None
                result[axis] = size
    return tuple(result)


@_plain("MatMul")
def _matmul(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims | None:
    a, b = shapes
    if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
        return None
    batch = broadcast(a[:-2], b[:-2])
    return None if batch is None else (*batch, a[-2], b[-1])


@_plain("Gemm")
def _gemm(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims | None:
    a, b = (s[::-1] if call.get(t, 0) else s for s, t in zip(shapes, ("transA", "transB"), strict=False))
    return (a[0], b[1]) if len(a) == len(b) == 2 and a[1] == b[0] else None


@_plain("Conv", "MaxPool", "AveragePool")
def _window(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims | None:
    data, kernel = shapes[0], shapes[1] if len(shapes) > 1 else None
    window = call.get("kernel_shape") or (kernel and kernel[2:])
    if not window or call.get("auto_pad", "NOTSET") != "NOTSET" or call.get("ceil_mode", 0):
        return None
    rank = len(window)
    pads, strides = call.get("pads") or [0] * (2 * rank), call.get("strides") or [1] * rank
    dilations = call.get("dilations") or [1] * rank
    if len(data) != rank + 2 or (kernel is not None and data[1] != kernel[1] * call.get("group", 1)):
        return None
    spans = [d * (w - 1) + 1 for w, d in zip(window, dilations, strict=True)]
    sizes = [(data[2 + i] + pads[i] + pads[i + rank] - spans[i]) // strides[i] + 1 for i in range(rank)]
    return (data[0], data[1] if kernel is None else kernel[0], *sizes) if _are_from(1, sizes) else None


@_plain("Resize")
def _resized(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims | None:
    """By scales, in float32 as onnxruntime multiplies them; onnx gives one less where the product is rounded up."""
    place = 1 if call.opset < 11 else 2
    scales = values[place] if len(values) == place + 1 else None
    is_plain = call.get("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
    if scales is None or scales.dtype != np.float32 or not is_plain or "axes" in call.attributes:
        return None
    if scales.size != len(shapes[0]) or not all(map(is_constant, shapes[0])):
        return None
    return tuple(int(np.float32(size) * scale) for size, scale in zip(shapes[0], scales, strict=True))


@_plain("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims | None:
    return (*shapes[0][:2], *[1] * (len(shapes[0]) - 2)) if len(shapes[0]) > 2 else None


@_plain("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum")
def _reduce(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims | None:
    if len(values) > 1 and values[1] is None:
        return None
    axes = axes_operand(call, values[1:])
    if not axes:
        return None
    rank = len(shapes[0])
    gone = {axis + rank if axis < 0 else axis for axis in axes}
    if call.get("keepdims", 1) == 1:
        return tuple(1 if axis in gone else size for axis, size in enumerate(shapes[0]))
    return tuple(size for axis, size in enumerate(shapes[0]) if axis not in gone)


@_plain("Transpose")
def _transpose(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims | None:
    perm = call.get("perm") or range(len(shapes[0]))[::-1]
    return tuple(shapes[0][axis] for axis in perm) if len(perm) == len(shapes[0]) else None


@_plain("Reshape")
def _reshape(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims | None:
    wanted = call.get("shape") if len(values) < 2 else values[1]
    sizes = [-1] if wanted is None else [whole(size) for size in wanted]
    if wanted is None or (call.get("allowzero", 0) and 0 in sizes):
        return None
    sizes = [shapes[0][axis] if size == 0 else size for axis, size in enumerate(sizes)]
    total = product(shapes[0])
    if sizes.count(-1) == 1:
        rest = -product(sizes)
        sizes[sizes.index(-1)] = total // rest
    # Where sizes are open, that the elements are as many as before is what the operator demands.
    fits = not all(map(is_constant, (total, *sizes))) or product(sizes) == total
    return tuple(sizes) if fits and _are_from(0, sizes) else None


@_plain("Flatten")
def _flatten(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims | None:
    axis = call.get("axis", 1)
    return (product(shapes[0][:axis]), product(shapes[0][axis:])) if 0 <= axis <= len(shapes[0]) else None


@_plain("Concat")
def _concat(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims | None:
    rank = len(shapes[0])
    axis = call.get("axis", 1) % rank
    rest = {(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}
    if len(rest) > 1 or any(len(shape) != rank for shape in shapes):
        return None
    return (*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])


@_plain("Gather")
def _gather(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims:
    axis = call.get("axis", 0) % len(shapes[0])
    return (*shapes[0][:axis], *shapes[1], *shapes[0][axis + 1 :])


@_plain("GatherElements")
def _gather_elements(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims:
    return shapes[1]


@_plain("Unsqueeze")
def _unsqueeze(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims | None:
    axes = axes_operand(call, values[1:])
    if not axes:
        return None
    rank = len(shapes[0]) + len(axes)
    made, rest = {axis % rank for axis in axes}, iter(shapes[0])
    return tuple(1 if axis in made else next(rest) for axis in range(rank)) if len(made) == len(axes) else None


@_plain("Squeeze")
def _squeeze(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims | None:
    axes = axes_operand(call, values[1:])
    if not axes:
        return None
    gone = {axis % len(shapes[0]) for axis in axes}
    if any(shapes[0][axis] != 1 for axis in gone):
        return None
    return tuple(size for axis, size in enumerate(shapes[0]) if axis not in gone)


@_plain("Expand")
def _expand(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims | None:
    return None if values[1] is None else broadcast(shapes[0], tuple(values[1].tolist()))


@_plain("ConstantOfShape")
def _constant_of_shape(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims | None:
    return None if values[0] is None or not _are_from(0, values[0].tolist()) else tuple(values[0].tolist())


@_plain("Slice")
def _slice(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims | None:
    if call.opset >= 10 and any(value is None for value in values[1:]):
        return None
    sizes = list(shapes[0])
    for axis, start, end, step in slice_ranges(call, len(sizes), values[1:]):
        if all(map(is_constant, (sizes[axis], start, end))):
            sizes[axis] = len(range(*slice(start, end if end > -(2**62) else None, step).indices(sizes[axis])))
        else:
            first, last = (_place(position, sizes[axis]) for position in (start, end))
            is_said = step > 0 and first is not None and last is not None
            sizes[axis] = -(-largest(last - first, 0) // step) if is_said else None
    return tuple(sizes)


def _place(position: Any, size: Any) -> Any:
    """Where a start or end of a slice lies on an axis of an open size; None if that cannot be said."""
    if is_constant(position):
        if position >= _FAR:
            return size
        return least(position, size) if position >= 0 else largest(size + position, 0)
    return least(position, size) if least(position, 0) == 0 else None


_OPEN: dict[str, Plain] = {}
"""Functions for shapes with open sizes alone: of numbers onnx says more."""


def open_shapes(
    op_type: str, call: Call, shapes: Sequence[Dims | None], values: Sequence[Array | None]
) -> list[Dims] | None:
    """The shape of the first output of operators whose operands may hold open sizes; None where that is not plain."""
    function = _OPEN.get(op_type)
    if function is None or not shapes or shapes[0] is None:
        return None
    try:
        made = function(call, shapes, values)  # type: ignore[arg-type]  # each looks at what it needs
        return None if made is None else [tuple(map(whole, made))]
    except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError, ZeroDivisionError):
        return None


def _open(*names: str) -> Callable[[Plain], Plain]:
    def add(function: Plain) -> Plain:
        for name in names:
            _OPEN[name] = function
        return function

    return add


@_open("Pad")
def _pad(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims:
    sizes = list(shapes[0])
    pads = call.get("pads") if len(values) < 2 else values[1].tolist()  # type: ignore[union-attr]  # caught
    axes = values[3].tolist() if len(values) > 3 and values[3] is not None else range(len(sizes))
    for place, axis in enumerate(axes):
        sizes[axis] = sizes[axis] + pads[place] + pads[place + len(axes)]
    return tuple(sizes)


@_open("Tile")
def _tile(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims:
    return tuple(size * times for size, times in zip(shapes[0], values[1].tolist(), strict=True))  # type: ignore[union-attr]  # caught


@_open("Resize", "Upsample")
def _resize(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims | None:
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
def _top_k(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims:
    sizes, axis = list(shapes[0]), call.get("axis", -1)
    sizes[axis] = call.get("k") if len(values) < 2 else values[1].ravel().tolist()[0]  # type: ignore[union-attr]  # caught
    return tuple(sizes)


@_open("Range")
def _range(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims:
    start, limit, step = (value.item() for value in values)  # type: ignore[union-attr]  # caught
    return (largest(-((start - limit) // step), 0),)


@_open("OneHot")
def _one_hot(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None]) -> Dims:
    sizes, axis = list(shapes[0]), call.get("axis", -1) % (len(shapes[0]) + 1)
    sizes.insert(axis, values[1].item())  # type: ignore[union-attr]  # caught
    return tuple(sizes)


def _split(call: Call, shapes: Sequence[Dims], values: Sequence[Array | None], count: int) -> list[Dims] | None:
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
