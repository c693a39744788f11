"""The error of a model's outputs against those of another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from cpd_onnx.ir.model import Array, Model
from cpd_onnx.runtime.draws import with_fixed_draws
from cpd_onnx.runtime.sessions import Feed, execute, open_model


def outputs_of(model: Model, feeds: Sequence[Feed]) -> Iterator[list[Array]]:
    """Yield the outputs of floating-point type for each feed, but for those that may lose channels.

    Raises UnsupportedError if onnxruntime cannot run the model.
    """
    session = open_model(with_fixed_draws(model))
    are_free = [entry.name in model.free_io for entry in session.get_outputs()]
    for feed in feeds:
        pairs = zip(execute(session, feed), are_free, strict=True)
        yield [np.asarray(array, np.float64) for array, is_free in pairs if array.dtype.kind == "f" and not is_free]


def output_error(wanted: Iterable[Sequence[Array]], made: Iterable[Sequence[Array]]) -> float:
    """Return the mean over the outputs of their mean squared error over their variance.

    An output whose size depends on the data has an error of 1 in batches where its sizes differ.
    """
    squares: dict[int, list[tuple[float, float, float, int]]] = {}
    for want, made_ in zip(wanted, made, strict=True):
        for place, (a, b) in enumerate(zip(want, made_, strict=True)):
            wrong = float(np.square(a - b).sum()) if a.shape == b.shape else float(np.square(a - a.mean()).sum())
            squares.setdefault(place, []).append((wrong, float(a.sum()), float(np.square(a).sum()), a.size))
    errors = []
    for rows in squares.values():
        wrong, total, square, count = np.sum(rows, axis=0).tolist()
        deviation = square - total**2 / max(1, count)
        errors.append(wrong / deviation if deviation > 0 else 0.0)
    return float(np.mean(errors)) if errors else 0.0


def any_alike(wanted: Iterable[Sequence[Array]], made: Iterable[Sequence[Array]]) -> bool:
    """Return whether any output has the same shape in both, so that its error says something; no if there is none."""
    return any(a.shape == b.shape for pair in zip(wanted, made, strict=True) for a, b in zip(*pair, strict=True))
