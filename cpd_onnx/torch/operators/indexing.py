"""Operators that gather, scatter, sort and count elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from cpd_onnx.torch.operators.generate import Numbers
from cpd_onnx.torch.registry import operator


def _wrapped(indices: Tensor, size: int) -> Tensor:
    """Indices as int64 in 0..size, counted from the end if negative."""
    indices = indices.long()
    return torch.where(indices < 0, indices + size, indices)


@operator("Gather")
def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Gather slices along an axis; the shape of the indices replaces the axis."""
    axis = axis % x.ndim
    picked = x.index_select(axis, _wrapped(indices, x.shape[axis]).reshape(-1))
    return picked.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


@operator("GatherElements")
def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Gather elements along an axis, one for each index."""
    return x.gather(axis, _wrapped(indices, x.shape[axis]))


def _tuple_index(shape: Sequence[int], indices: Tensor) -> tuple[Tensor, ...]:
    """Return the last axis of `indices` as one index tensor for each leading axis of a shape."""
    return tuple(_wrapped(indices[..., place], shape[place]) for place in range(indices.shape[-1]))


@operator("GatherND", domain="com.microsoft")
@operator("GatherND")
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Gather slices by the index tuples in the last axis of `indices`."""
    if batch_dims == 0:
        return x[_tuple_index(x.shape, indices)]
    flat_x, flat_indices = x.flatten(0, batch_dims - 1), indices.flatten(0, batch_dims - 1)
    count = flat_x.shape[0]
    samples = torch.arange(count, device=x.device).reshape(count, *[1] * (flat_indices.ndim - 2))
    picked = flat_x[(samples, *_tuple_index(flat_x.shape[1:], flat_indices))]
    return picked.reshape(*x.shape[:batch_dims], *picked.shape[1:])


_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@operator("ScatterElements", "Scatter")
def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    """Scatter updates along an axis, or combine them with the elements there."""
    index = _wrapped(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, index, updates)
    return x.scatter_reduce(axis, index, updates, _REDUCE[reduction], include_self=True)


@operator("ScatterND")
def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """Scatter slices to index tuples, or combine them with the slices there."""
    index = _tuple_index(x.shape, indices)
    if reduction in ("none", "add"):
        return x.index_put(index, updates, accumulate=reduction == "add")
    depth = indices.shape[-1]
    flat = torch.zeros_like(index[0])
    for size, place in zip(x.shape[:depth], index, strict=True):
        flat = flat * size + place
    rows, values = x.flatten(0, depth - 1), updates.reshape(-1, *x.shape[depth:])
    target = flat.reshape(-1, *[1] * (rows.ndim - 1)).expand_as(values)
    return rows.scatter_reduce(0, target, values, _REDUCE[reduction], include_self=True).reshape(x.shape)


