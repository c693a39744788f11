"""Blocks of random graphs with the operators that exporters write most often."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tests.support.builder import Builder, block


@block(2, 3, 4)
def activation(b: Builder, x: str) -> str | None:
    return b.activated(x)


@block(4)
def convolution(b: Builder, x: str) -> str | None:
    _n, c, h, w = b.shapes[x]
    kernel, more = b.choices.pick((1, 3)), {}
    if min(h, w) >= 4 and b.choices.integer(0, 3) == 0:
        more["strides"] = [2, 2]
    elif kernel == 3 and b.choices.integer(0, 4) == 0:
        more["dilations"] = [2, 2]
    groups = [g for g in (1, 1, 2, 4, c) if c % g == 0]
    group = b.choices.pick(groups)
    size = group * b.choices.pick((1, 2)) if group > 2 else 2 * b.width() if group == 2 else b.width()
    return b.conv(x, size, kernel=kernel, group=group, **more)


@block(4)
def transposed_convolution(b: Builder, x: str) -> str | None:
    n, c, h, w = b.shapes[x]
    if max(h, w) > 8:
        return None
    group = b.choices.pick([g for g in (1, 1, 2, c) if c % g == 0])
    each = b.choices.pick((1, 2, 3))
    inputs = [x, b.weight(c, each, 2, 2, fan=c)] + ([b.vector(each * group)] if b.choices.integer(0, 1) else [])
    return b.node("ConvTranspose", inputs, (n, each * group, 2 * h, 2 * w), group=group, strides=[2, 2])


@block(2, 4)
def batch_normalization(b: Builder, x: str) -> str | None:
    c = b.shapes[x][1]
    numbers = [b.vector(c, positive=True), b.vector(c), b.vector(c), b.vector(c, positive=True)]
    return b.node("BatchNormalization", [x, *numbers], b.shapes[x])


@block(4)
def instance_normalization(b: Builder, x: str) -> str | None:
    _n, c, h, w = b.shapes[x]
    if h * w < 4:
        return None
    return b.node("InstanceNormalization", [x, b.vector(c, positive=True), b.vector(c)], b.shapes[x])


@block(4)
def group_normalization(b: Builder, x: str) -> str | None:
    """Group normalisation as torch exports it before opset 21: InstanceNormalization of [N, groups, rest], affine."""
    n, c, h, w = b.shapes[x]
    groups = b.choices.pick([g for g in (1, 2, 4) if c % g == 0])
    if c * h * w // groups < 8:
        return None
    if b.opset >= 21 and b.choices.integer(0, 1):
        numbers = [b.vector(c, positive=True), b.vector(c)]
        return b.node("GroupNormalization", [x, *numbers], b.shapes[x], num_groups=groups)
    flat = b.reshape(x, (n, groups, c * h * w // groups))
    ones, zeros = b.constant(np.ones(groups, np.float32)), b.constant(np.zeros(groups, np.float32))
    normal = b.node("InstanceNormalization", [flat, ones, zeros], b.shapes[flat])
    back = b.reshape(normal, (n, c, h, w))
    scaled = b.node("Mul", [back, b.vector(c, positive=True, shape=(c, 1, 1))], (n, c, h, w))
    return b.node("Add", [scaled, b.vector(c, shape=(c, 1, 1))], (n, c, h, w))


@block(3)
def layer_normalization(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    if shape[-1] < 3:
        return None
    scale, shift = b.vector(shape[-1], positive=True), b.vector(shape[-1])
    if b.opset >= 17 and b.choices.integer(0, 1):
        return b.node("LayerNormalization", [x, scale, shift], shape, axis=-1)
    single = (*shape[:-1], 1)
    mean = b.with_axes("ReduceMean", x, [-1], single, 18)
    centred = b.node("Sub", [x, mean], shape)
    square = b.node("Pow", [centred, b.constant(np.float32(2))], shape)
    variance = b.with_axes("ReduceMean", square, [-1], single, 18)
    deviation = b.node("Sqrt", [b.node("Add", [variance, b.constant(np.float32(1e-3))], single)], single)
    normal = b.node("Div", [centred, deviation], shape)
    return b.node("Add", [b.node("Mul", [normal, scale], shape), shift], shape)


@block(4)
def pooling(b: Builder, x: str) -> str | None:
    n, c, h, w = b.shapes[x]
    if min(h, w) < 2:
        return None
    kind = b.choices.pick(("MaxPool", "AveragePool", "LpPool"))
    return b.node(kind, [x], (n, c, h // 2, w // 2), kernel_shape=[2, 2], strides=[2, 2])


@block(4)
def squeeze_and_excitation(b: Builder, x: str) -> str | None:
    n, c, _h, _w = b.shapes[x]
    if b.choices.integer(0, 1):
        mean = b.node("GlobalAveragePool", [x], (n, c, 1, 1))
    else:
        mean = b.with_axes("ReduceMean", x, [2, 3], (n, c, 1, 1), 18, keepdims=1)
    hidden = b.conv(mean, b.width())
    gate = b.node("Sigmoid", [b.conv(b.node("Relu", [hidden], b.shapes[hidden]), c)], (n, c, 1, 1))
    return b.node("Mul", [x, gate], b.shapes[x])


@block(2, 3, 4)
def residual(b: Builder, x: str) -> str | None:
    others = b.others(b.shapes[x], x)
    if not others:
        return None
    kind = b.choices.pick(("Add", "Add", "Mul", "Max", "Sum", "Mean", "Sub"))
    inputs = [x, b.choices.pick(others)]
    if kind in ("Sum", "Mean", "Max") and b.choices.integer(0, 1):
        inputs.append(b.choices.pick(others))
    return b.node(kind, inputs, b.shapes[x])


@block(2, 3, 4)
def scaled(b: Builder, x: str) -> str | None:
    """A constant along some axes, such as positions or scales."""
    shape = b.shapes[x]
    axes = (1, *(b.choices.pick((1, size)) for size in shape[1:]))
    values = b.constant(b.rng.uniform(0.5, 1.5, axes).astype(np.float32))
    return b.node(b.choices.pick(("Mul", "Add", "Div")), [x, values], shape)


@block(2, 3, 4)
def concatenation(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    axis = b.choices.integer(1, len(shape) - 1)
    fits = [
        n
        for n, s in b.shapes.items()
        if len(s) == len(shape) and s[:axis] + s[axis + 1 :] == shape[:axis] + shape[axis + 1 :]
    ]
    parts = [x, *(b.choices.pick(fits) for _ in range(b.choices.integer(1, 2)))]
    size = sum(b.shapes[part][axis] for part in parts)
    return b.node("Concat", parts, (*shape[:axis], size, *shape[axis + 1 :]), axis=axis) if size <= 48 else None


@block(2, 3, 4)
def splitting(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    axis = b.choices.integer(1, len(shape) - 1)
    if shape[axis] < 2:
        return None
    first = shape[axis] // 2 if b.choices.integer(0, 1) else b.choices.integer(1, shape[axis] - 1)
    parts = b.split(x, axis, [first, shape[axis] - first])
    if first == shape[axis] - first and b.choices.integer(0, 1):
        return b.node("Mul", [parts[0], b.activated(parts[1])], b.shapes[parts[0]])
    return b.choices.pick(parts)


@block(2, 3, 4)
def slicing(b: Builder, x: str) -> str | None:
    if b.opset < 11:
        return None
    shape = b.shapes[x]
    axis = b.choices.integer(1, len(shape) - 1)
    size, step = shape[axis], b.choices.pick((1, 1, 2))
    start = b.choices.integer(0, size - 1)
    end = b.choices.integer(start + 1, size)
    numbers = [b.ints(start), b.ints(end if end < size else (1 << 62)), b.ints(axis), b.ints(step)]
    left = len(range(start, end, step))
    return b.node("Slice", [x, *numbers], (*shape[:axis], left, *shape[axis + 1 :]))


@block(2, 3, 4)
def gathering(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    axis = b.choices.integer(1, len(shape) - 1)
    places = [b.choices.integer(0, shape[axis] - 1) for _ in range(b.choices.integer(1, shape[axis]))]
    return b.node("Gather", [x, b.ints(*places)], (*shape[:axis], len(places), *shape[axis + 1 :]), axis=axis)


@block(2, 3, 4)
def padding(b: Builder, x: str) -> str | None:
    if b.opset < 11:
        return None
    shape = b.shapes[x]
    axis = b.choices.integer(1, len(shape) - 1)
    before, after = b.choices.integer(0, 2), b.choices.integer(0, 2)
    pads = [0] * (2 * len(shape))
    pads[axis], pads[len(shape) + axis] = before, after
    return b.node("Pad", [x, b.ints(*pads)], (*shape[:axis], shape[axis] + before + after, *shape[axis + 1 :]))


@block(4)
def channel_shuffle(b: Builder, x: str) -> str | None:
    n, c, h, w = b.shapes[x]
    groups = b.choices.pick([g for g in (1, 2, 4) if c % g == 0])
    apart = b.reshape(x, (n, groups, c // groups, h, w))
    turned = b.node("Transpose", [apart], (n, c // groups, groups, h, w), perm=[0, 2, 1, 3, 4])
    return b.reshape(turned, (n, c, h, w))


@block(4)
def space_and_depth(b: Builder, x: str) -> str | None:
    n, c, h, w = b.shapes[x]
    if c % 4 == 0 and max(h, w) <= 8:
        mode = b.choices.pick(("DCR", "CRD"))
        more = {"mode": mode} if b.opset >= 11 else {}
        return b.node("DepthToSpace", [x], (n, c // 4, 2 * h, 2 * w), blocksize=2, **more)
    if h % 2 == 0 and w % 2 == 0 and c <= 6:
        return b.node("SpaceToDepth", [x], (n, 4 * c, h // 2, w // 2), blocksize=2)
    return None


@block(4)
def resizing(b: Builder, x: str) -> str | None:
    if b.opset < 11:
        return None
    n, c, h, w = b.shapes[x]
    if max(h, w) > 8:
        return None
    scales = b.constant(np.asarray([1, 1, 2, 2], np.float32))
    more = {"mode": b.choices.pick(("nearest", "linear")), "coordinate_transformation_mode": "asymmetric"}
    roi = b.constant(np.zeros(0, np.float32)) if b.opset < 13 else ""
    return b.node("Resize", [x, roi, scales], (n, c, 2 * h, 2 * w), nearest_mode="floor", **more)


@block(4)
def channels_last(b: Builder, x: str) -> str | None:
    """A MatMul over the channels as the last axis, as in TensorFlow and ConvNeXt."""
    n, c, h, w = b.shapes[x]
    last = b.node("Transpose", [x], (n, h, w, c), perm=[0, 2, 3, 1])
    wide = b.activated(b.matmul(last, b.width()))
    size = b.shapes[wide][-1]
    return b.node("Transpose", [wide], (n, size, h, w), perm=[0, 3, 1, 2])


@block(4)
def per_channel_slopes(b: Builder, x: str) -> str | None:
    c = b.shapes[x][1]
    return b.node("PRelu", [x, b.vector(c, positive=True, shape=(c, 1, 1))], b.shapes[x])


@block(4)
def to_tokens(b: Builder, x: str) -> str | None:
    n, c, h, w = b.shapes[x]
    flat = b.reshape(x, (n, c, h * w))
    return b.node("Transpose", [flat], (n, h * w, c), perm=[0, 2, 1])


@block(4)
def to_vector(b: Builder, x: str) -> str | None:
    n, c, h, w = b.shapes[x]
    way = b.choices.integer(0, 2)
    if way == 0 and c * h * w <= 256:
        return b.node("Flatten", [x], (n, c * h * w), axis=1)
    if way == 1 and c * h * w <= 256:
        return b.reshape(x, (n, c * h * w))
    mean = b.node("GlobalMaxPool", [x], (n, c, 1, 1))
    return b.with_axes("Squeeze", mean, [2, 3], (n, c), 13)


@block(2, 3)
def linear(b: Builder, x: str) -> str | None:
    return b.matmul(x, b.width())


@block(2)
def gemm(b: Builder, x: str) -> str | None:
    n, c = b.shapes[x]
    size, turned = b.width(), b.choices.integer(0, 1)
    weight = b.weight(*((size, c) if turned else (c, size)), fan=c)
    is_biased = b.choices.integer(0, 1) or b.opset < 11
    bias = [b.choices.pick((b.vector(size), b.vector(size, shape=(1, size))))] if is_biased else []
    return b.node("Gemm", [x, weight, *bias], (n, size), transB=turned, alpha=b.choices.pick((1.0, 0.5)))


@block(3)
def perceptron(b: Builder, x: str) -> str | None:
    hidden = b.activated(b.matmul(x, b.width()))
    return b.node("Add", [x, b.matmul(hidden, b.shapes[x][-1])], b.shapes[x])


@block(3)
def attention(b: Builder, x: str) -> str | None:
    """Attention heads by reshape and transposition, from one projection or three."""
    n, t, c = b.shapes[x]
    heads, each = b.choices.pick((1, 2, 3)), b.choices.pick((2, 4))
    size = heads * each
    if b.choices.integer(0, 1):
        flat = b.split(b.matmul(x, 3 * size), 2, [size] * 3)
    else:
        flat = [b.matmul(x, size) for _ in range(3)]
    q, k, v = (b.reshape(part, (n, t, heads, each)) for part in flat)
    q, v = (b.node("Transpose", [part], (n, heads, t, each), perm=[0, 2, 1, 3]) for part in (q, v))
    k = b.node("Transpose", [k], (n, heads, each, t), perm=[0, 2, 3, 1])
    scores = b.node("MatMul", [q, k], (n, heads, t, t))
    scaled_scores = b.node("Mul", [scores, b.constant(np.float32(1 / math.sqrt(each)))], (n, heads, t, t))
    shares = b.node("Softmax", [scaled_scores], (n, heads, t, t), axis=3 if b.opset < 13 else -1)
    mixed = b.node("MatMul", [shares, v], (n, heads, t, each))
    back = b.node("Transpose", [mixed], (n, t, heads, each), perm=[0, 2, 1, 3])
    return b.matmul(b.reshape(back, (n, t, size)), c)


@block(3)
def recurrence(b: Builder, x: str) -> str | None:
    n, t, c = b.shapes[x]
    kind = b.choices.pick(("LSTM", "GRU", "RNN"))
    size, gates = b.choices.pick((2, 3, 4)), {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    both = b.choices.integer(0, 1)
    first = b.node("Transpose", [x], (t, n, c), perm=[1, 0, 2])
    inputs = [first, b.weight(1 + both, gates * size, c, fan=c), b.weight(1 + both, gates * size, size, fan=size)]
    inputs += [b.weight(1 + both, 2 * gates * size, fan=4)] if b.choices.integer(0, 1) else []
    more: dict[str, Any] = {"hidden_size": size} | ({"direction": "bidirectional"} if both else {})
    y = b.node(kind, inputs, (t, 1 + both, n, size), **more)
    turned = b.node("Transpose", [y], (n, t, 1 + both, size), perm=[2, 0, 1, 3])
    for name in (first, y, turned):
        b.shapes.pop(name)
    b.shapes[turned] = (n, t, 1 + both, size)
    out = b.reshape(turned, (n, t, (1 + both) * size))
    b.shapes.pop(turned)
    # Positions of an axis that holds each channel twice are no symmetry, as the permutation oracle takes them for.
    return b.matmul(out, b.width()) if both else out


@block(3)
def einsum(b: Builder, x: str) -> str | None:
    n, t, c = b.shapes[x]
    size = b.width()
    if b.opset < 12:
        return None
    return b.node("Einsum", [x, b.weight(size, c, fan=c)], (n, t, size), equation="ntc,dc->ntd")


@block(3)
def turned(b: Builder, x: str) -> str | None:
    """A token-mixing layer: the token axis is transposed with the channels and back."""
    n, t, c = b.shapes[x]
    flipped = b.node("Transpose", [x], (n, c, t), perm=[0, 2, 1])
    mixed = b.matmul(b.activated(b.matmul(flipped, b.width())), t)
    return b.node("Transpose", [mixed], (n, t, c), perm=[0, 2, 1])


@block(3)
def tokens_to_vector(b: Builder, x: str) -> str | None:
    n, t, c = b.shapes[x]
    way = b.choices.integer(0, 2)
    if way == 0:
        return b.with_axes("ReduceMean", x, [1], (n, c), 18, keepdims=0)
    if way == 1:
        return b.node("Gather", [x, b.constant(np.int64(0))], (n, c), axis=1)
    return b.reshape(x, (n, t * c)) if t * c <= 256 else None


@block(2)
def to_sequence(b: Builder, x: str) -> str | None:
    n, c = b.shapes[x]
    return b.with_axes("Unsqueeze", x, [1], (n, 1, c), 13)


@block(2, 3, 4)
def reduction(b: Builder, x: str) -> str | None:
    """A norm over all channels, by which each channel is divided."""
    shape = b.shapes[x]
    axis = 1 if len(shape) == 4 else len(shape) - 1
    single = tuple(1 if place == axis else size for place, size in enumerate(shape))
    kind = b.choices.pick(("ReduceL2", "ReduceMax", "ReduceSumSquare", "ReduceL1"))
    total = b.with_axes(kind, b.node("Abs", [x], shape), [axis], single, 18, keepdims=1)
    return b.node("Div", [x, b.node("Add", [total, b.constant(np.float32(1))], single)], shape)


@block(2, 3)
def softmax(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    return b.node("Softmax", [x], shape, axis=len(shape) - 1)


@block(2, 3, 4)
def chosen(b: Builder, x: str) -> str | None:
    """A Where that selects between two tensors."""
    shape = b.shapes[x]
    others = b.others(shape, x) or [b.activated(x)]
    mask = b.constant(b.rng.random((1, *shape[1:])) > 0.5)
    return b.node("Where", [mask, x, b.choices.pick(others)], shape)


@block(2, 3, 4)
def branches(b: Builder, x: str) -> str | None:
    """An If whose branches scale an outer value."""
    shape, bodies = b.shapes[x], []
    for branch in ("then", "else"):
        name = b.name(branch)
        values = numpy_helper.from_array(b.rng.uniform(0.5, 1.5, (1, *shape[1:])).astype(np.float32), f"{name}_scale")
        node = helper.make_node(b.choices.pick(("Mul", "Add")), [x, f"{name}_scale"], [name])
        kind = helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(shape))
        bodies.append(helper.make_graph([node], name, [], [kind], [values]))
    condition = b.constant(np.asarray(bool(b.choices.integer(0, 1))))
    return b.node("If", [condition], shape, then_branch=bodies[0], else_branch=bodies[1])
