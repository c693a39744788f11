"""Operators that pool over windows of the spatial axes, or over all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from cpd_onnx.errors import UnsupportedError
from cpd_onnx.torch.operators.linear import Window, pad_spatial, symmetric, window_pads, window_steps
from cpd_onnx.torch.registry import operator


class Pool(Window, total=False):
    """Attributes of a pooling operator."""

    ceil_mode: int


Pads = Sequence[tuple[int, int]]

_MAX_POOL: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _ceiled(x: Tensor, pads: Pads, window: Pool) -> list[tuple[int, int]]:
    """Return the padding that, with rounding down, gives the output size of `ceil_mode`.

    A last window that would start in the padding after the input is dropped.
    """
    if not window.get("ceil_mode") or window.get("auto_pad", "NOTSET") not in ("NOTSET", ""):
        return list(pads)
    kernel = window["kernel_shape"]
    strides, dilations = window_steps(len(kernel), window)
    result = []
    for size, (before, after), width, stride, dilation in zip(
        x.shape[2:], pads, kernel, strides, dilations, strict=True
    ):
        span = (width - 1) * dilation + 1
        count = -(-(size + before + after - span) // stride) + 1
        if (count - 1) * stride >= size + before:
            count -= 1
        result.append((before, max(after, (count - 1) * stride + span - size - before)))
    return result


def _windows(x: Tensor, window: Pool) -> Tensor:
    """View padded x [N, C, ...] as [N, C, *output sizes, *kernel sizes]."""
    kernel = window["kernel_shape"]
    rank = len(kernel)
    strides, dilations = window_steps(rank, window)
    for axis in range(rank):
        x = x.unfold(2 + axis, (kernel[axis] - 1) * dilations[axis] + 1, strides[axis])
    for axis, dilation in zip(range(-rank, 0), dilations, strict=True):
        x = every(x, axis, dilation)
    return x


def every(x: Tensor, axis: int, step: int) -> Tensor:
    """Select every `step`-th index of an axis."""
    return x if step == 1 else x.index_select(axis, torch.arange(0, x.shape[axis], step, device=x.device))


def _lowest(dtype: torch.dtype) -> float:
    return -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min


@operator("MaxPool")
def max_pool(x: Tensor, *, outputs: int, storage_order: int = 0, **window: Unpack[Pool]) -> list[Tensor]:
    """Take the largest element of each window, and on request its index in the flattened x."""
    kernel = window["kernel_shape"]
    rank = len(kernel)
    strides, dilations = window_steps(rank, window)
    given = window_pads(x.shape[2:], kernel, window)
    pads = _ceiled(x, given, window)
    padding = symmetric(pads)
    padded, offsets = x, [0] * rank
    if padding is None or any(2 * pad > width for pad, width in zip(padding, kernel, strict=True)):
        padded, padding = pad_spatial(x, pads, _lowest(x.dtype)), [0] * rank
        offsets = [before for before, _ in pads]
    # torch cannot pool 8-bit integers
    values = padded if padded.is_floating_point() else padded.double()
    pooled = _MAX_POOL[rank](values, list(kernel), strides, padding, dilations, return_indices=outputs > 1)
    if outputs == 1:
        return [pooled.to(x.dtype)]
    places = _coordinates(pooled[1], padded.shape[2:], offsets)
    return [pooled[0].to(x.dtype), _flat_index(places, x, storage_order)]


def _coordinates(flat: Tensor, sizes: Sequence[int], offsets: Sequence[int]) -> list[Tensor]:
    """Coordinates, one tensor an axis, of flat indices into a padded plane of these sizes."""
    coordinates: list[Tensor] = []
    for size in reversed(sizes):
        coordinates.insert(0, flat % size)
        flat = flat // size
    return [coordinate - offset for coordinate, offset in zip(coordinates, offsets, strict=True)]


def _flat_index(coordinates: Sequence[Tensor], x: Tensor, storage_order: int) -> Tensor:
    """Index into the flattened x, whose spatial axes are counted row-major or, for storage order 1, column-major."""
    sizes = list(x.shape[2:])
    pairs = list(zip(coordinates, sizes, strict=True))
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device)
    flat = torch.zeros_like(coordinates[0])
    for coordinate, size in reversed(pairs) if storage_order else pairs:
        flat = flat * size + coordinate
    return flat + planes.reshape(x.shape[0], x.shape[1], *[1] * len(sizes)) * math.prod(sizes)


@operator("AveragePool")
def average_pool(x: Tensor, *, count_include_pad: int = 0, **window: Unpack[Pool]) -> Tensor:
    """Average each window over its elements in x or, on request, in the padded x."""
    kernel = window["kernel_shape"]
    rank = len(kernel)
    strides, dilations = window_steps(rank, window)
    given = window_pads(x.shape[2:], kernel, window)
    pads = _ceiled(x, given, window)
    padding = symmetric(pads)
    fits = padding is not None and all(2 * pad <= width for pad, width in zip(padding, kernel, strict=True))
    if fits and pads == given and set(dilations) == {1}:
        result: Tensor = _AVG_POOL[rank](x, list(kernel), strides, padding, count_include_pad=bool(count_include_pad))
        return result
    axes = list(range(-rank, 0))
    ones = torch.ones_like(x[:1, :1])
    if count_include_pad:
        ones = pad_spatial(ones, given, 1.0)
    rest = [(a - c, b - d) for (a, b), (c, d) in zip(pads, given, strict=True)] if count_include_pad else pads
    counts = _windows(pad_spatial(ones, rest), window).sum(axes)
    return _windows(pad_spatial(x, pads), window).sum(axes) / counts


@operator("LpPool")
def lp_pool(x: Tensor, *, p: float = 2, **window: Unpack[Pool]) -> Tensor:
    """Take the p-norm of each window."""
    given = window_pads(x.shape[2:], window["kernel_shape"], window)
    pads = _ceiled(x, given, window)
    axes = list(range(-len(pads), 0))
    return _windows(pad_spatial(x.abs().pow(p), pads), window).sum(axes).pow(1 / p)


@operator("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    """Average over all spatial axes."""
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    """Take the largest element over all spatial axes."""
    return x.amax(list(range(2, x.ndim)), keepdim=True)


@operator("GlobalLpPool")
def global_lp_pool(x: Tensor, *, p: float = 2) -> Tensor:
    """Take the p-norm over all spatial axes."""
    return x.abs().pow(p).sum(list(range(2, x.ndim)), keepdim=True).pow(1 / p)


@operator("MaxUnpool", host=(2,))
def max_unpool(
    x: Tensor, indices: Tensor, output_shape: Sequence[int] | None = None, **window: Unpack[Window]
) -> Tensor:
    """Scatter pooled elements to their origins, with zeros elsewhere; `indices` refer to the flattened tensor."""
    kernel = window["kernel_shape"]
    strides, _ = window_steps(len(kernel), window)
    pads = window_pads(x.shape[2:], kernel, window)
    sizes = [
        (size - 1) * stride + width - before - after
        for size, stride, width, (before, after) in zip(x.shape[2:], strides, kernel, pads, strict=True)
    ]
    shape = [*x.shape[:2], *sizes]
    flat = x.new_zeros(math.prod(shape)).scatter(0, indices.reshape(-1), x.reshape(-1))
    result = flat.reshape(shape)
    if output_shape is None:
        return result
    return pad_spatial(result, [(0, want - size) for want, size in zip(output_shape[2:], sizes, strict=True)])


def require_images(x: Tensor, batch: Tensor, kind: str) -> None:
    """Raise UnsupportedError if regions refer to images beyond the batch; synchronizes with the device."""
    invalid = batch[(batch < 0) | (batch >= len(x))]
    if len(invalid):
        raise UnsupportedError(
            f"{kind} has a region in image {invalid[0].item():g} in a batch of {len(x)}: the model needs larger batches"
        )


@operator("MaxRoiPool")
def max_roi_pool(x: Tensor, rois: Tensor, *, pooled_shape: Sequence[int], spatial_scale: float = 1.0) -> Tensor:
    """Take the largest elements of a grid over each region [batch, x1, y1, x2, y2]; synchronizes with the device."""
    results = []
    require_images(x, rois[:, 0], "MaxRoiPool")
    for batch, *corners in rois.tolist():
        x1, y1, x2, y2 = (round(corner * spatial_scale) for corner in corners)
        region = x[int(batch), :, y1 : max(y2, y1) + 1, x1 : max(x2, x1) + 1]
        results.append(F.adaptive_max_pool2d(region, tuple(pooled_shape)))
    return torch.stack(results)
