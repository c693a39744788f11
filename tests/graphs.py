"""Random valid ONNX graphs: operators with rules in random topologies, as exporters would write them.

`build` makes a model from choices. They come from hypothesis, which can make a failing graph smaller (`models`), or
from a seed (`seeded`), which is fast.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from hypothesis import strategies as st
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

T = TypeVar("T")
Shape = tuple[int, ...]
OPSETS = (11, 13, 17, 18, 21)
BATCH = 2


class Choices(Protocol):
    """Where decisions come from."""

    def integer(self, low: int, high: int) -> int:
        """A number from low to high."""

    def pick(self, among: Sequence[T]) -> T:
        """One of several."""


class Seeded:
    """Choices by a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def pick(self, among: Sequence[T]) -> T:
        return self._random.choice(among)


class Drawn:
    """Choices by hypothesis."""

    def __init__(self, draw: Callable[..., Any]) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return int(self._draw(st.integers(low, high)))

    def pick(self, among: Sequence[T]) -> T:
        found: T = self._draw(st.sampled_from(among))
        return found


Block = Callable[["Builder", str], "str | None"]
BLOCKS: dict[int, list[Block]] = {2: [], 3: [], 4: []}
"""What can be put behind a tensor [N, C], [N, T, C] or [N, C, H, W]; None where it does not fit."""


def block(*ranks: int) -> Callable[[Block], Block]:
    def enter(function: Block) -> Block:
        for rank in ranks:
            BLOCKS[rank].append(function)
        return function

    return enter


