"""Quantisation: integers and floats side by side.

Integers carry no gradient: what lies before a QuantizeLinear does not train.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from cpd_onnx.torch.dtypes import elem_dtype
from cpd_onnx.torch.operators.linear import Window, conv
from cpd_onnx.torch.registry import operator

_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}


class Quantisation(TypedDict, total=False):
    """Attributes of QuantizeLinear and DequantizeLinear."""

    axis: int
    block_size: int
    output_dtype: int
    precision: int
    saturate: int


def _spread(parameter: Tensor, x: Tensor, options: Quantisation) -> Tensor:
    """Scale or zero point in a shape that broadcasts with x: one element, one an index of an axis, or one a block."""
    if parameter.numel() == 1 and parameter.ndim <= 1:
        return parameter.reshape(())
    axis = options.get("axis", 1) % x.ndim
    block = options.get("block_size", 0)
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return parameter.reshape(-1, *[1] * (x.ndim - axis - 1))


def _to_integers(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to nearest, ties to even, and clamp to the range of an integer type."""
    limits = torch.iinfo(dtype)
    return values.round().clamp(limits.min, limits.max).to(dtype)


@operator("QuantizeLinear", frozen=(1, 2))
def quantize_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, **options: Unpack[Quantisation]
) -> Tensor:
    """x / scale + zero point, rounded and saturated; the type is that of the zero point."""
    dtype = elem_dtype(options.get("output_dtype") or 2) if zero_point is None else zero_point.dtype
    precision = elem_dtype(options["precision"]) if options.get("precision") else scale.dtype
    ratio = x.to(precision) / _spread(scale, x, options).to(precision)
    if dtype in _FLOAT8:
        limit = torch.finfo(dtype).max
        return (ratio.clamp(-limit, limit) if options.get("saturate", 1) else ratio).to(dtype)
    rounded = ratio.float().round()
    if zero_point is not None:
        rounded = rounded + _spread(zero_point, x, options).float()
    return _to_integers(rounded, dtype)


@operator("DequantizeLinear", frozen=(1, 2))
def dequantize_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, **options: Unpack[Quantisation]
) -> Tensor:
    """(x - zero point) scale, in the type of the scale."""
    dtype = elem_dtype(options["output_dtype"]) if options.get("output_dtype") else scale.dtype
    values = x.float()
    if zero_point is not None:
        values = values - _spread(zero_point, x, options).float()
    return (values * _spread(scale, x, options).float()).to(dtype)


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise to uint8 over the range of x, zero included; also gives scale and zero point."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = torch.where(high == low, torch.ones_like(high), high - low) / 255
    zero_point = (-low / scale).clamp(0, 255).round()
    return _to_integers((x / scale).round() + zero_point, torch.uint8), scale, zero_point.to(torch.uint8)


def _centred(x: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    """Integers minus their zero point, as doubles: products and sums of 8-bit numbers stay exact."""
    if zero_point is None:
        return x.double()
    point = zero_point.double()
    if point.ndim == 1 and point.numel() > 1:
        point = point.reshape([-1 if dim == axis % x.ndim else 1 for dim in range(x.ndim)])
    return x.double() - point


@operator("MatMulInteger")
def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    """Product of integer matrices, each minus its zero point, as int32."""
    return (_centred(a, a_zero, -2) @ _centred(b, b_zero, -1)).to(torch.int32)


class GroupedWindow(Window, total=False):
    """Attributes of a convolution."""

    group: int


@operator("ConvInteger")
def conv_integer(
    x: Tensor,
    weight: Tensor,
    x_zero: Tensor | None = None,
    w_zero: Tensor | None = None,
    **window: Unpack[GroupedWindow],
) -> Tensor:
    """Convolution of integers, each minus its zero point, as int32."""
    return conv(_centred(x, x_zero, 1), _centred(weight, w_zero, 0), **window).to(torch.int32)


@operator("QLinearMatMul", frozen=(1, 4, 6))
def qlinear_matmul(*inputs: Tensor) -> Tensor:
    """Product of quantised matrices, quantised; inputs are (a, scale, zero), (b, scale, zero), (scale, zero)."""
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = inputs
    product = _centred(a, a_zero, -2) @ _centred(b, b_zero, -1)
    ratio = (a_scale * b_scale / y_scale).double()
    return _to_integers((product * ratio).round() + y_zero.double(), y_zero.dtype)


@operator("QLinearConv", frozen=(1, 4, 6))
def qlinear_conv(*inputs: Tensor, **window: Unpack[GroupedWindow]) -> Tensor:
    """Quantised convolution; inputs are (x, scale, zero), (weight, scale, zero), (scale, zero) and an int32 bias."""
    x, x_scale, x_zero, weight, w_scale, w_zero, y_scale, y_zero = inputs[:8]
    bias = inputs[8].double() if len(inputs) > 8 else None
    result = conv(_centred(x, x_zero, 1), _centred(weight, w_zero, 0), bias, **window)
    ratio = (x_scale * w_scale / y_scale).double()
    if ratio.numel() > 1:
        ratio = ratio.reshape(-1, *[1] * (x.ndim - 2))
    return _to_integers((result * ratio).round() + y_zero.double(), y_zero.dtype)
