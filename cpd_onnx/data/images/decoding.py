"""Decoding of image files into the input of a model, and of masks into class ids."""

from __future__ import annotations

import importlib
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpd_onnx.data.images.options import ImageOptions, Preprocessing
from cpd_onnx.data.signature import IGNORED, Array, Input
from cpd_onnx.errors import DataError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff"})
"""Suffixes of image files."""
_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "TIFF")
"""Allowed formats: Pillow detects the format from the content, and would start Ghostscript for PostScript."""
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, struct.error)
"""Exceptions that decoders raise for damaged files."""
_GREY = 114
"""Value of the pixels around a letterboxed image (as YOLOv5 and YOLOX fill them)."""
_OF_IDS = ("L", "P", "1", "I", "I;16")
"""Modes of images whose pixels are numbers, not colours."""


@dataclass(frozen=True)
class Placement:
    """Where the pixels of an image lie in the input of the model.

    Attributes:
        part: Left, upper, right and lower edge of what is used of the image.
        size: Width and height that the part is resized to.
        start: Left and upper edge of the part in the input.
        whole: Width and height of the image.
    """

    part: tuple[float, float, float, float]
    size: tuple[int, int]
    start: tuple[int, int]
    whole: tuple[int, int]

    def moved(self, boxes: Array) -> Array:
        """Return boxes [n, 4] (left, upper, right, lower) of the image as boxes in the input, cut off at its part."""
        begin, end = np.array(self.part[:2]), np.array(self.part[2:])
        factor = np.array(self.size) / (end - begin)
        corners = np.clip(boxes.reshape(-1, 2, 2), begin, end)
        return np.asarray(((corners - begin) * factor + np.array(self.start)).reshape(-1, 4))


