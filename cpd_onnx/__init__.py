"""Make a trained ONNX model smaller and faster, and prove that nothing broke.

>>> import cpd_onnx as cpd
>>> state = cpd.run("comb, score{kind='l2'}, allocate{macs=0.5}, prune, verify", "model.onnx")  # doctest: +SKIP
>>> state.save("small.onnx")  # doctest: +SKIP
"""

from cpd_onnx.errors import (
    CpdError,
    DataError,
    ModelError,
    PlanError,
    ProofError,
    TargetError,
    UnsupportedError,
)
from cpd_onnx.graph import Model, load
from cpd_onnx.pipeline import run
from cpd_onnx.plan import Plan, load_plan
from cpd_onnx.state import State
from cpd_onnx.version import __version__

__all__ = [
    "CpdError",
    "DataError",
    "Model",
    "ModelError",
    "Plan",
    "PlanError",
    "ProofError",
    "State",
    "TargetError",
    "UnsupportedError",
    "__version__",
    "load",
    "load_plan",
    "run",
]
