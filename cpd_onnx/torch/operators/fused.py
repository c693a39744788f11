"""Fused operators by which onnxruntime's graph optimiser replaces several standard ones, in its own domain.

Source: onnxruntime's `docs/ContribOperators.md`; shapes are named as there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from cpd_onnx.torch.operators.linear import conv, gemm
from cpd_onnx.torch.operators.norm import rms_normalization
from cpd_onnx.torch.operators.sequences.attention import merge_heads, rotate, split_heads
from cpd_onnx.torch.registry import family, operator

_ORT = "com.microsoft"

# Activations.

family({"Gelu": F.gelu}, domain=_ORT)


@operator("QuickGelu", domain=_ORT)
def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    """x sigmoid(alpha x)."""
    return x * torch.sigmoid(alpha * x)


@operator("FastGelu", domain=_ORT)
def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gelu by tanh, of x + bias."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator("BiasGelu", domain=_ORT)
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Gelu of x + bias."""
    return F.gelu(x + bias)


# Products.


class FusedActivation(TypedDict, total=False):
    """Attributes of FusedConv: those of Conv, and the activation after it."""

    activation: str
    activation_params: Sequence[float]
    auto_pad: str
    dilations: Sequence[int]
    group: int
    kernel_shape: Sequence[int]
    pads: Sequence[int]
    strides: Sequence[int]


_ACTIVATIONS: dict[str, Any] = {
    "": lambda x: x,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "LeakyRelu": F.leaky_relu,
    "Clip": torch.clamp,
    "HardSigmoid": lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0, 1),
}


def _without_activation(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of an operator with a fused activation."""
    return {key: value for key, value in attributes.items() if not key.startswith("activation")}


def _activated(x: Tensor, name: str, parameters: Sequence[float]) -> Tensor:
    result: Tensor = _ACTIVATIONS[name](x, *parameters)
    return result


@operator("FusedConv", domain=_ORT, weights=(1, 2))
def fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    **attributes: Unpack[FusedActivation],
) -> Tensor:
    """Convolve, add a residual, activate."""
    result = conv(x, weight, bias, **_without_activation(attributes))
    result = result if residual is None else result + residual
    return _activated(result, attributes.get("activation", ""), attributes.get("activation_params", ()))


class FusedGemm(TypedDict, total=False):
    """Attributes of FusedGemm: those of Gemm, and the activation after it."""

    activation: str
    activation_alpha: float
    activation_beta: float
    alpha: float
    beta: float
    transA: int
    transB: int


@operator("FusedGemm", domain=_ORT, weights=(1, 2))
def fused_gemm(a: Tensor, b: Tensor, c: Tensor | None = None, **attributes: Unpack[FusedGemm]) -> Tensor:
    """Gemm and an activation, with its parameters if they are given."""
    result = gemm(a, b, c, **_without_activation(attributes))
    keys = ("activation_alpha", "activation_beta")
    parameters = [attributes[key] for key in keys if key in attributes]  # type: ignore[literal-required]  # two of them
    return _activated(result, attributes.get("activation", ""), parameters)


class Transposed(TypedDict, total=False):
    """Attributes of FusedMatMul."""

    alpha: float
    transA: int
    transB: int
    transBatchA: int
    transBatchB: int


@operator("FusedMatMul", "TransposeMatMul", domain=_ORT)
def fused_matmul(a: Tensor, b: Tensor, **options: Unpack[Transposed]) -> Tensor:
    """Multiply alpha A B, with the last two axes swapped, or the first moved before the last, on request."""
    a = a.movedim(0, -2) if options.get("transBatchA") else a
    b = b.movedim(0, -2) if options.get("transBatchB") else b
    a, b = a.mT if options.get("transA") else a, b.mT if options.get("transB") else b
    return options.get("alpha", 1.0) * torch.matmul(a, b)


# Normalisations.


@operator("SkipLayerNormalization", domain=_ORT, weights=(2, 3, 4))
def skip_layer_normalization(
    x: Tensor, skip: Tensor, *affine: Tensor | None, outputs: int, epsilon: float = 1e-12
) -> list[Tensor | None]:
    """Layer normalisation of x + skip (+ bias), which is the fourth output."""
    scale, shift, bias = (*affine, None, None)[:3]
    total = x + skip if bias is None else x + skip + bias
    return [F.layer_norm(total, total.shape[-1:], scale, shift, epsilon), None, None, total][:outputs]


@operator("SkipSimplifiedLayerNormalization", domain=_ORT, weights=(2, 3))
def skip_rms_normalization(
    x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None, *, outputs: int, epsilon: float = 1e-12
) -> list[Tensor | None]:
    """Root-mean-square normalisation of x + skip (+ bias), which is the fourth output."""
    total = x + skip if bias is None else x + skip + bias
    return [rms_normalization(total, scale, epsilon=epsilon), None, None, total][:outputs]


class GroupNorm(TypedDict, total=False):
    """Attributes of GroupNorm."""

    activation: int
    channels_last: int
    epsilon: float
    groups: int


@operator("GroupNorm", domain=_ORT, weights=(1, 2))
def group_norm(x: Tensor, gamma: Tensor, beta: Tensor, **attributes: Unpack[GroupNorm]) -> Tensor:
    """Group normalisation of x [N, H, W, C] (or [N, C, H, W]), followed by SiLU if `activation` is 1."""
    last = attributes.get("channels_last", 1)
    y = x.movedim(-1, 1) if last else x
    scale, shift = gamma.to(x.dtype), beta.to(x.dtype)
    y = F.group_norm(y, attributes["groups"], scale, shift, attributes.get("epsilon", 1e-5))
    y = F.silu(y) if attributes.get("activation") else y
    return y.movedim(1, -1) if last else y


@operator("EmbedLayerNormalization", domain=_ORT, weights=(2, 3, 4, 5, 6))
def embed_layer_normalization(
    ids: Tensor, segments: Tensor | None, *more: Tensor | None, epsilon: float = 1e-12, mask_index_type: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the embeddings of words [N, T], positions and segments, and normalise; count the words that are not masked.

    `more` are the three tables, scale and shift, the mask and the positions. Third output: the sum.
    """
    words, places, kinds, gamma, beta, mask, positions = (*more, None, None)[:7]
    assert words is not None
    assert places is not None
    where = torch.arange(ids.shape[1], device=ids.device)[None] if positions is None else positions.long()
    total = F.embedding(ids.long(), words) + F.embedding(where, places)
    if kinds is not None and segments is not None:
        total = total + F.embedding(segments.long(), kinds)
    count = torch.zeros(ids.shape[0], dtype=torch.int32, device=ids.device)
    if mask is not None:
        count = (mask == 1).sum(1).to(torch.int32)
    return F.layer_norm(total, total.shape[-1:], gamma, beta, epsilon), count, total


# Attention.


def _attended(
    qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, more: Tensor | None, options: Mapping[str, Any]
) -> Tensor:
    """Weighted values [N, heads, T, size]; `mask` selects keys, `more` is added to the scores."""
    q, k, v = qkv
    causal = bool(options.get("unidirectional", 0))
    scale = options.get("scale") or 1 / math.sqrt(q.shape[3])
    biases = [] if more is None else [more]
    if mask is not None:
        biases.append(_hidden(~mask, options.get("mask_filter_value", -10000.0), q))
    if causal and (biases or q.shape[2] != k.shape[2]):
        rows = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[:, None]
        biases.append(_hidden(torch.arange(k.shape[2], device=q.device) > rows, _lowest(q), q))
        causal = False
    bias = functools.reduce(torch.add, biases) if biases else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)


