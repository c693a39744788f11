"""Contractions: convolutions and matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from cpd_onnx.torch.registry import operator


class Window(TypedDict, total=False):
    """Attributes of an operator that slides a window over the spatial axes."""

    auto_pad: str
    dilations: Sequence[int]
    kernel_shape: Sequence[int]
    pads: Sequence[int]
    strides: Sequence[int]


def window_steps(rank: int, window: Window) -> tuple[list[int], list[int]]:
    """Strides and dilations over `rank` spatial axes."""
    return list(window.get("strides") or [1] * rank), list(window.get("dilations") or [1] * rank)


def window_pads(sizes: Sequence[int], kernel: Sequence[int], window: Window) -> list[tuple[int, int]]:
    """Padding before and after each spatial axis of these sizes."""
    rank, mode = len(sizes), window.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        pads = list(window.get("pads") or [0] * (2 * rank))
        return list(zip(pads[:rank], pads[rank:], strict=True))
    if mode == "VALID":
        return [(0, 0)] * rank
    strides, dilations = window_steps(rank, window)
    totals = [
        max((-(-size // stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    return [split_padding(total, mode) for total in totals]


def split_padding(total: int, mode: str) -> tuple[int, int]:
    """Split padding between the two ends; the mode determines the end with the larger half.

    >>> split_padding(3, "SAME_UPPER"), split_padding(3, "SAME_LOWER")
    ((1, 2), (2, 1))
    """
    half = total // 2
    return (half, total - half) if mode == "SAME_UPPER" else (total - half, half)


def pad_spatial(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Pad the last axes of x; negative padding crops."""
    flat = [amount for pair in reversed(pads) for amount in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def symmetric(pads: Sequence[tuple[int, int]]) -> list[int] | None:
    """Return padding that is symmetric, as torch's functions require; None if it is not."""
    return [before for before, _ in pads] if all(before == after for before, after in pads) else None


_CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@operator("Conv", weights=(1, 2))
def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, group: int = 1, **window: Unpack[Window]) -> Tensor:
    """Convolve x [N, C, ...] with weight [O, C / group, ...]."""
    rank = x.ndim - 2
    strides, dilations = window_steps(rank, window)
    pads = window_pads(x.shape[2:], weight.shape[2:], window)
    padding = symmetric(pads)
    if padding is None:
        x, padding = pad_spatial(x, pads), [0] * rank
    result: Tensor = _CONV[rank](x, weight, bias, strides, padding, dilations, group)
    return result


class TransposedWindow(Window, total=False):
    """Attributes of a transposed convolution."""

    output_padding: Sequence[int]
    output_shape: Sequence[int]


@operator("ConvTranspose", weights=(1, 2))
def conv_transpose(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, group: int = 1, **window: Unpack[TransposedWindow]
) -> Tensor:
    """Convolve x [N, C, ...] with weight [C, O / group, ...], transposed."""
    rank = x.ndim - 2
    strides, dilations = window_steps(rank, window)
    extra = list(window.get("output_padding") or [0] * rank)
    pads = _transposed_pads(x.shape[2:], weight.shape[2:], window)
    padding, function = symmetric(pads), _CONV_TRANSPOSE[rank]
    simple = padding is not None and all(
        more < max(stride, dilation) for more, stride, dilation in zip(extra, strides, dilations, strict=True)
    )
    if simple:
        result: Tensor = function(x, weight, bias, strides, padding, extra, group, dilations)
        return result
    whole = function(x, weight, None, strides, 0, 0, group, dilations)
    cropped = pad_spatial(whole, [(-before, more - after) for (before, after), more in zip(pads, extra, strict=True)])
    return cropped if bias is None else cropped + bias.reshape(-1, *[1] * rank)


def _transposed_pads(sizes: Sequence[int], kernel: Sequence[int], window: TransposedWindow) -> list[tuple[int, int]]:
    """Return what a transposed convolution crops at both ends of each axis."""
    rank, mode = len(sizes), window.get("auto_pad", "NOTSET")
    strides, dilations = window_steps(rank, window)
    shape, extra = window.get("output_shape"), window.get("output_padding") or [0] * rank
    if shape is None and mode in ("NOTSET", "", "VALID"):
        return window_pads(sizes, kernel, window)
    wanted = list(shape[-rank:]) if shape else [size * stride for size, stride in zip(sizes, strides, strict=True)]
    totals = [
        stride * (size - 1) + more + (width - 1) * dilation + 1 - want
        for stride, size, more, width, dilation, want in zip(
            strides, sizes, extra, kernel, dilations, wanted, strict=True
        )
    ]
    return [split_padding(total, "SAME_UPPER" if mode == "SAME_UPPER" else "SAME_LOWER") for total in totals]


@operator("MatMul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices, as numpy's matmul does."""
    return torch.matmul(a, b)


class Gemm(TypedDict, total=False):
    """Attributes of Gemm for transposition, and the broadcasting attribute of its old versions."""

    transA: int
    transB: int
    broadcast: int


@operator("Gemm", weights=(1, 2))
def gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, **transposed: Unpack[Gemm]
) -> Tensor:
    """alpha A B + beta C, with A and B transposed on request."""
    if transposed.get("transA"):
        a = a.T
    if transposed.get("transB") and alpha == beta == 1.0 and c is not None and c.shape == b.shape[:1]:
        return F.linear(a, b, c)
    product = a @ (b.T if transposed.get("transB") else b)
    if alpha != 1.0:
        product = alpha * product
    if c is None or beta == 0.0:
        return product
    return product + (c if beta == 1.0 else beta * c)


@operator("Einsum")
def einsum(*inputs: Tensor, equation: str) -> Tensor:
    """Sum products of the inputs, in Einstein's notation."""
    result: Tensor = torch.einsum(equation.replace(" ", ""), *inputs)
    return result


@operator("CausalConvWithState", weights=(1, 2))
def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    past: Tensor | None = None,
    *,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """Convolve x [N, C, T], preceded by the state, depthwise; the last inputs are the next state."""
    reach = weight.shape[2] - 1
    before = x.new_zeros(x.shape[0], x.shape[1], reach) if past is None else past
    padded = torch.cat([before, x], 2)
    result = F.conv1d(padded, weight, bias, groups=x.shape[1])
    if activation != "none":
        result = F.silu(result.float()).to(x.dtype)
    return result, padded[:, :, padded.shape[2] - reach :]
