"""Operators that make tensors from numbers, and the two crossings between numbers and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpd_onnx.torch.dtypes import elem_dtype
from cpd_onnx.torch.registry import operator

Numbers = Sequence[Any]


def _device(like: Tensor | None) -> torch.device:
    return torch.device("cpu") if like is None else like.device


def as_tensor(numbers: Numbers, shape: Sequence[int], *, dtype: torch.dtype, like: Tensor | None) -> Tensor:
    """Make a tensor of numbers that shape arithmetic gave."""
    return torch.tensor(numbers, dtype=dtype, device=_device(like)).reshape(tuple(shape))


def as_numbers(x: Tensor) -> Numbers:
    """Read a tensor's elements, in row-major order, as Python numbers; waits for the device that computes them."""
    return tuple(x.reshape(-1).tolist())


@operator("ConstantOfShape", host=(0,))
def constant_of_shape(shape: Numbers, *, value: Tensor | None = None, like: Tensor | None = None) -> Tensor:
    """Fill a shape with one value, float32 zero where none is given."""
    if value is None:
        return torch.zeros(tuple(shape), device=_device(like))
    return value.reshape(()).expand(tuple(shape)).clone()


@operator("Range", host=(0, 1, 2))
def arange(start: Numbers, limit: Numbers, delta: Numbers, *, dtype: torch.dtype, like: Tensor | None = None) -> Tensor:
    """Count from start to before limit."""
    (first,), (last,), (step,) = start, limit, delta
    if (last - first) * step <= 0:
        return torch.empty(0, dtype=dtype, device=_device(like))
    return torch.arange(first, last, step, dtype=dtype, device=_device(like))


@operator("EyeLike")
def eye_like(x: Tensor, *, dtype: torch.dtype, k: int = 0) -> Tensor:
    """Give the matrix of x's shape with ones on diagonal k."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    columns = torch.arange(x.shape[1], device=x.device)
    return (columns - rows == k).to(dtype)


@operator("RandomNormal")
def random_normal(
    *, shape: Sequence[int], like: Tensor | None = None, mean: float = 0.0, scale: float = 1.0, seed: float | None = None
) -> Tensor:
    """Draw from a normal distribution; `seed` is ignored, torch's own generator is used."""
    return torch.randn(tuple(shape), device=_device(like)) * scale + mean


@operator("RandomUniform")
def random_uniform(
    *, shape: Sequence[int], like: Tensor | None = None, low: float = 0.0, high: float = 1.0, seed: float | None = None
) -> Tensor:
    """Draw from a uniform distribution; `seed` is ignored, torch's own generator is used."""
    return torch.rand(tuple(shape), device=_device(like)) * (high - low) + low


@operator("RandomNormalLike")
def random_normal_like(x: Tensor, *, mean: float = 0.0, scale: float = 1.0, seed: float | None = None) -> Tensor:
    """Draw x's shape from a normal distribution; `seed` is ignored."""
    return torch.randn_like(x) * scale + mean


@operator("RandomUniformLike")
def random_uniform_like(x: Tensor, *, low: float = 0.0, high: float = 1.0, seed: float | None = None) -> Tensor:
    """Draw x's shape from a uniform distribution; `seed` is ignored."""
    return torch.rand_like(x) * (high - low) + low


def _window(size: Numbers, weights: Sequence[float], periodic: int, like: Tensor | None) -> Tensor:
    """Sum cosines of rising frequency over a window of `size` samples."""
    (count,) = size
    period = count if periodic else count - 1
    angle = torch.arange(count, device=_device(like), dtype=torch.float64) * 2 * torch.pi / period
    return torch.stack([weight * torch.cos(order * angle) for order, weight in enumerate(weights)]).sum(0)


_FLOAT = 1


@operator("HannWindow", host=(0,))
def hann_window(
    size: Numbers, *, output_datatype: int = _FLOAT, periodic: int = 1, like: Tensor | None = None
) -> Tensor:
    """Give the Hann window."""
    return _window(size, (0.5, -0.5), periodic, like).to(elem_dtype(output_datatype))


@operator("HammingWindow", host=(0,))
def hamming_window(
    size: Numbers, *, output_datatype: int = _FLOAT, periodic: int = 1, like: Tensor | None = None
) -> Tensor:
    """Give the Hamming window."""
    alpha = 25 / 46
    return _window(size, (alpha, alpha - 1), periodic, like).to(elem_dtype(output_datatype))


@operator("BlackmanWindow", host=(0,))
def blackman_window(
    size: Numbers, *, output_datatype: int = _FLOAT, periodic: int = 1, like: Tensor | None = None
) -> Tensor:
    """Give the Blackman window."""
    return _window(size, (0.42, -0.5, 0.08), periodic, like).to(elem_dtype(output_datatype))
