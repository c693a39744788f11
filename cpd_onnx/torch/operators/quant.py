"""Quantised operators.

Integers carry no gradient. Where a DequantizeLinear directly follows its QuantizeLinear, or a stored tensor, the two
are one function of floats with the straight-through gradient: that of clipping (Bengio et al., arXiv 1308.3432).
Tensors before any other QuantizeLinear are not trained.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from cpd_onnx.errors import UnsupportedError
from cpd_onnx.torch.dtypes import elem_dtype
from cpd_onnx.torch.operators.fused import Attention, attention, embed_layer_normalization
from cpd_onnx.torch.operators.images.pooling import Pool, average_pool, max_pool
from cpd_onnx.torch.operators.linear import Window, conv
from cpd_onnx.torch.operators.sequences.recurrent import Recurrent, lstm
from cpd_onnx.torch.registry import operator

_FLOAT8 = {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}


class Quantisation(TypedDict, total=False):
    """Attributes of QuantizeLinear and DequantizeLinear."""

    axis: int
    block_size: int
    output_dtype: int
    precision: int
    saturate: int


def _expanded(parameter: Tensor, x: Tensor, options: Quantisation) -> Tensor:
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


_ORT = "com.microsoft"


@operator("QuantizeLinear", domain=_ORT, frozen=(1, 2))
@operator("QuantizeLinear", frozen=(1, 2))
def quantize_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, **options: Unpack[Quantisation]
) -> Tensor:
    """x / scale + zero point, rounded and saturated; the type is that of the zero point."""
    dtype = elem_dtype(options.get("output_dtype") or 2) if zero_point is None else zero_point.dtype
    precision = elem_dtype(options["precision"]) if options.get("precision") else scale.dtype
    ratio = x.to(precision) / _expanded(scale, x, options).to(precision)
    if dtype in _FLOAT8:
        limit = torch.finfo(dtype).max
        return (ratio.clamp(-limit, limit) if options.get("saturate", 1) else ratio).to(dtype)
    rounded = ratio.float().round()
    if zero_point is not None:
        rounded = rounded + _expanded(zero_point, x, options).float()
    return _to_integers(rounded, dtype)


@operator("DequantizeLinear", domain=_ORT, frozen=(1, 2))
@operator("DequantizeLinear", frozen=(1, 2))
def dequantize_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, **options: Unpack[Quantisation]
) -> Tensor:
    """(x - zero point) scale, in the type of the scale."""
    dtype = elem_dtype(options["output_dtype"]) if options.get("output_dtype") else scale.dtype
    values = x.float()
    if zero_point is not None:
        values = values - _expanded(zero_point, x, options).float()
    return (values * _expanded(scale, x, options).float()).to(dtype)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, **options: Unpack[Quantisation]
) -> Tensor:
    """Round x as QuantizeLinear and DequantizeLinear do; the gradient is one within the range, zero beyond."""
    integers = quantize_linear(x.detach(), scale, zero_point, **options)
    seen = dequantize_linear(integers, scale, zero_point, **options)
    if not x.requires_grad:
        return seen
    limits = torch.finfo(integers.dtype) if integers.dtype in _FLOAT8 else torch.iinfo(integers.dtype)
    step = _expanded(scale, x, options).to(x.dtype)
    centre = 0.0 if zero_point is None else _expanded(zero_point, x, options).to(x.dtype)
    clipped = torch.minimum(torch.maximum(x, (limits.min - centre) * step), (limits.max - centre) * step)
    return seen + (clipped - clipped.detach())


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise to uint8 over the range of x, zero included; also return scale and zero point."""
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


# Operators of onnxruntime's own domain on quantised tensors: a tensor, its scale and its zero point, and again.


