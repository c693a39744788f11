"""Operators that move elements regardless of their values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from cpd_onnx.torch.operators.generate import Numbers
from cpd_onnx.torch.registry import operator


@operator("Shape")
def shape_of(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """Return the sizes of some axes; used only if the rank is unknown at import time."""
    return torch.tensor(x.shape[start:end], dtype=torch.int64, device=x.device)


@operator("Size")
def size_of(x: Tensor) -> Tensor:
    """Return the number of elements; used only if the rank is unknown at import time."""
    return torch.tensor(x.numel(), dtype=torch.int64, device=x.device)


@operator("OptionalGetElement")
def optional_element(x: Tensor) -> Tensor:
    """Return the tensor that an optional value holds."""
    return x


@operator("OptionalHasElement")
def has_element(x: Tensor | None = None) -> Tensor:
    """Return whether an optional value holds a tensor."""
    return torch.tensor(x is not None)


@operator("Reshape", host=(1,))
def reshape(
    x: Tensor, target: Numbers | None = None, *, shape: Sequence[int] | None = None, allowzero: int = 0
) -> Tensor:
    """Reshape; a zero copies the size of the same axis, unless `allowzero`."""
    wanted = list(shape or () if target is None else target)
    if not allowzero:
        wanted = [x.shape[axis] if _is_zero(size) else size for axis, size in enumerate(wanted)]
    return x.reshape(wanted)


def _is_zero(size: Any) -> bool:
    """Return whether a size is the literal zero, without evaluating a symbolic size."""
    return isinstance(size, int) and size == 0


@operator("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """Merge the axes before `axis` into one, and the others into another."""
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Squeeze", host=(1,))
def squeeze(x: Tensor, where: Numbers | None = None, *, axes: Sequence[int] | None = None) -> Tensor:
    """Remove axes of size one: all, or the given ones."""
    dims = axes if where is None else where
    return x.squeeze() if dims is None else x.squeeze(tuple(int(dim) for dim in dims))


@operator("Unsqueeze", host=(1,))
def unsqueeze(x: Tensor, where: Numbers | None = None, *, axes: Sequence[int] | None = None) -> Tensor:
    """Insert axes of size one at the given positions of the result."""
    dims = list(axes or () if where is None else where)
    rank = x.ndim + len(dims)
    for dim in sorted(int(dim) % rank for dim in dims):
        x = x.unsqueeze(dim)
    return x


@operator("Transpose")
def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Reorder the axes; reverse them without `perm`."""
    return x.permute(tuple(perm) if perm is not None else tuple(reversed(range(x.ndim))))


@operator("Concat")
def concat(*inputs: Tensor, axis: int = 1) -> Tensor:
    """Concatenate along an axis."""
    return torch.cat(inputs, axis)


