"""What samples are like: sizes, colours and formats of images, duplicates, constant samples, ranges of arrays."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cpd_onnx.data.images.decoding import opened
from cpd_onnx.data.images.folder import ImageFolder
from cpd_onnx.data.signature import LABELS, Array

_FILES = 256
"""Largest number of images that are decoded (heuristic: a second for photographs of a million pixels)."""
_MOST_PIXELS = 200_000_000
"""Number of pixels after which no more images are decoded (heuristic: two or three seconds)."""
_ROWS = 256
"""Largest number of rows of an array that are looked at."""
_SHOWN = 5
"""Number of names in a sentence."""
_SQUEEZED = 1.1
"""Change of the aspect ratio from which it is mentioned (heuristic)."""
_RAW = 2.0
"""Largest value of images from which their pixels are 0..255 rather than fractions (heuristic)."""


@dataclass(frozen=True)
class Survey:
    """What was found in samples.

    Attributes:
        summary: Number, format, size and colours of images, such as `538 PNG 32x32 RGB`.
        facts: Whole sentences.
        warnings: Whole sentences about what is likely a mistake.
    """

    summary: str
    facts: tuple[str, ...] = field(default=())
    warnings: tuple[str, ...] = field(default=())


def chosen(count: int, most: int) -> list[int]:
    """Return the places of at most so many of `count` samples, drawn with a fixed seed, in order."""
    if count <= most:
        return list(range(count))
    return sorted(int(place) for place in np.random.default_rng(0).choice(count, most, replace=False))


def of_images(source: ImageFolder) -> Survey:
    """Return what is found in the images of a folder; raises DataError for one that cannot be read."""
    kinds: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    hashes: dict[bytes, list[Path]] = {}
    constant: list[Path] = []
    pixels = 0
    for place in chosen(source.count, _FILES):
        path = source.files[place]
        with opened(path) as file:
            kinds[str(file.format)] += 1
            modes[file.mode] += 1
            sizes[file.size] += 1
            pixels += file.size[0] * file.size[1]
            if pixels > _MOST_PIXELS and len(hashes) > 1:
                break
            content = np.asarray(file)
        if content.size and (content == content[:1, :1]).all():
            constant.append(path)
        key = hashlib.sha256(repr((content.shape, content.dtype)).encode() + content.tobytes()).digest()
        hashes.setdefault(key, []).append(path)
    seen = sum(kinds.values())
    facts = [f"{seen} of {source.count} images were looked at"] if seen < source.count else []
    summary = f"{source.count} {_most(kinds, 'formats')} {_extent(sizes)} {_most(modes, 'colour modes')}"
    facts += [*_left_out(source), *source.found.facts, *_fit_of(source, sizes)]
    return Survey(summary, tuple(facts), (*_copies(hashes.values(), seen), *_flat(constant, seen)))


def of_arrays(arrays: Mapping[str, Array]) -> Survey:
    """Return what is found in arrays with one row a sample."""
    rows = {name: array for name, array in arrays.items() if array.ndim}
    count = len(next(iter(rows.values())))
    places = chosen(count, _ROWS)
    facts = [f"{len(places)} of {count} samples were looked at"] if len(places) < count else []
    warnings = []
    given = {name: np.asarray(array[places]) for name, array in rows.items() if name != LABELS}
    for name, array in given.items():
        if array.size == 0 or array.dtype.kind not in "fiub":
            continue
        if not np.isfinite(array).all():
            warnings.append(f"array {name!r} contains values that are not finite")
            continue
        low, high = array.min(), array.max()
        facts.append(f"array {name!r} is {array.dtype} from {low:g} to {high:g}, mean {array.mean(dtype=np.float64):g}")
        constant = int((array.reshape(len(array), -1) == array.reshape(len(array), -1)[:, :1]).all(1).sum())
        if constant and array[0].size > 1:
            warnings.append(f"constant samples of {name!r}: {constant} of {len(array)}")
    keys = Counter(b"".join(array[row].tobytes() for array in given.values()) for row in range(len(places)))
    copies = len(places) - len(keys)
    if copies:
        warnings.append(f"copies of other samples: {copies} of {len(places)}")
    return Survey(f"{count} samples", tuple(facts), tuple(warnings))


def raw_pixels(array: Array, *, first: bool) -> Array | None:
    """Return images of an array as pixels 0..255 [N, height, width, channels]; None if they are normalised already."""
    values = np.asarray(array, np.float32)
    if not values.size or values.min() < 0 or values.max() > 255:
        return None
    scaled = values if values.max() > _RAW else values * 255
    return np.moveaxis(scaled, 1, -1) if first else scaled


def _most(counts: Counter[str], what: str) -> str:
    """Return the only key, or all with their numbers."""
    if len(counts) == 1:
        return next(iter(counts))
    listed = ", ".join(f"{name} {number}" for name, number in counts.most_common(_SHOWN))
    return f"images ({listed})" if what == "formats" else f"({listed})"


def _extent(sizes: Iterable[tuple[int, int]]) -> str:
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    (least_w, least_h), (most_w, most_h) = ordered[0], ordered[-1]
    return f"{most_w}x{most_h}" if len(ordered) == 1 else f"{least_w}x{least_h} to {most_w}x{most_h}"


def _left_out(source: ImageFolder) -> list[str]:
    if not source.broken:
        return []
    names = ", ".join(path.name for path, _ in source.broken[:_SHOWN])
    return [f"left out because they cannot be read ({len(source.broken)}): {names}"]


def _fit_of(source: ImageFolder, sizes: Mapping[tuple[int, int], int]) -> list[str]:
    """Return how the images are brought to the size of the input, where that changes them much."""
    height, width = source.layout[:2]
    if source.decoder.preprocessing.letterbox or source.options.resize:
        return []
    changes = {size: (size[0] / size[1]) / (width / height) for size in sizes}
    if not any(max(change, 1 / change) > _SQUEEZED for change in changes.values()):
        return []
    return [
        f"images are squeezed to {width}x{height}, which changes their aspect ratio: --image-letterbox keeps it, and "
        "so does --image-resize"
    ]


def _copies(groups: Iterable[Sequence[Path]], seen: int) -> list[str]:
    same = [group for group in groups if len(group) > 1]
    if not same:
        return []
    count = sum(len(group) - 1 for group in same)
    return [f"copies of other images: {count} of {seen}, such as {same[0][1].name} of {same[0][0].name}"]


def _flat(constant: Sequence[Path], seen: int) -> list[str]:
    if not constant:
        return []
    names = ", ".join(path.name for path in constant[:_SHOWN])
    return [f"images of one colour: {len(constant)} of {seen}, {names}"]
