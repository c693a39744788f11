"""Fourier transforms and mel filters."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from cpd_onnx.torch.dtypes import elem_dtype
from cpd_onnx.torch.operators.generate import Numbers
from cpd_onnx.torch.registry import operator


class Fourier(TypedDict, total=False):
    """Attributes of DFT; the axis is an input from opset 20 on."""

    axis: int
    inverse: int
    onesided: int


def _complex(x: Tensor) -> Tensor:
    """Return the last axis of x, one or two elements, as a complex number."""
    return torch.complex(x[..., 0], torch.zeros_like(x[..., 0]) if x.shape[-1] == 1 else x[..., 1])


@operator("DFT", host=(1, 2))
def dft(
    x: Tensor, length: Numbers | None = None, where: Numbers | None = None, *, opset: int, **options: Unpack[Fourier]
) -> Tensor:
    """Discrete Fourier transform along an axis of x [..., 1 or 2]; the last axis holds real and imaginary part."""
    axis = int(where[0]) if where else options.get("axis", 1 if opset < 20 else -2)
    axis, size = axis % x.ndim, int(length[0]) if length else None
    signal, onesided = _complex(x), bool(options.get("onesided"))
    if options.get("inverse"):
        if onesided:
            real: Tensor = torch.fft.irfft(signal, size, axis)
            return real.unsqueeze(-1)
        return torch.view_as_real(torch.fft.ifft(signal, size, axis))
    spectrum = torch.fft.fft(signal, size, axis)
    return torch.view_as_real(spectrum.narrow(axis, 0, spectrum.shape[axis] // 2 + 1) if onesided else spectrum)


@operator("STFT", host=(1, 3))
def stft(
    x: Tensor, step: Numbers, window: Tensor | None = None, length: Numbers | None = None, *, onesided: int = 1
) -> Tensor:
    """Fourier transforms of windows of x [N, T, 1 or 2], `step` samples apart: [N, frames, frequencies, 2]."""
    size = int(length[0]) if length else x.shape[1] if window is None else window.shape[0]
    frames = _complex(x).unfold(1, size, int(step[0]))
    spectrum = torch.fft.fft(frames if window is None else frames * window)
    return torch.view_as_real(spectrum[..., : size // 2 + 1] if onesided else spectrum)


@operator("MelWeightMatrix", host=(0, 1, 2, 3, 4))
def mel_weight_matrix(*inputs: Numbers, like: Tensor | None = None, output_datatype: int = 1) -> Tensor:
    """Triangular filters [frequencies, mel bins]; inputs are bins, transform length, sample rate and the two edges."""
    bins, length, rate, lower, upper = (entry[0] for entry in inputs)
    low, high = (2595 * math.log10(1 + edge / 700) for edge in (lower, upper))
    mel = [low + place * (high - low) / (bins + 2) for place in range(bins + 2)]
    points = [int((length + 1) * (700 * (10 ** (value / 2595) - 1)) // rate) for value in mel]
    result = torch.zeros(length // 2 + 1, bins)
    for column in range(bins):
        left, centre, right = points[column : column + 3]
        if centre == left:
            result[centre, column] = 1
        for row in range(left, centre + 1):
            result[row, column] = (row - left) / (centre - left) if centre > left else 1
        for row in range(centre, right):
            result[row, column] = (right - row) / (right - centre)
    return result.to(elem_dtype(output_datatype)).to("cpu" if like is None else like.device)
