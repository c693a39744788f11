"""Reductions over axes, given as an attribute or, in newer opsets, as an input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cpd_onnx.torch.operators.generate import Numbers
from cpd_onnx.torch.registry import register

Axes = list[int]
Reduction = Callable[[Tensor, Axes, bool], Tensor]


def _extreme(reduce: Callable[..., Tensor], neutral: Callable[[torch.dtype], float]) -> Reduction:
    """Return the largest or smallest element, or the limit of the type if there is none."""

    def compute(x: Tensor, axes: Axes, keep: bool) -> Tensor:
        if x.numel():
            return reduce(x, axes, keepdim=keep)
        return torch.full_like(x.sum(axes, keepdim=keep, dtype=x.dtype), neutral(x.dtype))

    return compute


def _lowest(dtype: torch.dtype) -> float:
    if dtype == torch.bool:
        return 0
    return -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def _highest(dtype: torch.dtype) -> float:
    if dtype == torch.bool:
        return 1
    return math.inf if dtype.is_floating_point else torch.iinfo(dtype).max


def _total(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype)


def _product(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def _mean(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep)
    return x.double().mean(axes, keepdim=keep).to(x.dtype)


def _log_sum_exp(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return x.logsumexp(axes, keepdim=keep)


def _norm1(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return _total(x.abs(), axes, keep)


def _norm2(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    if x.is_floating_point():  # its gradient at zero is zero; that of a square root is infinite
        norm: Tensor = torch.linalg.vector_norm(x, 2, axes, keepdim=keep)
        return norm
    return _total(x * x, axes, keep).sqrt().to(x.dtype)


def _log_sum(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return _total(x, axes, keep).log()


def _sum_square(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return _total(x * x, axes, keep)


def _reduction(name: str, function: Reduction) -> None:
    def compute(
        x: Tensor,
        where: Numbers | None = None,
        *,
        axes: Sequence[int] | None = None,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Tensor:
        dims = [int(axis) for axis in (axes or () if where is None else where)]
        if not dims and noop_with_empty_axes:
            return _without_reduction(name, x)
        dims = dims or list(range(x.ndim))
        return function(x, dims, keepdims == 1) if dims else _without_reduction(name, x)

    compute.__name__ = compute.__qualname__ = name.lower()
    register(name, compute, host=(1,))


def _without_reduction(name: str, x: Tensor) -> Tensor:
    """Functions that reductions apply to each element if they reduce no axis."""
    elementwise = {
        "ReduceL1": torch.abs,
        "ReduceL2": torch.abs,
        "ReduceLogSum": torch.log,
        "ReduceSumSquare": torch.square,
    }
    return elementwise.get(name, torch.clone)(x)


for _name, _function in {
    "ReduceL1": _norm1,
    "ReduceL2": _norm2,
    "ReduceLogSum": _log_sum,
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceMax": _extreme(torch.amax, _lowest),
    "ReduceMean": _mean,
    "ReduceMin": _extreme(torch.amin, _highest),
    "ReduceProd": _product,
    "ReduceSum": _total,
    "ReduceSumSquare": _sum_square,
}.items():
    _reduction(_name, _function)
