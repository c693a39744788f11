"""Output shapes of operators that onnx has no schema for: onnxruntime's fusions and a few foreign ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from cpd_onnx.ir.model import Array
from cpd_onnx.ops.shapes_standard import broadcast
from cpd_onnx.ops.sizes import product, whole
from cpd_onnx.ops.traits import MICROSOFT

Dims: TypeAlias = tuple[Any, ...]
"""A shape: whole numbers, or sizes that depend on the inputs."""
Shapes: TypeAlias = Sequence["Dims | None"]
ShapeFunction: TypeAlias = Callable[[dict[str, Any], Shapes], "list[Dims | None]"]

_FUNCTIONS: dict[tuple[str, str], ShapeFunction] = {}


def output_shapes(
    operator: tuple[str, str], attributes: dict[str, Any], shapes: Shapes, values: Sequence[Array | None]
) -> list[Dims | None] | None:
    """Shapes of the outputs of an operator (domain, type), or None if onnx's own inference has to do."""
    function, found = _FUNCTIONS.get(operator), list[Dims | None]()
    try:
        if operator == ("", "MaxUnpool") and len(values) > 2 and values[2] is not None:
            found = [tuple(values[2].tolist())]
        elif function is None:
            return None
        else:
            found = function(attributes, shapes)
        return [None if dims is None else tuple(map(whole, dims)) for dims in found]
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return []


def _register(domain: str, *names: str) -> Callable[[ShapeFunction], ShapeFunction]:
    def add(function: ShapeFunction) -> ShapeFunction:
        for name in names:
            _FUNCTIONS[(domain, name)] = function
        return function

    return add


@_register(
    MICROSOFT,
    "BiasGelu", "FastGelu", "QuickGelu", "Gelu", "BiasSplitGelu", "RotaryEmbedding", "GroupNorm", "FusedBatchNorm",
    "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "BiasDropout", "BiasSoftmax", "DequantizeLinear",
    "QuantizeLinear", "Inverse", "GemmFloat8Identity",
)  # fmt: skip  # a table
@_register("", "SimplifiedLayerNormalization", "FusedGelu", "GroupNormalization")
@_register("ai.onnx.ml", "Scaler", "Imputer", "Normalizer", "Binarizer", "LabelEncoder")
@_register("onnx.brevitas", "Quant", "BipolarQuant", "Trunc")
@_register("qonnx.custom_op.general", "Quant", "BipolarQuant", "Trunc")
def _same(attributes: dict[str, Any], shapes: Shapes) -> list[Dims | None]:
    return [shapes[0]]


@_register("ai.onnx.ml", "ArrayFeatureExtractor")
def _features(attributes: dict[str, Any], shapes: Shapes) -> list[Dims | None]:
    return [(*(_known(shapes[0])[:-1] or (1,)), product(_known(shapes[1])))]


