"""Normalisations and softmax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from cpd_onnx.torch.dtypes import elem_dtype
from cpd_onnx.torch.registry import operator, register

_FLOAT = 1


_HALF = (torch.float16, torch.bfloat16)


class BatchNorm(nn.Module):
    """Trainable BatchNormalization: batch statistics in training mode, with running averages that are used otherwise.

    The tensors belong to the module that calls this one; the statistics are updated in place.
    """

    def __init__(self, attributes: Mapping[str, Any]) -> None:
        """Take the node's attributes; ONNX's momentum is the weight of the old statistics."""
        super().__init__()
        self.epsilon = float(attributes.get("epsilon", 1e-5))
        self.momentum = 1.0 - float(attributes.get("momentum", 0.9))

    def forward(self, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Normalise x [N, C, ...] with vectors of length C."""
        return F.batch_norm(x, mean, var, scale, bias, self.training, self.momentum, self.epsilon)


class BatchNormAttributes(TypedDict, total=False):
    """Attributes of BatchNormalization, including those of its old versions."""

    epsilon: float
    momentum: float
    training_mode: int
    spatial: int
    is_test: int


@operator("BatchNormalization", weights=(1, 2), frozen=(3, 4), live=BatchNorm)
def batch_normalization(
    x: Tensor, *vectors: Tensor, outputs: int, **attributes: Unpack[BatchNormAttributes]
) -> list[Tensor]:
    """Normalise x [N, C, ...] with scale, bias, mean and variance [C] as stored, or as measured in training mode."""
    scale, bias, mean, var = vectors
    epsilon, momentum = attributes.get("epsilon", 1e-5), attributes.get("momentum", 0.9)
    if not attributes.get("training_mode"):
        return [_normalised(x, (mean, var), (scale, bias), epsilon)]
    axes = [axis for axis in range(x.ndim) if axis != 1]
    batch_var, batch_mean = torch.var_mean(x, axes, correction=0)
    result = F.batch_norm(x, None, None, scale.to(x.dtype), bias.to(x.dtype), True, 0.0, epsilon)
    running = [old * momentum + new * (1 - momentum) for old, new in ((mean, batch_mean), (var, batch_var))]
    return [result, *running][:outputs]


def _normalised(x: Tensor, moments: tuple[Tensor, Tensor], affine: tuple[Tensor, Tensor], epsilon: float) -> Tensor:
    """Apply per-channel moments and an affine map; with torch's fused kernel if all types agree."""
    (mean, var), (scale, bias) = moments, affine
    widened = x.dtype in _HALF and mean.dtype == torch.float32
    is_computed = mean.requires_grad or var.requires_grad  # torch has no gradient for statistics
    if mean.dtype == scale.dtype and (mean.dtype == x.dtype or widened) and not is_computed:
        return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)
    gain = scale / torch.sqrt(var + epsilon)
    shape = (-1, *[1] * (x.ndim - 2))
    return (x * gain.reshape(shape) + (bias - mean * gain).reshape(shape)).to(x.dtype)


