"""Options of image files, and the usual ways in which pixels are prepared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from cpd_onnx.errors import DataError
from cpd_onnx.options import above_zero, commas, number, option, positive

Order: TypeAlias = Literal["RGB", "BGR"]


@dataclass(frozen=True)
class Preprocessing:
    """What becomes of the pixels 0..255 of an image: `(pixels * scale - mean) / std`, after it was brought to size.

    Attributes:
        mean: Mean of each channel in the order in which they are fed, or of all.
        std: Standard deviation of each channel, or of all.
        scale: Factor on the pixels.
        order: Order of the channels.
        letterbox: Whether the aspect ratio is kept and the rest filled with grey, instead of squeezing the image.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1 / 255
    order: Order = "RGB"
    letterbox: bool = False

    def for_channels(self, channels: int) -> Preprocessing:
        """Return the preprocessing of images with 1 or 3 channels: grey ones take the average of three values.

        Raises:
            DataError: There is another number of values.
        """
        return replace(self, mean=_fitting("mean", self.mean, channels), std=_fitting("std", self.std, channels))

    def __str__(self) -> str:
        """Return the formula, such as `(x/255 - 0.5) / 0.5`."""
        factor = round(1 / self.scale, 6)
        text = "x" if self.scale == 1 else f"x/{factor:g}" if factor >= 1 else f"{self.scale:g}*x"
        if any(self.mean):
            text = f"{text} - {_listed(self.mean)}"
        if any(value != 1 for value in self.std):
            text = f"({text}) / {_listed(self.std)}" if any(self.mean) else f"{text} / {_listed(self.std)}"
        return text + (", BGR" if self.order == "BGR" else "")


def _fitting(name: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == 3 and channels == 1:
        return (sum(values) / 3,)
    if len(values) not in (1, channels):
        raise DataError(
            f"--image-{name} has {len(values)} values, but the model takes {channels}: give 1 or {channels}"
        )
    return values


def _listed(values: tuple[float, ...]) -> str:
    texts = [f"{value:g}" for value in values]
    return texts[0] if len(set(texts)) == 1 else f"({', '.join(texts)})"


PRESETS = {
    "imagenet": Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0-1": Preprocessing(),
    "0-255": Preprocessing(scale=1.0),
    "-1..1": Preprocessing((0.5,), (0.5,)),
    "caffe": Preprocessing((103.939, 116.779, 123.68), scale=1.0, order="BGR"),
    "yolo": Preprocessing(letterbox=True),
}
"""Usual preprocessing by name: of torchvision, of plain and raw pixels, of TensorFlow, of Caffe, and of YOLO."""


def height_width(text: str) -> tuple[int, int]:
    """Return the sizes of HEIGHT,WIDTH; raises ValueError for another text."""
    sizes = commas(positive)(text)
    if len(sizes) != 2:
        raise ValueError(f"{text!r} is not HEIGHT,WIDTH")
    return sizes[0], sizes[1]


_of_images = partial(option, group="images of a folder")


@dataclass(frozen=True)
class ImageOptions:
    """Preprocessing of image files: resizing, then `(pixels * scale - mean) / std`, in the layout of the model.

    Integer inputs get unscaled pixels, and models with one channel grey images. What is None is as in the preset or,
    without one, as in "0-1".
    """

    mean: tuple[float, ...] | None = _of_images(
        None, "Mean of each channel, or of all (default: 0)", read=commas(number), metavar="M,M,M"
    )
    std: tuple[float, ...] | None = _of_images(
        None, "Standard deviation of each channel, or of all (default: 1)", read=commas(number), metavar="S,S,S"
    )
    scale: float | None = _of_images(None, "Factor on pixels of 0..255 (default: 1/255)", read=above_zero)
    order: Order | None = _of_images(None, "Order of the channels (default: RGB)", choices=("RGB", "BGR"))
    size: tuple[int, int] | None = _of_images(
        None, "Height and width, where the model leaves them open", read=height_width, metavar="H,W"
    )
    resize: int | None = _of_images(
        None,
        "Length that the shorter side is resized to, before the middle is cut out (default: squeeze to the size)",
        read=positive,
        metavar="N",
    )
    letterbox: bool | None = _of_images(
        None, "Keep the aspect ratio and fill the rest with grey, as YOLO does (default: no)", read=bool
    )
    preset: str | None = _of_images(
        None,
        "Usual preprocessing, which the other options of images override (default: 0-1)",
        flag="--preset",
        choices=tuple(PRESETS),
    )
    classes: Path | None = _of_images(
        None,
        "File with the name of one class a line, in the order of the model's outputs, for folders named like classes",
        flag="--classes",
        read=Path,
        takes="file",
    )
    skip_broken: bool = _of_images(False, "Leave out images that cannot be read, and name them", flag="--skip-broken")

    def preprocessing(self) -> Preprocessing:
        """Return what the options say: the preset, overridden by the values that were given.

        Raises:
            DataError: Both a letterbox and a shorter side were asked for.
        """
        if self.letterbox and self.resize:
            raise DataError("--image-letterbox keeps the whole image and --image-resize cuts out its middle: give one")
        names = ("mean", "std", "scale", "order", "letterbox")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        found = replace(PRESETS[self.preset or "0-1"], **given)
        return replace(found, letterbox=False) if self.resize else found

    @property
    def name(self) -> str | None:
        """The preset that the options amount to; None if it is another preprocessing."""
        found = self.preprocessing()
        names = [self.preset] * (self.preset in PRESETS) + list(PRESETS)
        return next((name for name in names if name and PRESETS[name] == found), None)
