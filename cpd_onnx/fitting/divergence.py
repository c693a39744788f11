"""Divergence: how far the outputs of a model are from those of the original, measured without labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from cpd_onnx.data.agreement import class_axes
from cpd_onnx.data.sources import Source, calibration
from cpd_onnx.ir.model import Array, Model
from cpd_onnx.runtime.draws import with_fixed_draws
from cpd_onnx.runtime.sessions import Feed, execute, open_model, sample_count
from cpd_onnx.runtime.shards import Divided

Floats: TypeAlias = npt.NDArray[np.float64]

_BATCH = 8
"""Number of samples in a run of the models."""
_MOST_BYTES = 256 << 20
"""Bytes of samples and outputs above which no further samples are taken: large outputs tell enough (heuristic)."""
_NEAR_ONE = 1e-2
"""Deviation from 1 up to which the values along an axis add up to 1, as probabilities do."""
_ERRORS = 2.0
"""Standard errors by which a difference must be above zero to count."""
_LEAST = 1e-9
"""Smallest probability, whose logarithm is finite."""


class Divergence:
    """Measures models on the same samples: for each, the mean over the outputs of how far they are from the original's.

    For scores of classes this is the Kullback-Leibler divergence from the original's probabilities, in nats; for other
    outputs of floating-point type, the squared error over the variance. Outputs that may lose channels do not count.
    """

    def __init__(self, original: Model, source: Source, samples: int, *, temperature: float = 1.0) -> None:
        """Run the original on up to that many samples, as many as fit in memory with its outputs.

        Probabilities are softened by the temperature, as in a distillation.

        Raises DataError if the samples do not fit the model, UnsupportedError if onnxruntime cannot run it.
        """
        self.temperature = temperature
        self.axes = class_axes(original, source)
        self.feeds: list[Feed] = []
        self.wanted: list[dict[str, Array]] = []
        session, used = open_model(with_fixed_draws(original)), 0
        for feed in calibration(original, source, samples, batch=_BATCH):
            outputs = self._outputs(session, feed)
            self.feeds.append(feed)
            self.wanted.append(outputs)
            used += sum(array.nbytes for array in (*feed.values(), *outputs.values()))
            if used > _MOST_BYTES:
                break
        values = {name: np.concatenate([np.ravel(row[name]) for row in self.wanted]) for name in self.wanted[0]}
        values = {name: each for name, each in values.items() if each.size and name not in original.free_io}
        self.variance = {name: float(each.var(dtype=np.float64)) for name, each in values.items()}

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(map(sample_count, self.feeds))

    @property
    def sample_size(self) -> float:
        """How many numbers the inputs have for each sample, in the mean."""
        return sum(array.size for feed in self.feeds for array in feed.values()) / self.count

    @property
    def is_defined(self) -> bool:
        """Whether the model has outputs that can be compared."""
        return bool(self.variance)

    def __call__(self, model: Model) -> Floats:
        """Return the divergence of a model with the same outputs, for each sample or, without batch axis, each run."""
        session = open_model(with_fixed_draws(model), threads=1)
        batches = Divided.among(range(len(self.feeds)))
        return np.concatenate([*batches.each(lambda n: self.of_batch(n, self._outputs(session, self.feeds[n])))])

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs that are compared."""
        return tuple(self.variance)

    def of_batch(self, batch: int, made: Mapping[str, Array]) -> Floats:
        """Return the same for one batch of samples, from the outputs of a model as float32."""
        wanted = self.wanted[batch]
        found = [self._of_output(name, wanted[name], made[name]) for name in self.variance]
        is_by_sample = len({len(each) for each in found}) == 1
        return np.asarray(np.mean(found if is_by_sample else [[float(each.mean())] for each in found], axis=0))

    @staticmethod
    def _outputs(session: Any, feed: Feed) -> dict[str, Array]:
        """Return the outputs of floating-point type by name."""
        names = [entry.name for entry in session.get_outputs()]
        outputs = dict(zip(names, execute(session, feed), strict=True))
        return {name: np.asarray(array, np.float32) for name, array in outputs.items() if array.dtype.kind == "f"}

    def _of_output(self, name: str, wanted: Array, made: Array) -> Floats:
        """Return the divergence of each sample; 1, as for a constant, where sizes depend on the data and differ."""
        axis = self.axes.get(name)
        if wanted.shape != made.shape:
            return np.ones(len(np.atleast_1d(wanted)) or 1)
        if not wanted.size:
            return np.zeros(1)
        if axis is None or wanted.ndim < 2:
            each = np.square(wanted - made) / (self.variance[name] or 1.0)
        else:
            first, second = (_logarithms(values, axis, self.temperature) for values in (wanted, made))
            each = (np.exp(first) * (first - second)).sum(axis)
        rows = np.atleast_1d(each)
        return np.asarray(rows.reshape(len(rows), -1).mean(1, dtype=np.float64))


def is_nearer(first: Floats, second: Floats) -> bool:
    """Return whether a model with the first divergences is nearer to the original than one with the second.

    The mean difference must exceed twice its standard error, so that chance does not decide.
    """
    if not np.isfinite(first).all():
        return False
    if not np.isfinite(second).all():
        return True
    gained = second - first
    error = float(gained.std(ddof=1)) / np.sqrt(len(gained)) if len(gained) > 1 else 0.0
    return float(gained.mean()) > _ERRORS * error


def _logarithms(values: Array, axis: int, temperature: float) -> Array:
    """Return the logarithms of the probabilities in the values or, for logits, of their softmax, softened."""
    is_probability = float(values.min()) >= 0 and bool((np.abs(values.sum(axis) - 1) < _NEAR_ONE).all())
    logits = np.log(np.maximum(values, _LEAST)) if is_probability else values
    logits = (logits - logits.max(axis, keepdims=True)) / temperature
    return np.asarray(logits - np.log(np.exp(logits).sum(axis, keepdims=True)))
