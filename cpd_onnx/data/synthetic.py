"""Synthetic inputs with the statistics of images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cpd_onnx.ir.model import Array
from cpd_onnx.runtime.sessions import Feed, random_array, random_feed
from cpd_onnx.shapes.values import Folded


class Synthetic:
    """Source of synthetic inputs for a model without data.

    Images have the spectrum of natural images, whose amplitudes are inversely proportional to the frequency (Field
    1987; networks learn from such noise: Baradad et al., NeurIPS 2021), correlated channels, and individual brightness
    and contrast; over all images the mean is about 0 and the standard deviation about 1, as of normalised images. Other
    inputs are random as those of `random_feed`.

    Attributes:
        count: Number of samples in one pass (heuristic).
    """

    count = 4096

    def __init__(self, folded: Folded) -> None:
        """Create a source for a model; raises UnsupportedError if an input takes strings or has no known shape."""
        self._folded, self._example = folded, random_feed(folded)

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Feed]:
        """Yield batches of `size` samples, the same for the same seed."""
        rng = np.random.default_rng(0 if seed is None else seed)
        for _ in range(self.count // size):
            yield {name: self._drawn(name, size, rng) for name in self._example}

    def _drawn(self, name: str, size: int, rng: np.random.Generator) -> Array:
        example, value = self._example[name], self._folded.scope.values[name]
        shape = (size, *example.shape[1:]) if example.ndim else ()
        if example.dtype.kind != "f" or example.ndim != 4:
            return random_array(self._folded, value, shape, rng)
        channels = min((1, 3), key=lambda axis: example.shape[axis])
        rows = [extent for axis, extent in enumerate(shape) if axis not in (0, channels)]
        made = _natural(size, shape[channels], (rows[0], rows[1]), rng)
        return np.moveaxis(made, 1, channels).astype(example.dtype)


def _natural(count: int, channels: int, size: tuple[int, int], rng: np.random.Generator) -> Array:
    """Return noise that resembles images [count, channels, height, width]."""
    squares = np.square(np.fft.fftfreq(size[0]))[:, None] + np.square(np.fft.rfftfreq(size[1]))
    squares[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((count, channels + 1, *size))) / np.sqrt(squares)
    planes = np.fft.irfft2(spectrum, size)
    planes /= float(planes.std()) or 1.0
    contrast, brightness = rng.uniform(0.4, 1.4, (count, 1, 1, 1)), rng.normal(0.0, 0.6, (count, 1, 1, 1))
    return np.asarray((0.9 * planes[:, :1] + 0.4 * planes[:, 1:]) * contrast + brightness)
