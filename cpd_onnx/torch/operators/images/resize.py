"""Resizing: separable interpolation, one axis after another.

Each axis is a weighted sum of a few shifted reads ("taps"), whose positions and weights depend on the sizes only. The
common bilinear case uses torch's own kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import Unpack

from cpd_onnx.torch.operators.generate import Numbers
from cpd_onnx.torch.registry import operator

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class ResizeAttributes(TypedDict, total=False):
    """Attributes of Resize and Upsample."""

    antialias: int
    axes: Sequence[int]
    coordinate_transformation_mode: str
    cubic_coeff_a: float
    exclude_outside: int
    extrapolation_value: float
    keep_aspect_ratio_policy: str
    mode: str
    nearest_mode: str


@dataclass(frozen=True)
class Axis:
    """The resizing of one axis: sizes, scale, coordinate transformation, and interpolation."""

    size: int
    target: int
    scale: float
    roi: tuple[float, float] = (0.0, 1.0)
    transform: str = "half_pixel"
    mode: str = "nearest"
    nearest: str = "round_prefer_floor"
    cubic: float = -0.75
    antialias: bool = False
    exclude_outside: bool = False


@operator("Resize", host=(1, 2, 3))
def resize(
    x: Tensor,
    roi: Numbers | None = None,
    scales: Numbers | None = None,
    sizes: Numbers | None = None,
    *,
    opset: int,
    **options: Unpack[ResizeAttributes],
) -> Tensor:
    """Resize by scales or to sizes."""
    if opset < 11:  # its second input were the scales, its coordinates those of Upsample
        return upsample(x, roi, **options)
    dims = [int(axis) % x.ndim for axis in options.get("axes") or range(x.ndim)]
    axes = _axes(x, dims, (roi, scales, sizes), options)
    return _interpolate(x, axes, options)


class UpsampleAttributes(ResizeAttributes, total=False):
    """Attributes of Upsample; the scales are an input from opset 9 on."""

    scales: Sequence[float]


@operator("Upsample", host=(1,))
def upsample(x: Tensor, factors: Numbers | None = None, **options: Unpack[UpsampleAttributes]) -> Tensor:
    """Resize by scales, without a shift by half a pixel."""
    scales = options["scales"] if factors is None else factors
    plain: ResizeAttributes = {
        "mode": options.get("mode", "nearest"),
        "coordinate_transformation_mode": "asymmetric",
        "nearest_mode": "floor",
    }
    return _interpolate(x, _axes(x, list(range(x.ndim)), (None, scales, None), plain), plain)


def _axes(
    x: Tensor,
    dims: Sequence[int],
    given: tuple[Numbers | None, Numbers | None, Numbers | None],
    options: ResizeAttributes,
) -> dict[int, Axis]:
    """Return the resizing of each axis that changes."""
    roi, scales, sizes = given
    old = [x.shape[dim] for dim in dims]
    if scales:
        factors = [float(scale) for scale in scales]
        new = [math.floor(size * scale) for size, scale in zip(old, factors, strict=True)]
    else:
        assert sizes is not None
        new, factors = _fitted(old, list(sizes), options.get("keep_aspect_ratio_policy", "stretch"))
    regions = list(zip(roi[: len(dims)], roi[len(dims) :], strict=True)) if roi else [(0.0, 1.0)] * len(dims)
    crops = options.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    return {
        dim: Axis(
            size,
            target,
            scale,
            (float(region[0]), float(region[1])),
            options.get("coordinate_transformation_mode", "half_pixel"),
            options.get("mode", "nearest"),
            options.get("nearest_mode", "round_prefer_floor"),
            options.get("cubic_coeff_a", -0.75),
            bool(options.get("antialias", 0)),
            bool(options.get("exclude_outside", 0)),
        )
        for dim, size, target, scale, region in zip(dims, old, new, factors, regions, strict=True)
        if target != size or scale != 1.0 or (crops and region != (0.0, 1.0))
    }


def _fitted(old: Sequence[int], new: list[int], policy: str) -> tuple[list[int], list[float]]:
    """Return target sizes and scales; with a policy, one scale for all axes, that of the largest or smallest fit."""
    scales = [target / size for size, target in zip(old, new, strict=True)]
    if policy == "stretch":
        return new, scales
    scale = min(scales) if policy == "not_larger" else max(scales)
    return [math.floor(scale * size + 0.5) for size in old], [scale] * len(old)


def _interpolate(x: Tensor, axes: dict[int, Axis], options: ResizeAttributes) -> Tensor:
    if _bilinear(x, axes):
        return _torch_bilinear(x, axes)
    dtype, cropped = x.dtype, options.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    y = x if options.get("mode", "nearest") == "nearest" or x.is_floating_point() else x.float()
    for dim, axis in axes.items():
        y = _resize_axis(y, dim, axis)
    if cropped:
        y = _extrapolated(y, axes, options.get("extrapolation_value", 0.0))
    return y.to(dtype)


def _bilinear(x: Tensor, axes: dict[int, Axis]) -> bool:
    """Return whether torch's bilinear kernel is equivalent: both spatial axes of an image, common coordinates."""
    kernels = {(axis.mode, axis.transform, axis.antialias) for axis in axes.values()}
    modes = {("linear", mode, False) for mode in ("half_pixel", "pytorch_half_pixel", "align_corners")}
    one_wide = any(axis.target == 1 for axis in axes.values())
    return x.ndim == 4 and set(axes) == {2, 3} and len(kernels) == 1 and kernels <= modes and not one_wide


