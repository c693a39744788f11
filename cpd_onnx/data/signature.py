"""What a model is fed with: its inputs, and the protocol of a source of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, ValueInfoProto, helper

from cpd_onnx.errors import DataError
from cpd_onnx.ir.interface import Integers, interface_of
from cpd_onnx.ir.model import Model
from cpd_onnx.shapes.stated import required_batches

Array: TypeAlias = npt.NDArray[Any]
Batch: TypeAlias = dict[str, Array]

LABELS = "labels"
"""Name of the array of class labels, which no model input may have."""
IGNORED = 255
"""Label of samples or pixels that are ignored."""


@dataclass(frozen=True)
class Input:
    """One input of a model.

    Attributes:
        name: Name in the graph.
        shape: Size, name of a symbolic size, or None for each axis; None if the rank is unknown.
        dtype: NumPy type of the elements.
        integers: The real numbers that these stand for in a quantised model; None if they stand for themselves.
    """

    name: str
    shape: tuple[int | str | None, ...] | None
    dtype: np.dtype[Any]
    integers: Integers | None = None

    def __str__(self) -> str:
        """Return type and shape as in the ONNX text format: `float32[N,3,32,32]`."""
        axes = "..." if self.shape is None else ",".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.dtype}[{axes}]"

    @property
    def sampled_as(self) -> np.dtype[Any]:
        """NumPy type of the elements of samples: float32 where the elements stand for real numbers."""
        return self.dtype if self.integers is None else np.dtype(np.float32)

    def taken(self, array: Array) -> Array:
        """Return samples as the model takes them: real numbers become the integers that stand for them."""
        return array if self.integers is None else self.integers.quantized(array)


@runtime_checkable
class Source(Protocol):
    """An iterable source of batches."""

    @property
    def count(self) -> int | None:
        """Number of samples in one pass; None if it is not known in advance."""

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Yield every sample once, `size` at a time (the last batch may be smaller), shuffled if there is a seed."""


def inputs_of(model: ModelProto) -> tuple[Input, ...]:
    """Return the inputs that a caller has to feed, initializers excluded, in the order of the graph."""
    stored, integers = {tensor.name for tensor in model.graph.initializer}, interface_of(model).integers
    return tuple(_input(info, integers.get(info.name)) for info in model.graph.input if info.name not in stored)


def run_inputs(model: Model) -> tuple[Input, ...]:
    """Return `inputs_of` a model, with the batch size that its operators require where the file leaves it open."""
    sizes = required_batches(model)
    return tuple(
        replace(entry, shape=(sizes[entry.name], *entry.shape[1:])) if entry.name in sizes and entry.shape else entry
        for entry in inputs_of(model.proto)
    )


def _input(info: ValueInfoProto, integers: Integers | None) -> Input:
    if not info.type.HasField("tensor_type"):
        raise DataError(f"input {info.name!r} is not a tensor; only models with tensor inputs can be fed")
    tensor = info.type.tensor_type
    shape = tuple(_size(dim) for dim in tensor.shape.dim) if tensor.HasField("shape") else None
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return Input(info.name, shape, dtype, integers if integers is not None and dtype == integers.dtype else None)


def _size(dim: Any) -> int | str | None:
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        return int(dim.dim_value)
    return dim.dim_param or None


def fixed_batch(inputs: Sequence[Input]) -> int | None:
    """Return the batch size of a model, None if it is dynamic.

    Raises:
        DataError: The inputs have different fixed sizes.
    """
    sizes = {entry.shape[0] for entry in inputs if entry.shape}
    fixed = sorted(size for size in sizes if isinstance(size, int))
    if len(fixed) > 1:
        raise DataError(
            f"the model's inputs have first axes of different sizes {fixed}; "
            "give the data as module:function, which yields whole feeds"
        )
    return fixed[0] if fixed else None


def order_of(count: int, size: int, seed: int | None) -> Iterator[npt.NDArray[np.int64]]:
    """Return the indices of each batch of one pass."""
    if size < 1:
        raise ValueError(f"batch size must be at least 1, got {size}")
    order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
    return (order[start : start + size] for start in range(0, count, size))
