"""Compression as a pass of onnx-ir: `onnx_ir.passes.Sequential(CompressPass(data, macs=0.5), …)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir
from onnx_ir.passes import FunctionalPass, PassResult

from cpd_onnx.ir.model import in_form_of
from cpd_onnx.options import taking
from cpd_onnx.workflow.api import CompressOptions, compressed_by
from cpd_onnx.workflow.compress import Compressed


@dataclass(frozen=True, kw_only=True)
class PassOptions(CompressOptions):
    """Options of `CompressPass`; `observer` is called with the result for each model."""

    observer: Callable[[Compressed], None] | None = None


class CompressPass(FunctionalPass):
    """A functional pass that returns a compressed and verified model; its input is not changed."""

    @taking(PassOptions)
    def __init__(self, options: PassOptions) -> None:
        """Create the pass from the arguments of `api.compress`; the observer receives the result for each model."""
        super().__init__()
        self.options = options

    def call(self, model: onnx_ir.Model) -> PassResult:
        """Compress a model; raises the errors of `api.compress`."""
        result = compressed_by(model, self.options)
        if self.options.observer is not None:
            self.options.observer(result)
        return PassResult(in_form_of(model, result.state.model), bool(result.state.edits or result.found.trained))