def _floats(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Dequantise; scale and zero point are single numbers, or one per index of the last axis."""
    return _centred(x, zero_point, -1).float() * scale


def _quantised(values: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Quantise values to the type of the zero point, uint8 without one."""
    point = torch.zeros((), dtype=torch.uint8) if zero_point is None else zero_point
    return _to_integers((values / scale).round() + point.float(), point.dtype)


@operator("QLinearAdd", domain=_ORT, frozen=(1, 4, 6))
def qlinear_add(*inputs: Tensor) -> Tensor:
    """Sum of two quantised tensors, quantised."""
    total = _floats(*inputs[:3]) + _floats(*inputs[3:6])
    return _quantised(total, inputs[6], inputs[7] if len(inputs) > 7 else None)


@operator("QLinearMul", domain=_ORT, frozen=(1, 4, 6))
def qlinear_mul(*inputs: Tensor) -> Tensor:
    """Product of two quantised tensors, quantised."""
    product = _floats(*inputs[:3]) * _floats(*inputs[3:6])
    return _quantised(product, inputs[6], inputs[7] if len(inputs) > 7 else None)


@operator("QLinearConcat", domain=_ORT, frozen=(0,))
def qlinear_concat(scale: Tensor, zero_point: Tensor, *inputs: Tensor, axis: int) -> Tensor:
    """Concatenation of quantised tensors, quantised."""
    parts = [_floats(*inputs[start : start + 3]) for start in range(0, len(inputs), 3)]
    return _quantised(torch.cat(parts, axis), scale, zero_point)


@operator("QLinearGlobalAveragePool", domain=_ORT, frozen=(1, 3))
def qlinear_global_average_pool(*inputs: Tensor, channels_last: int = 0) -> Tensor:
    """Mean over all spatial axes, quantised."""
    values = _floats(*inputs[:3])
    axes = range(1, values.ndim - 1) if channels_last else range(2, values.ndim)
    return _quantised(values.mean(list(axes), keepdim=True), inputs[3], inputs[4])


class Averaged(Pool, total=False):
    """Attributes of QLinearAveragePool, besides that of its layout."""

    count_include_pad: int


@operator("QLinearAveragePool", domain=_ORT, frozen=(1, 3))
def qlinear_average_pool(*inputs: Tensor, channels_last: int = 0, **window: Unpack[Averaged]) -> Tensor:
    """Mean of each window, quantised."""
    values = _floats(*inputs[:3])
    pooled = average_pool(values.movedim(-1, 1) if channels_last else values, **window)
    found = _quantised(pooled, inputs[3], inputs[4] if len(inputs) > 4 else None)
    return found.movedim(1, -1) if channels_last else found


@operator("NhwcMaxPool", domain=_ORT)
def max_pool_channels_last(x: Tensor, **window: Unpack[Pool]) -> Tensor:
    """Take the largest element of each window of x [N, ..., C]."""
    return max_pool(x.movedim(-1, 1), outputs=1, **window)[0].movedim(1, -1)


@operator("QLinearConv", domain=_ORT, frozen=(1, 4, 6))
def qlinear_conv_channels_last(*inputs: Tensor, channels_last: int = 0, **window: Unpack[GroupedWindow]) -> Tensor:
    """Quantised convolution of x [N, ..., C] if the channels are last; inputs are those of QLinearConv."""
    if not channels_last:
        return qlinear_conv(*inputs, **window)
    return qlinear_conv(inputs[0].movedim(-1, 1), *inputs[1:], **window).movedim(1, -1)


@operator("QLinearWhere", domain=_ORT, frozen=(2, 5, 7))
def qlinear_where(condition: Tensor, *inputs: Tensor) -> Tensor:
    """One of two quantised tensors, quantised."""
    return _quantised(torch.where(condition, _floats(*inputs[:3]), _floats(*inputs[3:6])), inputs[6], inputs[7])


@operator("QAttention", domain=_ORT, frozen=(3, 4), weights=(2,))
def qattention(
    x: Tensor, weights: Tensor, bias: Tensor, *more: Tensor | None, outputs: int, **options: Unpack[Attention]
) -> list[Tensor]:
    """Self-attention of quantised inputs and weights; `more` are their scales, a mask, zero points, and the past."""
    x_scale, w_scale, mask, x_zero, w_zero, past = (*more, *[None] * 4)[:6]
    assert x_scale is not None
    assert w_scale is not None
    given = (_floats(x, x_scale, x_zero), _floats(weights, w_scale, w_zero), bias, mask, past)
    return attention(*given, outputs=outputs, **options)


@operator("QEmbedLayerNormalization", domain=_ORT, frozen=(8, 9, 10, 11, 12))
def qembed_layer_normalization(
    ids: Tensor, segments: Tensor | None, *more: Tensor | None, epsilon: float = 1e-12
) -> tuple[Tensor, Tensor]:
    """Sum the rows of quantised tables, and normalise; `more` are tables, scale and shift, a mask, and quantisation."""
    tables = [
        None if table is None or factor is None else _floats(table, factor, point)
        for table, factor, point in zip(more[:5], more[6:11], more[11:16], strict=True)
    ]
    return embed_layer_normalization(ids, segments, *tables, more[5], epsilon=epsilon)[:2]


@operator("QLinearLeakyRelu", domain=_ORT, frozen=(1, 3))
def qlinear_leaky_relu(*inputs: Tensor, alpha: float = 0.01) -> Tensor:
    """Leaky ReLU, quantised."""
    return _quantised(F.leaky_relu(_floats(*inputs[:3]), alpha), inputs[3], inputs[4] if len(inputs) > 4 else None)


@operator("QLinearSigmoid", domain=_ORT, frozen=(1, 3))
def qlinear_sigmoid(*inputs: Tensor) -> Tensor:
    """Sigmoid, quantised."""
    return _quantised(_floats(*inputs[:3]).sigmoid(), inputs[3], inputs[4] if len(inputs) > 4 else None)


class QuantisedGemm(TypedDict, total=False):
    """Attributes of QGemm."""

    alpha: float
    transA: int
    transB: int


@operator("QGemm", domain=_ORT, frozen=(1, 4, 7))
def qgemm(*inputs: Tensor | None, **options: Unpack[QuantisedGemm]) -> Tensor:
    """Product of quantised matrices plus an int32 bias; quantised if the result's scale is given, else float."""
    a, a_scale, a_zero, b, b_scale, b_zero, bias, y_scale, y_zero = (*inputs, *[None] * 3)[:9]
    assert a is not None
    assert b is not None
    assert a_scale is not None
    assert b_scale is not None
    left = _centred(a, a_zero, -2)
    right = _centred(b, b_zero, 0 if options.get("transB") else 1)
    product = (left.T if options.get("transA") else left) @ (right.T if options.get("transB") else right)
    product = product if bias is None else product + bias.double()
    values = product * (options.get("alpha", 1.0) * a_scale.double() * b_scale.double())
    return values.float() if y_scale is None else _quantised(values, y_scale.double(), y_zero)


@operator("MatMulIntegerToFloat", domain=_ORT, frozen=(2, 3), weights=(6,))
def matmul_integer_to_float(a: Tensor, b: Tensor, *more: Tensor | None) -> Tensor:
    """Product of quantised matrices as floats, plus a float bias; `more` are scales, zero points and bias."""
    a_scale, b_scale, a_zero, b_zero, bias = (*more, None, None, None)[:5]
    product = _centred(a, a_zero, -2) @ _centred(b, b_zero, -1)
    assert a_scale is not None
    assert b_scale is not None
    result = (product * (a_scale.double() * b_scale.double())).to(a_scale.dtype)
    return result if bias is None else result + bias


def rounded_to_range(x: Tensor) -> Tensor:
    """Round x as DynamicQuantizeLinear does; the gradient is that of x."""
    integers, scale, zero_point = dynamic_quantize_linear(x.detach())
    seen = (integers.float() - zero_point.float()) * scale
    return x + (seen - x).detach()


@operator("DynamicQuantizeMatMul", domain=_ORT, frozen=(2,), weights=(4,))
def dynamic_quantize_matmul(a: Tensor, b: Tensor, *more: Tensor | None) -> Tensor:
    """Product of a, quantised dynamically, and a quantised matrix; `more` are its scale, zero point and a bias."""
    scale, zero_point, bias = (*more, None, None)[:3]
    assert scale is not None
    result = rounded_to_range(a) @ _floats(b, scale, zero_point)
    return result if bias is None else result + bias


class Blocks(TypedDict, total=False):
    """Attributes of MatMulNBits."""

    K: int
    N: int
    accuracy_level: int
    bits: int
    block_size: int


@operator("MatMulNBits", domain=_ORT, frozen=(2, 3), weights=(5,))
def matmul_n_bits(a: Tensor, packed: Tensor, scales: Tensor, *more: Tensor | None, **options: Unpack[Blocks]) -> Tensor:
    """Product of a [..., K] and a matrix [N, K] of few bits in blocks; `more` are zero points, order and a bias."""
    points, order, bias = (*more, None, None, None)[:3]
    bits, rows, columns = options.get("bits", 4), options["N"], options["K"]
    values = _unpacked(packed.reshape(rows, -1), bits)
    blocks = values.reshape(rows, -1, options["block_size"])
    count = blocks.shape[1]
    if points is None:
        centre: Tensor | float = float(1 << (bits - 1))
    elif points.is_floating_point():
        centre = points.reshape(rows, count, 1)
    else:
        centre = _unpacked(points.reshape(rows, -1), bits)[:, :count].unsqueeze(2)
    flat, scale = (blocks - centre), scales.reshape(rows, count, 1)
    matrix = (flat * scale).reshape(rows, -1)[:, :columns]
    if order is not None:
        matrix = flat.reshape(rows, -1)[:, :columns] * scale.squeeze(2)[:, order.long()]
    result = a @ matrix.to(a.dtype).T
    return result if bias is None else result + bias


class GatheredBlocks(TypedDict, total=False):
    """Attributes of GatherBlockQuantized."""

    bits: int
    block_size: int
    gather_axis: int
    quantize_axis: int


@operator("GatherBlockQuantized", domain=_ORT, frozen=(3,))
def gather_block_quantized(
    table: Tensor, indices: Tensor, scales: Tensor, points: Tensor | None = None, **options: Unpack[GatheredBlocks]
) -> Tensor:
    """Rows of a table of few bits in blocks along its last axis, several numbers to a byte, as floats."""
    bits, size, rank = options.get("bits", 4), options.get("block_size", 128), table.ndim
    rows, last = options.get("gather_axis", 0) % rank, options.get("quantize_axis", 1) % rank
    if last != rank - 1 or rows == last:
        raise UnsupportedError(
            "GatherBlockQuantized can be imported only with blocks along the last axis and rows along another one"
        )
    is_packed = bits < 8 and -(-table.shape[last] * (8 // bits) // size) == scales.shape[last]
    chosen = indices.long().flatten() % table.shape[rows]

    def numbers(tensor: Tensor, count: int | None = None) -> Tensor:
        part = tensor.index_select(rows, chosen)
        if is_packed and not part.is_floating_point():
            part = _unpacked(part.reshape(-1, part.shape[-1]), bits).reshape(*part.shape[:-1], -1)
        return part if count is None else part[..., :count]

    def spread(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(size, dim=last)[..., : values.shape[last]]

    values = numbers(table).to(scales.dtype)
    default = float(1 << (bits - 1)) if is_packed else 0.0
    centre = default if points is None else spread(numbers(points, scales.shape[last]).to(scales.dtype))
    found = (values - centre) * spread(scales.index_select(rows, chosen))
    return found.reshape(*found.shape[:rows], *indices.shape, *found.shape[rows + 1 :])


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Unpack numbers of the given bits, the lowest ones of each byte first, as floats [rows, numbers]."""
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1).float()


@operator("DynamicQuantizeLSTM", domain=_ORT, frozen=(8, 9, 10, 11))
def dynamic_quantize_lstm(
    x: Tensor, w: Tensor, r: Tensor, *more: Tensor | None, outputs: int, **options: Unpack[Recurrent]
) -> list[Tensor]:
    """LSTM with quantised weights [directions, input, gates], whose inputs and states are quantised dynamically."""
    w_scale, w_zero, r_scale, r_zero = more[5:9]
    weights = [_per_direction(w, w_scale, w_zero), _per_direction(r, r_scale, r_zero)]
    return lstm((x, *weights, *more[:5]), outputs, options, rounded_to_range)


def _per_direction(weight: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> Tensor:
    """Quantised weights [directions, in, gates] as floats [directions, gates, in]; a scale per direction or gate."""
    assert scale is not None
    shape = (weight.shape[0], 1, -1)
    point = 0.0 if zero_point is None else zero_point.float().reshape(shape)
    return ((weight.float() - point) * scale.reshape(shape)).mT