@operator("TensorScatter")
def tensor_scatter(
    cache: Tensor, update: Tensor, starts: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """Write update b into the cache from `starts[b]` on, wrapping around in a circular cache."""
    axis = axis % cache.ndim
    begin = torch.zeros(cache.shape[0], dtype=torch.int64, device=cache.device) if starts is None else starts
    places = begin[:, None] + torch.arange(update.shape[axis], device=cache.device)
    if mode == "circular":
        places = places % cache.shape[axis]
    shape = [1] * cache.ndim
    shape[0], shape[axis] = places.shape
    return cache.scatter(axis, places.reshape(shape).expand_as(update), update)


@operator("OneHot", host=(1,))
def one_hot(indices: Tensor, depth: Numbers, values: Tensor, *, axis: int = -1) -> Tensor:
    """Write values[1] at the index along the new axis and values[0] elsewhere; an index out of range sets nothing."""
    count = int(depth[0])
    axis = axis % (indices.ndim + 1)
    wrapped = torch.where(indices < 0, indices + count, indices).unsqueeze(axis)
    places = torch.arange(count, device=indices.device).reshape(-1, *[1] * (indices.ndim - axis))
    return torch.where(wrapped == places, values[1], values[0])


class Top(TypedDict, total=False):
    """Attributes of TopK; k is one before opset 10."""

    axis: int
    largest: int
    sorted: int
    k: int


@operator("TopK", host=(1,))
def top_k(x: Tensor, count: Numbers | None = None, **attributes: Unpack[Top]) -> list[Tensor]:
    """Return the k largest or smallest elements along an axis, and their indices; equal ones in order of index."""
    k = attributes["k"] if count is None else int(count[0])
    axis, largest = attributes.get("axis", -1), bool(attributes.get("largest", 1))
    values = x if x.is_floating_point() else x.long()
    ordered, indices = torch.sort(values, dim=axis, descending=largest, stable=True)
    return [ordered.narrow(axis, 0, k).to(x.dtype), indices.narrow(axis, 0, k)]


@operator("ArgMax")
def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Index of the largest element, the first or last of equal ones."""
    if not select_last_index:
        return x.argmax(axis, keepdim=keepdims == 1)
    return x.shape[axis] - 1 - x.flip(axis).argmax(axis, keepdim=keepdims == 1)


@operator("ArgMin")
def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Index of the smallest element, the first or last of equal ones."""
    if not select_last_index:
        return x.argmin(axis, keepdim=keepdims == 1)
    return x.shape[axis] - 1 - x.flip(axis).argmin(axis, keepdim=keepdims == 1)


@operator("NonZero")
def non_zero(x: Tensor) -> Tensor:
    """Return the indices of the non-zero elements, one column each."""
    return x.nonzero().T


@operator("Compress")
def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """Select the slices whose condition holds; without an axis, of the flattened x."""
    places = condition.nonzero().reshape(-1)
    return x.reshape(-1)[places] if axis is None else x.index_select(axis, places)


@operator("Unique")
def unique(x: Tensor, *, axis: int | None = None, sorted: int = 1) -> list[Tensor]:
    """Return the distinct slices, the first index of each, the index of each slice of x in them, and their counts."""
    data = x.reshape(-1) if axis is None else x
    values, inverse, counts = torch.unique(data, return_inverse=True, return_counts=True, dim=axis or 0)
    places = torch.arange(inverse.numel(), device=x.device)
    first = torch.full_like(counts, inverse.numel()).scatter_reduce(0, inverse, places, "amin")
    if not sorted:
        order = first.argsort()
        values, first, counts = values.index_select(axis or 0, order), first[order], counts[order]
        inverse = order.argsort()[inverse]
    return [values, first, inverse, counts]


def _shifted(x: Tensor, axis: int, neutral: float) -> Tensor:
    """Shift by one step along an axis, with a neutral element in front."""
    front = torch.full_like(x.narrow(axis, 0, 1), neutral)
    return torch.cat([front, x.narrow(axis, 0, x.shape[axis] - 1)], axis)


@operator("CumSum", host=(1,))
def cumulative_sum(x: Tensor, dim: Numbers, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Sum of all elements up to each, without itself if exclusive, from the end if reverse."""
    axis = int(dim[0])
    y = x.flip(axis) if reverse else x
    y = (_shifted(y, axis, 0) if exclusive else y).cumsum(axis, dtype=x.dtype)
    return y.flip(axis) if reverse else y


@operator("CumProd", host=(1,))
def cumulative_product(x: Tensor, dim: Numbers, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Product of all elements up to each, without itself if exclusive, from the end if reverse."""
    axis = int(dim[0])
    y = x.flip(axis) if reverse else x
    y = (_shifted(y, axis, 1) if exclusive else y).cumprod(axis, dtype=x.dtype)
    return y.flip(axis) if reverse else y


@operator("Hardmax")
def hardmax(x: Tensor, *, opset: int, axis: int | None = None) -> Tensor:
    """One at the first largest element along an axis, zero elsewhere; before opset 13 along all axes from it on."""
    if opset >= 13:
        index = x.argmax(-1 if axis is None else axis, keepdim=True)
        return torch.zeros_like(x).scatter(-1 if axis is None else axis, index, 1.0)
    flat = x.flatten(1 if axis is None else axis)
    return F.one_hot(flat.argmax(-1), flat.shape[-1]).to(x.dtype).reshape(x.shape)
