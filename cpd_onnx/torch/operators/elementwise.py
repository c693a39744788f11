"""Operators that work element by element, with broadcasting."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cpd_onnx.torch.dtypes import elem_dtype
from cpd_onnx.torch.registry import family, operator, register

family(
    {
        "Abs": torch.abs,
        "Acos": torch.acos,
        "Acosh": torch.acosh,
        "Asin": torch.asin,
        "Asinh": torch.asinh,
        "Atan": torch.atan,
        "Atanh": torch.atanh,
        "Ceil": torch.ceil,
        "Cos": torch.cos,
        "Cosh": torch.cosh,
        "Det": torch.linalg.det,
        "Erf": torch.erf,
        "Exp": torch.exp,
        "Floor": torch.floor,
        "IsNaN": torch.isnan,
        "Log": torch.log,
        "Neg": torch.neg,
        "Not": torch.logical_not,
        "Reciprocal": torch.reciprocal,
        "Relu": torch.relu,
        "Round": torch.round,
        "Sigmoid": torch.sigmoid,
        "Sign": torch.sign,
        "Sin": torch.sin,
        "Sinh": torch.sinh,
        "Sqrt": torch.sqrt,
        "Tan": torch.tan,
        "Tanh": torch.tanh,
        "BitwiseNot": torch.bitwise_not,
        "Where": torch.where,
    }
)


@operator("Softplus")
def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact for large x too."""
    return torch.logaddexp(x, torch.zeros((), dtype=x.dtype, device=x.device))


@operator("Softsign")
def softsign(x: Tensor) -> Tensor:
    """x / (1 + |x|)."""
    return F.softsign(x)


@operator("Mish")
def mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x))."""
    return F.mish(x)


@operator("HardSwish")
def hard_swish(x: Tensor) -> Tensor:
    """x HardSigmoid(x), with slope 1/6."""
    return F.hardswish(x)


@operator("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x where positive, else alpha (exp(x) - 1)."""
    return F.elu(x, alpha)


@operator("Celu")
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x where positive, else alpha (exp(x / alpha) - 1)."""
    return F.celu(x, alpha)


@operator("Selu")
def selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    """Gamma times Elu."""
    return gamma * F.elu(x, alpha)


@operator("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """x where positive, else alpha x."""
    return F.leaky_relu(x, alpha)


@operator("ThresholdedRelu")
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x where above alpha, else zero."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


@operator("PRelu", weights=(1,))
def prelu(x: Tensor, slope: Tensor, *, opset: int) -> Tensor:
    """x where positive, else slope x; the slope broadcasts to x's shape, before opset 7 it has one value a channel."""
    if opset < 7 and slope.ndim == 1:
        slope = slope.reshape(-1, *[1] * (x.ndim - 2))
    return torch.where(x < 0, x * slope, x)


@operator("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """Clip alpha x + beta to 0..1."""
    return torch.clamp(alpha * x + beta, 0, 1)


@operator("Gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """x Φ(x), exactly or by tanh."""
    return F.gelu(x, approximate=approximate)


@operator("Swish")
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x sigmoid(alpha x)."""
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@operator("SwiGLU")
def swiglu(x: Tensor, gate: Tensor | None = None, *, alpha: float = 1.0) -> Tensor:
    """Swish of the gate times x."""
    return x if gate is None else swish(x, alpha=alpha) * gate


@operator("Shrink")
def shrink(x: Tensor, *, lambd: float = 0.5, bias: float = 0.0) -> Tensor:
    """Shrink values beyond ±lambd towards zero by bias, and set all others to zero."""
    zero = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero))


@operator("IsInf")
def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Return whether an element is infinite, of the given signs."""
    negative, positive = torch.isneginf(x), torch.isposinf(x)
    return (negative & bool(detect_negative)) | (positive & bool(detect_positive))


@operator("Clip", frozen=(1, 2))
def clip(
    x: Tensor,
    low: Tensor | None = None,
    high: Tensor | None = None,
    *,
    min: float | None = None,
    max: float | None = None,
) -> Tensor:
    """Limit x from below, then from above; bounds are inputs, or attributes before opset 11."""
    lower, upper = (min if low is None else low), (max if high is None else high)
    if lower is not None:
        x = torch.clamp(x, min=lower)
    if upper is not None:
        x = torch.clamp(x, max=upper)
    return x


@operator("Cast")
def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Convert to another type; floats are truncated to integers."""
    return x.to(elem_dtype(to))


@operator("CastLike")
def cast_like(x: Tensor, target: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Convert to the type of another tensor."""
    return x.to(target.dtype)


@operator("BitCast")
def bit_cast(x: Tensor, *, to: int) -> Tensor:
    """Read the bits as another type of the same size."""
    return x.view(elem_dtype(to))


def align(x: Tensor, y: Tensor, axis: int | None) -> Tensor:
    """Append axes to y so that its first axis aligns with `axis` of x: broadcasting before opset 7."""
    if axis is None or y.ndim == 0:
        return y
    axis = axis % x.ndim
    return y.reshape(*y.shape, *[1] * (x.ndim - axis - y.ndim))


def divide(x: Tensor, y: Tensor) -> Tensor:
    """x / y; integers towards zero."""
    return torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc")


def power(x: Tensor, y: Tensor) -> Tensor:
    """x to the power of y, in the type of x."""
    return torch.pow(x, y).to(x.dtype)


def _binary(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    def compute(x: Tensor, y: Tensor, *, axis: int | None = None, broadcast: int = 1) -> Tensor:
        return function(x, align(x, y, axis))

    compute.__name__ = compute.__qualname__ = name.lower()
    register(name, compute)


_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": divide,
    "Pow": power,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
}
for _name, _function in _BINARY.items():
    _binary(_name, _function)


@operator("Mod")
def mod(x: Tensor, y: Tensor, *, fmod: int = 0) -> Tensor:
    """Remainder with the sign of the divisor, or of the dividend for fmod."""
    return torch.fmod(x, y) if fmod else torch.remainder(x, y)


@operator("BitShift")
def bit_shift(x: Tensor, y: Tensor, *, direction: str) -> Tensor:
    """Shift left or right; through int64, because torch does not shift all unsigned types."""
    shift = torch.bitwise_left_shift if direction == "LEFT" else torch.bitwise_right_shift
    return shift(x.to(torch.int64), y.to(torch.int64)).to(x.dtype)


@operator("Sum")
def sum_of(*inputs: Tensor) -> Tensor:
    """Add all inputs."""
    return functools.reduce(torch.add, inputs)


@operator("Mean")
def mean_of(*inputs: Tensor) -> Tensor:
    """Average all inputs."""
    return sum_of(*inputs) / len(inputs)


@operator("Max")
def max_of(*inputs: Tensor) -> Tensor:
    """Take the largest of all inputs."""
    return functools.reduce(torch.maximum, inputs)


@operator("Min")
def min_of(*inputs: Tensor) -> Tensor:
    """Take the smallest of all inputs."""
    return functools.reduce(torch.minimum, inputs)
