"""Comb: find the coupled channels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from cpd_onnx.channels.combing import comb
from cpd_onnx.pipeline.state import State
from cpd_onnx.shapes.inference import fold


@dataclass(frozen=True)
class Comb:
    """Find the coupled channels."""

    name: ClassVar[str] = "comb"
    provides: ClassVar[tuple[str, ...]] = ("folded", "combed")

    def __call__(self, state: State) -> State:
        """Fill in `combed`, and `folded` if it is missing."""
        folded = state.folded if state.folded is not None else fold(state.model, state.input_shapes)
        return replace(state, folded=folded, combed=comb(folded))