def _hidden(where: Tensor, value: float, like: Tensor) -> Tensor:
    """Return the addend of scores: a value at some positions, zero at the others."""
    return torch.zeros(where.shape, dtype=like.dtype, device=like.device).masked_fill(where, value)


def _lowest(x: Tensor) -> float:
    return torch.finfo(x.dtype).min / 2  # leaves room for other addends


def _key_mask(mask: Tensor | None, keys: int) -> Tensor | None:
    """Return the mask of keys, broadcastable to [N, heads, T, S], from any of the shapes that onnxruntime accepts.

    [N]: the lengths; [2 N]: ends, then starts; [N, S]: one per key; [N, T, S]: one per query and key.
    """
    if mask is None:
        return None
    if mask.ndim == 1:
        places = torch.arange(keys, device=mask.device)
        return (places < mask[:, None])[:, None, None]
    return (mask > 0)[:, None] if mask.ndim == 3 else (mask > 0)[:, None, None]


class Attention(TypedDict, total=False):
    """Attributes of Attention."""

    num_heads: int
    mask_filter_value: float
    qkv_hidden_sizes: Sequence[int]
    scale: float
    unidirectional: int


@operator("Attention", domain=_ORT, weights=(1, 2))
def attention(
    x: Tensor, weights: Tensor, bias: Tensor | None = None, *more: Tensor | None, outputs: int,
    **options: Unpack[Attention],
) -> list[Tensor]:  # fmt: skip  # inputs, then options
    """Self-attention of x [N, T, C], projected by weights [C, Q + K + V]; `more` are mask, past and a bias.

    Second output: keys and values, [2, N, heads, S, size].
    """
    mask, past, scores = (*more, None, None, None)[:3]
    heads = options["num_heads"]
    sizes = list(options.get("qkv_hidden_sizes") or [weights.shape[1] // 3] * 3)
    projected = x @ weights if bias is None else x @ weights + bias
    q, k, v = (split_heads(part, heads) for part in torch.split(projected, sizes, -1))
    if past is not None:
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    result = merge_heads(_attended((q, k, v), _key_mask(mask, k.shape[2]), scores, dict(options)))
    return [result, torch.stack([k, v])][:outputs] if outputs > 1 else [result]


class MultiHead(TypedDict, total=False):
    """Attributes of MultiHeadAttention."""

    num_heads: int
    scale: float
    unidirectional: int
    mask_filter_value: float


@operator("MultiHeadAttention", domain=_ORT, weights=(3,))
def multi_head_attention(
    q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *more: Tensor | None, outputs: int,
    **options: Unpack[MultiHead],
) -> list[Tensor]:  # fmt: skip  # inputs, then options
    """Attention of q [N, T, heads * size], k and v, or of all packed [N, T, heads, 3, size]; second and third: k, v.

    `more` are a bias to q, k and v, the mask of keys, a bias to the scores, and past keys and values.
    """
    bias, mask, scores, past_k, past_v = (*more, *[None] * 5)[:5]
    heads = options["num_heads"]
    if k is None:
        q, k, v = (part.flatten(2) for part in q.unbind(3))
    elif v is None:
        k, v = (part.flatten(2) for part in k.unbind(3))
    if bias is not None:
        values = bias.shape[0] - 2 * q.shape[2]
        b_q, b_k, b_v = torch.split(bias, [q.shape[2], q.shape[2], values])
        q = q + b_q
        k, v = (k + b_k, v + b_v) if k.ndim == 3 else (k, v)
    # Keys and values of another sequence may come split into heads already.
    q = split_heads(q, heads)
    k, v = (split_heads(part, heads) if part.ndim == 3 else part for part in (k, v))
    if past_k is not None and past_v is not None:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    result = merge_heads(_attended((q, k, v), _key_mask(mask, k.shape[2]), scores, dict(options)))
    return [result, k, v][:outputs]


class GroupedQuery(TypedDict, total=False):
    """Attributes of GroupQueryAttention."""

    do_rotary: int
    kv_num_heads: int
    local_window_size: int
    num_heads: int
    rotary_interleaved: int
    scale: float
    softcap: float


@operator("GroupQueryAttention", domain=_ORT)
def group_query_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, *more: Tensor | None, outputs: int, **options: Unpack[GroupedQuery]
) -> list[Tensor]:
    """Causal attention of q [N, T, heads * size] to fewer heads of keys and values, which follow those of the past.

    q may hold keys and values too. `more` are past keys and values, all valid, the positions of the last keys
    [N], the length of all, tables of cosines and sines for the rotation, positions, and a bias to the scores.
    """
    past_k, past_v, lasts, _, cosines, sines, positions, scores = (*more, *[None] * 8)[:8]
    heads, groups = options["num_heads"], options["kv_num_heads"]
    if k is None or v is None:
        size = q.shape[2] // (heads + 2 * groups)
        q, k, v = torch.split(q, [heads * size, groups * size, groups * size], -1)
    q, k, v = split_heads(q, heads), split_heads(k, groups), split_heads(v, groups)
    past = 0 if past_k is None else past_k.shape[2]
    if options.get("do_rotary") and cosines is not None and sines is not None:
        where = (
            positions.long() if positions is not None else torch.arange(past, past + q.shape[2], device=q.device)[None]
        )
        angles, interleaved = (
            (cosines[where].unsqueeze(1), sines[where].unsqueeze(1)),
            options.get("rotary_interleaved", 0),
        )
        q, k = (rotate(part, angles, bool(interleaved)) for part in (q, k))
    if past_k is not None and past_v is not None:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    rows = torch.arange(past, past + q.shape[2], device=q.device)[:, None]
    columns = torch.arange(k.shape[2], device=q.device)
    seen = columns <= rows
    if options.get("local_window_size", -1) > 0:
        seen = seen & (columns > rows - options["local_window_size"])
    if lasts is not None:
        seen = seen & (columns <= lasts.reshape(-1, 1, 1, 1))
    wide = [part.repeat_interleave(heads // groups, 1) for part in (k, v)]
    raw = (q @ wide[0].mT) * (options.get("scale") or 1 / math.sqrt(q.shape[3]))
    cap = options.get("softcap", 0.0)
    raw = cap * torch.tanh(raw / cap) if cap else raw
    raw = raw if scores is None else raw + scores
    weights = raw.masked_fill(~seen, _lowest(raw)).softmax(-1)
    return [merge_heads(weights @ wide[1]), k, v][:outputs]


class Rotary(TypedDict, total=False):
    """Attributes of RotaryEmbedding."""

    interleaved: int
    num_heads: int
    rotary_embedding_dim: int
    scale: float


@operator("RotaryEmbedding", domain=_ORT)
def rotary_embedding(x: Tensor, positions: Tensor, cosines: Tensor, sines: Tensor, **options: Unpack[Rotary]) -> Tensor:
    """Rotate pairs of features of x, [N, heads, T, size] or [N, T, heads * size].

    Positions are [N, T], or the first one alone.
    """
    packed = x.ndim == 3
    heads = options.get("num_heads") or x.shape[-1] // (2 * cosines.shape[1])
    y = split_heads(x, heads) if packed else x
    where = positions.long()
    if positions.numel() == 1 and positions.ndim == 1:
        where = where + torch.arange(y.shape[2], device=x.device)[None]
    angles = cosines[where].unsqueeze(1), sines[where].unsqueeze(1)
    result = rotate(y, angles, bool(options.get("interleaved", 0)))
    return merge_heads(result) if packed else result
