"""Loss operators."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from cpd_onnx.torch.registry import operator

_UNUSED = -(1 << 62)
"""Default of `ignore_index`: a label in the range of int64 that no class has."""


@operator("NegativeLogLikelihoodLoss")
def negative_log_likelihood(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    reduction: str = "mean",
    ignore_index: int | None = None,
) -> Tensor:
    """Minus the log probability x [N, C, ...] of the target [N, ...], weighted by class."""
    ignored = _UNUSED if ignore_index is None else ignore_index
    return F.nll_loss(x, target.long(), weight, ignore_index=ignored, reduction=reduction)


@operator("SoftmaxCrossEntropyLoss")
def softmax_cross_entropy(
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    outputs: int,
    reduction: str = "mean",
    ignore_index: int | None = None,
) -> list[Tensor]:
    """Cross entropy of scores [N, C, ...] against labels [N, ...], and on request the log probabilities."""
    logs = scores.log_softmax(1)
    loss = negative_log_likelihood(logs, target, weight, reduction=reduction, ignore_index=ignore_index)
    return [loss, logs][:outputs]
