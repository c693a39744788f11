"""Sampling at computed positions, and object detection."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from cpd_onnx.torch.operators.generate import Numbers
from cpd_onnx.torch.operators.images.pooling import require_images
from cpd_onnx.torch.operators.linear import Window, pad_spatial, window_pads, window_steps
from cpd_onnx.torch.registry import operator

_MODES = {"linear": "bilinear", "cubic": "bicubic"}


@operator("GridSample", domain="com.microsoft")
@operator("GridSample")
def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    """Sample x [N, C, ...] at the positions of the grid, in -1..1."""
    return F.grid_sample(
        x, grid, mode=_MODES.get(mode, mode), padding_mode=padding_mode, align_corners=bool(align_corners)
    )


@operator("AffineGrid", host=(1,))
def affine_grid(theta: Tensor, size: Numbers, *, align_corners: int = 0) -> Tensor:
    """Return the grid at which an affine map samples an image of the given size."""
    return F.affine_grid(theta, list(size), align_corners=bool(align_corners))


class Deformable(Window, total=False):
    """Attributes of DeformConv."""

    group: int
    offset_group: int


@operator("DeformConv", weights=(1, 3))
def deform_conv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    **options: Unpack[Deformable],
) -> Tensor:
    """2-D convolution whose taps sample x [N, C, H, W] at positions shifted by `offset`, weighted by `mask`."""
    n, channels, height, width = x.shape
    kernel = weight.shape[2:]
    strides, dilations = window_steps(2, options)
    pads = window_pads(x.shape[2:], kernel, options)
    groups, out, taps = options.get("offset_group", 1), offset.shape[2:], kernel[0] * kernel[1]
    places = []
    for axis in range(2):
        start = torch.arange(out[axis], device=x.device) * strides[axis] - pads[axis][0]
        tap = torch.arange(kernel[axis], device=x.device) * dilations[axis]
        shape = [1, 1, 1, 1]
        shape[axis], shape[2 + axis] = kernel[axis], out[axis]
        places.append((tap[:, None] + start).reshape(shape).expand(*kernel, *out).reshape(taps, *out))
    moved = offset.reshape(n, groups, taps, 2, *out) + torch.stack(places, 1)
    size = torch.tensor([height - 1, width - 1], device=x.device, dtype=x.dtype).clamp(min=1).reshape(2, 1, 1)
    grid = (2 * moved / size - 1).flip(3).permute(0, 1, 2, 4, 5, 3).reshape(n * groups, taps * out[0], out[1], 2)
    read = F.grid_sample(x.reshape(n * groups, channels // groups, height, width), grid, align_corners=True)
    columns = read.reshape(n, groups, channels // groups, taps, *out)
    if mask is not None:
        columns = columns * mask.reshape(n, groups, 1, taps, *out)
    blocks = options.get("group", 1)
    parts = columns.reshape(n, blocks, channels // blocks, taps, *out)
    filters = weight.reshape(blocks, weight.shape[0] // blocks, channels // blocks, taps)
    result = torch.einsum("ngcthw,goct->ngohw", parts, filters).reshape(n, weight.shape[0], *out)
    return result if bias is None else result + bias.reshape(-1, 1, 1)


@operator("Col2Im", host=(1, 2))
def col2im(x: Tensor, image: Numbers, block: Numbers, **window: Unpack[Window]) -> Tensor:
    """Add blocks [N, C * block, L] up to an image [N, C, ...]."""
    rank = len(image)
    strides, dilations = window_steps(rank, window)
    pads = window_pads(image, block, window)
    padded = [size + before + after for size, (before, after) in zip(image, pads, strict=True)]
    index = torch.zeros([1] * (2 * rank), dtype=torch.int64, device=x.device)
    for axis, (size, width, stride, dilation) in enumerate(zip(padded, block, strides, dilations, strict=True)):
        count = (size - (width - 1) * dilation - 1) // stride + 1
        tap = torch.arange(width, device=x.device) * dilation
        place = tap[:, None] + torch.arange(count, device=x.device) * stride
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = width, count
        index = index * size + place.reshape(shape)
    columns = x.reshape(x.shape[0], -1, index.numel())
    total = 1
    for size in padded:
        total *= size
    flat = columns.new_zeros(*columns.shape[:2], total).index_add(2, index.reshape(-1), columns)
    result = flat.reshape(*columns.shape[:2], *padded)
    return pad_spatial(result, [(-before, -after) for before, after in pads])


class Regions(TypedDict, total=False):
    """Attributes of RoiAlign."""

    coordinate_transformation_mode: str
    mode: str
    output_height: int
    output_width: int
    sampling_ratio: int
    spatial_scale: float


@operator("RoiAlign")
def roi_align(x: Tensor, rois: Tensor, batch: Tensor, *, opset: int, **options: Unpack[Regions]) -> Tensor:
    """Average or maximum of bilinear samples on a grid over each region [x1, y1, x2, y2] of x [N, C, H, W]."""
    require_images(x, batch, "RoiAlign")
    half = options.get("coordinate_transformation_mode", "half_pixel" if opset >= 16 else "") == "half_pixel"
    corners = rois * options.get("spatial_scale", 1.0) - (0.5 if half else 0.0)
    spans = corners[:, 2:] - corners[:, :2]
    spans = spans if half else spans.clamp(min=1.0)
    bins = (options.get("output_width", 1), options.get("output_height", 1))
    results = []
    for image, start, span in zip(x[batch.long()], corners[:, :2], spans, strict=True):
        weights = [_samples(image, axis, (start[axis], span[axis]), bins[axis], options) for axis in (0, 1)]
        results.append(_pooled(image, weights[1], weights[0], options.get("mode", "avg")))
    return torch.stack(results) if results else x.new_zeros((0, x.shape[1], bins[1], bins[0]))


def _samples(image: Tensor, axis: int, window: tuple[Tensor, Tensor], bins: int, options: Regions) -> Tensor:
    """Linear interpolation weights [bins, samples, size] of the samples along x (axis 0) or y (axis 1)."""
    start, span = window
    size = image.shape[2 - axis]
    count = options.get("sampling_ratio", 0) or max(int(torch.ceil(span / bins)), 0)
    steps = (torch.arange(bins * count, device=image.device) + 0.5) / max(count, 1)
    places = start + steps * span / bins
    inside = (places >= -1) & (places <= size)
    clamped = places.clamp(0, size - 1)
    grid = torch.arange(size, device=image.device)
    weights = (1 - (clamped[:, None] - grid).abs()).clamp(min=0) * inside[:, None]
    return weights.reshape(bins, count, size).to(image.dtype)


def _pooled(image: Tensor, rows: Tensor, columns: Tensor, mode: str) -> Tensor:
    """Average of the samples of each bin, or, as the standard defines it, the largest weighted pixel."""
    if mode == "avg":
        vertical, horizontal = rows.mean(1), columns.mean(1)
        return torch.einsum("chw,ph,qw->cpq", image, vertical, horizontal)
    weighted = torch.einsum("chw,pih,qjw->cpqijhw", image, rows, columns)
    used = torch.einsum("pih,qjw->pqijhw", rows, columns) > 0
    return weighted.masked_fill(~used, float("-inf")).flatten(3).amax(-1)


@operator("NonMaxSuppression", host=(2, 3, 4))
def non_max_suppression(boxes: Tensor, scores: Tensor, *limits: Numbers | None, center_point_box: int = 0) -> Tensor:
    """Indices [selected, (batch, class, box)] of the best boxes; limits are count, overlap and score.

    Boxes are [N, boxes, 4], scores [N, classes, boxes]. Synchronizes with the device.
    """
    most, overlap, lowest = ((float(limit[0]) if limit else None) for limit in (*limits, None, None, None)[:3])
    corners = _corners(boxes, center_point_box)
    chosen: list[tuple[int, int, int]] = []
    for batch, classes in enumerate(scores):
        for label, values in enumerate(classes):
            kept = _suppress(corners[batch], values, overlap or 0.0, lowest)
            chosen += [(batch, label, box) for box in kept[: int(most or 0)]]
    return torch.tensor(chosen, dtype=torch.int64, device=boxes.device).reshape(-1, 3)


def _corners(boxes: Tensor, centred: int) -> Tensor:
    """Return boxes as [y1, x1, y2, x2] with the smaller corner first."""
    if centred:
        half = boxes[..., 2:] / 2
        return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)
    first, second = boxes[..., :2], boxes[..., 2:]
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1)


def _suppress(boxes: Tensor, scores: Tensor, overlap: float, lowest: float | None) -> list[int]:
    """Return, in order of score, the boxes whose overlap with every better one is within the limit."""
    order = scores.argsort(descending=True, stable=True).tolist()
    kept: list[int] = []
    for box in order:
        if lowest is not None and scores[box] <= lowest:
            break
        if not kept or bool((_overlaps(boxes[box], boxes[kept]) <= overlap).all()):
            kept.append(box)
    return kept


def _overlaps(box: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over union of one box with others."""
    start, end = torch.maximum(box[:2], others[:, :2]), torch.minimum(box[2:], others[:, 2:])
    common = (end - start).clamp(min=0).prod(-1)
    areas = [(area[..., 2:] - area[..., :2]).prod(-1) for area in (box, others)]
    union = areas[0] + areas[1] - common
    return torch.where(union > 0, common / union, torch.zeros_like(union))
