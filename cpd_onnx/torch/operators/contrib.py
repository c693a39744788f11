"""Layers of onnxruntime's own domain: mixtures of experts, recurrences with a state, and a few functions.

Source: onnxruntime's `docs/ContribOperators.md`; shapes are named as there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from cpd_onnx.errors import UnsupportedError
from cpd_onnx.torch.operators.linear import TransposedWindow, conv_transpose
from cpd_onnx.torch.operators.sequences.attention import split_heads
from cpd_onnx.torch.registry import family, operator

_ORT = "com.microsoft"

family({"Inverse": torch.linalg.inv}, domain=_ORT)


@operator("UnfoldTensor", domain=_ORT)
def unfold(x: Tensor, *, size: int, dim: int = -1, step: int = 1) -> Tensor:
    """Cut windows out of an axis; their elements make a new last axis."""
    return x.unfold(dim, size, step)


@operator("ExpandDims", domain=_ORT, host=(1,))
def expand_dims(x: Tensor, axis: Sequence[int]) -> Tensor:
    """Insert an axis of size one."""
    return x.unsqueeze(int(axis[0]))


@operator("CDist", domain=_ORT)
def distances(a: Tensor, b: Tensor, *, metric: str = "sqeuclidean") -> Tensor:
    """Distances between the rows of two matrices."""
    if metric == "sqeuclidean":
        return (a[:, None] - b[None]).square().sum(-1)
    if metric != "euclidean":
        raise UnsupportedError(f"CDist with the metric {metric!r} is not supported")
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


@operator("ConvTransposeWithDynamicPads", domain=_ORT, host=(2,), weights=(1, 3))
def conv_transpose_with_pads(
    x: Tensor, weight: Tensor, padding: Sequence[int] | None = None, bias: Tensor | None = None, *, group: int = 1,
    **window: Unpack[TransposedWindow],
) -> Tensor:  # fmt: skip  # inputs, then options
    """Transposed convolution whose padding is an input."""
    if padding is not None:
        window["pads"] = [int(pad) for pad in padding]
    return conv_transpose(x, weight, bias, group=group, **window)


@operator("ScaledSiLU", domain=_ORT)
def scaled_silu(x: Tensor, scale: Tensor | None = None, *, alpha: float = 1.0) -> Tensor:
    """SiLU of x times a number."""
    return F.silu(x * (alpha if scale is None else scale.to(x.dtype)))


@operator("GatedAdd", domain=_ORT)
def gated_add(x: Tensor, y: Tensor, gate: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return x + y gate; the gate has one number for each row."""
    if weight is not None:
        raise UnsupportedError("GatedAdd with a projected gate is not supported")
    return x + y * gate


@operator("GatedRMSNorm", domain=_ORT, weights=(1,))
def gated_rms_norm(
    x: Tensor, scale: Tensor, gate: Tensor, *, activation: str = "silu", epsilon: float = 1e-5
) -> Tensor:
    """Root-mean-square normalisation of blocks of the last axis, times a gate."""
    blocks = x.reshape(*x.shape[:-1], -1, scale.shape[0])
    normed = blocks * torch.rsqrt(blocks.square().mean(-1, keepdim=True) + epsilon) * scale
    return normed.reshape(x.shape) * (torch.sigmoid(gate) if activation == "sigmoid" else F.silu(gate))


# Mixtures of experts.


class Mixture(TypedDict, total=False):
    """Attributes of MoE."""

    activation_alpha: float
    activation_beta: float
    activation_type: str
    k: int
    normalize_routing_weights: int
    swiglu_fusion: int
    swiglu_limit: float


def _swiglu(x: Tensor, options: Mapping[str, float]) -> Tensor:
    """Gate times value, which alternate on the last axis."""
    gate, value = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    limit = options.get("swiglu_limit", math.inf)
    gate, value = gate.clamp(max=limit), value.clamp(-limit, limit)
    gated = gate * torch.sigmoid(options.get("activation_alpha", 1.0) * gate)
    return gated * (value + options.get("activation_beta", 0.0))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda x: x,
}


