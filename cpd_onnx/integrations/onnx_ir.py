"""A pass for pipelines of onnx-ir: `onnx_ir.passes.Sequential(CompressPass(data, macs=0.5), …)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir
from onnx_ir.passes import FunctionalPass, PassResult

from cpd_onnx.data.open import Data
from cpd_onnx.ir.model import in_form_of
from cpd_onnx.workflow.api import compressed
from cpd_onnx.workflow.compress import Compressed


class CompressPass(FunctionalPass):
    """Gives a smaller model, proven; the one that goes in is not changed."""

    def __init__(
        self,
        data: Data | None = None,
        *,
        train: bool | Mapping[str, Any] | None = None,
        input_shapes: Mapping[str, Sequence[int]] | None = None,
        observer: Callable[[Compressed], None] | None = None,
        **options: Any,
    ) -> None:
        """Take what `api.compress` takes; the observer is told what there is to know of each model."""
        super().__init__()
        self.data, self.observer = data, observer
        self.options: dict[str, Any] = {"train": train, "input_shapes": input_shapes, **options}

    def call(self, model: onnx_ir.Model) -> PassResult:
        """Compress; raises CpdError as `api.compress` does."""
        made = compressed(model, self.data, **self.options)
        if self.observer is not None:
            self.observer(made)
        return PassResult(in_form_of(model, made.state.model), bool(made.state.edits or made.found.trained))
