"""Effect of each channel on the loss, from gradients through the imported torch module."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cpd_onnx.data.sources import LABELS, check_source, fixed_batch, inputs_of
from cpd_onnx.errors import DataError
from cpd_onnx.io.progress import advance
from cpd_onnx.scores.magnitude import add_per_channel
from cpd_onnx.scores.registry import Scores
from cpd_onnx.torch import import_model
from cpd_onnx.torch.dtypes import to_torch
from cpd_onnx.training.losses import class_axis, is_distribution, kind_of, label_loss

if TYPE_CHECKING:
    from cpd_onnx.scores.registry import ScoreContext

_SMALLEST = 1e-7
"""Lower bound of probabilities, which keeps their logarithms finite."""
_TEMPERATURE = 4.0
"""Temperature that softens distributions, as in distillation (heuristic): trained networks are confident of most
samples, and confident outputs have almost no gradient."""
_INSPECTED = 16
"""Number of samples from which the kind of each output is determined (heuristic)."""


def changes(context: ScoreContext) -> Iterator[Scores]:
    """Yield, for each batch, the sum of weight times gradient over each channel (each primitive atom).

    To first order, that is the negative change of the loss when the channel is removed. The loss is the negative log
    likelihood of an output drawn from the model's own distribution, so that the mean square is the Fisher information
    and no labels are needed. With labels, it is their cross entropy.

    Raises:
        DataError: The data does not fit the model, or lacks labels that were requested.
        UnsupportedError: The model cannot be imported into torch.
    """
    combed, source = context.combed, context.data
    assert source is not None
    proto = combed.folded.model.complete_proto()
    inputs = inputs_of(proto)
    check_source(source, inputs)
    module = import_model(proto).eval()
    parameters = module.onnx_parameters()
    weights = [
        weight
        for weight in combed.weights
        if weight.value.name in parameters and not weight.is_vector and not weight.scope.function
    ]
    generator = torch.Generator().manual_seed(context.seed)
    fixed = fixed_batch(inputs)
    size = fixed or 1
    first = next(iter(source.batches(fixed or _INSPECTED, seed=context.seed)))
    with torch.no_grad():
        outputs = module(*(to_torch(first[entry.name]) for entry in inputs))
    axes = [class_axis(output) if kind_of(output) == "kl" else None for output in outputs]
    batches = source.batches(size, seed=context.seed)
    count = max(1, context.samples // size)
    for number, batch in enumerate(itertools.islice(batches, count)):
        advance(number, count)
        module.zero_grad(set_to_none=True)
        outputs = module(*(to_torch(batch[entry.name]) for entry in inputs))
        pairs = [(output, axis) for output, axis in zip(outputs, axes, strict=True) if output.requires_grad]
        if context.labels:
            loss = _loss_of_labels(pairs, to_torch(batch[LABELS]) if LABELS in batch else None)
        else:
            loss = torch.stack([loss_of_sampled(output, axis, generator) for output, axis in pairs]).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        totals = np.zeros(len(combed.atoms))
        for weight in weights:
            parameter = parameters[weight.value.name]
            if parameter.grad is not None:
                product = (parameter.detach() * parameter.grad).float().numpy()
                add_per_channel(totals, combed, weight, product)
        yield totals


def loss_of_sampled(output: Tensor, axis: int | None, generator: torch.Generator) -> Tensor:
    """Return the negative log likelihood of targets sampled from the model's own output, the mean over positions.

    Class scores along `axis` are a distribution over the classes; other numbers are the means of normal distributions
    whose standard deviation is the root mean square of the numbers.
    """
    if axis is not None:
        logs = _logarithms(output, axis).movedim(axis, -1).flatten(0, -2)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        return -logs.gather(1, drawn).mean()
    values = output.float()
    noise = torch.randn(values.shape, generator=generator)
    deviation = values.detach().square().mean().sqrt().clamp(min=1e-12)
    weighted: Tensor = (values * noise).sum() / deviation / values.numel() ** 0.5
    return weighted


def _logarithms(output: Tensor, axis: int) -> Tensor:
    """Return the logarithms of the softened class probabilities of an output."""
    scores = output.float()
    if is_distribution(output.detach(), axis):
        scores = scores.clamp(min=_SMALLEST).log()
    return (scores / _TEMPERATURE).log_softmax(axis)


def _loss_of_labels(outputs: Sequence[tuple[Tensor, int | None]], labels: Tensor | None) -> Tensor:
    if labels is None:
        raise DataError(f"scoring by labels was requested, but the data has no array {LABELS!r}")
    for output, axis in outputs:
        if axis is not None:
            return label_loss(_logarithms(output, axis), labels.long(), axis)
    raise DataError("no output contains class scores to compare labels with")
