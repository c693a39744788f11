"""Random parts of images, scaled to their size: further samples of a model that was trained on photographs.

The original answers on them as on any other image, so that they need no labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from cpd_onnx.data.signature import Array, Batch, Input
from cpd_onnx.runtime.sessions import sample_count

CROP = 0.6
"""Default of the smallest part of an image, as a fraction of its area (heuristic)."""
_NUMBERS = 1 << 24
"""Most numbers in the samples with which others are added (heuristic)."""
_ASPECT = 4 / 3
"""Maximum ratio of the sides of a part of an image, of those of the image."""
_RANK, _SHORTEST, _LONGEST = 4, 16, 4
"""Rank of images, their shortest side, and the longest in shortest ones (heuristic)."""


def image_input(inputs: Sequence[Input]) -> str | None:
    """Return the input with the shape of photographs [N, 1 or 3, H, W]; None if none has, or another its rank."""
    maps = [entry for entry in inputs if entry.shape is not None and len(entry.shape) == _RANK]
    if len(maps) != 1 or maps[0].shape is None or maps[0].shape[1] not in (1, 3):
        return None
    sides = [size for size in maps[0].shape[2:] if isinstance(size, int)]
    has_sides = not sides or (min(sides) >= _SHORTEST and max(sides) <= _LONGEST * min(sides))
    return maps[0].name if has_sides else None


def cropped(feeds: Sequence[Batch], inputs: Sequence[Input], samples: int, seed: int) -> list[Batch]:
    """Return about that many samples more: random parts of the images in some feeds; none of other inputs.

    There are fewer, or none, where images are large: each has many positions from which a layer is fitted.

    Args:
        feeds: Inputs of runs of a model.
        inputs: Its signature.
        samples: Number of samples to return, rounded up to that of whole feeds.
        seed: Seed of the parts.
    """
    name, found = image_input(inputs), list[Batch]()
    if name is None or not feeds:
        return found
    numbers = sum(feed[name].size for feed in feeds) / sum(map(sample_count, feeds))
    samples = min(samples, int(_NUMBERS / numbers) - sum(map(sample_count, feeds)))
    rng = np.random.default_rng(seed)
    for feed in itertools.cycle(feeds):
        if samples <= 0:
            break
        found.append({**feed, name: enlarged(feed[name], windows(len(feed[name]), CROP, rng))})
        samples -= sample_count(feed)
    return found


def windows(count: int, least: float, generator: np.random.Generator) -> Array:
    """Return the scales and the centres of random parts of images [N, 2 (height, width), 2], with sides in -1..1.

    Their area is at least the given fraction of the image, and their sides differ by up to `_ASPECT` (Szegedy et al.,
    CVPR 2015).
    """
    side = np.sqrt(generator.uniform(least, 1, count))
    stretch = np.sqrt(np.exp(generator.uniform(-np.log(_ASPECT), np.log(_ASPECT), count)))
    result = np.empty((count, 2, 2))
    for axis, scale in enumerate((np.minimum(1, side / stretch), np.minimum(1, side * stretch))):
        result[:, axis, 0] = scale
        result[:, axis, 1] = generator.uniform(-1, 1, count) * (1 - scale)
    return result


def enlarged(images: Array, places: Array) -> Array:
    """Return parts of images [N, C, H, W] or of maps of labels [N, H, W] scaled to their size.

    Floats are interpolated linearly, and integers taken from the nearest pixel.

    Args:
        images: The images.
        places: The parts, see `windows`.
    """
    is_smooth = np.issubdtype(images.dtype, np.floating)
    result = np.empty_like(images)
    for image, place, found in zip(images, places, result, strict=True):
        rows, columns = (
            _positions(size, scale, centre) for size, (scale, centre) in zip(image.shape[-2:], place, strict=True)
        )
        if is_smooth:
            down, right = _weights(rows), _weights(columns)
            found[...] = down @ image.astype(np.float32) @ right.T
        else:
            found[...] = image[..., np.rint(rows).astype(int)[:, None], np.rint(columns).astype(int)]
    return result


def _positions(size: int, scale: float, centre: float) -> Array:
    """Return the places in an axis, in pixels, of which the pixels of its part are taken."""
    middles = (2 * np.arange(size) + 1) / size - 1
    return np.clip(((scale * middles + centre + 1) * size - 1) / 2, 0, size - 1)


def _weights(positions: Array) -> Array:
    """Return the matrix that interpolates an axis linearly at some places."""
    size = len(positions)
    result = np.zeros((size, size), np.float32)
    before = np.minimum(np.floor(positions).astype(int), max(size - 2, 0))
    share = positions - before
    np.add.at(result, (np.arange(size), before), 1 - share)
    np.add.at(result, (np.arange(size), np.minimum(before + 1, size - 1)), share)
    return result
