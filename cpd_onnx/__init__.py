"""Make a trained ONNX model smaller and faster, and prove that nothing broke.

>>> import cpd_onnx as cpd
>>> state = cpd.run("comb, score{kind='l2'}, allocate{macs=0.5}, prune, verify", "model.onnx")  # doctest: +SKIP
>>> state.save("small.onnx")  # doctest: +SKIP

Or all in one go, with samples repaired and distilled as well:

>>> cpd.compress("model.onnx", "train.npz", macs=0.5).save("small.onnx")  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from cpd_onnx.api import compress, compressed

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
    "compress",
    "compressed",
    "load",
    "load_plan",
    "run",
]


def __getattr__(name: str) -> Any:
    """Functions that stand above all passes, imported when they are asked for."""
    if name not in ("compress", "compressed"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cpd_onnx import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
