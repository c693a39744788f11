"""Fold: infer the shapes of all tensors and evaluate the shape arithmetic; the model is not changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from cpd_onnx.pipeline.state import State
from cpd_onnx.shapes.inference import fold


@dataclass(frozen=True)
class Fold:
    """Infer the shapes of all tensors."""

    name: ClassVar[str] = "fold"
    provides: ClassVar[tuple[str, ...]] = ("folded",)

    def __call__(self, state: State) -> State:
        """Fill in `folded`."""
        return replace(state, folded=fold(state.model, state.input_shapes))
