"""Shape functions of operators without an onnx schema: onnxruntime's contrib operators and a few other domains."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from cpd_onnx.ops.evaluate import Call
from cpd_onnx.ops.shapes_standard import (
    Dims,
    Function,
    Values,
    broadcast,
    joined,
    of_domain,
    pooled,
    pooled_windows,
    product_of,
    windows,
)
from cpd_onnx.ops.sizes import product
from cpd_onnx.ops.traits import MICROSOFT

CONTRIB: dict[tuple[str, str], Function] = {}
"""Shape functions by (domain, operator). Inputs and outputs are those of onnxruntime's ContribOperators.md and of the
other domains' documentation."""

_register = functools.partial(of_domain, CONTRIB)


@_register(
    MICROSOFT,
    "BiasGelu", "FastGelu", "QuickGelu", "Gelu", "BiasSplitGelu", "RotaryEmbedding", "GroupNorm", "FusedBatchNorm",
    "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "BiasDropout", "BiasSoftmax", "DequantizeLinear",
    "QuantizeLinear", "Inverse", "GemmFloat8Identity", "ScaledSiLU", "GatedAdd", "GatedRMSNorm",
    "MRotaryEmbedding", "MoE", "QMoE", "Trilu",
)  # fmt: skip  # a table
@_register("", "SimplifiedLayerNormalization", "FusedGelu", "GroupNormalization")
@_register("ai.onnx.ml", "Scaler", "Imputer", "Normalizer", "Binarizer", "LabelEncoder")
@_register("onnx.brevitas", "Quant", "BipolarQuant", "Trunc")
@_register("qonnx.custom_op.general", "Quant", "BipolarQuant", "Trunc")
def _same(call: Call, shapes: Sequence[Any], values: Values) -> list[Dims | None]:
    return [shapes[0]]