class Decoder:
    """Reads image files for one input of a model.

    Attributes:
        height, width, channels: Sizes of the input.
        first: Whether the channels are its first axis.
        preprocessing: What becomes of the pixels.
    """

    def __init__(self, entry: Input, options: ImageOptions) -> None:
        """Determine the layout; raises DataError if the input is not an image, or the options do not fit it."""
        self.entry, self.options = entry, options
        self.height, self.width, self.channels, self.first = image_layout(entry, options)
        self.preprocessing = options.preprocessing().for_channels(self.channels)

    def read(self, path: Path) -> Array:
        """Return an image as one sample of the input."""
        return self.prepared(self.pixels(path)[0])

    def pixels(self, path: Path) -> tuple[Array, Placement]:
        """Return the pixels of an image at the input's size, uint8 [height, width, channels] in RGB order."""
        module = _image_module()
        with opened(path) as file:
            whole = file.convert("L" if self.channels == 1 else "RGB")
            place = self.placement(whole.size)
            part = whole.resize(place.size, module.Resampling.BILINEAR, place.part)
        return self._on_canvas(np.asarray(part).reshape(*place.size[::-1], self.channels), place, _GREY), place

    def prepared(self, pixels: Array, preprocessing: Preprocessing | None = None) -> Array:
        """Return pixels [.., height, width, channels] as the input takes them."""
        chosen = preprocessing or self.preprocessing
        ordered = pixels[..., ::-1] if chosen.order == "BGR" else pixels
        if self.entry.dtype.kind in "iu":
            values = ordered.astype(self.entry.dtype)
        else:
            mean, std = (np.asarray(vector, np.float64) for vector in (chosen.mean, chosen.std))
            values = ((ordered * chosen.scale - mean) / std).astype(self.entry.dtype)
        return np.ascontiguousarray(np.moveaxis(values, -1, -3) if self.first else values)

    def mask(self, path: Path, size: tuple[int, int]) -> Array:
        """Return the class ids of a mask at a height and width, int64; what lies outside of the image is ignored."""
        module = _image_module()
        with opened(path, "mask") as file:
            if file.mode not in _OF_IDS:
                raise DataError(
                    f"mask {str(path)!r} has colours ({file.mode}): give class ids, as a grey or palette PNG"
                )
            place = self.placement(file.size)
            part = file.resize(place.size, module.Resampling.NEAREST, place.part)
            ids = np.asarray(part).astype(np.int64)[..., None]
        canvas = self._on_canvas(ids, place, IGNORED)[..., 0]
        places = (((np.arange(n) + 0.5) * m / n).astype(np.int64) for n, m in zip(size, canvas.shape, strict=True))
        return np.asarray(canvas[np.ix_(*places)])

    def placement(self, size: tuple[int, int]) -> Placement:
        """Return where an image of a width and height lies; raises DataError if it is too small to be cut."""
        wanted, whole = (self.width, self.height), (0.0, 0.0, float(size[0]), float(size[1]))
        if self.preprocessing.letterbox:
            zoom = min(wanted[0] / size[0], wanted[1] / size[1])
            inner = max(1, round(size[0] * zoom)), max(1, round(size[1] * zoom))
            return Placement(whole, inner, ((wanted[0] - inner[0]) // 2, (wanted[1] - inner[1]) // 2), size)
        return Placement(_middle(size, wanted, self.options.resize) or whole, wanted, (0, 0), size)

    def _on_canvas(self, part: Array, place: Placement, fill: int) -> Array:
        if part.shape[:2] == (self.height, self.width):
            return part
        canvas = np.full((self.height, self.width, part.shape[2]), fill, part.dtype)
        left, top = place.start
        canvas[top : top + part.shape[0], left : left + part.shape[1]] = part
        return canvas


@contextmanager
def opened(path: Path, what: str = "image") -> Iterator[Any]:
    """Yield the image of a file; raises DataError if it or what the block decodes of it cannot be read."""
    module = _image_module()
    advice = ", or give --skip-broken" if what == "image" else ""
    try:
        with warnings.catch_warnings(action="ignore"), module.open(path, formats=_FORMATS) as file:
            yield file
    except (*_BROKEN, module.DecompressionBombError) as error:
        raise DataError(f"{what} {str(path)!r} cannot be read: {error}; repair or remove it{advice}") from error


def defect_of(path: Path) -> str | None:
    """Return why an image cannot be read; None if it can. JPEG files are decoded at a lower resolution."""
    try:
        with opened(path) as file:
            file.draft("L", (1, 1))
            file.load()
    except DataError as error:
        return str(error.__cause__)
    return None


def image_layout(entry: Input, options: ImageOptions) -> tuple[int, int, int, bool]:
    """Return height, width and channels of an image input, and whether channels come first.

    Raises:
        DataError: The input is not an image, or its size is dynamic and no option sets it.
    """
    shape = entry.shape or ()
    if len(shape) == 4 and shape[1] in (1, 3):
        channels, sizes, first = shape[1], shape[2:], True
    elif len(shape) == 4 and shape[3] in (1, 3):
        channels, sizes, first = shape[3], shape[1:3], False
    else:
        raise DataError(f"input {entry.name!r} is {entry}, not images of 1 or 3 channels; give the data as .npz")
    height, width = options.size or sizes
    if not isinstance(height, int) or not isinstance(width, int):
        raise DataError(f"input {entry.name!r} is {entry}: set its dynamic axes with --image-size")
    assert isinstance(channels, int)
    return height, width, channels, first


def _middle(
    size: tuple[int, int], wanted: tuple[int, int], resize: int | None
) -> tuple[float, float, float, float] | None:
    """Return the part of an image (left, upper, right, lower) that is used; None for all of it."""
    if resize is None:
        return None
    zoom = resize / min(size)
    if any(part > round(whole * zoom) for part, whole in zip(wanted, size, strict=True)):
        raise DataError(f"a shorter side of {resize} is too small to cut {wanted[0]} by {wanted[1]} out of {size}")
    left, top = (max(0.0, (whole - part / zoom) / 2) for part, whole in zip(wanted, size, strict=True))
    return left, top, size[0] - left, size[1] - top


def _image_module() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ModuleNotFoundError as error:
        raise DataError("reading images needs Pillow: pip install pillow, or give the data as .npz") from error