class Builder:
    """A graph that grows."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.opset = choices.pick(OPSETS)
        self.is_open = choices.integer(0, 1) == 1
        self.rng = np.random.default_rng(choices.integer(0, 1 << 16))
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        self.shapes: dict[str, Shape] = {}
        self.count = 0

    # Names and values.

    def name(self, wish: str) -> str:
        self.count += 1
        return f"{wish}{self.count}"

    def constant(self, array: Any, wish: str = "k") -> str:
        """An initializer or, now and then, a Constant node."""
        values, name = np.asarray(array), self.name(wish)
        if self.choices.integer(0, 5) == 0:
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values)))
        else:
            self.tensors.append(numpy_helper.from_array(values, name))
        return name

    def weight(self, *shape: int, fan: int | None = None, wish: str = "w") -> str:
        scale = 1 / math.sqrt(fan if fan is not None else max(1, math.prod(shape[1:])))
        return self.constant((scale * self.rng.standard_normal(shape)).astype(np.float32), wish)

    def vector(self, size: int, *, positive: bool = False, shape: Shape | None = None) -> str:
        values = self.rng.uniform(0.5, 1.5, size) if positive else 0.3 * self.rng.standard_normal(size)
        return self.constant(values.astype(np.float32).reshape(shape or (size,)), "b")

    def ints(self, *values: int) -> str:
        return self.constant(np.asarray(values, np.int64), "i")

    def node(self, kind: str, inputs: Sequence[str], shape: Shape, domain: str = "", **attributes: Any) -> str:
        """One node with one output of a known shape."""
        name = self.name(kind.lower())
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"/{name}", domain=domain, **attributes))
        self.shapes[name] = shape
        return name

    def width(self) -> int:
        return self.choices.pick((2, 3, 4, 6, 8, 12))

    def others(self, shape: Shape, *but: str) -> list[str]:
        """Other tensors of a shape."""
        return [name for name, other in self.shapes.items() if other == shape and name not in but]

    # What operator sets write in different ways.

    def with_axes(self, kind: str, x: str, axes: Sequence[int], shape: Shape, since: int, **more: Any) -> str:
        if self.opset >= since:
            return self.node(kind, [x, self.ints(*axes)], shape, **more)
        return self.node(kind, [x], shape, axes=list(axes), **more)

    def reshape(self, x: str, shape: Shape) -> str:
        """Reshape to [N, …], by one of the ways that exporters know."""
        way = self.choices.integer(0, 3)
        if way == 0 and not self.is_open:
            target = self.ints(*shape)
        elif way == 1 and shape[0] == self.shapes[x][0]:
            target = self.ints(0, *shape[1:])
        elif way == 2 and math.prod(shape[1:]) * BATCH == math.prod(self.shapes[x]) and shape[0] == BATCH:
            sizes = self.node("Shape", [x], (len(self.shapes[x]),))
            first = self.node("Gather", [sizes, self.ints(0)], (1,), axis=0)
            target = self.node("Concat", [first, self.ints(*shape[1:])], (len(shape),), axis=0)
        else:
            target = self.ints(-1, *shape[1:])
        for helper_value in (n for n, s in list(self.shapes.items()) if len(s) == 1):
            del self.shapes[helper_value]
        return self.node("Reshape", [x, target], shape)

    def split(self, x: str, axis: int, sizes: Sequence[int]) -> list[str]:
        names = [self.name("part") for _ in sizes]
        inputs, more = [x], {}
        if self.opset >= 13:
            inputs.append(self.ints(*sizes))
        else:
            more["split"] = list(sizes)
        self.nodes.append(helper.make_node("Split", inputs, names, axis=axis, **more))
        for name, size in zip(names, sizes, strict=True):
            shape = list(self.shapes[x])
            shape[axis] = size
            self.shapes[name] = tuple(shape)
        return names

    def activated(self, x: str) -> str:
        """A smooth or rectifying function of each element."""
        shape = self.shapes[x]
        plain = ["Relu", "Sigmoid", "Tanh", "Softplus", "Elu", "LeakyRelu", "HardSigmoid", "Selu", "Softsign", "Erf"]
        plain += ["Celu"] if self.opset >= 12 else []
        plain += ["Abs", "Neg", "ThresholdedRelu", "Identity", "Atan", "Sin"]
        plain += ["HardSwish"] if self.opset >= 14 else []
        plain += ["Mish"] if self.opset >= 18 else []
        plain += ["Gelu"] if self.opset >= 20 else []
        kind = self.choices.pick([*plain, "swish", "clip", "square root", "half"])
        if kind == "swish":
            return self.node("Mul", [x, self.node("Sigmoid", [x], shape)], shape)
        if kind == "clip":
            return self.node("Clip", [x, self.constant(np.float32(-1)), self.constant(np.float32(2))], shape)
        if kind == "square root":
            return self.node("Sqrt", [self.node("Abs", [x], shape)], shape)
        if kind == "half":
            double = self.node("Cast", [x], shape, to=TensorProto.DOUBLE)
            del self.shapes[double]
            return self.node("Cast", [double], shape, to=TensorProto.FLOAT)
        return self.node(kind, [x], shape)

    def matmul(self, x: str, size: int) -> str:
        """x [..., C] times a matrix, with a bias or not."""
        shape = self.shapes[x]
        y = self.node("MatMul", [x, self.weight(shape[-1], size, fan=shape[-1])], (*shape[:-1], size))
        return self.node("Add", [y, self.vector(size)], (*shape[:-1], size)) if self.choices.integer(0, 1) else y

    def conv(self, x: str, size: int, *, kernel: int = 1, group: int = 1, **attributes: Any) -> str:
        n, c, h, w = self.shapes[x]
        stride, dilation = attributes.get("strides", [1, 1])[0], attributes.get("dilations", [1, 1])[0]
        pad = dilation * (kernel // 2)
        height, width = ((s + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for s in (h, w))
        inputs = [x, self.weight(size, c // group, kernel, kernel)]
        inputs += [self.vector(size)] if self.choices.integer(0, 1) else []
        return self.node("Conv", inputs, (n, size, height, width), group=group, pads=[pad] * 4, **attributes)


# Blocks.


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
    """As torch writes it before opset 21: InstanceNormalization of [N, groups, rest], then scale and shift."""
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
    """A constant along some axes: positions, scales."""
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
        return b.node("DepthToSpace", [x], (n, c // 4, 2 * h, 2 * w), blocksize=2, mode=mode)
    if h % 2 == 0 and w % 2 == 0 and c <= 6:
        return b.node("SpaceToDepth", [x], (n, 4 * c, h // 2, w // 2), blocksize=2)
    return None


@block(4)
def resizing(b: Builder, x: str) -> str | None:
    n, c, h, w = b.shapes[x]
    if max(h, w) > 8:
        return None
    scales = b.constant(np.asarray([1, 1, 2, 2], np.float32))
    more = {"mode": b.choices.pick(("nearest", "linear")), "coordinate_transformation_mode": "asymmetric"}
    roi = b.constant(np.zeros(0, np.float32)) if b.opset < 13 else ""
    return b.node("Resize", [x, roi, scales], (n, c, 2 * h, 2 * w), nearest_mode="floor", **more)


@block(4)
def channels_last(b: Builder, x: str) -> str | None:
    """A MatMul over channels that lie last, as TensorFlow and ConvNeXt do."""
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
    bias = [b.choices.pick((b.vector(size), b.vector(size, shape=(1, size))))] if b.choices.integer(0, 1) else []
    return b.node("Gemm", [x, weight, *bias], (n, size), transB=turned, alpha=b.choices.pick((1.0, 0.5)))


@block(3)
def perceptron(b: Builder, x: str) -> str | None:
    hidden = b.activated(b.matmul(x, b.width()))
    return b.node("Add", [x, b.matmul(hidden, b.shapes[x][-1])], b.shapes[x])


@block(3)
def attention(b: Builder, x: str) -> str | None:
    """Heads by reshape and transposition, from one projection or three."""
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
    """A mixing of tokens: channels become tokens for a while."""
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
    """Something of all channels, which then each of them is divided by."""
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
    """Where the one, elsewhere the other."""
    shape = b.shapes[x]
    others = b.others(shape, x) or [b.activated(x)]
    mask = b.constant(b.rng.random((1, *shape[1:])) > 0.5)
    return b.node("Where", [mask, x, b.choices.pick(others)], shape)


@block(2, 3, 4)
def branches(b: Builder, x: str) -> str | None:
    """An If whose branches scale what is outside."""
    shape, bodies = b.shapes[x], []
    for branch in ("then", "else"):
        name = b.name(branch)
        values = numpy_helper.from_array(b.rng.uniform(0.5, 1.5, (1, *shape[1:])).astype(np.float32), f"{name}_scale")
        node = helper.make_node(b.choices.pick(("Mul", "Add")), [x, f"{name}_scale"], [name])
        kind = helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(shape))
        bodies.append(helper.make_graph([node], name, [], [kind], [values]))
    condition = b.constant(np.asarray(bool(b.choices.integer(0, 1))))
    return b.node("If", [condition], shape, then_branch=bodies[0], else_branch=bodies[1])


def build(choices: Choices) -> ModelProto:
    """A model of one input and one or two outputs."""
    b = Builder(choices)
    rank = choices.pick((2, 3, 4, 4))
    shape: Shape = {2: (BATCH, 6), 3: (BATCH, 5, 6), 4: (BATCH, 3, 8, 8)}[rank]
    b.shapes["x"] = shape
    last = b.conv("x", b.width(), kernel=3) if rank == 4 else b.matmul("x", b.width())
    del b.shapes["x"]
    for _ in range(choices.integer(2, 14)):
        source = last if choices.integer(0, 2) else choices.pick([n for n, s in b.shapes.items() if len(s) in BLOCKS])
        found = choices.pick(BLOCKS[len(b.shapes[source])])(b, source)
        if found is not None and len(b.shapes[found]) in BLOCKS and math.prod(b.shapes[found]) <= 20_000:
            last = found
    ends = [last]
    if choices.integer(0, 2) == 0:
        ends.append(choices.pick([n for n, s in b.shapes.items() if len(s) in BLOCKS]))
    outputs = []
    for end in ends:
        out = b.conv(end, 3) if len(b.shapes[end]) == 4 else b.matmul(end, 3)
        if choices.integer(0, 7) == 0:
            out = end  # shown as it is, so that its channels stay
        if out not in [o.name for o in outputs]:
            outputs.append(helper.make_tensor_value_info(out, TensorProto.FLOAT, [None] * len(b.shapes[out])))
    first = "n" if b.is_open else BATCH
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [first, *shape[1:]])]
    graph = helper.make_graph(b.nodes, "random", inputs, outputs, b.tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", b.opset)], ir_version=8)


def seeded(seed: int) -> ModelProto:
    """The model of a seed."""
    return build(Seeded(seed))


@st.composite
def models(draw: Callable[..., Any]) -> ModelProto:
    """Models for hypothesis."""
    return build(Drawn(draw))