@_register("", "MaxUnpool")
def _unpooled(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    return tuple(values[2].tolist())


@_register("ai.onnx.ml", "ArrayFeatureExtractor")
def _features(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    return (*(shapes[0][:-1] or (1,)), product(shapes[1]))


@_register(MICROSOFT, "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SkipGroupNorm")
def _skip(call: Call, shapes: Sequence[Any], values: Values) -> list[Dims | None]:
    return [shapes[0], None, None, shapes[0]]


@_register(MICROSOFT, "QLinearAdd", "QLinearMul")
def _quantized_binary(call: Call, shapes: Sequence[Any], values: Values) -> list[Dims | None]:
    return [None if shapes[0] is None or shapes[3] is None else broadcast(shapes[0], shapes[3])]


@_register(MICROSOFT, "QLinearWhere")
def _quantized_where(call: Call, shapes: Sequence[Any], values: Values) -> Dims | None:
    return broadcast(shapes[0], shapes[1], shapes[4])


@_register(MICROSOFT, "QLinearConcat")
def _quantized_concat(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    return joined([shape for shape in shapes[2::3] if shape is not None], call.attributes["axis"])


@_register(MICROSOFT, "QLinearGlobalAveragePool")
def _quantized_global_pool(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    shape = shapes[0]
    return (shape[0], *[1] * (len(shape) - 2), shape[-1]) if call.get("channels_last", 0) else pooled(shape)


@_register(MICROSOFT, "QLinearAveragePool", "MaxpoolWithMask")
def _quantized_pool(call: Call, shapes: Sequence[Any], values: Values) -> Dims | None:
    shape, window = shapes[0], call.attributes["kernel_shape"]
    is_last = bool(call.get("channels_last", 0))
    sizes = pooled_windows(call, shape[1:-1] if is_last else shape[2:], window)
    if sizes is None:
        return None
    return (shape[0], *sizes, shape[-1]) if is_last else (*shape[:2], *sizes)


@_register(MICROSOFT, "NhwcMaxPool")
def _pool_channels_last(call: Call, shapes: Sequence[Any], values: Values) -> Dims | None:
    shape, window = shapes[0], call.attributes["kernel_shape"]
    return None if call.get("ceil_mode", 0) else (shape[0], *_windows(call, shape[1:-1], window), shape[-1])


@_register(MICROSOFT, "FusedConv")
def _conv(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    data, kernel = shapes[:2]
    return (data[0], kernel[0], *_windows(call, data[2:], kernel))


@_register(MICROSOFT, "NhwcFusedConv")
def _conv_channels_last(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    data, kernel = shapes[:2]
    return (data[0], *_windows(call, data[1:-1], kernel), kernel[0])


@_register(MICROSOFT, "QLinearConv")
def _quantized_conv(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    data, kernel = shapes[0], shapes[3]
    if call.get("channels_last", 0):
        return (data[0], *_windows(call, data[1:-1], kernel), kernel[0])
    return (data[0], kernel[0], *_windows(call, data[2:], kernel))


@_register(MICROSOFT, "ConvTransposeWithDynamicPads")
def _transposed_conv(call: Call, shapes: Sequence[Any], values: Values) -> Dims | None:
    data, kernel = shapes[:2]
    rank = len(kernel) - 2
    pads = values[2].ravel().tolist() if len(values) > 2 and shapes[2] is not None else [0] * (2 * rank)
    if call.get("auto_pad", "NOTSET") != "NOTSET":
        return None
    strides, dilations = call.get("strides") or [1] * rank, call.get("dilations") or [1] * rank
    more = call.get("output_padding") or [0] * rank
    spatial = [
        strides[i] * (data[2 + i] - 1) + more[i] + dilations[i] * (kernel[2 + i] - 1) + 1 - pads[i] - pads[i + rank]
        for i in range(rank)
    ]
    return (data[0], kernel[1] * call.get("group", 1), *spatial)


def _windows(call: Call, sizes: Sequence[Any], kernel: Sequence[Any]) -> list[Any]:
    """Return the spatial sizes after a sliding window, whose size is that of the kernel if no attribute gives it."""
    return windows(call, sizes, call.get("kernel_shape") or kernel[2:])


@_register(MICROSOFT, "FusedMatMul", "TransposeMatMul", "FusedMatMulActivation")
def _fused_matmul(call: Call, shapes: Sequence[Any], values: Values) -> list[Dims | None]:
    factors = []
    for shape, name in zip(shapes, "AB", strict=False):
        is_moved, is_swapped = bool(call.get(f"transBatch{name}", 0)), bool(call.get(f"trans{name}", 0))
        order = batched_order(len(shape), is_moved=is_moved, is_swapped=is_swapped)
        factors.append([shape[place] for place in order])
    return [product_of(*factors)]


def batched_order(rank: int, *, is_moved: bool, is_swapped: bool) -> list[int]:
    """Return the axes of a factor of FusedMatMul in the order of a stacked matrix.

    Args:
        rank: Number of axes.
        is_moved: Whether the first axis is moved before the last (transBatchA, transBatchB).
        is_swapped: Whether the last two are then swapped (transA, transB).
    """
    order = list(range(rank))
    if is_moved and rank > 2:
        order = [*order[1:-1], 0, rank - 1]
    return [*order[:-2], *order[:-3:-1]] if is_swapped and rank > 1 else order


@_register(MICROSOFT, "DynamicQuantizeMatMul", "MatMulIntegerToFloat")
def _plain_matmul(call: Call, shapes: Sequence[Any], values: Values) -> list[Dims | None]:
    return [product_of(shapes[0], shapes[1])]


@_register(MICROSOFT, "FusedGemm", "QGemm")
def _gemm(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    a, b = shapes[0], shapes[3] if len(shapes) > 5 else shapes[1]
    return (a[1 if call.get("transA", 0) else 0], b[0 if call.get("transB", 0) else 1])


@_register(MICROSOFT, "MatMulNBits")
def _matmul_nbits(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    return (*shapes[0][:-1], call.attributes["N"])


@_register(MICROSOFT, "GatherBlockQuantized")
def _gather_blocks(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    table, indices, scales = list(shapes[0]), shapes[1], shapes[2]
    axis = call.get("quantize_axis", 1) % len(table)
    block, each = call.get("block_size", 128), 8 // call.get("bits", 4)
    # Numbers of less than a byte are stored in a type of their own, or several to a byte; a row of one block may be
    # either, and is rare in a type of its own.
    if -(-table[axis] * each // block) == scales[axis]:
        table[axis] *= each
    rows = call.get("gather_axis", 0) % len(table)
    return (*table[:rows], *indices, *table[rows + 1 :])


@_register(MICROSOFT, "MatMulBnb4")
def _matmul_bnb4(call: Call, shapes: Sequence[Any], values: Values) -> Dims | None:
    return (*shapes[0][:-1], call.attributes["N"]) if call.get("transB", 1) else None


@_register(MICROSOFT, "Attention", "QAttention")
def _packed_attention(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    batch, sequence, _ = shapes[0]
    sizes = call.get("qkv_hidden_sizes")
    return (batch, sequence, sizes[2] if sizes else shapes[1][1] // 3)


@_register(MICROSOFT, "MultiHeadAttention")
def _multi_head(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    query, value = shapes[0], shapes[2] if len(shapes) > 2 else None
    if len(query) == 5:
        return (query[0], query[1], query[2] * query[4])
    if value is None:
        return tuple(query)
    return (query[0], query[1], value[2] if len(value) == 3 else value[1] * value[3])


@_register(MICROSOFT, "GroupQueryAttention")
def _grouped_query(call: Call, shapes: Sequence[Any], values: Values) -> list[Dims | None]:
    query = shapes[0]
    heads, groups = call.attributes["num_heads"], call.attributes["kv_num_heads"]
    packed = len(shapes) < 2 or shapes[1] is None
    size = query[2] // (heads + 2 * groups) if packed else query[2] // heads
    past = shapes[3][2] if len(shapes) > 3 and shapes[3] is not None else 0
    # With a shared buffer the present keys overwrite the past ones; the new tokens are added to the length regardless.
    present = (query[0], groups, past + query[1], size)
    return [(query[0], query[1], heads * size), present, present]


@_register(MICROSOFT, "DynamicQuantizeLSTM")
def _quantized_lstm(call: Call, shapes: Sequence[Any], values: Values) -> list[Dims | None]:
    sequence, batch, _ = shapes[0]
    directions, hidden, _ = shapes[2]
    state = (directions, batch, hidden)
    return [(sequence, directions, batch, hidden), state, state]


@_register(MICROSOFT, "EmbedLayerNormalization", "QEmbedLayerNormalization")
def _embedding(call: Call, shapes: Sequence[Any], values: Values) -> list[Dims | None]:
    ids, table = shapes[0], shapes[2]
    return [(*ids, table[1]), (ids[0],), (*ids, table[1])]


@_register(MICROSOFT, "CausalConvWithState")
def _causal_conv(call: Call, shapes: Sequence[Any], values: Values) -> list[Dims | None]:
    data, kernel = shapes[:2]
    length = (kernel[-1] - 1) * call.get("dilation", 1)
    if len(kernel) != 3 or len(data) != 3:
        return [data]
    return [data, (data[0], length, data[2]) if call.get("channels_last", 0) else (*data[:2], length)]


@_register(MICROSOFT, "LinearAttention")
def _linear_attention(call: Call, shapes: Sequence[Any], values: Values) -> list[Dims | None]:
    query, value = shapes[0], shapes[2]
    heads, groups = call.attributes["q_num_heads"], call.attributes["kv_num_heads"]
    dim, value_dim = query[2] // heads, value[2] // groups
    return [(*query[:2], max(heads, groups) * value_dim), (query[0], groups, dim, value_dim)]


@_register(MICROSOFT, "LinearAttentionGate")
def _gate(call: Call, shapes: Sequence[Any], values: Values) -> list[Dims | None]:
    return [shapes[0], shapes[0]]


# Operators that the standard has as well.


@_register(MICROSOFT, "CDist")
def _distances(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    return (shapes[0][0], shapes[1][0])


@_register(MICROSOFT, "ExpandDims")
def _with_axis(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    rank = len(shapes[0]) + 1
    place = int(values[1].item()) % rank
    return (*shapes[0][:place], 1, *shapes[0][place:])


@_register(MICROSOFT, "GatherND")
def _gathered(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    return (*shapes[1][:-1], *shapes[0][shapes[1][-1] :])


@_register(MICROSOFT, "GridSample")
def _sampled(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    return (*shapes[0][:2], *shapes[1][1:-1])


@_register(MICROSOFT, "CropAndResize")
def _cropped(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    return (shapes[1][0], shapes[0][1], *values[3].ravel().tolist())


@_register(MICROSOFT, "Pad")
def _padded(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    pads, rank = values[1].ravel().tolist(), len(shapes[0])
    return tuple(size + pads[i] + pads[i + rank] for i, size in enumerate(shapes[0]))


@_register(MICROSOFT, "UnfoldTensor")
def _unfolded(call: Call, shapes: Sequence[Any], values: Values) -> Dims:
    sizes, window = list(shapes[0]), call.attributes["size"]
    axis = call.get("dim", -1) % len(sizes)
    sizes[axis] = (sizes[axis] - window) // call.get("step", 1) + 1
    return (*sizes, window)
