"""Sizes that operators require: equations between open sizes of their inputs and numbers.

A convolution requires as many channels as its kernel has, an addition the size of the constant that it adds, a Squeeze
that its axes are 1. From these, sizes that a file leaves open are solved (`shapes.solving`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from cpd_onnx.ops.evaluate import NOT_COMPUTED, Call, axes_operand, register_in
from cpd_onnx.ops.shapes_standard import Dims, Values
from cpd_onnx.ops.sizes import Size, as_size, divided, is_constant, product
from cpd_onnx.ops.traits import MICROSOFT

Pair: TypeAlias = "tuple[Any, Any]"
"""Two sizes that an operator requires to be equal."""
Equation: TypeAlias = "tuple[Size, int]"
"""A symbolic size, and the number that it has to be."""
Requirements: TypeAlias = Callable[[Call, Sequence[Any], Sequence[Any]], "Iterator[Pair]"]
"""Yields pairs of sizes that have to be equal, from the call and the shapes and values of its inputs."""
_REQUIREMENTS: dict[tuple[str, str], Requirements] = {}
"""Requirements by (domain, operator)."""
_SUGGESTIONS: dict[tuple[str, str], Requirements] = {}
"""Probable requirements by (domain, operator), which hold only if the operator fails at other sizes."""


class _Met(tuple[Any, Any]):
    """A pair of sizes that are broadcast against each other, so that the first may also be 1."""

    __slots__ = ()


def required(key: tuple[str, str], call: Call, shapes: Sequence[Dims | None], values: Values) -> list[Equation]:
    """Return what the open sizes of a node's inputs have to be; empty if nothing is known about the operator."""
    return _equations(_REQUIREMENTS, key, call, shapes, values)


def suggested(key: tuple[str, str], call: Call, shapes: Sequence[Dims | None], values: Values) -> list[Equation]:
    """Return what the open sizes of a node's inputs may have to be, where its output is unknown at others."""
    return _equations(_SUGGESTIONS, key, call, shapes, values)


def required_exactly(key: tuple[str, str], call: Call, shapes: Sequence[Dims | None], values: Values) -> list[Equation]:
    """Return those of the equations of `required` whose sizes cannot be 1 instead, as those that are broadcast can."""
    return _equations(_REQUIREMENTS, key, call, shapes, values, exactly=True)


def is_broadcasting(key: tuple[str, str]) -> bool:
    """Return whether an operator broadcasts all of its inputs against each other."""
    return _REQUIREMENTS.get(key) is _broadcast


def _equations(
    table: Mapping[tuple[str, str], Requirements],
    key: tuple[str, str],
    call: Call,
    shapes: Sequence[Dims | None],
    values: Values,
    *,
    exactly: bool = False,
) -> list[Equation]:
    if key not in table:
        return []
    found: list[Equation] = []
    try:
        for pair in table[key](call, shapes, values):
            sizes = [size for size in pair if isinstance(size, Size)]
            numbers = [size for size in pair if is_constant(size)]
            if len(sizes) == len(numbers) == 1 and not (exactly and isinstance(pair, _Met)):
                found.append((sizes[0], int(numbers[0])))
    except NOT_COMPUTED:
        pass  # an input is absent, or its shape is unknown
    return found


def _of(domain: str, *names: str) -> Callable[[Requirements], Requirements]:
    return register_in(_REQUIREMENTS, *((domain, name) for name in names))


