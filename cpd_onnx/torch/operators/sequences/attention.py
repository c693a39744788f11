"""Attention operators."""

from __future__ import annotations

import functools
import math
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from cpd_onnx.torch.dtypes import elem_dtype
from cpd_onnx.torch.registry import operator


class AttentionAttributes(TypedDict, total=False):
    """Attributes of Attention."""

    is_causal: int
    kv_num_heads: int
    q_num_heads: int
    qk_matmul_output_mode: int
    scale: float
    softcap: float
    softmax_precision: int
    left_window_size: int
    right_window_size: int


class Rotary(TypedDict, total=False):
    """Attributes of RotaryEmbedding."""

    interleaved: int
    num_heads: int
    rotary_embedding_dim: int


class LinearAttentionAttributes(TypedDict, total=False):
    """Attributes of LinearAttention."""

    q_num_heads: int
    kv_num_heads: int
    scale: float
    update_rule: str
    chunk_size: int


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[N, T, heads * size] -> [N, heads, T, size]."""
    return x.reshape(x.shape[0], x.shape[1], heads, x.shape[2] // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[N, heads, T, size] -> [N, T, heads * size]."""
    return x.transpose(1, 2).flatten(2)


@operator("Attention")
def attention(
    q: Tensor, k: Tensor, v: Tensor, *more: Tensor | None, outputs: int, **options: Unpack[AttentionAttributes]
) -> list[Tensor]:
    """Scaled dot-product attention with key-value cache, grouped queries, masks, soft cap and sliding windows.

    q, k and v are [N, heads, T, size], or [N, T, heads * size] with the counts of heads as attributes. `more` are mask,
    past key, past value and the lengths of the valid keys.
    """
    mask, past_k, past_v, lengths = (*more, None, None, None, None)[:4]
    packed = q.ndim == 3
    if packed:
        q = split_heads(q, options["q_num_heads"])
        k, v = (split_heads(x, options["kv_num_heads"]) for x in (k, v))
    past = 0 if past_k is None else past_k.shape[2]
    k, v = _with_past(k, past_k), _with_past(v, past_v)
    bias = _bias(q, k, (mask, lengths, past), options)
    result, scores = _attend((q, k, v), bias, options, need_scores=outputs > 3)
    return [merge_heads(result) if packed else result, k, v, scores][:outputs]


def _with_past(x: Tensor, past: Tensor | None) -> Tensor:
    return x if past is None else torch.cat([past, x], 2)


def _bias(
    q: Tensor, k: Tensor, context: tuple[Tensor | None, Tensor | None, int], options: AttentionAttributes
) -> Tensor | None:
    """Return the addend of the scores [N, heads, T, S]: the mask, and minus infinity for keys that are excluded."""
    mask, lengths, past = context
    allowed = _allowed(q, k, (lengths, past), options)
    if mask is not None and mask.shape[-1] < k.shape[2]:
        missing = k.shape[2] - mask.shape[-1]
        mask = F.pad(mask, [0, missing], value=False if mask.dtype == torch.bool else -math.inf)
    if mask is not None and mask.dtype == torch.bool:
        allowed = mask if allowed is None else allowed & mask
        mask = None
    if allowed is None:
        return mask
    hidden = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~allowed, -math.inf)
    return hidden if mask is None else hidden + mask


def _allowed(q: Tensor, k: Tensor, context: tuple[Tensor | None, int], options: AttentionAttributes) -> Tensor | None:
    """Return whether query i may attend to key j, by causality, window and padding; None if it may attend to all."""
    lengths, past = context
    left, right = options.get("left_window_size", -1), options.get("right_window_size", -1)
    if options.get("is_causal"):
        right = 0 if right < 0 else min(right, 0)
    rows = torch.arange(q.shape[2], device=q.device)[:, None]
    columns = torch.arange(k.shape[2], device=q.device)
    ahead = columns - rows - past
    if lengths is not None and past == 0:
        ahead = columns - rows - (lengths.reshape(-1, 1, 1, 1) - q.shape[2])
    limits = [] if right < 0 else [ahead <= right]
    limits += [] if left < 0 else [ahead >= -left]
    limits += [] if lengths is None else [columns < lengths.reshape(-1, 1, 1, 1)]
    return functools.reduce(torch.logical_and, limits) if limits else None


