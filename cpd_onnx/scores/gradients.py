"""Effect of each channel on the loss, from gradients through the imported torch module."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor

from cpd_onnx.data.sources import LABELS, check_source, fixed_batch, run_inputs
from cpd_onnx.errors import DataError, UnsupportedError
from cpd_onnx.fitting.units import units_of
from cpd_onnx.io.progress import advance
from cpd_onnx.runtime.sessions import sample_count
from cpd_onnx.runtime.stream import batch_size
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
_CURVED, _BATCH = 128, 16
"""Maximum number of samples from which curvatures are computed, and of those in a batch (heuristic)."""
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
    combed = context.combed
    run = _Run(context, combed.folded.model.complete_proto(), 1)
    module = run.module
    parameters = module.onnx_parameters()
    weights = [
        weight
        for weight in combed.weights
        if weight.value.name in parameters and not weight.is_vector and not weight.scope.function
    ]
    for loss, _ in run.losses(context.samples):
        module.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        totals = np.zeros(len(combed.atoms))
        for weight in weights:
            parameter = parameters[weight.value.name]
            if parameter.grad is not None:
                product = (parameter.detach() * parameter.grad).float().numpy()
                add_per_channel(totals, combed, weight, product)
        yield totals


def curvatures(context: ScoreContext) -> dict[str, npt.NDArray[np.float64]]:
    """Return the curvature of the model's loss at the outputs of each weight, by name [groups, outputs, outputs].

    That is the second moment of the gradients of the loss of `changes` without labels, summed over the positions of a
    sample, where the output of the weight (or the sum that it enters) is known to `fitting.units`.

    Raises:
        DataError: The data does not fit the model.
        UnsupportedError: The model cannot be imported into torch.
    """
    folded = context.combed.folded
    found = units_of(folded).found
    # Neither integers nor products inside an operator have gradients.
    units = [unit for unit in found if unit.target not in unit.levels and not unit.is_inner]
    proto = copy.deepcopy(folded.model.complete_proto())
    own = [info.name for info in proto.graph.output]
    names = [*own, *dict.fromkeys(unit.target for unit in units if unit.target not in own)]
    proto.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names[len(own) :]
    )
    run = _Run(replace(context, labels=False), proto, batch_size(folded, _BATCH), len(own))
    totals: dict[str, npt.NDArray[np.float64]] = {}
    seen = 0
    for loss, (tensors, count) in run.losses(min(context.samples, _CURVED)):
        seen += count
        known = {name: tensor for name, tensor in zip(names, tensors, strict=True) if tensor.requires_grad}
        gradients = torch.autograd.grad(loss, list(known.values()), allow_unused=True)
        at = {name: gradient.numpy() for name, gradient in zip(known, gradients, strict=True) if gradient is not None}
        for unit in units:
            if unit.target in at:
                array = at[unit.target]
                rows = unit.linear.targets(array, np.arange(unit.linear.count(array.shape)))
                totals[unit.weight] = totals.get(unit.weight, np.zeros(())) + rows.swapaxes(1, 2) @ rows
    return {name: total / max(1, seen) for name, total in totals.items()}


class _Run:
    """Batches of samples through the imported module, with the loss of each."""

    def __init__(self, context: ScoreContext, proto: ModelProto, size: int, own: int | None = None) -> None:
        """Import the model, of which the first `own` outputs have a loss (default: all)."""
        assert context.data is not None
        self.context, self.source = context, context.data
        self.inputs = run_inputs(context.combed.folded.model)
        check_source(self.source, self.inputs)
        self.module = import_model(proto).eval()
        self.generator = torch.Generator().manual_seed(context.seed)
        fixed = fixed_batch(self.inputs)
        self.size = fixed or size
        first = next(iter(self.source.batches(fixed or _INSPECTED, seed=context.seed)))
        with torch.no_grad():
            outputs = self.module(*(to_torch(entry.taken(first[entry.name])) for entry in self.inputs))[:own]
        self.axes = [class_axis(output) if kind_of(output) == "kl" else None for output in outputs]

    def losses(self, samples: int) -> Iterator[tuple[Tensor, tuple[Sequence[Tensor], int]]]:
        """Yield the loss of each batch, the sum of those of its samples, with all outputs and the number of samples."""
        batches = self.source.batches(self.size, seed=self.context.seed)
        number_of_batches = max(1, samples // self.size)
        for number, batch in enumerate(itertools.islice(batches, number_of_batches)):
            advance(number, number_of_batches)
            tensors, count = self.module(*(to_torch(e.taken(batch[e.name])) for e in self.inputs)), sample_count(batch)
            pairs = [(output, axis) for output, axis in zip(tensors, self.axes, strict=False) if output.requires_grad]
            if not pairs:
                raise UnsupportedError("no output has a gradient, as in operators on integers: choose another score")
            if self.context.labels:
                loss = count * _loss_of_labels(pairs, to_torch(batch[LABELS]) if LABELS in batch else None)
            else:
                each = [(loss_of_sampled(*pair, self.generator), pair[1]) for pair in pairs]
                # Class scores have a mean over all positions, other numbers a sum over their root.
                loss = torch.stack([loss * (count if axis is not None else count**0.5) for loss, axis in each]).sum()
            yield loss, (tensors, count)


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
