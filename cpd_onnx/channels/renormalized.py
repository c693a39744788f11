"""Models whose batch normalizations have the statistics of given samples instead of those of their training data.

A BatchNormalization stores mean and variance of each channel of its input over the training data. Where generated
inputs give other ones, these take their place, so that all channels behind it have the statistics of the training data
(Li et al., Revisiting Batch Normalization for Practical Domain Adaptation, ICLR Workshop 2017). Channels can then be
scored and weights be fitted as with real samples, and the stored statistics are put back afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from cpd_onnx.algebra.keep import KeepMask
from cpd_onnx.channels.groups import Combed
from cpd_onnx.data.sources import Source, calibration
from cpd_onnx.data.synthetic import Synthetic
from cpd_onnx.ir.model import Array, Model, attributes_of
from cpd_onnx.ir.tensors import constant_tensors, held_array, held_type, hold
from cpd_onnx.ops.traits import traits_of
from cpd_onnx.runtime.stepwise import Stepwise
from cpd_onnx.shapes.editor import Editor
from cpd_onnx.shapes.values import COMPUTABLE_TYPES, Folded

SAMPLES = 128
"""Number of samples from which statistics are computed; each of their positions counts (heuristic)."""
_BATCH = 32
"""Number of samples in a run of the model."""
_OPSET = 7
"""First opset whose BatchNormalization has neither the attribute `is_test` nor a mode that is not per channel."""
_BIAS, _MEAN, _VARIANCE = 2, 3, 4
"""Input slots of BatchNormalization."""
_LEAST = 1e-6
"""Ratio to the stored variance below which that of the samples is not used: the channel is constant (heuristic)."""

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Renormalized:
    """A model with the statistics of samples.

    Attributes:
        combed: The model and its coupled channels, which are those of the original.
        statistics: Mean and variance of each channel of the input, by position of the BatchNormalization.
    """

    combed: Combed
    statistics: Mapping[int, tuple[Vector, Vector]]

    def entered(self, pruned: Model, kept: KeepMask) -> Model:
        """Return a copy of a pruned model with the statistics of the samples for the surviving channels."""
        folded, model = self.combed.folded, pruned.copy()
        editor = Editor(model)
        for position, numbers in self.statistics.items():
            node = editor.node(folded.scope, position)
            axes = self.combed.tensors[("", folded.scope.nodes[position].input[0])].axes or []
            _set(model, node, *(vector[kept.mask(axes[1])] for vector in numbers))
        return model

    def left(self, pruned: Model, fitted: Model) -> Model:
        """Return a copy of a pruned model with the values fitted to `entered(pruned)`, and with its own statistics.

        A change of a BatchNormalization's bias compensates a change of its input's mean, which is divided by another
        standard deviation here.
        """
        model = pruned.copy()
        editor = Editor(pruned)
        old, new = constant_tensors(pruned), constant_tensors(fitted)
        names = {tensor.name for tensor in pruned.graph.initializer if fitted.has(tensor.name)}
        names |= {name for name in old.keys() & new.keys() if old[name] != new[name]}
        ratios = {}
        for position in self.statistics:
            node = editor.node(self.combed.folded.scope, position)
            ratios[node.input[_BIAS]] = _deviation(fitted, node) / _deviation(pruned, node)
            names -= {node.input[_MEAN], node.input[_VARIANCE]}
        for name in sorted(names):
            before, after = held_array(pruned, name), held_array(fitted, name)
            if before is after or np.array_equal(before, after):
                continue
            if name in ratios:
                after = (before + (after - before) * ratios[name]).astype(before.dtype)
            hold(model, name, after)
        return model


def renormalized(combed: Combed, source: Source | None, seed: int = 0) -> Renormalized | None:
    """Return the model with the statistics of generated samples.

    None if the samples are real ones, or if the model has no BatchNormalization that stores statistics. Raises
    UnsupportedError if onnxruntime cannot run the model or a part of it.
    """
    folded = combed.folded
    found = list(_normalizations(folded)) if isinstance(source, Synthetic) else []
    if not found or source is None:
        return None
    feeds = list(calibration(folded.model, source, SAMPLES, batch=_BATCH, seed=seed))
    model, statistics = folded.model.copy(), {}
    steps = Stepwise(folded, model, feeds, [folded.scope.nodes[position].input[0] for position in found])
    for position in found:
        node = folded.scope.nodes[position]
        steps.after(position - 1)
        mean, variance = _moments(steps.tensor(node.input[0]))
        stored = _vector(model, node.input[_VARIANCE])
        is_used = np.isfinite(mean) & (variance < _largest(model, node)) & (variance > _LEAST * stored)
        mean = np.where(is_used, mean, _vector(model, node.input[_MEAN]))
        statistics[position] = (mean, np.where(is_used, variance, stored))
        _set(model, node, *statistics[position])
        steps.release(node.input[0])
    return Renormalized(replace(combed, folded=replace(folded, model=model)), statistics)


def stores_statistics(folded: Folded) -> bool:
    """Return whether a model stores the statistics of its training data, in a BatchNormalization."""
    return next(_normalizations(folded), None) is not None


def keeps_statistics(folded: Folded) -> bool:
    """Return whether inner activations resemble those of the training data even for generated inputs.

    They do if their statistics are stored and can be restored, or if the model normalises activations by themselves.
    """
    return stores_statistics(folded) or any(traits_of(node).normalises for node in folded.scope.nodes)


def _normalizations(folded: Folded) -> Iterator[int]:
    """Yield the positions of the BatchNormalization nodes of the main graph whose statistics can be replaced."""
    scope, model = folded.scope, folded.model
    if scope.opset < _OPSET:
        return
    for position, node in enumerate(scope.nodes):
        if not traits_of(node).stores_statistics or attributes_of(node).get("training_mode", 0):
            continue
        data = scope.values.get(node.input[0])
        if data is None or data.constants is not None or len(data.shape or ()) < 2:
            continue
        if all(_is_own(model, folded, name) for name in node.input[_BIAS : _VARIANCE + 1]):
            yield position


def _is_own(model: Model, folded: Folded, name: str) -> bool:
    """Return whether a name is that of a floating-point weight with one user."""
    found = held_type(model, name)
    return found is not None and found[0] in COMPUTABLE_TYPES and len(folded.scope.consumers[name]) == 1


def _moments(arrays: Sequence[Array]) -> tuple[Vector, Vector]:
    """Return mean and variance of each channel of some batches."""
    axes = tuple(axis for axis in range(arrays[0].ndim) if axis != 1)
    count = sum(array.size // array.shape[1] for array in arrays)
    mean = sum(array.sum(axes, dtype=np.float64) for array in arrays) / count
    middle = np.expand_dims(mean, axes)
    return mean, sum(np.square(array - middle).sum(axes) for array in arrays) / count


def _set(model: Model, node: NodeProto, mean: Vector, variance: Vector) -> None:
    for name, vector in ((node.input[_MEAN], mean), (node.input[_VARIANCE], variance)):
        hold(model, name, vector.astype(held_array(model, name).dtype))


def _largest(model: Model, node: NodeProto) -> float:
    """Return the largest variance that the model can store."""
    return float(np.finfo(held_array(model, node.input[_VARIANCE]).dtype).max)


def _deviation(model: Model, node: NodeProto) -> Vector:
    epsilon = attributes_of(node).get("epsilon", 1e-5)
    return np.asarray(np.sqrt(_vector(model, node.input[_VARIANCE]) + epsilon))


def _vector(model: Model, name: str) -> Vector:
    return held_array(model, name).astype(np.float64)