@operator("InstanceNormalization", weights=(1, 2))
def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Normalise each channel of each sample of x [N, C, ...] over its spatial axes."""
    axes = list(range(2, x.ndim))
    shape = (-1, *[1] * (x.ndim - 2))
    var, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + epsilon) * scale.reshape(shape) + bias.reshape(shape)


class GroupNorm(TypedDict, total=False):
    """Attributes of GroupNormalization."""

    num_groups: int
    epsilon: float
    stash_type: int


@operator("GroupNormalization", weights=(1, 2))
def group_normalization(x: Tensor, scale: Tensor, bias: Tensor, **attributes: Unpack[GroupNorm]) -> Tensor:
    """Normalise groups of channels of x [N, C, ...]; scale and bias have one element a group before opset 21."""
    groups, channels = attributes["num_groups"], x.shape[1]
    if scale.shape[0] != channels:
        scale, bias = (vector.repeat_interleave(channels // groups) for vector in (scale, bias))
    stash = elem_dtype(attributes.get("stash_type", _FLOAT)) if x.dtype in _HALF else x.dtype
    normal = F.group_norm(x.to(stash), groups, eps=attributes.get("epsilon", 1e-5)).to(x.dtype)
    shape = (-1, *[1] * (x.ndim - 2))
    return normal * scale.reshape(shape) + bias.reshape(shape)


def _stash(x: Tensor, stash_type: int) -> Tensor:
    """Return x in the type of the statistics; a wider type is kept."""
    return x.to(elem_dtype(stash_type)) if x.dtype in _HALF else x


class LayerNorm(TypedDict, total=False):
    """Attributes of LayerNormalization and RMSNormalization."""

    axis: int
    epsilon: float
    stash_type: int


@operator("LayerNormalization", weights=(1, 2))
def layer_normalization(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, outputs: int, **attributes: Unpack[LayerNorm]
) -> list[Tensor]:
    """Normalise over the axes from `axis` on; optionally also return mean and inverse standard deviation."""
    axis, epsilon = attributes.get("axis", -1) % x.ndim, attributes.get("epsilon", 1e-5)
    shape = x.shape[axis:]
    simple = scale.shape == shape and (bias is None or bias.shape == shape) and x.dtype == scale.dtype
    if outputs == 1 and simple and x.dtype not in _HALF:
        return [F.layer_norm(x, shape, scale, bias, epsilon)]
    stashed = _stash(x, attributes.get("stash_type", _FLOAT))
    var, mean = torch.var_mean(stashed, list(range(axis, x.ndim)), correction=0, keepdim=True)
    inverse = torch.rsqrt(var + epsilon)
    result = ((stashed - mean) * inverse).to(x.dtype) * scale
    return [result if bias is None else result + bias, mean, inverse][:outputs]


@operator("RMSNormalization", weights=(1,))
def rms_normalization(x: Tensor, scale: Tensor, **attributes: Unpack[LayerNorm]) -> Tensor:
    """Divide by the root mean square over the axes from `axis` on."""
    axis = attributes.get("axis", -1) % x.ndim
    stashed = _stash(x, attributes.get("stash_type", _FLOAT))
    square = (stashed * stashed).mean(list(range(axis, x.ndim)), keepdim=True)
    return (stashed * torch.rsqrt(square + attributes.get("epsilon", 1e-5))).to(x.dtype) * scale


register("SimplifiedLayerNormalization", rms_normalization, weights=(1,))


@operator("MeanVarianceNormalization")
def mean_variance_normalization(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    """Standardize to zero mean and unit variance over these axes."""
    var, mean = torch.var_mean(x, list(axes), correction=0, keepdim=True)
    return (x - mean) / (var.sqrt() + 1e-9)


@operator("LpNormalization")
def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """Divide by the p-norm along an axis; zero where that is zero."""
    norm = x.abs().pow(p).sum(axis, keepdim=True).pow(1 / p)
    return torch.where(norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, torch.ones_like(norm), norm))


class LocalResponse(TypedDict, total=False):
    """Attributes of LRN."""

    alpha: float
    beta: float
    bias: float


@operator("LRN")
def local_response_normalization(x: Tensor, *, size: int, **attributes: Unpack[LocalResponse]) -> Tensor:
    """Divide by a power of the sum of squares over neighbouring channels."""
    channels = x.shape[1]
    before = (size - 1) // 2
    square = F.pad(x * x, [0, 0] * (x.ndim - 2) + [before, size - 1 - before])
    total = torch.stack([square.narrow(1, start, channels) for start in range(size)]).sum(0)
    scale = attributes.get("bias", 1.0) + attributes.get("alpha", 1e-4) / size * total
    return x / scale.pow(attributes.get("beta", 0.75))


def _from_axis(x: Tensor, axis: int | None, opset: int) -> tuple[Tensor, int]:
    """Return x and the axis to normalise; before opset 13, all axes from it on are flattened into one."""
    if opset >= 13:
        return x, -1 if axis is None else axis
    return x.flatten(1 if axis is None else axis % x.ndim), -1


@operator("Softmax")
def softmax(x: Tensor, *, opset: int, masked: bool, axis: int | None = None) -> Tensor:
    """Softmax along an axis.

    Where all elements are masked by minus infinity the result is NaN, as in the standard, which graphs then replace;
    the gradient there is zero.
    """
    flat, dim = _from_axis(x, axis, opset)
    if not masked or not flat.requires_grad:
        return flat.softmax(dim).reshape(x.shape)
    blind = torch.isneginf(flat.amax(dim, keepdim=True))
    return flat.masked_fill(blind, 0.0).softmax(dim).masked_fill(blind, torch.nan).reshape(x.shape)


@operator("LogSoftmax")
def log_softmax(x: Tensor, *, opset: int, axis: int | None = None) -> Tensor:
    """Logarithm of softmax."""
    flat, dim = _from_axis(x, axis, opset)
    return flat.log_softmax(dim).reshape(x.shape)
