"""Sizes under which a model is judged: those of the file, and realistic ones for the images that it leaves open.

Shape inference and proofs bind open sizes to small numbers, which suffice to follow channels. Costs and latencies are
those of one image of 224 x 224 pixels, as in most classifiers, unless --input-shape gives another size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from onnx import TensorProto, helper

from cpd_onnx.errors import CpdError
from cpd_onnx.ops.sizes import Size
from cpd_onnx.shapes.inference import fold_again
from cpd_onnx.shapes.open_inputs import real_inputs
from cpd_onnx.shapes.values import COMPUTABLE_TYPES, Folded, Value

IMAGE = 224
"""Height and width in pixels of an image whose sizes are open."""
_STANDARD = "ai.onnx::"
"""Start of the names of standard operators in `Folded.unknown`; their shapes are unknown where sizes do not fit."""
_IMAGE_TYPES = {*COMPUTABLE_TYPES, TensorProto.UINT8}
"""Element types of images."""


def realistic(folded: Folded) -> Folded:
    """Return the model inferred at realistic sizes of its images; `folded` itself if it has those or rejects others."""
    if folded.numbers or any(operator.startswith(_STANDARD) for operator in folded.unknown):
        return folded  # sizes were given, or some tensors fit few sizes only
    numbers = dict(_image_symbols(folded))
    if not numbers:
        return folded
    with suppress(CpdError):
        found = fold_again(folded, folded.model, numbers)
        if len(found.unknown) <= len(folded.unknown):
            return found
    return folded


def judged_inputs(folded: Folded) -> list[dict[str, Any]]:
    """Return name, shape, element type and assumed axes of each input, under which all figures of a model hold.

    Axes are assumed if the file leaves their size open and no size was given; batches are of one sample.
    """
    there = realistic(folded)
    return [_judged(there.scope.values[value.name], value, folded) for value in _inputs(folded)]


def _judged(there: Value, value: Value, folded: Folded) -> dict[str, Any]:
    shape = list(there.shape or ())
    assumed = [axis for axis in range(len(shape)) if not value.has_fixed(axis)]
    for axis in assumed:
        if shape[axis] == folded.batch:  # other sizes are never that small
            shape[axis] = 1
    kind = helper.tensor_dtype_to_np_dtype(value.dtype).name if value.dtype else "unknown"
    return {"name": value.name, "shape": shape, "type": str(kind), "assumed": assumed}


def _inputs(folded: Folded) -> Iterator[Value]:
    for info in real_inputs(folded.model):
        value = folded.scope.values.get(info.name)
        if value is not None:
            yield value


def _image_symbols(folded: Folded) -> Iterator[tuple[str, int]]:
    """Yield the name and a realistic number of each symbol that is the height or width of an image, if it is small."""
    for value in _inputs(folded):
        if value.dtype not in _IMAGE_TYPES or len(value.shape or ()) != 4:
            continue
        open_axes = [axis for axis in (1, 2, 3) if not value.has_fixed(axis)]
        if len(open_axes) != 2:
            continue  # which axis holds channels is not known
        for axis in open_axes:
            name, size = _symbol(value, axis), (value.shape or ())[axis]
            if name is not None and size < IMAGE:
                yield name, IMAGE


def _symbol(value: Value, axis: int) -> str | None:
    """Return the name of the symbol that the size of an axis is; None for another expression."""
    size = (value.sizes or ())[axis]
    if not isinstance(size, Size) or len(size.coefficients) != 1:
        return None
    (monomial, factor) = next(iter(size.coefficients.items()))
    if factor != 1 or len(monomial) != 1 or monomial[0][1] != 1 or monomial[0][0].kind != "symbol":
        return None
    return str(monomial[0][0].arguments[0])
