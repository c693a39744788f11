"""Weights that a graph puts together from initializers: cut up, joined, transposed or brought into another shape."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpd_onnx.ir.model import Array, Model
from cpd_onnx.ir.tensors import held_array, hold


@dataclass(frozen=True, eq=False)
class Moved:
    """A tensor that has each element of some initializers or Constant nodes exactly once.

    Attributes:
        sources: Their names.
        places: Number of each of its elements in the sources, flat and one after the other.
    """

    sources: tuple[str, ...]
    places: npt.NDArray[np.int64]

    def array(self, model: Model) -> Array:
        """Return the values of the tensor."""
        flat = np.concatenate([held_array(model, name).ravel() for name in self.sources])
        return np.asarray(flat[self.places])

    def put(self, model: Model, array: Array) -> None:
        """Change the sources so that the tensor has other values."""
        flat = np.empty(self.places.size, array.dtype)
        flat[self.places.ravel()] = array.ravel()
        start = 0
        for name in self.sources:
            old = held_array(model, name)
            hold(model, name, flat[start : start + old.size].reshape(old.shape).astype(old.dtype))
            start += old.size
