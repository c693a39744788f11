"""Make a trained ONNX model smaller and faster, and prove the result correct.

>>> import cpd_onnx as cpd
>>> state = cpd.run("comb, score{kind='l2'}, allocate{macs=0.5}, prune, verify", "model.onnx")  # doctest: +SKIP
>>> state.save("small.onnx")  # doctest: +SKIP

Or in a single call, which with samples also repairs and distills:

>>> cpd.compress("model.onnx", "train.npz", macs=0.5).save("small.onnx")  # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

from cpd_onnx.errors import (
    CpdError,
    DataError,
    InconclusiveError,
    ModelError,
    PlanError,
    ProofError,
    TargetError,
    UnsupportedError,
)
from cpd_onnx.moved import keep_old_names
from cpd_onnx.version import __version__

if TYPE_CHECKING:
    from cpd_onnx.ir.model import Model, load
    from cpd_onnx.pipeline.pipeline import run
    from cpd_onnx.pipeline.state import State
    from cpd_onnx.rewrite.plan import Plan, load_plan
    from cpd_onnx.workflow.api import compress, compressed

__all__ = [
    "CpdError",
    "DataError",
    "InconclusiveError",
    "Model",
    "ModelError",
    "Plan",
    "PlanError",
    "ProofError",
    "State",
    "TargetError",
    "UnsupportedError",
    "__version__",
    "compress",
    "compressed",
    "load",
    "load_plan",
    "run",
]


_HOMES = {
    "Model": "ir.model",
    "Plan": "rewrite.plan",
    "State": "pipeline.state",
    "compress": "workflow.api",
    "compressed": "workflow.api",
    "load": "ir.model",
    "load_plan": "rewrite.plan",
    "run": "pipeline.pipeline",
}
"""Modules of names that are imported on first use, because their libraries take a second to load."""

keep_old_names()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"cpd_onnx.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
