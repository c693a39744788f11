"""Operators that work on each element by itself, alone or with its partner under broadcasting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.rules.api import Op, Tensor, rule

MICROSOFT = "com.microsoft"


@rule(
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil", "Celu", "Clip",
    "Cos", "Cosh", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf",
    "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid",
    "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
)  # fmt: skip  # a table
@rule("QuickGelu", "Gelu", "QLinearSigmoid", "QLinearLeakyRelu", domain=MICROSOFT)
def unary(op: Op) -> None:
    """Pass all axes; further inputs (bounds, ratio, scales) hold one number each."""
    x = op.input(0)
    freeze_rest(op, 1)
    for output in range(len(op.outputs)):
        op.set(x.axes or [], output)


@rule(
    "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual",
    "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Sum", "Where", "Xor",
)  # fmt: skip  # a table
@rule("BiasGelu", "FastGelu", domain=MICROSOFT)
def broadcasting(op: Op) -> None:
    """Unite equal axes, aligned on the right; below opset 7 on the axis that the node names."""
    tensors = [op.input(i) for i in range(len(op.inputs)) if op.has(i)]
    if op.opset < 7 and op.get("broadcast", 0) and "axis" in op.call.attributes:
        op.set(legacy_broadcast(op, op.input(0), op.input(1), op.get("axis")))
        return
    op.set(broadcast(op, [t.axes or [] for t in tensors]))


@rule("CastLike")
def cast_like(op: Op) -> None:
    """Pass all axes; of the second input only the type matters."""
    op.set(op.input(0).axes or [])
    op.accounted.extend(op.input(1).axes or [])


@rule("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def quantized_binary(op: Op) -> None:
    """As the float operator on inputs 0 and 3; scales and zero points hold one number each."""
    freeze_rest(op, 1, but=(3,))
    op.set(broadcast(op, [op.input(0).axes or [], op.input(3).axes or []]))


def broadcast(op: Op, operands: Sequence[Sequence[Axis]]) -> list[Axis]:
    """Axes of the result of broadcasting; equal axes are united, those of size one stretch."""
    rank = max((len(axes) for axes in operands), default=0)
    result = []
    for back in range(rank, 0, -1):
        present = [axes[-back] for axes in operands if len(axes) >= back]
        wide = [axis for axis in present if len(axis) != 1]
        op.accounted.extend(axis for axis in present if len(axis) == 1)
        for other in wide[1:]:
            op.unite(wide[0], other)
        result.append(wide[0] if wide else np.zeros(1, np.int64))
    return result


@rule("PRelu")
def prelu(op: Op) -> None:
    """Unite equal axes, aligned on the right; below opset 7 a vector of slopes lies on the channels."""
    x, slope = op.input(0), op.input(1)
    if op.opset < 7 and slope.rank == 1 and x.rank > 1:
        op.set(legacy_broadcast(op, x, slope, 1))
        return
    op.set(broadcast(op, [x.axes or [], slope.axes or []]))


def legacy_broadcast(op: Op, left: Tensor, right: Tensor, axis: int) -> list[Axis]:
    """Opset 6 and below: the second input's axes start at an axis of the first."""
    start = axis % left.rank
    for offset, own in enumerate(right.axes or []):
        op.accounted.append(own)
        if len(own) > 1:
            op.unite(left[start + offset], own)
    return list(left.axes or [])


def per_channel(op: Op, channels: Axis, slots: Iterable[int]) -> None:
    """Inputs with one number for each index of an axis, or one for all."""
    for slot in slots:
        for axis in op.input(slot).axes or []:
            if len(axis) > 1:
                op.unite(axis, channels)


def freeze_rest(op: Op, first: int, *, but: Sequence[int] = ()) -> None:
    """Freeze all axes of the inputs from `first` on, except some."""
    for slot in range(first, len(op.inputs)):
        tensor = op.inputs[slot]
        if tensor is None or slot in but:
            continue
        op.freeze_all(tensor.axes or [], f"takes input {slot} as a whole")
