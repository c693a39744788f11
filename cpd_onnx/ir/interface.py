"""Inputs and outputs that differ from those of the original, as the metadata of the model describe them.

Some have lost channels (`Model.free_io`): the metadata say which indices of the original's sizes they keep. Others are
integers (`deploy --integer-io`): the metadata say which real numbers these stand for. A model is fed with arrays of the
original's sizes and real numbers as well, so that models of both kinds can be compared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
from onnx import ModelProto

from cpd_onnx.ir.model import Array, Model

Kept: TypeAlias = dict[str, dict[int, list[int]]]
"""Indices of the original's axes that inputs and outputs keep, by name and axis."""

PREFIX = "cpd-onnx.kept."
"""Beginning of the keys of the metadata, before the name of the input or output."""
INTEGERS_PREFIX = "cpd-onnx.integers."
"""The same for the keys that say which real numbers the integers of an input or output stand for."""
INTEGER_TYPES = ("int8", "uint8", "int16", "uint16")
"""Types that inputs and outputs of a quantised model may have, as numpy names them."""


@dataclass(frozen=True)
class Integers:
    """Integers of an input or output that stand for the real numbers (integer - zero point) * scale.

    Attributes:
        dtype: Type of the integers, one of `INTEGER_TYPES`.
        scale: Difference of the real numbers that two consecutive integers stand for, a float32.
        zero_point: Integer that stands for zero.
    """

    dtype: str
    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        """Raise ValueError for values that no QuantizeLinear has."""
        if self.dtype not in INTEGER_TYPES or not 0 < self.scale < math.inf:
            raise ValueError(f"not a type and scale of integers: {self.dtype!r}, {self.scale!r}")
        if not isinstance(self.zero_point, int) or not self.low <= self.zero_point <= self.high:
            raise ValueError(f"{self.zero_point!r} is not a number of type {self.dtype}")

    def __str__(self) -> str:
        """Return type and meaning as text."""
        return f"{self.dtype}, (integer - {self.zero_point}) * {np.float32(self.scale)}"

    @property
    def low(self) -> int:
        """Smallest integer."""
        return int(np.iinfo(self.dtype).min)

    @property
    def high(self) -> int:
        """Largest integer."""
        return int(np.iinfo(self.dtype).max)

    def quantized(self, array: Array) -> Array:
        """Return real numbers as integers, rounded as by QuantizeLinear; other arrays are returned as they are."""
        if array.dtype.kind != "f":
            return array
        steps = np.rint(array.astype(np.float32, copy=False) / np.float32(self.scale))
        return np.asarray(np.clip(steps + np.float32(self.zero_point), self.low, self.high).astype(self.dtype))

    def real(self, array: Array) -> Array:
        """Return the float32 numbers that integers stand for; other arrays are returned as they are."""
        if array.dtype != np.dtype(self.dtype):
            return array
        return (array.astype(np.int32) - self.zero_point).astype(np.float32) * np.float32(self.scale)


@dataclass(frozen=True)
class Interface:
    """How the inputs and outputs of a model differ from those of the original.

    Attributes:
        kept: Indices of the original's axes that they keep.
        integers: The real numbers that their integers stand for, by name.
    """

    kept: Kept = field(default_factory=dict)
    integers: Mapping[str, Integers] = field(default_factory=dict)

    def taken(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Return inputs as the model takes them, from arrays of the original's sizes or real numbers."""
        found = all_cut(arrays, self.kept)
        return {name: self.integers[name].quantized(a) if name in self.integers else a for name, a in found.items()}

    def real(self, name: str, array: Array) -> Array:
        """Return an input or output of the model as the real numbers that it stands for."""
        return self.integers[name].real(array) if name in self.integers else array


def record(model: Model, kept: Kept) -> None:
    """Write into the metadata of a model which indices its inputs and outputs keep, in place of earlier entries."""
    properties = model.proto.metadata_props
    for old in [entry for entry in properties if entry.key.startswith(PREFIX)]:
        properties.remove(old)
    for name, axes in sorted(kept.items()):
        properties.add(key=f"{PREFIX}{name}", value=json.dumps({str(axis): axes[axis] for axis in sorted(axes)}))


def kept_by(model: Model | ModelProto) -> Kept:
    """Return which indices the inputs and outputs of a model keep; empty for one that has lost none."""
    proto = model.proto if isinstance(model, Model) else model
    return kept_in({entry.key: entry.value for entry in proto.metadata_props})


def kept_in(metadata: Mapping[str, str]) -> Kept:
    """Return what `kept_by` returns, from metadata; entries that cannot be read are left out."""
    found: Kept = {}
    for key, value in metadata.items():
        if not key.startswith(PREFIX):
            continue
        try:
            axes = {int(axis): [int(index) for index in indices] for axis, indices in json.loads(value).items()}
        except (AttributeError, TypeError, ValueError):
            continue
        if all(indices and min(indices) >= 0 for indices in axes.values()):
            found[key.removeprefix(PREFIX)] = axes
    return found


def record_integers(model: Model, integers: Mapping[str, Integers]) -> None:
    """Add to the metadata of a model which real numbers the integers of its inputs and outputs stand for."""
    properties = model.proto.metadata_props
    for name, each in sorted(integers.items()):
        for old in [entry for entry in properties if entry.key == f"{INTEGERS_PREFIX}{name}"]:
            properties.remove(old)
        properties.add(key=f"{INTEGERS_PREFIX}{name}", value=json.dumps(asdict(each)))


def interface_of(model: Model | ModelProto) -> Interface:
    """Return how the inputs and outputs of a model differ from those of the original."""
    proto = model.proto if isinstance(model, Model) else model
    return interface_in({entry.key: entry.value for entry in proto.metadata_props})


def interface_in(metadata: Mapping[str, str]) -> Interface:
    """Return what `interface_of` returns, from metadata; entries that cannot be read are left out."""
    found: dict[str, Integers] = {}
    for key, value in metadata.items():
        if not key.startswith(INTEGERS_PREFIX):
            continue
        try:
            said: Any = json.loads(value)
            found[key.removeprefix(INTEGERS_PREFIX)] = Integers(**said)
        except (TypeError, ValueError):
            continue
    return Interface(kept_in(metadata), found)


def cut(array: Array, axes: Mapping[int, list[int]]) -> Array:
    """Return the part of an array of the original's sizes that is kept; one of the present sizes is returned as it is.

    Args:
        array: Values of an input or output.
        axes: Indices that are kept, by axis.
    """
    for axis, indices in axes.items():
        size = array.shape[axis] if axis < array.ndim else 0
        if size != len(indices) and size > max(indices):
            array = np.take(array, indices, axis)
    return array


def all_cut(arrays: Mapping[str, Array], kept: Kept) -> dict[str, Array]:
    """Return arrays by name, those of inputs or outputs that have lost channels without these."""
    return {name: cut(array, kept[name]) if name in kept else array for name, array in arrays.items()}