def _attend(
    qkv: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, options: AttentionAttributes, *, need_scores: bool
) -> tuple[Tensor, Tensor]:
    """Return the weighted values, and the scores at the stage of the mode (or the values if not needed)."""
    q, k, v = qkv
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    cap, scale = options.get("softcap", 0.0), options.get("scale") or 1 / math.sqrt(q.shape[3])
    if not need_scores and not cap and bias is None and "softmax_precision" not in options:
        return F.scaled_dot_product_attention(q, k, v, scale=scale), v
    root = torch.tensor(math.sqrt(scale), dtype=q.dtype)
    raw = (q * root) @ (k * root).mT
    capped = cap * torch.tanh(raw / cap) if cap else raw
    biased = capped if bias is None else capped + bias
    precision = elem_dtype(options["softmax_precision"]) if "softmax_precision" in options else biased.dtype
    weights = _shares(biased.to(precision), bias).to(q.dtype)
    states = (raw, capped, biased, weights)
    return weights @ v, states[options.get("qk_matmul_output_mode", 0)]


def _shares(scores: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax over the keys; a query without keys has zero weights, and a gradient of zero instead of NaN."""
    if bias is None:
        return scores.softmax(-1)
    blind = torch.isneginf(bias.amax(-1, keepdim=True))
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)


@operator("RotaryEmbedding")
def rotary_embedding(
    x: Tensor, cosines: Tensor, sines: Tensor, positions: Tensor | None = None, **options: Unpack[Rotary]
) -> Tensor:
    """Rotate pairs of features of x, [N, heads, T, size] or [N, T, heads * size], by an angle for each position."""
    packed = x.ndim == 3
    y = split_heads(x, options["num_heads"]) if packed else x
    if positions is not None:
        cosines, sines = cosines[positions], sines[positions]
    angles = cosines.unsqueeze(1), sines.unsqueeze(1)
    result = rotate(y, angles, bool(options.get("interleaved", 0)), options.get("rotary_embedding_dim", 0))
    return merge_heads(result) if packed else result


def rotate(x: Tensor, angles: tuple[Tensor, Tensor], interleaved: bool, size: int = 0) -> Tensor:
    """Rotate pairs of the first `size` features (of all, for 0) of x by angles given as cosines and sines.

    A pair consists of adjacent features, or of one of each half.
    """
    cosines, sines = angles
    size = size or 2 * cosines.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    parts = (cosines * a - sines * b, sines * a + cosines * b)
    joined = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([joined, rest], -1)


@operator("LinearAttention")
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *more: Tensor | None, **options: Unpack[LinearAttentionAttributes]
) -> tuple[Tensor, Tensor]:
    """Linear attention: a state [N, heads, key size, value size] that each step decays, corrects and extends.

    q, k and v are [N, T, heads * size]; `more` are the past state, the decay and the correction rate.
    """
    past, decay, beta = (*more, None, None, None)[:3]
    q_heads, heads = options["q_num_heads"], options["kv_num_heads"]
    scale = options.get("scale") or 1 / math.sqrt(q.shape[2] // q_heads)
    queries = split_heads(q, q_heads).float()
    keys, values = split_heads(k, heads).float(), split_heads(v, heads).float()
    decays = None if decay is None else split_heads(decay, heads).float()
    rates = None if beta is None else beta.transpose(1, 2).unsqueeze(-1).float()
    shape = (q.shape[0], heads, keys.shape[3], values.shape[3])
    state = queries.new_zeros(shape) if past is None else past.float()
    results = []
    for step in range(q.shape[1]):
        key, value = keys[:, :, step], values[:, :, step]
        if decays is not None:
            state = state * decays[:, :, step].exp().unsqueeze(-1)
        if rates is not None:
            value = rates[:, :, step] * (value - torch.einsum("bhdm,bhd->bhm", state, key))
        state = state + key.unsqueeze(-1) * value.unsqueeze(-2)
        seen = state.repeat_interleave(q_heads // heads, 1)
        results.append(scale * torch.einsum("bhd,bhdm->bhm", queries[:, :, step], seen))
    return merge_heads(torch.stack(results, 2)).to(q.dtype), state.to(q.dtype if past is None else past.dtype)
