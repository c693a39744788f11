"""The blocks of random graphs with operators whose rules are newer than the graphs: sequences, transforms, losses, sources.

They are drawn by `newer` alone, so that the other graphs stay what their seeds have always given.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from tests.support.builder import MICROSOFT, NEWER, Builder, block
from tests.support.rare_blocks import added, channels, from_bytes, in_bytes, number, partner, steps


def put(b: Builder, elements: list[str]) -> str:
    """A sequence, made at once or one after the other."""
    if b.choices.integer(0, 1):
        return b.raw("SequenceConstruct", elements)
    made = b.raw("SequenceEmpty", [])
    for place, element in enumerate(elements):
        made = b.raw("SequenceInsert", [made, element, *([b.constant(np.int64(place))] if place % 2 else [])])
    return made


@block(2, 3, 4, among=NEWER)
def list_of_tensors(b: Builder, x: str) -> str | None:
    shape, axis = b.shapes[x], channels(b.shapes[x])
    if b.opset < 11:
        return None
    elements = [x, partner(b, x), b.activated(x)]
    made, way = put(b, elements), b.choices.integer(0, 3)
    if way == 0:
        return b.node("SequenceAt", [made, b.constant(np.int64(b.choices.integer(-3, 2)))], shape)
    if way == 1:
        made = b.raw("SequenceErase", [made, *([b.constant(np.int64(0))] if b.choices.integer(0, 1) else [])])
        joined = (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])
        return b.node("ConcatFromSequence", [made], joined, axis=axis) if 2 * shape[axis] <= 24 else None
    if way == 2:
        stacked = b.raw("ConcatFromSequence", [made], axis=len(shape), new_axis=1)
        return b.with_axes("ReduceMax", stacked, [len(shape)], shape, 18, keepdims=0)
    return added(b, x, b.raw("SequenceLength", [made]))


@block(2, 3, 4, among=NEWER)
def split_to_list(b: Builder, x: str) -> str | None:
    shape, axis = b.shapes[x], channels(b.shapes[x])
    size, way = shape[axis], b.choices.integer(0, 2)
    if b.opset < 11 or size < 4:
        return None
    if way == 0:
        parts = b.raw("SplitToSequence", [x, b.ints(size // 4, size - size // 4)], axis=axis)
    elif way == 1:
        parts = b.raw("SplitToSequence", [x, b.constant(np.int64(size // 2))], axis=axis)
    else:
        parts = b.raw("SplitToSequence", [x], axis=axis, keepdims=1)
        one = (*shape[:axis], 1, *shape[axis + 1 :])
        return b.node("SequenceAt", [parts, b.constant(np.int64(-1))], one)
    if b.choices.integer(0, 1) or size % 2:
        return b.node("ConcatFromSequence", [parts], shape, axis=axis - len(shape))
    if way == 0:
        return b.node("SequenceAt", [parts, b.constant(np.int64(0))], (*shape[:axis], size // 4, *shape[axis + 1 :]))
    half = (*shape[:axis], size // 2, *shape[axis + 1 :])
    first, last = (b.node("SequenceAt", [parts, b.constant(np.int64(place))], half) for place in (0, -1))
    return b.node("Mul", [first, b.node("Sigmoid", [last], half)], half)


@block(2, 3, 4, among=NEWER)
def transformed(b: Builder, x: str) -> str | None:
    """The real part of the spectrum along an axis."""
    shape = b.shapes[x]
    if b.opset < 17:
        return None
    axis, last = b.choices.integer(1, len(shape) - 1), len(shape)
    real = b.raw("Unsqueeze", [x, b.ints(last)])
    where = [b.constant(np.int64(axis))] if b.opset >= 20 else []
    spectrum = b.raw("DFT", [real, *(["", *where] if where else [])], **({} if where else {"axis": axis}))
    return b.node("Gather", [spectrum, b.constant(np.int64(0))], shape, axis=last)


@block(3, among=NEWER)
def spectra(b: Builder, x: str) -> str | None:
    """The largest real part of the spectra of windows of each token, whose channels are the signal."""
    n, t, c = b.shapes[x]
    if b.opset < 17 or c < 4 or b.is_open:
        return None
    signals = b.raw("Reshape", [x, b.ints(n * t, c, 1)])
    kind = b.choices.pick(("HannWindow", "HammingWindow", "BlackmanWindow"))
    spectrum = b.raw("STFT", [signals, b.constant(np.int64(2)), b.raw(kind, [b.constant(np.int64(4))])])
    frames = (c - 4) // 2 + 1
    return b.node("Reshape", [spectrum, b.ints(n, t, frames * 3 * 2)], (n, t, frames * 3 * 2))


@block(2, 3, among=NEWER)
def mel(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    if b.opset < 17:
        return None
    bands = [b.constant(np.asarray(value)) for value in (4, 16, 8000)]
    bands += [b.constant(np.float32(edge)) for edge in (0, 4000)]
    return b.node("MatMul", [b.matmul(x, 9), b.raw("MelWeightMatrix", bands)], (*shape[:-1], 4))


@block(2, 3, 4, among=NEWER)
def random_numbers(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    if b.opset >= 22:
        return None  # onnxruntime has no kernels for what is new there
    if len(shape) == 2 and b.choices.integer(0, 1):
        made = b.raw("Cast", [b.raw("Multinomial", [x], sample_size=1)], to=TensorProto.FLOAT)
    else:
        made = b.name("noise")
        kind = b.choices.pick(("RandomNormal", "RandomUniform"))
        b.nodes.append(helper.make_node(kind, [], [made], name=f"/{made}", shape=[1, *shape[1:]]))
    return b.node("Add", [x, b.raw("Mul", [made, number(b, 0)])], shape)


@block(2, 3, 4, among=NEWER)
def loss(b: Builder, x: str) -> str | None:
    shape = b.shapes[x]
    if b.opset < 13 or b.is_open:
        return None
    labels = b.constant(b.rng.integers(0, shape[1], (shape[0], *shape[2:])))
    inputs = [x, labels, *([b.vector(shape[1], positive=True)] if b.choices.integer(0, 1) else [])]
    kind, way = b.choices.pick(("mean", "sum", "none")), b.choices.integer(0, 2)
    if way == 0:
        made = b.raw("NegativeLogLikelihoodLoss", inputs, reduction=kind)
    elif way == 1:
        made = b.raw("SoftmaxCrossEntropyLoss", inputs, reduction=kind)
    else:
        made, chances = b.several("SoftmaxCrossEntropyLoss", inputs, 2, reduction=kind)
        b.shapes[chances] = shape
    return added(b, x, b.raw("Unsqueeze", [made, b.ints(1)]) if kind == "none" else made)


@block(2, 3, 4, among=NEWER)
def places_of_data(b: Builder, x: str) -> str | None:
    """How many elements are positive, or distinct."""
    if b.opset < 11:
        return None
    kind, of = b.choices.pick((("NonZero", "Relu"), ("Unique", "Sign")))
    return added(b, x, b.raw("Size", [b.raw(kind, [b.raw(of, [x])])]))


@block(3, among=NEWER)
def overlap(b: Builder, x: str) -> str | None:
    """How many boxes are left of as many as there are tokens, whose channels are classes."""
    n, t, _c = b.shapes[x]
    if b.opset < 11 or b.is_open:
        return None
    scores = b.raw("Transpose", [x], perm=[0, 2, 1])
    corners = b.rng.uniform(0, 1, (n, t, 2))
    boxes = b.constant(np.concatenate([corners, corners + 0.5], axis=2).astype(np.float32))
    found = b.raw("NonMaxSuppression", [boxes, scores, b.constant(np.asarray([2])), number(b, 0.5), number(b, 0)])
    return added(b, x, b.raw("Size", [found]))


@block(3, among=NEWER)
def image_of_columns(b: Builder, x: str) -> str | None:
    n, t, _c = b.shapes[x]
    if b.opset < 18 or t != 5:
        return None
    size = b.choices.pick((2, 3, 4))
    columns = b.raw("Transpose", [b.matmul(x, 2 * size)], perm=[0, 2, 1])
    return b.node("Col2Im", [columns, b.ints(1, 6), b.ints(1, 2)], (n, size, 1, 6))


@block(2, 3, 4, among=NEWER)
def bits_as_they_are(b: Builder, x: str) -> str | None:
    if b.opset < 26:
        return None
    whole = b.raw("BitCast", [x], to=TensorProto.INT32)
    return b.node("BitCast", [whole], b.shapes[x], to=TensorProto.FLOAT)


@block(3, among=NEWER)
def cache(b: Builder, x: str) -> str | None:
    n, t, _c = b.shapes[x]
    if b.opset < 24 or b.is_open:
        return None
    update = b.raw("Slice", [b.activated(x), b.ints(0), b.ints(1), b.ints(1)])
    return b.node("TensorScatter", [x, update, b.constant(np.full(n, t - 1))], b.shapes[x], axis=1)


@block(4, among=NEWER)
def pool_of_bytes(b: Builder, x: str) -> str | None:
    n, c, h, w = b.shapes[x]
    if min(h, w) < 2:
        return None
    inputs = [in_bytes(b, x, MICROSOFT), *steps(b), *steps(b)]
    made = b.raw("QLinearAveragePool", inputs, MICROSOFT, kernel_shape=[2, 2])
    return from_bytes(b, made, (n, c, h - 1, w - 1), MICROSOFT)
