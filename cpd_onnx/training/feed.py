"""Training batches on a device: repeated, reshuffled in each pass, augmented, and divided among the processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, NodeProto
from torch import Tensor

from cpd_onnx.data.images.crops import enlarged, image_input, windows
from cpd_onnx.data.metrics import IGNORED
from cpd_onnx.data.sources import LABELS, Batch, Source, fixed_batch, inputs_of, steps_per_pass
from cpd_onnx.errors import DataError
from cpd_onnx.torch.dtypes import to_torch
from cpd_onnx.training.process_group import ProcessGroup

Array = npt.NDArray[Any]

_FEW_CHANNELS = 16
"""Number of input channels below which oneDNN, as of torch 2.13, writes beyond the gradient of a strided pointwise
kernel in the layout channels-last, which ends the process (measured: below 8 with AVX2; AVX-512 has vectors of 16)."""


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of images, which are the inputs of rank 4.

    Attributes:
        flip: Whether half of them, at random, are mirrored horizontally.
        shift: Maximum translation in each direction, in pixels.
        crop: Minimum area, as a fraction of the image, of the part that replaces it, scaled to its size; 1 for all.
    """

    flip: bool = False
    shift: int = 0
    crop: float = 1.0

    def __bool__(self) -> bool:
        """Return whether images are changed."""
        return self.flip or self.shift > 0 or self.crop < 1


def memory_format(model: ModelProto, device: torch.device) -> torch.memory_format:
    """Return the layout of images and kernels in which a model trains: channels-last, which is faster, if torch can.

    On the CPU, a model with a strided pointwise kernel over few channels is contiguous, see `_FEW_CHANNELS`.
    """
    if device.type != "cpu":
        return torch.channels_last
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    is_safe = not any(_is_strided_pointwise(node, sizes) for node in model.graph.node)
    return torch.channels_last if is_safe else torch.contiguous_format


def _is_strided_pointwise(node: NodeProto, sizes: Mapping[str, tuple[int, ...]]) -> bool:
    if node.op_type != "Conv":
        return False
    ints = {attribute.name: attribute.ints for attribute in node.attribute}
    size = sizes.get(node.input[1], ())  # empty for a weight that the graph computes
    is_pointwise = all(length == 1 for length in size[2:] or ints.get("kernel_shape", ()))
    return is_pointwise and max(ints.get("strides", ()), default=1) > 1 and (not size or size[1] < _FEW_CHANNELS)


class Feed:
    """Batches by step: the batch of a step does not depend on whether earlier ones were read."""

    def __init__(
        self,
        source: Source,
        model: ModelProto,
        batch_size: int,
        process_group: ProcessGroup,
        *,
        seed: int,
        augmentation: Augmentation,
    ) -> None:
        """Choose the batch size that fits the model, the data and the number of processes.

        Raises:
            DataError: There is none.
        """
        inputs = inputs_of(model)
        fixed = fixed_batch(inputs)
        self.source, self.process_group, self.seed, self.augmentation = source, process_group, seed, augmentation
        self.layout = memory_format(model, process_group.device)
        whole = fixed * process_group.size if fixed else min(batch_size, source.count or batch_size)
        if source.count is not None and source.count < whole:
            raise DataError(f"the model takes {whole} samples at a time but the data has only {source.count}")
        if whole % process_group.size:
            raise DataError(
                f"a batch of {whole} samples cannot be divided among {process_group.size} processes; choose a multiple"
            )
        self.size, self.is_fixed = whole, bool(fixed)
        self.inputs, self.names = inputs, [entry.name for entry in inputs]
        self.photographs = image_input(inputs)
        self.images = {entry.name for entry in inputs if entry.shape is not None and len(entry.shape) == 4}

    @property
    def per_pass(self) -> int | None:
        """Number of full batches in one pass over the data; None if it is unknown."""
        return steps_per_pass(self.source, self.size)

    def batches(self, start: int = 0) -> Iterator[tuple[list[Tensor], Tensor | None]]:
        """Yield, from step `start` on, the inputs in the order of the graph, and the labels if there are any."""
        for step, batch in self._numbered(start):
            if self.augmentation and self.images:
                batch = augment(batch, self.images, self.augmentation, np.random.default_rng([self.seed, step]))
            yield [self._tensor(entry.taken(batch[entry.name])) for entry in self.inputs], self._labels(batch)

    def _numbered(self, start: int) -> Iterator[tuple[int, Batch]]:
        """Yield full batches with the numbers of their steps; passes that end before `start` are not read."""
        passes = start // self.per_pass if self.per_pass else 0
        step = passes * (self.per_pass or 0)
        for number in itertools.count(passes):
            before = step
            for batch in self.source.batches(self.size, seed=self.seed + number):
                if self._is_full(batch):
                    if step >= start:
                        yield step, batch
                    step += 1
            if step == before:
                raise DataError(f"the data gave no batch of {self.size} samples in its pass {number + 1}")

    def _is_full(self, batch: Batch) -> bool:
        """Return whether the batch has the required size; a source of unknown length chooses its own batches."""
        sizes = [len(batch[name]) for name in self.names if batch[name].ndim]
        if self.source.count is None:
            return all(size >= self.process_group.size for size in sizes)
        return all(size == self.size for size in sizes)

    def _tensor(self, array: Array) -> Tensor:
        if array.ndim and self.process_group.size > 1:
            size = len(array) // self.process_group.size
            array = array[self.process_group.rank * size : (self.process_group.rank + 1) * size]
        tensor = to_torch(array).to(self.process_group.device, non_blocking=True)
        return tensor.to(memory_format=self.layout) if tensor.ndim == 4 else tensor

    def _labels(self, batch: Batch) -> Tensor | None:
        return self._tensor(batch[LABELS]).to(torch.int64) if LABELS in batch else None


def augment(batch: Batch, images: set[str], options: Augmentation, generator: np.random.Generator) -> Batch:
    """Return the batch with the images [N, C, H, W] of each sample, and its label map [N, H, W], augmented alike."""
    count = next(len(batch[name]) for name in images)
    flips = generator.random(count) < 0.5 if options.flip else np.zeros(count, bool)
    moves = generator.integers(-options.shift, options.shift + 1, (count, 2))
    parts = windows(count, options.crop, generator) if options.crop < 1 else None
    result = dict(batch)
    maps = {LABELS} if LABELS in batch and batch[LABELS].ndim == 3 else set()
    for name in images | maps:
        fill = IGNORED if name == LABELS else 0
        samples = zip(batch[name], flips, moves, strict=True)
        result[name] = np.stack([_moved(x[..., ::-1] if flip else x, move, fill) for x, flip, move in samples])
        if parts is not None:
            result[name] = enlarged(result[name], parts)
    return result


def _moved(x: Array, move: Array, fill: int) -> Array:
    """Return the image shifted by (down, right) along the last two axes, with a fill value where it moved away from."""
    down, right = (int(step) for step in move)
    height, width = x.shape[-2:]
    result = np.full_like(x, fill)
    target = (slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0)))
    source = (slice(max(-down, 0), height + min(-down, 0)), slice(max(-right, 0), width + min(-right, 0)))
    result[(..., *target)] = x[(..., *source)]
    return result