@_register(MICROSOFT, "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "SkipGroupNorm")
def _skip(attributes: dict[str, Any], shapes: Shapes) -> list[Dims | None]:
    return [shapes[0], None, None, shapes[0]]


@_register(MICROSOFT, "QLinearAdd", "QLinearMul")
def _quantized_binary(attributes: dict[str, Any], shapes: Shapes) -> list[Dims | None]:
    return [_broadcast(shapes[0], shapes[3])]


@_register(MICROSOFT, "QLinearConcat")
def _quantized_concat(attributes: dict[str, Any], shapes: Shapes) -> list[Dims | None]:
    parts = [s for s in shapes[2::3] if s is not None]
    axis = attributes["axis"] % len(parts[0])
    return [(*parts[0][:axis], sum(p[axis] for p in parts), *parts[0][axis + 1 :])]


@_register(MICROSOFT, "QLinearGlobalAveragePool")
def _quantized_global_pool(attributes: dict[str, Any], shapes: Shapes) -> list[Dims | None]:
    shape = _known(shapes[0])
    if attributes.get("channels_last", 0):
        return [(shape[0], *[1] * (len(shape) - 2), shape[-1])]
    return [(*shape[:2], *[1] * (len(shape) - 2))]


@_register(MICROSOFT, "FusedConv")
def _conv(attributes: dict[str, Any], shapes: Shapes) -> list[Dims | None]:
    data, kernel = _known(shapes[0]), _known(shapes[1])
    window = attributes.get("kernel_shape") or list(kernel[2:])
    return [(data[0], kernel[0], *_windows(attributes, data[2:], window))]


@_register(MICROSOFT, "NhwcFusedConv")
def _conv_channels_last(attributes: dict[str, Any], shapes: Shapes) -> list[Dims | None]:
    data, kernel = _known(shapes[0]), _known(shapes[1])
    window = attributes.get("kernel_shape") or list(kernel[2:])
    return [(data[0], *_windows(attributes, data[1:-1], window), kernel[0])]


def _windows(attributes: dict[str, Any], sizes: Sequence[int], window: Sequence[int]) -> list[int]:
    """Spatial sizes after a sliding window."""
    rank = len(window)
    strides, dilations = attributes.get("strides") or [1] * rank, attributes.get("dilations") or [1] * rank
    mode = attributes.get("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        return [-(-s // t) for s, t in zip(sizes, strides, strict=True)]
    pads = attributes.get("pads") or [0] * (2 * rank)
    spans = [d * (w - 1) + 1 for w, d in zip(window, dilations, strict=True)]
    return [(sizes[i] + pads[i] + pads[i + rank] - spans[i]) // strides[i] + 1 for i in range(rank)]


@_register(MICROSOFT, "FusedMatMul", "TransposeMatMul", "FusedMatMulActivation")
def _fused_matmul(attributes: dict[str, Any], shapes: Shapes) -> list[Dims | None]:
    a, b = list(_known(shapes[0])), list(_known(shapes[1]))
    if attributes.get("transBatchA", 0) or attributes.get("transBatchB", 0):
        return [None]
    if attributes.get("transA", 0):
        a[-1], a[-2] = a[-2], a[-1]
    if attributes.get("transB", 0):
        b[-1], b[-2] = b[-2], b[-1]
    return [_matmul(tuple(a), tuple(b))]


@_register(MICROSOFT, "DynamicQuantizeMatMul", "MatMulIntegerToFloat")
def _plain_matmul(attributes: dict[str, Any], shapes: Shapes) -> list[Dims | None]:
    return [_matmul(_known(shapes[0]), _known(shapes[1]))]


@_register(MICROSOFT, "FusedGemm", "QGemm")
def _gemm(attributes: dict[str, Any], shapes: Shapes) -> list[Dims | None]:
    a, b = _known(shapes[0]), _known(shapes[3] if len(shapes) > 5 else shapes[1])
    return [(a[1 if attributes.get("transA", 0) else 0], b[0 if attributes.get("transB", 0) else 1])]


@_register(MICROSOFT, "MatMulNBits")
def _matmul_nbits(attributes: dict[str, Any], shapes: Shapes) -> list[Dims | None]:
    return [(*_known(shapes[0])[:-1], attributes["N"])]


@_register(MICROSOFT, "GatherBlockQuantized")
def _gather_blocks(attributes: dict[str, Any], shapes: Shapes) -> list[Dims | None]:
    table, indices, scales = list(_known(shapes[0])), _known(shapes[1]), _known(shapes[2])
    axis = attributes.get("quantize_axis", 1) % len(table)
    block, each = attributes.get("block_size", 128), 8 // attributes.get("bits", 4)
    # Numbers of less than a byte lie in a type of their own, or several to a byte.
    if -(-table[axis] // block) != scales[axis]:
        table[axis] *= each
    rows = attributes.get("gather_axis", 0) % len(table)
    return [(*table[:rows], *indices, *table[rows + 1 :])]


@_register(MICROSOFT, "Attention")
def _packed_attention(attributes: dict[str, Any], shapes: Shapes) -> list[Dims | None]:
    batch, sequence, _ = _known(shapes[0])
    sizes = attributes.get("qkv_hidden_sizes")
    width = sizes[2] if sizes else _known(shapes[1])[1] // 3
    return [(batch, sequence, width)]


@_register(MICROSOFT, "MultiHeadAttention")
def _multi_head(attributes: dict[str, Any], shapes: Shapes) -> list[Dims | None]:
    query = _known(shapes[0])
    value = shapes[2] if len(shapes) > 2 else None
    if len(query) == 5:
        return [(query[0], query[1], query[2] * query[4])]
    if value is None:
        return [query]
    return [(query[0], query[1], value[2] if len(value) == 3 else value[1] * value[3])]


@_register(MICROSOFT, "GroupQueryAttention")
def _grouped_query(attributes: dict[str, Any], shapes: Shapes) -> list[Dims | None]:
    query = _known(shapes[0])
    heads, groups = attributes["num_heads"], attributes["kv_num_heads"]
    packed = len(shapes) < 2 or shapes[1] is None
    size = query[2] // (heads + 2 * groups) if packed else query[2] // heads
    past = shapes[3][2] if len(shapes) > 3 and shapes[3] is not None else 0
    # With a shared buffer the present keys take the place of the past ones; what is new is counted all the same.
    present = (query[0], groups, past + query[1], size)
    return [(query[0], query[1], heads * size), present, present]


@_register(MICROSOFT, "DynamicQuantizeLSTM")
def _quantized_lstm(attributes: dict[str, Any], shapes: Shapes) -> list[Dims | None]:
    sequence, batch, _ = _known(shapes[0])
    directions, hidden, _ = _known(shapes[2])
    state = (directions, batch, hidden)
    return [(sequence, directions, batch, hidden), state, state]


@_register(MICROSOFT, "EmbedLayerNormalization")
def _embedding(attributes: dict[str, Any], shapes: Shapes) -> list[Dims | None]:
    ids, table = _known(shapes[0]), _known(shapes[2])
    return [(*ids, table[1]), (ids[0],), (*ids, table[1])]


def _known(shape: Dims | None) -> Dims:
    if shape is None:
        raise ValueError
    return shape


def _broadcast(a: Dims | None, b: Dims | None) -> Dims | None:
    return None if a is None or b is None else broadcast(a, b)


def _matmul(a: Dims, b: Dims) -> Dims | None:
    if len(a) < 2 or len(b) < 2:
        return None
    batch = _broadcast(a[:-2], b[:-2])
    return None if batch is None else (*batch, a[-2], b[-1])
