"""Distillation losses: distances between a student's outputs and its teacher's.

Class scores are compared by the Kullback-Leibler divergence of softened distributions (Hinton et al., arXiv 1503.02531)
or by their correlations (DIST: Huang et al., NeurIPS 2022, arXiv 2205.10536); other outputs by squared error or cosine.
Segmentation maps are compared pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from cpd_onnx.data.metrics import IGNORED
from cpd_onnx.errors import CpdError, DataError, ModelError
from cpd_onnx.training.options import LossKind

_OF_CLASSES = ("kl", "dist")
"""Kinds of distance between class scores."""

_SMALLEST = 1e-7
"""Lower bound of probabilities before the logarithm, about the precision of float32."""


# Kinds of outputs.


def class_axis(output: Tensor) -> int | None:
    """Return the class axis of an output that may hold class scores; None if it cannot.

    It is the last of two or three axes; of four it is axis 1 or 3, whichever is shorter.
    """
    if output.ndim in (2, 3):
        axis = output.ndim - 1
    elif output.ndim == 4:
        axis = 1 if output.shape[1] <= output.shape[3] else 3
    else:
        return None
    return axis if output.shape[axis] > 1 else None


def kind_of(output: Tensor) -> LossKind:
    """Return how to compare an output, judged by the teacher's values.

    Values in 0..1 that do not sum to one are independent probabilities and not class scores; an output of three axes
    holds features unless it is a distribution.
    """
    axis = class_axis(output)
    if axis is None or not output.is_floating_point():
        return "mse"
    if output.ndim == 3 and not is_distribution(output, axis):
        return "mse"
    independent = bool(((output >= 0) & (output <= 1)).all()) and not is_distribution(output, axis)
    return "mse" if independent else "kl"


def is_distribution(output: Tensor, axis: int) -> bool:
    """Return whether an output is a probability distribution, that is, the result of a softmax."""
    total = output.float().sum(axis)
    return bool((output >= 0).all()) and bool(((total - 1).abs() < 1e-2).all())


# Distances.


def divergence(student: Tensor, teacher: Tensor, axis: int, temperature: float) -> Tensor:
    """Return the KL divergence of softened distributions, summed over classes, averaged over the rest, times T²."""
    logs = (student.float() / temperature).log_softmax(axis)
    target = (teacher.float() / temperature).log_softmax(axis)
    return F.kl_div(logs, target, reduction="none", log_target=True).sum(axis).mean() * temperature**2


def correlation_distance(student: Tensor, teacher: Tensor, axis: int, temperature: float) -> Tensor:
    """Return the DIST loss: one minus Pearson's correlation, over the classes of each sample plus over the samples."""
    rows = [
        (x.float() / temperature).softmax(axis).movedim(axis, -1).reshape(-1, x.shape[axis]) for x in (student, teacher)
    ]
    between = 1 - _correlation(rows[0], rows[1]).mean()
    within = 1 - _correlation(rows[0].T, rows[1].T).mean()
    return (between + within) * temperature**2


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation of each row of a with that of b."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1, eps=1e-8)


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared error relative to the teacher's mean square, so that the scale of an output cancels."""
    target = teacher.float()
    return F.mse_loss(student.float(), target) / target.square().mean().clamp(min=1e-12)


def angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Return one minus the cosine similarity of the embeddings, which lie along the last axis, or axis 1 of maps."""
    axis = 1 if student.ndim == 4 else -1
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=axis)).mean()


def label_loss(student: Tensor, labels: Tensor, axis: int, ignored: int = IGNORED) -> Tensor:
    """Return the cross-entropy with labels, except those equal to `ignored`."""
    logs = student.float().log_softmax(axis).movedim(axis, 1)
    if logs.shape[:1] + logs.shape[2:] != labels.shape:
        raise DataError(
            f"labels have shape {list(labels.shape)} but the output {list(student.shape)}, with classes in axis {axis}"
        )
    if not bool((labels != ignored).any()):
        return logs.sum() * 0.0
    return F.nll_loss(logs, labels, ignore_index=ignored)


def surviving(target: Tensor, survivors: Mapping[int, Tensor]) -> Tensor:
    """Return the part of a teacher's tensor that the student still has."""
    for axis, indices in survivors.items():
        target = target.index_select(axis, indices.to(target.device))
    return target


# The total loss.


