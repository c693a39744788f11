"""Synthetic inputs with the statistics of images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cpd_onnx.ir.model import Array
from cpd_onnx.runtime.sessions import Feed, equal_constants, random_array, random_feed
from cpd_onnx.shapes.values import Folded

_SHAPES = (4, 24)
"""Least number of shapes in an image, and one more than the largest (heuristic)."""
_SMALLEST, _LARGEST = 0.06, 0.7
"""Smallest and largest radius of a shape, relative to the shorter side of the image (heuristic)."""
_TEXTURE = 0.3
"""Contrast of the texture of shapes (heuristic)."""
_ELLIPSE, _RECTANGLE = 0, 1
"""Kinds of shapes; others are triangles."""


class Synthetic:
    """Source of synthetic inputs for a model without data.

    Images are dead leaves: opaque shapes of many sizes over each other, which have edges, corners and the spectrum of
    natural images (Lee, Mumford and Huang, Occlusion Models for Natural Images, IJCV 2001; networks learn from them:
    Baradad et al., Learning to See by Looking at Noise, NeurIPS 2021). Shapes are textured by noise of that spectrum,
    whose amplitudes are inversely proportional to the frequency; images differ in brightness and contrast. Over all
    images the mean is about 0 and the standard deviation about 1, as of normalised images. A single integer that the
    model compares with constants, such as a sampling rate, is one of these. Other inputs are random as those of
    `random_feed`.

    Attributes:
        count: Number of samples in one pass (heuristic).
        folded: The model.
    """

    def __init__(self, folded: Folded, count: int = 4096) -> None:
        """Create a source for a model; raises UnsupportedError if an input takes strings or has no known shape."""
        self.count = count
        self.folded, self._example = folded, random_feed(folded)

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Feed]:
        """Yield batches of `size` samples, at least one, the same for the same seed."""
        rng = np.random.default_rng(0 if seed is None else seed)
        for _ in range(max(1, self.count // size)):
            yield {name: self._drawn(name, size, rng) for name in self._example}

    def _drawn(self, name: str, size: int, rng: np.random.Generator) -> Array:
        example, value = self._example[name], self.folded.scope.values[name]
        shape = (size, *example.shape[1:]) if example.ndim else ()
        if example.size == 1 and example.dtype.kind in "iu" and (choices := equal_constants(self.folded, value)):
            return np.full(shape, rng.choice(choices), example.dtype)
        if example.dtype.kind != "f" or example.ndim != 4:
            return random_array(self.folded, value, shape, rng)
        channels = min((1, 3), key=lambda axis: example.shape[axis])
        rows = [extent for axis, extent in enumerate(shape) if axis not in (0, channels)]
        made = _leaves(size, shape[channels], (rows[0], rows[1]), rng)
        return np.moveaxis(made, 1, channels).astype(example.dtype)


def _leaves(count: int, channels: int, size: tuple[int, int], rng: np.random.Generator) -> Array:
    """Return images [count, channels, height, width] of textured shapes over each other."""
    made = _noise(count, channels, size, rng)
    for image in made:
        texture = image.copy()
        numbers = rng.integers(*_SHAPES)
        radii = min(size) * np.clip(_SMALLEST * rng.random(numbers) ** -0.6, _SMALLEST, _LARGEST)
        for radius in np.sort(radii)[::-1].tolist():  # the small ones on top
            _draw(image, texture, radius, rng)
    made -= made.mean()
    made /= float(made.std()) or 1.0
    made -= 0.3 * made.mean(axis=(1, 2, 3), keepdims=True)
    contrast, brightness = rng.uniform(0.5, 1.3, (count, 1, 1, 1)), rng.normal(0.0, 0.5, (count, 1, 1, 1))
    return np.asarray(made * contrast + brightness)


def _draw(image: Array, texture: Array, radius: float, rng: np.random.Generator) -> None:
    """Draw an ellipse, rectangle or triangle of a random place, angle and colour over an image."""
    height, width = image.shape[1:]
    y, x, angle, flat = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0, np.pi), rng.uniform(0.4, 1.0)
    kind = int(rng.integers(3))
    colour = rng.normal(0.0, 1.1) + rng.normal(0.0, 0.35, (len(image), 1))
    reach = int(1.5 * radius) + 1  # beyond the corner of a square
    rows = slice(max(0, int(y) - reach), int(y) + reach + 1)
    columns = slice(max(0, int(x) - reach), int(x) + reach + 1)
    down = np.arange(height, dtype=np.float64)[rows, None] - y
    right = np.arange(width, dtype=np.float64)[None, columns] - x
    along = np.cos(angle) * right + np.sin(angle) * down
    across = (np.cos(angle) * down - np.sin(angle) * right) / flat
    if kind == _ELLIPSE:
        inside = along**2 + across**2 < radius**2
    elif kind == _RECTANGLE:
        inside = np.maximum(np.abs(along), np.abs(across)) < radius
    else:
        inside = (np.abs(across) < radius) & (np.abs(along) < (radius - across) / 2)
    image[:, rows, columns][:, inside] = colour + _TEXTURE * texture[:, rows, columns][:, inside]


def _noise(count: int, channels: int, size: tuple[int, int], rng: np.random.Generator) -> Array:
    """Return noise [count, channels, height, width] with the spectrum of natural images and correlated channels."""
    squares = np.square(np.fft.fftfreq(size[0]))[:, None] + np.square(np.fft.rfftfreq(size[1]))
    squares[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((count, channels + 1, *size))) / np.sqrt(squares)
    planes = np.fft.irfft2(spectrum, size)
    planes /= float(planes.std()) or 1.0
    return np.asarray(0.9 * planes[:, :1] + 0.4 * planes[:, 1:])