@_of(
    "", "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mul",
    "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
)  # fmt: skip  # a table
def _broadcast(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    """Yield each open size with the number, other than 1, that it meets; it might be 1 as well."""
    for axis in range(1, max(map(len, shapes)) + 1):
        here = [shape[-axis] for shape in shapes if len(shape) >= axis]
        numbers = {size for size in here if is_constant(size) and size > 1}
        yield from (_Met((size, number)) for number in numbers for size in here)


@_of(MICROSOFT, "QLinearAdd", "QLinearMul")
def _quantized_broadcast(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    yield from _broadcast(call, (shapes[0], shapes[3]), ())


@_of(MICROSOFT, "QLinearWhere")
def _quantized_where(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    yield from _broadcast(call, (shapes[0], shapes[1], shapes[4]), ())


@_of(MICROSOFT, "FusedConv")
@_of("", "Conv", "ConvInteger")
def _conv(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    yield shapes[0][1], shapes[1][1] * call.get("group", 1)


@_of(MICROSOFT, "QLinearConv")
@_of("", "QLinearConv")
def _quantized_conv(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    channels = shapes[0][-1 if call.get("channels_last", 0) else 1]
    yield channels, shapes[3][1] * call.get("group", 1)


@_of("", "ConvTranspose")
def _transposed_conv(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    yield shapes[0][1], shapes[1][0]


@_of(MICROSOFT, "DynamicQuantizeMatMul", "MatMulIntegerToFloat")
@_of("", "MatMul", "MatMulInteger")
def _matmul(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    a, b = shapes[:2]
    yield a[-1], b[-2] if len(b) > 1 else b[0]
    yield from _broadcast(call, (a[:-2], b[:-2]), ()) if max(len(a), len(b)) > 2 else ()


@_of("", "QLinearMatMul")
def _quantized_matmul(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    yield from _matmul(call, (shapes[0], shapes[3]), ())


@_of(MICROSOFT, "MatMulNBits")
def _block_matmul(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    yield shapes[0][-1], call.attributes["K"]


@_of(MICROSOFT, "QuantizeLinear", "DequantizeLinear")
@_of("", "QuantizeLinear", "DequantizeLinear")
def _quantizer(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    """Yield the sizes of an axis and of the scales along it; blocks and single scales fit any size."""
    x, scale = shapes[:2]
    if len(scale) == 1 and scale[0] != 1 and len(x) > 1:
        yield x[call.get("axis", 1)], scale[0]


@_of(MICROSOFT, "FusedGemm")
@_of("", "Gemm")
def _gemm(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    yield shapes[0][0 if call.get("transA", 0) else 1], shapes[1][1 if call.get("transB", 0) else 0]


@_of(MICROSOFT, "QGemm")
def _quantized_gemm(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    yield from _gemm(call, (shapes[0], shapes[3]), ())


@_of("", "BatchNormalization", "InstanceNormalization")
def _by_channel(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    yield shapes[0][1], shapes[1][0]


@_of("", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def _layer_norm(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    yield shapes[0][-1], shapes[1][-1]


@_of(MICROSOFT, "SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
def _skip_norm(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    yield shapes[0][-1], shapes[2][-1]
    yield from _broadcast(call, shapes[:2], ())


@_of("", "Concat")
def _concat(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    joined = call.get("axis", 1) % len(shapes[0])
    for axis in range(len(shapes[0])):
        here = [shape[axis] for shape in shapes]
        numbers = {size for size in here if is_constant(size)}
        yield from ((size, number) for number in numbers for size in here if axis != joined)


@_of(MICROSOFT, "QLinearConcat")
def _quantized_concat(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    yield from _concat(call, shapes[2::3], ())


@_of("", "Squeeze")
def _squeeze(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    yield from ((shapes[0][axis], 1) for axis in axes_operand(call, values[1:]) or ())


@_of("", "Reshape")
def _reshape(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    """Yield the number of elements, if the target is known; an axis of 0 keeps its size.

    Where both numbers are open, it is their quotient that has to be 1, such as a batch that the target leaves out.
    """
    sizes = [as_size(size) for size in (call.get("shape") if len(values) < 2 else values[1])]
    if -1 not in sizes and (not call.get("allowzero", 0) or 0 not in sizes):
        kept = [shapes[0][axis] if size == 0 else size for axis, size in enumerate(sizes)]
        whole, wanted = product(shapes[0]), product(kept)
        yield whole, wanted
        if isinstance(whole, Size) and isinstance(wanted, Size):
            yield divided(whole, wanted), 1


def _reshape_with_rest(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    """Yield the number of elements beside a first or last axis whose size is left open, which passes as it is.

    Any multiple would do; that the axis passes is the simplest reading of a Reshape which fails at other sizes.
    """
    data, wanted = shapes[0], [as_size(size) for size in (call.get("shape") if len(values) < 2 else values[1])]
    if wanted[:1] == [-1]:
        yield product(data[1:]), product(wanted[1:])
    elif wanted[-1:] == [-1]:
        yield product(data[:-1]), product(data[i] if size == 0 else size for i, size in enumerate(wanted[:-1]))


_SUGGESTIONS["", "Reshape"] = _reshape_with_rest


@_of("", "GRU", "LSTM", "RNN")
def _recurrent(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    """Yield the size of the input and the batch, which initial states share."""
    data, weight, *rest = shapes
    yield data[-1], weight[-1]
    batch = 0 if call.get("layout", 0) else 1
    yield from ((data[batch], state[batch]) for state in rest[3:5] if state is not None)


@_of(MICROSOFT, "GroupQueryAttention")
def _grouped_attention(call: Call, shapes: Sequence[Any], values: Sequence[Any]) -> Iterator[Pair]:
    """Yield heads and head size of the cache, which are those of the projections."""
    heads, shared = call.get("num_heads"), call.get("kv_num_heads")
    is_packed = shapes[1] is None
    size = shapes[0][-1] // (heads + 2 * shared if is_packed else heads)
    for cache in shapes[3:5]:
        if cache is not None:
            yield cache[1], shared
            yield cache[3], size