@operator("Split", host=(1,))
def split_into(
    x: Tensor,
    sizes: Numbers | None = None,
    *,
    outputs: int,
    axis: int = 0,
    split: Sequence[int] | None = None,
    num_outputs: int | None = None,
) -> list[Tensor]:
    """Split along an axis, into parts of given sizes or of equal size; the last one may be smaller."""
    wanted = split if sizes is None else sizes
    if wanted is None:
        part = -(-x.shape[axis] // outputs)
        wanted = [part] * (outputs - 1) + [x.shape[axis] - part * (outputs - 1)]
    return list(torch.split(x, list(wanted), axis))


class LegacySlice(TypedDict, total=False):
    """Attributes of Slice before opset 10."""

    starts: Sequence[int]
    ends: Sequence[int]
    axes: Sequence[int]


@operator("Slice", host=(1, 2, 3, 4))
def slice_of(
    x: Tensor,
    first: Numbers | None = None,
    last: Numbers | None = None,
    dims: Numbers | None = None,
    steps: Numbers | None = None,
    **attributes: Unpack[LegacySlice],
) -> Tensor:
    """Slice with steps along several axes; a negative step goes backwards."""
    first, last = attributes.get("starts", first), attributes.get("ends", last)
    dims = attributes.get("axes", dims)
    assert first is not None
    assert last is not None
    dims = range(len(first)) if dims is None else dims
    steps = [1] * len(first) if steps is None else steps
    for dim, start, end, step in zip(dims, first, last, steps, strict=True):
        x = _slice_axis(x, int(dim), (start, end, step))
    return x


def _slice_axis(x: Tensor, dim: int, window: tuple[int, int, int]) -> Tensor:
    start, end, step = window
    dim, size = dim % x.ndim, x.shape[dim]
    if step > 0:
        return x[(slice(None),) * dim + (slice(start, end, step),)]
    order = range(size)[slice(start, None if end < -size else end, step)]
    return x.index_select(dim, torch.tensor(list(order), dtype=torch.int64, device=x.device))


@operator("Expand", host=(1,))
def expand(x: Tensor, shape: Numbers) -> Tensor:
    """Broadcast x and a shape against each other."""
    rank = max(x.ndim, len(shape))
    sizes = [1] * (rank - x.ndim) + list(x.shape)
    wanted = [1] * (rank - len(shape)) + list(shape)
    return x.expand([size if want == 1 else want for size, want in zip(sizes, wanted, strict=True)])


@operator("Tile", host=(1, 2))
def tile(x: Tensor, repeats: Numbers, axis: Numbers | None = None) -> Tensor:
    """Repeat along each axis; along one axis before opset 6."""
    if axis is None:
        return x.repeat(*repeats)
    return x.repeat([repeats[0] if dim == axis[0] else 1 for dim in range(x.ndim)])


class LegacyPad(TypedDict, total=False):
    """Attributes of Pad before opset 11."""

    pads: Sequence[int]
    paddings: Sequence[int]
    value: float


@operator("Pad", domain="com.microsoft", host=(1, 2))
@operator("Pad", host=(1, 2, 3))
def pad(
    x: Tensor,
    amounts: Numbers | None = None,
    constant: Numbers | None = None,
    axes: Numbers | None = None,
    *,
    mode: str = "constant",
    **attributes: Unpack[LegacyPad],
) -> Tensor:
    """Add elements before and after each axis; negative amounts crop."""
    flat = attributes.get("pads", attributes.get("paddings")) if amounts is None else amounts
    assert flat is not None
    value = constant[0] if constant else attributes.get("value", 0)
    dims = [int(axis) % x.ndim for axis in axes] if axes is not None else list(range(x.ndim))
    pairs = [(0, 0)] * x.ndim
    for place, dim in enumerate(dims):
        pairs[dim] = (flat[place], flat[place + len(dims)])
    if mode == "constant":
        return F.pad(x, [amount for pair in reversed(pairs) for amount in pair], value=value)
    for dim, (before, after) in enumerate(pairs):
        x = _pad_axis(x, dim, (before, after), mode)
    return x


def _pad_axis(x: Tensor, dim: int, amounts: tuple[int, int], mode: str) -> Tensor:
    """Pad one axis by its edge, its mirror image, or periodically."""
    before, after = amounts
    if before == after == 0:
        return x
    size = x.shape[dim]
    places = torch.arange(-before, size + after, device=x.device)
    if mode == "edge":
        places = places.clamp(0, size - 1)
    elif mode == "wrap":
        places = places % size
    else:
        period = max(2 * size - 2, 1)
        places = places % period
        places = torch.where(places < size, places, period - places)
    return x.index_select(dim, places)


@operator("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Move channels into spatial blocks; DCR and CRD are the orders of depth, column and row."""
    n, c, h, w = x.shape
    b, depth = blocksize, c // blocksize**2
    if mode == "DCR":
        y = x.reshape(n, b, b, depth, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, depth, b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return y.reshape(n, depth, h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Move spatial blocks into channels."""
    n, c, h, w = x.shape
    b = blocksize
    y = x.reshape(n, c, h // b, b, w // b, b)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return y.permute(order).reshape(n, c * b * b, h // b, w // b)


@operator("CenterCropPad", host=(1,))
def center_crop_pad(x: Tensor, shape: Numbers, *, axes: Sequence[int] | None = None) -> Tensor:
    """Crop or zero-pad around the centre to the given sizes."""
    dims = range(x.ndim) if axes is None else axes
    for dim, want in zip(dims, shape, strict=True):
        size = x.shape[dim]
        if want < size:
            x = x.narrow(dim, (size - want) // 2, want)
        before = (want - size) // 2
        if want > size:
            pads = [0, 0] * (x.ndim - 1 - dim % x.ndim) + [before, want - size - before]
            x = F.pad(x, pads)
    return x


@operator("ReverseSequence")
def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """Reverse the first `lengths[b]` steps of each sequence b."""
    y = x.movedim((batch_axis, time_axis), (0, 1))
    steps = torch.arange(y.shape[1], device=x.device).expand(y.shape[0], -1)
    ends = lengths.reshape(-1, 1)
    order = torch.where(steps < ends, ends - 1 - steps, steps)
    index = order.reshape(*order.shape, *[1] * (y.ndim - 2)).expand_as(y)
    return y.gather(1, index).movedim((0, 1), (batch_axis, time_axis))


@operator("Trilu", domain="com.microsoft", host=(1,))
@operator("Trilu", host=(1,))
def trilu(x: Tensor, k: Numbers | None = None, *, upper: int = 1) -> Tensor:
    """Keep the upper or lower triangle of the last two axes, from diagonal k."""
    diagonal = int(k[0]) if k else 0
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


class LegacyDropout(TypedDict, total=False):
    """Attributes of Dropout: the seed, and those that became inputs in opset 12."""

    seed: int
    ratio: float
    is_test: int


@operator("Dropout", host=(1, 2))
def dropout(
    x: Tensor,
    rate: Numbers | None = None,
    training: Numbers | None = None,
    *,
    outputs: int,
    **attributes: Unpack[LegacyDropout],
) -> list[Tensor]:
    """Return x, as at inference; drop elements only if the model itself sets training mode."""
    ratio = float(rate[0]) if rate else 0.5
    if not (training and training[0]) or ratio == 0.0:
        return [x] if outputs == 1 else [x, torch.ones_like(x, dtype=torch.bool)]
    mask = torch.rand_like(x, dtype=torch.float32) >= ratio
    return [torch.where(mask, x / (1 - ratio), torch.zeros_like(x)), mask][:outputs]
