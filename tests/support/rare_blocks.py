"""The blocks of random graphs with the other operators that have rules.

Those of onnx.brevitas and qonnx, Swish, and GroupNorm of com.microsoft are missing, since onnxruntime has no CPU kernels
for them, and SimplifiedLayerNormalization, which onnxruntime puts among ONNX's own, to which it does not belong.
Random operators are multiplied by zero: what they give cannot be compared.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper, numpy_helper

from tests.support.builder import MICROSOFT, NEWER, RARE, Block, Builder, Shape, block


def rare(*ranks: int) -> Callable[[Block], Block]:
    return block(*ranks, among=RARE)


def number(b: Builder, value: float) -> str:
    return b.constant(np.float32(value))


def between(b: Builder, x: str) -> str:
    """Values between -1 and 1."""
    return b.raw("Tanh", [x])


def positive(b: Builder, x: str) -> str:
    """Values of at least one."""
    return b.raw("Add", [b.raw("Abs", [x]), number(b, 1)])


def whole(b: Builder, x: str, kind: int) -> str:
    """Integers from 0 to 15."""
    return b.raw("Cast", [b.raw("Mul", [b.raw("Sigmoid", [x]), number(b, 15)])], to=kind)


def added(b: Builder, x: str, other: str) -> str:
    """x and derived tensors of other types, with small values."""
    small = b.raw("Mul", [b.raw("Cast", [other], to=TensorProto.FLOAT), number(b, 0.1)])
    return b.node("Add", [x, small], b.shapes[x])


def partner(b: Builder, x: str) -> str:
    """Another tensor of the same shape."""
    others = b.others(b.shapes[x], x)
    return b.choices.pick(others) if others else b.activated(x)


def channels(shape: Shape) -> int:
    """The axis of the channels."""
    return 1 if len(shape) == 4 else len(shape) - 1


# Element by element.


@rare(2, 3, 4)
def function_of_each(b: Builder, x: str) -> str | None:
    free = ["Cos", "Asinh", "Round" if b.opset >= 11 else "Sign", "Floor", "Ceil", "Sign", "Shrink", "Dropout"]
    bounded = ["Acos", "Asin", "Atanh", "Sinh", "Cosh", "Tan", "Exp"]
    above = ["Log", "Reciprocal", "Acosh"]
    kind, shape = b.choices.pick((*free, *bounded, *above)), b.shapes[x]
    if kind in bounded:
        return b.node(kind, [b.raw("Mul", [between(b, x), number(b, 0.9)])], shape)
    return b.node(kind, [positive(b, x) if kind in above else x], shape)


@rare(2, 3, 4)
def fused_function_of_each(b: Builder, x: str) -> str | None:
    shape, kind = b.shapes[x], b.choices.pick(("Gelu", "QuickGelu", "FastGelu", "BiasGelu"))
    inputs = [x]
    if kind == "BiasGelu" or (kind == "FastGelu" and b.choices.integer(0, 1)):
        inputs.append(b.vector(shape[-1]))
    return b.node(kind, inputs, shape, MICROSOFT)


@rare(2, 3, 4)
def comparison(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    kinds = ["Greater", "Less", *(["GreaterOrEqual", "LessOrEqual"] if b.opset >= 12 else [])]
    truths = [b.raw(b.choices.pick(kinds), [x, partner(b, x)]) for _ in range(2)]
    if b.opset >= 11:
        truths.append(b.raw("Equal", [x, partner(b, x)]))
    both = b.raw(b.choices.pick(("And", "Or", "Xor")), [truths[0], truths[-1]])
    mask = b.raw("Not", [both]) if b.choices.integer(0, 1) else both
    return b.node("Where", [mask, x, partner(b, x)], shape) if b.choices.integer(0, 1) else added(b, x, mask)


@rare(2, 3, 4)
def not_numbers(b: Builder, x: str) -> str | None:
    return added(b, x, b.raw(b.choices.pick(("IsNaN", *(["IsInf"] if b.opset >= 10 else []))), [x]))


@rare(2, 3, 4)
def bits(b: Builder, x: str) -> str | None:
    if b.opset < 11:
        return None
    kinds = ["BitShift", *(["BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitwiseNot"] if b.opset >= 18 else [])]
    kind = b.choices.pick(kinds)
    left = whole(b, x, TensorProto.UINT32)
    if kind == "BitwiseNot":
        return added(b, x, b.raw("Cast", [b.raw(kind, [whole(b, x, TensorProto.INT32)])], to=TensorProto.FLOAT))
    if kind == "BitShift":
        return added(b, x, b.raw(kind, [left, b.constant(np.uint32(1))], direction=b.choices.pick(("LEFT", "RIGHT"))))
    return added(b, x, b.raw(kind, [left, whole(b, partner(b, x), TensorProto.UINT32)]))


@rare(2, 3, 4)
def two_of_one_shape(b: Builder, x: str) -> str | None:
    kind, shape = b.choices.pick(("Min", "Mod", "CastLike")), b.shapes[x]
    if kind == "Mod" and b.opset >= 10:
        return b.node(kind, [between(b, x), positive(b, partner(b, x))], shape, fmod=1)
    if kind == "CastLike" and b.opset >= 15:
        return b.node(kind, [whole(b, x, TensorProto.INT32), partner(b, x)], shape)
    return b.node("Min", [x, partner(b, x)], shape)


# Along an axis.


@rare(2, 3, 4)
def reduced(b: Builder, x: str) -> str | None:
    shape, kind = b.shapes[x], b.choices.pick(("LogSum", "LogSumExp", "Min", "Prod", "Sum"))
    axis = b.choices.pick((channels(shape), len(shape) - 1))
    values = positive(b, x) if kind == "LogSum" else between(b, x)
    one = tuple(1 if place == axis else size for place, size in enumerate(shape))
    total = b.with_axes(f"Reduce{kind}", values, [axis], one, 13 if kind == "Sum" else 18, keepdims=1)
    del b.shapes[total]
    return added(b, x, total)


@rare(2, 3, 4)
def place_of_extreme(b: Builder, x: str) -> str | None:
    axis = b.choices.integer(1, len(b.shapes[x]) - 1)
    return added(b, x, b.raw(b.choices.pick(("ArgMax", "ArgMin")), [x], axis=axis, keepdims=1))


@rare(2, 3, 4)
def running(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    if b.opset < 11:
        return None
    axis = b.constant(np.int64(b.choices.integer(1, len(shape) - 1)))
    kind = "CumProd" if b.opset >= 26 and b.choices.integer(0, 1) else "CumSum"
    return b.node(kind, [between(b, x), axis], shape, reverse=b.choices.integer(0, 1))


@rare(2, 3, 4)
def largest(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    axis = b.choices.integer(1, len(shape) - 1)
    count = b.choices.integer(1, shape[axis])
    inputs = [x, b.ints(count)] if b.opset >= 10 else [x]
    values, _ = b.several("TopK", inputs, 2, axis=axis, **({} if b.opset >= 10 else {"k": count}))
    b.shapes[values] = (*shape[:axis], count, *shape[axis + 1 :])
    return values


@rare(3, 4)
def triangle(b: Builder, x: str) -> str | None:
    if b.opset < 14:
        return None
    return b.node("Trilu", [x], b.shapes[x], upper=b.choices.integer(0, 1))


@rare(2, 3, 4)
def distribution(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    return b.node(b.choices.pick(("LogSoftmax", "Hardmax")), [x], shape, axis=len(shape) - 1)


@rare(2, 3, 4)
def normalised(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    kind = b.choices.pick(("LpNormalization", "MeanVarianceNormalization", "LRN"))
    if kind == "LpNormalization":
        return b.node(kind, [positive(b, x)], shape, axis=channels(shape), p=b.choices.pick((1, 2)))
    if len(shape) != 4 or shape[2] * shape[3] < 4 or (kind != "LRN" and b.opset >= 13):
        return None  # onnx cannot infer the body of the newer MeanVarianceNormalization
    return b.node(kind, [x], shape, **({"size": 3} if kind == "LRN" else {}))


@rare(2, 3)
def root_mean_square(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    if b.opset < 23:
        return None
    return b.node("RMSNormalization", [x, b.vector(shape[-1], positive=True)], shape, axis=-1)


@rare(3)
def normalised_sum(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    kind = b.choices.pick(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"))
    numbers = [b.vector(shape[-1], positive=True)]
    if kind == "SkipLayerNormalization" and b.choices.integer(0, 1):
        numbers += [b.vector(shape[-1]), *([b.vector(shape[-1])] if b.choices.integer(0, 1) else [])]
    return b.node(kind, [x, partner(b, x), *numbers], shape, MICROSOFT) if shape[-1] > 2 else None


# Bodies.


def described(name: str, rank: int, kind: int = TensorProto.FLOAT) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, [None] * rank)


@rare(2, 3, 4)
def loop(b: Builder, x: str) -> str | None:
    """Two iterations of a body that uses an outer value and keeps the shape."""
    shape, mark = b.shapes[x], b.name("round")
    scale = numpy_helper.from_array(b.rng.uniform(0.5, 1.5, (1, *shape[1:])).astype(np.float32), f"{mark}_scale")
    nodes = [
        helper.make_node("Identity", [f"{mark}_go"], [f"{mark}_on"]),
        helper.make_node("Mul", [f"{mark}_in", f"{mark}_scale"], [f"{mark}_scaled"]),
        helper.make_node(b.choices.pick(("Add", "Max")), [f"{mark}_scaled", x], [f"{mark}_out"]),
    ]
    number, truth = described(f"{mark}_i", 0, TensorProto.INT64), described(f"{mark}_go", 0, TensorProto.BOOL)
    ends = [described(f"{mark}_on", 0, TensorProto.BOOL), described(f"{mark}_out", len(shape))]
    body = helper.make_graph(nodes, mark, [number, truth, described(f"{mark}_in", len(shape))], ends, [scale])
    return b.node("Loop", [b.constant(np.int64(2)), b.constant(np.asarray(True)), partner(b, x)], shape, body=body)


@rare(3)
def scan(b: Builder, x: str) -> str | None:
    """A decaying sum over the tokens."""
    n, _t, c = b.shapes[x]
    if b.is_open:
        return None
    mark = b.name("step")
    nodes = [
        helper.make_node("Add", [f"{mark}_state", f"{mark}_token"], [f"{mark}_sum"]),
        helper.make_node("Tanh", [f"{mark}_sum"], [f"{mark}_next"]),
        helper.make_node("Identity", [f"{mark}_next"], [f"{mark}_out"]),
    ]
    begins, ends = ([described(f"{mark}_{k}", 2) for k in pair] for pair in (("state", "token"), ("next", "out")))
    body = helper.make_graph(nodes, mark, begins, ends)
    axes = {"scan_input_axes": [1], "scan_output_axes": [1], "num_scan_inputs": 1}
    _, made = b.several("Scan", [b.constant(np.zeros((n, c), np.float32)), x], 2, body=body, **axes)
    b.shapes[made] = b.shapes[x]
    return made


# Places.


@rare(2, 3, 4)
def tiled(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    axis, times = b.choices.integer(1, len(shape) - 1), 2
    repeats = [times if place == axis else 1 for place in range(len(shape))]
    made = (*shape[:axis], times * shape[axis], *shape[axis + 1 :])
    return b.node("Tile", [x, b.ints(*repeats)], made) if made[axis] <= 24 else None


@rare(2, 3, 4)
def expanded(b: Builder, x: str) -> str | None:
    """A constant of size one on some axes, expanded to the shape of a tensor, fixed or computed."""
    shape = b.shapes[x]
    axes = (1, *(b.choices.pick((1, size)) for size in shape[1:]))
    values = b.constant(b.rng.uniform(0.5, 1.5, axes).astype(np.float32))
    wanted = b.ints(1, *shape[1:]) if b.choices.integer(0, 1) else b.raw("Shape", [x])
    return b.node(b.choices.pick(("Add", "Mul")), [x, b.raw("Expand", [values, wanted])], shape)


@rare(2, 3, 4)
def made_by_size(b: Builder, x: str) -> str | None:
    shape, way = b.shapes[x], b.choices.integer(0, 3)
    if way == 0:
        return added(b, x, b.raw("ConstantOfShape", [b.raw("Shape", [x])]))
    if way == 1:
        share = b.raw("Div", [number(b, 10), b.raw("Cast", [b.raw("Size", [x])], to=TensorProto.FLOAT)])
        return added(b, x, share)
    if way == 2 and b.opset >= 11:
        axis = b.choices.integer(1, len(shape) - 1)
        size = b.raw("Gather", [b.raw("Shape", [x]), b.constant(np.int64(axis))], axis=0)
        places = b.raw("Range", [b.constant(np.int64(0)), size, b.constant(np.int64(1))])
        return added(b, x, b.raw("Reshape", [places, b.ints(-1, *([1] * (len(shape) - axis - 1)))]))
    if len(shape) == 2:
        return added(b, x, b.raw("EyeLike", [x]))
    return None


@rare(2, 3, 4)
def random_of_like_shape(b: Builder, x: str) -> str | None:
    if b.opset >= 22:
        return None  # onnxruntime has no kernels for what is new there
    kinds = ["RandomNormalLike", "RandomUniformLike", *(["Bernoulli"] if b.opset >= 15 else [])]
    kind = b.choices.pick(kinds)
    made = b.raw(kind, [b.raw("Sigmoid", [x])])
    return b.node("Add", [x, b.raw("Mul", [made, number(b, 0)])], b.shapes[x])


@rare(2, 3, 4)
def compressed(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    axis = b.choices.integer(1, len(shape) - 1)
    stays = b.rng.random(shape[axis]) > 0.3
    stays[0] = True
    made = (*shape[:axis], int(stays.sum()), *shape[axis + 1 :])
    return b.node("Compress", [x, b.constant(stays)], made, axis=axis)


@rare(2, 3, 4)
def picked(b: Builder, x: str) -> str | None:
    """Elements gathered by an index for each, or by index tuples."""
    shape = b.shapes[x]
    if b.opset < 12:
        return None
    axis = b.choices.integer(1, len(shape) - 1)
    if b.choices.integer(0, 1):
        count = b.choices.integer(1, shape[axis])
        made = (*shape[:axis], count, *shape[axis + 1 :])
        if b.is_open:
            return None
        return b.node("GatherElements", [x, b.constant(b.rng.integers(0, shape[axis], made))], made, axis=axis)
    places = b.rng.integers(0, shape[1], (shape[0], 4, 1))
    made = (shape[0], 4, *shape[2:])
    return b.node("GatherND", [x, b.constant(places)], made, batch_dims=1) if not b.is_open else None


@rare(2, 3, 4)
def written_over(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    axis = b.choices.integer(1, len(shape) - 1)
    if b.is_open:
        return None
    if b.opset >= 11 and b.choices.integer(0, 1):
        places = np.asarray([[place, b.choices.integer(0, shape[1] - 1)] for place in range(shape[0])], np.int64)
        updates = b.constant(b.rng.standard_normal((shape[0], *shape[2:])).astype(np.float32))
        return b.node("ScatterND", [x, b.constant(places), updates], shape)
    kind, one = "Scatter" if b.opset < 11 else "ScatterElements", (*shape[:axis], 1, *shape[axis + 1 :])
    places = b.rng.integers(0, shape[axis], one)
    updates = b.constant(b.rng.standard_normal(one).astype(np.float32))
    return b.node(kind, [x, b.constant(places), updates], shape, axis=axis)


@rare(2, 3, 4)
def assigned(b: Builder, x: str) -> str | None:
    """Some channels of another tensor, written over channels at other places."""
    shape, axis = b.shapes[x], channels(b.shapes[x])
    if b.opset < 11 or b.is_open:
        return None
    count = b.choices.integer(1, shape[axis])
    read, written = (b.rng.permutation(shape[axis])[:count] for _ in range(2))
    grid = np.meshgrid(*(np.arange(n) for n in shape[:axis]), written, indexing="ij")
    updates = b.raw("Gather", [partner(b, x), b.constant(read)], axis=axis)
    return b.node("ScatterND", [x, b.constant(np.stack(grid, axis=-1)), updates], shape)


@rare(3, 4)
def in_windows(b: Builder, x: str) -> str | None:
    """The next position along an axis, read out of the flattened tensor, as strided views are written."""
    shape = b.shapes[x]
    if b.is_open:
        return None
    axis = b.choices.integer(1, len(shape) - 1)
    after = np.minimum(np.arange(shape[axis]) + (axis != channels(shape)), shape[axis] - 1)
    places = np.take(np.arange(np.prod(shape)).reshape(shape), after, axis=axis)
    return b.node("Gather", [b.raw("Reshape", [x, b.ints(-1)]), b.constant(places)], shape, axis=0)


@rare(3)
def reversed_order(b: Builder, x: str) -> str | None:
    n, t, _c = b.shapes[x]
    if b.opset < 10 or b.is_open:
        return None
    lengths = b.ints(*(b.choices.integer(1, t) for _ in range(n)))
    return b.node("ReverseSequence", [x, lengths], b.shapes[x], batch_axis=0, time_axis=1)


@rare(2)
def one_hot(b: Builder, x: str) -> str | None:
    n, _c = b.shapes[x]
    places = b.raw("ArgMax", [x], axis=1, keepdims=0)
    values = b.constant(np.asarray([0, 1], np.float32))
    return b.matmul(b.node("OneHot", [places, b.constant(np.int64(12)), values], (n, 12)), b.width())


def words_of(b: Builder, x: str) -> str:
    """Return a number from 0 to 15 for each place of a tensor [N, T, C]."""
    highest = b.with_axes("ReduceMax", x, [2], b.shapes[x][:2], 18, keepdims=0)
    del b.shapes[highest]
    return whole(b, highest, TensorProto.INT32)


@rare(3)
def embedded(b: Builder, x: str) -> str | None:
    """Word embeddings with positions, normalised."""
    n, t, _c = b.shapes[x]
    size = b.width()
    if size < 3:
        return None
    words = words_of(b, x)
    tables = [b.weight(16, size), b.weight(t, size), b.weight(2, size) if b.choices.integer(0, 1) else ""]
    segments = b.raw("Cast", [b.raw("Greater", [words, b.constant(np.int32(7))])], to=TensorProto.INT32)
    numbers = [b.vector(size, positive=True), b.vector(size)]
    made, _ = b.several(
        "EmbedLayerNormalization", [words, segments if tables[2] else "", *tables, *numbers], 2, MICROSOFT
    )
    b.shapes[made] = (n, t, size)
    return made


# Images.


@rare(4)
def mean_of_powers(b: Builder, x: str) -> str | None:
    n, c, _h, _w = b.shapes[x]
    if b.opset >= 22:
        return None
    gate = b.raw("Sigmoid", [b.node("GlobalLpPool", [x], (n, c, 1, 1))])
    return b.node("Mul", [x, gate], b.shapes[x])


@rare(4)
def sampled(b: Builder, x: str) -> str | None:
    n, c, _h, _w = b.shapes[x]
    if b.opset < 16 or b.is_open:
        return None
    if b.opset >= 20 and b.choices.integer(0, 1):
        theta = np.tile(np.asarray([[1, 0.1, 0], [0, 0.9, 0.1]], np.float32), (n, 1, 1))
        grid = b.raw("AffineGrid", [b.constant(theta), b.ints(n, c, 3, 4)])
    else:
        grid = b.constant(b.rng.uniform(-1, 1, (n, 3, 4, 2)).astype(np.float32))
    modes = ("linear", "nearest") if b.opset >= 20 else ("bilinear", "nearest")
    return b.node("GridSample", [x, grid], (n, c, 3, 4), mode=b.choices.pick(modes))


@rare(4)
def regions(b: Builder, x: str) -> str | None:
    n, c, h, w = b.shapes[x]
    if b.opset < 10 or b.opset >= 22:
        return None
    corners = np.asarray([[0, 0, w - 1, h - 1], [0, 0, w / 2, h / 2]], np.float32)[:n]
    if b.choices.integer(0, 1):
        rois = b.constant(np.concatenate([np.arange(n, dtype=np.float32)[:, None], corners], axis=1))
        return b.node("MaxRoiPool", [x, rois], (n, c, 2, 2), pooled_shape=[2, 2])
    inputs = [x, b.constant(corners), b.ints(*range(n))]
    return b.node("RoiAlign", inputs, (n, c, 2, 2), output_height=2, output_width=2, sampling_ratio=2)


@rare(4)
def unpooled(b: Builder, x: str) -> str | None:
    n, c, h, w = b.shapes[x]
    if h % 2 or w % 2 or b.is_open:
        return None
    window = {"kernel_shape": [2, 2], "strides": [2, 2]}
    values, places = b.several("MaxPool", [x], 2, **window)
    b.shapes[values] = (n, c, h // 2, w // 2)
    inner = b.conv(values, c) if b.choices.integer(0, 1) else values
    return b.node("MaxUnpool", [inner, places], b.shapes[x], **window)


@rare(4)
def upsampled(b: Builder, x: str) -> str | None:
    n, c, h, w = b.shapes[x]
    if b.opset > 9 or max(h, w) > 8:
        return None
    return b.node("Upsample", [x, b.constant(np.asarray([1, 1, 2, 2], np.float32))], (n, c, 2 * h, 2 * w))


@rare(4)
def deformed(b: Builder, x: str) -> str | None:
    n, c, h, w = b.shapes[x]
    if b.opset < 19:
        return None
    size, shape = b.width(), (n, 2 * 9, h, w)
    offset = b.conv(x, 18, kernel=3)
    assert b.shapes[offset] == shape
    inputs = [x, b.weight(size, c, 3, 3), offset, *([b.vector(size)] if b.choices.integer(0, 1) else [])]
    return b.node("DeformConv", inputs, (n, size, h, w), pads=[1] * 4, kernel_shape=[3, 3])


@rare(4)
def fused_convolution(b: Builder, x: str) -> str | None:
    n, c, h, w = b.shapes[x]
    size = b.width()
    inputs = [x, b.weight(size, c, 1, 1), b.vector(size)]
    others = b.others((n, size, h, w))
    if others and b.choices.integer(0, 1):
        inputs.append(b.choices.pick(others))
    return b.node("FusedConv", inputs, (n, size, h, w), MICROSOFT, activation="Relu", kernel_shape=[1, 1])


# Matrices.


@rare(2)
def fused_gemm(b: Builder, x: str) -> str | None:
    n, c = b.shapes[x]
    size = b.width()
    inputs = [x, b.weight(size, c, fan=c), b.vector(size)]
    return b.node("FusedGemm", inputs, (n, size), MICROSOFT, transB=1, activation="Relu")


@rare(2, 3)
def fused_matmul(b: Builder, x: str) -> str | None:
    shape, size = b.shapes[x], b.width()
    made = (*shape[:-1], size)
    kind = b.choices.pick(("FusedMatMul", "TransposeMatMul"))
    return b.node(kind, [x, b.weight(size, shape[-1])], made, MICROSOFT, transB=1, alpha=0.5)


@rare(3)
def fused_attention(b: Builder, x: str) -> str | None:
    """Attention of tokens that come first, whose products move the batch before them."""
    n, t, c = b.shapes[x]
    size = b.width()
    q, k, v = (b.matmul(x, size) for _ in range(3))
    score = b.node("FusedMatMul", [q, k], (t, n, n), MICROSOFT, transBatchA=1, transBatchB=1, transB=1, alpha=0.2)
    mixed = b.node("FusedMatMul", [b.node("Softmax", [score], (t, n, n)), v], (t, n, size), MICROSOFT, transBatchB=1)
    return b.node("Transpose", [b.matmul(mixed, c)], (n, t, c), perm=[1, 0, 2])


@rare(3)
def attention_in_one(b: Builder, x: str) -> str | None:
    """Attention operators on queries, keys and values, with or without rotary positions."""
    n, t, c = b.shapes[x]
    heads, each = b.choices.pick((1, 2, 4)), b.choices.pick((4, 8))
    size, way = heads * each, b.choices.integer(0, 3)
    if way == 0:
        bias = [b.vector(3 * size)]
        made = b.node("Attention", [x, b.weight(c, 3 * size), *bias], (n, t, size), MICROSOFT, num_heads=heads)
        return b.matmul(made, c)
    few = b.choices.pick([k for k in (1, 2, 4) if heads % k == 0]) if way > 1 else heads
    q, k, v = b.matmul(x, size), b.matmul(x, few * each), b.matmul(x, few * each)
    if b.choices.integer(0, 1) and not b.is_open:
        q, k = rotated(b, q, heads), rotated(b, k, few)
    if way == 1:
        made = b.node("MultiHeadAttention", [q, k, v], (n, t, size), MICROSOFT, num_heads=heads)
    elif way == 2 and b.opset >= 23:
        made = b.node("Attention", [q, k, v], (n, t, size), q_num_heads=heads, kv_num_heads=few)
    elif each % 8 == 0 and not b.is_open:
        lengths = [b.constant(np.full(n, t - 1, np.int32)), b.constant(np.asarray([t], np.int32))]
        made, *_ = b.several(
            "GroupQueryAttention", [q, k, v, "", "", *lengths], 3, MICROSOFT, num_heads=heads, kv_num_heads=few
        )
        b.shapes[made] = (n, t, size)
    else:
        return None
    return b.matmul(made, c)


def rotated(b: Builder, x: str, heads: int) -> str:
    n, t, size = b.shapes[x]
    half = size // heads // 2
    angles = b.rng.uniform(0, 3, (t, half))
    cosines, sines = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
    if b.opset >= 23 and b.choices.integer(0, 1):
        tables = [b.constant(np.tile(table, (n, 1, 1))) for table in (cosines, sines)]
        return b.node("RotaryEmbedding", [x, *tables], b.shapes[x], num_heads=heads)
    places = b.constant(np.tile(np.arange(t), (n, 1)))
    tables = [b.constant(cosines), b.constant(sines)]
    return b.node("RotaryEmbedding", [x, places, *tables], b.shapes[x], MICROSOFT, num_heads=heads)


# Whole numbers.


SCALE, ZERO = 0.05, np.uint8(128)


def steps(b: Builder, zero: np.generic = ZERO, scale: float = SCALE) -> list[str]:
    """A scale and a zero point."""
    return [number(b, scale), b.constant(zero)]


def in_bytes(b: Builder, x: str, domain: str = "") -> str:
    return b.raw("QuantizeLinear", [x, *steps(b)], domain)


def from_bytes(b: Builder, x: str, shape: Shape, domain: str = "") -> str:
    return b.node("DequantizeLinear", [x, *steps(b)], shape, domain)


def bytes_of(b: Builder, *shape: int, signed: bool = True) -> str:
    low, kind = (-127, np.int8) if signed else (1, np.uint8)
    return b.constant(b.rng.integers(low, low + 254, shape).astype(kind), "w")


@rare(2, 3, 4)
def rounded(b: Builder, x: str) -> str | None:
    domain = b.choices.pick(("", MICROSOFT)) if b.opset >= 10 else MICROSOFT
    return from_bytes(b, in_bytes(b, x, domain), b.shapes[x], domain)


@rare(2, 3, 4)
def rounded_by_what_it_holds(b: Builder, x: str) -> str | None:
    if b.opset < 11:
        return None
    values, scale, zero = b.several("DynamicQuantizeLinear", [x], 3)
    return b.node("DequantizeLinear", [values, scale, zero], b.shapes[x])


@rare(3, 4)
def weights_in_bytes(b: Builder, x: str) -> str | None:
    """A convolution or a product whose weights are int8 with one scale for each output."""
    shape, size = b.shapes[x], b.width()
    if b.opset < 13:
        return None
    scales = b.constant(b.rng.uniform(0.002, 0.01, size).astype(np.float32))
    zeros = b.constant(np.zeros(size, np.int8))
    if len(shape) == 4:
        weight = b.raw("DequantizeLinear", [bytes_of(b, size, shape[1], 1, 1), scales, zeros], axis=0)
        return b.node("Conv", [x, weight, b.vector(size)], (shape[0], size, *shape[2:]))
    weight = b.raw("DequantizeLinear", [bytes_of(b, shape[-1], size), scales, zeros], axis=1)
    return b.node("MatMul", [x, weight], (*shape[:-1], size))


@rare(2, 3, 4)
def product_of_bytes(b: Builder, x: str) -> str | None:
    shape, size, way = b.shapes[x], b.width(), b.choices.integer(0, 2)
    if b.opset < 10:
        return None
    signed = b.constant(np.int8(0))
    if len(shape) == 4:
        made = (shape[0], size, *shape[2:])
        kernel = bytes_of(b, size, shape[1], 1, 1)
        if way:
            inputs = [in_bytes(b, x), *steps(b), kernel, number(b, 0.005), signed, *steps(b)]
            inputs += [b.constant(b.rng.integers(-99, 99, size).astype(np.int32))] if way == 2 else []
            return from_bytes(b, b.raw("QLinearConv", inputs), made)
        sums = b.raw("ConvInteger", [in_bytes(b, x), bytes_of(b, size, shape[1], 1, 1, signed=False), b.constant(ZERO)])
    else:
        made = (*shape[:-1], size)
        matrix = bytes_of(b, shape[-1], size)
        if way:
            inputs = [in_bytes(b, x), *steps(b), matrix, number(b, 0.005), signed, *steps(b)]
            return from_bytes(b, b.raw("QLinearMatMul", inputs), made)
        sums = b.raw("MatMulInteger", [in_bytes(b, x), matrix, b.constant(ZERO), signed])
    return b.node("Mul", [b.raw("Cast", [sums], to=TensorProto.FLOAT), number(b, 0.0005)], made)


@rare(2, 3)
def product_by_onnxruntime(b: Builder, x: str) -> str | None:
    shape, size = b.shapes[x], b.width()
    made, matrix = (*shape[:-1], size), bytes_of(b, shape[-1], size, signed=False)
    scales = b.constant(b.rng.uniform(0.002, 0.01, size).astype(np.float32))
    zeros = b.constant(np.full(size, 128, np.uint8))
    way = b.choices.integer(0, 2)
    if way == 0:
        return b.node("DynamicQuantizeMatMul", [x, matrix, scales, zeros, b.vector(size)], made, MICROSOFT)
    if way == 1 and b.opset >= 11:
        values, scale, zero = b.several("DynamicQuantizeLinear", [x], 3)
        inputs = [values, matrix, scale, scales, zero, zeros, b.vector(size)]
        return b.node("MatMulIntegerToFloat", inputs, made, MICROSOFT)
    if len(shape) == 2:
        weight = [bytes_of(b, size, shape[1]), number(b, 0.005), b.constant(np.int8(0))]
        bias = b.constant(b.rng.integers(-99, 99, size).astype(np.int32))
        inputs = [in_bytes(b, x, MICROSOFT), *steps(b), *weight, bias, *steps(b)]
        return from_bytes(b, b.raw("QGemm", inputs, MICROSOFT, transB=1), made, MICROSOFT)
    return None


@rare(2, 3)
def product_of_packed_bits(b: Builder, x: str) -> str | None:
    shape, size = b.shapes[x], b.width()
    wide, made = b.matmul(x, 16), (*shape[:-1], size)
    packed = b.constant(b.rng.integers(0, 256, (size, 1, 8)).astype(np.uint8), "w")
    scales = b.constant(b.rng.uniform(0.02, 0.1, size).astype(np.float32))
    return b.node("MatMulNBits", [wide, packed, scales], made, MICROSOFT, K=16, N=size, bits=4, block_size=16)


@rare(2, 3, 4)
def of_bytes(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    kind = b.choices.pick(("Add", "Mul", "Sigmoid", "LeakyRelu", "Concat", "GlobalAveragePool"))
    first = in_bytes(b, x, MICROSOFT)
    if kind in ("Add", "Mul"):
        inputs = [first, *steps(b), in_bytes(b, partner(b, x), MICROSOFT), *steps(b), *steps(b)]
    elif kind == "Concat":
        shape = (*shape[:-1], 2 * shape[-1])
        inputs = [*steps(b), first, *steps(b), in_bytes(b, partner(b, x), MICROSOFT), *steps(b)]
        if shape[-1] > 24:
            return None
    else:
        inputs = [first, *steps(b), *steps(b)]
    more: dict[str, object] = {"axis": len(shape) - 1} if kind == "Concat" else {}
    if kind == "GlobalAveragePool":
        if len(shape) != 4:
            return None
        shape, more = (*shape[:2], 1, 1), {"channels_last": 0}
    return from_bytes(b, b.raw(f"QLinear{kind}", inputs, MICROSOFT, **more), shape, MICROSOFT)


@rare(3)
def recurrence_in_bytes(b: Builder, x: str) -> str | None:
    n, t, c = b.shapes[x]
    size = b.choices.pick((2, 4))
    first = b.raw("Transpose", [x], perm=[1, 0, 2])
    weights = [bytes_of(b, 1, rows, 4 * size) for rows in (c, size)]
    numbers = [b.constant(np.asarray([0.005], np.float32)), b.constant(np.zeros(1, np.int8))]
    inputs = [first, *weights, b.weight(1, 8 * size, fan=4), "", "", "", "", *numbers, *numbers]
    y = b.raw("DynamicQuantizeLSTM", inputs, MICROSOFT, hidden_size=size)
    turned = b.node("Transpose", [y], (n, t, 1, size), perm=[2, 0, 1, 3])
    del b.shapes[turned]
    return b.node("Reshape", [turned, b.ints(0, 0, size)], (n, t, size))


# Other operators of onnxruntime, which only the graphs of `newer` contain.


def newer(*ranks: int) -> Callable[[Block], Block]:
    return block(*ranks, among=NEWER)


def channels_last(b: Builder, x: str) -> str:
    return b.raw("Transpose", [x], perm=[0, 2, 3, 1])


def channels_first(b: Builder, x: str, shape: Shape) -> str:
    return b.node("Transpose", [x], shape, perm=[0, 3, 1, 2])


@newer(2, 3)
def experts(b: Builder, x: str) -> str | None:
    """A mixture of two to four experts, of which each token takes one or two."""
    shape, count, inner = b.shapes[x], b.choices.pick((2, 3, 4)), b.choices.pick((2, 4, 6))
    size, kind = shape[-1], b.choices.pick(("relu", "gelu", "silu", "swiglu", "bytes"))
    scores = b.raw("MatMul", [x, b.weight(size, count, fan=size)])
    router = scores if len(shape) == 2 else b.raw("Reshape", [scores, b.ints(-1, count)])
    k = b.choices.pick((1, 2))
    if kind == "bytes":
        matrices = [
            (bytes_of(b, count, rows, columns, signed=False), b.constant(np.full((count, rows), 0.005, np.float32)))
            for rows, columns in ((inner, size), (size, inner))
        ]
        inputs = [x, router, *matrices[0], "", *matrices[1], b.vector(count * size, shape=(count, size))]
        return b.node("QMoE", inputs, shape, MICROSOFT, k=k, expert_weight_bits=8, weights_prepacked=0)
    rows = 2 * inner if kind == "swiglu" else inner
    inputs = [x, router, b.weight(count, rows, size, fan=size), b.vector(count * rows, shape=(count, rows))]
    inputs += [b.weight(count, size, inner, fan=inner)]
    more = {"swiglu_fusion": 1} if kind == "swiglu" else {"normalize_routing_weights": b.choices.integer(0, 1)}
    return b.node("MoE", inputs, shape, MICROSOFT, k=k, activation_type=kind, **more)


@newer(3)
def sequence_with_a_state(b: Builder, x: str) -> str | None:
    n, t, c = b.shapes[x]
    if b.choices.integer(0, 1):
        bias = [b.vector(c)] if b.choices.integer(0, 1) else []
        made, _ = b.several(
            "CausalConvWithState", [x, b.weight(c, 1, 3), *bias], 2, MICROSOFT, channels_last=1, activation="silu"
        )
        b.shapes[made] = (n, t, c)
        return made
    groups, repeats, size, values = 2, b.choices.pick((1, 2)), b.choices.pick((2, 3)), b.choices.pick((2, 3))
    q, k, v = (b.matmul(x, width) for width in (groups * repeats * size, groups * size, groups * values))
    gates = [b.raw("MatMul", [x, b.weight(c, groups, fan=c)]) for _ in range(2)]
    numbers = [b.vector(groups), b.constant(np.full(groups, -0.5, np.float32))]
    decay, rate = b.several("LinearAttentionGate", [gates[0], *numbers, gates[1]], 2, MICROSOFT)
    rule = b.choices.pick(("linear", "gated", "delta", "gated_delta"))
    inputs = [q, between(b, k), v, "", decay if "gated" in rule else "", rate if "delta" in rule else ""]
    counts = {"q_num_heads": groups * repeats, "kv_num_heads": groups}
    made, _ = b.several("LinearAttention", inputs, 2, MICROSOFT, update_rule=rule, **counts)
    b.shapes[made] = (n, t, groups * repeats * values)
    return made


@newer(2, 3)
def with_a_gate(b: Builder, x: str) -> str | None:
    shape, way = b.shapes[x], b.choices.integer(0, 2)
    if way == 0:
        return b.node("ScaledSiLU", [x], shape, MICROSOFT, alpha=0.7)
    if way == 1:
        gate = b.raw("MatMul", [x, b.weight(shape[-1], 1, fan=shape[-1])])
        return b.node("GatedAdd", [x, partner(b, x), gate], shape, MICROSOFT)
    blocks, size = b.choices.pick((1, 2, 3)), b.choices.pick((2, 4))
    y = b.matmul(x, blocks * size)  # of channels repeated before, all could go, which this operator refuses
    inputs = [y, b.vector(size, positive=True), b.activated(y)]
    return b.node("GatedRMSNorm", inputs, b.shapes[y], MICROSOFT, epsilon=0.01)


@newer(3)
def attention_to_bytes(b: Builder, x: str) -> str | None:
    n, t, c = b.shapes[x]
    if b.choices.integer(0, 1):
        size = 4 * b.choices.pick((2, 3))
        turned = b.matmul(x, size)
        tables = [b.constant(f(b.rng.uniform(0, 3, (t, 2))).astype(np.float32)) for f in (np.cos, np.sin)]
        places = b.constant(np.tile(np.arange(t), (3, n, 1)))
        more = {"num_heads": size // 4, "mrope_section": [1, 1, 0]}
        return b.node("MRotaryEmbedding", [turned, places, *tables], (n, t, size), MICROSOFT, **more)
    size = 2 * b.choices.pick((2, 4))
    weight = [bytes_of(b, c, 3 * size), b.vector(3 * size), number(b, SCALE), number(b, 0.005)]
    zeros = [b.constant(ZERO), b.constant(np.int8(0))]
    inputs = [in_bytes(b, x, MICROSOFT), *weight, "", *zeros]
    return b.node("QAttention", inputs, (n, t, size), MICROSOFT, num_heads=2)


@newer(4)
def bytes_with_channels_last(b: Builder, x: str) -> str | None:
    n, c, h, w = b.shapes[x]
    way, given = b.choices.integer(0, 2), in_bytes(b, channels_last(b, x), MICROSOFT)
    if way == 0:
        size = b.width()
        inputs = [given, *steps(b), bytes_of(b, size, c, 1, 1), number(b, 0.005), b.constant(np.int8(0)), *steps(b)]
        made = b.raw("QLinearConv", inputs, MICROSOFT, channels_last=1)
        c = size
    elif h < 2 or w < 2:
        return None
    else:
        h, w = h // 2, w // 2
        more = {"kernel_shape": [2, 2], "strides": [2, 2]}
        made = (
            b.raw("NhwcMaxPool", [given], MICROSOFT, **more)
            if way == 1
            else b.raw("QLinearAveragePool", [given, *steps(b), *steps(b)], MICROSOFT, channels_last=1, **more)
        )
    found = from_bytes(b, made, (), MICROSOFT)
    del b.shapes[found]
    return channels_first(b, found, (n, c, h, w))


@newer(2, 3, 4)
def choice_of_bytes(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    if b.choices.integer(0, 1):
        inputs = [in_bytes(b, x, MICROSOFT), *steps(b), *steps(b, np.uint8(0), 1 / 256)]
        axis = b.choices.integer(1, len(shape) - 1)
        found = b.raw("QLinearSoftmax", inputs, MICROSOFT, axis=axis, opset=13)
        return b.node("DequantizeLinear", [found, *steps(b, np.uint8(0), 1 / 256)], shape, MICROSOFT)
    mask = b.constant(b.rng.integers(0, 2, shape[1:]).astype(np.bool_))
    given = [in_bytes(b, each, MICROSOFT) for each in (x, partner(b, x))]
    inputs = [mask, given[0], *steps(b), given[1], *steps(b), *steps(b)]
    return from_bytes(b, b.raw("QLinearWhere", inputs, MICROSOFT), shape, MICROSOFT)


@newer(4)
def image_by_onnxruntime(b: Builder, x: str) -> str | None:
    n, c, h, w = b.shapes[x]
    way = b.choices.pick(("MaxpoolWithMask", "Pad", "GridSample", "ConvTransposeWithDynamicPads", "CropAndResize"))
    if way == "MaxpoolWithMask":
        mask = b.constant(np.ones((1, 1, h, w), np.int32))
        if h < 2 or w < 2:
            return None
        return b.node(way, [x, mask], (n, c, h - 1, w - 1), MICROSOFT, kernel_shape=[2, 2])
    if way == "Pad":
        return b.node(way, [x, b.ints(0, 1, 0, 1, 0, 2, 0, 1)], (n, c + 3, h, w + 2), MICROSOFT)
    if way == "GridSample":
        grid = b.constant(b.rng.uniform(-0.9, 0.9, (n, 3, 4, 2)).astype(np.float32))
        return None if b.is_open else b.node(way, [x, grid], (n, c, 3, 4), MICROSOFT)
    if way == "CropAndResize":
        regions = b.constant(b.rng.uniform(0, 1, (n, 4)).astype(np.float32))
        inputs = [x, regions, b.constant(np.zeros(n, np.int32)), b.constant(np.asarray([3, 4], np.int32))]
        return None if b.is_open else b.node(way, inputs, (n, c, 3, 4), MICROSOFT)
    size = b.width()
    inputs = [x, b.weight(c, size, 2, 2), b.ints(0, 1, 1, 0), b.vector(size)]
    return b.node(way, inputs, (n, size, h, w), MICROSOFT)


@newer(2, 3)
def matrix_by_onnxruntime(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    way = b.choices.pick(("Trilu", "UnfoldTensor", "ExpandDims", "MatMulBnb4", "CDist", "GatherND"))
    if way == "MatMulBnb4":
        size, wide = b.width(), b.matmul(x, 32)
        packed = b.constant(b.rng.integers(0, 256, size * 16).astype(np.uint8), "w")
        scales = b.constant(b.rng.uniform(0.02, 0.1, size * 2).astype(np.float32))
        more = {"K": 32, "N": size, "block_size": 16, "quant_type": 1}
        return b.node(way, [wide, packed, scales], (*shape[:-1], size), MICROSOFT, **more)
    if way == "CDist":
        size = b.width()
        inputs = [x, b.weight(size, shape[-1])]
        return b.node(way, inputs, (shape[0], size), MICROSOFT) if len(shape) == 2 else None
    if way == "GatherND":
        return b.node(way, [x, b.constant(np.asarray([[1], [0]]))], shape, MICROSOFT)
    if len(shape) == 2:
        return None
    if way == "Trilu":
        return b.node(way, [x, b.constant(np.int64(1))], shape, MICROSOFT, upper=0)
    if way == "UnfoldTensor":
        if shape[1] < 2:
            return None
        made = b.raw(way, [x], MICROSOFT, dim=1, size=2)
        return b.node("Transpose", [made], (shape[0], shape[1] - 1, 2, shape[2]), perm=[0, 1, 3, 2])
    return b.node(way, [x, b.constant(np.int32(1))], (shape[0], 1, *shape[1:]), MICROSOFT)


@newer(3)
def embedded_in_bytes(b: Builder, x: str) -> str | None:
    n, t, _c = b.shapes[x]
    size = b.width()
    if size < 3:
        return None
    words = words_of(b, x)
    tables = [bytes_of(b, rows, size, signed=False) for rows in (16, t)]
    vectors = [bytes_of(b, size, signed=False) for _ in range(2)]
    scale, zero = steps(b)
    inputs = [words, "", *tables, "", *vectors, "", scale, scale, "", scale, scale, zero, zero, "", zero, zero]
    made, _ = b.several("QEmbedLayerNormalization", inputs, 2, MICROSOFT, epsilon=0.01)
    b.shapes[made] = (n, t, size)
    return made