@operator("MoE", domain=_ORT, weights=(2, 3, 4, 5))
def mixture(
    x: Tensor, router: Tensor, first: Tensor, bias: Tensor | None, second: Tensor, *more: Tensor | None,
    **options: Unpack[Mixture],
) -> Tensor:  # fmt: skip  # inputs, then options
    """Sum of the k experts with the largest numbers of the router, weighted by their softmax.

    Shapes: x [..., H], router [tokens, E], first [E, rows, H], second [E, H, inner]; `more` are a bias [E, H] and a
    third matrix, which is not supported.
    """
    kind, shift = options.get("activation_type", "relu"), more[0] if more else None
    if any(tensor is not None for tensor in more[1:]) or (kind == "swiglu" and options.get("swiglu_fusion", 0) != 1):
        raise UnsupportedError("MoE is supported with two matrices, in which gates and values alternate")
    tokens = x.reshape(-1, x.shape[-1])
    share, which = router.softmax(-1).topk(options.get("k", 1), -1)
    if options.get("normalize_routing_weights", 0):
        share = share / share.sum(-1, keepdim=True)
    result = torch.zeros_like(tokens)
    for expert in range(first.shape[0]):
        row, place = torch.where(which == expert)
        inner = F.linear(tokens[row], first[expert], None if bias is None else bias[expert])
        inner = _swiglu(inner, dict(options)) if kind == "swiglu" else _ACTIVATIONS[kind](inner)  # type: ignore[arg-type]
        out = F.linear(inner, second[expert], None if shift is None else shift[expert])
        result = result.index_add(0, row, out * share[row, place, None])
    return result.reshape(x.shape)


# Recurrences with a state.


class Causal(TypedDict, total=False):
    """Attributes of CausalConvWithState."""

    activation: str
    channels_last: int
    dilation: int
    ndim: int


@operator("CausalConvWithState", domain=_ORT, weights=(1, 2))
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, past: Tensor | None = None, **options: Unpack[Causal]
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution of x [N, C, T] (or [N, T, C]) to the past; second output: the last elements."""
    if options.get("ndim", 1) != 1:
        raise UnsupportedError("CausalConvWithState is supported along one axis")
    is_last, dilation = bool(options.get("channels_last", 0)), options.get("dilation", 1)
    y = x.movedim(-1, 1) if is_last else x
    length = (weight.shape[-1] - 1) * dilation
    before = y.new_zeros(*y.shape[:2], length) if past is None else past.movedim(-1, 1) if is_last else past
    whole = torch.cat([before, y], -1)
    result = F.conv1d(whole, weight, bias, dilation=dilation, groups=weight.shape[0])
    result = result if options.get("activation", "none") == "none" else F.silu(result)
    last = whole[..., whole.shape[-1] - length :]
    return (result.movedim(1, -1), last.movedim(1, -1)) if is_last else (result, last)


@operator("LinearAttentionGate", domain=_ORT, weights=(1, 2))
def linear_attention_gate(
    a: Tensor, bias: Tensor, scale: Tensor, b: Tensor | None = None, *, outputs: int
) -> list[Tensor]:
    """Decay and update rate of linear attention."""
    decay = scale * F.softplus(a + bias)
    return [decay] if b is None else [decay, torch.sigmoid(b)][:outputs]


class Linear(TypedDict, total=False):
    """Attributes of LinearAttention."""

    chunk_size: int
    kv_num_heads: int
    q_num_heads: int
    scale: float
    update_rule: str


@operator("LinearAttention", domain=_ORT)
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *more: Tensor | None, **options: Unpack[Linear]
) -> tuple[Tensor, Tensor]:
    """Attention of q [N, T, heads * K] by a state [N, groups, K, V], which each step updates with a key and a value.

    `more` are the state before, the logarithm of its decay, and the rate of updates. Second output: the state after.
    """
    past, decay, rate = (*more, None, None, None)[:3]
    heads, groups = options["q_num_heads"], options["kv_num_heads"]
    queries, keys, values = split_heads(q, heads), split_heads(k, groups), split_heads(v, groups)
    kept = None if decay is None else split_heads(decay, groups).exp()
    state = keys.new_zeros(*keys.shape[:2], keys.shape[-1], values.shape[-1]) if past is None else past
    steps = []
    for step in range(q.shape[1]):
        key, value = keys[:, :, step, :, None], values[:, :, step, None]
        state = state if kept is None else state * kept[:, :, step, :, None]
        if "delta" in options.get("update_rule", "gated_delta"):
            value = value - (state * key).sum(2, keepdim=True)
        value = value if rate is None else value * rate[:, step, :, None, None]
        state = state + key * value
        query = queries[:, :, step].reshape(len(q), groups, -1, queries.shape[-1])
        steps.append((query @ state).flatten(1))
    scale = options.get("scale") or 1 / math.sqrt(keys.shape[-1])
    return torch.stack(steps, 1) * scale, state
