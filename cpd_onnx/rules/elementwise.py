"""Rules of elementwise operators, unary or with broadcasting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from cpd_onnx.algebra.atoms import Axis
from cpd_onnx.rules.api import GiveUp, Op, Tensor, rule
from cpd_onnx.shapes.values import Shape

MICROSOFT = "com.microsoft"
"""Domain of onnxruntime's contrib operators."""


@rule(
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitCast", "BitwiseNot", "Cast", "Ceil", "Celu", "Clip",
    "Cos", "Cosh", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf",
    "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid",
    "Sign", "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu",
)  # fmt: skip  # a table
@rule("QuickGelu", "Gelu", "QLinearSigmoid", "QLinearLeakyRelu", "ScaledSiLU", domain=MICROSOFT)
def unary(op: Op) -> None:
    """Pass all axes; further inputs (bounds, ratio, scales) are scalars."""
    x = op.input(0)
    freeze_rest(op, 1)
    for output in range(len(op.outputs)):
        op.set(x.axes or [], output)


@rule(
    "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual",
    "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Sum", "Where", "Xor",
)  # fmt: skip  # a table
@rule("BiasGelu", "FastGelu", "LinearAttentionGate", domain=MICROSOFT)
def broadcasting(op: Op) -> None:
    """Unite axes of equal size, aligned on the right; below opset 7 at the attribute `axis`."""
    tensors = [op.input(i) for i in range(len(op.inputs)) if op.has(i)]
    if op.opset < 7 and op.get("broadcast", 0) and "axis" in op.call.attributes:
        op.set(legacy_broadcast(op, op.input(0), op.input(1), op.get("axis")))
        return
    out = broadcast(op, [t.axes or [] for t in tensors], op.outputs[0].value.shape)
    for output in range(len(op.outputs)):
        op.set(out, output)


@rule("GatedAdd", domain=MICROSOFT)
def gated_add(op: Op) -> None:
    """Add a tensor that is scaled by one number for each row."""
    if op.has(3):
        raise GiveUp(f"{op.name} projects its gate, which onnxruntime does on GPUs only")
    broadcasting(op)


@rule("CastLike")
def cast_like(op: Op) -> None:
    """Pass all axes; the second input gives only the type."""
    op.set(op.input(0).axes or [])
    op.accounted.extend(op.input(1).axes or [])


@rule("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def quantized_binary(op: Op) -> None:
    """Broadcast inputs 0 and 3; scales and zero points are scalars."""
    freeze_rest(op, 1, but=(3,))
    op.set(broadcast(op, [op.input(0).axes or [], op.input(3).axes or []]))


@rule("QLinearWhere", domain=MICROSOFT)
def quantized_where(op: Op) -> None:
    """Broadcast the condition and inputs 1 and 4; scales and zero points are scalars."""
    freeze_rest(op, 2, but=(4,))
    op.set(broadcast(op, [op.input(slot).axes or [] for slot in (0, 1, 4)]))


def broadcast(op: Op, operands: Sequence[Sequence[Axis]], shape: Shape | None = None) -> list[Axis]:
    """Return the axes of the result of broadcasting; axes of equal size are united, those of size one stretch.

    With the shape of the result, sizes that data decide may be those that they meet.
    """
    rank = max((len(axes) for axes in operands), default=0)
    result = []
    for back in range(rank, 0, -1):
        present = [axes[-back] for axes in operands if len(axes) >= back]
        wide = [axis for axis in present if len(axis) != 1]
        op.accounted.extend(axis for axis in present if len(axis) == 1)
        if (met := op.meets_size_of_data(wide, shape[-back] if shape else None)) is not None:
            result.append(met)
            continue
        for other in wide[1:]:
            op.unite(wide[0], other)
        result.append(wide[0] if wide else np.zeros(1, np.int64))
    return result


@rule("PRelu")
def prelu(op: Op) -> None:
    """Unite axes of equal size, aligned on the right; below opset 7 a vector of slopes is on axis 1."""
    x, slope = op.input(0), op.input(1)
    if op.opset < 7 and slope.rank == 1 and x.rank > 1:
        op.set(legacy_broadcast(op, x, slope, 1))
        return
    op.set(broadcast(op, [x.axes or [], slope.axes or []]))


def legacy_broadcast(op: Op, left: Tensor, right: Tensor, axis: int) -> list[Axis]:
    """Unite axes as broadcasting up to opset 6 does: those of the second input start at an axis of the first."""
    start = axis % left.rank
    for offset, own in enumerate(right.axes or []):
        op.accounted.append(own)
        if len(own) > 1:
            op.unite(left[start + offset], own)
    return list(left.axes or [])


def per_channel(op: Op, channels: Axis, slots: Iterable[int]) -> None:
    """Unite an axis with inputs that have one number per index of it, or a single one."""
    for slot in slots:
        for axis in op.input(slot).axes or []:
            if len(axis) > 1:
                op.unite(axis, channels)


def freeze_rest(op: Op, first: int, *, but: Sequence[int] = ()) -> None:
    """Freeze all axes of the inputs from slot `first` on, except those at the slots `but`."""
    for slot in range(first, len(op.inputs)):
        tensor = op.inputs[slot]
        if tensor is None or slot in but:
            continue
        op.freeze_all(tensor.axes or [], f"takes input {slot} as a whole")
