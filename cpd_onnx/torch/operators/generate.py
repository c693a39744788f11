"""Operators that create tensors from numbers, and conversions between numbers and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from cpd_onnx.torch.dtypes import elem_dtype
from cpd_onnx.torch.registry import operator

Numbers = Sequence[Any]


def _device(like: Tensor | None) -> torch.device:
    return torch.device("cpu") if like is None else like.device


def as_tensor(numbers: Numbers, shape: Sequence[int], *, dtype: torch.dtype, like: Tensor | None) -> Tensor:
    """Create a tensor from numbers computed by shape arithmetic."""
    return torch.tensor(numbers, dtype=dtype, device=_device(like)).reshape(tuple(shape))


def as_numbers(x: Tensor) -> Numbers:
    """Read a tensor's elements, in row-major order, as Python numbers; synchronizes with the device."""
    return tuple(x.reshape(-1).tolist())


@operator("ConstantOfShape", host=(0,))
def constant_of_shape(shape: Numbers, *, value: Tensor | None = None, like: Tensor | None = None) -> Tensor:
    """Fill a shape with one value, by default a float32 zero."""
    if value is None:
        return torch.zeros(tuple(shape), device=_device(like))
    return value.reshape(()).expand(tuple(shape)).clone()


@operator("Range", host=(0, 1, 2))
def arange(
    start: Numbers, limit: Numbers, delta: Numbers, *, input_type: torch.dtype, like: Tensor | None = None
) -> Tensor:
    """Count from start to before limit."""
    (first,), (last,), (step,) = start, limit, delta
    if (last - first) * step <= 0:
        return torch.empty(0, dtype=input_type, device=_device(like))
    return torch.arange(first, last, step, dtype=input_type, device=_device(like))


@operator("EyeLike")
def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """Return the matrix of x's shape with ones on diagonal k."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    columns = torch.arange(x.shape[1], device=x.device)
    return (columns - rows == k).to(x.dtype if dtype is None else elem_dtype(dtype))


class Random(TypedDict, total=False):
    """Attributes of the random generators; `seed` is ignored, torch's own generator is used."""

    dtype: int
    seed: float
    mean: float
    scale: float
    low: float
    high: float


def _random(x: Tensor, options: Random, *, normal: bool) -> Tensor:
    """Fill a tensor of x's shape, on its device, of the given type or that of x."""
    target = elem_dtype(options["dtype"]) if "dtype" in options else x.dtype
    if normal:
        values = torch.randn(x.shape, device=x.device) * options.get("scale", 1.0) + options.get("mean", 0.0)
    else:
        low, high = options.get("low", 0.0), options.get("high", 1.0)
        values = torch.rand(x.shape, device=x.device) * (high - low) + low
    return values.to(target)


@operator("RandomNormal")
def random_normal(*, shape: Sequence[int], like: Tensor | None = None, **options: Unpack[Random]) -> Tensor:
    """Draw from a normal distribution."""
    return _random(torch.empty(tuple(shape), device=_device(like)), options, normal=True)


@operator("RandomUniform")
def random_uniform(*, shape: Sequence[int], like: Tensor | None = None, **options: Unpack[Random]) -> Tensor:
    """Draw from a uniform distribution."""
    return _random(torch.empty(tuple(shape), device=_device(like)), options, normal=False)


@operator("RandomNormalLike")
def random_normal_like(x: Tensor, **options: Unpack[Random]) -> Tensor:
    """Draw x's shape from a normal distribution."""
    return _random(x, options, normal=True)


@operator("RandomUniformLike")
def random_uniform_like(x: Tensor, **options: Unpack[Random]) -> Tensor:
    """Draw x's shape from a uniform distribution."""
    return _random(x, options, normal=False)


@operator("Bernoulli")
def bernoulli(x: Tensor, *, dtype: int | None = None, seed: float | None = None) -> Tensor:
    """Draw ones with the given probabilities, and zeros otherwise; `seed` is ignored."""
    return torch.bernoulli(x).to(x.dtype if dtype is None else elem_dtype(dtype))


_INT32 = 6


@operator("Multinomial")
def multinomial(x: Tensor, *, dtype: int = _INT32, sample_size: int = 1, seed: float | None = None) -> Tensor:
    """Draw classes [N, sample_size] from the logarithms of their probabilities [N, C]; `seed` is ignored."""
    return torch.multinomial(x.softmax(1), sample_size, replacement=True).to(elem_dtype(dtype))


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
    """Return the Hann window."""
    return _window(size, (0.5, -0.5), periodic, like).to(elem_dtype(output_datatype))


@operator("HammingWindow", host=(0,))
def hamming_window(
    size: Numbers, *, output_datatype: int = _FLOAT, periodic: int = 1, like: Tensor | None = None
) -> Tensor:
    """Return the Hamming window."""
    alpha = 25 / 46
    return _window(size, (alpha, alpha - 1), periodic, like).to(elem_dtype(output_datatype))


@operator("BlackmanWindow", host=(0,))
def blackman_window(
    size: Numbers, *, output_datatype: int = _FLOAT, periodic: int = 1, like: Tensor | None = None
) -> Tensor:
    """Return the Blackman window."""
    return _window(size, (0.42, -0.5, 0.08), periodic, like).to(elem_dtype(output_datatype))
