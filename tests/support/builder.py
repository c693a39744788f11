"""Random graphs: sources of choices, a builder that grows a graph, and registries of its blocks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper, numpy_helper

T = TypeVar("T")
Shape = tuple[int, ...]
OPSETS = (11, 13, 17, 18, 21)
ALL_OPSETS = (9, 11, 13, 15, 17, 18, 20, 21, 23, 24, 26)
MICROSOFT = "com.microsoft"
BATCH = 2


class Choices(Protocol):
    """Source of random decisions."""

    def integer(self, low: int, high: int) -> int:
        """Return an integer from `low` to `high`, both included."""

    def pick(self, among: Sequence[T]) -> T:
        """Return one of several values."""


class Seeded:
    """Choices determined by a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def pick(self, among: Sequence[T]) -> T:
        return self._random.choice(among)


class Drawn:
    """Choices drawn by hypothesis."""

    def __init__(self, draw: Callable[..., Any]) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return int(self._draw(st.integers(low, high)))

    def pick(self, among: Sequence[T]) -> T:
        found: T = self._draw(st.sampled_from(among))
        return found


Block = Callable[["Builder", str], "str | None"]
BLOCKS: dict[int, list[Block]] = {2: [], 3: [], 4: []}
"""Blocks by rank of their input: [N, C], [N, T, C] or [N, C, H, W]; they return None if they are not applicable."""
RARE: dict[int, list[Block]] = {2: [], 3: [], 4: []}
"""Blocks of less common operators, by rank of their input."""
NEWER: dict[int, list[Block]] = {2: [], 3: [], 4: []}
"""Blocks of operators that the graphs of `seeded` do not have, by rank of their input."""


def block(*ranks: int, among: dict[int, list[Block]] = BLOCKS) -> Callable[[Block], Block]:
    def enter(function: Block) -> Block:
        for rank in ranks:
            among[rank].append(function)
        return function

    return enter


class Builder:
    """A builder that grows a graph node by node."""

    def __init__(self, choices: Choices, opsets: Sequence[int] = OPSETS) -> None:
        self.choices = choices
        self.opset = choices.pick(opsets)
        self.is_open = choices.integer(0, 1) == 1
        self.rng = np.random.default_rng(choices.integer(0, 1 << 16))
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        self.shapes: dict[str, Shape] = {}
        self.count = 0

    # Names and values.

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def constant(self, array: Any, prefix: str = "k") -> str:
        """Add a constant: an initializer or, occasionally, a Constant node."""
        values, name = np.asarray(array), self.name(prefix)
        if self.choices.integer(0, 5) == 0:
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values)))
        else:
            self.tensors.append(numpy_helper.from_array(values, name))
        return name

    def weight(self, *shape: int, fan: int | None = None, prefix: str = "w") -> str:
        scale = 1 / math.sqrt(fan if fan is not None else max(1, math.prod(shape[1:])))
        return self.constant((scale * self.rng.standard_normal(shape)).astype(np.float32), prefix)

    def vector(self, size: int, *, positive: bool = False, shape: Shape | None = None) -> str:
        values = self.rng.uniform(0.5, 1.5, size) if positive else 0.3 * self.rng.standard_normal(size)
        return self.constant(values.astype(np.float32).reshape(shape or (size,)), "b")

    def ints(self, *values: int) -> str:
        return self.constant(np.asarray(values, np.int64), "i")

    def node(self, kind: str, inputs: Sequence[str], shape: Shape, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output of a known shape."""
        name = self.name(kind.lower())
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"/{name}", domain=domain, **attributes))
        self.shapes[name] = shape
        return name

    def raw(self, kind: str, inputs: Sequence[str], domain: str = "", **attributes: Any) -> str:
        """Add a node with one output to which no further blocks are attached."""
        name = self.node(kind, inputs, (), domain, **attributes)
        del self.shapes[name]
        return name

    def several(self, kind: str, inputs: Sequence[str], count: int, domain: str = "", **attributes: Any) -> list[str]:
        """Add a node with several outputs to which no further blocks are attached."""
        names = [self.name(kind.lower()) for _ in range(count)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"/{names[0]}", domain=domain, **attributes))
        return names

    def width(self) -> int:
        return self.choices.pick((2, 3, 4, 6, 8, 12))

    def others(self, shape: Shape, *but: str) -> list[str]:
        """Return the names of other tensors of the same shape."""
        return [name for name, other in self.shapes.items() if other == shape and name not in but]

    # Operators whose form depends on the operator set.

    def with_axes(self, kind: str, x: str, axes: Sequence[int], shape: Shape, since: int, **more: Any) -> str:
        if self.opset >= since:
            return self.node(kind, [x, self.ints(*axes)], shape, **more)
        return self.node(kind, [x], shape, axes=list(axes), **more)

    def reshape(self, x: str, shape: Shape) -> str:
        """Reshape to [N, …] in one of the forms that exporters write."""
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
        """Apply a random elementwise function."""
        shape = self.shapes[x]
        plain = ["Relu", "Sigmoid", "Tanh", "Softplus", "Elu", "LeakyRelu", "HardSigmoid", "Selu", "Softsign", "Erf"]
        plain += ["Celu"] if self.opset >= 12 else []
        plain += ["Abs", "Neg", "ThresholdedRelu" if self.opset >= 10 else "Relu", "Identity", "Atan", "Sin"]
        plain += ["HardSwish"] if self.opset >= 14 else []
        plain += ["Mish"] if self.opset >= 18 else []
        plain += ["Gelu"] if self.opset >= 20 else []
        kind = self.choices.pick([*plain, "swish", "clip", "square root", "half"])
        if kind == "swish":
            return self.node("Mul", [x, self.node("Sigmoid", [x], shape)], shape)
        if kind == "clip" and self.opset >= 11:
            return self.node("Clip", [x, self.constant(np.float32(-1)), self.constant(np.float32(2))], shape)
        if kind == "square root":
            return self.node("Sqrt", [self.node("Abs", [x], shape)], shape)
        if kind == "half":
            double = self.node("Cast", [x], shape, to=TensorProto.DOUBLE)
            del self.shapes[double]
            return self.node("Cast", [double], shape, to=TensorProto.FLOAT)
        return self.node(kind if kind != "clip" else "Relu", [x], shape)

    def matmul(self, x: str, size: int) -> str:
        """Multiply x [..., C] by a matrix, with or without a bias."""
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
