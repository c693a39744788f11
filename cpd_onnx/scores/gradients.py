"""What each channel does to the loss, from gradients through the torch import."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cpd_onnx.data.sources import LABELS, check_source, fixed_batch, inputs_of
from cpd_onnx.errors import DataError
from cpd_onnx.scores.magnitude import add_per_channel
from cpd_onnx.scores.registry import Scores
from cpd_onnx.torch import import_model
from cpd_onnx.torch.dtypes import to_torch
from cpd_onnx.training.losses import class_axis, is_distribution, kind_of, label_loss

if TYPE_CHECKING:
    from cpd_onnx.scores.registry import ScoreContext

_SMALLEST = 1e-7
"""Probability below which one counts as this."""
_TEMPERATURE = 4.0
"""Softens distributions, as in distillation: a trained network is sure of most answers, and what it is sure of tells
nothing."""
_LOOKED_AT = 16
"""Samples from which the nature of the outputs is seen."""


def changes(context: ScoreContext) -> Iterator[Scores]:
    """For one sample after another, the sum of weight times gradient over each channel (each primitive atom).

    That is, to first order, minus what the loss changes by when the channel goes. The loss asks the model about an
    answer that it gives itself, drawn as it is likely: so the mean square is the Fisher information, and no labels are
    needed. With labels, it is the cross entropy with these.

    Raises:
        DataError: the data does not fit the model, or has no labels where they are asked for.
        UnsupportedError: the model cannot be imported into torch.
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
    first = next(iter(source.batches(fixed or _LOOKED_AT, seed=context.seed)))
    with torch.no_grad():
        seen = module(*(to_torch(first[entry.name]) for entry in inputs))
    axes = [class_axis(answer) if kind_of(answer) == "kl" else None for answer in seen]
    batches = source.batches(size, seed=context.seed)
    for batch in itertools.islice(batches, max(1, context.samples // size)):
        module.zero_grad(set_to_none=True)
        made = module(*(to_torch(batch[entry.name]) for entry in inputs))
        answers = [(answer, axis) for answer, axis in zip(made, axes, strict=True) if answer.requires_grad]
        if context.labels:
            loss = _about_labels(answers, to_torch(batch[LABELS]) if LABELS in batch else None)
        else:
            loss = torch.stack([about_itself(answer, axis, generator) for answer, axis in answers]).sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        totals = np.zeros(len(combed.atoms))
        for weight in weights:
            parameter = parameters[weight.value.name]
            if parameter.grad is not None:
                product = (parameter.detach() * parameter.grad).float().numpy()
                add_per_channel(totals, combed, weight, product)
        yield totals


def about_itself(answer: Tensor, axis: int | None, generator: torch.Generator) -> Tensor:
    """Minus the logarithm of the likelihood of an answer drawn from what the model says, the mean over positions.

    Scores of classes, along `axis`, are a distribution over these; other numbers the means of normal distributions,
    whose spread is that of the numbers.
    """
    if axis is not None:
        logs = _logarithms(answer, axis).movedim(axis, -1).flatten(0, -2)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        return -logs.gather(1, drawn).mean()
    values = answer.float()
    noise = torch.randn(values.shape, generator=generator)
    spread = values.detach().square().mean().sqrt().clamp(min=1e-12)
    weighted: Tensor = (values * noise).sum() / spread / values.numel() ** 0.5
    return weighted


def _logarithms(answer: Tensor, axis: int) -> Tensor:
    """Logarithms of the softened probabilities that scores stand for."""
    scores = answer.float()
    if is_distribution(answer.detach(), axis):
        scores = scores.clamp(min=_SMALLEST).log()
    return (scores / _TEMPERATURE).log_softmax(axis)


def _about_labels(answers: Sequence[tuple[Tensor, int | None]], labels: Tensor | None) -> Tensor:
    if labels is None:
        raise DataError(f"labels are to count, but the data has no array {LABELS!r}")
    for answer, axis in answers:
        if axis is not None:
            return label_loss(_logarithms(answer, axis), labels.long(), axis)
    raise DataError("no output holds scores of classes that labels could be compared with")