def _torch_bilinear(x: Tensor, axes: dict[int, Axis]) -> Tensor:
    height, width = axes[2], axes[3]
    corners = height.transform == "align_corners"
    scales = (None, None) if corners else (height.scale, width.scale)
    result: Tensor = torch.ops.aten.upsample_bilinear2d(x, [height.target, width.target], corners, *scales)
    return result


def _resize_axis(x: Tensor, dim: int, axis: Axis) -> Tensor:
    indices, weights = taps(axis)
    places = torch.from_numpy(indices).to(x.device)
    if axis.mode == "nearest":
        return x.index_select(dim, places[0])
    shape = [-1 if place == dim else 1 for place in range(x.ndim)]
    factors = torch.from_numpy(weights).to(device=x.device, dtype=x.dtype)
    parts = [x.index_select(dim, place) * factor.reshape(shape) for place, factor in zip(places, factors, strict=True)]
    total: Tensor = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _extrapolated(x: Tensor, axes: dict[int, Axis], value: float) -> Tensor:
    """Fill with a constant where the region of interest extends beyond the input."""
    for dim, axis in axes.items():
        places = coordinates(axis)
        outside = torch.from_numpy((places < 0) | (places > axis.size - 1)).to(x.device)
        x = x.masked_fill(outside.reshape([-1 if place == dim else 1 for place in range(x.ndim)]), value)
    return x


def coordinates(axis: Axis) -> Floats:
    """Return the coordinate of each output element in the input."""
    out = np.arange(axis.target, dtype=np.float64)
    length = axis.scale * axis.size
    match axis.transform:
        case "asymmetric":
            return out / axis.scale
        case "align_corners":
            return out * (axis.size - 1) / (length - 1) if length != 1 else out * 0.0
        case "tf_crop_and_resize":
            start, end = axis.roi
            if length == 1:
                return out * 0.0 + (end + start) * (axis.size - 1) / 2
            return start * (axis.size - 1) + out * (end - start) * (axis.size - 1) / (length - 1)
        case "pytorch_half_pixel" if length == 1:
            return out * 0.0 - 0.5
        case "half_pixel_symmetric":
            shift = axis.size / 2 * (1 - axis.target / length)
            return shift + (out + 0.5) / axis.scale - 0.5
        case _:
            return (out + 0.5) / axis.scale - 0.5


def taps(axis: Axis) -> tuple[Integers, Floats]:
    """Return input indices and their weights, both [taps, target]; indices are clamped to the input."""
    places = coordinates(axis)
    if axis.mode == "nearest":
        return _nearest(places, axis.nearest).clip(0, axis.size - 1)[None], np.ones((1, axis.target))
    reach = 2 if axis.mode == "cubic" else 1
    shrink = min(axis.scale, 1.0) if axis.antialias else 1.0
    first = math.floor(-reach / shrink) + 1
    base = np.ceil(places) - 1  # an element exactly on the grid is the right one of the two central taps
    indices = base + np.arange(first, 2 - first)[:, None]
    distance = (indices - places) * shrink
    weights = _cubic(distance, axis.cubic) if axis.mode == "cubic" else np.clip(1 - np.abs(distance), 0, 1)
    if axis.exclude_outside:
        weights = np.where((indices < 0) | (indices > axis.size - 1), 0.0, weights)
    if axis.exclude_outside or axis.antialias:
        weights = weights / weights.sum(0)
    return indices.clip(0, axis.size - 1).astype(np.int64), weights


def _nearest(places: Floats, mode: str) -> Integers:
    rounded: dict[str, Callable[[Floats], Floats]] = {
        "floor": np.floor,
        "ceil": np.ceil,
        "round_prefer_ceil": lambda value: np.floor(value + 0.5),
        "round_prefer_floor": lambda value: np.ceil(value - 0.5),
    }
    return rounded[mode](places).astype(np.int64)


def _cubic(distance: Floats, a: float) -> Floats:
    """Keys' cubic convolution kernel."""
    d = np.abs(distance)
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))