@dataclass
class DistillationLoss:
    """The loss over all outputs of a model, and some of its hidden tensors.

    Attributes:
        outputs: Names of the outputs, in order.
        wanted: Kinds of distance by output; by default `kind_of` the teacher's first output values.
        weights: Weights of outputs in the loss (default 1).
        temperature: Temperature that softens distributions.
        label_weight: Weight of the cross-entropy with labels, from 0 to 1.
        ignored: Label of elements that do not count.
        hidden: For each hidden tensor, which follow the outputs, the teacher's indices that the student has, by axis.
        hidden_weight: Weight of the mean loss of hidden tensors, relative to that of the outputs.
        is_of_outputs: Whether the outputs count at all, or the hidden tensors alone.
        kept: For each output that has lost channels, the teacher's indices that the student has, by axis.
        kinds: Kind of distance of each output, set by `choose`.
        distributions: Outputs that are probability distributions, set by `choose`.
    """

    outputs: Sequence[str]
    wanted: Mapping[str, LossKind] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 4.0
    label_weight: float = 0.0
    ignored: int = IGNORED
    hidden: Sequence[Mapping[int, Tensor]] = ()
    hidden_weight: float = 1.0
    is_of_outputs: bool = True
    kept: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    kinds: dict[str, LossKind] = field(default_factory=dict)
    distributions: set[str] = field(default_factory=set)

    def choose(self, targets: Sequence[Tensor]) -> None:
        """Set the kind of distance of each output from the teacher's outputs for the first batch."""
        for name, target in zip(self.outputs, targets, strict=False):
            self.kinds[name] = self.wanted.get(name) or kind_of(target)
            axis = class_axis(target)
            if self.kinds[name] in _OF_CLASSES and axis is None:
                shape = list(target.shape)
                raise CpdError(f"output {name!r} has shape {shape}, without a class axis; compare it by mse or cosine")
            if axis is not None and is_distribution(target, axis):
                self.distributions.add(name)

    def loss(self, answers: Sequence[Tensor], targets: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """Return the weighted mean over the outputs, plus the losses of hidden tensors and labels."""
        if not self.is_of_outputs:
            return self._hidden_error(answers, targets)
        terms: list[Tensor] = []
        weights: list[float] = []
        labelled: Tensor | None = None
        for name, answer, whole in zip(self.outputs, answers, targets, strict=False):
            target = surviving(whole, self.kept.get(name, {}))
            if answer.shape != target.shape:
                shapes = f"{list(answer.shape)} in the student, {list(target.shape)} in the teacher"
                raise ModelError(f"output {name!r} has shape {shapes}; give a teacher with the same outputs")
            weight = self.weights.get(name, 1.0)
            if not answer.is_floating_point() or not weight or not answer.numel():
                continue
            terms.append(weight * self._distance(name, answer, target))
            weights.append(weight)
            axis = class_axis(target)
            if labels is not None and labelled is None and axis is not None and self.kinds[name] in _OF_CLASSES:
                labelled = label_loss(self._scores(name, answer), labels, axis, self.ignored)
        if not terms:
            raise CpdError("no output is left to compare: none is float, or all have weight 0")
        if labels is not None and labelled is None:
            raise DataError("no output holds class scores that labels could be compared with; set label weight 0")
        loss = torch.stack(terms).sum() / sum(weights)
        if self.hidden:
            loss = loss + self.hidden_weight * self._hidden_error(answers, targets)
        return loss if labelled is None else (1 - self.label_weight) * loss + self.label_weight * labelled

    def _hidden_error(self, answers: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Return the mean relative error of the hidden tensors."""
        count = len(self.outputs)
        pairs = zip(answers[count:], targets[count:], self.hidden, strict=True)
        return torch.stack([relative_error(a, surviving(t, survivors)) for a, t, survivors in pairs]).mean()

    def _distance(self, name: str, answer: Tensor, target: Tensor) -> Tensor:
        kind, axis = self.kinds[name], class_axis(target)
        if kind in _OF_CLASSES and axis is not None:
            scores = [self._scores(name, output) for output in (answer, target)]
            distance = divergence if kind == "kl" else correlation_distance
            return distance(scores[0], scores[1], axis, self.temperature)
        return angle(answer, target) if kind == "cosine" else relative_error(answer, target)

    def _scores(self, name: str, output: Tensor) -> Tensor:
        """Return the class scores of an output; those of a distribution are its logarithms."""
        return output.float().clamp(min=_SMALLEST).log() if name in self.distributions else output
