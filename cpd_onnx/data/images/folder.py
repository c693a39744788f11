"""A folder of images as a source of samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cpd_onnx.data.images.decoding import Decoder, Placement, defect_of
from cpd_onnx.data.images.layout import layout_of, padded
from cpd_onnx.data.images.options import ImageOptions
from cpd_onnx.data.signature import LABELS, Array, Batch, Input, order_of
from cpd_onnx.errors import DataError

_LEAST_SIZE = 1.0
"""Width and height in pixels of the input under which a box is dropped, as no detector can find it (heuristic)."""


class ImageFolder:
    """Image files below a folder, with the labels that `layout_of` finds.

    Labels are class indices [N], class ids of masks [N, height, width], or boxes [N, most, 5] in pixels of the input
    (left, upper, right, lower, class), whose unused rows have class -1.

    Attributes:
        found: The images and what labels them.
        decoder: Reads the images.
        broken: Images that cannot be read, with the reason, where they are skipped.
        mask_size: Height and width of masks: those of the input, unless the model's output has others.
    """

    def __init__(
        self,
        folder: Path,
        entry: Input,
        options: ImageOptions | None = None,
        mask_size: tuple[int, int] | None = None,
    ) -> None:
        """Find the files.

        Raises:
            DataError: There are none, labels are missing or malformed, or the model's input is not an image.
        """
        self.entry, self.options = entry, options or ImageOptions()
        self.found = layout_of(folder, self.options.classes)
        self.decoder = Decoder(entry, self.options)
        self.broken: tuple[tuple[Path, str], ...] = ()
        if self.options.skip_broken:
            self._skip_broken()
        self.files = list(self.found.files)
        self.layout = (self.decoder.height, self.decoder.width, self.decoder.channels, self.decoder.first)
        self.mask_size = mask_size or self.layout[:2]
        self.count = len(self.files)
        self.classes = list(self.found.classes.index) if self.found.classes else []
        self._most = max((len(boxes) for boxes in self.found.boxes), default=0) or 1

    def _skip_broken(self) -> None:
        defects = [defect_of(path) for path in self.found.files]
        self.broken = tuple((p, why) for p, why in zip(self.found.files, defects, strict=True) if why is not None)
        self.found = self.found.only([place for place, why in enumerate(defects) if why is None])
        if not self.found.files:
            raise DataError(f"none of the {len(self.broken)} images can be read: {self.broken[0][1]}")

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Yield batches of decoded files."""
        for rows in order_of(self.count, size, seed):
            yield self.read(rows)

    def read(self, rows: npt.NDArray[np.int64]) -> Batch:
        """Return these files, decoded, with their labels."""
        read = [self.decoder.pixels(self.files[row]) for row in rows]
        batch = {self.entry.name: np.stack([self.decoder.prepared(pixels) for pixels, _ in read])}
        labels = self.labels([int(row) for row in rows], [place for _, place in read])
        return batch if labels is None else batch | {LABELS: labels}

    def labels(self, rows: list[int], places: list[Placement]) -> Array | None:
        """Return the labels of images by their places in `files`, where each lies in the input; None without labels."""
        found = self.found
        if found.labels:
            return np.array([found.labels[row] for row in rows], np.int64)
        if found.masks:
            return np.stack([self.decoder.mask(found.masks[row], self.mask_size) for row in rows])
        if found.boxes:
            return padded([self._boxes(found.boxes[r], p) for r, p in zip(rows, places, strict=True)], self._most)
        return None

    def _boxes(self, rows: Array, place: Placement) -> Array:
        """Return boxes given as fractions of the image as boxes in pixels of the input."""
        moved = place.moved(rows[:, :4] * np.array(place.whole * 2))
        is_kept = (moved[:, 2:] - moved[:, :2] >= _LEAST_SIZE).all(1)
        return np.concatenate([moved, rows[:, 4:]], 1)[is_kept]
