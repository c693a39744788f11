"""Random ONNX graphs with open input sizes and the shape arithmetic that exporters and people write.

Every tensor that serves as the input of a block is of one of three kinds: maps [N, C, H, W], tokens [N, T, C] and
vectors [N, C], with a known number of channels; all other sizes are open. The graphs may run at some sizes only, or at
none: callers must test them with onnxruntime.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Block = Callable[["Open", str], "str | None"]
BLOCKS: dict[str, list[Block]] = {"map": [], "tokens": [], "vector": []}
_FAR = 1 << 62


def block(*kinds: str) -> Callable[[Block], Block]:
    def enter(function: Block) -> Block:
        for kind in kinds:
            BLOCKS[kind].append(function)
        return function

    return enter


class Open:
    """A builder that grows a graph by the choices of a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.rng = np.random.default_rng(seed)
        self.opset = self.random.choice((13, 17, 18, 21))
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        self.kinds: dict[str, tuple[str, int, str]] = {}
        """Kind, number of channels, and a mark shared by tensors of equal open sizes."""
        self.count = 0

    def pick(self, *among: Any) -> Any:
        return self.random.choice(among)

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = self.name(kind.lower())
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"/{name}", **attributes))
        return name

    def register(self, name: str, kind: str, channels: int, mark: str) -> str:
        self.kinds[name] = (kind, channels, mark)
        return name

    def constant(self, array: Any) -> str:
        name = self.name("k")
        self.tensors.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.asarray(values, np.int64))

    def weight(self, *shape: int) -> str:
        scale = 1 / math.sqrt(max(1, math.prod(shape[1:])))
        return self.constant((scale * self.rng.standard_normal(shape)).astype(np.float32))

    def numbers(self, size: int) -> str:
        return self.constant(self.rng.uniform(0.5, 1.5, size).astype(np.float32))

    def width(self) -> int:
        return int(self.pick(2, 4, 6, 8, 12))

    # Shape arithmetic.

    def size(self, x: str, axis: int) -> str:
        """Return one size of a tensor, as a tensor of one element."""
        shape = self.node("Shape", x)
        if self.pick(True, False):
            return self.node("Slice", shape, self.ints(axis), self.ints(axis + 1))
        if self.pick(True, False):
            return self.node("Gather", shape, self.ints(axis), axis=0)
        single = self.node("Gather", shape, self.constant(np.int64(axis)), axis=0)
        return self.node("Unsqueeze", single, self.ints(0))

    def like(self, x: str, axis: int) -> str:
        """Return the size of an axis, possibly of another tensor that should have the same size."""
        mark = self.kinds[x][2] if x in self.kinds else None
        others = [n for n, (k, _, m) in self.kinds.items() if m == mark and x in self.kinds and k == self.kinds[x][0]]
        return self.size(self.random.choice(others) if others and axis != self.channel_axis(x) else x, axis)

    def channel_axis(self, x: str) -> int:
        return 2 if x in self.kinds and self.kinds[x][0] == "tokens" else 1

    def target(self, *parts: str | int) -> str:
        """Concatenate constant and computed sizes."""
        return self.node("Concat", *(self.ints(p) if isinstance(p, int) else p for p in parts), axis=0)

    def changed(self, size: str) -> str:
        """Return a size by another computation with the same or nearly the same result."""
        way = self.random.randint(0, 4)
        if way == 0:
            return self.node("Mul", self.node("Div", size, self.ints(2)), self.ints(2))
        if way == 1:
            return self.node("Sub", self.node("Add", size, self.ints(3)), self.ints(3))
        if way == 2:
            double = self.node("Cast", size, to=TensorProto.FLOAT)
            scaled = self.node("Mul", double, self.constant(np.float32(1.0)))
            return self.node("Cast", self.node("Floor", scaled), to=TensorProto.INT64)
        return size

    def conv(self, x: str, size: int, kernel: int = 1, **more: Any) -> str:
        _, channels, mark = self.kinds[x]
        inputs = [x, self.weight(size, channels // more.get("group", 1), kernel, kernel)]
        inputs += [self.weight(size)] if self.pick(True, False) else []
        made = self.node("Conv", *inputs, pads=[kernel // 2] * 4, **more)
        return self.register(made, "map", size, mark if more.get("strides", [1])[0] == 1 else self.name("m"))

    def matmul(self, x: str, size: int) -> str:
        kind, channels, mark = self.kinds[x]
        return self.register(self.node("MatMul", x, self.weight(channels, size)), kind, size, mark)

    def back(self, x: str) -> str:
        """Add the output: some channels of the current tensors."""
        return self.conv(x, 3) if self.kinds[x][0] == "map" else self.matmul(x, 3)


def seeded(seed: int) -> ModelProto:
    """Return the model of a seed."""
    b = Open(seed)
    kind = b.pick("map", "map", "tokens", "map")
    first = {"map": ("n", 3, "h", "w"), "tokens": ("n", "t", 6)}[kind]
    b.register("x", kind, 3 if kind == "map" else 6, "m0")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, first)]
    last = b.conv("x", b.width(), b.pick(1, 3)) if kind == "map" else b.matmul("x", b.width())
    if b.random.random() < 0.2:  # a second input with symbols of its own
        symbols = {
            "map": ("n", 3, b.pick("h", "h2"), b.pick("w", "h")),
            "tokens": (b.pick("n", "n2"), b.pick("t", "s"), 6),
        }[kind]
        inputs.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, symbols))
        b.register("y", kind, 3 if kind == "map" else 6, "m1")
        other = b.conv("y", b.width()) if kind == "map" else b.matmul("y", b.width())
        del b.kinds["y"]
        last = b.pick(last, other)
    del b.kinds["x"]
    for _ in range(b.random.randint(2, 9)):
        source = last if b.random.random() < 0.7 else b.random.choice(list(b.kinds))
        found = b.random.choice(BLOCKS[b.kinds[source][0]])(b, source)
        if found is not None and b.kinds[found][1] <= 48:
            last = found
    ends = [last, *([b.random.choice(list(b.kinds))] if b.random.random() < 0.4 else [])]
    outputs = {b.back(end) if b.random.random() < 0.9 else end: None for end in ends}
    shown = [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs]
    graph = helper.make_graph(b.nodes, "open", inputs, shown, b.tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", b.opset)], ir_version=8)


# Maps.


@block("map")
def convolution(b: Open, x: str) -> str | None:
    channels = b.kinds[x][1]
    group = b.pick(1, 1, *[g for g in (2, channels) if channels % g == 0])
    size = group * b.pick(1, 2) if group > 2 else 2 * b.width() if group == 2 else b.width()
    more = {"strides": [2, 2]} if b.pick(True, False, False) else {}
    return b.conv(x, size, b.pick(1, 3), group=group, **more)


@block("map", "tokens", "vector")
def activation(b: Open, x: str) -> str | None:
    return b.register(b.node(b.pick("Relu", "Sigmoid", "Tanh", "LeakyRelu", "Abs"), x), *b.kinds[x])


@block("map", "tokens", "vector")
def residual(b: Open, x: str) -> str | None:
    others = [n for n, kind in b.kinds.items() if kind == b.kinds[x] and n != x]
    return b.register(b.node(b.pick("Add", "Mul", "Max"), x, b.random.choice(others)), *b.kinds[x]) if others else None


@block("map", "tokens")
def concatenation(b: Open, x: str) -> str | None:
    kind, channels, mark = b.kinds[x]
    others = [n for n, (k, _, m) in b.kinds.items() if k == kind and m == mark]
    other = b.random.choice(others)
    joined = b.node("Concat", x, other, axis=b.channel_axis(x))
    return b.register(joined, kind, channels + b.kinds[other][1], mark)


@block("map")
def concatenated_rows(b: Open, x: str) -> str | None:
    kind, channels, mark = b.kinds[x]
    others = [n for n, (k, c, m) in b.kinds.items() if (k, c, m) == (kind, channels, mark)]
    return b.register(b.node("Concat", x, b.random.choice(others), axis=b.pick(2, 3)), kind, channels, b.name("m"))


@block("map")
def pooling(b: Open, x: str) -> str | None:
    more: dict[str, Any] = b.pick({"ceil_mode": 1}, {}, {"auto_pad": "SAME_UPPER"})
    pooled = b.node(b.pick("MaxPool", "AveragePool"), x, kernel_shape=[2, 2], strides=[2, 2], **more)
    return b.register(pooled, "map", b.kinds[x][1], b.name("m"))


@block("map")
def upsampled_to_another(b: Open, x: str) -> str | None:
    """A strided operator, then a resize back to the previous size."""
    _, channels, mark = b.kinds[x]
    small = b.conv(x, channels, 3, strides=[2, 2])
    sizes = b.target(*(b.size(x if axis > 1 else small, axis) for axis in range(4)))
    wide = b.node("Resize", small, "", "", sizes, mode=b.pick("nearest", "linear"))
    return b.register(b.node("Add", b.register(wide, "map", channels, mark), x), "map", channels, mark)


@block("map")
def upsampled_and_cut(b: Open, x: str) -> str | None:
    _, channels, mark = b.kinds[x]
    small = b.conv(x, channels, 3, strides=[2, 2])
    scales = b.constant(np.asarray([1, 1, 2, 2], np.float32))
    wide = b.node("Resize", small, "", scales, mode="nearest")
    ends = b.target(b.size(x, 2), b.size(x, 3))
    cut = b.node("Slice", wide, b.ints(0, 0), ends, b.ints(2, 3))
    return b.register(b.node("Add", cut, x), "map", channels, mark)


@block("map")
def odd_scale(b: Open, x: str) -> str | None:
    _, channels, _ = b.kinds[x]
    scales = b.constant(np.asarray([1, b.pick(1.0, 1.0, 1.0, 1.05), b.pick(1.5, 2.0, 1.3), 2], np.float32))
    return b.register(b.node("Resize", x, "", scales, mode="nearest"), "map", channels, b.name("m"))


@block("map")
def padded_to_a_multiple(b: Open, x: str) -> str | None:
    _, channels, _ = b.kinds[x]
    rest = b.node("Mod", b.size(x, 2), b.ints(4))
    missing = b.node("Mod", b.node("Sub", b.ints(4), rest), b.ints(4))
    pads = b.target(0, 0, 0, 0, 0, b.pick(0, 0, 1), missing, 0)
    return b.register(b.node("Pad", x, pads), "map", channels, b.name("m")) if b.pick(True, True) else None


@block("map")
def flat_and_back(b: Open, x: str) -> str | None:
    """[N, C, H, W] -> [N, C, HW] -> [N, C, H, W], in one of several forms."""
    kind, channels, mark = b.kinds[x]
    count = b.node("Mul", b.like(x, 2), b.like(x, 3))
    flat = b.node(
        "Reshape", x, b.pick(b.target(0, 0, -1), b.target(b.like(x, 0), channels, count), b.target(0, channels, -1))
    )
    if b.pick(True, False):
        flat = b.node(b.pick("Softmax", "Relu"), flat)
    back = b.pick(
        b.target(b.like(x, 0), -1, b.like(x, 2), b.like(x, 3)),
        b.target(0, b.size(x, 1), b.like(x, 2), b.changed(b.like(x, 3))),
    )
    return b.register(b.node("Reshape", flat, back), kind, channels, mark)


@block("map")
def to_tokens(b: Open, x: str) -> str | None:
    _, channels, mark = b.kinds[x]
    flat = b.node(
        "Reshape", x, b.pick(b.target(0, 0, -1), b.target(0, channels, -1), b.target(b.size(x, 0), b.size(x, 1), -1))
    )
    return b.register(b.node("Transpose", flat, perm=[0, 2, 1]), "tokens", channels, f"{mark}t")


@block("map")
def wrong_view(b: Open, x: str) -> str | None:
    """Channels and pixels mixed: a valid graph without a meaning."""
    _, channels, _ = b.kinds[x]
    last = b.pick(channels, 2, channels * 2)
    return b.register(b.node("Reshape", x, b.target(b.pick(0, b.size(x, 0)), -1, last)), "tokens", last, b.name("m"))


@block("map")
def baked(b: Open, x: str) -> str | None:
    _, channels, _ = b.kinds[x]
    return b.register(b.node("Reshape", x, b.ints(-1, channels, 8, 8)), "map", channels, b.name("m"))


@block("map")
def shuffled(b: Open, x: str) -> str | None:
    kind, channels, mark = b.kinds[x]
    groups = b.pick(*[g for g in (2, 3, 4) if channels % g == 0] or [1])
    rows, columns = b.like(x, 2), b.like(x, 3)
    each = b.pick(channels // groups, b.node("Div", b.size(x, 1), b.ints(groups)))
    apart = b.node("Reshape", x, b.target(b.like(x, 0), groups, each, rows, columns))
    turned = b.node("Transpose", apart, perm=[0, 2, 1, 3, 4])
    whole = b.pick(-1, channels, b.size(x, 1))
    return b.register(b.node("Reshape", turned, b.target(b.like(x, 0), whole, rows, columns)), kind, channels, mark)


@block("map")
def pixel_shuffle(b: Open, x: str) -> str | None:
    _, channels, _ = b.kinds[x]
    if channels % 4:
        return None
    rows, columns = b.size(x, 2), b.size(x, 3)
    apart = b.node("Reshape", x, b.target(b.size(x, 0), b.pick(-1, channels // 4), 2, 2, rows, columns))
    turned = b.node("Transpose", apart, perm=[0, 1, 4, 2, 5, 3])
    twice = [b.node("Mul", size, b.ints(2)) for size in (rows, columns)]
    return b.register(b.node("Reshape", turned, b.target(0, channels // 4, *twice)), "map", channels // 4, b.name("m"))


@block("map")
def windows(b: Open, x: str) -> str | None:
    """Windows of two by two pixels become part of the batch."""
    _, channels, _ = b.kinds[x]
    halves = [b.node("Div", b.size(x, axis), b.ints(2)) for axis in (2, 3)]
    apart = b.node("Reshape", x, b.target(b.size(x, 0), channels, halves[0], 2, halves[1], 2))
    turned = b.node("Transpose", apart, perm=[0, 2, 4, 3, 5, 1])
    return b.register(b.node("Reshape", turned, b.ints(-1, 4, channels)), "tokens", channels, b.name("m"))


@block("map")
def merged_with_the_batch(b: Open, x: str) -> str | None:
    """[N, C, H, W] -> [N*C, 1, H, W] or [N*C, HW], an operation on each channel, and back."""
    kind, channels, mark = b.kinds[x]
    rows, columns = b.like(x, 2), b.like(x, 3)
    if b.pick(True, False):
        each = b.node("Reshape", x, b.target(-1, 1, rows, columns))
        each = b.node("Conv", each, b.weight(1, 1, 3, 3), pads=[1, 1, 1, 1])
    else:
        each = b.node("Flatten", x, axis=2)
        each = b.node(b.pick("Softmax", "LpNormalization"), each, axis=1)
    back = b.target(b.like(x, 0), b.pick(channels, b.size(x, 1)), rows, columns)
    return b.register(b.node("Reshape", each, back), kind, channels, mark)


@block("map")
def sizes_as_numbers(b: Open, x: str) -> str | None:
    """Division by a number computed from sizes."""
    kind, channels, mark = b.kinds[x]
    first, second = (b.size(x, b.random.randint(0, 3)) for _ in range(2))
    number = b.node(b.pick("Mul", "Add", "Max", "Min"), first, second)
    if b.pick(True, False):
        number = b.node("Div", number, b.pick(b.size(x, b.random.randint(0, 3)), b.ints(2)))
    number = b.node("Add", b.node("Cast", number, to=TensorProto.FLOAT), b.constant(np.float32(1)))
    if b.pick(True, False):
        number = b.node("Sqrt", number)
    return b.register(b.node("Div", x, number), kind, channels, mark)


@block("map", "tokens")
def cut_by_a_size(b: Open, x: str) -> str | None:
    """A slice of the channels or of an open axis whose end is computed from a size."""
    kind, channels, mark = b.kinds[x]
    axis = b.channel_axis(x) if b.pick(True, False, False) else b.random.randint(1, 3 if kind == "map" else 2)
    limit = b.pick(b.ints(b.pick(1, 2, 8)), b.size(x, b.pick(0, 1, 2)), b.node("Div", b.size(x, axis), b.ints(2)))
    if b.pick(True, False):
        limit = b.node(b.pick("Min", "Max"), limit, b.pick(b.ints(8), b.size(x, b.pick(1, 2))))
    cut = b.node("Slice", x, b.ints(0), limit, b.ints(axis))
    if axis != b.channel_axis(x):
        return b.register(cut, kind, channels, b.name("m"))
    total = b.node("ReduceSum", cut, b.ints(axis), keepdims=1)
    return b.register(b.node("Mul", x, total), kind, channels, mark)


@block("map", "tokens")
def halves(b: Open, x: str) -> str | None:
    kind, channels, mark = b.kinds[x]
    axis = b.channel_axis(x)
    if channels % 2:
        return None
    half = b.pick(b.ints(channels // 2), b.node("Div", b.size(x, axis), b.ints(2)))
    if b.pick(True, False):
        pieces = [b.name("part"), b.name("part")]
        sizes = b.node("Concat", half, half, axis=0)
        b.nodes.append(helper.make_node("Split", [x, sizes], pieces, axis=axis, name=f"/{pieces[0]}"))
    else:
        pieces = [
            b.node("Slice", x, b.ints(0), half, b.ints(axis)),
            b.node("Slice", x, half, b.ints(_FAR), b.ints(axis)),
        ]
    return b.register(b.node("Mul", pieces[0], b.node("Sigmoid", pieces[1])), kind, channels // 2, mark)


@block("map")
def patches(b: Open, x: str) -> str | None:
    """Every second row and column, concatenated along the channels."""
    _, channels, _ = b.kinds[x]
    if channels > 8:
        return None
    parts = [
        b.node("Slice", x, b.ints(i, j), b.ints(_FAR, _FAR), b.ints(2, 3), b.ints(2, 2)) for i in (0, 1) for j in (0, 1)
    ]
    return b.register(b.node("Concat", *parts, axis=1), "map", 4 * channels, b.name("m"))


@block("map")
def pooled_vector(b: Open, x: str) -> str | None:
    _, channels, _ = b.kinds[x]
    mean = b.node(b.pick("GlobalAveragePool", "GlobalMaxPool"), x)
    way = b.random.randint(0, 3)
    if way == 0:
        flat = b.node("Squeeze", mean)
    elif way == 1:
        flat = b.node("Squeeze", mean, b.ints(2, 3))
    elif way == 2:
        flat = b.node("Reshape", mean, b.pick(b.target(0, -1), b.target(b.size(x, 0), -1), b.target(-1, channels)))
    else:
        flat = b.node("Flatten", mean, axis=1)
    return b.register(flat, "vector", channels, "v")


@block("map")
def gate(b: Open, x: str) -> str | None:
    kind, channels, mark = b.kinds[x]
    mean = b.register(b.node("ReduceMean", x, **({"axes": [2, 3]} if b.opset < 18 else {})), "map", channels, "1")
    if b.opset >= 18:
        b.nodes[-1].input.append(b.ints(2, 3))
    hidden = b.conv(mean, b.width())
    opened = b.node("Sigmoid", b.conv(b.register(b.node("Relu", hidden), *b.kinds[hidden]), channels))
    for name in list(b.kinds):
        if b.kinds[name][2] == "1":
            del b.kinds[name]
    if b.pick(True, False):
        opened = b.node("Expand", opened, b.pick(b.node("Shape", x), b.target(1, channels, b.size(x, 2), 1)))
    return b.register(b.node("Mul", x, opened), kind, channels, mark)


@block("map")
def positions(b: Open, x: str) -> str | None:
    """A row-dependent tensor from Range, concatenated or added."""
    kind, channels, mark = b.kinds[x]
    size = b.node("Squeeze", b.size(x, 2), b.ints(0))
    row = b.node("Cast", b.node("Range", b.constant(np.int64(0)), size, b.constant(np.int64(1))), to=TensorProto.FLOAT)
    column = b.node("Reshape", row, b.ints(1, 1, -1, 1))
    if b.pick(True, False):
        return b.register(b.node("Add", x, column), kind, channels, mark)
    ones = b.node("ConstantOfShape", b.target(b.size(x, 0), 1, b.size(x, 2), b.size(x, 3)))
    joined = b.node("Concat", x, b.node("Add", ones, column), axis=1)
    return b.register(joined, kind, channels + 1, mark)


@block("map")
def statistics_of_groups(b: Open, x: str) -> str | None:
    kind, channels, mark = b.kinds[x]
    groups = b.pick(*[g for g in (1, 2, 4) if channels % g == 0])
    flat = b.node("Reshape", x, b.pick(b.ints(0, groups, -1), b.target(b.size(x, 0), groups, -1)))
    normal = b.node(
        "InstanceNormalization", flat, b.constant(np.ones(groups, np.float32)), b.constant(np.zeros(groups, np.float32))
    )
    back = b.node("Reshape", normal, b.pick(b.node("Shape", x), b.target(0, channels, b.size(x, 2), b.size(x, 3))))
    return b.register(
        b.node("Mul", back, b.constant(b.rng.uniform(0.5, 1.5, (channels, 1, 1)).astype(np.float32))),
        kind,
        channels,
        mark,
    )


@block("map")
def correlation(b: Open, x: str) -> str | None:
    """Products of all pairs of pixels, or of all pairs of channels."""
    kind, channels, mark = b.kinds[x]
    flat = b.node("Reshape", x, b.target(0, channels, -1))
    turned = b.node("Transpose", flat, perm=[0, 2, 1])
    if b.pick(True, False):
        shares = b.node("Softmax", b.node("MatMul", turned, flat), axis=-1)
        mixed = b.node("MatMul", flat, shares)
    else:
        shares = b.node("Softmax", b.node("MatMul", flat, turned), axis=-1)
        mixed = b.node("MatMul", shares, flat)
    back = b.target(b.like(x, 0), b.pick(channels, -1, b.size(x, 1)), b.like(x, 2), b.like(x, 3))
    return b.register(b.node("Reshape", mixed, back), kind, channels, mark)


@block("map", "tokens")
def by_size(b: Open, x: str) -> str | None:
    """An If whose condition depends on a size."""
    kind, channels, mark = b.kinds[x]
    single = b.node("Squeeze", b.size(x, b.random.randint(0, 2)), b.ints(0))
    condition = b.node(b.pick("Equal", "Less"), single, b.constant(np.int64(b.pick(1, 4, 8))))
    shape, bodies = (1, channels, 1, 1) if kind == "map" else (1, 1, channels), []
    for branch in ("then", "else"):
        name = b.name(branch)
        scale = numpy_helper.from_array(b.rng.uniform(0.5, 1.5, shape).astype(np.float32), f"{name}_scale")
        node = helper.make_node(b.pick("Mul", "Add"), [x, f"{name}_scale"], [name])
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        bodies.append(helper.make_graph([node], name, [], [info], [scale]))
    return b.register(b.node("If", condition, then_branch=bodies[0], else_branch=bodies[1]), kind, channels, mark)


# Tokens.


@block("tokens", "vector")
def linear(b: Open, x: str) -> str | None:
    return b.matmul(x, b.width())


@block("tokens")
def layer_normalization(b: Open, x: str) -> str | None:
    channels = b.kinds[x][1]
    if b.opset < 17 or channels < 3:
        return None
    return b.register(b.node("LayerNormalization", x, b.numbers(channels), b.weight(channels), axis=-1), *b.kinds[x])


@block("tokens")
def attention(b: Open, x: str) -> str | None:
    kind, channels, mark = b.kinds[x]
    heads, each = b.pick(1, 2, 3), b.pick(2, 4)
    size = heads * each
    batch, length = b.like(x, 0), b.like(x, 1)
    parts = [b.node("MatMul", x, b.weight(channels, size)) for _ in range(3)]
    if b.pick(True, False):
        q, k, v = (b.node("Reshape", p, b.target(batch, b.pick(-1, length), heads, each)) for p in parts)
        q, v = (b.node("Transpose", p, perm=[0, 2, 1, 3]) for p in (q, v))
        shares = b.node("Softmax", b.node("MatMul", q, b.node("Transpose", k, perm=[0, 2, 3, 1])), axis=-1)
        mixed = b.node("Transpose", b.node("MatMul", shares, v), perm=[0, 2, 1, 3])
    else:  # heads and batch are one axis
        merged = b.node("Mul", batch, b.ints(heads))
        turned = [
            b.node("Transpose", b.node("Reshape", p, b.target(batch, length, heads, each)), perm=[0, 2, 1, 3])
            for p in parts
        ]
        q, k, v = (b.node("Reshape", p, b.target(b.pick(merged, -1), length, each)) for p in turned)
        shares = b.node("Softmax", b.node("MatMul", q, b.node("Transpose", k, perm=[0, 2, 1])), axis=-1)
        whole = b.node("Reshape", b.node("MatMul", shares, v), b.target(batch, heads, length, each))
        mixed = b.node("Transpose", whole, perm=[0, 2, 1, 3])
    flat = b.node(
        "Reshape", mixed, b.pick(b.target(batch, length, size), b.target(0, 0, -1), b.target(batch, -1, size))
    )
    return b.matmul(b.register(flat, kind, size, mark), channels)


@block("tokens")
def tokens_flat(b: Open, x: str) -> str | None:
    """[N, T, C] -> [N*T, C] and back."""
    kind, channels, mark = b.kinds[x]
    flat = b.register(
        b.node("Reshape", x, b.pick(b.ints(-1, channels), b.target(-1, b.size(x, 2)))), "vector", channels, b.name("m")
    )
    wide = b.matmul(flat, b.width())
    size = b.kinds[wide][1]
    back = b.target(b.like(x, 0), b.pick(b.like(x, 1), -1), size)
    return b.register(b.node("Reshape", wide, back), kind, size, mark)


@block("tokens")
def to_map(b: Open, x: str) -> str | None:
    """[N, T, C] -> [N, C, T, 1] or [N, C, T / 2, 2]."""
    _, channels, _ = b.kinds[x]
    turned = b.node("Transpose", x, perm=[0, 2, 1])
    if b.pick(True, False):
        return b.register(b.node("Unsqueeze", turned, b.ints(3)), "map", channels, b.name("m"))
    half = b.node("Div", b.size(x, 1), b.ints(2))
    return b.register(
        b.node("Reshape", turned, b.target(0, b.pick(0, channels), b.pick(half, -1), 2)), "map", channels, b.name("m")
    )


@block("tokens")
def tokens_to_vector(b: Open, x: str) -> str | None:
    _, channels, _ = b.kinds[x]
    if b.pick(True, False):
        return b.register(b.node("Gather", x, b.constant(np.int64(b.pick(0, -1))), axis=1), "vector", channels, "v")
    mean = b.node("ReduceMean", x, keepdims=0, **({"axes": [1]} if b.opset < 18 else {}))
    if b.opset >= 18:
        b.nodes[-1].input.append(b.ints(1))
    return b.register(mean, "vector", channels, "v")


@block("tokens")
def turned_view(b: Open, x: str) -> str | None:
    """[N, T, C] reshaped to [N, C, T] without a transposition."""
    kind, channels, mark = b.kinds[x]
    read = b.node("Reshape", x, b.target(0, channels, -1))
    return b.register(b.node("Transpose", read, perm=[0, 2, 1]), kind, channels, mark)


@block("tokens")
def class_token(b: Open, x: str) -> str | None:
    _, channels, _ = b.kinds[x]
    token = b.weight(1, 1, channels)
    wide = b.node("Expand", token, b.target(b.size(x, 0), 1, channels))
    return b.register(b.node("Concat", wide, x, axis=1), "tokens", channels, b.name("m"))


@block("tokens")
def embedded_positions(b: Open, x: str) -> str | None:
    """The first rows of a position table, whose length limits the sequence."""
    kind, channels, mark = b.kinds[x]
    table = b.weight(1, 64, channels)
    rows = b.node("Slice", table, b.ints(0), b.size(x, 1), b.ints(1))
    return b.register(b.node("Add", x, rows), kind, channels, mark)


@block("tokens")
def recurrence(b: Open, x: str) -> str | None:
    kind, channels, mark = b.kinds[x]
    size = b.pick(2, 3, 4)
    state = b.node("ConstantOfShape", b.target(1, b.size(x, 0), size))
    first = b.node("Transpose", x, perm=[1, 0, 2])
    y = b.node(
        "GRU", first, b.weight(1, 3 * size, channels), b.weight(1, 3 * size, size), "", "", state, hidden_size=size
    )
    flat = b.node("Squeeze", y, b.ints(1))
    return b.register(b.node("Transpose", flat, perm=[1, 0, 2]), kind, size, mark)


@block("tokens")
def tiled(b: Open, x: str) -> str | None:
    """The mean over the tokens, repeated for each token."""
    kind, channels, mark = b.kinds[x]
    mean = b.node("ReduceMax", x, keepdims=1, **({"axes": [1]} if b.opset < 18 else {}))
    if b.opset >= 18:
        b.nodes[-1].input.append(b.ints(1))
    copies = b.node("Tile", mean, b.target(1, b.size(x, 1), 1))
    return b.register(b.node("Concat", x, copies, axis=2), kind, 2 * channels, mark)


# Vectors.


@block("vector")
def vector_to_map(b: Open, x: str) -> str | None:
    maps = [n for n, (k, c, _) in b.kinds.items() if k == "map" and c == b.kinds[x][1]]
    if not maps:
        return None
    other = b.random.choice(maps)
    single = b.node("Unsqueeze", x, b.ints(2, 3))
    if b.pick(True, False):
        single = b.node("Expand", single, b.target(1, b.pick(1, b.kinds[x][1]), b.size(other, 2), b.size(other, 3)))
    return b.register(b.node(b.pick("Mul", "Add"), other, single), *b.kinds[other])


def models(seeds: Sequence[int]) -> list[ModelProto]:
    """Return the models of some seeds."""
    return [seeded(seed) for seed in seeds]
